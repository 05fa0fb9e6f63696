"""`mirrorpo report` on folders from elsewhere: drawn or refused in one line, and nothing outside is read or changed."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import run

from refusal import refused, snapshot
from run_folder import write_run
from simulated import write_simulated

DEEP = "[" * 100_000
SECRET = "precious: secret"
Harm = Callable[[Path], None]


def replaced(name: str, content: str | bytes) -> Harm:
    """A file with other content."""

    def harm(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def folder_in_place_of(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return harm


def pipe_in_place_of(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return harm


def link_in_place_of(name: str) -> Harm:
    def harm(folder: Path) -> None:
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder.parent / "outside").write_bytes(kept)
        (folder / name).symlink_to(folder.parent / "outside")

    return harm


def edited(name: str, **changes: Any) -> Harm:
    """Keys of a JSON file with other values."""

    def harm(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**table, **changes}))

    return harm


FILES = ("summary.json", "metrics.jsonl", "samples.jsonl", "recipe.yaml")
# What a run may not hold, and a piece of the line that refuses it.
HARMS: dict[str, tuple[Harm, str]] = {
    **{f"{name} is a folder": (folder_in_place_of(name), f"{name}: is not a plain file") for name in FILES[1:]},
    **{f"{name} is a pipe": (pipe_in_place_of(name), f"{name}: is not a plain file") for name in FILES[1:3]},
    **{f"{name} is a link": (link_in_place_of(name), f"{name}: is a symbolic link") for name in FILES},
    "summary is deep": (replaced("summary.json", '{"task": ' + DEEP), "summary.json: not JSON"),
    "summary is binary": (replaced("summary.json", b"\xff\xfe\x00"), "summary.json: not JSON"),
    "summary is a list": (replaced("summary.json", "[1]"), "summary.json: expected a JSON object, found list"),
    "summary is empty": (replaced("summary.json", ""), "summary.json: not JSON"),
    "long digits": (replaced("summary.json", '{"seed": ' + "9" * 5000 + "}"), "summary.json: not JSON"),
    "task is a number": (edited("summary.json", task=5), "key 'task' must be text, got 5"),
    "seed is huge": (edited("summary.json", seed=1e200), "key 'seed' must be a whole number"),
    "steps below 0": (edited("summary.json", steps=-1), "key 'steps' must be at least 0, got -1"),
    "reasons are a list": (edited("summary.json", reasons_after=["x"]), "key 'reasons_after' must be an object"),
    "reasons below 0": (edited("summary.json", reasons_after={"x": -1}), "key 'x' must be at least 0, got -1"),
    "versions are text": (edited("summary.json", versions="1"), "key 'versions' must be an object"),
    "seconds not a number": (edited("summary.json", seconds=float("nan")), "key 'seconds' must be a finite number"),
    "metrics are deep": (replaced("metrics.jsonl", DEEP + "\n{}\n"), "metrics.jsonl, line 1: nested too deeply"),
    "metrics are texts": (replaced("metrics.jsonl", '{"step": 1, "loss": "x"}\n'), "key 'loss' must be a number"),
    "a step is a list": (replaced("metrics.jsonl", '{"step": [1]}\n'), "key 'step' must be a number"),
    "a step is huge": (replaced("metrics.jsonl", '{"step": 1e300}\n'), "key 'step' must be a whole number"),
    "samples are numbers": (replaced("samples.jsonl", "1\n2\n"), "samples.jsonl, line 1: expected a JSON object"),
    "a prompt is a list": (replaced("samples.jsonl", '{"when": "after", "prompt": []}\n'), "'prompt' must be text"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_hostile_run_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    harm, words = HARMS[name]
    (tmp_path / "run").mkdir()
    harm(write_run(tmp_path / "run"))
    assert words in refused(["report", "run"], tmp_path)


@pytest.mark.parametrize("target", ["report.html", "curve.png"])
def test_a_folder_where_a_report_goes_is_named(target: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (write_run(tmp_path / "run") / target).mkdir()
    done = run("report", "run", cwd=tmp_path, status=2)
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("target", ["report.html", "curve.png"])
def test_a_link_where_a_report_goes_is_replaced_not_followed(target: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text(SECRET)
    (write_run(tmp_path / "run") / target).symlink_to(tmp_path / "outside")
    run("report", "run", cwd=tmp_path)
    assert (tmp_path / "outside").read_text() == SECRET
    assert not (tmp_path / "run" / target).is_symlink()


@pytest.mark.parametrize(
    "harm",
    [
        replaced("metrics.jsonl", '{"step": 1, "loss": NaN, "x": Infinity, "y": 1e999}\n{"step": 2, "los'),
        replaced("metrics.jsonl", ""),
        replaced("metrics.jsonl", "\n\n"),
        replaced("metrics.jsonl", '{"step": 1, "' + "n" * 3_000 + '": 1}\n'),
        replaced("metrics.jsonl", "{" + '"step": 1, ' + ", ".join(f'"m{n}": {n}' for n in range(5_000)) + "}\n"),
        replaced("samples.jsonl", '{"when": "aft'),
        replaced("recipe.yaml", b"\xff\x00" + b"&a [*a" * 100),
        edited("summary.json", seconds=1e300, steps=0, accuracy_after=float("nan"), mean_length_after=float("inf")),
        edited("summary.json", versions={"torch": {"a": ["b"] * 1_000}}, commit=None, objective_line=None),
    ],
)
def test_what_can_be_drawn_of_a_damaged_run_is_drawn(harm: Harm, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    harm(write_run(tmp_path / "run"))
    run("report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000


# ---- studies


def study_folder(folder: Path) -> Path:
    """A finished study of two arms and two seeds."""
    settings = {
        "baseline": "a", "target": 0.5, "margin": 0.02,
        "arms": {arm: {"seeds": [0, 1], "changes": {"objective": {"preset": arm}}} for arm in ("a", "b")},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    from mirrorpo.workers import Record

    record = Record(folder / "study.sqlite")
    record.settle("command", "mirrorpo study x")
    for arm in ("a", "b"):
        for seed in (0, 1):
            write_simulated(folder / "runs" / arm / f"seed{seed}", arm, seed, 0.5)
            record.add(f"{arm}/seed{seed}", "d", {"status": "finished", "attempts": 1})
    record.close()
    return folder


def settings(**changes: Any) -> Harm:
    def harm(folder: Path) -> None:
        table = yaml.safe_load((folder / "study.yaml").read_text())
        (folder / "study.yaml").write_text(yaml.safe_dump({**table, **changes}))

    return harm


def seeds() -> dict[str, Any]:
    """Anew each time: YAML writes the same object twice as an alias."""
    return {"seeds": [0, 1]}


def recorded(result: str) -> Harm:
    def harm(folder: Path) -> None:
        database = sqlite3.connect(folder / "study.sqlite")
        database.execute("UPDATE results SET result = ?", (result,))
        database.commit()
        database.close()

    return harm


def arm_elsewhere(folder: Path) -> None:
    (folder / "runs" / "a").rename(folder.parent / "outside")
    (folder / "runs" / "a").symlink_to(folder.parent / "outside")


def runs_elsewhere(folder: Path) -> None:
    (folder / "runs").rename(folder.parent / "outside")
    (folder / "runs").symlink_to(folder.parent / "outside")


def without_tables(folder: Path) -> None:
    database = sqlite3.connect(folder / "study.sqlite")
    database.execute("DROP TABLE results")
    database.execute("CREATE VIEW results AS SELECT 1 AS key")
    database.commit()
    database.close()


STUDY_HARMS: dict[str, tuple[Harm, str]] = {
    "an arm leads out": (settings(arms={"../../outside": seeds(), "a": seeds()}), "is not the name of an arm"),
    "an arm is absolute": (settings(arms={"/etc": seeds(), "a": seeds()}), "'/etc' is not the name of an arm"),
    "an arm is dots": (settings(arms={"..": seeds(), "a": seeds()}), "'..' is not the name of an arm"),
    "arms are a list": (settings(arms=["a"]), "key 'arms' must be a mapping"),
    "an arm is text": (settings(arms={"a": "x"}), "arms.a.seeds must be a list of integers"),
    "seeds are texts": (settings(arms={"a": {"seeds": ["../x"]}}), "arms.a.seeds must be a list of integers"),
    "seeds below 0": (settings(arms={"a": {"seeds": [-1]}}), "arms.a.seeds must be a list of integers"),
    "changes are text": (settings(arms={"a": {"seeds": [0], "changes": "x"}}), "arms.a.changes must be a mapping"),
    "the baseline is no arm": (settings(baseline="c"), "key 'baseline' must be an arm, got 'c'"),
    "the baseline is a list": (settings(baseline=["a"]), "key 'baseline' must be an arm, got ['a']"),
    "the target is text": (settings(target="x"), "key 'target' must be a number > 0"),
    "the margin is not a number": (settings(margin=float("nan")), "key 'margin' must be a number > 0"),
    "the study is deep": (replaced("study.yaml", DEEP), "study.yaml: not valid YAML"),
    "the study is a link": (link_in_place_of("study.yaml"), "study.yaml: is a symbolic link"),
    "the record is a link": (link_in_place_of("study.sqlite"), "study.sqlite: is a symbolic link"),
    "the record is text": (replaced("study.sqlite", "x" * 5_000), "study.sqlite: is not a record of jobs"),
    "the record has a view": (without_tables, "study.sqlite: is not a record of jobs"),
    "a result is deep": (recorded(DEEP), "study.sqlite: is not a record of jobs"),
    "a result is a number": (recorded("5"), "has neither the status finished nor failed"),
    "a result is unknown": (recorded('{"status": "x"}'), "has neither the status finished nor failed"),
    "an arm is a link": (arm_elsewhere, "runs/a: is a symbolic link, which is not followed"),
    "all runs are a link": (runs_elsewhere, "runs: is a symbolic link, which is not followed"),
    "a divergence is deep": (replaced("runs/a/seed0/divergence.json", '{"reverse_kl": ' + DEEP), "nested too deeply"),
    "a divergence is a link": (link_in_place_of("runs/a/seed0/divergence.json"), "is a symbolic link"),
    "a recipe has an alias": (replaced("runs/a/seed0/recipe.yaml", "a: &x [1]\nb: *x\n"), "aliases are not accepted"),
}


@pytest.mark.parametrize("name", STUDY_HARMS)
def test_a_hostile_study_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    harm, words = STUDY_HARMS[name]
    harm(study_folder(tmp_path / "study"))
    assert words in refused(["report", "study"], tmp_path)


def test_a_divergence_that_is_not_finite_counts_as_not_measured(tmp_path: Path) -> None:
    folder = study_folder(tmp_path / "study")
    replaced("runs/a/seed0/divergence.json", '{"reverse_kl": NaN}')(folder)
    before = snapshot(folder)
    run("report", "study", cwd=tmp_path)
    assert set(snapshot(folder)) - set(before) == {str(folder / n) for n in ("report.html", "report.md", "runs.csv")}
