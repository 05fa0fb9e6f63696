"""``mirrorpo learn``: its outer step inside a training, its cost, resuming, its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mirrorpo import cli
from mirrorpo.config.search import LearnRecipe
from mirrorpo.config.shipped import find_recipe
from mirrorpo.config.train import load_recipe, recipe_from
from mirrorpo.divergences.neural.file import load_map
from mirrorpo.errors import InputError
from mirrorpo.search.learn_run import Learning, LearningTrainer, learn
from mirrorpo.training.loss import LossComputer
from mirrorpo.training.setup import prepare


def recipe(*overrides: str) -> LearnRecipe:
    data: dict[str, Any] = {
        "task": {"name": "arithmetic", "train_size": 64, "test_size": 8},
        "objective": {"preset": "nm_grpo", "estimator": "score", "coefficient": 30.0},
        "train": {"steps": 3, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-3, "save_every": 1},
        "eval": {"problems": 0},
        "learning": {"validation_problems": 16, "prompts": 2, "group_size": 4, "window": 2, "rate": 0.2},
    }
    data["train"]["max_completion_length"] = 24
    return recipe_from(data, overrides, "r", LearnRecipe)


def trainer_of(folder: Path, *overrides: str) -> tuple[Any, Learning]:
    given = recipe(*overrides)
    learning = Learning(given, "mirrorpo learn r")
    trainer = learning.trainer(learning.prepared(prepare(given)), folder, [])
    trainer.args.gradient_share_every = 0
    return trainer, learning


def run(out: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    return learn(recipe(*overrides), out, resume=resume, console=Console(quiet=True), command="mirrorpo learn r")


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_hypergradient_of_a_training_is_that_of_its_penalty_loss(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the coefficient c: the step moves by -(eta P) grad(penalty / c), and J along v by its product with v."""
    trainer, _ = trainer_of(
        tmp_path,
        *("learning.what=coefficient", "learning.rate=0", "train.steps=3", f"train.trl={{optim: {optim}}}"),
        *("objective.divergence={name: js}", "train.micro_batch_size=8", "train.learning_rate=0.002"),
    )
    seen: list[tuple[float, float]] = []
    tokens_of = LearningTrainer.tokens_of

    def checked(self: Any, held: Any, direction: Any) -> Any:
        with torch.no_grad():  # direction is eta P v: the penalty's gradient at the parameters before the step
            after = [p.clone() for p in self.trained()]
            for p, before in zip(self.trained(), self._centre, strict=True):
                p.copy_(before)
        moment = self._moment(True)
        total = 0.0
        for inputs, *_ in held:
            found = self.loss_computer(self.model, inputs, type(moment)(**{**vars(moment), "with_share": True}))
            slopes = torch.autograd.grad(found.output.penalty_loss, self.trained())
            total += sum((s * d).sum().item() for s, d in zip(slopes, direction, strict=True)) / len(held)
        with torch.no_grad():
            for p, value in zip(self.trained(), after, strict=True):
                p.copy_(value)
        tokens = tokens_of(self, held, direction)
        seen.append((total / self.coefficient, tokens.leash(self.policy_objective.penalties[0].divergence, 1.0).sum()))
        return tokens

    monkeypatch.setattr(LearningTrainer, "tokens_of", checked)
    trainer.train()
    assert len(seen) == 3
    assert seen[0][1] == 0.0  # p = q
    for expected, found in seen[1:]:
        assert abs(expected) > 1e-7
        assert float(found) == pytest.approx(expected, rel=0.02)  # float32 differences


def test_an_outer_step_reads_the_validation_prompts_once_forward_and_once_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trainer_of(tmp_path, "train.steps=2", "train.micro_batch_size=8")
    counts: dict[str, int] = {"losses": 0, "scores": 0, "backward": 0, "sequences": 0}
    inside = False
    validate, loss, scores, grad = (
        LearningTrainer.validation_gradient,
        LossComputer.__call__,
        LearningTrainer._get_per_token_logps_and_entropies,
        torch.autograd.grad,
    )

    def counted(self: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return validate(self)
        finally:
            inside = False

    def one_loss(self: Any, model: Any, inputs: Any, moment: Any) -> Any:
        counts["losses"] += inside
        counts["sequences"] += inside * len(inputs["completion_ids"])
        return loss(self, model, inputs, moment)

    def one_score(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["scores"] += inside
        return scores(self, *args, **kwargs)

    def one_backward(*args: Any, **kwargs: Any) -> Any:
        over_the_policy = isinstance(args[1], list) and len(args[1]) == len(trainer.trained())
        counts["backward"] += inside and over_the_policy  # the fused head and the divergences may call it within a loss
        return grad(*args, **kwargs)

    monkeypatch.setattr(LearningTrainer, "validation_gradient", counted)
    monkeypatch.setattr(LossComputer, "__call__", one_loss)
    monkeypatch.setattr(LearningTrainer, "_get_per_token_logps_and_entropies", one_score)
    monkeypatch.setattr(torch.autograd, "grad", one_backward)
    trainer.train()
    # 2 outer steps of 2 prompts with 4 completions, all in one micro-batch of 8; the reference is not read
    assert (counts["losses"], counts["sequences"], counts["scores"]) == (2, 16, 0)
    assert counts["backward"] == 2


def test_validation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    """With a rate of 0 the run is the plain training on the same rows: metrics, draws and weights."""
    weights = []
    for every in (1, 1000):
        trainer, _ = trainer_of(tmp_path / str(every), "learning.rate=0", f"learning.every={every}", "train.steps=3")
        trainer.train()
        logged = [{k: v for k, v in row.items() if "time" not in k and "second" not in k and "runtime" not in k}
                  for row in trainer.state.log_history]  # fmt: skip
        weights.append((torch.cat([p.detach().flatten() for p in trainer.trained()]), logged, trainer.outer))
    assert (weights[0][2], weights[1][2]) == (3, 0)
    assert torch.equal(weights[0][0], weights[1][0])
    strip = {"train_samples_per_second", "train_steps_per_second", "train_runtime", "step_time"}
    assert [{k: v for k, v in row.items() if k not in strip} for row in weights[0][1]] == [
        {k: v for k, v in row.items() if k not in strip} for row in weights[1][1]
    ]


def test_no_validation_prompt_is_trained_on() -> None:
    for task in ("{name: arithmetic, train_size: 64, test_size: 8}", "{name: arithmetic, difficulty: hard}"):
        learning = Learning(recipe(f"task={task}"), "c")
        prepared = learning.prepared(prepare(recipe(f"task={task}")))
        held = {row["prompt"] for row in learning.validation}
        assert len(held) == 16
        assert not held & {row["prompt"] for row in prepared.train_rows}


def test_a_killed_learning_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "a")
    assert whole["learned"]["outer_steps"] == 3
    after_step = LearningTrainer.after_step

    def killed(self: Any) -> None:
        after_step(self)
        if self.state.global_step == 2:  # in the third step: the checkpoint of the second is there
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LearningTrainer, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    run(tmp_path / "b", resume=True)
    for name in ("learned_map.json", "learning.jsonl", "model/model.safetensors", "learning.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    found = load_map(tmp_path / "a" / "learned_map.json")
    assert found.origin == "learned in 3 outer steps"
    assert not torch.equal(found.parameters, torch.tensor(recipe().start(), dtype=torch.float64))
    history = [json.loads(line) for line in (tmp_path / "a" / "learning.jsonl").read_text().splitlines()]
    assert [row["outer"] for row in history] == [0, 1, 2]
    assert history[0]["hypergradient"] == 0.0  # the policy has not left its reference


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.estimator=sampled"], "estimator 'score'"),
        (["learning.what=beta"], "learning.what 'beta' needs objective.divergence 'beta', got 'neural'"),
        (["learning.what=alpha", "learning.rule=exponentiated"], "rule must be projected for alpha"),
        (["learning.prompts=17"], "prompts must be at most validation_problems = 16, got 17"),
        (["train.precision=bfloat16"], "train.precision must be float32"),
        (["objective.coefficient=0"], "one penalty, got 0"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_optimiser_whose_step_is_not_known_is_refused(tmp_path: Path) -> None:
    for trl in ("{optim: adafactor}", "{optim: sgd, optim_args: momentum=0.9}"):
        with pytest.raises(InputError, match=r"train\.trl\.optim: must be one of adamw_torch, adamw_torch_fused, sgd"):
            trainer_of(tmp_path, f"train.trl={trl}")


def test_the_command_learns_and_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_recipe(find_recipe("learn/embedded"), ["train.steps=1"], LearnRecipe)
    small = ["train.steps=2", "train.prompts_per_step=4", "train.group_size=4", "eval.problems=0"]
    small += ["learning.what=beta", "learning.rate=0.3", "objective.divergence={name: beta, beta: 0.5}"]
    monkeypatch.setattr("sys.argv", ["mirrorpo", "learn", "learn/embedded", *small, "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    first, last = re.search(r"2 outer steps; beta (\S+) -> (\S+)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert float(first) == 0.5
    assert 0.0 < abs(float(last) - 0.5) <= 0.3 + 1e-6  # the first step has no gradient: p = q
