"""A ledger for people and scripts: the list of requests, and everything about one of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from probes.errors import UsageError
from unlearn.ledger.chain import Ledger
from unlearn.ledger.history import State, lineage, states


def listing(ledger: Ledger) -> dict[str, Any]:
    """Every request with its state, for `unlearn ledger list`.

    Raises:
        IntegrityError: if the ledger was altered.
    """
    return {"schema": "unlearn.ledger.list/v1", "requests": [_data(state) for state in states(ledger)]}


def listing_text(data: dict[str, Any]) -> str:
    """The same as a table."""
    rows = [("entry", "state", "verdict", "claim", "records", "run")]
    for row in data["requests"]:
        note = f" ({row['note']})" if row["note"] else ""
        claim, verdict = row["claim_level"] or "-", row["verdict"] or "-"
        rows.append((str(row["n"]), row["state"], verdict, claim, str(row["records"]), row["run"] + note))
    if len(rows) == 1:
        return "no request was entered yet"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _data(state: State) -> dict[str, Any]:
    row = asdict(state)
    key, gone = row.pop("key"), row.pop("gone")
    if state.state == "resurfaced":
        note = f"came back in entry {state.asked_again}"
    elif gone:
        note = "the run folder is gone"
    elif state.state == "open":
        note = "interrupted; it can be resumed"
    else:
        note = ""
    return row | {"records": key["records"], "subject_request_id": key["subject_request_id"], "note": note}


def details(ledger: Ledger, which: str) -> dict[str, Any]:
    """Everything the ledger has about one request, for `unlearn ledger show`.

    Args:
        ledger: see `Ledger`.
        which: number of an entry, run folder relative to the store, or the request's own `subject_request_id`.

    Raises:
        UsageError: if the ledger has no such request.
        IntegrityError: if the ledger was altered.
    """
    entries, rows = ledger.entries(), states(ledger)
    name = which.rstrip("/")
    found = [row for row in rows if name in (row.run, row.key["subject_request_id"]) or which == str(row.n)]
    if not found and which.isdigit():
        found = [row for row in rows if row.closed == int(which)]
    if not found:
        raise UsageError(
            "expected an entry's number, a run folder of the store, or a subject_request_id in the ledger, found none; "
            "`unlearn ledger list` shows them"
        )
    runs = {row.run for row in found}
    ended = {row.closed for row in found if row.checkpoint is not None}
    mine = [entry for entry in entries if entry.data.get("run") in runs]
    closed = {entry.n: entry for entry in entries}
    return {
        "schema": "unlearn.ledger.show/v1",
        "requests": [_data(row) for row in found],
        "entries": [asdict(entry) for entry in mine],
        "after": sorted({e.n for row in found for e in lineage(entries, row.parent)} - ended),
        "asked_again": [
            {"entry": entry.n, "of": row["n"], "status": row["status"], "emitted_again": row["emitted_again"]}
            for entry in closed.values()
            if entry.event == "finished"
            for row in entry.data["earlier"]
            if row["n"] in ended
        ],
    }


def details_text(data: dict[str, Any]) -> str:
    """The same for people."""
    lines = [listing_text(data)]
    lines += ["", "entries"]
    for entry in data["entries"]:
        lines.append(f"  {entry['n']:>4}  {entry['time']}  {entry['event']}")
    for entry in data["entries"]:
        if entry["event"] == "finished":
            lines += [f"from checkpoint {entry['data']['parent']}", f"to checkpoint   {entry['data']['checkpoint']}"]
    if data["after"]:
        lines.append(f"after the requests of entries {', '.join(map(str, data['after']))}")
    for row in data["asked_again"]:
        lines.append(f"entry {row['of']} asked again in entry {row['entry']}: {row['status']}")
    return "\n".join(lines)
