"""Checks of arguments, shared by the package: levels, finite values, bounds, p-values, clusters."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.errors import UsageError
from probes.statistics.results import Alternative, Bounds, Clusters, Floats, Sided

OPPOSITE: dict[Sided, Sided] = {"two": "two", "upper": "lower", "lower": "upper"}


def tails(level: float, sided: Sided) -> tuple[float, float]:
    """Probability left below and above the interval."""
    if not 0 < level < 1:
        raise UsageError(f"expected a confidence level in (0, 1), found {level}; 0.95 is usual")
    if sided not in OPPOSITE:
        raise UsageError(f'expected sided "two", "upper" or "lower", found {sided!r}; correct it')
    alpha = round(1 - level, 12)  # 1 - 0.95 is 0.05, so that one-sided and two-sided limits agree to the last resample
    return {"two": (alpha / 2, alpha / 2), "upper": (0.0, alpha), "lower": (alpha, 0.0)}[sided]


def finite(x: ArrayLike, name: str) -> Floats:
    """[n] float64 values, refused when one is NaN or infinite, or when they are not a flat list."""
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1:
        raise UsageError(f"expected {name} as a flat list of numbers, found {values.ndim} dimensions; flatten it")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise UsageError(f"expected finite {name}, found {bad} of {len(values)} not finite; leave them out and say so")
    return values


def checked(bounds: Bounds | None, values: Floats) -> Bounds | None:
    """The bounds as floats, refused when a value lies outside."""
    if bounds is None:
        return None
    lo, hi = bounds
    outside = int(((values < lo) | (values > hi)).sum())
    if not -math.inf < lo < hi < math.inf or outside:
        raise UsageError(f"expected values within [{lo}, {hi}], found {outside} outside; correct the bounds")
    return float(lo), float(hi)


def probabilities(pvalues: ArrayLike) -> Floats:
    """[k] p-values, refused when one lies outside [0, 1]."""
    p = finite(pvalues, "p-values")
    checked((0.0, 1.0), p)
    return p


def check_alternative(alternative: Alternative) -> None:
    """Refuse anything but "greater" and "two-sided"."""
    if alternative not in ("greater", "two-sided"):
        raise UsageError(f'expected alternative "greater" or "two-sided", found {alternative!r}; correct it')


def codes_of(clusters: Clusters, n: int, name: str) -> NDArray[np.intp]:
    """[n] cluster numbers from 0 in order of first appearance; None (or a table's NaN) is a cluster of its own."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise UsageError(f"expected {name} for {n} values, found {len(clusters)}; pass one for each value")
    seen: dict[Hashable, int] = {}
    own = [c is None or c != c for c in clusters]
    keys: list[Hashable] = [(i,) if alone else (0, c) for i, (c, alone) in enumerate(zip(clusters, own, strict=True))]
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.intp)
