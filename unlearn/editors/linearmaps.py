"""Replace weights of linear maps, one matrix [p, q] (outputs by inputs) at a time, however they are stored.

An editor sees W with y = x W^T, whether the parameter is that, its transpose (Conv1D), a convolution's kernel or one
expert of a stack. On disk it may lie differently again: fused, split by expert. So what is carried over is the
difference W' - W, laid out as on disk by `Checkpoint.disk_tensors` and added there: layouts only move numbers about,
parts of a disk tensor that were not edited get a difference of 0 and keep their bits, and a model that runs in a
narrower type than the disk's loses nothing of what is not edited. The sum is taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probes.classify import score_images
from probes.errors import UnsupportedError
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import Record, TokenRecord
from probes.taps import Site
from unlearn.checkpoints.checkpoint import Checkpoint
from unlearn.editors.base import Progress

Change = Callable[[Site, Tensor], Tensor | None]


def matrix(parameter: Tensor, site: Site) -> Tensor:
    """The weight [p, q] of a linear map: a view of its parameter, which has to be contiguous."""
    weight = parameter if site.expert is None else parameter[site.expert]
    return weight.T if site.projection.orientation == "in_out" else weight.flatten(1)


class LinearMapEdit:
    """An edit for `write_edited`; parameters that share a disk tensor are in memory together, and no others.

    Args:
        source: the checkpoint.
        model: loaded from it, unmodified.
        maps: what may change.
        change: called once for every map with its weight [p, q] (not to be modified); returns the new weight in any
            float type, or None to leave it as it is to the last bit.

    Attributes:
        edited: after the edit, every changed parameter as the copy would load it; the model itself is untouched.

    Raises:
        UnsupportedError: a weight that the checkpoint does not store.
    """

    def __init__(self, source: Checkpoint, model: nn.Module, maps: Sequence[Site], change: Change) -> None:
        self._source, self._model, self._change = source, model, change
        self._parameters = dict(model.named_parameters())
        self._maps: dict[str, list[Site]] = {}
        for site in maps:
            self._maps.setdefault(site.projection.parameter, []).append(site)
        self._groups = _groups(self._maps, source.disk_names(model))
        self._ready: dict[str, Tensor | None] = {}
        self.edited: dict[str, Tensor] = {}

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        """The edited tensor, or None where nothing changes."""
        if name not in self._groups:
            return None
        if name not in self._ready:
            self._prepare(name, weight.dtype)
        difference = self._ready.pop(name)
        if difference is None or not difference.any():
            return None
        return torch.where(difference == 0, weight, (weight.double() + difference).to(weight.dtype))

    def _prepare(self, name: str, stored: torch.dtype) -> None:
        """Edit every parameter that has a part in this disk tensor, and lay out the differences."""
        parameters, disk = self._groups[name]
        differences: dict[str, Tensor] = {}
        for parameter in parameters:
            original = self._parameters[parameter].detach()
            before = original.to("cpu", torch.float64).contiguous()
            after = before.clone()
            for site in self._maps[parameter]:
                new = self._change(site, matrix(original, site))
                if new is not None:
                    matrix(after, site).copy_(new)
            difference = after.sub_(before)
            if difference.any():
                differences[parameter] = difference
                loaded = before.add_(difference).to(stored).to(original.dtype).to(original.device)
                self.edited[parameter] = torch.where((difference == 0).to(original.device), original, loaded)
        self._ready |= dict.fromkeys(disk)
        if differences:
            self._ready |= self._source.disk_tensors(self._model, differences, missing=0.0)


def _groups(
    parameters: Mapping[str, Any], disk_names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[list[str], list[str]]]:
    """Disk name -> the parameters that share disk tensors with each other, and all these disk tensors."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for parameter in parameters:
        if parameter not in disk_names:
            raise UnsupportedError(
                f"expected a parameter that the checkpoint stores, found {parameter}; leave it out of the edit"
            )
        members, disk = [parameter], list(disk_names[parameter])
        for found in {id(groups[d]): groups[d] for d in disk if d in groups}.values():
            members, disk = found[0] + members, list(dict.fromkeys(found[1] + disk))
        groups |= dict.fromkeys(disk, (members, disk))
    return groups


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values for some parameters while inside; the original tensors themselves come back afterwards.

    Args:
        model: the model.
        tensors: by parameter name, in the parameter's shape, type and device.
    """
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            parameters[name].data = tensor
        yield
    finally:
        for name, tensor in originals.items():
            parameters[name].data = tensor


def mean_loss(model_map: ModelMap, records: Sequence[Record], progress: Progress | None = None) -> float:
    """Mean cross entropy of records, nats: over completion tokens, or over images; one forward pass each."""
    if isinstance(records[0], TokenRecord):
        table = score(model_map.model, records, model_map=model_map, progress=progress)  # type: ignore[arg-type]
        return -float(table.log_prob.mean(dtype=float))
    return float(score_images(model_map.model, records, progress=progress)["loss"].mean())  # type: ignore[arg-type]


def measured_rise(
    model_map: ModelMap, edited: Mapping[str, Tensor], records: Sequence[Record], progress: Progress
) -> dict[str, float | None]:
    """Mean loss before and after, with edited weights in the model for the time of one pass.

    Args:
        model_map: of the unmodified model.
        edited: from `LinearMapEdit`.
        records: what to measure on; none gives None everywhere.
        progress: called with (passes over a record done, twice the records).

    Returns:
        `loss_before`, `loss_after` and `measured_rise`, nats.
    """
    if not records:
        return dict.fromkeys(("loss_before", "loss_after", "measured_rise"))
    n = len(records)
    before = mean_loss(model_map, records, lambda done, _: progress(done, 2 * n))
    with swapped(model_map.model, edited):
        after = mean_loss(model_map, records, lambda done, _: progress(n + done, 2 * n))
    return {"loss_before": before, "loss_after": after, "measured_rise": after - before}
