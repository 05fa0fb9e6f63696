"""Numbers, shares, durations and counts as a reader wants them.

How does outside text reach a terminal, a table or a log? With everything that is not plainly seen written out.

A completion, or an error that quotes one, may hold escape sequences that a terminal obeys, carriage returns that
overwrite a line, line ends that forge one, and bidirectional overrides that show another text than is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def number(value: float | None) -> str:
    """Format a number for reading: four significant digits.

    Args:
        value: the number, or None where there is none.

    Returns:
        Short text; an en dash for None.

    Example:
        >>> number(0.97265), number(0.0000312), number(26.0), number(12345.6), number(None)
        ('0.9727', '3.12e-5', '26', '12,346', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{_trimmed(mantissa)}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - _exponent(value))
    return _trimmed(f"{value:.{digits}f}")


def percent(share: float) -> str:
    """Format a share of one as a percentage with one decimal.

    Args:
        share: 0.381 for 38.1 %.

    Returns:
        Text with a no-break space before the sign.

    Example:
        >>> percent(0.381).replace(chr(160), " ")
        '38.1 %'
    """
    return f"{100 * share:.1f}\u00a0%"


def interval_words(interval: tuple[float, float] | None) -> str:
    """Write an interval as percentages.

    Args:
        interval: low and high share, or None.

    Returns:
        For example "33.9–42.4 %"; empty for None.

    Example:
        >>> interval_words((0.339, 0.424)).replace(chr(160), " ")
        '33.9–42.4 %'
    """
    return "" if interval is None else f"{100 * interval[0]:.1f}–{percent(interval[1])}"


def duration(seconds: float) -> str:
    """Format a length of time with its two largest units.

    Args:
        seconds: not negative.

    Returns:
        Text with no-break spaces.

    Example:
        >>> duration(61.2).replace(chr(160), " "), duration(3725).replace(chr(160), " ")
        ('61.2 s', '1 h 2 min')
    """
    if seconds < 120:
        return f"{_trimmed(f'{seconds:.1f}')}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h\u00a0{minutes}\u00a0min"


def plural(count: int, noun: str) -> str:
    """Count something in words.

    Args:
        count: how many.
        noun: the singular; its plural adds an s.

    Returns:
        The number and the noun.

    Example:
        >>> plural(1, "step"), plural(2000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """Three significant digits: more would be noise.

    Example:
        >>> three_digits(0.0123456), three_digits(1234.0)
        ('0.0123', '1,230')
    """
    return number(float(f"{value:.3g}"))


def signed(value: float) -> str:
    """Three digits behind a sign, which is a minus, not a hyphen.

    Example:
        >>> signed(0.5), signed(-2.0) == "\N{MINUS SIGN}2"
        ('+0.5', True)
    """
    return ("+" if value > 0 else "\u2212" if value < 0 else "") + three_digits(abs(value))


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


_NO_BREAK_SPACE = "\u00a0"


def printable(text: str) -> str:
    """Outside text on one line, each character that would be invisible, or do something, written as its code point.

    Args:
        text: anything, lone surrogates included.

    Example:
        >>> printable("a\\x1b[31m\\n")
        'a[U+001B][31m[U+000A]'
    """
    return "".join(c if c.isprintable() or c == _NO_BREAK_SPACE else f"[U+{ord(c):04X}]" for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines, whose line ends are ours.

    Example:
        >>> printable_lines("a\\x07\\nb")
        'a[U+0007]\\nb'
    """
    return "\n".join(printable(line) for line in text.split("\n"))


def say(console: Console, line: str) -> None:
    """Prints one line as it is: no markup, no colours of rich's own, no wrapping."""
    console.print(printable(line), markup=False, highlight=False, emoji=False, soft_wrap=True)


__all__ = [
    "duration",
    "interval_words",
    "number",
    "percent",
    "plural",
    "printable",
    "printable_lines",
    "say",
    "signed",
    "three_digits",
]
