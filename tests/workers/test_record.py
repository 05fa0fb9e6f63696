"""The record of finished jobs."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from mirrorpo.workers import Job, JobError, Record, run_recorded


def test_results_come_back_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.sqlite")
    record.add("b", "x", {"fitness": 0.1}, seconds=2.0, deaths=1)
    record.add("a", "y", None)
    record.close()
    results = Record(tmp_path / "r.sqlite").results()
    assert list(results) == ["b", "a"]
    assert (results["b"].result, results["b"].seconds, results["b"].deaths) == ({"fitness": 0.1}, 2.0, 1)
    assert results["a"].result is None


def test_a_second_result_for_a_key_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.sqlite")
    record.add("a", "x", 1)
    with pytest.raises(ValueError, match="job 'a' has a result already"):
        record.add("a", "x", 2)
    assert record.results()["a"].result == 1


def test_a_result_that_is_no_json_is_refused(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.sqlite")
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.add("a", "x", math.nan)
    assert record.results() == {}


def test_another_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(ValueError, match="is not a record of jobs"):
        Record(tmp_path / "r.sqlite")


def test_what_add_returned_for_survives_a_kill(tmp_path: Path) -> None:
    path, child = tmp_path / "r.sqlite", os.fork()
    if child == 0:  # no cleanup of any kind runs here after the kill
        record = Record(path)
        for i in range(5):
            record.add(str(i), "x", i)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN")
        connection.execute("INSERT INTO results (key, digest, result, seconds, deaths) VALUES ('half', 'x', '1', 0, 0)")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(Record(path).results()) == ["0", "1", "2", "3", "4"]


class Counting:
    """A pool that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, jobs):  # type: ignore[no-untyped-def]
        from mirrorpo.workers import Done
        from mirrorpo.workers.jobs import call

        for job in reversed(jobs):
            self.asked.append(job.key)
            yield Done(job=job, result=call(job.function, job.payload)[0], seconds=0.0)

    def close(self) -> None: ...


def jobs(*numbers: float) -> list[Job]:
    return [Job(key=f"n{x}", function="cheap_jobs:square", payload=x) for x in numbers]


def test_recorded_jobs_are_not_run_again(tmp_path: Path) -> None:
    record, pool = Record(tmp_path / "r.sqlite"), Counting()
    assert run_recorded(pool, jobs(1, 2), record) == {"n1": 1, "n2": 4}
    assert list(run_recorded(pool, jobs(3, 2, 1), record).items()) == [("n3", 9), ("n2", 4), ("n1", 1)]
    assert pool.asked == ["n2", "n1", "n3"]


def test_another_job_under_a_recorded_key_is_an_error(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.sqlite")
    run_recorded(Counting(), jobs(1), record)
    with pytest.raises(JobError, match=r"job n1: .* holds the result of another job under this key"):
        run_recorded(Counting(), [Job(key="n1", function="cheap_jobs:square", payload=5)], record)


def test_a_key_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="duplicate job key 'n1'"):
        run_recorded(Counting(), jobs(1, 1), Record(tmp_path / "r.sqlite"))
