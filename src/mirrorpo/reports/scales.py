"""Axes: where a value goes, which values are labelled, and which points of a long curve are drawn.

Pure arithmetic, shared by every chart of the page. Nothing here knows about SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    return value - half, value + half
