"""Attacks that change the weights a little and score the records again: do they come back?

Each runs the model under several settings of one kind. The one that is named first in the settings stands for the
attack, in its headline and in the column it is judged by: to take the one under which most comes back would be to
choose by the outcome. Every other is a row of a table, a figure and a column of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from attacks.recovery import interpolate, prune, quantise
from attacks.recovery.weights import targets
from probes.memorised import memorised
from unlearn.attacking.result import Result, line, point
from unlearn.attacking.stress import graded, rows_of, spread
from unlearn.attacking.views import ROLES, Views

Frames = dict[str, pd.DataFrame]
T = TypeVar("T")
_SIDES = {"records": "records", "control": "never seen", "retain": "retain"}


@dataclass(frozen=True, slots=True)
class _Variant:
    """One way to change the weights.

    Attributes:
        key: of its figures and columns.
        words: in tables.
        change: the change, inside a `with` block.
    """

    key: str
    words: str
    change: Callable[[], AbstractContextManager[Any]]


def quantisation(views: Views, settings: dict[str, Any]) -> Result:
    """The records on the quantised model, and how much of the edit its codes keep."""
    model, model_map, head = views.model, views.model_map, settings["head"]

    def variant(scheme: str) -> _Variant:
        group = _group(scheme, settings)
        return _Variant(
            scheme.replace(":", "_").replace("-", "_"),
            scheme if group is None else f"{scheme}, groups of {group}",
            partial(quantise.quantisation, model, scheme, group, model_map=model_map, head=head),
        )

    result = Result()
    variants = [variant(scheme) for scheme in dict.fromkeys(settings["schemes"])]
    _each(result, views, settings, variants, "with quantised weights")
    if views.edited:
        _kept(result, views, settings)
    return result


def pruning(views: Views, settings: dict[str, Any]) -> Result:
    """The records on the pruned model."""
    model, model_map = views.model, views.model_map
    shares: list[float] = list(dict.fromkeys(settings["shares"]))
    variants = [
        _Variant(
            f"smallest_{share:g}".replace(".", "_"),
            f"the smallest {share:.4g} of each tensor",
            partial(prune.pruning, model, share, model_map=model_map),
        )
        for share in shares
    ]
    if settings["two_of_four"]:
        variants.append(
            _Variant("two_of_four", "two of every four", partial(prune.pruning, model, "2:4", model_map=model_map))
        )
    result = Result()
    _each(result, views, settings, variants, "with pruned weights")
    return result


def noise(views: Views, settings: dict[str, Any]) -> Result:
    """The records on the model with noise on its weights."""
    model, model_map = views.model, views.model_map
    sizes: list[float] = list(dict.fromkeys(settings["sizes"]))
    variants = [
        _Variant(
            f"noise_{size:g}".replace(".", "_"),
            f"noise of {size:.4g} times the root mean square",
            partial(prune.noise, model, size, seed=views.seed, model_map=model_map),
        )
        for size in sizes
    ]
    result = Result()
    _each(result, views, settings, variants, "with noise on the weights")
    return result


def interpolation(views: Views, settings: dict[str, Any]) -> Result:
    """The records between the edited copy and the original: how far until they are back, and over which barrier."""
    rows = _rows(views, settings, (*ROLES, "retain"))
    plain = {role: _plain(views, role, chosen) for role, chosen in rows.items()}
    away = sorted({1.0, *settings["steps"]} - {0.0})
    done = iter(range(1, len(away) + 1))

    def measure() -> Frames:
        found = {role: _scored(views, role, chosen) for role, chosen in rows.items()}
        views.progress(next(done), len(away))
        return found

    along = dict(zip(away, interpolate.along(views.model, views.original_tensor, away, measure), strict=True))
    path = {0.0: plain} | along
    steps = sorted(path)
    first = next(step for step in settings["steps"] if 0 < step < 1)
    result = Result()
    title = f"{_figure_words(views)} {first:g} of the way to the original"
    graded(result, views, _judged(path[first]), _judged(plain), _judged(rows), title=title)
    _interpolated(result, views, {step: path[step] for step in steps}, rows["records"])
    return result


# ------------------------------------------------------------------------------------------ passes over the sets


def _rows(views: Views, settings: dict[str, Any], roles: Sequence[str]) -> dict[str, np.ndarray]:
    return {role: rows_of(views, role, settings["records"]) for role in roles if views.has(role)}


def _judged(by_role: Mapping[str, T]) -> dict[str, T]:
    """What belongs to the sets that an attack is judged by."""
    return {role: by_role[role] for role in ROLES if role in by_role}


def _scored(views: Views, role: str, rows: np.ndarray) -> pd.DataFrame:
    records = views.records(role)
    return memorised(
        views.model,
        [records[int(i)] for i in rows],
        model_map=views.model_map,
        batch_tokens=views.settings.batch_tokens,
    )


def _plain(views: Views, role: str, rows: np.ndarray) -> pd.DataFrame:
    """The figures without a change of weights, off the one pass where it holds the set."""
    if views.frame(role).empty:
        return _scored(views, role, rows)
    return views.plain(role).iloc[rows].reset_index(drop=True)


def _figure_words(views: Views) -> str:
    return "probability of the label" if views.task == "image_classification" else "probability per token"


def _each(result: Result, views: Views, settings: dict[str, Any], variants: Sequence[_Variant], attacked: str) -> None:
    """Score every variant; the first one stands for the attack."""
    rows = _rows(views, settings, ROLES)
    plain = {role: _plain(views, role, chosen) for role, chosen in rows.items()}
    found: list[Frames] = []
    for number, one in enumerate(variants, start=1):
        with one.change():
            found.append({role: _scored(views, role, chosen) for role, chosen in rows.items()})
        views.progress(number, len(variants))
    lead, words = variants[0], _figure_words(views)
    graded(result, views, found[0], plain, rows, title=f"{words} {attacked}: {lead.words}")
    groups = {role: [views.clusters(role)[int(i)] for i in chosen] for role, chosen in rows.items()}
    table = [["as it is", *_means(plain)]]
    for one, frames in zip(variants, found, strict=True):
        table.append([one.words, *_means(frames)])
        key = f"probability.{one.key}"
        for role, columns in (("records", result.records), ("control", result.controls)):
            if role in frames:
                columns[key] = spread(views, role, rows[role], frames[role]["probability"].to_numpy())
        result.mean(
            key,
            f"{words} {attacked}: {one.words}",
            frames["records"]["probability"].to_numpy(),
            groups["records"],
            frames["control"]["probability"].to_numpy() if "control" in frames else (),
            groups.get("control"),
            seed=views.seed,
        )
    names = [f"{name}, {_SIDES[role]}" for role in rows for name in ("probability", "extracted")]
    result.tables.append({"title": f"Records {attacked}", "columns": ["weights", *names], "rows": table})
    for role, chosen in rows.items():
        if len(chosen) < len(views.records(role)):
            result.notes.append(f"{len(chosen)} of {len(views.records(role))} ({_SIDES[role]}), drawn by the seed.")


def _means(frames: Frames) -> list[float]:
    """Mean probability and share extracted of each set."""
    return [
        float(frame[name].astype(float).mean()) for frame in frames.values() for name in ("probability", "extracted")
    ]


# ------------------------------------------------------------------------------------------- what is left of an edit


def _group(scheme: str, settings: dict[str, Any]) -> int | None:
    return settings["group"] if scheme.startswith(("int4", "int3")) else None


def _kept(result: Result, views: Views, settings: dict[str, Any]) -> None:
    """How much of the edit is left between both checkpoints when both are quantised, by block for the first scheme."""
    places = targets(views.model_map, head=settings["head"])
    schemes = list(dict.fromkeys(settings["schemes"]))
    found: dict[str, list[tuple[int | None, quantise.CodeChange]]] = {scheme: [] for scheme in schemes}
    for name, place in places.items():
        original, edited = views.original_tensor(name), views.model.get_parameter(name).detach()
        for scheme in schemes:
            group = _group(scheme, settings)
            change = quantise.diagnostics(
                place.matrix(original), place.matrix(edited), scheme, group, in_axis=place.in_axis
            )
            found[scheme].append((place.block, change))
    totals = {scheme: quantise.summed(change for _, change in changes) for scheme, changes in found.items()}
    if not totals[schemes[0]].edit:
        result.notes.append("The edit changed none of the weights that are quantised.")
        return
    measured = ["share of codes changed", "projection on the edit", "cosine with the edit"]
    result.tables.append(
        {
            "title": "What quantisation leaves of the edit",
            "columns": ["weights", *measured],
            "rows": [[scheme, *_change(total)] for scheme, total in totals.items()],
        }
    )
    lead = found[schemes[0]]
    blocks = list(dict.fromkeys(block for block, change in lead if change.edit))
    result.tables.append(
        {
            "title": f"What {schemes[0]} leaves of the edit, by block",
            "columns": ["block", *measured],
            "rows": [
                [
                    "head" if block is None else str(block),
                    *_change(quantise.summed(change for owner, change in lead if owner == block)),
                ]
                for block in blocks
            ],
        }
    )
    result.notes.append(
        "Projection: how much of the edit is left along itself, 1 for all of it. Few changed codes with a projection "
        "near 1 is an edit that survives in the mean, under rounding noise; a low cosine is that noise."
    )


def _change(change: quantise.CodeChange) -> list[float | None]:
    return [change.share, change.projection, change.cosine]


# --------------------------------------------------------------------------------------------------- interpolation


def _interpolated(result: Result, views: Views, path: dict[float, Frames], rows: np.ndarray) -> None:
    """Curves, the column of the original, where the records come back, and the barrier.

    Args:
        result: what to fill.
        views: the edited copy.
        path: step -> frames by set, steps ascending, 0 and 1 among them.
        rows: row numbers of the records that were scored.
    """
    steps = list(path)
    whole = path[1.0]["records"]["probability"].to_numpy(dtype=np.float64)
    result.records["original"] = spread(views, "records", rows, whole)
    groups = views.clusters()
    words = f"{_figure_words(views)} of the original, without an attack"
    result.mean("original", words, whole, [groups[int(i)] for i in rows], seed=views.seed)

    def means(role: str, name: str) -> list[float]:
        return [float(frames[role][name].astype(float).mean()) for frames in path.values()]

    image = views.task == "image_classification"
    for name, label in (
        ("probability", _figure_words(views)),
        ("extracted", "share predicted as labelled" if image else "share with every token the argmax"),
    ):
        series = [{"name": _SIDES[role], "x": steps, "y": means(role, name)} for role in path[1.0]]
        result.curves.append(
            line(
                f"From the edited copy (0) to the original (1): {label}",
                {"label": "step towards the original", "scale": "linear"},
                {"label": label, "scale": "linear"},
                series,
            )
        )
    n = len(rows)
    for name, words in (("probability", "probability"), ("accuracy", "token accuracy"), ("extracted", "extraction")):
        values, key = means("records", name), f"returns.{name}"
        result.titles[key] = f"step at which the mean {words} is half of the original's"
        end = values[steps.index(1.0)]
        back = interpolate.crossing(steps, values, end / 2) if end > 0 else None
        if back is None:
            result.not_resolvable[key] = f"the original's own {words} is 0"
        else:
            result.figures[key] = point(back, "step", n, "higher")
    for role in ("records", "retain"):
        if role not in path[1.0]:
            continue
        key = "barrier" if role == "records" else f"barrier.{role}"
        result.titles[key] = f"rise of the mean loss on {_SIDES[role]} above the straight line between both ends"
        found = interpolate.barrier(steps, means(role, "loss"))
        if found is None:
            result.not_resolvable[key] = "a loss on the path is not finite"
        else:
            result.figures[key] = point(found[0], "nats per token", len(path[1.0][role]), "none")
    result.notes.append(
        "Half-way points are linear between the steps; 0 means that the edited copy is at half of the original already."
    )
