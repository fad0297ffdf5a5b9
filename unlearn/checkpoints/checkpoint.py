"""Checkpoints: opened read-only, identified by digest, read tensor by tensor, loaded as a live model, copied edited.

    checkpoint = open_checkpoint("folder")          # or model.gguf, or org/name with online=True
    checkpoint.tensor_digest()                      # "sha256:..." (unlearn.checkpoints.tensorfile defines it)
    model = checkpoint.load_model("float32")        # eval(), local files only
    deltas = write_edited(checkpoint, out, edit)    # one tensor in memory at a time

A folder that holds a difference of two models (`unlearn.checkpoints.difference`) opens as one that answers for both.

Four kinds: `folder` (safetensors, the normal one), `gguf` (dequantised on opening), `pickle` (only with
`allow_pickle`, tensors only) and `live` (a module already in memory). The last three exist as tensors in memory and
are written as one `model.safetensors`.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import ResourceError, UnsupportedError, UsageError
from unlearn.checkpoints import manifest as folders
from unlearn.checkpoints.base import Checkpoint
from unlearn.checkpoints.manifest import Identity
from unlearn.checkpoints.tensorfile import Shard, as_bytes, build_header, dtype_name, finite, tensor_digest
from unlearn.checkpoints.writer import Deltas, TensorDelta, write_edited

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from unlearn.checkpoints.diskmap import DiskMap
    from unlearn.checkpoints.loading import Task

__all__ = ["Checkpoint", "Deltas", "LiveCheckpoint", "TensorDelta", "open_checkpoint", "write_edited"]

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")


def open_checkpoint(
    ref: str | Path, *, online: bool = False, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint for reading and check everything that can be checked without reading the weights.

    Args:
        ref: a folder in Hugging Face format, a `.gguf` file, or with `online` a hub id (`org/name`, `org/name@rev`).
        online: whether a hub id may be downloaded. A folder or file never leads to a network access.
        allow_pickle: read tensors from pickled weights (and nothing else from them) where there are no safetensors.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        UsageError: nothing there, not a checkpoint, damaged, pickled, or of an architecture transformers does not know.
        UnsupportedError: an encoder, a sequence-to-sequence or multi-modal model, an adapter, or quantised weights.
        ResourceError: the hub cannot be reached, or a package for the format is missing.
    """
    path, name, revision = Path(ref), None, None
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a name that no file can have, or a folder that may not be entered
        is_file = is_folder = False
    if is_file:
        return GgufCheckpoint(path)
    if not is_folder:
        match = _HUB_ID.fullmatch(str(ref))
        if match is None or not online:
            hint = "; if it is a hub id, pass --online" if match else ""
            raise UsageError(f"{ref}: expected a checkpoint folder or .gguf file, found nothing there{hint}")
        name, revision = match["repo"], match["revision"]
        path = _download(name, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        revision = path.name  # the hub's cache names a snapshot after its commit
    try:
        return _folder_kind(path)(path, name, revision, trust_remote_code=trust_remote_code)
    except folders.PickledWeightsError:
        if not allow_pickle:
            raise
    return PickleCheckpoint(path, name, revision, trust_remote_code=trust_remote_code)


def _folder_kind(path: Path) -> type[FolderCheckpoint]:
    if folders.is_difference(path):
        from unlearn.checkpoints.difference import DifferenceCheckpoint

        return DifferenceCheckpoint
    return FolderCheckpoint


class FolderCheckpoint(Checkpoint):
    """A folder in Hugging Face format with safetensors weights."""

    kind = "folder"
    path: Path

    def __init__(
        self, path: Path, name: str | None = None, revision: str | None = None, *, trust_remote_code: bool = False
    ) -> None:
        from unlearn.checkpoints.loading import refuse_quantised, task_of

        if (path / "adapter_config.json").is_file():
            raise UnsupportedError(f"{path}: expected a whole model, found an adapter; merge it into its base first")
        config = folders.read_json(path / "config.json")
        task = task_of(config, str(path), trust_remote_code=trust_remote_code)
        super().__init__(name or path.resolve().name, path, config, task, revision)
        self._trust = trust_remote_code
        self._index: str | None = None
        self._opened = self._open_weights()
        refuse_quantised({info.name: info.dtype for info in self._infos()}, str(path))

    def _open_weights(self) -> list[Shard]:
        weights = folders.weight_files(self.path)
        self._index = weights.index
        return [Shard(name, file.header, file.tensors, file.load) for name, file in weights.files.items()]

    @cached_property
    def _identity(self) -> Identity:
        return folders.identify(self.path)

    @property
    def _shards(self) -> list[Shard]:
        return self._opened

    @cached_property
    def _config_object(self) -> Any:
        from unlearn.checkpoints.loading import load_config

        return load_config(self.path, trust_remote_code=self._trust)

    @cached_property
    def _structure(self) -> nn.Module:
        from unlearn.checkpoints.loading import skeleton

        return skeleton(self.task, self._config_object, str(self.path), trust_remote_code=self._trust)

    def _load_model(self, dtype: str, device: str) -> nn.Module:
        from unlearn.checkpoints.loading import load_pretrained

        return load_pretrained(
            self.task,
            self.path,
            dtype=dtype,
            device=device,
            attention=self.attention,
            config=self._config_object,
            trust_remote_code=self._trust,
            use_safetensors=self.kind == "folder",
        )

    def _load_tokenizer(self) -> Any:
        from unlearn.checkpoints.loading import load_tokenizer

        if not any(folders.tokenizer_files(self.path)):
            raise UsageError(f"{self.path}: expected a tokenizer (tokenizer.json, ...), found none; add its files")
        return load_tokenizer(self.path, trust_remote_code=self._trust, **self._tokenizer_options())

    def _tokenizer_options(self) -> dict[str, Any]:
        """What it takes to find out which tokenizer the files are, beside the files."""
        return {}

    def _tokenizer_digests(self) -> tuple[str | None, str | None]:
        return folders.tokenizer_digest(self.path), folders.chat_template_digest(self.path)

    def image_processor(self) -> Callable[[Image], torch.Tensor]:
        from unlearn.checkpoints.imageprocessor import ImageProcessor

        config = folders.read_json(self.path / "preprocessor_config.json")
        return ImageProcessor.from_config(config, int(self.config.get("num_channels", 3)))

    def _sorted_out(self) -> dict[bool, list[str]]:
        """Files that are not the model's own weights: True those a copy keeps, False those it goes without."""
        own = {shard.name for shard in self._opened}
        sorted_out: dict[bool, list[str]] = {True: [], False: []}
        for name in folders.list_files(self.path):
            if name not in own:
                sorted_out[name == self._index or not folders.looks_like_weights(name)].append(name)
        return sorted_out

    def side_files(self) -> dict[str, Path]:
        return {name: self.path / name for name in self._sorted_out()[True]}

    def left_out(self) -> list[str]:
        return self._sorted_out()[False]

    def save_side_files(self, folder: Path) -> None:
        """Nothing: a folder has them all as files."""

    def reopen(self, folder: Path) -> Checkpoint:
        return open_checkpoint(folder, trust_remote_code=self._trust)


class PickleCheckpoint(FolderCheckpoint):
    """A folder whose only weights are pickled: tensors are read (`weights_only`), nothing is executed."""

    kind = "pickle"

    def _open_weights(self) -> list[Shard]:
        import torch

        tensors: dict[str, torch.Tensor] = {}
        for file in folders.pickle_files(self.path):
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # a damaged or malicious pickle can raise anything
                raise UsageError(
                    f"{file}: expected pickled tensors and nothing else, found {type(error).__name__} on reading; "
                    "convert it where you trust it, or use another copy"
                ) from None
            if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
                raise UsageError(f"{file}: expected a state dict of tensors, found something else; convert it")
            tensors |= found
        return _one_shard(tensors)

    @cached_property
    def _identity(self) -> Identity:
        return Identity(
            folders.manifest_of(self.path, folders.list_files(self.path)), digest_of(self._opened, str(self.path))
        )


class GgufCheckpoint(Checkpoint):
    """A GGUF file, dequantised to float32 when it is first read and kept in memory: convert large ones to a folder."""

    kind = "gguf"
    path: Path

    def __init__(self, path: Path) -> None:
        from unlearn.checkpoints.loading import load_config, task_of

        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{path}: expected a checkpoint folder or a GGUF file, found another file")
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            packages = " and ".join(missing)
            raise ResourceError(f"{path}: reading GGUF needs {packages}, found none; pip install 'unlearn-audit[demo]'")
        self._gguf_config = load_config(path.parent, gguf_file=path.name)
        config = self._gguf_config.to_dict()
        super().__init__(path.name, path, config, task_of(config, str(path)))

    @cached_property
    def _structure(self) -> nn.Module:
        from transformers import GgufConfig

        from unlearn.checkpoints.loading import attention_of, load_pretrained, skeleton

        default = skeleton(self.task, self._gguf_config, str(self.path))
        with redirect_stderr(StringIO()):  # transformers' progress bar of this step has no switch
            return load_pretrained(
                self.task,
                self.path.parent,
                dtype="float32",
                device="cpu",
                attention=attention_of(default),
                config=self._gguf_config,
                gguf_file=self.path.name,
                quantization_config=GgufConfig(dequantize=True),
            )

    def _load_model(self, dtype: str, device: str) -> nn.Module:
        from unlearn.checkpoints.loading import converted

        return converted(self._structure, dtype, device)

    @cached_property
    def _shards(self) -> list[Shard]:
        from unlearn.checkpoints.diskmap import saved_tensors

        return _one_shard(saved_tensors(self._structure))

    @cached_property
    def _identity(self) -> Identity:
        return Identity(folders.manifest_of(self.path.parent, [self.path.name]), digest_of(self._shards, self.name))

    @property
    def _config_object(self) -> Any:
        return self._gguf_config

    @cached_property
    def _tokenizer(self) -> Any:
        from unlearn.checkpoints.loading import load_tokenizer

        return load_tokenizer(self.path.parent, gguf_file=self.path.name)

    def _load_tokenizer(self) -> Any:
        return copy.deepcopy(self._tokenizer)

    def _tokenizer_digests(self) -> tuple[str | None, str | None]:
        from unlearn.checkpoints.loading import tokenizer_digests

        return tokenizer_digests(self._tokenizer)

    def save_side_files(self, folder: Path) -> None:
        from unlearn.checkpoints.loading import save_beside

        save_beside(folder, self._structure, self._tokenizer)

    def reopen(self, folder: Path) -> Checkpoint:
        return open_checkpoint(folder)


class LiveCheckpoint(Checkpoint):
    """A model in memory behind the interface of a checkpoint.

    Its weights are read anew whenever they are asked for. `load_model` puts the module itself into evaluation mode
    and returns it where dtype and device are the module's own; otherwise it returns a converted copy.

    Args:
        model: a transformers model, or any classifier module that maps pixels to logits.
        tokenizer: for a language model.
        image_processor: PIL image to pixels, for a classifier whose records name image files.
    """

    kind = "live"

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, image_processor: Callable[[Image], torch.Tensor] | None = None
    ) -> None:
        from unlearn.checkpoints.loading import task_of

        config: Any = getattr(model, "config", None)
        content: dict[str, Any] = {}
        task: Task = "image_classification"
        if hasattr(config, "to_dict"):
            content = config.to_dict() | {"architectures": [type(model).__name__]}
            task = task_of(content, type(model).__name__, trust_remote_code=True)
        super().__init__(type(model).__name__, None, content, task)
        self.model, self._tokenizer, self._processor = model, tokenizer, image_processor

    @property
    def _structure(self) -> nn.Module:
        return self.model

    @property
    def _config_object(self) -> Any:
        return self.model.config if self.config else None

    @property
    def _shards(self) -> list[Shard]:
        from unlearn.checkpoints.diskmap import saved_tensors

        return _one_shard(saved_tensors(self.model))

    @property
    def _identity(self) -> Identity:
        return Identity([], digest_of(self._shards, self.name))

    def _load_model(self, dtype: str, device: str) -> nn.Module:
        from unlearn.checkpoints.loading import converted, is_as

        return self.model.eval() if is_as(self.model, dtype, device) else converted(self.model, dtype, device)

    def _disk_map(self, model: nn.Module) -> DiskMap:
        from unlearn.checkpoints.diskmap import DiskMap

        return super()._disk_map(model) if self.difference else DiskMap(model, self.tensor_names())

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise UsageError(f"{self.name}: expected a tokenizer with the live model, found none; pass tokenizer=")
        return self._tokenizer

    def _tokenizer_digests(self) -> tuple[str | None, str | None]:
        from unlearn.checkpoints.loading import tokenizer_digests

        return tokenizer_digests(self._tokenizer)

    def image_processor(self) -> Callable[[Image], torch.Tensor]:
        return self._processor or super().image_processor()

    def save_side_files(self, folder: Path) -> None:
        from unlearn.checkpoints.loading import save_beside

        save_beside(folder, self.model, self._tokenizer)

    def reopen(self, folder: Path) -> Checkpoint:
        """A new live checkpoint with the written weights; this one's module stays as it is."""
        from safetensors.torch import load_file

        from unlearn.checkpoints.loading import DTYPES, load_pretrained

        if self.config:
            first = next(self.model.parameters())
            dtype = next((name for name, dtype in DTYPES.items() if dtype == first.dtype), "float32")
            attention, device = self.attention, str(first.device)
            if folders.is_difference(folder):
                model = open_checkpoint(folder).load_model(dtype, device)
            else:
                model = load_pretrained(self.task, folder, dtype=dtype, device=device, attention=attention)
        else:
            model = copy.deepcopy(self.model).eval()
            model.load_state_dict(load_file(folder / folders.WEIGHTS), strict=False)  # a tied weight is there once
        return LiveCheckpoint(model, self._tokenizer, self._processor)


def _download(repo: str, revision: str | None, *, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """Fetch a repository's weights, configs and tokenizer into the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.model.v3", "*.jinja", "*.tiktoken", "LICENSE*"]
    wanted += ["*.bin"] * allow_pickle + ["*.py"] * trust_remote_code
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise UsageError(f"{repo}: expected a repository and revision on the hub, found none; check the id") from None
    except Exception as error:  # network libraries raise their own kinds
        raise ResourceError(f"{repo}: cannot be downloaded ({type(error).__name__}); check the network") from None


def _one_shard(tensors: dict[str, torch.Tensor]) -> list[Shard]:
    """Tensors in memory as the one safetensors file they would be written as."""
    header, infos = build_header((name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items())
    return [Shard(folders.WEIGHTS, header, tuple(infos), lambda info: bytearray(as_bytes(tensors[info.name])))]


def digest_of(shards: Sequence[Shard], where: str) -> str:
    """Tensor digest of weights that may be in memory."""
    lines = []
    for shard in shards:
        for info in shard.tensors:
            data = shard.load(info)
            if not finite(info.dtype, data):
                raise UsageError(f"{where}: expected finite weights, found NaN or infinity in {info.name}")
            lines.append(info.line(hashlib.sha256(data).hexdigest()))
    return tensor_digest(lines)
