"""Tasks of other packages: found by their entry point, settings checked as those of any task."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
from pydantic import Field

import mirrorpo.tasks
from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.rewards.verdict import Grade
from mirrorpo.tasks import Entry, Row, Split
from mirrorpo.tasks.task import Settings
from mirrorpo.training.setup import build_task


class EchoSettings(Settings):
    """A task of one letter."""

    name: Literal["echo"]
    letter: str = Field(default="a", max_length=1)


class Echo:
    """Say the letter."""

    name = "echo"

    def __init__(self, *, letter: str) -> None:
        self.letter = letter

    def rows(self, split: Split) -> list[Row]:
        return [{"prompt": f"{split}: {self.letter}?"}]

    def grade(self, completion: str, row: Row) -> Grade:
        return Grade(reward=float(completion == self.letter), reason="match")


ENTRY = Entry(build=Echo, settings=EchoSettings, summary="one letter")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name="echo", value=f"{__name__}:ENTRY", group=mirrorpo.tasks.ENTRY_POINT_GROUP),
        EntryPoint(name="wrong", value=f"{__name__}:Echo", group=mirrorpo.tasks.ENTRY_POINT_GROUP),
        EntryPoint(name="gone", value="no_such_module:ENTRY", group=mirrorpo.tasks.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(mirrorpo.tasks, "entry_points", lambda group: points)


def test_a_task_of_another_package_is_built_from_its_settings() -> None:
    recipe = recipe_from({"task": {"name": "echo", "letter": "b"}})
    assert build_task(recipe).rows("train") == [{"prompt": "train: b?"}]
    assert recipe.model_dump()["task"] == {"name": "echo", "letter": "b"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "echo", "lettre": "b"}, r"unknown key 'task\.lettre'; did you mean 'letter'"),
        ({"name": "echo", "letter": "bb"}, r"task\.letter: .*at most 1 character"),
        ({"name": "wrong"}, r"task\.name: entry point 'wrong' of mirrorpo\.tasks gave a type, not an Entry"),
        ({"name": "gone"}, r"task\.name: No module named 'no_such_module'"),
        ({"name": "ekko"}, r"task\.name: unknown task 'ekko'"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(task: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_from({"task": task})
