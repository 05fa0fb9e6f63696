"""What is seen and kept of a run while it goes on: a progress bar, and a line of numbers for every step."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from mirrorpo.errors import RunError
from mirrorpo.escape import say
from mirrorpo.files import write_text_atomic
from mirrorpo.runs.folder import METRICS_FILE
from mirrorpo.runs.reader import recorded_steps

# Names under which TRL logs the same number a second time.
_TWICE = ("rewards/", "clip_ratio/", "train_", "num_tokens", "epoch", "total_flos")


def trim_metrics(run_dir: Path, last_step: int) -> float:
    """Drops the lines after ``last_step`` (and a torn last line), so that a resumed run writes no step twice.

    Returns:
        The seconds that the kept steps took.

    Raises:
        RunError: lines up to ``last_step`` are missing.
    """
    path, lines = run_dir / METRICS_FILE, recorded_steps(run_dir)
    if len(lines) < last_step:
        raise RunError(f"{path}: is missing steps before the checkpoint at step {last_step}")
    if path.exists():
        write_text_atomic(path, "".join(f"{line}\n" for line, _ in lines[:last_step]))
    return sum(seconds for _, seconds in lines[:last_step])


class MetricsWriter(TrainerCallback):
    """Appends one JSON line for every step (rollout batch) to ``metrics.jsonl``.

    Args:
        path: the file.
        updates_per_step: optimiser steps that make one step.
    """

    def __init__(self, path: Path, updates_per_step: int) -> None:
        self.path = path
        self.updates_per_step = updates_per_step
        self.last: dict[str, float | int | None] = {}
        self._since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line: dict[str, float | int | None] = {"step": state.global_step // self.updates_per_step}
        for name, value in logs.items():
            if name.startswith(_TWICE) or not isinstance(value, int | float):
                continue
            line[name] = value if math.isfinite(value) else None
        now = time.monotonic()
        line["seconds"] = round(now - self._since, 4)
        self._since = now
        self.last = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if control.should_save:  # a checkpoint must not outlive the lines that lead to it
                file.flush()
                os.fsync(file.fileno())


class ProgressBar(TrainerCallback):
    """A bar with reward, divergence, clip share, length and time left; plain lines where there is no terminal.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            done = state.global_step // self.writer.updates_per_step
            self.bar = self.progress.add_task("training", total=self.steps, completed=done, numbers="")
            self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        line = self.writer.last
        step = int(line["step"] or 0)
        self.progress.update(self.bar, completed=step, numbers=numbers_of(line))
        if not self.console.is_terminal and (step % max(1, self.steps // 10) == 0 or step == self.steps):
            say(self.console, f"step {step}/{self.steps}  {numbers_of(line)}")

    def stop(self) -> None:
        """Ends the drawing; called on every way out of the run."""
        if self.bar is not None:
            self.progress.stop()
            self.bar = None


def numbers_of(line: dict[str, float | int | None]) -> str:
    """The few numbers worth watching."""
    parts = []
    if line.get("reward") is not None:
        parts.append(f"reward {line['reward']:.3f}")
    names = [name for name in line if name.startswith("divergence/")]
    if names and line[names[0]] is not None:
        parts.append(f"{names[0].split('/')[1]} {line[names[0]]:.4f}")
    low, high = line.get("clip/low/frac"), line.get("clip/high/frac")
    if low is not None and high is not None:
        parts.append(f"clipped {100 * (low + high):.1f} %")
    if line.get("completions/mean_length") is not None:
        parts.append(f"length {line['completions/mean_length']:.1f}")
    return "  ".join(parts)
