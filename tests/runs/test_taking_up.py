"""A run whose files were damaged after it stopped: the damage shows before the next step, and what can be saved is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import run

from chaos.comparing import differences
from refusal import snapshot

SMALL = (
    "train.steps=4", "train.prompts_per_step=2", "train.group_size=4", "train.save_every=2", "train.keep=2",
    "train.max_completion_length=12", "task.difficulty=easy", "task.train_size=16", "eval.problems=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run("train", "arithmetic", *SMALL, "--out", str(out))
    return out


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run, killed behind its last checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("summary.json", "samples.jsonl", "report.html", "curve.png"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    return out


def test_metrics_without_their_last_line_fall_back_to_the_checkpoint_before(whole: Path, stopped: Path) -> None:
    metrics = stopped / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]) + lines[3][:20])
    done = run("train", "arithmetic", *SMALL, "--out", str(stopped), "--resume")
    assert "metrics.jsonl has only 3 whole steps; going on from checkpoint-2" in done.stderr
    # Python's own random generator, which no number depends on, is drawn from by other tests in this process too.
    assert set(differences(whole, stopped)) <= {"checkpoints/checkpoint-4/rng_state.pth"}


def test_metrics_that_no_checkpoint_fits_are_one_line(stopped: Path) -> None:
    (stopped / "metrics.jsonl").write_text("")
    done = run("train", "arithmetic", *SMALL, "--out", str(stopped), "--resume", status=1)
    assert "no checkpoint can be used (checkpoint-2: metrics.jsonl has only 0 whole steps)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_evaluation_before_training_is_found_before_the_first_step(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "before.json").write_text(json.dumps({"summary": {"accuracy": "x"}, "samples": []}))
    before = snapshot(stopped)
    done = run("train", "arithmetic", *SMALL, "--out", str(stopped), "--resume", status=2)
    assert "before.json: key 'accuracy_before' must be a number or null, got 'x'; remove the file" in done.stderr
    after = snapshot(stopped)
    assert {name for name in after if after[name] != before.get(name)} <= {str(stopped / ".lock")}
    (stopped / "before.json").unlink()
    run("train", "arithmetic", *SMALL, "--out", str(stopped), "--resume")
