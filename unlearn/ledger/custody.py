"""Keeping a run in the ledger: what it says before the run begins, and the entries when it begins and ends.

A run belongs to the ledger of the store it lies in. `run.json` says so under `ledger`: where the ledger is (relative to
the run folder), which checkpoint it starts from, which requests it carries out and which earlier ones it asks again.
The order of writes makes a kill harmless at every point: the run folder, its opened entry, the run's stages, its
finished entry, and only then the run's own last word. A resumed run finds the entries it has already made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import IntegrityError, ResourceError, UsageError
from unlearn.disk import file_sha256
from unlearn.ledger import history
from unlearn.ledger.batch import Batch
from unlearn.ledger.chain import ENVIRONMENT, Entry, Ledger, Session, closing, mac
from unlearn.ledger.history import Advance, Earlier, Head, in_use
from unlearn.ledger.identity import Key
from unlearn.runs.folder import RunFolder, digest, read_header
from unlearn.runs.job import Job
from unlearn.runs.pseudonyms import load_key

if TYPE_CHECKING:
    from unlearn.checkpoints.checkpoint import Checkpoint


def ledger_for(
    named: str | Path | None, out: str | Path | None, checkpoint: str, *, entered: bool = True
) -> Ledger | None:
    """The ledger that a forget run is entered in.

    The one that is named; else that of `UNLEARN_LEDGER` (empty: none is kept); else that of the store which the
    checkpoint was written in by an earlier run; else the folder that the run folder is made in.

    Args:
        named: the store, if the caller names one.
        out: the run folder, if the caller names one; otherwise it is made in the store.
        checkpoint: of the request.
        entered: False for what is only planned: then the run folder may lie anywhere.

    Raises:
        UsageError: if the run folder would lie outside the store: then the ledger could not say where it is.
    """
    chosen = named if named is not None else os.environ.get(ENVIRONMENT)
    if chosen is not None and not str(chosen):
        return None
    folder = Path(chosen) if chosen is not None else _store_of(checkpoint)
    if folder is None:
        folder = Path(out).parent if out is not None else Path("runs")
    if entered and out is not None and not Path(out).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"expected --out inside the run store {folder}, whose ledger is kept, found it elsewhere; choose a folder "
            "in the store, or another --ledger"
        )
    return Ledger(folder)


def _store_of(checkpoint: str) -> Path | None:
    """The store of the run that wrote a checkpoint, where it lies in a run folder with a ledger."""
    run = _run_of(checkpoint)
    try:
        folder = None if run is None else (run / str(read_header(run)["ledger"]["folder"])).resolve()
    except (UsageError, KeyError):
        return None
    return folder if folder is not None and Ledger(folder).exists() else None


def _run_of(checkpoint: str) -> Path | None:
    path = Path(checkpoint).resolve()
    return path.parent.parent if (path.name, path.parent.name) == ("checkpoint", "edit") else None


# -- before a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ledger says of requests before a run begins.

    Attributes:
        ledger: see `Ledger`.
        job: what is to be run: in a chain, on its newest checkpoint.
        keys: the requests.
        parent: tensor digest of the checkpoint the run starts from.
        root: of the checkpoint the request names; another one only in a chain.
        place: HMAC of where that one lies.
        chain: whether the run is a link of a chain.
        seen: how many entries the ledger had.
        earlier: what was forgotten on the way to it.
        carried_out: the entry of the run that carried these requests out already.
        unfinished: the run folder that began to and can be resumed.
    """

    ledger: Ledger
    job: Job
    keys: tuple[Key, ...]
    parent: str
    root: str
    place: str
    chain: bool
    seen: int
    earlier: list[Earlier]
    carried_out: Entry | None
    unfinished: Path | None

    def header(self, run: Path) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "folder": os.path.relpath(self.ledger.folder.resolve(), run.resolve()),
            "parent": self.parent,
            "root": self.root,
            "place": self.place,
            "chain": self.chain,
            "requests": [key.as_dict() for key in self.keys],
            "earlier": [one.as_dict() for one in self.earlier],
        }


def plan(
    ledger: Ledger, batch: Batch, *, chain: bool = False, advance: Advance = "inconclusive", complete: bool = False
) -> Plan:
    """Look requests up before they are run.

    Args:
        ledger: of the run store.
        batch: the requests and their job.
        chain: start from the newest checkpoint that descends from the one the request names.
        advance: see `history.head`.
        complete: refuse a run that cannot ask for everything forgotten earlier.

    Raises:
        IntegrityError: the ledger was altered; a checkpoint is no longer the one the ledger knows; or, with `complete`,
            earlier records are gone.
        UsageError: there is no checkpoint, the newest one of the chain is gone, or some requests of a batch were
            carried out already and others not.
    """
    job, entries, key = batch.job, ledger.entries(), load_key()
    root = _open(job, job.checkpoint).tensor_digest()
    place = mac(key, ("place:" + str(Path(job.checkpoint).resolve())).encode())
    _still_the_same(ledger, entries, job, place, root)
    parent, way = root, None
    if chain:
        if job.expected.get("checkpoint", root) != root:
            raise IntegrityError(
                "expected the checkpoint with the tensor digest in the request, found another; was it changed?"
            )
        newest = history.head(entries, root, advance)
        parent, way = newest.digest, {root} | {entry.data["checkpoint"] for entry in _way(entries, newest)}
        if newest.entry is not None:
            job = _on(job, ledger, newest)
    found = history.earlier(ledger, parent)
    gone = [one for one in found if one.missing]
    if complete and gone:
        raise IntegrityError(
            f"expected every record forgotten earlier, found {sum(one.records for one in gone)} gone (entries "
            f"{', '.join(str(one.n) for one in gone)}); restore their run folders, or run without --complete-history"
        )
    carried_out = _carried_out(entries, batch.keys, parent, way, advance)
    unfinished = None if carried_out else _unfinished(ledger, entries, batch.keys, parent)
    return Plan(ledger, job, batch.keys, parent, root, place, chain, len(entries), found, carried_out, unfinished)


def _open(job: Job, where: str) -> Checkpoint:
    from unlearn.checkpoints.checkpoint import open_checkpoint

    options = job.options
    return open_checkpoint(
        where.removeprefix("hub:"),
        online=options.online,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )


def _still_the_same(ledger: Ledger, entries: Sequence[Entry], job: Job, place: str, tensor_digest: str) -> None:
    """Refuse a checkpoint with other weights than the ledger last saw there, unless the request states its digest."""
    run = _run_of(job.checkpoint)
    if run is not None and run.is_relative_to(ledger.folder.resolve()):
        name = run.relative_to(ledger.folder.resolve()).as_posix()
        known = [entry for entry in history.finished(entries) if entry.data["run"] == name]
        if known and known[-1].data["checkpoint"] != tensor_digest:
            raise IntegrityError(
                f"expected the checkpoint that entry {known[-1].n} of the ledger wrote, found other weights in its "
                "place; was it changed?"
            )
        return
    seen = [entry for entry in entries if entry.event == "opened" and entry.data["place"] == place]
    if seen and seen[-1].data["root"] != tensor_digest and job.expected.get("checkpoint") != tensor_digest:
        raise IntegrityError(
            f"expected the checkpoint that entry {seen[-1].n} of the ledger started from, found other weights in its "
            "place; was it changed? If it was meant to, state its tensor_digest in the request"
        )


def _way(entries: Sequence[Entry], newest: Head) -> list[Entry]:
    return history.lineage(entries, newest.digest) if newest.entry is not None else []


def _on(job: Job, ledger: Ledger, newest: Head) -> Job:
    """The job on the newest checkpoint of its chain."""
    assert newest.entry is not None
    folder = ledger.folder / newest.entry.data["run"] / "edit" / "checkpoint"
    if not folder.is_dir():
        raise UsageError(
            f"expected the newest checkpoint of the chain, written by entry {newest.entry.n}, found none in the store; "
            "put it back"
        )
    if _open(job, str(folder)).tensor_digest() != newest.digest:
        raise IntegrityError(
            f"expected the checkpoint that entry {newest.entry.n} of the ledger wrote, found other weights in its "
            "place; was it changed?"
        )
    return replace(job, checkpoint=str(folder.resolve()), expected=job.expected | {"checkpoint": newest.digest})


def _carried_out(
    entries: Sequence[Entry], keys: Sequence[Key], parent: str, way: set[str] | None, advance: Advance
) -> Entry | None:
    """The newest run that carried the requests out: on the way to this checkpoint, or on this checkpoint.

    In a chain, one that let the chain advance counts only where it is part of it: the result of a run beside the chain
    is not in its newest checkpoint. One that did not is not repeated each time the chain grows.
    """
    on_the_way = {entry.n for entry in history.lineage(entries, parent)}
    wanted = {key.same for key in keys}
    done: dict[tuple[str, str], Entry] = {}
    for entry in history.finished(entries):
        beside = entry.data["parent"] == parent if way is None else entry.data["parent"] in way
        if way is not None and entry.data["verdict"] in history.ADVANCING[advance]:
            beside = False
        if entry.n in on_the_way or beside:
            done |= dict.fromkeys(_requests(entry), entry)
    if not wanted & done.keys():
        return None
    if wanted - done.keys():
        carried = [str(i) for i, key in enumerate(keys, start=1) if key.same in done]
        raise UsageError(
            f"expected requests that were not carried out yet, found that request {', '.join(carried)} of them was; "
            "leave it out"
        )
    return max((done[key.same] for key in keys), key=lambda entry: entry.n)


def _unfinished(ledger: Ledger, entries: Sequence[Entry], keys: Sequence[Key], parent: str) -> Path | None:
    """The newest run folder that began with the requests on this checkpoint and was not done."""
    wanted = {key.same for key in keys}
    for entry in reversed(entries):
        if entry.event != "opened" or entry.data["parent"] != parent:
            continue
        if _requests(entry) != wanted:
            continue
        folder: Path = ledger.folder / entry.data["run"]
        try:
            if read_header(folder)["status"] != "done":
                return folder
        except UsageError:
            continue
    return None


# -- entries of a run -------------------------------------------------------------------------------------------------


class Custody:
    """The entries of one run. Make it with `Custody.of`."""

    def __init__(self, run: RunFolder, header: dict[str, Any]) -> None:
        self.run, self.header = run, header
        self.ledger = Ledger((run.path / header["folder"]).resolve())
        self.name = run.path.resolve().relative_to(self.ledger.folder).as_posix()

    @classmethod
    def of(cls, run: RunFolder) -> Custody | None:
        """The custody of a run that belongs to a ledger, else None.

        Raises:
            IntegrityError: if the run was entered in a ledger that is not there any more.
        """
        header = run.header.get("ledger")
        if header is None:
            return None
        custody = cls(run, header)
        if run.last_event("ledger.opened") is not None and not custody.ledger.exists():
            raise IntegrityError("expected the ledger that this run was entered in, found none; restore it from a copy")
        return custody

    def opened(self, seen: int | None = None, *, alone: bool = False) -> Entry:
        """Enter that the run begins, unless it is entered already.

        Args:
            seen: how many entries the ledger had when the run was planned; None for a run that is resumed.
            alone: refuse where another process is at the same requests, or carried them out since.

        Raises:
            ResourceError: another process is at the same requests or at the same link of a chain, or was quicker.
        """
        with self.ledger.locked() as session:
            if alone and seen is not None:
                self._alone(session, seen)
            if self.header["chain"]:
                self._newest(session, seen)
            entry = self._open_entry(session)
            if entry is None:
                data = {
                    "run": self.name,
                    "parent": self.header["parent"],
                    "root": self.header["root"],
                    "place": self.header["place"],
                    "chain": self.header["chain"],
                    "requests": self.header["requests"],
                    "earlier": [one["n"] for one in self.header["earlier"]],
                }
                entry = session.append(("opened", data))[-1]
        self._note(entry)
        return entry

    def finished(self) -> Entry:
        """Enter what came of the run, unless it is entered already.

        Raises:
            IntegrityError: if the checkpoint that was edited is not the one the ledger was asked about.
        """
        with self.ledger.locked() as session:
            entry = self._entered(session)
            if entry is None:
                begun = self._open_entry(session)
                if begun is None:
                    raise IntegrityError(
                        "expected the entry that opened this run in the ledger, found none; restore the ledger from a "
                        "copy, then resume the run"
                    )
                entry = session.append(("finished", {"opened": begun.n} | self._outcome()))[-1]
        self._note(entry)
        return entry

    def failed(self, error: BaseException, exit_code: int, *, discarded: bool) -> None:
        """Enter that the run failed: the kind of error alone, since a message can hold a path."""
        with self.ledger.locked() as session:
            begun = self._open_entry(session)
            if begun is not None and self._entered(session) is None:
                data = {
                    "opened": begun.n,
                    "run": self.name,
                    "error": type(error).__name__,
                    "exit_code": exit_code,
                    "discarded": discarded,
                }
                session.append(("failed", data))

    def _note(self, entry: Entry) -> None:
        name = f"ledger.{entry.event}"
        if (self.run.last_event(name) or {}).get("n") != entry.n:
            self.run.event(name, n=entry.n, sha256=entry.sha256)

    def _open_entry(self, session: Session) -> Entry | None:
        """The entry that opened this run and was not closed."""
        closed = closing(session.entries)
        mine = (e for e in reversed(session.entries) if e.event == "opened" and e.data["run"] == self.name)
        return next((entry for entry in mine if entry.n not in closed or closed[entry.n].event == "finished"), None)

    def _entered(self, session: Session) -> Entry | None:
        mine = (e for e in reversed(session.entries) if e.event == "finished" and e.data["run"] == self.name)
        return next(mine, None)

    def _alone(self, session: Session, since: int) -> None:
        wanted = {(key["request"], key["content"]) for key in self.header["requests"]}
        closed = closing(session.entries)
        for entry in session.entries:
            if entry.event != "opened" or entry.data["parent"] != self.header["parent"]:
                continue
            if entry.data["run"] == self.name or not wanted & _requests(entry):
                continue
            end = closed.get(entry.n)
            if end is None and in_use(self.ledger.folder / entry.data["run"]):
                raise ResourceError(
                    f"expected a request that nothing else works on, found another process at it (entry {entry.n} of "
                    "the ledger); wait for it"
                )
            if end is not None and end.event == "finished" and end.n > since:
                raise ResourceError(
                    f"expected a request that was not carried out yet, found that another process just did (entry "
                    f"{end.n} of the ledger); run it again to see the outcome"
                )

    def _newest(self, session: Session, seen: int | None) -> None:
        """Refuse a link of a chain where another one is, or is being, put in its place: one would fall out of it."""
        mine = self._open_entry(session)
        since = mine.n if mine is not None else seen if seen is not None else 0
        closed = closing(session.entries)
        for entry in session.entries:
            if entry.data.get("parent") != self.header["parent"] or entry.data["run"] == self.name:
                continue
            if entry.event == "opened":
                if entry.data["chain"] and entry.n not in closed and in_use(self.ledger.folder / entry.data["run"]):
                    raise ResourceError(
                        f"expected a chain that nothing else adds to, found another process at it (entry {entry.n} of "
                        "the ledger); wait for it"
                    )
                continue
            moved = entry.data["checkpoint"] != entry.data["parent"] and entry.data["verdict"] != history.NOT_MET
            if moved and entry.n > since:
                raise ResourceError(
                    f"expected the newest checkpoint of the chain, found that entry {entry.n} of the ledger moved it "
                    "on; run the request again"
                )

    def _outcome(self) -> dict[str, Any]:
        """What the ledger keeps of a finished run: digests, pseudonyms, verdicts."""
        run, key = self.run, load_key()
        judged, delta = run.read_json("compare/criteria.json"), run.read_json("edit/delta.json")
        parent = run.read_json("inputs/checkpoint.json")["tensor_digest"]
        if parent != self.header["parent"]:
            raise IntegrityError("expected the checkpoint that the run was opened on, found another; was it changed?")
        method, sets = run.read_json("edit/plan.json")["method"], run.read_json("inputs/sets.json")
        subjects = run.file("private/subjects.jsonl").read_text().splitlines()
        return {
            "run": self.name,
            "verdict": judged["verdict"],
            "claim_level": judged["claim_level"],
            "parent": parent,
            "checkpoint": delta["tensor_digest"],
            "edit": "sha256:" + file_sha256(run.file("edit/delta.json")),
            "adapter": _adapter(run.file("private/adapter")),
            "method": method["name"],
            "inference_time": method["inference_time"],
            "parameters": digest(method["parameters"]),
            "criteria": (run.last_event("criteria.sealed") or {}).get("digest"),
            "requests": self._verdicts(judged["verdict"]),
            "records": sets["records"]["n"],
            "records_file": mac(key, run.file("private/records.jsonl").read_bytes()),
            "pseudonyms": [json.loads(line)["pseudonym"] for line in subjects],
            "earlier": self._asked_again(),
            "events": last_line(run.file("events.jsonl")),
        }

    def _verdicts(self, whole: str) -> list[dict[str, Any]]:
        """The requests with their verdicts: each one's own where the run judged them apart."""
        path = self.run.file("compare/requests.json")
        apart = self.run.read_json("compare/requests.json") if path.is_file() else None
        return [
            request | {"verdict": apart[i]["verdict"] if apart else whole}
            for i, request in enumerate(self.header["requests"])
        ]

    def _asked_again(self) -> list[dict[str, Any]]:
        path = self.run.file("compare/earlier.json")
        judged = (
            {row["n"]: row for row in self.run.read_json("compare/earlier.json")["requests"]} if path.is_file() else {}
        )
        rows = []
        for one in self.header["earlier"]:
            row = judged.get(one["n"])
            rows.append(
                {
                    "n": one["n"],
                    "records": one["records"],
                    "status": row["status"] if row else "not audited",
                    "emitted_again": row["emitted_again"] if row else None,
                }
            )
        return rows


def _adapter(folder: Path) -> str | None:
    """Digest over the adapter that an editor left, where it made one."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return digest([[file.relative_to(folder).as_posix(), file_sha256(file)] for file in files]) if files else None


def last_line(path: Path) -> str:
    """sha256 of the last line of an event log: it stands for every line before it."""
    raw = path.read_bytes()
    return hashlib.sha256(raw[raw.rstrip(b"\n").rfind(b"\n") + 1 :]).hexdigest()


def abandon(ledger: Ledger, keys: Sequence[Key], parent: str, *, chain: bool) -> None:
    """Close entries of these requests whose run folder is gone, or that began on an outdated checkpoint of a chain.

    Args:
        ledger: see `Ledger`.
        keys: the requests.
        parent: tensor digest of the checkpoint they are to start from now.
        chain: whether they belong to a chain.
    """
    wanted = {key.same for key in keys}
    with ledger.locked() as session:
        closed = closing(session.entries)
        for entry in [entry for entry in session.entries if entry.event == "opened" and entry.n not in closed]:
            if not wanted & _requests(entry):
                continue
            folder = ledger.folder / entry.data["run"]
            gone = not (folder / "run.json").is_file()
            if gone or (chain and entry.data["parent"] != parent and not in_use(folder)):
                reason = "the run folder is gone" if gone else "the chain has a newer checkpoint"
                session.append(("abandoned", {"opened": entry.n, "run": entry.data["run"], "reason": reason}))


def _requests(entry: Entry) -> set[tuple[str, str]]:
    return {(key["request"], key["content"]) for key in entry.data["requests"]}
