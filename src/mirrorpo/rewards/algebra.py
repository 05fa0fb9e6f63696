"""Processes that compare mathematical texts and can be stopped.

Each reads LaTeX with a grammar (never with ``eval``), and once its libraries are loaded it locks itself in: a system
call filter where the kernel has one, a bound on memory, no privileges. Verdicts are remembered, slow ones too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from types import FrameType
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox.messages import (
    ChannelClosed,
    NotPlain,
    TooLarge,
    from_bytes,
    read_frame,
    to_bytes,
    write_frame,
)

_START_SECONDS = 120.0
_MAX_MESSAGE = 100_000
_MAX_REMEMBERED = 20_000
_MEMORY_BYTES = 3 << 30
# A comparison is interrupted after this share of its time limit; a process that does not stop by the limit is killed.
_INTERRUPT_SHARE = 0.8
_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# Empty packages stand in for the real ones, whose import would load torch.
_PROGRAM = f"""
import sys, types
for name in ("mirrorpo", "mirrorpo.rewards", "mirrorpo.rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{_PACKAGE!r} + name.removeprefix("mirrorpo").replace(".", "/")]
from mirrorpo.rewards.algebra import serve
serve()
"""


class Algebra:
    """Processes that compare texts, started as they are needed and again after a kill.

    Args:
        seconds: time limit of a comparison.
        processes: how many may run side by side.
    """

    def __init__(self, *, seconds: float = 5.0, processes: int | None = None) -> None:
        if not 0.01 <= seconds <= 3600:
            raise ValueError(f"seconds must be in [0.01, 3600], got {seconds}")
        self.seconds = seconds
        self.processes = processes or min(4, os.cpu_count() or 1)
        self._places = threading.BoundedSemaphore(self.processes)
        self._guard = threading.Lock()
        self._idle: list[_Process] = []
        self._verdicts: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._begun: dict[tuple[str, str], Future[str]] = {}

    def compare(self, given: str, wanted: str) -> str:
        """Compares two tidy texts.

        Returns:
            "match", "mismatch", "malformed" (given cannot be read), "bad reference" (wanted cannot) or "timeout".
        """
        pair = (given, wanted)
        with self._guard:
            verdict, begun = self._verdicts.get(pair), self._begun.get(pair)
            if verdict is None and begun is None:
                self._begun[pair] = Future()
        if verdict is not None:
            return verdict
        return begun.result() if begun is not None else self._first(pair)

    def _first(self, pair: tuple[str, str]) -> str:
        """Compares two texts while others that want the same wait, and remembers the verdict."""
        try:
            with self._places:
                verdict = self._compared(*pair)
        except BaseException as error:  # passed on: those who wait for the verdict get it, too
            with self._guard:
                self._begun.pop(pair).set_exception(error)
            raise
        with self._guard:
            self._verdicts[pair] = verdict
            if len(self._verdicts) > _MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
            self._begun.pop(pair).set_result(verdict)
        return verdict

    def _compared(self, given: str, wanted: str) -> str:
        with self._guard:
            process = self._idle.pop() if self._idle else None
        process = process or _Process()
        verdict = process.compare(given, wanted, self.seconds)
        if process.alive:
            with self._guard:
                self._idle.append(process)
        return verdict

    def close(self) -> None:
        """Ends the processes."""
        with self._guard:
            idle, self._idle = self._idle, []
        for process in idle:
            process.stop()


class _Process:
    """One process and its two pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", "-W", "ignore", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            hello = self._answer(_START_SECONDS)
        except ChannelClosed:
            hello = None
        if hello is None:
            self.stop()
            raise RuntimeError(
                "the algebra process does not start: is math-verify installed? (pip install math-verify)"
            )

    @property
    def alive(self) -> bool:
        return self._finalizer.alive

    def compare(self, given: str, wanted: str, seconds: float) -> str:
        started = time.monotonic()
        try:
            write_frame(self._to, to_bytes([given, wanted]))
            verdict = self._answer(seconds * _INTERRUPT_SHARE)
            if verdict is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGALRM)
                verdict = self._answer(max(seconds - (time.monotonic() - started), 0.01))
        except (ChannelClosed, TooLarge, OSError):  # out of memory or stack: a text of the model did it
            self.stop()
            return "malformed"
        except NotPlain:  # half a character, which cannot be sent
            return "malformed"
        if verdict is None:
            self.stop()
            return "timeout"
        return verdict

    def _answer(self, seconds: float) -> str | None:
        readable, _, _ = select.select([self._from], [], [], seconds)
        return str(from_bytes(read_frame(self._from, _MAX_MESSAGE))) if readable else None

    def stop(self) -> None:
        self._finalizer()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


class _TimeIsUp(BaseException):
    """The time limit of a comparison; no ``Exception``, which libraries swallow."""


class _Alarm:
    """Interrupts a comparison, and only that."""

    busy = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.busy:
            self.busy = False
            raise _TimeIsUp


def serve() -> NoReturn:
    """The process's own program: reads pairs, writes verdicts."""
    import logging
    import resource

    from mirrorpo.rewards.equality import compare

    logging.disable(logging.CRITICAL)
    channel = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a verdict
    alarm = _Alarm()
    signal.signal(signal.SIGALRM, alarm)
    for pair in (("\\frac{x}{2} + \\sqrt{2}", "x/2 + \\sqrt{8}/2"), ("(1, 2]", "1 < x \\le 2"), ("x = 5", "5")):
        compare(*pair)  # loads what loads late
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lock_in()
    write_frame(channel, to_bytes("ready"))
    while True:
        try:
            given, wanted = from_bytes(read_frame(0, _MAX_MESSAGE))
        except ChannelClosed:
            os._exit(0)
        write_frame(channel, to_bytes(_verdict(compare, given, wanted, alarm)))


def _verdict(compare: Any, given: str, wanted: str, alarm: _Alarm) -> str:
    from mirrorpo.rewards.exact_values import TooLarge as TooLargeNumber

    try:
        try:
            alarm.busy = True
            verdict = compare(given, wanted)
        finally:
            alarm.busy = False
    except (_TimeIsUp, TooLargeNumber):
        return "timeout"
    except Exception:  # noqa: BLE001  (the text is the model's: whatever the libraries raise, it could not be read)
        return "malformed"
    return verdict


def _lock_in() -> None:
    from mirrorpo.rewards.sandbox import kernel

    try:
        kernel.forget_privileges()
        kernel.install_filter()
    except OSError:  # another kind of machine: the grammar alone stands between the text and the process
        return
