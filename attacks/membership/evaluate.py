"""What a membership score is worth: AUC, operating points and p-value, against records that were never seen.

`evaluate` takes one score on members and non-members. `choose` takes several: the best on one half of the records is
reported on the other, because the best of many scores on the records it was chosen on flatters itself; p-values of all
of them on the second half are adjusted by Holm. Halves share no near-duplicate cluster.

Everything statistical is `probes.statistics`. Read the blind test first (`attacks.membership.blind`): where the sets
differ by more than membership, so do the figures here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.folds import chosen, folds, needed, representatives
from probes.errors import UsageError
from probes.statistics import (
    Alternative,
    Clusters,
    Estimate,
    Interval,
    OperatingPoint,
    Roc,
    auc,
    auc_null_interval,
    auc_pvalue,
    holm,
    roc,
    tpr_at_fpr,
)

Floats = NDArray[np.float64]
FPRS = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Membership:
    """One score on members and non-members.

    Attributes:
        auc: area under the ROC curve, or why there is none.
        null: where the AUC of a score that separates nothing falls; None without records on both sides.
        pvalue: of the hypothesis that members score like non-members; None likewise.
        points: false-positive rate -> true-positive rate at it, or why it cannot be resolved.
        roc: the curve; None likewise.
        n_members: records.
        n_others: records.
        groups: independent records, or clusters, of both sides.
    """

    auc: Estimate
    null: Interval | None
    pvalue: float | None
    points: dict[float, OperatingPoint]
    roc: Roc | None = field(repr=False)
    n_members: int
    n_others: int
    groups: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of several scores, chosen on one half of the records and evaluated on the other.

    Attributes:
        best: its name; None where the data cannot give one.
        evaluation: of the best score, on the second half.
        areas: AUC of every score on the first half, without an interval: they only choose.
        pvalues: of every score on the second half.
        adjusted: the same by Holm, over all scores.
        status: "ok", or "not resolvable" without records of both kinds in both halves.
        reason: why not.
    """

    best: str | None
    evaluation: Membership | None
    areas: dict[str, float]
    pvalues: dict[str, float]
    adjusted: dict[str, float]
    status: Literal["ok", "not resolvable"]
    reason: str | None


def evaluate(
    pos: ArrayLike,
    neg: ArrayLike,
    *,
    pos_clusters: Clusters = None,
    neg_clusters: Clusters = None,
    fprs: Sequence[float] = FPRS,
    alternative: Alternative = "greater",
    level: float = 0.95,
    seed: int = 0,
) -> Membership:
    """Evaluate one score.

    Args:
        pos: [m] scores of members, higher = more likely a member. Infinite ones rank beyond all others.
        neg: [n] scores of non-members.
        pos_clusters: [m] near-duplicate clusters, None for a record of its own.
        neg_clusters: [n] the same.
        fprs: false-positive rates to report the true-positive rate at.
        alternative: of the p-value. "greater" asks whether members score higher; after an edit "two-sided", because
            scores that fall below never-seen records give the edited ones away as well.
        level: of every interval.
        seed: of bootstraps, permutations and splits.

    Returns:
        The figures. The AUC takes a bootstrap over clusters where there are any, DeLong's interval otherwise;
        operating points take one record of each cluster, so that their exact intervals hold.

    Raises:
        UsageError: scores that are NaN, clusters of the wrong length, rates outside (0, 1).
    """
    x, y = _ranked(pos, neg)
    ours, theirs = (representatives(len(s), c, seed) for s, c in ((x, pos_clusters), (y, neg_clusters)))
    pos_clusters, neg_clusters = needed(pos_clusters), needed(neg_clusters)
    method: Literal["delong", "bootstrap"] = "delong"
    if pos_clusters is not None or neg_clusters is not None:
        method = "bootstrap"
    pvalue = auc_pvalue(x, y, pos_clusters=pos_clusters, neg_clusters=neg_clusters, alternative=alternative, seed=seed)
    both = len(x) > 0 and len(y) > 0
    return Membership(
        auc=auc(x, y, pos_clusters=pos_clusters, neg_clusters=neg_clusters, method=method, level=level, seed=seed),
        null=auc_null_interval(len(ours), len(theirs), level) if both else None,
        pvalue=pvalue if both else None,
        points={fpr: tpr_at_fpr(x[ours], y[theirs], fpr, level=level, seed=seed) for fpr in fprs},
        roc=roc(x, y) if both else None,
        n_members=len(x),
        n_others=len(y),
        groups=(len(ours), len(theirs)),
    )


def choose(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    pos_clusters: Clusters = None,
    neg_clusters: Clusters = None,
    fprs: Sequence[float] = FPRS,
    level: float = 0.95,
    seed: int = 0,
) -> Choice:
    """Choose the best of several scores on half of the records and evaluate it on the rest.

    Args:
        scores: name -> (scores of members, scores of non-members), records in the same order under every name.
        pos_clusters: as in `evaluate`; a name in both lists is one cluster, and stays in one half.
        neg_clusters: as in `evaluate`.
        fprs: as in `evaluate`.
        level: as in `evaluate`.
        seed: as in `evaluate`, and of the halves.

    Returns:
        The best score by AUC on the first half (the first of equals), with its figures on the second, which know
        nothing of the choice, and one-sided p-values of all scores there.

    Raises:
        UsageError: no scores, scores of different records, or as `evaluate`.
    """
    if not scores:
        raise UsageError("expected membership scores to choose from, found none; name at least one")
    ranked = {name: _ranked(*pair) for name, pair in scores.items()}
    sizes = {(len(x), len(y)) for x, y in ranked.values()}
    if len(sizes) > 1:
        raise UsageError(f"expected scores of the same records, found {len(sizes)} different counts; align them")
    m, n = next(iter(sizes))
    halves = folds(m, n, pos_clusters, neg_clusters, 2, seed)
    counts = [int((half == part).sum()) for part in (0, 1) for half in halves]
    if min(counts) == 0:
        reason = f"{m} members and {n} non-members do not fill two halves without common clusters"
        return Choice(None, None, {}, {}, {}, "not resolvable", reason)
    first = {name: [s[half == 0] for s, half in zip(pair, halves, strict=True)] for name, pair in ranked.items()}
    second = {name: [s[half == 1] for s, half in zip(pair, halves, strict=True)] for name, pair in ranked.items()}
    second_clusters = [chosen(c, half == 1) for c, half in zip((pos_clusters, neg_clusters), halves, strict=True)]
    areas = {name: _area(*pair) for name, pair in first.items()}
    best = max(areas, key=lambda name: areas[name])
    pvalues = {
        name: auc_pvalue(
            *pair, pos_clusters=needed(second_clusters[0]), neg_clusters=needed(second_clusters[1]), seed=seed
        )
        for name, pair in second.items()
    }
    adjusted = dict(zip(pvalues, holm(list(pvalues.values())).tolist(), strict=True))
    evaluation = evaluate(
        *second[best],
        pos_clusters=second_clusters[0],
        neg_clusters=second_clusters[1],
        fprs=fprs,
        level=level,
        seed=seed,
    )
    return Choice(best, evaluation, areas, pvalues, adjusted, "ok", None)


def _area(x: Floats, y: Floats) -> float:
    curve = roc(x, y)
    return float(np.trapezoid(curve.tpr, curve.fpr))


def _ranked(pos: ArrayLike, neg: ArrayLike) -> tuple[Floats, Floats]:
    """Scores with infinite ones replaced by finite ones beyond all others: only their order matters."""
    x, y = np.asarray(pos, dtype=np.float64), np.asarray(neg, dtype=np.float64)
    if x.ndim != 1 or y.ndim != 1:
        raise UsageError(f"expected flat lists of scores, found {x.ndim} and {y.ndim} dimensions; flatten them")
    both = np.concatenate([x, y])
    if bad := int(np.isnan(both).sum()):
        raise UsageError(f"expected a score for every record, found {bad} of {len(both)} NaN; find out why")
    finite = both[np.isfinite(both)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    both = np.where(both == np.inf, np.nextafter(high, np.inf), both)
    both = np.where(both == -np.inf, np.nextafter(low, -np.inf), both)
    return both[: len(x)], both[len(x) :]
