"""What does a verifier say? A reward, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Row = dict[str, Any]
Verdict = Literal["right", "wrong", "unreadable", "unscored"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
# Reasons that say: there was nothing to compare. Such a completion earns nothing, and is no wrong answer.
UNREADABLE = frozenset({"no answer", "malformed", "no code", "code too long", "syntax error"})


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A verdict: ``reward`` in [0, 1] or None (not scorable: the sample is left out), and why.

    Example:
        >>> Grade(reward=1.0, reason="match").reward
        1.0
    """

    reward: float | None
    reason: str

    @property
    def verdict(self) -> Verdict:
        """One of four words, for counting: a reward of at least 1 is right, None is unscored.

        Example:
            >>> Grade(reward=0.0, reason="no answer").verdict
            'unreadable'
        """
        if self.reward is None:
            return "unscored"
        if self.reward >= 1.0:
            return "right"
        return "unreadable" if self.reason in UNREADABLE else "wrong"
