"""Groups of low-rank adapters, the proximal step that sets whole groups to zero, and the bounded forget loss.

An adapter adds s B A to a weight W [out, in], with A [r, in], B [out, r] and a factor s. A group g is the adapters of
one block, of one projection, or of one expert; B_g stands for all entries of its B, n_g of them. GS-LoRA (arXiv
2403.11530, 2501.09705) adds a group lasso to the loss, so that few blocks change. Here it is

    P = a sum_g sqrt(n_g) ||B_g||                     (the square root: Yuan and Lin's weight for groups of many sizes)

and is not differentiated but minimised exactly beside each optimiser step of rate h, by its proximal map

    B_g <- max(0, 1 - h a sqrt(n_g) / ||B_g||) B_g,      argmin_X  ||X - B_g||^2 / 2 + h a sqrt(n_g) ||X||,

after which a group is exactly zero or not. B alone is shrunk: B = 0 is the unchanged model whatever A is. AdamW moves
an entry by about h at most, so a group by h sqrt(n_g): `a` is the share of that which is taken back, and has the same
meaning for groups and models of any size. A group whose gradients keep their direction outruns a small `a`; one that
is moved by noise alone, which AdamW turns into steps of about a quarter of h, does not.

The bounded loss of a record with mean loss L_i is max(0, bound - L_i). Its gradient is exactly zero once L_i has
reached the bound: a record is pushed that far and no further.

Limits. The norm of B measures the change s B A only as long as A keeps its size; A trains at the same rate and is not
penalised. `product_norm` is the size of the change itself.

Shape letters: r rank, P records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from probes.modelmap import ModelMap, Projection

Grouping = Literal["block", "projection", "expert"]


@dataclass(frozen=True, slots=True)
class Group:
    """Projections whose adapters are kept or dropped together.

    Attributes:
        name: path of the block, of the projection's module, or of the expert.
        block: index of the block.
        projections: in the map's order.
    """

    name: str
    block: int
    projections: tuple[Projection, ...]


def groups_of(model_map: ModelMap, names: Sequence[str], by: Grouping) -> list[Group]:
    """Put projections into groups.

    Args:
        model_map: the map.
        names: parameters of projections in the blocks.
        by: "block"; "projection", each by itself; "expert": members of a list of modules inside a block each by
            themselves, the rest of the block together.

    Returns:
        The groups in depth order.
    """
    wanted, found = set(names), dict[str, tuple[int, list[Projection]]]()
    lists = {path for path, module in model_map.model.named_modules() if isinstance(module, nn.ModuleList)}
    for block in model_map.blocks:
        for projection in (*block.attention, *block.feed_forward):
            if projection.parameter not in wanted:
                continue
            name = block.name
            if by == "projection":
                name = projection.module
            elif by == "expert":
                name = _member(projection.module, block.name, lists) or block.name
            found.setdefault(name, (block.index, []))[1].append(projection)
    return [Group(name, index, tuple(projections)) for name, (index, projections) in found.items()]


def _member(path: str, block: str, lists: set[str]) -> str | None:
    """The outermost member of a list of modules, strictly inside the block, that holds the module at `path`."""
    parts = path.removeprefix(f"{block}.").split(".")
    ancestors = [".".join([block, *parts[:depth]]) for depth in range(1, len(parts) + 1)]
    return next((inner for outer, inner in pairwise(ancestors) if outer in lists), None)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries together, a scalar; its gradient at zero is zero."""
    total: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
    return total


def structure_loss(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """The published penalty without its factor: the sum over groups of the norm of all their tensors.

    Args:
        groups: the tensors of each group, A and B as published.

    Returns:
        A scalar that can be differentiated; the gradient of a tensor X of group g is X / ||g||, and 0 where ||g|| = 0.
    """
    return torch.stack([norm(tensors) for tensors in groups]).sum()


def shrink(groups: Sequence[Sequence[Tensor]], thresholds: Sequence[float]) -> list[float]:
    """The proximal map of sum_g t_g ||X_g||, in place: X_g <- max(0, 1 - t_g / ||X_g||) X_g.

    Args:
        groups: the tensors X_g of each group.
        thresholds: t_g, at least 0; 0 changes nothing.

    Returns:
        ||X_g|| afterwards; exactly 0.0 for a group that is zero.
    """
    if not groups:
        return []
    with torch.no_grad():
        norms = torch.stack([norm(tensors) for tensors in groups])  # [G]
        limits = torch.tensor(thresholds, dtype=norms.dtype, device=norms.device)  # [G]
        factors = torch.where(norms > limits, 1 - limits / norms, torch.zeros_like(norms))  # 0 / 0 is not taken
        for tensors, factor in zip(groups, factors, strict=True):
            for tensor in tensors:
                tensor.mul_(factor)
        return [float(x) for x in (norms * factors).tolist()]


def bounded(losses: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The bounded forget loss of each record.

    Args:
        losses: [P] mean loss of each record, nats.
        bound: nats.

    Returns:
        [P] max(0, bound - L_i), and [P] its slope: -1 below the bound, exactly 0 from there on.
    """
    return (bound - losses).clamp(min=0), -(losses < bound).to(losses)


def bounded_mean(losses: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The published form, max(0, bound - mean of a batch), as equal parts of its records; as for `bounded`.

    One record with a huge loss lifts the mean over the bound and so hides all others.
    """
    values, slopes = bounded(losses.mean()[None], bound)
    return values.expand_as(losses), slopes.expand_as(losses)


def product_norm(pairs: Sequence[tuple[Tensor, Tensor]], scale: float) -> float:
    """Frobenius norm of the changes s B A of a group, without forming one.

    ||B A||^2 = tr((B^T B) (A A^T)), two r by r matrices.

    Args:
        pairs: A [r, in] and B [out, r] of each adapter.
        scale: s.
    """
    total = 0.0
    for down, up in pairs:
        a, b = down.detach().double(), up.detach().double()
        total += float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0))
    return scale * math.sqrt(total)


class MovingAverage:
    """Exponential moving average of merged changes: E <- decay E + (1 - decay) D, from the first one on.

    It is the average of the changes s B A themselves and so of the merged weights. That of A and B apart would be
    another matrix, and averaging a model whose adapters are not merged (as published code does in sequences of tasks)
    leaves them out.

    Args:
        decay: in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.value: dict[str, Tensor] = {}

    def add(self, changes: dict[str, Tensor]) -> None:
        """Take the changes of one more step; one that is no longer given is zero."""
        if not self.value:
            self.value = {name: change.clone() for name, change in changes.items()}
            return
        for name, average in self.value.items():
            average.mul_(self._decay)
            if name in changes:
                average.add_(changes[name], alpha=1 - self._decay)
