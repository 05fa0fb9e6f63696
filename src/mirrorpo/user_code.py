"""Code that a recipe names as ``"module:attribute"``: where it is looked for, and when it is not imported at all.

A recipe that names a module is code. The module is found in the environment first, then in a folder that the user
named: the recipe's own, or the current one. Such a folder joins ``sys.path`` at its end, and only once a module in it
is named: no file in it ever stands for an installed package or for an optional one that is absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_folders: list[Path] = []
_forbidden: list[str] = []


class NotImportedError(ValueError):
    """A module of the user's is named where none is imported: in a plan or a report."""


def look_in(*folders: Path) -> None:
    """Sets the folders in which a module is looked for that the environment does not have."""
    _folders[:] = [folder.resolve() for folder in folders]


@contextmanager
def not_imported(where: str) -> Iterator[None]:
    """Inside, naming a module of the user's raises ``NotImportedError``.

    Args:
        where: for the message: "a plan".
    """
    _forbidden.append(where)
    try:
        yield
    finally:
        _forbidden.pop()


def is_forbidden() -> bool:
    """Whether no module of the user's may be imported now."""
    return bool(_forbidden)


def import_attribute(path: str, what: str) -> Any:
    """The object that ``"module:attribute"`` names.

    Args:
        path: ``"module:attribute"``; both may have dots.
        what: it is, for messages: "reward", "divergence".

    Raises:
        ValueError: no colon, no such module or attribute, a module that fails, or one of the standard library.
        NotImportedError: inside ``not_imported``.

    Example:
        >>> import_attribute("builtins:eval", "reward")
        Traceback (most recent call last):
        ValueError: reward 'builtins:eval': builtins belongs to Python itself; name a function of a module of yours
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{what} must be 'module:attribute', got {path!r}")
    top = module_name.partition(".")[0]
    if not top:
        raise ValueError(f"{what} {path!r}: the module must have its full name, without a dot in front")
    _refuse_standard(top, top, path, what)
    if _forbidden:
        raise NotImportedError(f"{what} {path!r}: a module of yours is not imported for {_forbidden[-1]}")
    _make_visible(top)
    try:
        module: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may come out of it
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)
        looked = f"; looked in the environment and in {', '.join(map(str, _folders))}" if _folders else ""
        raise ValueError(
            f"{what} {path!r}: cannot import module {module_name!r} ({reason}){looked if top in reason else ''}"
        ) from error
    return _attribute(module, attribute, path, what)


def check_module(path: str, what: str) -> None:
    """Raises what ``import_attribute`` raises for a module that is not there; imports nothing that is."""
    top = path.partition(":")[0].partition(".")[0]
    if _forbidden or not top:
        return
    _make_visible(top)
    try:
        found = top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        import_attribute(path, what)


def _make_visible(top: str) -> None:
    """Adds the folder that has the module to the end of ``sys.path``, unless the environment has one of that name."""
    try:
        if top in sys.modules or importlib.util.find_spec(top) is not None:
            return
    except (ImportError, ValueError):  # a name that no finder takes
        return
    for folder in _folders:
        if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
            sys.path.append(str(folder))
            importlib.invalidate_caches()
            return


def _attribute(module: ModuleType, attribute: str, path: str, what: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if part.startswith("__") or part not in dir(found):
            where = getattr(module, "__file__", None) or module.__name__
            raise ValueError(f"{what} {path!r}: {getattr(found, '__name__', part)} has no attribute {part!r} ({where})")
        found = getattr(found, part)
        if isinstance(found, ModuleType):
            raise ValueError(f"{what} {path!r}: {part} is a module; write its full name before the colon")
    # What a module has imported is not its own: "anything:os.system", or "anything:system" after "from os import".
    home = getattr(found, "__module__", None)
    if isinstance(found, type) or (callable(found) and type(found).__module__ == "builtins"):
        _refuse_standard(str(home or "builtins").partition(".")[0], str(home), path, what)
    return found


def _refuse_standard(top: str, name: str, path: str, what: str) -> None:
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise ValueError(f"{what} {path!r}: {name} belongs to Python itself; name a function of a module of yours")


__all__ = ["NotImportedError", "check_module", "import_attribute", "is_forbidden", "look_in", "not_imported"]
