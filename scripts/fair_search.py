"""Find out whether a searched divergence beats a random one where it can: a bandit with known optima, equal budgets.

The task. A problem is 32 states with five arms. Each arm has a true reward, and training sees it with noise that is
larger for arms that the reference rarely draws (they were tried less often). Training with the penalty as `score` ends
at `mirrorpo.optimum` of the noisy rewards (docs/fixed_points.md), so no training is simulated: its end is computed. The
fitness of a divergence is the true reward there. Penalties that bind rare arms differ from those that bind common ones
just here, so a search has something to find.

What is searched: mixtures of three named generators, h = a KL + b ProbL2 + c Itakura-Saito (a, b, c > 0, coefficient
included), in log weights. Each method may evaluate BUDGET divergences on validation problems (the same for all, common
random numbers), and its best is measured on test problems that no method saw:

- random: weights log-uniform in the box;
- evolved: the antithetic evolution strategy of `mirrorpo evolve`, from the middle of the box;
- learned: gradient ascent in the log weights by central differences of validation fitness (six evaluations a step): the
  hypergradient of the whole training, which this task allows, not of one step;
- best of beta: a grid over beta in [-1, 3] and the coefficient;
- best KL: the coefficient alone, as many values as the budget allows.

A repetition draws new reference policies, rewards and noise. The result is the mean paired difference of each method to
random over REPETITIONS repetitions, with its 95 % interval (studentised bootstrap), and the same to best KL.

Registered before its first run: this text, BUDGET, REPETITIONS, SEED and the box. Runtime: a few minutes on one core.

Usage: python scripts/fair_search.py [--out docs/results/evolve/fair_search.json] [--repetitions N]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mirrorpo
from mirrorpo.divergences.base import Term
from mirrorpo.divergences.bregman import BregmanDivergence, itakura_saito, kl, prob_l2
from mirrorpo.search.strategy import directions, estimate
from mirrorpo.statistics import mean_interval

BUDGET, REPETITIONS, SEED = 60, 10, 0
STATES, ARMS = 32, 5
# The noise of an arm with reference probability q is NOISE / sqrt(q): NOISE^2 over the times it was tried.
NOISE = 0.25
LOW, HIGH = math.log(1e-3), math.log(10.0)  # of each log weight
GENERATORS = (kl, prob_l2, itakura_saito)
PAIRS, SIGMA, RATE = 3, 0.5, 1.0


def mixed(weights: Sequence[float], logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
    """The coordinate term of a mixture."""
    value, slope = torch.zeros_like(delta), torch.zeros_like(delta)
    for weight, generator in zip(weights, GENERATORS, strict=True):
        one, its_slope = generator(logx, logz, delta)
        value, slope = value + weight * one, slope + weight * its_slope
    return value, slope


def mixture(logs: Tensor) -> mirrorpo.Divergence:
    """The Bregman divergence with these log weights."""
    coordinate = partial(mixed, logs.exp().tolist())
    return BregmanDivergence("mixture", coordinate=coordinate, max_log_ratio=80.0, growth_known=True)


class Problem:
    """States with their reference, what training sees, and what is true."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = (1.5 * torch.randn(STATES, ARMS, generator=g, dtype=torch.float64)).softmax(-1)
        self.true = torch.rand(STATES, ARMS, generator=g, dtype=torch.float64)
        noise = NOISE * torch.randn(STATES, ARMS, generator=g, dtype=torch.float64)
        self.seen = self.true + noise / self.q.sqrt()

    def fitness(self, d: mirrorpo.Divergence, coefficient: float = 1.0) -> float:
        """The true reward of the policy at which training ends."""
        return self.at(d, [coefficient])[0]

    def at(self, d: mirrorpo.Divergence, coefficients: Sequence[float]) -> list[float]:
        """The same for several coefficients at once: only rewards over coefficient count."""
        scale = torch.tensor(coefficients, dtype=torch.float64).view(-1, 1, 1)
        p = mirrorpo.optimum(d, self.q, self.seen / scale, 1.0)
        return (p * self.true).sum(-1).mean(-1).tolist()


Evaluate = Callable[[Tensor], float]


def random_search(evaluate: Evaluate, seed: int) -> Tensor:
    """The best of BUDGET draws."""
    g = torch.Generator().manual_seed(seed)
    points = LOW + (HIGH - LOW) * torch.rand(BUDGET, len(GENERATORS), generator=g, dtype=torch.float64)
    return max(points, key=evaluate)


def evolved(evaluate: Evaluate, seed: int) -> Tensor:
    """The best that was evaluated by an evolution strategy with steps of fixed length."""
    centre = torch.full((len(GENERATORS),), (LOW + HIGH) / 2, dtype=torch.float64)
    found: list[tuple[float, Tensor]] = []
    for generation in range(BUDGET // (2 * PAIRS)):
        epsilon = directions(seed, generation, PAIRS, len(centre))
        plus, minus = ([(centre + way * SIGMA * e).clamp(LOW, HIGH) for e in epsilon] for way in (1.0, -1.0))
        up, down = ([evaluate(point) for point in points] for points in (plus, minus))
        found += zip([*up, *down], [*plus, *minus], strict=True)
        slope = estimate(epsilon, up, down, SIGMA, "raw").gradient
        centre = (centre + RATE * slope / slope.norm().clamp(min=1e-12)).clamp(LOW, HIGH)
    return max(found, key=lambda pair: pair[0])[1]


def learned(evaluate: Evaluate, seed: int) -> Tensor:
    """Ascent along central differences, in steps that shrink; the best that was evaluated."""
    at = torch.full((len(GENERATORS),), (LOW + HIGH) / 2, dtype=torch.float64)
    found: list[tuple[float, Tensor]] = []
    steps = BUDGET // (2 * len(at))
    for step in range(steps):
        slope = torch.zeros_like(at)
        for i in range(len(at)):
            for way in (1.0, -1.0):
                point = at.clone()
                point[i] += way * 0.1
                fitness = evaluate(point)
                found.append((fitness, point))
                slope[i] += way * fitness / 0.2
        at = (at + 2.0 * RATE * 0.8**step * slope / slope.norm().clamp(min=1e-12)).clamp(LOW, HIGH)
    return max(found, key=lambda pair: pair[0])[1]


def best_of(divergences: Sequence[mirrorpo.Divergence], problem: Problem) -> tuple[mirrorpo.Divergence, float]:
    """The best of a grid of BUDGET divergences and coefficients."""
    logs = torch.linspace(LOW, HIGH, BUDGET // len(divergences), dtype=torch.float64)
    grid = logs.exp().tolist()
    found = [(f, d, c) for d in divergences for f, c in zip(problem.at(d, grid), grid, strict=True)]
    return max(found, key=lambda one: one[0])[1:]


def repetition(number: int) -> dict[str, float]:
    """Test fitness of each method's best."""
    validation, test = Problem(SEED + 2 * number), Problem(SEED + 2 * number + 1)

    def evaluate(logs: Tensor) -> float:
        return validation.fitness(mixture(logs))

    betas = [mirrorpo.divergence("beta", beta=beta) for beta in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0)]
    return {
        "random": test.fitness(mixture(random_search(evaluate, SEED + number))),
        "evolved": test.fitness(mixture(evolved(evaluate, SEED + number))),
        "learned": test.fitness(mixture(learned(evaluate, SEED + number))),
        "best of beta": test.fitness(*best_of(betas, validation)),
        "best KL": test.fitness(*best_of([mirrorpo.divergence("kl")], validation)),
        "reference": (test.q * test.true).sum(-1).mean().item(),
        "no penalty": test.true.gather(-1, test.seen.argmax(-1, keepdim=True)).mean().item(),
    }


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means, and paired differences to random and to the best KL with their intervals."""
    out: dict[str, Any] = {"budget": BUDGET, "repetitions": len(rows), "seed": SEED, "noise": NOISE, "methods": {}}
    for name in rows[0]:
        out["methods"][name] = {"reward": math.fsum(row[name] for row in rows) / len(rows)}
        for other in ("random", "best KL"):
            if name != other and len(rows) > 1:
                found = mean_interval([row[name] - row[other] for row in rows])
                out["methods"][name][f"minus {other}"] = [found.estimate, found.low, found.high]
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it and writes the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=root / "docs" / "results" / "evolve" / "fair_search.json")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    given = parser.parse_args(arguments)
    started = time.process_time()
    rows = [repetition(number) for number in range(given.repetitions)]
    found = {**summary(rows), "cpu_seconds": round(time.process_time() - started, 1), "rows": rows}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, line in found["methods"].items():
        print(
            name,
            {key: value if isinstance(value, float) else [round(x, 4) for x in value] for key, value in line.items()},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
