"""The page in a real browser: no complaint, no request, no sideways scrolling, and the pointer shows values."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Browser, chromium
from mirrorpo.reports import write_report
from run_folder import HOSTILE, SAMPLE, line_of, write_run, write_samples


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    command = chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    with Browser(command, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_loads_quietly_and_fits_the_window(tmp_path: Path, browser: Browser, width: int, dark: bool) -> None:
    lines = [
        line_of(step, **{f"divergence/{'long_name' * 6}{i}/mean": 0.1 * i for i in range(8)}) for step in range(1, 9)
    ]
    run = write_run(tmp_path, lines, objective="o" * 90, objective_line="l" * 300, command="c" * 400, model="m" * 200)
    write_samples(run, {**SAMPLE, "completion": HOSTILE + "x" * 400, "reason": "r" * 150, "answer": "a" * 150})
    report = write_report(run)
    browser.open(report, width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.requests() == [report.as_uri()]
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert (brightness < 128) == dark  # so the style sheet passed the policy, in both schemes


def test_the_pointer_and_the_arrow_keys_show_the_step_and_its_values(tmp_path: Path, browser: Browser) -> None:
    browser.open(write_report(write_run(tmp_path)), width=1200)
    plot = "document.querySelector('.plot')"
    box = f"{plot}.getBoundingClientRect()"
    at = f"{{clientX: {box}.left + {box}.width, clientY: {box}.top + 9}}"
    browser.evaluate(f"{plot}.dispatchEvent(new PointerEvent('pointermove', {at})), null")
    tip = f"{plot}.querySelector('.tip')?.innerText ?? ''"
    assert browser.evaluate(tip).split("\n") == ["step 40", "mean 1", "standard deviation 0.4"]
    browser.evaluate(f"{plot}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}})), null")
    assert "step 39" in browser.evaluate(tip)
    # Dot and curve agree: the reward of step 39 is 1, the top of an axis from 0 to 1.
    assert browser.evaluate(f"{plot}.querySelector('.point').style.top") == "0px"
    browser.evaluate(f"{plot}.dispatchEvent(new PointerEvent('pointerleave')), null")
    assert browser.evaluate(tip) == ""
    assert browser.complaints() == []
