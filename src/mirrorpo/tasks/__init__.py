"""Tasks by name: one literal table, and entry points of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import Field

from mirrorpo.tasks.arithmetic import Arithmetic, ArithmeticSettings
from mirrorpo.tasks.gsm8k import Gsm8k, Gsm8kSettings
from mirrorpo.tasks.jsonl import Jsonl, JsonlSettings
from mirrorpo.tasks.mbpp import Mbpp, MbppSettings
from mirrorpo.tasks.task import Grade, Row, Settings, Split, Task
from mirrorpo.tasks.words import Words, WordsSettings

ENTRY_POINT_GROUP = "mirrorpo.tasks"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table.

    Attributes:
        build: makes the task from its settings as keywords (all but ``name``).
        settings: its keys in a recipe; ``name`` is a ``Literal`` of the task's name.
        summary: one line for ``mirrorpo list tasks``.
    """

    build: Callable[..., Task]
    settings: type[Settings]
    summary: str


TASKS: dict[str, Entry] = {
    "arithmetic": Entry(
        build=Arithmetic,
        settings=ArithmeticSettings,
        summary="embedded: integer sums in three difficulties, generated from a seed",
    ),
    "words": Entry(
        build=Words,
        settings=WordsSettings,
        summary="embedded: word problems of one sentence, for small pretrained models, generated from a seed",
    ),
    "gsm8k": Entry(
        build=Gsm8k,
        settings=Gsm8kSettings,
        summary="grade-school maths in words (hub, or path); graded by the final number",
    ),
    "mbpp": Entry(
        build=Mbpp,
        settings=MbppSettings,
        summary="small Python programs (hub, or path); graded by their tests, in a sandbox",
    ),
    "jsonl": Entry(
        build=Jsonl,
        settings=JsonlSettings,
        summary="your own file, one JSON object a line; exact, numeric or your own reward",
    ),
}
TaskSettings = Annotated[
    ArithmeticSettings | WordsSettings | Gsm8kSettings | MbppSettings | JsonlSettings, Field(discriminator="name")
]


def find_task(name: str) -> Entry | None:
    """The entry of a task by name, the table first, then entry points of ``mirrorpo.tasks``; None if there is none.

    Raises:
        ValueError: an entry point that gives something other than an ``Entry``.
    """
    if name in TASKS:
        return TASKS[name]
    point = next((point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)
    if point is None:
        return None
    found = point.load()
    if not isinstance(found, Entry):
        raise ValueError(f"entry point {name!r} of {ENTRY_POINT_GROUP} gave a {type(found).__name__}, not an Entry")
    return found


__all__ = [
    "ENTRY_POINT_GROUP",
    "TASKS",
    "Arithmetic",
    "Entry",
    "Grade",
    "Gsm8k",
    "Jsonl",
    "Mbpp",
    "Row",
    "Split",
    "Task",
    "TaskSettings",
    "Words",
    "find_task",
]
