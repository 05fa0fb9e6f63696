"""Is the evolved map better than the one it started from? Trainings with the same seeds, compared pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats

from mirrorpo.evaluation.statistics import wilson_interval


def compare(best: Sequence[dict[str, Any]], start: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of both maps on test problems, and their difference.

    Args:
        best: results of the best map, a training seed each.
        start: of the first map, with the same seeds in the same order.

    Returns:
        For each map the accuracy of every seed (None: that training failed), their mean, and the Wilson interval of the
        pooled completions (for these trainings); for the difference its mean over the seeds where both stand, with the
        95 % interval of a paired t-test (for other seeds; None with fewer than two).

    Example:
        >>> row = {"fitness": 0.5, "right": 5, "problems": 10, "samples": 1}
        >>> compare([row], [row])["difference"]
        0.0
    """
    pairs = [
        ours["fitness"] - theirs["fitness"]
        for ours, theirs in zip(best, start, strict=True)
        if ours["fitness"] is not None and theirs["fitness"] is not None
    ]
    return {
        "best": _side(best),
        "start": _side(start),
        "difference": math.fsum(pairs) / len(pairs) if pairs else None,
        "difference_interval": _t_interval(pairs),
        "seeds": len(pairs),
    }


def _side(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    stand = [r for r in results if r["fitness"] is not None]
    total = sum(r["problems"] * r["samples"] for r in stand)
    return {
        "accuracies": [r["fitness"] for r in results],
        "accuracy": math.fsum(r["fitness"] for r in stand) / len(stand) if stand else None,
        "interval": list(wilson_interval(sum(r["right"] for r in stand), total)) if total else None,
        "completions": total,
    }


def _t_interval(values: Sequence[float]) -> list[float] | None:
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    reach = float(stats.t.ppf(0.975, count - 1) * stats.sem(values))
    return [mean - reach, mean + reach]


__all__ = ["compare"]
