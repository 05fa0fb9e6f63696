"""The adapter against the real verl: its losses are ours, ours through it are ours, and a seam that moved is named."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import mirrorpo
from framework_batch import LENGTHS, PROMPTS, Batch, assert_same, batch, gradient
from mirrorpo.config.objective_file import read_objective
from mirrorpo.divergences import DIVERGENCES
from mirrorpo.errors import InputError
from mirrorpo.integrations.__main__ import main
from mirrorpo.integrations.verl_settings import overrides, penalties_of
from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS

verl = pytest.importorskip("verl", reason="verl is for Python below 3.13: `make test` installs it there")

import verl.trainer.ppo.core_algos as core  # noqa: E402
import verl.workers.utils.losses as losses  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.torch_functional import masked_mean  # noqa: E402
from verl.workers.config import FSDPActorConfig, PolicyLossConfig  # noqa: E402

import mirrorpo.integrations.verl as plugin  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODES = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
HORIZON = 9
OPTIONS = {"beta": {"beta": 0.5}, "alpha": {"alpha": 0.5}}


def config(loss_mode: str = "vanilla", **more: Any) -> Any:
    return FSDPActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        loss_scale_factor=HORIZON,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **more,
    )


def through_verl(b: Batch, name: str, mode: str, actor: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    actor = config() if actor is None else actor
    actor.global_batch_info["loss_scale_factor"] = HORIZON
    loss, _ = core.get_policy_loss_fn(name)(
        old_log_prob=b.logp_old,
        log_prob=b.logp,
        advantages=b.advantages,
        response_mask=b.mask,
        loss_agg_mode=mode,
        config=actor,
    )
    return loss.detach(), gradient(loss, b.logp)


def directly(b: Batch, objective: mirrorpo.Objective, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    loss = objective(
        logp=b.logp,
        logp_old=b.logp_old,
        logp_ref=b.logp_ref,
        advantages=b.advantages,
        mask=b.mask,
        max_completion_length=HORIZON,
        **more,
    ).loss
    return loss.detach(), gradient(loss, b.logp)


def name_of(spec: dict[str, Any]) -> str:
    return f"mirrorpo:{json.dumps(spec)}"


# verl's loss -> (our objective, verl's settings that mean the same)
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vanilla": ({"preset": "dapo", "dual_clip": 3.0}, {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "gspo": ({"preset": "gspo"}, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "dppo_tv": (
        {"preset": "dppo_tv", "behaviour": "old"},
        {"clip_ratio": 0.15, "clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0},
    ),
    "dppo_kl": (
        {"preset": "dppo_kl", "behaviour": "old"},
        {"clip_ratio": 0.05, "clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0},
    ),
    "cispo": ({"preset": "cispo"}, {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    "sapo": ({"preset": "sapo"}, {}),
    "geo_mean": ({"preset": "gmpo"}, {"clip_ratio": 0.4, "clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
}


@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("name", THEIRS)
def test_the_losses_of_verl_are_ours_called_directly(name: str, aggregation: str) -> None:
    if name in ("sapo", "geo_mean") and aggregation != "sequence_mean":
        pytest.skip(f"verl's {name} has this one average")
    spec, settings = THEIRS[name]
    # Where a completion is empty verl's denominators leave it out and ours do not: tested on its own below.
    b = batch(spread=1.0, empty=False)
    ours = directly(b, mirrorpo.objective_from({**spec, "aggregation": aggregation}))
    assert_same(ours, through_verl(b, name, MODES[aggregation], config(**settings)))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_penalties_of_verl_are_ours(name: str) -> None:
    b = batch()
    theirs = (plugin._verl_kl_penalty(b.logp, b.logp_ref, name) * b.mask).sum()
    ours = (mirrorpo.divergence(name).sampled(b.logp, b.logp_ref) * b.mask).sum()
    assert_same((ours.detach(), gradient(ours, b.logp)), (theirs.detach(), gradient(theirs, b.logp)))


@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("region", [name for name in (*REGIONS, *DIVERGENCE_REGIONS) if name not in ("exact", "top_k")])
def test_every_trust_region_through_verl_is_ours_called_directly(region: str, aggregation: str) -> None:
    options: dict[str, Any] = {"name": region, **OPTIONS.get(region, {})}
    if region == "ratio" or region == "log_ratio":
        options |= {"epsilon_low": 0.1, "epsilon_high": 0.3}
    elif region not in ("none", "dcpo"):
        options["radius"] = 0.02
    spec = {"preset": "dapo", "region": options, "aggregation": aggregation}
    b = batch(spread=0.3, empty=False)
    assert_same(directly(b, mirrorpo.objective_from(spec)), through_verl(b, name_of(spec), MODES[aggregation]))


@pytest.mark.parametrize("preset", mirrorpo.losses.presets.PRESETS)
def test_every_preset_through_verl_is_ours_called_directly(preset: str) -> None:
    spec = {"preset": preset}
    objective = mirrorpo.objective(preset)
    if "teacher" in objective.needs or objective.advantage == "soft_value":
        with pytest.raises(InputError, match=r"verl cannot express .*'(teacher|soft_value|reference)'.*Legal: "):
            plugin.policy_loss(name_of(spec))
        return
    if objective.penalties:
        spec["coefficient"] = [0.0] * len(objective.penalties)  # the penalty is verl's other hook
        objective = mirrorpo.objective_from(spec)
    b = batch(spread=0.3, empty=False)
    if "sampler" in objective.needs:
        with pytest.raises(InputError, match=r"no rollout_log_probs: set .*\.rollout\.calculate_log_probs=True"):
            through_verl(b, name_of(spec), MODES[objective.aggregation])
        return
    assert_same(directly(b, objective), through_verl(b, name_of(spec), MODES[objective.aggregation]))


@pytest.mark.parametrize("preset", ["dapo", "spo", "gspo"])
def test_a_token_that_the_engine_could_not_score_has_no_part_in_a_nan(preset: str) -> None:
    # with rollout_correction.bypass_mode old_log_prob is what the engine reported
    b = batch(spread=0.3, empty=False)
    with torch.no_grad():
        b.logp_old[3, 1] = -torch.inf
    objective = mirrorpo.objective(preset)
    value, slope = through_verl(b, name_of({"preset": preset}), MODES[objective.aggregation])
    assert value.isfinite()
    assert slope.isfinite().all()
    assert preset == "gspo" or slope[3, 1] == 0


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def ppo_loss(
    b: Batch, actor: Any, weights: torch.Tensor | None = None, sampler: torch.Tensor | None = None
) -> torch.Tensor:
    """verl's own ``ppo_loss`` on the packed form of the batch: prompts and responses side by side."""
    pieces = []
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        zeros = torch.zeros(prompt - 1, dtype=b.logp.dtype)
        # The model's output at a position belongs to the next token: one to the left.
        pieces += [zeros, b.logp[row, :length], torch.zeros(1, dtype=b.logp.dtype)]
    values = torch.cat(pieces)
    offsets = torch.tensor([0, *(p + r for p, r in zip(PROMPTS, LENGTHS, strict=True))]).cumsum(0)

    def responses(x: torch.Tensor) -> torch.Tensor:
        return nested([x[row, :length] for row, length in enumerate(LENGTHS)])

    data = TensorDict(
        {
            "prompts": nested([torch.zeros(p, dtype=torch.long) for p in PROMPTS]),
            "responses": nested([torch.zeros(r, dtype=torch.long) for r in LENGTHS]),
            "response_mask": responses(b.mask.double()),
            "old_log_probs": responses(b.logp_old),
            "ref_log_prob": responses(b.logp_ref),
            "advantages": responses(b.advantages),
            **({} if weights is None else {"rollout_is_weights": responses(weights)}),
            **({} if sampler is None else {"rollout_log_probs": responses(sampler)}),
        },
        batch_size=[b.rows],
    )
    for key, value in (("dp_size", 1), ("batch_num_tokens", int(b.mask.sum())), ("global_batch_size", b.rows)):
        tensordict_utils.assign_non_tensor_data(data, key, value)
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(values, offsets=offsets)}
    loss, metrics = losses.ppo_loss(actor, output, data)
    assert metrics["actor/pg_loss"].values
    return loss


@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("estimator", ["sampled", "weighted", "score"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_in_the_loss_of_verl_is_ours_called_directly(
    divergence: str, estimator: str, aggregation: str
) -> None:
    d: Any = {"name": divergence, **OPTIONS[divergence]} if divergence in OPTIONS else divergence
    spec = {
        "preset": "atr_grpo",
        "divergence": d,
        "estimator": estimator,
        "coefficient": 0.3,
        "aggregation": aggregation,
    }
    name = name_of(spec)
    actor = config(name, loss_agg_mode=MODES[aggregation], use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=name)
    b = batch()  # with an empty completion: verl is told the global number of sequences
    loss = ppo_loss(b, actor)
    assert_same(directly(b, mirrorpo.objective_from(spec)), (loss.detach(), gradient(loss, b.logp)))


def test_several_penalties_and_the_weights_of_the_rollout_correction_arrive() -> None:
    spec = {"preset": "prob_l2_kl_grpo", "coefficient": [0.5, 0.1], "estimator": ["score", "weighted"]}
    name = name_of(spec)
    actor = config(name, loss_agg_mode=MODES["constant"], use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=name)
    b = batch()
    weights = torch.rand(b.mask.shape, dtype=torch.float64)
    loss = ppo_loss(b, actor, weights)
    ours = directly(b, mirrorpo.objective_from(spec), weight=weights)
    assert_same(ours, (loss.detach(), gradient(loss, b.logp)))


SAMPLER: dict[str, dict[str, Any]] = {
    "dppo_tv": {"preset": "dppo_tv"},
    "icepop": {"preset": "icepop"},
    "opsm": {"preset": "opsm", "coefficient": 0.5, "estimator": "weighted"},
    "score around the sampler": {"preset": "grpo", "behaviour": "sampler", "coefficient": 0.5, "estimator": "score"},
    "truncated and rejected": {
        "preset": "dapo",
        "regions": [
            {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28},
            {"name": "ratio", "epsilon_low": 1, "epsilon_high": 0.3, "act": "truncate"},
            {"name": "kl3", "radius": 0.1, "act": "mask", "of": "old", "anchor": "sampler", "level": "max_divergence"},
        ],
    },
}


@pytest.mark.parametrize("spec", SAMPLER.values(), ids=SAMPLER)
def test_what_the_engine_reported_reaches_the_objective(spec: dict[str, Any]) -> None:
    objective = mirrorpo.objective_from(spec)
    name, mode = name_of(spec), MODES[objective.aggregation]
    more = {"use_kl_loss": True, "kl_loss_coef": 1.0, "kl_loss_type": name} if objective.penalties else {}
    actor = config(name, loss_agg_mode=mode, **more)
    b = batch()
    noise = torch.randn(b.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampler = (b.logp_old + 0.2 * noise).clamp(max=-0.01)
    sampler[3, 1] = torch.nan  # the engine could not say
    loss = ppo_loss(b, actor, sampler=sampler)
    assert_same(directly(b, objective, logp_sampler=sampler), (loss.detach(), gradient(loss, b.logp)))
    with pytest.raises(InputError, match="sent no rollout_log_probs"):  # nothing is left over from the call before
        ppo_loss(b, actor)
    if objective.behaviour == "sampler" or objective.truncation:
        with pytest.raises(InputError, match="rollout_is must be null"):
            ppo_loss(b, actor, weights=torch.ones_like(sampler), sampler=sampler)


def test_the_divergence_alone_takes_the_coefficient_of_verl() -> None:
    actor = config(
        "mirrorpo:{preset: dapo}", use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="mirrorpo:{divergence: js}"
    )
    b = batch()
    loss = ppo_loss(b, actor)
    ours = directly(b, mirrorpo.objective("dapo", divergence="js", coefficient=0.2))
    assert_same(ours, (loss.detach(), gradient(loss, b.logp)))


@pytest.mark.parametrize("aggregation", MODES)
def test_two_ranks_of_verl_add_up_to_one(aggregation: str) -> None:
    spec = {"preset": "grpo", "aggregation": aggregation, "coefficient": 0.5, "estimator": "score"}
    b = batch()
    whole = directly(b, mirrorpo.objective_from(spec))
    total, summed = torch.zeros((), dtype=torch.float64), torch.zeros_like(b.logp)
    name = name_of(spec)
    for rows in (slice(0, 2), slice(2, 5)):
        part = Batch(**{key: value[rows] for key, value in vars(b).items()})
        actor = config()
        actor.global_batch_info.update(
            dp_size=2, batch_num_tokens=int(b.mask.sum()), global_batch_size=b.rows, loss_scale_factor=HORIZON
        )
        policy, _ = core.get_policy_loss_fn(name)(
            old_log_prob=part.logp_old,
            log_prob=part.logp,
            advantages=part.advantages,
            response_mask=part.mask,
            loss_agg_mode=MODES[aggregation],
            config=actor,
        )
        kl = core.kl_penalty(part.logp, part.logp_ref, name)
        loss = policy + core.agg_loss(kl, part.mask, MODES[aggregation], **actor.global_batch_info)
        total = total + loss.detach() / 2  # gradients are averaged over ranks
        summed = summed + gradient(loss / 2, b.logp)
    assert_same(whole, (total, summed))


def reward_penalty_of_verl() -> Any:
    """verl's ``apply_kl_penalty``, compiled from its file: importing that needs web servers and data loaders."""
    file = Path(verl.__file__).parent / "trainer" / "ppo" / "ray_trainer.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "apply_kl_penalty"]
    names = {"core_algos": core, "torch": torch, "masked_mean": masked_mean, "DataProto": verl.DataProto}
    exec(compile(ast.Module(body=[found], type_ignores=[]), str(file), "exec"), names)
    return names["apply_kl_penalty"]


@pytest.mark.parametrize("estimator", ["sampled", "weighted"])
def test_the_penalty_in_the_reward_of_verl_is_ours(estimator: str) -> None:
    spec = {"preset": "dr_grpo", "divergence": "js", "coefficient": 0.1, "placement": "reward", "estimator": estimator}
    b = batch()
    data = verl.DataProto.from_dict(
        {
            "response_mask": b.mask.double(),
            "token_level_scores": torch.zeros_like(b.logp_old),
            "old_log_probs": b.logp_old,
            "ref_log_prob": b.logp_ref,
        }
    )
    data, _ = reward_penalty_of_verl()(data, core.FixedKLController(1.0), kl_penalty=name_of(spec))
    expected = -mirrorpo.objective_from(spec).reward_penalty(b.logp_old, b.logp_ref, b.mask)
    assert (data.batch["token_level_rewards"].sum(-1) - expected).abs().max() < 1e-12
    assert expected.abs().max() > 1e-4


# Bad input, and a seam that moved


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss_mode": "mirrorpo:dapoo"}, "unknown objective preset 'dapoo'; did you mean 'dapo'"),
        ({"loss_mode": "mirrorpo:grpo", "loss_agg_mode": "token-mean"}, "loss_agg_mode must be 'seq-mean-token-mean'"),
        ({"loss_mode": "mirrorpo:grpo", "loss_agg_mode": "seq-mean-token-mean"}, "use_kl_loss must be True"),
        (
            {
                "loss_mode": "mirrorpo:grpo",
                "loss_agg_mode": "seq-mean-token-mean",
                "use_kl_loss": True,
                "kl_loss_type": "mirrorpo:grpo",
            },
            "kl_loss_coef must be 1.0.*got 0.001",
        ),
        (
            {"loss_mode": "mirrorpo:{preset: dapo, region: {name: exact, radius: 0.1}}"},
            "verl cannot express region 'exact'.*no logits",
        ),
        (
            {"loss_mode": "mirrorpo:{preset: dapo, divergence: js, coefficient: 1, estimator: top_k}"},
            "cannot express estimator 'top_k'.*Legal: sampled, weighted, score",
        ),
        (
            {"loss_mode": "mirrorpo:{preset: grpo, control: {kind: linear, end: 0.0}}"},
            "cannot express control 'linear'",
        ),
        (
            {"loss_mode": "mirrorpo:{preset: prob_l2_kl_grpo, estimator: sampled, placement: [loss, reward]}"},
            "penalties in the loss and in the reward: it has one KL term",
        ),
        (
            {"loss_mode": "mirrorpo:{preset: a_star_po, advantage: grpo}"},
            "surrogate 'regression' with anchor 'reference': its hook does not get",
        ),
        ({"kl_loss_type": "mirrorpo:jss"}, "unknown divergence 'jss'; did you mean 'js'"),
        ({"kl_loss_type": "mirrorpo:{divergence: js, estimator: exact}"}, "needs logits"),
        ({"kl_loss_type": "mirrorpo:{divergence: js, coefficient: 2}"}, "the coefficient is verl's"),
        ({"use_kl_loss": True, "kl_loss_type": "mirrorpo:{preset: grpo}"}, "loss_mode must be .*got 'vanilla'"),
    ],
)
def test_settings_that_contradict_the_objective_stop_verl_when_it_builds_its_config(
    settings: dict[str, Any], reason: str
) -> None:
    settings = dict(settings)
    with pytest.raises(InputError, match=reason):
        config(settings.pop("loss_mode", "vanilla"), **settings)


def test_an_estimator_that_needs_the_rollout_policy_is_refused_beside_a_loss_of_verl() -> None:
    b = batch()
    with pytest.raises(ValueError, match="'score' needs the rollout policy's log-probabilities"):
        core.kl_penalty(b.logp, b.logp_ref, "mirrorpo:{divergence: js, estimator: score}")


def test_names_of_verl_still_mean_what_they_did() -> None:
    b = batch()
    assert torch.equal(losses.kl_penalty(b.logp, b.logp_ref, "k3+"), plugin._verl_kl_penalty(b.logp, b.logp_ref, "k3+"))
    with pytest.raises(ValueError, match="Unsupported loss mode: no_such"):
        core.get_policy_loss_fn("no_such")
    assert core.get_policy_loss_fn("vanilla") is core.compute_policy_loss_vanilla


def test_a_seam_that_moved_is_named_with_the_versions_that_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    def agg_loss(losses: Any, mask: Any) -> Any:
        return losses

    monkeypatch.setattr(core, "agg_loss", agg_loss)
    with pytest.raises(plugin.SeamError, match=r"no 'loss_agg_mode'.*The hook moved; mirrorpo supports verl >=0.9.1"):
        plugin._check_signatures()


def test_a_penalty_that_verl_does_not_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "kl_penalty", lambda logprob, ref_logprob, kl_penalty: logprob - ref_logprob)
    with pytest.raises(plugin.SeamError, match=r"verl.workers.utils.losses.kl_penalty does not reach this module"):
        plugin._check_in_use(losses)


def test_a_bare_name_is_a_preset_or_a_divergence_and_never_both() -> None:
    assert set(mirrorpo.losses.presets.PRESETS).isdisjoint(DIVERGENCES)
    assert penalties_of("mirrorpo:grpo")[0].coefficient == 0.04
    assert penalties_of("mirrorpo:k3")[0].coefficient == 1.0


@pytest.mark.parametrize("other", ["0.9.0", "0.10.0.dev0", "0.10.0rc1", "0.10", "0.11.0"])
def test_a_version_outside_the_tested_range_warns(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.SUPPORTED[0] <= plugin.Version(verl.__version__) < plugin.SUPPORTED[1]
    plugin._check_version()
    monkeypatch.setattr(verl, "__version__", other)
    with pytest.warns(UserWarning, match=rf"tested with verl >=0.9.1,<0.10, this is {re.escape(other)}: "):
        plugin._check_version()


def test_every_place_where_verl_binds_its_penalty_by_name_has_ours() -> None:
    def bound(function: str) -> dict[str, Any]:
        modules = {name: vars(module).get(function) for name, module in sys.modules.items() if name.startswith("verl.")}
        return {name: found for name, found in modules.items() if inspect.isfunction(found)}

    assert {"verl.trainer.ppo.core_algos", "verl.workers.utils.losses"} <= set(bound("kl_penalty"))
    assert set(bound("kl_penalty").values()) == {plugin.kl_penalty}
    assert set(bound("ppo_loss").values()) == {losses.ppo_loss}
    source = (Path(verl.__file__).parent / "trainer/ppo/ray_trainer.py").read_text(encoding="utf-8")
    assert "core_algos.kl_penalty(" in source  # the reward's, looked up at the call


def test_the_settings_of_an_objective_file_compose_with_the_yaml_of_verl(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    file = tmp_path / "objective.yaml"
    file.write_text("preset: prob_l2_grpo\nregion: {name: kl3, radius: 0.05}\nestimator: score\n")
    lines = overrides(str(file), read_objective(str(file)))
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        chosen = compose("ppo_trainer", overrides=[*lines, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"])
    actor = omega_conf_to_dataclass(chosen.actor_rollout_ref.actor)
    assert actor.loss_scale_factor == chosen.data.max_response_length
    assert actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert chosen.algorithm.norm_adv_by_std_in_grpo is False
    (penalty,) = penalties_of(actor.kl_loss_type)
    assert (penalty.divergence.name, penalty.estimator, penalty.coefficient) == ("prob_l2", "score", 1e-4)
    b = batch()
    actor.global_batch_info["loss_scale_factor"] = HORIZON
    name = actor.policy_loss.loss_mode
    ours = directly(b, mirrorpo.objective("dr_grpo", region={"name": "kl3", "radius": 0.05}))
    actor.global_batch_info["global_batch_size"] = b.rows
    assert_same(ours, through_verl(b, name, actor.loss_agg_mode, actor))


def test_the_settings_of_an_objective_around_the_sampler_ask_the_engine_for_its_log_probabilities() -> None:
    from hydra import compose, initialize_config_dir

    lines = overrides("icepop", read_objective("icepop"))
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        chosen = compose("ppo_trainer", overrides=lines)
    assert chosen.actor_rollout_ref.rollout.calculate_log_probs is True
    assert chosen.algorithm.rollout_correction.rollout_is is None


def test_the_command_writes_the_settings_or_says_what_verl_cannot_express(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verl", "{preset: atr_grpo, placement: reward, divergence: js, coefficient: 0.1}"]) == 0
    assert "algorithm.use_kl_in_reward=True" in capsys.readouterr().out
    assert main(["verl", "{preset: grpo, estimator: exact}"]) == 2
    assert "verl cannot express estimator 'exact'" in capsys.readouterr().err
    assert main(["verl", str(tmp_path / "none.yaml")]) == 2
    assert "no such objective file" in capsys.readouterr().err


PROGRAM = """
import verl, sys
assert "mirrorpo.integrations.verl" in sys.modules
from verl.workers.utils.losses import get_policy_loss_fn, kl_penalty
assert kl_penalty.__module__ == "mirrorpo.integrations.verl"
print(get_policy_loss_fn("mirrorpo:dapo").__module__)
"""


@pytest.mark.parametrize("way", ["VERL_USE_EXTERNAL_MODULES", "entry point"])
def test_verl_loads_the_module_by_itself(way: str, tmp_path: Path) -> None:
    paths = [str(ROOT / "src")]
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    if way == "entry point":
        environment["VERL_USE_EXTERNAL_PLUGINS"] = "mirrorpo"
        group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
        info = tmp_path / "stand_in-0.dist-info"  # the entry point of pyproject.toml, installed or not
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[verl.plugins]\n" + "".join(f"{name} = {value}\n" for name, value in group.items())
        )
        paths.insert(0, str(tmp_path))
    else:
        environment[way] = "mirrorpo.integrations.verl"
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "mirrorpo.integrations.verl"


def test_the_multi_node_script_is_valid_and_asks_for_the_settings_first() -> None:
    script = ROOT / "examples" / "verl" / "gsm8k_multinode.sh"
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    assert text.index("mirrorpo.integrations verl") < text.index("verl.trainer.main_ppo")
