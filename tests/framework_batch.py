"""A ragged batch in float64, with a masked token, an empty completion and ratios on both sides of every region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (7, 3, 1, 5, 4)
WIDTH = max(LENGTHS)
PROMPTS = (2, 1, 3, 2, 2)


@dataclass
class Batch:
    """(B, T) tensors; ``logp`` wants its gradient."""

    logp: Tensor
    logp_old: Tensor
    logp_ref: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def rows(self) -> int:
        return self.mask.shape[0]


def batch(seed: int = 0, *, spread: float = 0.5, empty: bool = True) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(len(LENGTHS), WIDTH, generator=g, dtype=torch.float64)

    within = torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)
    mask = within.clone()
    mask[0, 2] = False  # a tool's token
    if empty:
        mask[2] = False
    # away from 0, so that no sum of noise is above it; 0 at the padding, as frameworks pad
    logp = -3.0 + 0.5 * noise()
    old, ref = (logp + spread * noise()).clamp(max=-0.05), (logp + spread * noise()).clamp(max=-0.05)
    logp, old, ref = (torch.where(within, x, 0.0) for x in (logp, old, ref))
    rewards = torch.randn(len(LENGTHS), 1, generator=g, dtype=torch.float64)
    advantages = torch.where(within, rewards.expand(-1, WIDTH), 0.0)
    return Batch(logp=logp.requires_grad_(), logp_old=old, logp_ref=ref, advantages=advantages, mask=mask)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    """Value and gradient, and that there is a gradient."""
    assert theirs[1].abs().max() > 1e-8
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())
