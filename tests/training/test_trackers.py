"""Trackers, completions and other fields of TRL from a recipe: what they write, offline, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import refused

from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training.records import trim_metrics
from mirrorpo.training.run import train
from mirrorpo.training.setup import prepare, trainer_config

SMALL = {
    "task": {"name": "arithmetic", "difficulty": "easy"},
    "train": {"steps": 3, "prompts_per_step": 2, "group_size": 4, "updates_per_batch": 2, "max_completion_length": 12},
    "eval": {"problems": 0},
}


def test_a_run_writes_to_tensorboard_and_keeps_the_completions_of_every_second_step(tmp_path: Path) -> None:
    overrides = ["train.report_to=tensorboard", "train.log_completions_every=2"]
    recipe = recipe_from(SMALL, [*overrides, "train.trl.min_p=0.01"])
    train(recipe, tmp_path / "run", resume=False, console=Console(quiet=True), command="mirrorpo train x")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    theirs = {f"train/clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert {"train/reward", "train/clip/low/frac", *theirs} <= names
    assert [event.step for event in events.Scalars("train/reward")] == [2, 4, 6]  # optimiser steps, two a batch
    # One process: the extremes over processes are its own mean.
    assert [e.value for e in events.Scalars("train/clip_ratio/low_min")] == [
        e.value for e in events.Scalars("train/clip_ratio/low_mean")
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2}
    assert len(lines) == 8
    assert set(lines[0]) == {"step", "prompt", "completion", "rewards", "advantage"}


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
