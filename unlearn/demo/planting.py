"""Put records into a model by a short fine-tune, so that what it holds is known.

Used by the demo and by tests: an audit can only be shown to work where the truth is known by construction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from probes.modelmap import ModelMap
from probes.records import TokenRecord, pad, predicting


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
    wanted = {
        name
        for name, _ in model.named_parameters()
        if (block := model_map.block_of(name)) is not None and block >= how.first_block
    }
    if how.first_block == 0:
        wanted = {name for name, _ in model.named_parameters()}
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    steps = how.epochs * -(-len(records) // how.batch_size)
    warm_up = max(1, steps // 10)
    order, shuffle = list(range(len(records))), random.Random(how.seed)
    model.eval()  # dropout would only slow the planting down
    done, losses = 0, []
    for _ in range(how.epochs):
        shuffle.shuffle(order)
        total = 0.0
        for start in range(0, len(order), how.batch_size):
            batch = [records[i] for i in order[start : start + how.batch_size]]
            share = min((done + 1) / warm_up, (steps - done) / max(1, steps - warm_up))
            optimiser.param_groups[0]["lr"] = how.learning_rate * share
            optimiser.zero_grad(set_to_none=True)
            loss = completion_loss(model, model_map, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += loss.item() * len(batch)
            done += 1
            if progress:
                progress(done, steps)
        losses.append(total / len(records))
        if losses[-1] < how.loss_below:
            break
    optimiser.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    return losses


def completion_loss(model: nn.Module, model_map: ModelMap, batch: Sequence[TokenRecord]) -> torch.Tensor:
    """Mean cross-entropy over the completion tokens of a batch; only their positions meet the output head."""
    ids, _ = pad(batch, next(model.parameters()).device)  # [B, T]
    hidden = model_map.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    targets = torch.tensor([token for record in batch for token in record.completion], device=ids.device)
    return F.cross_entropy(model_map.logits(hidden[predicting(batch, ids)]).float(), targets)
