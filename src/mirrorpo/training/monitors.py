"""What a run tells people: progress bar, warnings of a run that does nothing, and the model card.

The callbacks here also stop a run on a signal, with a checkpoint.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from mirrorpo.errors import Interrupted
from mirrorpo.interrupts import SIGNALS
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import PRESETS
from mirrorpo.models.generation import causal_part, say_what_is_ignored
from mirrorpo.models.thresholds import say_padding
from mirrorpo.progress import EVERY, so_far
from mirrorpo.training.distributed import UNSHARDED, unsharded_notice
from mirrorpo.training.model_adapter import say_noise
from mirrorpo.training.records import MetricsWriter
from mirrorpo.wording import duration, say

logger = logging.get_logger(__name__)


def say_at_start(accelerator: Any, model: nn.Module) -> None:
    """What a user must know of the model and its layout before it trains; a line each, once for all ranks."""
    policy = accelerator.unwrap_model(model)
    say_what_is_ignored(policy)
    if not accelerator.is_main_process:
        return
    if notice := unsharded_notice(accelerator.distributed_type.value):
        logger.warning(notice)
    if accelerator.distributed_type in UNSHARDED:
        say_padding(causal_part(policy))
        say_noise(causal_part(policy))


class ProgressBar(TrainerCallback):
    """A bar with reward, divergence, clip share, length and time left; where there is no terminal a line at every tenth
    of the run and every half minute, also within a step.

    Args:
        console: where to draw (stderr, so that stdout stays machine-readable).
        steps: of the whole run.
        writer: its ``last`` line is shown.
    """

    def __init__(self, console: Console, steps: int, writer: MetricsWriter) -> None:
        self.console, self.steps, self.writer = console, steps, writer
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self.bar: Any = None
        self.first, self.began, self.told = 0, 0.0, 0.0  # step and time of the start, time of the last line
        self.silent = False  # while something else tells how far it is
        self._step, self._over, self._speaker = 0, threading.Event(), threading.Thread(target=self._speak, daemon=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.first = self._step = done = state.global_step // self.writer.updates_per_step
            self.began = self.told = time.monotonic()
            self.bar = self.progress.add_task("training", total=self.steps, completed=done, numbers="")
            self.progress.start()
            if not self.console.is_terminal:
                self._speaker.start()

    def _speak(self) -> None:
        while not self._over.wait(EVERY / 10):
            now = time.monotonic()
            if self.silent:
                self.told = now
            elif now - self.told >= EVERY:
                self.told = now
                done = self._step - self.first
                say(self.console, f"training: {so_far(self._step, self.steps, done, now - self.began)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        line = self.writer.last
        self._step = step = int(line["step"] or 0)
        self.progress.update(self.bar, completed=step, numbers=numbers_of(line))
        now = time.monotonic()
        due = step % max(1, self.steps // 10) == 0 or step == self.steps or now - self.told >= EVERY
        if not self.console.is_terminal and due:
            self.told = now
            seconds = (self.steps - step) * (now - self.began) / max(1, step - self.first)
            left = f"  about {duration(seconds)} left" if step < self.steps else ""
            say(self.console, f"step {step}/{self.steps}  {numbers_of(line)}{left}")

    def note(self, text: str) -> None:
        """Shows a text in place of the numbers."""
        if self.bar is not None:
            self.progress.update(self.bar, numbers=text)

    def stop(self) -> None:
        """Ends the drawing; called on every way out of the run."""
        if self.bar is not None:
            self.progress.stop()
            self.bar = None
            self._over.set()
            if self._speaker.is_alive():
                self._speaker.join()


def numbers_of(line: dict[str, float | int | None]) -> str:
    """The few numbers worth watching."""
    parts = []
    if line.get("reward") is not None:
        parts.append(f"reward {line['reward']:.3f}")
    if line.get("rewards/margins") is not None:
        parts.append(f"loss {line['loss']:.3f}  margin {line['rewards/margins']:.3f}")
    names = [name for name in line if name.startswith("divergence/")]
    if names and line[names[0]] is not None:
        parts.append(f"{names[0].split('/')[1]} {line[names[0]]:.4f}")
    low, high = line.get("clip/low/frac"), line.get("clip/high/frac")
    if low is not None and high is not None:
        parts.append(f"clipped {100 * (low + high):.1f} %")
    if line.get("completions/mean_length") is not None:
        parts.append(f"length {line['completions/mean_length']:.1f}")
    return "  ".join(parts)


# Steps in a row after which a run without rewards, or without differences between them, is worth a line.
PATIENCE = 5
_NEARLY_ALL = 0.95
# The penalty's share of the gradient below which float32 (and Adam's division) cannot see it.
_NO_EFFECT = 1e-7
# Reverse KL that two float32 evaluations of one policy show: half the square of a log-ratio of 1e-6 or so.
ROUNDING = 1e-11


class Watch(TrainerCallback):
    """Says once what a run should not keep to itself.

    Args:
        objective: what is trained.
        reference: the frozen model, None if the reference is the policy with its adapter off.
        say: prints one line; the default is a warning of the library's logger.
    """

    def __init__(
        self, objective: Objective, reference: nn.Module | None, say: Callable[[str], None] | None = None
    ) -> None:
        self.objective, self.reference = objective, reference
        self.say = say or logger.warning
        self.said: set[str] = set()
        self._since: dict[str, int] = {}
        self._measured: tuple[float, float] | None = None

    def _once(self, what: str, line: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.say(f"warning: {line}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._look_at_rewards(logs)
        self._look_at_penalty()
        if (logs.get("grad_norm") or 0.0) > 0.0 and (logs.get("learning_rate") or 0.0) > 0.0:
            self._look_at_reference(model, args)

    def measured(self, step: int, share: float, divergence: float) -> None:
        """The penalty's share of the gradient in an optimiser step, and the divergence there.

        Args:
            step: optimiser steps before it; at 0 the policy is its reference, and the share says nothing.
            share: of the gradient's norm.
            divergence: the penalty's mean, or reverse KL where that is known.
        """
        self._measured = (share, divergence) if step > 0 else None

    def skipped(self) -> None:
        """An optimiser step was left out: no advantage, and a policy that equals its reference."""
        self._once(
            "skipped",
            "every advantage of the batch is 0 and the policy equals its reference: the update is left out, its "
            "gradient would be rounding noise, which Adam scales to full steps",
        )

    def _lasts(self, what: str, holds: bool) -> bool:
        """Whether something has held in ``PATIENCE`` logs of rewards."""
        if not holds:
            self._since.pop(what, None)
            return False
        self._since[what] = self._since.get(what, 0) + 1
        return self._since[what] >= PATIENCE

    def _look_at_rewards(self, logs: dict[str, Any]) -> None:
        if "unscored/frac" not in logs:
            return  # a later update on the same completions
        unscored = self._lasts("unscored", logs["unscored/frac"] >= _NEARLY_ALL)
        equal = self._lasts("equal", (logs["frac_reward_zero_std"] or 0.0) >= _NEARLY_ALL)
        zero = self._lasts("zero", logs["reward"] == 0.0 and not logs["reward_std"])
        if unscored:
            self._once(
                "unscored",
                f"for {PATIENCE} steps hardly a completion had a reward: look at the reward's reasons, and at the data",
            )
        elif zero:
            self._once(
                "equal",
                f"for {PATIENCE} steps every reward was 0: nothing is learned; look at completions and at the reward's "
                "reasons (format, max_completion_length), take easier problems or a larger group_size",
            )
        elif equal:
            self._once(
                "equal",
                f"for {PATIENCE} steps the completions of nearly every group had one and the same reward: nothing is "
                "learned from them; take easier or harder problems, a larger group_size or a higher temperature",
            )

    def _look_at_penalty(self) -> None:
        found, self._measured = self._measured, None
        if found is None or self.objective.placement == "reward":
            return
        share, divergence = found
        names = " and ".join(p.divergence.name for p in self.objective.penalties)
        if share == 0.0 or (share < _NO_EFFECT and divergence < ROUNDING):
            self._once(
                "no gradient",
                f"the penalty {names} has no gradient: the policy still is its reference, or the divergence is flat "
                "there. Choose another estimator or divergence, or leave the penalty out",
            )
        elif share < _NO_EFFECT:
            self._once(
                "no effect",
                f"the penalty {names} is {share:.0e} of the gradient: its coefficient can have no effect. Raise "
                "objective.coefficient, or leave the penalty out",
            )

    def _look_at_reference(self, model: Any, args: Any) -> None:
        """After a step that moved something: a policy that equals its reference still has not moved."""
        if "reference" in self.said or model is None or not self.objective.needs_reference or args.sync_ref_model:
            return
        self.said.add("reference")
        if _same_as_reference(model, self.reference):
            self.said.discard("reference")
            self._once(
                "reference",
                "after the first optimiser step the policy still equals its reference: its steps are too small for "
                "its precision (raise the learning rate, or train.precision with model.dtype float32 weights), or "
                "the reference is the policy itself",
            )


def _same_as_reference(policy: nn.Module, reference: nn.Module | None) -> bool:
    if reference is None:  # an adapter: the policy is its reference while the second factors are 0
        factors = [p for name, p in policy.named_parameters() if "lora_B" in name]
        return bool(factors) and not any(bool(p.detach().any()) for p in factors)
    theirs = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            return False  # wrapped or sharded: not comparable, so nothing is said
        if bool((other.detach() != parameter.detach()).any()):
            return False
    return True


class GracefulStop(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint at the next step's end; a context manager around the run.

    Args:
        say: prints one line for the user.
        how_to_resume: the command that goes on.

    Attributes:
        number: the signal that arrived, if one did.
    """

    def __init__(self, say: Callable[[str], None], how_to_resume: str) -> None:
        self.say, self.how_to_resume = say, how_to_resume
        self.number: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._in_step or self.number is not None:
            raise Interrupted(number, f"stopped by {signal.Signals(number).name}; continue with: {self.how_to_resume}")
        self.number = number
        self.say(f"{signal.Signals(number).name}: a checkpoint is written after this step; once more to stop at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anybody(args):
            control.should_save = True
            control.should_training_stop = True

    def _anybody(self, args: Any) -> bool:
        """Whether a process of the run was signalled: all must stop after the same step."""
        if args.world_size == 1:
            return self.number is not None
        flag = torch.tensor(self.number or 0, device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.number = int(flag) or None
        return self.number is not None

    def raise_if_stopped(self, step: int, steps: int) -> None:
        """To be called after the training: ends the run if a signal ended the training."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Interrupted(
                self.number, f"stopped by {name} after step {step} of {steps}; continue with: {self.how_to_resume}"
            )


_HEADING = "### Objective"


def paper_of(objective: Objective) -> dict[str, str]:
    """Title, arXiv number and BibTeX entry of the paper behind an objective; empty if it comes from no preset.

    Example:
        >>> from mirrorpo import objective
        >>> paper_of(objective("dapo"))["id"]
        '2503.14476'
    """
    preset = objective.spec["preset"] if objective.spec is not None else objective.name.removeprefix("TRL's ")
    if preset == "grpo" and objective.level == "sequence":
        preset = "gspo"
    if preset not in PRESETS:
        return {}
    title, _, rest = PRESETS[preset].source.partition(", arXiv ")
    number = re.match(r"\d{4}\.\d{4,5}", rest)
    if number is None:
        return {}
    year = f"20{number[0][:2]}"
    citation = (
        f"@misc{{arxiv{number[0].replace('.', '_')},\n"
        f"    title         = {{{{{title}}}}},\n"
        f"    year          = {year},\n"
        f"    eprint        = {{{number[0]}}},\n"
        f"    archivePrefix = {{arXiv}},\n"
        f"    url           = {{https://arxiv.org/abs/{number[0]}}},\n"
        f"}}"
    )
    return {"title": title, "id": number[0], "citation": citation}


def add_objective(card: Path, objective: Objective) -> None:
    """Adds the objective's description and the citation of this library to a model card that TRL has written."""
    text = card.read_text(encoding="utf-8")
    if _HEADING in text:
        return
    section = f"{_HEADING}\n\n`{objective.describe()}`\n\n"
    before, heading, after = text.partition("### Framework versions")
    citation = (
        "\n\nCite mirrorpo as:\n\n```bibtex\n@software{mirrorpo,\n"
        "    title   = {{mirrorpo: policy divergences for reinforcement learning with verifiable rewards}},\n"
        f"    version = {{{version('mirrorpo')}}},\n    license = {{Apache-2.0}},\n}}\n```\n"
    )
    after = after.replace("\n\n", f"\n\n- mirrorpo: {version('mirrorpo')}\n", 1)
    # TRL's template takes the trainer for the paper's method.
    after = after.replace("Cite mirrorpo as:", "Cite the objective as:", 1)
    before = before.replace(
        "trained with mirrorpo, a method introduced in", "trained with mirrorpo, by the objective of"
    )
    card.write_text(f"{before}{section}{heading}{after.rstrip()}{citation}", encoding="utf-8")


__all__ = [
    "GracefulStop",
    "ProgressBar",
    "Watch",
    "add_objective",
    "numbers_of",
    "paper_of",
    "say_at_start",
]
