"""The localise probe: where a record's completion comes from, tested by ablation, and which training lies behind it.

Records are those the model finds most probable: a completion that the model does not hold has nowhere to come from.
Prompt positions are numbers; no token is written anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probes.ablation import Ablation, ablate, ablate_parts
from probes.attribution import Attribution, attribute, heat
from probes.influence import influence
from probes.memorised import memorised
from probes.neurons import neuron_means
from probes.records import Record
from unlearn.evidence.measure import Loaded
from unlearn.workspace import Workspace

GAP = 0.05  # of the change in log p that the path integral may lose before a warning
LISTED = 50  # neurons listed for a record
ORDINARY = 8  # records of the data that are measured under the same ablation: a neuron can carry the whole model


def run(workspace: Workspace, settings: dict[str, Any]) -> dict[str, Any]:
    """Attribute, ablate, and rank training records where a training set is given."""
    loaded, sets = workspace.loaded("checkpoint"), workspace.sets()
    chosen = _most_probable(loaded, sets["records"], settings["records"])
    # Never-seen records of the same kind where there are some: what they lose too is not what holds the record.
    ordinary = sets.get("control") or sets.get("retain") or []
    step = _Steps(workspace, 2 + bool(ordinary) + bool(sets.get("training")), len(chosen))
    found = attribute(
        loaded.model,
        chosen,  # type: ignore[arg-type]
        steps=settings["steps"],
        neurons=max(LISTED, settings["neurons"]),
        model_map=loaded.model_map,
        progress=step(0),
    )
    fill = neuron_means(loaded.model, ordinary, model_map=loaded.model_map) if ordinary else None  # type: ignore[arg-type]
    ablations = []
    for number, (record, attribution) in enumerate(zip(chosen, found, strict=True), start=1):
        ablations.append(
            ablate(
                loaded.model,
                record,
                attribution.neurons[: settings["neurons"]],
                fill=fill,
                draws=settings["draws"],
                seed=workspace.job.options.seed,
                control=ordinary[:ORDINARY],  # type: ignore[arg-type]
                model_map=loaded.model_map,
            )
        )
        step(1)(number, len(chosen))
    parts = (
        ablate_parts(
            loaded.model,
            chosen,  # type: ignore[arg-type]
            ordinary[: 2 * len(chosen)],  # type: ignore[arg-type]
            model_map=loaded.model_map,
            progress=step(2),
        )
        if ordinary
        else ()
    )
    behind = None
    if sets.get("training"):
        behind = _behind(workspace, loaded, chosen, settings["influence"], step(2 + bool(ordinary)))
    rows = [
        _row(workspace, attribution, ablation, behind[i] if behind else None)
        for i, (attribution, ablation) in enumerate(zip(found, ablations, strict=True))
    ]
    warnings = []
    if loose := sum(attribution.relative_gap > GAP for attribution in found):
        warnings.append(
            f"In {loose} of {len(found)} records the path integral misses more than {GAP:.0%}: take more steps."
        )
    if behind:
        warnings.append(
            "Influence comes from this checkpoint alone. Once a record is memorised its gradient is small, and its own "
            "training often ranks no higher than other text: checkpoints from before would tell more."
        )
    return {
        "records": rows,
        "heat": [{"block": cell.block, "module": cell.module, "score": cell.score} for cell in heat(found)],
        "parts": [
            {
                "block": part.block,
                "module": part.module,
                "drop": part.drop,
                "ordinary": part.control_drop,
                "contrast": part.contrast,
            }
            for part in parts
        ],
        "warnings": warnings,
    }


class _Steps:
    """Progress over several parts of equal weight."""

    def __init__(self, workspace: Workspace, parts: int, size: int) -> None:
        self._progress, self._parts, self._size = workspace.progress, parts, size

    def __call__(self, part: int) -> Any:
        """A progress callback for one part."""

        def update(done: int, total: int) -> None:
            self._progress(round(self._size * (part + done / max(1, total))), self._size * self._parts)

        return update


def _most_probable(loaded: Loaded, records: list[Record], n: int) -> list[Record]:
    """The n records with the lowest mean loss, lowest first; ties in input order."""
    losses = memorised(loaded.model, records, model_map=loaded.model_map)["loss"]  # type: ignore[arg-type]
    order = np.argsort(losses.to_numpy(), kind="stable")
    return [records[int(i)] for i in order[:n]]


def _behind(
    workspace: Workspace, loaded: Loaded, chosen: list[Record], n: int, progress: Any
) -> list[list[dict[str, Any]]]:
    """The most influential training records of each record, as cosines of gradients: lengths then weigh alike."""
    found = influence(loaded.model, workspace.sets()["training"], chosen, progress=progress)  # type: ignore[arg-type]
    return [
        [{"id": workspace.pseudonym(name), "score": value} for name, value in found.ranking(target, n, relative=True)]
        for target in range(len(chosen))
    ]


def _row(
    workspace: Workspace, found: Attribution, ablation: Ablation, behind: list[dict[str, Any]] | None
) -> dict[str, Any]:
    return {
        "id": workspace.pseudonym(found.record_id),
        "n_tokens": found.n_tokens,
        "log_prob": found.log_prob,
        "prompt": [
            {"position": i, "score": float(value), "occlusion": float(found.occlusion[i])}
            for i, value in enumerate(found.prompt)
        ],
        "layers": [{"block": cell.block, "module": cell.module, "score": cell.score} for cell in found.layers],
        "neurons": [{"block": cell.block, "neuron": cell.neuron, "score": cell.score} for cell in found.neurons],
        "ablation": {
            "k": ablation.k,
            "top": ablation.top,
            "random": ablation.random_mean,
            "ordinary": ablation.control,
        },
        "influence": behind,
        "completeness_gap": found.completeness_gap,
    }
