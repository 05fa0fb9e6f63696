"""How do metrics become numbers for a tracker? One gather over the ranks, weighted as the suffix says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirrorpo.losses.metrics import ratio_quantiles

# Tokens of a rank that enter the quantiles over all ranks; of more, an even subsample.
MAX_GATHERED_TOKENS = 8192


def reduce_metrics(accelerator: Any, metrics: dict[str, Tensor], num_tokens: Tensor) -> dict[str, float]:
    """Python numbers, the same on every rank, with one transfer from the device.

    Args:
        accelerator: accelerate's ``Accelerator``.
        metrics: scalars; ``.../max`` and ``.../min`` are extremes, names that end in ``_loss/mean`` are averaged over
            ranks, all others are means over tokens.
        num_tokens: tokens that this rank's means are over.

    Returns:
        The reduced values by name. A mean over no token at all is 0.
    """
    names = list(metrics)
    local = torch.stack([num_tokens.detach().double(), *(metrics[name].detach().double() for name in names)])
    rows = accelerator.gather(local.unsqueeze(0)).cpu()
    counts, values = rows[:, 0], rows[:, 1:]
    total = counts.sum().clamp(min=1.0)
    reduced = {}
    for name, column in zip(names, values.T, strict=True):
        if name.endswith("/max"):
            number = column.max()
        elif name.endswith("/min"):
            number = column.min()
        elif name.endswith("_loss/mean"):
            number = column.mean()
        else:
            number = (column * counts).sum() / total
        reduced[name] = number.item()
    return reduced


@torch.no_grad()
def quantiles_over_ranks(accelerator: Any, log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """Quantiles of w over the tokens of all ranks: those of single ranks have no average that means anything.

    Args:
        accelerator: accelerate's ``Accelerator``.
        log_ratio: (B, T), log w of this rank's tokens; T may differ between ranks.
        mask: (B, T), 0 drops a token.

    Returns:
        ``ratio/q01/mean`` and its siblings, the same on every rank.
    """
    ratio = torch.where(mask.bool(), log_ratio.detach().float().exp(), torch.nan).reshape(-1)
    ratio = ratio[:: max(1, -(-ratio.numel() // MAX_GATHERED_TOKENS))]
    everyone = accelerator.gather(accelerator.pad_across_processes(ratio, dim=0, pad_index=torch.nan))
    return {name: value.item() for name, value in ratio_quantiles(everyone, ~everyone.isnan()).items()}
