"""The algebra processes: stopped in time, remembered, side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from mirrorpo.rewards import algebra
from mirrorpo.rewards.algebra import Algebra
from mirrorpo.rewards.maths import MathVerifier

_MANY = 100_000


def test_the_same_texts_are_compared_once_however_many_ask() -> None:
    compared = Algebra(seconds=60.0, processes=2)
    try:
        with (
            mock.patch.object(Algebra, "_compared", autospec=True, side_effect=Algebra._compared) as spy,
            ThreadPoolExecutor(8) as threads,
        ):
            verdicts = list(threads.map(lambda _: compared.compare("x + x", "2x"), range(16)))
        assert verdicts == ["match"] * 16
        assert spy.call_count == 1
    finally:
        compared.close()


def test_a_timeout_is_remembered_and_leaves_the_process_usable() -> None:
    compared = Algebra(seconds=0.5, processes=1)
    deep = "(x+" * 25 + "1" + ")" * 25
    try:
        assert compared.compare(deep, "x") == "timeout"
        with mock.patch.object(Algebra, "_compared", side_effect=AssertionError("compared again")):
            assert compared.compare(deep, "x") == "timeout"
        assert len(compared._idle) <= 1
        assert compared.compare("y + y", "2y") in ("match", "timeout")  # a busy machine may be slow
    finally:
        compared.close()


def test_a_process_that_does_not_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "_PROGRAM", "raise SystemExit(1)")
    compared = Algebra()
    for _ in range(2):  # the failure is no verdict and is not remembered as one
        with pytest.raises(RuntimeError, match="is math-verify installed"):
            compared.compare("x", "y")
    compared.close()


def test_seconds_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds must be in \[0.01, 3600\], got 0"):
        Algebra(seconds=0)


def test_slow_lines_run_beside_each_other_and_do_not_hold_up_plain_ones() -> None:
    both_begun = threading.Barrier(3, timeout=60.0)  # breaks, and fails the test, if one waits for the other

    def compared(self: Algebra, given: str, wanted: str) -> str:
        both_begun.wait()
        return "match"

    verifier = MathVerifier(processes=2)
    try:
        with mock.patch.object(Algebra, "_compared", compared):
            slow = [verifier.begin(rf"\boxed{{x + {i}}}", f"{i} + x") for i in (1, 2)]
            assert verifier.begin("#### 42", "42") == verifier.grade("#### 42", "42")  # while both are at work
            both_begun.wait()
            assert [promise.result().reason for promise in slow] == ["match", "match"]  # type: ignore[union-attr]
    finally:
        verifier.close()


@pytest.fixture(scope="module")
def unhurried() -> Iterator[MathVerifier]:
    verifier = MathVerifier(seconds=3600.0)  # a text that needed the limit would stop the suite
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("\\boxed{42}" * _MANY, "match"),
        ("so \\boxed{41},\n" * _MANY + "\\boxed{42}", "match"),
        ("\\boxed{" * _MANY, "malformed"),
        ("#### " * _MANY + "42", "match"),
        ("<answer>" * _MANY + "42", "match"),
        ("the answer is " * _MANY + "42", "match"),
        ("\\boxed{" + "\\frac{1}{" * 100 + "1" + "}" * 100 + "}", "malformed"),
        ("\\boxed{" + "\\text{" * 500 + "42" + "}" * 500 + "}", "malformed"),
        ("\\boxed{" + "\\frac{1}{1+" * 20 + "1" + "}" * 20 + "}", "mismatch"),
        ("\\boxed{" + "(" * 25 + "42" + ")" * 25 + "}", "match"),
        ("\\boxed{9^{9^{9^{9}}}}", "timeout"),
        ("\\boxed{((9!)!)!}", "timeout"),
    ],
    ids=lambda value: value[:24],
)
def test_long_and_deep_texts_end_without_the_limit(unhurried: MathVerifier, completion: str, reason: str) -> None:
    assert unhurried.grade(completion, "42").reason == reason
