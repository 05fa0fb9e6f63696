r"""The generator of a neural mirror map: 380 non-negative numbers, an increasing function phi_inv, and its derivative.

.. math:: \phi^{-1}(x) = \sum_{j=1}^{126} v_j \sigma_j(w_j x + b_j) + a x + c \log x

with six groups of 21 units (GBMPO, arXiv 2602.04380): cube, square, square root, cube root, log(max(u, 0) + 1e-3), exp.
Every sigma increases and every parameter is >= 0, so phi_inv increases, its integral h is convex and D_h is a
divergence. That holds ONLY on the non-negative orthant: whoever moves the parameters calls ``project`` afterwards.

The functions here take the parameters as one float64 vector, in the order v (126), w (126), b (126), a, c, each of the
first three group by group. They are the plain definition: vectorised, no table, no approximation.

``closest`` finds the map nearest to a named divergence: non-negative least squares on the relative error of h''.

The error of h'' bounds that of the divergence and of its gradient (they weigh h'' with one sign), so it is what is
minimised, relative, over probabilities spread evenly in log x; its largest value there is the error that is stated.
The units' places (w, b) are fixed and spread over the range; their heights v, a and c are solved for, so the problem is
convex, the answer unique up to ties and the same everywhere.

``kl`` (c = 1) and ``prob_l2`` (a = 2) are mirror maps: error 0. ``itakura_saito`` is not: no unit is steeper than c/x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mirrorpo._checks import Float, Tensor

GROUPS = ("cube", "square", "sqrt", "cbrt", "log", "exp")
UNITS_PER_GROUP = 21
NUM_UNITS = len(GROUPS) * UNITS_PER_GROUP
NUM_PARAMETERS = 3 * NUM_UNITS + 2
# Where each named part lies in the vector.
SLICES = {
    "v": slice(0, NUM_UNITS),
    "w": slice(NUM_UNITS, 2 * NUM_UNITS),
    "b": slice(2 * NUM_UNITS, 3 * NUM_UNITS),
    "a": slice(3 * NUM_UNITS, 3 * NUM_UNITS + 1),
    "c": slice(3 * NUM_UNITS + 1, 3 * NUM_UNITS + 2),
}
# Added inside the log units (GBMPO): bounds their slope at u = 0 by v w / 1e-3.
LOG_OFFSET = 1e-3
# A unit's argument w x + b below this is clamped here, so that its power -2/3 stays finite. Only w < 1e-240 meets it.
SMALLEST_ARGUMENT = 1e-290


def split(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v, w, b as (6, 21) and a, c as (1,), from the vector of 380."""
    v, w, b = (parameters[SLICES[name]].view(len(GROUPS), UNITS_PER_GROUP) for name in ("v", "w", "b"))
    return v, w, b, parameters[SLICES["a"]], parameters[SLICES["c"]]


def phi_inv(parameters: Tensor, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    r"""The map h' itself, as its definition reads.

    Formula: :math:`\sum_j v_j \sigma_j(w_j x + b_j) + a x + c \log x`.

    Args:
        parameters: (380,), non-negative (not checked here; ``MirrorMap`` checks it), any floating dtype.
        x: probabilities in (0, 1], any shape.

    Returns:
        float64, the shape of ``x``; differentiable in both arguments.

    Reference: GBMPO, arXiv 2602.04380.

    Example:
        >>> import torch
        >>> parameters = torch.zeros(NUM_PARAMETERS)
        >>> parameters[SLICES["a"]] = 2.0  # h' = 2 x, so h = x^2: ProbL2
        >>> phi_inv(parameters, torch.tensor([0.25, 0.5]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    v, w, b, a, c = split(parameters.double())
    flat = x.double().reshape(-1)
    cube, square, root, cube_root, log, exp = w.unsqueeze(-1) * flat + b.unsqueeze(-1)
    units = torch.stack(
        [
            cube**3,
            square**2,
            root.sqrt(),
            cube_root.pow(1.0 / 3.0),
            (log.clamp(min=0.0) + LOG_OFFSET).log(),
            exp.exp(),
        ]
    )
    value = a * flat
    # 0 * log x is 0, and so is a unit's share where v is 0 but the unit itself overflows.
    value = value + torch.where(c > 0, c * flat.log(), 0.0)
    value = value + torch.where(v.unsqueeze(-1) > 0, v.unsqueeze(-1) * units, 0.0).sum((0, 1))
    return value.view(x.shape)


def curvature(parameters: Tensor, x: Tensor) -> Tensor:
    r"""x h''(x), the derivative of phi_inv in log x, in closed form; every summand is >= 0, so no digit is lost.

    Args:
        parameters: (380,), non-negative, float64.
        x: (N,), positive, float64.

    Returns:
        (N,), float64; inf or NaN where float64 overflows.

    Example:
        >>> import torch
        >>> parameters = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
        >>> parameters[SLICES["c"]] = 1.0  # h' = log x: KL
        >>> curvature(parameters, torch.tensor([0.25, 0.5], dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
    """
    v, w, b, a, c = split(parameters)
    slope = v * w
    # A unit without slope is a constant. Its argument may be 0, where a root's slope is inf: it is moved away.
    idle = slope == 0
    w, b = w.masked_fill(idle, 0.0), b.masked_fill(idle, 1.0)
    cube, square, root, cube_root, log, exp = slope
    constant = a + (3.0 * cube * b[0] * b[0]).sum() + (2.0 * square * b[1]).sum()
    linear = (6.0 * cube * w[0] * b[0]).sum() + (2.0 * square * w[1]).sum()
    total = constant + x * (linear + x * (3.0 * cube * w[0] * w[0]).sum())
    arguments = torch.addcmul(b[2:].unsqueeze(-1), w[2:].unsqueeze(-1), x)
    total = total + (0.5 * root) @ arguments[0].clamp_(min=SMALLEST_ARGUMENT).rsqrt_()
    powers = arguments[1].clamp_(min=SMALLEST_ARGUMENT).log_().mul_(-2.0 / 3.0).exp_()
    total = total + (cube_root / 3.0) @ powers
    total = total + log @ arguments[2].add_(LOG_OFFSET).reciprocal_()
    total = total + exp @ arguments[3].exp_()
    return x * total + c


def project(parameters: Float[Tensor, "... 380"]) -> Float[Tensor, "... 380"]:
    """The nearest vector (or stack of vectors) that is a mirror map: negative entries become 0.

    Args:
        parameters: (..., 380), any floating dtype.

    Returns:
        The same shape and dtype; NaN stays NaN (``MirrorMap`` refuses it).

    Example:
        >>> import torch
        >>> project(torch.full((380,), -1.0)).sum()
        tensor(0.)
    """
    return parameters.clamp(min=0.0)


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
    w = torch.ones(len(GROUPS), UNITS_PER_GROUP, dtype=torch.float64, device="cpu")
    b = torch.logspace(-4, 1, UNITS_PER_GROUP, dtype=torch.float64, device="cpu").expand_as(w).clone()
    log, exp = GROUPS.index("log"), GROUPS.index("exp")
    w[log], b[log] = torch.logspace(-1, 2, UNITS_PER_GROUP, dtype=torch.float64, device="cpu"), 0.0
    w[exp], b[exp] = torch.logspace(-1, 0.6, UNITS_PER_GROUP, dtype=torch.float64, device="cpu"), 0.0
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
    x = torch.linspace(LOG_LOWEST, 0.0, _GRID, dtype=torch.float64, device="cpu").exp()
    w, b = places()
    parameters = torch.zeros(NUM_PARAMETERS, dtype=torch.float64, device="cpu")
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
