"""What an edit left of an attack's success, (U - N) / (O - N), as a ratio with an honest interval (Fieller)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from probes.errors import UsageError
from probes.statistics.checks import checked, finite, tails
from probes.statistics.differences import mover
from probes.statistics.means import Sample
from probes.statistics.resampling import RESAMPLES
from probes.statistics.results import Bounds, Clusters, Estimate, Interval

MIN_GAP = 0.2  # a residual divides by O - N; below this the attack did not tell the records apart to begin with


def residual(
    o: ArrayLike,
    u: ArrayLike,
    n: ArrayLike,
    *,
    clusters: Clusters = None,
    n_clusters: Clusters = None,
    level: float = 0.95,
    bounds: Bounds | None = (0.0, 1.0),
    min_gap: float = MIN_GAP,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Estimate:
    """What the edit left of an attack's success: (U - N) / (O - N), 0 = as never seen, 1 = as before.

    The interval holds the values r for which mean(u - r o) - (1 - r) mean(n) = 0 cannot be excluded (Fieller's
    argument), so it is honest, up to infinite, when O - N is uncertain. Forget records are resampled together with
    both their figures; control records apart.

    Args:
        o: [F] figure of the original checkpoint on the forget records, higher = more of the record.
        u: [F] figure of the edited checkpoint on the same records, in the same order.
        n: [C] figure of the edited checkpoint on control records.
        clusters: [F] clusters of the forget records.
        n_clusters: [C] clusters of the control records.
        level: confidence level.
        bounds: the smallest and largest possible figure; None for an unbounded one.
        min_gap: smallest O - N that can be tested.
        seed: makes the result reproducible.
        n_resamples: bootstrap resamples.

    Returns:
        The interval (n = F + C), or "not testable" where O - N is below min_gap or a set is empty.

    Raises:
        UsageError: as `mean_interval`, or o and u of different lengths.
    """
    before, after, control = finite(o, "o"), finite(u, "u"), finite(n, "n")
    bounds = checked(bounds, np.concatenate([before, after, control]))
    if len(before) != len(after):
        raise UsageError(f"expected O and U on the same records, found {len(before)} and {len(after)}; align them")
    tails(level, "two")
    forget = Sample(np.column_stack([after, before]), clusters, "clusters", (seed, 0), n_resamples)
    control_sample = Sample(control[:, None], n_clusters, "n_clusters", (seed, 1), n_resamples)
    if not forget.n or not control_sample.n:
        return Estimate("not testable", "no records in the forget or the control set", None)
    u_mean, o_mean = forget.means
    n_mean = float(control_sample.means[0])
    gap = float(o_mean) - n_mean
    if gap < min_gap:
        return Estimate("not testable", f"O - N = {gap:.3g} is below {min_gap:g}", None)
    value = (float(u_mean) - n_mean) / gap
    never_seen = control_sample.interval(np.ones(1), level, "two", bounds)

    def contrast(r: float) -> Interval:
        if bounds:
            ends = sorted((r * bounds[0], r * bounds[1]))
            span = (bounds[0] - ends[1], bounds[1] - ends[0])
        left = forget.interval(np.array([1.0, -r]), level, "two", span if bounds else None)
        return mover(left, never_seen, r - 1.0)

    # The contrast falls with r: the upper limit is where its own upper limit reaches zero, and the other way round.
    high = _crossing(lambda r: contrast(r).high, value, 1.0)
    low = _crossing(lambda r: -contrast(r).low, value, -1.0)
    return Estimate("ok", None, Interval(value, low, high, level, forget.n + control_sample.n, "fieller, bootstrap-t"))


def _crossing(f: Callable[[float], float], start: float, direction: float) -> float:
    """Where f, which is not negative at `start`, becomes negative in this direction; infinite if it does not."""
    inside, step = start, 0.125
    while f(outside := start + direction * step) >= 0:
        inside, step = outside, step * 2
        if step > 1e6:
            return direction * math.inf
    while abs(outside - inside) > 1e-6 * max(1.0, abs(outside)):
        middle = (inside + outside) / 2
        if f(middle) >= 0:
            inside = middle
        else:
            outside = middle
    return outside
