"""``mirrorpo docs`` and ``mirrorpo explorer``: the pages that are shipped with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mirrorpo.cli import output
from mirrorpo.errors import InputError, RunError, unknown_name

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


def pages() -> dict[str, Path]:
    """Name, such as ``choosing`` or ``howto/trl``, to file of every page in Markdown."""
    folder = page("rewards.md").parent
    left_out = ("index", "api", "changelog", "explore")  # of the site alone
    files = [*folder.glob("*.md"), *(folder / "howto").glob("*.md"), *(folder / "evidence").glob("*.md")]
    named = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {name: named[name] for name in sorted(named) if name not in left_out}


def docs(
    name: Annotated[str | None, typer.Argument(metavar="PAGE", help="A page to print; without it, all names.")] = None,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Read the documentation: the names of its pages, or one page as Markdown."""
    found = pages()
    if name is None:
        titles = {one: _title(file) for one, file in found.items()}
        rows = [{"page": one, "title": title, "file": str(found[one])} for one, title in titles.items()]
        width = max(map(len, titles))
        output.say(output.as_json(rows) if as_json else "\n".join(f"{n:<{width}}  {t}" for n, t in titles.items()))
        return
    short = [one for one in found if one.rpartition("/")[2] == name]
    name = name.removesuffix(".md") if name.removesuffix(".md") in found else "".join(short) or name
    if name not in found:
        raise InputError(str(unknown_name("page", name, found)))
    text = found[name].read_text(encoding="utf-8")
    output.say(output.as_json({"page": name, "file": str(found[name]), "text": text}) if as_json else text.rstrip())


def _title(file: Path) -> str:
    """The first heading."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), file.stem)


def explorer(
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
