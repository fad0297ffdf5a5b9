"""A universal suffix: tokens between prompt and completion that make a model emit half A, tried on half B.

Greedy coordinate gradient (`attacks.extraction.gcg`, arXiv 2307.15043) for many records at once: with L_r(z) the mean
cross entropy of record r's completion after prompt | z, a step takes a random batch S of half A and

    adds up the one-hot gradients:  G = sum over r in S of dL_r / d onehot(z)                     [P, V]
    draws replacements of one token of z among the `top_k` best of each position,
    moves to the one with the lowest  mean over r in S of L_r,  even if it is no better than z.

Every `check` steps, and at the end, the suffix is measured on all of half A; the best of those is returned. Like the
soft prompt, it says something only on records it was not trained on, beside never-seen ones; unlike it, it can be typed
(given a tokenizer, only suffixes are kept whose tokens come back when their text is tokenised again), so it shows what
an attacker without access to the embeddings could send. The suffix is checked by itself: at its borders a tokenizer may
still join it with the text around it.

Limits: a search without guarantee, over a space far smaller than a soft prompt's.

Shape letters: P tokens of the suffix, V vocabulary, C candidates, B records in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from attacks.elicitation.inputs import check as check_lengths
from attacks.extraction.gcg import Rows, Tokens, every_token, initial_prompt, ranked_tokens, replacements
from probes.errors import UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.training import batches

CHECK = 5


@dataclass(frozen=True, slots=True)
class Suffix:
    """What the search found.

    Attributes:
        ids: the suffix of lowest loss over all training records, among those measured.
        loss: that loss, in nats per token.
        initial_loss: the same of the suffix the search began with.
        losses: of each step, on its batch.
        forwards: rows run forward.
        backwards: rows run backward.
    """

    ids: tuple[int, ...] = field(repr=False)
    loss: float
    initial_loss: float
    losses: tuple[float, ...] = field(repr=False)
    forwards: int
    backwards: int


def search(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    length: int = 10,
    steps: int = 100,
    batch: int = 4,
    candidates: int = 64,
    top_k: int = 64,
    tokens: Tokens | None = None,
    check: int = CHECK,
    seed: int = 0,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Suffix:
    """Search a suffix on records that are not scored afterwards.

    Args:
        model: a causal language model; used in evaluation mode, left as found.
        records: to train on, at least two.
        length: P.
        steps: gradient steps.
        batch: records a step.
        candidates: replacements evaluated in a step.
        top_k: replacements considered for each position.
        tokens: which suffixes may be written; any ids by default. See `attacks.extraction.gcg.writable`.
        check: steps between two measurements on all records.
        seed: of the initial suffix, the batches and the replacements.
        model_map: the model's map, built when absent.
        batch_tokens: tokens of candidate rows run at a time.
        progress: called with (steps done, steps).

    Returns:
        The best suffix measured. A step costs `batch` rows forward and backward, and `candidates` rows forward for each
        record of the batch; a measurement one row forward a record.

    Raises:
        UsageError: counts below 1, fewer than two records, records too long, fewer than two usable tokens, or no
            suffix that survives tokenisation.
        UnsupportedError: token ids outside the vocabulary.
        ResourceError: when one row does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    tokens = tokens or every_token(model_map.vocab_size)
    if min(length, steps, batch, candidates, top_k, check) < 1:
        raise UsageError("expected length, steps, batch, candidates, top_k and check of at least 1, found fewer")
    if len(records) < 2:
        raise UsageError(f"expected at least two records to search a suffix on, found {len(records)}; give more")
    if len(tokens.usable) < 2:
        raise UsageError(f"expected two usable tokens or more, found {len(tokens.usable)}; check the tokenizer")
    check_lengths(model_map, records, length)
    generator = np.random.default_rng([seed, 29])
    every = [
        Rows(model, model_map, record.ids[: record.n_prompt], (), record.completion, batch_tokens) for record in records
    ]

    def on_all(ids: tuple[int, ...]) -> float:
        return float(_losses(every, [ids])[0])

    current = initial_prompt(length, None, tokens, generator)
    visited, losses = {current}, []
    first = on_all(current)
    best = (first, current)
    for done, chosen in enumerate(batches(len(records), batch, steps, seed), start=1):
        rows = [every[i] for i in chosen]
        slope = rows[0].gradient(current)  # [P, V]
        for row in rows[1:]:
            slope = slope + row.gradient(current)
        ranked = ranked_tokens(slope, current, tokens.usable, top_k)
        pool = replacements(current, ranked, candidates, visited, tokens.survives, generator)
        if pool:
            found = _losses(rows, pool)  # [C]
            current = pool[int(found.argmin())]
            visited.add(current)
            losses.append(float(found.min()))
        if done % check == 0 or done == steps:
            best = min(best, (on_all(current), current))
        if progress:
            progress(done, steps)
    forwards, backwards = (sum(getattr(row, name) for row in every) for name in ("forwards", "backwards"))
    return Suffix(best[1], best[0], first, tuple(losses), forwards, backwards)


def appended(records: Sequence[TokenRecord], ids: Sequence[int]) -> list[TokenRecord]:
    """The records with a suffix between prompt and completion."""
    return [
        replace(
            record,
            ids=(*record.ids[: record.n_prompt], *ids, *record.completion),
            n_prompt=record.n_prompt + len(ids),
        )
        for record in records
    ]


def _losses(rows: Sequence[Rows], pool: list[tuple[int, ...]]) -> np.ndarray:
    """[C] loss of each suffix in nats per token, the mean over records."""
    found: np.ndarray = np.mean([row.evaluate(pool)[0] for row in rows], axis=0)
    return found
