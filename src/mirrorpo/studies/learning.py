"""How fast did a run learn? Two numbers from its learning curve: the area under it, and the steps to a target.

The curve is the mean reward of each step's fresh completions; with rewards of 0 and 1 that is the accuracy on training
problems, which a run of less than one epoch has never seen before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 5  # steps that the target's curve is averaged over: one lucky batch is no arrival


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


__all__ = ["WINDOW", "area_under_curve", "median_steps", "restricted", "steps_to_target"]
