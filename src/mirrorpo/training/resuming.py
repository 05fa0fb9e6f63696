"""Training that resumes bit for bit: what a checkpoint holds beyond that of TRL, and how it is restored.

transformers keeps weights, optimiser, scheduler and random states. A step of TRL also reads completions that were
generated for several optimiser steps, counters that say which of them is due, the order of the data in later epochs,
and sums of metrics that are not logged yet; the penalty has a factor, and a reference may be averaged. They are kept
here, without pickle, in a checkpoint that is written beside, checksummed and renamed
(``mirrorpo.training.checkpoints``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.files import write_text_atomic
from mirrorpo.losses.coefficient import Control
from mirrorpo.training.checkpoints import (
    MANIFEST_FILE,
    CheckpointError,
    all_checkpoints,
    clean,
    fault_of,
    foreign_state,
    newest_whole,
    publish,
    read_progress,
    readable,
    rotate,
    seal,
    step_of,
    write_progress,
    writing_folder,
)

# torch.save's writer has no error of its own for a disk that refuses, only the place in its code.
_TORCH_SAVE = "inline_container"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


class _Restore(TrainerCallback):
    """transformers sets its sums to zero after it has loaded a checkpoint: this is the first seam after that."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore()


class Resumable(Trainer if TYPE_CHECKING else object):
    """Checkpoints of one of TRL's trainers that are complete, verified and hold tensors and plain data alone."""

    model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
    _metrics: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: Path | None = None
        self._to_push: str | None = None
        self._resumed: Path | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Restore(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint with a fault is refused, and ``True`` takes the newest one without.

        Raises:
            CheckpointError: the checkpoint is damaged, or its weights are pickled.
        """
        root = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            found = newest_whole(root).path
            # A folder of checkpoints that TRL's own trainer wrote has no manifests.
            written = any((path / MANIFEST_FILE).exists() for path in all_checkpoints(root))
            if written and found is None:
                raise CheckpointError(f"{root}: every checkpoint is damaged ({fault_of(all_checkpoints(root)[0])})")
            newest = found or get_last_checkpoint(str(root))
            resume_from_checkpoint = True if newest is None else str(newest)
        if not isinstance(resume_from_checkpoint, str):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        refuse_pickle(Path(resume_from_checkpoint))
        with readable(Path(resume_from_checkpoint)) as self._resumed:
            return super().train(str(self._resumed), *args, **kwargs)

    def load_weights(self, checkpoint: Path) -> None:
        """Takes the weights of a finished training, which has no step left."""
        refuse_pickle(checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = step_of(checkpoint)

    # Writing

    def _keep_what_is_trained(self) -> None:
        """Writes a checkpoint of the last whole step, if there is none."""
        written = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step > 0 and not written.exists():
            self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if trial is not None:
            super()._save_checkpoint(model, trial)  # a search has a folder for each trial, and is not resumed
            return
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        self._writing = writing_folder(root, step)
        target = root / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            self._write_checkpoint(model, self._writing / target.name, target)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _TORCH_SAVE not in str(error):
                raise
            if self.args.should_save:
                clean(root)
            whole = newest_whole(root).path
            reason = "a write failed" if isinstance(error, RuntimeError) else " ".join(str(error).split())
            raise CheckpointError(
                f"step {step}: the checkpoint cannot be written ({reason}); "
                + (f"the last good one is {whole}" if whole else "there is none before it")
            ) from error
        finally:
            self._writing = None
        if self._to_push is not None:
            super()._push_from_checkpoint(str(target))
            self._to_push = None

    def _write_checkpoint(self, model: Any, folder: Path, target: Path) -> None:
        if self.args.should_save:
            clean(target.parent)
            folder.mkdir(parents=True)
            self._save_more(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, None)
        if not self.args.save_only_model:
            write_progress(folder, self.accelerator.process_index, self._progress())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best(folder, target.parent)
            seal(folder, self.state.global_step)
            publish(folder, target)
            clean(target.parent)
            best = self.state.best_model_checkpoint
            if self.args.save_total_limit is not None:
                rotate(target.parent, self.args.save_total_limit, [target, *([Path(best)] if best else [])])
        self.accelerator.wait_for_everyone()

    def _name_best(self, folder: Path, root: Path) -> None:
        """transformers looks for the best checkpoint beside this one, which has not its final place yet."""
        if self.state.best_global_step:
            best = root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save_more(self, folder: Path) -> None:
        """For subclasses: what else the main process keeps."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._to_push = checkpoint_folder  # once it has its name

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; the arguments are kept as JSON, not as a pickle."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _progress(self) -> dict[str, Any]:
        return {
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    # Reading

    def restore(self) -> None:
        """Takes up counters and sums where the checkpoint left them."""
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is None:
            return
        self._restore_more(checkpoint)
        kept = read_progress(checkpoint, self.accelerator.process_index, self.args.device)
        if kept is not None:
            self._take_up(kept)

    def _restore_more(self, checkpoint: Path) -> None:
        """For subclasses: reads what ``_save_more`` wrote."""

    def _take_up(self, kept: dict[str, Any]) -> None:
        for mode, values in kept["metrics"].items():
            self._metrics[mode].clear()
            self._metrics[mode].update(values)
        self._tr_loss = kept["loss"]
        self._total_loss_scalar = kept["total_loss"]
        self._globalstep_last_logged = kept["last_logged"]


class ResumableTrainer(Resumable, GRPOTrainer):
    """``trl.GRPOTrainer`` that resumes in the middle of a rollout batch, and in the order of its data."""

    args: GRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _sampler: Any = None

    def _progress(self) -> dict[str, Any]:
        due = self._step % ((self.args.steps_per_generation or 1) * self.num_iterations)
        return {
            **super()._progress(),
            "step": self._step,
            "buffer": self._buffered_inputs if due else None,  # else the next step generates anew
            "step_time": self._current_train_step_time,
        }

    def _get_train_sampler(self, dataset: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def restore(self) -> None:
        """Takes up counters, buffer and sums where the checkpoint left them, and the order of the data."""
        if self._resumed is not None and self._sampler is not None and self._sampler.shuffle:
            # Its generator is seeded once: the order of a later epoch comes after those of all earlier ones.
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        super().restore()

    def _take_up(self, kept: dict[str, Any]) -> None:
        super()._take_up(kept)
        self._step = kept["step"]
        self._buffered_inputs = kept["buffer"]
        self._current_train_step_time = kept["step_time"]


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has the optimiser's state: transformers' own, or that of a sharded run."""
    return any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))


def resumed_lines(checkpoint: Path, before: str, now: str) -> list[str]:
    """What a resumed run takes up, and whether its objective is another one than that of the checkpoint."""
    if holds_optimizer(checkpoint):
        restored = "weights, optimiser, learning-rate schedule, random states and penalty coefficient"
    else:
        restored = "weights and penalty coefficient; it holds no optimiser, whose moments start at 0"
    lines = [f"resumed from {checkpoint.name}: {restored}"]
    if before not in ("", now):
        lines.append(f"resumed with another objective: the checkpoint's is {before!r}, this run's is {now!r}")
    return lines


def refuse_pickle(checkpoint: Path) -> None:
    """Raises ``CheckpointError`` if a checkpoint is damaged or holds pickled weights or objects."""
    if (checkpoint / MANIFEST_FILE).exists():
        fault = fault_of(checkpoint)
        if fault is not None:
            raise CheckpointError(f"{checkpoint} is damaged: {fault}")
    for name in _PICKLES:
        if (checkpoint / name).exists():
            raise CheckpointError(f"{checkpoint / name} is a pickle, which may run any code: give safetensors")
    name = foreign_state(checkpoint)
    if name is not None:
        raise CheckpointError(f"{checkpoint / name} holds more than tensors and plain data, and was not read")


_STATE_FILE = "penalty_state.json"
_REFERENCE_FILE = "reference.safetensors"


class PenaltyState:
    """The factor on the penalty's coefficients, moved once per optimiser step.

    Args:
        control: how it moves; None keeps it at 1.

    Attributes:
        factor: the current factor.
        observed: the divergences of this optimiser step's micro-batches so far.
    """

    def __init__(self, control: Control | None) -> None:
        self.control = control
        self.factor = 1.0 if control is None else control.factor_at(0.0)
        self.observed: list[float] = []

    def observe(self, divergence: float) -> None:
        """A micro-batch's divergence, the same on every rank."""
        self.observed.append(divergence)

    def step(self, progress: float) -> None:
        """The end of an optimiser step, at a share of the run in (0, 1]."""
        observed, self.observed = self.observed, []
        if self.control is None:
            return
        if self.control.kind == "adaptive":
            if observed:
                self.factor = self.control.updated(self.factor, sum(observed) / len(observed))
        else:
            self.factor = self.control.factor_at(progress)


def save_state(folder: Path, state: PenaltyState, averaged_reference: nn.Module | None, objective: str = "") -> None:
    """Writes into a checkpoint the factor, what it waits for, the objective in words, and a changing reference."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"factor": state.factor, "observed": state.observed, "objective": objective}
    write_text_atomic(folder / _STATE_FILE, json.dumps(kept) + "\n")
    if averaged_reference is not None:
        tensors = {name: p.detach().contiguous() for name, p in averaged_reference.named_parameters()}
        save_file(tensors, folder / _REFERENCE_FILE)


def load_state(folder: Path, state: PenaltyState, averaged_reference: nn.Module | None) -> str:
    """Reads back what ``save_state`` wrote; raises if the file of a reference that changes is missing.

    Returns:
        The objective in words; empty for a checkpoint that does not hold it.
    """
    path = folder / _STATE_FILE
    objective = ""
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        state.factor, state.observed = float(kept["factor"]), [float(value) for value in kept["observed"]]
        objective = str(kept.get("objective", ""))
    if averaged_reference is not None:
        tensors = load_file(folder / _REFERENCE_FILE)
        for name, parameter in averaged_reference.named_parameters():
            parameter.data.copy_(tensors[name])
    return objective


__all__ = [
    "PenaltyState",
    "Resumable",
    "ResumableTrainer",
    "holds_optimizer",
    "load_state",
    "refuse_pickle",
    "save_state",
    "resumed_lines",
]
