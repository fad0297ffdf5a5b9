"""How much each weight matters to a set of records: diagonal Fisher information and its relatives.

With l_i the loss of example i (mean cross entropy over its completion tokens; for an image, its cross entropy), l_t
the loss of one token, n examples and T completion tokens, four estimators of one number per weight theta:

    example      1/n sum_i (d l_i / d theta)^2          the empirical Fisher diagonal, exact
    token        1/T sum_t (d l_t / d theta)^2          the same with a token as the sample; unbiased, see below
    batch        1/m sum_b (d mean_{i in b} l_i)^2      over m batches as given: what SSD (arXiv 2308.07707) computes
    label_free   1/m sum_b |d mean_{i in b} ||f_i||^2|  LFSSD (2402.19308), f the logits

`batch` is no Fisher diagonal: with per-example gradients of mean mu and variance s^2 its expectation is
mu^2 + s^2 / B, so it depends on the batch size B, on the order, and on a short last batch counting as a full one.
Its mean over a batch of a language model is over tokens, so long records weigh more. `token` never runs T backward
passes: for independent signs s_t = +-1, E[(d sum_t s_t l_t)^2] = sum_t (d l_t)^2, and each batch draws its own signs
(`draws` passes are averaged). For image classifiers `token` equals `example` in expectation.

With labels "sampled" the labels are drawn from the model's own distribution (inputs stay the record's): the Fisher
information proper, where "gold" gives its empirical stand-in. Random numbers depend on the seed and the record's
identifier alone, so neither order nor batching changes them.

No full set of gradients ever exists: a hook squares and frees each one as it appears, and backward stops at the
lowest parameter asked for. `example` has two routes. If every parameter belongs to a linear map that runs once a
forward pass, whole batches run (`probes.perexample`). Otherwise (norms, embeddings, stacked experts, tied or re-used
weights) examples run one by one. Both are exact.

Shape letters: B records in a batch, T padded tokens, N completion tokens in a batch, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import Progress, out_of_memory
from probes.modelmap import ModelMap
from probes.passes import Losses, gradients, losses_of, sum_type
from probes.perexample import InseparableError, Taps, separable
from probes.records import ImageRecord, TokenRecord

Estimator = Literal["example", "token", "batch", "label_free"]
Labels = Literal["gold", "sampled"]


@dataclass(frozen=True, slots=True)
class Importance:
    """One non-negative number per weight, and what it was computed from.

    Attributes:
        tensors: parameter name -> importance in the parameter's shape, float32 (float64 for a float64 model), CPU.
        estimator: see the module's docstring.
        labels: "gold", "sampled", or "none" for `label_free`.
        n_examples: records used.
        n_batches: batches of `batch_size` they make.
        n_tokens: completion tokens in all; images count one each.
        batch_size: records per batch; changes the value of `batch` and `label_free`, and the noise of `token`.
        draws: passes averaged.
        seed: of signs and sampled labels.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    estimator: Estimator
    labels: str
    n_examples: int
    n_batches: int
    n_tokens: int
    batch_size: int
    draws: int
    seed: int


def importance(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    estimator: Estimator = "example",
    labels: Labels = "gold",
    batch_size: int,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
    draws: int = 1,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Importance of weights to records.

    Args:
        model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s). Evaluation
            mode, no gradient of other parameters; weights, modes, `requires_grad` and `.grad` are as before afterwards.
        records: at least one.
        estimator: see the module's docstring.
        labels: the record's own, or drawn from the model. `label_free` reads none.
        batch_size: records per batch. `batch` and `label_free` keep the order given; the others group by length.
        parameters: names as in `named_parameters()`; all by default.
        seed: of everything random.
        draws: passes with new random numbers to average; more than 1 needs `token` or sampled labels.
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all, over all passes).

    Returns:
        Sums are kept in fp32 at least, whatever the model's own type.

    Raises:
        UsageError: no records, an unknown parameter, or arguments that contradict each other.
        UnsupportedError: token ids or labels that the model does not have.
        ResourceError: a batch does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to compute importances from, found none; add records")
    if batch_size < 1 or draws < 1:
        raise UsageError(f"expected batch_size and draws of at least 1, found {batch_size} and {draws}")
    if labels == "sampled" and estimator == "label_free":
        raise UsageError("expected labels: gold with estimator label_free, which reads no labels; found sampled")
    if draws > 1 and estimator != "token" and labels == "gold":
        raise UsageError(f"expected draws: 1 where nothing is drawn, found {draws} for {estimator} with gold labels")
    wanted = _wanted(model, parameters)
    if isinstance(records[0], TokenRecord) and (model_map is None or model_map.model is not model):
        model_map = ModelMap.of(model)
    source = losses_of(model, records, sampled=labels == "sampled", seed=seed, model_map=model_map)
    totals = {name: torch.zeros_like(p, dtype=sum_type(p), requires_grad=False) for name, p in wanted.items()}
    run = _Run(model, wanted, totals, source, draws, progress or (lambda done, total: None))
    try:
        if estimator == "example":
            run.examples(batch_size, separable(model, model_map, wanted))
        else:
            run.batches(estimator, batch_size)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            f"expected memory for gradients of {batch_size} records at once, found too little; lower batch_size"
        ) from None
    n_batches, n_tokens = -(-len(records) // batch_size), sum(source.lengths)
    divisor = {"example": len(records), "token": n_tokens}.get(estimator, n_batches) * draws
    return Importance(
        tensors={name: total.div_(divisor).cpu() for name, total in totals.items()},
        estimator=estimator,
        labels="none" if estimator == "label_free" else labels,
        n_examples=len(records),
        n_batches=n_batches,
        n_tokens=n_tokens,
        batch_size=batch_size,
        draws=draws,
        seed=seed,
    )


def _wanted(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    for name in known if names is None else names:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            raise UsageError(
                f"expected parameters of {type(model).__name__}, found {name}"
                + (f"; close names: {', '.join(close)}" if close else "; list them with named_parameters()")
            )
    wanted = known if names is None else {name: known[name] for name in names}
    for name, parameter in wanted.items():
        if not parameter.is_floating_point():
            raise UnsupportedError(f"expected floating-point weights, found {parameter.dtype} in {name}; dequantise it")
    return wanted


# --------------------------------------------------------------------------------------------------------- the passes


@dataclass(slots=True)
class _Run:
    """Passes over the records that add squared gradients to `totals`."""

    model: nn.Module
    wanted: Mapping[str, nn.Parameter]
    totals: dict[str, Tensor]
    source: Losses
    draws: int
    progress: Progress

    def batches(self, estimator: Estimator, batch_size: int) -> None:
        """One gradient a batch: `batch`, `label_free` and `token`."""
        norm = estimator == "label_free"
        with gradients(self.model, self.wanted, self._add_absolute if norm else self._add_square):
            for batch, draw in self._batches(batch_size, grouped=estimator == "token"):
                n = sum(self.source.lengths[i] for i in batch)
                weights = self.source.signs(batch, draw) if estimator == "token" else self._ones(n).div_(n)
                self.source.backward(batch, weights, draw, norm=norm, apart=False)

    def examples(self, batch_size: int, taps: Taps | None) -> None:
        """One gradient an example: in batches where `taps` can tell the examples apart, else one by one."""
        if taps is not None and batch_size > 1:
            loose = {name: p for name, p in self.wanted.items() if name not in taps.names}
            try:
                with gradients(self.model, loose, self._add_square), taps.on(self.totals):
                    for batch, draw in self._batches(batch_size, grouped=True):
                        taps.expect(self.source.shape(batch))
                        self.source.backward(batch, self._means(batch), draw, norm=False, apart=bool(loose))
                        taps.complete()
                return
            except InseparableError:
                for total in self.totals.values():
                    total.zero_()
        with gradients(self.model, self.wanted, self._add_square):
            for batch, draw in self._batches(1, grouped=False):
                self.source.backward(batch, self._means(batch), draw, norm=False, apart=False)

    def _batches(self, batch_size: int, *, grouped: bool) -> Iterator[tuple[list[int], int]]:
        order = list(range(len(self.source.lengths)))
        if grouped:  # by padded length, so that little is computed on padding
            order.sort(key=lambda i: (self.source.shape([i]), i))
        done, total = 0, len(order) * self.draws
        for draw in range(self.draws):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                yield batch, draw
                done += len(batch)
                self.progress(done, total)

    def _ones(self, n: int) -> Tensor:
        return torch.ones(n, dtype=sum_type(next(self.model.parameters())))

    def _means(self, batch: Sequence[int]) -> Tensor:
        return torch.cat([self._ones(n).div_(n) for n in (self.source.lengths[i] for i in batch)])

    def _add_square(self, name: str, gradient: Tensor) -> None:
        self.totals[name].add_(gradient.mul_(gradient))

    def _add_absolute(self, name: str, gradient: Tensor) -> None:
        self.totals[name].add_(gradient.abs_())
