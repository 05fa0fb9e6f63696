"""The adapter, called as prime-rl documents its custom loss: arguments, shapes, normalisation."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mirrorpo
import prime_rl_call
from framework_batch import LENGTHS, PROMPTS, Batch, assert_same, batch, gradient
from mirrorpo.errors import InputError
from mirrorpo.integrations.__main__ import main
from mirrorpo.integrations.prime_rl import loss
from mirrorpo.losses.presets import PRESETS

BASE = {"advantage": "dr_grpo", "aggregation": "token_mean"}


def through(b: Batch, spec: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, metrics = prime_rl_call.step(loss, {"objective": spec}, **vars(b), lengths=LENGTHS, prompts=PROMPTS, **more)
    return total.detach(), gradient(total, b.logp), metrics


CARRIED = [name for name in PRESETS if name not in ("opd", "icepop")]  # a teacher; a mask of the old policy


@pytest.mark.parametrize("preset", CARRIED)
def test_every_preset_through_prime_rl_is_ours_called_directly(preset: str) -> None:
    spec = {"preset": preset, **BASE}
    b = batch()
    ours = mirrorpo.objective_from(spec)(**vars(b), logp_sampler=b.logp_old)
    value, slope, metrics = through(b, spec)
    assert_same((ours.loss.detach(), gradient(ours.loss, b.logp)), (value, slope))
    assert metrics["mirrorpo/ratio/mean"] > 0


def test_metrics_are_means_over_the_tokens_of_all_sequences() -> None:
    spec = {"preset": "dr_grpo", **BASE, "divergence": "js", "coefficient": 0.2}
    b = batch()
    assert len({int(n) for n in b.mask.sum(-1)}) > 1  # a mean over sequences would be another number
    ours = mirrorpo.objective_from(spec).terms(**vars(b), logp_sampler=b.logp_old).metrics()
    metrics = through(b, spec)[2]
    for name in ("ratio/mean", "clip/low/frac", "clip/high/frac", "divergence/js/mean"):
        torch.testing.assert_close(metrics[f"mirrorpo/{name}"], ours[name], check_dtype=False)


@pytest.mark.parametrize("estimator", ["sampled", "weighted", "score"])
def test_every_estimator_at_the_tokens_arrives(estimator: str) -> None:
    spec = {"preset": "dr_grpo", **BASE, "divergence": "js", "coefficient": 0.2, "estimator": estimator}
    b = batch()
    ours = mirrorpo.objective_from(spec)(**vars(b)).loss
    assert_same((ours.detach(), gradient(ours, b.logp)), through(b, spec)[:2])


def test_the_weights_of_the_component_multiply_the_tokens_and_a_weight_of_0_leaves_one_out() -> None:
    spec = {"preset": "dr_grpo", **BASE}
    b = batch()
    weights = (0.5 + torch.rand(b.mask.shape, dtype=torch.float64)) * b.mask
    weights[:, 1] = 0.0
    terms = mirrorpo.objective_from(spec).terms(**vars(b))
    ours = torch.where(b.mask.bool(), terms.loss * weights, 0.0).sum() / (weights != 0).sum()
    assert_same((ours.detach(), gradient(ours, b.logp)), through(b, spec, weights=weights)[:2])


def test_an_objective_file_a_table_and_a_text_mean_the_same(tmp_path: Path) -> None:
    spec = {"preset": "dr_grpo", **BASE, "region": {"name": "kl3", "radius": 0.03}}
    file = tmp_path / "objective.yaml"
    file.write_text("preset: dr_grpo\naggregation: token_mean\nregion: {name: kl3, radius: 0.03}\n")
    b = batch()
    values = [through(b, given)[0] for given in (spec, str(file), json.dumps(spec))]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"preset": "dr_grpo"}, "prime-rl cannot express aggregation 'constant'. Legal: token_mean"),
        ({"preset": "dapo"}, "prime-rl cannot express advantage 'grpo'. Legal: dr_grpo"),
        ({"preset": "dr_grpo", **BASE, "region": {"name": "top_k", "radius": 1.0}}, "cannot express region 'top_k'"),
        (
            {"preset": "dr_grpo", **BASE, "divergence": "js", "coefficient": 1.0, "placement": "reward"},
            "cannot express placement 'reward'.*Legal: placement advantage, loss; or train with TRL",
        ),
        (
            {"preset": "opd"},
            "cannot express penalty 'reverse_kl' with anchor 'teacher'.*Legal: old, reference, sampler",
        ),
        ({"preset": "icepop", **BASE}, "cannot express region 'ratio' of 'old'"),
        ({"preset": "dr_grpoo"}, "unknown objective preset"),
        ({"coefficient": 1.0}, "needs the key 'preset'"),
    ],
)
def test_what_prime_rl_cannot_express_is_named(
    spec: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=reason):
        through(batch(), spec)
    assert main(["prime-rl", json.dumps(spec)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("preset", ["dapo", "dppo_tv", "opsm", "spo"])
def test_a_token_that_the_engine_could_not_score_has_no_policy_term(preset: str) -> None:
    spec = {"preset": preset, **BASE}
    b, dropped = batch(), batch()
    with torch.no_grad():
        b.logp_old[3, 1] = -torch.inf
    value, slope, metrics = through(b, spec)
    assert value.isfinite()
    assert slope.isfinite().all()
    assert metrics["mirrorpo/behaviour/missing/frac"] > 0
    if preset != "opsm":  # its penalty stays, with a ratio of 1
        assert slope[3, 1] == 0
        kept = torch.ones_like(b.mask)
        kept[3, 1] = 0
        whole = through(dropped, spec)[1]
        torch.testing.assert_close(slope, whole * kept)


@pytest.mark.parametrize("preset", ["dapo", "cispo", "dppo_tv", "spo", "gspo"])
def test_a_token_that_the_engine_found_all_but_impossible_does_not_overflow(preset: str) -> None:
    b = batch()
    logp = b.logp.detach().float()
    logp[0, 0] = -2.0
    b.logp, b.logp_old = logp.requires_grad_(), b.logp_old.float().clone()
    b.logp_old[0, 0] = -91.0  # a ratio of e^89, which is infinite in float32
    value, slope, metrics = through(b, {"preset": preset, **BASE})
    assert value.isfinite()
    assert slope.isfinite().all()
    assert all(torch.as_tensor(number).isfinite() for number in metrics.values())


def test_a_sequence_of_which_no_token_counts_has_a_loss_of_0_with_a_graph() -> None:
    logp = torch.full((3,), -1.0, requires_grad=True)
    inputs = prime_rl_call.LossInputs(
        trainer_logprobs=logp,
        inference_logprobs=torch.full((3,), -2.0),
        ref_logprobs=torch.zeros(3),
        advantages=torch.ones(3),
        loss_mask=torch.zeros(3, dtype=torch.bool),
        loss_weights=None,
    )
    found = loss(inputs, {"preset": "grpo", **BASE})
    found.loss.backward()
    assert found.loss == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert {value.numel() for value in found.metrics.values()} == {0}  # prime-rl's means are over tokens


def test_a_penalty_without_reference_log_probabilities_is_no_zero_penalty() -> None:
    b = batch()
    b.logp_ref = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="prime-rl sent no ref_logprobs"):
        through(b, {"preset": "grpo", **BASE})


def test_a_row_that_prime_rl_filled_with_zeros_for_a_missing_reference_is_no_huge_penalty() -> None:
    b = batch()
    with torch.no_grad():
        b.logp_ref[1] = 0.0
    with pytest.raises(ValueError, match="a row whose ref_logprobs are all 0"):
        through(b, {"preset": "grpo", **BASE})
    through(b, {"preset": "dr_grpo", **BASE})  # without a penalty nothing is read from it


def test_a_call_that_moved_is_named() -> None:
    @dataclass
    class LossInputs:
        logprobs: torch.Tensor

    with pytest.raises(TypeError, match=r"no 'trainer_logprobs' \(it has logprobs\): .*mirrorpo reads "):
        loss(LossInputs(torch.zeros(2)), "{preset: dr_grpo, aggregation: token_mean}")


def test_the_command_writes_toml_that_names_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prime-rl", '{"preset": "dr_grpo", "aggregation": "token_mean"}']) == 0
    written = tomllib.loads(capsys.readouterr().out)
    assert written["trainer"]["loss"]["import_path"] == f"{loss.__module__}.{loss.__name__}"
    assert written["orchestrator"]["algo"]["type"] == "grpo"
    assert through(batch(), spec=written["trainer"]["loss"]["kwargs"]["objective"])[0].isfinite()
