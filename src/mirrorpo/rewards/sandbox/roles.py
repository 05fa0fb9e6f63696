"""Names that tests use and do not define: which are the program's, which of those are classes, which are tools?

Decided from the text of the tests alone, by Python's rules of scope, so that no program can change the answer. A name
is the program's if the tests call it, or hand it on; what stands around such a call (``fabs(solve(3) - 9)``), opposite
to it (``== approx(9)``) or is used as a value (``== EXPECTED``) is a tool of the tests, and has to be defined by them.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mirrorpo.rewards.sandbox.assertions import BUILTINS, Judging

_PLAIN_TYPES = (str, bytes, list, tuple, dict, set, frozenset, int, float, complex, bool)
PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind) if not name.startswith("__"))
_OF_OBJECTS = frozenset(
    ("isinstance", "issubclass", "assertIsInstance", "assertNotIsInstance")
)  # the type comes second
_TYPE_CALLS = _OF_OBJECTS | {"assertRaises", "assertRaisesRegex", "assertWarns", "assertWarnsRegex", "raises", "warns"}


@dataclass
class Roles:
    """What the tests do with undefined names.

    Attributes:
        program: names that the program has to define.
        undefined: names that nothing defines; the row cannot be used.
        judging: names that would judge what the program gives, and that only it defines; the row cannot be used.
        classes: names of the program that stand for classes.
        instances: those of them on whose instances the tests use attributes.
        attributes: attributes that the tests use on instances which they construct themselves.
        called: names of the program that the tests call.
    """

    program: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)
    judging: set[str] = field(default_factory=set)
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
    if len(likely) > 1 or any(name[:1].isupper() for name in likely):
        judging = Judging(trees, {id(node) for node in loads if node.id in likely}).names()
    found = Roles(program=likely - judging, undefined=free - likely, judging=judging)
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
        if name in self._based or (name in self._as_value and not _is_exception(name)):
            return False
        if name in self._as_value:
            return True
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
            # A name handed to a tool beside a call of the program is what the call's result is compared with: not
            # the class in ``isinstance(Dog(), Animal)``.
            names = {a.id for a in arguments if isinstance(a, ast.Name) and id(a) in self._nodes}
            self._as_value |= names - {name for name in _used_as_type(node) if _is_camel_case(name)}

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
    found.classes |= {name for node in nodes for name in _used_as_type(node)} & found.program
    certain = found.classes | {name for name in found.program if _is_camel_case(name)}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.called |= {node.func.id} & found.program
            if node.func.id in ("getattr", "setattr", "hasattr") and node.args:
                # ``getattr(cache, operation)(*arguments)``: an attribute whose name is not in the text.
                makers = _constructors(node.args[0], variables, found.program)
                found.instances |= {name for name in makers if name[:1].isupper()}
        if isinstance(node, ast.BinOp):
            # Two objects of one class that calculate with each other: no function is written like that.
            sides = [_constructors(side, variables, found.program) for side in (node.left, node.right)]
            found.instances |= sides[0] & sides[1] & certain
        found.instances |= _calculated_with(node, variables, found.program) & certain
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
        elif isinstance(value, ast.Call | ast.BinOp) and (makers := _constructors(value, variables, program)):
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


def _calculated_with(node: ast.AST, variables: dict[str, set[str]], program: set[str]) -> set[str]:
    """Names of which an expression is compared with what a call of them gives: ``2 * v == Vec(2, 4)``."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("assert"):
        sides = list(node.args)
    else:
        return set()
    plain = [_constructors(side, variables, program) for side in sides if isinstance(side, ast.Call | ast.Name)]
    made = {name for names in plain for name in names}
    calculated = [side for side in sides if isinstance(side, ast.BinOp | ast.UnaryOp) or _is_sum(side)]
    parts = (part for side in calculated for part in ast.walk(side) if isinstance(part, ast.Call | ast.Name))
    return made & {name for part in parts for name in _constructors(part, variables, program)}


def _is_sum(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("sum", "prod")


def _is_exception(name: str) -> bool:
    """``assert caught[0].category is SlowWarning``."""
    return _is_camel_case(name) and name.endswith(("Error", "Exception", "Warning"))


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
            types = node.args[1:] if name in _OF_OBJECTS else node.args[:1]
            return {found for argument in types for found in _plain_names(argument)}
    return set()


def _plain_names(node: ast.expr) -> set[str]:
    if isinstance(node, ast.Tuple):
        return {name for item in node.elts for name in _plain_names(item)}
    return {node.id} if isinstance(node, ast.Name) else set()


def standard_modules(names: Iterable[str]) -> set[str]:
    """Those that are modules of the standard library, and not a name under which programs are imported."""
    return {name for name in names if name in sys.stdlib_module_names and name not in PROGRAM_MODULES}


# Modules as which tests import the program.
PROGRAM_MODULES = frozenset(
    ("solution", "solutions", "your_module", "your_solution", "main", "__main__", "program", "submission", "candidate")
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def bound_in(body: Iterable[ast.AST]) -> set[str]:
    """Names that statements bind in their own scope, without what nested scopes bind."""
    bound: set[str] = set()
    given_away: set[str] = set()
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, _COMPREHENSIONS):
            # Only ``:=`` reaches the scope around a comprehension.
            bound.update(n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            bound.add(node.rest)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            given_away.update(node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return bound - given_away


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """All parameters of a function."""
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return found + [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]


def global_loads(tree: ast.AST) -> Iterator[ast.Name]:
    """The ``Name`` nodes that read a name of module level (or a built-in one)."""
    return _loads(tree, frozenset())


def _loads(node: ast.AST, hidden: frozenset[str]) -> Iterator[ast.Name]:
    """Those beneath a node, where ``hidden`` are the names of function scopes around it."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in hidden:
            yield node
    elif isinstance(node, _FUNCTIONS):
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        inside = {argument.arg for argument in parameters(node.args)} | bound_in(body)
        yield from _all(_outside(node), hidden)
        yield from _all(body, (hidden | inside) - _declared_global(body))
    elif isinstance(node, _COMPREHENSIONS):
        targets = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        yield from _loads(node.generators[0].iter, hidden)
        rest = [part for g in node.generators for part in (g.target, *g.ifs)]
        rest += [g.iter for g in node.generators[1:]]
        rest += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        yield from _all(rest, hidden | targets)
    elif isinstance(node, ast.ClassDef):
        own = bound_in(node.body)
        yield from _all([*node.decorator_list, *node.bases, *(k.value for k in node.keywords)], hidden)
        for statement in node.body:
            # Names of a class body are seen by its own statements, not by its methods.
            nested = isinstance(statement, (*_FUNCTIONS, ast.ClassDef))
            yield from _loads(statement, hidden if nested else hidden | own)
    else:
        yield from _all(ast.iter_child_nodes(node), hidden)


def _all(nodes: Iterable[ast.AST], hidden: frozenset[str]) -> Iterator[ast.Name]:
    for node in nodes:
        yield from _loads(node, hidden)


def _outside(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.AST]:
    """The parts of a function that its surroundings evaluate: defaults, annotations and decorators."""
    arguments = function.args
    parts: list[ast.AST] = [*arguments.defaults, *(d for d in arguments.kw_defaults if d is not None)]
    parts += [a.annotation for a in parameters(arguments) if a.annotation is not None]
    if not isinstance(function, ast.Lambda):
        parts += function.decorator_list
        parts += [function.returns] if function.returns is not None else []
    return parts


def _declared_global(body: Iterable[ast.AST]) -> set[str]:
    return {name for part in body for n in ast.walk(part) if isinstance(n, ast.Global) for name in n.names}


class _WithoutProgramImports(ast.NodeTransformer):
    """Turns ``from solution import f as g`` into ``g = f`` and ``solution.f`` into ``f``."""

    def __init__(self) -> None:
        self.modules: set[str] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and node.module not in PROGRAM_MODULES:
            return node
        named = [a for a in node.names if a.name != "*" and (a.asname or a.name) != a.name]
        pairs = [(ast.Name(a.asname or a.name, ast.Store()), ast.Name(a.name, ast.Load())) for a in named]
        if not pairs:
            return ast.copy_location(ast.Pass(), node)
        targets = ast.Tuple([target for target, _ in pairs], ast.Store())
        values = ast.Tuple([value for _, value in pairs], ast.Load())
        return ast.copy_location(ast.Assign([targets], values), node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        ours = [a for a in node.names if a.name in PROGRAM_MODULES]
        self.modules.update(a.asname or a.name for a in ours)
        kept = [a for a in node.names if a not in ours]
        return ast.copy_location(ast.Import(kept) if kept else ast.Pass(), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.copy_location(ast.Name(node.attr, node.ctx), node)
        return node


def parse(text: str) -> ast.Module:
    """The tree of a text in which names of the program need no import.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: no Python, or nothing that Python can read.

    Example:
        >>> ast.unparse(parse("import solution\\nassert solution.f(1)"))
        'pass\\nassert f(1)'
    """
    return ast.fix_missing_locations(_WithoutProgramImports().visit(ast.parse(text.removeprefix("\ufeff"))))


# Taken from the standard library where the tests do not import them.
LIBRARY = {
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple", "ChainMap"), "collections"),
    **dict.fromkeys(("isclose", "sqrt", "pi", "inf", "nan", "isnan"), "math"),
    "Fraction": "fractions",
    "Decimal": "decimal",
}
# Tools of other libraries, and of the standard library under a bare name: never the program's to define.
_OTHERS = (
    "np numpy pd pandas pytest scipy sp torch tf jnp jax sympy nx networkx plt sklearn mock hypothesis nose",
    "approx allclose is_close almost_equal is_almost_equal approx_equal approximately float_equal floats_equal",
    "nearly_equal close_enough assert_allclose assert_array_equal assert_almost_equal assert_equal assert_equals",
    "assertEqual assertTrue assertFalse assertAlmostEqual assertRaises assertIn raises eq_ ok_ array_equal",
    "array mean median norm literal_eval deepcopy reduce partial chain product permutations combinations",
)
TOOLS = frozenset(name for name in dir(math) if not name.startswith("_"))
TOOLS |= {name for line in _OTHERS for name in line.split()}
