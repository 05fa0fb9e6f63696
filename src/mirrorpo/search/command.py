"""What does ``mirrorpo evolve`` do with its options? Checks them, makes the workers, says the result in sentences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from mirrorpo.config.search import EvolveRecipe
from mirrorpo.search.member import held_out
from mirrorpo.search.run import PICTURE_FILE, evolve
from mirrorpo.training.setup import prepare
from mirrorpo.workers import LocalPool
from mirrorpo.workers.jobs import Pool
from mirrorpo.workers.local import threads_each


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
    import torch

    if workers is None:
        workers = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    workers = min(workers, recipe.evolution.population + recipe.evolution.elites)
    check(recipe)
    threads = threads_each(workers) if threads is None else threads
    address = None if ray == "local" else ray
    if ray is not None:  # now, not in make_pool: a cluster that cannot be reached shall leave no folder behind
        from mirrorpo.workers.on_ray import connect

        connect(address, workers * threads)

    def make_pool(num_threads: int) -> Pool:
        if ray is None:
            return LocalPool(workers, num_threads, recipe.evolution.max_deaths)
        from mirrorpo.workers.on_ray import RayPool

        return RayPool(address, workers, num_threads, recipe.evolution.max_deaths)

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


__all__ = ["check", "run", "sentences"]
