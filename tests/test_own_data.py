"""Your own data on real problems: GSM8K's training file, where it lies beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


def test_twenty_steps_on_real_gsm8k_problems_run_and_teach_the_tiny_model_nothing(tmp_path: Path) -> None:
    if not GSM8K.exists():
        pytest.skip(f"the data set is not there: {GSM8K}")
    small = ("train.prompts_per_step=2", "train.group_size=2", "train.max_completion_length=16", "eval.problems=8")
    done = run("train", "own_data", f"task.path={GSM8K}", *small, "--out", str(tmp_path / "run"), "--json")
    summary = json.loads(done.stdout)
    assert summary["steps"] == 20
    # 0.33 million parameters that have only seen sums: it answers nothing, and that is not an error.
    assert summary["accuracy_after"] <= 0.25
    assert set(summary["reasons_after"]) <= {"match", "mismatch", "no answer", "malformed"}
