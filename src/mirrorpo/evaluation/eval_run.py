"""Runner of ``mirrorpo eval``: load a model, sample, grade, summarise; keep the samples and go on after a kill.

The folder holds ``evaluation.json`` (what is evaluated, and how), ``samples.jsonl`` (a line a sample, appended batch by
batch, in the order of the problems) and ``summary.json``. The samples on disk are always the first ones of all; on
resume what lies beyond the last whole batch is dropped, so every batch has the same shape as in an unbroken evaluation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mirrorpo.config.train import Recipe
from mirrorpo.errors import InputError
from mirrorpo.evaluation.sampling import Engine, TransformersEngine, VllmEngine, prompt_ids, sample_batches
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.models import for_vllm, resolve_model
from mirrorpo.models.folder import loading
from mirrorpo.models.generation import CannotGenerateError, check_generates, end_tokens
from mirrorpo.models.threads import fit_threads, suggest_dtype
from mirrorpo.models.thresholds import context_of
from mirrorpo.models.weights import without_memory
from mirrorpo.progress import counted
from mirrorpo.runs.folder import EVALUATION, SAMPLES_FILE, SUMMARY_FILE, Folder, versions
from mirrorpo.training.setup import build_task, sampler_of, tokenizer_of
from mirrorpo.wording import printable, say

logger = logging.get_logger(__name__)


def evaluate_recipe(
    recipe: Recipe,
    ks: Sequence[int],
    console: Console,
    *,
    engine: str = "transformers",
    out: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Evaluates ``recipe.model`` on the unseen problems of ``recipe.task``.

    Args:
        recipe: its task, model, eval and ``train.max_completion_length`` are used.
        ks: the k of pass@k.
        console: for progress.
        engine: what generates, ``transformers`` or ``vllm``.
        out: a folder for the samples; None keeps none.
        resume: continue the evaluation in ``out``.

    Returns:
        Plain numbers. Those of an evaluation that was killed and resumed are those of one that was not, but for times.

    Raises:
        InputError: the model, the task or the folder cannot be used, or vLLM is wanted and not installed.
    """
    if recipe.eval.every:
        raise InputError(
            f"eval.every has no effect in an evaluation, which has no steps: legal is 0, got {recipe.eval.every}"
        )
    recipe = _as_begun(recipe, out) if resume and out is not None else recipe
    task, rows, tokenizer, ids = _problems(recipe)
    sampler, per_problem = sampler_of(recipe), recipe.eval.samples
    total = len(rows) * per_problem
    context = max(len(prompt) for prompt in ids) + sampler.max_completion_length
    # Before the folder: a model that cannot be loaded leaves nothing behind. A finished evaluation needs none.
    runner = None if resume else _engine(recipe, engine, tokenizer, context)
    if (size := sampler.batch_size) is None:
        runner = runner or _engine(recipe, engine, tokenizer, context)
        size = runner.batch_size
        recipe, sampler = _in_batches(recipe, size), replace(sampler, batch_size=size)
    folder = None if out is None else _open_folder(out, _settings(recipe, engine, len(rows)), resume, console)
    try:
        kept = None if folder is None else SamplesFile(folder.path / SAMPLES_FILE)
        samples = [] if kept is None else kept.take_up(size, total)
        done = len(samples)
        with counted(console, "evaluating", total, done) as advance:

            def take(batch: list[Sample]) -> None:
                if kept is not None:
                    kept.append(batch)
                samples.extend(batch)
                advance(len(batch))

            if done < total:
                runner = runner or _engine(recipe, engine, tokenizer, context)
                sample_batches(runner, tokenizer, task, rows, ids, sampler, per_problem, take, done)
        summary = _summary(recipe, engine, Evaluation(samples=tuple(samples), samples_per_problem=per_problem), ks)
        if folder is not None:
            folder.write_json(SUMMARY_FILE, summary)
        return summary
    finally:
        if folder is not None:
            folder.close()


def _settings(recipe: Recipe, engine: str, problems: int) -> dict[str, Any]:
    """What decides the samples."""
    spec = recipe.eval.model_dump(mode="json", exclude={"every"})  # an evaluation of its own has no steps
    return {
        "format": "mirrorpo evaluation",
        "version": 1,
        "model": recipe.model.model_dump(mode="json", exclude={"lora"}),
        "task": recipe.task.model_dump(mode="json"),
        "engine": engine,
        **spec,
        "problems": problems,
        "max_completion_length": sampler_of(recipe).max_completion_length,
    }


def _in_batches(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"batch_size": size})})


def _as_begun(recipe: Recipe, out: Path) -> Recipe:
    """With the folder's batch size where the recipe names none; what is wrong with the folder is said later."""
    if recipe.eval.batch_size is not None:
        return recipe
    try:
        size = json.loads((out / EVALUATION.file).read_text(encoding="utf-8"))["batch_size"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return recipe
    return _in_batches(recipe, size) if type(size) is int and size > 0 else recipe


def _problems(recipe: Recipe) -> tuple[Any, Sequence[Any], Any, list[list[int]]]:
    """The task, its unseen problems, the tokenizer, and the tokens of the prompts."""
    task = build_task(recipe)
    rows = task.rows("test")[: recipe.eval.problems]
    if not rows:
        raise InputError("eval.problems: must be at least 1 here, got 0")
    tokenizer = tokenizer_of(recipe, rows)
    return task, rows, tokenizer, [prompt_ids(tokenizer, row, recipe.model.chat_template) for row in rows]


def _open_folder(out: Path, settings: dict[str, Any], resume: bool, console: Console) -> Folder:
    text = json.dumps(settings, indent=2) + "\n"
    return Folder(out, EVALUATION, text, _loaded, resume, lambda line: say(console, line))


def _loaded(text: str, where: str) -> Any:
    try:  # the file may have been edited
        settings = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(f"{where}: must be a JSON object")
    return settings


class SamplesFile:
    """The samples of an evaluation on disk.

    Args:
        path: the file; created with the first batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take_up(self, batch_size: int, total: int) -> list[Sample]:
        """The samples of whole batches that are there; what lies beyond them is cut off the file.

        Args:
            batch_size: samples in a batch.
            total: samples of the whole evaluation; the last batch may be smaller.

        Raises:
            InputError: a line within them is not a sample; names file and line.
        """
        path = self.path
        if not path.exists():
            return []
        if not path.is_file():
            raise InputError(f"{path}: is a folder, not a file of samples")
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # torn by a kill
        if len(lines) > total:
            raise InputError(f"{path}: {len(lines)} samples, the evaluation has {total}")
        keep = len(lines) if len(lines) == total else len(lines) // batch_size * batch_size
        samples = [_sample(line, f"{path}: line {number}") for number, line in enumerate(lines[:keep], 1)]
        os.truncate(path, sum(len(line) for line in lines[:keep]))
        return samples

    def append(self, samples: list[Sample]) -> None:
        """Adds a batch; it is on the disk when this returns."""
        text = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _sample(line: bytes, where: str) -> Sample:
    try:  # the file may have been edited
        value = json.loads(line)
        if {*value} != {f.name for f in fields(Sample)}:
            raise ValueError(f"its keys must be {', '.join(f.name for f in fields(Sample))}")
        return Sample(**value)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: is not a sample ({error})") from None


def _engine(recipe: Recipe, engine: str, tokenizer: Any, context: int) -> Engine:
    path = resolve_model(recipe.model.path)
    if (Path(path) / "config.json").is_file():  # else an adapter, or a model of the hub
        try:
            without_memory(path, trust_remote_code=recipe.model.trust_remote_code)
        except ValueError as error:
            raise InputError(f"model.path {recipe.model.path!r}: {error}") from error
    if engine == "vllm":
        if (Path(path) / "adapter_config.json").is_file():
            raise InputError(f"--engine vllm: {path} holds an adapter; merge it into its model, or use transformers")
        return VllmEngine(for_vllm(path), recipe.model.dtype, context, recipe.eval.seed)
    options = loading(recipe.model.trust_remote_code)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=recipe.model.dtype, **options)
    except Exception as error:  # whatever broken files lead to
        raise InputError(f"model {recipe.model.path!r}: {' '.join(str(error).split())[:300]}") from error
    limit = context_of(model.config, model)
    if limit.limit is not None and context > limit.limit:
        line = f"with the longest prompt {context} tokens, the model's context is {limit.limit}"
        if limit.hard:
            raise InputError(f"eval.max_completion_length: {line}")
        logger.warning_once(f"{line}: it may be worse beyond")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        end_tokens(model, tokenizer)
    except ValueError as error:
        raise InputError(f"model.path {recipe.model.path!r}: {error}: set eos_token in tokenizer_config.json") from None
    try:
        check_generates(model)
    except CannotGenerateError as error:
        raise InputError(f"model.path {recipe.model.path!r}: {error}") from error
    fit_threads(model)
    suggest_dtype(model)
    return TransformersEngine(model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)


def _summary(recipe: Recipe, engine: str, evaluation: Evaluation, ks: Sequence[int]) -> dict[str, Any]:
    spec = recipe.eval
    summary = evaluation.summary(ks)
    for key, value in summary.items():  # nothing could be scored: JSON has no NaN
        if isinstance(value, float) and math.isnan(value):
            summary[key] = None
    return {
        "model": recipe.model.path,
        "task": recipe.task.name,
        "engine": engine,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "seed": spec.seed,
        **summary,
        "versions": versions(),
    }


def lines_of(summary: dict[str, Any], ks: Sequence[int]) -> list[str]:
    """A summary as text."""
    result = []
    for k in ks:
        value, (low, high) = summary[f"pass@{k}"], summary[f"pass@{k}_interval"]
        shown = "unknown, nothing could be scored" if value is None else f"{value:.4f}  [{low:.4f}, {high:.4f}]"
        result.append(f"pass@{k:<4}{shown}")
    how = "greedy" if summary["temperature"] == 0 else f"temperature {summary['temperature']:g}"
    quantiles = summary["length_quantiles"]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in summary["verdicts"].items() if count)
    reasons = ", ".join(f"{printable(reason)} {count}" for reason, count in summary["reasons"].items())
    speed = summary["tokens_per_second"]
    return [
        *result,
        f"samples {summary['problems']} problems x {summary['samples_per_problem']}, {how}: {counts}",
        f"reasons {reasons}",
        f"length  mean {summary['mean_length']:.1f}, median {quantiles['0.5']}, 90 % {quantiles['0.9']}, "
        f"longest {summary['max_length']} tokens; truncated {100 * summary['truncated']:.1f} %",
        f"speed   {speed or 0:,.0f} tokens a second ({summary['engine']})",
    ]
