"""The condition probe: singular values of every weight matrix, one at a time (`probes.condition`)."""

from __future__ import annotations

from typing import Any

from probes.condition import condition_table
from unlearn.workspace import Workspace

COLUMNS = (
    "name",
    "block",
    "role",
    "expert",
    "shape",
    "kappa",
    "kappa_relative",
    "stable_rank",
    "stable_rank_share",
    "effective_rank",
    "effective_rank_share",
)


def run(workspace: Workspace, settings: dict[str, Any]) -> dict[str, Any]:
    """One row per matrix, in model order; `kappa` is null where a matrix is rank deficient."""
    loaded = workspace.loaded("checkpoint")
    table = condition_table(loaded.model, model_map=loaded.model_map, progress=workspace.progress)
    rows = [{name: _plain(row[name]) for name in COLUMNS} for row in table.to_dict("records")]
    deficient = sum(row["kappa"] is None for row in rows)
    warnings = [f"{deficient} of {len(rows)} matrices are rank deficient: their condition number is infinite."]
    return {"tensors": rows, "warnings": warnings if deficient else []}


def _plain(value: Any) -> Any:
    """Missing values as None, sizes as a list, whole numbers as such: pandas makes floats of columns with gaps."""
    if isinstance(value, (tuple, list)):
        return [int(size) for size in value]
    if value is None or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**31 else value
