"""Runs with a ledger as the pipelines write them, from made-up numbers: what was carried out earlier, what came back,
the requests of a batch; and the statistics of an editor with groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reports.synthetic import digest, dump, parquet, write_run

Json = dict[str, Any]
REASON = {
    "met": "probability against the control: upper bound 0.012 below the margin 0.05",
    "not met": "probability against the control: lower bound 0.21 above the margin 0.05",
    "inconclusive": "probability against the control: 2 records are too few to decide",
}
ORDER = ("not met", "inconclusive", "met")


@dataclass(frozen=True)
class Request:
    """An earlier request: entry, records, outcome, how many are found before this edit, after it, after its own run,
    and whether the latter is known.
    """

    n: int
    records: int = 2
    status: str = "met"
    before: int = 0
    after: int = 0
    then: int = 0
    known: bool = True
    missing: str = ""
    method: str | None = None
    finished: str | None = None

    @property
    def names(self) -> list[str]:
        return [f"e-{hashlib.sha256(f'{self.n}/{i}'.encode()).hexdigest()[:16]}" for i in range(self.records)]


QUIET = (Request(3, 2), Request(5, 3, before=1, then=1, after=1))
BACK = (Request(3, 2, "not met", after=2), Request(5, 3), Request(7, 4, "inconclusive"))
GONE = (Request(3, 2, missing="its private folder was purged"), Request(5, 3))


def write_history_run(
    run: Path,
    earlier: Sequence[Request] = QUIET,
    *,
    task: str = "causal_lm",
    batch: Sequence[tuple[str | None, int, str]] = (),
    judged: bool = True,
    **options: Any,
) -> Path:
    """A forget run with a ledger.

    Args: earlier requests, oldest first; task; batch: id, records and verdict of each request where there are several;
    whether it came to a decision; options of `write_run`.
    """
    back = any(row.status == "not met" for row in earlier if not row.missing)
    options = {"verdict": "criteria not met" if back else "criteria met", **options}
    write_run(run, task=task, stages=("before", "after", "compare")[: 3 if judged else 1], **options)
    asked = [row for row in earlier if not row.missing]
    planned = []
    for row in earlier:
        known = {key: value for key in ("method", "finished") if (value := getattr(row, key)) is not None}
        planned.append(
            {
                "n": row.n,
                "run": f"2026112{row.n}T101500Z-forget",
                "records": row.records,
                "verdict": "criteria met",
                "checkpoint": digest(f"copy {row.n}"),
                "missing": row.missing,
                "pseudonyms": row.names,
                **known,
            }
        )
    requests = [{"records": n, "subject_request_id": name} for name, n, _ in batch] or [
        {"records": 20, "subject_request_id": "one"}
    ]
    dump(
        run / "inputs/history.json",
        {
            "parent": planned[-1]["checkpoint"] if planned else digest("before"),
            "root": digest("root"),
            "earlier": planned,
            "requests": requests,
        },
    )
    column = "emitted" if task == "causal_lm" else "correct"
    for stage in ("before", "after"):
        if asked and (run / stage / "metrics.json").is_file():
            rows = [
                {"record_id": name, column: i < getattr(row, stage)}
                for row in asked
                for i, name in enumerate(row.names)
            ]
            parquet(run / stage / "earlier.parquet", rows)
    if not judged:
        return run
    path = run / "compare/criteria.json"
    document = None
    if earlier:
        statuses = [row.status for row in asked] or ["inconclusive"]
        status = min(statuses, key=ORDER.index)
        reason = "2 earlier requests asked again" if asked else "none of the earlier records could be asked again"
        document = {"id": "earlier requests", "required": True, "status": status, "reason": reason}
        document["not_audited"] = [row.n for row in earlier if row.missing]
    dump(path, json.loads(path.read_text()) | {"earlier": document})
    if asked:
        rows = [_judged(row, task) for row in asked]
        dump(
            run / "compare/earlier.json",
            {"status": document and document["status"], "reason": "words", "margin": 0.05, "requests": rows},
        )
    if batch:
        criteria = json.loads(path.read_text())["criteria"]
        statuses_of = {"criteria met": "met", "criteria not met": "not met", "inconclusive": "inconclusive"}
        dump(
            run / "compare/requests.json",
            [
                request
                | {"verdict": verdict, "criteria": [criteria[0] | {"status": statuses_of[verdict]}, *criteria[1:]]}
                for request, (_, _, verdict) in zip(requests, batch, strict=True)
            ],
        )
    return run


def _judged(row: Request, task: str) -> Json:
    again = row.names[: max(0, row.after - row.then)] if task == "causal_lm" else []
    text = task == "causal_lm"
    return {
        "n": row.n,
        "records": row.records,
        "found_then": row.then if row.known else None,
        "emitted": row.after if text else None,
        "emitted_again": len(again) if text else None,
        "again": again,
        "status": row.status,
        "reason": (f"{len(again)} of {row.records} emitted again; " if again else "") + REASON[row.status],
    }


def write_groups_run(run: Path, groups: Sequence[tuple[str, int, float]], **options: Any) -> Path:
    """A forget run whose editor reports groups: (name, block, norm)."""
    write_run(run, **options)
    delta = json.loads((run / "edit/delta.json").read_text())
    delta["statistics"] = {
        "steps": 40,
        "groups": [{"name": name, "block": block, "norm": norm} for name, block, norm in groups],
        "active_groups": sum(norm > 0 for _, _, norm in groups),
    }
    dump(run / "edit/delta.json", delta)
    return run
