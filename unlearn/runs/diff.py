"""What differs between two runs: inputs, figures, verdicts. Intervals that do not overlap are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probes.errors import UsageError
from unlearn.runs.folder import read_header

STAGES = ("before", "after", "reference")


def _read(run: Path, name: str) -> Any:
    try:
        return json.loads((run / name).read_text())
    except OSError:
        return None
    except ValueError:
        raise UsageError(f"expected readable JSON in {name}, found none; verify the run") from None


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Compare two run folders.

    Returns:
        `inputs`: what differs among checkpoint, record sets, suite, settings, environment, as (a, b);
        `figures`: rows stage, set, metric, a, b, apart (whether the two intervals are disjoint);
        `verdict` and `claim_level` as (a, b).

    Raises:
        UsageError: if either is no run folder, or nothing was measured in both.
    """
    headers = [read_header(run) for run in (a, b)]
    inputs: dict[str, tuple[Any, Any]] = {}

    def note(name: str, left: Any, right: Any) -> None:
        if left != right:
            inputs[name] = (left, right)

    note("kind", headers[0]["kind"], headers[1]["kind"])
    for name, keys in (
        ("inputs/checkpoint.json", ("name", "tensor_digest", "tokenizer_digest")),
        ("inputs/reference.json", ("name", "tensor_digest")),
        ("inputs/environment.json", ("unlearn-audit", "python", "device", "threads", "libraries")),
        ("inputs/config.json", ("suite", "method", "settings")),
    ):
        left, right = _read(a, name) or {}, _read(b, name) or {}
        for key in keys:
            note(f"{Path(name).stem}.{key}", left.get(key), right.get(key))
    sets = [_read(run, "inputs/sets.json") or {} for run in (a, b)]
    for role in ("records", "control", "retain"):
        note(f"sets.{role}", *((found.get(role) or {}).get("digest") for found in sets))
    rows = []
    for stage in STAGES:
        left, right = (_read(run, f"{stage}/metrics.json") for run in (a, b))
        if left is None or right is None:
            continue
        for role in left["sets"]:
            if role not in right["sets"]:
                continue
            ours, theirs = left["sets"][role]["figures"], right["sets"][role]["figures"]
            for metric in ours:
                if metric in theirs and ours[metric] != theirs[metric]:
                    x, y = ours[metric], theirs[metric]
                    rows.append({"stage": stage, "set": role, "metric": metric, "a": x, "b": y, "apart": _apart(x, y)})
    judged = [_read(run, "compare/criteria.json") or {} for run in (a, b)]
    if not any((run / stage / "metrics.json").exists() for run in (a, b) for stage in STAGES):
        raise UsageError("expected two runs with measurements, found none; resume them first")
    return {
        "inputs": inputs,
        "figures": rows,
        "verdict": tuple(found.get("verdict") for found in judged),
        "claim_level": tuple(found.get("claim_level") for found in judged),
    }


def _apart(x: dict[str, Any], y: dict[str, Any]) -> bool:
    limits = (x["ci_low"], x["ci_high"], y["ci_low"], y["ci_high"])
    if any(limit is None for limit in limits):
        return False
    return bool(x["ci_high"] < y["ci_low"] or y["ci_high"] < x["ci_low"])
