"""Statistics against scipy, scikit-learn and brute force, and by simulation of their coverage and error rates."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from probes import statistics
from probes.errors import UsageError
from probes.statistics import (
    Estimate,
    Interval,
    auc,
    benjamini_hochberg,
    clopper_pearson,
    difference_interval,
    equivalence,
    holm,
    mean_interval,
    noninferiority,
    required_n,
    residual,
    tpr_at_fpr,
    worst_of,
)

UNIT = (0.0, 1.0)


def limits(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def not_below(hits: int, repetitions: int, rate: float) -> bool:
    """Whether `hits` of `repetitions` is compatible with at least this rate (one wrong alarm in 10,000)."""
    return bool(stats.binomtest(hits, repetitions, rate, alternative="less").pvalue > 1e-4)


def coverage(draw, truth: float, repetitions: int = 500) -> tuple[int, int]:
    """Intervals that hold the truth, of those that were given."""
    rng = np.random.default_rng(20)
    given = hits = 0
    for i in range(repetitions):
        interval = draw(rng, i)
        if isinstance(interval, Estimate):
            interval = interval.interval
        if interval is not None:
            given += 1
            hits += interval.low <= truth <= interval.high
    return hits, given


# --- rates


@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_clopper_pearson_equals_scipy(level: float) -> None:
    for n in (1, 2, 7, 30, 1000):
        for k in {0, 1, n // 3, n - 1, n}:
            for sided, alternative in (("two", "two-sided"), ("upper", "less"), ("lower", "greater")):
                expected = stats.binomtest(k, n, alternative=alternative).proportion_ci(level, method="exact")
                assert limits(clopper_pearson(k, n, level, sided)) == pytest.approx(tuple(expected), abs=1e-12)


def test_zero_of_n_is_a_bound_and_no_trials_say_nothing() -> None:
    for n, bound in ((20, 0.1391), (100, 0.0295), (500, 0.0060), (1000, 0.0030)):
        assert limits(clopper_pearson(0, n, sided="upper")) == (0.0, pytest.approx(bound, abs=5e-5))
    assert clopper_pearson(5, 5).high == 1.0
    assert clopper_pearson(5, 5).low == pytest.approx(0.025 ** (1 / 5))
    nothing = clopper_pearson(0, 0)
    assert math.isnan(nothing.value)
    assert limits(nothing) == (0.0, 1.0)
    assert clopper_pearson(1, 3) == Interval(1 / 3, *limits(clopper_pearson(1, 3)), 0.95, 3, "clopper-pearson")


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(UsageError, match="expected 0 <= k <= n"):
        clopper_pearson(k, n)


def test_worst_of_holds_for_all_records_together() -> None:
    bound = worst_of([0, 2, 0], [50, 50, 10])
    assert bound.high == pytest.approx(
        max(clopper_pearson(k, n, 1 - 0.05 / 3, "upper").high for k, n in [(2, 50), (0, 10)])
    )
    assert (bound.value, bound.low, bound.n) == (0.04, 0.0, 3)
    assert worst_of([0, 0], [100, 0]).high == 1.0
    assert math.isnan(worst_of([], []).value)
    assert worst_of([], []).high == 1.0
    rng, rates, n = np.random.default_rng(0), np.array([0.02, 0.05, 0.05, 0.05]), 40
    held = sum(worst_of(rng.binomial(n, rates).tolist(), [n] * 4).high >= rates.max() for _ in range(500))
    assert not_below(held, 500, 0.95)


@pytest.mark.parametrize(
    ("p_max", "level", "records"), [(0.01, 0.95, 1), (0.01, 0.95, 24), (0.001, 0.95, 1), (0.5, 0.5, 1), (0.2, 0.99, 3)]
)
def test_required_n_is_the_smallest_that_suffices(p_max: float, level: float, records: int) -> None:
    n = required_n(p_max, level, records)
    at, before = (worst_of([0] * records, [m] * records, level).high for m in (n, max(n - 1, 0)))
    assert at <= p_max + 1e-12 < before
    assert {(0.01, 1): 299, (0.01, 24): 615, (0.001, 1): 2995}.get((p_max, records), n) == n


# --- means


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


# --- differences and decisions


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


# --- residual


def test_residual_holds_what_its_contrast_cannot_exclude() -> None:
    rng = np.random.default_rng(10)
    o, n = rng.beta(8, 2, size=18), rng.beta(1, 9, size=25)
    u = o * rng.beta(2, 4, size=18)
    clusters = [i // 2 for i in range(18)]
    estimate = residual(o, u, n, clusters=clusters, seed=4)
    assert estimate.status == "ok"
    interval = estimate.interval
    assert interval.value == pytest.approx((u.mean() - n.mean()) / (o.mean() - n.mean()))
    # N's own draws are another stream, so its interval is recovered from a difference with a single zero.
    control = statistics._Sample(n[:, None], None, "n", (4, 1), statistics.RESAMPLES)
    never_seen = control.interval(np.ones(1), 0.95, "two", UNIT)
    kept = []
    for r in np.arange(-0.5, 1.5, 0.01):
        left = mean_interval(u - r * o, clusters, bounds=(min(0.0, -r), max(1.0, 1.0 - r)), seed=4)
        ends = sorted(((1 - r) * never_seen.low, (1 - r) * never_seen.high))
        centre = left.value - (1 - r) * n.mean()
        low = centre - math.hypot(left.value - left.low, ends[1] - (1 - r) * n.mean())
        high = centre + math.hypot(left.high - left.value, (1 - r) * n.mean() - ends[0])
        if low <= 0 <= high:
            kept.append(r)
    assert min(kept) - 0.01 <= interval.low <= min(kept)
    assert max(kept) <= interval.high <= max(kept) + 0.01


def test_residual_of_perfect_forgetting_is_not_known_exactly() -> None:
    estimate = residual([1.0] * 20, [0.0] * 20, [0.0] * 20)
    assert estimate.interval.value == 0.0
    assert estimate.interval.high == pytest.approx(0.2025, abs=1e-3)
    assert estimate.interval.low < -0.1
    unchanged = residual([1.0] * 20, [1.0] * 20, [0.0] * 20).interval
    assert unchanged.value == 1.0
    assert unchanged.low < 1 < unchanged.high
    assert limits(residual([1.0] * 20, [0.0] * 20, [0.0] * 20, bounds=None).interval) == (-math.inf, math.inf)


def test_residual_is_not_testable_without_a_gap() -> None:
    weak = residual([0.25] * 30, [0.2] * 30, [0.1] * 30)
    assert (weak.status, weak.interval) == ("not testable", None)
    assert weak.reason == "O - N = 0.15 is below 0.2"
    assert residual([0.25] * 30, [0.2] * 30, [0.1] * 30, min_gap=0.1).status == "ok"
    assert residual([], [], [0.1]).status == "not testable"
    assert residual([0.9], [0.1], []).status == "not testable"
    uncertain = residual([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    assert limits(uncertain.interval) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda r: (r.binomial(1, 0.9, 20), r.binomial(1, 0.3, 20), r.binomial(1, 0.1, 30)), 0.25),
        (lambda r: (np.ones(20), r.binomial(1, 0.02, 20), r.binomial(1, 0.02, 20)), 0.0),
        (
            lambda r: ((o := r.beta(8, 2, size=20)), o * r.beta(2, 4, size=20), r.beta(1, 9, size=30)),
            (0.8 / 3 - 0.1) / 0.7,
        ),
    ],
)
def test_residual_covers(draw, truth: float) -> None:
    hits, given = coverage(lambda rng, i: residual(*draw(rng), seed=i, n_resamples=600), truth, 400)
    assert given == 400
    assert not_below(hits, given, 0.94), hits


# --- membership scores


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
        (clustered_scores, stats.norm.cdf(1 / math.sqrt(2.5))),
    ],
)
def test_auc_covers(draw, truth: float) -> None:
    hits, given = coverage(draw, truth, 400)
    assert given == 400
    assert not_below(hits, given, 0.94), hits


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


# --- several tests at once


def test_holm_and_benjamini_hochberg_by_their_definitions() -> None:
    rng = np.random.default_rng(17)
    for k in (1, 2, 7):
        p = np.round(rng.random(k) ** 3, 2)
        for alpha in np.arange(0.005, 1.0, 0.01):
            ordered = sorted(p)
            rejected = list(itertools.takewhile(lambda i: ordered[i] <= alpha / (k - i), range(k)))  # noqa: B023
            assert (holm(p) <= alpha).sum() == len(rejected)
        assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).shape == benjamini_hochberg([]).shape == (0,)


# --- refusals and cost


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: mean_interval(x),
        lambda x: difference_interval(x, [0.0, 1.0], paired=True),
        lambda x: equivalence([0.0, 1.0], x, 0.1, paired=False),
        lambda x: noninferiority(x, x, 0.1, paired=False),
        lambda x: residual([1.0, 1.0], x, [0.0]),
        lambda x: auc(x * 30, x * 30),
        lambda x: tpr_at_fpr([1.0], x * 500),
        lambda x: holm(x),
        lambda x: benjamini_hochberg(x),
    ],
)
def test_values_that_are_not_finite_are_refused(call, bad: float) -> None:
    with pytest.raises(UsageError, match="expected finite"):
        call([0.5, bad])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson(0, 1, 1.0), "confidence level"),
        (lambda: clopper_pearson(0, 1, 0.9, "both"), "sided"),  # type: ignore[arg-type]
        (lambda: worst_of([1], [2, 3]), "same records"),
        (lambda: required_n(0.0), "p_max"),
        (lambda: required_n(0.1, records=0), "records"),
        (lambda: mean_interval([[1.0]]), "flat list"),
        (lambda: mean_interval([1.0], [1, 2]), "expected clusters for 1 values, found 2"),
        (lambda: mean_interval([2.0], bounds=UNIT), "1 outside"),
        (lambda: mean_interval([0.5], bounds=(1.0, 0.0)), "correct the bounds"),
        (lambda: difference_interval([1.0], [1.0, 2.0], paired=True), "same records in the same order"),
        (lambda: difference_interval([1.0], [1.0], paired=True, y_clusters=[1]), "one list of clusters"),
        (lambda: equivalence([1.0], [1.0], 0.0, paired=True), "margin > 0"),
        (lambda: noninferiority([1.0], [1.0], 0.1, paired=True, alpha=0.6), "alpha"),
        (lambda: residual([1.0], [1.0, 0.0], [0.0]), "O and U on the same records"),
        (lambda: auc([1.0], [0.0], pos_clusters=[1]), "DeLong"),
        (lambda: tpr_at_fpr([1.0], [0.0], 0.0), "false-positive rate"),
        (lambda: holm([1.5]), "1 outside"),
    ],
)
def test_misuse_is_refused_in_one_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(18).random(41)
    codes = [i // 2 for i in range(41)]
    whole = [mean_interval(x, codes), residual(x**0.1, x / 3, x / 9).interval]
    aucs = auc(np.tile(x, 2), np.tile(x, 2), method="bootstrap").interval
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    for interval, other in zip([mean_interval(x, codes), residual(x**0.1, x / 3, x / 9).interval], whole, strict=True):
        assert limits(interval) == pytest.approx(limits(other), rel=1e-9)
    assert limits(auc(np.tile(x, 2), np.tile(x, 2), method="bootstrap").interval) == pytest.approx(limits(aucs))
    monkeypatch.undo()
    tracemalloc.start()
    mean_interval(np.random.default_rng(0).random(20_000), n_resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all the weights at once would be 80 MB


def test_two_hundred_records_take_milliseconds() -> None:
    x = np.random.default_rng(19).random(200)

    def fastest(call) -> float:
        taken = []
        for _ in range(5):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
        return min(taken)

    assert fastest(lambda: mean_interval(x)) < 0.05
    assert fastest(lambda: difference_interval(x, x**2, paired=False)) < 0.05
    assert fastest(lambda: auc(x, x**2, method="bootstrap")) < 0.05
