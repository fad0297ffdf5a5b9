"""The figures a run reports, one registry: where each is measured, its unit, and what "memorised" looks like in it.

A figure is `{value, unit, n, ci_low, ci_high, ci_level, direction}`; `direction` is the way that is better for
forgetting. Rates get exact intervals, means a bootstrap, both from `probes.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from probes import statistics
from probes.errors import UsageError

Figure = dict[str, Any]
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure.

    Attributes:
        name: as criteria and reports write it.
        title: for people.
        column: of the record table.
        unit: `share`, `probability`, `nats`, ...
        memorised: whether a memorised record has a high or a low value.
        binary: whether the column is a yes or no per record.
        bounds: range of one record's value, where it has one.
    """

    name: str
    title: str
    column: str
    unit: str
    memorised: Literal["high", "low"]
    binary: bool = False
    bounds: tuple[float, float] | None = None

    def better(self, role: str) -> Literal["higher", "lower"]:
        """Which way is better: less memorised for `records`, more for `retain`."""
        wants_high = (self.memorised == "high") == (role == "retain")
        return "higher" if wants_high else "lower"


_UNIT = (0.0, 1.0)
LANGUAGE = (
    Metric("extraction.greedy", "emitted by greedy decoding", "emitted", "share", "high", True, _UNIT),
    Metric(
        "extraction.sampled",
        "probability that one sample equals the record",
        "p_z",
        "probability",
        "high",
        False,
        _UNIT,
    ),
    Metric("extraction_strength", "extraction strength", "extraction_strength", "share", "high", False, _UNIT),
    Metric("token_accuracy", "token accuracy", "token_accuracy", "share", "high", False, _UNIT),
    Metric("probability", "probability per token", "probability", "probability", "high", False, _UNIT),
    Metric("loss", "loss", "loss", "nats per token", "low"),
    Metric("min_k", "Min-K% (20 %)", "min_k", "nats", "high"),
    Metric("min_k_plus_plus", "Min-K%++ (20 %)", "min_k_plus_plus", "standard deviations", "high"),
    Metric("zlib_ratio", "loss per compressed byte", "zlib_ratio", "nats per byte", "low"),
)
IMAGES = (
    Metric("correct", "predicted as labelled", "correct", "share", "high", True, _UNIT),
    Metric("label_probability", "probability of the label", "label_probability", "probability", "high", False, _UNIT),
    Metric("loss", "loss", "loss", "nats", "low"),
    Metric("margin", "log-odds margin of the label", "margin", "nats", "high"),
    Metric("entropy", "entropy of the prediction", "entropy", "nats", "low"),
)


def metrics_of(task: str) -> tuple[Metric, ...]:
    """The metrics of `causal_lm` or `image_classification`."""
    return LANGUAGE if task == "causal_lm" else IMAGES


def find(task: str, name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: naming the metrics of this kind of model.
    """
    for metric in metrics_of(task):
        if metric.name == name:
            return metric
    known = ", ".join(metric.name for metric in metrics_of(task))
    raise UsageError(f"expected a criterion on one of {known} for a {task} checkpoint, found another metric")


def values(metric: Metric, frame: pd.DataFrame) -> np.ndarray:
    """[R] float64 values of a metric; infinite losses are kept finite at the largest a double's exponent holds."""
    if metric.column == "p_z":
        raw = np.exp(frame["log_p_z"].to_numpy(dtype=np.float64))
    else:
        raw = frame[metric.column].to_numpy(dtype=np.float64)
    finite: np.ndarray = np.nan_to_num(raw, posinf=745.0, neginf=-745.0)  # -log of the smallest double
    return finite


def clusters(frame: pd.DataFrame) -> list[str] | None:
    """Near-duplicate clusters of a table's rows, or None when every record stands alone."""
    return named([None if pd.isna(group) else str(group) for group in frame["group"]]) if "group" in frame else None


def named(groups: Sequence[str | None] | None) -> list[str] | None:
    """Clusters with a name for every record, or None when every record stands alone."""
    if groups is None or all(group is None for group in groups):
        return None
    return [f"record-{i}" if group is None else str(group) for i, group in enumerate(groups)]


def as_figure(interval: statistics.Interval, metric: Metric, direction: str) -> Figure:
    """A report figure of a metric from an interval."""
    return interval_figure(interval, metric.unit, direction)


def interval_figure(interval: statistics.Interval, unit: str, direction: str = "lower") -> Figure:
    """A report figure from an interval."""
    return {
        "value": interval.value,
        "unit": unit,
        "n": interval.n,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "ci_level": interval.level,
        "direction": direction,
    }


def residual_figure(
    o: np.ndarray,
    u: np.ndarray,
    n: np.ndarray,
    clusters: Sequence[str | None] | None,
    n_clusters: Sequence[str | None] | None,
    bounds: tuple[float, float] | None,
    seed: int,
) -> dict[str, Any]:
    """(U - N) / (O - N) as a figure with `status` and `reason`; records that an arm lacks (NaN) are left out.

    Args:
        o: [F] original on the records.
        u: [F] edited copy on the records.
        n: [C] edited copy on never-seen records.
        clusters: [F] of the records.
        n_clusters: [C] of the never-seen records.
        bounds: range of one record's figure; None where it has none.
        seed: of the bootstrap.
    """
    if bounds is None:
        return {"status": "not testable", "reason": "the figure has no fixed range; read it through its arms"}
    kept, seen = np.isfinite(o) & np.isfinite(u), np.isfinite(n)
    estimate = statistics.residual(
        o[kept],
        u[kept],
        n[seen],
        clusters=of_rows(clusters, kept),
        n_clusters=of_rows(n_clusters, seen),
        bounds=bounds,
        seed=seed,
    )
    if estimate.interval is None:
        return {"status": "not testable", "reason": estimate.reason}
    return interval_figure(estimate.interval, "share of O - N") | {"status": "ok", "reason": None}


def of_rows(groups: Sequence[str | None] | None, kept: np.ndarray) -> list[str] | None:
    """Names of the clusters of some rows, or None when every record stands alone."""
    found = named(groups)
    return None if found is None else [group for group, keep in zip(found, kept, strict=True) if keep]


def figure(metric: Metric, frame: pd.DataFrame, role: str, seed: int = 0) -> Figure:
    """The figure of one record set: its mean, with an exact interval for a rate and a bootstrap for a mean."""
    x, groups = values(metric, frame), clusters(frame)
    if metric.binary and groups is None:
        interval = statistics.clopper_pearson(int(x.sum()), len(x), LEVEL)
    else:
        interval = statistics.mean_interval(x, groups, level=LEVEL, bounds=metric.bounds, seed=seed)
    return as_figure(interval, metric, metric.better(role))


def figures(task: str, frame: pd.DataFrame, role: str, seed: int = 0) -> dict[str, Figure]:
    """Every figure of one record set."""
    return {metric.name: figure(metric, frame, role, seed) for metric in metrics_of(task)}
