"""Loss, metrics and gradients from hidden states against float64 autograd on full logits."""

from typing import Any

import pytest
import torch

import mirrorpo
from kernels_batch import Batch, batch, converted, distance, gradients
from mirrorpo.kernels import objective_from_hidden

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale and temperature": {"scale": 0.5, "temperature": 0.7},
    "soft cap, scale, bias": {"bias": True, "softcap": 2.0, "scale": 1.5, "temperature": 0.7},
}
# Every surrogate, level and estimator; regions with an interval, per token and over the vocabulary.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"preset": "grpo"},
    "dual clip": {"preset": "dapo", "dual_clip": 3.0},
    "truncated": {"preset": "cispo"},
    "sigmoid": {"preset": "sapo"},
    "per-token region": {"preset": "dppo_kl"},
    "constant, two penalties": {"preset": "prob_l2_kl_grpo", "coefficient": [0.5, 0.04]},
    "weighted": {"preset": "grpo", "divergence": "js", "coefficient": 0.3, "estimator": "weighted"},
    "score": {"preset": "grpo", "divergence": "prob_l2", "coefficient": 0.3, "estimator": "score"},
    "exact": {"preset": "grpo", "coefficient": 0.3, "estimator": "exact"},
    "exact neural": {"preset": "nm_grpo", "coefficient": 30.0, "estimator": "exact"},
    "top_k": {"preset": "dapo", "divergence": "js", "coefficient": 0.3, "estimator": "top_k", "k": 3},
    "exact and sampled": {
        "preset": "prob_l2_kl_grpo",
        "coefficient": [0.5, 0.04],
        "estimator": ["exact", "sampled"],
    },
    "exact region": {"preset": "grpo", "region": {"name": "exact", "radius": 0.05}},
    "top_k region, exact penalty": {
        "preset": "dapo",
        "region": {"name": "top_k", "radius": 0.05, "k": 3},
        "divergence": "prob_l2",
        "coefficient": 0.3,
        "estimator": "exact",
    },
    "penalty in the reward": {"preset": "grpo", "placement": "reward"},
    "sequence level": {"preset": "gspo"},
    "sequence level, exact": {"preset": "prob_l2_gspo", "coefficient": 0.3, "estimator": "exact"},
    "geometric": {"preset": "gmpo"},
    "future KL": {"preset": "fipo"},
}


def made(spec: dict[str, Any]) -> mirrorpo.Objective:
    return mirrorpo.objective_from(spec)


def fused(objective: mirrorpo.Objective, b: Batch, **changes: Any) -> mirrorpo.Output:
    given = {"reference": b.reference, "rollout": b.rollout, "chunk": 4} | b.shared() | changes
    return objective_from_hidden(objective, b.hidden, b.head, b.tokens, **given)[0]


def assert_equal(got: mirrorpo.Output, expected: mirrorpo.Output, tolerance: float) -> None:
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance, abs=tolerance)
    assert got.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert got.metrics[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_metrics_and_gradients_are_those_of_full_logits(name: str, head: str) -> None:
    objective, b = made(OBJECTIVES[name]), batch(**HEADS[head])
    expected, got = b.plain(objective), fused(objective, b)
    assert_equal(got, expected, 1e-10)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_is_within_1e_5_of_the_float64_truth(name: str) -> None:
    objective, truth = made(OBJECTIVES[name]), batch(bias=True)
    b = converted(truth, torch.float32)
    expected, got = truth.plain(objective), fused(objective, b)
    assert_equal(got, expected, 1e-5)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, truth.leaves)) < 1e-5
