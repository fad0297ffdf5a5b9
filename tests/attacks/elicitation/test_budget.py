"""Traces and budgets against counting by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from attacks.elicitation.budget import Trace, calibrate
from probes.errors import UsageError
from probes.memorised import COLUMNS


def trace(first: list[int], steps: int = 20) -> Trace:
    """Records that are extracted from a given step on; never for -1."""
    scores = np.zeros((1, len(first), steps + 1, 3))
    for row, step in enumerate(first):
        if step >= 0:
            scores[0, row, step] = (0.4, 1.0, 1.0)
    return Trace.of([f"r{i}" for i in range(len(first))], scores, 7)


def test_a_trace_keeps_the_best_of_all_restarts_and_steps() -> None:
    scores = np.array(
        [[[[0.1, 0.5, 0], [0.6, 0.7, 0], [0.3, 1.0, 1]]], [[[0.2, 0.4, 0], [0.1, 0.4, 0], [0.7, 0.6, 0]]]]
    )
    found = Trace.of(["r"], scores, 6)
    assert found.probability.tolist() == [[0.2, 0.6, 0.7]]
    assert found.accuracy.tolist() == [[0.5, 0.7, 1.0]]
    assert found.extracted.tolist() == [[False, False, True]]
    assert found.steps == 2
    assert found.success(0.65).tolist() == [[False, False, True]]
    assert found.success(0.6).tolist() == [[False, True, True]]
    frame = found.at(1)
    assert tuple(frame.columns) == COLUMNS
    expected = {"record_id": "r", "probability": 0.6, "accuracy": 0.7, "extracted": False, "loss": -np.log(0.6)}
    pd.testing.assert_frame_equal(frame, pd.DataFrame([expected]))


def test_the_budget_is_the_largest_mark_with_few_enough_successes() -> None:
    found = trace([*[-1] * 36, 3, 6, 12, 20])  # 40 controls: 5 % are two
    budget = calibrate(found, marks=(1, 2, 5, 10, 20), fpr=0.05)
    assert (budget.steps, budget.marks, budget.successes) == (10, (1, 2, 5, 10, 20), (0, 0, 1, 2, 4))
    assert budget.controls == 40
    assert budget.reason is None
    assert calibrate(found, marks=(1, 2, 5, 10, 20), fpr=0.1).steps == 20
    assert calibrate(found, marks=(1, 2, 5, 10, 20, 50), fpr=0.1).marks[-1] == 20  # no further than the search went
    assert calibrate(found, fpr=0.01).steps == 2


def test_a_probability_above_the_threshold_is_a_success() -> None:
    found = trace([2])
    assert calibrate(found, marks=(1, 2), fpr=0.5, threshold=0.9).successes == (0, 1)
    found.extracted[:] = False
    assert calibrate(found, marks=(1, 2), fpr=0.5, threshold=0.41).successes == (0, 0)
    assert calibrate(found, marks=(1, 2), fpr=0.5, threshold=0.4).successes == (0, 1)


def test_no_budget_where_even_the_first_mark_is_too_much() -> None:
    budget = calibrate(trace([1, -1, -1, -1]), marks=(1, 2))
    assert budget.steps is None
    assert budget.reason == (
        "1 of 4 never-seen records succeed within 1 step, more than 0.05 of them: no number of steps proves anything"
    )


def test_controls_that_need_no_step_say_nothing() -> None:
    found = calibrate(trace([*[0] * 30, *[-1] * 10, 4]), marks=(1, 2, 5), fpr=0.05)
    assert (found.steps, found.successes, found.controls) == (2, (0, 0, 1), 11)
    none = calibrate(trace([0, 0]), marks=(1, 2))
    assert (none.steps, none.controls) == (None, 0)
    assert none.reason == "every never-seen record succeeds without a step"


def test_defect_of_published_attacks_every_iterate_counts_on_the_controls_too() -> None:
    """Keeping every iterate as a try raises success; here a success at any earlier step counts against the budget."""
    scores = np.zeros((1, 1, 4, 3))
    scores[0, 0, 1, 2] = 1.0  # extracted once, then no more
    assert calibrate(Trace.of(["r"], scores, 4), marks=(1, 2, 3), fpr=0.5).successes == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"marks": (0, 2)}, "marks of 1 to 20"),
        ({"marks": (30,)}, "found 3 and 0"),
        ({"fpr": 0.0}, "between 0 and 1"),
        ({"threshold": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(trace([1, 2, 3]), **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="found 0 and"):
        calibrate(trace([]))
    with pytest.raises(UsageError, match="0 to 20"):
        trace([1]).at(21)
