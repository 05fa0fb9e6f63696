"""The table of maths cases in docs/rewards.md is that of the script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_holds_the_table_that_the_script_writes(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = load("scripts/maths_table.py")
    assert script.main(["--check"]) == 0
    page = tmp_path / "rewards.md"
    page.write_text((ROOT / "docs" / "rewards.md").read_text().replace("| position |", "| place |", 1))
    assert script.main(["--check", "--page", str(page)]) == 1
