"""Where a memorised completion comes from: integrated gradients to positions, layers and neurons, from one path.

The target is F = sum_t log p(y_t | gold context), the completion's log-probability under teacher forcing, the same
figure as `probes.likelihood` sums (of an image, log p of its label). The path is the straight line from a baseline b
to the input x, E(a) = b + a (x - b), in the space of token embeddings (of pixels for an image). Along it

    positions   (x_i - b_i) . integral_0^1 dF/dE_i da           integrated gradients, Sundararajan et al., 1703.01365
    layers      integral_0^1 dF/dy . dy/da da                   conductance of a module's output y, Dhamdhere et al.,
    neurons     the same of one input of a down projection      1805.12233; summed over positions

in nats. Integrated gradients are complete: position scores add up to F(x) - F(b). So do conductances over any set of
activations that cuts every way from input to output, but a block has a residual stream besides its attention and
feed-forward parts: its two scores say how much of F(x) - F(b) flows through each, need not add up to it, and may exceed
it in size where later parts undo what earlier ones did.

captum integrates along the path (`IntegratedGradients`, Gauss-Legendre). Layers and neurons are read off while it does:
hooks see every module's output and its gradient at each step, so one path serves all of them, where captum's
`LayerConductance` runs a path of its own for each (3 per block here). With steps a_k, both ends included,

    conductance ~ sum_k 1/2 (g_k + g_k+1) . (y_k+1 - y_k)

which is of second order; `LayerConductance` takes g_k alone and leaves out both ends. Two more facts about captum 0.9:
its `riemann_trapezoid` weights add up to 1 - 1/n and not to 1, so it is not offered, and its weights are fp32 even for
a float64 model. Importing it imports matplotlib, so that happens inside the function.

A complete score can still point to the wrong place. So next to each position's score stands what it really does,
`occlusion`: F(x) less F with that position alone set to the baseline, one forward pass each; `probes.ablation` does the
same for neurons and parts.

Two gaps are reported, both in nats: positions against F(x) - F(b), and the conductance of the last block's output, a
complete cut, against the same. They are what the quadrature loses; more steps shrink them. fp32 inside the model
(RMSNorm) leaves a floor near 1e-6, bfloat16 a far higher one: attribute in fp32.

Shape letters: S steps at once, P positions, d width, f neurons of one down projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import Progress, default_batch_tokens, out_of_memory
from probes.modelmap import ModelMap
from probes.neurons import NeuronListener, neuron_sites
from probes.parts import Part, on_outputs, parts_of
from probes.passes import gradients, sum_type
from probes.records import ImageRecord, TokenRecord
from probes.taps import Site
from probes.targets import Baseline, Target, Vary, targets_of


@dataclass(frozen=True, slots=True)
class ModuleScore:
    """Conductance of the attention or the feed-forward part of a block, in nats."""

    block: int
    module: Part
    score: float


@dataclass(frozen=True, slots=True)
class Heat:
    """A cell of the layer x module heat map.

    Attributes:
        block: index of the block.
        module: its attention or feed-forward part.
        score: mean share of the part in the sum of absolute conductances, over records. All cells add up to 1.
        control: the same over control records, or None.
    """

    block: int
    module: Part
    score: float
    control: float | None

    @property
    def contrast(self) -> float | None:
        """How much more of the records than of the control records flows through this part."""
        return None if self.control is None else self.score - self.control


@dataclass(frozen=True, slots=True)
class NeuronScore:
    """Conductance of one neuron, in nats, summed over positions.

    Attributes:
        block: index of the block.
        module: key of the down projection that reads the neuron, as in `probes.taps`.
        expert: index of the expert, or None.
        neuron: index among the inputs of that projection.
        score: positive where the neuron makes the completion likelier.
    """

    block: int
    module: str
    expert: int | None
    neuron: int
    score: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where the log-probability of one record's completion comes from. Scores are in nats; no text, no token ids.

    Attributes:
        record_id: the record's.
        n_tokens: completion tokens; 1 for an image.
        n_prompt: how many of `positions` are the prompt's; all of them for an image.
        log_prob: F(x), the sum of log p over the completion, in nats.
        baseline_log_prob: F(b).
        positions: [P] scores of the input positions: prompt tokens, then completion tokens but the last, which predicts
            nothing; of an image its patches row by row. They add up to `log_prob - baseline_log_prob` but for the gap.
        grid: (rows, columns) of the patches, or None.
        occlusion: [P] by how much F drops when that position alone is set to the baseline; 0 where nothing varies.
        layers: attention and feed-forward part of every block, in depth order.
        neurons: the highest scores first; equal ones in depth order.
        completeness_gap: sum of `positions` less (F(x) - F(b)).
        layer_gap: conductance of the last block's output less (F(x) - F(b)).
        steps: of the quadrature.
    """

    record_id: str
    n_tokens: int
    n_prompt: int
    log_prob: float
    baseline_log_prob: float
    positions: NDArray[np.float64] = field(repr=False)
    occlusion: NDArray[np.float64] = field(repr=False)
    grid: tuple[int, int] | None
    layers: tuple[ModuleScore, ...] = field(repr=False)
    neurons: tuple[NeuronScore, ...] = field(repr=False)
    completeness_gap: float
    layer_gap: float
    steps: int

    @property
    def prompt(self) -> NDArray[np.float64]:
        """[n_prompt] scores of the prompt positions, of an image of all patches."""
        return self.positions[: self.n_prompt]

    @property
    def relative_gap(self) -> float:
        """The larger of both gaps over |F(x) - F(b)|; inf where that is 0. Above some per cent, take more steps."""
        change = abs(self.log_prob - self.baseline_log_prob)
        return max(abs(self.completeness_gap), abs(self.layer_gap)) / change if change else math.inf


def attribute(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    baseline: Baseline = "mean",
    inputs: Vary = "all",
    steps: int = 64,
    neurons: int = 50,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> list[Attribution]:
    """Attribute the completions of records, one record after another.

    Args:
        model: a causal language model or an image classifier whose blocks have attention and feed-forward parts.
            Evaluation mode; weights, modes, `requires_grad`, `.grad` and hooks are as before afterwards.
        records: texts, or images.
        baseline: where the path starts. "mean": at every position the mean of all token embeddings (of an image, its
            own mean colour); "zero": zeros, which a model with RMSNorm sees as a direction that jumps at the first
            step, so that many more steps are needed; a token id: that token's embedding. Position embeddings stay.
        inputs: "all" varies prompt and completion tokens together: what makes the completion likelier than it is
            without any context. "prompt" keeps the completion's own tokens: what the prompt adds when they are given.
        steps: points of the quadrature; a forward and a backward pass each, and two more for both ends.
        neurons: how many to return per record.
        batch_tokens: bounds how many steps run at once (positions times steps). Halved when memory
            runs out; results depend on it by rounding only.
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all).

    Returns:
        One result per record, in input order.

    Raises:
        UsageError: no records, fewer than one step or neuron, or a baseline that does not fit.
        UnsupportedError: token ids or labels that the model does not have; a model whose blocks have no parts to tell
            apart (a convolutional network), without down projections, or without a patch projection; a module that runs
            more than once.
        ResourceError: one step does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to attribute, found none; add records")
    if steps < 1 or neurons < 1 or (batch_tokens is not None and batch_tokens < 1):
        raise UsageError(
            f"expected steps, neurons and batch_tokens of at least 1, found {steps}, {neurons} and {batch_tokens}"
        )
    if inputs not in ("all", "prompt"):
        raise UsageError(f"expected inputs all or prompt, found {inputs}")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    budget = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    targets = targets_of(model_map, records)
    watched = _Watched(parts_of(model_map), model_map.blocks[-1].name, neuron_sites(model_map))
    found: list[Attribution] = []
    with gradients(model, {}, lambda name, gradient: None):
        start = targets[0].neutral(baseline)
        while len(found) < len(targets):
            target = targets[len(found)]
            try:
                found.append(_attribute(target, watched, start, inputs, steps, neurons, budget))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if budget <= target.size:
                    raise ResourceError(
                        f"expected memory for one step of a record of {target.size} tokens, found too little; use a "
                        "shorter record, a smaller dtype or another device"
                    ) from None
                short = True
            else:
                short = False
            if short:  # outside the handler, so that the failed steps' tensors are released first
                budget = max(target.size, budget // 2)
            elif progress:
                progress(len(found), len(records))
    return found


def heat(attributions: Sequence[Attribution], control: Sequence[Attribution] = ()) -> tuple[Heat, ...]:
    """Mean absolute share of every block's attention and feed-forward part: the layer x module heat map.

    Within a record the shares |score| / sum |score| add up to 1, so every record counts alike, whatever its length.
    Early parts carry much of any completion; what is particular to memorised ones shows against control records.

    Args:
        attributions: of the records.
        control: of records that the model has not seen, under the same model.

    Raises:
        UsageError: no attributions, or of different models.
    """
    places = {tuple((s.block, s.module) for s in a.layers) for a in (*attributions, *control)}
    if not attributions or len(places) != 1:
        raise UsageError(f"expected attributions of one model, found {len(places)} sets of layers")
    shares, control_shares = _shares(attributions), _shares(control) if control else None
    return tuple(
        Heat(score.block, score.module, float(shares[i]), None if control_shares is None else float(control_shares[i]))
        for i, score in enumerate(attributions[0].layers)
    )


def _shares(attributions: Sequence[Attribution]) -> NDArray[np.float64]:
    sizes = np.array([[abs(score.score) for score in a.layers] for a in attributions])  # [records, parts]
    totals = sizes.sum(1, keepdims=True)
    means: NDArray[np.float64] = np.divide(sizes, totals, out=np.zeros_like(sizes), where=totals > 0).mean(0)
    return means


# -------------------------------------------------------------------------------------------------------- what is heard


@dataclass(frozen=True, slots=True)
class _Watched:
    """What is heard along the path: parts of blocks with their modules, the last block, the down projections."""

    parts: dict[tuple[int, Part], tuple[str, ...]]
    last: str
    neurons: list[Site]


_Key = tuple[str, int | str, str]
CUT: _Key = ("cut", "", "the last block")  # its output: every way from input to output leads through it


class _Path:
    """Adds up conductances while the steps of a path run in order, a few at a time."""

    def __init__(self, target: Target, watched: _Watched) -> None:
        self._target, self._watched = target, watched
        self._model = target.map.model
        self._listener = NeuronListener(self._model, watched.neurons, self._neurons)
        self._steps, self._chunk = 0, 0
        self._runs: dict[_Key, int] = {}
        self._last: dict[_Key, tuple[int, Tensor | None, Tensor, Tensor]] = {}  # chunk, positions, values, gradients
        self.flows: dict[_Key, Tensor] = {}  # summed conductance: a number a module, [f] a down projection

    @contextmanager
    def on(self) -> Iterator[None]:
        keys: dict[str, _Key] = {
            path: (part, block, path) for (block, part), paths in self._watched.parts.items() for path in paths
        }
        keys[self._watched.last] = CUT
        outputs = on_outputs(self._model, list(keys), lambda path, output: self._hear(keys[path], output, None))
        with outputs, self._listener.on():
            yield

    def total(self, inputs: Tensor) -> Tensor:
        """F summed over the next steps, [S, ...] -> [1]; their conductances are added in the backward pass."""
        self._steps, self._chunk = len(inputs), self._chunk + 1
        self._runs.clear()
        self._listener.expect((len(inputs), *self._target.shape), None)
        total = self._target.total(inputs)
        self._listener.complete()
        if twice := [key for key, runs in self._runs.items() if runs > 1]:
            raise UnsupportedError(f"expected modules that run once a pass, found {twice[0][2]} running more than once")
        return total

    def end(self, inputs: Tensor) -> float:
        """One end of the path, [1, ...]; returns F there."""
        leaf = inputs.detach().requires_grad_()
        total = self.total(leaf)
        torch.autograd.grad(total, leaf)
        return float(total.detach())

    def flow(self, key: _Key) -> Tensor:
        """Conductance of what was heard under a key; a module that never ran was refused."""
        if key not in self.flows:
            raise UnsupportedError(f"expected {key[2]} to run, found that it never did")
        return self.flows[key]

    def _neurons(self, site: Site, x: Tensor, tokens: Tensor | None) -> None:
        self._hear(("neurons", site.key, site.key), x, tokens)

    def _hear(self, key: _Key, tensor: Tensor, tokens: Tensor | None) -> None:
        self._runs[key] = self._runs.get(key, 0) + 1
        if tensor.requires_grad:
            hook = partial(self._add, key, tensor.detach(), tensor._version, tokens)
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _add(self, key: _Key, values: Tensor, version: int, tokens: Tensor | None, gradient: Tensor) -> None:
        if values._version != version:
            raise UnsupportedError(f"expected outputs left alone, found one of {key[2]} overwritten after it was made")
        x, g = values.to(sum_type(values)), gradient.to(sum_type(gradient))
        each = key[0] == "neurons"  # the last dimension is kept apart
        if tokens is None:
            x, g = (t.reshape(self._steps, -1, t.shape[-1] if each else 1) for t in (x, g))  # [S, positions, f or 1]
            flow = self._dense(key, x, g)
        else:
            flow = self._routed(key, tokens, x, g)
        self.flows[key] = self.flows[key] + flow if key in self.flows else flow

    def _dense(self, key: _Key, x: Tensor, g: Tensor) -> Tensor:
        flow = _trapezoid(x[:-1], x[1:], g[:-1], g[1:])
        known = self._last.get(key)
        if known is not None:
            flow += _trapezoid(known[2], x[:1], known[3], g[:1])
        self._last[key] = (self._chunk, None, x[-1:].clone(), g[-1:].clone())
        return flow

    def _routed(self, key: _Key, tokens: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """Neurons of an expert exist where a token is routed to it: pair the steps at which it is, twice in a row.

        Where the routing changes from one step to the next F jumps, and no gradient sees it: that is in the gaps.
        """
        length = self._target.shape[0]
        known = self._last.get(key)
        if known is not None and known[0] == self._chunk - 1:  # else it got no token in between
            tokens = torch.cat([cast(Tensor, known[1]), tokens + length])
            x, g = torch.cat([known[2], x]), torch.cat([known[3], g])
        else:
            tokens = tokens + length
        where = torch.full(((self._steps + 2) * length,), -1, dtype=torch.long, device=tokens.device)
        where[tokens] = torch.arange(len(tokens), device=tokens.device)
        following = where[tokens + length]  # row of the same position one step on
        first = (following >= 0).nonzero().squeeze(1)
        second = following[first]
        late = tokens >= self._steps * length
        self._last[key] = (self._chunk, tokens[late] - self._steps * length, x[late], g[late])
        return _trapezoid(x[first], x[second], g[first], g[second])


def _trapezoid(x0: Tensor, x1: Tensor, g0: Tensor, g1: Tensor) -> Tensor:
    """Sum over all but the last dimension of (g0 + g1) (x1 - x0) / 2: [..., w] -> [w], float64."""
    return ((g0 + g1) * (x1 - x0)).flatten(0, -2).double().sum(0) / 2


def _attribute(
    target: Target, watched: _Watched, neutral: Tensor, vary: Vary, steps: int, neurons: int, budget: int
) -> Attribution:
    from captum.attr import IntegratedGradients

    inputs = target.inputs().detach()
    start = target.start(inputs, neutral, vary)
    path = _Path(target, watched)
    at_once = max(1, budget // target.size)
    with path.on():
        low = path.end(start)
        attributions = IntegratedGradients(path.total).attribute(
            inputs, baselines=start, n_steps=steps, method="gausslegendre", internal_batch_size=at_once
        )
        high = path.end(inputs)
    positions = target.by_position(attributions.detach())
    layers = tuple(
        ModuleScore(block, part, sum(float(path.flow((part, block, name))) for name in paths))
        for (block, part), paths in watched.parts.items()
    )
    return Attribution(
        record_id=target.record_id,
        n_tokens=target.n_tokens,
        n_prompt=target.n_prompt,
        log_prob=high,
        baseline_log_prob=low,
        positions=positions,
        occlusion=high - _occluded(target, inputs, start, at_once),
        grid=target.grid,
        layers=layers,
        neurons=_highest(path, watched.neurons, neurons),
        completeness_gap=float(positions.sum()) - (high - low),
        layer_gap=float(path.flow(CUT)) - (high - low),
        steps=steps,
    )


def _occluded(target: Target, inputs: Tensor, start: Tensor, at_once: int) -> NDArray[np.float64]:
    """F with one position at a time set to the baseline, [P]."""
    cells, found = target.cells(), []
    with torch.no_grad():
        for part in torch.split(torch.arange(target.n_positions, device=cells.device), at_once):
            here = cells == part.view(-1, *[1] * (cells.ndim - 1))  # [S, ...]
            found.append(target.values(torch.where(here, start, inputs)).double().cpu())
    return torch.cat(found).numpy()


def _highest(path: _Path, chosen: Sequence[Site], count: int) -> tuple[NeuronScore, ...]:
    """The neurons with the highest scores; those of experts that no token reached have none."""
    flows = [(site, path.flows.get(("neurons", site.key, site.key))) for site in chosen]
    found = [(site, flow.cpu().numpy()) for site, flow in flows if flow is not None]
    scores = np.concatenate([values for _, values in found])
    starts = np.cumsum([0, *(len(values) for _, values in found)])
    out = []
    for index in np.argsort(-scores, kind="stable")[:count]:
        which = int(np.searchsorted(starts, index, side="right")) - 1
        site = found[which][0]
        neuron = int(index - starts[which])
        out.append(NeuronScore(cast(int, site.block), site.key, site.expert, neuron, float(scores[index])))
    return tuple(out)
