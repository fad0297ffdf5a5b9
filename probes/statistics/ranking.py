"""How well scores separate members from non-members: the area under the ROC curve.

Papers: DeLong, DeLong and Clarke-Pearson 1988, with the mid-ranks of Sun and Xu 2014.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from probes.errors import UsageError
from probes.statistics import resampling
from probes.statistics.checks import codes_of, finite, tails
from probes.statistics.means import near_constant
from probes.statistics.resampling import RESAMPLES, weights_of
from probes.statistics.results import Clusters, Estimate, Floats, Interval

MIN_PER_SIDE = 50  # an AUC from fewer has a null standard deviation above 0.058


def auc(
    pos: ArrayLike,
    neg: ArrayLike,
    *,
    pos_clusters: Clusters = None,
    neg_clusters: Clusters = None,
    method: Literal["delong", "bootstrap"] = "delong",
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Estimate:
    """Area under the ROC curve, P(pos > neg) + P(pos = neg) / 2.

    The DeLong interval is formed for logit(AUC), so it stays inside (0, 1) and holds its level near 1. Perfect
    separation and scores that are all equal have no variance to estimate: then the min(m, n) disjoint pairs, all
    with the same outcome, bound the AUC as k of k trials do.

    Args:
        pos: [m] scores of members, higher = more likely a member.
        neg: [n] scores of non-members.
        pos_clusters: [m] clusters; clustered scores need method="bootstrap".
        neg_clusters: [n] clusters.
        method: "delong", or "bootstrap": percentile interval, members and non-members resampled apart.
        level: confidence level.
        seed: of the bootstrap.
        n_resamples: bootstrap resamples.

    Returns:
        The interval (n = m + n), or "not resolvable" below 50 records, or 50 clusters, on a side.

    Raises:
        UsageError: non-finite scores, clusters of the wrong length, or clusters with DeLong.
    """
    below, above = tails(level, "two")
    x, y = finite(pos, "pos"), finite(neg, "neg")
    if method == "delong" and not (pos_clusters is None and neg_clusters is None):
        raise UsageError('expected independent scores for DeLong, found clusters; use method="bootstrap"')
    x_codes, y_codes = codes_of(pos_clusters, len(x), "pos_clusters"), codes_of(neg_clusters, len(y), "neg_clusters")
    sides = len(np.unique(x_codes)), len(np.unique(y_codes))
    if min(sides) < MIN_PER_SIDE:
        reason = f"{sides[0]} independent members and {sides[1]} non-members; {MIN_PER_SIDE} a side are needed"
        return Estimate("not resolvable", reason, None)
    ranks = midranks(np.concatenate([x, y]))
    over = (ranks[: len(x)] - midranks(x)) / len(y)  # [m] share of non-members below each member
    under = 1 - (ranks[len(x) :] - midranks(y)) / len(x)  # [n] share of members above each non-member
    value = float(over.mean())
    variance = float(over.var(ddof=1) / len(x) + under.var(ddof=1) / len(y))
    if variance <= 1e-24:
        low, high = near_constant(np.full(min(sides), value), np.arange(min(sides)), below, above, 0.0, 1.0)
        name = "clopper-pearson on disjoint pairs"
    elif method == "delong":
        half = -float(special.ndtri(below)) * math.sqrt(variance) / (value * (1 - value))
        low, high = special.expit(special.logit(value) - half), special.expit(special.logit(value) + half)
        name = "delong, logit"
    else:
        resampled = _resampled_aucs(x, y, x_codes, y_codes, seed, n_resamples)
        low, high = np.quantile(resampled, [below, 1 - above])
        name = "bootstrap-percentile, stratified"
    return Estimate("ok", None, Interval(value, float(low), float(high), level, len(x) + len(y), name))


def midranks(x: Floats) -> Floats:
    """1-based ranks, ties sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _resampled_aucs(
    x: Floats, y: Floats, x_codes: NDArray[np.intp], y_codes: NDArray[np.intp], seed: int, n_resamples: int
) -> Floats:
    """AUC of every resample, from the weight each resample gives to each distinct score."""
    distinct, places = np.unique(np.concatenate([x, y]), return_inverse=True)

    def weights(place: NDArray[np.intp], codes: NDArray[np.intp], stream: int) -> Iterator[Floats]:
        order = np.argsort(place, kind="stable")
        present, starts = np.unique(place[order], return_index=True)
        for w in weights_of(
            int(codes.max()) + 1, n_resamples, (seed, stream), rows=resampling.CHUNK // (len(x) + len(y)) + 1
        ):
            by_score = np.zeros((len(w), len(distinct)))  # [chunk, distinct scores]
            by_score[:, present] = np.add.reduceat(w[:, codes[order]], starts, axis=1)
            yield by_score

    aucs = []
    for p, q in zip(weights(places[: len(x)], x_codes, 0), weights(places[len(x) :], y_codes, 1), strict=True):
        wins = (p * (np.cumsum(q, axis=1) - q / 2)).sum(axis=1)
        aucs.append(wins / (p.sum(axis=1) * q.sum(axis=1)))
    return np.concatenate(aucs)
