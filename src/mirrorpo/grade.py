"""What does a verifier say? A reward, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A verdict: ``reward`` in [0, 1] or None (not scorable: the sample is left out), and why.

    Example:
        >>> Grade(reward=1.0, reason="match").reward
        1.0
    """

    reward: float | None
    reason: str
