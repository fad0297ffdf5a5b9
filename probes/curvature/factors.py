"""Kronecker factors of the Fisher information of linear maps (K-FAC, arXiv 1503.05671), from one pass over records.

For a linear map y_t = W x_t, W [p, q], and g_t = d (sum of losses) / d y_t at position t, over N positions that count

    A = 1/N sum_t x_t x_t^T   [q, q],      G = 1/N sum_t g_t g_t^T   [p, p],

the Fisher information of W for the mean loss is taken to be s A (x) G with s = N / losses: a step dW raises the mean
loss by s/2 sum_ij lambda_i mu_j C_ij^2, in which C = U_G^T dW U_A holds dW in the eigenbases of G (eigenvalues lambda)
and A (mu). It assumes that x_t and g_t are independent and that positions are independent of each other.

Labels "sampled" are drawn from the model's own distribution, which makes G the Fisher information proper; "gold" labels
are the records' own, which makes it the empirical stand-in.

All maps asked for are served by one pass; maps that read the same tensor share A. Sums are symmetric, so only column
blocks of the upper triangle are computed. Records with even and odd index are added up apart: how well the leading
subspaces of the two halves agree says whether there were enough positions.

Shape letters: n rows of a batch, p = out features, q = in features, w either of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap, Orientation
from probes.passes import Losses, losses_of, sum_type
from probes.records import ImageRecord, TokenRecord
from probes.taps import Listener, Positions, Site, batches_of, check_positions, listen, sites

Labels = Literal["gold", "sampled"]

SHARE = 0.9  # of the trace: the eigenvalues that hold it span the subspaces compared
BLOCKS = 6  # column blocks of a symmetric product: 58 % of the full product's arithmetic
LEAST_BLOCK = 64  # columns; narrower blocks lose more to overhead than they save


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Both factors of one linear map.

    Attributes:
        key: see `probes.taps.Site`.
        module: path of the module that owns the weight.
        parameter: the weight's name as in `named_parameters()`.
        expert: index in the parameter's first dimension, or None.
        orientation: of the stored weight: "out_in" for [p, q], "in_out" for [q, p] (Conv1D, some experts).
        block: index of the block, or None outside the blocks.
        role: q, gate, down, conv, ... (`probes.modelmap.Projection`).
        a: [q, q], fp32 at least, CPU; one object for all maps that read the same input. Zero if n is 0.
        g: [p, p], the same.
        n: positions that were counted.
        overlap_a: agreement of the halves, see `subspace_overlap`; None without halves.
        overlap_g: the same of g.
    """

    key: str
    module: str
    parameter: str
    expert: int | None
    orientation: Orientation
    block: int | None
    role: str
    a: Tensor = field(repr=False)
    g: Tensor = field(repr=False)
    n: int
    overlap_a: float | None = None
    overlap_g: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return len(self.g), len(self.a)


@dataclass(slots=True, eq=False)
class KroneckerFactors:
    """Factors of some linear maps of a model, and what they were computed from.

    Attributes:
        factors: key -> factor, in depth order.
        labels: "gold" or "sampled".
        positions: "all", "predicting" or "first".
        n_records: records used.
        n_tokens: losses: completion tokens, or one per image.
        n_positions: positions that count, of texts; of images those of the map that sees most.
        seed: of sampled labels.
        passes: how often the data were read.
    """

    factors: dict[str, Factor]
    labels: Labels
    positions: Positions
    n_records: int
    n_tokens: int
    n_positions: int
    seed: int
    passes: int = 1

    def positions_per_loss(self, key: str) -> float:
        """The s by which A (x) G has to be multiplied to be the curvature of the mean loss."""
        return self.factors[key].n / self.n_tokens


def kronecker_factors(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    modules: Sequence[str] | None = None,
    labels: Labels = "sampled",
    positions: Positions = "all",
    batch_tokens: int | None = None,
    seed: int = 0,
    halves: bool = True,
    memory_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> KroneckerFactors:
    """Kronecker factors of linear maps for the losses of records.

    Args:
        model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s); left as found.
        records: at least one. Texts carry a loss per completion token, images one each.
        modules: shell patterns over keys (`probes.taps.sites`); every linear map of the blocks by default.
        labels: drawn from the model, or the records' own.
        positions: "all" (of a text all but the last, which predicts nothing), "predicting" (those that predict a
            completion token) or "first" (of an image, the class token).
        batch_tokens: padded tokens a batch, or images; changes results by rounding only.
        seed: of sampled labels, which depend on it and on the record's identifier alone.
        halves: add up two halves and compare them. It costs twice the memory and three eigendecompositions a factor.
        memory_bytes: bytes that sums may take at once. Maps are then put in groups that fit, with one pass over the
            data for each; without it there is one pass.
        compute_dtype: torch.bfloat16 to run the model in it by autocast, on hardware that is fast at it; sums are
            fp32 all the same.
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all, over all passes).

    Returns:
        Factors in fp32 (float64 for a float64 model), on the CPU, however low the type of the model.

    Raises:
        UsageError: no records, an unknown module, or positions these records do not have.
        UnsupportedError: token ids or labels the model does not have, a map whose rows cannot be told apart, or
            activations that are not finite.
        ResourceError: a batch or the factors of one map do not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to compute factors from, found none; add records")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    check_positions(model_map, records, positions)
    if compute_dtype not in (None, torch.bfloat16):  # in float16 small gradients would vanish
        raise UsageError(f"expected compute_dtype bfloat16 or none, found {compute_dtype}")
    chosen = sites(model_map, modules)
    source = losses_of(model, records, sampled=labels == "sampled", seed=seed, model_map=model_map)
    batches = batches_of(records, batch_tokens, next(model.parameters()).device)
    # Even records first, so that in a batch the rows of each half lie together.
    batches = [sorted(batch, key=lambda i: i % 2) for batch in batches] if halves else batches
    copies = 2 if halves else 1
    groups = [chosen]
    if memory_bytes is not None:
        item = sum_type(next(model.parameters())).itemsize * copies
        units = _sharing(model, source, chosen, batches[0][:1], positions)
        sizes = [sum(item * _area(site, i == 0) for i, site in enumerate(unit)) for unit in units]
        groups = grouped(units, sizes, memory_bytes)
    factors: dict[str, Factor] = {}
    n_positions = 0
    for number, group in enumerate(groups):
        sums = _Collector(model, group, copies)
        listen(
            model,
            source,
            sums.listener,
            batches,
            positions=positions,
            compute_dtype=compute_dtype,
            begin=sums.begin,
            progress=part_of(progress, number, len(groups)),
        )
        factors |= sums.factors()
    if isinstance(records[0], TokenRecord):
        for batch in batches:
            counted = source.positions(batch, "predicting" if positions == "predicting" else "all")
            n_positions += 0 if counted is None else int(counted.sum())
    else:
        n_positions = max(factor.n for factor in factors.values())
    return KroneckerFactors(
        factors={site.key: factors[site.key] for site in chosen},
        labels=labels,
        positions=positions,
        n_records=len(records),
        n_tokens=sum(source.lengths),
        n_positions=n_positions,
        seed=seed,
        passes=len(groups),
    )


def require_positions(factors: KroneckerFactors, minimum: int) -> None:
    """Refuse factors that were computed from too little.

    Raises:
        UsageError: naming the map with the fewest positions.
    """
    fewest = min(factors.factors.values(), key=lambda factor: factor.n)
    if fewest.n < minimum:
        raise UsageError(
            f"expected at least {minimum} positions for each map, found {fewest.n} for {fewest.key}; add records or "
            "name fewer modules"
        )


def subspace_overlap(first: Tensor, second: Tensor, share: float = SHARE) -> float:
    """How well the leading eigenspaces of two symmetric positive semi-definite matrices agree.

    With k the smallest number of eigenvalues of first + second that hold `share` of its trace, and U1, U2 [w, k] the
    leading eigenvectors of each: ||U1^T U2||_F^2 / k. It is 1 for equal subspaces and about k / w for unrelated ones.
    A half of rank below k has fewer vectors than k, and those it lacks count as not agreeing.

    Args:
        first: [w, w].
        second: [w, w].
        share: in (0, 1].
    """
    values = _robustly(torch.linalg.eigvalsh, first + second).flip(0).clamp(min=0).double()  # [w] descending
    held = values.cumsum(0)
    k = min(int((held < share * held[-1]).sum()) + 1, len(values))
    top = []
    for half in (first, second):
        values, vectors = _robustly(torch.linalg.eigh, half)
        held = values[-k:] > len(half) * torch.finfo(half.dtype).eps * values[-1]
        top.append((vectors[:, -k:] * held).double())  # [w, k]
    return float((top[0].t() @ top[1]).square().sum()) / k


def _robustly(decompose: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    """A decomposition in the matrix's type; in float64 where LAPACK gives up in float32, as on very low ranks."""
    try:
        return decompose(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return decompose(matrix.double())


def add_symmetric(total: Tensor, rows: Tensor) -> None:
    """Upper column blocks of total [w, w] += rows^T rows for rows [n, w]; the rest of total is not meaningful."""
    w = len(total)
    size = max(LEAST_BLOCK, -(-w // BLOCKS))
    for start in range(0, w, size):
        stop = min(w, start + size)
        total[:stop, start:stop].addmm_(rows[:, :stop].t(), rows[:, start:stop])


def grouped(units: Sequence[Sequence[Site]], sizes: Sequence[int], budget: int) -> list[list[Site]]:
    """Units that belong together, in order, in as few groups within a budget as keep that order.

    Raises:
        ResourceError: a unit that is larger than the budget alone.
    """
    groups: list[list[Site]] = []
    room = 0
    for unit, size in zip(units, sizes, strict=True):
        if size > budget:
            raise ResourceError(
                f"expected memory_bytes of at least {size} for the sums of {unit[0].key}, found {budget}; raise it, "
                "leave out the halves or name smaller modules"
            )
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].extend(unit)
        room -= size
    return groups


def part_of(progress: Progress | None, number: int, passes: int) -> Progress | None:
    """Progress of one of several passes over the same records, as progress of all of them."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, passes * total)


# ------------------------------------------------------------------------------------------------------- adding up


def _area(site: Site, leads: bool) -> int:
    """Numbers in the sums of one map; A only where it is not another map's."""
    p, q = site.projection.out_features, site.projection.in_features
    return p * p + (q * q if leads else 0)


def _sharing(
    model: nn.Module, source: Losses, chosen: Sequence[Site], batch: Sequence[int], positions: Positions
) -> list[list[Site]]:
    """Maps in units that read the same input, as one record shows; an expert no token came to stands alone."""
    shares = {site.key: site.key for site in chosen}

    def forward(site: Site, x: Tensor, records: Tensor, first: str) -> None:
        shares[site.key] = first

    listen(model, source, Listener(model, chosen, forward=forward), [batch], positions=positions)
    units: dict[str, list[Site]] = {}
    for site in chosen:
        units.setdefault(shares[site.key], []).append(site)
    return list(units.values())


class _Collector:
    """Adds up the outer products of what a listener hears."""

    def __init__(self, model: nn.Module, group: Sequence[Site], copies: int) -> None:
        self._sites = group
        self._copies = copies
        self._dtype = sum_type(next(model.parameters()))
        self._a: dict[str, Tensor] = {}  # source -> [copies, q, q]
        self._g: dict[str, Tensor] = {}  # key -> [copies, p, p]
        self._source: dict[str, str] = {}
        self._n: dict[str, list[int]] = {site.key: [0] * copies for site in group}
        self._even = 0
        self._split: tuple[Tensor, int] | None = None
        self.listener = Listener(model, group, forward=self._forward, backward=self._backward)

    def begin(self, batch: Sequence[int]) -> None:
        self._even = sum(i % 2 == 0 for i in batch)
        self._split = None

    def _forward(self, site: Site, x: Tensor, records: Tensor, source: str) -> None:
        if self._source.setdefault(site.key, source) != source:
            raise UnsupportedError(
                f"expected maps that share their input to do so in every batch, found {site.key} that does not always; "
                "name it apart from the others"
            )
        for half, part in enumerate(self._parts(x, records)):
            self._n[site.key][half] += len(part)
        if source == site.key:
            self._add(self._a, site.key, x, records)

    def _backward(self, site: Site, x: Tensor | None, g: Tensor, records: Tensor) -> None:
        self._add(self._g, site.key, g, records)

    def _add(self, sums: dict[str, Tensor], key: str, rows: Tensor, records: Tensor) -> None:
        if key not in sums:
            width = rows.shape[1]
            sums[key] = torch.zeros(self._copies, width, width, dtype=self._dtype, device=rows.device)
        for half, part in enumerate(self._parts(rows.to(self._dtype), records)):
            if len(part):
                add_symmetric(sums[key][half], part)

    def _parts(self, rows: Tensor, records: Tensor) -> list[Tensor]:
        """Rows of the even records and of the odd ones; records ascend, so each half lies together."""
        if self._copies == 1:
            return [rows]
        if self._split is None or self._split[0] is not records:
            self._split = records, int((records < self._even).sum())
        at = self._split[1]
        return [rows[:at], rows[at:]]

    def factors(self) -> dict[str, Factor]:
        """The factors of the group; sums are released on the way."""
        means: dict[str, tuple[Tensor, float | None]] = {}
        found = {}
        for site in self._sites:
            key, projection = site.key, site.projection
            source = self._source.get(key, key)
            if source not in means:
                means[source] = self._mean(self._a, source, projection.in_features)
            a, overlap_a = means[source]
            g, overlap_g = self._mean(self._g, key, projection.out_features)
            found[key] = Factor(
                key=key,
                module=projection.module,
                parameter=projection.parameter,
                expert=site.expert,
                orientation=projection.orientation,
                block=site.block,
                role=projection.role,
                a=a,
                g=g,
                n=sum(self._n[key]),
                overlap_a=overlap_a,
                overlap_g=overlap_g,
            )
        return found

    def _mean(self, sums: dict[str, Tensor], key: str, width: int) -> tuple[Tensor, float | None]:
        """[w, w] mean outer product, and the overlap of the halves."""
        counts = self._n[key]
        if key not in sums:  # nothing came: an expert without tokens, or a map the loss does not depend on
            return torch.zeros(width, width, dtype=self._dtype), None
        halves = sums.pop(key).triu_()  # [copies, w, w]
        if not bool(halves.isfinite().all()):
            raise UnsupportedError(
                f"expected finite activations and gradients, found others in {key}; load the model in float32"
            )
        halves += halves.triu(1).mT  # the lower triangles, which were never computed
        compared = len(counts) > 1 and min(counts) > 0 and bool(halves.any())
        overlap = subspace_overlap(halves[0], halves[1]) if compared else None
        return halves.sum(0).div_(max(1, sum(counts))).cpu(), overlap
