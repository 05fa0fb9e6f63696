"""A stand-in that calls a custom loss as slime does (slime/backends/megatron_utils/loss.py, commit 624b824a).

``function(args, batch, logits, sum_of_sample_mean)``, logits (1, T, V) of the packed samples; then the sum over samples
is divided by the step's samples, or by its tokens with ``calculate_per_token_loss``. No code of slime.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KEPT = ("rollout_top_p_token_ids", "rollout_top_p_token_offsets")


def arguments(**more: Any) -> SimpleNamespace:
    """slime's arguments, as far as its loss reads them."""
    return SimpleNamespace(
        **{
            "loss_type": "custom_loss",
            "custom_loss_function_path": "mirrorpo.integrations.slime.loss_function",
            "advantage_estimator": "grpo",
            "rewards_normalization": True,
            "normalize_advantages": False,
            "use_tis": False,
            "use_opsm": False,
            "custom_pg_loss_reducer_function_path": None,
            "rollout_top_p": 1.0,
            "context_parallel_size": 1,
            "calculate_per_token_loss": False,
            "grpo_std_normalization": True,
            "kl_coef": 0.0,
            "use_kl_loss": False,
            "use_rollout_logprobs": False,
            "rollout_max_response_len": 12,
            "rollout_temperature": 1.0,
            "entropy_coef": 0.0,
            **more,
        }
    )


def get_log_probs_and_entropy(
    logits: Tensor,
    *,
    args: Any,
    unconcat_tokens: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    with_entropy: bool = False,
    top_p_token_ids: list[list[int]] | None = None,
    top_p_token_offsets: list[list[int]] | None = None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Log-probabilities and entropies of the responses, one tensor for each sample.

    With kept tokens, a sample's ``ids[offsets[t]:offsets[t + 1]]`` are those of its position t; log-probabilities are
    then those among them, and the entropy stays that of the vocabulary.
    """
    log_probs, entropies, end = [], [], 0
    for i, (tokens, total, response) in enumerate(zip(unconcat_tokens, total_lengths, response_lengths, strict=True)):
        end += total
        scaled = logits[0, end - response - 1 : end - 1] / args.rollout_temperature
        rows = scaled.log_softmax(-1)
        entropies.append(-(rows.exp() * rows).sum(-1))
        if top_p_token_ids is not None and top_p_token_offsets is not None:
            ids, offsets = top_p_token_ids[i], top_p_token_offsets[i]
            kept = torch.zeros_like(scaled, dtype=torch.bool)
            for t in range(response):
                kept[t, ids[offsets[t] : offsets[t + 1]]] = True
            rows = scaled.masked_fill(~kept, -torch.inf).log_softmax(-1)
        log_probs.append(rows.gather(-1, tokens[total - response :].unsqueeze(-1)).squeeze(-1))
    return torch.empty(0), {"log_probs": log_probs, "entropy": entropies}


def install(monkeypatch: Any) -> None:
    """Puts the module that the adapter imports in place."""
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils", "slime.backends.megatron_utils.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    found = sys.modules["slime.backends.megatron_utils.loss"]
    found.get_log_probs_and_entropy = get_log_probs_and_entropy  # pyright: ignore[reportAttributeAccessIssue]


def step(
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    args: SimpleNamespace,
    samples: Sequence[dict[str, Tensor]],
    logits: Tensor,
    num_microbatches: int = 1,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a whole step, and what slime logs of it.

    Args:
        function: the custom loss.
        args: slime's arguments.
        samples: of each the ``tokens`` (prompt and response), and the response's ``log_probs``, ``advantages``,
            ``loss_masks`` and, with a reference, ``ref_log_probs``; with an engine that reports them,
            ``rollout_log_probs``.
        logits: (1, T, V) of all samples side by side.
        num_microbatches: equal parts that are summed.
    """
    count = len(samples) // num_microbatches
    total, logged, start = torch.zeros(()), {}, 0
    tokens_of_step = sum(max(1.0, float(s["loss_masks"].sum())) for s in samples)
    for first in range(0, len(samples), count):
        part = samples[first : first + count]
        masks = [s["loss_masks"] for s in part]
        lengths = [len(s["loss_masks"]) for s in part]
        totals = [len(s["tokens"]) for s in part]
        sums = [mask.sum().clamp(min=1) for mask in masks]

        def average(x: Tensor, lengths: Any = lengths, masks: Any = masks, sums: Any = sums) -> Tensor:
            pieces = zip(x.split(lengths), masks, sums, strict=True)
            if args.calculate_per_token_loss:
                return torch.stack([(piece * mask).sum() for piece, mask, _ in pieces]).sum()
            return torch.stack([(piece * mask).sum() / of for piece, mask, of in pieces]).sum()

        batch: dict[str, Any] = {"unconcat_tokens": [s["tokens"] for s in part], "total_lengths": totals}
        batch |= {"response_lengths": lengths, "rollout_mask_sums": sums}
        for name in ("advantages", "log_probs", "rollout_log_probs", "ref_log_probs", "loss_masks", *KEPT):
            if name in part[0]:
                batch[name] = [s[name] for s in part]
        width = sum(totals)
        loss, metrics = function(args, batch, logits[:, start : start + width], average)
        start += width
        total = total + loss
        for name, value in metrics.items():
            logged[name] = logged.get(name, 0.0) + value.item()
    denominator = tokens_of_step if args.calculate_per_token_loss else len(samples)
    return total / denominator, {name: value / denominator for name, value in logged.items()}
