"""The evolution strategy: its gradient estimate against an exact gradient, its optimisers, its search space."""

from __future__ import annotations

import math

import pytest
import torch

import mirrorpo
from mirrorpo.divergences.neural.generator import curvature
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.search.strategy import (
    Moments,
    ascend,
    directions,
    estimate,
    from_parameters,
    shaped,
    sigma_at,
    to_parameters,
)

SIZE, DRAWS, SIGMA = 6, 10_000, 0.3


def quadratic() -> tuple[torch.Tensor, torch.Tensor, float]:
    """f(x) = x A x / 2 + b x + 50: a symmetric A with a mixed spectrum, and an offset that a lone member would feel."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return a + a.T, torch.randn(SIZE, generator=generator, dtype=torch.float64), 50.0


def value(x: torch.Tensor) -> torch.Tensor:
    a, b, offset = quadratic()
    return ((x @ a) * x).sum(-1) / 2 + x @ b + offset


CENTRE = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
EXACT = quadratic()[0] @ CENTRE + quadratic()[1]  # grad f = A x + b; smoothing adds a constant to a quadratic


def draws(fail: torch.Tensor, pairs: int = 2) -> torch.Tensor:
    """DRAWS estimates from `pairs` pairs each; fail is (DRAWS, pairs, 2)."""
    found = []
    for draw in range(DRAWS):
        epsilon = directions(11, draw, pairs, SIZE)
        sides = [value(CENTRE + way * SIGMA * epsilon).tolist() for way in (1, -1)]
        for side in (0, 1):
            sides[side] = [None if f else v for f, v in zip(fail[draw, :, side].tolist(), sides[side], strict=True)]
        e = estimate(epsilon, sides[0], sides[1], SIGMA, "raw")
        if e.num_pairs:  # a search stops where no pair is left
            found.append(e.gradient)
    return torch.stack(found)


def assert_unbiased(found: torch.Tensor) -> None:
    error = (found.mean(0) - EXACT) / (found.std(0) / math.sqrt(len(found)))
    # The 99.9 % point of the largest of 6 normal draws is 3.8.
    assert error.abs().max() < 3.8, error


def test_the_estimate_is_unbiased_on_a_quadratic() -> None:
    assert_unbiased(draws(torch.zeros(DRAWS, 2, 2, dtype=torch.bool)))


def test_the_estimate_is_unbiased_when_members_fail() -> None:
    fail = torch.rand(DRAWS, 2, 2, generator=torch.Generator().manual_seed(3)) < 0.2
    assert 0.3 < fail.any(-1).float().mean() < 0.4  # 1 - 0.8^2 of the pairs are lost
    assert_unbiased(draws(fail))


def test_failures_that_depend_on_the_draw_leave_a_flat_function_flat() -> None:
    def kept(drop_twins: bool) -> torch.Tensor:
        """f = 50 everywhere; every member whose first coordinate is above 1 sigma fails."""
        total = []
        for draw in range(2_000):
            epsilon = directions(7, draw, 4, SIZE)
            sides = [[None if way * e[0] > 1 else 50.0 for e in epsilon.tolist()] for way in (1, -1)]
            if drop_twins:
                total.append(estimate(epsilon, *sides, SIGMA, "raw").gradient)
                continue
            ways = [(way, sides[i]) for i, way in enumerate((1, -1))]  # a naive one: the survivor counts alone
            terms = [way * f * e for way, side in ways for f, e in zip(side, epsilon, strict=True) if f is not None]
            total.append(torch.stack(terms).sum(0) / (8 * SIGMA))
        return torch.stack(total).mean(0)

    assert torch.equal(kept(drop_twins=True), torch.zeros(SIZE, dtype=torch.float64))
    # E[e; e < 1] = -phi(1) = -0.24197, times 50 / 0.3: a push of 40 on a function that is flat
    assert kept(drop_twins=False)[0].item() == pytest.approx(-0.24197 * 50 / 0.3, rel=0.03)


def test_a_linear_function_in_one_pair_gives_its_slope_along_the_direction() -> None:
    e = estimate(torch.tensor([[2.0, 0.0]]), [7.0], [3.0], sigma=0.5, shaping="raw")
    # (7 - 3) / (2 * 0.5) * (2, 0)
    assert e.gradient.tolist() == [8.0, 0.0]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_failed_member_takes_its_twin_with_it(bad: float | None, side: int) -> None:
    epsilon = directions(0, 0, 3, 4)
    plus, minus = [1.0, 2.0, 3.0], [0.5, 0.0, 1.0]
    (plus, minus)[side][1] = bad  # type: ignore[call-overload]
    got = estimate(epsilon, plus, minus, 0.1, "raw")
    want = estimate(epsilon[[0, 2]], [1.0, 3.0], [0.5, 1.0], 0.1, "raw")
    assert (got.dropped, got.num_pairs) == ((1,), 2)
    assert torch.equal(got.gradient, want.gradient)


def test_no_pair_left_is_a_zero_gradient_of_no_pairs() -> None:
    e = estimate(directions(0, 0, 2, 4), [None, 1.0], [1.0, None], 0.1, "centred_ranks")
    assert (e.num_pairs, e.dropped, e.gradient.tolist()) == (0, (0, 1), [0.0] * 4)


def test_centred_ranks_depend_on_the_order_alone_and_share_ties() -> None:
    values = torch.tensor([3.0, -1.0, 10.0, 3.0, 0.0])
    got = shaped(values, "centred_ranks")
    # ranks 0..4: -1 has 0, 0 has 1, both 3s share (2 + 3) / 2, 10 has 4; over 4, minus 1/2
    assert got.tolist() == [0.125, -0.5, 0.5, 0.125, -0.25]
    assert torch.equal(shaped(values.exp(), "centred_ranks"), got)
    assert shaped(torch.ones(4), "centred_ranks").tolist() == [0.0] * 4


def test_directions_are_standard_normal_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    epsilon = directions(0, 0, 2_000, 50)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(epsilon.mean().item()) < 4 / math.sqrt(epsilon.numel())
    assert abs(epsilon.var().item() - 1) < 4 * math.sqrt(2 / epsilon.numel())


def test_sgd_and_adam_take_the_steps_of_their_papers() -> None:
    gradients = [torch.tensor([1.0, -4.0]).double(), torch.tensor([3.0, 0.5]).double()]
    x, moments = torch.zeros(2).double(), Moments.zero(2)
    y, other = x, moments
    m, v = [0.0, 0.0], [0.0, 0.0]
    want = [0.0, 0.0]
    for t, g in enumerate(gradients, 1):
        x, moments = ascend(x, g, 0.1, "adam", moments)
        y, other = ascend(y, g, 0.1, "sgd", other)
        for i in range(2):
            m[i] = 0.9 * m[i] + 0.1 * g[i].item()
            v[i] = 0.999 * v[i] + 0.001 * g[i].item() ** 2
            want[i] += 0.1 * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    assert x.tolist() == pytest.approx(want, rel=1e-12)
    assert y.tolist() == pytest.approx([0.4, -0.35], rel=1e-12)


def test_sigma_decays_to_its_smallest_value() -> None:
    assert [sigma_at(g, 0.01, 0.5, 0.003) for g in range(4)] == [0.01, 0.005, 0.003, 0.003]


@pytest.mark.parametrize("positivity", ["projection", "softplus"])
def test_the_search_space_leads_back_to_the_parameters(positivity: str) -> None:
    parameters = MirrorMap.random(3).parameters
    back = to_parameters(from_parameters(parameters, positivity), positivity)
    torch.testing.assert_close(back, parameters, rtol=1e-12, atol=1e-17)
    zero = to_parameters(from_parameters(torch.zeros(380), positivity), positivity)
    assert (zero >= 0).all()
    assert zero.max() <= 1.0001e-8


def test_softplus_is_its_definition() -> None:
    point = torch.tensor([-0.05, -0.01, 0.0, 0.004, 0.3, 30.0], dtype=torch.float64)
    want = [0.01 * math.log1p(math.exp(-abs(x) / 0.01)) + max(x, 0.0) for x in point.tolist()]
    assert to_parameters(point, "softplus").tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("positivity", ["projection", "softplus"])
@pytest.mark.parametrize("kind", ["random", "evolved"])
def test_maps_are_convex(kind: str, positivity: str) -> None:
    """1,000 of each kind; evolved: 20 generations along random directions from a random map, far outside its box."""
    x = torch.logspace(-12, 0, 61, dtype=torch.float64)
    for seed in range(500):  # twice: once per positivity
        parameters = MirrorMap.random(seed + (500 if positivity == "softplus" else 0)).parameters
        if kind == "evolved":
            point, moments = from_parameters(parameters, positivity), Moments.zero(380)
            for generation in range(20):
                epsilon = directions(seed, generation, 1)
                point, moments = ascend(point, epsilon[0] * 2, 0.01, ("sgd", "adam")[seed % 2], moments)
                point = to_parameters(point, positivity) if positivity == "projection" else point
            parameters = to_parameters(point, positivity)
            assert (parameters - MirrorMap.random(seed).parameters).abs().max() > 0.01
        map = MirrorMap(parameters)  # refuses what is no map
        bend = curvature(map.parameters, x)
        assert (bend > 0).all()
        rise = map.phi_inv(x).diff()
        assert (rise >= -1e-12 * map.phi_inv(x)[1:].abs()).all()
        if seed % 50 == 0:  # the divergence itself: never negative, 0 at equality
            d = mirrorpo.divergence("neural", parameters=map.parameters)
            logs = torch.linspace(-25, 0, 40, dtype=torch.float64)
            grid = d.sampled(logs.repeat(40), logs.repeat_interleave(40))
            assert (grid >= 0).all()
            assert d.sampled(logs, logs).abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shaped(torch.ones(2), "ranks"), "unknown fitness shaping 'ranks'; did you mean 'centred_ranks'"),
        (lambda: ascend(CENTRE, CENTRE, 1.0, "adamw", Moments.zero(SIZE)), "unknown optimiser 'adamw'; did you mean"),
        (lambda: to_parameters(CENTRE, "clip"), "unknown positivity 'clip'. Legal: projection, softplus"),
        (lambda: from_parameters(CENTRE, "clip"), "unknown positivity 'clip'"),
    ],
)
def test_unknown_names_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
