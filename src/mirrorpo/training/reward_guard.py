"""What if a reward function fails? It is named with the sample, and the run stops or leaves the sample out.

TRL reads None as "no reward"; a NaN looks the same to it, so a broken function would pass for a careful one. Here only
None means skip. An exception, a time limit, a wrong number of rewards or one that is no finite number is a failure.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging
from trl.trainer.utils import get_callable_name, is_async_callable

from mirrorpo.escape import printable
from mirrorpo.rewards.match import RewardError
from mirrorpo.rewards.time_limit import TimeLimitExceeded, time_limit

logger = logging.get_logger(__name__)


def guarded(function: Any, on_error: str = "raise", seconds: float | None = None) -> Any:
    """A reward function of TRL's kind whose failures are named.

    Args:
        function: ``(prompts=..., completions=..., **columns) -> list[float | None]``, or a coroutine function; a
            reward model (a module or its name) is returned as it is.
        on_error: "raise", or "skip": a failed call leaves out its whole batch, a bad value its sample.
        seconds: time limit of a call; None for none.

    Raises:
        RewardError: on a call; names function, sample and what happened.

    Example:
        >>> def broken(prompts, completions, **columns):
        ...     return [float("nan")]
        >>> guarded(broken)(prompts=["2+2="], completions=["4"])
        Traceback (most recent call last):
        mirrorpo.rewards.match.RewardError: reward 'broken' returned nan (prompt '2+2=', completion '4'); legal: ...
    """
    if isinstance(function, nn.Module | str):
        return function
    guard = _Guard(get_callable_name(function), on_error, seconds)

    async def call_async(*, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        batch = _Batch(prompts, completions)
        try:
            async with asyncio.timeout(seconds):
                values = await function(prompts=prompts, completions=completions, **columns)
        except Exception as error:  # noqa: BLE001  (the code is the user's: anything may come out of it)
            return guard.failed(error, batch)
        return guard.checked(values, batch)

    def call(*, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        batch = _Batch(prompts, completions)
        try:
            with time_limit(seconds):
                values = function(prompts=prompts, completions=completions, **columns)
        except (Exception, TimeLimitExceeded) as error:  # noqa: BLE001  (the code is the user's, as above)
            return guard.failed(error, batch)
        return guard.checked(values, batch)

    chosen = call_async if is_async_callable(function) else call
    chosen.__name__ = guard.name
    return chosen


@dataclass(frozen=True)
class _Batch:
    prompts: Any
    completions: Any

    def sample(self, index: int) -> str:
        prompt, completion = _text(self.prompts[index]), _text(self.completions[index])
        return f"(prompt {prompt!r:.80}, completion {completion!r:.80})"


@dataclass(frozen=True)
class _Guard:
    name: str
    on_error: str
    seconds: float | None

    def failed(self, error: BaseException, batch: _Batch) -> list[float | None]:
        """A call that did not return: nobody can say which sample it was, so the first one is shown."""
        if isinstance(error, RewardError):  # names its sample already
            message = str(error)
        else:
            late = isinstance(error, TimeoutError | TimeLimitExceeded)
            named = " ".join(f"{type(error).__name__}: {error}".split())
            what = f"took more than {self.seconds} s" if late else f"raised {named}"
            message = f"reward {self.name!r} {what} (first sample of {len(batch.prompts)}: {batch.sample(0)})"
        self._report(message, len(batch.prompts), error)
        return [None] * len(batch.prompts)

    def checked(self, values: Any, batch: _Batch) -> list[float | None]:
        """The rewards as numbers, or None where there is none."""
        try:
            rewards = list(values)
        except TypeError as error:
            return self.failed(error, batch)
        if len(rewards) != len(batch.prompts):
            message = f"reward {self.name!r} returned {len(rewards)} rewards for {len(batch.prompts)} completions"
            self._report(f"{message} {batch.sample(0)}", len(batch.prompts), None)
            return [None] * len(batch.prompts)
        for index, value in enumerate(rewards):
            if value is not None:
                rewards[index] = _number(value)
                if rewards[index] is None:
                    message = f"reward {self.name!r} returned {value!r:.60} {batch.sample(index)}"
                    self._report(f"{message}; legal: a finite number, or None to leave a completion out", 1, None)
        return rewards

    def _report(self, message: str, count: int, error: BaseException | None) -> None:
        if self.on_error == "raise":
            raise RewardError(message) from error
        logger.warning("%s; left out: %d completions", printable(message), count)


def _number(value: Any) -> float | None:
    """A finite number, or None: 0-d arrays and tensors are numbers too."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the value is the user's
        return None
    return number if math.isfinite(number) and not isinstance(value, str) else None


def _text(value: Any) -> str:
    """The last message of a conversation, or the text itself."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return str(value[-1].get("content"))
    return str(value)
