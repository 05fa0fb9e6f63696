"""Structure of a mathematical text, for comparison: numbers, expressions, equations, sets, tuples, matrices.

math-verify's grammar (latex2sympy) reads single expressions; what it and its comparison lose is kept here: the rows of
matrices, order and brackets of tuples, bases, tiny differences. Nothing is rounded, no text is evaluated as code.
This file runs inside the algebra process (`mirrorpo.rewards.algebra`), which may be stopped at any time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mirrorpo.rewards.exact_values import (
    Based,
    Clock,
    Collection,
    Equal,
    Matrix,
    Named,
    Node,
    Ordered,
    PlusMinus,
    Region,
    Relation,
    Scalar,
    check_size,
    same,
)
from mirrorpo.rewards.latex import read_expression, splits, top_level
from mirrorpo.rewards.notation import Unreadable
from mirrorpo.rewards.units import read_unit

_MAX_ITEMS = 100
_MAX_BRACKETS = 60
_TWO_SIGNS = re.compile(r"[-+]\s*[-+]")  # "--6": a dash, or a slip

_MATRIX = re.compile(
    r"(?P<before>.*?)[\[({|\s]*\\begin\s*\{(?P<kind>[pbBvV]?(?:small)?matrix\*?|array)\}\s*(?P<columns>\{[clr|@{}\s]*\}|\[[clr]\])?"
    r"(?P<body>.*?)\\end\s*\{(?P=kind)\}[\])}|\s.]*(?P<after>.*)",
    re.DOTALL,
)
_OF_MATRIX = re.compile(r"\s*[A-Z]\s*\^\s*\{?\s*(?:-1|T)\s*\}?\s*")
# A column of unknowns, as in "(x, y) = (1, 2)".
_UNKNOWNS = re.compile(r"\s*\\begin\s*\{[pb]matrix\}\s*[a-z](?:\s*(?:\\\\|&)\s*[a-z])*\s*\\end\s*\{[pb]matrix\}\s*")
_TRANSPOSED = re.compile(r"\s*\^\s*\{?\s*(?:\\(?:top|intercal|prime|mathsf|tran)\s*)?\{?\s*T?\s*\}?\s*\}?|'")
_ROW_BREAK = re.compile(r"\\\\\s*(?:\[[^\]]*\])?|\\cr(?![a-z])|\\newline(?![a-z])|\\tabularnewline")
_RULE = re.compile(r"\\(?:hline|cline\{[^}]*\})")
_BASED = re.compile(
    r"(-?)\s*(?:\\overline\s*)?[({]?\s*([0-9A-Za-z][0-9A-Za-z ,]*?)\s*[)}]?\s*"
    r"(?:_\s*\{?\s*\(?\s*|\(?\s*(?:in\s+)?base[\s-]*)"
    r"([0-9]{1,2}|two|three|eight|ten|sixteen|hex|bin|oct|dec)\s*\)?\s*\}?"
)
_BASE_WORDS = {"two": 2, "three": 3, "eight": 8, "ten": 10, "sixteen": 16, "hex": 16, "bin": 2, "oct": 8, "dec": 10}
_TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_HOUR = re.compile(r"([0-9]{1,2})\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[a-zA-Z]+)\s*(?:_\s*(?:\{[^{}]*\}|[A-Za-z0-9]))?\s*'{0,2}\s*(?:\(\s*(?:[A-Za-z]|\\[a-z]+)(?:\s*,\s*[A-Za-z])*\s*\)|\([A-Z]\))?"
    r"|\\(?:overline|widehat|vec|hat|bar|angle|triangle|mathbf|frac\{d[a-z]\}\{d[a-z]\})\s*\{?[A-Za-z ]*\}?"
    r"|\(\s*[A-Za-z](?:_\{?[0-9]\}?)?(?:\s*,\s*[A-Za-z](?:_\{?[0-9]\}?)?)+\s*\)|[fghpPFGHT]\s*\(\s*-?[0-9.]+\s*\)"
    r"|\|\s*(?:[A-Z]{1,2}|[a-z])\s*\||m?\s*\\angle\s*[A-Z]{1,3}|[A-Z]{2,3}"
    r"|(?:\\text)?[A-Za-z][A-Za-z ]{2,40}"
)
_FUNCTION_NAME = re.compile(r"\\(?:pi|infty|sqrt|sin|cos|tan|log|ln|exp)\b|e|i|I")
_TRIGONOMETRY = re.compile(r"sin|cos|tan|cot|sec|csc")
_TEXT_JOIN = re.compile(r"(?<![A-Za-z\\])(?:,?\s*\band\b|,?\s*\bor\b)(?![A-Za-z])")
_ANGLES = re.compile(r"(?:\\langle|<(?=[^<>]*,[^<>]*>\Z))\s*([^<>]*?)\s*(?:\\rangle|>\Z)")
_UNIT_TAIL = re.compile(r"(.*[0-9A-Za-z})\]!°])\s+([A-Za-z°][A-Za-z°/. ^{}0-9-]*)", re.DOTALL)
_UNIT_SIGN = re.compile(r"(.*[0-9A-Za-z})\]!])\s*(°\s*[CF]?)", re.DOTALL)


def compare(given: str, wanted: str) -> str:
    """The verdict on two tidy texts.

    Returns:
        "match", "mismatch", "malformed" (given cannot be read), or "bad reference" (wanted cannot).
    """
    both = f"{given}\n{wanted}"
    try:
        right = read(wanted, both)
    except Unreadable:
        return "bad reference"
    try:
        left = read(given, both)
    except Unreadable:
        return "malformed"
    return "match" if same(left, right) else "mismatch"


def read(text: str, both: str) -> Node:
    """The structure of a text.

    Args:
        text: tidy.
        both: all that is compared; decides what single letters mean.

    Raises:
        Unreadable: it states nothing that can be compared.
    """
    text = text.strip().rstrip(".,;").strip()
    if (
        not text
        or _TWO_SIGNS.match(text)
        or text.count("{") != text.count("}")
        or sum(map(text.count, "([{")) > _MAX_BRACKETS
    ):
        raise Unreadable(text)
    if "\\begin" in text:
        named, _, rest = text.partition("=")
        if _OF_MATRIX.fullmatch(named) or (_UNKNOWNS.fullmatch(named) and "\\begin" in rest):
            return read(rest, both)
        if text.count("\\begin") == 1 and (matrix := _MATRIX.fullmatch(text)):
            return _matrix(matrix, both)
        if len(top_level(text, ",")) == 1 and not text.startswith(("(", "[", "\\{")):
            return _matrices(text, both)
    text = _TEXT_JOIN.sub(",", text)
    text = _ANGLES.sub(r"(\1)", text)
    separator = ";" if len(top_level(text, ";")) > 1 else ","
    items = top_level(text, separator, thousands=True)
    if len(items) > 1:
        return Collection(tuple(_distinct([read(item, both) for item in items[:_MAX_ITEMS]])))
    return _single(text, both)


def _single(text: str, both: str) -> Node:
    """A text without separators at its top level."""
    if timed := _clock(text):
        return timed
    if based := _based(text):
        return based
    member = splits(text, r"\\in(?![a-z])")
    if len(member) == 2 and _NAME.fullmatch(member[0].strip()):
        return read(member[1], both)
    if "\\approx" in text:
        return _approximate(splits(text, r"\\approx(?![a-z])"), both)
    sides = splits(text, r"(?<![<>!:\\])=(?!=)|:=|==|\\equiv(?![a-z])")
    if len(sides) > 1:
        return _equation(text, [side.strip() for side in sides], both)
    if ("\\pm" in text or "\\mp" in text) and not text.startswith("\\{"):
        plus, minus = (text.replace("\\pm", up).replace("\\mp", down) for up, down in (("+", "-"), ("-", "+")))
        return PlusMinus(tuple(_distinct([read(plus, both), read(minus, both)])))
    remainder = splits(text, r"\\b?mod(?![a-z])")
    if len(remainder) == 2:
        return _remainder(remainder[0], remainder[1], both)
    bracketed = _bracketed(text, both)
    return _expression(text, both) if bracketed is None else bracketed


def _remainder(left: str, right: str, both: str) -> Node:
    """``12 \\bmod 5``; of a sum it is not said what is divided."""
    values = [read_expression(side, both) for side in (left, right)]
    for value in values:
        check_size(value)
    values = [value.doit() for value in values]
    if not all(value.is_Integer for value in values) or values[1] <= 0 or len(splits(left.strip()[1:], "[-+]")) > 1:
        raise Unreadable(left)
    return Scalar(values[0] % values[1])


def _expression(text: str, both: str) -> Node:
    import sympy
    from sympy.logic.boolalg import BooleanAtom, BooleanFunction

    unit = None
    percent = text.endswith("%")
    if percent:
        text = text[:-1].rstrip("\\ ")
    elif not _TRIGONOMETRY.search(text):
        text, unit = _without_unit(text)
    value = read_expression(text, both)
    if isinstance(value, sympy.Set):
        value = value.doit()
        if isinstance(value, sympy.FiniteSet) or value is sympy.S.EmptySet:
            return Collection(tuple(Scalar(item) for item in value.args))
        return Region(value)
    if isinstance(value, BooleanFunction | BooleanAtom) or getattr(value, "is_Relational", False):
        return Relation(value)
    return Scalar(value, percent, unit)


def _without_unit(text: str) -> tuple[str, Any]:
    """An expression without the unit behind it, and the unit if there is one."""
    found = _UNIT_SIGN.fullmatch(text) or _UNIT_TAIL.fullmatch(text)
    if found and (len(found[2].strip()) > 1 or found[2] == "°") and (unit := read_unit(" " + found[2])) is not None:
        return found[1], unit
    return text, None


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    """The nodes without those equal to an earlier one, both values of a "plus or minus" as two."""
    kept: list[Node] = []
    every = [item for node in nodes for item in (node.items if isinstance(node, PlusMinus) else (node,))]
    for node in every:
        if not any(same(node, other) for other in kept):
            kept.append(node)
    return kept


def _bracketed(text: str, both: str) -> Node | None:
    """A set in braces, or a tuple or interval; None if the brackets only group."""
    if text.startswith("\\{") and text.endswith("\\}") and _balanced(text[2:-2], "{", "}"):
        inside = text[2:-2].strip()
        if re.search(r"\\mid|(?<!\\)\||:", inside):
            raise Unreadable(text)
        if not inside:
            return Collection(())
        items = top_level(inside, ";") if len(top_level(inside, ";")) > 1 else top_level(inside, ",")
        return Collection(tuple(_distinct([read(item, both) for item in items[:_MAX_ITEMS]])))
    if len(text) < 2 or text[0] not in "([]" or text[-1] not in ")][":
        return None
    inside = text[1:-1]
    parts = top_level(inside, ",") if len(top_level(inside, ",")) > 1 else top_level(inside, ";")
    if len(parts) < 2 or not _balanced(inside):
        return None
    items = tuple(read(part, both) for part in parts[:_MAX_ITEMS])
    left, right = {"]": "("}.get(text[0], text[0]), {"[": ")"}.get(text[-1], text[-1])
    return Ordered(left, right, items)


def _balanced(text: str, opening: str = "([", closing: str = ")]") -> bool:
    """Whether brackets close in order; half-open intervals count as pairs too."""
    depth = 0
    for character in text:
        depth += (character in opening) - (character in closing)
        if depth < 0:
            return False
    return depth == 0


def _clock(text: str) -> Clock | None:
    if found := _TIME.fullmatch(text):
        hour, minute, second = int(found[1]), int(found[2]), int(found[3] or 0)
        half = (found[4] or "").lower()
    elif found := _HOUR.fullmatch(text):
        hour, minute, second, half = int(found[1]), 0, 0, found[2].lower()
    else:
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Clock(3600 * hour + 60 * minute + second, half)


def _based(text: str) -> Node | None:
    """A number with a base as its index: not ``x_2``, nor a digit that the base lacks."""
    found = _BASED.fullmatch(text)
    if found is None or not any(character.isdigit() for character in found[2]):
        return None
    base = _BASE_WORDS.get(found[3]) or int(found[3])
    try:
        value = int(found[1] + found[2].replace(" ", "").replace(",", ""), base)
    except ValueError:
        raise Unreadable(text) from None
    if base == 10:
        return Scalar(_sympy_integer(value))
    return Based(value, base)


def _sympy_integer(value: int) -> Any:
    import sympy

    return sympy.Integer(value)


def _matrix(found: re.Match[str], both: str) -> Node:
    """A matrix, with what is before it (a name or a factor) and after it (a transpose)."""
    kind, before, after = found["kind"], found["before"].strip(), found["after"].strip()
    if kind[0] == "V" or "\\begin" in after:
        raise Unreadable(found[0])
    body = _ROW_BREAK.split(_RULE.sub("", found["body"]))
    while body and not body[-1].strip():
        body.pop()
    rows = [[cell.strip() for cell in top_level(row, "&")] for row in body]
    if not rows or len({len(row) for row in rows}) != 1 or sum(map(len, rows)) > _MAX_ITEMS:
        raise Unreadable(found[0])
    cells = [[read(cell, both) for cell in row] for row in rows]
    if kind[0] == "v":
        if before or after or len(cells) != len(cells[0]):
            raise Unreadable(found[0])
        return _determinant(cells, found[0])
    if after:
        if not _TRANSPOSED.fullmatch(after) or not ("T" in after or "top" in after or "intercal" in after):
            raise Unreadable(found[0])
        cells = [list(column) for column in zip(*cells, strict=True)]
    before = before.removesuffix("\\cdot").removesuffix("\\times").strip()
    name = before.removesuffix("=").strip()
    if before.endswith("=") and _NAME.fullmatch(name):
        before = ""
    if before:
        factor = read_expression("-1" if before == "-" else before, both)
        if not all(isinstance(cell, Scalar) for row in cells for cell in row):
            raise Unreadable(found[0])
        cells = [[Scalar(factor * cell.value) for cell in row] for row in cells]  # pyright: ignore[reportAttributeAccessIssue]
    return Matrix(tuple(map(tuple, cells)))


def _matrices(text: str, both: str) -> Node:
    """A chain of matrices that are equal, or a sum of them; a product is not read."""
    sides = splits(text, "=")
    if len(sides) > 1:
        values = [read(side, both) for side in sides]
        if all(same(value, values[0]) for value in values[1:]):
            return values[-1]
        raise Unreadable(text)
    terms = [term.strip().removeprefix("+") for term in splits(text, r"(?=[-+])") if term.strip()]
    nodes = [read(term, both) for term in terms] if len(terms) > 1 else []
    grids = [node.rows for node in nodes if isinstance(node, Matrix)]
    if not grids or len(grids) < len(nodes) or len({(len(grid), len(grid[0])) for grid in grids}) > 1:
        raise Unreadable(text)
    return Matrix(
        tuple(tuple(_sum(cells, text) for cells in zip(*rows, strict=True)) for rows in zip(*grids, strict=True))
    )


def _sum(cells: Sequence[Node], text: str) -> Scalar:
    values = [cell.value for cell in cells if isinstance(cell, Scalar)]
    if len(values) < len(cells):
        raise Unreadable(text)
    return Scalar(sum(values))


def _determinant(cells: list[list[Node]], text: str) -> Node:
    import sympy

    if not all(isinstance(cell, Scalar) for row in cells for cell in row):
        raise Unreadable(text)
    return Scalar(sympy.Matrix([[cell.value for cell in row] for row in cells]).det())  # pyright: ignore[reportAttributeAccessIssue]


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and _FUNCTION_NAME.fullmatch(text) is None


def _equation(text: str, sides: list[str], both: str) -> Node:
    """``x = 5``, ``5 = x``, a chain ``2 + 3 = 5``, or an equation between expressions."""
    if not all(sides):
        raise Unreadable(text)
    names = [side for side in sides if _is_name(side)]
    if names and len(names) == len(sides):
        return Relation(read_expression(text, both)) if len(sides) == 2 else _fail(text)
    values = [read(side, both) for side in sides if not _is_name(side)]
    based = [value for value in values if isinstance(value, Based)]
    if based and len(values) == 2 and not names:  # "101_2 = 5" says both
        other = next(value for value in values if not isinstance(value, Based))
        if isinstance(other, Scalar) and same(other, Scalar(_sympy_integer(based[0].value))):
            return Equal((based[0], other))
        raise Unreadable(text)
    constant = all(not getattr(getattr(value, "value", None), "free_symbols", None) for value in values)
    if names or constant:
        if not all(same(value, values[0]) for value in values[1:]):
            raise Unreadable(text)  # "1 = 2 = 3": it says nothing
        return Named(names[0], values[-1], text) if names else values[-1]
    if len(sides) == 2:
        return Relation(read_expression(text, both))
    if all(same(value, values[0]) for value in values[1:]):
        return values[-1]
    raise Unreadable(text)


def _fail(text: str) -> Node:
    raise Unreadable(text)


def _approximate(sides: list[str], both: str) -> Node:
    """``\\sqrt{2} \\approx 1.41``: the exact value, or its rounding if it is one."""
    sides = [side.strip() for side in sides]
    values = [read(side, both) for side in sides if not _is_name(side)]
    if len(values) == 1:
        return values[0]
    if len(values) != 2 or len(splits(sides[-1], "=")) > 1:
        raise Unreadable(" ".join(sides))
    decimals = re.fullmatch(r"-?[0-9]*(?:\.([0-9]*))?", sides[-1])
    exact = values[0].value if isinstance(values[0], Named) else values[0]
    if (
        decimals is None
        or not isinstance(exact, Scalar)
        or not isinstance(values[1], Scalar)
        or exact.value.free_symbols
    ):
        raise Unreadable(" ".join(sides))
    half_unit = Fraction(1, 2 * 10 ** len(decimals[1] or ""))
    difference = (exact.value.doit() - values[1].value).evalf(30)
    if not difference.is_real or abs(difference) > float(half_unit) * (1 + 1e-9):
        raise Unreadable(" ".join(sides))
    return Equal((exact, values[1]))
