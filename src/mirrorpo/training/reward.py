"""Who grades while the trainer trains? The task, beside the trainer where its verdicts take time.

Programs (MBPP) run in the background from the moment the completions exist: they overlap with the forward passes of the
policy and the reference, and with other asynchronous rewards. Cheap verdicts are given on the spot.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mirrorpo.rewards.verdict import VERDICTS, Grade
from mirrorpo.tasks.base import BatchTask, Task, grade_all

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
