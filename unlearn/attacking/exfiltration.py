"""Requests to repeat training text: what greedy decoding writes behind them, matched against the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attacks.extraction.continuation import continuations
from attacks.extraction.overlap import edit_similarity
from attacks.surface.exfiltration import exfiltrating
from probes.errors import UsageError
from unlearn.attacking.items import Item, asked_for, encoded, known_mean
from unlearn.attacking.result import Result
from unlearn.attacking.stress import spread
from unlearn.attacking.views import ROLES, Views


def prompts(views: Views, settings: dict[str, Any]) -> Result:
    """Greedy continuations behind requests to repeat training text, matched against the record."""
    sets = asked_for(views, settings["records"])
    near = settings["similarity"]
    result = Result(headline="similarity", column="similarity")
    best, own, table = {}, {}, []
    found: dict[tuple[str, str], np.ndarray] = {}
    for role, items in sets.items():
        if not items:
            continue
        own[role] = _written(views, result, role, "plain", items, [item.prompt for item in items])
        for request in settings["requests"]:
            texts = [exfiltrating(item.prompt, request) for item in items]
            found[request, role] = _written(views, result, role, request, items, texts)
        best[role] = np.fmax.reduce([found[request, role] for request in settings["requests"]])  # [items]
    scored = {role: np.flatnonzero(np.isfinite(values) & np.isfinite(own[role])) for role, values in best.items()}
    if not len(scored["records"]):
        raise UsageError("expected records that fit behind a request, found none; they are too long for the model")
    groups = {role: [sets[role][int(i)].cluster for i in kept] for role, kept in scored.items()}
    for key, title, values in (
        ("similarity", "edit similarity of what is written behind the best request", best),
        ("plain", "the same behind the record's own prompt", own),
    ):
        result.mean(
            key,
            title,
            values["records"][scored["records"]],
            groups["records"],
            values["control"][scored["control"]] if "control" in scored else (),
            groups.get("control"),
            seed=views.seed,
        )
    for role, columns in (("records", result.records), ("control", result.controls)):
        if role not in scored:
            continue
        rows = np.array([sets[role][int(i)].row for i in scored[role]])
        columns["similarity"] = spread(views, role, rows, best[role][scored[role]])
        if role == "records":  # requests teach nothing, so never-seen records have no figure to rise from
            columns["plain"] = spread(views, role, rows, own[role][scored[role]])
        columns["hit"] = spread(views, role, rows, best[role][scored[role]] >= near)
    hits = {role: (best[role][kept] >= near).tolist() for role, kept in scored.items()}
    result.rate(
        "near",
        f"written up to edits, similarity of at least {near:g}",
        hits["records"],
        groups["records"],
        hits.get("control", ()),
        groups.get("control"),
    )
    for request in settings["requests"]:
        table.append([request, *(known_mean(found[request, role]) for role in ROLES if role in best)])
    result.tables.append(
        {"title": "Edit similarity by request", "columns": ["request", "records", "never seen"], "rows": table}
    )
    result.notes.append(
        "As many tokens as the record has are decoded greedily; a preamble counts as a difference. A record counts "
        "with the best request, never-seen records too."
    )
    return result


def _written(
    views: Views, result: Result, role: str, request: str, items: Sequence[Item], prompts: Sequence[str]
) -> np.ndarray:
    """[items] edit similarity in tokens of greedy continuations to the completions; NaN where a prompt is too long."""
    found = [encoded(views, item.put(prompt)) for item, prompt in zip(items, prompts, strict=True)]
    known = [record for record in found if record is not None]
    out = np.full(len(items), np.nan)
    if not known:
        return out
    written = continuations(views.model, known, views.score(known), noise=views.noise, model_map=views.model_map)
    places = [i for i, record in enumerate(found) if record is not None]
    for i, record, ids, text in zip(places, known, written, views.decode(written), strict=True):
        out[i] = edit_similarity(ids, record.completion)
        result.generated += len(ids)
        result.private.append(
            {"set": role, "record": items[i].raw.id, "request": request, "prompt": prompts[i], "text": text}
        )
    return out
