"""The optional parts of the installation: which packages each brings, and one line for whoever lacks them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

# What the command line and the trainer import, by import name; pyproject.toml has the versions.
TRAIN = (
    "accelerate",
    "datasets",
    "jinja2",
    "math_verify",
    "matplotlib",
    "pydantic",
    "rich",
    "scipy",
    "transformers",
    "trl",
    "typer",
)


def missing(modules: Iterable[str] = TRAIN) -> list[str]:
    """The modules that are not installed; none of them is imported.

    Example:
        >>> missing(["json", "no_such_module"])
        ['no_such_module']
    """
    return [module for module in modules if importlib.util.find_spec(module) is None]


def needs_train(what: str, absent: Iterable[str]) -> str:
    """The line for somebody who has the core alone.

    Example:
        >>> needs_train("the command line", ["trl"])
        "the command line needs the extra 'train' (missing: trl): pip install 'mirrorpo[train]'"
    """
    return f"{what} needs the extra 'train' (missing: {', '.join(absent)}): pip install 'mirrorpo[train]'"


__all__ = ["TRAIN", "missing", "needs_train"]
