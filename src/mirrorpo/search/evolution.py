"""The loop of a search, a pure function of its settings and of its members' results.

It draws nothing from the clock or from a global state, so a search is resumed by running it again: members with a
recorded result are not repeated, and the rest follows as it would have.

Which members make the estimate is fixed before any of them is evaluated: the generation's fresh pairs, all of them.
Elites (the best maps so far, evaluated again with the generation's seed) and the acceptance test (the centre before and
after its last step, on a seed of its own) decide what is reported and whether a step is taken back; they never enter
the estimate, which therefore stays unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mirrorpo.config.search import EvolutionSpec
from mirrorpo.errors import RunError
from mirrorpo.search.strategy import (
    Moments,
    ascend,
    directions,
    estimate,
    from_parameters,
    sigma_at,
    to_parameters,
)

# Added to the training seed: members of a generation share a seed, and no purpose shares one with another.
ACCEPTANCE_SEEDS = 1_000_000
FINAL_SEEDS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Member:
    """A map to evaluate.

    Attributes:
        key: its name, such as ``g003/p1+`` (generation 3, pair 1, the plus side).
        parameters: (380,), non-negative.
        seed: of its training and its evaluation, added to the recipe's; the same for all that are compared.
    """

    key: str
    parameters: Tensor
    seed: int


# Members to their results: {"fitness": a number or None, "failed": None or a reason}.
Evaluate = Callable[[Sequence[Member]], dict[str, dict[str, Any]]]


class SearchError(RunError):
    """The search has no direction: no pair is left, or all members are equally fit."""


@dataclass
class Candidate:
    """A map that was evaluated, and what came out each time.

    Attributes:
        key: of its first evaluation.
        parameters: (380,).
        fitness: of each evaluation.
        leads: each fitness less the mean of the pairs of its generation. Generations differ by their seeds more than by
            their maps, so only this can be compared across them.
    """

    key: str
    parameters: Tensor
    fitness: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The mean lead."""
        return math.fsum(self.leads) / len(self.leads)

    @property
    def mean_fitness(self) -> float:
        """The mean over its evaluations."""
        return math.fsum(self.fitness) / len(self.fitness)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Attributes:
        best: the evaluated map with the highest mean lead over its generations' pairs, the earliest of several.
        history: one mapping per generation, as ``history.jsonl`` has it.
        centre: parameters at the centre of the last distribution (not evaluated).
        stopped: why it ended.
    """

    best: Candidate
    history: list[dict[str, Any]]
    centre: Tensor
    stopped: str


def search(
    spec: EvolutionSpec,
    start: Tensor,
    evaluate: Evaluate,
    on_generation: Callable[[list[dict[str, Any]], Candidate | None], None] = lambda history, best: None,
) -> Outcome:
    """Runs a search to its end.

    Args:
        spec: its settings.
        start: (380,), the first centre.
        evaluate: runs members; see ``Evaluate``.
        on_generation: called after each generation, also one that raises, with the history so far and the best map.

    Raises:
        SearchError: see there; ``on_generation`` has seen the generation.

    Example:
        >>> import torch
        >>> spec = EvolutionSpec(generations=2, population=4)
        >>> fit = lambda members: {m.key: {"fitness": -m.parameters.sum().item(), "failed": None} for m in members}
        >>> outcome = search(spec, torch.full((380,), 0.1), fit)
        >>> len(outcome.history), outcome.stopped
        (2, 'all 2 generations are done')
    """
    state = _State(spec, start)
    stopped = f"all {spec.generations} generations are done"
    for generation in range(spec.generations):
        try:
            state.advance(generation, evaluate)
        finally:
            on_generation(state.history, state.best())
        if spec.patience is not None and state.stale >= spec.patience:
            stopped = f"no better mean fitness in {spec.patience} generations"
            break
    best = state.best()
    assert best is not None
    return Outcome(
        best=best, history=state.history, centre=to_parameters(state.centre, spec.positivity), stopped=stopped
    )


class _State:
    """A search between two generations."""

    def __init__(self, spec: EvolutionSpec, start: Tensor) -> None:
        self.spec = spec
        self.centre = from_parameters(start, spec.positivity)
        self.moments = Moments.zero(len(self.centre))
        self.before: tuple[Tensor, Moments] | None = None  # the centre that the last step left
        self.candidates: dict[str, Candidate] = {}
        self.history: list[dict[str, Any]] = []
        self.best_mean, self.stale = -math.inf, 0

    def best(self) -> Candidate | None:
        """The highest mean lead; ``max`` takes the first of several."""
        return max(self.candidates.values(), key=lambda c: c.score, default=None)

    def advance(self, generation: int, evaluate: Evaluate) -> None:
        """One generation: the acceptance test, the pairs and elites, the step."""
        spec = self.spec
        line: dict[str, Any] = {"generation": generation}
        self.history.append(line)
        if spec.acceptance:
            line["acceptance"] = self._accept(generation, evaluate)
        sigma = sigma_at(generation, spec.sigma, spec.sigma_decay, spec.sigma_smallest)
        epsilon = directions(spec.seed, generation, spec.population // 2, len(self.centre))
        points = [(f"p{i}{sign}", self.centre + way * sigma * e) for i, e in enumerate(epsilon) for sign, way in _SIDES]
        members = [self._member(generation, name, point, generation) for name, point in points]
        elites = sorted(self.candidates.values(), key=lambda c: -c.score)[: spec.elites]
        again = [
            Member(key=f"g{generation:03d}/elite{i}", parameters=elite.parameters, seed=generation)
            for i, elite in enumerate(elites)
        ]
        results = evaluate([*members, *again])
        fitness = [results[member.key]["fitness"] for member in members]
        found = estimate(epsilon, fitness[::2], fitness[1::2], sigma, spec.fitness)
        whole = [f for i in range(len(epsilon)) if i not in found.dropped for f in fitness[2 * i : 2 * i + 2]]
        line |= {"sigma": sigma, "seed": generation, "members": _lines(members, results)}
        line["elites"] = [{"of": elite.key, **row} for elite, row in zip(elites, _lines(again, results), strict=True)]
        line |= {"pairs": found.num_pairs, "dropped_pairs": list(found.dropped)}
        self._check(generation, whole, results)
        mean = math.fsum(whole) / len(whole)
        for member in members:
            self._count(member, results[member.key], mean)
        for elite, member in zip(elites, again, strict=True):
            self._count(member, results[member.key], mean, elite.key)
        self.before = (self.centre, self.moments)
        moved, self.moments = ascend(self.centre, found.gradient, spec.step, spec.optimiser, self.moments)
        self.centre = to_parameters(moved, "projection") if spec.positivity == "projection" else moved
        best = self.best()
        assert best is not None
        line |= {
            "mean_fitness": mean,
            "highest_fitness": max(whole),
            "gradient_norm": found.gradient.norm().item(),
            "step_norm": (self.centre - self.before[0]).norm().item(),
            "best": {
                "key": best.key,
                "fitness": best.mean_fitness,
                "lead": best.score,
                "evaluations": len(best.fitness),
            },
        }
        improved = mean > self.best_mean + (spec.min_improvement if self.history[1:] else 0.0)
        self.best_mean, self.stale = (mean, 0) if improved else (self.best_mean, self.stale + 1)

    def _member(self, generation: int, name: str, point: Tensor, seed: int) -> Member:
        return Member(key=f"g{generation:03d}/{name}", parameters=to_parameters(point, self.spec.positivity), seed=seed)

    def _accept(self, generation: int, evaluate: Evaluate) -> dict[str, Any] | None:
        """Compares the centre with the one before its last step, and goes back if that one is better."""
        if self.before is None:
            return None
        # Not the pairs' seed: else the estimate would be made on problems chosen for liking this centre.
        seed = ACCEPTANCE_SEEDS + generation
        new = self._member(generation, "centre", self.centre, seed)
        old = self._member(generation, "previous", self.before[0], seed)
        results = evaluate([new, old])
        fitness = {m.key: results[m.key]["fitness"] for m in (new, old)}
        ours, theirs = fitness[new.key], fitness[old.key]
        accepted = ours is not None and (theirs is None or ours >= theirs)
        if not accepted:
            self.centre, self.moments = self.before
            self.before = None  # nothing to go back to: the next step leaves from here
        return {"seed": seed, "centre": ours, "previous": theirs, "accepted": accepted}

    def _count(self, member: Member, result: dict[str, Any], mean: float, key: str | None = None) -> None:
        if result["fitness"] is not None:
            name = member.key if key is None else key
            candidate = self.candidates.setdefault(name, Candidate(name, member.parameters))
            candidate.fitness.append(result["fitness"])
            candidate.leads.append(result["fitness"] - mean)

    def _check(self, generation: int, whole: list[float], results: dict[str, dict[str, Any]]) -> None:
        if not whole:
            reasons = sorted({str(r["failed"]) for r in results.values() if r["failed"] is not None})
            raise SearchError(
                f"generation {generation}: no pair is left, every one has a failed member ({'; '.join(reasons)[:300]})"
            )
        if min(whole) == max(whole):
            raise SearchError(
                f"generation {generation}: all {len(whole)} members have the same fitness {whole[0]:.6g}, which gives "
                "no direction: raise evolution.sigma, evolution.validation_problems, objective.coefficient or "
                "train.steps"
            )


_SIDES = (("+", 1.0), ("-", -1.0))


def _lines(members: Sequence[Member], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"key": m.key, "fitness": results[m.key]["fitness"], "failed": results[m.key]["failed"]} for m in members]


__all__ = ["ACCEPTANCE_SEEDS", "FINAL_SEEDS", "Candidate", "Member", "Outcome", "SearchError", "search"]
