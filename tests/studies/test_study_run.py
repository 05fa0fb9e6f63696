"""A study records each run at once, repeats none, survives failures, and gives every arm the same start."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from test_cli import refused, run

from mirrorpo.config.study import Study, study_from
from mirrorpo.errors import InputError
from mirrorpo.reports.export import latex_text
from mirrorpo.reports.study_page import write_study_report
from mirrorpo.studies.gather import gather, statuses, study_collection
from mirrorpo.studies.job import ATTEMPTS, run_job
from mirrorpo.studies.runner import grown_from, open_study, run_study
from mirrorpo.workers import Done, Job, JobError, Record
from simulated import write_simulated

BASE = {
    "task": {"name": "arithmetic", "difficulty": "hard"},
    "train": {
        "steps": 2, "prompts_per_step": 2, "group_size": 4, "updates_per_batch": 2, "max_completion_length": 40,
        "learning_rate": 3e-4,
    },
    "eval": {"problems": 8},
}  # fmt: skip
ARMS = ("dr_grpo", "grpo", "cispo")
SILENT = Console(quiet=True)


def plan(num_seeds: int = 2, arms: Sequence[str] = ARMS, **other: Any) -> Study:
    settings = {"arms": list(arms), "seeds": list(range(num_seeds)), "baseline": arms[0], **other}
    return study_from({"base": BASE, **settings})


class Here:
    """A pool that simulates each run in this process; ``decide`` may raise or return another result."""

    num_threads = num_workers = 1

    def __init__(self, decide: Callable[[str], dict[str, Any] | None] = lambda key: None) -> None:
        self.decide, self.keys = decide, []

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        for job in jobs:
            self.keys.append(job.key)
            result = self.decide(job.key)
            if result is None:
                recipe = job.payload["recipe"]
                preset, seed = recipe["objective"]["preset"], recipe["train"]["seed"]
                write_simulated(Path(job.payload["folder"]), preset, seed, 0.5 + 0.01 * seed, steps=2)
                result = {"status": "finished", "attempts": 1, "seconds": 1.0, "accuracy_after": 0.5}
            yield Done(job=job, result=result, seconds=1.0)


class Training(Here):
    """A pool that trains, in this process: a worker's start takes seconds, and one test pays for it already."""

    folders: tuple[Path, ...] = ()

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        self.folders = tuple(Path(job.payload["folder"]) for job in jobs)
        for job in jobs:
            yield Done(job=job, result=run_job(job.payload), seconds=1.0)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def go(
    out: Path,
    pool: Here,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    redo: Sequence[str] = (),
    study: Study | None = None,
) -> None:
    study = grown_from(study or plan(), out, resume)
    with open_study(study, out, resume, "mirrorpo study x") as record:
        run_study(study, out, record, pool, SILENT, command="mirrorpo study x", retry_failed=retry_failed, redo=redo)


def kept(out: Path) -> dict[str, dict[str, Any]]:
    with open_study(plan(), out, True, "") as record:
        return statuses(record)


def test_every_run_is_recorded_in_the_moment_that_it_ends(tmp_path: Path) -> None:
    def stop_at_the_third(key: str) -> None:
        if key == "cispo/seed0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Here(stop_at_the_third))
    with sqlite3.connect(tmp_path / "study.sqlite") as database:
        keys = [key for (key,) in database.execute("SELECT key FROM results")]
    database.close()
    assert keys == ["dr_grpo/seed0", "grpo/seed0"]


def test_resume_repeats_no_run(tmp_path: Path) -> None:
    test_every_run_is_recorded_in_the_moment_that_it_ends(tmp_path)
    pool = Here()
    go(tmp_path, pool, resume=True)
    assert pool.keys == ["cispo/seed0", "dr_grpo/seed1", "grpo/seed1", "cispo/seed1"]
    again = Here()
    go(tmp_path, again, resume=True)
    assert again.keys == []
    found = study_collection(tmp_path)
    assert len(found.runs) == 6
    assert found.changes == {arm: f"objective: {{preset: {arm}}}" for arm in ARMS}


def test_a_resumed_study_takes_added_seeds_and_arms_and_keeps_what_it_has(tmp_path: Path) -> None:
    go(tmp_path, Here(), study=plan(1, ("dr_grpo", "grpo")))
    pool = Here()
    go(tmp_path, pool, resume=True, study=plan(2, ("dr_grpo", "grpo")))
    assert pool.keys == ["dr_grpo/seed1", "grpo/seed1"]
    pool = Here()
    go(tmp_path, pool, resume=True, study=plan(1, ("dr_grpo", "cispo")))  # grpo and seed 1 stay, unmentioned
    assert pool.keys == ["cispo/seed0"]
    found = study_collection(tmp_path)
    assert {arm: [run.seed for run in runs] for arm, runs in found.arms.items()} == {
        "dr_grpo": [0, 1],
        "grpo": [0, 1],
        "cispo": [0],
    }
    assert found.num_missing == 0
    settings = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert {arm: spec["seeds"] for arm, spec in settings["arms"].items()} == {
        "dr_grpo": [0, 1],
        "grpo": [0, 1],
        "cispo": [0],
    }


def test_a_study_that_was_stopped_while_it_grew_goes_on(tmp_path: Path) -> None:
    go(tmp_path, Here(), study=plan(1))

    def stop(key: str) -> None:
        if key == "grpo/seed1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Here(stop), resume=True, study=plan(2))
    pool = Here()
    go(tmp_path, pool, resume=True, study=plan(1))  # the first command again: what the folder holds is finished too
    assert pool.keys == ["grpo/seed1", "cispo/seed1"]


def test_one_run_is_thrown_away_and_run_again_when_asked(tmp_path: Path) -> None:
    go(tmp_path, Here())
    before = (tmp_path / "runs" / "grpo" / "seed1" / "summary.json").stat().st_mtime_ns
    pool = Here()
    go(tmp_path, pool, resume=True, redo=["grpo/seed1"])
    assert pool.keys == ["grpo/seed1#2"]
    assert (tmp_path / "runs" / "grpo" / "seed1" / "summary.json").stat().st_mtime_ns > before
    assert len(study_collection(tmp_path).runs) == 6
    with pytest.raises(InputError, match=r"--redo grpo/7: no such run; arms and seeds: dr_grpo 0, 1; grpo 0, 1"):
        go(tmp_path, pool, resume=True, redo=["grpo/seed7"])


def test_a_run_whose_redo_was_killed_is_run_by_the_next_resume(tmp_path: Path) -> None:
    go(tmp_path, Here())

    def stop(key: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Here(stop), resume=True, redo=["cispo/seed0"])
    pool = Here()
    go(tmp_path, pool, resume=True)
    assert pool.keys == ["cispo/seed0#2"]
    assert len(study_collection(tmp_path).runs) == 6


def test_a_study_of_one_arm_is_a_mean_over_seeds(tmp_path: Path) -> None:
    go(tmp_path, Here(), study=study_from({"base": BASE, "arms": ["grpo"], "seeds": [0, 1, 2]}))
    found = study_collection(tmp_path)
    assert found.baseline == "grpo"
    text = write_study_report(found, tmp_path)[1].read_text(encoding="utf-8")
    assert "One arm: grpo reached 51.0 % on average." in text.replace("\u00a0", " ")


def test_folders_are_joined_without_the_runs_that_they_share(tmp_path: Path) -> None:
    go(tmp_path / "first", Here(), study=plan(2))
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    go(tmp_path / "copy", Here(), resume=True, study=plan(3))
    found = gather([tmp_path / "first", tmp_path / "copy"])
    assert [len(runs) for runs in found.arms.values()] == [3, 3, 3]
    assert "6 runs are in more than one folder and were counted once." in found.notes
    summary = tmp_path / "copy" / "runs" / "grpo" / "seed1" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "accuracy_after": 0.9}))
    with pytest.raises(InputError, match="duplicate seed 1 of arm 'grpo'"):
        gather([tmp_path / "first", tmp_path / "copy"])


def test_a_study_is_exported_for_papers_and_other_tools(tmp_path: Path) -> None:
    go(tmp_path, Here(), study=plan(3))
    found = study_collection(tmp_path)
    written = [path.name for path in write_study_report(found, tmp_path, ("csv", "latex", "svg", "pdf", "png"))]
    assert written[3:] == ["curves.csv", "accuracy.tex", "study.svg", "study.pdf", "study.png"]
    rows = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert len(rows) == 3 * 3 * 2  # arms, seeds, steps
    assert (rows[0]["arm"], rows[0]["seed"], rows[0]["step"]) == ("dr_grpo", "0", "1")
    reward = found.arms["grpo"][2].metrics.columns["reward"][1]
    assert [float(row["reward"]) for row in rows if (row["arm"], row["seed"], row["step"]) == ("grpo", "2", "2")] == [
        reward
    ]
    table = (tmp_path / "accuracy.tex").read_text()
    assert table.count(r" \\") == 4
    assert r"dr\_grpo & 3 & 51.0 $\pm$ 1.0" in table
    assert (tmp_path / "study.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "study.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_name_of_an_arm_is_letters_in_a_latex_table() -> None:
    # A backslash before a tilde, a circumflex or a backslash is an accent or a line break: these three have macros.
    escaped = r"a\_b\&c\%d\$e\#f\{g\}h\textbackslash{}i\textasciitilde{}j\textasciicircum{}k"
    assert latex_text(r"a_b&c%d$e#f{g}h\i~j^k") == escaped


def failing(key: str) -> dict[str, Any] | None:
    return {"status": "failed", "attempts": 2, "reason": "ValueError: <b>x"} if key.startswith("grpo/seed1") else None


def test_a_failed_run_is_left_out_openly_and_its_seed_stays_for_the_others(tmp_path: Path) -> None:
    go(tmp_path, Here(failing))
    found = study_collection(tmp_path)
    assert [(f.arm, f.seed, f.reason) for f in found.failed] == [("grpo", 1, "ValueError: <b>x")]
    assert [len(runs) for runs in found.arms.values()] == [2, 1, 2]
    text = write_study_report(found, tmp_path)[1].read_text(encoding="utf-8")
    assert "Failed twice, and left out of every number: 1 run, grpo seed 1" in text.replace("\u00a0", " ")
    assert "the seeds that both arms have" in text


def test_a_failed_run_is_tried_again_only_when_asked(tmp_path: Path) -> None:
    go(tmp_path, Here(failing))
    again = Here()
    go(tmp_path, again, resume=True)
    assert again.keys == []
    go(tmp_path, again, resume=True, retry_failed=True)
    assert again.keys == ["grpo/seed1#2"]
    assert kept(tmp_path)["grpo/seed1"]["status"] == "finished"
    assert not study_collection(tmp_path).failed


def test_a_run_that_kills_its_workers_ends_neither_the_study_nor_the_other_runs(tmp_path: Path) -> None:
    def deadly(key: str) -> None:
        if key == "grpo/seed0":
            raise JobError("grpo/seed0", "2 workers died over it, the last by signal SIGKILL")

    go(tmp_path, Here(deadly))
    assert kept(tmp_path)["grpo/seed0"]["status"] == "failed"
    assert sum(result["status"] == "finished" for result in kept(tmp_path).values()) == 5


def test_a_run_that_raises_is_tried_once_more_and_then_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr("mirrorpo.training.run.train", fail)
    job = plan().jobs()[0]
    payload = {
        "recipe": job.recipe.model_dump(mode="json"), "folder": str(tmp_path / "a" / "b"), "threads": 1,
        "keep_models": False, "measure_divergence": True, "command": "",
    }  # fmt: skip
    assert run_job(payload) == {"status": "failed", "attempts": 2, "reason": "RuntimeError: no memory"}
    assert len(calls) == ATTEMPTS == 2


def test_a_run_waits_for_the_worker_that_is_dying_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(recipe: Any, folder: Path, **_: Any) -> dict[str, Any]:
        with (folder / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises unless it is free
        return {"seconds": 1.0, "accuracy_after": 0.5}

    monkeypatch.setattr("mirrorpo.training.run.train", free)
    (tmp_path / "recipe.yaml").touch()
    holder = (tmp_path / ".lock").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    dying = threading.Timer(0.2, holder.close)
    dying.start()
    payload = {
        "recipe": plan().jobs()[0].recipe.model_dump(mode="json"), "folder": str(tmp_path), "threads": 1,
        "keep_models": False, "measure_divergence": False, "command": "",
    }  # fmt: skip
    assert run_job(payload) == {"status": "finished", "attempts": 1, "seconds": 1.0, "accuracy_after": 0.5}
    dying.join()


@pytest.mark.parametrize("left", [".lock", ".study.yaml.0123456789ab.tmp"])
def test_a_study_that_was_killed_before_its_settings_were_there_begins_anew(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    go(tmp_path, Here())
    assert not list(tmp_path.glob("*.tmp"))
    assert len(study_collection(tmp_path).runs) == 6


def test_a_folder_in_the_wrong_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no study"):
        go(tmp_path / "absent", Here(), resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="is not empty and holds no study"):
        go(tmp_path / "full", Here())
    go(tmp_path / "study", Here())
    with pytest.raises(InputError, match="already holds a study"):
        go(tmp_path / "study", Here())
    with pytest.raises(
        InputError, match=r"--resume: margin is 0\.01, the study in .* has 0\.02; .* gain arms and seeds"
    ):
        go(tmp_path / "study", Here(), resume=True, study=plan(margin=0.01))
    slower = study_from({"base": {**BASE, "train": {**BASE["train"], "steps": 3}}, "arms": list(ARMS), "seeds": [0]},
                        ["baseline=dr_grpo"])  # fmt: skip
    with pytest.raises(InputError, match=r"--resume: arms\.dr_grpo\.train\.steps is 3, the study in .* has 2"):
        go(tmp_path / "study", Here(), resume=True, study=slower)
    with (
        open_study(plan(), tmp_path / "study", True, ""),
        pytest.raises(InputError, match=r"another process \(\d+\) is running"),
    ):
        go(tmp_path / "study", Here(), resume=True)


def test_a_study_is_not_resumed_with_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, Here())
    monkeypatch.setattr("mirrorpo.studies.runner.versions", lambda: {"mirrorpo": "9.9"})
    with pytest.raises(InputError, match=r"begun with mirrorpo .*, this is 9\.9: runs of mixed versions"):
        go(tmp_path, Here(), resume=True)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    go(tmp_path, Here())
    (tmp_path / "study.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match=r"study\.sqlite: is not a record of jobs"):
        study_collection(tmp_path)


# ---- the command, with real workers and real training


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, one seed, two steps each, in a worker process."""
    folder = tmp_path_factory.mktemp("real")
    spec = {"base": BASE, "arms": ["dr_grpo", "grpo"], "seeds": [3], "baseline": "dr_grpo"}
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    done = run("study", str(folder / "study.yaml"), "--out", str(folder / "out"), "--workers", "1", "--threads", "1")
    assert done.stdout.splitlines()[0] == "One seed: nothing can be concluded."
    assert "2/2 runs  grpo seed 3: accuracy" in done.stderr
    return folder / "out"


TIMES = (
    "seconds", "step_time", "generation_seconds", "reward_seconds", "scoring_seconds", "tokens_per_second", "command",
)  # fmt: skip


def numbers_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Everything that a run of a study keeps, but for times and the command line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        found[name] = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for name in ("summary.json", "divergence.json"):
        found[name] = [json.loads((folder / name).read_text())]
    found["recipe.yaml"] = [yaml.safe_load((folder / "recipe.yaml").read_text())]
    return {
        name: [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for name, rows in found.items()
    }


def test_a_study_on_ray_has_the_runs_of_one_in_local_processes(real: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    spec, out = str(real.parent / "study.yaml"), tmp_path / "out"
    done = run("study", spec, "--out", str(out), "--workers", "1", "--threads", "1", "--ray", "local")
    assert done.stdout.splitlines()[0] == "One seed: nothing can be concluded."
    for arm in ("dr_grpo", "grpo"):
        here, there = (numbers_of(folder / "runs" / arm / "seed3") for folder in (real, out))
        assert len(here["metrics.jsonl"]) == 2
        assert here == there
    records = [statuses(Record(folder / "study.sqlite")) for folder in (real, out)]
    assert records[0].keys() == records[1].keys()
    for name, result in records[0].items():
        assert {**result, "seconds": 0} == {**records[1][name], "seconds": 0}


def test_every_arm_starts_from_the_same_policy_and_the_same_rollouts(real: Path) -> None:
    first = []
    for arm in ("dr_grpo", "grpo"):
        folder = real / "runs" / arm / "seed3"
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        summary = json.loads((folder / "summary.json").read_text())
        first.append((line["reward"], line["completions/mean_length"], summary["accuracy_before"]))
    assert first[0] == first[1]


def test_a_run_of_a_study_keeps_its_numbers_and_drops_its_weights(real: Path) -> None:
    folder = real / "runs" / "grpo" / "seed3"
    names = {entry.name for entry in folder.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "divergence.json"} <= names
    assert not names & {"model", "checkpoints"}
    measured = json.loads((folder / "divergence.json").read_text())
    assert measured["reverse_kl"] > 0
    assert measured["tokens"] > 0
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 500_000


def test_the_report_command_draws_a_study_again_and_compares_its_runs(real: Path, tmp_path: Path) -> None:
    (real / "report.html").unlink()
    written = json.loads(run("report", str(real), "--json").stdout)
    assert [Path(path).name for path in written] == ["report.html", "report.md", "runs.csv"]
    runs = [str(real / "runs" / arm / "seed3") for arm in ("grpo", "dr_grpo")]
    run("report", *runs, "--out", str(tmp_path / "both"))
    assert "No run" not in (tmp_path / "both" / "report.md").read_text()
    assert (tmp_path / "both" / "runs.csv").read_text().splitlines()[1].startswith("grpo,3,finished")


def test_a_finished_study_resumes_to_its_report_without_a_run(real: Path) -> None:
    done = run(
        "study",
        str(real.parent / "study.yaml"),
        "--out",
        str(real),
        "--resume",
        "--workers",
        "1",
        "--threads",
        "1",
        "--json",
    )
    assert json.loads(done.stdout)["runs"] == 2
    assert "accuracy" not in done.stderr


def test_a_dry_run_tells_runs_time_and_disk_and_writes_nothing(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Training()
    monkeypatch.setattr("mirrorpo.cli.study_commands.open_pool", lambda *_: pool)
    out = tmp_path / "not" / "there" / "out"
    spec = str(real.parent / "study.yaml")
    done = run("study", spec, "seeds=[0,1,2]", "--out", str(out), "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert (found["runs"], found["arms"], found["seeds"]) == (6, 2, 3)
    assert found["seconds"] >= 6 * 2 * found["seconds_a_step"]
    assert 0 < found["megabytes"] < 5
    assert [folder.parent.parent for folder in pool.folders] == [tmp_path], "beside the study's folder: workers see it"
    assert list(tmp_path.iterdir()) == []


class Elsewhere(Training):
    """A pool whose workers see another disk."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        for job in jobs:
            yield Done(job=job, result={"status": "finished", "attempts": 1, "seconds": 1.0}, seconds=1.0)


def test_a_dry_run_on_other_machines_needs_a_folder_that_they_see(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = str(real.parent / "study.yaml")
    assert "--ray auto: needs --out, a folder that every node sees" in refused(
        "study", spec, "--dry-run", "--ray", "auto", cwd=tmp_path
    )
    monkeypatch.setattr("mirrorpo.cli.study_commands.open_pool", lambda *_: Elsewhere())
    (tmp_path / "file").touch()
    for out, reason in (("file/out", "cannot be written"), ("out", "every node must see the folder under the same")):
        done = run("study", spec, "--dry-run", "--ray", "auto", "--out", str(tmp_path / out), status=2)
        assert reason in done.stderr.splitlines()[-1]
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["study", "absent.yaml", "--out", "x"], "absent.yaml: no such recipe file"),
        (["study", "arithmetic", "--out", "x"], "is a recipe, not a study"),
        (["study", "arithmetic"], "--out: missing; give the study's folder"),
        (["study", "arithmetic", "--out", "x", "--retry-failed"], "--retry-failed: needs --resume"),
        (["study", "arithmetic", "--out", "x", "--redo", "a/1"], "--redo: needs --resume"),
        (["study", "arithmetic", "--out", "x", "--resume", "--redo", "a"], "--redo 'a': must be ARM/SEED, such as"),
        (["study", "arithmetic", "--out", "x", "--export", "gif"], "--export 'gif': must be one of csv, latex, svg"),
        (["report", "absent"], "no such folder"),
        (["report", ".", "--baseline", "x"], "--baseline: has no effect without --out"),
        (["report", ".", "--out", "x", "--target", "-1"], "--target -1.0: must be greater than 0"),
        (["report", ".", "--out", "x"], ".: is neither a run folder nor a study folder"),
    ],
)
def test_a_bad_command_line_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], piece: str) -> None:
    assert piece in refused(*arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_that_cannot_be_prepared_is_named_before_anything_runs(real: Path, tmp_path: Path) -> None:
    spec = str(real.parent / "study.yaml")
    out = str(tmp_path / "out")
    message = refused("study", spec, "base.model.path=./absent", "--out", out)
    assert "arms.dr_grpo: model.path './absent'" in message
    assert "eval.problems: must be at least 1" in refused("study", spec, "base.eval.problems=0", "--out", out)
    assert not (tmp_path / "out").exists()
