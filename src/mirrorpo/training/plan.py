"""The plan of a run: prompts, tokens, updates, objective and memory, without loading weights or writing.

The estimate of the memory reads the model's config alone:

=============== ======================================================================================================
part            bytes (P parameters, P' of them trained, w bytes a weight, w' a trained weight, c a computed number)
=============== ======================================================================================================
weights         w P, and with LoRA w' P' for the adapter
gradients       w' P'
optimiser       2 w' P': AdamW's two averages
reference       w P, if the objective has a penalty and all parameters are trained (an adapter is switched off instead)
casts           2 P, if float32 weights are used in bfloat16: copies that live during a pass
activations     S (L a), or with checkpointing S (L 4 H + a): S tokens, L layers, hidden size H, and a token and layer
                a = norms 2 H (4 + w), with LoRA 8 H; inputs of linear layers 2 c H, and where they are cast one by one
                5 c H (casts), 6 c H (casts and LoRA) or 4 (5 H + Q + I) - c I (LoRA on weights of 16 bits);
                attention 4 c Q; norms of query and key (4 + c) (Q + K) where a model has them; feed-forward 4 c I;
                adapters 28 r (Q, K: query and key sizes; I: inner size; r: rank). S: packed rows have no padding, and
                the completions of a group share their prompt; padded, each has its own
logits          4 bytes n C V for each of logits, their log-softmax and its gradient, and once more for each anchor that
                is compared over the vocabulary; nothing otherwise: the fused head keeps no logits
cache           2 c L K a token: keys and values of a step's completions, all at once (vLLM: in turns, in its own share)
=============== ======================================================================================================

Peak: weights, gradients, optimiser and reference, plus the larger of update (casts, activations, logits) and generation
(cache). The device's context, fragmentation and the buffers of its libraries (1 to 2 GB) come on top. On a CPU they are
part of the plan as ``process``: 0.55 GB for the packages, and what the C library does not give back of tensors that are
freed between others that stay. It is a share of the activations, measured (docs/performance.md): 0.5, and 0.9 with
LoRA, whose layers compute their output four times (base, adapter, scaled, sum) and keep one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirrorpo.config.train import Recipe
from mirrorpo.errors import InputError
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import check_config
from mirrorpo.models.thresholds import Context, context_of
from mirrorpo.tasks import Row
from mirrorpo.training.setup import (
    build_task,
    check_context,
    check_evaluations,
    check_model,
    check_prompts,
    prompt_lengths,
    tokenizer_of,
)
from mirrorpo.user_code import NotImportedError
from mirrorpo.wording import plural

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
    if recipe.preference is not None:
        raise InputError("--plan: says what a training on rewards would do; this recipe has the group preference")
    task = build_task(recipe)
    rows, test_rows = task.rows("train"), task.rows("test")[: recipe.eval.problems]
    check_prompts(recipe, rows)
    check_evaluations(recipe, test_rows)
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
        "evaluation": {
            "problems": len(test_rows),
            "samples": recipe.eval.samples,
            "times": 2 + (train.steps - 1) // recipe.eval.every if recipe.eval.every else 2,
            **_eval_sampling(recipe),
        },
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
    how = {"temperature": spec.temperature, "top_p": spec.top_p, "max_completion_length": length}
    return {"every": spec.every, **how}


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
    if facts.quantised is not None:
        notes.append(
            f"the weights are packed ({facts.quantised}) and counted at {facts.weight_bytes} bytes: they take less"
        )
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
        "evaluation": f"{_evaluations(evaluation)}, {evaluation['problems']:,} problems x {evaluation['samples']}, "
        + ("greedy" if evaluation["temperature"] == 0 else f"temperature {evaluation['temperature']:g}"),
        "model": _model_line(data["model"]),
    }
    text = [f"{name:<12}{line}" for name, line in lines.items()]
    return "\n".join([*text, *_memory_lines(data["memory"]), *(f"note        {note}" for note in data["notes"])])


def _evaluations(evaluation: dict[str, Any]) -> str:
    if not evaluation["every"]:
        return "before and after"
    return f"before, after and every {plural(evaluation['every'], 'step')}, {evaluation['times']} times"


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
        f"{size(parts['generation'])}); fits {_where(parts)}",
    ]


def _where(parts: dict[str, int]) -> str:
    if parts["process"]:
        return f"a machine with {size(parts['device'])} free: no GPU, the whole process is counted"
    return f"a device of {size(parts['device'])}, and 1 to 2 GB for its libraries"


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


_PACKAGES = 0.55e9  # bytes of a process that has imported the trainer
_KEPT_FREE, _KEPT_FREE_LORA = 0.5, 0.9  # of the activations: what glibc keeps of freed tensors at an update's peak
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# What the public configs of the models in the shipped recipes say, for a plan without network.
_QWEN3 = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 |= {"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True, "dtype": "bfloat16"}
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen/Qwen3-1.7B": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the estimate needs to know of a model.

    Attributes:
        parameters, trained: counted on a model without memory; ``trained`` is the adapter's with LoRA.
        layers, hidden, inner, query, key, vocabulary: sizes (query: heads times head size; key: likewise).
        context: the longest sequence.
        normed_keys: whether query and key pass a norm of their own.
        rank: of the adapters, 0 without.
        quantised: how the weights are packed, which the bytes here leave out; None if they are not.
        unknown: why the sizes of a layer are not known, and memory with them; they are 0 then.
        weight_bytes, trained_bytes: of one number.
        source: where the sizes come from.
    """

    parameters: int
    trained: int
    vocabulary: int
    context: Context
    weight_bytes: int
    trained_bytes: int
    source: str
    layers: int = 0
    hidden: int = 0
    inner: int = 0
    query: int = 0
    key: int = 0
    normed_keys: bool = False
    rank: int = 0
    quantised: str | None = None
    unknown: str | None = None


def model_facts(recipe: Recipe) -> ModelFacts:
    """Sizes of the recipe's model, from its config.

    Raises:
        InputError: the config cannot be read and the model is not in ``KNOWN``; an adapter that does not fit it.
    """
    config, source = _config(recipe.model.path, recipe.model.trust_remote_code)
    text = config.get_text_config()
    model, parameters, trained = _count(recipe, config)
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = str(text.dtype or "float32").removeprefix("torch.")
    sizes = _sizes(text)
    return ModelFacts(
        parameters=parameters,
        trained=trained,
        vocabulary=text.vocab_size,
        context=context_of(config, model),
        weight_bytes=_BYTES[dtype],
        trained_bytes=_BYTES[dtype] if recipe.model.lora is None else 4,  # peft keeps an adapter in float32
        source=source,
        normed_keys=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        rank=0 if recipe.model.lora is None else recipe.model.lora.r,
        quantised=_quantised(config),
        unknown=sizes if isinstance(sizes, str) else None,
        **({} if isinstance(sizes, str) else sizes),
    )


def _quantised(config: Any) -> str | None:
    written = getattr(config, "quantization_config", None)  # only configs of such models have it
    if written is None or (isinstance(written, dict) and written.get("dequantize")):
        return None
    return str(written.get("quant_method") if isinstance(written, dict) else written.quant_method)[:40]


# Older families name the same sizes otherwise, or leave them to be derived.
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_hidden_size")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


def _sizes(config: Any) -> dict[str, int] | str:
    """Sizes of a layer of attention and feed-forward, or why the config has none."""

    def first(*names: str) -> int | None:
        found = (getattr(config, name, None) for name in names)  # many families, each with names of its own
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    layers, hidden, heads = first("num_hidden_layers"), first("hidden_size"), first("num_attention_heads")
    if layers is None or hidden is None or heads is None:
        return f"the estimate is made for layers of attention, and a {config.model_type} model has others"
    head = first("head_dim") or hidden // heads
    shared = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)  # Falcon
    keys = 1 if shared else first(*_KEY_HEADS) or heads
    inner = first(*_INNER) or 4 * hidden
    return {"layers": layers, "hidden": hidden, "inner": inner, "query": heads * head, "key": keys * head}


def _config(path: str, trust_remote_code: bool) -> tuple[Any, str]:
    from transformers import AutoConfig, PretrainedConfig, Qwen3Config

    try:
        # The text first: a class may make lists as long as the sizes in it.
        written, _ = PretrainedConfig.get_config_dict(resolve_model(path))
        check_config(written, trust_remote_code=trust_remote_code)
        return AutoConfig.from_pretrained(resolve_model(path), trust_remote_code=trust_remote_code), "its config"
    except Exception as error:  # whatever a broken file leads to
        if path in KNOWN:
            return Qwen3Config(**KNOWN[path]), "sizes kept here: the hub cannot be reached"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path {path!r}: its config cannot be read ({reason})") from error


def _count(recipe: Recipe, config: Any) -> tuple[Any, int, int]:
    from transformers import AutoModelForCausalLM

    from mirrorpo.training.setup import adapt

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    # Untrusted: the model's code and its author's config.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path {recipe.model.path!r}: is not a causal language model ({reason})") from error
    parameters = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        adapted = adapt(recipe, model)
    return model, parameters, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _kept_a_token(model: ModelFacts, w: int, c: int, rank: int) -> int:
    """Bytes that a layer keeps of a token for its backward pass; ``rank`` of the adapters, 0 without."""
    hidden, query, inner = model.hidden, model.query, model.inner
    norms, inputs = 2 * hidden * (4 if rank else 4 + w), 2 * c * hidden
    if c < w:
        inputs = (6 if rank else 5) * c * hidden
    elif rank and w < 4:
        inputs = 4 * (5 * hidden + query + inner) - c * inner
    norms += (4 + c) * (query + model.key) if model.normed_keys else 0
    return norms + inputs + 4 * c * query + 4 * c * inner + 28 * rank


def memory(recipe: Recipe, model: ModelFacts, longest_prompt: int) -> dict[str, int]:
    """Bytes of each part of the table above, on one device of one process.

    Args:
        recipe: what would run.
        model: sizes.
        longest_prompt: tokens.

    Returns:
        The parts, ``update`` and ``generation`` (peaks of the two phases), ``total`` without vLLM's share, and
        ``device``: the least memory of a device that has room for that and for vLLM's share.

    Example:
        >>> from mirrorpo.config.train import recipe_from
        >>> recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": {"preset": "prob_l2_grpo"}})
        >>> facts = model_facts(recipe)
        >>> memory(recipe, facts, 10)["reference"] == 4 * facts.parameters
        True
    """
    train, objective = recipe.train, recipe.objective.build()
    w, w1 = model.weight_bytes, model.trained_bytes
    c = 2 if train.precision == "bfloat16" else w
    lora = recipe.model.lora is not None
    length = longest_prompt + train.max_completion_length
    rows = train.micro_batch_size or train.batch_size // train.updates_per_batch
    layer = _kept_a_token(model, w, c, model.rank if lora else 0)
    kept = model.layers * 4 * model.hidden + layer if train.gradient_checkpointing else model.layers * layer
    tokens = rows * length
    if train.fast == "auto" and not objective.needs_logits:
        tokens -= (rows - min(rows, -(-rows // train.group_size))) * longest_prompt
    over_vocabulary = sum(p.needs_logits for p in objective.penalties[:1])
    logits = (3 + over_vocabulary + ("old" in objective.needs_logits_of)) if objective.needs_logits else 0
    parts = {
        "weights": w * model.parameters + (w1 * model.trained if lora else 0),
        "gradients": w1 * model.trained,
        "optimiser": 2 * w1 * model.trained,
        "reference": w * model.parameters if objective.needs_reference and not lora else 0,
        "casts": 2 * model.parameters if c == 2 and w == 4 else 0,
        "activations": tokens * kept,
        "logits": 4 * rows * train.max_completion_length * model.vocabulary * logits,
        "cache": 2 * c * model.layers * model.key * train.batch_size * length,
    }
    kept_free = _KEPT_FREE_LORA if lora else _KEPT_FREE  # measured on a CPU; on other devices not part of the plan
    parts["process"] = 0 if torch.cuda.is_available() else round(_PACKAGES + kept_free * parts["activations"])
    fixed = parts["process"] + parts["weights"] + parts["gradients"] + parts["optimiser"] + parts["reference"]
    update = fixed + parts["casts"] + parts["activations"] + parts["logits"]
    colocated = train.use_vllm and train.vllm.mode == "colocate"
    generation = fixed if train.use_vllm else fixed + parts["cache"]
    total = max(update, generation)
    device: float = total
    if colocated:
        share = train.vllm.memory_share
        engine = 2 * model.parameters + 2 * 2 * model.layers * model.key * length  # its weights, one sequence's cache
        beside = max(update, fixed / (1 - share)) if train.vllm.sleep else total / (1 - share)
        device = max(beside, engine / share)
    return {**parts, "update": update, "generation": generation, "total": total, "device": round(device)}


__all__ = ["ModelFacts", "memory", "model_facts", "plan", "render", "size"]
