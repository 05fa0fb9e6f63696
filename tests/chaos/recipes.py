"""Small runs in which everything that a resumed run must take up is in play."""

from __future__ import annotations

from pathlib import Path

_SMALL = (
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.save_every=1",
    "train.max_completion_length=20",
    "train.learning_rate=1e-3",
    "task.difficulty=easy",
    "task.train_size=9",  # two steps an epoch: later epochs, and their order
    "eval.problems=3",
)
# Two optimiser steps on each generated batch, a schedule, an averaged reference and a steered coefficient.
_FULL = (
    *_SMALL,
    "train.updates_per_batch=2",
    "train.micro_batch_size=4",
    "train.schedule=cosine",
    "objective={preset: grpo, coefficient: 0.1, control: {kind: adaptive, target: 0.01, rate: 0.5}}",
    "reference.kind=averaged",
)
_LORA = (*_SMALL, "model.lora={r: 4, dropout: 0.1}", "train.passes_per_batch=2", "objective.coefficient=0.1")

RECIPES: dict[str, tuple[str, ...]] = {"full": _FULL, "lora": _LORA}


def train(recipe: str, out: Path) -> list[str]:
    """The arguments of ``mirrorpo`` for one of them."""
    return ["train", "arithmetic", *RECIPES[recipe], "--out", str(out)]
