"""The judge: runs the text of the tests, with the program at the other end of a channel.

Standard library only; runs in the judge's process.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

from mirrorpo.rewards.sandbox import expectations
from mirrorpo.rewards.sandbox.link import Link
from mirrorpo.rewards.sandbox.live import MADE, Function, Live, Refused
from mirrorpo.rewards.sandbox.raised import ENDINGS
from mirrorpo.rewards.sandbox.roles import parse

_ENDING_NAMES = frozenset(kind.__name__ for kind in ENDINGS)
_ITERATING = frozenset(
    ("map", "zip", "all", "any", "sum", "list", "tuple", "set", "sorted", "filter", "next", "iter", "for")
)
_SETTLE, _PRESENT, _TRUE = "_mirrorpo_settle", "_mirrorpo_present", "_mirrorpo_counted"
_SAME = "_mirrorpo_same"


class Unscored(Exception):
    """Nothing was asserted while the tests ran, and not because of the program."""


def run(job: dict[str, Any], link: Link) -> None:
    """Runs setup and tests; returns if they pass.

    Raises:
        AssertionError: a test is false.
        Refused: the tests used a live object as only the program could answer.
        BaseException: whatever else setup, tests or the program raise.
    """
    module = types.ModuleType("__main__")
    module.__file__ = "tests.py"
    sys.modules["__main__"] = module
    sys.modules["pytest"] = expectations
    names = module.__dict__
    texts = _Texts()
    counted = {"asserted": 0}
    names.update({_SETTLE: link.settle, _PRESENT: _present, _SAME: link.same, _TRUE: _counter(counted)})
    link.callbacks.namespace = names
    link.endings_allowed = texts.allows_endings
    names.update(exit=sys.exit, quit=sys.exit)
    # Tests that end their process mean to say how they ended.
    os._exit = sys.exit  # type: ignore[assignment]
    # The runner below is ours: one of the tests' own would end the judge, or run everything twice.
    unittest.main = lambda *_, **__: None  # type: ignore[assignment,misc]
    exec(compile(job["imports"], "<imports>", "exec"), names)
    for name in job["program"]:
        names[name] = link.name(name)
    for index, text in enumerate([job["setup"], *job["tests"]]):
        try:
            exec(texts.compiled(text, f"<tests {index}>"), names)
        except SystemExit as ended:
            # ``sys.exit(0)`` at the end of a test, if it is the test's own.
            if ended is link.raised or ended.code:
                raise
        link.settle()
    for name in job["entries"]:
        _run_entry(names.get(name), link)
    if link.refused:
        raise Refused(link.refused)
    if not counted["asserted"] and texts.only_asserts:
        # If the program has had a say, it may have seen to that.
        raise AssertionError("nothing was asserted") if link.used else Unscored("nothing was asserted")


def _counter(counted: dict[str, int]) -> Callable[[Any], Any]:
    def count(value: Any) -> Any:
        counted["asserted"] += 1
        return value

    return count


def _present(value: Any) -> Any:
    """The truth of a variable or an attribute in ``while node:``: an object that the tests did not make is there."""
    return True if isinstance(value, Live) and vars(value)["_origin"] != MADE else value


class _Texts:
    """Texts of the tests, made ready: what the program changes in its arguments shows after the statement."""

    def __init__(self) -> None:
        self._allowed: list[tuple[str, int, int]] = []
        self.only_asserts = True

    def compiled(self, text: str, name: str) -> types.CodeType:
        """The code of a text."""
        tree = parse(text)
        for node in ast.walk(tree):
            self._look_at(node, name)
        return compile(ast.fix_missing_locations(_Rewriter().visit(tree)), name, "exec", dont_inherit=True)

    def _look_at(self, node: ast.AST, name: str) -> None:
        """Takes down where ``StopIteration`` is expected, and whether asserting is done by ``assert`` alone."""
        imported = isinstance(node, ast.Import | ast.ImportFrom) and "pytest" in ast.unparse(node)
        if (imported or isinstance(node, ast.Try | ast.With | ast.Raise | ast.ClassDef)) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")
        ):
            self.only_asserts = False
        expecting: list[ast.AST] = []
        body: list[ast.AST] = []
        if isinstance(node, ast.Try):
            expecting = [part for h in node.handlers if h.type is not None for part in ast.walk(h.type)]
            body = [*node.body]
        elif isinstance(node, ast.With | ast.AsyncWith):
            expecting = [part for item in node.items for part in ast.walk(item.context_expr)]
            body = [*node.body]
        elif isinstance(node, ast.Expr):
            expecting, body = list(ast.walk(node)), [node]
        if not any(isinstance(part, ast.Name) and part.id in _ENDING_NAMES for part in expecting):
            return
        for statement in body:
            if not any(_iterates(part) for part in ast.walk(statement)):
                self._allowed.append((name, statement.lineno, statement.end_lineno or statement.lineno))  # type: ignore[attr-defined]

    def allows_endings(self) -> bool:
        """Whether the statement that runs expects ``StopIteration`` and calls the program itself."""
        frame = sys._getframe()
        while frame is not None:
            name, line = frame.f_code.co_filename, frame.f_lineno
            if name.startswith("<tests"):
                return any(name == text and first <= line <= last for text, first, last in self._allowed)
            frame = frame.f_back
        return False


def _iterates(node: ast.AST) -> bool:
    if isinstance(
        node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.For | ast.AsyncFor | ast.Starred
    ):
        return True
    return isinstance(node, ast.Name) and node.id in _ITERATING


class _Rewriter(ast.NodeTransformer):
    """Inserts what the judge has to know between and inside statements."""

    def _after(self, node: ast.stmt) -> list[ast.stmt]:
        self.generic_visit(node)
        if not any(isinstance(part, ast.Call) for part in ast.walk(node)):
            return [node]
        settle = ast.Expr(ast.Call(ast.Name(_SETTLE, ast.Load()), [], []))
        return [node, ast.copy_location(settle, node)]

    visit_Expr = visit_Assign = visit_AugAssign = visit_AnnAssign = _after

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        node.test = ast.copy_location(ast.Call(ast.Name(_TRUE, ast.Load()), [node.test], []), node.test)
        return self._after(node)

    def visit_If(self, node: ast.If | ast.While | ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = self._presence(node.test)
        return node

    visit_While = visit_IfExp = visit_If

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Is | ast.IsNot):
            return node
        call: ast.expr = ast.Call(ast.Name(_SAME, ast.Load()), [node.left, node.comparators[0]], [])
        if isinstance(node.ops[0], ast.IsNot):
            call = ast.UnaryOp(ast.Not(), call)
        return ast.copy_location(call, node)

    def _presence(self, test: ast.expr) -> ast.expr:
        if isinstance(test, ast.BoolOp):
            test.values = [self._presence(value) for value in test.values]
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test.operand = self._presence(test.operand)
        elif isinstance(test, ast.Name | ast.Attribute):
            return ast.copy_location(ast.Call(ast.Name(_PRESENT, ast.Load()), [test], []), test)
        return test


def _run_entry(entry: Any, link: Link) -> None:
    """A test function, or a class of tests."""
    if isinstance(entry, type) and issubclass(entry, unittest.TestCase):
        _run_test_case(entry)
    elif isinstance(entry, type):
        for once in ("setup_class", "setUpClass"):
            _call(getattr(entry, once, None))
        for name in [name for name in dir(entry) if name.startswith("test")]:
            instance = entry()
            for before in ("setUp", "setup_method", "setup"):
                _call(getattr(instance, before, None))
            _call(getattr(instance, name))
            for after in ("tearDown", "teardown_method", "teardown"):
                _call(getattr(instance, after, None))
            link.settle()
    elif not isinstance(entry, Function) and callable(entry):
        parameters = inspect.signature(entry).parameters.values()
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            _call(entry)
            link.settle()


def _call(function: Any) -> None:
    if function is None:
        return
    parameters = inspect.signature(function).parameters.values()
    # ``setup_method(self, method)`` may take what it rarely uses.
    given = [
        None for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    value = function(*given)
    if inspect.iscoroutine(value):
        importlib.import_module("asyncio").run(value)


def _run_test_case(kind: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    result.failfast = True
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
    errors: list[BaseException] = []
    # The library keeps errors as text; the judge wants to know whose they are.
    result.addError = result.addFailure = lambda _, found: (errors.append(found[1]), result.stop())  # type: ignore
    result.addSubTest = lambda _, __, found: found and (errors.append(found[1]), result.stop())  # type: ignore
    suite.run(result)
    if errors:
        raise errors[0]
    if result.unexpectedSuccesses:
        raise AssertionError("unexpected success")
    if not result.testsRun or len(result.skipped) == result.testsRun:
        raise Unscored(kind.__name__)


def verdict(job: dict[str, Any], link: Link) -> dict[str, Any]:
    """What the judge answers."""
    try:
        failed = link.ready()
        if failed is not None:
            return {"status": "raised", "kind": failed}
        run(job, link)
        return {"status": "gone" if link.closed else "passed"}
    except BaseException as error:  # noqa: BLE001  (a test that raises has not passed)
        return {"status": "gone"} if link.closed else _verdict_on(error, link)


def _verdict_on(error: BaseException, link: Link) -> dict[str, Any]:
    if link.refused:
        return {"status": link.refused if link.refused in ("too large", "failed") else "opaque"}
    if error is link.raised:
        return {"status": "raised", "kind": type(error).__name__[:80]}
    if isinstance(error, AssertionError | SystemExit):
        return {"status": "failed" if link.used or link.described else "broken test", "kind": type(error).__name__}
    if type(error).__name__ == "Unsendable":
        return {"status": "broken test", "kind": f"hand over a {str(error)[:40]}"}
    # Once the program has had a say, what it returned may be the cause: no excuse to be left out of the count.
    return {"status": "failed" if link.used else "broken test", "kind": type(error).__name__}
