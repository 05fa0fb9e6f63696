"""How a command starts and ends: what it imports, and the one line and the status of every way to fail."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import refused, run

import mirrorpo
from mirrorpo.cli import listing
from mirrorpo.cli import output as cli_output
from mirrorpo.errors import RunError

HEAVY = ("torch", "transformers", "trl", "scipy", "matplotlib", "numpy", "datasets")


def started(*arguments: str, cwd: Path, code: str | None = None) -> tuple[int, str, str, set[str]]:
    """Status, stdout, stderr and the imported modules of a command in a process of its own."""
    report = (
        "import atexit, sys; "
        "atexit.register(lambda: print('\\n' + ' '.join(m for m in sys.modules if '.' not in m), file=sys.stderr)); "
        "sys.argv[0] = 'mirrorpo'; "
    )
    program = report + (code or "from mirrorpo.cli import main; main()")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    *said, modules = done.stderr.rstrip("\n").split("\n")
    return done.returncode, done.stdout, "\n".join(line for line in said if line), set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        ([], 0),
        (["--version"], 0),
        (["train", "-h"], 0),
        (["list", "divergences"], 0),
        (["list", "objectives", "--json"], 0),
        (["list", "recipes"], 0),
        (["list", "estimators"], 0),
        (["explorer", "--no-open"], 0),
        (["docs", "choosing"], 0),
        (["list", "divergence"], 2),
        (["nonsense"], 2),
        (["train", "arithmetik", "--out", "x"], 2),
        (["train", "arithmetic", "--ouput", "x"], 2),
        (["train", "arithmetic"], 2),
        (["train", "arithmetic", "steps", "--out", "x"], 2),
        (["train", "train.steps=5", "--out", "x"], 2),
        (["train", "arithmetic", "train.stepz=5", "--out", "x"], 2),
        (["train", "arithmetic", "train.steps=many", "--out", "x"], 2),
        (["train", "arithmetic", "train.updates_per_batch=7", "--plan"], 2),
        (["train", "arithmetic", "objective=grpoo", "--out", "x"], 2),
        (["train", "arithmetic", "objective.coeficient=1", "--out", "x"], 2),
        (["train", "arithmetic", "objective.region=kl4", "--out", "x"], 2),
        (["train", "arithmetic", "task.name=chess", "--out", "x"], 2),
        (["train", "arithmetic", "objective.penalties=[{divergence: jjs, coefficient: 1}]", "--out", "x"], 2),
        (["train", "arithmetic", "model.path=./absent", "--out", "x"], 2),
        (["train", "own_data", "task.path=absent.jsonl", "--out", "x"], 2),
        (["train", "arithmetic", "--out", "x", "--resume"], 2),
        (["eval", "./absent", "--task", "arithmetic"], 2),
        (["study", "studies/demo", "arms.with_kl.objective.region=kl4", "--out", "x"], 2),
        (["eval", "builtin:tiny", "--task", "chess"], 2),
        (["evolve", "evolve/embedded", "train.stepz=5", "--out", "x"], 2),
        (["study", "studies/demo", "seeds=0", "--out", "x"], 2),
        (["study", "studies/demo", "base.train.stepz=1", "--out", "x"], 2),
        (["train", "arithmetic", "--steps", "5"], 2),
        (["eval", "builtin:tiny"], 2),
        (["eval", "builtin:tiny", "--task", "arithmetic", "-k", "none"], 2),
        (["evolve", "nothing", "--out", "x"], 2),
        (["study", "studies/embedded"], 2),
        (["report", "absent"], 2),
        (["grade", "maths", "x"], 2),
        (["grade", "math", "absent.jsonl"], 2),
    ],
)
def test_help_lists_and_errors_of_use_import_nothing_slow(arguments: list[str], status: int, tmp_path: Path) -> None:
    returned, out, err, modules = started(*arguments, cwd=tmp_path)
    assert (returned, err.count("\n")) == (status, 0), err
    assert bool(out) == (status == 0)
    assert bool(err) == (status != 0)
    assert not modules & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_imports_nothing_slow_until_a_name_is_used(tmp_path: Path) -> None:
    _, _, _, modules = started(cwd=tmp_path, code="import mirrorpo; dir(mirrorpo)")
    assert not modules & {*HEAVY, "typer", "pydantic"}
    _, _, _, modules = started(cwd=tmp_path, code="import mirrorpo; mirrorpo.objective('grpo')")
    assert not modules & {"typer", "pydantic", "transformers", "trl", "scipy", "matplotlib", "rich", "datasets"}


def test_the_package_has_the_names_that_it_announces() -> None:
    assert set(mirrorpo._HOME) == set(mirrorpo.__all__)
    assert set(mirrorpo.__all__) <= set(dir(mirrorpo))
    assert all(getattr(mirrorpo, name) is not None for name in mirrorpo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'objectiv'"):
        mirrorpo.objectiv  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_every_module_hides_no_public_name(tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, mirrorpo; before = {n: getattr(mirrorpo, n) for n in mirrorpo.__all__}; "
        "[importlib.import_module(m.name) for p in ('losses', 'divergences', 'kernels') for m in "
        "pkgutil.walk_packages(importlib.import_module(f'mirrorpo.{p}').__path__, f'mirrorpo.{p}.')]; "
        "assert all(getattr(mirrorpo, n) is f for n, f in before.items())"
    )
    status, _, err, _ = started(cwd=tmp_path, code=code)
    assert status == 0, err


def test_no_ignore_rule_takes_a_source_file_out_of_the_wheel() -> None:
    """The build leaves out what git ignores, tracked or not."""
    root = Path(mirrorpo.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    sources = [str(path.relative_to(root)) for path in (root / "src").rglob("*.py")]
    command = ["git", "check-ignore", "--no-index", *sources]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), "1: none is ignored"


def test_no_message_names_a_file_that_an_installation_lacks() -> None:
    """Docstrings may: they are read beside the code."""
    import ast
    import re

    package = Path(mirrorpo.__file__).parent
    of_a_checkout = re.compile(r"\b(docs|examples|recipes|scripts|tests|benchmarks)/\S+|README|Makefile|`make ")
    model_card = {"README.md"}
    found = []
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        bodies = [node.body for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list)]
        prose = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        said = [node.value for node in texts if id(node) not in prose and node.value not in model_card]
        found += [f"{file.relative_to(package)}: {text[:80]!r}" for text in said if of_a_checkout.search(text)]
    assert found == []


def test_every_page_that_a_message_names_is_in_the_wheel() -> None:
    import re
    import tomllib

    root = Path(mirrorpo.__file__).parents[2]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = [file.read_text(encoding="utf-8") for file in (root / "src").rglob("*.py")]
    pages = {page for text in sources for page in re.findall(r"\bpage\([\"']([^\"']+)[\"']\)", text)}
    assert pages == {"explorer.html", "rewards.md"}
    shipped = set(build["force-include"])
    assert {f"docs/{page}" for page in pages} <= shipped
    listed = json.loads(run("docs", "--json").stdout)
    files = {Path(row["file"]).relative_to(root).as_posix() for row in listed}
    assert {file for file in files if file.count("/") == 1} <= shipped
    assert {"docs/howto", "docs/evidence"} <= shipped


def test_the_documentation_is_printed_page_by_page() -> None:
    names = [row["page"] for row in json.loads(run("docs", "--json").stdout)]
    assert {"choosing", "howto/trl", "math"} <= set(names)
    assert "index" not in names
    assert [line.split()[0] for line in run("docs").stdout.splitlines()] == names
    assert run("docs", "choosing").stdout.startswith("# Choosing")
    assert run("docs", "trl").stdout == run("docs", "howto/trl.md").stdout == run("docs", "howto/trl").stdout
    assert "did you mean 'choosing'?" in run("docs", "chosing", status=2).stderr


def test_the_readme_of_the_package_links_to_no_file_of_the_repository() -> None:
    import re
    import tomllib

    root = Path(mirrorpo.__file__).parents[2]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    project = tomllib.loads((root / "pyproject.toml").read_text())
    (rule,) = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    text = re.sub(rule["pattern"], rule["replacement"], (root / "README.md").read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "which divergence?, the formulas" in text


def test_a_type_checker_sees_every_lazy_name_from_the_module_that_it_is_loaded_from() -> None:
    import ast

    tree = ast.parse(Path(mirrorpo.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == mirrorpo._HOME


@pytest.mark.parametrize("module", ["mirrorpo", "mirrorpo.cli"])
def test_the_program_runs_as_a_module_and_never_imports_from_the_current_folder(module: str, tmp_path: Path) -> None:
    for name in ("typer", "rich", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')\n")
    done = subprocess.run(
        [sys.executable, "-m", module, "list", "tasks", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["name"] for row in json.loads(done.stdout)] == ["arithmetic", "words", "gsm8k", "mbpp", "jsonl"]


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"mirrorpo {mirrorpo.__version__}\n"


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    hide = (
        "import importlib.util as u; found = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name in ('trl', 'typer') else found(name, *more); "
    )
    status, out, err, _ = started("--help", cwd=tmp_path, code=hide + "from mirrorpo.cli import main; main()")
    assert (status, out) == (1, "")
    assert err == (
        "mirrorpo on the command line needs the extra 'train' (missing: trl, typer): pip install 'mirrorpo[train]'"
    )
    status, _, err, _ = started(cwd=tmp_path, code=hide + "from mirrorpo.training import MirrorTrainer")
    assert status == 1
    assert err.splitlines()[-1] == (
        "ImportError: mirrorpo.training needs the extra 'train' (missing: trl, typer): pip install 'mirrorpo[train]'"
    )


@pytest.mark.parametrize(
    "module", ["cli.listing", "cli.output", "errors", "models.folder", "models.threads", "user_code"]
)
def test_the_examples_in_docstrings_hold(module: str) -> None:
    results = doctest.testmod(
        importlib.import_module(f"mirrorpo.{module}"), optionflags=doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert (results.failed, results.attempted > 0) == (0, True)


# ---- lists


def test_the_catalogue_is_what_the_code_says() -> None:
    assert listing.read() == listing.build(), "write it again: python -m mirrorpo.cli.listing"


@pytest.mark.parametrize("what", listing.TABLES)
def test_every_list_has_names_and_something_to_say_of_each(what: str) -> None:
    rows = json.loads(run("list", what, "--json").stdout)
    assert rows
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(sum(bool(value) for value in row.values()) >= 2 for row in rows)


# ---- the ways to fail


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["train", "arithmetic", "--ouput", "x"], "--out); see `mirrorpo train --help`"),
        (["train"], "Missing argument 'recipe'; see `mirrorpo train --help`"),
        (["trian", "arithmetic"], "No such command 'trian'. Did you mean 'train'? See `mirrorpo --help`"),
        (["train", "arithmetic", "5", "--out", "x"], "override '5': must be key=value, such as train.steps=5"),
        (["train", ".", "--out", "x"], "is a folder, not a recipe file; the recipe of a run is recipe.yaml"),
        (["eval", "--task", "arithmetic"], "Missing argument 'model'"),
        (["report", "absent"], "absent: no such folder; give the --out folder of a run or a study"),
    ],
)
def test_a_mistake_of_use_says_what_to_type(arguments: list[str], piece: str, tmp_path: Path) -> None:
    assert piece in refused(*arguments, cwd=tmp_path)


class Panic(BaseException):
    """As Rust's panics arrive: not an ``Exception``."""


@pytest.mark.parametrize("error", [KeyError("x\ny\x1b[31m"), Panic("index out of bounds"), RecursionError("deep")])
def test_an_unexpected_exception_is_one_line_with_a_log(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(what: str) -> None:
        raise error

    monkeypatch.setattr(listing, "listing", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = run("list", "tasks", status=1)
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()
    assert done.stderr.startswith(f"failed: {type(error).__name__}: ")
    (log,) = tmp_path.iterdir()
    assert f"traceback in {log}" in done.stderr
    text = log.read_text()
    assert text.startswith("mirrorpo list tasks\n")
    assert "in broken" in text
    assert "\x1b" not in text

    done = run("list", "tasks", "--debug", status=1)
    assert "in broken" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1, "no second log"


def test_where_no_log_can_be_written_the_line_names_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "listing", lambda what: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert run("list", "tasks", status=1).stderr.endswith("--debug prints the traceback)\n")


def test_an_endless_recursion_prints_at_most_some_hundred_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(n: int) -> None:
        second(n)

    def second(n: int) -> None:
        first(n)

    monkeypatch.setattr(listing, "listing", lambda what: first(0))
    assert run("list", "tasks", "--debug", status=1).stderr.count("\n") < 250


@pytest.mark.parametrize("position", [("--quiet", "list", "tasks"), ("list", "tasks", "-q")])
def test_quiet_silences_progress_wherever_it_stands_and_for_one_command_only(
    position: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(what: str) -> None:
        cli_output.console().print("working")
        raise RunError("stopped")

    monkeypatch.setattr(listing, "listing", noisy)
    assert run(*position, status=1).stderr == "failed: stopped\n"
    assert run("list", "tasks", status=1).stderr == "working\nfailed: stopped\n"


def test_the_explorer_is_a_page_on_this_machine() -> None:
    address = json.loads(run("explorer", "--json").stdout)["page"]
    assert address.startswith("file:///")
    assert run("explorer").stdout == address + "\n"
