"""Answers are found where people write them, compared exactly, and never evaluated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from data import GSM8K, rows_of
from maths_cases import CASES

from mirrorpo.rewards.maths import MathVerifier, final_answer
from mirrorpo.rewards.notation import tidy
from mirrorpo.rewards.numbers import read_number


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(seconds=60.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 42\n#### 43", "43"),
        ("####42.\nThat is it.", "42"),
        (r"so \boxed{42}", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or rather \boxed{2}", "1, 2"),
        (r"\fbox{3}", "3"),
        ("The answer is 42.", "42"),
        ("the final answer is: 3.5. Good.", "3.5"),
        ("The answer to the question is $5, since 2 + 3 = 5", "$5"),
        ("**Answer:** 42", "42"),
        ("Answer = 7", "7"),
        ("#### Step 1\nwe add\n" + r"\boxed{5}", "5"),
        (r"The answer is \boxed{5}.", "5"),
        ("I think it is 42", None),
        ("", None),
        ("####", ""),
        (r"\boxed{5", ""),
    ],
)
def test_the_final_answer_is_found(completion: str, answer: str | None) -> None:
    assert final_answer(completion) == answer


def test_the_last_number_counts_only_if_asked_for() -> None:
    assert final_answer("2 apples and 1,200.50 pears") is None
    assert final_answer("2 apples and 1,200.50 pears", last_number=True) == "1,200.50"
    assert final_answer("no number", last_number=True) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("+42", 42),
        ("-3", -3),
        ("\u22123", -3),
        ("007", 7),
        ("1,000", 1000),
        ("1,234,567.5", Fraction(12345675, 10)),
        ("1 000 000", 1000000),
        (r"1{,}000", 1000),
        ("$12.50", Fraction(25, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("5 €", 5),
        ("USD 20", 20),
        (r"\$18", 18),
        ("$18$", 18),
        (r"\(18\)", 18),
        ("**18**", 18),
        ("18.", 18),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("50%", 50),
        (r"50\%", 50),
        ("50 percent", 50),
        ("1.5e3", 1500),
        ("1.5E-3", Fraction(15, 10000)),
        (r"1.5 \times 10^{3}", 1500),
        ("2 x 10^-2", Fraction(1, 50)),
        ("72 clips", 72),
        ("5 km/h", 5),
        (r"12 \text{ cm}^2", 12),
        ("3 hours per day", 3),
        ("2 million", 2_000_000),
        (r"45^\circ", 45),
    ],
)
def test_numbers_are_read_exactly(text: str, value: int | Fraction) -> None:
    number = read_number(tidy(text))
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "many",
        "5 or 6",
        "5 and 6",
        "5, 6",
        "5-6",
        "5x",
        "3pi",
        "1,00",
        "1/0",
        "1e99999",
        "9" * 101,
        "0x10",
        "--5",
        "5 = 5",
    ],
)
def test_what_is_no_single_number_is_not_read(text: str) -> None:
    assert read_number(tidy(text)) is None


GRADES = [
    ("#### 1,000", "1000", "match"),
    ("#### 50%", "50", "match"),
    ("#### 50%", "0.5", "match"),
    ("#### 50%", "5", "mismatch"),
    ("#### 5 cm", "5 m", "mismatch"),
    ("#### 5 apples", "5 apple", "match"),
    ("#### 0.333", "1/3", "mismatch"),
    ("#### 1/3", "2/6", "match"),
    ("#### 72", "She sold 72 clips. #### 72", "match"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2", "match"),
    (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2", "match"),
    (r"\boxed{x^2 + 2x}", r"(x+1)^2", "mismatch"),
    (r"\boxed{2\pi}", "2pi", "match"),
    (r"\boxed{(1, 2)}", "(1,2)", "match"),
    (r"\boxed{(2, 1)}", "(1,2)", "mismatch"),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", "match"),
    ("#### sqrt(16)", "4", "match"),
    ("#### 7*8", "56", "match"),
    ("#### 5x", "5", "mismatch"),
    ("#### 5 or 6", "5", "malformed"),
    ("#### unknown", "5", "malformed"),
    ("#### ", "5", "malformed"),
    ("#### 5\0", "5", "malformed"),
    ("#### \ud800", "5", "malformed"),
    ("####" + "(" * 900, "5", "malformed"),
    ("####" + "{" * 900, "5", "malformed"),
    ("it is 5", "5", "no answer"),
    ("", "5", "no answer"),
]


@pytest.mark.parametrize(("completion", "answer", "reason"), GRADES)
def test_verdicts(verifier: MathVerifier, completion: str, answer: str, reason: str) -> None:
    grade = verifier.grade(completion, answer)
    assert (grade.reason, grade.reward) == (reason, 1.0 if reason == "match" else 0.0)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [pytest.param(*row, id=f"{family}-{index}") for family, rows in CASES.items() for index, row in enumerate(rows)],
)
def test_the_table_of_cases(verifier: MathVerifier, completion: str, answer: str, reward: int) -> None:
    assert (verifier.grade(completion, answer).reward or 0.0) == reward


def test_a_reference_that_says_nothing_is_no_verdict(verifier: MathVerifier) -> None:
    assert verifier.grade("#### 5", "") == verifier.grade("#### 5", "#### ")
    assert verifier.grade("#### 5", "").reward is None


def test_an_answer_that_takes_too_long_is_stopped_and_the_next_is_graded() -> None:
    verifier = MathVerifier(seconds=0.5)
    try:
        started = time.monotonic()
        assert verifier.grade(r"\boxed{9^{9^{9^{9}}}}", "3").reason == "timeout"
        assert verifier.grade(r"\boxed{x + x}", "2x").reason in ("match", "timeout")  # a busy machine may be slow
        assert time.monotonic() - started < 60.0
    finally:
        verifier.close()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {path}')",
        "open('{path}', 'w')",
        r"\text{{__import__('os').system('touch {path}')}}",
        "().__class__.__base__.__subclasses__()",
        "exec('1')",
        "(lambda: 5)()",
    ],
)
def test_no_text_is_evaluated(verifier: MathVerifier, text: str, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    for form in ("#### {}", r"\boxed{{{}}}"):
        assert verifier.grade(form.format(text.format(path=path)), "5x").reward == 0.0
    assert not path.exists()


@pytest.mark.parametrize("filler", ["9", "#", "answer ", r"\boxed{", "{", "\ud800", "\0", "1,", "the answer is "])
def test_ten_megabytes_are_read_in_seconds(verifier: MathVerifier, filler: str) -> None:
    started = time.monotonic()
    assert verifier.grade(filler * (10_000_000 // len(filler)), "5").reward == 0.0
    assert verifier.grade(filler * (10_000_000 // len(filler)) + "\n#### 5", "5").reward == 1.0
    assert time.monotonic() - started < 10.0


def test_every_gsm8k_reference_matches_itself(verifier: MathVerifier) -> None:
    rows = rows_of(GSM8K)
    assert len(rows) == 7473
    grades = [verifier.grade(row["answer"], row["answer"]) for row in rows]
    assert sum(grade.reward == 1.0 for grade in grades) == 7473
    # The same number in words of a model, and a wrong one.
    finals = [row["answer"].rpartition("####")[2].strip() for row in rows]
    assert all(
        verifier.grade(f"The answer is ${final}.", row["answer"]).reward == 1.0
        for final, row in zip(finals, rows, strict=True)
    )
    assert all(
        verifier.grade(f"#### {final}1", row["answer"]).reward == 0.0 for final, row in zip(finals, rows, strict=True)
    )
