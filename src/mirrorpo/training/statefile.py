"""How is what lives in memory put on disk without pickle? Tensors as safetensors, everything else as JSON.

A state is a tree of dicts, lists, tuples, tensors, numpy arrays, numbers, texts, booleans and None. Reading one back
can build nothing else, whatever the file says: no class is looked up by name and no code runs.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

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
