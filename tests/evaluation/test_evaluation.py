"""Accuracy, pass@k and intervals; sampling that leaves the global random state alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.evaluation import Evaluation, Sample, Sampler, evaluate, pass_at_k, wilson_interval
from mirrorpo.models import builtin_path
from mirrorpo.tasks import Arithmetic, Grade, Row


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 2), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_more_than_was_sampled() -> None:
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\]"):
        pass_at_k(2, 1, 3)


def test_the_interval_solves_the_score_equation() -> None:
    low, high = wilson_interval(30, 100)
    for bound in (low, high):
        assert abs(0.3 - bound) / math.sqrt(bound * (1 - bound) / 100) == pytest.approx(1.959963984540054)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def sample(problem: int, reward: float | None) -> Sample:
    return Sample(problem=problem, prompt="", completion="", answer="", num_tokens=3, reward=reward, reason="x")


def test_a_problem_that_cannot_be_scored_is_left_out_and_counted() -> None:
    result = Evaluation(samples=(sample(0, 1.0), sample(1, None), sample(2, 0.0)), samples_per_problem=1).summary()
    assert result["accuracy"] == 0.5
    assert (result["problems"], result["problems_scored"]) == (3, 2)


class Counting(Arithmetic):
    """Arithmetic that grades in batches, and remembers their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        self.sizes.append(len(completions))
        return [self.grade(text, row) for text, row in zip(completions, rows, strict=True)]


def test_evaluation_is_repeatable_grades_in_batches_and_leaves_the_random_state_alone() -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("tiny"))
    task = Counting()
    sampler = Sampler(max_completion_length=30, batch_size=8, seed=7)
    before = torch.get_rng_state()
    first, second = (evaluate(model, tokenizer, task, task.rows("test")[:10], sampler, 2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert task.sizes == [8, 8, 4] * 2
    assert [s.problem for s in first.samples] == [i for i in range(10) for _ in range(2)]
    one_by_one = [Arithmetic().grade(s.completion, {"answer": s.answer}).reason for s in first.samples]
    assert [s.reason for s in first.samples] == one_by_one
