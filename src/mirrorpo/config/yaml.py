"""What may a configuration file hold? YAML (or JSON) as plain data, read with one-line errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mirrorpo.errors import InputError

MAX_BYTES = 1_000_000


def read_text(path: Path, what: str) -> str:
    """The text of a configuration file.

    Args:
        path: the file.
        what: it is, for the message: "recipe", "objective".

    Returns:
        Its content.

    Raises:
        InputError: no such file, more than ``MAX_BYTES`` bytes, not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such {what} file")
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        article = "an" if what[0] in "aeiou" else "a"
        raise InputError(f"{path}: {article} {what} has at most {MAX_BYTES:,} bytes, this has {len(data):,}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no anchors (a few lines of aliases can describe gigabytes), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError(f"line {self.peek_event().start_mark.line + 1}: YAML aliases are not accepted in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        twice = next((key for key in keys if key in seen or seen.add(key)), None)
        if twice is not None:
            raise InputError(f"line {node.start_mark.line + 1}: key {twice!r} stands twice")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a text; everybody means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML text.

    Raises:
        InputError: not YAML, or YAML beyond plain data; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not valid YAML ({reason})") from None
