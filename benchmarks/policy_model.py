"""A policy of the size that a benchmark asks for, the trainers around it, and micro-batches as TRL lays them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorConfig, MirrorTrainer


@dataclass(frozen=True)
class Shape:
    """A micro-batch.

    Attributes:
        prompt: tokens of the prompt.
        shortest, longest: completions are as long as a uniform draw between them; the longest occurs.
        group: completions per prompt.
        groups: prompts.
        vocabulary: V.
    """

    prompt: int = 100
    shortest: int = 40
    longest: int = 200
    group: int = 8
    groups: int = 1
    vocabulary: int = 1_000

    def __str__(self) -> str:
        spread = f"{self.shortest}-{self.longest}"
        return f"prompt {self.prompt}, completions {spread}, {self.groups} x {self.group}, V {self.vocabulary:,}"


def save_model(folder: Path, vocabulary: int, hidden: int, layers: int, key_heads: int | None = None) -> str:
    """A random Qwen3 with heads of 64, saved where trainers load it from; None: as many key heads as heads."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=key_heads or hidden // 64,
        head_dim=64,
        intermediate_size=3 * hidden,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,
    )
    path = folder / f"model-{vocabulary}-{hidden}-{layers}"
    if not path.exists():
        Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def build(kind: type, model: str, folder: Path, shape: Shape, **more: Any) -> Any:
    """TRL's trainer or ours for micro-batches of a shape; both optimise Dr. GRPO's loss without a penalty."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": shape.group * shape.groups,
        "num_generations": shape.group,
        "max_completion_length": shape.longest,
        "report_to": "none",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": False,
        "save_strategy": "no",
    } | more
    if kind is GRPOTrainer:
        args: Any = GRPOConfig(**common, loss_type="dr_grpo", scale_rewards="none", beta=0.0)
    else:
        args = MirrorConfig(**{"objective": "dr_grpo"} | common)
    trainer = kind(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 16),
        processing_class=AutoTokenizer.from_pretrained(str(builtin_path("tiny")), padding_side="left"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def micro_batch(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """One micro-batch, off-policy: what TRL hands to the loss."""
    g = torch.Generator().manual_seed(seed)
    rows = shape.group * shape.groups
    sizes = torch.randint(shape.shortest, shape.longest + 1, (rows,), generator=g)
    sizes[0] = shape.longest
    mask = (torch.arange(shape.longest) < sizes.unsqueeze(1)).long()
    prompts = torch.randint(1, shape.vocabulary, (shape.groups, shape.prompt), generator=g)
    logp = -torch.rand(rows, shape.longest, generator=g) * 2 * torch.tensor(float(shape.vocabulary)).log()
    return {
        "prompt_ids": prompts.repeat_interleave(shape.group, 0),
        "prompt_mask": torch.ones(rows, shape.prompt, dtype=torch.long),
        "completion_ids": torch.randint(1, shape.vocabulary, (rows, shape.longest), generator=g),
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        "old_per_token_logps": logp,
        "num_items_in_batch": mask.sum(),
    }


def step_of(trainer: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The policy step as a trainer does it: forward, loss, backward; no optimiser."""
    inputs = {key: value.to(trainer.accelerator.device) for key, value in inputs.items()}

    def step() -> torch.Tensor:
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, dict(inputs))
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss.detach()

    return step


def contenders(model: str, folder: Path, shape: Shape, device: str = "cpu") -> dict[str, Any]:
    """The trainers that a policy step is compared between."""
    here = {"use_cpu": device == "cpu"}
    return {
        "TRL": build(GRPOTrainer, model, folder, shape, **here),
        "mirrorpo, padded": build(MirrorTrainer, model, folder, shape, fast="off", **here),
        "mirrorpo": build(MirrorTrainer, model, folder, shape, fast="auto", **here),
    }
