"""How far is the whole study, and how long will it take? Counted in training steps, read from the run folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mirrorpo.config.study import Job
from mirrorpo.escape import say
from mirrorpo.reports.text import duration
from mirrorpo.training.callbacks import METRICS_FILE

_EVERY = 2.0  # seconds between looks at the run folders
_SPEED_PERIOD = 600.0  # seconds over which the speed is averaged: runs alternate between steps and evaluations


class Progress:
    """A bar over all runs with the time left; a line for each finished run where there is no terminal.

    Args:
        console: where to draw.
        jobs: all runs of the study.
        missing: names of those that are to be run now.
        folder: of the run folders.
    """

    def __init__(self, console: Console, jobs: Sequence[Job], missing: Collection[str], folder: Path) -> None:
        self.console, self.folder = console, folder
        self._total_runs, self._done_runs = len(jobs), len(jobs) - len(missing)
        self._open = {job.name: job.recipe.train.steps for job in jobs if job.name in missing}
        self._total, self._closed = sum(self._open.values()), 0
        self._started, self._begun = time.monotonic(), self._steps_under_way()
        self._stop = threading.Event()
        self._bar = Bar(
            TextColumn("runs"),
            TextColumn("{task.fields[runs]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_SPEED_PERIOD,
        )

    def __enter__(self) -> Progress:
        self._task = self._bar.add_task("", total=self._total, completed=self._begun, runs=self._runs())
        self._bar.start()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.console.is_terminal:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._bar.stop()

    def finished(self, job: Job, result: Mapping[str, Any]) -> None:
        """A run has ended."""
        self._done_runs += 1
        self._closed += self._open.pop(job.name, 0)
        said = f"{self._runs()} runs  {job.arm} seed {job.seed}: "
        if result["status"] == "failed":
            said += f"failed ({result['reason']})"
        else:
            said += f"accuracy {result['accuracy_after']:.3f} in {duration(result['seconds'])}"
        left = self.seconds_left()
        if left is not None and not self.console.is_terminal and self._open:
            said += f", about {duration(left)} left"
        say(self.console, said.replace("\u00a0", " "))
        self._update()

    def seconds_left(self) -> float | None:
        """From the speed so far; None before the first step."""
        now = self._closed + self._steps_under_way()
        new = now - self._begun
        return None if new <= 0 else (time.monotonic() - self._started) / new * (self._total - now)

    def _runs(self) -> str:
        return f"{self._done_runs}/{self._total_runs}"

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._update()

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._closed + self._steps_under_way(), runs=self._runs())

    def _steps_under_way(self) -> int:
        count = 0
        for name, steps in list(self._open.items()):
            path = self.folder / name / METRICS_FILE
            if path.is_file():
                count += min(steps, path.read_bytes().count(b"\n"))
        return count


__all__ = ["Progress"]
