"""Messages between two processes that do not trust each other: plain data, framed, asked and answered.

The untrusted side *encodes*: a value of a plain type (or of a subclass: then its plain content) becomes a JSON tree;
anything else becomes the mark ``opaque``. The trusted side *decodes*: it accepts the shapes below and nothing else, and
builds every value itself, exact types only, so that no method of the untrusted program is ever called by a comparison.
Two sides that talk (``link``, ``server``) extend both with references to what stays where it is.

=============== ==================================================== ======================================
JSON            value                                                built by
=============== ==================================================== ======================================
null, bool, str None, bool, str (lone surrogates survive)
number          int below 2**53 in size
["i", hex]      any other int
["f", hex]      float, also ``inf`` and ``nan``
["c", hex, hex] complex
["b", hex]      bytes
["l", [...]]    list; ``t`` tuple, ``s`` set, ``z`` frozenset
["d", [[k,v]]]  dict, in its order
["nt", ...]     named tuple: name, fields, items                     ``_named_tuple``
["x", kind, []] further types of the standard library                ``_FURTHER``: a few constructors
["o", name]     opaque: not plain data                               ``Opaque``
others          references                                           the caller's ``extend``
=============== ==================================================== ======================================

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import json
import keyword
import os
import struct
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 80
MAX_ITEMS = 200_000
# Numbers of these sizes stay exact in every JSON reader.
_SMALL = 2**53


class NotPlain(ValueError):
    """Bytes that do not describe plain data, or too much of it."""


class Opaque:
    """Stands for a value that is not plain data. It equals nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<opaque {self.name}>"


_FURTHER: dict[str, Callable[..., Any]] = {
    "range": lambda a, b, c: range(a, b, c),
    "deque": lambda items: collections.deque(items),
    "bytearray": lambda data: bytearray(data),
    "counter": lambda items: collections.Counter(items),
    "ordered": lambda items: collections.OrderedDict(items),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "fraction": lambda n, d: fractions.Fraction(n, d),
    "decimal": lambda text: decimal.Decimal(text),
    "date": lambda *parts: datetime.date(*parts),
    "datetime": lambda *parts: datetime.datetime(*parts),
    "time": lambda *parts: datetime.time(*parts),
    "timezone": lambda offset: datetime.timezone(offset),
    "timedelta": lambda *parts: datetime.timedelta(*parts),
    "default": lambda factory, items: collections.defaultdict(_FACTORIES[factory], items),
}
# What a default dictionary may make, by name.
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}
# No field of a named tuple may look like a method of a plain value: tests would call it.
_METHODS = frozenset(n for kind in (str, bytes, list, tuple, dict, set, int, float, complex) for n in dir(kind))
_MAX_FIELDS = 64
# Containers whose changes by a called function show in the caller.
CHANGEABLE = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.OrderedDict)
CHANGEABLE += (collections.defaultdict,)


@functools.lru_cache(256)
def _named_tuple_class(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _named_tuple(name: Any, fields: Any, items: list[Any]) -> tuple[Any, ...]:
    """A named tuple of our own making; a bare tuple if its fields could stand for methods."""
    names = [str(field) for field in fields]
    legal = all(f.isidentifier() and not f.startswith("_") and not keyword.iskeyword(f) for f in [str(name), *names])
    if not legal or len(names) > _MAX_FIELDS or len({*names}) != len(items) or _METHODS & {*names}:
        return tuple(items)
    return (
        tuple(items) if any(callable(item) for item in items) else _named_tuple_class(str(name), tuple(names))(*items)
    )


class Encoder:
    """Turns values of the untrusted program into JSON bytes.

    Args:
        extend: writes a value that is not plain, given a function that writes what is in it; None leaves it opaque.
        kept: types whose values are left to ``extend`` although they derive from a plain type.
    """

    def __init__(
        self,
        extend: Callable[[Any, Callable[[Any], Any]], Any] | None = None,
        kept: Callable[[type], bool] | None = None,
    ) -> None:
        self._extend = extend
        self._kept = kept
        self._items = 0

    def encode(self, value: Any) -> Any:
        """The JSON tree of a value.

        Raises:
            NotPlain: deeper than ``MAX_DEPTH`` or more than ``MAX_ITEMS`` items (a cycle is both).
        """
        self._items = 0
        return self._tree(value, 0)

    def _tree(self, value: Any, depth: int) -> Any:
        self._items += 1
        if depth > MAX_DEPTH or self._items > MAX_ITEMS:
            raise NotPlain("too deep or too many items")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if self._extend is not None and self._kept is not None and self._kept(kind):
            return self._extend(value, lambda item: self._tree(item, depth + 1))
        if issubclass(kind, str):
            return str.__str__(value) if kind is str else "".join(str.__iter__(value))
        if issubclass(kind, int):
            number = int.__int__(value)
            return number if -_SMALL < number < _SMALL else ["i", hex(number)]
        if issubclass(kind, float):
            return ["f", float.hex(float.__float__(value))]
        if kind is complex:
            return ["c", value.real.hex(), value.imag.hex()]
        if issubclass(kind, bytes):
            return ["b", bytes.hex(value)]
        return self._container(value, kind, depth + 1)

    def _container(self, value: Any, kind: type, depth: int) -> Any:
        further = self._further(value, kind)
        if further is not None:
            name, arguments = further
            return ["x", name, [self._tree(item, depth) for item in arguments]]
        fields = type.__dict__["__dict__"].__get__(kind).get("_fields") if issubclass(kind, tuple) else None
        if type(fields) is tuple and len(fields) == tuple.__len__(value) and all(type(f) is str for f in fields):
            name = type.__dict__["__name__"].__get__(kind)
            return ["nt", name, list(fields), [self._tree(item, depth) for item in tuple.__iter__(value)]]
        for base, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z")):
            if issubclass(kind, base):
                return [tag, [self._tree(item, depth) for item in base.__iter__(value)]]
        if issubclass(kind, dict):
            pairs = list(dict.items(value))
            return ["d", [[self._tree(key, depth), self._tree(item, depth)] for key, item in pairs]]
        if self._extend is not None:
            tree = self._extend(value, lambda item: self._tree(item, depth))
            if tree is not None:
                return tree
        return ["o", type.__dict__["__name__"].__get__(kind)[:80]]

    def _further(self, value: Any, kind: type) -> tuple[str, list[Any]] | None:
        """Name and arguments of a constructor in ``_FURTHER``; exact types only ("is": a metaclass may equal all)."""
        if kind is list or kind is tuple or kind is dict or kind is set:
            return None
        if kind is collections.Counter:
            return "counter", [dict(dict.items(value))]
        if kind is collections.OrderedDict:
            return "ordered", [list(dict.items(value))]
        if kind is range:
            return "range", [value.start, value.stop, value.step]
        if kind is collections.deque:
            return "deque", [list(value)]
        if kind is bytearray:
            return "bytearray", [bytes(value)]
        if kind is fractions.Fraction:
            return "fraction", [value.numerator, value.denominator]
        if kind is decimal.Decimal:
            return "decimal", [str(value)]
        if kind is datetime.datetime and (value.tzinfo is None or type(value.tzinfo) is datetime.timezone):
            return "datetime", [*value.timetuple()[:6], value.microsecond, value.tzinfo]
        if kind is datetime.time and (value.tzinfo is None or type(value.tzinfo) is datetime.timezone):
            return "time", [value.hour, value.minute, value.second, value.microsecond, value.tzinfo]
        if kind is datetime.timezone:
            return "timezone", [value.utcoffset(None)]
        if kind is collections.defaultdict and value.default_factory in _FACTORIES.values():
            return "default", [value.default_factory.__name__, dict(dict.items(value))]
        if kind is datetime.date:
            return "date", [value.year, value.month, value.day]
        if kind is datetime.timedelta:
            return "timedelta", [value.days, value.seconds, value.microseconds]
        if kind is type({}.keys()):
            return "keys", [list(value)]
        if kind is type({}.values()) or kind is type({}.items()):
            return "values", [list(value)]
        return None


def update(old: Any, new: Any) -> None:
    """Makes a container equal to what the other side has made of it, in place."""
    if old is new or type(old) is not type(new):
        return
    if type(old) is list:
        for index, (one, other) in enumerate(zip(old, new, strict=False)):
            if type(one) is type(other) and type(one) in CHANGEABLE:
                update(one, other)
                new[index] = one
        old[:] = new
    elif isinstance(old, dict):
        for key in old.keys() & new.keys():
            if type(old[key]) is type(new[key]) and type(old[key]) in CHANGEABLE:
                update(old[key], new[key])
                new[key] = old[key]
        old.clear()
        old.update(new)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif hasattr(old, "extend"):  # bytearray, deque
        old.clear()
        old.extend(new)


def to_bytes(tree: Any) -> bytes:
    """JSON trees as bytes; lone surrogates are escaped."""
    return json.dumps(tree, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def from_bytes(data: bytes) -> Any:
    """The JSON tree of bytes that may be hostile.

    Raises:
        NotPlain: not JSON, nested too deeply, or a number with too many digits.
    """
    try:
        return json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"not a message: {type(error).__name__}") from None


class Decoder:
    """Builds values from JSON trees that may be hostile.

    Args:
        further: also build the further types (their constructors and comparisons may take long: isolated side only).
        extend: builds what an extended encoder wrote, from its tag and the rest, given a function that builds what
            is in it; it may raise ``KeyError`` for a tag that it does not know.

    Attributes:
        opaque: names of the opaque values met so far.
        is_core: False once a further type was met.
    """

    def __init__(
        self, *, further: bool = True, extend: Callable[[str, list[Any], Callable[[Any], Any]], Any] | None = None
    ) -> None:
        self._build_further = further
        self._extend = extend
        self.opaque: list[str] = []
        self.is_core = True

    def decode(self, tree: Any) -> Any:
        """The value.

        Raises:
            NotPlain: not one of the shapes of this file.
        """
        try:
            return self._value(tree, 0)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise NotPlain(f"not plain data: {type(error).__name__}") from None

    def _value(self, tree: Any, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH:
            raise NotPlain("too deep")
        if tree is None or type(tree) in (bool, str, int):
            return tree
        if type(tree) is not list or not tree or type(tree[0]) is not str:
            raise NotPlain("an unknown shape")
        tag, *rest = tree
        if tag in ("l", "t", "s", "z") and len(rest) == 1 and type(rest[0]) is list:
            items = [self._value(item, depth + 1) for item in rest[0]]
            return {"l": list, "t": tuple, "s": set, "z": frozenset}[tag](items)
        if tag == "d" and len(rest) == 1 and type(rest[0]) is list:
            return {self._value(key, depth + 1): self._value(item, depth + 1) for key, item in rest[0]}
        if tag == "x" and len(rest) == 2:
            self.is_core = False
            arguments = [self._value(item, depth + 1) for item in rest[1]]
            return _FURTHER[rest[0]](*arguments) if self._build_further else Opaque(str(rest[0]))
        if tag == "nt" and len(rest) == 3:
            self.is_core = False
            return _named_tuple(rest[0], rest[1], [self._value(item, depth + 1) for item in rest[2]])
        if tag == "o" and len(rest) == 1:
            self.opaque.append(str(rest[0])[:80])
            return Opaque(str(rest[0])[:80])
        if self._extend is not None and tag not in ("i", "f", "c", "b"):
            return self._extend(tag, rest, lambda item: self._value(item, depth + 1))
        return _scalar(tag, rest)


def _scalar(tag: str, rest: list[Any]) -> Any:
    if tag == "i" and len(rest) == 1:
        return int(rest[0], 16)
    if tag == "f" and len(rest) == 1:
        return float.fromhex(rest[0])
    if tag == "c" and len(rest) == 2:
        return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
    if tag == "b" and len(rest) == 1:
        return bytes.fromhex(rest[0])
    raise NotPlain(f"an unknown kind {tag[:20]!r}")


HEADER = struct.Struct("!I")


class ChannelClosed(EOFError):
    """The other side is gone."""


class TooLarge(ValueError):
    """A message is longer than the reader accepts."""


def frame(payload: bytes) -> bytes:
    """The payload with its length in front.

    Example:
        >>> frame(b"ok")
        b'\\x00\\x00\\x00\\x02ok'
    """
    return HEADER.pack(len(payload)) + payload


def read_frame(fd: int, limit: int) -> bytes:
    """The next payload from a blocking descriptor.

    Raises:
        ChannelClosed: end of file before the payload is complete.
        TooLarge: the header announces more than ``limit`` bytes.
    """
    (size,) = HEADER.unpack(_exactly(fd, HEADER.size))
    if size > limit:
        raise TooLarge(f"a message of {size:,} bytes; at most {limit:,} are accepted")
    return _exactly(fd, size)


def write_frame(fd: int, payload: bytes) -> None:
    """Writes a payload to a blocking descriptor, all of it.

    Raises:
        ChannelClosed: nobody reads any more.
    """
    view = memoryview(frame(payload))
    while view:
        try:
            view = view[os.write(fd, view) :]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed(str(error)) from error


def _exactly(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        try:
            part = os.read(fd, min(size, 1 << 20))
        except ConnectionResetError as error:
            raise ChannelClosed(str(error)) from error
        if not part:
            raise ChannelClosed("end of file")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


Message = list[Any]


class Peer:
    """One end of the channel.

    Args:
        fd: descriptor of the channel.
        limit: of a message that is read, in bytes.
        serve: answers a question of the other side; it must not raise.
    """

    def __init__(self, fd: int, limit: int, serve: Callable[[Message], Message]) -> None:
        self._fd = fd
        self._limit = limit
        self._serve = serve

    def ask(self, question: Message) -> Message:
        """The answer to a question.

        Raises:
            ChannelClosed: the other side is gone.
            NotPlain, TooLarge: what it sent is no message, or too long.
        """
        self._write("?", question)
        return self.wait()

    def wait(self) -> Message:
        """The next answer; answers questions until then."""
        while True:
            kind, message = self._read()
            if kind == "!":
                return message
            self._write("!", self._serve(message))

    def answer(self, message: Message) -> None:
        """Answers what was never asked: that the program is loaded."""
        self._write("!", message)

    def serve(self) -> None:
        """Answers questions until the other side is gone."""
        while True:
            _, message = self._read()
            self._write("!", self._serve(message))

    def _write(self, kind: str, message: Message) -> None:
        write_frame(self._fd, to_bytes([kind, message]))

    def _read(self) -> tuple[str, Message]:
        got = from_bytes(read_frame(self._fd, self._limit))
        if type(got) is not list or len(got) != 2 or got[0] not in ("?", "!") or type(got[1]) is not list or not got[1]:
            raise NotPlain("no message")
        return got[0], got[1]
