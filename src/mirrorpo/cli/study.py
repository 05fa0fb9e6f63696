"""``mirrorpo study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.cli.output import OVERRIDES, check_overrides, recipe_file
from mirrorpo.errors import InputError


def command(
    file: Annotated[str, typer.Argument(help="A study file, or the name of one that is shipped (studies/embedded).")],
    overrides: OVERRIDES = None,
    out: Annotated[Path | None, typer.Option("--out", help="The study's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study in the folder; repeats no run.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="With --resume: try failed runs again.")] = False,
    redo: Annotated[
        list[str] | None, typer.Option("--redo", metavar="ARM/SEED", help="With --resume: run this one again.")
    ] = None,
    exports: output.EXPORT = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time two steps; say how many runs, how long.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Runs side by side.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each worker; else cores divided.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Run on Ray: local, auto or an address.")] = None,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Compare objectives (or any recipe keys) over seeds: run the grid, then report with statistics that hold up."""
    if retry_failed and not resume:
        raise InputError("--retry-failed: needs --resume")
    if redo and not resume:
        raise InputError("--redo: needs --resume")
    again, formats = [output.run_name(one) for one in redo or ()], output.export_formats(exports)
    if out is None and not dry_run:
        raise InputError("--out: missing; give the study's folder, or --dry-run to see how long it takes")
    path, changes = recipe_file(file), check_overrides(overrides)
    from mirrorpo.config.study import load_study
    from mirrorpo.interrupts import go_on_with, quiet, stops_at_once
    from mirrorpo.runs.folder import STUDY, check_place

    if out is not None and not dry_run:
        check_place(out, STUDY, resume)
    loaded = load_study(path, changes)
    from mirrorpo.cli import study_commands as commands

    quiet()
    typed = output.typed()
    if out is None or dry_run:
        with stops_at_once(lambda: f"start again with: {typed}"):
            plan = commands.dry_run(loaded, out, workers, threads, ray, output.console())
        output.say(output.as_json(plan) if as_json else commands.plan_in_words(plan))
        return
    with stops_at_once(lambda: go_on_with(typed, out / "study.yaml")):
        found = commands.study(
            loaded,
            out,
            output.console(),
            resume=resume,
            retry_failed=retry_failed,
            redo=again,
            exports=formats,
            workers=workers,
            threads=threads,
            ray=ray,
            command=typed,
        )
    output.say(output.as_json(found.numbers) if as_json else "\n".join((found.headline, *found.arms, *found.written)))
    if found.nothing_finished:
        raise typer.Exit(1)
