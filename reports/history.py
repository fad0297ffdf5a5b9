"""What a run found about the requests carried out before it on the way to its checkpoint, and about each of its own.

Read from `inputs/history.json` (the way), `compare/earlier.json` (what came back), `compare/criteria.json` (the whole),
`compare/requests.json` (of a batch, each request) and the tables `before/earlier.parquet`, `after/earlier.parquet`.
A run that keeps no ledger has none of them, and its report has no part for it.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from reports.criteria import criterion, status_of
from reports.reading import float_of, int_of, read, read_list, rows_of, text_of
from reports.text import VERDICTS, Json, clean, plural

FOUND = ("emitted", "correct")  # column that says whether a record was found: language, images
CAME_BACK = {
    "engineer": "Records that earlier requests had forgotten came back in the edited copy ({entries} of the "
    "ledger). This fails the run, whatever its own criteria say.",
    "regulator": "Information that an earlier request had removed came back in the edited copy ({entries} of the "
    "ledger). The run failed for this reason, whatever its own checks say.",
    "subject": "Information that had been removed from the model for an earlier request came back in the edited copy. "
    "The copy did not pass for this reason.",
}


def history(run: Path) -> Json:
    """`{"history": ...}` for the report of a run that keeps a ledger; {} for every other run.

    The part has root, parent (tensor digests), task words under `measure`, status, reason, margin of the whole;
    `earlier`, a row for each earlier request, oldest first; `requests`, a row for each request of a batch.
    """
    found = read(run, "inputs/history.json", required=False)
    if not found:
        return {}
    whole = read(run, "compare/criteria.json", required=False).get("earlier") or {}
    judged = read(run, "compare/earlier.json", required=False)
    by_entry = {row["n"]: row for row in judged.get("requests") or []}
    tables = {stage: list(rows_of(run, f"{stage}/earlier.parquet").values()) for stage in ("before", "after")}
    column = next((name for name in FOUND for rows in tables.values() if rows and name in rows[0]), None)
    asked = sum(row["records"] for row in found["earlier"] if not row["missing"])
    counted = {
        stage: iter([row.get(column) for row in rows]) if column and len(rows) == asked else None
        for stage, rows in tables.items()
    }
    earlier = []
    for row in found["earlier"]:
        verdict = by_entry.get(row["n"])
        sums: dict[str, int | None] = dict.fromkeys(tables)
        for stage, values in counted.items():
            if values is not None and not row["missing"]:
                sums[stage] = sum(bool(value) for value in islice(values, row["records"]))
        earlier.append(
            {
                "n": int(row["n"]),
                "records": int(row["records"]),
                "verdict": row["verdict"] if row["verdict"] in VERDICTS else "inconclusive",
                "checkpoint": text_of(row.get("checkpoint")),
                "method": text_of(row.get("method")),
                "finished": text_of(row.get("finished")),
                "missing": text_of(row["missing"] or None),
                "found_then": int_of((verdict or {}).get("found_then")),
                "found_before": sums["before"],
                "found_after": sums["after"],
                "found_again": int_of((verdict or {}).get("emitted_again")),
                "again": [clean(str(name)) for name in (verdict or {}).get("again") or []],
                "status": status_of(verdict["status"]) if verdict else None,
                "reason": text_of((verdict or {}).get("reason")),
            }
        )
    return {
        "history": {
            "root": text_of(found.get("root")),
            "parent": text_of(found.get("parent")),
            "measure": column,
            "status": status_of(whole["status"]) if whole else None,
            "reason": text_of(whole.get("reason")),
            "margin": float_of(judged.get("margin")),
            "earlier": earlier,
            "requests": _requests(run, found),
        }
    }


def _requests(run: Path, found: Json) -> list[Json]:
    """Each request of a batch with its verdict, null while none was reached; none for a single request."""
    given = found.get("requests") or []
    if len(given) < 2:
        return []
    judged = read_list(run, "compare/requests.json")
    rows = []
    for index, request in enumerate(given):
        own = judged[index] if len(judged) == len(given) else {}
        verdict = own.get("verdict")
        rows.append(
            {
                "id": text_of(request.get("subject_request_id")),
                "records": int(request["records"]),
                "verdict": verdict if verdict in VERDICTS else None,
                "criteria": [criterion(row) for row in own.get("criteria") or []],
            }
        )
    return rows


def banner(report: Json, audience: str) -> str:
    """What stands beside the verdict of a run that brought earlier records back; empty for every other run."""
    rows = came_back(report)
    return CAME_BACK[audience].format(entries=entries(rows)) if rows else ""


def entries(rows: list[Json]) -> str:
    """`entry 3`, `entries 3, 5`."""
    return f"{'entry' if len(rows) == 1 else 'entries'} {', '.join(str(row['n']) for row in rows)}"


def came_back(report: Json) -> list[Json]:
    """The earlier requests whose records came back."""
    return [row for row in (report.get("history") or {"earlier": []})["earlier"] if row["status"] == "not met"]


def tally(report: Json) -> str:
    """What to read with the number of criteria met: `Of 2 earlier requests: 1 came back, 1 not decided.`

    Empty for a run without earlier requests and with one request of its own, and before anything was decided.
    """
    part = report.get("history") or {"earlier": [], "requests": []}
    sentences = []
    if any(row["status"] for row in part["earlier"]) or (part["earlier"] and part["status"]):
        outcomes = [outcome(row) for row in part["earlier"]]
        counts = ", ".join(f"{outcomes.count(words)} {words}" for words in dict.fromkeys(outcomes))
        sentences.append(f"Of {plural(len(outcomes), 'earlier request')}: {counts}.")
    if any(row["verdict"] for row in part["requests"]):
        verdicts = [row["verdict"] or "inconclusive" for row in part["requests"]]
        counts = ", ".join(f"{verdicts.count(words)} {words}" for words in dict.fromkeys(verdicts))
        sentences.append(f"Of {plural(len(verdicts), 'request')} in this edit: {counts}.")
    return " ".join(sentences)


def outcome(row: Json) -> str:
    """Whether an earlier request's records came back, in words."""
    if row["missing"]:
        return "not asked again"
    return OUTCOMES[row["status"]]


OUTCOMES = {"met": "did not come back", "not met": "came back", "inconclusive": "not decided", None: "not judged yet"}
