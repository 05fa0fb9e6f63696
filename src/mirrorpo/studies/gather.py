"""Gathering of runs from folders: a study, a run, or a set of both, as one collection to report on.

A folder may come from a stranger: names, seeds and files are checked, and nothing outside the folder is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mirrorpo.config.measure import MatchedSpec, PlanRecord, kept_part
from mirrorpo.config.study import StudySpec
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError, unknown_name
from mirrorpo.runs.folder import METRICS_FILE, STUDY, is_run, is_study
from mirrorpo.runs.reader import read_plain
from mirrorpo.runs.unfinished import is_finished, is_running
from mirrorpo.studies.collection import (
    Collection,
    Failure,
    FinishedRun,
    RunState,
    by_seed,
    check_versions,
    differences,
    fairness_notes,
    group,
    read_run,
    without_copies,
)
from mirrorpo.wording import plural
from mirrorpo.workers import Record

RECORD_FILE = "study.sqlite"
RUNS_FOLDER = "runs"
TARGET = float(StudySpec.model_fields["target"].default)
MARGIN = float(StudySpec.model_fields["margin"].default)


def study_collection(folder: Path, *, allow_mixed: bool = False) -> Collection:
    """A study's finished runs, as its record has them.

    Args:
        folder: of the study.
        allow_mixed: accept runs of different versions of this package.

    Returns:
        The collection; what failed and what is missing is counted in it.

    Raises:
        InputError: no study, a broken file, mixed versions.
    """
    text, settings = _read_study(folder)
    known, command = _read_record(folder)
    arms: dict[str, tuple[FinishedRun, ...]] = {}
    failed: list[Failure] = []
    states: list[RunState] = []
    num_missing, running = 0, is_running(folder)
    for arm, spec in settings["arms"].items():
        runs = []
        for seed in spec["seeds"]:
            result = known.get(f"{arm}/seed{seed}")
            if running and result is not None and not _is_there(folder, arm, seed, result):
                result = None  # thrown away, to be run again
            states.append(_state(folder, arm, seed, spec, result))
            if result is None:
                num_missing += 1
            elif result["status"] == "failed":
                failed.append(Failure(arm=arm, seed=seed, reason=str(result.get("reason", ""))))
            else:
                runs.append(read_run(_inside(folder, RUNS_FOLDER, arm, f"seed{seed}"), arm))
        arms[arm] = by_seed(arm, runs)
    runs = [run for found in arms.values() for run in found]
    return Collection(
        title=f"Study {folder.resolve().name}",
        arms=arms,
        baseline=settings["baseline"],
        target=settings["target"],
        margin=settings["margin"],
        changes={arm: _in_words(spec.get("changes") or {}) for arm, spec in settings["arms"].items()},
        failed=tuple(failed),
        num_missing=num_missing,
        command=command or None,
        study=text,
        matched=kept_part(MatchedSpec, settings.get("matched"), f"{folder / STUDY.file}: matched"),
        notes=(*check_versions(runs, allow_mixed), *fairness_notes(arms), *_plan_notes(settings, folder)),
        states=tuple(states) if num_missing or not runs else (),
        running=running,
    )


def _is_there(folder: Path, arm: str, seed: int, result: Mapping[str, Any]) -> bool:
    return result["status"] == "failed" or is_finished(_inside(folder, RUNS_FOLDER, arm, f"seed{seed}"))


def _state(folder: Path, arm: str, seed: int, spec: Mapping[str, Any], result: Mapping[str, Any] | None) -> RunState:
    """Where a run is: as the record says, else as its folder shows."""
    train = spec.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    run = _inside(folder, RUNS_FOLDER, arm, f"seed{seed}")
    try:
        step = read_plain(run, METRICS_FILE).count(b"\n")
    except (FileNotFoundError, ValueError):
        step = 0
    if result is None:
        kind = "running" if is_running(run) else "begun" if run.is_dir() else "waiting"
        return RunState(arm=arm, seed=seed, kind=kind, step=step, steps=steps if type(steps) is int else None)
    numbers = {key: value for key in ("accuracy_after", "seconds") if type(value := result.get(key)) is float}
    return RunState(
        arm=arm,
        seed=seed,
        kind=result["status"],
        step=step,
        steps=steps if type(steps) is int else None,
        accuracy=numbers.get("accuracy_after"),
        seconds=numbers.get("seconds"),
    )


def _plan_notes(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """Which plan was registered, and whether it has changed."""
    plan = kept_part(PlanRecord, settings.get("plan"), f"{folder / STUDY.file}: plan")
    if plan is None:
        return []
    where = "in no commit" if plan.commit is None else f"commit {plan.commit[:12]}"
    notes = [f"The plan is {plan.path}, sha256 {plan.sha256[:16]}, {where} when the first run began."]
    if plan.later:
        notes.append(f"The plan was changed after the first run: sha256 {', '.join(sha[:16] for sha in plan.later)}.")
    return notes


def _inside(folder: Path, *parts: str) -> Path:
    """A folder below another one; none on the way may be a symbolic link, which could lead out of it."""
    for part in parts:
        folder = folder / part
        if folder.is_symlink():
            raise InputError(f"{folder}: is a symbolic link, which is not followed")
    return folder


def _read_record(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Each run's result, and the command that began the study."""
    path = folder / RECORD_FILE
    for name in (RECORD_FILE, f"{RECORD_FILE}-journal", f"{RECORD_FILE}-wal", f"{RECORD_FILE}-shm"):
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: is a symbolic link, which is not followed")
    if not path.is_file():
        raise InputError(f"{folder}: {RECORD_FILE} is missing: the folder holds no record of its runs")
    try:
        record = Record(path)
        try:
            return statuses(record), str(record.settle("command", ""))
        finally:
            record.close()
    except ValueError as error:
        raise InputError(str(error)) from error


def statuses(record: Record) -> dict[str, dict[str, Any]]:
    """Run to its last recorded result; a run that was tried again after it had failed has several.

    Raises:
        ValueError: a result that no run leaves.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, done in record.results().items():  # oldest first
        if not isinstance(done.result, dict) or done.result.get("status") not in ("finished", "failed"):
            raise ValueError(f"{record.path}: run {key:.80} has neither the status finished nor failed")
        found[key.partition("#")[0]] = done.result
    return found


def _read_study(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / STUDY.file
    try:
        text = read_plain(folder, STUDY.file).decode("utf-8", "replace")
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no study (there is no {STUDY.file})") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    settings = parse_yaml(text, str(path))
    for key in ("arms", "baseline", "target", "margin"):
        if not isinstance(settings, dict) or key not in settings:
            raise InputError(f"{path}: key {key!r} is missing")
    check_settings(settings, path)
    return text, settings


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """The keys of ``study.yaml`` that a report uses: names become folders, so no name may lead elsewhere."""
    arms = settings["arms"]
    if not isinstance(arms, dict) or not arms:
        raise InputError(f"{path}: key 'arms' must be a mapping from names to settings")
    for arm, spec in arms.items():
        if not isinstance(arm, str) or arm in ("", ".", "..") or "/" in arm or not arm.isprintable():
            raise InputError(f"{path}: arms: {arm!r:.80} is not the name of an arm")
        seeds = spec.get("seeds") if isinstance(spec, dict) else None
        if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
            raise InputError(f"{path}: arms.{arm}.seeds must be a list of integers >= 0, got {seeds!r:.80}")
        if not isinstance(spec.get("changes") or {}, dict):
            raise InputError(f"{path}: arms.{arm}.changes must be a mapping, got {spec['changes']!r:.80}")
    if settings["baseline"] not in [*arms]:
        raise InputError(f"{path}: key 'baseline' must be an arm, got {settings['baseline']!r:.80}")
    for key in ("target", "margin"):
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{path}: key {key!r} must be a number > 0, got {value!r:.80}")


def _in_words(changes: Mapping[str, Any]) -> str:
    """Changed keys as one line of YAML."""
    text = yaml.safe_dump(dict(changes), default_flow_style=True, width=10_000, sort_keys=False).strip()
    return text.removeprefix("{").removesuffix("}")  # of the outermost mapping; an inner one ends with one too


def gather(
    folders: Sequence[Path],
    *,
    baseline: str | None = None,
    target: float | None = None,
    allow_mixed: bool = False,
) -> Collection:
    """Any set of finished runs and studies as one collection.

    Runs of a study keep the names of its arms; loose runs are arms by their recipes (``group``).

    Args:
        folders: at least one.
        baseline: an arm; None: that of the first study, else the first arm.
        target: reward whose first step is reported; None: that of the first study, else ``TARGET``.
        allow_mixed: accept runs of different versions of this package.

    Raises:
        InputError: a folder that is neither, a seed twice in an arm, a baseline that is no arm, no arm that shares a
            seed with the baseline, mixed versions.
    """
    if len(folders) == 1 and is_study(folders[0]) and baseline is None and target is None:
        return study_collection(folders[0], allow_mixed=allow_mixed)
    studies = [study_collection(folder, allow_mixed=True) for folder in folders if is_study(folder)]
    loose = []
    for folder in folders:
        if is_study(folder):
            continue
        if not is_run(folder):
            raise InputError(f"{folder}: is neither a run folder nor a study folder")
        loose.append(read_run(folder))
    joined: dict[str, list[FinishedRun]] = {}
    for arms in (*(found.arms for found in studies), group(without_copies(loose))):
        for arm, runs in arms.items():
            joined.setdefault(arm, []).extend(runs)
    arms = {arm: by_seed(arm, without_copies(runs)) for arm, runs in joined.items()}
    runs = [run for found in arms.values() for run in found]
    copies = sum(len(found.runs) for found in studies) + len(loose) - len(runs)
    dropped = (f"{plural(copies, 'run')} are in more than one folder and were counted once.",) if copies else ()
    if not runs:
        raise InputError(f"{folders[0]}: no run is finished: there is nothing to report")
    chosen = baseline or (studies[0].baseline if studies else next(iter(arms)))
    if chosen not in arms:
        raise InputError(f"--baseline: {unknown_name('arm', chosen, arms)}")
    _check_common_seed(arms, chosen)
    return Collection(
        title="Comparison of runs",
        arms=arms,
        baseline=chosen,
        target=target or (studies[0].target if studies else TARGET),
        margin=studies[0].margin if studies else MARGIN,
        changes={
            arm: ", ".join(f"{key}={value}" for key, value in found.items()) for arm, found in differences(arms).items()
        },
        failed=tuple(failure for found in studies for failure in found.failed),
        num_missing=sum(found.num_missing for found in studies),
        matched=studies[0].matched if studies else None,
        notes=(*dropped, *check_versions(runs, allow_mixed), *fairness_notes(arms)),
    )


def _check_common_seed(arms: Mapping[str, Sequence[FinishedRun]], baseline: str) -> None:
    """Arms without a seed in common with the baseline cannot be compared with it at all."""
    seeds = {arm: {run.seed for run in runs} for arm, runs in arms.items()}
    for arm, own in seeds.items():
        if own and not own & seeds[baseline]:
            theirs = ", ".join(map(str, sorted(seeds[baseline])))
            raise InputError(
                f"arm {arm!r} has no seed in common with the baseline {baseline!r}: "
                f"{', '.join(map(str, sorted(own)))} and {theirs}"
            )


__all__ = ["RECORD_FILE", "RUNS_FOLDER", "gather", "statuses", "study_collection"]
