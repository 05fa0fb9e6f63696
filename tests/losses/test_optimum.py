"""The optimum of a penalised reward: stationary, never beaten, equal to closed forms, and where descent ends."""

import math

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES
from mirrorpo.divergences.slope import score_at_zero, score_without_anchor
from mirrorpo.losses.optimum import optimum
from naive import CASES, Case, logits

NOT_CONVEX = ("k2", "log_l2")
CONVEX = [case for case in CASES if case.name not in NOT_CONVEX]
EVERY_CONVEX = pytest.mark.parametrize("case", CONVEX, ids=str)
# at t = 1 any slope in [-1/2, 1/2] is one of total variation's, so its condition is an interval: its own test below
SMOOTH = [case for case in CONVEX if case.name != "tv"]
V = 6


def bandit(seed: int = 0, rows: int = 4, width: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchor probabilities and rewards in [0, 1], float64."""
    return logits(rows, width, seed=seed).softmax(-1), logits(rows, width, seed=seed + 100).sigmoid()


def build(case: Case) -> mirrorpo.Divergence:
    return mirrorpo.divergence(case.name, **case.options)


def penalised(d: mirrorpo.Divergence, p: torch.Tensor, q: torch.Tensor, r: torch.Tensor, c: float) -> torch.Tensor:
    return (p * r).sum(-1) - c * d.exact(p.log(), q.log())


def assert_stationary(p: torch.Tensor, effective: torch.Tensor, case: Case) -> None:
    """r - c g is one number on the support, and no larger outside it."""
    support = p > 0
    for row, weight, inside in zip(effective, p, support, strict=True):
        multiplier = (row * weight)[inside].sum()
        assert (row[inside] - multiplier).abs().amax() < max(1e-9, 100 * case.tolerance)
        assert (row[~inside] <= multiplier + 1e-9).all()


@pytest.mark.parametrize("coefficient", [0.05, 0.4, 5.0])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_the_derivative_is_equal_on_the_support_and_no_larger_outside(case: Case, coefficient: float) -> None:
    q, r = bandit()
    p = optimum(build(case), q, r, coefficient)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)
    score = case.score(p.clamp(min=1e-250), q)  # at 0 the limit of the naive formula
    assert_stationary(p, r - coefficient * score, case)


@EVERY_CONVEX
def test_no_perturbation_is_better(case: Case) -> None:
    d = build(case)
    q, r = bandit(seed=3)
    generator = torch.Generator().manual_seed(0)
    for coefficient in (0.02, 0.3, 3.0):
        p = optimum(d, q, r, coefficient)
        best = penalised(d, p, q, r, coefficient)
        for size in (1.0, 1e-1, 1e-3):
            for _ in range(10):
                other = torch.rand(p.shape, generator=generator, dtype=torch.float64) ** 4
                other = (1 - size) * p + size * other / other.sum(-1, keepdim=True)
                assert (penalised(d, other, q, r, coefficient) <= best + 1e-9 * (1 + best.abs())).all()


def test_kl_is_the_anchor_times_the_exponential_of_the_reward() -> None:
    q, r = bandit(seed=1)
    for coefficient in (1e-3, 0.1, 1.0, 1e3):
        expected = (q.log() + r / coefficient).softmax(-1)
        for name in ("kl", "reverse_kl", "k1", "k3"):
            torch.testing.assert_close(optimum(name, q, r, coefficient), expected, rtol=1e-10, atol=1e-12)


def projection(y: torch.Tensor) -> torch.Tensor:
    """The Euclidean projection of a vector on the simplex, by sorting (Held, Wolfe and Crowder 1974)."""
    falling = y.sort(descending=True).values
    thresholds = (falling.cumsum(0) - 1) / torch.arange(1, len(y) + 1)
    count = int((falling > thresholds).sum())
    return (y - thresholds[count - 1]).clamp(min=0)


def test_prob_l2_is_the_projection_on_the_simplex() -> None:
    q, r = bandit(seed=2, width=9)
    for coefficient in (0.05, 0.3, 2.0):
        got = optimum("prob_l2", q, r, coefficient)
        for row, some_q, some_r in zip(got, q, r, strict=True):
            expected = projection(some_q + some_r / (2 * coefficient))
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)
            assert ((row == 0) == (expected == 0)).all()


def test_the_neural_map_and_your_own_function_have_the_optimum_of_what_they_equal() -> None:
    q, r = bandit(seed=4)
    for name, like in (("kl", "kl"), ("prob_l2", "prob_l2")):
        torch.testing.assert_close(
            optimum(mirrorpo.divergence("neural", like=like), q, r, 0.2), optimum(name, q, r, 0.2), rtol=0, atol=1e-9
        )
    torch.testing.assert_close(optimum(lambda x: x * x, q, r, 0.2), optimum("prob_l2", q, r, 0.2), rtol=0, atol=1e-10)
    own = mirrorpo.divergence(lambda t: t * t.log(), family="f")
    torch.testing.assert_close(optimum(own, q, r, 0.2), optimum("kl", q, r, 0.2), rtol=0, atol=1e-10)


def test_a_random_neural_map_has_a_stationary_optimum() -> None:
    d = mirrorpo.divergence("neural", seed=3)
    q, r = bandit(seed=5)
    p = optimum(d, q, r, 2.0)
    assert (p > 0).all()
    effective = r - 2.0 * (d.map.phi_inv(p) - d.map.phi_inv(q))
    # the table of the map is right to 1e-6 of the derivative
    assert (effective - (p * effective).sum(-1, keepdim=True)).abs().amax() < 1e-5


@pytest.mark.parametrize("case", [case for case in SMOOTH if case.name != "itakura_saito"], ids=str)
def test_gradient_descent_on_the_exact_objective_ends_there(case: Case) -> None:
    d = build(case)
    q, r = bandit(seed=6, rows=2, width=4)
    coefficient = 1.0  # mild: every optimum of this table has full support
    theta = q.log().clone().requires_grad_()
    descent = torch.optim.LBFGS([theta], max_iter=400, tolerance_grad=1e-11, tolerance_change=0, history_size=20)
    descent.param_groups[0]["line_search_fn"] = "strong_wolfe"

    def closure() -> torch.Tensor:
        descent.zero_grad()
        loss = (coefficient * d.exact(theta, q.log()) - (theta.softmax(-1) * r).sum(-1)).sum()
        loss.backward()
        return loss

    descent.step(closure)
    torch.testing.assert_close(theta.detach().softmax(-1), optimum(d, q, r, coefficient), rtol=0, atol=2e-6)


def test_the_optimum_leaves_the_support_exactly_where_the_derivative_at_zero_is_finite() -> None:
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    r = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    leaves = {str(case): bool((optimum(build(case), q, r, 0.05) == 0).any()) for case in CONVEX}
    # finite h'(0): powers above 1; finite f'(0): chi2, tv and alpha above 1. Near 1 the power t^1e-9 falls too slowly
    # to reach 0, and so does the KL divergence at its limit.
    expected = {
        str(case): case.name in ("prob_l2", "chi2", "tv") or any(value >= 1.5 for value in case.options.values())
        for case in CONVEX
    }
    assert leaves == expected


def test_the_ends_of_the_score_are_those_of_the_formulas() -> None:
    log_z = -1.0
    z = math.exp(log_z)
    at_zero = {"prob_l2": -2 * z, "chi2": -2.0, "tv": -0.5}
    without = {"prob_l2": 2.0, "forward_kl": 1.0, "js": math.log(2) / 2, "tv": 0.5, "hellinger": 0.5}
    for name in set(DIVERGENCES) - {"beta", "alpha", "neural"}:
        d = mirrorpo.divergence(name)
        for got, expected in ((score_at_zero(d, log_z), at_zero), (score_without_anchor(d), without)):
            assert got is None if name not in expected else got == pytest.approx(expected[name], abs=1e-12), name
    # (t^(a - 1) - 1) / (a - 1) at 0 and infinity; (x^(b - 1) - z^(b - 1)) / (b - 1) at 0 and from 0
    assert score_at_zero(mirrorpo.divergence("alpha", alpha=1.02)) == pytest.approx(-50.0)
    assert score_without_anchor(mirrorpo.divergence("alpha", alpha=0.98)) == pytest.approx(50.0)
    assert score_without_anchor(mirrorpo.divergence("beta", beta=1.02)) == pytest.approx(50.0)


def test_a_token_without_anchor_stays_at_zero_where_the_divergence_is_infinite() -> None:
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    for name in ("kl", "reverse_kl", "itakura_saito", "jeffreys", "chi2"):
        p = optimum(name, q, r, 1e-6)
        assert p[2] == 0
        assert p.sum() == pytest.approx(1.0)


def test_a_token_without_anchor_gets_mass_where_its_reward_pays_for_a_finite_divergence() -> None:
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    # prob_l2: the projection of (0.5, 0.5, 1 / 2c), for c = 1 of three equal numbers
    torch.testing.assert_close(optimum("prob_l2", q, r, 1.0), torch.full((3,), 1 / 3, dtype=torch.float64))
    # forward_kl: a unit of mass there costs c f'(inf) = 0 beside -c sum q log p: maximise p_3 + c log((1 - p_3) / 2),
    # so 1 - p_3 = c where c < 1, and nothing where c >= 1
    torch.testing.assert_close(
        optimum("forward_kl", q, r, 0.25), torch.tensor([0.125, 0.125, 0.75], dtype=torch.float64)
    )
    torch.testing.assert_close(optimum("forward_kl", q, r, 1.5), q)
    # alpha = 0.98: f'(inf) - f'(1) = 50, so nothing moves below a reward of 50 c
    d = mirrorpo.divergence("alpha", alpha=0.98)
    assert optimum(d, q, r, 0.021)[2] == 0
    assert optimum(d, q, r, 0.019)[2] > 0


def test_total_variation_moves_all_that_is_worth_its_cost_and_nothing_else() -> None:
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    r = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    # moving mass m to the best arm costs c m and earns the difference of the rewards: 0.3 and 0.8
    torch.testing.assert_close(optimum("tv", q, r, 0.5), torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(optimum("tv", q, r, 0.9), q)
    torch.testing.assert_close(optimum("tv", q, r, 0.1), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


@EVERY_CONVEX
def test_equal_rewards_keep_the_anchor_and_a_constant_changes_nothing(case: Case) -> None:
    q, r = bandit(seed=7)
    d = build(case)
    torch.testing.assert_close(optimum(d, q, torch.full_like(r, 3.0), 0.1), q, rtol=0, atol=1e-9)
    torch.testing.assert_close(optimum(d, q, r + 2.0, 0.5), optimum(d, q, r, 0.5), rtol=0, atol=1e-7)


@EVERY_CONVEX
def test_extreme_rewards_and_coefficients_give_a_distribution(case: Case) -> None:
    q, r = bandit(seed=8)
    q[0] = torch.tensor([1 - 5e-12, 1e-12, 1e-12, 1e-12, 1e-12, 1e-12])
    best = torch.nn.functional.one_hot(r.argmax(-1), V).double()
    for scale, coefficient in ((1.0, 1e-12), (1e300, 1e-300), (1.0, 1e12), (-1e6, 1.0)):
        p = optimum(build(case), q, scale * r, coefficient)
        assert p.isfinite().all()
        assert (p >= 0).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
        if coefficient == 1e-12:
            torch.testing.assert_close(p[1:], best[1:], rtol=0, atol=1e-3)  # row 0 may cost more than it earns
        if coefficient == 1e12:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@EVERY_CONVEX
def test_one_token_has_all_of_it(case: Case) -> None:
    p = optimum(build(case), torch.ones(3, 1), torch.tensor([[5.0], [-5.0], [0.0]]), 0.1)
    assert (p == 1.0).all()
    assert p.dtype == torch.float32


def test_a_large_vocabulary_is_right_too() -> None:
    q, r = bandit(seed=9, rows=1, width=50_000)
    expected = (q.log() + r / 0.1).softmax(-1)
    torch.testing.assert_close(optimum("kl", q, r, 0.1), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(optimum("kl", q.float(), r.float(), 0.1), expected.float(), rtol=1e-4, atol=0)
    p = optimum("prob_l2", q, r, 0.1)
    torch.testing.assert_close(p[0], projection(q[0] + r[0] / 0.2), rtol=0, atol=1e-12)


def test_rows_do_not_see_each_other_and_rewards_broadcast() -> None:
    q, r = bandit(seed=10)
    together = optimum("js", q.view(2, 2, V), r[0], 0.2)
    assert together.shape == (2, 2, V)
    for row, some_q in zip(together.view(4, V), q, strict=True):
        torch.testing.assert_close(row, optimum("js", some_q, r[0], 0.2), rtol=0, atol=1e-12)


def test_low_precision_comes_back_as_float32_and_no_gradient_flows() -> None:
    q, r = bandit(seed=11)
    p = optimum("kl", q.bfloat16(), r.bfloat16().requires_grad_(), 0.2)
    assert p.dtype == torch.float32
    assert not p.requires_grad
    assert optimum("kl", q.float(), r, 0.2).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficient": 0.0}, r"coefficient must be a number in \(0, inf\], got 0.0"),
        ({"coefficient": float("nan")}, "coefficient must be a number"),
        ({"probs": torch.tensor([0.5, 0.6])}, "probs must sum to 1 over the last dimension, got a sum of 1.1"),
        ({"probs": torch.tensor([1.5, -0.5])}, r"probs must be in \[0, 1\], got -0.5"),
        ({"probs": torch.tensor([0.5, float("nan")])}, r"probs must be in \[0, 1\], got nan"),
        ({"probs": torch.tensor([1, 0])}, "probs must be a floating tensor, got dtype torch.int64"),
        ({"rewards": torch.tensor([0.0, float("inf")])}, "rewards must be finite, got inf"),
        ({"rewards": torch.zeros(3)}, r"shapes \(..., V\) that broadcast, V >= 1, got \(2,\) and \(3,\)"),
        ({"probs": torch.zeros(0), "rewards": torch.zeros(0)}, r"V >= 1, got \(0,\) and \(0,\)"),
        ({"divergence": "k2"}, "optimum needs a divergence that is convex in p, and 'k2' is not"),
        ({"divergence": "log_l2"}, "optimum needs a divergence that is convex in p, and 'log_l2' is not"),
        ({"divergence": "kll"}, "unknown divergence 'kll'; did you mean 'kl'?"),
    ],
)
def test_what_has_no_optimum_is_refused_in_one_line(change: dict, message: str) -> None:
    given = {
        "divergence": "kl",
        "probs": torch.tensor([0.5, 0.5]),
        "rewards": torch.tensor([0.0, 1.0]),
        "coefficient": 0.1,
    }
    with pytest.raises(ValueError, match=message) as caught:
        optimum(**(given | change))
    assert "\n" not in str(caught.value)
