"""The divergence explorer in a real browser: its numbers are Python's, and the page asks nobody for anything."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES
from mirrorpo.losses.regions import REGIONS

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explorer.html"
VALUES: dict[str, list[float | None]] = {
    "alpha": [-2.0, -0.5, 0.0, 0.35, 0.5, 1.0, 2.0, 4.0],
    "beta": [-2.0, -0.5, 0.0, 0.35, 0.5, 1.0, 1.5, 2.0, 4.0],
}
PROBABILITIES = [1e-6, 1e-3, 0.03, 0.3, 0.30001, 0.75, 0.999]
RADII = [1e-4, 0.01, 0.03, 0.2, 1.5]
# Those that have a formula in JavaScript; the first test compares the page with the parts that it is built from.
DRAWN = set(re.findall(r'"name":"(\w+)","family"', PAGE.read_text(encoding="utf-8"))) & set(DIVERGENCES)
NAMES = [(name, option) for name in DIVERGENCES if name in DRAWN for option in VALUES.get(name, [None])]
BOUNDED = [
    *(line for line in NAMES if line[0] not in ("k1", "k2", "k3")),
    *((name, None) for name in ("kl3", "kl2", "binary_tv", "binary_kl")),
]


@pytest.fixture(scope="module")
def browser(load: Load, tmp_path_factory: pytest.TempPathFactory):
    driver = load("tests/reports/browser.py")
    command = driver.chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    with driver.Browser(command, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def computed(browser: Any):
    """Calls a function of the page on a list of argument lists; what is not finite comes back as text."""
    browser.open(PAGE, width=1200)

    def call(function: str, arguments: list[list[Any]]) -> list[Any]:
        plain = "(x) => Array.isArray(x) ? x.map(String).map(Number).map((y) => Number.isFinite(y) ? y : String(y)) : x"
        given = json.dumps(arguments)
        code = f"JSON.stringify({given}.map((a) => mirrorpo.{function}(...a.map((x) => x ?? undefined))).map({plain}))"
        return json.loads(browser.evaluate(code))

    return call


def _later(browser: Any, expression: str, milliseconds: int = 60) -> Any:
    """The value of an expression once the page has answered what the calls before it set off."""
    code = f"new Promise((done) => setTimeout(() => done({expression}), {milliseconds}))"
    return browser.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)["result"]["value"]


def _options(name: str, option: float | None) -> dict[str, float]:
    return {} if option is None else {name: option}


def _log(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return all(map(_close, found, expected))
    return math.isclose(float(found), expected, rel_tol=1e-6, abs_tol=1e-300)


def test_the_page_is_what_the_script_builds_from_its_parts(load: Load) -> None:
    assert load("scripts/make_explorer.py").main(["--check"]) == 0


@pytest.mark.parametrize(("name", "option"), NAMES)
def test_terms_scores_and_sampled_values_equal_those_of_python(computed: Any, name: str, option: float | None) -> None:
    pairs = list(itertools.product(PROBABILITIES, PROBABILITIES))
    d = mirrorpo.divergence(name, **_options(name, option))
    logp, logq = _log([p for p, _ in pairs]).requires_grad_(), _log([q for _, q in pairs])
    estimate = d.sampled(logp, logq)
    (slope,) = torch.autograd.grad(estimate.sum(), logp)
    expected = {
        "term": d.term(logp.detach(), logq)[0].tolist(),
        "score": d.score(logp.detach(), logq).tolist(),
        "sampled": torch.stack([estimate.detach(), slope], dim=-1).tolist(),
    }
    for function, numbers in expected.items():
        found = computed(function, [[name, p, q, option] for p, q in pairs])
        for pair, ours, theirs in zip(pairs, numbers, found, strict=True):
            assert _close(theirs, ours), (function, name, option, pair, theirs, ours)


@pytest.mark.parametrize(("name", "option"), BOUNDED)
def test_ratio_bounds_equal_those_of_python(computed: Any, name: str, option: float | None) -> None:
    for radius in RADII:
        low, high = mirrorpo.trust_region(name, radius=radius, **_options(name, option)).ratio_bounds(
            _log(PROBABILITIES)
        )
        sides = [side.expand(len(PROBABILITIES)).tolist() for side in (low, high)]
        found = computed("bounds", [[name, radius, b, option] for b in PROBABILITIES])
        for b, theirs, *ours in zip(PROBABILITIES, found, *sides, strict=True):
            assert _close(theirs, ours), (name, option, radius, b, theirs, ours)


def test_the_bounds_of_ratio_are_one_minus_and_plus_epsilon(computed: Any) -> None:
    low, high = mirrorpo.trust_region("ratio", epsilon_low=0.2, epsilon_high=0.28).ratio_bounds(_log([0.5]))
    (found,) = computed("bounds", [["ratio", 0.2, 0.5, 0.28]])
    assert found == pytest.approx([low.item(), high.item()], rel=1e-6)


def test_every_name_of_the_package_can_be_chosen(computed: Any, browser: Any) -> None:
    names = set(
        json.loads(browser.evaluate("JSON.stringify([...document.querySelectorAll('option')].map(o => o.value))"))
    )
    assert names & set(DIVERGENCES) == DRAWN
    assert {"kl", "prob_l2", "itakura_saito", "beta", "reverse_kl", "forward_kl", "js", "chi2", "tv", "alpha"} <= DRAWN
    assert set(REGIONS) - {"exact", "top_k", "none", "log_ratio", "dcpo"} <= names  # masks and "no bound" draw nothing


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_every_view_fits_the_window_and_loads_quietly(browser: Any, width: int, dark: bool) -> None:
    browser.open(PAGE, width=width, dark=dark)
    views = (
        "d=k1&role=region&b=0.0001&q=0.999",
        "d=beta&role=both&o=-2&r=0.00001&b=0.999&q=0.0001&p=0.9999&c=10",
        "d=binary_tv&r=10&b=0.0001&a=-1",
        "d=alpha&role=regulariser&o=4&e=weighted&b=0.0001",
        "d=nonsense&role=x&r=NaN&b=-3&p=9",
        "",
    )
    for view in views:
        browser.evaluate(f"location.hash = {view!r}")
        assert _later(browser, "document.documentElement.scrollWidth <= window.innerWidth"), view
        assert "NaN" not in browser.evaluate("document.body.innerHTML.replace(/<script[^]*?<\\/script>/g, '')"), view
    assert browser.requests() == [PAGE.as_uri()]
    assert browser.complaints() == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert (brightness < 128) == dark  # so the style sheet passed the policy, in both schemes


def test_a_view_is_shared_by_its_address(browser: Any) -> None:
    browser.open(PAGE, width=1200)
    browser.evaluate("location.hash = 'd=kl3&role=region&r=0.03'")
    assert _later(browser, "divergence.value") == "kl3"
    browser.evaluate("radius.value = -2, radius.dispatchEvent(new Event('input')), null")
    address = _later(browser, "location.hash", 600)
    assert "d=kl3" in address
    assert "r=0.01" in address
    # w - 1 - log w = 0.01 at 0.86517 and 1.14817 (docs/math.md)
    shown = browser.evaluate("[low, high].map((e) => e.textContent).join(' ')")
    assert shown == "0.86517 1.14817"


def test_every_control_has_a_label_and_can_be_reached_by_keyboard(browser: Any) -> None:
    browser.open(PAGE, width=1200)
    controls = "[...document.querySelectorAll('input, select')]"
    assert browser.evaluate(f"{controls}.length") > 10
    assert browser.evaluate(f"{controls}.every((c) => c.labels.length === 1 && c.tabIndex === 0)")
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every((s) => s.getAttribute('aria-label').length > 5)"
    )


def test_a_press_in_a_panel_moves_the_policy_there(browser: Any) -> None:
    browser.open(PAGE, width=1200)
    browser.evaluate("location.hash = 'd=kl3&role=region&r=0.03&b=0.3&p=0.3'")
    assert _later(browser, "p.value !== '' && verdict.textContent") == "inside the region"
    panel = "document.getElementById('plot-surrogate').getBoundingClientRect()"
    left, top, width = (browser.evaluate(f"{panel}.{side}") for side in ("left", "top", "width"))
    # w runs from 0 to 2: at four fifths of the panel it is above the bound 1.265
    at = {"x": left + 0.8 * width, "y": top + 100, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, **at)
    assert _later(browser, "verdict.textContent") == "above the region: no policy gradient"
