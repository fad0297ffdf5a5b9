"""Edit read-out: what the difference of two checkpoints says about the edit, and about what was removed.

For a tensor W and its edited copy W' with D = W' - W and singular values s_1 >= s_2 >= ... of D

    relative change   ||D|| / ||W||            (Frobenius norms)
    changed           share of elements that differ at all
    stable rank       sum s_i^2 / s_1^2
    effective rank    exp(entropy of s_i / sum s)                               (Roy and Vetterli 2007)
    directions        fewest i with s_1^2 + ... + s_i^2 >= 90 % of the sum

and for blocks and roles the share of the whole ||D||^2 that they hold. All of them are the same for D and its
transpose, so the orientation of a weight does not matter.

`telling` turns both checkpoints into a membership test of what was removed: the score of a record is the rise of its
loss, nll(edited) - nll(original). An attacker who holds both checkpoints reads the forget set off the records whose
loss rose most (reported up to 99 % correct, EMNLP 2025). A model retrained without the records shows such a rise too:
its figure is what honest removal gives away, and it stands beside that of the edit.

Limits: singular values of matrices whose smaller side is above `largest` come from a randomised subspace iteration
(Halko et al. 2011) for the top directions only; `exact` is False there, the stable rank is then too large by the
error of s_1, and a figure that the top directions do not settle is None. Of stacked experts the rank figures are those
of the expert that changed most. Weights are compared in the edited model's own number type.

Shape letters: m rows, n columns of a matrix, s its smaller side, k top directions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from attacks.membership.evaluate import FPRS, Membership, evaluate
from probes.errors import IntegrityError, UsageError
from probes.modelmap import ModelMap
from probes.statistics import Clusters

LARGEST = 1024  # smaller side up to which the whole spectrum is computed
TOP = 32  # directions of a larger matrix
ENERGY = 0.9  # share of the squared norm that `directions` explain
OVERSAMPLED, POWERS = 8, 4  # of the randomised iteration
ROWS = 4096  # rows of a long matrix held in double precision at once
SETTLED = 1e-6  # share of the squared norm that may be left over where top directions stand for all of them


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """What happened to one parameter.

    Attributes:
        name: as in `named_parameters()`.
        role: see `ModelMap.roles`.
        block: index of its block; None outside the blocks.
        elements: numbers in it.
        changed: share of them that differ, in [0, 1].
        norm: Frobenius norm before the edit.
        change: Frobenius norm of the difference.
        relative: change / norm; None where the tensor was all zeros before.
        stable_rank: of the difference, at least 1; None for a vector, and where nothing changed.
        effective_rank: likewise; None also where the top directions of a large matrix do not settle it.
        directions: singular directions that hold 90 % of the squared norm; None likewise.
        expert: which one of stacked experts the rank figures are of.
        exact: whether they come from the whole spectrum.
    """

    name: str
    role: str
    block: int | None
    elements: int
    changed: float
    norm: float
    change: float
    relative: float | None
    stable_rank: float | None = None
    effective_rank: float | None = None
    directions: int | None = None
    expert: int | None = None
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Readout:
    """An edit as its weights show it.

    Attributes:
        tensors: every parameter, in the model's order.
        changed: share of all elements that differ.
        relative: norm of the whole difference / norm of the whole model before; 0 where nothing changed.
    """

    tensors: tuple[TensorEdit, ...]
    changed: float
    relative: float

    @property
    def edited(self) -> tuple[TensorEdit, ...]:
        """The parameters that changed at all, the largest change first."""
        return tuple(sorted((t for t in self.tensors if t.changed > 0), key=lambda t: (-t.change, t.name)))

    def held_by(self, key: Callable[[TensorEdit], Any]) -> dict[Any, float]:
        """Share of the squared norm of the difference by a key of the tensors (block, role); empty without a change."""
        total = sum(t.change**2 for t in self.tensors)
        shares: dict[Any, float] = defaultdict(float)
        for tensor in self.edited:
            shares[key(tensor)] += tensor.change**2 / total
        return dict(shares)


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """Squared singular values, largest first, and the sum of all of them, those left out included."""

    squares: np.ndarray
    total: float

    @property
    def rest(self) -> float:
        """Share of the total that lies outside `squares`."""
        return max(0.0, 1.0 - float(self.squares.sum()) / self.total)


def read_edit(
    model: nn.Module,
    original: Callable[[str], Tensor],
    *,
    model_map: ModelMap | None = None,
    largest: int = LARGEST,
    top: int = TOP,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Readout:
    """Compare an edited model with its original, one tensor at a time.

    Args:
        model: the edited model; only read.
        original: gives the tensor of a parameter before the edit by the parameter's name, on any device.
        model_map: the model's map, built when absent.
        largest: smaller side of a matrix up to which the whole spectrum is computed.
        top: singular directions of larger matrices.
        seed: of the randomised iteration.
        progress: called with (parameters done, parameters in all).

    Returns:
        The read-out. No forward pass is made; memory is that of the largest tensor, a few times.

    Raises:
        UsageError: `largest` or `top` below 1, or weights that are not finite.
        IntegrityError: a tensor of another shape than the model's.
    """
    if largest < 1 or top < 1:
        raise UsageError(f"expected largest and top of at least 1, found {largest} and {top}; give positive numbers")
    model_map = model_map or ModelMap.of(model)
    model_map.expect_single()
    stacked = {p.parameter for p in model_map.projections() if p.experts is not None}
    parameters = list(model.named_parameters())
    found, squares, changes = [], [], []
    for done, (name, parameter) in enumerate(parameters, start=1):
        tensor = _tensor(model_map, name, parameter.detach(), original(name), name in stacked, largest, top, seed)
        found.append(tensor)
        squares.append(tensor.norm**2)
        changes.append(tensor.change**2)
        if progress:
            progress(done, len(parameters))
    elements = sum(t.elements for t in found)
    norm, change = math.sqrt(math.fsum(squares)), math.sqrt(math.fsum(changes))
    return Readout(
        tensors=tuple(found),
        changed=sum(round(t.changed * t.elements) for t in found) / max(1, elements),
        relative=change / norm if norm else 0.0,
    )


def _tensor(
    model_map: ModelMap,
    name: str,
    edited: Tensor,
    original: Tensor,
    stacked: bool,
    largest: int,
    top: int,
    seed: int,
) -> TensorEdit:
    if original.shape != edited.shape:
        raise IntegrityError(
            f"expected {name} of shape {tuple(edited.shape)} in the original checkpoint, found "
            f"{tuple(original.shape)}; compare checkpoints of one architecture"
        )
    wide = torch.promote_types(edited.dtype, torch.float32)
    before = original.to(edited.device, edited.dtype).to(wide)
    delta = edited.to(wide) - before
    norm, change = _norm(before), _norm(delta)
    if not math.isfinite(norm) or not math.isfinite(change):
        raise UsageError(f"expected finite weights in both checkpoints, found others in {name}; the edit broke them")
    plain: dict[str, Any] = {
        "name": name,
        "role": model_map.role_of(name) or "other",
        "block": model_map.block_of(name),
        "elements": edited.numel(),
        "changed": float((delta != 0).sum()) / max(1, edited.numel()),
        "norm": norm,
        "change": change,
        "relative": change / norm if norm else None,
    }
    if edited.ndim < 2 or not change:
        return TensorEdit(**plain)
    expert = None
    if stacked and edited.ndim == 3:
        expert = int(delta.square().sum((1, 2)).argmax())
        delta = delta[expert]
    matrix = delta.flatten(1)  # [m, n]
    exact = min(matrix.shape) <= largest
    spectrum = _spectrum(matrix) if exact else _top_spectrum(matrix, top, seed)
    return TensorEdit(
        **plain,
        stable_rank=spectrum.total / float(spectrum.squares[0]),
        effective_rank=_effective_rank(spectrum) if exact or spectrum.rest <= SETTLED else None,
        directions=_directions(spectrum, ENERGY),
        expert=expert,
        exact=exact,
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _spectrum(matrix: Tensor) -> _Spectrum:
    """All squared singular values of `matrix` [m, n], from its Gram matrix [s, s] in double precision."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, len(tall), ROWS):
        rows = tall[start : start + ROWS].double()
        gram += rows.T @ rows
    squares = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).cpu().numpy()  # [s]
    return _Spectrum(squares, float(squares.sum()))


def _top_spectrum(matrix: Tensor, top: int, seed: int) -> _Spectrum:
    """The largest squared singular values of `matrix` [m, n] by randomised subspace iteration, and their exact sum."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    k = min(top, tall.shape[1])
    width = min(k + OVERSAMPLED, tall.shape[1])
    start = torch.randn(tall.shape[1], width, generator=torch.Generator().manual_seed(seed))  # [n, k + oversampled]
    basis = torch.linalg.qr(tall @ start.to(tall)).Q  # [m, k + oversampled]
    for _ in range(POWERS):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    values = torch.linalg.svdvals((basis.T @ tall).double())[:k]  # [k]
    squares = values.square().cpu().numpy()
    return _Spectrum(squares, max(_norm(matrix) ** 2, float(squares.sum())))


def _effective_rank(spectrum: _Spectrum) -> float:
    values = np.sqrt(spectrum.squares)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _directions(spectrum: _Spectrum, energy: float) -> int | None:
    held = np.cumsum(spectrum.squares) / spectrum.total
    enough = np.flatnonzero(held >= energy * (1 - 1e-12))
    return int(enough[0]) + 1 if len(enough) else None


# --- what was removed -----------------------------------------------------------------------------------------------


def rise(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    """[n] change of each record's loss, after - before, in nats per token.

    Raises:
        UsageError: lists of different lengths, or losses that are NaN.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise UsageError(
            f"expected the losses of one set of records before and after, found {first.size} and {second.size}; "
            "measure both checkpoints on the same records"
        )
    if bad := int(np.isnan(first).sum() + np.isnan(second).sum()):
        raise UsageError(f"expected a loss for every record, found {bad} NaN; find out why")
    with np.errstate(invalid="ignore"):
        change = second - first
    return np.where(first == second, 0.0, change)  # infinite on both sides: no change


def telling(
    records: tuple[ArrayLike, ArrayLike],
    others: tuple[ArrayLike, ArrayLike],
    *,
    clusters: Clusters = None,
    other_clusters: Clusters = None,
    fprs: Sequence[float] = FPRS,
    level: float = 0.95,
    seed: int = 0,
) -> Membership:
    """How well the rise of the loss tells what was removed from other records.

    Args:
        records: losses [n] of the records that were to go, before and after the edit, in nats per token.
        others: losses [m] of never-seen records, or of records that were to stay, before and after.
        clusters: [n] near-duplicate clusters, None for a record of its own.
        other_clusters: [m] the same of the others.
        fprs: false-positive rates to report the true-positive rate at.
        level: of every interval.
        seed: of bootstraps, permutations and splits.

    Returns:
        AUC (0.5: the rise tells nothing), its interval and null interval, p-value (two-sided: a loss that falls tells
        as much as one that rises), operating points and ROC.

    Raises:
        UsageError: losses that do not belong together, or are NaN.
    """
    return evaluate(
        rise(*records),
        rise(*others),
        pos_clusters=clusters,
        neg_clusters=other_clusters,
        fprs=fprs,
        alternative="two-sided",
        level=level,
        seed=seed,
    )


def largest_rises(rises: Iterable[float], n: int) -> list[int]:
    """Row numbers of the `n` records whose loss rose most, the first of equals first."""
    values = np.asarray(list(rises), dtype=np.float64)
    return [int(i) for i in np.argsort(-values, kind="stable")[: max(0, n)]]
