"""AUC: scikit-learn and DeLong by pairs, the bootstrap as a loop, coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from probes.statistics import Estimate, auc, clopper_pearson
from tests.probes.statistics.common import coverage, limits, not_below


def delong_variance(pos: np.ndarray, neg: np.ndarray) -> float:
    wins = np.array([[(p > q) + 0.5 * (p == q) for q in neg] for p in pos])
    return float(wins.mean(1).var(ddof=1) / len(pos) + wins.mean(0).var(ddof=1) / len(neg))


@pytest.mark.parametrize("tied", [False, True])
def test_auc_equals_scikit_learn_and_delong_by_pairs(tied: bool) -> None:
    rng = np.random.default_rng(11)
    pos, neg = rng.normal(0.7, 1, 60), rng.normal(0, 1, 90)
    if tied:
        pos, neg = np.round(pos), np.round(neg)
    interval = auc(pos, neg).interval
    expected = roc_auc_score(np.repeat([1, 0], [60, 90]), np.concatenate([pos, neg]))
    assert interval.value == pytest.approx(expected, abs=1e-12)
    half = stats.norm.ppf(0.975) * math.sqrt(delong_variance(pos, neg)) / (expected * (1 - expected))
    logit = math.log(expected / (1 - expected))
    assert limits(interval) == pytest.approx([1 / (1 + math.exp(-logit - side * half)) for side in (-1, 1)], abs=1e-12)
    assert limits(auc(neg, pos).interval) == pytest.approx([1 - end for end in reversed(limits(interval))], abs=1e-12)


@pytest.mark.parametrize("clustered", [False, True])
def test_auc_bootstrap_equals_a_loop(clustered: bool) -> None:
    rng = np.random.default_rng(12)
    pos, neg = np.round(rng.normal(0.5, 1, 120), 1), np.round(rng.normal(0, 1, 60), 1)
    codes = np.arange(120) // 2 if clustered else np.arange(120)
    clusters = codes.tolist() if clustered else None
    interval = auc(pos, neg, method="bootstrap", pos_clusters=clusters, seed=5, n_resamples=200).interval
    groups = codes.max() + 1
    drawn = np.random.default_rng((5, 0)).integers(0, groups, (200, groups))
    others = np.random.default_rng((5, 1)).integers(0, 60, (200, 60))
    values = []
    for row, other in zip(drawn, others, strict=True):
        resampled = np.concatenate([pos[codes == g] for g in row])
        labels = np.repeat([1, 0], [len(resampled), 60])
        values.append(roc_auc_score(labels, np.concatenate([resampled, neg[other]])))
    assert limits(interval) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


@pytest.mark.parametrize("method", ["delong", "bootstrap"])
def test_auc_without_variance_is_not_known_exactly(method: str) -> None:
    rng = np.random.default_rng(13)
    pos, neg = rng.random(60) + 2, rng.random(80)
    perfect, inverted = auc(pos, neg, method=method).interval, auc(neg, pos, method=method).interval
    assert limits(perfect) == pytest.approx(limits(clopper_pearson(60, 60)))
    assert limits(inverted) == pytest.approx(limits(clopper_pearson(0, 60)))
    ties = auc([1.0] * 60, [1.0] * 80, method=method).interval
    assert ties.value == 0.5
    share = clopper_pearson(0, 59).high
    assert limits(ties) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))


def test_auc_below_fifty_a_side_is_not_resolvable() -> None:
    rng = np.random.default_rng(14)
    refused = auc(rng.random(49), rng.random(500))
    assert (refused.status, refused.interval) == ("not resolvable", None)
    assert refused.reason == "49 independent members and 500 non-members; 50 a side are needed"
    assert auc([], []).status == "not resolvable"
    assert auc(rng.random(50), rng.random(50)).status == "ok"
    copies = auc(rng.random(98), rng.random(60), pos_clusters=[i // 2 for i in range(98)], method="bootstrap")
    assert copies.status == "not resolvable"


def clustered_scores(rng: np.random.Generator, seed: int) -> Estimate:
    codes = np.arange(60).repeat(3)
    pos = 1 + rng.normal(size=60)[codes] + rng.normal(0, 0.5, 180)
    neg = rng.normal(0, math.sqrt(1.25), 80)
    return auc(pos, neg, pos_clusters=codes.tolist(), method="bootstrap", seed=seed, n_resamples=500)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda r, i: auc(r.normal(size=50), r.normal(size=50)), 0.5),
        (lambda r, i: auc(r.normal(2.5, 1, 60), r.normal(size=200)), stats.norm.cdf(2.5 / math.sqrt(2))),
        (lambda r, i: auc(r.binomial(1, 0.7, 50), r.binomial(1, 0.4, 60)), 0.5 + 0.3 / 2),
        (
            lambda r, i: auc(r.normal(1, 1, 50), r.normal(size=60), method="bootstrap", seed=i, n_resamples=500),
            stats.norm.cdf(1 / math.sqrt(2)),
        ),
        (lambda r, i: auc(r.binomial(1, 0.01, 50), r.binomial(1, 0.01, 60)), 0.5),  # often all alike
        (lambda r, i: auc(r.normal(4, 1, 60), r.normal(size=60)), stats.norm.cdf(4 / math.sqrt(2))),  # often perfect
        (clustered_scores, stats.norm.cdf(1 / math.sqrt(2.5))),
    ],
)
def test_auc_covers(draw, truth: float) -> None:
    hits, given = coverage(draw, truth, 400)
    assert given == 400
    assert not_below(hits, given, 0.94), hits
