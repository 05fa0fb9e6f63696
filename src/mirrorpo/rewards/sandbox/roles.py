"""Which of the names that tests leave undefined are the program's, and which of those are classes?

Decided from the text of the tests alone, so that no program can change the answer. A name is the program's if the tests
call it, or hand it on; what stands around such a call (``fabs(solve(3) - 9)``), opposite to it (``== approx(9)``) or is
used as a value (``== EXPECTED``) is a tool of the tests, and has to be defined by them.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from mirrorpo.rewards.sandbox.scopes import PROGRAM_MODULES, bound_in, global_loads
from mirrorpo.rewards.sandbox.well_known import LIBRARY, TOOLS

BUILTINS = frozenset(vars(builtins)) | {"__name__", "__file__", "__doc__", "__builtins__", "__spec__"}
_PLAIN_TYPES = (str, bytes, list, tuple, dict, set, frozenset, int, float, complex, bool)
PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind) if not name.startswith("__"))
_TYPE_CALLS = frozenset(("isinstance", "issubclass", "assertRaises", "assertRaisesRegex", "assertIsInstance", "raises"))


@dataclass
class Roles:
    """What the tests do with undefined names.

    Attributes:
        program: names that the program has to define.
        undefined: names that nothing defines; the row cannot be used.
        classes: names of the program that stand for classes.
        instances: those of them on whose instances the tests use attributes.
        attributes: attributes that the tests use on instances which they construct themselves.
        called: names of the program that the tests call.
    """

    program: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    instances: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)


def roles(trees: list[ast.Module], trusted: set[str]) -> Roles:
    """Sorts the undefined names of some texts that share one namespace.

    Args:
        trees: of the setup and the tests.
        trusted: names that imports bring.

    Example:
        >>> found = roles([ast.parse("assert fabs(solve(3) - 9.0) < 1e-6")], set())
        >>> found.program, found.undefined
        ({'solve'}, {'fabs'})
    """
    bound = {name for tree in trees for name in bound_in(tree.body)} | trusted
    loads = [node for tree in trees for node in global_loads(tree)]
    free = {node.id for node in loads} - bound - BUILTINS
    if not free:
        return Roles(program=_named_as_built_in(trees, bound))
    nodes = {id(node) for node in loads if node.id in free}
    uses = _Uses(nodes)
    for tree in trees:
        for statement in tree.body:
            uses.visit_statement(statement)
    likely = {name for name in free if uses.is_program(name)}
    judging: set[str] = set()
    if len(likely) > 1:
        judging = Judging(trees, {id(node) for node in loads if node.id in likely}).names()
    found = Roles(program=likely - judging, undefined=(free - likely) | judging)
    _find_classes(trees, found)
    return found


def _named_as_built_in(trees: list[ast.Module], bound: set[str]) -> set[str]:
    """The function under test has the name of a built-in one: ``assert sum(3, 1) == 2``."""
    found: set[str] = set()
    for statement in (node for tree in trees for node in tree.body if isinstance(node, ast.Assert)):
        calls = [n for n in ast.walk(statement.test) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
        found |= {name for name in names[:1] if name in BUILTINS - bound}
    return found


class _Uses:
    """How each undefined name is used."""

    def __init__(self, nodes: set[int]) -> None:
        self._nodes = nodes
        self._called: set[str] = set()
        self._handed_on: set[str] = set()
        self._as_value: set[str] = set()
        self._around: set[str] = set()
        self._opposite_nodes: set[int] = set()
        self._based: set[str] = set()
        self._beside: set[str] = set()
        self._alone: set[str] = set()

    def is_program(self, name: str) -> bool:
        """Whether the program has to define the name."""
        if name in TOOLS or name in LIBRARY:
            return name in self._called and name not in self._beside - self._alone
        if name in self._called:
            return True
        if name in self._around:
            return False
        if name in self._based and name[:1].isupper() and not name.isupper():
            return True
        if name in self._based or name in self._as_value:
            return False
        return name in self._handed_on and not (name.isupper() and len(name) > 1)

    def visit_statement(self, statement: ast.stmt) -> None:
        """Takes down the uses in one statement of module level."""
        names = self._names(statement)
        for name in names:
            others = {other for other in names - {name} if other not in TOOLS}
            (self._beside if others else self._alone).add(name)
        parents = list(ast.walk(statement))
        for parent in parents:
            self._find_opposites(parent)
        for parent in parents:
            self._calls(parent)
            for role, child in _children(parent):
                if id(child) in self._nodes:
                    assert isinstance(child, ast.Name)
                    self._take_down(role, child.id)

    def _names(self, node: ast.AST) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) in self._nodes}

    def _called_names(self, node: ast.AST) -> set[str]:
        calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
        return {c.func.id for c in calls if isinstance(c.func, ast.Name) and id(c.func) in self._nodes}

    def _take_down(self, role: str, name: str) -> None:
        if role == "argument":
            self._handed_on.add(name)
        elif role == "base":
            self._based.add(name)
        elif role == "value":
            self._as_value.add(name)

    def _calls(self, node: ast.AST) -> None:
        if not isinstance(node, ast.Call):
            return
        generic = node.func.value if isinstance(node.func, ast.Subscript) else None
        if isinstance(generic, ast.Name) and id(generic) in self._nodes and generic.id[:1].isupper():
            self._called.add(generic.id)  # Stack[int]()
        arguments = [*node.args, *(k.value for k in node.keywords)]
        inner = [self._called_names(argument) for argument in arguments]
        if isinstance(node.func, ast.Name) and id(node.func) in self._nodes:
            own = node.func.id
            around = any(
                {name for name in names if not name[:1].isupper()} - {own} and not _is_passed_on(argument)
                for names, argument in zip(inner, arguments, strict=True)
            )
            opposite = id(node.func) in self._opposite_nodes
            (self._around if around or opposite else self._called).add(own)
        elif any(inner):
            # A name handed to a tool beside a call of the program is what the call's result is compared with.
            self._as_value |= {a.id for a in arguments if isinstance(a, ast.Name) and id(a) in self._nodes}

    def _find_opposites(self, node: ast.AST) -> None:
        """``solve(3) == approx(9)``: what stands on the right only, and is no class, is no function under test."""
        if isinstance(node, ast.Compare):
            left, *right = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("assert") and len(node.args) > 1:
            left, *right = node.args
        else:
            return
        known = self._called_names(left)
        for callee in (n.func for side in right for n in ast.walk(side) if isinstance(n, ast.Call)):
            if known and isinstance(callee, ast.Name) and callee.id not in known and not callee.id[:1].isupper():
                self._opposite_nodes.add(id(callee))


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
        return {name for name, signs in fed_signs.items() if not self._is_tested(signs, own_signs.get(name, set()))}

    def _is_tested(self, fed: set[str], own: set[str]) -> bool:
        """Whether constant answers do not do: nothing depends on them, both are wanted, or one that says something."""
        return not fed - {"="} or "=" in fed | own or {"+", "-"} <= fed | own

    def _callees(self, call: ast.Call) -> set[str]:
        """The undefined names that a call calls: a function, or the class of the object whose method it is."""
        function = call.func
        if isinstance(function, ast.Name):
            return {function.id} if id(function) in self._nodes else set()
        if not isinstance(function, ast.Attribute):
            return set()
        base = function.value
        if isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and id(base.func) in self._nodes:
            return {base.func.id}
        return self._made_by.get(base.id, set()) if isinstance(base, ast.Name) else set()

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


def _is_passed_on(argument: ast.expr) -> bool:
    """Whether an inner call's result reaches the outer one as it is: ``decode(encode(x))``, ``f([g(1)])``."""
    if isinstance(argument, ast.Starred):
        return _is_passed_on(argument.value)
    if isinstance(argument, ast.List | ast.Tuple | ast.Set):
        return all(_is_passed_on(item) for item in argument.elts)
    return not isinstance(argument, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.Subscript)


def _children(parent: ast.AST) -> Iterable[tuple[str, ast.AST]]:
    """Children of a node with what they are to it."""
    if isinstance(parent, ast.Call):
        yield "callee", parent.func
        yield from (("argument", a.value if isinstance(a, ast.Starred) else a) for a in parent.args)
        yield from (("argument", k.value) for k in parent.keywords)
    elif isinstance(parent, ast.Attribute):
        yield "base", parent.value
    elif isinstance(parent, ast.Compare | ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Subscript | ast.FormattedValue):
        yield from (("value", child) for child in ast.iter_child_nodes(parent))
    elif isinstance(parent, ast.Assert):
        yield "value", parent.test
    elif isinstance(parent, ast.For | ast.AsyncFor | ast.comprehension):
        yield "value", parent.iter
    else:
        yield from (("argument", child) for child in ast.iter_child_nodes(parent))


def _find_classes(trees: list[ast.Module], found: Roles) -> None:
    """Fills in ``classes``, ``instances`` and ``attributes``."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    variables = _instance_variables(nodes, found.program)
    for node in nodes:
        found.classes |= _used_as_type(node) & found.program
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.called |= {node.func.id} & found.program
            if node.func.id in ("getattr", "setattr", "hasattr") and node.args:
                # ``getattr(cache, operation)(*arguments)``: an attribute whose name is not in the text.
                makers = _constructors(node.args[0], variables, found.program)
                found.instances |= {name for name in makers if name[:1].isupper()}
        if isinstance(node, ast.BinOp):
            # Two objects of one class that calculate with each other: no function is written like that.
            sides = [_constructors(side, variables, found.program) for side in (node.left, node.right)]
            found.instances |= {name for name in sides[0] & sides[1] if _is_camel_case(name)}
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in found.program:
            found.classes.add(node.value.id)
        for name in _constructors(node.value, variables, found.program):
            found.attributes.add(node.attr)
            if name[:1].isupper() or node.attr not in PLAIN_ATTRIBUTES:
                found.instances.add(name)
    found.classes |= {name for name in found.program if name.lstrip("_")[:1].isupper()} | found.instances


def _instance_variables(nodes: list[ast.AST], program: set[str]) -> dict[str, set[str]]:
    """Variables (and attributes, with a dot in front) that hold what a call of a name of the program gave."""
    variables: dict[str, set[str]] = {}

    def note(target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                note(one, other)
        elif isinstance(value, ast.Call) and (makers := _constructors(value, {}, program)):
            key = target.id if isinstance(target, ast.Name) else f".{getattr(target, 'attr', '')}"
            variables.setdefault(key, set()).update(makers)

    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                note(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            note(node.target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            note(node.optional_vars, node.context_expr)
    return variables


def _constructors(value: ast.expr, variables: dict[str, set[str]], program: set[str]) -> set[str]:
    """Names whose call gave the value of an expression."""
    if isinstance(value, ast.Call):
        maker = value.func.value if isinstance(value.func, ast.Subscript) else value.func
        return {maker.id} & program if isinstance(maker, ast.Name) else set()
    if isinstance(value, ast.Name):
        return variables.get(value.id, set())
    if isinstance(value, ast.BinOp):
        return _constructors(value.left, variables, program) | _constructors(value.right, variables, program)
    return variables.get(f".{value.attr}", set()) if isinstance(value, ast.Attribute) else set()


def _is_camel_case(name: str) -> bool:
    return name[:1].isupper() and not name.isupper() and "_" not in name


def _used_as_type(node: ast.AST) -> set[str]:
    """Names that a node uses as classes."""
    if isinstance(node, ast.ExceptHandler) and node.type is not None:
        return _plain_names(node.type)
    if isinstance(node, ast.ClassDef):
        return {name for base in node.bases for name in _plain_names(base)}
    if isinstance(node, ast.Raise) and node.exc is not None:
        return _plain_names(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _TYPE_CALLS:
            return {found for argument in node.args for found in _plain_names(argument)}
    return set()


def _plain_names(node: ast.expr) -> set[str]:
    if isinstance(node, ast.Tuple):
        return {name for item in node.elts for name in _plain_names(item)}
    return {node.id} if isinstance(node, ast.Name) else set()


def standard_modules(names: Iterable[str]) -> set[str]:
    """Those that are modules of the standard library, and not a name under which programs are imported."""
    return {name for name in names if name in sys.stdlib_module_names and name not in PROGRAM_MODULES}
