"""One teacher-forced pass over records: everything an audit needs per token, and nothing of size [B, T, V].

For completion token y_t after its gold context, with logits l and p = softmax(l), the pass yields

    log p(y_t),  rank of y_t,  top-1 minus top-2 logit,  y_t's logit minus the top-1,
    mu = E_p[log p] (= minus the entropy),  sigma^2 = Var_p[log p],  log q(y_t) under each sampling scheme asked for.

Loss, zlib, Min-K% (arXiv 2310.16789), Min-K%++ (2404.02936), extraction strength, exact extraction, (n, p)-discoverable
extraction (2410.19482) and exposure ranks are pure functions of these rows, see `probes.figures`.

Shape letters: B records, T padded tokens, C completion tokens in one chunk, N in all, V vocabulary, d width.

Only completion positions meet the output head, a chunk at a time; the reductions reuse the chunk's own memory.
Batches are right-padded and run without a padding mask: a causal mask hides what follows, so no real token ever sees
padding, while a mask could leave a padded position nothing to attend to (a sliding window full of padding), and the
NaN of that position would reach real tokens as 0 * NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError
from probes.modelmap import ModelMap
from probes.records import TokenRecord, length_batches, pad, predicting

# Logits alive at once. In fp32 32 MB: rows enough for the output head to run at full speed, and just below the 32 MiB
# from which malloc maps every buffer anew and each page of it costs a fault.
CHUNK_ELEMENTS = 8_000_000
TILE_ELEMENTS = 1 << 19  # logits reduced at once on a CPU; 2 MB in fp32 stay in its cache
BLOCK = 256  # logits per block in `_top_two`
NOISE_STEPS = 24  # cached decoding steps a sampled record; on a CPU each costs as much as a short prefill
FLOOR = -1.0e4  # stands in for log 0 where p = 0 multiplies it: 0 * -inf would be NaN

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SamplingScheme:
    """A decoder's sampling rule, applied in the order temperature, top-k, top-p. Defaults are plain sampling."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"expected a positive temperature, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"expected top_k of at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"expected top_p in (0, 1], found {self.top_p}")

    @property
    def plain(self) -> bool:
        """Whether the scheme samples from the model's distribution as it is."""
        return self.temperature == 1.0 and self.top_k is None and self.top_p is None


@dataclass(slots=True)
class TokenTable:
    """Per-token results of one pass, records concatenated in input order.

    Record i owns rows `offsets[i]:offsets[i + 1]`. All float arrays are [N]; logarithms are natural.

    Attributes:
        record_ids: identifiers in input order.
        compressed_bytes: [R] int64, see `TokenRecord`.
        offsets: [R + 1] int64.
        log_prob: log p(y_t).
        log_sampled: log q(y_t) under `scheme`; -inf where the scheme cannot emit the token.
        rank: number of tokens with a strictly larger logit (0: y_t is the greedy choice, up to exact ties).
        margin: top-1 minus top-2 logit (0 for an exact tie).
        gap: logit of y_t minus the top-1 logit (0 where it is the top).
        mean: E_p[log p].
        variance: Var_p[log p].
        scheme: the sampling scheme of `log_sampled`.
        splits: how often a batch was halved because memory ran out.
        schemes: further sampling schemes, S of them.
        log_schemes: [N, S] log q(y_t) under each of `schemes`.
    """

    record_ids: tuple[str, ...]
    compressed_bytes: np.ndarray
    offsets: np.ndarray
    log_prob: np.ndarray
    log_sampled: np.ndarray
    rank: np.ndarray
    margin: np.ndarray
    gap: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    scheme: SamplingScheme
    splits: int = 0
    schemes: tuple[SamplingScheme, ...] = ()
    log_schemes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def match(self) -> np.ndarray:
        """[N] bool: y_t is the greedy choice."""
        greedy: np.ndarray = self.rank == 0
        return greedy

    @property
    def entropy(self) -> np.ndarray:
        """[N] entropy of p in nats."""
        return -self.mean

    def rows(self, record: int) -> slice:
        """The rows of one record."""
        return slice(int(self.offsets[record]), int(self.offsets[record + 1]))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, restored afterwards: dropout would make every figure a random number."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on CPU or an accelerator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch: enough to fill the machine; more only costs memory."""
    return 2048 if device.type == "cpu" else 32768


def decoder_scores(logits: Tensor, scheme: SamplingScheme) -> Tensor:
    """Scores [C, V] whose softmax a decoder samples from, of `logits` [C, V]; -inf where it cannot emit the token."""
    scores = logits / scheme.temperature  # [C, V]
    if scheme.top_k is not None and scheme.top_k < scores.shape[-1]:
        kth = scores.topk(scheme.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)  # ties with the k-th stay, as in common decoders
    if scheme.top_p is not None and scheme.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1).cumsum(-1)
        drop = mass - ordered.softmax(-1) >= scheme.top_p  # mass strictly before the token already reaches top_p
        drop[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), -math.inf)
    return scores


def _sampled_log_prob(logits: Tensor, target: Tensor, scheme: SamplingScheme) -> Tensor:
    """Log-probability of `target` [C] under a truncated or tempered softmax of `logits` [C, V]."""
    scores = decoder_scores(logits, scheme)
    return scores.gather(-1, target[:, None]).squeeze(-1) - scores.logsumexp(-1)


def _top_two(logits: Tensor) -> Tensor:
    """The two largest logits [C, 2] of each row [C, V], equal ones included.

    Selection over a whole vocabulary is far slower than a maximum, so it runs over the maxima of blocks, and inside
    the block that holds the largest.
    """
    blocks = logits.shape[-1] // BLOCK
    if blocks < 2:
        top = logits.topk(min(2, logits.shape[-1])).values
        return top if top.shape[-1] > 1 else nn.functional.pad(top, (0, 1), value=-math.inf)
    body = logits[:, : blocks * BLOCK].view(-1, blocks, BLOCK)  # [C, V / BLOCK, BLOCK]
    maxima, where = body.amax(-1).topk(2)  # [C, 2]
    inside = body[torch.arange(len(body), device=logits.device), where[:, 0]].topk(2).values  # [C, 2]
    return torch.cat([inside, maxima[:, 1:], logits[:, blocks * BLOCK :]], dim=-1).topk(2).values


def _reduce(logits: Tensor, target: Tensor, schemes: Sequence[SamplingScheme]) -> Tensor:
    """Reduce one chunk of logits [C, V] (overwritten) to rows [C, 6 + S]: six figures, then log q of each scheme."""
    elements = TILE_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS
    size = max(1, elements // logits.shape[-1])
    starts = range(0, len(target), size)
    return torch.cat([_reduce_tile(logits[i : i + size], target[i : i + size], schemes) for i in starts])


def _reduce_tile(logits: Tensor, target: Tensor, schemes: Sequence[SamplingScheme]) -> Tensor:
    """`_reduce` for so few rows that the reads of `logits` after the first find it in the processor's cache."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    top = _top_two(logits)  # [C, 2]
    gold = logits.gather(-1, target[:, None])  # [C, 1]
    # Counted in floating point, where a sum is vectorised as one over booleans is not; exact below 2^24.
    rank = torch.gt(logits, gold, out=torch.empty_like(logits)).sum(-1)
    sampled = {scheme: _sampled_log_prob(logits, target, scheme) for scheme in set(schemes) if not scheme.plain}
    weight = logits.softmax(-1)  # [C, V]
    mass = weight.sum(-1)  # 1, up to the rounding of softmax's own sum, which is larger than this sum's
    log_total = (mass / weight.amax(-1)).log()  # of the sum of exp(logit - top), in which the top counts 1
    shifted = logits.sub_(top[:, :1]).clamp_(min=FLOOR)  # [C, V], 0 at the top
    first = torch.linalg.vecdot(weight, shifted) / mass
    second = torch.linalg.vecdot(weight, shifted.sub_(first[:, None]).square_()) / mass
    gap = (gold - top[:, :1]).squeeze(-1)
    log_prob = gap - log_total
    margin = top[:, 0] - top[:, 1]
    columns = (log_prob, rank, margin, gap, first - log_total, second)
    return torch.stack([*columns, *(sampled.get(scheme, log_prob) for scheme in schemes)], dim=-1)


def _batch_rows(
    model: nn.Module, model_map: ModelMap, batch: Sequence[TokenRecord], schemes: Sequence[SamplingScheme]
) -> Tensor:
    """Rows [sum of completion lengths, 6 + S] of one batch, on the CPU, records in batch order."""
    device = next(model.parameters()).device
    ids, _ = pad(batch, device)  # [B, T]
    hidden = model_map.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    states = hidden[predicting(batch, ids)]  # [N, d]
    del hidden
    targets = torch.tensor([token for record in batch for token in record.completion], device=device)  # [N]
    size = max(1, CHUNK_ELEMENTS // model_map.vocab_size)
    rows = [
        _reduce(model_map.logits(states[start : start + size]), targets[start : start + size], schemes)
        for start in range(0, len(targets), size)
    ]
    return torch.cat(rows).cpu()


@dataclass(slots=True)
class _Pass:
    """One pass in flight: batches are run, and halved when memory runs out."""

    model: nn.Module
    model_map: ModelMap
    schemes: Sequence[SamplingScheme]
    splits: int = 0
    rows: dict[int, Tensor] = field(default_factory=dict)

    def run(self, records: Sequence[TokenRecord], batch: list[int]) -> None:
        try:
            rows = _batch_rows(self.model, self.model_map, [records[i] for i in batch], self.schemes)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                length = len(records[batch[0]].ids)
                raise ResourceError(
                    f"expected memory for one record of {length} tokens, found too little; use a shorter record, "
                    "a smaller dtype or another device"
                ) from None
            rows = None
        if rows is None:  # outside the handler, so that the failed batch's tensors are released first
            self.splits += 1
            half = (len(batch) + 1) // 2
            self.run(records, batch[:half])
            self.run(records, batch[half:])
            return
        self.rows.update(zip(batch, torch.split(rows, [records[i].n_tokens for i in batch]), strict=True))


def check_records(records: Sequence[TokenRecord], vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary, which would otherwise crash far from the cause.

    Raises:
        UnsupportedError: naming how many records are affected.
    """
    bad = sum(not (min(record.ids) >= 0 and max(record.ids) < vocab_size) for record in records)
    if bad:
        raise UnsupportedError(
            f"expected token ids below the vocabulary size {vocab_size}, found others in {bad} records; "
            "use the checkpoint's own tokenizer"
        )


def score(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    scheme: SamplingScheme | None = None,
    schemes: Sequence[SamplingScheme] = (),
    order: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TokenTable:
    """Run the one pass.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        records: what to score.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens per batch; by default `default_batch_tokens`.
        batch_size: records per batch instead, in the order given.
        scheme: sampling rule for `log_sampled`; plain sampling by default.
        schemes: further sampling rules for `log_schemes`, in the same pass; one that repeats costs nothing.
        order: a permutation of record indices to batch in, for the A/A noise floor; results stay in input order.
        progress: called with (records done, records in all).

    Returns:
        The per-token table in input order.

    Raises:
        UnsupportedError: for token ids outside the vocabulary.
        ResourceError: when a single record does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    scheme = scheme or SamplingScheme()
    check_records(records, model_map.vocab_size)
    run = _Pass(model, model_map, (scheme, *schemes))
    indices = list(range(len(records))) if order is None else list(order)
    arranged = [records[i] for i in indices]
    if batch_size is not None:
        batches = [list(range(s, min(s + batch_size, len(arranged)))) for s in range(0, len(arranged), batch_size)]
    else:
        budget = batch_tokens or default_batch_tokens(next(model.parameters()).device)
        batches = length_batches(arranged, budget)
    done = 0
    with inference(model):
        for batch in batches:
            run.run(arranged, batch)
            done += len(batch)
            if progress:
                progress(done, len(records))
    by_record = {indices[i]: rows for i, rows in run.rows.items()}
    rows = [by_record[i] for i in range(len(records))]
    table = (torch.cat(rows) if rows else torch.zeros(0, 7 + len(schemes))).numpy()
    log_prob, rank, margin, gap, mean, variance, log_sampled = (column.copy() for column in table.T[:7])
    return TokenTable(
        record_ids=tuple(record.record_id for record in records),
        compressed_bytes=np.array([record.compressed_bytes for record in records], dtype=np.int64),
        offsets=np.cumsum([0] + [record.n_tokens for record in records]),
        log_prob=log_prob,
        log_sampled=log_sampled,
        rank=rank.astype(np.int64),
        margin=margin,
        gap=gap,
        mean=mean,
        variance=variance,
        scheme=scheme,
        splits=run.splits,
        schemes=tuple(schemes),
        log_schemes=table[:, 7:].copy(),
    )


def logit_noise(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    sample: int = 8,
    factor: float = 3.0,
) -> float:
    """The numeric noise of a greedy verdict: below this logit margin the verdict is uncertain.

    Batched prefill, single prefill and cached decoding do the same mathematics in another order of sums. The same
    tokens are run all three ways, and the largest difference seen in a top-1, top-2 or target logit is multiplied by
    `factor`.

    Args:
        model: a causal language model.
        records: the records of the audit; `sample` of them, evenly spaced by length, are used.
        model_map: the model's map, built when absent.
        batch_tokens: the audit's own token budget.
        batch_size: the audit's own number of records per batch, if that was given.
        sample: how many records.
        factor: safety factor.

    Returns:
        The margin in logits; 0.0 for no records.
    """
    if not records:
        return 0.0
    model_map = model_map or ModelMap.of(model)
    by_length = sorted(range(len(records)), key=lambda i: (len(records[i].ids), i))
    chosen = [records[by_length[round(k)]] for k in np.linspace(0, len(by_length) - 1, min(sample, len(by_length)))]
    device = next(model.parameters()).device
    largest = 0.0
    with inference(model):
        views = _views(model, model_map, list(records), chosen, batch_tokens, batch_size)
        for record, batched in zip(chosen, views, strict=True):
            single = _extremes(model, model_map, record)
            cached = _cached_extremes(model, record, device)
            pairs = ((batched, single), (cached, single[: len(cached)]))
            largest = max(largest, *(float((a - b).abs().max()) for a, b in pairs))
    return factor * largest


def _views(
    model: nn.Module,
    model_map: ModelMap,
    records: list[TokenRecord],
    chosen: list[TokenRecord],
    batch_tokens: int | None,
    batch_size: int | None,
) -> list[Tensor]:
    """[n_tokens, 3] extreme logits of each chosen record as it stands in a full batch of the audit's size."""
    device = next(model.parameters()).device
    out = []
    for record in chosen:
        room = batch_size or max(2, (batch_tokens or default_batch_tokens(device)) // len(record.ids))
        peers = [other for other in records if other is not record and len(other.ids) <= len(record.ids)]
        batch = [record, *peers[: min(room, 16) - 1]]
        if len(batch) == 1:
            batch = [record, record]
        ids, _ = pad(batch, device)
        hidden = model_map.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        states = hidden[0, record.n_prompt - 1 : len(record.ids) - 1]
        out.append(_top(model_map.logits(states), record))
    return out


def _top(logits: Tensor, record: TokenRecord) -> Tensor:
    """[n_tokens, 3]: top-1, top-2 and target logit."""
    logits = logits.float()
    targets = torch.tensor(record.completion[: len(logits)], device=logits.device)
    gold = logits.gather(-1, targets[:, None])
    return torch.cat([logits.topk(2).values, gold], dim=-1).nan_to_num(neginf=FLOOR)


def _extremes(model: nn.Module, model_map: ModelMap, record: TokenRecord) -> Tensor:
    ids, _ = pad([record], next(model.parameters()).device)
    hidden = model_map.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return _top(model_map.logits(hidden[0, record.n_prompt - 1 : len(record.ids) - 1]), record)


def _cached_extremes(model: nn.Module, record: TokenRecord, device: torch.device) -> Tensor:
    """The same logits from the decoder's own path: prompt first, then one cached step a token."""
    ids = torch.tensor([record.ids], device=device)  # [1, T]
    out = model(input_ids=ids[:, : record.n_prompt], use_cache=True)
    steps = [out.logits[0, -1]]
    for position in range(record.n_prompt, min(len(record.ids) - 1, record.n_prompt + NOISE_STEPS - 1)):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[0, -1])
    return _top(torch.stack(steps), record)
