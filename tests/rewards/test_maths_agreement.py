"""Own numbers and the computer algebra agree, and no text whatever breaks a verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirrorpo.rewards.answer_position import find_answer
from mirrorpo.rewards.equality import compare
from mirrorpo.rewards.match import numeric
from mirrorpo.rewards.maths import MathVerifier
from mirrorpo.rewards.notation import tidy
from mirrorpo.rewards.numbers import read_number

_SLOW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(seconds=2.0)
    yield verifier
    verifier.close()


@st.composite
def plain_decimals(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A decimal as people write it, with its value from the digits drawn."""
    whole = draw(st.integers(0, 10**12))
    decimals = draw(st.text("0123456789", max_size=12))
    negative = draw(st.booleans())
    digits = f"{whole:,}" if draw(st.booleans()) else str(whole)
    text = f"{'-' if negative else ''}{digits}{'.' + decimals if decimals else ''}"
    value = Fraction(whole) + (Fraction(int(decimals), 10 ** len(decimals)) if decimals else 0)
    return text, -value if negative else value


@given(plain_decimals())
@settings(deadline=None)
def test_a_decimal_is_read_as_its_digits_say(drawn: tuple[str, Fraction]) -> None:
    text, value = drawn
    number = read_number(tidy(text))
    assert number is not None
    assert number.value == value


@given(plain_decimals(), plain_decimals(), st.booleans())
@_SLOW
def test_numbers_and_algebra_give_the_same_verdict(
    left: tuple[str, Fraction], right: tuple[str, Fraction], same: bool
) -> None:
    text, value = left
    other = (f"{value.numerator}/{value.denominator}", value) if same else right
    expected = "match" if value == other[1] else "mismatch"
    assert compare(tidy(text), tidy(other[0])) == expected
    numbers = [read_number(tidy(side)) for side in (text, other[0])]
    assert all(number is not None for number in numbers)
    assert (numbers[0] == numbers[1]) == (expected == "match")


@given(st.integers(-999, 999), st.integers(1, 99), st.integers(1, 99))
@_SLOW
def test_mixed_numbers_and_algebra_agree(whole: int, top: int, bottom: int) -> None:
    text = rf"{whole}\frac{{{top}}}{{{bottom}}}"
    value = Fraction(abs(whole)) + Fraction(top, bottom)
    number = read_number(tidy(text))
    assert number is not None
    assert number.value == (value if whole >= 0 else -value)
    if whole > 0:
        assert compare(tidy(text), f"{number.value.numerator}/{number.value.denominator}") == "match"


_PIECES = [
    *"0123456789.,!?;:=<>+-*/^_{}()[]|%$#&~'\"` \n",
    *["\\boxed{", "}", "\\frac{", "\\sqrt{", "####", "The answer is ", "Answer: ", "**", "or", "and", "x", "i", "\\pi"],
    *["\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\text{", "<think>", "</think>", "<answer>", "</answer>", "\\pm"],
    *[
        "\N{SUPERSCRIPT TWO}",
        "\N{VULGAR FRACTION ONE HALF}",
        "\N{MINUS SIGN}",
        "\0",
        "\ud800",
        "\u0660",
        "cm",
        "million",
    ],
    *[
        "\\overline{",
        "\\approx",
        "\\in",
        "\\cup",
        "\\infty",
        "\\int",
        "\\sum_{i=1}^{5}",
        "dx",
        "\\left",
        "\\right",
        "e",
    ],
]
texts = st.lists(st.sampled_from(_PIECES), max_size=40).map("".join) | st.text(max_size=80)


@given(texts, texts)
@settings(max_examples=1000, deadline=None)
def test_no_text_breaks_the_reading(completion: str, answer: str) -> None:
    found = find_answer(completion, last_number=True)
    for part in found.parts if found else ():
        read_number(tidy(part))
    assert numeric(completion, answer).reward in (0.0, 1.0, None)


@given(texts, texts)
@_SLOW
def test_no_text_breaks_a_verdict(verifier: MathVerifier, completion: str, answer: str) -> None:
    started = time.monotonic()
    for text in (completion, f"\\boxed{{{completion}}}"):
        grade = verifier.grade(text, answer)
        assert grade.reward in (0.0, 1.0, None)
        assert (grade.reward == 1.0) == (grade.reason == "match")
    assert time.monotonic() - started < 60.0  # a verdict has two seconds: this says only that nothing hangs


@given(texts)
@settings(max_examples=500, deadline=None)
def test_the_last_marked_line_is_the_answer_whatever_comes_before(text: str) -> None:
    found = find_answer(f"{text.replace('<think>', '')}\n#### 7")
    assert found is not None
    assert found.parts == ("7",)
