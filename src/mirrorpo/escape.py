"""How does outside text reach a terminal, a table or a log? With everything that is not plainly seen written out.

A completion, or an error that quotes one, may hold escape sequences that a terminal obeys, carriage returns that
overwrite a line, line ends that forge one, and bidirectional overrides that show another text than is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

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


__all__ = ["printable", "printable_lines", "say"]
