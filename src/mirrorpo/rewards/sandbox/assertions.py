"""Do tests assert anything about the program? Decided from their text, before any program runs."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator

BUILTINS = frozenset(vars(builtins)) | {"__name__", "__file__", "__doc__", "__builtins__", "__spec__"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
# Where what a program prints comes to light.
_PRINTED = {"getvalue", "readouterr"}
# Calls that end a test, or expect what the program does.
_EXPECTING = frozenset(("exit", "quit", "_exit", "abort", "fail", "raises", "warns", "deprecated_call"))


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
            required -= sum(map(_parametrised, node.decorator_list))
            if required > 0 or any(default is None for default in arguments.kw_defaults):
                in_class = [c for c in nodes if isinstance(c, ast.ClassDef) and node in c.body]
                if not in_class:
                    return node.name
    return None


def _parametrised(decorator: ast.expr) -> int:
    """How many arguments ``@pytest.mark.parametrize("a, b", ...)`` gives."""
    if not (
        isinstance(decorator, ast.Call) and getattr(decorator.func, "attr", "") == "parametrize" and decorator.args
    ):
        return 0
    names = decorator.args[0]
    if isinstance(names, ast.Constant):
        return len(str(names.value).split(","))
    return len(names.elts) if isinstance(names, ast.List | ast.Tuple) else 0


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
        self._heard: set[int] = set()  # those whose failed assertions nothing swallows
        self._seen: set[tuple[int, bool]] = set()
        for tree in trees:
            self._enter(tree.body)
        for name in entries(tests):
            for node in self._by_name.get(name, []):
                self._enter_definition(node)
        self._tainted = self._depending()

    def _enter(self, body: Iterable[ast.AST], heard: bool = True) -> None:
        for node in _walk_own(body):
            self._reached.append(node)
            if heard:
                self._heard.add(id(node))
            if isinstance(node, ast.Try) and _swallows(node):
                self._enter(node.body, False)
            for name in _mentioned(node):
                for definition in self._by_name.get(name, []):
                    self._enter_definition(definition, heard)

    def _enter_definition(self, node: ast.AST, heard: bool = True) -> None:
        if self._seen & {(id(node), heard), (id(node), True)}:
            return
        self._seen.add((id(node), heard))
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, _KINDS):
                    self._enter_definition(part, heard)
        if isinstance(node, _KINDS):
            self._enter(node.body, heard)

    def uses_program(self) -> bool:
        """Whether anything that runs mentions a name of the program."""
        return any(isinstance(node, ast.Name) and node.id in self._program for node in self._reached)

    def asserts(self) -> bool:
        """Whether anything that runs can fail because of what the program gives."""
        return any(id(node) in self._heard and self._asserts(node) for node in self._reached)

    def _asserts(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Assert):
            if isinstance(node.test, ast.Constant):
                return not node.test.value
            return not _always_true(node.test) and self._depends(node.test)
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _EXPECTING or name.startswith(("assertRaises", "assertWarns", "assertLogs")):
                return True
            if isinstance(node.func, ast.Attribute) and name.lower().startswith("assert"):
                # ``self.assertTrue(True)`` asserts nothing, ``mock.assert_called_once()`` something.
                own = isinstance(node.func.value, ast.Name) and node.func.value.id == "self"
                return any(map(self._depends, (*node.args, *node.keywords))) if own else self._depends(node)
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
    """All nodes but the bodies of functions, and of ``try`` where failures are swallowed; class bodies run."""
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _KINDS):
            waiting.extend([*node.decorator_list, *node.args.defaults])
        elif isinstance(node, ast.Try) and _swallows(node):
            waiting.extend([*node.handlers, *node.orelse, *node.finalbody])
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _swallows(node: ast.Try) -> bool:
    """Whether a failed assertion in the body ends in a handler: ``except AssertionError: print("wrong")``."""
    caught = (handler.type for handler in node.handlers)
    return any(kind is None or _all_names(kind) & {"AssertionError", "Exception", "BaseException"} for kind in caught)


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
        # What is changed depends on what is asked.
        targets = _all_names(node.target) if isinstance(node, ast.For) else set[str]()
        asked = node.iter if isinstance(node, ast.For) else node.test
        yield targets | _changed([*node.body, *node.orelse]), _all_names(asked)
    elif isinstance(node, ast.Try | ast.TryStar):
        handlers = {h.name for h in node.handlers if h.name}
        yield handlers | _changed([*node.body, *node.handlers, *node.orelse]), _names_in(node.body)
    elif isinstance(node, ast.With):  # it may swallow what is raised
        yield _changed(node.body), _names_in(node.body)


def _names_in(body: Iterable[ast.AST]) -> set[str]:
    return {name for part in body for name in _all_names(part)}


def _changed(body: Iterable[ast.AST]) -> set[str]:
    """Names that statements bind, or that stand for what they change: ``seen.append(1)``, ``seen[0] = 1``."""
    nodes = [node for part in body for node in ast.walk(part)]
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    owners = (n.func.value for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
    items = (n.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store))
    return bound | {n.id for n in (*owners, *items) if isinstance(n, ast.Name)}


def _always_true(test: ast.expr) -> bool:
    """A display that is never empty, a text that is never empty, a function: what is no assertion at all."""
    if isinstance(test, ast.Tuple | ast.List | ast.Set):
        return any(not isinstance(item, ast.Starred) for item in test.elts)
    if isinstance(test, ast.Dict):
        return any(key is not None for key in test.keys)
    if isinstance(test, ast.JoinedStr):
        return any(isinstance(part, ast.Constant) and part.value for part in test.values)
    if isinstance(test, ast.BoolOp):
        either = any if isinstance(test.op, ast.Or) else all
        return either(_always_true(value) for value in test.values)
    return isinstance(test, ast.Lambda | ast.GeneratorExp) or (isinstance(test, ast.Constant) and bool(test.value))


# Names of what is called for nothing but its exception.
_CHECKING = ("assert", "check", "verify", "expect", "ensure", "validate", "run_test", "compare", "require")
_EQUALITIES = (
    "assertEqual",
    "assertEquals",
    "assertListEqual",
    "assertDictEqual",
    "assertSetEqual",
    "assertTupleEqual",
)
_EQUALITIES += ("assertCountEqual", "assertSequenceEqual", "assertMultiLineEqual", "assertAlmostEqual", "assertIn")


class Judging:
    """Names that would judge what another name of the program gave: ``close(solve(3), 9)``, ``run_tests(solve)``.

    They are the tests' to define. A name is the program's all the same if it is tested for itself
    (``is_even(2)`` beside ``is_even(double(3))``), if its result is compared with a value that says something
    (``decode(encode(x)) == x``), or if the tests want both answers of it.

    Args:
        trees: of the setup and the tests.
        nodes: ids of the nodes that are undefined names.
    """

    def __init__(self, trees: list[ast.Module], nodes: set[int]) -> None:
        self._nodes = nodes
        self._all = [node for tree in trees for node in ast.walk(tree)]
        self._parent = {id(child): node for node in self._all for child in ast.iter_child_nodes(node)}
        self._functions = {n.name: n for n in self._all if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        self._sources: dict[str, set[str]] = {}  # of variables: names of the program that they come from
        self._made_by: dict[str, set[str]] = {}  # of variables: calls of undefined names that they hold
        self._given: set[str] = set()  # what the call in question is given: no answer of its own
        self._flow()

    def names(self) -> set[str]:
        """Those that no program may define."""
        fed_signs: dict[str, set[str]] = {}
        own_signs: dict[str, set[str]] = {}
        for call in (node for node in self._all if isinstance(node, ast.Call)):
            for name in self._callees(call):
                arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
                self._given = {ast.dump(argument) for argument in arguments}
                fed = {source for argument in arguments for source in self._from(argument)} - {name}
                (fed_signs if fed else own_signs).setdefault(name, set()).update(self._verdicts(call, set()))
        bad = (name for name, signs in fed_signs.items() if not self._is_tested(signs, own_signs.get(name, set())))
        return {name.partition(".")[0] for name in bad}

    def _is_tested(self, fed: set[str], own: set[str]) -> bool:
        """Whether constant answers do not do: nothing depends on them, both are wanted, or one that says something."""
        return not fed - {"="} or "=" in fed | own or {"+", "-"} <= fed | own

    def _callees(self, call: ast.Call) -> set[str]:
        """The undefined names that a call calls: a function, or ``Class.method`` of an object that the tests make."""
        function = call.func
        if isinstance(function, ast.Name):
            return {function.id} if id(function) in self._nodes else set()
        if not isinstance(function, ast.Attribute):
            return set()
        base = function.value
        if isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and id(base.func) in self._nodes:
            return {f"{base.func.id}.{function.attr}"}
        makers = self._made_by.get(base.id, set()) if isinstance(base, ast.Name) else set()
        return {f"{maker}.{function.attr}" for maker in makers}

    def _from(self, node: ast.AST) -> set[str]:
        """Names of the program on which a value depends; of an object that is only constructed here, none."""
        found: set[str] = set()
        waiting = [node]
        while waiting:
            part = waiting.pop()
            if isinstance(part, ast.Call):
                constructs = isinstance(part.func, ast.Name) and part.func.id[:1].isupper()
                found |= set() if constructs else self._callees(part)
                waiting += [*part.args, *(keyword.value for keyword in part.keywords)]
                waiting += [] if constructs and id(part.func) in self._nodes else [part.func]
            elif isinstance(part, ast.Name):
                own = {part.id} if id(part) in self._nodes and not part.id[:1].isupper() else set()
                found |= own | self._sources.get(part.id, set())
            elif not isinstance(part, ast.Lambda):
                waiting.extend(ast.iter_child_nodes(part))
        return found

    def _flow(self) -> None:
        """Fills in what variables and parameters come from."""
        pairs: list[tuple[ast.AST, ast.AST]] = []
        for node in self._all:
            if isinstance(node, ast.Assign):
                pairs += [(target, node.value) for target in node.targets]
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr | ast.AugAssign) and node.value is not None:
                pairs.append((node.target, node.value))
            elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
                pairs.append((node.target, node.iter))
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                pairs.append((node.optional_vars, node.context_expr))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self._functions:
                given = self._functions[node.func.id].args
                pairs += list(zip([*given.posonlyargs, *given.args], node.args, strict=False))
        while True:
            before = [len(names) for names in self._sources.values()]
            for target, value in pairs:
                targets = [target.arg] if isinstance(target, ast.arg) else sorted(_stored(target))
                for name in targets:
                    self._sources.setdefault(name, set()).update(self._from(value))
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and id(value.func) in self._nodes:
                    for name in targets:
                        self._made_by.setdefault(name, set()).add(value.func.id)
            if before == [len(names) for names in self._sources.values()]:
                return

    def _verdicts(self, node: ast.AST, seen: set[str]) -> set[str]:
        """What the tests make of a value: "+" or "-" (it should be true or false), "=" (it should be a certain value
        that says something), "?" (it is a measure), or nothing.
        """
        parent = self._parent.get(id(node))
        if parent is None:
            return set()
        if isinstance(parent, ast.Assert):
            return {"+"} if parent.test is node else set()
        if isinstance(parent, ast.If | ast.While | ast.IfExp):
            return {"?"} if parent.test is node else set()
        if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
            swap = {"+": "-", "-": "+"}
            return {swap.get(sign, sign) for sign in self._verdicts(parent, seen)}
        if isinstance(parent, ast.Compare):
            return self._compared(parent, node, seen)
        if isinstance(parent, ast.Call):
            return self._in_call(parent, node, seen)
        if isinstance(parent, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            return self._of_variables({name for target in targets for name in _stored(target)} - seen, seen)
        if isinstance(parent, ast.Expr | ast.withitem):
            name = getattr(getattr(node, "func", None), "id", "")
            return {"?"} if name.lower().lstrip("_").startswith(_CHECKING) else set()
        if isinstance(parent, ast.expr):
            return self._verdicts(parent, seen)
        return set()

    def _of_variables(self, names: set[str], seen: set[str]) -> set[str]:
        loads = [n for n in self._all if isinstance(n, ast.Name) and n.id in names and isinstance(n.ctx, ast.Load)]
        return {sign for load in loads for sign in self._verdicts(load, seen | names)}

    def _compared(self, parent: ast.Compare, node: ast.AST, seen: set[str]) -> set[str]:
        others = [side for side in _sides(parent) if side is not node]
        operator = parent.ops[0]
        if len(parent.ops) > 1 or not isinstance(operator, ast.Eq | ast.Is | ast.In | ast.NotEq | ast.IsNot):
            return {"?"}
        value = others[0].value if isinstance(others[0], ast.Constant) else None
        if isinstance(value, bool):
            return {"+"} if value is isinstance(operator, ast.Eq | ast.Is) else {"-"}
        if self._from(others[0]) & self._from(node):
            return {"?"}
        if ast.dump(others[0]) in self._given or not isinstance(operator, ast.Eq | ast.In):
            return {"?"}
        return _wanted(others[0])

    def _in_call(self, parent: ast.Call, node: ast.AST, seen: set[str]) -> set[str]:
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        if node is parent.func:
            return set()  # the result is called: its own result is what counts
        if name in ("assertTrue", "assertFalse"):
            return {"+" if name == "assertTrue" else "-"}
        if name in _EQUALITIES:
            others = [argument for argument in parent.args[:2] if argument is not node]
            if not others or ast.dump(others[0]) in self._given or self._from(others[0]) & self._from(node):
                return {"?"}
            return _wanted(others[0])
        if name.startswith("assert"):
            return {"?"}
        if self._callees(parent) or name in self._functions:
            return set()
        return self._verdicts(parent, seen)


def _stored(target: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _sides(node: ast.Compare) -> list[ast.expr]:
    return [node.left, *node.comparators]


def _wanted(node: ast.AST) -> set[str]:
    """What it says to be equal to a value: 0, 1, None and what is empty are no more than false and true."""
    try:
        value = ast.literal_eval(node) if isinstance(node, ast.expr) else ...
    except (ValueError, TypeError, MemoryError, RecursionError):
        return {"="}
    if not value:
        return {"-"}
    return {"+"} if value in (True, ...) else {"="}
