"""Distribution-free statements from a sample: conformal p-values and the band of a distribution function.

Papers: Vovk, Gammerman and Shafer 2005 (conformal p-values); Dvoretzky, Kiefer and Wolfowitz 1956 with the constant
of Massart 1990.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from probes.statistics.checks import finite, tails
from probes.statistics.results import Floats


def conformal_pvalues(scores: ArrayLike, calibration: ArrayLike) -> Floats:
    """(1 + #{calibration >= s}) / (n + 1): p-values of "this record is like the calibration records".

    Args:
        scores: [k] scores, higher = less like the calibration records.
        calibration: [n] scores of records for which the hypothesis holds, exchangeable with a tested record that
            fulfils it. One sample serves all k tests, whose p-values are positively dependent, which
            Benjamini-Hochberg allows (Bates et al. 2023).

    Returns:
        [k] p-values in [1 / (n + 1), 1]; P(p <= a) <= a for each, at any n, ties included. All 1 where n = 0.

    Raises:
        UsageError: non-finite scores.
    """
    s, reference = finite(scores, "scores"), np.sort(finite(calibration, "calibration"))
    reached = len(reference) - np.searchsorted(reference, s, side="left")  # [k]
    pvalues: Floats = (1.0 + reached) / (len(reference) + 1)
    return pvalues


def dkw(x: ArrayLike, level: float = 0.95) -> float:
    """Half-width of the band that holds the whole distribution function: sqrt(ln(2 / alpha) / (2 n)).

    Args:
        x: [n] independent values.
        level: probability that |F_n(t) - F(t)| <= half-width for all t at once, at least.

    Returns:
        The half-width, in (0, 1]; 1 (nothing is known) for n = 0.

    Raises:
        UsageError: non-finite values, or level outside (0, 1).
    """
    _, alpha = tails(level, "upper")
    n = len(finite(x, "x"))
    return min(1.0, math.sqrt(math.log(2 / alpha) / (2 * n))) if n else 1.0
