"""The algebra processes: stopped in time, remembered, side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from mirrorpo.rewards import algebra
from mirrorpo.rewards.algebra import Algebra


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
