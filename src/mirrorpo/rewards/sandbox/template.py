"""The pool's side of the template process: starting it on the best level there is, orders, reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirrorpo.rewards.match import RewardError
from mirrorpo.rewards.sandbox import boot
from mirrorpo.rewards.sandbox.levels import LAYERS, Level, level_of

_START_SECONDS = 30.0


class SandboxError(RewardError):
    """The sandbox cannot be started, or not on the required level."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What the template process says about itself.

    Attributes:
        level: by ``levels.level_of``.
        layers: in force.
        errors: why a layer is not.
        uid: the user that programs run as.
    """

    level: Level
    layers: tuple[str, ...]
    errors: dict[str, str]
    uid: int


class Template:
    """A running template process.

    Args:
        layers: which may be used; see ``levels.LAYERS``.
        preload: import much of the standard library, for all copies (a process for one program does without).

    Raises:
        SandboxError: the interpreter does not start.
        ValueError: an unknown layer.
    """

    def __init__(self, layers: Sequence[str] = LAYERS, *, preload: bool = True) -> None:
        self._preload = preload
        unknown = set(layers) - set(LAYERS)
        if unknown:
            raise ValueError(f"layers must be of {', '.join(LAYERS)}, got {', '.join(sorted(unknown))}")
        errors: dict[str, str] = {}
        base = [layer for layer in ("landlock", "seccomp") if layer in layers]
        # Namespaces of one's own first; a machine that forbids them may still let bubblewrap make them.
        for way in [way for way in ("namespaces", "bubblewrap") if way in layers] + [None]:
            try:
                self._start(base if way is None else [way, *base])
            except OSError as error:
                if way is None:
                    raise SandboxError(f"the sandbox does not start: {error}") from error
                errors[way] = str(error)
                continue
            self.reached = self._describe(way, errors)
            return

    def _start(self, layers: list[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    boot.command(theirs.fileno(), layers, self._preload),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=boot.environment(),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self.sock = ours
        try:
            self._hello = self._read_hello()
        except OSError:
            self.close()
            raise

    def _read_hello(self) -> dict[str, Any]:
        readable, _, _ = select.select([self.sock], [], [], _START_SECONDS)
        data = self.sock.recv(65536) if readable else b""
        if not data:
            raise OSError("the template process ended at once" if readable else "the template process does not answer")
        hello = json.loads(data)
        if "failed" in hello:
            raise OSError(hello["failed"])
        self.sock.setblocking(False)
        return hello

    def _describe(self, way: str | None, errors: dict[str, str]) -> Reached:
        found: list[str] = self._hello["layers"]
        layers = (way, *found) if way and way not in found else tuple(found)
        return Reached(
            level=level_of(layers),
            layers=layers,
            errors={**errors, **self._hello["errors"]},
            uid=self._hello["uid"],
        )

    async def fork(self, number: int, wall_seconds: float, descriptors: list[int]) -> None:
        """Orders a copy; the descriptors become its standard ones (a null device), 3 and 4.

        Raises:
            ConnectionError: the template process is gone.
        """
        await self._send({"fork": number, "wall": wall_seconds}, descriptors)

    async def kill(self, number: int) -> None:
        """Orders the end of a copy, if it still runs."""
        with contextlib.suppress(ConnectionError):
            await self._send({"kill": number}, [])

    async def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        data = json.dumps(message).encode()
        while True:
            try:
                if descriptors:
                    socket.send_fds(self.sock, [data], descriptors)
                else:
                    self.sock.send(data)
                return
            except BlockingIOError:  # it has many orders already
                await asyncio.sleep(0.005)
            except OSError as error:
                raise ConnectionError(f"the template process is gone: {error}") from error

    def end_now(self) -> None:
        """Ends the process at once, even if it is stopped; its copies end with it."""
        self.process.kill()

    def close(self) -> None:
        """Ends the process and all its copies."""
        self.sock.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
