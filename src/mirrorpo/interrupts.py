"""Interruption of a command that waits for its workers: at once; finished work is on record, the rest is repeated.

A training stops behind its step instead: ``mirrorpo.training.monitors``.

How do libraries keep silent? Their bars and notices off: this program draws its own, and raises on what matters.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mirrorpo.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def stops_at_once(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Interrupted`` in here, whatever is being done.

    Args:
        how_to_go_on: asked when the signal arrives: what the line on stderr says after the signal's name.

    Raises:
        Interrupted: a signal arrived.
    """

    def received(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}; {how_to_go_on()}")

    with _handled_by(received):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM that arrive in here act at its end: for the few lines that must not be left half-way."""
    arrived: list[int] = []
    try:
        with _handled_by(lambda number, frame: arrived.append(number)):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What was to be done on SIGINT and SIGTERM is so again afterwards, where a library puts its own in place."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, found in before.items():
                signal.signal(number, found)


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    # Who started us may have them ignored (nohup): then they stay so.
    before = {number: found for number in SIGNALS if (found := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def go_on_with(command: str, begun: Path) -> str:
    """How a command that was stopped is taken up again, for its last line.

    Args:
        command: as it was given.
        begun: the file whose presence makes its folder one that ``--resume`` takes.
    """
    if not begun.exists():
        return f"nothing was begun; start again with: {command}"
    return f"what was finished is kept; continue with: {resume_command(command)}"


def resume_command(command: str) -> str:
    """The command with ``--resume``.

    Example:
        >>> resume_command("mirrorpo train arithmetic --out x")
        'mirrorpo train arithmetic --out x --resume'
    """
    return command if "--resume" in shlex.split(command) else f"{command} --resume"


def quiet() -> None:
    """Turns off the bars and notices of transformers, datasets and TRL in this process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")  # `mirrorpo doctor` says it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def silent_if_it_fails() -> Iterator[None]:
    """Holds back what native code writes to stderr in here; it appears at the end, unless the block raises.

    A panic in Rust arrives as an exception, and prints a trace of tens of lines by itself.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError):  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        held.seek(0)
        os.write(2, held.read())


__all__ = ["SIGNALS", "go_on_with", "handlers_kept", "resume_command", "signals_held", "stops_at_once"]
