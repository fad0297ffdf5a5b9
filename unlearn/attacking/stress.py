"""The one way an attack on an edit's durability fills its result: a graded figure under attack, beside the plain one.

Every such attack is read the same way. Its column holds one number in [0, 1] for each record it scored, under attack;
the column `plain` holds the same figure of the same record without the attack. From the plain column of the never-seen
records follows whether the attack teaches rather than recovers (`unlearn.evidence.stress`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from unlearn.attacking.result import Result
from unlearn.attacking.views import ROLES, Views

Rows = Mapping[str, np.ndarray]


def rows_of(views: Views, role: str, most: int | None, among: np.ndarray | None = None) -> np.ndarray:
    """Row numbers of a set that an attack scores: all, or `most` of them drawn by the seed, the same on every arm.

    Args:
        views: the model under attack.
        role: the set.
        most: how many; None for all.
        among: row numbers to draw from; all of the set when absent.
    """
    rows = np.arange(len(views.records(role))) if among is None else np.asarray(among)
    if most is None or len(rows) <= most:
        return rows
    order = np.random.default_rng([views.seed, 11]).permutation(len(rows))
    chosen: np.ndarray = np.sort(rows[order[:most]])
    return chosen


def spread(views: Views, role: str, rows: np.ndarray, values: ArrayLike) -> list[Any]:
    """A column over a whole set from values of some of its rows; None for the others."""
    column: list[Any] = [None] * len(views.records(role))
    for row, value in zip(rows, np.asarray(values).tolist(), strict=True):
        column[int(row)] = value
    return column


def graded(
    result: Result,
    views: Views,
    attacked: Mapping[str, pd.DataFrame],
    plain: Mapping[str, pd.DataFrame],
    rows: Rows | None = None,
    *,
    figure: str = "probability",
    title: str = "probability per token under attack",
) -> None:
    """Fill columns, figures and headline from frames of `probes.memorised.memorised`.

    Args:
        result: what to fill.
        views: the model under attack.
        attacked: by role (`records`, `control`): the frame under attack, of the rows scored.
        plain: by role: the frame without the attack, of the same rows.
        rows: by role: row numbers that were scored; None for all of a set.
        figure: which column of the frames stands for the attack: `probability` or `accuracy`.
        title: what the headline says, in words.
    """
    result.headline = result.column = figure
    for role in ROLES:
        if role not in attacked:
            continue
        frame, before = attacked[role], plain[role]
        chosen = np.arange(len(views.records(role))) if rows is None else rows[role]
        columns = result.records if role == "records" else result.controls
        for name in ("probability", "accuracy"):
            columns[name] = spread(views, role, chosen, frame[name].to_numpy(dtype=np.float64))
        columns["plain"] = spread(views, role, chosen, before[figure].to_numpy(dtype=np.float64))
        columns["hit"] = spread(views, role, chosen, frame["extracted"].to_numpy(dtype=bool))
    groups = {role: _clusters(views, role, rows) for role in attacked}
    for name, words in ((figure, title), *_others(figure)):
        _mean(result, name, words, {role: frame[name] for role, frame in attacked.items()}, groups, views.seed)
    shown = {role: frame[figure] for role, frame in plain.items() if role in attacked}
    _mean(result, "plain", "the same figure without the attack", shown, groups, views.seed)
    hits = {role: frame["extracted"].to_numpy(dtype=bool) for role, frame in attacked.items()}
    words = "predicted as labelled" if views.task == "image_classification" else "every token is the argmax"
    result.rate(
        "extracted",
        f"{words}, under attack",
        hits["records"].tolist(),
        groups["records"],
        hits["control"].tolist() if "control" in hits else (),
        groups.get("control"),
    )


def _others(figure: str) -> tuple[tuple[str, str], ...]:
    other = "accuracy" if figure == "probability" else "probability"
    return (
        (
            other,
            {"accuracy": "token accuracy under attack", "probability": "probability per token under attack"}[other],
        ),
    )


def _clusters(views: Views, role: str, rows: Rows | None) -> Sequence[str | None]:
    groups = views.clusters(role)
    return groups if rows is None else [groups[int(i)] for i in rows[role]]


def _mean(
    result: Result,
    key: str,
    title: str,
    values: Mapping[str, pd.Series],
    groups: Mapping[str, Sequence[str | None]],
    seed: int,
) -> None:
    result.mean(
        key,
        title,
        values["records"].to_numpy(dtype=np.float64),
        groups["records"],
        values["control"].to_numpy(dtype=np.float64) if "control" in values else (),
        groups.get("control"),
        seed=seed,
    )
