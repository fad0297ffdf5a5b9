r"""Intervals and decisions for the figures of an audit: rates, means, differences, residuals, AUC.

Every function is pure (numpy and scipy only) and deterministic by seed. Three rules hold throughout:

- Nothing is ever known exactly. A sample without spread (0 of n, every record alike, AUC = 1) gets a bound on what
  was not seen, never an interval of width zero.
- Records may be near-duplicates of each other. Where `clusters` is given, whole clusters are resampled and the
  number of clusters, not of records, decides how wide an interval is.
- A question the data cannot answer is answered "not resolvable", "not testable" or "inconclusive", with the reason.

Means use the studentised bootstrap (bootstrap-t): t* = (m* - m) / se* over resamples, and the interval
[m - q(1-a) se, m - q(a) se]. It is second-order accurate like BCa, but holds its level on the few, skewed records of a
request (20 exponential values, nominal 95 %: about 93-94 % against 90 % for BCa and 90.5 % for Student's t).
Differences of independent means, and the ratio of a residual, combine the intervals of their parts by MOVER:
low = d - sqrt((x - l_x)^2 + (u_y - y)^2), so a part without spread stays honest there too.

Papers: Clopper and Pearson 1934; Hall 1988 (bootstrap-t); Zou and Donner 2008 (MOVER); DeLong, DeLong and
Clarke-Pearson 1988, with the mid-ranks of Sun and Xu 2014; Schuirmann 1987 (TOST); Holm 1979; Benjamini and
Hochberg 1995.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from probes.errors import UsageError

Sided = Literal["two", "upper", "lower"]
Status = Literal["met", "not met", "inconclusive"]
Clusters = Sequence[Hashable | None] | None
Bounds = tuple[float, float]
Floats = NDArray[np.float64]

RESAMPLES = 2000
MIN_PER_SIDE = 50  # an AUC from fewer has a null standard deviation above 0.058
MIN_GAP = 0.2  # a residual divides by O - N; below this the attack did not tell the records apart to begin with
_CHUNK = 1 << 16  # resampling weights held at a time: 0.5 MB stays in the cache, twice as fast as all at once
_OPPOSITE: dict[Sided, Sided] = {"two": "two", "upper": "lower", "lower": "upper"}
_FLAT = 0.1  # a resample whose standard error is below this share of the sample's has lost the spread


@dataclass(frozen=True, slots=True)
class Interval:
    """A point value with its confidence interval.

    Attributes:
        value: the estimate; NaN where n = 0.
        low: lower limit; for a one-sided "upper" interval the smallest possible value (0 or -inf).
        high: upper limit; for a one-sided "lower" interval the largest possible value (1 or inf).
        level: confidence level of [low, high], in (0, 1).
        n: number of observations, not of clusters.
        method: how the limits were found.
    """

    value: float
    low: float
    high: float
    level: float
    n: int
    method: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """An interval, or the reason why the data cannot give one (`interval` is None unless status is "ok")."""

    status: Literal["ok", "not testable", "not resolvable"]
    reason: str | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """True-positive rate at a threshold, with the false-positive rate measured at the same threshold."""

    status: Literal["ok", "not resolvable"]
    reason: str | None
    tpr: Interval | None
    fpr: Interval | None
    threshold: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of a test against a margin; `difference` is the interval of mean(x) - mean(y) it was read from."""

    status: Status
    reason: str
    margin: float
    difference: Interval


# --- rates ----------------------------------------------------------------------------------------------------------


def clopper_pearson(k: int, n: int, level: float = 0.95, sided: Sided = "two") -> Interval:
    """Exact binomial interval for k hits out of n.

    Args:
        k: hits, 0 <= k <= n.
        n: independent trials; with n = 0 nothing is known: value NaN, interval [0, 1].
        level: confidence level.
        sided: "two", or one-sided: "upper" bounds the rate from above (low = 0), "lower" from below (high = 1).

    Returns:
        The interval, in [0, 1]. It covers with at least its level, for every rate and n.

    Raises:
        UsageError: k outside 0..n or level outside (0, 1).
    """
    below, above = _tails(level, sided)
    if not 0 <= k <= n:
        raise UsageError(f"expected 0 <= k <= n, found k = {k}, n = {n}; count hits among the trials")
    low = float(special.betaincinv(k, n - k + 1, below)) if k > 0 and below > 0 else 0.0
    high = float(special.betainccinv(k + 1, n - k, above)) if k < n and above > 0 else 1.0
    return Interval(k / n if n else math.nan, low, high, level, n, "clopper-pearson")


def worst_of(k_per_record: Sequence[int], n_per_record: Sequence[int], level: float = 0.95) -> Interval:
    """Simultaneous upper bound on the highest rate among R records (Bonferroni: each at alpha / R).

    Args:
        k_per_record: [R] hits of each record.
        n_per_record: [R] trials of each record; a record without trials bounds nothing (high = 1).
        level: level at which the bound holds for all records together.

    Returns:
        value = the highest observed rate, [0, high]; n = R.

    Raises:
        UsageError: lists of different length, impossible counts, or level outside (0, 1).
    """
    if len(k_per_record) != len(n_per_record):
        raise UsageError(
            f"expected hits and trials for the same records, found {len(k_per_record)} and {len(n_per_record)}; "
            "pass one of each for every record"
        )
    _tails(level, "upper")
    records = len(k_per_record)
    each = [
        clopper_pearson(k, n, 1 - (1 - level) / records, "upper")
        for k, n in zip(k_per_record, n_per_record, strict=True)
    ]
    value = max((interval.value for interval in each if interval.n), default=math.nan)
    high = max((interval.high for interval in each), default=1.0)
    return Interval(value, 0.0, high, level, records, "clopper-pearson, simultaneous")


def required_n(p_max: float, level: float = 0.95, records: int = 1) -> int:
    """Trials needed for each record so that 0 hits bound the worst rate by p_max: n >= ln(alpha / R) / ln(1 - p_max).

    Args:
        p_max: the rate to exclude, in (0, 1).
        level: simultaneous level over all records.
        records: R, the number of records the bound must hold for together.

    Returns:
        The smallest such n.

    Raises:
        UsageError: p_max or level outside (0, 1), or fewer than one record.
    """
    _tails(level, "upper")
    if not 0 < p_max < 1 or records < 1:
        raise UsageError(f"expected 0 < p_max < 1 and records >= 1, found {p_max} and {records}; correct the policy")
    needed = math.log((1 - level) / records) / math.log1p(-p_max)
    return math.ceil(needed * (1 - 1e-12))  # an exact solution must not be rounded up by the last bit of a logarithm


# --- means ----------------------------------------------------------------------------------------------------------


def mean_interval(
    x: ArrayLike,
    clusters: Clusters = None,
    *,
    level: float = 0.95,
    sided: Sided = "two",
    bounds: Bounds | None = None,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Interval:
    """Confidence interval of a mean, from few, skewed or clustered values.

    The method depends on the data. Values that are all at one of the two `bounds` are a rate: Clopper-Pearson.
    Otherwise bootstrap-t over clusters. Where too many resamples lose the spread (almost all values alike), the
    bootstrap has nothing to say, and then: with `bounds`, values away from the common one are counted, and the
    Clopper-Pearson limit p on their share moves the mean to the bound, [c - p (c - lo), c + p (hi - c)], which for n
    zeros is the limit for 0 of n; without `bounds`, Student's t, and [-inf, inf] if there is no spread at all.

    Args:
        x: [n] finite values, any unit.
        clusters: [n] cluster of each value, None for a value of its own; or None when all are independent.
        level: confidence level.
        sided: "two", "upper" or "lower", as in `clopper_pearson`.
        bounds: the smallest and largest possible value, when there are such; limits are clipped to them.
        seed: makes the result reproducible; the order of x matters to it as well.
        n_resamples: bootstrap resamples.

    Returns:
        The interval, in the unit of x. Coverage is approximate: about nominal from 10 clusters on for mild skew, 2-4
        points short for very skewed values or fewer clusters. No method sees a rare large value that is not in x.

    Raises:
        UsageError: non-finite values, values outside the bounds, or lengths that do not match.
    """
    values = _finite(x, "x")
    sample = _Sample(values[:, None], clusters, "clusters", (seed, 0), n_resamples)
    return sample.interval(np.ones(1), level, sided, _checked(bounds, values))


class _Sample:
    """Columns measured on the same records, with the moments of their resamples, for means of linear combinations.

    A combination's bootstrap needs only sums over clusters of products of columns, so resampling happens once and a
    combination costs O(n_resamples) whatever the number of records.
    """

    def __init__(self, columns: Floats, clusters: Clusters, name: str, seed: tuple[int, int], n_resamples: int) -> None:
        self.columns = columns  # [n, k]
        self.n = len(columns)
        self.codes = codes = _codes(clusters, self.n, name)  # [n]
        self.groups = int(codes.max()) + 1 if self.n else 0
        self.singletons = self.groups == self.n
        self.means = columns.mean(axis=0) if self.n else np.full(columns.shape[1], math.nan)  # [k]
        residuals = np.column_stack([columns - self.means, np.ones(self.n)])  # [n, k + 1], last one counts records
        totals = np.zeros((self.groups, residuals.shape[1]))
        np.add.at(totals, codes, residuals)
        self.products = np.einsum("gi,gj->gij", totals, totals)  # [G, k + 1, k + 1]
        self.sums = np.empty((0, 0))  # [B, k + 1]
        self.grams = np.empty((0, 0, 0))  # [B, k + 1, k + 1]
        if self.groups > 1:
            width = totals.shape[1]
            moments = np.concatenate([totals, self.products.reshape(self.groups, -1)], axis=1)
            resampled = np.concatenate([w @ moments for w in _weights(self.groups, n_resamples, seed)])
            self.sums, self.grams = resampled[:, :width], resampled[:, width:].reshape(-1, width, width)

    def interval(self, coefficients: Floats, level: float, sided: Sided, bounds: Bounds | None) -> Interval:
        """Interval of the mean of columns @ coefficients, which lies within `bounds` if given."""
        below, above = _tails(level, sided)
        lo, hi = bounds or (-math.inf, math.inf)
        values = (self.columns * coefficients).sum(axis=1)  # [n]; equal rows stay equal, as in no BLAS product
        if self.n == 0:
            return Interval(math.nan, lo, hi, level, 0, "no data")
        if bounds and self.singletons and bool(np.all((values == lo) | (values == hi))):
            rate = clopper_pearson(int((values == hi).sum()), self.n, level, sided)
            low, high = lo + (hi - lo) * rate.low, lo + (hi - lo) * rate.high
            return Interval(lo + (hi - lo) * rate.value, low, high, level, self.n, rate.method)
        spread = float(np.ptp(values))
        value = float(self.means @ coefficients) if spread else float(values[0])
        low, high, method = -math.inf, math.inf, "unbounded"
        error = self._error(coefficients)
        if error > 1e-12 * spread > 0:  # clusters that all have the same mean have no spread either
            t, flat = self._studentised(coefficients, error)
            if flat < min(p for p in (below, above) if p > 0):
                quantiles = np.quantile(t, [1 - below, above], method="inverted_cdf")
                low, high, method = value - error * quantiles[0], value - error * quantiles[1], "bootstrap-t"
            elif not bounds:
                q = -special.stdtrit(self.groups - 1, np.array([below, above]))
                low, high, method = value - error * q[0], value + error * q[1], "student-t"
        if bounds and method == "unbounded":
            low, high = _near_constant(values, self.codes, below, above, lo, hi)
            method = "clopper-pearson on departures"
        low = max(lo, float(low)) if below > 0 else lo
        high = min(hi, float(high)) if above > 0 else hi
        return Interval(value, low, high, level, self.n, method)

    def _error(self, coefficients: Floats) -> float:
        """Standard error of the mean over clusters (0 for a single one, which has no spread to show)."""
        if self.groups < 2:
            return 0.0
        k = len(coefficients)
        squares = float(coefficients @ self.products.sum(axis=0)[:k, :k] @ coefficients)
        return math.sqrt(squares * self.groups / (self.groups - 1)) / self.n

    def _studentised(self, coefficients: Floats, error: float) -> tuple[Floats, float]:
        """t* of every resample, and the share of resamples that have lost the spread."""
        counts = self.sums[:, -1]  # [B] records in the resample
        shift = self.sums[:, :-1] @ coefficients / counts  # [B] m* - m
        projected = self.grams[:, :, :-1] @ coefficients  # [B, k + 1]
        squares = projected[:, :-1] @ coefficients - shift * (2 * projected[:, -1] - shift * self.grams[:, -1, -1])
        errors = np.sqrt(np.maximum(squares, 0.0) * self.groups / (self.groups - 1)) / counts  # [B] se*
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(shift == 0, 0.0, shift / errors)
        return t, float((errors < _FLAT * error).mean())


def _near_constant(
    values: Floats, codes: NDArray[np.intp], below: float, above: float, lo: float, hi: float
) -> tuple[float, float]:
    """Limits of a mean when almost all clusters of bounded values are alike: departures are bounded as a rate.

    A common value strictly inside the bounds was chosen by the data: given the first cluster, only the others are
    trials of it, hence one fewer.
    """
    sizes = np.bincount(codes)  # [G]
    means = np.bincount(codes, values) / sizes  # [G]
    centre = float(np.quantile(means, 0.5, method="inverted_cdf"))  # a median that is one of the means
    common = np.abs(means - centre) <= _FLAT * means.std() + 1e-12 * (hi - lo)
    # Trials are clusters, which differ in size: the share of departed records is rounded up to whole clusters.
    departed = math.ceil(sizes[~common].sum() / len(values) * len(sizes) - 1e-9)
    trials = max(len(sizes) - (lo < centre < hi), departed)
    first, last = float(means[common].min()), float(means[common].max())
    low = first - (first - lo) * clopper_pearson(departed, trials, 1 - below, "upper").high if below > 0 else lo
    high = last + (hi - last) * clopper_pearson(departed, trials, 1 - above, "upper").high if above > 0 else hi
    return low, high


# --- differences and decisions --------------------------------------------------------------------------------------


def difference_interval(
    x: ArrayLike,
    y: ArrayLike,
    *,
    paired: bool,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    level: float = 0.95,
    sided: Sided = "two",
    bounds: Bounds | None = None,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Interval:
    """Confidence interval of mean(x) - mean(y).

    Args:
        x: [n] finite values.
        y: [n] values of the same records in the same order if paired, else [m] values of other records.
        paired: whether x[i] and y[i] belong together.
        clusters: [n] clusters of x (and of y, if paired).
        y_clusters: [m] clusters of y; only for unpaired data.
        level: confidence level.
        sided: "two", "upper" or "lower".
        bounds: the smallest and largest possible value of x and of y.
        seed: makes the result reproducible.
        n_resamples: bootstrap resamples.

    Returns:
        Paired: `mean_interval` of x - y. Unpaired: MOVER over the two intervals. n is the number of pairs, or n + m.

    Raises:
        UsageError: as `mean_interval`; paired data of different lengths; y_clusters with paired data.
    """
    first, second = _finite(x, "x"), _finite(y, "y")
    bounds = _checked(bounds, np.concatenate([first, second]))
    span = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if bounds else None
    if paired:
        if len(first) != len(second) or y_clusters is not None:
            raise UsageError(
                f"expected pairs with one list of clusters, found {len(first)} and {len(second)} values; "
                "pass the same records in the same order, or paired=False"
            )
        return mean_interval(
            first - second, clusters, level=level, sided=sided, bounds=span, seed=seed, n_resamples=n_resamples
        )
    a = _Sample(first[:, None], clusters, "clusters", (seed, 0), n_resamples)
    b = _Sample(second[:, None], y_clusters, "y_clusters", (seed, 1), n_resamples)
    one = np.ones(1)
    both = _mover(a.interval(one, level, sided, bounds), b.interval(one, level, _OPPOSITE[sided], bounds), -1.0)
    lo, hi = span or (-math.inf, math.inf)
    return replace(both, low=lo if sided == "upper" else both.low, high=hi if sided == "lower" else both.high)


def noninferiority(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    *,
    paired: bool,
    better: Literal["higher", "lower"] = "higher",
    alpha: float = 0.05,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Is x worse than y by less than the margin?

    Args:
        x: [n] values under test (for instance the edited checkpoint's).
        y: [n] or [m] values to compare with, as in `difference_interval`.
        margin: the tolerated loss, > 0, in the unit of x, fixed before the data were seen.
        paired: as in `difference_interval`.
        better: the direction of a good value.
        alpha: probability of "met" when x is worse by exactly the margin, and of "not met" likewise.
        clusters: as in `difference_interval`.
        y_clusters: as in `difference_interval`.
        bounds: as in `difference_interval`.
        seed: as in `difference_interval`.

    Returns:
        "met" when the one-sided 1 - alpha limit excludes a loss of the margin, "not met" when the opposite limit
        shows at least that loss, else "inconclusive".

    Raises:
        UsageError: margin not positive, alpha not in (0, 0.5), or as `difference_interval`.
    """
    interval = _margin_interval(x, y, margin, alpha, paired, clusters, y_clusters, bounds, seed)
    best, worst = (interval.high, interval.low) if better == "higher" else (-interval.low, -interval.high)
    status: Status = "met" if worst > -margin else "not met" if best < -margin else "inconclusive"
    return Decision(status, _reason(interval, status, f"a worsening below {margin:g}"), margin, interval)


def equivalence(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    *,
    paired: bool,
    alpha: float = 0.05,
    clusters: Clusters = None,
    y_clusters: Clusters = None,
    bounds: Bounds | None = None,
    seed: int = 0,
) -> Decision:
    """Two one-sided tests: do the means differ by less than the margin, either way?

    Two tests at alpha = 5 % pass exactly when the 90 % interval of the difference lies inside (-margin, margin). A
    difference that is merely not significant is "inconclusive" here.

    Args:
        x: as in `noninferiority`.
        y: as in `noninferiority`.
        margin: as in `noninferiority`.
        paired: as in `difference_interval`.
        alpha: size of each of the two tests.
        clusters: as in `difference_interval`.
        y_clusters: as in `difference_interval`.
        bounds: as in `difference_interval`.
        seed: as in `difference_interval`.

    Returns:
        "met" inside the margin, "not met" when the interval lies wholly outside, else "inconclusive".

    Raises:
        UsageError: as `noninferiority`.
    """
    interval = _margin_interval(x, y, margin, alpha, paired, clusters, y_clusters, bounds, seed)
    inside = -margin < interval.low and interval.high < margin
    outside = interval.high < -margin or interval.low > margin
    status: Status = "met" if inside else "not met" if outside else "inconclusive"
    return Decision(status, _reason(interval, status, f"a difference within ±{margin:g}"), margin, interval)


def _margin_interval(
    x: ArrayLike,
    y: ArrayLike,
    margin: float,
    alpha: float,
    paired: bool,
    clusters: Clusters,
    y_clusters: Clusters,
    bounds: Bounds | None,
    seed: int,
) -> Interval:
    if not (0 < margin < math.inf and 0 < alpha < 0.5):
        raise UsageError(f"expected margin > 0 and 0 < alpha < 0.5, found {margin} and {alpha}; correct the criterion")
    return difference_interval(
        x, y, paired=paired, clusters=clusters, y_clusters=y_clusters, level=1 - 2 * alpha, bounds=bounds, seed=seed
    )


def _reason(interval: Interval, status: Status, claim: str) -> str:
    verb = {"met": "shows", "not met": "rules out", "inconclusive": "neither shows nor rules out"}[status]
    return f"the {interval.level:.0%} interval [{interval.low:.4g}, {interval.high:.4g}] {verb} {claim}"


def _mover(a: Interval, b: Interval, factor: float) -> Interval:
    """Interval of a + factor * b for independent a and b."""
    ends = sorted((factor * b.low, factor * b.high)) if factor else [0.0, 0.0]
    other = factor * b.value if factor else 0.0
    value = a.value + other
    low = value - math.hypot(a.value - a.low, other - ends[0])
    high = value + math.hypot(a.high - a.value, ends[1] - other)
    if math.isnan(value):  # an arm without data says nothing about the sum
        low, high = -math.inf, math.inf
    return Interval(value, low, high, a.level, a.n + b.n, f"mover({a.method}; {b.method})")


def residual(
    o: ArrayLike,
    u: ArrayLike,
    n: ArrayLike,
    *,
    clusters: Clusters = None,
    n_clusters: Clusters = None,
    level: float = 0.95,
    bounds: Bounds | None = (0.0, 1.0),
    min_gap: float = MIN_GAP,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Estimate:
    """What the edit left of an attack's success: (U - N) / (O - N), 0 = as never seen, 1 = as before.

    The interval holds the values r for which mean(u - r o) - (1 - r) mean(n) = 0 cannot be excluded (Fieller's
    argument), so it is honest, up to infinite, when O - N is uncertain. Forget records are resampled together with
    both their figures; control records apart.

    Args:
        o: [F] figure of the original checkpoint on the forget records, higher = more of the record.
        u: [F] figure of the edited checkpoint on the same records, in the same order.
        n: [C] figure of the edited checkpoint on control records.
        clusters: [F] clusters of the forget records.
        n_clusters: [C] clusters of the control records.
        level: confidence level.
        bounds: the smallest and largest possible figure; None for an unbounded one.
        min_gap: smallest O - N that can be tested.
        seed: makes the result reproducible.
        n_resamples: bootstrap resamples.

    Returns:
        The interval (n = F + C), or "not testable" where O - N is below min_gap or a set is empty.

    Raises:
        UsageError: as `mean_interval`, or o and u of different lengths.
    """
    before, after, control = _finite(o, "o"), _finite(u, "u"), _finite(n, "n")
    bounds = _checked(bounds, np.concatenate([before, after, control]))
    if len(before) != len(after):
        raise UsageError(f"expected O and U on the same records, found {len(before)} and {len(after)}; align them")
    _tails(level, "two")
    forget = _Sample(np.column_stack([after, before]), clusters, "clusters", (seed, 0), n_resamples)
    control_sample = _Sample(control[:, None], n_clusters, "n_clusters", (seed, 1), n_resamples)
    if not forget.n or not control_sample.n:
        return Estimate("not testable", "no records in the forget or the control set", None)
    u_mean, o_mean = forget.means
    n_mean = float(control_sample.means[0])
    gap = float(o_mean) - n_mean
    if gap < min_gap:
        return Estimate("not testable", f"O - N = {gap:.3g} is below {min_gap:g}", None)
    value = (float(u_mean) - n_mean) / gap
    never_seen = control_sample.interval(np.ones(1), level, "two", bounds)

    def contrast(r: float) -> Interval:
        if bounds:
            ends = sorted((r * bounds[0], r * bounds[1]))
            span = (bounds[0] - ends[1], bounds[1] - ends[0])
        left = forget.interval(np.array([1.0, -r]), level, "two", span if bounds else None)
        return _mover(left, never_seen, r - 1.0)

    # The contrast falls with r: the upper limit is where its own upper limit reaches zero, and the other way round.
    high = _crossing(lambda r: contrast(r).high, value, 1.0)
    low = _crossing(lambda r: -contrast(r).low, value, -1.0)
    return Estimate("ok", None, Interval(value, low, high, level, forget.n + control_sample.n, "fieller, bootstrap-t"))


# --- membership scores ----------------------------------------------------------------------------------------------


def auc(
    pos: ArrayLike,
    neg: ArrayLike,
    *,
    pos_clusters: Clusters = None,
    neg_clusters: Clusters = None,
    method: Literal["delong", "bootstrap"] = "delong",
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> Estimate:
    """Area under the ROC curve, P(pos > neg) + P(pos = neg) / 2.

    The DeLong interval is formed for logit(AUC), so it stays inside (0, 1) and holds its level near 1. Perfect
    separation and scores that are all equal have no variance to estimate: then the min(m, n) disjoint pairs, all
    with the same outcome, bound the AUC as k of k trials do.

    Args:
        pos: [m] scores of members, higher = more likely a member.
        neg: [n] scores of non-members.
        pos_clusters: [m] clusters; clustered scores need method="bootstrap".
        neg_clusters: [n] clusters.
        method: "delong", or "bootstrap": percentile interval, members and non-members resampled apart.
        level: confidence level.
        seed: of the bootstrap.
        n_resamples: bootstrap resamples.

    Returns:
        The interval (n = m + n), or "not resolvable" below 50 records, or 50 clusters, on a side.

    Raises:
        UsageError: non-finite scores, clusters of the wrong length, or clusters with DeLong.
    """
    below, above = _tails(level, "two")
    x, y = _finite(pos, "pos"), _finite(neg, "neg")
    if method == "delong" and not (pos_clusters is None and neg_clusters is None):
        raise UsageError('expected independent scores for DeLong, found clusters; use method="bootstrap"')
    x_codes, y_codes = _codes(pos_clusters, len(x), "pos_clusters"), _codes(neg_clusters, len(y), "neg_clusters")
    sides = len(np.unique(x_codes)), len(np.unique(y_codes))
    if min(sides) < MIN_PER_SIDE:
        reason = f"{sides[0]} independent members and {sides[1]} non-members; {MIN_PER_SIDE} a side are needed"
        return Estimate("not resolvable", reason, None)
    ranks = _midranks(np.concatenate([x, y]))
    over = (ranks[: len(x)] - _midranks(x)) / len(y)  # [m] share of non-members below each member
    under = 1 - (ranks[len(x) :] - _midranks(y)) / len(x)  # [n] share of members above each non-member
    value = float(over.mean())
    variance = float(over.var(ddof=1) / len(x) + under.var(ddof=1) / len(y))
    if variance <= 1e-24:
        low, high = _near_constant(np.full(min(sides), value), np.arange(min(sides)), below, above, 0.0, 1.0)
        name = "clopper-pearson on disjoint pairs"
    elif method == "delong":
        half = -float(special.ndtri(below)) * math.sqrt(variance) / (value * (1 - value))
        low, high = special.expit(special.logit(value) - half), special.expit(special.logit(value) + half)
        name = "delong, logit"
    else:
        resampled = _resampled_aucs(x, y, x_codes, y_codes, seed, n_resamples)
        low, high = np.quantile(resampled, [below, 1 - above])
        name = "bootstrap-percentile, stratified"
    return Estimate("ok", None, Interval(value, float(low), float(high), level, len(x) + len(y), name))


def _midranks(x: Floats) -> Floats:
    """1-based ranks, ties sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _resampled_aucs(
    x: Floats, y: Floats, x_codes: NDArray[np.intp], y_codes: NDArray[np.intp], seed: int, n_resamples: int
) -> Floats:
    """AUC of every resample, from the weight each resample gives to each distinct score."""
    distinct, places = np.unique(np.concatenate([x, y]), return_inverse=True)

    def weights(place: NDArray[np.intp], codes: NDArray[np.intp], stream: int) -> Iterator[Floats]:
        order = np.argsort(place, kind="stable")
        present, starts = np.unique(place[order], return_index=True)
        for w in _weights(int(codes.max()) + 1, n_resamples, (seed, stream), rows=_CHUNK // (len(x) + len(y)) + 1):
            by_score = np.zeros((len(w), len(distinct)))  # [chunk, distinct scores]
            by_score[:, present] = np.add.reduceat(w[:, codes[order]], starts, axis=1)
            yield by_score

    aucs = []
    for p, q in zip(weights(places[: len(x)], x_codes, 0), weights(places[len(x) :], y_codes, 1), strict=True):
        wins = (p * (np.cumsum(q, axis=1) - q / 2)).sum(axis=1)
        aucs.append(wins / (p.sum(axis=1) * q.sum(axis=1)))
    return np.concatenate(aucs)


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
    _tails(level, "two")
    x, y = _finite(pos, "pos"), _finite(neg, "neg")
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


# --- several tests at once ------------------------------------------------------------------------------------------


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's adjusted p-values: rejecting those <= alpha keeps the chance of any false rejection <= alpha.

    Args:
        pvalues: [k] p-values in [0, 1].

    Returns:
        [k] adjusted p-values, in the order given.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = _pvalues(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def benjamini_hochberg(pvalues: ArrayLike) -> Floats:
    """Benjamini-Hochberg adjusted p-values: rejecting those <= q keeps the expected share of false ones <= q.

    Args:
        pvalues: [k] p-values in [0, 1], independent or positively dependent.

    Returns:
        [k] adjusted p-values, in the order given.

    Raises:
        UsageError: a value outside [0, 1].
    """
    p = _pvalues(pvalues)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return adjusted


# --- shared ---------------------------------------------------------------------------------------------------------


def _tails(level: float, sided: Sided) -> tuple[float, float]:
    """Probability left below and above the interval."""
    if not 0 < level < 1:
        raise UsageError(f"expected a confidence level in (0, 1), found {level}; 0.95 is usual")
    if sided not in _OPPOSITE:
        raise UsageError(f'expected sided "two", "upper" or "lower", found {sided!r}; correct it')
    alpha = round(1 - level, 12)  # 1 - 0.95 is 0.05, so that one-sided and two-sided limits agree to the last resample
    return {"two": (alpha / 2, alpha / 2), "upper": (0.0, alpha), "lower": (alpha, 0.0)}[sided]


def _finite(x: ArrayLike, name: str) -> Floats:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1:
        raise UsageError(f"expected {name} as a flat list of numbers, found {values.ndim} dimensions; flatten it")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise UsageError(f"expected finite {name}, found {bad} of {len(values)} not finite; leave them out and say so")
    return values


def _checked(bounds: Bounds | None, values: Floats) -> Bounds | None:
    if bounds is None:
        return None
    lo, hi = bounds
    outside = int(((values < lo) | (values > hi)).sum())
    if not -math.inf < lo < hi < math.inf or outside:
        raise UsageError(f"expected values within [{lo}, {hi}], found {outside} outside; correct the bounds")
    return float(lo), float(hi)


def _pvalues(pvalues: ArrayLike) -> Floats:
    p = _finite(pvalues, "p-values")
    _checked((0.0, 1.0), p)
    return p


def _codes(clusters: Clusters, n: int, name: str) -> NDArray[np.intp]:
    """[n] cluster numbers from 0 in order of first appearance; None (or a table's NaN) is a cluster of its own."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise UsageError(f"expected {name} for {n} values, found {len(clusters)}; pass one for each value")
    seen: dict[Hashable, int] = {}
    own = [c is None or c != c for c in clusters]
    keys: list[Hashable] = [(i,) if alone else (0, c) for i, (c, alone) in enumerate(zip(clusters, own, strict=True))]
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.intp)


def _weights(groups: int, n_resamples: int, seed: tuple[int, int], rows: int | None = None) -> Iterator[Floats]:
    """[chunk, G] times each cluster is drawn, for `n_resamples` resamples in chunks of bounded memory.

    The draws do not depend on the chunk size.
    """
    rng = np.random.default_rng(seed)
    rows = rows or _CHUNK // groups + 1
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        drawn = rng.integers(0, groups, (count, groups)) + np.arange(count)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float64)


def _crossing(f: Callable[[float], float], start: float, direction: float) -> float:
    """Where f, which is not negative at `start`, becomes negative in this direction; infinite if it does not."""
    inside, step = start, 0.125
    while f(outside := start + direction * step) >= 0:
        inside, step = outside, step * 2
        if step > 1e6:
            return direction * math.inf
    while abs(outside - inside) > 1e-6 * max(1.0, abs(outside)):
        middle = (inside + outside) / 2
        if f(middle) >= 0:
            inside = middle
        else:
            outside = middle
    return outside
