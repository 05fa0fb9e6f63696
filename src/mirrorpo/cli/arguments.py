"""Arguments that several commands share, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.config.shipped import find_recipe
from mirrorpo.errors import InputError
from mirrorpo.user_code import look_in

OVERRIDES = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=5")]


def recipe_file(name: str) -> Path:
    """The recipe or study file that an argument names.

    Raises:
        InputError: neither a file nor the name of a shipped one.
    """
    if name.startswith("-") or "=" in name:
        raise InputError(f"{name!r}: the recipe comes first, then key=value; `mirrorpo list recipes` has the names")
    if Path(name).is_dir():
        raise InputError(f"{name}: is a folder, not a recipe file; the recipe of a run is {Path(name, 'recipe.yaml')}")
    path = find_recipe(name)
    look_in(path.parent, Path.cwd())  # what the recipe names as "module:function" may be beside it
    return path


def check_overrides(overrides: Sequence[str] | None) -> list[str]:
    """The overrides, each of them ``key=value``.

    Raises:
        InputError: one that is not.

    Example:
        >>> check_overrides(["train.steps=5"])
        ['train.steps=5']
    """
    for override in overrides or ():
        key, equals, _ = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise InputError(f"override {override!r}: must be key=value, such as train.steps=5")
    return list(overrides or ())


def integers(option: str, text: str) -> list[int]:
    """Comma-separated positive integers.

    Raises:
        InputError: anything else; names the option.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise InputError(f"{option} {text}: must be integers >= 1, comma-separated, such as 1,8")
    return values


__all__ = ["OVERRIDES", "check_overrides", "integers", "recipe_file"]
