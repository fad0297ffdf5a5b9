"""How far a search got after each step, and how many steps prove something: a budget calibrated on never-seen records.

With enough steps a nearby input makes a model emit anything, so a success counts only within a number of steps in which
never-seen records do not succeed (Finding Dori, arXiv 2507.16880: 50 steps bring memorised images back, others take
more than 500). A record has succeeded by step s if, at s or before, every token of its completion was the argmax (an
image: was predicted as labelled) or its probability reached a threshold. Among the marks m_1 < m_2 < ... the budget is

    the largest m with  (share of calibration controls that succeeded by step m) <= fpr

over the controls that had not succeeded at step 0: a classifier is right on most images that it never saw, and those
say nothing about the search. The controls that calibrate are not the ones compared with the records afterwards.

Shape letters: R records, S steps, M marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from probes.errors import UsageError
from probes.memorised import COLUMNS

MARKS = (1, 2, 5, 10, 20, 50)
FPR = 0.05
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Trace:
    """The best that a search had reached by each step; step 0 is the input as it was. All columns never fall.

    Attributes:
        record_ids: R identifiers in input order.
        probability: [R, S + 1] highest probability so far.
        accuracy: [R, S + 1] highest accuracy so far.
        extracted: [R, S + 1] bool, extracted at this step or before.
        rows: rows run forward and backward.
    """

    record_ids: tuple[str, ...]
    probability: np.ndarray = field(repr=False)
    accuracy: np.ndarray = field(repr=False)
    extracted: np.ndarray = field(repr=False)
    rows: int = 0

    @classmethod
    def of(cls, record_ids: Sequence[str], scores: np.ndarray, rows: int) -> Trace:
        """From scores [restarts, R, S + 1, 3] of probability, accuracy, extracted at each step."""
        best = np.maximum.accumulate(scores.max(0), axis=1)  # [R, S + 1, 3]
        return cls(tuple(record_ids), best[..., 0], best[..., 1], best[..., 2] > 0.5, rows)

    @property
    def steps(self) -> int:
        """S."""
        return int(self.probability.shape[1]) - 1

    def success(self, threshold: float = THRESHOLD) -> np.ndarray:
        """[R, S + 1] bool: extracted, or a probability of at least `threshold`, at this step or before."""
        found: np.ndarray = self.extracted | (self.probability >= threshold)
        return found

    def at(self, step: int) -> pd.DataFrame:
        """The columns of `probes.memorised` as the search had them by a step.

        Raises:
            UsageError: a step that was not taken.
        """
        if not 0 <= step <= self.steps:
            raise UsageError(f"expected a step of 0 to {self.steps}, found {step}; run more steps")
        probability = self.probability[:, step]
        with np.errstate(divide="ignore"):
            loss = np.maximum(-np.log(probability), 0.0)
        columns = (list(self.record_ids), probability, self.accuracy[:, step], self.extracted[:, step], loss)
        return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


@dataclass(frozen=True, slots=True)
class Budget:
    """How many steps of a search count.

    Attributes:
        steps: the budget; None where even the first mark is too much.
        marks: steps that were tried as a budget, M.
        successes: [M] calibration controls that had succeeded by each mark, but not before the first step.
        controls: calibration controls that had not succeeded before the first step.
        reason: why there is no budget.
    """

    steps: int | None
    marks: tuple[int, ...]
    successes: tuple[int, ...]
    controls: int
    reason: str | None = None


def calibrate(trace: Trace, *, marks: Sequence[int] = MARKS, fpr: float = FPR, threshold: float = THRESHOLD) -> Budget:
    """The largest number of steps in which at most a share `fpr` of never-seen records succeed.

    Args:
        trace: of the calibration controls.
        marks: numbers of steps to choose from, ascending, at least 1; those beyond the trace are left out.
        fpr: the share.
        threshold: probability that counts as a success.

    Raises:
        UsageError: no controls, no mark within the trace, or a share or threshold outside (0, 1).
    """
    within = tuple(sorted({int(mark) for mark in marks if mark <= trace.steps}))
    if not trace.record_ids or not within or within[0] < 1:
        found = f"{len(trace.record_ids)} and {len(within)}"
        raise UsageError(f"expected never-seen records and marks of 1 to {trace.steps} steps, found {found}")
    if not (0 < fpr < 1 and 0 < threshold < 1):
        raise UsageError("expected a false-positive rate and a threshold between 0 and 1, found others")
    success = trace.success(threshold)
    success = success[~success[:, 0]]
    controls = len(success)
    if not controls:
        return Budget(None, within, (0,) * len(within), 0, "every never-seen record succeeds without a step")
    counts = tuple(int(success[:, mark].sum()) for mark in within)
    allowed = [mark for mark, count in zip(within, counts, strict=True) if count <= fpr * controls]
    if allowed:
        return Budget(max(allowed), within, counts, controls)
    reason = (
        f"{counts[0]} of {controls} never-seen records succeed within {within[0]} "
        f"step{'s' * (within[0] != 1)}, more than {fpr:g} of them: no number of steps proves anything"
    )
    return Budget(None, within, counts, controls, reason)
