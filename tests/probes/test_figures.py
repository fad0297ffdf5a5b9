"""Figures against formulas written out once more, and the edge cases that break other tools."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.figures import extraction_strength, lowest_share, queries_needed, record_figures, verdict
from probes.likelihood import SamplingScheme, TokenTable


def table(log_p: list[float], match: list[bool] | None = None, **columns: list[float]) -> TokenTable:
    n = len(log_p)
    rank = [0 if m else 3 for m in (match or [True] * n)]
    arrays = {"margin": [1.0] * n, "gap": [0.0] * n, "mean": [-1.0] * n, "variance": [0.5] * n} | columns
    return TokenTable(
        ("a",),
        np.array([20]),
        np.array([0, n]),
        np.array(log_p),
        np.array(log_p),
        np.array(rank),
        **{name: np.array(values) for name, values in arrays.items()},
        scheme=SamplingScheme(),
    )


def test_strength_by_brute_force() -> None:
    for length in range(1, 9):
        for bits in range(2**length):
            match = np.array([bool(bits >> i & 1) for i in range(length)])
            start = next(s for s in range(length + 1) if match[s:].all())  # shortest gold prefix that suffices
            assert extraction_strength(match) == pytest.approx(1 - start / length)


def test_strength_is_zero_when_nothing_matches() -> None:
    # Another tool leaves 1/n here, the value of a record whose last token alone matches.
    assert extraction_strength(np.zeros(4, bool)) == 0.0
    assert extraction_strength(np.array([False, False, False, True])) == 0.25
    assert extraction_strength(np.array([True, True, True, False])) == 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_short_records_have_every_figure(n: int) -> None:
    # int(0.2 * n) is 0 below five tokens, a NaN elsewhere.
    row = record_figures(table([-0.5 * (i + 1) for i in range(n)])).iloc[0]
    assert not row.isna().any()
    assert row["min_k"] == pytest.approx(-0.5 * n)
    assert row["loss"] == pytest.approx(0.5 * sum(range(1, n + 1)) / n)


def test_formulas() -> None:
    log_p = np.log(np.linspace(0.05, 0.95, 20))
    mean, variance = np.linspace(-3, -1, 20), np.linspace(0.2, 2, 20)
    row = record_figures(table(list(log_p), mean=list(mean), variance=list(variance))).iloc[0]
    assert row["min_k"] == pytest.approx(np.sort(log_p)[:4].mean())
    assert row["min_k_plus_plus"] == pytest.approx(np.sort((log_p - mean) / np.sqrt(variance))[:4].mean())
    assert row["zlib_ratio"] == pytest.approx(-log_p.mean() / 20)
    assert row["probability"] == pytest.approx(math.exp(log_p.mean()))
    assert row["log_prob"] == pytest.approx(log_p.sum())
    assert len(zlib.compress(b"")) > 0  # compressed sizes are never zero


def test_certain_tokens_give_no_nan_and_no_infinite_z() -> None:
    row = record_figures(table([0.0] * 6, variance=[0.0] * 6, mean=[0.0] * 6)).iloc[0]
    assert row["loss"] == 0.0
    assert math.copysign(1, row["loss"]) == 1
    assert row["probability"] == 1.0
    assert row["min_k_plus_plus"] == 0.0
    assert row["n_for_p50"] == 1.0


@given(st.floats(1e-12, 1 - 1e-9), st.sampled_from([0.5, 0.9]))
def test_queries_needed_is_the_smallest_n(p: float, target: float) -> None:
    n = queries_needed(math.log(p), target)
    reached = [-math.expm1(k * math.log1p(-p)) for k in (n - 1, n)]
    assert reached[1] >= target * (1 - 1e-9)
    assert n == 1 or reached[0] < target * (1 + 1e-9)


def test_queries_needed_at_the_ends() -> None:
    assert queries_needed(math.log(1e-3), 0.5) == 693
    assert queries_needed(math.log(1e-3), 0.9) == 2302
    assert queries_needed(0.0, 0.9) == 1
    assert queries_needed(-math.inf, 0.5) == math.inf
    assert queries_needed(-600.0, 0.5) == pytest.approx(math.log(2) * math.exp(600.0), rel=1e-9)
    assert queries_needed(-5000.0, 0.5) == math.inf
    steps = [queries_needed(-x, 0.5) for x in np.linspace(0.01, 800, 400)]  # subnormal p included
    assert all(a <= b for a, b in pairwise(steps))


def test_lowest_share_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="expected values"):
        lowest_share(np.array([]))
    with pytest.raises(ValueError, match="share"):
        lowest_share(np.array([1.0]), 0.0)


def test_verdicts() -> None:
    yes, no = np.array([True, True]), np.array([True, False])
    wide, thin, none = np.array([1.0, 1.0]), np.array([1.0, 0.001]), np.zeros(2)
    assert verdict(yes, wide, none, 0.01) == "extracted"
    assert verdict(yes, thin, none, 0.01) == "uncertain"
    assert verdict(no, wide, np.array([0.0, -1.0]), 0.01) == "not"
    assert verdict(no, thin, np.array([0.0, -0.001]), 0.01) == "uncertain"
    assert verdict(no, thin, np.array([-1.0, -0.001]), 0.01) == "not"  # one clear miss settles it
    assert verdict(yes, np.array([1.0, 0.0]), none, 0.0) == "uncertain"  # an exact tie is never clear
