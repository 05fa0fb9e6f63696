"""``mirrorpo train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.cli.output import OVERRIDES, check_overrides, files_and_folder, recipe_file
from mirrorpo.errors import InputError


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that is shipped.")],
    overrides: OVERRIDES = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what would run; nothing is written.")] = False,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Train a policy: evaluate, train, evaluate, report."""
    path = recipe_file(recipe)
    changes = check_overrides(overrides)
    if out is None and not plan_only:
        raise InputError("--out: missing; give the run folder, or --plan to see what would run")
    from mirrorpo.config.train import load_recipe
    from mirrorpo.interrupts import quiet
    from mirrorpo.user_code import not_imported

    if plan_only:
        with not_imported("a plan"):
            loaded = load_recipe(path, changes, early=files_and_folder(None))
            quiet()
            from mirrorpo.training.plan import plan, render

            planned = plan(loaded)
        output.say(output.as_json(planned) if as_json else render(planned))
        return
    assert out is not None
    loaded = load_recipe(path, changes, early=files_and_folder(out, resume))
    quiet()
    from mirrorpo.training.distributed import is_main
    from mirrorpo.training.run import train

    summary = train(loaded, out, resume=resume, console=output.console(), command=output.typed())
    if not is_main():
        return
    if as_json:
        output.say(output.as_json(summary))
        return
    if summary["accuracy_after"] is not None:
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        output.say(f"accuracy {before:.3f} -> {after:.3f} on {summary['problems']} unseen problems")
        output.say(f"mean length {summary['mean_length_before']:.1f} -> {summary['mean_length_after']:.1f} tokens")
    output.say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; report: {out / 'report.html'}")
