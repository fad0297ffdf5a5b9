"""Memory probes: recognition against recall, learned bits, counterfactual memorisation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from attacks.counterfactual import counterfactual as estimate
from attacks.counterfactual import fine_tune, performance
from probes.errors import UsageError
from probes.memory.bits import bits as learned_bits
from probes.memory.bits import parameter_count, uniform_prior
from probes.memory.recognition import memory
from unlearn.attacking.result import Result, as_figure, point
from unlearn.attacking.views import Views

LIMIT = 512  # records of a counterfactual run: each fine-tune scores all of them


def recognition(views: Views, settings: dict[str, Any]) -> Result:
    """Two-alternative forced choice against never-seen records, beside recall."""
    found = memory(
        views.table(),
        views.table("control"),
        clusters=views.clusters(),
        foil_clusters=views.clusters("control"),
        seed=views.seed,
    )
    result = Result(headline="recognition", column="recognised")
    for key, title, one in (
        ("recognition", "recognised: likelier than a never-seen record (chance 0.5)", found.recognition.share),
        ("recall", "recalled: share emitted before the first error", found.recall),
        ("recall_never_seen", "the same on the never-seen records", found.foil_recall),
        ("gap", "recognition beyond recall (1: hidden, 0: consistent)", found.gap),
    ):
        result.titles[key] = title
        if one.interval is None:
            result.not_resolvable[key] = one.reason or "not resolvable"
        else:
            result.figures[key] = as_figure(one.interval, "share")
    result.records["recognised"] = found.recognition.outcomes.tolist()
    result.notes.append("An edit that stops recall and leaves recognition high has hidden the records.")
    return result


def bits(views: Views, settings: dict[str, Any]) -> Result:
    """Learned bits of each record and per parameter of the model."""
    result = Result(headline="per_record", column="learned_bits", bounds=None)
    if settings["prior"] == "reference" and not views.has_reference:
        raise UsageError("it needs a reference that never held the records")
    parameters = parameter_count(views.model)
    for role, target, columns in (
        ("records", result.figures, result.records),
        ("control", result.control, result.controls),
    ):
        if not views.has(role):
            continue
        if settings["prior"] == "reference":
            prior: Any = views.reference(role)
        else:
            prior = uniform_prior(views.table(role), views.model_map.vocab_size)
        found = learned_bits(
            views.table(role), prior, parameters=parameters, clusters=views.clusters(role), seed=views.seed
        )
        if found.per_record.interval is not None:
            target["per_record"] = as_figure(found.per_record.interval, "bits", "lower")
        target["total"] = point(found.total, "bits", len(found.frame))
        if found.per_parameter is not None:
            target["per_parameter"] = point(found.per_parameter, "bits", len(found.frame))
        columns["learned_bits"] = found.frame["learned_bits"].tolist()
    result.titles = {
        "per_record": "learned bits of a record",
        "total": "learned bits of all records",
        "per_parameter": "learned bits per parameter of the model",
    }
    prior_words = "the reference" if settings["prior"] == "reference" else "equal odds for every token"
    result.notes.append(
        f"Against {prior_words}. Knowing the language counts as learned too; the difference to never-seen records, or "
        "between two models, is about the records."
    )
    return result


def counterfactual(views: Views, settings: dict[str, Any]) -> Result:
    """Fine-tunes of this checkpoint on random halves of the records: what seeing a record changes on it."""
    records = views.records()[:LIMIT]
    train = fine_tune(
        lambda: copy.deepcopy(views.model),
        records,
        epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        batch_size=settings["batch"],
    )
    found = estimate(
        len(records), train, performance(records), runs=settings["runs"], seed=views.seed, progress=views.progress
    )
    values = np.array([np.nan if value is None else value for value in found.memorisation], dtype=np.float64)
    known = np.isfinite(values)
    result = Result(headline="memorisation", bounds=(-1.0, 1.0))
    result.mean(
        "memorisation",
        "token accuracy gained by having been in training",
        values[known],
        [group for group, keep in zip(views.clusters()[:LIMIT], known, strict=True) if keep],
        bounds=(-1.0, 1.0),
        direction="none",
        seed=views.seed,
    )
    order = np.argsort(-np.where(known, values, -np.inf), kind="stable")[:20]
    result.tables.append(
        {
            "title": "Records whose training changes the model most on them",
            "columns": ["record", "memorisation", "standard error"],
            "rows": [
                [
                    views.workspace.pseudonym(records[int(i)].record_id),
                    found.memorisation[int(i)],
                    found.standard_error[int(i)],
                ]
                for i in order
            ],
        }
    )
    result.notes.append(
        "This says how such records are memorised when this checkpoint is fine-tuned on them, not how far they already "
        "are in it."
    )
    if len(records) < len(views.records()):
        result.notes.append(f"The first {LIMIT} of {len(views.records())} records.")
    return result
