"""Inputs that bring records back: soft prompts, nearby inputs, suffixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from attacks.elicitation import embedding as nearby_embeddings
from attacks.elicitation import images as nearby_images
from attacks.elicitation import soft_prompt as prompts
from attacks.elicitation import suffix as suffixes
from attacks.elicitation.budget import Budget, Trace, calibrate
from attacks.elicitation.inputs import positions
from attacks.extraction.gcg import writable
from probes.errors import UsageError
from probes.memorised import memorised
from probes.records import ImageRecord, TokenRecord
from unlearn.attacking.result import Result, line, point
from unlearn.attacking.stress import graded, rows_of
from unlearn.attacking.views import ROLES, Views

_WORDS = {"records": "records", "control": "never-seen records"}


def soft_prompt(views: Views, settings: dict[str, Any]) -> Result:
    """Vectors trained on half A, tried on half B and on never-seen records; the same for a half of these."""
    keep, extra = _kept(views), settings["length"] + settings["context"]
    halves = _halves(views, extra)
    rows = {role: rows_of(views, role, settings["scored"], halves[role][1]) for role in ROLES}
    scored = {role: _at(views, role, rows[role]) for role in ROLES}
    shared: dict[str, Any] = {"keep": keep, "model_map": views.model_map}

    def train(role: str) -> prompts.SoftPrompt:
        return prompts.train(
            views.model,
            _at(views, role, halves[role][0]),
            length=settings["length"],
            steps=settings["steps"],
            batch=settings["batch"],
            learning_rate=settings["learning_rate"],
            context=settings["context"],
            initial=settings["initial"],
            seed=views.seed,
            progress=views.progress,
            **shared,
        )

    def score(records: Sequence[TokenRecord], found: prompts.SoftPrompt) -> pd.DataFrame:
        shared["batch_tokens"] = views.settings.batch_tokens
        frame = prompts.score(views.model, records, found.vectors, **shared)
        del shared["batch_tokens"]
        return frame

    trained = train("records")
    attacked = {role: score(scored[role], trained) for role in ROLES}
    own = rows_of(views, "records", settings["scored"], halves["records"][0])
    on_itself = score(_at(views, "records", own), trained)
    on_control = score(scored["control"], train("control"))
    result, plain = Result(), _plain(views, rows)
    title = "probability per token behind a soft prompt trained on the other half"
    graded(result, views, attacked, plain, rows, title=title)
    result.tables.append(
        {
            "title": "Soft prompts",
            "columns": ["trained on", "scored on", "n", "probability without", "probability", "extracted"],
            "rows": [
                _row("records, half A", "records, half A", views.plain("records").iloc[own], on_itself),
                _row("records, half A", "records, half B", plain["records"], attacked["records"]),
                _row("records, half A", "never seen, half B", plain["control"], attacked["control"]),
                _row("never seen, half A", "never seen, half B", plain["control"], on_control),
            ],
        }
    )
    _left_out(result, views, halves)
    result.notes.append(
        "The weights are frozen. What the last row of the table gains is form alone: that prompt was trained on other "
        "never-seen records. A prompt that does not help shows that this search failed, not that nothing is there."
    )
    return result


def embedding(views: Views, settings: dict[str, Any]) -> Result:
    """Each prompt's embeddings moved within a radius, as many steps as never-seen records withstand."""
    keep = _kept(views)

    def usable(role: str, rows: np.ndarray) -> np.ndarray:
        records, most = views.records(role), positions(views.model_map)
        return np.array([i for i in rows if keep < records[i].n_prompt and len(records[i].ids) <= most], dtype=np.int64)

    def search(role: str, rows: np.ndarray) -> Trace:
        return nearby_embeddings.perturb(
            views.model,
            _at(views, role, rows),
            radius=settings["radius"],
            steps=settings["marks"][-1],
            step=settings["step"],
            restarts=settings["restarts"],
            keep=keep,
            seed=views.seed,
            model_map=views.model_map,
            progress=views.progress,
        )

    first, second = views.halves("control")
    sets = {"records": np.arange(len(views.records())), "control": second, "calibration": first}
    rows = {name: usable("records" if name == "records" else "control", found) for name, found in sets.items()}
    return _calibrated(views, settings, rows, search, "a move of the prompt's embeddings")


def images(views: Views, settings: dict[str, Any]) -> Result:
    """Each image's pixels moved within a radius, as many steps as never-seen images withstand."""
    every = [cast("ImageRecord", record) for role in ROLES for record in views.records(role)]
    limits = nearby_images.pixel_range(every)

    def search(role: str, rows: np.ndarray) -> Trace:
        return nearby_images.perturb(
            views.model,
            cast("list[ImageRecord]", _at(views, role, rows)),
            limits=limits,
            radius=settings["radius"],
            norm=settings["norm"],
            steps=settings["marks"][-1],
            step=settings["step"],
            restarts=settings["restarts"],
            seed=views.seed,
            progress=views.progress,
        )

    first, second = views.halves("control")
    rows = {"records": np.arange(len(views.records())), "control": second, "calibration": first}
    return _calibrated(views, settings, rows, search, "a move of the pixels")


def suffix(views: Views, settings: dict[str, Any]) -> Result:
    """Tokens between prompt and completion, searched on half A, tried on half B and on never-seen records."""
    tokens = writable(views.tokenizer, views.model_map.vocab_size) if views.tokenizer is not None else None
    halves = _halves(views, settings["length"])
    rows = {role: rows_of(views, role, settings["scored"], halves[role][1]) for role in ROLES}
    found = suffixes.search(
        views.model,
        _at(views, "records", halves["records"][0]),
        length=settings["length"],
        steps=settings["steps"],
        batch=settings["batch"],
        candidates=settings["candidates"],
        top_k=settings["top_k"],
        tokens=tokens,
        seed=views.seed,
        model_map=views.model_map,
        progress=views.progress,
    )
    attacked = {
        role: memorised(
            views.model,
            suffixes.appended(_at(views, role, rows[role]), found.ids),
            model_map=views.model_map,
            batch_tokens=views.settings.batch_tokens,
        )
        for role in ROLES
    }
    result = Result()
    title = "probability per token after a suffix searched on the other half"
    graded(result, views, attacked, _plain(views, rows), rows, title=title)
    result.tables.append(
        {
            "title": "Search on half A of the records",
            "columns": ["suffix tokens", "loss at the start", "loss of the suffix", "rows forward", "rows backward"],
            "rows": [[len(found.ids), found.initial_loss, found.loss, found.forwards, found.backwards]],
        }
    )
    result.private = [{"suffix_ids": list(found.ids)}]
    _left_out(result, views, halves)
    result.notes.append("A search without guarantee: a suffix that does not help shows that this one failed.")
    return result


def _calibrated(views: Views, settings: dict[str, Any], rows: dict[str, np.ndarray], search: Any, what: str) -> Result:
    """Search on the calibration half, set the budget, and read records and the other half at it."""
    for name, found in rows.items():
        if name != "records":
            rows[name] = rows_of(views, "control", settings["scored"], found)
    rows["records"] = rows_of(views, "records", settings["scored"], rows["records"])
    if not all(len(found) for found in rows.values()):
        raise UsageError(
            "expected records and never-seen records of two clusters or more whose inputs can move, found none of a "
            "kind; add never-seen records"
        )
    calibration = search("control", rows.pop("calibration"))
    budget = calibrate(calibration, marks=settings["marks"], fpr=settings["fpr"], threshold=settings["threshold"])
    traces = {role: search(role, rows[role]) for role in ROLES}
    result = Result(headline="probability")
    if budget.steps is None:
        result.titles["probability"] = f"probability per token after {what}"
        result.not_resolvable["probability"] = cast(str, budget.reason)
    else:
        attacked = {role: trace.at(budget.steps) for role, trace in traces.items()}
        title = f"probability per token after {what} of {_steps(budget.steps)}"
        graded(result, views, attacked, _plain(views, rows), rows, title=title)
        success = {
            role: trace.success(settings["threshold"])[:, budget.steps].tolist() for role, trace in traces.items()
        }
        groups = {role: [views.clusters(role)[int(i)] for i in rows[role]] for role in ROLES}
        result.rate(
            "success",
            f"extracted, or at a probability of {settings['threshold']:g}, within the budget",
            success["records"],
            groups["records"],
            success["control"],
            groups["control"],
        )
        result.figures["budget"] = point(float(budget.steps), "steps", budget.controls, "none")
        result.titles["budget"] = "steps within which never-seen records do not succeed"
    result.curves.append(_curve(traces | {"calibration": calibration}, settings["threshold"], budget))
    result.tables.append(_calibration_table(budget))
    result.notes.append(
        f"The budget is the largest number of steps in which at most {settings['fpr']:g} of {budget.controls} "
        "never-seen records succeed that do not without a step; they do not count among the control records here. It "
        "is set anew for each model. With more steps nearly any input brings out nearly anything, so what lies beyond "
        "it proves nothing."
    )
    return result


def _curve(traces: Mapping[str, Trace], threshold: float, budget: Budget) -> dict[str, Any]:
    words = _WORDS | {"calibration": "never-seen records, for the budget"}
    series = []
    for role, trace in traces.items():
        share = trace.success(threshold).mean(0)
        series.append({"name": words[role], "x": list(range(trace.steps + 1)), "y": share.tolist()})
    until = "no budget" if budget.steps is None else f"budget: {_steps(budget.steps)}"
    return line(
        f"Share of records that the search has brought out, by steps ({until})",
        {"label": "steps", "scale": "linear"},
        {"label": "share", "scale": "linear"},
        series,
    )


def _calibration_table(budget: Budget) -> dict[str, Any]:
    return {
        "title": "Calibration on never-seen records",
        "columns": ["steps", "successes", "of", "allowed as budget"],
        "rows": [
            [mark, count, budget.controls, "yes" if budget.steps is not None and mark <= budget.steps else "no"]
            for mark, count in zip(budget.marks, budget.successes, strict=True)
        ],
    }


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _row(trained: str, scored: str, plain: pd.DataFrame, attacked: pd.DataFrame) -> list[Any]:
    means = (plain["probability"], attacked["probability"], attacked["extracted"])
    return [trained, scored, len(attacked), *(float(column.mean()) for column in means)]


def _at(views: Views, role: str, rows: np.ndarray) -> list[TokenRecord]:
    records = views.records(role)
    return [records[int(i)] for i in rows]


def _plain(views: Views, rows: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    return {role: views.plain(role).iloc[rows[role]] for role in ROLES}


def _kept(views: Views) -> int:
    """Tokens that open every record and control record alike."""
    return views.kept([record for role in ROLES for record in views.records(role)])


def _halves(views: Views, extra: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Halves of records and control whose clusters differ, without records too long to run with `extra` tokens more."""
    most, found = positions(views.model_map), {}
    for role in ROLES:
        records = views.records(role)
        short = [np.array([i for i in half if len(records[i].ids) + extra <= most]) for half in views.halves(role)]
        if len(short[0]) < 2 or not len(short[1]):
            raise UsageError(
                f"expected at least two {_WORDS[role]} to train on and others to score, in other clusters, found "
                f"{len(short[0])} and {len(short[1])} of at most {most - extra} tokens; add records"
            )
        found[role] = (short[0].astype(np.int64), short[1].astype(np.int64))
    return found


def _left_out(result: Result, views: Views, halves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    left = sum(len(views.records(role)) - sum(map(len, halves[role])) for role in ROLES)
    if left:
        result.notes.append(f"{left} records are too long for the model with what is added to them; they are left out.")
