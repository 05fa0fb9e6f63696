"""Wrong programs from right ones: one small change each, chosen by the task's id alone."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator

_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def _operators(tree: ast.Module) -> Iterator[tuple[str, Callable[[], None]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
            new = _SWAPS[type(node.op)]
            yield f"{type(node.op).__name__} to {new.__name__}", lambda n=node, o=new: setattr(n, "op", o())
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            new = _SWAPS[type(node.ops[0])]
            yield f"{type(node.ops[0]).__name__} to {new.__name__}", lambda n=node, o=new: n.ops.__setitem__(0, o())


def _returns(tree: ast.Module) -> Iterator[tuple[str, Callable[[], None]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            wrapped = ast.List(elts=[node.value], ctx=ast.Load())
            yield "return in a list", lambda n=node, w=wrapped: setattr(n, "value", w)
            yield "return None", lambda n=node: setattr(n, "value", ast.Constant(None))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield f"{node.value} to {node.value + 1}", lambda n=node: setattr(n, "value", n.value + 1)


def mutant(code: str, number: int) -> tuple[str, str]:
    """The program with one change, and its name.

    Args:
        code: a program.
        number: which change; any integer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in the references
        original = ast.parse(code)
    kinds = [_operators, _returns] if number % 3 else [_returns, _operators]
    for kind in kinds:
        tree = copy.deepcopy(original)
        changes = list(kind(tree))
        if changes:
            name, change = changes[(number * 7919) % len(changes)]
            change()
            return ast.unparse(ast.fix_missing_locations(tree)), name
    return "def nothing(): pass", "emptied"
