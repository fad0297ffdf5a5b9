"""How much of a record must be given, and from where, before greedy decoding finishes it?

Three questions, dearest last:

    prefix_curve   from the token table alone: greedy finishes after the prompt and the first j gold tokens if and only
                   if every later token is the greedy choice, so the last miss m answers every j at once: j >= m + 1
    windows        from the token table alone: can any k consecutive tokens be emitted after the gold tokens before
                   them? They can where k greedy choices in a row are gold
    sweep          one forward pass a start: the same completion after fewer context tokens. A large part of sequences
                   is easier to extract with a *shorter* context (arXiv 2412.11302), so one start undercounts

Limits: the verdicts are those of the pass, not confirmed by generation; `sweep` returns the records to confirm. The
best of several starts is a maximum: read it beside the same sweep over records that were never seen. A shorter context
also moves token positions, as it does for an attacker who sends the shorter prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import nn

from probes.errors import UsageError
from probes.figures import extraction_strength, verdict
from probes.likelihood import SamplingScheme, TokenTable, score
from probes.modelmap import ModelMap
from probes.records import TokenRecord

SHARES = tuple(i / 10 for i in range(10))
VERDICTS = ("not", "uncertain", "extracted")  # from worst to best for the attacker


@dataclass(frozen=True, slots=True)
class PrefixCurve:
    """Gold prefixes from which greedy decoding finishes, of R records.

    Attributes:
        record_ids: R identifiers.
        tokens: [R] fewest gold completion tokens after which greedy finishes; all of them where it never does.
        share: [R] `tokens` as a share of the completion, 1 - extraction strength.
        given: [G] shares of the completion given.
        finishing: [G] share of records that greedy finishes when that share of the completion (rounded down to whole
            tokens) is given.
    """

    record_ids: tuple[str, ...]
    tokens: np.ndarray
    share: np.ndarray
    given: np.ndarray
    finishing: np.ndarray


def prefix_curve(table: TokenTable, given: Sequence[float] = SHARES) -> PrefixCurve:
    """The whole prefix-length curve from one pass.

    Args:
        table: the token table.
        given: shares of the completion in [0, 1); at 1 nothing would be left to emit.

    Raises:
        UsageError: for a table without records, or a share outside [0, 1).
    """
    if not table.record_ids:
        raise UsageError("expected at least one record, found none; give records to score")
    if not all(0 <= share < 1 for share in given):
        raise UsageError("expected shares in [0, 1), found others; leave out 1, where nothing is left to emit")
    lengths = np.diff(table.offsets)  # [R]
    misses = [np.flatnonzero(~table.match[table.rows(i)]) for i in range(len(lengths))]
    tokens = np.array([int(missed[-1]) + 1 if len(missed) else 0 for missed in misses])  # [R]
    grid = np.array(given, dtype=np.float64)  # [G]
    known = np.floor(grid[:, None] * lengths + 1e-9)  # [G, R]
    return PrefixCurve(table.record_ids, tokens, tokens / lengths, grid, (tokens <= known).mean(axis=1))


def windows(table: TokenTable, k: int = 50) -> pd.DataFrame:
    """Windows of `k` completion tokens that greedy decoding emits after the gold tokens before them.

    A completion shorter than `k` is one window, the whole of it.

    Args:
        table: the token table.
        k: tokens of a window.

    Returns:
        A frame with the columns record_id, window (tokens), windows (how many the completion holds), emitted (how
        many greedy decoding emits), hit (any), longest_run (of greedy choices in a row).

    Raises:
        UsageError: for k below 1.
    """
    if k < 1:
        raise UsageError(f"expected windows of at least 1 token, found {k}; give a positive length")
    rows = []
    for i, record_id in enumerate(table.record_ids):
        match = table.match[table.rows(i)]
        window = min(k, len(match))
        ends = np.flatnonzero(np.diff(np.concatenate(([False], match, [False])).astype(np.int8)))
        runs = ends[1::2] - ends[::2]  # lengths of the runs of matches
        emitted = int(np.maximum(runs - window + 1, 0).sum())
        longest = int(runs.max(initial=0))
        rows.append((record_id, window, len(match) - window + 1, emitted, emitted > 0, longest))
    return pd.DataFrame(rows, columns=["record_id", "window", "windows", "emitted", "hit", "longest_run"])


def starts(records: Sequence[TokenRecord], n: int, *, keep: int = 1, minimum: int = 1) -> list[list[TokenRecord]]:
    """Each record after up to `n` contexts: its own, then shorter ones that end in the same tokens.

    Args:
        records: the records.
        n: contexts a record, its own included. Their lengths fall geometrically from the record's own to `minimum`;
            lengths that round to the same number are one context.
        keep: leading tokens that every context begins with (1: a begin-of-text token).
        minimum: context tokens, beyond those kept, of the shortest context.

    Returns:
        One list a record, longest context first; a record whose context is already that short stands alone.

    Raises:
        UsageError: for n below 1, a negative `keep` or `minimum`, or both 0.
    """
    if n < 1 or keep < 0 or minimum < 0 or keep + minimum < 1:
        raise UsageError(
            f"expected n >= 1 and a context of at least one token, found n = {n}, keep = {keep}, minimum = {minimum}; "
            "change them"
        )
    out = []
    for record in records:
        full = record.n_prompt - keep
        variants = [record]
        if n > 1 and full > minimum:
            # In steps of equal ratio; the offset of 1 allows for a shortest context of none.
            lengths = np.round(np.geomspace(full + 1, minimum + 1, n) - 1).astype(int)
            for length in dict.fromkeys(int(length) for length in lengths[1:] if length < full):
                ids = record.ids[:keep] + record.ids[record.n_prompt - length :]
                variants.append(replace(record, ids=ids, n_prompt=keep + length))
        out.append(variants)
    return out


@dataclass(frozen=True, slots=True)
class Sweep:
    """Extraction from several starts.

    Attributes:
        records: one row a record: record_id, starts (how many), best_start (0 is the record's own context),
            best_context (its tokens), log_p_z and best_log_p_z (own context, best context), strength and
            best_strength (extraction strength), greedy and best_greedy (verdict `extracted`, `uncertain` or `not`).
            best_start has the best verdict, and among equal verdicts the largest log_p_z; each best_ figure is the best
            over all starts.
        by_start: one row a start: start, records (that have it), context (median tokens), extracted (share of them
            that the pass calls extracted), easier (share with a larger log_p_z than from their own context).
        best: each record after its best start, for confirmation by `attacks.extraction.emits`.
        passes: forward passes of a record that this took beyond the token table given.
    """

    records: pd.DataFrame
    by_start: pd.DataFrame
    best: tuple[TokenRecord, ...]
    passes: int


def sweep(
    model: nn.Module,
    records: Sequence[TokenRecord],
    n: int = 4,
    *,
    table: TokenTable | None = None,
    keep: int = 1,
    minimum: int = 1,
    noise: float = 0.0,
    scheme: SamplingScheme | None = None,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Score each record after several contexts and keep the best, never worse than its own.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        records: the records.
        n: contexts a record, see `starts`.
        table: the token table of the records' own contexts, if there is one; its scheme is used.
        keep: see `starts`.
        minimum: see `starts`.
        noise: logit margin below which a greedy verdict is uncertain (`probes.likelihood.logit_noise`).
        scheme: sampling scheme of log_p_z; plain sampling by default.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens a batch.
        progress: called with (sequences scored, sequences to score).

    Raises:
        UsageError: for impossible starts, or a table of other records or of another scheme.
    """
    variants = starts(records, n, keep=keep, minimum=minimum)
    if table is not None:
        if np.diff(table.offsets).tolist() != [record.n_tokens for record in records]:
            raise UsageError("expected the token table of these records, found other lengths; score them again")
        if scheme is not None and scheme != table.scheme:
            raise UsageError("expected a token table of the scheme asked for, found another; score the records again")
        scheme = table.scheme
    first = 0 if table is None else 1
    flat = [variant for own in variants for variant in own[first:]]
    scored = score(model, flat, model_map=model_map, scheme=scheme, batch_tokens=batch_tokens, progress=progress)
    rows, best, each, at = [], [], [], 0
    for i, own in enumerate(variants):
        found = [] if table is None else [_figures(table, i, noise)]
        found += [_figures(scored, at + j, noise) for j in range(len(own) - first)]
        at += len(own) - first
        top = max(range(len(own)), key=lambda s: (found[s].greedy, found[s].log_p_z, -s))
        best.append(own[top])
        each += [(s, own[s].n_prompt, f.greedy == 2, f.log_p_z > found[0].log_p_z) for s, f in enumerate(found)]
        rows.append(
            {
                "record_id": records[i].record_id,
                "starts": len(own),
                "best_start": top,
                "best_context": own[top].n_prompt,
                "log_p_z": found[0].log_p_z,
                "best_log_p_z": max(f.log_p_z for f in found),
                "strength": found[0].strength,
                "best_strength": max(f.strength for f in found),
                "greedy": VERDICTS[found[0].greedy],
                "best_greedy": VERDICTS[max(f.greedy for f in found)],
            }
        )
    by_start = pd.DataFrame(each, columns=["start", "context", "extracted", "easier"]).groupby("start", as_index=False)
    summary = by_start.agg(
        records=("context", "size"),
        context=("context", "median"),
        extracted=("extracted", "mean"),
        easier=("easier", "mean"),
    )
    return Sweep(pd.DataFrame(rows, columns=list(COLUMNS)), summary, tuple(best), len(flat))


COLUMNS = (
    "record_id",
    "starts",
    "best_start",
    "best_context",
    "log_p_z",
    "best_log_p_z",
    "strength",
    "best_strength",
    "greedy",
    "best_greedy",
)


@dataclass(frozen=True, slots=True)
class _Figures:
    log_p_z: float
    strength: float
    greedy: int  # index into VERDICTS


def _figures(table: TokenTable, record: int, noise: float) -> _Figures:
    rows = table.rows(record)
    match = table.match[rows]
    return _Figures(
        log_p_z=float(table.log_sampled[rows].astype(np.float64).sum()),
        strength=extraction_strength(match),
        greedy=VERDICTS.index(verdict(match, table.margin[rows], table.gap[rows], noise)),
    )
