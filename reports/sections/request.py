"""Section 3: what was asked, when, with which data."""

from __future__ import annotations

from collections.abc import Mapping

from reports.blocks import Block, Cell, Dates, Facts, Prose, Table, number_cell, table
from reports.text import Json, number, plain, sentence_case, short, short_digest, when, words_of

REQUEST_WORDS = {
    "subject_request_id": "Request id",
    "subject_request_type": "Kind of request",
    "regulation": "Regulation",
    "ground": "Ground",
    "exemptions_considered": "Exemptions considered",
    "manner": "Received by",
    "outcome": "Outcome",
}
DATE_WORDS = {
    "submitted_time": "Submitted",
    "received_time": "Received",
    "acknowledged_time": "Acknowledged",
    "due_time": "Answer due",
    "answered_time": "Answered",
}
GOVERNANCE_WORDS = {"dpia_ref": "DPIA reference", "dpo_ref": "DPO reference", "ropa_ref": "ROPA reference"}
REGULATIONS = {"gdpr": "GDPR", "uk_gdpr": "UK GDPR", "ccpa": "CCPA", "copyright_eu": "EU copyright law"}
SETS = {"records": "Records to be looked for", "control": "Control: never seen", "retain": "Retain: must stay"}
SOURCES = {"given": "given by the user", "drafted": "drafted by the tool, to be reviewed"}


def request_dates(request: Json) -> list[tuple[str, str]]:
    """The request's dates as (label, date), earliest first."""
    found = [(str(request[key]), words) for key, words in DATE_WORDS.items() if request.get(key)]
    return [(words, when(value)) for value, words in sorted(found, key=lambda item: item[0])]


def out_of_scope(request: Json) -> list[Json]:
    """Copies the request lists, each with `what`, `included` and `reason`."""
    scope = request.get("scope")
    copies = scope.get("copies") if isinstance(scope, dict) else None
    return [row for row in copies if isinstance(row, dict)] if isinstance(copies, list) else []


def request_section(report: Json) -> list[Block]:
    """Dates, the request's fields, copies in and out of scope, and the record sets; or "audit only"."""
    request = report["request"]
    if request is None:
        audit = report["run"]["kind"] == "audit"
        reason = "audit only, no request was given." if audit else "no request was recorded."
        return [Prose(f"not run: {reason}"), sets_table(report)]
    points = request_dates(request)
    blocks: list[Block] = [Dates(points)] if points else []
    blocks.append(Facts(_facts(request, report["subject"])[:24]))
    copies = out_of_scope(request)
    if copies:
        lines = [
            (
                Cell(short(words_of(plain(row.get("what"))), 80)),
                Cell(number(bool(row.get("included")))),
                Cell(short(plain(row.get("reason") or ""), 200)),
            )
            for row in copies
        ]
        blocks.append(table("Copies in and out of scope", ("Copy", "In scope", "Reason"), lines, "request.scope"))
    else:
        blocks.append(
            Prose("Other copies (backups, exports, adapters, caches) and recipients: not stated in the request.")
        )
    return [*blocks, sets_table(report)]


def _facts(request: Json, subject: Json | None) -> list[tuple[str, Cell]]:
    facts = []
    for key, label in REQUEST_WORDS.items():
        if request.get(key):
            text = plain(request[key])
            text = text if key == "subject_request_id" else REGULATIONS.get(text, words_of(text))
            facts.append((label, Cell(short(text, 200), style="code" if key == "subject_request_id" else "")))
    if subject:
        kind, pseudonym = (subject[key] or "not stated" for key in ("kind", "pseudonym"))
        special = "not stated" if subject["special"] is None else number(subject["special"])
        facts += [
            ("Subject", Cell(f"{words_of(kind)}, pseudonym {pseudonym}")),
            ("Data categories", Cell(plain(subject["categories"]))),
            ("Special categories", Cell(special)),
        ]
    governance = request.get("governance")
    for key, value in governance.items() if isinstance(governance, dict) else ():
        if value:
            facts.append((GOVERNANCE_WORDS.get(key, words_of(key).capitalize()), Cell(short(plain(value), 200))))
    return facts


def sets_table(report: Json, known: Mapping[str, str] = SETS) -> Table:
    """Size, origin and digest of the record sets of the run, those with a known name first."""
    names = [*(name for name in known if name in report["run"]["sets"]), *sorted(report["run"]["sets"].keys() - known)]
    lines = [
        (
            Cell(words),
            number_cell(row["n"]),
            number_cell(row["tokens"]),
            Cell(SOURCES.get(row["source"], row["source"])),
            Cell(
                short_digest(row["digest"]),
                style="code" if row["digest"] else "",
                tone="" if row["digest"] else "muted",
            ),
        )
        for name in names
        for row, words in ((report["run"]["sets"][name], known.get(name) or sentence_case(words_of(name))),)
    ]
    return table("Record sets", ("Set", "Records", "Tokens", "Origin", "Digest"), lines, "run.sets", (1, 2))
