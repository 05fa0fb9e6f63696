"""Settings of the trainer: TRL's ``GRPOConfig`` with ``objective`` and a few more fields.

Without ``objective`` the loss is the one that TRL's own fields describe. With it they follow from the objective, and a
field that was passed and says something else is an error. To tell the two apart, their defaults here are None, and
the values that the objective has given them are kept in ``implied``, which a copy (``dataclasses.replace``,
``to_dict``) carries along.
"""

from __future__ import annotations

import argparse
import copy
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from trl.trainer.grpo_config import GRPOConfig

from mirrorpo.config.objective_file import read_objective
from mirrorpo.config.train import TeacherSpec
from mirrorpo.config.yaml import parse_yaml, validated
from mirrorpo.errors import check_number, unknown_name
from mirrorpo.kernels.head import KERNELS
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import objective_from
from mirrorpo.training.distributed import uses_deepspeed
from mirrorpo.training.trl_loss import TRL_DEFAULTS, TRL_FIELDS, check_fields, objective_of_trl, trl_settings

FAST = ("auto", "off")
ROLLOUTS = ("auto", "transformers")
# Set by TRL from the batch size when they are None; it refuses to be given both, so a copy must not carry both.
_BATCH_FIELDS = ("steps_per_generation", "generation_batch_size")
# Objectives that plain data cannot describe, by their key in a configuration.
_BY_HAND: dict[str, Objective] = {}


def _trl_field(kind: str, **metadata: Any) -> Any:
    default = TRL_DEFAULTS[kind]
    help_text = f"As in TRL (default {default}); with an objective it follows from that."
    return field(default=None, metadata={"help": help_text, **metadata})


@dataclass
class MirrorConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` with an objective.

    Args:
        objective: a preset's name (``mirrorpo list objectives``), a mapping with the key ``preset`` and overrides as in
            ``mirrorpo.objective`` (or its JSON), the path of a file that holds one, or an ``Objective``. It decides
            region, penalty, level, advantage and aggregation; TRL's own fields for these (``loss_type``, ``epsilon``,
            ``scale_rewards``, ...) are set to match and refuse another value. None (the default): the objective that
            TRL's own fields describe, with TRL's defaults.
        teacher: whom the policy learns from, if the objective has a penalty toward ``teacher``: a mapping (or its JSON)
            with ``path`` (a model), or ``url`` (a vLLM server) with ``model``, ``top_k`` and ``seconds``; beside it
            ``prefix``, text before the prompt that the teacher alone reads. A prefix alone: the policy teaches itself.
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
        rollouts: what draws completions where no vLLM does. ``auto``: ``mirrorpo.models.decoding``, where settings
            allow it: less work for the same distribution, dropout off, but a seed gives other draws than TRL's;
            ``transformers``: TRL's own call.
        kernels: what works on the logits of packed completions: ``torch``; ``triton``, which needs a GPU and the extra
            ``kernels``, and leaves to torch what it has no form for; ``auto``, Triton where it can run.
        token_budget: most tokens in a packed row. A micro-batch of more is read in several rows, and their activations
            are recomputed one row at a time in the backward pass: less memory, about a third more time. None: one row.
        beta: the coefficient of the objective's divergence. None (the default) keeps the objective's own; without an
            objective it is TRL's, 0.

    Raises:
        ValueError: an unknown objective or key, a TRL setting that contradicts the objective, a loss type of TRL that
            no objective reproduces, settings that exclude each other.

    Example:
        >>> from mirrorpo.training import MirrorConfig
        >>> config = MirrorConfig("out", objective="prob_l2_grpo", report_to="none", bf16=False)
        >>> config.beta, config.loss_type
        (0.0001, 'dr_grpo')
        >>> MirrorConfig("out", report_to="none", bf16=False).resolved_objective().name
        "TRL's dapo"
    """

    # str comes second: the parsers of transformers and TRL read an option as the second type of a union.
    objective: dict | str | Objective | None = field(
        default=None,
        metadata={"help": "Preset, mapping (or JSON) with 'preset' and overrides, or an objective file."},
    )
    teacher: dict | str | None = field(
        default=None, metadata={"help": "Teacher: a mapping (or JSON) with 'path', 'url' or 'prefix'."}
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
    rollouts: str = field(
        default="auto",
        metadata={"help": "What draws completions: 'auto', the library's own loop where supported; 'transformers'."},
    )
    kernels: str = field(
        default="torch",
        metadata={"help": "What works on the logits of packed completions: 'torch', 'triton' (a GPU) or 'auto'."},
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens in a packed row; None: a micro-batch is one row."}
    )
    beta: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Coefficient of the objective's divergence; None keeps the objective's own."},
    )
    loss_type: str | None = _trl_field("loss_type")  # pyright: ignore[reportIncompatibleVariableOverride]
    epsilon: float | None = _trl_field("epsilon")  # pyright: ignore[reportIncompatibleVariableOverride]
    epsilon_high: float | None = _trl_field("epsilon_high")
    delta: float | None = _trl_field("delta")
    importance_sampling_level: str | None = _trl_field("importance_sampling_level")  # pyright: ignore[reportIncompatibleVariableOverride]
    scale_rewards: str | None = _trl_field("scale_rewards")  # pyright: ignore[reportIncompatibleVariableOverride]
    use_bias_correction_kl: bool | None = _trl_field("use_bias_correction_kl", nargs="?", const=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    sapo_temperature_pos: float | None = _trl_field("sapo_temperature_pos")  # pyright: ignore[reportIncompatibleVariableOverride]
    sapo_temperature_neg: float | None = _trl_field("sapo_temperature_neg")  # pyright: ignore[reportIncompatibleVariableOverride]
    vespo_k_pos: float | None = _trl_field("vespo_k_pos")  # pyright: ignore[reportIncompatibleVariableOverride]
    vespo_lambda_pos: float | None = _trl_field("vespo_lambda_pos")  # pyright: ignore[reportIncompatibleVariableOverride]
    vespo_k_neg: float | None = _trl_field("vespo_k_neg")  # pyright: ignore[reportIncompatibleVariableOverride]
    vespo_lambda_neg: float | None = _trl_field("vespo_lambda_neg")  # pyright: ignore[reportIncompatibleVariableOverride]
    # The option that the parsers add for a boolean whose default is true.
    no_use_bias_correction_kl: bool = field(default=False, metadata={"help": argparse.SUPPRESS})
    implied: dict | None = field(default=None, metadata={"help": argparse.SUPPRESS})

    _built: ClassVar[Objective | None] = None
    _built_from: ClassVar[Any] = None

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
        if isinstance(self.fast, bool):  # YAML reads a bare `off` as false
            self.fast = "auto" if self.fast else "off"
        if self.teacher is not None:
            self.teacher = teacher_from(self.teacher).model_dump(exclude_defaults=True)
        self._settle()
        self._forget_implied(_BATCH_FIELDS)
        unset = [name for name in _BATCH_FIELDS if getattr(self, name) is None]
        super().__post_init__()
        self.implied = {**(self.implied or {}), **{name: getattr(self, name) for name in unset}}

        if self.fast not in FAST:
            raise unknown_name("fast", self.fast, FAST)
        if self.kernels not in KERNELS:
            raise unknown_name("kernels", self.kernels, KERNELS)
        if self.kernels == "triton" and self.fast == "off":
            raise ValueError("kernels 'triton' has no effect with fast='off', legal: 'torch', 'auto'")
        if self.rollouts not in ROLLOUTS:
            raise unknown_name("rollouts", self.rollouts, ROLLOUTS)
        if self.rollouts != "auto" and self.use_vllm:
            raise ValueError(f"rollouts must be 'auto' with use_vllm, which draws completions, got {self.rollouts!r}")
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
        """Takes over an objective that was built by hand: ``objective`` and TRL's own fields are set to say the same.

        Raises:
            ValueError: a TRL field that was passed contradicts it.
        """
        self._forget_implied(tuple(TRL_FIELDS))
        if self.beta is not None:
            check_fields(objective, {"beta": self.beta})
        self.objective = objective
        self._settle()

    def resolved_objective(self) -> Objective:
        """The objective that ``objective``, or without it TRL's own fields, describe; built once."""
        if self._built is None or self._built_from != self._sources():
            self._settle()
        assert self._built is not None
        return self._built

    def _sources(self) -> Any:
        return copy.deepcopy([self.objective, *(getattr(self, name) for name in TRL_FIELDS)])

    def _settle(self) -> None:
        """Builds the objective, checks the fields that were passed against it and sets the others."""
        self._forget_implied(tuple(TRL_FIELDS))
        if self.no_use_bias_correction_kl:
            self.use_bias_correction_kl = False  # pyright: ignore[reportIncompatibleVariableOverride]
            self.no_use_bias_correction_kl = False
        given = {name: getattr(self, name) for name in TRL_FIELDS if getattr(self, name) is not None}
        if self.objective is None:
            chosen, values = objective_of_trl(given), TRL_DEFAULTS
        else:
            chosen = _objective_of(self.objective)
            if "beta" in given:
                chosen = _with_coefficient(chosen, given["beta"])
            check_fields(chosen, given)
            values = {**TRL_DEFAULTS, **trl_settings(chosen)}
            self.objective = _plain(self.objective, chosen)
        for name in TRL_FIELDS:
            if name not in given:
                setattr(self, name, values[name])
        batch = {name: value for name, value in (self.implied or {}).items() if name in _BATCH_FIELDS}
        self.implied = {**batch, **{name: getattr(self, name) for name in TRL_FIELDS if name not in given}}
        self._built, self._built_from = chosen, self._sources()  # pyright: ignore[reportAttributeAccessIssue]

    def _forget_implied(self, names: tuple[str, ...]) -> None:
        """Sets fields back to None that an earlier objective, not the user, has given their values."""
        for name, value in (self.implied or {}).items():
            if name in names and getattr(self, name) == value:
                setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the built objective: its functions cannot be pickled, and it can be built again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_built", "_built_from")}


def teacher_from(source: dict | str) -> TeacherSpec:
    """The settings of a teacher; raises ``ValueError`` in one line."""
    data = parse_yaml(source, "teacher") if isinstance(source, str) else source
    return validated(TeacherSpec, data, "teacher")


def _objective_of(source: Any) -> Objective:
    """The objective of a configuration's field."""
    if isinstance(source, dict) and "by_hand" in source:
        if source["by_hand"] not in _BY_HAND:
            raise ValueError(
                f"objective was built by hand in another process ({source.get('describes')}): pass it again, as "
                "MirrorTrainer(objective=...)"
            )
        return _BY_HAND[source["by_hand"]]
    return read_objective(source)


def _plain(source: Any, chosen: Objective) -> dict | str:
    """What stands for an objective in a configuration, as data that JSON, pickle and ``asdict`` can carry."""
    if isinstance(source, str | Path):
        return str(source)
    spec = source.spec if isinstance(source, Objective) else source
    if spec is not None and _is_plain(spec):
        return dict(spec)
    key = uuid.uuid4().hex
    _BY_HAND[key] = source if isinstance(source, Objective) else chosen
    return {"by_hand": key, "describes": chosen.describe()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _with_coefficient(chosen: Objective, beta: float) -> Objective:
    """The objective with another coefficient of its penalty."""
    if beta == chosen.reference_coefficient:
        return chosen
    if chosen.spec is not None:
        if not chosen.penalties:
            raise ValueError(
                f"beta={beta!r} has no effect: objective {chosen.name!r} has no penalty. Give divergence too"
            )
        return objective_from({**chosen.spec, "coefficient": beta})
    check_number("beta", beta, 0.0)
    if len(chosen.penalties) != 1:
        raise ValueError(
            f"beta needs an objective with one penalty, got {beta!r} and {len(chosen.penalties)} penalties"
        )
    return replace(chosen, penalties=(replace(chosen.penalties[0], coefficient=beta),) if beta else ())


__all__ = ["FAST", "ROLLOUTS", "MirrorConfig", "teacher_from"]
