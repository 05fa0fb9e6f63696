"""``mirrorpo grade``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.errors import InputError


def command(
    kind: Annotated[str, typer.Argument(help="math or code")],
    file: Annotated[Path, typer.Argument(help="JSON lines: completion and answer, or completion, tests and setup.")],
    require: Annotated[str, typer.Option(help="Code: the least level of the sandbox.")] = "confined",
    wall_seconds: Annotated[float, typer.Option(help="Code: time limit of a program.")] = 10.0,
    last_number: Annotated[bool, typer.Option("--last-number", help="Math: without a mark, the last number.")] = False,
    _as_json: output.JSON = False,  # what it prints is JSON anyway
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Grade completions: one line in, one JSON line out, in order."""
    if kind not in ("math", "code"):
        raise InputError(f"grade {kind}: must be math or code")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    from mirrorpo.files import read_lines
    from mirrorpo.rewards import lines

    lines.check_file(file)
    for line in lines.graded(kind, read_lines(file), require, wall_seconds, last_number):
        output.say(line)
        sys.stdout.flush()  # a reader may wait for this one
