"""Bounds of every region against closed forms and against 60-digit evaluations of the constraint itself."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy.special import lambertw

import mirrorpo
from mirrorpo.divergences import DIVERGENCES
from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS
from naive import ALPHAS, BETAS, BREGMAN, F_DIVERGENCES, Case, logits

# none is exactly the limit that some constraint has at w = 0, where "reached" would be a matter of the last digit
RADII = (1e-8, 1e-5, 1e-3, 0.03, 0.1, 0.27, 0.6, 1.9, 30.0, 1e3)
PROBABILITIES = (1e-12, 1e-6, 1e-2, 0.3, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 1e-12)
RELATIVE = 1e-10
ANY_TOKEN = torch.zeros(1, dtype=torch.float64)


def bounds(name: str, logp_old: torch.Tensor = ANY_TOKEN, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    return mirrorpo.trust_region(name, **options).ratio_bounds(logp_old)


def pair(name: str, **options: float) -> tuple[float, float]:
    low, high = bounds(name, **options)
    return low.item(), high.item()


@pytest.mark.parametrize(
    ("radius", "low", "high"),
    [(0.01, 0.86517, 1.14817), (0.03, 0.77463, 1.26534), (0.05, 0.71619, 1.35040), (0.1, 0.61682, 1.51622)],
)
def test_kl3_has_the_bounds_that_its_paper_prints(radius: float, low: float, high: float) -> None:
    assert pair("kl3", radius=radius) == pytest.approx((low, high), abs=5.1e-6)


@pytest.mark.parametrize("radius", [1e-6, 0.03, 0.5, 5.0, 100.0])
def test_kl3_has_the_two_branches_of_lambert_w(radius: float) -> None:
    with mpmath.workdps(50):
        argument = -mpmath.exp(-1 - mpmath.mpf(radius))
        expected = [float(-mpmath.lambertw(argument, branch).real) for branch in (0, -1)]
    assert pair("kl3", radius=radius) == pytest.approx(expected, rel=RELATIVE)
    if 0.01 < radius < 10:  # scipy's own accuracy near the branch point is lower
        in_double = [-lambertw(-math.exp(-1 - radius), branch).real for branch in (0, -1)]
        assert pair("kl3", radius=radius) == pytest.approx(in_double, rel=1e-9)


CLOSED_FORMS: dict[str, Callable[[float], tuple[float, float]]] = {
    "kl2": lambda r: (math.exp(-math.sqrt(2 * r)), math.exp(math.sqrt(2 * r))),  # (log w)^2 / 2 = r
    "log_l2": lambda r: (math.exp(-math.sqrt(r)), math.exp(math.sqrt(r))),
    "chi2": lambda r: (1 - math.sqrt(r), 1 + math.sqrt(r)),  # (w - 1)^2 = r
    "tv": lambda r: (1 - 2 * r, 1 + 2 * r),  # |w - 1| / 2 = r
    # 1 - sqrt w + (w - 1)/2 = (1 - sqrt w)^2 / 2 = r
    "hellinger": lambda r: (
        (1 - math.sqrt(2 * r)) ** 2 if 2 * r < 1 else 0.0,
        (1 + math.sqrt(2 * r)) ** 2,
    ),
}


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_bounds(name: str, radius: float) -> None:
    low, high = CLOSED_FORMS[name](radius)
    got = pair(name, radius=radius)
    assert got[1] == pytest.approx(high, rel=RELATIVE)
    assert got[0] == pytest.approx(max(low, 0.0), rel=RELATIVE, abs=1e-15)


@pytest.mark.parametrize("epsilon", [1e-3, 0.16, 0.2, 3.0])
def test_dcpo_meets_its_radius_at_both_bounds_of_every_token(epsilon: float) -> None:
    b = torch.tensor(PROBABILITIES, dtype=torch.float64)
    low, high = bounds("dcpo", b.log(), epsilon_low=epsilon, epsilon_high=epsilon)
    torch.testing.assert_close(b * high * (high - 1), torch.full_like(b, epsilon), rtol=1e-9, atol=0)
    # b w (w - 1) has its minimum -b/4 at w = 1/2: beyond it no ratio leaves the region, and 1/2 is the bound
    reached = b / 4 > epsilon
    torch.testing.assert_close((b * low * (low - 1))[reached], torch.full_like(b, -epsilon)[reached], rtol=1e-9, atol=0)
    assert (low[~reached] == 0.5).all()


def test_log_ratio_bounds_the_side_that_it_is_given() -> None:
    assert pair("log_ratio", epsilon_low=0.1) == pytest.approx((math.exp(-0.1), math.inf))
    assert pair("log_ratio", epsilon_high=0.1) == pytest.approx((0.0, math.exp(0.1)))
    assert pair("log_ratio", epsilon_low=0.4, epsilon_high=0.4) == pytest.approx(pair("kl2", radius=0.08))
    with pytest.raises(ValueError, match="needs epsilon_low or epsilon_high"):
        mirrorpo.trust_region("log_ratio")


def test_ratio_and_none_are_what_they_say() -> None:
    assert pair("ratio", epsilon_low=0.2, epsilon_high=0.28) == pytest.approx((0.8, 1.28))
    assert pair("ratio", epsilon_low=0.3) == pytest.approx((0.7, 1.3))
    low, high = pair("none")
    assert low <= 0
    assert high == math.inf


@pytest.mark.parametrize("radius", RADII)
def test_binary_tv_is_the_closed_form_for_every_token(radius: float) -> None:
    b = torch.tensor(PROBABILITIES, dtype=torch.float64)
    low, high = bounds("binary_tv", b.log(), radius=radius)
    torch.testing.assert_close(low, 1 - radius / b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(high, 1 + radius / b, rtol=1e-10, atol=0)


def test_a_ratio_region_of_eps_is_a_tv_region_of_half_eps() -> None:
    assert pair("tv", radius=0.1) == pytest.approx(pair("ratio", epsilon_low=0.2))


def assert_is_the_bound(
    c: Callable[[mpmath.mpf], mpmath.mpf], radius: float, bound: float, side: int, end: float
) -> None:
    """c crosses the radius within 1e-10 of the bound; no bound exactly if c(end) stays below the radius.

    ``side`` is -1 below w = 1 and +1 above; ``end`` is the last ratio of that side.
    """
    unbounded = bound == math.inf or bound <= 0.0
    assert unbounded == (c(end) < radius), (float(c(end)), bound)
    if unbounded:
        return
    nearer, further = (mpmath.mpf(bound) * (1 + step) for step in (-side * RELATIVE, side * RELATIVE))
    assert c(nearer) < radius or (nearer - 1) * side <= 0, (bound, float(c(nearer)))
    beyond = max(further, end) if side < 0 else min(further, end)
    assert c(beyond) >= radius, (bound, float(c(beyond)))


INTERVALS = (
    *(Case(name) for name in F_DIVERGENCES if name not in ("alpha", "k3")),
    *(Case("alpha", {"alpha": a}) for a in ALPHAS),
)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("case", INTERVALS, ids=str)
def test_an_f_divergence_meets_its_radius_at_both_bounds(case: Case, radius: float) -> None:
    low, high = pair(case.name, radius=radius, **case.options)
    with mpmath.workdps(60):
        for side, bound in ((-1, low), (1, high)):
            # ratios beyond e^(-/+700) are no float64 numbers
            assert_is_the_bound(lambda w: case.excess(w)[0], radius, bound, side, mpmath.exp(700 * side))


TOKEN_REGIONS = (
    *(Case(name) for name in BREGMAN if name != "beta"),
    *(Case("beta", {"beta": b}) for b in BETAS),
)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("case", TOKEN_REGIONS, ids=str)
def test_a_bregman_divergence_meets_its_radius_at_both_bounds_of_every_token(case: Case, radius: float) -> None:
    logb = torch.tensor(PROBABILITIES, dtype=torch.float64).log()
    low, high = bounds(case.name, logb, radius=radius, **case.options)
    with mpmath.workdps(60):
        for i, log_b in enumerate(logb.tolist()):
            b = mpmath.exp(mpmath.mpf(log_b))

            def d(w: mpmath.mpf, b: mpmath.mpf = b) -> mpmath.mpf:
                return case.coordinate(w * b, b)

            for side, bound, end in ((-1, low[i].item(), mpmath.exp(-700)), (1, high[i].item(), 1 / b)):
                assert_is_the_bound(d, radius, bound, side, end)


@pytest.mark.parametrize("radius", RADII)
def test_binary_kl_meets_its_radius_at_both_bounds_of_every_token(radius: float) -> None:
    logb = torch.tensor(PROBABILITIES, dtype=torch.float64).log()
    low, high = bounds("binary_kl", logb, radius=radius)
    with mpmath.workdps(60):
        for i, log_b in enumerate(logb.tolist()):
            b = mpmath.exp(mpmath.mpf(log_b))

            def kl(w: mpmath.mpf, b: mpmath.mpf = b) -> mpmath.mpf:
                p = w * b
                rest = (1 - b) * mpmath.log((1 - b) / (1 - p)) if p < 1 else mpmath.inf
                return b * mpmath.log(b / p) + rest

            for side, bound, end in ((-1, low[i].item(), mpmath.exp(-700)), (1, high[i].item(), 1 / b)):
                assert_is_the_bound(kl, radius, bound, side, end)


def test_binary_kl_at_certainty_bounds_the_low_side_only() -> None:
    # b = 1: KL(Bernoulli(1) || Bernoulli(p)) = -log p, and no ratio above 1 exists
    low, high = bounds("binary_kl", torch.zeros(1, dtype=torch.float64), radius=0.05)
    assert low.item() == pytest.approx(math.exp(-0.05), rel=1e-10)
    assert high.item() >= 1.0


@pytest.mark.parametrize("name", ["kl", "prob_l2", "binary_tv", "binary_kl"])
def test_bounds_that_depend_on_the_token_differ_between_tokens(name: str) -> None:
    low, high = bounds(name, torch.tensor([[0.1, 0.5]], dtype=torch.float64).log(), radius=1e-3)
    assert low.shape == high.shape == (1, 2)
    assert low[0, 0] < low[0, 1] < 1 < high[0, 1] < high[0, 0]


def test_itakura_saito_alone_among_bregman_gives_every_token_the_bounds_of_kl3() -> None:
    logb = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64).log()
    low, high = bounds("itakura_saito", logb, radius=0.03)
    expected = pair("kl3", radius=0.03)
    torch.testing.assert_close(low, torch.full_like(low, expected[0]), rtol=1e-10, atol=0)
    torch.testing.assert_close(high, torch.full_like(high, expected[1]), rtol=1e-10, atol=0)


def test_every_divergence_of_the_table_but_k1_is_a_region_under_some_name() -> None:
    assert set(DIVERGENCES) - set(DIVERGENCE_REGIONS) == {"k1", "k2", "k3"}
    assert pair("forward_kl", radius=0.02) == pair("kl3", radius=0.02)


@pytest.mark.parametrize(
    "spec", ["k2", "k3", mirrorpo.divergence("k2"), mirrorpo.divergence("k3")], ids=["k2", "k3", "built k2", "built k3"]
)
def test_an_estimators_name_is_no_region_and_the_regions_that_it_may_mean_are_named(spec: object) -> None:
    with pytest.raises(ValueError, match=r"does not exist.*kl2.*kl3.*reverse_kl.*forward_kl"):
        mirrorpo.trust_region(spec, radius=0.02)  # pyright: ignore[reportArgumentType]


OPTIONS_OF = {
    "beta": {"beta": 0.7},
    "alpha": {"alpha": 0.3},
    "ratio": {"epsilon_low": 0.2},
    "log_ratio": {"epsilon_low": 0.2, "epsilon_high": 0.1},
    "dcpo": {},
    "none": {},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted({*REGIONS, *DIVERGENCE_REGIONS} - {"exact", "top_k", "neural"}))
def test_bounds_enclose_one_and_broadcast_in_the_dtype_of_the_tokens(name: str, dtype: torch.dtype) -> None:
    options = dict(OPTIONS_OF.get(name, {}))
    if name not in ("ratio", "none", "log_ratio", "dcpo"):
        options["radius"] = 0.03
    logp_old = torch.tensor([[0.9, 0.5, 1e-3], [0.2, 0.1, 0.4]], dtype=torch.float64).log().to(dtype)
    low, high = bounds(name, logp_old, **options)
    assert low.dtype == high.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not low.requires_grad
    low, high, _ = torch.broadcast_tensors(low, high, logp_old)
    assert ((low < 1) & (high > 1)).all()


@pytest.mark.parametrize("name", ["kl", "binary_kl", "beta", "prob_l2", "binary_tv"])
def test_bounds_are_no_nan_at_the_extremes_of_a_probability(name: str) -> None:
    logp_old = torch.tensor([0.0, -1e-9, -80.0, -700.0, -1e4, -math.inf])
    low, high = bounds(name, logp_old, radius=0.05, **({"beta": 0.5} if name == "beta" else {}))
    assert not (low.isnan() | high.isnan()).any()
    assert ((low <= 1) & (high >= 1)).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "tv", "prob_l2"])
def test_a_region_over_the_vocabulary_is_a_mask_on_the_divergence(divergence: str) -> None:
    theta, theta_old = logits(4, 6, 7, seed=1), logits(4, 6, 7, seed=2)
    tokens = torch.zeros(4, 6, dtype=torch.long)
    value = Case(divergence).divergence(theta.softmax(-1), theta_old.softmax(-1))
    radius = value.median().item() * 1.0001
    exact = mirrorpo.trust_region("exact", radius=radius, divergence=divergence)
    assert torch.equal(exact.outside(theta, theta_old, tokens), value > radius)
    top_k = mirrorpo.trust_region("top_k", radius=radius, divergence=divergence, k=2)
    assert (exact.outside(theta, theta_old, tokens) | ~top_k.outside(theta, theta_old, tokens)).all()
    wide = mirrorpo.trust_region("top_k", radius=radius, divergence=divergence, k=7)
    assert torch.equal(wide.outside(theta, theta_old, tokens), value > radius)
    with pytest.raises(ValueError, match=r"'exact'.*mask.*no ratio bounds"):
        exact.ratio_bounds(ANY_TOKEN)


def test_your_own_generator_is_a_region_too() -> None:
    low, high = mirrorpo.trust_region(lambda t: (t - 1) ** 2, family="f", radius=0.04).ratio_bounds(ANY_TOKEN)
    assert (low.item(), high.item()) == pytest.approx((0.8, 1.2), rel=1e-9)
    b = torch.tensor([0.5, 0.25], dtype=torch.float64)
    low, high = mirrorpo.trust_region(lambda x: x**2, radius=0.01).ratio_bounds(b.log())
    torch.testing.assert_close(low, 1 - 0.1 / b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(high, 1 + 0.1 / b, rtol=1e-9, atol=1e-12)
