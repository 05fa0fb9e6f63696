"""TRL's own loss and gradient, on the same inputs and over whole training steps.

Twice: from TRL's settings as they are (no ``objective``: what a user who only changes the import gets), and from the
presets of the papers beside the TRL settings that mean the same. The preset ``grpo`` is the paper's: it is TRL's loss
with ``use_bias_correction_kl=False``, which is not TRL's default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.training import MirrorTrainer
from trl_pair import PAIRS, TRL_SETTINGS, alike, batch, fill, loss_and_gradient, of_the_pair, our_trainer, trls_trainer

# Padded rows are computed as TRL computes them; packed rows by other products of the same numbers, in float32.
TOLERANCE = {"off": 1e-6, "auto": 1e-5}
FAST = pytest.mark.parametrize("fast", TOLERANCE)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, fast: str) -> None:
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= TOLERANCE[fast] * scale


def weights(built: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])


# Of whole trainings. Plain gradient descent: AdamW would turn the rounding of a near-zero gradient into a whole step.
TRAINING = {"max_steps": 4, "seed": 5, "optim": "sgd", "learning_rate": 0.05}
STEPS = {
    "two updates per generation": {"steps_per_generation": 2},
    "four updates per generation": {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2},
    "accumulation 2": {"gradient_accumulation_steps": 2},
}


class Built:
    """Trainers, losses and trainings, each made once however many tests compare them."""

    def __init__(self, folder: Path, given: Callable[[str], tuple[dict[str, Any], dict[str, Any]]]) -> None:
        self.folder, self.given = folder, given
        self.theirs, self.ours = cache(self._theirs), cache(self._ours)
        self.their_loss, self.their_training = cache(self._their_loss), cache(self._their_training)

    def _theirs(self, name: str, accumulation: int) -> GRPOTrainer:
        built = trls_trainer(self.folder, self.given(name)[0], gradient_accumulation_steps=accumulation)
        built.current_gradient_accumulation_steps = accumulation
        return built

    def _ours(self, name: str, accumulation: int, fast: str) -> MirrorTrainer:
        built = our_trainer(self.folder, self.given(name)[1], fast, gradient_accumulation_steps=accumulation)
        built.current_gradient_accumulation_steps = accumulation
        return built

    def _their_loss(self, name: str, accumulation: int, given: tuple[tuple[str, bool], ...]) -> Any:
        theirs = self.theirs(name, accumulation)
        inputs = fill(batch(**dict(given)), theirs)
        return inputs, *loss_and_gradient(theirs, inputs)

    def compare(self, name: str, accumulation: int, fast: str, **given: bool) -> torch.Tensor:
        """Our loss and gradient with theirs, on the same batch; returns their gradient."""
        inputs, their_loss, their_gradient = self.their_loss(name, accumulation, tuple(given.items()))
        our_loss, our_gradient = loss_and_gradient(self.ours(name, accumulation, fast), inputs)
        assert_same(our_loss, their_loss, fast)
        assert_same(our_gradient, their_gradient, fast)
        return their_gradient

    def _their_training(self, name: str, steps: str) -> tuple[torch.Tensor, torch.Tensor]:
        return trained(trls_trainer(self.folder, self.given(name)[0], **TRAINING, **STEPS[steps]))

    def compare_training(self, name: str, steps: str, fast: str) -> None:
        start, theirs = self.their_training(name, steps)
        assert (theirs - start).abs().max() > 1e-4
        _, ours = trained(our_trainer(self.folder, self.given(name)[1], fast, **TRAINING, **STEPS[steps]))
        assert (ours - theirs).abs().max() <= TOLERANCE[fast]


def trained(built: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights before and after."""
    start = weights(built)
    set_seed(5)
    built.train()
    return start, weights(built)


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("same"), alike)


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("paired"), of_the_pair)


@FAST
@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", TRL_SETTINGS)
def test_without_an_objective_trls_settings_give_trls_loss_and_gradient(
    name: str, accumulation: int, fast: str, same: Built
) -> None:
    ours, theirs = same.ours(name, accumulation, fast), same.theirs(name, accumulation)
    assert (ours.ref_model is None) == (theirs.ref_model is None)
    assert same.compare(name, accumulation, fast).abs().max() > 1e-5


@FAST
@pytest.mark.parametrize("name", ["TRL's defaults", "grpo", "two-sided clip inside the region"])
def test_without_an_objective_training_ends_in_the_weights_of_trl(name: str, fast: str, same: Built) -> None:
    same.compare_training(name, "two updates per generation", fast)


@FAST
@pytest.mark.parametrize("tool_mask", [False, True], ids=["all tokens", "tool mask"])
@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_those_of_trl(
    name: str, accumulation: int, tool_mask: bool, fast: str, paired: Built
) -> None:
    assert paired.compare(name, accumulation, fast, tool_mask=tool_mask).abs().max() > 1e-5


@FAST
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_without_old_log_probabilities_the_policy_itself_is_the_anchor(name: str, fast: str, paired: Built) -> None:
    paired.compare(name, 1, fast, with_old=False)


@FAST
@pytest.mark.parametrize("steps", ["four updates per generation", "accumulation 2"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo with ratio-corrected k3", "dapo with k3", "gspo"])
def test_training_ends_in_the_weights_of_trl(name: str, steps: str, fast: str, paired: Built) -> None:
    paired.compare_training(name, steps, fast)
