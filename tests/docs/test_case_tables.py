"""The tables of cases in docs/rewards.md are those of the scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "family"), [("maths_table", "| position |"), ("code_table", "| a row that cannot be scored |")]
)
def test_the_page_holds_the_table_that_the_script_writes(
    name: str, family: str, load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load(f"scripts/{name}.py")
    assert script.main(["--check"]) == 0
    page = tmp_path / "rewards.md"
    page.write_text((ROOT / "docs" / "rewards.md").read_text().replace(family, "| other |", 1))
    assert script.main(["--check", "--page", str(page)]) == 1
