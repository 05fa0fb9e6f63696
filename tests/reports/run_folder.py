"""A run folder as a training run leaves it, for tests to write and to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUMMARY: dict[str, Any] = {
    "task": "arithmetic",
    "objective": "prob_l2_grpo",
    "objective_line": "clip 0.2, penalty 1e-4 x prob_l2 toward the base",
    "model": "builtin:tiny",
    "seed": 7,
    "steps": 40,
    "seconds": 61.2,
    "accuracy_before": 0.38,
    "accuracy_after": 0.97,
    "mean_length_before": 11.2,
    "mean_length_after": 26.0,
    "problems": 500,
    "accuracy_before_interval": [0.339, 0.424],
    "accuracy_after_interval": [0.951, 0.982],
    "reasons_before": {"match": 190, "mismatch": 310},
    "reasons_after": {"match": 485, "mismatch": 10, "no_answer": 5},
    "command": "mirrorpo train recipes/arithmetic.yaml --out runs/demo",
    "commit": "abc1234",
    "versions": {"mirrorpo": "0.1.0", "torch": "2.13.0"},
    "mirrorpo_version": "0.1.0",
}
HOSTILE = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\x1b[31m\u202eevil\x00\ud800 \"'&"
SAMPLE = {"when": "after", "prompt": "1 + 1?", "completion": "2", "answer": "2", "reward": 1.0, "reason": "match"}


def line_of(step: int, **other: Any) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    line = {
        "step": step,
        "loss": 0.01,
        "reward": min(1.0, 0.3 + 0.02 * step),
        "reward_std": 0.4,
        "entropy": 1 / step,
        "completions/mean_length": 10.0 + step,
        "divergence/prob_l2/mean": 1e-6 * step**3,
        "divergence/reverse_kl/mean": 1e-4 * step**2,
        "clip/low/frac": 0.01,
        "clip/high/frac": 0.02,
        "ratio/max": 1.5,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "seconds": 0.7,
    }
    return {**line, **other}


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **summary: Any) -> Path:
    """A whole run folder; keywords replace keys of the summary."""
    lines = [line_of(step) for step in range(1, 41)] if lines is None else lines
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **summary}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = {**SAMPLE, "when": "before", "completion": "5", "reward": 0.0, "reason": "mismatch"}
    write_samples(folder, before, SAMPLE)
    (folder / "recipe.yaml").write_text("task: {name: arithmetic}\n")
    return folder


def write_samples(folder: Path, *samples: dict[str, Any]) -> None:
    """Only samples.jsonl."""
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
