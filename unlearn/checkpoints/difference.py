"""A folder whose answers are a difference of two models: the target's weights, and an assistant beside them.

    config.json             model_type "uld": the target's config, where the assistant is, the rule that combines them
    model.safetensors ...   the target's weights, byte for byte
    assistant.safetensors   the assistant's, and the tensor `assistant.rule`
    modeling_uld.py         the code, for those who load the folder with transformers and `trust_remote_code`

The folder is opened with the class of this package, which is the same code; the file in the folder is never run here.
`assistant.rule` repeats the numbers that the answers depend on (float64: alpha, rank share, ratio, outside, first
block, last block, scale), so that the tensor digest covers them; a config.json that says otherwise is refused.

Whoever has the folder has the target's weights: it is not an edited model, and its weights cannot be edited further.
"""

from __future__ import annotations

import copy
import struct
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probes.errors import UsageError
from unlearn.checkpoints.checkpoint import FolderCheckpoint, digest_of
from unlearn.checkpoints.manifest import ASSISTANT, RULE
from unlearn.checkpoints.tensorfile import as_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from unlearn.checkpoints.tensorfile import Shard

_FIELDS = ("alpha", "rank_share", "ratio", "outside", "first", "last", "scale")  # of the tensor, in order
_OUTSIDE = {"original": 0.0, "never": 1.0}


def remote_code() -> bytes:
    """The file `modeling_uld.py` as every saved folder holds it."""
    return files("unlearn.checkpoints").joinpath("modeling_uld.py").read_bytes()


class DifferenceCheckpoint(FolderCheckpoint):
    """A folder of a target and its assistant, opened as one model."""

    def __init__(
        self, path: Path, name: str | None = None, revision: str | None = None, *, trust_remote_code: bool = False
    ) -> None:
        """Open it.

        Raises:
            UsageError: a file is missing or damaged, or config.json and the weights name different rules.
            UnsupportedError: the target is a model that cannot be measured.
        """
        super().__init__(path, name, revision, trust_remote_code=trust_remote_code)
        self._check_rule()

    @property
    def attention(self) -> str:
        """Attention implementation of the target in loaded models; the assistant has the same."""
        from unlearn.checkpoints.loading import attention_of

        return attention_of(self._target_structure)

    @cached_property
    def _config_object(self) -> Any:
        from unlearn.checkpoints.loading import transformers_errors
        from unlearn.checkpoints.modeling_uld import ULDConfig

        with transformers_errors(str(self.path)):
            return ULDConfig.from_pretrained(self.path, local_files_only=True)

    @cached_property
    def _target_config(self) -> Any:
        """The target's config, without the attention implementation and the weight file that it may ask for."""
        config = copy.deepcopy(self._config_object.target_config)
        config._attn_implementation = config.transformers_weights = None
        return config

    @cached_property
    def _target_structure(self) -> nn.Module:
        from unlearn.checkpoints.loading import skeleton

        return skeleton(self.task, self._target_config, str(self.path))

    @cached_property
    def _structure(self) -> nn.Module:
        return self._over(self._target_structure)

    def _load_model(self, dtype: str, device: str) -> nn.Module:
        from unlearn.checkpoints.loading import load_pretrained

        target = load_pretrained(
            self.task,
            self.path,
            dtype=dtype,
            device=device,
            attention=self.attention,
            config=self._target_config,
            use_safetensors=True,
        )
        return self._over(target).eval()

    def _over(self, target: nn.Module) -> nn.Module:
        """Target and assistant as one model; the assistant goes where the target is."""
        from unlearn.checkpoints import modeling_uld
        from unlearn.checkpoints.loading import transformers_errors

        causal = self.task == "causal_lm"
        kind: Any = modeling_uld.ULDForCausalLM if causal else modeling_uld.ULDForImageClassification
        tensors = self._stored()
        with transformers_errors(str(self.path)):
            return cast("nn.Module", kind.over(target, self._config_object, tensors))

    def target_digest(self) -> str:
        """Tensor digest of the target's weights alone: that of the checkpoint the folder was made from."""
        return digest_of([shard for shard in self._shards if shard.name != ASSISTANT], str(self.path))

    def assistant(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """How the assistant is built, as a ULD configuration has it, and its tensors by name in its file."""
        tensors = self._stored()
        del tensors[RULE]
        return copy.deepcopy(self.config["assistant"]), tensors

    @property
    def _assistant_shard(self) -> Shard:
        [shard] = [shard for shard in self._shards if shard.name == ASSISTANT]
        return shard

    def _stored(self) -> dict[str, torch.Tensor]:
        shard = self._assistant_shard
        return {info.name: as_tensor(info, shard.load(info)) for info in shard.tensors}

    def _tokenizer_options(self) -> dict[str, Any]:
        return {"config": self._target_config}

    def _check_rule(self) -> None:
        """Refuse a config.json that says otherwise than the weights: the digest covers these alone."""
        shard = self._assistant_shard
        rule = next((info for info in shard.tensors if info.name == RULE), None)
        if rule is None or (rule.dtype, rule.shape) != ("F64", (len(_FIELDS),)):
            raise UsageError(f"{self.path / ASSISTANT}: expected the tensor {RULE}, found none; write the folder again")
        stored = dict(zip(_FIELDS, struct.unpack(f"<{len(_FIELDS)}d", shard.load(rule)), strict=True))
        for field, value in _stated(self.config).items():
            if stored[field] != value:
                raise UsageError(
                    f"{self.path}: expected {field} {stored[field]:g} in config.json, as {ASSISTANT} has it, found "
                    "another; a folder is not changed by its config, write it again"
                )


def _stated(config: dict[str, Any]) -> dict[str, object]:
    """What config.json says about the rule, as the tensor spells it; an external assistant has no blocks."""
    said = {field: config.get(field) for field in ("alpha", "rank_share", "ratio")}
    said["outside"] = _OUTSIDE.get(str(config.get("outside")))
    assistant = config.get("assistant")
    if isinstance(assistant, dict) and assistant.get("kind") == "blocks":
        said |= {field: assistant.get(field) for field in ("first", "last", "scale")}
    return said
