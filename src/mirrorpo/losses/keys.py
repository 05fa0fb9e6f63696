"""Keys of ``mirrorpo.objective``, the names that they take, as types: an editor completes them, marks typing errors.

The names are those of the tables (a test compares them). A key also takes what has no name: a function, a mapping with
options, or ``"module:attribute"``. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

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


ADVANTAGE_NAMES: tuple[str, ...] = get_args(AdvantageName)
AGGREGATION_NAMES: tuple[str, ...] = get_args(AggregationName)
ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)
LOGITS_ESTIMATORS = ("exact", "top_k")
# Whose K likeliest tokens `top_k` takes.
SUPPORTS = ("anchor", "policy", "union")
BEHAVIOURS = ("old", "sampler")
PLACEMENTS = ("loss", "reward", "advantage")
BASELINES = ("none", "exact")
# (low, high) of a penalty's coefficient.
COEFFICIENT = (0.0, 1e6)


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(get_args(PresetName))


def is_none(value: Any) -> bool:
    """Whether a value says that there is no such part: ``null``, "none", or ``off``, false in YAML."""
    return value is None or value is False or (isinstance(value, str) and value.strip().lower() == "none")
