"""The one merge rule of base files, study arms and overrides; bases that cannot be used."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirrorpo.config.study import study_from
from mirrorpo.config.train import load_recipe, recipe_from
from mirrorpo.config.yaml import nested
from mirrorpo.errors import InputError
from mirrorpo.losses.presets import objective_from

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


def spec(base: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return recipe_from({"task": {"name": "arithmetic"}, "objective": base}, overrides).objective.spec()


ATR = {"preset": "atr_grpo", "radius": 0.1}


@pytest.mark.parametrize(
    ("base", "overrides", "expected"),
    [
        (ATR, ["objective=dapo"], {"preset": "dapo"}),
        (ATR, ["objective.preset=dapo"], {"preset": "dapo"}),
        (ATR, ["objective={preset: dapo, epsilon_high: 0.3}"], {"preset": "dapo", "epsilon_high": 0.3}),
        (ATR, ["objective.preset=grpo", "objective.coefficient=0.1"], {"preset": "grpo", "coefficient": 0.1}),
        (ATR, ["objective=grpo", "objective.coefficient=0.1"], {"preset": "grpo", "coefficient": 0.1}),
        (ATR, ["objective.preset=atr_grpo", "objective.level=token"], {**ATR, "level": "token"}),
        (ATR, ["objective.radius=0.2"], {"preset": "atr_grpo", "radius": 0.2}),
        (ATR, ["objective.region=ratio"], {"preset": "atr_grpo", "region": "ratio"}),
        (
            ATR,
            ["objective.region=ratio", "objective.epsilon_low=0.1"],
            {"preset": "atr_grpo", "region": "ratio", "epsilon_low": 0.1},
        ),
        (
            {"preset": "dapo", "region": {"name": "kl3", "radius": 0.1}},
            ["objective.region.radius=0.2"],
            {"preset": "dapo", "region": {"name": "kl3", "radius": 0.2}},
        ),
        (
            {"preset": "dapo", "region": {"name": "kl3", "radius": 0.1}},
            ["objective.region={name: ratio}"],
            {"preset": "dapo", "region": {"name": "ratio"}},
        ),
        (
            {"preset": "dapo", "region": "kl3", "radius": 0.1},
            ["objective.region.name=js", "objective.region.radius=0.2"],
            {"preset": "dapo", "region": {"name": "js", "radius": 0.2}},
        ),
        (
            {"preset": "prob_l2_grpo", "coefficient": 0.1, "estimator": "weighted"},
            ["objective.divergence=none"],
            {"preset": "prob_l2_grpo", "divergence": "none"},
        ),
        (
            ATR,
            ["objective.preset=dapo", "objective.region=kl3", "objective.radius=0.03"],
            {"preset": "dapo", "region": "kl3", "radius": 0.03},
        ),
        (
            {"preset": "grpo", "coefficient": 0.3},
            ["objective=dapo", "objective.divergence=js", "objective.coefficient=0.1"],
            {"preset": "dapo", "divergence": "js", "coefficient": 0.1},
        ),
        (ATR, ["objective.region=off", "objective.preset=dapo"], {"preset": "dapo", "region": False}),
        (
            {"preset": "prob_l2_grpo", "coefficient": 0.1},
            ["objective.divergence=off"],
            {"preset": "prob_l2_grpo", "divergence": False},
        ),
        ({"preset": "grpo"}, ["objective.divergence=null"], {"preset": "grpo", "divergence": None}),
        ({"preset": "grpo"}, ["objective.divergence=None"], {"preset": "grpo", "divergence": "None"}),
        (
            {"preset": "prob_l2_grpo", "coefficient": 0.1},
            ["objective.divergence=js"],
            {"preset": "prob_l2_grpo", "divergence": "js", "coefficient": 0.1},
        ),
    ],
)
def test_overrides_of_an_objective_compose_in_any_order(
    base: dict[str, Any], overrides: list[str], expected: dict[str, Any]
) -> None:
    for order in itertools.permutations(overrides):
        assert spec(base, *order) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.gradient_checkpointing", "false", False),
        ("train.warmup_ratio", "0", 0.0),
        ("train.micro_batch_size", "null", None),
        ("model.lora", "null", None),
        ("model.chat_template.enable_thinking", "false", False),
        ("model.lora.target_modules", "[a]", ["a"]),  # a list is replaced, not appended to
    ],
)
def test_a_value_that_is_false_zero_null_or_a_list_overrides(
    key: str, value: str, expected: Any, tmp_path: Path
) -> None:
    base = {
        "task": {"name": "arithmetic"},
        "train": {"gradient_checkpointing": True, "warmup_ratio": 0.5, "micro_batch_size": 16},
        "model": {"lora": {"target_modules": ["q", "v"]}, "chat_template": {"enable_thinking": True}},
    }
    written(tmp_path, "base.yaml", yaml.safe_dump(base))
    own = written(tmp_path, "own.yaml", "base: base.yaml\n" + yaml.safe_dump(nested([(key, yaml.safe_load(value))])))
    for recipe in (load_recipe(own), load_recipe(tmp_path / "base.yaml", [f"{key}={value}"])):
        found: Any = recipe.model_dump()
        for part in key.split("."):
            found = found[part]
        assert found == expected


def test_base_files_arms_and_overrides_follow_one_rule(tmp_path: Path) -> None:
    change = {"objective": {"preset": "dapo"}, "task": {"name": "gsm8k"}, "train": {"vllm": {"sleep": True}}}
    base = yaml.safe_load(BASE) | {"model": {"path": "m"}}
    base["train"]["vllm"] = {"memory_share": 0.5}
    written(tmp_path, "base.yaml", yaml.safe_dump(base))
    by_file = load_recipe(written(tmp_path, "own.yaml", yaml.safe_dump({"base": "base.yaml", **change})))
    flat = ["objective=dapo", "task.name=gsm8k", "train.vllm.sleep=true"]
    by_override = load_recipe(tmp_path / "base.yaml", flat)
    study = study_from({"base": base, "arms": {"a": change, "b": {}}, "seeds": [3], "baseline": "a"})
    assert by_file == by_override == study.arms["a"]
    assert (by_file.train.vllm.memory_share, by_file.train.vllm.sleep, by_file.train.steps) == (0.5, True, 7)


def test_a_recipe_is_checked_and_its_objective_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(given: Any) -> Any:
        built.append(given)
        return objective_from(given)

    monkeypatch.setattr("mirrorpo.config.train.objective_from", counted)
    recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": ATR})
    assert recipe.objective.build() is recipe.model_copy(update={"train": recipe.train}).objective.build()
    assert built == [ATR]
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert again.objective.build().describe() == recipe.objective.build().describe()


@pytest.mark.parametrize(("text", "expected"), [("off", "off"), ("false", "off"), ("auto", "auto"), ("on", "auto")])
def test_a_switch_that_yaml_reads_as_a_boolean_is_accepted(text: str, expected: str) -> None:
    assert recipe_from({"task": {"name": "arithmetic"}}, [f"train.fast={text}"]).train.fast == expected


def test_the_base_of_a_recipe_can_be_overridden(tmp_path: Path) -> None:
    own = written(tmp_path, "own.yaml", "base: gsm8k/dr_grpo_1.7b\ntrain: {seed: 4}\n")
    recipe = load_recipe(own, ["train.steps=3", "base=arithmetic"])
    assert (recipe.task.name, recipe.train.steps, recipe.train.seed) == ("arithmetic", 3, 4)
