"""Ablation: does the completion really depend on the neurons and parts that attribution names?

Neurons. The k neurons are set to a neutral value at every position (their mean over other records, or zero) and the
completion's log-probability is measured again. The same is done with k neurons drawn at random from the same down
projections, as many from each as the first set has there and none of that set: what any k neurons of these layers would
have cost. All ablations of a record run as copies of it in one batch, the untouched record among them, so they differ
in nothing else.

Parts. The output of one attention or feed-forward part at a time is set to its mean over control records, and records
and control records are measured again. Every part of a model matters to every text; where a part carries what was
memorised, the records lose far more by it than the control records do, which may even gain.

Setting activations for real is the test of a score; a score alone is not evidence of a cause. Where neurons back each
other up the drop understates their part, and what is set may carry other completions too: control records show that.

Shape letters: V ablations of a record, P positions, f neurons of one down projection, n tokens routed to an expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.attribution import NeuronScore
from probes.classify import score_images
from probes.errors import ResourceError, UsageError
from probes.likelihood import Progress, default_batch_tokens, inference, out_of_memory, score
from probes.modelmap import ModelMap
from probes.neurons import NeuronListener, neuron_sites
from probes.parts import Part, on_outputs, part_means, parts_of
from probes.records import ImageRecord, Record, TokenRecord
from probes.taps import IMAGES, Site
from probes.targets import Target, targets_of


@dataclass(frozen=True, slots=True)
class Ablation:
    """What setting neurons to a neutral value does to a completion, in nats of its log-probability.

    Attributes:
        record_id: the record's.
        k: how many neurons were set.
        log_prob: of the completion before.
        top: by how much it drops when the named neurons are set; negative where it rises.
        random: the same for each draw of k random neurons of the same down projections.
        control: mean drop over the control records under the named neurons, or None without control records.
        control_random: the same, averaged over the draws too.
    """

    record_id: str
    k: int
    log_prob: float
    top: float
    random: tuple[float, ...]
    control: float | None
    control_random: float | None

    @property
    def random_mean(self) -> float:
        """Mean drop over the draws."""
        return float(np.mean(self.random))

    @property
    def random_spread(self) -> float | None:
        """Standard deviation over the draws; None for fewer than two."""
        return float(np.std(self.random, ddof=1)) if len(self.random) > 1 else None


def ablate(
    model: nn.Module,
    record: Record,
    neurons: Sequence[NeuronScore],
    *,
    fill: Mapping[str, Tensor] | None = None,
    draws: int = 8,
    seed: int = 0,
    control: Sequence[TokenRecord] | Sequence[ImageRecord] = (),
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> Ablation:
    """Set neurons to a neutral value and measure the completion's log-probability again.

    Args:
        model: a causal language model or an image classifier; left as found.
        record: whose completion.
        neurons: which neurons, of `probes.attribution.attribute` for instance: k of them, at least one.
        fill: key of the down projection -> [f] what to set them to, as `probes.neurons.neuron_means` gives; zero if
            absent.
        draws: sets of random neurons, at least one.
        seed: of the draws, together with the record's identifier.
        control: records whose completions are measured under the same ablations.
        batch_tokens: tokens, or patches, at once.
        model_map: the model's map, built when absent.

    Raises:
        UsageError: no neurons, one twice or one the model does not have, no draws, a fill that does not fit, or a down
            projection with too few other neurons to draw from.
        UnsupportedError: a model without down projections, or token ids or labels that it does not have.
        ResourceError: one copy of a record does not fit in memory.
    """
    if not neurons or draws < 1:
        raise UsageError(f"expected neurons to ablate and at least 1 draw, found {len(neurons)} and {draws}")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    sites = {site.key: site for site in neuron_sites(model_map)}
    masks = _masks(sites, neurons, draws, f"{seed}|{record.record_id}", next(model.parameters()).device)
    run = _Ablations(model, [sites[key] for key in masks], masks, _values(sites, masks, fill), draws + 2)
    budget = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    try:
        own = cast("Sequence[TokenRecord]", [record])  # or an image: of one kind in any case
        found = run.log_probs(targets_of(model_map, own)[0], budget)  # [V]
        others = [run.log_probs(target, budget) for target in targets_of(model_map, control)] if control else []
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "expected memory for one copy of a record, found too little; lower batch_tokens or use a shorter record"
        ) from None
    drops = found[0] - found[1:]  # [1 + draws]
    elsewhere = torch.stack([other[0] - other[1:] for other in others]).mean(0) if others else None
    return Ablation(
        record_id=record.record_id,
        k=len(neurons),
        log_prob=float(found[0]),
        top=float(drops[0]),
        random=tuple(drops[1:].tolist()),
        control=None if elsewhere is None else float(elsewhere[0]),
        control_random=None if elsewhere is None else float(elsewhere[1:].mean()),
    )


@dataclass(frozen=True, slots=True)
class PartAblation:
    """What setting one part's output to its mean over control records does, in nats per completion token.

    Attributes:
        block: index of the block.
        module: its attention or feed-forward part.
        drops: of each record, by how much its mean log-probability drops, in input order.
        control_drops: the same of each control record.
    """

    block: int
    module: Part
    drops: tuple[float, ...]
    control_drops: tuple[float, ...]

    @property
    def drop(self) -> float:
        """Mean over the records."""
        return float(np.mean(self.drops))

    @property
    def control_drop(self) -> float:
        """Mean over the control records."""
        return float(np.mean(self.control_drops))

    @property
    def contrast(self) -> float:
        """By how much more the records drop than the control records."""
        return self.drop - self.control_drop


def ablate_parts(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    control: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> tuple[PartAblation, ...]:
    """Set the output of every part, one at a time, to its mean over control records.

    Args:
        model: a causal language model or an image classifier; left as found.
        records: whose completions.
        control: records that the model has not seen, alike in kind and length.
        batch_tokens: padded tokens a batch (or images).
        model_map: the model's map, built when absent.
        progress: called with (parts done, parts in all).

    Returns:
        One result per part, in depth order.

    Raises:
        UsageError: no records or no control records.
        UnsupportedError: blocks whose parts cannot be told apart, or token ids or labels that the model does not have.
        ResourceError: a batch does not fit in memory.
    """
    if not records or not control:
        raise UsageError(f"expected records and control records, found {len(records)} and {len(control)}; add records")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    parts = parts_of(model_map)
    means = part_means(model, control, batch_tokens=batch_tokens, model_map=model_map)
    groups = (records, control)
    before = [_mean_log_probs(model_map, group, batch_tokens) for group in groups]
    found = []
    for (block, part), paths in parts.items():
        with on_outputs(model, paths, lambda path, output: means[path].to(output.dtype).expand_as(output)):
            after = [_mean_log_probs(model_map, group, batch_tokens) for group in groups]
        drops, control_drops = (tuple((a - b).tolist()) for a, b in zip(before, after, strict=True))
        found.append(PartAblation(block, part, drops, control_drops))
        if progress:
            progress(len(found), len(parts))
    return tuple(found)


def _mean_log_probs(
    model_map: ModelMap, records: Sequence[TokenRecord] | Sequence[ImageRecord], batch_tokens: int | None
) -> NDArray[np.float64]:
    """Log-probability per completion token of each record."""
    if isinstance(records[0], TokenRecord):
        texts = cast("Sequence[TokenRecord]", records)
        table = score(model_map.model, texts, model_map=model_map, batch_tokens=batch_tokens)
        return np.array([table.log_prob[table.rows(i)].astype(np.float64).mean() for i in range(len(texts))])
    images = cast("Sequence[ImageRecord]", records)
    losses = score_images(model_map.model, images, batch_size=batch_tokens or IMAGES)["loss"]
    return -losses.to_numpy(dtype=np.float64)


def _masks(
    sites: Mapping[str, Site], neurons: Sequence[NeuronScore], draws: int, key: str, device: torch.device
) -> dict[str, Tensor]:
    """Down projection -> [2 + draws, f] bool: which neurons are set in no ablation, the named and the drawn ones."""
    named: dict[str, set[int]] = {}
    for one in neurons:
        width = sites[one.module].projection.in_features if one.module in sites else 0
        if not 0 <= one.neuron < width:
            raise UsageError(f"expected neurons of the model, found {one.neuron} of {width} in {one.module}")
        if one.neuron in named.setdefault(one.module, set()):
            raise UsageError(f"expected each neuron once, found {one.neuron} of {one.module} twice")
        named[one.module].add(one.neuron)
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    generator = np.random.default_rng(number)
    masks = {}
    for name in sorted(named):
        width, chosen = sites[name].projection.in_features, sorted(named[name])
        others = np.setdiff1d(np.arange(width), chosen)
        if len(others) < len(chosen):
            raise UsageError(
                f"expected as many other neurons to draw from, found {len(chosen)} of the {width} in {name} named; "
                "name fewer"
            )
        mask = torch.zeros(2 + draws, width, dtype=torch.bool)
        mask[1, chosen] = True
        for draw in range(draws):
            mask[2 + draw, generator.choice(others, len(chosen), replace=False)] = True
        masks[name] = mask.to(device)
    return masks


def _values(
    sites: Mapping[str, Site], masks: Mapping[str, Tensor], fill: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    values = {}
    for name, mask in masks.items():
        width = sites[name].projection.in_features
        value = mask.new_zeros(width, dtype=torch.float32) if fill is None else fill.get(name)
        if value is None or value.shape != (width,):
            found = "none" if value is None else f"{tuple(value.shape)}"
            raise UsageError(f"expected {width} values to set the neurons of {name} to, found {found}")
        values[name] = value.to(mask.device)
    return values


class _Ablations:
    """Runs copies of a record, each with its own set of neurons in another's place."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        masks: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        count: int,
    ) -> None:
        self._model, self._masks, self._values, self._count = model, masks, values, count
        self._listener = NeuronListener(model, sites, self._replace)
        self._part = slice(0, count)
        self._length = 1

    def log_probs(self, target: Target, budget: int) -> Tensor:
        """[V] log-probability of the completion: untouched, with the named neurons set, and with each draw."""
        size = max(1, budget // target.size)
        found = []
        self._length = target.shape[0] if target.shape else 1
        with inference(self._model), self._listener.on():
            inputs = target.inputs()
            for start in range(0, self._count, size):
                self._part = slice(start, min(start + size, self._count))
                copies = self._part.stop - start
                self._listener.expect((copies, *target.shape), None)
                found.append(target.values(inputs.expand(copies, *inputs.shape[1:])).double().cpu())
                self._listener.complete()
        return torch.cat(found)

    def _replace(self, site: Site, x: Tensor, tokens: Tensor | None) -> Tensor:
        mask, value = self._masks[site.key][self._part], self._values[site.key].to(x.dtype)  # [v, f], [f]
        if tokens is not None:
            return torch.where(mask[tokens // self._length], value, x)  # [n, f]
        copies = x.reshape(len(mask), -1, x.shape[-1])  # [v, positions, f]
        return torch.where(mask[:, None], value, copies).view_as(x)
