"""What a run writes while it goes on: metrics, completions, evaluations every n steps, and a page that shows them.

An evaluation draws from seeds of its own and changes neither the weights nor the random state: a run with evaluations
between its steps ends with the weights of one without. The page costs at most a hundredth of the run's time.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mirrorpo.errors import RunError
from mirrorpo.files import write_text_atomic
from mirrorpo.runs.folder import METRICS_FILE
from mirrorpo.runs.reader import recorded_steps
from mirrorpo.runs.unfinished import EVALUATIONS_FILE, PROGRESS_FILE, read_evaluations
from mirrorpo.training.distributed import gather, is_main

_SHARE = 0.01  # of the run's time, at most, for the page
_PAUSE = 5.0  # seconds between two pages, at least: nobody reads faster
_CHECKING = "taking up what the folder holds"
_PROMPTS, _COMPLETIONS = 4, 2  # of the last step on the page


# Names under which TRL logs the same number a second time, and its metrics of preference pairs, which begin like these.
_TWICE = ("rewards/", "clip_ratio/", "train_", "num_tokens", "epoch", "total_flos")
_OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


COMPLETIONS_FILE = "completions.jsonl"


def _trim_completions(path: Path, last_step: int) -> None:
    """Drops completions of later steps, and a torn last line: the resumed run writes them again."""
    if path.is_symlink() or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if step <= last_step:
            kept.append(f"{line}\n")
    write_text_atomic(path, "".join(kept))


def trim_metrics(run_dir: Path, last_step: int) -> float:
    """Drops the lines after ``last_step`` (and a torn last line), so that a resumed run writes no step twice.

    Returns:
        The seconds that the kept steps took.

    Raises:
        RunError: lines up to ``last_step`` are missing.
    """
    _trim_completions(run_dir / COMPLETIONS_FILE, last_step)
    path, lines = run_dir / METRICS_FILE, recorded_steps(run_dir)
    if len(lines) < last_step:
        raise RunError(f"{path}: is missing steps before the checkpoint at step {last_step}")
    if path.exists():
        write_text_atomic(path, "".join(f"{line}\n" for line, _ in lines[:last_step]))
    return sum(seconds for _, seconds in lines[:last_step])


class MetricsWriter(TrainerCallback):
    """Appends one JSON line for every step (rollout batch) to ``metrics.jsonl``.

    Args:
        path: the file.
        updates_per_step: optimiser steps that make one step.
    """

    def __init__(self, path: Path, updates_per_step: int) -> None:
        self.path = path
        self.updates_per_step = updates_per_step
        self.last: dict[str, float | int | None] = {}
        self._since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Time that is no part of a step."""
        self._since += seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line: dict[str, float | int | None] = {"step": state.global_step // self.updates_per_step}
        for name, value in logs.items():
            if (name.startswith(_TWICE) and name not in _OF_PAIRS) or not isinstance(value, int | float):
                continue
            line[name] = value if math.isfinite(value) else None
        now = time.monotonic()
        line["seconds"] = round(now - self._since, 4)
        self._since = now
        self.last = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if control.should_save:  # a checkpoint must not outlive the lines that lead to it
                file.flush()
                os.fsync(file.fileno())


class CompletionsWriter(TrainerCallback):
    """Appends prompts, completions and rewards of some steps to ``completions.jsonl``, a line each.

    Args:
        path: the file.
        trainer: keeps the last rollout batch.
        every: optimiser steps between the steps that are kept.
        updates_per_step: optimiser steps that make one step.
    """

    def __init__(self, path: Path, trainer: Any, every: int, updates_per_step: int) -> None:
        self.path, self.trainer, self.every, self.updates_per_step = path, trainer, every, updates_per_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs or state.global_step % self.every:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for row in _rollouts(self.trainer._logs):
                line = {"step": state.global_step // self.updates_per_step, **row}
                file.write(json.dumps(line, default=str) + "\n")


def _rollouts(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """TRL's record of the last rollout batch as plain data; a completion without a reward or advantage has None."""
    scored = zip(*kept["rewards"].values(), strict=True)
    rewards = [{name: _finite(value) for name, value in zip(kept["rewards"], one, strict=True)} for one in scored]
    rows = zip(kept["prompt"], kept["completion"], rewards, kept["advantages"], strict=True)
    return [{"prompt": p, "completion": c, "rewards": r, "advantage": _finite(a)} for p, c, r, a in rows]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Stopwatch:
    """Seconds by phase; what an inner phase takes is not counted in the outer one.

    Example:
        >>> clock = Stopwatch()
        >>> with clock("scoring"):
        ...     with clock("generation"):
        ...         pass
        >>> sorted(clock.take())
        ['generation', 'scoring']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self._inner, began = self._inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self._seconds[phase] = self._seconds.get(phase, 0.0) + took - self._inner
            self._inner = outer + took

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


class LiveReport(TrainerCallback):
    """Keeps ``progress.json`` and ``report.html`` of a run that is not finished; a write that fails is said once.

    Args:
        folder: of the run.
        facts: what ``progress.json`` says beside the progress: command, commit, objective.
        say: prints one line.
        trainer: keeps the last rollout batch; None where completions are not drawn.
        updates_per_step: optimiser steps that make one step.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], say: Callable[[str], None], trainer: Any, updates_per_step: int
    ) -> None:
        self.folder, self.facts, self.say = folder, dict(facts), say
        self.trainer, self.updates_per_step = trainer, updates_per_step
        self.phase = _CHECKING
        self._due, self._failed = 0.0, False

    def enter(self, phase: str) -> None:
        """Another part of the run begins; the page says so, if it is time for a page."""
        self.phase = phase
        if time.monotonic() >= self._due:
            self.write()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.enter("training")

    def write(self, ended: str | None = None) -> None:
        """Writes both files, whatever the clock says; only an interrupt leads out of here.

        Args:
            ended: why the run ends here; it is kept on the page.
        """
        if not is_main() or self.phase == _CHECKING:  # a folder that cannot be taken up stays as it was
            return
        began = time.monotonic()
        try:
            told = {**self.facts, "phase": self.phase, "written": round(time.time(), 3), "ended": ended}
            told |= {"rollouts": self._rollouts()}
            write_text_atomic(self.folder / PROGRESS_FILE, json.dumps(told, default=str) + "\n")
            from mirrorpo.reports.run_page import write_report

            write_report(self.folder, ended=ended is not None)
        # Whatever goes wrong on a page - a full disk, a text that nobody foresaw - is no reason to end a training.
        except Exception as error:  # noqa: BLE001
            if not self._failed and ended is None:
                self._failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self.say(f"warning: the live report.html cannot be written ({reason}); the training goes on without it")
        cost = time.monotonic() - began
        self._due = time.monotonic() + max(_PAUSE, cost / _SHARE)

    def _rollouts(self) -> dict[str, Any] | None:
        """The first completions of the first prompts of the last rollout batch."""
        if self.trainer is None:
            return None
        logs = self.trainer._logs
        if not logs["prompt"] or not logs["rewards"]:
            return None
        rewards = [_total(one) for one in zip(*logs["rewards"].values(), strict=True)]
        shown: dict[str, list[dict[str, Any]]] = {}
        for prompt, completion, reward in zip(logs["prompt"], logs["completion"], rewards, strict=True):
            prompt, completion = _text(prompt), _text(completion)
            group = shown.setdefault(prompt, []) if prompt in shown or len(shown) < _PROMPTS else []
            if len(group) < _COMPLETIONS:
                group.append({"prompt": prompt, "completion": completion, "reward": reward})
        step = -(-self.trainer.state.global_step // self.updates_per_step)
        return {"step": step, "samples": [sample for group in shown.values() for sample in group]}


def _total(rewards: tuple[float, ...]) -> float | None:
    scored = [value for value in rewards if math.isfinite(value)]
    return sum(scored) if scored else None


def _text(messages: Any) -> str:
    """A prompt or completion as TRL keeps it: text, or a list of messages."""
    if isinstance(messages, str):
        return messages
    return "\n".join(str(message.get("content", "")) for message in messages)


class Evaluations(TrainerCallback):
    """A held-out evaluation every ``every`` steps, a line of ``evaluations.jsonl`` each.

    Args:
        folder: of the run.
        every: steps between them; 0 for none.
        steps: of the whole run; what comes after the last one is not evaluated here.
        updates_per_step: optimiser steps that make one step.
        evaluate: evaluates the policy now, and returns what goes into the line; None if a signal ended it.
        done: told of each: step, what was found, seconds.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        steps: int,
        updates_per_step: int,
        evaluate: Callable[[int], dict[str, Any] | None],
        done: Callable[[int, dict[str, Any] | None, float], None],
    ) -> None:
        self.path, self.every, self.steps = folder / EVALUATIONS_FILE, every, steps
        self.updates_per_step = updates_per_step
        self._evaluate, self._done = evaluate, done

    def trim(self, step: int) -> None:
        """Drops what a resumed run does again."""
        if not self.path.exists():
            return
        kept = {point.step for point in read_evaluations(self.path.parent) if point.step <= step}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] in kept]
        write_text_atomic(self.path, "".join(whole))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped between a step and its evaluation catches up on it."""
        if not self.every or not state.global_step:
            return
        step = state.global_step // self.updates_per_step
        there = is_main() and any(point.step == step for point in read_evaluations(self.path.parent))
        if not gather(there)[0]:
            self._at(state, step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates_per_step == 0:
            self._at(state, state.global_step // self.updates_per_step)

    def _at(self, state: Any, step: int) -> None:
        if not self.every or step % self.every or step >= self.steps:
            return
        began = time.monotonic()
        found = self._evaluate(step)
        seconds = time.monotonic() - began
        if found is not None and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:  # on the disk before the checkpoint that follows
                file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **found}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._done(step, found, seconds)


class BesideTrackers(TrainerCallback):
    """What trackers get at both ends of a training: they listen from its beginning, and close at its end.

    It stands before them among the callbacks: ``on_train_end`` reaches it first.

    Args:
        begun: called before the first step; not when a run goes on.
        ending: called after the last step.
    """

    def __init__(self, begun: Callable[[], None], ending: Callable[[], None]) -> None:
        self._begun, self._ending = begun, ending

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._begun()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ending()


__all__ = [
    "BesideTrackers",
    "CompletionsWriter",
    "Evaluations",
    "LiveReport",
    "MetricsWriter",
    "Stopwatch",
    "trim_metrics",
]
