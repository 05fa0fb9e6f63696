"""Your own data: one JSON object a line, with a field for the prompt and one for the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mirrorpo.errors import unknown_name
from mirrorpo.files import read_lines
from mirrorpo.tasks.task import Grade, Row, Settings, Split

_ONE_IN = 10


class JsonlSettings(Settings):
    """Your own file."""

    name: Literal["jsonl"]
    path: str = Field(description="the file, one JSON object a line")
    prompt: str = Field(default="prompt", description="field with the user's message")
    answer: str = Field(default="answer", description="field with the answer")
    reward: str = Field(default="exact", description="exact, numeric or module:function")
    on_reward_error: Literal["raise", "skip"] = Field(
        default="raise", description="your reward function fails: the run ends, or the completion is left out"
    )
    reward_seconds: float = Field(default=60.0, gt=0.0, le=86_400, description="its time limit for a completion")
    test_path: str | None = Field(default=None, description="a second file for testing; else one row in ten")
    train_size: int | None = Field(default=None, ge=1, description="maximum number of training rows")
    test_size: int | None = Field(default=512, ge=1, description="maximum number of test rows")


class Jsonl:
    """Problems from a file, as a `mirrorpo.tasks.task.Task`.

    A row is for testing if a digest of its prompt says so (one in ten), unless ``test_path`` names a file of its own;
    so a duplicate prompt in the file is never in both splits.

    Args:
        path: the file; each line a JSON object.
        prompt: name of the field with the user's message.
        answer: name of the field with the answer; with a reward function of your own it may be absent.
        reward: ``exact``, ``numeric`` or ``"module:function"`` (see `mirrorpo.rewards.UserReward`).
        on_reward_error: ``raise``, or ``skip`` a completion on which a reward function of your own fails.
        reward_seconds: its time limit for a completion.
        test_path: a second file, all of it for testing.
        train_size: maximum number of training rows, from the top.
        test_size: maximum number of test rows, from the top.

    Raises:
        ValueError: a broken line (its number is named), a missing field, one that is not a text, no rows, an unknown
            reward.
        FileNotFoundError: no such file.
    """

    name = "jsonl"

    def __init__(
        self,
        *,
        path: str,
        prompt: str = "prompt",
        answer: str = "answer",
        reward: str = "exact",
        on_reward_error: str = "raise",
        reward_seconds: float | None = 60.0,
        test_path: str | None = None,
        train_size: int | None = None,
        test_size: int | None = 512,
    ) -> None:
        from mirrorpo.rewards.match import VERIFIERS  # a grader is loaded with its task, not with the table of tasks
        from mirrorpo.rewards.user_function import UserReward

        if reward not in VERIFIERS and ":" not in reward:
            raise unknown_name("reward", reward, [*VERIFIERS, "module:function"])
        self._user_reward = None
        if reward not in VERIFIERS:
            self._user_reward = UserReward(reward, on_error=on_reward_error, seconds=reward_seconds)
        self._verify = VERIFIERS.get(reward)
        legal = _legal_number if reward == "numeric" else None
        rows = read_rows(Path(path), prompt, answer if self._verify else None, legal)
        held_out = [row for row in rows if is_test_prompt(row["prompt"])]
        if test_path is not None:
            test = read_rows(Path(test_path), prompt, answer if self._verify else None, legal)
            train = rows
        else:
            test, train = held_out, [row for row in rows if not is_test_prompt(row["prompt"])]
        seen = {row["prompt"] for row in test}
        train = [row for row in train if row["prompt"] not in seen]
        self._rows: dict[Split, list[Row]] = {"train": train[:train_size], "test": test[:test_size]}
        for split, found in self._rows.items():
            if not found:
                held = "too few to hold out one in ten: give a second file, task.test_path=test.jsonl"
                why = held if test_path is None else "each of them is in the test file too"
                raise ValueError(f"{path}: no rows for the {split} split ({len(rows)} rows in the file); {why}")

    def rows(self, split: Split) -> list[Row]:
        return self._rows[split]

    def grade(self, completion: str, row: Row) -> Grade:
        if self._user_reward is not None:
            return self._user_reward(completion, row)
        assert self._verify is not None
        return self._verify(completion, row["answer"])


def is_test_prompt(prompt: str) -> bool:
    """Whether a prompt is held out: about one in ten, by a digest of its text."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[0] % _ONE_IN == 0


def _legal_number(answer: str) -> bool:
    from mirrorpo.rewards.match import reference_number

    return reference_number(answer) is not None


def read_rows(path: Path, prompt: str, answer: str | None, legal: Callable[[str], bool] | None = None) -> list[Row]:
    """The rows of a JSON Lines file with ``prompt`` and ``answer`` under these names; blank lines are skipped.

    Args:
        path: the file.
        prompt: name of the field with the prompt.
        answer: name of the field with the right answer; None if there need be none.
        legal: whether a right answer can be graded against.

    Raises:
        ValueError: a line that is not a JSON object, a missing or empty field; names file, line and field.
        FileNotFoundError: no such file.
    """
    return [row for _, row in numbered_rows(path, prompt, answer, legal)]


def numbered_rows(
    path: Path, prompt: str, answer: str | None, legal: Callable[[str], bool] | None = None
) -> list[tuple[int, Row]]:
    """The rows of a file with their line numbers; see ``read_rows``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}: line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if text.strip():
            row = _row(where, text, prompt, answer)
            if legal is not None and not legal(row["answer"]):
                raise ValueError(
                    f"{where}: field {answer!r} cannot be read as an answer: {row['answer'][-60:]!r}; legal: one "
                    "final answer, alone or after ####, and for the reward 'numeric' a single number"
                )
            rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def is_unicode(text: str) -> bool:
    """Whether a text can be written at all: JSON may hold one half of a surrogate pair.

    Example:
        >>> is_unicode("né"), is_unicode(chr(0xD800))
        (True, False)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_written(line: str, field: str) -> str:
    """A number of a JSON object with the digits it is written with, which a float may not keep."""
    return str(json.loads(line, parse_float=str)[field])


def _row(where: str, line: str, prompt: str, answer: str | None) -> Row:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    row = dict(value)
    for key, field in (("prompt", prompt), ("answer", answer)):
        if field is None:
            continue
        if field not in value:
            raise ValueError(f"{where}: no field {field!r}; it has {', '.join(map(repr, value)) or 'none'}")
        text = value[field]
        if isinstance(text, int | float) and not isinstance(text, bool):
            text = _as_written(line, field) if isinstance(text, float) else str(text)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: field {field!r} must be a text that is not empty, got {text!r:.60}")
        if not is_unicode(text):  # no tokenizer takes it, and no file
            raise ValueError(f"{where}: field {field!r} holds half a character (a lone surrogate): {text!r:.60}")
        row[key] = text
    if not is_unicode(json.dumps(value, ensure_ascii=False)):  # the whole row travels along, as JSON
        raise ValueError(f"{where}: a field holds half a character (a lone surrogate)")
    return row
