"""Two processes that ask each other: one question, one answer, with questions back in between.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mirrorpo.rewards.sandbox.frames import read_frame, write_frame
from mirrorpo.rewards.sandbox.plain import NotPlain, from_bytes, to_bytes

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
