"""Runner of studies: jobs side by side in workers, each recorded as it finishes, with progress in training steps.

A study folder holds ``study.yaml`` (resolved), ``study.sqlite`` (what is finished or failed), ``runs/ARM/seedN/`` (run
folders without weights, unless ``keep_models``), and the report's files. Killed at any moment it resumes: recorded runs
are not repeated, and a run that was under way goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mirrorpo.config.measure import MatchedSpec, MeasureSpec, PlanRecord, kept_part, plan_since
from mirrorpo.config.study import Job, Study
from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from mirrorpo.files import write_text_atomic
from mirrorpo.runs.folder import (
    METRICS_FILE,
    STUDY,
    SUMMARY_FILE,
    Folder,
    flat,
    versions,
)
from mirrorpo.runs.reader import read_metrics
from mirrorpo.studies.gather import RECORD_FILE, RUNS_FOLDER, check_settings, statuses
from mirrorpo.studies.job import check_measured
from mirrorpo.training.setup import prepare
from mirrorpo.wording import duration, say
from mirrorpo.workers import Job as WorkerJob
from mirrorpo.workers import JobError, Record
from mirrorpo.workers.local import default_workers
from mirrorpo.workers.local import open_pool as open_workers

_FUNCTION = "mirrorpo.studies.job:run_job"
_MAX_DEATHS = 2  # workers that one run may cost: it is tried once more
_TIMED_STEPS = 2
_EVERY = 2.0  # seconds between looks at the run folders
_PAGE_EVERY, _PAGE_SHARE = 10.0, 0.01  # seconds between two pages, at least, and their share of the time, at most
_SPEED_PERIOD = 600.0  # seconds over which the speed is averaged: runs alternate between steps and evaluations


def grown(study: Study, text: str, where: str) -> Study:
    """A study with the arms and seeds of an earlier one as well, which a folder holds.

    Args:
        study: what is asked for; it may add arms and seeds, and leave out what is there already.
        text: the earlier study, as ``Study.to_yaml`` has written it.
        where: the folder, for messages.

    Returns:
        Arms in the order of the folder, then the new ones; the same for seeds.

    Raises:
        InputError: a setting, or a key of an arm that both have, is another one.
    """
    kept = parse_yaml(text, f"{where}/{STUDY.file}")
    if not isinstance(kept, dict) or not isinstance(kept.get("arms"), dict):
        raise InputError(f"{where}/{STUDY.file}: key 'arms' must be a mapping from names to settings")
    check_settings(kept, Path(where, STUDY.file))
    asked = parse_yaml(study.to_yaml(), "study")
    _same_settings(_fixed(kept), _fixed(asked), where)
    arms, seeds, changes = {}, {}, {}
    for arm, spec in kept["arms"].items():
        recipe = {key: value for key, value in spec.items() if key not in ("seeds", "changes")}
        if arm in study.arms:
            own = {key: value for key, value in asked["arms"][arm].items() if key not in ("seeds", "changes")}
            _same_settings({"arms": {arm: recipe}}, {"arms": {arm: own}}, where)
        arms[arm] = recipe_from(recipe, (), f"{where}: arms.{arm}")
        seeds[arm] = tuple(dict.fromkeys((*spec["seeds"], *study.seeds.get(arm, ()))))
        changes[arm] = study.changes.get(arm, spec.get("changes") or {})
    new = [arm for arm in study.arms if arm not in arms]
    return dataclasses.replace(
        study,
        arms=arms | {arm: study.arms[arm] for arm in new},
        seeds=seeds | {arm: study.seeds[arm] for arm in new},
        changes=changes | {arm: study.changes[arm] for arm in new},
        measure=study.measure or kept_part(MeasureSpec, kept.get("measure"), f"{where}/{STUDY.file}: measure"),
        matched=study.matched or kept_part(MatchedSpec, kept.get("matched"), f"{where}/{STUDY.file}: matched"),
        plan=plan_since(kept_part(PlanRecord, kept.get("plan"), f"{where}/{STUDY.file}: plan"), study.plan),
    )


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed study keeps, without its arms: what is measured afterwards changes no run."""
    return {key: value for key, value in settings.items() if key not in ("arms", "measure", "matched", "plan")}


def _same_settings(kept: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    old, new = flat(kept), flat(asked)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise InputError(
                f"--resume: {key} is {new.get(key)!r:.80}, the study in {where} has {old.get(key)!r:.80}; a resumed "
                "study keeps its settings, and may gain arms and seeds"
            )


@contextmanager
def open_study(study: Study, out: Path, resume: bool, command: str) -> Iterator[Record]:
    """The record of a study's folder, locked while it is open.

    Args:
        study: written to ``study.yaml``; on resume ``grown`` from what is there.
        out: the folder; created if needed.
        resume: go on with the study that the folder holds.
        command: how it was started; the first one stays.

    Raises:
        InputError: the folder holds a study (without ``resume``), holds none (with it) or another one, holds other
            files, was begun with another version, cannot be written, or is in use.
    """
    settings = grown_from(study, out, resume).to_yaml()
    kept = _kept(out, resume) or settings
    folder = Folder(out, STUDY, kept, parse_yaml, resume)
    try:
        if kept != settings:
            write_text_atomic(out / STUDY.file, settings)
        # Behind the settings: a folder with a record is always one to resume.
        record = _open_record(out / RECORD_FILE, command)
        try:
            yield record
        finally:
            record.close()
    finally:
        folder.close()


def grown_from(study: Study, out: Path, resume: bool) -> Study:
    """The study with the arms and seeds that its folder holds already; as it is where nothing is resumed."""
    text = _kept(out, resume)
    return study if text is None else grown(study, text, str(out))


def _kept(out: Path, resume: bool) -> str | None:
    """The settings of the study in a folder; None where there is none to resume."""
    path = out / STUDY.file
    if not resume or path.is_symlink() or not path.is_file():
        return None  # the folder's own checks say what is wrong
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be read ({error.strerror})") from None


def _open_record(path: Path, command: str) -> Record:
    try:
        record = Record(path)
        record.settle("command", command)
        begun = record.settle("versions", versions())
    except ValueError as error:
        raise InputError(str(error)) from error
    now = versions()
    if begun["mirrorpo"] != now["mirrorpo"]:
        record.close()
        raise InputError(
            f"--resume: the study was begun with mirrorpo {begun['mirrorpo']}, this is {now['mirrorpo']}: runs of "
            "mixed versions are not compared"
        )
    return record


def check_arms(study: Study) -> None:
    """What only shows when task and model are loaded, once for each arm, before anything is run.

    Raises:
        InputError: names the arm and the key.
    """
    seen: set[tuple[object, ...]] = set()
    for arm, recipe in study.arms.items():
        train = recipe.train
        parts = (str(recipe.task), str(recipe.model), train.prompts_per_step, train.max_completion_length,
                 train.token_budget, train.use_vllm, train.kernels, recipe.eval.problems)  # fmt: skip
        if recipe.eval.problems == 0:
            raise InputError(f"arms.{arm}: eval.problems: must be at least 1 in a study, got 0")
        if parts in seen:
            continue
        seen.add(parts)
        try:
            prepare(recipe)
            if study.measure is not None:
                check_measured(recipe, study.measure)
        except InputError as error:
            raise InputError(f"arms.{arm}: {error}") from error


def run_study(
    study: Study,
    out: Path,
    record: Record,
    pool: Any,
    console: Console,
    *,
    command: str,
    retry_failed: bool = False,
    redo: Collection[str] = (),
    page: Callable[[], None] = lambda: None,
) -> None:
    """Run what is missing.

    Args:
        study: what to run.
        out: its folder.
        record: of the folder; gains each run in the moment that it ends.
        pool: runs the jobs; see ``open_pool``.
        console: for progress.
        command: how the study was started, for the runs' summaries.
        retry_failed: try runs again that are recorded as failed.
        redo: runs (``ARM/seedN``) to throw away and run again.
        page: writes the page of the study that goes on; called now and then, from a thread beside the runs.

    Raises:
        InputError: ``redo`` names a run that the study does not have.
    """
    known = statuses(record)
    jobs = {job.name: job for job in study.jobs()}
    for name in redo:
        if name not in jobs:
            arm, _, seed = name.partition("/seed")
            raise InputError(f"--redo {arm}/{seed}: no such run; arms and seeds: {_runs_in_words(study)}")
        if (out / RUNS_FOLDER / name).is_dir():
            shutil.rmtree(out / RUNS_FOLDER / name)

    def is_missing(name: str) -> bool:
        if name not in known:
            return True
        if known[name]["status"] == "failed":
            return retry_failed or name in redo
        return not (out / RUNS_FOLDER / name / SUMMARY_FILE).is_file()  # thrown away, by --redo or by hand

    missing = [job for name, job in jobs.items() if is_missing(name)]
    tries = {name: sum(key.partition("#")[0] == name for key in record.results()) for name in jobs}
    waiting = {
        f"{job.name}#{tries[job.name] + 1}" if tries[job.name] else job.name: _worker_job(
            study, job, out / RUNS_FOLDER / job.name, pool.num_threads, command, tries[job.name]
        )
        for job in missing
    }
    with Progress(console, list(jobs.values()), {job.name for job in missing}, out / RUNS_FOLDER, page) as progress:
        while waiting:
            try:
                for done in pool.run(list(waiting.values())):
                    record.add(done.job.key, done.job.digest, done.result, done.seconds, done.deaths)
                    del waiting[done.job.key]
                    progress.finished(jobs[done.job.key.partition("#")[0]], done.result)
            except JobError as error:
                # The run's workers kept dying (run_job itself reports every exception): the others go on.
                result = {"status": "failed", "attempts": _MAX_DEATHS, "reason": str(error)}
                record.add(error.key, waiting.pop(error.key).digest, result)
                progress.finished(jobs[error.key.partition("#")[0]], result)


def _runs_in_words(study: Study) -> str:
    parts = [f"{arm} {', '.join(map(str, seeds[:12]))}" for arm, seeds in study.seeds.items()]
    return "; ".join(parts[:6]) + ("; ..." if len(parts) > 6 else "")


def _worker_job(study: Study, job: Job, folder: Path, threads: int, command: str, tries: int) -> WorkerJob:
    payload = {
        "recipe": job.recipe.model_dump(mode="json"),
        "folder": str(folder.resolve()),
        "threads": threads,
        "keep_models": study.keep_models,
        "measure_divergence": study.measure_divergence,
        "measure": None if study.measure is None else study.measure.model_dump(mode="json"),
        "command": command,
    }
    return WorkerJob(key=f"{job.name}#{tries + 1}" if tries else job.name, function=_FUNCTION, payload=payload)


def open_pool(num_workers: int | None, num_threads: int | None, ray: str | None = None) -> Any:
    """Workers for runs, a context manager; see ``mirrorpo.workers.local.open_pool``."""
    return open_workers(num_workers or default_workers(), num_threads, _MAX_DEATHS, ray)


def _evaluations_between(recipe: Recipe) -> int:
    return (recipe.train.steps - 1) // recipe.eval.every if recipe.eval.every else 0


def estimate(study: Study, pool: Any, console: Console, out: Path | None = None) -> dict[str, Any]:
    """How many runs, how long, how much disk: from two steps of the baseline in every worker at once.

    Args:
        study: what would run.
        pool: what would run it.
        console: for the notice that it is being timed.
        out: the study's folder; it is timed in a folder beside it, where every worker sees it. None: a temporary one.

    Returns:
        Plain numbers; ``seconds`` and ``megabytes`` are of the whole study.

    Raises:
        InputError: the timed run failed, or nothing can be written beside ``out``.
    """
    jobs = study.jobs()
    say(console, f"timing {_TIMED_STEPS} steps of {study.baseline} in {pool.num_workers} workers ...")
    recipe = study.arms[study.baseline]
    short = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"steps": _TIMED_STEPS}),
            "eval": recipe.eval.model_copy(update={"every": 0}),
        }
    )
    folder = _timing_folder(out)
    try:
        timed = [
            _worker_job(study, Job(arm="timing", seed=n, recipe=short), folder / str(n), pool.num_threads, "", 0)
            for n in range(pool.num_workers)
        ]
        started = time.monotonic()
        results = [done.result for done in pool.run(timed)]
        wall = time.monotonic() - started
        failed = next((result for result in results if result["status"] == "failed"), None)
        if failed is not None:
            raise InputError(f"arms.{study.baseline}: {failed['reason']}")
        if not all((folder / str(n) / METRICS_FILE).exists() for n in range(pool.num_workers)):
            raise InputError(
                f"--out {out}: the workers wrote to another {folder.parent} than this one: every node must see the "
                "folder under the same path"
            )
        steps = [read_metrics(folder / str(n)).columns["seconds"][-1] or 0.0 for n in range(pool.num_workers)]
        size = _size(folder) / pool.num_workers
        lines = _size(folder, "metrics.jsonl") / pool.num_workers / _TIMED_STEPS
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    step = sum(steps) / len(steps)
    around = max(0.0, sum(result["seconds"] for result in results) / len(results) - _TIMED_STEPS * step)
    start = max(0.0, wall - max(result["seconds"] for result in results))
    # Around the steps are two evaluations, hardly more: one between them takes at most half of that.
    total = sum(around + step * job.recipe.train.steps + around / 2 * _evaluations_between(job.recipe) for job in jobs)
    disk = sum(size + lines * (job.recipe.train.steps - _TIMED_STEPS) for job in jobs)
    return {
        "runs": len(jobs),
        "arms": len(study.arms),
        "seeds": len({job.seed for job in jobs}),
        "workers": pool.num_workers,
        "threads": pool.num_threads,
        "seconds_a_step": round(step, 3),
        "seconds_around_steps": round(around, 2),
        "seconds": round(start + total / min(pool.num_workers, len(jobs)), 1),
        "megabytes": round(disk / 1e6, 2),
    }


def _timing_folder(out: Path | None) -> Path:
    """A new folder beside the study's, which need not be there yet, or among the temporary ones."""
    try:
        beside = None if out is None else next(parent for parent in out.absolute().parents if parent.exists())
        return Path(tempfile.mkdtemp(prefix=".mirrorpo-timing-", dir=beside))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def _size(folder: Path, name: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(name) if path.is_file())


class Progress:
    """A bar over all runs with the time left; a line for each finished run where there is no terminal.

    Args:
        console: where to draw.
        jobs: all runs of the study.
        missing: names of those that are to be run now.
        folder: of the run folders.
        page: as for ``run_study``; it takes a hundredth of the time, at most.
    """

    def __init__(
        self,
        console: Console,
        jobs: Sequence[Job],
        missing: Collection[str],
        folder: Path,
        page: Callable[[], None] = lambda: None,
    ) -> None:
        self.console, self.folder, self._page, self._page_due = console, folder, page, 0.0
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
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()  # a page of this moment must not replace that of the end
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
            if (now := time.monotonic()) >= self._page_due:
                began = time.thread_time()
                self._page()
                cost = time.thread_time() - began if self._page_due else 0.0  # the first one imports what draws it
                self._page_due = now + max(_PAGE_EVERY, cost / _PAGE_SHARE)

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._closed + self._steps_under_way(), runs=self._runs())

    def _steps_under_way(self) -> int:
        count = 0
        for name, steps in list(self._open.items()):
            path = self.folder / name / METRICS_FILE
            if path.is_file():
                count += min(steps, path.read_bytes().count(b"\n"))
        return count


__all__ = [
    "Progress",
    "check_arms",
    "estimate",
    "open_pool",
    "open_study",
    "run_study",
]
