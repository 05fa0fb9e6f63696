"""What the documentation says is run: code blocks, tables, links, docstring examples, names.

A block that opens with ```python is run in a fresh namespace and an empty folder. Lines that start with "# " right
after a line that starts with "print(" are its expected output; a block with such lines must print exactly them. A block
that cannot run here (it trains, or downloads) opens with ```python no-run and is only compiled.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES, ESTIMATORS
from mirrorpo.losses.advantages import ADVANTAGES
from mirrorpo.losses.aggregation import AGGREGATIONS
from mirrorpo.losses.anchors import ANCHORS
from mirrorpo.losses.keys import PLACEMENTS
from mirrorpo.losses.penalties import PENALTY_KEYS
from mirrorpo.losses.presets import PRESETS
from mirrorpo.losses.regions import REGIONS
from mirrorpo.losses.rules import ACTS, LEVELS, MASK_LEVELS, RULE_KEYS
from mirrorpo.losses.surrogates import SURROGATES

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
# Not the reports that a study writes: their words are tested where they are made.
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "report.md")]
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")
CORE = (
    "divergences",
    "divergences.base",
    "divergences.bregman",
    "divergences.fdivergence",
    "divergences.neural.file",
    "divergences.neural.generator",
    "divergences.neural.map",
    "divergences.neural.table",
    "kernels.fused",
    "kernels.head",
    "kernels.objective_head",
    "losses.advantages",
    "losses.anchors",
    "losses.aggregation",
    "losses.future_kl",
    "losses.objective",
    "losses.penalties",
    "losses.presets",
    "losses.regions",
    "losses.rules",
    "losses.solver",
    "losses.surrogates",
)


def _blocks() -> list[tuple[Path, int, str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            if block["language"].split()[:1] == ["python"]:
                found.append((page, line, block["language"].strip(), block["code"]))
    return found


def _promised(code: str) -> list[str]:
    """The comment lines that directly follow a print."""
    lines, after_print = [], False
    for line in code.splitlines():
        after_print = line.lstrip().startswith("print(") or (after_print and line.startswith("# "))
        if after_print and line.startswith("# "):
            lines.append(line[2:].rstrip())
    return lines


# TRL 1.16's own default has the name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("page", "line", "language", "code"), [pytest.param(*b, id=f"{b[0].name}:{b[1]}") for b in _blocks()]
)
def test_every_python_block_runs_and_prints_what_it_says(
    page: Path, line: int, language: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The line numbers of a traceback are those of the page.
    program = compile("\n" * line + code, str(page), "exec")
    if language == "python no-run":
        return
    assert language == "python", f"{page.name}:{line}: unknown kind of block {language!r}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # what a page computes from published results
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {"__name__": "docs"})
    promised = _promised(code)
    if promised:
        assert [text.rstrip() for text in printed.getvalue().splitlines()] == promised


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_picture_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        target = link["target"]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{page.name} links to {target}: {file.name} has no such heading"


@pytest.mark.parametrize("name", CORE)
def test_docstring_examples_of_the_core_run(name: str) -> None:
    module = importlib.import_module(f"mirrorpo.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, report=False)
    assert result.failed == 0


def test_the_bias_tables_are_those_that_the_code_computes(load: Load) -> None:
    assert load("scripts/make_bias_table.py").main(["--check"]) == 0


def test_the_check_of_the_bias_tables_sees_a_changed_number(load: Load, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    assert text.count("KL(q \\|\\| p) | none") == 2  # reverse_kl and k3
    page.write_text(text.replace("KL(q \\|\\| p) | none", "KL(p \\|\\| q) | none"), encoding="utf-8")
    assert load("scripts/make_bias_table.py").main(["--check", "--page", str(page)]) == 1


def test_training_ends_where_the_page_of_fixed_points_says(load: Load) -> None:
    """The ends against optima, against plain gradient steps from the reference, and in the page."""
    script = load("scripts/fixed_points.py")
    page = (ROOT / "docs" / "fixed_points.md").read_text(encoding="utf-8")
    coefficients = {}
    for name, estimator, known in (
        ("k3", "sampled", ("forward_kl", 1.0)),
        ("itakura_saito", "sampled", ("chi2", 0.5)),
        ("prob_l2", "score", ("prob_l2", 1.0)),
        ("js", "exact", ("js", 1.0)),
    ):
        coefficients[name] = c = script.coefficient(name)
        wanted = script.optima(known[0], torch.tensor([known[1] * c], dtype=torch.float64))[0]
        torch.testing.assert_close(script.fixed_point(name, estimator, c), wanted, rtol=0, atol=1e-8)
    c = coefficients["prob_l2"]
    sampled = script.fixed_point("prob_l2", "sampled", c)
    best = script.optima("prob_l2", torch.tensor([c], dtype=torch.float64))[0]
    assert f"| `prob_l2` | {c:.4g} | {(sampled - best).abs().sum().item() / 2:.3f} |" in page
    assert "| | `sampled` | 0 | 0 | 0.452 | 0.219 | 0.330 | 0.825 |" in page
    assert sampled[:2].tolist() == [0.0, 0.0]
    # Stationary by the formula: r - 2 c p (p - q) is one number for the arms that live, and less for a dead one (r).
    q, r = (torch.tensor(x, dtype=torch.float64) for x in (script.REFERENCE, script.REWARDS))
    level = r - 2.0 * c * sampled * (sampled - q)
    torch.testing.assert_close(level[2:], level[2].expand(3), rtol=0, atol=1e-9)
    assert (level[:2] < level[2]).all()
    # Plain gradient steps: an arm's death is slow (its gradient has its probability as a factor), hence the tolerance.
    logits = q.log().unsqueeze(0)
    for _ in range(4000):
        p = logits.softmax(-1)
        pull = r - 2.0 * c * p * (p - q)
        logits = logits + 0.5 * p * (pull - (p * pull).sum())
    torch.testing.assert_close(logits.softmax(-1)[0], sampled, rtol=0, atol=5e-3)


def test_the_fair_search_is_published_as_it_came_out(load: Load) -> None:
    page = (ROOT / "docs" / "evolution.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs" / "results" / "evolve" / "fair_search.json").read_text(encoding="utf-8"))
    script = load("scripts/fair_search.py")
    for part in found["noises"].values():
        assert script.table(part) in page
        for name, line in part["methods"].items():
            values = [row[name] for row in part["rows"]]
            assert line["reward"] == pytest.approx(sum(values) / len(values))


def test_the_fair_search_ends_at_the_optimum_and_follows_its_exact_gradient(load: Load) -> None:
    script = load("scripts/fair_search.py")
    problem = script.Problem(3, 0.5)

    def fitness(d: Any, coefficient: float = 1.0) -> float:
        p = mirrorpo.optimum(d, problem.q, problem.seen, coefficient)
        return (p * problem.true).sum(-1).mean().item()

    weights = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64)
    started = script.start_map(3)
    cases = [
        (script.mixture_slope, weights, lambda logs: (script.mixture(logs),), 0.01, (2,)),
        (script.map_slope, started, script.mapped, 0.01, (88,)),  # a unit's height
    ]
    for slope, at, made, step, places in cases:
        value, gradient = slope(problem, at)
        assert value == pytest.approx(fitness(*made(at)), abs=1e-5)
        for i in places:
            up, down = at.clone(), at.clone()
            up[i], down[i] = up[i] + step, down[i] - step
            expected = (fitness(*made(up)) - fitness(*made(down))) / (2.0 * step)
            assert gradient[i].item() == pytest.approx(expected, rel=5e-3, abs=1e-7)


def test_every_figure_is_drawn_by_the_script(load: Load, tmp_path: Path) -> None:
    script = load("scripts/make_figures.py")
    assert {picture.stem for picture in (ROOT / "docs" / "figures").glob("*.png")} == {*script.FIGURES, "fixed_points"}
    assert script.main(["--out", str(tmp_path), "--only", "penalty"]) == 0
    assert (tmp_path / "penalty.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_all_names_are_what_the_code_says(load: Load) -> None:
    assert load("scripts/names_table.py").main(["--check"]) == 0


def test_every_name_of_the_package_stands_in_the_page_of_formulas() -> None:
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    tables = {
        "divergence": DIVERGENCES,
        "estimator": ESTIMATORS,
        "region": REGIONS,
        "surrogate": SURROGATES,
        "advantage": ADVANTAGES,
        "aggregation": AGGREGATIONS,
        "preset": PRESETS,
        "anchor": ANCHORS,
        "act": ACTS,
        "level": (*LEVELS, *MASK_LEVELS),
        "placement": PLACEMENTS,
        "key of a region": RULE_KEYS,
        "key of a penalty": PENALTY_KEYS,
    }
    missing = [f"{kind} {name}" for kind, names in tables.items() for name in names if f"`{name}`" not in text]
    assert missing == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_table_of_presets_says_what_the_code_does(preset: str) -> None:
    text = (
        (ROOT / "docs" / "math.md").read_text(encoding="utf-8").partition("## Presets")[2].partition("<!-- ours -->")[0]
    )
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{preset}` |")]
    _, region, penalty, advantage, aggregation, _ = (cell.strip() for cell in row.strip("|").split("|"))
    expected = PRESETS[preset]
    assert (advantage, aggregation) == (expected.advantage, expected.aggregation)
    for spec in expected.penalties:
        name, coefficient = spec["divergence"], spec["coefficient"]
        for word in [name] if isinstance(name, str) else name.values():
            assert word in penalty
        assert spec.get("estimator", "sampled") in penalty.replace("both sampled", "sampled")
        assert spec.get("anchor", "") in penalty
        assert any(
            float(number) == coefficient for number in re.findall(r"\d[\d.]*(?:e-\d+)?", penalty.replace("l2", ""))
        )
    assert (penalty == "none") == (not expected.penalties)
    if not region.startswith("as "):
        bound = next((spec for spec in expected.regions if spec.get("act") != "mask"), {"name": "none"})
        assert region.startswith(bound["name"])
        numbers = {float(number) for number in re.findall(r"\d[\d.]*(?:e-\d+)?", region)}
        assert {value for value in bound.values() if isinstance(value, float)} <= numbers
        assert ("soft" in region) == (bound.get("act") == "soft")
        assert ("mask" in region) == (len(expected.regions) > 1)
        assert ("behaviour sampler" in region) == (expected.behaviour == "sampler")


def test_the_page_says_which_values_of_the_presets_are_ours() -> None:
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    block = text.partition("<!-- ours -->")[2].partition("<!-- end -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("| `") and "`preset`" not in line]
    assert rows == [f"| `{name}` | {preset.ours} |" for name, preset in PRESETS.items() if preset.ours]
