"""How a run folder is read: JSON objects, tables and figures, cleaned and finite, or one line that says what is wrong.

Nothing read here is quoted in an error: the text of a damaged file may hold anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reports.text import Json, clean, finite, tree


class ReportError(Exception):
    """A run folder cannot be reported on; `exit_code` is what the command line returns for it."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def read(run: Path, name: str, *, required: bool = True) -> Json:
    """A JSON object of the run folder; {} if it is absent and not required."""
    value = _read(run, name, None if required else {})
    if not isinstance(value, dict):
        raise ReportError(f"expected an object in {name}, found something else; the run folder is damaged", 4)
    return value


def read_list(run: Path, name: str) -> list[Json]:
    """A JSON list of objects of the run folder; [] if it is absent."""
    value = _read(run, name, [])
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ReportError(f"expected a list of objects in {name}, found something else; the run folder is damaged", 4)
    return value


def _read(run: Path, name: str, absent: Any) -> Any:
    """A JSON file; `absent` if there is none, unless that is None."""
    try:
        return json.loads((run / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if absent is not None:
            return absent
        raise ReportError(f"expected {name} in the run folder, found none; name the folder that holds it") from None
    except (OSError, ValueError):
        raise ReportError(f"expected readable JSON in {name}, found none; the run folder is damaged", 4) from None


def text_of(value: Any) -> str | None:
    """Any value as a cleaned string; None stays None."""
    return None if value is None else clean(str(value))


def float_of(value: Any) -> float | None:
    """A finite number; None for anything else."""
    return finite(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None


def int_of(value: Any) -> int | None:
    """A whole number; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def figure_of(raw: Any) -> Json | None:
    """A figure with exactly its seven keys; None if there is none."""
    if not isinstance(raw, dict):
        return None
    direction = raw.get("direction")
    return {
        "value": float_of(raw.get("value")),
        "unit": text_of(raw.get("unit")) or "",
        "n": int(raw.get("n") or 0),
        "ci_low": float_of(raw.get("ci_low")),
        "ci_high": float_of(raw.get("ci_high")),
        "ci_level": float_of(raw.get("ci_level")),
        "direction": direction if direction in ("lower", "higher") else "none",
    }


def rows_of(run: Path, name: str) -> dict[str, Json]:
    """A records table as {record id: {column: value}}; {} if the file is absent."""
    path = run / name
    if not path.is_file():
        return {}
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception:  # pyarrow raises its own family, and the text of a damaged file may hold anything
        raise ReportError(f"expected a readable table in {name}, found none; the run folder is damaged", 4) from None
    table = {clean(str(row.get("record_id"))): tree({k: v for k, v in row.items() if k != "record_id"}) for row in rows}
    if len(table) != len(rows):
        raise ReportError(f"expected unique record ids in {name}, found repeated ones; the run folder is damaged", 4)
    return table
