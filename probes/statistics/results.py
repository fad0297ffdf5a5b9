"""What the functions of this package return, and the types they take."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sided = Literal["two", "upper", "lower"]
Status = Literal["met", "not met", "inconclusive"]
Alternative = Literal["greater", "two-sided"]
Clusters = Sequence[Hashable | None] | None
Bounds = tuple[float, float]
Floats = NDArray[np.float64]


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
