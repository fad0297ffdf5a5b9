"""Keyed pseudonyms for record ids: outside `private/` a record is known by an HMAC that only the key holder can redo.

A plain hash of a short id could be undone by trying all ids. The key lies outside every run folder, so a run can be
handed on without it: `UNLEARN_ID_KEY` names the file, by default `~/.config/unlearn-audit/id.key`, made on first use.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from probes.errors import ResourceError, UsageError

ENVIRONMENT = "UNLEARN_ID_KEY"


def key_path() -> Path:
    """Where the key lies."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "unlearn-audit" / "id.key"


def load_key() -> bytes:
    """Read the key, or make one for this user (mode 0600).

    Raises:
        UsageError: if the key file is too short to be a key.
        ResourceError: if it can be neither read nor made.
    """
    path = key_path()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as handle:
                handle.write(secrets.token_hex(32) + "\n")
        key = path.read_bytes().strip()
    except FileExistsError:  # another process made it between the two lines
        key = path.read_bytes().strip()
    except OSError:
        raise ResourceError(f"expected a readable pseudonym key, found none; set {ENVIRONMENT} to a key file") from None
    if len(key) < 16:
        raise UsageError(
            f"expected a pseudonym key of at least 16 bytes, found {len(key)}; set {ENVIRONMENT} to another file"
        )
    return key


def pseudonym(record_id: str, key: bytes) -> str:
    """`r-` and 64 bits of HMAC-SHA256 of the id."""
    return "r-" + hmac.new(key, record_id.encode(), hashlib.sha256).hexdigest()[:16]
