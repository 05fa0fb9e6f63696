"""Corrections for the sampler, as other libraries define them: their own code or formula, and our regions, one loss.

The rows of verl in ``docs/howto/mismatch.md`` are read from there. TRL's are in
``tests/training/test_vllm_correction.py``, which plays them through its trainer.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mirrorpo
from naive import logits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "mismatch.md"
B, T = 6, 8
LENGTHS = (8, 5, 1, 7, 3, 6)


def rows(library: str) -> list[tuple[str, str]]:
    """Setting and regions of a library's rows of the page."""
    found = re.findall(r"^\| (.+?) \| `(.+)` \| `(\[.+\])` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(setting, regions) for name, setting, regions in found if name == library]


def batch(seed: int = 0) -> dict[str, Tensor]:
    base = -logits(B, T, seed=seed).abs() - 0.5

    def near(offset: int, scale: float) -> Tensor:
        return (base + scale * logits(B, T, seed=seed + offset)).clamp(max=-1e-3)

    return {
        "logp": near(1, 0.2).requires_grad_(),
        "logp_old": base,
        "logp_sampler": near(2, 0.25) * torch.tensor([1.0, 1.1, 1.0, 1.02, 0.97, 1.0]).double().unsqueeze(1),
        "mask": (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).double(),
        "advantages": logits(B, 1, seed=seed + 5).expand(B, T),
    }


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    slope, truth = gradient(ours, leaf), gradient(theirs, leaf)
    assert truth.abs().max() > 1e-4
    assert abs(ours - theirs) < 1e-6
    assert (slope - truth).abs().max() < 1e-6


# Against verl


def verl_config(**correction: Any) -> Any:
    pytest.importorskip("verl", reason="verl is for Python below 3.13: `make test` installs it there")
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    loss = PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=correction)
    made = FSDPActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=2, clip_ratio_c=1e6, policy_loss=loss
    )
    made.global_batch_info.update(dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=B)
    return made


@pytest.mark.parametrize("aggregation", ["token_mean", "constant"])
@pytest.mark.parametrize(("setting", "regions"), rows("verl 0.9.1"))
def test_a_correction_of_verl_is_what_the_page_says(setting: str, regions: str, aggregation: str) -> None:
    actor = verl_config()
    import verl.trainer.ppo.core_algos as core
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    given = yaml.safe_load("{" + setting + "}")
    if "rollout_rs_threshold" in given:
        given["rollout_rs_threshold"] = str(given["rollout_rs_threshold"])
    d = batch()
    mode = {"token_mean": "token-mean", "constant": "seq-mean-token-sum-norm"}[aggregation]
    weights, kept, metrics = compute_rollout_correction_and_rejection_mask(
        d["logp_old"], d["logp_sampler"], d["mask"], **given
    )
    actor.global_batch_info["loss_scale_factor"] = T
    theirs, _ = core.compute_policy_loss_vanilla(
        old_log_prob=d["logp_old"],
        log_prob=d["logp"],
        advantages=d["advantages"],
        response_mask=kept,
        loss_agg_mode=mode,
        config=actor,
        rollout_is_weights=None if weights is None else weights.batch["rollout_is_weights"],
    )
    spec = [{"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.2}, *yaml.safe_load(regions)]
    out = mirrorpo.objective("dapo", regions=spec, aggregation=aggregation)(**d, max_completion_length=T)
    if "rollout_rs" in given:
        share = metrics["rollout_corr/rollout_rs_masked_fraction"]
        assert 0 < share < 1
        (dropped,) = (x for name, x in out.metrics.items() if name.startswith("mask/"))
        assert dropped.item() == pytest.approx(share, abs=1e-6)
    else:
        (clamped,) = (x for name, x in out.metrics.items() if name.startswith("truncate/"))
        assert 0 < clamped < 1
    assert_same(out.loss, theirs, d["logp"])


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize("weighs", ["token", "sequence"])
def test_the_bypass_mode_of_verl_is_behaviour_sampler(loss_type: str, weighs: str) -> None:
    more = {"rollout_is": weighs, "rollout_is_threshold": 1.3} if loss_type == "reinforce" else {}
    actor = verl_config(loss_type=loss_type, rollout_rs="seq_mean_k3", rollout_rs_threshold="0.04", **more)
    import verl.trainer.ppo.core_algos as core

    d = batch()
    theirs, metrics = core.get_policy_loss_fn("bypass_mode")(
        old_log_prob=d["logp_sampler"],
        log_prob=d["logp"],
        advantages=d["advantages"],
        response_mask=d["mask"],
        loss_agg_mode="token-mean",
        config=actor,
    )
    assert 0 < metrics["rollout_corr/rollout_rs_masked_fraction"] < 1
    mask = {"name": "kl3", "radius": 0.04, "act": "mask", "level": "mean_divergence"}
    clip = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.2}
    keys: dict[str, Any] = {"regions": [clip, mask]}
    if loss_type == "reinforce":
        level = {"token": "token", "sequence": "product"}[weighs]
        keys = {"regions": [mask], "surrogate": "truncated", "ratio_cap": 1.3, "level": level}
    assert_same(mirrorpo.objective("dapo", behaviour="sampler", **keys)(**d).loss, theirs, d["logp"])


# Against formulas


def test_slimes_truncated_importance_sampling_is_the_region_of_its_row() -> None:
    # slime: pg_loss * clamp(exp(train - rollout), tis_clip_low, tis_clip)
    d = batch()
    spec = [
        {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28},
        {"name": "ratio", "epsilon_low": 1, "epsilon_high": 0.1, "act": "truncate"},
    ]
    w, a = (d["logp"] - d["logp_old"]).exp(), d["advantages"]
    weight = (d["logp_old"] - d["logp_sampler"]).exp().clamp(0.0, 1.1)
    per_token = -torch.min(w * a, w.clamp(0.8, 1.28) * a) * weight
    expected = (per_token * d["mask"]).sum() / sum(LENGTHS)
    assert_same(mirrorpo.objective("dapo", regions=spec)(**d).loss, expected, d["logp"])


def test_prime_rls_ipo_loss_is_a_mask_around_the_sampler_and_k2_toward_it() -> None:
    # prime-rl: -(|p - b| <= threshold) A w + kl_tau (log w)^2, and k2 is half of that square
    d, tau, threshold = batch(), 0.01, 0.03
    log_ratio = d["logp"] - d["logp_sampler"]
    kept = (d["logp"].exp() - d["logp_sampler"].exp()).abs() <= threshold
    per_token = -(kept * d["advantages"] * log_ratio.exp()) + tau * log_ratio**2
    expected = (per_token * d["mask"]).sum() / sum(LENGTHS)
    objective = mirrorpo.objective(
        "dr_grpo",
        aggregation="token_mean",
        behaviour="sampler",
        regions=[{"name": "binary_tv", "radius": threshold, "act": "mask"}],
        penalties=[{"divergence": "k2", "coefficient": 2 * tau, "anchor": "sampler"}],
    )
    assert 0 < (kept & d["mask"].bool()).sum() < sum(LENGTHS)
    assert_same(objective(**d).loss, expected, d["logp"])


REGIONS = ("kl3", "js", "prob_l2", "binary_tv", "binary_kl")


def distance(name: str, p: Tensor, b: Tensor) -> Tensor:
    """The constraint of each region, from its definition."""
    w = p / b
    return {
        "kl3": w - 1 - w.log(),
        "js": (w * w.log() - (1 + w) * ((1 + w) / 2).log()) / 2,
        "prob_l2": (p - b) ** 2,
        "binary_tv": (p - b).abs(),
        "binary_kl": b * (b / p).log() + (1 - b) * ((1 - b) / (1 - p)).log(),
    }[name]


@pytest.mark.parametrize("subject", ["policy", "old"])
@pytest.mark.parametrize("level", ["mean_divergence", "sum_divergence", "max_divergence"])
@pytest.mark.parametrize("region", REGIONS)
def test_any_divergence_of_a_sequence_can_be_the_statistic_of_a_mask(region: str, level: str, subject: str) -> None:
    d = batch()
    moved = d["logp" if subject == "policy" else "logp_old"].detach().exp()
    values = distance(region, moved, d["logp_sampler"].exp())
    per_row = [values[row, :length] for row, length in enumerate(LENGTHS)]
    of = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[level.split("_")[0]]
    statistics = torch.stack([of(row) for row in per_row])
    radius = statistics.sort().values[2:4].mean().item()  # half of the sequences
    rule = {"name": region, "radius": radius, "act": "mask", "anchor": "sampler", "of": subject, "level": level}
    objective = mirrorpo.objective("dapo", regions=[{"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}, rule])
    assert not objective.token_separable
    dropped = statistics > radius
    w, a = (d["logp"] - d["logp_old"]).exp(), d["advantages"]
    per_token = torch.where(dropped.unsqueeze(1), 0.0, -torch.min(w * a, w.clamp(0.8, 1.28) * a))
    out = objective(**d)
    assert_same(out.loss, (per_token * d["mask"]).sum() / sum(LENGTHS), d["logp"])
    share = (dropped * torch.tensor(LENGTHS)).sum().item() / sum(LENGTHS)
    assert out.metrics[f"mask/{region}_sampler_{level}/frac"].item() == pytest.approx(share)


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_a_weight_is_clamped_into_any_region_and_one_token_without_a_value_decides_over_itself_alone(
    level: str,
) -> None:
    d = batch()
    d["logp_sampler"][1, 2] = math.nan
    name = "binary_kl" if level == "token" else "kl3"
    rule = {"name": name, "radius": 0.01, "act": "truncate", "level": level}
    out = mirrorpo.objective("dapo", regions=[rule])(**d)
    anchor = torch.where(d["logp_sampler"].isnan(), d["logp"].detach(), d["logp_sampler"])
    low, high = mirrorpo.trust_region(name, radius=0.01).ratio_bounds(anchor)
    log_ratio = torch.where(d["logp_sampler"].isnan(), 0.0, d["logp_old"] - anchor) * d["mask"]
    total = log_ratio.sum(-1, keepdim=True)
    counts = torch.tensor(LENGTHS).unsqueeze(1)
    ratio = {"token": log_ratio, "sequence": total / counts, "product": total}[level].exp()
    weight = torch.minimum(torch.maximum(ratio, low), high).expand(B, T).clone()
    assert (weight != ratio).any()
    if level == "token":
        weight[1, 2] = 0.0
    per_token = -(d["logp"] - d["logp_old"]).exp() * d["advantages"] * weight * d["mask"]
    assert_same(out.loss, per_token.sum() / sum(LENGTHS), d["logp"])


def test_where_the_policy_draws_by_itself_a_weight_is_one_and_goes() -> None:
    rule = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.2, "act": "truncate"}
    objective = mirrorpo.objective("dapo", regions=[rule])
    assert objective.needs == {"old", "sampler"}
    assert objective.drawn_by_policy().rules == ()
