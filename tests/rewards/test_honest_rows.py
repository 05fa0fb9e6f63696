"""Rows as data sets have them are judged as Python itself would judge them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from honest_rows import ROWS, Row

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import Limits


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = CodeVerifier(limits=Limits(wall_seconds=20.0, cpu_seconds=4), require="limits")
    yield verifier
    verifier.close()


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def test_there_are_many_of_them() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_right_program_earns_its_reward_and_a_wrong_one_does_not(row: Row, verifier: CodeVerifier) -> None:
    assert row.wrong != row.code
    right, wrong = verifier.grade_many([(fenced(code), row.tests, row.setup) for code in (row.code, row.wrong)])
    assert (right.reward, right.reason) == (1.0, "passed")
    assert wrong.reward == 0.0
