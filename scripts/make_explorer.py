"""Write docs/explorer.html, the divergence explorer: one page that needs nothing but itself.

The parts lie in scripts/explorer/: a template, a style sheet and three scripts (formulas, plot, app). They are put
into the template together with the table of names from the package, the numbers that scripts/fixed_points.py keeps,
and a Content-Security-Policy that allows exactly
these parts by their hashes and no request at all. Runtime: about 3 seconds, most of it the import of torch.

Usage: python scripts/make_explorer.py [--out docs/explorer.html] [--check]

With --check nothing is written; the exit status is 1 if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrorpo.divergences import DIVERGENCES
from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS

HERE = Path(__file__).resolve().parent
PARTS = HERE / "explorer"
PAGE = HERE.parent / "docs" / "explorer.html"
SCRIPTS = ("formulas.js", "plot.js", "app.js")
FAMILIES = {
    "f": "f-divergences and k1, k3",
    "bregman": "Bregman divergences",
    "log-ratio": "penalties on the log-ratio",
}
SYNONYMS = {"k3"}  # drawn by another one's formula
INTERVALS = ("ratio", "kl3", "kl2", "binary_tv", "binary_kl")  # regions with bounds that are no divergence's own name


def drawn() -> set[str]:
    """The divergences that have a formula in JavaScript, which a test compares with Python's; others are not drawn."""
    return set(
        re.findall(r"^  (\w+): \((?:delta|lx)", (PARTS / "formulas.js").read_text(encoding="utf-8"), re.MULTILINE)
    )


def names() -> list[dict[str, Any]]:
    """Every name of the page: formula, source, options and roles."""
    formulas = drawn() | SYNONYMS
    divergences = [
        {
            "name": name,
            "family": FAMILIES[entry.family],
            "formula": entry.formula,
            "source": entry.source,
            "options": list(entry.options),
            "divergence": True,
            "region": name in DIVERGENCE_REGIONS,
        }
        for name, entry in DIVERGENCES.items()
        if name in formulas
    ]
    regions = [
        {
            "name": name,
            "family": "regions only",
            "formula": REGIONS[name].constraint,
            "source": REGIONS[name].source,
            "options": [],
            "divergence": False,
            "region": True,
        }
        for name in INTERVALS
    ]
    divergences.sort(key=lambda line: list(FAMILIES.values()).index(line["family"]))
    return divergences + regions


def digest(text: str) -> str:
    """The source expression of a Content-Security-Policy for an inline part."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page() -> str:
    """The whole page."""
    style = (PARTS / "style.css").read_text(encoding="utf-8")
    script = "\n".join((PARTS / part).read_text(encoding="utf-8") for part in SCRIPTS)
    # "<" written as an escape: no name or formula can end the script element.
    table, ends = (
        json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
        for content in (names(), json.loads((PARTS / "fixed_points.json").read_text(encoding="utf-8")))
    )
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    text = (PARTS / "template.html").read_text(encoding="utf-8")
    for key, part in {"policy": policy, "style": style, "table": table, "ends": ends, "script": script}.items():
        text = text.replace("{{" + key + "}}", part)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write (default: docs/explorer.html)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    given = parser.parse_args(arguments)
    text = page()
    if given.check:
        same = given.out.exists() and given.out.read_text(encoding="utf-8") == text
        print(f"{given.out.name}: {'up to date' if same else 'differs: run scripts/make_explorer.py'}")
        return int(not same)
    given.out.write_text(text, encoding="utf-8")
    print(f"wrote {given.out.name}, {len(text.encode()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
