"""Helpers of the statistics tests: limits of an interval, coverage by simulation."""

from __future__ import annotations

import numpy as np
from scipy import stats

from probes.statistics import Estimate, Interval

UNIT = (0.0, 1.0)


def limits(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def not_below(hits: int, repetitions: int, rate: float) -> bool:
    """Whether `hits` of `repetitions` is compatible with at least this rate (one wrong alarm in 10,000)."""
    return bool(stats.binomtest(hits, repetitions, rate, alternative="less").pvalue > 1e-4)


def not_above(hits: int, repetitions: int, rate: float) -> bool:
    """Whether `hits` of `repetitions` is compatible with at most this rate (one wrong alarm in 10,000)."""
    return bool(stats.binomtest(hits, repetitions, rate, alternative="greater").pvalue > 1e-4)


def coverage(draw, truth: float, repetitions: int = 500) -> tuple[int, int]:
    """Intervals that hold the truth, of those that were given."""
    rng = np.random.default_rng(20)
    given = hits = 0
    for i in range(repetitions):
        interval = draw(rng, i)
        if isinstance(interval, Estimate):
            interval = interval.interval
        if interval is not None:
            given += 1
            hits += interval.low <= truth <= interval.high
    return hits, given
