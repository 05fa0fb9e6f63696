"""Reward functions of the trainer: the task behind TRL's interface, and the guard around any of them.

Programs (MBPP) are graded in the background from the moment the completions exist: that overlaps with the forward
passes of the policy and the reference, and with other asynchronous rewards. Cheap verdicts are given on the spot.

TRL reads None as "no reward"; a NaN looks the same to it, so a broken function would pass for a careful one. Here only
None means skip. An exception, a time limit, a wrong number of rewards or a reward that is not a finite number is a
failure, which is named with its sample; the run stops or leaves the sample out.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging
from trl.trainer.utils import get_callable_name, is_async_callable

from mirrorpo.rewards.match import RewardError
from mirrorpo.rewards.time_limit import TimeLimitExceeded, time_limit
from mirrorpo.rewards.verdict import VERDICTS, Grade
from mirrorpo.tasks.task import BatchTask, Task, grade_all
from mirrorpo.wording import printable

logger = logging.get_logger(__name__)


Rewards = list[float | None]


def reward_function(task: Task) -> Any:
    """The task's verdict in the form that TRL calls; None leaves a completion out.

    Args:
        task: its rows travel as JSON in the data set's column ``row``.

    Returns:
        A function, or a ``BackgroundReward`` for a task that grades many completions at a time.
    """
    if isinstance(task, BatchTask):
        return BackgroundReward(task)

    def reward(
        completions: list[Any], row: list[str], log_metric: Callable[[str, float], None] | None = None, **_: Any
    ) -> Rewards:
        return _logged(_grades(task, completions, row), log_metric)

    reward.__name__ = task.name
    return reward


class BackgroundReward:
    """An asynchronous reward whose verdicts can be asked for before they are needed.

    Args:
        task: grades many completions at a time.
    """

    def __init__(self, task: BatchTask) -> None:
        self.__name__ = task.name
        self._task = task
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirrorpo-reward")
        self._begun: tuple[list[Any], list[str], Future[list[Grade]]] | None = None

    def begin(self, completions: list[Any], row: list[str]) -> None:
        """Starts grading and returns at once; the call with the same completions takes the result."""
        self._begun = (completions, row, self._thread.submit(_grades, self._task, completions, row))

    async def __call__(
        self,
        completions: list[Any],
        row: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> Rewards:
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != completions or begun[1] != row:
            grading = self._thread.submit(_grades, self._task, completions, row)
        else:
            grading = begun[2]
        return _logged(await asyncio.wrap_future(grading), log_metric)


def background(functions: Sequence[Any]) -> list[BackgroundReward]:
    """Those rewards that can be asked for before they are needed."""
    return [function for function in functions if isinstance(function, BackgroundReward)]


def begin_rewards(
    functions: Sequence[BackgroundReward], inputs: Sequence[dict[str, Any]], completions: list[Any]
) -> None:
    """Starts rewards in the background, for completions that were generated just now."""
    for function in functions:
        function.begin(completions, [example["row"] for example in inputs])


def _grades(task: Task, completions: list[Any], row: list[str]) -> list[Grade]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return grade_all(task, texts, [json.loads(data) for data in row])


def _logged(grades: list[Grade], log_metric: Callable[[str, float], None] | None) -> Rewards:
    """The rewards; the share of each verdict goes to the step's metrics (all four, or ranks could not be averaged)."""
    if log_metric is not None:
        counts = Counter(grade.verdict for grade in grades)
        for verdict in VERDICTS:
            log_metric(f"answers/{verdict}", counts[verdict] / len(grades))
    return [grade.reward for grade in grades]


def guarded(function: Any, on_error: str = "raise", seconds: float | None = None) -> Any:
    """A reward function of TRL's kind whose failures are named.

    Args:
        function: ``(prompts=..., completions=..., **columns) -> list[float | None]``, or a coroutine function; a
            reward model (a module or its name) is returned as it is.
        on_error: "raise", or "skip": a failed call leaves out its whole batch, a bad value its sample.
        seconds: time limit of a call; None for none.

    Raises:
        RewardError: on a call; names function, sample and what happened.

    Example:
        >>> def broken(prompts, completions, **columns):
        ...     return [float("nan")]
        >>> guarded(broken)(prompts=["2+2="], completions=["4"])
        Traceback (most recent call last):
        mirrorpo.rewards.match.RewardError: reward 'broken' returned nan (prompt '2+2=', completion '4'); legal: ...
    """
    if isinstance(function, nn.Module | str):
        return function
    guard = _Guard(get_callable_name(function), on_error, seconds)

    async def call_async(*, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        batch = _Batch(prompts, completions)
        try:
            async with asyncio.timeout(seconds):
                values = await function(prompts=prompts, completions=completions, **columns)
        except Exception as error:  # noqa: BLE001  (the code is the user's: anything may come out of it)
            return guard.failed(error, batch)
        return guard.checked(values, batch)

    def call(*, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        batch = _Batch(prompts, completions)
        try:
            with time_limit(seconds):
                values = function(prompts=prompts, completions=completions, **columns)
        except (Exception, TimeLimitExceeded) as error:  # noqa: BLE001  (the code is the user's, as above)
            return guard.failed(error, batch)
        return guard.checked(values, batch)

    chosen = call_async if is_async_callable(function) else call
    chosen.__name__ = guard.name
    return chosen


@dataclass(frozen=True)
class _Batch:
    prompts: Any
    completions: Any

    def sample(self, index: int) -> str:
        prompt, completion = _text(self.prompts[index]), _text(self.completions[index])
        return f"(prompt {prompt!r:.80}, completion {completion!r:.80})"


@dataclass(frozen=True)
class _Guard:
    name: str
    on_error: str
    seconds: float | None

    def failed(self, error: BaseException, batch: _Batch) -> list[float | None]:
        """A call that did not return: nobody can say which sample it was, so the first one is shown."""
        if isinstance(error, RewardError):  # names its sample already
            message = str(error)
        else:
            late = isinstance(error, TimeoutError | TimeLimitExceeded)
            named = " ".join(f"{type(error).__name__}: {error}".split())
            what = f"took more than {self.seconds} s" if late else f"raised {named}"
            message = f"reward {self.name!r} {what} (first sample of {len(batch.prompts)}: {batch.sample(0)})"
        self._report(message, len(batch.prompts), error)
        return [None] * len(batch.prompts)

    def checked(self, values: Any, batch: _Batch) -> list[float | None]:
        """The rewards as numbers, or None where there is none."""
        try:
            rewards = list(values)
        except TypeError as error:
            return self.failed(error, batch)
        if len(rewards) != len(batch.prompts):
            message = f"reward {self.name!r} returned {len(rewards)} rewards for {len(batch.prompts)} completions"
            self._report(f"{message} {batch.sample(0)}", len(batch.prompts), None)
            return [None] * len(batch.prompts)
        for index, value in enumerate(rewards):
            if value is not None:
                rewards[index] = _number(value)
                if rewards[index] is None:
                    message = f"reward {self.name!r} returned {value!r:.60} {batch.sample(index)}"
                    self._report(f"{message}; legal: a finite number, or None to leave a completion out", 1, None)
        return rewards

    def _report(self, message: str, count: int, error: BaseException | None) -> None:
        if self.on_error == "raise":
            raise RewardError(message) from error
        logger.warning("%s; left out: %d completions", printable(message), count)


def _number(value: Any) -> float | None:
    """A finite number, or None: 0-d arrays and tensors are numbers too."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the value is the user's
        return None
    return number if math.isfinite(number) and not isinstance(value, str) else None


def _text(value: Any) -> str:
    """The last message of a conversation, or the text itself."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return str(value[-1].get("content"))
    return str(value)


__all__ = ["BackgroundReward", "background", "begin_rewards", "guarded", "reward_function"]
