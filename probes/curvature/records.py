"""Curvature figures of single records, and a score of memorisation made from them without any label.

With l the mean loss of one record (gold labels), C = U_G^T (dl/dW) U_A its gradient in the Kronecker eigenbasis of a
linear map (`probes.curvature.kronecker`), x_t what the map reads at position t, v_j the eigenvectors of A and mu_j
their eigenvalues, and e the record's inputs (token embeddings; pixels of an image):

    low_energy          sum_{not S} C_ij^2 / sum C_ij^2 over all maps together, S the pairs that an edit would keep;
                        1 - low_energy is the share in high curvature
    activation_ratio    with E_B = mean_t sum_{j in B} (v_j . x_t)^2 / sum_{j in B} mu_j, which is 1 for the data that A
                        comes from: E_bottom half / E_top tenth, both averaged over the distinct inputs of the maps
    input_curvature     tr d^2 l / de^2, in nats per squared unit of input
    relative_curvature  input_curvature / l

"From Memorization to Reasoning in the Spectrum of Loss Curvature" (arXiv 2510.24256) drops the low-curvature pairs to
drop what is memorised, and finds (layer 22 of OLMo-2-7B) activations of memorised text 23.1 % stronger along the bottom
half of the eigenvectors of A, those of clean text 26 % stronger along the top tenth. Garg et al. (2307.05831) rank the
images of a training set by curvature of the loss around them, and find the mislabelled ones on top; they estimate
tr H^2 by finite differences and average over training, here it is tr H of the model as it is, from exact products:
Hutchinson's v^T H v with random signs v, unbiased, one second backward pass a draw for a whole batch of records.

The score is the mean of asinh((figure - c) / s) over `low_energy`, `activation_ratio` and `relative_curvature`, with c
the median and s = IQR / 1.349 of the figure over ordinary data that the caller gives: in units of the ordinary spread,
linear within it, logarithmic far outside. All three point upwards, for reasons that hold for memorised text in a
language model (l near 0) and for mislabelled images fitted by a classifier alike:

- What only one record needs is shared by no other, so its gradient and activations lie where the data as a whole have
  little curvature and little variance. The same is true of strange data that the model has never seen, so these two
  figures alone would flag whatever is unlike the ordinary data.
- A record that was fitted against its surroundings sits in a narrow basin. With l = exp(-h), h the margin in nats,
  tr H / l = |dh/de|^2 - tr d^2 h / de^2 asks how sensitive the margin is to the inputs, however small l has become. It
  is large for what was memorised, and small or negative for what was not fitted at all.

`input_curvature` itself is no part of the score because its direction is not fixed. Every derivative of l vanishes with
l. Among images that are all fitted the mislabelled are fitted last, keep more loss and more curvature, and come out on
top; records never seen have more of both, and against them the memorised can come out at the bottom (members have less
curvature than others: 2407.02747). The other figures are ratios in which l cancels.

The losses of fitted records fall far below the rounding of 1 - p. They are computed from the gap between the gold logit
and the others in float64, and every record is differentiated in units of its own loss.

Limits: the figures order records, they prove nothing about one. Where memorised and other records differ by nothing but
repetition only `relative_curvature` tells them apart, and `low_energy` can point the other way: what such a record has
left to learn is what all have. Among images that a network fits without effort (small convolutions) the score is little
better than chance, and plain loss, once its direction is known, beats it almost everywhere (`benchmarks/scores.py`).
Data that the factors were computed from look more ordinary than they are where positions are few: A is fitted to them.

Shape letters: R records, B of them in a batch, N losses in a batch, n rows of a map, m rows of one record at most,
p = out features, q = in features, d width of a hidden state.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from probes.classify import class_logits
from probes.curvature.factors import KroneckerFactors, part_of
from probes.curvature.kronecker import Basis, Kept
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, Progress, out_of_memory
from probes.modelmap import ModelMap
from probes.passes import gradients, losses_of, sum_type
from probes.records import ImageRecord, TokenRecord, pad, predicting
from probes.taps import Listener, Positions, Site, batches_of, check_positions, sites

FIGURES = ("low_energy", "activation_ratio", "input_curvature", "relative_curvature")
SCORED = ("low_energy", "activation_ratio", "relative_curvature")  # each higher if memorised
BOTTOM, TOP = 0.5, 0.1  # shares of the eigenvectors of A, from 2510.24256
TILE_ELEMENTS = 1 << 22  # gradient components at once: 16 MB in fp32; a larger map takes one record at a time
SECOND_TOKENS, SECOND_IMAGES = 512, 16  # a batch of the second derivative, which keeps both passes (16 times on a GPU)
TINY = 1e-300  # stands in for a loss of 0
IQR = 1.349  # of a standard normal distribution

Records = Sequence[TokenRecord] | Sequence[ImageRecord]
_NO_SECOND_DERIVATIVE = ("is not implemented", "differentiate twice", "once_differentiable")


def record_curvature(
    model: nn.Module,
    records: Records,
    bases: Mapping[str, Basis],
    kept: Mapping[str, Kept | Tensor],
    factors: KroneckerFactors,
    *,
    seed: int = 0,
    draws: int = 4,
    by_map: bool = False,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Curvature figures of records, from two passes over them.

    The first pass, one forward and one backward, gives `low_energy` and `activation_ratio` of all maps; the second, one
    forward and 1 + `draws` backward, the curvature. A record's figures depend on the other records of its batch by
    rounding only, and its random signs on `seed` and its identifier alone.

    Args:
        model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s); left as found.
        records: at least one.
        bases: key -> eigenbasis, of the maps to look at.
        kept: key -> the pairs that an edit would keep, of the same maps: a staircase, or [p, q] bool.
        factors: what the bases come from. Rows are those of its `positions`: unless they are "all", the gradient is
            the part of it that they contribute.
        seed: of the random signs.
        draws: random sign vectors a record; 0 leaves the curvature and its pass out.
        by_map: add a column `low_energy[key]` for every map.
        batch_tokens: padded tokens a batch, or images.
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all, over both passes).

    Returns:
        One row per record in input order, none of it NaN: record_id, low_energy, activation_ratio, input_curvature,
        relative_curvature and, from two draws on, input_curvature_error (standard error over the draws). Of a gradient
        that is exactly zero `low_energy` is 0. Of inputs whose eigenvalues are all below rounding `activation_ratio`
        knows nothing; where there are no others, or the record's activations are zero along the top tenth, it is 1.

    Raises:
        UsageError: no records, no bases, bases and pairs that do not fit the factors, or a number of draws below 0.
        UnsupportedError: token ids or labels the model does not have, a map that runs twice in a pass or whose rows
            cannot be told apart, operations without a second derivative, or figures that are not finite.
        ResourceError: a batch does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to compute figures of, found none; add records")
    if draws < 0:
        raise UsageError(f"expected draws from 0, found {draws}")
    masks = _masks(bases, kept, factors)
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    positions = factors.positions
    check_positions(model_map, records, positions)
    source = _Source(model, model_map, records)
    passes = 2 if draws else 1

    energies = _Energies(model, sites(model_map, list(bases)), bases, masks, factors, len(records))
    _listen(source, energies, positions, batch_tokens, part_of(progress, 0, passes))
    columns: dict[str, Any] = {"record_id": [record.record_id for record in records], **energies.figures()}
    if draws:
        losses, traces = _traces(source, seed, draws, batch_tokens, part_of(progress, 1, passes))  # [R], [draws, R]
        columns["input_curvature"] = (losses * traces).mean(0)
        columns["relative_curvature"] = traces.mean(0)
        if draws > 1:
            columns["input_curvature_error"] = (losses * traces).std(0, ddof=1) / math.sqrt(draws)
    if by_map:
        columns |= energies.by_map()
    table = pd.DataFrame(columns)
    if not np.isfinite(table.drop(columns="record_id").to_numpy(float)).all():
        raise UnsupportedError(
            "expected finite curvature figures, found infinite or undefined numbers; use a larger type of weights, or "
            "check the weights"
        )
    return table


def memorisation_scores(table: pd.DataFrame, ordinary: pd.DataFrame) -> NDArray[np.float64]:
    """One score per record: how far its figures lie above those of ordinary data, in units of their spread.

    Neither the labels of memorised records nor a reference model are used. 0 is the level of ordinary data, positive
    is more like memorised. See the module's docstring for the formula and the directions. A figure that is the same for
    half of the ordinary data has no spread to measure by and does not count.

    Args:
        table: of `record_curvature`, R rows.
        ordinary: the same of data that are not known to be memorised, like those the model is meant for; some tens of
            records at least.

    Returns:
        [R] scores, comparable between tables that were given the same `ordinary`.

    Raises:
        UsageError: fewer than two ordinary records, no figure in common, or figures that are not finite.
    """
    names = [name for name in SCORED if name in table and name in ordinary]
    if not names or len(ordinary) < 2:
        raise UsageError(
            f"expected curvature figures of at least 2 ordinary records, found {len(names)} figures of "
            f"{len(ordinary)}; compute both tables by record_curvature"
        )
    usual, own = (frame[names].to_numpy(float) for frame in (ordinary, table))  # [ordinary, figures], [R, figures]
    if not (np.isfinite(usual).all() and np.isfinite(own).all()):
        raise UsageError("expected finite curvature figures, found others; compute both tables by record_curvature")
    low, middle, high = np.quantile(usual, (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / IQR
    known = spread > 1e-12 * np.abs(middle)
    distance = np.arcsinh((own - middle) / np.where(known, spread, 1.0))
    scores: NDArray[np.float64] = np.where(known, distance, 0.0).mean(1)
    return scores


def _masks(
    bases: Mapping[str, Basis], kept: Mapping[str, Kept | Tensor], factors: KroneckerFactors
) -> dict[str, Tensor]:
    """[p, q] bool of every map, on the CPU."""
    if not bases:
        raise UsageError("expected the eigenbasis of at least one map, found none; name modules")
    masks = {}
    for key, basis in bases.items():
        shape = (len(basis.u_g), len(basis.u_a))
        if key not in factors.factors or factors.factors[key].shape != shape:
            raise UsageError(f"expected bases of these factors, found one for {key} of shape {shape}; compute it anew")
        if key not in kept:
            raise UsageError(f"expected the kept pairs of every map, found none for {key}; select them")
        chosen = kept[key]
        masks[key] = chosen.mask() if isinstance(chosen, Kept) else chosen.detach().cpu()
        if masks[key].shape != shape or masks[key].dtype != torch.bool:
            raise UsageError(f"expected kept pairs {shape} of bool for {key}, found {tuple(masks[key].shape)}")
    return masks


# ------------------------------------------------------------------------------------------------- losses and slopes


class _Source:
    """Records as losses of a model, each in units of itself: u = d (mean loss) / d states / mean loss.

    "States" are what the rest of the loss is computed from row by row: the hidden states [N, d] that predict a
    completion token, or the logits [B, classes] of images.
    """

    def __init__(self, model: nn.Module, model_map: ModelMap, records: Records) -> None:
        self.model, self.map, self.records = model, model_map, records
        self.text = isinstance(records[0], TokenRecord)
        self.losses = losses_of(model, records, model_map=model_map)  # shapes and positions; checks token ids
        self.device = next(model.parameters()).device

    def inputs(self, batch: Sequence[int]) -> Tensor:
        """Padded token ids [B, T], or pixels [B, ...]."""
        if self.text:
            return pad(self._texts(batch), self.device)[0]  # no mask, see `probes.likelihood`
        images = cast("Sequence[ImageRecord]", self.records)
        return torch.stack([images[i].pixels for i in batch]).to(self.device)

    def states(self, batch: Sequence[int], inputs: Tensor) -> Tensor:
        """[N, d]."""
        if not self.text:
            return class_logits(self.model, inputs)
        hidden = self.map.backbone()(input_ids=inputs, use_cache=False).last_hidden_state
        return cast(Tensor, hidden[predicting(self._texts(batch), inputs)])

    def row_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross entropies [N] in float64, to full relative precision however small.

        With z the gold logit and r the log-sum-exp of the others, -log p = log(1 + exp(r - z)).
        """
        logits = (self.map.logits(states) if self.text else states).double()  # [N, V]
        gold = logits.gather(-1, labels[:, None]).squeeze(-1)
        rest = logits.scatter(-1, labels[:, None], -math.inf).logsumexp(-1)
        return -functional.logsigmoid(gold - rest)

    def labels(self, batch: Sequence[int], states: Tensor) -> Tensor:
        """[N] tokens or classes."""
        if self.text:
            found = [token for record in self._texts(batch) for token in record.completion]
        else:
            found = [cast(ImageRecord, self.records[i]).label for i in batch]
            classes = states.shape[-1]
            if not all(0 <= label < classes for label in found):
                raise UnsupportedError(f"expected labels below {classes} classes, found others; check the records")
        return torch.tensor(found, device=states.device)

    def slopes(self, batch: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the loss.

        Returns:
            u [N, d]; the weights [N] float64 for which it is the gradient of sum_n weights[n] l_n; mean losses [B]
            float64.
        """
        labels, losses, slopes = self.labels(batch, states), [], torch.empty_like(states)
        for part in self.parts(states):
            rows = states[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = self.row_losses(rows, labels[part])
                # Each in units of itself, so that no row leaves the range of the model's type.
                (slopes[part],) = torch.autograd.grad((loss / loss.detach().clamp(min=TINY)).sum(), rows)
            losses.append(loss.detach())
        values = torch.cat(losses)  # [N]
        counts = torch.tensor([self.losses.lengths[i] for i in batch], device=values.device)
        of = torch.arange(len(batch), device=values.device).repeat_interleave(counts)  # [N] record of each loss
        sums = values.new_zeros(len(batch)).index_add_(0, of, values)
        weights = 1 / sums.clamp(min=TINY)[of]
        return slopes.mul_((values * weights).to(slopes)[:, None]), weights, sums / counts

    def parts(self, states: Tensor) -> list[slice]:
        """Rows whose logits are alive together."""
        size = max(1, CHUNK_ELEMENTS // (self.map.vocab_size if self.text else states.shape[-1]))
        return [slice(start, start + size) for start in range(0, len(states), size)]

    def _texts(self, batch: Sequence[int]) -> list[TokenRecord]:
        return [cast(TokenRecord, self.records[i]) for i in batch]


class _Slopes(torch.autograd.Function):
    """`_Source.slopes` as a function of the states that can be differentiated once more, a part at a time."""

    @staticmethod
    def forward(ctx: Any, source: _Source, batch: Sequence[int], losses: Tensor, states: Tensor) -> Tensor:
        u, weights, means = source.slopes(batch, states)
        losses.copy_(means)
        ctx.source, ctx.labels, ctx.states, ctx.weights = source, source.labels(batch, states), states.detach(), weights
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[None, None, None, Tensor]:
        found = torch.empty_like(along)
        for part in ctx.source.parts(ctx.states):
            rows = ctx.states[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = ctx.source.row_losses(rows, ctx.labels[part]) @ ctx.weights[part]
                (first,) = torch.autograd.grad(loss, rows, create_graph=True)
            (found[part],) = torch.autograd.grad(first, rows, along[part])
        return None, None, None, found


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of a pass in words."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise ResourceError(
                "expected memory for one batch of records, found too little; lower batch_tokens or name fewer modules"
            ) from None
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            line = str(error).partition("\n")[0][:120]
            raise UnsupportedError(
                f"expected operations that can be differentiated twice, found one that cannot ({line}); leave the "
                "curvature out (no draws), or load the model with attn_implementation eager or sdpa"
            ) from None
        raise


# --------------------------------------------------------------------------- first pass: gradients and activations


class _Energies:
    """What a listener hears of each record, projected on the eigenbases and squared."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Site],
        bases: Mapping[str, Basis],
        masks: Mapping[str, Tensor],
        factors: KroneckerFactors,
        n: int,
    ) -> None:
        self._dtype = sum_type(next(model.parameters()))
        self._bases, self._masks = bases, dict(masks)
        self._bands = {site.key: _bands(bases[site.key].mu, factors.factors[site.key].a.dtype) for site in chosen}
        self._low = {site.key: torch.zeros(n, dtype=torch.float64) for site in chosen}
        self._whole = {site.key: torch.zeros(n, dtype=torch.float64) for site in chosen}
        self._bands_of = torch.zeros(2, n, dtype=torch.float64)  # bottom and top, summed over inputs
        self._n_inputs = torch.zeros(n, dtype=torch.float64)
        self._vectors: dict[int, Tensor] = {}  # id of an eigenbasis as given -> the same where it is needed
        self._source: dict[str, str] = {}
        self._batch = torch.empty(0, dtype=torch.long)
        self._seen: dict[str, Tensor] = {}
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None  # x, u_a, components of x
        self.listener = Listener(model, chosen, forward=self._forward, backward=self._backward, keep=True)

    def begin(self, batch: Sequence[int]) -> None:
        self._batch = torch.tensor(batch)
        self._seen.clear()
        self._latest = None

    def _forward(self, site: Site, x: Tensor, records: Tensor, source: str) -> None:
        self._source[site.key] = source

    def _backward(self, site: Site, x: Tensor | None, g: Tensor, records: Tensor) -> None:
        assert x is not None
        if not len(records):  # an expert without tokens
            return
        basis = self._bases[site.key]
        if self._latest is None or self._latest[0] is not x or self._latest[1] is not basis.u_a:
            self._latest = x, basis.u_a, self._components(x, basis.u_a)
        inputs, outputs = self._latest[2], self._components(g, basis.u_g)  # [n, q], [n, p]
        counts = torch.bincount(records, minlength=len(self._batch)).cpu()  # [B]
        self._once(site.key, counts > 0)
        if self._source[site.key] == site.key and self._bands[site.key]:
            self._add_bands(site.key, inputs, records, counts)
        present = counts.nonzero().squeeze(1)
        rank = counts.cumsum(0)[records.cpu()] - torch.arange(1, len(records) + 1)  # places left in its record
        row = (counts > 0).cumsum(0)[records.cpu()] - 1
        index = (row * int(counts.max()) + rank).to(x.device)
        low, whole = self._energy(site.key, *(_padded(t, index, len(present), counts) for t in (outputs, inputs)))
        at = self._batch[present]
        self._low[site.key][at] += low
        self._whole[site.key][at] += whole

    def _energy(self, key: str, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Dropped and whole gradient energy, [b] each, of rows [b, m, p] and [b, m, q]."""
        mask = self._masks[key] = self._masks[key].to(inputs.device)
        size = max(1, TILE_ELEMENTS // mask.numel())
        found = []
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            c = torch.bmm(outputs[part].transpose(1, 2), inputs[part]).square_()  # [b, p, q]
            whole = c.sum((1, 2), dtype=torch.float64)
            found.append(torch.stack([c.masked_fill_(mask, 0.0).sum((1, 2), dtype=torch.float64), whole]))
        low, whole = torch.cat(found, 1).cpu()
        return low, whole

    def _add_bands(self, key: str, inputs: Tensor, records: Tensor, counts: Tensor) -> None:
        """Mean energy of a record's activations in both bands, in units of the data's."""
        seen = counts > 0
        for row, (band, mass) in enumerate(self._bands[key]):
            energy = inputs[:, band].square().sum(1, dtype=torch.float64)  # [n]
            sums = energy.new_zeros(len(counts)).index_add_(0, records, energy).cpu()  # [B]
            self._bands_of[row].index_add_(0, self._batch[seen], sums[seen] / counts[seen] / mass)
        self._n_inputs[self._batch[seen]] += 1

    def _once(self, key: str, present: Tensor) -> None:
        """Rows of one record have to come together: the square of a sum is not the sum of squares."""
        seen = self._seen.setdefault(key, torch.zeros_like(present))
        if bool((seen & present).any()):
            raise UnsupportedError(
                f"expected modules that run once in a forward pass, found {key} that runs again; leave it out by "
                "naming the modules wanted"
            )
        seen |= present

    def _components(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Rows [n, w] in an eigenbasis [w, w]."""
        if id(vectors) not in self._vectors:
            self._vectors[id(vectors)] = vectors.to(rows.device, self._dtype)
        return rows.to(self._dtype) @ self._vectors[id(vectors)]

    def figures(self) -> dict[str, NDArray[np.float64]]:
        """`low_energy` and `activation_ratio`, [R] each."""
        low, whole = (torch.stack(list(part.values())).sum(0) for part in (self._low, self._whole))
        bottom, top = self._bands_of
        ratio = torch.where((self._n_inputs > 0) & (top > 0), bottom / top.clamp(min=TINY), 1.0)
        return {"low_energy": _share(low, whole), "activation_ratio": ratio.numpy()}

    def by_map(self) -> dict[str, NDArray[np.float64]]:
        """`low_energy` of every map."""
        return {f"low_energy[{key}]": _share(low, self._whole[key]) for key, low in self._low.items()}


def _listen(
    source: _Source, energies: _Energies, positions: Positions, batch_tokens: int | None, progress: Progress | None
) -> None:
    """One forward and one backward pass over all records, with the listener on."""
    done, listener = 0, energies.listener
    with _explained(), gradients(source.model, {}, _unexpected), listener.on():
        for batch in batches_of(source.records, batch_tokens, source.device):
            which = source.losses.positions(batch, "all" if positions == "first" else positions)
            listener.expect(source.losses.shape(batch), which, first=positions == "first")
            energies.begin(batch)
            states = source.states(batch, source.inputs(batch))
            if states.requires_grad:  # not if none of the maps takes part in the loss
                states.backward(source.slopes(batch, states)[0])  # type: ignore[no-untyped-call]
            listener.complete()
            done += len(batch)
            if progress is not None:
                progress(done, len(source.records))


def _bands(mu: Tensor, dtype: torch.dtype) -> list[tuple[slice, float]]:
    """Bottom half and top tenth of the eigenvectors of A above rounding, with the data's energy in each; or nothing.

    Args:
        mu: [q] eigenvalues, descending.
        dtype: type that A was summed up in.
    """
    noise = math.sqrt(len(mu)) * torch.finfo(dtype).eps * float(mu[0])
    r = int((mu > noise).sum())
    if r < 2:
        return []
    chosen = [slice(r - math.floor(BOTTOM * r), r), slice(0, math.ceil(TOP * r))]
    return [(band, float(mu[band].sum())) for band in chosen]


def _padded(rows: Tensor, index: Tensor, b: int, counts: Tensor) -> Tensor:
    """Rows [n, w] as [b, m, w], zero where a record has fewer than m; their order within a record is of no account."""
    m = int(counts.max())
    if len(rows) == b * m:
        return rows.view(b, m, -1)
    return rows.new_zeros(b * m, rows.shape[1]).index_copy_(0, index, rows).view(b, m, -1)


def _share(part: Tensor, whole: Tensor) -> NDArray[np.float64]:
    share: NDArray[np.float64] = (part / whole.clamp(min=TINY)).clamp(0.0, 1.0).numpy()
    return share


# ------------------------------------------------------------------------------- second pass: curvature at the inputs


def _traces(
    source: _Source, seed: int, draws: int, batch_tokens: int | None, progress: Progress | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean losses [R], and [draws, R] unbiased estimates of tr d^2 (mean loss) / d inputs^2 over the mean loss."""
    records, device = source.records, source.device
    seen: Counter[str] = Counter()
    keys = []
    for record in records:  # records that share an identifier still draw independently
        keys.append(f"{seed}|{seen[record.record_id]}|{record.record_id}")
        seen[record.record_id] += 1
    if batch_tokens is None:
        batch_tokens = (SECOND_TOKENS if source.text else SECOND_IMAGES) * (1 if device.type == "cpu" else 16)
    losses, traces = torch.zeros(len(records), dtype=torch.float64), np.zeros((draws, len(records)))
    done = 0
    with _explained(), _twice_differentiable(source.model), _Leaf(source) as leaf:
        for batch in batches_of(records, batch_tokens, device):
            means = torch.zeros(len(batch), dtype=torch.float64, device=device)
            inputs = leaf.of(source.inputs(batch))
            states = source.states(batch, inputs)
            u = cast(Tensor, _Slopes.apply(source, batch, means, states))  # type: ignore[no-untyped-call]
            e = leaf.tensor  # [B, T, d] or [B, ...]
            (slope,) = torch.autograd.grad(states, e, u, create_graph=True)
            if not done:
                _check_graph(slope)
            losses[batch] = means.cpu()
            for draw in range(draws):
                v = torch.zeros(e.shape)
                for row, i in enumerate(batch):
                    own = (len(cast(TokenRecord, records[i]).ids),) if source.text else ()
                    some = v[row, : own[0]] if own else v[row]
                    some.copy_(_signs(keys[i], draw, some.shape))
                v = v.to(e)
                (curved,) = torch.autograd.grad(slope, e, v, retain_graph=draw + 1 < draws)
                traces[draw, batch] = (v * curved).flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
            done += len(batch)
            if progress is not None:
                progress(done, len(records))
    return losses.numpy(), traces


def _check_graph(slope: Tensor) -> None:
    """Refuse a gradient that is cut off from the inputs in places: what lies there would count as flat, silently."""
    waiting, seen = [slope.grad_fn], {slope.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            raise UnsupportedError(
                "expected operations that can be differentiated twice, found one that is marked as not; leave the "
                "curvature out (no draws), or load the model without custom kernels"
            )
        fresh = {later for later, _ in node.next_functions} - seen
        seen |= fresh
        waiting.extend(fresh)


class _Leaf:
    """The inputs that the loss is differentiated by: pixels, or the output of the token embedding."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._stack = ExitStack()
        self.tensor = torch.empty(0)

    def __enter__(self) -> _Leaf:
        if self._source.text:
            table = cast(nn.Module, cast(Any, self._source.map.backbone()).get_input_embeddings())
            self._stack.callback(table.register_forward_hook(self._lift).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, inputs: Tensor) -> Tensor:
        """What to feed the model with."""
        if not self._source.text:
            self.tensor = inputs.requires_grad_()
        return inputs

    def _lift(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.tensor = output.detach().requires_grad_()
        return self.tensor.clone()  # a model may scale it in place


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """The frozen model with plain attention and expert loops: fused kernels have no second derivative."""
    with ExitStack() as stack:
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            name = "_experts_implementation_internal"
            if hasattr(config, name):
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, "eager")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(gradients(model, {}, _unexpected))
        yield


def _signs(key: str, draw: int, shape: Sequence[int]) -> Tensor:
    """Independent +1 and -1 of this shape, which the key and the draw decide."""
    digest = hashlib.sha256(f"curvature|{draw}|{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return 2 * torch.randint(2, tuple(shape), generator=generator) - 1


def _unexpected(name: str, gradient: Tensor) -> None:
    raise AssertionError(f"no gradient of {name} should be accumulated here")
