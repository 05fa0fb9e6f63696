"""Where does a run keep its files? One folder, one run, one process at a time."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import yaml

from mirrorpo.errors import InputError
from mirrorpo.files import write_text_atomic
from mirrorpo.training.callbacks import METRICS_FILE
from mirrorpo.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"
BEFORE_FILE = "before.json"
LOCK_FILE = ".lock"


class RunFolder:
    """The folder of one run, locked while the object lives (the lock dies with the process).

    Args:
        path: the folder; created if needed.
        recipe: what is run; written to ``recipe.yaml``, or compared with it on resume.
        resume: continue the run that the folder holds.

    Raises:
        InputError: the folder holds a run (without ``resume``), holds none (with it) or another recipe's, holds other
            files, is no folder, cannot be written, or is in use.
    """

    def __init__(self, path: Path, recipe: Recipe, resume: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path}: is a file, not a folder")
        holds_run = (path / RECIPE_FILE).exists()
        if holds_run and not resume:
            raise InputError(f"--out {path}: already holds a run; give another folder, or --resume to continue it")
        if resume and not holds_run:
            raise InputError(f"--resume: {path} holds no run")
        if not holds_run and path.exists() and any(entry.name != LOCK_FILE for entry in path.iterdir()):
            raise InputError(f"--out {path}: is not empty and holds no run; give another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(f"--out {path}: another process is running in this folder") from None
        try:
            if resume:
                self._check_same(recipe)
            else:
                write_text_atomic(path / RECIPE_FILE, recipe.to_yaml())
        except BaseException:
            self.close()
            raise

    def _check_same(self, recipe: Recipe) -> None:
        kept = yaml.safe_load((self.path / RECIPE_FILE).read_text(encoding="utf-8"))
        asked = recipe.model_dump(mode="json")
        for group, values in asked.items():
            for key, value in values.items():
                before = (kept.get(group) or {}).get(key)
                if before != value:
                    raise InputError(
                        f"--resume: {group}.{key} is {value!r}, the run in {self.path} has {before!r}; "
                        "a resumed run keeps its recipe"
                    )

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / METRICS_FILE

    @property
    def finished(self) -> bool:
        """Whether the run has its summary."""
        return (self.path / SUMMARY_FILE).exists()

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint (the trainer's state is the last file that is written into one)."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        return max(found, key=lambda p: int(p.name.partition("-")[2]), default=None)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole or not at all."""
        write_text_atomic(self.path / name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None if it is absent."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()
