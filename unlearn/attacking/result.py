"""What one attack found on one model, and the file it leaves in the run folder (`unlearn.attack/v1`).

Figures go by a key; `figures` are those on the records, `control` the same ones on never-seen records. Per-record
columns are numbers or yes and no; the column `hit` says whether this attack got the record out or flagged it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from probes import statistics
from unlearn.evidence.metrics import LEVEL, Figure, named
from unlearn.evidence.metrics import interval_figure as as_figure

__all__ = ["Clusters", "Direction", "Result", "as_figure", "frame", "line", "point", "rate"]

SCHEMA = "unlearn.attack/v1"
Direction = Literal["higher", "lower", "none"]
Clusters = Sequence[str | None] | None


@dataclass(slots=True)
class Result:
    """One attack on one model.

    Attributes:
        headline: key of the figure that stands for the attack.
        figures: on the records.
        control: on never-seen records.
        titles: what each key means, in words.
        not_resolvable: figures that were asked for and cannot be given, with the reason.
        column: per-record column whose mean is the headline, where there is one.
        records: per-record columns, one row for each record in order.
        controls: the same for the control set.
        curves: see DESIGN of the run folder (docs/report.md).
        tables: small tables.
        notes: sentences.
        pvalue: of a test that the records do not stand out, for Holm's adjustment among membership scores.
        bounds: range of one record's value in `column`.
        private: what belongs into the private folder: lines with text.
        generated: tokens that were generated.
    """

    headline: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    control: dict[str, Figure] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    not_resolvable: dict[str, str] = field(default_factory=dict)
    column: str | None = None
    records: dict[str, Sequence[Any]] = field(default_factory=dict)
    controls: dict[str, Sequence[Any]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pvalue: float | None = None
    bounds: tuple[float, float] | None = (0.0, 1.0)
    private: list[dict[str, Any]] = field(default_factory=list)
    generated: int = 0

    def rate(
        self,
        key: str,
        title: str,
        hits: Sequence[bool],
        clusters: Clusters,
        controls: Sequence[bool] = (),
        control_clusters: Clusters = None,
    ) -> None:
        """Add a share of records with an exact interval, or a cluster-aware one; the same on the control set."""
        self.titles[key] = title
        for target, values, groups in ((self.figures, hits, clusters), (self.control, controls, control_clusters)):
            if len(values):
                target[key] = rate(np.asarray(values, dtype=bool), groups)

    def mean(
        self,
        key: str,
        title: str,
        values: ArrayLike,
        clusters: Clusters,
        controls: ArrayLike = (),
        control_clusters: Clusters = None,
        *,
        unit: str = "share",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        direction: Direction = "lower",
        seed: int = 0,
    ) -> None:
        """Add a mean over records with its interval; the same on the control set."""
        self.titles[key] = title
        for target, found, groups in ((self.figures, values, clusters), (self.control, controls, control_clusters)):
            numbers = np.asarray(found, dtype=np.float64)
            if len(numbers):
                interval = statistics.mean_interval(numbers, named(groups), level=LEVEL, bounds=bounds, seed=seed)
                target[key] = as_figure(interval, unit, direction)

    def stored(self) -> dict[str, Any]:
        """Everything but what holds text, as plain numbers and words."""
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "private"}
        columns = {side: {name: [_plain(v) for v in values] for name, values in kept[side].items()} for side in SIDES}
        return kept | columns

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> Result:
        """The result that `stored` was made of."""
        bounds = stored["bounds"]
        return cls(**stored | {"bounds": None if bounds is None else (bounds[0], bounds[1])})

    def document(
        self, name: str, settings: dict[str, Any], cost: dict[str, Any], confounded: str | None
    ) -> dict[str, Any]:
        """The attack's file in the run folder."""
        return {
            "schema": SCHEMA,
            "attack": name,
            "settings": {key: value for key, value in settings.items() if key != "name"},
            "status": "run",
            "reason": None,
            "headline": self.headline if self.headline in (*self.figures, *self.not_resolvable) else None,
            "figures": self.figures,
            "control": self.control,
            "titles": self.titles,
            "not_resolvable": self.not_resolvable,
            "curves": self.curves,
            "tables": self.tables,
            "column": self.column,
            "bounds": self.bounds,
            "confounded": confounded,
            "pvalue": self.pvalue,
            "cost": cost,
            "notes": self.notes,
        }


SIDES = ("records", "controls")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def point(value: float, unit: str, n: int, direction: Direction = "lower") -> Figure:
    """A figure without an interval: a count, or a bound that already carries its level."""
    return {
        "value": value,
        "unit": unit,
        "n": n,
        "ci_low": None,
        "ci_high": None,
        "ci_level": None,
        "direction": direction,
    }


def rate(hits: np.ndarray, clusters: Clusters) -> Figure:
    """The share of True among `hits` [R], exact where records are independent."""
    groups = named(clusters)
    if groups is None:
        return as_figure(statistics.clopper_pearson(int(hits.sum()), len(hits), LEVEL), "share")
    return as_figure(statistics.mean_interval(hits.astype(np.float64), groups, bounds=(0.0, 1.0)), "share")


def frame(ids: Sequence[str], columns: dict[str, Sequence[Any]]) -> pd.DataFrame:
    """Per-record columns behind their ids; what is no finite number is missing."""

    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return pd.DataFrame(
        {"record_id": list(ids)} | {name: [known(v) for v in values] for name, values in columns.items()}
    )


def line(
    title: str, x: dict[str, Any], y: dict[str, Any], series: list[dict[str, Any]], kind: str = "line"
) -> dict[str, Any]:
    """One chart of a result."""
    return {
        "kind": kind,
        "title": title,
        "x": x,
        "y": y,
        "series": [{"low": None, "high": None} | one for one in series],
    }
