"""Rewards in the background: begun when the completions exist, taken when they are needed, never those of others."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.config.train import recipe_from
from mirrorpo.rewards import RewardError
from mirrorpo.tasks import TASKS, Arithmetic, Grade, Row
from mirrorpo.training.rewards import BackgroundReward, reward_function
from mirrorpo.training.setup import build_trainer, prepare

PATIENCE = 60.0  # seconds until a wait is given up as a failure


class Slow(Arithmetic):
    """Arithmetic whose verdicts come many at a time, and not before ``go``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begun, self.go = threading.Event(), threading.Event()
        self.calls: list[list[str]] = []

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        self.calls.append(list(completions))
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return [self.grade(text, row) for text, row in zip(completions, rows, strict=True)]


ROWS = [json.dumps({"prompt": "1+2=?", "answer": "3"})] * 3
COMPLETIONS = ["#### 3", "#### 4", "three"]


def test_grading_begins_at_once_and_is_waited_for_only_where_it_is_needed() -> None:
    task = Slow()
    reward = reward_function(task)
    assert isinstance(reward, BackgroundReward)
    reward.begin(COMPLETIONS, ROWS)  # returns, although no verdict can be given yet
    assert task.begun.wait(PATIENCE)
    logged: dict[str, float] = {}

    async def others() -> list[float | None]:
        waiting = asyncio.ensure_future(reward(COMPLETIONS, ROWS, log_metric=logged.__setitem__))
        await asyncio.sleep(0)  # the loop goes on while programs run
        assert not waiting.done()
        task.go.set()
        return await waiting

    assert asyncio.run(others()) == [1.0, 0.0, 0.0]
    assert task.calls == [COMPLETIONS], "graded once"
    assert logged == {
        "answers/right": 1 / 3, "answers/wrong": 1 / 3, "answers/unreadable": 1 / 3, "answers/unscored": 0.0,
    }  # fmt: skip


def test_the_verdicts_of_other_completions_are_never_taken() -> None:
    task = Slow()
    task.go.set()
    reward = BackgroundReward(task)
    reward.begin(["#### 4"] * 3, ROWS)
    assert asyncio.run(reward(["#### 3"] * 3, ROWS)) == [1.0] * 3
    assert asyncio.run(reward([[{"role": "assistant", "content": "#### 3"}]] * 3, ROWS)) == [1.0] * 3, "as messages"


def test_what_a_verifier_raises_comes_out_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[Grade]:
        raise RewardError("no sandbox")

    task = Slow()
    monkeypatch.setattr(task, "grade_many", broken)
    reward = BackgroundReward(task)
    reward.begin(COMPLETIONS, ROWS)
    with pytest.raises(RewardError, match="no sandbox"):
        asyncio.run(reward(COMPLETIONS, ROWS))


def test_the_trainer_grades_beside_the_forward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    tasks: list[Slow] = []

    def build(**options: Any) -> Slow:
        tasks.append(Slow(**options))
        return tasks[-1]

    monkeypatch.setitem(TASKS, "arithmetic", replace(TASKS["arithmetic"], build=build))
    data = {"task": {"name": "arithmetic", "train_size": 8}, "objective": {"preset": "prob_l2_grpo"}}
    recipe = recipe_from(
        data,
        ["train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "train.max_completion_length=4",
         "train.updates_per_batch=2"],
    )  # fmt: skip
    trainer = build_trainer(prepare(recipe), tmp_path, [])
    forward = type(trainer)._get_per_token_logps_and_entropies

    def after_grading_began(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert tasks[0].begun.wait(PATIENCE), "the programs must run before the forward passes"
        result = forward(self, *args, **kwargs)
        tasks[0].go.set()  # so no verdict was there when the pass began
        return result

    monkeypatch.setattr(type(trainer), "_get_per_token_logps_and_entropies", after_grading_began)
    trainer.train()
    assert len(tasks[0].calls) == 1
    assert trainer.state.log_history[0]["answers/unscored"] == 0.0
