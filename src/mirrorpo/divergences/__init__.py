r"""Divergences by name: one literal table, plus your own by callable, import path or entry point.

A divergence of your own from one function: a Bregman generator h(x) on (0, 1], or the f(t) of an f-divergence.

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
from functools import partial
from importlib.metadata import entry_points
from typing import Any, cast

import torch
from torch import Tensor

from mirrorpo._checks import call_with_options
from mirrorpo.divergences.base import ESTIMATORS, LOGITS_ESTIMATORS, SUPPORTS, Divergence, Estimator, Term
from mirrorpo.divergences.bregman import BregmanDivergence, beta_divergence
from mirrorpo.divergences.fdivergence import LogRatioPenalty, Parts, RatioDivergence, alpha_divergence
from mirrorpo.divergences.neural.map import SOURCES, MirrorMap, NeuralDivergence
from mirrorpo.errors import check_number, unknown_name
from mirrorpo.user_code import import_attribute

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
    grid = torch.logspace(-8, 0, 257, dtype=torch.float64, device="cpu")
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
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    at_one = torch.as_tensor(f(one.clone()), device="cpu").sum().item()
    if not abs(at_one) < 1e-8:
        raise ValueError(f"{what}: f(1) must be 0, got {at_one:g}")
    check_convex(f, torch.logspace(-6, 6, 385, dtype=torch.float64, device="cpu"), what, "(0, inf)")
    remainder = Remainder(f, is_smooth(f, one))

    def form(delta: Tensor) -> Parts:
        t = delta.exp()
        value, slope = remainder(t, torch.ones_like(t), delta)
        value = value / t
        return value, slope - value, slope

    return RatioDivergence(name, form=form, growth=max(1.0, _growth_of(f)))


def _growth_of(f: Generator) -> float:
    """The rate a in f(t) ~ t^a at infinity or f(t) ~ t^(-a) at 0, whichever is larger, from two decades."""
    ends = (
        f(torch.tensor([1e-12, 1e-10, 1e10, 1e12], dtype=torch.float64, device="cpu"))
        .abs()
        .clamp(min=1e-30)
        .log()
        .tolist()
    )
    decades = math.log(100.0)
    rates = [(ends[0] - ends[1]) / decades + 1.0, (ends[3] - ends[2]) / decades]
    return min(8.0, max(rate for rate in rates if math.isfinite(rate)))


ENTRY_POINT_GROUP = "mirrorpo.divergences"
GBMPO, UNIFIED = "GBMPO, arXiv 2602.04380", "Unified clipping, arXiv 2602.05494"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table: how to build it, what it is, where it comes from."""

    build: Callable[..., Divergence]
    family: str
    formula: str
    source: str
    options: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _bregman(name: str, coordinate: bregman.Coordinate, formula: str, source: str, **settings: Any) -> Entry:
    return Entry(
        build=lambda: BregmanDivergence(name, coordinate=coordinate, growth_known=True, **settings),
        family="bregman",
        formula=formula,
        source=source,
    )


def _ratio(name: str, form: fdivergence.Form, formula: str, source: str, **settings: Any) -> Entry:
    settings = {"growth_known": True, "float32_sums": True, **settings}
    return Entry(build=lambda: RatioDivergence(name, form=form, **settings), family="f", formula=formula, source=source)


def _penalty(name: str, form: fdivergence.Form, formula: str, source: str) -> Entry:
    return Entry(
        build=lambda: LogRatioPenalty(name, form=form, needs_float64=False, growth_known=True, float32_sums=True),
        family="log-ratio",
        formula=formula,
        source=source,
    )


def _beta(beta: object) -> Divergence:
    return beta_divergence(check_number("beta", beta, -2.0, 4.0))


def _alpha(alpha: object) -> Divergence:
    return alpha_divergence(check_number("alpha", alpha, -4.0, 4.0))


def _neural(**source: Any) -> NeuralDivergence:
    given = {name: value for name, value in source.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"divergence 'neural' takes one of {', '.join(SOURCES)}, got {' and '.join(given)}")
    if "path" in given:
        from mirrorpo.divergences.neural.file import load_map  # reads a file: only where one is asked for

        return load_map(given["path"]).divergence()
    if "parameters" in given:
        return MirrorMap.of(given["parameters"]).divergence()
    if "like" in given:
        return MirrorMap.like(given["like"]).divergence()
    return MirrorMap.random(given.get("seed", 0)).divergence()


SCHULMAN = "Schulman 2020, Approximating KL divergence"
DIVERGENCES: dict[str, Entry] = {
    "kl": _bregman("kl", bregman.kl, "x log(x/z) - x + z", GBMPO, float32_term=bregman.kl_float32),
    "prob_l2": _bregman(
        "prob_l2", bregman.prob_l2, "(x - z)^2", GBMPO, needs_float64=False, float32_term=bregman.prob_l2_float32
    ),
    "itakura_saito": _bregman(
        "itakura_saito",
        bregman.itakura_saito,
        "x/z - 1 - log(x/z)",
        UNIFIED + " (KL3)",
        max_log_ratio=80.0,
        float32_term=partial(bregman.clamped_float32, bregman.itakura_saito, 1.0),
    ),
    "beta": Entry(
        build=_beta,
        family="bregman",
        formula="(x^b + (b - 1) z^b - b x z^(b-1)) / (b (b - 1))",
        source="Basu et al. 1998; " + GBMPO,
        options=("beta",),
    ),
    "neural": Entry(
        build=_neural,
        family="bregman",
        formula="h' = sum_j v_j sigma_j(w_j x + b_j) + a x + c log x",
        source=GBMPO,
        optional=SOURCES,
    ),
    "reverse_kl": _ratio("reverse_kl", fdivergence.reverse_kl, "f = t log t", "GRPO, arXiv 2402.03300 (k3)"),
    "forward_kl": _ratio("forward_kl", fdivergence.forward_kl, "f = -log t", UNIFIED),
    "jeffreys": _ratio("jeffreys", fdivergence.jeffreys, "f = (t - 1) log t", "Jeffreys 1946", needs_float64=False),
    "js": _ratio("js", fdivergence.js, "f = (t log t - (1 + t) log((1 + t)/2)) / 2", "Lin 1991"),
    "tv": _ratio("tv", fdivergence.tv, "f = |t - 1| / 2", "TRPO, arXiv 1502.05477", needs_float64=False),
    "chi2": _ratio(
        "chi2", fdivergence.chi2, "f = (t - 1)^2", "Pearson 1900; " + UNIFIED, growth=2.0, needs_float64=False
    ),
    "hellinger": _ratio(
        "hellinger", fdivergence.hellinger, "f = 1 - sqrt t", "Hellinger 1909; " + UNIFIED, needs_float64=False
    ),
    "alpha": Entry(
        build=_alpha,
        family="f",
        formula="f = (t^a - a t + a - 1) / (a (a - 1))",
        source="Cressie & Read 1984; " + UNIFIED,
        options=("alpha",),
    ),
    "k1": _ratio(
        "k1", fdivergence.k1, "log t  (reverse_kl without its control variate)", SCHULMAN, needs_float64=False
    ),
    "k2": _penalty("k2", fdivergence.k2, "(log t)^2 / 2", SCHULMAN),
    "k3": _ratio("k3", fdivergence.reverse_kl, "1/t - 1 + log t  (= reverse_kl)", SCHULMAN),
    "log_l2": _penalty("log_l2", fdivergence.log_l2, "(log t)^2", GBMPO),
}


def divergence(name: str | Generator | Divergence, /, **options: Any) -> Divergence:
    """The divergence of that name.

    Args:
        name: a name of the table (``mirrorpo list divergences``), one that an installed package adds through the
            entry-point group ``mirrorpo.divergences``, your own function, or ``"module:attribute"`` that names one (or
            a ``Divergence``).
        **options: of the divergence (``beta``, ``alpha``; one of ``seed``, ``path``, ``parameters``, ``like`` for
            ``neural``); for your own function ``family="bregman"`` (the default: the
            function is a generator h(x) on (0, 1]) or ``family="f"`` (it is f(t), with f(1) = 0).

    Returns:
        A ``Divergence``: ``sampled``, ``weighted``, ``score``, ``exact``, ``top_k``, ``top_k_sparse``.

    Raises:
        ValueError: an unknown name (the nearest valid one is named) or option, an option out of range, a function that
            is not convex.

    Example:
        >>> import torch, mirrorpo
        >>> mirrorpo.divergence("beta", beta=0.5).name
        'beta'
        >>> mirrorpo.divergence(lambda x: x**3, family="bregman").name
        '<lambda>'
    """
    if isinstance(name, Divergence):
        return call_with_options("divergence", name.name, lambda: name, options, set())
    if not isinstance(name, str):
        return _own(name, getattr(name, "__name__", type(name).__name__), options)
    if name in DIVERGENCES:
        entry = DIVERGENCES[name]
        missing = [option for option in entry.options if option not in options]
        if missing:
            raise ValueError(f"divergence {name!r} needs the option {missing[0]!r}")
        return call_with_options("divergence", name, entry.build, options, {*entry.options, *entry.optional})
    if ":" in name:
        found = import_attribute(name, "divergence")
        return divergence(found, **options) if isinstance(found, Divergence) else _own(found, name, options)
    return _from_entry_point(name, options)


def _own(found: Any, name: str, options: dict[str, Any]) -> Divergence:
    if not callable(found):
        raise ValueError(f"divergence {name!r} must be a function or a Divergence, got {type(found).__name__}")
    fn = cast("Generator", found)  # what it returns is checked by calling it on a grid
    family = call_with_options("divergence", name, lambda family="bregman": family, options, {"family"})
    if family == "bregman":
        return bregman_from(fn, name)
    if family == "f":
        return f_divergence_from(fn, name)
    raise unknown_name("family", family, ("bregman", "f"))


def _from_entry_point(name: str, options: dict[str, Any]) -> Divergence:
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in plugins:
        raise unknown_name("divergence", name, [*DIVERGENCES, *plugins])
    found = plugins[name].load()
    built = found if isinstance(found, Divergence) else found(**options)
    if not isinstance(built, Divergence):
        raise ValueError(f"entry point {name!r} of {ENTRY_POINT_GROUP} gave a {type(built).__name__}, not a Divergence")
    return built


__all__ = [
    "BregmanDivergence",
    "DIVERGENCES",
    "Divergence",
    "ESTIMATORS",
    "Estimator",
    "LOGITS_ESTIMATORS",
    "LogRatioPenalty",
    "MirrorMap",
    "NeuralDivergence",
    "RatioDivergence",
    "SUPPORTS",
    "bregman_from",
    "divergence",
    "f_divergence_from",
]
