"""What the tests hand to a program: plain values, functions, iterators and objects of their own classes.

Functions and iterators stay with the judge, and the program asks for a call or for the next item. Objects of the tests'
own classes cross as the values of their attributes; their methods are run by the judge. So no code of the tests or of
the setup ever lies in the program's process.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import builtins
import collections.abc
import enum
import functools
import inspect
import io
import sys
import types
from collections.abc import Callable
from typing import Any

from mirrorpo.rewards.sandbox.messages import Encoder, Message, NotPlain
from mirrorpo.rewards.sandbox.raised import GIVEN, describe, describe_class

_SLOT = types.MemberDescriptorType
# Operations of a class of the tests that a program may use without having been given an object of it.
_OPEN = frozenset(
    f"__{name}__"
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "hash", "repr", "str", "len", "iter", "bool", "contains")
)
PLAIN_KINDS = {
    kind.__name__: kind
    for kind in (int, float, str, bool, bytes, complex, list, tuple, dict, set, frozenset, range, object, type(None))
}


class Unsendable(TypeError):
    """The tests hand over what cannot be sent: the row's fault, not the program's."""


class Callbacks:
    """The judge's own functions and objects that a program knows by number.

    Args:
        link: the judge's end of the channel.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        self._values: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._objects: dict[int, Any] = {}  # by number; even ones were made here, odd ones by the program
        self._object_numbers: dict[int, int] = {}
        self._waiting: list[Any] = []
        self._given: set[type] = set()
        self._classes: dict[str, type] = {}
        self.namespace: dict[str, Any] = {}
        self._encoder = Encoder(extend=self._extend)

    def encode(self, value: Any) -> Any:
        """The tree of a value.

        Raises:
            Unsendable: it is nothing that can be sent.
        """
        try:
            return self._encoder.encode(value)
        except NotPlain as error:
            if self._link.used:  # the program may have made it so large
                raise self._link.refuse("too large") from None
            raise Unsendable(str(error)) from None

    def take_objects(self, given: bool = True) -> list[Any]:
        """The state of all objects of the tests that were met since the last message.

        Args:
            given: the tests hand them over; else the program has asked for them.
        """
        found, done = [], set()
        while self._waiting:
            value = self._waiting.pop()
            number = self._object_numbers[id(value)]
            if number in done:
                continue
            done.add(number)
            if given:
                self._given.add(type(value))
            pairs = [[name, self.encode(item)] for name, item in state_of(value).items()]
            found.append([number, type(value).__name__, _methods(type(value)), pairs])
        return found

    def _extend(self, value: Any, _: Callable[[Any], Any]) -> Any:
        kind = type(value)
        number = value.__dict__.get("_number") if hasattr(value, "__dict__") else None
        if kind.__module__ == "solution" or kind.__module__ == "mirrorpo.rewards.sandbox.live":
            if isinstance(value, BaseException):
                return ["e", describe(value, _own_name)]
            if isinstance(number, int):
                return ["r", number]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, BaseException):
            return ["e", describe(value, _own_name)]
        if callable(value) and not _is_own_object(value) and not _is_tool(value):
            return _library_reference(value) or ["k", self._number(value), getattr(value, "__name__", "callback")[:80]]
        if isinstance(value, types.CoroutineType):
            raise self._link.refuse("opaque")
        if _is_tool(value):
            return ["p", self._number(value)]
        if isinstance(value, collections.abc.Iterator):
            return ["it", self._number(value)]
        if isinstance(value, types.ModuleType):
            return ["m", value.__name__] if value.__name__ in sys.stdlib_module_names else None
        if isinstance(value, enum.Enum):
            return ["em", kind.__name__, value.name]
        if _is_own_object(value):
            self._waiting.append(value)
            return ["n", self._object_number(value)]
        raise Unsendable(kind.__name__)

    def _class(self, value: type) -> Any:
        if value.__module__ == "solution":
            number = type.__getattribute__(value, "__dict__").get("_number")
            return ["r", number] if isinstance(number, int) else ["E", describe_class(value, lambda _: None)]
        if value.__module__ == "__main__":
            self._classes.setdefault(value.__name__, value)
            return ["N", value.__name__, _methods(value)]
        return _library_reference(value) or ["k", self._number(value), value.__name__[:80]]

    def _number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._values.append(value)
            self._numbers[id(value)] = len(self._values) - 1
        return self._numbers[id(value)]

    def _object_number(self, value: Any) -> int:
        if id(value) not in self._object_numbers:
            number = 2 * len(self._objects)
            while number in self._objects:
                number += 2
            self._keep(number, value)
        return self._object_numbers[id(value)]

    def _keep(self, number: int, value: Any) -> None:
        self._objects[number] = value
        self._object_numbers[id(value)] = number
        self._classes.setdefault(type(value).__name__, type(value))

    def class_named(self, name: str) -> type:
        """A class of the tests: one that was met, or one at module level."""
        found = self._classes.get(name, self.namespace.get(name))
        if not isinstance(found, type) or found.__module__ != "__main__":
            raise NotPlain("no class of the tests")
        return found

    def decode(self, tag: str, rest: list[Any], _: Callable[[Any], Any]) -> Any:
        """Something of the judge's that comes back."""
        if tag in ("k", "it", "p"):
            return self._values[_natural(rest[0])]
        if tag == "n":
            return self._objects[_natural(rest[0])]
        if tag == "em":
            found: Any = self.class_named(str(rest[0]))
            return found[str(rest[1])] if issubclass(found, enum.Enum) else None
        if tag == "N":
            return self.class_named(str(rest[0]))
        if tag == "g":
            return PLAIN_KINDS[str(rest[0])]
        raise NotPlain(f"an unknown kind {tag[:20]!r}")

    def take_over(
        self, objects: Any, decode: Callable[[Any], Any], pending: list[Callable[[], None]], value: Any = None
    ) -> None:
        """Objects that the program made or changed: new ones at once, changed ones when the statement ends.

        A changed one that is part of the result is taken over at once, with all that hangs on it.
        """
        fresh: list[tuple[Any, Any]] = []
        for number, name, pairs in objects:
            if _natural(number) not in self._objects:
                if number % 2 == 0:
                    raise NotPlain("an object that nobody sent")
                kind: Any = self.class_named(str(name))
                self._keep(number, kind.__new__(kind))
            fresh.append((number, pairs))
        wanted = _reached(value, dict(fresh))
        for number, pairs in fresh:
            state = {str(key): decode(tree) for key, tree in pairs}
            check_state(self._objects[number], state)

            def change(one: Any = self._objects[number], new: dict[str, Any] = state) -> None:
                set_state(one, new)

            if number in wanted or number % 2:
                change()
            else:
                pending.append(change)

    def serve(self, question: Message, decode: Callable[[Any], Any]) -> Message:
        """Answers a question of the program."""
        link = self._link
        try:
            kind, subject, arguments, words, objects = question
            self.take_over(objects, decode, [], [arguments, words, subject])
            given = [decode(tree) for tree in arguments]
            named = {str(name): decode(tree) for name, tree in words}
            if kind == "next":
                try:
                    value = next(self._values[_natural(subject)])
                except StopIteration:
                    return ["end"]
            elif kind == "call":
                value = self._values[_natural(subject)](*given, **named)
            elif kind == "attribute" and not str(arguments[0]).startswith("_"):
                tool = self._values[_natural(subject)]
                value = getattr(tool, *given) if _is_tool(tool) else None
            elif kind == "input":
                value = builtins.input(*given)
            elif kind == "stdin" and subject in ("read", "readline", "readlines"):
                value = getattr(sys.stdin, subject)(*given)
            else:
                value = self._run(kind, subject, given, named)
            tree, handed = self.encode(value), self.take_objects(given=kind in ("call", "next"))
            self._waiting.extend(self._objects[number] for number, _, _ in objects)
            return ["value", tree, handed + self.take_objects(given=False)]
        except AssertionError as error:
            link.refuse("failed")
            return ["raised", describe(error, _own_name)]
        except NotPlain:
            link.refuse("opaque")
            return ["raised", describe(TypeError("no message"), lambda _: None)]
        except BaseException as error:  # noqa: BLE001  (the program gets what a function of the tests raises)
            return ["raised", describe(error, _own_name)]

    def _run(self, kind: str, subject: Any, given: list[Any], named: dict[str, Any]) -> Any:
        """A method or the constructor of a class of the tests."""
        name, method = (str(part) for part in subject)
        owner = self.class_named(name)
        known = any(issubclass(owner, given_class) or issubclass(given_class, owner) for given_class in self._given)
        if kind == "new":
            if not known and not self._link.simple.get(name, False):
                raise TypeError(f"{name} belongs to the tests")
            return owner(*given, **named)
        if not known and method not in _OPEN:
            raise TypeError(f"{name}.{method} belongs to the tests")
        return getattr(owner, method)(*given, **named)


def _own_name(kind: type) -> str | None:
    """How the program knows a class of the tests."""
    return kind.__name__ if kind.__module__ == "__main__" else None


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise NotPlain("no reference")
    return number


def _is_tool(value: Any) -> bool:
    """Something to write to, or a mock: the program may use its public attributes."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(value).__mro__}
    return isinstance(value, io.StringIO | io.BytesIO) or ("unittest.mock", "NonCallableMock") in kinds


def _is_own_object(value: Any) -> bool:
    return type(value).__module__ == "__main__" and not isinstance(value, types.FunctionType)


def state_of(value: Any) -> dict[str, Any]:
    """Attributes of an object, slots included."""
    found = {
        name: getattr(value, name)
        for kind in type(value).__mro__
        for name in _slots(kind)
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }
    return {**found, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def check_state(value: Any, state: dict[str, Any]) -> None:
    """Refuses attributes that would stand in for a method of the tests' class: the program would answer for it.

    Raises:
        NotPlain: there is such an attribute.
    """
    for name in state.keys() - state_of(value).keys():
        found = inspect.getattr_static(type(value), name, None)
        if name.startswith("__") or (hasattr(type(found), "__get__") and not isinstance(found, _SLOT)):
            raise NotPlain(f"an attribute in place of {name[:40]}")


def set_state(value: Any, state: dict[str, Any]) -> None:
    for name in state_of(value).keys() - state.keys():
        object.__delattr__(value, name)
    for name, item in state.items():
        object.__setattr__(value, name, item)


def _methods(kind: type) -> list[str]:
    """Names of the methods that a class of the tests defines."""
    own = [base for base in kind.__mro__ if base.__module__ == "__main__"]
    return sorted(
        {name for base in own for name, value in vars(base).items() if callable(value) and name != "__class__"}
    )


def _library_reference(value: Any) -> Any:
    """A function or class of the standard library by its name; both sides have it."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    owner = getattr(value, "__objclass__", None)
    if module is None and owner is not None:  # str.upper
        module = owner.__module__
    if not isinstance(module, str) or module.partition(".")[0] not in {*sys.stdlib_module_names, "builtins"}:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return ["g", module, name] if found is value else None


def _reached(value: Any, objects: dict[int, Any]) -> set[int]:
    """Numbers of objects that a tree refers to, directly or through others."""
    found: set[int] = set()
    waiting = [value]
    while waiting:
        tree = waiting.pop()
        if type(tree) is not list:
            continue
        if len(tree) == 2 and tree[0] == "n" and type(tree[1]) is int:
            if tree[1] not in found:
                found.add(tree[1])
                waiting.append(objects.get(tree[1]))
            continue
        waiting.extend(tree)
    return found


# What stands for them in the program's process.


class Input:
    """Standard input: what the tests have put there."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.read = functools.partial(ask, "stdin", "read")
        self.readline = functools.partial(ask, "stdin", "readline")
        self.readlines = functools.partial(ask, "stdin", "readlines")

    def __iter__(self) -> Any:
        return iter(self.readline, "")


def keep_given(this: Any, *_: Any, **named: Any) -> None:
    """The constructor of what stands in for an exception class of the tests."""
    if named:
        vars(this)[GIVEN] = named


class Tool:
    """A tool of the tests, such as a mock or a buffer: its attributes and calls are asked for."""

    def __init__(self, number: int, ask: Callable[..., Any]) -> None:
        self._number = number
        self._ask = ask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("attribute", self._number, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self._number, *arguments, **named)

    def __iter__(self) -> Any:
        return iter(self.readline, "")


class Items:
    """An iterator of the tests, pulled item by item."""

    def __init__(self, number: int, pull: Callable[[], Message], decode: Callable[[Any], Any]) -> None:
        self.number = number
        self._pull = pull
        self._decode = decode

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> Any:
        return self._decode(self._pull()[1])
