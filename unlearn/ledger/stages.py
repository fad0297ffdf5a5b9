"""What a forget run does about its ledger inside the pipeline: three calls.

    freeze(run)                        in stage `inputs`: what was forgotten earlier, and what its runs measured then
    roles(job)                         the record sets that `before` and `after` measure: earlier records among them
    ask_again(run, criteria, evidence, rows)   in stage `compare`: did they come back, and a verdict for each request

`freeze` copies the earlier runs' tables into the private folder, so that `compare` depends on this run folder alone
and a resumed run ends with the bytes of an uninterrupted one, wherever the earlier runs are by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from probes.errors import IntegrityError
from unlearn.evidence.criteria import Evidence
from unlearn.ledger import history, resurfacing
from unlearn.ledger.batch import judge_requests
from unlearn.ledger.chain import Ledger
from unlearn.requests.presets import Criterion
from unlearn.runs.folder import RunFolder
from unlearn.runs.job import ROLES, Job

TABLES = ("records", "control")
CRITERION = "earlier requests"


@dataclass(slots=True)
class Asked:
    """What a run found about earlier requests, and about each of its own.

    Attributes:
        document: for `compare/criteria.json` under `earlier`: id, status, reason, required, not_audited; None where
            nothing was forgotten earlier.
        limits: sentences for the report.
    """

    document: dict[str, Any] | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What counts for the verdict beside the criteria."""
        return [self.document] if self.document is not None else []


def roles(job: Job) -> tuple[str, ...]:
    """The record sets that are measured before and after the edit."""
    return (*ROLES, history.ROLE) if history.ROLE in job.sources else ROLES


def freeze(run: RunFolder, *, adapters: bool = False) -> None:
    """Write `inputs/history.json`: what was forgotten on the way to the checkpoint, under pseudonyms.

    Args:
        run: in its `inputs` stage.
        adapters: keep the adapters of earlier edits too (`private/earlier/N-adapter`), for an editor that reads them.

    Raises:
        IntegrityError: if the ledger was altered, or no longer has the entries that the run was planned with.
    """
    kept = run.header.get("ledger")
    if not kept:
        return
    rows = []
    ledger = Ledger((run.path / kept["folder"]).resolve())
    entries = {entry.n: entry for entry in ledger.entries()} if kept["earlier"] else {}
    for planned in kept["earlier"]:
        entry = entries.get(planned["n"])
        if entry is None or entry.data.get("checkpoint") != planned["checkpoint"]:
            raise IntegrityError(
                f"expected entry {planned['n']} in the ledger as the run was planned with it, found another; restore "
                "the ledger from a copy"
            )
        rows.append(
            planned | {"pseudonyms": entry.data["pseudonyms"], "method": entry.data["method"], "finished": entry.time}
        )
        for name in TABLES if not planned["missing"] else ():
            table = ledger.folder / planned["run"] / "after" / f"{name}.parquet"
            if table.is_file():
                run.write_bytes(f"private/earlier/{planned['n']}-{name}.parquet", table.read_bytes())
        adapter = ledger.folder / planned["run"] / "private/adapter"
        for file in sorted(adapter.glob("*")) if adapters and not planned["missing"] else ():
            run.write_bytes(f"private/earlier/{planned['n']}-adapter/{file.name}", file.read_bytes())
    requests = [
        {"records": request["records"], "subject_request_id": request["subject_request_id"]}
        for request in kept["requests"]
    ]
    run.write_json(
        "inputs/history.json", {"parent": kept["parent"], "root": kept["root"], "earlier": rows, "requests": requests}
    )


def ask_again(
    run: RunFolder, criteria: Sequence[Criterion], evidence: Evidence, rows: Sequence[dict[str, Any]]
) -> Asked:
    """Judge earlier requests (`compare/earlier.json`), and each request of a batch (`compare/requests.json`).

    Args:
        run: in its `compare` stage.
        criteria: the sealed ones for this kind of model.
        evidence: with a table `earlier` where records of earlier requests were measured.
        rows: the evaluated criteria.
    """
    if not run.file("inputs/history.json").is_file():
        return Asked()
    found = run.read_json("inputs/history.json")
    asked = Asked(limits=history.limits(found["earlier"]))
    if found["earlier"]:
        asked.document = _earlier(run, criteria, evidence, found["earlier"])
    if len(found["requests"]) > 1:
        sizes = [request["records"] for request in found["requests"]]
        judged = judge_requests(criteria, evidence, sizes, rows, asked.rows)
        run.write_json(
            "compare/requests.json",
            [request | own for request, own in zip(found["requests"], judged, strict=True)],
        )
    return asked


def _earlier(
    run: RunFolder, criteria: Sequence[Criterion], evidence: Evidence, planned: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    gone = [row["n"] for row in planned if row["missing"]]
    parts = [
        resurfacing.Part(row["n"], row["pseudonyms"], *(_table(run, row["n"], name) for name in TABLES))
        for row in planned
        if not row["missing"]
    ]
    document: dict[str, Any] = {"id": CRITERION, "required": True, "not_audited": gone}
    now = evidence.table("current", history.ROLE)
    if not parts or now is None:
        return document | {"status": "inconclusive", "reason": "none of the earlier records could be asked again"}
    judged = resurfacing.judge(
        now,
        evidence.table("current", "control"),
        parts,
        evidence.task,
        margin=resurfacing.margin_of(criteria),
        seed=evidence.seed,
    )
    run.write_json("compare/earlier.json", judged)
    return document | {"status": judged["status"], "reason": judged["reason"]}


def _table(run: RunFolder, n: int, name: str) -> pd.DataFrame | None:
    path = f"private/earlier/{n}-{name}.parquet"
    return run.read_table(path) if run.file(path).is_file() else None
