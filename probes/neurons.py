"""Feed-forward neurons: the inputs of the down projections, one number per neuron and position.

A block's feed-forward part is y = W_down a(x): its hidden units a(x) [f], after the activation and the gate, are its
neurons, as in "Transformer feed-forward layers are key-value memories" (Geva et al., arXiv 2012.14913). Every expert of
a mixture has its own, which exist only for the tokens routed to it.

`NeuronListener` sees them while the model runs and may put others in their place; `neuron_means` is what to put there
that says nothing about a record.

Shape letters: B records in a batch, T positions, f neurons of one down projection, n tokens routed to an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.errors import UnsupportedError, UsageError
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.passes import losses_of, sum_type
from probes.records import ImageRecord, TokenRecord
from probes.taps import Listener, Site, batches_of, listen, sites

# (site, neurons [..., f], tokens): for an expert the neurons are [n, f] and `tokens` [n] says which of the B T
# positions they belong to, else None. What is returned, if anything, takes their place.
Hear = Callable[[Site, Tensor, Tensor | None], Tensor | None]


def neuron_sites(model_map: ModelMap) -> list[Site]:
    """The down projections of the blocks, in depth order; of stacked experts one each.

    Raises:
        UnsupportedError: a model without any, such as a convolutional network.
    """
    try:
        return sites(model_map, roles=["down"])
    except UsageError:
        raise UnsupportedError(
            f"expected feed-forward parts with a down projection, found none in {type(model_map.model).__name__}; "
            "its neurons cannot be told apart"
        ) from None


class NeuronListener(Listener):
    """Sees, and may replace, the neurons whenever a down projection runs.

    Between `on()` and the end of its block every batch is announced with `expect`, run by the caller and closed with
    `complete`, as with any `Listener`; positions are not restricted here.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[Site], hear: Hear) -> None:
        super().__init__(model, chosen)
        self._hear_neurons = hear

    def _hear_module(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        self._seen.add(site.projection.parameter)
        x = args[0] if args else next(iter(kwargs.values()))
        other = self._hear_neurons(site, x, None)
        result: Tensor = output if other is None else module.forward(other)  # forward: without hooks, this one included
        return result

    def _hear_product(self, site: Site, x: Tensor, output: Tensor, tokens: Tensor | None) -> Tensor:
        self._seen.add(site.projection.parameter)
        other = self._hear_neurons(site, x, tokens)
        if other is None:
            return output
        weight = self._parameters[site.projection.parameter][site.expert]
        return functional.linear(other, weight if site.projection.orientation == "out_in" else weight.T)


def neuron_means(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Mean activation of every neuron over the positions of records, retain or control ones for instance.

    Args:
        model: a causal language model or an image classifier; left as found.
        records: at least one. Of a text all positions count but the last token's, as when the completion is predicted.
        batch_tokens: padded tokens a batch (or images).
        model_map: the model's map, built when absent.
        progress: called with (records done, records in all).

    Returns:
        Key of the down projection -> [f], fp32 (float64 for a float64 model), on the model's device. Of an expert the
        mean is over the tokens routed to it; zero where there is none.

    Raises:
        UsageError: no records.
        UnsupportedError: a model without down projections, or token ids or labels that it does not have.
        ResourceError: a batch does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to average neurons over, found none; add records")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    chosen = neuron_sites(model_map)
    first = next(model.parameters())
    sums = {
        site.key: torch.zeros(site.projection.in_features, dtype=sum_type(first), device=first.device)
        for site in chosen
    }
    counts = dict.fromkeys(sums, 0)

    def add(site: Site, x: Tensor, owners: Tensor, source: str) -> None:
        sums[site.key] += x.to(sum_type(x)).sum(0)
        counts[site.key] += len(x)

    source = losses_of(model, records, model_map=model_map)
    listen(
        model,
        source,
        Listener(model, chosen, forward=add),
        batches_of(records, batch_tokens, first.device),
        progress=progress,
    )
    return {key: total / max(1, counts[key]) for key, total in sums.items()}
