"""Folders of runs, searches, studies and evaluations: one folder, one of them, one process at a time.

A folder holds a settings file, which is written first and compared on resume, a lock that dies with its process, and
``versions.json`` with the versions and the commit that it was begun with. Nothing in it may be a symbolic link: what is
written in it stays in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirrorpo.errors import InputError
from mirrorpo.files import is_left_behind, write_text_atomic
from mirrorpo.runs.reader import read_json

if TYPE_CHECKING:
    from mirrorpo.config.train import Recipe

_PACKAGES = ("mirrorpo", "torch", "transformers", "trl", "accelerate")


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide what a run computes, and Python's."""
    return {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()}


def differing(begun: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, version at the beginning and version now of each package whose version is not the same.

    Example:
        >>> differing({"torch": "2.11", "trl": "1.16"}, {"torch": "2.13", "trl": "1.16"})
        [('torch', '2.11', '2.13')]
    """
    return [(name, begun[name], now[name]) for name in now if name in begun and begun[name] != now[name]]


def commit_of_package() -> str | None:
    """The commit of this package's checkout, None if it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


RECIPE_FILE = "recipe.yaml"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"
METRICS_FILE = "metrics.jsonl"
BEFORE_FILE = "before.json"
VERSIONS_FILE = "versions.json"
LOCK_FILE = ".lock"
_FORMAT = 1  # of versions.json and of the files beside it


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a folder holds: its noun, its settings file, and the word for the settings."""

    noun: str
    file: str
    settings: str
    article: str = "a"

    def __str__(self) -> str:
        return f"{self.article} {self.noun}"


RUN = Kind(noun="run", file=RECIPE_FILE, settings="recipe")
STUDY = Kind(noun="study", file="study.yaml", settings="settings")
EVALUATION = Kind(noun="evaluation", file="evaluation.json", settings="settings", article="an")


def check_place(path: Path, kind: Kind, resume: bool) -> None:
    """Whether something of this kind can begin in a folder, or go on in it; looks, and writes nothing.

    Raises:
        InputError: the folder holds one already (without ``resume``), holds none (with it), holds other files, or is a
            file.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, a path through a file
        raise _unwritable(path, error) from None
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path}: is a file, not a folder")
    holds = (path / kind.file).exists()
    if holds and not resume:
        raise InputError(f"--out {path}: already holds {kind}; give another folder, or --resume to continue it")
    if resume and not holds:
        raise InputError(f"--resume: {path} holds no {kind.noun}")
    if not holds and path.exists() and any(_is_foreign(entry) for entry in path.iterdir()):
        raise InputError(f"--out {path}: is not empty and holds no {kind.noun}; give another folder")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--out {path}: cannot be written ({error.strerror})")


class Folder:
    """A folder of one kind, locked while the object lives.

    Args:
        path: the folder; created if needed.
        kind: what it holds.
        text: the settings file's content; written, or compared with what is there on resume.
        load: the settings file's text, and its path for messages, to plain data.
        resume: continue what the folder holds.
        say: prints one line; told when a resumed folder was begun with other versions.

    Raises:
        InputError: the folder holds one already (without ``resume``), holds none or another one (with it), holds other
            files or a symbolic link, is of another format, is not a folder, cannot be written, or is in use.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        text: str,
        load: Callable[[str, str], Any],
        resume: bool,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.kind = path, kind
        check_place(path, kind, resume)
        self._made = made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            refuse_links(path, f"--out {path}", kind)
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            self._take_lock()
            check_place(path, kind, resume)  # again: another process may have been faster, and done
            for entry in path.iterdir():
                if is_left_behind(entry):
                    entry.unlink()
            if resume:
                self._check_same(text, load)
                self._check_versions(say)
            else:
                self.write_json(VERSIONS_FILE, {"format": _FORMAT, "begun_with": versions()})
                write_text_atomic(path / kind.file, text)
        except OSError as error:
            self.close()
            self._unmake(made)
            raise _unwritable(path, error) from None
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

    def _check_same(self, text: str, load: Callable[[str, str], Any]) -> None:
        where = self.path / self.kind.file
        try:
            kept = flat(load(where.read_bytes().decode("utf-8"), str(where)))
        except UnicodeDecodeError:
            raise InputError(f"{where}: is not UTF-8 text") from None
        except (IsADirectoryError, RecursionError):
            raise InputError(f"{where}: holds no {self.kind.settings}") from None
        asked = flat(load(text, self.kind.noun))
        for key in sorted({*asked, *kept}):
            if kept.get(key) != asked.get(key):
                raise InputError(
                    f"--resume: {key} is {asked.get(key)!r:.80}, the {self.kind.noun} in {self.path} has "
                    f"{kept.get(key)!r:.80}; a resumed {self.kind.noun} keeps its {self.kind.settings}"
                )

    def _check_versions(self, say: Callable[[str], None]) -> None:
        begun = self.read_json(VERSIONS_FILE)
        if begun is None:  # written by mirrorpo 0.1, which kept no such file
            return
        known = begun.get("begun_with") if isinstance(begun, dict) else None
        if not isinstance(known, dict):
            raise InputError(f"{self.path / VERSIONS_FILE}: must hold the keys format and begun_with")
        if begun.get("format") != _FORMAT:
            raise InputError(
                f"--resume: the {self.kind.noun} in {self.path} has format {begun.get('format')!r:.40}, this version "
                f"of mirrorpo reads format {_FORMAT}"
            )
        changed = [f"{name} {was!s:.40} (now {now})" for name, was, now in differing(known, versions())]
        if changed:
            say(
                f"warning: {self.path} was begun with {', '.join(changed)}: its numbers may differ from those of an "
                f"unbroken {self.kind.noun}"
            )

    def _unmake(self, made: list[Path]) -> None:
        """Takes back a folder in which the first file could not be written, and the folders made for it."""
        if (self.path / self.kind.file).exists():
            return
        for name in (LOCK_FILE, VERSIONS_FILE):
            (self.path / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()

    def take_back(self) -> None:
        """Removes a folder that was made for this run and holds no more than its beginning."""
        begun = {LOCK_FILE, VERSIONS_FILE, self.kind.file}
        further = [entry for entry in self.path.iterdir() if entry.name not in begun]
        if self.path not in self._made or any(not entry.is_dir() or any(entry.iterdir()) for entry in further):
            return
        for entry in further:
            entry.rmdir()
        (self.path / self.kind.file).unlink()
        self._unmake(self._made)

    @property
    def finished(self) -> bool:
        """Whether there is a summary."""
        return (self.path / SUMMARY_FILE).exists()

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole or not at all."""
        # ASCII: a verdict may quote half a character, which UTF-8 has no bytes for.
        write_text_atomic(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None if it is missing.

        Raises:
            InputError: it is not JSON, not a plain file or too large.
        """
        try:
            return read_json(self.path, name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(str(error)) from None

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._lock)


class RunFolder(Folder):
    """The folder of a training run or of a search.

    Args:
        path: the folder; created if needed.
        recipe: what is run; written to ``recipe.yaml``, or compared with it on resume.
        resume: continue the run that the folder holds.
        say: see ``Folder``.

    Raises:
        InputError: see ``Folder``.
    """

    def __init__(
        self, path: Path, recipe: Recipe, resume: bool, say: Callable[[str], None] = lambda line: None
    ) -> None:
        kept = path / RECIPE_FILE

        def load(text: str, where: str) -> Any:
            # Through the model: keys that were added since the run was begun have their defaults.
            from mirrorpo.config.train import load_recipe

            return (load_recipe(kept, kind=type(recipe)) if where == str(kept) else recipe).model_dump(mode="json")

        super().__init__(path, RUN, recipe.to_yaml(), load, resume, say)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / METRICS_FILE


class FollowedFolder(RunFolder):
    """The folder of a run as seen by the processes beside the main one: they write nothing of their own in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_json(self, name: str, value: Any) -> None:
        """Left to the main process."""

    def take_back(self) -> None:
        """Left to the main process."""

    def close(self) -> None:
        """There is no lock to release."""


def refuse_links(path: Path, where: str, kind: Kind = RUN) -> None:
    """Raises ``InputError`` if an entry of a folder is a symbolic link, which would lead out of it."""
    link = next((entry.name for entry in path.iterdir() if entry.is_symlink()), None)
    if link is not None:
        raise InputError(f"{where}: {link:.80} is a symbolic link, which {kind.article} {kind.noun} folder never holds")


def wait_until_free(folder: Path, seconds: float) -> None:
    """Waits until no process holds the lock of a folder, but not longer than so many seconds.

    A worker that was killed, or whose coordinator was, may hold its lock for a moment.
    """
    path = folder / LOCK_FILE
    if not path.exists():
        return
    patience = time.monotonic() + seconds
    with path.open("r+") as held:
        while time.monotonic() < patience:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)


def flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys.

    Example:
        >>> flat({"train": {"steps": 5}, "x": [1]})
        {'train.steps': 5, 'x': [1]}
    """
    if not isinstance(table, Mapping):
        return {prefix.rstrip("."): table} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.")
    return found


def _is_foreign(entry: Path) -> bool:
    """Whether something else put it there."""
    return entry.name not in (LOCK_FILE, VERSIONS_FILE) and not is_left_behind(entry)


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / STUDY.file).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (folder / SUMMARY_FILE).is_file() or (folder / RECIPE_FILE).is_file()


__all__ = [
    "is_run",
    "is_study",
    "BEFORE_FILE",
    "EVALUATION",
    "Folder",
    "FollowedFolder",
    "Kind",
    "LOCK_FILE",
    "METRICS_FILE",
    "RECIPE_FILE",
    "RUN",
    "RunFolder",
    "SAMPLES_FILE",
    "STUDY",
    "SUMMARY_FILE",
    "VERSIONS_FILE",
    "commit_of_package",
    "differing",
    "flat",
    "refuse_links",
    "versions",
    "wait_until_free",
]
