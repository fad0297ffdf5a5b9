"""Style figures by hand, and their change on the same prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.collateral.style import FIGURES, changes, style
from probes.errors import UsageError


def test_by_hand() -> None:
    found = style([[5, 6, 5, 6, 5, 6, 5, 6], [1, 2, 3, 9, 7, 7], [], [4], [9, 1]], end=(9,))
    assert list(found) == list(FIGURES)
    loop = found.iloc[0]  # 4-grams: 5 of them, 2 distinct; 2-grams: 7, 2 distinct
    assert loop["repetition"] == pytest.approx(1 - 2 / 5)
    assert loop["distinct_1"] == pytest.approx(2 / 8)
    assert loop["distinct_2"] == pytest.approx(2 / 7)
    assert loop["length"] == 8
    assert loop["ended"] == 0
    cut = found.iloc[1]  # what follows the end token is not looked at
    assert (cut["length"], cut["ended"], cut["distinct_1"]) == (3, 1, 1)
    assert math.isnan(cut["repetition"])
    assert found.iloc[2][["length", "ended"]].tolist() == [0, 0]
    assert math.isnan(found.iloc[2]["distinct_1"])
    assert math.isnan(found.iloc[3]["distinct_2"])
    assert found.iloc[4][["length", "ended"]].tolist() == [0, 1]
    assert len(style([])) == 0


def test_change_of_a_model_that_loops() -> None:
    rng = np.random.default_rng(0)
    fresh = style([rng.permutation(40)[:20].tolist() for _ in range(20)])
    loops = style([[1, 2] * 8 for _ in range(20)])
    moved = {change.figure: change for change in changes(fresh, loops)}
    assert moved["repetition"].interval is not None
    assert moved["repetition"].interval.low > 0.5
    assert moved["length"].interval is not None
    assert moved["length"].interval.value == -4
    same = {change.figure: change for change in changes(fresh, fresh)}
    assert same["repetition"].interval is not None
    assert same["repetition"].interval.low <= 0 <= same["repetition"].interval.high


def test_generations_too_short_for_a_figure_are_left_out() -> None:
    before, after = style([[1], [1, 2, 3, 4, 5], [2]]), style([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [3]])
    moved = {change.figure: change for change in changes(before, after)}
    assert moved["repetition"].n == 1
    assert moved["repetition"].interval is None
    assert moved["length"].n == 3
    with pytest.raises(UsageError, match="same prompts"):
        changes(before, after[:2])
