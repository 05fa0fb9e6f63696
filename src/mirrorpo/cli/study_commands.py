"""Steps of ``mirrorpo study`` and ``mirrorpo report``, without the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mirrorpo.config.study import Study
from mirrorpo.errors import InputError
from mirrorpo.files import one_line_if_refused
from mirrorpo.reports import write_curve, write_report
from mirrorpo.reports.study_page import as_json, write_study_page, write_study_report
from mirrorpo.runs.folder import is_study
from mirrorpo.studies.collection import Collection
from mirrorpo.studies.compare import compare
from mirrorpo.studies.gather import gather, study_collection
from mirrorpo.studies.job import measure_study
from mirrorpo.studies.runner import check_arms, estimate, grown_from, open_pool, open_study, run_study
from mirrorpo.wording import duration, plural, say

_MANY_ARMS = 12  # more are read in the report


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a study: headline, files, all numbers, whether nothing was reported, a line for each arm."""

    headline: str
    written: tuple[str, ...]
    numbers: Mapping[str, Any]
    nothing_finished: bool
    arms: tuple[str, ...] = ()


def study(
    plan: Study,
    out: Path,
    console: Console,
    *,
    resume: bool,
    retry_failed: bool,
    workers: int | None,
    threads: int | None,
    ray: str | None,
    command: str,
    redo: Sequence[str] = (),
    exports: Sequence[str] = (),
) -> Outcome:
    """Run what is missing of a study, then write its report.

    Raises:
        InputError: study or folder cannot be used; nothing was run.
        RunError: the disk refused; the runs that were finished are kept.
    """
    plan = grown_from(plan, out, resume)
    check_arms(plan)
    if ray not in (None, "local"):  # a cluster that cannot be reached leaves no folder behind
        from mirrorpo.workers.on_ray import connect

        connect(ray, 1)
    with open_study(plan, out, resume, command) as record:
        page = _LivePage(out, console)
        try:
            with open_pool(workers, threads, ray) as pool:
                run_study(
                    plan, out, record, pool, console, command=command, retry_failed=retry_failed, redo=redo, page=page
                )
                measure_study(plan, out, record, pool, console)
        except BaseException:
            page(ended=True)
            raise
    collection = study_collection(out)
    if not collection.runs:
        reasons = "; ".join(dict.fromkeys(failure.reason for failure in collection.failed))
        failed = f"all {plural(len(collection.failed), 'run')} failed: {reasons}"
        return Outcome(headline=failed, written=(), numbers={"headline": failed}, nothing_finished=True)
    with one_line_if_refused(out, "the runs that were finished are kept"):
        written = tuple(str(path) for path in write_study_report(collection, out, exports))
    numbers = as_json(collection)
    headline = numbers["headline"].replace("\u00a0", " ")
    return Outcome(
        headline=headline, written=written, numbers=numbers, nothing_finished=False, arms=_arms_in_words(collection)
    )


class _LivePage:
    """Writes ``report.html`` of a study that goes on; a page that fails is said once, and ends nothing."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console, self._failed = out, console, False

    def __call__(self, ended: bool = False) -> None:
        try:
            write_study_page(study_collection(self.out), self.out, ended=ended)
        except Exception as error:  # noqa: BLE001  whatever goes wrong on a page is no reason to end a study
            if not self._failed:
                self._failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                say(self.console, f"warning: the live report.html cannot be written ({reason}); the study goes on")


def _arms_in_words(collection: Collection) -> tuple[str, ...]:
    """Accuracy with its interval and the distance from the start, a line for each arm; nothing with many arms."""
    if len(collection.arms) > _MANY_ARMS:
        return ()
    lines = []
    width = max(map(len, collection.arms))
    for arm, spread in compare(collection).accuracy.items():
        low, high = spread.mean.low, spread.mean.high
        if len(spread.values) < 2:  # what the number of problems alone allows
            low, high = collection.arms[arm][0].summary.after.interval or (low, high)
        moved = [run.divergence for run in collection.arms[arm] if run.divergence is not None]
        distance = f", {sum(moved) / len(moved):.3f} nats a token from the start" if moved else ""
        seeds = f" over {len(spread.values)} seeds" if len(spread.values) > 1 else ""
        lines.append(f"{arm:{width}}  accuracy {spread.mean.estimate:.3f} [{low:.3f}, {high:.3f}]{seeds}{distance}")
    return tuple(lines)


def dry_run(
    plan: Study, out: Path | None, workers: int | None, threads: int | None, ray: str | None, console: Console
) -> dict[str, Any]:
    """How many runs, how long, how much disk; nothing stays behind.

    Raises:
        InputError: the study cannot be used, or it is to run on other machines and no folder is given that they see.
    """
    if ray not in (None, "local") and out is None:
        raise InputError(
            f"--ray {ray}: needs --out, a folder that every node sees: the steps are timed beside it (nothing stays)"
        )
    check_arms(plan)
    with open_pool(workers, threads, ray) as pool:
        return estimate(plan, pool, console, out)


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """The estimate for a reader."""
    lines = (
        f"{plural(plan['runs'], 'run')}: {plan['arms']} arms x {plural(plan['seeds'], 'seed')}, "
        f"{plural(plan['workers'], 'worker')} with {plural(plan['threads'], 'thread')} each",
        f"about {duration(plan['seconds'])}: {plan['seconds_a_step']:.2f} s a step, "
        f"{plan['seconds_around_steps']:.1f} s around the steps of a run (responses may grow in training: then longer)",
        f"about {plan['megabytes']:.1f} MB on disk",
    )
    return "\n".join(lines).replace("\u00a0", " ")


def report(
    folders: Sequence[Path],
    out: Path | None,
    *,
    baseline: str | None,
    target: float | None,
    allow_mixed: bool,
    exports: Sequence[str] = (),
) -> list[str]:
    """Draw each folder's report again, or with ``out`` one that compares them all.

    Returns:
        The files that were written.

    Raises:
        InputError: the folders cannot be read or compared; one line.
    """
    if out is None:
        return [str(path) for folder in folders for path in _again(folder, allow_mixed, exports)]
    collection = gather(folders, baseline=baseline, target=target, allow_mixed=allow_mixed)
    with _one_line(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        return [str(path) for path in write_study_report(collection, out, exports)]


def _again(folder: Path, allow_mixed: bool, exports: Sequence[str]) -> list[Path]:
    with _one_line(str(folder)):
        if is_study(folder):
            return write_study_report(study_collection(folder, allow_mixed=allow_mixed), folder, exports)
        if exports:
            raise InputError(f"--export: {folder} is a single run; with --out its numbers are those of a comparison")
        page = write_report(folder)  # first: it reads every file
        return [write_curve(folder), page]


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """What a folder from elsewhere holds, or a disk that refuses, ends with one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{where}: cannot be written ({error.strerror})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputError(" ".join(str(error).split())) from error


__all__ = ["Outcome", "dry_run", "plan_in_words", "report", "study"]
