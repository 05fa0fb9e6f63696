"""The systems of the papers as one table, and ``objective``: a preset with any part overridden by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mirrorpo._checks import check_number, unknown_name
from mirrorpo.divergences import ESTIMATORS, Divergence
from mirrorpo.losses.advantages import ADVANTAGES
from mirrorpo.losses.aggregation import AGGREGATIONS
from mirrorpo.losses.coefficient import Control, control_from
from mirrorpo.losses.future_kl import FutureKL
from mirrorpo.losses.objective import Objective, Penalty
from mirrorpo.losses.regions import TrustRegion, resolve_divergence, trust_region
from mirrorpo.losses.surrogates import SURROGATES, Surrogate, surrogate_from

LEVELS = ("token", "sequence")
PLACEMENTS = ("loss", "reward")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A line of the table.

    Attributes:
        source: the paper.
        region: name and options of the trust region.
        penalties: (divergence: a name, or a mapping with options; coefficient), each with the ``sampled`` estimator.
        advantage: name in ``mirrorpo.advantages``.
        aggregation: name in ``mirrorpo.losses.aggregation``.
        level: ``token`` or ``sequence``.
        surrogate: name in ``mirrorpo.losses.surrogates``.
        options: of the surrogate.
        future_kl: future-KL weighting, or None.
    """

    source: str
    region: tuple[str, Mapping[str, Any]] = ("ratio", {"epsilon_low": 0.2, "epsilon_high": 0.2})
    penalties: tuple[tuple[str | Mapping[str, Any], float], ...] = ()
    advantage: str = "grpo"
    aggregation: str = "token_mean"
    level: str = "token"
    surrogate: str = "clip"
    options: Mapping[str, float] = field(default_factory=dict)
    future_kl: FutureKL | None = None


_GBMPO = "GBMPO, arXiv 2602.04380"
_CLIP_HIGHER = ("ratio", {"epsilon_low": 0.2, "epsilon_high": 0.28})
_DR_GRPO = Preset(source="Dr. GRPO, arXiv 2503.20783", advantage="dr_grpo", aggregation="constant")
_GSPO = Preset(
    source="GSPO, arXiv 2507.18071",
    region=("ratio", {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    aggregation="sequence_mean",
    level="sequence",
)
_PROB_L2 = (("prob_l2", 1e-4),)
_NEURAL = (("neural", 1e-4),)  # a random map, seed 0
_EVOLVED = (({"name": "neural", "path": "builtin:embedded"}, 1e-4),)  # docs/evolution.md

PRESETS: dict[str, Preset] = {
    "grpo": Preset(source="GRPO, arXiv 2402.03300", penalties=(("reverse_kl", 0.04),), aggregation="sequence_mean"),
    "dr_grpo": _DR_GRPO,
    "dapo": Preset(source="DAPO, arXiv 2503.14476", region=_CLIP_HIGHER),
    "gspo": _GSPO,
    "atr_grpo": Preset(
        source="ATR-GRPO, arXiv 2602.05494", region=("kl3", {"radius": 0.03}), aggregation="sequence_mean"
    ),
    "prob_l2_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=_PROB_L2),
    "prob_l2_gspo": replace(_GSPO, source=_GBMPO, penalties=_PROB_L2, advantage="dr_grpo"),
    "prob_l2_kl_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=(*_PROB_L2, ("reverse_kl", 0.04))),
    "log_l2_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=(("log_l2", 1e-4),)),
    "nm_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=_NEURAL),
    "nm_gspo": replace(_GSPO, source=_GBMPO, penalties=_NEURAL, advantage="dr_grpo"),
    "nm_grpo_es": replace(_DR_GRPO, source=_GBMPO, penalties=_EVOLVED),
    "nm_gspo_es": replace(_GSPO, source=_GBMPO, penalties=_EVOLVED, advantage="dr_grpo"),
    "dppo_tv": Preset(
        source="DPPO, arXiv 2602.04879",
        region=("binary_tv", {"radius": 0.15}),
        surrogate="truncated",
        options={"ratio_cap": 20.0},
    ),
    "dppo_kl": Preset(
        source="DPPO, arXiv 2602.04879",
        region=("binary_kl", {"radius": 0.05}),
        surrogate="truncated",
        options={"ratio_cap": 20.0},
    ),
    "cispo": Preset(
        source="CISPO, arXiv 2506.13585; cap of ScaleRL, arXiv 2510.13786",
        region=("none", {}),
        surrogate="truncated",
        options={"ratio_cap": 5.0},
    ),
    "sapo": Preset(
        source="SAPO, arXiv 2511.20347", region=("none", {}), surrogate="sigmoid", aggregation="sequence_mean"
    ),
    "gmpo": Preset(
        source="GMPO, arXiv 2507.20673",
        region=("kl2", {"radius": 0.08}),  # |log w| <= 0.4
        aggregation="sequence_mean",
        surrogate="geometric",
    ),
    "fipo": Preset(
        source="FIPO, arXiv 2603.19835",
        region=_CLIP_HIGHER,
        options={"dual_clip": 10.0},
        future_kl=FutureKL(max_ratio=10.0),
    ),
}

_REGION_KEYS = ("radius", "epsilon_low", "epsilon_high")
_OPTION_KEYS = tuple(dict.fromkeys(key for entry in SURROGATES.values() for key in entry.options))
OVERRIDES = (
    "coefficient",
    *_REGION_KEYS,
    "estimator",
    "divergence",
    "region",
    "level",
    "advantage",
    "aggregation",
    "surrogate",
    "k",
    "placement",
    "control",
    "future_kl",
    *_OPTION_KEYS,
)


def objective(preset: str = "grpo", /, **overrides: Any) -> Objective:
    """The objective of a preset, with any part overridden.

    Args:
        preset: a name of the table (``mirrorpo list objectives``).
        **overrides: ``coefficient`` (a number; a list with one for each penalty; 0 removes the penalty),
            ``divergence`` (a name, a mapping ``{"name": ..., option: ...}``, your own function or
            ``"module:attribute"``; None or ``"none"`` removes the penalty), ``estimator``, ``k`` (of ``top_k``),
            ``region`` (likewise), ``radius``,
            ``epsilon_low``, ``epsilon_high``, ``level``, ``advantage``, ``aggregation``, ``placement`` (``loss`` or
            ``reward``), ``control`` (see ``mirrorpo.losses.coefficient``), ``surrogate``, ``dual_clip``,
            ``ratio_cap``, ``temperature_positive``, ``temperature_negative``, ``future_kl`` (true, false, or a mapping
            with ``half_life``, ``clip``, ``lower_bound``, ``max_ratio``, ``safety_ratio``).

    Returns:
        An ``Objective``: call it with the tensors of a batch.

    Raises:
        ValueError: an unknown preset, part or name (the nearest valid one is named), a value out of range, a setting
            that has no effect in this combination.

    Reference: the paper of each preset; the table of ``docs/math.md``.

    Example:
        >>> import mirrorpo
        >>> mirrorpo.objective("atr_grpo", radius=0.05).region.name
        'kl3'
    """
    if preset not in PRESETS:
        raise unknown_name("objective preset", preset, PRESETS)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "divergence" in overrides and _is_none(overrides["divergence"]):
        given["divergence"] = ()
    base = PRESETS[preset]
    surrogate = surrogate_from(given.get("surrogate", base.surrogate))
    legal = (*OVERRIDES, *(key for key in surrogate.options if key not in OVERRIDES))
    unknown = sorted(set(overrides) - set(legal))
    if unknown:
        raise unknown_name("objective key", unknown[0], legal)
    level = _choice("level", given.get("level", base.level), LEVELS)
    region = _region(base, surrogate, given)
    if level == "sequence" and (region.per_token or region.needs_logits):
        raise ValueError(f"level 'sequence' needs a region with one bound for all tokens, got region {region.name!r}")
    if level not in surrogate.levels:
        raise ValueError(
            f"level {level!r} does not go with surrogate {surrogate.name!r}. Legal: {', '.join(surrogate.levels)}"
        )
    if not surrogate.uses_region and region.name != "none":
        raise ValueError(f"region {region.name!r} has no effect: surrogate {surrogate.name!r} does not look at it")
    if surrogate.needs_bounds and region.needs_logits:
        raise ValueError(
            f"surrogate {surrogate.name!r} needs a region with bounds, not the mask over the vocabulary {region.name!r}"
        )
    own = {key: value for key, value in given.items() if key in (*_OPTION_KEYS, *surrogate.options)}
    options = surrogate.checked_options({**base.options, **own} if surrogate.name == base.surrogate else own)
    penalties = _penalties(preset, base, given)
    chosen = Objective(
        name=preset,
        region=region,
        penalties=penalties,
        placement=_placement(given, penalties),
        control=_control(given, penalties),
        surrogate=surrogate,
        level=level,
        advantage=_choice("advantage", given.get("advantage", base.advantage), ADVANTAGES),
        aggregation=_choice("aggregation", given.get("aggregation", base.aggregation), AGGREGATIONS),
        options=options,
        future_kl=_future_kl(base, given, options),
    )
    object.__setattr__(chosen, "spec", {"preset": preset, **overrides})
    return chosen


def _is_none(value: Any) -> bool:
    """Whether a value says that there is no such part."""
    return value is None or (isinstance(value, str) and value.strip().lower() == "none")


def objective_from(spec: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from a preset's name or from a mapping with the key ``preset``, as recipes have it.

    Raises:
        ValueError: as in ``objective``; a mapping without ``preset``.

    Example:
        >>> objective_from({"preset": "prob_l2_grpo", "coefficient": 1e-3}).penalties[0].coefficient
        0.001
    """
    if isinstance(spec, Objective):
        return spec
    if isinstance(spec, str):
        return objective(spec)
    if "preset" not in spec:
        raise ValueError(
            f"objective needs the key 'preset', got {sorted(map(str, spec))}. Legal: {', '.join(sorted(PRESETS))}"
        )
    return objective(spec["preset"], **{str(key): value for key, value in spec.items() if key != "preset"})


def _choice(key: str, value: Any, legal: Any) -> str:
    if value not in legal:
        raise unknown_name(key, value, legal)
    return value


def _region(base: Preset, surrogate: Surrogate, given: Mapping[str, Any]) -> TrustRegion:
    own = {key: given[key] for key in _REGION_KEYS if key in given}
    chosen = given.get("region")
    if isinstance(chosen, Mapping):
        options = {str(key): value for key, value in chosen.items()}
        if "name" not in options:
            raise ValueError(f"region as a mapping needs the key 'name', got {sorted(options)}")
        twice = sorted(set(options) & set(own))
        if twice:
            key = twice[0]
            raise ValueError(f"{key} is given twice: {options[key]!r} in region and {own[key]!r} beside it")
        return trust_region(options.pop("name"), **options, **own)
    if chosen is not None:
        return trust_region(chosen, **own)
    if not surrogate.uses_region and not own:
        return trust_region("none")
    name, options = base.region
    return trust_region(name, **{**options, **own})


def _as_list(key: str, value: Any, count: int) -> list[Any]:
    """One value per penalty."""
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(f"{key} must have one value for each of the {count} penalties, got {value!r}")
        return list(value)
    if count > 1 and key == "coefficient":
        raise ValueError(f"coefficient must be a list of {count} numbers, one for each penalty, got {value!r}")
    return [value] * count


def _penalties(preset: str, base: Preset, given: Mapping[str, Any]) -> tuple[Penalty, ...]:
    defaults: list[float | None]
    if "divergence" in given:
        chosen = given["divergence"]
        specs: list[Any] = list(chosen) if isinstance(chosen, list | tuple) else [chosen]
        defaults = list[float | None](coefficient for _, coefficient in base.penalties)[: len(specs)]
        defaults += [None] * (len(specs) - len(defaults))
    else:
        specs = [name for name, _ in base.penalties]
        defaults = list[float | None](coefficient for _, coefficient in base.penalties)
    if not specs:
        for key in ("coefficient", "estimator", "k"):
            if key in given and not (key == "coefficient" and given[key] == 0):
                raise ValueError(
                    f"objective {preset!r} has no penalty, so {key} has no effect: give divergence as well"
                )
        return ()
    coefficients = _as_list("coefficient", given["coefficient"], len(specs)) if "coefficient" in given else defaults
    estimators = _as_list("estimator", given.get("estimator", "sampled"), len(specs))
    k = given.get("k", 64)
    if "k" in given and "top_k" not in estimators:
        raise ValueError("k has no effect: it belongs to estimator 'top_k'")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    penalties = []
    for spec, coefficient, estimator in zip(specs, coefficients, estimators, strict=True):
        if coefficient is None:
            raise ValueError(f"objective {preset!r} has no coefficient of its own: give coefficient with divergence")
        number = check_number("coefficient", coefficient, 0.0, 1e6)
        _choice("estimator", estimator, ESTIMATORS)
        d: Divergence = resolve_divergence(spec)
        if number > 0:
            penalties.append(Penalty(divergence=d, estimator=estimator, coefficient=number, k=k))
    return tuple(penalties)


def _placement(given: Mapping[str, Any], penalties: tuple[Penalty, ...]) -> str:
    placement = _choice("placement", given.get("placement", "loss"), PLACEMENTS)
    if placement == "loss":
        return placement
    if not penalties:
        raise ValueError("placement has no effect without a penalty: give divergence and coefficient")
    for p in penalties:
        if p.estimator not in ("sampled", "weighted"):
            raise ValueError(
                "placement 'reward' uses the value of the estimate, so estimator must be 'sampled' or 'weighted', "
                f"got {p.estimator!r}"
            )
    return placement


def _control(given: Mapping[str, Any], penalties: tuple[Penalty, ...]) -> Control | None:
    if "control" in given and not penalties:
        raise ValueError("control has no effect without a penalty: give divergence and coefficient")
    return control_from(given.get("control"))


def _future_kl(base: Preset, given: Mapping[str, Any], options: Mapping[str, float | None]) -> FutureKL | None:
    chosen = given.get("future_kl", base.future_kl is not None)
    if not isinstance(chosen, bool | Mapping):
        raise ValueError(f"future_kl must be true, false or a mapping, got {chosen!r}")
    if chosen is False:
        return None
    settings = {} if chosen is True else {str(key): value for key, value in chosen.items()}
    unknown = sorted(set(settings) - set(FutureKL.__dataclass_fields__))
    if unknown:
        raise unknown_name("future_kl key", unknown[0], FutureKL.__dataclass_fields__)
    if options.get("dual_clip") is not None:  # one bound for both, unless the weighting is given its own
        settings = {"max_ratio": options["dual_clip"], **settings}
    return replace(base.future_kl or FutureKL(), **settings)
