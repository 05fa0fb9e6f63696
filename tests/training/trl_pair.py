"""A TRL trainer and ours on the same model, and batches for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorConfig, MirrorTrainer

TINY = str(builtin_path("tiny"))
MAX_COMPLETION = 12

# Preset -> (our objective, TRL's settings that mean the same). TRL's defaults are written out where they matter.
PAIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": ("grpo", {"loss_type": "grpo", "beta": 0.04, "scale_rewards": "group"}),
    "grpo without penalty": (
        {"preset": "grpo", "coefficient": 0},
        {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "group"},
    ),
    "grpo with ratio-corrected k3": (
        {"preset": "grpo", "estimator": "weighted"},
        {"loss_type": "grpo", "beta": 0.04, "scale_rewards": "group", "use_bias_correction_kl": True},
    ),
    "dr_grpo": ("dr_grpo", {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none"}),
    "dr_grpo with k3": (
        {"preset": "dr_grpo", "divergence": "k3", "coefficient": 0.1},
        {"loss_type": "dr_grpo", "beta": 0.1, "scale_rewards": "none"},
    ),
    "dr_grpo with ratio-corrected k3": (
        {"preset": "dr_grpo", "divergence": "reverse_kl", "coefficient": 0.1, "estimator": "weighted"},
        {"loss_type": "dr_grpo", "beta": 0.1, "scale_rewards": "none", "use_bias_correction_kl": True},
    ),
    "dapo": ("dapo", {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}),
    "dapo with k3": (
        {"preset": "dapo", "divergence": "k3", "coefficient": 0.1},
        {"loss_type": "dapo", "beta": 0.1, "epsilon": 0.2, "epsilon_high": 0.28},
    ),
    "dapo with ratio-corrected k3": (
        {"preset": "dapo", "divergence": "k3", "coefficient": 0.1, "estimator": "weighted"},
        {"loss_type": "dapo", "beta": 0.1, "epsilon": 0.2, "epsilon_high": 0.28, "use_bias_correction_kl": True},
    ),
    "gspo": (
        "gspo",
        {
            "loss_type": "grpo",
            "beta": 0.0,
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "sapo": ("sapo", {"loss_type": "sapo", "beta": 0.0}),
    "cispo": ("cispo", {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 5.0}),
    "dapo with dual clip": (
        {"preset": "dapo", "dual_clip": 1.5},
        {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5},
    ),
}

# TRL's own settings, which MirrorConfig takes as they are when it has no `objective`; everything else is TRL's default.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "TRL's defaults": {},
    "defaults with a penalty": {"beta": 0.1},
    "grpo": {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2},
    "grpo, penalty not corrected": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dr_grpo, scaled": {"loss_type": "dr_grpo", "beta": 0.1, "scale_rewards": True},
    "dapo": {"epsilon_high": 0.28, "epsilon": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo with a penalty": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.1,
        "use_bias_correction_kl": False,
    },
    "two-sided clip": {"delta": 1.5},
    "two-sided clip inside the region": {"delta": 1.1, "loss_type": "grpo"},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.05},
    "entropy bonus on the tokens of highest entropy": {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.2, "beta": 0.05},
    "sapo of sequences": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo of tokens": {"loss_type": "luspo", "beta": 0.1, "delta": 1.4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "cispo with TRL's default cap": {"loss_type": "cispo", "beta": 0.1},
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Something that varies within a group: the share of even digits."""
    texts = [c[0]["content"] for c in completions]
    return [sum(ch in "02468" for ch in t) / max(1, len(t)) for t in texts]


def dataset(num_rows: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}*3+{i + 7}=?"}]} for i in range(num_rows)])


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": MAX_COMPLETION,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        **more,
    }


def trainer(kind: type, config: Any, **more: Any) -> Any:
    built = kind(
        TINY,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset(),
        processing_class=AutoTokenizer.from_pretrained(TINY, padding_side="left"),
        **more,
    )
    built.remove_callback(PrinterCallback)
    return built


def of_the_pair(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """TRL's settings and ours that mean the same."""
    objective, theirs = PAIRS[name]
    return {"use_bias_correction_kl": False, **theirs}, {"objective": objective}  # TRL's default is True


def alike(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same settings for both, none of them an objective."""
    return TRL_SETTINGS[name], TRL_SETTINGS[name]


def trls_trainer(folder: Path, given: dict[str, Any], **more: Any) -> GRPOTrainer:
    return trainer(GRPOTrainer, GRPOConfig(**{**settings(folder, **more), **given}))


def our_trainer(folder: Path, given: dict[str, Any], fast: str, **more: Any) -> MirrorTrainer:
    config = MirrorConfig(**{**settings(folder, **more), **given}, fast=fast, rollouts="transformers")
    return trainer(MirrorTrainer, config)


def batch(*, with_old: bool = True, tool_mask: bool = False, seed: int = 0, rows: int = 8) -> dict[str, Any]:
    """One micro-batch as TRL hands it to the loss: ragged, with an empty completion, off-policy."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(32, 120, (rows, 6), generator=g)
    completion = torch.randint(32, 120, (rows, MAX_COMPLETION), generator=g)
    lengths = torch.tensor([12, 5, 1, 8, 12, 3, 7, 2])[:rows]
    mask = (torch.arange(MAX_COMPLETION) < lengths.unsqueeze(1)).long()
    inputs: dict[str, Any] = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        # Turned into log-probabilities around the model's own by `fill`.
        "ref_noise": 0.5 * torch.randn(rows, MAX_COMPLETION, generator=g),
        "num_items_in_batch": torch.tensor(8 * int(mask.sum())),
    }
    if tool_mask:
        inputs["tool_mask"] = (torch.rand(rows, MAX_COMPLETION, generator=g) < 0.7).long()
    if with_old:
        # Some tokens inside the region and some outside.
        inputs["old_noise"] = 0.3 * torch.randn(rows, MAX_COMPLETION, generator=g)
    return inputs


def fill(inputs: dict[str, Any], built: Any) -> dict[str, Any]:
    """Replaces the noise by log-probabilities around the model's own."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logp, _, _ = built._get_per_token_logps_and_entropies(built.model, ids, attention, MAX_COMPLETION)
    for name in ("old", "ref"):
        noise = inputs.pop(f"{name}_noise", None)
        if noise is not None:
            inputs[f"{name}_per_token_logps"] = (logp + noise).clamp(max=0.0)
    return inputs


def loss_and_gradient(built: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    built.model.train()
    built.model.zero_grad()
    loss = built._compute_loss(built.model, dict(inputs))
    loss.backward()
    grads = [p.grad.reshape(-1) for p in built.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)
