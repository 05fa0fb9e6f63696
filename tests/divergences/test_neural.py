"""The neural mirror map through the ladder of every divergence: enumeration, reductions, edges, trust region."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mirrorpo
from mirror_naive import MAPS, naive_term, only, random_like
from naive import logits

INF, NAN = math.inf, math.nan
V = 7
ESTIMATORS = ("sampled", "weighted", "score")
EVERY_MAP = pytest.mark.parametrize("parameters", MAPS.values(), ids=MAPS)


def build(parameters: Any) -> mirrorpo.Divergence:
    return mirrorpo.divergence("neural", parameters=parameters)


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("on_policy", [True, False], ids=["on_policy", "off_policy"])
@EVERY_MAP
def test_every_estimator_by_enumeration(parameters: torch.Tensor, on_policy: bool) -> None:
    theta, logq = logits(3, V, seed=0).requires_grad_(), logits(3, V, seed=1).log_softmax(-1)
    logp = theta.log_softmax(-1)
    logb = logp.detach() if on_policy else logits(3, V, seed=2).log_softmax(-1)
    d, b = build(parameters), logb.exp()
    terms = naive_term(parameters, logp.exp(), logq.exp())
    whole = terms.sum(-1)
    sampled = (b * d.sampled(logp, logq)).sum(-1)
    assert_near(sampled, (b * terms).sum(-1))
    assert_near(gradient(sampled, theta), gradient((b * terms).sum(-1), theta))
    weighted = (b * d.weighted(logp, logq, logb)).sum(-1)
    assert_near(weighted, whole)
    assert_near(gradient(weighted, theta), gradient(whole, theta))
    assert_near(gradient(b * d.surrogate(logp, logq, logb), theta), gradient(whole, theta))
    g = d.score(logp, logq)
    assert_near(gradient((logp.detach().exp() * g * logp).sum(-1), theta), gradient(whole, theta))
    exact = d.exact(theta + 2.0, logq - 1.0)
    assert_near(exact, whole)
    assert_near(gradient(exact, theta), gradient(whole, theta))


@pytest.mark.parametrize("k", [1, 3, V])
def test_top_k_leaves_the_rest_out(k: int) -> None:
    theta, logq = logits(4, V, seed=3).requires_grad_(), logits(4, V, seed=4).log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 6])
    terms = naive_term(MAPS["random"], theta.softmax(-1), logq.exp())
    inside = torch.zeros_like(terms).scatter(-1, logq.topk(k).indices, 1.0).scatter(-1, tokens[:, None], 1.0)
    got = build(MAPS["random"]).top_k(theta, logq, tokens, k)
    assert_near(got, (inside * terms).sum(-1))
    assert_near(gradient(got, theta), gradient((inside * terms).sum(-1), theta))


@EVERY_MAP
def test_gradcheck(parameters: torch.Tensor) -> None:
    logq = logits(V, seed=1).log_softmax(-1)
    d = build(parameters)
    logp = logits(V, seed=0).log_softmax(-1).requires_grad_()
    # The step must stay short of a segment, and the slope relative: the cubic map's is 1e-3 of the others'.
    scale = d.sampled(logp.detach(), logq).max()
    assert torch.autograd.gradcheck(lambda x: d.sampled(x, logq) / scale, logp, eps=1e-5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("parameters", "name"), [(only(a=2.0), "prob_l2"), (only(c=1.0), "kl")])
def test_a_alone_is_prob_l2_and_c_alone_is_kl(parameters: torch.Tensor, name: str) -> None:
    one, other = build(parameters), mirrorpo.divergence(name)
    logp, logq, logb = (logits(50, seed=s, scale=3.0).log_softmax(-1) for s in (1, 2, 3))
    x = logp.clone().requires_grad_()
    for estimator in ESTIMATORS:
        got, expected = (d.estimate(estimator, x, logq, logb) for d in (one, other))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(gradient(got, x), gradient(expected, x), rtol=1e-8, atol=0)
    torch.testing.assert_close(one.exact(logp, logq), other.exact(logp, logq), rtol=1e-9, atol=0)
    tokens = torch.tensor(3)
    torch.testing.assert_close(one.top_k(logp, logq, tokens, 5), other.top_k(logp, logq, tokens, 5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_MAP
def test_extremes_stay_finite(parameters: torch.Tensor, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, 5e-4, -1e-9, -1.0, -80.0, -200.0, -1e4, -INF], dtype=dtype)
    logp, logq, logb = torch.cartesian_prod(extremes, extremes, extremes).unbind(-1)
    x = logp.clone().requires_grad_()
    d = build(parameters)
    for estimator in ESTIMATORS:
        value = d.estimate(estimator, x, logq, logb)
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert gradient(value, x).isfinite().all()
    assert d.score(logp, logq).isfinite().all()
    theta = torch.tensor([0.0, 1.0, -INF, -1e4], dtype=dtype, requires_grad=True)
    exact = d.exact(theta, torch.tensor([0.0, -INF, -INF, 60.0], dtype=dtype))
    assert exact.isfinite()
    assert gradient(exact, theta).isfinite().all()


def test_logits_that_are_nan_poison_their_own_position_only() -> None:
    theta = logits(3, V, seed=1)
    theta[1, 2] = NAN
    value = build(random_like(0)).exact(theta, logits(3, V, seed=2))
    assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_upcast_first(dtype: torch.dtype) -> None:
    logp, logq, logb = (logits(9, seed=s).log_softmax(-1).to(dtype) for s in (1, 2, 3))
    d = build(random_like(0))
    for estimator in ESTIMATORS:
        low, high = logp.clone().requires_grad_(), logp.float().requires_grad_()
        got, expected = d.estimate(estimator, low, logq, logb), d.estimate(estimator, high, logq.float(), logb.float())
        assert torch.equal(got, expected)
        assert torch.equal(gradient(got, low), gradient(expected, high).to(dtype))


def test_no_token_is_no_value() -> None:
    x = torch.zeros((0, 3), requires_grad=True)
    value = build(random_like(0)).sampled(x, x)
    assert value.shape == (0, 3)
    value.sum().backward()


@EVERY_MAP
def test_as_a_trust_region_the_bounds_are_where_the_radius_is_met(parameters: torch.Tensor) -> None:
    logb = torch.tensor([0.01, 0.2, 0.6], dtype=torch.float64).log()
    d = build(parameters)
    radius = d.term(logb[1:2] + 0.3, logb[1:2])[0].item()  # what w = e^0.3 costs at b = 0.2
    low, high = mirrorpo.trust_region("neural", radius=radius, parameters=parameters).ratio_bounds(logb)
    assert high[1].item() == pytest.approx(math.exp(0.3), rel=1e-9)
    for bound in (low, high):
        inside = bound.isfinite() & (bound > 1e-9)
        cost = d.term(logb[inside] + bound[inside].log(), logb[inside])[0]
        torch.testing.assert_close(cost, torch.full_like(cost, radius), rtol=1e-9, atol=0)
    assert (low < 1).all()
    assert (high > 1).all()


def test_a_map_too_steep_for_float32_is_held_and_not_infinite() -> None:
    parameters = torch.zeros(380, dtype=torch.float64)
    parameters[-1] = 1e60  # c log x: d = c times KL's coordinate term
    x = torch.tensor([-1.0], requires_grad=True)
    value = mirrorpo.divergence("neural", parameters=parameters).sampled(x, torch.tensor([-2.0]))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.item() > 1e37
