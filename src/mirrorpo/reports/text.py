"""How do text and numbers reach the page? Escaped, with nothing invisible left in them.

A completion is whatever a model wrote. Besides markup it may hold control characters, zero-width characters and
bidirectional overrides, which show a reader something else than what is there: each is written out as its code point.
"""

from __future__ import annotations

import html

_KEPT = "\n\t"  # not printable by Unicode's book, yet they are layout a reader wants to see as such


def shown(text: str) -> str:
    """Turn any text into HTML that shows exactly that text.

    Args:
        text: anything, lone surrogates included.

    Returns:
        Safe HTML for element content; each character that would be invisible is `<b>U+XXXX</b>`.

    Example:
        >>> shown("<i>\\u202e")
        '&lt;i&gt;<b>U+202E</b>'
    """
    return "".join(f"<b>{escaped}</b>" if odd else escaped for odd, escaped in _runs(text))


def plain(text: str) -> str:
    """Turn any text into escaped text without markup: for attributes and the title.

    Args:
        text: anything, lone surrogates included.

    Returns:
        Safe HTML for an attribute in double quotes or for a title; invisible characters are `[U+XXXX]`.

    Example:
        >>> plain('"\\x1b"')
        '&quot;[U+001B]&quot;'
    """
    return "".join(f"[{escaped}]" if odd else escaped for odd, escaped in _runs(text))


def cut(text: str, limit: int) -> tuple[str, str]:
    """Cut long text, and say so.

    Args:
        text: anything.
        limit: how many characters may stay.

    Returns:
        The text that stays, and a note that is empty when all of it does.

    Example:
        >>> cut("abcdef", 4)
        ('abcd', 'cut here: 4 of 6 characters shown')
    """
    if len(text) <= limit:
        return text, ""
    return text[:limit], f"cut here: {limit:,} of {len(text):,} characters shown"


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


def _runs(text: str) -> list[tuple[bool, str]]:
    """Stretches of the text, escaped; True marks those that stand for invisible characters."""
    runs: list[tuple[bool, str]] = []
    ordinary: list[str] = []
    for character in text:
        # Whatever Unicode calls Other or Separator, the plain space excepted: controls, formats, surrogates, ...
        if character.isprintable() or character in _KEPT:
            ordinary.append(character)
            continue
        if ordinary:
            runs.append((False, html.escape("".join(ordinary))))
            ordinary.clear()
        runs.append((True, f"U+{ord(character):04X}"))
    if ordinary:
        runs.append((False, html.escape("".join(ordinary))))
    return runs


def _trimmed(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
