"""Means: the bootstrap-t against a loop, samples without spread, coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probes.statistics import Interval, clopper_pearson, difference_interval, mean_interval
from tests.probes.statistics.common import UNIT, coverage, limits, not_below


def bootstrap_t(x: np.ndarray, codes: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """The interval, one resample at a time."""
    rng = np.random.default_rng((seed, 0))
    groups = [x[codes == g] for g in range(codes.max() + 1)]

    def mean_and_error(sample: list[np.ndarray]) -> tuple[float, float]:
        mean = np.concatenate(sample).mean()
        deviations = np.array([(s - mean).sum() for s in sample]) / np.mean([len(s) for s in sample])
        return mean, math.sqrt((deviations**2).sum() / (len(sample) * (len(sample) - 1)))

    mean, error = mean_and_error(groups)
    t = []
    for row in rng.integers(0, len(groups), (resamples, len(groups))):
        m, e = mean_and_error([groups[g] for g in row])
        t.append((m - mean) / e if e > 0 else math.copysign(math.inf, m - mean))
    ordered = sorted(t)
    at = [ordered[math.ceil(q * resamples) - 1] for q in (0.975, 0.025)]
    return mean - error * at[0], mean - error * at[1]


def test_mean_equals_a_bootstrap_written_as_a_loop() -> None:
    rng = np.random.default_rng(1)
    x = rng.exponential(size=40)
    codes = np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 4])
    for clusters, own in ((codes.tolist(), codes), (None, np.arange(40))):
        interval = mean_interval(x, clusters, seed=3, n_resamples=400)
        assert interval.method == "bootstrap-t"
        assert limits(interval) == pytest.approx(bootstrap_t(x, own, 3, 400), rel=1e-9)
        assert interval.value == pytest.approx(x.mean())


def test_mean_is_reproducible_and_follows_scale_and_level() -> None:
    x = np.random.default_rng(2).gamma(2.0, size=30)
    interval = mean_interval(x)
    assert interval == mean_interval(x.tolist())
    assert limits(interval) != limits(mean_interval(x, seed=1))
    assert limits(mean_interval(5 * x - 7)) == pytest.approx([5 * end - 7 for end in limits(interval)])
    assert limits(mean_interval(-x)) == pytest.approx([-interval.high, -interval.low], rel=1e-2)
    wider = mean_interval(x, level=0.99)
    assert wider.low < interval.low < interval.value < interval.high < wider.high


def test_one_sided_limits_are_the_ends_of_the_two_sided_interval() -> None:
    x, y = np.random.default_rng(3).random((2, 25))
    for sided, free in (("upper", "low"), ("lower", "high")):
        two = mean_interval(x, level=0.9, bounds=UNIT)
        one = mean_interval(x, level=0.95, sided=sided, bounds=UNIT)
        assert getattr(one, free) == UNIT[free == "high"]
        kept = "high" if free == "low" else "low"
        assert getattr(one, kept) == pytest.approx(getattr(two, kept), abs=1e-9)
        for bounds, end in ((None, math.inf), (UNIT, 1.0)):
            both = difference_interval(x, y, paired=False, level=0.9, bounds=bounds)
            single = difference_interval(x, y, paired=False, level=0.95, sided=sided, bounds=bounds)
            assert getattr(single, free) == (end if free == "high" else -end)
            assert getattr(single, kept) == pytest.approx(getattr(both, kept), abs=1e-9)


def test_a_sample_without_spread_is_never_known_exactly() -> None:
    for n in (1, 2, 20, 200):
        assert limits(mean_interval([0.0] * n, bounds=UNIT)) == pytest.approx(limits(clopper_pearson(0, n)))
        assert limits(mean_interval([1.0] * n, bounds=UNIT)) == pytest.approx(limits(clopper_pearson(n, n)))
        assert limits(mean_interval([0.3] * n)) == (-math.inf, math.inf)
        inside = mean_interval([0.3] * n, bounds=UNIT)
        assert inside.low < 0.3 < inside.high
    share = clopper_pearson(0, 19).high  # of 20 alike, 19 are trials of the value the first one set
    assert limits(mean_interval([0.3] * 20, bounds=UNIT)) == pytest.approx((0.3 - 0.3 * share, 0.3 + 0.7 * share))
    copies = mean_interval([0.0] * 20, ["one"] * 10 + ["two"] * 10, bounds=UNIT)
    assert copies.high == pytest.approx(clopper_pearson(0, 2).high)
    uneven = mean_interval([0.1] * 20, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, *range(4, 12)], bounds=UNIT)
    assert uneven.value == 0.1
    assert uneven.high == pytest.approx(0.1 + 0.9 * clopper_pearson(0, 11).high)  # a rounded mean is no departure


def test_equal_cluster_means_are_no_spread_either() -> None:
    x, clusters = [0.0, 1.0] * 6, [g for g in range(6) for _ in range(2)]
    assert limits(mean_interval(x, clusters)) == (-math.inf, math.inf)
    share = clopper_pearson(0, 5).high
    assert limits(mean_interval(x, clusters, bounds=UNIT)) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))
    halves = mean_interval([0.0] * 4 + [1.0] * 4, [0] * 4 + [1] * 4, bounds=UNIT)  # a median between the two values
    assert halves.low <= 0.5 <= halves.high


def test_almost_constant_values_are_counted_as_departures() -> None:
    x = [0.0] * 19 + [0.4]
    interval = mean_interval(x, bounds=UNIT)
    assert interval.method == "clopper-pearson on departures"
    assert limits(interval) == (0.0, pytest.approx(clopper_pearson(1, 20).high))
    # Of 20 values, three away from zero are missed by 3.9 % of resamples, more than a tail; five by 0.3 %.
    assert mean_interval([0.0] * 17 + [0.2, 0.3, 0.4], bounds=UNIT).method == "clopper-pearson on departures"
    assert mean_interval([0.0] * 15 + [0.2, 0.3, 0.4, 0.2, 0.3], bounds=UNIT).method == "bootstrap-t"
    assert mean_interval(x).method == "student-t"
    two = stats.t.interval(0.95, 19, np.mean(x), stats.sem(x))
    assert limits(mean_interval(x)) == pytest.approx(two)


def test_a_large_cluster_departs_with_its_weight() -> None:
    interval = mean_interval([1.0] * 10 + [0.0] * 9, [0] * 10 + list(range(1, 10)), bounds=UNIT)
    assert interval.method == "clopper-pearson on departures"
    assert interval.value == pytest.approx(10 / 19)
    assert interval.high == pytest.approx(clopper_pearson(6, 10).high)  # 10 of 19 records are 6 of 10 clusters


def test_rates_at_the_bounds_are_exact() -> None:
    interval = mean_interval([-1, 1, -1, -1, 1], bounds=(-1.0, 1.0))
    assert limits(interval) == pytest.approx([2 * end - 1 for end in limits(clopper_pearson(2, 5))])
    assert interval.value == pytest.approx(-0.2)


def test_few_values_and_none() -> None:
    assert limits(mean_interval([2.0, 3.0])) == pytest.approx(stats.t.interval(0.95, 1, 2.5, 0.5))
    assert limits(mean_interval([2.0])) == (-math.inf, math.inf)
    nothing = mean_interval([], bounds=UNIT)
    assert math.isnan(nothing.value)
    assert limits(nothing) == (0.0, 1.0)
    assert limits(mean_interval([])) == (-math.inf, math.inf)


def test_records_without_a_cluster_stand_alone() -> None:
    x = np.random.default_rng(4).random(12)
    named = mean_interval(x, ["a", "a", *range(10)])
    assert mean_interval(x, ["a", "a", *[None] * 10]) == named
    assert mean_interval(x, ["a", "a", *[math.nan] * 10]) == named
    assert mean_interval(x, [None] * 12) == mean_interval(x)


def skewed_clusters(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, list[int]]:
    codes = np.repeat(np.arange(groups), rng.integers(1, 8, groups))
    return rng.normal(size=groups)[codes] + rng.normal(size=len(codes)), codes.tolist()


def copied_clusters(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, list[int]]:
    codes = np.repeat(np.arange(groups), rng.integers(1, 8, groups))
    return (rng.random(groups) < 0.2)[codes].astype(float), codes.tolist()


@pytest.mark.parametrize(
    ("name", "draw", "truth", "bounds", "rate"),
    [
        ("normal 6", lambda r: (r.normal(size=6), None), 0.0, None, 0.94),
        ("exponential 8", lambda r: (r.exponential(size=8), None), 1.0, None, 0.93),
        ("exponential 20", lambda r: (r.exponential(size=20), None), 1.0, None, 0.93),
        ("lognormal 50", lambda r: (r.lognormal(size=50), None), math.exp(0.5), None, 0.92),
        ("beta 20", lambda r: (r.beta(0.1, 0.9, size=20), None), 0.1, UNIT, 0.94),
        ("rare values 50", lambda r: ((r.random(50) < 0.05) * 0.5, None), 0.025, UNIT, 0.95),
        ("rare hits 30", lambda r: ((r.random(30) < 0.02).astype(float), None), 0.02, UNIT, 0.95),
        ("clusters 12", lambda r: skewed_clusters(r, 12), 0.0, None, 0.93),
        ("copies 12", lambda r: copied_clusters(r, 12), 0.2, UNIT, 0.95),
        ("copies 30", lambda r: copied_clusters(r, 30), 0.2, UNIT, 0.94),
    ],
)
def test_mean_covers(name: str, draw, truth: float, bounds, rate: float) -> None:
    def interval(rng: np.random.Generator, seed: int) -> Interval:
        x, clusters = draw(rng)
        return mean_interval(x, clusters, bounds=bounds, seed=seed, n_resamples=1000)

    hits, given = coverage(interval, truth)
    assert given == 500
    assert not_below(hits, given, rate), f"{name}: {hits} of {given}"


def test_ignoring_clusters_would_not_cover() -> None:
    def interval(rng: np.random.Generator, seed: int) -> Interval:
        return mean_interval(skewed_clusters(rng, 12)[0], seed=seed, n_resamples=500)

    hits, given = coverage(interval, 0.0, 300)
    assert not not_below(hits, given, 0.9)


@pytest.mark.parametrize("sided", ["upper", "lower"])
@pytest.mark.parametrize(
    ("draw", "truth", "bounds", "rate"),
    [
        (lambda r: r.exponential(size=20), 1.0, None, 0.92),
        (lambda r: r.beta(0.3, 0.9, size=25), 0.25, UNIT, 0.94),
        (lambda r: (r.random(40) < 0.05).astype(float), 0.05, UNIT, 0.95),
        (lambda r: np.full(3, r.random()), 0.5, UNIT, 0.95),
    ],
)
def test_one_sided_limits_cover(draw, truth: float, bounds, rate: float, sided) -> None:
    hits, given = coverage(
        lambda r, i: mean_interval(draw(r), sided=sided, bounds=bounds, seed=i, n_resamples=600), truth, 400
    )
    assert not_below(hits, given, rate), f"{hits} of {given}"
