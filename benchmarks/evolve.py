"""What does a member cost beyond its training, and what does a second worker give? One thread each (10 min).

Overhead: everything that a member is charged beside ``trainer.train()`` and the measurement of its fitness: another map
(its table), the trainer put back, the job's way to a worker and back, the record. Throughput: the same members through
one worker and through two, all loaded before; needs two free cores.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mirrorpo.config.objective_file import find_recipe
from mirrorpo.config.search import EvolveRecipe
from mirrorpo.config.train import load_recipe
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.interrupts import quiet
from mirrorpo.search.member import JOB, Workshop, payload, restart
from mirrorpo.workers import Job, LocalPool, Record, run_recorded
from timing import parser


def overhead(recipe: EvolveRecipe, rounds: int) -> dict[str, float]:
    """Medians in seconds: bare training, the same with another map and a reset, a job's way, the measurement."""
    shop = Workshop(recipe)
    maps = [MirrorMap.random(seed).parameters.tolist() for seed in range(2)]
    bare, whole, measured = [], [], []
    for number in range(rounds + 1):  # the first round warms up
        restart(shop.trainer, shop.start, shop.objective(maps[0]), recipe.train.seed)
        begun = time.perf_counter()
        shop.trainer.train()
        bare.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        shop.train(shop.objective(maps[0]), 0)  # the same seed and map: the same completions
        whole.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        shop.measure(number, "validation")
        measured.append(time.perf_counter() - begun)
    return {
        "bare training": statistics.median(bare[1:]),
        "training as a member": statistics.median(whole[1:]),
        "a job's way": way_of_a_job(recipe),
        "measuring fitness": statistics.median(measured[1:]),
    }


def way_of_a_job(recipe: EvolveRecipe) -> float:
    """Seconds from the coordinator to a worker, back, and onto the record, for a real payload and no work."""
    data = payload(recipe, MirrorMap.random(0).parameters, 0, "validation")
    jobs = [Job(key=str(i), function="json:dumps", payload=data) for i in range(40)]
    with LocalPool(1, 1) as pool, tempfile.TemporaryDirectory() as folder:
        list(pool.run(jobs[:1]))
        begun = time.perf_counter()
        run_recorded(pool, jobs, Record(Path(folder) / "r.sqlite"))
        return (time.perf_counter() - begun) / len(jobs)


def throughput(recipe: EvolveRecipe, rounds: int, members: int) -> dict[int, float]:
    """Members per hour with one and with two workers, in turn."""
    numbers = torch.stack([MirrorMap.random(seed).parameters for seed in range(members)])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with LocalPool(1, 1) as one, LocalPool(2, 1) as two:
        for number in range(rounds + 1):
            for workers, pool in ((1, one), (2, two)) if number % 2 else ((2, two), (1, one)):
                count = 2 if number == 0 else members  # the first round loads the model in every worker
                jobs = [
                    Job(key=str(i), function=JOB, payload=payload(recipe, numbers[i], number, "validation"))
                    for i in range(count)
                ]
                begun = time.perf_counter()
                list(pool.run(jobs))
                seconds[workers].append(time.perf_counter() - begun)
    return {workers: members * 3600 / statistics.median(found[1:]) for workers, found in seconds.items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    quiet()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    overrides = ["train.steps=8", "evolution.validation_problems=64"] if args.quick else []
    recipe = load_recipe(find_recipe("evolve/embedded"), overrides, EvolveRecipe)
    seconds = overhead(recipe, 3)
    extra = seconds["training as a member"] + seconds["a job's way"]
    rates = throughput(recipe, 1 if args.quick else 2, 4)
    values = {
        **{f"{name} (s)": value for name, value in seconds.items()},
        "overhead of a member (%)": 100 * (extra / seconds["bare training"] - 1),
        "members per hour, 1 worker": rates[1],
        "members per hour, 2 workers": rates[2],
        "2 workers over 1": rates[2] / rates[1],
    }
    if args.json:
        print(json.dumps({"title": "evolution", "values": values}))
        return
    for name, value in values.items():
        print(f"  {name:<30}  {value:10.4f}")


if __name__ == "__main__":
    main()
