"""Versions and the commit that a number depends on."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

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


__all__ = ["commit_of_package", "differing", "versions"]
