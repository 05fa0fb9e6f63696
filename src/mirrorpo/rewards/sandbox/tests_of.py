"""Plans: what the tests of a row ask of the program, decided from their text before any program runs.

The judge runs the tests. The program's process is asked to call functions by name with plain values, and answers with
plain values; it never sees the tests, the setup or an expected value. Where every test is a comparison of such a call
with a literal, no second process is needed: the calls are sent at once and this process compares.
"""

from __future__ import annotations

import ast
import functools
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mirrorpo.rewards.sandbox.assertions import Reach, entries, needs_arguments
from mirrorpo.rewards.sandbox.expectations import MARKS as PYTEST_MARKS
from mirrorpo.rewards.sandbox.expectations import NAMES as PYTEST_NAMES
from mirrorpo.rewards.sandbox.messages import Encoder, NotPlain
from mirrorpo.rewards.sandbox.roles import (
    BUILTINS,
    LIBRARY,
    TOOLS,
    Roles,
    bound_in,
    global_loads,
    parameters,
    parse,
    roles,
    standard_modules,
)

MAX_TEST_CHARACTERS = 1_000_000
_MAX_NODES = 200_000
_REMEMBERED = 4096
_MALFORMED = ("no tests", "tests are not texts", "tests are too long", "tests are not Python")
_OWN_NAMES = ("__future__", "unittest", "pytest")

_NOT_QUICK = BUILTINS | TOOLS | LIBRARY.keys()

Comparison = Literal["==", "!=", "is", "is not", "true", "false"]
_COMPARISONS: dict[type, Comparison] = {ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not"}


class BadTests(ValueError):
    """The tests of a row cannot be used; the message says why in a few words."""

    @property
    def malformed(self) -> bool:
        """Whether they are no tests at all, rather than tests that check nothing that the program computes."""
        return str(self) in _MALFORMED


class _NotSimple(Exception):
    """A test is more than a comparison of calls with literals."""


@dataclass(frozen=True)
class Call:
    """A call of the program.

    Attributes:
        name: of the function.
        arguments: as ``messages`` writes them.
        named: arguments with a name.
    """

    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A comparison of a call's result.

    Attributes:
        index: of the call.
        comparison: which one.
        literal: with what.
    """

    index: int
    comparison: Comparison = "true"
    literal: Any = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the tests of a row are run.

    Attributes:
        imports: import statements, for both processes.
        program: names that the program has to define.
        classes: those of them that stand for classes.
        instances: classes on whose instances the tests use attributes.
        attributes: attributes that the tests use on instances which they construct.
        called: names of the program that the tests call.
        entries: test functions and classes that a test runner would call.
        stubs: classes of the setup and the tests; the program knows their names and those of their methods.
        calls: what to ask the program, if comparisons with literals are all there is.
        checks: those comparisons; empty if a judge has to run the tests.
    """

    imports: str
    program: tuple[str, ...]
    classes: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    stubs: tuple[dict[str, Any], ...] = ()
    calls: tuple[Call, ...] = ()
    checks: tuple[Check, ...] = ()


def plan(tests: Sequence[Any], setup: str = "") -> Plan:
    """Plans the tests of a row; remembers what it has planned.

    Args:
        tests: Python texts.
        setup: Python text that runs before them, in the judge.

    Raises:
        BadTests: the row cannot be used: no tests, not Python, nothing asserted, a name that nothing defines, ...

    Example:
        >>> plan(["assert f(3) == {1, 2}"]).checks
        (Check(index=0, comparison='==', literal={1, 2}),)
    """
    if not isinstance(tests, list | tuple) or not tests:
        raise BadTests("no tests")
    for text in (*tests, setup):
        if not isinstance(text, str):
            raise BadTests("tests are not texts")
        if len(text) > MAX_TEST_CHARACTERS:
            raise BadTests("tests are too long")
    found = _plan(tuple(tests), setup)
    if isinstance(found, str):
        raise BadTests(found)
    return found


@functools.lru_cache(_REMEMBERED)
def _plan(tests: tuple[str, ...], setup: str) -> Plan | str:
    """The plan, or why there is none. Rows come from outside: whatever Python cannot read is the row's fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes: the row's author is not here to read it
            return _planned(tests, setup)
    except BadTests as error:
        return str(error)
    except (RecursionError, MemoryError, OverflowError):
        return "unusable tests: too deeply nested"


def _planned(tests: tuple[str, ...], setup: str) -> Plan:
    quick = None if setup.strip() else _quick(tests)
    if quick is not None:
        return quick
    bodies, prelude = [_tree(text) for text in tests], _tree(setup)
    trees = [prelude, *bodies]
    imported = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    _check_imports(imported)
    _check_pytest(trees, imported)
    missing = _missing_imports(trees, imported)
    trusted = {(a.asname or a.name).partition(".")[0] for node in [*imported, *missing] for a in node.names}
    found = roles(trees, trusted)
    if found.undefined:
        raise BadTests(f"tests use {min(found.undefined)[:40]}, which nothing defines")
    if found.judging:
        raise BadTests(f"tests judge by the program's own {min(found.judging)[:40]}: define it in the setup")
    reach = Reach(prelude, bodies, found.program)
    if not found.program or not reach.uses_program():
        raise BadTests("tests use nothing of the program")
    if not reach.asserts():
        raise BadTests("tests assert nothing")
    _check_structure(trees, bodies, found)
    unique = [node for node in [*map(_without_pytest, imported), *missing] if _is_for_both(node)]
    common: dict[str, Any] = {
        "imports": "\n".join(dict.fromkeys(ast.unparse(node) for node in unique)),
        "program": tuple(sorted(found.program)),
    }
    try:
        calls, checks = _simple(trees, found)
    except _NotSimple:
        return Plan(
            **common,
            classes=tuple(sorted(found.classes)),
            instances=tuple(sorted(found.instances)),
            attributes=tuple(sorted(found.attributes)),
            called=tuple(sorted(found.called)),
            entries=tuple(entries(bodies)),
            stubs=tuple(_stub(n, trees, found) for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)),
        )
    return Plan(**common, calls=calls, checks=checks)


def _quick(tests: tuple[str, ...]) -> Plan | None:
    """The plan of the commonest rows, calls compared with literals; as by the long way, in a tenth of the time."""
    calls: list[Call] = []
    checks: list[Check] = []
    try:
        statements = [node for text in tests for node in ast.parse(text).body]
        for statement in statements:
            if not isinstance(statement, ast.Assert):
                return None
            called = [n.func for n in ast.walk(statement.test) if isinstance(n, ast.Call)]
            names = {node.id for node in called if isinstance(node, ast.Name)}
            if len(called) != 1 or not names or names & _NOT_QUICK:
                return None
            checks.append(_check(statement.test, names, calls))
    except (SyntaxError, ValueError, _NotSimple):
        return None
    if not checks:
        return None
    return Plan(imports="", program=tuple(sorted({c.name for c in calls})), calls=tuple(calls), checks=tuple(checks))


def _tree(text: str) -> ast.Module:
    try:
        tree = parse(text)
        compile(tree, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        raise BadTests("tests are not Python") from None
    if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
        raise BadTests("unusable tests: too many parts")
    return tree


def _check_imports(imports: Iterable[ast.Import | ast.ImportFrom]) -> None:
    for node in imports:
        for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]:
            if name.partition(".")[0] not in sys.stdlib_module_names and name != "pytest":
                raise BadTests(f"tests import {name[:40]}, which the sandbox does not have")


def _check_pytest(trees: list[ast.Module], imported: list[ast.Import | ast.ImportFrom]) -> None:
    """Refuses what the judge's own pytest does not have."""
    modules = [alias for node in imported if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name for alias in modules if alias.name == "pytest"}
    used = {a.name for node in imported if getattr(node, "module", "") == "pytest" for a in node.names}
    marks: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
        if isinstance(node.value, ast.Name) and node.value.id in names:
            used.add(node.attr)
        elif ast.unparse(node.value) in {"mark", *(f"{name}.mark" for name in names)} and names | used:
            marks.add(node.attr)
    for name in sorted(used - PYTEST_NAMES) + sorted(f"mark.{mark}" for mark in marks - PYTEST_MARKS):
        raise BadTests(f"tests need pytest.{name[:40]}, which the sandbox does not have")


def _without_pytest(node: ast.Import | ast.ImportFrom) -> ast.Import | ast.ImportFrom:
    if isinstance(node, ast.ImportFrom):
        return node
    return ast.Import([alias for alias in node.names if alias.name != "pytest"])


def _is_for_both(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether the program gets an import as well as the judge."""
    return bool(node.names) and getattr(node, "module", "") not in _OWN_NAMES


def _missing_imports(trees: list[ast.Module], imported: list[Any]) -> list[ast.Import | ast.ImportFrom]:
    """Imports that the tests need and do not have: ``math.isclose`` without ``import math``, ``Counter``."""
    known = {name for tree in trees for name in bound_in(tree.body)}
    known |= {(alias.asname or alias.name).partition(".")[0] for node in imported for alias in node.names}
    wanted: dict[str, ast.Import | ast.ImportFrom] = {}
    for statement in (node for tree in trees for node in tree.body):
        loads = list(global_loads(statement))
        names = {node.id for node in loads} - known
        bases = {id(n.value) for n in ast.walk(statement) if isinstance(n, ast.Attribute)}
        for name in standard_modules(node.id for node in loads if id(node) in bases and node.id in names):
            wanted[name] = ast.Import(names=[ast.alias(name=name)])
        for name in sorted(names & LIBRARY.keys()):
            # Alone, such a name is the function under test; beside another one, it is a tool of the test.
            if names - {name} - BUILTINS:
                wanted[name] = ast.ImportFrom(module=LIBRARY[name], names=[ast.alias(name=name)], level=0)
    return [ast.fix_missing_locations(node) for node in wanted.values()]


def _check_structure(trees: list[ast.Module], bodies: list[ast.Module], found: Roles) -> None:
    """Refuses what cannot be run between two processes."""
    needy = needs_arguments(bodies, entries(bodies))
    if needy is not None:
        raise BadTests(f"tests need arguments for {needy[:40]}, which nothing gives")
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in found.program and not base.id.endswith(("Error", "Exception")):
                raise BadTests(f"tests derive a class from the program's {base.id[:40]}")


def _stub(node: ast.ClassDef, trees: list[ast.Module], found: Roles) -> dict[str, Any]:
    """What the program may know of a class that the tests define: names, and whether constructing it tells anything.

    Of an enumeration whose members are handed to the program it is told the members.
    """
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
    init = next((method for method in methods if method.name == "__init__"), None)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return {
        "name": node.name,
        "bases": bases,
        "members": _members(node) if _is_handed_over(node.name, trees, found) else None,
        "methods": [method.name for method in methods],
        "simple": init is None or all(_only_stores(s, {a.arg for a in parameters(init.args)}) for s in init.body),
    }


def _members(node: ast.ClassDef) -> list[list[Any]] | None:
    """Names and values of an enumeration; None if it is none, or not one of plain values."""
    if not any(getattr(base, "attr", getattr(base, "id", "")) == "Enum" for base in node.bases):
        return None
    pairs = [(s.targets[0], s.value) for s in node.body if isinstance(s, ast.Assign)]
    found: list[list[Any]] = []
    for number, (target, value) in enumerate(pairs, 1):
        automatic = isinstance(value, ast.Call) and ast.unparse(value.func).endswith("auto")
        if not isinstance(target, ast.Name) or not (automatic or isinstance(value, ast.Constant)):
            return None
        plain = value.value if isinstance(value, ast.Constant) else number
        if type(plain) not in (int, str, float, bool):
            return None
        found.append([target.id, plain])
    return found


def _is_handed_over(name: str, trees: list[ast.Module], found: Roles) -> bool:
    """Whether the tests call the program with something of a class of theirs: ``flip(Color.RED)``."""
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    ours = [c for c in calls if {p.id for p in ast.walk(c.func) if isinstance(p, ast.Name)} & found.program]
    parts = (part for call in ours for argument in call.args for part in ast.walk(argument))
    return any(isinstance(p, ast.Attribute) and isinstance(p.value, ast.Name) and p.value.id == name for p in parts)


def _only_stores(statement: ast.stmt, given: set[str]) -> bool:
    """``self.x = x``, ``self.x = None``, ``self.x = []``, a docstring: a constructor that tells nothing."""
    if isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    ):
        return True
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return False
    value = statement.value
    if isinstance(value, ast.List | ast.Tuple):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.Constant):
        return value.value in (None, True, False, 0, 1, "")
    return isinstance(value, ast.Name) and value.id in given


def _simple(trees: list[ast.Module], found: Roles) -> tuple[tuple[Call, ...], tuple[Check, ...]]:
    """Calls and comparisons, if they are all there is.

    Raises:
        _NotSimple: the tests need a judge.
    """
    prelude, *bodies = trees
    if any(not isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef) for node in prelude.body):
        raise _NotSimple
    calls: list[Call] = []
    checks: list[Check] = []
    for statement in (node for tree in bodies for node in tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
            continue
        if not isinstance(statement, ast.Assert):
            raise _NotSimple
        checks.append(_check(statement.test, found.program, calls))
    if any(isinstance(node, ast.FunctionDef) and node.name in found.program for node in prelude.body):
        raise _NotSimple
    return tuple(calls), tuple(checks)


def _check(test: ast.expr, program: set[str], calls: list[Call]) -> Check:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Check(_call(test.operand, program, calls), "false")
    if not isinstance(test, ast.Compare):
        return Check(_call(test, program, calls), "true")
    comparison = _COMPARISONS.get(type(test.ops[0]))
    if len(test.ops) != 1 or comparison is None:
        raise _NotSimple
    sides = [test.left, test.comparators[0]]
    if not isinstance(sides[0], ast.Call) or getattr(sides[0].func, "id", "") not in program:
        sides.reverse()
    literal = _literal(sides[1])
    if comparison in ("is", "is not") and not (literal is None or isinstance(literal, bool)):
        raise _NotSimple
    return Check(_call(sides[0], program, calls), comparison, literal)


def _call(node: ast.expr, program: set[str], calls: list[Call]) -> int:
    """The number of a call of the program with literals."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in program:
        raise _NotSimple
    encode = Encoder().encode
    try:
        arguments = tuple(encode(_literal(argument)) for argument in node.args)
        named = {str(k.arg): encode(_literal(k.value)) for k in node.keywords if k.arg is not None}
    except NotPlain:
        raise _NotSimple from None
    if len(named) != len(node.keywords):
        raise _NotSimple
    calls.append(Call(node.func.id, arguments, named))
    return len(calls) - 1


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise _NotSimple from None
