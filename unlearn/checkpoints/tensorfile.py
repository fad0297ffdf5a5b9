"""The safetensors container as bytes: header rules and content digests, without a tensor library.

A file is an 8-byte little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the raw
little-endian elements of every tensor, in offset order and without a gap. The whole header is checked before a byte
of data is used, so that a truncated or damaged file ends in one clear line. Writing a changed tensor never needs a
new header: dtype and shape stay, hence every offset stays, and a file in which nothing changed comes out unchanged.

The content of a tensor is identified by one line, name, dtype, shape and digest of its raw bytes:

    model.norm.weight|F32|[576]|3f0c...64 hex digits

and a checkpoint by `tensor_digest`: sha256 over those lines, sorted as UTF-8 bytes, each ended by a newline. Neither
the sharding nor the file names enter, so re-sharding a model does not change its identity and one flipped bit does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np

from probes.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes read at once: small enough that hashing and checking find them still in the CPU's cache
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation

Buffer = bytes | bytearray | memoryview
_Writable = TypeVar("_Writable", bytearray, memoryview)

# Bytes per element. The order is the reference implementation's own ranking, by which it lays tensors out.
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8}
_TORCH = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}
_TORCH |= {"I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32"}
_TORCH |= {"F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64"}
_RANKS = {dtype: rank for rank, dtype in enumerate(_SIZES)}
# A float is infinite or not a number if and only if its exponent bits are all ones.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F80_0000),
    "C64": (np.uint32, 0x7F80_0000),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are absolute byte positions."""

    name: str
    dtype: str  # the container's own spelling: F32, BF16, I64, ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the raw elements in bytes."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def line(self, sha256: str) -> str:
        """The line that identifies this tensor's content (see the module's docstring)."""
        return f"{self.name}|{self.dtype}|[{','.join(map(str, self.shape))}]|{sha256}"


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file with a valid header; `tensors` are in the order of their bytes."""

    path: Path
    header: bytes  # length prefix and JSON, as they stand in the file
    tensors: tuple[TensorInfo, ...]

    @classmethod
    def read(cls, path: Path) -> TensorFile:
        """Read and check the header of `path`.

        Raises:
            UsageError: the file is truncated, damaged or not safetensors at all.
            UnsupportedError: a tensor has a type that plain floating-point weights do not have (4-bit and the like).
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                    raise _damaged(path, f"its first bytes announce a header that {size} bytes cannot hold")
                header = file.read(length)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
        if not header.startswith(b"{"):
            raise _damaged(path, "the header is not a JSON object")
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
            tensors = sorted(_entries(path, entries, 8 + length), key=lambda info: (info.start, info.end))
        except (ValueError, RecursionError):
            raise _damaged(path, "the header is not valid") from None
        position = 8 + length
        for info in tensors:
            if info.start != position:
                raise _damaged(path, "the tensors overlap or leave a gap")
            position = info.end
        if position != size:
            raise _damaged(path, f"the header describes {position} bytes and the file has {size}")
        return cls(path, prefix + header, tuple(tensors))

    def load(self, info: TensorInfo) -> bytearray:
        """The raw bytes of one tensor, in a private buffer."""
        with self.path.open("rb") as file:
            file.seek(info.start)
            return _fill(file, bytearray(info.nbytes), self.path)

    def digest(self) -> tuple[str, list[str]]:
        """sha256 of the file and the content line of every tensor, in one read and one chunk of memory.

        Raises:
            UsageError: a tensor holds an infinite value or one that is not a number.
        """
        whole, lines, chunk = hashlib.sha256(self.header), [], memoryview(bytearray(CHUNK))
        with self.path.open("rb") as file:
            file.seek(len(self.header))
            for info in self.tensors:
                own = hashlib.sha256()
                for left in range(info.nbytes, 0, -CHUNK):
                    data = _fill(file, chunk[: min(CHUNK, left)], self.path)
                    whole.update(data)
                    own.update(data)
                    if not finite(info.dtype, data):
                        raise UsageError(
                            f"{self.path}: expected finite weights, found NaN or infinity in {info.name}; "
                            "this checkpoint cannot be measured, use one from before training diverged"
                        )
                lines.append(info.line(own.hexdigest()))
        return whole.hexdigest(), lines


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[TensorInfo]]:
    """Header and layout of a new file holding `(name, dtype, shape)`, wide types first, then by name.

    The order, the padding to 8 bytes and the single metadata key (more than one is written in random order by the
    reference implementation) give the same bytes as `safetensors.torch.save_file(..., {"format": "pt"})`.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_RANKS[tensor[1]], tensor[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * _SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = [
        TensorInfo(name, dtype, shape, *(len(header) + offset for offset in entries[name]["data_offsets"]))
        for name, dtype, shape in ordered
    ]
    return header, infos


def tensor_digest(lines: Iterable[str]) -> str:
    """The digest of a checkpoint from the content lines of all its tensors (any order)."""
    encoded = sorted(line.encode("utf-8") for line in lines)
    return "sha256:" + hashlib.sha256(b"".join(line + b"\n" for line in encoded)).hexdigest()


def finite(dtype: str, data: Buffer) -> bool:
    """Whether raw elements of type `dtype` hold neither infinity nor NaN; always true of integers."""
    if dtype not in _EXPONENTS:
        return True
    word, ones = _EXPONENTS[dtype]
    words, mask, step = np.frombuffer(data, word), word(ones), CHUNK // 8
    pieces = (words[start : start + step] for start in range(0, len(words), step))
    return not any(bool(((piece & mask) == mask).any()) for piece in pieces)


def as_tensor(info: TensorInfo, data: bytearray) -> torch.Tensor:
    """A tensor on top of raw bytes, without a copy."""
    import torch

    dtype = getattr(torch, _TORCH[info.dtype])
    if not info.elements:  # torch refuses an empty buffer
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian elements of a tensor; without a copy where it is contiguous and on the CPU."""
    import torch

    elements = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(elements)  # type: ignore[arg-type]  # an ndarray has the buffer protocol; 3.11's stubs cannot say it


def dtype_name(dtype: torch.dtype) -> str:
    """The container's spelling of a torch type.

    Raises:
        UnsupportedError: the container has none.
    """
    plain = str(dtype).removeprefix("torch.")
    found = next((name for name, torch_name in _TORCH.items() if torch_name == plain), None)
    if found is None:
        raise UnsupportedError(f"expected floating-point weights, found {plain}; dequantise the model first")
    return found


def _fill(file: BufferedReader, buffer: _Writable, path: Path) -> _Writable:
    if file.readinto(buffer) != len(buffer):
        raise _damaged(path, "it became shorter while it was read")
    return buffer


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path}: expected a complete safetensors file, {why}; copy or download the file again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_constant(token: str) -> None:
    raise ValueError(token)


def _entries(path: Path, entries: dict[str, Any], base: int) -> Iterator[TensorInfo]:
    """Check the header's fields one by one; ValueError where one is not what the format asks for."""
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("metadata")
    for name, entry in entries.items():
        if not name.isprintable():  # a line break would make the digest's lines ambiguous, half a surrogate is no text
            raise ValueError("name")
        if not isinstance(entry, dict):
            raise ValueError("entry")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise ValueError("field")
        if dtype not in _SIZES:
            raise UnsupportedError(
                f"{path}: expected floating-point weights, found {name} of type {dtype!r}; dequantise the model first"
            )
        begin, end = offsets
        if end - begin != math.prod(shape) * _SIZES[dtype]:
            raise ValueError("size")
        yield TensorInfo(name, dtype, tuple(shape), base + begin, base + end)


def _counts(value: object) -> TypeGuard[list[int]]:
    """A short list of non-negative 63-bit integers; `true` and `1.0` are none."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file to write: its name and header, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    load: Callable[[TensorInfo], bytearray]  # raw bytes in a private buffer
