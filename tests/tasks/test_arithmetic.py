"""The arithmetic task: problems right, disjoint and always the same; verdicts right on any text."""

from __future__ import annotations

import hashlib
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrorpo.tasks.arithmetic import MAX_TEST_SIZE, MAX_TRAIN_SIZE, Arithmetic, is_test_problem
from mirrorpo.tasks.task import Task

LEVELS = ("easy", "medium", "hard")
LARGEST_ANSWER = {"easy": 99 + 99, "medium": 9 * 9 + 99, "hard": 999 * 9 + 999}
ROW = {"prompt": "12+7*3=?", "answer": "33"}


def naive_value(question: str) -> int:
    """Sum over the terms of a question, each the product of its factors."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([0-9*]+)", question.removesuffix("=?")):
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += -product if sign == "-" else product
    return total


def is_in_the_table(level: str, question: str) -> bool:
    """Whether the table in the module's docstring allows a question, sign and ranges both."""
    if level == "easy":
        found = re.fullmatch(r"(\d+)[+-](\d+)=\?", question)
        return found is not None and all(1 <= int(number) <= 99 for number in found.groups())
    found = re.fullmatch(r"(\d+)\*(\d+)[+-](\d+)=\?", question)
    c, a, b = 3, 1, 2
    if found is None:
        found = re.fullmatch(r"(\d+)[+-](\d+)\*(\d+)=\?", question)
        c, a, b = 1, 2, 3
    if found is None:
        return False
    first, third = (range(100, 1000), range(100, 1000)) if level == "hard" else (range(2, 10), range(1, 100))
    return int(found[a]) in first and 2 <= int(found[b]) <= 9 and int(found[c]) in third


def every_medium_question() -> set[str]:
    """All questions of the level medium, by enumeration."""
    questions = set()
    for a, b in ((a, b) for a in range(2, 10) for b in range(2, 10)):
        for c in range(1, 100):
            questions |= {f"{a}*{b}+{c}=?", f"{c}+{a}*{b}=?", f"{a}*{b}-{c}=?" if a * b >= c else f"{c}-{a}*{b}=?"}
    return questions


def test_arithmetic_is_a_task() -> None:
    assert isinstance(Arithmetic(), Task)
    assert Arithmetic.name == "arithmetic"


@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_is_the_value_of_its_question(level: str) -> None:
    task = Arithmetic(difficulty=level)
    rows = task.rows("train") + task.rows("test")
    assert all(row["answer"] == str(naive_value(row["prompt"])) for row in rows)
    assert all(0 <= int(row["answer"]) <= LARGEST_ANSWER[level] for row in rows)


@pytest.mark.parametrize("level", LEVELS)
def test_questions_are_those_of_the_table(level: str) -> None:
    task = Arithmetic(difficulty=level, train_size=MAX_TRAIN_SIZE, test_size=MAX_TEST_SIZE)
    assert all(is_in_the_table(level, row["prompt"]) for row in task.rows("train") + task.rows("test"))


def test_there_are_enough_questions_for_the_largest_sizes() -> None:
    questions = every_medium_question()
    assert len(questions) == 8 * 8 * 99 * 3 == 19_008  # the three kinds of question for each a, b and c
    assert all(is_in_the_table("medium", question) for question in questions)
    for_testing = sum(map(is_test_problem, questions))
    assert for_testing >= 2 * MAX_TEST_SIZE
    assert len(questions) - for_testing >= 1.5 * MAX_TRAIN_SIZE
    # five standard deviations around one in eight
    assert abs(for_testing / 19_008 - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 19_008) ** 0.5


@pytest.mark.parametrize("level", LEVELS)
def test_each_kind_of_question_occurs_as_often_as_it_should(level: str) -> None:
    rows = Arithmetic(difficulty=level, train_size=8000).rows("train")
    sums = sum("+" in row["prompt"] for row in rows) / len(rows)
    # Sums are half of the draws; they are more than half of the distinct draws since they repeat less often.
    assert 0.48 < sums < 0.7
    leading_product = sum(bool(re.match(r"\d+\*", row["prompt"])) for row in rows) / len(rows)
    assert leading_product == 0 if level == "easy" else 0.35 < leading_product < 0.8


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", [(8192, 512), (MAX_TRAIN_SIZE, MAX_TEST_SIZE), (1, 1)])
def test_splits_have_the_sizes_asked_for_without_repetition(level: str, sizes: tuple[int, int]) -> None:
    task = Arithmetic(difficulty=level, train_size=sizes[0], test_size=sizes[1])
    for split, size in zip(("train", "test"), sizes, strict=True):
        rows = task.rows(split)  # type: ignore[arg-type]
        assert len(rows) == len({row["prompt"] for row in rows}) == size


def test_no_training_problem_of_any_seed_or_level_is_a_test_problem_of_another() -> None:
    tasks = [Arithmetic(difficulty=level, seed=seed) for level in LEVELS for seed in (0, 1, 2, 10**30)]
    train = {row["prompt"] for task in tasks for row in task.rows("train")}
    test = {row["prompt"] for task in tasks for row in task.rows("test")}
    assert train.isdisjoint(test)


def test_the_split_is_the_first_byte_of_the_sha256_of_the_question() -> None:
    rows = Arithmetic().rows("test")
    assert all(int(hashlib.sha256(row["prompt"].encode()).hexdigest()[:2], 16) % 8 == 0 for row in rows)


def drawn(level: str, seed: int, index: int) -> str:
    """A draw written out for one level and one digest, from the description rather than the code."""
    digest = hashlib.sha256(f"{level}/{seed}/{index}".encode()).hexdigest()
    a, b, c, kind = (int(digest[start : start + 8], 16) for start in range(0, 32, 8))
    if level == "easy":
        a, b = a % 99 + 1, b % 99 + 1
        return f"{max(a, b)}-{min(a, b)}=?" if kind & 1 else f"{a}+{b}=?"
    a, b, c = (a % 900 + 100, b % 8 + 2, c % 900 + 100) if level == "hard" else (a % 8 + 2, b % 8 + 2, c % 99 + 1)
    if kind & 2:
        return f"{a}*{b}-{c}=?" if a * b >= c else f"{c}-{a}*{b}=?"
    return f"{c}+{a}*{b}=?" if kind & 1 else f"{a}*{b}+{c}=?"


@pytest.mark.parametrize("level", LEVELS)
def test_problems_are_rederived_from_the_digest_of_level_seed_and_index(level: str) -> None:
    questions = list(dict.fromkeys(drawn(level, 7, index) for index in range(400)))
    task = Arithmetic(difficulty=level, seed=7, train_size=100, test_size=10)
    assert [row["prompt"] for row in task.rows("train")] == [q for q in questions if not is_test_problem(q)][:100]
    assert [row["prompt"] for row in task.rows("test")] == [q for q in questions if is_test_problem(q)][:10]


def test_rows_are_the_same_again_and_a_larger_size_only_appends() -> None:
    small, large = Arithmetic(train_size=100, seed=3), Arithmetic(train_size=5000, seed=3)
    assert small.rows("train") == small.rows("train") == large.rows("train")[:100]
    assert small.rows("train") != Arithmetic(train_size=100, seed=4).rows("train")


def test_global_random_state_is_neither_read_nor_written() -> None:
    random.seed(1)
    before = random.getstate()
    rows = Arithmetic(train_size=50).rows("train")
    assert random.getstate() == before
    random.seed(2)
    assert Arithmetic(train_size=50).rows("train") == rows


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("difficulty", "extreme"),
        ("difficulty", ""),
        ("train_size", 0),
        ("train_size", MAX_TRAIN_SIZE + 1),
        ("train_size", True),
        ("train_size", 8.0),
        ("test_size", -1),
        ("test_size", MAX_TEST_SIZE + 1),
        ("seed", -1),
        ("seed", "0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_legal_values(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{argument} is {re.escape(repr(value))}; legal values: "):
        Arithmetic(**{argument: value})  # type: ignore[arg-type]


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="split is 'dev'; legal values: 'train', 'validation', 'test'"):
        Arithmetic().rows("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("7*3=21;12+21=33#### 33", "match"),
        ("####33", "match"),
        ("#### 33 \r\n\t", "match"),
        ("####\n33", "match"),
        ("#### +33", "match"),
        ("#### 0033", "match"),
        ("33 is wrong, 34 is right #### 33", "match"),
        ("#### 34", "mismatch"),
        ("#### -33", "mismatch"),
        ("#### -0", "mismatch"),
        ("#### +5", "mismatch"),
        ("#### 999999999999999999", "mismatch"),
        ("", "no answer"),
        ("33", "no answer"),
        ("### 33", "no answer"),
        ("# # # # 33", "no answer"),
        ("\uff03\uff03\uff03\uff03 33", "no answer"),  # full-width number signs
        ("####", "malformed"),
        ("#### ", "malformed"),
        ("##### 33", "malformed"),
        ("######## 33", "malformed"),
        ("#### 33#### 33", "malformed"),
        ("#### 34 #### 33", "malformed"),
        ("#### 3 3", "malformed"),
        ("#### 0x21", "malformed"),
        ("#### 0x10", "malformed"),
        ("#### 33.0", "malformed"),
        ("#### 33.", "malformed"),
        ("#### 3_3", "malformed"),
        ("#### 3,3", "malformed"),
        ("#### 3.3e1", "malformed"),
        ("#### 30+3", "malformed"),
        ("#### --33", "malformed"),
        ("#### + 33", "malformed"),
        ("#### __import__('os')", "malformed"),
        ("#### 33 because", "malformed"),
        ("#### \u0663\u0663", "malformed"),  # Arabic-Indic digits
        ("#### \uff13\uff13", "malformed"),  # full-width digits
        ("#### \u00b33", "malformed"),  # superscript
        ("#### 33\x00", "malformed"),
        ("####\x0033", "malformed"),
        ("####\u00a033", "malformed"),  # no-break space
        ("#### 33\ud800", "malformed"),
        ("\ud800\x00 #### 33", "match"),
        ("#### 0000000000000000033", "malformed"),  # 19 digits
        ("#### 1000000000000000000", "malformed"),
    ],
)
def test_grade_gives_the_reason_and_its_reward(completion: str, reason: str) -> None:
    grade = Arithmetic().grade(completion, ROW)
    assert grade.reason == reason
    assert grade.reward == (1.0 if reason == "match" else 0.0)


def test_minus_zero_is_zero() -> None:
    assert Arithmetic().grade("#### -0", {"answer": "0"}).reason == "match"


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("9" * 10_000_000, "no answer"),
        ("####" + "9" * 10_000_000, "malformed"),
        ("####" + " " * 10_000_000 + "33", "match"),
        ("####" + "\x00" * 10_000_000 + "33", "malformed"),
        ("#" * 10_000_000, "malformed"),
        ("### " * 2_500_000, "no answer"),
        ("-+" * 5_000_000 + "####33", "match"),
    ],
    ids=["digits", "long number", "blanks", "nuls", "markers", "near markers", "long prose"],
)
def test_ten_megabytes_are_graded_in_no_time(completion: str, reason: str) -> None:
    started = time.perf_counter()
    assert Arithmetic().grade(completion, ROW).reason == reason
    assert time.perf_counter() - started < 5.0  # some 0.05 s; quadratic time would take hours


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("#3 0+-9\n\x00\ud800\u0663x"), max_size=30) | st.text(st.characters()))
def test_grade_never_raises_and_matches_only_the_answer(completion: str) -> None:
    grade = Arithmetic().grade(completion, ROW)
    assert grade.reason in {"match", "mismatch", "no answer", "malformed"}
    ends_with_answer = re.search(r"####[ \t\r\n]*\+?0{0,16}33[ \t\r\n]*\Z", completion) is not None
    right = ends_with_answer and len(completion.split("####")) == 2
    assert (grade.reason == "match") == right
    assert grade.reward == float(right)


@settings(deadline=None)
@given(st.integers(min_value=-(10**17), max_value=10**17), st.integers(min_value=-(10**17), max_value=10**17))
def test_grade_compares_integers(given_answer: int, answer: int) -> None:
    task = Arithmetic()
    assert task.grade(f"#### {answer}", {"answer": str(answer)}).reason == "match"
    expected = "match" if given_answer == answer else "mismatch"
    assert task.grade(f"#### {given_answer}", {"answer": str(answer)}).reason == expected


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_validation_problems_are_in_no_training_split_and_not_in_the_test_split(difficulty: str) -> None:
    largest = Arithmetic(difficulty=difficulty, train_size=10_000, test_size=1_000, validation_size=512)
    validation, test, train = ({row["prompt"] for row in largest.rows(s)} for s in ("validation", "test", "train"))
    assert len(validation) == 512
    assert not validation & test
    assert not validation & train
    assert all(is_test_problem(text) for text in validation)  # so no training split of any seed has one
    fewer = Arithmetic(difficulty=difficulty, test_size=3, validation_size=100)
    assert [row["prompt"] for row in fewer.rows("validation")] == [
        row["prompt"] for row in largest.rows("validation")[:100]
    ]


def test_validation_size_has_bounds() -> None:
    with pytest.raises(ValueError, match="validation_size is 513; legal values: integers from 1 to 512"):
        Arithmetic(validation_size=513)
