"""Between a model's parameters and the tensors of its checkpoint on disk.

Editors think in the names of `model.named_parameters()`. The file may say it differently: GPT-2 on the hub has no
`transformer.` in front, a mixture of experts keeps one tensor per expert where the model holds one stack, a tied
head may lie on disk twice. transformers converts while loading and can revert; this module asks it once which
parameters and which disk tensors belong together, and from then on converts those groups and nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from probes.errors import UnsupportedError
from unlearn.checkpoints.manifest import DIFFERENCE


class DiskMap:
    """The correspondence for one model and one checkpoint.

    Attributes:
        disk_names: every parameter and persistent buffer that the checkpoint holds, with its disk tensors. A tied
            parameter is listed under each of its names, each with all the disk tensors of the shared weight.
        unused: disk tensors that no part of the model reads; no measurement sees them and no edit touches them.
    """

    def __init__(self, model: nn.Module, disk: Iterable[str]) -> None:
        """Work out the correspondence.

        Args:
            model: the loaded model; it is not kept alive.
            disk: names of the tensors on disk.
        """
        self._reference = weakref.ref(model)
        self._disk = frozenset(disk)
        state = model.state_dict(keep_vars=True)
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._shared: dict[str, list[str]] = {}  # name -> all names of the same tensor
        by_identity: dict[int, list[str]] = {}
        for name, tensor in state.items():
            self._shared[name] = by_identity.setdefault(id(tensor), [])
            self._shared[name].append(name)
        blank = {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}
        converts = revert(model, blank).keys() != blank.keys()  # most architectures convert nothing
        own = {}  # name -> disk names of exactly this state entry
        for name, tensor in blank.items():
            names = tuple(self._on_disk({name: tensor}) if converts else [self._named(name)])
            if self._disk.issuperset(names):
                own[name] = names
        self.disk_names = {
            name: names
            for name, shared in self._shared.items()
            if (names := tuple(dict.fromkeys(disk_name for alias in shared for disk_name in own.get(alias, ()))))
        }
        self._groups = _groups(own)
        self.unused = tuple(sorted(self._disk.difference(*own.values())))

    def maps(self, model: nn.Module) -> bool:
        """Whether this is the map of that very model."""
        return self._reference() is model

    @property
    def _model(self) -> nn.Module:
        model = self._reference()
        if model is None:
            raise RuntimeError("expected the model of this map, found it released")
        return model

    def to_disk(self, tensors: Mapping[str, torch.Tensor], missing: float | None = None) -> dict[str, torch.Tensor]:
        """Lay out tensors shaped like the model's parameters as they lie on disk.

        Args:
            tensors: by parameter name; any subset of the model's state. A tied weight may come under any of its names.
            missing: value for the part of a disk tensor whose parameter is not in `tensors` (a fused projection
                of which one part is excluded); None refuses.

        Returns:
            By disk name, in the dtype given. A tied weight stored twice appears under both names.

        Raises:
            UnsupportedError: a name or shape that the model or the checkpoint does not have, or part of a disk
                tensor is absent and `missing` is None.
        """
        given: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.disk_names or self._shapes[name] != tensor.shape:
                raise UnsupportedError(
                    f"expected a parameter of the model that its checkpoint stores, found {name} of shape "
                    f"{list(tensor.shape)}; leave it out of the edit"
                )
            given |= dict.fromkeys(self._shared[name], tensor)
        result: dict[str, torch.Tensor] = {}
        for group in {id(self._groups[name]): self._groups[name] for name in given if name in self._groups}.values():
            absent = [name for name in group if name not in given]
            if absent and missing is None:
                raise UnsupportedError(
                    f"expected all parameters that share a disk tensor, found {absent[0]} missing; "
                    "include it or exclude its companions"
                )
            like = next(given[name] for name in group if name in given)
            filled = {name: like.new_full(self._shapes[name], missing or 0.0) for name in absent}
            result |= self._on_disk({name: given[name] if name in given else filled[name] for name in group})
        return result

    def check(self, load: Callable[[str], torch.Tensor]) -> None:
        """Map the model's own weights and compare them with the disk, one group in memory at a time.

        Args:
            load: gives a disk tensor by name.

        Raises:
            UnsupportedError: they differ, so the mapping (or the model) is not the one of this checkpoint.
        """
        state = self._model.state_dict()
        for group in {id(group): group for group in self._groups.values()}.values():
            for name, mapped in self._on_disk({name: state[name] for name in group}).items():
                stored = load(name)
                if mapped.shape != stored.shape or not torch.equal(mapped.cpu(), stored.to(mapped.dtype)):
                    raise UnsupportedError(
                        f"expected the model's weights as the checkpoint stores them, found {name} different; "
                        "load the model again, or edit it through the Python API"
                    )

    def _on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of whole groups, laid out and named as on disk."""
        return {self._named(name): tensor for name, tensor in revert(self._model, tensors).items()}

    def _named(self, name: str) -> str:
        """The name on disk, where a headless checkpoint lacks the model's prefix or has one too many."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in self._disk), name)


def is_difference(model: nn.Module) -> bool:
    """Whether a live model answers for two: `target`, and an assistant beside it."""
    return getattr(getattr(model, "config", None), "model_type", None) == DIFFERENCE


def revert(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the conversions that transformers applied while loading; a plain module has none.

    Raises:
        UnsupportedError: transformers cannot revert them.
    """
    if not hasattr(model, "config"):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    try:
        converted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    except Exception as error:  # a conversion raises whatever its operation raises
        raise UnsupportedError(
            f"expected weights that transformers can convert back to the checkpoint's layout, found that it cannot for "
            f"{type(model).__name__} ({type(error).__name__}); this architecture cannot be edited"
        ) from None
    return converted


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A live model's tensors as `save_pretrained` would store them: tied weights once, conversions reverted.

    Of a difference of two models those of the target, under the names that it alone gives them, and the assistant's.

    Returns:
        By disk name; those that need no conversion share the model's memory.
    """
    if is_difference(model):
        whole = cast(Any, model)
        return saved_tensors(whole.target) | cast("dict[str, torch.Tensor]", whole.assistant_tensors())
    state: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ignored: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        declared = name in tied and state.get(tied[name]) is tensor
        if name not in ignored and not declared and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return revert(model, kept)


def _groups(own: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Parameters that share a disk tensor, by parameter name: one list object per group."""
    groups: dict[str, list[str]] = {}
    by_disk: dict[str, list[str]] = {}
    for name, disk_names in own.items():
        merged: list[str] = []
        for found in {id(by_disk[d]): by_disk[d] for d in disk_names if d in by_disk}.values():
            merged += found
        merged.append(name)
        for member in merged:
            groups[member] = merged
            by_disk |= dict.fromkeys(own[member], merged)
    return groups
