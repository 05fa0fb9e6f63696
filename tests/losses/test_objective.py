"""The composed loss against double loops over B and T; masks, levels, weights, penalties, metrics."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.losses.aggregation import AGGREGATIONS
from mirrorpo.losses.presets import PRESETS
from naive import Case, logits

B, T, V, LENGTH = 4, 6, 7, 9
NAN, INF = float("nan"), float("inf")


def batch(seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """One batch with logits of all three policies and the log-probabilities of its tokens; row 2 is empty."""
    theta = logits(B, T, V, seed=seed).requires_grad_()
    old = theta.detach() + scale * logits(B, T, V, seed=seed + 1)
    ref = theta.detach() + scale * logits(B, T, V, seed=seed + 2)
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    logp, logp_old, logp_ref = (
        x.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in (theta, old, ref)
    )
    mask = torch.arange(T) < torch.tensor([[6], [3], [0], [1]])
    return {
        "logits": theta,
        "logits_old": old,
        "logits_ref": ref,
        "tokens": tokens,
        "logp": logp,
        "logp_old": logp_old,
        "logp_ref": logp_ref,
        "logp_sampler": (logp_old + 0.1 * logits(B, T, seed=seed + 4)).clamp(max=-1e-3),
        "logp_teacher": (logp_old + scale * logits(B, T, seed=seed + 5)).clamp(max=-1e-3),
        "mask": mask,
        "advantages": logits(B, seed=seed + 3),
    }


SAMPLED = ("logp", "logp_old", "logp_ref", "logp_sampler", "logp_teacher", "mask", "advantages")


def call(objective: mirrorpo.Objective, data: dict[str, torch.Tensor], **changes: Any) -> mirrorpo.Output:
    names = data if objective.needs_logits else SAMPLED
    return objective(**{**{name: data[name] for name in names}, "max_completion_length": LENGTH, **changes})


def average(cell: Callable[[int, int], torch.Tensor], mask: torch.Tensor, mode: str) -> torch.Tensor:
    """agg of cell(i, t) over the kept tokens, as loops."""
    rows = [[cell(i, t) for t in range(T) if mask[i, t]] for i in range(B)]
    count = sum(map(len, rows))
    if mode == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows if row) / B
    denominator = {"token_mean": count, "constant": B * LENGTH, "sequence_sum": B}[mode]
    return sum(sum(row) for row in rows if row) / denominator


def assert_same(got: torch.Tensor, expected: torch.Tensor, theta: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
    one, other = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def ppo(d: dict[str, torch.Tensor], i: int, t: int, low: float = 0.8, high: float = 1.2) -> torch.Tensor:
    w, a = (d["logp"][i, t] - d["logp_old"][i, t]).exp(), d["advantages"][i]
    return -torch.min(w * a, w.clamp(low, high) * a)


def k3(d: dict[str, torch.Tensor], i: int, t: int) -> torch.Tensor:
    r = d["logp_ref"][i, t] - d["logp"][i, t]
    return r.exp() - 1 - r


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_grpo_is_its_double_loop_in_every_aggregation(mode: str) -> None:
    d = batch()
    out = call(mirrorpo.objective("grpo", aggregation=mode), d)
    assert_same(out.loss, average(lambda i, t: ppo(d, i, t) + 0.04 * k3(d, i, t), d["mask"], mode), d["logits"])
    policy, penalty = (
        average(f, d["mask"], mode).item() for f in (lambda i, t: ppo(d, i, t), lambda i, t: k3(d, i, t))
    )
    assert out.metrics["policy_loss/mean"].item() == pytest.approx(policy, rel=1e-10)
    assert out.metrics["penalty_loss/mean"].item() == pytest.approx(0.04 * penalty, rel=1e-10)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_two_penalties_add_with_a_coefficient_each(mode: str) -> None:
    d = batch()
    out = call(mirrorpo.objective("prob_l2_kl_grpo", aggregation=mode, coefficient=[0.5, 0.04]), d)

    def cell(i: int, t: int) -> torch.Tensor:
        prob_l2 = (d["logp"][i, t].exp() - d["logp_ref"][i, t].exp()) ** 2
        return ppo(d, i, t) + 0.5 * prob_l2 + 0.04 * k3(d, i, t)

    assert_same(out.loss, average(cell, d["mask"], mode), d["logits"])


def test_the_parts_of_the_loss_add_up_and_the_scale_is_a_factor_on_every_coefficient() -> None:
    d = batch()
    out = call(mirrorpo.objective("prob_l2_kl_grpo", coefficient=[0.5, 0.04]), d, penalty_scale=3.0)
    scaled = call(mirrorpo.objective("prob_l2_kl_grpo", coefficient=[1.5, 0.12]), d)
    assert_same(out.loss, scaled.loss, d["logits"])
    assert out.penalty_loss is not None
    assert_same(out.policy_loss + out.penalty_loss, out.loss, d["logits"])
    assert call(mirrorpo.objective("dapo"), d).penalty_loss is None


@pytest.mark.parametrize("poison", [NAN, INF, -1.0])
def test_a_penalty_placed_in_the_reward_leaves_the_loss_and_sums_over_the_completion(poison: float) -> None:
    d = batch()
    objective = mirrorpo.objective("prob_l2_kl_grpo", coefficient=[0.5, 0.04], placement="reward")
    assert_same(call(objective, d).loss, call(mirrorpo.objective("dr_grpo"), d).loss, d["logits"])
    logp, logp_ref = (torch.where(d["mask"], d[key].detach(), poison) for key in ("logp", "logp_ref"))
    got = objective.reward_penalty(logp, logp_ref, d["mask"], penalty_scale=2.0)
    expected = torch.zeros(B, dtype=torch.float64)
    for i, t in d["mask"].nonzero().tolist():
        prob_l2 = (d["logp"][i, t].exp() - d["logp_ref"][i, t].exp()) ** 2
        expected[i] += 2.0 * (0.5 * prob_l2 + 0.04 * k3(d, i, t)).detach()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


def test_the_weighted_penalty_is_k3_with_ratio_correction() -> None:
    d = batch()
    out = call(mirrorpo.objective("grpo", estimator="weighted"), d)

    def cell(i: int, t: int) -> torch.Tensor:
        return ppo(d, i, t) + 0.04 * (d["logp"][i, t] - d["logp_old"][i, t]).exp() * k3(d, i, t)

    assert_same(out.loss, average(cell, d["mask"], "sequence_mean"), d["logits"])


def test_the_score_penalty_has_the_surrogates_gradient() -> None:
    d = batch()
    no_policy = torch.zeros(B, dtype=torch.float64)
    out = call(mirrorpo.objective("grpo", estimator="score"), d, advantages=no_policy)

    def surrogate(i: int, t: int) -> torch.Tensor:  # g = log p/q for reverse KL, up to a baseline of expectation zero
        u = (d["logp"][i, t] - d["logp_old"][i, t]).detach()
        return 0.04 * u.exp() * (d["logp"][i, t] - d["logp_ref"][i, t]).detach() * d["logp"][i, t]

    expected = torch.autograd.grad(average(surrogate, d["mask"], "sequence_mean"), d["logits"], retain_graph=True)[0]
    got = torch.autograd.grad(out.loss, d["logits"], retain_graph=True)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    value = average(lambda i, t: 0.04 * k3(d, i, t), d["mask"], "sequence_mean")
    assert out.loss.item() == pytest.approx(value.item(), rel=1e-10)


@pytest.mark.parametrize("estimator", ["exact", "top_k"])
def test_a_penalty_over_the_vocabulary_uses_the_logits(estimator: str) -> None:
    d = batch()
    options = {"k": V} if estimator == "top_k" else {}
    objective = mirrorpo.objective("grpo", divergence="js", estimator=estimator, coefficient=0.3, **options)
    assert objective.needs_logits
    js = Case("js").divergence(d["logits"].softmax(-1), d["logits_ref"].softmax(-1))
    expected = average(lambda i, t: ppo(d, i, t) + 0.3 * js[i, t], d["mask"], "sequence_mean")
    assert_same(call(objective, d).loss, expected, d["logits"])


def test_a_region_over_the_vocabulary_masks_tokens_outside() -> None:
    d = batch()
    value = Case("reverse_kl").divergence(d["logits"].softmax(-1), d["logits_old"].softmax(-1)).detach()
    radius = value[d["mask"]].median().item() * 1.001
    out = call(mirrorpo.objective("dapo", region={"name": "exact", "radius": radius}), d)

    def cell(i: int, t: int) -> torch.Tensor:
        u, a = d["logp"][i, t] - d["logp_old"][i, t], d["advantages"][i]
        blocked = value[i, t] > radius and u.item() * a.item() > 0
        return -(u.detach() if blocked else u).exp() * a

    assert_same(out.loss, average(cell, d["mask"], "token_mean"), d["logits"])
    blocked = sum(
        bool(value[i, t] > radius and (d["logp"] - d["logp_old"])[i, t] * d["advantages"][i] > 0)
        for i in range(B)
        for t in range(T)
        if d["mask"][i, t]
    )
    fractions = out.metrics["clip/low/frac"] + out.metrics["clip/high/frac"]
    assert fractions.item() == pytest.approx(blocked / d["mask"].sum().item(), rel=1e-6)
    assert blocked > 0


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)])
def test_advantages_may_be_per_sequence_or_per_token(shape: tuple[int, ...]) -> None:
    d = batch()
    a = logits(*shape, seed=11)
    wide = a.view(B, 1).expand(B, T) if a.numel() == B else a

    def cell(i: int, t: int) -> torch.Tensor:
        w = (d["logp"][i, t] - d["logp_old"][i, t]).exp()
        return -torch.min(w * wide[i, t], w.clamp(0.8, 1.28) * wide[i, t])

    got = call(mirrorpo.objective("dapo"), d, advantages=a).loss
    assert_same(got, average(cell, d["mask"], "token_mean"), d["logits"])


@pytest.mark.parametrize("shape", [(B, 1), (B, T)])
def test_the_weight_multiplies_the_policy_term_only_and_carries_no_gradient(shape: tuple[int, ...]) -> None:
    d = batch()
    weight = logits(*shape, seed=12).abs().requires_grad_()
    out = call(mirrorpo.objective("grpo"), d, weight=weight)
    wide = weight.detach().expand(B, T)
    expected = average(lambda i, t: wide[i, t] * ppo(d, i, t) + 0.04 * k3(d, i, t), d["mask"], "sequence_mean")
    assert_same(out.loss, expected, d["logits"])
    out.loss.backward()
    assert weight.grad is None


def test_without_logp_old_the_policy_itself_is_the_anchor() -> None:
    d = batch()
    given = call(mirrorpo.objective("dapo"), d, logp_old=d["logp"].detach())
    assert_same(call(mirrorpo.objective("dapo"), d, logp_old=None).loss, given.loss, d["logits"])


CONFIGURATIONS = {
    **{name: {} for name in PRESETS if "es" not in name.split("_")},
    "exact penalty": {"preset": "grpo", "estimator": "exact"},
    "top_k penalty": {"preset": "grpo", "estimator": "top_k", "k": 2},
    "exact region": {"preset": "dapo", "region": {"name": "exact", "radius": 0.01}},
    "top_k region": {
        "preset": "dppo_tv",
        "behaviour": "old",
        "region": {"name": "top_k", "radius": 0.01, "divergence": "tv", "k": 2},
    },
    "sequence sapo": {"preset": "sapo", "level": "sequence"},
}


def configured(name: str) -> mirrorpo.Objective:
    overrides = dict(CONFIGURATIONS[name])
    return mirrorpo.objective(overrides.pop("preset", name), **overrides)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_stands_at_masked_positions_has_no_effect(name: str, poison: float) -> None:
    objective, d = configured(name), batch()
    mask = d["mask"]
    clean = call(objective, d, advantages=d["advantages"].view(B, 1).expand(B, T).contiguous(), weight=torch.ones(B, T))
    leaves = {key: d[key].detach().clone() for key in ("logits", "logits_old", "logits_ref")}
    for key in leaves:
        leaves[key][~mask] = poison
    dirty = {**d, **leaves, "tokens": torch.where(mask, d["tokens"], -100)}
    for key in ("logp", "logp_old", "logp_ref", "logp_sampler", "logp_teacher"):
        dirty[key] = torch.where(mask, d[key].detach(), poison)
    dirty["logp"].requires_grad_()
    dirty["logits"].requires_grad_()
    wide = torch.where(mask, d["advantages"].view(B, 1), poison)
    weight = torch.where(mask, 1.0, poison)
    out = call(objective, dirty, advantages=wide, weight=weight)
    assert out.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
    for key, value in clean.metrics.items():
        assert out.metrics[key].item() == pytest.approx(value.item(), rel=1e-12, nan_ok=False), key
    out.loss.backward()
    for key in ("logp", "logits"):
        gradient = dirty[key].grad
        if gradient is not None:
            assert gradient.isfinite().all(), key
            assert (gradient[~mask] == 0).all(), key
    assert dirty["logp"].grad[mask].abs().sum() > 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_batch_with_nothing_kept_gives_a_zero_with_a_graph(name: str) -> None:
    objective, d = configured(name), batch()
    out = call(objective, d, mask=torch.zeros(B, T))
    assert out.loss.item() == 0
    out.loss.backward()
    assert (d["logits"].grad == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if " " not in name])
def test_an_empty_batch_gives_a_zero_with_a_graph(name: str, shape: tuple[int, int]) -> None:
    logp = torch.zeros(shape, requires_grad=True)
    anchor = torch.zeros(shape)
    out = configured(name)(
        logp=logp,
        logp_old=anchor,
        logp_ref=anchor,
        logp_sampler=anchor,
        logp_teacher=anchor,
        advantages=torch.zeros(shape[0]),
        mask=anchor,
        max_completion_length=LENGTH,
    )
    assert out.loss.item() == 0
    out.loss.backward()
    assert logp.grad is not None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_metrics_are_detached_finite_scalars_whose_suffix_says_how_to_reduce_them(name: str) -> None:
    out = call(configured(name), batch())
    for key, value in out.metrics.items():
        assert key.rsplit("/", 1)[1] in ("mean", "max", "min", "frac"), key
        assert value.shape == ()
        assert not value.requires_grad
        assert value.isfinite()
    assert {"policy_loss/mean", "clip/low/frac", "clip/high/frac", "ratio/mean", "ratio/max"} <= set(out.metrics)


def test_metrics_are_token_averages_over_the_mask() -> None:
    d = batch(scale=1.0)
    metrics = call(mirrorpo.objective("grpo"), d).metrics
    keep = d["mask"]
    w = (d["logp"] - d["logp_old"]).detach().exp()[keep]
    a = d["advantages"].view(B, 1).expand(B, T)[keep]
    expected = {
        "ratio/mean": w.mean(),
        "ratio/max": w.max(),
        "clip/low/frac": ((w < 0.8) & (a < 0)).double().mean(),
        "clip/high/frac": ((w > 1.2) & (a > 0)).double().mean(),
        "divergence/reverse_kl/mean": torch.stack([k3(d, i, t).detach() for i, t in keep.nonzero().tolist()]).mean(),
    }
    for key, value in expected.items():
        assert metrics[key].item() == pytest.approx(value.item(), rel=1e-9), key
    assert metrics["clip/low/frac"] + metrics["clip/high/frac"] > 0


def test_two_penalties_have_a_metric_each() -> None:
    d = batch()
    objective = mirrorpo.objective(
        "grpo", divergence=["kl", "js"], coefficient=[0.1, 0.2], estimator=["sampled", "score"]
    )
    metrics = call(objective, d).metrics
    assert {"divergence/kl/mean", "divergence/js/mean"} <= set(metrics)


@pytest.mark.parametrize(
    ("overrides", "without", "words"),
    [
        ({}, "logp_ref", ("reverse_kl", "logp_ref", "None", "reference")),
        ({"estimator": "exact"}, "logits", ("exact", "logits", "next-token logits")),
        ({"estimator": "exact"}, "logits_ref", ("exact", "logits_ref", "reference")),
        ({"estimator": "top_k"}, "tokens", ("top_k", "tokens", "sampled tokens")),
        ({"region": {"name": "exact", "radius": 0.1}}, "logits_old", ("region 'exact'", "logits_old", "rollout")),
        ({"aggregation": "constant"}, "max_completion_length", ("constant", "max_completion_length", "None")),
    ],
)
def test_what_is_missing_is_named_with_how_to_get_it(
    overrides: dict[str, Any], without: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=f"needs {without}") as caught:
        call(mirrorpo.objective("grpo", **overrides), batch(), **{without: None})
    for word in words:
        assert word in str(caught.value)


def test_low_precision_batches_are_upcast_and_mixed_dtypes_accepted() -> None:
    d = batch()
    low = {key: d[key].detach().to(torch.bfloat16) for key in ("logp", "logp_old", "logp_ref")}
    objective = mirrorpo.objective("grpo")
    out = call(objective, {**d, **low, "advantages": d["advantages"].float()})
    same = call(objective, {**d, **{k: v.float() for k, v in low.items()}, "advantages": d["advantages"].float()})
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == same.loss.item()


def test_the_objective_is_frozen_and_describes_itself() -> None:
    objective = mirrorpo.objective("prob_l2_grpo", coefficient=1e-3)
    with pytest.raises(AttributeError):
        objective.name = "other"  # type: ignore[misc]
    text = replace(objective, name="mine").describe()
    for word in ("mine", "clip", "ratio", "0.8", "1.2", "0.001 * prob_l2 (sampled)", "dr_grpo", "constant"):
        assert word in text
    assert math.isclose(objective.penalties[0].coefficient, 1e-3)
