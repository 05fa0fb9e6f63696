"""``mirrorpo evolve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.cli.output import OVERRIDES, check_overrides, recipe_file


def command(
    recipe: Annotated[str, typer.Argument(help="An evolve recipe's file, or the name of one that is shipped.")],
    overrides: OVERRIDES = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = ...,  # pyright: ignore[reportArgumentType]
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in the folder.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Default: one a core, or a GPU.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each worker.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Run on Ray: local, auto or ray://HOST:PORT.")] = None,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Search a mirror map that trains better, and compare it with the first on unseen problems."""
    path, changes = recipe_file(recipe), check_overrides(overrides)
    from mirrorpo.config.search import EvolveRecipe
    from mirrorpo.config.train import load_recipe
    from mirrorpo.interrupts import go_on_with, quiet, stops_at_once

    loaded = load_recipe(path, changes, EvolveRecipe, output.files_and_folder(out, resume))
    typed = output.typed()
    with stops_at_once(lambda: go_on_with(typed, out / "recipe.yaml")):
        quiet()
        from mirrorpo.search.evolve_run import run, sentences

        summary = run(loaded, out, resume, workers, threads, ray, output.console(), typed)
    output.say(output.as_json(summary) if as_json else sentences(summary, out))
