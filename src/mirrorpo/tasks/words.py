"""Word problems of one sentence: add, subtract or multiply two small numbers; generated from a seed.

A small pretrained model solves some of them, and learns the rest in a few dozen steps. A completion is graded by its
final number (`mirrorpo.rewards.match.numeric`); the prompt asks the question and says nothing about its form.

========= ==================================== ==============
operation numbers                              largest answer
========= ==================================== ==============
add       a, b in 3..60                        120
subtract  a in 10..99, b in 3..a-1             96
multiply  a, b in 3..15                        225
========= ==================================== ==============

Whether a problem is for testing is read off a digest of its pair of numbers, whatever the operation, order and wording:
no pair of a training problem, of any seed, occurs in a test problem of any other. About one pair in eight is held out.
"""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Literal

from pydantic import Field

from mirrorpo.tasks.task import Grade, Row, Settings, Split

MAX_SIZE = 20_000
_ONE_IN = 8
_NAMES = (
    "Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Hugo", "Irene", "Jack", "Kate", "Leo", "Maria", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tara", "Victor",
)  # fmt: skip
_THINGS = (
    "apples", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "plates",
    "shells", "stamps", "stickers", "stones", "tickets",
)  # fmt: skip
_HOLDERS = ("bags", "baskets", "boxes", "cartons", "crates", "drawers", "jars", "packs", "rows", "trays")
_SENTENCES = {
    "add": (
        "{name} has {a} {things} and gets {b} more; how many {things} does {name} have now?",
        "If {name} finds {a} {things} on Monday and {b} {things} on Tuesday, how many {things} is that in total?",
        "{name} buys {a} {things} while {other} buys {b}; how many {things} do they buy together?",
        "There are {a} {things} on the table and {b} on the shelf; how many {things} are there altogether?",
    ),
    "subtract": (
        "{name} has {a} {things} and gives {b} of them to {other}; how many {things} does {name} have left?",
        "Of {a} {things} in a shop, {b} are sold; how many {things} remain?",
        "{name} has {a} {things} and {other} has {b}; how many more {things} does {name} have?",
        "{name} needs {a} {things} and already has {b}; how many more {things} does {name} need?",
    ),
    "multiply": (
        "{name} fills {a} {holders} with {b} {things} each; how many {things} is that?",
        "There are {a} {holders} with {b} {things} in each; how many {things} are there in total?",
        "{name} collects {b} {things} a day for {a} days; how many {things} does {name} collect?",
        "If each of {a} children brings {b} {things}, how many {things} do they bring?",
    ),
}


class WordsSettings(Settings):
    """Word problems of one sentence."""

    name: Literal["words"]
    train_size: int = Field(default=4096, ge=1, le=MAX_SIZE, description="training problems")
    test_size: int = Field(default=256, ge=1, le=MAX_SIZE, description="unseen problems")
    seed: int = Field(default=0, ge=0, description="which problems are drawn")


class Words:
    """Word problems of one sentence, as a `mirrorpo.tasks.task.Task`.

    Args:
        train_size: number of training problems, 1 to 20 000.
        test_size: number of test problems, 1 to 20 000.
        seed: which problems are drawn, and their order; any non-negative integer. They depend on nothing else.

    Raises:
        ValueError: a size or seed out of range.

    Example:
        >>> task = Words(train_size=3)
        >>> row = task.rows("train")[0]
        >>> sorted(row), task.grade(f"That makes {row['answer']}.", row).reason
        (['answer', 'prompt'], 'match')
    """

    name = "words"

    def __init__(self, *, train_size: int = 4096, test_size: int = 256, seed: int = 0) -> None:
        for key, value in (("train_size", train_size), ("test_size", test_size)):
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{key} is {value!r}; legal values: integers from 1 to {MAX_SIZE:,}")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed is {seed!r}; legal values: integers of at least 0")
        self.seed = seed
        self._sizes: dict[Split, int] = {"train": train_size, "test": test_size}

    def rows(self, split: Split) -> list[Row]:
        """The problems of a split: distinct, always the same, always in the same order.

        Args:
            split: "train" or "test".

        Returns:
            One dict per problem: ``prompt``, the sentence, and ``answer``, the integer as text.
        """
        if split not in self._sizes:
            raise ValueError(f"split is {split!r}; legal values: {', '.join(map(repr, self._sizes))}")
        found: dict[str, str] = {}
        for index in count():
            if len(found) == self._sizes[split]:
                break
            sentence, pair, answer = _problem(f"{self.seed}/{index}")
            if is_test_pair(*pair) == (split == "test"):
                found.setdefault(sentence, str(answer))
        return [{"prompt": sentence, "answer": answer} for sentence, answer in found.items()]

    def grade(self, completion: str, row: Row) -> Grade:
        """Compare the completion's final number with the answer; see `mirrorpo.rewards.match.numeric`."""
        from mirrorpo.rewards.match import numeric

        return numeric(completion, row["answer"])


def is_test_pair(a: int, b: int) -> bool:
    """Whether a pair of numbers, in either order, belongs to the test split.

    Example:
        >>> is_test_pair(12, 7) == is_test_pair(7, 12)
        True
    """
    low, high = min(a, b), max(a, b)
    return hashlib.sha256(f"{low},{high}".encode()).digest()[0] % _ONE_IN == 0


def _problem(draw: str) -> tuple[str, tuple[int, int], int]:
    """Sentence, numbers and answer of one draw; an independent digest makes each."""
    digest = hashlib.sha256(f"words/{draw}".encode()).digest()
    # Three bytes for at most 90 values: the bias of the remainder is below 1e-5.
    draws = [int.from_bytes(digest[start : start + 3]) for start in range(0, 24, 3)]
    operation = ("add", "subtract", "multiply")[draws[0] % 3]
    if operation == "add":
        a, b = 3 + draws[1] % 58, 3 + draws[2] % 58
        answer = a + b
    elif operation == "subtract":
        a = 10 + draws[1] % 90
        b = 3 + draws[2] % (a - 3)
        answer = a - b
    else:
        a, b = 3 + draws[1] % 13, 3 + draws[2] % 13
        answer = a * b
    first = draws[3] % len(_NAMES)
    second = (first + 1 + draws[4] % (len(_NAMES) - 1)) % len(_NAMES)
    sentence = _SENTENCES[operation][draws[5] % 4].format(
        a=a,
        b=b,
        name=_NAMES[first],
        other=_NAMES[second],
        things=_THINGS[draws[6] % len(_THINGS)],
        holders=_HOLDERS[draws[7] % len(_HOLDERS)],
    )
    return sentence, (a, b), answer
