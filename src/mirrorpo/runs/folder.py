"""Where does a run keep its files? One folder, one run, one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.files import is_left_behind, write_text_atomic
from mirrorpo.training.callbacks import METRICS_FILE
from mirrorpo.training.checkpoints import CheckpointError, Found, clean, newest_whole, set_aside
from mirrorpo.config.train import Recipe, load_recipe

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
        try:
            path.stat()
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, a way that leads through a file
            raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path}: is a file, not a folder")
        holds_run = (path / RECIPE_FILE).exists()
        if holds_run and not resume:
            raise InputError(f"--out {path}: already holds a run; give another folder, or --resume to continue it")
        if resume and not holds_run:
            raise InputError(f"--resume: {path} holds no run")
        if not holds_run and path.exists() and any(_is_foreign(entry) for entry in path.iterdir()):
            raise InputError(f"--out {path}: is not empty and holds no run; give another folder")
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Nothing may lead out of the folder: what is written in it stays in it.
            link = next((entry.name for entry in path.iterdir() if entry.is_symlink()), None)
            if link is not None:
                raise InputError(f"--out {path}: {link} is a symbolic link, a run folder holds none")
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
        try:
            self._take_lock()
            for entry in path.iterdir():
                if is_left_behind(entry):
                    entry.unlink()
            if resume:
                self._check_same(recipe)
            else:
                write_text_atomic(path / RECIPE_FILE, recipe.to_yaml())
        except OSError as error:
            self.close()
            _unmake(path, made)
            raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            raise InputError(
                f"--out {self.path}: another process ({pid or 'unknown'}) is running in this folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _check_same(self, recipe: Recipe) -> None:
        kept = load_recipe(self.path / RECIPE_FILE, kind=type(recipe)).model_dump(mode="json")
        asked = recipe.model_dump(mode="json")
        for group, values in asked.items():
            for key, value in values.items():
                before = kept[group].get(key)
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

    def resume_point(self) -> Found:
        """The newest checkpoint without a fault; damaged ones that are newer are taken out of the way.

        Raises:
            CheckpointError: there are checkpoints, and each is damaged.
        """
        clean(self.path)
        clean(self.checkpoints)
        found = newest_whole(self.checkpoints)
        if found.path is None and found.damaged:
            path, fault = found.damaged[0]
            raise CheckpointError(
                f"{self.path}: every checkpoint is damaged ({path.name}: {fault}); "
                f"remove {self.checkpoints} to start anew"
            )
        for path, _ in found.damaged:
            set_aside(path)
        return found

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole or not at all."""
        # ASCII: a verdict may quote half a character, which UTF-8 has no bytes for.
        write_text_atomic(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None if it is absent."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._lock)


class FollowedFolder(RunFolder):
    """The folder of a run as the processes beside the main one see it: they write nothing of its own in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_json(self, name: str, value: Any) -> None:
        """Left to the main process."""

    def close(self) -> None:
        """There is no lock to give back."""


def _unmake(path: Path, made: list[Path]) -> None:
    """Takes back a folder in which the first file could not be written, and the folders made for it."""
    if (path / RECIPE_FILE).exists():
        return
    (path / LOCK_FILE).unlink(missing_ok=True)
    for folder in made:
        folder.rmdir()


def _is_foreign(entry: Path) -> bool:
    """Whether somebody else put it there."""
    return entry.name != LOCK_FILE and not is_left_behind(entry)
