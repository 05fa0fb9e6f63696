"""Tasks by name: one literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrorpo.tasks.arithmetic import Arithmetic
from mirrorpo.tasks.base import Grade, Row, Split, Task
from mirrorpo.tasks.jsonl import Jsonl


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table."""

    build: Callable[..., Task]
    summary: str


TASKS: dict[str, Entry] = {
    "arithmetic": Entry(
        build=Arithmetic, summary="embedded: integer sums in three difficulties, generated from a seed"
    ),
    "jsonl": Entry(build=Jsonl, summary="your own file, one JSON object a line; exact, numeric or your own reward"),
}

__all__ = ["TASKS", "Arithmetic", "Grade", "Jsonl", "Row", "Split", "Task"]
