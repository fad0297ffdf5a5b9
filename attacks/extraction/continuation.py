"""What greedy decoding emits after each record's prompt, with as few decoding steps as the one pass allows.

The token table says where greedy decoding leaves the record: while every gold token is clearly the largest logit
(margin above the numeric noise), the decoder emits the record and its context is the gold context. So the tokens up
to the first position that is not a clear match are known, and decoding starts there. A record that the pass calls
clearly extracted is not decoded at all; one that leaves at its last token costs one forward pass.

Records are decoded together in rows of equal length, without padding, each with a key-value cache. A row whose known
part is longer than its neighbours' is fed its known tokens until they end.

Limits: batched and cached decoding round differently from `generate()` at batch size 1, so a near-tie after the first
miss may fall the other way. These texts serve similarity figures (`attacks.extraction.overlap`); whether a record is
emitted is confirmed at batch size 1 (`attacks.extraction.greedy.confirm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UsageError
from probes.likelihood import TokenTable, check_records, inference, out_of_memory
from probes.modelmap import ModelMap
from probes.records import TokenRecord

SLACK = 8  # known tokens a row may be fed one by one, so that it shares its steps with rows that leave earlier


@dataclass(frozen=True, slots=True)
class Work:
    """Decoding steps of `continuations`; a step feeds one row through the model once (its prompt, or one token).

    Attributes:
        plain: steps of one `generate()` a record.
        steps: steps taken, rows that wait for their batch included.
        calls: forward passes that take these steps, a batch each.
        decoded: records that are decoded at all.
    """

    plain: int
    steps: int
    calls: int
    decoded: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One record to decode: `known` (its prompt and the tokens sure to follow) grows to `total` tokens."""

    index: int
    n_prompt: int
    known: tuple[int, ...]
    total: int

    def __repr__(self) -> str:
        return f"_Row(index={self.index}, known={len(self.known)}, total={self.total})"


def sure_tokens(table: TokenTable, record: int, noise: float) -> int:
    """How many leading tokens of a record's completion greedy decoding surely emits: clear matches from the start."""
    rows = table.rows(record)
    unclear = np.flatnonzero(~(table.match[rows] & (table.margin[rows] > noise)))
    return int(unclear[0]) if len(unclear) else rows.stop - rows.start


def _rows(
    records: Sequence[TokenRecord], table: TokenTable, noise: float, length: int | None
) -> tuple[list[_Row], list[int]]:
    """One row a record, in input order, and the number of tokens wanted of each."""
    if [record.n_tokens for record in records] != np.diff(table.offsets).tolist():
        raise UsageError("expected the token table of these records, found other lengths; score them again")
    if length is not None and length < 1:
        raise UsageError(f"expected at least 1 token to emit, found {length}; give a positive length")
    wanted = [record.n_tokens if length is None else length for record in records]
    rows = []
    for i, (record, n) in enumerate(zip(records, wanted, strict=True)):
        known = record.ids[: record.n_prompt + min(sure_tokens(table, i, noise), n)]
        rows.append(_Row(i, record.n_prompt, known, record.n_prompt + n))
    return rows, wanted


def _batches(rows: Sequence[_Row], batch: int) -> list[list[_Row]]:
    """Rows that are decoded together, all from the shortest known length among them."""
    if batch < 1:
        raise UsageError(f"expected at least 1 row a batch, found {batch}; give a positive batch size")
    todo = sorted(
        (row for row in rows if len(row.known) < row.total), key=lambda row: (len(row.known), row.total, row.index)
    )
    out: list[list[_Row]] = []
    for row in todo:
        if out and len(out[-1]) < batch and len(row.known) <= len(out[-1][0].known) + SLACK:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def work(
    records: Sequence[TokenRecord], table: TokenTable, *, noise: float, length: int | None = None, batch: int = 16
) -> Work:
    """The steps that `continuations` would take with the same arguments, without taking them."""
    rows, wanted = _rows(records, table, noise, length)
    batches = _batches(rows, batch)
    calls = [max(row.total for row in group) - min(len(row.known) for row in group) for group in batches]
    return Work(
        plain=sum(wanted),
        steps=sum(n * len(group) for n, group in zip(calls, batches, strict=True)),
        calls=sum(calls),
        decoded=sum(map(len, batches)),
    )


def continuations(
    model: nn.Module,
    records: Sequence[TokenRecord],
    table: TokenTable,
    *,
    noise: float,
    length: int | None = None,
    batch: int = 16,
    model_map: ModelMap | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, ...]]:
    """Greedy continuations of every record's prompt: no end token, no penalties, as `greedy.greedy_tokens`.

    Args:
        model: the model that `table` was measured on; used in evaluation mode, unchanged.
        records: the records, in the order of `table`.
        table: the token table of one pass over them.
        noise: logit margin up to which a greedy choice is uncertain (`probes.likelihood.logit_noise`).
        length: tokens to emit; by default as many as each record's completion has.
        batch: rows decoded together.
        model_map: the model's map, built when absent.
        progress: called with (records decoded, records to decode).

    Returns:
        Token ids, one tuple a record, in input order.

    Raises:
        UsageError: for a table of other records, a length or batch size below 1, or a length beyond the positions
            that the model has.
        UnsupportedError: for token ids outside the vocabulary.
        ResourceError: when a single row does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    check_records(records, model_map.vocab_size)
    rows, _ = _rows(records, table, noise, length)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max((row.total for row in rows), default=0)
    if length is not None and positions is not None and longest > positions:
        raise UsageError(f"expected at most {positions} tokens with the prompt, found {longest}; ask for fewer")
    out = [row.known for row in rows]
    batches = _batches(rows, batch)
    done, todo = 0, sum(map(len, batches))
    with inference(model):
        for group in batches:
            for row, ids in zip(group, _decode(model, model_map, group), strict=True):
                out[row.index] = ids
            done += len(group)
            if progress:
                progress(done, todo)
    return [ids[row.n_prompt : row.total] for ids, row in zip(out, rows, strict=True)]


def _decode(model: nn.Module, model_map: ModelMap, rows: Sequence[_Row]) -> list[tuple[int, ...]]:
    """Each row's ids, grown to its total or beyond; halved when memory runs out."""
    try:
        return _decode_together(model, model_map, rows)
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise ResourceError(
                f"expected memory to decode {rows[0].total} tokens, found too little; use shorter records, a smaller "
                "dtype or another device"
            ) from None
    half = (len(rows) + 1) // 2  # outside the handler, so that the failed batch's tensors are released first
    return _decode(model, model_map, rows[:half]) + _decode(model, model_map, rows[half:])


def _decode_together(model: nn.Module, model_map: ModelMap, rows: Sequence[_Row]) -> list[tuple[int, ...]]:
    device = next(model.parameters()).device
    start, end = min(len(row.known) for row in rows), max(row.total for row in rows)
    given = torch.full((len(rows), end), -1)  # [B, end], -1 where the model decides
    for i, row in enumerate(rows):
        given[i, : len(row.known)] = torch.tensor(row.known)
    given = given.to(device)
    backbone = model_map.backbone(model)
    feed, cache, chosen = given[:, :start], None, []
    for position in range(start, end):
        step: Any = backbone(input_ids=feed, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        greedy: Tensor = model_map.logits(step.last_hidden_state[:, -1]).float().argmax(-1)  # [B]
        token = torch.where(given[:, position] >= 0, given[:, position], greedy)
        chosen.append(token)
        feed = token[:, None]  # [B, 1]
    tokens = torch.cat([given[:, :start], torch.stack(chosen, dim=1)], dim=1).tolist()
    return [tuple(ids) for ids in tokens]
