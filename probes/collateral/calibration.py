"""Calibration: are the model's next-token probabilities as right as they claim to be?

For every completion token, with c the probability of the likeliest token and h = 1 where that token is right:

    over-confidence    mean(c - h)                                               in [-1, 1], 0 for an honest model
    Brier score        mean((c - h)^2)                                           in [0, 1]
    ECE                sum over bins of (tokens in bin / tokens) |mean h - mean c|   (Naeini et al. 2015)

with bins of equally many tokens, ordered by c. Everything is read off the table of the one pass: the log-probability
of the gold token minus its gap to the top is the log-probability of the top, so no pass is made.

The ECE of a perfectly calibrated model is not 0 on finitely many tokens; `floor` says what it is here on average,
drawing h from c. The interval of the ECE takes bins and signs as found and resamples records, so it is that of the
binned estimate, its bias included; it is read against the floor.

Shape letters: N completion tokens, R records, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from probes.errors import UsageError
from probes.likelihood import TokenTable
from probes.statistics import Clusters, Floats, Interval, mean_interval

BINS = 15
DRAWS = 200


@dataclass(frozen=True, slots=True)
class Bin:
    """Tokens of similar confidence: how many, their mean confidence, and the share that was right."""

    tokens: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration on one set of records.

    Attributes:
        ece: expected calibration error.
        brier: Brier score of the likeliest token.
        over_confidence: confidence minus accuracy.
        floor: mean ECE of a perfectly calibrated model with these confidences.
        bins: in order of confidence.
        errors: [R] mean Brier score of each record's tokens.
    """

    ece: Interval
    brier: Interval
    over_confidence: Interval
    floor: float
    bins: tuple[Bin, ...]
    errors: Floats = field(repr=False)


def calibration(
    table: TokenTable,
    *,
    clusters: Clusters = None,
    bins: int = BINS,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Calibration of the next-token predictions behind a token table.

    Args:
        table: of one pass; at least two records.
        clusters: near-duplicate cluster of each record.
        bins: at least 1; fewer where there are fewer tokens.
        level: of the intervals.
        seed: of bootstrap and draws.

    Returns:
        Figures over all tokens; every token counts the same, whole records (or clusters) are resampled.

    Raises:
        UsageError: fewer than two records, or no bin.
    """
    records = len(table.offsets) - 1
    if records < 2:
        raise UsageError(f"expected at least 2 records to tell calibration from, found {records}; give more")
    if bins < 1:
        raise UsageError(f"expected at least 1 bin, found {bins}; {BINS} is usual")
    confidence = np.exp(np.minimum(table.log_prob.astype(np.float64) - table.gap.astype(np.float64), 0.0))  # [N]
    right = (table.rank == 0).astype(np.float64)  # [N]
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    gaps = np.zeros(len(confidence))  # [N] each token's share of the ECE: signed by its bin
    for rows in parts:
        difference = confidence[rows] - right[rows]
        gaps[rows] = difference if difference.sum() >= 0 else -difference
    brier = (confidence - right) ** 2

    def of_tokens(values: Floats, bounds: tuple[float, float] | None) -> Interval:
        return _token_mean(values, table.offsets, clusters, level, bounds, seed)

    return Calibration(
        ece=of_tokens(gaps, (0.0, 1.0)),
        brier=of_tokens(brier, (0.0, 1.0)),
        over_confidence=of_tokens(confidence - right, (-1.0, 1.0)),
        floor=_floor(confidence, parts, seed),
        bins=tuple(Bin(len(rows), float(confidence[rows].mean()), float(right[rows].mean())) for rows in parts),
        errors=np.add.reduceat(brier, table.offsets[:-1]) / np.diff(table.offsets),
    )


def _token_mean(
    values: Floats,
    offsets: np.ndarray,
    clusters: Clusters,
    level: float,
    bounds: tuple[float, float] | None,
    seed: int,
) -> Interval:
    """Interval of the mean over tokens when records are what varies, by linearising the ratio of sums.

    With n_r tokens of record r that sum to x_r and m = sum x / sum n, the values m + (x_r - m n_r) / mean(n) have mean
    m and the spread of the ratio (delta method).
    """
    lengths = np.diff(offsets).astype(np.float64)
    sums = np.add.reduceat(values, offsets[:-1])
    mean = float(sums.sum() / lengths.sum())
    linear = mean + (sums - mean * lengths) / lengths.mean()
    found = mean_interval(linear, clusters, level=level, seed=seed)
    if bounds is None:
        return found
    low, high = (float(np.clip(limit, *bounds)) for limit in (found.low, found.high))
    return Interval(mean, low, high, found.level, found.n, found.method)


def _floor(confidence: Floats, parts: list[np.ndarray], seed: int) -> float:
    """Mean ECE when each token is right with exactly its stated probability."""
    rng = np.random.default_rng([seed, 19])
    total = 0.0
    for rows in parts:
        c = confidence[rows]
        right = np.array([(rng.random(len(rows)) < c).sum() for _ in range(DRAWS)])  # [D] tokens that were right
        total += float(np.abs(right - c.sum()).mean())
    return total / len(confidence)
