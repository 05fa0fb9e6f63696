"""A recipe that builds on another: its own keys win, another kind replaces its group, circles are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrorpo.config.train import load_recipe
from mirrorpo.errors import InputError

BASE = """
task: {name: arithmetic, difficulty: hard}
objective: {preset: dr_grpo, epsilon_low: 0.1}
train: {steps: 7, group_size: 4, seed: 3}
"""


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_own_keys_win_and_the_others_come_from_the_base(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", BASE)
    (tmp_path / "below").mkdir()
    path = written(tmp_path / "below", "own.yaml", "base: ../base.yaml\ntrain: {steps: 9}\n")
    recipe = load_recipe(path, ["train.seed=5"])
    assert (recipe.train.steps, recipe.train.group_size, recipe.train.seed) == (9, 4, 5)
    assert recipe.task.model_dump()["difficulty"] == "hard"
    assert recipe.objective.spec() == {"preset": "dr_grpo", "epsilon_low": 0.1}
    assert "base" not in recipe.to_yaml()


def test_a_group_of_another_kind_is_replaced_whole(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", BASE)
    path = written(tmp_path, "own.yaml", "base: base.yaml\nobjective: {preset: atr_grpo}\ntask: {name: gsm8k}\n")
    recipe = load_recipe(path)
    assert recipe.objective.spec() == {"preset": "atr_grpo"}, "epsilon_low belongs to another region"
    assert "difficulty" not in recipe.task.model_dump()
    same = written(tmp_path, "same.yaml", "base: base.yaml\nobjective: {preset: dr_grpo, epsilon_high: 0.3}\n")
    assert load_recipe(same).objective.spec()["epsilon_low"] == 0.1


def test_a_shipped_recipe_is_a_base_by_its_name(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "base: gsm8k/dr_grpo_1.7b_lora\nmodel: {path: ./mine}\n")
    recipe = load_recipe(path)
    assert recipe.model.path == "./mine"
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 32


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("base: own.yaml", "own.yaml: base leads back to this file"),
        ("base: other.yaml", "base leads back to this file"),
        ("base: absent.yaml", "base 'absent.yaml': no such recipe file beside it"),
        ("base: gsm8k/dr_grpo_1.8b", "did you mean 'gsm8k/dr_grpo_1.7b'"),
        ("base: 3", "base must be a file beside it or the name of a shipped recipe, got 3"),
        ("base: [a.yaml]", "base must be a file beside it"),
        ("base: list.yaml", "list.yaml: must be a mapping to be a base"),
        ("base: broken.yaml", "broken.yaml: not valid YAML"),
        ("base: deep0.yaml", "more than 8 bases"),
        ("base: typo.yaml", "own.yaml: unknown key 'train.stpes'"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(text: str, piece: str, tmp_path: Path) -> None:
    written(tmp_path, "other.yaml", "base: own.yaml\n")
    written(tmp_path, "list.yaml", "- 1\n")
    written(tmp_path, "broken.yaml", "task: [")
    written(tmp_path, "typo.yaml", "train: {stpes: 3}\ntask: {name: arithmetic}\n")
    for i in range(10):
        written(tmp_path, f"deep{i}.yaml", f"base: deep{i + 1}.yaml\n")
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path, "own.yaml", text + "\n"))
    assert piece in str(caught.value)
    assert "\n" not in str(caught.value)
