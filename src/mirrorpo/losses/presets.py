"""The systems of the papers as one table, and ``objective``: a preset with any part overridden by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Unpack, cast

from mirrorpo.errors import unknown_name
from mirrorpo.losses.coefficient import Control, control_from
from mirrorpo.losses.facts import CODE, FACTS, SURROGATE_FACTS, PartsFrom, SurrogateFacts, UnknownPart
from mirrorpo.losses.keys import ADVANTAGE_NAMES, AGGREGATION_NAMES, BEHAVIOURS, ObjectiveKeys, PresetName, is_none
from mirrorpo.losses.parts import FutureKL, Parts, check_parts
from mirrorpo.losses.penalties import Penalty, penalty_from
from mirrorpo.losses.rules import LEVELS, RULE_KEYS, Rule, check_rules, rule_from

if TYPE_CHECKING:
    from mirrorpo.losses.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A line of the table.

    Attributes:
        source: the paper.
        regions: name, options, and what differs from a ``clip`` around the behaviour policy; as in ``rule_from``.
        penalties: as in ``penalty_from``; ``sampled`` toward the reference where nothing is said.
        behaviour: ``old`` or ``sampler``.
        advantage: name in ``mirrorpo.advantages``.
        aggregation: name in ``mirrorpo.losses.aggregation``.
        level: ``token`` or ``sequence``.
        surrogate: name in ``mirrorpo.losses.surrogates``.
        options: of the surrogate.
        anchor: of the surrogate, if it has one.
        future_kl: future-KL weighting, or None.
        ours: what the source does not say, for the documentation.
    """

    source: str
    regions: tuple[Mapping[str, Any], ...] = ({"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.2},)
    penalties: tuple[Mapping[str, Any], ...] = ()
    behaviour: str = "old"
    advantage: str = "grpo"
    aggregation: str = "token_mean"
    level: str = "token"
    surrogate: str = "clip"
    options: Mapping[str, float] = field(default_factory=dict)
    anchor: str = ""
    future_kl: FutureKL | None = None
    ours: str = ""


_GBMPO = "GBMPO, arXiv 2602.04380"
_RATIO = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.2}
_CLIP_HIGHER = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}
_DR_GRPO = Preset(source="Dr. GRPO, arXiv 2503.20783", advantage="dr_grpo", aggregation="constant")
_GSPO = Preset(
    source="GSPO, arXiv 2507.18071",
    regions=({"name": "ratio", "epsilon_low": 3e-4, "epsilon_high": 4e-4},),
    aggregation="sequence_mean",
    level="sequence",
)
_K3 = {"divergence": "reverse_kl", "coefficient": 0.04}
_PROB_L2 = {"divergence": "prob_l2", "coefficient": 1e-4}
_NEURAL = {"divergence": "neural", "coefficient": 1e-4}  # a random map, seed 0
_EVOLVED = {"divergence": {"name": "neural", "path": "builtin:embedded"}, "coefficient": 1e-4}  # docs/evolution.md
_DPPO = replace(
    _DR_GRPO,
    source="DPPO, arXiv 2602.04879",
    behaviour="sampler",
    surrogate="truncated",
    options={"ratio_cap": 20.0},
)
_OTHER_BASE = "everything but the penalty and its coefficient is that of its base"

PRESETS: dict[str, Preset] = {
    "grpo": Preset(source="GRPO, arXiv 2402.03300", penalties=(_K3,), aggregation="sequence_mean"),
    "dr_grpo": _DR_GRPO,
    "dapo": Preset(source="DAPO, arXiv 2503.14476", regions=(_CLIP_HIGHER,)),
    "gspo": _GSPO,
    "atr_grpo": Preset(
        source="ATR-GRPO, arXiv 2602.05494",
        regions=({"name": "kl3", "radius": 0.03},),
        aggregation="sequence_mean",
        ours="radius: 0.0231 has the lower bound of ratio 0.2, 0.0331 the upper bound of DAPO's 0.28",
    ),
    "prob_l2_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=(_PROB_L2,)),
    "prob_l2_gspo": replace(_GSPO, source=_GBMPO, penalties=(_PROB_L2,), advantage="dr_grpo", ours=_OTHER_BASE),
    "prob_l2_kl_grpo": replace(
        _DR_GRPO, source=_GBMPO, penalties=(_PROB_L2, _K3), ours="the coefficient of the KL, which is GRPO's"
    ),
    "log_l2_grpo": replace(
        _DR_GRPO, source=_GBMPO, penalties=({"divergence": "log_l2", "coefficient": 1e-4},), ours="coefficient"
    ),
    "nm_grpo": replace(_DR_GRPO, source=_GBMPO, penalties=(_NEURAL,)),
    "nm_gspo": replace(_GSPO, source=_GBMPO, penalties=(_NEURAL,), advantage="dr_grpo", ours=_OTHER_BASE),
    "nm_grpo_es": replace(_DR_GRPO, source=_GBMPO, penalties=(_EVOLVED,), ours="the map, evolved here"),
    "nm_gspo_es": replace(
        _GSPO, source=_GBMPO, penalties=(_EVOLVED,), advantage="dr_grpo", ours="the map, evolved here"
    ),
    "dppo_tv": replace(_DPPO, regions=({"name": "binary_tv", "radius": 0.15},)),
    "dppo_kl": replace(_DPPO, regions=({"name": "binary_kl", "radius": 0.05},)),
    "cispo": Preset(
        source="CISPO, arXiv 2506.13585; cap of ScaleRL, arXiv 2510.13786",
        regions=(),
        surrogate="truncated",
        options={"ratio_cap": 5.0},
    ),
    "sapo": Preset(source="SAPO, arXiv 2511.20347", regions=(), surrogate="sigmoid", aggregation="sequence_mean"),
    "gmpo": Preset(
        source="GMPO, arXiv 2507.20673",
        regions=({"name": "kl2", "radius": 0.08},),  # |log w| <= 0.4
        aggregation="sequence_mean",
        surrogate="geometric",
    ),
    "fipo": Preset(
        source="FIPO, arXiv 2603.19835",
        regions=(_CLIP_HIGHER,),
        options={"dual_clip": 10.0},
        future_kl=FutureKL(max_ratio=10.0),
    ),
    "spo": Preset(
        source="SPO, arXiv 2401.16025",
        regions=({"name": "chi2", "radius": 0.2, "act": "soft"},),
        ours="advantage and aggregation: the paper's experiments are not on language models",
    ),
    "drpo": replace(
        _DR_GRPO, source="DRPO, arXiv 2606.09821", regions=({"name": "prob_l2", "radius": 12.5, "act": "soft"},)
    ),
    "dcpo": Preset(
        source="DCPO, arXiv 2509.02333",
        regions=({"name": "dcpo", "epsilon_low": 0.16, "epsilon_high": 0.2},),
        ours="advantage and aggregation: the paper smooths advantages over steps, which is left out",
    ),
    "icepop": Preset(
        source="IcePop, arXiv 2510.18855",
        behaviour="sampler",
        regions=(
            {**_RATIO, "anchor": "old"},
            {"name": "ratio", "epsilon_low": 0.5, "epsilon_high": 4.0, "act": "mask", "of": "old"},
        ),
        aggregation="sequence_mean",
    ),
    "opsm": Preset(
        source="off-policy sequence masking of DeepSeek-V3.2, arXiv 2512.02556",
        regions=(
            _RATIO,
            {
                "name": "log_ratio",
                "epsilon_low": 0.1,
                "anchor": "sampler",
                "act": "mask",
                "level": "sequence",
                "side": "negative",
            },
        ),
        penalties=({**_K3, "estimator": "weighted"},),
        aggregation="sequence_mean",
        ours="the threshold 0.1 and the coefficient: the paper has none",
    ),
    "opmd": Preset(
        source="policy mirror descent of Kimi k1.5, arXiv 2501.12599",
        regions=(),
        surrogate="regression",
        anchor="old",
        options={"tau": 0.01},
        advantage="dr_grpo",
        aggregation="sequence_mean",
        ours="tau, and the division by the number of tokens",
    ),
    "a_star_po": Preset(
        source="A*-PO, arXiv 2505.20686",
        regions=(),
        surrogate="regression",
        anchor="reference",
        options={"tau": 1e-3},
        advantage="soft_value",
        aggregation="sequence_mean",
        ours="the value is of the group, not of samples of the reference; the division by the number of tokens",
    ),
    "opd": Preset(
        source="on-policy distillation, arXiv 2306.13649",
        regions=(),
        surrogate="none",
        penalties=({"divergence": "reverse_kl", "coefficient": 1.0, "estimator": "score", "anchor": "teacher"},),
        ours="aggregation",
    ),
}

_REGION_KEYS = ("radius", "epsilon_low", "epsilon_high")
_PENALTY_KEYS = ("divergence", "coefficient", "estimator", "k", "placement")
_OPTION_KEYS = tuple(dict.fromkeys(key for entry in SURROGATE_FACTS.values() for key in entry.options))
OVERRIDES = tuple(dict.fromkeys((*ObjectiveKeys.__annotations__, *_OPTION_KEYS)))


def objective(preset: PresetName | str = "grpo", /, **overrides: Unpack[ObjectiveKeys]) -> Objective:
    """The objective of a preset, with any part overridden.

    Args:
        preset: a name of the table (``mirrorpo list objectives``).
        **overrides:
            The region in short form: ``region`` (a name, a mapping ``{"name": ..., option: ...}``, your own function or
            ``"module:attribute"``), ``radius``, ``epsilon_low``, ``epsilon_high``. In long form: ``regions``, a list of
            mappings with ``anchor``, ``act``, ``level``, ``side`` and ``of`` beside the name and the options.
            The penalty in short form: ``divergence`` (as ``region``; None or ``"none"`` removes the penalty),
            ``coefficient`` (a number; a list with one for each penalty; 0 removes the penalty), ``estimator``, ``k``
            (of ``top_k``), ``placement`` (``loss``, ``reward`` or ``advantage``). In long form: ``penalties``, a list
            of mappings with ``divergence``, ``coefficient``, ``estimator``, ``anchor``, ``placement``, ``k``,
            ``support``.
            The rest: ``behaviour`` (``old`` or ``sampler``), ``level``, ``advantage``, ``aggregation``, ``control``
            (see ``mirrorpo.losses.coefficient``), ``surrogate``, its ``anchor`` and its options (``dual_clip``,
            ``ratio_cap``, ``temperature_positive``, ``temperature_negative``, ``tau``), ``future_kl`` (true, false, or
            a mapping with ``half_life``, ``clip``, ``lower_bound``, ``max_ratio``, ``safety_ratio``).

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
    from mirrorpo.losses.objective import Objective  # loads torch

    parts = _parts(preset, overrides, CODE)
    chosen = Objective(**{key.name: getattr(parts, key.name) for key in fields(parts)})
    object.__setattr__(chosen, "spec", {"preset": preset, **overrides})
    return chosen


def described(spec: Mapping[str, Any]) -> Parts | None:
    """The parts of an objective as facts, from the mapping that ``objective_from`` takes: nothing is built.

    Returns:
        None where code stands for a part, which only building it can check.

    Raises:
        ValueError: what ``objective_from`` raises.

    Example:
        >>> sorted(described({"preset": "opd"}).needs)
        ['old', 'teacher']
    """
    overrides = {str(key): value for key, value in spec.items() if key != "preset"}
    try:
        return _parts(spec.get("preset"), overrides, FACTS)
    except UnknownPart:
        return None


def _parts(preset: Any, overrides: Mapping[str, Any], make: PartsFrom) -> Parts:
    if not isinstance(preset, str) or preset not in PRESETS:
        raise unknown_name("objective preset", preset, PRESETS)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("region") is False:  # YAML reads a bare `off` or `no` as false
        given["region"] = "none"
    if "divergence" in overrides and is_none(overrides["divergence"]):
        given["divergence"] = ()
    base = PRESETS[preset]
    surrogate = make.surrogate(given.get("surrogate", base.surrogate))
    legal = (*OVERRIDES, *(key for key in surrogate.options if key not in OVERRIDES))
    unknown = sorted(set(overrides) - set(legal))
    if unknown:
        raise unknown_name("objective key", unknown[0], legal)
    behaviour = _choice("behaviour", given.get("behaviour", base.behaviour), BEHAVIOURS)
    level = _level(base, given)
    rules = _rules(base, surrogate, behaviour, level, given, make)
    own = {key: value for key, value in given.items() if key in (*_OPTION_KEYS, *surrogate.options)}
    options = surrogate.checked_options({**base.options, **own} if surrogate.name == base.surrogate else own)
    penalties = _penalties(preset, base, given, make)
    advantage = _choice("advantage", given.get("advantage", base.advantage), ADVANTAGE_NAMES)
    future_kl = _future_kl(base, surrogate, given, options)
    anchor = _anchor(base, surrogate, given)
    check_rules(rules, behaviour)
    check_parts(surrogate, level, rules, penalties, advantage, future_kl)
    return Parts(
        name=preset,
        rules=rules,
        penalties=penalties,
        control=_control(given, penalties),
        surrogate=surrogate,
        level=level,
        behaviour=behaviour,
        advantage=advantage,
        aggregation=_choice("aggregation", given.get("aggregation", base.aggregation), AGGREGATION_NAMES),
        options=options,
        anchor=anchor,
        future_kl=future_kl,
    )


def objective_from(spec: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from a preset's name or from a mapping with the key ``preset``, as recipes have it.

    Raises:
        ValueError: as in ``objective``; a mapping without ``preset``.

    Example:
        >>> objective_from({"preset": "prob_l2_grpo", "coefficient": 1e-3}).penalties[0].coefficient
        0.001
    """
    if isinstance(spec, Parts):  # which is built already
        return spec
    if isinstance(spec, str):
        return objective(spec)
    if "preset" not in spec:
        raise ValueError(
            f"objective needs the key 'preset', got {sorted(map(str, spec))}. Legal: {', '.join(sorted(PRESETS))}"
        )
    keys = {str(key): value for key, value in spec.items() if key != "preset"}
    return objective(spec["preset"], **cast(Any, keys))


def _choice(key: str, value: Any, legal: Any) -> str:
    if not isinstance(value, str) or value not in legal:
        raise unknown_name(key, value, legal)
    return value


def _anchor(base: Preset, surrogate: SurrogateFacts, given: Mapping[str, Any]) -> str:
    """The surrogate's own anchor: as given, else the preset's, else the surrogate's first; empty if it has none."""
    if not surrogate.anchors:
        if "anchor" in given:
            what = f"anchor has no effect with surrogate {surrogate.name!r}"
            raise ValueError(f"{what}: regions and penalties have their own. Legal: surrogate 'regression'")
        return ""
    default = base.anchor if base.anchor in surrogate.anchors else surrogate.anchors[0]
    return _choice("anchor", given.get("anchor", default), surrogate.anchors)


def _level(base: Preset, given: Mapping[str, Any]) -> str:
    """The level of the ratio: as given, else that of a bound in ``regions``, else the preset's."""
    specs = given["regions"] if isinstance(given.get("regions"), list | tuple) else ()
    placed = [
        spec["level"]
        for spec in specs
        if isinstance(spec, Mapping) and "level" in spec and spec.get("act", "clip") == "clip"
    ]
    level = _choice("level", given.get("level", placed[0] if placed else base.level), LEVELS)
    if placed and placed[0] != level:
        raise ValueError(
            f"level {level!r} differs from level {placed[0]!r} of the region with act 'clip': the ratio that is "
            "clipped is the one in the loss. Give one of them"
        )
    return level


def _rules(
    base: Preset, surrogate: SurrogateFacts, behaviour: str, level: str, given: Mapping[str, Any], make: PartsFrom
) -> tuple[Rule, ...]:
    own = {key: given[key] for key in _REGION_KEYS if key in given}
    if "regions" in given:
        beside = [key for key in ("region", *own) if key in given]
        if beside:
            raise ValueError(f"{beside[0]} is given beside regions: put it into the entry of its region")
        specs = given["regions"]
        if not isinstance(specs, list | tuple):
            raise ValueError(f"regions must be a list of regions, got {specs!r}")
        rules = [rule_from(spec, behaviour, level, make) for spec in specs]
        return tuple(rule for rule in rules if rule.region.name != "none")
    masks = [dict(spec) for spec in base.regions if spec.get("act") == "mask"]
    bounds = [dict(spec) for spec in base.regions if spec.get("act") != "mask"]
    chosen = given.get("region")
    if chosen is not None:
        placed = {key: bounds[0][key] for key in RULE_KEYS if bounds and key in bounds[0]}
        spec = {str(key): value for key, value in chosen.items()} if isinstance(chosen, Mapping) else {"name": chosen}
        if spec.get("name") == "none" and not own:
            placed = {}
        bounds = [placed | spec]
    elif bounds and own:
        bounds, own = [{**bounds[0], **own}], {}
    elif own:
        bounds = [{"name": "none"}]
    elif not surrogate.uses_region:
        bounds = []
    if not surrogate.has_policy_term:
        masks = []
    rules = [rule_from(spec, behaviour, level, make, **own) for spec in bounds] + [
        rule_from(spec, behaviour, parts=make) for spec in masks
    ]
    return tuple(rule for rule in rules if rule.region.name != "none")


def _as_list(key: str, value: Any, count: int) -> list[Any]:
    """One value per penalty."""
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(f"{key} must have one value for each of the {count} penalties, got {value!r}")
        return list(value)
    if count > 1 and key == "coefficient":
        raise ValueError(f"coefficient must be a list of {count} numbers, one for each penalty, got {value!r}")
    return [value] * count


def _penalties(preset: str, base: Preset, given: Mapping[str, Any], make: PartsFrom) -> tuple[Penalty, ...]:
    if "penalties" in given:
        beside = [key for key in _PENALTY_KEYS if key in given]
        if beside:
            raise ValueError(f"{beside[0]} is given beside penalties: put it into the entry of its penalty")
        if not isinstance(given["penalties"], list | tuple):
            raise ValueError(f"penalties must be a list of mappings, got {given['penalties']!r}")
        return tuple(p for p in (penalty_from(spec, parts=make) for spec in given["penalties"]) if p is not None)
    specs = [dict(spec) for spec in base.penalties]
    if "divergence" in given:
        chosen = given["divergence"]
        chosen = list(chosen) if isinstance(chosen, list | tuple) else [chosen]
        # The preset's coefficient, estimator and anchor stay where it has a penalty at that place.
        specs = [{**(specs[i] if i < len(specs) else {}), "divergence": d} for i, d in enumerate(chosen)]
    if not specs:
        for key in ("coefficient", "estimator", "k", "placement"):
            if key in given and not (key == "coefficient" and given[key] == 0):
                raise ValueError(
                    f"objective {preset!r} has no penalty, so {key} has no effect: give divergence as well"
                )
        return ()
    for key in ("coefficient", "estimator", "placement"):
        if key in given:
            for spec, value in zip(specs, _as_list(key, given[key], len(specs)), strict=True):
                spec[key] = value
    estimators = [
        spec.get("estimator", "score" if spec.get("placement") == "advantage" else "sampled") for spec in specs
    ]
    if "k" in given and "top_k" not in estimators:
        raise ValueError("k has no effect: it belongs to estimator 'top_k'")
    for spec in specs:
        if "coefficient" not in spec:
            raise ValueError(f"objective {preset!r} has no coefficient of its own: give coefficient with divergence")
    return tuple(p for p in (penalty_from(spec, given.get("k"), make) for spec in specs) if p is not None)


def _control(given: Mapping[str, Any], penalties: tuple[Penalty, ...]) -> Control | None:
    if "control" in given and not penalties:
        raise ValueError("control has no effect without a penalty: give divergence and coefficient")
    return control_from(given.get("control"))


def _future_kl(
    base: Preset, surrogate: SurrogateFacts, given: Mapping[str, Any], options: Mapping[str, float | None]
) -> FutureKL | None:
    chosen = given.get("future_kl", base.future_kl is not None and surrogate.has_policy_term)
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
