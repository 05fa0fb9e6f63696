"""Reader of JSON Lines files: line by line, and none so long that a file without line ends fills the memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 16_000_000  # bytes


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, with their line ends; a byte order mark at its start is skipped.

    Args:
        path: a file.

    Returns:
        One line after another; never more than one is in memory.

    Raises:
        ValueError: a line is longer than ``MAX_LINE``, or the file is UTF-16; names the file and the line.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> path.write_bytes(b"{}\\n[]")
        5
        >>> list(read_lines(path))
        [b'{}\\n', b'[]']
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}: line {number} is longer than {MAX_LINE:,} bytes")
            if number == 1:
                line = _without_mark(path, line)
            yield line


def _without_mark(path: Path, line: bytes) -> bytes:
    """The first line without a byte order mark of UTF-8."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: line 1 is not UTF-8 text (it begins as UTF-16 or UTF-32 does)")
    return line.removeprefix(codecs.BOM_UTF8)
