"""Tables of maths cases, code cases and forgeries in docs/rewards.md, from the cases that the tests grade.

Usage: python scripts/rewards_tables.py [--page docs/rewards.md] [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the tables that would be written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "rewards"
_RIGHT, _WRONG = 4, 4  # rows a family
_FORGERIES = 30
_WIDEST_ANSWER, _WIDEST = 75, 64
_BY = ", written by `scripts/rewards_tables.py`:\n\n"


def _answer(text: str) -> str:
    """A text as code in a table; one that is not plain ASCII on a line is written as JSON."""
    shown = text if text.isprintable() and text.strip() == text and text else json.dumps(text)
    fence = "``" if "`" in shown else "`"
    return f"{fence}{shown.replace('|', chr(92) + '|')}{fence}"


def maths() -> str:
    """Some right and some wrong answers of each family."""
    families: dict[str, list[tuple[str, str, int]]] = {}
    for line in (TESTS / "maths_cases.jsonl").read_text(encoding="ascii").splitlines():
        family, completion, answer, reward = json.loads(line)
        families.setdefault(family, []).append((completion, answer, reward))
    rows = ["| family | completion | right answer | reward |", "|---|---|---|---|"]
    for family, cases in families.items():
        short = [case for case in cases if max(map(len, case[:2])) <= _WIDEST_ANSWER and case[0]]
        right = [case for case in short if case[2] == 1][:_RIGHT]
        wrong = [case for case in short if case[2] == 0][:_WRONG]
        rows += [
            f"| {family} | {_answer(given)} | {_answer(wanted)} | {reward} |" for given, wanted, reward in right + wrong
        ]
    total = sum(map(len, families.values()))
    head = (
        f"Some of the {total} cases of `tests/rewards/maths_cases.jsonl`, written by `scripts/rewards_tables.py`:\n\n"
    )
    return head + "\n".join(rows) + "\n"


def _program(text: str) -> str:
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
            rows.append(f"| {family} | {_program(program)} | {_program(texts[2])} | {_program(setup)} | {reason} |")
    return f"Some of the {len(lines)} rows of `tests/rewards/code_cases.jsonl`{_BY}" + "\n".join(rows) + "\n"


def forgeries() -> str:
    """Programs that solve nothing and earn nothing, those that fit."""
    parts = (TESTS / "forgeries.txt").read_text(encoding="utf-8").split("### ")[1:]
    rows = ["| forgery | program | tests | setup |", "|---|---|---|---|"]
    for part in parts:
        name, _, body = part.partition("\n")
        code, tests, *setup = [piece.strip("\n") for piece in body.split("\n---\n")]
        if all(map(_is_short, (code, tests, *setup))) and len(rows) < _FORGERIES + 2:
            rows.append(f"| {name} | {_program(code)} | {_program(tests)} | {_program(setup[0]) if setup else ''} |")
    head = f"Some of the {len(parts)} forgeries of `tests/rewards/forgeries.txt`; none earns anything on any level:\n\n"
    return head + "\n".join(rows) + "\n"


def filled(page: str, name: str, tables: str) -> str:
    """The page with ``tables`` between the marks of that name."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables into the page, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "rewards.md")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    written = filled(filled(page, "maths cases", maths()), "code cases", f"{cases()}\n{forgeries()}")
    if options.check:
        return int(written != page)
    options.page.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
