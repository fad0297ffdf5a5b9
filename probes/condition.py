"""The spectrum of each weight matrix by itself: condition number, stable rank, effective rank. No data is read.

For a matrix W [p, q] with singular values s_1 >= ... >= s_m >= 0, m = min(p, q):

    kappa           s_1 / s_m                               the condition number
    stable rank     ||W||_F^2 / s_1^2                       between 1 and m
    effective rank  exp(-sum_i r_i log r_i), r_i = s_i / sum_j s_j
                    between 1 and m; Roy and Vetterli, "The effective rank", EUSIPCO 2007: the entropy of the singular
                    values themselves, not of their squares

KappaTune (arXiv 2506.16289) fine-tunes the matrices with the lowest kappa, taken to be the least specialised. All
three figures depend on the shape before they depend on training: a Gaussian matrix of 64 x 64 has a kappa near 200, one
of 64 x 1024 of 1.7. Each is therefore also divided by what a matrix of independent Gaussian entries of the same shape
has, so that about 1 means "like noise of this shape". The Gaussian references, for m <= n and unit variance:

    s_1^2   the upper edge (sqrt(n - 1/2) + sqrt(m - 1/2))^2 less the mean Tracy-Widom shift (Johnstone 2001,
            doi 10.1214/aos/1009210544; the halves from Ma, arXiv 1203.0839)
    s_m     the larger of sqrt(n) - sqrt(m - 1) (Rudelson and Vershynin, arXiv 0802.3956) and the lower edge
            sqrt(n) - sqrt(m) with its Tracy-Widom shift: the first holds for square matrices, the second for others
    the effective rank from the Marchenko-Pastur density

From sides of 16 on they are within 2 % for the stable and the effective rank. Median kappa is within 20 %; a single
square matrix may be off by a factor, for its smallest singular value fluctuates by that much.

The published code has four defects that are absent here: it computes singular vectors that it never reads; a
convolution's four-dimensional weight makes its comparison fail and is skipped without a word; equal scores are cut in
the order of a hash table, so the selection changes between runs; shapes are not put on one scale.

Shape letters: p, q rows and columns, m and n the smaller and the larger of them, E stacked experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probes.errors import UnsupportedError, UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap, Projection

DOUBLE_SIDE = 2048  # matrices whose smaller side is larger are decomposed in fp32: twice as fast, half the memory
TALL = 2  # from this ratio of sides on a QR step first pays: 20 s -> 4 s for 2048 x 8192 on one core
SINGLE_NOISE = 8 * torch.finfo(torch.float32).eps  # what rounding to fp32 may do to a singular value, of the largest


@dataclass(frozen=True, slots=True)
class Condition:
    """The figures of one matrix; `*_relative` and `*_share` are quotients by those of a Gaussian matrix of its shape.

    Attributes:
        kappa: s_1 / s_m; None where the matrix is numerically rank deficient, an empty spectrum included.
        kappa_relative: kappa over the Gaussian's; None likewise.
        stable_rank: ||W||_F^2 / s_1^2; 0 for a zero matrix.
        stable_rank_share: about 1 for noise, less where few directions dominate.
        effective_rank: exponential of the entropy of s / sum(s); 0 for a zero matrix.
        effective_rank_share: about 1 for noise.
        rank: singular values above the tolerance.
    """

    kappa: float | None
    kappa_relative: float | None
    stable_rank: float
    stable_rank_share: float
    effective_rank: float
    effective_rank_share: float
    rank: int


COLUMNS = ("name", "block", "role", "expert", "shape", *(field.name for field in fields(Condition)))


def condition(matrix: Tensor) -> Condition:
    """Figures of one matrix.

    Args:
        matrix: [p, q] floating point; convolutions come as [out, in * k * k], stacked experts one slice at a time.

    Returns:
        Dimensionless figures, the same for the transposed matrix and for any multiple of it. Rank deficient means
        s_m <= 8 eps32 s_1 (kappa above a million): rounding the weights to fp32 alone moves s_m by as much, so a
        larger quotient would be noise. A float64 matrix is held to s_m <= max(p, q) eps64 s_1 instead.

    Raises:
        UsageError: for another number of dimensions, or none of a side.
        UnsupportedError: for integers, NaN or infinities.
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise UsageError(f"expected a matrix [p, q], found the shape {tuple(matrix.shape)}; flatten convolutions")
    if not matrix.is_floating_point():
        raise UnsupportedError(f"expected floating-point weights, found {matrix.dtype}; dequantise them first")
    p, q = matrix.shape
    values = singular_values(matrix).double()  # [m], descending
    largest = float(values[0])
    if not math.isfinite(largest):
        raise UnsupportedError("expected finite weights, found NaN or infinity; check the checkpoint")
    if largest == 0:
        return Condition(None, None, 0.0, 0.0, 0.0, 0.0, 0)
    values = values / largest  # squares of tiny weights would underflow
    noise = max(p, q) * torch.finfo(torch.float64).eps if matrix.dtype == torch.float64 else SINGLE_NOISE
    rank = int((values > noise).sum())
    kappa = 1 / float(values[-1]) if rank == len(values) else None
    shares = values / values.sum()
    stable = float(values.square().sum())
    effective = math.exp(float(torch.special.entr(shares).sum()))
    gaussian = gaussian_condition(p, q)
    return Condition(
        kappa=kappa,
        kappa_relative=None if kappa is None else kappa / gaussian.kappa,
        stable_rank=stable,
        stable_rank_share=stable / gaussian.stable_rank,
        effective_rank=effective,
        effective_rank_share=effective / gaussian.effective_rank,
        rank=rank,
    )


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix [p, q], descending, [min(p, q)], on the CPU; no vectors are computed.

    In float64 up to a smaller side of 2048, in float32 above.
    """
    tall = matrix.detach() if len(matrix) >= matrix.shape[1] else matrix.detach().T  # [n, m]
    n, m = tall.shape
    if not bool(tall.isfinite().all()):
        return torch.full((m,), math.nan)
    tall = tall.to(torch.float64 if m <= DOUBLE_SIDE else torch.float32)
    if n >= TALL * m:
        tall = torch.linalg.qr(tall, mode="r").R  # [m, m], the same singular values
    values: Tensor = torch.linalg.svdvals(tall)
    return values.cpu()


@dataclass(frozen=True, slots=True)
class Gaussian:
    """What a matrix of independent Gaussian entries has."""

    kappa: float
    stable_rank: float
    effective_rank: float


@cache
def gaussian_condition(p: int, q: int) -> Gaussian:
    """Figures to expect of a Gaussian matrix [p, q]; see the module's docstring for the sources."""
    m, n = min(p, q), max(p, q)
    if m == 1:
        return Gaussian(1.0, 1.0, 1.0)
    a, b = math.sqrt(n - 0.5), math.sqrt(m - 0.5)
    top = (a + b) ** 2 - 1.2065 * (a + b) * (1 / a + 1 / b) ** (1 / 3)  # E[s_1^2]
    gap = math.sqrt(n) - math.sqrt(m)
    soft = gap**2 + 1.2686 * gap * (1 / math.sqrt(m) - 1 / math.sqrt(n)) ** (1 / 3)  # the median of s_m^2, m << n
    bottom = max(math.sqrt(soft), math.sqrt(n) - math.sqrt(m - 1))
    # Marchenko-Pastur with ratio y on x = 1 + y + 2 sqrt(y) cos(t), where its density is 2 sin(t)^2 / (pi x) dt.
    angle = (np.arange(4096) + 0.5) * math.pi / 4096
    y = m / n
    x = 1 + y + 2 * math.sqrt(y) * np.cos(angle)
    weight = np.sin(angle) ** 2 / x
    weight /= weight.sum()
    values = np.sqrt(x) / (weight @ np.sqrt(x))  # singular values over their mean
    effective = m * math.exp(-float(weight @ (values * np.log(values))))
    return Gaussian(math.sqrt(top) / bottom, m * n / top, effective)


# ------------------------------------------------------------------------------------------------ tables of matrices


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a table: a weight, one expert's slice of a stacked one, or an unfolded convolution.

    Attributes:
        name: the parameter's, with `[e]` behind it for slice e of stacked experts.
        block: index of the residual block, or None.
        role: see `ModelMap.roles`; None where no map was given.
        expert: index of the slice, or None.
        tensor: [out, in] as a linear map reads it; [p, q] as stored where no map was given.
    """

    name: str
    block: int | None
    role: str | None
    expert: int | None
    tensor: Tensor

    def __repr__(self) -> str:
        return f"Matrix({self.name}, {tuple(self.tensor.shape)})"


def condition_table(
    model: nn.Module,
    *,
    modules: Sequence[str] | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Figures of every projection of a live model, one matrix at a time.

    Args:
        model: a causal language model or an image classifier.
        modules: globs over parameter names; the head can be asked for so. By default every projection and the patch
            projection, but neither head nor embeddings, whose side is the vocabulary.
        model_map: the model's map, built when absent.
        progress: called with (matrices done, matrices in all).

    Returns:
        `COLUMNS`, a row per matrix in model order; None (NaN) for kappa where the matrix is rank deficient. Figures
        have no unit.

    Raises:
        UsageError: for a glob that matches nothing.
        UnsupportedError: for a model that the map cannot read, or weights that are not finite.
    """
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    model_map.expect_single()
    chosen = _chosen(model_map, modules)
    total = sum(projection.experts or 1 for projection in chosen)
    return _table(_matrices(model_map, chosen), total, progress)


def stored_condition_table(
    tensors: Iterable[tuple[str, Tensor]], *, model_map: ModelMap | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """The same figures for tensors that come one after another, from a checkpoint's files for one.

    Args:
        tensors: (name, tensor); each is dropped before the next is asked for. Tensors of fewer than two dimensions
            are skipped, and every other one is measured: filter what is not wanted, such as embeddings. Three
            dimensions are slices per expert where the name holds "expert", else a one-dimensional convolution.
        model_map: gives block, role and orientation to the names it knows; tensors whose names it does not know
            keep None and their stored shape.
        progress: called with (matrices done, 0), since their number is not known.

    Returns:
        As `condition_table`, in the order of the tensors.

    Raises:
        UnsupportedError: for weights that are integers or not finite.
    """
    return _table(_stored(tensors, model_map), 0, progress)


def lowest(table: pd.DataFrame, count: int, by: str = "kappa_relative") -> list[str]:
    """Names of the matrices with the lowest figure, KappaTune's choice of what to fine-tune.

    Rank-deficient matrices (no figure) come last; equal figures are in the order of their names, so the selection is
    the same in every run.

    Raises:
        UsageError: for a column the table does not have, or a count below 1.
    """
    if by not in table.columns[5:] or count < 1:
        raise UsageError(f"expected one of {', '.join(COLUMNS[5:])} and a count of at least 1, found {by} and {count}")
    keyed = sorted(zip(table[by].astype(float).fillna(math.inf), table["name"], strict=True))
    return [name for _, name in keyed[:count]]


def _table(matrices: Iterable[Matrix], total: int, progress: Progress | None) -> pd.DataFrame:
    rows: list[tuple[object, ...]] = []
    for matrix in matrices:
        try:
            found = condition(matrix.tensor)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} ({matrix.name})") from None
        place = (matrix.name, matrix.block, matrix.role, matrix.expert, tuple(matrix.tensor.shape))
        rows.append((*place, *(getattr(found, field.name) for field in fields(Condition))))
        if progress:
            progress(len(rows), total)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("block", "expert"):
        frame[column] = frame[column].astype("Int64")  # whole numbers that may be absent
    for column in ("kappa", "kappa_relative"):
        frame[column] = frame[column].astype(float)
    return frame


def _chosen(model_map: ModelMap, globs: Sequence[str] | None) -> list[Projection]:
    stem = [p for p in model_map.linear_modules() if p.role == "patch"]
    head = [p for p in model_map.linear_modules() if p.role == "head"]
    known = [*stem, *model_map.projections()]
    if globs is None:
        return known
    known += head
    names = [projection.parameter for projection in known]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            close = get_close_matches(glob, names, n=3)
            hint = f"; close names: {', '.join(close)}" if close else f"; {names[0]} is one of {len(names)}"
            raise UsageError(
                f"expected globs over the projections of the model, found {glob}, which matches none{hint}"
            )
    return [p for p in known if any(fnmatchcase(p.parameter, glob) for glob in globs)]


def _matrices(model_map: ModelMap, projections: Iterable[Projection]) -> Iterator[Matrix]:
    parameters = dict(model_map.model.named_parameters())
    for projection in projections:
        yield from _slices(projection.parameter, parameters[projection.parameter], projection, model_map)


def _stored(tensors: Iterable[tuple[str, Tensor]], model_map: ModelMap | None) -> Iterator[Matrix]:
    known: dict[str, Projection] = {}
    if model_map is not None:
        for projection in (*model_map.linear_modules(), *model_map.projections()):
            known.setdefault(projection.parameter, projection)
    for name, tensor in tensors:
        if tensor.ndim >= 2:
            own = name if model_map is None else model_map.tied.get(name, name)
            yield from _slices(name, tensor, known.get(own), model_map)


def _slices(name: str, tensor: Tensor, projection: Projection | None, model_map: ModelMap | None) -> Iterator[Matrix]:
    """The matrices of one tensor: one, or one per expert."""
    tensor = tensor.detach()
    block = None if model_map is None else model_map.block_of(name)
    role = None if projection is None else projection.role
    turned = projection is not None and projection.orientation == "in_out"
    if tensor.ndim == 3 and (projection.experts is not None if projection else "expert" in name):
        for expert, piece in enumerate(tensor):  # [p, q] of [E, p, q]
            yield Matrix(f"{name}[{expert}]", block, role, expert, piece.T if turned else piece)
        return
    matrix = tensor if tensor.ndim == 2 else tensor.flatten(1)  # a convolution: [out, in * k * k]
    yield Matrix(name, block, role, None, matrix.T if turned else matrix)
