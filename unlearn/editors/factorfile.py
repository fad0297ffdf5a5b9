"""Kronecker factors in a file: safetensors `<key>.a` and `<key>.g` for every linear map, and what they are factors of.

Maps that read the same input share A, and it is stored once: `maps` in the metadata says under which name. Metadata:

    schema           unlearn.factors/v1
    tensor_digest    of the checkpoint; factors are of no use to another one
    digest           of the records (`unlearn.records.tokens.data_digest`)
    labels, positions, seed, n_records, n_tokens, n_positions, passes     as in `probes.curvature.factors`
    versions         of the libraries
    maps             for each: key, a (name of its tensor), n, module, parameter, expert, orientation, block, role and
                     overlaps
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from probes.curvature.factors import Factor, KroneckerFactors
from probes.errors import IntegrityError, UsageError
from unlearn.editors.storedtensors import Kind, open_tensors, read_tensor, save_tensors
from unlearn.runs.cache import library_versions

KIND = Kind("unlearn.factors", "a factor file", "curvature factors")
SCHEMA = "unlearn.factors/v1"
_OF_ALL = ("labels", "positions", "n_records", "n_tokens", "n_positions", "seed", "passes")
_OF_ONE = ("key", "n", "module", "parameter", "expert", "orientation", "block", "role", "overlap_a", "overlap_g")


class StoredFactors:
    """Factors in a safetensors file, read one map at a time.

    Attributes:
        path: the file.
        metadata: see the module's docstring.
        keys: of the maps, in depth order.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self._rows = {row["key"]: row for row in metadata["maps"]}
        self.keys = tuple(self._rows)
        self._latest: tuple[str, Tensor] | None = None

    def factor(self, key: str) -> Factor:
        """The factors of one map; maps in a row that share A get the same object.

        Raises:
            UsageError: the file has no such map.
            IntegrityError: the file is damaged.
        """
        self.require([key])
        name = self._rows[key]["a"]
        if self._latest is None or self._latest[0] != name:
            self._latest = name, self._square(name)
        return self._factor(key, self._latest[1])

    def all(self) -> KroneckerFactors:
        """Every map at once, in memory."""
        shared = {name: self._square(name) for name in dict.fromkeys(row["a"] for row in self._rows.values())}
        factors = {key: self._factor(key, shared[row["a"]]) for key, row in self._rows.items()}
        return KroneckerFactors(factors=factors, **{part: self.metadata[part] for part in _OF_ALL})

    def positions(self, key: str) -> int:
        """How many positions the factors of a map are means over, without reading them."""
        n: int = self._rows[key]["n"]
        return n

    def describe(self) -> dict[str, Any]:
        """The metadata without the maps: what the factors were computed from."""
        return {name: value for name, value in self.metadata.items() if name != "maps"}

    def require(self, keys: Iterable[str]) -> None:
        """Check that the file has factors of these maps.

        Raises:
            UsageError: naming the first that is missing.
        """
        if missing := [key for key in keys if key not in self._rows]:
            raise UsageError(
                f"{self.path.name}: expected factors of {missing[0]}, found none; compute them for it too, or leave it "
                "out of the edit"
            )

    def require_checkpoint(self, tensor_digest: str) -> None:
        """Check whose factors these are.

        Args:
            tensor_digest: of the checkpoint to edit.

        Raises:
            IntegrityError: they are another checkpoint's.
        """
        if self.metadata["tensor_digest"] != tensor_digest:
            raise IntegrityError(
                f"{self.path.name}: expected factors of this checkpoint, found another's; compute them again"
            )

    def _factor(self, key: str, a: Tensor) -> Factor:
        row = self._rows[key]
        return Factor(a=a, g=self._square(f"{key}.g"), **{part: row[part] for part in _OF_ONE})

    def _square(self, name: str) -> Tensor:
        tensor = read_tensor(self.path, name, KIND)
        if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]:
            raise KIND.damaged(self.path)
        return tensor


def save_factors(path: Path, factors: KroneckerFactors, *, tensor_digest: str, digest: str) -> StoredFactors:
    """Write factors; a reader sees the whole file or none. Equal factors give equal bytes.

    Args:
        path: the file to write.
        factors: what to store, in their own type (fp32 at least).
        tensor_digest: of the checkpoint they are factors of.
        digest: of the records they were computed from.

    Raises:
        ResourceError: the disk is full or cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # A by identity
    maps = []
    for key, factor in factors.factors.items():
        name = names.setdefault(id(factor.a), f"{key}.a")
        tensors[name] = factor.a
        tensors[f"{key}.g"] = factor.g
        maps.append({"a": name} | {part: getattr(factor, part) for part in _OF_ONE})
    metadata = {
        "schema": SCHEMA,
        "tensor_digest": tensor_digest,
        "digest": digest,
        "versions": library_versions(),
        "maps": maps,
    } | {part: getattr(factors, part) for part in _OF_ALL}
    return StoredFactors(path, save_tensors(path, tensors, metadata, KIND))


def load_factors(path: Path) -> StoredFactors:
    """Open a factor file without reading its tensors.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is damaged or something else.
    """
    if not path.is_file():
        raise UsageError(f"{path.name}: expected a file of curvature factors, found none at this path; check it")
    metadata, names = open_tensors(path, KIND)
    try:
        rows = metadata["maps"]
        complete = metadata["schema"] == SCHEMA and metadata.keys() >= {*_OF_ALL, "tensor_digest", "digest"}
        complete = complete and all(row.keys() >= set(_OF_ONE) for row in rows)
        complete = complete and {name for row in rows for name in (row["a"], f"{row['key']}.g")} == names
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise KIND.damaged(path)
    return StoredFactors(path, metadata)
