"""What went wrong, and is it the input? ``InputError`` ends a command with status 2 and one line."""

from __future__ import annotations


class InputError(ValueError):
    """Something a user wrote cannot be used; the message is one line that names the key and the legal values."""
