"""A run that does nothing says so, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.monitors import PATIENCE
from trl_pair import TINY, dataset, reward, settings


def warnings_of(folder: Path, objective: Any, function: Any = reward, **more: Any) -> list[str]:
    config = MirrorConfig(
        **settings(folder, **{"max_steps": 6, "steps_per_generation": 2, **more}), objective=objective
    )
    built = MirrorTrainer(TINY, reward_funcs=function, args=config, train_dataset=dataset())
    said: list[str] = []
    built.watch.say = said.append
    built.train()
    return said


def constant(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def wrong(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def silent(completions: list[Any], **_: Any) -> list[None]:
    return [None] * len(completions)


def test_a_sound_run_says_nothing(tmp_path: Path) -> None:
    assert warnings_of(tmp_path, "grpo") == []


def test_groups_whose_rewards_are_all_equal_for_long(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, "dr_grpo", constant, max_steps=PATIENCE, steps_per_generation=1)
    assert len(said) == 1
    assert "same reward" in said[0]
    assert "group_size" in said[0]


def test_a_run_whose_every_reward_is_0(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, "dr_grpo", wrong, max_steps=PATIENCE, steps_per_generation=1)
    assert len(said) == 1
    assert "every reward was 0" in said[0]


def test_with_no_advantage_the_penalty_does_not_move_a_policy_that_equals_its_reference(tmp_path: Path) -> None:
    """Its gradient there is rounding noise (1e-9 of a weight), which Adam would scale to steps of the learning rate."""
    config = MirrorConfig(
        **settings(tmp_path, max_steps=4, steps_per_generation=2, optim="adamw_torch", learning_rate=1e-3),
        objective={"preset": "grpo", "coefficient": 0.5},
    )
    built = MirrorTrainer(TINY, reward_funcs=constant, args=config, train_dataset=dataset())
    said: list[str] = []
    built.watch.say = said.append
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    built.train()
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    assert [line for line in said if "the update is left out" in line] == said[:1] != []


def test_away_from_the_reference_the_penalty_pulls_without_any_advantage(tmp_path: Path) -> None:
    rewards = iter([True])

    def once(completions: list[Any], **_: Any) -> list[float]:
        return reward(completions) if next(rewards, False) else constant(completions)

    config = MirrorConfig(
        **settings(tmp_path, max_steps=4, steps_per_generation=1, learning_rate=1e-3),
        objective={"preset": "grpo", "coefficient": 0.5},
    )
    built = MirrorTrainer(TINY, reward_funcs=once, args=config, train_dataset=dataset())
    said: list[str] = []
    built.watch.say = said.append
    built.train()
    norms = [entry["grad_norm"] for entry in built.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert min(norms) > 0.0
    assert not said


def test_the_share_of_the_first_step_is_not_judged_when_it_is_logged_later(tmp_path: Path) -> None:
    """At step 0 the policy is its reference and every penalty's gradient is 0; the log comes four updates later."""
    said = warnings_of(tmp_path, "grpo", max_steps=4, steps_per_generation=4, logging_steps=4)
    assert said == []


def test_completions_without_any_reward_for_long(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, "dr_grpo", silent, max_steps=PATIENCE, steps_per_generation=1)
    assert len(said) == 1
    assert "hardly a completion had a reward" in said[0]


def test_a_policy_that_equals_its_reference_after_the_first_step(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, "grpo", learning_rate=1e-30)  # too small for float32
    assert any("the policy still equals its reference" in line and "learning rate" in line for line in said)
    assert any("has no gradient" in line for line in said)


def test_a_coefficient_that_can_have_no_effect(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, {"preset": "grpo", "coefficient": 1e-12})
    assert len(said) == 1
    assert "can have no effect" in said[0]
    assert "objective.coefficient" in said[0]


def test_a_line_is_said_once(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, "grpo", learning_rate=1e-30, max_steps=8, gradient_share_every=1)
    assert len(said) == len(set(said)) == 2
