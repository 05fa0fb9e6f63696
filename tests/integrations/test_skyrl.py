"""The adapter, called as SkyRL calls a registered policy loss and its KL term: arguments, shapes, normalisation."""

from __future__ import annotations

import json
import pickle
import shlex
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mirrorpo
import skyrl_call
from framework_batch import WIDTH, Batch, assert_same, batch, gradient
from mirrorpo.errors import InputError
from mirrorpo.integrations import skyrl
from mirrorpo.integrations.__main__ import main
from mirrorpo.losses.presets import PRESETS


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    skyrl_call.install(monkeypatch)


def algorithm_of(spec: Any, **more: Any) -> skyrl_call.AlgorithmConfig:
    """SkyRL's settings as the command writes them, read as SkyRL reads them, with the objective registered."""
    assert isinstance(spec, dict)
    written = skyrl.settings(json.dumps(spec), mirrorpo.objective_from(spec))
    given: dict[str, Any] = {}
    for line in written.splitlines():
        key, _, value = shlex.split(line)[0].partition("=")
        if key.startswith("trainer.algorithm.") and key.count(".") == 2:
            given[key.rpartition(".")[2]] = yaml.safe_load(value)
    if "max_seq_len" in given:
        given["max_seq_len"] = WIDTH
    algorithm = skyrl_call.AlgorithmConfig(**(given | more))
    asynchronous = SimpleNamespace(enabled=False)
    skyrl.prepare(SimpleNamespace(trainer=SimpleNamespace(algorithm=algorithm, fully_async=asynchronous)))
    return algorithm


def through(b: Batch, spec: Any, sampler: bool = True, **more: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    given = vars(b) | ({"logp_sampler": b.logp_old + 0.1 * b.mask} if sampler else {})
    total, metrics = skyrl_call.step(algorithm_of(spec, **more), **given)
    return total.detach(), gradient(total, b.logp), metrics


def directly(b: Batch, spec: Any) -> tuple[Tensor, Tensor]:
    found = mirrorpo.objective_from(spec)(
        **vars(b), logp_sampler=b.logp_old + 0.1 * b.mask, max_completion_length=WIDTH
    ).loss
    return found.detach(), gradient(found, b.logp)


def carried(name: str) -> dict[str, Any] | None:
    """The preset as SkyRL can have it: a penalty in the loss with the mean over sequences."""
    spec: dict[str, Any] = {"preset": name}
    objective = mirrorpo.objective_from(spec)
    if objective.placed("loss") and objective.aggregation == "token_mean":
        spec["aggregation"] = "sequence_mean"
    try:
        skyrl.settings(json.dumps(spec), mirrorpo.objective_from(spec))
    except InputError:
        return None
    return spec


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_through_skyrl_is_ours_called_directly_or_is_refused(preset: str) -> None:
    spec = carried(preset)
    if spec is None:
        kept = {p.anchor for p in mirrorpo.objective(preset).penalties} <= {"reference"}
        assert not kept or mirrorpo.objective(preset).surrogate.name == "regression"
        return
    b = batch()
    value, slope, metrics = through(b, spec)
    assert_same((value, slope), directly(b, spec))
    assert metrics["mirrorpo/ratio/mean"] > 0


@pytest.mark.parametrize("aggregation", ["sequence_mean", "constant"])
@pytest.mark.parametrize("estimator", ["sampled", "weighted", "score"])
def test_every_estimator_at_the_tokens_arrives(estimator: str, aggregation: str) -> None:
    spec = {"preset": "dr_grpo", "divergence": "js", "coefficient": 0.2}
    spec |= {"estimator": estimator, "aggregation": aggregation}
    b = batch()
    assert_same(through(b, spec)[:2], directly(b, spec))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("behaviour", ["old", "sampler"])
def test_a_soft_region_and_masks_around_the_sampler_survive_the_scaled_advantages(
    behaviour: str, aggregation: str
) -> None:
    regions = [
        {"name": "prob_l2", "radius": 0.5, "act": "soft"},
        {"name": "ratio", "epsilon_low": 0.5, "epsilon_high": 4.0, "anchor": "sampler", "act": "mask"},
    ]
    spec = {"preset": "dapo", "regions": regions, "behaviour": behaviour, "aggregation": aggregation}
    b = batch()
    assert_same(through(b, spec)[:2], directly(b, spec))


def test_a_penalty_in_the_reward_is_the_estimate_times_its_coefficient() -> None:
    spec = {"preset": "dapo", "divergence": "js", "coefficient": 0.3, "placement": "reward"}
    algorithm = algorithm_of(spec)
    assert (algorithm.use_kl_loss, algorithm.use_kl_in_reward, algorithm.kl_loss_coef) == (False, True, 1.0)
    skyrl.load()
    b = batch()
    kl = sys.modules[skyrl_call.WORKER].compute_approx_kl(
        b.logp.detach(), b.logp_ref, loss_mask=b.mask, kl_estimator_type=algorithm.kl_estimator_type
    )
    wanted = 0.3 * mirrorpo.divergence("js").sampled(b.logp.detach(), b.logp_ref)
    torch.testing.assert_close(kl, torch.where(b.mask, wanted, 0.0))


def test_skyrl_keeps_its_own_kl_names() -> None:
    through(batch(), {"preset": "dapo"})
    logp, ref = torch.tensor([[-1.0]]), torch.tensor([[-3.0]])
    assert sys.modules[skyrl_call.WORKER].compute_approx_kl(logp, ref, kl_estimator_type="k2").item() == 2.0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            {"preset": "dapo", "divergence": "js", "coefficient": 1.0},
            "aggregation 'token_mean' with a penalty in the loss",
        ),
        ({"preset": "dapo", "surrogate": "regression"}, "surrogate 'regression'.*in proportion"),
        ({"preset": "dr_grpo", "region": {"name": "top_k", "radius": 1.0}}, "cannot express region 'top_k'"),
        (
            {"preset": "grpo", "placement": "advantage"},
            "cannot express placement 'advantage'.*Legal: placement loss, rew",
        ),
        ({"preset": "grpo", "estimator": "exact"}, "cannot express estimator 'exact'"),
        ({"preset": "opd"}, "cannot express penalty 'reverse_kl' with anchor 'teacher'.*Legal: reference"),
        (
            {"preset": "prob_l2_kl_grpo", "estimator": "sampled", "placement": ["loss", "reward"]},
            "cannot express penalties in the loss and in the reward: it has one KL term. Legal: one placement",
        ),
        ({"preset": "dapo", "advantage": "none"}, "cannot express advantage|advantage"),
        ({"preset": "dr_grpoo"}, "unknown objective preset"),
    ],
)
def test_what_skyrl_cannot_express_is_named(
    spec: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InputError, ValueError), match=reason):
        skyrl.register(f"mirrorpo:{json.dumps(spec)}")
    assert main(["skyrl", json.dumps(spec)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_kl_loss", True),  # SkyRL's default, a k3 of coefficient 0.001 that nobody asked for
        ("loss_reduction", "token_mean_legacy"),
        ("advantage_estimator", "gae"),
        ("grpo_norm_by_std", False),
        ("advantage_batch_normalize", True),
        ("use_tis", True),
    ],
)
def test_a_setting_that_contradicts_the_objective_is_named_before_the_run(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"trainer.algorithm.{name} must be .*, got {value!r}"):
        algorithm_of({"preset": "dapo"}, **{name: value})


def test_a_controller_that_would_move_the_coefficient_of_a_penalty_in_the_reward_is_refused() -> None:
    spec = {"preset": "dapo", "divergence": "js", "coefficient": 0.3, "placement": "reward"}
    with pytest.raises(InputError, match=r"trainer.algorithm.kl_ctrl.type must be 'fixed'.*got 'adaptive'"):
        algorithm_of(spec, kl_ctrl=skyrl_call.KLCtrlConfig("adaptive"))
    algorithm_of({"preset": "dapo"}, kl_ctrl=skyrl_call.KLCtrlConfig("adaptive"))  # SkyRL does not look at it then


def test_corrections_that_only_skyrls_own_losses_apply_are_refused() -> None:
    correction = skyrl_call.OffPolicyCorrectionConfig(tis_ratio_type="token")
    with pytest.raises(InputError, match=r"off_policy_correction.tis_ratio_type must be None.*behaviour: sampler"):
        algorithm_of({"preset": "dapo"}, off_policy_correction=correction)


def test_an_engine_that_reports_nothing_is_no_ratio_of_1() -> None:
    with pytest.raises(InputError, match=r"SkyRL sent no rollout_logprobs: set generator.sampling_params.logprobs=1"):
        through(batch(), {"preset": "dapo", "behaviour": "sampler"}, sampler=False)


def test_asynchronous_training_needs_the_sampler_as_behaviour() -> None:
    def prepared(spec: str) -> None:
        algorithm = skyrl_call.AlgorithmConfig(policy_loss_type=f"mirrorpo:{spec}", use_kl_loss=False)
        asynchronous = SimpleNamespace(enabled=True)
        skyrl.prepare(SimpleNamespace(trainer=SimpleNamespace(algorithm=algorithm, fully_async=asynchronous)))

    with pytest.raises(
        InputError, match="needs the old policy, which SkyRL's fully asynchronous training does not keep"
    ):
        prepared("{preset: dapo}")
    prepared("{preset: dapo, behaviour: sampler}")


def test_a_kl_term_without_our_policy_loss_is_no_ratio_of_1() -> None:
    spec = {"preset": "grpo", "estimator": "weighted"}
    algorithm = algorithm_of(spec)
    skyrl.load()
    with pytest.raises(InputError, match="policy_loss_type must be the kl_estimator_type"):
        sys.modules[skyrl_call.WORKER].compute_approx_kl(
            batch().logp, batch().logp_ref, kl_estimator_type=algorithm.kl_estimator_type
        )


def test_the_registered_function_travels_to_workers_without_the_file(tmp_path: Any) -> None:
    file = tmp_path / "objective.yaml"
    file.write_text("preset: dapo\nregion: {name: kl3, radius: 0.03}\n")
    full = skyrl.register(f"mirrorpo:{file}")
    assert skyrl.register(f"mirrorpo:{file}") == full  # twice is once
    file.unlink()
    sent = pickle.loads(pickle.dumps(sys.modules[skyrl_call.UTILS].PolicyLossRegistry.functions[full]))
    b = batch()
    algorithm = skyrl_call.AlgorithmConfig(policy_loss_type=full, use_kl_loss=False)
    assert sent(b.logp, b.logp_old, b.advantages, config=algorithm, loss_mask=b.mask)[0].isfinite()


def test_a_sequence_without_tokens_and_a_batch_of_padding_have_no_loss_and_a_gradient_of_0() -> None:
    spec = {"preset": "grpo", "coefficient": 0.5}
    b = batch()
    b.mask[:] = False
    total, slope, _ = through(b, spec)
    assert total == 0
    assert (slope == 0).all()


def test_a_call_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[skyrl_call.UTILS], "reduce_loss", lambda loss, loss_mask, reduction: loss)
    with pytest.raises(TypeError, match=r"SkyRL's reduce_loss takes .*'reduction'\], expected .*moved"):
        skyrl.load()


@pytest.mark.parametrize("rubbish", [float("nan"), -1e10, float("-inf")])
def test_what_stands_at_masked_positions_reaches_neither_loss_nor_gradient(rubbish: float) -> None:
    spec = {"preset": "gspo", "divergence": "k3", "coefficient": 0.3, "behaviour": "sampler"}
    clean, dirty = batch(), batch()
    with torch.no_grad():
        for x in (dirty.logp_old, dirty.logp_ref, dirty.logp):
            x[~dirty.mask] = rubbish
    value, slope, metrics = through(dirty, spec)
    assert_same((value, slope), through(clean, spec)[:2])
    assert all(torch.tensor(number).isfinite() for number in metrics.values())


@pytest.mark.parametrize("preset", ["dapo", "cispo", "dppo_tv", "spo"])
def test_a_token_that_the_engine_found_all_but_impossible_does_not_overflow(preset: str) -> None:
    b = batch()
    logp = b.logp.detach().float()
    logp[0, 0] = -2.0
    b.logp, b.logp_old = logp.requires_grad_(), b.logp_old.float().clone()
    b.logp_old[0, 0] = -91.0  # a ratio of e^89, which is infinite in float32
    value, slope, _ = through(b, {"preset": preset})
    assert value.isfinite()
    assert slope.isfinite().all()
