"""Import paths of the version before keep working, with a warning that names the new ones."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import mirrorpo
from mirrorpo._moved import MOVED

SOURCE = Path(mirrorpo.__file__).parent


def test_no_old_path_is_the_path_of_a_module_that_exists() -> None:
    for old in MOVED:
        place = SOURCE.joinpath(*old.split("."))
        assert not place.with_suffix(".py").exists(), old
        assert not (place / "__init__.py").exists(), old


@pytest.mark.parametrize("old", MOVED)
def test_every_old_path_leads_to_modules_that_exist(old: str) -> None:
    for new in MOVED[old]:
        assert find_spec(f"mirrorpo.{new}") is not None


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_warning_names_the_new_path_and_points_at_the_import() -> None:
    said = run("import mirrorpo\nfrom mirrorpo.mirror_maps import load_map\nprint(load_map.__module__)")
    assert "mirrorpo.divergences.neural.file" in said.splitlines()[0]
    assert "<string>:2: DeprecationWarning: mirrorpo.mirror_maps has moved to mirrorpo.divergences.neural.file" in said


def test_old_and_new_paths_give_the_same_objects() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for old, names in (
            ("trust_region", ["Interval", "trust_region"]),
            ("surrogate", ["SURROGATES"]),
            ("training.recipe", ["Recipe", "load_recipe"]),
        ):
            module = importlib.import_module(f"mirrorpo.{old}")
            for name in names:
                assert getattr(module, name) is getattr(importlib.import_module(f"mirrorpo.{MOVED[old][0]}"), name)


def test_a_public_function_stays_callable_after_the_module_of_its_name_was_imported() -> None:
    said = run(
        "import mirrorpo, mirrorpo.objective, mirrorpo.trust_region, mirrorpo.advantages\n"
        "from mirrorpo.objective import Objective\n"
        "assert isinstance(mirrorpo.objective('dapo'), Objective)\n"
        "print(mirrorpo.trust_region('kl3', radius=0.03).name, mirrorpo.objective('dapo').name)"
    )
    assert "kl3 dapo" in said


def test_from_a_moved_package_its_old_modules_can_be_imported() -> None:
    said = run(
        "from mirrorpo.evolution import strategy, search\nimport mirrorpo.evolution.search as again\n"
        "assert search is again\nprint(strategy.__name__)"
    )
    assert "mirrorpo.evolution.strategy" in said


def test_a_name_that_never_existed_is_an_import_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ImportError, match="no_such_name"):
            from mirrorpo.mirror_maps import no_such_name  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mirrorpo.no_such_module")
