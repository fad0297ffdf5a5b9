"""Listening to linear maps while a model runs: what goes into each of them, and the gradient that comes back.

A linear map y_t = W x_t sees one row x_t per position t. A `Listener` hands over x [n, q] as it passes forward and
g [n, p], the gradient of the summed losses with respect to y, as it passes backward: restricted to the positions that
count, each row with the record it belongs to. What is a row depends on the map:

- `Linear` and `Conv1D` (GPT-2; the transposed weight changes neither x nor g): the last dimension of the activations;
- convolutions: the unfolded patches, one row per output pixel;
- experts stacked in one parameter: the rows of the tokens that were routed to expert e. Their code multiplies by W[e]
  without a module of its own, so the products are caught while the owning module runs; a router's bare weight too.

Nothing else is computed. Every parameter is frozen, so no weight gradient is formed, and the graph begins at the output
of the lowest map listened to: nothing below it is differentiated, and no gradient of its own input is computed.

Maps that read the same tensor (gate and up; q, k and v) are recognised as it happens, so that whoever adds up inputs
can do so once.

Shape letters: B records in a batch, T padded tokens, n rows that count, P output pixels, q = in, p = out features.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import Progress, default_batch_tokens, out_of_memory
from probes.modelmap import ModelMap, Projection
from probes.passes import Losses, gradients
from probes.records import ImageRecord, TokenRecord, length_batches

Positions = Literal["all", "predicting", "first"]
Forward = Callable[["Site", Tensor, Tensor, str], None]
Backward = Callable[["Site", Tensor | None, Tensor, Tensor], None]

IMAGES = 64  # images a batch where nothing else is asked for
PATCH_ELEMENTS = 1 << 24  # unfolded patches alive at once: 64 MB in fp32


@dataclass(frozen=True, slots=True)
class Site:
    """One linear map to listen to.

    Attributes:
        key: path of its module; `<parameter name>.<e>` for expert e of a stacked parameter.
        projection: the weight, as the model map lists it.
        expert: index in the parameter's first dimension, or None.
        block: index of its block, or None outside the blocks.
    """

    key: str
    projection: Projection
    expert: int | None
    block: int | None


# ------------------------------------------------------------------------------------------------------ which maps


def sites(
    model_map: ModelMap,
    globs: Sequence[str] | None = None,
    *,
    blocks: Collection[int] | None = None,
    roles: Collection[str] | None = None,
) -> list[Site]:
    """Linear maps of a model, in depth order.

    Args:
        model_map: map of the model.
        globs: shell patterns over keys; every map of the blocks by default. What lies outside the blocks (the patch
            projection, Swin's merging, the head of a classifier) has to be asked for.
        blocks: keep only maps of these blocks.
        roles: keep only maps with these roles (q, gate, down, ...).

    Returns:
        At least one site. Maps without a rule are left out unless a pattern matches nothing else: grouped
        convolutions, fused weights of `nn.MultiheadAttention`, subclasses of `Linear` that compute something else,
        weights used in two places, and the output head of a language model.

    Raises:
        UsageError: a pattern, block or role that matches nothing.
        UnsupportedError: a pattern that matches only maps without a rule.
    """
    model_map.expect_single()
    usable: list[Site] = []
    refused: dict[str, str] = {}
    for projection in _in_depth_order(model_map):
        reason = _no_rule(model_map, projection)
        for site in _sites_of(model_map, projection):
            if reason is None:
                usable.append(site)
            else:
                refused[site.key] = reason
    for glob in globs or ():
        if any(fnmatchcase(site.key, glob) for site in usable):
            continue
        if without_rule := [key for key in refused if fnmatchcase(key, glob)]:
            key = without_rule[0]
            raise UnsupportedError(f"expected linear maps that can be listened to, found {key}: {refused[key]}")
        close = get_close_matches(glob, [site.key for site in usable], n=3, cutoff=0.4)
        hint = f"close names: {', '.join(close)}" if close else "keys are module paths, * matches anything"
        raise UsageError(f"expected modules of {type(model_map.model).__name__}, found none named {glob}; {hint}")
    n_blocks = len(model_map.blocks)
    for index in blocks or ():
        if not 0 <= index < n_blocks:
            raise UsageError(f"expected blocks from 0 to {n_blocks - 1}, found {index}")
    known = sorted({site.projection.role for site in usable})
    for role in roles or ():
        if role not in known:
            raise UsageError(f"expected roles among {', '.join(known)}, found {role}")
    chosen = [
        site
        for site in usable
        if (site.block is not None if globs is None else any(fnmatchcase(site.key, glob) for glob in globs))
        and (blocks is None or site.block in blocks)
        and (roles is None or site.projection.role in roles)
    ]
    if not chosen:
        raise UsageError("expected at least one linear map, found none with these modules, blocks and roles together")
    return chosen


def _in_depth_order(model_map: ModelMap) -> Iterator[Projection]:
    inner = list(model_map.projections())
    listed = {projection.parameter for projection in inner}
    rest = [projection for projection in model_map.linear_modules() if projection.parameter not in listed]
    yield from (projection for projection in rest if projection.role != "head")
    yield from inner
    yield from (projection for projection in rest if projection.role == "head")


def _sites_of(model_map: ModelMap, projection: Projection) -> list[Site]:
    name, block = projection.parameter, model_map.block_of(projection.parameter)
    if projection.experts is not None:
        return [Site(f"{name}.{e}", projection, e, block) for e in range(projection.experts)]
    key = projection.module if projection.hookable or name == f"{projection.module}.weight" else name
    return [Site(key, projection, None, block)]


def _no_rule(model_map: ModelMap, projection: Projection) -> str | None:
    """Why a projection cannot be listened to, or None."""
    if projection.role == "head" and model_map.task == "causal_lm":
        return "the output head of a language model, whose factor would be as wide as the vocabulary, squared"
    if projection.parameter in model_map.tied.values():
        return "a weight that is used in two places"
    if projection.hookable:
        module = model_map.model.get_submodule(projection.module)
        return None if is_linear_map(module) else f"a {type(module).__name__} that is not one plain linear map"
    if projection.experts is None and projection.role != "router":
        return "one of several weights inside a module that computes more"
    return None


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module computes y = x W^T + b (`Linear`, `Conv1D`) or a convolution without groups, and no more.

    A subclass of `Linear` with a forward of its own (Falcon's, for one) is tried on two rows.
    """
    forward = type(module).forward
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1 and forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and _multiplies(module)


def _multiplies(module: nn.Linear) -> bool:
    weight = module.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)  # [2, q]
    with torch.no_grad():
        try:
            y = module.forward(x)
        except (RuntimeError, TypeError):  # it wants something else
            return False
        tolerance = 8 * torch.finfo(weight.dtype).eps * float(weight.abs().sum(1).max() + 1)
        expected = functional.linear(x, weight, module.bias)  # [2, p]
        return isinstance(y, Tensor) and torch.allclose(y, expected, rtol=0.0, atol=tolerance)


def patches(module: nn.Module, images: Tensor) -> Tensor:
    """What a convolution multiplies its weight by.

    Args:
        module: a convolution in one, two or three dimensions, without groups; any stride, padding and dilation.
        images: [B, C, *size].

    Returns:
        [B, P, C * kernel area], P output pixels, in the order of `weight.flatten(1)`; so that
        `patches(m, x) @ m.weight.flatten(1).T + m.bias` is `m(x).flatten(2).transpose(1, 2)`.
    """
    conv = cast(_ConvNd, module)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        images = functional.pad(images, conv._reversed_padding_repeated_twice, mode=mode)
    n = len(conv.kernel_size)
    for axis, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        images = images.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]  # a view: nothing is copied yet
    order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))  # [B, *pixels, C, *kernel]
    moved = images.permute(order)
    return moved.reshape(len(images), moved.shape[1 : 1 + n].numel(), -1)


# ---------------------------------------------------------------------------------------------- what a map's rows are


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Where the rows of one run of a map lie in its input and in its output."""

    index: Tensor | None  # [n] into the flattened leading dimensions; None: all of them, in order
    records: Tensor  # [n] which record of the batch each row belongs to, ascending; of a convolution [B]
    convolution: nn.Module | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """[n, width] of a tensor [..., width]."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))

    def pieces(self, x: Tensor | None, y: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor]]:
        """Rows of an input [B, C, *size] and an output [B, p, *pixels] of the convolution, a few images at a time."""
        some = cast(Tensor, x if y is None else y)
        size = len(some)
        if x is not None:
            conv = cast(_ConvNd, self.convolution)
            # Padded pixels over stride bound the output's: exact enough to bound memory.
            area = x[0].numel() * torch.Size(conv.kernel_size).numel() // torch.Size(conv.stride).numel()
            size = max(1, PATCH_ELEMENTS // max(1, area))
        for start in range(0, len(some), size):
            part = slice(start, start + size)
            xs = None if x is None else patches(cast(nn.Module, self.convolution), x[part])  # [b, P, q]
            ys = None if y is None else y[part].flatten(2).transpose(1, 2)  # [b, P, p]
            pixels = cast(Tensor, ys if xs is None else xs).shape[1]
            records = self.records[part].repeat_interleave(pixels)
            yield _merged(xs), _merged(ys), records


def _beyond_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its dimensions of size one, which change neither the number of rows nor their order."""
    return tuple(size for size in shape if size != 1)


def _merged(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.flatten(0, 1)  # [b, P, width] -> [b P, width]


@dataclass(slots=True, eq=False)
class _Input:
    """One tensor that went into one or more maps."""

    source: str  # key of the first site that read it
    tensor: weakref.ref[Tensor]
    rows: _Rows
    version: int
    held: Tensor | None  # the tensor itself, where it is wanted once more on the way back
    values: Tensor | None = None  # [n, q], selected once
    readers: int = 0  # maps whose gradient has yet to come back


# ---------------------------------------------------------------------------------------------------------- listening


class _Start(torch.autograd.Function):
    """Makes an output that needs no gradient one that does, in place: the graph begins here and nothing lies below."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Listener:
    """Hears the inputs of linear maps and the gradients of their outputs.

    Between `on()` and the end of its block, each batch is announced with `expect`, run forward and backward by the
    caller, and closed with `complete`; `listen` does all of it.

    Args:
        model: the model.
        sites: which maps; see `sites`.
        forward: called as forward(site, x [n, q], records [n], source) whenever a map runs. x may be a view of the
            activations: use it at once, or copy it. `records` says which record of the batch each row belongs to,
            ascending; `source` is the key of the site that was first to read the same tensor in this batch, its own
            key if it was itself. A map may come several times in a batch (patches of a few images at a time; a module
            that runs twice).
        backward: called as backward(site, x [n, q] or None, g [n, p], records [n]) when the gradient comes back, in
            which g is d (sum of weighted losses) / d y.
        keep: hand x to `backward` too. Sites that read the same tensor get the same object.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        forward: Forward | None = None,
        backward: Backward | None = None,
        keep: bool = False,
    ) -> None:
        self._model = model
        self._forward, self._backward, self._keep = forward, backward, keep
        self._modules = [site for site in sites if site.projection.hookable]
        self._bare: dict[str, dict[tuple[str, int | None], Site]] = {}  # owning module -> (parameter, expert) -> site
        for site in sites:
            if not site.projection.hookable:
                owned = self._bare.setdefault(site.projection.module, {})
                owned[site.projection.parameter, site.expert] = site
        self._expected = {site.projection.parameter for site in sites}
        self._parameters = dict(model.named_parameters())
        self._seen: set[str] = set()
        self._inputs: dict[tuple[int, Any], _Input] = {}
        self._latest: _Input | None = None
        self._anchor = torch.empty(0, requires_grad=True)
        self._shape: tuple[int, ...] = ()
        self._first = False
        self._counted: Tensor | None = None
        self._index: Tensor | None = None
        self._records = torch.empty(0, dtype=torch.long)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Listen while inside; the model is as before afterwards."""
        with ExitStack() as stack:
            for site in self._modules:
                module = self._model.get_submodule(site.projection.module)
                hook = module.register_forward_hook(partial(self._hear_module, site), with_kwargs=True)
                stack.callback(hook.remove)
            for path, owned in self._bare.items():
                stack.enter_context(self._overhear(self._model.get_submodule(path), owned))
            stack.callback(self._forget)
            yield

    def expect(self, shape: tuple[int, ...], positions: Tensor | None, *, first: bool = False) -> None:
        """Announce a batch.

        Args:
            shape: leading dimensions of its activations: (B, T), or (B,) for images.
            positions: [B, T] bool, which of them count; None for all.
            first: of images, count only the first position of each, where the class token is.
        """
        self._forget()
        self._shape, self._first = shape, first
        if positions is None:
            each = torch.Size(shape[1:]).numel()
            self._counted, self._index = None, None
            self._records = torch.arange(shape[0], device=self._device).repeat_interleave(each)
        else:
            self._counted = positions.flatten()  # [B T]
            self._index = self._counted.nonzero().squeeze(1).to(self._device)  # [n]
            self._records = self._index // shape[1]

    def complete(self) -> None:
        """Check that every map took part in the batch: a weight used behind its module's back would be missed.

        Raises:
            UnsupportedError: naming what was not heard.
        """
        if silent := sorted(self._expected - self._seen):
            more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            raise UnsupportedError(
                f"expected every weight to be used by its own module, found {silent[0]}{more} not used that way; "
                "leave it out by naming the modules wanted"
            )
        self._forget()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _forget(self) -> None:
        self._seen.clear()
        self._inputs.clear()
        self._latest = None

    # ------------------------------------------------------------------------------------------------ modules

    def _hear_module(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, _ConvNd):
            if self._first:
                raise UnsupportedError(f"expected maps that see a class token, found the convolution {site.key}")
            if len(self._shape) > 1 or x.ndim != 2 + len(module.kernel_size) or len(x) != self._shape[0]:
                raise self._misshapen(site, x)
            rows = _Rows(None, self._records, module)
        else:
            rows = self._rows(site, x)
        return self._hear(site, x, output, rows)

    def _rows(self, site: Site, x: Tensor) -> _Rows:
        """Which rows of an input [..., q] count, by its shape."""
        leading, batch = tuple(x.shape[:-1]), self._shape
        if len(batch) == 2:  # a text has one row per position, in two dimensions or in one
            if leading != (batch[0] * batch[1],) and _beyond_one(leading) != _beyond_one(batch):
                raise self._misshapen(site, x)
            return _Rows(self._index, self._records)
        if not leading or leading[0] % batch[0]:
            raise self._misshapen(site, x)
        if self._first:
            if leading[0] != batch[0] or len(leading) > 2:
                raise self._misshapen(site, x)
            if len(leading) == 1:
                return _Rows(None, self._records)
            return _Rows(self._records * leading[1], self._records)
        each = torch.Size(leading).numel() // batch[0]  # positions of an image, windows of it in a row included
        return _Rows(None, self._records.repeat_interleave(each))

    def _misshapen(self, site: Site, x: Tensor) -> UnsupportedError:
        shape = f"[{', '.join(map(str, self._shape))}, ...]"
        return UnsupportedError(
            f"expected activations {shape} in {site.key}, found {list(x.shape)}; leave it out by naming the modules "
            "wanted"
        )

    def _hear(self, site: Site, x: Tensor, output: Tensor, rows: _Rows) -> Tensor:
        """Report one run of a map; returns its output, with a gradient to listen to."""
        self._seen.add(site.projection.parameter)
        shared = self._input(site, x.detach(), x, rows)
        if self._forward is not None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # sums keep their own precision
                for values, records in self._values(shared, x):
                    self._forward(site, values, records, shared.source)
        if self._backward is None or not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = cast(Tensor, _Start.apply(output, self._anchor))  # type: ignore[no-untyped-call]
        shared.readers += 1
        output.register_hook(partial(self._hear_back, site, shared if self._keep else None, rows))  # type: ignore[no-untyped-call]
        return output

    def _input(self, site: Site, data: Tensor, x: Tensor, rows: _Rows) -> _Input:
        """What is known of a tensor: whether a map has read it before in this batch."""
        geometry = None
        if rows.convolution is not None:
            conv = cast(_ConvNd, rows.convolution)
            geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        known = self._inputs.get((id(x), geometry))
        if known is not None and known.tensor() is x and known.version == x._version:
            return known
        found = _Input(site.key, weakref.ref(x), rows, x._version, data if self._keep else None)
        self._inputs[id(x), geometry] = found
        return found

    def _values(self, shared: _Input, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of an input; selected once for maps that read it one after the other."""
        x = x.detach()
        if shared.rows.convolution is not None:
            for values, _, records in shared.rows.pieces(x, None):
                yield cast(Tensor, values), records
            return
        if shared.values is None:
            shared.values = shared.rows.take(x)
            if shared.rows.index is not None:  # a copy, so what becomes of the tensor no longer matters
                shared.held = None
            if not self._keep:  # only the latest: all of them together are as large as the activations
                if self._latest is not None:
                    self._latest.values = None
                self._latest = shared
        yield shared.values, shared.rows.records

    def _hear_back(self, site: Site, shared: _Input | None, rows: _Rows, gradient: Tensor) -> None:
        if shared is not None and shared.held is not None and shared.held._version != shared.version:
            raise UnsupportedError(f"expected inputs left alone, found one of {site.key} overwritten after its use")
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            self._report(cast(Backward, self._backward), site, shared, rows, gradient)
        if shared is not None:
            shared.readers -= 1
            if shared.readers == 0:  # the graph, and with it this hook, lives on until the whole backward pass is done
                shared.held = shared.values = None

    @staticmethod
    def _report(backward: Backward, site: Site, shared: _Input | None, rows: _Rows, gradient: Tensor) -> None:
        if rows.convolution is not None:
            for values, g, records in rows.pieces(None if shared is None else shared.held, gradient):
                backward(site, values, cast(Tensor, g), records)
            return
        if shared is not None and shared.values is None:
            shared.values = shared.rows.take(cast(Tensor, shared.held))
        backward(site, None if shared is None else shared.values, rows.take(gradient), rows.records)

    # ------------------------------------------------------------------------- weights without a module of their own

    @contextmanager
    def _overhear(self, owner: nn.Module, owned: dict[tuple[str, int | None], Site]) -> Iterator[None]:
        """Catch the products with bare weights of a module, whose plain implementation runs meanwhile."""
        running: list[_Overhearing] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            mode = _Overhearing(self, owner, owned, x)
            mode.__enter__()  # type: ignore[no-untyped-call]
            running.append(mode)

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if running:  # not if the module was refused before it began
                running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        config, name = getattr(owner, "config", None), "_experts_implementation_internal"
        with ExitStack() as stack:
            if config is not None and hasattr(config, name):  # grouped kernels hide the single products
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, "eager")
            stack.callback(owner.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(owner.register_forward_hook(end, always_call=True).remove)
            yield

    def _hear_product(self, site: Site, x: Tensor, output: Tensor, tokens: Tensor | None) -> Tensor:
        """Report the product of x with a bare weight; `tokens` [m] are the positions of its rows, None for all."""
        if tokens is None:
            return self._hear(site, x, output, self._rows(site, x))
        if x.ndim != 2 or len(x) != len(tokens) or len(self._shape) != 2:
            raise self._misshapen(site, x)
        record = tokens // self._shape[1]  # [m]
        counts = torch.ones_like(tokens) if self._counted is None else self._counted.to(tokens.device)[tokens]
        index = counts.nonzero().squeeze(1)  # [n]
        index = index[record[index].argsort(stable=True)]  # tokens come by the router's choice
        return self._hear(site, x, output, _Rows(index, record[index]))


_INDEXING = {Tensor.__getitem__, Tensor.index_select, torch.index_select}
_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double}
_PRODUCTS = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class _Overhearing(TorchFunctionMode):
    """Sees the operations of a module that keeps the weights of several experts, or a router's, as bare parameters.

    Two kinds matter. Indexing the module's input with the tokens routed to an expert tells which rows these are; and
    a product with W[e], recognised by its address in memory, is the linear map itself. Between an expert's first
    product and its second the rows stay in their order.
    """

    def __init__(
        self, listener: Listener, owner: nn.Module, owned: dict[tuple[str, int | None], Site], x: Tensor
    ) -> None:
        super().__init__()
        self._listener, self._owned, self._input = listener, owned, x
        names = {id(parameter): name for name, parameter in listener._parameters.items()}
        wanted = {name for name, _ in owned}
        self._weights = {  # every stack of experts: the first product tells the rows of the second
            name: parameter
            for parameter in owner.parameters(recurse=False)
            if (name := names[id(parameter)]) in wanted or parameter.ndim == 3
        }
        self._chosen: list[tuple[Tensor, Tensor]] = []  # (rows of the input, which ones), the latest only
        self._tokens: dict[int, Tensor] = {}  # expert -> which rows of the input it is given
        self._copies: list[tuple[Tensor, tuple[str, int | None]]] = []  # of weights, in the type a product is done in

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _INDEXING and args and self._is_input(args[0]):
            index = args[-1]
            if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long:
                self._chosen = [(result, index)]
        elif function in _PRODUCTS and len(args) > 1 and (which := self._weight(args[1])):
            return self._product(*which, args[0], result)
        elif function in _CASTS and args and (which := self._weight(args[0])):
            self._copies.append((result, which))
        return result

    def _weight(self, tensor: Any) -> tuple[str, int | None] | None:
        """Which weight a tensor is (name, expert): by its address, or as a copy in another type."""
        for copy, which in self._copies:
            if copy is tensor:
                return which
        for name, weight in self._weights.items():
            found, expert = _slice_of(tensor, weight)
            if found:
                return name, expert
        return None

    def _is_input(self, tensor: Tensor) -> bool:
        mine = self._input
        return (
            tensor.data_ptr() == mine.data_ptr()
            and tensor.numel() == mine.numel()
            and tensor.shape[-1] == mine.shape[-1]
            and tensor.ndim == 2
        )

    def _product(self, name: str, expert: int | None, x: Tensor, output: Tensor) -> Tensor:
        tokens = None
        if expert is not None:
            for rows, which in self._chosen:
                if rows is x:
                    self._tokens[expert] = which
            tokens = self._tokens.get(expert)
        site = self._owned.get((name, expert))
        if site is None:  # an expert nobody asked for, but its rows may serve the next product
            self._listener._seen.add(name)
            return output
        if expert is not None and tokens is None:
            raise UnsupportedError(
                f"expected experts that index their input by token, found {site.key} that does not; leave it out by "
                "naming the modules wanted"
            )
        return self._listener._hear_product(site, x, output, tokens)


def _slice_of(tensor: Tensor, weight: Tensor) -> tuple[bool, int | None]:
    """Whether a tensor is a weight (or its transpose), or which slice of a stacked one: by address."""
    matrix = weight if weight.ndim == 2 else weight[0]
    size = matrix.numel() * weight.element_size()
    offset = tensor.data_ptr() - weight.data_ptr()
    if tensor.numel() != matrix.numel() or tensor.dtype != weight.dtype or not 0 <= offset < weight.nbytes:
        return False, None
    return offset % size == 0, None if weight.ndim == 2 else offset // size


# ----------------------------------------------------------------------------------------------------------- running


def batches_of(
    records: Sequence[TokenRecord] | Sequence[ImageRecord], batch_tokens: int | None, device: torch.device
) -> list[list[int]]:
    """Indices of records in batches that depend on the records and the budget alone.

    Args:
        records: texts, or images of one shape.
        batch_tokens: padded tokens a batch, or images; by default `default_batch_tokens`, or 64 images.
        device: decides the default.

    Raises:
        UsageError: a budget below 1.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"expected batch_tokens of at least 1, found {batch_tokens}")
    if isinstance(records[0], TokenRecord):
        texts = cast("Sequence[TokenRecord]", records)
        return length_batches(texts, batch_tokens or default_batch_tokens(device))
    size = batch_tokens or IMAGES
    return [list(range(start, min(start + size, len(records)))) for start in range(0, len(records), size)]


def check_positions(
    model_map: ModelMap, records: Sequence[TokenRecord] | Sequence[ImageRecord], positions: Positions
) -> None:
    """Refuse positions that the records or the model do not have.

    Raises:
        UsageError: texts have "all" and "predicting", images "all" and "first".
        UnsupportedError: "first" for a model without a class token.
    """
    text = isinstance(records[0], TokenRecord)
    known = ("all", "predicting") if text else ("all", "first")
    if positions not in known:
        kind = "texts" if text else "images"
        raise UsageError(f"expected positions {' or '.join(known)} for {kind}, found {positions}")
    tokens = [name for name in model_map.embeddings if re.search("cls|class", name.rpartition(".")[2])]
    if positions == "first" and not tokens:
        kind = type(model_map.model).__name__
        raise UnsupportedError(f"expected a model with a class token for positions first, found {kind}; use all")


def listen(
    model: nn.Module,
    source: Losses,
    listener: Listener,
    batches: Sequence[Sequence[int]],
    *,
    positions: Positions = "all",
    compute_dtype: torch.dtype | None = None,
    begin: Callable[[Sequence[int]], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """One pass over batches of records, forward and backward, with a listener on.

    The loss is the plain sum of the losses, so what is heard of a record does not depend on its batch.

    Args:
        model: in evaluation mode meanwhile, all parameters frozen; as before afterwards.
        source: the records as losses.
        listener: hears every batch.
        batches: indices of records.
        positions: "all" (of a text the last token's does not count: it predicts nothing), "predicting" (those that
            predict a completion token) or "first" (of an image, the class token).
        compute_dtype: run the model in this type by autocast; None for its own.
        begin: called with each batch before it runs.
        progress: called with (records done, records in all).

    Raises:
        UnsupportedError: a map whose rows cannot be told apart.
        ResourceError: a batch does not fit in memory.
    """
    device = next(model.parameters()).device
    total, done = sum(map(len, batches)), 0
    lower = nullcontext() if compute_dtype is None else torch.autocast(device.type, compute_dtype)
    try:
        with gradients(model, {}, lambda name, gradient: None), listener.on():
            for batch in batches:
                if begin is not None:
                    begin(batch)
                which = source.positions(batch, "all" if positions == "first" else positions)
                listener.expect(source.shape(batch), which, first=positions == "first")
                ones = torch.ones(sum(source.lengths[i] for i in batch))
                with lower:
                    source.backward(batch, ones)
                listener.complete()
                done += len(batch)
                if progress is not None:
                    progress(done, total)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "expected memory for one batch and what is summed up over it, found too little; lower batch_tokens or "
            "memory_bytes, or name fewer modules"
        ) from None
