"""Rates: exact binomial intervals (Clopper and Pearson 1934), the worst of several records, trials needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from probes.errors import UsageError
from probes.statistics.checks import tails
from probes.statistics.results import Interval, Sided


def clopper_pearson(k: int, n: int, level: float = 0.95, sided: Sided = "two") -> Interval:
    """Exact binomial interval for k hits out of n.

    Args:
        k: hits, 0 <= k <= n.
        n: independent trials; with n = 0 nothing is known: value NaN, interval [0, 1].
        level: confidence level.
        sided: "two", or one-sided: "upper" bounds the rate from above (low = 0), "lower" from below (high = 1).

    Returns:
        The interval, in [0, 1]. It covers with at least its level, for every rate and n.

    Raises:
        UsageError: k outside 0..n or level outside (0, 1).
    """
    below, above = tails(level, sided)
    if not 0 <= k <= n:
        raise UsageError(f"expected 0 <= k <= n, found k = {k}, n = {n}; count hits among the trials")
    low = float(special.betaincinv(k, n - k + 1, below)) if k > 0 and below > 0 else 0.0
    high = float(special.betainccinv(k + 1, n - k, above)) if k < n and above > 0 else 1.0
    return Interval(k / n if n else math.nan, low, high, level, n, "clopper-pearson")


def worst_of(k_per_record: Sequence[int], n_per_record: Sequence[int], level: float = 0.95) -> Interval:
    """Simultaneous upper bound on the highest rate among R records (Bonferroni: each at alpha / R).

    Args:
        k_per_record: [R] hits of each record.
        n_per_record: [R] trials of each record; a record without trials bounds nothing (high = 1).
        level: level at which the bound holds for all records together.

    Returns:
        value = the highest observed rate, [0, high]; n = R.

    Raises:
        UsageError: lists of different length, impossible counts, or level outside (0, 1).
    """
    if len(k_per_record) != len(n_per_record):
        raise UsageError(
            f"expected hits and trials for the same records, found {len(k_per_record)} and {len(n_per_record)}; "
            "pass one of each for every record"
        )
    tails(level, "upper")
    records = len(k_per_record)
    each = [
        clopper_pearson(k, n, 1 - (1 - level) / records, "upper")
        for k, n in zip(k_per_record, n_per_record, strict=True)
    ]
    value = max((interval.value for interval in each if interval.n), default=math.nan)
    high = max((interval.high for interval in each), default=1.0)
    return Interval(value, 0.0, high, level, records, "clopper-pearson, simultaneous")


def required_n(p_max: float, level: float = 0.95, records: int = 1) -> int:
    """Trials needed for each record so that 0 hits bound the worst rate by p_max: n >= ln(alpha / R) / ln(1 - p_max).

    Args:
        p_max: the rate to exclude, in (0, 1).
        level: simultaneous level over all records.
        records: R, the number of records the bound must hold for together.

    Returns:
        The smallest such n.

    Raises:
        UsageError: p_max or level outside (0, 1), or fewer than one record.
    """
    tails(level, "upper")
    if not 0 < p_max < 1 or records < 1:
        raise UsageError(f"expected 0 < p_max < 1 and records >= 1, found {p_max} and {records}; correct the policy")
    needed = math.log((1 - level) / records) / math.log1p(-p_max)
    return math.ceil(needed * (1 - 1e-12))  # an exact solution must not be rounded up by the last bit of a logarithm
