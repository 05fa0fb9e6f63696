"""The recipes for GSM8K and MBPP: the whole grid is there, and each objective runs, tiny, on the real rows."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mirrorpo.config.shipped import shipped_recipes
from mirrorpo.config.train import Recipe, load_recipe
from mirrorpo.losses.presets import PRESETS
from mirrorpo.tasks import TASKS
from rewards.data import GSM8K, MBPP, rows_of

DATA = {"gsm8k": GSM8K, "mbpp": MBPP}
OBJECTIVES = ("dr_grpo", "prob_l2_grpo", "prob_l2_gspo", "nm_grpo", "nm_grpo_es", "atr_grpo")
GRID = [
    (f"{task}/{objective}_{size}{adapter}", task, objective, size, adapter)
    for task in DATA
    for objective in OBJECTIVES
    if objective in PRESETS
    for size in ("1.7b", "0.6b")
    for adapter in ("", "_lora")
]
AUTHORS = [f"{task}/authors_{name}" for task in DATA for name in ("prob_l2", "prob_l2_exact")]
# The recipe as it is, but for its size: real prompts, real rewards, a tiny policy.
SMALL = (
    "model.path=builtin:tiny",
    "model.dtype=auto",
    "train.use_vllm=false",
    "train.steps=2",
    "train.prompts_per_step=2",
    "train.group_size=2",
    "train.updates_per_batch=2",
    "train.micro_batch_size=2",
    "train.max_completion_length=6",
    "eval.problems=1",
    "task.train_size=16",
)


def test_every_recipe_of_the_two_tasks_is_in_the_grid() -> None:
    shipped = {n for n in shipped_recipes() if n.partition("/")[0] in DATA}
    assert {name for name, *_ in GRID} | set(AUTHORS) == shipped


@pytest.mark.parametrize(("name", "task", "objective", "size", "adapter"), GRID, ids=[row[0] for row in GRID])
def test_a_recipe_is_what_its_name_says_with_the_settings_of_the_paper(
    name: str, task: str, objective: str, size: str, adapter: str
) -> None:
    recipe = load_recipe(shipped_recipes()[name])
    baseline = load_recipe(shipped_recipes()[f"{task}/dr_grpo_{size}{adapter}"])
    assert recipe.model_copy(update={"objective": baseline.objective}) == baseline, "only the objective is different"
    assert recipe.task.name == task
    assert recipe.objective.spec() == {"preset": objective}
    assert recipe.model.path == f"Qwen/Qwen3-{size.upper()}"
    assert (recipe.model.lora is not None) == bool(adapter)
    train = recipe.train
    assert (train.schedule, train.warmup_ratio, train.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert 0.6 <= train.temperature <= 0.8
    assert 0.9 <= train.top_p <= 0.95
    assert train.use_vllm
    assert all(penalty.coefficient == 1e-4 for penalty in recipe.objective.build().penalties)


def test_the_authors_recipes_hold_the_settings_of_their_scripts() -> None:
    recipes = {name: load_recipe(shipped_recipes()[name]) for name in AUTHORS}
    for task in DATA:
        sampled, exact = recipes[f"{task}/authors_prob_l2"], recipes[f"{task}/authors_prob_l2_exact"]
        assert exact.model_copy(update={"objective": sampled.objective}) == sampled
        assert [r.objective.build().penalties[0].estimator for r in (sampled, exact)] == ["sampled", "exact"]
        assert sampled.train.updates_per_batch == 1
        assert sampled.train.max_completion_length == 256
    gsm8k, mbpp = recipes["gsm8k/authors_prob_l2"], recipes["mbpp/authors_prob_l2"]
    assert gsm8k.model.lora is not None
    assert (gsm8k.model.lora.r, gsm8k.model.lora.alpha, gsm8k.model.lora.dropout) == (64, 64, 0.1)
    train = gsm8k.train
    assert (train.learning_rate, train.group_size, train.batch_size, train.steps) == (1e-5, 4, 8, 1000)
    assert (train.temperature, train.top_p, train.mask_truncated) == (0.6, 0.95, True)
    train = mbpp.train
    assert (mbpp.model.path, mbpp.model.lora) == ("Qwen/Qwen2-0.5B-Instruct", None)
    assert (train.learning_rate, train.group_size, train.batch_size, train.steps) == (1e-5, 32, 128, 1600)
    assert (train.temperature, train.top_p, train.adam_beta2, train.adam_epsilon) == (0.8, 0.9, 0.95, 1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a recipe; each task is read once, and MBPP's sandbox stays warm."""
    from mirrorpo.training.run import train

    built: dict[str, Any] = {}
    builds: dict[str, Callable[..., Any]] = {task: TASKS[task].build for task in DATA}

    def build(task: str) -> Callable[..., Any]:
        return lambda **options: built.setdefault(task, builds[task](**options)) if task not in built else built[task]

    def run_one(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        out = tmp_path_factory.mktemp("run") / "run"
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setitem(TASKS, recipe.task.name, replace_build(recipe.task.name))
            for part in ("write_curve", "write_report"):  # pictures of two steps: tested elsewhere, and slow
                patch.setattr(f"mirrorpo.reports.{part}", lambda folder: folder)
            warnings.simplefilter("ignore", FutureWarning)
            summary = train(recipe, out, resume=False, console=Console(quiet=True), command="test")
        return summary, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def replace_build(task: str) -> Any:
        from dataclasses import replace

        return replace(TASKS[task], build=build(task))

    yield run_one
    if "mbpp" in built:
        built["mbpp"].close()


NUM_ROWS = {"gsm8k": 540, "mbpp": 40}  # the validation part of GSM8K has 500


@pytest.fixture(scope="module")
def short_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a task to a file of its shortest rows: the tiny model reads a prompt byte by byte."""

    @cache
    def written(task: str) -> Path:
        texts = ("question",) if task == "gsm8k" else ("text", "test_list")
        rows = sorted(rows_of(DATA[task]), key=lambda row: sum(len(str(row[text])) for text in texts))
        path = tmp_path_factory.mktemp(task) / DATA[task].name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[: NUM_ROWS[task]]), encoding="utf-8")
        return path

    return written


# Each objective once, on one task with all weights and on the other with an adapter in turn: the rest of the grid
# differs in settings that the tests above compare, and in the size of the model, which is tiny here.
RUN = [
    (f"{task}/{objective}_0.6b{adapter}", task)
    for objective, (task, adapter) in zip(OBJECTIVES, itertools.cycle([("gsm8k", ""), ("mbpp", "_lora")]))
]
RUN += [("gsm8k/authors_prob_l2_exact", "gsm8k"), ("mbpp/authors_prob_l2", "mbpp")]  # the first has an adapter


@pytest.mark.parametrize(("name", "task"), RUN, ids=[name for name, _ in RUN])
def test_a_recipe_runs_two_steps_with_a_tiny_model_on_real_rows(
    name: str, task: str, run: Any, short_rows: Callable[[str], Path]
) -> None:
    recipe = load_recipe(shipped_recipes()[name], [*SMALL, f"task.path={short_rows(task)}"])
    summary, lines = run(recipe)
    assert [line["step"] for line in lines] == [1, 2]
    assert summary["steps"] == 2
    assert summary["objective"] == recipe.objective.preset
    for line in lines:
        assert sum(line[f"answers/{verdict}"] for verdict in ("right", "wrong", "unreadable")) == pytest.approx(1.0)
        assert line["grad_norm"] is not None
    assert sum(summary["reasons_after"].values()) == 1
