"""The search loop, on functions whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mirrorpo.config.search import EvolutionSpec
from mirrorpo.search.evolution import ACCEPTANCE_SEEDS, Candidate, Member, SearchError, search
from mirrorpo.search.strategy import Moments, ascend, directions, estimate, project

START = torch.full((380,), 0.05, dtype=torch.float64)
TARGET = torch.full((380,), 0.03, dtype=torch.float64)


def near_target(member: Member) -> float | None:
    return -(member.parameters - TARGET).square().sum().item()


class Evaluator:
    """Evaluates members by a function, and remembers them."""

    def __init__(self, function: Callable[[Member], float | None]) -> None:
        self.function, self.seen = function, dict[str, Member]()

    def __call__(self, members: Sequence[Member]) -> dict[str, dict[str, Any]]:
        results = {}
        for member in members:
            assert member.key not in self.seen
            self.seen[member.key] = member
            fitness = self.function(member)
            results[member.key] = {"fitness": fitness, "failed": "it blew up" if fitness is None else None}
        return results


def spec(**changes: Any) -> EvolutionSpec:
    return EvolutionSpec(**{"generations": 5, "population": 6, **changes})


def test_one_generation_is_the_estimate_and_a_step() -> None:
    evaluator = Evaluator(near_target)
    outcome = search(spec(generations=1, step=0.5), START, evaluator)
    epsilon = directions(0, 0, 3)
    plus, minus = ([near_target(evaluator.seen[f"g000/p{i}{sign}"]) for i in range(3)] for sign in "+-")
    for i in range(3):
        torch.testing.assert_close(evaluator.seen[f"g000/p{i}-"].parameters, project(START - 0.01 * epsilon[i]))
    want, _ = ascend(START, estimate(epsilon, plus, minus, 0.01, "raw").gradient, 0.5, "sgd", Moments.zero(380))
    torch.testing.assert_close(outcome.centre, project(want))


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("fitness", ["raw", "centred_ranks"])
@pytest.mark.parametrize("positivity", ["projection", "softplus"])
def test_the_search_climbs(optimiser: str, fitness: str, positivity: str) -> None:
    step = {"adam": 0.001, "sgd": 0.02 if fitness == "raw" else 1e-4}[optimiser]
    outcome = search(
        spec(generations=60, population=20, step=step, optimiser=optimiser, fitness=fitness, positivity=positivity),
        START,
        Evaluator(near_target),
    )
    first, last = (outcome.history[i]["mean_fitness"] for i in (0, -1))
    assert last > 0.6 * first  # both negative: at least 40 % of the way (in squares) to the target
    assert (outcome.centre >= 0).all()


def test_every_member_is_a_map_even_at_the_border() -> None:
    evaluator = Evaluator(near_target)
    search(spec(sigma=0.5), torch.zeros(380, dtype=torch.float64) + 1e-4, evaluator)
    assert all((m.parameters >= 0).all() for m in evaluator.seen.values())


def test_members_of_a_generation_share_a_seed_and_generations_do_not() -> None:
    evaluator = Evaluator(near_target)
    search(spec(elites=2), START, evaluator)
    seeds = {generation: set() for generation in range(5)}
    for key, member in evaluator.seen.items():
        seeds[int(key[1:4])].add(member.seed)
    assert [len(found) for found in seeds.values()] == [1] * 5
    assert len(set.union(*seeds.values())) == 5


def test_the_best_map_is_one_that_was_evaluated() -> None:
    evaluator = Evaluator(near_target)
    outcome = search(spec(), START, evaluator)
    leads = {}
    for generation in range(5):
        of = {k: near_target(m) or -math.inf for k, m in evaluator.seen.items() if k.startswith(f"g00{generation}")}
        leads |= {key: fitness - sum(of.values()) / 6 for key, fitness in of.items()}
    best = evaluator.seen[max(leads, key=lambda key: leads[key])]
    assert outcome.best.key == best.key
    assert torch.equal(outcome.best.parameters, best.parameters)
    assert outcome.best.fitness == [near_target(best)]
    assert outcome.best.score == pytest.approx(leads[best.key], rel=1e-9)


def test_a_generation_with_easy_problems_makes_no_best_map() -> None:
    """Generation 2 finds everything 10 easier; its members are no better for that."""

    def easy(member: Member) -> float:
        return (near_target(member) or 0.0) + (10.0 if member.seed == 2 else 0.0)

    one, other = (search(spec(), START, Evaluator(f)).best for f in (near_target, easy))
    assert one.key == other.key


def test_elites_are_evaluated_again_and_their_luck_averages_out() -> None:
    """One member is lucky once; evaluated again it is ordinary, and another map is the best in the end."""

    def lucky(member: Member) -> float:
        luck = 10.0 if member.key == "g000/p1+" else 0.0
        return (near_target(member) or 0.0) + luck - (11.0 if member.key == "g001/elite0" else 0.0)

    without, with_elites = Evaluator(lucky), Evaluator(lucky)
    # short steps: luck of this size would throw the centre far away
    assert search(spec(step=1e-6), START, without).best.key == "g000/p1+"
    outcome = search(spec(step=1e-6, elites=1), START, with_elites)
    assert torch.equal(with_elites.seen["g001/elite0"].parameters, with_elites.seen["g000/p1+"].parameters)
    assert outcome.history[1]["elites"][0]["of"] == "g000/p1+"
    assert outcome.best.key != "g000/p1+"


def test_elites_do_not_move_the_search() -> None:
    one, other = (search(spec(elites=elites), START, Evaluator(near_target)) for elites in (0, 3))
    assert torch.equal(one.centre, other.centre)
    assert [line["mean_fitness"] for line in one.history] == [line["mean_fitness"] for line in other.history]


def test_a_step_that_is_worse_is_taken_back_on_seeds_of_its_own() -> None:
    """The first step is far too long: the centre it leads to is worse, and the next pairs surround the start again."""
    evaluator = Evaluator(near_target)
    outcome = search(spec(acceptance=True, step=30.0), START, evaluator)
    assert outcome.history[0]["acceptance"] is None
    assert outcome.history[1]["acceptance"]["accepted"] is False
    assert outcome.history[1]["acceptance"]["seed"] == ACCEPTANCE_SEEDS + 1
    sigma = 0.01 * 0.99
    around = (evaluator.seen["g001/p0+"].parameters + evaluator.seen["g001/p0-"].parameters) / 2
    torch.testing.assert_close(around, START, rtol=1e-12, atol=sigma * 1e-12)


def test_a_good_step_is_kept() -> None:
    outcome = search(spec(acceptance=True, step=0.02, population=40), START, Evaluator(near_target))
    assert all(line["acceptance"]["accepted"] for line in outcome.history[1:])


def test_the_search_stops_when_the_mean_no_longer_rises() -> None:
    falling = Evaluator(lambda m: -float(m.key[1:4]) + 1e-6 * (near_target(m) or 0.0))
    outcome = search(spec(generations=50, patience=3), START, falling)
    # generation 0 is the best; 1, 2 and 3 are worse
    assert len(outcome.history) == 4
    assert outcome.stopped == "no better mean fitness in 3 generations"
    rising = Evaluator(lambda m: float(m.key[1:4]) + 1e-6 * (near_target(m) or 0.0))
    assert len(search(spec(generations=12, patience=3), START, rising).history) == 12
    slowly = Evaluator(rising.function)
    assert len(search(spec(generations=12, patience=3, min_improvement=0.0), START, slowly).history) == 12


def test_an_improvement_below_the_smallest_does_not_count() -> None:
    slow = Evaluator(lambda m: 0.01 * float(m.key[1:4]) + 1e-6 * (near_target(m) or 0.0))
    outcome = search(spec(generations=50, patience=2, min_improvement=0.5), START, slow)
    # no generation is 0.5 above the first: 0 counts, 1 and 2 do not
    assert len(outcome.history) == 3


def test_a_failed_member_and_its_twin_are_left_out_and_named() -> None:
    evaluator = Evaluator(lambda m: None if m.key == "g001/p2-" else near_target(m))
    line = search(spec(generations=2), START, evaluator).history[1]
    assert (line["pairs"], line["dropped_pairs"]) == (2, [2])
    assert [row for row in line["members"] if row["failed"]] == [
        {"key": "g001/p2-", "fitness": None, "failed": "it blew up"}
    ]
    kept = [row["fitness"] for row in line["members"] if "p2" not in row["key"]]
    assert line["mean_fitness"] == pytest.approx(sum(kept) / 4, rel=1e-12)


def test_a_generation_without_a_whole_pair_ends_the_search_and_keeps_its_history() -> None:
    seen: list[int] = []
    evaluator = Evaluator(lambda m: None if m.key.startswith("g002") and m.key[-1] == "+" else near_target(m))
    with pytest.raises(SearchError, match=r"generation 2: no pair is left, .* \(it blew up\)"):
        search(spec(), START, evaluator, lambda history, best: seen.append(len(history)))
    assert seen == [1, 2, 3]


def test_a_constant_fitness_ends_the_search_with_a_reason() -> None:
    with pytest.raises(SearchError, match=r"generation 0: all 6 members have the same fitness 0.25, which gives no"):
        search(spec(), START, Evaluator(lambda m: 0.25))


def test_history_is_json_and_the_same_every_time() -> None:
    one, other = (search(spec(elites=1, acceptance=True), START, Evaluator(near_target)).history for _ in range(2))
    assert json.dumps(one, allow_nan=False) == json.dumps(other)


def test_a_candidates_score_is_its_mean_lead() -> None:
    candidate = Candidate("a", START, [0.5, 0.25, 0.0], [0.25, 0.0, -0.25])
    assert (candidate.mean_fitness, candidate.score) == (0.25, 0.0)
