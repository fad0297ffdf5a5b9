"""The curvature edit of "From Memorization to Reasoning in the Spectrum of Loss Curvature" (arXiv 2510.24256).

In the eigenbases of a module's Kronecker factors (`probes.curvature.factors`) its weight is C = U_G^T W U_A, and the
pair (i, j) has the curvature mass lam_i mu_j. The smallest set of pairs with a share rho of the whole mass is kept and
the rest set to 0 (`probes.curvature.kronecker`): what most inputs use has high curvature, what single records use has
low. It needs no list of records to forget. The factors are taken over the retain set, kept in the store, and serve
every later request on the same checkpoint with the same data.

To reproduce the official code: `rho: 0.6`, `blocks: [23, 24, 25]`, `roles: [gate, up]` for OLMo-2-7B (preset
`kfac_paper_olmo2_7b`), `labels: gold` (its default; the paper describes `sampled`), `positions: all`, and for ViT-B/16
`rho: 0.75`, `blocks: [0, 11]`, `roles: [up, down]`, `positions: first`.

Departures, each for a reason:
- labels are sampled from the model by default, which is what the paper describes: gold ones give no Fisher information;
- factors belong to one checkpoint and one data set and are refused elsewhere; the published weight cache knows neither,
  and hands out edits of other factors;
- eigenvalues are clamped at 0: negative ones break the published heap's order and its mass;
- rho may be any number in (0, 1], an int too; rho = 1 changes no byte (the published code skips from 0.9999 on);
- a module with fewer counted positions than its larger side is refused: directions that no position reached count as
  flat and would be removed, whatever they are for;
- weights are computed in float64 (float32 above a side of 2048) and rounded once to the type on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, StrictInt
from torch import Tensor

from probes.curvature.ekfac import corrected_masses
from probes.curvature.factors import kronecker_factors
from probes.curvature.kronecker import (
    Basis,
    Eigenbases,
    Kept,
    coordinates,
    figures_of,
    keep_cells,
    keep_pairs,
    random_pairs,
    reconstruct,
)
from probes.errors import IntegrityError, UsageError
from probes.records import Record
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.base import EditContext, EditResult, Progress
from unlearn.editors.factorfile import StoredFactors, load_factors, save_factors
from unlearn.editors.linearmaps import LinearMapEdit, measured_rise
from unlearn.editors.selection import MapParameters, Share, number_or_auto, select_maps, values_of
from unlearn.mistakes import Mistakes
from unlearn.records.tokens import data_digest
from unlearn.requests.yamlfile import Document, parse
from unlearn.runs import cache

if TYPE_CHECKING:
    from probes.modelmap import ModelMap
    from probes.taps import Site

PUBLISHED_RHO = {"causal_lm": 0.6, "image_classification": 0.75}
ADVISED_POSITIONS = 10  # for each of a module's larger side
ADVISED_OVERLAP = 0.8


class KFACParameters(MapParameters):
    """Hyper-parameters; the names are those of a method preset. Maps are chosen as `MapParameters` says.

    Attributes:
        rho: share of the curvature mass to keep; "auto" is the published one, 0.6 for language models and 0.75 for
            image classifiers.
        rho_by: role or glob of module keys to another rho; the most specific entry counts.
        labels: sampled from the model, or the records' own.
        positions: which activations count: all (but a text's last), those predicting a completion token, or an image's
            first, the class token.
        correction: "ekfac" takes the exact second moments in the eigenbasis for masses, from one more pass.
        select: "random" keeps as many pairs drawn at random: a control, not a method.
        factors: path of a factor file to use; labels and positions are then the file's.
        autocast: "bfloat16" runs the model's passes for the factors in it, sums stay in fp32: for hardware that is fast
            at it.
        memory_mb: memory for the factors; maps that do not fit together take further passes over the data.
        max_records: use a seeded sample of this many retain records.
        min_positions: refuse a module with fewer counted positions than this many times its larger side.
    """

    rho: Annotated[float | Literal["auto"], number_or_auto(lambda x: 0 < x <= 1, "a share above 0 and up to 1")] = (
        "auto"
    )
    rho_by: dict[str, Share] = Field(default_factory=dict)
    labels: Literal["sampled", "gold"] = "sampled"
    positions: Literal["all", "predicting", "first"] = "all"
    correction: Literal["none", "ekfac"] = "none"
    select: Literal["curvature", "random"] = "curvature"
    factors: str | None = None
    autocast: Literal["none", "bfloat16"] = "none"
    memory_mb: Annotated[StrictInt, Field(ge=1)] | None = None
    max_records: Annotated[StrictInt, Field(ge=1)] | None = None
    min_positions: Annotated[float, Field(strict=True, ge=0)] = 1.0


@dataclass(frozen=True, slots=True)
class ModuleEdit:
    """What happened to one linear map; the same figures as `edit_figures`.

    Attributes:
        rho: share of the mass asked for.
        kept_pairs: how many pairs were kept.
        pairs: of how many.
        mass: share of the mass in them; None for a random selection.
        kept_norm: share of the squared Frobenius norm that is left.
        predicted_rise: of the mean loss, nats.
        n_positions: positions that the factors are means over.
        overlap_a: agreement of two halves of the data on A's leading subspace; None where it was not measured.
        overlap_g: the same of G.
    """

    rho: float
    kept_pairs: int
    pairs: int
    mass: float | None
    kept_norm: float
    predicted_rise: float
    n_positions: int
    overlap_a: float | None
    overlap_g: float | None


class KFACEditor:
    """The curvature edit as a registered editor."""

    name: ClassVar[str] = "kfac"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2510.24256"
    needs_retain: ClassVar[bool] = True
    needs_forget: ClassVar[bool] = False
    inference_time: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), KFACParameters)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the edit may change.

        Raises:
            UsageError: if a glob, block or role matches nothing.
        """
        return list(dict.fromkeys(site.projection.parameter for site in self._maps(model_map)[0]))

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes over records: two losses of each retained one, and the factors' and the correction's gradients."""
        p = self.parameters
        n = min(n_retain, p.max_records or n_retain)
        return {"forward": 2 * n, "forward_backward": n * ((p.factors is None) + (p.correction == "ekfac"))}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Compute factors over the retain set, unless the store or a file has them, and write the edited copy.

        Raises:
            UsageError: no retain records, too few positions, or a factor file without a module.
            IntegrityError: factors of another checkpoint.
        """
        p = self.parameters
        if not context.retain:
            raise UsageError("expected retain records for kfac, found none; give some or let them be drafted")
        records = _sample(context.retain, p.max_records, context.seed)
        maps, rhos = self._maps(context.model_map)
        digest = data_digest(records)  # type: ignore[arg-type]
        key = self._key(context, maps, digest)
        stored = self._found(context, maps, key)
        reused = stored is not None
        progress = _Passes(context.progress, len(records), (not reused) + (p.correction == "ekfac") + 2)
        if stored is None:
            stored = self._compute(context, maps, records, digest, key, progress.next())
        maps, warnings = self._usable(maps, stored)
        device = next(context.model.parameters()).device
        corrected = self._correct(context, maps, records, stored, progress) if p.correction == "ekfac" else {}
        edit = _Edit(stored, rhos, corrected, p.select, context.seed, device)
        weights = LinearMapEdit(context.source, context.model, maps, edit)
        deltas = write_edited(context.source, out, weights)
        rise = measured_rise(context.model_map, weights.edited, records, progress.next())
        resolved = {"labels": stored.metadata["labels"], "positions": stored.metadata["positions"]}
        if p.rho == "auto":
            resolved["rho"] = PUBLISHED_RHO[context.model_map.task]
        if p.factors is not None:
            resolved["factors"] = stored.path.name
        edits = {site.key: edit.edits[site.key] for site in maps}
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json") | resolved,
            statistics={
                "kept_pairs": sum(found.kept_pairs for found in edits.values()),
                "pairs": sum(found.pairs for found in edits.values()),
                "predicted_rise": math.fsum(found.predicted_rise for found in edits.values()),
                **rise,
                "modules": {key: asdict(found) for key, found in edits.items()},
            },
            importances={"factors": stored.describe() | {"reused": reused}},
            warnings=warnings + self._warnings(edits, maps),
        )

    def _maps(self, model_map: ModelMap) -> tuple[list[Site], dict[str, float]]:
        """The linear maps to edit, and the rho of each."""
        p = self.parameters
        maps = select_maps(model_map, p)
        rho = PUBLISHED_RHO[model_map.task] if p.rho == "auto" else p.rho
        return maps, values_of(maps, p.rho_by, rho, "rho_by")

    # -- statistics of the data ------------------------------------------------------------------------------------

    def _key(self, context: EditContext, maps: Sequence[Site], digest: str) -> str | None:
        """Where the store keeps these factors: everything they depend on; None where nothing says which model it is."""
        p = self.parameters
        if not context.cache_parts:
            return None
        return cache.key_of(
            kind="factors",
            version=self.version,
            labels=p.labels,
            positions=p.positions,
            autocast=p.autocast,
            seed=context.seed if p.labels == "sampled" else None,
            modules=[site.key for site in maps],
            data=digest,
            **context.cache_parts,
        )

    def _found(self, context: EditContext, maps: Sequence[Site], key: str | None) -> StoredFactors | None:
        """The factors in the file given, or those in the store; None to compute them."""
        if self.parameters.factors is not None:
            given = load_factors(Path(self.parameters.factors))
            given.require_checkpoint(context.source.tensor_digest())
            given.require(site.key for site in maps)
            return given
        found = None if key is None else cache.lookup(key, ".safetensors")
        if found is None:
            return None
        try:
            stored = load_factors(found)
            stored.require_checkpoint(context.source.tensor_digest())
        except IntegrityError:
            return None  # computed again and stored anew
        return stored

    def _compute(
        self,
        context: EditContext,
        maps: Sequence[Site],
        records: Sequence[Record],
        digest: str,
        key: str | None,
        progress: Progress,
    ) -> StoredFactors:
        computed = kronecker_factors(
            context.model,
            records,  # type: ignore[arg-type]
            modules=[site.key for site in maps],
            labels=self.parameters.labels,
            positions=self.parameters.positions,
            seed=context.seed,
            memory_bytes=self.parameters.memory_mb * 2**20 if self.parameters.memory_mb else None,
            compute_dtype=torch.bfloat16 if self.parameters.autocast == "bfloat16" else None,
            model_map=context.model_map,
            progress=progress,
        )
        path = context.work / "factors.safetensors"
        stored = save_factors(path, computed, tensor_digest=context.source.tensor_digest(), digest=digest)
        if key is not None:
            cache.store(key, path)
        return stored

    def _usable(self, maps: Sequence[Site], stored: StoredFactors) -> tuple[list[Site], list[str]]:
        """Refuse maps with too few positions; experts that few tokens came to are left alone instead."""
        multiple = self.parameters.min_positions
        usable: list[Site] = []
        few: list[Site] = []
        for site in maps:
            found, wanted = stored.positions(site.key), multiple * _side(site)
            (usable if found >= wanted else few).append(site)
            if found < wanted and site.expert is None:
                raise UsageError(
                    f"expected at least {math.ceil(wanted)} positions for {site.key} (min_positions {multiple:g} times "
                    f"its larger side), found {found}; give more retain data, name narrower modules, or lower "
                    "min_positions"
                )
        if not usable:
            raise UsageError(
                f"expected experts with at least {multiple:g} times their larger side of routed positions, found none; "
                "give more retain data, or lower min_positions"
            )
        if not few:
            return usable, []
        return usable, [f"{len(few)} experts were left alone for too few positions routed to them: {_named(few)}"]

    def _correct(
        self,
        context: EditContext,
        maps: Sequence[Site],
        records: Sequence[Record],
        stored: StoredFactors,
        progress: _Passes,
    ) -> dict[str, tuple[Basis, Tensor]]:
        """Bases and their corrected masses. Masses go with one set of eigenvectors, so they are not stored."""
        decompose = Eigenbases(next(context.model.parameters()).device)
        factors = stored.all()
        bases = {site.key: decompose(factors.factors[site.key]) for site in maps}
        masses = corrected_masses(
            context.model,
            records,  # type: ignore[arg-type]
            factors,
            bases,
            model_map=context.model_map,
            progress=progress.next(),
        )
        return {key: (basis, masses[key]) for key, basis in bases.items()}

    # -- what to tell ----------------------------------------------------------------------------------------------

    def _warnings(self, edits: Mapping[str, ModuleEdit], maps: Sequence[Site]) -> list[str]:
        p, found = self.parameters, []
        thin = [site for site in maps if edits[site.key].n_positions < ADVISED_POSITIONS * _side(site)]
        if thin:
            least = min(thin, key=lambda site: edits[site.key].n_positions / _side(site))
            found.append(
                f"{len(thin)} of {len(maps)} modules have fewer positions than {ADVISED_POSITIONS} times their larger "
                f"side, {least.key} the fewest ({edits[least.key].n_positions} for {_side(least)}): give more data"
            )
        overlaps = {
            key: min(halves)
            for key, edit in edits.items()
            if (halves := [half for half in (edit.overlap_a, edit.overlap_g) if half is not None])
        }
        low = [key for key, overlap in overlaps.items() if overlap < ADVISED_OVERLAP]
        if low:
            worst = min(low, key=lambda key: overlaps[key])
            found.append(
                f"two halves of the retain data agree by less than {ADVISED_OVERLAP} on the leading subspaces of "
                f"{len(low)} of {len(maps)} modules, {worst} the least ({overlaps[worst]:.2f}): give more retain data"
            )
        if p.select == "random":
            found.append("pairs were kept at random, as a control: this is not the curvature edit")
        return found


class _Edit:
    """The change to each linear map, with a note of what happened.

    Factors are read and decomposed when their map comes up; those of the last input stay, for the map beside it.
    """

    def __init__(
        self,
        stored: StoredFactors,
        rhos: Mapping[str, float],
        corrected: Mapping[str, tuple[Basis, Tensor]],
        select: Literal["curvature", "random"],
        seed: int,
        device: torch.device,
    ) -> None:
        self._stored, self._rhos, self._corrected = stored, rhos, corrected
        self._select, self._seed = select, seed
        self._bases = Eigenbases(device)
        self.edits: dict[str, ModuleEdit] = {}

    def __call__(self, site: Site, weight: Tensor) -> Tensor | None:
        key, (p, q) = site.key, weight.shape
        factor, rho = self._stored.factor(key), self._rhos[key]
        if factor.shape != (p, q):
            raise IntegrityError(
                f"expected factors of shape {(p, q)} for {key}, found {factor.shape}; compute them again"
            )
        new, pairs, share, norm, rise = None, p * q, 1.0, 1.0, 0.0
        if rho < 1:
            basis, mass = self._corrected[key] if self._corrected else (self._bases(factor), None)
            try:
                kept: Kept | Tensor = keep_pairs(basis.lam, basis.mu, rho) if mass is None else keep_cells(mass, rho)
            except UsageError as error:
                raise UsageError(f"{key}: {error}") from None
            pairs = kept.pairs if isinstance(kept, Kept) else int(kept.sum())
            if isinstance(kept, Kept):
                share = kept.mass
            elif mass is not None:
                share = float(mass[kept].sum(dtype=torch.float64) / mass.sum(dtype=torch.float64))
            if self._select == "random":
                kept = random_pairs(p, q, pairs, _seed(self._seed, key))
            c = coordinates(weight, basis)
            losses: int = self._stored.metadata["n_tokens"]
            found = figures_of(c, basis, kept, mass=mass, positions_per_loss=factor.n / losses, points=0)
            norm, rise = found["kept_norm"], found["predicted_rise"]
            new = reconstruct(c, basis, kept)
        self.edits[key] = ModuleEdit(
            rho=rho,
            kept_pairs=pairs,
            pairs=p * q,
            mass=None if self._select == "random" else share,
            kept_norm=norm,
            predicted_rise=rise,
            n_positions=factor.n,
            overlap_a=factor.overlap_a,
            overlap_g=factor.overlap_g,
        )
        return new


class _Passes:
    """Progress over a known number of passes over the records."""

    def __init__(self, report: Progress, n: int, passes: int) -> None:
        self._report, self._n, self._total, self._begun = report, n, n * passes, 0

    def next(self) -> Progress:
        """Progress of the next pass, or of the next few together."""
        before, self._begun = self._begun * self._n, self._begun + 1
        return lambda done, _: self._report(before + done, self._total)


def _sample(records: Sequence[Record], most: int | None, seed: int) -> list[Record]:
    """At most so many records, drawn without replacement, in their order."""
    if most is None or most >= len(records):
        return list(records)
    chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:most]
    return [records[i] for i in sorted(chosen.tolist())]


def _side(site: Site) -> int:
    return max(site.projection.in_features, site.projection.out_features)


def _seed(seed: int, key: str) -> int:
    """Independent draws for every module."""
    return int.from_bytes(hashlib.sha256(f"pairs|{seed}|{key}".encode()).digest()[:7], "little")


def _named(maps: Sequence[Site], shown: int = 3) -> str:
    names = ", ".join(site.key for site in maps[:shown])
    return names + (f" and {len(maps) - shown} more" if len(maps) > shown else "")
