"""Lookup of shipped recipes: inside the package when it is installed, at the top of a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

from mirrorpo.errors import InputError

_INSIDE = Path(__file__).parent.parent / "_recipes"
_CHECKOUT = Path(__file__).resolve().parents[3] / "recipes"


def recipes_folder() -> Path:
    """The folder of shipped recipes."""
    return _INSIDE if _INSIDE.is_dir() else _CHECKOUT


def shipped_recipes() -> dict[str, Path]:
    """Name (path without suffix) to file."""
    folder = recipes_folder()
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of a shipped one.

    Raises:
        InputError: neither; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"{name}: no such recipe file")
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(f"unknown recipe {name!r}{hint} Legal: a YAML file, or a name of `mirrorpo list recipes`")
