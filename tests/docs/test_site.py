"""The site, the examples and the commands on its pages: built, run, and read as a reader would follow them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import typer
from test_docs import FENCE, PAGES

from browser import Browser, chromium
from mirrorpo.cli.app import app
from mirrorpo.cli.output import check_overrides
from mirrorpo.config.shipped import find_recipe
from mirrorpo.config.study import load_study
from mirrorpo.config.train import load_recipe

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What makes a command of the tutorial a matter of seconds; a later assignment of a key replaces an earlier one.
_SMALL = ("steps=2", "prompts_per_step=4", "group_size=4", "save_every=2")


def _environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(folder / "doctrees")]
    done = _run([sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(folder / "html")], ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")  # a warning is an error
    return folder / "html"


class _Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(name for name in (found.get("id"), found.get("name")) if name)
        self.links += [target for key in ("href", "src") if (target := found.get(key))]


def test_the_site_builds_without_a_warning_and_every_link_inside_it_leads_somewhere(site: Path) -> None:
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert {"index.html", "tutorial.html", "api.html", "explore.html"} <= {path.name for path in pages}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlparse(link).scheme or "_modules" in path.parts or anchor.startswith(("d=", "r=")):
                continue  # the last: a setting of the page with sliders
            target = (path.parent / unquote(urlparse(address).path)).resolve() if address else path
            if not target.exists() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.parametrize("name", ["objective", "divergence", "trust_region", "optimum", "preference_loss"])
def test_the_reference_has_every_function_of_the_core(site: Path, name: str) -> None:
    page = _Page((site / "api.html").read_text(encoding="utf-8"))
    assert any(anchor.startswith("mirrorpo") and anchor.endswith(f".{name}") for anchor in page.anchors)


@pytest.mark.parametrize("script", ["scripts/make_key_tables.py", "scripts/make_notebook.py"])
def test_what_is_written_from_code_is_up_to_date(load: Load, script: str) -> None:
    assert load(script).main(["--check"]) == 0


# Runs scripts, each in a folder of its own and in a process that is forked where the libraries are already imported.
_SCRIPTS = """
import os, runpy, sys, traceback
import peft, mirrorpo.training.trainer
for path in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.mkdir(os.path.basename(path))
    os.chdir(os.path.basename(path))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0], status = [path], os.path.dirname(path), "0"
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = "1"
    sys.stdout.flush()
    with open("status", "w") as file:
        file.write(status)
    os._exit(0)
"""


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each example: what it printed, and its status."""
    folder = tmp_path_factory.mktemp("examples")
    done = _run([sys.executable, "-c", _SCRIPTS, *map(str, EXAMPLES)], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs_and_ends_as_it_says(example: Path, ran: Path) -> None:
    status, stdout, stderr = ((ran / example.name / name).read_text() for name in ("status", "stdout", "stderr"))
    assert status == "0", stderr
    found = [float(number) for number in re.findall(r"-> (\d+\.\d+)", stdout)]
    before = [float(number) for number in re.findall(r"(\d+\.\d+) ->", stdout)]
    match example.stem:
        case "own_loop":
            assert before[-1] < 0.5
            assert found[-1] > 0.7
        case "trl_grpo":
            assert found[-1] > before[-1]
        case "distill":
            assert found[-1] < 0.5 * before[-1]
        case "own_divergence":
            assert stdout.count("gradient descent found") == 2
        case "verl_config":
            assert "actor_rollout_ref.actor.policy_loss.loss_mode" in stdout


def _commands() -> list[tuple[str, str]]:
    """Every command of this package on a page that names no placeholder."""
    found = []
    for page in PAGES:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            for line in block["code"].splitlines():
                line = line.removeprefix("$ ").strip()
                if line.startswith("mirrorpo ") and not re.search(r"\.\.\.|\[[a-z-]|\b[A-Z]{3,}\b|\|", line):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), _commands())
def test_every_command_on_a_page_is_one_that_the_command_line_takes(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    if "learnig_rate" in line:
        return  # the tutorial's typing error; its output is compared below
    group = typer.main.get_command(app)
    context = group.make_context("mirrorpo", [name, *arguments])
    given = context.invoked_subcommand or name
    command = group.commands[given]  # pyright: ignore[reportAttributeAccessIssue]
    parameters = command.make_context(name, list(arguments)).params  # an unknown option is an error
    if name == "train" and not parameters["recipe"].endswith(".yaml"):
        load_recipe(find_recipe(parameters["recipe"]), check_overrides(parameters["overrides"]))
    if name == "study" and not parameters["file"].endswith(".yaml"):
        load_study(find_recipe(parameters["file"]), check_overrides(parameters["overrides"]))


def _masked(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "0", text)


def test_the_tutorial_runs_from_top_to_bottom_and_prints_what_it_says(load: Load, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = load("scripts/make_notebook.py").commands
    for block in (found for found in FENCE.finditer(page) if found["language"] == "console"):
        lines = commands(block["code"])
        said = "\n".join(line for line in block["code"].splitlines() if not line.startswith("$ "))
        for line in lines:
            words = shlex.split(line)
            if words[0] == "pip":
                continue
            if words[1] == "train" and "learnig" not in line:
                words += [*(f"train.{one}" for one in _SMALL), "eval.problems=8"]
            if words[1] == "study":
                words += [*(f"base.train.{one}" for one in _SMALL), "base.train.updates_per_batch=1"]
                words += ["base.eval.problems=8", "base.task.test_size=8"]
            done = _run([sys.executable, "-m", "mirrorpo", *words[1:]], tmp_path)
            printed = (done.stdout if done.returncode == 0 else done.stderr).strip()
            assert done.returncode == (2 if "learnig" in line else 0), done.stderr
            if said and len(lines) == 1:
                assert _masked(printed.splitlines()[0]).startswith(_masked(said.splitlines()[0]))
                assert len(printed.splitlines()) >= len(said.splitlines())
    assert (tmp_path / "runs" / "both" / "report.html").is_file()
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    with Browser(command, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["index", "tutorial", "recipe", "api", "explore", "results/embedded/README"])
def test_a_page_of_the_site_fits_a_phone_and_a_desk(browser: Browser, site: Path, page: str, width: int) -> None:
    browser.open(site / f"{page}.html", width=width)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
