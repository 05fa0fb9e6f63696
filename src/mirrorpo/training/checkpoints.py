"""Checkpoints on disk: how they are written, verified and rotated, and the files of a state without pickle.

A checkpoint is written into a folder of another name (``.writing-<step>``), its files reach the disk, ``manifest.json``
with the sha256 of each is added, and then the folder is renamed to ``checkpoint-<step>``: a name that readers look for
never stands for half a checkpoint. What a disk damages afterwards, the checksums find.

State is what ``torch.save`` writes, and is read with ``weights_only``: tensors, numbers, texts and containers of them,
whatever the file says. A file with anything else in it is refused before anything of it is used. Format 1, of version
0.1, had the same content as safetensors and JSON; ``readable`` translates it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from mirrorpo.errors import RunError
from mirrorpo.files import sync_folder, write_text_atomic

MANIFEST_FILE = "manifest.json"
PREFIX = "checkpoint-"
_WRITING, _OLD, _DAMAGED = ".writing-", ".old-", "damaged-"
_FORMAT, _OLD_FORMAT = 2, 1
_MAX_MANIFEST_BYTES = 16_000_000
# hashlib gives the interpreter's lock back: files of a large model are hashed side by side.
_HASHERS = 4


class CheckpointError(RunError):
    """A checkpoint cannot be written or none can be used; the message is one line that says what is intact."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a look at a folder of checkpoints found: the newest one that is whole, and newer ones that are not."""

    path: Path | None
    damaged: tuple[tuple[Path, str], ...]


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint's name.

    Example:
        >>> step_of(Path("runs/demo/checkpoints/checkpoint-40"))
        40
    """
    return int(checkpoint.name.removeprefix(PREFIX))


def all_checkpoints(root: Path) -> list[Path]:
    """Folders named ``checkpoint-<step>``, the newest first; by step, as clocks jump."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal() and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def writing_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return root / f"{_WRITING}{step}"


def seal(folder: Path, step: int) -> None:
    """Makes every file of a checkpoint durable and writes the manifest."""
    files = _files_of(folder)
    with ThreadPoolExecutor(max_workers=_HASHERS) as threads:
        entries = dict(zip(files, threads.map(lambda name: _entry(folder / name, durable=True), files), strict=True))
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        sync_folder(inner)
    manifest = {"format": _FORMAT, "step": step, "files": entries}
    write_text_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def publish(folder: Path, target: Path) -> None:
    """Gives a sealed checkpoint its name; an existing one is replaced."""
    if target.exists() or target.is_symlink():
        aside = target.parent / f"{_OLD}{target.name}"
        _remove(aside)
        os.rename(target, aside)
        os.rename(folder, target)
        _remove(aside)
    else:
        os.rename(folder, target)
    sync_folder(target.parent)


def rotate(root: Path, keep: int, spare: Sequence[Path] = ()) -> None:
    """Removes all but the newest ``keep`` checkpoints; each loses its name first, so a kill leaves none torn."""
    for old in all_checkpoints(root)[keep:]:
        if old not in spare:
            aside = root / f"{_OLD}{old.name}"
            os.rename(old, aside)
            _remove(aside)


def clean(root: Path) -> None:
    """Removes what a killed writer left behind."""
    for pattern in (f"{_WRITING}*", f"{_OLD}*"):
        for left in root.glob(pattern):
            _remove(left)


def set_aside(checkpoint: Path) -> None:
    """Takes a damaged checkpoint out of the way without destroying the evidence."""
    aside = checkpoint.parent / f"{_DAMAGED}{checkpoint.name}"
    _remove(aside)
    os.rename(checkpoint, aside)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is the one that was written.

    Example:
        >>> import tempfile
        >>> fault_of(Path(tempfile.mkdtemp()))
        'manifest.json is missing'

    Raises:
        CheckpointError: it has the format of a later version.
    """
    path = folder / MANIFEST_FILE
    if folder.is_symlink():
        return "it is a symbolic link"
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return f"{MANIFEST_FILE} is not a manifest"
        manifest = json.loads(path.read_bytes())
        entries = manifest["files"]
        if isinstance(manifest["format"], int) and manifest["format"] > _FORMAT:
            raise CheckpointError(
                f"{folder}: written in format {manifest['format']}, this version reads 1 to {_FORMAT}; resume with the "
                "version that wrote it"
            )
        if manifest["format"] not in (_OLD_FORMAT, _FORMAT) or f"{PREFIX}{manifest['step']}" != folder.name:
            return f"{MANIFEST_FILE} is that of another checkpoint"
        there = _files_of(folder)
        if set(there) != set(entries):
            name = sorted(set(there) ^ set(entries))[0]
            return f"{name} is missing" if name in entries else f"{name} does not belong to it"
        with ThreadPoolExecutor(max_workers=_HASHERS) as threads:
            found = threads.map(lambda name: _entry(folder / name, durable=False), there)
            differ = [_difference(n, entries[n], e) for n, e in zip(there, found, strict=True) if e != entries[n]]
        return differ[0] if differ else None
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the manifest is untrusted text
        return f"{MANIFEST_FILE} is not a manifest"


def newest_whole(root: Path, before: int | None = None) -> Found:
    """The newest checkpoint without a fault, and the faults of the newer ones; with ``before``, among earlier steps."""
    damaged: list[tuple[Path, str]] = []
    for checkpoint in all_checkpoints(root):
        if before is not None and step_of(checkpoint) >= before:
            continue
        fault = fault_of(checkpoint)
        if fault is None:
            return Found(path=checkpoint, damaged=tuple(damaged))
        damaged.append((checkpoint, fault))
    return Found(path=None, damaged=tuple(damaged))


def _files_of(folder: Path) -> list[str]:
    """Names of all files but the manifest; links and devices are refused."""
    names = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) or path == folder / MANIFEST_FILE:
            continue
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a plain file")
        names.append(path.relative_to(folder).as_posix())
    return names


def _entry(path: Path, *, durable: bool) -> dict[str, int | str]:
    with path.open("rb") as stream:
        if durable:
            os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256")
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def _difference(name: str, wanted: object, found: dict[str, int | str]) -> str:
    size = wanted.get("bytes") if isinstance(wanted, dict) else None
    if isinstance(size, int) and size != found["bytes"]:
        return f"{name} has {found['bytes']:,} bytes, {size:,} were written"
    return f"{name} is not what was written (sha256)"


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


_PROGRESS = "progress-{rank}.pt"
# transformers' names of what it keeps by `torch.save`; the last one has the rank in it where there are several.
_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "progress-*.pt")


def write_progress(folder: Path, rank: int, progress: Mapping[str, Any]) -> None:
    """Writes what a process keeps of a run beyond transformers' own state.

    Args:
        folder: of the checkpoint.
        rank: of the process.
        progress: dicts, lists, tuples, tensors, numbers, texts, booleans and None.

    Raises:
        TypeError: something in it is none of these, and could not be read back; names the place.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_progress(folder, 0, {"step": 3, "loss": torch.tensor(0.5)})
        >>> read_progress(folder, 0, torch.device("cpu"))
        {'step': 3, 'loss': tensor(0.5000)}
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_plain(progress, "progress"), folder / _PROGRESS.format(rank=rank))


def read_progress(folder: Path, rank: int, device: torch.device) -> dict[str, Any] | None:
    """What ``write_progress`` wrote, its tensors on ``device``; None if the checkpoint has none."""
    path = folder / _PROGRESS.format(rank=rank)
    # torch does not restore to a CPU with an index.
    where = torch.device("cpu") if device.type == "cpu" else device
    return torch.load(path, weights_only=True, map_location=where) if path.is_file() else None


def _plain(value: Any, place: str) -> Any:
    """The tree in types that ``weights_only`` reads."""
    if value is None or isinstance(value, str | torch.Tensor):
        return value.detach() if isinstance(value, torch.Tensor) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        items = [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{place}: a {type(value).__name__} cannot be kept in a checkpoint")


def foreign_state(folder: Path) -> str | None:
    """Name of a file of state that holds something else than tensors and plain data; None without. Runs no code."""
    for pattern in _STATES:
        for path in sorted(folder.glob(pattern)):
            try:
                with safe_globals():  # numpy's random state is an array
                    torch.load(path, weights_only=True, mmap=True, map_location="meta")
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError):  # untrusted bytes
                return path.name
    return None


@contextmanager
def readable(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint as transformers reads it: itself, or a translation of one that version 0.1 wrote."""
    if not (checkpoint / "rank-0.json").is_file():
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix=_WRITING, dir=checkpoint.parent, ignore_cleanup_errors=True) as beside:
        folder = Path(beside) / checkpoint.name
        folder.mkdir()
        states = {"optimizer", "scaler", *(path.stem for path in checkpoint.glob("rank-*.json"))}
        for path in checkpoint.iterdir():
            if path.stem not in states:
                (folder / path.name).symlink_to(path.resolve())
        for name in states:
            if (checkpoint / f"{name}.json").is_file():
                _translate(name, _read_format_1(checkpoint, name), folder, num_ranks=len(states) - 2)
        yield folder


def _translate(name: str, state: Any, folder: Path, num_ranks: int) -> None:
    if not name.startswith("rank-"):
        parts = state if name == "optimizer" else {name: state}  # with the optimiser stood the schedule
        for part, content in parts.items():
            torch.save(content, folder / f"{part}.pt")
        return
    rank = name.removeprefix("rank-")
    random = {"cpu" if key == "torch" else key: value for key, value in state["random"].items()}
    if num_ranks > 1 and "cuda" in random:
        random["cuda"] = [random["cuda"]] * num_ranks  # transformers keeps one for each device
    torch.save(random, folder / (f"rng_state_{rank}.pth" if num_ranks > 1 else "rng_state.pth"))
    write_progress(folder, int(rank), state["progress"])


def _read_format_1(folder: Path, name: str) -> Any:
    """A state of version 0.1: tensors as safetensors, everything else as JSON with a kind beside each container."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        return _unpack(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / name}: not a state of a run ({type(error).__name__}: {error})") from error


def _unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree["__kind__"]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in tree["items"]}
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in tree["items"])
    found = tensors[tree["name"]]
    return found.numpy() if kind == "array" else found


def random_states() -> dict[str, Any]:
    """Those of Python, numpy, torch and, if there is one, this process's CUDA device."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what ``random_states`` took."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


__all__ = [
    "CheckpointError",
    "Found",
    "all_checkpoints",
    "clean",
    "fault_of",
    "foreign_state",
    "newest_whole",
    "publish",
    "random_states",
    "read_progress",
    "readable",
    "rotate",
    "seal",
    "set_aside",
    "set_random_states",
    "step_of",
    "write_progress",
    "writing_folder",
]
