"""Fitness of a map: accuracy on held-out problems after T training steps with it, from the same start.

A worker process builds task, tokenizer, data set, trainer and model once; each member finds the weights, the optimiser
and the random state as the first one did. What a member gives depends on its payload alone.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import SaveStrategy, set_seed

from mirrorpo.config.search import EvolveRecipe
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.errors import InputError
from mirrorpo.evaluation import Evaluation, evaluate
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import objective_from
from mirrorpo.tasks import Row, Task
from mirrorpo.tasks.task import split_off
from mirrorpo.training.nonfinite import NonFiniteError
from mirrorpo.training.setup import Prepared, build_trainer, prepare, sampler_of

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer

JOB = "mirrorpo.search.member:evaluate_member"


def payload(recipe: EvolveRecipe, parameters: torch.Tensor, seed: int, split: str) -> dict[str, Any]:
    """What ``evaluate_member`` takes, as plain data.

    Args:
        recipe: its ``evolution`` group only counts as far as it says on what fitness is measured.
        parameters: (380,), of the map.
        seed: added to the seeds of training and sampling.
        split: ``validation``, or ``test`` for the last comparison.
    """
    inner = recipe.model_dump(mode="json")
    evolution = inner.pop("evolution")
    inner["evolution"] = {key: evolution[key] for key in ("validation_problems", "validation_samples")}
    return {"recipe": inner, "parameters": parameters.tolist(), "seed": seed, "split": split}


def evaluate_member(payload: dict[str, Any]) -> dict[str, Any]:
    """Trains with a map and measures it.

    Args:
        payload: of the function of that name.

    Returns:
        ``fitness``: accuracy, or None if the member failed; ``failed``: why, or None; ``right``, ``problems``,
        ``samples``, ``mean_length``.
    """
    return _workshop(payload["recipe"]).member(payload["parameters"], payload["seed"], payload["split"])


def held_out(prepared: Prepared, size: int, key: str = "evolution.validation_problems") -> tuple[list[Row], list[Row]]:
    """Training and validation rows, neither of which shares a prompt with the other or with the test rows.

    A task without a validation split gives up part of its training rows, by a digest of their text. ``key`` is the
    recipe's, for messages.

    Raises:
        InputError: too few rows, or a validation split that is the test split.
    """
    task, train = prepared.task, list(prepared.train_rows)
    try:
        validation = task.rows("validation")[:size]
    except (ValueError, KeyError):  # a task with two splits only; whatever else is wrong shows in the carving
        try:
            train, validation = split_off(train, "prompt", size, seed=0)
        except ValueError as error:
            raise InputError(f"{key}: {error}") from None
    if len(validation) < size:
        raise InputError(f"{key}: {size}, but the task has {len(validation)} validation rows")
    tested = {str(row["prompt"]) for row in prepared.test_rows}
    if any(str(row["prompt"]) in tested for row in validation):
        raise InputError(
            f"task {task.name}: its test part holds validation problems, so the last comparison would not be on unseen "
            "ones: give a test part (task.test_path, task.test_part)"
        )
    return train, validation


class Workshop:
    """All that members share, loaded once.

    Args:
        recipe: of the search.

    Raises:
        InputError: the task or the model cannot be used.
    """

    def __init__(self, recipe: EvolveRecipe) -> None:
        self.recipe = recipe
        prepared = prepare(recipe)
        train, validation = held_out(prepared, recipe.evolution.validation_problems)
        self.prepared = replace(prepared, train_rows=train)
        self.task: Task = prepared.task
        self.rows: dict[str, Sequence[Row]] = {"validation": validation, "test": prepared.test_rows}
        folder = tempfile.mkdtemp(prefix="mirrorpo-member-")  # nothing is saved, but TRL wants a folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # A worker says nothing of its own: the coordinator does.
        logging.getLogger("mirrorpo.training.trainer").setLevel(logging.ERROR)
        self.trainer = build_trainer(self.prepared, Path(folder), [])
        self.trainer.args.save_strategy = SaveStrategy.NO
        self.trainer.args.gradient_share_every = 0  # two more backward passes that no fitness needs
        self.start = _weights(self.trainer)

    def objective(self, parameters: Sequence[float]) -> Objective:
        """The recipe's objective with another map."""
        numbers = torch.tensor(parameters, dtype=torch.float64)
        return objective_from({**self.recipe.objective.spec(), "divergence": {"name": "neural", "parameters": numbers}})

    def member(self, parameters: Sequence[float], seed: int, split: str) -> dict[str, Any]:
        """See ``evaluate_member``."""
        try:
            objective = self.objective(parameters)
            self.train(objective, seed)
        except NonFiniteError as error:
            return {"fitness": None, "failed": str(error)}
        except ValueError as error:
            # An unusable map (all zero, too steep) is a failed member; every other ValueError is a mistake of ours.
            if _is_map(parameters):
                raise
            return {"fitness": None, "failed": str(error)}
        return self.measure(seed, split)

    def train(self, objective: Objective, seed: int) -> None:
        """T steps from the start, as a fresh trainer would make them."""
        restart(self.trainer, self.start, objective, self.recipe.train.seed + seed)
        self.trainer.train()

    def measure(self, seed: int, split: str) -> dict[str, Any]:
        """The policy, as it stands, on a split."""
        result = self._sampled(seed, split)
        summary = result.summary()
        accuracy = summary["accuracy"]
        if not math.isfinite(accuracy):
            return {"fitness": None, "failed": f"no completion could be graded ({summary['reasons']})"}
        return {
            "fitness": accuracy,
            "failed": None,
            "right": sum((sample.reward or 0.0) >= 1.0 for sample in result.samples),
            "problems": summary["problems"],
            "samples": summary["samples_per_problem"],
            "mean_length": summary["mean_length"],
        }

    def _sampled(self, seed: int, split: str) -> Evaluation:
        sampler = replace(sampler_of(self.recipe), seed=self.recipe.eval.seed + seed)
        repeats = self.recipe.evolution.validation_samples if split == "validation" else 1
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return evaluate(
            model,
            self.prepared.tokenizer,
            self.task,
            self.rows[split],
            sampler,
            repeats,
            chat_template=self.recipe.model.chat_template,
        )


def restart(trainer: MirrorTrainer, start: dict[str, torch.Tensor], objective: Objective, seed: int) -> None:
    """Puts a trainer back to before its first step, with another objective of the same kind and another seed.

    Args:
        trainer: of one process; used or not.
        start: its weights then, from ``_weights``.
        objective: differs from the trainer's own in its divergence alone.
        seed: of the data's order, of the rollouts, of everything.
    """
    with torch.no_grad():
        for name, tensor in _named_weights(trainer):
            tensor.copy_(start[name])
    trainer.adopt(objective)
    # What transformers and TRL carry from one train() to the next (tests/evolution/test_member.py: nothing is left).
    trainer.optimizer = trainer.lr_scheduler = None
    trainer._step = 0
    trainer._buffered_inputs = None  # pyright: ignore[reportAttributeAccessIssue]
    for metrics in trainer._metrics.values():
        metrics.clear()
    trainer.model.zero_grad(set_to_none=True)
    trainer.args.seed = seed
    trainer.args.data_seed = None
    set_seed(seed)


def _named_weights(trainer: MirrorTrainer) -> list[tuple[str, torch.Tensor]]:
    """What training changes: trainable parameters, buffers, a reference that follows the policy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = [(f"policy.{name}", p) for name, p in model.named_parameters() if p.requires_grad]
    found += [(f"policy.{name}", b) for name, b in model.named_buffers()]
    if trainer.ref_model is not None and trainer.args.sync_ref_model:
        found += [
            (f"reference.{name}", p)
            for name, p in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters()
        ]
    return found


def _weights(trainer: MirrorTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _named_weights(trainer)}


def _is_map(parameters: Sequence[float]) -> bool:
    try:
        MirrorMap.of(list(parameters))
    except ValueError:
        return False
    return True


_built: dict[str, Workshop] = {}


def _workshop(recipe: dict[str, Any]) -> Workshop:
    """This process's workshop for a recipe; only the last one is kept."""
    key = repr(recipe)
    if key not in _built:
        from mirrorpo.interrupts import quiet

        quiet()
        _built.clear()
        _built[key] = Workshop(EvolveRecipe.model_validate(recipe))
    return _built[key]


__all__ = ["JOB", "Workshop", "evaluate_member", "held_out", "payload", "restart"]
