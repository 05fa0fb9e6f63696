r"""Ratios at which a divergence reaches its radius: one vectorised solver for every divergence.

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


# A bracket this narrow, relative to max(1, |root|), is closed: one or two float64 numbers.
_CLOSED = 2.0**-52
# Bisection alone closes a bracket of 1400 in 63 steps; the method never needs three times as many.
_MAX_STEPS = 200
# Below this share of open elements the others are left behind.
_KEPT = 0.6


def find_root(
    fn: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor
) -> Tensor:
    """The roots of increasing functions, element by element, inside brackets (Chandrupatla 1997).

    Inverse quadratic interpolation where the last three points allow it, bisection elsewhere: a handful of evaluations
    where the function is smooth, and jumps and flat parts do no harm. Elements whose root is found leave.

    Args:
        fn: ``(points, index)`` to values, (M,) float64: the functions number ``index`` at these points, each of them
            non-decreasing.
        low: the brackets' lower ends, (N,), float64.
        high: the upper ends.
        at_low: the values there; at most 0.
        at_high: the values there; at least 0.

    Returns:
        (N,), the end of each final bracket with the smaller value.

    Reference: Chandrupatla 1997, "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear
        function without using derivatives", Advances in Engineering Software 28.

    Example:
        >>> import torch
        >>> low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        >>> find_root(lambda x, index: x * x - 0.25, low, high, low - 0.25, high - 0.25)
        tensor([0.5000], dtype=torch.float64)
    """
    # Where rounding leaves no change of sign the root is an end: a bracket of width 0.
    new, other = torch.where(at_high <= 0.0, high, low), torch.where(at_low >= 0.0, low, high)
    f_new, f_other = at_low, at_high
    found = torch.where(f_new.abs() < f_other.abs(), new, other)
    index = (new != other).nonzero().squeeze(-1)
    new, other, f_new, f_other = (x[index] for x in (new, other, f_new, f_other))
    step = torch.full_like(new, 0.5)
    for _ in range(_MAX_STEPS):
        at = new + step * (other - new)
        f_at = fn(at, index)
        same = (f_at >= 0.0) == (f_new >= 0.0)
        old, f_old = torch.where(same, new, other), torch.where(same, f_new, f_other)
        other, f_other = torch.where(same, other, new), torch.where(same, f_other, f_new)
        new, f_new = at, f_at
        best = torch.where(f_new.abs() < f_other.abs(), new, other)
        found[index] = best
        narrow = _CLOSED * best.abs().clamp(min=1.0) / (other - new).abs()
        is_open = (narrow < 0.5) & (f_new != 0.0)
        left = int(is_open.sum())
        if left == 0:
            break
        if left < _KEPT * len(index):
            kept = (x[is_open] for x in (index, narrow, new, other, old, f_new, f_other, f_old))
            index, narrow, new, other, old, f_new, f_other, f_old = kept
            is_open = torch.ones_like(index, dtype=torch.bool)
        # Chandrupatla's test that the inverse parabola through the three points is monotone between them
        place, height = (new - other) / (old - other), (f_new - f_other) / (f_old - f_other)
        smooth = (height * height < place) & ((1.0 - height) * (1.0 - height) < 1.0 - place)
        linear = f_new / (f_other - f_new) * f_old / (f_other - f_old)
        bent = (old - new) / (other - new) * f_new / (f_old - f_new) * f_other / (f_old - f_other)
        step = torch.where(smooth, linear + bent, 0.5).nan_to_num(0.5)
        step = torch.where(is_open, torch.minimum(torch.maximum(step, narrow), 1.0 - narrow), 0.0)
    return found
