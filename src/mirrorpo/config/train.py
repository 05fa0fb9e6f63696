"""Keys of a training recipe: task, model, objective, reference, training and evaluation.

Every key is checked before anything is written, and the objective is built once, while the recipe is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mirrorpo.config.yaml import load, overridden, parse_override, read_spec, validated, with_bases
from mirrorpo.errors import InputError
from mirrorpo.losses.facts import UnknownPart, divergence_facts
from mirrorpo.losses.parts import Parts
from mirrorpo.losses.presets import described, objective_from
from mirrorpo.tasks import TASKS, TaskSettings, find_task
from mirrorpo.tasks.task import Settings
from mirrorpo.user_code import NotImportedError

if TYPE_CHECKING:
    from mirrorpo.losses.objective import Objective

# The first of two checks of a recipe: all that can be known without torch. The second builds the objective.
KEYS_ALONE = "keys alone"


class LoraSpec(Settings):
    """Low-rank adapters; the reference is then the model with its adapter off."""

    r: int = Field(default=16, ge=1, le=65_536, description="rank")
    alpha: int = Field(default=32, ge=1, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: str | list[str] = Field(default="all-linear", description="which layers get an adapter")


class ModelSpec(Settings):
    """The policy."""

    path: str = Field(
        default="builtin:tiny", min_length=1, description="builtin:tiny, a folder, a GGUF file or a hub name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: LoraSpec | None = None
    chat_template: dict[str, bool | int | float | str] = Field(
        default={}, description="options of the tokenizer's chat template, such as enable_thinking: false"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that the model's author supplies")


class ObjectiveSpec(BaseModel):
    """A preset with overrides; the keys are those of ``mirrorpo.objective``."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    preset: str = Field(default="dr_grpo", description="a name of `mirrorpo list objectives`")
    _built: Any = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        """A text is an objective file, or a preset's name; the resolved recipe holds what it says."""
        return read_spec(data) if isinstance(data, str) else data

    @model_validator(mode="after")
    def _builds(self, info: ValidationInfo) -> ObjectiveSpec:
        try:
            self.parts(info.context)
        except (TypeError, OverflowError, RecursionError) as error:  # a value of a type that was not foreseen
            raise ValueError(f"cannot be built from these values ({error})") from error
        return self

    def build(self) -> Objective:
        """The objective, always the same one; raises ``ValueError`` for what does not fit together."""
        if self._built is None:
            self._built = objective_from(self.spec())
        return self._built

    def parts(self, context: object) -> Parts | None:
        """The objective, or in the first check what is known of its parts; None where only code knows."""
        if context == KEYS_ALONE:
            return described(self.spec())
        try:
            return self.build()
        except NotImportedError:  # a plan: what it names is checked when the run begins
            return None

    @property
    def needs_reference(self) -> bool:
        """Whether it has a penalty toward the reference; assumed where its code is not imported, in a plan."""
        parts = self.parts(None)
        return parts is None or parts.needs_reference

    def describe(self) -> str:
        """One line, for people."""
        try:
            return self.build().describe()
        except NotImportedError as error:
            return f"{self.preset} with code of yours ({error})"

    def spec(self) -> dict[str, Any]:
        """The mapping that ``MirrorConfig(objective=...)`` takes."""
        return {"preset": self.preset, **(self.model_extra or {})}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectiveSpec) and self.spec() == other.spec()

    def __getstate__(self) -> dict[Any, Any]:
        """Without the built objective: its functions cannot be pickled, and it can be built again."""
        return {**super().__getstate__(), "__pydantic_private__": {"_built": None}}


class VllmSpec(Settings):
    """How vLLM generates."""

    mode: Literal["colocate", "server"] = Field(default="colocate", description="in this process, or vLLM's own server")
    memory_share: float = Field(default=0.3, gt=0.0, lt=1.0, description="of the device's memory (colocate)")
    sleep: bool = Field(default=False, description="give its memory back during the update (colocate)")
    server_url: str | None = Field(default=None, min_length=1, description="such as http://localhost:8000 (server)")
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="sequence_mask",
        description="weight of the policy term for the sampler's mismatch: trainer / sampler probability, clamped or 0",
    )
    ratio_max: float = Field(default=3.0, gt=0.0, description="upper bound of the weight")
    ratio_min: float | None = Field(default=None, ge=0.0, description="lower bound of the weight; empty: none")

    @model_validator(mode="after")
    def _of_its_mode(self) -> VllmSpec:
        if (self.mode == "server") != (self.server_url is not None):
            raise ValueError("server_url goes with mode 'server', and only with it")
        if self.mode == "server" and (self.sleep or self.memory_share != 0.3):
            raise ValueError(
                "memory_share and sleep have no effect with mode 'server': the server has its own settings"
            )
        if self.correction == "none" and (self.ratio_max, self.ratio_min) != (3.0, None):
            raise ValueError("ratio_max and ratio_min have no effect with correction 'none'")
        if self.ratio_min is not None and self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min must be at most ratio_max, {self.ratio_max:g}, got {self.ratio_min:g}")
        return self


class EvalSpec(Settings):
    """The evaluation before and after, and every so many steps."""

    problems: int = Field(default=512, ge=0, description="unseen problems; 0: no evaluation")
    every: int = Field(
        default=0, ge=0, le=10_000_000, description="steps between evaluations; 0: only before and after training"
    )
    samples: int = Field(default=1, ge=1, le=100_000, description="completions per problem")
    temperature: float = Field(default=1.0, ge=0.0, le=10.0, description="0: greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_completion_length: int | None = Field(default=None, ge=1, le=1_000_000, description="empty: as in training")
    batch_size: int | None = Field(
        default=None, ge=1, le=1_000_000, description="completions generated at once; empty: by device and model size"
    )
    seed: int = Field(default=1234, ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _differ(self) -> EvalSpec:
        if self.temperature == 0.0 and self.samples > 1:
            raise ValueError(
                f"samples must be 1 with temperature 0 (greedy: all would be the same), got {self.samples}"
            )
        return self


class TrainSpec(Settings):
    """The optimisation."""

    steps: int = Field(default=80, ge=1, le=10_000_000, description="rollout batches")
    prompts_per_step: int = Field(default=16, ge=1, le=1_000_000, description="prompts in a rollout batch")
    group_size: int = Field(
        default=16, ge=2, le=100_000, description="completions per prompt; a group of 1 has no baseline"
    )
    updates_per_batch: int = Field(
        default=1, ge=1, le=1_000_000, description="optimiser steps per rollout batch, on parts of it"
    )
    passes_per_batch: int = Field(default=1, ge=1, le=10_000, description="passes over each rollout batch")
    micro_batch_size: int | None = Field(default=None, ge=1, description="completions in memory at once (per process)")
    learning_rate: float = Field(default=1e-4, gt=0.0, le=10.0)
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    adam_beta2: float = Field(default=0.999, gt=0.0, lt=1.0, description="decay of Adam's second moment")
    adam_epsilon: float = Field(default=1e-8, gt=0.0, le=1.0, description="Adam's floor under the second moment's root")
    max_grad_norm: float = Field(default=1.0, ge=0.0, description="0: no clipping")
    temperature: float = Field(default=1.0, gt=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_completion_length: int = Field(default=256, ge=1, le=1_000_000, description="tokens")
    mask_truncated: bool = Field(default=False, description="completions without an end leave the loss")
    save_every: int = Field(default=20, ge=1, le=10_000_000, description="steps between checkpoints")
    keep: int = Field(default=2, ge=1, le=1_000_000, description="checkpoints kept")
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of the forward and backward pass")
    on_nonfinite: Literal["raise", "skip"] = Field(
        default="raise", description="a NaN or infinite number ends the run, or its tokens or step are left out"
    )
    max_nonfinite: int = Field(
        default=10,
        ge=0,
        le=10_000_000,
        description="with skip: maximum number of incomplete optimiser steps",
    )
    gradient_checkpointing: bool = False
    fast: Literal["auto", "off"] = Field(
        default="auto", description="auto: completions packed, prompts shared, where supported; off: padded"
    )
    rollouts: Literal["auto", "transformers"] = Field(
        default="auto", description="what draws completions: auto: the loop of mirrorpo; transformers: TRL's call"
    )
    kernels: Literal["torch", "triton", "auto"] = Field(
        default="torch",
        description="what works on the logits of packed completions: torch; triton (a GPU; extra: kernels); auto",
    )
    token_budget: int | None = Field(
        default=None,
        ge=1,
        description="maximum tokens in a packed row: less memory, more time; empty: a micro-batch",
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        default=[], description="trackers that get every step's metrics, under TRL's names too"
    )
    run_name: str | None = Field(default=None, min_length=1, description="the run's name in a tracker")
    log_completions_every: int = Field(
        default=0, ge=0, le=10_000_000, description="steps between completions kept in completions.jsonl; 0: none"
    )
    trl: dict[str, Any] = Field(default={}, description="any other field of TRL's GRPOConfig, such as {min_p: 0.01}")
    use_vllm: bool = Field(default=False, description="generate with vLLM (extra: vllm)")
    vllm: VllmSpec = Field(default=VllmSpec(), description="settings of vLLM, if use_vllm is true")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        """``report_to: wandb`` is short for a list of one; ``none`` for an empty one."""
        if value is None or value == "none":
            return []
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("fast", mode="before")
    @classmethod
    def _yaml_boolean(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return {False: "off", True: "auto"}[value] if isinstance(value, bool) else value

    @property
    def batch_size(self) -> int:
        """Completions in a rollout batch."""
        return self.prompts_per_step * self.group_size

    @model_validator(mode="after")
    def _divides(self) -> TrainSpec:
        if self.batch_size % self.updates_per_batch:
            raise ValueError(
                f"updates_per_batch must divide prompts_per_step * group_size = {self.batch_size}, "
                f"got {self.updates_per_batch}"
            )
        update = self.batch_size // self.updates_per_batch
        if self.micro_batch_size is not None and update % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide the {update} completions of an update "
                f"(prompts_per_step * group_size / updates_per_batch), got {self.micro_batch_size}"
            )
        if self.fast == "off" and self.kernels == "triton":
            raise ValueError("kernels 'triton' has no effect with fast: off, legal: torch, auto")
        return self


class ReferenceSpec(Settings):
    """Where the penalty is measured from."""

    kind: Literal["kept", "synced", "averaged"] = Field(
        default="kept", description="the model before training; the policy of some steps ago; a running average"
    )
    every: int = Field(default=1, ge=1, le=10_000_000, description="optimiser steps between updates (synced, averaged)")
    rate: float = Field(default=0.01, gt=0.0, le=1.0, description="share of the policy in each update (averaged)")


class TeacherSpec(Settings):
    """Whom the policy learns from, if the objective has a penalty toward ``teacher``."""

    path: str | None = Field(default=None, min_length=1, description="builtin:tiny, a folder or a hub name")
    url: str | None = Field(default=None, pattern=r"^https?://\S+$", description="a vLLM server, http://localhost:8000")
    model: str | None = Field(default=None, min_length=1, description="the server's name of it; empty: its first")
    prefix: str | None = Field(
        default=None, min_length=1, description="text before the prompt that the teacher alone reads"
    )
    top_k: int = Field(default=20, ge=1, le=10_000, description="entries per token that a server sends")
    seconds: float = Field(default=60.0, gt=0.0, description="time limit of a request")

    @model_validator(mode="after")
    def _is_one(self) -> TeacherSpec:
        if self.path is not None and self.url is not None:
            raise ValueError("path and url are two teachers: give one of them (null takes away what a recipe has)")
        if self.path is None and self.url is None and self.prefix is None:
            raise ValueError("needs path, url, or a prefix (then the policy teaches itself)")
        for name in ("model", "seconds", "top_k"):
            if self.url is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without url, got {getattr(self, name)!r}")
        return self


class PreferenceSpec(Settings):
    """Training on preference pairs in place of rewards: DPO with any divergence."""

    divergence: str | dict[str, Any] = Field(
        default="reverse_kl", description="a name of `mirrorpo list divergences`, or a mapping with name and options"
    )
    beta: float = Field(default=0.1, gt=0.0, le=1e6, description="the divergence's coefficient")
    pairs: str | None = Field(
        default=None, min_length=1, description="JSON lines with prompt, chosen, rejected; empty: the task's own pairs"
    )

    @model_validator(mode="after")
    def _rewards(self, info: ValidationInfo) -> PreferenceSpec:
        if info.context != KEYS_ALONE:
            from mirrorpo.losses.preference import ImplicitReward  # loads torch

            ImplicitReward.of(self.divergence)
            return self
        with suppress(UnknownPart):
            divergence_facts(self.divergence)
        return self


# Keys of train that say how completions are drawn and used.
_OF_ROLLOUTS = (
    *("group_size", "updates_per_batch", "passes_per_batch", "temperature", "top_p", "mask_truncated", "on_nonfinite"),
    *("max_nonfinite", "fast", "rollouts", "kernels", "token_budget", "log_completions_every", "use_vllm", "vllm"),
)


def check_teacher(objective: Parts | None, teacher: TeacherSpec | None) -> None:
    """Raises ``ValueError`` for an objective that needs a teacher and has none, or one that sends too little.

    A teacher that the objective does not look at is no error: an arm of a study may leave its base's out.
    """
    if objective is None or "teacher" not in objective.needs:
        return
    if teacher is None:
        raise ValueError(
            f"objective {objective.name!r} has a penalty or a region around a teacher: give teacher, a mapping with "
            "path, url or prefix"
        )
    dense = [p for p in objective.penalties if p.anchor == "teacher" and "exact" in (p.estimator, p.baseline)]
    if teacher.url and (dense or any(r.anchor == "teacher" and r.region.needs_logits for r in objective.rules)):
        raise ValueError(
            "a server sends top_k entries, not the teacher's whole distribution: estimator 'exact', baseline 'exact' "
            "and regions over the vocabulary need teacher.path. Legal: sampled, weighted, score, top_k"
        )


class Recipe(Settings):
    """A whole experiment."""

    task: TaskSettings
    model: ModelSpec = ModelSpec()
    objective: ObjectiveSpec = Field(default_factory=lambda: ObjectiveSpec.model_construct(preset="dr_grpo"))
    reference: ReferenceSpec = ReferenceSpec()
    teacher: TeacherSpec | None = None
    preference: PreferenceSpec | None = None
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()

    @model_validator(mode="after")
    def _of_pairs_alone(self) -> Recipe:
        if self.preference is None:
            return self
        if (self.objective.spec(), self.reference, self.teacher) != ({"preset": "dr_grpo"}, ReferenceSpec(), None):
            raise ValueError("objective, reference and teacher have no effect with preference, whose keys replace them")
        for name in _OF_ROLLOUTS:
            if getattr(self.train, name) != TrainSpec.model_fields[name].default:
                raise ValueError(f"train.{name} has no effect with preference: no completion is drawn in training")
        return self

    @model_validator(mode="after")
    def _reference_exists(self, info: ValidationInfo) -> Recipe:
        if self.reference.kind == "kept":
            return self
        parts = self.objective.parts(info.context)
        if parts is not None and not parts.needs_reference:
            raise ValueError(
                f"reference.kind {self.reference.kind!r} has no effect: the objective has no penalty "
                "(objective.divergence and objective.coefficient)"
            )
        if self.model.lora is not None:
            raise ValueError("reference.kind must be 'kept' with model.lora: the reference is the adapter switched off")
        return self

    @model_validator(mode="after")
    def _evaluations_fall_due(self) -> Recipe:
        every, steps = self.eval.every, self.train.steps
        if every and not self.eval.problems:
            raise ValueError(f"eval.every has no effect with eval.problems 0: legal is 0, got {every}")
        if every > steps:
            raise ValueError(
                f"eval.every has no effect: the run has {steps} steps (train.steps). Legal: 0 to {steps}, got {every}"
            )
        return self

    @model_validator(mode="after")
    def _teacher_exists(self, info: ValidationInfo) -> Recipe:
        check_teacher(self.objective.parts(info.context), self.teacher)
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


RecipeKind = TypeVar("RecipeKind", bound=Recipe)


def load_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    kind: type[RecipeKind] = Recipe,
    early: Callable[[Recipe], None] | None = None,
) -> RecipeKind:
    """A recipe file with ``key=value`` overrides.

    Args:
        path: the YAML file.
        overrides: such as ``train.steps=5``; the value is read as YAML. ``base=NAME`` replaces the recipe's base.
        kind: a recipe with further groups of keys.
        early: further checks, of the recipe whose keys, types and names are right; the objective, which loads torch, is
            built after them.

    Raises:
        InputError: no such file or base, not YAML, an unknown key (the nearest valid one is named), a value out of
            range.
    """
    data = load(path)
    assignments = [parse_override(override) for override in overrides]
    if isinstance(data, dict):
        data |= {key: value for key, value in assignments if key == "base"}
    rest = [(key, value) for key, value in assignments if key != "base"]
    return _checked(with_bases(data, path), rest, str(path), kind, early=early)


def recipe_from(
    data: Any,
    overrides: Sequence[str] = (),
    where: str = "recipe",
    kind: type[RecipeKind] = Recipe,
    blame: Mapping[str, str] | None = None,
    early: Callable[[Recipe], None] | None = None,
) -> RecipeKind:
    """A recipe from plain data without a base; see ``load_recipe``. ``blame``: keys that were overridden before."""
    return _checked(data, [parse_override(override) for override in overrides], where, kind, blame, early)


def check_keys(data: Any, where: str, blame: Mapping[str, str]) -> None:
    """The first half of ``recipe_from``: keys, types and names, without torch."""
    validated(_with_task(Recipe, data.get("task"), where), data, where, blame, KEYS_ALONE)


def _checked(
    data: Any,
    assignments: Sequence[tuple[str, Any]],
    where: str,
    kind: type[RecipeKind],
    blame: Mapping[str, str] | None = None,
    early: Callable[[Recipe], None] | None = None,
) -> RecipeKind:
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a mapping with the keys {', '.join(kind.model_fields)}")
    data = overridden(data, assignments) if assignments else data
    typed = {key: key for key, _ in assignments} if blame is None else blame
    kind = _with_task(kind, data.get("task"), where)
    by_keys = validated(kind, data, where, typed, KEYS_ALONE)
    if early is not None:
        early(by_keys)
    return validated(kind, data, where, typed)


def _with_task(kind: type[RecipeKind], task: Any, where: str) -> type[RecipeKind]:
    """The recipe's class; with the settings of a task that another package brings, if the recipe names one."""
    name = task.get("name") if isinstance(task, dict) else None
    if not isinstance(name, str) or name in TASKS:
        return kind
    try:
        entry = find_task(name)
    except (ValueError, ImportError) as error:
        raise InputError(f"{where}: task.name: {error}") from error
    if entry is None:
        return kind
    return create_model(kind.__name__, __base__=kind, __module__=kind.__module__, task=(entry.settings, ...))
