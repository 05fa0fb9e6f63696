"""TRL's DPO trainer with any divergence: equal to TRL's own four, right for the others, and refusals."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import mirrorpo
from mirrorpo.config.shipped import find_recipe
from mirrorpo.config.train import Recipe, load_recipe, recipe_from
from mirrorpo.errors import InputError
from mirrorpo.models import builtin_path
from mirrorpo.tasks import Arithmetic
from mirrorpo.training import MirrorDPOConfig, MirrorDPOTrainer, NonFiniteError, preference_trainer
from mirrorpo.training.preference_trainer import DPO_SEAMS
from mirrorpo.training.resuming import Resumable
from mirrorpo.training.run import train

TINY = str(builtin_path("tiny"))
PAIRS = Dataset.from_list(
    [
        {"prompt": "12+7*3=?", "chosen": "7*3=21;12+21=33#### 33", "rejected": "#### 35"},
        {"prompt": "5*5-4=?", "chosen": "#### 21", "rejected": "5*5=20;20-4=16#### 16"},
        {"prompt": "2*9+1=?", "chosen": "2*9=18;18+1=19#### 19", "rejected": "#### 29"},
        {"prompt": "90-8*8=?", "chosen": "8*8=64;90-64=26#### 26", "rejected": "8*8=64;90-64=36#### 36"},
    ]
)
SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 4,
    "disable_dropout": True,
    "max_steps": 1,
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def moved_model() -> Any:
    """The tiny model away from its reference, by the same noise every time."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_of(folder: Path, **settings: Any) -> Any:
    ours = "divergence" in settings
    config = (MirrorDPOConfig if ours else DPOConfig)(str(folder), **{**SETTINGS, **settings})
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    kind = MirrorDPOTrainer if ours else DPOTrainer
    return kind(moved_model(), reference, args=config, train_dataset=PAIRS)


def loss_and_gradient(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.model.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


# (ours, TRL's): TRL's js_divergence is twice the mean of both KLs to the mixture
EQUAL = {
    "reverse_kl": ({"divergence": "reverse_kl"}, {"f_divergence_type": "reverse_kl"}),
    "forward_kl": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"divergence": "js", "beta": 0.2}, {"f_divergence_type": "js_divergence", "beta": 0.1}),
    "alpha": (
        {"divergence": {"name": "alpha", "alpha": 0.3}},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "the same fields": (
        {"divergence": None, "f_divergence_type": "js_divergence", "loss_type": "hinge"},
        {"f_divergence_type": "js_divergence", "loss_type": "hinge"},
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_are_those_of_trl(name: str, tmp_path: Path) -> None:
    ours, trls = EQUAL[name]
    loss, gradient = loss_and_gradient(trainer_of(tmp_path / "ours", **ours))
    expected, expected_gradient = loss_and_gradient(trainer_of(tmp_path / "trl", **trls))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6 * expected_gradient.abs().amax())
    assert expected_gradient.norm() > 1e-3


@pytest.mark.parametrize("precomputed", [False, True])
def test_every_other_divergence_is_the_preference_loss_of_the_sequences(tmp_path: Path, precomputed: bool) -> None:
    trainer = trainer_of(
        tmp_path, divergence="hellinger", beta=0.5, **({"precompute_ref_log_probs": True} if precomputed else {})
    )
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for model in (moved_model(), reference):
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            rows.append((logp * mask).sum(-1).chunk(2))
    (chosen, rejected), (ref_chosen, ref_rejected) = rows
    expected = mirrorpo.preference_loss(chosen, rejected, ref_chosen, ref_rejected, "hellinger", 0.5)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    # s = (1 - sqrt(q / p)) / 2
    rewards = [0.5 * 0.5 * (1 - (0.5 * (z - x)).exp()) for x, z in ((chosen, ref_chosen), (rejected, ref_rejected))]
    metrics = trainer._metrics["train"]
    assert metrics["rewards/chosen"] == pytest.approx([rewards[0].mean().item()], rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx([(rewards[0] - rewards[1]).mean().item()], rel=1e-4)
    assert metrics["rewards/accuracies"] == [(rewards[0] > rewards[1]).float().mean().item()]
    assert metrics["entropy"][0] > 0  # TRL's own metrics are there too


def test_an_adapter_is_compared_with_the_model_without_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = MirrorDPOConfig(str(tmp_path), divergence="js", beta=0.2, **SETTINGS)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trainer = MirrorDPOTrainer(model, args=config, train_dataset=PAIRS, peft_config=adapter)
    first, gradient = loss_and_gradient(trainer)
    # at the start both are the same model: log 2, and a gradient through the adapter
    torch.testing.assert_close(first, torch.tensor(2.0).log())
    assert gradient.norm() > 0
    trainer.train()
    assert loss_and_gradient(trainer)[0] < first


def test_training_and_evaluation_run_and_the_margin_grows(tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 6, "learning_rate": 1e-3, "logging_strategy": "steps", "logging_steps": 1}
    config = MirrorDPOConfig(str(tmp_path), divergence="jeffreys", eval_strategy="no", **settings)
    trainer = MirrorDPOTrainer(TINY, args=config, train_dataset=PAIRS, eval_dataset=PAIRS)
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 0.5
    assert trainer.evaluate()["eval_loss"] < 0.6


def test_the_overridden_methods_of_trl_have_the_signatures_that_are_overridden() -> None:
    ours = {name for kind in (MirrorDPOTrainer, Resumable) for name in vars(kind) if name[0] == "_" != name[1]}
    assert {name for name in ours if inspect.isfunction(getattr(DPOTrainer, name, None))} == set(DPO_SEAMS)
    for name, expected in DPO_SEAMS.items():
        assert list(inspect.signature(getattr(DPOTrainer, name)).parameters)[1:] == list(expected)
    source = inspect.getsource(DPOTrainer._compute_loss)
    for used in ("log_probs", "completion_mask", "precompute_ref_logps", "ref_chosen_logps", "router_aux_loss_coef"):
        assert used in source, used


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "js_divergence"}, "unknown divergence 'js_divergence'"),
        ({"divergence": "k2"}, "'k2' is not"),
        ({"divergence": 3}, "divergence must be a name or a mapping with 'name', got int"),
        ({"divergence": {"alpha": 1.5}}, "needs the key 'name'"),
        ({"divergence": "js", "beta": 0.0}, r"beta must be a number in \(0, inf\], got 0.0"),
        ({"divergence": "js", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' has no effect"),
        ({"divergence": "alpha", "f_alpha_divergence_coef": 0.3}, "use divergence={'name': 'alpha'"),
        ({"divergence": "js", "loss_type": "ipo"}, r"loss_type=\['ipo'\] has no effect .*legal: 'sigmoid'"),
        ({"divergence": "js", "loss_type": ["sigmoid", "sft"]}, "loss_type="),
        ({"divergence": "js", "loss_weights": [0.5]}, "loss_weights="),
        ({"divergence": "js", "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect"),
        ({"divergence": "js", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
        ({"divergence": "js", "use_weighting": True}, "use_weighting=True has no effect"),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef=0.3 has no effect with f_divergence_type='reverse_kl'",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_in_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MirrorDPOConfig(str(tmp_path), **{**SETTINGS, **settings})
    assert "\n" not in str(caught.value)


def test_the_trainer_says_what_its_divergence_cannot_do(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the reward is not identified"):
        trainer_of(tmp_path, divergence="chi2")
    with pytest.warns(UserWarning, match="flat for the probabilities of whole sequences"):
        trainer_of(tmp_path, divergence="prob_l2")


def test_a_config_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args must be a MirrorDPOConfig, got DPOConfig"):
        MirrorDPOTrainer(TINY, args=DPOConfig(str(tmp_path), **SETTINGS), train_dataset=PAIRS)


# A recipe with the group preference


def recipe(*overrides: str) -> Recipe:
    data: dict[str, Any] = {
        "task": {"name": "arithmetic", "train_size": 24, "test_size": 8},
        "preference": {"divergence": "jeffreys"},
        "train": {"steps": 4, "prompts_per_step": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "save_every": 1},
        "eval": {"problems": 8},
    }
    data["train"]["max_completion_length"] = 16
    return recipe_from(data, overrides, "r")


def run(out: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    return train(recipe(*overrides), out, resume=resume, console=Console(quiet=True), command="mirrorpo train r")


def test_a_killed_preference_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps see every pair once; the fourth, in the second epoch, is made by the resumed run."""
    whole = run(tmp_path / "a")
    assert (whole["pairs"], whole["objective"]) == (24, "preference")
    assert whole["objective_line"] == "preference loss: divergence jeffreys, beta 0.1"
    assert whole["reference"] == "a frozen copy of the policy's start"
    compute_loss = MirrorDPOTrainer.compute_loss

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MirrorDPOTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    run(tmp_path / "b", resume=True)
    model = "model/model.safetensors"
    assert (tmp_path / "a" / model).read_bytes() == (tmp_path / "b" / model).read_bytes()
    texts = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in "ab"]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    without_time = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in rows]
    assert without_time[0] == without_time[1]
    assert rows[0][0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)  # the policy is its reference
    assert rows[0][-1]["rewards/margins"] > 0.0
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "Pairs ranked right" in page
    assert not list((tmp_path / "a").rglob("*.bin"))


def test_a_resumed_preference_training_keeps_its_loss(tmp_path: Path) -> None:
    run(tmp_path, "train.steps=1", "eval.problems=0")
    with pytest.raises(InputError, match=r"--resume: preference\.beta is 0\.5, the run in .* has 0\.1"):
        run(tmp_path, "train.steps=1", "eval.problems=0", "preference.beta=0.5", resume=True)


def test_a_loss_that_is_not_a_number_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference_trainer, "loss_of", lambda *given: given[1].sum() * math.nan)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        run(tmp_path, "eval.problems=0")


def test_the_pairs_of_a_task_are_right_and_wrong_derivations_of_its_training_problems() -> None:
    for difficulty in ("medium", "hard"):
        task = Arithmetic(difficulty=difficulty, train_size=200)
        for number, row in enumerate(task.rows("train")):
            chosen, rejected = task.pair(row, number)
            assert (task.grade(chosen, row).reward, task.grade(rejected, row).reward) == (1.0, 0.0)
    with pytest.raises(ValueError, match="difficulty is 'easy'"):
        Arithmetic(difficulty="easy").pair({"prompt": "1+2=?"}, 0)


def test_the_shipped_recipe_is_whole_and_its_pairs_are_seen_once() -> None:
    shipped = load_recipe(find_recipe("preferences"))
    assert shipped.preference is not None
    assert shipped.task.train_size == shipped.train.steps * shipped.train.prompts_per_step  # pyright: ignore


PAIR = {"prompt": "2*3+4=?", "chosen": "2*3=6;6+4=10#### 10", "rejected": "#### 9"}
TESTED = Arithmetic(test_size=8).rows("test")[0]["prompt"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR], "train.prompts_per_step: 8 pairs a step, but there are 1"),
        ([PAIR] * 8 + [{**PAIR, "prompt": TESTED}], "preference.pairs: 1 of its prompts are test problems"),
        ([{"prompt": "1+1=?", "chosen": "1+1=?2", "rejected": "1+1=?3"}], "line 1: chosen and rejected begin with the"),
        ([{**PAIR, "rejected": PAIR["chosen"]}], "line 1: chosen and rejected are the same text"),
        ([{**PAIR, "rejected": " "}], "line 1: field 'rejected' must be a text that is not empty"),
        ([{"prompt": "1", "chosen": "2"}], "line 1: no field 'rejected'"),
        ([{**PAIR, "chosen": None}], "line 1: field 'chosen' must be a text that is not empty, got None"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_used_is_refused_in_one_line(rows: list, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out", f"preference.pairs={path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preference.divergence=k2"], "'k2' is not"),
        (["preference.divergence=kl_divergence"], "unknown divergence 'kl_divergence'"),
        (["preference.beta=0"], "preference.beta"),
        (["objective.preset=dapo"], "objective, reference and teacher have no effect with preference"),
        (["reference.kind=synced"], "objective, reference and teacher have no effect with preference"),
        (["train.group_size=8"], "train.group_size has no effect with preference"),
        (["train.use_vllm=true"], "train.use_vllm has no effect with preference"),
        (["train.micro_batch_size=3"], "micro_batch_size"),
        (["task={name: words}"], "preference.pairs: task words has no pairs of its own"),
        (["task.difficulty=easy"], "difficulty is 'easy'"),
        (["train.trl={loss_type: ipo}"], "has no effect"),
        (["train.trl={nonsense: 1}"], "train.trl"),
    ],
)
def test_a_key_without_effect_on_pairs_is_refused_in_one_line(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out", *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
