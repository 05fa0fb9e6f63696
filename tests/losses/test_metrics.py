"""The numbers to watch: each re-derived with loops over the batch."""

from __future__ import annotations

import math

import pytest
import torch

import mirrorpo


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    logp = -3 * torch.rand(4, 6, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    return {
        "logp": logp,
        "logp_old": (logp + 0.4 * torch.randn(4, 6, generator=g, dtype=torch.float64)).clamp(max=0.0),
        "logp_ref": (logp + 0.4 * torch.randn(4, 6, generator=g, dtype=torch.float64)).clamp(max=0.0),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64),
        "mask": mask,
        "entropy": torch.rand(4, 6, generator=g, dtype=torch.float64),
    }


def tokens(data: dict[str, torch.Tensor]) -> list[tuple[float, float, float, float, float]]:
    """(log p, log w, log p - log q, A, H) of every token that counts."""
    return [
        (
            data["logp"][i, t].item(),
            (data["logp"] - data["logp_old"])[i, t].item(),
            (data["logp"] - data["logp_ref"])[i, t].item(),
            data["advantages"][i].item(),
            data["entropy"][i, t].item(),
        )
        for i in range(4)
        for t in range(6)
        if data["mask"][i, t]
    ]


def test_shares_quantiles_and_divergences_are_those_of_a_loop_over_the_tokens() -> None:
    data = batch()
    out = mirrorpo.objective("prob_l2_grpo")(**data, max_completion_length=6)
    rows = tokens(data)
    n = len(rows)
    m = {name: value.item() for name, value in out.metrics.items()}
    w = [math.exp(row[1]) for row in rows]
    assert m["clip/low/frac"] == pytest.approx(sum(v < 0.8 and r[3] < 0 for v, r in zip(w, rows, strict=True)) / n)
    assert m["clip/high/frac"] == pytest.approx(sum(v > 1.2 and r[3] > 0 for v, r in zip(w, rows, strict=True)) / n)
    outside = [not 0.8 <= v <= 1.2 for v in w]
    assert m["outside/positive/frac"] == pytest.approx(
        sum(o and r[3] > 0 for o, r in zip(outside, rows, strict=True)) / n
    )
    assert m["outside/negative/frac"] == pytest.approx(
        sum(o and r[3] < 0 for o, r in zip(outside, rows, strict=True)) / n
    )
    assert m["ratio/max"] == pytest.approx(max(w))
    assert m["ratio/mean"] == pytest.approx(sum(w) / n)
    ordered = sorted(w)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    assert m["ratio/q50/mean"] == pytest.approx(middle)
    k3 = [math.exp(-r[2]) - 1 + r[2] for r in rows]
    assert m["divergence/reverse_kl/mean"] == pytest.approx(sum(k3) / n)
    l2 = [(math.exp(r[0]) - math.exp(r[0] - r[2])) ** 2 for r in rows]
    assert m["divergence/prob_l2/mean"] == pytest.approx(sum(l2) / n)
    assert m["entropy/mean"] == pytest.approx(sum(r[4] for r in rows) / n)


def test_the_entropy_prediction_is_split_by_what_the_region_stops() -> None:
    data = batch()
    m = mirrorpo.objective("dr_grpo")(**data, max_completion_length=6).metrics
    passed = held = 0.0
    for logp, log_w, _, advantage, entropy in tokens(data):
        w = math.exp(log_w)
        push = -w * advantage * math.exp(logp) * (logp + entropy)
        if (w < 0.8 and advantage < 0) or (w > 1.2 and advantage > 0):
            held += push
        else:
            passed += push
    n = len(tokens(data))
    assert m["entropy/predicted_change/mean"].item() == pytest.approx(passed / n)
    assert m["entropy/held_back/mean"].item() == pytest.approx(held / n)


def test_the_entropy_prediction_is_the_first_order_change_up_to_a_term_that_does_not_depend_on_the_token() -> None:
    """By enumeration: <grad H, w A (e_y - p)> = prediction + w A sum_v p_v^2 (log p_v + H), for every token y."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum()
    (gradient,) = torch.autograd.grad(entropy, logits)
    p, log_p, entropy = p.detach(), log_p.detach(), entropy.detach()
    rest = (p * p * (log_p + entropy)).sum()
    for y in range(4):
        direction = torch.nn.functional.one_hot(torch.tensor(y), 4).double() - p
        logp = log_p[y].reshape(1, 1)
        metrics = mirrorpo.objective("dr_grpo")(
            logp=logp,
            advantages=torch.ones(1, dtype=torch.float64),
            mask=torch.ones(1, 1),
            entropy=entropy.reshape(1, 1),
            max_completion_length=1,
        ).metrics
        predicted = metrics["entropy/predicted_change/mean"]
        assert (gradient @ direction).item() == pytest.approx((predicted + rest).item())


def test_every_metric_is_a_detached_scalar_with_a_suffix_that_says_how_to_reduce_it() -> None:
    data = batch()
    data["logp"].requires_grad_()
    data["logp_sampler"] = data["logp_old"]
    for preset in ("grpo", "gspo", "dppo_tv", "icepop", "gmpo", "fipo", "prob_l2_kl_grpo"):
        for name, value in mirrorpo.objective(preset)(**data, max_completion_length=6).metrics.items():
            assert value.shape == (), name
            assert not value.requires_grad, name
            assert name.rpartition("/")[2] in ("mean", "frac", "max", "min"), name


def test_an_empty_batch_has_metrics_too() -> None:
    empty = torch.zeros(0, 5)
    out = mirrorpo.objective("grpo")(logp=empty, logp_ref=empty, advantages=torch.zeros(0), mask=empty, entropy=empty)
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", ["dppo_tv", "dppo_kl", "icepop", "opsm"])
@pytest.mark.parametrize("far", [-100.0, -1e4])
def test_a_sampler_far_below_the_policy_is_no_infinity_times_zero(far: float, preset: str, dtype: torch.dtype) -> None:
    # exp(-1 + 100) is infinite in float32, and a mask that multiplies it by 0 makes NaN of it.
    logp = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
    sampler = torch.full((2, 3), -1.1, dtype=dtype)
    sampler[0, 2] = far
    start, advantages = logp.detach(), torch.tensor([1.0, -1.0], dtype=dtype)
    given = {"logp_old": start, "logp_ref": start, "logp_sampler": sampler, "mask": torch.ones(2, 3)}
    out = mirrorpo.objective(preset, aggregation="token_mean")(logp=logp, advantages=advantages, **given)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    assert [name for name, value in out.metrics.items() if not value.isfinite()] == []
