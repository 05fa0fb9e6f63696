"""Do tests assert anything about the program? Decided from their text, before any program runs."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from mirrorpo.rewards.sandbox.roles import BUILTINS

_Function = ast.FunctionDef | ast.AsyncFunctionDef
# Where what a program prints comes to light.
_PRINTED = {"getvalue", "readouterr"}
_EXITS = frozenset(("exit", "quit", "_exit", "abort"))


def entries(trees: Iterable[ast.Module]) -> list[str]:
    """Test functions and test classes at module level, in their order, which nobody calls but a test runner.

    Example:
        >>> entries([ast.parse("def test_f(): pass\\ndef helper(): pass\\nclass TestG:\\n    def test(self): pass")])
        ['test_f', 'TestG']
    """
    found: dict[str, None] = {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test"):
                found[node.name] = None
        elif isinstance(node, ast.ClassDef) and (node.name.startswith("Test") or _is_test_case(node)):
            found[node.name] = None
    return list(found)


def _is_test_case(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("TestCase") for base in node.bases)


def needs_arguments(trees: Iterable[ast.Module], names: Iterable[str]) -> str | None:
    """The first test function that cannot be called without arguments, unless the tests call it themselves."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    for node in nodes:
        if isinstance(node, _Function) and node.name in names and node.name not in called:
            arguments = node.args
            required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
            if required > 0 or any(default is None for default in arguments.kw_defaults):
                in_class = [c for c in nodes if isinstance(c, ast.ClassDef) and node in c.body]
                if not in_class:
                    return node.name
    return None


class Reach:
    """The statements that run when tests run, and which of their values depend on the program.

    Args:
        setup: tree of the setup; its functions count only where they are called.
        tests: trees of the tests; test functions and classes are called by the runner.
        program: names that the program defines.
    """

    def __init__(self, setup: ast.Module, tests: list[ast.Module], program: set[str]) -> None:
        trees = [setup, *tests]
        definitions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, (*_KINDS, ast.ClassDef))]
        self._by_name: dict[str, list[ast.AST]] = {}
        for node in definitions:
            self._by_name.setdefault(node.name, []).append(node)
        self._program = program
        self._reached: list[ast.AST] = []
        self._seen: set[int] = set()
        for tree in trees:
            self._enter(tree.body)
        for name in entries(tests):
            for node in self._by_name.get(name, []):
                self._enter_definition(node)
        self._tainted = self._depending()

    def _enter(self, body: Iterable[ast.AST]) -> None:
        for node in _walk_own(body):
            self._reached.append(node)
            for name in _mentioned(node):
                for definition in self._by_name.get(name, []):
                    self._enter_definition(definition)

    def _enter_definition(self, node: ast.AST) -> None:
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, _KINDS):
                    self._enter_definition(part)
        if isinstance(node, _KINDS):
            self._enter(node.body)

    def uses_program(self) -> bool:
        """Whether anything that runs mentions a name of the program."""
        return any(isinstance(node, ast.Name) and node.id in self._program for node in self._reached)

    def asserts(self) -> bool:
        """Whether anything that runs can fail because of what the program gives."""
        return any(self._asserts(node) for node in self._reached)

    def _asserts(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Assert):
            if isinstance(node.test, ast.Constant):
                return not node.test.value
            return not _always_true(node.test) and self._depends(node.test)
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _EXITS or name == "fail" or name.startswith(("assertRaises", "assertWarns", "assertLogs")):
                return True
            return isinstance(node.func, ast.Attribute) and name.lower().startswith("assert") and self._depends(node)
        return False

    def _depends(self, node: ast.AST) -> bool:
        return any(name in self._tainted for part in ast.walk(node) for name in _names_of(part))

    def _depending(self) -> set[str]:
        """Names whose values depend on the program, without regard to the order in which things happen."""
        tainted = self._program | _PRINTED
        flows = [flow for node in self._reached for flow in _flows(node)]
        parameters = self._parameters()
        while True:
            before = len(tainted)
            for targets, sources in flows:
                if sources & tainted:
                    tainted |= targets
            for name, (inputs, mentioned) in parameters.items():
                if mentioned & tainted:
                    tainted.add(name)
                if name in tainted:
                    tainted |= inputs
            if len(tainted) == before:
                return tainted

    def _parameters(self) -> dict[str, tuple[set[str], set[str]]]:
        """Of every function: its parameters, and the names in it."""
        found: dict[str, tuple[set[str], set[str]]] = {}
        for name, nodes in self._by_name.items():
            for node in nodes:
                inputs = {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments) for a in _arguments(n)}
                own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                known = found.setdefault(name, (set(), set()))
                known[0].update(inputs)
                known[1].update(own)
        return found


_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _walk_own(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes but the bodies of functions; class bodies run, methods do not."""
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _KINDS):
            waiting.extend([*node.decorator_list, *node.args.defaults])
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _mentioned(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return {node.id}
    return {node.attr} if isinstance(node, ast.Attribute) else set()


def _names_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name):
        return {node.id}
    return {node.attr} if isinstance(node, ast.Attribute) else set()


def _all_names(node: ast.AST | None) -> set[str]:
    return set() if node is None else {name for part in ast.walk(node) for name in _names_of(part)}


def _arguments(node: ast.arguments) -> list[ast.arg]:
    extra = [a for a in (node.vararg, node.kwarg) if a is not None]
    return [*node.posonlyargs, *node.args, *node.kwonlyargs, *extra]


def _flows(node: ast.AST) -> Iterator[tuple[set[str], set[str]]]:
    """Pairs of names: the first change with the second."""
    if isinstance(node, ast.Assign):
        yield {name for target in node.targets for name in _all_names(target)}, _all_names(node.value)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        yield _all_names(node.target), _all_names(node.value)
    elif isinstance(node, ast.AsyncFor | ast.comprehension):
        yield _all_names(node.target), _all_names(node.iter)
    elif isinstance(node, ast.withitem):
        yield _all_names(node.optional_vars), _all_names(node.context_expr)
    elif isinstance(node, ast.Match):
        yield {n.name for n in ast.walk(node) if isinstance(n, ast.MatchAs) and n.name}, _all_names(node.subject)
    elif isinstance(node, ast.Call):
        # A call may change what it is given, and what its method belongs to; a function's parameters are its arguments.
        names = {name for argument in [*node.args, *(k.value for k in node.keywords)] for name in _all_names(argument)}
        callee = _all_names(node.func) - BUILTINS
        yield names | callee, names | callee
    elif isinstance(node, ast.If | ast.While | ast.For):
        # What is assigned depends on what is asked.
        inside = (n for part in [*node.body, *node.orelse] for n in ast.walk(part))
        assigned = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assigned |= _all_names(node.target) if isinstance(node, ast.For) else set()
        yield assigned, _all_names(node.iter if isinstance(node, ast.For) else node.test)
    elif isinstance(node, ast.Try):
        caught = (n for part in [*node.body, *node.handlers] for n in ast.walk(part))
        handlers = {h.name for h in node.handlers if h.name}
        handlers |= {n.id for n in caught if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        yield handlers, {name for part in node.body for name in _all_names(part)}


def _always_true(test: ast.expr) -> bool:
    """A display that is never empty, a text that is never empty, a function: what is no assertion at all."""
    if isinstance(test, ast.Tuple | ast.List | ast.Set):
        return any(not isinstance(item, ast.Starred) for item in test.elts)
    if isinstance(test, ast.Dict):
        return any(key is not None for key in test.keys)
    if isinstance(test, ast.JoinedStr):
        return any(isinstance(part, ast.Constant) and part.value for part in test.values)
    return isinstance(test, ast.Lambda | ast.GeneratorExp)
