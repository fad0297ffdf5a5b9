"""A criterion with what it found, with exactly the keys of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reports.reading import figure_of, float_of, text_of
from reports.text import Json, clean

_OPTIONAL: dict[str, Callable[[Any], Any]] = {
    "max": float_of,
    "margin": float_of,
    "set": text_of,
    "against": text_of,
    "attack": text_of,
}


def criterion(row: Json) -> Json:
    """An evaluated criterion of a run folder as it stands in the report."""
    return (
        {key: clean(str(row.get(key))) for key in ("id", "metric", "aggregate", "test")}
        | {key: convert(row.get(key)) for key, convert in _OPTIONAL.items()}
        | {
            "required": bool(row.get("required", True)),
            "observed": figure_of(row.get("observed")),
            "status": status_of(row.get("status")),
            "reason": text_of(row.get("reason")) or "",
        }
    )


def status_of(value: Any) -> str:
    """Met, not met, or inconclusive for anything else."""
    return value if value in ("met", "not met") else "inconclusive"
