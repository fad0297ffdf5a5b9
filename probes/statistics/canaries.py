"""Exposure of canaries, with the only law of forgetting that needs no retrained model.

A canary is drawn at random from a space of R equally likely fills; its rank is its place among all of them by the
model's likelihood, 1 = likeliest. exposure = log2 R - log2 rank, in bits. A model that never saw the canary ranks it
uniformly, so P(rank <= k) = k / R: the p-value of one canary is rank / R, exactly, and P(exposure >= b) <= 2^-b with
equality at the attainable values.

Paper: Carlini et al. 2019 (1802.08232).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from probes.errors import UsageError


def exposure(rank: int, size: int) -> float:
    """log2(size) - log2(rank), in bits: 0 for the least likely fill, log2(size) for the likeliest.

    Args:
        rank: 1 = likeliest; ties counted against the finding (the worst rank among equals).
        size: number of fills ranked, the canary included.

    Returns:
        The exposure, in [0, log2 size].

    Raises:
        UsageError: not 1 <= rank <= size.
    """
    _check(rank, size)
    return math.log2(size) - math.log2(rank)


def exposure_pvalue(rank: int, size: int) -> float:
    """P(a canary never seen ranks this well) = rank / size, exactly; equals 2^-exposure.

    Args:
        rank: as in `exposure`.
        size: as in `exposure`.

    Returns:
        The p-value, in (0, 1].

    Raises:
        UsageError: not 1 <= rank <= size.
    """
    _check(rank, size)
    return rank / size


def exposure_law(ranks: Sequence[int], sizes: Sequence[int], seed: int = 0) -> float:
    """p-value of the hypothesis that every rank is uniform in its space: "compatible with never seen" unless small.

    (rank - V) / size with V uniform in [0, 1) is exactly uniform in (0, 1] under the hypothesis, whatever the
    sizes; those values are compared with the uniform law by the exact two-sided Kolmogorov-Smirnov test. Two-sided:
    ranks that are all too bad, what is left after an edit that overshot, are seen as well.

    Args:
        ranks: [k] rank of each canary, independent of each other.
        sizes: [k] size of each canary's space.
        seed: of V. In spaces much larger than k it hardly moves the result.

    Returns:
        The p-value, in [0, 1]; 1 without canaries.

    Raises:
        UsageError: lists of different length, or a rank outside its space.
    """
    if len(ranks) != len(sizes):
        raise UsageError(
            f"expected a rank and a size for each canary, found {len(ranks)} and {len(sizes)}; pass one of each"
        )
    for rank, size in zip(ranks, sizes, strict=True):
        _check(rank, size)
    if not ranks:
        return 1.0
    from scipy.stats import kstwo  # half a second to load; nothing else in this package needs scipy.stats

    within = np.random.default_rng((seed, 4)).random(len(ranks))
    u = np.sort((np.asarray(ranks, dtype=np.float64) - within) / np.asarray(sizes, dtype=np.float64))  # [k]
    steps = np.arange(1, len(u) + 1) / len(u)
    distance = max(float((steps - u).max()), float((u - steps).max()) + 1 / len(u))
    return min(1.0, max(0.0, float(kstwo.sf(distance, len(u)))))


def _check(rank: int, size: int) -> None:
    if not 1 <= rank <= size:
        raise UsageError(f"expected 1 <= rank <= size, found rank {rank} of {size}; count the canary itself")
