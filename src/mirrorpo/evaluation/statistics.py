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


def wilson_interval(num_right: float, num_total: int) -> tuple[float, float]:
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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % normal interval of a mean over problems; the mean itself for fewer than two."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, mean
    reach = Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return max(0.0, mean - reach), min(1.0, mean + reach)
