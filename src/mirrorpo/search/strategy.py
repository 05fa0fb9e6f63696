r"""An evolution strategy: the gradient of a smoothed fitness, from evaluations alone.

.. math:: \nabla_\mu E\,[f(\mu + \sigma \varepsilon)] \approx
          \frac{1}{2 n \sigma} \sum_{i=1}^{n} (f_i^+ - f_i^-)\, \varepsilon_i,
          \qquad f_i^\pm = f(\mu \pm \sigma \varepsilon_i), \quad \varepsilon_i \sim N(0, I)

Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", arXiv 1703.03864, with
antithetic pairs (their section 2); GBMPO (arXiv 2602.04380) evolves its mirror maps this way.

A pair counts whole or not at all. Without its twin a member would contribute f(mu) epsilon / sigma: noise of size
f / sigma if losses are random, and a bias of that size if they depend on epsilon. The estimate over the pairs that are
left is unbiased if losses are independent of the draws; if not, it is the gradient among the draws that survive, and
still zero where f is flat.

Everything here is a pure function of tensors; generation g of seed s draws the same whoever asks, and when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mirrorpo.divergences.neural.map import INIT_SCALE, NUM_PARAMETERS, project
from mirrorpo.errors import unknown_name

SHAPINGS = ("raw", "centred_ranks")
OPTIMISERS = ("sgd", "adam")
POSITIVITIES = ("projection", "softplus")
# Adam of Kingma & Ba, arXiv 1412.6980, algorithm 1.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
# softplus reaches 0 only at -inf: a start below this share of its scale begins there (value 1e-8, next to 1e-2).
_SMALLEST_SHARE = 1e-6


def directions(seed: int, generation: int, num_pairs: int, size: int = NUM_PARAMETERS) -> Tensor:
    """The pairs' directions: (num_pairs, size), standard normal, float64; the global random state is not touched.

    Example:
        >>> torch.equal(directions(0, 3, 2), directions(0, 3, 2)), torch.equal(directions(0, 3, 2), directions(0, 4, 2))
        (True, False)
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + generation) % 2**63)
    return torch.randn(num_pairs, size, generator=generator, dtype=torch.float64)


def sigma_at(generation: int, sigma: float, decay: float, smallest: float = 0.0) -> float:
    """The schedule: sigma * decay^generation, at least ``smallest``.

    Example:
        >>> round(sigma_at(2, 0.01, 0.99), 6)
        0.009801
    """
    return max(smallest, sigma * decay**generation)


def shaped(fitness: Tensor, shaping: str) -> Tensor:
    """Fitness as the estimate uses it.

    Args:
        fitness: (2 n,), finite.
        shaping: ``raw``: as it is; ``centred_ranks``: ranks scaled to [-1/2, 1/2], equal values share the mean of their
            ranks (so that ties say nothing).

    Example:
        >>> shaped(torch.tensor([0.2, 9.0, 0.2]), "centred_ranks")
        tensor([-0.2500,  0.5000, -0.2500], dtype=torch.float64)
    """
    if shaping not in SHAPINGS:
        raise unknown_name("fitness shaping", shaping, SHAPINGS)
    values = fitness.double()
    if shaping == "raw" or len(values) < 2:
        return values
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1).double()
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return (below + (equal - 1) / 2.0) / (len(values) - 1) - 0.5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The gradient of the smoothed fitness.

    Attributes:
        gradient: (size,), float64; zero if no pair is left.
        num_pairs: that it rests on.
        dropped: the pairs that a failed member took out.
    """

    gradient: Tensor
    num_pairs: int
    dropped: tuple[int, ...]


def estimate(
    epsilon: Tensor, plus: Sequence[float | None], minus: Sequence[float | None], sigma: float, shaping: str
) -> Estimate:
    r"""The antithetic estimate over the pairs whose members both have a fitness.

    Formula: :math:`\frac{1}{2 n \sigma} \sum_i (s_i^+ - s_i^-) \varepsilon_i` with s the shaped fitness.

    Args:
        epsilon: (pairs, size), the directions.
        plus: fitness of mu + sigma epsilon for each pair; None, NaN or infinite: that member failed.
        minus: the same of mu - sigma epsilon.
        sigma: > 0.
        shaping: ``raw`` or ``centred_ranks``, over the members that count.

    Returns:
        An ``Estimate``.

    Reference: arXiv 1703.03864, section 2.

    Example:
        >>> e = estimate(torch.eye(2), [1.0, None], [0.0, 5.0], sigma=0.5, shaping="raw")
        >>> e.gradient, e.dropped
        (tensor([1., 0.], dtype=torch.float64), (1,))
    """
    whole, dropped = [], []
    for index, pair in enumerate(zip(plus, minus, strict=True)):
        counts = all(value is not None and math.isfinite(value) for value in pair)
        (whole if counts else dropped).append(index)
    if not whole:
        return Estimate(gradient=torch.zeros(epsilon.shape[1]).double(), num_pairs=0, dropped=tuple(dropped))
    values = shaped(torch.tensor([side[i] for side in (plus, minus) for i in whole], dtype=torch.float64), shaping)
    up, down = values.view(2, len(whole))
    gradient = (up - down) @ epsilon[whole].double() / (2.0 * sigma * len(whole))
    return Estimate(gradient=gradient, num_pairs=len(whole), dropped=tuple(dropped))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What Adam remembers."""

    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def zero(cls, size: int) -> Moments:
        """Before the first step."""
        return cls(first=torch.zeros(size).double(), second=torch.zeros(size).double())


def ascend(centre: Tensor, gradient: Tensor, step: float, optimiser: str, moments: Moments) -> tuple[Tensor, Moments]:
    """One step uphill.

    Args:
        centre: (size,), float64.
        gradient: (size,).
        step: the step size.
        optimiser: ``sgd``: centre + step * gradient; ``adam``: Kingma & Ba's algorithm 1, uphill.
        moments: what the optimiser remembers; SGD hands it back.

    Returns:
        The new centre and moments; the arguments are not changed.

    Example:
        >>> ascend(torch.zeros(1), torch.tensor([4.0]), 0.1, "adam", Moments.zero(1))[0]
        tensor([0.1000], dtype=torch.float64)
    """
    if optimiser not in OPTIMISERS:
        raise unknown_name("optimiser", optimiser, OPTIMISERS)
    if optimiser == "sgd":
        return centre + step * gradient, moments
    steps = moments.steps + 1
    first = _BETA1 * moments.first + (1 - _BETA1) * gradient
    second = _BETA2 * moments.second + (1 - _BETA2) * gradient * gradient
    unbiased = second / (1 - _BETA2**steps)
    direction = first / (1 - _BETA1**steps) / (unbiased.sqrt() + _EPSILON)
    return centre + step * direction, Moments(first=first, second=second, steps=steps)


def to_parameters(point: Tensor, positivity: str) -> Tensor:
    """A point of the search space as parameters of a map: non-negative whatever the point.

    Args:
        point: (..., size).
        positivity: ``projection``: negative entries become 0; ``softplus``: s softplus(point / s), s = 0.01, which is
            the point itself well above s, so that sigma has the same unit in both.

    Example:
        >>> to_parameters(torch.tensor([-1.0, 0.5]), "projection")
        tensor([0.0000, 0.5000])
    """
    if positivity not in POSITIVITIES:
        raise unknown_name("positivity", positivity, POSITIVITIES)
    if positivity == "projection":
        return project(point)
    return INIT_SCALE * softplus(point / INIT_SCALE, threshold=50.0)


def from_parameters(parameters: Tensor, positivity: str) -> Tensor:
    """The point that ``to_parameters`` turns into these parameters (softplus: a 0 becomes 1e-8)."""
    if positivity not in POSITIVITIES:
        raise unknown_name("positivity", positivity, POSITIVITIES)
    if positivity == "projection":
        return parameters.double()
    share = (parameters.double() / INIT_SCALE).clamp(min=_SMALLEST_SHARE)
    return INIT_SCALE * (share + torch.log(-torch.expm1(-share)))  # log(e^s - 1), which does not overflow


__all__ = [
    "OPTIMISERS",
    "POSITIVITIES",
    "SHAPINGS",
    "Estimate",
    "Moments",
    "ascend",
    "directions",
    "estimate",
    "from_parameters",
    "shaped",
    "sigma_at",
    "to_parameters",
]
