"""Scripts behind three pages of docs/evidence: the faulty verifier, distinct texts, matched distance, whole seeds."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mirrorpo.statistics import mean_interval


@pytest.fixture(scope="module")
def loop(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("scripts/small_studies.py")


@pytest.fixture(scope="module")
def tables(load: Callable[[str], ModuleType]) -> ModuleType:
    sys.path.insert(0, "scripts")  # the tables share their style with scripts/make_figures.py
    try:
        return load("scripts/study_tables.py")
    finally:
        sys.path.remove("scripts")


@pytest.mark.parametrize(
    ("completion", "gold", "proxy"),
    [
        ("9*2=18;83+18=101#### 101", 1.0, 1.0),
        ("9*2=19;83+19=102#### 102", 0.0, 0.0),  # a wrong calculation does not fool it
        ("#### 101", 1.0, 1.0),
        ("#### 7", 0.0, 1.0),  # a wrong guess does
        ("#### -7", 0.0, 0.0),
        ("#### 7 #### 8", 0.0, 0.0),
        ("#### seven", 0.0, 0.0),
        ("####", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_faulty_verifier_accepts_what_is_right_and_bare_numbers(
    loop: ModuleType, completion: str, gold: float, proxy: float
) -> None:
    row = {"prompt": "83+9*2=?", "answer": "101"}
    assert (loop.gold(completion, row), loop.proxy(completion, row)) == (gold, proxy)


@pytest.mark.parametrize(("counts", "draws"), [([3, 2, 1], 2), ([4], 3), ([1, 1, 1], 3), ([5, 1], 1)])
def test_rarefied_is_the_mean_number_of_kinds_over_all_draws(loop: ModuleType, counts: list[int], draws: int) -> None:
    balls = [kind for kind, count in enumerate(counts) for _ in range(count)]
    subsets = list(itertools.combinations(range(len(balls)), draws))
    mean = sum(len({balls[i] for i in subset}) for subset in subsets) / len(subsets)
    assert loop.rarefied(counts, draws) == pytest.approx(mean)


def naive_way() -> dict[int, dict[str, float]]:
    return {
        0: {"gold": 0.5, "reverse_kl": 0.0},
        6: {"gold": 0.6, "reverse_kl": 0.04},
        8: {"gold": 0.4, "reverse_kl": 0.01},  # back again: the policy need not move away in every step
        10: {"gold": 0.2, "reverse_kl": 0.16},
    }


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (0.0, 0.5),
        (0.01, 0.55),  # square roots 0, 0.1, 0.2: half of the way up
        (0.04, 0.6),
        (0.09, 0.4 + (0.3 - 0.1) / (0.4 - 0.1) * (0.2 - 0.4)),
        (0.17, None),
    ],
)
def test_gold_is_read_at_the_first_crossing_of_a_distance_and_never_beyond_the_last(
    tables: ModuleType, distance: float, expected: float | None
) -> None:
    found = tables.at_distance(naive_way(), distance, "reverse_kl")
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_run_beyond_the_baseline_has_no_partner_and_is_counted(tables: ModuleType) -> None:
    way = {f"none@{step}": {500: own} for step, own in naive_way().items()}
    near, far = {"gold": 0.65, "reverse_kl": 0.01}, {"gold": 0.9, "reverse_kl": 1.0}
    runs = {**way, "js_0.1@10": {500: near}, "js_1@10": {500: far}}
    found, note = tables.matched(runs, [500], 10, "reverse_kl")
    assert found["js"] == pytest.approx([0.1])
    assert note.startswith("1 of 2 runs")
    assert found["prob_l2"].size == 0


def test_only_seeds_that_every_arm_has_finished_count(tables: ModuleType) -> None:
    rows = [
        {"arm": arm, "seed": str(seed), "status": "failed" if (arm, seed) == ("b", 2) else "finished", "x": "1"}
        for arm in ("a", "b")
        for seed in (1, 2, 3)
        if (arm, seed) != ("a", 3)
    ]
    assert tables.complete(rows)[1] == [1]
    with pytest.raises(ValueError, match="no seed is finished in all arms"):
        tables.complete([row for row in rows if row["seed"] != "1"])


def test_the_number_of_seeds_grows_with_the_square_of_spread_over_effect(tables: ModuleType) -> None:
    # t approximation: n = (1.96 + 0.84)^2 (s / effect)^2, about 31 at s = 2 effect, and 8 at s = effect.
    small, large = (int(tables.seeds_for(np.array([-1.0, 1.0] * 5) * s, 1.0, 1)) for s in (0.95, 1.9))
    assert 8 <= small <= 12
    assert 28 <= large <= 34


def test_equal_differences_are_no_reason_to_fail(tables: ModuleType) -> None:
    assert "`x`" in tables.comparison("title", {"x": np.full(5, 0.02)}, 0.03)


def rows_of(page: str) -> list[dict[str, str]]:
    with Path(f"docs/evidence/{page}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stands(page: str, differences: dict[str, np.ndarray]) -> list[str]:
    """The arms whose mean and interval, in points, are not on the page."""
    text = Path(f"docs/evidence/{page}.md").read_text()
    found = {arm: mean_interval(100 * x) for arm, x in differences.items()}
    return [arm for arm, x in found.items() if f"{x.estimate:+.1f} ({x.low:+.1f} to {x.high:+.1f})" not in text]


def test_the_page_on_estimators_has_the_lines_that_its_command_prints(tables: ModuleType) -> None:
    text = Path("docs/evidence/estimator.md").read_text()
    lines = [line for line in tables.estimator(rows_of("estimator"), None).splitlines() if line.startswith("| `")]
    assert len(lines) == 11
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert any(
            row.startswith(f"| {cells[0]}") and cells[1] in row.replace("*", "") and cells[-1] in row
            for row in text.splitlines()
        ), line


def test_the_pages_say_what_their_runs_say(tables: ModuleType) -> None:
    runs, seeds = tables.complete(rows_of("staleness"))
    for updates in (4, 16):
        base = tables.column(runs, seeds, f"none_{updates}", "accuracy_after")
        own = {arm: tables.column(runs, seeds, f"{arm}_{updates}", "accuracy_after") - base for arm in tables.REGIONS}
        assert stands("staleness", own) == []

    runs, seeds = tables.complete(rows_of("overoptimisation"), "step")
    found, _ = tables.matched(runs, seeds, 12, "reverse_kl")
    assert stands("overoptimisation", found) == []
    base = tables.column(runs, seeds, "none@12", "gold")
    arms = [name for name in runs if name.endswith("@12") and name != "none@12"]
    assert stands("overoptimisation", {arm: tables.column(runs, seeds, arm, "gold") - base for arm in arms}) == []

    runs, seeds = tables.complete([row for row in rows_of("diversity") if row["arm"] != "start"])
    for measure in ("hard.pass@64", "hard.pass@1"):
        base = tables.column(runs, seeds, "none", measure)
        own = {arm: tables.column(runs, seeds, arm, measure) - base for arm in tables.DIVERSITY if arm != "none"}
        assert stands("diversity", own) == []
