"""Editors that train: gradient ascent, gradient difference, NPO and SimNPO, one family with one loop.

For record i with n_i completion tokens, N_i = -log pi(y_i | x_i) is the negative log-likelihood of its whole completion
under the weights as they stand, and N_i^0 the same before the first step. What is minimised is the mean over records of
a forget loss, plus `retain_weight` times that of a retain loss:

    gradient ascent       f_i = -N_i / n_i                                         (arXiv 2210.01504)
    gradient difference   the same, with a retain loss                             (2203.12817, 2401.06121)
    NPO                   f_i = -(2/beta) log sigmoid(-beta (N_i^0 - N_i))         (2404.05868)
    SimNPO                f_i = -(2/beta) log sigmoid(beta N_i / n_i - margin)     (2410.07163; no reference)
    retain loss nll       N_j / n_j
    retain loss kl        mean over the completion's positions of KL(original || as it stands), all in nats

Gradients. f_i depends on the weights through N_i alone, so its gradient is s_i dN_i with

    gradient ascent  s_i = -1 / n_i
    NPO              s_i = -2 sigmoid(beta (N_i^0 - N_i))
    SimNPO           s_i = -(2 / n_i) sigmoid(margin - beta N_i / n_i)

A step therefore is a cross entropy whose tokens are weighted by s_i, taken as constants. As beta -> 0 NPO's s_i tends
to -1, ascent on the loss of the whole completion, and f_i to -N_i plus a constant; as a record is forgotten its s_i
tends to 0 and it is left alone, where ascent goes on for ever. The reference N^0 is one number a record, taken once
before training: there is no second model.

Every record counts alike, whatever its length. Training is `probes.training`: AdamW without weight decay, no dropout,
LoRA adapters that are merged into the weights (`how: lora`) or the weights themselves (`how: full`). A batch takes one
forward pass, after which s_i is known, and one backward pass (`unlearn.editors.lossbatches`).

Limits. A forget loss that is minimised says that the model no longer gives these completions to these prompts. It does
not say that they are gone: fine-tuning on related records often brings them back, and ascent without a retain loss
damages everything else.

Departures from public code: the retain gradients of a step use every retain record once an epoch, not one drawn for
each forget record; padding and prompts never count; NPO's log-probabilities are log-probabilities (one public version
takes raw logits), and the reference is read once, not at each step.

Shape letter: P records in one part of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes import training
from probes.errors import ResourceError, UsageError
from probes.likelihood import out_of_memory
from probes.records import ImageRecord, Record, TokenRecord
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.lossbatches import Batches, ImageBatches, TextBatches, n_visited, visited
from unlearn.editors.trainable import (
    Added,
    Count,
    Number,
    Positive,
    Size,
    TrainingParameters,
    expect_stored,
    head_before,
    selected,
    trained,
)
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, parse

if TYPE_CHECKING:
    from probes.modelmap import ModelMap

ForgetLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class AscentParameters(TrainingParameters):
    """Hyper-parameters of the whole family; the names are those of a method preset.

    Attributes:
        max_forget_loss: training ends before the step whose batch of records to forget has a mean loss a token above
            this many nats; None for no such rule.
    """

    max_forget_loss: Positive | None = None


class DifferenceParameters(AscentParameters):
    """Those of the methods with a retain loss.

    Attributes:
        retain_weight: factor of the retain loss; 0 leaves it out.
        retain_loss: "nll": cross entropy; "kl": divergence from the original model.
        retain_batch_size: retain records a step.
    """

    retain_weight: Number = 1.0
    retain_loss: Literal["nll", "kl"] = "nll"
    retain_batch_size: Size = 8


class NPOParameters(DifferenceParameters):
    """Those of NPO.

    Attributes:
        beta: inverse temperature: the smaller, the longer a record is pushed.
    """

    learning_rate: Number = 2e-4
    epochs: Count = 3
    beta: Positive = 0.1


class SimNPOParameters(DifferenceParameters):
    """Those of SimNPO.

    Attributes:
        beta: inverse temperature, on the loss a token.
        margin: the reward margin: a record is pushed until beta times its loss a token is well above it.
    """

    learning_rate: Number = 2e-4
    epochs: Count = 3
    retain_weight: Number = 8.0
    beta: Positive = 4.5
    margin: Number = 0.0


# --------------------------------------------------------------------------------------------------- the mathematics


def ascent_loss(totals: Tensor, lengths: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ascent on the loss a token.

    Args:
        totals: [P] N_i, negative log-likelihood of each whole completion, nats.
        lengths: [P] n_i.
        reference: [P] N_i^0; not read.

    Returns:
        [P] forget losses f_i and [P] their slopes s_i = d f_i / d N_i.
    """
    return -totals / lengths, -1.0 / lengths


def npo_loss(totals: Tensor, lengths: Tensor, reference: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Negative preference optimisation (arXiv 2404.05868); arguments and result as for `ascent_loss`."""
    log_ratio = reference - totals  # log pi / pi_0 of the completions
    return -2 / beta * functional.logsigmoid(-beta * log_ratio), -2 * torch.sigmoid(beta * log_ratio)


def simnpo_loss(
    totals: Tensor, lengths: Tensor, reference: Tensor, *, beta: float, margin: float
) -> tuple[Tensor, Tensor]:
    """SimNPO (arXiv 2410.07163); arguments and result as for `ascent_loss`."""
    surplus = beta * totals / lengths - margin
    return -2 / beta * functional.logsigmoid(surplus), -2 / lengths * torch.sigmoid(-surplus)


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(slots=True)
class Curve:
    """What happened at each step, before its update.

    Attributes:
        objective: what is minimised.
        forget_loss: mean loss a token of the records to forget, nats.
        retain_loss: mean retain loss a token, nats; empty where there is none.
        stopped: whether the last step listed passed the bound on the forget loss, and was not made.
    """

    objective: list[float] = field(default_factory=list)
    forget_loss: list[float] = field(default_factory=list)
    retain_loss: list[float] = field(default_factory=list)
    stopped: bool = False


@dataclass(slots=True)
class Retain:
    """The retain part of a training: records, the rows of each step, the factor of the loss and which loss."""

    batches: Batches
    rows: list[list[int]]
    weight: float
    kl: bool


Progress = Callable[[int], None]


@dataclass(slots=True)
class Trainer:
    """Steps for `probes.training.fit`.

    Attributes:
        loss: the forget loss.
        forget: the records to forget.
        rows: those of each step.
        retain: the retain part, or None.
        bound: on the mean forget loss a token of a batch, or None.
        progress: called with the number of records that were run.
        curve: filled while training.
    """

    loss: ForgetLoss
    forget: Batches
    rows: list[list[int]]
    retain: Retain | None
    bound: float | None
    progress: Progress
    curve: Curve = field(default_factory=Curve)
    _reference: dict[int, float] = field(default_factory=dict)
    _taught: dict[int, Tensor] | None = None

    def prepare(self, reference: bool) -> None:
        """Read what the model says before training: `reference` log-likelihoods, original predictions for KL."""
        if reference:
            rows = visited(self.rows)
            for part in self.forget.parts(rows):
                with torch.no_grad():
                    totals, _ = self.forget.totals(part)
                self._reference |= dict(zip(part, totals.tolist(), strict=True))
                self.progress(len(part))
        if self.retain is not None and self.retain.kl:
            self._taught = self.retain.batches.all_taught(visited(self.retain.rows), self.progress)

    def step(self, i: int) -> float:
        """Leave the gradients of step i; none, if the bound is passed."""
        objective, tokenwise, kept = 0.0, 0.0, 0.0
        rows = self.rows[i]
        for part in self.forget.parts(rows):
            totals, backward = self.forget.totals(part)
            lengths = torch.tensor([self.forget.lengths[j] for j in part], dtype=torch.float64)  # [P]
            reference = torch.tensor([self._reference.get(j, 0.0) for j in part], dtype=torch.float64)
            losses, slopes = self.loss(totals, lengths, reference)
            backward(slopes / len(rows))
            objective += float(losses.sum()) / len(rows)
            tokenwise += float((totals / lengths).sum()) / len(rows)
            self.progress(len(part))
        self.curve.stopped = self.bound is not None and tokenwise > self.bound
        if self.retain is not None and not self.curve.stopped:
            retain = self.retain
            kept = retain.batches.mean(retain.rows[i], self._taught, self.progress, factor=retain.weight)
            objective += retain.weight * kept
            self.curve.retain_loss.append(kept)
        self.curve.objective.append(objective)
        self.curve.forget_loss.append(tokenwise)
        return objective


# ------------------------------------------------------------------------------------------------------- the editors


class AscentEditor:
    """Gradient ascent on the loss of the records as a registered editor, and the base of its relatives."""

    name: ClassVar[str] = "gradient_ascent"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2210.01504"
    needs_retain: ClassVar[bool] = False
    needs_forget: ClassVar[bool] = True
    inference_time: ClassVar[bool] = False
    schema: ClassVar[type[AscentParameters]] = AscentParameters
    reads_reference: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), self.schema)

    def forget_loss(self) -> ForgetLoss:
        """The forget loss with this editor's parameters."""
        return ascent_loss

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the edit may change.

        Raises:
            UsageError: if a glob, block or role matches nothing, or nothing is left.
            UnsupportedError: adapters beside stacked experts.
        """
        return selected(model_map, self.parameters)

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes over records: those of the reference and of the original, and those of training."""
        p = self.parameters
        steps = p.planned(n_forget)
        seen, kept = n_visited(n_forget, p.batch_size, steps), 0
        forward = min(n_forget, seen) if self.reads_reference else 0
        if isinstance(p, DifferenceParameters) and p.retain_weight:
            kept = n_visited(n_retain, p.retain_batch_size, steps)
            forward += min(n_retain, kept) if p.retain_loss == "kl" else 0
        return {"forward": forward, "forward_backward": seen + kept}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Train, take what changed, put the model back and write the edited copy.

        Raises:
            UsageError: no records to forget or to keep, a selection that matches nothing, or a loss that is no longer
                finite.
            UnsupportedError: parameters that the checkpoint does not store, or adapters beside stacked experts.
            ResourceError: a batch does not fit in memory.
        """
        p = self.parameters
        weighted = isinstance(p, DifferenceParameters) and p.retain_weight > 0
        if not context.forget or (weighted and not context.retain):
            which = "retain records" if context.forget else "records to forget"
            raise UsageError(f"expected {which} for {self.name}, found none; give some")
        names = self.selected(context.model_map)
        expect_stored(context.source, context.model, names)
        steps = p.planned(len(context.forget)) if p.learning_rate else 0
        curve, changes = Curve(), dict[str, Tensor]()
        if steps:
            try:
                curve, changes = self._train(context, names, steps)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise ResourceError(
                    "expected memory for one step of training, found too little; lower batch_size and "
                    "retain_batch_size, or train fewer blocks"
                ) from None
        done = len(curve.objective) - curve.stopped
        deltas = write_edited(
            context.source, out, Added(context.source.disk_tensors(context.model, changes, missing=0.0))
        )
        sizes = {name: parameter.numel() for name, parameter in context.model.named_parameters()}
        statistics: dict[str, Any] = {
            "steps": done,
            "stopped": curve.stopped,
            "elements": sum(sizes[name] for name in names),
            "objective": curve.objective,
            "forget_loss": curve.forget_loss,
        }
        if weighted:
            statistics["retain_loss"] = curve.retain_loss
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json") | {"steps": p.planned(len(context.forget))},
            statistics=statistics,
            warnings=self._warnings(curve, done, steps),
        )

    def _train(self, context: EditContext, names: Sequence[str], steps: int) -> tuple[Curve, dict[str, Tensor]]:
        """The curve, and the change of every trained parameter in float64 on the CPU; the model is as before."""
        p, model_map, retain = self.parameters, context.model_map, None
        head = head_before(model_map, names) if p.how == "full" else {}

        def batches(records: Sequence[Record]) -> Batches:
            if isinstance(records[0], TokenRecord):
                return TextBatches(model_map, cast("Sequence[TokenRecord]", records), head)
            return ImageBatches(context.model, cast("Sequence[ImageRecord]", records))

        if isinstance(p, DifferenceParameters) and p.retain_weight:
            rows = training.batches(len(context.retain), p.retain_batch_size, steps, context.seed + 1)
            retain = Retain(batches(context.retain), list(rows), p.retain_weight, p.retain_loss == "kl")
        planned, done = sum(self.passes(len(context.forget), len(context.retain)).values()), 0

        def progress(records: int) -> None:
            nonlocal done
            done += records
            context.progress(done, planned)

        order = list(training.batches(len(context.forget), p.batch_size, steps, context.seed))
        trainer = Trainer(self.forget_loss(), batches(context.forget), order, retain, p.max_forget_loss, progress)

        def train(tensors: list[nn.Parameter]) -> None:
            trainer.prepare(self.reads_reference)

            def step(i: int) -> float:
                loss = trainer.step(i)
                if trainer.curve.stopped:
                    for tensor in tensors:
                        tensor.grad = None  # AdamW leaves a parameter without gradient as it is
                return loss

            training.fit(
                tensors,
                step,
                steps=steps,
                learning_rate=p.learning_rate,
                warm_up=p.warm_up,
                decay=p.decay,
                after=lambda _: trainer.curve.stopped,
            )

        return trainer.curve, trained(context, names, p, train)

    def _warnings(self, curve: Curve, done: int, steps: int) -> list[str]:
        if curve.stopped:
            return [f"training ended after {done} of {steps} steps, where the forget loss passed max_forget_loss"]
        return []


class DifferenceEditor(AscentEditor):
    """Gradient ascent with a retain loss as a registered editor."""

    name: ClassVar[str] = "gradient_difference"
    paper: ClassVar[str] = "arXiv 2203.12817"
    needs_retain: ClassVar[bool] = True
    schema: ClassVar[type[AscentParameters]] = DifferenceParameters


class NPOEditor(DifferenceEditor):
    """Negative preference optimisation as a registered editor."""

    name: ClassVar[str] = "npo"
    paper: ClassVar[str] = "arXiv 2404.05868"
    schema: ClassVar[type[AscentParameters]] = NPOParameters
    reads_reference: ClassVar[bool] = True

    def forget_loss(self) -> ForgetLoss:
        """The forget loss with this editor's beta."""
        beta = cast(NPOParameters, self.parameters).beta
        return lambda totals, lengths, reference: npo_loss(totals, lengths, reference, beta=beta)


class SimNPOEditor(DifferenceEditor):
    """SimNPO as a registered editor."""

    name: ClassVar[str] = "simnpo"
    paper: ClassVar[str] = "arXiv 2410.07163"
    schema: ClassVar[type[AscentParameters]] = SimNPOParameters

    def forget_loss(self) -> ForgetLoss:
        """The forget loss with this editor's beta and margin."""
        p = cast(SimNPOParameters, self.parameters)
        return lambda totals, lengths, reference: simnpo_loss(totals, lengths, reference, beta=p.beta, margin=p.margin)
