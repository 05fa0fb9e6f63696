"""Arms side by side on a page: rows of dots and intervals, clouds of points, curves with bands; inline SVG.

As in ``mirrorpo.reports.charts``: positions across are percentages, so letters and strokes keep their size at any
width, and nothing is styled inline. Every mark of an arm carries ``data-arm``: the page's script hides by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

import numpy as np
from markupsafe import Markup
from scipy import stats

from mirrorpo.reports.charts import Curve, Panel, Scale, draw_panel, value_scale
from mirrorpo.reports.templates import plain, shown
from mirrorpo.studies.collection import FinishedRun
from mirrorpo.wording import number

_ROW = 26  # pixels
_CLOUD = 280  # pixels of a cloud's height
_CURVE_POINTS = 150  # a panel of a small multiple is that wide
_NUM_COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm in a figure of rows; ``name`` and the dots' labels are outside text."""

    name: str
    dots: Sequence[tuple[float, str]]  # value, label
    low: float
    high: float
    middle: float
    text: str  # at the end of the row
    colour: int  # the arm's place among all arms
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Runs of one arm as points; ``label`` says what each is. Of a path the point ``mark`` has its number."""

    name: str
    points: Sequence[tuple[float, float, str]]
    mark: int = -1


def draw_rows(title: str, says: str, rows: Sequence[Row], *, line: float | None, share: bool = True) -> Markup:
    """Draw one row for each arm over a common axis.

    Args:
        title: of the figure.
        says: what the reader should look for.
        rows: at least one; ends that are infinite reach the edge.
        line: a value marked over all rows (the baseline's mean, or zero).
        share: label the axis with percentages.

    Returns:
        The figure.

    Example:
        >>> row = Row(name="a", dots=[(0.5, "seed 0")], low=0.4, high=0.6, middle=0.5, text="50 %", colour=0)
        >>> draw_rows("Accuracy", "", [row], line=None).count("<circle")
        1
    """
    values = [value for row in rows for value in (row.low, row.high, row.middle, *(v for v, _ in row.dots))]
    if line is not None:
        values.append(line)
    scale = value_scale([value for value in values if np.isfinite(value)], share=share)
    parts = "".join(_row(row, scale, line) for row in rows)
    ticks = "".join(
        f'<text x="{100 * scale.place(value):.2f}%" y="14" text-anchor="middle">{label}</text>'
        for value, label in scale.ticks
    )
    labels = f'<svg class="area" width="100%" height="18" aria-hidden="true">{ticks}</svg>'
    axis = f'<div class="row axis"><span></span>{labels}<span></span></div>'
    return Markup(
        f'<figure class="panel rows"><figcaption><h3>{escape(title)}</h3><p>{escape(says)}</p></figcaption>'
        f"<div>{parts}{axis}</div></figure>"
    )


def _row(row: Row, scale: Scale, line: float | None) -> str:
    middle, n = _ROW / 2, row.colour
    marks = [
        f'<line class="grid" x1="{100 * scale.place(value):.2f}%" x2="{100 * scale.place(value):.2f}%"'
        f' y1="0" y2="{_ROW}"/>'
        for value, _ in scale.ticks
    ]
    if line is not None:
        at = f"{100 * scale.place(line):.2f}%"
        marks.append(f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="{_ROW}"/>')
    low, high = (min(max(scale.place(end), 0.0), 1.0) if np.isfinite(end) else edge for end, edge in _ends(row))
    marks.append(
        f'<line class="reach {_colour(n)}" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="{middle}" y2="{middle}"/>'
    )
    for value, label in row.dots:
        marks.append(
            f'<circle class="dot {_colour(n)}" cx="{100 * scale.place(value):.2f}%" cy="{middle}" r="3.5">'
            f"<title>{plain(label)}</title></circle>"
        )
    at = f"{100 * scale.place(row.middle):.2f}%"
    marks.append(f'<line class="mean {_colour(n)}" x1="{at}" x2="{at}" y1="4" y2="{_ROW - 4}"/>')
    text = f"<strong>{row.text}</strong>" if row.strong else row.text
    return (
        f'<div class="row" data-arm="{plain(row.name)}"><span class="arm">{shown(row.name)}</span>'
        f'<svg class="area" width="100%" height="{_ROW}" role="img" aria-label="{plain(row.name)}: {row.text}">'
        f'{"".join(marks)}</svg><span class="text">{text}</span></div>'
    )


def _ends(row: Row) -> tuple[tuple[float, float], tuple[float, float]]:
    return (row.low, 0.0), (row.high, 1.0)


def draw_cloud(
    title: str,
    says: str,
    clouds: Sequence[Cloud],
    *,
    across: str,
    up: str,
    across_log: bool = False,
    up_share: bool = True,
    paths: bool = False,
) -> Markup:
    """Draw runs as points, or arms as paths, over two axes; arms are numbered as in the table.

    Args:
        title: of the figure.
        says: what the reader should look for.
        clouds: one for each arm, in the table's order; some may be empty.
        across: what the horizontal axis shows.
        up: what the vertical axis shows.
        across_log: a logarithmic horizontal axis where the values span decades.
        up_share: label the vertical axis with percentages.
        paths: join the points of an arm and number the last, instead of their mean.

    Returns:
        The figure; empty without any point.

    Example:
        >>> str(draw_cloud("", "", [Cloud(name="a", points=[])], across="", up=""))
        ''
    """
    points = [point for cloud in clouds for point in cloud.points]
    if not points:
        return Markup("")
    wide = value_scale([x for x, _, _ in points], may_be_log=across_log)
    high = value_scale([y for _, y, _ in points], share=up_share)
    unfit = sum(not wide.fits(x) for x, _, _ in points)
    marks = "".join(
        (_path if paths else _points)(cloud, n, wide, high) for n, cloud in enumerate(clouds) if cloud.points
    )
    notes = [
        text
        for text, there in (("Logarithmic axis.", wide.log), (f"{unfit:,} points at or near zero.", unfit))
        if there
    ]
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    labels = "".join(
        f'<text x="44" y="{_CLOUD * (1 - high.place(value)) + 4:.1f}" text-anchor="end">{label}</text>'
        for value, label in high.ticks
    )
    return Markup(f"""<figure class="panel cloud"><figcaption><h3>{escape(title)}</h3><p>{escape(says)}</p></figcaption>
<p class="axis-name">{escape(up)}</p>
<div class="chart"><svg class="area" width="52" height="{_CLOUD}" aria-hidden="true">{labels}</svg>
<div class="field"><svg class="area" width="100%" height="{_CLOUD}" role="img"
 aria-label="{escape(up)} against {escape(across)}">
{_lattice(wide, high)}{marks}</svg></div></div><p class="axis-name end">{escape(across)}</p>{note}</figure>""")


def _lattice(wide: Scale, high: Scale) -> str:
    parts = [
        f'<line class="grid" x1="0" x2="100%" y1="{_y(high, value)}" y2="{_y(high, value)}"/>'
        for value, _ in high.ticks
    ]
    for value, label in wide.ticks:
        at = f"{100 * wide.place(value):.2f}%"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{_CLOUD}"/>')
        parts.append(f'<text x="{at}" y="{_CLOUD + 18}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _y(scale: Scale, value: float) -> str:
    return f"{_CLOUD * (1 - scale.place(value)):.1f}"


def _points(cloud: Cloud, n: int, wide: Scale, high: Scale) -> str:
    fitting = [(x, y, label) for x, y, label in cloud.points if wide.fits(x)]
    if not fitting:
        return ""
    parts = [
        f'<circle class="dot {_colour(n)}" cx="{100 * wide.place(x):.2f}%" cy="{_y(high, y)}" r="3.5">'
        f"<title>{plain(label)}</title></circle>"
        for x, y, label in fitting
    ]
    # Halves on the drawn axes: on a logarithmic one the middle of the points is not at their arithmetic mean.
    x = float(np.mean([wide.place(x) for x, _, _ in fitting]))
    y = float(np.mean([_CLOUD * (1 - high.place(y)) for _, y, _ in fitting]))
    return f'<g data-arm="{plain(cloud.name)}">{"".join(parts)}{_badge(cloud.name, n, x, y)}</g>'


def _path(cloud: Cloud, n: int, wide: Scale, high: Scale) -> str:
    fitting = [(wide.place(x), _CLOUD * (1 - high.place(y))) for x, y, _ in cloud.points if wide.fits(x)]
    if not fitting:
        return ""
    line = "M" + "L".join(f"{1000 * x:.1f} {y:.1f}" for x, y in fitting) + ("h0" if len(fitting) == 1 else "")
    drawn = (
        f'<svg viewBox="0 0 1000 {_CLOUD}" width="100%" height="{_CLOUD}" preserveAspectRatio="none"'
        ' overflow="visible">'
        f'<path class="line {_colour(n)}" d="{line}" vector-effect="non-scaling-stroke"/></svg>'
    )
    badge = _badge(cloud.name, n, *fitting[min(cloud.mark, len(fitting) - 1)])
    return f'<g data-arm="{plain(cloud.name)}">{drawn}{badge}</g>'


def _badge(name: str, n: int, x: float, y: float) -> str:
    """The arm's number in the table."""
    return (
        f'<circle class="badge {_colour(n)}" cx="{100 * x:.2f}%" cy="{y:.1f}" r="9">'
        f"<title>{plain(name)}</title></circle>"
        f'<text class="badge" x="{100 * x:.2f}%" y="{y + 4:.1f}" text-anchor="middle">{n + 1}</text>'
    )


def _colour(n: int) -> str:
    return f"c{n % _NUM_COLOURS}"


def learning_curve(runs: Sequence[FinishedRun], column: str) -> dict[int, tuple[float, float, float]]:
    """Step to mean over seeds and its pointwise 95 % band (Student's t; no width for one seed).

    Values that never leave [0, 1] are taken as shares: their band does not leave it either.

    Args:
        runs: of one arm.
        column: of ``metrics.jsonl``.

    Returns:
        Only steps at which some run has a value.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        values = run.metrics.columns.get(column, ())
        for step, value in zip(run.metrics.steps, values, strict=bool(values)):
            if value is not None:
                found.setdefault(step, []).append(value)
    flat = [value for values in found.values() for value in values]
    low, high = (0.0, 1.0) if flat and min(flat) >= 0.0 and max(flat) <= 1.0 else (-math.inf, math.inf)
    curve = {}
    for step in sorted(found):
        values = np.array(found[step])
        reach = 0.0
        if len(values) > 1:
            reach = _student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
        mean = float(values.mean())
        curve[step] = (mean, max(low, mean - reach), min(high, mean + reach))
    return curve


@lru_cache
def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of t: one for each number of seeds, not one for each step."""
    return float(stats.t.ppf(0.975, freedom))


def draw_curves(arms: Mapping[str, Sequence[FinishedRun]], baseline: str) -> Markup:
    """One panel for each arm with the baseline in it; with few arms, one panel with all of them first."""
    curves = {name: learning_curve(runs, "reward") for name, runs in arms.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return Markup('<p class="note">No run recorded its reward.</p>')
    parts = []
    if len(curves) <= _NUM_COLOURS:
        parts.append(_panel("All arms", curves, list(curves), bands=False, attributes=""))
    for name in curves:
        if name != baseline:
            pair = [baseline, name] if baseline in curves else [name]
            parts.append(_panel(name, curves, pair, bands=True, attributes=f' data-arm="{plain(name)}"'))
    return Markup(f'<div class="panels">{"".join(parts)}</div>')


def _panel(
    title: str,
    curves: Mapping[str, Mapping[int, tuple[float, float, float]]],
    names: list[str],
    *,
    bands: bool,
    attributes: str,
) -> str:
    steps = sorted({step for name in names for step in curves[name]})
    drawn = []
    for name in names:
        rows = [curves[name].get(step) for step in steps]
        sides = tuple([None if row is None else row[side] for row in rows] for side in (1, 2))
        wide = bands and any(row is not None and row[2] > row[1] for row in rows)
        drawn.append(
            Curve(
                label=name,
                values=[None if row is None else row[0] for row in rows],
                band=(sides[0], sides[1]) if wide else None,
            )
        )
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in title)
    says = "Mean reward of each step's rollouts over the seeds" + ("; bands: 95 %, pointwise." if bands else ".")
    return draw_panel(
        Panel(title=printable, says=says, curves=tuple(drawn)), steps, limit=_CURVE_POINTS, attributes=attributes
    )


def label_of(run: FinishedRun) -> str:
    """What a point is."""
    return f"{run.arm}, seed {run.seed}: {number(100 * run.accuracy)} %"


__all__ = ["Cloud", "Row", "draw_cloud", "draw_curves", "draw_rows", "label_of", "learning_curve"]
