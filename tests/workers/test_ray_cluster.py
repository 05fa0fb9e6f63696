"""A Ray cluster of several nodes, one of which is killed in mid-run: its job is done by another, once in the record."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.errors import InputError
from mirrorpo.workers import Job, Record, on_ray, run_recorded
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


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_something_else_answers_is_refused_before_ray_waits_for_it(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=r"nothing that speaks Ray's protocol answered within 0\.3 seconds"):
            RayPool(address, 1)


@pytest.mark.parametrize("address", ["ray://", "here", "127.0.0.1:port", "ray://127.0.0.1"])
def test_an_address_that_is_none_is_refused_with_the_legal_forms(address: str) -> None:
    with pytest.raises(InputError, match="must be local, auto, HOST:PORT or ray://HOST:PORT"):
        RayPool(address, 1)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_asks_for_a_token_is_told_in_one_line(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc

    class AsksForAToken(grpc.ServerInterceptor):
        def intercept_service(self, _continuation: Any, _details: Any) -> Any:
            def refuse(_request: Any, context: Any) -> None:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

            return grpc.unary_unary_rpc_method_handler(refuse)

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server = grpc.server(ThreadPoolExecutor(1), interceptors=(AsksForAToken(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(InputError, match="asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"):
            RayPool(f"{scheme}127.0.0.1:{port}", 1)
    finally:
        server.stop(None).wait()
