"""``mirrorpo learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.cli.output import OVERRIDES, check_overrides, recipe_file


def command(
    recipe: Annotated[str, typer.Argument(help="A learn recipe's file, or the name of one that is shipped.")],
    overrides: OVERRIDES = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = ...,  # pyright: ignore[reportArgumentType]
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Train a policy and learn its penalty (mirror map, option or coefficient) by gradient on the way."""
    path, changes = recipe_file(recipe), check_overrides(overrides)
    from mirrorpo.config.search import LearnRecipe
    from mirrorpo.config.train import load_recipe
    from mirrorpo.interrupts import quiet

    loaded = load_recipe(path, changes, LearnRecipe, output.files_and_folder(out, resume))
    quiet()
    from mirrorpo.search.learn_run import learn, sentences

    summary = learn(loaded, out, resume=resume, console=output.console(), command=output.typed())
    output.say(output.as_json(summary) if as_json else sentences(summary, out))
