"""kill -9, of the coordinator and of its workers, at twenty random moments: the history is that of an unbroken search.

What is asserted does not depend on when the kills fall; the moments are spread by counting finished members.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mirrorpo.config.search import EvolveRecipe
from mirrorpo.config.train import recipe_from
from mirrorpo.search.evolve_run import evolve
from mirrorpo.search.member import JOB
from mirrorpo.workers import LocalPool
from serial_pool import SerialPool

KILLS = 4  # of the coordinator; as many of workers; `make chaos` has 50


def recipe(data: dict[str, Any]) -> EvolveRecipe:
    return recipe_from({"task": {"name": "arithmetic"}, **data}, (), "r", EvolveRecipe)


CHEAP = recipe({"evolution": {"generations": 12, "population": 8, "elites": 2, "acceptance": True, "max_deaths": 100}})
INNER = recipe(
    {
        "objective": {"coefficient": 1e4},
        "train": {
            "steps": 3,
            "prompts_per_step": 4,
            "group_size": 8,
            "learning_rate": 3e-3,
            "max_completion_length": 24,
        },
        "eval": {"problems": 8},
        "evolution": {"generations": 1, "population": 4, "sigma": 0.05, "validation_problems": 128, "final_seeds": 1},
    }
)


def coordinate(recipe: EvolveRecipe, out: Path, function: str, serial: bool, num_workers: int = 2) -> None:
    """A search, from the start or from where it was killed."""
    torch.set_num_threads(1)
    evolve(
        recipe,
        out,
        make_pool=lambda threads: SerialPool() if serial else LocalPool(num_workers, threads, 100),
        threads=1,
        resume=(out / "recipe.yaml").exists(),
        console=Console(quiet=True),
        command="mirrorpo evolve r",
        function=function,
    )


def finished(out: Path) -> int:
    """Members on record, as another process sees them."""
    if not (out / "members.sqlite").exists():
        return 0
    connection = sqlite3.connect(f"file:{out / 'members.sqlite'}?mode=ro", uri=True, timeout=30)
    try:
        return connection.execute("SELECT count(*) FROM results").fetchone()[0]
    except sqlite3.OperationalError:  # killed before the table was made
        return 0
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server() -> Any:
    """A clean process that has imported everything once; every coordinator is forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11's fork server ignores this process's sys.path while it preloads.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def kill_a_worker(pids: Path, draw: random.Random) -> bool:
    """Kills one of the processes that have worked, if one is alive."""
    alive = [int(p.name) for p in pids.iterdir() if Path(f"/proc/{p.name}").exists()]
    if not alive:
        return False
    os.kill(draw.choice(sorted(alive)), signal.SIGKILL)
    return True


def test_kills_change_nothing(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinate(CHEAP, tmp_path / "whole", "cheap_jobs:fitness", serial=True)
    total = finished(tmp_path / "whole")
    draw, out, pids = random.Random(0), tmp_path / "killed", tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("CHEAP_JOBS_FOLDER", str(pids))
    worker_kills = 0
    for number in range(KILLS):
        # at least one member more than when the last coordinator died, and most of the search left for the next ones
        goal = draw.randint(1, max(1, total * (number + 1) // (KILLS + 1) - finished(out))) + finished(out)
        process = server.Process(target=coordinate_child, args=(out, str(pids)))
        process.start()
        killed_one = False
        while finished(out) < goal:
            assert process.is_alive(), f"the coordinator ended by itself with status {process.exitcode}"
            if not killed_one and finished(out) >= goal - 1:
                killed_one = kill_a_worker(pids, draw)
            time.sleep(0.002)
        worker_kills += killed_one or kill_a_worker(pids, draw)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "summary.json").exists()
    assert worker_kills >= KILLS - 2  # a worker may be dying by itself when it is looked for
    coordinate(CHEAP, out, "cheap_jobs:fitness", serial=True)
    assert finished(out) == total
    for name in ("history.jsonl", "best_map.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def coordinate_child(out: Path, pids: str) -> None:
    os.environ["CHEAP_JOBS_FOLDER"] = pids
    coordinate(CHEAP, out, "cheap_jobs:fitness", serial=False)


def inner_child(out: Path) -> None:
    coordinate(INNER, out, JOB, serial=False, num_workers=1)


def test_a_killed_search_of_real_trainings_gives_the_same_in_another_process(server: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        coordinate(INNER, tmp_path / "whole", JOB, serial=True)
        process = server.Process(target=inner_child, args=(tmp_path / "killed",))
        process.start()
        while finished(tmp_path / "killed") < 2:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        coordinate(INNER, tmp_path / "killed", JOB, serial=True)
    finally:
        torch.set_num_threads(threads)
    for name in ("history.jsonl", "best_map.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
