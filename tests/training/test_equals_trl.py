"""TRL's own loss and gradient, on the same inputs and over whole training steps.

Twice: from TRL's settings as they are (no ``objective``: what a user who only changes the import gets), and from the
presets of the papers beside the TRL settings that mean the same. The preset ``grpo`` is the paper's: it is TRL's loss
with ``use_bias_correction_kl=False``, which is not TRL's default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from trl_pair import PAIRS, TRL_SETTINGS, batch, fill, loss_and_gradient, pair, same_settings

# Padded rows are computed as TRL computes them; packed rows by other products of the same numbers, in float32.
TOLERANCE = {"off": 1e-6, "auto": 1e-5}
FAST = pytest.mark.parametrize("fast", TOLERANCE)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, fast: str) -> None:
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= TOLERANCE[fast] * scale


def weights(built: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])


@FAST
@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", TRL_SETTINGS)
def test_without_an_objective_trls_settings_give_trls_loss_and_gradient(
    name: str, accumulation: int, fast: str, tmp_path: Path
) -> None:
    theirs, ours = same_settings(tmp_path, name, fast, gradient_accumulation_steps=accumulation)
    for built in (theirs, ours):
        built.current_gradient_accumulation_steps = accumulation
    assert (ours.ref_model is None) == (theirs.ref_model is None)
    inputs = fill(batch(), theirs)
    their_loss, their_gradient = loss_and_gradient(theirs, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, inputs)
    assert their_gradient.abs().max() > 1e-5
    assert_same(our_loss, their_loss, fast)
    assert_same(our_gradient, their_gradient, fast)


@FAST
@pytest.mark.parametrize("name", ["TRL's defaults", "grpo", "two-sided clip inside the region"])
def test_without_an_objective_training_ends_in_the_weights_of_trl(name: str, fast: str, tmp_path: Path) -> None:
    more = {"max_steps": 4, "seed": 5, "optim": "sgd", "learning_rate": 0.05, "steps_per_generation": 2}
    theirs, ours = same_settings(tmp_path, name, fast, **more)
    start = weights(theirs)
    for built in (theirs, ours):
        set_seed(5)
        built.train()
    assert (weights(theirs) - start).abs().max() > 1e-4
    assert (weights(ours) - weights(theirs)).abs().max() <= TOLERANCE[fast]


@FAST
@pytest.mark.parametrize("tool_mask", [False, True], ids=["all tokens", "tool mask"])
@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_those_of_trl(
    name: str, accumulation: int, tool_mask: bool, fast: str, tmp_path: Path
) -> None:
    theirs, ours = pair(tmp_path, name, fast, gradient_accumulation_steps=accumulation)
    for built in (theirs, ours):
        built.current_gradient_accumulation_steps = accumulation
    inputs = fill(batch(tool_mask=tool_mask), theirs)
    their_loss, their_gradient = loss_and_gradient(theirs, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, inputs)
    assert their_gradient.abs().max() > 1e-5
    assert_same(our_loss, their_loss, fast)
    assert_same(our_gradient, their_gradient, fast)


@FAST
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_without_old_log_probabilities_the_policy_itself_is_the_anchor(name: str, fast: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, name, fast)
    for built in (theirs, ours):
        built.current_gradient_accumulation_steps = 1
    inputs = fill(batch(with_old=False), theirs)
    their_loss, their_gradient = loss_and_gradient(theirs, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, inputs)
    assert_same(our_loss, their_loss, fast)
    assert_same(our_gradient, their_gradient, fast)


@FAST
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["four updates per generation", "accumulation 2"],
)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo with ratio-corrected k3", "dapo with k3", "gspo"])
def test_training_ends_in_the_weights_of_trl(name: str, more: dict[str, int], fast: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, name, fast, max_steps=4, seed=5, optim="sgd", **{**more, "learning_rate": 0.05})
    # Plain gradient descent: AdamW would turn the rounding of a near-zero gradient into a whole step.
    start = weights(theirs)
    for built in (theirs, ours):
        set_seed(5)
        built.train()
    assert (weights(theirs) - start).abs().max() > 1e-4
    assert (weights(ours) - weights(theirs)).abs().max() <= TOLERANCE[fast]
