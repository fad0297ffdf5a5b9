"""Activation patching: at what depth an edit has erased a record, if at any (Unlearning Depth Score, 2605.24614).

Three models of one architecture: O that held the record, R that never did, U the edited one. For block l, O runs on the
record with the output of l, at all positions, put in the place of its own: what the rest of O makes of another model's
state. With L the mean loss per completion token

    effect_l = L(O, h_l from R) - L(O)          what is missing in R's state at l: nothing below where O recalls it
    lost_l   = L(O, h_l from U) - L(O)
    erased_l = lost_l / effect_l within [0, 1]                where effect_l is at least `minimum`
    erased   = sum_l effect_l erased_l / sum_l effect_l       over those layers

0: as in O, the state of the edited model gives the rest of O all it needs; 1: no more than the state of a model that
never held the record. An edit of the last blocks alone leaves the layers before them intact, and scores low whatever
the model puts out. U = O gives 0 and U = R gives 1 exactly; a record that R's states do not make unlikelier in O, one
that O did not know, cannot be scored.

A base that was never fine-tuned can stand for R; its states then differ from O's in more than the records, which makes
effects larger and the erased share smaller.

No more than two models need to be alive at a time: the states of the others are captured first.

Shape letters: R records, L layers, T tokens of one record, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import UsageError
from probes.inside.states import check_layers, completions, language_map, record_means, run, token_scores
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.records import TokenRecord

MINIMUM = 0.05  # nats per token that R's state has to cost before a layer says anything of a record

States = Mapping[int, Sequence[Tensor]]  # block -> for each record [T, d], on the CPU


@dataclass(frozen=True, slots=True, eq=False)
class Depth:
    """How far a record is erased, layer by layer.

    Attributes:
        record_ids: of the records, in order.
        layers: indices of the blocks.
        effect: [R, L] nats per token that the reference's state costs.
        lost: [R, L] the same for the edited model's state.
        share: [R, L] erased share in [0, 1]; NaN where the effect is below the minimum.
        erased: [R] the average, weighted by effect; NaN where no layer counts.
    """

    record_ids: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...]
    effect: NDArray[np.float64] = field(repr=False)
    lost: NDArray[np.float64] = field(repr=False)
    share: NDArray[np.float64] = field(repr=False)
    erased: NDArray[np.float64] = field(repr=False)

    @property
    def resolvable(self) -> NDArray[np.bool_]:
        """[R] whether a record could be scored."""
        found: NDArray[np.bool_] = np.isfinite(self.erased)
        return found

    @property
    def by_layer(self) -> NDArray[np.float64]:
        """[L] erased share of each layer, records weighted by effect; NaN where none counts."""
        return _weighted(self.share.T, self.effect.T)


def _weighted(share: NDArray[np.float64], effect: NDArray[np.float64]) -> NDArray[np.float64]:
    """[a] mean of shares [a, b] by effect over those that are known; NaN where none is."""
    known = np.isfinite(share)
    weight = np.where(known, effect, 0.0)
    total = weight.sum(1)
    summed = (weight * np.where(known, share, 0.0)).sum(1)
    found: NDArray[np.float64] = np.divide(summed, total, out=np.full(len(total), np.nan), where=total > 0)
    return found


def capture(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> dict[int, list[Tensor]]:
    """States of a model at all positions of records, to be put into another.

    Args:
        model: a causal language model; left as found.
        records: at least one, and few: tokens x layers x width numbers are kept.
        layers: indices of blocks; all of them by default.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.

    Returns:
        Block -> for each record [T, d], on the CPU in the model's own type.

    Raises:
        UsageError, UnsupportedError, ResourceError: see `probes.inside.states.run`.
    """
    model_map = language_map(model, model_map)
    chosen = check_layers(model_map, layers)
    found: dict[int, list[Tensor]] = {layer: [torch.zeros(0)] * len(records) for layer in chosen}

    def keep(layer: int, batch: list[int], where: Tensor, output: Tensor) -> None:
        for row, i in enumerate(batch):
            found[layer][i] = output[row, : len(records[i].ids)].to("cpu", copy=True)

    run(model_map, records, chosen, keep, batch_tokens=batch_tokens)
    return found


def patched_losses(
    model: nn.Module,
    records: Sequence[TokenRecord],
    states: States,
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Losses of a model with another's states in the place of its own, a layer at a time.

    Args:
        model: a causal language model; left as found.
        records: those that the states were captured on, in the same order.
        states: of `capture`, from a model of the same architecture.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.
        progress: called with (layers done, layers in all).

    Returns:
        [R, L] mean loss per completion token in nats. It costs a forward pass for each layer.

    Raises:
        UsageError: states of other records or of a model of another shape.
        UnsupportedError, ResourceError: see `probes.inside.states.run`.
    """
    model_map = language_map(model, model_map)
    found = np.zeros((len(records), len(states)))
    for place, layer in enumerate(sorted(states)):
        check_layers(model_map, [layer])
        found[:, place] = _losses(model_map, records, layer, states[layer], batch_tokens)
        if progress:
            progress(place + 1, len(states))
    return found


def losses(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> NDArray[np.float64]:
    """[R] mean loss per completion token in nats, of the model as it is. Arguments and errors as `patched_losses`."""
    return _losses(language_map(model, model_map), records, None, (), batch_tokens)


def _losses(
    model_map: ModelMap,
    records: Sequence[TokenRecord],
    layer: int | None,
    states: Sequence[Tensor],
    batch_tokens: int | None,
) -> NDArray[np.float64]:
    """[R] mean loss of each record, with `states` of each record behind `layer`; as the model is for no layer."""
    lengths = [len(record.ids) for record in records]
    if layer is not None and [len(one) for one in states] != lengths:
        raise UsageError("expected states of the same records, found others; capture them on these records")
    found = np.zeros(len(records))

    def put(layer: int, batch: list[int], where: Tensor, output: Tensor) -> Tensor:
        if states[batch[0]].shape[-1] != output.shape[-1]:
            raise UsageError(
                f"expected states of width {output.shape[-1]}, found {states[batch[0]].shape[-1]}; "
                "patching needs models of one architecture"
            )
        patched = output.clone()
        for row, i in enumerate(batch):
            patched[row, : lengths[i]] = states[i].to(output)
        return patched

    def finish(batch: list[int], hidden: Tensor) -> None:
        log_prob, _ = token_scores(model_map, hidden, completions(records, batch))
        found[batch] = -record_means(log_prob, records, batch)

    run(model_map, records, [] if layer is None else [layer], put, finish=finish, batch_tokens=batch_tokens)
    return found


def depth(
    records: Sequence[TokenRecord],
    layers: Sequence[int],
    plain: NDArray[np.float64],
    edited: NDArray[np.float64],
    reference: NDArray[np.float64],
    *,
    minimum: float = MINIMUM,
) -> Depth:
    """The score from losses.

    Args:
        records: R of them.
        layers: L blocks.
        plain: [R] losses of O.
        edited: [R, L] losses of O with the states of U.
        reference: [R, L] losses of O with the states of R.
        minimum: effect in nats per token from which a layer counts.
    """
    effect, lost = reference - plain[:, None], edited - plain[:, None]
    share = np.divide(lost, effect, out=np.full(effect.shape, np.nan), where=effect >= minimum).clip(0.0, 1.0)
    names = tuple(record.record_id for record in records)
    return Depth(names, tuple(layers), effect, lost, share, _weighted(share, effect))


def patching(
    original: nn.Module,
    edited: nn.Module,
    reference: nn.Module,
    records: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    minimum: float = MINIMUM,
    batch_tokens: int | None = None,
) -> Depth:
    """The score of three live models.

    Args:
        original: O, which held the records.
        edited: U.
        reference: R, which never held them.
        records: at least one.
        layers: indices of blocks; all of them by default.
        minimum: effect in nats per token from which a layer counts.
        batch_tokens: padded tokens a batch.

    Returns:
        The score. It costs one forward pass of R and U each, and 2 L + 1 of O.

    Raises:
        UsageError: no records, or models of other shapes.
        UnsupportedError, ResourceError: see `probes.inside.states.run`.
    """
    chosen = check_layers(language_map(original, None), layers)
    found = [
        patched_losses(
            original,
            records,
            capture(source, records, layers=chosen, batch_tokens=batch_tokens),
            batch_tokens=batch_tokens,
        )
        for source in (edited, reference)
    ]
    plain = losses(original, records, batch_tokens=batch_tokens)
    return depth(records, chosen, plain, found[0], found[1], minimum=minimum)
