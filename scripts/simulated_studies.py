"""Simulated studies: how often intervals cover the truth and how often a difference is claimed that is not there.

    python scripts/simulated_studies.py [--studies 2000]     # the table of docs/studies.md

Every study has ten seeds. Accuracies are counted on 400 problems, and vary between trainings by 2 points.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from mirrorpo.statistics import SHARE, binomial_noise, equivalent, holm, mean_interval, permutation_p
from mirrorpo.statistics.curves import height_difference, rank_correlation

SEEDS, PROBLEMS, TRAINING, MARGIN = 10, 400, 0.02, 0.03
Array = np.ndarray


def accuracies(rng: np.random.Generator, mean: float, *shape: int) -> Array:
    """Measured accuracies of trainings that vary, on problems that are drawn anew."""
    return rng.binomial(PROBLEMS, np.clip(rng.normal(mean, TRAINING, shape), 0.0, 1.0)) / PROBLEMS


def heights(rng: np.random.Generator, curves: int, lift: float) -> Array:
    """(curves, SEEDS): heights above a reference of curves with seven runs; the last is lifted but for the shared run.

    All have one shape and a common part in each seed; the distance of each run is measured with an error of 10 %, and
    runs of the same coefficient differ by 30 %, so that curves are bent at other places than the reference.
    """
    found = np.zeros((curves, SEEDS))
    for seed in range(SEEDS):
        common, shared = rng.normal(0.0, 0.02), rng.normal(1.0, 0.1)
        end = 0.3 + 0.15 * math.tanh(shared) + common + rng.normal(0.0, TRAINING)
        drawn = []
        for curve in range(curves + 1):
            true = np.linspace(-2.0, 0.5, 6) + rng.normal(0.0, 0.3, 6)
            y = 0.3 + 0.15 * np.tanh(true) + common + lift * (curve == curves)
            y = rng.binomial(PROBLEMS, np.clip(y + rng.normal(0.0, TRAINING, 6), 0.0, 1.0)) / PROBLEMS
            drawn.append((np.append(true + rng.normal(0.0, 0.1, 6), shared), np.append(y, end)))
        found[:, seed] = [height_difference(*one, *drawn[0]) for one in drawn[1:]]
    return found


def correlations(rng: np.random.Generator) -> Array:
    """(SEEDS,): differences of two rank correlations with a loss, of two distances that predict it equally well."""
    found = []
    for _ in range(SEEDS):
        true = rng.normal(size=37)
        lost, one, two = (true + rng.normal(0.0, noise, 37) for noise in (1.0, 0.5, 0.5))
        found.append(rank_correlation(one, lost) - rank_correlation(two, lost))
    return np.array(found)


def covers(draw: Callable[[np.random.Generator], Array], truth: float) -> Callable[[np.random.Generator], bool]:
    return lambda rng: not mean_interval(draw(rng)).excludes(truth)


def claims(draw: Callable[[np.random.Generator], Array]) -> Callable[[np.random.Generator], bool]:
    """Whether any of the rows is called different after Holm's correction."""
    return lambda rng: min(holm([permutation_p(row) for row in np.atleast_2d(draw(rng))])) <= 0.05


def same(draw: Callable[[np.random.Generator], Array], noise: float) -> Callable[[np.random.Generator], bool]:
    """Whether the last of the rows, which differs by the margin, is called the same."""

    def claimed(rng: np.random.Generator) -> bool:
        rows = np.atleast_2d(draw(rng))
        return equivalent(rows[-1], MARGIN, noise, len(rows))

    return claimed


def mean_covers(rng: np.random.Generator) -> bool:
    noise = binomial_noise(0.4, PROBLEMS, SEEDS)
    return not mean_interval(accuracies(rng, 0.4, SEEDS), noise=noise, legal=SHARE).excludes(0.4)


def arms(lift: float) -> Callable[[np.random.Generator], Array]:
    """Five arms against a baseline, the last of which differs."""

    def drawn(rng: np.random.Generator) -> Array:
        others = np.stack([accuracies(rng, 0.4 + lift * (arm == 4), SEEDS) for arm in range(5)])
        return others - accuracies(rng, 0.4, SEEDS)

    return drawn


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--studies", type=int, default=2000)
    count = options.parse_args().studies
    noise = math.sqrt(2) * binomial_noise(0.4, PROBLEMS, SEEDS)
    cases: list[tuple[str, str, Callable[[np.random.Generator], bool]]] = [
        ("interval of an arm's accuracy", "covers it", mean_covers),
        ("interval of a difference of 3 points", "covers it", covers(lambda rng: arms(0.03)(rng)[-1], 0.03)),
        ("five arms, none different", "a difference is claimed", claims(arms(0.0))),
        ("five arms, one 3 points higher", "a difference is claimed", claims(arms(0.03))),
        ("an arm that differs by the margin, of five", "called the same", same(arms(MARGIN), noise)),
        ("interval of a height, equal curves", "covers 0", covers(lambda rng: heights(rng, 1, 0.0)[0], 0.0)),
        ("five curves, none different", "a difference is claimed", claims(lambda rng: heights(rng, 5, 0.0))),
        ("five curves, one 4 points higher", "a difference is claimed", claims(lambda rng: heights(rng, 5, 0.04))),
        ("interval of a difference of rank correlations", "covers 0", covers(correlations, 0.0)),
        ("two equally good predictors", "a difference is claimed", claims(correlations)),
    ]
    print(f"| {count:,} simulated studies of {SEEDS} seeds | happens | share % (standard error) |\n|---|---|---|")
    for number, (what, happens, case) in enumerate(cases):
        rng = np.random.default_rng([7, number])
        share = float(np.mean([case(rng) for _ in range(count)]))
        error = math.sqrt(share * (1 - share) / count)
        print(f"| {what} | {happens} | {100 * share:.1f} ({100 * error:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
