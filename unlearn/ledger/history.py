"""What a ledger says of a checkpoint: the requests that led to it, the newest one of a chain, the state of a request.

A finished entry is an edge from the checkpoint that was edited (`parent`) to the copy that was written (`checkpoint`),
both by tensor digest, so a checkpoint that was copied or renamed keeps its history. A checkpoint's history is every
edge on the way to it. A run whose edit changed no weight leads from a checkpoint to itself and belongs to it too,
unless its criteria were not met: then nothing was forgotten.

Limit: a checkpoint that something else made of one with a history (fine-tuning, quantising, `unlearn edit`) has a
digest the ledger does not know, and hence no history.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from probes.errors import IntegrityError, UsageError
from unlearn.ledger.chain import Entry, Ledger, closing, mac
from unlearn.records.files import read_records
from unlearn.records.raw import CONTENT, RawRecord
from unlearn.runs.pseudonyms import load_key

if TYPE_CHECKING:
    import pandas as pd

ROLE = "earlier"  # the record set of a run that holds what earlier requests forgot
NOT_MET = "criteria not met"
Advance = Literal["met", "inconclusive", "any"]
ADVANCING: dict[str, tuple[str, ...]] = {
    "met": ("criteria met",),
    "inconclusive": ("criteria met", "inconclusive"),
    "any": ("criteria met", "inconclusive", NOT_MET),
}


@dataclass(frozen=True, slots=True)
class Earlier:
    """A request that was carried out on the way to a checkpoint.

    Attributes:
        n: number of its finished entry.
        run: its run folder, relative to the store.
        folder: the run folder itself.
        requests: its keys (several where requests were batched), as the ledger has them.
        records: how many records it forgot, near-duplicates that it included among them.
        pseudonyms: of the records, in their order.
        verdict: of its run.
        checkpoint: tensor digest of the copy it left.
        file: the frozen records, or None where they are gone.
        missing: why they cannot be asked again, or "".
    """

    n: int
    run: str
    folder: Path
    requests: tuple[dict[str, Any], ...]
    records: int
    pseudonyms: tuple[str, ...]
    verdict: str
    checkpoint: str
    file: Path | None
    missing: str = ""

    def table(self, role: str = "records") -> pd.DataFrame | None:
        """What its own run measured after the edit, or None where the folder is gone."""
        import pandas as pd

        path = self.folder / "after" / f"{role}.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    def as_dict(self) -> dict[str, Any]:
        """For the run folder of the run that asks again."""
        return {
            "n": self.n,
            "run": self.run,
            "records": self.records,
            "verdict": self.verdict,
            "checkpoint": self.checkpoint,
            "missing": self.missing,
        }


def finished(entries: Iterable[Entry]) -> list[Entry]:
    """Entries of requests that were carried out, oldest first."""
    return [entry for entry in entries if entry.event == "finished"]


def lineage(entries: Sequence[Entry], digest: str) -> list[Entry]:
    """Every finished entry on the way to a checkpoint, oldest first; none for one the ledger does not know.

    Where two runs wrote the same tensors, the ways of both count: neither request may come back. What made a
    checkpoint only after a run had started from it is not on that run's way.
    """
    made: dict[str, list[Entry]] = {}
    for entry in finished(entries):
        idle = entry.data["parent"] == entry.data["checkpoint"]
        if not (idle and entry.data["verdict"] == NOT_MET):  # then nothing was forgotten
            made.setdefault(entry.data["checkpoint"], []).append(entry)
    found: dict[int, Entry] = {}
    until = {digest: len(entries) + 1}  # entries that count for a checkpoint: those before the run that started there
    waiting = [digest]
    while waiting:
        at = waiting.pop()
        for entry in made.get(at, ()):
            parent, began = entry.data["parent"], entry.data["opened"]
            if entry.n >= until[at]:
                continue
            found[entry.n] = entry
            if began > until.get(parent, 0):
                until[parent] = began
                waiting.append(parent)
    return [found[n] for n in sorted(found)]


def earlier(ledger: Ledger, tensor_digest: str) -> list[Earlier]:
    """What was forgotten on the way to a checkpoint, oldest first, each request once (its newest run counts).

    Args:
        ledger: of the run store.
        tensor_digest: of the checkpoint.

    Returns:
        One row a run; those whose records cannot be asked again say why in `missing`.

    Raises:
        IntegrityError: if the ledger was altered, or the frozen records of a run are not those it was entered with.
    """
    newest: dict[tuple[tuple[str, str], ...], Entry] = {}
    for entry in lineage(ledger.entries(), tensor_digest):
        newest[_same(entry)] = entry
    return [_earlier(ledger, entry) for entry in sorted(newest.values(), key=lambda entry: entry.n)]


def _same(entry: Entry) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key["request"], key["content"]) for key in entry.data["requests"]))


def _earlier(ledger: Ledger, entry: Entry) -> Earlier:
    data = entry.data
    folder = ledger.folder / data["run"]
    file = folder / "private" / "records.jsonl"
    found = Earlier(
        entry.n,
        data["run"],
        folder,
        tuple(data["requests"]),
        data["records"],
        tuple(data["pseudonyms"]),
        data["verdict"],
        data["checkpoint"],
        file,
    )
    if not folder.is_dir():
        return replace(found, file=None, missing="its run folder is gone from the store")
    if not file.is_file():
        return replace(found, file=None, missing="its private folder was purged")
    if mac(load_key(), file.read_bytes()) != data["records_file"]:
        raise IntegrityError(
            f"expected private/records.jsonl of the run in entry {entry.n} as the ledger has it, found another file; "
            "restore it from a copy"
        )
    return found


def earlier_records(found: Sequence[Earlier]) -> list[RawRecord]:
    """The records of earlier requests as one set, in order; an id is the entry's number, a slash, and the id it had.

    Raises:
        IntegrityError: if a file holds another number of records than the ledger says.
    """
    raw: list[RawRecord] = []
    for one in found:
        if one.file is None:
            continue
        records = read_records(one.file, role=ROLE)
        if len(records) != one.records:
            raise IntegrityError(
                f"expected {one.records} records in the run of entry {one.n}, found {len(records)}; restore the run"
            )
        raw += prefixed(records, str(one.n))
    return raw


def prefixed(records: Iterable[RawRecord], prefix: str) -> list[RawRecord]:
    """Records whose ids and groups can stand beside another set's."""
    return [
        replace(record, id=f"{prefix}/{record.id}", group=None if record.group is None else f"{prefix}/{record.group}")
        for record in records
    ]


def refuse_overlap(forgotten: Iterable[RawRecord], others: dict[str, list[RawRecord]]) -> None:
    """Refuse sets that hold what was forgotten earlier: retained data would teach it again, and it was seen before.

    Args:
        forgotten: records of earlier requests.
        others: the new run's other sets, by role.

    Raises:
        UsageError: naming each set and how many of its records were forgotten earlier.
    """
    known = {_content(record) for record in forgotten}
    counts = {role: sum(_content(record) in known for record in records) for role, records in others.items()}
    found = [f"{count} in {role}" for role, count in counts.items() if count]
    if found:
        raise UsageError(
            f"expected sets without records that were forgotten earlier, found {', '.join(found)}; take them out"
        )


def _content(record: RawRecord) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in CONTENT)


def text_prompt_tokens(found: Sequence[Earlier]) -> int:
    """How many tokens of a text record only conditioned in the newest earlier run whose job can be read."""
    for one in reversed(found):
        try:
            job = json.loads((one.folder / "private" / "job.json").read_text())
            return int(job["sources"]["records"]["text_prompt_tokens"])
        except (OSError, ValueError, KeyError):
            continue
    return 1


def limits(found: Iterable[dict[str, Any]]) -> list[str]:
    """Sentences for the report about earlier requests that could not be asked again (`Earlier.as_dict` rows)."""
    return [
        f"Entry {row['n']} of the ledger: {row['records']} records forgotten earlier could not be asked again: "
        f"{row['missing']}."
        for row in found
        if row["missing"]
    ]


# -- chains -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The newest checkpoint of a chain: `entry` wrote it; None while nothing was carried out on the root."""

    digest: str
    entry: Entry | None


def head(entries: Sequence[Entry], root: str, advance: Advance = "inconclusive") -> Head:
    """The checkpoint that the next request of a chain starts from.

    Among the results of `root` that can be reached over runs whose verdict lets a chain advance, the one that most
    requests lead to, and of equals the newest: a request that was carried out beside the chain does not cut it off.
    A copy that acts at inference time has no weights of its own, and no request starts from it.

    Args:
        entries: of the ledger.
        root: tensor digest of the checkpoint that the requests name.
        advance: the weakest verdict of a run whose copy the next request starts from.
    """
    edges: dict[str, list[Entry]] = {}
    for entry in finished(entries):
        accepted = entry.data["verdict"] in ADVANCING[advance] and entry.data["parent"] != entry.data["checkpoint"]
        if accepted and not entry.data.get("inference_time"):
            edges.setdefault(entry.data["parent"], []).append(entry)
    best = Head(root, None)
    most = (0, 0)
    waiting = [(root, {root})]
    while waiting:
        at, seen = waiting.pop()
        for entry in edges.get(at, ()):
            to = entry.data["checkpoint"]
            if to in seen:
                continue
            weight = (len({_same(edge) for edge in lineage(entries, to)}), entry.n)
            if weight > most:
                best, most = Head(to, entry), weight
            waiting.append((to, seen | {to}))
    return best


# -- states -----------------------------------------------------------------------------------------------------------

STATES = ("open", "running", "finished", "failed", "abandoned", "superseded", "resurfaced")


@dataclass(frozen=True, slots=True)
class State:
    """One request as the ledger has it.

    Attributes:
        n: number of the entry that opened it.
        run: its run folder, relative to the store.
        state: `open` (interrupted, can be resumed), `running`, `finished`, `failed`, `abandoned`, `superseded` (the
            same request was carried out again from the same checkpoint) or `resurfaced` (the newest run that asked
            for its records again found them).
        verdict: of a finished one.
        claim_level: likewise.
        key: the request, as `Key.as_dict`.
        parent: digest of the checkpoint it starts from.
        checkpoint: digest of the copy it left, once finished.
        closed: number of the entry that closed it.
        asked_again: number of the newest entry whose run asked for its records again.
        opened: when.
        gone: whether the run folder is no longer in the store.
    """

    n: int
    run: str
    state: str
    verdict: str | None
    claim_level: str | None
    key: dict[str, Any]
    parent: str
    checkpoint: str | None
    closed: int | None
    asked_again: int | None
    opened: str
    gone: bool


def states(ledger: Ledger) -> list[State]:
    """The state of every request that was opened, in the order they were; of a batch, each request's.

    Raises:
        IntegrityError: if the ledger was altered.
    """
    entries = ledger.entries()
    closed = closing(entries)
    again = _asked_again(entries)
    carried_out: dict[tuple[str, str, str], int] = {}
    for entry in finished(entries):
        for key in entry.data["requests"]:
            carried_out[key["request"], key["content"], entry.data["parent"]] = entry.data["opened"]
    rows = []
    for entry in entries:
        if entry.event != "opened":
            continue
        end, folder = closed.get(entry.n), ledger.folder / entry.data["run"]
        for i, key in enumerate(entry.data["requests"]):
            last = carried_out.get((key["request"], key["content"], entry.data["parent"]))
            verdict, asked = None, None
            if end is None:
                state = "running" if in_use(folder) else "open"
            else:
                state = end.event
            if end is not None and end.event == "finished":
                verdict = end.data["requests"][i]["verdict"]
                asked = again.get(end.n)
            if last is not None and last > entry.n and state != "running":
                state = "superseded"
            elif asked is not None and asked[1]:
                state = "resurfaced"
            rows.append(
                State(
                    entry.n,
                    entry.data["run"],
                    state,
                    verdict,
                    end.data["claim_level"] if verdict is not None and end is not None else None,
                    key,
                    entry.data["parent"],
                    end.data["checkpoint"] if verdict is not None and end is not None else None,
                    end.n if end is not None else None,
                    asked[0] if asked else None,
                    entry.time,
                    not folder.is_dir(),
                )
            )
    return rows


def _asked_again(entries: Sequence[Entry]) -> dict[int, tuple[int, bool]]:
    """Of each finished entry: the newest one that asked for its records again, and whether they had come back."""
    found: dict[int, tuple[int, bool]] = {}
    for entry in finished(entries):
        for row in entry.data["earlier"]:
            if row["status"] != "not audited":
                found[row["n"]] = (entry.n, row["status"] == "not met")
    return found


def in_use(folder: Path) -> bool:
    """Whether a living process works on a run folder."""
    try:
        with (folder / "private" / "lock").open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
