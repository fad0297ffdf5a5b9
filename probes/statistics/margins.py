"""Decisions against a margin that was fixed in advance: non-inferiority and equivalence.

Paper: Schuirmann 1987 (two one-sided tests).
"""

from __future__ import annotations

import math
from typing import Literal

from numpy.typing import ArrayLike

from probes.errors import UsageError
from probes.statistics.differences import difference_interval
from probes.statistics.results import Bounds, Clusters, Decision, Interval, Status


def noninferiority(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    *,
    paired: bool,
    better: Literal["higher", "lower"] = "higher",
    alpha: float = 0.05,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Is x worse than y by less than the margin?

    Args:
        x: [n] values under test (for instance the edited checkpoint's).
        y: [n] or [m] values to compare with, as in `difference_interval`.
        margin: the tolerated loss, > 0, in the unit of x, fixed before the data were seen.
        paired: as in `difference_interval`.
        better: the direction of a good value.
        alpha: probability of "met" when x is worse by exactly the margin, and of "not met" likewise.
        clusters: as in `difference_interval`.
        y_clusters: as in `difference_interval`.
        bounds: as in `difference_interval`.
        seed: as in `difference_interval`.

    Returns:
        "met" when the one-sided 1 - alpha limit excludes a loss of the margin, "not met" when the opposite limit
        shows at least that loss, else "inconclusive".

    Raises:
        UsageError: margin not positive, alpha not in (0, 0.5), or as `difference_interval`.
    """
    interval = _margin_interval(x, y, margin, alpha, paired, clusters, y_clusters, bounds, seed)
    best, worst = (interval.high, interval.low) if better == "higher" else (-interval.low, -interval.high)
    status: Status = "met" if worst > -margin else "not met" if best < -margin else "inconclusive"
    return Decision(status, _reason(interval, status, f"a worsening below {margin:g}"), margin, interval)


def equivalence(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    *,
    paired: bool,
    alpha: float = 0.05,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Two one-sided tests: do the means differ by less than the margin, either way?

    Two tests at alpha = 5 % pass exactly when the 90 % interval of the difference lies inside (-margin, margin). A
    difference that is merely not significant is "inconclusive" here.

    Args:
        x: as in `noninferiority`.
        y: as in `noninferiority`.
        margin: as in `noninferiority`.
        paired: as in `difference_interval`.
        alpha: size of each of the two tests.
        clusters: as in `difference_interval`.
        y_clusters: as in `difference_interval`.
        bounds: as in `difference_interval`.
        seed: as in `difference_interval`.

    Returns:
        "met" inside the margin, "not met" when the interval lies wholly outside, else "inconclusive".

    Raises:
        UsageError: as `noninferiority`.
    """
    interval = _margin_interval(x, y, margin, alpha, paired, clusters, y_clusters, bounds, seed)
    inside = -margin < interval.low and interval.high < margin
    outside = interval.high < -margin or interval.low > margin
    status: Status = "met" if inside else "not met" if outside else "inconclusive"
    return Decision(status, _reason(interval, status, f"a difference within ±{margin:g}"), margin, interval)


def _margin_interval(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    alpha: float,
    paired: bool,
    clusters: Clusters,
    y_clusters: Clusters,
    bounds: Bounds | None,
    seed: int,
) -> Interval:
    if not (0 < margin < math.inf and 0 < alpha < 0.5):
        raise UsageError(f"expected margin > 0 and 0 < alpha < 0.5, found {margin} and {alpha}; correct the criterion")
    return difference_interval(
        x, y, paired=paired, clusters=clusters, y_clusters=y_clusters, level=1 - 2 * alpha, bounds=bounds, seed=seed
    )


def _reason(interval: Interval, status: Status, claim: str) -> str:
    verb = {"met": "shows", "not met": "rules out", "inconclusive": "neither shows nor rules out"}[status]
    return f"the {interval.level:.0%} interval [{interval.low:.4g}, {interval.high:.4g}] {verb} {claim}"
