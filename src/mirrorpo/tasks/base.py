"""What is a task? Problems to practise on, unseen problems to be tested on, and a verdict on an answer.

A task is data plus a verifier; it knows nothing of models or trainers. A problem is a plain dict (a row) with at least
``prompt``: the user's message as text, or a list of chat messages; every other key belongs to the task and comes back
to ``grade``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from mirrorpo.rewards.verdict import Grade, Row

Split = Literal["train", "validation", "test"]


@runtime_checkable
class Task(Protocol):
    """Problems and their verifier.

    Attributes:
        name: the name under which a recipe finds the task.
    """

    name: str

    def rows(self, split: Split) -> list[Row]:
        """The problems of a split, always in the same order; no two splits share one.

        "validation", unseen problems to choose by, is not in every task.
        """
        ...

    def grade(self, completion: str, row: Row) -> Grade:
        """The verdict on one completion; never raises on any text."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task whose verdicts are much faster many at a time, such as programs that run side by side."""

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        """The verdicts on many completions, in their order."""
        ...


def grade_all(task: Task, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
    """The verdicts on completions of the given rows, in their order; at once where the task can.

    Example:
        >>> from mirrorpo.tasks import Arithmetic
        >>> [grade.reason for grade in grade_all(Arithmetic(), ["#### 3", "3"], [{"answer": "3"}] * 2)]
        ['match', 'no answer']
    """
    if isinstance(task, BatchTask):
        return task.grade_many(completions, rows)
    return [task.grade(text, row) for text, row in zip(completions, rows, strict=True)]


__all__ = ["BatchTask", "Grade", "Row", "Split", "Task", "grade_all"]
