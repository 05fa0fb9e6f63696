"""Runs that go on, or ended before their end: evaluations between the steps, the page meanwhile, and where it ended."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import Done, refused, run

from chaos.comparing import TIMES, differences
from mirrorpo.config.train import recipe_from
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.reports import write_curve, write_report
from mirrorpo.training import records
from mirrorpo.training.run import _evaluation_record
from reports.run_folder import HOSTILE, write_run

SMALL = (
    "train.steps=4", "train.prompts_per_step=2", "train.group_size=4", "train.save_every=2", "train.keep=2",
    "train.max_completion_length=12", "task.difficulty=easy", "task.train_size=16", "eval.problems=2",
)  # fmt: skip
EVERY = (*SMALL, "eval.every=1")
REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Without evaluations between the steps, on a disk that has no room for the page."""
    out = tmp_path_factory.mktemp("plain") / "run"

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "write_text_atomic", refuse)
        patch.setattr(records, "_PAUSE", 0.0)
        patch.setattr(records, "_SHARE", 1e9)
        return out, run("train", "arithmetic", *SMALL, "--out", str(out))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """With an evaluation behind every step, and every page that was there on the way."""
    out, pages = tmp_path_factory.mktemp("watched") / "run", []
    write = records.LiveReport.write

    def write_and_look(self: records.LiveReport, ended: str | None = None) -> None:
        write(self, ended)
        pages.append((out / "report.html").read_text().replace("\u00a0", " "))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.LiveReport, "write", write_and_look)
        patch.setattr(records, "_PAUSE", 0.0)
        patch.setattr(records, "_SHARE", 1e9)
        run("train", "arithmetic", *EVERY, "--out", str(out))
    return out, pages


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A JSON Lines file without its times."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


def test_evaluations_between_the_steps_change_no_number_of_the_training(
    plain: tuple[Path, Done], watched: tuple[Path, list[str]]
) -> None:
    without, with_them = plain[0], watched[0]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (without, with_them)]
    assert weights[0] == weights[1]
    assert lines_of(without / "metrics.jsonl") == lines_of(with_them / "metrics.jsonl")
    found = lines_of(with_them / "evaluations.jsonl")
    # The fourth step is the last: what comes after it is the evaluation after training.
    assert [line["step"] for line in found] == [1, 2, 3]
    assert {line["summary"]["problems"] for line in found} == {2}
    assert not (without / "evaluations.jsonl").exists()
    page = (with_them / "report.html").read_text()
    assert page.count("<h3>Accuracy</h3>") == 1
    assert 'data-steps="0,1,2,3,4"' in page


def test_the_page_is_there_while_the_run_goes_on_and_says_how_far_it_is(watched: tuple[Path, list[str]]) -> None:
    out, pages = watched
    assert all(REFRESH in page for page in pages)
    assert "Unfinished: step 0 of 4." in pages[0]
    assert "while evaluating before training" in pages[0]
    second = next(page for page in pages if "Unfinished: step 2 of 4." in page)
    for words in ("Last written 20", "Rollouts of step", "Generation of completions", "Truncated completions",
                  "Tokens per second", "at step"):  # fmt: skip
        assert words in second, words
    finished = (out / "report.html").read_text()
    assert REFRESH not in finished
    assert "Unfinished" not in finished
    assert "Where the time goes" in finished
    assert not (out / "progress.json").exists()


def test_a_disk_that_refuses_the_page_is_said_once_and_ends_no_training(plain: tuple[Path, Done]) -> None:
    out, done = plain
    assert done.stderr.count("the live report.html cannot be written (OSError: [Errno 28]") == 1
    assert "\r" not in done.stdout + done.stderr, "bars of other packages, drawn over themselves, in a log file"
    assert (out / "summary.json").exists()


def test_a_run_that_was_stopped_before_an_evaluation_makes_up_for_it(
    watched: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, stopped = watched[0], tmp_path / "run"
    shutil.copytree(whole, stopped)
    for name in ("summary.json", "samples.jsonl", "report.html", "curve.png"):
        (stopped / name).unlink()
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    lines = (stopped / "evaluations.jsonl").read_text().splitlines(keepends=True)
    # A signal ended the evaluation at step 2; the line of step 3 was torn by a kill.
    (stopped / "evaluations.jsonl").write_text(lines[0] + lines[2][:40])
    run("report", str(stopped))
    page = (stopped / "report.html").read_text().replace("\u00a0", " ")
    assert "Unfinished: step 4 of 4." in page
    assert "the newest checkpoint is that of step 2" in page
    run("train", "arithmetic", *EVERY, "--out", str(stopped), "--resume")
    # Python's own random generator, which no number depends on, is drawn from by other tests in this process too.
    assert set(differences(whole, stopped)) <= {"checkpoints/checkpoint-4/rng_state.pth"}


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed at step 12 of 40."""
    folder = write_run(tmp_path)
    for name in ("summary.json", "samples.jsonl"):
        (folder / name).unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:12]))
    (folder / "recipe.yaml").write_text(
        "task: {name: words}\nmodel: {path: builtin:tiny}\nobjective: {preset: dapo}\n"
        "train: {steps: 40, updates_per_batch: 2, passes_per_batch: 1, seed: 7}\neval: {temperature: 0.0}\n"
    )
    (folder / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    (folder / ".lock").touch()
    return folder


def read(folder: Path) -> str:
    """Its page, drawn now."""
    return write_report(folder).read_text(encoding="utf-8").replace("\u00a0", " ")


def test_a_killed_run_can_be_reported_and_says_where_it_ended(killed: Path) -> None:
    written = run("report", str(killed)).stdout.split()
    assert written == [str(killed / "curve.png"), str(killed / "report.html")]
    page = (killed / "report.html").read_text().replace("\u00a0", " ")
    assert "<title>dapo on words, unfinished</title>" in page
    assert "Unfinished: step 12 of 40." in page
    # Two optimiser steps a step: checkpoint-20 is that of step 10.
    assert "no process works on it any more, and it did not say why; the newest checkpoint is that of step 10." in page
    assert "Accuracy was not measured yet." in page
    assert REFRESH not in page


def test_a_run_that_another_process_works_on_is_shown_as_going_on(killed: Path) -> None:
    with (killed / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = read(killed)
        assert REFRESH in page
        assert "while training. The page loads itself again" in page
        # 12 steps of 0.7 s, 28 more to come.
        assert "0.7 s a step; about 19.6 s left" in page
    assert REFRESH not in read(killed)


@pytest.mark.parametrize("missing", [["metrics.jsonl"], ["metrics.jsonl", ".lock", "checkpoints"]])
def test_a_run_that_ended_before_its_first_step_is_reported_too(killed: Path, missing: list[str]) -> None:
    for name in missing:
        path = killed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "Unfinished: step 0 of 40." in read(killed)
    assert write_curve(killed).stat().st_size > 0


def test_what_a_run_said_of_its_end_and_of_its_rollouts_is_shown_as_text(killed: Path) -> None:
    said = {
        "phase": "training",
        "ended": f"stopped by SIGTERM after step 12 of 40 {HOSTILE}",
        "written": 1_764_000_000.0,
        "rollouts": {"step": 12, "samples": [{"prompt": HOSTILE, "completion": HOSTILE, "reward": 0.5}]},
    }
    (killed / "progress.json").write_text(json.dumps(said))
    page = read(killed)
    assert "It ended while training: stopped by SIGTERM after step 12 of 40" in page
    assert "Rollouts of step 12" in page
    assert "reward 0.5" in page
    assert "<script>alert" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("progress.json", "{", "progress.json: not JSON"),
        ("progress.json", "[]", "progress.json: expected a JSON object"),
        ("progress.json", '{"rollouts": {"samples": [{}]}}', "rollouts: key 'prompt' is missing"),
        ("evaluations.jsonl", '{"step": 1}\n{"step": 2}\n', "evaluations.jsonl, line 1: key 'problems' is missing"),
        ("before.json", '{"summary": {}, "samples": []}', "before.json: key 'accuracy_before' is missing"),
    ],
)
def test_a_broken_file_of_an_unfinished_run_is_named(killed: Path, name: str, content: str, words: str) -> None:
    (killed / name).write_text(content)
    assert words in refused("report", str(killed))


@pytest.mark.parametrize("recipe", ["", "[]", "{", "task: 3\ntrain: [1]\n", "train: {steps: -1}\neval: {every: x}\n"])
def test_a_recipe_that_says_little_leaves_its_parts_out(killed: Path, recipe: str) -> None:
    (killed / "recipe.yaml").write_text(recipe)
    assert "Unfinished: step 12." in read(killed)


def test_a_run_that_is_not_finished_cannot_be_compared(killed: Path, tmp_path: Path) -> None:
    message = refused("report", str(killed), "--out", str(tmp_path / "both"))
    assert "no finished run (there is no summary.json)" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("eval.every=5", "eval.every has no effect: the run has 4 steps (train.steps). Legal: 0 to 4, got 5"),
        ("eval.every=-1", "eval.every: input should be greater than or equal to 0, got -1"),
        ("eval.every=0.5", "eval.every: input should be a valid integer"),
    ],
)
def test_evaluations_that_never_fall_due_are_refused(tmp_path: Path, change: str, words: str) -> None:
    for more in (("--out", str(tmp_path / "out")), ("--plan",)):
        assert words in refused("train", "arithmetic", *SMALL, change, *more)
    assert not (tmp_path / "out").exists()


def test_evaluations_without_problems_or_without_training_are_refused(tmp_path: Path) -> None:
    assert "eval.every has no effect with eval.problems 0" in refused(
        "train", "arithmetic", *EVERY, "eval.problems=0", "--plan"
    )
    assert "eval.every has no effect in an evaluation, which has no steps: legal is 0, got 2" in refused(
        "eval", "builtin:tiny", "--task", "arithmetic", "eval.every=2"
    )
    assert "eval.every has no effect in a search" in refused(
        "evolve", "evolve/embedded", "eval.every=2", "--out", str(tmp_path / "out")
    )


def test_a_plan_counts_the_evaluations() -> None:
    planned = run("train", "arithmetic", *EVERY, "eval.every=3", "--plan").stdout
    # At steps 0 and 3 and after step 4.
    assert "evaluation  before, after and every 3 steps, 3 times, 2 problems x 1" in planned


def test_a_recipe_of_0_1_has_no_evaluations_between_the_steps() -> None:
    assert recipe_from({"task": {"name": "arithmetic"}}).eval.every == 0


def test_an_evaluation_in_which_nothing_can_be_scored_is_no_number() -> None:
    unscored = Sample(problem=0, prompt="", completion="", answer="", num_tokens=1, reward=None, reason="timeout")
    record = _evaluation_record(Evaluation(samples=(unscored,), samples_per_problem=1))
    assert record is not None
    assert record["summary"]["accuracy"] is None
    json.dumps(record, allow_nan=False)
