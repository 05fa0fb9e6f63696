"""Exceptions across the boundary: class hierarchy, arguments, message and attributes, as plain data.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from mirrorpo.rewards.sandbox.messages import Decoder, Encoder, NotPlain

_MAX_TEXT = 10_000
_MAX_DEPTH = 12
_MAX_CAUSES = 3
# A program must not be able to skip a test, or to end a test runner.
_NEVER = frozenset(("unittest", "_pytest", "pytest", "doctest"))
# Raised out of a call inside ``map`` or ``all``, these would end the iteration as if nothing had happened.
GIVEN = "_mirrorpo_given"  # named arguments of an exception of the tests' own class, kept by its stand-in
# Attributes of built-in exceptions that are neither arguments nor in their dictionary.
_HELD = ("filename", "filename2", "name", "path")
_HOLDERS = (OSError, ImportError, NameError, AttributeError)
ENDINGS = (StopIteration, StopAsyncIteration, GeneratorExit)


Number = Callable[[type], "int | str | None"]


def describe_class(kind: type, number: Number, depth: int = 0) -> list[Any]:
    """A class as plain data: module, name, number (of classes that belong to the program) and bases.

    A class of the tests has its name for a number, and no bases: both sides have it.
    """
    own = number(kind)
    if isinstance(own, str):
        return ["tests", own, own, []]
    module, name = type.__getattribute__(kind, "__module__"), type.__dict__["__name__"].__get__(kind)
    bases = type.__dict__["__bases__"].__get__(kind) if depth < _MAX_DEPTH else (Exception,)
    if own is None and module == "builtins":
        return ["builtins", name, None, []]
    return [str(module)[:80], str(name)[:80], own, [describe_class(base, number, depth + 1) for base in bases]]


def describe(error: BaseException, number: Number, depth: int = 0) -> dict[str, Any]:
    """An exception as plain data."""

    def nested(value: Any, _: Any) -> Any:
        return ["e", describe(value, number, depth + 1)] if isinstance(value, BaseException) and depth < 2 else None

    encoder = Encoder(extend=nested)

    def written(value: Any) -> Any:
        try:
            return encoder.encode(value)
        except (NotPlain, RecursionError):
            return None

    try:
        text = str(error)[:_MAX_TEXT]
    except BaseException:  # noqa: BLE001  (the program's own __str__)
        text = ""
    try:
        state = {name: getattr(error, name) for name in _HELD if isinstance(error, _HOLDERS) and hasattr(error, name)}
        state |= vars(error)
    except BaseException:  # noqa: BLE001  (the program's own __dict__, or attributes)
        state = {}
    cause = error.__cause__ if depth < _MAX_CAUSES else None
    return {
        "class": describe_class(type(error), number),
        "arguments": written(tuple(BaseException.args.__get__(error))),  # type: ignore[attr-defined]
        "text": "".join(str.__iter__(text)),
        "state": [[str(key)[:80], written(value)] for key, value in list(state.items())[:100]],
        "cause": None if cause is None else describe(cause, number, depth + 1),
    }


class Classes:
    """One side's copies of the exception classes of the other.

    Args:
        of_tests: finds a class of the tests by its name.
    """

    def __init__(self, of_tests: Callable[[str], type]) -> None:
        self._made: dict[int, type] = {}
        self._of_tests = of_tests

    def build(self, description: Any, depth: int = 0) -> type:
        """The class that a description stands for: the real one of the standard library, or one made like it.

        Raises:
            NotPlain: no description of an exception class.
        """
        try:
            module, name, number, bases = description
            if type(number) is int and number in self._made:
                return self._made[number]
            if isinstance(number, str):
                found = self._of_tests(number)
                return found if issubclass(found, BaseException) else Exception
            if number is None:
                found = _library_class(str(module), str(name))
                if found is not None:
                    return found
            if depth > _MAX_DEPTH:
                return Exception
            parents = [self.build(base, depth + 1) for base in bases]
        except (TypeError, ValueError) as error:
            raise NotPlain(f"no exception class: {type(error).__name__}") from None
        made = _make(str(name)[:80], parents)
        if type(number) is int:
            self._made[number] = made
        return made

    def rebuild(self, description: Any, depth: int = 0) -> BaseException:
        """The exception that a description stands for.

        Raises:
            NotPlain: no description of an exception.
        """
        try:
            kind = self.build(description["class"])
            arguments, text, cause = description["arguments"], str(description["text"]), description["cause"]
            decode = Decoder(extend=self._nested if depth < _MAX_CAUSES else None).decode
            state = {str(key): decode(value) for key, value in description["state"]}
            values = () if arguments is None else decode(arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise NotPlain(f"no exception: {type(error).__name__}") from None
        if not issubclass(kind, BaseException):
            raise NotPlain("no exception class")
        values = values if type(values) is tuple else ()
        error = _of_tests(kind, values, state.pop(GIVEN, None)) or _instance(kind, values, text)
        for key, value in state.items():
            if key == "__notes__" and type(value) is list:
                vars(error)[key] = [note for note in value if type(note) is str]
            elif key in _HELD and isinstance(error, _HOLDERS):
                setattr(error, key, value)
            elif key.isidentifier() and not key.startswith("__") and not callable(getattr(kind, key, None)):
                vars(error)[key] = value
        if cause is not None and depth < _MAX_CAUSES:
            error.__cause__ = self.rebuild(cause, depth + 1)
        return error

    def _nested(self, tag: str, rest: list[Any], _: Any) -> Any:
        if tag != "e":
            raise NotPlain("an unknown kind")
        return self.rebuild(rest[0], _MAX_CAUSES)


def _of_tests(kind: type[BaseException], values: tuple[Any, ...], named: Any) -> BaseException | None:
    """An exception of a class of the tests, made by its own constructor."""
    if kind.__module__ != "__main__":
        return None
    try:
        return kind(*values, **{str(key): value for key, value in (named or {}).items()})
    except Exception:  # noqa: BLE001  (the constructor wants other arguments than the program gave)
        return None


def _library_class(module: str, name: str) -> type | None:
    if module == "builtins":
        found = vars(builtins).get(name)
    elif module.partition(".")[0] in sys.stdlib_module_names and module.partition(".")[0] not in _NEVER:
        # Only modules that are here already: nothing is imported on the program's word.
        found = getattr(sys.modules.get(module), name, None)
    else:
        return None
    if not isinstance(found, type):
        return None
    return found if issubclass(found, BaseException) or found is object else None


def _make(name: str, parents: list[type]) -> type:
    """A class with these bases; Python forbids some combinations, and a program may have lied about its own."""
    bases = tuple(dict.fromkeys(parents)) or (object,)
    if not any(issubclass(base, BaseException) for base in bases) and bases != (object,):
        bases = (object,)
    try:
        return type(name, bases, {"__module__": "solution"})
    except TypeError:
        return type(name, (Exception,), {"__module__": "solution"})


def _instance(kind: type[BaseException], values: tuple[Any, ...], text: str) -> BaseException:
    """An exception with these arguments whose text is the given one."""
    try:
        # Not called: a constructor may want other arguments than those that are kept.
        error = kind.__new__(kind, *values)
        _initialise(error, values)
        if str(error) == text:
            return error
    except Exception:  # noqa: BLE001  (whatever the library's class thinks of the program's arguments)
        values = (text,)
    told = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__str__": lambda _: text})
    try:
        error = told.__new__(told, *values)
        _initialise(error, values)
        return error
    except Exception:  # noqa: BLE001  (the same)
        return RuntimeError(text)


def _initialise(error: BaseException, values: tuple[Any, ...]) -> None:
    """What a built-in constructor makes of the arguments: ``start`` of a UnicodeError, ``lineno`` of a SyntaxError."""
    built_in = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    with contextlib.suppress(TypeError):
        built_in.__init__(error, *values)
    error.args = values
