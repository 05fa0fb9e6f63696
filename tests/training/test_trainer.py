"""What the trainer promises beyond TRL's numbers: checks, accumulation, estimators, references, control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mirrorpo
from mirrorpo.losses.presets import PRESETS
from mirrorpo.training import MirrorConfig, MirrorTrainer, NonFiniteError
from mirrorpo.training.model_adapter import ReferenceMismatchError, check_reference
from mirrorpo.training.resuming import load_state
from trl_pair import MAX_COMPLETION, TINY, batch, fill, loss_and_gradient, settings, trainer


def build(folder: Path, objective: Any, **more: Any) -> MirrorTrainer:
    extra = {key: more.pop(key) for key in ("peft_config", "callbacks") if key in more}
    built = trainer(MirrorTrainer, MirrorConfig(**settings(folder, **more), objective=objective), **extra)
    built.current_gradient_accumulation_steps = 1
    return built


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "opd"])
def test_every_preset_trains_the_embedded_model_for_10_steps(preset: str, tmp_path: Path) -> None:
    built = build(tmp_path, preset, max_steps=10, steps_per_generation=2, logging_steps=10)
    start = torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])
    built.train()
    end = torch.cat([p.detach().reshape(-1) for p in built.model.parameters()])
    assert built.state.global_step == 10
    assert torch.isfinite(end).all()
    assert (end - start).abs().max() > 1e-4


def test_a_policy_that_generates_by_itself_is_its_own_sampler(tmp_path: Path) -> None:
    for preset, rules in (("dppo_tv", ["old"]), ("icepop", ["old"]), ("opsm", ["old", "old"])):
        found = build(tmp_path, preset).policy_objective
        assert found.behaviour == "old"
        assert [rule.anchor for rule in found.rules] == rules
        assert "sampler" not in found.needs


def test_what_the_trainer_does_not_carry_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give teacher, a mapping with path, url or prefix"):
        build(tmp_path, "opd")


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_penalties_toward_old_and_uniform_and_in_the_advantage_train(fast: str, tmp_path: Path) -> None:
    penalties = [
        {"divergence": "kl", "coefficient": 0.1, "anchor": "uniform", "estimator": "score"},
        {"divergence": "js", "coefficient": 0.1, "anchor": "old"},
        {"divergence": "reverse_kl", "coefficient": 0.1, "placement": "advantage"},
    ]
    mask = {"name": "kl3", "radius": 1e-6, "act": "mask", "level": "sequence"}
    spec = {"preset": "dr_grpo", "penalties": penalties, "regions": [{"name": "ratio"}, mask]}
    built = build(tmp_path, spec, max_steps=3, steps_per_generation=3, fast=fast)
    built.train()
    logged = [line for line in built.state.log_history if "divergence/js_old/mean" in line]
    assert logged[-1]["divergence/js_old/mean"] > 0
    assert logged[-1]["divergence/kl_uniform/mean"] > 0
    assert logged[-1]["mask/kl3_old_sequence/frac"] > 0


@pytest.mark.parametrize("estimator", ["sampled", "weighted", "score", "exact", "top_k"])
@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_estimator_trains_with_lora_and_with_all_parameters(
    kind: str, divergence: str, estimator: str, tmp_path: Path
) -> None:
    objective = {"preset": "dr_grpo", "divergence": divergence, "coefficient": 0.1, "estimator": estimator}
    more = {"peft_config": lora()} if kind == "lora" else {}
    built = build(tmp_path, objective, max_steps=3, steps_per_generation=3, gradient_share_every=1, **more)
    built.train()
    logged = [line for line in built.state.log_history if f"divergence/{divergence}/mean" in line]
    # The reference is the policy at the start and is left behind later.
    assert abs(logged[0][f"divergence/{divergence}/mean"]) < 1e-6
    assert logged[-1][f"divergence/{divergence}/mean"] > 1e-7
    assert 0.0 <= logged[-1]["penalty_gradient_share"] <= 1.0


@pytest.mark.parametrize("region", ["exact", "top_k"])
def test_regions_over_the_vocabulary_train(region: str, tmp_path: Path) -> None:
    spec = {"name": region, "radius": 1e-4, "divergence": "js"}
    built = build(tmp_path, {"preset": "dapo", "region": spec}, max_steps=4, steps_per_generation=4)
    built.train()
    blocked = [line["clip_ratio/region_mean"] for line in built.state.log_history if "clip_ratio/region_mean" in line]
    assert blocked[0] == 0.0  # the first update starts at the rollout policy
    assert max(blocked) > 0.0


def test_scoring_from_logits_equals_the_fused_path(tmp_path: Path) -> None:
    fused = build(tmp_path, "grpo", temperature=0.7)
    plain = build(tmp_path, {"preset": "grpo", "estimator": "exact"}, temperature=0.7)
    inputs = fill(batch(), fused)
    one = fused.loss_computer.scorer.padded(fused.model, inputs, with_logits=False)
    two = plain.loss_computer.scorer.padded(plain.model, inputs, with_logits=True)
    keep = inputs["completion_mask"].bool()
    assert one.logits is None
    assert two.logits is not None
    assert (one.logp - two.logp)[keep].abs().max() < 1e-5
    assert (one.entropy - two.entropy)[keep].abs().max() < 1e-5


@pytest.mark.parametrize(("fast", "tolerance"), [("off", 1e-6), ("auto", 1e-5)])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_accumulation_changes_neither_policy_term_nor_penalty(
    aggregation: str, fast: str, tolerance: float, tmp_path: Path
) -> None:
    objective = {"preset": "grpo", "coefficient": 0.5, "aggregation": aggregation}
    whole = build(tmp_path, objective, gradient_accumulation_steps=1, fast=fast)
    inputs = fill(batch(), whole)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    loss, gradient = loss_and_gradient(whole, inputs)
    parts = build(tmp_path, objective, gradient_accumulation_steps=4, per_device_train_batch_size=2, fast=fast)
    parts.current_gradient_accumulation_steps = 4
    total, summed = torch.zeros(()), torch.zeros_like(gradient)
    for i in range(4):
        rows = slice(2 * i, 2 * i + 2)
        part = {key: value[rows] if value.dim() else value for key, value in inputs.items()}
        part_loss, part_gradient = loss_and_gradient(parts, part)
        total, summed = total + part_loss, summed + part_gradient
    assert abs(total.item() - loss.item()) < tolerance
    assert (summed - gradient).abs().max() < tolerance * max(1.0, gradient.abs().max().item())


@pytest.mark.parametrize("name", ["old_per_token_logps", "ref_per_token_logps", "advantages"])
def test_a_non_finite_tensor_stops_the_run_with_step_and_name(name: str, tmp_path: Path) -> None:
    built = build(tmp_path, "grpo")
    inputs = fill(batch(), built)
    inputs[name] = inputs[name].clone()
    inputs[name].view(-1)[0] = torch.nan
    short = {"old_per_token_logps": "logp_old", "ref_per_token_logps": "logp_ref"}.get(name, name)
    with pytest.raises(NonFiniteError, match=rf"step 1: {short} is not finite"):
        loss_and_gradient(built, inputs)


def test_what_stands_at_masked_positions_does_not_stop_the_run(tmp_path: Path) -> None:
    built = build(tmp_path, "grpo")
    inputs = fill(batch(), built)
    clean, _ = loss_and_gradient(built, inputs)
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"].masked_fill(inputs["completion_mask"] == 0, torch.nan)
    dirty, gradient = loss_and_gradient(built, inputs)
    assert dirty == clean
    assert torch.isfinite(gradient).all()


def test_a_non_finite_gradient_stops_the_run_before_the_optimiser(tmp_path: Path) -> None:
    built = build(tmp_path, "dr_grpo", max_steps=2)
    start = torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])
    next(built.model.parameters()).register_hook(lambda grad: torch.full_like(grad, torch.nan))
    with pytest.raises(NonFiniteError, match="step 1: the gradient norm is nan"):
        built.train()
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in built.model.parameters()]), start)


def test_a_reference_that_is_the_policy_is_refused() -> None:
    policy = AutoModelForCausalLM.from_pretrained(TINY)
    with pytest.raises(ReferenceMismatchError, match="is the policy itself"):
        check_reference(policy, policy)


def test_a_policy_changed_after_loading_is_refused_because_its_reference_is_not_its_start(tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        next(policy.parameters()).add_(0.1)
    from trl_pair import dataset, reward

    config = MirrorConfig(**settings(tmp_path), objective="grpo")
    with pytest.raises(ReferenceMismatchError, match="differ before the first step"):
        MirrorTrainer(policy, reward_funcs=reward, args=config, train_dataset=dataset())


def test_trl_settings_that_the_objective_decides_are_refused_with_the_key_to_use(tmp_path: Path) -> None:
    for name, value, key in (
        ("epsilon", 0.3, "epsilon_low"),
        ("loss_type", "bnpo", "aggregation"),
        ("scale_rewards", "batch", "advantage"),
        ("importance_sampling_level", "sequence", "level"),
    ):
        with pytest.raises(ValueError, match=rf"{name}={value!r} has no effect.*{key}"):
            MirrorConfig(**settings(tmp_path, **{name: value}), objective="grpo")


def test_beta_is_the_coefficient_of_the_chosen_divergence(tmp_path: Path) -> None:
    assert MirrorConfig(**settings(tmp_path), objective="prob_l2_grpo").beta == 1e-4
    assert MirrorConfig(**settings(tmp_path), objective="dr_grpo").beta == 0.0
    config = MirrorConfig(**settings(tmp_path), objective="prob_l2_grpo", beta=0.5)
    assert config.resolved_objective().penalties[0].coefficient == 0.5
    with pytest.raises(ValueError, match="no penalty"):
        MirrorConfig(**settings(tmp_path), objective="dr_grpo", beta=0.1)


def test_an_objective_built_by_hand_takes_any_function(tmp_path: Path) -> None:
    objective = mirrorpo.objective("dr_grpo", divergence=lambda x: x**3, coefficient=0.01)
    config = MirrorConfig(**settings(tmp_path, max_steps=2, steps_per_generation=2))
    built = trainer(MirrorTrainer, config, objective=objective)
    assert built.beta == 0.01
    assert built.ref_model is not None
    built.train()
    assert "divergence/<lambda>/mean" in built.state.log_history[0]


def test_the_penalty_in_the_reward_moves_the_advantages_and_leaves_the_loss(tmp_path: Path) -> None:
    spec = {"preset": "dr_grpo", "divergence": "reverse_kl", "coefficient": 0.5, "placement": "reward"}
    built = build(tmp_path, spec, max_steps=3, steps_per_generation=3)
    built.train()
    logged = built.state.log_history
    assert "penalty_loss/mean" not in logged[0]
    assert abs(logged[0]["reward_penalty"]) < 1e-5  # policy and reference agree at the start

    penalty = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    built._rewards_per_func = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    advantages = built._advantages(torch.zeros(8), penalty)
    # group 1: rewards 1, 0, -1, -2 with mean -0.5; group 2: 0, 1, 0, 1 with mean 0.5
    assert torch.allclose(advantages, torch.tensor([1.5, 0.5, -0.5, -1.5, -0.5, 0.5, -0.5, 0.5]))


def test_a_schedule_takes_the_coefficient_to_its_end(tmp_path: Path) -> None:
    control = {"kind": "linear", "start": 1.0, "end": 0.0}
    built = build(tmp_path, {"preset": "grpo", "control": control}, max_steps=4)
    built.train()
    used = [line["coefficient"] for line in built.state.log_history if "coefficient" in line]
    assert used == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_an_adaptive_coefficient_rises_above_the_target_and_survives_a_checkpoint(tmp_path: Path) -> None:
    control = {"kind": "adaptive", "target": 1e-6, "rate": 0.5}
    spec = {"preset": "grpo", "control": control}
    built = build(tmp_path, spec, max_steps=6, save_strategy="steps", save_steps=3)
    built.train()
    used = [line["coefficient"] for line in built.state.log_history if "coefficient" in line]
    # Step 1 measures 0 (policy = reference): 1 - 0.2 * 0.5; afterwards the target is exceeded: 1 + 0.2 * 0.5.
    assert used == pytest.approx([0.04 * f for f in (1.0, 0.9, 0.9 * 1.1, 0.9 * 1.1**2, 0.9 * 1.1**3, 0.9 * 1.1**4)])
    state = json.loads((tmp_path / "checkpoint-3" / "penalty_state.json").read_text())
    assert state["factor"] == pytest.approx(0.9 * 1.1**2)
    resumed = build(tmp_path, spec, max_steps=6, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = [line["coefficient"] for line in resumed.state.log_history if "coefficient" in line]
    assert again[-3:] == pytest.approx(used[-3:])


def test_an_averaged_reference_follows_the_policy_and_survives_a_checkpoint(tmp_path: Path) -> None:
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    built = build(tmp_path, "grpo", max_steps=2, save_strategy="steps", save_steps=2, **more)
    start = torch.cat([p.detach().reshape(-1).clone() for p in built.ref_model.parameters()])
    built.train()
    moved = torch.cat([p.detach().reshape(-1).clone() for p in built.ref_model.parameters()])
    assert (moved - start).abs().max() > 1e-5
    resumed = build(tmp_path, "grpo", max_steps=2, save_strategy="no", **more)
    load_state(tmp_path / "checkpoint-2", resumed.penalty_state, resumed.ref_model)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in resumed.ref_model.parameters()]), moved)


def test_rewards_of_none_leave_the_group(tmp_path: Path) -> None:
    built = build(tmp_path, "dr_grpo")
    built._rewards_per_func = torch.tensor([[1.0], [0.0], [torch.nan], [torch.nan], [1.0], [1.0], [1.0], [0.0]])
    advantages = built._advantages(torch.zeros(8), None)
    assert torch.allclose(advantages, torch.tensor([0.5, -0.5, 0.0, 0.0, 0.25, 0.25, 0.25, -0.75]))


def test_a_batch_without_tokens_gives_a_zero_with_a_gradient(tmp_path: Path) -> None:
    built = build(tmp_path, "grpo")
    inputs = fill(batch(), built)
    inputs["completion_mask"] = torch.zeros(8, MAX_COMPLETION, dtype=torch.long)
    loss, gradient = loss_and_gradient(built, inputs)
    assert loss == 0.0
    assert gradient.abs().max() == 0.0
