"""Near-verbatim extraction: how close greedy decoding comes, and the probability mass near the completion."""

from __future__ import annotations

from typing import Any

import numpy as np

from attacks.extraction.beam import near_verbatim_mass
from attacks.extraction.overlap import overlap_figures
from attacks.extraction.sampled import emitted_within
from probes import statistics
from unlearn.attacking.result import Result, as_figure, point
from unlearn.attacking.views import ROLES, Views

MEANS = (
    ("edit_similarity", "edit similarity of what greedy decoding emits"),
    ("common_span_share", "longest common span, share of the completion"),
    ("rouge_l_recall", "ROUGE-L recall"),
    ("rouge_l_f", "ROUGE-L F"),
)


def greedy(views: Views, settings: dict[str, Any]) -> Result:
    """Edit similarity, longest common span and ROUGE-L of greedy continuations."""
    result = Result(headline="edit_similarity", column="edit_similarity")
    decode = (lambda ids: views.decode([ids])[0]) if views.tokenizer is not None else None
    found = {
        role: overlap_figures(views.continuations(role), views.records(role), decode=decode)
        for role in ROLES
        if views.has(role)
    }
    control = found.get("control")
    for name, title in MEANS:
        result.mean(
            name,
            title,
            found["records"][name].to_numpy(),
            views.clusters(),
            control[name].to_numpy() if control is not None else (),
            views.clusters("control"),
            seed=views.seed,
        )
    near = settings["similarity"]
    for role, columns in (("records", result.records), ("control", result.controls)):
        if role in found:
            for name in (*(name for name, _ in MEANS), "common_span"):
                columns[name] = found[role][name].tolist()
            columns["hit"] = (found[role]["edit_similarity"] >= near).tolist()
    result.rate(
        "near",
        f"emitted up to edits, similarity of at least {near:g}",
        list(result.records["hit"]),
        views.clusters(),
        list(result.controls.get("hit", ())),
        views.clusters("control"),
    )
    return result


def mass(views: Views, settings: dict[str, Any]) -> Result:
    """A lower bound on the probability that one sample lies near the completion, for the most probable records."""
    result = Result(headline="within")
    n, shown = settings["samples"], f"{settings['metric']} distance {settings['distance']}"
    listed: list[list[Any]] = []
    for role, target in (("records", result.figures), ("control", result.control)):
        if not views.has(role):
            continue
        chosen = views.most_probable(settings["records"], role)
        found = [
            near_verbatim_mass(
                views.model,
                record,
                distance=settings["distance"],
                metric=settings["metric"],
                width=settings["width"],
                model_map=views.model_map,
            )
            for record in chosen
        ]
        within = emitted_within(np.array([one.log_mass for one in found]), n)
        exact = emitted_within(np.array([one.log_exact for one in found]), n)
        for key, values in (("within", within), ("exact", exact)):
            target[key] = as_figure(
                statistics.mean_interval(values, bounds=(0.0, 1.0), seed=views.seed), "probability", "lower"
            )
        target["gain"] = point(
            float(np.mean([one.log_mass - one.log_exact for one in found if np.isfinite(one.log_exact)] or [0.0])),
            "nats",
            len(found),
        )
        if role == "records":
            listed = [
                [
                    views.workspace.pseudonym(record.record_id),
                    one.log_exact,
                    one.log_mass,
                    one.found,
                ]
                for record, one in zip(chosen, found, strict=True)
            ]
    result.titles = {
        "within": f"within {shown} among {n} samples, at least",
        "exact": f"the record itself among {n} samples",
        "gain": "log-probability added by near copies",
    }
    result.tables.append(
        {
            "title": f"Most probable records: log-probability of the record and of everything found within {shown}",
            "columns": ["record", "log p of the record", "log p within the distance, at least", "sequences found"],
            "rows": [[row[0], *(value if np.isfinite(value) else None for value in row[1:])] for row in listed],
        }
    )
    result.notes.append(
        "The mass is a lower bound: beam search finds some of the sequences within the distance, never too many. It is "
        f"over the {settings['records']} most probable records of each set, not over all of them."
    )
    return result
