"""Relearning: a few training steps on half of the records, on data to keep or on related text, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from attacks.recovery.relearn import Records, Relearning, relearn
from attacks.recovery.relearn import savings as relearn_savings
from probes import statistics
from probes.errors import UsageError
from unlearn.attacking.result import Result, as_figure, line
from unlearn.attacking.stress import graded, rows_of, spread
from unlearn.attacking.views import ROLES, Views
from unlearn.evidence.metrics import LEVEL, named

_NAMES = {"records": "records", "control": "never seen", "retain": "retain"}


def relearning(views: Views, settings: dict[str, Any]) -> Result:
    """Train on half of the records, score the other half and never-seen records."""
    trained, others = views.halves("records")
    if not len(trained) or not len(others):
        raise UsageError("expected records in at least two clusters, found one: no half is left to score")
    apart = _apart(views, trained)
    if not len(apart):
        raise UsageError(
            "expected never-seen records outside the clusters of the half that is trained on, found none; pass others"
        )
    records = views.records()
    train = [records[int(i)] for i in trained]
    found, result = _stress(
        views,
        settings,
        train,
        f"half of the records ({len(train)})",
        {"records": others, "control": apart},
        watch_retain=settings["retain"],
    )
    result.notes.append(
        f"{_recipe(found, settings, len(train))} on {len(train)} of the records; the others, in clusters of their own, "
        "are scored. A model that never held the records learns nothing about them from the first half."
    )
    return result


def _apart(views: Views, trained: np.ndarray) -> np.ndarray:
    """Rows of never-seen records in no cluster of these records: one drafted from a record shares much of its text."""
    ours, theirs = views.paired_clusters()
    taken = {ours[int(i)] for i in trained} - {None}
    return np.array([row for row, group in enumerate(theirs) if group not in taken], dtype=np.int64)


def retain_tuning(views: Views, settings: dict[str, Any]) -> Result:
    """Train on the retain set alone, score the records."""
    train = views.records("retain")
    found, result = _stress(views, settings, train, "the retain set alone")
    result.notes.append(f"{_recipe(found, settings, len(train))} on the retain set; no record was trained on.")
    return result


def related_tuning(views: Views, settings: dict[str, Any]) -> Result:
    """Train on related text that is none of the records, score the records."""
    train = views.records("related")
    found, result = _stress(views, settings, train, "related text")
    result.notes.append(f"{_recipe(found, settings, len(train))} on {len(train)} related texts.")
    return result


def savings(views: Views, settings: dict[str, Any]) -> Result:
    """Train on records and as many never-seen ones; compare how soon both are known."""
    most = min(settings["records"], len(views.records()), len(views.records("control")))
    rows = {role: rows_of(views, role, most) for role in ROLES}
    chosen = {role: [views.records(role)[int(i)] for i in rows[role]] for role in ROLES}
    groups = {role: [views.clusters(role)[int(i)] for i in rows[role]] for role in ROLES}
    plain = {role: _plain(views, role, rows[role]) for role in ROLES}
    found = relearn_savings(
        views.model,
        chosen["records"],
        chosen["control"],
        criterion=settings["criterion"],
        every=settings["every"],
        clusters=named(groups["records"]),
        new_clusters=named(groups["control"]),
        before={"old": plain["records"], "new": plain["control"]},
        **_training(views, settings),
    )
    result = Result(headline="speed", column="speed")
    speeds = {"records": found.speed("old"), "control": found.speed("new")}
    for role, columns in (("records", result.records), ("control", result.controls)):
        columns["speed"] = spread(views, role, rows[role], speeds[role])
    # Both sets are trained on, so what a record is compared with is not itself untrained but a never-seen one trained
    # alike: the never-seen records' speed is the level that this training teaches anything at.
    started = (plain["records"]["accuracy"].to_numpy(dtype=np.float64) >= settings["criterion"]).astype(np.float64)
    result.records["plain"] = spread(views, "records", rows["records"], started)
    result.controls["plain"] = spread(views, "control", rows["control"], speeds["control"])
    for key, title, values, unit, bounds in (
        (
            "speed",
            f"how soon it is learnt again (1: known already, 0: not within {found.budget} steps)",
            speeds,
            "share",
            (0.0, 1.0),
        ),
        (
            "steps",
            f"steps until token accuracy {settings['criterion']:g} ({found.budget + 1}: never)",
            {"records": found.steps_old, "control": found.steps_new},
            "steps",
            (0.0, found.budget + 1.0),
        ),
    ):
        result.mean(
            key,
            title,
            values["records"],
            groups["records"],
            values["control"],
            groups["control"],
            unit=unit,
            bounds=bounds,
            direction="lower" if key == "speed" else "higher",
            seed=views.seed,
        )
    result.titles["savings"] = "savings: share of the training that a never-seen record needs and these do not"
    if found.savings.interval is None:
        result.not_resolvable["savings"] = found.savings.reason or "not testable"
    else:
        result.figures["savings"] = as_figure(found.savings.interval, "share")
    met = {
        mark: {
            role: (frames[name]["accuracy"] >= settings["criterion"]).to_numpy(dtype=np.float64)
            for role, name in (("records", "old"), ("control", "new"))
        }
        for mark, frames in found.relearning.curve.items()
    }
    result.curves.append(
        _chart(
            views,
            f"Records with token accuracy of at least {settings['criterion']:g} while they are trained on",
            "share of records",
            met,
            groups,
        )
    )
    result.notes.append(
        f"{_recipe(found.relearning, settings, 2 * most)} on {most} records and as many never-seen ones together. "
        "Savings near 0: learnt as if never seen; near 1: never lost."
    )
    return result


def _stress(
    views: Views,
    settings: dict[str, Any],
    train: Records,
    what: str,
    among: Mapping[str, np.ndarray] | None = None,
    *,
    watch_retain: int = 0,
) -> tuple[Relearning, Result]:
    """Train, score records and never-seen ones (those of rows `among`, by role), and fill a result."""
    rows = {role: rows_of(views, role, settings["scored"], among[role] if among else None) for role in ROLES}
    if watch_retain and views.has("retain"):
        rows["retain"] = rows_of(views, "retain", watch_retain)
    found = relearn(
        views.model,
        train,
        {role: [views.records(role)[int(i)] for i in chosen] for role, chosen in rows.items()},
        marks=[mark for mark in settings["marks"] if mark < settings["steps"]],
        before={role: _plain(views, role, chosen) for role, chosen in rows.items() if len(views.frame(role))},
        **_training(views, settings),
    )
    result = Result()
    scored = {role: rows[role] for role in ROLES}
    graded(
        result,
        views,
        {role: found.last[role] for role in ROLES},
        {role: found.curve[0][role] for role in ROLES},
        scored,
        title=f"probability per token after {settings['steps']} steps on {what}",
    )
    values = {
        mark: {role: frame["probability"].to_numpy(dtype=np.float64) for role, frame in frames.items()}
        for mark, frames in found.curve.items()
    }
    groups = {role: [views.clusters(role)[int(i)] for i in chosen] for role, chosen in rows.items()}
    title = f"What comes back with training on {what}"
    result.curves.append(_chart(views, title, "probability per token", values, groups))
    return found, result


def _training(views: Views, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "how": settings["how"],
        "steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "batch": settings["batch"],
        "rank": settings["rank"],
        "seed": views.seed,
        "model_map": views.model_map,
        "batch_tokens": views.settings.batch_tokens,
        "progress": views.progress,
    }


def _plain(views: Views, role: str, rows: np.ndarray) -> pd.DataFrame:
    """Graded figures of some records without training, from the one pass."""
    return views.plain(role).iloc[rows].reset_index(drop=True)


def _recipe(found: Relearning, settings: dict[str, Any], n: int) -> str:
    """The training in words."""
    what = f"LoRA of rank {settings['rank']}" if found.how == "lora" else "all weights"
    return f"{settings['steps']} steps of AdamW ({what}), batches of {min(settings['batch'], n)},"


def _chart(
    views: Views,
    title: str,
    label: str,
    values: Mapping[int, Mapping[str, np.ndarray]],
    groups: Mapping[str, list[str | None]],
) -> dict[str, Any]:
    """Means of each set at each mark, with their intervals."""
    marks = sorted(values)
    series = []
    for role, clusters in groups.items():
        found = [
            statistics.mean_interval(
                values[mark][role], named(clusters), level=LEVEL, bounds=(0.0, 1.0), seed=views.seed
            )
            for mark in marks
        ]
        series.append(
            {
                "name": _NAMES[role],
                "x": marks,
                "y": [one.value for one in found],
                "low": [one.low for one in found],
                "high": [one.high for one in found],
            }
        )
    return line(title, {"label": "training steps", "scale": "linear"}, {"label": label, "scale": "linear"}, series)
