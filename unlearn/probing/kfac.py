"""The kfac probe: curvature spectra of linear maps, the cut an edit would make, and a score for every record.

Modules are those the `kfac` editor would edit unless the settings say otherwise, and so is the cut: what the probe
shows is what `unlearn edit kfac` does. Factors can be written to a file and read again by a later probe or the editor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.curvature.ekfac import corrected_masses
from probes.curvature.factors import Factor, KroneckerFactors, kronecker_factors
from probes.curvature.kronecker import Basis, Eigenbases, Kept, edit_figures, keep_cells, keep_pairs
from probes.curvature.records import memorisation_scores, record_curvature
from probes.errors import UsageError
from probes.records import Record
from probes.statistics import auc
from probes.taps import Site
from unlearn.editors.factorfile import load_factors, save_factors
from unlearn.editors.kfac import PUBLISHED_RHO
from unlearn.editors.linearmaps import matrix
from unlearn.editors.selection import MapParameters, select_maps
from unlearn.evidence.measure import Loaded
from unlearn.probing.figure import figure
from unlearn.records.tokens import data_digest
from unlearn.workspace import Workspace

OVERLAP = 0.8  # below it the halves of the data disagree about the leading directions
PLENTY = 10  # positions per dimension below which factors are noisy
ORDINARY = 64  # records of the data that say what ordinary figures are


def run(workspace: Workspace, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure or read the factors, cut, and score the records where there are some.

    Raises:
        UsageError: a module the model does not have, or too few positions.
        IntegrityError: a file with factors of another checkpoint.
    """
    loaded, sets = workspace.loaded("checkpoint"), workspace.sets()
    maps = _maps(loaded, settings)
    factors, digest = _factors(workspace, loaded, maps, settings, sets["retain"])
    _expect_enough(factors, maps)
    bases: dict[str, Basis] = {}
    kept: dict[str, Kept | torch.Tensor] = {}
    masses: dict[str, torch.Tensor] = {}
    decompose = Eigenbases()
    for site in maps:
        bases[site.key] = decompose(factors.factors[site.key])
    if settings["correction"] == "ekfac":
        masses = corrected_masses(
            loaded.model,
            sets["retain"],  # type: ignore[arg-type]
            factors,
            bases,
            batch_tokens=settings["batch_tokens"],
            model_map=loaded.model_map,
            progress=workspace.progress,
        )
    rho = PUBLISHED_RHO[loaded.task] if settings["rho"] == "auto" else settings["rho"]
    parameters = dict(loaded.model.named_parameters())
    rows = []
    for site in maps:
        basis, mass = bases[site.key], masses.get(site.key)
        kept[site.key] = keep_pairs(basis.lam, basis.mu, rho) if mass is None else keep_cells(mass, rho)
        weight = matrix(parameters[site.projection.parameter].detach(), site)
        rows.append(_row(site, factors, basis, kept[site.key], mass, weight, rho))
    warnings = _doubts(rows)
    return {
        "data": {
            "n_records": factors.n_records,
            "n_tokens": factors.n_tokens,
            "n_positions": factors.n_positions,
            "digest": digest,
        },
        "modules": rows,
        "records": _records(workspace, loaded, factors, bases, kept, settings, warnings),
        "warnings": warnings,
    }


def _maps(loaded: Loaded, settings: dict[str, Any]) -> list[Site]:
    """The linear maps the settings name."""
    blocks: Any = settings["blocks"]
    if blocks == "all":
        blocks = tuple(range(len(loaded.model_map.blocks)))
    elif blocks != "auto":
        blocks = tuple(blocks)
    chosen = MapParameters(
        blocks="auto" if settings["modules"] else blocks,
        roles=tuple(settings["roles"]) or "auto",
        include=tuple(settings["modules"]),
    )
    return select_maps(loaded.model_map, chosen)


def _factors(
    workspace: Workspace, loaded: Loaded, maps: list[Site], settings: dict[str, Any], data: list[Record]
) -> tuple[KroneckerFactors, str]:
    """Factors from the file the job names, or measured; and the digest of the data they come from."""
    files = workspace.job.factors
    if "read" in files:
        stored = load_factors(Path(files["read"]))
        stored.require_checkpoint(loaded.tensor_digest)
        stored.require(site.key for site in maps)
        workspace.run.event("factors.read", digest=stored.metadata["digest"])
        return stored.all(), str(stored.metadata["digest"])
    memory = settings["memory_mb"]
    factors = kronecker_factors(
        loaded.model,
        data,  # type: ignore[arg-type]
        modules=[site.key for site in maps],
        labels=settings["labels"],
        positions=settings["positions"],
        batch_tokens=settings["batch_tokens"],
        seed=workspace.job.options.seed,
        memory_bytes=memory * 2**20 if memory else None,
        compute_dtype=torch.bfloat16 if settings["autocast"] == "bfloat16" else None,
        model_map=loaded.model_map,
        progress=workspace.progress,
    )
    digest = data_digest(data)  # type: ignore[arg-type]
    if "write" in files:
        save_factors(Path(files["write"]), factors, tensor_digest=loaded.tensor_digest, digest=digest)
    return factors, digest


def _expect_enough(factors: KroneckerFactors, maps: list[Site]) -> None:
    """Refuse maps with fewer positions than their larger side: directions that were never seen would count as flat."""
    short = [site.key for site in maps if factors.factors[site.key].n < max(factors.factors[site.key].shape)]
    if short:
        factor = factors.factors[short[0]]
        raise UsageError(
            f"expected at least {max(factor.shape)} positions for {short[0]}, found {factor.n} (too few tokens); give "
            "more data or name other modules"
        )


def _row(
    site: Site,
    factors: KroneckerFactors,
    basis: Basis,
    kept: Kept | torch.Tensor,
    mass: torch.Tensor | None,
    weight: torch.Tensor,
    rho: float,
) -> dict[str, Any]:
    factor: Factor = factors.factors[site.key]
    found = edit_figures(weight, basis, kept, mass=mass, positions_per_loss=factors.positions_per_loss(site.key))
    trace_a, trace_g = float(basis.mu.sum()), float(basis.lam.sum())
    pairs = kept.pairs if isinstance(kept, Kept) else int(kept.sum())
    threshold = kept.threshold if isinstance(kept, Kept) else float(mass[kept].min()) if mass is not None else None
    return {
        "module": site.key,
        "block": factor.block,
        "role": factor.role,
        "expert": factor.expert,
        "shape": list(factor.shape),
        "n_positions": factor.n,
        "trace_a": trace_a,
        "trace_g": trace_g,
        "mass": trace_a * trace_g if mass is None else float(mass.sum()),
        "overlap_a": factor.overlap_a,
        "overlap_g": factor.overlap_g,
        "curve": found["curve"],
        "spectrum": found["spectrum"],
        "cut": {
            "rho": rho,
            "kept_pairs": pairs,
            "pairs": factor.shape[0] * factor.shape[1],
            "threshold": threshold,
            "kept_norm": found["kept_norm"],
            "predicted_rise": found["predicted_rise"],
        },
    }


def _records(
    workspace: Workspace,
    loaded: Loaded,
    factors: KroneckerFactors,
    bases: dict[str, Basis],
    kept: dict[str, Kept | torch.Tensor],
    settings: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any] | None:
    """Score records and control, calibrated on the data the factors come from; writes their tables."""
    sets, seed = workspace.sets(), workspace.job.options.seed
    if not sets.get("records"):
        return None

    def table(role: str, records: list[Record]) -> Any:
        return record_curvature(
            loaded.model,
            records,  # type: ignore[arg-type]
            bases,
            kept,
            factors,
            seed=seed,
            batch_tokens=settings["batch_tokens"],
            model_map=loaded.model_map,
            progress=workspace.progress,
        )

    ordinary = table("retain", sets["retain"][:ORDINARY])
    scores: dict[str, np.ndarray] = {}
    columns: list[str] = []
    for role in ("records", "control"):
        if not sets.get(role):
            continue
        frame = table(role, sets[role])
        frame["memorisation_score"] = scores[role] = memorisation_scores(frame, ordinary)
        columns = [str(name) for name in frame.columns if name != "record_id"]
        frame["record_id"] = [workspace.pseudonym(record.record_id) for record in sets[role]]
        workspace.run.write_table(f"probes/{role}.parquet", frame)
    area = None
    if "control" in scores:
        estimate = auc(scores["records"], scores["control"], seed=seed)
        if estimate.interval is not None:
            area = figure(estimate.interval, "AUC")
        else:
            warnings.append(f"The score's AUC against control is not resolvable: {estimate.reason}.")
    return {
        "n": len(scores["records"]),
        "n_control": len(scores.get("control", ())),
        "auc": area,
        "columns": columns,
    }


def _doubts(rows: list[dict[str, Any]]) -> list[str]:
    """What speaks against the factors, for the report."""
    few = [row for row in rows if row["n_positions"] < PLENTY * max(row["shape"])]
    apart = [row for row in rows if min(row["overlap_a"] or 1.0, row["overlap_g"] or 1.0) < OVERLAP]
    found = []
    if few:
        found.append(
            f"{len(few)} of {len(rows)} modules have fewer than {PLENTY} positions per dimension: more data would "
            "steady the factors."
        )
    if apart:
        found.append(
            f"In {len(apart)} of {len(rows)} modules the two halves of the data agree by less than {OVERLAP:g} on the "
            "leading directions: more data would steady the cut."
        )
    return found
