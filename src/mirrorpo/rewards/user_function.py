"""A reward function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mirrorpo.errors import RunError
from mirrorpo.rewards.time_limit import TimeLimitExceeded, time_limit
from mirrorpo.rewards.verdict import Grade, Row
from mirrorpo.user_code import NotImportedError, import_attribute


class RewardError(RunError):
    """A user's reward function failed; the message names the function and the sample, ``what`` says it in a word."""

    def __init__(self, message: str, what: str = "error") -> None:
        super().__init__(message)
        self.what = what


def _refuse_with(error: NotImportedError) -> Callable[[str, Row], Any]:
    def refuse(completion: str, row: Row) -> Any:
        raise error

    return refuse


class UserReward:
    """A reward function of the user, ``(completion: str, row: dict) -> float | None | Grade``.

    Args:
        path: ``"module:function"``.
        on_error: ``raise``, or ``skip``: a completion on which it fails has no reward.
        seconds: time limit of a call; None for none.

    Raises:
        ValueError: the path names nothing callable.
        RewardError: on a call, the function raised, took too long or returned something else than a finite number,
            None or a ``Grade``.
    """

    def __init__(self, path: str, *, on_error: str = "raise", seconds: float | None = None) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.path, self.on_error, self.seconds = path, on_error, seconds
        try:
            self.function: Callable[[str, Row], Any] = import_attribute(path, "reward")
        except NotImportedError as error:  # a plan: nothing is graded
            self.function = _refuse_with(error)
        if not callable(self.function):
            raise ValueError(f"reward {path!r} must be a function, got {type(self.function).__name__}")

    def __call__(self, completion: str, row: Row) -> Grade:
        try:
            return self._graded(completion, row)
        except RewardError as error:
            if self.on_error == "raise":
                raise
            return Grade(reward=None, reason=f"reward failed: {error.what}")

    def _graded(self, completion: str, row: Row) -> Grade:
        sample = f"prompt {str(row.get('prompt'))[:80]!r}, completion {completion[:80]!r}"
        try:
            with time_limit(self.seconds):
                result = self.function(completion, row)
        except TimeLimitExceeded as error:
            message = f"reward {self.path!r} took more than {self.seconds:g} s ({sample})"
            raise RewardError(message, "too slow") from error
        except Exception as error:  # the code is the user's: anything may come out of it
            raise RewardError(
                f"reward {self.path!r} raised {type(error).__name__}: {error} ({sample})", type(error).__name__
            ) from error
        if isinstance(result, Grade):
            if result.reward is None or math.isfinite(result.reward):
                return result
            result = result.reward
        if result is None:
            return Grade(reward=None, reason="skipped")
        if isinstance(result, bool | int | float) and abs(float(result)) < float("inf"):
            return Grade(reward=float(result), reason="scored")
        raise RewardError(
            f"reward {self.path!r} returned {result!r}, legal: a finite number, None or a Grade ({sample})",
            "no finite number",
        )
