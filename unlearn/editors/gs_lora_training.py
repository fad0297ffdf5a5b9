"""The training steps of GS-LoRA: losses and prototype losses of a step, the proximal step after it, and the end.

What is minimised, and when training ends, is in `unlearn.editors.gs_lora`; how groups are shrunk in
`unlearn.editors.groupsparse`. A part of a batch takes one forward pass, after which the losses L_i are known and so the
slopes of the bounded loss, and one backward pass, which also carries the gradients of the prototype losses.

Shape letters: P records in one part of a batch, r rank, K prototypes, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probes import training
from unlearn.editors.groupsparse import Group, MovingAverage, bounded, bounded_mean, shrink, structure_loss
from unlearn.editors.lossbatches import Batches, visited
from unlearn.editors.protect import Replay, n_below
from unlearn.editors.prototypes import Embeddings, distance, mean_distances, prototypes
from unlearn.editors.regions import Regions

if TYPE_CHECKING:
    from unlearn.editors.gs_lora import GSLoRAParameters


@dataclass(slots=True)
class Adapted:
    """A group with its adapters in place.

    Attributes:
        group: its projections.
        pairs: module path -> A [r, in] and B [out, r].
        size: ||B_g|| after the last step.
        zero_for: steps for which it has been zero since the penalty began.
        dropped: whether it was taken out of the model.
    """

    group: Group
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]
    size: float = 0.0
    zero_for: int = 0
    dropped: bool = False

    @property
    def ups(self) -> list[nn.Parameter]:
        """B of each pair."""
        return [up for _, up in self.pairs.values()]

    @property
    def tensors(self) -> list[nn.Parameter]:
        """A and B of each pair."""
        return [half for pair in self.pairs.values() for half in pair]

    def drop(self, model: nn.Module) -> None:
        """Put the modules themselves back in the place of their adapters."""
        for path, pair in self.pairs.items():
            parent, _, name = path.rpartition(".")
            layer: Any = model.get_submodule(path)
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
            for half in pair:
                half.requires_grad_(False)
        self.dropped = True


@dataclass(slots=True)
class Side:
    """Records to forget or to keep: their losses, the rows of each step, and their embeddings with prototypes.

    Attributes:
        batches: the records.
        rows: those of each step.
        embeddings: of the records; None without prototypes.
        targets: prototype [d] of each record's class, by row.
        bounds: on the distance from it, nats, by row.
    """

    batches: Batches
    rows: list[list[int]]
    embeddings: Embeddings | None = None
    targets: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Curve:
    """What happened at each step, before its update.

    Attributes:
        objective: what is minimised, the penalty aside.
        forget_loss: mean loss of the records to forget, nats a token or image.
        retain_loss: that of the retain records.
        active: groups that are not zero, after the update.
    """

    objective: list[float] = field(default_factory=list)
    forget_loss: list[float] = field(default_factory=list)
    retain_loss: list[float] = field(default_factory=list)
    active: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Trainer:
    """Steps for `probes.training.fit`.

    Attributes:
        p: the parameters.
        model: with adapters in place.
        groups: all of them.
        forget: the records to forget.
        retain: the records to keep.
        bound: nats.
        steps: at most.
        progress: called with the number of records that were run.
        merged: what the adapters in place add to the weights.
        replay: the records forgotten earlier, or None.
        regions: the entries that earlier edits changed, or None.
        curve: filled while training.
        latest: loss of each record to forget where it was last seen; NaN before.
        before: loss of each retain record before training, by row, where `stop_early` asks for it.
        average: of the merged changes, or None.
    """

    p: GSLoRAParameters
    model: nn.Module
    groups: list[Adapted]
    forget: Side
    retain: Side
    bound: float
    steps: int
    progress: Callable[[int], None]
    merged: Callable[[], dict[str, Tensor]]
    replay: Replay | None = None
    regions: Regions | None = None
    curve: Curve = field(default_factory=Curve)
    latest: list[float] = field(default_factory=list)
    before: dict[int, float] = field(default_factory=dict)
    average: MovingAverage | None = None
    _support: list[tuple[bool, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.latest = [math.nan] * len(self.forget.batches.lengths)
        if self.p.ema_decay is not None:
            self.average = MovingAverage(self.p.ema_decay)

    def prepare(self) -> None:
        """Read, before the first step, the retain losses and the prototypes of the model as it was loaded."""
        found = []
        for side in (self.forget, self.retain):
            losses, embedded = dict[int, float](), dict[int, Tensor]()
            reads = side is self.retain and self.p.stop_early
            for part in side.batches.parts(visited(side.rows)) if reads or self.p.plus else ():
                with torch.no_grad():
                    if side.embeddings is None:
                        totals, _ = side.batches.totals(part)
                    else:
                        with side.embeddings.watch(part) as seen:
                            totals, _ = side.batches.totals(part)
                        embedded |= dict(zip(part, seen.embeddings.detach(), strict=True))
                losses |= {j: float(total) / side.batches.lengths[j] for j, total in zip(part, totals, strict=True)}
                self.progress(len(part))
            if side is self.retain:
                self.before = losses
            if side.embeddings is not None:
                found.append(self._targets(side, side.embeddings.keys, embedded))
        if found:
            (names, mine), (_, kept) = found
            p = self.p.prototype_bound
            limits = mean_distances(mine, kept).tolist() if p == "auto" else [p] * len(names)
            by_key = dict(zip(names, limits, strict=True))
            assert self.forget.embeddings is not None
            self.forget.bounds = {j: by_key[self.forget.embeddings.keys[j]] for j in self.forget.targets}

    def _targets(
        self, side: Side, keys: Sequence[Hashable], embedded: dict[int, Tensor]
    ) -> tuple[list[Hashable], Tensor]:
        rows = sorted(embedded)
        names, means = prototypes([keys[j] for j in rows], torch.stack([embedded[j] for j in rows]))  # [K, d]
        place = {name: k for k, name in enumerate(names)}
        side.targets = {j: means[place[keys[j]]] for j in rows}
        return names, means

    @property
    def penalty_from(self) -> int:
        """The first step with the penalty."""
        return self.p.sparsity_warm_up * self.p.per_epoch(len(self.latest))

    def step(self, i: int) -> float:
        """Leave the gradients of step i."""
        p = self.p
        objective = self._forget(self.forget.rows[i]) + self._keep(self.retain.rows[i])
        if self.replay is not None:
            objective += self.replay.step(i)
        if self.regions is not None:
            objective += self.regions.step()
        self.curve.objective.append(objective)
        if p.penalty == "published" and p.sparsity and i >= self.penalty_from:
            penalty = p.sparsity * structure_loss([adapted.tensors for adapted in self.groups])
            penalty.backward()  # type: ignore[no-untyped-call]
        return objective

    def _forget(self, rows: Sequence[int]) -> float:
        """Add the forget gradients of a step; returns the weighted losses."""
        side, objective, seen = self.forget, 0.0, 0.0
        if self.p.bounded_over == "batch":  # what slope the batch has is known after all of it has run
            parts = [(part, *self._run(side, part)) for part in side.batches.parts(rows)]
            losses = torch.cat([found for _, found, _ in parts])
            values, slopes = bounded_mean(losses, self.bound)
            for (part, _, backward), slope in zip(
                parts, torch.split(slopes, [len(part) for part, *_ in parts]), strict=True
            ):
                objective += backward(self.p.forget_weight * slope / len(rows), len(rows))
                self.progress(len(part))
            objective += self.p.forget_weight * float(values.mean())
            seen = float(losses.mean())
        else:
            for part in side.batches.parts(rows):
                losses, backward = self._run(side, part)
                values, slopes = bounded(losses, self.bound)
                objective += backward(self.p.forget_weight * slopes / len(rows), len(rows))
                objective += self.p.forget_weight * float(values.sum()) / len(rows)
                seen += float(losses.sum()) / len(rows)
                self.progress(len(part))
        self.curve.forget_loss.append(seen)
        return objective

    def _keep(self, rows: Sequence[int]) -> float:
        """Add the retain gradients of a step; returns the weighted losses."""
        mean, objective = 0.0, 0.0
        for part in self.retain.batches.parts(rows):
            losses, backward = self._run(self.retain, part)
            objective += backward(torch.full_like(losses, 1.0 / len(rows)), len(rows))
            mean += float(losses.sum()) / len(rows)
            self.progress(len(part))
        self.curve.retain_loss.append(mean)
        return objective + mean

    def _run(self, side: Side, part: Sequence[int]) -> tuple[Tensor, Callable[[Tensor, int], float]]:
        """Run a part: its mean losses [P], and a function that goes backwards with a slope for each of them.

        That function also takes the number of records of the batch, and returns the weighted prototype loss.
        """
        seen = None
        if side.embeddings is not None:
            with side.embeddings.watch(part) as seen:
                totals, backward = side.batches.totals(part)
        else:
            totals, backward = side.batches.totals(part)
        lengths = torch.tensor([side.batches.lengths[j] for j in part], dtype=torch.float64)  # [P]
        losses = totals / lengths
        if side is self.forget:
            for j, loss in zip(part, losses.tolist(), strict=True):
                self.latest[j] = loss

        def back(slopes: Tensor, n: int) -> float:
            value = 0.0
            if seen is not None:
                targets = torch.stack([side.targets[j] for j in part])  # [P, d]
                away = distance(targets, seen.embeddings)  # [P]
                if side is self.forget:
                    limits = torch.tensor([side.bounds[j] for j in part]).to(away)
                    loss = self.p.prototype_forget_weight * (limits - away).clamp(min=0).sum() / n
                else:
                    loss = self.p.prototype_retain_weight * away.sum() / n
                seen.push(loss)
                value = float(loss.detach())
            backward(slopes / lengths)
            return value

        return losses, back

    def after(self, done: int) -> bool:
        """The proximal step, the moving average, and whether this is the end."""
        p, on = self.p, done > self.penalty_from
        rate = p.learning_rate * training.rate_share(done - 1, steps=self.steps, warm_up=p.warm_up, decay=p.decay)
        limit = rate * p.sparsity if on and p.penalty == "proximal" else 0.0
        alive = [adapted for adapted in self.groups if not adapted.dropped]
        limits = [limit * sum(up.numel() for up in adapted.ups) ** 0.5 for adapted in alive]
        for adapted, size in zip(alive, shrink([a.ups for a in alive], limits), strict=True):
            adapted.size = size
            adapted.zero_for = adapted.zero_for + 1 if on and not size else 0
            if p.drop_after is not None and adapted.zero_for >= p.drop_after:
                adapted.drop(self.model)
        if self.average is not None and done > p.ema_warm_up * p.per_epoch(len(self.latest)):
            self.average.add(self.merged())
        support = tuple(adapted.size > 0 for adapted in self.groups)
        self._support.append(support)
        self.curve.active.append(sum(support))
        return all(adapted.dropped for adapted in self.groups) or self._settled(done)

    def _settled(self, done: int) -> bool:
        p = self.p
        if not p.stop_early or done < self.penalty_from + p.patience or len(set(self._support[-p.patience :])) > 1:
            return False
        if self.replay is not None and n_below(self.replay.latest, self.bound, p.bound_tolerance):
            return False
        return not self.short() and self.retain_rise(p.patience) <= p.retain_tolerance

    def short(self) -> int:
        """Records to forget that had not reached the bound where they were last seen."""
        return n_below(self.latest, self.bound, self.p.bound_tolerance)

    def retain_rise(self, n: int) -> float:
        """Mean retain loss of the last n steps minus that of the same records before training, nats."""
        done = len(self.curve.retain_loss)
        batches = self.retain.rows[max(0, done - n) : done]
        began = [sum(self.before[j] for j in rows) / len(rows) for rows in batches]
        return sum(self.curve.retain_loss[-n:]) / len(batches) - sum(began) / len(batches)
