"""What would a recipe run? Prompts, tokens, updates, objective and memory, said without loading weights or writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrorpo.config.train import Recipe
from mirrorpo.errors import InputError
from mirrorpo.models import resolve_model
from mirrorpo.tasks import Row
from mirrorpo.training.memory import memory, model_facts
from mirrorpo.training.setup import build_task, check_context, check_model, check_prompts, prompt_lengths, tokenizer_of
from mirrorpo.user_code import NotImportedError

# Bytes of English text in a token of a large vocabulary, roughly; used only where the tokenizer cannot be loaded.
_BYTES_A_TOKEN = 4
_ABSENT = "the model is not on this machine and the hub cannot be reached; set model.path to its folder, or download it"
_REFERENCES = {"kept": "a frozen copy of the policy's start", "synced": "the policy of up to {every} updates ago"}
_REFERENCES |= {"averaged": "a running average of the policy (rate {rate:g}, every {every} updates)"}


def plan(recipe: Recipe) -> dict[str, Any]:
    """What ``mirrorpo train`` would do with a recipe.

    Args:
        recipe: what would run.

    Returns:
        Plain data: ``task``, ``prompts``, ``tokens``, ``updates``, ``objective``, ``reference``, ``optimiser``,
        ``sampling``, ``evaluation``, ``model``, ``memory`` (bytes; None if the model is unknown here), ``notes``.

    Raises:
        InputError: what would stop the run before its first step.
    """
    task = build_task(recipe)
    rows, test_rows = task.rows("train"), task.rows("test")[: recipe.eval.problems]
    check_prompts(recipe, rows)
    notes: list[str] = []
    lengths, exact = _prompt_lengths(recipe, rows, notes)
    train = recipe.train
    result: dict[str, Any] = {
        "task": {"name": recipe.task.name, "train_problems": len(rows), "test_problems": len(test_rows)},
        "prompts": {
            "a_step": train.prompts_per_step,
            "completions_a_step": train.batch_size,
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "longest_tokens": max(lengths),
            "exact": exact,
            "times_each_problem": round(train.steps * train.prompts_per_step / len(rows), 3),
        },
        "tokens": _tokens(recipe, lengths),
        "updates": _updates(recipe),
        "objective": recipe.objective.describe(),
        "reference": _reference(recipe),
        "sampling": {"temperature": train.temperature, "top_p": train.top_p, "engine": _engine(recipe)},
        "evaluation": {"problems": len(test_rows), "samples": recipe.eval.samples, **_eval_sampling(recipe)},
    }
    result["model"], result["memory"] = _model(recipe, max(lengths), notes)
    result["notes"] = notes
    return result


def _prompt_lengths(recipe: Recipe, rows: Sequence[Row], notes: list[str]) -> tuple[list[int], bool]:
    path = recipe.model.path
    try:
        tokenizer = tokenizer_of(recipe, rows)
    except InputError:
        if not _on_the_hub(path):
            raise
        notes.append(f"prompt lengths are guessed, {_BYTES_A_TOKEN} bytes a token: {_ABSENT}")
        return [len(str(row["prompt"]).encode("utf-8", "surrogatepass")) // _BYTES_A_TOKEN + 1 for row in rows], False
    lengths, said = prompt_lengths(recipe, tokenizer, rows)
    notes += said
    return lengths, True


def _on_the_hub(path: str) -> bool:
    """Whether a path is a hub name; a folder or a built-in model that is not there is a mistake, not a hub offline."""
    return not path.startswith((".", "/", "~", "builtin:")) and not Path(path).exists() and path.count("/") <= 1


def _tokens(recipe: Recipe, lengths: Sequence[int]) -> dict[str, int]:
    train = recipe.train
    generated = train.batch_size * train.max_completion_length
    prompts = round(train.batch_size * sum(lengths) / len(lengths))
    return {
        "generated_a_step_at_most": generated,
        "prompt_a_step": prompts,
        "trained_a_step_at_most": (generated + prompts) * train.passes_per_batch,
        "generated_in_all_at_most": generated * train.steps,
    }


def _updates(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    update = train.batch_size // train.updates_per_batch
    a_step = train.updates_per_batch * train.passes_per_batch
    return {
        "steps": train.steps,
        "updates_a_step": a_step,
        "updates": train.steps * a_step,
        "completions_an_update": update,
        "completions_at_once": train.micro_batch_size or update,
        "optimiser": "AdamW",
        "learning_rate": train.learning_rate,
        "schedule": train.schedule,
        "warmup_updates": round(train.warmup_ratio * train.steps * a_step),
        "max_grad_norm": train.max_grad_norm,
    }


def _reference(recipe: Recipe) -> str:
    if not recipe.objective.needs_reference:
        return "none"
    if recipe.model.lora is not None:
        return "the policy with its adapter off"
    spec = recipe.reference
    return _REFERENCES[spec.kind].format(every=spec.every, rate=spec.rate)


def _engine(recipe: Recipe) -> str:
    train = recipe.train
    if not train.use_vllm:
        return "transformers"
    if train.vllm.mode == "server":
        return f"vLLM at {train.vllm.server_url}"
    return f"vLLM in this process, {100 * train.vllm.memory_share:g} % of the device's memory"


def _eval_sampling(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.eval
    length = spec.max_completion_length or recipe.train.max_completion_length
    return {"temperature": spec.temperature, "top_p": spec.top_p, "max_completion_length": length}


def _model(recipe: Recipe, longest: int, notes: list[str]) -> tuple[dict[str, Any], dict[str, int] | None]:
    about: dict[str, Any] = {"path": recipe.model.path, "precision": recipe.train.precision}
    if Path(resolve_model(recipe.model.path)).is_dir():
        check_model(recipe)  # its weights are whole
    try:
        facts = model_facts(recipe)
    except InputError:
        if not _on_the_hub(recipe.model.path):
            raise
        notes.append(f"memory is unknown: {_ABSENT}")
        return about, None
    notes += check_context(recipe, longest, facts.context)
    about |= {"parameters": facts.parameters, "trained": facts.trained, "weight_bytes": facts.weight_bytes}
    about["source"] = facts.source
    if facts.unknown is not None:
        notes.append(f"memory is unknown: {facts.unknown}")
        return about, None
    try:
        return about, memory(recipe, facts, longest)
    except NotImportedError:
        notes.append("memory is unknown: a plan does not import the code of yours that the objective names")
        return about, None


def render(data: dict[str, Any]) -> str:
    """A plan as text, one subject a line."""
    task, prompts, tokens, updates = (data[key] for key in ("task", "prompts", "tokens", "updates"))
    sampling, evaluation = data["sampling"], data["evaluation"]
    about = "" if prompts["exact"] else "about "
    lines = {
        "task": f"{task['name']}: {task['train_problems']:,} problems for training, each "
        f"{prompts['times_each_problem']:g} times; {task['test_problems']:,} for testing",
        "prompts": f"{prompts['a_step']} a step, {prompts['completions_a_step']} completions; "
        f"{about}{prompts['mean_tokens']:g} tokens on average, {about}{prompts['longest_tokens']} at most",
        "tokens": f"a step generates at most {tokens['generated_a_step_at_most']:,} and trains on at most "
        f"{tokens['trained_a_step_at_most']:,} with prompts; all steps generate at most "
        f"{tokens['generated_in_all_at_most']:,}",
        "updates": f"{updates['steps']} steps x {updates['updates_a_step']} = {updates['updates']}, each of "
        f"{updates['completions_an_update']} completions, {updates['completions_at_once']} at once",
        "optimiser": f"{updates['optimiser']}, learning rate {updates['learning_rate']:g}, {updates['schedule']} after "
        f"{updates['warmup_updates']} updates of warm-up, gradient norm at most {updates['max_grad_norm']:g}",
        "objective": data["objective"],
        "reference": data["reference"],
        "sampling": f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}; {sampling['engine']}",
        "evaluation": f"before and after, {evaluation['problems']:,} problems x {evaluation['samples']}, "
        + ("greedy" if evaluation["temperature"] == 0 else f"temperature {evaluation['temperature']:g}"),
        "model": _model_line(data["model"]),
    }
    text = [f"{name:<12}{line}" for name, line in lines.items()]
    return "\n".join([*text, *_memory_lines(data["memory"]), *(f"note        {note}" for note in data["notes"])])


def _model_line(about: dict[str, Any]) -> str:
    if "parameters" not in about:
        return f"{about['path']}, passes in {about['precision']}"
    part = "all trained" if about["trained"] == about["parameters"] else f"{about['trained']:,} trained (LoRA)"
    return (
        f"{about['path']}: {about['parameters']:,} parameters ({about['source']}), {part}; "
        f"{about['weight_bytes']} bytes a weight, passes in {about['precision']}"
    )


def _memory_lines(parts: dict[str, int] | None) -> list[str]:
    if parts is None:
        return []
    peaks = ("update", "generation", "total", "device")
    named = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if name not in peaks)
    return [
        f"{'memory':<12}{named}",
        f"{'':<12}peak {size(parts['total'])} (update {size(parts['update'])}, generation "
        f"{size(parts['generation'])}); fits a device of {size(parts['device'])}, and 1 to 2 GB for its libraries",
    ]


def size(value: int) -> str:
    """Bytes in words, three digits.

    Example:
        >>> size(6_882_299_904), size(1_320_000), size(0)
        ('6.88 GB', '1.32 MB', '0')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return str(value)
