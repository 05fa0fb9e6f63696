"""How can a test use a program that runs in another process? Live objects stay there; plain data travels.

The judge runs the test's text. A name that the text does not define is a ``Remote``: calling it sends plain arguments
to the candidate's process and brings plain data back. A comparison is therefore made by the judge, on its own objects.
Comparing a live object with plain data ends the judgement; two live objects are equal if their class says so.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

from mirrorpo.rewards.sandbox.frames import ChannelClosed, read_frame, write_frame
from mirrorpo.rewards.sandbox.plain import Decoder, Encoder, NotPlain, from_bytes, to_bytes

# What a test may do with a live object besides calling it: name of the method, where the function is.
_OPERATIONS = {
    **{f"__{name}__": name for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "contains")},
    **{f"__{name}__": name for name in ("lt", "le", "gt", "ge", "getitem", "setitem", "delitem")},
}
_BUILTINS = {"__len__": "len", "__str__": "str", "__bool__": "bool", "__next__": "next", "__float__": "float"}
_BUILTINS |= {"__int__": "int"}
_FUNCTIONS = {name: getattr(operator, name) for name in [*_OPERATIONS.values(), "eq"]}
_FUNCTIONS |= {
    name: getattr(builtins, name) for name in [*_BUILTINS.values(), "iter", "getattr", "setattr", "isinstance"]
}


class CandidateError(Exception):
    """The program raised something that is no built-in exception."""


class LiveCompared(BaseException):
    """A live object was compared with plain data. No ordinary exception, so that no test catches it."""


class Link:
    """The judge's end: one request, one answer."""

    def __init__(self, fd: int, limit: int) -> None:
        self._fd = fd
        self._limit = limit
        self.raised: BaseException | None = None
        self.used = False

    def request(self, operation: str, subject: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        """What the candidate's process answers; an exception there is raised here."""
        self.used |= operation != "name"
        encoder = Encoder(keep=lambda value: value.__dict__["_number"] if type(value) is Remote else None)
        sent = [encoder.encode(argument) for argument in arguments]
        words = {name: encoder.encode(value) for name, value in (named or {}).items()}
        subject = subject if type(subject) is str else encoder.encode(subject)
        write_frame(self._fd, to_bytes([operation, subject, sent, words]))
        answer = from_bytes(read_frame(self._fd, self._limit))
        if type(answer) is not list or len(answer) != 3:
            raise NotPlain("an unknown answer")
        kind, value, after = answer
        if kind == "too large":
            raise NotPlain("too deep or too many items")
        if kind == "raised":
            self.raised = _exception(value)
            raise self.raised
        for argument, tree in zip(arguments, after, strict=False):
            _update(argument, self.decode(tree))
        return self.decode(value)

    def decode(self, tree: Any) -> Any:
        """A value in which live objects are ``Remote``."""
        return Decoder(remote=lambda number, name: Remote(self, number, name)).decode(tree)

    def ready(self) -> str | None:
        """Waits until the program is loaded; the name of its exception if it failed."""
        answer = from_bytes(read_frame(self._fd, self._limit))
        return None if answer == "ready" else str(answer)[:80]


def _exception(name: Any) -> BaseException:
    found = vars(builtins).get(name) if type(name) is str else None
    # Only ordinary exceptions: a SystemExit from the program must not end the judge.
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError):
        return found("raised by the program")
    return CandidateError(str(name)[:80])


def _update(argument: Any, after: Any) -> None:
    """Functions that change their arguments: the judge's copy follows."""
    if type(argument) is not type(after):
        return
    if type(argument) is list:
        argument[:] = after
    elif type(argument) in (dict, set):
        argument.clear()
        argument.update(after)


class Remote:
    """A live object of the candidate's process."""

    def __init__(self, link: Link, number: int, name: str) -> None:
        self.__dict__.update(_link=link, _number=number, _name=name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__dict__["_link"].request("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_link"].request("getattr", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_link"].request("setattr", self, (name, value))

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        if type(other) is not Remote:  # equal and unequal are both the program's word: neither earns anything
            raise LiveCompared(self.__dict__["_name"])
        return self.__dict__["_link"].request("eq", self, (other,)) is True

    def __hash__(self) -> int:
        return hash(self.__dict__["_number"])

    def __iter__(self) -> Any:
        iterator = self.__dict__["_link"].request("iter", self)
        if type(iterator) is not Remote:
            return iter(iterator)
        return iterator

    def __instancecheck__(self, instance: Any) -> bool:
        return self.__dict__["_link"].request("isinstance", instance, (self,)) is True

    def __repr__(self) -> str:
        return f"<live {self.__dict__['_name']}>"


def _method(operation: str) -> Any:
    def method(self: Remote, *arguments: Any) -> Any:
        return self.__dict__["_link"].request(operation, self, arguments)

    return method


for _name, _operation in {**_OPERATIONS, **_BUILTINS}.items():
    setattr(Remote, _name, _method(_operation))


class Server:
    """The candidate's end: keeps live objects, does what the judge asks. It learns arguments, never expectations."""

    def __init__(self, fd: int, names: dict[str, Any], limit: int) -> None:
        self._fd = fd
        self._names = names
        self._limit = limit
        self._kept: list[Any] = []

    def _keep(self, value: Any) -> int:
        self._kept.append(value)
        return len(self._kept) - 1

    def serve(self) -> None:
        """Answers until the judge is gone."""
        write_frame(self._fd, to_bytes("ready"))
        while True:
            try:
                request = from_bytes(read_frame(self._fd, self._limit))
                write_frame(self._fd, to_bytes(self._answer(request)))
            except ChannelClosed:
                return

    def _answer(self, request: Any) -> list[Any]:
        decoder, encoder = Decoder(remote=lambda number, _: self._kept[number]), Encoder(keep=self._keep)
        try:
            operation, subject, sent, words = request
            if operation == "name":
                return ["value", ["r", self._keep(self._names[subject]), subject], []]
            arguments = [decoder.decode(tree) for tree in sent]
            target = decoder.decode(subject)
            named = {name: decoder.decode(tree) for name, tree in words.items()}
            function = target if operation == "call" else _FUNCTIONS[operation]
            value = function(*([] if operation == "call" else [target]), *arguments, **named)
            after = [encoder.encode(a) if type(a) in (list, dict, set) else None for a in arguments]
            return ["value", encoder.encode(value), after]
        except NotPlain:
            return ["too large", None, []]
        except KeyError as error:
            return ["raised", "NameError" if request[0] == "name" else type(error).__name__, []]
        except BaseException as error:  # noqa: BLE001  (whatever the program raises is its answer)
            return ["raised", type(error).__name__, []]
