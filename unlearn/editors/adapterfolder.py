"""Low-rank adapters as a folder that peft reads: what an edit added to the weights, kept apart from them.

The folder holds `adapter_model.safetensors` with `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight`
[out, r] of each adapter, and `adapter_config.json`. Adapters that are zero are left out: they change nothing.

Whoever holds this folder and the edited copy can take the one off the other and has the original back, up to rounding.
It belongs with the private files of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from unlearn.checkpoints.tensorfile import TensorFile, tensor_digest
from unlearn.disk import write_atomic


def write_adapter(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], *, scale: float, transposed: bool, language: bool
) -> dict[str, Any]:
    """Write adapters of one rank.

    Args:
        folder: made, with its parents; files of the same names are replaced.
        pairs: module path -> A [r, in] and B [out, r], at least one.
        scale: what B A counts, alpha / r.
        transposed: whether the modules keep their weights [in, out].
        language: whether the model is a causal language model.

    Returns:
        `tensor_digest` (as of a checkpoint), `modules` and `elements`.

    Raises:
        ResourceError: the disk is full or read-only.
    """
    tensors = {}
    for path, pair in pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{path}.lora_{half}.weight"] = tensor.detach().cpu().contiguous()
    rank = next(iter(pairs.values()))[0].shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if language else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "target_modules": sorted(pairs),
    }
    weights = folder / "adapter_model.safetensors"
    write_atomic(weights, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return {
        "tensor_digest": tensor_digest(TensorFile.read(weights).digest()[1]),
        "modules": len(pairs),
        "elements": sum(tensor.numel() for tensor in tensors.values()),
    }
