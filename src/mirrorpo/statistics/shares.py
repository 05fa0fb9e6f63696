"""Shares of right answers: unbiased pass@k, Wilson's interval (also for several samples a problem), binomial noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    r"""The unbiased estimate of the chance that one of k samples is right, :math:`1 - \binom{n-c}{k} / \binom{n}{k}`.

    Args:
        num_samples: n, samples drawn for the problem.
        num_right: c, how many of them are right.
        k: at least 1, at most n.

    Raises:
        ValueError: k outside 1..n, or c outside 0..n.

    Reference: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, Eq. 1.

    Example:
        >>> pass_at_k(2, 1, 1)
        0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in [1, {num_samples}] (the samples per problem), got {k}")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"num_right must be in [0, {num_samples}], got {num_right}")
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def wilson_interval(num_right: float, num_total: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share; within [0, 1] also for 0 and all.

    Raises:
        ValueError: fewer than one in all, or a number outside [0, num_total].

    Example:
        >>> low, high = wilson_interval(50, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if num_total < 1:
        raise ValueError(f"num_total must be at least 1, got {num_total}")
    if not 0 <= num_right <= num_total:
        raise ValueError(f"num_right must be in [0, {num_total:g}], got {num_right}")
    share, z = num_right / num_total, NormalDist().inv_cdf((1 + level) / 2)
    scale = 1.0 + z**2 / num_total
    centre = (share + z**2 / (2 * num_total)) / scale
    reach = z * math.sqrt(share * (1 - share) / num_total + z**2 / (4 * num_total**2)) / scale
    # With none or all right, one end is 0 or 1 exactly; rounding would leave it 1e-17 beside.
    low = 0.0 if num_right == 0 else max(0.0, centre - reach)
    high = 1.0 if num_right == num_total else min(1.0, centre + reach)
    return low, high


def clustered_interval(values: Sequence[float], num_samples: int) -> tuple[float, float]:
    r"""The 95 % interval of a mean over problems whose values lie in [0, 1], however samples agree within a problem.

    Wilson's interval at the effective number of independent samples, :math:`n_e = p (1 - p) / (s^2 / n)`: the spread s
    between problems decides, not the number of samples. With one sample a problem s^2 = p (1 - p), and this is Wilson's
    interval. n_e is at least n, also where all values are 0 or 1 and there is no spread, and at most ``num_samples``.

    Args:
        values: one for each problem, such as its pass@k.
        num_samples: of all problems together.

    Raises:
        ValueError: no values, or fewer samples than values.

    Reference: Wilson (1927); Kish, "Survey Sampling" (1965), section 8.2, for the effective sample size.

    Example:
        >>> clustered_interval([1.0] * 50 + [0.0] * 50, 100) == wilson_interval(50, 100)
        True
    """
    count = len(values)
    if count < 1 or num_samples < count:
        raise ValueError(f"num_samples must be at least the number of values, which is at least 1, got {num_samples}")
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / count
    spread = mean * (1.0 - mean)
    effective = float(num_samples) if variance <= 0.0 else count * spread / variance
    if spread <= 0.0:
        effective = float(count)
    effective = min(max(effective, float(count)), float(num_samples))
    return wilson_interval(mean * effective, effective)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed.

    Example:
        >>> quantile([1, 2, 3, 4], 0.5), quantile([1, 2, 3, 4], 0.9)
        (2, 4)
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def binomial_noise(share: float, num_problems: int, num_runs: int = 1) -> float:
    r"""The standard deviation of an accuracy that comes from drawing the answers to so many problems.

    .. math:: \sqrt{\tilde p (1 - \tilde p) / N}, \quad \tilde p = \frac{p N r + 2}{N r + 4}

    for the mean accuracy p of r runs on N problems. The four answers added, half of them right, keep an accuracy of 0
    or 1 from looking exact. For given problems this is an upper bound, since problems are not equally hard.

    Args:
        share: accuracy, a mean over the runs.
        num_problems: N, of each run; several samples of one problem count once, as they may agree.
        num_runs: r.

    Raises:
        ValueError: a share outside [0, 1], or a number below 1.

    Reference: Agresti and Coull, "Approximate is better than 'exact' for interval estimation of binomial proportions",
        The American Statistician 52, 1998.

    Example:
        >>> round(binomial_noise(0.8, 100), 2), round(binomial_noise(1.0, 10), 2)  # (0.04, 0.11)
        (0.04, 0.11)
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if num_problems < 1 or num_runs < 1:
        raise ValueError(f"num_problems and num_runs must be at least 1, got {num_problems} and {num_runs}")
    answers = num_problems * num_runs
    smoothed = (share * answers + 2) / (answers + 4)
    return math.sqrt(smoothed * (1 - smoothed) / num_problems)
