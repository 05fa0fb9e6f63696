"""Checkpoints on disk: how they are written, verified and rotated, and the files of a state without pickle.

A checkpoint is written into a folder of another name (``.writing-<step>``), its files reach the disk, ``manifest.json``
with the sha256 of each is added, and then the folder is renamed to ``checkpoint-<step>``: a name that readers look for
never stands for half a checkpoint. What a disk damages afterwards, the checksums find.

A state is a tree of dicts, lists, tuples, tensors, numpy arrays, numbers, texts, booleans and None. Tensors are kept as
safetensors, everything else as JSON, which can be read without this library. Reading a state back can build nothing
else, whatever the file says: no class is looked up by name and no code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mirrorpo.errors import RunError
from mirrorpo.files import sync_folder, write_text_atomic

MANIFEST_FILE = "manifest.json"
PREFIX = "checkpoint-"
_WRITING, _OLD, _DAMAGED = ".writing-", ".old-", "damaged-"
_FORMAT = 1
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
    """Gives a sealed checkpoint its name; one that stands there already is replaced."""
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
    """
    path = folder / MANIFEST_FILE
    if folder.is_symlink():
        return "it is a symbolic link"
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return f"{MANIFEST_FILE} is no manifest"
        manifest = json.loads(path.read_bytes())
        entries = manifest["files"]
        if manifest["format"] != _FORMAT or f"{PREFIX}{manifest['step']}" != folder.name:
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
        return f"{MANIFEST_FILE} is no manifest"


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
    """Names of all files but the manifest; a link or a device among them is none."""
    names = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) or path == folder / MANIFEST_FILE:
            continue
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is no plain file")
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


_KIND = "__kind__"


def write_state(folder: Path, name: str, state: Any) -> None:
    """Writes ``<name>.safetensors`` and ``<name>.json``.

    Args:
        folder: exists.
        name: of both files, without suffix.
        state: the tree.

    Raises:
        TypeError: something in it is none of the kinds above; names the place.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_state(folder, "optimizer", {0: {"step": torch.tensor(3.0)}, "betas": (0.9, 0.99)})
        >>> read_state(folder, "optimizer")
        {0: {'step': tensor(3.)}, 'betas': (0.9, 0.99)}
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(state, name, tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def has_state(folder: Path, name: str) -> bool:
    """Whether ``write_state`` wrote this one."""
    return (folder / f"{name}.json").is_file()


def read_state(folder: Path, name: str) -> Any:
    """The tree that ``write_state`` wrote, its tensors on the CPU.

    Raises:
        ValueError: the files do not describe one.
    """
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        return _unpack(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / name}: no state of a run ({type(error).__name__}: {error})") from error


def _pack(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        name = str(len(tensors))
        tensors[name] = _alone(value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(value), tensors)
        return {_KIND: kind, "name": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"{place}: key {key!r} must be a text or an integer")
        pairs = [[key, _pack(item, f"{place}.{key}", tensors)] for key, item in value.items()]
        return {_KIND: "dict", "items": pairs}
    if isinstance(value, list | tuple | deque):
        items = [_pack(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return {_KIND: "tuple", "items": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{place}: a {type(value).__name__} cannot be kept in a checkpoint")


def _alone(tensor: torch.Tensor, others: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor in memory of its own: safetensors refuses slices of one buffer, and one tensor under two names."""
    tensor = tensor.cpu().contiguous()
    storage = tensor.untyped_storage()
    shared = any(storage.data_ptr() == other.untyped_storage().data_ptr() for other in others.values())
    return tensor.clone() if shared or storage.nbytes() != tensor.nbytes else tensor


def _unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree[_KIND]
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
    "has_state",
    "newest_whole",
    "publish",
    "random_states",
    "read_state",
    "rotate",
    "seal",
    "set_aside",
    "set_random_states",
    "step_of",
    "write_state",
    "writing_folder",
]
