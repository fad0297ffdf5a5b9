"""Statistics of data in a file: a safetensors file whose one metadata key says, as canonical JSON, where they are from.

Equal statistics have equal bytes. A reader sees the whole file or none, and reads tensors one at a time, which is what
lets an edit stream through a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.errors import IntegrityError, ResourceError


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file holds.

    Attributes:
        key: its metadata key.
        name: in words with an article, for messages.
        several: the plural, without.
    """

    key: str
    name: str
    several: str

    def damaged(self, path: Path) -> IntegrityError:
        """The error for a file that is none of this kind."""
        return IntegrityError(f"{path}: expected {self.name}, found a damaged or other one; compute it again")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Write tensors as they are.

    Args:
        path: the file to write.
        tensors: by name; no two may share memory.
        metadata: JSON values: what they were computed from.
        kind: of the file.

    Returns:
        The metadata as a reader gets them.

    Raises:
        ResourceError: the disk is full or cannot be written to.
    """
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, partial, metadata={kind.key: text})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError):
        partial.unlink(missing_ok=True)
        raise ResourceError(
            f"{path}: cannot write {kind.several}; free some disk space or choose another place"
        ) from None
    read: dict[str, Any] = json.loads(text)
    return read


def open_tensors(path: Path, kind: Kind) -> tuple[dict[str, Any], frozenset[str]]:
    """Metadata and names of a file, without reading its tensors.

    Raises:
        IntegrityError: the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[kind.key]), frozenset(file.keys())
    except (SafetensorError, OSError, KeyError, ValueError):
        raise kind.damaged(path) from None


def read_tensor(path: Path, name: str, kind: Kind) -> Tensor:
    """One tensor.

    Raises:
        IntegrityError: the file is damaged or has no such tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError):
        raise kind.damaged(path) from None
