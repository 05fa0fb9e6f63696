"""Two processes with gloo are one: loss, gradient and every metric, in every average, ragged and with an empty rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import two_ranks

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` of two processes on this machine; with ``--cpu`` it would leave starting them to MPI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]
    paths = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "training")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("MIRRORPO_CHECK_SHAPES", None)
    return subprocess.run(
        [*command, str(port), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.teacher(folder)
    done = launch(str(ROOT / "tests" / "training" / "two_ranks.py"), str(folder), folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{index}.pt") for index in range(2)]


@pytest.mark.parametrize("case", two_ranks.cases(), ids=" with ".join)
def test_two_processes_give_the_loss_gradient_and_metrics_of_one(
    case: tuple[str, str, str], ranks: list[Any], tmp_path: Path
) -> None:
    assert [found[case]["type"] for found in ranks] == ["DistributedType.MULTI_CPU"] * 2
    assert [found[case]["packed"] for found in ranks] == [case[2] != "padded"] * 2
    one = two_ranks.measure(*case, tmp_path)
    assert {"ratio/q99/mean", "penalty_gradient_share", "clip/high/frac", "entropy/mean"} <= set(one["metrics"])
    for found in ranks:
        assert_same(found[case], one)


@pytest.mark.parametrize("case", two_ranks.sharded_cases(), ids=" with ".join)
def test_parameters_sharded_by_fsdp2_give_the_loss_gradient_and_metrics_of_one_process(
    case: tuple[str, str, str], ranks: list[Any], tmp_path: Path
) -> None:
    one = two_ranks.measure(*case, tmp_path)
    one["metrics"].pop("penalty_gradient_share")  # not measured where gradients are sharded
    for found in ranks:
        assert found["FSDP2", case]["parameters"] == "DTensor"
        # Packed where every process can: one without a token, or with two rows, pads, and so does the other.
        packed = case[1] == "ragged" and case[2] in ("packed", "LoRA", "resharded")
        assert found["FSDP2", case]["read in a row"] == packed
        assert_same(found["FSDP2", case], one)


def assert_same(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert one["gradient"].abs().max() > 1e-4
    assert abs(two["loss"] - one["loss"]) < 1e-5
    assert (two["gradient"] - one["gradient"]).abs().max() < 1e-5 * max(1.0, one["gradient"].abs().max())
    assert set(two["metrics"]) == set(one["metrics"])
    # By TRL's definition the extremes are of the processes' own means: they depend on the number of processes.
    wrong = {
        name: (two["metrics"][name], value)
        for name, value in one["metrics"].items()
        if name not in ("clip_ratio/low_min", "clip_ratio/high_max")
        and abs(two["metrics"][name] - value) > 1e-5 * max(1.0, abs(value))
    }
    assert wrong == {}


def test_settings_that_differ_between_processes_are_refused_at_the_start(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["unequal"] == (
            "learning_rate must be the same on all 2 processes, got process 0: 0.001, process 1: 0.002"
        )


SMALL = ("train.steps=2", "eval.problems=5", "train.prompts_per_step=4", "train.group_size=4", "train.save_every=1")


def test_a_recipe_trains_under_accelerate_launch_and_one_process_writes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = str(ROOT / "recipes" / "arithmetic.yaml")
    done = launch("-m", "mirrorpo.cli", "train", recipe, *SMALL, "--json", "--out", str(out), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)  # one document: one process speaks
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["problems"] == 5
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["problem"] for s in samples if s["when"] == "after"] == [0, 1, 2, 3, 4]
    last = out / "checkpoints" / "checkpoint-2"
    assert {"manifest.json", "model.safetensors"} <= {path.name for path in last.iterdir()}
    assert {f"progress-{index}.pt" for index in (0, 1)} <= {path.name for path in last.iterdir()}
