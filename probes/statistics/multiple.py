"""Several tests at once: adjusted p-values, and one p-value from many.

Papers: Holm 1979; Benjamini and Hochberg 1995; Fisher 1925; Rüschendorf 1982 (twice the median).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from probes.statistics.checks import probabilities
from probes.statistics.results import Floats


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's adjusted p-values: rejecting those <= alpha keeps the chance of any false rejection <= alpha.

    Args:
        pvalues: [k] p-values in [0, 1].

    Returns:
        [k] adjusted p-values, in the order given.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = probabilities(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def benjamini_hochberg(pvalues: ArrayLike) -> Floats:
    """Benjamini-Hochberg adjusted p-values: rejecting those <= q keeps the expected share of false ones <= q.

    Args:
        pvalues: [k] p-values in [0, 1], independent or positively dependent.

    Returns:
        [k] adjusted p-values, in the order given.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = probabilities(pvalues)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return adjusted


def fisher_combined(pvalues: ArrayLike) -> float:
    """One p-value for "none of these hypotheses is false", by Fisher's method: -2 sum ln p ~ chi-squared, 2 k degrees.

    Args:
        pvalues: [k] p-values in [0, 1] of independent tests. Discrete ones (a canary's rank / size, 0 of n) make the
            result larger than it need be, never too small.

    Returns:
        The combined p-value, in [0, 1]; 1 for no test.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = probabilities(pvalues)
    if not len(p):
        return 1.0
    if not p.all():
        return 0.0
    return float(special.gammaincc(len(p), -np.log(p).sum()))


def median_combined(pvalues: ArrayLike) -> float:
    """One p-value for repeats of a test on overlapping data (splits of one sample): twice the lower median, at most 1.

    Args:
        pvalues: [k] p-values in [0, 1], dependent on each other in any way.

    Returns:
        The combined p-value, in [0, 1]; 1 for no test. It holds its level under any dependence.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = np.sort(probabilities(pvalues))
    return min(1.0, 2.0 * float(p[(len(p) - 1) // 2])) if len(p) else 1.0
