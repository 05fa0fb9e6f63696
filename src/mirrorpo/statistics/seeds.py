r"""Comparisons of two arms over a few seeds: intervals, tests, corrections, equivalence, power.

Pure functions over arrays with one entry a seed, in the same order for both arms: seed k of one arm is paired with seed
k of the other, which share their start and their problems.

* **interval of a mean**: the studentised bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
  section 12.5). With ten seeds it covers 93 to 97 % where it says 95, over normal, uniform, skewed and heavy-tailed
  values (``tests/test_statistics.py``); percentile and BCa intervals stay near 91 %. Below ``MIN_BOOTSTRAP`` seeds
  there is too little to resample and Student's interval is used. Where the noise of measuring one value is known (an
  accuracy on so many problems), the interval is never narrower than that noise allows; it ends at the legal range.
* **difference**: the same interval over the differences, and the paired permutation test: under the null the sign of
  each difference is a coin flip (Fisher, "The Design of Experiments", 1935, section 21); all sign patterns up to
  ``EXACT_SEEDS`` seeds, random ones beyond.
* **equivalence**: two one-sided tests by that interval (Schuirmann, 1987), never below ``MIN_EQUIVALENCE`` seeds.
* **several arms**: Holm's correction ("A Simple Sequentially Rejective Multiple Test Procedure", 1979).
* **variances**: the F test assumes normal values and independent arms: over exponential values it covers 76 %, over
  pairs 99. Here Bonett's interval, which estimates the kurtosis, with the correlation of pairs in it: 92 to 97 % over
  normal and bounded values, 90 over heavy tails and exponential ones. (A studentised bootstrap covers as well but is
  several times wider at ten seeds: it would not see a threefold standard deviation.)
* **interquartile mean, probability of improvement**: Agarwal et al., "Deep Reinforcement Learning at the Edge of the
  Statistical Precipice", arXiv 2108.13264, section 4.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mirrorpo.statistics.shares import LEVEL, wilson_interval

Array = NDArray[np.float64]

MIN_BOOTSTRAP = 6  # seeds; below this a resample is too often one seed repeated
MIN_EQUIVALENCE = 6  # seeds; with fewer the permutation test could not have seen a difference of any size either
EXACT_SEEDS = 12  # up to here all 2^n sign patterns are enumerated
NUM_RESAMPLES = 4999
NUM_FLIPS = 9999  # random sign patterns beyond EXACT_SEEDS
POWER = 0.8
NUM_POWER = 400  # simulated studies behind a detectable effect: its error is about 3 %
SHARE = (0.0, 1.0)  # the legal range of an accuracy
CHANGE = (-1.0, 1.0)  # and of the difference of two
ANY = (-math.inf, math.inf)
_LARGEST_EFFECT = 20.0  # standard deviations; every study with enough seeds finds this one
_HALVINGS = 12
_SEED = 20260204
# A spread this small relative to the values is rounding: such values count as equal.
_EQUAL = 1e-12
# Resamples whose spread is below this share of the sample's own: one seed drawn over and over. Their t is without
# bound; they count as infinitely far out on their side, which widens the interval.
_TINY_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with both ends of its interval."""

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return value < self.low or value > self.high


def _sample(name: str, values: ArrayLike, at_least: int = 1) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"{name} must be a vector of at least {at_least} values, one a seed, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _pair(x: ArrayLike, y: ArrayLike, at_least: int = 1) -> tuple[Array, Array]:
    first, second = _sample("x", x, at_least), _sample("y", y, at_least)
    if len(first) != len(second):
        raise ValueError(f"x and y must have one value for each common seed, got {len(first)} and {len(second)}")
    return first, second


def _spread(values: Array) -> Array:
    """The standard deviation along the last axis; what is rounding only is exactly 0."""
    found = np.std(values, axis=-1, ddof=1)
    return np.where(found <= _EQUAL * np.abs(values).max(axis=-1), 0.0, found)


@lru_cache(maxsize=4)
def _draws(count: int) -> NDArray[np.intp]:
    """(NUM_RESAMPLES, count) indices; always the same, so that a report built twice says the same."""
    return np.random.default_rng(_SEED).integers(0, count, size=(NUM_RESAMPLES, count))


def mean_interval(
    values: ArrayLike, level: float = LEVEL, *, noise: float = 0.0, legal: tuple[float, float] = ANY
) -> Interval:
    r"""The mean with its studentised bootstrap interval.

    .. math:: [m - q_{1-a/2}\, s/\sqrt n,\; m - q_{a/2}\, s/\sqrt n], \quad q \text{ of } (m^* - m) \sqrt n / s^*

    Args:
        values: (n,), one a seed.
        level: of the interval.
        noise: known standard deviation of measuring one value (``binomial_noise``). Where the values spread less than
            that, by chance or because counts are coarse, the interval is at least Student's with this deviation.
        legal: lowest and highest possible mean; the interval ends there.

    Returns:
        The interval; as wide as is legal for one seed, of width 0 if all values are equal and no noise is known.

    Raises:
        ValueError: empty, or not finite; a negative noise.

    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Eq. 12.19.

    Example:
        >>> found = mean_interval([0.90, 0.92, 0.91, 0.95, 0.93, 0.94])
        >>> round(found.estimate, 3), found.low < 0.91 < 0.94 < found.high
        (0.925, True)
        >>> found = mean_interval([0.5, 0.5, 0.5], noise=0.1, legal=SHARE)  # equal values are no proof of precision
        >>> round(found.low, 2), round(found.high, 2)
        (0.25, 0.75)
    """
    if not noise >= 0.0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    sample = _sample("values", values)
    count, mean = len(sample), float(sample.mean())
    if count == 1:
        return Interval(estimate=mean, low=legal[0], high=legal[1])
    spread = float(_spread(sample))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    student = stats.t.ppf(tails, count - 1)
    low = high = 0.0
    if spread > 0.0:
        low, high = student
        if count >= MIN_BOOTSTRAP:
            drawn = sample[_draws(count)]
            found = _quantiles(drawn.mean(axis=1) - mean, np.std(drawn, axis=1, ddof=1), spread, count, tails)
            # Coarse values, such as seven zeros of ten: if more resamples than the tail have no spread, Student's end.
            low, high = (end if math.isfinite(end) else own for end, own in zip(found, student, strict=True))
    below, above = high * spread, -low * spread
    if noise > spread:
        below, above = max(below, student[1] * noise), max(above, student[1] * noise)
    root = math.sqrt(count)
    return Interval(
        estimate=mean,
        low=max(legal[0], float(mean - below / root)),
        high=min(legal[1], float(mean + above / root)),
    )


def equivalent(differences: ArrayLike, margin: float, noise: float | None, num_comparisons: int = 1) -> bool:
    """Whether the differences show two arms to be the same within a margin.

    Two one-sided tests: the whole interval of the mean difference, at the level that holds for all comparisons at once,
    lies within the margin. Agreement is not evidence by itself: the interval is at least as wide as the noise of the
    evaluation, without which (None) nothing is claimed, and neither with fewer than ``MIN_EQUIVALENCE`` seeds.

    Args:
        differences: (n,), arm minus baseline at each common seed.
        margin: > 0; differences within it count as none.
        noise: standard deviation of measuring one difference, None if the number of problems is not known.
        num_comparisons: arms that are compared with the baseline.

    Raises:
        ValueError: empty, or not finite.

    Reference: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach", Journal of
        Pharmacokinetics and Biopharmaceutics 15, 1987.

    Example:
        >>> equivalent([0.0, 0.0, 0.0], 0.02, noise=0.001), equivalent([0.0] * 6, 0.02, noise=0.001)
        (False, True)
    """
    sample = _sample("differences", differences)
    if noise is None or len(sample) < MIN_EQUIVALENCE:
        return False
    found = mean_interval(sample, 1 - (1 - LEVEL) / num_comparisons, noise=noise)
    return -margin <= found.low and found.high <= margin


def _quantiles(shifts: Array, spreads: Array, own: float, count: int, tails: Array) -> tuple[float, float]:
    """The quantiles of shift * sqrt(n) / spread over the resamples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = shifts * math.sqrt(count) / spreads
    t = np.where(spreads <= _TINY_SPREAD * own, np.copysign(np.inf, shifts), t)
    low, high = np.quantile(t, tails, method="inverted_cdf")
    return float(low), float(high)


def interquartile_mean(values: ArrayLike) -> float:
    """The mean of the middle half: a quarter of the values (rounded down) is left out at each end.

    Args:
        values: (n,), one a seed.

    Raises:
        ValueError: empty, or not finite.

    Reference: Agarwal et al., arXiv 2108.13264, section 4.3.

    Example:
        >>> interquartile_mean([0.0, 0.5, 0.6, 9.0])
        0.55
    """
    return float(stats.trim_mean(_sample("values", values), 0.25))


def performance_profile(values: ArrayLike, thresholds: ArrayLike) -> list[float]:
    """The share of runs above each threshold: an arm whose profile lies above another's everywhere dominates it.

    Args:
        values: (n,), one a seed.
        thresholds: (m,), such as accuracies.

    Returns:
        m shares; not increasing where the thresholds increase.

    Raises:
        ValueError: empty, or not finite.

    Reference: Agarwal et al., arXiv 2108.13264, section 4.2 (run-score distribution).

    Example:
        >>> performance_profile([0.2, 0.4, 0.6, 0.8], [0.1, 0.4, 0.9])
        [1.0, 0.5, 0.0]
    """
    runs, levels = _sample("values", values), _sample("thresholds", thresholds)
    return [float(share) for share in (runs[None, :] > levels[:, None]).mean(axis=1)]


def permutation_p(differences: ArrayLike) -> float:
    """The two-sided p value of the paired permutation test: is the mean difference 0?

    The sign of each difference is flipped in every way (up to ``EXACT_SEEDS`` of them; ``NUM_FLIPS`` random ways
    beyond, with the observed one counted in).

    Args:
        differences: (n,), arm minus baseline at each common seed.

    Returns:
        p in (0, 1]; with n seeds it cannot fall below ``smallest_p(n)``.

    Raises:
        ValueError: empty, or not finite.

    Reference: Fisher, "The Design of Experiments", 1935, section 21.

    Example:
        >>> permutation_p([1.0, 2.0, 3.0])  # 2 of the 8 sign patterns are as far out
        0.25
    """
    sample = _sample("differences", differences)
    if len(sample) == 1 or not sample.any():
        return 1.0
    sums = _signs(len(sample)) @ sample
    own = abs(float(sample.sum()))
    # Patterns that tie with the observed one up to rounding count as being as far out.
    extreme = int((np.abs(sums) >= own - _EQUAL * float(np.abs(sample).sum())).sum())
    exact = len(sample) <= EXACT_SEEDS
    return extreme / len(sums) if exact else (extreme + 1) / (len(sums) + 1)


@lru_cache(maxsize=4)
def _signs(count: int) -> Array:
    """(patterns, count) of +1 and -1: all of them, or NUM_FLIPS random ones."""
    if count <= EXACT_SEEDS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    return np.random.default_rng(_SEED).choice((1.0, -1.0), size=(NUM_FLIPS, count))


def smallest_p(num_seeds: int) -> float:
    """The least p value the permutation test can give: all differences on one side.

    Example:
        >>> smallest_p(5)
        0.0625
    """
    return min(1.0, 2.0 / 2**num_seeds if num_seeds <= EXACT_SEEDS else 1.0 / (NUM_FLIPS + 1))


def holm(p_values: ArrayLike) -> list[float]:
    """Holm's correction: p values that may be compared with the level although there are several.

    Args:
        p_values: (m,), one a comparison.

    Returns:
        The corrected values in the same order, at most 1.

    Raises:
        ValueError: a value outside [0, 1].

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])  # 3 * 0.01, then the larger of 2 * 0.03 and what came before
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must lie in [0, 1], got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, stepped)
    return corrected.tolist()


def improvement_probability(x: ArrayLike, y: ArrayLike, level: float = LEVEL) -> Interval:
    r"""The chance that a run of one arm beats a run of the other, ties counted half: P(X > Y) + P(X = Y) / 2.

    Over all pairs of runs, not only those of one seed: who trains once does not share the other's seed. The interval
    is a percentile bootstrap over seeds, and never narrower than Wilson's for as many pairs as there are seeds: three
    wins of three are no certainty.

    Args:
        x: (n,), the arm.
        y: (n,), the baseline, same seeds.
        level: of the interval.

    Raises:
        ValueError: shapes differ, empty or not finite.

    Reference: Agarwal et al., arXiv 2108.13264, section 4.3; Mann and Whitney, 1947.

    Example:
        >>> improvement_probability([1.0, 3.0], [0.0, 2.0]).estimate
        0.75
    """
    first, second = _pair(x, y)
    wins = np.sign(first[:, None] - second[None, :]) / 2 + 0.5
    estimate = float(wins.mean())
    if len(first) == 1:
        return Interval(estimate=estimate, low=0.0, high=1.0)
    # How often each seed was drawn; a resample's mean over pairs is then a quadratic form.
    draws = _draws(len(first))
    counts = np.stack([(draws == seed).sum(axis=1) for seed in range(len(first))], axis=1) / len(first)
    drawn = np.einsum("ri,ij,rj->r", counts, wins, counts, optimize=True)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    least, most = wilson_interval(estimate * len(first), len(first), level)
    return Interval(estimate=estimate, low=min(float(low), least), high=max(float(high), most))


def detectable_effect(
    differences: ArrayLike, num_comparisons: int = 1, power: float = POWER, *, noise: float = 0.0
) -> float:
    r"""The smallest true mean difference that this study would have found with probability ``power``.

    Found means: by the permutation test at the level 0.05 / ``num_comparisons``, the first step of Holm's correction,
    if differences are normal with the spread seen. Up to ``EXACT_SEEDS`` seeds by simulating that very test, whose few
    possible p values cost power; beyond, with a noncentral t in Johnson and Welch's approximation,
    :math:`\delta \sqrt n / s = t_{1-a/2} (1 - 1/4f) + z_{power} \sqrt{1 + t^2 / 2f}`, f = n - 1.

    Args:
        differences: (n,), arm minus baseline; only their spread is used.
        num_comparisons: arms that are compared with the baseline.
        power: wanted.
        noise: known standard deviation of measuring one difference; the spread counts as no less.

    Returns:
        The effect in the unit of the values; infinite where no p value of the permutation test could be small enough
        with so few seeds (``smallest_p``), not a number where neither spread nor noise is known.

    Raises:
        ValueError: empty, or not finite.

    Reference: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2; Johnson and Welch,
        "Applications of the non-central t-distribution", Biometrika 31, 1940.

    Example:
        >>> 0.95 < detectable_effect([-1.0, 1.0] * 5) < 1.1  # ten seeds: about one standard deviation
        True
    """
    sample = _sample("differences", differences)
    count, alpha = len(sample), (1 - LEVEL) / num_comparisons
    if count < 2 or smallest_p(count) > alpha:
        return math.inf
    wide = max(noise, float(_spread(sample)))
    return _unit_effect(count, alpha, power) * wide if wide > 0.0 else math.nan


@lru_cache(maxsize=64)
def _unit_effect(count: int, alpha: float, power: float) -> float:
    """The detectable effect in standard deviations."""
    if count > EXACT_SEEDS:
        freedom = count - 1
        critical = float(stats.t.ppf(1 - alpha / 2, freedom))
        reach = float(stats.norm.ppf(power)) * math.sqrt(1 + critical**2 / (2 * freedom))
        return (critical * (1 - 1 / (4 * freedom)) + reach) / math.sqrt(count)
    noise = np.random.default_rng(_SEED).normal(size=(count, NUM_POWER))
    signs = _signs(count)
    sums, own, balance = signs @ noise, noise.sum(axis=0), signs.sum(axis=1, keepdims=True)
    low, high = np.zeros(NUM_POWER), np.full(NUM_POWER, _LARGEST_EFFECT)
    for _ in range(_HALVINGS):  # the shift from which on the test rejects, in each simulated study
        middle = (low + high) / 2
        p = (np.abs(sums + balance * middle) >= np.abs(own + count * middle) - _EQUAL).mean(axis=0)
        low, high = np.where(p > alpha, middle, low), np.where(p > alpha, high, middle)
    return float(np.quantile(high, power))


def variance_ratio(x: ArrayLike, y: ArrayLike, level: float = LEVEL) -> Interval:
    r"""The ratio of two variances over seeds, Var(x) / Var(y), with an interval that does not lean on normality.

    .. math:: \log(s_x^2 / s_y^2) \pm t_{n-1} \sqrt{2\, \frac{\hat\gamma - (n-3)/n}{n-1}\, (1 - \hat\rho^2)}

    with the pooled kurtosis :math:`\hat\gamma`, each arm's about its trimmed mean, and the squared correlation
    :math:`\hat\rho^2` of the pairs, less what chance alone gives it.

    Args:
        x: (n,), the arm.
        y: (n,), the baseline, same seeds.
        level: of the interval.

    Returns:
        The ratio; below 1, the arm's seeds agree better. From 0 to infinity with fewer than ``MIN_BOOTSTRAP`` seeds,
        or where an arm does not vary at all.

    Raises:
        ValueError: shapes differ, empty or not finite.

    Reference: Bonett, "Robust confidence interval for a ratio of standard deviations", Applied Psychological
        Measurement 30, 2006, Eq. 3 and 4; the pairs' correlation after Pitman, 1939; t for the normal quantile.

    Example:
        >>> variance_ratio([0.0, 2.0, 4.0, 7.0], [0.0, 1.0, 2.0, 3.5]).estimate
        4.0
    """
    first, second = _pair(x, y)
    spreads = (float(_spread(first)), float(_spread(second))) if len(first) > 1 else (0.0, 0.0)
    if min(spreads) == 0.0 or len(first) < MIN_BOOTSTRAP:
        ratio = (spreads[0] / spreads[1]) ** 2 if spreads[1] > 0.0 else math.nan
        return Interval(estimate=ratio, low=0.0, high=math.inf)
    count = len(first)
    kurtosis = (_kurtosis(first) + _kurtosis(second)) / 2
    squared = (float(np.corrcoef(first, second)[0, 1]) ** 2 * (count - 1) - 1) / (count - 2)
    variance = 2 * (kurtosis - (count - 3) / count) / (count - 1) * (1 - min(1.0, max(0.0, squared)))
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(max(0.0, variance))
    ratio = (spreads[0] / spreads[1]) ** 2
    return Interval(estimate=ratio, low=ratio * math.exp(-reach), high=ratio * math.exp(reach))


def _kurtosis(values: Array) -> float:
    """Fourth moment about the trimmed mean over the squared variance; unlike the plain one, not biased low."""
    count = len(values)
    centre = stats.trim_mean(values, 1 / (2 * math.sqrt(count - 4)))
    return float(count * ((values - centre) ** 4).sum() / ((values - values.mean()) ** 2).sum() ** 2)
