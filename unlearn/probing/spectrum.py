"""The spectrum probe: eigenvalues, density and trace of the mean loss's curvature (`probes.curvature.spectrum`)."""

from __future__ import annotations

from typing import Any

from probes.curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator, block_parameters
from probes.curvature.spectrum import Spectrum, spectrum
from probes.errors import UsageError
from probes.records import TokenRecord
from unlearn.evidence.measure import Loaded
from unlearn.probing.figure import figure
from unlearn.records.tokens import data_digest
from unlearn.workspace import Workspace


def run(workspace: Workspace, settings: dict[str, Any]) -> dict[str, Any]:
    """One operator for the whole model, or one for each block asked for.

    Raises:
        UsageError: a block the model does not have.
        ResourceError: the Lanczos vectors do not fit in the memory allowed.
    """
    loaded, data = workspace.loaded("checkpoint"), workspace.sets()["retain"][: settings["records"]]
    kinds: dict[str, type[CurvatureOperator]] = {"ggn": GaussNewtonOperator, "hessian": HessianOperator}
    chosen = _scopes(loaded, settings["blocks"])
    at_each_end = settings["samples"] * settings["steps"] + settings["max_products"]
    rows, warnings = [], []
    for number, (name, block, parameters) in enumerate(chosen):

        def advance(products: int, number: int = number) -> None:
            done = number + min(products / at_each_end, 1.0)
            workspace.progress(round(100 * done), 100 * len(chosen))

        operator = kinds[settings["operator"]](
            loaded.model,
            data,  # type: ignore[arg-type]
            parameters=parameters,
            model_map=loaded.model_map,
            progress=advance,
        )
        found = spectrum(
            operator,
            k=settings["k"],
            probes=settings["samples"],
            steps=settings["steps"],
            max_products=settings["max_products"],
            seed=workspace.job.options.seed,
            memory_bytes=settings["memory_mb"] * 2**20,
        )
        rows.append(_row(name, block, found))
        warnings += [f"{name}: {text}." for text in found.warnings]
    return {
        "data": {
            "n_records": len(data),
            "n_tokens": sum(record.n_tokens if isinstance(record, TokenRecord) else 1 for record in data),
            "digest": data_digest(data),  # type: ignore[arg-type]
        },
        "operators": rows,
        "warnings": warnings,
    }


def _scopes(loaded: Loaded, blocks: Any) -> list[tuple[str, int | None, tuple[str, ...] | None]]:
    """(name, block, parameter names) of every operator."""
    if blocks == "model":
        return [("model", None, None)]
    names, n = block_parameters(loaded.model_map), len(loaded.model_map.blocks)
    indices = range(n) if blocks == "all" else blocks
    if wrong := [index for index in indices if not -n <= index < n]:
        raise UsageError(f"expected blocks from {-n} to {n - 1}, found {wrong[0]}")
    return [(f"block {index}", index, names[index]) for index in sorted({index % n for index in indices})]


def _row(name: str, block: int | None, found: Spectrum) -> dict[str, Any]:
    ends = [found.largest, *([found.smallest] if found.smallest else [])]
    return {
        "name": name,
        "block": block,
        "parameters": found.n,
        "trace": figure(found.trace.interval(), "nats"),
        "largest": [float(value) for value in found.largest.values],
        "smallest": [float(value) for value in found.smallest.values] if found.smallest else [],
        "residuals": [float(value) for end in ends for value in end.residuals],
        "negative_share": found.negative_share.value if found.negative_share else None,
        "nodes": [float(value) for value in found.nodes],
        "weights": [float(value) for value in found.weights],
        "density": {"x": [float(v) for v in found.density_x], "y": [float(v) for v in found.density_y]},
    }
