"""Each surrogate against its paper's (or TRL's) formula, and the equivalence theorem: clipping is a hard mask.

A new entry of the table needs a line in ``LADDER``: its formula, written naively. Everything else follows from it.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mirrorpo
from mirrorpo.losses.regions import DIVERGENCE_REGIONS
from mirrorpo.losses.surrogates import SURROGATES, Option, Surrogate, Tokens, surrogate_from
from naive import logits

INTERVALS = {
    "ratio": {"epsilon_low": 0.2, "epsilon_high": 0.28},
    "kl3": {"radius": 0.03},
    "kl2": {"radius": 0.02},
    "binary_tv": {"radius": 0.1},
    "binary_kl": {"radius": 0.02},
    "none": {},
    **{name: {"radius": 0.02} for name in DIVERGENCE_REGIONS if name not in ("beta", "alpha", "neural")},
    "beta": {"radius": 0.02, "beta": 0.5},
    "alpha": {"radius": 0.02, "alpha": 1.5},
}


def batch(seed: int = 0, scale: float = 0.4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp (a leaf), logp_old and advantages of both signs, (4, 9), float64."""
    logp_old = -logits(4, 9, seed=seed).abs() - 0.1
    logp = (logp_old + scale * logits(4, 9, seed=seed + 1)).clamp(max=-1e-3).requires_grad_()
    return logp, logp_old, logits(4, 9, seed=seed + 2)


def tokens(
    logp: torch.Tensor,
    logp_old: torch.Tensor,
    advantage: torch.Tensor,
    bounds: tuple[torch.Tensor | float, torch.Tensor | float],
    outside: torch.Tensor | None = None,
) -> Tokens:
    low, high = (torch.as_tensor(b, dtype=logp.dtype) for b in bounds)
    return Tokens(
        log_ratio=logp - logp_old,
        logp=logp,
        advantage=advantage,
        mask=torch.ones_like(logp, dtype=torch.bool),
        low=low,
        high=high,
        outside=outside,
    )


def per_token(name: str, state: Tokens, **options: float) -> torch.Tensor:
    return SURROGATES[name].fn(state, **options)


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


def assert_same(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(got, x), gradient(expected, x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.8, 1.28), (0.9997, 1.0004)])
def test_clip_is_ppos_minimum(low: float, high: float) -> None:
    logp, logp_old, a = batch()
    w = (logp - logp_old).exp()
    expected = -torch.min(w * a, torch.clamp(w, low, high) * a)
    assert_same(per_token("clip", tokens(logp, logp_old, a, (low, high))), expected, logp)


@pytest.mark.parametrize("high", [1.2, 5.0, math.inf])
def test_dual_clip_bounds_the_loss_for_negative_advantages_only(high: float) -> None:
    logp, logp_old, a = batch(scale=2.0)
    w = (logp - logp_old).exp()
    assert (w[a < 0] > 1.5).any()
    assert (w[a > 0] > 1.5).any()
    clipped = torch.min(w * a, torch.clamp(w, 0.8, high) * a)
    expected = -torch.where(a < 0, torch.max(clipped, 1.5 * a), clipped)  # arXiv 1912.09729, Eq. 5
    got = per_token("clip", tokens(logp, logp_old, a, (0.8, high)), dual_clip=1.5)
    assert_same(got, expected, logp)


def test_dual_clip_holds_for_a_region_over_the_vocabulary_too() -> None:
    logp, logp_old, a = batch(scale=2.0)
    w = (logp - logp_old).exp()
    inside = torch.zeros_like(a, dtype=torch.bool)
    got = per_token("clip", tokens(logp, logp_old, a, (1.0, 1.0), inside), dual_clip=1.5)
    assert_same(got, -torch.where(a < 0, torch.clamp(w, max=1.5), w) * a, logp)


@pytest.mark.parametrize("cap", [5.0, 1.2])
def test_truncated_without_a_region_is_cispo(cap: float) -> None:
    logp, logp_old, a = batch(scale=1.5)
    w = (logp - logp_old).exp()
    expected = -torch.clamp(w, max=cap).detach() * a * logp
    assert_same(per_token("truncated", tokens(logp, logp_old, a, (0.0, math.inf)), ratio_cap=cap), expected, logp)


def test_sigmoid_is_sapo() -> None:
    logp, logp_old, a = batch()
    w = (logp - logp_old).exp()
    tau = torch.tensor([1.05, 1.0], dtype=torch.float64)[(a > 0).long()]
    expected = -torch.sigmoid(tau * (w - 1)) * 4 / tau * a
    got = per_token("sigmoid", tokens(logp, logp_old, a, (0.0, math.inf)))
    assert_same(got, expected, logp)


def test_sigmoid_has_the_slope_of_the_importance_weight_at_ratio_one() -> None:
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    got = per_token("sigmoid", tokens(logp, logp.detach(), a, (0.0, math.inf)))
    torch.testing.assert_close(gradient(got, logp), -a, rtol=1e-12, atol=0)


def test_geometric_is_gmpo_with_the_sign_aware_clip_of_the_log_ratio() -> None:
    logp, logp_old, _ = batch(scale=0.8)
    a = torch.tensor([[1.0], [-0.5], [2.0], [-1.0]], dtype=torch.float64)
    state = tokens(logp, logp_old, a, (math.exp(-0.4), math.exp(0.4)))
    keep = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    state = Tokens(**{**vars(state), "mask": keep})
    rows = []
    for i in range(4):
        sign = 1.0 if a[i, 0] > 0 else -1.0
        u = logp[i] - logp_old[i]
        # min over (sign u, sign clip(u)) as min(w A, clip(w) A) does for ratios
        pessimistic = sign * torch.min(sign * u, sign * torch.clamp(u, -0.4, 0.4))
        rows.append(-torch.exp(pessimistic[keep[i]].mean()) * a[i])
    assert_same(per_token("geometric", state), torch.stack(rows), logp)


# The steps that every surrogate of the table must pass, from its formula for one sequence, written naively:
# (w, A, log p, low, high), all (T,), to (T,) or (1,)


def _geometric(w: torch.Tensor, a: torch.Tensor, logp: torch.Tensor, low: float, high: float) -> torch.Tensor:
    sign = torch.sign(a)
    pessimistic = sign * torch.minimum(sign * w.log(), sign * w.log().clamp(math.log(low), math.log(high)))
    return -pessimistic.mean().exp() * a


def _truncated(w: torch.Tensor, a: torch.Tensor, logp: torch.Tensor, low: float, high: float) -> torch.Tensor:
    stopped = ((w > high) & (a > 0)) | ((w < low) & (a < 0))
    return torch.where(stopped, 0.0, -w.detach() * a * logp)


def _sigmoid(w: torch.Tensor, a: torch.Tensor, logp: torch.Tensor, low: float, high: float) -> torch.Tensor:
    tau = torch.full_like(a, 1.05).masked_fill(a > 0, 1.0)
    return -torch.sigmoid(tau * (w - 1)) * 4 / tau * a


LADDER = {
    "clip": lambda w, a, logp, low, high: -torch.minimum(w * a, w.clamp(low, high) * a),
    "truncated": _truncated,
    "sigmoid": _sigmoid,
    "geometric": _geometric,
    # S = sum_t log w_t; tau 0.01
    "regression": lambda w, a, logp, low, high: (a - 0.01 * w.log().sum()) ** 2 / (2 * 0.01 * len(w)),
    "none": lambda w, a, logp, low, high: 0.0 * logp,
}


def test_every_surrogate_of_the_table_has_its_ladder() -> None:
    assert set(LADDER) == set(SURROGATES)


def sequences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (a leaf), old ones, an advantage for each sequence, and a ragged mask."""
    logp, logp_old, _ = batch(seed=5, scale=0.5)
    a = torch.tensor([[1.0], [-0.5], [2.0], [-1.0]], dtype=torch.float64)
    return logp, logp_old, a, torch.arange(9) < torch.tensor([[9], [4], [1], [7]])


@pytest.mark.parametrize("name", LADDER)
def test_the_loss_of_each_sequence_and_its_gradient_are_those_of_the_formula(name: str) -> None:
    logp, logp_old, a, keep = sequences()
    low, high = 0.8, 1.25
    state = tokens(logp, logp_old, a.expand_as(logp), (low, high))
    got = per_token(name, Tokens(**{**vars(state), "mask": keep})).expand_as(logp)
    for i in range(4):
        kept = keep[i]
        w = (logp[i] - logp_old[i]).exp()[kept]
        expected = LADDER[name](w, a[i].expand(len(w)), logp[i][kept], low, high)
        assert_same(got[i][kept], expected, logp)


@pytest.mark.parametrize("name", LADDER)
def test_tokens_are_coupled_exactly_where_the_table_says_so(name: str) -> None:
    """d loss_s / d logp_t for s != t, for all pairs of a sequence."""
    logp, logp_old, a, _ = sequences()
    got = per_token(name, tokens(logp, logp_old, a.expand_as(logp), (1e-9, 1e9))).expand_as(logp)
    coupled = False
    for t in range(9):
        slope = torch.autograd.grad(got[0, t], logp, retain_graph=True)[0]
        assert (slope[0, t] != 0) == SURROGATES[name].has_policy_term
        assert (slope[1:] == 0).all()
        others = torch.cat([slope[0, :t], slope[0, t + 1 :]])
        coupled |= bool((others != 0).any())
    assert coupled == SURROGATES[name].couples_tokens


@pytest.mark.parametrize("name", LADDER)
def test_the_region_matters_exactly_where_the_table_says_so(name: str) -> None:
    logp, logp_old, a, _ = sequences()
    narrow, wide = (
        per_token(name, tokens(logp, logp_old, a.expand_as(logp), bounds)) for bounds in ((0.99, 1.01), (1e-9, 1e9))
    )
    assert torch.equal(narrow, wide) != SURROGATES[name].uses_region


@pytest.mark.parametrize("name", LADDER)
def test_gradcheck_away_from_the_bounds(name: str) -> None:
    if name == "truncated":
        pytest.skip("its loss value is not the integral of its gradient, by definition")
    logp, logp_old, a, _ = sequences()

    def value(x: torch.Tensor) -> torch.Tensor:
        return per_token(name, tokens(x, logp_old, a.expand_as(x), (0.5, 2.0)))

    assert torch.autograd.gradcheck(value, logp, fast_mode=True)


def doubled(state: Tokens, *, factor: float = 2.0) -> torch.Tensor:
    return -factor * state.ratio() * state.advantage


OWN = Surrogate(name="doubled", fn=doubled, options={"factor": Option(default=2.0)}, couples_tokens=False)


def test_a_surrogate_of_your_own_is_a_function_a_path_or_an_entry() -> None:
    logp, logp_old, a, keep = sequences()
    given = {"logp": logp, "logp_old": logp_old, "advantages": a.squeeze(1), "mask": keep}
    w = (logp - logp_old).exp()
    for spec, options, factor in (
        (doubled, {}, 2.0),
        (f"{__name__}:doubled", {}, 2.0),
        (OWN, {}, 2.0),
        (f"{__name__}:OWN", {"factor": 3.0}, 3.0),
    ):
        objective = mirrorpo.objective("dapo", surrogate=spec, region="none", **options)
        assert_same(objective(**given).loss, (-factor * w * a)[keep].mean(), logp)
    assert not mirrorpo.objective("dapo", surrogate=doubled).token_separable  # not known, so assumed
    assert mirrorpo.objective("dapo", surrogate=OWN).token_separable
    assert surrogate_from(OWN) is OWN
    with pytest.raises(ValueError, match=r"unknown objective key 'facto'; did you mean 'factor'"):
        mirrorpo.objective("dapo", surrogate=OWN, facto=1.0)
    with pytest.raises(ValueError, match=r"factor must be a number in \(0, 1e\+06\]"):
        mirrorpo.objective("dapo", surrogate=OWN, factor=0)


@pytest.mark.parametrize(("wrong", "got"), [(lambda t: t.ratio().sum(), r"\(\)"), (lambda t: 1.0, "float")])
def test_a_surrogate_that_returns_no_loss_of_each_token_is_named(wrong: Any, got: str) -> None:
    logp, logp_old, a, keep = sequences()
    with pytest.raises(ValueError, match=rf"surrogate '<lambda>' must return a tensor \(B, T\) or \(B, 1\), got {got}"):
        mirrorpo.objective("dapo", surrogate=wrong)(logp=logp, logp_old=logp_old, advantages=a.squeeze(1), mask=keep)


def test_the_ratio_is_held_far_out_with_a_gradient_that_does_not_vanish() -> None:
    logp = torch.tensor([[0.0]], requires_grad=True)
    for name in SURROGATES:
        got = per_token(name, tokens(logp, torch.tensor([[-1e4]]), torch.tensor([[-1.0]]), (0.8, 1.2)))
        assert got.isfinite().all()
        assert gradient(got, logp).isfinite().all()
    unclipped = per_token("clip", tokens(logp, torch.tensor([[-1e4]]), torch.tensor([[-1.0]]), (0.0, math.inf)))
    assert gradient(unclipped, logp).item() == pytest.approx(math.exp(20), rel=1e-6)


def hard_mask(logp: torch.Tensor, logp_old: torch.Tensor, a: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """-w A grad log p wherever the constraint holds or the advantage pushes back towards it; 0 elsewhere."""
    u = (logp - logp_old).detach()
    pushes_outward = (u * a) > 0
    return torch.where(inside | ~pushes_outward, -u.exp() * a, 0.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 3.0))
@pytest.mark.parametrize("name", INTERVALS)
def test_the_clipped_gradient_is_that_of_a_hard_mask_on_the_constraint(name: str, seed: int, scale: float) -> None:
    logp, logp_old, a = batch(seed, scale)
    low, high = mirrorpo.trust_region(name, **INTERVALS[name]).ratio_bounds(logp_old)
    w = (logp - logp_old).detach().exp()
    inside = (w >= low) & (w <= high)
    away = ((w - low).abs() > 1e-9) & ((w - high).abs() > 1e-9)
    got = gradient(per_token("clip", tokens(logp, logp_old, a, (low, high))), logp)
    expected = hard_mask(logp, logp_old, a, inside)
    torch.testing.assert_close(got[away], expected[away], rtol=1e-11, atol=1e-13)


# the constraint itself, naively, so that the mask is on D(w) <= radius and not on bounds that the library solved
CONSTRAINTS = {
    "kl3": lambda w, b: w - 1 - w.log(),
    "kl2": lambda w, b: w.log() ** 2 / 2,
    "reverse_kl": lambda w, b: w * w.log() - w + 1,
    "chi2": lambda w, b: (w - 1) ** 2,
    "tv": lambda w, b: (w - 1).abs() / 2,
    "hellinger": lambda w, b: (1 - w.sqrt()) ** 2 / 2,
    "binary_tv": lambda w, b: (w * b - b).abs(),
    "binary_kl": lambda w, b: -b * w.log() + (1 - b) * ((1 - b) / (1 - w * b)).log(),
    "prob_l2": lambda w, b: (w * b - b) ** 2,
    "kl": lambda w, b: b * (w * w.log() - w + 1),
    "itakura_saito": lambda w, b: w - 1 - w.log(),
}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.05, 2.0))
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_clipping_equals_masking_on_the_constraint_itself(name: str, seed: int, scale: float) -> None:
    logp, logp_old, a = batch(seed, scale)
    radius = INTERVALS[name]["radius"]
    bounds = mirrorpo.trust_region(name, radius=radius).ratio_bounds(logp_old)
    value = CONSTRAINTS[name]((logp - logp_old).detach().exp(), logp_old.exp())
    away = (value - radius).abs() > 1e-9
    expected = hard_mask(logp, logp_old, a, value <= radius)
    for surrogate in ("clip", "truncated"):
        got = gradient(per_token(surrogate, tokens(logp, logp_old, a, bounds)), logp)
        torch.testing.assert_close(got[away], expected[away], rtol=1e-11, atol=1e-13)


def test_a_region_over_the_vocabulary_masks_where_the_advantage_pushes_away() -> None:
    logp, logp_old, a = batch()
    outside = logits(4, 9, seed=9) > 0
    expected = hard_mask(logp, logp_old, a, ~outside)
    for surrogate in ("clip", "truncated"):
        got = gradient(per_token(surrogate, tokens(logp, logp_old, a, (1.0, 1.0), outside)), logp)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("edge", [0.75, 1.25])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_exactly_at_the_edge_is_inside(edge: float, sign: float) -> None:
    # 0.75 and 1.25 and their logs: exp(log(x)) need not be x, so the edge is taken from the tensor itself
    log_ratio = torch.tensor([[math.log(edge)]], dtype=torch.float64, requires_grad=True)
    bounds = (log_ratio.detach().exp(), math.inf) if edge < 1 else (0.0, log_ratio.detach().exp())
    a = torch.full((1, 1), sign, dtype=torch.float64)
    state = tokens(log_ratio - 3.0, torch.tensor([[-3.0]], dtype=torch.float64), a, bounds)
    state = Tokens(**{**vars(state), "log_ratio": log_ratio})
    assert not any(side.any() for side in state.blocked())
    value = per_token("clip", state)
    assert value.item() == pytest.approx(-edge * sign, rel=1e-12)


def test_blocked_tokens_are_counted_on_the_side_where_they_left() -> None:
    w = torch.tensor([[0.5, 0.5, 1.0, 2.0, 2.0]], dtype=torch.float64)
    a = torch.tensor([[-1.0, 1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    low, high = tokens(w.log() - 3.0, torch.full_like(w, -3.0), a, (0.8, 1.2)).blocked()
    assert low.tolist() == [[True, False, False, False, False]]
    assert high.tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant", "sequence_sum"])
@pytest.mark.parametrize("anchor", ["old", "reference"])
def test_regression_at_its_anchor_has_the_gradient_of_the_policy_gradient(anchor: str, aggregation: str) -> None:
    logp, _, a, keep = sequences()
    given = {"logp": logp, "logp_old": logp.detach(), "logp_ref": logp.detach(), "advantages": a.squeeze(1)}
    losses = [
        mirrorpo.objective(preset, aggregation=aggregation, **part)(**given, mask=keep, max_completion_length=9).loss
        for preset, part in (("opmd", {"anchor": anchor, "tau": 0.3}), ("dr_grpo", {"region": "none"}))
    ]
    one, other = (gradient(value, logp) for value in losses)
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_regression_ends_at_the_optimum_of_the_reward_with_a_kl_to_its_anchor() -> None:
    """Completions of one token: the loss over all of them, drawn from q, is least at q exp(r / tau), normalised."""
    tau, rewards = 0.7, torch.tensor([0.0, 1.0, 0.3, -0.5], dtype=torch.float64)
    logq = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log()
    value = tau * (logq + rewards / tau).logsumexp(0)
    theta = logq.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)
    objective = mirrorpo.objective("a_star_po", tau=tau)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        logp = theta.log_softmax(0).unsqueeze(1)
        loss = objective(
            logp=logp, logp_ref=logq.unsqueeze(1), advantages=rewards - value, mask=torch.ones(4, 1, dtype=torch.bool)
        ).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = mirrorpo.optimum("kl", logq.exp(), rewards, tau)
    torch.testing.assert_close(theta.detach().softmax(0), expected, rtol=0, atol=1e-8)


def test_regression_leaves_dropped_tokens_out_and_refuses_what_it_cannot_carry() -> None:
    logp, logp_old, a, keep = sequences()
    sampler = logp_old.clone()
    sampler[0, 3] = -math.inf
    objective = mirrorpo.objective("opmd", behaviour="sampler", anchor="sampler", tau=0.5)
    got = objective(logp=logp, logp_sampler=sampler, advantages=a.squeeze(1), mask=keep).loss
    slope = gradient(got, logp)
    assert slope[0, 3] == 0
    total = (logp - logp_old)[0].sum() - (logp - logp_old)[0, 3]
    # eight of nine tokens carry the loss of the first sequence; S is that of the eight
    own = (a[0, 0] - 0.5 * total) ** 2 / (2 * 0.5 * 9) * 8 / 9 / 4
    torch.testing.assert_close(slope[0], gradient(own, logp)[0], rtol=1e-11, atol=1e-13)
    for part, message in (
        ({"future_kl": True}, "future_kl has no effect: surrogate 'regression'"),
        ({"divergence": "kl", "coefficient": 0.1, "placement": "advantage"}, "placement 'advantage' has no effect"),
        ({"region": "kl3", "radius": 0.1}, "has no effect: surrogate 'regression' does not look at it"),
        ({"anchor": "uniform"}, "unknown anchor 'uniform'"),
        ({"tau": 0}, "tau must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            mirrorpo.objective("opmd", **part)
    with pytest.raises(ValueError, match="anchor has no effect with surrogate 'clip'"):
        mirrorpo.objective("dapo", anchor="old")
