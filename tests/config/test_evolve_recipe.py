"""Evolve recipes: what is refused, in one line, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirrorpo.config.search import EvolutionSpec, EvolveRecipe
from mirrorpo.config.shipped import find_recipe
from mirrorpo.config.train import load_recipe, recipe_from
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.errors import InputError


def recipe(*overrides: str) -> EvolveRecipe:
    return recipe_from({"task": {"name": "arithmetic"}}, overrides, "r", EvolveRecipe)


def test_the_defaults_are_those_of_the_paper() -> None:
    spec = EvolutionSpec()
    # GBMPO, as docs/math.md has it: population 10, sigma 0.01 decaying by 0.99, step 0.01, 15 generations
    assert (spec.population, spec.sigma, spec.sigma_decay, spec.step, spec.generations) == (10, 0.01, 0.99, 0.01, 15)


def test_the_shipped_recipe_loads_and_starts_from_its_map() -> None:
    loaded = load_recipe(find_recipe("evolve/embedded"), ["evolution.generations=2"], EvolveRecipe)
    assert loaded.evolution.generations == 2
    assert torch.equal(loaded.start().parameters, MirrorMap.random(0).parameters)


def test_the_start_is_the_objectives_map() -> None:
    assert recipe("objective.divergence={name: neural, like: kl}").start().origin == "like kl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evolution.population=7",
            "evolution: population must be even: members come in antithetic pairs, got 7; legal: 6",
        ),
        ("evolution.population=0", "evolution.population: input should be greater than or equal to 2, got 0"),
        ("evolution.sigma=0", "evolution.sigma: input should be greater than 0, got 0"),
        ("evolution.sigma=.nan", "evolution.sigma: input should be less than or equal to 10, got nan"),
        ("evolution.sigma_decay=1.5", "evolution.sigma_decay: input should be less than or equal to 1, got 1.5"),
        ("evolution.sigma_smallest=0.5", "sigma_smallest must be at most sigma = 0.01, got 0.5"),
        ("evolution.min_improvement=0.1", "min_improvement has no effect without patience"),
        ("evolution.optimiser=adamw", "evolution.optimiser: input should be 'sgd' or 'adam', got 'adamw'"),
        ("evolution.fitness=rank", "evolution.fitness: input should be 'raw' or 'centred_ranks', got 'rank'"),
        (
            "evolution.populaton=8",
            "override 'evolution.populaton': did you mean 'evolution.population'\\? Legal: generations, population",
        ),
        ("evolutoin.sigma=1", "unknown key 'evolutoin'; did you mean 'evolution'. Legal: task, model"),
        ("objective.preset=grpo", "recipe: objective must have one penalty, a neural mirror map .* got reverse_kl"),
        ("objective.preset=dr_grpo", "one penalty, a neural mirror map .* got no penalty"),
        ("objective.divergence={name: neural, parameters: [1, 2]}", "parameters must be 380 numbers, got shape"),
        ("eval.problems=0", "eval.problems must be at least 1: the best map is evaluated on them, got 0"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recipe(override)
    assert "\n" not in str(caught.value)


def test_train_knows_no_evolution_group() -> None:
    with pytest.raises(InputError, match="unknown key 'evolution'"):
        load_recipe(find_recipe("evolve/embedded"))


def test_a_recipe_written_out_loads_again(tmp_path: Path) -> None:
    first = recipe("evolution.patience=3")
    (tmp_path / "r.yaml").write_text(first.to_yaml())
    assert load_recipe(tmp_path / "r.yaml", (), EvolveRecipe) == first
