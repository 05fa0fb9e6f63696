"""Killed anywhere, stopped or damaged: a run resumes and ends as if nothing had happened, with the same bytes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos import harness, recipes
from chaos.comparing import differences
from chaos.harness import Ended, Fault
from mirrorpo.training.checkpoints import all_checkpoints, fault_of

Unbroken = Callable[[str], tuple[Path, Ended]]
NUM_KILLS = 2  # of each recipe; as many more are in test_coordinated.py, and fifty in `make chaos`


def place_to_die(done: Ended, number: int) -> int:
    """One in each part of a run's life, the same in every test run."""
    size = len(done.places)
    draw = random.Random(number)
    return draw.randint(1 + size * number // NUM_KILLS, size * (number + 1) // NUM_KILLS)


@pytest.mark.parametrize("number", range(NUM_KILLS))
@pytest.mark.parametrize("recipe", recipes.TRAINED)
def test_a_run_that_is_killed_anywhere_ends_bit_equal_to_the_unbroken_one(
    recipe: str, number: int, unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, done = unbroken_run(recipe)
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    arguments = recipes.arguments(recipe, run)
    killed = harness.run(arguments, run, scratch, Fault(kill_at=place_to_die(done, number)))
    assert killed.status == -signal.SIGKILL
    resumed = harness.to_the_end(arguments, run, scratch)
    assert resumed.status == 0, resumed.stderr
    assert differences(whole, run) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_behind_its_step_with_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, status: int, unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, done = unbroken_run("full")
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    arguments = recipes.arguments("full", run)
    # The line of step 2 is being written, behind its second update: the next one is the first on step 3's completions.
    # Before the first step the file is opened twice: looked for and begun.
    opened = [place for place, event in enumerate(done.places, 1) if event == "open /metrics.jsonl"]
    stopped = harness.run(arguments, run, scratch, Fault(signal_at=(opened[2 + 1], number)))
    assert stopped.status == status
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} after step 2 of 4; continue with: mirrorpo train arithmetic")
    assert last.endswith("--resume")
    assert all_checkpoints(run / "checkpoints")[0].name == "checkpoint-5"
    assert harness.to_the_end(arguments, run, scratch).status == 0
    assert differences(whole, run) == []


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [torn, flipped])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_is_used(
    harm: Callable[[Path], None], unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, _ = unbroken_run("lora")
    run = harness.copy_of(whole, tmp_path / "run")
    (run / "summary.json").unlink()
    newest, before = all_checkpoints(run / "checkpoints")
    harm(newest / "optimizer.pt")
    done = harness.to_the_end(recipes.arguments("lora", run), run, tmp_path / "scratch")
    assert done.status == 0, done.stderr
    assert f"{newest.name} is damaged and was set aside: optimizer.pt" in done.stderr
    assert f"going on from {before.name}" in done.stderr
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert [fault_of(path) for path in all_checkpoints(run / "checkpoints")] == [None, None]
    assert (run / "model/adapter_model.safetensors").read_bytes() == (
        whole / "model/adapter_model.safetensors"
    ).read_bytes()


def test_a_full_disk_stops_the_run_with_one_line_and_the_last_good_checkpoint(
    unbroken_run: Unbroken, tmp_path: Path
) -> None:
    whole, _ = unbroken_run("full")
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    arguments = recipes.arguments("full", run)
    stopped = harness.run(arguments, run, scratch, Fault(signal_at=(place_of_first_save(unbroken_run), signal.SIGTERM)))
    assert stopped.status == 143
    good = all_checkpoints(run / "checkpoints")
    # Weights fit, the optimiser's two moments do not.
    full = harness.run([*arguments, "--resume"], run, scratch, Fault(file_bytes=2_000_000))
    assert full.status == 1
    assert full.stderr.splitlines()[-1].startswith("failed: step ")
    assert "cannot be written" in full.stderr.splitlines()[-1]
    assert f"the last good one is {good[0]}" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert all_checkpoints(run / "checkpoints") == good
    assert fault_of(good[0]) is None
    assert not list(run.rglob(".writing-*"))
    assert harness.to_the_end(arguments, run, scratch).status == 0
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def place_of_first_save(unbroken_run: Unbroken) -> int:
    places = unbroken_run("full")[1].places
    return next(place for place, event in enumerate(places, 1) if "os.mkdir /checkpoints/.writing" in event)


def test_a_folder_in_use_is_refused_and_a_dead_process_does_not_hold_it(unbroken_run: Unbroken, tmp_path: Path) -> None:
    whole, _ = unbroken_run("lora")
    run = harness.copy_of(whole, tmp_path / "run")
    arguments = [*recipes.arguments("lora", run), "--resume"]
    with (run / ".lock").open("r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        refused = harness.run(arguments, run, tmp_path / "scratch")
        assert refused.status == 2
        assert "another process" in refused.stderr
        child = os.fork()  # holds the lock too, through the same open file
        if child == 0:
            signal.pause()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert harness.run(arguments, run, tmp_path / "scratch").status == 0
