"""Draws that belong to a sample: the right distribution, and the same whatever else is in the batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.evaluation.sampling import Sampler, TransformersEngine, prompt_ids, seed_of, uniforms
from mirrorpo.models import builtin_path
from mirrorpo.models.decoding import pick
from mirrorpo.tasks import Arithmetic


def nucleus(probs: list[float], top_p: float) -> dict[int, float]:
    """Token to probability: most likely first until top_p is reached, renormalised."""
    kept: dict[int, float] = {}
    for token in sorted(range(len(probs)), key=lambda v: -probs[v]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probs[token]
    return {token: p / sum(kept.values()) for token, p in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.6, 0.55), (1.0, 1e-6)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -40.0, 0.9])
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    expected = nucleus([w / sum(weights) for w in weights], top_p)
    # A grid of uniform numbers in place of random ones: shares then equal probabilities to one part in n.
    n = 20_000
    grid = (torch.arange(n) + 0.5) / n
    drawn = Counter(pick(logits.expand(n, -1), grid, temperature, top_p).tolist())
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert drawn[token] / n == pytest.approx(probability, abs=2 / n)


def test_the_ends_of_the_unit_interval_draw_a_token_that_can_be_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 3)
    ends = torch.tensor([0.0, 1.0 - 2.0**-24, 1.0])
    assert pick(logits, ends, 1.0, 1.0).tolist() == [1, 2, 2]
    assert pick(logits, ends, 1.0, 0.5).tolist() == [1, 1, 1]


def test_every_sample_of_every_problem_has_its_own_draws() -> None:
    seeds = [seed_of(seed, problem, sample) for seed in range(3) for problem in range(20) for sample in range(20)]
    assert len(set(seeds)) == len(seeds)
    columns = uniforms(seeds[:4], 6)
    assert columns.shape == (6, 4)
    assert torch.equal(columns[:, 1:2], uniforms(seeds[1:2], 6)), "a column does not depend on the others"


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_batch_size_and_order_do_not_change_what_is_drawn(top_p: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny")).double()  # rounding far below any border
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("tiny"))
    engine = TransformersEngine(model, tokenizer)
    sampler = Sampler(temperature=1.2, top_p=top_p, max_completion_length=24)
    prompts = [prompt_ids(tokenizer, row) for row in Arithmetic().rows("test")[:6]]
    seeds = [seed_of(5, problem, 0) for problem in range(6)]
    together = engine.complete(prompts, seeds, sampler)
    alone = [engine.complete([p], [s], sampler)[0] for p, s in zip(prompts, seeds, strict=True)]
    reverse = engine.complete(prompts[::-1], seeds[::-1], sampler)[::-1]
    assert together == alone == reverse
    other = engine.complete(prompts, [seed + 1 for seed in seeds], sampler)
    assert together != other


def test_a_truncated_completion_is_told_from_one_that_ended() -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("tiny"))
    ids = [prompt_ids(tokenizer, {"prompt": "12+7*3=?"})]
    engine = TransformersEngine(model, tokenizer)
    (long,) = engine.complete(ids, [1], Sampler(temperature=0.0, max_completion_length=60))
    (short,) = engine.complete(ids, [1], Sampler(temperature=0.0, max_completion_length=3))
    assert not long.truncated
    assert long.tokens[-1] == tokenizer.eos_token_id
    assert short.truncated
    assert short.tokens == long.tokens[:3]
