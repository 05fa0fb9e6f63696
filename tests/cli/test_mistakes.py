"""Typical mistakes of a new user: each ends with status 2 and one line that says what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import refused

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
