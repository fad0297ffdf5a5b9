"""Verbatim extraction: what the one pass decides, sampled extraction, other prefix lengths and starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from attacks.extraction import emits
from attacks.extraction.sampled import sampled as sampling_figures
from attacks.extraction.sweep import prefix_curve, windows
from attacks.extraction.sweep import sweep as run_sweep
from probes.likelihood import SamplingScheme
from unlearn.attacking.result import Result, line
from unlearn.attacking.views import ROLES, Views


def greedy(views: Views, settings: dict[str, Any]) -> Result:
    """Records that greedy decoding emits word for word."""
    result = Result(headline="emitted", column="hit")
    hits = {role: views.frame(role)["emitted"].to_numpy(dtype=bool) for role in ROLES if views.has(role)}
    _add_hits(result, views, "emitted", "emitted word for word", hits)
    return result


def strength(views: Views, settings: dict[str, Any]) -> Result:
    """Extraction strength: from how little of the record greedy decoding finishes it."""
    return _column(views, "extraction_strength", "share of the record that greedy decoding finishes")


def probability(views: Views, settings: dict[str, Any]) -> Result:
    """Probability per token, or of an image's label."""
    name = "label_probability" if views.task == "image_classification" else "probability"
    return _column(views, name, "probability of the label" if name == "label_probability" else "probability per token")


def sampled(views: Views, settings: dict[str, Any]) -> Result:
    """(n, p)-discoverable extraction under each sampling scheme."""
    result = Result(column="p_z")
    counts = list(settings["samples"])
    found = {role: sampling_figures(views.table(role), queries=counts) for role in ROLES if views.has(role)}
    for s, scheme in enumerate(found["records"].schemes):
        name, words = _scheme(scheme)
        for n in counts:
            key = f"{name}.n{n}"
            result.headline = result.headline or key
            result.mean(
                key,
                f"emitted within {n} sample{'s' * (n > 1)}, {words}",
                found["records"].within[n][:, s],
                views.clusters(),
                found["control"].within[n][:, s] if "control" in found else (),
                views.clusters("control"),
                unit="probability",
                seed=views.seed,
            )
        for role, columns in (("records", result.records), ("control", result.controls)):
            if role in found:
                values = found[role].log_p_z[:, s]
                columns[f"log_p_z.{name}"] = [float(v) if np.isfinite(v) else None for v in values]
                for level, needed in (("p50", found[role].n_for_p50), ("p90", found[role].n_for_p90)):
                    columns[f"n_for_{level}.{name}"] = [float(v) if np.isfinite(v) else None for v in needed[:, s]]
    for role, columns in (("records", result.records), ("control", result.controls)):
        if role in found:
            columns["p_z"] = np.exp(found[role].log_p_z[:, 0]).tolist()
    first = found["records"]
    rows = []
    for s, scheme in enumerate(first.schemes):
        within = [int((first.n_for_p50[:, s] <= n).sum()) for n in counts]
        median = float(np.median(first.n_for_p50[:, s]))
        rows.append([_scheme(scheme)[1], *within, median if np.isfinite(median) else None])
    result.tables.append(
        {
            "title": "Records that are more likely than not among n samples",
            "columns": ["sampling", *(f"n = {n}" for n in counts), "median n for p = 0.5"],
            "rows": rows,
        }
    )
    return result


def sweep(views: Views, settings: dict[str, Any]) -> Result:
    """Prefix lengths and starts; what the pass calls extracted from a shorter context is confirmed with generate()."""
    result = Result(headline="any_start", column="hit")
    hits: dict[str, np.ndarray] = {}
    series = []
    for role, name, columns in (("records", "records", result.records), ("control", "never seen", result.controls)):
        if not views.has(role):
            continue
        records, table = views.records(role), views.table(role)
        found = run_sweep(
            views.model, records, settings["starts"], table=table, noise=views.noise, model_map=views.model_map
        )
        hit = views.frame(role)["emitted"].to_numpy(dtype=bool).copy()
        for i in np.flatnonzero((found.records["best_greedy"] != "not").to_numpy() & ~hit):
            hit[i] = emits(views.model, found.best[int(i)])
        hits[role] = hit
        columns["best_strength"] = found.records["best_strength"].tolist()
        columns["best_context"] = found.records["best_context"].tolist()
        runs = windows(table, settings["window"])
        columns["longest_run"] = runs["longest_run"].tolist()
        curve = prefix_curve(table)
        series.append({"name": name, "x": curve.given.tolist(), "y": curve.finishing.tolist()})
        if role == "records":
            result.rate(
                "window",
                f"a window of {settings['window']} tokens (or the whole of a shorter completion) emitted",
                runs["hit"].tolist(),
                views.clusters(),
            )
            result.tables.append(
                {
                    "title": "Starts, from the full context to the shortest",
                    "columns": ["start", "records", "context tokens (median)", "extracted", "easier than the full one"],
                    "rows": [
                        [int(start), int(having), float(context), float(extracted), float(easier)]
                        for start, having, context, extracted, easier in found.by_start.to_numpy().tolist()
                    ],
                }
            )
    _add_hits(result, views, "any_start", f"emitted from at least one of up to {settings['starts']} starts", hits)
    result.curves.append(
        line(
            "Records that greedy decoding finishes, by how much of the completion it is given",
            {"label": "share of the completion given", "scale": "linear"},
            {"label": "share of records finished", "scale": "linear"},
            series,
        )
    )
    return result


def _scheme(scheme: SamplingScheme) -> tuple[str, str]:
    """A key and words for a sampling scheme."""
    parts, words = [], []
    for name, label in (("temperature", "temperature"), ("top_k", "top-k"), ("top_p", "top-p")):
        value = getattr(scheme, name)
        if value is not None and not (name == "temperature" and value == 1.0):
            parts.append(f"{name}_{value:g}".replace(".", "_"))
            words.append(f"{label} {value:g}")
    return ("plain", "the model's own distribution") if not parts else ("_".join(parts), ", ".join(words))


def _add_hits(result: Result, views: Views, key: str, title: str, hits: dict[str, np.ndarray]) -> None:
    never = hits.get("control", np.zeros(0, dtype=bool))
    result.rate(key, title, hits["records"].tolist(), views.clusters(), never.tolist(), views.clusters("control"))
    result.records["hit"] = hits["records"].tolist()
    result.controls["hit"] = never.tolist()


def _column(views: Views, name: str, title: str) -> Result:
    result = Result(headline=name, column=name)
    values = {role: views.frame(role)[name].to_numpy(dtype=np.float64) for role in ROLES if views.has(role)}
    result.mean(
        name,
        title,
        values["records"],
        views.clusters(),
        values.get("control", ()),
        views.clusters("control"),
        unit="probability" if "probability" in name else "share",
        seed=views.seed,
    )
    result.records[name] = values["records"].tolist()
    result.controls[name] = values["control"].tolist() if "control" in values else []
    return result
