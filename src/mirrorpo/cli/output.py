"""Options, arguments and output that the commands share: results go to stdout, progress to stderr.

Arguments are checked before anything slow is imported.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirrorpo.config.shipped import find_recipe
from mirrorpo.errors import InputError
from mirrorpo.user_code import look_in

if TYPE_CHECKING:
    from rich.console import Console

    from mirrorpo.config.train import Recipe


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


_EXPORTS = ("csv", "latex", "svg", "pdf", "png")
EXPORT = Annotated[
    list[str] | None,
    typer.Option("--export", metavar="FORMAT", help=f"Also write {', '.join(_EXPORTS)} (comma-separated)."),
]


def export_formats(given: Sequence[str] | None) -> tuple[str, ...]:
    """The formats of ``--export``, each once.

    Raises:
        InputError: an unknown one.
    """
    formats = tuple(dict.fromkeys(part.strip() for text in given or () for part in text.split(",")))
    for one in formats:
        if one not in _EXPORTS:
            raise InputError(f"--export {one!r}: must be one of {', '.join(_EXPORTS)}")
    return formats


def run_name(text: str) -> str:
    """The name of a study's run from ``ARM/SEED``.

    Raises:
        InputError: it has another form.

    Example:
        >>> run_name("wide/3")
        'wide/seed3'
    """
    arm, slash, seed = text.rpartition("/")
    if not slash or not arm or not seed.isascii() or not seed.isdigit():
        raise InputError(f"--redo {text!r}: must be ARM/SEED, such as dr_grpo/3")
    return f"{arm}/seed{int(seed)}"


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


def files_and_folder(out: Path | None, resume: bool = False) -> Callable[[Recipe], None]:
    """A check of what a recipe names: its model, its teacher, the files of its task, and the run folder.

    Raises:
        InputError: by the returned function, for a file or folder that is missing, or a run folder that cannot be used.
    """

    def check(recipe: Recipe) -> None:
        from mirrorpo.losses.presets import described
        from mirrorpo.models.folder import check_path
        from mirrorpo.runs.folder import RUN, check_place
        from mirrorpo.tasks import TASKS

        if out is not None and os.environ.get("RANK", "0") == "0":  # the other processes write nothing
            check_place(out, RUN, resume)
        check_path(recipe.model.path)
        teacher = None if out is None or recipe.teacher is None else recipe.teacher.path
        parts = described(recipe.objective.spec())
        looked_at = parts is not None and "teacher" in parts.needs
        if teacher is not None and looked_at and not _may_be_on_the_hub(teacher):
            check_path(teacher, "teacher.path")
        for key in ("path", "test_path"):
            named = getattr(recipe.task, key, None) if recipe.task.name in TASKS else None
            if named is not None and not os.path.exists(named):  # False, not an exception, for a name too long
                raise InputError(f"task.{key}: {named}: no such file")

    return check


def _may_be_on_the_hub(path: str) -> bool:
    """Whether it can be a name of the hub, even where a folder has its owner's name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


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


__all__ = [
    "DEBUG",
    "EXPORT",
    "JSON",
    "OVERRIDES",
    "QUIET",
    "as_json",
    "check_overrides",
    "chosen",
    "console",
    "export_formats",
    "files_and_folder",
    "integers",
    "recipe_file",
    "reset",
    "run_name",
    "say",
    "typed",
]
