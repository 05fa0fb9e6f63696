"""Typical mistakes of a new user: each ends with status 2 and one line that says what to type."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import refused

from mirrorpo.cli.output import files_and_folder
from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError

MISTAKES = [
    (
        "train arithmetic train.learnig_rate=1e-4 --out x",
        "override 'train.learnig_rate': did you mean 'train.learning_rate'?",
    ),
    ("train arithmetic steps=5 --out x", "override 'steps': did you mean 'train.steps'?"),
    ("train arithmetic train.steps 5 --out x", "override 'train.steps': must be key=value, such as train.steps=5"),
    ("train arithmetic train.steps=many --out x", "override 'train.steps': train.steps: input should be a valid"),
    ("train arithmetic train.group_size=1 --out x", "override 'train.group_size': train.group_size: input should"),
    (
        "train arithmetic train.updates_per_batch=3 --out x",
        "override 'train.updates_per_batch': train: updates_per_batch must divide",
    ),
    ("train arithmetic objective=grpoo --out x", "did you mean 'grpo'"),
    ("train arithmetic objective.divergence=reverse_lk --out x", "did you mean 'reverse_kl'"),
    (
        "train arithmetic objective.coeficient=0.1 --out x",
        "override 'objective.coeficient': objective: unknown objective key 'coeficient'; did you mean 'coefficient'",
    ),
    ("train airthmetic --out x", "did you mean 'arithmetic'"),
    ("train arithmetic", "--out: missing; give the run folder"),
    ("train arithmetic model.path=runs/second/model --out x", "model.path 'runs/second/model': no such folder"),
    ("train arithmetic model.path=here/model --out x", "model.path 'here/model': no such folder"),
    (f"train own_data task.path={'a' * 300} --out x", "a: no such file"),
    (f"train arithmetic model.path=./{'a' * 300} --out x", "a': no such folder"),
    ("train own_data task.path=absent.jsonl --out x", "task.path: absent.jsonl: no such file"),
    (
        "train own_data task.path=eight.jsonl --out x",
        "too few to hold out one in ten: give a second file, task.test_path=test.jsonl",
    ),
    (
        "train own_data task.path=eight.jsonl task.prompt=prompt --out x",
        "no field 'prompt'; it has 'question', 'answer'",
    ),
    (
        "study studies/demo base.train.learnig_rate=1 --out x",
        "override 'base.train.learnig_rate': did you mean 'base.train.learning_rate'?",
    ),
    (
        "study studies/demo arms.without.train.stepz=1 --out x",
        "override 'arms.without.train.stepz': did you mean 'arms.without.train.steps'?",
    ),
    ("report runs/absent", "runs/absent: no such folder; give the --out folder of a run or a study"),
    ("train arithmetic --out here", "is not empty and holds no run; give another folder"),
]


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_a_typical_mistake_is_told_in_one_line_what_to_type(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    # Eight prompts of which none falls to the test part.
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in (0, 1, 2, 3, 4, 5, 7, 8)]
    (tmp_path / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said in refused(*line.split(), cwd=tmp_path)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("preset", "named", "said"),
    [
        ("opd", "./absent", "teacher.path './absent': no such folder"),
        ("opd", "builtin:huge", "teacher.path 'builtin:huge'"),
        ("opd", "here/m", ""),
        ("grpo", "./absent", ""),
    ],
)
def test_a_missing_teacher_is_named_early_where_it_is_looked_at_and_cannot_be_on_the_hub_but_not_in_a_plan(
    preset: str, named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    data = {"task": {"name": "arithmetic"}, "objective": {"preset": preset}, "teacher": {"path": named}}
    recipe_from(data, early=files_and_folder(None))
    if not said:
        recipe_from(data, early=files_and_folder(tmp_path / "x"))
        return
    with pytest.raises(InputError, match=re.escape(said)):
        recipe_from(data, early=files_and_folder(tmp_path / "x"))


def test_processes_that_write_nothing_ask_nothing_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        recipe_from({"task": {"name": "arithmetic"}}, early=files_and_folder(tmp_path))
    monkeypatch.setenv("RANK", "1")
    recipe_from({"task": {"name": "arithmetic"}}, early=files_and_folder(tmp_path))
