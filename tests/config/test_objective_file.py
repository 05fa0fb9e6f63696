"""An objective file is a recipe's objective group: every way to name one gives the same, every mistake one line."""

from __future__ import annotations

import doctest
import json
from importlib import import_module
from pathlib import Path

import pytest

from mirrorpo.config.objective_file import read_objective, read_spec
from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training import MirrorConfig

ROOT = Path(__file__).resolve().parents[2]
SPEC = {"preset": "dapo", "region": {"name": "kl3", "radius": 0.03}, "divergence": "js", "coefficient": 0.01}


@pytest.fixture(params=["yaml", "json"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text = json.dumps(SPEC)
    if request.param == "yaml":
        text = "preset: dapo\nregion: {name: kl3, radius: 3e-2}\ndivergence: js\ncoefficient: 1e-2\n"
    path = tmp_path / f"objective.{request.param}"
    path.write_text(text)
    return path


def test_a_file_a_text_and_a_mapping_are_the_same_objective(file: Path) -> None:
    assert read_spec(file) == read_spec(str(file)) == read_spec(json.dumps(SPEC)) == read_spec(SPEC) == SPEC
    assert read_objective(file).describe() == read_objective(SPEC).describe()
    assert read_objective("dapo").name == "dapo"


def test_the_trainer_and_the_recipe_take_the_file_and_the_resolved_recipe_holds_its_content(file: Path) -> None:
    config = MirrorConfig(
        str(file.parent), objective=str(file), report_to="none", bf16=False, activation_checkpointing=False
    )
    assert config.beta == 0.01
    recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": str(file)})
    assert recipe.model_dump()["objective"] == SPEC
    overridden = recipe_from({"task": {"name": "arithmetic"}}, [f"objective={file}"])
    assert overridden.objective.build().describe() == config.resolved_objective().describe()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("coefficient: 1\n", "needs the key 'preset'. Legal: a_star_po, atr_grpo"),
        ("preset: dapo\nradiuss: 1\n", "unknown objective key 'radiuss'; did you mean 'radius'"),
        ("preset: dapo\npreset: grpo\n", "duplicate key .preset."),
        ("- dapo\n", "must be a mapping with the keys preset, "),
        ("preset: [\n", "not valid YAML"),
        ("preset: dapo\nregion: {name: kl3}\n", "needs a radius"),
        ("preset: dapo\ncoefficient: .nan\n", "coefficient"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_the_file(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "objective.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        read_objective(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="no such objective file"):
        read_objective("none.yaml")
    with pytest.raises(InputError, match=r"objective: none\.yaml: no such objective file"):
        recipe_from({"task": {"name": "arithmetic"}, "objective": "none.yaml"})


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "objectives").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_objective_files_are_read(path: Path) -> None:
    assert read_objective(path).needs_reference


@pytest.mark.parametrize("name", ["config.objective_file", "integrations.shared", "training.distributed"])
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(import_module(f"mirrorpo.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE, report=False)
    assert result.attempted > 0
    assert result.failed == 0
