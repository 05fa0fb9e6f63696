"""Killed anywhere, a run resumes and ends as if nothing had happened: the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from chaos import harness, recipes
from chaos.harness import Ended, Fault


@pytest.fixture(scope="module", params=list(recipes.RECIPES))
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Ended]:
    """A recipe, the folder of its unbroken run, and the places where that touched its files."""
    root = tmp_path_factory.mktemp(request.param)
    done = harness.run(recipes.train(request.param, root / "run"), root / "run", root / "scratch")
    assert done.status == 0, done.stderr
    assert len(done.places) > 50
    return request.param, root / "run", done


def places_to_die(done: Ended, number: int) -> list[int]:
    """Some in each part of a run's life, the same in every test run."""
    size = len(done.places)
    draw = random.Random(0)
    return [draw.randint(1 + size * i // number, size * (i + 1) // number) for i in range(number)]


@pytest.mark.parametrize("number", range(5))
def test_a_run_that_is_killed_at_any_place_ends_bit_equal_to_the_unbroken_one(
    unbroken: tuple[str, Path, Ended], number: int, tmp_path: Path
) -> None:
    recipe, whole, done = unbroken
    arguments = recipes.train(recipe, tmp_path / "run")
    killed = harness.run(
        arguments, tmp_path / "run", tmp_path / "scratch", Fault(kill_at=places_to_die(done, 5)[number])
    )
    assert killed.status == -signal.SIGKILL
    resumed = harness.to_the_end(arguments, tmp_path / "run", tmp_path / "scratch")
    assert resumed.status == 0, resumed.stderr
    assert harness.differences(whole, tmp_path / "run") == []
