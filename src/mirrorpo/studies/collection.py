"""Collections of finished runs: from run and study folders to arms, each with one run a seed, and what is not fair.

A folder may come from a stranger: names, seeds and files are checked, and nothing outside the folder is read.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mirrorpo._checks import unknown_name
from mirrorpo.config.study import StudySpec
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from mirrorpo.runs.folder import RECIPE_FILE, STUDY, SUMMARY_FILE, flat
from mirrorpo.runs.reader import (
    Metrics,
    Summary,
    read_json,
    read_metrics,
    read_plain,
    read_recipe,
    read_summary,
    reverse_kl,
)
from mirrorpo.workers import Record

RECORD_FILE = "study.sqlite"
RUNS_FOLDER = "runs"
TARGET = float(StudySpec.model_fields["target"].default)
MARGIN = float(StudySpec.model_fields["margin"].default)
DIVERGENCE_FILE = "divergence.json"
# Keys that change what a run costs or keeps, not what it computes.
_NO_DIFFERENCE = ("train.seed", "train.save_every", "train.keep")
_MAX_NAMED = 5  # folders, versions or arms that a message spells out


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """One run folder.

    Attributes:
        arm: the arm it belongs to.
        seed: of the run.
        folder: where it is.
        summary: ``summary.json``.
        metrics: ``metrics.jsonl``.
        recipe: ``recipe.yaml``, dotted keys to values.
        divergence: exact KL(policy || start) per token after training, None where it was not measured.
    """

    arm: str
    seed: int
    folder: Path
    summary: Summary
    metrics: Metrics
    recipe: Mapping[str, Any]
    divergence: float | None

    @property
    def accuracy(self) -> float:
        """After training; ``read_run`` has checked that it is there."""
        assert self.summary.after.accuracy is not None
        return self.summary.after.accuracy

    @property
    def rewards(self) -> Sequence[float | None]:
        """The learning curve: mean reward of each step."""
        return self.metrics.columns.get("reward", (None,) * len(self.metrics.steps))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed for good; ``reason`` is outside text."""

    arm: str
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a report is about.

    Attributes:
        title: of the report.
        arms: name to runs, by seed.
        baseline: the arm the others are compared with.
        target: reward whose first step is reported.
        margin: accuracy differences within this are taken as none.
        changes: name to what the arm changes, in words.
        failed: runs that are left out.
        num_missing: runs of the study that have not been run.
        command: how the study was started, None for a set of folders.
        study: the resolved study's text, None for a set of folders.
        notes: what a reader must know about the set, a sentence each.
    """

    title: str
    arms: Mapping[str, tuple[FinishedRun, ...]]
    baseline: str
    target: float
    margin: float
    changes: Mapping[str, str] = field(default_factory=dict)
    failed: tuple[Failure, ...] = ()
    num_missing: int = 0
    command: str | None = None
    study: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> list[FinishedRun]:
        """All runs, arm by arm."""
        return [run for runs in self.arms.values() for run in runs]


def read_run(folder: Path, arm: str | None = None) -> FinishedRun:
    """Read one finished run.

    Args:
        folder: the run folder.
        arm: the arm it belongs to; None: its objective.

    Returns:
        The run.

    Raises:
        InputError: no finished run, a broken file, or a run without an evaluation; the file and key are named.

    Example:
        >>> read_run(Path("absent"))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        mirrorpo.errors.InputError: absent: no finished run ...
    """
    if not (folder / SUMMARY_FILE).is_file():
        raise InputError(f"{folder}: no finished run (there is no {SUMMARY_FILE})")
    try:
        summary, metrics, text = read_summary(folder), read_metrics(folder), read_recipe(folder)
        divergence = _read_divergence(folder)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    if summary.after.accuracy is None:
        raise InputError(f"{folder}: accuracy was not measured (eval.problems is 0): there is nothing to compare")
    recipe = parse_yaml(text, str(folder / RECIPE_FILE))
    return FinishedRun(
        arm=summary.objective if arm is None else arm,
        seed=summary.seed,
        folder=folder,
        summary=summary,
        metrics=metrics,
        recipe=flat(recipe),
        divergence=divergence,
    )


def _read_divergence(folder: Path) -> float | None:
    try:
        return reverse_kl(read_json(folder, DIVERGENCE_FILE), str(folder / DIVERGENCE_FILE))
    except FileNotFoundError:
        return None


def group(runs: Sequence[FinishedRun]) -> dict[str, tuple[FinishedRun, ...]]:
    """Loose runs as arms: runs whose recipes agree but for the seed are one.

    An arm is named by its preset; where two share it, by the keys in which they differ as well.

    Args:
        runs: in the order in which the arms shall stand.

    Returns:
        Name to runs, by seed.

    Raises:
        InputError: the same recipe and seed twice.
    """
    same: dict[str, list[FinishedRun]] = {}
    for run in runs:
        kept = {key: value for key, value in run.recipe.items() if key not in _NO_DIFFERENCE}
        same.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    groups = list(same.values())
    arms: dict[str, list[FinishedRun]] = {}
    for members in groups:
        first = members[0]
        rivals = [other[0] for other in groups if other[0].arm == first.arm and other is not members]
        differ = [
            key
            for key in sorted({key for run in (first, *rivals) for key in run.recipe})
            if key not in _NO_DIFFERENCE and any(run.recipe.get(key) != first.recipe.get(key) for run in rivals)
        ]
        more = ", ".join(f"{key}={first.recipe.get(key)}" for key in differ)
        arms[f"{first.arm}, {more}" if more else first.arm] = members
    return {name: by_seed(name, members) for name, members in arms.items()}


def by_seed(name: str, runs: Sequence[FinishedRun]) -> tuple[FinishedRun, ...]:
    """The runs of an arm in the order of their seeds; ``InputError`` for a duplicate seed."""
    ordered = sorted(runs, key=lambda run: run.seed)
    for one, next_ in itertools.pairwise(ordered):
        if one.seed == next_.seed:
            raise InputError(
                f"{next_.folder}: duplicate seed {one.seed} of arm {name!r}, also in {one.folder}; give one of them"
            )
    return tuple(ordered)


def check_versions(runs: Sequence[FinishedRun], allow_mixed: bool) -> list[str]:
    """Refuse to compare runs of different versions of this package; note other differences.

    Args:
        runs: of the whole comparison.
        allow_mixed: compare them all the same, with a note.

    Returns:
        Sentences for the report.

    Raises:
        InputError: two versions of mirrorpo, unless they are allowed.
    """
    notes = []
    versions = _kinds(runs, lambda run: run.summary.mirrorpo_version)
    if len(versions) > 1:
        listed = ", ".join(f"{version} ({len(found)} runs, such as {found[0]})" for version, found in versions.items())
        if not allow_mixed:
            raise InputError(
                f"runs of mixed versions of mirrorpo: {listed}; give runs of one version, or --mixed-versions"
            )
        notes.append(f"The runs come from mixed versions of mirrorpo: {listed}; a difference may be theirs.")
    for name in ("torch", "transformers", "trl"):
        others = _kinds(runs, lambda run, name=name: run.summary.versions.get(name, "not recorded"))
        if len(others) > 1:
            notes.append(f"The runs come from mixed versions of {name}: {', '.join(others)}.")
    commits = _kinds(runs, lambda run: run.summary.commit or "not recorded")
    if len(commits) > 1:
        notes.append(f"The runs come from {len(commits)} commits: {_some(list(commits))}.")
    return notes


def _kinds(runs: Sequence[FinishedRun], of: Any) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for run in runs:
        kinds.setdefault(of(run), []).append(run.folder)
    return kinds


def differences(arms: Mapping[str, Sequence[FinishedRun]]) -> dict[str, dict[str, Any]]:
    """For each arm, the recipe keys whose values are not the same in all arms, with its own."""
    firsts = {name: runs[0].recipe for name, runs in arms.items() if runs}
    keys = sorted({key for recipe in firsts.values() for key in recipe} - set(_NO_DIFFERENCE))
    varying = [key for key in keys if len({json.dumps(r.get(key), default=str) for r in firsts.values()}) > 1]
    return {name: {key: recipe[key] for key in varying if key in recipe} for name, recipe in firsts.items()}


def fairness_notes(arms: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """What is not the same in all arms beyond their settings: problems, start, or which seeds there are."""
    notes = []
    keys = {key for changes in differences(arms).values() for key in changes}
    unfair = sorted(key for key in keys if key.startswith(("task.", "model.", "eval.")))
    if unfair:
        notes.append(f"The arms differ in {_some(unfair)}: their accuracies are not measured on the same footing.")
    starts: dict[int, set[float | None]] = {}
    for runs in arms.values():
        for run in runs:
            starts.setdefault(run.seed, set()).add(run.summary.before.accuracy)
    apart = sorted(seed for seed, found in starts.items() if len(found) > 1)
    if apart and not unfair:
        notes.append(f"Accuracy before training is not the same in all arms at seeds {_some([str(s) for s in apart])}.")
    seeds = {frozenset(run.seed for run in runs) for runs in arms.values()}
    if len(seeds) > 1:
        notes.append("Not every arm has every seed: each difference uses the seeds that both arms have, and no others.")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "")


# ---- folders


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / STUDY.file).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (folder / SUMMARY_FILE).is_file() or (folder / RECIPE_FILE).is_file()


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
    num_missing = 0
    for arm, spec in settings["arms"].items():
        runs = []
        for seed in spec["seeds"]:
            result = known.get(f"{arm}/seed{seed}")
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
        notes=(*check_versions(runs, allow_mixed), *fairness_notes(arms)),
    )


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
    _check_settings(settings, path)
    return text, settings


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
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
    for arms in (*(found.arms for found in studies), group(loose)):
        for arm, runs in arms.items():
            joined.setdefault(arm, []).extend(runs)
    arms = {arm: by_seed(arm, runs) for arm, runs in joined.items()}
    runs = [run for found in arms.values() for run in found]
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
        notes=(*check_versions(runs, allow_mixed), *fairness_notes(arms)),
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


__all__ = [
    "DIVERGENCE_FILE",
    "RECORD_FILE",
    "RUNS_FOLDER",
    "Collection",
    "Failure",
    "FinishedRun",
    "by_seed",
    "check_versions",
    "differences",
    "fairness_notes",
    "gather",
    "group",
    "is_run",
    "is_study",
    "read_run",
    "statuses",
    "study_collection",
]
