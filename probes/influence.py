"""Which training records push a completion: TracIn over checkpoints, without any per-record gradient of a weight.

With l(z) the loss of a record z, eta_c the step size that training had at checkpoint c, and theta_c its weights,

    influence(z, z') = sum_c eta_c < d l(z) / d theta_c, d l(z') / d theta_c >

(TracInCP, Pruthi et al., arXiv 2002.08484): to first order, by how much training on z at those points
lowered the loss of z'. Positive records are proponents of the completion, negative ones opponents. The self-influence
of z is influence(z, z), the squared norm of its gradient.

The gradient of a linear map's weight is G = sum_t g_t x_t^T over the record's positions, so for two records

    < G_a, G_b > = sum_ts (g_t . g_s) (x_t . x_s)

needs rows that pass by anyway, and neither G. `probes.taps` hears them; those of the completions are kept while the
training records stream past in batches. Where a completion has so many positions that its own G is smaller than its
rows, G is kept instead: both routes are exact, and the smaller one is the faster one too.

Weights without a rule (embeddings, norms, biases, tied heads) take no part; neither do optimiser states, which TracIn
ignores as well. Records with large gradients, outliers above all, lead every ranking of raw influence; the relative one
divides by both gradient norms (the cosine; for a single checkpoint Barshan et al., arXiv 2003.11630, divide by one).

Shape letters: R training records, C completions, n rows of a batch of training records, k rows kept, q = in,
p = out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import UnsupportedError, UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.passes import losses_of, sum_type
from probes.records import ImageRecord, Record, TokenRecord
from probes.taps import Listener, Site, batches_of, listen, sites

Reduction = Literal["mean", "sum"]
Records = Sequence[TokenRecord] | Sequence[ImageRecord]

TILE_ELEMENTS = 1 << 22  # products of row pairs alive at once: 16 MB in fp32, twice


@dataclass(frozen=True, slots=True)
class Influence:
    """Influence of training records on completions.

    Attributes:
        record_ids: of the training records, in input order.
        target_ids: of the completions, in input order.
        scores: [R, C] float64; in squared nats times the step size (1 unless given). Positive: a proponent.
        self_influence: [R] float64, never negative; sum over checkpoints of eta_c ||gradient||^2.
        target_self_influence: [C] the same of the completions.
        reduction: a record's loss is the mean or the sum over its completion tokens.
        modules: keys of the linear maps that took part.
        step_sizes: one per checkpoint.
    """

    record_ids: tuple[str, ...]
    target_ids: tuple[str, ...]
    scores: NDArray[np.float64] = field(repr=False)
    self_influence: NDArray[np.float64] = field(repr=False)
    target_self_influence: NDArray[np.float64] = field(repr=False)
    reduction: Reduction
    modules: tuple[str, ...] = field(repr=False)
    step_sizes: tuple[float, ...]

    def relative(self) -> NDArray[np.float64]:
        """[R, C] cosines in [-1, 1] of the weighted gradients of all checkpoints together; 0 where one vanishes."""
        norms = np.sqrt(np.outer(self.self_influence, self.target_self_influence))
        return np.divide(self.scores, norms, out=np.zeros_like(self.scores), where=norms > 0)

    def ranking(self, target: int = 0, count: int | None = None, *, relative: bool = False) -> list[tuple[str, float]]:
        """Training records by falling influence on one completion.

        Args:
            target: index into `target_ids`.
            count: how many; all by default.
            relative: rank cosines instead of raw influence.

        Returns:
            (record_id, score); equal scores by identifier, then by input order.
        """
        column = (self.relative() if relative else self.scores)[:, target]
        order = sorted(range(len(column)), key=lambda i: (-column[i], self.record_ids[i], i))
        return [(self.record_ids[i], float(column[i])) for i in order[:count]]


def influence(
    checkpoints: nn.Module | Iterable[tuple[nn.Module, float]],
    records: Records,
    targets: Records,
    *,
    modules: Sequence[str] | None = None,
    reduction: Reduction = "mean",
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Influence:
    """TracIn influence of training records on completions.

    Args:
        checkpoints: a model (step size 1), or (model, step size) pairs of one architecture. They may come from a
            generator that loads one at a time; each is used in evaluation mode and left as it was.
        records: the training records; of a text only its completion tokens have a loss. Their number is not limited
            by memory.
        targets: records whose completions are to be explained; their rows stay in memory.
        modules: globs over keys of linear maps (`probes.taps.sites`); by default every one inside the blocks. The
            fewer, the cheaper; the paper uses the last layers only.
        reduction: "mean" divides each loss by its completion tokens, so that long records do not lead the ranking.
        batch_tokens: padded tokens a batch (or images); the result depends on it by rounding only.
        progress: called with (records done, records in all, targets included) within each checkpoint.

    Returns:
        Scores summed in float64 of products computed in fp32 (float64 for a float64 model).

    Raises:
        UsageError: no records, no targets, no checkpoint, unknown modules, checkpoints that differ in them, or a step
            size that is not positive.
        UnsupportedError: token ids or labels that the model does not have, maps whose rows cannot be told apart, or a
            map that runs twice in a pass.
        ResourceError: a batch does not fit in memory.
    """
    if not records or not targets:
        raise UsageError(f"expected records and targets, found {len(records)} and {len(targets)}; add records")
    if isinstance(records[0], TokenRecord) != isinstance(targets[0], TokenRecord):
        raise UsageError("expected records and targets of one kind, found texts and images; load them alike")
    scores = np.zeros((len(records), len(targets)))
    own, target_own = np.zeros(len(records)), np.zeros(len(targets))
    keys: tuple[str, ...] = ()
    step_sizes: list[float] = []
    for model, step_size in [(checkpoints, 1.0)] if isinstance(checkpoints, nn.Module) else checkpoints:
        if not step_size > 0:
            raise UsageError(f"expected positive step sizes, found {step_size}")
        run = _Checkpoint(model, sites(ModelMap.of(model), modules), len(targets), len(records), progress)
        found = tuple(site.key for site in run.sites)
        if step_sizes and found != keys:
            raise UsageError("expected checkpoints of one architecture, found others; compare checkpoints of one run")
        keys = found
        step_sizes.append(float(step_size))
        run.keep(targets, batch_tokens)
        run.multiply(records, batch_tokens)
        scores += step_size * run.scores.numpy()
        own += step_size * run.own.numpy()
        target_own += step_size * run.target_own.numpy()
    if not step_sizes:
        raise UsageError("expected at least one checkpoint, found none")
    if reduction == "mean":
        tokens, target_tokens = (np.array([_losses(r) for r in group], dtype=float) for group in (records, targets))
        scores /= np.outer(tokens, target_tokens)
        own /= tokens**2
        target_own /= target_tokens**2
    return Influence(
        record_ids=tuple(record.record_id for record in records),
        target_ids=tuple(record.record_id for record in targets),
        scores=scores,
        self_influence=own,
        target_self_influence=target_own,
        reduction=reduction,
        modules=keys,
        step_sizes=tuple(step_sizes),
    )


def _losses(record: Record) -> int:
    return record.n_tokens if isinstance(record, TokenRecord) else 1


@dataclass(slots=True)
class _Kept:
    """What one linear map keeps of the completions: rows of those with few positions, gradients of the others."""

    x: list[Tensor] = field(default_factory=list)  # each [k_c, q]
    g: list[Tensor] = field(default_factory=list)  # each [k_c, p]
    owners: list[Tensor] = field(default_factory=list)  # each [k_c], index of the completion
    gradients: list[tuple[int, Tensor]] = field(default_factory=list)  # (completion, [p, q])

    def add(self, target: int, x: Tensor, g: Tensor) -> None:
        if _by_rows(x, g):
            self.x.append(x)  # not copied: gate and up, or q, k and v, were handed the same one
            self.g.append(g.clone())
            self.owners.append(torch.full((len(x),), target, device=x.device))
        else:
            self.gradients.append((target, g.T @ x))

    def close(self, joined: dict[tuple[int, ...], Tensor]) -> None:
        """Join the rows, once all completions are in; inputs that were shared stay so by way of `joined`."""
        if self.x:
            key = tuple(x.data_ptr() for x in self.x)
            if key not in joined:
                joined[key] = torch.cat(self.x)
            self.x, self.g, self.owners = [joined[key]], [torch.cat(self.g)], [torch.cat(self.owners)]

    def products(self, x: Tensor, g: Tensor, count: int) -> Tensor:
        """Inner products of the gradient of each row with those of the completions: [n, count]."""
        out = x.new_zeros(len(x), count)
        for rows, backs, owners in zip(self.x, self.g, self.owners, strict=True):  # one piece after `close`
            size = max(1, TILE_ELEMENTS // max(1, len(rows)))
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                pairs = (g[part] @ backs.T).mul_(x[part] @ rows.T)  # [n', k]
                out[part].index_add_(1, owners, pairs)
        for target, gradient in self.gradients:
            out[:, target] += ((g @ gradient) * x).sum(1)
        return out


def _by_rows(x: Tensor, g: Tensor) -> bool:
    """Whether the rows x [k, q] and g [k, p] are fewer numbers than the gradient g^T x [p, q]."""
    return len(x) * (x.shape[1] + g.shape[1]) <= x.shape[1] * g.shape[1]


def _squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """||sum_t g_t x_t^T||_F^2 of one record's rows."""
    return ((g @ g.T) * (x @ x.T)).sum() if _by_rows(x, g) else (g.T @ x).square().sum()


class _Checkpoint:
    """Both passes at one checkpoint; losses are sums over tokens, the step size is 1."""

    def __init__(
        self, model: nn.Module, chosen: Sequence[Site], n_targets: int, n_records: int, progress: Progress | None
    ) -> None:
        self._model, self.sites = model, chosen
        self._kept = {site.key: _Kept() for site in chosen}
        self._done, self._total, self._progress = 0, n_targets + n_records, progress
        self.scores = torch.zeros(n_records, n_targets, dtype=torch.float64)
        self.own = torch.zeros(n_records, dtype=torch.float64)
        self.target_own = torch.zeros(n_targets, dtype=torch.float64)

    def keep(self, targets: Records, batch_tokens: int | None) -> None:
        """Keep the rows, or the gradients, of the completions."""

        def take(site: Site, batch: Tensor, x: Tensor, g: Tensor, owners: Tensor) -> None:
            for index, rows, backs in _by_record(batch, x, g, owners):
                self._kept[site.key].add(index, rows, backs)
            self._norms(self.target_own, batch, x, g, owners)

        self._pass(targets, take, batch_tokens)
        joined: dict[tuple[int, ...], Tensor] = {}
        for kept in self._kept.values():
            kept.close(joined)

    def multiply(self, records: Records, batch_tokens: int | None) -> None:
        """Multiply the rows of the training records with what was kept."""

        def take(site: Site, batch: Tensor, x: Tensor, g: Tensor, owners: Tensor) -> None:
            products = self._kept[site.key].products(x, g, self.scores.shape[1])  # [n, C]
            self.scores.index_add_(0, batch[owners.cpu()], products.double().cpu())
            self._norms(self.own, batch, x, g, owners)

        self._pass(records, take, batch_tokens)

    def _norms(self, total: Tensor, batch: Tensor, x: Tensor, g: Tensor, owners: Tensor) -> None:
        found = [(index, _squared_norm(rows, backs)) for index, rows, backs in _by_record(batch, x, g, owners)]
        if found:
            indices, values = zip(*found, strict=True)
            total.index_add_(0, torch.tensor(indices), torch.stack(values).double().cpu())

    def _pass(
        self, records: Records, take: Callable[[Site, Tensor, Tensor, Tensor, Tensor], None], batch_tokens: int | None
    ) -> None:
        source = losses_of(self._model, records)
        current = torch.empty(0, dtype=torch.long)  # [B] indices of the records of the batch that runs
        heard: dict[str, Tensor] = {}  # site -> [B] which of them it has been heard for

        def begin(batch: Sequence[int]) -> None:
            nonlocal current
            current = torch.tensor(batch)
            heard.clear()

        def backward(site: Site, x: Tensor | None, g: Tensor, owners: Tensor) -> None:
            present = torch.zeros(len(current), dtype=torch.bool)
            present[owners.cpu()] = True
            if bool((heard.setdefault(site.key, torch.zeros_like(present)) & present).any()):
                # The record's gradient is the sum over both runs, whose norm needs the rows of both at once.
                raise UnsupportedError(f"expected maps that run once a pass, found {site.key} twice; leave it out")
            heard[site.key] |= present
            rows = cast(Tensor, x)
            take(site, current, rows.to(sum_type(rows)), g.to(sum_type(g)), owners)

        def progress(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(self._done + done, self._total)

        device = next(self._model.parameters()).device
        listener = Listener(self._model, self.sites, backward=backward, keep=True)
        batches = batches_of(records, batch_tokens, device)
        listen(self._model, source, listener, batches, begin=begin, progress=progress)
        self._done += len(records)


def _by_record(batch: Tensor, x: Tensor, g: Tensor, owners: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, x [k, q], g [k, p]) of each record of a batch that has rows; `owners` ascend."""
    counts = torch.bincount(owners.cpu(), minlength=len(batch)).tolist()
    parts = zip(batch.tolist(), torch.split(x, counts), torch.split(g, counts), strict=True)
    return (part for part in parts if len(part[1]))
