"""Mirror maps on disk: readable JSON with a format version, written completely or not at all.

The file names every group of units, so a person can read which part of the map does the work::

    {"format": "mirrorpo mirror map", "version": 1, "origin": "random, seed 0", "a": 0.004, "c": 0.001,
     "groups": {"cube": {"v": [21 numbers], "w": [...], "b": [...]}, "square": ..., ...}}

Numbers are written with all their digits: a map comes back bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirrorpo.divergences.neural.map import GROUPS, SLICES, UNITS_PER_GROUP, MirrorMap, checked
from mirrorpo.errors import unknown_name

FORMAT = "mirrorpo mirror map"
VERSION = 1
_PARTS = ("v", "w", "b")
_KEYS = ("format", "version", "origin", "fit_error", "about", "a", "c", "groups")
_OPTIONAL = ("origin", "fit_error", "about")
BUILTIN = "builtin:"
_FOLDER = Path(__file__).parent / "maps"


def resolve_map(path: str | os.PathLike[str]) -> Path:
    """The file of a map: ``builtin:NAME`` is one of the package's, anything else a path.

    Raises:
        ValueError: no map of that name in the package.

    Example:
        >>> resolve_map("builtin:embedded").name
        'embedded.json'
    """
    name = str(path)
    if not name.startswith(BUILTIN):
        return Path(path)
    shipped = {f"{BUILTIN}{file.stem}": file for file in sorted(_FOLDER.glob("*.json"))}
    if name not in shipped:
        raise unknown_name("map", name, shipped)
    return shipped[name]


def save_map(path: str | os.PathLike[str], map: MirrorMap, about: Mapping[str, Any] | None = None) -> None:
    """Write a mirror map to a temporary name beside the file, then rename it.

    Args:
        path: the file; its folder exists.
        map: the map.
        about: plain data on how it was made, for people; kept in the file under ``about``, not read back.

    Raises:
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "map.json"
        >>> save_map(file, MirrorMap.random(seed=3))
        >>> load_map(file)
        MirrorMap(random, seed 3)
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(map_text(map, about), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def map_text(map: MirrorMap, about: Mapping[str, Any] | None = None) -> str:
    """What ``save_map`` writes."""
    numbers = {name: map.parameters[place].tolist() for name, place in SLICES.items()}
    units = [slice(k * UNITS_PER_GROUP, (k + 1) * UNITS_PER_GROUP) for k in range(len(GROUPS))]
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "origin": map.origin}
    if map.fit_error is not None:
        content["fit_error"] = map.fit_error
    if about is not None:
        content["about"] = dict(about)
    content |= {name: numbers[name][0] for name in ("a", "c")}
    content["groups"] = {
        group: {name: numbers[name][at] for name in _PARTS} for group, at in zip(GROUPS, units, strict=True)
    }
    return json.dumps(content, indent=1) + "\n"


def load_map(path: str | os.PathLike[str]) -> MirrorMap:
    """Read what ``save_map`` wrote, or a map of the package (``builtin:embedded``).

    Raises:
        ValueError: no such file, not JSON, another format or version, a key that is missing or unknown, a parameter
            that ``MirrorMap`` refuses; the message starts with the path.
    """
    try:  # untrusted: the file may hold anything
        content = json.loads(resolve_map(path).read_text(encoding="utf-8"))
        return _map_from(content)
    except OSError as error:
        raise ValueError(f"path {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # undecodable text and broken JSON are ValueErrors too
        raise ValueError(f"path {str(path)!r} holds no mirror map: {error}") from None


def _map_from(content: Any) -> MirrorMap:
    content = _mapping("the file", content, _KEYS, _OPTIONAL)
    if content["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {content['format']!r}")
    if content["version"] != VERSION or isinstance(content["version"], bool):
        raise ValueError(f"version must be {VERSION}, got {content['version']!r}")
    groups = _mapping("groups", content["groups"], GROUPS)
    parameters: dict[str, Any] = {name: [] for name in _PARTS}
    for group in GROUPS:
        part = _mapping(f"group {group!r}", groups[group], _PARTS)
        for name in _PARTS:
            if not isinstance(part[name], list) or len(part[name]) != UNITS_PER_GROUP:
                raise ValueError(f"{name} of group {group!r} must be a list of {UNITS_PER_GROUP} numbers")
            parameters[name] += [_number(f"{name} of group {group!r}", value) for value in part[name]]
    parameters |= {name: _number(name, content[name]) for name in ("a", "c")}
    error = content.get("fit_error")
    return MirrorMap(
        checked(parameters), str(content.get("origin", "given")), None if error is None else _number("fit_error", error)
    )


def _mapping(what: str, given: Any, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object with the keys {', '.join(keys)}, got {type(given).__name__}")
    for key in given:
        if key not in keys:
            raise unknown_name(f"key in {what}", key, keys)
    for key in keys:
        if key not in given and key not in optional:
            raise ValueError(f"{what} needs the key {key!r}. Legal: {', '.join(keys)}")
    return given


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number in [0, inf), got {value!r}")
    return float(value)
