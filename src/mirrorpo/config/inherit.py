"""What does a recipe take from another one? ``base`` names it, and the recipe says only what is different.

``base: dr_grpo_1.7b.yaml`` is a file beside the recipe, ``base: gsm8k/dr_grpo_1.7b`` (without suffix) a shipped
recipe. A group of keys is merged key by key, every other value replaced. A group that names another kind
(``task.name``, ``objective.preset``) replaces its base whole: a radius chosen for one trust region says nothing about
another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirrorpo.config.shipped import find_recipe
from mirrorpo.errors import InputError

MAX_BASES = 8
# The key of a group that says what its other keys mean.
_KIND = {"task": "name", "objective": "preset"}


def with_bases(data: Any, path: Path, read: Callable[[Path], Any]) -> Any:
    """The data of a recipe with everything that it takes from its bases.

    Args:
        data: of the recipe at ``path``; what is no mapping comes back as it is, for the caller to refuse.
        path: where it was read; relative bases start from its folder.
        read: the data of a recipe file; raises ``InputError``.

    Returns:
        Plain data without the key ``base``.

    Raises:
        InputError: a base that is no text, cannot be read, is no mapping, leads back to itself or has too many bases.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.yaml").touch()
        >>> own = {"base": "a.yaml", "train": {"steps": 2}}
        >>> with_bases(own, folder / "own.yaml", lambda path: {"train": {"steps": 9, "seed": 1}})
        {'train': {'steps': 2, 'seed': 1}}
    """
    seen = [path.resolve()]
    layers = [data]
    while isinstance(layers[-1], dict) and layers[-1].get("base") is not None:
        path = _locate(layers[-1]["base"], path)
        if path.resolve() in seen:
            raise InputError(f"{path}: base leads back to this file")
        seen.append(path.resolve())
        if len(layers) > MAX_BASES:
            raise InputError(f"{path}: more than {MAX_BASES} bases, one below the other")
        layers.append(read(path))
        if not isinstance(layers[-1], dict):
            raise InputError(f"{path}: must be a mapping to be a base")
    if not isinstance(data, dict):
        return data
    merged: dict[Any, Any] = {}
    for layer in reversed(layers):
        merged = _merged(merged, {key: value for key, value in layer.items() if key != "base"})
    return merged


def _locate(base: Any, path: Path) -> Path:
    if not isinstance(base, str) or not base.strip():
        raise InputError(f"{path}: base must be a file beside it or the name of a shipped recipe, got {base!r:.80}")
    if Path(base).suffix in (".yaml", ".yml"):
        found = path.parent / base
        if not found.is_file():
            raise InputError(f"{path}: base {base!r}: no such recipe file beside it")
        return found
    try:
        return find_recipe(base)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None


def _merged(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """``above`` wins; groups are merged unless they say that they are of another kind."""
    result = dict(below)
    for key, value in above.items():
        under: Any = result.get(key)
        merge = isinstance(under, dict) and isinstance(value, dict) and not _other_kind(key, under, value)
        result[key] = _merged(under, value) if merge else value
    return result


def _other_kind(key: Any, under: dict[Any, Any], value: dict[Any, Any]) -> bool:
    kind = _KIND.get(key)
    return kind is not None and kind in value and value[kind] != under.get(kind)
