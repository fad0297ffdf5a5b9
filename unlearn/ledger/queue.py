"""A folder of request files, carried out one after another by one command, as often as one likes.

Requests are the `.yaml` and `.yml` files that lie in the folder, in the order of their names; files that arrive
meanwhile are taken too. Nothing in the folder is moved or changed: what was done stands in the ledger, so a second
pass repeats nothing, an interrupted run is resumed, and a request that fails does not keep the others from theirs.

One process at a time works on a folder (`.queue.lock`). A second one leaves at once with exit code 5, or waits.

In a chain every request starts from the newest checkpoint that descends from the one it names
(`unlearn.ledger.history.head`); otherwise each starts from the one it names.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes.errors import ResourceError, UnlearnError, UsageError
from unlearn import api
from unlearn.disk import disk_errors
from unlearn.evidence.criteria import EXIT_CODES
from unlearn.failure import explain
from unlearn.ledger import custody, history
from unlearn.ledger.chain import ENVIRONMENT, Entry, Ledger
from unlearn.ledger.history import Advance
from unlearn.runs.job import Options
from unlearn.terminal import Display

SCHEMA = "unlearn.queue/v1"
LOCK = ".queue.lock"
SUFFIXES = (".yaml", ".yml")
WORST = (0, 3, 1, 2, 5, 4)  # exit codes from harmless to grave: the queue returns the gravest of its requests
FAILURES = {2: "invalid", 4: "refused"}


@dataclass(frozen=True, slots=True)
class Settings:
    """How requests of a queue are carried out.

    Attributes:
        chain: each starts from the result of those before.
        advance: the weakest verdict whose copy the next request of a chain starts from.
        complete_history: see `unlearn.api.forget`.
        options: device, dtype, seed, ...
    """

    chain: bool = False
    advance: Advance = "inconclusive"
    complete_history: bool = False
    options: Options = field(default_factory=Options)


def process(
    folder: str | Path,
    ledger: str | Path | None = None,
    settings: Settings | None = None,
    *,
    wait: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Carry out every request of a folder.

    Args:
        folder: request files.
        ledger: the run store; `UNLEARN_LEDGER`, or `runs` in the folder, by default.
        settings: see `Settings`.
        wait: wait for another process to finish instead of leaving.
        display: where progress goes.

    Returns:
        The summary (docs/queue.md): `schema`, `ledger`, `chain`, `requests` (a row each), `exit_code`.

    Raises:
        UsageError: there is no such folder, or no ledger is to be kept.
        IntegrityError: the ledger was altered; nothing is run.
        ResourceError: another process works on the folder.
    """
    place, settings, display = Path(folder), settings or Settings(), display or Display()
    if not place.is_dir():
        raise UsageError("expected a folder of request files, found none; make it first")
    kept = custody.ledger_for(ledger if ledger is not None else os.environ.get(ENVIRONMENT, place / "runs"), None, "")
    if kept is None:
        raise UsageError("expected a ledger for a queue, found none kept; unset UNLEARN_LEDGER or give --ledger")
    rows: list[dict[str, Any]] = []
    roots: list[str] = []
    with _alone(place, wait=wait):
        kept.entries()  # an altered ledger stops everything, before anything runs
        done: set[str] = set()
        while (path := _next(place, done)) is not None:
            done.add(path.name)
            display.note(f"request {len(done)}: {path.name}")
            row, root = _one(path, kept, settings, display)
            rows.append({"file": path.name} | row)
            roots += [root] if root is not None and root not in roots else []
        entries = kept.entries() if settings.chain else []
    worst = max((row["exit_code"] for row in rows), key=WORST.index, default=0)
    return {
        "schema": SCHEMA,
        "ledger": str(kept.path),
        "chain": [_head(entries, root, settings.advance) for root in roots] if settings.chain else None,
        "requests": rows,
        "exit_code": worst,
    }


@contextlib.contextmanager
def _alone(folder: Path, *, wait: bool) -> Iterator[None]:
    with disk_errors():
        handle = (folder / LOCK).open("ab")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ResourceError(
                "expected a queue that nothing else works on, found another process at it; it takes new files too, "
                "or use --wait"
            ) from None
        yield


def _next(folder: Path, done: set[str]) -> Path | None:
    """The first request file by name that was not looked at yet."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return min((path for path in files if path.is_file() and path.name not in done), key=lambda p: p.name, default=None)


def _one(path: Path, ledger: Ledger, settings: Settings, display: Display) -> tuple[dict[str, Any], str | None]:
    """Carry out one request, whatever becomes of it; its row, and the checkpoint it names."""
    root: str | None = None
    try:
        batch = api.request_batch([path], settings.options)
        plan = custody.plan(
            ledger, batch, chain=settings.chain, advance=settings.advance, complete=settings.complete_history
        )
        root = plan.root
        if plan.carried_out is not None:
            return _row(plan.carried_out, "carried out before"), root
        custody.abandon(ledger, plan.keys, plan.parent, chain=settings.chain)
        begun = plan.unfinished
        if begun is not None and (begun / "private" / "job.json").is_file():
            if history.in_use(begun):
                raise ResourceError(
                    "expected a request that nothing else works on, found another process at it; wait for it"
                )
            run = api.forget(resume=begun, display=display)
        else:
            run = api.carry_out(plan, batch, None, display, alone=True)
        name = run.path.resolve().relative_to(ledger.folder.resolve()).as_posix()
        entry = next(e for e in reversed(ledger.entries()) if e.event == "finished" and e.data["run"] == name)
        return _row(entry, "finished"), root
    except (Exception, MemoryError) as error:  # the next request goes on; an interrupt does not come here
        code, line = explain(error)
        unexpected = not isinstance(error, (UnlearnError, OSError, MemoryError))
        state = "failed" if unexpected else FAILURES.get(code, "failed")
        display.note(line)
        return {"state": state, "exit_code": code, "error": line}, root


def _row(entry: Entry, state: str) -> dict[str, Any]:
    data = entry.data
    return {
        "state": state,
        "exit_code": EXIT_CODES[data["verdict"]],
        "verdict": data["verdict"],
        "claim_level": data["claim_level"],
        "run": data["run"],
        "entry": entry.n,
        "records": data["records"],
        "checkpoint": data["checkpoint"],
        "earlier": {
            "asked_again": [row["n"] for row in data["earlier"] if row["status"] != "not audited"],
            "came_back": [row["n"] for row in data["earlier"] if row["status"] == "not met"],
            "not_audited": [row["n"] for row in data["earlier"] if row["status"] == "not audited"],
        },
    }


def _head(entries: list[Entry], root: str, advance: Advance) -> dict[str, Any]:
    newest = history.head(entries, root, advance)
    run = None if newest.entry is None else newest.entry.data["run"]
    return {"root": root, "checkpoint": newest.digest, "run": run}


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    rows = summary["requests"]
    if not rows:
        return "no request in the folder"
    width = max(len(row["file"]) for row in rows)
    lines = []
    for row in rows:
        what = row.get("error") or f"{row['verdict']}, {row['claim_level']}, {row['run']}"
        first, *more = what.splitlines()
        lines.append(f"{row['file']:<{width}}  {row['state']:<18}  {first}")
        lines += [f"{'':<{width}}  {'':<18}  {line}" for line in more]
        back = row.get("earlier", {}).get("came_back")
        if back:
            lines.append(f"{'':<{width}}  {'came back':<18}  entries {', '.join(map(str, back))}")
    for chain in summary["chain"] or ():
        lines.append(f"newest checkpoint: {chain['run'] + '/edit/checkpoint' if chain['run'] else 'the one given'}")
    return "\n".join([*lines, f"ledger: {summary['ledger']}"])
