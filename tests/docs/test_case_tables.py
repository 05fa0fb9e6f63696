"""The tables of cases in docs/rewards.md are those of the script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["| position |", "| a row that cannot be scored |"])
def test_the_page_holds_the_tables_that_the_script_writes(
    family: str, load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load("scripts/rewards_tables.py")
    assert script.main(["--check"]) == 0
    page = tmp_path / "rewards.md"
    page.write_text((ROOT / "docs" / "rewards.md").read_text().replace(family, "| other |", 1))
    assert script.main(["--check", "--page", str(page)]) == 1
