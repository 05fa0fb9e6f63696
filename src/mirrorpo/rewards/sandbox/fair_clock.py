"""A clock for time limits that runs as fast as the processes beside it do.

Standard library only; runs in the template process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

TICK_SECONDS = 0.5
# A process that used less than this part of all recent ticks waits for something else than a core. One tick does not
# tell: a starved process may get nothing in it.
_BUSY = 0.005
_RECENT_TICKS = 5
# However busy the machine is, no limit lasts longer than so many times its length.
_SLOWEST = 1 / 32


def _processor_seconds(pid: int) -> float:
    """Processor time of another process: the kernel's clock of it (``man 3 clock_getcpuclockid``)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


class FairClock:
    """Seconds as a process sees them that has a core for itself.

    It runs at the part of a core that the busy processes got, on average: none is ended for what runs beside it, in
    this pool or elsewhere on the machine. Sleeping processes do not slow it down; if all sleep it runs as any clock.
    """

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._used: dict[int, float] = {}
        self._ticks = 0
        self._busy_at: dict[int, int] = {}
        self.now = 0.0

    def start(self) -> None:
        """Goes on from here: nothing has run in the meantime."""
        self._looked = time.monotonic()

    def advance(self, pids: Iterable[int]) -> bool:
        """Moves on; False if it is not yet time."""
        passed = time.monotonic() - self._looked
        if passed < TICK_SECONDS:
            return False
        self._looked += passed
        used = {pid: _processor_seconds(pid) for pid in pids}
        shares = {pid: (seconds - self._used.get(pid, 0.0)) / passed for pid, seconds in used.items()}
        self._used = used
        self._ticks += 1
        last = {pid: self._ticks if share > _BUSY else self._busy_at.get(pid, 0) for pid, share in shares.items()}
        self._busy_at = last
        busy = [share for pid, share in shares.items() if last[pid] and self._ticks - last[pid] < _RECENT_TICKS]
        self.now += passed * min(1.0, max(_SLOWEST, sum(busy) / len(busy) if busy else 1.0))
        return True
