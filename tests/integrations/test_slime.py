"""The adapter, called as slime calls its custom loss: arguments, shapes, normalisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mirrorpo
import slime_call
from framework_batch import LENGTHS, PROMPTS, assert_same
from mirrorpo.errors import InputError
from mirrorpo.integrations import slime
from mirrorpo.integrations.__main__ import main
from mirrorpo.losses.presets import PRESETS

VOCABULARY = 11
HORIZON = 12


class Packed:
    """Samples side by side, and the same as (B, T)."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        totals = [p + r for p, r in zip(PROMPTS, LENGTHS, strict=True)]
        self.logits = torch.randn(1, sum(totals), VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()
        self.tokens = [torch.randint(VOCABULARY, (total,), generator=g) for total in totals]
        _, found = slime_call.get_log_probs_and_entropy(
            self.logits,
            args=slime_call.arguments(),
            unconcat_tokens=self.tokens,
            total_lengths=totals,
            response_lengths=list(LENGTHS),
        )
        self.logp = found["log_probs"]

        def near(x: torch.Tensor) -> torch.Tensor:
            return (x.detach() + 0.4 * torch.randn(x.shape, generator=g, dtype=torch.float64)).clamp(max=-0.01)

        self.old, self.ref = [near(x) for x in self.logp], [near(x) for x in self.logp]
        self.sampler = [near(x) for x in self.old]
        self.masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
        self.masks[0][2] = 0
        self.advantages = [torch.full((n,), torch.randn(1, generator=g).item()).double() for n in LENGTHS]

    def samples(self, *, reference: bool) -> list[dict[str, Any]]:
        return [
            {"tokens": self.tokens[i], "log_probs": self.old[i], "advantages": self.advantages[i]}
            | {"loss_masks": self.masks[i], "rollout_log_probs": self.sampler[i]}
            | ({"ref_log_probs": self.ref[i]} if reference else {})
            for i in range(len(LENGTHS))
        ]

    def directly(self, objective: mirrorpo.Objective) -> mirrorpo.Output:
        def pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

        return objective(
            logp=pad(self.logp),
            logp_old=pad(self.old),
            logp_ref=pad(self.ref),
            logp_sampler=pad(self.sampler),
            advantages=pad(self.advantages),
            mask=pad(self.masks),
            max_completion_length=HORIZON,
        )


def settings_of(objective: mirrorpo.Objective, **more: Any) -> Any:
    return slime_call.arguments(
        calculate_per_token_loss=objective.aggregation == "token_mean",
        grpo_std_normalization=objective.advantage == "grpo",
        use_kl_loss=objective.needs_reference,
        **more,
    )


@pytest.fixture(autouse=True)
def _slime(monkeypatch: pytest.MonkeyPatch) -> None:
    slime_call.install(monkeypatch)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("preset", ["dppo_tv", "icepop", "opsm"])
def test_a_token_that_the_engine_could_not_score_is_counted_and_never_a_nan(
    preset: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"preset": preset, "aggregation": "token_mean"}
    monkeypatch.setenv(slime.VARIABLE, json.dumps(spec))
    objective = mirrorpo.objective_from(spec)
    p = Packed()
    p.sampler[1][0] = bad
    samples = p.samples(reference=objective.needs_reference)
    loss, logged = slime_call.step(slime.loss_function, settings_of(objective), samples, p.logits)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, p.logits)[0].isfinite().all()
    assert objective.behaviour == "old" or logged["mirrorpo/behaviour/missing/frac"] > 0


def test_an_engine_that_reports_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slime.VARIABLE, "{preset: dppo_tv}")
    objective = mirrorpo.objective("dppo_tv")
    p = Packed()
    samples = [{k: v for k, v in s.items() if k != "rollout_log_probs"} for s in p.samples(reference=False)]
    with pytest.raises(ValueError, match="slime sent no rollout_log_probs"):
        slime_call.step(slime.loss_function, settings_of(objective), samples, p.logits)


@pytest.mark.parametrize("microbatches", [1, 5])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name not in ("opd", "a_star_po")]
)  # a teacher; an advantage
def test_every_preset_through_slime_is_ours_called_directly(
    preset: str, aggregation: str, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"preset": preset, "aggregation": aggregation}
    monkeypatch.setenv(slime.VARIABLE, json.dumps(spec))
    objective = mirrorpo.objective_from(spec)
    p = Packed()
    ours = p.directly(objective)
    loss, logged = slime_call.step(
        slime.loss_function,
        settings_of(objective),
        p.samples(reference=objective.needs_reference),
        p.logits,
        microbatches,
    )

    def slope(of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(of, p.logits, retain_graph=True)[0]

    assert_same((ours.loss.detach(), slope(ours.loss)), (loss.detach(), slope(loss)))
    if aggregation == "token_mean":  # then what slime logs is the mean over the step's tokens too
        assert logged["mirrorpo/clip/high/frac"] == pytest.approx(ours.metrics["clip/high/frac"].item(), abs=1e-9)
        assert logged["mirrorpo/ratio/mean"] == pytest.approx(ours.metrics["ratio/mean"].item(), abs=1e-9)


@pytest.mark.parametrize(
    ("spec", "settings", "reason"),
    [
        ("dapo", {}, "calculate_per_token_loss must be True for objective 'dapo'.*got False"),
        ("grpo", {}, "use_kl_loss must be True"),
        ("{preset: gspo, advantage: dr_grpo}", {}, "grpo_std_normalization must be False"),
        ("gspo", {"context_parallel_size": 2}, "context_parallel_size must be 1.*got 2"),
        ("gspo", {"kl_coef": 0.1}, "kl_coef must be 0.*got 0.1"),
        ("gspo", {"loss_type": "policy_loss"}, "loss_type must be 'custom_loss'.*got 'policy_loss'"),
        (
            "gspo",
            {"custom_loss_function_path": "mine.loss"},
            "custom_loss_function_path must be 'mirrorpo.*'mine.loss'",
        ),
        ("gspo", {"advantage_estimator": "ppo"}, "advantage_estimator must be 'grpo' or 'gspo' or 'cispo'.*got 'ppo'"),
        ("gspo", {"rewards_normalization": False}, "rewards_normalization must be True.*got False"),
        ("gspo", {"normalize_advantages": True}, "normalize_advantages must be False.*got True"),
        ("gspo", {"use_tis": True}, "use_tis must be False.*got True"),
        ("gspo", {"use_opsm": True}, "use_opsm must be False.*got True"),
        ("gspo", {"custom_pg_loss_reducer_function_path": "a.b"}, "custom_pg_loss_reducer_function_path must be None"),
        ("{preset: gspo, advantage: rloo}", {}, "slime cannot express advantage 'rloo'. Legal: grpo"),
        ("a_star_po", {}, "slime cannot express advantage 'soft_value'"),
        ("{preset: grpo, estimator: exact}", {}, "slime cannot express estimator 'exact'"),
        ("nothing.yaml", {}, "nothing.yaml: no such objective file"),
        ("", {}, "MIRRORPO_OBJECTIVE is not set"),
    ],
)
def test_arguments_that_contradict_the_objective_stop_slime_when_it_starts(
    spec: str, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(slime.VARIABLE, spec)
    with pytest.raises(InputError, match=reason):
        slime.check(slime_call.arguments(**settings))


def test_a_call_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slime.VARIABLE, "gspo")
    args = settings_of(mirrorpo.objective("gspo"))
    monkeypatch.setattr(slime, "_scored", lambda: lambda logits, args: None)
    with pytest.raises(TypeError, match=r"takes no 'response_lengths'.*mirrorpo passes args"):
        slime.check(args)
    del args.kl_coef
    with pytest.raises(TypeError, match="slime: kl_coef: there is no such setting"):
        slime.check(args)


def test_a_penalty_without_reference_log_probabilities_is_no_zero_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slime.VARIABLE, "grpo")
    p = Packed()
    with pytest.raises(ValueError, match="slime sent no ref_log_probs"):
        slime_call.step(
            slime.loss_function, settings_of(mirrorpo.objective("grpo")), p.samples(reference=False), p.logits
        )


def test_ratios_are_1_on_policy_where_the_engine_drew_from_a_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slime.VARIABLE, "{preset: dapo, aggregation: token_mean}")
    args = settings_of(mirrorpo.objective("dapo"), rollout_top_p=0.7)
    p = Packed()
    samples = p.samples(reference=False)
    for tokens, length, sample in zip(p.tokens, LENGTHS, samples, strict=True):
        response = tokens[len(tokens) - length :].tolist()
        # The token that was drawn and two others; the policy has not moved since the old policy was scored among them.
        kept = [sorted({token, (token + 1) % VOCABULARY, (token + 4) % VOCABULARY}) for token in response]
        sample["rollout_top_p_token_ids"] = [token for row in kept for token in row]
        sample["rollout_top_p_token_offsets"] = [3 * t for t in range(length + 1)]
    _, found = slime_call.get_log_probs_and_entropy(
        p.logits,
        args=args,
        unconcat_tokens=p.tokens,
        total_lengths=[len(t) for t in p.tokens],
        response_lengths=list(LENGTHS),
        top_p_token_ids=[sample["rollout_top_p_token_ids"] for sample in samples],
        top_p_token_offsets=[sample["rollout_top_p_token_offsets"] for sample in samples],
    )
    for sample, logp in zip(samples, found["log_probs"], strict=True):
        sample["log_probs"] = logp.detach()
    _, logged = slime_call.step(slime.loss_function, args, samples, p.logits)
    assert logged["mirrorpo/ratio/mean"] == pytest.approx(1.0, abs=1e-9)
    without = [{k: v for k, v in sample.items() if k not in slime_call.KEPT} for sample in samples]
    with pytest.raises(ValueError, match=r"rollout_top_p is 0.7 and the batch has no rollout_top_p_token_ids"):
        slime_call.step(slime.loss_function, args, without, p.logits)


def test_the_entropy_bonus_of_slime_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slime.VARIABLE, "gspo")
    p = Packed()
    values = []
    for coefficient in (0.0, 0.5):
        args = settings_of(mirrorpo.objective("gspo"), entropy_coef=coefficient)
        loss, logged = slime_call.step(slime.loss_function, args, p.samples(reference=False), p.logits)
        values.append(loss.item())
    _, found = slime_call.get_log_probs_and_entropy(
        p.logits,
        args=args,
        unconcat_tokens=p.tokens,
        total_lengths=[len(t) for t in p.tokens],
        response_lengths=list(LENGTHS),
    )
    means = [(h * m).sum() / m.sum() for h, m in zip(found["entropy"], p.masks, strict=True)]
    assert values[0] - values[1] == pytest.approx(0.5 * torch.stack(means).mean().item(), rel=1e-9)
    assert "mirrorpo/entropy/mean" in logged


def test_the_command_writes_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slime", "grpo"]) == 0
    written = capsys.readouterr().out
    assert f"--custom-loss-function-path {slime.loss_function.__module__}.{slime.loss_function.__name__}" in written
    assert "--use-kl-loss" in written
