"""A whole search in its folder: files, comparison, resuming, the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mirrorpo import cli
from mirrorpo.config.search import EvolveRecipe
from mirrorpo.config.train import recipe_from
from mirrorpo.divergences.neural.file import load_map
from mirrorpo.errors import InputError
from mirrorpo.search.evolution import SearchError
from mirrorpo.search.evolve_run import compare, evolve, twin_of
from mirrorpo.workers import Record
from serial_pool import SerialPool

FILES = {
    "best_map.json", "evolution.png", "history.jsonl", "members.sqlite", "recipe.yaml", "summary.json", ".lock",
    "versions.json",
}  # fmt: skip


def recipe(**evolution: Any) -> EvolveRecipe:
    data = {
        "task": {"name": "arithmetic"},
        "evolution": {"generations": 3, "population": 4, "elites": 1, "final_seeds": 2, **evolution},
    }
    return recipe_from(data, (), "r", EvolveRecipe)


def run(out: Path, pool: SerialPool | None = None, *, resume: bool = False, function: str = "fitness", **keys: Any):  # type: ignore[no-untyped-def]
    return evolve(
        recipe(**keys),
        out,
        make_pool=lambda threads: pool or SerialPool(),
        threads=1,
        resume=resume,
        console=Console(stderr=True),
        command="mirrorpo evolve r",
        function=f"cheap_jobs:{function}",
    )


def failing(payload: dict[str, Any]) -> dict[str, Any]:
    from cheap_jobs import fitness

    return {**fitness(payload), "fitness": None, "failed": "it blew up"}


def test_the_folder_holds_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = SerialPool()
    summary = run(tmp_path / "a", pool)
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES
    history = [json.loads(line) for line in (tmp_path / "a" / "history.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in history] == [0, 1, 2]
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    # 3 generations of 4, elites from the second on, best and first map with 2 seeds each
    assert len(pool.ran) == 12 + 2 + 4 == summary["trainings"]
    assert pool.ran[-4:] == ["final/best0", "final/start0", "final/best1", "final/start1"]
    best = json.loads((tmp_path / "a" / "best_map.json").read_text())["about"]
    assert best["member"] == summary["best"]["key"]
    assert best["command"] == "mirrorpo evolve r"
    assert sum(best["fitness"]) / len(best["fitness"]) == pytest.approx(summary["best"]["fitness"], rel=1e-12)
    assert best["comparison"] == summary["comparison"]
    assert "generation 3/3: mean fitness" in capsys.readouterr().err


def test_the_best_map_is_the_one_that_its_record_says(tmp_path: Path) -> None:
    summary = run(tmp_path / "a", elites=0)
    record = Record(tmp_path / "a" / "members.sqlite").results()
    fitness = {key: row.result["fitness"] for key, row in record.items() if key.startswith("g")}
    assert summary["best"]["fitness"] == fitness[summary["best"]["key"]]
    assert summary["best"]["lead"] > 0
    parameters = load_map(tmp_path / "a" / "best_map.json").parameters
    wanted = torch.zeros(380, dtype=torch.float64)
    wanted[378] = 0.02
    # the cheap fitness of these parameters, worked out here
    generation = int(summary["best"]["key"][1:4])
    value = 0.5 - (parameters - wanted).square().sum().item() + 0.001 * (generation % 7)
    assert summary["best"]["fitness"] == pytest.approx(value, rel=1e-12)


def test_an_interrupted_search_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path / "a")

    class Stopping(SerialPool):
        def run(self, jobs):  # type: ignore[no-untyped-def]
            for done in super().run(jobs):
                yield done
                if len(self.ran) == 7:
                    raise KeyboardInterrupt

    stopping, rest = Stopping(), SerialPool()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stopping)
    assert not (tmp_path / "b" / "summary.json").exists()
    resumed = run(tmp_path / "b", rest, resume=True)
    assert len(stopping.ran) == 7
    assert not set(stopping.ran) & set(rest.ran)
    assert len(rest.ran) == whole["trainings"] - 7
    for name in ("history.jsonl", "best_map.json", "evolution.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    timeless = {"seconds", "worker_seconds"}
    assert {k: v for k, v in whole.items() if k not in timeless} == {
        k: v for k, v in resumed.items() if k not in timeless
    }


def test_a_finished_search_is_not_run_again(tmp_path: Path) -> None:
    first, pool = run(tmp_path / "a"), SerialPool()
    assert run(tmp_path / "a", pool, resume=True) == first
    assert pool.ran == []


def test_a_resumed_search_keeps_its_recipe(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(InputError, match=r"evolution.sigma is 0.02, the run in .* has 0.01"):
        run(tmp_path / "a", resume=True, sigma=0.02)


def test_members_that_all_fail_end_the_search_and_stay_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cheap_jobs.failing", failing, raising=False)
    with pytest.raises(SearchError, match="generation 0: no pair is left"):
        run(tmp_path / "a", function="failing")
    assert len(Record(tmp_path / "a" / "members.sqlite").results()) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "g000/p1- failed (it blew up); its twin g000/p1+ is left out with it" in said


def test_twins_are_each_others() -> None:
    assert twin_of("g000/p1+") == "g000/p1-"
    assert twin_of(twin_of("g000/p1+")) == "g000/p1+"


def test_the_comparison_is_paired_over_seeds() -> None:
    def row(accuracy: float | None) -> dict[str, Any]:
        return {"fitness": accuracy, "right": round((accuracy or 0) * 100), "problems": 100, "samples": 1}

    got = compare([row(0.6), row(0.7), row(None), row(0.9)], [row(0.5), row(0.5), row(0.1), row(0.6)])
    # differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t(2) = 4.302652729911275
    assert got["seeds"] == 3
    assert got["difference"] == pytest.approx(0.2)
    # 100 problems of 3 runs each, two right and two wrong answers added: their noise is less than 0.1.
    best, start = ((300 * mean + 2) / 304 for mean in (2.2 / 3, 1.6 / 3))
    assert math.sqrt((best * (1 - best) + start * (1 - start)) / 100) < 0.1
    reach = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert got["difference_interval"] == pytest.approx([0.2 - reach, 0.2 + reach], rel=1e-6)
    assert got["best"]["accuracies"] == [0.6, 0.7, None, 0.9]
    assert got["best"]["completions"] == 300
    # Wilson's centre for 220 of 300: (220/300 + z^2/600) / (1 + z^2/300)
    z2 = 1.959963984540054**2
    assert sum(got["best"]["interval"]) / 2 == pytest.approx((220 / 300 + z2 / 600) / (1 + z2 / 300), rel=1e-9)
    alone = compare([row(0.6)], [row(None)])
    assert (alone["difference"], alone["difference_interval"], alone["start"]["accuracy"]) == (None, None, None)


def test_differences_without_spread_are_as_uncertain_as_their_evaluation() -> None:
    def row(fitness: float) -> dict[str, Any]:
        return {"fitness": fitness, "right": 5, "problems": 10, "samples": 1}

    found = compare([row(0.5)] * 3, [row(0.25)] * 3)["difference_interval"]
    # 10 problems, 30 answers and 4 more: shares 17/34 and 9.5/34.
    best, start = 17 / 34, 9.5 / 34
    reach = 4.302652729911275 * math.sqrt((best * (1 - best) + start * (1 - start)) / 10 / 3)
    assert found == pytest.approx([0.25 - reach, 0.25 + reach])
    assert compare([row(1.0)] * 2, [row(0.0)] * 2)["difference_interval"][1] == 1.0  # a difference of shares ends there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evolution.population=7"], "population must be even"),
        (["objective.preset=grpo"], "one penalty, a neural mirror map"),
        (["evolution.validation_problems=513"], "evolution.validation_problems: 513, but the task has 512"),
        (["train.max_completion_length=0"], "train.max_completion_length"),
        (["model.path=nowhere/at/all"], "model.path 'nowhere/at/all'"),
        (["objective.divergence={name: neural, path: missing.json}"], "path 'missing.json' cannot be read"),
        (["--resume"], "holds no run"),
        (["--ray", "10.255.255.1:bad"], "--ray 10.255.255.1:bad: must be local, auto, HOST:PORT"),
        (["--workers", "0"], "'--workers'"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_leaves_no_folder(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["mirrorpo", "evolve", "evolve/embedded", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
