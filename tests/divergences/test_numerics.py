"""Float32 against 60 digits, finiteness at the edges, low precision, and the empty batch."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mirrorpo
from naive import CASES, F_DIVERGENCES, Case, logits
from precision import QUANTITIES, errors, grid, worst

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
INF = math.inf
TOLERANCE = 1e-5
ESTIMATORS = ("sampled", "weighted", "score")


def build(case: Case) -> mirrorpo.Divergence:
    return mirrorpo.divergence(case.name, **case.options)


def value_and_gradient(value: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def float32_pairs() -> st.SearchStrategy[tuple[float, float]]:
    """(logp, logp_ref), both float32 numbers in [-80, 0], |logp - logp_ref| from 1e-6 to 20."""
    log_gap = st.floats(math.log(1e-6), math.log(20.0))
    return (
        st.tuples(st.floats(-80.0, 0.0), log_gap, st.sampled_from((-1.0, 1.0)))
        .map(lambda t: (t[0], t[0] + t[2] * math.exp(t[1])))
        .map(lambda t: tuple(torch.tensor(t, dtype=torch.float32).tolist()))
        .filter(lambda t: -80.0 <= t[1] <= 0.0 and 1e-6 <= abs(t[0] - t[1]) <= 20.0)
    )


@EVERY_CASE
@settings(max_examples=15, deadline=None, derandomize=True)
@given(pairs=st.lists(float32_pairs(), min_size=8, max_size=8))
def test_float32_is_right_to_five_digits_everywhere(case: Case, pairs: list[tuple[float, float]]) -> None:
    logp, logp_ref = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    for quantity, found in errors(case, logp, logp_ref).items():
        for error in found:
            assert error.relative <= TOLERANCE, (quantity, error)


@EVERY_CASE
def test_the_worst_error_on_the_grid_is_within_the_tolerance(case: Case) -> None:
    found = worst(case, *grid(per_decade=1))
    assert set(found) == set(QUANTITIES)
    assert max(error.relative for error in found.values()) <= TOLERANCE, found


@EVERY_CASE
@settings(max_examples=30, deadline=None, derandomize=True)
@given(logs=st.lists(st.tuples(*[st.floats(-200.0, 0.0, width=32)] * 3), min_size=16, max_size=16))
def test_sampled_and_weighted_are_never_negative(case: Case, logs: list[tuple[float, float, float]]) -> None:
    if case.name == "k1":
        return  # log t is negative for t < 1: that is what its control variate repairs
    logp, logp_ref, logp_old = torch.tensor(logs, dtype=torch.float32).unbind(-1)
    d = build(case)
    assert (d.sampled(logp, logp_ref) >= 0).all()
    assert (d.weighted(logp, logp_ref, logp_old) >= 0).all()


@EVERY_CASE
def test_weighted_is_right_to_five_digits_in_float32(case: Case) -> None:
    logp, logp_ref = grid(per_decade=1)
    logp_old = (logp_ref - 0.25).clamp(min=-79.0)
    x = logp.clone().requires_grad_()
    value, gradient = value_and_gradient(build(case).weighted(x, logp_ref, logp_old), x)
    with mpmath.workdps(60):
        for i, logs in enumerate(zip(logp.tolist(), logp_ref.tolist(), logp_old.tolist(), strict=True)):
            p, q, b = (mpmath.exp(mpmath.mpf(v)) for v in logs)
            for got, expected in ((value[i], case.coordinate(p, q) / b), (gradient[i], p * case.score(p, q) / b)):
                if 1.2e-38 < abs(expected) < 1e38:
                    assert abs(mpmath.mpf(got.item()) / expected - 1) <= TOLERANCE, logs


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
@EVERY_CASE
def test_exact_is_right_near_equality_in_float32(case: Case, gap: float) -> None:
    theta_ref = logits(5, seed=1).float()
    theta = theta_ref + gap * logits(5, seed=2).float()
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(v)) for v in x.tolist()] for x in (theta, theta_ref))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected = sum(case.coordinate(a, b) for a, b in zip(p, q, strict=True))
    got = build(case).exact(theta, theta_ref).item()
    assert abs(got / expected - 1) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_CASE
def test_value_and_gradient_stay_finite_for_every_triple_of_extremes(case: Case, dtype: torch.dtype) -> None:
    extremes = (0.0, -1e-9, -1.0, -80.0, -100.0, -1e4, -INF)
    triples = torch.tensor(list(itertools.product(extremes, repeat=3)), dtype=dtype)
    logp, logp_ref, logp_old = triples.unbind(-1)
    x = logp.clone().requires_grad_()
    d = build(case)
    for estimator in ESTIMATORS:
        for part in value_and_gradient(d.estimate(estimator, x, logp_ref, logp_old), x):
            bad = triples[~part.isfinite()]
            assert not len(bad), (estimator, bad[0])
    assert d.score(logp, logp_ref).isfinite().all()


@EVERY_CASE
def test_value_and_gradient_of_the_vocabulary_sums_stay_finite_with_masked_entries(case: Case) -> None:
    rows = ([0.0, 1, 2, -INF], [0.0, 1, 2, -1e4], [0.0, 1, 2, 3], [0.0, -INF, -INF, -INF], [60.0, 0, 0, -60])
    for row, row_ref in itertools.product(rows, repeat=2):
        theta = torch.tensor(row).requires_grad_()
        theta_ref = torch.tensor(row_ref)
        d = build(case)
        for value in (d.exact(theta, theta_ref), d.top_k(theta, theta_ref, torch.tensor(1), 2)):
            for part in value_and_gradient(value, theta):
                assert part.isfinite().all(), (row, row_ref)


@EVERY_CASE
def test_an_entry_masked_in_both_policies_changes_nothing(case: Case) -> None:
    short, short_ref = logits(4, seed=1).requires_grad_(), logits(4, seed=2)
    hole = torch.tensor([-INF], dtype=torch.float64)
    wide = torch.cat([short.detach()[:2], hole, short.detach()[2:]]).requires_grad_()
    wide_ref = torch.cat([short_ref[:2], hole, short_ref[2:]])
    d = build(case)
    expected, expected_gradient = value_and_gradient(d.exact(short, short_ref), short)
    got, gradient = value_and_gradient(d.exact(wide, wide_ref), wide)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[[0, 1, 3, 4]], expected_gradient, rtol=1e-11, atol=1e-14)
    assert gradient[2].abs() < 1e-300  # the probability that stands for 0 is e^-700


# lim d(x, z) for x -> 0 at z = e^-1, h and f extended by continuity
LIMITS_AT_P_0 = {
    "kl": math.exp(-1),  # x log(x/z) - x + z -> z
    "prob_l2": math.exp(-2),
    "reverse_kl": math.exp(-1),  # z F(0) with F = t log t - t + 1
    "js": math.exp(-1) * math.log(2) / 2,
    "tv": math.exp(-1) / 2,
    "chi2": math.exp(-1),
    "hellinger": math.exp(-1) / 2,
}


@pytest.mark.parametrize("logp", [-100.0, -600.0])
@pytest.mark.parametrize("name", LIMITS_AT_P_0)
def test_the_coordinate_term_has_its_limit_as_p_vanishes(name: str, logp: float) -> None:
    logx = torch.tensor([logp], dtype=torch.float64)
    value, slope = mirrorpo.divergence(name).term(logx, torch.tensor([-1.0], dtype=torch.float64))
    assert value.item() == pytest.approx(LIMITS_AT_P_0[name], rel=1e-12)
    assert abs(slope.item()) <= math.exp(logp / 2)  # x d'(x) -> 0, like x, x log x or sqrt x


@pytest.mark.parametrize("name", ["kl", "prob_l2"])
def test_sampled_has_its_limit_where_p_itself_underflows(name: str) -> None:
    logp, logp_ref = torch.tensor([-1e4], requires_grad=True), torch.tensor([-1.0])
    value, gradient = value_and_gradient(mirrorpo.divergence(name).sampled(logp, logp_ref), logp)
    assert value.item() == pytest.approx(LIMITS_AT_P_0[name], rel=1e-6)
    assert gradient.item() == 0


@pytest.mark.parametrize("logp", [-100.0, -300.0])
def test_score_weights_of_rare_tokens_are_not_attenuated(logp: float) -> None:
    # h' = log x for kl, 2x for prob_l2: no factor 1/p is left in g, however small p is
    x, z = torch.tensor([logp]), torch.tensor([-1.0])
    assert mirrorpo.divergence("kl").score(x, z).item() == pytest.approx(logp + 1.0, rel=1e-6)
    assert mirrorpo.divergence("prob_l2").score(x, z).item() == pytest.approx(-2 * math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("name", [c.name for c in CASES if not c.options])
def test_a_token_far_away_still_has_a_gradient(name: str) -> None:
    logp, logp_ref = torch.tensor([-150.0], requires_grad=True), torch.tensor([-1.0])
    d = mirrorpo.divergence(name)
    _, gradient = value_and_gradient(d.sampled(logp, logp_ref), logp)
    vanishing = {"kl", "prob_l2"}  # x h'(x) -> 0 in truth
    assert (gradient.abs() > 1e-30).item() != (name in vanishing)
    assert d.score(logp, logp_ref).abs().item() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY_CASE
def test_low_precision_input_is_upcast_first(case: Case, dtype: torch.dtype) -> None:
    logp, logp_ref, logp_old = (logits(9, seed=s).log_softmax(-1).to(dtype) for s in (1, 2, 3))
    d = build(case)
    for estimator in ESTIMATORS:
        low, high = logp.clone().requires_grad_(), logp.float().requires_grad_()
        value, gradient = value_and_gradient(d.estimate(estimator, low, logp_ref, logp_old), low)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        expected = value_and_gradient(d.estimate(estimator, high, logp_ref.float(), logp_old.float()), high)
        assert torch.equal(value, expected[0])
        assert torch.equal(gradient, expected[1].to(dtype))
    assert torch.equal(d.exact(logp, logp_ref), d.exact(logp.float(), logp_ref.float()))


@EVERY_CASE
def test_empty_tensors_give_empty_results_with_a_graph(case: Case) -> None:
    d = build(case)
    for shape in ((0,), (0, 5), (3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        for estimator in ESTIMATORS:
            value = d.estimate(estimator, x, x, x)
            assert value.shape == shape
            value.sum().backward()
        theta = torch.zeros(*shape, 4, requires_grad=True)
        for value in (d.exact(theta, theta), d.top_k(theta, theta, torch.zeros(shape, dtype=torch.long), 2)):
            assert value.shape == shape
            value.sum().backward()


@EVERY_CASE
def test_one_token_vocabularies_have_no_divergence(case: Case) -> None:
    theta = torch.tensor([[3.0]], requires_grad=True)
    value, gradient = value_and_gradient(build(case).exact(theta, torch.tensor([[-1.0]])), theta)
    assert value.item() == 0
    assert gradient.item() == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.name in F_DIVERGENCES], ids=str)
def test_the_coordinate_terms_of_f_sum_to_the_definition_in_float32(case: Case) -> None:
    theta, theta_ref = logits(8, 50, seed=1, scale=3.0), logits(8, 50, seed=2, scale=3.0)
    expected = case.divergence(theta.softmax(-1), theta_ref.softmax(-1)).float()
    got = build(case).exact(theta.float(), theta_ref.float())
    torch.testing.assert_close(got, expected, rtol=max(1e-5, case.tolerance), atol=1e-7)
