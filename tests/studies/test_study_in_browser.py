"""The page of a study in a real browser: quiet, no requests, sorts, filters, fits a phone, shows model text as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Browser, chromium
from mirrorpo.reports.study_page import write_study_report
from mirrorpo.studies.collection import Failure
from run_folder import HOSTILE
from simulated import ARMS, simulated, write_simulated


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    command = chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    with Browser(command, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    found = simulated(
        folder,
        command="mirrorpo study " + "c" * 300,
        failed=(Failure(arm="wild", seed=11, reason=HOSTILE + "r" * 200),),
        changes={arm: f"objective: {{preset: {arm}}}" * 9 for arm in ARMS},
        study="x: " + "y" * 500,
    )
    for arm in ARMS:  # seed 0 is the one whose completions are shown
        accuracy = found.arms[arm][0].accuracy
        write_simulated(folder / arm / "seed0", arm, 0, accuracy, completion=HOSTILE + "x" * 400)
    return write_study_report(found, folder)[0]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_loads_quietly_and_fits_the_window(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.requests() == [report.as_uri()]
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert (brightness < 128) == dark  # so the style sheet passed the policy, in both schemes


_NAMES = "[...document.querySelector('.numbers tbody').rows].map((row) => row.dataset.arm).join()"


def _press(browser: Browser, title: str) -> None:
    heads = "[...document.querySelectorAll('.numbers')[0].tHead.rows[0].cells]"
    browser.evaluate(f"{heads}.find((head) => head.textContent === {title!r}).querySelector('button').click(), null")


def test_a_press_on_a_title_sorts_and_a_second_one_turns_the_order(browser: Browser, report: Path) -> None:
    browser.open(report, width=1200)
    assert browser.evaluate(_NAMES) == ",".join(ARMS)
    _press(browser, "Accuracy %")
    names = browser.evaluate(_NAMES).split(",")
    assert (names[0], names[-1]) == ("better", "worse")
    assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "descending"
    _press(browser, "Accuracy %")
    names = browser.evaluate(_NAMES).split(",")
    assert (names[0], names[-1]) == ("worse", "better")
    _press(browser, "Difference")  # the baseline has none: it stays last in either order
    assert browser.evaluate(_NAMES).split(",")[-1] == "dr_grpo"
    _press(browser, "Difference")
    assert browser.evaluate(_NAMES).split(",")[-1] == "dr_grpo"
    _press(browser, "Arm")
    _press(browser, "Arm")
    assert browser.evaluate(_NAMES) in (",".join(ARMS), ",".join(reversed(ARMS)))
    assert browser.complaints() == []


def test_the_filter_leaves_only_the_arms_that_match_everywhere(browser: Browser, report: Path) -> None:
    browser.open(report, width=1200)
    browser.evaluate("filter.value = 'BETTER, wild', filter.dispatchEvent(new Event('input')), null")
    seen = "[...document.querySelectorAll('[data-arm]')].filter((e) => getComputedStyle(e).display !== 'none')"
    assert set(browser.evaluate(f"{seen}.map((e) => e.dataset.arm).join()").split(",")) == {"better", "wild"}
    assert browser.evaluate("document.getElementById('count').textContent") == "2 of 5 arms"
    browser.evaluate("filter.value = '', filter.dispatchEvent(new Event('input')), null")
    assert set(browser.evaluate(f"{seen}.map((e) => e.dataset.arm).join()").split(",")) == set(ARMS)


def test_the_pointer_shows_a_curves_values(browser: Browser, report: Path) -> None:
    browser.open(report, width=1200)
    plot = "document.querySelector('.plot')"
    box = f"{plot}.getBoundingClientRect()"
    at = f"{{clientX: {box}.left + {box}.width, clientY: {box}.top + 9}}"
    browser.evaluate(f"{plot}.dispatchEvent(new PointerEvent('pointermove', {at})), null")
    tip = browser.evaluate(f"{plot}.querySelector('.tip')?.innerText ?? ''").split("\n")
    assert tip[0] == "step 30"
    assert len(tip) == 1 + len(ARMS)


def test_controls_have_labels_and_are_large_enough_for_a_thumb(browser: Browser, report: Path) -> None:
    browser.open(report, width=390)
    assert browser.evaluate("filter.labels.length") == 1
    assert browser.evaluate("[...document.querySelectorAll('.numbers button')].every((b) => b.offsetHeight >= 32)")
