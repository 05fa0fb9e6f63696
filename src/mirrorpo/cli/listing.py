"""``mirrorpo list``: the names that recipes and functions take."""

from __future__ import annotations

from typing import Annotated

import typer

from mirrorpo.cli import catalogue, output
from mirrorpo.cli.catalogue import Rows
from mirrorpo.errors import InputError

_MAX_NARROW_COLUMNS, _WIDE = 5, 140
TABLES = (
    "divergences",
    "regions",
    "objectives",
    "estimators",
    "surrogates",
    "anchors",
    "advantages",
    "aggregations",
    "tasks",
    "recipes",
)


def listing(what: str) -> Rows:
    """The rows of a table.

    Raises:
        InputError: no such table.

    Example:
        >>> [row["name"] for row in listing("aggregations")][:2]
        ['sequence_mean', 'token_mean']
    """
    if what not in TABLES:
        import difflib

        near = difflib.get_close_matches(what, TABLES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"unknown list {what!r}{hint} Legal: {', '.join(TABLES)}")
    if what == "recipes":
        return _recipes()
    return [*catalogue.read()[what], *_plugins(what)]


def _recipes() -> Rows:
    from mirrorpo.config.shipped import shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append({"name": name, "what": first.lstrip("# ") if first.startswith("#") else ""})
    return rows


def _plugins(what: str) -> Rows:
    """What installed packages add; none of their code is run."""
    from importlib.metadata import entry_points

    points = entry_points(group=f"mirrorpo.{what}")
    package = [point.dist.name if point.dist else "an installed package" for point in points]
    if what == "tasks":
        return [{"name": p.name, "what": f"{p.value} of {name}"} for p, name in zip(points, package, strict=True)]
    return [
        {"name": p.name, "family": "plugin", "formula": p.value, "options": "", "source": name}
        for p, name in zip(points, package, strict=True)
    ]


def render(what: str, rows: Rows) -> None:
    """Draws the table on stdout; a wide one as paragraphs where the terminal is narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if rows and len(rows[0]) > _MAX_NARROW_COLUMNS and console.width < _WIDE:
        for row in rows:
            console.print(Text(row["name"], style="bold"))
            console.print(Text("  " + "; ".join(f"{key} {value}" for key, value in row.items() if key != "name")))
        return
    table = Table(title=what, title_justify="left", pad_edge=False, show_lines=False)
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    console.print(table)


def command(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """The names that recipes and functions take, with formulas and papers."""
    rows = listing(what)
    if as_json:
        output.say(output.as_json(rows))
    else:
        render(what, rows)
