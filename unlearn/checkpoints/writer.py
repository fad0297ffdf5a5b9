"""Write an edited copy of a checkpoint, one tensor in memory at a time.

A shard keeps its header, so names, order, types and offsets stay and a tensor that is not edited keeps its bytes; a
shard without an edited tensor comes out identical, and so does every other file (index, config, tokenizer, chat
template, generation config). Second copies of the weights (pickles, exports, optimiser state) are left out: they
would still hold what the edit removed.

A method that changes no weight but puts something beside them (the assistant of a difference of logits) adds weight
files, laid out as `build_header` says, so that the same tensors give the same bytes, and replaces side files (the
config that makes the folder another kind of model). What is added is part of the copy's digest and manifest.

The copy is written to a hidden folder beside its destination, flushed to disk and renamed, so a reader sees all of
it or nothing. The source is only ever opened for reading.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from probes.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from unlearn.checkpoints.manifest import list_files, looks_like_weights, weight_files
from unlearn.checkpoints.tensorfile import (
    CHUNK,
    Shard,
    TensorInfo,
    as_bytes,
    as_tensor,
    build_header,
    dtype_name,
    finite,
    tensor_digest,
)
from unlearn.disk import disk_errors, file_sha256

if TYPE_CHECKING:
    import torch

    from unlearn.checkpoints.base import Checkpoint

Edit = Callable[[str, "torch.Tensor"], "torch.Tensor | None"]


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """How far the edit moved one tensor.

    Attributes:
        name: the tensor's name on disk.
        dtype: its type on disk, as in F32 or BF16.
        shape: its shape on disk.
        changed: how many elements have other bits than before.
        rel_norm: ||W' - W|| / ||W||, Frobenius, in float64; None where W is zero and W' is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: int
    rel_norm: float | None


class Deltas(list[TensorDelta]):
    """One delta for every tensor the edit returned, in file order, and what the written folder is.

    Attributes:
        tensor_digest: of the copy.
        manifest: of the copy, as `Checkpoint.manifest()` gives it.
        left_out: files of the source that hold a second copy of the weights and were not written.
    """

    tensor_digest: str
    manifest: list[dict[str, Any]]
    left_out: list[str]


def write_edited(
    source: Checkpoint,
    out: Path,
    edit: Edit,
    *,
    added: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    replaced: Mapping[str, bytes] | None = None,
    before_rename: Callable[[Path], None] | None = None,
) -> Deltas:
    """Write a copy of `source` with some tensors replaced, and with files put beside them.

    Args:
        source: the checkpoint; never written to.
        out: the new folder. Its parents are made; it must not exist, or be an empty folder.
        edit: called once for every tensor with its name on disk and its value (private to the call, not to be
            modified); returns the new value in the same shape, in any float type (rounded to the type on disk), or
            None to leave the tensor alone.
        added: new weight files, name (`*.safetensors`) to tensors by name, stored in the type they have. They count in
            the copy's digest and manifest and have no delta: there is nothing that they differ from.
        replaced: side files, name to content, written in place of the source's or beside them.
        before_rename: called with the complete hidden folder just before it gets its name.

    Raises:
        IntegrityError: `out` and the source overlap; the edit returned NaN, infinity or another shape; an added tensor
            holds NaN or infinity; an added file or tensor has the name of one of the source's; a replaced file holds
            weights; or the copy would not be read back as the files written.
        UnsupportedError: the source is a difference of two models, not one model.
        UsageError: `out` exists and is not empty.
        ResourceError: the disk is full or read-only, or another process is writing there. Nothing is left behind.
    """
    added, replaced = added or {}, replaced or {}
    if source.difference:
        raise UnsupportedError(
            f"{source.name}: expected one model to edit, found the difference of two; edit the checkpoint it was made "
            "from"
        )
    extra = _beside(source, added, replaced) if added or replaced else []
    if source.path is not None:
        refuse_overlap(out, source.path)
    target = Path(os.path.realpath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{out}: expected a new or empty folder, found files there; choose another output")
    try:
        with disk_errors(), _staging(target) as folder:
            deltas = _fill(folder, source, edit, extra, replaced)
            if before_rename is not None:
                before_rename(folder)
            folder.rename(target)
    except OSError as error:
        raise ResourceError(f"{out}: cannot write the copy ({error.strerror}); choose another output") from None
    return deltas


def _fill(folder: Path, source: Checkpoint, edit: Edit, added: list[Shard], replaced: Mapping[str, bytes]) -> Deltas:
    """Write everything into an empty folder and flush it to disk."""
    shards = list(source.weight_shards())
    needed = sum(len(shard.header) + sum(t.nbytes for t in shard.tensors) for shard in shards + added)
    _require_space(folder, needed + sum(map(len, replaced.values())))
    deltas, lines = Deltas(), list[str]()
    kept = {name: path for name, path in source.side_files().items() if name not in replaced}
    digests = {name: _copy(path, folder / name) for name, path in kept.items()}
    source.save_side_files(folder)
    for name, content in replaced.items():
        digests[name] = _write_file(folder / name, content)
    for shard in shards:
        digests[shard.name] = _write_shard(shard, folder, edit, deltas, lines)
    for shard in added:
        digests[shard.name] = _write_shard(shard, folder, _as_it_is, deltas, lines)
    if added or replaced:
        _check_read_back(folder, shards + added)
    for parent, _, _ in os.walk(folder):
        _sync(Path(parent))
    deltas.tensor_digest = tensor_digest(lines)
    deltas.left_out = source.left_out()
    deltas.manifest = [
        {"path": name, "size": path.stat().st_size, "sha256": digests.get(name) or file_sha256(path)}
        for name in list_files(folder)
        if (path := folder / name)
    ]
    return deltas


def _as_it_is(name: str, tensor: torch.Tensor) -> None:
    """The edit of a tensor that was added: none."""


def _beside(
    source: Checkpoint, added: Mapping[str, Mapping[str, torch.Tensor]], replaced: Mapping[str, bytes]
) -> list[Shard]:
    """The new weight files; these and the side files are checked before anything is written."""
    shards = source.weight_shards()
    files = {shard.name for shard in shards}
    for name in replaced:  # weights get into a copy through the edit or as added tensors, with a digest
        if name in files or name in added or looks_like_weights(name):
            raise IntegrityError(
                f"expected a side file to replace, found {name}, which holds weights; edit its tensors"
            )
        if not _plain_name(name):
            raise IntegrityError(f"expected the name of a file inside the copy, found {name!r}; choose another")
    files |= {*source.side_files(), *source.left_out()}
    taken = {info.name for shard in shards for info in shard.tensors}
    extra = []
    for file, tensors in added.items():
        if not _plain_name(file) or not file.endswith(".safetensors"):
            raise IntegrityError(f"expected the plain name of a new safetensors file, found {file!r}; choose another")
        if file in files:
            raise IntegrityError(f"expected a new weight file, found {file} in the source; choose another name")
        for name, tensor in tensors.items():
            if not name.isprintable() or name in taken:
                raise IntegrityError(f"expected a new tensor name in {file}, found {name!r}; choose another name")
            taken.add(name)
            if not finite(dtype_name(tensor.dtype), as_bytes(tensor)):
                raise IntegrityError(f"expected finite weights in {file}, found NaN or infinity in {name}")
        header, infos = build_header((name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items())
        extra.append(Shard(file, header, tuple(infos), _loader(tensors)))
    return extra


def _loader(tensors: Mapping[str, torch.Tensor]) -> Callable[[TensorInfo], bytearray]:
    return lambda info: bytearray(as_bytes(tensors[info.name]))


def _plain_name(name: str) -> bool:
    """Whether a relative name stays inside the folder and is listed in its manifest."""
    parts = name.split("/")
    return str(PurePosixPath(name)) == name and name.isprintable() and not any(part[:1] in ("", ".") for part in parts)


def _check_read_back(folder: Path, written: list[Shard]) -> None:
    """Refuse a copy that would be loaded from other files than those written: its digest would say nothing of it."""
    found = weight_files(folder).files
    if {name: file.tensors for name, file in found.items()} != {shard.name: shard.tensors for shard in written}:
        raise IntegrityError(
            f"expected the copy to be read from {', '.join(sorted(shard.name for shard in written))}, found "
            f"{', '.join(sorted(found))}; write a config.json that names them"
        )


def refuse_overlap(out: Path, source: Path) -> None:
    """Refuse an output inside the input or around it, whatever links, `..` or mounts lie between.

    Raises:
        IntegrityError: nothing is written.
    """
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    inside = origin.is_dir() and _is_or_holds(origin, target)
    if inside or _is_or_holds(target, origin):
        raise IntegrityError(
            f"{out}: expected an output apart from the input checkpoint, found one in the other; choose another folder"
        )


def _is_or_holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or below it, by identity on the disk, not by spelling."""
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A hidden empty folder beside `target`, ours alone; gone afterwards unless it was renamed.

    Its name is fixed, so that the leavings of a killed run are found and cleared by the next one. The lock tells
    leavings from the work of a process that is alive: it goes with the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.partial")
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"{target}: expected to write alone, found another process doing it; wait") from None
        try:
            for leaving in folder.iterdir():
                shutil.rmtree(leaving) if leaving.is_dir() and not leaving.is_symlink() else leaving.unlink()
            yield folder
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"expected {needed / 1e6:.1f} MB of free disk for the copy, found {free / 1e6:.1f}; free some space"
        )


def _write_shard(shard: Shard, folder: Path, edit: Edit, deltas: Deltas, lines: list[str]) -> str:
    """Write one shard; adds to `deltas` and to the content `lines`, returns the sha256 of the file."""
    path = folder / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256(shard.header)
    with path.open("xb") as file:
        file.write(shard.header)
        for info in shard.tensors:
            data = _edited(info, shard, edit, deltas)
            whole.update(data)
            lines.append(info.line(hashlib.sha256(data).hexdigest()))
            file.write(data)
        _flush(file)
    return whole.hexdigest()


def _edited(info: TensorInfo, shard: Shard, edit: Edit, deltas: Deltas) -> bytearray | memoryview:
    """The bytes to write for one tensor; adds its delta where the edit returned a value."""
    import torch

    original = shard.load(info)
    with torch.inference_mode(False):  # or the tensor would not count its writes
        before = as_tensor(info, original)
    writes = before._version
    after = edit(info.name, before)
    if before._version != writes:  # neither the difference nor "untouched" could be trusted
        raise IntegrityError(f"expected an edit that returns a new tensor, found {info.name} changed in place")
    if after is None:
        return original
    if after.shape != before.shape:
        raise IntegrityError(
            f"expected {info.name} to keep its shape {list(info.shape)}, found {list(after.shape)} after the edit"
        )
    after = after.detach().to(device="cpu", dtype=before.dtype)
    data = as_bytes(after)
    if not finite(info.dtype, data):
        raise IntegrityError(
            f"expected finite weights, found NaN or infinity in {info.name} after the edit; nothing was written"
        )
    deltas.append(_delta(info, before, after))
    return data


def _delta(info: TensorInfo, before: torch.Tensor, after: torch.Tensor) -> TensorDelta:
    import torch

    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
    changed, moved, norm = 0, 0.0, 0.0
    # In pieces that stay in the cache (float64 copies of a whole embedding would be slow and the peak of memory) and
    # not above the 32768 elements from which torch starts threads: they cost more here than they save, and the sums
    # would depend on their number.
    size = CHUNK // 32
    for old, new in zip(torch.split(before.flatten(), size), torch.split(after.flatten(), size), strict=True):
        changed += int(torch.count_nonzero(old.view(bits) != new.view(bits)))
        old = old.double()
        step = new.double() - old
        moved += float(step.square().sum())
        norm += float(old.square().sum())
    ratio = (moved / norm) ** 0.5 if norm else 0.0 if not moved else None
    return TensorDelta(info.name, info.dtype, info.shape, changed, ratio)


def _copy(source: Path, target: Path) -> str:
    """Copy a file's content (never a link to it) and return its sha256: one read for both."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whole, chunk = hashlib.sha256(), bytearray(CHUNK)
    with source.open("rb") as reader, target.open("xb") as writer:
        while count := reader.readinto(chunk):
            data = memoryview(chunk)[:count]
            whole.update(data)
            writer.write(data)
        _flush(writer)
    return whole.hexdigest()


def _write_file(path: Path, content: bytes) -> str:
    """Write a file, whatever stood there, and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        _flush(file)
    return hashlib.sha256(content).hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
