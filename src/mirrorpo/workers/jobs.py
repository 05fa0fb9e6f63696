"""Jobs and the record of those that are finished.

A job is a key, a function by its import path, and a payload of plain data; the result is plain data too. The function
runs in a process that lives long: what it keeps in its module (a loaded model) is there for the next job. Jobs are
idempotent: a job whose worker died is simply run again, so its result may depend on nothing but the payload.

The record is a SQLite file with one transaction a job, so a kill leaves no half of one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mirrorpo.errors import RunError
from mirrorpo.user_code import import_attribute

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY, digest TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL, deaths INTEGER NOT NULL,
    finished TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A finished job as the record has it."""

    digest: str
    result: Any
    seconds: float
    deaths: int


class Record:
    """Results by key, durable in the moment that ``add`` returns.

    SQLite's rollback journal with full synchronisation: after a kill, or a power cut, the next opening finds every
    transaction whole or not at all. (Not its WAL mode, which needs shared memory that network file systems lack.)

    Args:
        path: the file; created if needed.

    Raises:
        ValueError: the file is no SQLite database, or cannot be opened.

    Example:
        >>> import tempfile
        >>> record = Record(Path(tempfile.mkdtemp()) / "jobs.sqlite")
        >>> record.add("a", "digest of a", {"fitness": 0.5}, seconds=1.0)
        >>> record.results()["a"].result
        {'fitness': 0.5}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise ValueError(f"{path}: is not a record of jobs ({error})") from None

    def add(self, key: str, digest: str, result: Any, seconds: float = 0.0, deaths: int = 0) -> None:
        """Keeps the result of a job.

        Raises:
            ValueError: the key has a result already, or the result is not JSON (NaN is not).
            RunError: the disk refused; what was added before is intact.
        """
        text = json.dumps(result, allow_nan=False)
        try:
            self._connection.execute(
                "INSERT INTO results (key, digest, result, seconds, deaths) VALUES (?, ?, ?, ?, ?)",
                (key, digest, text, seconds, deaths),
            )
        except sqlite3.IntegrityError:
            raise ValueError(f"{self.path}: job {key!r} has a result already") from None
        except sqlite3.OperationalError as error:
            raise RunError(f"{self.path}: cannot be written ({error}); what was finished before is kept") from error

    def results(self) -> dict[str, Recorded]:
        """Everything finished, by key, oldest first.

        Raises:
            ValueError: the file is damaged, or holds something that no job leaves.
        """
        try:
            rows = self._connection.execute(
                "SELECT key, digest, result, seconds, deaths FROM results ORDER BY rowid"
            ).fetchall()
            return {
                str(key): Recorded(digest=digest, result=json.loads(result), seconds=seconds, deaths=deaths)
                for key, digest, result, seconds, deaths in rows
            }
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: is not a record of jobs ({error})") from None

    def settle(self, name: str, value: Any) -> Any:
        """The value of a setting that must not change when a run is resumed: the first one given stays.

        Example:
            >>> import tempfile
            >>> record = Record(Path(tempfile.mkdtemp()) / "jobs.sqlite")
            >>> record.settle("threads", 2), record.settle("threads", 1)
            (2, 2)

        Raises:
            ValueError: the file is damaged or cannot be written.
        """
        try:
            self._connection.execute(
                "INSERT OR IGNORE INTO settings (name, value) VALUES (?, ?)", (name, json.dumps(value, allow_nan=False))
            )
            row = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            return json.loads(row[0])
        except (sqlite3.DatabaseError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: is not a record of jobs ({error})") from None

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work.

    Attributes:
        key: its name in the record; unique within a run.
        function: ``"module:attribute"``, called with the payload.
        payload: plain data (JSON).
    """

    key: str
    function: str
    payload: Any

    @property
    def digest(self) -> str:
        """Of function and payload: tells a job from another one of the same key."""
        text = json.dumps([self.function, self.payload], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished job: its result, the seconds it took in its worker, and how often a worker had died over it before."""

    job: Job
    result: Any
    seconds: float
    deaths: int = 0


class JobError(RunError):
    """A job cannot be finished: it raised, or its workers kept dying. The message names the job.

    Args:
        key: of the job.
        reason: one line.

    Example:
        >>> error = JobError("g000/p1+", "2 workers died over it")
        >>> error.key, str(error)
        ('g000/p1+', 'job g000/p1+: 2 workers died over it')
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)  # both, so that the error survives pickling
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"job {self.key}: {self.reason}"


class Pool(Protocol):
    """Runs jobs side by side."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Yields each job as it finishes, in any order; raises ``JobError`` for the first that cannot."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


def call(function: str, payload: Any) -> tuple[Any, str | None]:
    """Runs a job in this process: (result, None), or (None, what went wrong)."""
    try:  # untrusted: the function may be the user's, and a worker must outlive it
        result = import_attribute(function, "job function")(payload)
        json.dumps(result, allow_nan=False)  # what cannot be recorded is refused here, where the function is known
        return result, None
    except Exception as error:  # noqa: BLE001  (handed to the coordinator, which raises it)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {text} ({where.filename.rpartition('/')[2]}, line {where.lineno})"


def run_recorded(
    pool: Pool, jobs: Sequence[Job], record: Record, on_done: Callable[[Done], None] = lambda done: None
) -> dict[str, Any]:
    """Results of all jobs by key, in the order of ``jobs``; only those without a recorded result are run.

    Args:
        pool: runs them.
        jobs: with distinct keys.
        record: holds what is finished; gains each result in the moment that it arrives.
        on_done: called after a new result was recorded.

    Raises:
        JobError: a job failed for good, or the record holds another job under the same key. What was finished before
            stays recorded.
        ValueError: a key twice.
    """
    keys = [job.key for job in jobs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate job key {twice!r}")
    known = record.results()
    for job in jobs:
        if job.key in known and known[job.key].digest != job.digest:
            raise JobError(job.key, f"{record.path} holds the result of another job under this key")
    missing = [job for job in jobs if job.key not in known]
    results = {key: known[key].result for key in keys if key in known}
    if missing:
        for done in pool.run(missing):
            record.add(done.job.key, done.job.digest, done.result, done.seconds, done.deaths)
            results[done.job.key] = done.result
            on_done(done)
    return {key: results[key] for key in keys}


__all__ = [
    "Done",
    "Job",
    "JobError",
    "Pool",
    "Record",
    "Recorded",
    "call",
    "run_recorded",
]
