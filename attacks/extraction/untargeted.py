"""Untargeted extraction: sample freely from the model and rank the samples by signs of memorisation.

Carlini et al. 2021 (arXiv 2012.07805): draw many samples from no prompt (or from user prompts), drop near-identical
ones, and sort what is left by figures that tell memorised text from merely probable text. With loss the mean negative
log-likelihood per token, in nats,

    perplexity         exp(loss)                                                   low
    reference_ratio    loss under a reference model / loss                         high: easy for this model alone
    zlib_ratio         nats of the zlib-compressed text / nats under the model     high: easy, yet not repetitive
    lowercase_ratio    loss of the lower-cased text / loss                         high: easy in this very spelling
    window_perplexity  lowest exp(mean loss) over windows of consecutive tokens    low: a memorised passage in a sample

The published zlib ratio divides the bytes of a whole text by a mean per token, so that it grows with length. Both
sides are totals here, which gives the published order for samples of equal length and does not favour long ones.

Sampling inverts the cumulative distribution with uniform numbers that depend on the seed and the sample's number
alone: neither the batch size nor how many samples are drawn changes a sample, up to draws that fall within rounding of
the border between two tokens. Rows decoded together have prompts of equal length, so nothing is padded.

Shape letters: B samples in a batch, T prompt tokens, L sampled tokens, V vocabulary, R records.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.extraction.overlap import longest_common_span
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import FLOOR, Progress, SamplingScheme, TokenTable, decoder_scores, inference, out_of_memory
from probes.loss import sample as draw
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.statistics import clopper_pearson

WINDOW = 50  # tokens of the sliding window, as in the paper
MINIMUM = 50  # tokens that a sample must share with a record to count as holding it
SHORTEST = 8  # tokens below which a whole record is matched by chance too easily to be looked for
TRIGRAMS = 3
LOSS_FLOOR = 1e-9  # nats; keeps the ratios of perfectly memorised samples finite

SIGNALS = {  # column of `signals` -> whether high or low values speak for memorisation
    "perplexity": "low",
    "reference_ratio": "high",
    "zlib_ratio": "high",
    "lowercase_ratio": "high",
    "window_perplexity": "low",
}


# --- sampling -------------------------------------------------------------------------------------------------------


def sample(
    model: nn.Module,
    n: int,
    length: int,
    *,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]],
    scheme: SamplingScheme | None = None,
    seed: int = 0,
    batch: int = 32,
    stop: Sequence[int] = (),
    stop_after: int = 1,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, ...]]:
    """Draw samples with a key-value cache, none of the checkpoint's own generation defaults, and no penalties.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        n: how many samples.
        length: tokens of each sample.
        prompt_ids: one prompt (a beginning-of-sequence token alone, for instance), or several: sample i continues
            prompt i mod their number.
        scheme: the sampling rule; plain sampling by default.
        seed: of all draws.
        batch: samples decoded together.
        stop: tokens that end a sample; a sample does not hold the one that ended it.
        stop_after: how many of them it takes.
        model_map: the model's map, built when absent.
        progress: called with (samples done, samples in all).

    Returns:
        n token sequences without their prompts, of `length` tokens each unless a stop token ended them.

    Raises:
        UsageError: no prompt, an empty one, a token outside the vocabulary, or more positions than the model has.
        UnsupportedError: a model that keeps no key-value cache.
        ResourceError: when a single sample does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    prompts = _prompts(prompt_ids)
    if n < 0 or min(length, batch, stop_after) < 1:
        raise UsageError(
            "expected n of at least 0 and length, batch and stop_after of at least 1, "
            f"found {n}, {length}, {batch} and {stop_after}"
        )
    if not all(0 <= token < model_map.vocab_size for prompt in prompts for token in prompt):
        raise UsageError(f"expected prompt tokens below the vocabulary size {model_map.vocab_size}, found others")
    positions = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None)
    needed = max(map(len, prompts)) + length
    if isinstance(positions, int) and needed > positions:
        raise UsageError(f"expected at most {positions} positions, found {needed}; draw shorter samples")
    by_width: dict[int, list[int]] = defaultdict(list)
    for i in range(n):
        by_width[len(prompts[i % len(prompts)])].append(i)
    drawn: dict[int, tuple[int, ...]] = {}
    sampler = _Sampler(model, model_map, prompts, length, scheme or SamplingScheme(), seed, frozenset(stop), stop_after)
    with inference(model):
        for indices in by_width.values():
            for start in range(0, len(indices), batch):
                sampler.run(indices[start : start + batch], drawn)
                if progress:
                    progress(len(drawn), n)
    return [drawn[i] for i in range(n)]


def _prompts(prompt_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    nested = [p for p in prompt_ids if isinstance(p, Sequence)]
    prompts = [tuple(p) for p in nested] if nested else [tuple(cast(Sequence[int], prompt_ids))]
    if not prompts or not all(prompts):
        raise UsageError("expected a prompt of at least one token, found none; use the beginning-of-sequence token")
    return prompts


@dataclass(frozen=True, slots=True)
class _Sampler:
    model: nn.Module = field(repr=False)
    model_map: ModelMap = field(repr=False)
    prompts: list[tuple[int, ...]] = field(repr=False)  # ids decode to text, so they stay out of tracebacks
    length: int
    scheme: SamplingScheme
    seed: int
    stop: frozenset[int]
    stop_after: int = 1

    def run(self, indices: list[int], drawn: dict[int, tuple[int, ...]]) -> None:
        try:
            rows = self._decode(indices)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(indices) == 1:
                raise ResourceError(
                    f"expected memory for one sample of {self.length} tokens, found too little; "
                    "draw shorter samples or use another device"
                ) from None
            rows = None
        if rows is None:  # outside the handler, so that the failed batch's tensors are released first
            half = (len(indices) + 1) // 2
            self.run(indices[:half], drawn)
            self.run(indices[half:], drawn)
            return
        drawn.update(zip(indices, rows, strict=True))

    def _decode(self, indices: list[int]) -> list[tuple[int, ...]]:
        device = next(self.model.parameters()).device
        uniforms = torch.stack([self._uniforms(i) for i in indices]).to(device)  # [B, L]
        step = torch.tensor([self.prompts[i % len(self.prompts)] for i in indices], device=device)  # [B, T]
        tokens = torch.empty(len(indices), self.length, dtype=torch.long, device=device)  # [B, L]
        stopped = torch.zeros(len(indices), dtype=torch.long, device=device)  # [B]
        stops = torch.tensor(sorted(self.stop), dtype=torch.long, device=device)
        backbone, past, width = self.model_map.backbone(self.model), None, self.length
        for t in range(self.length):
            out = backbone(input_ids=step, past_key_values=past, use_cache=True)
            past = getattr(out, "past_key_values", None)
            if past is None:
                raise UnsupportedError("expected a model with a key-value cache, found one that keeps none")
            logits = self.model_map.logits(out.last_hidden_state[:, -1])  # [B, V]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            tokens[:, t] = draw(decoder_scores(logits, self.scheme), uniforms[:, t])
            stopped += torch.isin(tokens[:, t], stops)
            if bool((stopped >= self.stop_after).all()):
                width = t + 1
                break
            step = tokens[:, t : t + 1]
        return [self._until_stop(row) for row in tokens[:, :width].tolist()]

    def _until_stop(self, row: list[int]) -> tuple[int, ...]:
        ends = [t for t, token in enumerate(row) if token in self.stop]
        return tuple(row[: ends[self.stop_after - 1]] if len(ends) >= self.stop_after else row)

    def _uniforms(self, index: int) -> Tensor:
        key = hashlib.sha256(f"sample|{self.seed}|{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        return torch.rand(self.length, generator=generator, dtype=torch.float64)


# --- samples as records ---------------------------------------------------------------------------------------------


def distinct(samples: Sequence[Sequence[int]], share: float = 0.5, *, order: Sequence[int] | None = None) -> list[int]:
    """Indices of samples that are not near-identical to a kept one.

    A sample goes when at least `share` of its token trigrams, counted with multiplicity, occur in one kept sample (the
    paper's rule with 0.5). Samples too short for a trigram are compared whole; empty ones go.

    Of near-identical samples the first in `order` stays, and an exact copy of a record may go for an imperfect one that
    was drawn earlier. So with more samples than one would score, drop first in the order drawn; else score all and
    drop in the order of a signal, as the paper does.

    Args:
        samples: token sequences.
        share: in (0, 1].
        order: indices in the order of preference, each once; the order drawn by default.

    Returns:
        The indices kept, ascending.

    Raises:
        UsageError: a share outside (0, 1], or an order that is not one of all samples.
    """
    if not 0 < share <= 1:
        raise UsageError(f"expected a share in (0, 1], found {share}")
    preferred = list(range(len(samples)) if order is None else order)
    if sorted(preferred) != list(range(len(samples))):
        raise UsageError(f"expected an order of all {len(samples)} samples, found another set of indices")
    postings: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # trigram -> (kept sample, times)
    kept = []
    for i in preferred:
        grams = Counter(_grams(samples[i], min(TRIGRAMS, len(samples[i]))))
        common: Counter[int] = Counter()
        for gram, times in grams.items():
            for other, there in postings[gram]:
                common[other] += min(times, there)
        if not grams or max(common.values(), default=0) >= share * grams.total():
            continue
        kept.append(i)
        for gram, times in grams.items():
            postings[gram].append((i, times))
    return sorted(kept)


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] if n else []


def as_records(
    samples: Sequence[Sequence[int]],
    prompt_ids: Sequence[int] | Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    keep: Iterable[int] | None = None,
) -> list[TokenRecord]:
    """Samples as records to score, each after the prompt it continued.

    Args:
        samples: what `sample` returned.
        prompt_ids: the prompts given to `sample`.
        decode: token ids -> text, for the compressed size.
        keep: which samples, for instance `distinct(samples)`; all by default.

    Returns:
        One record for each, named "sample-<number>".

    Raises:
        UsageError: an empty sample.
    """
    prompts, records = _prompts(prompt_ids), []
    for i in range(len(samples)) if keep is None else keep:
        if not samples[i]:
            raise UsageError("expected samples of at least one token, found an empty one; keep distinct(samples) only")
        prompt = prompts[i % len(prompts)]
        size = len(zlib.compress(decode(samples[i]).encode("utf-8", "replace")))
        records.append(TokenRecord(f"sample-{i}", (*prompt, *samples[i]), len(prompt), size))
    return records


def lowercased(
    records: Sequence[TokenRecord], decode: Callable[[Sequence[int]], str], encode: Callable[[str], Sequence[int]]
) -> list[TokenRecord]:
    """The same samples in lower case, after the same prompts.

    A text that the tokenizer cannot write again (its encoding is empty) keeps its own ids, so that its ratio is 1.

    Args:
        records: of `as_records`.
        decode: token ids -> text.
        encode: text -> token ids without special tokens.
    """
    lower = []
    for record in records:
        ids = tuple(encode(decode(record.completion).lower())) or record.completion
        prompt = record.ids[: record.n_prompt]
        lower.append(TokenRecord(record.record_id, (*prompt, *ids), record.n_prompt, record.compressed_bytes))
    return lower


# --- ranking --------------------------------------------------------------------------------------------------------


def signals(
    target: TokenTable,
    reference: TokenTable | None = None,
    lower: TokenTable | None = None,
    compressed_bytes: Sequence[int] | None = None,
    *,
    window: int = WINDOW,
) -> pd.DataFrame:
    """The paper's figures for each sample and its rank by each of them.

    Args:
        target: one pass of the audited model over the samples.
        reference: the same samples under another model; None leaves its column out.
        lower: the lower-cased samples under the audited model (any number of tokens); None leaves its column out.
        compressed_bytes: [R] zlib sizes; by default the table's own.
        window: tokens of the sliding window; a shorter sample is one window.

    Returns:
        A frame with record_id, n_tokens, loss, the columns of `SIGNALS` that can be given, and for each a column
        `rank_<signal>`: 1 for the likeliest to be memorised, ties in input order. All figures are finite.

    Raises:
        UsageError: tables of other samples, or a window below one token.
    """
    if window < 1:
        raise UsageError(f"expected a window of at least 1 token, found {window}")
    samples = len(target.record_ids)
    if reference is not None and not np.array_equal(reference.offsets, target.offsets):
        raise UsageError("expected the reference's table of the same samples, found other lengths; score them again")
    if lower is not None and len(lower.record_ids) != samples:
        raise UsageError(f"expected {samples} lower-cased samples, found {len(lower.record_ids)}; score them again")
    sizes = target.compressed_bytes if compressed_bytes is None else np.asarray(compressed_bytes, dtype=np.int64)
    if len(sizes) != samples:
        raise UsageError(f"expected {samples} compressed sizes, found {len(sizes)}; give one for each sample")
    tokens = np.diff(target.offsets).astype(np.int64)  # [R]
    loss = _losses(target)
    frame = pd.DataFrame({"record_id": list(target.record_ids), "n_tokens": tokens, "loss": loss})
    frame["perplexity"] = _exp(loss)
    if reference is not None:
        frame["reference_ratio"] = _losses(reference) / loss
    frame["zlib_ratio"] = sizes * (8 * math.log(2)) / (loss * tokens)
    if lower is not None:
        frame["lowercase_ratio"] = _losses(lower) / loss
    frame["window_perplexity"] = _exp(np.array([_lowest_window(-_log_prob(target, i), window) for i in range(samples)]))
    for name in [name for name in SIGNALS if name in frame]:
        badness = frame[name].to_numpy(dtype=np.float64) * (1 if SIGNALS[name] == "low" else -1)
        ranks = np.empty(samples, dtype=np.int64)
        ranks[np.argsort(badness, kind="stable")] = np.arange(1, samples + 1)
        frame[f"rank_{name}"] = ranks
    return frame


def _log_prob(table: TokenTable, i: int) -> np.ndarray:
    """Log p of one sample's tokens [L] in float64, finite."""
    return np.maximum(table.log_prob[table.rows(i)].astype(np.float64), FLOOR)


def _losses(table: TokenTable) -> np.ndarray:
    """Mean negative log-likelihood [R], at least `LOSS_FLOOR`."""
    means = np.array([-_log_prob(table, i).mean() for i in range(len(table.record_ids))], dtype=np.float64)
    return np.maximum(means, LOSS_FLOOR)


def _lowest_window(losses: np.ndarray, window: int) -> float:
    """Lowest mean of `window` consecutive losses."""
    if len(losses) <= window:
        return float(losses.mean())
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    return float((sums[window:] - sums[:-window]).min() / window)


def _exp(losses: np.ndarray) -> np.ndarray:
    perplexity: np.ndarray = np.exp(np.minimum(losses, 700.0))  # exp(710) leaves the doubles
    return perplexity


# --- what the samples hold ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Matches:
    """Which samples hold which records.

    Attributes:
        found: one row for each pair of a sample and a record it holds: `sample` and `record` (indices), `span` (tokens
            of the longest common run), `share` (of the record's completion).
        samples: how many samples were searched.
        searched: how many records were looked for.
        too_short: how many records were not, having fewer tokens than chance matches.
    """

    found: pd.DataFrame
    samples: int
    searched: int
    too_short: int

    @property
    def held(self) -> np.ndarray:
        """[samples] bool: the sample holds a record."""
        held = np.zeros(self.samples, dtype=bool)
        held[self.found["sample"].to_numpy(dtype=np.int64)] = True
        return held


def matches(
    samples: Sequence[Sequence[int]],
    records: Sequence[TokenRecord],
    minimum: int = MINIMUM,
    *,
    shortest: int = SHORTEST,
) -> Matches:
    """Which samples hold which records: a run of `minimum` tokens of a completion, or all of a shorter one.

    Works on token ids, so a sample that spells a record with other tokens is not found here. Records of fewer than
    `shortest` completion tokens are counted, not looked for: a name or a number turns up by chance.

    Args:
        samples: token sequences.
        records: what is looked for.
        minimum: tokens of a run that counts.
        shortest: records with shorter completions are left out.

    Raises:
        UsageError: a length below 1, or no records.
    """
    if not records:
        raise UsageError("expected records to look for, found none")
    if minimum < 1 or shortest < 1:
        raise UsageError(f"expected lengths of at least 1 token, found {minimum} and {shortest}")
    wanted = {r: min(minimum, record.n_tokens) for r, record in enumerate(records) if record.n_tokens >= shortest}
    # A run of w tokens holds every run of q <= w tokens. With q the power of two below w, four sizes of index serve all
    # records, and a sample and a record meet only where they share q tokens in a row.
    index: dict[int, dict[tuple[int, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    for r, width in wanted.items():
        q = 1 << (width.bit_length() - 1)
        for gram in _grams(records[r].completion, q):
            index[q][gram].add(r)
    rows = []
    for s, tokens in enumerate(samples):
        near: set[int] = set()
        for q, grams in index.items():
            for gram in set(_grams(tokens, q)):
                near |= grams.get(gram, set())
        for r in sorted(near):
            span = longest_common_span(tokens, records[r].completion)
            if span >= wanted[r]:
                rows.append((s, r, span, span / records[r].n_tokens))
    found = pd.DataFrame(rows, columns=["sample", "record", "span", "share"])
    return Matches(found, len(samples), len(wanted), len(records) - len(wanted))


def precision(frame: pd.DataFrame, held: Sequence[bool] | np.ndarray, ks: Sequence[int] = (10, 100)) -> pd.DataFrame:
    """Share of samples that hold a record among the k best by each signal.

    Args:
        frame: of `signals`.
        held: [R] whether each row's sample holds a record.
        ks: how many of the best; those beyond the number of samples are left out.

    Returns:
        One row for each signal and k, and one "any order" row over all samples, the level to beat: signal, k, hits,
        precision, low, high (Clopper-Pearson, 95 %).

    Raises:
        UsageError: no samples, or another number of them in `held`.
    """
    hit = np.asarray(held, dtype=bool)
    if len(hit) != len(frame) or not len(frame):
        raise UsageError(f"expected one or more samples and a verdict for each, found {len(frame)} and {len(hit)}")
    rows = [("any order", len(frame), int(hit.sum()))]
    for name in SIGNALS:
        if name in frame:
            rank = frame[f"rank_{name}"].to_numpy()
            rows += [(name, k, int(hit[rank <= k].sum())) for k in sorted(set(ks)) if 1 <= k <= len(frame)]
    intervals = [clopper_pearson(hits, k) for _, k, hits in rows]
    out = pd.DataFrame(rows, columns=["signal", "k", "hits"])
    out["precision"] = [interval.value for interval in intervals]
    out["low"] = [interval.low for interval in intervals]
    out["high"] = [interval.high for interval in intervals]
    return out
