"""GS-LoRA and GS-LoRA++: low-rank adapters that push records to a bounded loss, in as few blocks as will do.

Adapters stand beside the feed-forward projections of every block, all else is frozen. With L_i the mean loss of record
i over its completion tokens (or of an image), each step minimises over one batch of records to forget and one of
records to keep

    forget_weight mean_i max(0, bound - L_i) + mean_j L_j
        [++]   + prototype_forget_weight mean_i max(0, b_i - D_i) + prototype_retain_weight mean_j D_j
        [earlier requests]   + earlier_weight mean_k max(0, bound - L_k) + earlier_edit_weight (what they changed most)

and then takes a proximal step of the group lasso over blocks (`unlearn.editors.groupsparse`), after which some groups
are exactly zero. D is the distance from the prototype of the record's class or person under the checkpoint as loaded
(`unlearn.editors.prototypes`). The records k are those that earlier requests forgot on the way to this checkpoint: they
are to stay forgotten (`unlearn.editors.protect`; for the last term, `unlearn.editors.regions`). In the end the adapters
are merged into the weights: the copy is a checkpoint like any other, and the tensors of blocks whose group is zero keep
their bytes. (arXiv 2403.11530; ++ 2501.09705)

The bounds. A label whose probability is below 1 / classes is never the prediction, that is a loss above ln(classes);
`bound: auto` is twice that, so that unseen images of the class follow. Fluent text that a model has not seen costs it
about a quarter to a third of ln(vocabulary) a token; auto is a third. `prototype_bound: auto` is, for each class, the
mean distance of its prototype from those of the retain set: as far from itself as others are.

The end. Training ends early when, at some step, every record to forget, and every one forgotten earlier, has reached
the bound (up to `bound_tolerance` of it) where it was last seen, and over the last `patience` steps the penalty was on,
no group went to zero or came back, and the retain records had on average no more than `retain_tolerance` nats above
what the same records had before. These are losses of the training batches. All these records are scored afterwards, and
each is what its part of the objective is about; the control set and the reference decide nothing, and no record is held
out.

A group that has been zero for `drop_after` steps is taken out of the model for good: passes no longer compute it, and
backward passes end at the lowest block that is left.

Limits. The bound is on what the records' own wording costs. Of the blocks that changed, and of what they can still say
when asked otherwise, an audit has to tell. Whether a group reaches zero depends on the learning rate, the steps and
`sparsity` together; training that ends early may leave groups that longer training would have emptied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes import training
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import out_of_memory
from probes.records import ImageRecord, Record, TokenRecord
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.adapterfolder import write_adapter
from unlearn.editors.base import EditContext, EditResult, planned_passes
from unlearn.editors.groupsparse import Group, Grouping, groups_of, product_norm
from unlearn.editors.gs_lora_training import Adapted, Side, Trainer
from unlearn.editors.linearmaps import swapped
from unlearn.editors.lossbatches import Batches, ImageBatches, TextBatches, n_visited
from unlearn.editors.protect import Replay, n_below
from unlearn.editors.prototypes import Embeddings
from unlearn.editors.regions import Regions, held_entries
from unlearn.editors.selection import MapParameters, number_or_auto
from unlearn.editors.trainable import Added, Count, Number, Positive, Size, TrainingParameters, expect_stored, selected
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, parse

if TYPE_CHECKING:
    from probes.modelmap import ModelMap

Tolerance = Annotated[float, Field(strict=True, ge=0, lt=1)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
_FromZero = number_or_auto(lambda x: x >= 0, "a number from 0")


class GSLoRAParameters(MapParameters):
    """Hyper-parameters; the names are those of a method preset.

    Attributes:
        blocks: indices in depth order, negative ones from the end; "auto" takes every block.
        roles: roles of the model map (gate, up, down, q, v, ...); "auto" takes the feed-forward ones.
        include: globs of parameter names, in place of blocks and roles.
        exclude: globs of parameter names to leave alone.
        groups: what is kept or dropped together: the adapters of a "block", of a "projection", or of an "expert"
            where experts are modules of their own.
        rank: of the adapters.
        adapter_scale: their factor, alpha / rank.
        bound: nats a token or image; "auto" as in the module's docstring; 0 forgets nothing and fine-tunes on the
            retain set.
        bounded_over: "record": each record has its own bound; "batch": the mean of a batch has, as published.
        forget_weight: factor of the bounded loss.
        sparsity: the factor `a` of the penalty; 0 for none.
        penalty: "proximal", with exact zeros; "published": the factor times the norms of A and B as a loss.
        sparsity_warm_up: passes over the records to forget before the penalty begins.
        drop_after: a group that has been zero for so many steps stays zero; None for never.
        prototype_forget_weight: factor of the forget loss on prototypes; above 0 this is GS-LoRA++.
        prototype_retain_weight: factor of the retain loss on prototypes.
        prototype_bound: nats; "auto" as in the module's docstring.
        earlier_weight: factor of the bounded loss of the records that earlier requests forgot; 0 leaves them out.
        earlier_edit_weight: factor of the penalty on changing again what earlier edits changed most; 0 for none.
        earlier_edit_share: of the entries of each matrix, those that are held so.
        ema_decay: of a moving average of the merged weights, which the copy then gets; None for the last step's.
        ema_warm_up: passes over the records to forget before it begins.
        learning_rate: AdamW's peak rate; 0 changes nothing.
        weight_decay: AdamW's, on A and B.
        warm_up: steps over which the rate rises.
        decay: "linear" lets the rate fall towards 0 by the last step.
        epochs: how often every record to forget is seen at most; 0 changes nothing.
        steps: at most this many steps instead.
        batch_size: records to forget a step.
        retain_batch_size: retain records a step.
        earlier_batch_size: records forgotten earlier a step.
        stop_early: whether training may end before the last step.
        bound_tolerance: share of the bound that may be missing then.
        retain_tolerance: nats that the retain loss may then be above where it began.
        patience: steps that are looked back on.
    """

    groups: Grouping = "block"
    rank: Size = 8
    adapter_scale: Positive = 1.0
    bound: Annotated[float | Literal["auto"], _FromZero] = "auto"
    bounded_over: Literal["record", "batch"] = "record"
    forget_weight: Number = 1.0
    sparsity: Number = 0.1
    penalty: Literal["proximal", "published"] = "proximal"
    sparsity_warm_up: Count = 0
    drop_after: Size | None = 50
    prototype_forget_weight: Number = 0.0
    prototype_retain_weight: Number = 0.0
    prototype_bound: Annotated[float | Literal["auto"], _FromZero] = "auto"
    earlier_weight: Number = 1.0
    earlier_edit_weight: Number = 0.0
    earlier_edit_share: Share = 0.02
    ema_decay: Share | None = None
    ema_warm_up: Count = 0
    learning_rate: Number = 1e-3
    weight_decay: Number = 0.0
    warm_up: Count = 0
    decay: Literal["constant", "linear"] = "linear"
    epochs: Count = 200
    steps: Count | None = None
    batch_size: Size = 16
    retain_batch_size: Size = 16
    earlier_batch_size: Size = 16
    stop_early: bool = True
    bound_tolerance: Tolerance = 0.1
    retain_tolerance: Number = 0.02
    patience: Size = 100

    def planned(self, n: int) -> int:
        """Steps over n records to forget, at most."""
        if not self.learning_rate:
            return 0
        return self.epochs * self.per_epoch(n) if self.steps is None else self.steps

    def per_epoch(self, n: int) -> int:
        """Steps in which each of n records to forget is seen once."""
        return math.ceil(n / self.batch_size)

    @property
    def plus(self) -> bool:
        """Whether prototypes take part."""
        return self.prototype_forget_weight > 0 or self.prototype_retain_weight > 0


# -------------------------------------------------------------------------------------------------------- the editor


class GSLoRAEditor:
    """GS-LoRA and GS-LoRA++ as a registered editor."""

    name: ClassVar[str] = "gs_lora"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2403.11530, 2501.09705"
    needs_retain: ClassVar[bool] = True
    needs_forget: ClassVar[bool] = True
    inference_time: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), GSLoRAParameters)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the edit may change.

        Raises:
            UsageError: a glob, block or role that matches nothing, nothing is left, or no linear maps.
            UnsupportedError: stacked experts.
        """
        p = self.parameters
        if not any(
            isinstance(model_map.model.get_submodule(q.module), (nn.Linear, Conv1D)) for q in _inside(model_map)
        ):
            raise UsageError(f"expected linear maps in the blocks for {self.name}, found none; use another method")
        roles = p.roles
        if roles == "auto" and not p.include:
            forward = (q.role for block in model_map.blocks for q in block.feed_forward)
            roles = tuple(dict.fromkeys(role for role in forward if role != "router"))
        chosen = TrainingParameters(blocks=p.blocks, roles=roles, include=p.include, exclude=p.exclude)
        try:
            return selected(model_map, chosen)
        except UnsupportedError:
            raise UnsupportedError(
                f"expected linear maps for the adapters of {self.name}, found stacked experts; exclude them, or name "
                "the roles of the attention"
            ) from None

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes over records at most: those before training, and those of all steps planned."""
        p = self.parameters
        steps = p.planned(n_forget)
        seen, kept = n_visited(n_forget, p.batch_size, steps), n_visited(n_retain, p.retain_batch_size, steps)
        forward = min(n_forget, seen) if p.plus else 0
        forward += min(n_retain, kept) if p.plus or p.stop_early else 0
        return {"forward": forward, "forward_backward": seen + kept}

    def replay_passes(self, n_forget: int, n_earlier: int) -> dict[str, int]:
        """Passes over records forgotten earlier at most: one before and one after training, and those of all steps."""
        p = self.parameters
        steps = p.planned(n_forget)
        if not steps or not p.earlier_weight or not n_earlier:
            return {"forward": 0, "forward_backward": 0}
        return {"forward": 2 * n_earlier, "forward_backward": n_visited(n_earlier, p.earlier_batch_size, steps)}

    def bound(self, model_map: ModelMap) -> float:
        """The bound on the forget loss, nats."""
        if self.parameters.bound != "auto":
            return self.parameters.bound
        return math.log(model_map.vocab_size) * (1 / 3 if model_map.task == "causal_lm" else 2)

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Train, merge what is not zero, put the model back and write the edited copy.

        The adapters that are not zero are left in `context.work / "adapter"`, in peft's format. They undo the edit:
        whoever keeps them keeps them private. With `ema_decay` the copy is not their product and none are left.

        Raises:
            UsageError: no records to forget or to keep, a selection that matches nothing, or a loss that is no longer
                finite.
            UnsupportedError: parameters that the checkpoint does not store, or stacked experts.
            ResourceError: a batch does not fit in memory.
        """
        p = self.parameters
        if not context.forget or not context.retain:
            which = "retain records" if context.forget else "records to forget"
            raise UsageError(f"expected {which} for {self.name}, found none; give some")
        names = self.selected(context.model_map)
        expect_stored(context.source, context.model, names)
        steps, bound = p.planned(len(context.forget)), self.bound(context.model_map)
        groups = groups_of(context.model_map, names, p.groups)
        changes, statistics, warnings = dict[str, Tensor](), _nothing_done(groups), list[str]()
        if steps:
            try:
                changes, statistics, warnings = self._train(context, groups, steps, bound)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise ResourceError(
                    "expected memory for one step of training, found too little; lower batch_size and "
                    "retain_batch_size, or train fewer blocks"
                ) from None
        deltas = write_edited(
            context.source, out, Added(context.source.disk_tensors(context.model, changes, missing=0.0))
        )
        sizes = {name: parameter.numel() for name, parameter in context.model.named_parameters()}
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json") | {"steps": p.planned(len(context.forget)), "bound": bound},
            statistics=statistics | {"elements": sum(sizes[name] for name in names)},
            warnings=warnings,
        )

    def _train(
        self, context: EditContext, groups: Sequence[Group], steps: int, bound: float
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
        """The changes that are not zero in float64 on the CPU, statistics and warnings; the model is as before."""
        p, model_map = self.parameters, context.model_map
        sizes = (len(context.forget), len(context.retain), len(context.earlier))
        planned, ran = sum(planned_passes(self, *sizes).values()), 0

        def progress(records: int) -> None:
            nonlocal ran
            ran += records
            context.progress(ran, planned)

        def batched(records: Sequence[Record]) -> Batches:
            if isinstance(records[0], TokenRecord):
                return TextBatches(model_map, cast("Sequence[TokenRecord]", records), {})
            return ImageBatches(context.model, cast("Sequence[ImageRecord]", records))

        def side(records: Sequence[Record], size: int, seed: int) -> Side:
            rows = list(training.batches(len(records), size, steps, seed))
            embeddings = Embeddings(model_map, records) if p.plus else None  # type: ignore[arg-type]
            return Side(batched(records), rows, embeddings)

        replay = None
        if context.earlier and p.earlier_weight:
            rows = list(training.batches(len(context.earlier), p.earlier_batch_size, steps, context.seed + 2))
            replay = Replay(batched(context.earlier), rows, bound=bound, weight=p.earlier_weight, ran=progress)
        held = held_entries(context.model, context.earlier_edits, p.earlier_edit_share) if p.earlier_edit_weight else {}
        with _adapters(context, groups, p) as adapted:
            pairs = {path: pair for a in adapted for path, pair in a.pairs.items()}
            regions = Regions(held, pairs, scale=p.adapter_scale, weight=p.earlier_edit_weight) if held else None

            def merged() -> dict[str, Tensor]:
                alive = [q.parameter for a in adapted if not a.dropped for q in a.group.projections]
                found = training.merged_deltas(context.model, model_map) if alive else {}
                return {name: found[name] for name in alive}

            trainer = Trainer(
                p=p,
                model=context.model,
                groups=adapted,
                forget=side(context.forget, p.batch_size, context.seed),
                retain=side(context.retain, p.retain_batch_size, context.seed + 1),
                bound=bound,
                steps=steps,
                progress=progress,
                merged=merged,
                replay=replay,
                regions=regions,
            )
            trainer.prepare()
            before = replay.losses() if replay is not None else []
            training.fit(
                [half for a in adapted for half in a.tensors],
                trainer.step,
                steps=steps,
                learning_rate=p.learning_rate,
                weight_decay=p.weight_decay,
                warm_up=p.warm_up,
                decay=p.decay,
                after=trainer.after,
            )
            active = [a for a in adapted if a.size]
            kept = {q.parameter for a in active for q in a.group.projections}
            averaged = trainer.average is not None and trainer.average.value
            values = averaged or merged()
            changes = {name: value.to("cpu", torch.float64) for name, value in values.items() if name in kept}
            statistics = _statistics(trainer)
            if regions is not None:
                statistics["earlier_edits"] = {
                    "edits": len(context.earlier_edits),
                    "elements": sum(map(len, regions.held.values())),
                    "penalty": regions.values,
                }
            if active and not averaged:
                left = {path: pair for a in active for path, pair in a.pairs.items()}
                first = context.model.get_submodule(next(iter(left)))
                statistics["adapter"] = write_adapter(
                    context.work / "adapter",
                    left,
                    scale=p.adapter_scale,
                    transposed=isinstance(cast(Any, first).get_base_layer(), Conv1D),
                    language=model_map.task == "causal_lm",
                )
        warnings = _warnings(trainer, steps)
        if replay is not None:
            statistics["earlier"], more = _protected(context.model, replay, before, changes, bound, p.bound_tolerance)
            warnings += more
        return changes, statistics, warnings


def _inside(model_map: ModelMap) -> Iterator[Any]:
    return (q for block in model_map.blocks for q in (*block.attention, *block.feed_forward))


@contextmanager
def _adapters(context: EditContext, groups: Sequence[Group], p: GSLoRAParameters) -> Iterator[list[Adapted]]:
    """Adapters of the groups; those that only share roles with them are taken out again at once."""
    model, listed = context.model, [q for group in groups for q in group.projections]
    wanted = {q.module for q in listed}
    with training.adapters(
        model,
        context.model_map,
        rank=p.rank,
        alpha=p.adapter_scale * p.rank,
        roles={q.role for q in listed},
        first_block=min(group.block for group in groups),
        seed=context.seed,
    ):
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        others: list[Adapted] = []
        for projection in _inside(context.model_map):
            layer: Any = model.get_submodule(projection.module)
            if hasattr(layer, "lora_A"):
                (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
                pair = {projection.module: (down.weight, up.weight)}
                if projection.module in wanted:
                    pairs |= pair
                else:
                    others.append(Adapted(Group(projection.module, -1, (projection,)), pair))
        for other in others:
            other.drop(model)
        yield [Adapted(group, {q.module: pairs[q.module] for q in group.projections}) for group in groups]


def _nothing_done(groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "steps": 0,
        "stopped": False,
        "groups": [{"name": group.name, "block": group.block, "norm": 0.0} for group in groups],
        "active_groups": 0,
    }


def _statistics(trainer: Trainer) -> dict[str, Any]:
    curve, scale = trainer.curve, trainer.p.adapter_scale
    rows = [
        {"name": a.group.name, "block": a.group.block, "norm": product_norm(list(a.pairs.values()), scale)}
        for a in trainer.groups
    ]
    done = len(curve.objective)
    found: dict[str, Any] = {
        "steps": done,
        "stopped": done < trainer.steps,
        "groups": rows,
        "active_groups": curve.active[-1],
        "below_bound": trainer.short(),
        "objective": curve.objective,
        "forget_loss": curve.forget_loss,
        "retain_loss": curve.retain_loss,
        "active": curve.active,
    }
    if trainer.p.stop_early:
        found["retain_rise"] = trainer.retain_rise(trainer.p.patience)
    return found


def _protected(
    model: nn.Module,
    replay: Replay,
    before: Sequence[float],
    changes: dict[str, Tensor],
    bound: float,
    tolerance: float,
) -> tuple[dict[str, Any], list[str]]:
    """What became of the records forgotten earlier: counts and means, and a warning where some lie below the bound.

    They are measured in the copy's weights, which with `ema_decay` are not those of the last step.
    """
    weights = {name: weight for name, weight in model.named_parameters() if name in changes}
    copied = {n: (w.detach() + changes[n].to(w.device)).to(w.dtype) for n, w in weights.items()}
    with swapped(model, copied):
        after = replay.losses()
    low = [n_below(losses, bound, tolerance) for losses in (before, after)]
    found = {
        "records": len(before),
        "loss_before": sum(before) / len(before),
        "loss_after": sum(after) / len(after),
        "below_bound_before": low[0],
        "below_bound_after": low[1],
        "pushed": replay.pushed,
        "loss": replay.means,
    }
    if not low[1]:
        return found, []
    return found, [
        f"{low[1]} of {len(after)} records forgotten earlier are below the bound of {bound:.2f} nats in the copy; "
        f"before this edit {low[0]} were"
    ]


def _warnings(trainer: Trainer, steps: int) -> list[str]:
    p, found = trainer.p, []
    if not trainer.curve.active[-1]:
        found.append("the penalty set every group to zero: the copy is the original; lower sparsity")
    elif short := trainer.short():
        found.append(
            f"{short} of {len(trainer.latest)} records to forget had not reached the bound of {trainer.bound:.2f} nats "
            "where they were last seen in training"
        )
    if p.stop_early and (rise := trainer.retain_rise(p.patience)) > p.retain_tolerance:
        found.append(f"the retain loss ended {rise:.2f} nats above where it began, more than retain_tolerance")
    if p.sparsity and steps <= trainer.penalty_from:
        found.append(f"the penalty never began: {steps} steps end within sparsity_warm_up")
    return found
