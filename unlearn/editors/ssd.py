"""Selective Synaptic Dampening: weights far more important to the records than to what must stay are damped.

With f the importance of a weight to the records, o its importance to everything, and W the weight (arXiv 2308.07707):

    selected   f > alpha * o                       (strictly)
    damped     W <- beta * W,  beta = min(lambda * o / f, 1), and never below `floor`

No gradient step is taken: one pass of gradients over the records, one over the retain set, which is kept and reused.

Scale. The paper's o is over the full training set D, the records included. A user has the retain set: with
w = |Df| / |D| and additive importances, o = w f + (1 - w) r (`importance_scale: full`). Then f / o <= 1 / w, so
alpha >= 1 / w selects nothing at all, and no weight is damped below lambda * w. `retain` uses o = r as it is.

alpha: auto takes the percentile p = 100 - ln(1 + 100 w) of the finite ratios f / o over all selected tensors, the rule
of ASSD (2402.10098); f / o is monotone in f / r, so both scales select the same weights.

To reproduce the official code: `estimator: batch`, `batch_size: 64`, `alpha: 10`, `lambda: 1`, `floor: 0`,
`importance_scale: retain` with the full training set given as `retain`, `include: ["*"]`. It departs from that by
default because batch gradients are no Fisher diagonal (see `probes.fisher`): they depend on batch size and order.
Norm gains, position tables and embeddings are left alone by default: a token that occurs in the records alone would
have its whole embedding row damped to nothing. Division 0 / 0 and lambda * o of inf * 0, which poison weights in the
official code, are defined here: a weight with f = 0 is never touched, one with o = 0 < f falls to `floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.errors import UsageError
from probes.fisher import importance
from probes.modelmap import ModelMap
from unlearn import cache
from unlearn.editors.base import EditContext, EditResult
from unlearn.measure import records_digest
from unlearn.writer import write_edited


class SSDParameters(BaseModel):
    """Options of the editor; `configs/methods/ssd.yaml` comments each.

    Attributes:
        estimator: of both importances, see `probes.fisher`.
        labels: gold, or sampled from the model.
        alpha: selection threshold on f / o, or auto.
        lambda_: damping strength (`lambda` in YAML).
        floor: smallest beta.
        importance_scale: whether o is over records and retain set together (full) or the retain set alone (retain).
        batch_size: examples a batch.
        draws: passes averaged, for what is random.
        include: globs of parameter names to edit; empty for the default.
        exclude: globs of parameter names to leave alone, besides the default ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)

    estimator: Literal["example", "token", "batch", "label_free"] = "example"
    labels: Literal["gold", "sampled"] = "gold"
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    lambda_: Annotated[float, Field(gt=0, alias="lambda")] = 1.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    importance_scale: Literal["full", "retain"] = "full"
    batch_size: Annotated[int, Field(ge=1)] = 64
    draws: Annotated[int, Field(ge=1)] = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Damped(NamedTuple):
    """One damped tensor: the new weight, how many elements were selected, their smallest and summed beta."""

    weight: Tensor
    selected: int
    min_beta: float
    sum_beta: float


def full_scale(f: Tensor, r: Tensor, w: float) -> Tensor:
    """o = w f + (1 - w) r: the importance over records and retain set together, for additive importances."""
    return f * w + r * (1.0 - w)


def dampen(weight: Tensor, o: Tensor, f: Tensor, alpha: float, lam: float, floor: float) -> Damped:
    """Damp one tensor.

    Args:
        weight: any float type; the arithmetic is in float32 (float64 for float64 weights).
        o: importance to everything, shape of `weight`.
        f: importance to the records, shape of `weight`.
        alpha: selection threshold; infinite selects nothing.
        lam: damping strength; infinite damps only where o = 0.
        floor: smallest beta.

    Returns:
        The weight with only selected elements multiplied; an element with beta = 1 keeps its bits.
    """
    where = f > o * alpha  # inf * 0 is NaN, which is not smaller than anything
    selected = int(where.sum())
    if not selected:
        return Damped(weight, 0, 1.0, 0.0)
    beta = o[where].mul(lam).div_(f[where]).nan_to_num_(nan=0.0, posinf=1.0).clamp_(floor, 1.0)
    out = weight.clone()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out[where] = (weight[where].to(wide) * beta.to(wide)).to(weight.dtype)
    return Damped(out, selected, float(beta.min()), float(beta.double().sum()))


def percentile_rule(w: float) -> float:
    """ASSD's percentile 100 - ln(1 + 100 w) for a share w of records among all data."""
    return 100.0 - math.log1p(100.0 * w)


def percentile(parts: Callable[[], Iterable[Tensor]], q: float) -> float:
    """The q-th percentile of all finite positive values, exactly as `numpy.percentile`, one tensor in memory at a time.

    Positive float32 numbers sort as their bits do, so two histogram passes over 16 bits each find an order statistic.

    Args:
        parts: gives the tensors anew on each call; NaN, infinite and non-positive values do not count.
        q: in [0, 100].

    Returns:
        The percentile; infinity where there is no value.
    """

    def bits() -> Iterator[np.ndarray]:
        for part in parts():
            values = part.flatten().float()
            yield values[torch.isfinite(values) & (values > 0)].numpy().view(np.uint32)

    high = sum((np.bincount(chunk >> 16, minlength=1 << 16) for chunk in bits()), np.zeros(1 << 16, np.int64))
    total = int(high.sum())
    if not total:
        return math.inf
    rank = q / 100.0 * (total - 1)
    found = []
    for k in (math.floor(rank), math.ceil(rank)):
        bucket = int(np.searchsorted(np.cumsum(high), k, side="right"))
        before = int(high[:bucket].sum())
        low = sum(
            (np.bincount(chunk[chunk >> 16 == bucket] & 0xFFFF, minlength=1 << 16) for chunk in bits()),
            np.zeros(1 << 16, np.int64),
        )
        rest = int(np.searchsorted(np.cumsum(low), k - before, side="right"))
        found.append(float(np.array([(bucket << 16) | rest], np.uint32).view(np.float32)[0]))
    return found[0] + (found[1] - found[0]) * (rank - math.floor(rank))


class Tensors:
    """Importances in a safetensors file by disk name, read one at a time."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file = stack.enter_context(safe_open(path, framework="pt"))
        self.names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class SSDEditor:
    """Selective Synaptic Dampening as an editor of checkpoints."""

    name: ClassVar[str] = "ssd"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2308.07707"
    needs_retain: ClassVar[bool] = True

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        try:
            self.parameters = SSDParameters.model_validate(dict(parameters))
        except ValidationError as error:
            wrong = sorted({str(part["loc"][0]) for part in error.errors()})
            known = ", ".join(name.rstrip("_") for name in SSDParameters.model_fields)
            raise UsageError(
                f"expected ssd parameters among {known} with the values of configs/methods/ssd.yaml, found a mistake in "
                f"{', '.join(name for name in wrong if name.rstrip('_') in known) or 'an unknown parameter'}"
            ) from None
        if self.parameters.labels == "sampled" and self.parameters.estimator == "label_free":
            raise UsageError("expected labels: gold with estimator label_free, which reads no labels; found sampled")

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters that may be damped."""
        names = [name for name, parameter in model_map.model.named_parameters() if parameter.is_floating_point()]
        default = set(model_map.default_exclude())
        include = self.parameters.include
        for glob in (*include, *self.parameters.exclude):
            if not any(fnmatchcase(name, glob) for name in names):
                near = get_close_matches(glob, names, 3, 0.3)
                hint = f"; close names: {', '.join(near)}" if near else ""
                raise UsageError(f"expected globs that match parameter names, found {glob} matching none{hint}")
        kept = [
            name
            for name in names
            if (any(fnmatchcase(name, glob) for glob in include) if include else name not in default)
            and not any(fnmatchcase(name, glob) for glob in self.parameters.exclude)
        ]
        if not kept:
            raise UsageError("expected at least one parameter to edit, found that include and exclude leave none")
        return kept

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Backward passes over records; those over the retain set are saved when an earlier request made them."""
        draws = self.parameters.draws
        return {"records forward and backward": n_forget * draws, "retain forward and backward": n_retain * draws}

    def _importance(self, context: EditContext, which: str, names: list[str]) -> tuple[Path, dict[str, Any]]:
        """Importances of one set by disk name: from the cache, or computed and kept there."""
        p = self.parameters
        records = context.retain if which == "retain" else context.forget
        key = cache.key_of(
            kind="importance",
            version=self.version,
            parts=context.cache_parts,
            parameters=names,
            estimator=p.estimator,
            labels=p.labels,
            batch_size=p.batch_size,
            draws=p.draws,
            seed=context.seed,
            data=records_digest(records),
        )
        note: dict[str, Any] = {
            "digest": f"sha256:{key}",
            "n_examples": len(records),
            "n_tokens": sum(getattr(record, "n_tokens", 1) for record in records),
            "estimator": p.estimator,
            "labels": "none" if p.estimator == "label_free" else p.labels,
        }
        path = cache.lookup(key, ".safetensors") if which == "retain" else None
        if path is not None:
            return path, note | {"reused": True}
        found = importance(
            context.model,
            records,  # type: ignore[arg-type]
            estimator=p.estimator,
            labels=p.labels,
            batch_size=p.batch_size,
            parameters=names,
            seed=context.seed,
            draws=p.draws,
            model_map=context.model_map,
            progress=context.progress,
        )
        path = context.work / f"{which}.safetensors"
        save_file(context.source.disk_tensors(context.model, found.tensors, missing=0.0), path)
        if which == "retain":
            cache.store(key, path)
        return path, note | {"reused": False}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Compute importances, choose alpha, write the damped copy tensor by tensor."""
        p = self.parameters
        names = self.selected(context.model_map)
        retain_file, retain_note = self._importance(context, "retain", names)
        forget_file, forget_note = self._importance(context, "forget", names)
        unit = "n_tokens" if p.estimator == "token" else "n_examples"
        w = forget_note[unit] / (forget_note[unit] + retain_note[unit])
        with ExitStack() as stack:
            f_all, r_all = Tensors(forget_file, stack), Tensors(retain_file, stack)

            def both(name: str) -> tuple[Tensor, Tensor]:
                f, r = f_all[name], r_all[name]
                return f, full_scale(f, r, w) if p.importance_scale == "full" else r

            def ratios() -> Iterator[Tensor]:
                for name in sorted(f_all.names):
                    f, o = both(name)
                    yield f / o

            alpha = percentile(ratios, percentile_rule(w)) if p.alpha == "auto" else float(p.alpha)
            rows: dict[str, Damped] = {}

            def edit(name: str, weight: Tensor) -> Tensor | None:
                if name not in f_all.names:
                    return None
                f, o = both(name)
                damped = dampen(weight, o, f, alpha, p.lambda_, p.floor)
                rows[name] = damped._replace(weight=torch.empty(0))
                return damped.weight if damped.selected else None

            deltas = write_edited(context.source, out, edit)
        selected = sum(row.selected for row in rows.values())
        statistics = {
            "alpha": alpha,
            "records_share": w,
            "selected": selected,
            "eligible": sum(context.source.load_tensor(name).numel() for name in rows),
            "min_beta": min((row.min_beta for row in rows.values() if row.selected), default=1.0),
            "mean_beta": sum(row.sum_beta for row in rows.values()) / selected if selected else 1.0,
            "tensors": {name: row.selected for name, row in sorted(rows.items()) if row.selected},
        }
        warnings = []
        if p.importance_scale == "full" and alpha >= 1.0 / w:
            warnings.append(
                f"alpha = {alpha:g} is at least |D| / |Df| = {1 / w:g}: no weight can be selected, the edit does nothing."
            )
        elif not selected:
            warnings.append("No weight was selected: the copy has the weights of the original.")
        resolved = p.model_dump(by_alias=True) | {"alpha": alpha, "alpha_rule": "percentile" if p.alpha == "auto" else "given"}
        return EditResult(
            deltas=deltas,
            parameters=resolved,
            statistics=statistics,
            importances={"retain": retain_note, "forget": forget_note},
            warnings=warnings,
        )
