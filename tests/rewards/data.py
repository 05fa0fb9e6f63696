"""The original files of GSM8K and MBPP, where they lie beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GSM8K = FOLDER / "gsm8k" / "train.jsonl"
MBPP = FOLDER / "mbpp" / "mbpp.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows; skips the test without the file."""
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: put the original file at ../shared/data/{path.relative_to(FOLDER)}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
