"""Curvature masses corrected in the Kronecker eigenbasis (EK-FAC, arXiv 1806.03884), from one more pass.

K-FAC gives the pair (i, j) of eigenvectors u_i of G and v_j of A the mass lambda_i mu_j: a product of two means, as if
x and g were independent. In the same basis the exact second moment is

    mass_ij = 1/N sum_t (u_i . g_t)^2 (v_j . x_t)^2,

and among all diagonals in this basis it is the one closest (in Frobenius norm) to 1/N sum_t h_t h_t^T with
h_t = vec(g_t x_t^T). The bases are kept; the ranking of pairs, and the predicted rise of the loss, change.

Shape letters: n rows of a batch, p = out features, q = in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from probes.curvature.factors import KroneckerFactors, grouped, part_of
from probes.curvature.kronecker import Basis
from probes.errors import UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.passes import losses_of, sum_type
from probes.records import ImageRecord, TokenRecord
from probes.taps import Listener, Site, batches_of, check_positions, listen, sites


def corrected_masses(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    factors: KroneckerFactors,
    bases: Mapping[str, Basis],
    *,
    batch_tokens: int | None = None,
    memory_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Second moments of the gradient's components in Kronecker eigenbases.

    Args:
        model: the model that the factors are of; left as found.
        records: the records they were computed from, or others like them.
        factors: they decide labels, positions and seed.
        bases: key -> eigenbasis, of the maps wanted. Maps that share the object `u_a` and their input are projected
            once.
        batch_tokens: padded tokens a batch, or images; changes results by rounding only.
        memory_bytes: bytes that the masses and bases of one pass may take; maps are then grouped as for the factors.
        compute_dtype: type to run the model in by autocast.
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all, over all passes).

    Returns:
        key -> [p, q] masses, fp32 (float64 for a float64 model), CPU; row i belongs to column i of `u_g`, column j to
        column j of `u_a`. Zero for an expert that no token came to.

    Raises:
        UsageError: no records, no bases, or a basis that is not one of the factors'.
        UnsupportedError, ResourceError: as for `kronecker_factors`.
    """
    if not records or not bases:
        raise UsageError(f"expected records and bases, found {len(records)} and {len(bases)}; add what is missing")
    for key, basis in bases.items():
        found = (len(basis.u_g), len(basis.u_a))
        if key not in factors.factors or factors.factors[key].shape != found:
            raise UsageError(f"expected bases of these factors, found one for {key} of shape {found}; compute it anew")
    positions = factors.positions
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    check_positions(model_map, records, positions)
    chosen = sites(model_map, list(bases))
    source = losses_of(model, records, sampled=factors.labels == "sampled", seed=factors.seed, model_map=model_map)
    batches = batches_of(records, batch_tokens, next(model.parameters()).device)
    groups = [chosen]
    if memory_bytes is not None:
        item = sum_type(next(model.parameters())).itemsize
        shapes = [factors.factors[site.key].shape for site in chosen]
        sizes = [item * (p * q + p * p + q * q) for p, q in shapes]
        groups = grouped([[site] for site in chosen], sizes, memory_bytes)
    masses: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        sums = _Masses(model, group, bases)
        listen(
            model,
            source,
            sums.listener,
            batches,
            positions=positions,
            compute_dtype=compute_dtype,
            progress=part_of(progress, number, len(groups)),
        )
        masses |= sums.means()
    return masses


class _Masses:
    """Adds up products of squared components."""

    def __init__(self, model: nn.Module, group: Sequence[Site], bases: Mapping[str, Basis]) -> None:
        parameter = next(model.parameters())
        self._dtype = sum_type(parameter)
        self._sums: dict[str, Tensor] = {}  # key -> [p, q]
        self._bases: dict[int, Tensor] = {}  # id of a basis as given -> the same where it is needed
        self._given = {site.key: bases[site.key] for site in group}
        self._n = dict.fromkeys(self._given, 0)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None  # x, u_a, squared components of x
        self.listener = Listener(model, group, backward=self._backward, keep=True)

    def _backward(self, site: Site, x: Tensor | None, g: Tensor, records: Tensor) -> None:
        assert x is not None
        given = self._given[site.key]
        if self._latest is None or self._latest[0] is not x or self._latest[1] is not given.u_a:
            self._latest = x, given.u_a, self._squares(x, given.u_a)
        inputs, outputs = self._latest[2], self._squares(g, given.u_g)  # [n, q], [n, p]
        if site.key not in self._sums:
            self._sums[site.key] = inputs.new_zeros(outputs.shape[1], inputs.shape[1])
        self._sums[site.key].addmm_(outputs.t(), inputs)
        self._n[site.key] += len(g)

    def _squares(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Squared components [n, w] of rows [n, w]."""
        if id(basis) not in self._bases:
            self._bases[id(basis)] = basis.to(rows.device, self._dtype)
        return (rows.to(self._dtype) @ self._bases[id(basis)]).square_()

    def means(self) -> dict[str, Tensor]:
        """[p, q] of each map."""
        found = {}
        for key, given in self._given.items():
            zero = torch.zeros(len(given.u_g), len(given.u_a), dtype=self._dtype)
            found[key] = self._sums[key].div_(max(1, self._n[key])).cpu() if key in self._sums else zero
        return found
