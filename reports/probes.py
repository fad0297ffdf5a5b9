"""What the probes of a run found inside the model: RUN/probes/*.json and the per-record table beside them.

Every probe is optional. A result is copied field by field, so the report has exactly the keys of its schema whatever
else a file holds: numbers are finite or null, strings cleaned, parallel lists of equal length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports.reading import ReportError, figure_of, float_of, int_of, read, rows_of, text_of
from reports.text import Json, clean, tree

NAMES = ("kfac", "spectrum", "localise", "condition")
SCHEMA = "unlearn.probe/v1"


def probe_results(run: Path) -> Json:
    """Every probe's result by name, None where it did not run.

    Raises:
        ReportError: if a result is of another schema or of another probe than its name says.
    """
    readers = {"kfac": _kfac, "spectrum": _spectrum, "localise": _localise, "condition": _condition}
    results: Json = {}
    for name in NAMES:
        raw = read(run, f"probes/{name}.json", required=False)
        if raw and (raw.get("schema"), raw.get("probe")) != (SCHEMA, name):
            raise ReportError(f"expected schema {SCHEMA} and probe {name} in probes/{name}.json, found others", 4)
        results[name] = _common(raw) | readers[name](raw, run) if raw else None
    return results


def record_figures(run: Path) -> dict[str, Json]:
    """Per-record figures of the curvature probe by record id; whatever is no number or null is left out."""
    return {
        name: {key: value for key, value in row.items() if not isinstance(value, str | bool | list | dict)}
        for name, row in rows_of(run, "probes/records.parquet").items()
    }


def _common(raw: Json) -> Json:
    data = raw.get("data") or {}
    return {
        "settings": tree(raw.get("settings") or {}),
        "data": {key: int_of(data.get(key)) for key in ("n_records", "n_tokens", "n_positions")}
        | {"digest": text_of(data.get("digest"))},
        "warnings": [clean(str(text)) for text in raw.get("warnings") or []],
    }


def _kfac(raw: Json, run: Path) -> Json:
    return {
        "modules": [_module(row) for row in raw.get("modules") or []],
        "records": _scores(raw.get("records"), run),
    }


def _module(row: Json) -> Json:
    cut = row.get("cut")
    return {
        "module": clean(str(row["module"])),
        "block": int_of(row.get("block")),
        "role": text_of(row.get("role")),
        "expert": int_of(row.get("expert")),
        "shape": _integers(row.get("shape")),
        "n_positions": int_of(row.get("n_positions")),
        **{key: float_of(row.get(key)) for key in ("trace_a", "trace_g", "mass", "overlap_a", "overlap_g")},
        "curve": _parallel(row.get("curve"), "pairs", "mass"),
        "spectrum": _parallel(row.get("spectrum"), "index", "eigenvalue", int_of),
        "cut": {key: float_of(cut.get(key)) for key in ("rho", "threshold", "kept_norm", "predicted_rise")}
        | {key: int_of(cut.get(key)) for key in ("kept_pairs", "pairs")}
        if cut
        else None,
    }


def _scores(raw: Json | None, run: Path) -> Json | None:
    """How the records compare with control: the AUC, and both sets' scores without ids, ascending."""
    if raw is None:
        return None
    scores = {}
    for part in ("records", "control"):
        found = (row.get("memorisation_score") for row in rows_of(run, f"probes/{part}.parquet").values())
        scores[part] = sorted(value for value in map(float_of, found) if value is not None)
    return {
        "n": int(raw.get("n") or 0),
        "n_control": int(raw.get("n_control") or 0),
        "auc": figure_of(raw.get("auc")),
        "columns": [clean(str(name)) for name in raw.get("columns") or []],
        "scores": scores,
    }


def _spectrum(raw: Json, _: Path) -> Json:
    return {
        "operators": [
            {
                "name": clean(str(row["name"])),
                "block": int_of(row.get("block")),
                "parameters": int_of(row.get("parameters")),
                "trace": figure_of(row.get("trace")),
                **{key: _numbers(row.get(key)) for key in ("largest", "smallest", "residuals")},
                "negative_share": float_of(row.get("negative_share")),
                "ritz": _parallel(row, "nodes", "weights"),
                "density": _parallel(row.get("density"), "x", "y"),
            }
            for row in raw.get("operators") or []
        ]
    }


def _localise(raw: Json, _: Path) -> Json:
    return {
        "records": [
            {
                "id": clean(str(row["id"])),
                "n_tokens": int_of(row.get("n_tokens")),
                "log_prob": float_of(row.get("log_prob")),
                "prompt": [
                    scored | {"occlusion": float_of(place.get("occlusion"))}
                    for scored, place in zip(
                        _scored(row.get("prompt"), "position"), row.get("prompt") or [], strict=True
                    )
                ],
                "layers": _layers(row.get("layers")),
                "neurons": _scored(row.get("neurons"), "block", "neuron"),
                "ablation": {"k": int_of(row["ablation"].get("k"))}
                | {key: float_of(row["ablation"].get(key)) for key in ("top", "random", "ordinary")}
                if row.get("ablation")
                else None,
                "influence": None
                if row.get("influence") is None
                else [
                    {"id": clean(str(item["id"])), "score": float_of(item.get("score"))} for item in row["influence"]
                ],
                "completeness_gap": float_of(row.get("completeness_gap")),
            }
            for row in raw.get("records") or []
        ],
        "heat": _layers(raw.get("heat")),
        "parts": [
            {"block": int_of(row.get("block")), "module": text_of(row.get("module"))}
            | {key: float_of(row.get(key)) for key in ("drop", "ordinary", "contrast")}
            for row in raw.get("parts") or []
        ],
    }


def _condition(raw: Json, _: Path) -> Json:
    figures = (
        "kappa",
        "kappa_relative",
        "stable_rank",
        "stable_rank_share",
        "effective_rank",
        "effective_rank_share",
    )
    return {
        "tensors": [
            {
                "name": clean(str(row["name"])),
                "block": int_of(row.get("block")),
                "role": text_of(row.get("role")),
                "expert": int_of(row.get("expert")),
                "shape": _integers(row.get("shape")),
            }
            | {key: float_of(row.get(key)) for key in figures}
            for row in raw.get("tensors") or []
        ]
    }


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values or []]


def _numbers(values: Any) -> list[float]:
    """The finite numbers of a list."""
    return [value for value in map(float_of, values or []) if value is not None]


def _parallel(
    raw: Json | None, first: str, second: str, first_of: Callable[[Any], float | None] = float_of
) -> Json | None:
    """Two lists that belong together, without the places where either holds no number; None if there are none.

    Raises:
        ValueError: if their lengths differ.
    """
    pairs = zip((raw or {}).get(first) or [], (raw or {}).get(second) or [], strict=True)
    kept = [(x, y) for x, y in ((first_of(x), float_of(y)) for x, y in pairs) if x is not None and y is not None]
    return {first: [x for x, _ in kept], second: [y for _, y in kept]} if kept else None


def _scored(rows: Any, *places: str) -> list[Json]:
    return [{key: int_of(row.get(key)) for key in places} | {"score": float_of(row.get("score"))} for row in rows or []]


def _layers(rows: Any) -> list[Json]:
    return [
        {"block": int_of(row.get("block")), "module": text_of(row.get("module")), "score": float_of(row.get("score"))}
        for row in rows or []
    ]
