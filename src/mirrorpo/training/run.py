"""From a recipe to a run folder: evaluate, train, evaluate, report."""

from __future__ import annotations

import errno
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import AutoTokenizer, PrinterCallback

from mirrorpo.errors import InputError, RunError
from mirrorpo.evaluation import Evaluation, Sampler, evaluate
from mirrorpo.evaluation.sampling import chat, prompt_ids
from mirrorpo.files import write_text_atomic
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import SAFE_LOADING, check_model_folder
from mirrorpo.tasks import TASKS, Row, Task
from mirrorpo.tasks.base import grade_all
from mirrorpo.training.callbacks import MetricsWriter, ProgressBar, trim_metrics
from mirrorpo.training.checkpoints import CheckpointError, clean, publish, seal, step_of, writing_folder
from mirrorpo.training.config import MirrorConfig
from mirrorpo.training.folder import BEFORE_FILE, SAMPLES_FILE, SUMMARY_FILE, RunFolder
from mirrorpo.training.recipe import Recipe
from mirrorpo.training.stopping import GracefulStop
from mirrorpo.training.trainer import MirrorTrainer

# Problems whose completions before and after are kept for the report.
NUM_SAMPLES_KEPT = 16
# What a file system says when it can take no more: the run stops with one line, and its checkpoints stay.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can go wrong before the first file is written.

    Raises:
        InputError: names the key.
    """
    task = build_task(recipe)
    train_rows, test_rows = task.rows("train"), task.rows("test")[: recipe.eval.problems]
    if len(train_rows) < recipe.train.prompts_per_step:
        raise InputError(
            f"train.prompts_per_step: {recipe.train.prompts_per_step} prompts, but the task has {len(train_rows)} "
            "training rows"
        )
    tokenizer = load_tokenizer(recipe.model.path)
    return Prepared(
        recipe=recipe,
        task=task,
        train_rows=train_rows,
        test_rows=test_rows,
        tokenizer=tokenizer,
        model_path=resolve_model(recipe.model.path),
    )


def trainer_config(recipe: Recipe, output_dir: Path, world_size: int = 1) -> MirrorConfig:
    """The trainer's settings for a recipe."""
    train = recipe.train
    update = train.batch_size // train.updates_per_batch
    if update % world_size:
        raise InputError(f"train: the {update} completions of an update must divide by the {world_size} processes")
    micro = train.micro_batch_size or update // world_size
    if (update // world_size) % micro:
        raise InputError(
            f"train.micro_batch_size: must divide the {update // world_size} completions per process, got {micro}"
        )
    accumulation = update // world_size // micro
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
        use_vllm=train.use_vllm,
        vllm_mode="colocate",
        model_init_kwargs={"dtype": recipe.model.dtype, **SAFE_LOADING},
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def reward_function(task: Task) -> Any:
    """The task's verdict in the form that TRL calls; None leaves a completion out."""

    def reward(completions: list[Any], row: list[str], **_: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [grade.reward for grade in grade_all(task, texts, [json.loads(data) for data in row])]

    reward.__name__ = task.name
    return reward


def to_dataset(prepared: Prepared) -> Dataset:
    """Prompts as the policy sees them; the whole row travels along as JSON for the verifier."""
    return Dataset.from_list(
        [{"prompt": chat(prepared.tokenizer, row), "row": json.dumps(row)} for row in prepared.train_rows]
    )


def build_trainer(prepared: Prepared, folder: Path, callbacks: list[Any]) -> MirrorTrainer:
    """The trainer of a prepared recipe; loads the weights.

    Raises:
        InputError: the model cannot be loaded, or the prompts do not fit its context.
    """
    recipe = prepared.recipe
    lora = None
    if recipe.model.lora is not None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise InputError("model.lora: needs the extra 'peft': pip install 'mirrorpo[peft]'") from error
        spec = recipe.model.lora
        lora = LoraConfig(
            r=spec.r,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=spec.target_modules,
            task_type="CAUSAL_LM",
        )
    try:
        trainer = MirrorTrainer(
            prepared.model_path,
            reward_funcs=reward_function(prepared.task),
            args=trainer_config(recipe, folder),
            train_dataset=to_dataset(prepared),
            processing_class=prepared.tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"model.path {recipe.model.path!r}: {' '.join(str(error).split())[:300]}") from error
    trainer.remove_callback(PrinterCallback)  # the progress bar says it better
    _check_context(prepared, trainer.model.config)
    return trainer


def _check_context(prepared: Prepared, config: Any) -> None:
    context = config.get_text_config().max_position_embeddings
    longest = max(len(prompt_ids(prepared.tokenizer, row)) for row in prepared.train_rows)
    wanted = longest + prepared.recipe.train.max_completion_length
    if wanted > context:
        raise InputError(
            f"train.max_completion_length: the longest prompt has {longest} tokens, with the completion {wanted}; "
            f"the model's context is {context}"
        )


def run_evaluation(prepared: Prepared, model: Any, console: Console, label: str) -> Evaluation | None:
    """Graded samples on the unseen problems, with a bar; None if the recipe asks for none."""
    spec, rows = prepared.recipe.eval, prepared.test_rows
    if not rows:
        return None
    sampler = Sampler(
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_completion_length=prepared.recipe.train.max_completion_length,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
    columns = (TextColumn(label), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=len(rows))
        return evaluate(
            model, prepared.tokenizer, prepared.task, rows, sampler, progress=lambda n: progress.advance(bar, n)
        )


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
    prepared = prepare(recipe)
    folder = RunFolder(out, recipe, resume)
    try:
        if folder.finished:
            console.print(f"{out} is finished already", markup=False)
            if not (folder.path / "report.html").exists():  # killed between the numbers and the pictures
                _draw(folder)
            return folder.read_json(SUMMARY_FILE)
        with GracefulStop(
            lambda line: console.print(line, markup=False, soft_wrap=True), _resume_command(command)
        ) as stop:
            return _run(prepared, folder, console, command, stop)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{out}: cannot be written ({error.strerror}); the last checkpoint is intact") from error
    finally:
        folder.close()


def _resume_command(command: str) -> str:
    return command if "--resume" in shlex.split(command) else f"{command} --resume"


def _run(prepared: Prepared, folder: RunFolder, console: Console, command: str, stop: GracefulStop) -> dict[str, Any]:
    started = time.monotonic()
    spec = prepared.recipe.train
    writer = MetricsWriter(folder.metrics, spec.updates_per_batch * spec.passes_per_batch)
    bar = ProgressBar(console, spec.steps, writer)
    trainer = build_trainer(prepared, folder.checkpoints, [writer, bar, stop])
    trainer.watch.say = lambda line: console.print(line, markup=False, soft_wrap=True)
    checkpoint = _resume_point(folder, console)
    before = folder.read_json(BEFORE_FILE)
    if before is None:
        before = _evaluation_record(run_evaluation(prepared, trainer.model, console, "before"))
        folder.write_json(BEFORE_FILE, before)
    done = 0 if checkpoint is None else step_of(checkpoint) // writer.updates_per_step
    seconds = trim_metrics(folder.metrics, done)
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
