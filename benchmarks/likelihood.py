"""All likelihood figures of an audit against bare forward passes over the same batches.

A bare forward pass is `model(input_ids)` with its logits made and dropped, nothing computed from them: a lower bound
for any tool that works on the model's output. Tools that run each metric by itself (probability, extraction strength,
exact memorisation, loss, zlib, Min-K%, and Min-K%++, which takes two) make eight such passes a record; eight bare ones
are a lower bound for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject, completions, texts
from probes.figures import record_figures
from probes.likelihood import default_batch_tokens, score
from probes.records import TokenRecord, length_batches, pad

PASSES_APART = 8
BATCH_SIZE = 16


def run(subject: Subject) -> Iterator[Ratio]:
    sets = {"completions": completions(subject), "texts": texts(subject)}
    for name, records in sets.items():
        budget = default_batch_tokens(torch.device(subject.device))
        batches = length_batches(records, budget)
        yield _once(subject, f"{name}, {budget} tokens a batch", records, batches, {"batch_tokens": budget})
        one = records[: BATCH_SIZE // 4]
        yield _once(subject, f"{name}, 1 record a batch", one, [[i] for i in range(len(one))], {"batch_size": 1})
    yield _apart(subject, sets["completions"][:BATCH_SIZE])


def figures(subject: Subject, records: Sequence[TokenRecord], batching: dict[str, int]) -> Callable[[], object]:
    return lambda: record_figures(score(subject.model, records, model_map=subject.model_map, **batching))


def forwards(subject: Subject, records: Sequence[TokenRecord], batches: list[list[int]]) -> Callable[[], None]:
    """Bare forward passes; their inputs are made beforehand."""
    inputs = [pad([records[i] for i in batch], subject.device)[0] for batch in batches]

    def side() -> None:
        with torch.inference_mode():
            for ids in inputs:
                subject.model(ids, use_cache=False)

    return side


def _once(
    subject: Subject, case: str, records: Sequence[TokenRecord], batches: list[list[int]], batching: dict[str, int]
) -> Ratio:
    sides = {"figures": figures(subject, records, batching), "bare": forwards(subject, records, batches)}
    seconds = interleave(sides, subject)
    scored = sum(record.n_tokens for record in records)
    padded = sum(len(batch) * max(len(records[i].ids) for i in batch) for batch in batches)
    note = f"{len(records)} records, {len(batches)} batches, {scored} tokens scored of {padded}"
    return Ratio(f"figures / bare: {case}", seconds["figures"], seconds["bare"], subject.target(1.15), note=note)


def _apart(subject: Subject, records: Sequence[TokenRecord]) -> Ratio:
    bare = forwards(subject, records, [list(range(len(records)))])

    def apart() -> None:
        for _ in range(PASSES_APART):
            bare()

    together = figures(subject, records, {"batch_size": len(records)})
    passes = [_passes(subject, side) for side in (apart, together)]
    seconds = interleave({"apart": apart, "together": together}, subject)
    note = f"{passes[0]} forward passes a record / {passes[1]}"
    case = f"a pass per metric / figures: completions, {len(records)} records a batch"
    return Ratio(case, seconds["apart"], seconds["together"], at_least=True, note=note)


def _passes(subject: Subject, side: Callable[[], object]) -> int:
    """How often a side runs the model's first block."""
    seen: list[Any] = []
    block = subject.model.get_submodule(subject.model_map.blocks[0].name)
    hook = block.register_forward_hook(lambda *_: seen.append(None))
    side()
    hook.remove()
    return len(seen)
