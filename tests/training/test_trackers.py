"""Trackers, completions and other fields of TRL from a recipe: what they write, offline, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import refused
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training.records import trim_metrics
from mirrorpo.training.run import train
from mirrorpo.training.setup import prepare, trainer_config

SMALL = {
    "task": {"name": "arithmetic", "difficulty": "easy"},
    "train": {"steps": 3, "prompts_per_step": 2, "group_size": 4, "updates_per_batch": 2, "max_completion_length": 12},
}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class Recorder(TrainerCallback):
    """In the place of a tracker that TRL starts by name."""

    seen: list[tuple[str, int, dict[str, Any]]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(("begin", state.global_step, {}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(("log", state.global_step, dict(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(("end", state.global_step, {}))


def run(folder: Path, *overrides: str, resume: bool = False) -> list[tuple[str, int, dict[str, Any]]]:
    """What a tracker beside TensorBoard has seen: event, optimiser step, numbers."""
    seen: list[tuple[str, int, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "seen", seen, raising=False)
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Recorder)
        patch.setattr("mirrorpo.training.setup.find_spec", lambda name: object())
        recipe = recipe_from(SMALL, [*TRAINS, *overrides])
        train(recipe, folder, resume=resume, console=Console(quiet=True), command="mirrorpo train x")
    return seen


# Some rewards differ, so the weights move.
TRAINS = ("task.difficulty=medium", "train.max_completion_length=24", "eval.problems=8", "eval.every=2")
BOTH = ("train.report_to=[trackio, tensorboard]", "train.log_completions_every=2")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("tracked") / "run"
    return folder, run(folder, *BOTH)


def test_a_run_writes_to_tensorboard_and_keeps_the_completions_of_every_second_step(tracked: Any) -> None:
    folder, _ = tracked
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    theirs = {f"train/clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert {"train/reward", "train/clip/low/frac", *theirs} <= set(events.Tags()["scalars"])
    assert [step for step, _ in scalars(folder, "train/reward")] == [2, 4, 6]  # optimiser steps, two a batch
    # One process: the extremes over processes are its own mean.
    assert scalars(folder, "train/clip_ratio/low_min") == scalars(folder, "train/clip_ratio/low_mean")
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2}
    assert len(lines) == 8
    assert set(lines[0]) == {"step", "prompt", "completion", "rewards", "advantage"}


def test_trackers_get_the_evaluations_before_between_and_after_while_they_listen_and_no_weight_changes(
    tracked: Any, tmp_path: Path
) -> None:
    folder, seen = tracked
    run(tmp_path / "alone")
    weights = Path("model", "model.safetensors")
    assert (tmp_path / "alone" / weights).read_bytes() == (folder / weights).read_bytes()
    assert [event for event, *_ in (seen[0], seen[-1])] == ["begin", "end"]
    summary = json.loads((folder / "summary.json").read_text())
    between = json.loads((folder / "evaluations.jsonl").read_text())["summary"]
    values = [summary["mean_length_before"], between["mean_length"], summary["mean_length_after"]]
    assert len(set(values)) > 1
    found = [(step, logs["eval_mean_length"]) for _, step, logs in seen if "eval_accuracy" in logs]
    assert found == list(zip((0, 4, 6), values, strict=True))
    assert [step for _, step, _ in seen] == sorted(step for _, step, _ in seen)
    assert scalars(folder, "eval/mean_length") == [(step, pytest.approx(value)) for step, value in found]
    assert [step for step, _ in scalars(folder, "eval/truncated")] == [0, 4, 6]


def test_what_a_run_still_has_to_do_after_its_last_step_reaches_the_trackers_too(tracked: Any) -> None:
    folder, _ = tracked
    summary = folder / "summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()
    seen = run(folder, *BOTH, resume=True)
    assert [(event, step) for event, step, _ in seen] == [("log", 6), ("end", 6)]
    assert seen[0][2]["eval_mean_length"] == before["mean_length_after"]
    assert [step for step, _ in scalars(folder, "eval/mean_length")] == [0, 4, 6, 6]


def test_a_resumed_run_drops_the_completions_that_it_will_write_again(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "completion": "1\u2028NaN"}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "completions.jsonl").write_text("".join(lines) + lines[0][:9])
    trim_metrics(tmp_path, 0)
    assert (tmp_path / "completions.jsonl").read_text() == ""
    (tmp_path / "completions.jsonl").write_text("".join(lines) + lines[0][:9])
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "seconds": 1.0}}\n' for n in range(1, 7)))
    trim_metrics(tmp_path, 4)
    assert (tmp_path / "completions.jsonl").read_text() == "".join(lines[:2])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train.report_to=mlflow", "train.report_to"),
        ("train.trl.lerning_rate=1", "unknown field of GRPOConfig 'lerning_rate'"),
        ("train.trl.learning_rate=1", "train.trl.learning_rate: another key of the recipe decides it"),
        ("train.trl.loss_type=dapo", "train.trl: loss_type"),
        ("train.trl.use_liger_kernel=true", "train.trl: use_liger_kernel is not supported here"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_before_a_file_is_written(line: str, said: str, tmp_path: Path) -> None:
    assert said in refused("train", "arithmetic", line, "--out", "x", cwd=tmp_path)
    assert not (tmp_path / "x").exists()


def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrorpo.training.setup.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train\.report_to: needs the package 'wandb': pip install wandb"):
        prepare(recipe_from(SMALL, ["train.report_to=wandb"]))


def test_trackers_and_the_run_name_reach_trl(tmp_path: Path) -> None:
    config = trainer_config(
        recipe_from(SMALL, ["train.report_to=[trackio, tensorboard]", "train.run_name=mine"]), tmp_path
    )
    assert (config.report_to, config.run_name) == (["trackio"], "mine")
    assert trainer_config(recipe_from(SMALL, ["train.report_to=none"]), tmp_path).report_to == []
