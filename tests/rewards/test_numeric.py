"""`numeric`: the final number is read whole or not at all, and right answers are read when the data is loaded."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from mirrorpo.files import read_lines
from mirrorpo.rewards import lines
from mirrorpo.rewards.match import last_number, numeric, reference_number
from mirrorpo.rewards.maths import MathVerifier
from mirrorpo.tasks import Gsm8k, Jsonl

CASES = [
    ("That makes 42", "42", "match"),
    ("That makes 42.", "42", "match"),
    ("3 + 4 = 7", "7", "match"),
    ("It is 1/2.", "0.5", "match"),
    ("It is 1/2.", "2", "mismatch"),
    ("It is 1 1/2 cups.", "1.5", "match"),
    ("It is 1\N{VULGAR FRACTION ONE HALF}.", "1.5", "match"),
    (r"It is $\frac{3}{4}$.", "0.75", "match"),
    ("It is 1.5e3", "1500", "match"),
    (r"It is $1.5 \times 10^{3}$", "1500", "match"),
    ("It is 10^5", "100000", "match"),
    ("It is 10\N{SUPERSCRIPT FIVE}", "100000", "match"),
    ("It is 10\N{SUPERSCRIPT FIVE}", "105", "mismatch"),
    ("It is 50%", "0.5", "match"),
    ("It is 50 percent.", "50", "match"),
    ("It is 2.5 million.", "2500000", "match"),
    ("It is 2.5 million.", "2.5", "mismatch"),
    ("It is 3 dozen.", "36", "match"),
    ("It is .5", "0.5", "match"),
    ("It is .5", "5", "mismatch"),
    ("It is -5", "-5", "match"),
    ("It is \N{MINUS SIGN}5", "-5", "match"),
    ("It costs $1,250.50.", "1250.5", "match"),
    ("It is 12 000.", "12000", "match"),
    ("It is 12 000.", "0", "mismatch"),
    ("It is 12 345 678", "12345678", "match"),
    ("It is **42**.", "42", "match"),
    ("#### 42\nI hope that 7 helps", "42", "match"),
    (r"\boxed{42} of 50", "42", "match"),
    ("The answer is x = 42", "42", "match"),
    ("It is 5 or 6", "6", "malformed"),
    ("It is 5 to 6", "6", "malformed"),
    ("It is 5-6", "6", "malformed"),
    ("It is 5-6", "-6", "malformed"),
    ("It is 1.5.2", "2", "malformed"),
    ("It is x^2", "2", "malformed"),
    ("It is sqrt(16)", "16", "malformed"),
    (r"It is \sqrt{16}", "16", "malformed"),
    ("It is 6 squared", "6", "malformed"),
    ("It is 3x", "3", "malformed"),
    ("It is x3", "3", "malformed"),
    ("It is negative 8.", "-8", "match"),
    ("It is minus 8", "8", "mismatch"),
    ("It is about 11 m\N{SUPERSCRIPT TWO}", "11", "match"),
    ("It is \N{ALMOST EQUAL TO} 8", "8", "match"),
    (r"It is 1\frac{1}{2}$", "1.5", "match"),
    ("42 - that is it", "42", "match"),
    ("That is 8 per cent.", "8", "match"),
    ("It is between 10 and 11", "11", "malformed"),
    ("He has 8 out of 10", "10", "malformed"),
    ("It is 5 x 6", "6", "malformed"),
    ("It is 8 divided by 10", "10", "malformed"),
    ("It is 8 times 10", "10", "malformed"),
    ("It is at least 8", "8", "malformed"),
    ("It is more than 8", "8", "malformed"),
    ("I got 12 (not 13).", "13", "malformed"),
    ("on the 3rd", "3", "malformed"),
    ("It is 10k", "10", "malformed"),
    ("Answer: Janet makes $18 every day.", "18", "match"),
    ("Answer: Janet makes half of $36.", "36", "malformed"),
    ("It takes 2 hours and 30 minutes.", "30", "malformed"),
    ("She pays 42 dollars and 50 cents", "50", "malformed"),
    ("The answer is forty-two.", "42", "match"),
    ("The answer is in metres: 42", "42", "match"),
    ("42<|im_end|>", "42", "match"),
    ("Ans: 42", "42", "match"),
    ("It is 1.000.000", "0", "malformed"),
    ("It is CO2", "2", "malformed"),
    ("It is 12,34", "34", "malformed"),
    ("It is 2.5M", "2.5", "malformed"),
    ("#### 5!", "5", "malformed"),
    ("#### 6k", "6", "malformed"),
    ("#### many", "6", "malformed"),
    ("no number", "6", "no answer"),
    ("", "6", "no answer"),
    ("#### 5", "5 or 6", "bad reference"),
    ("#### 5", "x", "bad reference"),
]


@pytest.mark.parametrize(("completion", "answer", "reason"), CASES)
def test_the_final_number_is_read_whole(completion: str, answer: str, reason: str) -> None:
    grade = numeric(completion, answer)
    assert grade.reason == reason
    assert grade.reward == (None if reason == "bad reference" else float(reason == "match"))


def test_without_a_mark_math_grades_the_same_last_number() -> None:
    verifier = MathVerifier(last_number=True)
    try:
        for completion, answer, reason in CASES:
            if reason in ("match", "mismatch", "no answer"):
                assert verifier.grade(completion, answer).reason == reason, completion
    finally:
        verifier.close()


def test_the_last_number_is_a_fraction_or_nothing() -> None:
    assert last_number("so 1,000 + 2.5 is #### 1,002.5") == Fraction(2005, 2)
    assert last_number("5 or 6") is None
    assert last_number("nothing") is None


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-05", Fraction(1, 100_000)),
        ("1e22", Fraction(10**22)),
        ("1E+2", Fraction(100)),
        (str(10**30), Fraction(10**30)),
        ("0.1", Fraction(1, 10)),
        ("0.12345678901234567890123", Fraction(12345678901234567890123, 10**23)),
        ("-0.0", Fraction(0)),
        ("4", Fraction(4)),
    ],
)
def test_a_json_number_keeps_its_digits(written: str, value: Fraction, tmp_path: Path) -> None:
    exact = f"{value.numerator}/{value.denominator}"
    verifier = MathVerifier()
    line = f'{{"completion": "#### {exact}", "answer": {written}}}'.encode()
    assert json.loads(next(lines.grade_maths([line], verifier)))["reward"] == 1.0
    verifier.close()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{index}", "answer": {written}}}\n' for index in range(40)))
    rows = Jsonl(path=str(path), reward="numeric").rows("train")
    number = reference_number(rows[0]["answer"])
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "true", "null", "[1]"])
def test_what_is_no_json_number_is_no_answer(written: str) -> None:
    verifier = MathVerifier()
    line = f'{{"completion": "#### 1", "answer": {written}}}'.encode()
    assert json.loads(next(lines.grade_maths([line], verifier)))["reason"].startswith("line 1: ")


def test_a_right_answer_that_is_no_number_is_refused_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "5"}\n{"prompt": "b", "answer": "5 or 6"}\n')
    with pytest.raises(
        ValueError, match="line 2: field 'answer' cannot be read as an answer: '5 or 6'; legal: "
    ) as error:
        Jsonl(path=str(path), reward="numeric")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    path.write_text('{"question": "a", "answer": "five #### 5"}\n{"question": "b", "answer": "6 ####"}\n')
    with pytest.raises(ValueError, match="line 2: field 'answer' cannot be read as an answer"):
        Gsm8k(path=str(path), validation_size=1)


def test_a_byte_order_mark_is_skipped_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "5"}\n' * 2, encoding="utf-8-sig")
    assert list(read_lines(path)) == [b'{"prompt": "a", "answer": "5"}\n'] * 2
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_text('\ufeff{"prompt": "a"}\n' if encoding[-2:] in ("le", "be") else '{"prompt": "a"}\n', encoding)
        with pytest.raises(ValueError, match="line 1 is not UTF-8 text") as error:
            list(read_lines(path))
        assert str(path) in str(error.value)
