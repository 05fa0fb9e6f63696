"""``mirrorpo report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.errors import InputError
from mirrorpo.runs.folder import is_run, is_study


def command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders and study folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Compare all of them in one report, written here.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="With --out: the arm to compare with.")] = None,
    target: Annotated[float | None, typer.Option("--target", help="With --out: reward whose step is told.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed-versions", help="Compare runs of different versions.")] = False,
    exports: output.EXPORT = None,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Draw the reports of runs and studies again, finished or not; with --out, compare them all in one."""
    _check(folders, out, baseline, target)
    formats = output.export_formats(exports)
    from mirrorpo.cli import study_commands as commands
    from mirrorpo.user_code import not_imported

    with not_imported("a report"):
        written = commands.report(folders, out, baseline=baseline, target=target, allow_mixed=mixed, exports=formats)
    output.say(output.as_json(written) if as_json else "\n".join(written))
    if out is None and len(folders) > 1:
        output.console().print("--out DIR compares them in one report", highlight=False)


def _check(folders: list[Path], out: Path | None, baseline: str | None, target: float | None) -> None:
    """Whatever can be said of the arguments before anything is read."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the --out folder of a run or a study")
    if out is None:
        for name, value in (("baseline", baseline), ("target", target)):
            if value is not None:
                raise InputError(f"--{name}: has no effect without --out, which compares the folders in one report")
    elif out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder")
    elif is_run(out) or is_study(out):
        raise InputError(f"--out {out}: holds a run or a study of its own; give another folder")
    if target is not None and not target > 0:
        raise InputError(f"--target {target}: must be greater than 0")
    for folder in folders:
        if not is_study(folder) and not is_run(folder):
            raise InputError(f"{folder}: is neither a run folder nor a study folder")
