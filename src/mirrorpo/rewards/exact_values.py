"""Exact equality of what answers state, and of sympy's expressions, relations and sets in them: nothing is rounded.

Constants are told apart by 60 digits and made equal by simplification; expressions with variables are compared at
rational points, negative ones included.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirrorpo.rewards.latex import read_expression
from mirrorpo.rewards.notation import Unreadable
from mirrorpo.rewards.units import conflict

_DIGITS = 60
# Digits on which constants that no simplification decides must agree.
_MANY_DIGITS = 1000
_MAX_LOG10 = 20_000.0
_MILLION = 10**6
_MAX_FACTORIAL = 5_000
# Generic rational points: no small integers, some negative.
_POINTS = ((17, 13), (-29, 31), (53, 19), (-7, 23))


class Node:
    """A readable answer."""


@dataclass(frozen=True)
class Scalar(Node):
    """An expression, with its unit; ``percent`` where a percent sign follows."""

    value: Any
    percent: bool = False
    unit: Any = None


@dataclass(frozen=True)
class Named(Node):
    """``x = ...``: a value with a name."""

    name: str
    value: Node
    text: str


@dataclass(frozen=True)
class Relation(Node):
    """Equations and inequalities that hold together, as the grammar reads them."""

    value: Any


@dataclass(frozen=True)
class Region(Node):
    """A set that is not listed: intervals, unions, the reals."""

    value: Any


@dataclass(frozen=True)
class Collection(Node):
    """Solutions in any order: a list or a set in braces."""

    items: tuple[Node, ...]


class PlusMinus(Collection):
    """The values of an expression with a plus-minus sign; in a list or a set they are items of their own."""


@dataclass(frozen=True)
class Ordered(Node):
    """A tuple, point, vector or interval: items in order between brackets."""

    left: str
    right: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Matrix(Node):
    """Rows of cells."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Based(Node):
    """A number in a base other than ten."""

    value: int
    base: int


@dataclass(frozen=True)
class Clock(Node):
    """A time of day in seconds; ``half`` is "a", "p" or unknown."""

    seconds: int
    half: str


@dataclass(frozen=True)
class Equal(Node):
    """One value in several forms, any of which may be asked for: "101_2 = 5", or a number and its rounding."""

    forms: tuple[Node, ...]


class TooLarge(ValueError):
    """A number too large to be written down."""


def check_size(expression: Any) -> None:
    """Refuses towers of powers and huge factorials before anything evaluates them.

    Raises:
        TooLarge: as said.
    """
    import sympy

    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow) and not part.free_symbols:
            _log10(part)
        elif isinstance(part, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma | sympy.subfactorial):
            sizes = [_log10(argument) for argument in part.args if not argument.free_symbols]
            if max(sizes, default=0.0) > math.log10(_MAX_FACTORIAL):
                raise TooLarge(str(part.func))


def _log10(value: Any) -> float:
    """The decimal logarithm of a constant's size, roughly; small numbers count as 1."""
    import sympy

    if isinstance(value, sympy.Rational):
        return max(math.log10(max(abs(value.p), value.q)), 0.3) if value else 0.3
    if isinstance(value, sympy.factorial):
        inner = _log10(value.args[0])
        if inner > math.log10(_MAX_FACTORIAL):
            raise TooLarge("factorial")
        return 10**inner * inner
    if isinstance(value, sympy.Pow):
        base, exponent = (_log10(argument) for argument in value.args)
        if exponent > 6:
            raise TooLarge("power")
        known = _small(value.args[1])
        size = base * (10**exponent if known is None else known)
        if size > _MAX_LOG10:
            raise TooLarge("power")
        return size
    sizes = [_log10(argument) for argument in getattr(value, "args", ())]
    if isinstance(value, sympy.Mul):
        return sum(sizes)
    return max(sizes, default=1.0) + 1.0


def _small(value: Any) -> int | None:
    """The size of a whole number below a million, powers worked out; None for anything else."""
    import sympy

    if isinstance(value, sympy.Integer):
        return abs(int(value)) if abs(value) < _MILLION else None
    if isinstance(value, sympy.Pow):
        base, exponent = map(_small, value.args)
        if base and exponent is not None and exponent * math.log10(base) < math.log10(_MILLION):
            return base**exponent if value.args[1] >= 0 else None
    return None


def same_expression(left: Any, right: Any) -> bool:
    """Whether two expressions are equal for all values of their variables.

    Raises:
        Unreadable: one of them is undefined (1/0).
    """
    if left == right:
        return True
    for side in (left, right):
        check_size(side)
    left, right = left.doit(), right.doit()
    return _same(left, right)


def _same(left: Any, right: Any) -> bool:
    import sympy

    if left.has(sympy.nan, sympy.zoo) or right.has(sympy.nan, sympy.zoo):
        return False
    if left == right:
        return True
    if left.is_Rational and right.is_Rational:
        return False
    if left.is_infinite or right.is_infinite:
        return False
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if left.has(sympy.core.function.AppliedUndef) or right.has(sympy.core.function.AppliedUndef):  # pyright: ignore[reportAttributeAccessIssue]
        return sympy.simplify(left - right) == 0
    return _same_function(left, right, symbols) if symbols else _same_constant(left, right)


def _same_function(left: Any, right: Any, symbols: list[Any]) -> bool:
    """Whether two expressions agree at generic rational points: to 60 digits at all of them, exactly at the first."""
    import sympy

    defined, complex_only = [], []
    for top, bottom in _POINTS:
        point = {
            symbol: sympy.Rational(top * (1 + 2 * index) + index, bottom + index)
            for index, symbol in enumerate(symbols)
        }
        values = [side.subs(point) for side in (left, right)]
        if any(value.free_symbols for value in values):  # an integral that is left over, a sum without bounds
            return sympy.simplify(left - right) == 0
        if any(value.has(sympy.nan, sympy.zoo) for value in values):
            continue
        for value in values:
            check_size(value)
        # "sqrt(1/n)" is "1/sqrt(n)" where both are real; where neither is, roots have several values.
        if not any(side.has(sympy.I) for side in (left, right)) and not any(value.is_real for value in values):
            complex_only.append(values)
            continue
        if _differ(*values):
            return False
        defined.append(values)
    if len(defined) < 2:
        if any(_differ(*values) for values in complex_only):
            return False
        defined += complex_only
    return len(defined) >= 2 and _same_constant(*defined[0])


def _differ(left: Any, right: Any) -> bool | None:
    """Whether two constants differ within 60 digits; None if that many cannot be had."""
    import sympy

    difference = left - right
    if difference.is_Rational:
        return bool(difference != 0)
    sides = [side.evalf(_DIGITS) for side in (left, right)]
    if not all(_is_number(side) for side in sides):
        return None
    scale = max(abs(sides[0]), abs(sides[1]))
    return bool(abs(sides[0] - sides[1]) > scale * sympy.Float(10) ** (15 - _DIGITS))


def _same_constant(left: Any, right: Any) -> bool:
    import sympy

    if (differ := _differ(left, right)) is True:
        return False
    simple = left - right if (left - right).is_Rational else sympy.simplify(left - right)
    if simple.is_Rational or differ is None:
        return bool(simple == 0)
    decided = simple.equals(0)
    if decided is not None:
        return bool(decided)
    sides = [side.evalf(_MANY_DIGITS) for side in (left, right)]
    scale = max(abs(sides[0]), abs(sides[1]))
    return bool(abs(sides[0] - sides[1]) <= scale * sympy.Float(10, _MANY_DIGITS) ** (15 - _MANY_DIGITS))


def _is_number(value: Any) -> bool:
    return all(part.is_Float or part.is_Rational for part in value.as_real_imag())


def same_set(left: Any, right: Any) -> bool:
    """Whether two sets of sympy have the same members."""
    import sympy

    left, right = left.doit(), right.doit()
    if left == right:
        return True
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        return (
            (left.left_open, left.right_open) == (right.left_open, right.right_open)
            and _same(left.start, right.start)
            and _same(left.end, right.end)
        )
    try:
        return left.symmetric_difference(right).is_empty is True
    except (NotImplementedError, TypeError, AttributeError):
        return False


def same_relation(left: Any, right: Any) -> bool:
    """Whether two relations (or conjunctions) say the same up to a factor and the order of their parts.

    ``y = 2x + 1`` is ``2x - y + 1 = 0``; ``x < 5`` is ``5 > x``.
    """
    sides = [_parts(relation) for relation in (left, right)]
    if len(sides[0]) != len(sides[1]):
        return False
    return any(
        all(map(_same_part, sides[0], order)) for order in itertools.islice(itertools.permutations(sides[1]), 24)
    )


def _parts(relation: Any) -> list[tuple[str, Any]]:
    """Each relation as an operator of "=", "!=", "<", "<=" and the difference of its sides."""
    import sympy

    if getattr(relation, "is_Relational", False):
        difference = relation.lhs - relation.rhs
        if isinstance(relation, sympy.Eq | sympy.Ne):
            return [("=" if isinstance(relation, sympy.Eq) else "!=", difference)]
        strict = isinstance(relation, sympy.StrictLessThan | sympy.StrictGreaterThan)
        less = isinstance(relation, sympy.StrictLessThan | sympy.LessThan)
        return [("<" if strict else "<=", difference if less else -difference)]
    return [part for argument in relation.args for part in _parts(argument)]


def _same_part(left: tuple[str, Any], right: tuple[str, Any]) -> bool:
    import sympy

    if left[0] != right[0]:
        return False
    try:
        for side in (left[1], right[1]):
            check_size(side)
        ratio = sympy.cancel(sympy.together(left[1].doit() / right[1].doit()))
    except (ZeroDivisionError, sympy.PolynomialError, AttributeError, TypeError):
        return False
    if ratio.free_symbols or ratio.has(sympy.nan, sympy.zoo) or ratio == 0:
        return False
    return bool(ratio.is_positive) if left[0] in ("<", "<=") else True


def same(left: Node, right: Node) -> bool:
    """Whether two structures are equal, exactly."""
    if isinstance(left, Equal):
        return any(same(form, right) for form in left.forms)
    if isinstance(right, Equal):
        return any(same(left, form) for form in right.forms)
    if isinstance(left, Named) and isinstance(right, Named):
        return (_same_name(left.name, right.name) and same(left.value, right.value)) or _same_as_relations(left, right)
    if isinstance(left, Named) or isinstance(right, Named):
        named, other = (left, right) if isinstance(left, Named) else (right, left)
        assert isinstance(named, Named)
        if isinstance(other, Relation):
            return _same_as_relations(left, right)
        return same(named.value, other)
    if isinstance(left, Collection) or isinstance(right, Collection):
        return _same_collection(left, right)
    if isinstance(left, Scalar) and isinstance(right, Scalar):
        return _same_scalar(left, right)
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        return len(left.rows) == len(right.rows) and all(map(_same_in_order, left.rows, right.rows))
    if isinstance(left, Ordered) and isinstance(right, Ordered):
        return (left.left, left.right) == (right.left, right.right) and _same_in_order(left.items, right.items)
    if isinstance(left, Based) and isinstance(right, Based):
        return left == right
    if isinstance(left, Clock) and isinstance(right, Clock):
        if (left.half and right.half) or not (left.half or right.half):
            return left.seconds == right.seconds
        return (left.seconds - right.seconds) % 43200 == 0
    return _same_region(left, right)


def _same_region(left: Node, right: Node) -> bool:
    import sympy

    sets = [_as_set(node) for node in (left, right)]
    if all(value is not None for value in sets) and not (isinstance(left, Relation) and isinstance(right, Relation)):
        return same_set(*sets)
    if isinstance(left, Relation) and isinstance(right, Relation):
        if same_relation(left.value, right.value):
            return True
        inequalities = not any(node.value.atoms(sympy.Eq, sympy.Ne) for node in (left, right))
        return inequalities and all(value is not None for value in sets) and same_set(*sets)
    return False


def _same_name(left: str, right: str) -> bool:
    left, right = (re.sub(r"[\s{}]|\\text|\\mathrm", "", name) for name in (left, right))
    words = [name for name in (left, right) if len(name) > 3 and name.isalpha()]
    return left == right or bool(words)


def _same_as_relations(left: Node, right: Node) -> bool:
    values = []
    for node in (left, right):
        if isinstance(node, Relation):
            values.append(node.value)
        elif isinstance(node, Named) and isinstance(node.value, Scalar):
            values.append(_as_equation(node))
        else:
            return False
    return all(value is not None for value in values) and same_relation(*values)


def _as_equation(named: Named) -> Any:
    import sympy

    assert isinstance(named.value, Scalar)
    try:
        return sympy.Eq(read_expression(named.name, named.text), named.value.value, evaluate=False)
    except Unreadable:
        return None


def _as_set(node: Node) -> Any:
    """The set of reals that a node may stand for; None if it stands for none."""
    import sympy

    if isinstance(node, Region):
        return node.value
    if isinstance(node, Ordered) and len(node.items) == 2 and all(isinstance(item, Scalar) for item in node.items):
        start, end = (item.value for item in node.items)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return sympy.Interval(start, end, node.left == "(", node.right == ")")
        except ValueError:
            return None
    if isinstance(node, Relation) and len(node.value.free_symbols) == 1:
        try:
            return node.value.as_set()
        except (NotImplementedError, ValueError, TypeError, AttributeError):
            return None
    return None


def _same_in_order(left: Sequence[Node], right: Sequence[Node]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _same_collection(left: Node, right: Node) -> bool:
    sides = [node.items if isinstance(node, Collection) else (node,) for node in (left, right)]
    if len(sides[0]) != len(sides[1]):
        return False
    rest = list(sides[1])
    for item in sides[0]:
        found = next((index for index, other in enumerate(rest) if same(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _same_scalar(left: Scalar, right: Scalar) -> bool:
    if left.unit is not None and right.unit is not None and conflict(left.unit, right.unit):
        return False
    if same_expression(left.value, right.value):
        return True
    if left.percent == right.percent:
        return False
    share, other = (left, right) if left.percent else (right, left)
    return same_expression(share.value / 100, other.value)
