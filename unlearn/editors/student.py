"""Distilling a teacher into the model itself: a student learns what another model answers, and is then the edit.

    minimise   forget_weight * mean over forget rows of D_i + retain_weight * mean over retain rows of D_i

    D_i = mean over the completion positions t of row i of  KL(p_T(. | before t) || p(. | before t))

with p_T the teacher's whole distribution and p the student's, which starts as the model. The divergence is the forward
one, in nats: the student is to give probability wherever the teacher does, so that it does not put all of it on one of
the teacher's answers. Where the teacher gives a token none, 0 log 0 = 0.

The rows are records with their prompts, other wordings of them, and text that the teacher itself writes after the
prompts (`written`). A divergence along a record's own words says what the student does while it follows the record;
along the teacher's words it says what it does once it has left it, where it must not find its way back.

The teacher's final states are taken once, before the first step, and kept on the CPU in the run's type; they become
distributions a chunk of positions at a time (`unlearn.editors.lossbatches`). The teacher may share its weights with the
student: what its head needs is put back for the time of a chunk where it trains too. Training is `probes.training`:
AdamW without weight decay or dropout on adapters that are merged, or on the weights themselves. A step whose rows the
student answers as the teacher, to rounding, moves nothing.

Stopping. The number of steps is fixed beforehand. With `patience` the weighted divergences on rows held out are taken
after every epoch, training ends when they have not fallen for so many, and the best epoch's weights are kept.

Memory. A completion token of the rows keeps one teacher state: of a difference of two models the width of both.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from attacks.extraction.untargeted import sample
from probes import training
from probes.likelihood import SamplingScheme, inference
from probes.records import ImageRecord, Record, TokenRecord
from unlearn.editors.base import EditContext
from unlearn.editors.lossbatches import Batches, ImageBatches, Teacher, TextBatches, n_visited, visited
from unlearn.editors.selection import count_or_auto
from unlearn.editors.trainable import Count, Number, Positive, Size, TrainingParameters, head_before, trained

if TYPE_CHECKING:
    from probes.modelmap import ModelMap

WRITTEN = 1  # texts of the teacher for each record to forget, where `auto` decides
ROUNDING = 1e-6  # nats a token; of a smaller divergence, which is rounding, AdamW would still make whole steps


class StudentParameters(TrainingParameters):
    """Hyper-parameters of the student; the names are those of a method preset.

    Attributes:
        forget_weight: factor of the divergence on forget rows; 0 leaves them out.
        retain_weight: factor of that on retain rows; 0 leaves them out.
        retain_batch_size: retain rows a step.
        generated: texts that the teacher writes after the prompt of each record to forget, and as many in all after
            prompts of retain records; "auto" takes 1 of a language model.
        generated_tokens: their length; None for that of the record's own completion.
        temperature: at which they are drawn.
        patience: training ends after so many epochs without a lower divergence on the rows held out; None makes
            every step.
    """

    learning_rate: Number = 5e-4
    decay: Literal["constant", "linear"] = "linear"
    epochs: Count = 5
    batch_size: Size = 16
    retain_batch_size: Size = 16
    forget_weight: Number = 1.0
    retain_weight: Number = 1.0
    generated: Annotated[int | Literal["auto"], count_or_auto(0)] = "auto"
    generated_tokens: Size | None = None
    temperature: Positive = 1.0
    patience: Size | None = None

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if not self.forget_weight and not self.retain_weight:
            raise ValueError("expected `forget_weight` or `retain_weight` above 0, found neither")
        return self

    def texts(self, language: bool) -> int:
        """Texts a record to forget."""
        return (WRITTEN if language else 0) if self.generated == "auto" else self.generated


# --------------------------------------------------------------------------------------------- what the teacher writes


def written(
    model: nn.Module,
    model_map: ModelMap,
    records: Sequence[TokenRecord],
    n: int,
    p: StudentParameters,
    seed: int,
    ran: Callable[[int], None],
) -> list[TokenRecord]:
    """Texts that a model writes after the prompts of records.

    A text ends after the first token that ends one for `generate()`, or at its length. Texts after prompts of one
    length are drawn together; what a text is depends on the seed, these records and n, not on what is drawn beside it.

    Args:
        model: the teacher.
        model_map: its map.
        records: whose prompts; one that leaves the model no position to write in gives nothing.
        n: texts a record.
        p: length and temperature.
        seed: of all draws.
        ran: called with a number of texts when they are done.

    Returns:
        Records with the prompt, group and identifier of their origins and the text as completion.
    """
    ends, positions = _ends(model), _positions(model)
    by_width: dict[int, list[TokenRecord]] = defaultdict(list)
    for record in records:
        by_width[record.n_prompt].append(record)
    texts: list[TokenRecord] = []
    for width, group in sorted(by_width.items()):
        wanted = [record.n_tokens if p.generated_tokens is None else p.generated_tokens for record in group]
        length = max(wanted) if positions is None else min(max(wanted), positions - width)
        if n < 1 or length < 1:
            continue
        key = hashlib.sha256(f"written|{seed}|{width}".encode()).digest()
        drawn = sample(
            model,
            n * len(group),
            length,
            prompt_ids=[record.ids[:width] for record in group],
            scheme=SamplingScheme(temperature=p.temperature),
            seed=int.from_bytes(key[:8], "little"),
            model_map=model_map,
        )
        for i, tokens in enumerate(drawn):
            origin, most = group[i % len(group)], wanted[i % len(group)]
            text = tokens[: next((at + 1 for at, token in enumerate(tokens[:most]) if token in ends), most)]
            texts.append(TokenRecord(origin.record_id, (*origin.ids[:width], *text), width, 0, origin.group))
        ran(len(drawn))
    return texts


def _ends(model: Any) -> set[int]:
    """Tokens after which `generate()` ends a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _positions(model: Any) -> int | None:
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def chosen(n: int, most: int, seed: int) -> list[int]:
    """Up to `most` of n rows at random, in order."""
    return sorted(np.random.default_rng((seed, 15)).permutation(n)[:most].tolist())


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, slots=True)
class Lessons:
    """Rows to learn from.

    Attributes:
        forget: what follows prompts of the records to forget.
        retain: what follows other prompts.
        held_forget: forget rows that only say when to stop.
        held_retain: retain rows that only say when to stop.
    """

    forget: Sequence[Record]
    retain: Sequence[Record]
    held_forget: Sequence[Record] = ()
    held_retain: Sequence[Record] = ()

    def __repr__(self) -> str:
        sizes = (len(rows) for rows in (self.forget, self.retain, self.held_forget, self.held_retain))
        return "Lessons({}, {}, {}, {})".format(*sizes)


@dataclass(slots=True)
class Course:
    """What happened.

    Attributes:
        forget: mean divergence of each step's forget rows before its update, nats a token; empty where left out.
        retain: that of its retain rows.
        held_out: weighted sum of both on the rows held out, before training and after every epoch.
        best_epoch: the one whose weights were kept, where rows held out decided; 0 for none.
        epoch: steps an epoch.
        planned: steps that were to be made.
        steps: steps that were made.
        stopped: whether patience ended them.
    """

    forget: list[float] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    epoch: int = 1
    planned: int = 0
    steps: int = 0
    stopped: bool = False

    def left(self) -> float:
        """Share of the first step's divergence on forget rows that the last epoch still had; 0 where there was none."""
        last = self.forget[-self.epoch :]
        return sum(last) / len(last) / self.forget[0] if last and self.forget[0] > ROUNDING else 0.0


def passes(p: StudentParameters, forget: int, retain: int, held_forget: int, held_retain: int) -> dict[str, int]:
    """Passes over rows of `distil`, for so many of each kind; patience can end them earlier."""
    steps = p.planned(forget) if p.learning_rate else 0
    if not steps:
        return {"forward": 0, "forward_backward": 0}
    sides = [(forget, p.batch_size, held_forget)] if p.forget_weight else []
    sides += [(retain, p.retain_batch_size, held_retain)] if p.retain_weight else []
    seen = [(n, n_visited(n, size, steps)) for n, size, _ in sides]
    epochs = math.ceil(steps / math.ceil(forget / p.batch_size))
    looks = 0 if p.patience is None else 2 + epochs  # the teacher's, and the student's before and after every epoch
    return {
        "forward": sum(min(n, count) for n, count in seen) + looks * sum(held for _, _, held in sides),
        "forward_backward": sum(count for _, count in seen),
    }


def distil(
    context: EditContext,
    teacher: Teacher | nn.Module,
    lessons: Lessons,
    names: Sequence[str],
    p: StudentParameters,
    ran: Callable[[int], None],
) -> tuple[Course, dict[str, Tensor]]:
    """Train the model on a teacher's answers.

    Args:
        context: of the edit; its model is left as found.
        teacher: of texts a `Teacher`, such as a map; of images a classifier. It may share its weights with the model.
        lessons: rows; at least one where a weight is above 0, and of records to forget in any case.
        names: parameters that train, from `trainable.selected`.
        p: hyper-parameters.
        ran: called with the number of rows of each pass.

    Returns:
        What happened, and the change of every parameter named, in float64 on the CPU; none without a step.

    Raises:
        UsageError: a loss that is no longer finite.
        ResourceError: a step does not fit in memory.
    """
    steps = p.planned(len(lessons.forget)) if p.learning_rate else 0
    course = Course(planned=steps, epoch=math.ceil(len(lessons.forget) / p.batch_size))
    if not steps:
        return course, {}
    head = head_before(context.model_map, names) if p.how == "full" else {}

    def batches(rows: Sequence[Record]) -> Batches:
        if isinstance(rows[0], TokenRecord):
            return TextBatches(context.model_map, cast("Sequence[TokenRecord]", rows), head, cast(Teacher, teacher))
        return ImageBatches(context.model, cast("Sequence[ImageRecord]", rows), cast(nn.Module, teacher))

    sides: list[_Side] = []
    for rows, size, weight, seed, curve in (
        (lessons.forget, p.batch_size, p.forget_weight, context.seed, course.forget),
        (lessons.retain, p.retain_batch_size, p.retain_weight, context.seed + 1, course.retain),
    ):
        if weight:
            order = list(training.batches(len(rows), size, steps, seed))
            sides.append(_Side(batches(rows), order, weight, curve))
    held: list[_Side] = []
    for rows, weight in ((lessons.held_forget, p.forget_weight), (lessons.held_retain, p.retain_weight)):
        if rows and weight and p.patience is not None:
            held.append(_Side(batches(rows), [list(range(len(rows)))], weight, []))
    with inference(context.model), inference(teacher if isinstance(teacher, nn.Module) else teacher.backbone()):
        for side in (*sides, *held):
            side.taught = side.batches.all_taught(visited(side.order), ran)

    def train(tensors: list[nn.Parameter]) -> None:
        best: list[Tensor] = []

        def look() -> bool:
            """Measure the rows held out; True ends the training."""
            course.held_out.append(sum(side.weight * side.loss(0, ran, None) for side in held))
            if not best or course.held_out[-1] < min(course.held_out[:-1]):
                best[:] = [tensor.detach().clone() for tensor in tensors]
                course.best_epoch = len(course.held_out) - 1
            course.stopped = len(course.held_out) - 1 - cast(int, course.best_epoch) >= cast(int, p.patience)
            return course.stopped

        def step(i: int) -> float:
            course.steps = i + 1
            losses = [side.loss(i, ran, side.weight) for side in sides]
            if max(losses) < ROUNDING:
                for tensor in tensors:
                    tensor.grad = None  # AdamW leaves a parameter without gradient as it is
            return sum(side.weight * loss for side, loss in zip(sides, losses, strict=True))

        if held:
            look()
        training.fit(
            tensors,
            step,
            steps=steps,
            learning_rate=p.learning_rate,
            warm_up=p.warm_up,
            decay=p.decay,
            after=lambda done: bool(held) and (done % course.epoch == 0 or done == steps) and look(),
        )
        with torch.no_grad():
            for tensor, kept in zip(tensors, best, strict=True) if held else ():
                tensor.copy_(kept)

    changes = trained(context, names, p, train)
    return course, changes


@dataclass(slots=True)
class _Side:
    """One of the two sums: rows, those of each step, the factor, and the teacher's answers."""

    batches: Batches
    order: list[list[int]]
    weight: float
    curve: list[float]
    taught: dict[int, Tensor] = field(default_factory=dict)

    def loss(self, i: int, ran: Callable[[int], None], factor: float | None) -> float:
        """The mean divergence of a step's rows; leaves its gradients times the factor."""
        self.curve.append(self.batches.mean(self.order[i], self.taught, ran, factor=factor))
        return self.curve[-1]
