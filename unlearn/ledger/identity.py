"""When two requests are the same request: by what they ask for, not by the name or place of their files.

A request is known by three values: the HMAC of everything it asks for beside the records (criteria, suite, method,
control and retain data by content, subject, dates), the HMAC of the records, and the tensor digest of the checkpoint
it starts from. What only says how the request was answered afterwards (`answered_time`, `due_time`, `governance`) does
not enter, nor do device, dtype and seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unlearn.disk import file_sha256
from unlearn.ledger.chain import mac
from unlearn.records.files import as_row, read_records
from unlearn.records.raw import RawRecord
from unlearn.runs.folder import canonical
from unlearn.runs.job import Job

AFTERWARDS = ("answered_time", "due_time", "governance")


@dataclass(frozen=True, slots=True)
class Key:
    """What a request asks for, and how many records it names.

    Attributes:
        request: HMAC of everything but the records.
        content: HMAC of the records.
        records: how many they are.
        subject_request_id: the UUID the request carries, if it carries one.
    """

    request: str
    content: str
    records: int
    subject_request_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)

    @property
    def same(self) -> tuple[str, str]:
        """Equal for the same request about the same records."""
        return self.request, self.content


def key_of(job: Job, raw: Sequence[RawRecord], key: bytes) -> Key:
    """The identity of the one request that a job was made of.

    Args:
        job: as `unlearn.api.request_job` makes it.
        raw: its records.
        key: the pseudonym key.
    """
    request: dict[str, Any] = {k: v for k, v in (job.request or {}).items() if k not in AFTERWARDS}
    for which in ("checkpoint", "reference"):  # the checkpoint is known by its digest, a copy elsewhere is the same
        if which in request:
            request[which] = {k: v for k, v in request[which].items() if k != "path"}
    dumped = job.dump()
    asked = {
        "request": request,
        "criteria": dumped["criteria"],
        "suite": job.suite,
        "method": job.method,
        "duplicates": job.duplicates,
        "reference": job.reference,
        "sets": {
            role: {**source, "location": _content(source["location"])}
            for role, source in dumped["sources"].items()
            if role != "records"
        },
        "inputs": {what: {**source, "location": _content(source["location"])} for what, source in job.inputs.items()},
        "text_prompt_tokens": job.sources["records"].text_prompt_tokens,
    }
    name = (job.request or {}).get("subject_request_id")
    return Key(mac(key, canonical(asked).encode()), content_of(raw, key), len(raw), name)


def content_of(raw: Sequence[RawRecord], key: bytes) -> str:
    """HMAC of records: every field of each, an image by the digest of its bytes."""
    rows = []
    for record in raw:
        row = as_row(record)
        if isinstance(record.image, bytes):
            row["image"] = hashlib.sha256(record.image).hexdigest()
        elif record.image is not None:
            row["image"] = _content(record.image)
        rows.append(row)
    return mac(key, canonical(rows).encode())


def records_of(job: Job) -> list[RawRecord]:
    """The records a job names, read from their file."""
    source = job.sources["records"]
    return read_records(source.location.removeprefix("hub:"), fmt=source.format(), online=job.options.online)


def _content(location: str) -> str:
    """A file by its digest, a folder by those of its files, a hub id as it is."""
    path = Path(location)
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return canonical([[file.relative_to(path).as_posix(), file_sha256(file)] for file in files])
    return location
