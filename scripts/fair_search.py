"""Find out whether a searched divergence beats a random one where it can: a bandit with known optima, equal budgets.

The task. A problem is 32 states with five arms. Each arm has a true reward, and training sees it with noise that is
larger for arms that the reference rarely draws (they were tried less often). Training with the penalty as `score` ends
at `mirrorpo.optimum` of the noisy rewards (docs/fixed_points.md), so no training is simulated: its end is computed. The
fitness of a divergence is the true reward there. Penalties that bind rare arms differ from those that bind common ones
just here, so a search has something to find.

What is searched, coefficient included, in log coordinates:

- mixtures of three named generators, h = a KL + b ProbL2 + c Itakura-Saito (a, b, c > 0);
- neural mirror maps: 380 parameters and a coefficient.

Each method may spend BUDGET evaluations on validation problems (common to all: the same random numbers); its best is
measured on test problems that no method saw:

- random, random map: weights log-uniform in the box; `MirrorMap.random`, coefficient log-uniform in its box;
- evolved, evolved map: the antithetic evolution strategy of `mirrorpo evolve`, from the middle of the box, or from a
  random map with the coefficient in the middle of its box;
- learned: gradient ascent by central differences of validation fitness (six evaluations a step);
- learned exactly, learned map: gradient ascent by the hypergradient of the whole training, which is implicit
  differentiation of the optimum here, with `mirrorpo.search.learning.hypergradient`; an evaluation and its gradient
  count as two evaluations;
- best of beta: a grid over beta in [-1, 3] and the coefficient;
- best KL: the coefficient alone, as many values as the budget allows.

A repetition draws new reference policies, rewards and noise. The result is the mean paired difference of each method to
random, to the random map and to best KL over REPETITIONS repetitions, with its 95 % interval (studentised bootstrap).

Registered before its first run: this text, BUDGET, REPETITIONS, SEED, NOISES and the boxes. The first noise is that of
an earlier search without maps (commit 9d532d6), where no penalty at all did as well as any; the second was chosen on
problems of other seeds so that the best KL beats both the reference and no penalty there. Runtime: a few minutes on one
core.

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
from mirrorpo.divergences.neural.map import NUM_PARAMETERS, MirrorMap
from mirrorpo.divergences.slope import score, score_and_slope
from mirrorpo.search.learning import Tokens, Variable, hypergradient
from mirrorpo.search.strategy import directions, estimate
from mirrorpo.statistics import mean_interval

BUDGET, REPETITIONS, SEED = 60, 16, 0
STATES, ARMS = 32, 5
# The noise of an arm with reference probability q is NOISE / sqrt(q): NOISE^2 over the times it was tried.
NOISES = (0.25, 0.5)
LOW, HIGH = math.log(1e-3), math.log(10.0)  # of each log weight
# Of the log coefficient of a map: p h''(p) of a random one is 0.06 at p = 1 and 0.005 at 0.01, that of KL 1.
MAP_LOW, MAP_HIGH = math.log(1e-3 / 0.06), math.log(10.0 / 0.005)
GENERATORS = (kl, prob_l2, itakura_saito)
PAIRS, SIGMA, RATE = 3, 0.5, 1.0
# h' is inverted on a grid of log-probabilities: right to 1e-5, which a test compares with mirrorpo.optimum.
GRID = torch.linspace(-60.0, 0.0, 12_001, dtype=torch.float64)
HALVINGS = 48


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


def mapped(logs: Tensor) -> tuple[mirrorpo.Divergence, float]:
    """The neural divergence with these log parameters, and the coefficient."""
    return MirrorMap(logs[:-1].exp()).divergence(), logs[-1].exp().item()


def policy(d: mirrorpo.Divergence, q: Tensor, rewards: Tensor) -> Tensor:
    """``mirrorpo.optimum(d, q, rewards, 1.0)`` of a Bregman divergence, about as exact as the grid and much faster."""
    heights = score(d, GRID, torch.zeros_like(GRID))  # h'(x) - h'(1)
    heights = heights.cummax(0).values  # rounding
    at_q = _interpolated(q.log(), GRID, heights)

    def entries(shift: Tensor) -> Tensor:
        wanted = at_q + rewards - shift
        logs = _interpolated(wanted, heights, GRID)
        return logs.exp().masked_fill(wanted < heights[0], 0.0)

    # at the smallest reward no entry is below q, at the largest none above
    low, high = rewards.amin(-1, keepdim=True), rewards.amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        above = entries(middle).sum(-1, keepdim=True) > 1.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = entries(high)
    return p / p.sum(-1, keepdim=True)


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The piecewise linear function through (x, y), constant outside."""
    index = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    left, right = x[index - 1], x[index]
    share = ((at - left) / (right - left).clamp(min=1e-300)).clamp(0.0, 1.0)
    return y[index - 1] + share * (y[index] - y[index - 1])


class Problem:
    """States with their reference, what training sees, and what is true."""

    def __init__(self, seed: int, level: float) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = (1.5 * torch.randn(STATES, ARMS, generator=g, dtype=torch.float64)).softmax(-1)
        self.true = torch.rand(STATES, ARMS, generator=g, dtype=torch.float64)
        noise = level * torch.randn(STATES, ARMS, generator=g, dtype=torch.float64)
        self.seen = self.true + noise / self.q.sqrt()

    def fitness(self, d: mirrorpo.Divergence, coefficient: float = 1.0) -> float:
        """The true reward of the policy at which training ends."""
        return self.at(d, [coefficient])[0]

    def at(self, d: mirrorpo.Divergence, coefficients: Sequence[float]) -> list[float]:
        """The same for several coefficients at once: only rewards over coefficient count."""
        scale = torch.tensor(coefficients, dtype=torch.float64).view(-1, 1, 1)
        rewards = self.seen / scale
        return (policy(d, self.q.expand_as(rewards), rewards) * self.true).sum(-1).mean(-1).tolist()

    def arms(self, d: mirrorpo.Divergence, coefficient: float) -> tuple[float, Tokens]:
        r"""Fitness, and every arm with the kappa of the whole training.

        At its end :math:`c\, g(p_v, q_v) = r_v - \lambda`. A change of g by :math:`\delta_v` moves p by
        :math:`-(\delta_v + d\lambda / c) / g'_v`, which sums to 0, and the true reward t by
        :math:`-\sum_v \delta_v (t_v - \bar t) / g'_v`, with :math:`\bar t` the mean of t under the weights 1 / g'.
        """
        p = policy(d, self.q, self.seen / coefficient)
        lives = p > 1e-12
        logp, logq = p.clamp(min=1e-12).log(), self.q.log()
        give = torch.where(lives, p / score_and_slope(d, logp, logq)[1], 0.0)  # 1 / g'
        mean = (give * self.true).sum(-1, keepdim=True) / give.sum(-1, keepdim=True)
        kappa = (give * (self.true - mean)).flatten() / STATES
        ones = torch.ones_like(kappa)
        found = Tokens(logp=logp.flatten(), logp_ref=logq.flatten(), weight=ones, kappa=kappa, ids=ones.long())
        return (p * self.true).sum(-1).mean().item(), found


Evaluate = Callable[[Tensor], float]
Differentiate = Callable[[Tensor], tuple[float, Tensor]]


def mixture_slope(problem: Problem, logs: Tensor) -> tuple[float, Tensor]:
    """Fitness and its gradient in the log weights."""
    fitness, arms = problem.arms(mixture(logs), 1.0)
    slopes = []
    for i, log_weight in enumerate(logs.tolist()):
        alone = torch.full_like(logs, -torch.inf)
        alone[i] = log_weight
        slopes.append(-arms.leash(mixture(alone), 1.0).sum())
    return fitness, torch.stack(slopes)


def map_slope(problem: Problem, logs: Tensor) -> tuple[float, Tensor]:
    """Fitness and its gradient in the log parameters and the log coefficient."""
    d, coefficient = mapped(logs)
    fitness, arms = problem.arms(d, coefficient)
    variable = Variable(what="map", values=logs[:-1].exp())
    slope = hypergradient(variable, d, 1.0, arms) * variable.values
    along = hypergradient(Variable(what="coefficient", values=logs[-1:].exp()), d, 1.0, arms)
    return fitness, torch.cat([slope, along])


def best_draw(points: Sequence[Tensor], evaluate: Evaluate) -> Tensor:
    """The best of BUDGET draws."""
    return max(points, key=evaluate)


def random_mixtures(seed: int) -> list[Tensor]:
    """Log weights, uniform in the box."""
    g = torch.Generator().manual_seed(seed)
    return list(LOW + (HIGH - LOW) * torch.rand(BUDGET, len(GENERATORS), generator=g, dtype=torch.float64))


def random_maps(seed: int) -> list[Tensor]:
    """Log parameters of random maps with log coefficients uniform in their box."""
    g = torch.Generator().manual_seed(seed)
    logs = MAP_LOW + (MAP_HIGH - MAP_LOW) * torch.rand(BUDGET, 1, generator=g, dtype=torch.float64)
    return [torch.cat([start_map(seed * BUDGET + i)[:-1], log]) for i, log in enumerate(logs)]


def start_map(seed: int) -> Tensor:
    """A random map with the coefficient in the middle of its box."""
    parameters = MirrorMap.random(seed).parameters.clamp(min=1e-6).log()
    return torch.cat([parameters, torch.tensor([0.5 * (MAP_LOW + MAP_HIGH)], dtype=torch.float64)])


def start_mixture() -> Tensor:
    """The middle of the box."""
    return torch.full((len(GENERATORS),), 0.5 * (LOW + HIGH), dtype=torch.float64)


def inside(logs: Tensor) -> Tensor:
    """A point moved into its box: every weight's, or a map's coefficient and parameters up to 1."""
    if len(logs) == len(GENERATORS):
        return logs.clamp(LOW, HIGH)
    return torch.cat([logs[:NUM_PARAMETERS].clamp(-14.0, 0.0), logs[NUM_PARAMETERS:].clamp(MAP_LOW, MAP_HIGH)])


def evolved(evaluate: Evaluate, seed: int, start: Tensor) -> Tensor:
    """The best that was evaluated by an evolution strategy with steps about as long as its perturbations."""
    centre, found = start, []
    length = RATE * math.sqrt(len(start) / len(GENERATORS))
    for generation in range(BUDGET // (2 * PAIRS)):
        epsilon = directions(seed, generation, PAIRS, len(centre))
        plus, minus = ([inside(centre + way * SIGMA * e) for e in epsilon] for way in (1.0, -1.0))
        up, down = ([evaluate(point) for point in points] for points in (plus, minus))
        found += zip([*up, *down], [*plus, *minus], strict=True)
        slope = estimate(epsilon, up, down, SIGMA, "raw").gradient
        centre = inside(centre + length * slope / slope.norm().clamp(min=1e-12))
    return max(found, key=lambda pair: pair[0])[1]


def differences(evaluate: Evaluate, found: list[tuple[float, Tensor]], at: Tensor) -> Tensor:
    """The gradient by central differences; remembers what was evaluated."""
    slope = torch.zeros_like(at)
    for i in range(len(at)):
        for way in (1.0, -1.0):
            point = at.clone()
            point[i] += way * 0.1
            fitness = evaluate(point)
            found.append((fitness, point))
            slope[i] += way * fitness / 0.2
    return slope


def learned(evaluate: Evaluate) -> Tensor:
    """Ascent along central differences, in steps that shrink; the best that was evaluated."""
    at, found = start_mixture(), list[tuple[float, Tensor]]()
    for step in range(BUDGET // (2 * len(at))):
        slope = differences(evaluate, found, at)
        at = inside(at + 2.0 * RATE * 0.8**step * slope / slope.norm().clamp(min=1e-12))
    return max(found, key=lambda pair: pair[0])[1]


def learned_exactly(differentiate: Differentiate, start: Tensor) -> Tensor:
    """Ascent along the hypergradient of the whole training, in steps that shrink; the best that was evaluated."""
    at, found = start, []
    for step in range(BUDGET // 2):
        fitness, slope = differentiate(at)
        found.append((fitness, at))
        at = inside(at + 2.0 * RATE * 0.9**step * slope / slope.norm().clamp(min=1e-12))
    return max(found, key=lambda pair: pair[0])[1]


def best_of(divergences: Sequence[mirrorpo.Divergence], problem: Problem) -> tuple[mirrorpo.Divergence, float]:
    """The best of a grid of BUDGET divergences and coefficients."""
    logs = torch.linspace(LOW, HIGH, BUDGET // len(divergences), dtype=torch.float64)
    grid = logs.exp().tolist()
    found = [(f, d, c) for d in divergences for f, c in zip(problem.at(d, grid), grid, strict=True)]
    return max(found, key=lambda one: one[0])[1:]


def repetition(number: int, level: float) -> dict[str, float]:
    """Test fitness of each method's best."""
    seed = SEED + number
    validation, test = Problem(SEED + 2 * number, level), Problem(SEED + 2 * number + 1, level)

    def of_mixture(logs: Tensor) -> float:
        return validation.fitness(mixture(logs))

    def of_map(logs: Tensor) -> float:
        return validation.fitness(*mapped(logs))

    mixtures = {
        "random": best_draw(random_mixtures(seed), of_mixture),
        "evolved": evolved(of_mixture, seed, start_mixture()),
        "learned": learned(of_mixture),
        "learned exactly": learned_exactly(partial(mixture_slope, validation), start_mixture()),
    }
    maps = {
        "random map": best_draw(random_maps(seed), of_map),
        "evolved map": evolved(of_map, seed, start_map(seed)),
        "learned map": learned_exactly(partial(map_slope, validation), start_map(seed)),
    }
    betas = [mirrorpo.divergence("beta", beta=beta) for beta in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0)]
    return {
        **{name: test.fitness(mixture(logs)) for name, logs in mixtures.items()},
        **{name: test.fitness(*mapped(logs)) for name, logs in maps.items()},
        "best of beta": test.fitness(*best_of(betas, validation)),
        "best KL": test.fitness(*best_of([mirrorpo.divergence("kl")], validation)),
        "reference": (test.q * test.true).sum(-1).mean().item(),
        "no penalty": test.true.gather(-1, test.seen.argmax(-1, keepdim=True)).mean().item(),
    }


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means, and paired differences with their intervals."""
    methods: dict[str, Any] = {}
    for name in rows[0]:
        methods[name] = {"reward": math.fsum(row[name] for row in rows) / len(rows)}
        for other in ("random", "random map", "best KL"):
            if name != other and len(rows) > 1:
                found = mean_interval([row[name] - row[other] for row in rows])
                methods[name][f"minus {other}"] = [found.estimate, found.low, found.high]
    return {"methods": methods, "rows": list(rows)}


def table(found: dict[str, Any]) -> str:
    """The Markdown of one noise."""
    others = ("random", "random map", "best KL")
    lines = [
        f"| method | true reward | {' | '.join(f'minus {other}' for other in others)} |",
        "| --- |" + " ---: |" * 4,
    ]
    for name, line in found["methods"].items():
        cells = [line.get(f"minus {other}") for other in others]
        texts = ["" if cell is None else f"{cell[0]:+.3f} [{cell[1]:+.3f}, {cell[2]:+.3f}]" for cell in cells]
        lines.append(f"| {name} | {line['reward']:.3f} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it, writes the numbers and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=root / "docs" / "results" / "evolve" / "fair_search.json")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    given = parser.parse_args(arguments)
    started = time.process_time()
    settings = {"budget": BUDGET, "repetitions": given.repetitions, "seed": SEED, "states": STATES}
    noises = {f"{level:g}": summary([repetition(i, level) for i in range(given.repetitions)]) for level in NOISES}
    found = {**settings, "cpu_seconds": round(time.process_time() - started, 1), "noises": noises}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for level, part in noises.items():
        print(f"noise {level}\n{table(part)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
