r"""A divergence of your own from one function: a Bregman generator h(x) on (0, 1], or the f(t) of an f-divergence.

The function is written in torch operations on a float64 tensor; its derivatives come from autograd. Two things are
checked once, at construction, on a grid: that the function and its derivative are finite, and that it is convex.

Numerics: near equality the definition h(x) - h(z) - h'(z)(x - z) loses every digit. There the exact remainder
:math:`(x - z)^2 \int_0^1 (1 - \tau) h''(z + \tau (x - z)) d\tau` is integrated by Gauss-Legendre instead, whose
weights are positive, so the result stays non-negative. A function with a kink at equality (total variation) keeps the
definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo.divergences.base import Term
from mirrorpo.divergences.bregman import BregmanDivergence
from mirrorpo.divergences.fdivergence import Parts, RatioDivergence

Generator = Callable[[Tensor], Tensor]

# Gauss-Legendre with 6 nodes on [0, 1]; exact for polynomials up to degree 11.
_NODES = (
    0.03376524289842397,
    0.16939530676686776,
    0.38069040695840156,
    0.6193095930415985,
    0.8306046932331322,
    0.966234757101576,
)
_WEIGHTS = (
    0.08566224618958508,
    0.18038078652406955,
    0.2339569672863455,
    0.2339569672863455,
    0.18038078652406955,
    0.08566224618958508,
)
# Below this |log x/z| the remainder integral is used; above it the definition has at least 12 digits left.
_NEAR = 0.05
# Probabilities below exp(this) = 1e-87 are treated as this: h'' ~ x^-3 is then still finite. Value and slope of such a
# token are those at the floor, i.e. 0 against another such token.
_LOG_FLOOR = -200.0
# Two neighbouring slopes on the grid may fall by this much, relative to their size, before that counts as concave.
_SLOPE_TOLERANCE = 1e-9


def derivative(fn: Generator, x: Tensor, order: int = 1) -> Tensor:
    """The derivative of an elementwise function by autograd; zero where the function does not depend on x.

    Detached, unless x itself requires a gradient: then it can be differentiated once more.
    """
    again = x.requires_grad
    with torch.enable_grad():
        at = x if again else x.detach().requires_grad_()
        y = fn(at)
        for step in range(order):
            if not y.requires_grad:
                return torch.zeros_like(x)
            more = again or step + 1 < order
            (y,) = torch.autograd.grad(y.sum(), at, create_graph=more, materialize_grads=True)
    return y if again else y.detach()


@dataclass(frozen=True)
class Remainder:
    """The Bregman remainder of a convex function: ``(x, z, log x/z) -> (R(x, z), dR/dx)``, float64.

    Attributes:
        fn: the convex function.
        smooth: whether its second derivative describes it near equality (no kink).
    """

    fn: Generator
    smooth: bool

    def __call__(self, x: Tensor, z: Tensor, delta: Tensor) -> Term:
        slope_z = derivative(self.fn, z)
        value = self.fn(x) - self.fn(z) - slope_z * (x - z)
        slope = derivative(self.fn, x) - slope_z
        if not self.smooth:
            return value.clamp(min=0.0), slope
        near = delta.abs() < _NEAR
        gap = z * torch.expm1(delta.clamp(-_NEAR, _NEAR))
        first, second = torch.zeros_like(gap), torch.zeros_like(gap)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            curvature = weight * derivative(self.fn, z + node * gap, order=2)
            first = first + curvature
            second = second + (1.0 - node) * curvature
        value = torch.where(near, gap * gap * second, value)
        return value.clamp(min=0.0), torch.where(near, gap * first, slope)


def check_convex(fn: Generator, grid: Tensor, what: str, domain: str) -> None:
    """Raises ``ValueError`` that shows where ``fn`` is not finite or not convex on the (increasing) grid."""
    values = fn(grid.clone())
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        raise ValueError(f"{what} must map a tensor to a tensor of the same shape, got {type(values).__name__}")
    slopes = derivative(fn, grid)
    for label, numbers in (("value", values.detach()), ("slope", slopes)):
        bad = ~torch.isfinite(numbers)
        if bad.any():
            at, got = grid[bad][0].item(), numbers[bad][0].item()
            raise ValueError(f"{what}: its {label} at {at:g} is {got}; it must be finite on {domain}")
    fall = slopes[:-1] - slopes[1:]
    worst = int((fall - _SLOPE_TOLERANCE * slopes.abs().amax()).argmax())
    if fall[worst] > _SLOPE_TOLERANCE * max(1.0, slopes[worst].abs().item()):
        raise ValueError(
            f"{what} is not convex: its slope falls from {slopes[worst].item():g} at {grid[worst].item():g} "
            f"to {slopes[worst + 1].item():g} at {grid[worst + 1].item():g}"
        )
    if not (slopes[-1] - slopes[0]).item() > _SLOPE_TOLERANCE * max(1.0, slopes.abs().amax().item()):
        raise ValueError(
            f"{what} is linear (its slope is {slopes[0].item():g} everywhere): its divergence would be zero"
        )


def is_smooth(fn: Generator, at: Tensor) -> bool:
    """Whether the second derivative predicts the slope's change over a small step, i.e. there is no kink."""
    step = 0.02 * at
    change = derivative(fn, at + step) - derivative(fn, at - step)
    predicted = 2.0 * step * derivative(fn, at, order=2)
    return bool(torch.allclose(change, predicted, rtol=0.05, atol=1e-9))


def bregman_from(h: Generator, name: str) -> BregmanDivergence:
    """The Bregman divergence of a generator h.

    Raises:
        ValueError: h is not finite, not convex or linear on (0, 1]; the message says where.

    Example:
        >>> import torch
        >>> d = bregman_from(lambda x: x**2, "square")
        >>> d.sampled(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # (0.5 - 0.25)^2
        tensor([0.0625])
    """
    grid = torch.logspace(-8, 0, 257, dtype=torch.float64)
    check_convex(h, grid, f"divergence generator {name!r}", "(0, 1]")
    remainder = Remainder(h, is_smooth(h, grid[:-8:8]))

    def coordinate(logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
        x = logx.double().clamp(min=_LOG_FLOOR).exp()
        value, slope = remainder(x, logz.double().clamp(min=_LOG_FLOOR).exp(), delta)
        return value, x * slope

    return BregmanDivergence(name, coordinate=coordinate)


def f_divergence_from(f: Generator, name: str) -> RatioDivergence:
    """The f-divergence of f, with f(1) = 0.

    Raises:
        ValueError: f(1) is not 0, or f is not finite, not convex or linear; the message says where.

    Example:
        >>> import torch
        >>> d = f_divergence_from(lambda t: (t - 1) ** 2, "chi2")
        >>> d.exact(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(0.)
    """
    what = f"divergence generator {name!r}"
    one = torch.ones(1, dtype=torch.float64)
    at_one = torch.as_tensor(f(one.clone())).sum().item()
    if not abs(at_one) < 1e-8:
        raise ValueError(f"{what}: f(1) must be 0, got {at_one:g}")
    check_convex(f, torch.logspace(-6, 6, 385, dtype=torch.float64), what, "(0, inf)")
    remainder = Remainder(f, is_smooth(f, one))

    def form(delta: Tensor) -> Parts:
        t = delta.exp()
        value, slope = remainder(t, torch.ones_like(t), delta)
        value = value / t
        return value, slope - value, slope

    return RatioDivergence(name, form=form, growth=max(1.0, _growth_of(f)))


def _growth_of(f: Generator) -> float:
    """The rate a in f(t) ~ t^a at infinity or f(t) ~ t^(-a) at 0, whichever is larger, from two decades."""
    ends = f(torch.tensor([1e-12, 1e-10, 1e10, 1e12], dtype=torch.float64)).abs().clamp(min=1e-30).log().tolist()
    decades = math.log(100.0)
    rates = [(ends[0] - ends[1]) / decades + 1.0, (ends[3] - ends[2]) / decades]
    return min(8.0, max(rate for rate in rates if math.isfinite(rate)))
