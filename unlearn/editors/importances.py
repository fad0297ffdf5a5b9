"""Importances in a file: one fp32 tensor for each of a checkpoint's tensors on disk, under the same name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.errors import IntegrityError
from unlearn.editors.storedtensors import Kind, open_tensors, read_tensor, save_tensors

if TYPE_CHECKING:
    from probes.fisher import Importance

KIND = Kind("unlearn.importance", "an importance file", "importances")


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
        tensor = read_tensor(self.path, name, KIND)
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
    stored = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    return StoredImportance(path, save_tensors(path, stored, metadata, KIND), frozenset(stored))


def load_importance(path: Path) -> StoredImportance:
    """Open an importance file without reading its tensors.

    Raises:
        IntegrityError: the file is damaged or is something else.
    """
    return StoredImportance(path, *open_tensors(path, KIND))


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
