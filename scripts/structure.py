"""Structure of the source: files, folders, lines, imports, names; with the limits that the project keeps.

``python scripts/structure.py`` prints the figures; ``--check`` ends with status 1 if one is over its limit.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mirrorpo"
# What each figure may be at most.
LIMITS = {
    "files": 135,
    "lines": 26_000,
    "import circles": 0,
    "longest import chain": 13,
    "files in a folder": 20,
    "file names that occur twice": 4,
    "files over 500 lines": 0,
}


def modules() -> dict[str, Path]:
    """Dotted name to file of every module; a package is its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("mirrorpo", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Modules of the package that are imported when the module is: not inside functions, not for type checkers."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names if alias.name in known)
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update(inner & known.keys() or {node.module})
            elif isinstance(node, ast.If):
                typing_only = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
                visit(node.orelse if typing_only else node.body + node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body + node.orelse + node.finalbody)
            elif isinstance(node, ast.ClassDef | ast.With):
                visit(node.body)

    visit(tree.body)
    return found


def import_graph() -> dict[str, set[str]]:
    """Module to the modules of the package that it imports."""
    known = modules()
    graph = {}
    for name, path in known.items():
        graph[name] = _imported(ast.parse(path.read_text(encoding="utf-8")), known) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def connect(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                connect(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(graph):
        if name not in index:
            connect(name)
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path of imports; a circle counts once."""
    best: dict[str, list[str]] = {}

    def chain(name: str, above: frozenset[str]) -> list[str]:
        if name not in best:
            longest: list[str] = []
            for other in graph[name] - above:
                found = chain(other, above | {name})
                longest = found if len(found) > len(longest) else longest
            best[name] = [name, *longest]
        return best[name]

    return max((chain(name, frozenset({name})) for name in graph), key=len)


def figures() -> tuple[dict[str, int], dict[str, object]]:
    """The figures, and what stands behind those that a reader would ask about."""
    known = modules()
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in known.values()}
    graph = import_graph()
    folders = Counter(path.parent for path in known.values())
    names = Counter(path.name for path in known.values() if path.name not in ("__init__.py", "__main__.py"))
    chain = longest_chain(graph)
    folder, most = folders.most_common(1)[0]
    twice = sorted(name for name, count in names.items() if count > 1)
    long = sorted(str(path.relative_to(PACKAGE)) for path, count in lines.items() if count > 500)
    rings = circles(graph)
    values = {
        "files": len(known),
        "lines": sum(lines.values()),
        "import circles": len(rings),
        "longest import chain": len(chain),
        "files in a folder": most,
        "file names that occur twice": len(twice),
        "files over 500 lines": len(long),
    }
    behind = {
        "import circles": rings,
        "longest import chain": " > ".join(chain),
        "files in a folder": str(folder.relative_to(PACKAGE.parent)),
        "file names that occur twice": ", ".join(twice),
        "files over 500 lines": ", ".join(long),
    }
    return values, behind


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="status 1 if a figure is over its limit")
    given = parser.parse_args(arguments)
    values, behind = figures()
    for name, value in values.items():
        mark = "" if value <= LIMITS[name] else "  OVER"
        print(f"{name:30} {value:7,}  limit {LIMITS[name]:7,}{mark}  {behind.get(name) or ''}")
    return int(given.check and any(value > LIMITS[name] for name, value in values.items()))


if __name__ == "__main__":
    sys.exit(main())
