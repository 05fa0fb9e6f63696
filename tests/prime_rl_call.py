"""A stand-in that calls a custom loss as prime-rl documents it (docs/algorithms.md, "Custom Loss").

One call for each sequence, flat tensors with the prompt in them, the loss summed over the tokens of the mask; the
sequences are added and divided by the number of tokens of the whole step, with weights by that of those whose weight
is not 0. No code of prime-rl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def with_prompt(row: Tensor, prompt: int, fill: float = 0.0) -> Tensor:
    return torch.cat([torch.full((prompt,), fill, dtype=row.dtype), row])


def step(
    function: Callable[..., LossOutputs],
    kwargs: dict[str, Any],
    *,
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    lengths: Sequence[int],
    prompts: Sequence[int],
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a whole step, and each metric's mean: over sequences if they are scalars, else over all entries."""
    total: Any = 0.0
    metrics: dict[str, list[Tensor]] = {}
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):

        def flat(x: Tensor, fill: float = 0.0, row: int = row, length: int = length, prompt: int = prompt) -> Tensor:
            return with_prompt(x[row, :length], prompt, fill)

        outputs = function(
            LossInputs(
                trainer_logprobs=flat(logp, -1.0),
                inference_logprobs=flat(logp_old, -2.0),
                ref_logprobs=None if logp_ref is None else flat(logp_ref, -3.0),
                advantages=flat(advantages),
                loss_mask=flat(mask.bool() if weights is None else mask.bool() & (weights != 0)),
                loss_weights=None if weights is None else flat(weights),
            ),
            **kwargs,
        )
        total = total + outputs.loss
        for name, value in outputs.metrics.items():
            metrics.setdefault(name, []).append(value)
    scale = (mask if weights is None else mask * (weights != 0)).sum()
    joined = {name: torch.stack(v) if v[0].dim() == 0 else torch.cat(v) for name, v in metrics.items()}
    return total / scale, {name: values.mean() for name, values in joined.items()}
