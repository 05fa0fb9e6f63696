"""Comparison of packed and padded log-probabilities on a real batch.

Small groups cannot show a feature that begins at a length (``mirrorpo.models.thresholds``), and no list of such
features is complete. So the first batch of a run is read both ways, and again every batch that is longer than any
before by a factor of two. Without gradient and dropout, and without a draw from any random state: a run that compares
is, bit for bit, one that does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mirrorpo.kernels import Head, Packing, token_logps
from mirrorpo.training.backbone import hidden_states, undisturbed
from mirrorpo.training.budget import is_out_of_memory

# Root mean square of the differences within a completion, relative to that of its log-probabilities (at least 1): the
# rounding of a deep model's forward pass, a factor of ten above what is seen. A feature that takes effect moves it by
# more than the largest of these (0.3 and above for rotary frequencies of another length).
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


def disagreement(
    causal: PreTrainedModel, head: Head, packing: Packing, ids: Tensor, attention: Tensor, keep: int
) -> str | None:
    """How packed and padded log-probabilities differ, in a few words; None if by no more than rounding.

    Args:
        causal: a causal language model that reads packed rows, in the precision of the surrounding autocast.
        head: its head.
        packing: the batch's.
        ids: (B, P + T).
        attention: (B, P + T).
        keep: T.
    """
    with undisturbed(causal, training=False):
        padded = _padded(causal, packing, ids, attention, keep)  # first: an error of the model itself is its own
        try:
            packed = hidden_states(causal, packing).index_select(0, packing.predictors)
        # Untrusted: the code of any model somebody wrote for transformers.
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return f"packed rows cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        logp, _ = token_logps(packed, head, packing.tokens)
        expected, _ = token_logps(padded, head, packing.tokens)
    # A model that has diverged has no log-probability to compare with; where only packed rows have none, they differ.
    apart, expected = (torch.where(expected.isfinite(), x, 0.0) for x in (logp - expected, expected))
    worst = _worst(packing.unpack(apart), packing.unpack(expected), packing)
    allowed = TOLERANCES[_precision(packed)]
    if worst <= allowed:
        return None
    return f"packed and padded log-probabilities differ by {worst:.1e} (relative, {allowed:g} is rounding)"


def _padded(causal: PreTrainedModel, packing: Packing, ids: Tensor, attention: Tensor, keep: int) -> Tensor:
    """(N, H): what predicts each token of the completions, from padded rows; so many at once as a packed row holds."""
    size = max(1, max(row.segments.length for row in packing.rows) // ids.shape[1])
    parts = []
    for first in range(0, ids.shape[0], size):
        part = slice(first, first + size)
        states = causal.base_model(
            input_ids=ids[part], attention_mask=attention[part], use_cache=False
        ).last_hidden_state
        parts.append(states[:, -keep - 1 : -1])
    return torch.cat(parts).flatten(0, 1).index_select(0, packing.slots)


def _worst(difference: Tensor, expected: Tensor, packing: Packing) -> float:
    counts = packing.unpack(torch.ones_like(packing.slots, dtype=difference.dtype)).sum(1).clamp(min=1.0)
    apart, scale = ((x.square().sum(1) / counts).sqrt() for x in (difference, expected))
    worst = (apart / scale.clamp(min=1.0)).max().item()
    return worst if worst == worst else float("inf")  # NaN: as far apart as can be


def _precision(states: Tensor) -> torch.dtype:
    """What the passes were computed in."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if states.dtype == torch.float32 and kind == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return torch.float16  # TF32 has its ten bits
    return states.dtype


__all__ = ["TOLERANCES", "disagreement"]
