"""What every kind of checkpoint can do: say what it is, give its tensors, load as a model, be copied edited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from probes.errors import UnsupportedError, UsageError
from unlearn.checkpoints.manifest import DIFFERENCE, RULE, Identity
from unlearn.checkpoints.tensorfile import Shard, TensorInfo, as_tensor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from unlearn.checkpoints.diskmap import DiskMap
    from unlearn.checkpoints.loading import Task


class Checkpoint(ABC):
    """What every kind of checkpoint can do.

    Attributes:
        kind: "folder", "gguf", "pickle" or "live".
        name: the folder's or file's name, or the hub id; never a full path.
        path: the folder or file; None for a live model.
        revision: commit on the hub, where it came from there.
        config: content of `config.json`, or its equivalent; empty for a plain module.
        task: "causal_lm" or "image_classification".
    """

    kind: ClassVar[str]

    def __init__(
        self, name: str, path: Path | None, config: dict[str, Any], task: Task, revision: str | None = None
    ) -> None:
        self.name, self.path, self.config, self.task, self.revision = name, path, config, task, revision
        self._map: DiskMap | None = None

    @property
    def difference(self) -> bool:
        """Whether it answers for two models, a target and an assistant: the weights are the target's as they were."""
        return self.config.get("model_type") == DIFFERENCE

    # -- identity --------------------------------------------------------------------------------------------------

    def manifest(self) -> list[dict[str, Any]]:
        """Every file of the input, `{"path", "size" (bytes), "sha256"}` sorted by path; empty for a live model.

        Files are read once in the life of this object: open the checkpoint again to see whether they changed.
        """
        return self._identity.manifest

    def tensor_digest(self) -> str:
        """Digest of the weights, "sha256:...", read once with the manifest.

        Raises:
            UsageError: a weight is NaN or infinite (the message names the tensor).
        """
        return self._identity.tensor_digest

    def tokenizer_digest(self) -> str | None:
        """Digest of what defines the tokenizer; None without one."""
        return self._tokenizer_digests()[0]

    def chat_template_digest(self) -> str | None:
        """Digest of the chat template's text; None without one."""
        return self._tokenizer_digests()[1]

    def describe(self) -> dict[str, Any]:
        """The checkpoint in a report: names, sizes and digests, no path."""
        model, infos, files = self._structure, self._infos(), self.manifest()
        parameters = dict(model.named_parameters())
        architecture = type(model).__name__
        if self.difference:
            architecture += f" over {type(model.target).__name__}"
        return {
            "name": self.name,
            "revision": self.revision,
            "kind": self.kind,
            "task": self.task,
            "architecture": architecture,
            "parameters": sum(parameter.numel() for parameter in parameters.values()),
            "dtype": ", ".join(sorted({info.dtype for info in infos if "F" in info.dtype and info.name != RULE})),
            "tied": len(parameters) < len(list(model.named_parameters(remove_duplicate=False))),
            "attention": self.attention,
            "inference_time": bool(self.config.get("inference_time")),
            "tensors": len(infos),
            "files": len(files),
            "bytes": sum(file["size"] for file in files) or sum(info.nbytes for info in infos),
            "tensor_digest": self.tensor_digest(),
            "tokenizer_digest": self.tokenizer_digest(),
            "chat_template_digest": self.chat_template_digest(),
        }

    # -- tensors ---------------------------------------------------------------------------------------------------

    def weight_shards(self) -> list[Shard]:
        """The safetensors files of this checkpoint, or of a copy of it."""
        return self._shards

    def tensor_names(self) -> list[str]:
        """Names on disk, in file order."""
        return [info.name for info in self._infos()]

    def shards(self) -> dict[str, list[str]]:
        """Shard file to the names of its tensors."""
        return {shard.name: [info.name for info in shard.tensors] for shard in self._shards}

    def load_tensor(self, name: str) -> torch.Tensor:
        """One tensor by its name on disk, in its type on disk, on the CPU: a private copy.

        Raises:
            UsageError: there is no such tensor.
        """
        for shard in self._shards:
            for info in shard.tensors:
                if info.name == name:
                    return as_tensor(info, shard.load(info))
        raise UsageError(f"{self.name}: expected a tensor of the checkpoint, found no {name}")

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor) in file order; one is in memory at a time."""
        for shard in self._shards:
            for info in shard.tensors:
                yield info.name, as_tensor(info, shard.load(info))

    # -- models ----------------------------------------------------------------------------------------------------

    @property
    def attention(self) -> str:
        """Attention implementation of loaded models: "sdpa" where the architecture has it, else "eager"."""
        from unlearn.checkpoints.loading import attention_of

        return attention_of(self._structure)

    def load_model(self, dtype: str = "float32", device: str = "cpu") -> nn.Module:
        """The live model in evaluation mode.

        Args:
            dtype: float32, bfloat16, float16 or float64.
            device: "cpu", "cuda", "cuda:1", ...

        Raises:
            UsageError: an unknown dtype, or weights are missing from the checkpoint.
            UnsupportedError: transformers cannot load it.
            ResourceError: not enough memory, or no such device.
        """
        return self._load_model(dtype, device)

    def load_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UsageError: there is none, it is damaged, or it has ids that the model's embedding lacks.
        """
        from unlearn.checkpoints.loading import check_tokenizer

        tokenizer = self._load_tokenizer()
        check_tokenizer(tokenizer, self._config_object, self.name)
        return tokenizer

    def image_processor(self) -> Callable[[Image], torch.Tensor]:
        """PIL image to float32 pixels [channels, height, width], as the checkpoint wants them.

        Raises:
            UsageError: the checkpoint says nothing about images.
            UnsupportedError: it names steps that are not implemented here.
        """
        raise UsageError(f"{self.name}: expected an image classifier with its preprocessing, found none of it")

    def disk_tensors(
        self, model: nn.Module, tensors: Mapping[str, torch.Tensor], *, missing: float | None = None
    ) -> dict[str, torch.Tensor]:
        """Lay out tensors shaped like the parameters of `model` as they lie on disk (see `DiskMap.to_disk`).

        The mapping is checked once, against the weights of the first `model` given: that one has to be unmodified.

        Args:
            model: from `load_model`.
            tensors: importances or new weights by parameter name; any subset.
            missing: value for parts of a disk tensor that are not in `tensors`; None refuses.

        Returns:
            By name on disk.

        Raises:
            UnsupportedError: the architecture's conversion cannot be reverted, or does not give the disk's weights; or
                this is a difference of two models.
        """
        return self._disk_map(model).to_disk(tensors, missing)

    def disk_names(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Parameter or buffer name to the disk tensors that hold it; checked like `disk_tensors`."""
        return self._disk_map(model).disk_names

    def unused_tensors(self, model: nn.Module) -> tuple[str, ...]:
        """Disk tensors that no part of `model` reads: never measured, never edited, a limit worth reporting."""
        return self._disk_map(model).unused

    def _disk_map(self, model: nn.Module) -> DiskMap:
        if self.difference:
            raise UnsupportedError(
                f"{self.name}: expected one model, whose parameters are tensors on disk, found the difference of two; "
                "open the checkpoint it was made from"
            )
        if self._map is None or not self._map.maps(model):
            from unlearn.checkpoints.diskmap import DiskMap

            found = DiskMap(model, self.tensor_names())
            if self._map is None:  # a second model of this checkpoint, edited by now perhaps, is laid out alike
                found.check(self.load_tensor)
            self._map = found
        return self._map

    # -- copies ----------------------------------------------------------------------------------------------------

    def side_files(self) -> dict[str, Path]:
        """Files that a copy takes over byte for byte, by relative name."""
        return {}

    def left_out(self) -> list[str]:
        """Files that a copy goes without: second copies of the weights."""
        return []

    @abstractmethod
    def save_side_files(self, folder: Path) -> None:
        """Write what a copy needs beside its weights and the source does not have as files: config, tokenizer."""

    @abstractmethod
    def reopen(self, folder: Path) -> Checkpoint:
        """Open an edited copy of this checkpoint, as `write_edited` left it."""

    # -- what a kind has to say ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _identity(self) -> Identity: ...

    @property
    @abstractmethod
    def _shards(self) -> list[Shard]: ...

    @property
    @abstractmethod
    def _structure(self) -> nn.Module:
        """The model with or without memory for its weights."""

    @property
    @abstractmethod
    def _config_object(self) -> Any:
        """The config as transformers has it; None for a plain module."""

    @abstractmethod
    def _load_model(self, dtype: str, device: str) -> nn.Module: ...

    @abstractmethod
    def _load_tokenizer(self) -> Any: ...

    @abstractmethod
    def _tokenizer_digests(self) -> tuple[str | None, str | None]:
        """Of the tokenizer and of the chat template."""

    def _infos(self) -> list[TensorInfo]:
        return [info for shard in self._shards for info in shard.tensors]
