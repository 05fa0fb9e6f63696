r"""Group-relative advantages: how much better a completion was than its group.

``grpo`` (arXiv 2402.03300, Eq. 3 ff.): (r - mean) / (std + eps) with the sample standard deviation; ``dr_grpo`` (Dr.
GRPO, arXiv 2503.20783): r - mean, without the division that favours easy and hard prompts; ``rloo`` (arXiv
2402.14740): r minus the mean of the OTHERS, which is ``dr_grpo`` times n / (n - 1); ``maxrl`` (arXiv 2602.02710):
(r - mean) / mean, 0 where the mean is 0, for rewards >= 0: a lower success rate weighs more; ``soft_value`` (A*-PO,
arXiv 2505.20686): r - tau log mean exp(r / tau), with the value of the optimum at a KL coefficient tau as the baseline.

A NaN reward marks a completion that could not be scored: it leaves its group's mean and deviation, and its own
advantage is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mirrorpo._checks import Float, Tensor
from mirrorpo.errors import unknown_name

# TRL's eps, so that a group of equal rewards gives 0 / eps = 0 and not 0 / 0.
STD_EPS = 1e-4
# tau of ``soft_value``, as in A*-PO's experiments.
SOFT_VALUE_TAU = 0.5


def _count(scored: Tensor) -> Tensor:
    return scored.sum(-1, keepdim=True)


def _grpo(centred: Tensor, mean: Tensor, scored: Tensor) -> Tensor:
    count = _count(scored)
    variance = (centred * centred).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPS)


def _dr_grpo(centred: Tensor, mean: Tensor, scored: Tensor) -> Tensor:
    return centred


def _rloo(centred: Tensor, mean: Tensor, scored: Tensor) -> Tensor:
    count = _count(scored)
    return centred * count / (count - 1).clamp(min=1)


def _maxrl(centred: Tensor, mean: Tensor, scored: Tensor) -> Tensor:
    lowest = (centred + mean).amin().item() if centred.numel() else 0.0  # an unscored completion stands at the mean
    if lowest < 0.0:
        raise ValueError(f"advantage 'maxrl' divides by the mean reward and needs rewards >= 0, got {lowest:g}")
    return torch.where(mean > 0, centred / torch.where(mean > 0, mean, 1.0), 0.0)


def _soft_value(centred: Tensor, mean: Tensor, scored: Tensor) -> Tensor:
    # Of centred rewards the soft value is smaller by the mean: the difference is the same.
    powers = (centred / SOFT_VALUE_TAU).masked_fill(~scored, -torch.inf)
    value = SOFT_VALUE_TAU * (powers.logsumexp(-1, keepdim=True) - _count(scored).to(centred.dtype).log())
    return torch.where(scored, centred - value, 0.0)


# Each maps the centred rewards of the groups, their means and which completions were scored to advantages.
ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "maxrl": _maxrl,
    "soft_value": _soft_value,
}


@torch.no_grad()
def advantages(rewards: Float[Tensor, B], group_size: int, kind: str = "grpo") -> Float[Tensor, B]:
    """Group-relative advantages.

    Args:
        rewards: (B,), the completions of a prompt side by side; NaN where a completion could not be scored.
        group_size: G, completions per prompt; divides B, at least 2.
        kind: ``grpo``, ``dr_grpo``, ``rloo``, ``maxrl`` or ``soft_value``.

    Returns:
        (B,), float32 (float64 for float64 rewards), 0 where the reward is NaN.

    Raises:
        ValueError: an unknown kind, a group size below 2 or one that does not divide B; a reward below 0 with
            ``maxrl``.

    Example:
        >>> import torch
        >>> advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, "dr_grpo")
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if kind not in ADVANTAGES:
        raise unknown_name("advantage", kind, ADVANTAGES)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(
            f"group_size must be an integer >= 2 (a group of 1 has no one to compare with), got {group_size!r}"
        )
    if rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards must have shape (B,) with B divisible by group_size {group_size}, got {tuple(rewards.shape)}"
        )
    grouped = (rewards if rewards.dtype == torch.float64 else rewards.float()).view(-1, group_size)
    scored = ~grouped.isnan()
    mean = grouped.nansum(-1, keepdim=True) / _count(scored).clamp(min=1)
    centred = torch.where(scored, grouped - mean, 0.0)
    return ADVANTAGES[kind](centred, mean, scored).reshape(-1)
