"""Divergences by name: one literal table, plus your own by callable, import path or entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, cast

from mirrorpo._checks import call_with_options, check_number, unknown_name
from mirrorpo.divergences import bregman, fdivergence
from mirrorpo.divergences.base import ESTIMATORS, LOGITS_ESTIMATORS, SUPPORTS, Divergence, Estimator
from mirrorpo.divergences.bregman import BregmanDivergence, beta_divergence
from mirrorpo.divergences.custom import Generator, bregman_from, f_divergence_from
from mirrorpo.divergences.fdivergence import LogRatioPenalty, RatioDivergence, alpha_divergence
from mirrorpo.divergences.neural.map import SOURCES, MirrorMap, NeuralDivergence
from mirrorpo.user_code import import_attribute

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
    "DIVERGENCES",
    "ESTIMATORS",
    "LOGITS_ESTIMATORS",
    "SUPPORTS",
    "BregmanDivergence",
    "Divergence",
    "Estimator",
    "LogRatioPenalty",
    "MirrorMap",
    "NeuralDivergence",
    "RatioDivergence",
    "bregman_from",
    "divergence",
    "f_divergence_from",
]
