"""Which weights an editor trains, how, and the change as an edit of the files.

What trains are LoRA adapters beside the linear maps of the blocks, merged into the weights afterwards (`how: lora`), or
the weights themselves (`how: full`), by `probes.training`. Either way the model is as before in the end, and what is
left is a difference for each tensor, taken in float64, which is added to the file's own and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, StrictInt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes import training
from probes.errors import UnsupportedError, UsageError
from unlearn.editors.base import EditContext
from unlearn.editors.selection import MapParameters, select_parameters

if TYPE_CHECKING:
    from probes.modelmap import ModelMap, Projection
    from unlearn.checkpoints.checkpoint import Checkpoint

Positive = Annotated[float, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, ge=0)]
Count = Annotated[StrictInt, Field(ge=0)]
Size = Annotated[StrictInt, Field(ge=1)]


class TrainingParameters(MapParameters):
    """What trains and for how long; the names are those of a method preset.

    Attributes:
        blocks: indices in depth order, negative ones from the end; "auto" takes every block, and for `how: full` what
            lies outside the blocks too.
        roles: roles of the model map (q, v, up, down, ...); "auto" takes all of them.
        include: globs of parameter names, in place of blocks and roles.
        exclude: globs of parameter names to leave alone.
        how: "lora" trains adapters beside the linear maps of the blocks and merges them; "full" trains the weights
            themselves, without norms, position tables and embeddings unless `include` names them.
        rank: of the adapters.
        adapter_scale: their factor, alpha / rank.
        learning_rate: AdamW's peak rate; 0 changes nothing.
        warm_up: steps over which the rate rises.
        decay: "linear" lets the rate fall towards 0 by the last step.
        epochs: how often every record to forget is seen; 0 changes nothing.
        steps: this many steps instead.
        batch_size: records to forget a step.
    """

    how: Literal["lora", "full"] = "lora"
    rank: Size = 16
    adapter_scale: Positive = 2.0
    learning_rate: Number = 1e-4
    warm_up: Count = 0
    decay: Literal["constant", "linear"] = "constant"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Size = 8

    def planned(self, n: int) -> int:
        """Steps over n records to forget."""
        return self.epochs * math.ceil(n / self.batch_size) if self.steps is None else self.steps


def selected(model_map: ModelMap, p: TrainingParameters) -> list[str]:
    """Names of the parameters that train.

    Raises:
        UsageError: a glob, block or role that matches nothing, or nothing is left.
        UnsupportedError: adapters beside stacked experts.
    """
    stacked, excluded = set[str](), tuple[str, ...]()
    if p.how == "lora":
        listed = [q for block in model_map.blocks for q in (*block.attention, *block.feed_forward)]
        stacked = {q.parameter for q in listed if q.experts is not None}
        names = [q.parameter for q in listed if q.experts is not None or _adaptable(model_map, q)]
        if not names:
            raise UsageError("expected linear maps in the blocks for `how: lora`, found none; use `how: full`")
    else:
        names, excluded = [name for name, _ in model_map.model.named_parameters()], model_map.default_exclude()
    if p.blocks != "auto":
        wanted = _from_end(p.blocks, len(model_map.blocks))
        names = [name for name in names if model_map.block_of(name) in wanted]
    if p.roles != "auto":
        names = _with_roles(model_map, names, p.roles)
    chosen = select_parameters(names, excluded, p.include, p.exclude)
    if found := stacked & set(chosen):
        raise UnsupportedError(
            f"expected linear maps for `how: lora`, found {len(found)} parameters of stacked experts; exclude them, or "
            "use `how: full`"
        )
    return chosen


def _adaptable(model_map: ModelMap, projection: Projection) -> bool:
    """Whether an adapter can stand beside a projection."""
    linear = isinstance(model_map.model.get_submodule(projection.module), (nn.Linear, Conv1D))
    return linear and projection.hookable and projection.role != "router"


def _from_end(blocks: Sequence[int], n: int) -> set[int]:
    for index in blocks:
        if not -n <= index < n:
            raise UsageError(f"expected blocks from {-n} to {n - 1}, found {index}")
    return {index % n for index in blocks}


def _with_roles(model_map: ModelMap, names: Sequence[str], roles: Collection[str]) -> list[str]:
    known = {role for name in names if (role := model_map.role_of(name))}
    for role in roles:
        if role not in known:
            raise UsageError(f"expected roles among {', '.join(sorted(known))}, found {role}")
    return [name for name in names if model_map.role_of(name) in roles]


def expect_stored(source: Checkpoint, model: nn.Module, names: Sequence[str]) -> None:
    """Refuse before training what could not be written; also the check of the unmodified model with its file.

    Raises:
        UnsupportedError: a parameter that the checkpoint does not store.
    """
    stored = source.disk_names(model)
    for name in names:
        if name not in stored:
            raise UnsupportedError(
                f"expected a parameter that the checkpoint stores, found {name}; leave it out of the edit"
            )


def head_before(model_map: ModelMap, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of the head's parameters that are among `names`, by name."""
    if model_map.task != "causal_lm":
        return {}
    inside = {id(parameter) for parameter in model_map.model.get_submodule(model_map.head).parameters()}
    every = dict(model_map.model.named_parameters())
    return {name: every[name].detach().clone() for name in names if id(every[name]) in inside}


@contextmanager
def _adapters(context: EditContext, names: Sequence[str], p: TrainingParameters) -> Iterator[list[nn.Parameter]]:
    """Adapters beside the linear maps named; those that share roles and come later in depth stay at zero."""
    model_map, wanted = context.model_map, set(names)
    listed = [(block, q) for block in model_map.blocks for q in (*block.attention, *block.feed_forward)]
    chosen = [(block, q) for block, q in listed if q.parameter in wanted]
    with training.adapters(
        context.model,
        model_map,
        rank=p.rank,
        alpha=p.adapter_scale * p.rank,
        roles={q.role for _, q in chosen},
        first_block=min(block.index for block, _ in chosen),
        seed=context.seed,
    ) as pairs:
        adapted = list(training.merged_deltas(context.model, model_map))
        halves = dict(zip(adapted, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        for parameter in pairs:
            parameter.requires_grad_(False)
        trained = [half for name in names for half in halves[name]]
        for half in trained:
            half.requires_grad_(True)
        yield trained


def trained(
    context: EditContext, names: Sequence[str], p: TrainingParameters, train: Callable[[list[nn.Parameter]], None]
) -> dict[str, Tensor]:
    """What training changes.

    Args:
        context: of the edit; its model is left as found, also on an exception.
        names: parameters of the model that train, from `selected`.
        p: what is put beside them, if anything.
        train: moves the tensors that it is given.

    Returns:
        The change of every parameter named, in float64 on the CPU.
    """
    own = dict(context.model.named_parameters())
    trainable: AbstractContextManager[list[nn.Parameter]]
    trainable = training.full(context.model, names) if p.how == "full" else _adapters(context, names, p)
    with trainable as tensors:
        train(tensors)
        if p.how == "lora":
            merged = training.merged_deltas(context.model, context.model_map)
            return {name: merged[name].to("cpu", torch.float64) for name in names}
        changes = {name: own[name].detach().to("cpu", torch.float64, copy=True) for name in names}
    for name, tensor in changes.items():
        tensor.sub_(own[name].detach().to("cpu", torch.float64))
    return changes


class Added:
    """An edit for `write_edited`: adds a difference to each tensor, in float64 and rounded once."""

    def __init__(self, differences: dict[str, Tensor]) -> None:
        self._differences = differences

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        difference = self._differences.pop(name, None)
        if difference is None or not difference.any():
            return None
        return torch.where(difference == 0, weight, (weight.double() + difference).to(weight.dtype))
