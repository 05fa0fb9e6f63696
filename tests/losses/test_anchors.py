"""Penalties and regions around every anchor, by enumeration and against loops: value AND gradient, in float64."""

import math
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import ESTIMATORS
from mirrorpo.losses.aggregation import AGGREGATIONS
from mirrorpo.losses.anchors import ANCHORS
from mirrorpo.losses.keys import BEHAVIOURS
from mirrorpo.losses.presets import PRESETS
from naive import Case, logits

V = 6
DIVERGENCES = ("kl", "prob_l2", "reverse_kl", "js", "chi2")
LOGPS = {"reference": "logp_ref", "old": "logp_old", "sampler": "logp_sampler", "teacher": "logp_teacher"}
LOGITS = {"reference": "logits_ref", "old": "logits_old", "teacher": "logits_teacher"}


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


def assert_same(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(gradient(got, x), gradient(expected, x), rtol=tolerance, atol=1e-12)


# Penalties: one state, every token of the vocabulary as a completion of its own


def state(seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the policy (a leaf), and the log-probabilities of every anchor; (V,) each."""
    theta = logits(V, seed=seed).requires_grad_()
    anchors = {name: logits(V, seed=seed + 1 + i).log_softmax(-1) for i, name in enumerate(LOGPS)}
    return theta, {**anchors, "uniform": torch.full((V,), -math.log(V), dtype=torch.float64)}


def enumerated(theta: torch.Tensor, anchors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every token once: (V, 1)."""
    given = {LOGPS[name]: logq.unsqueeze(1) for name, logq in anchors.items() if name in LOGPS}
    return {"logp": theta.log_softmax(-1).unsqueeze(1), "mask": torch.ones(V, 1), "vocabulary": V, **given}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("estimator", ["sampled", "weighted", "score"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_penalty_toward_every_anchor_expects_what_its_estimator_promises(
    anchor: str, divergence: str, estimator: str, behaviour: str
) -> None:
    theta, anchors = state()
    case, q, b = Case(divergence), anchors[anchor].exp(), anchors[behaviour].exp()
    penalty = {"divergence": divergence, "coefficient": 0.5, "anchor": anchor, "estimator": estimator}
    objective = mirrorpo.objective("dr_grpo", behaviour=behaviour, penalties=[penalty])
    found = objective.terms(**enumerated(theta, anchors), advantages=torch.zeros(V, dtype=torch.float64)).penalty
    assert found is not None
    got, p = (b * found.squeeze(1)).sum(), theta.softmax(-1)
    as_it_stands = 0.5 * (b * case.sampled(p, q)).sum()
    true = 0.5 * case.divergence(p, q)
    value, slope = {
        "sampled": (as_it_stands, as_it_stands),
        "weighted": (true, true),
        "score": (as_it_stands, true),
    }[estimator]
    torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(got, theta), gradient(slope, theta), rtol=1e-10, atol=1e-12)
    label = divergence if anchor == "reference" else f"{divergence}_{anchor}"
    out = objective(**enumerated(theta, anchors), advantages=torch.zeros(V).double(), max_completion_length=1)
    assert f"divergence/{label}/mean" in out.metrics


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("anchor", [name for name in ANCHORS if name != "sampler"])
def test_exact_toward_every_anchor_is_the_sum_over_the_vocabulary(anchor: str, divergence: str) -> None:
    theta, anchors = state()
    case = Case(divergence)
    for estimator, options in (("exact", {}), ("top_k", {"k": V})):
        if estimator == "top_k" and anchor == "uniform":
            continue
        penalty = {"divergence": divergence, "coefficient": 0.5, "anchor": anchor, "estimator": estimator, **options}
        objective = mirrorpo.objective("dapo", regions=[], penalties=[penalty])
        wide = {argument: anchors[name].expand(V, 1, V) for name, argument in LOGITS.items()}
        out = objective(
            **enumerated(theta, anchors),
            **wide,
            logits=theta.expand(V, 1, V),
            tokens=torch.arange(V).unsqueeze(1),
            advantages=torch.zeros(V, dtype=torch.float64),
        )
        assert objective.needs_logits_of == {anchor}
        assert_same(out.loss, 0.5 * case.divergence(theta.softmax(-1), anchors[anchor].exp()), theta)


@pytest.mark.parametrize("placement", ["loss", "advantage"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("anchor", [name for name in ANCHORS if name != "sampler"])
def test_an_exact_baseline_leaves_the_expected_gradient_and_less_noise(
    anchor: str, divergence: str, placement: str
) -> None:
    theta, anchors = state()
    b, p = anchors["old"].exp(), theta.softmax(-1)
    penalty = {"divergence": divergence, "coefficient": 0.5, "anchor": anchor, "estimator": "score"}
    penalty |= {"baseline": "exact", "placement": placement}
    objective = mirrorpo.objective("dapo", regions=[], penalties=[penalty])
    assert objective.needs_logits
    slopes = []
    for y in range(V):  # every token as the one that was sampled
        one = {name: x if isinstance(x, int) else x[y : y + 1] for name, x in enumerated(theta, anchors).items()}
        wide = {argument: anchors[name].expand(1, 1, V) for name, argument in LOGITS.items()}
        zero = torch.zeros(1, dtype=torch.float64)
        out = objective(**one, **wide, logits=theta.expand(1, 1, V), advantages=zero)
        slopes.append(gradient(out.loss, theta))
    expected = gradient(0.5 * Case(divergence).divergence(p, anchors[anchor].exp()), theta)
    mean = (b.unsqueeze(1) * torch.stack(slopes)).sum(0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    # What the gradient of the sampled token's log-probability, e_y - p, is multiplied by.
    g = mirrorpo.divergence(divergence).score(theta.log_softmax(-1), anchors[anchor])
    centred = g - (p * g).sum()
    of_tokens = 0.5 * (p / b * centred).unsqueeze(1) * (torch.eye(V) - p)
    torch.testing.assert_close(torch.stack(slopes), of_tokens.detach(), rtol=1e-9, atol=1e-12)
    assert (p * centred**2).sum() <= (p * g**2).sum()


def test_kl_toward_uniform_is_an_entropy_bonus() -> None:
    theta, anchors = state()
    penalty = {"divergence": "reverse_kl", "coefficient": 0.1, "anchor": "uniform", "estimator": "weighted"}
    found = mirrorpo.objective("dapo", penalties=[penalty]).terms(
        **enumerated(theta, anchors), advantages=torch.zeros(V, dtype=torch.float64)
    )
    assert found.penalty is not None
    p = theta.softmax(-1)
    entropy = -(p * p.log()).sum()
    got = (anchors["old"].exp() * found.penalty.squeeze(1)).sum()
    assert_same(got, 0.1 * (math.log(V) - entropy), theta)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js", "prob_l2"])
def test_a_penalty_in_the_advantage_has_the_gradient_of_the_divergence_and_meets_the_region(divergence: str) -> None:
    theta, anchors = state()
    penalty = {"divergence": divergence, "coefficient": 0.3, "anchor": "teacher", "placement": "advantage"}
    given = enumerated(theta, anchors) | {"advantages": torch.zeros(V, dtype=torch.float64)}
    b, p = anchors["old"].exp(), theta.softmax(-1)
    free = mirrorpo.objective("dapo", regions=[], penalties=[penalty]).terms(**given)
    got = (b * free.policy.squeeze(1)).sum()
    expected = 0.3 * Case(divergence).divergence(p, anchors["teacher"].exp())
    torch.testing.assert_close(gradient(got, theta), gradient(expected, theta), rtol=1e-10, atol=1e-12)
    bounded = mirrorpo.objective("dapo", penalties=[penalty]).terms(**given).policy.squeeze(1)
    w = (p / b).detach()
    g = mirrorpo.divergence(divergence).score(theta.log_softmax(-1), anchors["teacher"])
    a = -0.3 * g
    logp = theta.log_softmax(-1)
    ratio = (logp - anchors["old"]).exp()
    assert_same(bounded, -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a), theta)
    assert ((w > 1.28) & (a > 0)).any() or ((w < 0.8) & (a < 0)).any()


# Regions: a ragged batch of sequences, against loops

B, T = 5, 7
LENGTHS = (7, 4, 1, 6, 3)


def batch(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    base = -logits(B, T, seed=seed).abs() - 0.5

    def near(offset: int, scale: float) -> torch.Tensor:
        return (base + scale * logits(B, T, seed=seed + offset)).clamp(max=-1e-3)

    return {
        "logp": near(1, spread).requires_grad_(),
        "logp_old": base,
        "logp_sampler": near(2, 0.5 * spread),
        "logp_ref": near(3, spread),
        "logp_teacher": near(4, spread),
        "mask": (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).double(),
        "advantages": logits(B, T, seed=seed + 5),
    }


def at_level(row: torch.Tensor, level: str) -> torch.Tensor:
    """A sequence's log-ratios at a level, one for each token."""
    return {"token": row, "sequence": row.mean().expand_as(row), "product": row.sum().expand_as(row)}[level]


def loops(d: dict[str, torch.Tensor], term: Any) -> torch.Tensor:
    """The token mean of ``term(row)``, which gets the kept tokens of a row by argument's name."""
    rows = [term({name: x[i, : LENGTHS[i]] for name, x in d.items() if name not in ("mask",)}).sum() for i in range(B)]
    return torch.stack(rows).sum() / sum(LENGTHS)


@pytest.mark.parametrize("subject", ["policy", "old"])
@pytest.mark.parametrize("side", ["both", "positive", "negative"])
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("anchor", ["old", "sampler", "reference", "teacher"])
def test_a_mask_drops_what_is_outside_and_keeps_the_denominators(
    anchor: str, level: str, side: str, subject: str
) -> None:
    if subject == "old" and anchor == "old":
        pytest.skip("the old policy around itself: refused")
    d = batch(seed=1, spread=0.9)
    low, high = 0.9, 1.1
    rule = {"name": "ratio", "epsilon_low": 0.1, "epsilon_high": 0.1, "anchor": anchor, "act": "mask"}
    rule |= {"level": level, "side": side, "of": subject}
    objective = mirrorpo.objective("dapo", regions=[{"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}, rule])
    dropped_share = []

    def term(row: dict[str, torch.Tensor]) -> torch.Tensor:
        a, w = row["advantages"], (row["logp"] - row["logp_old"]).exp()
        moved = row["logp" if subject == "policy" else "logp_old"].detach() - row[LOGPS[anchor]]
        ratio = at_level(moved, level).exp()
        sign = a if level == "token" else a.mean().expand_as(a)
        there = {"both": sign == sign, "positive": sign > 0, "negative": sign < 0}[side]
        dropped = ((ratio < low) | (ratio > high)) & there
        dropped_share.append(dropped)
        return torch.where(dropped, 0.0, -torch.min(w * a, w.clamp(0.8, 1.28) * a))

    out = objective(**d)
    assert_same(out.loss, loops(d, term), d["logp"])
    label = f"ratio_{anchor}" + ("" if level == "token" else f"_{level}")
    dropped = torch.cat(dropped_share[:B]).double().mean()
    assert out.metrics[f"mask/{label}/frac"].item() == pytest.approx(dropped.item())
    assert dropped > 0 or side != "both"
    assert objective.token_separable == (level == "token")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("preset", ["dapo", "cispo", "sapo", "spo", "drpo", "dcpo", "dppo_tv", "fipo", "atr_grpo"])
def test_a_mask_acts_on_every_surrogate_and_under_every_average(preset: str, aggregation: str) -> None:
    d = batch(seed=1, spread=0.9)
    own = [dict(spec) for spec in PRESETS[preset].regions]
    mask = {"name": "ratio", "epsilon_low": 0.1, "epsilon_high": 0.1, "anchor": "sampler", "act": "mask"}
    plain = mirrorpo.objective(preset, aggregation=aggregation)
    masked = mirrorpo.objective(preset, aggregation=aggregation, regions=[*own, mask])
    ratio = (d["logp"].detach() - d["logp_sampler"]).exp()
    dropped = ((ratio < 0.9) | (ratio > 1.1)) & d["mask"].bool()
    assert 0 < dropped.sum() < d["mask"].sum()
    before, after = (gradient(o(**d, max_completion_length=T).loss, d["logp"]) for o in (plain, masked))
    torch.testing.assert_close(after, before.masked_fill(dropped, 0.0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("side", ["both", "positive", "negative"])
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("anchor", ["old", "sampler", "reference"])
def test_a_clip_around_another_anchor_is_decoupled_ppo(anchor: str, behaviour: str, level: str, side: str) -> None:
    d = batch(seed=1, spread=0.9)
    spec = {"name": "ratio", "epsilon_low": 0.1, "epsilon_high": 0.05, "anchor": anchor, "side": side, "level": level}
    objective = mirrorpo.objective("dapo", behaviour=behaviour, regions=[spec])
    assert objective.level == level

    def term(row: dict[str, torch.Tensor]) -> torch.Tensor:
        a, b, q = row["advantages"], row[LOGPS[behaviour]], row[LOGPS[anchor]]
        k = at_level(q - b, level).exp()  # anchor / behaviour
        r = at_level(row["logp"] - q, level).exp()
        sign = a if level == "token" else a.mean().expand_as(a)
        there = {"both": sign == sign, "positive": sign > 0, "negative": sign < 0}[side]
        held = torch.where(there, r.clamp(0.9, 1.05), r)
        return -torch.min(k * r * a, k * held * a)

    out = objective(**d)
    assert_same(out.loss, loops(d, term), d["logp"])
    assert out.metrics["clip/low/frac"] + out.metrics["clip/high/frac"] > 0


@pytest.mark.parametrize("side", ["both", "negative"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("anchor", ["old", "sampler", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_soft_region_expects_the_gain_minus_the_scaled_divergence(
    divergence: str, anchor: str, behaviour: str, side: str
) -> None:
    theta, anchors = state()
    a = logits(V, seed=9)
    region = {"name": divergence, "radius": 0.7, "act": "soft", "anchor": anchor, "side": side}
    objective = mirrorpo.objective("dapo", behaviour=behaviour, regions=[region])
    found = objective.terms(**enumerated(theta, anchors), advantages=a).policy.squeeze(1)
    b, q, p = anchors[behaviour].exp(), anchors[anchor].exp(), theta.softmax(-1)
    strength = torch.where(a < 0, a.abs(), a.abs() if side == "both" else 0.0) / (2 * 0.7)
    # sum_y b_y |A_y| / (2 radius) d(p_y, q_y) / b_y
    expected = -(p * a).sum() + (strength * Case(divergence).coordinate(p, q)).sum()
    assert_same((b * found).sum(), expected, theta)


def test_a_soft_region_has_its_minimum_at_the_radius() -> None:
    # chi2: -w A + |A| / (2 eps) (w - 1)^2 is smallest at w = 1 + eps for A > 0 and w = 1 - eps for A < 0 (SPO)
    for a, best in ((1.0, 1.2), (-1.0, 0.8)):
        logp = (torch.tensor([[best]], dtype=torch.float64).log() - 2.0).requires_grad_()
        out = mirrorpo.objective("spo")(
            logp=logp,
            logp_old=torch.full((1, 1), -2.0, dtype=torch.float64),
            advantages=torch.tensor([a], dtype=torch.float64),
            mask=torch.ones(1, 1),
        )
        assert gradient(out.loss, logp).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_a_level_of_sequences_is_one_ratio_for_all_tokens(level: str) -> None:
    d = batch()
    objective = mirrorpo.objective("gspo", level=level, epsilon_low=0.2, epsilon_high=0.3)

    def term(row: dict[str, torch.Tensor]) -> torch.Tensor:
        w = at_level(row["logp"] - row["logp_old"], level).exp()
        a = row["advantages"]
        return -torch.min(w * a, w.clamp(0.8, 1.3) * a) / len(a) * sum(LENGTHS) / B  # sequence_mean

    assert_same(objective(**d).loss, loops(d, term), d["logp"])


def test_gmpo_leaves_a_dropped_token_out_of_its_product() -> None:
    d = batch() | {"advantages": logits(B, 1, seed=3)}
    mask = {"name": "kl3", "radius": 0.05, "anchor": "sampler", "act": "mask"}
    objective = mirrorpo.objective("gmpo", regions=[mask])
    keep = d["mask"].bool()
    low, high = mirrorpo.trust_region("kl3", radius=0.05).ratio_bounds(d["logp"])
    ratio = (d["logp"] - d["logp_sampler"]).detach().exp()
    dropped = (ratio < low) | (ratio > high)
    u = torch.where(keep & ~dropped, d["logp"] - d["logp_old"], 0.0)
    mean = u.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)
    per_token = torch.where(dropped, 0.0, -mean.exp() * d["advantages"])
    assert (dropped & keep).any()
    expected = (torch.where(keep, per_token, 0.0).sum(-1) / keep.sum(-1)).mean()
    assert_same(objective(**d).loss, expected, d["logp"])


def test_trl_has_the_same_off_policy_sequence_mask() -> None:
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    d = batch() | {"advantages": torch.tensor([[1.0], [-1.0], [-1.0], [-1.0], [0.0]], dtype=torch.float64)}
    shift = torch.tensor([[0.3], [0.3], [-0.3], [0.05], [0.3]], dtype=torch.float64)  # out: the second row alone
    d["logp_sampler"] = (d["logp"].detach() - 0.5 + shift).clamp(max=0.0)
    d["logp"] = (d["logp"].detach() - 0.5).requires_grad_()
    theirs = grpo.GRPOTrainer.get_off_policy_mask(
        advantages=d["advantages"],
        per_token_logps=d["logp"],
        sampling_per_token_logps=d["logp_sampler"],
        mask=d["mask"],
        off_policy_threshold=0.1,
    ).bool()
    found = mirrorpo.objective("opsm").terms(**d)
    dropped = next(x for name, x in found.fractions.items() if name.startswith("mask/"))
    assert torch.equal(dropped, ~theirs)
    assert dropped.flatten().tolist() == [False, True, False, False, False]


def test_masks_add_up_and_a_batch_of_which_nothing_is_left_is_a_zero_with_a_graph() -> None:
    d = batch(spread=0.9)
    token = {"name": "ratio", "epsilon_low": 0.3, "epsilon_high": 0.3, "anchor": "sampler", "act": "mask"}
    whole = {"name": "kl3", "radius": 0.02, "anchor": "sampler", "act": "mask", "level": "sequence"}
    dropped = {}
    for name, masks in {"token": [token], "whole": [whole], "both": [token, whole]}.items():
        terms = mirrorpo.objective("dapo", regions=masks).terms(**d)
        dropped[name] = (terms.policy == 0) & (d["mask"] > 0)
    assert torch.equal(dropped["both"], dropped["token"] | dropped["whole"])
    assert not torch.equal(dropped["token"], dropped["whole"])
    nothing = {**whole, "radius": 1e-12}
    out = mirrorpo.objective("dapo", regions=[nothing])(**d)
    assert out.loss.item() == 0.0
    assert (gradient(out.loss, d["logp"]) == 0).all()


# Missing values


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("preset", ["dppo_tv", "dppo_kl", "icepop", "opsm"])
def test_a_token_that_the_sampler_could_not_score_is_outside_and_never_a_nan(preset: str, bad: float) -> None:
    d = batch() | {"advantages": logits(B, seed=3)}
    dirty = d["logp_sampler"].clone()
    dirty[0, 2] = dirty[3, 5] = bad
    dirty[1, 6] = math.nan  # masked
    objective = mirrorpo.objective(preset, aggregation="token_mean")
    out = objective(**{**d, "logp_sampler": dirty})
    assert out.loss.isfinite()
    slope = gradient(out.loss, d["logp"])
    assert slope.isfinite().all()
    if preset != "opsm":  # whose policy term is around the old policy
        assert slope[0, 2] == slope[3, 5] == 0
        assert out.metrics["behaviour/missing/frac"].item() == pytest.approx(2 / sum(LENGTHS))
        clean = gradient(objective(**d).loss, d["logp"])
        clean[0, 2] = clean[3, 5] = 0.0
        torch.testing.assert_close(slope, clean)


def test_one_missing_token_does_not_decide_over_its_sequence() -> None:
    d = batch() | {"advantages": -torch.ones(B, dtype=torch.float64)}
    same = d | {"logp_sampler": d["logp"].detach().clone()}
    same["logp_sampler"][0, 0] = math.nan
    terms = mirrorpo.objective("opsm").terms(**same)
    assert not terms.fractions["mask/log_ratio_sampler_sequence/frac"].any()


def test_minus_infinity_under_the_old_policy_is_outside_too_and_a_weight_that_is_not_finite_counts_as_zero() -> None:
    d = batch()
    old = d["logp_old"].clone()
    old[0, 2] = -math.inf
    out = mirrorpo.objective("grpo", estimator="weighted")(**{**d, "logp_old": old})
    assert out.loss.isfinite()
    assert gradient(out.loss, d["logp"])[0, 2] == 0
    weight = torch.ones(B, T, dtype=torch.float64)
    weight[1, 1] = math.nan
    weight[3, 0] = math.inf
    out = mirrorpo.objective("dapo")(**d, weight=weight)
    slope = gradient(out.loss, d["logp"])
    assert out.loss.isfinite()
    assert slope[1, 1] == slope[3, 0] == 0


@pytest.mark.parametrize("anchor", ["old", "sampler"])
def test_a_penalty_toward_an_anchor_that_could_not_score_a_token_is_zero_there(anchor: str) -> None:
    d = batch()
    dirty = d[LOGPS[anchor]].clone()
    dirty[0, 2] = -math.inf
    penalty = {"divergence": "reverse_kl", "coefficient": 0.5, "anchor": anchor}
    found = mirrorpo.objective("dapo", penalties=[penalty]).terms(**{**d, LOGPS[anchor]: dirty})
    assert found.penalty is not None
    assert found.penalty[0, 2] == 0
    assert found.penalty.isfinite().all()


# What is needed


def test_needs_are_the_anchors_that_a_call_must_bring() -> None:
    for preset, expected in {
        "dapo": {"old"},
        "grpo": {"old", "reference"},
        "dppo_tv": {"sampler"},
        "icepop": {"old", "sampler"},
        "opsm": {"old", "sampler", "reference"},
        "opd": {"old", "teacher"},
    }.items():
        assert mirrorpo.objective(preset).needs == expected
    d = batch()
    for preset, argument in {"dppo_tv": "logp_sampler", "opsm": "logp_sampler", "opd": "logp_teacher"}.items():
        given = {name: x for name, x in d.items() if name != argument}
        with pytest.raises(ValueError, match=f"needs {argument}, got None: "):
            mirrorpo.objective(preset)(**given, max_completion_length=T)
    toward_uniform = mirrorpo.objective("dapo", penalties=[{**JS, "anchor": "uniform"}])
    with pytest.raises(ValueError, match="needs vocabulary, got None"):
        toward_uniform(**d)
    with pytest.raises(ValueError, match="advantages must be given"):
        mirrorpo.objective("dapo")(**{**d, "advantages": None})


def test_distillation_needs_no_advantages() -> None:
    d = {name: x for name, x in batch().items() if name != "advantages"}
    out = mirrorpo.objective("opd")(**d)
    assert out.policy_loss.item() == 0.0
    assert gradient(out.loss, d["logp"]).abs().sum() > 0


def test_the_sampler_of_a_policy_that_generates_by_itself_is_the_old_policy() -> None:
    d = batch()
    own = {name: x for name, x in d.items() if name != "logp_sampler"}
    for preset in ("dppo_tv", "icepop", "opsm"):
        objective = mirrorpo.objective(preset)
        here = objective.drawn_by_policy()
        assert "sampler" not in here.needs
        expected = objective(**{**d, "logp_sampler": d["logp_old"]}, max_completion_length=T).loss
        assert_same(here(**own, max_completion_length=T).loss, expected, d["logp"])


JS = {"divergence": "js", "coefficient": 0.1}


def test_short_forms_change_the_part_that_a_preset_has() -> None:
    soft = mirrorpo.objective("spo", region="js", radius=0.1)
    assert (soft.rules[0].act, soft.region.name, soft.region.radius) == ("soft", "js", 0.1)
    assert mirrorpo.objective("spo", radius=0.3).region.radius == 0.3
    wide = mirrorpo.objective("icepop", epsilon_high=0.28)
    assert [rule.act for rule in wide.rules] == ["clip", "mask"]
    assert mirrorpo.objective("icepop", region="none").rules == wide.rules[1:]
    assert mirrorpo.objective("opd", divergence="js").penalties[0].anchor == "teacher"
    assert mirrorpo.objective("opd", coefficient=0.5).penalties[0].estimator == "score"
    assert mirrorpo.objective("grpo", surrogate="none", estimator="score").rules == ()


def test_the_public_example_of_two_anchors_and_a_mask_is_built() -> None:
    objective = mirrorpo.objective(
        "dapo",
        behaviour="sampler",
        regions=[
            {"name": "kl3", "radius": 0.03},
            {"name": "ratio", "epsilon_low": 0.9, "epsilon_high": 4.0, "act": "mask", "level": "sequence"},
        ],
        penalties=[
            {**JS, "anchor": "teacher", "estimator": "score"},
            {**JS, "anchor": "uniform", "estimator": "exact"},
        ],
    )
    assert [rule.anchor for rule in objective.rules] == ["sampler", "sampler"]
    assert objective.needs_logits_of == {"uniform"}
    line = objective.describe()
    for word in ("behaviour sampler", "mask level sequence", "toward teacher", "toward uniform"):
        assert word in line
    assert set(ESTIMATORS) >= {p.estimator for p in objective.penalties}
