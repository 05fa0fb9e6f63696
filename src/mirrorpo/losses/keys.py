"""Keys of ``mirrorpo.objective`` and the names that they take, as types: an editor completes them, marks typing errors.

The names are those of the tables (a test compares them). A key also takes what has no name: a function, a mapping with
options, or ``"module:attribute"``. Nothing here loads torch: the command line refuses a misspelt name at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, TypedDict, get_args

from mirrorpo.errors import check_number, unknown_name

PresetName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "atr_grpo",
    "prob_l2_grpo",
    "prob_l2_gspo",
    "prob_l2_kl_grpo",
    "log_l2_grpo",
    "nm_grpo",
    "nm_gspo",
    "nm_grpo_es",
    "nm_gspo_es",
    "dppo_tv",
    "dppo_kl",
    "cispo",
    "sapo",
    "gmpo",
    "fipo",
    "spo",
    "drpo",
    "dcpo",
    "icepop",
    "opsm",
    "opd",
    "opmd",
    "a_star_po",
]
DivergenceName = Literal[
    "kl",
    "prob_l2",
    "itakura_saito",
    "beta",
    "neural",
    "reverse_kl",
    "forward_kl",
    "jeffreys",
    "js",
    "tv",
    "chi2",
    "hellinger",
    "alpha",
    "k1",
    "k2",
    "k3",
    "log_l2",
]
RegionName = Literal[
    "ratio",
    "kl3",
    "kl2",
    "binary_tv",
    "binary_kl",
    "log_ratio",
    "dcpo",
    "exact",
    "top_k",
    "none",
]
EstimatorName = Literal["sampled", "weighted", "score", "exact", "top_k"]
AdvantageName = Literal["grpo", "dr_grpo", "rloo", "maxrl", "soft_value"]
AggregationName = Literal["sequence_mean", "token_mean", "constant", "sequence_sum"]
AnchorName = Literal["reference", "old", "sampler", "teacher", "uniform"]
SurrogateName = Literal["clip", "truncated", "sigmoid", "geometric", "regression", "none"]
# What stands for a part that is no name alone.
Part = str | Mapping[str, Any] | Callable[..., Any]


class ObjectiveKeys(TypedDict, total=False):
    """Keywords of ``mirrorpo.objective``; its docstring says what each one does."""

    coefficient: float | Sequence[float] | None
    radius: float | None
    epsilon_low: float | None
    epsilon_high: float | None
    estimator: EstimatorName | Sequence[EstimatorName] | None
    divergence: DivergenceName | Part | None
    region: RegionName | Part | bool | None
    regions: Sequence[Mapping[str, Any]] | None
    penalties: Sequence[Mapping[str, Any]] | None
    behaviour: Literal["old", "sampler"] | None
    level: Literal["token", "sequence", "product"] | None
    advantage: AdvantageName | None
    aggregation: AggregationName | None
    surrogate: SurrogateName | Part | None
    anchor: AnchorName | None
    k: int | None
    placement: Literal["loss", "reward", "advantage"] | None
    control: Mapping[str, Any] | None
    future_kl: bool | Mapping[str, Any] | None
    # Options of the surrogates.
    dual_clip: float | None
    ratio_cap: float | None
    temperature_positive: float | None
    temperature_negative: float | None
    tau: float | None


# The names that a key takes as text, for keys that take a name alone; of the objective, and of one penalty or region.
_NAMES: dict[str, Any] = {
    "advantage": AdvantageName,
    "aggregation": AggregationName,
    "behaviour": Literal["old", "sampler"],
    "estimator": EstimatorName,
    "level": Literal["token", "sequence", "product"],
    "placement": Literal["loss", "reward", "advantage"],
}
_NAMES_OF_PENALTIES: dict[str, Any] = {
    **{key: _NAMES[key] for key in ("estimator", "placement")},
    "anchor": AnchorName,
    "baseline": Literal["none", "exact"],
}
_NAMES_OF_REGIONS: dict[str, Any] = {
    "act": Literal["clip", "mask", "soft", "truncate"],
    "anchor": AnchorName,
    "level": Literal["token", "sequence", "product", "mean_divergence", "sum_divergence", "max_divergence"],
    "side": Literal["both", "positive", "negative"],
}
# (low, high) of the numbers that mean the same whatever goes with them; the radius is above its low end.
COEFFICIENT, RADIUS = (0.0, 1e6), (0.0, 1e6)
# Estimators of a penalty, which bound nothing.
NO_REGIONS = ("k1", "k2", "k3")
_PLUGINS = "mirrorpo.divergences"  # the group of entry points that bring divergences of other packages


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(get_args(PresetName))


def is_none(value: Any) -> bool:
    """Whether a value says that there is no such part: ``null``, "none", or ``off``, false in YAML."""
    return value is None or value is False or (isinstance(value, str) and value.strip().lower() == "none")


def check_names(spec: Mapping[str, Any]) -> None:
    """Raises what ``objective_from`` raises for a misspelt preset, key or name, and for two numbers out of their range,
    those of each penalty and region too.

    Whatever else is wrong passes.

    Args:
        spec: ``preset`` and overrides.

    Raises:
        ValueError: names the nearest valid one.

    Example:
        >>> check_names({"preset": "dapo", "advantage": "rlo"})
        Traceback (most recent call last):
        ValueError: unknown advantage 'rlo'; did you mean 'rloo'? Legal: dr_grpo, grpo, maxrl, rloo, soft_value
    """
    spec = {str(key): value for key, value in spec.items()}
    if spec.get("preset") not in preset_names():
        raise unknown_name("objective preset", spec.get("preset"), preset_names())
    own_surrogate = spec.get("surrogate") not in (None, *get_args(SurrogateName))
    unknown = sorted(set(spec) - {"preset", *ObjectiveKeys.__annotations__})
    if unknown and not own_surrogate:  # which may have options of its own
        raise unknown_name("objective key", unknown[0], ObjectiveKeys.__annotations__)
    if not own_surrogate or (isinstance(spec["surrogate"], str) and ":" not in spec["surrogate"]):
        _check_choices(spec, {"surrogate": SurrogateName})
    _check_part(spec, _NAMES)
    for part in _parts(spec, "penalties"):
        _check_part(part, _NAMES_OF_PENALTIES)
    for part in _parts(spec, "regions"):
        _check_part(part, _NAMES_OF_REGIONS)


def _parts(spec: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The mappings in a list of penalties or regions; regions are compared under the key ``region``."""
    listed = spec.get(key)
    found = [part for part in listed if isinstance(part, Mapping)] if isinstance(listed, list | tuple) else []
    return found if key == "penalties" else [{**part, "region": part.get("name")} for part in found]


def _check_choices(spec: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    for key, names in choices.items():
        several = key == "estimator" and isinstance(spec.get(key), list | tuple)
        if spec.get(key) is not None and not several and spec[key] not in get_args(names):
            raise unknown_name(key, spec[key], get_args(names))


def _check_part(spec: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Checks what an objective, a penalty and a region have in common."""
    _check_choices(spec, choices)
    for key, ends in (("coefficient", COEFFICIENT), ("radius", RADIUS)):
        if isinstance(spec.get(key), int | float) and spec[key] is not False:  # "off", where there is no penalty
            check_number(key, spec[key], *ends, open_low=key == "radius")
    divergences = get_args(DivergenceName)
    regions = [*get_args(RegionName), *(name for name in divergences if name not in NO_REGIONS)]
    for key, legal in (("divergence", divergences), ("region", regions)):
        name = spec.get(key)
        if isinstance(name, Mapping):
            name = name.get("name")
        if not isinstance(name, str) or ":" in name or name in NO_REGIONS or is_none(name):
            continue
        if name not in legal and not entry_points(group=_PLUGINS):
            raise unknown_name(key, name, legal)


__all__ = [
    "AdvantageName",
    "AggregationName",
    "AnchorName",
    "DivergenceName",
    "EstimatorName",
    "NO_REGIONS",
    "ObjectiveKeys",
    "PresetName",
    "RegionName",
    "SurrogateName",
    "check_names",
    "is_none",
    "preset_names",
]
