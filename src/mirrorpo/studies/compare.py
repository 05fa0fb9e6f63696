"""Comparison of the arms with the baseline: every number of a report, from the runs of a collection.

A measure is one number a run: accuracy after training (the question a study asks first), response length, area under
the learning curve, steps to the target, exact KL from the start. Each is compared over the seeds that arm and baseline
share; Holm's correction runs over the arms, one measure at a time. An accuracy is measured on so many problems: its
intervals are never narrower than the binomial noise of that, and every interval ends at the measure's legal range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mirrorpo.config.measure import MatchedSpec
from mirrorpo.statistics import (
    ANY,
    CHANGE,
    LEVEL,
    SHARE,
    Interval,
    binomial_noise,
    detectable_effect,
    equivalent,
    holm,
    improvement_probability,
    interquartile_mean,
    mean_interval,
    permutation_p,
    variance_ratio,
)
from mirrorpo.statistics.curves import height_difference
from mirrorpo.studies.collection import Collection, FinishedRun

WINDOW = 5  # steps that the target's curve is averaged over: one lucky batch is no arrival


# ---- learning curves: the mean reward of each step's fresh completions; with rewards of 0 and 1 the accuracy on
# training problems, which a run of less than one epoch has never seen before


def area_under_curve(rewards: Sequence[float | None]) -> float | None:
    """The mean height of the learning curve: the area under it over the number of steps.

    Args:
        rewards: one a step; None where it was not recorded.

    Returns:
        The mean over the recorded steps, None if there are none.

    Example:
        >>> area_under_curve([0.25, None, 0.75])
        0.5
    """
    present = [reward for reward in rewards if reward is not None]
    return float(np.mean(present)) if present else None


def steps_to_target(steps: Sequence[int], rewards: Sequence[float | None], target: float) -> int | None:
    """The first step at which the mean reward of the last ``WINDOW`` recorded steps is at least the target.

    Args:
        steps: increasing.
        rewards: one a step; None where it was not recorded.
        target: the reward wanted.

    Returns:
        The step; None if the run ended before: it is censored, it would have needed more steps than it had.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> steps_to_target(range(1, 8), [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.8)
        6
    """
    if len(steps) != len(rewards):
        raise ValueError(f"steps and rewards must have the same length, got {len(steps)} and {len(rewards)}")
    recorded = [(step, reward) for step, reward in zip(steps, rewards, strict=True) if reward is not None]
    for end in range(WINDOW, len(recorded) + 1):
        if sum(reward for _, reward in recorded[end - WINDOW : end]) >= WINDOW * target - 1e-12:
            return recorded[end - 1][0]
    return None


def restricted(steps: Sequence[int | None], horizon: int) -> list[float]:
    """Steps to the target, censored runs counted with the horizon: their mean is the restricted mean.

    The restricted mean (of min(steps, horizon)) needs no guess of what a censored run would have done, and is a lower
    bound of the mean.

    Args:
        steps: one a run, None where the target was not reached.
        horizon: the steps that every run had.

    Reference: Royston and Parmar, "Restricted mean survival time", BMC Medical Research Methodology 13:152, 2013.

    Example:
        >>> restricted([10, None], 60)
        [10.0, 60.0]
    """
    return [float(horizon if step is None else min(step, horizon)) for step in steps]


def median_steps(steps: Sequence[int | None]) -> float | None:
    """The median over runs, None where half of them or more are censored (then only "more than the horizon" is known).

    Example:
        >>> median_steps([10, 20, None]), median_steps([10, None])
        (20.0, None)
    """
    ranked = sorted(float("inf") if step is None else float(step) for step in steps)
    middle = float(np.median(ranked)) if ranked else float("inf")
    return middle if np.isfinite(middle) else None


# ---- arms against the baseline


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm against the baseline, over their common seeds.

    Attributes:
        seeds: in common.
        mean: mean difference, arm minus baseline, with its interval.
        p: of the paired permutation test.
        p_holm: corrected over the arms.
        improvement: probability that a run of the arm is above one of the baseline.
        detectable: the smallest effect that would have been found (80 % power, Holm's first step).
        variance: Var(arm) / Var(baseline) with its 95 % interval.
        variance_wide: the same at the level that holds for all arms at once (Bonferroni).
        noise: standard deviation of measuring one difference; None where it is not known, which rules out ``same``.
        values: arm minus baseline at each common seed.
        num_comparisons: arms compared with the baseline.
    """

    seeds: tuple[int, ...]
    mean: Interval
    p: float
    p_holm: float
    improvement: Interval
    detectable: float
    variance: Interval
    variance_wide: Interval
    noise: float | None
    values: tuple[float, ...]
    num_comparisons: int

    def same_within(self, margin: float) -> bool:
        """Whether the two are shown to be the same within a margin (``mirrorpo.statistics.equivalent``)."""
        return equivalent(self.values, margin, self.noise, self.num_comparisons)

    @property
    def significant(self) -> bool:
        """At 5 %, after Holm's correction."""
        return self.p_holm <= 1 - LEVEL


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One measure of one arm over its seeds; ``difference`` is None for the baseline and without a common seed."""

    values: Mapping[int, float]
    mean: Interval
    sd: float  # nan for one seed
    median: float
    iqm: float
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """How many runs reached the target, and when; ``median`` is None where half or more did not."""

    reached: int
    total: int
    median: float | None
    horizon: int
    steps: Mapping[int, int | None]


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Curves at matched distance (``mirrorpo.statistics.curves``).

    Attributes:
        reference: the curve that the others are compared with.
        distance, value: columns.
        points: curve to seed to (distance, value, arm) of its runs.
        heights: curve to its height above the reference: over the seeds in which both cover a common range of more than
            a factor of 2.
        left_out: curve to how many seeds have no such range.
    """

    reference: str
    distance: str
    value: str
    points: Mapping[str, Mapping[int, tuple[tuple[float, float, str], ...]]]
    heights: Mapping[str, Difference]
    left_out: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measure name to arm to numbers; an arm is absent from a measure that none of its runs has."""

    measures: Mapping[str, Mapping[str, Spread]]
    arrivals: Mapping[str, Arrival]
    num_comparisons: int
    matched: Matched | None = None

    @property
    def accuracy(self) -> Mapping[str, Spread]:
        """The first question."""
        return self.measures["accuracy"]


_OF: dict[str, Callable[[FinishedRun], float | None]] = {
    "accuracy": lambda run: run.accuracy,
    "length": lambda run: run.summary.after.mean_length,
    "area": lambda run: area_under_curve(run.rewards),
    "divergence": lambda run: run.divergence,
}


@dataclass(frozen=True, kw_only=True)
class Legal:
    """The possible values of a measure's mean, and of a mean difference."""

    mean: tuple[float, float] = ANY
    difference: tuple[float, float] = ANY


_SHOWN = re.compile(r"\w+\.(policy\.(accuracy|pass@\d+|distinct_right|reverse_kl)|start\.forward_kl)")
MIN_RANGE = math.log(2.0)  # a common range of distance that is narrower says nothing of a curve's height


_POSITIVE = Legal(mean=(0.0, math.inf))
_LEGAL = {"accuracy": Legal(mean=SHARE, difference=CHANGE), "length": _POSITIVE, "divergence": _POSITIVE}


def compare(collection: Collection) -> Comparison:
    """Compare every arm with the baseline.

    Args:
        collection: the baseline has at least one run.

    Returns:
        All numbers.
    """
    arms = {name: runs for name, runs in collection.arms.items() if runs}
    values = {
        measure: {name: _values(runs, of) for name, runs in arms.items() if _values(runs, of)}
        for measure, of in _OF.items()
    }
    columns = dict.fromkeys(name for runs in arms.values() for run in runs for name in run.measures)
    for measure in (name for name in columns if _SHOWN.fullmatch(name)):
        found = {name: _values(runs, lambda run, of=measure: run.measures.get(of)) for name, runs in arms.items()}
        values[measure] = {name: own for name, own in found.items() if own}
    horizon = min((run.metrics.steps[-1] for runs in arms.values() for run in runs if run.metrics.steps), default=0)
    arrivals = {name: _arrival(runs, collection.target, horizon) for name, runs in arms.items()}
    values["steps"] = {
        name: dict(zip(found.steps, restricted(list(found.steps.values()), horizon), strict=True))
        for name, found in arrivals.items()
    }
    noises = {name: noise for name, runs in arms.items() if (noise := _noise(runs)) is not None}
    shares = {name: _LEGAL["accuracy"] for name in values if name.rpartition(".")[2].startswith(("accuracy", "pass@"))}
    legal = _LEGAL | shares | {"steps": Legal(mean=(0.0, float(horizon)), difference=(-float(horizon), float(horizon)))}
    return Comparison(
        measures={
            name: spreads(found, collection.baseline, noises if name == "accuracy" else None, legal.get(name, Legal()))
            for name, found in values.items()
            if found
        },
        arrivals=arrivals,
        num_comparisons=max(1, len(arms) - 1),
        matched=None if collection.matched is None else match(arms, collection.matched),
    )


def match(arms: Mapping[str, Sequence[FinishedRun]], spec: MatchedSpec) -> Matched:
    """Compare curves of arms at matched distance.

    Args:
        arms: name to finished runs; a run without the distance or the value is no point.
        spec: the curves; its patterns are resolved.

    Returns:
        Points and heights; a curve is absent from ``heights`` if no seed can be compared.
    """

    def value(run: FinishedRun) -> float | None:
        return run.accuracy if spec.value == "accuracy" else run.measures.get(spec.value)

    points: dict[str, dict[int, tuple[tuple[float, float, str], ...]]] = {}
    for curve, members in spec.curves.items():
        own = points.setdefault(curve, {})
        for arm in (arm for arm in arms if arm in (*members, *spec.shared)):
            for run in arms[arm]:
                far, high = run.measures.get(spec.distance), value(run)
                if far is not None and far > 0 and high is not None:
                    own[run.seed] = (*own.get(run.seed, ()), (far, high, arm))
    heights: dict[str, dict[int, float]] = {spec.reference: {}}
    left_out: dict[str, int] = {}
    for curve in (name for name in points if name != spec.reference):
        for seed in sorted(set(points[curve]) & set(points[spec.reference])):
            lines = [
                ([math.log(x) for x, _, _ in p], [y for _, y, _ in p])
                for p in (points[curve][seed], points[spec.reference][seed])
            ]
            found = height_difference(*lines[0], *lines[1], min_width=MIN_RANGE)
            if found is None:
                left_out[curve] = left_out.get(curve, 0) + 1
            else:
                heights.setdefault(curve, {})[seed] = found
    heights[spec.reference] = {seed: 0.0 for own in heights.values() for seed in own}
    spread = spreads({name: own for name, own in heights.items() if own}, spec.reference)
    found_heights = {name: one.difference for name, one in spread.items() if one.difference is not None}
    return Matched(
        reference=spec.reference,
        distance=spec.distance,
        value=spec.value,
        points=points,
        heights=found_heights,
        left_out=left_out,
    )


def _noise(runs: Sequence[FinishedRun]) -> float | None:
    """Of an arm's accuracies; None where a run does not say on how many problems it was measured."""
    problems = [run.summary.problems or 0 for run in runs]
    if min(problems) < 1:
        return None
    return binomial_noise(float(np.mean([run.accuracy for run in runs])), min(problems), len(runs))


def _values(runs: Sequence[FinishedRun], of: Callable[[FinishedRun], float | None]) -> dict[int, float]:
    return {run.seed: value for run in runs if (value := of(run)) is not None}


def _arrival(runs: Sequence[FinishedRun], target: float, horizon: int) -> Arrival:
    steps: dict[int, int | None] = {}
    for run in runs:
        found = steps_to_target(run.metrics.steps, run.rewards, target)
        steps[run.seed] = None if found is None or found > horizon else found
    reached = sum(step is not None for step in steps.values())
    median = median_steps(list(steps.values()))
    return Arrival(reached=reached, total=len(steps), median=median, horizon=horizon, steps=steps)


def spreads(
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    noises: Mapping[str, float] | None = None,
    legal: Legal = Legal(),
) -> dict[str, Spread]:
    """One measure of all arms, each against the baseline.

    Args:
        values: arm to seed to value; an arm has at least one.
        baseline: an arm; without values of its own there are no differences.
        noises: standard deviation of measuring one value of an arm, where it is known.
        legal: where intervals end.

    Returns:
        Arm to numbers.

    Example:
        >>> found = spreads({"a": {0: 0.5, 1: 0.7}, "b": {0: 0.6, 1: 0.9, 2: 1.0}}, "a")
        >>> found["b"].difference.seeds, round(found["b"].difference.mean.estimate, 2)
        ((0, 1), 0.15)
    """
    base, known = values.get(baseline, {}), noises or {}
    shared = {
        name: tuple(sorted(set(own) & set(base)))
        for name, own in values.items()
        if name != baseline and set(own) & set(base)
    }
    pairs = {
        name: (np.array([values[name][s] for s in seeds]), np.array([base[s] for s in seeds]))
        for name, seeds in shared.items()
    }
    p_values = {name: permutation_p(x - y) for name, (x, y) in pairs.items()}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    count = max(1, len(pairs))
    differences = {}
    for name, (x, y) in pairs.items():
        noise = math.hypot(known[name], known[baseline]) if name in known and baseline in known else None
        differences[name] = Difference(
            seeds=shared[name],
            mean=mean_interval(x - y, noise=noise or 0.0, legal=legal.difference),
            p=p_values[name],
            p_holm=corrected[name],
            improvement=improvement_probability(x, y),
            detectable=detectable_effect(x - y, count, noise=noise or 0.0),
            variance=variance_ratio(x, y),
            variance_wide=variance_ratio(x, y, 1 - (1 - LEVEL) / count),
            noise=noise,
            values=tuple((x - y).tolist()),
            num_comparisons=count,
        )
    return {name: _spread(own, differences.get(name), known.get(name, 0.0), legal.mean) for name, own in values.items()}


def _spread(
    values: Mapping[int, float], difference: Difference | None, noise: float, legal: tuple[float, float]
) -> Spread:
    found = np.array([values[seed] for seed in sorted(values)])
    return Spread(
        values=dict(sorted(values.items())),
        mean=mean_interval(found, noise=noise, legal=legal),
        sd=float(found.std(ddof=1)) if len(found) > 1 else math.nan,
        median=float(np.median(found)),
        iqm=interquartile_mean(found),
        difference=difference,
    )


__all__ = [
    "WINDOW",
    "Arrival",
    "Comparison",
    "Difference",
    "Matched",
    "Spread",
    "area_under_curve",
    "compare",
    "match",
    "median_steps",
    "restricted",
    "spreads",
    "steps_to_target",
]
