"""Selective Synaptic Dampening (arXiv 2308.07707): damp weights that matter far more to the records than to the rest.

With importances f over the records to forget and o over the data, both from `probes.fisher`,

    theta_i <- beta_i theta_i  where  f_i > alpha o_i,     beta_i = min(max(lambda o_i / f_i, floor), 1)

and every other weight keeps its bits. Two passes of gradients, no training step.

Scale. In the paper o covers the whole data D, the forget set included. Here r is measured on the retain set alone, so
that it can be kept and reused, and brought to that scale with w = |Df| / |D|: o = w f + (1 - w) r. Hence f / o <= 1/w:
alpha >= 1/w selects nothing, and no weight is damped below lambda w. Selecting by o at alpha is selecting by r at
alpha (1 - w) / (1 - alpha w). With `importance_scale: retain` o is r as measured (give D itself as the retain set to
have the paper's o measured directly).

Threshold. `alpha: auto` is the rule of ASSD (2402.10098): the percentile 100 - ln(1 + 100 w) of the finite ratios f / r
over all selected parameters, converted to the scale in use. It reads neither a test record nor the reference model.

To reproduce the official code: `estimator: batch`, `labels: gold`, `lambda: 1`, `floor: 0`, `include: ["*"]`,
`batch_size: 64`, `importance_scale: retain` with D in the published order as the retain set, and `alpha: 10` (for its
ViT 5 on full classes and 25 on sub-classes). LFSSD (2402.19308) is `estimator: label_free`.

Departures, each for a reason:
- importances are per example by default: a squared batch mean is no Fisher information, and changes with batch size,
  loader order and a short last batch;
- norm gains, position tables and token embeddings are left alone by default: the row of a token that only the records
  use has o = 0 and would be erased;
- 0/0, 0 * inf and lambda = inf are decided (nothing selected, or beta = 1) where the code yields NaN;
- weights of half precision are damped in fp32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, StrictInt, model_validator
from torch import Tensor

from probes.errors import IntegrityError, UnsupportedError, UsageError
from probes.fisher import importance
from probes.records import Record
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.importances import StoredImportance, describe, load_importance, save_importance
from unlearn.editors.selection import number_or_auto, select_parameters
from unlearn.mistakes import Mistakes
from unlearn.records.tokens import data_digest
from unlearn.requests.yamlfile import Document, Schema, parse
from unlearn.runs import cache

if TYPE_CHECKING:
    from probes.modelmap import ModelMap

Scale = Literal["full", "retain"]
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]
Number = Annotated[float, Field(strict=True)]

CHUNK = 1 << 22  # ratios ranked at once


class SSDParameters(Schema):
    """Hyper-parameters; the names are those of a method preset.

    Attributes:
        estimator: what importance is (`probes.fisher`).
        labels: the records' own or sampled from the model.
        alpha: selection threshold on the chosen scale, or "auto".
        lambda_: damping strength (`lambda` in files).
        floor: no weight is multiplied by less.
        importance_scale: "full" for o = w f + (1 - w) r, "retain" for o = r.
        forget_fraction: w; "auto" takes the forget set's share of the two sets given, which is right if the retain
            set is all the remaining training data. With a sample of it, give the true share.
        batch_size: records per batch.
        draws: passes averaged where signs or labels are drawn.
        include: globs of parameter names to edit, instead of the default selection.
        exclude: globs of parameter names to leave alone.
    """

    estimator: Literal["example", "token", "batch", "label_free"] = "example"
    labels: Literal["gold", "sampled"] = "gold"
    alpha: Annotated[float | Literal["auto"], number_or_auto(lambda x: x >= 0, "a number from 0")] = "auto"
    lambda_: Annotated[Number, Field(ge=0)] = Field(default=1.0, alias="lambda")
    floor: Annotated[Number, Field(ge=0, le=1)] = 0.0
    importance_scale: Scale = "retain"
    forget_fraction: Annotated[
        float | Literal["auto"], number_or_auto(lambda x: 0 < x <= 1, "a share above 0 and up to 1")
    ] = "auto"
    batch_size: Annotated[StrictInt, Field(ge=1)] = 64
    draws: Annotated[StrictInt, Field(ge=1)] = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.estimator == "label_free" and self.labels == "sampled":
            raise ValueError("expected `labels: gold` for `estimator: label_free`, which reads no labels")
        if self.draws > 1 and self.estimator != "token" and self.labels == "gold":
            raise ValueError("expected `draws: 1` unless `estimator: token` or `labels: sampled` draws something")
        return self


# --------------------------------------------------------------------------------------------------- the mathematics


@dataclass(frozen=True, slots=True)
class Damping:
    """What happened to one tensor: selected elements and their factors (None where nothing was selected)."""

    selected: int
    elements: int
    min_beta: float | None
    mean_beta: float | None


def full_set_importance(f: Tensor, r: Tensor, w: float) -> Tensor:
    """Importance over forget and retain set together, o = w f + (1 - w) r, for estimators that are means.

    Args:
        f: importance over the forget set.
        r: importance over the retain set, same shape.
        w: share of the forget set in the whole, in (0, 1].
    """
    return (w * f).add_(r, alpha=1 - w)


def dampen(
    weight: Tensor, o: Tensor, f: Tensor, alpha: float, lam: float = 1.0, floor: float = 0.0
) -> tuple[Tensor, Damping]:
    """Damp one tensor.

    Args:
        weight: any shape, a floating-point type; not modified.
        o: importance to what must stay, same shape, non-negative.
        f: importance to the records, same shape, non-negative.
        alpha: threshold; a tie is not selected. Infinity selects nothing.
        lam: strength. Infinity means no damping at all, also where o = 0.
        floor: least factor.

    Returns:
        The damped tensor (`weight` itself if nothing is selected) in the type of `weight`, and what happened.

    Raises:
        UnsupportedError: for integer weights.
    """
    if not weight.is_floating_point():
        raise UnsupportedError(f"expected floating-point weights, found {weight.dtype}; dequantise the checkpoint")
    mask = f > alpha * o  # false where alpha * o is inf * 0
    selected = int(mask.count_nonzero())
    if not selected:
        return weight, Damping(0, weight.numel(), None, None)
    kept, lost = o[mask], f[mask]  # lost > 0: it exceeds a non-negative number
    beta = (kept * lam).div_(lost).nan_to_num_(nan=1.0).clamp_(floor, 1.0)  # inf * 0 is NaN
    damped = weight.clone()
    damped[mask] = (weight[mask].to(beta.dtype) * beta).to(weight.dtype)
    return damped, Damping(selected, weight.numel(), float(beta.min()), float(beta.double().mean()))


def assd_percentile(w: float) -> float:
    """The percentile at which ASSD (2402.10098) cuts: 100 - ln(1 + 100 w), for a forget set that is w of the data."""
    return 100.0 - math.log1p(100.0 * w)


def assd_alpha(pairs: Pairs, w: float) -> float:
    """ASSD's threshold for the ratios f / r, that is on the retain scale.

    Args:
        pairs: called twice; each time gives (f, r), tensor by tensor, over all selected parameters.
        w: share of the forget set in the whole.

    Raises:
        UsageError: if no ratio is finite.
    """
    return ratio_percentile(pairs, assd_percentile(w))


def ratio_percentile(pairs: Pairs, q: float) -> float:
    """Exact percentile of the finite ratios f / r (in fp32), linearly interpolated as numpy does.

    Non-negative floats sort as their bit patterns, so two passes suffice: one counts the upper 16 bits of every ratio,
    one the lower 16 bits of those that share them with the ranks sought. Memory is two tables of 65,536 counts and a
    chunk, whatever the model's size; the order of the tensors does not matter.

    Args:
        pairs: called twice; each time gives (f, r) tensor by tensor.
        q: percentile in [0, 100].

    Raises:
        UsageError: if no ratio is finite.
    """
    upper = torch.zeros(1 << 16, dtype=torch.long)
    for bits in _ratio_bits(pairs()):
        upper += torch.bincount(bits >> 16, minlength=1 << 16)
    n = int(upper.sum())
    if not n:
        raise UsageError(
            "expected retain data with a gradient somewhere, found importance 0 everywhere, so alpha cannot be chosen; "
            "give another retain set, or alpha"
        )
    position = (n - 1) * q / 100.0
    ranks = (math.floor(position), math.ceil(position))
    ends = upper.cumsum(0)
    bins = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    lower = {b: torch.zeros(1 << 16, dtype=torch.long) for b in bins}
    for bits in _ratio_bits(pairs()):
        for b, counts in lower.items():
            counts += torch.bincount(bits[bits >> 16 == b] & 0xFFFF, minlength=1 << 16)

    def value(rank: int, b: int) -> float:
        within = rank - int(ends[b] - upper[b])
        low = int(torch.searchsorted(lower[b].cumsum(0), within, right=True))
        return float(torch.tensor([b << 16 | low], dtype=torch.int32).view(torch.float32))

    below, above = (value(rank, index) for rank, index in zip(ranks, bins, strict=True))
    return below + (above - below) * (position - ranks[0])


def _ratio_bits(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Bit patterns of the finite ratios, a chunk at a time."""
    for f, r in pairs:
        for a, b in zip(torch.split(f.flatten(), CHUNK), torch.split(r.flatten(), CHUNK), strict=True):
            ratio = a.float() / b.float()
            yield ratio[ratio.isfinite()].view(torch.int32)


def alpha_on_full_scale(alpha: float, w: float) -> float:
    """The threshold on f / o, o = w f + (1 - w) r, that selects as `alpha` does on f / r; always below 1/w."""
    return 1 / w if math.isinf(alpha) else alpha / (w * alpha + 1 - w)


def alpha_on_retain_scale(alpha: float, w: float) -> float:
    """The threshold on f / r that selects as `alpha` does on f / o; infinite from 1/w on, where nothing is selected."""
    return math.inf if alpha * w >= 1 else alpha * (1 - w) / (1 - alpha * w)


# ----------------------------------------------------------------------------------------------------------- the edit


@dataclass(slots=True)
class Dampening:
    """An edit for `write_edited`: damps the tensors that have importances, one at a time, and keeps count.

    Attributes:
        forget: importances f.
        retain: importances r, at least of the same tensors.
        alpha: threshold on the chosen scale.
        lam: strength.
        floor: least factor.
        scale: whether o = w f + (1 - w) r or o = r.
        w: share of the forget set in the whole.
        dampings: filled while editing, by name on disk.
    """

    forget: StoredImportance
    retain: StoredImportance
    alpha: float
    lam: float
    floor: float
    scale: Scale
    w: float
    dampings: dict[str, Damping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = self.forget.names - self.retain.names
        if missing:
            raise UsageError(
                f"expected retain importances of every edited tensor, found none of {min(missing)}; compute both alike"
            )

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        """The damped tensor, or None where nothing changes."""
        if name not in self.forget.names:
            return None
        f, r = self.forget.tensor(name), self.retain.tensor(name)
        o = full_set_importance(f, r, self.w) if self.scale == "full" else r
        damped, self.dampings[name] = dampen(weight, o, f, self.alpha, self.lam, self.floor)
        return damped if self.dampings[name].selected else None

    def statistics(self) -> dict[str, Any]:
        """Numbers about the edit, JSON values; `tensors` lists those in which something was selected."""
        hit = {name: damping for name, damping in self.dampings.items() if damping.selected}
        selected = sum(damping.selected for damping in hit.values())
        total = math.fsum(damping.selected * (damping.mean_beta or 0.0) for damping in hit.values())
        on_retain = alpha_on_retain_scale(self.alpha, self.w) if self.scale == "full" else self.alpha
        return {
            "alpha": self.alpha,
            "alpha_retain_scale": on_retain if math.isfinite(on_retain) else None,
            "forget_fraction": self.w,
            "selected": selected,
            "elements": sum(damping.elements for damping in self.dampings.values()),
            "min_beta": min((d.min_beta for d in hit.values() if d.min_beta is not None), default=None),
            "mean_beta": total / selected if selected else None,
            "tensors": {name: asdict(damping) for name, damping in sorted(hit.items())},
        }


class SSDEditor:
    """Selective Synaptic Dampening as a registered editor."""

    name: ClassVar[str] = "ssd"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2308.07707"
    needs_retain: ClassVar[bool] = True
    needs_forget: ClassVar[bool] = True
    inference_time: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), SSDParameters)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the edit may change.

        Raises:
            UsageError: if a glob matches nothing.
        """
        names = [name for name, _ in model_map.model.named_parameters()]
        p = self.parameters
        return select_parameters(names, model_map.default_exclude(), p.include, p.exclude)

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes over records: none forward only, one forward and backward per record and draw."""
        return {"forward": 0, "forward_backward": (n_forget + n_retain) * self.parameters.draws}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Measure importances, unless the retain set's are in the store, and write the damped copy.

        Raises:
            UsageError: no retain records, or `alpha: auto` has nothing to go by.
        """
        p = self.parameters
        if not context.retain:
            raise UsageError("expected retain records for ssd, found none; give some or let them be drafted")
        names = self.selected(context.model_map)
        retain, reused = self._retain(context, names)
        done = 0 if reused else len(context.retain)
        forget = self._measure(context, context.forget, names, "forget", done)
        w = _fraction(forget.metadata, retain.metadata) if p.forget_fraction == "auto" else p.forget_fraction
        alpha = self._alpha(forget, retain, w)
        edit = Dampening(forget, retain, alpha, p.lambda_, p.floor, p.importance_scale, w)
        deltas = write_edited(context.source, out, edit)
        statistics = edit.statistics()
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json", by_alias=True) | {"alpha": alpha, "forget_fraction": w},
            statistics=statistics,
            importances={
                "retain": retain.metadata | {"reused": reused},
                "forget": forget.metadata | {"reused": False},
            },
            warnings=self._warnings(context.model_map, names, alpha, w, statistics["selected"]),
        )

    def _retain(self, context: EditContext, names: Sequence[str]) -> tuple[StoredImportance, bool]:
        """Importances of the retain set and whether they were in the store."""
        key = None
        if context.cache_parts:  # without them nothing says which model this is
            p = self.parameters
            key = cache.key_of(
                kind="importance",
                version=self.version,
                estimator=p.estimator,
                labels=p.labels,
                batch_size=p.batch_size,
                draws=p.draws,
                seed=context.seed if p.estimator == "token" or p.labels == "sampled" else None,
                names=list(names),
                data=data_digest(context.retain),  # type: ignore[arg-type]
                **context.cache_parts,
            )
            found = cache.lookup(key, ".safetensors")
            if found is not None:
                try:
                    return load_importance(found), True
                except IntegrityError:
                    pass  # measured again and stored anew
        measured = self._measure(context, context.retain, names, "retain", 0)
        if key is not None:
            cache.store(key, measured.path)
        return measured, False

    def _measure(
        self, context: EditContext, records: Sequence[Record], names: Sequence[str], role: str, done: int
    ) -> StoredImportance:
        p = self.parameters
        total = done + len(records) + (len(context.forget) if role == "retain" else 0)
        measured = importance(
            context.model,
            records,  # type: ignore[arg-type]
            estimator=p.estimator,
            labels=p.labels,
            batch_size=p.batch_size,
            parameters=names,
            seed=context.seed,
            draws=p.draws,
            model_map=context.model_map,
            progress=lambda step, _: context.progress(done + step // p.draws, total),
        )
        digest = data_digest(records)  # type: ignore[arg-type]
        tensors = context.source.disk_tensors(context.model, measured.tensors, missing=0.0)
        return save_importance(context.work / f"{role}.safetensors", tensors, describe(measured) | {"digest": digest})

    def _alpha(self, forget: StoredImportance, retain: StoredImportance, w: float) -> float:
        if self.parameters.alpha != "auto":
            return self.parameters.alpha
        alpha = assd_alpha(lambda: ((forget.tensor(n), retain.tensor(n)) for n in sorted(forget.names)), w)
        return alpha_on_full_scale(alpha, w) if self.parameters.importance_scale == "full" else alpha

    def _warnings(self, model_map: ModelMap, names: Sequence[str], alpha: float, w: float, selected: int) -> list[str]:
        retain_scale = self.parameters.importance_scale == "retain"
        found = []
        if not retain_scale and alpha * w >= 1:
            found.append(
                f"alpha {alpha:g} is at least |D|/|Df| = {1 / w:g}, where nothing can be selected; lower alpha"
            )
        elif not selected:
            found.append("no weight was selected and the copy equals its source; lower alpha")
        if retain_scale and set(model_map.embeddings) & set(names):
            found.append(
                "token embeddings are edited by retain importances alone: rows of tokens that only the records use "
                "are erased; use importance_scale full or exclude them"
            )
        return found


def _fraction(forget: Mapping[str, Any], retain: Mapping[str, Any]) -> float:
    """The forget set's share, counted in what the estimator averages over, so that o is exactly the whole's mean."""
    unit = {"example": "n_examples", "token": "n_tokens"}.get(forget["estimator"], "n_batches")
    return float(forget[unit] / (forget[unit] + retain[unit]))
