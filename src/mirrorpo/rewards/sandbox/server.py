"""The program's end: it keeps live objects and does what the judge asks for. It learns arguments, never expectations.

Standard library only; runs in the program's process.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import enum
import functools
import importlib
import inspect
import io
import math
import operator
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

from mirrorpo.rewards.sandbox.callbacks import PLAIN_KINDS, Input, Items, Tool, keep_given, set_state, state_of
from mirrorpo.rewards.sandbox.messages import (
    CHANGEABLE,
    ChannelClosed,
    Decoder,
    Encoder,
    Message,
    NotPlain,
    Peer,
    TooLarge,
    update,
)
from mirrorpo.rewards.sandbox.raised import Classes, describe, describe_class

_MAX_PRINTED = 100_000
_MAX_WARNINGS = 100
_ITERATORS = tuple(
    type(iterator)
    for iterator in (
        iter([]), iter(()), iter({}), iter(set()), iter(""), iter(range(0)), iter(b""), iter({}.values()),
        iter({}.items()), reversed([]), map(abs, ()), filter(None, ()), zip(), enumerate(()), (_ for _ in ()),
    )
)  # fmt: skip
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type(len),
    type(str.upper),
    type([].append),
)
_SINGLE = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "contains", "getitem",
    "setitem", "delitem", "neg", "pos", "invert", "abs", "index", "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
_IN_PLACE = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_BUILTIN = (
    "len",
    "str",
    "repr",
    "int",
    "float",
    "complex",
    "bytes",
    "bool",
    "iter",
    "next",
    "round",
    "format",
    "reversed",
)
_BUILTIN += ("divmod", "pow", "list", "getattr", "setattr", "delattr")


class _Output(io.RawIOBase):
    """What a program prints, up to a limit."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(self.data) < _MAX_PRINTED:
            self.data += bytes(data[:_MAX_PRINTED])
        return len(data)

    def take(self) -> str:
        """What was printed since the last time."""
        text, self.data = self.data.decode("utf-8", "replace"), bytearray()
        return text


def _equals_anything(value: Any) -> bool:
    """Whether an object equals one of a class that did not exist before."""
    try:
        return bool(value == type("Other", (), {})())
    except Exception:  # noqa: BLE001  (its comparison wants something of its own kind)
        return False


def _exit(value: Any, error: Any) -> bool:
    kind = None if error is None else type(error)
    return bool(type(value).__exit__(value, kind, error, None if error is None else error.__traceback__))


@functools.cache
def _event_loop() -> Any:
    # Imported by those who need it: the size of the template process is part of the price of every copy.
    return importlib.import_module("asyncio").new_event_loop()


def _awaited(value: Any) -> Any:
    return _event_loop().run_until_complete(value) if inspect.iscoroutine(value) else value


def _next_awaited(value: Any) -> list[Any] | None:
    """The next item of an asynchronous generator, in a list; None at its end."""
    try:
        return [_event_loop().run_until_complete(anext(value))]
    except StopAsyncIteration:
        return None


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name.rstrip("_"): getattr(operator, name) for name in _SINGLE},
    **{name: getattr(builtins, name) for name in _BUILTIN},
    **{f"i{name.rstrip('_')}": getattr(operator, f"i{name.rstrip('_')}") for name in _IN_PLACE},
    **{f"r{name.rstrip('_')}": _reflected(getattr(operator, name)) for name in _SINGLE[:7] + _SINGLE[-5:]},
    "rdivmod": lambda a, b: divmod(b, a),
    "rpow": lambda a, b: pow(b, a),
    "enter": lambda value: type(value).__enter__(value),
    "exit": _exit,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "send": lambda value, item: value.send(item),
    "throw": lambda value, error: value.throw(error),
    "close": lambda value: value.close(),
    "await": _awaited,
    "anext": _next_awaited,
    "update": lambda value, name, new: update(getattr(value, name), new),
    "hash": hash,
    "equals anything": _equals_anything,
}


class Server:
    """Answers the judge.

    Args:
        fd: descriptor of the channel.
        limit: of a message, in bytes.
        stubs: what is known of the classes of the tests.
        names: the program's namespace.
    """

    def __init__(self, fd: int, limit: int, stubs: list[dict[str, Any]], names: dict[str, Any]) -> None:
        self._peer = Peer(fd, limit, self._answer)
        self._names = names
        self._kept: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._objects: dict[int, Any] = {}
        self._object_numbers: dict[int, tuple[int, Any]] = {}
        self._next_object = 1
        self._waiting: list[Any] = []
        self._live_kinds: set[type] = set()
        self._stubs: dict[str, type] = {}
        self._callbacks: dict[int, Any] = {}
        self._printed = _Output()
        self._warned: list[Warning] = []
        self._classes = Classes(lambda name: self._class_named(name, []))
        for stub in stubs:
            names[stub["name"]] = self._stub(stub["name"], stub["methods"], stub["bases"], stub["members"])

    def run(self, load: Callable[[], None]) -> None:
        """Loads the program, then answers until the judge is gone."""
        try:
            sys.stdout = io.TextIOWrapper(cast("Any", self._printed), encoding="utf-8", write_through=True)
            sys.stdin = cast("Any", Input(self._question))
            builtins.input = lambda *prompt: self._question("input", "", *map(str, prompt))
            warnings.simplefilter("always")  # which of them count is for the tests to say
            warnings.showwarning = lambda message, *_, **__: self._warned.append(cast("Warning", message))
            load()
        except BaseException as error:  # noqa: BLE001  (whatever the program raises, SystemExit included)
            self._peer.answer(["raised", type(error).__name__[:80]])
            return
        self._printed.take()
        self._take_warnings()
        self._peer.answer(["ready"])
        with contextlib.suppress(ChannelClosed):
            self._peer.serve()

    # What the judge asks for.

    def _answer(self, question: Message) -> Message:
        operation = ""
        try:
            if question[0] == "name":
                return self._name(question[1], question[2])
            if question[0] == "call":
                _, target, sent, words, objects = question
                function = self._decode(target)
            else:
                _, operation, target, sent, objects = question
                words, function = [], _OPERATIONS[operation]
            touched = self._take_over(objects)
            arguments = [self._decode(tree) for tree in sent]
            named = {name: self._decode(tree) for name, tree in words}
        except (NotPlain, LookupError, ValueError) as error:
            return ["value", ["o", type(error).__name__], [], [], "", -1, []]
        if question[0] != "call":
            subject = self._decode(target)
            return self._done(lambda *given: function(subject, *given), arguments, {}, sent, touched, operation)
        return self._done(function, arguments, named, [*sent, *(tree for _, tree in words)], touched, "")

    def _done(
        self,
        function: Callable[..., Any],
        arguments: list[Any],
        named: dict[str, Any],
        sent: list[Any],
        touched: list[Any],
        operation: str,
    ) -> Message:
        """Calls a function; the answer has what became of its arguments and of the objects among them."""
        result: Any = None
        value: Any
        try:
            result = value = function(*arguments, **named)
            status = "value"
        except StopIteration as error:
            if operation in ("next", "send", "throw"):
                return ["end"]
            value, status = describe(error, self._class_number), "raised"
        except (ChannelClosed, TooLarge):
            raise
        except BaseException as error:  # noqa: BLE001  (whatever the program raises is its answer)
            value, status = describe(error, self._class_number), "raised"
        try:
            if status == "value":
                value = self._encoder().encode(value)
            after = self._changed([*arguments, *named.values()], sent)
            self._waiting.extend(touched)
            given = next((i for i, a in enumerate([*arguments, *named.values()]) if a is result), -1)
            return [status, value, after, self._take_objects(), self._printed.take(), given, self._take_warnings()]
        except (NotPlain, RecursionError):
            return ["too large", None, [], [], "", -1, []]
        except BaseException as error:  # noqa: BLE001  (an iterator's own code may run while its items are written)
            return ["raised", describe(error, self._class_number), [], [], "", -1, []]

    def _take_warnings(self) -> list[Any]:
        """The warnings since the last time."""
        warned, self._warned = self._warned[:_MAX_WARNINGS], []
        return [describe(warning, self._class_number) for warning in warned]

    def _changed(self, arguments: list[Any], sent: list[Any]) -> list[Any]:
        """Of arguments that are containers and no longer what was sent: what they are now."""
        after: list[Any] = []
        for argument, before in zip(arguments, sent, strict=True):
            tree = None
            if before is not None and any(type(argument) is kind for kind in CHANGEABLE):
                tree = self._encoder().encode(argument)
            after.append(None if tree == before else tree)
        return after

    def _name(self, name: str, known: bool) -> Message:
        if name not in self._names:
            return ["missing"]
        value = self._names[name]
        if isinstance(value, type):
            if issubclass(value, BaseException):
                return ["exception", describe_class(value, self._class_number)]
            if known and self._class_number(value) is not None and value is not self._stubs.get(name):
                self._live_kinds.add(value)
            return ["class", self._describe(value)]
        return ["function", self._keep(value)]

    def _describe(self, kind: type) -> list[Any]:
        """A class as the judge rebuilds it: every class that is not ``object`` has a number."""
        bases = [base for base in type.__dict__["__bases__"].__get__(kind) if base is not object]
        name = type.__dict__["__name__"].__get__(kind)
        fields = type.__dict__["__dict__"].__get__(kind).get("__dataclass_fields__")
        names = [str(field) for field in fields] if isinstance(fields, dict) else None
        return ["solution", str(name)[:80], self._keep(kind), [self._describe(base) for base in bases[:8]], names]

    def _class_number(self, kind: type) -> int | str | None:
        name = type.__dict__["__name__"].__get__(kind)
        if self._stubs.get(name) is kind and self._names.get(name) is kind and issubclass(kind, BaseException):
            return name
        module = str(type.__getattribute__(kind, "__module__")).partition(".")[0]
        return None if module in sys.stdlib_module_names or module == "builtins" else self._keep(kind)

    def _keep(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return number

    # Values in both directions.

    def _encoder(self) -> Encoder:
        return Encoder(extend=self._extend, kept=self._is_kept)

    def _is_kept(self, kind: type) -> bool:
        return any(kind is live for live in self._live_kinds)

    def _extend(self, value: Any, _: Callable[[Any], Any]) -> Any:
        kind = type(value)
        if any(kind is iterator for iterator in _ITERATORS):
            return ["y", self._keep(value), kind is types.GeneratorType]
        if any(value is plain for plain in PLAIN_KINDS.values()):
            return ["g", value.__name__]
        known = None if self._is_kept(kind) else self._reference(value)
        if known is not None:
            return known
        if any(kind is function for function in _FUNCTIONS) or kind.__module__ == "functools":
            return ["fn", self._keep(value), str(getattr(value, "__name__", ""))[:80]]
        if kind is types.CoroutineType:
            return ["a", self._keep(value)]
        if kind is types.AsyncGeneratorType:
            return ["ag", self._keep(value)]
        if isinstance(value, type):
            return ["E", describe_class(value, self._class_number)] if issubclass(value, BaseException) else (
                ["cl", self._describe(value)]
            )  # fmt: skip
        if isinstance(value, BaseException):
            return ["e", describe(value, self._class_number)]
        return ["r", self._keep(value), self._describe(kind)]

    def _reference(self, value: Any) -> Any:
        """Something of the judge's that goes back, or an object of a class that the tests define."""
        if type(value) is Items:
            return ["it", value.number]
        if type(value) is Tool:
            return ["p", vars(value)["_number"]]
        for number, callback in self._callbacks.items():
            if value is callback:
                return ["k", number]
        if isinstance(value, enum.Enum) and self._stubs.get(type(value).__name__) is type(value):
            return ["em", type(value).__name__, value.name]
        stub = self._stub_of(type(value))
        if stub is None:
            return None
        self._waiting.append(value)
        return ["n", self._object_number(value)]

    def _stub_of(self, kind: type) -> str | None:
        """The name of the tests' class that a class is, derives from, or stands for."""
        for base in type.__dict__["__mro__"].__get__(kind):
            name = type.__dict__["__name__"].__get__(base)
            if name in self._stubs and (base is self._stubs[name] or self._names.get(name) is base):
                return name
        return None

    def _object_number(self, value: Any) -> int:
        known = self._object_numbers.get(id(value))
        if known is None:
            known = self._own(self._next_object, value)
            self._next_object += 2
        return known[0]

    def _own(self, number: int, value: Any) -> tuple[int, Any]:
        self._objects[number] = value
        self._object_numbers[id(value)] = (number, value)
        return self._object_numbers[id(value)]

    def _take_objects(self) -> list[Any]:
        """The state of all objects of the tests' classes that were met since the last message."""
        found: list[Any] = []
        done: set[int] = set()
        while self._waiting:
            value = self._waiting.pop()
            number = self._object_number(value)
            if number not in done:
                done.add(number)
                encode = self._encoder().encode
                pairs = [[name, encode(item)] for name, item in state_of(value).items()]
                found.append([number, self._stub_of(type(value)), pairs])
        return found

    def _take_over(self, objects: list[Any]) -> list[Any]:
        """Objects that the judge sends: made, or brought up to date."""
        for number, name, methods, _ in objects:
            if number not in self._objects:
                kind = self._class_named(name, methods)
                self._own(number, object.__new__(kind))
        for number, _, _, pairs in objects:
            set_state(self._objects[number], {key: self._decode(tree) for key, tree in pairs})
        return [self._objects[number] for number, _, _, _ in objects]

    def _class_named(self, name: str, methods: list[str]) -> type:
        """The program's own class of this name, if it has one; else a stub."""
        own = self._names.get(name)
        if isinstance(own, type):
            self._stubs.setdefault(name, own)
            return own
        return self._stubs.get(name) or self._stub(name, methods, [])

    def _stub(self, name: str, methods: list[str], bases: list[str], members: list[Any] | None = None) -> type:
        """A class of the tests: its methods are run by the judge."""
        if members is not None:
            self._stubs[name] = cast("Any", enum.Enum)(name, [(member, value) for member, value in members])
            return self._stubs[name]
        known = {**vars(builtins), **self._stubs}
        parents = tuple(known[base] for base in bases if isinstance(known.get(base), type)) or (object,)
        if issubclass(parents[0], BaseException):
            self._stubs[name] = type(name, parents, {"__init__": keep_given, "__module__": "solution"})
            return self._stubs[name]

        def constructed(this: Any, *arguments: Any, **named: Any) -> None:
            answer = self._asked(["new", [name, "__init__"]], arguments, named)
            number = answer[1][1]
            made = self._objects[number]
            set_state(this, state_of(made))
            self._own(number, this)

        def method_of(method: str) -> Any:
            def run(*arguments: Any, **named: Any) -> Any:
                return self._decode(self._asked(["method", [name, method]], arguments, named)[1])

            return run

        body = {method: method_of(method) for method in methods if method not in ("__init__", "__new__")}
        made = type(name, parents, {**body, "__init__": constructed, "__module__": "solution"})
        self._stubs[name] = made
        return made

    def _asked(self, question: list[Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Message:
        """A question for the judge; its exception is raised here."""
        encode = self._encoder().encode
        sent = [encode(argument) for argument in arguments]
        words = [[name, encode(value)] for name, value in named.items()]
        answer = self._peer.ask([*question, sent, words, self._take_objects()])
        if answer[0] == "end":
            raise StopIteration
        if answer[0] == "raised":
            raise self._classes.rebuild(answer[1])
        self._take_over(answer[2])
        return answer

    def _question(self, kind: str, subject: Any, *arguments: Any, **named: Any) -> Any:
        return self._decode(self._asked([kind, subject], arguments, named)[1])

    def _decode(self, tree: Any) -> Any:
        return Decoder(extend=self._extended).decode(tree)

    def _extended(self, tag: str, rest: list[Any], _: Callable[[Any], Any]) -> Any:
        if tag == "r":
            return self._kept[rest[0]]
        if tag == "k":
            return self._callback(rest[0], rest[1])
        if tag == "p":
            return self._callbacks.setdefault(rest[0], Tool(rest[0], self._question))
        if tag == "it":
            if rest[0] not in self._callbacks:
                self._callbacks[rest[0]] = Items(rest[0], lambda: self._asked(["next", rest[0]], (), {}), self._decode)
            return self._callbacks[rest[0]]
        if tag == "n":
            return self._objects[rest[0]]
        if tag == "em":
            return cast("Any", self._stubs[rest[0]])[rest[1]]
        if tag == "N":
            return self._class_named(rest[0], rest[1])
        if tag == "e":
            return self._classes.rebuild(rest[0])
        if tag == "E":
            return self._classes.build(rest[0])
        if tag in ("g", "m"):
            found: Any = importlib.import_module(rest[0])
            for part in rest[1].split(".") if tag == "g" else ():
                found = getattr(found, part)
            return found
        raise NotPlain(tag)

    def _callback(self, number: int, name: str) -> Any:
        """A function that asks the judge to call one of the tests'."""
        if number not in self._callbacks:

            def callback(*arguments: Any, **named: Any) -> Any:
                return self._decode(self._asked(["call", number], arguments, named)[1])

            callback.__name__ = callback.__qualname__ = name
            self._callbacks[number] = callback
        return self._callbacks[number]
