"""Every preset against its paper's loss, re-derived here as naive tensors, and every override."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES, ESTIMATORS
from mirrorpo.losses import keys
from mirrorpo.losses.advantages import ADVANTAGES as ADVANTAGE_NAMES
from mirrorpo.losses.aggregation import AGGREGATIONS as AGGREGATION_NAMES
from mirrorpo.losses.anchors import ANCHORS as ANCHOR_NAMES
from mirrorpo.losses.future_kl import FutureKL
from mirrorpo.losses.presets import OVERRIDES, PRESETS, described
from mirrorpo.losses.regions import REGIONS as REGION_NAMES
from mirrorpo.losses.surrogates import SURROGATES
from naive import logits

B, T, LENGTH = 5, 8, 11
Data = dict[str, torch.Tensor]


def batch(seed: int = 4, scale: float = 0.5) -> Data:
    logp_old = -4.0 * logits(B, T, seed=seed).abs() - 0.05
    return {
        "logp": (logp_old + scale * logits(B, T, seed=seed + 1)).clamp(max=-1e-4).requires_grad_(),
        "logp_old": logp_old,
        "logp_ref": (logp_old + scale * logits(B, T, seed=seed + 2)).clamp(max=-1e-4),
        "logp_sampler": (logp_old + 0.3 * scale * logits(B, T, seed=seed + 4)).clamp(max=-1e-4),
        "logp_teacher": (logp_old + scale * logits(B, T, seed=seed + 5)).clamp(max=-1e-4),
        "advantages": logits(B, seed=seed + 3),
        "mask": (torch.arange(T) < torch.tensor([[8], [5], [3], [1], [7]])).double(),
    }


def sequence_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def token_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def constant(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / (B * LENGTH)


def ratio_and_advantage(d: Data) -> tuple[torch.Tensor, torch.Tensor]:
    return (d["logp"] - d["logp_old"]).exp(), d["advantages"].unsqueeze(1)


def clipped(d: Data, low: float, high: float) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    return -torch.min(w * a, w.clamp(low, high) * a)


def sequence_clipped(d: Data) -> torch.Tensor:
    u = ((d["logp"] - d["logp_old"]) * d["mask"]).sum(-1) / d["mask"].sum(-1)
    s, a = u.exp(), d["advantages"]
    return -torch.min(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a).mean()


def k3(d: Data) -> torch.Tensor:
    r = d["logp_ref"] - d["logp"]
    return r.exp() - r - 1


def prob_l2(d: Data) -> torch.Tensor:
    return (d["logp"].exp() - d["logp_ref"].exp()) ** 2


def gmpo(d: Data) -> torch.Tensor:
    # arXiv 2507.20673, Algorithm 1: clip per token in log space on the side of the advantage, then the geometric mean
    u, sign = d["logp"] - d["logp_old"], torch.sign(d["advantages"]).unsqueeze(1)
    held = sign * torch.min(sign * u, sign * u.clamp(-0.4, 0.4))
    return -(((held * d["mask"]).sum(-1) / d["mask"].sum(-1)).exp() * d["advantages"]).mean()


def regression(d: Data, anchor: str, tau: float) -> torch.Tensor:
    total, n = ((d["logp"] - d[anchor]) * d["mask"]).sum(-1), d["mask"].sum(-1)
    return ((d["advantages"] - tau * total) ** 2 / (2 * tau * n)).mean()


def dppo(d: Data, value: torch.Tensor, radius: float) -> torch.Tensor:
    # arXiv 2602.04879, Eqs. 11 and 12, around the policy that sampled
    w, a = (d["logp"] - d["logp_sampler"]).exp(), d["advantages"].unsqueeze(1)
    outward = ((w > 1) & (a > 0)) | ((w < 1) & (a < 0))
    keep = ~((value > radius) & outward)
    return constant(-keep.double() * w.clamp(max=20.0).detach() * a * d["logp"], d["mask"])


def dppo_tv(d: Data) -> torch.Tensor:
    return dppo(d, (d["logp"].exp() - d["logp_sampler"].exp()).abs().detach(), 0.15)


def dppo_kl(d: Data) -> torch.Tensor:
    p, b = d["logp"].exp().detach(), d["logp_sampler"].exp()
    return dppo(d, b * (b / p).log() + (1 - b) * ((1 - b) / (1 - p)).log(), 0.05)


def cispo(d: Data) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    return token_mean(-torch.clamp(w, max=5.0).detach() * a * d["logp"], d["mask"])


def sapo(d: Data) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    tau = torch.tensor([1.05, 1.0], dtype=torch.float64)[(a > 0).long()]
    return sequence_mean(-torch.sigmoid(tau * (w - 1)) * 4 / tau * a, d["mask"])


def fipo(d: Data) -> torch.Tensor:
    u, gamma = (d["logp"] - d["logp_old"]).detach(), 2 ** (-1 / 32)
    w, a = ratio_and_advantage(d)
    factor = torch.ones_like(u)
    for i in range(B):
        for t in range(T):
            entering = [j for j in range(t, T) if d["mask"][i, j] and u[i, j].exp() <= 10]
            future = sum(gamma ** (j - t) * u[i, j].item() for j in entering)
            unsafe = d["advantages"][i] < 0 and u[i, t].exp() > 4
            low, high = (0.8, 1.0) if unsafe else (1.0, 1.2)
            factor[i, t] = min(max(math.exp(future), low), high)
    a = a * factor
    gain = torch.min(w * a, w.clamp(0.8, 1.28) * a)
    return token_mean(-torch.where(a < 0, torch.max(gain, 10.0 * a), gain), d["mask"])


def spo(d: Data) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    return token_mean(-w * a + a.abs() / (2 * 0.2) * (w - 1) ** 2, d["mask"])  # arXiv 2401.16025


def drpo(d: Data) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    return constant(-w * a + a.abs() / (2 * 12.5) * d["logp_old"].exp() * (w - 1) ** 2, d["mask"])


def dcpo(d: Data) -> torch.Tensor:
    w, a = ratio_and_advantage(d)
    b = d["logp_old"].exp()
    low = 0.5 + 0.5 * (1 - 4 * 0.16 / b).clamp(min=0).sqrt()  # arXiv 2509.02333
    high = 0.5 + 0.5 * (1 + 4 * 0.2 / b).sqrt()
    return token_mean(-torch.min(w * a, torch.max(torch.min(w, high), low) * a), d["mask"])


def icepop(d: Data) -> torch.Tensor:
    # arXiv 2510.18855: M(old / sampler) min(r A, clip(r) A) with M(k) = k inside [0.5, 5], else 0
    r, a = ratio_and_advantage(d)
    k = (d["logp_old"] - d["logp_sampler"]).exp()
    kept = ((k >= 0.5) & (k <= 5.0)).double() * k
    return sequence_mean(-kept * torch.min(r * a, r.clamp(0.8, 1.2) * a), d["mask"])


def opsm(d: Data) -> torch.Tensor:
    # arXiv 2512.02556: out where A < 0 and the mean of log sampler / policy exceeds the threshold; the penalty is kept
    drift = ((d["logp_sampler"] - d["logp"]).detach() * d["mask"]).sum(-1) / d["mask"].sum(-1)
    kept = ~((d["advantages"] < 0) & (drift > 0.1)).unsqueeze(1)
    w, _ = ratio_and_advantage(d)
    return sequence_mean(clipped(d, 0.8, 1.2) * kept.double() + 0.04 * w * k3(d), d["mask"])


def opd(d: Data) -> torch.Tensor:
    # the value of k3 with the gradient of log p - log teacher as a reward, both weighted by p / b
    r = d["logp_teacher"] - d["logp"]
    w = (d["logp"] - d["logp_old"]).exp().detach()
    gradient = w * -r.detach() * (d["logp"] - d["logp"].detach())
    return token_mean((r.exp() - r - 1).detach() + gradient, d["mask"])


def kl3_bounds() -> tuple[float, float]:
    """w - 1 - log w = 0.03, by bisection on each side."""
    found = []
    for inside, outside in ((1.0, 1e-6), (1.0, 10.0)):
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if middle - 1 - math.log(middle) < 0.03 else (inside, middle)
        found.append(inside)
    return found[0], found[1]


LOSSES: dict[str, Callable[[Data], torch.Tensor]] = {
    "grpo": lambda d: sequence_mean(clipped(d, 0.8, 1.2) + 0.04 * k3(d), d["mask"]),
    "dr_grpo": lambda d: constant(clipped(d, 0.8, 1.2), d["mask"]),
    "dapo": lambda d: token_mean(clipped(d, 0.8, 1.28), d["mask"]),
    "gspo": sequence_clipped,
    "atr_grpo": lambda d: sequence_mean(clipped(d, *kl3_bounds()), d["mask"]),
    "prob_l2_grpo": lambda d: constant(clipped(d, 0.8, 1.2) + 1e-4 * prob_l2(d), d["mask"]),
    "prob_l2_gspo": lambda d: sequence_clipped(d) + sequence_mean(1e-4 * prob_l2(d), d["mask"]),
    "prob_l2_kl_grpo": lambda d: constant(clipped(d, 0.8, 1.2) + 1e-4 * prob_l2(d) + 0.04 * k3(d), d["mask"]),
    "log_l2_grpo": lambda d: constant(clipped(d, 0.8, 1.2) + 1e-4 * (d["logp"] - d["logp_ref"]) ** 2, d["mask"]),
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "fipo": fipo,
    "spo": spo,
    "drpo": drpo,
    "dcpo": dcpo,
    "icepop": icepop,
    "opsm": opsm,
    "opmd": lambda d: regression(d, "logp_old", 0.01),
    "a_star_po": lambda d: regression(d, "logp_ref", 1e-3),
    "opd": opd,
}
# the learned maps have a test file of their own
NEURAL = {"nm_grpo", "nm_gspo", "nm_grpo_es", "nm_gspo_es"}


def loss(objective: mirrorpo.Objective, d: Data) -> torch.Tensor:
    return objective(**d, max_completion_length=LENGTH).loss


def assert_same(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    one, other = (torch.autograd.grad(value, x)[0] for value in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_every_preset_has_a_loss_here() -> None:
    assert set(PRESETS) - NEURAL == set(LOSSES)


def test_the_widest_batch_reaches_every_cap() -> None:
    d = batch(scale=8.0)
    w, a = ratio_and_advantage(d)
    kept = d["mask"] > 0
    assert (kept & (w > 20) & (a < 0)).any()
    assert (kept & (w > 20) & (a > 0)).any()


@pytest.mark.parametrize("scale", [0.02, 0.5, 2.5, 8.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_preset_is_its_papers_loss(name: str, scale: float) -> None:
    d = batch(scale=scale)
    assert_same(loss(mirrorpo.objective(name), d), LOSSES[name](d), d["logp"])


ADVANTAGES = {
    "dr_grpo": (
        *("dr_grpo", "prob_l2_grpo", "prob_l2_gspo", "prob_l2_kl_grpo", "log_l2_grpo", "dppo_tv", "dppo_kl", "drpo"),
        "opmd",
    ),
    "soft_value": ("a_star_po",),
    "grpo": (*("grpo", "dapo", "gspo", "atr_grpo", "cispo", "sapo", "gmpo", "fipo", "spo", "dcpo", "icepop", "opsm"),),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ADVANTAGES.items() for name in names])
def test_a_preset_names_the_advantages_of_its_paper(kind: str, name: str) -> None:
    assert mirrorpo.objective(name).advantage == kind


def test_every_part_can_be_overridden() -> None:
    d = batch()
    x = d["logp"]
    cases: list[tuple[str, dict[str, Any], torch.Tensor]] = [
        ("grpo", {"coefficient": 0.5}, sequence_mean(clipped(d, 0.8, 1.2) + 0.5 * k3(d), d["mask"])),
        ("grpo", {"coefficient": 0}, sequence_mean(clipped(d, 0.8, 1.2), d["mask"])),
        ("grpo", {"divergence": "prob_l2"}, sequence_mean(clipped(d, 0.8, 1.2) + 0.04 * prob_l2(d), d["mask"])),
        ("dapo", {"epsilon_low": 0.1}, token_mean(clipped(d, 0.9, 1.28), d["mask"])),
        ("dapo", {"epsilon_high": 0.4}, token_mean(clipped(d, 0.8, 1.4), d["mask"])),
        ("dapo", {"aggregation": "constant"}, constant(clipped(d, 0.8, 1.28), d["mask"])),
        ("dapo", {"divergence": "k3", "coefficient": 0.1}, LOSSES["dapo"](d) + 0.1 * token_mean(k3(d), d["mask"])),
        ("atr_grpo", {"region": "chi2", "radius": 0.09}, sequence_mean(clipped(d, 0.7, 1.3), d["mask"])),
        ("dapo", {"region": {"name": "tv", "radius": 0.1}}, token_mean(clipped(d, 0.8, 1.2), d["mask"])),
        ("gspo", {"level": "token"}, sequence_mean(clipped(d, 1 - 3e-4, 1 + 4e-4), d["mask"])),
        ("prob_l2_kl_grpo", {"coefficient": [0, 0.04]}, constant(clipped(d, 0.8, 1.2) + 0.04 * k3(d), d["mask"])),
        ("dapo", {"surrogate": "truncated", "ratio_cap": 5.0, "region": "none"}, cispo(d)),
    ]
    for preset, overrides, expected in cases:
        assert_same(loss(mirrorpo.objective(preset, **overrides), d), expected, x)


def test_overrides_that_are_not_tensors_of_the_loss_reach_the_objective() -> None:
    assert mirrorpo.objective("grpo", advantage="rloo").advantage == "rloo"
    assert mirrorpo.objective("grpo", estimator="top_k", k=5).penalties[0].k == 5
    assert mirrorpo.objective("sapo", temperature_positive=2.0).options == {
        "temperature_positive": 2.0,
        "temperature_negative": 1.05,
    }
    assert mirrorpo.objective("grpo", divergence={"name": "beta", "beta": 0.5}).penalties[0].divergence.name == "beta"
    assert set(OVERRIDES) >= {
        "coefficient",
        "radius",
        "epsilon_low",
        "epsilon_high",
        "estimator",
        "divergence",
        "region",
    }


def test_the_dual_clip_bound_of_fipo_is_also_the_one_of_its_weighting() -> None:
    objective = mirrorpo.objective("fipo", dual_clip=3.0)
    assert objective.options["dual_clip"] == 3.0
    assert objective.future_kl is not None
    assert objective.future_kl.max_ratio == 3.0


def test_future_kl_weighting_goes_on_top_of_any_objective_and_off_again() -> None:
    objective = mirrorpo.objective("grpo", future_kl={"lower_bound": True, "half_life": 8.0})
    assert objective.future_kl == FutureKL(lower_bound=True, half_life=8.0)
    assert mirrorpo.objective("grpo", future_kl=True).future_kl == FutureKL()
    assert mirrorpo.objective("fipo", future_kl=False).future_kl is None
    assert mirrorpo.objective("fipo", future_kl={"max_ratio": 4.0}).future_kl == FutureKL(max_ratio=4.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "true, false or a mapping"),
        ({"halflife": 3}, "did you mean 'half_life'"),
        ({"half_life": 0.5}, "half_life must be a number in"),
    ],
)
def test_a_bad_future_kl_setting_is_refused_with_the_legal_values(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirrorpo.objective("fipo", future_kl=value)


def test_two_penalties_of_one_divergence_have_metrics_of_their_own() -> None:
    divergence = [{"name": "alpha", "alpha": 0.3}, {"name": "alpha", "alpha": 2.0}]
    objective = mirrorpo.objective("dr_grpo", divergence=divergence, coefficient=[0.1, 0.1])
    metrics = objective(**batch(), max_completion_length=LENGTH).metrics
    assert metrics["divergence/alpha/mean"] != metrics["divergence/alpha_2/mean"]


def test_an_objective_is_built_from_a_name_a_mapping_or_itself() -> None:
    d = batch()
    built = mirrorpo.objective("prob_l2_grpo", coefficient=1e-3)
    assert mirrorpo.objective_from(built) is built
    assert loss(mirrorpo.objective_from("dapo"), d) == loss(mirrorpo.objective("dapo"), d)
    from_mapping = mirrorpo.objective_from({"preset": "prob_l2_grpo", "coefficient": 1e-3})
    assert loss(from_mapping, d) == loss(built, d)


BAD = [
    ("gropo", {}, ("unknown objective preset 'gropo'", "did you mean 'grpo'", "Legal: ")),
    ("grpo", {"coeficient": 1.0}, ("unknown objective key 'coeficient'", "did you mean 'coefficient'")),
    ("grpo", {"coefficient": -0.1}, ("coefficient", "-0.1", "[0, 1e+06]")),
    ("grpo", {"coefficient": float("nan")}, ("coefficient", "nan", "[0, 1e+06]")),
    ("grpo", {"coefficient": "0.1"}, ("coefficient", "'0.1'", "number")),
    ("grpo", {"estimator": "samplde"}, ("unknown estimator 'samplde'", "did you mean 'sampled'", "weighted")),
    ("grpo", {"divergence": "reverse-kl"}, ("unknown divergence 'reverse-kl'", "did you mean 'reverse_kl'")),
    ("grpo", {"divergence": {"beta": 1.0}}, ("divergence", "'name'", "beta")),
    ("grpo", {"region": "kl4", "radius": 0.1}, ("unknown region 'kl4'", "did you mean 'kl")),
    ("grpo", {"region": "kl3"}, ("kl3", "radius", "(0, 1e+06]")),
    ("grpo", {"region": {"radius": 0.1}}, ("region", "'name'", "radius")),
    ("grpo", {"region": {"name": "kl3", "radius": 0.1}, "radius": 0.2}, ("radius", "twice", "0.1", "0.2")),
    ("grpo", {"radius": 0.1}, ("region 'ratio'", "'radius'", "epsilon_high, epsilon_low")),
    ("atr_grpo", {"epsilon_low": 0.1}, ("region 'kl3'", "'epsilon_low'", "radius")),
    ("atr_grpo", {"radius": 0.0}, ("radius", "0.0", "(0, 1e+06]")),
    ("cispo", {"epsilon_low": 0.1}, ("region 'none'", "'epsilon_low'", "no options")),
    ("grpo", {"level": "batch"}, ("unknown level 'batch'", "sequence, token")),
    ("grpo", {"advantage": "drgrpo"}, ("unknown advantage 'drgrpo'", "did you mean 'dr_grpo'")),
    ("grpo", {"aggregation": "mean"}, ("unknown aggregation 'mean'", "sequence_mean")),
    ("grpo", {"surrogate": "clipped"}, ("unknown surrogate 'clipped'", "did you mean 'clip'")),
    ("grpo", {"k": 5}, ("k", "no effect", "top_k")),
    ("grpo", {"estimator": "top_k", "k": 0}, ("k", ">= 1", "0")),
    ("dapo", {"coefficient": 0.1}, ("'dapo'", "no penalty", "coefficient", "divergence")),
    ("dapo", {"estimator": "score"}, ("'dapo'", "no penalty", "estimator")),
    ("dapo", {"divergence": "kl"}, ("'dapo'", "coefficient", "divergence")),
    ("prob_l2_kl_grpo", {"coefficient": 0.1}, ("coefficient", "list of 2", "0.1")),
    ("prob_l2_kl_grpo", {"coefficient": [0.1]}, ("coefficient", "2 penalties", "[0.1]")),
    ("grpo", {"ratio_cap": 5.0}, ("ratio_cap", "no effect", "'clip'")),
    ("grpo", {"temperature_positive": 2.0}, ("temperature_positive", "no effect", "'clip'")),
    ("cispo", {"dual_clip": 5.0}, ("dual_clip", "no effect", "'truncated'")),
    ("grpo", {"dual_clip": 0.5}, ("dual_clip", "0.5", "(1, 1e+06]")),
    ("cispo", {"ratio_cap": float("inf")}, ("ratio_cap", "inf", "(1, 1e+06]")),
    ("gspo", {"region": "binary_kl", "radius": 0.1}, ("level 'sequence'", "binary_kl")),
    ("gspo", {"region": "exact", "radius": 0.1}, ("level 'sequence'", "exact")),
    ("gmpo", {"level": "sequence"}, ("level 'sequence'", "'geometric'")),
    ("gmpo", {"region": "exact", "radius": 0.1}, ("'geometric'", "bounds", "'exact'")),
    ("sapo", {"region": "kl3", "radius": 0.1}, ("'kl3'", "no effect", "'sigmoid'")),
    ("grpo", {"surrogate": "naive:nothing"}, ("surrogate 'naive:nothing'", "no attribute")),
    ("grpo", {"surrogate": "naive:BETAS"}, ("surrogate must be a name", "naive:BETAS")),
    ("grpo", {"surrogate": 3}, ("surrogate must be a name", "3")),
]


@pytest.mark.parametrize(("preset", "overrides", "words"), BAD, ids=[f"{row[0]} {row[1]}" for row in BAD])
def test_bad_overrides_are_named_with_what_is_legal(
    preset: str, overrides: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        mirrorpo.objective(preset, **overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_mapping_without_a_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs the key 'preset', got \['coefficient'\]. Legal: .*grpo"):
        mirrorpo.objective_from({"coefficient": 0.1})


@pytest.mark.parametrize("nothing", [None, "none", "None"])
@pytest.mark.parametrize("preset", ["grpo", "prob_l2_kl_grpo", "dapo"])
def test_a_divergence_of_none_removes_the_penalty(preset: str, nothing: str | None) -> None:
    chosen = mirrorpo.objective(preset, divergence=nothing)
    assert chosen.penalties == ()
    with pytest.raises(ValueError, match="no penalty, so coefficient has no effect"):
        mirrorpo.objective(preset, divergence=nothing, coefficient=0.1)


def test_an_objective_remembers_what_it_was_asked_for_until_it_is_changed_by_hand() -> None:
    chosen = mirrorpo.objective("dapo", epsilon_high=0.3)
    assert chosen.spec == {"preset": "dapo", "epsilon_high": 0.3}
    assert dataclasses.replace(chosen, level="sequence").spec is None


def test_off_which_yaml_reads_as_false_removes_a_part() -> None:
    assert mirrorpo.objective("grpo", region=False) == mirrorpo.objective("grpo", region="none")
    assert mirrorpo.objective("grpo", divergence=False) == mirrorpo.objective("grpo", divergence="none")


def test_the_types_of_the_keys_are_the_names_of_the_tables() -> None:
    for literal, table in (
        (keys.PresetName, PRESETS),
        (keys.DivergenceName, DIVERGENCES),
        (keys.RegionName, REGION_NAMES),
        (keys.EstimatorName, ESTIMATORS),
        (keys.AdvantageName, ADVANTAGE_NAMES),
        (keys.AnchorName, ANCHOR_NAMES),
        (keys.AggregationName, AGGREGATION_NAMES),
        (keys.SurrogateName, SURROGATES),
    ):
        assert sorted(get_args(literal)) == sorted(table)
    assert sorted(keys.ObjectiveKeys.__annotations__) == sorted(OVERRIDES)


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ({"preset": "grpoo"}, True),
        ({"preset": None}, True),
        ({"preset": "dapo", "regoin": "kl3"}, True),
        ({"preset": "dapo", "region": "kl4"}, True),
        ({"preset": "dapo", "region": "Ratio"}, True),
        ({"preset": "grpo", "divergence": "reverse_lk"}, True),
        ({"preset": "grpo", "advantage": "rlo"}, True),
        ({"preset": "grpo", "advantage": ["rloo"]}, True),
        ({"preset": "grpo", "aggregation": "mean"}, True),
        ({"preset": "grpo", "coefficient": -2}, True),
        ({"preset": "grpo", "coefficient": float("nan")}, True),
        ({"preset": "grpo", "coefficient": True}, True),
        ({"preset": "atr_grpo", "radius": 0}, True),
        ({"preset": "atr_grpo", "radius": 2_000_000}, True),
        ({"preset": "grpo", "region": "none", "divergence": "None"}, False),
        ({"preset": "dapo", "region": "js", "radius": 0.1}, False),
        ({"preset": "grpo", "divergence": "k3", "region": False, "advantage": None}, False),
        ({"preset": "dapo", "surrogate": "builtins:abs", "my_option": 3}, False),
        ({"preset": "grpo", "divergence": "numpy:sum"}, False),
        *(
            ({"preset": "grpo", key: "words"}, True)
            for key in ("behaviour", "estimator", "level", "placement", "surrogate")
        ),
        ({"preset": "grpo", "penalties": [{"divergence": "jjs", "coefficient": 0.1}]}, True),
        ({"preset": "grpo", "penalties": [{"divergence": "js", "coefficient": -1}]}, True),
        ({"preset": "grpo", "penalties": [{"divergence": "js", "coefficient": 1, "anchor": "techer"}]}, True),
        ({"preset": "grpo", "penalties": [{"divergence": "js", "coefficient": 1, "estimator": "score"}]}, False),
        ({"preset": "grpo", "regions": [{"name": "kl4", "radius": 0.1}]}, True),
        ({"preset": "grpo", "regions": [{"name": "kl3", "radius": -0.1}]}, True),
        ({"preset": "grpo", "regions": [{"name": "kl3", "radius": 0.1, "act": "clap"}]}, True),
        ({"preset": "grpo", "regions": [{"name": "kl3", "radius": 0.1, "side": "left"}]}, True),
        ({"preset": "grpo", "region": {"name": "kl4"}}, True),
        ({"preset": "grpo", 1: "a", "zz": 2}, True),
        ({"preset": "dapo", "coefficient": False}, False),
        ({"preset": "dapo", "regions": [{"name": "numpy:region", "radius": 0.1, "baseline": "running"}]}, False),
        ({"preset": "grpo", "coefficient": 10**400}, True),
        ({"preset": "grpo", "divergence": {"name": "alfa", "alpha": 2}}, True),
        (
            {
                "preset": "icepop",
                "regions": [{"name": "ratio", "epsilon_low": 0.5, "anchor": "sampler", "act": "mask"}],
            },
            False,
        ),
        *(({"preset": preset}, False) for preset in PRESETS),
    ],
)
def test_a_misspelt_name_is_refused_without_torch_in_the_words_of_the_builder(
    spec: dict[str, Any], wrong: bool
) -> None:
    if not wrong:
        described(spec)
        return
    with pytest.raises(ValueError, match=r"unknown|must be a number") as quick:
        described(spec)
    with pytest.raises(ValueError, match=r"unknown|must be a number") as whole:
        mirrorpo.objective_from(spec)
    assert str(quick.value) == str(whole.value)


def test_a_type_checker_marks_a_misspelt_key_and_an_unknown_estimator(tmp_path: Path) -> None:
    lines = (
        "import mirrorpo",
        'mirrorpo.objective("dapo", regoin="kl3")',
        'mirrorpo.objective("dapo", estimator="scor")',
        'mirrorpo.objective("dapo", region={"name": "kl3", "radius": 0.03}, divergence="js", estimator="score")',
        'mirrorpo.objective("dr_grpo", divergence=lambda x: x**3, coefficient=[0.1], future_kl=True)',
    )
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    settings = {"extraPaths": [str(Path(mirrorpo.__file__).parents[1])], "reportMissingImports": True}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [(one["range"]["start"]["line"], one["message"]) for one in found if one["severity"] == "error"]
    assert [line for line, _ in errors] == [1, 2], found
    assert "regoin" in errors[0][1]
    assert "scor" in errors[1][1]
