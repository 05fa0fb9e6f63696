"""Folders that version 0.1 wrote (commit 356ced2): they are reported, resumed and refused as those of today."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from mirrorpo.cli.study_commands import report
from mirrorpo.config.search import EvolveRecipe
from mirrorpo.config.study import load_study
from mirrorpo.config.train import Recipe, load_recipe
from mirrorpo.errors import InputError
from mirrorpo.evaluation.eval_run import SamplesFile
from mirrorpo.reports.study_page import as_json
from mirrorpo.runs.folder import RunFolder
from mirrorpo.runs.reader import read_before, recorded_steps
from mirrorpo.search.evolve_run import evolve
from mirrorpo.studies.gather import study_collection
from mirrorpo.training.run import train

OLD = Path(__file__).with_name("written_by_0_1")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folders, with their databases (kept as SQL text)."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    for script in (folder / "study" / "study.sql", folder / "search" / "members.sql"):
        database = sqlite3.connect(script.with_suffix(".sqlite"))
        database.executescript(script.read_text())
        database.close()
        script.unlink()
    return folder


RECIPES = sorted((OLD / "recipes").rglob("*.yaml"))


def test_there_are_ten_recipes_and_at_least_three_run_folders() -> None:
    assert len(RECIPES) == 10
    assert len(list(OLD.rglob("metrics.jsonl"))) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(OLD / "recipes")))
def test_a_recipe_loads_and_its_objective_is_built(path: Path) -> None:
    if path.parent.name == "studies":
        built = [recipe.objective.build() for recipe in load_study(path, []).arms.values()]
        assert len(built) > 1
    elif path.parent.name == "evolve":
        assert load_recipe(path, kind=EvolveRecipe).objective.build().penalties
    else:
        assert load_recipe(path).objective.build().name == load_recipe(path).objective.preset


def test_a_run_and_a_study_are_reported(old: Path) -> None:
    written = report([old / "run", old / "study"], None, baseline=None, target=None, allow_mixed=False)
    assert [Path(path).name for path in written] == [
        "curve.png", "report.html", "report.html", "report.md", "runs.csv"
    ]  # fmt: skip
    assert "Accuracy rose from 25.0" in (old / "run" / "report.html").read_text()


def test_two_seeds_that_agree_are_no_longer_called_the_same(old: Path) -> None:
    # 0.1 wrote "1 the same within 2.0 points" about these two seeds of three problems each.
    found = as_json(study_collection(old / "study"))
    assert found["verdicts"] == {"higher": [], "lower": [], "same": [], "open": ["grpo"]}
    assert "the same" not in found["headline"]


def test_a_run_and_a_search_open_for_their_own_recipe_and_no_other(old: Path) -> None:
    for name, kind in (("run", Recipe), ("search", EvolveRecipe)):
        recipe = load_recipe(old / name / "recipe.yaml", kind=kind)
        folder = RunFolder(old / name, recipe, resume=True)
        assert folder.finished
        folder.close()
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 9})})
        with pytest.raises(InputError, match=r"--resume: train\.steps is 9"):
            RunFolder(old / name, other, resume=True)


def test_finished_ones_are_not_run_again(old: Path) -> None:
    quiet = Console(quiet=True)
    recipe = load_recipe(old / "run" / "recipe.yaml")
    assert train(recipe, old / "run", resume=True, console=quiet, command="")["accuracy_after"] == 1.0
    searched = evolve(
        load_recipe(old / "search" / "recipe.yaml", kind=EvolveRecipe),
        old / "search",
        make_pool=lambda threads: pytest.fail("a finished search needs no worker"),
        threads=1,
        resume=True,
        console=quiet,
        command="",
    )
    assert searched["generations"] == 2


def test_what_a_resumed_run_takes_up_is_read(old: Path) -> None:
    assert len(recorded_steps(old / "run")) == 4
    before = read_before(old / "run")
    assert before is not None
    assert before["summary"] == {**before["summary"], "accuracy": 0.25, "problems": 8}


def test_an_evaluations_samples_are_taken_up_in_whole_batches(old: Path) -> None:
    samples = SamplesFile(old / "evaluation" / "samples.jsonl")
    summary = json.loads((old / "evaluation" / "summary.json").read_text())
    assert len(samples.take_up(batch_size=12, total=12)) == summary["problems"] * summary["samples_per_problem"] == 12
    assert len(samples.take_up(batch_size=5, total=20)) == 10
