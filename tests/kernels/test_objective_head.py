"""Loss, metrics and gradients from hidden states against float64 autograd on full logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import mirrorpo
from kernels_batch import Batch, batch, converted, distance, gradients
from mirrorpo.kernels import Anchor, Head, objective_from_hidden
from mirrorpo.losses.surrogates import SURROGATES
from naive import logits

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale and temperature": {"scale": 0.5, "temperature": 0.7},
    "soft cap, scale, bias": {"bias": True, "softcap": 2.0, "scale": 1.5, "temperature": 0.7},
}
TEACHER = {"coefficient": 0.3, "anchor": "teacher"}
TEACHER = {"coefficient": 0.3, "anchor": "teacher"}
# Every surrogate, level and estimator; regions with an interval, per token and over the vocabulary.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"preset": "grpo"},
    "dual clip": {"preset": "dapo", "dual_clip": 3.0},
    "truncated": {"preset": "cispo"},
    "sigmoid": {"preset": "sapo"},
    "per-token region": {"preset": "dppo_kl", "radius": 0.002},
    "constant, two penalties": {"preset": "prob_l2_kl_grpo", "coefficient": [0.5, 0.04]},
    "weighted": {"preset": "grpo", "divergence": "js", "coefficient": 0.3, "estimator": "weighted"},
    "score": {"preset": "grpo", "divergence": "prob_l2", "coefficient": 0.3, "estimator": "score"},
    "exact": {"preset": "grpo", "coefficient": 0.3, "estimator": "exact"},
    "exact neural": {"preset": "nm_grpo", "coefficient": 30.0, "estimator": "exact"},
    "top_k": {"preset": "dapo", "divergence": "js", "coefficient": 0.3, "estimator": "top_k", "k": 3},
    "exact and sampled": {
        "preset": "prob_l2_kl_grpo",
        "coefficient": [0.5, 0.04],
        "estimator": ["exact", "sampled"],
    },
    "exact region": {"preset": "grpo", "region": {"name": "exact", "radius": 0.05}},
    "top_k region, exact penalty": {
        "preset": "dapo",
        "region": {"name": "top_k", "radius": 0.05, "k": 3},
        "divergence": "prob_l2",
        "coefficient": 0.3,
        "estimator": "exact",
    },
    "penalty in the reward": {"preset": "grpo", "placement": "reward"},
    "sequence level": {"preset": "gspo"},
    "sequence level, exact": {"preset": "prob_l2_gspo", "coefficient": 0.3, "estimator": "exact"},
    "geometric": {"preset": "gmpo"},
    "geometric under another name": {"preset": "gmpo", "surrogate": replace(SURROGATES["geometric"], name="mine")},
    "a function that may couple the tokens": {"preset": "gmpo", "surrogate": SURROGATES["geometric"].fn},
    "regression": {"preset": "opmd", "tau": 0.3},
    "regression toward the reference": {"preset": "a_star_po", "tau": 0.3},
    "future KL": {"preset": "fipo"},
    "sampler": {"preset": "dppo_kl"},
    "mask around the sampler": {"preset": "icepop"},
    "mask of sequences": {"preset": "opsm"},
    "mask by a mean divergence": {
        "preset": "dapo",
        "regions": [{"name": "js", "radius": 0.05, "act": "mask", "anchor": "sampler", "level": "mean_divergence"}],
    },
    "truncated, products": {"preset": "cispo", "level": "product", "behaviour": "sampler"},
    "weights of tokens": {"preset": "dapo", "regions": [{"name": "kl3", "radius": 0.1, "act": "truncate"}]},
    "weights of products": {
        "preset": "dapo",
        "regions": [{"name": "ratio", "epsilon_low": 0.2, "act": "truncate", "level": "product"}],
    },
    "mask of products": {
        "preset": "dapo",
        "behaviour": "sampler",
        "regions": [{"name": "kl3", "radius": 0.5, "act": "mask", "level": "product"}],
    },
    "soft": {"preset": "spo"},
    "soft, around the sampler": {"preset": "drpo", "behaviour": "sampler"},
    "product level": {"preset": "gspo", "level": "product", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "teacher": {"preset": "opd"},
    "teacher, exact baselines": {
        "preset": "dapo",
        "penalties": [
            {**TEACHER, "divergence": "prob_l2", "placement": "advantage", "baseline": "exact"},
            {**TEACHER, "divergence": "js", "estimator": "exact"},
            {"divergence": "reverse_kl", "coefficient": 0.5, "estimator": "score", "baseline": "exact"},
        ],
    },
    "teacher, exact": {
        "preset": "dapo",
        "penalties": [
            {"divergence": "js", "coefficient": 0.3, "anchor": "teacher", "estimator": "exact"},
            {"divergence": "kl", "coefficient": 0.1, "anchor": "reference", "estimator": "top_k", "k": 3},
            {"divergence": "reverse_kl", "coefficient": 0.1, "anchor": "old", "estimator": "exact"},
        ],
    },
    "penalties in the advantage, toward the sampler and uniform": {
        "preset": "dr_grpo",
        "penalties": [
            {"divergence": "reverse_kl", "coefficient": 0.5, "anchor": "teacher", "placement": "advantage"},
            {"divergence": "js", "coefficient": 0.1, "anchor": "sampler", "estimator": "weighted"},
            {"divergence": "kl", "coefficient": 0.1, "anchor": "uniform", "estimator": "score"},
        ],
    },
    "uniform, exact": {
        "preset": "dapo",
        "penalties": [
            {"divergence": "kl", "coefficient": 0.2, "anchor": "uniform", "estimator": "exact"},
            {"divergence": "js", "coefficient": 0.2, "anchor": "uniform", "estimator": "exact"},
        ],
    },
    "supports of top_k": {
        "preset": "gspo",
        "penalties": [
            {
                "divergence": name,
                "coefficient": 0.3,
                "anchor": anchor,
                "estimator": "top_k",
                "k": 3,
                "support": support,
            }
            for name, anchor, support in (
                ("reverse_kl", "teacher", "policy"),
                ("js", "teacher", "union"),
                ("prob_l2", "reference", "policy"),
                ("kl", "reference", "union"),
            )
        ],
    },
    "region over the vocabulary around the reference, as a mask": {
        "preset": "grpo",
        "regions": [
            {"name": "exact", "radius": 0.05},
            {"name": "top_k", "radius": 0.3, "k": 3, "anchor": "reference", "act": "mask"},
        ],
    },
}


def made(spec: dict[str, Any]) -> mirrorpo.Objective:
    return mirrorpo.objective_from(spec)


def fused(objective: mirrorpo.Objective, b: Batch, **changes: Any) -> mirrorpo.Output:
    given = {"reference": b.reference, "rollout": b.rollout, "teacher": b.teacher, "chunk": 4} | b.shared() | changes
    return objective_from_hidden(objective, b.hidden, b.head, b.tokens, **given)[0]


def assert_equal(got: mirrorpo.Output, expected: mirrorpo.Output, tolerance: float) -> None:
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance, abs=tolerance)
    assert got.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert got.metrics[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_metrics_and_gradients_are_those_of_full_logits(name: str, head: str) -> None:
    objective, b = made(OBJECTIVES[name]), batch(**HEADS[head])
    expected, got = b.plain(objective), fused(objective, b)
    assert_equal(got, expected, 1e-10)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_is_within_1e_5_of_the_float64_truth(name: str) -> None:
    objective, truth = made(OBJECTIVES[name]), batch(bias=True)
    b = converted(truth, torch.float32)
    expected, got = truth.plain(objective), fused(objective, b)
    assert_equal(got, expected, 1e-5)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, truth.leaves)) < 1e-5


@pytest.mark.parametrize("lengths", [(5,), (1, 1), (0, 4), (0,)])
@pytest.mark.parametrize("name", ["clip", "exact", "sequence level", "top_k region, exact penalty"])
def test_one_completion_single_tokens_and_empty_ones(name: str, lengths: tuple[int, ...]) -> None:
    objective, b = made(OBJECTIVES[name]), batch(lengths)
    expected, got = b.plain(objective), fused(objective, b)
    assert_equal(got, expected, 1e-10)
    assert got.loss.requires_grad
    grads, truth = gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)
    for one, other in zip(grads, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["clip", "exact", "sequence level"])
@pytest.mark.parametrize("kind", ["per token", "per completion", "function"])
def test_weights_on_the_policy_term(name: str, kind: str) -> None:
    objective, b = made(OBJECTIVES[name]), batch()
    weight = logits(*b.mask.shape, seed=11)
    weight = weight[:, :1] if kind == "per completion" else weight

    def of_found(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        assert not logp.requires_grad
        return weight * (1.0 + entropy)

    if kind == "function":
        of_all = b.head.logits(b.hidden).log_softmax(-1)
        entropy = b.padded(-(of_all.exp() * of_all).sum(-1)).detach()
        expected, got = b.plain(objective, weight=weight * (1.0 + entropy)), fused(objective, b, weight=of_found)
    else:
        expected, got = b.plain(objective, weight=weight), fused(objective, b, weight=weight)
    assert_equal(got, expected, 1e-10)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-9


@pytest.mark.parametrize("name", ["clip", "exact", "sequence level"])
def test_an_entropy_bonus_joins_the_loss(name: str) -> None:
    objective, b = made(OBJECTIVES[name]), batch()
    of_all = b.head.logits(b.hidden).log_softmax(-1)
    expected = b.plain(objective).loss - 0.3 * -(of_all.exp() * of_all).sum(-1).mean()
    got = fused(objective, b, entropy_weight=-0.3)
    torch.testing.assert_close(got.loss, expected, rtol=1e-11, atol=1e-12)
    assert distance(gradients(got.loss, b.leaves), gradients(expected, b.leaves)) < 1e-9


def test_the_scale_of_the_penalties_the_tokens_of_a_step_and_a_schedule_arrive() -> None:
    for name in ("weighted", "exact"):
        objective, b = mirrorpo.objective_from(OBJECTIVES[name] | {"aggregation": "token_mean"}), batch()
        changes = {"penalty_scale": 3.0, "num_tokens": torch.tensor(17.5)}
        expected, got = b.plain(objective, **changes), fused(objective, b, **changes)
        assert_equal(got, expected, 1e-10)
        assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-9


def test_the_references_log_probabilities_come_with_its_hidden_states() -> None:
    objective, b = made(OBJECTIVES["exact"]), batch()
    assert_equal(fused(objective, b, logp_ref=None), b.plain(objective), 1e-10)


def test_results_are_laid_out_as_the_mask_is() -> None:
    objective, b = made(OBJECTIVES["clip"]), batch()
    _, logp, entropy = objective_from_hidden(objective, b.hidden, b.head, b.tokens, **b.shared())
    of_all = b.head.logits(b.hidden).log_softmax(-1).detach()
    torch.testing.assert_close(logp, b.logp(of_all), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, b.padded(-(of_all.exp() * of_all).sum(-1)), rtol=1e-12, atol=1e-12)


def test_what_is_missing_is_named() -> None:
    b = batch()
    for name, changes, message in (
        ("exact", {"reference": None}, "needs reference, got None: pass Anchor"),
        ("exact region", {"rollout": None}, "region 'exact' needs rollout"),
        ("clip", {"logp_ref": None}, "estimator 'sampled' needs logp_ref"),
        ("clip", {"mask": b.mask & (torch.arange(6) < 2)}, "mask keeps 5 tokens, hidden has 10 rows"),
        ("clip", {"weight": torch.zeros(3)}, r"weight must have shape \(4, 1\) or \(4, 6\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(made(OBJECTIVES[name]), b, **changes)


def test_a_nan_among_the_hidden_states_is_no_silence() -> None:
    b = batch()
    with torch.no_grad():
        b.hidden[3, 2] = torch.nan
    with pytest.raises(ValueError, match="logp must hold log-probabilities"):
        fused(made(OBJECTIVES["clip"]), b)


# A teacher that is known at K entries per position


def sparse(b: Batch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's K likeliest tokens; one entry is padding, one stands twice, the second time as padding."""
    found = b.padded(b.teacher.head.logits(b.teacher.hidden).log_softmax(-1)).detach().topk(k, -1)
    indices = torch.cat([found.indices, found.indices[..., :1], torch.zeros_like(found.indices[..., :1])], dim=-1)
    padding = torch.full_like(found.values[..., :1], -torch.inf)
    return indices, torch.cat([found.values, padding, padding * torch.nan], dim=-1)


@pytest.mark.parametrize("knows_tokens", [False, True])
@pytest.mark.parametrize("base", ["dapo", "gspo"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "prob_l2", "kl"])
def test_a_sparse_teacher_gives_the_loss_and_gradients_of_full_logits(
    divergence: str, base: str, knows_tokens: bool
) -> None:
    penalty = {"divergence": divergence, "coefficient": 0.5, "anchor": "teacher", "estimator": "top_k"}
    objective, b = mirrorpo.objective(base, penalties=[penalty]), batch(spread=0.3)
    given: dict[str, Any] = {"teacher_top": sparse(b, 4), "logp_teacher": None}
    if knows_tokens:
        given["logp_teacher"] = b.shared()["logp_teacher"]
    expected = b.plain(objective, **given, logits_teacher=None)
    got = fused(objective, b, **given, teacher=None)
    assert_equal(got, expected, 1e-10)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-9


def test_all_entries_of_a_teacher_are_the_teacher_itself() -> None:
    penalty = {"divergence": "js", "coefficient": 0.5, "anchor": "teacher"}
    b = batch()
    whole = mirrorpo.objective("dapo", penalties=[{**penalty, "estimator": "exact"}])
    entries = mirrorpo.objective("dapo", penalties=[{**penalty, "estimator": "top_k"}])
    expected = fused(whole, b)
    got = fused(entries, b, teacher=None, teacher_top=sparse(b, b.head.vocabulary))
    assert_equal(got, expected, 1e-9)
    assert distance(gradients(got.loss, b.leaves), gradients(expected.loss, b.leaves)) < 1e-8


def test_what_entries_cannot_give_is_refused() -> None:
    b = batch()
    top = sparse(b, 3)
    exact = {"divergence": "js", "coefficient": 0.5, "anchor": "teacher", "estimator": "exact"}
    with pytest.raises(ValueError, match="needs logits_teacher: teacher_top holds the teacher's own entries"):
        fused(mirrorpo.objective("dapo", penalties=[exact]), b, teacher=None, teacher_top=top)
    with pytest.raises(ValueError, match="teacher and teacher_top say the same twice"):
        fused(mirrorpo.objective("dapo", penalties=[exact]), b, teacher_top=top)
    region = {"name": "exact", "radius": 0.1, "anchor": "teacher"}
    with pytest.raises(ValueError, match="region 'exact' needs teacher, got teacher_top"):
        fused(mirrorpo.objective("dapo", regions=[region]), b, teacher=None, teacher_top=top)


@pytest.mark.parametrize("name", ["neural", "prob_l2", "js"])
def test_tensors_are_made_where_their_inputs_are_whatever_the_default_device(name: str) -> None:
    hidden, weight, tokens = logits(6, 8, seed=0), logits(17, 8, seed=1), torch.arange(6)

    def gradient() -> torch.Tensor:
        objective = mirrorpo.objective("grpo", divergence=name, estimator="exact", coefficient=0.5)
        leaf = hidden.float().requires_grad_()
        anchor = Anchor(hidden=hidden.float().flip(0), head=Head(weight.float()))
        given = {"advantages": tokens[:2].float(), "mask": tokens.view(2, 3) >= 0}
        output, *_ = objective_from_hidden(objective, leaf, Head(weight.float()), tokens, reference=anchor, **given)
        output.loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient()
    with torch.device("meta"):  # as torch.set_default_device("cuda"), on a machine that has none
        assert torch.equal(gradient(), expected)
