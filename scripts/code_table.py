"""Tables of code cases and of forgeries in docs/rewards.md, from the rows that the tests grade.

Usage: python scripts/code_table.py [--page docs/rewards.md] [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the tables that would be written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "rewards"
BEGIN, END = "<!-- begin code cases -->\n", "<!-- end code cases -->\n"
_WIDEST = 64
_FORGERIES = 30


def cell(text: str) -> str:
    """A text as code in a table, its lines divided by a return sign."""
    shown = text.replace("\n", " \N{DOWNWARDS ARROW WITH TIP LEFTWARDS} ").replace("|", chr(92) + "|")
    return f"`{shown}`" if shown else ""


def _is_short(text: str) -> bool:
    return len(text) <= _WIDEST and "`" not in text and text.isascii() and text.replace("\n", "").isprintable()


def cases() -> str:
    """Rows with their verdicts, those that fit."""
    lines = (TESTS / "code_cases.jsonl").read_text(encoding="ascii").splitlines()
    rows = ["| family | program | tests | setup | verdict |", "|---|---|---|---|---|"]
    for family, _, program, tests, setup, reason in map(json.loads, lines):
        texts = [program, setup, *(tests or [""])]
        if all(isinstance(text, str) and _is_short(text) for text in texts) and len(texts) == 3:
            rows.append(f"| {family} | {cell(program)} | {cell(texts[2])} | {cell(setup)} | {reason} |")
    head = f"Some of the {len(lines)} rows of `tests/rewards/code_cases.jsonl`, written by `scripts/code_table.py`:\n\n"
    return head + "\n".join(rows) + "\n"


def forgeries() -> str:
    """Programs that solve nothing and earn nothing, those that fit."""
    parts = (TESTS / "forgeries.txt").read_text(encoding="utf-8").split("### ")[1:]
    rows = ["| forgery | program | tests | setup |", "|---|---|---|---|"]
    for part in parts:
        name, _, body = part.partition("\n")
        code, tests, *setup = [piece.strip("\n") for piece in body.split("\n---\n")]
        if all(map(_is_short, (code, tests, *setup))) and len(rows) < _FORGERIES + 2:
            rows.append(f"| {name} | {cell(code)} | {cell(tests)} | {cell(setup[0]) if setup else ''} |")
    head = f"Some of the {len(parts)} forgeries of `tests/rewards/forgeries.txt`; none earns anything on any level:\n\n"
    return head + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables into the page, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "rewards.md")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n{cases()}\n{forgeries()}\n{END}{after}"
    if options.check:
        return int(written != page)
    options.page.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
