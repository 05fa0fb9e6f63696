"""Files that nobody sees half written: a temporary name beside the file, then a rename.

A rename within one folder is atomic: a reader sees the old file or the new one, and a killed writer leaves the old
one as it was. The bytes reach the disk before the name does, so a power cut cannot leave an empty file either.

Reader of JSON Lines files: line by line, and none so long that a file without line ends fills the memory.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirrorpo.errors import RunError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_MODE = 0o644  # what the umask leaves of it; tempfile's 0600 would hide a run folder from its group


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all.

    A symbolic link at `path` is replaced, not followed. Two writers of the same path do not disturb each other: the
    last to finish wins.

    Args:
        path: the file to write; its folder exists.
        data: the whole content.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: the disk refused; `path` is as it was and no temporary file is left.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "curve.png"
        >>> write_bytes_atomic(target, b"abc")
        >>> target.read_bytes()
        b'abc'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt, too, must not leave the temporary file behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, completely or not at all; line ends stay as they are.

    Args:
        path: the file to write; its folder exists.
        text: the whole content.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        UnicodeEncodeError: `text` holds a lone surrogate; nothing was written.
        OSError: the disk refused; `path` is as it was and no temporary file is left.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "summary.json"
        >>> write_text_atomic(target, "{}")
        >>> target.read_text(encoding="utf-8")
        '{}'
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def is_left_behind(path: Path) -> bool:
    """Whether a file is what a writer that was killed leaves.

    Example:
        >>> is_left_behind(Path("run/.summary.json.0123456789ab.tmp")), is_left_behind(Path("run/summary.json"))
        (True, False)
    """
    return _LEFT_BEHIND.fullmatch(path.name) is not None


@contextmanager
def one_line_if_refused(where: Path, kept: str) -> Iterator[None]:
    """What a file system says when it can take no more ends a run with one line.

    Args:
        where: the folder of the run.
        kept: what is intact.

    Raises:
        RunError: in place of the ``OSError`` of a disk that is full, read-only or broken; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{where}: cannot be written ({error.strerror}); {kept}") from error


def sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be opened at all (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
