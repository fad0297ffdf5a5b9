"""Dataset inference: was a set of records, as a whole, in the training data?

Single records of a large corpus leave traces too weak to tell one member from one non-member; a hundred of them
together may not. On one half of the records a linear model learns which combination of membership scores separates
the audited set from never-seen records; on the other half a one-sided test asks whether the audited records score
higher on average (Maini et al., arXiv 2406.06443). One split wastes the luck of the draw, so several are made and
twice their median p-value is reported, which holds its level although splits share records.

The linear model is ridge regression of the label on features scaled by median and quartiles of its half and held
within 5 of zero: heavy tails are tamed, and no record and no token is left out. Halves share no near-duplicate
cluster.

Limits: a low p-value says that the two sets differ to the model, and the weights in which direction: records that an
edit has pushed below never-seen ones differ as well. It says "trained on" only if the never-seen records come from the
same distribution (`attacks.membership.blind` first; synthetic held-out sets rarely do, 2506.15271).

Shape letters: m audited records, n never-seen records, F features, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.folds import chosen, folds, needed
from probes.errors import UsageError
from probes.statistics import Clusters, mean_difference_pvalue, median_combined

Floats = NDArray[np.float64]

SPLITS = 10
RIDGE = 1.0  # beside one per record
LIMIT = 5.0
MIN_GROUPS = 20  # independent records a side: ten in each half


@dataclass(frozen=True, slots=True)
class DatasetInference:
    """Whether a set of records looks trained on.

    Attributes:
        pvalue: of "the audited records score like the never-seen ones"; None where the status is not "ok".
        effect: difference of the means on the second half in standard deviations, median over splits.
        weights: feature -> weight in the linear model, mean over splits; features are scaled to one quartile range.
        pvalues: [S] of the single splits.
        n_members: m.
        n_others: n.
        status: "ok", or "not resolvable" below 20 independent records a side or without features that vary.
        reason: why not.
    """

    pvalue: float | None
    effect: float | None
    weights: dict[str, float]
    pvalues: tuple[float, ...]
    n_members: int
    n_others: int
    status: Literal["ok", "not resolvable"]
    reason: str | None


def dataset_inference(
    features_members: ArrayLike,
    features_others: ArrayLike,
    *,
    names: Sequence[str],
    clusters: Clusters = None,
    other_clusters: Clusters = None,
    splits: int = SPLITS,
    seed: int = 0,
) -> DatasetInference:
    """Test a whole set of records.

    Args:
        features_members: [m, F] membership scores of the audited records, higher = more likely a member; infinite
            ones count as extreme.
        features_others: [n, F] the same of never-seen records.
        names: [F] of the features.
        clusters: [m] near-duplicate clusters, None for a record of its own; in the test a cluster counts once.
        other_clusters: [n] the same of the never-seen records; a name in both lists is one cluster.
        splits: how many, at least 1.
        seed: of the splits and permutations.

    Returns:
        The p-value, with what it was read from.

    Raises:
        UsageError: features of other shapes or NaN, clusters of the wrong length, or no split.
    """
    x, y = _features(features_members, names), _features(features_others, names)
    if splits < 1:
        raise UsageError(f"expected at least one split, found {splits}")
    m, n = len(x), len(y)

    def unresolved(reason: str) -> DatasetInference:
        return DatasetInference(None, None, {}, (), m, n, "not resolvable", reason)

    groups = _groups(clusters, m), _groups(other_clusters, n)
    if min(groups) < MIN_GROUPS:
        return unresolved(
            f"{groups[0]} independent audited records and {groups[1]} never-seen ones; {MIN_GROUPS} a side are needed"
        )
    both = _finite(np.concatenate([x, y]))
    x, y = both[:m], both[m:]
    if not len(names) or bool((both == both[0]).all()):
        return unresolved("no feature differs between any two records")
    pvalues, effects, weights = [], [], []
    for split in range(splits):
        halves = folds(m, n, clusters, other_clusters, 2, seed * splits + split)
        if min(len(np.unique(half)) for half in halves) < 2:
            return unresolved("clusters that span both sets leave no two halves with records of both")
        centre, scale = _scaling(np.concatenate([s[half == 0] for s, half in zip((x, y), halves, strict=True)]))
        first, second = (
            [_scaled(s[half == part], centre, scale) for s, half in zip((x, y), halves, strict=True)] for part in (0, 1)
        )
        weight = _ridge(*first)
        ours, theirs = (part @ weight for part in second)
        ours_in, theirs_in = (chosen(c, half == 1) for c, half in zip((clusters, other_clusters), halves, strict=True))
        pvalues.append(mean_difference_pvalue(ours, theirs, clusters=ours_in, y_clusters=theirs_in, seed=seed))
        spread = float(np.sqrt((ours.var() + theirs.var()) / 2))
        effects.append(float(ours.mean() - theirs.mean()) / spread if spread > 1e-12 else 0.0)
        weights.append(weight)
    return DatasetInference(
        pvalue=median_combined(pvalues),
        effect=float(np.median(effects)),
        weights=dict(zip(names, np.mean(weights, axis=0).tolist(), strict=True)),
        pvalues=tuple(pvalues),
        n_members=m,
        n_others=n,
        status="ok",
        reason=None,
    )


def _features(values: ArrayLike, names: Sequence[str]) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        found = found.reshape(len(found), len(names))
    if found.ndim != 2 or found.shape[1] != len(names):
        raise UsageError(f"expected features [records, {len(names)}] with a name each, found shape {found.shape}")
    if bad := int(np.isnan(found).any(axis=1).sum()):
        raise UsageError(f"expected every feature of every record, found NaN in {bad} records; find out why")
    return found


def _finite(values: Floats) -> Floats:
    """Infinite values one range beyond the finite ones of their column."""
    for column in values.T:
        known = column[np.isfinite(column)]
        low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
        reach = (high - low) or 1.0
        column[column == np.inf] = high + reach
        column[column == -np.inf] = low - reach
    return values


def _groups(clusters: Clusters, n: int) -> int:
    """Independent records."""
    if needed(clusters) is None or clusters is None:
        return n
    return len({name for name in clusters if name is not None}) + sum(name is None for name in clusters)


def _scaling(values: Floats) -> tuple[Floats, Floats]:
    """[F] median and [F] scale of a half; a scale is infinite where nothing varies."""
    low, centre, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    scale = (high - low) / 1.349  # of a normal law, the standard deviation
    rest = np.abs(values - centre).mean(axis=0)  # where more than half of the values are alike
    scale = np.where(scale > 1e-12 * np.abs(centre), scale, rest)
    return centre, np.where(scale > 1e-12 * np.abs(centre), scale, np.inf)


def _scaled(values: Floats, centre: Floats, scale: Floats) -> Floats:
    scaled: Floats = np.clip((values - centre) / scale, -LIMIT, LIMIT)
    return scaled


def _ridge(x: Floats, y: Floats) -> Floats:
    """[F] weights of centred ridge regression of 1 (x) and -1 (y), both sides counting the same."""
    design = np.concatenate([x, y])
    weight = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (x, y)])  # sums to 1
    label = np.concatenate([np.ones(len(x)), -np.ones(len(y))])
    centred = design - weight @ design
    gram = centred.T @ (weight[:, None] * centred)
    penalty = RIDGE / len(design) * np.eye(design.shape[1])
    solution: Floats = np.linalg.solve(gram + penalty, centred.T @ (weight * label))
    return solution
