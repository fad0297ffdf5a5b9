"""Residuals: the contrast by hand, perfect forgetting, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.statistics import mean_interval, residual
from probes.statistics.means import Sample
from probes.statistics.resampling import RESAMPLES
from tests.probes.statistics.common import UNIT, coverage, limits, not_below


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
    control = Sample(n[:, None], None, "n", (4, 1), RESAMPLES)
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
