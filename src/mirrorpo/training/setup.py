"""Parts of a run, made from a recipe: task, tokenizer, settings, trainer and sampler."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, PrinterCallback
from transformers.utils import logging

from mirrorpo.config.train import Recipe, TeacherSpec
from mirrorpo.errors import InputError, check_trl, check_vllm, unknown_name
from mirrorpo.evaluation import Sampler
from mirrorpo.evaluation.sampling import chat, prompt_ids
from mirrorpo.interrupts import silent_if_it_fails
from mirrorpo.kernels.backend import unavailable
from mirrorpo.models import resolve_model
from mirrorpo.models import tokenizer as tokenizers
from mirrorpo.models.chat_template import check_chat_template
from mirrorpo.models.folder import check_model_folder, check_path, loading
from mirrorpo.models.generation import CannotGenerateError, check_generates
from mirrorpo.models.threads import fit_threads, suggest_dtype
from mirrorpo.models.thresholds import Context, context_of, noise_of
from mirrorpo.models.weights import without_memory
from mirrorpo.tasks import Row, Task, find_task
from mirrorpo.training.distributed import UNSHARDED, world_size
from mirrorpo.training.rewards import reward_function

if TYPE_CHECKING:
    from mirrorpo.training.config import MirrorConfig
    from mirrorpo.training.trainer import MirrorTrainer

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe turned into objects; nothing has been written yet."""

    recipe: Recipe
    task: Task
    train_rows: Sequence[Row]
    test_rows: Sequence[Row]
    tokenizer: Any
    model_path: str
    longest_prompt: int  # tokens, of the training rows
    noise: Mapping[str, float] = field(default_factory=dict)  # of the model's config, which a run switches off


def build_task(recipe: Recipe) -> Task:
    """The recipe's task.

    Raises:
        InputError: its data cannot be read or its settings do not fit.
    """
    options = recipe.task.model_dump()
    try:
        entry = find_task(options.pop("name"))
        assert entry is not None  # the recipe was checked with its settings
        return entry.build(**options)
    except (ValueError, OSError) as error:
        raise InputError(f"task: {error}") from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: the path or hub name cannot be loaded.
    """
    check_path(path)
    try:
        check_model_folder(resolve_model(path), trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"model.path {path!r}: {error}") from error
    try:
        with silent_if_it_fails():
            return tokenizers.load(resolve_model(path), trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InputError(f"model.path {path!r}: {error}") from error


def tokenizer_of(recipe: Recipe, rows: Sequence[Row]) -> Any:
    """The tokenizer of the recipe's model, once its chat template has made the prompts of these rows within its limits.

    Raises:
        InputError: it cannot be loaded or used.
    """
    spec = recipe.model
    tokenizer = load_tokenizer(spec.path, trust_remote_code=spec.trust_remote_code)
    if not spec.path.startswith("builtin:"):
        prompts = [chat(tokenizer, row) for row in rows]
        check_chat_template(tokenizer, prompts, spec.chat_template, f"model.path {spec.path!r}")
    return tokenizer


def prompt_lengths(recipe: Recipe, tokenizer: Any, rows: Sequence[Row]) -> tuple[list[int], list[str]]:
    """Tokens of each prompt, and notes on how prompts are laid out.

    Raises:
        InputError: the tokenizer has no end token, no chat template where one is needed, or a template that fails.
    """
    options, path = recipe.model.chat_template, recipe.model.path
    chats = any(not isinstance(row["prompt"], str) for row in rows)
    try:
        tokenizers.check_end_token(tokenizer, _config(recipe))
        note = tokenizers.check_chat(tokenizer, options, chats)
        return [len(prompt_ids(tokenizer, row, options)) for row in rows], [] if note is None else [note]
    except (ValueError, TypeError, TemplateError) as error:  # the template is the author's text
        raise InputError(f"model.path {path!r}: {' '.join(str(error).split())[:300]}") from error


def _config(recipe: Recipe) -> Any:
    spec = recipe.model
    try:
        return AutoConfig.from_pretrained(resolve_model(spec.path), trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):  # said elsewhere; here it would only make a message better
        return None


def check_prompts(recipe: Recipe, train_rows: Sequence[Row]) -> None:
    """Raises unless a step's prompts are there.

    Raises:
        InputError: fewer rows than prompts.
    """
    if len(train_rows) < recipe.train.prompts_per_step:
        raise InputError(
            f"train.prompts_per_step: {recipe.train.prompts_per_step} prompts, but the task has {len(train_rows)} "
            "training rows"
        )


def check_evaluations(recipe: Recipe, test_rows: Sequence[Row]) -> None:
    """Raises ``InputError`` for evaluations between the steps of a task that has no problems for them."""
    if recipe.eval.every and not test_rows:
        raise InputError(
            f"eval.every has no effect: task {recipe.task.name!r} has no unseen problems. Legal: 0, got "
            f"{recipe.eval.every}"
        )


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can go wrong before the first file is written.

    Raises:
        InputError: names the key.
    """
    task = build_task(recipe)
    train_rows, test_rows = task.rows("train"), task.rows("test")[: recipe.eval.problems]
    check_prompts(recipe, train_rows)
    check_evaluations(recipe, test_rows)
    if recipe.train.use_vllm:
        check_vllm("train.use_vllm")
        if recipe.train.vllm.mode == "server" and not torch.cuda.is_available():
            raise InputError("train.vllm.mode: 'server' sends weights by NCCL, which needs a CUDA GPU. Legal: colocate")
    if recipe.train.kernels == "triton":
        reason = unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if reason is not None:
            raise InputError(f"train.kernels: 'triton' cannot run here: {reason}. Legal: torch, auto")
    check_trl()
    check_trackers(recipe)
    if recipe.train.trl and recipe.preference is None:
        trainer_config(recipe, Path("."), world_size())
    tokenizer = tokenizer_of(recipe, [*train_rows, *test_rows])
    model = check_model(recipe)
    lengths, notes = prompt_lengths(recipe, tokenizer, train_rows)
    longest = max(lengths)
    if recipe.teacher is not None and "teacher" in recipe.objective.build().needs:
        whole = longest + recipe.train.max_completion_length
        check_teacher(recipe.teacher, recipe.model.path, model, tokenizer, whole)
    notes += check_context(recipe, longest, context_of(model.config, model))
    noise = {key: value for key, value in noise_of(model.config).items() if key in model.config.to_dict()}
    if noise:
        named = ", ".join(f"{key} {value:g}" for key, value in noise.items())
        notes.append(f"the model's dropout is off in this run, so that two passes give the same numbers: {named}")
    for note in notes:
        logger.warning_once(note)  # pyright: ignore[reportAttributeAccessIssue]
    return Prepared(
        recipe=recipe,
        task=task,
        train_rows=train_rows,
        test_rows=test_rows,
        tokenizer=tokenizer,
        model_path=resolve_model(recipe.model.path),
        longest_prompt=longest,
        noise=noise,
    )


def check_teacher(spec: TeacherSpec, policy: str, model: Any, tokenizer: Any, longest: int) -> None:
    """Raises ``InputError`` for a teacher that is not there, is the policy, reads other tokens or too few of them."""
    from mirrorpo.training.teacher import check_teacher_model, server_of

    if spec.path is not None:
        check_teacher_model(spec, policy, tokenizer, len(model.get_output_embeddings().weight))
    elif spec.url is not None:
        prefix = [] if spec.prefix is None else tokenizer(spec.prefix, add_special_tokens=False)["input_ids"]
        server_of(spec, model, tokenizer).check_length(longest + len(prefix))


def check_model(recipe: Recipe) -> Any:
    """The recipe's model without memory, once its weights and its adapter are found to fit.

    Raises:
        InputError: a weights file is absent, torn or no safetensors, a tensor is missing, the adapter does not fit,
            quantised weights are to be trained themselves.
    """
    try:
        model = without_memory(resolve_model(recipe.model.path), trust_remote_code=recipe.model.trust_remote_code)
    except ValueError as error:
        raise InputError(f"model.path {recipe.model.path!r}: {error}") from error
    written = getattr(_config(recipe), "quantization_config", None)  # as the file has it; transformers may take it away
    if recipe.model.lora is None and isinstance(written, dict) and not written.get("dequantize"):
        raise InputError(
            f"model.path {recipe.model.path!r}: its weights are quantised ({written.get('quant_method')!s:.40}) and "
            "have no gradient; use the model as it was before, or train an adapter (model.lora)"
        )
    adapt(recipe, model)
    return model


def adapt(recipe: Recipe, model: Any) -> Any:
    """The model with the recipe's adapter in it, or as it is.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the model.
    """
    lora = lora_config(recipe)
    if lora is None:
        return model
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"model.lora: {' '.join(str(error).split())[:300]}") from error


def batch_shape(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Completions in memory at once on each process, and how often that is accumulated for an update.

    Raises:
        InputError: the completions of an update do not divide.
    """
    train = recipe.train
    update = train.batch_size // train.updates_per_batch
    if update % processes:
        raise InputError(
            f"train: the {update} completions of an update (prompts_per_step * group_size / updates_per_batch) must "
            f"divide by the {processes} processes"
        )
    micro = train.micro_batch_size or update // processes
    if (update // processes) % micro:
        raise InputError(
            f"train.micro_batch_size: must divide the {update // processes} completions per process, got {micro}"
        )
    return micro, update // processes // micro


def trainer_config(
    recipe: Recipe, output_dir: Path, world_size: int = 1, context: int | None = None, noise: Iterable[str] = ()
) -> MirrorConfig:
    """The trainer's settings for a recipe.

    Args:
        recipe: what to run.
        output_dir: of the trainer.
        world_size: processes.
        context: the longest sequence, for vLLM's cache.
        noise: settings of the model's config that are set to 0.
    """
    train = recipe.train
    micro, accumulation = batch_shape(recipe, world_size)
    optimiser_steps = train.updates_per_batch * train.passes_per_batch
    bf16 = train.precision == "bfloat16"
    from mirrorpo.training.config import MirrorConfig

    try:
        return MirrorConfig(
            output_dir=str(output_dir),
            objective=recipe.objective.build(),
            teacher=None if recipe.teacher is None else recipe.teacher.model_dump(exclude_defaults=True),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=train.updates_per_batch * accumulation,
            num_iterations=train.passes_per_batch,
            num_generations=train.group_size,
            max_completion_length=train.max_completion_length,
            temperature=train.temperature,
            top_p=train.top_p,
            top_k=0,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=round(train.warmup_ratio * train.steps * optimiser_steps),
            weight_decay=train.weight_decay,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            mask_truncated_completions=train.mask_truncated,
            max_grad_norm=train.max_grad_norm,
            max_steps=train.steps * optimiser_steps,
            logging_steps=optimiser_steps,
            save_strategy="steps",
            save_steps=train.save_every * optimiser_steps,
            save_total_limit=train.keep,
            seed=train.seed,
            sync_ref_model=recipe.reference.kind != "kept",
            ref_model_sync_steps=recipe.reference.every,
            ref_model_mixup_alpha=1.0 if recipe.reference.kind == "synced" else recipe.reference.rate,
            on_nonfinite=train.on_nonfinite,
            max_nonfinite=train.max_nonfinite,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=train.gradient_checkpointing,
            fast=train.fast,
            rollouts=train.rollouts,
            kernels=train.kernels,
            token_budget=train.token_budget,
            use_vllm=train.use_vllm,
            vllm_mode=train.vllm.mode,
            vllm_gpu_memory_utilization=train.vllm.memory_share,
            vllm_enable_sleep_mode=train.vllm.sleep,
            vllm_server_base_url=train.vllm.server_url,
            vllm_max_model_length=context if train.use_vllm else None,
            vllm_importance_sampling_correction=train.vllm.correction != "none",
            vllm_importance_sampling_mode="sequence_mask" if train.vllm.correction == "none" else train.vllm.correction,
            vllm_importance_sampling_clip_max=train.vllm.ratio_max,
            vllm_importance_sampling_clip_min=train.vllm.ratio_min,
            chat_template_kwargs=dict(recipe.model.chat_template),
            model_init_kwargs={
                "dtype": recipe.model.dtype,
                **loading(recipe.model.trust_remote_code),
                **dict.fromkeys(noise, 0.0),
            },
            report_to=[tracker for tracker in train.report_to if tracker != "tensorboard"] or "none",
            run_name=train.run_name,
            disable_tqdm=True,
            remove_unused_columns=False,
            **train.trl,
        )
    except (ValueError, TypeError) as error:
        if not train.trl:
            raise
        raise InputError(_about_trl(error, train.trl)) from error


_ARGUMENT = re.compile(r"(multiple values for|unexpected) keyword argument '(\w+)'")


def _about_trl(error: Exception, more: Mapping[str, Any]) -> str:
    """What is wrong with the fields under ``train.trl``: one that another key decides, that does not exist, a value."""
    found = _ARGUMENT.search(str(error))
    if found is None:
        return f"train.trl: {' '.join(str(error).split())[:300]}"
    if found[1] == "unexpected":
        from mirrorpo.training.config import MirrorConfig

        return f"train.trl: {unknown_name('field of GRPOConfig', found[2], [one.name for one in fields(MirrorConfig)])}"
    return f"train.trl.{found[2]}: another key of the recipe decides it, got {more[found[2]]!r}"


def check_trackers(recipe: Recipe) -> None:
    """Raises ``InputError`` for a tracker that is not installed."""
    for tracker in recipe.train.report_to:
        if find_spec(tracker) is None:
            raise InputError(f"train.report_to: needs the package {tracker!r}: pip install {tracker}")


def tracker_callbacks(recipe: Recipe, folder: Path) -> list[Any]:
    """TensorBoard's writer, in the run folder; TRL starts the other trackers by name."""
    if "tensorboard" not in recipe.train.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]


def to_dataset(prepared: Prepared) -> Dataset:
    """Prompts as the policy sees them; the whole row travels along as JSON for the verifier."""
    return Dataset.from_list(
        [{"prompt": chat(prepared.tokenizer, row), "row": json.dumps(row)} for row in prepared.train_rows]
    )


def lora_config(recipe: Recipe) -> Any:
    """The adapter's settings in peft's form; None if all parameters are trained.

    Raises:
        InputError: peft is not installed.
    """
    spec = recipe.model.lora
    if spec is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("model.lora: needs the extra 'peft': pip install 'mirrorpo[peft]'") from error
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        task_type="CAUSAL_LM",
    )


def build_trainer(
    prepared: Prepared, folder: Path, callbacks: list[Any], kind: Callable[..., MirrorTrainer] | None = None
) -> MirrorTrainer:
    """The trainer of a prepared recipe, a ``MirrorTrainer`` or of another ``kind``; loads the weights.

    Raises:
        InputError: the model cannot be loaded any more.
    """
    if kind is None:
        from mirrorpo.training.trainer import MirrorTrainer as kind  # not needed to look at a recipe

    recipe = prepared.recipe
    context = prepared.longest_prompt + recipe.train.max_completion_length
    try:
        trainer = kind(
            prepared.model_path,
            reward_funcs=reward_function(prepared.task),
            args=trainer_config(recipe, folder, world_size(), context, prepared.noise),
            train_dataset=to_dataset(prepared),
            processing_class=prepared.tokenizer,
            peft_config=lora_config(recipe),
            callbacks=callbacks,
        )
        if not recipe.train.use_vllm and trainer.accelerator.distributed_type in UNSHARDED:
            check_generates(trainer.accelerator.unwrap_model(trainer.model))
    except (OSError, SafetensorError, CannotGenerateError) as error:
        what = f"model.path {recipe.model.path!r}"
        if "vLLM server" in str(error):  # TRL's, which waited for it
            what = f"train.vllm.server_url {recipe.train.vllm.server_url!r}"
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error
    fit_threads(trainer.model)
    suggest_dtype(trainer.model, recipe.train.precision)
    trainer.remove_callback(PrinterCallback)  # the progress bar says it better
    return trainer


def check_context(recipe: Recipe, longest: int, context: Context) -> list[str]:
    """Notes on the longest sequence, if it is longer than what the model is made for.

    Raises:
        InputError: the ``longest`` prompt and a whole completion are more than the model can compute, or more than the
            token budget.
    """
    wanted, budget = longest + recipe.train.max_completion_length, recipe.train.token_budget
    lengths = f"the longest prompt has {longest} tokens, with the completion {wanted}"
    if budget is not None and wanted > budget:
        raise InputError(
            f"train.token_budget: must hold the longest prompt, {longest} tokens, with its completion: at least "
            f"{wanted}, got {budget}"
        )
    if context.limit is None or wanted <= context.limit:
        return []
    if context.hard:
        raise InputError(
            f"train.max_completion_length: {lengths}; the model's context is {context.limit}, the end of its table of "
            "positions"
        )
    return [f"{lengths}; the model is made for {context.limit} and may be worse beyond"]


def sampler_of(recipe: Recipe) -> Sampler:
    """How the recipe's evaluation draws."""
    spec = recipe.eval
    return Sampler(
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_completion_length=spec.max_completion_length or recipe.train.max_completion_length,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
