"""What do two finished folders not have in common? Byte for byte; times, paths and pictures aside."""

from __future__ import annotations

import csv
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

# Fields of metrics.jsonl, summary.json, before.json and the records that are times.
TIMES = (
    "seconds", "step_time", "tokens_per_second", "generation_seconds", "reward_seconds", "scoring_seconds",
    "worker_seconds",
)  # fmt: skip
# Fields that say how a run was started, and how often its workers died.
_ASIDE = (*TIMES, "command", "commit", "worker_deaths")
_NOT_COMPARED = (
    ".lock", "curve.png", "report.html", "manifest.json", "training_args.json", "README.md", "evolution.png",
)  # fmt: skip


def differences(unbroken: Path, resumed: Path) -> list[str]:
    """Names of the files that differ, or that one of the folders lacks."""
    found = []
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (unbroken, resumed)]
    found += [f"only in one: {name}" for name in sorted(set(names[0]) ^ set(names[1]))]
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (_comparable(root / name) for root in (unbroken, resumed))
        if one != two:
            found.append(name)
    return found


def rows(path: Path) -> list[tuple[str, str, Any]]:
    """Key, digest and result of each recorded job, sorted by key."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT key, digest, result FROM results").fetchall()
    finally:
        connection.close()
    return sorted((key, digest, _without_times(json.loads(result))) for key, digest, result in found)


def _comparable(path: Path) -> Any:
    """A file's content without what may differ: times, and the folder's own name."""
    if path.name in _NOT_COMPARED:
        return None
    if path.suffix == ".sqlite":
        # The digest of a study's job holds the command and the folder.
        return [(key, result) for key, _, result in rows(path)]
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.suffix in (".pt", ".pth"):
        with safe_globals():
            return _without_times(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return [_without_times(line) for line in csv.DictReader(path.read_text().splitlines())]
    if path.name == "report.md":
        # Its title, its command, and a note where somebody committed between the runs.
        aside = ("# Study ", "mirrorpo ", "**Note.** The runs come from ")
        return [line for line in path.read_text().splitlines() if line and not line.startswith(aside)]
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in _ASIDE}
    if isinstance(value, torch.Tensor | np.ndarray):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    return [_without_times(item) for item in value] if isinstance(value, list | tuple) else value
