"""Relearning: a little training, and what comes back of records that were not trained on.

An edit that only hides leaves the records a few steps away: trained on half of them, the model gives back the other
half (2410.08827, 2406.13356); sometimes training on the data to keep, or on unrelated text, is enough (2505.22310,
2409.18025). A model that never held the records learns from the first half nothing about the second, and never-seen
records stay where they are: those two are the controls, so records that are scored must not be trained on.

`relearn` gives the graded figures of `probes.memorised` of any sets after some numbers of steps: the steps-to-recover
curve. `savings` trains on the records themselves, mixed with as many never-seen ones, and compares how soon each
meets one criterion (Ebbinghaus 1885; for language models 2303.17557):

    savings = 1 - mean steps of the records / mean steps of the never-seen ones        (0: learnt as if new, 1: kept)

Training is `probes.training`: AdamW at a constant rate in evaluation mode, on LoRA adapters or on all weights, with the
batches of a seed, which neither the marks nor the scored sets change. The model is put back bit for bit.

Costs: a step of b records is 3 b forward passes of a record; a mark is one of every scored record, and of a last batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from probes import statistics
from probes.errors import UsageError
from probes.likelihood import Progress
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.statistics import Estimate
from probes.training import adaptable, adapters, batches, fit, full, mean_loss

How = Literal["auto", "lora", "full"]
Records = Sequence[TokenRecord] | Sequence[ImageRecord]
Clusters = Sequence[str | None] | None

LEARNING_RATE = {"lora": 3e-4, "full": 5e-5}
ALPHA = 2  # LoRA's alpha, in ranks


@dataclass(frozen=True, slots=True)
class Relearning:
    """What training brought back.

    Attributes:
        how: "lora" or "full".
        curve: number of steps -> name of a scored set -> frame of `probes.memorised.memorised`, a row per record in
            order. 0 (no training) and the last step are always there.
        losses: of each step's batch before its update, nats per token (or image).
    """

    how: str
    curve: dict[int, dict[str, pd.DataFrame]] = field(repr=False)
    losses: list[float] = field(repr=False)

    @property
    def last(self) -> dict[str, pd.DataFrame]:
        """Frames of the scored sets after the last step."""
        return self.curve[max(self.curve)]


def relearn(
    model: nn.Module,
    train: Records,
    scored: Mapping[str, Records],
    *,
    how: How = "auto",
    steps: int = 20,
    marks: Sequence[int] = (5, 20),
    learning_rate: float | None = None,
    batch: int = 8,
    rank: int = 16,
    seed: int = 0,
    model_map: ModelMap | None = None,
    before: Mapping[str, pd.DataFrame] | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Relearning:
    """Train on some records and score others on the way.

    Args:
        model: a causal language model for `TokenRecord`s, an image classifier for `ImageRecord`s; left as found.
        train: what to train on, at least one record.
        scored: sets to score; for an honest attack none of their records is in `train`.
        how: LoRA on the linear maps of every block, all weights, or "auto": LoRA where it has a place (convolutional
            networks and stacked experts are trained in full).
        steps: of AdamW, at least 1.
        marks: further numbers of steps, from 1 to `steps`, after which to score.
        learning_rate: constant; by default `LEARNING_RATE`.
        batch: records a step.
        rank: of LoRA; its alpha is twice that.
        seed: of the order of records and LoRA's start.
        model_map: the model's map, built when absent.
        before: frames of scored sets without training, where they are known; the others are scored here.
        batch_tokens: padded tokens a batch when scoring.
        progress: called with (steps done, steps in all).

    Raises:
        UsageError: nothing to train on, a number out of range, LoRA in a network without linear maps, or training that
            diverges.
        UnsupportedError: LoRA on stacked experts, or records that do not fit the model.
        ResourceError: too little memory.
    """
    if steps < 1 or any(not 1 <= mark <= steps for mark in marks):
        raise UsageError(f"expected at least 1 step and marks from 1 to {steps}, found {sorted(marks)}; change them")
    model_map = model_map or ModelMap.of(model)
    chosen = how if how != "auto" else "lora" if adaptable(model_map) else "full"
    order = list(batches(len(train), batch, steps, seed))
    loss = mean_loss(model, train, model_map=model_map)
    due = {*marks, steps}
    known = dict(before or {})

    def frames(done: int) -> dict[str, pd.DataFrame]:
        return {
            name: known[name]
            if done == 0 and name in known
            else memorised(model, records, model_map=model_map, batch_tokens=batch_tokens)
            for name, records in scored.items()
        }

    curve = {0: frames(0)}

    def after(done: int) -> None:
        if done in due:
            with torch.no_grad():
                if not math.isfinite(loss(order[done - 1])):  # the step that broke it has no next loss to tell
                    raise UsageError(f"expected a finite loss after {done} steps, found none; lower the learning rate")
            curve[done] = frames(done)
        if progress:
            progress(done, steps)

    with _trainable(model, model_map, chosen, rank, seed) as parameters:
        losses = fit(
            parameters,
            lambda i: loss(order[i]),
            steps=steps,
            learning_rate=LEARNING_RATE[chosen] if learning_rate is None else learning_rate,
            after=after,
        )
    return Relearning(chosen, curve, losses)


@contextmanager
def _trainable(model: nn.Module, model_map: ModelMap, how: str, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    if how == "full":
        with full(model) as parameters:
            yield parameters
    elif how == "lora":
        with adapters(model, model_map, rank=rank, alpha=ALPHA * rank, seed=seed) as parameters:
            yield parameters
    else:
        raise UsageError(f"expected training by lora or full, found {how!r}; choose one of them")


@dataclass(frozen=True, slots=True)
class Savings:
    """How soon records are learnt again, beside never-seen ones.

    Attributes:
        savings: 1 - mean steps of the records / mean steps of the never-seen ones, with its interval; not testable
            where the never-seen records meet the criterion too soon for anything to be saved.
        steps_old: [n] steps until each record met the criterion: 0 before training, budget + 1 if never.
        steps_new: [m] the same of the never-seen records.
        budget: steps of the training.
        relearning: the training.
    """

    savings: Estimate
    steps_old: NDArray[np.int64] = field(repr=False)
    steps_new: NDArray[np.int64] = field(repr=False)
    budget: int
    relearning: Relearning

    def speed(self, which: Literal["old", "new"]) -> NDArray[np.float64]:
        """1 - steps / (budget + 1) of each record, in [0, 1]: 1 met the criterion untrained, 0 never."""
        return _speed(self.steps_old if which == "old" else self.steps_new, self.budget)


def savings(
    model: nn.Module,
    old: Records,
    new: Records,
    *,
    criterion: float = 0.9,
    every: int = 4,
    steps: int = 20,
    how: How = "auto",
    learning_rate: float | None = None,
    batch: int = 8,
    rank: int = 16,
    seed: int = 0,
    model_map: ModelMap | None = None,
    clusters: Clusters = None,
    new_clusters: Clusters = None,
    before: Mapping[str, pd.DataFrame] | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Savings:
    """Train on records and on never-seen ones together, and compare how soon they meet one criterion.

    The criterion, a token accuracy (of an image: predicted as labelled), is the same for both, as in Ebbinghaus's
    method: one relative to each record's start would ask more of records that start higher. A record's steps are the
    first mark at which it meets the criterion; records that never do count `steps` + 1, so savings are too small rather
    than too large where many never-seen records do not.

    Args:
        model: as for `relearn`; left as found.
        old: the records, at least one.
        new: never-seen records, at least one; as many as `old`, so that both are trained on equally often.
        criterion: token accuracy, in (0, 1].
        every: steps between two marks.
        steps: the budget.
        how: as for `relearn`.
        learning_rate: as for `relearn`.
        batch: as for `relearn`.
        rank: as for `relearn`.
        seed: of the training and the interval.
        model_map: as for `relearn`.
        clusters: of `old`.
        new_clusters: of `new`.
        before: frames without training by "old" and "new", where they are known.
        batch_tokens: as for `relearn`.
        progress: as for `relearn`.

    Raises:
        UsageError: no records, a number out of range, or as `relearn`.
    """
    if not old or not new or not 0 < criterion <= 1 or every < 1:
        raise UsageError(
            "expected records, never-seen records, a criterion in (0, 1] and marks at least 1 step apart, found "
            f"{len(old)}, {len(new)}, {criterion:g} and {every}"
        )
    found = relearn(
        model,
        [*old, *new],
        {"old": old, "new": new},
        how=how,
        steps=steps,
        marks=range(every, steps + 1, every),
        learning_rate=learning_rate,
        batch=batch,
        rank=rank,
        seed=seed,
        model_map=model_map,
        before=before,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    frames = {mark: found.curve[mark] for mark in sorted(found.curve)}
    needed = {name: _needed({mark: frames[mark][name] for mark in frames}, criterion) for name in ("old", "new")}
    speeds = {name: _speed(numbers, steps) for name, numbers in needed.items()}
    saved = _saved(speeds["old"], speeds["new"], clusters, new_clusters, seed)
    return Savings(saved, needed["old"], needed["new"], steps, found)


def _needed(frames: Mapping[int, pd.DataFrame], criterion: float) -> NDArray[np.int64]:
    """[n] first mark at which each record meets the criterion; one more than the last mark if none."""
    met = np.stack([frame["accuracy"].to_numpy(dtype=np.float64) >= criterion for frame in frames.values()])  # [M, n]
    out: NDArray[np.int64] = np.where(met.any(axis=0), np.array([*frames])[met.argmax(axis=0)], max(frames) + 1)
    return out


def _speed(steps: NDArray[np.int64], budget: int) -> NDArray[np.float64]:
    speed: NDArray[np.float64] = 1.0 - steps / (budget + 1)
    return speed


def _saved(
    old: NDArray[np.float64], new: NDArray[np.float64], clusters: Clusters, new_clusters: Clusters, seed: int
) -> Estimate:
    """Savings with their interval.

    With speeds x = 1 - steps / (budget + 1), 1 - mean steps(old) / mean steps(new) = (x_old - x_new) / (1 - x_new):
    the residual of x_old between never seen and known from the start, with Fieller's interval.
    """
    estimate = statistics.residual(
        np.ones_like(old), old, new, clusters=clusters, n_clusters=new_clusters, bounds=(0.0, 1.0), seed=seed
    )
    if estimate.interval is not None:
        return estimate
    return Estimate(
        estimate.status,
        f"never-seen records meet the criterion after {1 - float(new.mean()):.0%} of the steps already: there is too "
        "little to save",
        None,
    )
