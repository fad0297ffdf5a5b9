"""Check a ledger offline, against itself and against the runs in its store.

- the chain is unbroken, from the first line on;
- nothing was cut off its end: every entry that a run noted in its own event log stands in the ledger;
- every finished run that is still in the store has the event log, the verdict and the edit that were entered;
- every copy that is still there has the tensor digest that was entered;
- the frozen records that later runs ask for again are those that were entered (where the pseudonym key is at hand).

What this cannot show: that a ledger and every run in its store were not replaced together. A copy of the ledger kept
elsewhere, or just of its newest line's number and digest, does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probes.errors import IntegrityError, UsageError
from unlearn.disk import file_sha256
from unlearn.ledger.chain import NAME, Entry, Ledger, check_value, mac
from unlearn.ledger.history import finished
from unlearn.runs.folder import check_chain
from unlearn.runs.pseudonyms import load_key
from unlearn.runs.verify import Check


def verify(ledger: Ledger) -> list[Check]:
    """Run every check.

    Returns:
        One row per check.

    Raises:
        UsageError: if there is no ledger.
    """
    if not ledger.exists():
        raise UsageError(f"expected {NAME} in the run store, found none; give the folder that holds it")
    try:
        entries = ledger.entries()
    except IntegrityError as error:
        return [Check("chain", "failed", str(error))]
    if not entries:
        raise UsageError(f"expected entries in {NAME}, found none; nothing was carried out yet")
    done = finished(entries)
    return [
        Check("chain", "ok", f"{len(entries)} entries, the newest {entries[-1].sha256[:19]}"),
        _end(ledger, entries),
        _pairs(entries),
        _each(ledger, done, "runs", _run),
        _each(ledger, done, "checkpoints", _checkpoint),
        _records(ledger, entries, done),
    ]


def _end(ledger: Ledger, entries: list[Entry]) -> Check:
    known = {entry.n: entry.sha256 for entry in entries}
    noted = list(_noted(ledger.folder))
    lost = sorted({n for n, sha256 in noted if known.get(n) != sha256})
    if lost:
        return Check("end of the chain", "failed", f"runs noted entry {lost[0]}, which the ledger does not have")
    return Check("end of the chain", "ok", f"{len(noted)} entries noted by runs in the store")


def _noted(folder: Path) -> Iterator[tuple[int, str]]:
    """Entries that the runs of a store noted in their event logs, at any depth where runs are kept."""
    for log in sorted({*folder.glob("*/events.jsonl"), *folder.glob("*/*/events.jsonl")}):
        header = _json(log.with_name("run.json"))
        here = isinstance(header, dict) and isinstance(header.get("ledger"), dict)
        if not here or (log.parent / header["ledger"]["folder"]).resolve() != folder.resolve():
            continue
        for line in log.read_bytes().splitlines():
            if b'"ledger.' not in line:
                continue
            try:
                event = json.loads(line)
                if event["event"].startswith("ledger."):
                    yield int(event["data"]["n"]), str(event["data"]["sha256"])
            except (ValueError, KeyError, TypeError):
                continue  # a log that was altered is found below


def _pairs(entries: list[Entry]) -> Check:
    opened = {entry.n: entry for entry in entries if entry.event == "opened"}
    for entry in finished(entries):
        begun = opened.get(entry.data["opened"])
        if begun is None or (begun.data["run"], begun.data["parent"]) != (entry.data["run"], entry.data["parent"]):
            return Check("entries", "failed", f"entry {entry.n} closes no entry of the same run and checkpoint")
    return Check("entries", "ok", f"{len(opened)} opened, {len(finished(entries))} finished")


def _each(ledger: Ledger, done: list[Entry], what: str, check: Callable[[Path, dict[str, Any]], str | None]) -> Check:
    """One check over every finished run; `check` returns what is wrong, "" where there is nothing to look at."""
    seen = gone = 0
    for entry in done:
        wrong = check(ledger.folder / entry.data["run"], entry.data)
        if wrong:
            return Check(what, "failed", f"entry {entry.n}: {wrong}")
        seen, gone = (seen + 1, gone) if wrong is None else (seen, gone + 1)
    more = f"; {gone} no longer in the store" if gone else ""
    return Check(what, "ok" if seen else "skipped", f"{seen} as entered{more}")


def _run(folder: Path, data: dict[str, Any]) -> str | None:
    if not (folder / "run.json").is_file():
        return ""
    try:
        raw = (folder / "events.jsonl").read_bytes()
        lines = {hashlib.sha256(line).hexdigest() for line, _ in check_chain(raw)}
    except (OSError, IntegrityError):
        return "its event log is missing or altered"
    if data["events"] not in lines:
        return "its event log is not the one that was entered"
    judged = _json(folder / "compare" / "criteria.json") or {}
    if (judged.get("verdict"), judged.get("claim_level")) != (data["verdict"], data["claim_level"]):
        return "its verdict is not the one that was entered"
    delta = folder / "edit" / "delta.json"
    if not delta.is_file() or "sha256:" + file_sha256(delta) != data["edit"]:
        return "its edit is not the one that was entered"
    return None


def _checkpoint(folder: Path, data: dict[str, Any]) -> str | None:
    from unlearn.checkpoints.manifest import identify

    copy = folder / "edit" / "checkpoint"
    if not copy.is_dir():
        return ""
    try:
        same = identify(copy).tensor_digest == data["checkpoint"]
    except UsageError:
        same = False
    return None if same else "its edited copy has other weights than were entered"


def _records(ledger: Ledger, entries: list[Entry], done: list[Entry]) -> Check:
    key = load_key()
    if entries[0].data["key"] != check_value(key):
        return Check("records", "skipped", "the pseudonym key at hand is not the one the ledger was begun with")

    def check(folder: Path, data: dict[str, Any]) -> str | None:
        file = folder / "private" / "records.jsonl"
        if not file.is_file():
            return ""
        return None if mac(key, file.read_bytes()) == data["records_file"] else "its records are not those entered"

    return _each(ledger, done, "records", check)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
