"""Set weights to zero or add noise: does what an edit pushed down by a little come up again?

Sparsified models answer queries they were made to forget (arXiv 2602.00577). Three edits of every weight tensor W:

    magnitude     the round(share n) of its n weights with the smallest |W| are zero; of equal ones the first (in the
                  order of the tensor's elements) go first, so that the count is exact
    two to four   of every four weights of one output, taken along the input axis, at most two are left: those with the
                  largest |W|, of equal ones the later. Of a last group of three one goes, of a shorter one none
    noise         W + size * rms(W) * N(0, 1), drawn for each tensor from (seed, name): the order of tensors and the
                  choice of others do not matter

Nothing is trained afterwards. An edit that survives says nothing about pruning with calibration data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.recovery.weights import Target, changed, targets
from probes.errors import UsageError
from probes.modelmap import ModelMap


def magnitude(weight: Tensor, share: float) -> Tensor:
    """A tensor without the smallest of its weights.

    Args:
        weight: of any shape.
        share: of the weights, from 0 to 1; round(share n) of them become zero.

    Raises:
        UsageError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UsageError(f"expected a share of weights in [0, 1], found {share}")
    count = round(share * weight.numel())
    if count == 0:
        return weight.detach().clone()
    size = weight.detach().abs().flatten()  # [n]
    limit = size.kthvalue(count).values
    gone = size < limit
    ties = (size == limit).nonzero().flatten()  # ascending
    gone[ties[: count - int(gone.sum())]] = True
    return weight.detach().masked_fill(gone.view(weight.shape), 0.0)


def two_of_four(weight: Tensor, in_axis: int = -1) -> Tensor:
    """A tensor with at most two of every four weights left (2:4 sparsity).

    Args:
        weight: of any shape; every vector along `in_axis` belongs to one output.
        in_axis: the axis the input runs along.
    """
    moved = weight.detach().movedim(in_axis, -1)  # [..., in]
    width = moved.shape[-1]
    size = functional.pad(moved.abs(), (0, -width % 4), value=-1.0)
    size = size.reshape(*moved.shape[:-1], -1, 4)  # [..., groups, 4]
    gone = torch.zeros_like(size, dtype=torch.bool)
    gone.scatter_(-1, size.argsort(dim=-1, stable=True)[..., :2], True)  # what fills up the last group goes first
    return moved.masked_fill(gone.flatten(-2)[..., :width], 0.0).movedim(-1, in_axis)


def noisy(weight: Tensor, size: float, seed: int, name: str) -> Tensor:
    """A tensor with Gaussian noise.

    Args:
        weight: of any shape and floating type.
        size: standard deviation of the noise over the root mean square of the tensor, at least 0.
        seed: with `name` it decides the draw, whatever the global random state, which is left alone.
        name: of the tensor.

    Returns:
        [same shape] float32 on the CPU (float64 for float64 weights).

    Raises:
        UsageError: a negative size.
    """
    if not size >= 0:
        raise UsageError(f"expected a noise size of at least 0, found {size}")
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = weight.detach().cpu().to(exact)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(key)
    drawn = torch.randn(values.shape, generator=generator, dtype=exact)
    scale = size * float(values.double().square().mean().sqrt()) if values.numel() else 0.0
    return values + scale * drawn


def pruning(
    model: nn.Module,
    how: float | str,
    *,
    model_map: ModelMap | None = None,
    head: bool = False,
    embeddings: bool = False,
) -> AbstractContextManager[tuple[str, ...]]:
    """The model with the linear maps of its blocks pruned, inside a `with` block.

    Args:
        model: a causal language model or an image classifier; as found afterwards, bit for bit.
        how: a share of each tensor's weights, or "2:4".
        model_map: the model's map, built when absent.
        head: the output head as well.
        embeddings: token tables and patch projection as well.

    Returns:
        A context manager that yields the names of the tensors changed.

    Raises:
        UsageError: neither a share in [0, 1] nor "2:4".
    """
    if isinstance(how, str):
        if how != "2:4":
            raise UsageError('expected a share of weights or "2:4", found other words')
        return _each(model, lambda place, w: place.through(two_of_four, w), model_map, head, embeddings)
    if not 0 <= how <= 1:
        raise UsageError(f"expected a share of weights in [0, 1], found {how}")
    return _each(model, lambda place, w: magnitude(w, how), model_map, head, embeddings)


def noise(
    model: nn.Module,
    size: float,
    *,
    seed: int = 0,
    model_map: ModelMap | None = None,
    head: bool = False,
    embeddings: bool = False,
) -> AbstractContextManager[tuple[str, ...]]:
    """The model with Gaussian noise on the linear maps of its blocks, inside a `with` block.

    Args:
        model: a causal language model or an image classifier; as found afterwards, bit for bit.
        size: standard deviation of the noise over the root mean square of each tensor, at least 0.
        seed: of the draw.
        model_map: the model's map, built when absent.
        head: the output head as well.
        embeddings: token tables and patch projection as well.

    Returns:
        A context manager that yields the names of the tensors changed.

    Raises:
        UsageError: a negative size.
    """
    if not size >= 0:
        raise UsageError(f"expected a noise size of at least 0, found {size}")
    return _each(model, lambda place, w: noisy(w, size, seed, place.name), model_map, head, embeddings)


def _each(
    model: nn.Module,
    edit: Callable[[Target, Tensor], Tensor],
    model_map: ModelMap | None,
    head: bool,
    embeddings: bool,
) -> AbstractContextManager[tuple[str, ...]]:
    mapped = model_map if model_map is not None and model_map.model is model else ModelMap.of(model)
    places = targets(mapped, head=head, embeddings=embeddings)
    return changed(model, lambda name, weight: edit(places[name], weight), places)
