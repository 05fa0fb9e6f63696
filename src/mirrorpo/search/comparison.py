"""Comparison of the evolved map with the one it started from: trainings with the same seeds, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mirrorpo.statistics import CHANGE, binomial_noise, mean_interval, wilson_interval


def compare(best: Sequence[dict[str, Any]], start: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of both maps on test problems, and their difference.

    Args:
        best: results of the best map, a training seed each.
        start: of the first map, with the same seeds in the same order.

    Returns:
        For each map the accuracy of every seed (None: that training failed), their mean, and the Wilson interval of the
        pooled completions (for these trainings); for the difference its mean over the seeds where both stand, with the
        95 % interval over the seeds, no narrower than the noise of the evaluation (None with fewer than two seeds).

    Example:
        >>> row = {"fitness": 0.5, "right": 5, "problems": 10, "samples": 1}
        >>> compare([row], [row])["difference"]
        0.0
    """
    both = [
        (ours, theirs)
        for ours, theirs in zip(best, start, strict=True)
        if ours["fitness"] is not None and theirs["fitness"] is not None
    ]
    pairs = [ours["fitness"] - theirs["fitness"] for ours, theirs in both]
    return {
        "best": _side(best),
        "start": _side(start),
        "difference": math.fsum(pairs) / len(pairs) if pairs else None,
        "difference_interval": _difference_interval(pairs, both) if len(pairs) > 1 else None,
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


def _difference_interval(pairs: Sequence[float], both: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    noises = [
        binomial_noise(math.fsum(r["fitness"] for r in side) / len(side), min(r["problems"] for r in side), len(side))
        for side in zip(*both, strict=True)
    ]
    found = mean_interval(pairs, noise=math.hypot(*noises), legal=CHANGE)
    return [found.low, found.high]


__all__ = ["compare"]
