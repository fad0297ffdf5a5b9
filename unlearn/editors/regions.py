"""The entries that earlier edits changed most, kept from being changed again (RegLoRA, arXiv 2505.02486, turned round).

Of an earlier edit the adapters are known, and so its change s B A of each matrix. The `share` of entries with the
largest magnitude is taken, matrix by matrix, over all earlier edits together. With D = s B A what the present adapters
add to a matrix and S its set of entries, at least one,

    earlier_edit_weight sum over matrices of mean over S of |D_ij|

is added to the objective. It is zero where the new change leaves these entries alone. RegLoRA keeps learned knowledge
that way; here it is what an erasure did to the weights. No record is needed, and no pass over one.

Limits. Where weights changed most is not all that an edit did, and a change elsewhere can undo it as well: `Replay` in
`unlearn.editors.protect` asks the records themselves. An entry in S is held although the change might have helped.
Edits that left no adapter (other methods, moving averages) are not known here.

Shape letters: r rank, n entries of a matrix that are held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes.errors import UsageError

_PREFIX = "base_model.model."


def held_entries(model: nn.Module, folders: Sequence[Path], share: float) -> dict[str, Tensor]:
    """The entries of each matrix that earlier edits changed most.

    Args:
        model: what is edited now, without adapters.
        folders: adapters of earlier edits, as `unlearn.editors.adapterfolder` writes them.
        share: of a matrix's entries, above 0 and below 1; at least one entry of each edit.

    Returns:
        Module path -> ascending positions [n] in the change [out, in], row by row, of all edits together.

    Raises:
        UsageError: a folder that cannot be read, or that is not of this architecture.
    """
    found: dict[str, list[Tensor]] = {}
    for i, folder in enumerate(folders):
        where = f"adapter {i + 1} of {len(folders)} earlier edits"
        for path, change in _changes(model, folder, where).items():
            top = change.abs().flatten().topk(max(1, math.floor(share * change.numel()))).indices  # [n]
            found.setdefault(path, []).append(top)
    return {path: torch.cat(tops).unique() for path, tops in found.items()}  # type: ignore[no-untyped-call]


def _changes(model: nn.Module, folder: Path, where: str) -> dict[str, Tensor]:
    """The change s B A [out, in] of each module in a folder, float32."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = float(config["lora_alpha"]) / int(config["r"])
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise UsageError(
            f"{where}: expected a folder of peft with adapter_config.json and adapter_model.safetensors, found none "
            "that can be read; restore it, or set earlier_edit_weight to 0"
        ) from None
    modules = dict(model.named_modules())
    found = {}
    for name, down in tensors.items():
        path, matched, _ = name.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not matched:
            continue
        up, module = tensors.get(f"{_PREFIX}{path}.lora_B.weight"), modules.get(path)
        if up is None or not isinstance(module, (nn.Linear, Conv1D)) or _shape(module) != (len(up), down.shape[-1]):
            raise UsageError(
                f"{where}: expected matrices of this model, found another shape or name at {path}; give the adapters "
                "of edits on the way to this checkpoint"
            )
        found[path] = scale * up.float() @ down.float()
    return found


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """[out, in] of a linear map."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


class Regions:
    """The penalty on changes of held entries, for the adapters in place.

    Args:
        held: from `held_entries`; modules without adapters now cannot change and are passed over.
        pairs: module path -> A [r, in] and B [out, r] of the adapters in place.
        scale: s.
        weight: factor of the penalty.

    Attributes:
        held: positions [n] by module path, of those with adapters.
        values: the penalty of each step, without its weight.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor],
        pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        *,
        scale: float,
        weight: float,
    ) -> None:
        self._pairs, self._scale, self._weight = pairs, scale, weight
        self.held = {path: at.to(pairs[path][0].device) for path, at in held.items() if path in pairs}
        self.values: list[float] = []

    def step(self) -> float:
        """Add the penalty's gradients; returns it times its weight."""
        penalty = 0.0
        for path, at in self.held.items():
            down, up = self._pairs[path]
            if not up.requires_grad:  # dropped: it stays zero
                continue
            columns = down.shape[1]
            rows = up[at // columns] * down.T[at % columns]  # [n, r]
            value = (self._scale * rows.sum(-1)).abs().mean()
            (self._weight * value).backward()  # type: ignore[no-untyped-call]
            penalty += float(value.detach())
        self.values.append(penalty)
        return self._weight * penalty
