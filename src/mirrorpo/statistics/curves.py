r"""Two curves over a common range: how much higher is one, on average?

Arms of a study that differ in a coefficient trace a curve: what a run reached over how far it went. Two curves are
compared where both have points: their mean difference in height is the area between them over the width of the common
range. Nothing is extrapolated, and points in a row are joined by straight lines, so a curve that is concave is drawn
too low between its points, the more the sparser they are: give both curves points at about the same distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mirrorpo.statistics.seeds import Interval, mean_interval


def polyline(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points in the order of x; points with the same x are one, with their mean y.

    Args:
        x: (n,) finite.
        y: (n,) finite.

    Returns:
        (m,) increasing, and (m,).

    Raises:
        ValueError: no points, or other shapes, or a number that is not finite.

    Example:
        >>> [part.tolist() for part in polyline([2.0, 1.0, 2.0], [1.0, 0.0, 3.0])]
        [[1.0, 2.0], [0.0, 2.0]]
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if across.ndim != 1 or across.shape != up.shape or not len(across):
        raise ValueError(f"x and y must be vectors of the same length >= 1, got shapes {across.shape} and {up.shape}")
    if not (np.isfinite(across).all() and np.isfinite(up).all()):
        raise ValueError("x and y must be finite")
    places, which = np.unique(across, return_inverse=True)
    return places, np.bincount(which, up) / np.bincount(which)


def height_difference(
    x: ArrayLike, y: ArrayLike, other_x: ArrayLike, other_y: ArrayLike, min_width: float = 0.0
) -> float | None:
    r"""The mean height of the first curve minus the second over the range that both cover.

    .. math:: \frac{1}{b - a} \int_a^b (f - g), \quad
        a = \max(\min x, \min x'),\; b = \min(\max x, \max x')

    The integral is exact for curves of straight lines: the trapezoidal rule over the corners of both.

    Args:
        x: (n,) such as the logarithm of a distance, in any order.
        y: (n,) such as accuracy.
        other_x: (m,) of the second curve.
        other_y: (m,)
        min_width: the common range must be wider than this.

    Returns:
        The difference; None where the common range is not wider than ``min_width``.

    Raises:
        ValueError: see ``polyline``; a negative ``min_width``.

    Example:
        >>> height_difference([0.0, 2.0], [0.0, 2.0], [1.0, 3.0], [0.0, 0.0])  # y = x against 0, from 1 to 2
        1.5
    """
    if not min_width >= 0.0:
        raise ValueError(f"min_width must be at least 0, got {min_width}")
    (one_x, one_y), (two_x, two_y) = polyline(x, y), polyline(other_x, other_y)
    low, high = max(one_x[0], two_x[0]), min(one_x[-1], two_x[-1])
    if not high - low > min_width:
        return None
    corners = np.concatenate([one_x, two_x])
    places = np.unique(np.concatenate([[low, high], corners[(corners > low) & (corners < high)]]))
    return float(np.trapezoid(np.interp(places, one_x, one_y) - np.interp(places, two_x, two_y), places) / (high - low))


@dataclass(frozen=True, kw_only=True)
class Band:
    """A mean curve over seeds at given places, with the interval of its mean; None where too few seeds reach."""

    places: tuple[float, ...]
    heights: tuple[Interval | None, ...]


def band(curves: Sequence[tuple[ArrayLike, ArrayLike]], places: ArrayLike, min_curves: int = 2) -> Band:
    """The mean of several curves, at places that enough of them cover; none is extrapolated.

    Args:
        curves: (x, y) of each seed.
        places: where.
        min_curves: how many must cover a place.

    Example:
        >>> found = band([([0.0, 1.0], [0.0, 1.0]), ([0.0, 2.0], [1.0, 1.0])], [0.5, 1.5])
        >>> found.heights[0].estimate, found.heights[1]
        (0.75, None)
    """
    lines = [polyline(x, y) for x, y in curves]
    heights: list[Interval | None] = []
    for place in np.asarray(places, dtype=np.float64):
        found = [float(np.interp(place, x, y)) for x, y in lines if x[0] <= place <= x[-1]]
        heights.append(mean_interval(found) if len(found) >= max(1, min_curves) else None)
    return Band(places=tuple(np.asarray(places, dtype=np.float64).tolist()), heights=tuple(heights))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation; infinite values and NaN in x rank last, equal values share their mean rank.

    Args:
        x: (n,)
        y: (n,) finite.

    Returns:
        In [-1, 1]; NaN where one of the two does not vary.

    Raises:
        ValueError: shapes differ, fewer than 2 values, or a y that is not finite.

    Example:
        >>> rank_correlation([1.0, 2.0, float("nan")], [1.0, 4.0, 9.0])
        1.0
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"x and y must be vectors of the same length >= 2, got {first.shape} and {second.shape}")
    if not np.isfinite(second).all():
        raise ValueError("y must be finite")
    ranks = [stats.rankdata(np.where(np.isnan(first), math.inf, first)), stats.rankdata(second)]
    centred = [rank - rank.mean() for rank in ranks]
    size = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(centred[0] @ centred[1]) / size if size > 0 else math.nan
