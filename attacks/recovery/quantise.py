"""Round the weights to a coarse grid and back: does what an edit pushed down by a little come up again?

Zhang et al. (arXiv 2410.16454) report models that keep 21 % of what they were made to forget in full precision and
83 % after 4-bit quantisation. Round to nearest, no calibration data, the same bytes every time, on the CPU:

    int8, int4, int3   W ~ s c,        c = round(W / s) in -q..q,              s = max |W| / q, q = 2^(bits-1) - 1
    ...-asymmetric     W ~ s (c - z),  c = round(W / s) + z in 0..2^bits - 1,  s = (max - min) / (2^bits - 1)
    nf4                W ~ m t[c],     t[c] next to W / m,                     m = max |W|

over groups of weights of one output, taken along the input axis; a last shorter group is a group. By default int8 has
one group (a scale for each output), int4 and int3 groups of 128, NF4 blocks of 64. A range that does not hold zero is
widened to it, so that zero stays zero. Scales keep 16 significant bits: every point of the grid then is a float32
number, and weights that lie on their grid already do not change.

NF4 (Dettmers et al., arXiv 2305.14314): with p = 1 - (1/30 + 1/32) / 2 and the normal quantile function Q, the table
is 8 values Q(p)..Q(.5) and 7 values -Q(p)..-Q(.5), each evenly spaced in probability without the end at zero, and zero
itself, divided by Q(p).

`gguf:...` and `bnb:...` go through the packages gguf and bitsandbytes, where these are installed: what their users run,
up to their kernels. bitsandbytes counts blocks through the rows of a matrix, so its NF4 is this one exactly where the
input width is a multiple of 64. A row whose length is no multiple of a GGUF block is filled up with its last weight.

Why an edit may or may not survive is not obvious. Most weights of a small edit stay in their bin, yet rounding acts as
dither: those that cross a bin carry the edit in the mean. `diagnostics` gives the share of codes that differ between
both rounded checkpoints, and how much of the edit is left in their difference:

    projection = <Q(U) - Q(O), U - O> / ||U - O||^2            cosine = the same over both norms

Limits: weights only; activations, and kernels that compute in another precision, are not imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional

from attacks.recovery.weights import changed, targets
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap

_BITS = {"int8": 8, "int4": 4, "int3": 3}
_GROUP = {8: None, 4: 128, 3: 128}  # weights that share a scale; None: all of one output
_NF4_BLOCK = 64
OWN = (*_BITS, *(f"{name}-asymmetric" for name in _BITS), "nf4")
GGUF = tuple(f"gguf:{kind}" for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))  # what the package can quantise to
BITSANDBYTES = ("bnb:nf4", "bnb:int8")
SCHEMES = (*OWN, *GGUF, *BITSANDBYTES)
_PART = 1 << 22  # weights rounded at a time

Rounded = tuple[Tensor, Tensor | None]
Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]


@cache
def nf4_table() -> tuple[float, ...]:
    """The 16 values of 4-bit NormalFloat in increasing order, -1 to 1, as float32 numbers."""
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([below, [0.0], above])) / norm.ppf(end)
    return tuple(values.astype(np.float32).astype(np.float64).tolist())


def quantised(weight: Tensor, scheme: str, group: int | None = None, in_axis: int = -1) -> Rounded:
    """One weight tensor rounded to the grid of a scheme.

    Args:
        weight: of any shape; every vector along `in_axis` belongs to one output.
        scheme: one of `SCHEMES`.
        group: weights that share a scale, for the schemes of `OWN`; None for the scheme's own (see above).
        in_axis: the axis the input runs along.

    Returns:
        The rounded weights, in the shape of `weight`, on the CPU, float32 (float64 for float64 weights), and the codes
        [same shape] int16, or None where a package keeps them packed.

    Raises:
        UsageError: an unknown scheme, a group below 1, or a group for a package's scheme.
        UnsupportedError: weights that are not finite.
        ResourceError: a package that is not installed.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"expected a quantisation scheme of {', '.join(SCHEMES)}, found another name")
    if group is not None and (group < 1 or scheme not in OWN):
        raise UsageError(f"expected a positive group for {', '.join(OWN)}, found {group} for {scheme}")
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    moved = weight.detach().cpu().movedim(in_axis, -1)  # [..., in]
    if not bool(moved.isfinite().all()):
        raise UnsupportedError("expected finite weights, found infinite ones or NaN; check the checkpoint")
    rows = moved.reshape(-1, moved.shape[-1])  # [outputs, in]
    values, codes = _round(rows, scheme, group)

    def back(tensor: Tensor) -> Tensor:
        return tensor.reshape(moved.shape).movedim(-1, in_axis)

    return back(values.to(exact)), None if codes is None else back(codes)


def quantisation(
    model: nn.Module,
    scheme: str,
    group: int | None = None,
    *,
    model_map: ModelMap | None = None,
    head: bool = False,
    embeddings: bool = False,
) -> AbstractContextManager[tuple[str, ...]]:
    """The model with the linear maps of its blocks quantised and back, inside a `with` block.

    Args:
        model: a causal language model or an image classifier; as found afterwards, bit for bit.
        scheme: one of `SCHEMES`.
        group: see `quantised`.
        model_map: the model's map, built when absent.
        head: the output head as well.
        embeddings: token tables and patch projection as well.

    Returns:
        A context manager that yields the names of the tensors changed; it raises what `quantised` raises.
    """
    places = targets(
        model_map if model_map is not None and model_map.model is model else ModelMap.of(model),
        head=head,
        embeddings=embeddings,
    )

    def edit(name: str, weight: Tensor) -> Tensor:
        return places[name].through(lambda matrix, axis: quantised(matrix, scheme, group, axis)[0], weight)

    return changed(model, edit, places)


# ------------------------------------------------------------------------------------------------------- rounding


def _round(rows: Tensor, scheme: str, group: int | None) -> Rounded:
    """Rounded rows [outputs, in] and their codes."""
    if scheme in GGUF:
        return _gguf(rows.float(), scheme.removeprefix("gguf:")), None
    if scheme in BITSANDBYTES:
        return _bitsandbytes(rows, scheme.removeprefix("bnb:")), None
    name, _, kind = scheme.partition("-")
    rounding: Rounding
    if name == "nf4":
        rounding, own = _nf4, _NF4_BLOCK
    else:
        bits = _BITS[name]
        rounding, own = _asymmetric(bits) if kind else _symmetric(bits), _GROUP[bits] or rows.shape[-1]
    size = max(1, min(group or own, rows.shape[-1]))
    parts = torch.split(rows, max(1, _PART // max(1, rows.shape[-1])))
    found = [_grouped(part, size, rounding) for part in parts]
    return torch.cat([values for values, _ in found]), torch.cat([codes for _, codes in found])


def _grouped(rows: Tensor, size: int, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Round rows [outputs, in] in groups; the zeros that fill up the last one change no scale."""
    width = rows.shape[-1]
    filled = functional.pad(rows.double(), (0, -width % size))
    values, codes = rounding(filled.reshape(len(rows), -1, size))  # [outputs, groups, size]
    return values.flatten(1)[:, :width], codes.flatten(1)[:, :width].to(torch.int16)


def _symmetric(bits: int) -> Rounding:
    top = 2 ** (bits - 1) - 1

    def rounding(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = _short(x.abs().amax(-1, keepdim=True) / top)  # [outputs, groups, 1]
        codes = (x / _nonzero(scale)).round_().clamp_(-top, top)
        return codes * scale, codes

    return rounding


def _asymmetric(bits: int) -> Rounding:
    top = 2**bits - 1

    def rounding(x: Tensor) -> tuple[Tensor, Tensor]:
        low = x.amin(-1, keepdim=True).clamp(max=0.0)  # [outputs, groups, 1]
        high = x.amax(-1, keepdim=True).clamp(min=0.0)
        scale = _short((high - low) / top)
        zero = (-low / _nonzero(scale)).round_()
        codes = (x / _nonzero(scale)).round_().add_(zero).clamp_(0, top)
        return (codes - zero) * scale, codes

    return rounding


def _nf4(x: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.tensor(nf4_table(), dtype=torch.float64)  # [16]
    largest = x.abs().amax(-1, keepdim=True)  # [outputs, blocks, 1]
    codes = torch.bucketize((x / _nonzero(largest)).contiguous(), (table[1:] + table[:-1]) / 2)
    return table[codes] * largest, codes


def _short(scale: Tensor) -> Tensor:
    """Rounded to 16 significant bits: times a code of up to 8 bits it still is a float32 number."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2.0**16).round_(), exponent - 16)


def _nonzero(scale: Tensor) -> Tensor:
    """Something to divide by in groups of zeros."""
    return scale.masked_fill(scale == 0, 1.0)


def _gguf(rows: Tensor, kind: str) -> Tensor:
    package = _package("gguf")
    dtype = package.GGMLQuantizationType[kind]
    block = package.GGML_QUANT_SIZES[dtype][0]
    width = rows.shape[-1]
    filled = np.pad(rows.numpy(), ((0, 0), (0, -width % block)), mode="edge")
    found = package.quants.dequantize(package.quants.quantize(filled, dtype), dtype)
    return torch.from_numpy(np.array(found[:, :width], dtype=np.float32))


def _bitsandbytes(rows: Tensor, kind: str) -> Tensor:
    package = _package("bitsandbytes").functional
    found: Tensor
    if kind == "nf4":
        packed, state = package.quantize_4bit(
            rows.float().contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )
        found = package.dequantize_4bit(packed, state)
    else:
        codes, largest, _ = package.int8_vectorwise_quant(rows.half().contiguous())
        found = codes.double() * largest.double()[:, None] / 127
    return found


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError):  # the last two: bitsandbytes beside a driver it does not know
        raise ResourceError(f"expected the package {name}, found none that loads; pip install {name}") from None


# ----------------------------------------------------------------------------------------------------- diagnostics


@dataclass(frozen=True, slots=True)
class CodeChange:
    """How much of an edit is left between both checkpoints when both are quantised; sums add up over tensors.

    Attributes:
        weights: how many were compared.
        changed: how many got another code; None where codes are not known.
        overlap: <Q(U) - Q(O), U - O>.
        edit: ||U - O||^2.
        rounded: ||Q(U) - Q(O)||^2.
    """

    weights: int
    changed: int | None
    overlap: float
    edit: float
    rounded: float

    @property
    def share(self) -> float | None:
        """Share of the codes that differ."""
        return None if self.changed is None or not self.weights else self.changed / self.weights

    @property
    def projection(self) -> float | None:
        """How much of the edit is left along the edit; 1 is all of it. None without an edit."""
        return self.overlap / self.edit if self.edit else None

    @property
    def cosine(self) -> float | None:
        """Cosine between the edit and what is left of it. None where either is zero."""
        size = (self.edit * self.rounded) ** 0.5
        return self.overlap / size if size else None


def diagnostics(
    original: Tensor, edited: Tensor, scheme: str, group: int | None = None, in_axis: int = -1
) -> CodeChange:
    """Compare one tensor of both checkpoints after quantisation.

    Args:
        original: the tensor before the edit.
        edited: the same after it.
        scheme: one of `SCHEMES`.
        group: see `quantised`.
        in_axis: see `quantised`.

    Raises:
        UsageError: tensors of different shapes, and what `quantised` raises.
    """
    if original.shape != edited.shape:
        raise UsageError(f"expected tensors of one shape, found {list(original.shape)} and {list(edited.shape)}")
    before, after = original.detach().cpu().double(), edited.detach().cpu().double()
    if torch.equal(before, after):
        return CodeChange(before.numel(), 0, 0.0, 0.0, 0.0)
    (from_original, codes), (from_edited, others) = (
        quantised(tensor, scheme, group, in_axis) for tensor in (original, edited)
    )
    edit, rounded = after - before, from_edited.double() - from_original.double()
    return CodeChange(
        weights=edit.numel(),
        changed=None if codes is None or others is None else int((codes != others).sum()),
        overlap=float((rounded * edit).sum()),
        edit=float(edit.square().sum()),
        rounded=float(rounded.square().sum()),
    )


def summed(changes: Iterable[CodeChange]) -> CodeChange:
    """Several tensors as one."""
    every = list(changes)
    codes = [one.changed for one in every]
    known = [count for count in codes if count is not None]
    return CodeChange(
        weights=sum(one.weights for one in every),
        changed=sum(known) if len(known) == len(codes) else None,
        overlap=sum(one.overlap for one in every),
        edit=sum(one.edit for one in every),
        rounded=sum(one.rounded for one in every),
    )
