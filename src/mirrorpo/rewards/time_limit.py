"""How long may a function of somebody else take? A timer that interrupts it, in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A function that swallows the first interruption gets another one after so many seconds, until it ends.
_AGAIN_SECONDS = 0.5


class TimeLimitExceeded(BaseException):
    """The time is up. No ``Exception``: a broad ``except`` in the function does not swallow it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises ``TimeLimitExceeded`` inside the block after so many seconds.

    It interrupts Python code, sleeping and regular expressions included, but no C extension that never comes back to
    Python. Only the main thread can be interrupted; in any other there is no limit.

    Args:
        seconds: wall-clock time; None for no limit.

    Raises:
        TimeLimitExceeded: in the block.

    Example:
        >>> with time_limit(0.05):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
        mirrorpo.rewards.time_limit.TimeLimitExceeded: 0.05
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded(seconds)

    handler = signal.signal(signal.SIGALRM, interrupt)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)  # a timer that was there goes on
        signal.signal(signal.SIGALRM, handler)
