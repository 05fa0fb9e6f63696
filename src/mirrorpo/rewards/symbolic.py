"""Are two expressions equal? math-verify decides, in a process of its own that can be stopped.

The process reads LaTeX with a grammar (never with ``eval``), and once its libraries are loaded it locks itself in: a
system call filter where the kernel has one, a bound on memory, no privileges.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import threading
import weakref
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox.frames import ChannelClosed, TooLarge, read_frame, write_frame
from mirrorpo.rewards.sandbox.plain import NotPlain, from_bytes, to_bytes

_START_SECONDS = 120.0
_MAX_MESSAGE = 100_000
_MEMORY_BYTES = 3 << 30
_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# Empty packages stand in for the real ones, whose import would load torch.
_PROGRAM = f"""
import sys, types
for name in ("mirrorpo", "mirrorpo.rewards", "mirrorpo.rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{_PACKAGE!r} + name.removeprefix("mirrorpo").replace(".", "/")]
from mirrorpo.rewards.symbolic import serve
serve()
"""
_WORDS = ((re.compile(r"\bsqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"), (re.compile(r"(?<![\\A-Za-z])(pi|sqrt)\b"), r"\\\1"))


class Symbolic:
    """A process that compares expressions, started on first use and again after a timeout.

    Args:
        seconds: time limit of a comparison.
    """

    def __init__(self, *, seconds: float = 5.0) -> None:
        if not 0.01 <= seconds <= 3600:
            raise ValueError(f"seconds must be in [0.01, 3600], got {seconds}")
        self.seconds = seconds
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: Any = None

    def compare(self, given: str, wanted: str) -> str:
        """Compares two texts.

        Returns:
            "match", "mismatch", "malformed" (given cannot be read), "bad reference" (wanted cannot) or "timeout".
        """
        with self._guard:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                write_frame(process.stdin.fileno(), to_bytes([given, wanted]))
                readable, _, _ = select.select([process.stdout], [], [], self.seconds)
                if not readable:
                    self._stop()
                    return "timeout"
                return str(from_bytes(read_frame(process.stdout.fileno(), _MAX_MESSAGE)))
            except (ChannelClosed, TooLarge, NotPlain):  # out of memory or stack: a text of the model did it
                self._stop()
                return "malformed"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", "-W", "ignore", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            self._process = process
            self._finalizer = weakref.finalize(self, _end, process)
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
            try:
                hello = read_frame(process.stdout.fileno(), _MAX_MESSAGE) if readable else b""
            except ChannelClosed:
                hello = b""
            if not hello:
                self._stop()
                raise RuntimeError(
                    "the algebra process does not start: is math-verify installed? (pip install math-verify)"
                )
        return self._process

    def _stop(self) -> None:
        finalizer, self._finalizer, self._process = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def close(self) -> None:
        """Ends the process."""
        with self._guard:
            self._stop()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def serve() -> NoReturn:
    """The process's own program: reads pairs, writes verdicts."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    channel = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a verdict
    _compare(parse, verify, "\\frac{x}{2}", "x/2")  # loads what loads late
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lock_in()
    write_frame(channel, to_bytes("ready"))
    while True:
        try:
            given, wanted = from_bytes(read_frame(0, _MAX_MESSAGE))
        except ChannelClosed:
            os._exit(0)
        write_frame(channel, to_bytes(_compare(parse, verify, given, wanted)))


def _lock_in() -> None:
    from mirrorpo.rewards.sandbox import libc, seccomp

    try:
        libc.forget_privileges()
        seccomp.install()
    except OSError:  # another kind of machine: the grammar alone stands between the text and the process
        return


def _compare(parse: Any, verify: Any, given: str, wanted: str) -> str:
    try:
        right = _expressions(parse, wanted)
        if not right:
            return "bad reference"
        left = _expressions(parse, given)
        if not left:
            return "malformed"
        return "match" if verify(right, left, timeout_seconds=None) else "mismatch"
    except Exception:  # noqa: BLE001  (the text is the model's: whatever the libraries raise, it could not be read)
        return "malformed"


def _expressions(parse: Any, text: str) -> list[Any]:
    """What math-verify reads in a text, without the plain strings it adds."""
    from math_verify import LatexExtractionConfig

    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    text = text.replace("**", "^").replace("*", " \\cdot ").replace("$", "").replace("\0", "").replace("×", "\\times ")
    found = parse(
        f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback"
    )
    return [value for value in found if not isinstance(value, str)]
