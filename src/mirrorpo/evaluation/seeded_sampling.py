"""Which token comes next? A draw that belongs to one sample of one problem, whatever else is in the batch.

A sample's draws come from a seed of its own (of seed, problem and sample number), one uniform number a token, turned
into a token by the inverse of the distribution function. So batch size, order and a resumed evaluation change no draw.
What remains is the model's arithmetic: another batch shape rounds logits differently, which moves a draw only if it
lies within that rounding (about 1e-7 in float32, 1e-2 in bfloat16) of the border between two tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


def seed_of(seed: int, problem: int, sample: int) -> int:
    """The seed of one sample's draws, in [0, 2^32).

    Example:
        >>> seed_of(7, 0, 0) != seed_of(7, 0, 1)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:4])


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(length, rows): numbers in [0, 1), a column from each seed; the same on every device."""
    columns = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(columns, dim=1)


def pick(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of each row at which the distribution function passes ``uniform``.

    Args:
        logits: (B, V).
        uniform: (B,), in [0, 1).
        temperature: above 0.
        top_p: only the fewest most likely tokens whose probabilities reach it are drawn.

    Returns:
        (B,) token ids, each with probability softmax(logits / temperature) within the nucleus, renormalised.

    Reference: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, Eq. 2 (nucleus).

    Example:
        >>> pick(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75]), 1.0, 1.0)
        tensor([1])
    """
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    # Below the total even after rounding, or the search would run past the last token that can be drawn.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True)[:, 0]


class OwnDraws(LogitsProcessor):
    """Leaves one token a row: that of the row's own draw. Greedy decoding then takes it.

    Args:
        seeds: one a row.
        length: the most tokens.
        temperature, top_p: as in ``pick``.
    """

    def __init__(self, seeds: Sequence[int], length: int, temperature: float, top_p: float, device: torch.device):
        self._uniforms = uniforms(seeds, length).to(device)
        self._temperature, self._top_p = temperature, top_p
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = pick(scores, self._uniforms[self._step], self._temperature, self._top_p)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)
