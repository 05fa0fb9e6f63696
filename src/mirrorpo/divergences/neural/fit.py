r"""Which mirror map is closest to a named divergence? Non-negative least squares on the relative error of h''.

The error of h'' bounds that of the divergence and of its gradient (they weigh h'' with one sign), so it is what is
minimised, relative, over probabilities spread evenly in log x; its largest value there is the error that is stated.
The units' places (w, b) are fixed and spread over the range; their heights v, a and c are solved for, so the problem is
convex, the answer unique up to ties and the same everywhere.

``kl`` (c = 1) and ``prob_l2`` (a = 2) are mirror maps: error 0. ``itakura_saito`` is not: no unit is steeper than c/x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mirrorpo.divergences.neural.units import GROUPS, NUM_PARAMETERS, NUM_UNITS, SLICES, UNITS_PER_GROUP, curvature

# Probabilities of the fit: GRID points from exp(LOG_LOWEST) = 1e-4 to 1.
LOG_LOWEST = -9.21
_GRID = 201
# A column enters while it still explains this share of the target.
_GAIN = 1e-12
_MAX_STEPS = 3 * (NUM_UNITS + 2)
# x h''(x) of the divergences that can be asked for.
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": torch.ones_like,
    "prob_l2": lambda x: 2.0 * x,
    "itakura_saito": torch.reciprocal,
}


def places() -> tuple[Tensor, Tensor]:
    """The fixed (w, b) of the fit, (6, 21) each: singularities -b/w and exponential rates spread evenly in log."""
    w = torch.ones(len(GROUPS), UNITS_PER_GROUP, dtype=torch.float64)
    b = torch.logspace(-4, 1, UNITS_PER_GROUP, dtype=torch.float64).expand_as(w).clone()
    log, exp = GROUPS.index("log"), GROUPS.index("exp")
    w[log], b[log] = torch.logspace(-1, 2, UNITS_PER_GROUP, dtype=torch.float64), 0.0
    w[exp], b[exp] = torch.logspace(-1, 0.6, UNITS_PER_GROUP, dtype=torch.float64), 0.0
    return w, b


def closest(target: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The parameters whose x h'' is closest to ``target(x)``, and the largest relative error on the grid.

    Args:
        target: x h''(x) of the generator, positive, from (N,) to (N,), float64.

    Returns:
        (380,), float64, and the error.

    Example:
        >>> parameters, error = closest(TARGETS["kl"])
        >>> round(parameters[SLICES["c"]].item(), 12), error < 1e-14
        (1.0, True)
    """
    x = torch.linspace(LOG_LOWEST, 0.0, _GRID, dtype=torch.float64).exp()
    w, b = places()
    parameters = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
    parameters[SLICES["w"]], parameters[SLICES["b"]] = w.view(-1), b.view(-1)
    # a and c first: where a unit does the same, they are taken
    heights = [SLICES["a"].start, SLICES["c"].start, *range(NUM_UNITS)]
    columns = []
    for height in heights:
        one = parameters.clone()
        one[height] = 1.0
        columns.append(curvature(one, x) / target(x))
    matrix = torch.stack(columns, dim=-1)
    parameters[heights] = non_negative_least_squares(matrix, torch.ones_like(x))
    error = (curvature(parameters, x) / target(x) - 1.0).abs().amax().item()
    return parameters, error


def non_negative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """argmin |matrix y - target| over y >= 0: the active-set method of Lawson and Hanson (1974).

    Args:
        matrix: (M, N), float64, no column 0.
        target: (M,), float64.

    Returns:
        (N,), float64.

    Example:
        >>> import torch
        >>> non_negative_least_squares(torch.eye(2).double(), torch.tensor([1.0, -1.0]).double())
        tensor([1., 0.], dtype=torch.float64)
    """
    size = matrix.norm(dim=0)
    scaled = matrix / size
    y = torch.zeros_like(size)
    free = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        gain = (scaled.T @ (target - scaled @ y)).masked_fill_(free, -torch.inf)
        # The first of those that gain (nearly) the same enters.
        entering = int((gain >= gain.amax() - _GAIN * target.norm()).int().argmax())
        if not gain[entering] > _GAIN * target.norm():
            break
        free[entering] = True
        while free.any():
            chosen = free.nonzero().squeeze(-1)
            solved = torch.zeros_like(y)
            solved[chosen] = torch.linalg.lstsq(scaled[:, chosen], target, driver="gelsd").solution
            if (solved[chosen] > 0).all():
                y = solved
                break
            # Go as far as all stay non-negative, and fix what has reached 0.
            falling = free & (solved <= 0)
            y = y + (y[falling] / (y[falling] - solved[falling])).amin() * (solved - y)
            free &= ~(falling & (y <= _GAIN))
            y = y.masked_fill(~free, 0.0).clamp_(min=0.0)
    return y / size
