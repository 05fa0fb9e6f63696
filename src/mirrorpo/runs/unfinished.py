"""Runs that are not finished: how far one has come, whether it still goes on, and where it ended if it does not.

Read from the folder alone, as ``mirrorpo.runs.reader`` does, and as sparing with trust: a file that is missing leaves
its part out. ``progress.json`` is written by the run now and then; without it the other files tell the rest.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mirrorpo.runs.folder import BEFORE_FILE, LOCK_FILE, METRICS_FILE, SUMMARY_FILE, VERSIONS_FILE
from mirrorpo.runs.reader import (
    NOT_EVALUATED,
    Evaluation,
    Lines,
    Metrics,
    Sample,
    Summary,
    count_at,
    evaluation_of,
    number_of,
    read_before,
    read_json,
    read_metrics,
    read_recipe,
    sample_of,
    table_at,
)

PROGRESS_FILE = "progress.json"
EVALUATIONS_FILE = "evaluations.jsonl"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,9})")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an unfinished run has come.

    Attributes:
        step, steps: done, and of the whole run (None: the recipe does not say).
        phase: what it was doing: "training", "evaluating before training".
        written: seconds since 1970 of the last word of it; None if there is none.
        running: whether a process holds the folder.
        ended: why it ended, in its own words; None if it did not say.
        checkpoint: the step of the newest checkpoint.
        rollout_step, rollouts: completions that were trained on, and in which step.
    """

    step: int
    steps: int | None
    phase: str
    written: float | None
    running: bool
    ended: str | None
    checkpoint: int | None
    rollout_step: int | None
    rollouts: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation between the first step and the last: a line of `evaluations.jsonl`."""

    step: int
    problems: int
    seconds: float | None
    evaluation: Evaluation
    samples: tuple[Sample, ...]


def read_evaluations(run_dir: Path) -> tuple[Point, ...]:
    """Read `evaluations.jsonl`, what `eval.every` asks for, by step; empty if there is none.

    Raises:
        ValueError: a line other than the last is not what a run writes; the key is named.
    """
    points: list[Point] = []
    try:
        with Lines(Path(run_dir), EVALUATIONS_FILE) as lines:
            for where, table in lines:
                numbers = table_at(table, "summary", where)
                point = Point(
                    step=count_at(table, "step", where),
                    problems=count_at(numbers, "problems", where),
                    seconds=number_of(table.get("seconds"), "seconds", where),
                    evaluation=evaluation_of(numbers, "now", where),
                    samples=_samples(table, where),
                )
                points = [kept for kept in points if kept.step < point.step]  # a resumed run evaluates again
                points.append(point)
    except FileNotFoundError:
        pass
    return tuple(points)


def _samples(table: Mapping[str, Any], where: str) -> tuple[Sample, ...]:
    found = table.get("samples", [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{where}: key 'samples' must be a list of objects, got {found!r:.60}")
    return tuple(sample_of({"answer": None, "reason": "", **sample, "when": "after"}, where) for sample in found)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a page needs of a recipe; None where the text does not say."""

    task: str | None = None
    objective: str | None = None
    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    updates: int = 1
    every: int = 0
    temperature: float | None = None
    samples: int | None = None

    @property
    def sampling(self) -> str:
        """How evaluations draw: "greedy", "temperature 0.7"; empty if unknown."""
        if self.temperature is None:
            return ""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"


def read_settings(run_dir: Path) -> Settings:
    """The settings that a page names, from `recipe.yaml`; what is not there or of another kind is left out."""
    try:
        table = yaml.safe_load(read_recipe(run_dir))
    except (yaml.YAMLError, OSError, ValueError, RecursionError):
        return Settings()

    def found(kind: Any, *keys: str) -> Any:
        value: Any = table
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        fits = isinstance(value, kind) and not isinstance(value, bool)
        return value if fits and (not isinstance(value, int | float) or 0 <= value < 2**31) else None

    updates = (found(int, "train", key) or 1 for key in ("updates_per_batch", "passes_per_batch"))
    temperature = found((int, float), "eval", "temperature")
    return Settings(
        task=found(str, "task", "name"),
        objective="preference" if found(Mapping, "preference") else found(str, "objective", "preset"),
        model=found(str, "model", "path"),
        seed=found(int, "train", "seed"),
        steps=found(int, "train", "steps"),
        updates=next(updates) * next(updates),
        every=found(int, "eval", "every") or 0,
        temperature=None if temperature is None else float(temperature),
        samples=found(int, "eval", "samples"),
    )


def is_finished(run_dir: Path) -> bool:
    """Whether there is a summary."""
    return os.path.lexists(Path(run_dir) / SUMMARY_FILE)


def metrics_so_far(run_dir: Path) -> Metrics:
    """The steps of an unfinished run; none before the end of its first one."""
    if not (Path(run_dir) / METRICS_FILE).exists():
        return Metrics(steps=(), columns={}, num_not_finite=0, torn=False)
    return read_metrics(run_dir)


def read_unfinished(run_dir: Path, metrics: Metrics) -> tuple[Summary, Progress]:
    """What is known of a run that has no `summary.json`.

    Args:
        run_dir: the run folder.
        metrics: its steps.

    Returns:
        A summary, whose ``after`` is the last evaluation so far, and how far the run has come.

    Raises:
        FileNotFoundError: there is no recipe either.
        ValueError: a file that is there is broken; it is named.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "recipe.yaml").write_text("task: {name: words}\\ntrain: {steps: 48}")
        >>> none = Metrics(steps=(), columns={}, num_not_finite=0, torn=False)
        >>> summary, progress = read_unfinished(folder, none)
        >>> summary.task, progress.step, progress.steps, progress.running
        ('words', 0, 48, False)
    """
    run_dir = Path(run_dir)
    read_recipe(run_dir)  # raises if it is missing
    settings, said = read_settings(run_dir), _said(run_dir)
    step = metrics.steps[-1] if metrics.steps else 0
    points = read_evaluations(run_dir)
    before, problems = _before(run_dir)
    versions = _begun_with(run_dir)
    times = [value for value in metrics.columns.get("seconds", ()) if value is not None]
    summary = Summary(
        task=settings.task or "an unknown task",
        objective=settings.objective or "an unknown objective",
        objective_line=_text(said, "objective_line"),
        model=settings.model,
        seed=settings.seed or 0,
        steps=step,
        seconds=sum(times),
        problems=points[-1].problems if points else problems,
        before=before,
        after=points[-1].evaluation if points else NOT_EVALUATED,
        command=_text(said, "command"),
        commit=_text(said, "commit"),
        versions=versions,
        mirrorpo_version=versions.get("mirrorpo", "unknown"),
    )
    kept = table_at(said, "rollouts", str(run_dir / PROGRESS_FILE))
    rollout_step = kept.get("step")
    return summary, Progress(
        step=step,
        steps=settings.steps,
        phase=_text(said, "phase") or "training",
        written=_written(run_dir, said),
        running=is_running(run_dir),
        ended=_text(said, "ended"),
        checkpoint=_checkpoint(run_dir, settings.updates),
        rollout_step=rollout_step if type(rollout_step) is int else None,
        rollouts=_samples(kept, f"{run_dir / PROGRESS_FILE}, rollouts"),
    )


def _said(run_dir: Path) -> dict[str, Any]:
    try:
        said = read_json(run_dir, PROGRESS_FILE)
    except FileNotFoundError:
        return {}
    if not isinstance(said, dict):
        raise ValueError(f"{run_dir / PROGRESS_FILE}: expected a JSON object, found {type(said).__name__}")
    return said


def _text(said: Mapping[str, Any], key: str) -> str | None:
    value = said.get(key)
    return value if isinstance(value, str) else None


def _before(run_dir: Path) -> tuple[Evaluation, int | None]:
    table = read_before(run_dir)
    if table is None:
        return NOT_EVALUATED, None
    return evaluation_of(table["summary"], "before", str(run_dir / BEFORE_FILE)), table["summary"].get("problems")


def _begun_with(run_dir: Path) -> dict[str, str]:
    try:
        table = read_json(run_dir, VERSIONS_FILE)
    except FileNotFoundError:
        return {}
    begun = table.get("begun_with") if isinstance(table, dict) else None
    return {str(key): str(value)[:200] for key, value in begun.items()} if isinstance(begun, dict) else {}


def _written(run_dir: Path, said: Mapping[str, Any]) -> float | None:
    """When the run last wrote: as it says, and as the files say that are written between two of its words."""
    times = [time] if isinstance(time := said.get("written"), int | float) and 0 <= time < 1e11 else []
    for name in (METRICS_FILE, BEFORE_FILE):
        try:
            times.append((run_dir / name).lstat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _checkpoint(run_dir: Path, updates: int) -> int | None:
    """The step of the newest checkpoint, by its name alone."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return None
    found = [int(match[1]) // updates for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return max(found, default=None)


def is_running(run_dir: Path) -> bool:
    """Whether a process of this machine, or of one that shares locks with it, works in a folder."""
    try:
        lock = os.open(Path(run_dir) / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)
    return False


__all__ = [
    "EVALUATIONS_FILE",
    "PROGRESS_FILE",
    "Point",
    "Progress",
    "Settings",
    "is_finished",
    "is_running",
    "metrics_so_far",
    "read_evaluations",
    "read_settings",
    "read_unfinished",
]
