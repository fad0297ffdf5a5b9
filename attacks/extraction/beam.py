"""Near-verbatim mass: a lower bound on the probability that one sample comes within a distance of a record.

    M(e) = sum of q(s) over continuations s of the completion's length with distance(s, completion) <= e

q is the model under a sampling scheme. The set is far too large to sum over, and Monte Carlo needs about 1e5 samples
to resolve a small mass. A beam search that keeps only what can still end within the distance adds up the likeliest
members instead: every summand is exact and no two are the same sequence, so the sum is a deterministic lower bound.
Decoding-constrained beam search, Cooper et al. 2026 (arXiv 2603.24917), here with two changes that make the bound
monotone:

  - Beams compete only with beams of the same *level*, the smallest distance they can still end with. Levels never
    fall, so a larger distance only adds levels: one search gives M for every distance up to `distance`, and level 0
    is the exact completion, which therefore is never lost: M(e) >= p_z.
  - Within a level the places are filled in tiers: the w-th place goes to the best child of parents in places up to w.
    The first w places are thus the same in every wider search.

A level is followed by one dynamic-programming row a beam (Levenshtein) or a count (Hamming). Tokens outside the few
gold tokens near the position all lead to the same row, so only the likeliest of them are looked at.

Limits: a lower bound; `complete` says when nothing was dropped and it is the mass itself. Distances are over tokens
and over the first |completion| tokens generated, so an inserted token also pushes the last one out and costs 2.
Sums of probabilities of cached decoding differ from those of one pass by the model's rounding.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UsageError
from probes.likelihood import SamplingScheme, check_records, decoder_scores, inference, out_of_memory
from probes.modelmap import ModelMap
from probes.records import TokenRecord

Metric = Literal["levenshtein", "hamming"]


@dataclass(frozen=True, slots=True)
class NearVerbatim:
    """Lower bounds on the probability that one sample comes near the completion; natural logarithms.

    Attributes:
        log_mass: log of the bound for the distance asked for; -inf for 0.
        log_exact: log p_z, of the completion itself.
        by_distance: the bounds for distances 0 to the one asked for; the first is `log_exact`.
        found: how many sequences were added up.
        complete: whether every sequence of positive probability within the distance is among them.
        steps: rows that were fed through the model (the prompt, then one token each).
    """

    log_mass: float
    log_exact: float
    by_distance: tuple[float, ...]
    found: int
    complete: bool
    steps: int


def near_verbatim_mass(
    model: nn.Module,
    record: TokenRecord,
    *,
    distance: int,
    metric: Metric = "levenshtein",
    width: int = 20,
    scheme: SamplingScheme | None = None,
    model_map: ModelMap | None = None,
) -> NearVerbatim:
    """Search the continuations of a record's prompt that stay within a distance of its completion.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        record: what to look for.
        distance: largest number of edits, in tokens.
        metric: `levenshtein` (insert, delete, replace) or `hamming` (replace only).
        width: beams kept in each level; at most 1 + `distance` * `width` rows are decoded together.
        scheme: how the decoder samples; plain sampling by default.
        model_map: the model's map, built when absent; pass it when there are many records.

    Returns:
        The bounds. They never fall as `distance` or `width` grows, up to rounding.

    Raises:
        UsageError: for a negative distance, a width below 1 or an unknown metric.
        UnsupportedError: for token ids outside the vocabulary.
        ResourceError: when the beams do not fit in memory.
    """
    if distance < 0 or width < 1:
        raise UsageError(f"expected distance >= 0 and width >= 1, found {distance} and {width}; change them")
    if metric not in ("levenshtein", "hamming"):
        raise UsageError("expected the metric levenshtein or hamming, found another; choose one of them")
    model_map = model_map or ModelMap.of(model)
    check_records([record], model_map.vocab_size)
    try:
        with inference(model):
            return _search(model, model_map, record, distance, metric, width, scheme or SamplingScheme())
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            f"expected memory for up to {1 + distance * width} rows of {len(record.ids)} tokens, found too little; "
            "use a smaller width or distance"
        ) from None


@dataclass(slots=True)
class _Beams:
    """P prefixes that can still end within the distance."""

    log_p: np.ndarray  # [P] log-probability
    level: np.ndarray  # [P] smallest distance they can end with
    place: np.ndarray  # [P] place within the level, from 0
    rows: np.ndarray  # [P, k + 1] edit distances to every prefix of the completion; Hamming: [P, 1] mismatches


def _search(
    model: nn.Module,
    model_map: ModelMap,
    record: TokenRecord,
    distance: int,
    metric: Metric,
    width: int,
    scheme: SamplingScheme,
) -> NearVerbatim:
    gold = np.array(record.completion)
    k = len(gold)
    zero = np.zeros(1, dtype=np.int64)
    rows = zero[:, None] if metric == "hamming" else np.arange(k + 1)[None]
    beams = _Beams(np.zeros(1), zero, zero, rows)
    backbone = model_map.backbone(model)
    device = next(model.parameters()).device
    feed, cache, complete, steps = torch.tensor([record.ids[: record.n_prompt]], device=device), None, True, 0
    for t in range(k):
        out: Any = backbone(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, steps + len(feed)
        log_q = _log_q(model_map.logits(out.last_hidden_state[:, -1]), scheme)  # [P, V]
        near = gold[max(0, t - distance) : t + distance + 1] if metric == "levenshtein" else gold[t : t + 1]
        special = np.unique(near)  # [C] tokens whose row differs from every other token's
        beams, parents, tokens, dropped = _extend(beams, log_q, special, gold, t, distance, width)
        complete = complete and not dropped
        if not len(tokens):
            break
        if t + 1 < k:
            cache.reorder_cache(torch.tensor(parents, device=device))
            feed = torch.tensor(tokens, device=device)[:, None]  # [P, 1]
    by_distance = tuple(_log_sum(beams.log_p[beams.level <= d]) for d in range(distance + 1))
    return NearVerbatim(by_distance[-1], by_distance[0], by_distance, len(beams.log_p), complete, steps)


def _log_q(logits: Tensor, scheme: SamplingScheme) -> Tensor:
    """[P, V] log-probabilities that the decoder samples from, in single precision at least."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return decoder_scores(logits, scheme).log_softmax(-1)


def _log_sum(values: np.ndarray) -> float:
    """Log of the sum of exponentials; -inf of nothing. At most 0, whatever the rounding."""
    return min(0.0, float(np.logaddexp.reduce(values))) if len(values) else -math.inf


def _extend(
    beams: _Beams, log_q: Tensor, special: np.ndarray, gold: np.ndarray, t: int, distance: int, width: int
) -> tuple[_Beams, list[int], list[int], bool]:
    """The beams one token longer, their parents, their last tokens, and whether anything possible was dropped."""
    rows = _next_rows(beams.rows, special, gold)  # [P, C + 1, row]; the last class is every other token
    level = _levels(rows, t + 1)  # [P, C + 1]
    index = torch.tensor(special, device=log_q.device)
    special_q = log_q[:, index].double().cpu().numpy()  # [P, C]
    others = log_q.index_fill(-1, index, -math.inf)
    values, found = others.topk(min(width + 1, others.shape[-1]))  # [P, W + 1], the last only to see whether it exists
    other_q, other_token = values.double().cpu().numpy(), found[:, :width].cpu().numpy()
    within = level[:, -1] <= distance
    dropped = bool((other_q[within, width:] > -math.inf).any())
    # Candidates by level and by their parent's place: (minus log-probability, parent, token, class)
    pools: dict[int, dict[int, list[tuple[float, int, int, int]]]] = {}
    for parent, place in enumerate(beams.place.tolist()):
        for c in range(len(special)):
            if level[parent, c] <= distance and special_q[parent, c] > -math.inf:
                log_p = beams.log_p[parent] + special_q[parent, c]
                pool = pools.setdefault(int(level[parent, c]), {}).setdefault(place, [])
                pool.append((-float(log_p), parent, int(special[c]), c))
        if within[parent]:
            pool = pools.setdefault(int(level[parent, -1]), {}).setdefault(place, [])
            for q, token in zip(other_q[parent, :width], other_token[parent], strict=True):
                if q > -math.inf:
                    pool.append((-float(beams.log_p[parent] + q), parent, int(token), len(special)))

    chosen: list[tuple[float, int, int, int]] = []
    levels: list[int] = []
    places: list[int] = []
    for own_level in sorted(pools):
        heap: list[tuple[float, int, int, int]] = []
        taken = 0
        for place in range(width):
            for candidate in pools[own_level].get(place, ()):
                heapq.heappush(heap, candidate)
            if heap:
                chosen.append(heapq.heappop(heap))
                levels.append(own_level)
                places.append(place)
                taken += 1
        dropped = dropped or bool(heap)
    parents = [parent for _, parent, _, _ in chosen]
    classes = [c for _, _, _, c in chosen]
    extended = _Beams(
        np.array([-cost for cost, _, _, _ in chosen]),
        np.array(levels, dtype=np.int64),
        np.array(places, dtype=np.int64),
        rows[parents, classes] if chosen else rows[:0, 0],
    )
    return extended, parents, [token for _, _, token, _ in chosen], dropped


def _next_rows(rows: np.ndarray, special: Sequence[int] | np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Rows [P, C + 1, row] after one more token: each of `special` [C], then any other."""
    if rows.shape[1] == 1:  # Hamming: `special` is the one gold token of this position
        return np.stack([rows, rows + 1], axis=1)
    places = np.arange(rows.shape[1])
    differs = np.concatenate(
        [gold[None] != np.asarray(special)[:, None], np.ones((1, len(gold)), dtype=bool)]
    )  # [C+1, k]
    grown = np.repeat(rows[:, None] + 1, len(differs), axis=1)  # [P, C + 1, k + 1]: the token is an insertion
    grown[:, :, 1:] = np.minimum(grown[:, :, 1:], rows[:, None, :-1] + differs)  # it replaces, or is, a gold token
    out: np.ndarray = np.minimum.accumulate(grown - places, axis=-1) + places  # gold tokens left out
    return out


def _levels(rows: np.ndarray, length: int) -> np.ndarray:
    """Smallest distance that prefixes of `length` tokens can end with, of rows [..., row].

    A prefix that is matched with j gold tokens still has as many tokens to come as the completion's length leaves;
    their number and that of the gold tokens left differ by |j - length|, each an edit.
    """
    if rows.shape[-1] == 1:
        return rows[..., 0]
    out: np.ndarray = (rows + np.abs(np.arange(rows.shape[-1]) - length)).min(axis=-1)
    return out
