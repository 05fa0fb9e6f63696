"""The commands as a user runs them: exit status, stdout, stderr, and what is left on disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mirrorpo.cli import main

SMALL = (
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.save_every=2",
    "eval.problems=8",
    "train.max_completion_length=30",
)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, cwd: Path | None = None, status: int = 0) -> Done:
    """Runs the command in this process: importing the libraries takes seconds, and once is enough."""
    out, err, path = io.StringIO(), io.StringIO(), list(sys.path)
    returncode: Any = 0
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(chdir(cwd or Path.cwd()))
        stack.enter_context(patch.object(sys, "argv", ["mirrorpo", *arguments]))
        try:
            main()
        except SystemExit as exit_:
            returncode = exit_.code
    sys.path[:] = path
    sys.modules.pop("mine", None)
    assert returncode == status, err.getvalue()
    return Done(returncode, out.getvalue(), err.getvalue())


def refused(*arguments: str, cwd: Path | None = None) -> str:
    """The one line on stderr of a command that ends with status 2."""
    done = run(*arguments, cwd=cwd, status=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the demo's recipe."""
    out = tmp_path_factory.mktemp("runs") / "small"
    done = run("train", "arithmetic", *SMALL, "--out", str(out), "--json")
    assert json.loads(done.stdout)["steps"] == 4
    return out


def test_a_run_folder_holds_what_it_promises(finished: Path) -> None:
    names = {entry.name for entry in finished.iterdir()}
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "curve.png",
        "report.html",
        "model",
        "checkpoints",
        "samples.jsonl",
    } <= names
    steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    summary = json.loads((finished / "summary.json").read_text())
    for key in (
        "task",
        "objective",
        "seed",
        "steps",
        "seconds",
        "accuracy_before",
        "accuracy_after",
        "mean_length_before",
        "mean_length_after",
        "mirrorpo_version",
    ):
        assert summary[key] is not None, key
    assert {p.name for p in (finished / "checkpoints").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert (finished / "report.html").stat().st_size > 10_000


def test_a_folder_with_a_run_is_refused_and_stays_as_it_was(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert "already holds a run" in refused("train", "arithmetic", *SMALL, "--out", str(finished))
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    done = run("train", "arithmetic", *SMALL, "--out", str(finished), "--resume", "--json")
    assert "finished already" in done.stderr
    assert json.loads(done.stdout) == json.loads((finished / "summary.json").read_text())


def test_a_resumed_run_keeps_its_recipe(finished: Path) -> None:
    changed = [*SMALL[1:], "train.steps=9"]
    message = refused("train", "arithmetic", *changed, "--out", str(finished), "--resume")
    assert "train.steps is 9" in message
    assert "has 4" in message


def test_a_killed_run_resumes_from_its_last_checkpoint_without_a_step_twice(finished: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "killed"
    shutil.copytree(finished, out)
    for name in ("summary.json", "report.html", "curve.png", "samples.jsonl"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by the kill
    run("train", "arithmetic", *SMALL, "--out", str(out), "--resume")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (finished, out))
    assert after["accuracy_before"] == before["accuracy_before"]


def test_report_draws_a_run_again(finished: Path) -> None:
    (finished / "report.html").unlink()
    done = run("report", str(finished), "--json")
    assert [Path(p).name for p in json.loads(done.stdout)] == ["curve.png", "report.html"]
    assert (finished / "report.html").exists()


def test_eval_gives_accuracy_and_pass_at_k_with_intervals(finished: Path) -> None:
    done = run(
        "eval", str(finished / "model"), "eval.problems=6", "train.max_completion_length=30",
        "--task", "arithmetic", "--samples", "2", "-k", "1,2", "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["problems"] == 6
    assert 0.0 <= result["pass@1"] <= result["pass@2"] <= 1.0
    assert sum(result["reasons"].values()) == 12


@pytest.mark.parametrize("what", ["divergences", "regions", "objectives", "tasks", "recipes"])
def test_list_shows_names_and_papers(what: str) -> None:
    rows = json.loads(run("list", what, "--json").stdout)
    assert len(rows) >= 1
    assert all(row["name"] for row in rows)
    if what in ("divergences", "regions", "objectives"):
        assert all(row["source"] for row in rows)
    assert rows[0]["name"] in run("list", what).stdout


def test_the_installed_command_is_this_program() -> None:
    command = Path(sys.executable).parent / "mirrorpo"
    done = subprocess.run([command, "list", "nothing"], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown list 'nothing'")
    assert done.stderr.count("\n") == 1


def test_doctor_finds_this_machine_fit() -> None:
    findings = json.loads(run("doctor", "--json").stdout)
    assert {f["state"] for f in findings} <= {"ok", "warn"}
    assert {"torch", "trl", "disk", "memory"} <= {f["what"] for f in findings}


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["train", "arithmetik", "--out", "x"], "did you mean 'arithmetic'"),
        (["train", "absent.yaml", "--out", "x"], "no such recipe file"),
        (["train", "arithmetic", "train.group_size=1", "--out", "x"], "train.group_size"),
        (["train", "arithmetic", "model.path=./absent", "--out", "x"], "model.path './absent'"),
        (["train", "arithmetic", "train.prompts_per_step=100000", "train.group_size=2", "--out", "x"], "training rows"),
        (["train", "arithmetic", "task={name: jsonl, path: absent.jsonl}", "--out", "x"], "absent.jsonl: no such file"),
        (["train", "arithmetic", "--out", "x", "--resume"], "holds no run"),
        (["train", "arithmetic"], "--out"),
        (["eval", "builtin:tiny", "--task", "arithmetics"], "did you mean 'arithmetic'"),
        (["eval", "builtin:large", "--task", "arithmetic"], "'tiny'"),
        (["eval", "builtin:tiny", "--task", "arithmetic", "-k", "2"], "at most the number of samples"),
        (["eval", "builtin:tiny", "--task", "arithmetic", "-k", "x"], "comma-separated"),
        (["list", "divergence"], "did you mean 'divergences'"),
        (["report", "absent"], "no such folder"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(
    arguments: list[str], piece: str, tmp_path: Path
) -> None:
    assert piece in refused(*arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "is not empty and holds no run" in refused("train", "arithmetic", "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_reward_function_of_the_user_is_found_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(completion, row):\n    return float(len(completion) < 12)\n")
    rows = [{"q": f"say {i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "task={name: jsonl, path: data.jsonl, prompt: q, reward: 'mine:short'}"
    done = run("train", "arithmetic", task, *SMALL, "--out", "run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["accuracy_after"] is not None


def test_a_reward_function_that_raises_is_named_with_its_sample(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(completion, row):\n    raise KeyError('gold')\n")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(40)))
    task = "task={name: jsonl, path: data.jsonl, reward: 'mine:broken'}"
    done = run("train", "arithmetic", task, *SMALL, "eval.problems=0", "--out", "run", cwd=tmp_path, status=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "reward 'mine:broken' raised KeyError" in last
    assert "prompt" in last
