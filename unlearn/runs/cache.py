"""A content-addressed store for measurements that later runs can reuse.

The key is a digest of everything the result depends on: tensor digest, tokenizer, probe and version, resolved
configuration, data digest, dtype, device class, library versions, seed. A metric's name alone is never a key, so one
checkpoint can never be given another's result. Entries hold numbers only, no record text and no record ids.

`UNLEARN_CACHE` names the folder (default `~/.cache/unlearn-audit`); an empty value switches the store off.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unlearn.runs.folder import digest

ENVIRONMENT = "UNLEARN_CACHE"
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "pandas", "tokenizers")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {name: found for name in LIBRARIES if (found := _version(name)) is not None}


@functools.cache
def _version(name: str) -> str | None:
    """Read once: it means parsing the package's metadata, and every cache key asks."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cache_root() -> Path | None:
    """The store's folder, or None when it is switched off."""
    named = os.environ.get(ENVIRONMENT)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "unlearn-audit"


def key_of(**parts: Any) -> str:
    """The key for a result that depends on `parts`, on the libraries and on the number of threads."""
    import torch

    parts = parts | {"libraries": library_versions(), "threads": torch.get_num_threads()}
    return digest(parts).removeprefix("sha256:")


def lookup(key: str, suffix: str) -> Path | None:
    """The stored file of that key, if there is one."""
    root = cache_root()
    path = root / key[:2] / (key + suffix) if root else None
    return path if path is not None and path.is_file() else None


def store(key: str, source: Path) -> Path:
    """Keep a copy of `source` under `key`; a hard link where the file system allows.

    A store that cannot be written to (full, read-only) only costs a later run its short cut, so it is not an error.
    """
    root = cache_root()
    if root is None:
        return source
    path = root / key[:2] / (key + source.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except OSError:
        return source
    return path


def keep(key: str, suffix: str, data: bytes) -> None:
    """Keep bytes under `key`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"result{suffix}"
        path.write_bytes(data)
        store(key, path)
