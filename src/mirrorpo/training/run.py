"""From a recipe to a run folder: evaluate, train, evaluate, report."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import AutoTokenizer, PrinterCallback

from mirrorpo.errors import InputError
from mirrorpo.evaluation import Evaluation, Sampler, evaluate
from mirrorpo.evaluation.sampling import chat, prompt_ids
from mirrorpo.files import one_line_if_refused, write_text_atomic
from mirrorpo.interrupts import resume_command
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import SAFE_LOADING, check_model_folder
from mirrorpo.tasks import TASKS, Row, Task
from mirrorpo.training.callbacks import MetricsWriter, ProgressBar, trim_metrics
from mirrorpo.training.checkpoints import CheckpointError, clean, publish, seal, step_of, writing_folder
from mirrorpo.training.config import MirrorConfig
from mirrorpo.training.folder import BEFORE_FILE, SAMPLES_FILE, SUMMARY_FILE, FollowedFolder, RunFolder
from mirrorpo.training.recipe import Recipe
from mirrorpo.training.reward import reward_function
from mirrorpo.training.stopping import GracefulStop
from mirrorpo.training.trainer import MirrorTrainer
from mirrorpo.training.world import check_equal, gather, is_main, rank, shards_parameters, together, world_size

# Problems whose completions before and after are kept for the report.
NUM_SAMPLES_KEPT = 16


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe turned into objects; nothing has been written yet."""

    recipe: Recipe
    task: Task
    train_rows: Sequence[Row]
    test_rows: Sequence[Row]
    tokenizer: Any
    model_path: str


def build_task(recipe: Recipe) -> Task:
    """The recipe's task.

    Raises:
        InputError: its data cannot be read or its settings do not fit.
    """
    options = recipe.task.model_dump()
    try:
        return TASKS[options.pop("name")].build(**options)
    except (ValueError, OSError) as error:
        raise InputError(f"task: {error}") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: the path or hub name cannot be loaded.
    """
    try:
        check_model_folder(resolve_model(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"model.path {path!r}: {error}") from error
    try:
        return AutoTokenizer.from_pretrained(resolve_model(path), padding_side="left", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model.path {path!r}: cannot be loaded ({reason[:300]})") from error


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


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can go wrong before the first file is written.

    Raises:
        InputError: names the key.
    """
    task = build_task(recipe)
    train_rows, test_rows = task.rows("train"), task.rows("test")[: recipe.eval.problems]
    check_prompts(recipe, train_rows)
    if recipe.train.use_vllm and find_spec("vllm") is None:
        raise InputError("train.use_vllm: needs the extra 'vllm': pip install 'mirrorpo[vllm]', or set it to false")
    tokenizer = load_tokenizer(recipe.model.path)
    return Prepared(
        recipe=recipe,
        task=task,
        train_rows=train_rows,
        test_rows=test_rows,
        tokenizer=tokenizer,
        model_path=resolve_model(recipe.model.path),
    )


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


def trainer_config(recipe: Recipe, output_dir: Path, world_size: int = 1, context: int | None = None) -> MirrorConfig:
    """The trainer's settings for a recipe; ``context`` is the longest sequence, for vLLM's cache."""
    train = recipe.train
    micro, accumulation = batch_shape(recipe, world_size)
    optimiser_steps = train.updates_per_batch * train.passes_per_batch
    bf16 = train.precision == "bfloat16"
    return MirrorConfig(
        output_dir=str(output_dir),
        objective=recipe.objective.spec(),
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
        model_init_kwargs={"dtype": recipe.model.dtype, **SAFE_LOADING},
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


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


def build_trainer(prepared: Prepared, folder: Path, callbacks: list[Any]) -> MirrorTrainer:
    """The trainer of a prepared recipe; loads the weights.

    Raises:
        InputError: the model cannot be loaded, or the prompts do not fit its context.
    """
    recipe = prepared.recipe
    longest = longest_prompt(prepared)
    context = longest + recipe.train.max_completion_length
    try:
        trainer = MirrorTrainer(
            prepared.model_path,
            reward_funcs=reward_function(prepared.task),
            args=trainer_config(recipe, folder, world_size(), context),
            train_dataset=to_dataset(prepared),
            processing_class=prepared.tokenizer,
            peft_config=lora_config(recipe),
            callbacks=callbacks,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"model.path {recipe.model.path!r}: {' '.join(str(error).split())[:300]}") from error
    trainer.remove_callback(PrinterCallback)  # the progress bar says it better
    config: Any = trainer.model.config
    check_context(recipe, longest, config.get_text_config().max_position_embeddings)
    return trainer


def longest_prompt(prepared: Prepared) -> int:
    """Tokens in the longest training prompt."""
    options = prepared.recipe.model.chat_template
    return max(len(prompt_ids(prepared.tokenizer, row, options)) for row in prepared.train_rows)


def check_context(recipe: Recipe, longest: int, context: int) -> None:
    """Raises unless the longest sequence fits the model and a packed row.

    Raises:
        InputError: the ``longest`` prompt and a whole completion are more than ``context`` or the token budget.
    """
    wanted, budget = longest + recipe.train.max_completion_length, recipe.train.token_budget
    if wanted > context:
        raise InputError(
            f"train.max_completion_length: the longest prompt has {longest} tokens, with the completion {wanted}; "
            f"the model's context is {context}"
        )
    if budget is not None and wanted > budget:
        raise InputError(
            f"train.token_budget: must hold the longest prompt, {longest} tokens, with its completion: at least "
            f"{wanted}, got {budget}"
        )


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


def run_evaluation(prepared: Prepared, model: Any, console: Console, label: str) -> Evaluation | None:
    """Graded samples on the unseen problems, with a bar; None if the recipe asks for none. Processes share the work."""
    spec, rows = prepared.recipe.eval, prepared.test_rows[rank() :: world_size()]
    if not prepared.test_rows:
        return None
    sampler = replace(sampler_of(prepared.recipe), seed=spec.seed + rank())
    columns = (TextColumn(label), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=len(rows) * spec.samples)
        mine = evaluate(
            model,
            prepared.tokenizer,
            prepared.task,
            rows,
            sampler,
            spec.samples,
            progress=lambda n: progress.advance(bar, n),
            chat_template=prepared.recipe.model.chat_template,
        )
    numbered = [replace(sample, problem=sample.problem * world_size() + rank()) for sample in mine.samples]
    everyone = sorted((sample for part in gather(numbered) for sample in part), key=lambda sample: sample.problem)
    return replace(mine, samples=tuple(everyone))


def _evaluation_record(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    kept = [asdict(s) for s in evaluation.samples if s.problem < NUM_SAMPLES_KEPT]
    return {"summary": evaluation.summary(), "samples": kept}


def train(recipe: Recipe, out: Path, *, resume: bool, console: Console, command: str) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        recipe: what to run.
        out: the run folder.
        resume: continue from the last checkpoint in it.
        console: for progress.
        command: how the run was started, for the record.

    Returns:
        The content of ``summary.json``.

    Raises:
        InputError: the recipe or the folder cannot be used; nothing was written.
        NonFiniteError: a tensor of the loss is NaN or infinite; the checkpoints stay.
        RunError: a checkpoint or another file cannot be written, or every checkpoint is damaged.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    check_processes(recipe)
    prepared = together(lambda: prepare(recipe))
    console = console if is_main() else Console(quiet=True)
    folder = together(lambda: RunFolder(out, recipe, resume), main_only=True) or FollowedFolder(out)
    assert prepared is not None
    try:
        with one_line_if_refused(out, "the last checkpoint is intact"):
            if folder.finished:
                console.print(f"{out} is finished already", markup=False)
                if is_main() and not (out / "report.html").exists():  # killed between the numbers and the pictures
                    _draw(folder)
                return folder.read_json(SUMMARY_FILE)
            with GracefulStop(
                lambda line: console.print(line, markup=False, soft_wrap=True), resume_command(command)
            ) as stop:
                return _run(prepared, folder, console, command, stop)
    finally:
        folder.close()


def check_processes(recipe: Recipe) -> None:
    """Raises ``InputError`` unless the processes of the run fit the recipe and each other, before a file is written."""

    def check() -> None:
        batch_shape(recipe, world_size())
        if recipe.eval.problems and shards_parameters():
            raise InputError(
                "eval.problems: must be 0 with FSDP and ZeRO-3, where no process holds the whole model; evaluate "
                f"afterwards with `mirrorpo eval OUT/model`, got {recipe.eval.problems}"
            )
        dumped = recipe.model_dump(mode="json")
        settings = {f"{group}.{key}": value for group, part in dumped.items() for key, value in (part or {}).items()}
        try:
            check_equal({"processes": world_size(), **settings, **versions()})
        except ValueError as error:
            raise InputError(str(error)) from None

    together(check)


def _run(prepared: Prepared, folder: RunFolder, console: Console, command: str, stop: GracefulStop) -> dict[str, Any]:
    started = time.monotonic()
    spec = prepared.recipe.train
    writer = MetricsWriter(folder.metrics, spec.updates_per_batch * spec.passes_per_batch)
    bar = ProgressBar(console, spec.steps, writer)
    trainer = build_trainer(prepared, folder.checkpoints, [writer, bar, stop])
    trainer.watch.say = lambda line: console.print(line, markup=False, soft_wrap=True)
    checkpoint = gather(_resume_point(folder, console) if is_main() else None)[0]
    before = gather(folder.read_json(BEFORE_FILE))[0]
    if before is None:
        before = _evaluation_record(run_evaluation(prepared, trainer.model, console, "before"))
        folder.write_json(BEFORE_FILE, before)
    done = 0 if checkpoint is None else step_of(checkpoint) // writer.updates_per_step
    seconds = trim_metrics(folder.metrics, done) if is_main() else 0.0
    try:
        if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
            trainer.load_weights(checkpoint)  # all that is left is what comes behind the last step
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.stop()
    stop.raise_if_stopped(trainer.state.global_step // writer.updates_per_step, spec.steps)
    after = _evaluation_record(run_evaluation(prepared, trainer.model, console, "after"))
    save_model(trainer, folder.path)
    summary = summarise(prepared, trainer, before, after, command)
    summary["seconds"] = round(seconds + time.monotonic() - started, 2)
    if is_main():
        _write_results(folder, summary, before, after)
    return summary


def _resume_point(folder: RunFolder, console: Console) -> Path | None:
    """The checkpoint to go on from; says which ones were damaged."""
    found = folder.resume_point()
    for path, fault in found.damaged:
        before = "" if found.path is None else f"; going on from {found.path.name}"
        console.print(f"{path.name} is damaged and was set aside: {fault}{before}", markup=False, soft_wrap=True)
    return found.path


def save_model(trainer: MirrorTrainer, folder: Path) -> None:
    """Writes ``model/``, whole or not at all.

    Raises:
        CheckpointError: the disk refused; a ``model/`` that was there is as it was.
    """
    writing = writing_folder(folder, trainer.state.global_step)
    try:
        trainer.save_model(str(writing))
        if trainer.args.should_save:
            seal(writing, trainer.state.global_step)
            publish(writing, folder / "model")
    except (OSError, SafetensorError) as error:
        clean(folder)
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'model'}: cannot be written ({reason}); checkpoints are intact") from error


def summarise(prepared: Prepared, trainer: MirrorTrainer, before: Any, after: Any, command: str) -> dict[str, Any]:
    """The numbers of a run, as ``summary.json`` has them."""
    recipe = prepared.recipe
    summary: dict[str, Any] = {
        "task": prepared.task.name,
        "objective": recipe.objective.preset,
        "objective_line": trainer.policy_objective.describe(),
        "reference": trainer.reference_description(),
        "model": recipe.model.path,
        "seed": recipe.train.seed,
        "steps": recipe.train.steps,
        "seconds": 0.0,
    }
    for when, record in (("before", before), ("after", after)):
        numbers = {} if record is None else record["summary"]
        summary[f"accuracy_{when}"] = numbers.get("accuracy")
        summary[f"accuracy_{when}_interval"] = numbers.get("accuracy_interval")
        summary[f"mean_length_{when}"] = numbers.get("mean_length")
        summary[f"reasons_{when}"] = numbers.get("reasons")
        summary["problems"] = numbers.get("problems", 0)
    summary["command"] = command
    summary["commit"] = commit_of_package()
    summary["versions"] = versions()
    summary["mirrorpo_version"] = version("mirrorpo")
    return summary


def _write_results(folder: RunFolder, summary: dict[str, Any], before: Any, after: Any) -> None:
    lines = []
    for when, record in (("before", before), ("after", after)):
        for sample in [] if record is None else record["samples"]:
            lines.append(json.dumps({"when": when, **sample}, ensure_ascii=True))
    write_text_atomic(folder.path / SAMPLES_FILE, "".join(line + "\n" for line in lines))
    folder.write_json(SUMMARY_FILE, summary)
    _draw(folder)


def _draw(folder: RunFolder) -> None:
    from mirrorpo.reporting import write_curve, write_report

    write_curve(folder.path)
    write_report(folder.path)


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    packages = ("mirrorpo", "torch", "transformers", "trl", "accelerate")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def commit_of_package() -> str | None:
    """The commit of this package's checkout, None if it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
