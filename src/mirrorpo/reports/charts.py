"""Curves on a page: inline SVG at a fixed height and any width.

The drawing area stretches with the page (`preserveAspectRatio="none"`), the strokes and letters do not: positions of
letters are percentages, strokes are non-scaling. So a chart is as crisp and as readable on a phone as on a desk.
Nothing is styled inline (the page's policy forbids it): colours come from the classes `c0`, `c1`, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from mirrorpo.reports.scales import Scale, Values, step_scale, thin, unbroken, value_scale
from mirrorpo.reports.templates import plain, shown
from mirrorpo.runs.reader import Evaluation
from mirrorpo.wording import interval_words, number, percent

MAX_POINTS = 600  # points a panel draws; about one per pixel

_HEIGHT = 168  # pixels of the drawing area
_WIDTH = 1000  # its own units, stretched to what the page gives
_DENSE = 300  # points from which a line is drawn thin, or its noise would be one broad band
_NUM_COLOURS = 6  # report.css defines c0 ... c5; further curves repeat them dashed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel, and a band around it if there is one.

    `label` may hold outside text; `values` and both sides of `band` have one entry for every step.
    """

    label: str
    values: Values
    band: tuple[Values, Values] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that share both axes."""

    title: str
    says: str  # one sentence: what the reader should look for
    curves: tuple[Curve, ...]
    may_be_log: bool = False
    share: bool = False  # values are shares of one, shown as percentages


def draw_panel(panel: Panel, steps: Sequence[int], *, limit: int = MAX_POINTS, attributes: str = "") -> Markup:
    """Draw a panel as an HTML figure.

    Args:
        panel: its curves; each has a value or None for each step, and at least one has a value.
        steps: increasing, at least one.
        limit: points that are drawn.
        attributes: more of the figure's own, escaped.

    Returns:
        The figure: title, legend, axes, curves, and what the pointer shows (for report.js) as data attributes.

    Example:
        >>> panel = Panel(title="Reward", says="", curves=(Curve(label="mean", values=(0.2, 0.4)),))
        >>> "<figure" in draw_panel(panel, (1, 2))
        True
    """
    present = [value for curve in panel.curves for value in curve.values if value is not None]
    sides = [side for curve in panel.curves if curve.band for side in curve.band]
    across = step_scale(steps)
    up = value_scale(
        [*present, *(value for side in sides for value in side if value is not None)],
        may_be_log=panel.may_be_log,
        share=panel.share,
    )
    # What this axis cannot show is missing for the drawing, though not for the caption.
    drawable = [[value if up.fits(value) else None for value in curve.values] for curve in panel.curves]
    kept = thin(drawable, limit)
    places = [across.place(step) for step in steps]
    bands = "".join(_band(curve.band, n, kept, places, up) for n, curve in enumerate(panel.curves) if curve.band)
    lines = bands + "".join(
        _line(curve, values, n, kept, places, up, share=panel.share)
        for n, (curve, values) in enumerate(zip(panel.curves, drawable, strict=True))
    )
    num_unfit = sum(not up.fits(value) for value in present)
    notes = ["logarithmic axis"] if up.log else []
    if num_unfit:
        notes.append(f"{num_unfit:,} of {len(present):,} values are at or near zero, below the axis")
    note = f'<p class="note">{escape("; ".join(notes).capitalize())}.</p>' if notes else ""
    kept_steps = ",".join(str(steps[i]) for i in kept)
    axis = f'data-from="{across.low!r}" data-to="{across.high!r}" data-low="{up.low!r}" data-high="{up.high!r}"'
    return Markup(f"""<figure class="panel"{attributes}>
<figcaption><h3>{escape(panel.title)}</h3>{_legend(panel)}<p>{escape(panel.says)}</p></figcaption>
<div class="chart">
{_value_labels(up)}
<div class="plot" tabindex="0" role="img" aria-label="{_summary(panel)}" data-steps="{kept_steps}" {axis}\
 data-log="{int(up.log)}">
<svg class="area" width="100%" height="{_HEIGHT}" aria-hidden="true">{_grid(up)}
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" height="{_HEIGHT}" preserveAspectRatio="none" overflow="visible">
{lines}</svg>{_step_labels(across)}</svg>
</div></div>{note}
</figure>""")


def draw_before_after(before: Evaluation, after: Evaluation) -> Markup:
    """Draw two accuracies with their intervals on one axis from 0 to 100 %.

    Args:
        before: the evaluation of the untrained policy.
        after: that of the trained one; either accuracy may be None.

    Returns:
        The figure.

    Example:
        >>> half = Evaluation(accuracy=0.5, interval=(0.4, 0.6), mean_length=None, reasons={})
        >>> draw_before_after(half, half).count('class="value')
        2
    """
    row, gap = 48, 18  # the row's height is that of .names in report.css
    height = 2 * row
    names, marks = [], []
    for n, (name, evaluation) in enumerate((("Before", before), ("After", after))):
        middle = n * row + row // 2
        value = "not measured" if evaluation.accuracy is None else percent(evaluation.accuracy)
        interval = f"<small>{interval_words(evaluation.interval)}</small>" if evaluation.interval else ""
        names.append(f'<div class="{name.lower()}"><span>{name}</span> <strong>{value}</strong> {interval}</div>')
        if evaluation.interval is not None:
            low, high = (f"{100 * end:.2f}%" for end in evaluation.interval)
            marks.append(f'<line class="whisker {name.lower()}" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        if evaluation.accuracy is not None:
            at = f"{100 * evaluation.accuracy:.2f}%"
            ends = f'y1="{middle - 13}" y2="{middle + 13}"'
            marks.append(f'<line class="value {name.lower()}" x1="{at}" x2="{at}" {ends}/>')
    grid = "".join(
        f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{height}"/>'
        f'<text x="{x}%" y="{height + gap}" text-anchor="middle">{x}%</text>'
        for x in (0, 25, 50, 75, 100)
    )
    return Markup(f"""<figure class="before-after">
<div class="names">{"".join(names)}</div>
<svg class="area" width="100%" height="{height}" role="img" aria-label="Both accuracies with their 95 % intervals">
{grid}{"".join(marks)}</svg>
</figure>""")


def _line(
    curve: Curve, values: Values, n: int, kept: Sequence[int], places: Sequence[float], up: Scale, *, share: bool
) -> str:
    """One curve: `values` are those that can be drawn, `curve.values` those that the pointer shows."""
    stretches = unbroken(values, kept)
    parts = []
    for stretch in stretches:
        points = [_point(places[i], up.place(value)) for i in stretch if (value := values[i]) is not None]
        # A point between two gaps is a line of no length, which the round cap makes a dot.
        parts.append("M" + "L".join(points) + ("h0" if len(points) == 1 else ""))
    factor, unit = (100, "%") if share else (1, "")
    texts = ("" if (value := curve.values[i]) is None else number(factor * value).replace(",", "") for i in kept)
    lone = " dots" if all(len(stretch) == 1 for stretch in stretches) else " dense" if len(kept) > _DENSE else ""
    return (
        f'<path class="line {_colour(n)}{lone}" d="{"".join(parts)}" vector-effect="non-scaling-stroke"'
        f' data-label="{plain(curve.label)}" data-unit="{unit}" data-values="{",".join(texts)}"/>\n'
    )


def _band(band: tuple[Values, Values], n: int, kept: Sequence[int], places: Sequence[float], up: Scale) -> str:
    """The area between two sides, where both have a value that this axis can show."""
    low, high = band
    both = [a if up.fits(a) and up.fits(b) else None for a, b in zip(low, high, strict=True)]
    parts = []
    for stretch in unbroken(both, kept):
        ends = [(i, low[i], high[i]) for i in stretch]
        there = [_point(places[i], up.place(value)) for i, _, value in ends if value is not None]
        back = [_point(places[i], up.place(value)) for i, value, _ in reversed(ends) if value is not None]
        parts.append("M" + "L".join(there + back) + "Z")
    return f'<path class="band {_colour(n)}" d="{"".join(parts)}"/>\n'


def _point(across: float, up: float) -> str:
    return f"{_WIDTH * across:.1f} {_HEIGHT * (1 - up):.1f}"


def _colour(n: int) -> str:
    return f"c{n % _NUM_COLOURS}" + (" dashed" if n >= _NUM_COLOURS else "")


def _legend(panel: Panel) -> str:
    if len(panel.curves) == 1 and not panel.curves[0].label:
        return ""
    keys = "".join(
        f'<li><svg width="22" height="8" aria-hidden="true"><path class="line {_colour(n)}" d="M2 4H20"/></svg>'
        f"{shown(curve.label)}</li>"
        for n, curve in enumerate(panel.curves)
    )
    return f'<ul class="legend">{keys}</ul>'


def _grid(up: Scale) -> str:
    lines = []
    for value, _ in up.ticks:
        y = round(_HEIGHT * (1 - up.place(value))) + 0.5
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
    return "".join(lines)


def _value_labels(up: Scale) -> str:
    letters = max(len(label) for _, label in up.ticks)
    width = 10 + 7 * letters
    texts = "".join(
        f'<text x="{width - 8}" y="{_HEIGHT * (1 - up.place(value)) + 4:.1f}" text-anchor="end">{label}</text>'
        for value, label in up.ticks
    )
    return f'<svg class="area" width="{width}" height="{_HEIGHT}" aria-hidden="true">{texts}</svg>'


def _step_labels(across: Scale) -> str:
    texts = []
    for value, label in across.ticks:
        place = across.place(value)
        anchor = "end" if place > 0.97 else "middle"  # a label at the right end stays inside the card
        texts.append(f'<text x="{100 * place:.2f}%" y="{_HEIGHT + 18}" text-anchor="{anchor}">{label}</text>')
    return "".join(texts)


def _summary(panel: Panel) -> str:
    """What the chart says, for a reader who cannot see it."""
    factor, unit = (100, " %") if panel.share else (1, "")
    parts = []
    for curve in panel.curves:
        values = [factor * value for value in curve.values if value is not None]
        if values:
            first, last, low, high = (
                number(value) + unit for value in (values[0], values[-1], min(values), max(values))
            )
            name = f"{plain(curve.label)}: " if curve.label else ""
            parts.append(f"{name}first {first}, last {last}, lowest {low}, highest {high}")
    return f"{escape(panel.title)} over steps. {'; '.join(parts)}"
