"""Check a run folder offline: nobody needs the model, the records or the private folder.

- the event chain is unbroken, from the first line on;
- every file that a finished stage left outside `private/` still has the digest in the chain, and no file was added
  (documents may be rendered again, after a sign-off for instance: they are checked by what they say);
- the criteria that were judged are those sealed before any model was loaded;
- the edited checkpoint has the tensor digest and the file digests in the record;
- every document renders to the bytes that stand there.

What this cannot show: that the run was honest in the first place, or that the whole folder was not replaced. A
signature on the folder's digests does that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import IntegrityError, UsageError
from unlearn import reporting
from unlearn.disk import file_sha256
from unlearn.requests.presets import Criterion, criteria_digest
from unlearn.runs.folder import check_chain, read_header

_FREE = {"run.json", "events.jsonl"}  # status and the chain itself


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: `ok`, `failed` or `skipped`, and a line about it."""

    name: str
    status: str
    detail: str


def verify(run: Path) -> list[Check]:
    """Run every check.

    Args:
        run: a run folder, with or without `private/`.

    Returns:
        One row per check.

    Raises:
        UsageError: if this is no run folder, or nothing was finished in it.
    """
    read_header(run)
    try:
        raw = (run / "events.jsonl").read_bytes()
    except OSError:
        raise UsageError("expected events.jsonl in the run folder, found none; give the folder of a run") from None
    try:
        events = [event for _, event in check_chain(raw)]
    except IntegrityError as error:
        return [Check("event chain", "failed", str(error))]
    outputs: dict[str, str] = {}
    for event in events:
        if event["event"] == "stage.done":
            outputs |= event["data"]["outputs"]
    if not outputs:
        raise UsageError("expected a run with at least one finished stage, found none; resume it first")
    checks = [Check("event chain", "ok", f"{len(events)} events")]
    checks.append(_files(run, outputs))
    checks.append(_strangers(run, outputs))
    checks.append(_criteria(run, events))
    checks.append(_checkpoint(run))
    checks.append(_documents(run))
    return checks


def passed(checks: list[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.status != "failed" for check in checks)


def _files(run: Path, outputs: dict[str, str]) -> Check:
    private = not (run / "private").is_dir()
    free = ("report/", "private/") if private else ("report/",)
    expected = {name: digest for name, digest in outputs.items() if not name.startswith(free)}
    wrong = [
        name
        for name, digest in sorted(expected.items())
        if not (run / name).is_file() or file_sha256(run / name) != digest
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return Check("files", "failed", f"{wrong[0]}{more} missing or changed since the run")
    note = "; private/ is not part of this copy" if private else ""
    return Check("files", "ok", f"{len(expected)} files as the run left them{note}")


def _strangers(run: Path, outputs: dict[str, str]) -> Check:
    found = [
        name
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and (name := path.relative_to(run).as_posix()) not in outputs
        and name not in _FREE
        and name.split("/")[0] not in ("private", "attest", "report")
    ]
    if found:
        return Check("nothing added", "failed", f"{len(found)} files that no stage wrote")
    return Check("nothing added", "ok", "no file that no stage wrote")


def _criteria(run: Path, events: list[dict[str, Any]]) -> Check:
    if read_header(run)["kind"] not in ("audit", "forget"):
        return Check("criteria", "skipped", "this run judges nothing")
    sealed = next((event["data"].get("digest") for event in events if event["event"] == "criteria.sealed"), None)
    path = run / "inputs" / "policy.json"
    if sealed is None or not path.is_file():
        return Check("criteria", "failed", "no criteria were sealed before the run")
    criteria = [Criterion(**row) for row in json.loads(path.read_text())["criteria"]]
    if criteria_digest(criteria) != sealed:
        return Check("criteria", "failed", "the criteria are not those sealed before any model was loaded")
    judged = run / "compare" / "criteria.json"
    if judged.is_file():
        rows = json.loads(judged.read_text())["criteria"]
        fixed = ("id", "metric", "test", "max", "margin", "required")
        if [[row[key] for key in fixed] for row in rows] != [[getattr(c, key) for key in fixed] for c in criteria]:
            return Check("criteria", "failed", "the criteria that were judged are not the sealed ones")
    return Check("criteria", "ok", f"sealed before any model was loaded, {sealed[:19]}")


def _checkpoint(run: Path) -> Check:
    folder, delta = run / "edit" / "checkpoint", run / "edit" / "delta.json"
    if not delta.is_file():
        edits = read_header(run)["kind"] in ("forget", "edit")
        return Check(
            "edited checkpoint", "skipped", "not written: an unfinished run" if edits else "this run edits nothing"
        )
    if not folder.is_dir():
        return Check("edited checkpoint", "failed", "the run wrote one, and it is not here")
    from unlearn.checkpoints.manifest import identify

    recorded = json.loads(delta.read_text())["tensor_digest"]
    if identify(folder).tensor_digest != recorded:
        return Check("edited checkpoint", "failed", "its tensors are not those the run wrote")
    return Check("edited checkpoint", "ok", f"tensor digest {recorded[:19]}")


def _documents(run: Path) -> Check:
    if not (run / "report").is_dir():
        return Check("documents", "skipped", "no report was written")
    problems = reporting.check(run)
    if problems:
        return Check("documents", "failed", problems[0])
    return Check("documents", "ok", "every document renders to the bytes that stand here")
