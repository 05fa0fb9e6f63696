"""How is a file of JSON lines read? Line by line, and none so long that a file without line ends fills the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 16_000_000  # bytes


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, with their line ends.

    Args:
        path: a file.

    Returns:
        One line after another; never more than one is in memory.

    Raises:
        ValueError: a line is longer than ``MAX_LINE``; names the file, the line and the limit.
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
            yield line
