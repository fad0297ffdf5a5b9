"""Untargeted extraction: free samples, ranked by the signals of Carlini et al. (2021), searched for the records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from attacks.extraction.untargeted import as_records, distinct, lowercased, matches, precision, signals
from probes.likelihood import SamplingScheme
from unlearn.attacking.result import Result
from unlearn.attacking.views import Views

TITLES = {
    "perplexity": "perplexity",
    "reference_ratio": "ratio to the reference",
    "zlib_ratio": "zlib",
    "lowercase_ratio": "lower case",
    "window_perplexity": "sliding window",
}


def sampling(views: Views, settings: dict[str, Any]) -> Result:
    """Which records turn up in free samples, and how well each signal finds those samples."""
    scheme = SamplingScheme(settings["temperature"], settings["top_k"])
    drawn = views.samples(settings["n"], settings["length"], scheme)
    result = Result(headline="found", column="hit")
    held: dict[str, Any] = {}
    for role, columns in (("records", result.records), ("control", result.controls)):
        if views.has(role):
            held[role] = matches(drawn, views.records(role), settings["minimum"])
            present = set(held[role].found["record"].tolist())
            columns["hit"] = [i in present for i in range(len(views.records(role)))]
    result.rate(
        "found",
        f"records in {settings['n']} free samples of {settings['length']} tokens",
        list(result.records["hit"]),
        views.clusters(),
        list(result.controls.get("hit", ())),
        views.clusters("control"),
    )
    keep = distinct(drawn)
    hits = held["records"].held[keep]
    result.rate("samples", "different samples that hold a record", hits.tolist(), None)
    ranked = _ranked(views, drawn, keep, settings["window"])
    if ranked is not None:
        top = min(settings["top"], len(keep))
        shown = precision(ranked, hits, ks=(top,))
        result.tables.append(
            {
                "title": f"Samples that hold a record, among the {top} that a signal ranks first",
                "columns": ["signal", "k", "hits", "precision", "low", "high"],
                "rows": [[TITLES.get(str(row[0]), str(row[0])), *row[1:]] for row in _rows(shown)],
            }
        )
    if held["records"].too_short:
        result.notes.append(
            f"{held['records'].too_short} records are too short to be told from chance and were not looked for."
        )
    result.generated = sum(map(len, drawn))
    result.notes.append("Samples were searched for the records given, not for everything else the model may hold.")
    return result


def _ranked(views: Views, drawn: list[tuple[int, ...]], keep: list[int], window: int) -> pd.DataFrame | None:
    """Signals of the samples kept; None where there are none."""
    if not keep:
        return None
    decode = lambda ids: views.decode([ids])[0]  # noqa: E731
    scored = as_records(drawn, views.opening, decode, keep)
    target = views.score(scored)
    lower = None
    if views.tokenizer is not None:
        encode = lambda text: views.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        lower = views.score(lowercased(scored, decode, encode))
    return signals(target, lower=lower, window=window)


def _rows(frame: pd.DataFrame) -> list[list[Any]]:
    return [
        [None if isinstance(value, float) and not np.isfinite(value) else value for value in row]
        for row in frame.itertuples(index=False)
    ]
