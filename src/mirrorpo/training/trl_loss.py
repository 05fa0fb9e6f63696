"""TRL as the trainer relies on it: its settings of the GRPO loss, and the private methods that are overridden.

``GRPOConfig`` describes a loss by ``loss_type``, ``beta``, ``epsilon`` and a dozen more fields. ``objective_of_trl``
builds the objective that reproduces it (TRL 1.16, loss and gradient); ``trl_settings`` gives the fields that an
objective implies, so that what TRL itself derives from them (warnings, logged configuration) stays true.

A contract test compares the table ``SEAMS`` with the classes of both sides: an override that is missing in it fails the
test, and so does a release that changes a signature.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from mirrorpo.errors import unknown_name
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import objective
from mirrorpo.losses.regions import Interval

# TRL's fields of the loss, and the key of `objective` that decides the same.
TRL_FIELDS = {
    "loss_type": "aggregation",
    "beta": "coefficient",
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "delta": "dual_clip",
    "importance_sampling_level": "level",
    "scale_rewards": "advantage",
    "use_bias_correction_kl": "estimator",
    "sapo_temperature_pos": "temperature_positive",
    "sapo_temperature_neg": "temperature_negative",
    "vespo_k_pos": "surrogate",
    "vespo_lambda_pos": "surrogate",
    "vespo_k_neg": "surrogate",
    "vespo_lambda_neg": "surrogate",
}
TRL_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(GRPOConfig) if f.name in TRL_FIELDS}

# The denominators of TRL's losses.
_AGGREGATION = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}
_NOT_EXPRESSIBLE = {
    "bnpo": "its denominator is the number of tokens of a micro-batch, so the loss depends on how a batch is divided",
    "vespo": "its gamma weights of whole sequences are not a surrogate of this library",
}
_ADVANTAGE = {"group": "grpo", "none": "dr_grpo"}


def normalised(name: str, value: Any) -> Any:
    """The value of a TRL field in the form that TRL's own checks leave behind; from a command line it is a text."""
    if name != "scale_rewards":
        return value
    return {"true": "group", "false": "none"}.get(str(value).lower(), value)


def objective_of_trl(given: Mapping[str, Any]) -> Objective:
    """The objective that reproduces TRL's loss.

    Args:
        given: fields of ``GRPOConfig`` by name (``TRL_FIELDS``); those left out have TRL's defaults.

    Returns:
        The objective; its name is TRL's loss type.

    Raises:
        ValueError: a loss type or a combination that no objective reproduces, a value that TRL does not know.

    Example:
        >>> objective_of_trl({"loss_type": "grpo", "beta": 0.1}).describe()
        "TRL's grpo: clip surrogate, region ratio (low 0.8, high 1.2); penalty 0.1 * reverse_kl (weighted); \
token level, grpo advantages, sequence_mean aggregation"
    """
    fields = TRL_DEFAULTS | {name: normalised(name, value) for name, value in given.items()}
    kind = fields["loss_type"]
    if kind in _NOT_EXPRESSIBLE:
        raise ValueError(
            f"loss_type {kind!r} is not supported: {_NOT_EXPRESSIBLE[kind]}. Legal: {', '.join(sorted(_AGGREGATION))}"
        )
    if kind not in _AGGREGATION:
        raise unknown_name("loss_type", kind, _AGGREGATION)
    common: dict[str, Any] = {
        "level": _level(fields),
        "advantage": _advantage(fields),
        "aggregation": _AGGREGATION[kind],
    }
    common |= _penalty(fields)
    if kind == "sapo":
        chosen = objective(
            "sapo",
            temperature_positive=fields["sapo_temperature_pos"],
            temperature_negative=fields["sapo_temperature_neg"],
            **common,
        )
    elif kind == "cispo":
        cap = fields["epsilon"] if fields["epsilon_high"] is None else fields["epsilon_high"]
        # Below 1 the cap is of no use to anybody, but TRL's default for `epsilon_high` makes it 0.2.
        chosen = dataclasses.replace(objective("cispo", **common), options={"ratio_cap": float(cap)})
    else:
        chosen = objective("dapo", **_clip(fields), **common)
    return dataclasses.replace(chosen, name=f"TRL's {kind}")


def _level(fields: Mapping[str, Any]) -> str:
    level, kind = fields["importance_sampling_level"], fields["loss_type"]
    if level not in ("token", "sequence"):
        raise unknown_name("importance_sampling_level", level, ("token", "sequence"))
    if level == "sequence" and kind == "cispo":
        raise ValueError("importance_sampling_level 'sequence' is not supported with loss_type 'cispo'. Legal: 'token'")
    return level


def _advantage(fields: Mapping[str, Any]) -> str:
    scale = fields["scale_rewards"]
    if scale == "batch":
        raise ValueError(
            "scale_rewards 'batch' is not supported: advantages here depend on one group alone. Legal: 'group', 'none'"
        )
    if scale not in _ADVANTAGE:
        raise unknown_name("scale_rewards", scale, _ADVANTAGE)
    return _ADVANTAGE[scale]


def _penalty(fields: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's penalty is k3, multiplied by the likelihood ratio with ``use_bias_correction_kl``."""
    if not fields["beta"]:
        return {"divergence": None}
    corrected = fields["use_bias_correction_kl"]
    if corrected and fields["importance_sampling_level"] == "sequence":
        raise ValueError(
            "use_bias_correction_kl must be False with importance_sampling_level 'sequence' and beta: TRL would weigh "
            f"each token's penalty by the ratio of its whole sequence, got {corrected!r}"
        )
    estimator = "weighted" if corrected else "sampled"
    return {"divergence": "reverse_kl", "coefficient": fields["beta"], "estimator": estimator}


def _clip(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Region and dual clip. TRL clamps w at ``delta`` before it takes the minimum of both products.

    Where A > 0 that is a region that ends at min(1 + epsilon_high, delta); where A < 0 the minimum holds w at
    max(1 + epsilon_high, delta), a dual clip.
    """
    low, high, delta = fields["epsilon"], fields["epsilon_high"], fields["delta"]
    high = low if high is None else high
    if delta is None:
        return {"region": "ratio", "epsilon_low": low, "epsilon_high": high}
    if not delta > 1.0:
        raise ValueError(f"delta must be greater than 1, got {delta!r}")
    bound = max(1.0 + high, delta)
    return {"region": "ratio", "epsilon_low": low, "epsilon_high": min(high, delta - 1.0), "dual_clip": bound}


def trl_settings(chosen: Objective) -> dict[str, Any]:
    """The TRL fields that an objective decides, with the values that say the same; the others have no effect on it.

    Example:
        >>> from mirrorpo import objective
        >>> found = trl_settings(objective("dapo"))
        >>> found["loss_type"], found["epsilon"], found["epsilon_high"], found["beta"]
        ('dapo', 0.2, 0.28, 0.0)
    """
    surrogate, options, region = chosen.surrogate.name, chosen.options, chosen.region
    scale = {advantage: name for name, advantage in _ADVANTAGE.items()}.get(chosen.advantage)
    found: dict[str, Any] = {
        "loss_type": _loss_type(chosen),
        "beta": chosen.reference_coefficient,
        "importance_sampling_level": "token" if chosen.level == "token" else "sequence",
        "use_bias_correction_kl": any(p.estimator == "weighted" for p in chosen.penalties),
    }
    if scale is not None:
        found["scale_rewards"] = scale
    if surrogate == "clip":
        found["delta"] = options.get("dual_clip")
        if isinstance(region, Interval) and region.name == "ratio":
            found |= {"epsilon": round(1.0 - region.low, 12), "epsilon_high": round(region.high - 1.0, 12)}
    if found["loss_type"] == "cispo":
        found["epsilon_high"] = options.get("ratio_cap")
    if surrogate == "sigmoid":
        found["sapo_temperature_pos"] = options.get("temperature_positive")
        found["sapo_temperature_neg"] = options.get("temperature_negative")
    return found


def _loss_type(chosen: Objective) -> str:
    if chosen.surrogate.name == "sigmoid" and chosen.aggregation == "sequence_mean":
        return "sapo"
    if chosen.surrogate.name == "truncated" and chosen.region.name == "none" and chosen.aggregation == "token_mean":
        return "cispo"
    # TRL's loss type with the same denominator.
    found = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo", "sequence_sum": "luspo"}
    return found[chosen.aggregation]


def check_fields(chosen: Objective, given: Mapping[str, Any]) -> None:
    """Raises for a TRL field that was passed beside an objective and says something else.

    Raises:
        ValueError: names the field, its value, the objective's value and the key of ``objective`` to use.
    """
    implied = trl_settings(chosen)
    for name, value in given.items():
        value = normalised(name, value)
        if name == "use_bias_correction_kl" and not chosen.penalties:
            continue  # there is nothing to correct, in TRL either
        if name in implied and _same(value, implied[name]):
            continue
        decided = f", which has {implied[name]!r}" if implied.get(name) is not None else ""
        raise ValueError(
            f"{name}={value!r} has no effect: it contradicts objective {chosen.name!r}{decided}. Leave it out, or use "
            f"objective={{'preset': ..., '{TRL_FIELDS[name]}': ...}}"
        )


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) if numbers else one == other


def add_trl_names(values: dict[str, Any]) -> None:
    """TRL's names for the same metrics, so that dashboards and callbacks keep working."""
    values["entropy"] = values["entropy/mean"]
    values["clip_ratio/low_mean"] = values["clip/low/frac"]
    values["clip_ratio/high_mean"] = values["clip/high/frac"]
    values["clip_ratio/low_min"], values["clip_ratio/high_max"] = values.pop("low/min"), values.pop("high/max")
    values["clip_ratio/region_mean"] = values["clip/low/frac"] + values["clip/high/frac"]
    if "divergence/reverse_kl/mean" in values:
        values["kl"] = values["divergence/reverse_kl/mean"]


# Method to its parameters, without `self`; of the longest one, those that are passed by position.
SEAMS: dict[str, tuple[str, ...]] = {
    # Rewards, advantages and loss
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ),
    "_compute_loss": ("model", "inputs"),
    "_get_grad_norm": ("model", "grad_norm"),
    # Checkpoints, and the order of the data after one
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_get_train_sampler": ("dataset",),
}


__all__ = ["SEAMS", "TRL_DEFAULTS", "TRL_FIELDS", "add_trl_names", "check_fields", "objective_of_trl", "trl_settings"]
