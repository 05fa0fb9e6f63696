"""Progress of work that is counted: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirrorpo.wording import duration, number, percent, say

EVERY = 30.0  # seconds between lines


@contextmanager
def counted(
    console: Console, label: str, total: int, done: int = 0, every: float = EVERY
) -> Iterator[Callable[[int], None]]:
    """Shows how far a count has come, how fast it is and when it ends.

    Args:
        console: where to draw. Without a terminal a line is written every ``every`` seconds, even if nothing moved.
        label: what is going on: "evaluating".
        total: the count at the end.
        done: the count at the start, which does not enter the rate.
        every: seconds between lines.

    Yields:
        A function to be called with what has been added.
    """
    columns = (TextColumn(label, markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    if console.is_terminal:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(label, total=total, completed=done)
            yield lambda count: progress.advance(bar, count)
        return
    began, now, over = time.monotonic(), done, threading.Event()

    def advance(count: int) -> None:
        nonlocal now
        now += count

    def speak() -> None:
        while not over.wait(every):
            say(console, f"{label}: {so_far(now, total, now - done, time.monotonic() - began)}")

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield advance
    finally:
        over.set()
        speaker.join()


def so_far(now: int, total: int, added: int, seconds: float) -> str:
    """Count, share, rate and time left, in words.

    Args:
        now: the count.
        total: the count at the end, at least 1.
        added: how much of it came in ``seconds``.
        seconds: since the start.

    Example:
        >>> so_far(64, 128, 32, 16.0).replace(chr(160), " "), so_far(0, 128, 0, 30.0).replace(chr(160), " ")
        ('64 of 128 (50.0 %), 2 a second, about 32 s left', '0 of 128 (0.0 %) after 30 s')
    """
    text = f"{now} of {total} ({percent(now / total)})"
    if not added:
        return f"{text} after {duration(seconds)}"
    return f"{text}, {number(added / seconds)} a second, about {duration((total - now) * seconds / added)} left"


__all__ = ["counted", "so_far"]
