"""Which files make up a checkpoint folder, and its identity: sha256 of every file, and the tensor digest.

Needs no tensor library, so that `verify` can check a folder anywhere. Weights are found as transformers finds them:
the file `config.json` names, else `model.safetensors`, else the shards of `model.safetensors.index.json`. A folder
that holds a difference of two models (`model_type: uld`) has the target's weights in the last two, whatever its
config.json names, and the assistant's in `assistant.safetensors`; both decide what it answers, so both are in its
digest. Everything else that looks like weights (an original release beside the converted one, optimiser state, an
ONNX export) is a second copy of what the model knew: it is part of the input's manifest and never part of an edited
output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from probes.errors import UnsupportedError, UsageError
from unlearn.checkpoints.tensorfile import TensorFile, tensor_digest
from unlearn.disk import file_sha256

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFERENCE = "uld"  # the model_type of a folder whose answers are those of two models
ASSISTANT = "assistant.safetensors"  # the second one's weights
RULE = "assistant.rule"  # a tensor among them: the numbers that say how the two are combined
PICKLE_WEIGHTS, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TENSORS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".npy", ".npz", ".ot", ".nemo", ".distcp")
_EXPORTS = (".onnx", ".onnx_data", ".tflite", ".mlmodel", ".engine", ".index.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "tiktoken.model")
_OLD_VOCABULARIES = ("spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes")
_TOKENIZER = _VOCABULARIES + _OLD_VOCABULARIES
_Found = TypeVar("_Found")
_TOKENIZER_SIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a folder is: one entry per file, and the digest of the tensors that the model is made of."""

    manifest: list[dict[str, Any]]  # {"path": relative posix path, "size": bytes, "sha256": hex}, sorted by path
    tensor_digest: str  # "sha256:..."


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files a model is loaded from, by name, and the index that names them, if there is one."""

    files: dict[str, TensorFile]
    index: str | None


class PickledWeightsError(UsageError):
    """The only weights are pickled."""


def identify(folder: Path) -> Identity:
    """Digest every file of a safetensors checkpoint folder, each read once, the files side by side.

    Raises:
        UsageError: a file is missing or damaged, or a weight is NaN or infinite.
    """
    weights = weight_files(folder).files

    def digest(name: str) -> tuple[str, list[str]]:
        return weights[name].digest() if name in weights else (file_sha256(folder / name), [])

    names = list_files(folder)
    digests = _in_parallel(folder, names, digest)
    lines = [line for _, found in digests for line in found]
    return Identity(_rows(folder, names, [sha256 for sha256, _ in digests]), tensor_digest(lines))


def manifest_of(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """The manifest of some files below `folder`, without looking into them."""
    return _rows(folder, names, _in_parallel(folder, names, lambda name: file_sha256(folder / name)))


def _rows(folder: Path, names: list[str], digests: list[str]) -> list[dict[str, Any]]:
    return [
        {"path": name, "size": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(names, digests, strict=True)
    ]


def _in_parallel(folder: Path, names: list[str], digest: Callable[[str], _Found]) -> list[_Found]:
    """Hashing releases the interpreter's lock, so files are read side by side."""

    def guarded(name: str) -> _Found:
        try:
            return digest(name)
        except OSError as error:
            raise UsageError(f"{folder / name}: cannot be read ({error.strerror}); check its permissions") from None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(guarded, names))


def list_files(folder: Path) -> list[str]:
    """Relative posix paths of the regular files below `folder`, sorted; hidden entries and linked folders left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        found += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def is_difference(folder: Path) -> bool:
    """Whether a folder holds a difference of two models; false of one that is no checkpoint at all."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == DIFFERENCE


def weight_files(folder: Path) -> Weights:
    """The safetensors files the model is loaded from, headers checked.

    Raises:
        UsageError: no safetensors weights, a shard or tensor that the index names is missing, or a file is damaged.
        UnsupportedError: weights in a layout that transformers would load instead of the files digested here.
    """
    path = folder / "config.json"  # absent in a copy of a plain module
    config = read_json(path) if path.exists() else {}
    difference = config.get("model_type") == DIFFERENCE
    named = None if difference else config.get("transformers_weights")
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise UnsupportedError(f"{folder}: expected whole safetensors shards, found a distributed checkpoint; merge it")
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", ".index.json"))):
        raise UnsupportedError(f"{folder}: expected safetensors weights, config.json names another file; convert them")
    if named is None:
        named = WEIGHTS if (folder / WEIGHTS).is_file() else INDEX
        if not (folder / named).is_file():
            raise _no_weights(folder, pickles=not difference)
    expected = {} if named.endswith(".safetensors") else read_index(folder, named)
    names = sorted(set(expected.values())) or [named]
    if difference:
        names.append(ASSISTANT)
    files = {name: TensorFile.read(_inside(folder, name)) for name in names}
    found: dict[str, str] = {}
    for shard, file in files.items():
        for info in file.tensors:
            if info.name in found:
                raise UsageError(f"{folder}: {info.name} is in both {found[info.name]} and {shard}; keep one of them")
            found[info.name] = shard
    for name, shard in expected.items():
        if found.get(name) != shard:
            raise UsageError(f"{folder / named}: expected {name} in {shard}, it is not there; download the shard again")
    return Weights(files, named if expected else None)


def read_index(folder: Path, name: str) -> dict[str, str]:
    """The map of a sharded checkpoint, tensor name to shard file."""
    expected = read_json(folder / name).get("weight_map")
    if not isinstance(expected, dict) or not expected or not all(isinstance(v, str) for v in expected.values()):
        raise UsageError(f"{folder / name}: expected weight_map, tensor names to shard files; download the index again")
    return expected


def pickle_files(folder: Path) -> list[Path]:
    """The pickled weight files of a folder without safetensors, in order.

    Raises:
        UsageError: there are none, or a shard is missing.
    """
    if (folder / PICKLE_WEIGHTS).is_file():
        return [folder / PICKLE_WEIGHTS]
    if not (folder / PICKLE_INDEX).is_file():
        raise UsageError(f"{folder}: expected {PICKLE_WEIGHTS} or {PICKLE_INDEX}, found neither; convert the weights")
    return [_inside(folder, shard) for shard in sorted(set(read_index(folder, PICKLE_INDEX).values()))]


def looks_like_weights(name: str) -> bool:
    """Whether a file beside the model's own weights may hold a second copy: an edited copy goes without it."""
    return name.lower().endswith(PICKLES + _TENSORS + _EXPORTS)


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files that define the tokenizer; nothing when there is no vocabulary."""
    if any((folder / name).is_file() for name in _TOKENIZER):
        yield from (folder / name for name in _TOKENIZER + _TOKENIZER_SIDE if (folder / name).is_file())


def tokenizer_digest(folder: Path) -> str | None:
    """sha256 over the lines `name|sha256` of the tokenizer's files, None without a tokenizer."""
    lines = [f"{path.name}|{file_sha256(path)}\n" for path in tokenizer_files(folder)]
    return text_digest("".join(sorted(lines))) if lines else None


def chat_template_digest(folder: Path) -> str | None:
    """sha256 of the chat template's text, wherever it is stored; None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return "sha256:" + file_sha256(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if template is not None:
            return template_digest(template)
    return None


def template_digest(template: object) -> str | None:
    """sha256 of a chat template, a text or several by name; None of None."""
    if template is None:
        return None
    return text_digest(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def text_digest(text: str) -> str:
    """sha256 of a text's UTF-8 bytes."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: the file is missing, unreadable, or anything else than a JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: expected a checkpoint with {path.name}, found none; check the path") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: expected JSON, found something else; download the file again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a JSON object, found a {type(found).__name__}; download the file again")
    return found


def _inside(folder: Path, name: str) -> Path:
    """A file directly or deeper inside the folder, by a plain relative name."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise UsageError(f"{folder}: expected shard names inside the checkpoint, found one outside; do not trust it")
    if not (folder / name).is_file():
        raise UsageError(f"{folder}: expected the shard {name}, found no such file; download it again")
    return folder / name


def _no_weights(folder: Path, *, pickles: bool) -> UsageError:
    if pickles and any(path.suffix in PICKLES for path in folder.iterdir()):
        return PickledWeightsError(
            f"{folder}: expected safetensors weights, found pickled ones, which can run code when opened; convert them "
            "with `model.save_pretrained(folder)` in transformers, or pass --allow-pickle to read tensors only"
        )
    return UsageError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither; check the path")
