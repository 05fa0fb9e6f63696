"""TRL's DPO trainer with any divergence: equal to TRL's own four, right for the others, and refusals."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import mirrorpo
from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorDPOConfig, MirrorDPOTrainer
from mirrorpo.training.preference_trainer import DPO_SEAMS

TINY = str(builtin_path("tiny"))
PAIRS = Dataset.from_list(
    [
        {"prompt": "12+7*3=?", "chosen": "7*3=21;12+21=33#### 33", "rejected": "#### 35"},
        {"prompt": "5*5-4=?", "chosen": "#### 21", "rejected": "5*5=20;20-4=16#### 16"},
        {"prompt": "2*9+1=?", "chosen": "2*9=18;18+1=19#### 19", "rejected": "#### 29"},
        {"prompt": "90-8*8=?", "chosen": "8*8=64;90-64=26#### 26", "rejected": "8*8=64;90-64=36#### 36"},
    ]
)
SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 4,
    "disable_dropout": True,
    "max_steps": 1,
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def moved_model() -> Any:
    """The tiny model away from its reference, by the same noise every time."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_of(folder: Path, **settings: Any) -> Any:
    ours = "divergence" in settings
    config = (MirrorDPOConfig if ours else DPOConfig)(str(folder), **{**SETTINGS, **settings})
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    kind = MirrorDPOTrainer if ours else DPOTrainer
    return kind(moved_model(), reference, args=config, train_dataset=PAIRS)


def loss_and_gradient(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.model.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


# (ours, TRL's): TRL's js_divergence is twice the mean of both KLs to the mixture
EQUAL = {
    "reverse_kl": ({"divergence": "reverse_kl"}, {"f_divergence_type": "reverse_kl"}),
    "forward_kl": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"divergence": "js", "beta": 0.2}, {"f_divergence_type": "js_divergence", "beta": 0.1}),
    "alpha": (
        {"divergence": {"name": "alpha", "alpha": 0.3}},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "the same fields": (
        {"divergence": None, "f_divergence_type": "js_divergence", "loss_type": "hinge"},
        {"f_divergence_type": "js_divergence", "loss_type": "hinge"},
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_are_those_of_trl(name: str, tmp_path: Path) -> None:
    ours, trls = EQUAL[name]
    loss, gradient = loss_and_gradient(trainer_of(tmp_path / "ours", **ours))
    expected, expected_gradient = loss_and_gradient(trainer_of(tmp_path / "trl", **trls))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6 * expected_gradient.abs().amax())
    assert expected_gradient.norm() > 1e-3


@pytest.mark.parametrize("precomputed", [False, True])
def test_every_other_divergence_is_the_preference_loss_of_the_sequences(tmp_path: Path, precomputed: bool) -> None:
    trainer = trainer_of(
        tmp_path, divergence="hellinger", beta=0.5, **({"precompute_ref_log_probs": True} if precomputed else {})
    )
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for model in (moved_model(), reference):
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            rows.append((logp * mask).sum(-1).chunk(2))
    (chosen, rejected), (ref_chosen, ref_rejected) = rows
    expected = mirrorpo.preference_loss(chosen, rejected, ref_chosen, ref_rejected, "hellinger", 0.5)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    # s = (1 - sqrt(q / p)) / 2
    rewards = [0.5 * 0.5 * (1 - (0.5 * (z - x)).exp()) for x, z in ((chosen, ref_chosen), (rejected, ref_rejected))]
    metrics = trainer._metrics["train"]
    assert metrics["rewards/chosen"] == pytest.approx([rewards[0].mean().item()], rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx([(rewards[0] - rewards[1]).mean().item()], rel=1e-4)
    assert metrics["rewards/accuracies"] == [(rewards[0] > rewards[1]).float().mean().item()]
    assert metrics["entropy"][0] > 0  # TRL's own metrics are there too


def test_an_adapter_is_compared_with_the_model_without_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = MirrorDPOConfig(str(tmp_path), divergence="js", beta=0.2, **SETTINGS)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trainer = MirrorDPOTrainer(model, args=config, train_dataset=PAIRS, peft_config=adapter)
    first, gradient = loss_and_gradient(trainer)
    # at the start both are the same model: log 2, and a gradient through the adapter
    torch.testing.assert_close(first, torch.tensor(2.0).log())
    assert gradient.norm() > 0
    trainer.train()
    assert loss_and_gradient(trainer)[0] < first


def test_training_and_evaluation_run_and_the_margin_grows(tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 6, "learning_rate": 1e-3, "logging_strategy": "steps", "logging_steps": 1}
    config = MirrorDPOConfig(str(tmp_path), divergence="jeffreys", eval_strategy="no", **settings)
    trainer = MirrorDPOTrainer(TINY, args=config, train_dataset=PAIRS, eval_dataset=PAIRS)
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 0.5
    assert trainer.evaluate()["eval_loss"] < 0.6


def test_the_overridden_methods_of_trl_have_the_signatures_that_are_overridden() -> None:
    ours = {name for name in vars(MirrorDPOTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in ours if inspect.isfunction(getattr(DPOTrainer, name, None))} == set(DPO_SEAMS)
    for name, expected in DPO_SEAMS.items():
        assert list(inspect.signature(getattr(DPOTrainer, name)).parameters)[1:] == list(expected)
    source = inspect.getsource(DPOTrainer._compute_loss)
    for used in ("log_probs", "completion_mask", "precompute_ref_logps", "ref_chosen_logps", "router_aux_loss_coef"):
        assert used in source, used


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "js_divergence"}, "unknown divergence 'js_divergence'"),
        ({"divergence": "k2"}, "'k2' is not"),
        ({"divergence": 3}, "divergence must be a name or a mapping with 'name', got int"),
        ({"divergence": {"alpha": 1.5}}, "needs the key 'name'"),
        ({"divergence": "js", "beta": 0.0}, r"beta must be a number in \(0, inf\], got 0.0"),
        ({"divergence": "js", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' has no effect"),
        ({"divergence": "alpha", "f_alpha_divergence_coef": 0.3}, "use divergence={'name': 'alpha'"),
        ({"divergence": "js", "loss_type": "ipo"}, r"loss_type=\['ipo'\] has no effect .*legal: 'sigmoid'"),
        ({"divergence": "js", "loss_type": ["sigmoid", "sft"]}, "loss_type="),
        ({"divergence": "js", "loss_weights": [0.5]}, "loss_weights="),
        ({"divergence": "js", "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect"),
        ({"divergence": "js", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
        ({"divergence": "js", "use_weighting": True}, "use_weighting=True has no effect"),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef=0.3 has no effect with f_divergence_type='reverse_kl'",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_in_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MirrorDPOConfig(str(tmp_path), **{**SETTINGS, **settings})
    assert "\n" not in str(caught.value)


def test_the_trainer_says_what_its_divergence_cannot_do(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the reward is not identified"):
        trainer_of(tmp_path, divergence="chi2")
    with pytest.warns(UserWarning, match="flat for the probabilities of whole sequences"):
        trainer_of(tmp_path, divergence="prob_l2")


def test_a_config_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args must be a MirrorDPOConfig, got DPOConfig"):
        MirrorDPOTrainer(TINY, args=DPOConfig(str(tmp_path), **SETTINGS), train_dataset=PAIRS)
