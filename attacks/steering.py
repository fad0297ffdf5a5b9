"""Steering by anonymised activations: push the hidden states towards what the names in a prompt add to them.

For block l and records with prompts q and the same prompts q' with names, numbers and dates exchanged for random ones

    direction_l = mean over records of h_l(q) - h_l(q')      (states at the last prompt token)

and while the completion is predicted, h_l(t) + c direction_l at every position t from the last prompt token on, which
is what decoding with steering does (Seyitoglu et al., "Extracting Unlearned Information from LLMs with Activation
Steering", arXiv 2411.02631). The paper recovers general knowledge that way, and not details of private persons: a weak
attack, whose failure says little.

The direction comes from one half of the records, and on the same half the block and the coefficient are chosen, 0
(no steering) among them; the other half and never-seen records are scored. A random direction of the same length shows
what any push does.

Shape letters: B records in a batch, T padded tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import UsageError
from probes.inside.states import (
    check_layers,
    completions,
    language_map,
    prompt_states,
    record_means,
    run,
    spaced_layers,
    token_scores,
)
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.records import TokenRecord

COEFFICIENTS = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """A direction to steer by, and how it was chosen.

    Attributes:
        layer: index of the block.
        coefficient: 0 where steering helped no choice of block and coefficient.
        direction: [d] float64, not scaled.
        tried: (block, coefficient, mean log-probability per token of the records it was chosen on), in nats.
    """

    layer: int
    coefficient: float
    direction: NDArray[np.float64] = field(repr=False)
    tried: tuple[tuple[int, float, float], ...] = field(repr=False)

    def random(self, seed: int) -> Steering:
        """The same push in a random direction of the same length."""
        drawn = np.random.default_rng([seed, 5]).standard_normal(len(self.direction))
        length = float(np.linalg.norm(self.direction) / np.linalg.norm(drawn))
        return Steering(self.layer, self.coefficient, drawn * length, self.tried)


def find_steering(
    model: nn.Module,
    records: Sequence[TokenRecord],
    anonymised: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Find the direction, the block and the coefficient on one half of the records.

    Args:
        model: a causal language model; left as found.
        records: to learn from; none of them may be scored.
        anonymised: the same records with exchanged names and numbers, in the same order; pairs whose prompts are alike
            are left out.
        layers: indices of blocks to try; by default four evenly spaced ones.
        coefficients: to try, besides 0.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.
        progress: called with (passes done, passes in all).

    Returns:
        The best choice. It costs 3 forward passes over the records and one for each block and coefficient.

    Raises:
        UsageError: no pair of different prompts, or nothing to try.
        UnsupportedError, ResourceError: see `probes.inside.states.run`.
    """
    if len(records) != len(anonymised):
        raise UsageError(f"expected an anonymised copy of each record, found {len(anonymised)} of {len(records)}")
    if not coefficients or not all(np.isfinite(coefficients)):
        raise UsageError("expected at least one coefficient to try, all finite, found others")
    pairs = [
        (own, other)
        for own, other in zip(records, anonymised, strict=True)
        if own.ids[: own.n_prompt] != other.ids[: other.n_prompt]
    ]
    if not pairs:
        raise UsageError(
            "expected prompts with names, numbers or dates to exchange, found none; steering needs prompts that name "
            "what they ask about"
        )
    model_map = language_map(model, model_map)
    n_blocks = len(model_map.blocks)
    chosen = check_layers(model_map, spaced_layers(n_blocks, 4) if layers is None else layers)
    own, other = (
        prompt_states(
            model, [pair[side] for pair in pairs], layers=chosen, batch_tokens=batch_tokens, model_map=model_map
        )
        for side in (0, 1)
    )
    directions = {layer: (own[layer] - other[layer]).mean(0) for layer in chosen}  # [d]

    def value(layer: int, coefficient: float) -> float:
        frame = steered(
            model,
            records,
            Steering(layer, coefficient, directions[layer], ()),
            batch_tokens=batch_tokens,
            model_map=model_map,
        )
        return -float(frame["loss"].mean())

    tried = [(chosen[-1], 0.0, value(chosen[-1], 0.0))]
    total = 1 + len(chosen) * len(coefficients)
    for layer in chosen:
        for coefficient in coefficients:
            tried.append((layer, float(coefficient), value(layer, coefficient)))
            if progress:
                progress(len(tried), total)
    layer, coefficient, _ = max(tried, key=lambda one: one[2])  # the first of equals: rather no steering
    return Steering(layer, coefficient, directions[layer], tuple(tried))


def steered(
    model: nn.Module,
    records: Sequence[TokenRecord],
    steering: Steering,
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> pd.DataFrame:
    """Score records while the model is steered.

    Args:
        model: a causal language model; left as found.
        records: at least one.
        steering: of `find_steering`.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.

    Returns:
        One row per record in order: record_id, probability (exp of the mean log-probability), accuracy (share of tokens
        that come first), extracted (all of them), loss (nats per token).

    Raises:
        UsageError, UnsupportedError, ResourceError: see `probes.inside.states.run`.
    """
    model_map = language_map(model, model_map)
    push = torch.from_numpy(steering.coefficient * steering.direction)  # [d]
    loss, accuracy = np.zeros(len(records)), np.zeros(len(records))

    def add(layer: int, batch: list[int], where: Tensor, output: Tensor) -> Tensor:
        return output + where[..., None] * push.to(output)  # [B, T, d]

    def finish(batch: list[int], hidden: Tensor) -> None:
        log_prob, rank = token_scores(model_map, hidden, completions(records, batch))
        loss[batch] = -record_means(log_prob, records, batch)
        accuracy[batch] = record_means(rank == 0, records, batch)

    run(model_map, records, [steering.layer], add, finish=finish, batch_tokens=batch_tokens)
    return pd.DataFrame(
        {
            "record_id": [record.record_id for record in records],
            "probability": np.exp(-loss),
            "accuracy": accuracy,
            "extracted": accuracy == 1.0,
            "loss": loss,
        }
    )
