"""Run folders as training leaves them, drawn from a known distribution: what a report must find is decided here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mirrorpo.studies.collection import Collection, by_seed, read_run

# Accuracy after training: mean and standard deviation over seeds.
ARMS: Mapping[str, tuple[float, float]] = {
    "dr_grpo": (0.80, 0.010),
    "better": (0.86, 0.010),
    "same": (0.80, 0.010),
    "wild": (0.80, 0.060),
    "worse": (0.70, 0.015),
}


def write_simulated(
    folder: Path, arm: str, seed: int, accuracy: float, *, steps: int = 30, completion: str = "#### 2", **summary: Any
) -> Path:
    """One finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(arm), steps])
    recipe = {
        "task": {"name": "arithmetic", "difficulty": "hard"},
        "objective": {"preset": arm},
        "train": {"steps": steps, "seed": seed},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = []
    for step in range(1, steps + 1):
        reward = accuracy * (1 - math.exp(-step / 6)) + rng.normal(0, 0.01)
        line = {"step": step, "reward": min(1.0, max(0.0, reward)), "seconds": 0.5}
        if arm != "dr_grpo":
            line["divergence/reverse_kl/mean"] = 1e-3 * step
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sample = {"prompt": "1 + 1?", "answer": "2", "reason": "match", "reward": 1.0}
    (folder / "samples.jsonl").write_text(
        json.dumps({**sample, "when": "before", "completion": "5", "reward": 0.0})
        + "\n"
        + json.dumps({**sample, "when": "after", "completion": completion})
        + "\n"
    )
    (folder / "divergence.json").write_text(json.dumps({"reverse_kl": 0.02 * (1 + len(arm) % 3), "tokens": 320}))
    numbers = {
        "task": "arithmetic",
        "objective": arm,
        "objective_line": f"{arm}: as it says",
        "model": "builtin:tiny",
        "seed": seed,
        "steps": steps,
        "seconds": 20.0,
        "accuracy_before": 0.38,
        "accuracy_after": accuracy,
        "mean_length_before": 14.0,
        "mean_length_after": 20.0 + 30.0 * (accuracy - 0.7) + rng.normal(0, 0.3),
        "problems": 1000,
        "versions": {"mirrorpo": "0.1.0", "torch": "2.13.0"},
        "mirrorpo_version": "0.1.0",
        "commit": "abc1234",
    }
    (folder / "summary.json").write_text(json.dumps({**numbers, **summary}))
    return folder


def accuracies(arm: str, seeds: Sequence[int]) -> list[float]:
    """A sample of exactly the arm's mean and standard deviation (so that no test hangs on luck)."""
    mean, sd = ARMS[arm]
    drawn = np.random.default_rng([sorted(ARMS).index(arm), 7]).normal(size=len(seeds))
    if len(seeds) > 1:
        drawn = (drawn - drawn.mean()) / drawn.std(ddof=1)
    return [float(min(1.0, mean + sd * value)) for value in drawn]


def simulated(folder: Path, num_seeds: int = 10, arms: Sequence[str] = tuple(ARMS), **other: Any) -> Collection:
    """A collection of simulated arms."""
    runs = {}
    for arm in arms:
        seeds = range(num_seeds)
        found = [
            read_run(write_simulated(folder / arm / f"seed{seed}", arm, seed, accuracy), arm)
            for seed, accuracy in zip(seeds, accuracies(arm, seeds), strict=True)
        ]
        runs[arm] = by_seed(arm, found)
    settings = {"title": "A study", "baseline": arms[0], "target": 0.75, "margin": 0.02, **other}
    return Collection(arms=runs, **settings)
