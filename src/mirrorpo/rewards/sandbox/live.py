"""What stands for the program's functions, iterators, classes and objects in the judge.

Functions are called with plain values and answer with plain values. An object that stays with the program is a ``Live``
one: whatever the tests do with it is either asked for by name, where the tests construct its class themselves, or ends
the judgement (``Refused``).

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from mirrorpo.rewards.sandbox.messages import MAX_ITEMS
from mirrorpo.rewards.sandbox.roles import PLAIN_ATTRIBUTES

# How a live object came about. The tests made it themselves; or it came out of one of those; or a function returned it.
MADE, DERIVED, RETURNED, ITERATING = "made", "derived", "returned", "iterating"
# Asked for by name on objects whose class the tests know: the answer is a value, as that of a function is.
_ANSWERS = {
    "len": int, "hash": int, "str": str, "repr": str, "int": int, "float": float, "complex": complex, "index": int,
    "bytes": bytes,
    "round": None, "abs": None, "neg": None, "pos": None, "invert": None, "getitem": None, "iter": None, "next": None,
    "reversed": None, "copy": None, "deepcopy": None, "format": str, "trunc": None, "floor": None, "ceil": None,
}  # fmt: skip
# Between two objects; with plain data only if the tests made the object themselves.
_BINARY = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "and", "or", "xor", "lshift",
    "rshift",
    "lt", "le", "gt", "ge",
)  # fmt: skip
_REFLECTED = tuple(f"r{name}" for name in _BINARY[:14])
_IN_PLACE = tuple(f"i{name}" for name in _BINARY[:14] if name != "divmod")


class Refused(BaseException):
    """The tests did something with a live object that only the program could answer. No test catches it."""


class Function:
    """A function of the program: the tests may call it, and hand it on."""

    def __init__(self, link: Any, number: int, name: str, origin: str = RETURNED) -> None:
        self._link = link
        self._number = number
        self._origin = origin
        self.__name__ = self.__qualname__ = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.call(["r", self._number], arguments, named, self._origin)

    def __getattr__(self, name: str) -> Any:
        """What hangs on a function itself: ``f.cache_info``, a counter that a decorator keeps."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.operate("getattr", self, (name,), RETURNED)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a class attribute of the tests it is a method, as any function is."""
        return self if instance is None else lambda *a, **k: self(instance, *a, **k)

    def __repr__(self) -> str:
        return f"<function {self.__name__} of the program>"


class Iterator:
    """An iterator of the program, pulled item by item."""

    def __init__(self, link: Any, number: int) -> None:
        self._link = link
        self._number = number
        self._pulled = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        self._pulled += 1
        if self._pulled > MAX_ITEMS:
            raise self._link.refuse("too large")
        return self._link.operate("next", self, (), RETURNED)


class Generator(Iterator):
    """A generator of the program."""

    def send(self, value: Any) -> Any:
        """``generator.send``."""
        return self._link.operate("send", self, (value,), RETURNED)

    def throw(self, error: Any) -> Any:
        """``generator.throw``."""
        return self._link.operate("throw", self, (error,), RETURNED)

    def close(self) -> None:
        """``generator.close``."""
        self._link.operate("close", self, (), RETURNED)


class Awaited:
    """A coroutine of the program; it runs to its end in the program's process when the tests await it."""

    def __init__(self, link: Any, number: int) -> None:
        self._link = link
        self._number = number

    def __await__(self) -> Any:
        return self._link.operate("await", self, (), RETURNED)
        yield


async def awaited(link: Any, number: int) -> Any:
    """A real coroutine, for ``asyncio.run``."""
    return await Awaited(link, number)


class AsyncIterator:
    """An asynchronous generator of the program."""

    def __init__(self, link: Any, number: int) -> None:
        self._link = link
        self._number = number

    def __aiter__(self) -> AsyncIterator:
        return self

    async def __anext__(self) -> Any:
        value = self._link.operate("anext", self, (), RETURNED)
        if value is None:
            raise StopAsyncIteration
        return value[0]


class LiveType(type):
    """The judge's copy of a class of the program."""

    _link: Any
    _number: int
    _known: bool
    _strong: bool
    _made: bool

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        origin = MADE if cls._known else RETURNED
        return cls._link.call(["r", cls._number], arguments, named, origin)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or not cls._known:
            raise AttributeError(name) if name.startswith("__") else cls._link.refuse(f"attribute {name}")
        value = cls._link.operate("getattr", cls, (name,), DERIVED)
        if not cls._made and not isinstance(value, Live | Function):
            # ``== Config.EXPECTED``: a class that the tests never construct is no place for expected values.
            raise cls._link.refuse(f"attribute {name} of a class")
        return value

    def __setattr__(cls, name: str, value: Any) -> None:
        cls._link.operate("setattr", cls, (name, value), DERIVED)

    def __iter__(cls) -> Any:
        if not cls._known:
            raise cls._link.refuse("iteration")
        return iter(cls._link.operate("list", cls, (), DERIVED))

    def __len__(cls) -> int:
        if not cls._known:
            raise cls._link.refuse("length")
        return len(cls._link.operate("list", cls, (), DERIVED))

    def __getitem__(cls, name: Any) -> Any:
        if all(isinstance(part, type | types.GenericAlias) for part in (name if type(name) is tuple else (name,))):
            return cls  # Stack[int]
        if not cls._known:
            raise cls._link.refuse("item")
        return cls._link.operate("getitem", cls, (name,), DERIVED)


class Live(metaclass=LiveType):
    """An object that stays with the program."""

    _link: Any = None
    _number = -1
    _known = False
    _strong = False
    _made = False

    def _may(self, name: str) -> None:
        """Refuses what only a class that the tests construct may answer."""
        mine = vars(self)
        if mine["_origin"] == MADE or (type(self)._known and name != "bool"):
            return
        if mine["_origin"] == ITERATING and name in ("iter", "next"):
            return
        raise mine["_link"].refuse(f"{name} of a live object")

    def _ask(self, name: str, arguments: tuple[Any, ...], origin: str = DERIVED) -> Any:
        return vars(self)["_link"].operate(name, self, arguments, origin)

    def _answer(self, name: str, *arguments: Any) -> Any:
        self._may(name)
        value = self._ask(name, arguments)
        expected = _ANSWERS[name]
        if expected is not None and type(value) is not expected:
            raise vars(self)["_link"].refuse(f"{name} of a live object")
        return value

    def _pair(self, name: str, other: Any) -> Any:
        """An operator. With plain data it is answered only for an object that the tests made of a class they know."""
        link, made = vars(self)["_link"], vars(self)["_origin"] == MADE
        if isinstance(other, Live):
            if not (made or type(self)._known or vars(other)["_origin"] == MADE or type(other)._known):
                raise link.refuse(f"{name} between live objects")
        elif not (made and type(self)._strong):
            raise link.refuse(f"{name} of a live object and plain data")
        return self._ask(name, (other,))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Live) and vars(self)["_number"] == vars(other)["_number"]:
            return True
        if other is None:
            return False
        if not isinstance(other, Live):  # equal and unequal are both the program's word: neither earns anything
            raise vars(self)["_link"].refuse("opaque")
        # An object that equals one of a class made up just now would equal anything.
        return self._pair("eq", other) is True and self._ask("equals anything", ()) is False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if vars(self)["_origin"] == MADE:
            return self._answer("hash")
        return hash((Live, vars(self)["_number"]))

    def __bool__(self) -> bool:
        if vars(self)["_origin"] != MADE:
            raise vars(self)["_link"].refuse("truth of a live object")
        return self._ask("bool", ()) is True

    def __contains__(self, item: Any) -> bool:
        if not (vars(self)["_origin"] == MADE and type(self)._strong):
            raise vars(self)["_link"].refuse("membership in a live object")
        return self._ask("contains", (item,)) is True

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._may("call")
        mine = vars(self)
        return mine["_link"].call(["r", mine["_number"]], arguments, named, DERIVED)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name != "__dict__":
            raise AttributeError(name)
        self._check_attribute(name)
        value = self._ask("getattr", (name,))
        link, mine = vars(self)["_link"], vars(self)["_origin"] == MADE and type(self)._strong
        if name in PLAIN_ATTRIBUTES and not mine and name not in link.attributes and isinstance(value, Function):
            raise link.refuse(f"method {name[:40]} of a live object")  # the tests take it for a text, a list, ...
        link.lend(self, name, value)
        return value

    def _check_attribute(self, name: str) -> None:
        mine = vars(self)
        if mine["_origin"] == RETURNED and not type(self)._known:
            raise mine["_link"].refuse(f"attribute {name[:40]} of a live object")

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_attribute(name)
        self._ask("setattr", (name, value))

    def __delattr__(self, name: str) -> None:
        self._check_attribute(name)
        self._ask("delattr", (name,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._may("setitem")
        self._ask("setitem", (key, value))

    def __delitem__(self, key: Any) -> None:
        self._may("delitem")
        self._ask("delitem", (key,))

    def __iter__(self) -> Any:
        self._may("iter")
        found = self._ask("iter", (), ITERATING)
        return found if isinstance(found, Live) else iter(found)

    def __next__(self) -> Any:
        return self._answer("next")

    def __enter__(self) -> Any:
        return self._ask("enter", (), vars(self)["_origin"])

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        """The program may swallow what the tests raise themselves; no failed assertion, no exception of its own."""
        link = vars(self)["_link"]
        own = error is link.raised
        swallowed = self._ask("exit", (error if isinstance(error, Exception) else None,))
        return swallowed is True and not own and isinstance(error, Exception) and not isinstance(error, AssertionError)

    def __copy__(self) -> Any:
        return self._answer("copy")

    def __deepcopy__(self, _: Any) -> Any:
        return self._answer("deepcopy")

    def __format__(self, form: str) -> str:
        return self._answer("format", form)

    def __round__(self, *digits: int) -> Any:
        return self._answer("round", *digits)

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("an object of the program cannot be pickled")


def _define(names: Iterable[str], make: Callable[[str], Any]) -> None:
    for name in names:
        type.__setattr__(Live, f"__{name}__", make(name))


def _as_operator(name: str) -> Any:
    return lambda self, other: self._pair(name, other)


def _as_answer(name: str) -> Any:
    return lambda self, *arguments: self._answer(name, *arguments)


def _as_change(name: str) -> Any:
    """``account += other``: the same object keeps its handle."""

    def change(self: Any, other: Any) -> Any:
        result = self._pair(name, other)
        return self if isinstance(result, Live) and vars(result)["_number"] == vars(self)["_number"] else result

    return change


_define([*_BINARY, *_REFLECTED], _as_operator)
_define(_IN_PLACE, _as_change)
_define(_ANSWERS.keys() - {"hash", "iter", "next", "copy", "deepcopy", "format", "round"}, _as_answer)
