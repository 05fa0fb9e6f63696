"""The table of commands. Exit status 0 done, 1 failed, 2 bad input with a one-line reason on stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from mirrorpo.cli import doctor, evaluate, evolve, grade, learn, listing, pages, report, study, train
from mirrorpo.cli.output import DEBUG, QUIET, say

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose how far a language-model policy may move, and from what; train it; prove the choice. "
    "Exit status 0 done, 1 failed, 2 bad input with a one-line reason on stderr.",
)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        say(f"mirrorpo {version('mirrorpo')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    _quiet: QUIET = False,
    _debug: DEBUG = False,
) -> None:
    """Options before the command; ``--quiet`` and ``--debug`` may follow it too."""
    if context.invoked_subcommand is None:
        say(context.get_help())


app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("study")(study.command)
app.command("evolve")(evolve.command)
app.command("learn")(learn.command)
app.command("report")(report.command)
app.command("grade")(grade.command)
app.command("list")(listing.command)
app.command("docs")(pages.docs)
app.command("explorer")(pages.explorer)
app.command("doctor")(doctor.command)

__all__ = ["app"]
