"""Rows as data sets have them, each with a right program and a wrong one.

In ``honest_rows.txt`` ``### NAME`` is followed by the program, the tests and perhaps a setup, divided by lines of
dashes. A line that ends in ``# WRONG: text`` is replaced by that text in the wrong program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A row with its right program and a wrong one."""

    name: str
    code: str
    tests: list[str]
    setup: str

    @property
    def wrong(self) -> str:
        """The program with its marked lines replaced."""
        lines = []
        for line in self.code.split("\n"):
            kept, mark, other = line.partition("  # WRONG: ")
            lines.append(kept[: len(kept) - len(kept.lstrip())] + other if mark else line)
        return "\n".join(lines)


def rows_of_text(text: str) -> list[Row]:
    """Rows from a table in the form above."""
    rows = []
    for part in text.split("### ")[1:]:
        name, _, body = part.partition("\n")
        code, tests, *setup = [piece.strip("\n") for piece in body.split("\n---\n")]
        rows.append(Row(name, code, tests.split("\n--\n"), setup[0] if setup else ""))
    return rows


ROWS = rows_of_text(Path(__file__).with_suffix(".txt").read_text("utf-8"))
