"""Integer expressions to be calculated step by step, graded exactly.

A problem is ``12+7*3=?`` and its answer the integer that follows ``####`` in a completion, the convention of GSM8K
(Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168, section 2). Every value on the way
is a non-negative integer, and multiplication binds before addition and subtraction.

=========== ============================================== ================ ====================
difficulty  expressions                                    distinct         largest answer
=========== ============================================== ================ ====================
``easy``    ``a+b``, ``a-b`` with a, b in 1..99            14 751           198
``medium``  ``a*b+c``, ``c+a*b``, ``a*b-c``, ``c-a*b``     19 008           180
            with a, b in 2..9 and c in 1..99
``hard``    the same with a in 100..999, b in 2..9,        19 440 000       9990
            c in 100..999
=========== ============================================== ================ ====================

Whether a problem is for testing is read off a digest of its text: about one in eight is, for every difficulty, size
and seed. So no training problem of any seed is a test problem of any other. Validation problems, to choose by, are
those on the test side that a seed draws after its first 1 000: in no training split, and in no test split of the seed.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal, get_args

from pydantic import Field

from mirrorpo.tasks.task import Grade, Row, Settings, Split

Difficulty = Literal["easy", "medium", "hard"]

MAX_TRAIN_SIZE = 10_000
MAX_TEST_SIZE = 1_000
MAX_VALIDATION_SIZE = 512

# From and to, both included, of a, b and c in the table above.
_RANGES = {
    "medium": ((2, 9), (2, 9), (1, 99)),
    "hard": ((100, 999), (2, 9), (100, 999)),
}
_MARKER = "####"
_ONE_IN = 8
# 18 digits fit a machine word and stay far below Python's limit on the digits that int() accepts.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
# Not str.strip()'s default, which would also take NULs' neighbours such as U+001C and every Unicode space.
_BLANKS = " \t\r\n"


class ArithmeticSettings(Settings):
    """The embedded task."""

    name: Literal["arithmetic"]
    difficulty: Difficulty = "medium"
    train_size: int = Field(default=8192, ge=1, le=10_000, description="training problems")
    test_size: int = Field(default=512, ge=1, le=1_000, description="unseen problems")
    validation_size: int = Field(default=512, ge=1, le=512, description="unseen problems to choose by")
    seed: int = Field(default=0, ge=0, description="which problems are drawn")


class Arithmetic:
    """Integer expressions to calculate, as a `mirrorpo.tasks.task.Task`.

    Args:
        difficulty: "easy" (one operation), "medium" (two, small numbers) or "hard" (two, larger numbers).
        train_size: number of training problems, 1 to 10 000.
        test_size: number of test problems, 1 to 1 000.
        validation_size: number of validation problems, 1 to 512.
        seed: which problems are drawn, and their order; any non-negative integer. Problems depend on nothing else:
            neither on the machine, nor on Python's version, nor on a global random state.

    Example:
        >>> task = Arithmetic(difficulty="medium", train_size=4, test_size=2)
        >>> len(task.rows("train")), sorted(task.rows("test")[0])
        (4, ['answer', 'prompt'])
        >>> task.grade("7*3=21;12+21=33#### 33", {"prompt": "12+7*3=?", "answer": "33"}).reason
        'match'
    """

    name = "arithmetic"

    def __init__(
        self,
        *,
        difficulty: str = "medium",
        train_size: int = 8192,
        test_size: int = 512,
        validation_size: int = 512,
        seed: int = 0,
    ) -> None:
        if difficulty not in get_args(Difficulty):
            legal = ", ".join(repr(level) for level in get_args(Difficulty))
            raise ValueError(f"difficulty is {difficulty!r}; legal values: {legal}")
        _require_int("train_size", train_size, low=1, high=MAX_TRAIN_SIZE)
        _require_int("test_size", test_size, low=1, high=MAX_TEST_SIZE)
        _require_int("validation_size", validation_size, low=1, high=MAX_VALIDATION_SIZE)
        _require_int("seed", seed, low=0, high=None)
        self.difficulty = difficulty
        self.seed = seed
        self._sizes: dict[Split, int] = {"train": train_size, "validation": validation_size, "test": test_size}

    def rows(self, split: Split) -> list[Row]:
        """Draw the problems of a split: distinct, always the same, always in the same order.

        Args:
            split: "train", "validation" or "test".

        Returns:
            One dict per problem: ``prompt``, the question, and ``answer``, the integer as text.

        Example:
            >>> Arithmetic(difficulty="easy", train_size=2).rows("train")
            [{'prompt': '27-4=?', 'answer': '23'}, {'prompt': '68+35=?', 'answer': '103'}]
        """
        if split not in self._sizes:
            raise ValueError(f"split is {split!r}; legal values: {', '.join(map(repr, self._sizes))}")
        skipped = MAX_TEST_SIZE if split == "validation" else 0
        found: dict[str, int] = {}
        index = 0
        while len(found) < skipped + self._sizes[split]:
            text, answer = _problem(self.difficulty, self.seed, index)
            index += 1
            if is_test_problem(text) == (split != "train"):
                found[text] = answer  # drawn twice, it keeps its first place
        return [{"prompt": text, "answer": str(answer)} for text, answer in list(found.items())[skipped:]]

    def grade(self, completion: str, row: Row) -> Grade:
        """Compare what follows ``####`` with the answer.

        The completion needs ``####`` exactly once, followed by one integer in ASCII digits (a sign and leading zeros
        are fine, at most 18 digits) and nothing else but blanks.

        Args:
            completion: any text.
            row: a row of `rows`; only ``answer`` is read.

        Returns:
            Reward 1.0 with reason "match", or 0.0 with "mismatch" (an integer, but another one), "no answer" (no
            ``####``) or "malformed" (``####`` twice, or not followed by an integer alone).

        Example:
            >>> task = Arithmetic()
            >>> [task.grade(text, {"answer": "33"}).reason for text in ("#### 33", "#### 34", "33", "#### 3 3")]
            ['match', 'mismatch', 'no answer', 'malformed']
        """
        count = completion.count(_MARKER)
        if count == 0:
            return Grade(reward=0.0, reason="no answer")
        given = completion.partition(_MARKER)[2].strip(_BLANKS)
        if count > 1 or not _INTEGER.fullmatch(given):
            return Grade(reward=0.0, reason="malformed")
        if int(given) == int(row["answer"]):
            return Grade(reward=1.0, reason="match")
        return Grade(reward=0.0, reason="mismatch")

    def pair(self, row: Row, number: int) -> tuple[str, str]:
        """A right derivation of a problem, and a wrong one.

        Its product is off by 1 to 9, in every pair; in every second pair only the answer that follows from it is said.

        Args:
            row: a row of `rows`; only ``prompt`` is read.
            number: of the pair; it decides what is wrong.

        Raises:
            ValueError: the difficulty is "easy", whose problems have one step.

        Example:
            >>> Arithmetic().pair({"prompt": "12+7*3=?"}, 0)
            ('7*3=21;12+21=33#### 33', '7*3=22;12+22=34#### 34')
            >>> Arithmetic().pair({"prompt": "12+7*3=?"}, 1)
            ('7*3=21;12+21=33#### 33', '#### 35')
        """
        if self.difficulty == "easy":
            raise ValueError("difficulty is 'easy', whose problems have one step; legal: medium, hard")
        wrong = _derivation(row["prompt"], 1 + number % 9)
        return _derivation(row["prompt"], 0), wrong[wrong.index(_MARKER) :] if number % 2 else wrong


def is_test_problem(text: str) -> bool:
    """Tell whether a problem belongs to the test split, from a digest of its text alone.

    Args:
        text: the question, as in a row's ``prompt``.

    Returns:
        True for about one text in eight.

    Example:
        >>> any(is_test_problem(row["prompt"]) for row in Arithmetic(train_size=100).rows("train"))
        False
    """
    return hashlib.sha256(text.encode()).digest()[0] % _ONE_IN == 0


def _derivation(problem: str, error: int) -> str:
    """The two steps of a problem and its answer; the product is off by ``error``."""
    left, sign, right = re.split(r"([+-])", problem.removesuffix("=?"))
    factors = left if "*" in left else right
    one, other = map(int, factors.split("*"))
    product = one * other + error
    left, right = (str(product) if side == factors else side for side in (left, right))
    answer = int(left) + int(right) * (1 if sign == "+" else -1)
    return f"{factors}={product};{left}{sign}{right}={answer}{_MARKER} {answer}"


def _problem(difficulty: str, seed: int, index: int) -> tuple[str, int]:
    """The index-th draw of a seed: question and answer; an independent digest makes each draw."""
    digest = hashlib.sha256(f"{difficulty}/{seed}/{index}".encode()).digest()
    # Four bytes for at most 900 values: the bias of the remainder is below 1e-6.
    *draws, kind = (int.from_bytes(digest[start : start + 4]) for start in range(0, 16, 4))
    if difficulty == "easy":
        a, b = 1 + draws[0] % 99, 1 + draws[1] % 99
        if kind % 2 == 0:
            return f"{a}+{b}=?", a + b
        a, b = max(a, b), min(a, b)
        return f"{a}-{b}=?", a - b
    a, b, c = (low + draw % (high - low + 1) for draw, (low, high) in zip(draws, _RANGES[difficulty], strict=True))
    product = a * b
    product_first = kind % 2 == 0
    if kind // 2 % 2 == 0:
        return (f"{a}*{b}+{c}=?" if product_first else f"{c}+{a}*{b}=?"), product + c
    # Subtraction is written the way round that is not negative.
    return (f"{a}*{b}-{c}=?", product - c) if product >= c else (f"{c}-{a}*{b}=?", c - product)


def _require_int(name: str, value: int, *, low: int, high: int | None) -> None:
    """Raise a ValueError unless value is an integer in low..high (no upper bound if high is None)."""
    if type(value) is not int or value < low or (high is not None and value > high):
        legal = f"integers of at least {low}" if high is None else f"integers from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; legal values: {legal}")
