"""Attacks that hold both checkpoints: the edit read off their difference, and guidance by the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from attacks.difference.guidance import guided
from attacks.difference.readout import Readout, largest_rises, read_edit, rise, telling
from attacks.membership.evaluate import Membership, evaluate
from probes.errors import UsageError
from probes.memorised import of_texts
from unlearn.attacking.result import Result, as_figure, line, point
from unlearn.attacking.stress import graded, rows_of, spread
from unlearn.attacking.views import ROLES, Views

NAMES = {"control": "never-seen records", "retain": "retain records"}


def readout(views: Views, settings: dict[str, Any]) -> Result:
    """Where the edit is and of what rank, and how well the rise of the loss tells what was removed."""
    if not views.edited:
        raise UsageError("it compares the edited copy with the original; run it on an edited copy")
    found = read_edit(
        views.model,
        views.original_tensor,
        model_map=views.model_map,
        largest=settings["largest"],
        seed=views.seed,
        progress=views.progress,
    )
    result = Result(headline="auc", bounds=None)
    losses = {role: _losses(views, role) for role in (*ROLES, "retain") if views.has(role)}
    for role, key in (("control", "auc"), ("retain", "auc.retain")):
        title = f"AUC of the rise of the loss: removed records against {NAMES[role]} (0.5: it tells nothing)"
        if role not in losses:
            result.titles[key] = title
            result.not_resolvable[key] = f"there are no {NAMES[role]}"
            continue
        told = telling(
            losses["records"],
            losses[role],
            clusters=views.clusters(),
            other_clusters=views.clusters(role),
            seed=views.seed,
        )
        _auc(result, key, title, told)
        _curve(result, NAMES[role], told)
        if key == "auc":
            result.pvalue = told.pvalue
    if "control" in losses:
        _beside(views, result, losses)
    result.mean(
        "rise",
        "rise of the loss",
        rise(*losses["records"]),
        views.clusters(),
        rise(*losses["control"]) if "control" in losses else (),
        views.clusters("control"),
        unit="nats per token",
        bounds=None,
        direction="none",
        seed=views.seed,
    )
    for role, columns in (("records", result.records), ("control", result.controls)):
        if role in losses:
            columns["rise"] = rise(*losses[role]).tolist()
    _weights(result, found, settings["shown"])
    _records(views, result, *losses["records"], settings["shown"])
    result.notes.append(
        "An attacker with both checkpoints reads the removed records off the losses that rose most. Every removal that "
        "works shows this, one by retraining as well: publish only one of the two checkpoints."
    )
    return result


def guidance(views: Views, settings: dict[str, Any]) -> Result:
    """The edited model pushed towards the original, beside the original alone."""
    if not views.edited:
        raise UsageError("it steers the edited copy by the original; run it on an edited copy")
    weights = tuple(dict.fromkeys((settings["weight"], *settings["others"])))
    original = views.also("checkpoint")
    rows = {role: rows_of(views, role, settings["records"]) for role in ROLES if views.has(role)}
    found = {
        role: guided(
            views.model,
            original.model,
            [views.records(role)[int(i)] for i in chosen],
            weights=weights,
            keep=settings["keep"],
            model_map=views.model_map,
            original_map=original.model_map,
            progress=views.progress,
        )
        for role, chosen in rows.items()
    }
    result = Result()
    graded(
        result,
        views,
        {role: frames[settings["weight"]] for role, frames in found.items()},
        {role: views.plain(role).iloc[chosen] for role, chosen in rows.items()},
        rows,
        figure="accuracy",
        title=f"token accuracy of the edited model guided by the original (weight {settings['weight']:g})",
    )
    alone = {role: of_texts(_before(views, role)).iloc[chosen]["accuracy"] for role, chosen in rows.items()}
    result.records["original"] = spread(views, "records", rows["records"], alone["records"].to_numpy(dtype=np.float64))
    result.mean(
        "original",
        "the same of the original alone",
        alone["records"].to_numpy(dtype=np.float64),
        [views.clusters()[int(i)] for i in rows["records"]],
        alone["control"].to_numpy(dtype=np.float64) if "control" in alone else (),
        [views.clusters("control")[int(i)] for i in rows["control"]] if "control" in rows else None,
        seed=views.seed,
    )
    x = sorted(weights)
    result.curves.append(
        line(
            "Token accuracy by guidance weight",
            {"label": "weight (0: edited, 1: original, among the tokens that the original keeps)", "scale": "linear"},
            {"label": "token accuracy", "scale": "linear"},
            [
                {"name": role, "x": x, "y": [float(frames[weight]["accuracy"].mean()) for weight in x]}
                for role, frames in found.items()
            ],
        )
    )
    result.notes.append(
        "Useful to an attacker for whom the original is an API only; who holds its weights reads the records off it "
        "directly. A model retrained without the records gives them back in this way too, since it is the original "
        "that knows them: this says nothing about whether the edit hid them. At weight 0 already the original chooses "
        "which tokens are kept."
    )
    return result


# --- shared ---------------------------------------------------------------------------------------------------------


def _before(views: Views, role: str) -> pd.DataFrame:
    """Figures of a set on the original, as its own stage left them."""
    return views.workspace.run.read_table(f"before/{role}.parquet")


def _losses(views: Views, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a set before and after the edit."""
    before, after = (frame["loss"].to_numpy(dtype=np.float64) for frame in (_before(views, role), views.frame(role)))
    return before, after


def _beside(views: Views, result: Result, losses: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Over-forgetting, which needs the edited copy alone, and what honest removal gives away."""
    title = "AUC of the edited copy's loss alone (above 0.5: removed records are less likely than never-seen ones)"
    over = evaluate(
        losses["records"][1],
        losses["control"][1],
        pos_clusters=views.clusters(),
        neg_clusters=views.clusters("control"),
        alternative="two-sided",
        seed=views.seed,
    )
    _auc(result, "auc.over", title, over)
    if views.has_reference:
        reference = {role: views.reference_frame(role)["loss"].to_numpy(dtype=np.float64) for role in ROLES}
        honest = telling(
            (losses["records"][0], reference["records"]),
            (losses["control"][0], reference["control"]),
            clusters=views.clusters(),
            other_clusters=views.clusters("control"),
            seed=views.seed,
        )
        _auc(result, "auc.reference", "AUC of the rise from the original to the reference: honest removal", honest)


def _auc(result: Result, key: str, title: str, found: Membership) -> None:
    result.titles[key] = title
    if found.auc.interval is None:
        result.not_resolvable[key] = found.auc.reason or "not resolvable"
        return
    result.figures[key] = as_figure(found.auc.interval, "AUC")
    if found.null is not None:
        result.control[key] = as_figure(found.null, "AUC", "none")


def _curve(result: Result, against: str, found: Membership) -> None:
    if found.roc is None or found.auc.interval is None:
        return
    x, y = found.roc.points(120)
    result.curves.append(
        line(
            f"ROC of the rise of the loss, against {against}",
            {"label": "false-positive rate", "scale": "log"},
            {"label": "true-positive rate", "scale": "log"},
            [{"name": "records", "x": x.tolist(), "y": y.tolist()}],
            kind="roc",
        )
    )


def _records(views: Views, result: Result, before: np.ndarray, after: np.ndarray, shown: int) -> None:
    """The records whose loss rose most, under their pseudonyms."""
    change, records = rise(before, after), views.records()
    chosen = largest_rises(change, shown)
    result.tables.append(
        {
            "title": "Records whose loss rose most (nats per token)",
            "columns": ["record", "before", "after", "rise"],
            "rows": [
                [views.workspace.pseudonym(records[i].record_id), float(before[i]), float(after[i]), float(change[i])]
                for i in chosen
            ],
        }
    )


def _weights(result: Result, found: Readout, shown: int) -> None:
    """What the difference of the weights shows."""
    edited = found.edited
    ranks = [tensor.stable_rank for tensor in edited if tensor.stable_rank is not None]
    result.titles |= {
        "relative": "size of the edit: norm of the difference over norm of the original",
        "changed": "share of the weights that changed",
        "stable_rank": "median stable rank of the changed matrices",
    }
    result.figures["relative"] = point(found.relative, "share", len(found.tensors), "none")
    result.figures["changed"] = point(found.changed, "share", sum(t.elements for t in found.tensors), "none")
    if ranks:
        result.figures["stable_rank"] = point(float(np.median(ranks)), "directions", len(ranks), "none")
    else:
        result.not_resolvable["stable_rank"] = "no matrix changed"
    if not edited:
        result.notes.append("No weight changed.")
        return
    result.tables.append(
        {
            "title": f"The largest changes ({min(shown, len(edited))} of {len(edited)} changed tensors)",
            "columns": [
                "tensor",
                "role",
                "relative change",
                "elements changed",
                "stable rank",
                "effective rank",
                "directions for 90 %",
            ],
            "rows": [
                [t.name, t.role, t.relative, t.changed, t.stable_rank, t.effective_rank, t.directions]
                for t in edited[:shown]
            ],
        }
    )
    roles = sorted(found.held_by(lambda t: t.role).items(), key=lambda item: (-item[1], item[0]))
    result.tables.append(
        {
            "title": "Share of the change by role",
            "columns": ["role", "share of the squared norm"],
            "rows": [[role, share] for role, share in roles],
        }
    )
    blocks = found.held_by(lambda t: t.block)
    inside = sorted(block for block in blocks if block is not None)
    if inside:
        result.curves.append(
            line(
                "Share of the change by block",
                {"label": "block", "scale": "linear"},
                {"label": "share of the squared norm", "scale": "linear"},
                [{"name": "edit", "x": inside, "y": [blocks[block] for block in inside]}],
            )
        )
    if not all(t.exact for t in edited):
        result.notes.append("Ranks of matrices larger than the limit come from their top directions (randomised).")
