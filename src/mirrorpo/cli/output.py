"""Results on stdout, progress on stderr, and the options that every command takes."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Chosen:
    """The options that may stand before the command or after it."""

    quiet: bool = False
    debug: bool = False


chosen = Chosen()


def reset() -> None:
    """Options of a command that ran before in this process have no effect on the next."""
    chosen.quiet = chosen.debug = False


def _set_quiet(value: bool) -> bool:
    chosen.quiet = chosen.quiet or value
    return value


def _set_debug(value: bool) -> bool:
    chosen.debug = chosen.debug or value
    return value


def console() -> Console:
    """For progress, on stderr; silent with ``--quiet``."""
    from rich.console import Console

    return Console(stderr=True, quiet=chosen.quiet)


JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
QUIET = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_set_quiet, help="No progress on stderr: results and errors only.")
]
DEBUG = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Print the traceback of a failure.")]


def say(text: str) -> None:
    """To stdout: no markup, no wrapping, and nothing in it that a terminal would obey."""
    from mirrorpo.wording import printable_lines

    sys.stdout.write(printable_lines(text) + "\n")


def as_json(value: Any) -> str:
    """ASCII: what a terminal would obey is escaped as JSON has it, the delete character too, which JSON lets stand."""
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")


def typed() -> str:
    """The command as it was typed."""
    return "mirrorpo " + shlex.join(sys.argv[1:])


__all__ = ["DEBUG", "JSON", "QUIET", "as_json", "chosen", "console", "reset", "say", "typed"]
