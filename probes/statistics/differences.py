"""Differences of means: of pairs, or of independent samples by MOVER.

low = d - sqrt((x - l_x)^2 + (u_y - y)^2), so a part without spread stays honest.

Paper: Zou and Donner 2008 (MOVER).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from probes.errors import UsageError
from probes.statistics.checks import OPPOSITE, checked, finite
from probes.statistics.means import Sample, mean_interval
from probes.statistics.resampling import RESAMPLES
from probes.statistics.results import Bounds, Clusters, Interval, Sided


def difference_interval(
    x: ArrayLike,
    y: ArrayLike,
    *,
    paired: bool,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    level: float = 0.95,
    sided: Sided = "two",
    bounds: Bounds | None = None,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Interval:
    """Confidence interval of mean(x) - mean(y).

    Args:
        x: [n] finite values.
        y: [n] values of the same records in the same order if paired, else [m] values of other records.
        paired: whether x[i] and y[i] belong together.
        clusters: [n] clusters of x (and of y, if paired).
        y_clusters: [m] clusters of y; only for unpaired data.
        level: confidence level.
        sided: "two", "upper" or "lower".
        bounds: the smallest and largest possible value of x and of y.
        seed: makes the result reproducible.
        n_resamples: bootstrap resamples.

    Returns:
        Paired: `mean_interval` of x - y. Unpaired: MOVER over the two intervals. n is the number of pairs, or n + m.

    Raises:
        UsageError: as `mean_interval`; paired data of different lengths; y_clusters with paired data.
    """
    first, second = finite(x, "x"), finite(y, "y")
    bounds = checked(bounds, np.concatenate([first, second]))
    span = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if bounds else None
    if paired:
        if len(first) != len(second) or y_clusters is not None:
            raise UsageError(
                f"expected pairs with one list of clusters, found {len(first)} and {len(second)} values; "
                "pass the same records in the same order, or paired=False"
            )
        return mean_interval(
            first - second, clusters, level=level, sided=sided, bounds=span, seed=seed, n_resamples=n_resamples
        )
    a = Sample(first[:, None], clusters, "clusters", (seed, 0), n_resamples)
    b = Sample(second[:, None], y_clusters, "y_clusters", (seed, 1), n_resamples)
    one = np.ones(1)
    both = mover(a.interval(one, level, sided, bounds), b.interval(one, level, OPPOSITE[sided], bounds), -1.0)
    lo, hi = span or (-math.inf, math.inf)
    return replace(both, low=lo if sided == "upper" else both.low, high=hi if sided == "lower" else both.high)


def mover(a: Interval, b: Interval, factor: float) -> Interval:
    """Interval of a + factor * b for independent a and b."""
    ends = sorted((factor * b.low, factor * b.high)) if factor else [0.0, 0.0]
    other = factor * b.value if factor else 0.0
    value = a.value + other
    low = value - math.hypot(a.value - a.low, other - ends[0])
    high = value + math.hypot(a.high - a.value, ends[1] - other)
    if math.isnan(value):  # an arm without data says nothing about the sum
        low, high = -math.inf, math.inf
    return Interval(value, low, high, a.level, a.n + b.n, f"mover({a.method}; {b.method})")
