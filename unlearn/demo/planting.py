"""Put records into a model by a short fine-tune, so that what it holds is known.

Used by the demo and by tests: an audit can only be shown to work where the truth is known by construction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.training import fit, full, mean_loss


@dataclass(frozen=True, slots=True)
class Planting:
    """How to plant.

    Attributes:
        epochs: passes over the records.
        learning_rate: AdamW's peak rate; linear warm-up over a tenth of the steps, then linear decay.
        batch_size: records per step.
        first_block: blocks below are left alone, which saves their share of the backward pass.
        loss_below: stop early once an epoch's mean loss is below this.
        seed: order of the records.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    first_block: int = 0
    loss_below: float = 0.0
    seed: int = 0


def plant(
    model: nn.Module,
    records: Sequence[TokenRecord],
    how: Planting,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Fine-tune `model` in place on the completions of `records`.

    Args:
        model: a causal language model; left in evaluation mode.
        records: what to plant.
        how: the recipe.
        progress: called with (steps done, steps in all).

    Returns:
        Mean loss per epoch, in nats per token.
    """
    model_map = ModelMap.of(model)
    names = [name for name, _ in model.named_parameters()]
    if how.first_block:
        blocks = ((name, model_map.block_of(name)) for name in names)
        names = [name for name, block in blocks if block is not None and block >= how.first_block]
    loss = mean_loss(model, records, model_map=model_map)
    order = list(_batches(len(records), how))
    steps, an_epoch, by_record, means = len(order), -(-len(records) // how.batch_size), 0.0, []

    def step(i: int) -> float:
        nonlocal by_record
        found = loss(order[i])
        by_record += found * len(order[i])
        return found

    def after(done: int) -> bool:
        nonlocal by_record
        if progress:
            progress(done, steps)
        if done % an_epoch:
            return False
        means.append(by_record / len(records))
        by_record = 0.0
        return means[-1] < how.loss_below

    with full(model, names, keep=True) as parameters:
        fit(
            parameters,
            step,
            steps=steps,
            learning_rate=how.learning_rate,
            warm_up=max(1, steps // 10),
            decay="linear",
            after=after,
        )
    model.eval()
    return means


def _batches(n: int, how: Planting) -> Iterator[list[int]]:
    """Rows of each step: the same order shuffled again for every epoch."""
    order, shuffle = list(range(n)), random.Random(how.seed)
    for _ in range(how.epochs):
        shuffle.shuffle(order)
        for start in range(0, n, how.batch_size):
            yield order[start : start + how.batch_size]
