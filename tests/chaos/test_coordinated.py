"""Searches and studies, whose work is done by workers: killed, stopped, or bereft of a worker, they end as if not."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos import harness, recipes
from chaos.comparing import differences, rows
from chaos.harness import Ended, Fault
from chaos.outside import Strike

Unbroken = Callable[[str], tuple[Path, Ended]]


def place(done: Ended, event: str) -> int:
    """The last place that begins so."""
    return max(number for number, passed in enumerate(done.places, 1) if passed.startswith(event))


def kill_before(event: str) -> Callable[[Ended], Fault]:
    return lambda done: Fault(kill_at=place(done, event))


def kill_behind(results: int) -> Callable[[Ended], Fault]:
    return lambda done: Fault(strike=Strike(behind=results))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("evolve", kill_before("os.rename /.recipe.yaml"), id="a search before its recipe is there"),
        pytest.param("evolve", kill_behind(3), id="a search within a generation"),
        pytest.param("evolve", kill_before("os.rename /.summary.json"), id="a search before its summary is there"),
        pytest.param("study", kill_before("os.rename /.study.yaml"), id="a study before its settings are there"),
        pytest.param("study", kill_behind(1), id="a study within a run"),
        pytest.param("study", kill_before("os.rename /.runs.csv"), id="a study within its report"),
    ],
)
def test_a_coordinator_that_is_killed_is_resumed_to_the_same_bytes(
    name: str, fault: Callable[[Ended], Fault], unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, done = unbroken_run(name)
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    killed = harness.run(recipes.arguments(name, out), out, scratch, fault(done))
    assert killed.status == -signal.SIGKILL
    resumed = harness.to_the_end(recipes.arguments(name, out), out, scratch)
    assert resumed.status == 0, resumed.stderr
    assert differences(whole, out) == []


@pytest.mark.parametrize("name", recipes.COORDINATED)
def test_sigterm_ends_it_at_once_with_one_line_and_no_worker_left_and_it_resumes_to_the_same_bytes(
    name: str, unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, _ = unbroken_run(name)
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    arguments = recipes.arguments(name, out)
    stopped = harness.run(arguments, out, scratch, Fault(strike=Strike(behind=1, number=signal.SIGTERM)))
    assert stopped.status == 143
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"stopped by SIGTERM; what was finished is kept; continue with: mirrorpo {name} ")
    assert last.endswith(" --resume")
    assert "Traceback" not in stopped.stderr
    assert stopped.workers
    assert not stopped.left
    before = keys_in_order(out)
    assert before
    resumed = harness.to_the_end(arguments, out, scratch)
    assert resumed.status == 0, resumed.stderr
    assert keys_in_order(out)[: len(before)] == before  # not one of them was done again
    assert differences(whole, out) == []


@pytest.mark.parametrize("name", recipes.COORDINATED)
def test_ctrl_c_reaches_workers_too_and_still_gives_one_line(name: str, tmp_path: Path) -> None:
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    to_all = Strike(behind=0, number=signal.SIGINT, at="group")  # while the worker still imports
    stopped = harness.run(recipes.arguments(name, out), out, scratch, Fault(strike=to_all, spawned=True))
    assert stopped.status == 130
    assert stopped.stderr.startswith(f"stopped by SIGINT; what was finished is kept; continue with: mirrorpo {name} ")
    assert stopped.stderr.endswith(" --resume\n")
    assert stopped.stderr.count("\n") == 1
    assert stopped.workers
    assert not stopped.left


def test_a_worker_that_is_killed_is_replaced_and_changes_nothing(unbroken_run: Unbroken, tmp_path: Path) -> None:
    whole, _ = unbroken_run("study")
    out = tmp_path / "run"
    fault = Fault(strike=Strike(behind=1, at="worker"))
    ended = harness.run(recipes.arguments("study", out), out, tmp_path / "scratch", fault)
    assert ended.status == 0, ended.stderr
    assert deaths(out) == 1
    assert differences(whole, out) == []


def test_a_full_disk_ends_a_study_with_one_line_and_its_runs_are_kept(unbroken_run: Unbroken, tmp_path: Path) -> None:
    whole, _ = unbroken_run("study")
    out = harness.copy_of(whole, tmp_path / "run")
    (out / "report.html").unlink()
    arguments = recipes.arguments("study", out)
    full = harness.run([*arguments, "--resume"], out, tmp_path / "scratch", Fault(file_bytes=30_000))
    assert full.status == 1
    assert full.stderr.splitlines()[-1].startswith(f"failed: {out}: cannot be written (File too large); the runs that")
    assert "Traceback" not in full.stderr
    assert rows(out / "study.sqlite") == rows(whole / "study.sqlite")
    assert not list(out.glob(".*.tmp"))


def keys_in_order(out: Path) -> list[str]:
    """Recorded jobs, oldest first."""
    return _read(out, "SELECT key FROM results ORDER BY rowid")


def deaths(out: Path) -> int:
    """How many workers the recorded jobs had cost."""
    return sum(_read(out, "SELECT deaths FROM results"))


def _read(out: Path, query: str) -> list:
    (path,) = out.glob("*.sqlite")
    connection = sqlite3.connect(path)
    try:
        return [value for (value,) in connection.execute(query)]
    finally:
        connection.close()
