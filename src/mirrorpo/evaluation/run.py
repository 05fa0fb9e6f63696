"""``mirrorpo eval``: load a model, sample, grade, summarise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from mirrorpo.errors import InputError
from mirrorpo.evaluation.sampling import Sampler, evaluate
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import SAFE_LOADING
from mirrorpo.training.recipe import Recipe
from mirrorpo.training.run import build_task, load_tokenizer


def evaluate_recipe(recipe: Recipe, samples: int, ks: Sequence[int], console: Console) -> dict[str, Any]:
    """Evaluates ``recipe.model`` on the unseen problems of ``recipe.task``.

    Args:
        recipe: its task, model, eval and ``train.max_completion_length`` are used.
        samples: completions per problem.
        ks: the k of pass@k.
        console: for progress.

    Returns:
        Plain numbers.

    Raises:
        InputError: the model or the task cannot be loaded.
    """
    task = build_task(recipe)
    rows = task.rows("test")[: recipe.eval.problems]
    if not rows:
        raise InputError("eval.problems: must be at least 1 here, got 0")
    tokenizer = load_tokenizer(recipe.model.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(recipe.model.path), dtype=recipe.model.dtype, **SAFE_LOADING
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {recipe.model.path!r}: {' '.join(str(error).split())[:300]}") from error
    model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    spec = recipe.eval
    sampler = Sampler(
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_completion_length=recipe.train.max_completion_length,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("evaluating", total=len(rows) * samples)
        result = evaluate(model, tokenizer, task, rows, sampler, samples, progress=lambda n: progress.advance(bar, n))
    summary = result.summary(ks)
    seconds = time.monotonic() - started
    summary["model"], summary["task"] = recipe.model.path, recipe.task.name
    summary["temperature"], summary["seed"] = spec.temperature, spec.seed
    summary["seconds"] = round(seconds, 2)
    summary["tokens_per_second"] = round(sum(s.num_tokens for s in result.samples) / seconds, 1)
    return summary
