"""Which objective does a TRL trainer optimise? ``GRPOConfig`` plus ``objective``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from mirrorpo._checks import check_number, unknown_name
from mirrorpo.config.objective_file import read_spec
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import objective_from
from mirrorpo.losses.regions import Interval
from mirrorpo.training.world import uses_deepspeed

FAST = ("auto", "off")
# TRL's loss type with the same denominator, so that what TRL derives from it (warnings, model card) stays true.
_LOSS_TYPE = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}
# TRL settings that would have no effect here, and the key of `objective` that has.
_OBJECTIVE_KEY = {
    "loss_type": "aggregation",
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "delta": "dual_clip",
    "importance_sampling_level": "level",
    "scale_rewards": "advantage",
    "use_bias_correction_kl": "estimator: weighted",
    "sapo_temperature_pos": "temperature_positive",
    "sapo_temperature_neg": "temperature_negative",
}


@dataclass
class MirrorConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` with one more field.

    Args:
        objective: a preset's name (``mirrorpo list objectives``), a mapping with the key ``preset`` and overrides as in
            ``mirrorpo.objective``, or the path of a file that holds one. It decides region, penalty, level, advantage
            and aggregation; TRL's own fields for these (``loss_type``, ``epsilon``, ``scale_rewards``, ...) are set to
            match and refuse another value.
        gradient_share_every: optimiser steps between measurements of the penalty's share of the gradient norm (two
            extra backward passes each); 0 for never.
        on_nonfinite: "raise" ends the run at the first number that is not finite; "skip" leaves out the tokens, else
            the optimiser step (`mirrorpo.training.nonfinite`), and counts them; not with DeepSpeed.
        max_nonfinite: with "skip", more such optimiser steps than this end the run.
        on_reward_error: "raise" ends the run when a reward function fails (an exception, too slow, a wrong number of
            rewards, NaN); "skip" leaves out the completions concerned. None as a reward is no failure: it means skip.
        reward_seconds: time limit of a call of a reward function.
        fast: ``auto``: completions are packed and their prompts shared where model and settings allow it (a line in
            the log says why if not); ``off``: always padded, as in TRL. The numbers are the same.
        token_budget: most tokens in a packed row. A micro-batch of more is read in several rows, and their activations
            are recomputed one row at a time in the backward pass: less memory, about a third more time. None: one row.
        beta: the coefficient of the objective's divergence. None (the default) keeps the objective's own.

    Raises:
        ValueError: an unknown objective or key, a TRL setting that the objective overrides, settings that exclude each
            other.

    Example:
        >>> from mirrorpo.training import MirrorConfig
        >>> config = MirrorConfig("out", objective="prob_l2_grpo", report_to="none", bf16=False)
        >>> config.beta, config.loss_type
        (0.0001, 'dr_grpo')
    """

    objective: dict | str = field(
        default="grpo",
        metadata={"help": "Preset, mapping with 'preset' and overrides, or an objective file."},
    )
    gradient_share_every: int = field(
        default=100, metadata={"help": "Steps between measurements of the penalty's share of the gradient norm."}
    )
    on_nonfinite: str = field(
        default="raise",
        metadata={"help": "A log-probability, advantage, reward, loss or gradient that is not finite: raise or skip."},
    )
    max_nonfinite: int = field(
        default=10, metadata={"help": "With skip: optimiser steps in which something may be left out."}
    )
    on_reward_error: str = field(
        default="raise", metadata={"help": "A reward function that fails: raise, or skip what it failed on."}
    )
    reward_seconds: float | None = field(
        default=None, metadata={"help": "Time limit of a reward function's call; None for none."}
    )
    fast: str = field(
        default="auto",
        metadata={"help": "'auto': completions are packed, prompts shared, where supported; 'off': padded as in TRL."},
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens in a packed row; None: a micro-batch is one row."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Coefficient of the objective's divergence; None keeps the objective's own."},
    )

    def __post_init__(self) -> None:
        for name, legal in (("on_nonfinite", ("raise", "skip")), ("on_reward_error", ("raise", "skip"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} must be 'raise' or 'skip', got {getattr(self, name)!r}")
        check_number("max_nonfinite", self.max_nonfinite, 0)
        if self.on_nonfinite == "skip" and (self.deepspeed or uses_deepspeed()):
            raise ValueError(
                "on_nonfinite must be 'raise' with DeepSpeed, which keeps its gradients to itself, got 'skip'"
            )
        if self.reward_seconds is not None:
            check_number("reward_seconds", self.reward_seconds, 0, open_low=True)
        chosen = self.resolved_objective()
        implied = implied_settings(chosen)
        for item in fields(self):
            if item.name not in _OBJECTIVE_KEY:
                continue
            value, wanted = getattr(self, item.name), implied[item.name]
            if value not in (item.default, wanted) and not (item.name == "scale_rewards" and value is True):
                raise ValueError(
                    f"{item.name}={value!r} has no effect: the objective decides it. "
                    f"Use objective={{'preset': ..., '{_OBJECTIVE_KEY[item.name]}': ...}}"
                )
            setattr(self, item.name, wanted)
        self.beta = chosen.penalties[0].coefficient if chosen.penalties else 0.0
        super().__post_init__()

        if self.fast not in FAST:
            raise unknown_name("fast", self.fast, FAST)
        if self.token_budget is not None and (not isinstance(self.token_budget, int) or self.token_budget < 1):
            raise ValueError(f"token_budget must be an integer >= 1 or None, got {self.token_budget!r}")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation must be 'sum_then_normalize': the objective's advantage is computed from "
                f"the weighted sum of the rewards, got {self.multi_objective_aggregation!r}"
            )
        if self.use_adaptive_entropy:
            raise ValueError("use_adaptive_entropy is not supported here: use entropy_coef, a fixed bonus")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel is not supported here: set model_init_kwargs={'use_kernels': True}")

    def adopt(self, objective: Objective) -> None:
        """Takes over an objective that was built by hand: TRL's own fields are set to say the same."""
        for name, value in implied_settings(objective).items():
            setattr(self, name, value)
        self.beta = objective.penalties[0].coefficient if objective.penalties else 0.0  # pyright: ignore[reportIncompatibleVariableOverride]

    def resolved_objective(self) -> Objective:
        """The objective that ``objective`` and ``beta`` describe."""
        spec = read_spec(self.objective)
        chosen = objective_from(spec)
        own = chosen.penalties[0].coefficient if chosen.penalties else 0.0
        if self.beta is None or self.beta == own:
            return chosen
        return objective_from({**spec, "coefficient": self.beta})


def implied_settings(objective: Objective) -> Mapping[str, Any]:
    """The values of TRL's own fields that say the same as the objective."""
    region, options = objective.region, objective.options
    low, high = (region.low, region.high) if isinstance(region, Interval) and region.name == "ratio" else (0.8, None)
    return {
        "loss_type": _LOSS_TYPE[objective.aggregation],
        # TRL reads these in its own loss only; for regions that are no ratio range its defaults stay.
        "epsilon": round(1.0 - low, 12),
        "epsilon_high": None if high is None else round(high - 1.0, 12),
        "delta": options.get("dual_clip"),
        "importance_sampling_level": objective.level,
        "scale_rewards": "group" if objective.advantage == "grpo" else "none",
        "use_bias_correction_kl": any(p.estimator == "weighted" for p in objective.penalties),
        "sapo_temperature_pos": options.get("temperature_positive") or 1.0,
        "sapo_temperature_neg": options.get("temperature_negative") or 1.05,
    }
