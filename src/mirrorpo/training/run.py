"""From a recipe to a run folder: evaluate, train, evaluate, report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from safetensors import SafetensorError

from mirrorpo.config.train import Recipe
from mirrorpo.errors import InputError
from mirrorpo.evaluation import Evaluation, evaluate
from mirrorpo.files import one_line_if_refused, write_text_atomic
from mirrorpo.interrupts import resume_command
from mirrorpo.progress import counted
from mirrorpo.runs.folder import (
    BEFORE_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    FollowedFolder,
    RunFolder,
    commit_of_package,
    versions,
)
from mirrorpo.runs.reader import read_before, recorded_steps
from mirrorpo.runs.unfinished import PROGRESS_FILE
from mirrorpo.training.checkpoints import (
    CheckpointError,
    all_checkpoints,
    clean,
    newest_whole,
    publish,
    seal,
    set_aside,
    step_of,
    writing_folder,
)
from mirrorpo.training.distributed import (
    check_equal,
    gather,
    is_main,
    rank,
    shards_parameters,
    together,
    uses_deepspeed,
    world_size,
)
from mirrorpo.training.monitors import GracefulStop, ProgressBar
from mirrorpo.training.records import (
    COMPLETIONS_FILE,
    BesideTrackers,
    CompletionsWriter,
    Evaluations,
    LiveReport,
    MetricsWriter,
    trim_metrics,
)
from mirrorpo.training.setup import Prepared, batch_shape, build_trainer, prepare, sampler_of, tracker_callbacks
from mirrorpo.wording import say

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer

# Problems whose completions before and after are kept for the report.
NUM_SAMPLES_KEPT = 16


def run_evaluation(
    prepared: Prepared, model: Any, console: Console, label: str, watch: Callable[[int], None] = lambda count: None
) -> Evaluation | None:
    """Graded samples on the unseen problems, with a bar; None if the recipe asks for none. Processes share the work.

    ``watch`` is told of each batch: how many completions it had.
    """
    spec, rows = prepared.recipe.eval, prepared.test_rows[rank() :: world_size()]
    if not prepared.test_rows:
        return None
    sampler = replace(sampler_of(prepared.recipe), seed=spec.seed + rank())
    with counted(console if is_main() else Console(quiet=True), label, len(rows) * spec.samples) as advance:

        def count(done: int) -> None:
            advance(done)
            watch(done)

        mine = evaluate(
            model,
            prepared.tokenizer,
            prepared.task,
            rows,
            sampler,
            spec.samples,
            progress=count,
            chat_template=prepared.recipe.model.chat_template,
        )
    numbered = [replace(sample, problem=sample.problem * world_size() + rank()) for sample in mine.samples]
    everyone = sorted((sample for part in gather(numbered) for sample in part), key=lambda sample: sample.problem)
    return replace(mine, samples=tuple(everyone))


def _evaluation_record(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    kept = [asdict(s) for s in evaluation.samples if s.problem < NUM_SAMPLES_KEPT]
    numbers = evaluation.summary()
    unknown = {key: None for key, value in numbers.items() if isinstance(value, float) and math.isnan(value)}
    return {"summary": numbers | unknown, "samples": kept}  # nothing could be scored: JSON has no NaN


class Extension(Protocol):
    """What a command that trains adds to a training."""

    def prepared(self, prepared: Prepared) -> Prepared:
        """Other rows, say; raises ``InputError`` before a file is written."""
        ...

    def trainer(self, prepared: Prepared, folder: Path, callbacks: list[Any]) -> Any:
        """In place of ``build_trainer``: a ``MirrorTrainer`` or, for pairs, a ``MirrorDPOTrainer``."""
        ...

    def finish(self, trainer: Any, folder: RunFolder, summary: dict[str, Any]) -> None:
        """Writes what it has found, and adds to the summary."""
        ...


def train(
    recipe: Recipe, out: Path, *, resume: bool, console: Console, command: str, extension: Extension | None = None
) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        recipe: what to run.
        out: the run folder.
        resume: continue from the last checkpoint in it.
        console: for progress.
        command: how the run was started, for the record.
        extension: what the command adds to a training.

    Returns:
        The content of ``summary.json``.

    Raises:
        InputError: the recipe or the folder cannot be used; nothing was written.
        NonFiniteError: a tensor of the loss is NaN or infinite; the checkpoints stay.
        RunError: a checkpoint or another file cannot be written, or every checkpoint is damaged.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    check_processes(recipe)
    if recipe.preference is not None:
        from mirrorpo.training.preference_trainer import Preferences

        extension = Preferences()
    prepared = together(lambda: prepare(recipe) if extension is None else extension.prepared(prepare(recipe)))
    console = console if is_main() else Console(quiet=True)
    if not resume:
        import_module("mirrorpo.training.trainer")  # what TRL cannot import leaves no folder behind
    folder = together(
        lambda: RunFolder(out, recipe, resume, lambda line: say(console, line)), main_only=True
    ) or FollowedFolder(out)
    assert prepared is not None
    try:
        with one_line_if_refused(out, "the last checkpoint is intact"):
            if folder.finished:
                say(console, f"{out} is finished already")
                if is_main() and not (out / "report.html").exists():  # killed between the numbers and the pictures
                    _draw(folder)
                return folder.read_json(SUMMARY_FILE)
            with GracefulStop(lambda line: say(console, line), resume_command(command)) as stop:
                return _Run(prepared, folder, console, command, stop, extension)()
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
        if recipe.train.on_nonfinite == "skip" and uses_deepspeed():
            raise InputError(
                "train.on_nonfinite: must be raise with DeepSpeed, which keeps its gradients to itself, got skip"
            )
        dumped = recipe.model_dump(mode="json")
        settings = {f"{group}.{key}": value for group, part in dumped.items() for key, value in (part or {}).items()}
        try:
            check_equal({"processes": world_size(), **settings, **versions()})
        except ValueError as error:
            raise InputError(str(error)) from None

    together(check)


class _EndedBySignal(Exception):
    """A signal arrived during an evaluation between two steps, which is repeated when the run goes on."""


class _Run:
    """A run in its folder: evaluation, training with its evaluations, evaluation, results.

    Raises:
        InputError: the trainer cannot be built; a folder made for it is gone.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        console: Console,
        command: str,
        stop: GracefulStop,
        extension: Extension | None,
    ) -> None:
        self.started = time.monotonic()
        self.prepared, self.folder, self.console, self.stop = prepared, folder, console, stop
        self.command, self.extension = command, extension
        self.spec = spec = prepared.recipe.train
        self.writer = writer = MetricsWriter(folder.metrics, spec.updates_per_batch * spec.passes_per_batch)
        self.bar = ProgressBar(console, spec.steps, writer)
        trackers = tracker_callbacks(prepared.recipe, folder.path) if is_main() else ()
        make = build_trainer if extension is None else extension.trainer
        try:
            self.trainer = make(prepared, folder.checkpoints, [writer, self.bar, *trackers])
        except InputError:
            folder.take_back()
            raise
        # First: a signal ends the evaluation after training, and trackers close after it.
        around = BesideTrackers(lambda: self._track(self.before), self._ending)
        self.trainer.callback_handler.callbacks[:0] = [stop, around]
        self.before: dict[str, Any] | None = None
        of_pairs = prepared.recipe.preference is not None
        if not of_pairs:
            self.trainer.watch.say = self._say
        if spec.log_completions_every:
            every = spec.log_completions_every * writer.updates_per_step
            path = folder.path / COMPLETIONS_FILE
            self.trainer.add_callback(CompletionsWriter(path, self.trainer, every, writer.updates_per_step))
        every, per_step = prepared.recipe.eval.every, writer.updates_per_step
        self.evaluations = Evaluations(folder.path, every, spec.steps, per_step, self._evaluate, self._evaluated)
        self.trainer.add_callback(self.evaluations)
        about = {"command": command, "commit": commit_of_package(), "objective_line": self.trainer.objective_line()}
        self.live = LiveReport(folder.path, about, self._say, None if of_pairs else self.trainer, per_step)
        self.trainer.add_callback(self.live)

    def _say(self, line: str) -> None:
        say(self.console, line)

    def __call__(self) -> dict[str, Any]:
        """Runs it; returns the summary."""
        try:
            return self._go()
        except BaseException as error:  # whoever finds the folder reads there why it ended
            self.live.write(ended=" ".join(str(error).split())[:500] or type(error).__name__)
            raise

    def _go(self) -> dict[str, Any]:
        trainer, folder, per_step = self.trainer, self.folder, self.writer.updates_per_step
        checkpoint = gather(_resume_point(folder, self.console, per_step) if is_main() else None)[0]
        done = 0 if checkpoint is None else step_of(checkpoint) // per_step
        before = gather(_read_before(folder))[0]
        if before is None:
            self.live.enter("evaluating before training")
            before = self._evaluation("evaluating before training")
            folder.write_json(BEFORE_FILE, before)
        self.before = before
        seconds = 0.0
        if is_main():
            seconds = trim_metrics(folder.path, done)
            self.evaluations.trim(done)
        try:
            self.live.enter("training")
            if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
                trainer.load_weights(checkpoint)  # all that is left is what comes after the last step
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.bar.stop()
        self.stop.raise_if_stopped(trainer.state.global_step // per_step, self.spec.steps)
        save_model(trainer, folder.path)
        summary = summarise(self.prepared, trainer, before, self.after, self.command)
        if self.extension is not None:
            self.extension.finish(trainer, folder, summary)
        summary["seconds"] = round(seconds + time.monotonic() - self.started, 2)
        if is_main():
            _write_results(folder, summary, before, self.after)
        return summary

    def _ending(self) -> None:
        """The last step is done, and trackers still listen."""
        self.bar.stop()
        if self.stop.number is None:
            self._track(self.after)

    @cached_property
    def after(self) -> dict[str, Any] | None:
        """The evaluation after training."""
        self.live.enter("evaluating after training")
        return self._evaluation("evaluating after training")

    def _evaluation(self, label: str) -> dict[str, Any] | None:
        return _evaluation_record(run_evaluation(self.prepared, self.trainer.model, self.console, label))

    def _evaluate(self, step: int) -> dict[str, Any] | None:
        """Between two steps, under the bar of the training; None if a signal ended it."""
        self.live.enter(f"evaluating at step {step}")
        recipe, label, done = self.prepared.recipe, f"evaluating at step {step}", 0
        total = len(self.prepared.test_rows[rank() :: world_size()]) * recipe.eval.samples

        def watch(count: int) -> None:
            nonlocal done
            done += count
            self.bar.note(f"evaluating {done}/{total}")
            if self.stop.number is not None and world_size() == 1:  # the others would wait for this one's samples
                raise _EndedBySignal

        quiet = Console(quiet=True) if self.console.is_terminal else self.console  # there is a bar already
        self.bar.silent = True
        try:
            return _evaluation_record(run_evaluation(self.prepared, self.trainer.model, quiet, label, watch))
        except _EndedBySignal:
            return None
        finally:
            self.bar.silent = False

    def _evaluated(self, step: int, record: dict[str, Any] | None, seconds: float) -> None:
        """What an evaluation between two steps has found goes to people and trackers; its time to no step."""
        self.writer.leave_out(seconds)
        trainer = self.trainer
        if record is not None:
            numbers = record["summary"]
            if numbers["accuracy"] is not None:
                low, high = numbers["accuracy_interval"]
                self._say(
                    f"step {step}/{self.spec.steps}  accuracy {numbers['accuracy']:.3f} [{low:.3f}, {high:.3f}] on "
                    f"{numbers['problems']} unseen problems"
                )
            self._track(record)
        # A signal that came meanwhile is not kept waiting for another step.
        self.stop.on_step_end(trainer.args, trainer.state, trainer.control)

    def _track(self, record: dict[str, Any] | None) -> None:
        """Sends an evaluation to the trackers, at the optimiser step that has been reached."""
        if record is None or not self.prepared.recipe.train.report_to or not is_main():
            return
        trainer, numbers = self.trainer, record["summary"]
        logs = {f"eval_{key}": numbers[key] for key in ("accuracy", "mean_length", "truncated")}
        due = trainer.control.should_log  # the step's own log is still to come
        known = {key: value for key, value in logs.items() if value is not None}
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, known)
        trainer.control.should_log = due


def _resume_point(folder: RunFolder, console: Console, updates_per_step: int) -> Path | None:
    """The checkpoint to go on from: the newest one without a fault whose steps all have their line of metrics.

    Damaged checkpoints that are newer are taken out of the way, and named.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    clean(folder.path)
    clean(folder.checkpoints)
    try:
        recorded = len(recorded_steps(folder.path))
    except ValueError as error:
        raise InputError(str(error)) from None
    found = newest_whole(folder.checkpoints, before=(recorded + 1) * updates_per_step)
    ahead = [path for path in all_checkpoints(folder.checkpoints) if step_of(path) >= (recorded + 1) * updates_per_step]
    if found.path is None and (found.damaged or ahead):
        faults = [f"{path.name}: {fault}" for path, fault in found.damaged[:1]]
        faults += [f"{path.name}: {folder.metrics.name} has only {recorded} whole steps" for path in ahead[-1:]]
        raise CheckpointError(
            f"{folder.path}: no checkpoint can be used ({'; '.join(faults)}); remove {folder.checkpoints} to start anew"
        )
    for path, fault in found.damaged:
        set_aside(path)
        before = "" if found.path is None else f"; going on from {found.path.name}"
        say(console, f"{path.name} is damaged and was set aside: {fault}{before}")
    if ahead and found.path is not None:
        say(console, f"{folder.metrics.name} has only {recorded} whole steps; going on from {found.path.name}")
    return found.path


def _read_before(folder: RunFolder) -> Any:
    """The evaluation before training, if there is one; what is wrong with it shows now, not after the last step."""
    try:
        return read_before(folder.path)
    except ValueError as error:
        raise InputError(f"{error}; remove the file to evaluate the policy before training again") from None


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
        "objective": recipe.objective.preset if recipe.preference is None else "preference",
        "objective_line": trainer.objective_line(),
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
    from mirrorpo.reports import write_curve, write_report

    write_curve(folder.path)
    write_report(folder.path)
    (folder.path / PROGRESS_FILE).unlink(missing_ok=True)  # the summary says more
