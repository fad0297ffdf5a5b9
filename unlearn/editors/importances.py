"""Importances in a file: a safetensors file of fp32 tensors keyed by the names of a checkpoint's tensors on disk.

What they were computed from stands in the file's one metadata key as canonical JSON, so equal importances have equal
bytes. Tensors are read one at a time, which is what lets an edit stream through a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.errors import IntegrityError, ResourceError

if TYPE_CHECKING:
    from probes.fisher import Importance

METADATA = "unlearn.importance"


@dataclass(frozen=True, slots=True)
class StoredImportance:
    """Importances in a safetensors file, keyed like a checkpoint's tensors and read one at a time."""

    path: Path
    metadata: dict[str, Any]
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        """One tensor, fp32.

        Raises:
            IntegrityError: if it holds anything but finite non-negative numbers.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError):
            raise _damaged(self.path) from None
        if not bool(((tensor >= 0) & (tensor < math.inf)).all()):
            raise IntegrityError(
                f"{self.path.name}: expected finite non-negative importances, found others in {name}; compute them "
                "again, in float32"
            )
        return tensor


def save_importance(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> StoredImportance:
    """Write importances as fp32; a reader sees the whole file or none.

    Args:
        path: the file to write.
        tensors: by name on disk.
        metadata: JSON values: what they were computed from.

    Raises:
        ResourceError: the disk is full or cannot be written to.
    """
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    stored = {name: tensor.to(device="cpu", dtype=torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, partial, metadata={METADATA: text})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError):
        partial.unlink(missing_ok=True)
        raise ResourceError(f"{path}: cannot write importances; free some disk space or choose another place") from None
    return StoredImportance(path, json.loads(text), frozenset(stored))


def load_importance(path: Path) -> StoredImportance:
    """Open an importance file without reading its tensors.

    Raises:
        IntegrityError: the file is damaged or is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA])
            return StoredImportance(path, metadata, frozenset(file.keys()))
    except (SafetensorError, OSError, KeyError, ValueError):
        raise _damaged(path) from None


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path}: expected an importance file, found a damaged or other one; compute it again")


def describe(measured: Importance) -> dict[str, Any]:
    """Everything about an importance but its tensors, as JSON values."""
    return {
        "estimator": measured.estimator,
        "labels": measured.labels,
        "n_examples": measured.n_examples,
        "n_batches": measured.n_batches,
        "n_tokens": measured.n_tokens,
        "batch_size": measured.batch_size,
        "draws": measured.draws,
        "seed": measured.seed,
    }
