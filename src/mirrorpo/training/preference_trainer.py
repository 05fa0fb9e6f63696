"""TRL's DPO trainer with any divergence of this library, and the training of a recipe with the group ``preference``.

TRL has four f-divergences (``f_divergence_type``); here ``divergence`` takes every convex one, and the loss is
``mirrorpo.preference_loss``. Data, reference model, adapters, metrics and everything else are TRL's.

==============================================  ================================================================
TRL                                             the same loss here
==============================================  ================================================================
``reverse_kl`` (DPO)                            ``divergence="reverse_kl"``
``forward_kl``                                  ``divergence="forward_kl"``
``alpha_divergence``, coefficient a             ``divergence={"name": "alpha", "alpha": a}``
``js_divergence``, beta b                       ``divergence="js"``, beta 2 b: TRL leaves out the 1/2 of the mean
==============================================  ================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch import Tensor, nn
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from mirrorpo.config.train import Recipe
from mirrorpo.errors import InputError, check_number
from mirrorpo.evaluation.sampling import chat
from mirrorpo.losses.preference import ImplicitReward, loss_of
from mirrorpo.models.folder import loading
from mirrorpo.models.threads import fit_threads
from mirrorpo.tasks import Row
from mirrorpo.tasks.jsonl import numbered_rows
from mirrorpo.tasks.task import PairedTask
from mirrorpo.training.distributed import world_size
from mirrorpo.training.nonfinite import NonFiniteError
from mirrorpo.training.resuming import Resumable
from mirrorpo.training.setup import Prepared, lora_config

# The private methods of TRL's trainer that are overridden, with their parameters; a test compares them with TRL's.
DPO_SEAMS = {
    "_compute_loss": ("model", "inputs", "return_outputs"),
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
}
# TRL's settings that have no effect on this loss, with the value that says nothing and what to use instead.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "f_divergence_type": ("reverse_kl", "divergence names the divergence"),
    "f_alpha_divergence_coef": (0.5, "use divergence={'name': 'alpha', 'alpha': ...}"),
    "loss_type": (["sigmoid"], "legal: 'sigmoid'"),
    "loss_weights": (None, "legal: None"),
    "ld_alpha": (None, "legal: None"),
    "label_smoothing": (0.0, "legal: 0.0"),
    "use_weighting": (False, "legal: False"),
    "discopop_tau": (0.05, "it belongs to TRL's loss_type 'discopop'"),
}


@dataclass
class MirrorDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with one more field.

    Args:
        divergence: a divergence's name (``mirrorpo list divergences``), or a mapping with ``name`` and its options.
            ``beta`` is its coefficient. None (the default): TRL's own loss, whatever its other fields say.

    Raises:
        ValueError: an unknown divergence or one that is not convex, beta <= 0, a setting of TRL that has no effect.

    Example:
        >>> from mirrorpo.training import MirrorDPOConfig
        >>> quiet = {"report_to": "none", "bf16": False, "activation_checkpointing": False}
        >>> config = MirrorDPOConfig("out", divergence={"name": "alpha", "alpha": 0.5}, **quiet)
        >>> config.beta
        0.1
    """

    divergence: str | dict | None = field(
        default=None,
        metadata={"help": "Divergence, by name or as a mapping with 'name' and options; None: TRL's own loss."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is None:
            if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
                raise ValueError(
                    f"f_alpha_divergence_coef={self.f_alpha_divergence_coef!r} has no effect with "
                    f"f_divergence_type={self.f_divergence_type!r}: it belongs to 'alpha_divergence'"
                )
            return
        if not isinstance(self.divergence, str | dict):
            raise ValueError(
                f"divergence must be a name or a mapping with 'name', got {type(self.divergence).__name__}; a function "
                "is named by 'module:attribute'"
            )
        check_number("beta", self.beta, 0.0, open_low=True)
        for name, (neutral, instead) in _WITHOUT_EFFECT.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} has no effect with divergence={self.divergence!r}: {instead}")
        ImplicitReward.of(self.divergence)


class MirrorDPOTrainer(Resumable, DPOTrainer):
    """TRL's ``DPOTrainer`` whose loss is ``mirrorpo.preference_loss`` with the divergence of its config.

    Arguments as TRL's; ``args`` is a ``MirrorDPOConfig``. The metrics ``rewards/*`` are those of the divergence,
    beta s(y). Its checkpoints are verified and hold no pickle; a resumed training ends at the bits of an unbroken one.

    Warns:
        UserWarning: the divergence cannot identify the reward, or its score is flat or too steep on sequences.

    Raises:
        ValueError: ``args`` is not a ``MirrorDPOConfig``.
        NonFiniteError: a loss or a gradient is NaN or infinite.
    """

    args: MirrorDPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: Any = None, ref_model: Any = None, args: MirrorDPOConfig | None = None, **kwargs: Any):
        if not isinstance(args, MirrorDPOConfig):
            raise ValueError(f"args must be a MirrorDPOConfig, got {type(args).__name__}")
        self._reward = None if args.divergence is None else ImplicitReward.of(args.divergence)
        if self._reward is not None:
            self._reward.warn(stacklevel=2)
        super().__init__(model, ref_model, args=args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._reward is None:
            return super()._compute_loss(model, inputs, return_outputs)
        # TRL computes log-probabilities, metrics and its own loss in one method. What the models return on the way is
        # read, and its loss, which nothing depends on, is left.
        with ExitStack() as stack:
            policy = stack.enter_context(_outputs(model))
            anchor: Any = self.model if self.ref_model is None else self.ref_model
            reference = stack.enter_context(_outputs(anchor))
            given = super()._compute_loss(model, inputs, return_outputs)
        width = inputs["completion_mask"].shape[1] - 1

        def sums(output: Any) -> tuple[Tensor, Tensor]:
            chosen, rejected = output.log_probs[:, -width:].sum(dim=1).chunk(2)
            return chosen, rejected

        chosen, rejected = sums(policy[0])
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:  # an adapter's reference is the model itself, called again without it
            ref_chosen, ref_rejected = sums(reference[1 if self.ref_model is None else 0])
        loss = loss_of(self._reward, chosen, rejected, ref_chosen, ref_rejected, self.beta)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy[0].aux_loss
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"step {self.state.global_step + 1}: the loss is {loss.item()}")
        with torch.no_grad():
            self._log_rewards(*(self.beta * self._reward(*x) for x in ((chosen, ref_chosen), (rejected, ref_rejected))))
        return (loss, given[1]) if return_outputs else loss

    def objective_line(self) -> str:
        """What is optimised, in one line."""
        if self._reward is None:
            return f"TRL's preference loss: {', '.join(self.args.loss_type)}"
        return f"preference loss: divergence {self._reward.divergence.name}, beta {self.beta:g}"

    def reference_description(self) -> str:
        """What the policy is compared with, in a few words."""
        return "the policy with its adapter off" if self.ref_model is None else "a frozen copy of the policy's start"

    def _log_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        """Puts the rewards of this divergence in the place of TRL's, beta times the log-ratio."""
        values = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        values["accuracies"] = (chosen > rejected).double()
        model: Any = self.model
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in values.items():
            gathered: Any = self.accelerator.gather(value)
            metrics[f"rewards/{name}"][-1] = gathered.mean().item()


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns while the context is open, call by call."""
    found: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


class Preferences:
    """What a recipe's group ``preference`` changes in a run: its rows are pairs, its trainer a ``MirrorDPOTrainer``."""

    def prepared(self, prepared: Prepared) -> Prepared:
        """Takes the pairs as training rows.

        Raises:
            InputError: the task has no pairs, the file cannot be read, or holds test problems or too few pairs.
        """
        recipe = prepared.recipe
        assert recipe.preference is not None
        pairs = _pairs_of(prepared) if recipe.preference.pairs is None else _pairs_in(Path(recipe.preference.pairs))
        tested = {str(row["prompt"]) for row in prepared.test_rows}
        known = sum(str(row["prompt"]) in tested for row in pairs)
        if known:
            raise InputError(f"preference.pairs: {known} of its prompts are test problems of task {prepared.task.name}")
        if len(pairs) < recipe.train.prompts_per_step:
            raise InputError(
                f"train.prompts_per_step: {recipe.train.prompts_per_step} pairs a step, but there are {len(pairs)}"
            )
        if recipe.train.prompts_per_step % world_size():
            raise InputError(
                f"train.prompts_per_step: must divide by the {world_size()} processes, got "
                f"{recipe.train.prompts_per_step}"
            )
        return replace(prepared, train_rows=pairs)

    def trainer(self, prepared: Prepared, folder: Path, callbacks: list[Any]) -> MirrorDPOTrainer:
        """The trainer of the recipe."""
        recipe = prepared.recipe
        disable_progress_bar()
        trainer = MirrorDPOTrainer(
            prepared.model_path,
            args=_config(prepared, folder),
            train_dataset=Dataset.from_list([_as_trl_reads(prepared, row) for row in prepared.train_rows]),
            processing_class=prepared.tokenizer,
            peft_config=lora_config(recipe),
            callbacks=callbacks,
        )
        fit_threads(trainer.model)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def finish(self, trainer: Any, folder: Any, summary: dict[str, Any]) -> None:
        """Adds what was trained on."""
        summary["pairs"] = len(trainer.train_dataset)


def _pairs_of(prepared: Prepared) -> list[Row]:
    task = prepared.task
    if not isinstance(task, PairedTask):
        raise InputError(
            f"preference.pairs: task {task.name} has no pairs of its own: give a file of JSON lines with prompt, "
            "chosen and rejected"
        )
    try:
        made = [task.pair(row, number) for number, row in enumerate(prepared.train_rows)]
    except ValueError as error:
        raise InputError(f"task: {error}") from error
    named = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in made]
    return [{**row, **pair} for row, pair in zip(prepared.train_rows, named, strict=True)]


def _pairs_in(path: Path) -> list[Row]:
    """The pairs of a file; every field is a text that is not empty."""
    try:
        good, bad = (numbered_rows(path, "prompt", field) for field in ("chosen", "rejected"))
    except (ValueError, OSError) as error:
        raise InputError(f"preference.pairs: {error}") from error
    rows = []
    for (number, one), (_, other) in zip(good, bad, strict=True):
        if one["answer"] == other["answer"]:
            raise InputError(f"preference.pairs: {path}: line {number}: chosen and rejected are the same text")
        if one["answer"].startswith(one["prompt"]) and other["answer"].startswith(one["prompt"]):
            raise InputError(
                f"preference.pairs: {path}: line {number}: chosen and rejected begin with the prompt; give what "
                "follows it alone"
            )
        rows.append({"prompt": one["prompt"], "chosen": one["answer"], "rejected": other["answer"]})
    return rows


def _as_trl_reads(prepared: Prepared, row: Row) -> dict[str, Any]:
    """A pair as messages, or as text where the tokenizer has no chat template."""
    prompt = chat(prepared.tokenizer, row)
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    said = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    options = prepared.recipe.model.chat_template
    return {"prompt": prompt, **said, **({"chat_template_kwargs": dict(options)} if options else {})}


def _config(prepared: Prepared, folder: Path) -> MirrorDPOConfig:
    recipe: Recipe = prepared.recipe
    train, preference = recipe.train, recipe.preference
    assert preference is not None
    update = train.prompts_per_step // world_size()
    micro = train.micro_batch_size or update
    if update % micro:
        raise InputError(f"train.micro_batch_size: must divide the {update} pairs per process, got {micro}")
    try:
        return MirrorDPOConfig(
            str(folder),
            divergence=preference.divergence,
            beta=preference.beta,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=update // micro,
            max_length=None,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=round(train.warmup_ratio * train.steps),
            weight_decay=train.weight_decay,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            max_grad_norm=train.max_grad_norm,
            max_steps=train.steps,
            logging_steps=1,
            save_strategy="steps",
            save_steps=train.save_every,
            save_total_limit=train.keep,
            seed=train.seed,
            bf16=train.precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=train.gradient_checkpointing,
            dataloader_drop_last=True,
            model_init_kwargs={
                "dtype": recipe.model.dtype,
                **loading(recipe.model.trust_remote_code),
                **dict.fromkeys(prepared.noise, 0.0),
            },
            report_to=[tracker for tracker in train.report_to if tracker != "tensorboard"] or "none",
            run_name=train.run_name,
            disable_tqdm=True,
            **train.trl,
        )
    except (ValueError, TypeError) as error:
        where = "train.trl" if train.trl else "preference"
        raise InputError(f"{where}: {' '.join(str(error).split())[:300]}") from error


__all__ = ["DPO_SEAMS", "MirrorDPOConfig", "MirrorDPOTrainer", "Preferences"]
