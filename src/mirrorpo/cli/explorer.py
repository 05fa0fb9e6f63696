"""``mirrorpo explorer``: the page with a slider for every divergence and region, shipped with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.errors import RunError

_PAGES = (Path(__file__).parents[1] / "_docs", Path(__file__).resolve().parents[3] / "docs")


def page(name: str) -> Path:
    """A page of the documentation: beside the package when it is installed, in ``docs`` of a checkout.

    Raises:
        RunError: the installation has no such page.
    """
    for folder in _PAGES:
        if (folder / name).is_file():
            return folder / name
    raise RunError(f"{name}: this installation has no such page (looked in {_PAGES[0]})")


def command(
    no_open: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """See what each divergence, estimator and region does: sliders and curves in a browser, no network."""
    address = page("explorer.html").as_uri()
    output.say(output.as_json({"page": address}) if as_json else address)
    if no_open or as_json or not sys.stdout.isatty():
        return
    import webbrowser

    if not webbrowser.open(address):
        output.console().print("no browser found: open the address above in one", highlight=False)
