"""Names that a text uses and does not define, by Python's rules of scope.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

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
