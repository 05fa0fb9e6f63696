"""Curves on a page: inline SVG at a fixed height and any width, and the arithmetic of their axes.

The drawing area stretches with the page (`preserveAspectRatio="none"`), the strokes and letters do not: positions of
letters are percentages, strokes are non-scaling. So a chart is as crisp and as readable on a phone as on a desk.
Nothing is styled inline (the page's policy forbids it): colours come from the classes `c0`, `c1`, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from mirrorpo.reports.templates import plain, shown
from mirrorpo.runs.reader import Evaluation
from mirrorpo.wording import interval_words, number, percent

Values = Sequence[float | None]

_LOG_SPAN = 100.0  # two decades: below that a linear axis shows more
_LOG_MISSING = 0.25  # at most this share of the values may be unfit (<= 0) for a logarithmic axis
_LOG_DEPTH = 1e-8  # a logarithmic axis ends here below its highest value: what is under it is rounding noise
_CONSTANT = 1e-9  # a span this small relative to the values is rounding, not change
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A map from values to [0, 1], linear or logarithmic, and its labelled values."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """The position of `value`; 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def fits(self, value: float | None) -> bool:
        """Whether there is a value, and this axis can show it."""
        return value is not None and (value >= self.low or not self.log)


def value_scale(values: Sequence[float], *, may_be_log: bool = False, share: bool = False) -> Scale:
    """Choose the vertical axis for some values.

    Args:
        values: what will be drawn; empty and constant are fine.
        may_be_log: take a logarithmic axis when positive values span two decades and few are not positive.
        share: the values are shares of one, labelled as percentages.

    Returns:
        A scale that ends on labelled values and starts at zero when zero is near.

    Example:
        >>> [label for _, label in value_scale([0.02, 0.97]).ticks]
        ['0', '0.2', '0.4', '0.6', '0.8', '1']
        >>> [label for _, label in value_scale([1e-5, 2e-2], may_be_log=True).ticks]
        ['10⁻⁵', '10⁻⁴', '10⁻³', '10⁻²', '10⁻¹']
    """
    positive = [value for value in values if value > 0]
    few_unfit = len(values) - len(positive) <= _LOG_MISSING * len(values)
    if may_be_log and few_unfit and positive and max(positive) >= _LOG_SPAN * min(positive):
        return _log_scale(max(min(positive), _LOG_DEPTH * max(positive)), max(positive))
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= _CONSTANT * max(abs(low), abs(high)):
        low, high = _around(high, share=share)
    elif 0 <= low < 0.6 * high:
        low = 0.0
    step = nice_step(high - low, target=4)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return Scale(
        low=first * step,
        high=last * step,
        ticks=tuple((n * step, tick_label(n * step, step, share=share)) for n in range(first, last + 1)),
    )


def step_scale(steps: Sequence[int]) -> Scale:
    """Choose the horizontal axis.

    Args:
        steps: increasing; a single one is fine.

    Returns:
        A scale from the first to the last step, labelled at whole steps.

    Example:
        >>> [label for _, label in step_scale(range(1, 81)).ticks]
        ['20', '40', '60', '80']
    """
    first, last = steps[0], steps[-1]
    if first == last:
        return Scale(low=first - 0.5, high=first + 0.5, ticks=((float(first), f"{first:,}"),))
    step = max(1, round(nice_step(last - first, target=5)))
    ticks = range(math.ceil(first / step) * step, last + 1, step)
    return Scale(low=float(first), high=float(last), ticks=tuple((float(tick), f"{tick:,}") for tick in ticks))


def nice_step(span: float, *, target: int) -> float:
    """The round distance (1, 2 or 5 times a power of ten) that cuts `span` into about `target` parts.

    Args:
        span: positive.
        target: how many parts are wanted.

    Returns:
        The distance.

    Example:
        >>> nice_step(79, target=4), nice_step(0.95, target=4)
        (20.0, 0.2)
    """
    raw = span / target
    power = math.floor(math.log10(raw))
    for factor in (1, 2, 5):
        # the power of ten as text, because 10.0 ** -3 is not the double nearest to 0.001
        step = float(f"{factor}e{power}")
        if raw <= 1.25 * step:
            return step
    return float(f"1e{power + 1}")


def tick_label(value: float, step: float, *, share: bool = False) -> str:
    """Label a tick with as many digits as its neighbours need.

    Args:
        value: the tick.
        step: the distance between ticks.
        share: label as a percentage.

    Returns:
        Short text.

    Example:
        >>> tick_label(0.25, 0.05), tick_label(0.25, 0.05, share=True), tick_label(2e-7, 1e-7), tick_label(50000, 10000)
        ('0.25', '25%', '2e-7', '50k')
    """
    if share:
        return f"{tick_label(100 * value, 100 * step)}%"
    if abs(value) < 0.5 * step:
        return "0"
    power = math.floor(math.log10(step) + 1e-9)
    if power < -4 or abs(value) >= 1e7:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        mantissa = f"{value / 10.0**exponent:.{max(0, exponent - power)}f}"
        return f"{_trimmed(mantissa)}e{exponent}"
    if abs(value) >= 10_000:
        return f"{_trimmed(f'{value / 1000:.{max(0, 3 - power)}f}')}k"
    return _trimmed(f"{value:.{max(0, -power)}f}")


def thin(series: Sequence[Values], limit: int) -> list[int]:
    """Choose which points of some curves over the same steps are drawn.

    The steps are cut into equal stretches; each keeps, for every curve, its lowest and its highest value. The first
    and the last step stay too. So no peak is lost, and the curves keep common steps.

    Args:
        series: curves of the same length.
        limit: about how many points may stay; shorter curves stay whole.

    Returns:
        The indices that stay, increasing.

    Example:
        >>> thin([[0, 1, 9, 2, 3, -5, 4, 1]], limit=4)  # 0 9 -5 4 1
        [0, 2, 5, 6, 7]
    """
    length = len(series[0])
    if length <= limit:
        return list(range(length))
    stretches = max(1, limit // (2 * len(series)))
    kept = {0, length - 1}
    for n in range(stretches):
        stretch = range(n * length // stretches, (n + 1) * length // stretches)
        for values in series:
            pairs = [(value, i) for i in stretch if (value := values[i]) is not None]
            if pairs:
                kept.update((min(pairs)[1], max(pairs)[1]))
    return sorted(kept)


def unbroken(values: Values, kept: Sequence[int]) -> list[list[int]]:
    """Cut a thinned curve wherever a value is missing, among the points that were dropped too.

    Args:
        values: the whole curve.
        kept: the indices that are drawn.

    Returns:
        Stretches of indices; within one, no value is missing.

    Example:
        >>> unbroken([1, 2, None, 4, 5], [0, 1, 3, 4]), unbroken([1, None, 3], [0, 2])
        ([[0, 1], [3, 4]], [[0], [2]])
    """
    missing_before = [0]
    for value in values:
        missing_before.append(missing_before[-1] + (value is None))
    stretches: list[list[int]] = []
    for index in kept:
        if values[index] is None:
            continue
        if stretches and missing_before[index] == missing_before[stretches[-1][-1]]:
            stretches[-1].append(index)
        else:
            stretches.append([index])
    return stretches


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = max(1, math.ceil((last - first) / 5))
    last += (first - last) % stride  # the top end is labelled as well
    powers = range(first, last + 1, stride)
    return Scale(
        low=10.0**first,
        high=10.0**last,
        log=True,
        ticks=tuple((10.0**power, "10" + str(power).translate(_SUPERSCRIPTS)) for power in powers),
    )


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _around(value: float, *, share: bool) -> tuple[float, float]:
    """Two ends around a constant."""
    if value == 0:
        return 0.0, (0.01 if share else 1.0)
    half = 0.5 * abs(value)
    high = value + half
    return value - half, min(high, 1.0) if share and value <= 1.0 else high


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


def draw_before_after(before: Evaluation, after: Evaluation, name_after: str = "After") -> Markup:
    """Draw two accuracies with their intervals on one axis from 0 to 100 %.

    Args:
        before: the evaluation of the untrained policy.
        after: that of the trained one; either accuracy may be None.
        name_after: what the second is called.

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
    for n, (kind, name, evaluation) in enumerate((("before", "Before", before), ("after", name_after, after))):
        middle = n * row + row // 2
        value = "not measured" if evaluation.accuracy is None else percent(evaluation.accuracy)
        interval = f"<small>{interval_words(evaluation.interval)}</small>" if evaluation.interval else ""
        names.append(f'<div class="{kind}"><span>{name}</span> <strong>{value}</strong> {interval}</div>')
        if evaluation.interval is not None:
            low, high = (f"{100 * end:.2f}%" for end in evaluation.interval)
            marks.append(f'<line class="whisker {kind}" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        if evaluation.accuracy is not None:
            at = f"{100 * evaluation.accuracy:.2f}%"
            ends = f'y1="{middle - 13}" y2="{middle + 13}"'
            marks.append(f'<line class="value {kind}" x1="{at}" x2="{at}" {ends}/>')
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
