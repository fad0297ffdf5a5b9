"""Importances of weights against plain gradients of the same records, and what a second request saves.

Plain: `model(ids, labels=...).loss.backward()`, every gradient kept, for the weights that the editor edits by default.
One such pass over batches gives one gradient a batch, and is the lower bound of any importance. Over single records it
gives the gradients that `example` squares: what the true Fisher costs where nothing tells the records of a batch apart.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject, completions
from probes.fisher import Estimator, importance
from probes.records import TokenRecord, pad
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.editors.base import EditContext
from unlearn.editors.ssd import SSDEditor
from unlearn.runs.cache import ENVIRONMENT

BATCH_SIZE = 16
FORGET, RETAIN = 8, 40


def run(subject: Subject) -> Iterator[Ratio]:
    yield from _estimators(subject)
    yield _second_request(subject)


def _estimators(subject: Subject) -> list[Ratio]:
    records = completions(subject)[: 2 * BATCH_SIZE]
    names = SSDEditor({}).selected(subject.model_map)
    sides: dict[str, Callable[[], object]] = {
        "batches": _plain(subject, records, names, BATCH_SIZE),
        "singles": _plain(subject, records, names, 1),
        "batch": _importance(subject, records, names, "batch"),
        "example": _importance(subject, records, names, "example"),
    }
    seconds = interleave(sides, subject)
    weights = sum(p.numel() for name, p in subject.model.named_parameters() if name in set(names))
    note = f"{len(records)} records, batch {BATCH_SIZE}, {weights / 1e6:.3g} M weights"

    def ratio(case: str, over: str, under: str) -> Ratio:
        return Ratio(case, seconds[over], seconds[under], note=note)

    return [
        ratio("batch / plain, batches", "batch", "batches"),
        ratio("example / plain, batches", "example", "batches"),
        ratio("plain, one record at a time / example", "singles", "example"),
    ]


def _importance(
    subject: Subject, records: Sequence[TokenRecord], names: Sequence[str], estimator: Estimator
) -> Callable[[], object]:
    return lambda: importance(
        subject.model,
        records,
        estimator=estimator,
        batch_size=BATCH_SIZE,
        parameters=names,
        model_map=subject.model_map,
    )


def _plain(
    subject: Subject, records: Sequence[TokenRecord], names: Sequence[str], batch_size: int
) -> Callable[[], None]:
    batches = []
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        ids, mask = pad(batch, subject.device)
        labels = ids.masked_fill(mask == 0, -100)
        for row, record in enumerate(batch):
            labels[row, : record.n_prompt] = -100
        batches.append((ids, labels))
    wanted = set(names)

    def side() -> None:
        for name, parameter in subject.model.named_parameters():
            parameter.requires_grad_(name in wanted)
        for ids, labels in batches:
            subject.model(ids, labels=labels, use_cache=False).loss.backward()
        subject.model.zero_grad(set_to_none=True)

    return side


def _second_request(subject: Subject) -> Ratio:
    records = completions(subject)
    n = min(FORGET, len(records) // 4)
    requests = {"first": records[:n], "second": records[n : 2 * n]}
    retain = records[2 * n : 2 * n + RETAIN]
    read: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as work:
        sides = {name: _edit(subject, name, forget, retain, Path(work), read) for name, forget in requests.items()}
        kept = os.environ.get(ENVIRONMENT)
        os.environ[ENVIRONMENT] = f"{work}/cache"
        try:
            seconds = interleave(sides, subject)
        finally:
            os.environ.pop(ENVIRONMENT)
            if kept is not None:
                os.environ[ENVIRONMENT] = kept
    note = f"{n} records, {len(retain)} retain records, of which the model read {read['first']} and {read['second']}"
    return Ratio("SSD, second request / first", seconds["second"], seconds["first"], note=note)


def _edit(
    subject: Subject,
    name: str,
    forget: Sequence[TokenRecord],
    retain: Sequence[TokenRecord],
    work: Path,
    read: dict[str, int],
) -> Callable[[], None]:
    """One edit, writing included; the first request of every round finds an empty cache."""
    block = subject.model.get_submodule(subject.model_map.blocks[0].name)

    def side() -> None:
        if name == "first":
            shutil.rmtree(work / "cache", ignore_errors=True)
        private = work / "private"
        private.mkdir()
        rows: list[int] = []
        hook = block.register_forward_hook(lambda _module, args, _output: rows.append(args[0].shape[0]))
        source = open_checkpoint(subject.folder)
        parts = {"tensor_digest": source.tensor_digest()}
        context = EditContext(source, subject.model, subject.model_map, forget, retain, 0, private, parts)
        SSDEditor({"batch_size": BATCH_SIZE}).edit(context, work / "out")
        hook.remove()
        read[name] = sum(rows) - len(forget)
        shutil.rmtree(private)
        shutil.rmtree(work / "out")

    return side
