"""A Ray cluster of several nodes, one of which is killed in mid-run: its job is done by another, once in the record."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.workers import Job, Record, run_recorded
from mirrorpo.workers.on_ray import RayPool

pytest.importorskip("ray")
_DEADLINE = 90.0


@pytest.fixture
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    for _ in range(2):
        made.add_node(**small)
    yield made
    made.shutdown()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Any) -> None:
    end = time.monotonic() + _DEADLINE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_node_that_is_killed_loses_no_job_and_doubles_none(cluster: Any, tmp_path: Path) -> None:
    jobs = [Job(key=f"j{i}", function="cheap_jobs:wait_for_go", payload=str(tmp_path)) for i in range(5)]

    def kill_a_node() -> None:
        # Three jobs are begun, one on each node, before one node goes; the others wait for a free actor.
        wait_until(lambda: len(list(tmp_path.glob("begun *"))) == 3)
        begun = [int(entry.name.split()[1]) for entry in tmp_path.glob("begun *")]
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        wait_until(lambda: not all(is_alive(pid) for pid in begun))  # it must not answer any more
        (tmp_path / "go").touch()

    thread = threading.Thread(target=kill_a_node)
    record = Record(tmp_path / "record.sqlite")
    with RayPool(cluster.address, num_workers=3) as pool:
        thread.start()
        results = run_recorded(pool, jobs, record)
    thread.join()
    assert results == {job.key: "went" for job in jobs}
    kept = record.results()
    assert sorted(kept) == sorted(results)
    assert sorted(row.deaths for row in kept.values()) == [0, 0, 0, 0, 1]
    # Resuming runs nothing: without a pool there would be nobody to run it.
    assert run_recorded(None, jobs, record) == results  # pyright: ignore[reportArgumentType]
