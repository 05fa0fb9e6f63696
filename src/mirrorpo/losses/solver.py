r"""At which ratios does a divergence reach its radius? One vectorised solver for every divergence.

A trust-region constraint c(w) has its minimum 0 at w = 1 and grows on both sides. The bounds are the two solutions of
c(w) = radius, found by bisection in log w: a fixed number of halvings, no derivative, no starting value, no
data-dependent branch (so no host synchronisation on a GPU), and every iterate stays inside the bracket. Where c never
reaches the radius on a side, there is no bound on that side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The bracket in log w: e^-700 is the smallest ratio worth distinguishing from 0, e^700 the largest from infinity.
LOG_RATIO_LIMIT = 700.0
# 700 * 2^-60 is below the spacing of float64 at any bound.
HALVINGS = 60

Constraint = Callable[[Tensor], Tensor]


def solve_log_bounds(constraint: Constraint, radius: float, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratios below and above 0 at which ``constraint(log_ratio) == radius``.

    Args:
        constraint: maps log-ratios of the shape of ``lowest`` to values >= 0 that grow away from 0, float64.
        radius: > 0.
        lowest: the bracket's end on the low side, <= 0, float64.
        highest: the bracket's end on the high side, >= 0, of the same shape.

    Returns:
        ``(low, high)``, the shape of ``lowest``; -inf and +inf where the radius is not reached inside the bracket.

    Example:
        >>> import torch
        >>> end = torch.tensor(700.0, dtype=torch.float64)
        >>> low, high = solve_log_bounds(lambda s: 0.5 * s * s, 0.02, -end, end)
        >>> round(high.item(), 6)
        0.2
    """
    return _side(constraint, radius, lowest, -torch.inf), _side(constraint, radius, highest, torch.inf)


def _side(constraint: Constraint, radius: float, end: Tensor, unbounded: float) -> Tensor:
    reached = constraint(end) >= radius
    inside, outside = torch.zeros_like(end), end.clone()
    for _ in range(HALVINGS):
        middle = 0.5 * (inside + outside)
        within = constraint(middle) < radius
        inside, outside = torch.where(within, middle, inside), torch.where(within, outside, middle)
    return torch.where(reached, 0.5 * (inside + outside), unbounded)
