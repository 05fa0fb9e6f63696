"""What does a study add to its runs, and how long does its report take? (about 5 min; --quick 1 min)

Orchestration: the same two runs of the demo's task, first by ``train`` alone, then through worker, record, divergence
from the start and pruning; the worker's start, which a study pays once, stands by itself. A short run (8 steps, about
10 s) by processor time, which other programs do not change: what its job takes beyond ``train``. Report: 20 arms x 10
seeds of simulated runs of 60 steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from mirrorpo.config.study import Study, study_from
from mirrorpo.interrupts import quiet
from mirrorpo.reports.study_page import write_study_report
from mirrorpo.studies.collection import Collection, by_seed, read_run
from mirrorpo.studies.job import run_job
from mirrorpo.studies.runner import open_pool, open_study, run_study
from mirrorpo.training.run import train
from mirrorpo.workers import Job
from timing import parser, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "studies"))
from simulated import write_simulated

SILENT = Console(quiet=True)


def plan(steps: int) -> Study:
    """Two arms, one seed: two runs."""
    return study_from(
        {"base": "arithmetic", "arms": ["prob_l2_grpo", "dr_grpo"], "seeds": [0], "baseline": "dr_grpo"},
        [f"base.train.steps={steps}", "base.train.save_every=1000"],
    )


def bare(study: Study, folder: Path) -> float:
    """Seconds of the runs by themselves, one after the other, after a short one that warms up."""
    folder.mkdir()
    train(plan(1).jobs()[0].recipe, folder / "warm", resume=False, console=SILENT, command="")
    started = time.perf_counter()
    for n, job in enumerate(study.jobs()):
        train(job.recipe, folder / str(n), resume=False, console=SILENT, command="")
    return time.perf_counter() - started


def studied(study: Study, folder: Path) -> tuple[float, float]:
    """Seconds of a worker's start, and of the same runs as a study in it."""
    with open_pool(1, torch.get_num_threads()) as pool:
        started = time.perf_counter()
        # Any function of the module that runs a study's jobs: importing it is what a start costs.
        list(pool.run([Job(key="start", function="mirrorpo.studies.job:json.dumps", payload={})]))
        start = time.perf_counter() - started
        started = time.perf_counter()
        with open_study(study, folder, False, "") as record:
            run_study(study, folder, record, pool, SILENT, command="")
        return start, time.perf_counter() - started


def short_run(folder: Path) -> float:
    """Processor time of a job of 8 steps over that of its ``train``, in percent above 1; the second of two jobs."""
    recipe = study_from(
        {"base": "arithmetic", "arms": ["dr_grpo"], "seeds": [0]},
        [
            "base.task.difficulty=hard",
            "base.train.steps=8",
            "base.train.group_size=4",
            "base.train.updates_per_batch=4",
        ],
    ).jobs()[0]
    inside = [0.0]

    def timed(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return train(*args, **options)
        finally:
            inside[0] = time.process_time() - began

    share = 0.0
    with patch("mirrorpo.training.run.train", timed):
        for number in range(2):
            job = {"recipe": recipe.recipe.model_dump(mode="json"), "folder": str(folder / str(number)), "command": ""}
            began = time.process_time()
            run_job({**job, "threads": torch.get_num_threads(), "keep_models": False, "measure_divergence": True})
            share = 100 * ((time.process_time() - began) / inside[0] - 1)
    return share


def report(folder: Path) -> tuple[float, float]:
    """Seconds and megabytes of the report of 200 runs."""
    runs = {}
    for n in range(20):
        arm = f"arm{n:02d}"
        accuracies = [0.6 + 0.01 * n + 0.001 * seed for seed in range(10)]
        runs[arm] = [write_simulated(folder / arm / str(s), arm, s, a, steps=60) for s, a in enumerate(accuracies)]
    started = time.perf_counter()
    arms = {arm: by_seed(arm, [read_run(path, arm) for path in found]) for arm, found in runs.items()}
    collection = Collection(title="Simulated", arms=arms, baseline="arm00", target=0.7, margin=0.02)
    html = write_study_report(collection, folder)[0]
    return time.perf_counter() - started, html.stat().st_size / 1e6


def main() -> None:
    args = parser(__doc__).parse_args()
    quiet()
    folder = Path(tempfile.mkdtemp())
    seconds, megabytes = report(folder / "report")
    show("report of 200 runs", {"seconds (aim 10)": seconds, "megabytes (aim 5)": megabytes}, "", args.json)
    steps = 10 if args.quick else 60
    alone = bare(plan(steps), folder / "bare")
    start, through = studied(plan(steps), folder / "study")
    rows = {
        f"two runs of {steps} steps, bare (s)": alone,
        "the same as a study (s)": through,
        "a worker's start, once (s)": start,
        "orchestration (%, aim 3)": 100 * (through / alone - 1),
        "of a short run, processor time (%, aim 3)": short_run(folder / "short"),
    }
    show("orchestration", rows, "", args.json)


if __name__ == "__main__":
    main()
