"""Each estimator's value AND gradient, summed over a whole vocabulary of 7 tokens in float64.

``naive`` holds the definitions; autograd of the naive sum over the enumerated vocabulary gives the expected gradients.
"""

import math

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES
from naive import BREGMAN, CASES, F_DIVERGENCES, Case, logits

V = 7
ON_AND_OFF_POLICY = pytest.mark.parametrize("on_policy", [True, False], ids=["on_policy", "off_policy"])
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
# a learned map has no formula to enumerate naively; its own test file holds its ladder
OWN_TEST_FILE = {"neural"}


def build(case: Case) -> mirrorpo.Divergence:
    return mirrorpo.divergence(case.name, **case.options)


def policies(on_policy: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of p (differentiable), log q and log b, each (3, V): three states."""
    theta = logits(3, V, seed=seed).requires_grad_()
    logq = logits(3, V, seed=seed + 1).log_softmax(-1)
    logb = theta.detach().log_softmax(-1) if on_policy else logits(3, V, seed=seed + 2).log_softmax(-1)
    return theta, logq, logb


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), theta)[0]


def assert_close(got: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    torch.testing.assert_close(got, expected, rtol=case.tolerance, atol=case.tolerance)


def test_every_name_of_the_table_is_enumerated_here() -> None:
    assert set(DIVERGENCES) - OWN_TEST_FILE == {case.name for case in CASES}


@ON_AND_OFF_POLICY
@EVERY_CASE
def test_sampled_expects_the_form_under_the_rollout_policy(case: Case, on_policy: bool) -> None:
    theta, logq, logb = policies(on_policy)
    logp = theta.log_softmax(-1)
    got = (logb.exp() * build(case).sampled(logp, logq)).sum(-1)
    expected = (logb.exp() * case.sampled(theta.softmax(-1), logq.exp())).sum(-1)
    assert_close(got, expected, case)
    assert_close(gradient(got, theta), gradient(expected, theta), case)


@ON_AND_OFF_POLICY
@EVERY_CASE
def test_weighted_is_unbiased_in_value_and_gradient(case: Case, on_policy: bool) -> None:
    theta, logq, logb = policies(on_policy)
    got = (logb.exp() * build(case).weighted(theta.log_softmax(-1), logq, logb)).sum(-1)
    expected = case.divergence(theta.softmax(-1), logq.exp())
    assert_close(got, expected, case)
    assert_close(gradient(got, theta), gradient(expected, theta), case)


@EVERY_CASE
def test_score_weights_give_the_gradient_of_the_divergence(case: Case) -> None:
    theta, logq, _ = policies(on_policy=True)
    logp = theta.log_softmax(-1)
    g = build(case).score(logp, logq)
    assert not g.requires_grad
    got = gradient((logp.detach().exp() * g * logp).sum(-1), theta)
    assert_close(got, gradient(case.divergence(theta.softmax(-1), logq.exp()), theta), case)


@EVERY_CASE
def test_score_weights_are_the_derivative_of_the_coordinate_term_up_to_a_baseline(case: Case) -> None:
    theta, logq, _ = policies(on_policy=True)
    g = build(case).score(theta.log_softmax(-1), logq)
    gap = g - case.score(theta.detach().softmax(-1), logq.exp())
    assert_close(gap, gap[..., :1].expand_as(gap), case)


@ON_AND_OFF_POLICY
@EVERY_CASE
def test_the_score_surrogate_has_the_value_of_sampled_and_the_true_gradient(case: Case, on_policy: bool) -> None:
    theta, logq, logb = policies(on_policy)
    logp = theta.log_softmax(-1)
    d = build(case)
    got = d.estimate("score", logp, logq, logb)
    assert_close(got.detach(), case.sampled(theta.detach().softmax(-1), logq.exp()), case)
    expected = gradient(case.divergence(theta.softmax(-1), logq.exp()), theta)
    assert_close(gradient(logb.exp() * got, theta), expected, case)


@EVERY_CASE
def test_weighted_and_score_have_the_same_gradient_token_by_token(case: Case) -> None:
    theta, logq, logb = policies(on_policy=False)
    logp = theta.detach().log_softmax(-1).requires_grad_()
    d = build(case)
    w_g = (logp.detach() - logb).exp() * d.score(logp, logq)
    for estimator in ("weighted", "score"):
        assert_close(gradient(d.estimate(estimator, logp, logq, logb), logp), w_g, case)


@EVERY_CASE
def test_exact_is_the_divergence_of_unnormalised_logits(case: Case) -> None:
    theta = logits(2, 3, V, seed=5).requires_grad_()
    theta_ref = logits(2, 3, V, seed=6)
    got = build(case).exact(theta + 3.0, theta_ref - 2.0)
    expected = case.divergence(theta.softmax(-1), theta_ref.softmax(-1))
    assert got.shape == (2, 3)
    assert_close(got, expected, case)
    upstream = logits(2, 3, seed=7)
    assert_close(gradient(upstream * got, theta), gradient(upstream * expected, theta), case)


def naive_top_k(case: Case, p: torch.Tensor, q: torch.Tensor, token: int, k: int) -> torch.Tensor:
    """One state: the k likeliest tokens of q and the sampled one; for f-divergences the rest as one more token."""
    chosen = sorted({token, *sorted(range(len(q)), key=lambda v: -q[v].item())[:k]})
    rest = [v for v in range(len(q)) if v not in chosen]
    coarse_p, coarse_q = p[chosen], q[chosen]
    if rest and case.name in (*F_DIVERGENCES, "k1"):
        coarse_p = torch.cat([coarse_p, p[rest].sum().view(1)])
        coarse_q = torch.cat([coarse_q, q[rest].sum().view(1)])
    return case.divergence(coarse_p, coarse_q)


@pytest.mark.parametrize("k", [1, 2, 4, V, 50])
@EVERY_CASE
def test_top_k_is_a_lower_bound_made_of_a_coarser_vocabulary(case: Case, k: int) -> None:
    theta, theta_ref = logits(6, V, seed=8).requires_grad_(), logits(6, V, seed=9)
    tokens = torch.tensor([0, 1, 2, 3, 4, 5])
    d = build(case)
    got = d.top_k(theta, theta_ref, tokens, k)
    expected = torch.stack(
        [
            naive_top_k(case, p, q, token, k)
            for p, q, token in zip(theta.softmax(-1), theta_ref.softmax(-1), tokens.tolist(), strict=True)
        ]
    )
    exact = d.exact(theta, theta_ref)
    assert_close(got, expected, case)
    got_gradient = gradient(got, theta)
    assert_close(got_gradient, gradient(expected, theta), case)
    assert (got <= exact + 1e-12).all()
    if k >= V:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got_gradient, gradient(exact, theta), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_CASE
def test_every_estimator_is_zero_at_equality_with_zero_gradient(case: Case, dtype: torch.dtype) -> None:
    d = build(case)
    logp = logits(2, V, seed=3).log_softmax(-1).to(dtype).requires_grad_()
    anchor = logp.detach()
    ends = {
        "sampled": d.sampled(logp, anchor),
        "weighted": d.weighted(logp, anchor, anchor),
        "score": d.surrogate(logp, anchor, anchor),
        "exact": d.exact(logp, anchor),
        "top_k": d.top_k(logp, anchor, torch.tensor([0, 1]), 3),
    }
    for name, value in ends.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert (value.abs() <= 1e-15).all(), name
        if case.name != "k1":  # log t has slope 1 everywhere: only its expectation vanishes
            assert (gradient(value, logp).abs() <= 1e-15).all(), name


@EVERY_CASE
def test_every_estimator_is_non_negative(case: Case) -> None:
    theta, theta_ref, theta_old = (logits(50, V, seed=seed, scale=3.0) for seed in (10, 11, 12))
    logp, logq, logb = (x.log_softmax(-1) for x in (theta, theta_ref, theta_old))
    d = build(case)
    assert (d.exact(theta, theta_ref) >= 0).all()
    assert (d.top_k(theta, theta_ref, torch.zeros(50, dtype=torch.long), 2) >= 0).all()
    if case.name != "k1":
        assert (d.sampled(logp, logq) >= 0).all()
        assert (d.weighted(logp, logq, logb) >= 0).all()


@EVERY_CASE
def test_gradcheck_away_from_kinks(case: Case) -> None:
    d = build(case)
    theta, theta_ref = logits(V, seed=13).requires_grad_(), logits(V, seed=14)
    logp = theta.detach().log_softmax(-1).requires_grad_()
    logq, logb = theta_ref.log_softmax(-1), logits(V, seed=15).log_softmax(-1)
    assert ((logp - logq).abs() > 1e-3).all()  # total variation has its kink at equality
    token = torch.tensor(1)
    assert torch.autograd.gradcheck(lambda x: d.sampled(x, logq), logp, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: d.weighted(x, logq, logb), logp, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: d.exact(x, theta_ref), theta, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: d.top_k(x, theta_ref, token, 2), theta, fast_mode=True)


@EVERY_CASE
def test_no_gradient_flows_to_the_anchors(case: Case) -> None:
    d = build(case)
    logp, logq, logb = (logits(4, seed=s).log_softmax(-1).requires_grad_() for s in (1, 2, 3))
    for estimator in ("sampled", "weighted", "score"):
        d.estimate(estimator, logp, logq, logb).sum().backward()
    d.exact(logp, logq).backward()
    d.top_k(logp, logq, torch.tensor(0), 2).backward()
    assert logp.grad is not None
    assert logq.grad is None
    assert logb.grad is None


def test_a_second_derivative_is_refused_not_silently_zero() -> None:
    logp = logits(4, seed=1).log_softmax(-1).requires_grad_()
    value = mirrorpo.divergence("js").sampled(logp, logp.detach() - 0.1)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value.sum(), logp, create_graph=True)


def test_the_vocabulary_sum_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, theta_ref = logits(11, V, seed=1).requires_grad_(), logits(11, V, seed=2)
    d = mirrorpo.divergence("js")
    tokens = torch.arange(11) % V
    whole = [d.exact(theta, theta_ref), d.top_k(theta, theta_ref, tokens, 3)]
    monkeypatch.setattr("mirrorpo.divergences.base.EXACT_CHUNK", 4 * V)  # 4, 4 and 3 rows
    parts = [d.exact(theta, theta_ref), d.top_k(theta, theta_ref, tokens, 3)]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient(one, theta), gradient(other, theta), rtol=1e-12, atol=1e-16)


# D(p, q) for p = (1/2, 1/2), q = (1/4, 3/4): the ratios are 2 and 2/3
CLOSED_FORMS = {
    "kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "prob_l2": 0.25**2 + 0.25**2,
    "itakura_saito": (2 - 1 - math.log(2)) + (2 / 3 - 1 - math.log(2 / 3)),
    "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "forward_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
    "jeffreys": 0.25 * math.log(2) - 0.25 * math.log(2 / 3),
    # the mixture is (3/8, 5/8)
    "js": 0.25 * (math.log(4 / 3) + math.log(4 / 5)) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
    "tv": 0.25,
    "chi2": 0.25**2 / 0.25 + 0.25**2 / 0.75,
    "hellinger": 1 - math.sqrt(1 / 8) - math.sqrt(3 / 8),
    "k1": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "k2": 0.25 * math.log(2) ** 2 + 0.25 * math.log(2 / 3) ** 2,
    "k3": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "log_l2": 0.5 * math.log(2) ** 2 + 0.5 * math.log(2 / 3) ** 2,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_exact_matches_the_closed_form_on_two_tokens(name: str) -> None:
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert mirrorpo.divergence(name).exact(p, q).item() == pytest.approx(CLOSED_FORMS[name], rel=1e-13)


def test_closed_forms_of_the_two_dials_on_two_tokens() -> None:
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    # beta = 3: (x^3 + 2 z^3 - 3 x z^2) / 6
    cubic = sum((0.125 + 2 * z**3 - 1.5 * z**2) / 6 for z in (0.25, 0.75))
    assert mirrorpo.divergence("beta", beta=3).exact(p, q).item() == pytest.approx(cubic, rel=1e-13)
    # alpha = 3: (sum q t^3 - 1) / 6
    third = (0.25 * 8 + 0.75 * 8 / 27 - 1) / 6
    assert mirrorpo.divergence("alpha", alpha=3).exact(p, q).item() == pytest.approx(third, rel=1e-13)


def test_bregman_and_f_divergences_declare_what_top_k_and_trust_regions_use() -> None:
    for case in CASES:
        d = build(case)
        assert d.depends_on_token == (case.name in BREGMAN)
        assert d.bucket_rest == (case.name not in (*BREGMAN, "k2", "log_l2"))
