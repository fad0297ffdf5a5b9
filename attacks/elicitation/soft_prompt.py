"""A universal soft prompt: a few vectors in front of every prompt that are trained to bring completions out.

Vectors v_1..v_k stand between what opens a record (a beginning-of-sequence token, if it has one) and the rest of its
prompt, in the space of the token embeddings. Trained on half A of the records with the weights frozen,

    min over v of  mean over r in A of  1/T_r sum_t -log p(y_t | context, v, prompt, y_<t),

they are scored on half B, which they never saw, and on never-seen records. If a model's memory of the records is only
switched off, one switch brings half B back as well; if it is gone, the prompt can learn from half A nothing that helps
on half B but the form. A prompt trained for each record itself would show nothing: enough free numbers make a model
emit random strings (arXiv 2502.15836).

The rule of Finding Dori (arXiv 2507.16880), which draws noise and time step anew in every step so that the trigger does
not fit one trajectory, becomes a random left context: in every step the rows begin with tokens of other training
records, of a length drawn anew from 0 to `context`.

Limits: training may need more steps than given; a prompt that does not help shows that this search failed.

Shape letters: k vectors, B records in a batch, T padded tokens, N completion tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.elicitation.inputs import (
    backward_tokens,
    check,
    embedded,
    final_states,
    halving,
    labels_of,
    record_scores,
    rms_of,
    score_frame,
    table_of,
    token_scores,
    token_weights,
)
from probes.errors import UsageError
from probes.likelihood import Progress, default_batch_tokens, inference
from probes.loss import cross_entropy
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.passes import gradients
from probes.records import TokenRecord, length_batches, pad, predicting
from probes.training import batches, fit

NOISE = 0.1  # of the initial vectors, in root mean squares of the embedding table


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A trained prompt.

    Attributes:
        vectors: [k, d] on the CPU, in the units of the token embeddings.
        losses: of each step, in nats per token.
        rows: rows run forward and backward.
    """

    vectors: Tensor = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    rows: int


def train(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    length: int = 5,
    steps: int = 60,
    batch: int = 8,
    learning_rate: float = 0.1,
    context: int = 16,
    keep: int = 0,
    initial: Literal["mean", "tokens"] = "mean",
    seed: int = 0,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> SoftPrompt:
    """Train vectors on records; the model's weights take no part and get no gradients.

    Args:
        model: a causal language model; used in evaluation mode, left as found.
        records: to train on, at least two; never those that are scored.
        length: k.
        steps: of Adam.
        batch: records a step.
        learning_rate: of Adam, in root mean squares of the embedding table.
        context: most tokens of other records in front; 0 leaves the rule out.
        keep: tokens at the start of every record that stay in front of everything.
        initial: start from the mean embedding with a little noise, or from the embeddings of random tokens.
        seed: of the start, the batches and the contexts.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens run backward at a time.
        progress: called with (steps done, steps).

    Returns:
        The vectors. A step costs `batch` rows forward and backward.

    Raises:
        UsageError: counts below 1, fewer than two records, records too long for the model's positions.
        UnsupportedError: token ids outside the vocabulary, or a model that cannot be run on embeddings.
        ResourceError: when one record does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    if min(length, steps, batch) < 1 or not learning_rate > 0 or min(context, keep) < 0:
        raise UsageError(
            "expected length, steps, batch and learning rate above 0 and no negative context, found others"
        )
    if len(records) < 2:
        raise UsageError(f"expected at least two records to train a prompt on, found {len(records)}; give more")
    check(model_map, records, length + context)
    _check_kept(records, keep)
    device = next(model.parameters()).device
    generator = np.random.default_rng([seed, 17])
    scale = rms_of(model)
    vectors = nn.Parameter(_start(table_of(model), length, initial, scale, generator).to(device))
    order = list(batches(len(records), batch, steps, seed))
    tokens = batch_tokens or backward_tokens(model)
    count = 0

    def step(i: int) -> float:
        nonlocal count
        chosen = order[i]
        vectors.grad = None
        room = int(generator.integers(context + 1))
        rows = [_placed(records[j], length, keep, _context(records, j, room, keep, generator)) for j in chosen]
        count += len(rows)
        share = 1 / len(rows)

        def run(part: list[int]) -> list[float]:
            loss = share * _loss(model_map, [rows[j] for j in part], vectors, keep + room)
            gradient = torch.autograd.grad(loss, vectors)[0]  # whole or not at all: memory may run out on the way
            vectors.grad = gradient if vectors.grad is None else vectors.grad + gradient
            return [float(loss.detach()), *[0.0] * (len(part) - 1)]

        total = sum(sum(halving(run, part, "record")) for part in length_batches(rows, tokens))
        if progress:
            progress(i + 1, steps)
        return total

    with gradients(model, {}, lambda name, gradient: None):
        losses = fit([vectors], step, steps=steps, learning_rate=learning_rate * scale)
    return SoftPrompt(vectors.detach().cpu(), tuple(losses), count)


def score(
    model: nn.Module,
    records: Sequence[TokenRecord],
    vectors: Tensor,
    *,
    keep: int = 0,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
) -> pd.DataFrame:
    """How far the model holds records whose prompts stand behind given vectors.

    Args:
        model: a causal language model; used in evaluation mode, left as found.
        records: any number.
        vectors: [k, d] in the units of the token embeddings; k = 0 scores the records as they are.
        keep: tokens at the start of every record that stay in front of the vectors.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens a batch.

    Returns:
        The columns of `probes.memorised.memorised`, one row a record in order; one forward pass a record.

    Raises:
        UsageError: vectors of another width, records too long for the model's positions.
        UnsupportedError: token ids outside the vocabulary, or a model that cannot be run on embeddings.
        ResourceError: when one record does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    length = len(vectors)
    if not records or not length:
        return memorised(model, records, model_map=model_map, batch_tokens=batch_tokens)
    check(model_map, records, length)
    _check_kept(records, keep)
    width = table_of(model).shape[-1]
    if vectors.ndim != 2 or vectors.shape[-1] != width:
        raise UsageError(f"expected vectors of width {width}, found others; train them on this model")
    device = next(model.parameters()).device
    rows = [_placed(record, length, keep, ()) for record in records]
    vectors = vectors.to(device)

    def run(batch: list[int]) -> list[np.ndarray]:
        part = [rows[i] for i in batch]
        states = _states(model_map, part, vectors, keep)  # [N, d]
        return list(record_scores(part, *token_scores(model_map, states, labels_of(part, device))))

    found = np.zeros((len(rows), 3))
    with inference(model):
        for batch in length_batches(rows, batch_tokens or default_batch_tokens(device)):
            found[batch] = halving(run, batch, "record")
    return score_frame(records, found)


def _check_kept(records: Sequence[TokenRecord], keep: int) -> None:
    short = sum(record.n_prompt < keep for record in records)
    if short:
        raise UsageError(f"expected prompts of at least {keep} tokens, found {short} shorter; keep fewer in front")


def _start(table: Tensor, length: int, initial: str, scale: float, generator: np.random.Generator) -> Tensor:
    """[k, d] fp32, or fp64 for a model in it."""
    kind = torch.promote_types(table.dtype, torch.float32)
    if initial == "tokens":
        chosen = generator.integers(len(table), size=length)
        return table[torch.as_tensor(chosen, device=table.device)].to(kind)
    noise = torch.as_tensor(generator.normal(size=(length, table.shape[-1])), device=table.device)  # [k, d]
    return (table.double().mean(0) + NOISE * scale * noise).to(kind)


def _context(
    records: Sequence[TokenRecord], own: int, room: int, keep: int, generator: np.random.Generator
) -> tuple[int, ...]:
    """`room` tokens of other records than `own`, from a random place of each; never a record's own text."""
    found: list[int] = []
    while len(found) < room:
        other = int(generator.integers(len(records) - 1))
        ids = records[other + (other >= own)].ids[keep:]
        start = int(generator.integers(len(ids)))
        found += ids[start : start + room - len(found)]
    return tuple(found)


def _placed(record: TokenRecord, length: int, keep: int, context: tuple[int, ...]) -> TokenRecord:
    """The record with a context and `length` places behind its first `keep` tokens."""
    more = (*context, *[0] * length)
    return replace(record, ids=(*record.ids[:keep], *more, *record.ids[keep:]), n_prompt=record.n_prompt + len(more))


def _states(model_map: ModelMap, rows: Sequence[TokenRecord], vectors: Tensor, at: int) -> Tensor:
    """[N, d] states that predict the completions, with the vectors at positions `at` to `at` + k of every row."""
    ids, _ = pad(rows, vectors.device)  # [B, T]
    inputs = embedded(model_map, ids)  # [B, T, d]
    placed = vectors.to(inputs.dtype).expand(len(rows), -1, -1)  # [B, k, d]
    inputs = torch.cat([inputs[:, :at], placed, inputs[:, at + len(vectors) :]], dim=1)
    return final_states(model_map, inputs)[predicting(rows, ids)]


def _loss(model_map: ModelMap, rows: Sequence[TokenRecord], vectors: Tensor, at: int) -> Tensor:
    """Sum over records of their mean loss in nats per token."""
    states = _states(model_map, rows, vectors, at)
    device = states.device
    return cross_entropy(model_map, states, labels_of(rows, device), token_weights(rows, device))
