"""``mirrorpo doctor``."""

from __future__ import annotations

import typer

from mirrorpo.cli import output


def command(as_json: output.JSON = False, _quiet: output.QUIET = False, _debug: output.DEBUG = False) -> None:
    """What this machine has, and what of it is outside the tested range."""
    from mirrorpo.cli.machine import examine, render

    findings = examine()
    if as_json:
        output.say(output.as_json(findings))
    else:
        render(findings)
    if any(finding["state"] == "bad" for finding in findings):
        raise typer.Exit(1)
