"""Templates of the pages: Jinja2 with autoescape, the filters for outside text, the style sheets and scripts.

A page loads nothing and runs nothing but its own few lines: its Content-Security-Policy forbids every source and names
the hashes of the one style sheet and the one script it carries. Outside text passes through ``shown`` (elements) or
``plain`` (attributes), which also write out what is invisible; autoescape is the second lock, the policy the third.
"""

from __future__ import annotations

import base64
import hashlib
import html
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mirrorpo.wording import duration, number, percent, plural

_KEPT = "\n\t"  # not printable by Unicode's book, yet they are layout a reader wants to see as such
_SCRIPTS = {"run": ("report",), "study": ("report", "study")}


def shown(text: str) -> Markup:
    """Turn any text into HTML that shows exactly that text.

    A completion is whatever a model wrote. Besides markup it may hold control characters, zero-width characters and
    bidirectional overrides, which show a reader something else than what is there: each is written as its code point.

    Args:
        text: anything, lone surrogates included.

    Returns:
        Safe HTML for element content; each character that would be invisible is `<b>U+XXXX</b>`.

    Example:
        >>> str(shown("<i>\\u202e"))
        '&lt;i&gt;<b>U+202E</b>'
    """
    return Markup("").join(Markup(f"<b>{escaped}</b>" if odd else escaped) for odd, escaped in _runs(text))


def plain(text: str) -> Markup:
    """Turn any text into escaped text without markup: for attributes and the title.

    Args:
        text: anything, lone surrogates included.

    Returns:
        Safe HTML for an attribute in double quotes or for a title; invisible characters are `[U+XXXX]`.

    Example:
        >>> str(plain('"\\x1b"'))
        '&quot;[U+001B]&quot;'
    """
    return Markup("").join(Markup(f"[{escaped}]" if odd else escaped) for odd, escaped in _runs(text))


def sentence(text: str) -> Markup:
    """A sentence of ours, which may quote outside text; the no-break spaces in it are layout."""
    return Markup("\u00a0").join(shown(part) for part in text.split("\u00a0"))


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


def source_hash(text: str) -> str:
    """What a Content-Security-Policy calls the source of an inline style or script.

    Args:
        text: between the tags, exactly.

    Example:
        >>> source_hash("")
        'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def render(page: str, **values: Any) -> str:
    """A whole page.

    Args:
        page: ``run`` or ``study``; its template, style sheet and script.
        values: what the template names; text is escaped unless it is ``Markup``.

    Returns:
        HTML.
    """
    style, script = ("".join(_asset(f"{name}.{kind}") for name in _SCRIPTS[page]) for kind in ("css", "js"))
    return _environment().get_template(f"{page}.j2").render(style=Markup(style), script=Markup(script), **values)


def part(name: str, *arguments: Any) -> Markup:
    """A piece of a page, from the macro of that name in ``parts.j2``."""
    return getattr(_environment().get_template("parts.j2").module, name)(*arguments)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("mirrorpo.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "cut": cut, "duration": duration, "number": number, "percent": percent, "plain": plain, "plural": plural,
        "sentence": sentence, "shown": shown, "source_hash": source_hash,
    }  # fmt: skip
    return found


@lru_cache
def _asset(name: str) -> str:
    """The text of a file that lies beside this module."""
    return resources.files("mirrorpo.reports").joinpath(name).read_text(encoding="utf-8")


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


__all__ = ["cut", "part", "plain", "render", "sentence", "shown", "source_hash"]
