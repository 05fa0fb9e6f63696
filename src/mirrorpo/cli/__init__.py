"""The command line: ``mirrorpo --help``. One file for each command, loaded when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mirrorpo.cli.start import main

if TYPE_CHECKING:
    from mirrorpo.cli.app import app


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("mirrorpo.cli.app").app


__all__ = ["app", "main"]
