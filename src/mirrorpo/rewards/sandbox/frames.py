"""How do two processes that do not trust each other exchange messages? A length, then that many bytes; bounded.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import os
import struct

HEADER = struct.Struct("!I")


class ChannelClosed(EOFError):
    """The other side is gone."""


class TooLarge(ValueError):
    """A message is longer than the reader accepts."""


def frame(payload: bytes) -> bytes:
    """The payload with its length in front.

    Example:
        >>> frame(b"ok")
        b'\\x00\\x00\\x00\\x02ok'
    """
    return HEADER.pack(len(payload)) + payload


def read_frame(fd: int, limit: int) -> bytes:
    """The next payload from a blocking descriptor.

    Raises:
        ChannelClosed: end of file before the payload is complete.
        TooLarge: the header announces more than ``limit`` bytes.
    """
    (size,) = HEADER.unpack(_exactly(fd, HEADER.size))
    if size > limit:
        raise TooLarge(f"a message of {size:,} bytes; at most {limit:,} are accepted")
    return _exactly(fd, size)


def write_frame(fd: int, payload: bytes) -> None:
    """Writes a payload to a blocking descriptor, all of it.

    Raises:
        ChannelClosed: nobody reads any more.
    """
    view = memoryview(frame(payload))
    while view:
        try:
            view = view[os.write(fd, view) :]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed(str(error)) from error


def _exactly(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        try:
            part = os.read(fd, min(size, 1 << 20))
        except ConnectionResetError as error:
            raise ChannelClosed(str(error)) from error
        if not part:
            raise ChannelClosed("end of file")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
