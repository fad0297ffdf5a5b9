"""Squared per-example gradients of linear maps, from one batched forward and backward pass.

A linear map y = x W^T whose module runs once on a batch, one row per example, has the per-example weight gradient
G_b = g_b^T x_b, with x_b [P, I] what went in and g_b [P, O] the gradient that came back. So sum_b G_b^2 (element by
element) needs no backward pass per example, only x and g, which hooks see; with one position it is (g^2)^T x^2. The
bias has sum_p g_bp. `Conv1D` keeps the transposed weight; a convolution is a linear map of unfolded patches. The
arithmetic is that of the ordinary weight gradient, which autograd is spared in exchange.

Shape letters: B examples, P positions per example, I and O in- and out-features, L and R rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from probes.errors import UnsupportedError
from probes.modelmap import ModelMap, Projection
from probes.taps import is_linear_map, patches

TILE_ELEMENTS = 1 << 20  # per-example gradients or unfolded patches at once on a CPU: 4 MB in fp32 stays in the cache


class InseparableError(Exception):
    """A module does not see a batch as one row per example, once; the examples have to run one by one."""


def separable(model: nn.Module, model_map: ModelMap | None, wanted: Collection[str]) -> Taps | None:
    """Taps that give the per-example gradients of every wanted parameter, or None if one of them has no rule.

    Whether modules really see one row per example, once, shows when they run (`InseparableError`). What cannot be
    seen is a module that runs once and whose weight other code reads as well.
    """
    if model_map is None or model_map.model is not model:
        try:
            model_map = ModelMap.of(model)
        except UnsupportedError:  # a plain classifier the map cannot read still has gradients
            return None
    owners = {
        name: projection
        for projection in model_map.linear_modules()
        if is_linear_map(model.get_submodule(projection.module))
        for name in (projection.parameter, projection.bias)
    }
    head = model_map.head if model_map.task == "causal_lm" else None  # `apart` takes care of a language model's head
    chosen = {}
    for name in wanted:
        owner = owners.get(name)
        if owner is None or name in model_map.tied.values():
            return None
        if owner.module != head:
            chosen[owner.module] = owner
    return Taps(model, list(chosen.values()), wanted)


class Taps:
    """Squared per-example gradients of linear maps, from their inputs and output gradients.

    The maps' own parameters need no gradient: autograd is spared the weight gradients, which are formed here, one
    example or a few at a time in one small buffer.
    """

    def __init__(self, model: nn.Module, projections: Sequence[Projection], wanted: Collection[str]) -> None:
        self._modules = {p.module: model.get_submodule(p.module) for p in projections}
        self._projections = projections
        self.names = {name for p in projections for name in (p.parameter, p.bias) if name in wanted}
        self._totals: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._shape: tuple[int, ...] = ()
        self._buffer: Tensor | None = None

    @contextmanager
    def on(self, totals: dict[str, Tensor]) -> Iterator[None]:
        """Listen while inside; squares are added to `totals`."""
        self._totals = totals
        with ExitStack() as stack:
            for projection in self._projections:
                module = self._modules[projection.module]
                stack.callback(module.register_forward_pre_hook(self._lift).remove)
                stack.callback(module.register_forward_hook(partial(self._tap, projection)).remove)
            yield

    def expect(self, shape: tuple[int, ...]) -> None:
        """Announce the leading dimensions of the next batch."""
        self._seen.clear()
        self._shape = shape

    def complete(self) -> None:
        """Check that every map ran in this batch; a weight used behind its module's back would be missed."""
        if len(self._seen) != len(self._projections):
            raise InseparableError

    @staticmethod
    def _lift(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Start the graph at the first map: nothing below it needs a gradient, but its output does."""
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise InseparableError
        return None if inputs[0].requires_grad else (inputs[0].detach().requires_grad_(),)

    def _tap(self, projection: Projection, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        n = len(self._shape)
        if projection.module in self._seen or x.shape[:n] != self._shape or x.ndim <= n or not output.requires_grad:
            raise InseparableError
        self._seen.add(projection.module)
        version = x._version

        def add(gradient: Tensor) -> None:
            if x._version != version:  # overwritten by an in-place operation since
                raise InseparableError
            self._add(projection, module, x, gradient)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def _add(self, projection: Projection, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        """Bring x and the output gradient to the form [B, P, I] and [B, P, O]."""
        if not isinstance(module, _ConvNd):
            inputs, outputs = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, gradient))
            self._add_linear(projection, inputs, outputs)
            return
        size = _at_once(projection.in_features * gradient[0, 0].numel(), x)
        for images, outputs in zip(_parts(x, size), _parts(gradient, size), strict=True):
            self._add_linear(projection, patches(module, images), outputs.flatten(2).transpose(1, 2))

    def _add_linear(self, projection: Projection, inputs: Tensor, outputs: Tensor) -> None:
        bias, weight = self._totals.get(projection.bias or ""), self._totals.get(projection.parameter)
        if bias is not None:
            bias.add_(outputs.to(bias.dtype).sum(1).square_().sum(0))
        if weight is not None:
            left, right = (inputs, outputs) if projection.orientation == "in_out" else (outputs, inputs)
            self._add_squares(weight.view(len(weight), -1), left.to(weight.dtype), right.to(weight.dtype))

    def _add_squares(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Total [L, R] += sum_b (left_b^T right_b)^2 for left [B, P, L] and right [B, P, R]."""
        if left.shape[1] == 1:
            total.addmm_(left[:, 0].square().t(), right[:, 0].square())
            return
        size = min(len(left), _at_once(total.numel(), total))
        if self._buffer is None or self._buffer.numel() < size * total.numel() or self._buffer.device != total.device:
            self._buffer = total.new_empty(size * total.numel())
        tile = self._buffer[: size * total.numel()].view(size, *total.shape)
        for a, b in zip(_parts(left, size), _parts(right, size), strict=True):
            part = torch.bmm(a.transpose(1, 2), b, out=tile[: len(a)])
            if size == 1:
                total.addcmul_(part[0], part[0])
            else:
                total.add_(part.square_().sum(0))


def _at_once(elements: int, like: Tensor) -> int:
    """How many examples of so many elements each to treat together; an accelerator wants more at a time."""
    return max(1, TILE_ELEMENTS * (1 if like.device.type == "cpu" else 64) // elements)


def _parts(tensor: Tensor, size: int) -> Iterator[Tensor]:
    return (tensor[start : start + size] for start in range(0, len(tensor), size))
