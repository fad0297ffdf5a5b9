"""Measure one checkpoint on the run's record sets: the tables and `metrics.json` of `before/`, `after/`, `reference/`.

A measurement is cached under everything it depends on (`unlearn.runs.cache`), so auditing an unchanged checkpoint on
unchanged records again costs nothing. The cached values are numbers by position; ids are put back afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import nn

from attacks.extraction import Confirmation, confirm
from probes import classify, figures, likelihood
from probes.modelmap import ModelMap
from probes.records import ImageRecord, Record, TokenRecord
from unlearn.evidence import metrics, tokens
from unlearn.runs import cache
from unlearn.runs.folder import RunFolder, digest

VERSION = "2"  # of the tables; part of every cache key
IMAGE_BATCH = 64
REPEAT_BATCH = 5  # records a batch in the second measurement of the noise floor: never the first one's batches
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
    schemes: tuple[likelihood.SamplingScheme, ...] = ()  # further ones, for (n, p)-discoverable extraction
    confirm: bool = True
    noise_records: int | None = 64  # None: all

    def as_dict(self) -> dict[str, Any]:
        """For the run folder and cache keys."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "schemes": [asdict(scheme) for scheme in self.schemes]
        }

    @property
    def scheme(self) -> likelihood.SamplingScheme:
        """The sampling scheme of the criteria's sampled extraction."""
        return likelihood.SamplingScheme(self.temperature, self.top_k, self.top_p)


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
    """Tables by set name (`records`, `control`, `retain`), ids as the caller wrote them, and how they were made.

    `tokens` holds the per-token tables behind them, where the model is a language model.
    """

    task: str
    tensor_digest: str
    tables: dict[str, pd.DataFrame]
    engine: dict[str, Any]
    noise_floor: dict[str, float]
    attacks: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, likelihood.TokenTable] = field(default_factory=dict)


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
        sets: record sets by name, `records` among them; empty ones are skipped.
        settings: see `Settings`.
        progress: called with (records done, records in all) across sets.
    """
    sets = {name: records for name, records in sets.items() if records}
    total, done = sum(map(len, sets.values())), 0
    update = progress or (lambda done, total: None)
    language = loaded.task == "causal_lm"
    noise = 0.0
    if language:
        found = _cached(loaded, settings, "noise", sets["records"], lambda: {"noise": _noise(loaded, sets, settings)})
        noise = float(found["noise"])
    tables: dict[str, pd.DataFrame] = {}
    per_token: dict[str, likelihood.TokenTable] = {}
    counts = {"confirmed": 0, "disagreements": 0, "memory_splits": 0}
    for name, records in sets.items():

        def advance(n: int, _: int, base: int = done) -> None:
            update(base + n, total)

        if language:
            confirmed = settings.confirm and name != "retain"
            frame, per_token[name], found = _language(loaded, records, settings, noise, confirmed, advance)
            counts = {key: count + found[key] for key, count in counts.items()}
        else:
            columns = _cached(loaded, settings, "table", records, partial(_images, loaded, records, settings, advance))
            frame = pd.DataFrame(columns)
        frame.insert(0, "record_id", [record.record_id for record in records])
        frame["group"] = pd.Series([record.group for record in records], dtype=object)
        tables[name] = frame
        done += len(records)
        update(done, total)
    again = partial(_repeat, loaded, sets["records"], tables["records"], settings, noise)
    floor = _cached(loaded, settings, "floor", sets["records"], again, noise=noise)
    engine = _engine(settings, [record for records in sets.values() for record in records], loaded)
    if language:
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        engine |= {"sampling": sampling, "logit_noise": noise} | counts
    return Measured(loaded.task, loaded.tensor_digest, tables, engine, floor, tokens=per_token)


def _key(loaded: Loaded, settings: Settings, kind: str, records: Sequence[Record], **parts: Any) -> str:
    return cache.key_of(
        kind=f"measurement.{kind}",
        version=VERSION,
        tensors=loaded.tensor_digest,
        tokenizer=loaded.tokenizer_digest,
        task=loaded.task,
        settings=settings.as_dict(),
        data=records_digest(records),
        **parts,
    )


def _cached(
    loaded: Loaded,
    settings: Settings,
    kind: str,
    records: Sequence[Record],
    compute: Callable[[], dict[str, Any]],
    **parts: Any,
) -> dict[str, Any]:
    """The result of `compute`, from the store where it was computed before under the same conditions."""
    key = _key(loaded, settings, kind, records, **parts)
    hit = cache.lookup(key, ".json")
    if hit is not None:
        stored: dict[str, Any] = json.loads(hit.read_text())
        return stored
    result = compute()
    # infinities as Python writes them: the store is read by us alone
    cache.keep(key, ".json", json.dumps(result).encode())
    return result


def token_table(
    loaded: Loaded,
    records: Sequence[TokenRecord],
    settings: Settings,
    progress: Progress | None = None,
) -> likelihood.TokenTable:
    """The one pass over records, from the store where it was made before under the same conditions.

    Args:
        loaded: the model.
        records: what to score.
        settings: see `Settings`.
        progress: called with (records done, records in all).
    """
    key = _key(loaded, settings, "tokens", records)
    hit = cache.lookup(key, ".npz")
    if hit is not None:
        return tokens.load(hit, records, settings.scheme, settings.schemes)
    table = likelihood.score(
        loaded.model,
        records,
        model_map=loaded.model_map,
        scheme=settings.scheme,
        schemes=settings.schemes,
        progress=progress,
        batch_tokens=settings.batch_tokens,
        batch_size=settings.batch_size,
    )
    cache.keep(key, ".npz", tokens.dump(table))
    return table


def _noise(loaded: Loaded, sets: dict[str, list[Record]], settings: Settings) -> float:
    return likelihood.logit_noise(
        loaded.model,
        cast("list[TokenRecord]", sets["records"]),
        model_map=loaded.model_map,
        batch_tokens=settings.batch_tokens,
        batch_size=settings.batch_size,
    )


def _columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): frame[name].tolist() for name in frame.columns if name != "record_id"}


def _language(
    loaded: Loaded, records: list[Record], settings: Settings, noise: float, confirmed: bool, progress: Progress
) -> tuple[pd.DataFrame, likelihood.TokenTable, dict[str, int]]:
    """Figures of one set, the per-token table they come from, and how many verdicts were confirmed."""
    items = cast("list[TokenRecord]", records)
    table = token_table(loaded, items, settings, progress)
    frame = figures.record_figures(table, noise=noise)
    summary = Confirmation(0, 0)
    if confirmed:

        def generate() -> dict[str, Any]:
            checked, done = confirm(loaded.model, items, frame)
            return {
                "greedy": checked["greedy"].tolist(),
                "emitted": checked["emitted"].tolist(),
                "generated": done.generated,
                "disagreements": done.disagreements,
            }

        found = _cached(loaded, settings, "confirmed", records, generate, noise=noise)
        frame = frame.assign(greedy=found["greedy"], emitted=found["emitted"])
        summary = Confirmation(found["generated"], found["disagreements"])
    else:
        frame = frame.assign(emitted=frame["greedy"] == "extracted")
    counts = {
        "confirmed": summary.generated,
        "disagreements": summary.disagreements,
        "memory_splits": table.splits,
    }
    return frame.drop(columns="record_id"), table, counts


def _engine(settings: Settings, records: Sequence[Record], loaded: Loaded) -> dict[str, Any]:
    device = next(loaded.model.parameters()).device
    budget, size = settings.batch_tokens or likelihood.default_batch_tokens(device), settings.batch_size
    if loaded.task == "image_classification":
        size = size or IMAGE_BATCH
    return {
        "dtype": settings.dtype,
        "device": device.type,
        "seed": settings.seed,
        "batch_size": size,
        "batch_tokens": None if size else budget,
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


def _repeat(
    loaded: Loaded, records: list[Record], first: pd.DataFrame, settings: Settings, noise: float
) -> dict[str, Any]:
    """The A/A noise floor: some records measured again in other batches, largest difference per figure."""
    rows = _sample(len(records), settings)
    again = [records[i] for i in rows]
    if loaded.task == "causal_lm":
        items = cast("list[TokenRecord]", again)
        options = {"model_map": loaded.model_map, "scheme": settings.scheme, "batch_size": REPEAT_BATCH}
        table = likelihood.score(loaded.model, items, **options)  # type: ignore[arg-type]
        second = figures.record_figures(table, noise=noise)
        columns = [c for c in figures.COLUMNS if c not in ("record_id", "n_tokens", "greedy", "n_for_p50", "n_for_p90")]
    else:
        images = cast("list[ImageRecord]", again)
        second = classify.score_images(loaded.model, images, batch_size=REPEAT_BATCH)
        columns = ["label_probability", "loss", "margin", "entropy"]
    spread = _spread(first.iloc[rows].reset_index(drop=True), second, columns)
    return spread | {"records": float(len(rows))}


def _images(loaded: Loaded, records: list[Record], settings: Settings, progress: Progress) -> dict[str, Any]:
    images = cast("list[ImageRecord]", records)
    size = settings.batch_size or IMAGE_BATCH
    return _columns(classify.score_images(loaded.model, images, batch_size=size, progress=progress))


def write(run: RunFolder, folder: str, measured: Measured, pseudonym: Callable[[str], str]) -> None:
    """Write one measurement into the run folder: numbers under pseudonyms; per-token ones into its private part."""
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
    for name, table in measured.tokens.items():
        run.write_bytes(f"private/tokens/{folder}-{name}.npz", tokens.dump(table))
    for name, frame in measured.tables.items():
        shared = frame.drop(columns=["group"]).assign(record_id=[pseudonym(i) for i in frame["record_id"]])
        run.write_table(f"{folder}/{name}.parquet", shared)
        document["sets"][name] = {"n": len(frame), "figures": metrics.figures(measured.task, frame, name, seed)}
    run.write_json(f"{folder}/metrics.json", document)
