"""Files on disk: digests, atomic writes, and a full or read-only disk in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from probes.errors import ResourceError


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("expected free disk space, found none; free some and resume the run") from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ResourceError("expected a writable output folder, found none; choose another --out") from None
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename into place: a reader sees the old file or the new one."""
    with disk_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
