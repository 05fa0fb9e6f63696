"""Tasks: problems to practise on, unseen problems to be tested on, and a verdict on an answer.

A task is data plus a verifier; it knows nothing of models or trainers. A problem is a plain dict (a row) with at least
``prompt``: the user's message as text, or a list of chat messages; every other key belongs to the task and comes back
to ``grade``.

Where do the rows of a public data set come from, and which of them does training never see?

Base of every group of keys in a recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from mirrorpo.rewards.verdict import Grade, Row

Split = Literal["train", "validation", "test"]


@runtime_checkable
class Task(Protocol):
    """Problems and their verifier.

    Attributes:
        name: the name under which a recipe finds the task.
    """

    name: str

    def rows(self, split: Split) -> list[Row]:
        """The problems of a split, always in the same order; no two splits share one.

        "validation", unseen problems to choose by, is not in every task.
        """
        ...

    def grade(self, completion: str, row: Row) -> Grade:
        """The verdict on one completion; never raises on any text."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task whose verdicts are much faster many at a time, such as programs that run side by side."""

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        """The verdicts on many completions, in their order."""
        ...


@runtime_checkable
class PairedTask(Task, Protocol):
    """A task that can also say what is preferred, for training on preferences."""

    def pair(self, row: Row, number: int) -> tuple[str, str]:
        """A good and a bad completion of a problem; ``number`` is the place of the pair, and may vary what is bad."""
        ...


def grade_all(task: Task, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
    """The verdicts on completions of the given rows, in their order; at once where the task can.

    Example:
        >>> from mirrorpo.tasks import Arithmetic
        >>> [grade.reason for grade in grade_all(Arithmetic(), ["#### 3", "3"], [{"answer": "3"}] * 2)]
        ['match', 'no answer']
    """
    if isinstance(task, BatchTask):
        return task.grade_many(completions, rows)
    return [task.grade(text, row) for text, row in zip(completions, rows, strict=True)]


Part = Literal["train", "validation", "test"]


def load_from_hub(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """The rows of a data set's split.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set; says what to set.
    """
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(name, config, split=split)]  # pyright: ignore[reportArgumentType]
    except Exception as error:  # datasets raises a dozen kinds, down to those of its HTTP client
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}: {reason}). "
            "Set task.path to the original JSONL file, or allow the hub (unset HF_HUB_OFFLINE)"
        ) from error


def split_off(
    rows: Sequence[dict[str, Any]], key: str, size: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to keep and ``size`` distinct rows to hold out, both in an order that the seed decides.

    The order is that of a digest of seed and text: rows with the same text fall on the same side, and it depends on no
    random state.

    Args:
        rows: any rows.
        key: of the text.
        size: how many distinct texts to hold out.
        seed: any integer.

    Raises:
        ValueError: size is not in [0, number of distinct texts).
    """
    texts = {str(row[key]).strip(): row for row in reversed(rows)}
    if isinstance(size, bool) or not 0 <= size < len(texts):
        raise ValueError(f"validation_size must be in [0, {len(texts) - 1}] ({len(texts)} rows), got {size}")

    def place(text: str) -> bytes:
        return hashlib.sha256(f"{seed}/{text}".encode("utf-8", "surrogatepass")).digest()

    ordered = sorted(texts, key=place)
    held_out, kept = ordered[:size], ordered[size:]
    assert not set(held_out) & set(kept)
    return [texts[text] for text in kept], [texts[text] for text in held_out]


def check_test_part(wanted: str, parts: Mapping[Part, Sequence[Any]], missing: str) -> Part:
    """Which part serves for testing.

    Args:
        wanted: "test", "validation" or "auto".
        parts: what the source has.
        missing: what to do if the test part is wanted and not there.

    Raises:
        ValueError: an unknown name, or that part has no rows.
    """
    if wanted not in ("auto", "test", "validation"):
        raise ValueError(f"test_part must be 'auto', 'test' or 'validation', got {wanted!r}")
    if wanted == "test" and not parts["test"]:
        raise ValueError(f"the source has no test split: {missing}, or task.test_part to validation")
    chosen: Part = "test" if wanted == "test" or (wanted == "auto" and parts["test"]) else "validation"
    if not parts[chosen]:
        raise ValueError(f"no rows for testing: {missing}, or task.validation_size above 0")
    return chosen


class Settings(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


__all__ = ["BatchTask", "Grade", "PairedTask", "Row", "Settings", "Split", "Task", "grade_all"]
