"""The private seam of TRL that the trainer stands on: names, signatures, keys. A failure here says what moved."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.version import Version
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.training.resuming import Resumable, ResumableTrainer
from mirrorpo.training.trainer import MirrorTrainer
from mirrorpo.training.trl_loss import SEAMS


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # pyright: ignore[reportArgumentType]


def test_the_version_is_one_that_was_read() -> None:
    assert Version("1.16") <= Version(version("trl")) < Version("1.17")


def test_every_private_method_that_is_overridden_stands_in_the_table() -> None:
    ours = {name for kind in (MirrorTrainer, ResumableTrainer, Resumable) for name in vars(kind)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    functions = {name for name in private if inspect.isfunction(getattr(GRPOTrainer, name, None))}
    assert functions == set(SEAMS)


@pytest.mark.parametrize("name", SEAMS)
def test_the_overridden_methods_have_the_signatures_that_are_overridden(name: str) -> None:
    found = parameters(getattr(GRPOTrainer, name))[1:]
    expected = list(SEAMS[name])
    # Only its first parameters are passed on by position; the others are checked below.
    assert (found[: len(expected)] if name == "_get_per_token_logps_and_entropies" else found) == expected


def test_log_probabilities_come_with_entropies_and_auxiliary_loss() -> None:
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    from mirrorpo.training.loss import FORWARD_KEYS

    assert {"compute_entropy", "compute_aux_loss", *FORWARD_KEYS} <= set(names)


def test_the_loss_reads_the_keys_and_attributes_that_ours_reads() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for name in (
        "completion_mask",
        "tool_mask",
        "old_per_token_logps",
        "ref_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
        "num_items_in_batch",
        "current_gradient_accumulation_steps",
        "steps_per_generation",
        "top_entropy_quantile",
        "off_policy_mask_threshold",
        "_entropy_bonus_enabled",
        "aux_loss_enabled",
        "router_aux_loss_coef",
        "max_completion_length",
    ):
        assert name in source, name


def test_the_settings_that_the_objective_decides_exist() -> None:
    from mirrorpo.training.trl_loss import TRL_FIELDS

    fields = GRPOConfig.__dataclass_fields__
    assert set(TRL_FIELDS) <= set(fields)
    assert fields["beta"].default == 0.0
    assert fields["use_bias_correction_kl"].default is True
