"""The run folder: what one run leaves behind, written so that a killed run can go on and no edit goes unseen.

    run.json          status and environment; the only file, with events.jsonl, that holds times
    events.jsonl      append-only; every line carries the sha256 of the line before it
    private/          record text and generations, mode 0700, never quoted outside

A stage writes its files atomically and then appends one `stage.done` event with their digests. A resumed run skips a
stage whose event stands and whose files still have those digests; a file that changed since is refused. Stages are
pure functions of their inputs, so a resumed run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import IntegrityError, UsageError
from unlearn.disk import disk_errors, file_sha256, write_atomic

if TYPE_CHECKING:
    import pandas as pd

GENESIS = "0" * 64
HEARTBEAT_SECONDS = 5.0


def now() -> str:
    """The time in UTC, RFC 3339 with a Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinities as null, tuples as lists, paths as strings: strict JSON."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return jsonable(value.item())
    return str(value)


def canonical(value: Any) -> str:
    """One JSON text per value: sorted keys, no spaces, for digests."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """`sha256:` digest of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()


class RunFolder:
    """A run folder opened for writing. Create it with `create` or `resume`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self._head = GENESIS
        self._done: dict[str, dict[str, str]] = {}
        self._events: list[dict[str, Any]] = []
        self._outputs: dict[str, str] | None = None
        self._beat = 0.0
        self._lock: Any = None

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, header: dict[str, Any], inputs: list[Path]) -> RunFolder:
        """Make a new run folder.

        Raises:
            IntegrityError: if the folder lies inside an input.
            UsageError: if it exists and is not empty.
            ResourceError: if the disk is full or read-only.
        """
        from unlearn.checkpoints.writer import refuse_overlap

        for source in inputs:
            refuse_overlap(path, source)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(
                "expected a new or empty output folder, found files in it; choose another --out or --resume it"
            )
        with disk_errors():
            path.mkdir(parents=True, exist_ok=True)
            (path / "private").mkdir(mode=0o700, exist_ok=True)
        run = cls(path, {"schema": "unlearn.run/v1", "status": "started", "started": now(), "exit_code": None} | header)
        run._acquire()
        run._save_header()
        run.event("run.created", kind=header["kind"])
        return run

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """Open an interrupted run, check its event chain, and go on.

        Raises:
            UsageError: if this is no run folder, or the run is finished.
            IntegrityError: if the event chain was altered.
        """
        header = read_header(path)
        run = cls(path, header | {"status": "started", "exit_code": None})
        run._acquire()
        events = path / "events.jsonl"
        raw = events.read_bytes() if events.exists() else b""
        complete = raw[: raw.rfind(b"\n") + 1]
        if complete != raw:  # the line that was being written when the run was killed
            write_atomic(events, complete)
        for line, event in check_chain(complete):
            run._head = hashlib.sha256(line).hexdigest()
            run._remember(event)
        run._save_header()
        run.event("run.resumed")
        return run

    def _acquire(self) -> None:
        handle = (self.path / "private" / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("expected a run that nothing else works on, found it in use by another process") from None
        self._lock = handle

    # -- events ----------------------------------------------------------------------------------------------------

    def event(self, name: str, **data: Any) -> None:
        """Append one event to the chain and flush it to disk."""
        event = {"time": now(), "event": name, "data": jsonable(data), "prev_sha256": self._head}
        line = json.dumps(event, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        with disk_errors(), (self.path / "events.jsonl").open("ab") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())
        self._head = hashlib.sha256(line).hexdigest()
        self._remember(event)

    def _remember(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if event["event"] == "stage.done":
            self._done[event["data"]["stage"]] = event["data"]["outputs"]

    def last_event(self, name: str) -> dict[str, Any] | None:
        """Data of the newest event of that name."""
        return next((event["data"] for event in reversed(self._events) if event["event"] == name), None)

    def input_digest(self, what: str) -> str | None:
        """The digest of a further input, as it was noted when the run began."""
        read = [event["data"] for event in self._events if event["event"] == "input.read"]
        return next((data["sha256"] for data in read if data["what"] == what), None)

    # -- stages ----------------------------------------------------------------------------------------------------

    def done(self, stage: str) -> bool:
        """Whether a stage finished earlier and its files are as it left them.

        Raises:
            IntegrityError: if a file of a finished stage is missing or changed.
        """
        outputs = self._done.get(stage)
        if outputs is None:
            return False
        for name, expected in outputs.items():
            path = self.path / name
            if not path.is_file() or file_sha256(path) != expected:
                raise IntegrityError(
                    f"expected {name} as stage {stage} left it, found it missing or changed; start a new run"
                )
        return True

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage: files written inside belong to it, and it counts as done only when the block ends."""
        self._outputs = {}
        self.heartbeat(stage=name, force=True)
        yield
        outputs, self._outputs = self._outputs, None
        self.event("stage.done", stage=name, outputs=outputs)

    def claim(self, path: Path) -> None:
        """Count a file, or every file of a folder, as output of the current stage."""
        if self._outputs is None:
            raise RuntimeError("files are written inside a stage")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                self._outputs[file.relative_to(self.path).as_posix()] = file_sha256(file)

    # -- files -----------------------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """Path of a file in the run folder."""
        return self.path / name

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file of the current stage."""
        path = self.file(name)
        write_atomic(path, data)
        self.claim(path)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write strict, sorted, indented JSON."""
        return self.write_bytes(name, json_bytes(value))

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write one JSON object a line."""
        lines = [json.dumps(jsonable(row), ensure_ascii=False, sort_keys=True) for row in rows]
        return self.write_bytes(name, "".join(line + "\n" for line in lines).encode())

    def write_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a Parquet table; same frame, same bytes."""
        import io

        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return self.write_bytes(name, buffer.getvalue())

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run."""
        return json.loads(self.file(name).read_text())

    def read_table(self, name: str) -> pd.DataFrame:
        """Read a Parquet table of the run."""
        import pandas as pd

        return pd.read_parquet(self.file(name))

    # -- status ----------------------------------------------------------------------------------------------------

    def _save_header(self) -> None:
        self.header["heartbeat"] = now()
        write_atomic(self.path / "run.json", json_bytes(self.header))

    def heartbeat(self, stage: str | None = None, *, force: bool = False) -> None:
        """Say that the run is alive, at most every few seconds."""
        if stage is not None:
            self.header["stage"] = stage
        if force or time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            self._save_header()

    def finish(self, status: str, exit_code: int | None) -> None:
        """Record how the run ended: `done`, `failed` or `interrupted`."""
        self.header |= {"status": status, "exit_code": exit_code, "finished": now()}
        try:
            self._save_header()
            self.event(f"run.{status}", exit_code=exit_code)
        finally:  # the lock goes even where a full disk keeps the last words from being written
            self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove a run that came to nothing."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def clear_stage(self, name: str) -> None:
        """Remove what an interrupted stage may have left: its own folder and the private scratch folder."""
        for folder in (name, "private/work"):
            shutil.rmtree(self.file(folder), ignore_errors=True)


def json_bytes(value: Any) -> bytes:
    """Indented, sorted, strict JSON with a final newline."""
    return (json.dumps(jsonable(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_header(path: Path) -> dict[str, Any]:
    """`run.json` of a run folder.

    Raises:
        UsageError: if the folder is missing or holds no run.
    """
    try:
        header = json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        raise UsageError(
            "expected a run folder with a readable run.json, found none; give the folder of a run"
        ) from None
    if not isinstance(header, dict) or header.get("schema") != "unlearn.run/v1":
        raise UsageError(
            "expected run.json with schema unlearn.run/v1, found another; use the version that wrote the run"
        )
    return header


def check_chain(raw: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and events of an event log whose chain holds.

    Raises:
        IntegrityError: naming the first line that does not fit.
    """
    out: list[tuple[bytes, dict[str, Any]]] = []
    head = GENESIS
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        try:
            event = json.loads(line)
            sound = event["prev_sha256"] == head and isinstance(event["data"], dict) and isinstance(event["event"], str)
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise IntegrityError(f"expected an unbroken event chain, found line {number} of events.jsonl altered")
        head = hashlib.sha256(line).hexdigest()
        out.append((line, event))
    return out
