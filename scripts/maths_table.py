"""Table of maths cases in docs/rewards.md, from the cases that the tests grade.

Usage: python scripts/maths_table.py [--page docs/rewards.md] [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the table that would be written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "rewards" / "maths_cases.jsonl"
BEGIN, END = "<!-- begin maths cases -->\n", "<!-- end maths cases -->\n"
_RIGHT, _WRONG = 4, 4  # rows a family
_WIDEST = 75


def cell(text: str) -> str:
    """A text as code in a table; one that is not plain ASCII on a line is written as JSON."""
    shown = text if text.isprintable() and text.strip() == text and text else json.dumps(text)
    fence = "``" if "`" in shown else "`"
    return f"{fence}{shown.replace('|', chr(92) + '|')}{fence}"


def table() -> str:
    """Some right and some wrong answers of each family."""
    families: dict[str, list[tuple[str, str, int]]] = {}
    for line in CASES.read_text(encoding="ascii").splitlines():
        family, completion, answer, reward = json.loads(line)
        families.setdefault(family, []).append((completion, answer, reward))
    rows = ["| family | completion | right answer | reward |", "|---|---|---|---|"]
    for family, cases in families.items():
        short = [case for case in cases if max(map(len, case[:2])) <= _WIDEST and case[0]]
        right = [case for case in short if case[2] == 1][:_RIGHT]
        wrong = [case for case in short if case[2] == 0][:_WRONG]
        rows += [f"| {family} | {cell(given)} | {cell(wanted)} | {reward} |" for given, wanted, reward in right + wrong]
    total = sum(map(len, families.values()))
    head = f"Some of the {total} cases of `tests/rewards/maths_cases.jsonl`, written by `scripts/maths_table.py`:\n\n"
    return head + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table into the page, or checks it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "rewards.md")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if options.check:
        return int(written != page)
    options.page.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
