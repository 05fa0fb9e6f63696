"""The one grammar of numbers: exact fractions from what people and models write; anything else is not a number.

``1,000``, ``1 000``, ``$12.50``, ``-3``, ``3/4``, ``1 1/2``, ``\\frac{3}{4}``, ``50%``, ``1.5e3``,
``1.5 \\times 10^{3}``, ``10^5``, ``2.5 million``, ``72 clips``, ``5 km/h``: read whole, or not at all. `math`,
`numeric` and `--last-number` use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mirrorpo.rewards.notation import tidy
from mirrorpo.rewards.units import NO_UNIT, Unit, changes, conflict, read_unit

MAX_CHARACTERS = 200
# 10**400 is beyond any float; larger powers would only cost time.
_MAX_EXPONENT = 400
MAX_DIGITS = 100

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?:'[0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_CURRENCY = r"(?P<currency>(?:AU|CA|HK|NZ|US|[ACS])?\$|[€£¥₹₽₩฿]|(?:USD|EUR|GBP|INR|Rs\.?)(?![A-Za-z]))"
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
_SCALES |= {"lakh": 10**5, "crore": 10**7}
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
nineteen
"""
_ONES = _COUNTING.split()
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORD_VALUES = {word: value for value, word in enumerate(_ONES)} | {w: 10 * i for i, w in enumerate(_TENS, 2)}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
_PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000}
_GAP = r"(?:\s+|\s?-\s?)"
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:{_GAP}(?:{'|'.join(_ONES[1:10])})(?![a-z]))?|{'|'.join(reversed(_ONES))})"
_BELOW_1000 = (
    rf"(?:(?:(?:an?|{_BELOW_100}){_GAP})?hundred(?:{_GAP}(?:and{_GAP})?{_BELOW_100}(?![a-z]))?"
    rf"|(?:an?(?={_GAP}[tmb])|{_BELOW_100}))"
)
_THOUSANDS = rf"{_GAP}(?:thousand|million|billion|trillion)(?![a-z])"
_CARDINAL = rf"{_BELOW_1000}(?![a-z])(?:{_THOUSANDS}(?:,?{_GAP}(?:and{_GAP})?{_BELOW_1000}(?![a-z]))?)*"
_IN_WORDS = re.compile(
    rf"(?:(?:(?P<whole>[0-9]{{1,9}}|{_CARDINAL}){_GAP}and{_GAP})?"
    rf"(?:(?P<one>an?|one){_GAP}(?P<part>half|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth)(?![a-z])"
    rf"|(?P<top>{_CARDINAL}){_GAP}(?P<parts>halve|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|"
    rf"hundredth|thousandth)s(?![a-z]))"
    rf"|(?P<dozen>half{_GAP}a{_GAP}dozen|an?{_GAP}dozen)|(?P<half>half)(?!-)"
    rf"|(?P<cardinal>{_CARDINAL})(?:{_GAP}point(?P<decimals>(?:{_GAP}(?:oh|{'|'.join(_ONES[:10])})(?![a-z]))+))?)(?![A-Za-z])"
    rf"(?!-)",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[a-z]+")
_INDIAN = re.compile(r"-?(?:₹|Rs\.?|INR)\s*[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9,])")  # "₹1,50,000"
_GLOSS = re.compile(r"\s*\(\s*([0-9.,/ ]{1,40})\)")
_NUMBER_OR = re.compile(
    r"(?:[0-9.]\s*(?:[a-z]+\s+)?(?:or|to|through|versus|vs\.?|times|plus|minus|over|of|out\s+of|x|(?:divided|multiplied)\s+by)"
    r"|\bbetween\s+\S+\s+(?:[a-z]+\s+)?and|\b(?:at\s+least|at\s+most|(?:more|less|fewer|greater|rather|bigger|smaller)\s+than|not|up\s+to|below|above|mod))"
    r"\s+[$\\(\-+]*\Z",
    re.IGNORECASE,
)
_SIGN_BEFORE = re.compile(r"\b(?:minus|negative)\s+\Z", re.IGNORECASE)
_UNIT_POWER = re.compile(
    r"(?<=[0-9\s/])((?:[mcdk]?m|in|ft|yd|s|units?|feet|inches|met(?:er|re)s?)\s*)\^\{?-?[1-4]\}?(?![0-9])"
)
# Before or after a number: it is part of something else.
_PART_BEFORE = re.compile(
    r"(?:[0-9A-Za-z)}][-+*/^_.,:]?|[-^_{/*<>±]|[0-9A-Za-z)}]\s*[-+*/×]\s*|\\[a-z]+\s*[{(]?|\w\()\Z"
)
_PART_AFTER = re.compile(
    r"\s*(?:\\times|\\cdot|\\div|\\pm|[*+/^!<>](?![*\s]*\Z)|-[A-Za-z])"
    r"|\s+(?:squared|cubed|factorial|plus|minus|over|mod|modulo|choose|point|halves|thirds|fourths|fifths|sixths|eighths|"
    r"tenths|hundredths|thousandths|gross|score)\b"
)
_BESIDE_DIGITS = re.compile(r"\s")
# "2 hours and 30 minutes" is neither 2 nor 30.
_COMPOUND = re.compile(
    r"[0-9]\s*(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|'|yards?|miles?|pounds?|lbs?|kg|km|meters?"
    r"|metres?|m|dollars?|euros?)[,\s]*(?:and\s+)?[0-9.]+\s*(?:minutes?|mins?|seconds?|secs?|s|hours?|days?|weeks?|months?|inch(?:es)?|in"
    r"|\"|feet|foot|ounces?|oz|grams?|g|meters?|metres?|m|cm|centimet(?:er|re)s?|cents?|pence)(?![A-Za-z])"
)
# "Janet makes $18 every day": a sentence with one number, right behind a verb that says how many.
_SAYS = re.compile(
    r"[A-Za-z](?:[^0-9]*[^0-9A-Za-z])?(?:is|are|was|were|be|been|ha[sd]|have|needs?|needed|gets?|got|makes?|made|takes?|took|costs?|pays?|paid"
    r"|spends?|spent|earns?|earned|buys?|bought|sells?|sold|eats?|ate|reads?|runs?|ran|walks?|walked|drives?|drove|saves?|saved"
    r"|owes?|owed|uses?|used|receives?|received|collects?|collected|contains?|holds?|held|weighs?|weighed|picks?|picked"
    r"|scores?|scored|drinks?|drank|wins?|won|gives?|gave|loses?|lost|finds?|found|works?|worked|plays?|played|equals|totals"
    r"|(?:equal|comes|amounts|adds\s+up)\s+to|(?:total|cost|price|profit|value|area|volume|perimeter|speed|distance|length|average)\s+of)"
    r"[\s*:]+(?:only\s+|exactly\s+|now\s+|about\s+|approximately\s+|a\s+total\s+of\s+)?(?P<number>[-+$€£]*[0-9].*)",
    re.IGNORECASE | re.DOTALL,
)
_UNSAYS = re.compile(
    r"n['’]t\b|\b(?:not|no|never|neither|nor|cannot|without|or|if|unless|except|than|half|twice|double|triple|times|wrong|incorrect|false|untrue|impossible|unlikely|almost|nearly|hardly"
    r"|maybe|perhaps|either|between|least|most|until|every other|would have)\b",
    re.IGNORECASE,
)
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
        text = f"-{in_digits(text[negative.end() :])}"
    elif text[:1].isalpha() or " and " in text:
        text = in_digits(text)
    if "," in text and (indian := _INDIAN.match(text)):
        text = indian[0].replace(",", "") + text[indian.end() :]
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner"]) or sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    unit = read_unit(found["unit"], trusted=trusted) if found["unit"] else NO_UNIT
    if unit is None:
        return None
    value = _value(found)
    if value is None:
        return None
    currency = (found["currency"] or "").lower().rstrip(".")
    if currency and (money := read_unit("$" if currency.endswith("$") else currency)):
        unit = (unit[0] | money[0], unit[1])
    return Number(value, unit, found["percent"] is not None)


def number_in_sentence(text: str) -> Number | None:
    """The only number of a tidy sentence, if it stands right behind a verb that says how many.

    Example:
        >>> number_in_sentence("Janet makes $18 every day").value, number_in_sentence("he has half of 36")
        (Fraction(18, 1), None)
    """
    said = _SAYS.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if said is None or _UNSAYS.search(text):
        return None
    found = NUMBER_IN_TEXT.match(text, said.start("number"))
    if found is None:
        return None
    rest = text[found.end() :].rstrip(".!")
    if any(map(str.isdigit, rest)) or not re.match(r"\Z|[\s,;:)*]+[A-Za-z]", rest):
        return None
    word = re.match(r"\s+[A-Za-z/]+", rest)
    counted = read_number(stated := found[0].strip())
    if word is None or counted is None:
        return counted
    if changes(word[0].strip()):
        return None
    return read_number(stated + word[0]) or counted


def in_digits(text: str) -> str:
    """A text with the number in words at its beginning in digits.

    Example:
        >>> in_digits("one hundred and five cups"), in_digits("two and a half"), in_digits("two thirds")
        ('105 cups', '2 1/2', '2/3')
    """
    found = _IN_WORDS.match(text)
    if found is None:
        return text
    if found["dozen"]:
        said = "6" if found["dozen"][0] in "hH" else "12"
    elif found["cardinal"]:
        said = str(_counted(found["cardinal"]))
        if found["decimals"]:
            said += "." + "".join(str(_WORD_VALUES.get(word, 0)) for word in _WORDS.findall(found["decimals"].lower()))
    else:
        part = (found["part"] or found["parts"] or "half").lower()
        said = f"{_counted(found['top'] or 'one')}/{_PARTS[part]}"
        if found["whole"]:
            said = f"{_counted(found['whole'])} {said}"
    rest = text[found.end() :]
    if (gloss := _GLOSS.match(rest)) and gloss[1].strip() == said:
        rest = rest[gloss.end() :]  # "forty-two (42)"
    return said + rest


def _counted(words: str) -> int:
    """The value of a cardinal in words, or in digits."""
    if words.isdecimal():
        return int(words)
    total = group = 0
    for word in _WORDS.findall(words.lower()):
        if word in ("a", "an"):
            group = 1
        elif word == "hundred":
            group = 100 * (group or 1)
        elif word in _SCALES:
            total, group = total + group * _SCALES[word], 0
        elif word != "and":
            group += _WORD_VALUES[word]
    return total + group


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


def last_number_in(text: str) -> str | None:
    """The last number of a text, read whole; what stands around its last digits if they are part of something else.

    Example:
        >>> last_number_in("40 + 2 makes 42 clips."), last_number_in("it is x^2")
        ('42', 'x^2')
    """
    if "^" in text:
        text = _UNIT_POWER.sub(r"\1", text)
    digit = next((at for at in range(len(text) - 1, -1, -1) if text[at] in "0123456789"), -1)
    if digit < 0:
        return None
    last = next((found for found in NUMBER_IN_TEXT.finditer(text) if found.start() <= digit < found.end()), None)
    if last is None:
        return _BESIDE_DIGITS.split(text[:digit])[-1] + text[digit]
    if any(found.start() < last.end() <= found.end() for found in _COMPOUND.finditer(text)):
        return text[max(0, last.start() - 20) :]
    said, before, after = last[0].strip(), text[max(0, last.start() - 60) : last.start()], text[last.end() :]
    if _NUMBER_OR.search(before) or _PART_BEFORE.search(before):
        return f"{before.split()[-1] if before.split() else ''} {before[-20:]}{said}"
    if _SIGN_BEFORE.search(before):
        said = f"-{said}"
    touching = _BESIDE_DIGITS.split(after[:60], maxsplit=1)[0].rstrip(".,;:!?)*$\\]}\"'_")
    if (touching and read_number(tidy(said + touching)) is None) or _PART_AFTER.match(after):
        return said + after[:20]
    return said
