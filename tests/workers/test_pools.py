"""Worker processes and Ray actors: the same jobs, the same answers, the same deaths."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.errors import InputError
from mirrorpo.workers import Job, JobError, LocalPool, Record, run_recorded
from mirrorpo.workers.on_ray import RayPool


def make(kind: str, max_deaths: int = 2) -> Any:
    if kind == "ray":
        pytest.importorskip("ray")
        return RayPool(None, 2, 1, max_deaths)
    return LocalPool(2, 1, max_deaths)


@pytest.fixture(scope="module", params=["local", "ray"])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    with make(request.param) as made:
        yield made


def job(function: str, payload: Any, key: str = "j") -> Job:
    return Job(key=key, function=f"cheap_jobs:{function}", payload=payload)


def test_every_job_is_answered(pool: Any) -> None:
    done = list(pool.run([job("square", x, f"j{x}") for x in range(7)]))
    assert sorted((d.job.payload, d.result) for d in done) == [(x, x * x) for x in range(7)]


def test_workers_live_long(pool: Any) -> None:
    first = {d.result for d in pool.run([job("process", None, str(i)) for i in range(6)])}
    second = {d.result for d in pool.run([job("process", None, str(i)) for i in range(6)])}
    assert os.getpid() not in first | second
    assert len(first | second) <= 2


def test_workers_have_the_threads_that_were_asked_for(pool: Any) -> None:
    assert {d.result for d in pool.run([job("threads", None, str(i)) for i in range(4)])} == {1}


def test_an_exception_names_job_and_reason(pool: Any) -> None:
    with pytest.raises(JobError, match=r"job j: ValueError: no such thing \(cheap_jobs.py, line \d+\)") as raised:
        list(pool.run([job("square", 1, "i"), job("raises", "no such thing")]))
    assert raised.value.key == "j"


def test_the_error_of_a_job_keeps_its_key_when_it_is_pickled() -> None:
    error = pickle.loads(pickle.dumps(JobError("arm: x/seed1#2", "ValueError: y")))
    assert (error.key, error.reason, str(error)) == (
        "arm: x/seed1#2",
        "ValueError: y",
        "job arm: x/seed1#2: ValueError: y",
    )


def test_a_result_that_is_no_json_is_an_error_of_its_job(pool: Any) -> None:
    with pytest.raises(JobError, match="job j: ValueError: Out of range float values are not JSON compliant"):
        list(pool.run([job("no_json", None)]))


def test_a_job_whose_worker_dies_is_run_again(pool: Any, tmp_path: Path) -> None:
    (done,) = pool.run([job("die_first", str(tmp_path / "marker"))])
    assert (done.result, done.deaths) == ("alive", 1)


def test_a_deadly_job_is_an_error_and_what_was_finished_stays(pool: Any, tmp_path: Path) -> None:
    record = Record(tmp_path / "r.sqlite")
    run_recorded(pool, [job("square", 3, "before")], record)
    with pytest.raises(JobError, match=r"job deadly: 2 (workers|actors) died over it") as raised:
        run_recorded(pool, [job("die", None, "deadly")], record)
    assert raised.value.key == "deadly"
    assert {key: row.result for key, row in record.results().items()} == {"before": 9}
    assert [d.result for d in pool.run([job("square", 4)])] == [16]  # the pool works on


def test_a_worker_that_is_killed_while_idle_is_replaced(pool: Any) -> None:
    list(pool.run([job("square", 1)]))
    for process in pool.process_ids:
        os.kill(process, signal.SIGKILL)
    (done,) = pool.run([job("square", 5)])
    assert done.result == 25


def test_the_signal_that_killed_is_named() -> None:
    with LocalPool(1, 1, max_deaths=1) as pool, pytest.raises(JobError, match="the last by SIGKILL"):
        list(pool.run([job("die", None)]))


def test_closing_leaves_no_process() -> None:
    with LocalPool(1, 1) as pool:
        list(pool.run([job("square", 1)]))
        (process,) = pool.process_ids
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_workers_end_when_their_coordinator_is_killed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        pool = LocalPool(1, 1)
        list(pool.run([job("square", 1)]))
        (tmp_path / "half").write_text(str(pool.process_ids[0]))
        (tmp_path / "half").rename(tmp_path / "worker")
        list(pool.run([job("nap", 600)]))
    while not (tmp_path / "worker").exists():
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    worker = Path("/proc") / (tmp_path / "worker").read_text()
    for _ in range(500):  # ends at once; nobody may be there to reap it, so a zombie counts as ended
        if not worker.exists() or (worker / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the worker still runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_workers must be at least 1, got 0"), ((1, 0), "num_threads must be"), ((1, 1, 0), "max_deaths must")],
)
def test_numbers_below_one_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalPool(*arguments)


def test_without_ray_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs the extra 'ray': pip install 'mirrorpo\[ray\]'"):
        RayPool(None, 1)
