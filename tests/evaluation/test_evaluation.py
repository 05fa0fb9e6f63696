"""Accuracy, pass@k and intervals; sampling that leaves the global random state alone."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.evaluation import (
    Evaluation,
    Sample,
    Sampler,
    clustered_interval,
    evaluate,
    pass_at_k,
    wilson_interval,
)
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


def test_the_interval_over_problems_is_wilsons_for_one_sample_each() -> None:
    assert clustered_interval([1.0] * 3 + [0.0] * 7, 10) == wilson_interval(3, 10)
    assert clustered_interval([0.0] * 10, 80) == wilson_interval(0, 10), "no spread says nothing about the samples"
    # All problems alike: as good as all samples independent.
    assert clustered_interval([0.5] * 10, 80) == pytest.approx(wilson_interval(40, 80))
    with pytest.raises(ValueError, match="num_samples must be at least"):
        clustered_interval([0.5, 0.5], 1)


@pytest.mark.parametrize("agreement", [0.02, 1.0, 50.0])
def test_the_interval_covers_the_truth_however_samples_agree_within_a_problem(agreement: float) -> None:
    # A problem's chance of a right sample is Beta(0.4 a, 0.6 a): all or nothing for small a, 0.4 for large a.
    generator = numpy.random.default_rng(0)
    problems, samples, runs = 80, 8, 600
    chances = generator.beta(0.4 * agreement, 0.6 * agreement, (runs, problems))
    values = generator.binomial(samples, chances) / samples
    covered = naive = 0
    for row in values:
        low, high = clustered_interval(row.tolist(), problems * samples)
        covered += low <= 0.4 <= high
        low, high = wilson_interval(float(row.sum() * samples), problems * samples)
        naive += low <= 0.4 <= high
    assert 0.92 <= covered / runs <= 0.98
    assert agreement > 1 or naive / runs < 0.85, "samples counted as independent would claim too much"


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml", "evaluation.sampling", "rewards.verdict", "tasks.jsonl",
        "training.plan",
    ],
)  # fmt: skip
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"mirrorpo.{name}"), report=False)
    assert result.attempted > 0
    assert result.failed == 0


def sample(problem: int, reward: float | None, reason: str = "mismatch", tokens: int = 3) -> Sample:
    return Sample(problem=problem, prompt="", completion="", answer="", num_tokens=tokens, reward=reward, reason=reason)


def test_a_problem_that_cannot_be_scored_is_left_out_and_counted() -> None:
    samples = (sample(0, 1.0, "match"), sample(1, None, "bad reference"), sample(2, 0.0))
    result = Evaluation(samples=samples, samples_per_problem=1).summary()
    assert result["accuracy"] == 0.5
    assert (result["problems"], result["problems_scored"]) == (3, 2)
    assert result["verdicts"] == {"right": 1, "wrong": 1, "unreadable": 0, "unscored": 1}


def test_what_cannot_be_read_is_no_wrong_answer_in_the_counts() -> None:
    reasons = ["match", "mismatch", "no answer", "malformed", "timeout", "failed", "syntax error", "no code"]
    samples = tuple(sample(i, float(reason == "match"), reason) for i, reason in enumerate(reasons))
    result = Evaluation(samples=samples, samples_per_problem=1).summary()
    assert result["verdicts"] == {"right": 1, "wrong": 3, "unreadable": 4, "unscored": 0}
    assert result["reasons"] == dict.fromkeys(reasons, 1)
    assert result["accuracy"] == 1 / 8, "it earns nothing all the same"


def test_lengths_are_told_by_mean_quantiles_and_truncated_share() -> None:
    samples = tuple(
        replace(sample(i, 0.0, tokens=i + 1), truncated=i >= 90, seconds=0.5) for i in range(100)
    )  # 1 to 100 tokens
    result = Evaluation(samples=samples, samples_per_problem=4).summary()
    assert result["mean_length"] == 50.5
    assert result["length_quantiles"] == {"0.1": 10, "0.5": 50, "0.9": 90, "0.99": 99}
    assert (result["max_length"], result["truncated"]) == (100, 0.1)
    assert result["tokens_per_second"] == round(5050 / 50, 1)


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


def test_a_large_model_on_a_cpu_answers_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("tiny"))
    task, rows = Counting(), Arithmetic().rows("test")[:40]
    evaluate(model, tokenizer, task, rows, Sampler(max_completion_length=2))
    assert task.sizes == [40]
    monkeypatch.setattr("mirrorpo.evaluation.sampling._LARGE", 1000)
    evaluate(model, tokenizer, task, rows, Sampler(max_completion_length=2))
    assert task.sizes == [40, 32, 8]
