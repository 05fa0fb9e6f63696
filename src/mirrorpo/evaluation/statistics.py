"""What do counts of right answers say? Unbiased pass@k and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


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


def wilson_interval(num_right: float, num_total: float) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share; within [0, 1] also for 0 and all.

    Example:
        >>> low, high = wilson_interval(50, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if num_total < 1:
        raise ValueError(f"num_total must be at least 1, got {num_total}")
    share = num_right / num_total
    scale = 1.0 + Z95**2 / num_total
    centre = (share + Z95**2 / (2 * num_total)) / scale
    reach = Z95 * math.sqrt(share * (1 - share) / num_total + Z95**2 / (4 * num_total**2)) / scale
    return max(0.0, centre - reach), min(1.0, centre + reach)


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
