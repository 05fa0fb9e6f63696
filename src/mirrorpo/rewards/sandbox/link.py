"""The judge's end of the channel to the program.

Operators on plain results never leave the judge; what the program may be asked for is said in ``live``.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from mirrorpo.rewards.sandbox.callbacks import Callbacks
from mirrorpo.rewards.sandbox.live import (
    RETURNED,
    AsyncIterator,
    Function,
    Generator,
    Iterator,
    Live,
    LiveType,
    Refused,
    awaited,
)
from mirrorpo.rewards.sandbox.messages import (
    CHANGEABLE,
    ChannelClosed,
    Decoder,
    Message,
    NotPlain,
    Peer,
    TooLarge,
    update,
)
from mirrorpo.rewards.sandbox.raised import ENDINGS, Classes

# A program that takes longer than this to load has had a say in what time is left.
_LONG_SECONDS = 0.5
_MAX_GIVEN_BACK = 256
# Attributes that are containers, which the tests may change: the last few, none too large to be looked at again.
_MAX_LENT, _MAX_LENT_ITEMS = 8, 1000


class Link:
    """The judge's end of the channel.

    Args:
        fd: descriptor of the channel.
        limit: of a message, in bytes.
        job: what ``tests_of.Plan`` says about names and classes.
        tell: is called when the program has a say for the first time.

    Attributes:
        raised: the last exception that came from the program.
        used: whether the program has been asked for anything.
        described: whether a class of the program is known here, on whose description a test may depend.
        closed: whether the program is gone, whatever the tests make of it.
        refused: why the judgement has to end as failed, whatever the tests make of it.
    """

    def __init__(self, fd: int, limit: int, job: dict[str, Any], tell: Callable[[], None]) -> None:
        self._peer = Peer(fd, limit, self._serve)
        self._known: dict[int, Any] = {}
        self._handles: dict[tuple[int, str], Live] = {}
        self._kinds: dict[int, LiveType] = {}
        self._pending: list[Callable[[], None]] = []
        self._given_back: dict[int, tuple[Any, Any]] = {}
        self._lent: dict[tuple[int, str], tuple[Live, Any, Any]] = {}
        self._named_classes = frozenset(job.get("classes", ()))
        self._instances = frozenset(job.get("instances", ()))
        self.simple = {stub["name"]: stub["simple"] for stub in job.get("stubs", ())}
        self._called = frozenset(job.get("called", ()))
        self.attributes = frozenset(job.get("attributes", ()))
        self.callbacks = Callbacks(self)
        self._classes = Classes(self.callbacks.class_named)
        self.endings_allowed: Callable[[], bool] = lambda: False
        self.raised: BaseException | None = None
        self.used = False
        self.described = False
        self.closed = False
        self._tell = tell
        self.refused = ""

    def ready(self) -> str | None:
        """Waits until the program is loaded; the name of its exception if it failed.

        A program that takes long has used time that the tests would need: that counts as its first say.
        """
        began = time.monotonic()
        answer = self._talk(lambda: self._peer.wait())
        if time.monotonic() - began > _LONG_SECONDS:
            self.use()
        return None if answer[0] == "ready" else str(answer[-1])[:80]

    def use(self) -> None:
        """From here on the program has had a say."""
        if not self.used:
            self.used = True
            self._tell()

    def name(self, name: str) -> Any:
        """What stands for a name of the program in the tests.

        Raises:
            NameError: the program does not define it.
        """
        answer = self._talk(lambda: self._peer.ask(["name", name, name in self._named_classes]))
        kind = answer[0]
        if kind == "missing":
            self.raised = NameError(name)
            raise self.raised
        self.described = self.described or kind in ("exception", "class")
        if kind == "exception":
            return self._classes.build(answer[1])
        if kind == "class":
            made = self._kind(answer[1], known=name in self._named_classes)
            if name in self._instances:
                type.__setattr__(made, "_strong", True)
            if name in self._called:
                type.__setattr__(made, "_made", True)
            return made
        # Whatever else it is: the tests may call it, and hand it on.
        return Function(self, int(answer[1]), name)

    def _kind(self, description: Any, known: bool) -> LiveType:
        """The judge's copy of a class of the program."""
        try:
            _, name, number, bases, fields = description
            parents = tuple(self._kind(base, False) for base in bases if base[2] is not None)
            like = None if fields is None else dataclasses.make_dataclass("Like", [str(field) for field in fields])
        except (TypeError, ValueError, IndexError, RecursionError):
            raise NotPlain("no class") from None
        if type(number) is not int:
            raise NotPlain("no class")
        made = self._kinds.get(number)
        if made is None:
            try:
                made = LiveType(str(name)[:80], parents or (Live,), {"__module__": "solution"})
            except TypeError:
                made = LiveType(str(name)[:80], (Live,), {"__module__": "solution"})
            if like is not None:
                # For ``dataclasses.asdict`` and ``replace``, which then ask for the attributes one by one.
                type.__setattr__(made, "__dataclass_fields__", getattr(like, "__dataclass_fields__"))  # noqa: B009
            type.__setattr__(made, "_link", self)
            type.__setattr__(made, "_number", number)
            self._kinds[number] = made
        if known:
            type.__setattr__(made, "_known", True)
        return made

    def call(self, tree: Any, arguments: tuple[Any, ...], named: dict[str, Any], origin: str) -> Any:
        """Calls what a tree stands for; changes of the arguments are taken over when the statement ends."""
        self.use()
        if self._lent:
            self._hand_back()
        sent = [self.callbacks.encode(argument) for argument in arguments]
        words = [[name, self.callbacks.encode(value)] for name, value in named.items()]
        objects = self.callbacks.take_objects()
        answer = self._talk(lambda: self._peer.ask(["call", tree, sent, words, objects]))
        return self._result(answer, [*arguments, *named.values()], origin)

    def operate(self, name: str, subject: Any, arguments: tuple[Any, ...], origin: str) -> Any:
        """Has the program apply an operation to one of its objects."""
        self.use()
        if self._lent:
            self._hand_back()
        sent = [self.callbacks.encode(argument) for argument in arguments]
        tree = self.callbacks.encode(subject)
        answer = self._talk(lambda: self._peer.ask(["operate", name, tree, sent, self.callbacks.take_objects()]))
        if answer[0] == "end" and name in ("next", "send", "throw"):
            raise StopIteration
        return self._result(answer, list(arguments), origin)

    def _result(self, answer: Message, arguments: list[Any], origin: str) -> Any:
        try:
            kind, value, after, objects, printed, given, warned = answer
        except ValueError:
            raise self.refuse("opaque") from None
        if printed:
            sys.stdout.write(str(printed))
        decode = self._decoder(origin)
        try:
            self.callbacks.take_over(objects, decode, self._pending, value)
            for argument, tree in zip(arguments, after, strict=False):
                if tree is not None:
                    changed = decode(tree)
                    self._pending.append(lambda a=argument, c=changed: update(a, c))
            for warning in warned:
                self._warn(self._classes.rebuild(warning))
            if kind == "raised":
                raise self._as_raised(self._classes.rebuild(value))
            if kind != "value":
                raise self.refuse("too large" if kind == "too large" else "opaque")
            result = decode(value)
            if type(given) is int and 0 <= given < len(arguments) and type(result) in CHANGEABLE:
                self._given_back[id(result)] = (result, arguments[given])
                if len(self._given_back) > _MAX_GIVEN_BACK:
                    del self._given_back[next(iter(self._given_back))]
            return result
        except NotPlain:
            raise self.refuse("opaque") from None

    def _as_raised(self, error: BaseException) -> BaseException:
        """An exception of the program, to be raised here."""
        self.raised = error
        if isinstance(error, ENDINGS) and not self.endings_allowed():
            return self.refuse("raised " + type(error).__name__)
        return error

    def _warn(self, warning: BaseException) -> None:
        """Gives a warning of the program again, under the filters of the tests."""
        if not isinstance(warning, Warning):
            raise NotPlain("no warning")
        try:
            warnings.warn_explicit(warning, None, "<program>", 1)  # type: ignore[arg-type]
        except Warning as error:
            raise self._as_raised(error) from None

    def _talk(self, work: Callable[[], Message]) -> Message:
        try:
            return work()
        except ChannelClosed:
            self.closed = True
            raise
        except TooLarge:
            raise self.refuse("too large") from None
        except NotPlain:
            raise self.refuse("opaque") from None

    def _serve(self, question: Message) -> Message:
        """A question of the program: it uses something that the tests handed to it."""
        return self.callbacks.serve(question, self._decoder(RETURNED))

    def settle(self) -> None:
        """Takes over what the program has changed in its arguments. Not sooner: tests compare with their own."""
        pending, self._pending = self._pending, []
        for change in pending:
            change()

    def same(self, one: Any, other: Any) -> bool:
        """``is``, where an object has several handles here, and an argument that is given back is rebuilt."""
        if isinstance(one, Live) and isinstance(other, Live):
            return vars(one)["_number"] == vars(other)["_number"]
        _, one = self._given_back.get(id(one), (None, one))
        _, other = self._given_back.get(id(other), (None, other))
        return one is other

    def lend(self, owner: Live, name: str, value: Any) -> None:
        """Remembers an attribute of an object of the program that is a container: the tests may change it."""
        if type(value) in CHANGEABLE and len(value) <= _MAX_LENT_ITEMS:
            self._lent[vars(owner)["_number"], name] = (owner, value, self.callbacks.encode(value))
            if len(self._lent) > _MAX_LENT:
                del self._lent[next(iter(self._lent))]

    def _hand_back(self) -> None:
        """Tells the program what the tests have changed in its attributes since."""
        lent, self._lent = self._lent, {}
        for (number, name), (owner, value, before) in lent.items():
            tree = self.callbacks.encode(value)
            if tree != before:
                self.operate("update", owner, (name, value), RETURNED)
            lent[number, name] = (owner, value, tree)
        self._lent = lent

    def refuse(self, why: str) -> Refused:
        """Ends the judgement as failed."""
        self.refused = self.refused or why
        return Refused(why)

    def _decoder(self, origin: str) -> Callable[[Any], Any]:
        return Decoder(extend=lambda tag, rest, decode: self._extended(tag, rest, decode, origin)).decode

    def _extended(self, tag: str, rest: list[Any], decode: Callable[[Any], Any], origin: str) -> Any:
        """A reference: live object, function, iterator, coroutine; or something of the judge's that comes back."""
        if tag == "r":
            number, description = rest
            return self._live(number, self._kind(description, known=False), origin)
        if tag == "fn":
            return self._once(rest[0], lambda: Function(self, int(rest[0]), str(rest[1])[:80], origin))
        if tag == "y":
            return self._once(rest[0], lambda: (Generator if rest[1] else Iterator)(self, int(rest[0])))
        if tag == "a":
            return awaited(self, int(rest[0]))
        if tag == "ag":
            return self._once(rest[0], lambda: AsyncIterator(self, int(rest[0])))
        if tag == "cl":
            return self._kind(rest[0], known=False)
        if tag == "e":
            return self._classes.rebuild(rest[0])
        if tag == "E":
            return self._classes.build(rest[0])
        return self.callbacks.decode(tag, rest, decode)

    def _once(self, number: Any, make: Callable[[], Any]) -> Any:
        if type(number) is not int:
            raise NotPlain("no reference")
        if number not in self._known:
            self._known[number] = make()
        return self._known[number]

    def _live(self, number: Any, kind: LiveType, origin: str) -> Any:
        """A handle for each way in which the object came about: one that comes out of a method has fewer rights."""
        if type(number) is not int:
            raise NotPlain("no reference")
        if (number, origin) not in self._handles:
            made: Any = kind
            found = self._handles[number, origin] = made.__new__(made)
            vars(found).update(_link=self, _number=number, _origin=origin)
        return self._handles[number, origin]
