"""Truncation of weights by their singular values: a baseline for the curvature edit that looks at no data.

Of every selected weight only the largest singular values are kept (`probes.curvature.svd`). In arXiv 2510.24256 such a
cut, at settings chosen on memorised text, removes most of what a curvature edit removes; any edit that uses data has to
do better than this one at the same cost.

The published baseline is stated for OLMo-2-7B as block 21 with half the rank of gate and 0.5 % off up and down:
`blocks: [21]`, `roles: [gate, up, down]`, `fraction: 0.995`, `fraction_by: {gate: 0.5}`. Its code was not released, so
what is cut there may be defined otherwise. Weights are computed in float64 (float32 above a side of 2048) and rounded
once to the type on disk; a fraction of 1 changes no byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from probes.curvature.svd import kept_rank, svd_truncate
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.linearmaps import LinearMapEdit, measured_rise
from unlearn.editors.selection import MapParameters, Share, select_maps, values_of
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, parse

if TYPE_CHECKING:
    from probes.modelmap import ModelMap
    from probes.taps import Site


class SVDParameters(MapParameters):
    """Hyper-parameters; the names are those of a method preset. Maps are chosen as `MapParameters` says.

    Attributes:
        fraction: of the singular values of each weight to keep.
        fraction_by: role or glob of module keys to another fraction; the most specific entry counts.
    """

    fraction: Share = 0.5
    fraction_by: dict[str, Share] = Field(default_factory=dict)


class SVDEditor:
    """Truncation by singular values as a registered editor."""

    name: ClassVar[str] = "svd"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "baseline of arXiv 2510.24256"
    needs_retain: ClassVar[bool] = False
    needs_forget: ClassVar[bool] = False
    inference_time: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), SVDParameters)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the edit may change.

        Raises:
            UsageError: if a glob, block or role matches nothing.
        """
        return list(dict.fromkeys(site.projection.parameter for site in select_maps(model_map, self.parameters)))

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes over records: two losses of each retained one, to say what the cut costs."""
        return {"forward": 2 * n_retain, "forward_backward": 0}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Write the truncated copy; the loss of the retain set, where there is one, is measured before and after."""
        p = self.parameters
        maps = select_maps(context.model_map, p)
        edit = _Edit(values_of(maps, p.fraction_by, p.fraction, "fraction_by"))
        weights = LinearMapEdit(context.source, context.model, maps, edit)
        deltas = write_edited(context.source, out, weights)
        rise = measured_rise(context.model_map, weights.edited, context.retain, context.progress)
        modules = {site.key: edit.edits[site.key] for site in maps}
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json"),
            statistics={
                "kept_rank": sum(module["kept_rank"] for module in modules.values()),
                "rank": sum(module["rank"] for module in modules.values()),
                **rise,
                "modules": modules,
            },
        )


class _Edit:
    """The change to each linear map, with a note of what happened."""

    def __init__(self, fractions: Mapping[str, float]) -> None:
        self._fractions = fractions
        self.edits: dict[str, dict[str, Any]] = {}

    def __call__(self, site: Site, weight: Tensor) -> Tensor | None:
        p, q = weight.shape
        fraction = self._fractions[site.key]
        new = svd_truncate(weight, fraction)
        whole = float(weight.double().square().sum())
        self.edits[site.key] = {
            "fraction": fraction,
            "kept_rank": kept_rank(p, q, fraction),
            "rank": min(p, q),
            "kept_norm": float(new.double().square().sum()) / whole if whole else 1.0,
        }
        return None if new is weight else new
