"""What every function refuses, and what it costs."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest

from probes.errors import UsageError
from probes.statistics import (
    auc,
    benjamini_hochberg,
    clopper_pearson,
    difference_interval,
    equivalence,
    holm,
    mean_interval,
    noninferiority,
    required_n,
    resampling,
    residual,
    tpr_at_fpr,
    worst_of,
)
from tests.probes.statistics.common import UNIT, limits


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
    monkeypatch.setattr(resampling, "CHUNK", 1000)
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
