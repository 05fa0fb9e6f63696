"""The one grammar of numbers: exact fractions from what people and models write; anything else is not a number.

``1,000``, ``1 000``, ``$12.50``, ``-3``, ``3/4``, ``1 1/2``, ``\\frac{3}{4}``, ``50%``, ``1.5e3``,
``1.5 \\times 10^{3}``, ``10^5``, ``2.5 million``, ``72 clips``, ``5 km/h``: read whole, or not at all. `math`,
`numeric` and `--last-number` use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mirrorpo.rewards.units import NO_UNIT, Unit, conflict, read_unit

MAX_CHARACTERS = 200
# 10**400 is beyond any float; larger powers would only cost time.
_MAX_EXPONENT = 400
MAX_DIGITS = 100

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?:'[0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_CURRENCY = r"(?P<currency>[$€£¥₹₽₩฿]|(?:USD|EUR|GBP|US\$|Rs\.?)(?![A-Za-z]))"
_POWER = (
    r"\s*\^\s*(?:\{\s*\(?\s*(?P<power>[-+]?[0-9]{1,4})\s*\)?\s*\}|\(\s*(?P<power2>[-+]?[0-9]{1,4})\s*\)"
    r"|(?P<power3>[-+]?[0-9]{1,4}))"
)
_TIMES_TEN = r"\s*(?:\\times|\\cdot|[*xX])\s*10(?![0-9.,])"
_MAGNITUDE = (
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<top>{DECIMAL})"
    rf"(?:[eE](?P<e>[-+]?[0-9]{{1,4}})(?![0-9.])|(?P<ten>{_TIMES_TEN})?{_POWER}(?![0-9.^]))?"
    rf"(?:\s*/\s*(?P<bottom>{DECIMAL}))?"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"\s*(?P<scale>{'|'.join(_SCALES)})s?(?![a-z])"
_PERCENT = r"\s*(?P<percent>%|percent(?![a-z])|per\s?cent(?![a-z])|pct(?![a-z]))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*{_CURRENCY}?\s*(?P<inner>[-+]?)\s*{_MAGNITUDE}(?:{_SCALE}|{_PERCENT})?(?P<unit>(?![0-9.,^_!]).*)?",
    re.DOTALL | re.IGNORECASE,
)
# Where a number is in a longer text, with all that belongs to it.
NUMBER_IN_TEXT = re.compile(
    rf"(?<![0-9A-Za-z.^_])[-+]?(?:\\?[$€£¥₹])?[-+]?"
    rf"(?:(?:[0-9]{{1,30}}\s*)?\\[dt]?frac\s*\{{[0-9.,]{{1,30}}\}}\s*\{{[0-9.,]{{1,30}}\}}"
    rf"|(?:[0-9]{{1,3}}(?: [0-9]{{3}}){{1,9}}(?![0-9])|(?:[0-9]{{1,30}}\s+(?=[0-9]{{1,30}}/))?"
    rf"(?:[0-9]{{1,3}}(?:[,'][0-9]{{3}}){{1,9}}(?![0-9])|[0-9]{{1,30}})"
    rf"(?:\.[0-9]{{1,30}})?|\.[0-9]{{1,30}})"
    rf"(?:[eE][-+]?[0-9]{{1,4}}|(?:\s*(?:\\times|\\cdot|[*xX])\s*10)?\^(?:\{{[-+]?[0-9]{{1,4}}\}}|[-+]?[0-9]{{1,4}}))?"
    rf"(?:\s?/\s?[0-9]{{1,30}}(?:\.[0-9]{{1,30}})?)?)"
    rf"(?:\s?\\?%|\s+(?:{'|'.join(_SCALES)}|percent)(?![a-z]))?",
)
_PLAIN = re.compile(r"([-+]?)(\$?)([0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9})(?:\.([0-9]{1,30}))?")
_COUNTED_PLAIN = re.compile(_PLAIN.pattern + r"( [A-Za-z]+)")
_NO_UNITS = {f" {name}{s}" for name in (*_SCALES, "percent", "pct") for s in ("", "s")}
_DOLLARS: Unit = (frozenset({"dollar"}), frozenset())
_FRACTION = re.compile(
    r"([0-9]?)\s*\\frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9.,]+)\s*\}|([0-9]))(?![0-9])"
)
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,/^_{])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9])")
_COUNTING = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
_NUMBER_WORDS: list[str] = list(_COUNTING.split())
_NUMBER_WORD = re.compile(rf"(?:{'|'.join(reversed(_NUMBER_WORDS))})(?![A-Za-z-])", re.IGNORECASE)
DECIMAL_IN_TEXT = re.compile(rf"[-+]?{DECIMAL}(?:\s*/\s*{DECIMAL})?")
_MONEY = re.compile(r"[$€£](?=[0-9.])")
_COUNTED = re.compile(r"([0-9])\s+([A-Za-z]{2,20})(?![A-Za-z])")
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[$€£0-9.]|[a-z])", re.IGNORECASE)
_NAME = re.compile(r"\A[A-Za-z][A-Za-z ]{0,40}=\s*(?=[^=]+\Z)")
_ROUGHLY = re.compile(
    r"(?:exactly|about|approximately|approx\.?|roughly|around|\\approx)\s*(?=[-+$€£¥\\.0-9])", re.IGNORECASE
)


@dataclass(frozen=True)
class Number:
    """A stated number.

    Attributes:
        value: exact; of "50%" it is 50.
        unit: what is counted or measured; see `mirrorpo.rewards.units`.
        percent: whether a percent sign or word followed.
    """

    value: Fraction
    unit: Unit = NO_UNIT
    percent: bool = False


def read_number(text: str, *, trusted: bool = False) -> Number | None:
    """The number that a tidy text states; None if it states none, or more than one.

    Args:
        text: what ``tidy`` returned.
        trusted: any word may be the unit (references only).

    Example:
        >>> read_number("$1,250.50").value, read_number("3/4 cups").value, read_number("5 or 6")
        (Fraction(2501, 2), Fraction(3, 4), None)
    """
    if plain := _PLAIN.fullmatch(text):
        return Number(_decimal(plain[1] + plain[3], plain[4]), _DOLLARS if plain[2] else NO_UNIT)
    if not text or len(text) > MAX_CHARACTERS:
        return None
    if (counted := _COUNTED_PLAIN.fullmatch(text)) and counted[5].lower() not in _NO_UNITS:
        unit = read_unit(counted[5], trusted=trusted)
        if unit is None:
            return None
        value = _decimal(counted[1] + counted[3], counted[4])
        return Number(value, (unit[0] | {"dollar"}, unit[1]) if counted[2] else unit)
    text = spelled(text)
    if text[:1] in "mMnN" and (negative := _NEGATIVE.match(text)):
        text = f"-{text[negative.end() :]}"
        if text[1:2].isalpha() and (word := _NUMBER_WORD.match(text, 1)):
            text = f"-{_NUMBER_WORDS.index(word[0].lower())}{text[word.end() :]}"
    if text[:1].isalpha() and (word := _NUMBER_WORD.match(text)):
        text = f"{_NUMBER_WORDS.index(word[0].lower())}{text[word.end() :]}"
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner"]) or sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    unit = read_unit(found["unit"], trusted=trusted) if found["unit"] else NO_UNIT
    if unit is None:
        return None
    value = _value(found)
    if value is None:
        return None
    if found["currency"] and (money := read_unit(found["currency"].lower().rstrip("."))):
        unit = (unit[0] | money[0], unit[1])
    return Number(value, unit, found["percent"] is not None)


def without_name(text: str) -> str:
    """A tidy text without the name of what it states: "x = 12" and "Area = 12" say no more than 12.

    Example:
        >>> without_name("Area = 12"), without_name("x = 1, y = 2")
        ('12', 'x = 1, y = 2')
    """
    return _NAME.sub("", text, count=1) if "=" in text else text


def bare_chain(text: str) -> tuple[str, Unit]:
    """A calculation such as "8 * $9 = 72 dollars" without its units, and the unit of its last number.

    Example:
        >>> bare_chain("8 clips * 9 = 72 clips")
        ('8 * 9 = 72', (frozenset(), frozenset({'clip'})))
    """
    head, _, last = text.rpartition("=")
    number = read_number(last.strip())
    if number is None:
        return text, NO_UNIT
    shown = DECIMAL_IN_TEXT.search(last)
    if number.unit is not NO_UNIT and shown is not None and not number.percent:
        last = f" {shown[0]}"
    head = _MONEY.sub("", head)
    head = _COUNTED.sub(lambda m: m[1] if read_unit(f" {m[2]}") is not None else m[0], head)
    return f"{head.rstrip()} ={last}", number.unit


def spelled(text: str) -> str:
    """A tidy text with its fractions as ``a/b`` and its thousands joined.

    Example:
        >>> spelled(r"1\\frac{1}{2}"), spelled("12 000")
        ('1 1/2', '12000')
    """
    if "\\frac" in text:
        text = _FRACTION.sub(_as_ratio, text).strip()
        text = re.sub(r"^([-+])\s+", r"\1", text)
    if " " in text:
        text = _SPACED_THOUSANDS.sub(lambda m: m[1].replace(" ", ""), text)
        text = _ROUGHLY.sub("", text, count=1) if not text[0].isdigit() else text
    return text


def _as_ratio(found: re.Match[str]) -> str:
    whole, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
    if whole and (top.startswith("-") or not (top.isdigit() and bottom.isdigit())):
        return found[0]
    return f"{whole} {top}/{bottom} "


def _value(found: re.Match[str]) -> Fraction | None:
    if found["whole"] is not None and not (found["top"].isdigit() and (found["bottom"] or "").isdigit()):
        return None
    value = _plain(found["top"])
    power = found["power"] or found["power2"] or found["power3"]
    exponent = int(found["e"] or power or 0)
    if abs(exponent) > _MAX_EXPONENT:
        return None
    if found["e"] or (power and found["ten"]):
        value *= Fraction(10) ** exponent
    elif power:
        if (value == 0 and exponent <= 0) or abs(exponent) * len(found["top"]) > _MAX_EXPONENT:
            return None
        value **= exponent
    if found["bottom"] is not None:
        bottom = _plain(found["bottom"])
        if bottom == 0:
            return None
        value /= bottom
    if found["whole"] is not None:
        value += int(found["whole"])
    if found["scale"] is not None:
        value *= _SCALES[found["scale"].lower()]
    return -value if "-" in (found["sign"], found["inner"]) else value


def _plain(digits: str) -> Fraction:
    whole, _, decimals = digits.replace("'", "").partition(".")
    return _decimal(whole, decimals)


def _decimal(whole: str, decimals: str | None) -> Fraction:
    """The fraction of digits before and after a point; ``Fraction`` of a text would take three times as long."""
    if not decimals or not decimals.strip("0"):
        return Fraction(int(whole.replace(",", "") or "0"))
    return Fraction(int(whole.replace(",", "") + decimals), 10 ** len(decimals))


def agree(given: Number, wanted: Number) -> bool:
    """Whether two stated numbers are equal; units must agree if both have one.

    "50%" is 50 and also 0.5 to a side that writes no percent sign: data sets use both.

    Example:
        >>> agree(read_number("50%"), read_number("0.5")), agree(read_number("5 cm"), read_number("5 m"))
        (True, False)
    """
    if (given.unit is not NO_UNIT or wanted.unit is not NO_UNIT) and conflict(given.unit, wanted.unit):
        return False
    if given.value == wanted.value:
        return True
    if given.percent == wanted.percent:
        return False
    share, other = (given, wanted) if given.percent else (wanted, given)
    return share.value / 100 == other.value
