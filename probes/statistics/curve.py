"""The ROC curve, and the true-positive rate at one false-positive rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.errors import UsageError
from probes.statistics.checks import finite, tails
from probes.statistics.rates import clopper_pearson
from probes.statistics.results import Floats, OperatingPoint


@dataclass(frozen=True, slots=True, eq=False)
class Roc:
    """Step curve of true-positive over false-positive rate, from (0, 0) to (1, 1); tied scores are one step.

    Attributes:
        fpr: [k] share of non-members with a score of at least the threshold, rising.
        tpr: [k] share of members likewise.
        thresholds: [k] falling; infinite at (0, 0).
    """

    fpr: Floats
    tpr: Floats
    thresholds: Floats

    def points(self, n: int = 200) -> tuple[Floats, Floats]:
        """(fpr, tpr) of at most n points of the curve, (0, 0) and (1, 1) among them, for a drawing with a log axis.

        Where a false-positive rate is kept, so are both ends of the rise above it. Kept rates are spaced evenly in
        log fpr, which keeps every one of the lowest (about the first n / (2 ln N) of N non-members, and all where
        they fit).

        Raises:
            UsageError: n below 6.
        """
        if n < 6:
            raise UsageError(f"expected at least 6 points, found {n}; ask for more")
        rates, first = np.unique(self.fpr, return_index=True)  # [d] distinct rates, where each begins
        last = np.append(first[1:], len(self.fpr)) - 1  # [d]
        room = n // 2
        if len(rates) > room:
            wanted = np.geomspace(rates[1], 1.0, room - 1)
            chosen = np.unique(np.append(0, np.searchsorted(rates, wanted * (1 - 1e-12))))
            spare = np.setdiff1d(np.arange(len(rates)), chosen)[: room - len(chosen)]  # rounding merged some: low ones
            chosen = np.union1d(chosen, spare)
            first, last = first[chosen], last[chosen]
        kept = np.unique(np.concatenate([first, last]))
        return self.fpr[kept], self.tpr[kept]


def roc(pos: ArrayLike, neg: ArrayLike) -> Roc:
    """The ROC curve of scores, one point for each distinct score.

    Args:
        pos: [m] scores of members, higher = more likely a member.
        neg: [n] scores of non-members.

    Returns:
        The curve; its area by trapezoids is the AUC.

    Raises:
        UsageError: non-finite scores, or an empty side.
    """
    x, y = finite(pos, "pos"), finite(neg, "neg")
    if not len(x) or not len(y):
        raise UsageError(f"expected members and non-members, found {len(x)} and {len(y)}; a curve needs both")
    distinct, places = np.unique(np.concatenate([x, y]), return_inverse=True)

    def above(place: NDArray[np.intp]) -> Floats:
        counts = np.bincount(place, minlength=len(distinct))[::-1]
        return np.append(0.0, np.cumsum(counts) / len(place))

    return Roc(above(places[len(x) :]), above(places[: len(x)]), np.append(math.inf, distinct[::-1]))


def tpr_at_fpr(
    pos: ArrayLike, neg: ArrayLike, fpr: float = 0.01, *, level: float = 0.95, seed: int = 0
) -> OperatingPoint:
    """True-positive rate at a false-positive rate of at most `fpr`.

    A random half of the non-members sets the threshold: the r-th largest of its h scores, r = floor(fpr (h + 1)). A
    new non-member exceeds that with probability at most fpr. The other half measures the rate that was achieved.

    Args:
        pos: [m] scores of members, higher = more likely a member; a score counts when it exceeds the threshold.
        neg: [n] scores of non-members.
        fpr: the false-positive rate, in (0, 1).
        level: confidence level of both intervals.
        seed: of the split.

    Returns:
        Both rates with Clopper-Pearson intervals, or "not resolvable" below 10 / fpr non-members or without members.

    Raises:
        UsageError: non-finite scores, fpr or level outside (0, 1).
    """
    tails(level, "two")
    x, y = finite(pos, "pos"), finite(neg, "neg")
    if not 0 < fpr < 1:
        raise UsageError(f"expected a false-positive rate in (0, 1), found {fpr}; correct it")
    needed = math.ceil(10 / fpr * (1 - 1e-12))
    if len(y) < needed or not len(x):
        reason = f"{len(x)} members and {len(y)} non-members; {needed} non-members resolve a rate of {fpr:g}"
        return OperatingPoint("not resolvable", reason, None, None, None)
    order = np.random.default_rng((seed, 2)).permutation(len(y))
    chosen, measured = y[order[: len(y) // 2]], y[order[len(y) // 2 :]]
    threshold = float(np.sort(chosen)[-math.floor(fpr * (len(chosen) + 1))])
    hits, alarms = int((x > threshold).sum()), int((measured > threshold).sum())
    return OperatingPoint(
        "ok",
        None,
        clopper_pearson(hits, len(x), level),
        clopper_pearson(alarms, len(measured), level),
        threshold,
    )
