"""Word problems: answers by an independent reading of the sentence, splits without a common pair, repeatable draws."""

from __future__ import annotations

import re

import pytest

from mirrorpo.tasks.words import Words, is_test_pair

# What tells the operation, read from the sentence alone.
ADD = ("gets", "in total?", "together?", "altogether?")
SUBTRACT = ("gives", "remain", "how many more")


def solved(sentence: str) -> int:
    """The answer from the words of a sentence, without the generator's own templates."""
    a, b = map(int, re.findall(r"\d+", sentence))
    if "each" in sentence or "a day for" in sentence:
        return a * b
    if any(word in sentence for word in SUBTRACT):
        return a - b
    assert any(word in sentence for word in ADD), sentence
    return a + b


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_what_the_sentence_asks_for(split: str) -> None:
    for row in Words(train_size=3000, test_size=3000).rows(split):  # pyright: ignore[reportArgumentType]
        assert int(row["answer"]) == solved(row["prompt"])
        assert int(row["answer"]) >= 1


def test_no_pair_of_numbers_is_in_both_splits_of_any_seeds() -> None:
    def pairs(split: str, seed: int) -> set[tuple[int, ...]]:
        rows = Words(train_size=4000, test_size=1000, seed=seed).rows(split)  # pyright: ignore[reportArgumentType]
        return {tuple(sorted(map(int, re.findall(r"\d+", row["prompt"])))) for row in rows}

    assert not pairs("train", 0) & pairs("test", 1)
    assert not pairs("train", 1) & pairs("test", 0)


def test_about_one_pair_in_eight_is_for_testing() -> None:
    held_out = [is_test_pair(a, b) for a in range(3, 61) for b in range(a, 61)]
    assert 0.09 < sum(held_out) / len(held_out) < 0.16


def test_the_draws_repeat_and_a_longer_split_begins_with_a_shorter_one() -> None:
    short, long = Words(train_size=5).rows("train"), Words(train_size=50).rows("train")
    assert long[:5] == short == Words(train_size=5).rows("train")
    assert Words(train_size=5, seed=1).rows("train") != short
    assert len({row["prompt"] for row in long}) == 50


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("He has 12 + 5 = 17 apples.", 1.0), ("17", 1.0), ("The answer is 18.", 0.0), ("", 0.0), ("seventeen or 18", 0.0)],
)
def test_the_final_number_is_graded(completion: str, reward: float) -> None:
    assert Words().grade(completion, {"answer": "17"}).reward == reward


@pytest.mark.parametrize(("key", "value"), [("train_size", 0), ("test_size", 30_000), ("seed", -1), ("seed", True)])
def test_a_setting_out_of_range_is_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=key):
        Words(**{key: value})
