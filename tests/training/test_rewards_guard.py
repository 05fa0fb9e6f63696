"""Reward functions that misbehave are named with the sample; the run stops, or leaves out what they failed on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.rewards import RewardError, UserReward
from mirrorpo.rewards.time_limit import TimeLimitExceeded, time_limit
from mirrorpo.tasks import Jsonl
from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.rewards import guarded
from trl_pair import TINY, dataset, settings

PROMPTS = [[{"role": "user", "content": f"prompt {i}"}] for i in range(3)]
COMPLETIONS = [[{"role": "assistant", "content": f"completion {i}"}] for i in range(3)]


def raises(**_: Any) -> Any:
    raise KeyError("gold")


def hangs(**_: Any) -> Any:
    while True:
        with contextlib.suppress(Exception):  # what careless functions do
            time.sleep(60)


def too_few(**_: Any) -> Any:
    return [1.0]


def nothing(**_: Any) -> Any:
    return None


def nan(**_: Any) -> Any:
    return [1.0, float("nan"), None]


def text(**_: Any) -> Any:
    return [1.0, "0.5", None]


async def async_raises(**_: Any) -> Any:
    raise OSError("no judge")


async def async_hangs(**_: Any) -> Any:
    await asyncio.sleep(60)


def called(function: Any, on_error: str) -> Any:
    found = guarded(function, on_error, 0.1)(prompts=PROMPTS, completions=COMPLETIONS)
    return asyncio.run(found) if asyncio.iscoroutine(found) else found


@pytest.mark.parametrize(
    ("function", "piece", "left"),
    [
        (
            raises,
            r"raised KeyError: 'gold' \(first sample of 3: \(prompt 'prompt 0', completion 'completion 0'\)",
            None,
        ),
        (hangs, r"took more than 0.1 s \(first sample of 3", None),
        (too_few, r"returned 1 rewards for 3 completions", None),
        (nothing, r"raised TypeError", None),
        (nan, r"returned nan \(prompt 'prompt 1', completion 'completion 1'\)", [1.0, None, None]),
        (text, r"returned '0.5' \(prompt 'prompt 1'", [1.0, None, None]),
        (async_raises, r"raised OSError: no judge", None),
        (async_hangs, r"took more than 0.1 s", None),
    ],
)
def test_a_failure_is_named_with_function_and_sample_or_left_out(
    function: Any, piece: str, left: list[float | None] | None
) -> None:
    with pytest.raises(RewardError, match=f"^reward '{function.__name__}' {piece}"):
        called(function, "raise")
    assert called(function, "skip") == (left or [None, None, None])


def test_none_and_numbers_of_every_kind_pass() -> None:
    import numpy as np
    import torch

    def mixed(**_: Any) -> Any:
        return (None, np.float32(0.5), torch.tensor(2))

    assert called(mixed, "raise") == [None, 0.5, 2.0]
    assert guarded(mixed).__name__ == "mixed"


def test_a_trainer_names_the_reward_that_failed_or_goes_on_without_it(tmp_path: Path) -> None:
    def sometimes(completions: list[Any], **_: Any) -> list[float]:
        return [float("inf") if i == 1 else float(i % 2) for i in range(len(completions))]

    def build(**more: Any) -> MirrorTrainer:
        config = MirrorConfig(**settings(tmp_path, max_steps=1, **more), objective="dr_grpo")
        return MirrorTrainer(TINY, reward_funcs=sometimes, args=config, train_dataset=dataset())

    with pytest.raises(RewardError, match="reward 'sometimes' returned inf"):
        build().train()
    built = build(on_reward_error="skip")
    built.train()
    assert built.state.log_history[0]["unscored/frac"] == 1 / 8


def test_settings_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    for name, value in (("on_nonfinite", "ignore"), ("on_reward_error", "zero"), ("reward_seconds", 0)):
        with pytest.raises(ValueError, match=name):
            MirrorConfig(**settings(tmp_path, **{name: value}), objective="grpo")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_mine.py").write_text(
        "import time\n"
        "def slow(completion, row):\n    time.sleep(60)\n"
        "def wrong(completion, row):\n    return row['answers']\n"
        "def infinite(completion, row):\n    return float('inf')\n"
        "def unsure(completion, row):\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "rewards_of_mine"


@pytest.mark.parametrize(
    ("name", "piece"),
    [("slow", "took more than 0.1 s"), ("wrong", "raised KeyError: 'answers'"), ("infinite", "returned inf")],
)
def test_a_users_function_is_named_with_its_sample_or_its_completion_left_out(mine: str, name: str, piece: str) -> None:
    with pytest.raises(
        RewardError, match=re.escape(f"reward '{mine}:{name}' {piece}") + ".*prompt 'p', completion 'c'"
    ):
        UserReward(f"{mine}:{name}", seconds=0.1)("c", {"prompt": "p"})
    grade = UserReward(f"{mine}:{name}", on_error="skip", seconds=0.1)("c", {"prompt": "p"})
    assert grade.reward is None
    assert grade.reason.startswith("reward failed: ")


def test_the_task_of_own_data_hands_the_settings_on(mine: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(40)))
    task = Jsonl(path=str(path), reward=f"{mine}:slow", on_reward_error="skip", reward_seconds=0.05)
    assert task.grade("c", {"prompt": "p"}).reason == "reward failed: too slow"
    assert Jsonl(path=str(path), reward=f"{mine}:unsure").grade("c", {"prompt": "p"}).reward is None


def test_a_limit_inside_a_limit_leaves_the_outer_one_running() -> None:
    def outer() -> None:
        with time_limit(0.2):
            with time_limit(60):
                pass
            time.sleep(5)

    with pytest.raises(TimeLimitExceeded):
        outer()
