"""Code that a recipe names: found where the user said, never in place of the environment's, never in a plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_cli import run

from mirrorpo import user_code
from mirrorpo.user_code import NotImportedError, import_attribute, look_in, not_imported


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code, "_folders", [])
    for name in ("own_reward", "own_other", "fails_inside"):
        monkeypatch.delitem(sys.modules, name, raising=False)


STANDARD = [
    "builtins:eval", "builtins:exec", "builtins:__import__", "os:system", "os.path:join", "subprocess:run",
    "subprocess:Popen", "shutil:rmtree", "sys:exit", "posix:system", "pickle:loads", "ctypes:CDLL", "runpy:run_path",
    "code:interact", "pty:spawn", "importlib:import_module", "functools:partial", "operator:attrgetter", "math:exp",
]  # fmt: skip


@pytest.mark.parametrize("path", STANDARD)
def test_a_target_in_the_standard_library_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="belongs to Python itself; name a function of a module of yours"):
        import_attribute(path, "reward")


@pytest.mark.parametrize(
    ("path", "piece"),
    [
        ("numpy:os.system", "has no attribute|os is a module"),
        ("torch:os.system", "os is a module; write its full name before the colon"),
        ("own_reward:os.system", "os is a module"),
        ("own_reward:remove", "posix belongs to Python itself"),
        ("own_reward:Popen", "subprocess belongs to Python itself"),
        ("own_reward:reward.__globals__", "has no attribute '__globals__'"),
        ("own_reward:__builtins__", "has no attribute '__builtins__'"),
        ("own_reward:absent", "own_reward has no attribute 'absent'"),
        ("own_absent:reward", "cannot import module 'own_absent' .*; looked in the environment and in /"),
        ("fails_inside:reward", "cannot import module 'fails_inside' .NameError: name 'undefined' is not defined"),
        ("exits_inside:reward", "cannot import module 'exits_inside' .SystemExit: 3"),
        (".own_reward:reward", "full name, without a dot in front"),
        ("own_reward", "must be 'module:attribute'"),
        (":reward", "must be 'module:attribute'"),
        ("own_reward:", "must be 'module:attribute'"),
        ("own_reward:reward:x", "has no attribute 'reward:x'"),
        ("own reward:x", "cannot import module 'own reward'"),
        ("\0:x", "cannot import module"),
    ],
)
def test_a_target_that_cannot_be_used_is_one_line(path: str, piece: str, tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text(
        "import os\nfrom os import remove\nfrom subprocess import Popen\ndef reward(c, r): return 1.0\n"
    )
    (tmp_path / "fails_inside.py").write_text("undefined\n")
    (tmp_path / "exits_inside.py").write_text("raise SystemExit(3)\n")
    look_in(tmp_path)
    with pytest.raises(ValueError, match=piece) as refused:
        import_attribute(path, "reward")
    assert "\n" not in str(refused.value)


def test_a_module_is_found_in_the_folders_that_were_named_and_may_import_its_neighbours_later(tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def reward(c, r):\n    from own_other import value\n    return value\n\nclass Kind:\n    pass\n"
    )
    (tmp_path / "own_other.py").write_text("value = 0.25\n")
    before = list(sys.path)
    look_in(tmp_path / "elsewhere", tmp_path)
    assert sys.path == before, "naming a folder is not enough"
    assert import_attribute("own_reward:reward", "reward")("", {}) == 0.25
    assert import_attribute("own_reward:Kind", "divergence").__name__ == "Kind"
    assert sys.path == [*before, str(tmp_path)], "behind what the environment has"


def test_a_folder_never_stands_for_a_package_of_the_environment_or_one_that_is_absent(tmp_path: Path) -> None:
    for name in ("numpy", "vllm", "own_reward"):
        (tmp_path / f"{name}.py").write_text("def reward(c, r): return 'hijacked'\n")
    look_in(tmp_path)
    with pytest.raises(ValueError, match=r"numpy has no attribute 'reward' \(.*site-packages"):
        import_attribute("numpy:reward", "reward")
    assert str(tmp_path) not in sys.path


def test_inside_a_plan_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text("raise SystemExit('imported')\n")
    look_in(tmp_path)
    with not_imported("a plan"), pytest.raises(NotImportedError, match="is not imported for a plan"):
        import_attribute("own_reward:reward", "reward")
    assert not user_code.is_forbidden()
    assert "own_reward" not in sys.modules


# ---- commands


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe, its data and its code in a folder of their own; importing the code leaves a file."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own_reward.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "def reward(completion, row): return float(len(completion) < 9)\n"
        "def cube(x): return x**3\n"
    )
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(40)))
    (folder / "own.yaml").write_text(
        f"task: {{name: jsonl, path: {folder / 'data.jsonl'}, reward: 'own_reward:reward'}}\n"
        "objective: {preset: dapo, divergence: 'own_reward:cube', coefficient: 0.01}\n"
        "train: {steps: 1, prompts_per_step: 2, group_size: 2, max_completion_length: 3}\n"
        "eval: {problems: 2}\n"
    )
    return folder


def test_a_plan_says_what_would_run_without_importing_it(project: Path, tmp_path: Path) -> None:
    done = run("train", str(project / "own.yaml"), "--plan", cwd=tmp_path)
    assert "dapo with code of yours (divergence 'own_reward:cube': a module of yours is not imported for a plan)" in (
        done.stdout
    )
    assert "memory is unknown: a plan does not import the code of yours" in done.stdout
    assert not (tmp_path / "imported").exists()


def test_a_run_finds_the_module_beside_its_recipe_and_a_report_imports_nothing(project: Path, tmp_path: Path) -> None:
    run("train", str(project / "own.yaml"), "--out", "run", cwd=tmp_path)
    (tmp_path / "imported").unlink()
    run("report", "run", cwd=tmp_path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("target", ["builtins:eval", "os:system", "subprocess:run"])
@pytest.mark.parametrize("more", [("--plan",), ("--out", "run")])
def test_a_recipe_that_names_a_function_of_python_itself_is_refused(
    target: str, more: tuple[str, ...], project: Path, tmp_path: Path
) -> None:
    for override in (f"task.reward={target}", f"objective.divergence={target}"):
        done = run("train", str(project / "own.yaml"), override, *more, cwd=tmp_path, status=2)
        assert "belongs to Python itself; name a function of a module of yours" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
