"""Differences, non-inferiority, equivalence: their parts, coverage, error rates at the margin."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from probes.statistics import Interval, clopper_pearson, difference_interval, equivalence, mean_interval, noninferiority
from tests.probes.statistics.common import UNIT, coverage, limits, not_below


def test_paired_difference_is_the_mean_of_differences() -> None:
    x, y = np.random.default_rng(5).random((2, 30))
    codes = [i // 3 for i in range(30)]
    assert difference_interval(x, y, paired=True, clusters=codes, bounds=UNIT) == mean_interval(
        x - y, codes, bounds=(-1.0, 1.0)
    )
    same = difference_interval(x, x, paired=True, bounds=UNIT)
    assert same.value == 0.0
    assert same.low < 0 < same.high


def test_unpaired_difference_of_rates_squares_and_adds() -> None:
    x, y = [1.0] * 3 + [0.0] * 17, [0.0] * 40
    a, b = clopper_pearson(3, 20), clopper_pearson(0, 40)
    interval = difference_interval(x, y, paired=False, bounds=UNIT)
    assert interval.low == pytest.approx(0.15 - math.sqrt((0.15 - a.low) ** 2 + b.high**2))
    assert interval.high == pytest.approx(0.15 + math.sqrt((a.high - 0.15) ** 2))
    assert (interval.value, interval.n) == (pytest.approx(0.15), 60)
    assert limits(difference_interval(x, [], paired=False, bounds=UNIT)) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("draw", "truth", "paired"),
    [
        (lambda r: (r.exponential(size=10), r.exponential(2.0, size=30)), -1.0, False),
        (lambda r: (np.zeros(20), r.beta(0.5, 2.0, size=40)), -0.2, False),
        (lambda r: ((x := r.beta(2, 2, size=15)), x * r.random(15)), 0.25, True),
        (lambda r: ((r.random(20) < 0.1).astype(float), (r.random(40) < 0.3).astype(float)), -0.2, False),
    ],
)
def test_difference_covers(draw, truth: float, paired: bool) -> None:
    def interval(rng: np.random.Generator, seed: int) -> Interval:
        x, y = draw(rng)
        unit = UNIT if max(x.max(), y.max()) <= 1 else None
        return difference_interval(x, y, paired=paired, bounds=unit, seed=seed, n_resamples=1000)

    hits, given = coverage(interval, truth)
    assert not_below(hits, given, 0.94), hits


def test_decisions_read_the_ninety_percent_interval() -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        x, y = rng.normal(rng.choice([-1.0, 0.0, 1.0]), 0.4, 15), rng.normal(0, 0.4, 15)
        ends = limits(difference_interval(x, y, paired=True, level=0.9))
        inside, outside = ends[0] > -0.5 and ends[1] < 0.5, ends[1] < -0.5 or ends[0] > 0.5
        same = equivalence(x, y, 0.5, paired=True)
        assert same.status == ("met" if inside else "not met" if outside else "inconclusive")
        assert limits(same.difference) == pytest.approx(ends)
        higher = noninferiority(x, y, 0.5, paired=True)
        assert higher.status == ("met" if ends[0] > -0.5 else "not met" if ends[1] < -0.5 else "inconclusive")
        lower = noninferiority(x, y, 0.5, paired=True, better="lower")
        assert lower.status == ("met" if ends[1] < 0.5 else "not met" if ends[0] > 0.5 else "inconclusive")
    assert same.margin == 0.5
    assert "90% interval" in same.reason


def test_no_evidence_is_inconclusive_and_not_equivalence() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(0, 1, 6), rng.normal(0, 1, 6)
    assert stats.ttest_ind(x, y).pvalue > 0.05  # "not significant"
    assert equivalence(x, y, 0.2, paired=False).status == "inconclusive"
    assert equivalence([], [], 0.2, paired=True).status == "inconclusive"
    assert noninferiority([], [], 0.2, paired=False).status == "inconclusive"
    assert equivalence([0.0] * 5, [0.0] * 5, 0.05, paired=True, bounds=UNIT).status == "inconclusive"
    assert equivalence([0.0] * 200, [0.0] * 200, 0.05, paired=True, bounds=UNIT).status == "met"


@pytest.mark.parametrize(
    "decide",
    [
        lambda r, i: equivalence((y := r.normal(size=12)) + r.normal(0.5, 0.2, 12), y, 0.5, paired=True, seed=i),
        lambda r, i: equivalence(r.normal(-0.5, 0.2, 10), r.normal(0, 0.4, 25), 0.5, paired=False, seed=i),
        lambda r, i: noninferiority(r.exponential(1.0, 30), r.exponential(1.5, 40), 0.5, paired=False, seed=i),
        lambda r, i: noninferiority(
            r.binomial(1, 0.3, 40), r.binomial(1, 0.2, 60), 0.1, paired=False, better="lower", bounds=UNIT, seed=i
        ),
    ],
)
def test_error_rate_at_the_margin(decide) -> None:
    rng, repetitions = np.random.default_rng(8), 600
    outcomes = Counter(decide(rng, i).status for i in range(repetitions))
    assert not_below(repetitions - outcomes["met"], repetitions, 0.95), outcomes
    assert not_below(repetitions - outcomes["not met"], repetitions, 0.94), outcomes


def test_equivalence_is_found_where_it_holds() -> None:
    rng = np.random.default_rng(9)
    met = sum(
        equivalence(rng.normal(0, 0.2, 30), rng.normal(0, 0.2, 30), 0.2, paired=False).status == "met"
        for _ in range(50)
    )
    assert met > 40
