"""What is a task? Problems to practise on, unseen problems to be tested on, and a verdict on an answer.

A task is data plus a verifier; it knows nothing of models or trainers. A problem is a plain dict (a row) with at least
``prompt``: the user's message as text, or a list of chat messages; every other key belongs to the task and comes back
to ``grade``.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from mirrorpo.grade import Grade, Row

Split = Literal["train", "test"]


@runtime_checkable
class Task(Protocol):
    """Problems and their verifier.

    Attributes:
        name: the name under which a recipe finds the task.
    """

    name: str

    def rows(self, split: Split) -> list[Row]:
        """The problems of a split, always in the same order; train and test share none."""
        ...

    def grade(self, completion: str, row: Row) -> Grade:
        """The verdict on one completion; never raises on any text."""
        ...


__all__ = ["Grade", "Row", "Split", "Task"]
