"""The public tasks: their splits share nothing, their prompts are the same everywhere, bad files are named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.config.train import recipe_from
from mirrorpo.tasks import Gsm8k, Mbpp, Task

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GSM8K, MBPP = FOLDER / "gsm8k" / "train.jsonl", FOLDER / "mbpp" / "mbpp.jsonl"
LIMITS = {"require": "limits"}


def there(path: Path) -> str:
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: put the original file at ../shared/data/{path.relative_to(FOLDER)}")
    return str(path)


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(number: int) -> list[dict[str, str]]:
    return [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(number)]


def programs(*ids: int) -> list[dict[str, Any]]:
    return [
        {"task_id": n, "text": f"Return {n}.", "code": f"def f(): return {n}", "test_setup_code": "",
         "test_list": [f"assert f() == {n}", f"assert f() != {n + 1}", f"assert f() < {n + 2}"]}
        for n in ids
    ]  # fmt: skip


def test_training_never_sees_the_validation_part_of_gsm8k() -> None:
    task = Gsm8k(path=there(GSM8K))
    train, validation = ({row["question"] for row in task.rows(part)} for part in ("train", "validation"))  # pyright: ignore[reportArgumentType]
    assert len(validation) == 500
    assert len(train) == 7473 - 500
    assert not train & validation
    assert task.rows("test") == task.rows("validation"), "the file has no test split"
    assert isinstance(task, Task)
    assert all(task.grade(row["answer"], row).reward == 1.0 for row in task.rows("test"))


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    rows = questions(50)
    path = written(tmp_path / "train.jsonl", [*rows, *rows[:10]])  # ten questions twice
    parts = [Gsm8k(path=path, validation_size=10, seed=seed).rows("validation") for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    task = Gsm8k(path=path, validation_size=10)
    assert len(task.rows("train")) == 40
    assert not {r["question"] for r in task.rows("train")} & {r["question"] for r in task.rows("validation")}


def test_a_test_file_is_kept_out_of_training(tmp_path: Path) -> None:
    path, test_path = written(tmp_path / "a", questions(30)), written(tmp_path / "b", questions(5))
    task = Gsm8k(path=path, test_path=test_path, validation_size=4)
    assert len(task.rows("test")) == 5
    assert not {r["question"] for r in task.rows("train")} & {r["question"] for r in task.rows("test")}


def test_mbpp_is_split_by_task_id() -> None:
    task = Mbpp(path=there(MBPP), sandbox=LIMITS)
    ids = {part: [row["task_id"] for row in task.rows(part)] for part in ("train", "validation")}  # pyright: ignore[reportArgumentType]
    assert ids == {"train": list(range(601, 975)), "validation": list(range(511, 601))}
    assert task.rows("test") == task.rows("validation"), "the file has no test split"
    rows = task.rows("test")
    fenced = [f"```python\n{row['answer']}\n```" for row in rows]
    assert {grade.reward for grade in task.grade_many(fenced, rows)} == {1.0}
    assert task.grade("```python\npass\n```", rows[0]).reason == "error"
    assert isinstance(task, Task)
    task.close()


def test_shown_tests_are_in_the_prompt_and_all_tests_count(tmp_path: Path) -> None:
    path = written(tmp_path / "m", programs(5, 20, 520, 601))
    task = Mbpp(path=path, shown_tests=1, sandbox=LIMITS)
    (row,) = task.rows("train")
    assert "assert f() == 601" in row["prompt"]
    assert "assert f() != 602" not in row["prompt"]
    assert len(row["tests"]) == 3
    assert [r["task_id"] for r in task.rows("test")] == [20]
    assert json.loads(json.dumps(row)) == row
    task.close()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": 601, "text": "x", "test_list": []}], r"line 1: task 601: no tests \(field test_list\)"),
        ([{"task_id": 601, "text": "x"}], "line 1: task 601: no tests"),
        ([{"task_id": 601, "text": "x", "test_list": ["assert f("]}], "line 1: task 601: tests are not Python"),
        ([{"task_id": "a", "text": "x", "test_list": ["assert f()"]}], "line 1: task_id must be an integer, got 'a'"),
        ([{"task_id": 1}], "line 1: no field 'text'"),
        (programs(511, 512), "no training rows"),
        (programs(601), "no rows for testing"),
    ],
)
def test_bad_mbpp_files_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mbpp(path=written(tmp_path / "m", rows), sandbox=LIMITS)


def test_rows_whose_tests_check_nothing_are_counted_and_give_no_reward(tmp_path: Path) -> None:
    rows = programs(20, 601, 602, 603)
    rows[1]["test_list"] = ["f() == 1"]
    rows[2]["test_list"] = ["assert np.isclose(f(), 602)"]
    with pytest.warns(
        UserWarning, match=r"m: 2 of 4 rows give no reward, the first of them is line 2 \(task 601\): tests "
    ):
        task = Mbpp(path=written(tmp_path / "m", rows), sandbox=LIMITS)
    grades = [task.grade(f"```python\ndef f(): return {row['task_id']}\n```", row) for row in task.rows("train")]
    assert [grade.reward for grade in grades] == [None, None, 1.0]
    assert [grade.reason for grade in grades[:2]] == ["tests assert nothing", "tests use np, which nothing defines"]
    task.close()
    with pytest.raises(
        ValueError, match=r"no row has tests that can be used; line 1 \(task 601\): tests assert nothing"
    ):
        Mbpp(path=written(tmp_path / "n", rows[1:2]), sandbox=LIMITS)


def test_half_a_character_is_named_by_line_and_a_nul_byte_is_a_character_like_others(tmp_path: Path) -> None:
    rows = questions(30)
    rows[3]["question"] = "What is \ud800?"
    with pytest.raises(ValueError, match=r"line 4: field 'question' holds half a character"):
        Gsm8k(path=written(tmp_path / "a", rows), validation_size=5)
    rows[3]["question"] = "What is \x00 + 1?"
    task = Gsm8k(path=written(tmp_path / "a", rows), validation_size=5)
    assert any("\x00" in row["prompt"] for part in ("train", "validation") for row in task.rows(part))  # pyright: ignore[reportArgumentType]
    bad = programs(520, 601)
    bad[1]["text"] = "Return \udfff."
    with pytest.raises(ValueError, match=r"line 2: field 'text' holds half a character"):
        Mbpp(path=written(tmp_path / "m", bad), sandbox=LIMITS)


def test_missing_parts_say_what_to_set(tmp_path: Path) -> None:
    path = written(tmp_path / "a", questions(30))
    with pytest.raises(ValueError, match=r"no test split: set task\.test_path .* or task\.test_part to validation"):
        Gsm8k(path=path, validation_size=5, test_part="test")
    with pytest.raises(ValueError, match=r"validation_size must be in \[0, 29\] \(30 rows\), got 30"):
        Gsm8k(path=path, validation_size=30)
    with pytest.raises(ValueError, match="test_path goes with path"):
        Gsm8k(test_path=path)
    with pytest.raises(ValueError, match="no rows for testing"):
        Gsm8k(path=path, validation_size=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Gsm8k(path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"sandbox does not take 'memory'\. Legal: require, in_flight"):
        Mbpp(path=written(tmp_path / "m", programs(520, 601)), sandbox={"memory": 3})


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="asks the hub unless HF_HUB_OFFLINE=1")
@pytest.mark.parametrize("build", [Gsm8k, Mbpp])
def test_an_offline_hub_says_what_to_set(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub .* Set task\.path to the original JSONL file"):
        build()


def test_recipes_take_both_tasks() -> None:
    mbpp = {"name": "mbpp", "path": "x", "sandbox": {"require": "isolated"}}
    assert recipe_from({"task": mbpp}).task.model_dump()["sandbox"]["require"] == "isolated"
    assert recipe_from({"task": {"name": "gsm8k"}}).task.name == "gsm8k"
    with pytest.raises(ValueError, match=r"task\.sandbox\.require: input should be 'limits', 'filtered', 'confined'"):
        recipe_from({"task": {**mbpp, "sandbox": {"require": "perfect"}}})
    with pytest.raises(ValueError, match=r"unknown key 'task\.sandbox\.wall'; did you mean 'wall_seconds'"):
        recipe_from({"task": {**mbpp, "sandbox": {"wall": 3}}})
