"""A study file is checked whole before anything runs: one line that names the key and the legal values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mirrorpo.config.search import EvolveRecipe, LearnRecipe
from mirrorpo.config.shipped import shipped_recipes
from mirrorpo.config.study import load_study, study_from
from mirrorpo.config.train import Recipe, load_recipe
from mirrorpo.errors import InputError

BASE = {
    "base": "arithmetic",
    "arms": {"dr_grpo": {"objective": {"preset": "dr_grpo"}}, "grpo": {"objective": {"preset": "grpo"}}},
    "seeds": [0, 1],
    "baseline": "dr_grpo",
}
STUDIES = {name: path for name, path in shipped_recipes().items() if name.startswith("studies/")}


@pytest.mark.parametrize("path", STUDIES.values(), ids=str)
def test_every_shipped_study_is_valid(path: Path) -> None:
    study = load_study(path)
    assert len(study.jobs()) == sum(len(seeds) for seeds in study.seeds.values())


def test_the_grid_runs_seed_by_seed_and_only_the_seed_differs_within_an_arm() -> None:
    jobs = study_from(BASE).jobs()
    assert [job.name for job in jobs] == ["dr_grpo/seed0", "grpo/seed0", "dr_grpo/seed1", "grpo/seed1"]
    first, second = (job.recipe.model_dump() for job in jobs if job.arm == "grpo")
    assert (first["train"].pop("seed"), second["train"].pop("seed")) == (0, 1)
    assert first == second


def test_the_arms_of_a_seed_share_everything_they_do_not_change() -> None:
    study = study_from(BASE, ["base.train.steps=7", "base.eval.problems=32"])
    one, other = (recipe.model_dump() for recipe in study.arms.values())
    assert one.pop("objective") != other.pop("objective")
    assert one == other
    assert one["train"]["steps"] == 7


def test_an_arm_that_names_a_preset_drops_the_options_of_the_bases() -> None:
    # The base is prob_l2_grpo with a coefficient, which dr_grpo would refuse.
    arms = {"a": {"objective": {"coefficient": 0.5}}, "b": {"objective.preset": "dr_grpo"}, "c": {}}
    study = study_from({**BASE, "arms": arms, "baseline": "c"})
    specs = {name: recipe.objective.spec() for name, recipe in study.arms.items()}
    assert specs["a"] == {"preset": "prob_l2_grpo", "coefficient": 0.5}
    assert specs["b"] == {"preset": "dr_grpo"}
    assert specs["c"] == {"preset": "prob_l2_grpo", "coefficient": 1e-4}


def test_a_grid_is_every_combination() -> None:
    grid = {"objective.preset": ["dr_grpo", "grpo"], "train.learning_rate": [1e-4, 2e-4]}
    study = study_from({**BASE, "arms": None, "grid": grid, "baseline": "grpo+learning_rate=0.0002"})
    found = {(r.objective.preset, r.train.learning_rate) for r in study.arms.values()}
    assert found == {("dr_grpo", 1e-4), ("dr_grpo", 2e-4), ("grpo", 1e-4), ("grpo", 2e-4)}


def test_arms_may_be_a_list_of_presets_and_seeds_a_range() -> None:
    study = study_from({**BASE, "arms": ["dr_grpo", "cispo"], "seeds": {"first": 3, "count": 2}})
    assert [recipe.objective.preset for recipe in study.arms.values()] == ["dr_grpo", "cispo"]
    assert set(study.seeds.values()) == {(3, 4)}


def test_one_seed_is_allowed() -> None:
    assert len(study_from({**BASE, "seeds": [5]}).jobs()) == 2


def _arms(**change: Any) -> dict[str, Any]:
    return {"arms": {"dr_grpo": {"objective": {"preset": "dr_grpo"}}, "g": change}}


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({"baseline": "grp"}, ["baseline: unknown arm 'grp'", "did you mean 'grpo'", "Legal: dr_grpo, grpo"]),
        ({"seeds": []}, ["seeds: must list at least one seed"]),
        ({"seeds": [0, 0]}, ["seeds: duplicate seed 0"]),
        ({"seeds": 3}, ["seeds: must be a list of integers >= 0, or first and count", "got 3"]),
        ({"seeds": {"first": 0, "cnt": 3}}, ["seeds: must be a list"]),
        ({"seeds": [-1]}, ["seeds: must be a list of integers >= 0"]),
        ({"seeds": {"first": 0, "count": 9999}}, ["19,998 runs; a study has at most 10,000"]),
        ({"arms": {}}, ["at least 1 arm, got 0"]),
        ({"baseline": None}, ["baseline: missing", "dr_grpo, grpo"]),
        ({"arms": ["dr_grpo", "dr_grpo"]}, ["arms: duplicate arm 'dr_grpo'"]),
        ({"arms": {"dr_grpo": {}, "../x": {}}}, ["name '../x'", "it names a folder"]),
        ({"arms": {"dr_grpo": 3, "b": {}}}, ["arms: must be a mapping from names to changed keys"]),
        (_arms(seeds=[7]), ["arms.g: no seed in common with the baseline 'dr_grpo': 7 and 0, 1"]),
        (_arms(seeds="x"), ["arms.g: seeds: must be a list of integers"]),
        (_arms(**{"objective.preset": "grpoo"}), ["arms.g: objective", "did you mean 'grpo'"]),
        (_arms(train={"stpes": 3}), ["arms.g: unknown key 'train.stpes'", "did you mean 'steps'"]),
        (_arms(**{"train.steps.x": 3}), ["arms.g: key 'train.steps.x': steps is not a group of keys"]),
        (_arms(train={"seed": 3}), ["arms.g: train.seed: the study's seeds decide it"]),
        (_arms(**{"train.seed": 3}), ["arms.g: train.seed: the study's seeds decide it"]),
        ({"grid": {}}, ["give either arms", "or grid"]),
        ({"arms": None, "grid": {"train.steps": []}}, ["grid.train.steps: must list at least one value"]),
        ({"base": "arithmetics"}, ["unknown recipe 'arithmetics'", "did you mean 'arithmetic'"]),
        ({"base": 3}, ["base: must be a recipe's name"]),
        ({"target": 0}, ["target", "greater than 0", "got 0"]),
        ({"margin": 2}, ["margin", "less than or equal to 1", "got 2"]),
        ({"baselin": "x"}, ["unknown key 'baselin'", "did you mean 'baseline'"]),
    ],
)
def test_a_bad_study_is_refused_in_one_line(change: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        study_from({**BASE, **change})
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message, message


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("- 1", "must be a mapping"),
        ("task: {name: arithmetic}", "is a recipe, not a study"),
        ("base: arithmetic", "seeds: missing"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_study_file_is_refused(tmp_path: Path, text: str, piece: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"study\.yaml") as caught:
        load_study(path)
    assert piece in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such study file"):
        load_study(tmp_path / "absent.yaml")


RECIPES = {name: path for name, path in shipped_recipes().items() if name not in STUDIES}


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_is_a_base_of_a_study_and_of_an_arm(name: str) -> None:
    base = load_recipe(
        RECIPES[name], (), {"evolve": EvolveRecipe, "learn": LearnRecipe}.get(name.partition("/")[0], Recipe)
    )
    # pairs have no objective to choose
    another = {"objective": "dapo"} if base.preference is None else {"preference": {"beta": 2.0}}
    arms: dict[str, Any] = {"own": {}, "another": another}
    # else nothing is left without the penalty
    learns_from_rewards = base.preference is None and base.objective.build().surrogate.has_policy_term
    if learns_from_rewards:
        arms["none"] = {"objective": {"divergence": "none"}}
    study = study_from({"base": name, "arms": arms, "seeds": [0, 1], "baseline": "own"})
    expected = {key: value for key, value in base.model_dump().items() if key in Recipe.model_fields}
    assert study.arms["own"].model_dump() == expected
    if base.preference is None:
        assert study.arms["another"].objective.spec() == {"preset": "dapo"}
    else:
        assert study.arms["another"].preference == base.preference.model_copy(update={"beta": 2.0})
    assert not learns_from_rewards or not study.arms["none"].objective.build().penalties
    beside = {**BASE, "arms": {"dr_grpo": {"objective.preset": "dr_grpo"}, "other": {"base": name}}}
    if base.preference is None:
        assert study_from(beside).arms["other"].task == base.task
    else:  # the study's base has an objective, which an arm with pairs does not take
        with pytest.raises(InputError, match=r"arms\.other: .*have no effect with preference"):
            study_from(beside)


def test_a_study_is_not_a_base_of_a_study() -> None:
    with pytest.raises(InputError, match=r"embedded\.yaml: is a study; a base must be a recipe"):
        study_from({**BASE, "base": "studies/embedded"})


def test_a_base_is_looked_for_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: arithmetic\ntrain: {steps: 3}\n")
    (tmp_path / "study.yaml").write_text("base: mine.yaml\narms: [dr_grpo, grpo]\nseeds: [0]\nbaseline: grpo\n")
    assert load_study(tmp_path / "study.yaml").arms["grpo"].train.steps == 3
    replaced = load_study(tmp_path / "study.yaml", ["base.train.steps=4", "base=arithmetic"])
    assert (replaced.arms["grpo"].train.steps, replaced.arms["grpo"].train.group_size) == (4, 16)


def test_an_override_reaches_into_an_arm_that_was_written_with_dotted_keys() -> None:
    arms = {"a": {"objective.preset": "atr_grpo", "objective.radius": 0.1}, "b": {"objective.preset": "grpo"}}
    study = study_from({**BASE, "arms": arms, "baseline": "b"}, ["arms.a.objective=dapo", "arms.b.train.steps=3"])
    assert study.arms["a"].objective.spec() == {"preset": "dapo"}
    assert (study.arms["b"].objective.spec(), study.arms["b"].train.steps) == ({"preset": "grpo"}, 3)


def test_an_arm_may_have_a_name_that_yaml_reads_as_something_else(tmp_path: Path) -> None:
    text = "base: arithmetic\nseeds: [0]\nbaseline: off\n".replace("off", "'off'")
    (tmp_path / "study.yaml").write_text(text + "arms: {off: {train.fast: off}, on: {train.fast: auto}, 0.1: {}}\n")
    study = load_study(tmp_path / "study.yaml")
    assert list(study.arms) == ["off", "on", "0.1"]
    assert [recipe.train.fast for recipe in study.arms.values()] == ["off", "auto", "auto"]
