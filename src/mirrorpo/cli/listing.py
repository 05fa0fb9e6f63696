"""What can be chosen? The tables behind ``mirrorpo list``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirrorpo._checks import unknown_name
from mirrorpo.config.shipped import shipped_recipes
from mirrorpo.divergences import DIVERGENCES
from mirrorpo.errors import InputError
from mirrorpo.losses.presets import PRESETS
from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS

Rows = list[dict[str, str]]
_MAX_NARROW_COLUMNS, _WIDE = 5, 140


def _divergences() -> Rows:
    return [
        {
            "name": name,
            "family": entry.family,
            "formula": entry.formula,
            "options": ", ".join((*entry.options, *entry.optional)),
            "source": entry.source,
        }
        for name, entry in DIVERGENCES.items()
    ]


def _regions() -> Rows:
    rows = [
        {"name": name, "constraint": entry.constraint, "options": ", ".join(entry.options), "source": entry.source}
        for name, entry in REGIONS.items()
    ]
    for name in DIVERGENCE_REGIONS:
        entry = DIVERGENCES[name]
        if name in REGIONS:
            continue
        constraint = "d(p_y, b_y) <= radius" if entry.family == "bregman" else "f(w) - f'(1)(w - 1) <= radius"
        rows.append(
            {
                "name": name,
                "constraint": f"{constraint}, {entry.formula}",
                "options": ", ".join(("radius", *entry.options, *entry.optional)),
                "source": entry.source,
            }
        )
    return rows


def _objectives() -> Rows:
    rows = []
    for name, preset in PRESETS.items():
        region, options = preset.region
        numbers = ", ".join(f"{key.removeprefix('epsilon_')} {value:g}" for key, value in options.items())
        rows.append(
            {
                "name": name,
                "region": f"{region} ({numbers})" if numbers else region,
                "penalty": " + ".join(f"{c:g} {_divergence_name(d)}" for d, c in preset.penalties) or "none",
                "surrogate": preset.surrogate,
                "level": preset.level,
                "advantage": preset.advantage,
                "aggregation": preset.aggregation,
                "source": preset.source,
            }
        )
    return rows


def _divergence_name(chosen: str | Mapping[str, Any]) -> str:
    if isinstance(chosen, str):
        return chosen
    options = ", ".join(f"{key} {value}" for key, value in chosen.items() if key != "name")
    return f"{chosen['name']} ({options})"


def _tasks() -> Rows:
    from mirrorpo.tasks import TASKS

    return [{"name": name, "what": entry.summary} for name, entry in TASKS.items()]


def _recipes() -> Rows:
    rows = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append({"name": name, "what": first.lstrip("# ") if first.startswith("#") else ""})
    return rows


LISTINGS = {
    "divergences": _divergences,
    "regions": _regions,
    "objectives": _objectives,
    "tasks": _tasks,
    "recipes": _recipes,
}


def listing(what: str) -> Rows:
    """The rows of a table.

    Raises:
        InputError: no such table.
    """
    if what not in LISTINGS:
        raise InputError(str(unknown_name("list", what, LISTINGS)))
    return LISTINGS[what]()


def render(what: str, rows: Rows) -> None:
    """Draws the table on stdout; a wide one as paragraphs where the terminal is narrow."""
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
