"""The report says what the numbers show and no more, whatever the runs hold."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import re
import shutil
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mirrorpo.cli import study_commands
from mirrorpo.errors import InputError
from mirrorpo.reports import tables
from mirrorpo.reports.conclusions import conclude_study, verdicts
from mirrorpo.reports.study_page import as_json, markdown, write_study_page, write_study_report
from mirrorpo.statistics import Interval
from mirrorpo.studies.collection import Collection, Failure, by_seed, fairness_notes, read_run
from mirrorpo.studies.compare import compare
from mirrorpo.studies.gather import gather, study_collection
from mirrorpo.studies.runner import open_study, run_study
from mirrorpo.wording import signed
from run_folder import HOSTILE
from simulated import ARMS, simulated, write_simulated
from test_study_run import SILENT, Here, go, plan


class _Page(HTMLParser):
    """Elements with their attributes, and the text without style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._within = ""
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        self.text = "".join(self._texts).replace("\u00a0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within not in ("style", "script"):
            self._texts.append(data)


def _table_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return simulated(
        tmp_path_factory.mktemp("runs"),
        command="mirrorpo study x.yaml --out y",
        failed=(Failure(arm="wild", seed=10, reason="NonFiniteError: loss is nan at step 3"),),
        num_missing=2,
        changes={arm: f"objective: {{preset: {arm}}}" for arm in ARMS},
        study="baseline: dr_grpo\n",
    )


@pytest.fixture(scope="module")
def page(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> _Page:
    return _Page(write_study_report(collection, tmp_path_factory.mktemp("report"))[0])


def test_an_open_end_of_an_interval_has_its_sign() -> None:
    cells = [
        tables._interval(Interval(estimate=-1.0, low=low, high=high), signed)
        for low, high in ((-math.inf, 0.5), (-2.0, math.inf))
    ]
    assert [cell.text for cell in cells] == ["[\u2212∞, +0.5]", "[\u22122, ∞]"]
    assert [cell.text for cell in (tables._cell(x, signed) for x in (math.inf, -math.inf))] == ["∞", "\u2212∞"]


def test_each_arm_gets_the_verdict_that_it_was_drawn_for(collection: Collection) -> None:
    found = verdicts(collection, compare(collection))
    assert found.higher == ("better",)
    assert found.lower == ("worse",)
    assert found.same == ("same",)
    assert found.open == ("wild",)


def test_the_conclusion_comes_first_and_tells_what_differs_what_does_not_and_what_is_open(page: _Page) -> None:
    assert page.text.index("1 of 4 arms reached a higher accuracy than dr_grpo") < page.text.index("Accuracy by arm")
    assert "better is higher by 6.0 points" in page.text
    assert "worse is lower by 10.0 points" in page.text
    assert "lies within 2.0 points: same [" in page.text
    assert "neither show a difference nor rule one out for wild (+0.0 [" in page.text
    assert "This study would have found a difference of" in page.text
    assert "Seeds agree worse: wild (variance ratio 36 [" in page.text
    assert "Failed twice, and left out of every number: 1 run, wild seed 10 (NonFiniteError" in page.text
    assert "Not run yet: 2 runs of the study" in page.text


def test_numbers_of_the_table_are_those_of_the_runs(collection: Collection) -> None:
    table = markdown(collection, compare(collection))
    found = [line for line in table.splitlines() if line.startswith("| better ")][:2]
    cells, noise = ([cell.strip() for cell in line.strip("|").split("|")] for line in found)
    # Drawn with exactly mean 86 and standard deviation 1, the baseline with mean 80; all ten seeds are above it:
    # p = 2 / 2^10, and four times that after Holm.
    assert cells[:3] == ["better", "10", "86.0"]
    assert cells[6] == "+6.0"
    assert cells[8:] == ["0.00195", "0.00781"]
    assert noise[:3] == ["better", "1.0", "100"]


def test_one_seed_concludes_nothing(tmp_path: Path) -> None:
    found = simulated(tmp_path, num_seeds=1)
    assert conclude_study(found, compare(found)).headline == "One seed: nothing can be concluded."
    text = markdown(found, compare(found))
    assert "higher by" not in text
    assert "Run more seeds" in text
    assert verdicts(found, compare(found)).open == ("better", "same", "wild", "worse")
    json.dumps(as_json(found), allow_nan=False)


@pytest.mark.parametrize(("num_seeds", "problems"), [(3, 1000), (5, 1000), (10, 8), (10, None)])
def test_identical_accuracies_are_inconclusive_on_few_seeds_or_few_problems(
    tmp_path: Path, num_seeds: int, problems: int | None
) -> None:
    arms = {
        arm: by_seed(
            arm,
            [
                read_run(write_simulated(tmp_path / arm / str(seed), arm, seed, 0.75, problems=problems), arm)
                for seed in range(num_seeds)
            ],
        )
        for arm in ("dr_grpo", "twin")
    }
    found = Collection(title="Twins", arms=arms, baseline="dr_grpo", target=0.7, margin=0.02)
    assert verdicts(found, compare(found)).open == ("twin",)
    text = markdown(found, compare(found)).replace("\u00a0", " ")
    assert "the same within 2.0 points;" not in text
    assert "**Inconclusive after correction.**" in text
    assert ("is claimed from 6 common seeds on" in text) == (num_seeds < 6)
    assert ("number of evaluated problems, which was not recorded" in text) == (problems is None)
    assert "difference of 0.0 points" not in text, "what it could have found is not zero where nothing spread"


def test_no_interval_of_an_accuracy_leaves_its_legal_range(tmp_path: Path) -> None:
    runs = {
        arm: by_seed(
            arm,
            [read_run(write_simulated(tmp_path / arm / str(s), arm, s, value), arm) for s, value in enumerate(values)],
        )
        for arm, values in {"dr_grpo": (0.02, 0.4), "high": (0.99, 0.6)}.items()
    }
    found = compare(Collection(title="Wide", arms=runs, baseline="dr_grpo", target=0.7, margin=0.02))
    for spread in found.accuracy.values():
        assert (spread.mean.low, spread.mean.high) == (0.0, 1.0)
    difference = found.accuracy["high"].difference
    assert difference is not None
    assert (difference.mean.low, difference.mean.high) == (-1.0, 1.0)
    assert all(spread.mean.low >= 0.0 for spread in found.measures["length"].values())
    assert all(0.0 <= s.mean.low <= s.mean.high <= 30.0 for s in found.measures["steps"].values())


def test_too_few_seeds_say_how_many_it_takes(tmp_path: Path) -> None:
    found = simulated(tmp_path, num_seeds=4)
    text = markdown(found, compare(found)).replace("\u00a0", " ")
    # 4 arms: 4 * 2 / 2^n <= 0.05 needs n = 8.
    assert "With 4 seeds and 4 comparisons no difference could be significant" in text
    assert "It takes at least 8 seeds" in text


def test_an_arm_without_finished_runs_is_left_out_and_a_baseline_without_is_said(tmp_path: Path) -> None:
    found = simulated(tmp_path, num_seeds=3)
    empty = replace(found, arms={**found.arms, "dr_grpo": ()})
    assert "no run of the baseline dr_grpo is finished" in conclude_study(empty, compare(empty)).headline
    assert "better" in _Page(write_study_report(empty, tmp_path)[0]).text
    with pytest.raises(InputError, match="no run is finished"):
        write_study_report(replace(found, arms={}), tmp_path)


def test_a_lost_seed_stays_for_the_other_arms_and_pairs_are_made_of_common_seeds(tmp_path: Path) -> None:
    found = simulated(tmp_path)
    partial = replace(found, arms={**found.arms, "better": found.arms["better"][1:]})
    result = compare(partial).accuracy
    assert len(result["dr_grpo"].values) == 10
    assert result["better"].difference is not None
    assert result["better"].difference.seeds == tuple(range(1, 10))
    assert result["worse"].difference is not None
    assert len(result["worse"].difference.seeds) == 10
    assert any("the seeds that both arms have" in note for note in fairness_notes(partial.arms))


def test_runs_that_never_reach_the_target_are_counted_not_dropped(collection: Collection) -> None:
    comparison = compare(collection)
    worse, better = comparison.arrivals["worse"], comparison.arrivals["better"]
    assert (worse.reached, worse.total, worse.median) == (0, 10, None)
    assert better.reached == 10
    assert comparison.measures["steps"]["worse"].mean.estimate == 30.0  # all of them at the horizon


def test_hostile_text_never_becomes_an_element_and_nothing_in_it_stays_invisible(tmp_path: Path) -> None:
    arms = ("dr_grpo", HOSTILE)
    runs = {}
    for n, arm in enumerate(arms):
        folders = [
            write_simulated(
                tmp_path / str(n) / str(seed), "dr_grpo", seed, 0.5 + 0.1 * n, completion=HOSTILE, task=HOSTILE,
                model=HOSTILE, commit=HOSTILE, objective_line=HOSTILE, versions={HOSTILE: HOSTILE},
            )
            for seed in range(3)
        ]  # fmt: skip
        runs[arm] = by_seed(arm, [read_run(folder, arm) for folder in folders])
    found = Collection(
        title=HOSTILE, arms=runs, baseline=HOSTILE, target=0.5, margin=0.02, changes={HOSTILE: HOSTILE},
        failed=(Failure(arm=HOSTILE, seed=1, reason=HOSTILE),), command=HOSTILE, study=HOSTILE, notes=(HOSTILE,),
    )  # fmt: skip
    html, md, table = write_study_report(found, tmp_path)
    page = _Page(html)
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"]
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    for invisible in "\x1b\u202e\x00\ud800":
        assert invisible not in page.source
    assert "<script>" not in md.read_text(encoding="utf-8").split("```")[0]
    assert len(_table_of(table)) == 6 + 1


def test_cells_that_a_spreadsheet_would_run_are_defused(tmp_path: Path) -> None:
    found = simulated(tmp_path, num_seeds=2, arms=("dr_grpo", "better"))
    evil = replace(
        found,
        failed=(Failure(arm="better", seed=7, reason='=HYPERLINK("http://example.org";"x")'),
                Failure(arm="better", seed=8, reason="@SUM(A1)"), Failure(arm="better", seed=9, reason="-2+3")),
    )  # fmt: skip
    path = write_study_report(evil, tmp_path)[2]
    rows = _table_of(path)
    assert [row["reason"][:2] for row in rows[-3:]] == ["'=", "'@", "'-"]
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["failed"] * 3
    assert float(rows[0]["accuracy_after"]) == found.arms["dr_grpo"][0].accuracy
    assert all(not row["accuracy_after"].startswith("'") for row in rows)


def test_the_page_loads_nothing(page: _Page) -> None:
    loads = [given[name] for _, given in page.elements for name in ("src", "href", "srcset", "action") if name in given]
    assert loads == ["data:,"]
    assert not [True for _, given in page.elements if "style" in given]


def test_two_hundred_runs_fit_five_megabytes(tmp_path: Path) -> None:
    arms = {f"arm{n:02d}": 0.6 + 0.01 * n for n in range(20)}
    runs = {
        arm: by_seed(
            arm,
            [
                read_run(write_simulated(tmp_path / arm / str(seed), arm, seed, mean + 0.001 * seed, steps=60), arm)
                for seed in range(10)
            ],
        )
        for arm, mean in arms.items()
    }
    found = Collection(title="Large", arms=runs, baseline="arm00", target=0.7, margin=0.02)
    written = write_study_report(found, tmp_path)
    assert written[0].stat().st_size <= 5_000_000


# ---- which runs may be compared


def test_loose_runs_are_arms_by_their_recipes(tmp_path: Path) -> None:
    folders = [write_simulated(tmp_path / f"a{s}", "dr_grpo", s, 0.5) for s in range(2)]
    folders += [write_simulated(tmp_path / f"b{s}", "grpo", s, 0.6) for s in range(2)]
    folders += [write_simulated(tmp_path / f"c{s}", "grpo", s, 0.7, steps=20) for s in range(2)]
    found = gather(folders)
    assert list(found.arms) == ["dr_grpo", "grpo, train.steps=30", "grpo, train.steps=20"]
    assert found.baseline == "dr_grpo"
    assert found.changes["dr_grpo"] == "objective.preset=dr_grpo, train.steps=30"


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        ({"other_seed": 5}, {}, "arm 'grpo' has no seed in common with the baseline 'dr_grpo': 5 and 0"),
        ({}, {"baseline": "grp"}, "--baseline: unknown arm 'grp'; did you mean 'grpo'"),
        ({"mirrorpo_version": "9.9"}, {}, r"runs of mixed versions of mirrorpo: 0\.1\.0 \(1 runs, such as .*9\.9"),
        ({"accuracy_after": None}, {}, "accuracy was not measured"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, second: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    one = write_simulated(tmp_path / "one", "dr_grpo", 0, 0.5)
    seed = int((second := dict(second)).pop("other_seed", 0))
    two = write_simulated(tmp_path / "two", "grpo", seed, 0.6, **second)
    with pytest.raises(InputError, match=message) as caught:
        gather([one, two], **options)
    assert "\n" not in str(caught.value)


def test_mixed_versions_are_compared_when_asked_for_and_said(tmp_path: Path) -> None:
    one = write_simulated(tmp_path / "one", "dr_grpo", 0, 0.5)
    two = write_simulated(tmp_path / "two", "grpo", 0, 0.6, mirrorpo_version="9.9", commit="other")
    found = gather([one, two], allow_mixed=True)
    assert "mixed versions of mirrorpo" in found.notes[0]
    assert "2 commits: abc1234, other" in found.notes[1]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    one = write_simulated(tmp_path / "one", "dr_grpo", 0, 0.5)
    two = write_simulated(tmp_path / "two", "dr_grpo", 0, 0.6)
    with pytest.raises(InputError, match="duplicate seed 0 of arm 'dr_grpo'"):
        gather([one, two])


def test_arms_on_another_task_are_not_on_the_same_footing(tmp_path: Path) -> None:
    one = write_simulated(tmp_path / "one", "dr_grpo", 0, 0.5)
    two = write_simulated(tmp_path / "two", "grpo", 0, 0.6)
    recipe = (two / "recipe.yaml").read_text().replace("hard", "easy")
    (two / "recipe.yaml").write_text(recipe)
    assert any("differ in task.difficulty" in note for note in gather([one, two]).notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "summary.json: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{\n{"step": 3}\n', "metrics.jsonl, line 2"),
        ("divergence.json", '{"reverse_kl": "x"}', "'reverse_kl' must be a number or null"),
        ("divergence.json", "[]", "expected a JSON object with the number 'reverse_kl'"),
        ("recipe.yaml", "a: [", "recipe.yaml: not valid YAML"),
        ("samples.jsonl", '{"when": "x"}\n{"when": "y"}\n', "samples.jsonl, line 1"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    one = write_simulated(tmp_path / "one", "dr_grpo", 0, 0.5)
    two = write_simulated(tmp_path / "two", "grpo", 0, 0.6)
    (two / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_study_report(gather([one, two]), tmp_path)


def test_a_folder_that_is_neither_run_nor_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="x: is neither a run folder nor a study folder"):
        gather([tmp_path / "x"])


# ---- of a study that goes on


def test_the_page_of_a_study_tells_where_each_run_is_and_loads_itself_again_while_it_goes_on(tmp_path: Path) -> None:
    pages: list[str] = []

    def look(key: str) -> dict[str, Any] | None:
        if key == "grpo/seed1":
            raise KeyboardInterrupt
        if key == "grpo/seed0":
            (tmp_path / "runs" / key).mkdir(parents=True)
            (tmp_path / "runs" / key / "metrics.jsonl").write_text('{"step": 1}\n')
            with (tmp_path / "runs" / key / ".lock").open("w") as lock:  # as the worker's process holds it
                fcntl.flock(lock, fcntl.LOCK_EX)
                pages.append(page())
            shutil.rmtree(tmp_path / "runs" / key)
        if key in ("dr_grpo/seed0", "cispo/seed0"):
            pages.append(page())
        return {"status": "failed", "attempts": 2, "reason": "out of luck"} if key == "cispo/seed0" else None

    def page() -> str:
        path = write_study_page(study_collection(tmp_path), tmp_path)
        return " ".join(
            re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", path.read_text(), flags=re.S).split()
        )

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Here(look))
    first, second, third = pages
    assert "dr_grpo 0 waiting" in first
    assert "Accuracy by arm" not in first
    assert "dr_grpo 0 finished accuracy 50.0" in second
    assert "grpo 0 running step 1 of 2" in second
    assert "is not the result of the study" in second
    assert "grpo 0 finished" in third
    stopped = page()
    assert "cispo 0 failed" in stopped
    assert "No process works on the study" in stopped
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
    go(tmp_path, Here(), resume=True)
    write_study_report(study_collection(tmp_path), tmp_path)
    assert "the runs of the study" not in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_ends_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrorpo.studies.runner._EVERY", 0.001)
    written, said = threading.Event(), Console(file=io.StringIO(), width=300)
    page = study_commands._LivePage(tmp_path, said)

    def look(key: str) -> None:
        if key == "dr_grpo/seed0":
            assert written.wait(60)

    def once() -> None:
        page()
        written.set()

    with open_study(plan(1), tmp_path, False, "") as record:
        (tmp_path / "report.html").mkdir()
        run_study(plan(1), tmp_path, record, Here(look), SILENT, command="", page=once)
    page()
    assert said.file.getvalue().count("the live report.html cannot be written") == 1
    assert len(study_collection(tmp_path).runs) == 3
