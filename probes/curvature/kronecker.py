"""Selection of component pairs in a Kronecker eigenbasis, and the weight that is left when the others are dropped.

For a linear map y = x W^T with factors A = E[x x^T] = U_A diag(mu) U_A^T and G = E[g g^T] = U_G diag(lam) U_G^T
(`probes.curvature.factors`), K-FAC (arXiv 1503.05671) takes the curvature of the loss in W to be A (x) G. In the
coordinates C = U_G^T W U_A it is diagonal: the pair (i, j) has curvature mass lam_i mu_j, so that

    keep the smallest set S of pairs with   sum_S lam_i mu_j >= rho sum lam_i mu_j,      W' = U_G (C * [S]) U_A^T

is the edit of "From Memorization to Reasoning in the Spectrum of Loss Curvature" (2510.24256), and the second-order
prediction of what it costs is  1/2 sum_{not S} lam_i mu_j C_ij^2.

S in descending order of the products is a staircase: row i keeps its first `counts[i]` columns. So no product is ever
sorted or listed. The cut is found by bisection on the threshold t, over the bit patterns of positive floats: the
counts at t come from a binary search in every row, the mass at t from the cumulative sums of mu, and a few dozen steps
of O(p log q) give the exact threshold. Ties at the threshold are taken row by row, from the left: in a degenerate
spectrum (A = G = I) only the number of pairs has a meaning.

An EK-FAC correction (1806.03884) replaces lam_i mu_j by any [p, q] masses; `keep_cells` selects among those.

Shape letters: p outputs, q inputs, r and c rows and columns of the smallest rectangle around what is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.errors import UsageError

if TYPE_CHECKING:
    from probes.curvature.factors import Factor

DOUBLE_SIDE = 2048  # sides up to this are decomposed in float64; above it time and memory decide for float32
LEAST = 5e-324  # the smallest positive float
POINTS = 48  # log-spaced ranks of a spectrum in a plot


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The Kronecker eigenbasis of one linear map; eigenvalues descend and are not negative.

    Attributes:
        u_g: [p, p], eigenvectors of G as columns, float64 or float32 by its side.
        lam: [p] float64, eigenvalues of G.
        u_a: [q, q], eigenvectors of A as columns.
        mu: [q] float64, eigenvalues of A.
    """

    u_g: Tensor = field(repr=False)
    lam: Tensor = field(repr=False)
    u_a: Tensor = field(repr=False)
    mu: Tensor = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type weights are computed in: float64 where both sides are."""
        return torch.float64 if self.u_g.dtype == self.u_a.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A staircase of pairs: row i keeps its first `counts[i]` columns.

    Attributes:
        counts: [p] int64, never growing from one row to the next.
        pairs: how many are kept.
        total: p times q.
        threshold: product of the last pair kept; 0 where everything is.
        mass: share of the curvature mass in what is kept, at least rho.
    """

    counts: Tensor = field(repr=False)
    pairs: int
    total: int
    threshold: float
    mass: float

    def mask(self) -> Tensor:
        """The same as [p, q] bool."""
        columns = torch.arange(self.total // len(self.counts), device=self.counts.device)
        return columns < self.counts[:, None]


# ------------------------------------------------------------------------------------------------------ decomposition


def eigenbasis(factor: Factor, device: torch.device | str | None = None) -> Basis:
    """Decompose both factors of a linear map.

    Args:
        factor: with `a` [q, q] and `g` [p, p], symmetric.
        device: where to compute; where the factors are by default.

    Raises:
        UsageError: for factors that are not finite.
    """
    return Eigenbases(device)(factor)


class Eigenbases:
    """Decomposes factors one after the other; maps in a row that share the object `a` share its decomposition.

    Args:
        device: where to compute; where the factors are by default.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device
        self._latest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, factor: Factor) -> Basis:
        """The eigenbasis of one map; see `eigenbasis`."""
        if self._latest is None or self._latest[0] is not factor.a:
            self._latest = factor.a, eigenpairs(factor.a, self._device)
        lam, u_g = eigenpairs(factor.g, self._device)
        mu, u_a = self._latest[1]
        return Basis(u_g, lam, u_a, mu)


def eigenpairs(matrix: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semidefinite matrix, largest first.

    Rounding makes some of the smallest eigenvalues negative; they are set to 0. The largest entry of every
    eigenvector is positive, so that the same matrix gives the same bytes.

    Args:
        matrix: [n, n]; its lower triangle is read.
        device: where to compute; where the matrix is by default.

    Returns:
        values [n] float64 and vectors [n, n] as columns, float64 up to a side of 2048 and else float32.

    Raises:
        UsageError: for NaN or infinity in the matrix.
    """
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not math.isfinite(size):
        raise UsageError("expected finite curvature factors, found NaN or infinity; compute them again, in float32")
    dtype = torch.float64 if len(matrix) <= DOUBLE_SIDE else torch.float32
    matrix = matrix.detach().to(device=device, dtype=dtype)
    if size == 0:
        return matrix.new_zeros(len(matrix), dtype=torch.float64), torch.eye(len(matrix)).to(matrix)
    scale = 2.0 ** math.frexp(size)[1]  # squares of gradients can be tiny; a power of two changes no bit of the vectors
    try:
        values, vectors = torch.linalg.eigh(matrix / scale)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # float32 solvers can fail to converge where eigenvalues spread widely
        values, vectors = torch.linalg.eigh(matrix.double() / scale)
        vectors = vectors.to(dtype)
    if dtype == torch.float32:  # one Newton step to the nearest orthogonal matrix: a third of the error is left
        defect = vectors.T @ vectors
        defect.diagonal().sub_(1.0)
        vectors = vectors - 0.5 * vectors @ defect
    values, vectors = values.flip(0).double().clamp_(min=0.0) * scale, vectors.flip(1)
    largest = vectors.abs().argmax(0, keepdim=True)  # [1, n]
    signs = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors)
    return values, vectors * signs


# ---------------------------------------------------------------------------------------------------------- selection


def keep_pairs(lam: Tensor, mu: Tensor, rho: float) -> Kept:
    """The fewest pairs, largest products first, that hold a share `rho` of the sum of all products.

    Args:
        lam: [p] eigenvalues of G, descending, not negative.
        mu: [q] eigenvalues of A, likewise.
        rho: share of the mass in (0, 1]; 1 keeps every pair, those without mass too.

    Returns:
        The selection, on the CPU. Sums are float64; the threshold is exact.

    Raises:
        UsageError: for another rho, or where no pair has any mass.
    """
    _check_share(rho)
    products = _Products(lam, mu)
    p, q = len(lam), len(mu)
    if rho == 1:
        return Kept(torch.full((p,), q), p * q, p * q, 0.0, 1.0)
    total = products.mass(products.counts(LEAST))
    _check_mass(total)
    target = rho * total
    threshold = products.cut(target, products.mass)
    above, with_ties = products.counts(math.nextafter(threshold, math.inf)), products.counts(threshold)
    held = products.mass(above)
    ties = with_ties - above  # [p]
    wanted = _fewest(held, threshold, target, int(ties.sum()))
    counts = above + torch.minimum(ties, (wanted - ties.cumsum(0) + ties).clamp_(min=0))
    mass = min(1.0, (held + wanted * threshold) / total)
    return Kept(counts, int(counts.sum()), p * q, threshold, mass)


def keep_cells(mass: Tensor, rho: float) -> Tensor:
    """The fewest cells, largest first, that hold a share `rho` of the sum of all; ties row by row, from the left.

    Args:
        mass: [p, q], not negative.
        rho: share in (0, 1]; 1 keeps every cell.

    Returns:
        [p, q] bool, on the CPU.

    Raises:
        UsageError: for another rho, masses that are negative or not finite, or where no cell has any mass.
    """
    _check_share(rho)
    cells = mass.detach().double().cpu().flatten()
    if not bool(((cells >= 0) & (cells < math.inf)).all()):
        raise UsageError("expected finite masses from 0, found others; compute them again, in float32")
    if rho == 1:
        return torch.ones(mass.shape, dtype=torch.bool)
    total = float(cells.sum())
    _check_mass(total)
    rest, held = cells, 0.0  # candidates for the cut, and the mass of what lies above them all
    low, high = 1, _bits(float(cells.max())) + 1
    while high - low > 1:
        middle = (low + high) // 2
        above = rest >= _float(middle)
        more = float(rest[above].sum())
        if held + more >= rho * total:
            rest, low = rest[above], middle
        else:
            rest, held, high = rest[~above], held + more, middle
    threshold = _float(low)
    keep = cells > threshold
    at = (cells == threshold).nonzero().squeeze(1)
    keep[at[: _fewest(held, threshold, rho * total, len(at))]] = True
    return keep.view(mass.shape)


def random_pairs(p: int, q: int, pairs: int, seed: int) -> Tensor:
    """As many pairs drawn uniformly without replacement: the control for a selection by curvature.

    Args:
        p: rows.
        q: columns.
        pairs: how many, from 0 to p q.
        seed: of the draw.

    Returns:
        [p, q] bool, on the CPU.
    """
    if not 0 <= pairs <= p * q:
        raise ValueError(f"expected 0 to {p * q} pairs, found {pairs}")
    mask = torch.zeros(p * q, dtype=torch.bool)
    mask[torch.randperm(p * q, generator=torch.Generator().manual_seed(seed))[:pairs]] = True
    return mask.view(p, q)


class _Products:
    """The p q products lam_i mu_j, described by their p + q factors."""

    def __init__(self, lam: Tensor, mu: Tensor) -> None:
        self._lam, mu = (_descending(values) for values in (lam, mu))
        values, sizes = mu.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]  # [u]
        fence, start = mu.new_full((1,), -1.0), mu.new_zeros(1)
        self._mu = torch.cat([fence, values, fence])  # [u + 2], a fence reaches no threshold
        self._ascending = values.flip(0).contiguous()
        self._ends = torch.cat([start.long(), sizes.cumsum(0)])  # [u + 1] how many mu the first groups are
        self._sums = torch.cat([start, mu.cumsum(0)])  # [q + 1]
        self.top = float(self._lam[0] * mu[0])

    def _groups(self, threshold: float) -> Tensor:
        """[p] how many groups of equal mu make products of at least a positive threshold with each lam.

        By a binary search for threshold / lam, whose rounding may be off by a group or two: the products decide.
        """
        found = len(self._ascending) - torch.searchsorted(self._ascending, threshold / self._lam)
        while (more := self._lam * self._mu[found + 1] >= threshold).any():
            found += more
        while (less := (self._lam * self._mu[found] < threshold) & (found > 0)).any():
            found -= less.long()
        return found

    def counts(self, threshold: float) -> Tensor:
        """[p] how many products of each row are at least a positive threshold."""
        return self._ends[self._groups(threshold)]

    def mass(self, counts: Tensor) -> float:
        """Sum of the first `counts[i]` products of every row."""
        return float((self._lam * self._sums[counts]).sum())

    def cut(self, target: float, measure: Callable[[Tensor], float]) -> float:
        """The largest product at which a measure of the counts reaches a target above 0.

        Steps bisect the bit patterns, and in turns interpolate, for the measure is smooth in them, which are close to
        a logarithm. Both ends move on to the next product, so that it ends when no product lies in between.

        Args:
            target: reached at the smallest positive threshold.
            measure: grows with the counts; 0 without any.
        """
        low, high = 1, _bits(self.top) + 1
        at_low, at_high = measure(self.counts(LEAST)), 0.0
        for step in itertools.count():
            if high - low <= 1:
                break
            share = (at_low - target) / (at_low - at_high) if step % 2 else 0.5
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
            groups = self._groups(_float(middle))
            size = measure(self._ends[groups])
            if size >= target:
                last = self._lam * self._mu[groups]  # in every row, what just reaches it
                low, at_low = _bits(float(last[groups > 0].min())), size
            else:
                best = float((self._lam * self._mu[groups + 1]).max())  # of what does not
                high, at_high = max(low, _bits(best) if best > 0 else 0) + 1, size
        return _float(low)


def _descending(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    if values.ndim != 1 or not len(values) or not bool((values[1:] <= values[:-1]).all() and values[-1] >= 0):
        raise ValueError("expected eigenvalues in descending order, none below 0")
    return values


def _check_share(rho: float) -> None:
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 < rho <= 1:
        raise UsageError("expected rho, a share of the curvature mass, above 0 and up to 1, found another value")


def _check_mass(total: float) -> None:
    if not total > 0:
        raise UsageError("expected curvature mass to select by, found none: no gradient reached this module; leave it")


def _bits(value: float) -> int:
    """Positive floats are ordered like their bit patterns."""
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


def _fewest(held: float, each: float, target: float, most: int) -> int:
    """The fewest equal parts that lift `held` to `target`, at most `most`."""
    n = min(most, max(1, math.ceil((target - held) / each)))
    while n > 1 and held + (n - 1) * each >= target:
        n -= 1
    while n < most and held + n * each < target:
        n += 1
    return n


# --------------------------------------------------------------------------------------------------- the edited weight


def coordinates(weight: Tensor, basis: Basis) -> Tensor:
    """C = U_G^T W U_A, [p, q], of a weight [p, q] in the type of the basis."""
    weight = weight.detach().to(basis.u_g.device, basis.dtype)
    c: Tensor = torch.linalg.multi_dot([basis.u_g.to(weight).T, weight, basis.u_a.to(weight)])
    return c


def reconstruct(c: Tensor, basis: Basis, kept: Kept | Tensor) -> Tensor:
    """U_G (C * [S]) U_A^T, [p, q]; only the smallest rectangle around S is multiplied.

    Args:
        c: [p, q], or at least that rectangle of it, from the upper left corner.
        basis: the eigenbasis.
        kept: a staircase, or [p, q] bool.
    """
    mask = _rectangle(kept).to(c.device)  # [r, c]
    r, columns = mask.shape
    u_g, u_a = basis.u_g[:, :r].to(c.dtype), basis.u_a[:, :columns].to(c.dtype)
    weight: Tensor = torch.linalg.multi_dot([u_g, c[:r, :columns] * mask, u_a.T])
    return weight


def project(weight: Tensor, basis: Basis, kept: Kept | Tensor) -> Tensor:
    """The weight without the pairs that are not kept.

    An orthogonal projection: a second one changes nothing, and the Frobenius norm never grows. With everything kept
    it gives the weight back up to rounding (about 3e-7 of it in float32, 1e-15 in float64), not bit for bit.

    Args:
        weight: [p, q], outputs by inputs; not modified.
        basis: the eigenbasis.
        kept: a staircase, or [p, q] bool.

    Returns:
        [p, q] in the type and on the device of the basis.
    """
    r, columns = _rectangle(kept).shape
    part = Basis(basis.u_g[:, :r], basis.lam, basis.u_a[:, :columns], basis.mu)
    return reconstruct(coordinates(weight, part), part, kept)


def edit_figures(
    weight: Tensor,
    basis: Basis,
    kept: Kept | Tensor,
    *,
    mass: Tensor | None = None,
    positions_per_loss: float = 1.0,
    points: int = POINTS,
) -> dict[str, Any]:
    """What an edit keeps and what it is predicted to cost.

    The prediction is that of the quadratic model with the module's own Kronecker block: it leaves out the gradient
    term, the interaction of modules, and everything beyond second order. For a large edit it ranks modules and is no
    bound: where a model is sure of its answers, the curvature at its weights is far below that on the way. A sum over
    modules is the prediction for editing them together.

    Args:
        weight: [p, q].
        basis: the eigenbasis.
        kept: a staircase, or [p, q] bool.
        mass: [p, q] masses in place of lam_i mu_j, as from an EK-FAC correction.
        positions_per_loss: counted positions of this module for every loss that is averaged. A and G are means over
            positions; where there are more of them than losses (prompts, image patches) or fewer (one expert), the
            mean loss feels the curvature that many times.
        points: log-spaced ranks of `curve` and `spectrum`; 0 leaves both out.

    Returns:
        `kept_norm`: share of ||C||^2 that is kept; 1 for a zero weight.
        `predicted_rise`: of the mean loss, nats.
        `curve`: {"pairs": shares of the pairs, "mass": share of the mass in that many of the largest}.
        `spectrum`: {"index": ranks from 1, "eigenvalue": the product (or mass) at each}.
    """
    return figures_of(
        coordinates(weight, basis), basis, kept, mass=mass, positions_per_loss=positions_per_loss, points=points
    )


def figures_of(
    c: Tensor,
    basis: Basis,
    kept: Kept | Tensor,
    *,
    mass: Tensor | None = None,
    positions_per_loss: float = 1.0,
    points: int = POINTS,
) -> dict[str, Any]:
    """`edit_figures` of a weight whose `coordinates` are known, all [p, q] of them."""
    mask = (kept.mask() if isinstance(kept, Kept) else kept).to(c.device)
    squares = c.square()
    whole = float(squares.sum(dtype=torch.float64))
    lost = squares.masked_fill_(mask, 0.0)
    gone = float(lost.sum(dtype=torch.float64))
    if mass is None:
        # Scaled to 1, so that neither underflows in float32, which C may be in.
        top = float(basis.lam[0]), float(basis.mu[0])
        lam, mu = (values.to(c) / (size or 1.0) for values, size in zip((basis.lam, basis.mu), top, strict=True))
        cost = float((lam @ lost) @ mu) * top[0] * top[1]
    else:
        cost = float((lost * mass.to(lost)).sum(dtype=torch.float64))
    found: dict[str, Any] = {
        "kept_norm": 1.0 - gone / whole if whole else 1.0,
        "predicted_rise": 0.5 * positions_per_loss * cost,
    }
    return found | curve_points(basis, mass, points) if points else found


def curve_points(basis: Basis, mass: Tensor | None = None, points: int = POINTS) -> dict[str, dict[str, list[float]]]:
    """`curve` and `spectrum` of `edit_figures`, which depend on no weight."""
    p, q = len(basis.lam), len(basis.mu)
    ranks = sorted({round((p * q) ** (k / max(1, points - 1))) for k in range(points)})
    if mass is None:
        products = _Products(basis.lam, basis.mu)
        total = products.mass(torch.full((p,), q))
        values, held = [], []
        for rank in ranks:
            value, below = products.top, total
            if int(products.counts(LEAST).sum()) >= rank:
                value = products.cut(rank, lambda counts: float(counts.sum()))
                above = products.counts(math.nextafter(value, math.inf))
                below = products.mass(above) + (rank - int(above.sum())) * value
            else:
                value = 0.0
            values.append(value)
            held.append(below)
    else:
        ordered = mass.detach().double().cpu().flatten().sort(descending=True).values
        at = torch.tensor(ranks) - 1
        sums = ordered.cumsum(0)
        total, values, held = float(sums[-1]), ordered[at].tolist(), sums[at].tolist()
    return {
        "curve": {
            "pairs": [rank / (p * q) for rank in ranks],
            "mass": [min(1.0, value / total) if total else 0.0 for value in held],
        },
        "spectrum": {"index": list(ranks), "eigenvalue": values},
    }


def _rectangle(kept: Kept | Tensor) -> Tensor:
    """The kept pairs as bool, cut to the rows and columns that have any."""
    if isinstance(kept, Kept):
        counts = kept.counts[kept.counts > 0]
        width = int(counts[0]) if len(counts) else 0
        return torch.arange(width, device=counts.device) < counts[:, None]
    rows, columns = (kept.any(axis).nonzero() for axis in (1, 0))
    return kept[: int(rows[-1]) + 1 if len(rows) else 0, : int(columns[-1]) + 1 if len(columns) else 0]
