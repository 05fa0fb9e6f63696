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
_LORA = (
    *_SMALL, "model.lora={r: 4, dropout: 0.1}", "train.passes_per_batch=2", "objective.coefficient=0.1", "eval.every=1",
)  # fmt: skip

# Two generations of one pair, six trainings of four steps. The map matters so much, and the seeds are such, that no
# twins are equally fit. (Elites and the test of acceptance are killed in tests/search/test_kills.py, where a member
# costs nothing.)
_SEARCH = (
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.max_completion_length=20",
    "train.learning_rate=1.5e-3",
    "task.difficulty=easy",
    "objective.coefficient=1e4",
    "eval.problems=4",
    "evolution.generations=2",
    "evolution.population=2",
    "evolution.sigma=1",
    "evolution.validation_problems=64",
    "evolution.final_seeds=1",
)
_ONE_WORKER = ("--workers", "1", "--threads", "1")
_STUDY_FILE = Path(__file__).with_name("small_study.yaml")

TRAINED: dict[str, tuple[str, ...]] = {"full": _FULL, "lora": _LORA}
# Commands whose work is done by workers.
COORDINATED = ("evolve", "study")
ALL = (*TRAINED, *COORDINATED)


def arguments(name: str, out: Path) -> list[str]:
    """The arguments of ``mirrorpo`` for one of them."""
    if name == "evolve":
        return ["evolve", "evolve/embedded", *_SEARCH, "--out", str(out), *_ONE_WORKER]
    if name == "study":
        return ["study", str(_STUDY_FILE), "--out", str(out), *_ONE_WORKER]
    return ["train", "arithmetic", *TRAINED[name], "--out", str(out)]
