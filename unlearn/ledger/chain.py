"""The ledger file: `ledger.jsonl` in a run store, one JSON object a line, append-only.

Every line carries its number, the time and the sha256 of the line before it, so that a changed, removed or reordered
line is found by its number. Lines are appended under an exclusive lock and flushed to disk before anything relies on
them. A process killed in the middle of an append can leave a last line without its end; the next writer completes it
where the whole entry is there, and otherwise moves those bytes into a file beside the ledger and says so in an entry.
Nothing else is ever rewritten: a line that does not fit refuses every use of the ledger.

A chain alone cannot show that lines were cut off its end. Each run notes the number and the digest of its entries in
its own event log, which `unlearn.ledger.checking` compares with the ledger.

The ledger holds no record text and no path outside the store: run folders relative to the store, digests, keyed
pseudonyms. Requests, record files and places are known by an HMAC under the pseudonym key (`unlearn.runs.pseudonyms`),
since a plain hash of a short record can be undone by trying; the first entry holds a check value of that key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from probes.errors import IntegrityError, UsageError
from unlearn.disk import disk_errors, write_atomic
from unlearn.runs.folder import GENESIS, jsonable, now
from unlearn.runs.pseudonyms import load_key

NAME = "ledger.jsonl"
ENVIRONMENT = "UNLEARN_LEDGER"
SCHEMA = "unlearn.ledger/v1"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger.

    Attributes:
        n: its number, from 1.
        time: when it was written, UTC.
        event: `created`, `opened`, `finished`, `failed`, `abandoned` or `repaired`.
        data: what it says.
        sha256: of the line's bytes, its end included.
    """

    n: int
    time: str
    event: str
    data: dict[str, Any]
    sha256: str


@dataclass(frozen=True, slots=True)
class Read:
    """A ledger as it stands: entries, bytes of complete lines, and what a killed writer left after them."""

    entries: list[Entry]
    complete: int
    torn: bytes


def parse(raw: bytes) -> Read:
    """Check every complete line.

    Raises:
        IntegrityError: naming the first line that does not fit.
    """
    complete = raw.rfind(b"\n") + 1
    entries: list[Entry] = []
    head = GENESIS
    for number, line in enumerate(raw[:complete].split(b"\n")[:-1], start=1):
        entry = _entry(line + b"\n", number, head)
        if entry is None or (number == 1) != (entry.event == "created"):
            raise IntegrityError(
                f"expected an unbroken ledger, found line {number} of {NAME} altered; restore the file from a copy"
            )
        head = entry.sha256
        entries.append(entry)
    if entries and entries[0].data.get("schema") != SCHEMA:
        raise UsageError(f"expected a ledger with schema {SCHEMA}, found another; use the version that wrote it")
    return Read(entries, complete, raw[complete:])


def _entry(line: bytes, number: int, head: str) -> Entry | None:
    """The entry of a line, or None where it is not the one that follows `head`."""
    try:
        value = json.loads(line)
        n, time, event, data = value["n"], value["time"], value["event"], value["data"]
        sound = (
            type(n) is int
            and n == number
            and value["prev_sha256"] == head
            and isinstance(time, str)
            and isinstance(event, str)
            and isinstance(data, dict)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Entry(n, time, event, data, hashlib.sha256(line).hexdigest()) if sound else None


class Session:
    """The ledger while this process alone may write to it."""

    def __init__(self, folder: Path, handle: IO[bytes], read: Read) -> None:
        self.entries = read.entries
        self._folder, self._handle = folder, handle
        self._mend(read)

    def _mend(self, read: Read) -> None:
        """Deal with what a killed writer left after the last complete line."""
        if not read.torn:
            return
        head = self.entries[-1].sha256 if self.entries else GENESIS
        whole = _entry(read.torn + b"\n", len(self.entries) + 1, head)
        if whole is not None and (whole.n == 1) == (whole.event == "created"):
            self._write(b"\n")  # all of it was there but the end of the line
            self.entries.append(whole)
            return
        digest = hashlib.sha256(read.torn).hexdigest()
        write_atomic(self._folder / f"ledger.torn-{digest[:16]}", read.torn)
        self._handle.truncate(read.complete)
        if self.entries:
            self.append(("repaired", {"bytes": len(read.torn), "sha256": digest}))

    def append(self, *events: tuple[str, dict[str, Any]]) -> list[Entry]:
        """Append entries and flush them to disk together.

        Returns:
            The entries as they stand in the ledger.

        Raises:
            UsageError: if the ledger was begun under another pseudonym key.
            ResourceError: if the disk is full or read-only.
        """
        key = load_key()
        if not self.entries:
            created = {"schema": SCHEMA, "id": os.urandom(8).hex(), "key": check_value(key)}
            events = (("created", created), *events)
        elif self.entries[0].data.get("key") != check_value(key):
            raise UsageError(
                "expected the pseudonym key that this ledger was begun with, found another; set UNLEARN_ID_KEY to its "
                "file"
            )
        lines, added = [], []
        head = self.entries[-1].sha256 if self.entries else GENESIS
        for n, (event, data) in enumerate(events, start=len(self.entries) + 1):
            value = {"n": n, "time": now(), "event": event, "data": jsonable(data), "prev_sha256": head}
            line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            head = hashlib.sha256(line).hexdigest()
            lines.append(line)
            added.append(Entry(n, value["time"], event, value["data"], head))
        self._write(b"".join(lines))
        self.entries += added
        return added

    def _write(self, data: bytes) -> None:
        with disk_errors():
            self._handle.write(data)
            self._handle.flush()
            os.fsync(self._handle.fileno())


class Ledger:
    """The ledger of a run store.

    Args:
        folder: the store: run folders and `ledger.jsonl`. It is made when the first entry is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r})"

    def exists(self) -> bool:
        """Whether anything was ever entered."""
        return self.path.is_file()

    def entries(self) -> list[Entry]:
        """Every entry, oldest first; none where there is no ledger yet. Nothing is changed on disk.

        Raises:
            IntegrityError: if a line was altered.
        """
        try:
            with self.path.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH)  # a writer finishes its line first
                return parse(handle.read()).entries
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def locked(self) -> Iterator[Session]:
        """Keep every other writer out, for a decision and the entries that follow from it.

        Raises:
            IntegrityError: if a line was altered; nothing is written.
            ResourceError: if the folder cannot be written to.
        """
        with disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = self.path.open("a+b")
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            yield Session(self.folder, handle, parse(handle.read()))


def check_value(key: bytes) -> str:
    """What tells one pseudonym key from another without giving it away."""
    return mac(key, b"unlearn ledger key")[-16:]


def mac(key: bytes, data: bytes) -> str:
    """`hmac-sha256:` and 64 digits: equal for equal content, and of no use without the key."""
    return "hmac-sha256:" + hmac.new(key, data, hashlib.sha256).hexdigest()


def closing(entries: Sequence[Entry]) -> dict[int, Entry]:
    """The entry that closed each opened one, by the opened one's number."""
    return {entry.data["opened"]: entry for entry in entries if entry.event in ("finished", "failed", "abandoned")}
