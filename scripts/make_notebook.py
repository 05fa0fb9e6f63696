"""The tutorial as a notebook: ``examples/tutorial.ipynb`` from ``docs/tutorial.md``.

``python scripts/make_notebook.py`` writes it; ``--check`` ends with status 1 if it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
_CONSOLE = re.compile(r"^```console\n(?P<lines>.*?)^```$\n?", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def commands(text: str) -> list[str]:
    """The commands of a console block, without their output."""
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def _cell(kind: str, text: str, number: int) -> dict[str, Any]:
    name = hashlib.sha256(f"{number}{text}".encode()).hexdigest()[:8]
    cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(page: str) -> dict[str, Any]:
    """Text as cells of Markdown, console blocks as cells of commands."""
    cells: list[tuple[str, str]] = []
    end = 0

    def words(text: str) -> None:
        if text.strip():
            # Links of the page start from its folder, those of the notebook from another one.
            cells.append(("markdown", _LINK.sub(r"](../docs/\1)", text.strip()).replace("../docs/../examples/", "")))

    for block in _CONSOLE.finditer(page):
        words(page[end : block.start()])
        lines = [f"%{one}" if one.startswith("pip ") else f"!{one}" for one in commands(block["lines"])]
        cells.append(("code", "\n".join(lines)))
        end = block.end()
    words(page[end:])
    return {
        "cells": [_cell(kind, text, number) for number, (kind, text) in enumerate(cells)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the notebook, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = json.dumps(notebook(PAGE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    if check:
        same = NOTEBOOK.is_file() and NOTEBOOK.read_text(encoding="utf-8") == text
        if not same:
            print(f"{NOTEBOOK.relative_to(ROOT)} is out of date; run python scripts/make_notebook.py")
        return int(not same)
    NOTEBOOK.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
