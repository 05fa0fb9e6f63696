"""One objective file, one batch, five frameworks: the same loss and the same gradient of the model's parameters."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import prime_rl_call
import skyrl_call
import slime_call
from framework_batch import assert_same
from mirrorpo.config.objective_file import read_objective
from mirrorpo.integrations import prime_rl, skyrl, slime, verl_settings
from mirrorpo.integrations.__main__ import main
from mirrorpo.training import MirrorConfig, MirrorTrainer
from trl_pair import MAX_COMPLETION, batch, fill, loss_and_gradient, settings, trainer

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "the shipped example with the mean over tokens": (ROOT / "examples/objectives/kl3_js_tokens.yaml").read_text(),
    "the shipped example with a constant": (ROOT / "examples/objectives/kl3_prob_l2.yaml").read_text(),
    "k3 at the tokens": "preset: grpo\nadvantage: dr_grpo\naggregation: token_mean\nestimator: weighted\n",
    "per completion": "preset: grpo\ncoefficient: 0.5\nestimator: score\n",
    "GSPO": "preset: prob_l2_gspo\ncoefficient: 1.0\n",
    "DPPO": "preset: dppo_tv\nbehaviour: old\naggregation: token_mean\n",
    "two penalties": "preset: prob_l2_kl_grpo\ncoefficient: [1.0, 1e-1]\n",
}


def shared_batch(built: MirrorTrainer) -> dict[str, Tensor]:
    inputs = fill(batch(), built)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    if not built.policy_objective.needs_reference:
        del inputs["ref_per_token_logps"]
    return inputs


def policy(built: MirrorTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the completions, and the logits (B, P + T, V)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = built.model(input_ids=ids, attention_mask=attention).logits
    rows = logits[:, -MAX_COMPLETION - 1 : -1].log_softmax(-1)
    return rows.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1), logits


def finished(built: MirrorTrainer, loss: Tensor) -> tuple[Tensor, Tensor]:
    built.model.zero_grad()
    loss.backward()
    grads = [p.grad.reshape(-1) for p in built.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


def of_verl(built: MirrorTrainer, file: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    import verl.trainer.ppo.core_algos as core
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    import mirrorpo.integrations.verl  # noqa: F401
    from mirrorpo.integrations.verl_settings import REACH

    objective = built.policy_objective
    name = f"mirrorpo:{file}"
    penalised = {"use_kl_loss": True, "kl_loss_coef": 1.0, "kl_loss_type": name} if objective.penalties else {}
    actor = FSDPActorConfig(
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=8,
        policy_loss=PolicyLossConfig(loss_mode=name),
        **REACH.aggregations[objective.aggregation],
        loss_scale_factor=MAX_COMPLETION,
        **penalised,
    )
    actor.global_batch_info["loss_scale_factor"] = MAX_COMPLETION
    logp, _ = policy(built, inputs)
    mask = inputs["completion_mask"].bool()
    old = inputs["old_per_token_logps"]
    loss, _ = core.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=logp,
        advantages=inputs["advantages"].unsqueeze(1).expand_as(logp),
        response_mask=mask,
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
    )
    if objective.penalties:
        kl = core.kl_penalty(logprob=logp, ref_logprob=inputs["ref_per_token_logps"], kl_penalty=name)
        loss = loss + core.agg_loss(kl, mask, actor.loss_agg_mode, **actor.global_batch_info)
    return finished(built, loss)


def of_prime_rl(built: MirrorTrainer, file: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logp, _ = policy(built, inputs)
    mask = inputs["completion_mask"]
    loss, _ = prime_rl_call.step(
        prime_rl.loss,
        {"objective": file},
        logp=logp,
        logp_old=inputs["old_per_token_logps"],
        logp_ref=inputs.get("ref_per_token_logps"),
        advantages=inputs["advantages"].unsqueeze(1).expand_as(logp),
        mask=mask,
        lengths=[int(n) for n in mask.sum(-1)],
        prompts=[inputs["prompt_ids"].shape[1]] * len(mask),
    )
    return finished(built, loss)


def of_slime(
    built: MirrorTrainer, file: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    slime_call.install(monkeypatch)
    monkeypatch.setenv(slime.VARIABLE, file)
    objective = built.policy_objective
    _, logits = policy(built, inputs)
    samples, packed = [], []
    for row, length in enumerate(inputs["completion_mask"].sum(-1).tolist()):
        tokens = torch.cat([inputs["prompt_ids"][row], inputs["completion_ids"][row, :length]])
        sample = {"tokens": tokens, "loss_masks": torch.ones(length, dtype=torch.long)}
        sample["log_probs"] = inputs["old_per_token_logps"][row, :length]
        sample["advantages"] = inputs["advantages"][row].expand(length)
        if objective.needs_reference:
            sample["ref_log_probs"] = inputs["ref_per_token_logps"][row, :length]
        samples.append(sample)
        packed.append(logits[row, : len(tokens)])
    args = slime_call.arguments(
        calculate_per_token_loss=objective.aggregation == "token_mean",
        grpo_std_normalization=objective.advantage == "grpo",
        use_kl_loss=objective.needs_reference,
        rollout_max_response_len=MAX_COMPLETION,
    )
    loss, _ = slime_call.step(slime.loss_function, args, samples, torch.cat(packed).unsqueeze(0))
    return finished(built, loss)


def of_skyrl(
    built: MirrorTrainer, file: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    skyrl_call.install(monkeypatch)
    objective = built.policy_objective
    name = f"mirrorpo:{file}"
    penalised = bool(objective.penalties)
    algorithm = skyrl_call.AlgorithmConfig(
        policy_loss_type=name,
        **skyrl.REACH.settings(objective),
        use_kl_loss=penalised,
        kl_estimator_type=name if penalised else "k3",
        kl_loss_coef=1.0,
        max_seq_len=MAX_COMPLETION,
    )
    asynchronous = SimpleNamespace(enabled=False)
    skyrl.prepare(SimpleNamespace(trainer=SimpleNamespace(algorithm=algorithm, fully_async=asynchronous)))
    logp, _ = policy(built, inputs)
    loss, _ = skyrl_call.step(
        algorithm,
        logp=logp,
        logp_old=inputs["old_per_token_logps"],
        logp_ref=inputs.get("ref_per_token_logps"),
        advantages=inputs["advantages"].unsqueeze(1).expand_as(logp),
        mask=inputs["completion_mask"],
    )
    return finished(built, loss)


@pytest.mark.parametrize("case", FILES)
def test_one_objective_file_gives_the_same_loss_and_gradient_in_every_framework(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("verl", reason="verl is for Python below 3.13")
    file = tmp_path / "objective.yaml"
    file.write_text(FILES[case])
    # padded: packed rows differ in float32's last digits (tests/training/test_packed.py)
    built: Any = trainer(MirrorTrainer, MirrorConfig(**settings(tmp_path), objective=str(file), fast="off"))
    built.current_gradient_accumulation_steps = 1
    inputs = shared_batch(built)
    of_trl = loss_and_gradient(built, inputs)
    assert_same(of_verl(built, str(file), inputs), of_trl)
    assert_same(of_slime(built, str(file), inputs, monkeypatch), of_trl)
    per_token = read_objective(str(file)).aggregation == "token_mean"
    if per_token:
        assert_same(of_prime_rl(built, str(file), inputs), of_trl)
    else:  # said before anything starts, with what it can
        assert main(["prime-rl", str(file)]) == 2
    if per_token and built.policy_objective.penalties:
        assert main(["skyrl", str(file)]) == 2
    else:
        assert_same(of_skyrl(built, str(file), inputs, monkeypatch), of_trl)


@pytest.mark.parametrize("path", ["it's here.pt", 'a "b".pt', "back\\slash.pt", "ü.pt", "a: b # c.pt", "end\\"])
def test_an_objective_with_quotes_arrives_on_the_command_line_as_it_was_given(path: str) -> None:
    parsers = pytest.importorskip("hydra.core.override_parser.overrides_parser", reason="verl brings hydra")
    spec = {"preset": "grpo", "divergence": {"name": "neural", "path": path}}
    objective = read_objective("grpo")  # the file need not be there
    for_verl = verl_settings.overrides(json.dumps(spec), objective)[0]
    for_skyrl = skyrl.settings(json.dumps(spec), objective).splitlines()[1]
    found = (
        parsers.OverridesParser.create().parse_override(for_verl).value(),
        yaml.safe_load(shlex.split(for_skyrl)[0].partition("=")[2]),
    )
    for text in found:
        assert json.loads(str(text).removeprefix("mirrorpo:")) == spec
