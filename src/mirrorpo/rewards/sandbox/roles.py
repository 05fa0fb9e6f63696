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
    found = Roles()
    for name in free:
        (found.program if uses.is_program(name) else found.undefined).add(name)
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
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in program:
            key = target.id if isinstance(target, ast.Name) else f".{getattr(target, 'attr', '')}"
            variables.setdefault(key, set()).add(value.func.id)

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
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return {value.func.id} & program
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
