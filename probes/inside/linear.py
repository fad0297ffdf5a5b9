"""Linear probe: does a block's state still tell what the output hides?

The readout of block l (`probes.inside.lens`), z(t) = head(n(h_l(t)) + u(t)), is corrected by a linear map of the state,

    u(t) = step * (h_l(t) W + b)

which is learned on one half of the records and scored on the other. What W is fitted to is the direction in which the
readout would have to move to favour the right token, the negative gradient of the loss with respect to what the head
reads,

    g(t) = e[y_t] - sum_v p_l(v | t) e[v]        (e: output embeddings; the model's scaling and capping included)

by ridge regression in closed form, float64, on standardised states. So the probe says no less than the logit lens,
which it is for step 0, and a step of functional gradient descent more: a map to the output embedding of the token,
where the readout does not have it already. It is a linear probe of latent knowledge (2402.16835) in the place of a
tuned lens.

Everything is chosen on the first half by folds that keep near-duplicates together: the penalty by squared error on
what was held out, then the step by its likelihood (concave in the step for a linear head), then the layer. Nothing is
chosen on scored records.

What it means. A map of this size learns the style and the frequent words of the records too, so that the completions
of records that were never seen become likelier as well: the same probe on those is what to compare with, and the same
procedure on shuffled tokens shows what the size of the map alone gives. Membership is not probed (whether a state comes
from a record): what a record is about would give that away.

Shape letters: A fitted and R scored records, N positions that predict a completion token, L layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import UsageError
from probes.inside.states import (
    check_layers,
    completions,
    language_map,
    predicting_states,
    readout,
    record_means,
    run,
    token_scores,
)
from probes.likelihood import inference
from probes.loss import cross_entropy
from probes.modelmap import ModelMap
from probes.passes import gradients
from probes.records import TokenRecord

PENALTIES = tuple(10.0**k for k in range(-2, 4))  # times the mean squared singular value of the standardised states
POSITIONS = 512  # held-out positions that choose the step and the layer, evenly spaced over the fitted records
DOUBLINGS = 12  # of the step, from one that moves a gradient's own logit by about 1


@dataclass(frozen=True, slots=True, eq=False)
class LayerProbe:
    """The map of one layer.

    Attributes:
        layer: index of the block.
        weight: [d, d] W, times the step.
        bias: [d] b, times the step.
        penalty: of the ridge, over the mean squared singular value.
        step: the step; 0 where what was held out gained nothing, and the probe is the logit lens.
        held_out: mean log-probability of held-out tokens of the fitted records, in nats: what the layer is chosen by.
    """

    layer: int
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    penalty: float
    step: float
    held_out: float


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A map for each layer, and which layer stands for the probe."""

    layers: tuple[LayerProbe, ...]

    @property
    def best(self) -> int:
        """Place, among `layers`, of the one that held-out tokens of the fitted records are likeliest under."""
        return int(np.argmax([one.held_out for one in self.layers]))


@dataclass(frozen=True, slots=True, eq=False)
class ProbeScores:
    """What probes say of completions.

    Attributes:
        record_ids: of the records, in order.
        layers: indices of the blocks.
        probability: [R, L] exp(mean log p(y_t)).
        accuracy: [R, L] share of tokens that come first.
    """

    record_ids: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...]
    probability: NDArray[np.float64] = field(repr=False)
    accuracy: NDArray[np.float64] = field(repr=False)


def fit_probe(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    folds: int = 4,
    seed: int = 0,
    shuffled: bool = False,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> Probe:
    """Learn a map for each layer.

    Args:
        model: a causal language model; left as found.
        records: to learn from, in at least two clusters; a record without a group is a cluster of its own.
        layers: indices of blocks; all of them by default. Their states at all completion positions are held at once.
        folds: parts of the records that are held out in turn, fewer where there are fewer clusters.
        seed: of the folds and of the shuffle.
        shuffled: learn from the same tokens in another order: the control.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.

    Returns:
        The maps. It costs one forward pass over the records, the head some 8 times for each layer, and the singular
        values of (tokens x d) matrices, folds + 1 of them for each layer.

    Raises:
        UsageError: fewer than two clusters or folds, or a layer the model does not have.
        UnsupportedError, ResourceError: see `probes.inside.lens.lens`.
    """
    model_map = language_map(model, model_map)
    chosen = check_layers(model_map, layers)
    of_record = _folds(records, folds, seed)
    apply = readout(model_map)
    states = predicting_states(model, records, layers=chosen, batch_tokens=batch_tokens, model_map=model_map)
    device = next(model.parameters()).device
    targets = completions(records, range(len(records)))  # [N]
    if shuffled:
        targets = targets[torch.from_numpy(np.random.default_rng([seed, 3]).permutation(len(targets)))]
    of_token = torch.from_numpy(np.repeat(of_record, [record.n_tokens for record in records]))  # [N]
    found = []
    for layer in chosen:
        rows = torch.cat(states.pop(layer))  # [N, d]
        found.append(_fit(model_map, layer, apply(rows.to(device)).detach(), rows, targets.to(device), of_token))
    return Probe(tuple(found))


def score_probe(
    model: nn.Module,
    probe: Probe,
    records: Sequence[TokenRecord],
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> ProbeScores:
    """Read completions through a fitted probe, every layer in one forward pass.

    Args:
        model: the model it was fitted on; left as found.
        probe: of `fit_probe`.
        records: at least one, none of those it was fitted on.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.

    Raises:
        UsageError, UnsupportedError, ResourceError: see `probes.inside.lens.lens`.
    """
    model_map = language_map(model, model_map)
    apply = readout(model_map)
    maps = {one.layer: (place, one) for place, one in enumerate(probe.layers)}
    probability = np.zeros((len(records), len(maps)))
    accuracy = np.zeros_like(probability)

    def see(layer: int, batch: list[int], where: Tensor, output: Tensor) -> None:
        place, one = maps[layer]
        states = output[where]  # [N, d]
        hidden = apply(states)
        hidden = hidden + _correction(one, states).to(hidden)
        log_prob, rank = token_scores(model_map, hidden, completions(records, batch))
        probability[batch, place] = np.exp(record_means(log_prob, records, batch))
        accuracy[batch, place] = record_means(rank == 0, records, batch)

    run(model_map, records, [one.layer for one in probe.layers], see, batch_tokens=batch_tokens)
    return ProbeScores(
        tuple(record.record_id for record in records),
        tuple(one.layer for one in probe.layers),
        probability,
        accuracy,
    )


def _correction(one: LayerProbe, states: Tensor) -> Tensor:
    """[N, d] what the map adds to the readout of states [N, d]."""
    kind = torch.promote_types(states.dtype, torch.float32)
    return states.to(kind) @ one.weight.to(states.device, kind) + one.bias.to(states.device, kind)


def _folds(records: Sequence[TokenRecord], folds: int, seed: int) -> NDArray[np.int64]:
    """[A] fold of each record; clusters stay together, and folds hold about as many clusters each."""
    names = [record.group if record.group is not None else f"{i}" for i, record in enumerate(records)]
    clusters = list(dict.fromkeys(names))
    if len(clusters) < 2 or folds < 2:
        raise UsageError(
            f"expected at least 2 folds and records of at least 2 clusters to learn from, found {folds} folds and "
            f"{len(clusters)} clusters; add records that are no near-duplicates"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(clusters))
    fold = {clusters[int(cluster)]: place % min(folds, len(clusters)) for place, cluster in enumerate(order)}
    return np.array([fold[name] for name in names], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Ridge:
    """Ridge regression for every penalty at once, from the singular values of the standardised inputs."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    offset: Tensor  # [d] of the outputs
    basis: Tensor  # [d, r] right singular vectors
    squares: Tensor  # [r] squared singular values
    inner: Tensor  # [r, d] basis^T X^T (Y - offset)

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Ridge:
        """From inputs [N, d] and outputs [N, d], float64."""
        mean, offset = x.mean(0), y.mean(0)
        scale = (x - mean).square().mean(0).sqrt()
        scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-30), scale, torch.inf)  # a constant says nothing
        z = (x - mean) / scale
        side = z @ z.T if len(z) < z.shape[1] else z.T @ z
        squares, vectors = torch.linalg.eigh(side)
        keep = squares > squares.max().clamp(min=0) * 1e-10 + 1e-30
        squares, vectors = squares[keep], vectors[:, keep]
        basis = z.T @ vectors / squares.sqrt() if len(z) < z.shape[1] else vectors
        return cls(mean, scale, offset, basis, squares, (z @ basis).T @ (y - offset))

    def shrink(self, penalty: float) -> Tensor:
        """[r] 1 / (s^2 + lambda)."""
        return 1 / (self.squares + penalty * self.squares.mean())

    def predict(self, x: Tensor, penalty: float) -> Tensor:
        """[N, d] outputs of inputs [N, d]."""
        projected = ((x - self.mean) / self.scale) @ self.basis  # [N, r]
        return (projected * self.shrink(penalty)) @ self.inner + self.offset

    def map(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight [d, d] and bias [d] for inputs as they are."""
        weight = (self.basis * self.shrink(penalty)) @ self.inner / self.scale[:, None]
        return weight, self.offset - self.mean @ weight


def _fit(model_map: ModelMap, layer: int, hidden: Tensor, rows: Tensor, targets: Tensor, folds: Tensor) -> LayerProbe:
    """One layer: readout `hidden` and states `rows` [N, d], tokens `targets` and held-out part `folds` [N]."""
    y = _directions(model_map, hidden, targets).double().cpu()  # [N, d]
    x = rows.double()
    parts = [(_Ridge.of(x[folds != fold], y[folds != fold]), folds == fold) for fold in sorted(set(folds.tolist()))]
    errors = [
        sum(float((ridge.predict(x[held], penalty) - y[held]).square().sum()) for ridge, held in parts)
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[int(np.argmin(errors))]
    held_out = torch.empty_like(y)  # each position's correction by the map that never saw its record
    for ridge, held in parts:
        held_out[held] = ridge.predict(x[held], penalty)
    unit = 1 / max(float(y.square().sum(-1).mean()), 1e-30)
    step, value = _best_step(model_map, hidden, held_out, targets, unit)
    weight, bias = _Ridge.of(x, y).map(penalty)
    return LayerProbe(layer, (step * weight).float(), (step * bias).float(), penalty, step, value)


def _directions(model_map: ModelMap, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N, d] negative gradient of each position's loss with respect to what the head reads."""
    leaf = hidden.detach().clone().requires_grad_()
    weights = torch.ones(len(leaf), device=leaf.device)
    with gradients(model_map.model, {}, lambda name, gradient: None):
        (found,) = torch.autograd.grad(cross_entropy(model_map, leaf, targets, weights), leaf)
    return -found


def _best_step(
    model_map: ModelMap, hidden: Tensor, correction: Tensor, targets: Tensor, unit: float
) -> tuple[float, float]:
    """The step, of powers of two times `unit` and 0, under which tokens are likeliest, and their mean log p."""
    some = torch.linspace(0, len(hidden) - 1, min(POSITIONS, len(hidden))).long().to(hidden.device)
    start, change, gold = hidden[some], correction.to(hidden)[some], targets[some]

    def value(step: float) -> float:
        with inference(model_map.model):
            return float(token_scores(model_map, start + step * change, gold)[0].double().mean())

    nothing = value(0.0)
    step, best = unit, value(unit)
    if best > nothing:
        for _ in range(DOUBLINGS):  # the likelihood is concave in the step: go on until it falls
            further = value(2 * step)
            if further <= best:
                break
            step, best = 2 * step, further
        return step, best
    for _ in range(4):
        step /= 2
        if (best := value(step)) > nothing:
            return step, best
    return 0.0, nothing
