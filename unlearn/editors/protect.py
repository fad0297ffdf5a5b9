"""What keeps an earlier erasure from coming back while the next one is trained: replay of what was forgotten earlier.

Each step also takes a batch of the records that earlier requests forgot. With L_k the mean loss of such a record,

    earlier_weight mean_k max(0, bound - L_k)

is added to the objective. Its gradient is exactly zero while every record of the batch is past the bound: then it costs
a forward pass and moves nothing, and no backward pass is made. A record that falls below the bound is pushed back.
Each record has a bound of its own, however the records of this request are bounded.

Limits. What is protected is the records' own wording, or the images themselves; other wordings and unseen images follow
as far as they did when the records were forgotten. The bound is that of this edit: records that an earlier method left
below it are pushed up to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unlearn.editors.groupsparse import bounded
from unlearn.editors.lossbatches import Batches


class Replay:
    """Records forgotten earlier, held past the bound.

    Args:
        batches: the records.
        rows: those of each step.
        bound: nats a token or image.
        weight: factor of the bounded loss.
        ran: called with the number of records of each part.

    Attributes:
        latest: loss of each record where it was last seen in training; NaN before.
        means: mean loss of the batch of each step, before its update, nats.
        pushed: how often a record was seen below the bound, and so had a gradient.
    """

    def __init__(
        self,
        batches: Batches,
        rows: Sequence[Sequence[int]],
        *,
        bound: float,
        weight: float,
        ran: Callable[[int], None],
    ) -> None:
        self._batches, self._rows, self._bound, self._weight, self._ran = batches, rows, bound, weight, ran
        self.latest = [math.nan] * len(batches.lengths)
        self.means: list[float] = []
        self.pushed = 0

    def step(self, i: int) -> float:
        """Add the gradients of step i; returns the weighted loss."""
        rows, objective, mean = self._rows[i], 0.0, 0.0
        for part in self._batches.parts(rows):
            totals, backward = self._batches.totals(part)
            lengths = self._lengths(part)
            losses = totals / lengths  # [P]
            values, slopes = bounded(losses, self._bound)
            if below := int(slopes.count_nonzero()):
                backward(self._weight * slopes / (lengths * len(rows)))
            for j, loss in zip(part, losses.tolist(), strict=True):
                self.latest[j] = loss
            self.pushed += below
            objective += self._weight * float(values.sum()) / len(rows)
            mean += float(losses.sum()) / len(rows)
            self._ran(len(part))
        self.means.append(mean)
        return objective

    def losses(self) -> list[float]:
        """Mean loss of every record as the model stands, nats, in a forward pass."""
        found = [math.nan] * len(self.latest)
        for part in self._batches.parts(range(len(found))):
            with torch.no_grad():
                totals, _ = self._batches.totals(part)
            for j, loss in zip(part, (totals / self._lengths(part)).tolist(), strict=True):
                found[j] = loss
            self._ran(len(part))
        return found

    def _lengths(self, part: Sequence[int]) -> Tensor:
        return torch.tensor([self._batches.lengths[j] for j in part], dtype=torch.float64)  # [P]


def n_below(losses: Sequence[float], bound: float, tolerance: float) -> int:
    """How many losses have not reached the bound, up to a share of it; one that was never seen (NaN) has not."""
    return sum(not loss >= (1 - tolerance) * bound for loss in losses)
