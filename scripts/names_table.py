"""Tables of all divergences and surrogates in docs/math.md, from the code.

Usage: python scripts/names_table.py [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the tables that would be written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mirrorpo.cli.listing import build

PAGE = Path(__file__).resolve().parents[1] / "docs" / "math.md"
BEGIN, END = "<!-- begin all names -->\n", "<!-- end all names -->\n"


def tables() -> str:
    """A table of the divergences and one of the surrogates, as ``mirrorpo list`` has them."""
    parts = ["Written by `scripts/names_table.py`.\n"]
    rows = build()
    for kind in ("divergences", "surrogates"):
        columns = list(rows[kind][0])
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows[kind]:
            cells = [f"`{row['name']}`", *(row[column].replace("|", "\\|") for column in columns[1:])]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables into the page, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    written = f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"
    if options.check:
        return int(written != page)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
