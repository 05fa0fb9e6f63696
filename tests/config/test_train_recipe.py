"""A recipe is checked before anything is written: one line that names the key and the legal values."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrorpo.config.search import EvolveRecipe, LearnRecipe
from mirrorpo.config.shipped import shipped_recipes
from mirrorpo.config.train import Recipe, load_recipe, recipe_from
from mirrorpo.errors import InputError

GOOD = "task: {name: arithmetic}\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Studies and searches have file formats, and tests, of their own.
TRAINING = {
    name: path for name, path in shipped_recipes().items() if not name.startswith(("studies/", "evolve/", "learn/"))
}


@pytest.mark.parametrize("path", TRAINING.values(), ids=str)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    load_recipe(path, (), {"evolve": EvolveRecipe, "learn": LearnRecipe}.get(path.parent.name, Recipe))


def test_the_resolved_recipe_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["train.steps=7", "objective.preset=prob_l2_grpo"])
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("train.stpes=3", ["override 'train.stpes'", "did you mean 'train.steps'", "Legal: steps"]),
        ("train.group_size=1", ["train.group_size", "greater than or equal to 2", "got 1"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1"]),
        ("train.steps=x", ["train.steps", "integer", "'x'"]),
        ("train.updates_per_batch=7", ["updates_per_batch must divide", "256", "got 7"]),
        ("train.micro_batch_size=7", ["micro_batch_size must divide", "got 7"]),
        ("train.learning_rate=-1", ["train.learning_rate", "greater than 0"]),
        ("train.learning_rate=.nan", ["train.learning_rate"]),
        ("task.name=arithmetics", ["task.name", "did you mean 'arithmetic'", "Legal: arithmetic"]),
        ("task.difficulty=hrd", ["task.difficulty", "'easy', 'medium' or 'hard'", "'hrd'"]),
        ("objective.preset=prob_l3_grpo", ["did you mean 'prob_l2_grpo'"]),
        ("objective.coeficient=2", ["did you mean 'coefficient'"]),
        ("objective={preset: grpo, coefficient: -1}", ["objective", "coefficient must be a number", "got -1"]),
        ("objective.radius=0.1", ["region 'ratio' does not take 'radius'"]),
        ("objective.region={name: kl3, radius: 0}", ["radius must be a number in (0"]),
        ("objective={preset: grpo, divergence: klx}", ["did you mean 'kl'"]),
        ("reference.kind=averaged", ["has no effect", "no penalty"]),
        ("modle.path=x", ["did you mean 'model'"]),
        ("train=3", ["train"]),
        ("nonsense", ["must be key=value"]),
        ("=3", ["must be key=value"]),
        ("train.steps.x=3", ["is not a group of keys"]),
    ],
)
def test_a_bad_value_is_named_with_the_legal_ones(override: str, pieces: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "train: {steps: 80}\n", override)
    for piece in pieces:
        assert piece in message, message


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("task: {name: arithmetic}\ntask: {name: jsonl}", "duplicate key 'task'"),
        ("a: &a [1]\nb: *a", "aliases are not accepted"),
        ("task: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("task: [", "not valid YAML"),
        ("task: {name: arithmetic}\nx: \x00", "not valid YAML"),
        (b"task: \xff\xfe", "not UTF-8"),
        ("[" * 5000, "not valid YAML"),
        ("x: " + "y" * 1_000_001, "at most"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_in_one_line(text: str | bytes, piece: str, tmp_path: Path) -> None:
    assert piece in refused(tmp_path, text)


def test_numbers_in_exponent_notation_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "train: {learning_rate: 1e-4}"), ["objective.epsilon_low=2e-1"])
    assert recipe.train.learning_rate == 1e-4
    assert recipe.objective.spec()["epsilon_low"] == 0.2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")


def test_an_averaged_reference_does_not_go_with_an_adapter() -> None:
    data = {
        "task": {"name": "arithmetic"},
        "objective": {"preset": "grpo"},
        "model": {"lora": {"r": 4}},
        "reference": {"kind": "averaged"},
    }
    with pytest.raises(InputError, match="must be 'kept' with"):
        recipe_from(data)
