"""The unbroken runs that broken ones are compared with, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from chaos import harness, recipes
from chaos.harness import Ended


@pytest.fixture(scope="session")
def unbroken_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Ended]]:
    """From a recipe's name to the folder of its unbroken run, and how it ended."""

    @cache
    def made(recipe: str) -> tuple[Path, Ended]:
        root = tmp_path_factory.mktemp(recipe)
        done = harness.run(recipes.arguments(recipe, root / "run"), root / "run", root / "scratch")
        assert done.status == 0, done.stderr
        assert len(done.places) > (50 if recipe in recipes.TRAINED else 20)
        return root / "run", done

    return made
