"""What do these folders hold? A study, a run, or a set of both, as one collection to report on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mirrorpo._checks import unknown_name
from mirrorpo.config.study import StudySpec
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from mirrorpo.studies.run import RECORD_FILE, RUNS_FOLDER, STUDY_FILE, statuses
from mirrorpo.studies.runs import (
    Collection,
    Failure,
    FinishedRun,
    by_seed,
    check_versions,
    differences,
    fairness_notes,
    group,
    read_run,
)
from mirrorpo.workers import Record

TARGET = float(StudySpec.model_fields["target"].default)
MARGIN = float(StudySpec.model_fields["margin"].default)


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / STUDY_FILE).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (folder / "summary.json").is_file() or (folder / "recipe.yaml").is_file()


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
    if not (folder / RECORD_FILE).is_file():
        raise InputError(f"{folder}: {RECORD_FILE} is missing: the folder holds no record of its runs")
    try:
        record = Record(folder / RECORD_FILE)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        known, command = statuses(record), record.settle("command", "")
    finally:
        record.close()
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
                runs.append(read_run(folder / RUNS_FOLDER / arm / f"seed{seed}", arm))
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


def _read_study(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / STUDY_FILE
    if not path.is_file():
        raise InputError(f"{folder}: holds no study (there is no {STUDY_FILE})")
    text = path.read_bytes().decode("utf-8", "replace")
    settings = parse_yaml(text, str(path))
    for key in ("arms", "baseline", "target", "margin"):
        if not isinstance(settings, dict) or key not in settings:
            raise InputError(f"{path}: key {key!r} is missing")
    return text, settings


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


__all__ = ["gather", "is_run", "is_study", "study_collection"]
