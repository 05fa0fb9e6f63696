"""Collections of finished runs: arms, each with one run a seed, whether they may be compared, and what is not fair."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrorpo.config.measure import MatchedSpec
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from mirrorpo.runs.folder import RECIPE_FILE, SUMMARY_FILE, flat
from mirrorpo.runs.reader import (
    Metrics,
    Summary,
    number_of,
    read_json,
    read_metrics,
    read_recipe,
    read_summary,
    reverse_kl,
    table_at,
)

DIVERGENCE_FILE = "divergence.json"
MEASURES_FILE = "measures.json"
# Keys that change what a run costs or keeps, not what it computes.
_NO_DIFFERENCE = ("train.seed", "train.save_every", "train.keep")
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}\.(policy|start)\.[\w@.:+-]{1,80}")
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
        measures: what the study's ``measure`` section asks for, column to number.
    """

    arm: str
    seed: int
    folder: Path
    summary: Summary
    metrics: Metrics
    recipe: Mapping[str, Any]
    divergence: float | None
    measures: Mapping[str, float | None] = field(default_factory=dict)

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
class RunState:
    """Where one run of a study is that is not finished as a whole.

    Attributes:
        arm, seed: which run.
        kind: finished, failed, running, begun (no process works on it now) or waiting.
        step, steps: done, and of the whole run (None: the study does not say).
        accuracy: after training; None before.
        seconds: that it took; None before it ends.
    """

    arm: str
    seed: int
    kind: str
    step: int
    steps: int | None
    accuracy: float | None = None
    seconds: float | None = None


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
        matched: curves that are compared at the same distance.
        notes: what a reader must know about the set, a sentence each.
        states: where each run is, of a study that is not finished; empty otherwise.
        running: whether a process works on the study.
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
    matched: MatchedSpec | None = None
    notes: tuple[str, ...] = ()
    states: tuple[RunState, ...] = ()
    running: bool = False

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
        divergence, measures = _read_divergence(folder), _read_measures(folder)
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
        measures=measures,
    )


def _read_divergence(folder: Path) -> float | None:
    try:
        return reverse_kl(read_json(folder, DIVERGENCE_FILE), str(folder / DIVERGENCE_FILE))
    except FileNotFoundError:
        return None


def _read_measures(folder: Path) -> dict[str, float | None]:
    where = str(folder / MEASURES_FILE)
    try:
        table = read_json(folder, MEASURES_FILE)
    except FileNotFoundError:
        return {}
    found = table_at(table, "measures", where) if isinstance(table, dict) else None
    if found is None or not all(_COLUMN.fullmatch(name) for name in found):
        raise ValueError(f"{where}: key 'measures' must be a mapping from names such as trained.policy.accuracy")
    return {name: number_of(value, name, where) for name, value in found.items()}


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


def without_copies(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs without those that another folder holds with the same recipe, numbers and learning curve."""
    kept: list[FinishedRun] = []
    for run in runs:
        if not any(_same_run(run, other) for other in kept):
            kept.append(run)
    return kept


def _same_run(one: FinishedRun, other: FinishedRun) -> bool:
    return (one.seed, one.summary, one.recipe, one.metrics) == (other.seed, other.summary, other.recipe, other.metrics)


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


__all__ = [
    "DIVERGENCE_FILE",
    "Collection",
    "Failure",
    "FinishedRun",
    "RunState",
    "by_seed",
    "check_versions",
    "differences",
    "fairness_notes",
    "group",
    "read_run",
]
