"""Record of finished jobs and their results: a SQLite file with one transaction a job, so a kill halves none."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrorpo.errors import RunError

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
            raise ValueError(f"{path}: is no record of jobs ({error})") from None

    def add(self, key: str, digest: str, result: Any, seconds: float = 0.0, deaths: int = 0) -> None:
        """Keeps the result of a job.

        Raises:
            ValueError: the key has a result already, or the result is no JSON (NaN is none).
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
            raise ValueError(f"{self.path}: is no record of jobs ({error})") from None

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
            raise ValueError(f"{self.path}: is no record of jobs ({error})") from None

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


__all__ = ["Record", "Recorded"]
