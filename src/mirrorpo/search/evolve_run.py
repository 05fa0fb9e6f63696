"""Runner of a search: evolve, compare the best map with the first one on unseen problems, draw; in one run folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirrorpo.config.search import EvolveRecipe
from mirrorpo.divergences.neural.file import map_text
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.errors import InputError
from mirrorpo.files import one_line_if_refused, write_text_atomic
from mirrorpo.runs.folder import SUMMARY_FILE, RunFolder, commit_of_package, versions
from mirrorpo.search.evolution import FINAL_SEEDS, Candidate, Member, Outcome, search
from mirrorpo.search.member import JOB, held_out, payload
from mirrorpo.statistics import CHANGE, binomial_noise, mean_interval, wilson_interval
from mirrorpo.training.setup import prepare
from mirrorpo.wording import say
from mirrorpo.workers import Done, Job, Record, run_recorded
from mirrorpo.workers.jobs import Pool
from mirrorpo.workers.local import default_workers, open_pool, threads_each

BEST_MAP_FILE = "best_map.json"
HISTORY_FILE = "history.jsonl"
RECORD_FILE = "members.sqlite"
PICTURE_FILE = "evolution.png"

# Makes the pool for (number of threads of each worker, or None for its own choice).
MakePool = Callable[[int], Pool]


def evolve(
    recipe: EvolveRecipe,
    out: Path,
    *,
    make_pool: MakePool,
    threads: int,
    resume: bool,
    console: Console,
    command: str,
    function: str = JOB,
) -> dict[str, Any]:
    """Runs a search.

    Args:
        recipe: what to search.
        out: the run folder.
        make_pool: builds the workers, given the number of threads of each.
        threads: of each worker. A resumed search keeps those it began with: sums of another order are other numbers.
        resume: continue the search in the folder; no recorded member is repeated.
        console: for progress.
        command: how it was started, for the record.
        function: evaluates a member, ``"module:attribute"``; takes and gives what ``evaluate_member`` does.

    Returns:
        The content of ``summary.json``.

    Raises:
        InputError: the recipe or the folder cannot be used.
        SearchError: no direction; JobError: a member cannot be finished; RunError: the disk refused. What was recorded
            stays, ``--resume`` goes on.
    """
    started = time.monotonic()
    folder = RunFolder(out, recipe, resume, lambda line: say(console, line))
    try:
        if folder.finished:
            say(console, f"{out} is finished already")
            return folder.read_json(SUMMARY_FILE)
        try:
            record = Record(folder.path / RECORD_FILE)
        except ValueError as error:
            raise InputError(str(error)) from None
        pool = make_pool(record.settle("threads", threads))
        try:
            run = _Run(recipe, folder, record, pool, console, command, function)
            with one_line_if_refused(out, "what was finished is kept"):
                return run.finish(started)
        finally:
            pool.close()
            record.close()
    finally:
        folder.close()


class _Run:
    """A search in its folder."""

    def __init__(
        self,
        recipe: EvolveRecipe,
        folder: RunFolder,
        record: Record,
        pool: Pool,
        console: Console,
        command: str,
        function: str,
    ) -> None:
        self.recipe, self.folder, self.record, self.pool = recipe, folder, record, pool
        self.console, self.command, self.function = console, command, function
        self.start = recipe.start()

    def evaluate(self, members: Sequence[Member], split: str = "validation") -> dict[str, dict[str, Any]]:
        """Results of members, from the record or from the workers, with a bar."""
        jobs = [
            Job(
                key=member.key,
                function=self.function,
                payload=payload(self.recipe, member.parameters, member.seed, split),
            )
            for member in members
        ]
        name = members[0].key.partition("/")[0]
        columns = (TextColumn(f"evolving {name}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        known = self.record.results()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(name, total=len(jobs), completed=sum(job.key in known for job in jobs))

            def on_done(done: Done) -> None:
                progress.advance(bar)
                self._tell(done)

            return run_recorded(self.pool, jobs, self.record, on_done)

    def _tell(self, done: Done) -> None:
        failed = done.result["failed"]
        deaths = f", after {done.deaths} worker deaths" if done.deaths else ""
        if failed is not None:
            twin = f"; its twin {twin_of(done.job.key)} is left out with it" if "/p" in done.job.key else ""
            say(self.console, f"{done.job.key} failed ({failed}){twin}")
        else:
            say(self.console, f"{done.job.key}  fitness {done.result['fitness']:.4f}  {done.seconds:.1f} s{deaths}")

    def on_generation(self, history: list[dict[str, Any]], best: Candidate | None) -> None:
        """Writes what is known so far."""
        write_text_atomic(self.folder.path / HISTORY_FILE, "".join(json.dumps(line) + "\n" for line in history))
        line = history[-1]
        if best is None or "mean_fitness" not in line:
            return
        self._save_best(best, None)
        dropped = f", {len(line['dropped_pairs'])} pairs dropped" if line["dropped_pairs"] else ""
        say(
            self.console,
            f"generation {line['generation'] + 1}/{self.recipe.evolution.generations}: mean fitness "
            f"{line['mean_fitness']:.4f}, highest {line['highest_fitness']:.4f}; best so far {best.key}, "
            f"{best.score:+.4f} over its generation's mean{dropped}",
        )

    def _save_best(self, best: Candidate, comparison: dict[str, Any] | None) -> None:
        found = MirrorMap(best.parameters, f"evolved, {best.key} of a search with seed {self.recipe.evolution.seed}")
        about = {
            "command": self.command,
            "seed": self.recipe.evolution.seed,
            "member": best.key,
            "fitness": best.fitness,
            "leads": best.leads,
            "start": self.start.origin,
            "recipe": self.recipe.model_dump(mode="json"),
            "mirrorpo_version": version("mirrorpo"),
        }
        if comparison is not None:
            about["comparison"] = comparison
        write_text_atomic(self.folder.path / BEST_MAP_FILE, map_text(found, about))

    def finish(self, started: float) -> dict[str, Any]:
        """The search, the comparison, the files."""
        outcome = search(self.recipe.evolution, self.start.parameters, self.evaluate, self.on_generation)
        comparison = self.compared(outcome)
        self._save_best(outcome.best, comparison)
        summary = self.summary(outcome, comparison)
        summary["seconds"] = round(time.monotonic() - started, 2)
        from mirrorpo.reports.curve import draw

        draw(self.folder.path / PICTURE_FILE, outcome.history, self.start, MirrorMap(outcome.best.parameters))
        self.folder.write_json(SUMMARY_FILE, summary)
        return summary

    def compared(self, outcome: Outcome) -> dict[str, Any]:
        """Best and first map, each trained with seeds that the search never used, on test problems."""
        members = [
            Member(key=f"final/{name}{i}", parameters=parameters, seed=FINAL_SEEDS + i)
            for i in range(self.recipe.evolution.final_seeds)
            for name, parameters in (("best", outcome.best.parameters), ("start", self.start.parameters))
        ]
        results = self.evaluate(members, "test")
        return compare([results[m.key] for m in members[::2]], [results[m.key] for m in members[1::2]])

    def summary(self, outcome: Outcome, comparison: dict[str, Any]) -> dict[str, Any]:
        """What ``summary.json`` has."""
        recorded = self.record.results().values()
        members = [row for line in outcome.history for row in line["members"]]
        return {
            "task": self.recipe.task.name,
            "objective": self.recipe.objective.preset,
            "model": self.recipe.model.path,
            "seed": self.recipe.evolution.seed,
            "generations": len(outcome.history),
            "population": self.recipe.evolution.population,
            "inner_steps": self.recipe.train.steps,
            "stopped": outcome.stopped,
            "members": len(members),
            "failed_members": sum(row["failed"] is not None for row in members),
            "worker_deaths": sum(row.deaths for row in recorded),
            "best": outcome.history[-1]["best"],
            "first_mean_fitness": outcome.history[0]["mean_fitness"],
            "last_mean_fitness": outcome.history[-1]["mean_fitness"],
            "comparison": comparison,
            "trainings": len(recorded),
            "worker_seconds": round(sum(row.seconds for row in recorded), 2),
            "threads": self.record.settle("threads", torch.get_num_threads()),
            "seconds": 0.0,
            "command": self.command,
            "commit": commit_of_package(),
            "versions": versions(),
            "mirrorpo_version": version("mirrorpo"),
        }


def twin_of(key: str) -> str:
    """The other member of a pair.

    Example:
        >>> twin_of("g003/p1+")
        'g003/p1-'
    """
    return key[:-1] + {"+": "-", "-": "+"}[key[-1]]


# ---- comparison of the best map with the first


def compare(best: Sequence[dict[str, Any]], start: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of both maps on test problems, and their difference.

    Args:
        best: results of the best map, a training seed each.
        start: of the first map, with the same seeds in the same order.

    Returns:
        For each map the accuracy of every seed (None: that training failed), their mean, and the Wilson interval of the
        pooled completions (for these trainings); for the difference its mean over the seeds where both stand, with the
        95 % interval over the seeds, no narrower than the noise of the evaluation (None with fewer than two seeds).

    Example:
        >>> row = {"fitness": 0.5, "right": 5, "problems": 10, "samples": 1}
        >>> compare([row], [row])["difference"]
        0.0
    """
    both = [
        (ours, theirs)
        for ours, theirs in zip(best, start, strict=True)
        if ours["fitness"] is not None and theirs["fitness"] is not None
    ]
    pairs = [ours["fitness"] - theirs["fitness"] for ours, theirs in both]
    return {
        "best": _side(best),
        "start": _side(start),
        "difference": math.fsum(pairs) / len(pairs) if pairs else None,
        "difference_interval": _difference_interval(pairs, both) if len(pairs) > 1 else None,
        "seeds": len(pairs),
    }


def _side(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    stand = [r for r in results if r["fitness"] is not None]
    total = sum(r["problems"] * r["samples"] for r in stand)
    return {
        "accuracies": [r["fitness"] for r in results],
        "accuracy": math.fsum(r["fitness"] for r in stand) / len(stand) if stand else None,
        "interval": list(wilson_interval(sum(r["right"] for r in stand), total)) if total else None,
        "completions": total,
    }


def _difference_interval(pairs: Sequence[float], both: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    noises = [
        binomial_noise(math.fsum(r["fitness"] for r in side) / len(side), min(r["problems"] for r in side), len(side))
        for side in zip(*both, strict=True)
    ]
    found = mean_interval(pairs, noise=math.hypot(*noises), legal=CHANGE)
    return [found.low, found.high]


# ---- the command


def run(
    recipe: EvolveRecipe,
    out: Path,
    resume: bool,
    workers: int | None,
    threads: int | None,
    ray: str | None,
    console: Console,
    command: str,
) -> dict[str, Any]:
    """The search of a command line; see ``mirrorpo evolve --help``."""
    workers = min(workers or default_workers(), recipe.evolution.population + recipe.evolution.elites)
    check(recipe)
    threads = threads_each(workers) if threads is None else threads
    if ray is not None:  # now, not in make_pool: a cluster that cannot be reached leaves no folder behind
        from mirrorpo.workers.on_ray import connect

        connect(None if ray == "local" else ray, workers * threads)

    def make_pool(num_threads: int) -> Pool:
        return open_pool(workers, num_threads, recipe.evolution.max_deaths, ray)

    return evolve(
        recipe,
        out,
        make_pool=make_pool,
        threads=threads,
        resume=resume,
        console=console,
        command=command,
    )


def check(recipe: EvolveRecipe) -> None:
    """What would go wrong in a worker's start goes wrong here first, before a file is written.

    Raises:
        InputError: names the key.
    """
    held_out(prepare(recipe), recipe.evolution.validation_problems)


def sentences(summary: dict[str, Any], out: Path) -> str:
    """The result for people."""
    result = summary["comparison"]
    lines = [
        f"{summary['generations']} generations of {summary['population']} members in {summary['seconds']:.0f} s "
        f"({summary['stopped']}); mean fitness {summary['first_mean_fitness']:.3f} -> "
        f"{summary['last_mean_fitness']:.3f}",
        f"best map: {summary['best']['key']}, validation accuracy {summary['best']['fitness']:.3f}, "
        f"{summary['best']['lead']:+.3f} over its generation's mean",
    ]
    for name, words in (("best", "best map"), ("start", "first map")):
        side = result[name]
        if side["accuracy"] is not None:
            low, high = side["interval"]
            lines.append(
                f"{words}, test accuracy over {len(side['accuracies'])} seeds: {side['accuracy']:.4f} "
                f"[{low:.4f}, {high:.4f}]"
            )
    if result["difference_interval"] is not None:
        low, high = result["difference_interval"]
        lines.append(f"difference {result['difference']:+.4f} [{low:+.4f}, {high:+.4f}] (95 %, paired over seeds)")
    lines.append(f"map: {out / 'best_map.json'}; picture: {out / PICTURE_FILE}")
    return "\n".join(lines)


__all__ = [
    "BEST_MAP_FILE",
    "HISTORY_FILE",
    "PICTURE_FILE",
    "RECORD_FILE",
    "check",
    "compare",
    "evolve",
    "run",
    "sentences",
    "twin_of",
]
