"""Tables of recipe keys in the documentation, from the settings' own fields.

``python scripts/make_key_tables.py`` writes them between their marks; ``--check`` ends with status 1 if one is old.
"""

from __future__ import annotations

import argparse
import importlib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "recipe.md", ROOT / "docs" / "howto" / "own_data.md")
_BLOCK = re.compile(
    r"(<!-- keys (?P<module>[\w.]+):(?P<name>\w+)(?: (?P<group>\w+))? -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL
)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _legal(annotation: Any) -> str:
    """The values of a field in words."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(map(_legal, parts)))
    words = {str: "text", int: "integer", float: "number", bool: "true or false"}
    origin = typing.get_origin(annotation) or annotation
    return words.get(origin, {list: "list", tuple: "list", dict: "mapping"}.get(origin, "mapping"))


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "(must be given)" if field.is_required() else "empty"
    if field.default is None or field.default in ({}, ()):
        return "empty"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, legal values, default and meaning of each field; groups of keys are followed."""
    for name, field in model.model_fields.items():
        inner = _models(field.annotation)
        if len(inner) > 1:
            continue  # the task: its keys depend on its name
        if inner:
            yield from rows(inner[0], f"{prefix}{name}.")
            continue
        meaning = (field.description or "").replace("|", "\\|")
        yield f"{prefix}{name}", _legal(field.annotation), _default(field), meaning


def table(model: type[BaseModel], group: str | None = None) -> str:
    """The Markdown of one model, whose keys stand in a group of the recipe, or at its top."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    prefix = f"{group}." if group else ""
    lines += [f"| `{key}` | {legal} | {default} | {meaning} |" for key, legal, default, meaning in rows(model, prefix)]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A page with its tables as the code has them."""

    def block(found: re.Match[str]) -> str:
        model = getattr(importlib.import_module(found["module"]), found["name"])
        return f"{found[1]}{table(model, found['group'])}<!-- end -->"

    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    old = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in old:
        if check:
            print(f"{page.relative_to(ROOT)}: a table is out of date; run python scripts/make_key_tables.py")
        else:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
