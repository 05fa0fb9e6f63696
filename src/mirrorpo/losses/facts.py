"""Facts of anchors, surrogates, regions and divergences: options with their ranges, and what goes with what.

They have two readers: the tables of what is built take them over, and the check of an objective reads them where
nothing is built (``mirrorpo.losses.presets.described``). Nothing here loads torch.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

from mirrorpo.errors import check_number, unknown_name
from mirrorpo.user_code import check_module

ENTRY_POINTS = "mirrorpo.divergences"  # the group that brings divergences of other packages


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What brings an anchor.

    Attributes:
        logp: the argument with the log-probabilities of the sampled tokens; None: none is needed.
        logits: the argument with the next-token logits; None: there are none to have.
        how: what to do where it is missing.
    """

    logp: str | None
    logits: str | None
    how: str


ANCHORS: dict[str, Inputs] = {
    "reference": Inputs(
        logp="logp_ref",
        logits="logits_ref",
        how="compute the reference's log-probabilities of the sampled tokens (in the trainer: a coefficient > 0)",
    ),
    "old": Inputs(logp="logp_old", logits="logits_old", how="score the tokens before the first update"),
    "sampler": Inputs(
        logp="logp_sampler",
        logits=None,
        how="pass the log-probabilities that the inference engine reported, or use behaviour and anchor 'old'",
    ),
    "teacher": Inputs(
        logp="logp_teacher", logits="logits_teacher", how="score the sampled tokens with the teacher (setting: teacher)"
    ),
    "uniform": Inputs(logp=None, logits=None, how="pass vocabulary, the number of tokens V"),
}


class UnknownPart(Exception):
    """A part of which only its code knows more: a function, ``module:attribute``, or a name of another package."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A number that a part takes.

    Attributes:
        default: what holds if it is not given; None: the part does without.
        low: it must be above this.
        high: and at most this.
        closed: whether it may also be ``low``.
    """

    default: float | None = None
    low: float = 0.0
    high: float = 1e6
    closed: bool = False

    def checked(self, key: str, value: Any) -> float:
        """The number; raises ``ValueError`` for one out of range."""
        return check_number(key, value, self.low, self.high, open_low=not self.closed)


def check_options(kind: str, name: str, options: Mapping[str, Any], legal: set[str]) -> None:
    """Raises ``ValueError`` for an option outside ``legal``; names the legal ones."""
    extra = sorted(set(options) - legal)
    if extra:
        takes = ", ".join(sorted(legal)) if legal else "no options"
        raise ValueError(f"{kind} {name!r} does not take {extra[0]!r}. Legal: {takes}")


@dataclass(frozen=True, kw_only=True)
class SurrogateFacts:
    """What a surrogate needs. Whatever is left out is assumed to be the worst, so the loss is right without it.

    Attributes:
        name: the name in the table.
        options: the numbers that it takes, by name.
        couples_tokens: whether a token's loss depends on other tokens: then whoever evaluates the loss must see whole
            sequences at once (two sweeps in place of one).
        levels: levels of the ratio that it is defined for.
        uses_region: whether it looks at the region (``low``, ``high``, ``outside``).
        needs_bounds: whether it can do with bounds only, not with a region that is a mask over the vocabulary.
        has_policy_term: whether it reads the advantages; if not, the loss is the penalties'.
        soft: whether a ``soft`` region may stand in place of its bounds.
        scales_advantage: whether it is in proportion to the advantage: a completion whose advantages are 0 has no
            gradient, and a framework's positive factor on the advantages is one on the loss.
        anchors: the anchors that it may be measured from, the first where none is chosen; empty: it has none.
        formula: for people.
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)
    couples_tokens: bool = True
    levels: tuple[str, ...] = ("token", "sequence", "product")
    uses_region: bool = True
    needs_bounds: bool = False
    has_policy_term: bool = True
    soft: bool = False
    scales_advantage: bool = False
    anchors: tuple[str, ...] = ()
    formula: str = ""

    def checked_options(self, given: Mapping[str, Any]) -> Mapping[str, float | None]:
        """All options, the given ones in place of the defaults.

        Raises:
            ValueError: an option that this surrogate does not have, or a value out of range.
        """
        for key in given:
            if key not in self.options:
                legal = ", ".join(self.options) or "no options"
                raise ValueError(f"{key} has no effect with surrogate {self.name!r}. Legal: {legal}")
        return {
            key: option.default if given.get(key) is None else option.checked(key, given[key])
            for key, option in self.options.items()
        }


_SURROGATES = (
    SurrogateFacts(
        name="clip",
        options={"dual_clip": Option(low=1.0)},
        couples_tokens=False,
        soft=True,
        scales_advantage=True,
        formula="-min(w A, clip(w, low, high) A)",
    ),
    SurrogateFacts(
        name="truncated",
        options={"ratio_cap": Option(low=1.0)},
        couples_tokens=False,
        soft=True,
        scales_advantage=True,
        formula="-sg(min(w, ratio_cap)) A log p; outside the region 0",
    ),
    SurrogateFacts(
        name="sigmoid",
        options={"temperature_positive": Option(default=1.0), "temperature_negative": Option(default=1.05)},
        couples_tokens=False,
        uses_region=False,
        scales_advantage=True,
        formula="-(4 / tau) sigmoid(tau (w - 1)) A",
    ),
    SurrogateFacts(
        name="geometric",
        couples_tokens=True,
        levels=("token",),
        needs_bounds=True,
        scales_advantage=True,
        formula="-exp(mean_t clipped log w_t) A, per sequence",
    ),
    SurrogateFacts(
        name="regression",
        options={"tau": Option(default=0.01)},
        couples_tokens=True,
        levels=("token",),
        uses_region=False,
        anchors=("old", "reference", "sampler", "teacher"),
        formula="(A - tau S)^2 / (2 tau n), S = sum_t log p_t/a_t, per sequence of n tokens",
    ),
    SurrogateFacts(
        name="none",
        couples_tokens=False,
        levels=("token",),
        uses_region=False,
        has_policy_term=False,
        scales_advantage=True,
        formula="0",
    ),
)
SURROGATE_FACTS: dict[str, SurrogateFacts] = {facts.name: facts for facts in _SURROGATES}


def surrogate_facts(spec: Any) -> SurrogateFacts:
    """The facts of a surrogate; raises ``UnknownPart`` for one that is code, ``ValueError`` for an unknown name."""
    if isinstance(spec, SurrogateFacts):
        return spec
    if isinstance(spec, str) and ":" not in spec:
        if spec not in SURROGATE_FACTS:
            raise unknown_name("surrogate", spec, SURROGATE_FACTS)
        return SURROGATE_FACTS[spec]
    if isinstance(spec, str):
        check_module(spec, "surrogate")
    if isinstance(spec, str) or callable(spec):
        raise UnknownPart
    raise ValueError(f"surrogate must be a name, a function of Tokens or 'module:attribute', got {spec!r}")


@dataclass(frozen=True, kw_only=True)
class DivergenceFacts:
    """What is known of a divergence.

    Attributes:
        name: the name in the table.
        options: the numbers that it needs.
        one_of: what else it takes, one at most.
        depends_on_token: whether its term at a token needs more than the ratio.
        no_region: why its constraint is no region; empty: it is one.
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    depends_on_token: bool = True
    no_region: str = ""

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` for options that do not fit."""
        for key in self.options:
            if key not in options:
                raise ValueError(f"divergence {self.name!r} needs the option {key!r}")
        check_options("divergence", self.name, options, {*self.options, *self.one_of})
        for key, option in self.options.items():
            option.checked(key, options[key])
        given = [key for key in self.one_of if options.get(key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"divergence {self.name!r} takes one of {', '.join(self.one_of)}, got {' and '.join(given)}"
            )
        if given:
            _check_map_source(given[0], options[given[0]])


def _check_map_source(key: str, value: Any) -> None:
    """What can be said of a mirror map's source without torch, in the words of ``MirrorMap``."""
    if key == "seed" and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63):
        raise ValueError(f"seed must be an integer in [0, 2^63), got {value!r}")
    if key == "like" and (not isinstance(value, str) or value not in MAP_TARGETS):
        raise unknown_name("like", value, MAP_TARGETS)
    if key == "path" and isinstance(value, str) and not value.startswith("builtin:") and not os.path.lexists(value):
        raise ValueError(f"path {value!r} cannot be read: {os.strerror(errno.ENOENT)}")


# The sources of a mirror map: a random one's seed, a file, 380 numbers, or the name of a generator to imitate.
MAP_SOURCES = ("seed", "path", "parameters", "like")
MAP_TARGETS = ("itakura_saito", "kl", "prob_l2")
_KL_REGIONS = "kl2 ((log w)^2 / 2), kl3 (w - 1 - log w), reverse_kl (w log w - w + 1), forward_kl (as kl3)"
_ESTIMATORS_OF_PENALTIES = f"k1, k2, k3 are estimators of a penalty. Legal: {_KL_REGIONS}"
_DIVERGENCES = (
    DivergenceFacts(name="kl"),
    DivergenceFacts(name="prob_l2"),
    DivergenceFacts(name="itakura_saito"),
    DivergenceFacts(name="beta", options={"beta": Option(low=-2.0, high=4.0, closed=True)}),
    DivergenceFacts(name="neural", one_of=MAP_SOURCES),
    *(
        DivergenceFacts(name=name, depends_on_token=False)
        for name in ("reverse_kl", "forward_kl", "jeffreys", "js", "tv", "chi2", "hellinger")
    ),
    DivergenceFacts(name="alpha", options={"alpha": Option(low=-4.0, high=4.0, closed=True)}, depends_on_token=False),
    DivergenceFacts(
        name="k1",
        depends_on_token=False,
        no_region="log w is negative for w < 1 and bounds nothing. Legal: reverse_kl",
    ),
    # The estimators k2 and k3 of p over q are other constraints than the regions of the unified clipping paper with a
    # similar name.
    DivergenceFacts(name="k2", depends_on_token=False, no_region=_ESTIMATORS_OF_PENALTIES),
    DivergenceFacts(name="k3", depends_on_token=False, no_region=_ESTIMATORS_OF_PENALTIES),
    DivergenceFacts(name="log_l2", depends_on_token=False),
)
DIVERGENCE_FACTS: dict[str, DivergenceFacts] = {facts.name: facts for facts in _DIVERGENCES}


def divergence_facts(spec: Any) -> DivergenceFacts:
    """The facts of a divergence from a name or a mapping; raises ``UnknownPart`` or ``ValueError``."""
    name, options = named("divergence", spec)
    if not isinstance(name, str) or name not in DIVERGENCE_FACTS:
        raise _not_in("divergence", name, DIVERGENCE_FACTS)
    DIVERGENCE_FACTS[name].check(options)
    return DIVERGENCE_FACTS[name]


def _not_in(kind: str, name: Any, legal: Iterable[str]) -> Exception:
    """The error for a name that is not in a table, unless code may stand behind it."""
    plain = isinstance(name, str) and ":" not in name
    if isinstance(name, str) and not plain:
        check_module(name, "divergence")
    return unknown_name(kind, name, legal) if plain and not entry_points(group=ENTRY_POINTS) else UnknownPart()


def named(kind: str, spec: Any) -> tuple[Any, dict[str, Any]]:
    """Name and options of a part that a name or ``{"name": ..., option: ...}`` stands for."""
    if not isinstance(spec, Mapping):
        return spec, {}
    options = {str(key): value for key, value in spec.items()}
    if "name" not in options:
        raise ValueError(f"{kind} as a mapping needs the key 'name', got {sorted(options)}")
    return options.pop("name"), options


@dataclass(frozen=True, kw_only=True)
class RegionFacts:
    """What is known of a region.

    Attributes:
        name: the name in the table.
        options: the numbers that it takes.
        per_token: whether its bounds differ from token to token.
        needs_logits: whether it is a mask over the vocabulary.
        has_constraint: whether one number at the sampled token is compared with the radius.
        is_ball: whether that number is a divergence.
        over: other options that it takes: ``divergence``, ``k``.
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)
    per_token: bool = False
    needs_logits: bool = False
    has_constraint: bool = False
    is_ball: bool = False
    over: tuple[str, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of all options."""
        return (*self.options, *self.over)

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, numbers as floats; raises ``ValueError`` for what does not fit."""
        if "radius" in self.options and "radius" not in options:
            raise ValueError(f"region {self.name!r} needs a radius in (0, 1e+06]")
        check_options("region", self.name, options, set(self.takes))
        if self.name == "log_ratio" and all(options.get(key) is None for key in self.options):
            raise ValueError("region 'log_ratio' needs epsilon_low or epsilon_high, numbers in [0, 20]")
        found = dict(options)
        for key, option in self.options.items():
            if key in options and not (options[key] is None and option.default is None and key != "radius"):
                found[key] = option.checked(key, options[key])
        k = options.get("k", 1)
        if "k" in self.over and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"k must be an integer >= 1, got {k!r}")
        return found


RADIUS = Option()
_BALL = {"radius": RADIUS}
_BOUND = Option(high=math.inf, closed=True)
_LOG_BOUND = Option(high=20.0, closed=True)
_REGIONS = (
    RegionFacts(name="ratio", options={"epsilon_low": replace(_BOUND, default=0.2), "epsilon_high": _BOUND}),
    RegionFacts(name="kl3", options=_BALL, has_constraint=True, is_ball=True),
    RegionFacts(name="kl2", options=_BALL, has_constraint=True, is_ball=True),
    RegionFacts(name="binary_tv", options=_BALL, per_token=True, has_constraint=True),
    RegionFacts(name="binary_kl", options=_BALL, per_token=True, has_constraint=True),
    RegionFacts(name="log_ratio", options={"epsilon_low": _LOG_BOUND, "epsilon_high": _LOG_BOUND}),
    RegionFacts(
        name="dcpo",
        options={"epsilon_low": replace(_BOUND, default=0.16), "epsilon_high": replace(_BOUND, default=0.2)},
        per_token=True,
    ),
    RegionFacts(name="exact", options=_BALL, needs_logits=True, over=("divergence",)),
    RegionFacts(name="top_k", options=_BALL, needs_logits=True, over=("divergence", "k")),
    RegionFacts(name="none"),
)
REGION_FACTS: dict[str, RegionFacts] = {facts.name: facts for facts in _REGIONS}


def no_such_region(name: str) -> ValueError:
    """The error for a divergence whose constraint is no region."""
    return ValueError(f"region {name!r} does not exist: {DIVERGENCE_FACTS[name].no_region}")


def region_facts(name: Any, /, **options: Any) -> RegionFacts:
    """The facts of a region from its name and options; raises ``UnknownPart`` or ``ValueError``."""
    if isinstance(name, str) and name in REGION_FACTS:
        REGION_FACTS[name].checked(options)
        if options.get("divergence") is not None:
            divergence_facts(options["divergence"])
        return REGION_FACTS[name]
    if not isinstance(name, str) or name not in DIVERGENCE_FACTS:
        bounded = [known for known, facts in DIVERGENCE_FACTS.items() if not facts.no_region]
        raise _not_in("region", name, [*REGION_FACTS, *bounded])
    if DIVERGENCE_FACTS[name].no_region:
        raise no_such_region(name)
    facts = divergence_facts({"name": name, **{key: value for key, value in options.items() if key != "radius"}})
    if "radius" not in options:
        raise ValueError(f"region {name!r} needs a radius in (0, 1e+06]")
    RADIUS.checked("radius", options["radius"])
    return RegionFacts(name=name, per_token=facts.depends_on_token, has_constraint=True, is_ball=True)


@dataclass(frozen=True)
class PartsFrom:
    """What surrogates, regions and divergences are made by.

    Attributes:
        surrogate: from a name or code.
        region: from a name or code, and options.
        divergence: from a name, code or a mapping.
    """

    surrogate: Callable[[Any], Any]
    region: Callable[..., Any]
    divergence: Callable[[Any], Any]


def _surrogate(spec: Any) -> Any:
    from mirrorpo.losses.surrogates import surrogate_from

    return surrogate_from(spec)


def _region(name: Any, **options: Any) -> Any:
    from mirrorpo.losses.regions import trust_region

    return trust_region(name, **options)


def _divergence(spec: Any) -> Any:
    from mirrorpo.losses.regions import resolve_divergence

    return resolve_divergence(spec)


# The parts themselves, and what is known of them; the former load torch when they are called.
CODE = PartsFrom(_surrogate, _region, _divergence)
FACTS = PartsFrom(surrogate_facts, region_facts, divergence_facts)
