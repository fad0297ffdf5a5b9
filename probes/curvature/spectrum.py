"""Eigenvalues, spectral density and trace of a symmetric operator, from products with vectors alone.

**Extreme eigenvalues** by implicitly restarted Lanczos (`scipy.sparse.linalg.eigsh`), each with its residual
||A u - l u||: an interval of that radius around l holds an eigenvalue of A, whatever went wrong on the way.

**Density** by stochastic Lanczos quadrature (Golub and Meurant 1994; Ubaru, Chen and Saad 2017; for neural networks
Ghorbani, Krishnan and Xiao, arXiv 1901.10159). m steps of Lanczos from a vector v of random signs give a tridiagonal
matrix; its eigenvalues are nodes, the squared first components of its eigenvectors weights, and for any function f

    v^T f(A) v = n sum_k weight_k f(node_k),   exact for polynomials of degree below 2 m,   E_v[v^T f(A) v] = tr f(A)

Averaged over probes v the weighted nodes stand for the distribution of the n eigenvalues; the spread between probes
gives the standard error of any integral.

**Trace** by Hutchinson's estimator, the mean of v^T A v (1990), or by Hutch++ (Meyer, Musco, Musco and Woodruff, arXiv
2010.09649): a third of the products finds a subspace Q that holds most of A, tr(Q^T A Q) is taken exactly, and only the
rest is estimated. Both are unbiased. With few dominant eigenvalues Hutch++ needs far fewer products.

A is any real symmetric `LinearOperator`; nothing here knows about models. Results depend on the seed. Memory budgets
decide how many vectors are multiplied together, which changes nothing (to the last bit, if `matmat` gives what `matvec`
does, as it does in `probes.curvature.operators`), and whether Lanczos vectors are kept, which the results say.

Shape letters: n size of the operator, k eigenvalues, m Lanczos steps, s vectors of a sketch, P points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from probes.errors import ResourceError, UsageError
from probes.statistics import Interval

Which = Literal["LA", "SA", "LM"]
Method = Literal["hutchinson", "hutch++"]
Floats = NDArray[np.float64]
Vectors = NDArray[Any]  # of the operator's own type
Operator = LinearOperator[Any]

MEMORY_BYTES = 4 << 30
TOGETHER = 4  # vectors multiplied at once: products share work, and from four on hardly more
_GUESS_STEPS = 8  # Lanczos steps that find the order of magnitude of the spectral norm
_BLOCK = 1 << 16  # numbers added up at once in float64


@dataclass(frozen=True, slots=True)
class Sampled:
    """A mean of independent random values.

    Attributes:
        value: the estimate.
        standard_error: its standard deviation, estimated from the spread of the values.
        n: number of values.
    """

    value: float
    standard_error: float
    n: int

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval: right for values that are about normal, as sums over many eigenvalues are."""
        half = float(special.stdtrit(self.n - 1, 0.5 + level / 2)) * self.standard_error
        return Interval(self.value, self.value - half, self.value + half, level, self.n, "Student's t over probes")


@dataclass(frozen=True, slots=True)
class Eigenvalues:
    """Eigenvalues at one end of a spectrum, the outermost first.

    Attributes:
        values: eigenvalues, in the operator's unit.
        residuals: ||A u - l u|| of each, for its unit vector u.
        complete: whether all that were asked for converged; if not, only those that did are listed.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Quadrature:
    """What stochastic Lanczos quadrature knows about a spectrum: nodes and weights of each probe.

    Attributes:
        nodes: for each probe its Ritz values in ascending order, [at most m].
        weights: for each probe their weights, which sum to 1.
        n: size of the operator.
        orthogonal: whether Lanczos vectors were kept orthogonal. If not, nodes repeat ("ghosts") and share the weight
            of one; integrals hardly suffer.
    """

    nodes: tuple[Floats, ...] = field(repr=False)
    weights: tuple[Floats, ...] = field(repr=False)
    n: int
    orthogonal: bool

    def integral(self, function: Callable[[Floats], Floats]) -> Sampled:
        """The sum of `function` over all n eigenvalues."""
        return _mean([self.n * float(w @ function(x)) for x, w in zip(self.nodes, self.weights, strict=True)])

    def trace(self) -> Sampled:
        """The sum of the eigenvalues; exactly Hutchinson's estimate from the same probes."""
        return self.integral(lambda x: x)

    def pooled(self) -> tuple[Floats, Floats]:
        """All nodes in ascending order, and weights that sum to 1 over all probes."""
        nodes, weights = np.concatenate(self.nodes), np.concatenate(self.weights) / len(self.nodes)
        order = np.argsort(nodes, kind="stable")
        return nodes[order], weights[order]

    def density(self, grid: ArrayLike, sigma: float) -> Floats:
        """Density of the eigenvalues on a grid [P], smoothed by a Gaussian of deviation sigma; integrates to 1."""
        nodes, weights = self.pooled()
        z = (np.asarray(grid, dtype=np.float64)[:, None] - nodes) / sigma  # [P, nodes]
        density: Floats = np.exp(-0.5 * z**2) @ weights / (sigma * math.sqrt(2 * math.pi))
        return density

    def cumulative(self, points: ArrayLike) -> Floats:
        """Share of the eigenvalues that are at most each of the points [P]."""
        nodes, weights = self.pooled()
        total = np.concatenate([[0.0], np.cumsum(weights)])
        share: Floats = total[np.searchsorted(nodes, np.asarray(points, dtype=np.float64), side="right")]
        return share

    def negative_share(self) -> Sampled | None:
        """Sum of |eigenvalue| over the negative ones, as a share of the same sum over all; None if that is zero.

        A share of mass and not of the number of eigenvalues, most of which are zero up to rounding in a large network.
        """
        below = [float(w @ np.maximum(-x, 0)) for x, w in zip(self.nodes, self.weights, strict=True)]
        mass = [float(w @ np.abs(x)) for x, w in zip(self.nodes, self.weights, strict=True)]
        if not sum(mass):
            return None
        share = sum(below) / sum(mass)
        spread = _mean([b - share * a for a, b in zip(mass, below, strict=True)])  # linearised ratio
        return Sampled(share, spread.standard_error * len(mass) / sum(mass), len(mass))


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Everything `spectrum` finds out about one operator. Numbers are in the operator's unit.

    Attributes:
        n: size of the operator, the number of weights.
        largest: the largest eigenvalues, descending.
        smallest: the smallest ones, ascending; None for an operator that has no negative ones by construction.
        trace: the sum of all eigenvalues.
        negative_share: see `Quadrature.negative_share`; None also where no eigenvalue can be negative.
        nodes: Ritz values of all probes, ascending.
        weights: their weights, which sum to 1.
        density_x: a grid.
        density_y: the smoothed density of eigenvalues on it, which integrates to 1.
        sigma: standard deviation of the smoothing.
        orthogonal: see `Quadrature`.
        products: vectors the operator was multiplied with.
        warnings: what a reader should know, one line each.
    """

    n: int
    largest: Eigenvalues
    smallest: Eigenvalues | None
    trace: Sampled
    negative_share: Sampled | None
    nodes: Floats = field(repr=False)
    weights: Floats = field(repr=False)
    density_x: Floats = field(repr=False)
    density_y: Floats = field(repr=False)
    sigma: float
    orthogonal: bool
    products: int
    warnings: tuple[str, ...]


def spectrum(
    operator: Operator,
    *,
    k: int = 5,
    probes: int = 10,
    steps: int = 40,
    trace_products: int = 0,
    points: int = 512,
    tolerance: float = 1e-4,
    max_products: int = 1000,
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> Spectrum:
    """Extreme eigenvalues, density, negative share and trace of one operator.

    Costs probes x steps products for the density, and at each end some tens to a few hundred for the eigenvalues.

    Args:
        operator: real and symmetric. If it has an attribute `semidefinite` that is true, nothing is computed at the
            lower end.
        k: eigenvalues at each end; all of them for an operator that has no more.
        probes: random vectors, at least 2.
        steps: Lanczos steps from each.
        trace_products: products for Hutch++, at least 6; 0 takes the trace from the density's probes, at no cost.
        points: of the density's grid. It spans the nodes, and the smoothing is a hundredth of that span.
        tolerance: of the eigenvalues, see `extreme_eigenvalues`.
        max_products: about the most products to spend at each end.
        seed: of every random vector; same inputs, same bytes.
        memory_bytes: for vectors; the operator's own memory comes on top.

    Raises:
        UsageError: a number that is too small.
        ResourceError: the Lanczos vectors do not fit in `memory_bytes`.
    """
    n = operator.shape[0]
    k = min(k, n)
    if points < 2:
        raise UsageError(f"expected a grid of at least 2 points, found {points}")
    counter = _Counter(operator)
    semidefinite = bool(getattr(operator, "semidefinite", False))
    _lanczos_vectors(operator, k, memory_bytes)  # refuse before the work, not after half of it
    found = slq(counter, probes=probes, steps=steps, seed=seed, memory_bytes=memory_bytes)
    nodes, weights = found.pooled()
    scale = float(np.abs(nodes).max())
    ends: list[Eigenvalues] = []
    warnings = []
    directions: tuple[Which, ...] = ("LA",) if semidefinite else ("LA", "SA")
    for which in directions:
        end = extreme_eigenvalues(
            counter,
            k,
            which=which,
            tolerance=tolerance,
            scale=scale,
            max_products=max_products,
            seed=seed,
            memory_bytes=memory_bytes,
        )
        ends.append(end)
        if not end.complete:
            name = "largest" if which == "LA" else "smallest"
            warnings.append(
                f"{len(end.values)} of the {k} {name} eigenvalues converged within {max_products} products; "
                "raise max_products or tolerance for the others"
            )
    if not found.orthogonal:
        warnings.append("Lanczos vectors were not kept orthogonal, to save memory: nodes may repeat")
    trace_found = found.trace()
    if trace_products:
        trace_found = trace(counter, method="hutch++", samples=trace_products, seed=seed, memory_bytes=memory_bytes)
    low, high = float(nodes[0]), float(nodes[-1])
    sigma = max((high - low) / 100, scale / 1000) or 0.01  # a spectrum of one point has no width
    grid = np.linspace(low - 4 * sigma, high + 4 * sigma, points)  # [P]
    return Spectrum(
        n=n,
        largest=ends[0],
        smallest=None if semidefinite else ends[1],
        trace=trace_found,
        negative_share=None if semidefinite else found.negative_share(),
        nodes=nodes,
        weights=weights,
        density_x=grid,
        density_y=found.density(grid, sigma),
        sigma=sigma,
        orthogonal=found.orthogonal,
        products=counter.products,
        warnings=tuple(warnings),
    )


# ------------------------------------------------------------------------------------------------------- extreme values


def extreme_eigenvalues(
    operator: Operator,
    k: int = 5,
    *,
    which: Which = "LA",
    tolerance: float = 1e-4,
    scale: float | None = None,
    max_products: int = 1000,
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> Eigenvalues:
    """Eigenvalues at an end of the spectrum.

    Lanczos converges relative to the eigenvalue, so one that is zero or nearly so would never be done; the operator is
    therefore shifted until the wanted end is as far from zero as the spectrum is wide. Values are Rayleigh quotients
    with the operator itself. They err by the square of the residual over the distance to the next eigenvalue, and never
    by more than the residual. An operator of no more than a few rows is formed and solved whole.

    Args:
        operator: real and symmetric, [n, n].
        k: how many, at most n. A multiple eigenvalue may show up fewer times than it occurs.
        which: "LA" the largest, "SA" the smallest (most negative), "LM" the largest in magnitude (costs both).
        tolerance: wanted residual as a share of the largest eigenvalue's magnitude. In float32 below about 1e-5
            it is never reached.
        scale: that magnitude, if known to a factor of two; found by a few more products otherwise.
        max_products: about the most products to spend before giving up on what has not converged.
        seed: of the first vector.
        memory_bytes: for the vectors, about 50 of length n.

    Raises:
        UsageError: k outside 1 to n, or a tolerance that is not positive.
        ResourceError: the vectors do not fit in `memory_bytes`.
    """
    n = operator.shape[0]
    if not 1 <= k <= n:
        raise UsageError(f"expected 1 to {n} eigenvalues of an operator of size {n}, found k = {k}")
    if not tolerance > 0:
        raise UsageError(f"expected a positive tolerance, found {tolerance}")
    options: dict[str, Any] = {"tolerance": tolerance, "max_products": max_products, "seed": seed}
    options["memory_bytes"] = memory_bytes
    if which == "LM":
        ends = [extreme_eigenvalues(operator, k, which=end, scale=scale, **options) for end in ("LA", "SA")]
        pairs = {pair for end in ends for pair in zip(end.values, end.residuals, strict=True)}  # both may hold all
        chosen = sorted(pairs, key=lambda pair: (-abs(pair[0]), pair[0]))[:k]
        return _eigenvalues(chosen, all(end.complete for end in ends))
    vectors = _lanczos_vectors(operator, k, memory_bytes)
    if vectors >= n:
        matrix = operator.matmat(np.eye(n, dtype=operator.dtype)).astype(np.float64)
        columns = np.linalg.eigh((matrix + matrix.T) / 2)[1][:, :: -1 if which == "LA" else 1][:, :k]
        return _eigenvalues(_rayleigh(columns, matrix @ columns))
    generator = np.random.default_rng([seed, 2])
    start = generator.standard_normal(n).astype(operator.dtype)
    if scale is None:
        ((alpha, beta),) = _lanczos(operator, start[None], _GUESS_STEPS, keep=False)
        scale = float(np.abs(eigh_tridiagonal(alpha, beta, eigvals_only=True)).max())
    if scale == 0:  # A v = 0 for a random v: zero with probability one
        return Eigenvalues((0.0,) * k, (0.0,) * k)
    sign, shift = (1 if which == "LA" else -1), 2 * scale
    shifted: Operator = LinearOperator(
        operator.shape,
        matvec=lambda x: sign * operator.matvec(x) + operator.dtype.type(shift) * x,
        dtype=operator.dtype,
    )
    extra: dict[str, Any] = (
        {"rng": generator} if "rng" in signature(eigsh).parameters else {}
    )  # scipy before 1.17 seeds itself
    restarts = max(1, (max_products - vectors) // (vectors - k))
    complete = True
    try:
        _, columns = eigsh(
            shifted, k, which="LA", v0=start, ncv=vectors, maxiter=restarts, tol=tolerance / 3, **extra
        )  # shifted eigenvalues are at most three times the scale
    except ArpackNoConvergence as error:
        columns, complete = error.eigenvectors, False
    products = np.empty_like(columns)
    for part in _groups(columns.shape[1]):
        products[:, part] = operator.matmat(columns[:, part])
    return _eigenvalues(sorted(_rayleigh(columns, products), key=lambda pair: -sign * pair[0]), complete)


def _rayleigh(columns: Vectors, products: Vectors) -> list[tuple[float, float]]:
    """Rayleigh quotient and residual norm of each column u [n] with its product A u."""
    found = []
    for u, v in zip(columns.T, products.T, strict=True):
        squared = _dot(u, u)
        value = _dot(u, v) / squared
        rest = v - u.dtype.type(value) * u
        found.append((value, math.sqrt(_dot(rest, rest) / squared)))
    return found


def _eigenvalues(pairs: list[tuple[float, float]], complete: bool = True) -> Eigenvalues:
    return Eigenvalues(tuple(value for value, _ in pairs), tuple(residual for _, residual in pairs), complete)


def _lanczos_vectors(operator: Operator, k: int, memory_bytes: int) -> int:
    """How many vectors eigsh may use: more than 2 k, and at most n; it holds them twice, and some more."""
    n = operator.shape[0]
    size = n * operator.dtype.itemsize
    wanted, fitting = min(n, max(2 * k + 1, 20)), (memory_bytes // size - k - 8) // 2
    if fitting < min(n, 2 * k + 1):
        needed = (2 * min(n, 2 * k + 1) + k + 8) * size
        raise ResourceError(
            f"expected room for Lanczos vectors of {n} weights, {needed / 2**30:.2f} GiB for {k} eigenvalues, found "
            f"memory_bytes of {memory_bytes / 2**30:.2f} GiB; take single blocks, fewer eigenvalues or more memory"
        )
    return int(min(wanted, fitting))


# -------------------------------------------------------------------------------------------------------------- density


def slq(
    operator: Operator,
    *,
    probes: int = 10,
    steps: int = 40,
    seed: int = 0,
    reorthogonalise: bool | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Quadrature:
    """Stochastic Lanczos quadrature: probes x steps products.

    Args:
        operator: real and symmetric, [n, n].
        probes: random vectors, at least 2, so that there is a standard error.
        steps: Lanczos steps from each, at least 1; fewer where a probe's Krylov space is exhausted before.
        seed: of the probes.
        reorthogonalise: keep all Lanczos vectors of a probe and make each new one orthogonal to them. None: if they
            fit. Without, a step only looks at the last two.
        memory_bytes: for vectors.

    Raises:
        UsageError: too few probes or steps.
        ResourceError: `reorthogonalise` is true and the vectors of one probe do not fit, or not even a few vectors do.
    """
    n = operator.shape[0]
    if probes < 2 or steps < 1:
        raise UsageError(f"expected at least 2 probes and 1 step, found {probes} and {steps}")
    steps = min(steps, n)
    size = n * operator.dtype.itemsize
    working = 8  # vectors a probe needs anyway: its last two, the product, and copies on the way to the operator
    keep = memory_bytes >= (steps + working) * size if reorthogonalise is None else reorthogonalise
    each = (steps * keep + working) * size
    if each > memory_bytes:
        raise ResourceError(
            f"expected room for Lanczos vectors of {n} weights, {each / 2**30:.2f} GiB for {steps} steps, found "
            f"memory_bytes of {memory_bytes / 2**30:.2f} GiB; take single blocks, "
            + ("fewer steps, no reorthogonalisation, or more memory" if keep else "or more memory")
        )
    nodes, weights = [], []
    for part in _groups(probes, memory_bytes // each):
        starts = np.stack([_signs(n, (seed, 0, i), operator.dtype) for i in range(part.start, part.stop)])  # [g, n]
        for alpha, beta in _lanczos(operator, starts, steps, keep=keep):
            values, first = eigh_tridiagonal(alpha, beta)
            nodes.append(np.asarray(values, dtype=np.float64))
            weights.append(np.asarray(first[0], dtype=np.float64) ** 2)
    return Quadrature(tuple(nodes), tuple(weights), n, keep)


def _lanczos(operator: Operator, starts: Vectors, steps: int, *, keep: bool) -> list[tuple[Floats, Floats]]:
    """Diagonal [m] and off-diagonal [m - 1] of the tridiagonal matrix of each start vector [g, n], in lock-step."""
    current = starts / np.array([[math.sqrt(_dot(v, v))] for v in starts], dtype=starts.dtype)  # [g, n]
    previous = np.zeros_like(current)
    basis = np.empty((len(starts), steps, starts.shape[1]), dtype=starts.dtype) if keep else None
    alphas: list[list[float]] = [[] for _ in starts]
    betas: list[list[float]] = [[] for _ in starts]
    limit = 10 * float(np.finfo(starts.dtype).eps)
    active = list(range(len(starts)))
    for step in range(steps):
        products = np.array(operator.matmat(current[active].T).T, order="C")  # [g, n], our own to overwrite
        going = []
        for i, w in zip(active, products, strict=True):
            alpha = _dot(w, current[i])
            alphas[i].append(alpha)
            w -= w.dtype.type(alpha) * current[i]
            if step:
                w -= w.dtype.type(betas[i][-1]) * previous[i]
            if basis is not None:
                basis[i, step] = current[i]
                known = basis[i, : step + 1]  # [step + 1, n]
                for _ in range(2):  # once is not enough where w is short
                    w -= (known @ w) @ known
            beta = math.sqrt(_dot(w, w))
            scale = max(map(abs, [*alphas[i], *betas[i]]))
            if step + 1 < steps and beta > limit * scale:  # otherwise the Krylov space is exhausted
                betas[i].append(beta)
                previous[i], current[i] = current[i], w / w.dtype.type(beta)
                going.append(i)
        active = going
        if not active:
            break
    return [(np.array(a), np.array(b)) for a, b in zip(alphas, betas, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- trace


def trace(
    operator: Operator,
    *,
    method: Method = "hutch++",
    samples: int = 30,
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> Sampled:
    """The sum of all eigenvalues, unbiased.

    The variance of Hutchinson's estimate is 2 (||A||_F^2 - sum_i A_ii^2) / samples. The standard error of Hutch++ is
    that of its random part, given the subspace; it knows nothing of a rest that none of its probes met.

    Args:
        operator: real and symmetric, [n, n].
        method: "hutchinson" or "hutch++".
        samples: products in all; at least 2, or 6 for Hutch++, which spends two thirds of them on the subspace.
        seed: of the random signs.
        memory_bytes: for vectors.

    Returns:
        `n` counts the values averaged: samples, or for Hutch++ a third of them.

    Raises:
        UsageError: too few samples.
        ResourceError: the subspace does not fit in `memory_bytes`.
    """
    n = operator.shape[0]
    least = 2 if method == "hutchinson" else 6
    if samples < least:
        raise UsageError(f"expected at least {least} samples for {method}, found {samples}")
    size = n * operator.dtype.itemsize
    sketch = 0 if method == "hutchinson" else min(samples // 3, n)
    needed = (3 * sketch + 4) * size
    if needed > memory_bytes:
        raise ResourceError(
            f"expected room for vectors of {n} weights, {needed / 2**30:.2f} GiB for {samples} samples, found "
            f"memory_bytes of {memory_bytes / 2**30:.2f} GiB; take single blocks, fewer samples or hutchinson"
        )
    at_once = (memory_bytes // size - 3 * sketch) // 4  # a product needs its vectors and a few copies of them
    held: list[float] = []
    basis = np.empty((n, 0), dtype=operator.dtype)
    if sketch:
        products = np.empty((n, sketch), dtype=operator.dtype)
        for part in _groups(sketch, at_once):
            signs = [_signs(n, (seed, 1, i), operator.dtype) for i in range(part.start, part.stop)]
            products[:, part] = operator.matmat(np.stack(signs, axis=1))
        basis = np.linalg.qr(products)[0]  # [n, s]
        del products
        for part in _groups(sketch, at_once):
            q = basis[:, part]
            held += [_dot(a, b) for a, b in zip(q.T, operator.matmat(q).T, strict=True)]
    values = []
    for part in _groups(samples - 2 * sketch, at_once):
        rest = [_signs(n, (seed, 0, i), operator.dtype) for i in range(part.start, part.stop)]
        rest = [v - basis @ (basis.T @ v) for v in rest]  # [n] each
        values += [_dot(a, b) for a, b in zip(rest, operator.matmat(np.stack(rest, axis=1)).T, strict=True)]
    return _mean([sum(held) + value for value in values])


# -------------------------------------------------------------------------------------------------------------- helpers


class _Counter(LinearOperator[Any]):
    """An operator that counts the vectors it is multiplied with."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.dtype, operator.shape)  # type: ignore[call-arg]
        self._operator = operator
        self.products = 0

    def _matvec(self, x: Vectors) -> Vectors:
        self.products += 1
        return self._operator.matvec(x)

    def _matmat(self, X: Vectors) -> Vectors:  # scipy's name
        self.products += X.shape[1]
        return self._operator.matmat(X)


def _mean(values: list[float]) -> Sampled:
    return Sampled(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values))


def _signs(n: int, seed: tuple[int, ...], dtype: np.dtype[Any]) -> Vectors:
    """Independent signs [n]; a probe's depend on its number alone, not on how probes are grouped."""
    signs = np.random.default_rng(seed).integers(0, 2, n, dtype=np.int8)
    return (2 * signs - 1).astype(dtype)


def _dot(a: Vectors, b: Vectors) -> float:
    """Inner product of two vectors [n], added up in float64 whatever their type: n may be many millions."""
    total = 0.0
    for i in range(0, len(a), _BLOCK):
        x, y = (np.array(v[i : i + _BLOCK], dtype=np.float64) for v in (a, b))
        total += float(x @ y)
    return total


def _groups(n: int, fitting: int = TOGETHER) -> Iterator[slice]:
    """Slices of at most a few out of n, fewer if no more fit."""
    size = max(1, min(TOGETHER, fitting))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
