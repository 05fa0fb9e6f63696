"""What went wrong, and is it the input? ``InputError`` ends with status 2, ``RunError`` with 1."""

from __future__ import annotations

import signal


class InputError(ValueError):
    """Something a user wrote cannot be used; the message is one line that names the key and the legal values."""


class RunError(RuntimeError):
    """A run cannot go on through no fault of its input; the message is one line that says why and what is intact."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and it did. No ``Exception``: nobody is to handle it on the way out.

    Args:
        number: of the signal; the exit status is 128 more, as shells have it.
        message: one line.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def name(self) -> str:
        """Such as SIGTERM."""
        return signal.Signals(self.number).name
