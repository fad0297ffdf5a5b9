"""Measure one checkpoint on the run's record sets: the tables and `metrics.json` of `before/`, `after/`, `reference/`.

A measurement is cached under everything it depends on (`unlearn.cache`), so auditing an unchanged checkpoint on
unchanged records again costs nothing. The cached values are numbers by position; ids are put back afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import nn

from attacks.extraction import confirm
from probes import classify, figures, likelihood
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from unlearn import cache, metrics
from unlearn.runfolder import RunFolder, digest

VERSION = "1"  # of the tables; part of every cache key
Record = TokenRecord | ImageRecord
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides a figure, beyond the checkpoint and the records."""

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    batch_size: int | None = None
    batch_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    confirm: bool = True
    noise_records: int | None = 64  # None: all

    def as_dict(self) -> dict[str, Any]:
        """For the run folder and cache keys."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Loaded:
    """A live model with its identity."""

    model: nn.Module
    model_map: ModelMap
    task: str
    tensor_digest: str
    tokenizer_digest: str | None = None


@dataclass(slots=True)
class Measured:
    """Tables by set name (`records`, `control`, `retain`), ids as the caller wrote them, and how they were made."""

    task: str
    tensor_digest: str
    tables: dict[str, pd.DataFrame]
    engine: dict[str, Any]
    noise_floor: dict[str, float]
    cached: bool = False
    attacks: list[dict[str, Any]] = field(default_factory=list)


def records_digest(records: Sequence[Record]) -> str:
    """Digest of tokenised content, for cache keys: ids do not enter, so renaming records does not re-run a model."""
    rows: list[Any] = []
    for record in records:
        if isinstance(record, TokenRecord):
            rows.append([list(record.ids), record.n_prompt, record.compressed_bytes])
        else:
            pixels = hashlib.sha256(record.pixels.numpy().tobytes()).hexdigest()
            rows.append([pixels, list(record.pixels.shape), record.label])
    return digest(rows)


def measure(
    loaded: Loaded, sets: dict[str, list[Record]], settings: Settings, progress: Progress | None = None
) -> Measured:
    """Run the one pass (and its confirmations) over every set.

    Args:
        loaded: the model.
        sets: record sets by name; empty ones are skipped.
        settings: see `Settings`.
        progress: called with (records done, records in all) across sets.
    """
    sets = {name: records for name, records in sets.items() if records}
    key = cache.key_of(
        kind="measurement",
        version=VERSION,
        tensors=loaded.tensor_digest,
        tokenizer=loaded.tokenizer_digest,
        task=loaded.task,
        settings=settings.as_dict(),
        data={name: records_digest(records) for name, records in sets.items()},
    )
    hit = cache.lookup(key, ".json")
    if hit is not None:
        stored = json.loads(hit.read_text())
        tables = {name: pd.DataFrame(columns) for name, columns in stored["tables"].items()}
        measured = Measured(loaded.task, loaded.tensor_digest, tables, stored["engine"], stored["noise_floor"], True)
    else:
        run = _language if loaded.task == "causal_lm" else _images
        measured = run(loaded, sets, settings, progress or (lambda done, total: None))
    for name, records in sets.items():
        frame = measured.tables[name].drop(columns=["record_id", "group"], errors="ignore")
        frame.insert(0, "record_id", [record.record_id for record in records])
        frame["group"] = pd.Series([record.group for record in records], dtype=object)
        measured.tables[name] = frame
    if hit is None:
        _store(key, measured)
    return measured


def _store(key: str, measured: Measured) -> None:
    import tempfile
    from pathlib import Path

    content = {
        "tables": {
            name: frame.drop(columns=["record_id", "group"]).to_dict(orient="list")
            for name, frame in measured.tables.items()
        },
        "engine": measured.engine,
        "noise_floor": measured.noise_floor,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measurement.json"
        path.write_text(json.dumps(content))  # infinities as Python writes them: the store is read by us alone
        cache.store(key, path)


def _language(loaded: Loaded, sets: dict[str, list[Record]], settings: Settings, progress: Progress) -> Measured:
    token_sets = cast("dict[str, list[TokenRecord]]", sets)
    scheme = likelihood.SamplingScheme(settings.temperature, settings.top_k, settings.top_p)
    everything = [record for records in token_sets.values() for record in records]
    tokens, size = settings.batch_tokens, settings.batch_size
    noise = likelihood.logit_noise(
        loaded.model, everything, model_map=loaded.model_map, batch_tokens=tokens, batch_size=size
    )
    tables, splits, generated, disagreements, done = {}, 0, 0, 0, 0
    for name, records in token_sets.items():
        table = likelihood.score(
            loaded.model,
            records,
            model_map=loaded.model_map,
            scheme=scheme,
            progress=lambda n, _, base=done: progress(base + n, len(everything)),  # type: ignore[misc]
            batch_tokens=tokens,
            batch_size=size,
        )
        done += len(records)
        splits += table.splits
        frame = figures.record_figures(table, noise=noise)
        if settings.confirm and name != "retain":
            frame, confirmation = confirm(loaded.model, records, frame)
            generated += confirmation.generated
            disagreements += confirmation.disagreements
        else:
            frame = frame.assign(emitted=frame["greedy"] == "extracted")
        tables[name] = frame
    floor = _language_noise(loaded, token_sets["records"], tables["records"], settings, scheme, noise)
    engine = _engine(settings, everything, loaded) | {
        "sampling": {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p},
        "logit_noise": noise,
        "confirmed": generated,
        "disagreements": disagreements,
        "memory_splits": splits,
    }
    return Measured(loaded.task, loaded.tensor_digest, tables, engine, floor)


def _engine(settings: Settings, records: Sequence[Record], loaded: Loaded) -> dict[str, Any]:
    device = next(loaded.model.parameters()).device
    tokens = settings.batch_tokens or likelihood.default_batch_tokens(device)
    return {
        "dtype": settings.dtype,
        "device": device.type,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "batch_tokens": None if settings.batch_size else tokens,
        "records": len(records),
    }


def _spread(a: pd.DataFrame, b: pd.DataFrame, columns: Sequence[str]) -> dict[str, float]:
    """Largest absolute difference per column between two measurements of the same records."""
    out = {}
    for column in columns:
        x, y = a[column].to_numpy(dtype=np.float64), b[column].to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.where(x == y, 0.0, np.abs(x - y))  # equal infinities differ by nothing
        out[column] = float(difference.max(initial=0.0))
    return out


def _sample(n: int, settings: Settings) -> list[int]:
    """Rows for the A/A comparison: a seeded permutation, so lengths mix and batches differ from the first pass."""
    order = np.random.default_rng(settings.seed).permutation(n)
    return [int(i) for i in (order if settings.noise_records is None else order[: settings.noise_records])]


def _language_noise(
    loaded: Loaded,
    records: list[TokenRecord],
    first: pd.DataFrame,
    settings: Settings,
    scheme: likelihood.SamplingScheme,
    noise: float,
) -> dict[str, float]:
    rows = _sample(len(records), settings)
    again = [records[i] for i in rows]
    table = likelihood.score(loaded.model, again, model_map=loaded.model_map, scheme=scheme, batch_size=5)
    columns = [c for c in figures.COLUMNS if c not in ("record_id", "n_tokens", "greedy", "n_for_p50", "n_for_p90")]
    second = figures.record_figures(table, noise=noise)
    floor = _spread(first.iloc[rows].reset_index(drop=True), second, columns)
    return floor | {"records": float(len(rows))}


def _images(loaded: Loaded, sets: dict[str, list[Record]], settings: Settings, progress: Progress) -> Measured:
    image_sets = cast("dict[str, list[ImageRecord]]", sets)
    size = settings.batch_size or 64
    total, done, tables = sum(map(len, image_sets.values())), 0, {}
    for name, records in image_sets.items():
        tables[name] = classify.score_images(
            loaded.model,
            records,
            batch_size=size,
            progress=lambda n, _, base=done: progress(base + n, total),  # type: ignore[misc]
        )
        done += len(records)
    rows = _sample(len(image_sets["records"]), settings)
    second = classify.score_images(loaded.model, [image_sets["records"][i] for i in rows], batch_size=5)
    columns = ["label_probability", "loss", "margin", "entropy"]
    floor = _spread(tables["records"].iloc[rows].reset_index(drop=True), second, columns)
    everything = [record for records in sets.values() for record in records]
    engine = _engine(settings, everything, loaded) | {"batch_size": size, "batch_tokens": None}
    return Measured(loaded.task, loaded.tensor_digest, tables, engine, floor | {"records": float(len(rows))})


def write(run: RunFolder, folder: str, measured: Measured, pseudonym: Callable[[str], str]) -> None:
    """Write one measurement into the run folder: numbers under pseudonyms."""
    seed = int(measured.engine["seed"])
    document: dict[str, Any] = {
        "schema": "unlearn.metrics/v1",
        "stage": folder,
        "task": measured.task,
        "tensor_digest": measured.tensor_digest,
        "engine": measured.engine,
        "noise_floor": measured.noise_floor,
        "attacks": measured.attacks,
        "sets": {},
    }
    for name, frame in measured.tables.items():
        shared = frame.drop(columns=["group"]).assign(record_id=[pseudonym(i) for i in frame["record_id"]])
        run.write_table(f"{folder}/{name}.parquet", shared)
        document["sets"][name] = {"n": len(frame), "figures": metrics.figures(measured.task, frame, name, seed)}
    run.write_json(f"{folder}/metrics.json", document)
