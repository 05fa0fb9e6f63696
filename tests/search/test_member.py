"""A member: one inner training and its fitness, the same whatever the worker did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mirrorpo.config.search import EvolveRecipe
from mirrorpo.config.train import recipe_from
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.errors import InputError
from mirrorpo.search.member import Workshop, evaluate_member, held_out, payload
from mirrorpo.tasks import Grade, Row
from mirrorpo.training.setup import Prepared, build_trainer
from mirrorpo.training.trainer import NonFiniteError

MAPS = [MirrorMap.random(seed).parameters.tolist() for seed in range(2)]


def recipe(*overrides: str) -> EvolveRecipe:
    data: dict[str, Any] = {
        "task": {"name": "arithmetic", "train_size": 64, "test_size": 8},
        # A coefficient so large that two steps show which map it was.
        "objective": {"coefficient": 1e4},
        "train": {"steps": 2, "prompts_per_step": 4, "group_size": 8, "learning_rate": 3e-3},
        "eval": {"problems": 8},
        "evolution": {"population": 2, "validation_problems": 16},
    }
    data["train"]["max_completion_length"] = 24
    return recipe_from(data, overrides, "r", EvolveRecipe)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(recipe())


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restarted_trainer_trains_as_a_fresh_one_bit_for_bit(precision: str, tmp_path: Path) -> None:
    shop = Workshop(recipe(f"train.precision={precision}", "train.updates_per_batch=2"))
    shop.train(shop.objective(MAPS[0]), seed=5)
    used = weights(shop.trainer)
    shop.train(shop.objective(MAPS[1]), seed=9)
    again = weights(shop.trainer)
    assert not torch.equal(used, again)

    other = recipe(f"train.precision={precision}", "train.updates_per_batch=2", "train.seed=9")
    fresh = build_trainer(Prepared(**{**vars(shop.prepared), "recipe": other}), tmp_path, [])
    fresh.adopt(shop.objective(MAPS[1]))
    fresh.args.gradient_share_every = 0
    fresh.train()
    assert torch.equal(weights(fresh), again)


def test_the_map_alone_changes_what_is_trained() -> None:
    shop = Workshop(recipe("train.updates_per_batch=2", "objective.coefficient=100"))
    ends = []
    for parameters in MAPS[:2]:
        shop.train(shop.objective(parameters), seed=5)
        ends.append(weights(shop.trainer))
    assert not torch.equal(*ends)


def test_members_are_the_same_in_any_order(workshop: Workshop) -> None:
    first = [workshop.member(m, seed, "validation") for m, seed in ((MAPS[0], 1), (MAPS[1], 1), (MAPS[0], 2))]
    second = [workshop.member(m, seed, "validation") for m, seed in ((MAPS[0], 2), (MAPS[1], 1), (MAPS[0], 1))]
    assert first == second[::-1]
    assert 0 <= first[0]["fitness"] <= 1
    assert first[0]["right"] == first[0]["fitness"] * 16


def test_a_job_is_its_member(workshop: Workshop) -> None:
    got = evaluate_member(payload(recipe(), torch.tensor(MAPS[0], dtype=torch.float64), 1, "validation"))
    assert got == workshop.member(MAPS[0], 1, "validation")


def test_the_payload_tells_only_what_a_member_depends_on() -> None:
    parameters = torch.tensor(MAPS[0], dtype=torch.float64)
    same = payload(recipe("evolution.generations=3", "evolution.sigma=0.5"), parameters, 0, "test")
    assert same == payload(recipe(), parameters, 0, "test")
    assert same != payload(recipe("train.steps=3"), parameters, 0, "test")


def test_the_test_split_is_another_one(workshop: Workshop) -> None:
    assert workshop.member(MAPS[0], 1, "test")["problems"] == 8
    rows = {split: {row["prompt"] for row in found} for split, found in workshop.rows.items()}
    train = {row["prompt"] for row in workshop.prepared.train_rows}
    assert not rows["validation"] & rows["test"]
    assert not train & (rows["validation"] | rows["test"])


def test_what_is_no_map_is_a_failed_member(workshop: Workshop) -> None:
    got = workshop.member([0.0] * 380, 1, "validation")
    assert got["fitness"] is None
    assert "its divergence would be zero" in got["failed"]


def test_a_training_that_blows_up_is_a_failed_member(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise NonFiniteError("step 2: loss is not finite")

    monkeypatch.setattr(workshop, "train", explode)
    assert workshop.member(MAPS[0], 1, "validation") == {"fitness": None, "failed": "step 2: loss is not finite"}


class TwoSplits:
    """A task without validation problems."""

    name = "two"

    def __init__(self, validation: list[str] | None = None) -> None:
        self.validation = validation

    def rows(self, split: str) -> list[Row]:
        if split == "validation":
            if self.validation is None:
                raise ValueError("split is 'validation'; legal values: 'train', 'test'")
            return [{"prompt": p, "answer": ""} for p in self.validation]
        return [{"prompt": f"{split} {i}", "answer": ""} for i in range(20)]

    def grade(self, completion: str, row: Row) -> Grade:
        raise NotImplementedError


def prepared(task: Any) -> Prepared:
    return Prepared(
        recipe=recipe(),
        task=task,
        train_rows=task.rows("train"),
        test_rows=task.rows("test"),
        tokenizer=None,
        model_path="",
        longest_prompt=0,
    )


def test_a_task_without_validation_gives_up_training_problems() -> None:
    train, validation = held_out(prepared(TwoSplits()), 5)
    assert (len(train), len(validation)) == (15, 5)
    assert {row["prompt"] for row in train} | {row["prompt"] for row in validation} == {f"train {i}" for i in range(20)}


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [
        (TwoSplits(), 20, r"evolution.validation_problems: validation_size must be in \[0, 19\]"),
        (TwoSplits(["a", "b"]), 3, "evolution.validation_problems: 3, but the task has 2 validation rows"),
        (TwoSplits(["a", "test 3"]), 2, "task two: its test part holds validation problems"),
    ],
)
def test_validation_problems_that_do_not_hold_out_are_refused(task: Any, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        held_out(prepared(task), size)
