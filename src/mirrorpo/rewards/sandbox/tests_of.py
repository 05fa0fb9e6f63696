"""Which part of a test does the candidate compute, and which part is the judge's?

``assert set(f(3)) == {1, 2}`` becomes the call ``f(3)``, for the candidate's process, and the rest
``set(_value_0) == {1, 2}``, for the judge. If the rest is a comparison with a literal, no second process is needed.
Texts that cannot be split so (loops, ``try``, helper functions, a name used without a call) are run whole by a judge to
whom the candidate is a remote object (``remote.py``).
"""

from __future__ import annotations

import ast
import builtins
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

MAX_TEST_CHARACTERS = 1_000_000
_PLACEHOLDER = "_value_"
# Used in tests whose authors left the import to the solution. Taken from the library, lest a program bring its own.
_WELL_KNOWN = {
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple", "ChainMap"), "collections"),
    **dict.fromkeys(("isclose", "sqrt", "pi", "inf", "nan", "isnan"), "math"),
    "Fraction": "fractions",
    "Decimal": "decimal",
}

Comparison = Literal["==", "!=", "true", "false"]


class BadTests(ValueError):
    """The tests of a row cannot be used; the message says why in a few words."""


class _Unsplittable(Exception):
    """The expression uses the candidate otherwise than by closed calls."""


@dataclass(frozen=True)
class Check:
    """What the judge does with the values that came back.

    Attributes:
        rest: an expression over ``_value_0``, ``_value_1``, ...
        index: the value to compare, if a comparison with a literal is all there is; else None.
        comparison: which one.
        literal: with what.
    """

    rest: str
    index: int | None = None
    comparison: Comparison = "true"
    literal: Any = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the tests of a row are run.

    Attributes:
        imports: import statements, for every process.
        setup: the row's setup.
        calls: expressions for the candidate's process.
        checks: for the judge; one per assertion.
        live: texts to run against a remote candidate instead; empty if calls and checks say all.
    """

    imports: str
    setup: str
    calls: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    live: tuple[str, ...] = ()


def plan(tests: Sequence[Any], setup: str = "") -> Plan:
    """Splits the tests of a row.

    Args:
        tests: Python texts.
        setup: Python text that runs before them.

    Returns:
        What each process has to do.

    Raises:
        BadTests: no tests, not texts, not Python, or nothing in them that the candidate computes.

    Example:
        >>> plan(["assert set(f(3)) == {1, 2}"]).checks[0].rest
        'set(_value_0) == {1, 2}'
    """
    if not isinstance(tests, list | tuple) or not tests:
        raise BadTests("no tests")
    trees = [_parse(text) for text in (*tests, setup)]
    *bodies, prelude = trees
    imported = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    _check_imports(imported)
    statements = [node for tree in bodies for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    imported += _missing_imports(statements, imported)
    top = [node for node in imported if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    imports = "\n".join(dict.fromkeys(ast.unparse(node) for node in top))
    trusted = _bound_by(imported) | set(vars(builtins))
    splitter = _Splitter(trusted)
    try:
        checks = tuple(splitter.check(node) for node in statements)
    except _Unsplittable:
        if not _uses_candidate(bodies, trusted):
            raise BadTests("tests use nothing of the program") from None
        return Plan(imports=imports, setup=setup, live=tuple(tests))
    if not splitter.calls:
        raise BadTests("tests use nothing of the program")
    assert isinstance(prelude, ast.Module)
    return Plan(imports=imports, setup=setup, calls=tuple(splitter.calls), checks=checks)


def _parse(text: Any) -> ast.Module:
    if not isinstance(text, str) or len(text) > MAX_TEST_CHARACTERS:
        raise BadTests("tests are not texts" if not isinstance(text, str) else "tests are too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes: the row's author is not here to read it
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadTests("tests are not Python") from None


def _check_imports(imports: list[Any]) -> None:
    for node in imports:
        for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                raise BadTests(f"tests import {name[:40]}, which the sandbox does not have")


def _bound_by(imports: list[Any]) -> set[str]:
    return {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _missing_imports(statements: list[ast.stmt], imported: list[Any]) -> list[Any]:
    """Imports that the tests need and do not have: ``math.isclose`` without ``import math``, ``Counter``."""
    known = _bound_by(imported)
    wanted: dict[str, ast.stmt] = {}
    for statement in statements:
        names = _names(statement)
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id
                if name in sys.stdlib_module_names and name not in known:
                    wanted[name] = ast.Import(names=[ast.alias(name=name)])
        for name in sorted(names & _WELL_KNOWN.keys() - known):
            # Alone, such a name is the function under test; beside another one, it is a tool of the test.
            if names - {name} - set(vars(builtins)) - known:
                wanted[name] = ast.ImportFrom(module=_WELL_KNOWN[name], names=[ast.alias(name=name)], level=0)
    return [ast.fix_missing_locations(node) for node in wanted.values()]


def _uses_candidate(bodies: list[ast.Module], trusted: set[str]) -> bool:
    bound = {n.id for tree in bodies for n in ast.walk(tree) if isinstance(n, ast.Name) and type(n.ctx) is not ast.Load}
    bound |= {n.name for tree in bodies for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {n.arg for tree in bodies for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return any(_names(tree) - trusted - bound for tree in bodies)


class _Splitter:
    """Collects calls over all assertions of a row."""

    def __init__(self, trusted: set[str]) -> None:
        self._trusted = trusted
        self._local: set[str] = set()
        self._own: set[str] = set()
        self.calls: list[str] = []

    def check(self, statement: ast.stmt) -> Check:
        """The judge's part of an assertion; remembers the candidate's part."""
        if not isinstance(statement, ast.Assert):
            raise _Unsplittable
        test = statement.test
        self._local = {n.id for n in ast.walk(test) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self._local |= {n.arg for n in ast.walk(test) if isinstance(n, ast.arg)}
        self._own = _names(test) - self._trusted - self._local
        if not self._own:  # the function under test has the name of a built-in one
            self._own = {n.func.id for n in _calls(test)[:1] if isinstance(n.func, ast.Name)}
        return _check(self._split(test))

    def _split(self, node: Any) -> Any:
        """The node with the candidate's calls replaced."""
        if not _names(node) & self._own:
            return node
        root, has_call = node, False
        while isinstance(root, ast.Call | ast.Attribute | ast.Subscript):
            has_call |= isinstance(root, ast.Call)
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name) and root.id in self._own:
            if not has_call or _names(node) & self._local:
                raise _Unsplittable
            self.calls.append(ast.unparse(node))
            return ast.Name(id=f"{_PLACEHOLDER}{len(self.calls) - 1}", ctx=ast.Load())
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, field, [self._split(v) if isinstance(v, ast.AST) else v for v in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self._split(value))
        return node


def _calls(node: ast.AST) -> list[ast.Call]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Call)]


def _index(node: ast.AST) -> int | None:
    if isinstance(node, ast.Name) and node.id.startswith(_PLACEHOLDER):
        return int(node.id.removeprefix(_PLACEHOLDER))
    return None


def _check(test: ast.expr) -> Check:
    rest = ast.unparse(test)
    if _index(test) is not None:
        return Check(rest, _index(test), "true")
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _index(test.operand) is not None:
        return Check(rest, _index(test.operand), "false")
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.NotEq):
        sides = (test.left, test.comparators[0])
        for side, other in (sides, sides[::-1]):
            if _index(side) is not None and not _names(other) - {"set"}:
                try:
                    literal = ast.literal_eval(other)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    break
                return Check(rest, _index(side), "==" if isinstance(test.ops[0], ast.Eq) else "!=", literal)
    return Check(rest)
