"""Faults that come from outside: a process is watched, and struck when its record holds so many results."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVERY = 0.003  # seconds between looks


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A signal from outside.

    Attributes:
        behind: it comes once the record holds so many results and a worker is there.
        number: of the signal.
        at: ``coordinator``, ``worker`` (one of them), or ``group`` (all, as from a terminal; needs spawned workers).
    """

    behind: int
    number: int = signal.SIGKILL
    at: str = "coordinator"


def recorded(folder: Path) -> int:
    """Finished jobs on record, as another process sees them."""
    path = next(folder.glob("*.sqlite"), None)
    if path is None:
        return 0
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return connection.execute("SELECT count(*) FROM results").fetchone()[0]
    except sqlite3.OperationalError:  # the table is not made yet, or its writer was killed while it was
        return 0
    finally:
        connection.close()


def workers_of(coordinator: int) -> set[int]:
    """Worker processes: children of the coordinator, or of the server that it was forked from itself."""
    parents = {coordinator, _parent_of(coordinator)} - {None}
    everybody = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {process for process in everybody - {coordinator} if _parent_of(process) in parents}


def alive(process: int) -> bool:
    """Whether it runs; one that nobody has reaped does not."""
    return _parent_of(process) is not None


def _parent_of(process: int) -> int | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[1])


def strike(process: Any, folder: Path, what: Strike) -> set[int]:
    """Watches a process, and strikes it or a worker of it.

    Args:
        process: of ``multiprocessing``.
        folder: where its record is.
        what: and when.

    Returns:
        The workers that were seen; empty if the process ended before its time came.
    """
    older = workers_of(process.pid)  # of a run before it that was killed a moment ago
    while process.is_alive():
        workers = workers_of(process.pid) - older
        if workers and recorded(folder) >= what.behind:
            if what.at == "group":
                os.killpg(process.pid, what.number)
            else:
                os.kill(process.pid if what.at == "coordinator" else min(workers), what.number)
            return workers
        time.sleep(_EVERY)
    return set()
