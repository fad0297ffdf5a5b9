"""Summed losses of records and the weighted gradients of these sums, from one forward pass a batch.

What is wanted is the gradient of sum_i c_i L_i, where L_i is the sum of record i's losses (one per completion token, or
one for an image) and the factors c_i depend on the L_i themselves. So a batch is run once; its L_i are handed out with
a function that takes the c_i and goes backwards.

The logits of a batch of texts exist a chunk of positions at a time. The loss l_n of position n depends on its own final
hidden state h_n alone, so while a chunk's logits are there dl_n / dh_n is taken too, [N, d] in all; later each row is
scaled by its record's factor. Where the head trains as well its gradient is a sum over positions with factors that are
not known yet, and the chunks are visited a second time.

l_n is the cross entropy of the record's own token or label, or the divergence KL(original || as it stands), in nats,
from the model's predictions before training. Of these the final hidden states are kept, not the logits.

Shape letters: P records in one part of a batch, T padded tokens, N completion positions of a part, C of one chunk, d
width, V vocabulary or classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.classify import class_logits
from probes.errors import UnsupportedError
from probes.likelihood import CHUNK_ELEMENTS, check_records, default_batch_tokens
from probes.passes import sum_type
from probes.records import ImageRecord, TokenRecord, length_batches, pad, predicting
from probes.taps import IMAGES
from unlearn.editors.linearmaps import swapped

if TYPE_CHECKING:
    from probes.modelmap import ModelMap


class Batches(ABC):
    """Records as batches that can be scored and trained on; a record is named by its row.

    Attributes:
        lengths: losses of each record: completion tokens, or 1 for an image.
    """

    lengths: list[int]

    @abstractmethod
    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a batch in parts that are run one after another."""

    @abstractmethod
    def totals(
        self, rows: Sequence[int], originals: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The summed losses of some records.

        Args:
            rows: a part.
            originals: from `originals`, for the divergence from the original model; None for the cross entropy.

        Returns:
            [P] sums in nats, float64 on the CPU, and a function that backpropagates their sum weighted by factors [P];
            it serves once.
        """

    @abstractmethod
    def originals(self, rows: Sequence[int]) -> list[Tensor]:
        """What the model makes of some records as it stands, on the CPU: states [n_i, d] of a text, logits [V]."""


class TextBatches(Batches):
    """Texts of a causal language model.

    Args:
        model_map: made before adapters are in place.
        records: texts.
        head: values of the head's parameters before training, for those that train.

    Raises:
        UnsupportedError: token ids that the model does not have.
    """

    def __init__(self, model_map: ModelMap, records: Sequence[TokenRecord], head: Mapping[str, Tensor]) -> None:
        check_records(records, model_map.vocab_size)
        self._map, self._records, self._head = model_map, records, head
        self._device = next(model_map.model.parameters()).device
        self.lengths = [record.n_tokens for record in records]

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        batch = [self._records[i] for i in rows]
        found = length_batches(batch, default_batch_tokens(self._device))
        return [[rows[i] for i in part] for part in found]

    def totals(
        self, rows: Sequence[int], originals: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        states = self._states(rows)  # [N, d]
        labels = torch.tensor([t for i in rows for t in self._records[i].completion], device=self._device)  # [N]
        before = None if originals is None else torch.cat(list(originals)).to(states)  # [N, d]
        lengths = [self.lengths[i] for i in rows]
        head_trains = any(p.requires_grad for p in self._map.model.get_submodule(self._map.head).parameters())

        def losses(hidden: Tensor, part: slice) -> Tensor:
            target = None
            if before is not None:
                with torch.no_grad(), swapped(self._map.model, self._head):
                    target = self._map.logits(before[part])  # [C, V]
            logits = self._map.logits(hidden)  # [C, V]
            logits = logits.to(sum_type(logits))
            if target is not None:
                return divergence(target.to(logits), logits)
            return functional.cross_entropy(logits, labels[part], reduction="none")  # [C]

        size = max(1, CHUNK_ELEMENTS // self._map.vocab_size)
        slices = [slice(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]
        pieces, rates = list[Tensor](), list[Tensor]()
        for part in slices:
            leaf = states[part].detach().requires_grad_(states.requires_grad)
            with torch.set_grad_enabled(states.requires_grad):
                loss = losses(leaf, part)
            pieces.append(loss.detach())
            if states.requires_grad:
                rates += torch.autograd.grad(loss.sum(), leaf)  # a position's loss depends on its own state alone
        totals = torch.stack([piece.double().sum() for piece in torch.split(torch.cat(pieces), lengths)]).cpu()

        def backward(factors: Tensor) -> None:
            weights = factors.repeat_interleave(torch.tensor(lengths)).to(states.device, sum_type(states))  # [N]
            if states.requires_grad:
                states.backward((torch.cat(rates) * weights[:, None]).to(states.dtype))  # type: ignore[no-untyped-call]
            for part in slices if head_trains else ():
                (losses(states[part].detach(), part) @ weights[part]).backward()  # type: ignore[no-untyped-call]

        return totals, backward

    def originals(self, rows: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return list(torch.split(self._states(rows).cpu(), [self.lengths[i] for i in rows]))

    def _states(self, rows: Sequence[int]) -> Tensor:
        """Final hidden states [N, d] of the positions that predict a completion token."""
        batch = [self._records[i] for i in rows]
        ids, _ = pad(batch, self._device)  # [P, T]; no mask, see `probes.likelihood`
        hidden: Tensor = self._map.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [P, T, d]
        return hidden[predicting(batch, ids)]


class ImageBatches(Batches):
    """Images of a classifier.

    Args:
        model: the classifier.
        records: images of one shape.
    """

    def __init__(self, model: nn.Module, records: Sequence[ImageRecord]) -> None:
        self._model, self._records = model, records
        self._device = next(model.parameters()).device
        self.lengths = [1] * len(records)

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[start : start + IMAGES]) for start in range(0, len(rows), IMAGES)]

    def totals(
        self, rows: Sequence[int], originals: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        logits = self._logits(rows)  # [P, V]
        if originals is None:
            labels = torch.tensor([self._records[i].label for i in rows], device=self._device)  # [P]
            if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
                raise UnsupportedError(
                    f"expected labels below {logits.shape[-1]} classes, found others; check the records"
                )
            losses = functional.cross_entropy(logits, labels, reduction="none")  # [P]
        else:
            losses = divergence(torch.stack(list(originals)).to(logits), logits)  # [P]

        def backward(factors: Tensor) -> None:
            if losses.requires_grad:
                (losses @ factors.to(losses)).backward()  # type: ignore[no-untyped-call]

        return losses.detach().double().cpu(), backward

    def originals(self, rows: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return list(self._logits(rows).cpu())

    def _logits(self, rows: Sequence[int]) -> Tensor:
        pixels = torch.stack([self._records[i].pixels for i in rows]).to(next(self._model.parameters()))
        logits = class_logits(self._model, pixels)
        return logits.to(sum_type(logits))


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) in nats, [C] from logits [C, V]; `target` is a constant."""
    log_p = target.log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
