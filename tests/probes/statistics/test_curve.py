"""ROC curve and true-positive rate at a false-positive rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from probes.errors import UsageError
from probes.statistics import clopper_pearson, roc, tpr_at_fpr
from tests.probes.statistics.common import not_below


def test_tpr_needs_enough_non_members() -> None:
    rng = np.random.default_rng(15)
    assert tpr_at_fpr(rng.random(50), rng.random(999), 0.01).status == "not resolvable"
    assert "1000 non-members resolve" in tpr_at_fpr(rng.random(50), rng.random(999), 0.01).reason
    assert tpr_at_fpr(rng.random(50), rng.random(1000), 0.01).status == "ok"
    assert tpr_at_fpr(rng.random(50), rng.random(200), 0.05).status == "ok"
    assert tpr_at_fpr([], rng.random(200), 0.05).status == "not resolvable"


def test_tpr_threshold_comes_from_the_other_half() -> None:
    neg = np.arange(400.0)
    point = tpr_at_fpr(np.array([1e3, -1.0, 1e3, point_free := 0.5]), neg, 0.05, seed=3)
    assert point_free < point.threshold
    alarms, measured = round(point.fpr.value * point.fpr.n), point.fpr.n
    above = neg[neg > point.threshold]
    assert measured == 200
    assert len(above) - alarms == math.floor(0.05 * 201) - 1  # so many of the half that set it exceed it
    assert point.fpr == clopper_pearson(alarms, 200)
    assert point.tpr == clopper_pearson(2, 4)


@pytest.mark.parametrize("decimals", [8, 1])
def test_achieved_fpr_is_at_most_the_nominal_one(decimals: int) -> None:
    rng = np.random.default_rng(16)
    alarms = trials = 0
    for i in range(400):
        point = tpr_at_fpr([0.0], np.round(rng.normal(size=200), decimals), 0.05, seed=i)
        alarms += round(point.fpr.value * point.fpr.n)
        trials += point.fpr.n
    assert alarms / trials <= 0.05 + 3 * 0.05 / math.sqrt(400)
    assert alarms / trials >= (0.035 if decimals == 8 else 0.02)


@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_intervals_at_the_threshold_cover(fpr: float) -> None:
    """The threshold is known to both intervals, so both rates are the true ones at it."""
    rng, repetitions = np.random.default_rng(80), 400
    held = [0, 0]
    for i in range(repetitions):
        point = tpr_at_fpr(rng.normal(1, 1, 60), rng.normal(size=math.ceil(10 / fpr)), fpr, seed=i)
        for j, (interval, shift) in enumerate(((point.tpr, 1.0), (point.fpr, 0.0))):
            held[j] += interval.low <= stats.norm.sf(point.threshold - shift) <= interval.high
    assert not_below(held[0], repetitions, 0.95), held
    assert not_below(held[1], repetitions, 0.95), held


# --- the curve


@pytest.mark.parametrize("decimals", [8, 0])
def test_curve_equals_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(81)
    for m, n in ((1, 1), (3, 9), (60, 140)):
        pos, neg = np.round(rng.normal(0.7, 1, m), decimals), np.round(rng.normal(size=n), decimals)
        curve = roc(pos, neg)
        labels, scores = np.repeat([1, 0], [m, n]), np.concatenate([pos, neg])
        expected = roc_curve(labels, scores, drop_intermediate=False)
        for found, wanted in zip((curve.fpr, curve.tpr, curve.thresholds), expected, strict=True):
            assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-12)
        assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_curve_of_constant_scores_is_one_step() -> None:
    curve = roc([0.3] * 5, [0.3] * 7)
    assert (curve.fpr.tolist(), curve.tpr.tolist()) == ([0.0, 1.0], [0.0, 1.0])
    assert curve.thresholds.tolist() == [math.inf, 0.3]
    assert [axis.tolist() for axis in curve.points(6)] == [[0.0, 1.0], [0.0, 1.0]]
    perfect = roc([2.0, 3.0], [0.0, 1.0])
    assert (perfect.fpr.tolist(), perfect.tpr.tolist()) == ([0, 0, 0, 0.5, 1], [0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("n", [6, 7, 50, 200, 1000])
@pytest.mark.parametrize("others", [3, 99, 5000])
def test_points_lie_on_the_curve_and_keep_the_low_steps(n: int, others: int) -> None:
    rng = np.random.default_rng(82)
    curve = roc(rng.normal(1, 1, 3000), rng.normal(size=others))
    fpr, tpr = curve.points(n)
    assert len(fpr) == len(tpr) <= n
    on_curve = set(zip(curve.fpr.tolist(), curve.tpr.tolist(), strict=True))
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) <= on_curve
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    if n >= 50:
        lowest = round(min(others, n / 2 / max(1.0, math.log(others)) - 1))
        for rate in np.unique(curve.fpr)[: lowest + 1]:  # both ends of the rise at each of the lowest rates
            rise = curve.tpr[curve.fpr == rate]
            assert tpr[fpr == rate].tolist() == list(dict.fromkeys([rise.min(), rise.max()]))
    if 2 * (others + 1) <= n:
        assert len(np.unique(fpr)) == others + 1


def test_points_use_their_room() -> None:
    rng = np.random.default_rng(83)
    fpr, _ = roc(rng.normal(1, 1, 2000), rng.normal(size=5000)).points(200)
    assert len(np.unique(fpr)) == 100
    decades = np.histogram(np.log10(fpr[fpr > 0]), [-4, -3, -2, -1, 0.01])[0]
    assert decades.min() >= 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roc([], [1.0]), "found 0 and 1"),
        (lambda: roc([1.0], []), "a curve needs both"),
        (lambda: roc([math.nan], [1.0]), "expected finite pos"),
        (lambda: roc([1.0], [0.0]).points(5), "at least 6 points"),
    ],
)
def test_curve_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
