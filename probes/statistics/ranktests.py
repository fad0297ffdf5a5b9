"""Do scores separate members from non-members at all: p-values of an AUC, and where it falls when they do not.

The AUC is Mann and Whitney's U / (m n). Given the pooled scores, ties included, every choice of m of the m + n ranks
is equally likely when members and non-members come from the same law, so the law of the rank sum is found exactly by
counting (one pass over the ranks, number of choices by size and sum). Large samples use the normal law with the tie
correction. Where records come in clusters, whole clusters trade places at random, and the AUC is divided by its
clustered standard error before it is compared, so that clusters of unequal size hold the level too.

Papers: Mann and Whitney 1947; Lehmann 1975 (ties); Obuchowski 1997 (clustered variance); Chung and Romano 2013
(studentised permutation tests).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from probes.errors import UsageError
from probes.statistics import resampling
from probes.statistics.checks import check_alternative, codes_of, finite, tails
from probes.statistics.ranking import midranks
from probes.statistics.resampling import RESAMPLES, permuted_sides
from probes.statistics.results import Alternative, Clusters, Floats, Interval

_EXACT = 6000  # smaller side times all records; counting takes below 0.1 s up to here, the normal law does beyond


def auc_pvalue(
    pos: ArrayLike,
    neg: ArrayLike,
    *,
    pos_clusters: Clusters = None,
    neg_clusters: Clusters = None,
    alternative: Alternative = "greater",
    seed: int = 0,
    n_permutations: int = RESAMPLES,
) -> float:
    """p-value of the hypothesis that members and non-members have scores of the same law.

    Args:
        pos: [m] scores of members, higher = more likely a member.
        neg: [n] scores of non-members.
        pos_clusters: [m] clusters of the members, None for a record of its own. A cluster lies on one side: the same
            name on both sides means two clusters.
        neg_clusters: [n] clusters of the non-members.
        alternative: "greater" (members score higher), or "two-sided".
        seed: of the permutations of clusters; nothing else is random.
        n_permutations: permutations where there are clusters; the smallest p-value is then 1 / (n_permutations + 1).

    Returns:
        The p-value, in (0, 1]; 1 when a side is empty or all scores are equal. Exact for small samples, ties
        included; by the normal law for large ones. With clusters: exact when clusters of both sides come from one
        law, approximate when their sizes differ (up to twice the level with 5 clusters of 1 or 20 records on a side).

    Raises:
        UsageError: non-finite scores, clusters of the wrong length, an unknown alternative.
    """
    x, y = finite(pos, "pos"), finite(neg, "neg")
    check_alternative(alternative)
    x_codes, y_codes = codes_of(pos_clusters, len(x), "pos_clusters"), codes_of(neg_clusters, len(y), "neg_clusters")
    if not len(x) or not len(y):
        return 1.0
    groups = int(x_codes.max()) + 1, int(y_codes.max()) + 1
    if groups != (len(x), len(y)):
        return _clustered(x, y, x_codes, y_codes, alternative, seed, n_permutations)
    ranks = midranks(np.concatenate([x, y]))  # [m + n]
    if min(len(x), len(y)) * len(ranks) <= _EXACT:
        greater, less = _exact(ranks, len(x))
    else:
        greater, less = _normal(ranks, len(x))
    return min(1.0, greater if alternative == "greater" else 2 * min(greater, less))


def auc_null_interval(m: int, n: int, level: float = 0.95) -> Interval:
    """Where the AUC of scores that separate nothing falls, with m members and n non-members.

    Args:
        m: members; the number of clusters where records come in clusters.
        n: non-members, likewise.
        level: the probability of falling inside, at least (exactly that much for large samples without ties).

    Returns:
        value 0.5, symmetric limits in [0, 1], n = m + n. [0, 1] when a side is empty. Tied scores vary less.

    Raises:
        UsageError: a negative count, or level outside (0, 1).
    """
    below, _ = tails(level, "two")
    if m < 0 or n < 0:
        raise UsageError(f"expected counts of members and non-members, found {m} and {n}; count the scores")
    if not m or not n:
        return Interval(0.5, 0.0, 1.0, level, m + n, "no data")
    if min(m, n) * (m + n) <= _EXACT:
        law = _rank_sum_law(tuple(range(m + n)), min(m, n))  # [sums]
        smallest = min(m, n) * (min(m, n) - 1) // 2
        inside = int(np.searchsorted(np.cumsum(law[smallest:]), below * (1 + 1e-9), side="right"))  # U below it: a tail
        low, method = inside / (m * n), "mann-whitney, exact"
    else:
        spread = math.sqrt((m + n + 1) / (12 * m * n))
        low = 0.5 + float(special.ndtri(below)) * spread - 0.5 / (m * n)
        method = "mann-whitney, normal"
    low = max(0.0, low)
    return Interval(0.5, low, 1.0 - low, level, m + n, method)


def _exact(ranks: Floats, m: int) -> tuple[float, float]:
    """P(U >= u) and P(U <= u) when any m of the ranks are equally likely; the first m are the observed ones."""
    whole = np.round((ranks - ranks.min()) * 2).astype(np.int64)  # mid-ranks are multiples of one half
    if not (whole % 2).any():
        whole //= 2
    if 2 * m <= len(ranks):
        law = _rank_sum_law(tuple(sorted(whole.tolist())), m)
        at = int(whole[:m].sum())
        return float(law[at:].sum()), float(law[: at + 1].sum())
    law = _rank_sum_law(tuple(sorted(whole.tolist())), len(ranks) - m)  # the other side's sum is small when U is large
    at = int(whole[m:].sum())
    return float(law[: at + 1].sum()), float(law[at:].sum())


@lru_cache(maxsize=16)
def _rank_sum_law(ranks: tuple[int, ...], m: int) -> Floats:
    """[sums] probability of each sum of m of these ranks, all choices equally likely."""
    top = sum(ranks[len(ranks) - m :])  # ranks are sorted
    ways = np.zeros((m + 1, top + 1))  # [chosen, sum]
    ways[0, 0] = 1.0
    for rank in ranks:
        if rank <= top:
            ways[1:, rank:] += ways[:-1, : top + 1 - rank]
    law: Floats = ways[m] / ways[m].sum()
    law.flags.writeable = False  # shared by every caller
    return law


def _normal(ranks: Floats, m: int) -> tuple[float, float]:
    """The same by the normal law, with ties and a continuity correction."""
    total = len(ranks)
    n = total - m
    _, ties = np.unique(ranks, return_counts=True)
    variance = m * n / 12 * (total + 1 - float((ties.astype(float) ** 3 - ties).sum()) / (total * (total - 1)))
    if variance <= 1e-9:
        return 1.0, 1.0
    shift = float(ranks[:m].sum()) - m * (total + 1) / 2
    spread = math.sqrt(variance)
    return float(special.ndtr((0.5 - shift) / spread)), float(special.ndtr((0.5 + shift) / spread))


def _clustered(
    x: Floats,
    y: Floats,
    x_codes: NDArray[np.intp],
    y_codes: NDArray[np.intp],
    alternative: Alternative,
    seed: int,
    n_permutations: int,
) -> float:
    """(1 + permutations that separate at least as well) / (1 + permutations)."""
    members = int(x_codes.max()) + 1
    codes = np.concatenate([x_codes, y_codes + members])
    groups = int(codes.max()) + 1
    statistic = _Studentised(np.concatenate([x, y]), codes)
    observed = float(statistic.of(np.arange(groups)[None, :] < members)[0])
    if alternative == "two-sided":
        observed = abs(observed)
    reached = 0
    for sides in permuted_sides(members, groups, n_permutations, seed, resampling.CHUNK // len(codes) + 1):
        t = statistic.of(sides)
        if alternative == "two-sided":
            t = np.abs(t)
        reached += int((t >= observed - 1e-9 * max(1.0, abs(observed))).sum())
    return (1 + reached) / (1 + n_permutations)


class _Studentised:
    """(AUC - 1/2) over its clustered standard error, for many assignments of clusters to sides at a time."""

    def __init__(self, scores: Floats, codes: NDArray[np.intp]) -> None:
        _, self.places = np.unique(scores, return_inverse=True)  # [N] which distinct score
        self.codes = codes
        self.by_score = np.argsort(self.places, kind="stable")
        self.score_starts = np.unique(self.places[self.by_score], return_index=True)[1]  # [K]
        self.by_cluster = np.argsort(codes, kind="stable")
        self.cluster_starts = np.unique(codes[self.by_cluster], return_index=True)[1]  # [G]

    def of(self, sides: NDArray[np.bool_]) -> Floats:
        """[B] statistics of [B, G] assignments (True = members)."""
        z = sides[:, self.codes]  # [B, N]
        here = np.add.reduceat(z[:, self.by_score].astype(np.float64), self.score_starts, axis=1)  # [B, K] members
        there = np.bincount(self.places) - here  # [B, K] non-members
        m, n = here.sum(axis=1)[:, None], there.sum(axis=1)[:, None]  # [B, 1]
        below = (np.cumsum(there, axis=1) - there / 2) / n  # [B, K] share of non-members below each score
        above = 1 - (np.cumsum(here, axis=1) - here / 2) / m  # [B, K] share of members above it
        area = (here * below).sum(axis=1)[:, None] / m  # [B, 1]
        parts = np.where(z, (below[:, self.places] - area) / m, (above[:, self.places] - area) / n)  # [B, N]
        sums = np.add.reduceat(parts[:, self.by_cluster], self.cluster_starts, axis=1)  # [B, G]
        variance = np.zeros(len(sides))
        for side in (sides, ~sides):
            count = side.sum(axis=1)
            variance += (sums**2 * side).sum(axis=1) * count / np.maximum(count - 1, 1)
        t: Floats = (area[:, 0] - 0.5) / np.sqrt(np.maximum(variance, 1e-24))
        return t
