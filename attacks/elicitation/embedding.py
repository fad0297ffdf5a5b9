"""Nearby inputs: each prompt's own embeddings are moved a little, toward the completion; the steps are calibrated.

With e_t the embedding of prompt token t and delta_t its displacement, the search lowers the mean loss of the completion
under ||delta_t|| <= radius * D for every free t, where D is the mean distance of an embedding to its nearest neighbour
in the table: at radius 1 a token may move about as far as the next word. A step is steepest descent for that region,

    delta_t <- project(delta_t - step * radius * D * g_t / ||g_t||),      g_t the gradient at t.

This is the trigger search of Finding Dori (arXiv 2507.16880) kept near the record's own prompt. Enough steps make a
model emit random text, so only the budget that `attacks.elicitation.budget` calibrates on never-seen records counts.

Shape letters: B records in a batch, T padded tokens, N completion tokens, d width, R records, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from attacks.elicitation.budget import Trace
from attacks.elicitation.inputs import (
    backward_tokens,
    check,
    embedded,
    final_states,
    halving,
    labels_of,
    neighbour_distance,
    record_scores,
    table_of,
    token_scores,
    token_weights,
    unit,
)
from probes.errors import UsageError
from probes.likelihood import Progress
from probes.loss import cross_entropy
from probes.modelmap import ModelMap
from probes.passes import gradients
from probes.records import TokenRecord, length_batches, pad, predicting

RADIUS = 0.5
STEP = 0.2


def perturb(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    radius: float = RADIUS,
    steps: int = 50,
    step: float = STEP,
    restarts: int = 1,
    keep: int = 0,
    seed: int = 0,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Move the embeddings of each record's prompt toward its completion, record by record.

    Args:
        model: a causal language model; used in evaluation mode, left as found.
        records: with at least one prompt token behind the first `keep`.
        radius: most a token moves, in mean nearest-neighbour distances of the embedding table.
        steps: S.
        step: length of a step as a share of the radius.
        restarts: searches a record: the first starts at the prompt, the others within one step of it, drawn by seed.
        keep: tokens at the start of every record that do not move.
        seed: of the starts; a record's start depends on the seed and its place in `records` alone.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens run at a time.
        progress: called with (rows done, rows) over restarts.

    Returns:
        The trace; S + 1 rows forward and S backward a record and restart, and the head once more for each forward row.

    Raises:
        UsageError: a radius, step or count that is not positive, no free prompt token, records that are too long.
        UnsupportedError: token ids outside the vocabulary, or a model that cannot be run on embeddings.
        ResourceError: when one record does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    if not (radius > 0 and step > 0) or min(steps, restarts) < 1 or keep < 0:
        raise UsageError("expected a radius, step, steps and restarts above 0, found others")
    check(model_map, records)
    fixed = sum(record.n_prompt <= keep for record in records)
    if fixed:
        raise UsageError(
            f"expected a prompt token behind the first {keep} in every record, found none in {fixed}; leave them out"
        )
    most, width = radius * neighbour_distance(model), table_of(model).shape[-1]
    tokens, done = batch_tokens or backward_tokens(model), 0
    scores = np.zeros((restarts, len(records), steps + 1, 3))

    def run(batch: list[int]) -> list[np.ndarray]:
        part, length = [records[i] for i in batch], step * most
        starts = [
            _start(record.n_prompt - keep, width, length if restart else 0.0, (seed, restart, i))
            for i, record in zip(batch, part, strict=True)
        ]
        return _search(model_map, part, starts, keep, most, length, steps)

    with gradients(model, {}, lambda name, gradient: None):
        for restart in range(restarts):
            for batch in length_batches(records, tokens):
                scores[restart, batch] = halving(run, batch, "record")
                done += len(batch)
                if progress:
                    progress(done, restarts * len(records))
    return Trace.of([record.record_id for record in records], scores, restarts * len(records) * (steps + 1))


def _start(tokens: int, width: int, length: float, seed: tuple[int, ...]) -> Tensor:
    """[tokens, d] float64: random directions of one length, or nothing."""
    if not length:
        return torch.zeros(tokens, width, dtype=torch.float64)
    drawn = np.random.default_rng([19, *seed]).normal(size=(tokens, width))
    return torch.as_tensor(length * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))


def _search(
    model_map: ModelMap,
    records: Sequence[TokenRecord],
    starts: Sequence[Tensor],
    keep: int,
    most: float,
    length: float,
    steps: int,
) -> list[np.ndarray]:
    """Scores [S + 1, 3] of each record of one batch: probability, accuracy, extracted after each step."""
    device = next(model_map.model.parameters()).device
    ids, _ = pad(records, device)  # [B, T]
    base = embedded(model_map, ids)  # [B, T, d]
    where, labels = predicting(records, ids), labels_of(records, device)
    weights = token_weights(records, device)
    free = torch.zeros_like(where)  # [B, T]
    moved = torch.zeros_like(base)  # [B, T, d]
    for row, (record, start) in enumerate(zip(records, starts, strict=True)):
        free[row, keep : record.n_prompt] = True
        moved[row, keep : record.n_prompt] = start.to(moved)
    found = []
    for s in range(steps + 1):
        inputs = (base + moved).requires_grad_(s < steps)
        with torch.set_grad_enabled(s < steps):
            states = final_states(model_map, inputs)[where]  # [N, d]
        found.append(record_scores(records, *token_scores(model_map, states, labels)))
        if s == steps:
            break
        loss = cross_entropy(model_map, states, labels, weights)
        slope = torch.autograd.grad(loss, inputs)[0] * free[..., None]  # [B, T, d]
        moved = _inside(moved - length * unit(slope, (-1,)), most)
    return list(np.stack(found, axis=1))


def _inside(vectors: Tensor, most: float) -> Tensor:
    """Each vector [.., d], no longer than `most`."""
    size = vectors.norm(dim=-1, keepdim=True)
    inside: Tensor = vectors * (most / size.clamp(min=most))
    return inside
