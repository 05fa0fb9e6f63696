"""Which divergence is a special case of which, and what each textbook estimator really is."""

import math
from collections.abc import Callable

import pytest
import torch

import mirrorpo
from mirrorpo import divergence
from naive import BREGMAN, CASES, Case, logits

V = 7


def pair(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """log p (differentiable leaf) and log q over V tokens."""
    logp = logits(V, seed=seed, scale=scale).log_softmax(-1).requires_grad_()
    return logp, logits(V, seed=seed + 1, scale=scale).log_softmax(-1)


SAME = [
    ("beta(0) is itakura_saito", Case("beta", {"beta": 0}), Case("itakura_saito"), 1.0),
    ("beta(1) is kl", Case("beta", {"beta": 1}), Case("kl"), 1.0),
    ("beta(2) is half of prob_l2", Case("beta", {"beta": 2}), Case("prob_l2"), 0.5),
    ("alpha(1) is reverse_kl", Case("alpha", {"alpha": 1}), Case("reverse_kl"), 1.0),
    ("alpha(0) is forward_kl", Case("alpha", {"alpha": 0}), Case("forward_kl"), 1.0),
    ("alpha(2) is half of chi2", Case("alpha", {"alpha": 2}), Case("chi2"), 0.5),
    ("alpha(1/2) is four times hellinger", Case("alpha", {"alpha": 0.5}), Case("hellinger"), 4.0),
    ("k3 is reverse_kl", Case("k3"), Case("reverse_kl"), 1.0),
    ("log_l2 is twice k2", Case("log_l2"), Case("k2"), 2.0),
    ("beta just above 0 is nearly itakura_saito", Case("beta", {"beta": 1e-9}), Case("itakura_saito"), 1.0),
    ("beta just above 1 is nearly kl", Case("beta", {"beta": 1 + 1e-9}), Case("kl"), 1.0),
    ("alpha just above 0 is nearly forward_kl", Case("alpha", {"alpha": 1e-9}), Case("forward_kl"), 1.0),
    ("alpha just above 1 is nearly reverse_kl", Case("alpha", {"alpha": 1 + 1e-9}), Case("reverse_kl"), 1.0),
]


@pytest.mark.parametrize(("general", "special", "factor"), [row[1:] for row in SAME], ids=[row[0] for row in SAME])
def test_a_dial_passes_through_its_special_case_in_every_estimator(general: Case, special: Case, factor: float) -> None:
    logp, logq = pair()
    logb = logits(V, seed=5).log_softmax(-1)
    one, other = (divergence(case.name, **case.options) for case in (general, special))
    rtol = 1e-11 if all(float(value).is_integer() or value == 0.5 for value in general.options.values()) else 1e-7
    for estimator in ("sampled", "weighted", "score"):
        got, expected = (d.estimate(estimator, logp, logq, logb) for d in (one, other))
        torch.testing.assert_close(got, factor * expected, rtol=rtol, atol=1e-14)
        slopes = [torch.autograd.grad(value.sum(), logp)[0] for value in (got, expected)]
        torch.testing.assert_close(slopes[0], factor * slopes[1], rtol=rtol, atol=1e-14)
    torch.testing.assert_close(one.exact(logp, logq), factor * other.exact(logp, logq), rtol=rtol, atol=1e-14)
    torch.testing.assert_close(one.score(logp, logq), factor * other.score(logp, logq), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_jeffreys_is_the_sum_of_both_kls_and_symmetric(seed: int) -> None:
    logp, logq = pair(seed)
    p, q = logp.detach().exp(), logq.exp()
    both = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
    assert divergence("jeffreys").exact(logp, logq).item() == pytest.approx(both.item(), rel=1e-12)
    assert divergence("jeffreys").exact(logq, logp).item() == pytest.approx(both.item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_js_is_the_mean_of_both_kls_to_the_mixture_and_at_most_log_2(seed: int) -> None:
    logp, logq = pair(seed, scale=4.0)
    p, q = logp.detach().exp(), logq.exp()
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    got = divergence("js").exact(logp, logq).item()
    assert got == pytest.approx(expected.item(), rel=1e-11)
    assert got <= math.log(2)


def test_js_tv_and_hellinger_reach_their_maxima_on_disjoint_supports() -> None:
    inf = math.inf
    p, q = torch.tensor([0.0, -inf], dtype=torch.float64), torch.tensor([-inf, 0.0], dtype=torch.float64)
    assert divergence("js").exact(p, q).item() == pytest.approx(math.log(2), rel=1e-12)
    assert divergence("tv").exact(p, q).item() == pytest.approx(1.0, rel=1e-12)
    assert divergence("hellinger").exact(p, q).item() == pytest.approx(1.0, rel=1e-12)


def k1(r: torch.Tensor) -> torch.Tensor:
    return -r.log()


def k2(r: torch.Tensor) -> torch.Tensor:
    return r.log() ** 2 / 2


def k3(r: torch.Tensor) -> torch.Tensor:
    return (r - 1) - r.log()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_schulmans_estimators_are_his_functions_of_r(estimator: Callable[[torch.Tensor], torch.Tensor]) -> None:
    logp, logq = pair()
    r = (logq - logp).exp()  # his r = (reference) / (sampling policy)
    got, expected = divergence(estimator.__name__).sampled(logp, logq), estimator(r)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    slopes = [torch.autograd.grad(value.sum(), logp)[0] for value in (got, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-11, atol=1e-13)


def test_kl3_of_the_unified_clipping_paper_is_itakura_saito_and_grpos_k3_its_inverse() -> None:
    logp, logb = pair()
    w = (logp - logb).exp().detach()
    kl3 = w - 1 - w.log()
    torch.testing.assert_close(divergence("itakura_saito").sampled(logp, logb).detach(), kl3, rtol=1e-12, atol=1e-15)
    # GRPO's penalty is the same function of 1/w: swap the arguments
    torch.testing.assert_close(divergence("reverse_kl").sampled(logb, logp.detach()), kl3, rtol=1e-12, atol=1e-15)


def test_the_sampled_forms_of_k3_have_the_value_of_one_kl_and_the_gradient_of_the_other() -> None:
    theta, ref = logits(V, seed=0).requires_grad_(), logits(V, seed=1).log_softmax(-1)
    logp = theta.log_softmax(-1)
    p = logp.detach().exp()  # tokens were sampled from p: the weights carry no gradient
    k3_mean = (p * divergence("reverse_kl").sampled(logp, ref)).sum()
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    assert abs(k3_mean.item() - reverse.item()) < 1e-12
    got, right, other = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (k3_mean, reverse, forward))
    assert (got - other).abs().max() < 1e-12
    assert (got - right).abs().max() > 1e-2
    weighted = (p * divergence("reverse_kl").weighted(logp, ref, logp.detach())).sum()
    assert (torch.autograd.grad(weighted, theta)[0] - right).abs().max() < 1e-12


def test_on_policy_k2_has_the_gradient_of_reverse_kl_and_k1_has_none() -> None:
    theta, ref = logits(V, seed=0).requires_grad_(), logits(V, seed=1).log_softmax(-1)
    logp = theta.log_softmax(-1)
    p = logp.detach().exp()
    reverse = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)[0]
    for name, factor in (("k1", 0.0), ("k2", 1.0), ("log_l2", 2.0)):
        got = torch.autograd.grad((p * divergence(name).sampled(logp, ref)).sum(), theta, retain_graph=True)[0]
        torch.testing.assert_close(got, factor * reverse, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in BREGMAN and c.name not in ("k2", "log_l2")], ids=str
)
def test_merging_tokens_never_increases_an_f_divergence(case: Case) -> None:
    d = divergence(case.name, **case.options)
    p, q = logits(20, V, seed=3, scale=2.0).softmax(-1), logits(20, V, seed=4, scale=2.0).softmax(-1)
    fine = d.exact(p.log(), q.log())
    merged = [torch.cat([x[:, :3], x[:, 3:5].sum(-1, keepdim=True), x[:, 5:]], -1).log() for x in (p, q)]
    assert (d.exact(*merged) <= fine + 1e-12).all()


def test_sampled_bregman_terms_are_those_of_the_named_formulas() -> None:
    x, z = torch.tensor([0.3, 0.02], dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)
    expected = {"kl": x * (x / z).log() - x + z, "prob_l2": (x - z) ** 2, "itakura_saito": x / z - 1 - (x / z).log()}
    for name, value in expected.items():
        torch.testing.assert_close(divergence(name).sampled(x.log(), z.log()), value, rtol=1e-12, atol=1e-15)
    b = 1.7
    beta = (x**b + (b - 1) * z**b - b * x * z ** (b - 1)) / (b * (b - 1))
    torch.testing.assert_close(divergence("beta", beta=b).sampled(x.log(), z.log()), beta, rtol=1e-11, atol=1e-15)


def test_a_divergence_passes_through_the_constructor_unchanged() -> None:
    d = mirrorpo.divergence("beta", beta=0.5)
    assert mirrorpo.divergence(d) is d
