"""Tasks by name: one literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirrorpo.tasks.arithmetic import Arithmetic
from mirrorpo.tasks.base import Grade, Row, Split, Task
from mirrorpo.tasks.gsm8k import Gsm8k
from mirrorpo.tasks.jsonl import Jsonl
from mirrorpo.tasks.mbpp import Mbpp


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table."""

    build: Callable[..., Task]
    summary: str


TASKS: dict[str, Entry] = {
    "arithmetic": Entry(
        build=Arithmetic, summary="embedded: integer sums in three difficulties, generated from a seed"
    ),
    "gsm8k": Entry(build=Gsm8k, summary="grade-school maths in words (hub, or path); graded by the final number"),
    "mbpp": Entry(build=Mbpp, summary="small Python programs (hub, or path); graded by their tests, in a sandbox"),
    "jsonl": Entry(build=Jsonl, summary="your own file, one JSON object a line; exact, numeric or your own reward"),
}

__all__ = ["TASKS", "Arithmetic", "Grade", "Gsm8k", "Jsonl", "Mbpp", "Row", "Split", "Task"]
