"""Log-probabilities of completions whose records share a beginning: it is run once and kept as keys and values.

Fills of one sentence share all that stands before the fill; records behind the same examples share the examples. The
cached pass is checked against a plain one on its longest records before it is used, because some models (recurrent
ones, windows, caches of another kind) compute something else with it; these take the plain pass.

Shape letters: B records in a batch, T padded tokens, N completion tokens, V vocabulary, d width, R records, L prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes import likelihood
from probes.errors import ResourceError
from probes.modelmap import ModelMap
from probes.records import TokenRecord, length_batches, pad, predicting

Floats = NDArray[np.float64]

MIN_SHARED = 8  # tokens all records share before it pays to run them once
CACHE_TOLERANCE = 1e-3  # relative; a cached pass that differs by more from the plain one is not used


def completion_log_probs(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: likelihood.Progress | None = None,
) -> Floats:
    """Log-probabilities of completions, what all records begin with run once.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        records: what to score.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens a batch.
        progress: called with (records done, records in all).

    Returns:
        [R] log p of each record's completion in nats, summed in float64.

    Raises:
        UnsupportedError: token ids outside the vocabulary.
        ResourceError: when a single record does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    likelihood.check_records(records, model_map.vocab_size)
    shared = _shared(records)
    if shared >= MIN_SHARED:
        cached = _Cached.run(model, model_map, records, shared, batch_tokens)
        if cached is not None:
            return cached.all(progress)
    table = likelihood.score(model, records, model_map=model_map, batch_tokens=batch_tokens, progress=progress)
    return np.array([table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(records))])


def _shared(records: Sequence[TokenRecord]) -> int:
    """Number of leading tokens that all records share, before the position that predicts any completion token."""
    first = min(records, key=lambda record: record.ids).ids
    last = max(records, key=lambda record: record.ids).ids  # the common prefix of the extremes is that of all
    limit = min(record.n_prompt for record in records) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


@dataclass(slots=True)
class _Cached:
    """A pass whose records continue one prefix, which was run once and is kept as keys and values."""

    model: nn.Module
    model_map: ModelMap
    records: list[TokenRecord]  # without the prefix
    cache: Any
    batches: list[list[int]]

    @classmethod
    def run(
        cls,
        model: nn.Module,
        model_map: ModelMap,
        records: Sequence[TokenRecord],
        shared: int,
        batch_tokens: int | None,
    ) -> _Cached | None:
        """Prepare the pass; None where this model keeps no such cache, or computes something else with it."""
        device = next(model.parameters()).device
        prefix = torch.tensor([records[0].ids[:shared]], device=device)  # [1, L]
        with likelihood.inference(model):
            output = model_map.backbone(model)(input_ids=prefix, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if not hasattr(cache, "batch_repeat_interleave"):
            return None  # a recurrent state, or nothing
        rest = [TokenRecord("", record.ids[shared:], record.n_prompt - shared, 0) for record in records]
        budget = batch_tokens or likelihood.default_batch_tokens(device)
        # Every row holds the prefix's keys and values again, so memory, unlike work, counts it.
        widest = max(len(record.ids) for record in rest)
        budget = max(widest, 2 * budget * widest // (shared + widest))
        self = cls(model, model_map, rest, cache, length_batches(rest, budget))
        sample = self.batches[0]  # the longest record stands first
        table = likelihood.score(model, [records[i] for i in sample[:2]], model_map=model_map)
        plain = [table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(sample[:2]))]
        try:
            same = np.allclose(self.batch(sample)[:2], plain, rtol=CACHE_TOLERANCE, atol=CACHE_TOLERANCE)
        except Exception:  # whatever a cache of another kind raises; the plain pass has errors of its own
            return None
        return self if same else None

    def all(self, progress: likelihood.Progress | None) -> Floats:
        """[R] log-probabilities in the order of the records."""
        out = np.zeros(len(self.records))
        done = 0
        for batch in self.batches:
            out[batch] = self.batch(batch)
            done += len(batch)
            if progress:
                progress(done, len(self.records))
        return out

    def batch(self, batch: list[int]) -> Floats:
        """[B] log-probabilities of one batch, halved where memory runs out."""
        try:
            return self._batch([self.records[i] for i in batch])
        except Exception as error:
            if not likelihood.out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    "expected memory for one record behind a prefix, found too little; use a smaller dtype"
                ) from None
        half = (len(batch) + 1) // 2
        return np.concatenate([self.batch(batch[:half]), self.batch(batch[half:])])

    def _batch(self, records: list[TokenRecord]) -> Floats:
        device = next(self.model.parameters()).device
        ids, _ = pad(records, device)  # [B, T]
        with likelihood.inference(self.model):
            cache = copy.deepcopy(self.cache)  # a pass appends to its cache
            cache.batch_repeat_interleave(len(records))
            output = self.model_map.backbone(self.model)(input_ids=ids, past_key_values=cache, use_cache=True)
            states = output.last_hidden_state[predicting(records, ids)]  # [N, d]
            targets = torch.tensor([token for record in records for token in record.completion], device=device)  # [N]
            size = max(1, likelihood.CHUNK_ELEMENTS // self.model_map.vocab_size)
            rows = [
                _log_prob(self.model_map.logits(states[i : i + size]), targets[i : i + size])
                for i in range(0, len(targets), size)
            ]
        per_token = torch.cat(rows).cpu().double().numpy()  # [N]
        offsets = np.cumsum([0, *[record.n_tokens for record in records[:-1]]])
        sums: Floats = np.add.reduceat(per_token, offsets)
        return sums


def _log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """[C] log-probabilities of `targets` [C] from `logits` [C, V]."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
