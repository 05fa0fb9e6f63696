"""Which number does an answer state? Exact fractions from what people and models write; anything else is no number.

``1,000``, ``$12.50``, ``-3``, ``3/4``, ``1 1/2``, ``\\frac{3}{4}``, ``50%``, ``1.5e3``, ``1.5 \\times 10^{3}``,
``72 clips``, ``5 km/h``, ``2 million``, each with spaces, LaTeX dollars, bold marks and punctuation around it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 200
# 10**400 is beyond any float; larger powers would only cost time.
_MAX_EXPONENT = 400
_MAX_DIGITS = 100

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_CURRENCY = r"(?:[$€£¥₹]|(?:USD|EUR|GBP|US\$|Rs\.?)(?![A-Za-z]))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*{_CURRENCY}?\s*(?P<inner>[-+]?)\s*"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<top>{_DECIMAL})"
    rf"(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,4})|\s*[*×x·]\s*10\s*(?:\^|\*\*)\s*\{?\(?(?P<power>[-+]?[0-9]{1,4})\)?\}?)?"
    rf"\s*{_CURRENCY}?\s*(?P<percent>%|percent\b|per\s?cent\b)?(?P<unit>.*)",
    re.DOTALL,
)
# Words, with powers, slashes, hyphens and brackets as in "km/h", "m^2", "(dollars)".
_UNIT = re.compile(r"[\s(]*[A-Za-z°'][A-Za-z°'²³./\-\s()]*(?:\^\{?[23]\}?)?[\s)]*")
# An answer that goes on with these is more than one number.
_NO_UNITS = frozenset(
    [
        "or",
        "and",
        "to",
        "plus",
        "minus",
        "times",
        "not",
        "but",
        "if",
        "than",
        "between",
        "about",
        "either",
        "nor",
        "is",
        "are",
        "was",
        "equals",
    ]
)
# Other words of one or two letters are taken for variables: "5x", "3pi".
_SHORT_UNITS = frozenset("mglshvawkcfnj°") | frozenset(
    (
        "km",
        "cm",
        "mm",
        "kg",
        "mg",
        "ml",
        "lb",
        "oz",
        "ft",
        "mi",
        "hr",
        "am",
        "pm",
        "yd",
        "in",
        "of",
        "an",
        "at",
        "by",
        "on",
    )
)
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ("*", "*"))
_WRAPPERS += (("`", "`"), ('"', '"'), ("'", "'"), ("{", "}"))
_LEADING = " \t\r\n:,;"  # not the point of ".5"
_TRAILING = " \t\r\n.,;:!?"
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_REPLACED = (
    ("{,}", ","),
    ("\\!", ""),
    ("\\,", " "),
    ("\\;", " "),
    ("\\:", " "),
    ("\\ ", " "),
    ("~", " "),
    ("\\$", "$"),
    ("\\%", "%"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", "°"),
    ("^\\circ", "°"),
    ("\\times", "×"),
    ("\\cdot", "·"),
)
_UNICODE = str.maketrans({"−": "-", "–": "-", "—": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "⁄": "/"})
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9])")


@dataclass(frozen=True)
class Number:
    """A stated number.

    Attributes:
        value: exact; of "50%" it is 50.
        unit: the words behind it, in lower case, without a plural s; empty if none.
        percent: whether a percent sign or word followed.
    """

    value: Fraction
    unit: str = ""
    percent: bool = False


def tidy(text: str) -> str:
    """The answer without what only dresses it: spaces, LaTeX dollars, bold marks, text commands, trailing points.

    Example:
        >>> tidy(r"**$\\text{about }\\$1{,}000$.**")
        'about $1,000'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    if "\\" in text or "{" in text:
        text = _TEXT_COMMAND.sub(r" \1 ", text.replace("\\$", "\0"))
        for old, new in _REPLACED:
            text = text.replace(old, new)
    while True:
        before = text
        text = text.lstrip(_LEADING).rstrip(_TRAILING)
        for left, right in _WRAPPERS:
            if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
                inside = text[len(left) : -len(right)]
                if left != "{" or "}" not in inside:
                    text = inside
        if text == before:
            break
    return " ".join(text.replace("\0", "$").split())


def read_number(text: str) -> Number | None:
    """The number that a tidy text states; None if it states none, or more than one.

    Args:
        text: what ``tidy`` returned.

    Example:
        >>> read_number("$1,250.50").value, read_number("3/4 cups").value, read_number("5 or 6")
        (Fraction(2501, 2), Fraction(3, 4), None)
    """
    if not text or len(text) > MAX_CHARACTERS:
        return None
    if "\\" in text:
        text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).strip()
        text = re.sub(r"^([-+])\s+", r"\1", text)
    if " " in text:
        text = _SPACED_THOUSANDS.sub(lambda m: m[1].replace(" ", ""), text)
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner"]) or sum(map(str.isdigit, text)) > _MAX_DIGITS:
        return None
    unit = _unit(found["unit"])
    if unit is None:
        return None
    value = _value(found)
    if value is None:
        return None
    words = unit.split()
    if words and words[0] in _SCALES:
        value *= _SCALES[words[0]]
        unit = " ".join(words[1:])
    return Number(value, unit, found["percent"] is not None)


def _unit(text: str) -> str | None:
    """The unit's words; None if the text is no unit."""
    if not text.strip(" $"):
        return ""
    if not _UNIT.fullmatch(text):
        return None
    words = text.lower().replace("(", " ").replace(")", " ").split()
    short = {part for word in words for part in re.split(r"[/.^²³\-{}0-9]+", word) if 0 < len(part) <= 2}
    if len(words) > 8 or short - _SHORT_UNITS or not _NO_UNITS.isdisjoint(words):
        return None
    return " ".join(word.rstrip(".").removesuffix("s") if len(word) > 2 else word for word in words)


def _value(found: re.Match[str]) -> Fraction | None:
    value = Fraction(_plain(found["top"]))
    if found["bottom"] is not None:
        bottom = Fraction(_plain(found["bottom"]))
        if bottom == 0:
            return None
        value /= bottom
    if found["whole"] is not None:
        value += int(found["whole"])
    exponent = int(found["e"] or found["power"] or 0)
    if abs(exponent) > _MAX_EXPONENT:
        return None
    if exponent:
        value *= Fraction(10) ** exponent
    return -value if "-" in (found["sign"], found["inner"]) else value


def _plain(digits: str) -> str:
    digits = digits.replace(",", "")
    return digits[:-1] if digits.endswith(".") else digits


def agree(given: Number, wanted: Number) -> bool:
    """Whether two stated numbers are equal; units must agree if both have one.

    "50%" is 50 and also 0.5 to a side that writes no percent sign: data sets use both.

    Example:
        >>> agree(read_number("50%"), read_number("0.5")), agree(read_number("5 cm"), read_number("5 m"))
        (True, False)
    """
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return False
    if given.value == wanted.value:
        return True
    if given.percent == wanted.percent:
        return False
    share, other = (given, wanted) if given.percent else (wanted, given)
    return share.value / 100 == other.value
