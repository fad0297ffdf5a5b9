"""Attacks that look inside the model: logit lens, linear probe, activation patching, steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attacks.steering import find_steering, steered
from probes.errors import UsageError
from probes.inside import patching as patch
from probes.inside.lens import Lens
from probes.inside.lens import lens as read_layers
from probes.inside.linear import Probe, fit_probe, score_probe
from probes.inside.states import spaced_layers
from probes.records import TokenRecord
from unlearn.attacking.result import Result, line
from unlearn.attacking.stress import graded, rows_of, spread
from unlearn.attacking.views import ROLES, Views
from unlearn.records.draft import swapped, texts_of
from unlearn.records.raw import RawRecord
from unlearn.records.swap import words_of

_NAMES = {"records": "records", "control": "never seen"}


def lens(views: Views, settings: dict[str, Any]) -> Result:
    """Every layer's state read through the final norm and the head."""
    layers = spaced_layers(len(views.model_map.blocks), settings["layers"])
    rows = {role: rows_of(views, role, settings["records"]) for role in ROLES}
    found: dict[str, Lens] = {}
    for role in ROLES:
        found[role] = read_layers(
            views.model,
            _chosen(views, role, rows[role]),
            layers=layers,
            top=settings["top"],
            batch_tokens=views.settings.batch_tokens,
            model_map=views.model_map,
            progress=views.progress,
        )
    result = Result()
    attacked = {
        role: pd.DataFrame(
            {"probability": one.best, "accuracy": one.accuracy.max(1), "extracted": one.emitted},
        )
        for role, one in found.items()
    }
    graded(result, views, attacked, _plain(views, rows), rows, title="probability per token, by the best layer of each")
    # Reading teaches nothing: where never-seen records are likelier in a layer than in the output, the edit has pushed
    # them down as well, or it is the choice of the best layer. Both are in N; neither is a reason to set this aside.
    del result.controls["plain"]
    result.mean(
        "any_layer",
        f"share of tokens among the first {settings['top']} of at least one layer",
        found["records"].any_layer,
        _clusters(views, "records", rows["records"]),
        found["control"].any_layer,
        _clusters(views, "control", rows["control"]),
        seed=views.seed,
    )
    result.curves.append(
        _by_layer(
            "What each layer says of the completions",
            "probability per token",
            layers,
            {_NAMES[role]: one.probability.mean(0) for role, one in found.items()},
        )
    )
    result.notes.append(
        "The best layer of each record is as generous to never-seen records, so both are read the same way. The last "
        "layer is the model's own output."
    )
    return result


def probe(views: Views, settings: dict[str, Any]) -> Result:
    """A linear map for each layer, learned on half A, scored on half B and on never-seen records."""
    first, second = views.halves("records")
    fitted = rows_of(views, "records", settings["records"], first)
    rows = {
        "records": rows_of(views, "records", settings["records"], second),
        "control": rows_of(views, "control", settings["records"]),
    }
    _expect_rows(fitted, rows["records"])
    more: dict[str, Any] = {"batch_tokens": views.settings.batch_tokens, "model_map": views.model_map}
    layers = spaced_layers(len(views.model_map.blocks), settings["layers"])
    learned = _chosen(views, "records", fitted)
    maps = fit_probe(views.model, learned, layers=layers, seed=views.seed, **more)
    chosen = maps.layers[maps.best]
    found = {role: score_probe(views.model, maps, _chosen(views, role, rows[role]), **more) for role in ROLES}
    result = Result()
    attacked = {}
    for role, one in found.items():
        accuracy = one.accuracy[:, maps.best]
        attacked[role] = pd.DataFrame(
            {"probability": one.probability[:, maps.best], "accuracy": accuracy, "extracted": accuracy == 1.0}
        )
    plain = _plain(views, rows)
    # What a probe teaches is what its map adds to the readout of the same layer, not what that layer says anyway.
    unlearned = read_layers(views.model, _chosen(views, "control", rows["control"]), layers=[chosen.layer], **more)
    plain["control"] = plain["control"].assign(probability=unlearned.probability[:, 0])
    graded(result, views, attacked, plain, rows, title="probability per token under the linear probe")
    result.titles["plain"] = "without the probe: the output; of never-seen records, the readout of the probe's layer"
    wrong = fit_probe(views.model, learned, layers=[chosen.layer], seed=views.seed, shuffled=True, **more)
    control = score_probe(views.model, wrong, _chosen(views, "records", rows["records"]), **more)
    result.mean(
        "shuffled",
        "the same, learned from shuffled tokens",
        control.probability[:, 0],
        _clusters(views, "records", rows["records"]),
        seed=views.seed,
    )
    result.curves.append(
        _by_layer(
            "What a linear probe of each layer says of the completions",
            "probability per token",
            layers,
            {_NAMES[role]: one.probability.mean(0) for role, one in found.items()},
        )
    )
    result.tables.append(_probe_table(maps))
    result.notes.append(
        f"Learned on {len(fitted)} records and scored on {len(rows['records'])} others; layer {chosen.layer} was "
        "chosen on those learned from. Never-seen records gain from a probe what style and frequent words give."
    )
    return result


def _probe_table(maps: Probe) -> dict[str, Any]:
    return {
        "title": "Probes, chosen by the log-probability of tokens held out on the half learned from",
        "columns": ["layer", "log-probability held out", "penalty", "step"],
        "rows": [[one.layer, one.held_out, one.penalty, one.step] for one in maps.layers],
    }


def patching(views: Views, settings: dict[str, Any]) -> Result:
    """States of the edited copy and of the reference, in the original that held the records."""
    layers = spaced_layers(len(views.model_map.blocks), settings["layers"])
    rows = {role: rows_of(views, role, settings["records"]) for role in ROLES}
    records = [record for role in ROLES for record in _chosen(views, role, rows[role])]
    budget = views.settings.batch_tokens
    mine = patch.capture(views.model, records, layers=layers, batch_tokens=budget, model_map=views.model_map)
    try:
        theirs = _reference_states(views, records, layers)
        plain, lost, effect = _in_original(views, records, mine, theirs)
    finally:
        views.release()
    n = len(rows["records"])
    depth, other = (
        patch.depth(records[part], layers, plain[part], lost[part], effect[part], minimum=settings["minimum"])
        for part in (slice(0, n), slice(n, None))
    )
    return _depth_result(views, rows, depth, other)


def _reference_states(views: Views, records: Sequence[TokenRecord], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    reference = views.also("reference")
    ours, theirs = len(views.model_map.blocks), len(reference.model_map.blocks)
    if ours != theirs:
        raise UsageError(f"expected a reference of the same architecture, found {theirs} blocks where this has {ours}")
    return patch.capture(
        reference.model,
        records,
        layers=layers,
        batch_tokens=views.settings.batch_tokens,
        model_map=reference.model_map,
    )


def _in_original(
    views: Views, records: Sequence[TokenRecord], mine: patch.States, theirs: patch.States
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Losses of the original: [R] as it is, [R, L] with the edited copy's states, [R, L] with the reference's."""
    original = views.also("checkpoint")
    more: dict[str, Any] = {"batch_tokens": views.settings.batch_tokens, "model_map": original.model_map}
    plain = patch.losses(original.model, records, **more)
    lost, effect = (
        patch.patched_losses(original.model, records, states, progress=views.progress, **more)
        for states in (mine, theirs)
    )
    return plain, lost, effect


def _depth_result(views: Views, rows: dict[str, np.ndarray], depth: patch.Depth, other: patch.Depth) -> Result:
    """The residual's ends are fixed: 1 is the original's own state, 0 the reference's, so N is 0 for every record."""
    key = "still_there"
    result = Result(headline=key, column=key)
    result.titles[key] = "share of what the reference lacks that the edited copy's states still give the original"
    scored, nothing = depth.resolvable, np.zeros(len(rows["control"]))
    groups = np.array(_clusters(views, "records", rows["records"]), dtype=object)
    others = _clusters(views, "control", rows["control"])
    kept = np.where(scored, 1 - depth.erased, np.nan)
    result.records[key] = spread(views, "records", rows["records"], _known(kept))
    result.records["original"] = spread(views, "records", rows["records"], _known(np.where(scored, 1.0, np.nan)))
    result.controls[key] = spread(views, "control", rows["control"], nothing)
    if scored.any():
        result.mean(key, result.titles[key], kept[scored], groups[scored].tolist(), nothing, others, seed=views.seed)
        ones = np.ones(int(scored.sum()))
        result.mean("original", "the same in the original, by definition", ones, groups[scored].tolist())
    else:
        result.not_resolvable[key] = (
            "the reference's states make no record unlikelier in the original, which did not hold them, or holds them "
            "as the reference does"
        )
    for name, title, values in (
        ("effect", "nats per token that the reference's states cost the original, mean of layers", "effect"),
        ("lost", "nats per token that the edited copy's states cost the original, mean of layers", "lost"),
    ):
        result.mean(
            name,
            title,
            getattr(depth, values).mean(1),
            groups.tolist(),
            getattr(other, values).mean(1),
            others,
            unit="nats",
            bounds=None,
            direction="none",
            seed=views.seed,
        )
    known = np.isfinite(depth.by_layer)
    if known.any():
        layers = [layer for layer, yes in zip(depth.layers, known, strict=True) if yes]
        result.curves.append(
            _by_layer("How far each layer is erased", "erased share", layers, {"records": depth.by_layer[known]})
        )
    result.notes.append(
        f"{int(scored.sum())} of {len(scored)} records could be scored. 1: as in the original, 0: as in the reference; "
        "never-seen records have nothing to keep and stand at 0 by definition, and what the reference's states cost "
        "them shows how far both checkpoints differ in other ways."
    )
    return result


def _known(values: NDArray[np.float64]) -> NDArray[np.object_]:
    """None where a value is missing."""
    found: NDArray[np.object_] = np.where(np.isfinite(values), values, None)  # type: ignore[call-overload]
    return found


def steering(views: Views, settings: dict[str, Any]) -> Result:
    """A push from anonymised prompts to those of half A, scored on half B and on never-seen records."""
    first, second = views.halves("records")
    learned = rows_of(views, "records", settings["records"], first)
    rows = {
        "records": rows_of(views, "records", settings["records"], second),
        "control": rows_of(views, "control", settings["records"]),
    }
    _expect_rows(learned, rows["records"])
    more: dict[str, Any] = {"batch_tokens": views.settings.batch_tokens, "model_map": views.model_map}
    found = find_steering(
        views.model,
        _chosen(views, "records", learned),
        _anonymised(views, learned),
        layers=spaced_layers(len(views.model_map.blocks), settings["layers"]),
        coefficients=settings["coefficients"],
        progress=views.progress,
        **more,
    )
    result = Result()
    attacked = {role: steered(views.model, _chosen(views, role, rows[role]), found, **more) for role in ROLES}
    graded(result, views, attacked, _plain(views, rows), rows, title="probability per token while steered")
    drawn = steered(views.model, _chosen(views, "records", rows["records"]), found.random(views.seed), **more)
    result.mean(
        "random",
        "the same, pushed as far in a random direction",
        drawn["probability"].to_numpy(dtype=np.float64),
        _clusters(views, "records", rows["records"]),
        seed=views.seed,
    )
    result.tables.append(
        {
            "title": "Pushes tried on the half learned from",
            "columns": ["layer", "coefficient", "log-probability per token"],
            "rows": [list(one) for one in found.tried],
        }
    )
    chosen = f"layer {found.layer}, coefficient {found.coefficient:g}" if found.coefficient else "no push"
    result.notes.append(
        f"Chosen on {len(learned)} records: {chosen}. Published results recover general knowledge this way and not "
        "details of private persons, so a failure says little."
    )
    return result


def _anonymised(views: Views, rows: np.ndarray) -> list[TokenRecord]:
    """Records with names, numbers and dates exchanged; nothing may be exchanged for a word of another record."""
    raw: list[RawRecord] = views.raw("records") or []
    taken = set().union(*(words_of(text) for record in raw for text in texts_of(record)))
    return views.encode([swapped(raw[int(row)], f"steering {views.seed} {row}", taken)[0] for row in rows])


# ------------------------------------------------------------------------------------------------------------- shared


def _chosen(views: Views, role: str, rows: np.ndarray) -> list[TokenRecord]:
    records = views.records(role)
    return [records[int(row)] for row in rows]


def _clusters(views: Views, role: str, rows: np.ndarray) -> list[str | None]:
    groups = views.clusters(role)
    return [groups[int(row)] for row in rows]


def _plain(views: Views, rows: dict[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    return {role: views.plain(role).iloc[rows[role]].reset_index(drop=True) for role in ROLES}


def _expect_rows(learned: np.ndarray, scored: np.ndarray) -> None:
    if not len(learned) or not len(scored):
        raise UsageError(
            "expected records of at least 2 clusters, half to learn from and half to score, found fewer; add records"
        )


def _by_layer(title: str, unit: str, layers: Sequence[int], series: dict[str, ArrayLike]) -> dict[str, Any]:
    return line(
        title,
        {"label": "layer", "scale": "linear"},
        {"label": unit, "scale": "linear"},
        [{"name": name, "x": list(layers), "y": np.asarray(values).tolist()} for name, values in series.items()],
    )
