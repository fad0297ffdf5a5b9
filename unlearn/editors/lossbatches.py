"""Summed losses of records and the weighted gradients of these sums, from one forward pass a batch.

What is wanted is the gradient of sum_i c_i L_i, where L_i is the sum of record i's losses (one per completion token, or
one for an image) and the factors c_i depend on the L_i themselves. So a batch is run once; its L_i are handed out with
a function that takes the c_i and goes backwards.

The logits of a batch of texts exist a chunk of positions at a time. The loss l_n of position n depends on its own final
hidden state h_n alone, so while a chunk's logits are there dl_n / dh_n is taken too, [N, d] in all; later each row is
scaled by its record's factor. Where the head trains as well its gradient is a sum over positions with factors that are
not known yet, and the chunks are visited a second time.

l_n is the cross entropy of the record's own token or label, or the divergence KL(teacher || as it stands), in nats. The
teacher is the model before training, or another one over the same vocabulary or classes. Of its predictions the final
hidden states are kept, not the logits.

Shape letters: P records in one part of a batch, T padded tokens, N completion positions of a part, C of one chunk, d
width, e width of the teacher's states, V vocabulary or classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.classify import class_logits
from probes.errors import UnsupportedError
from probes.likelihood import CHUNK_ELEMENTS, FLOOR, check_records, default_batch_tokens
from probes.passes import sum_type
from probes.records import ImageRecord, TokenRecord, length_batches, pad, predicting
from probes.taps import IMAGES
from unlearn.editors.linearmaps import swapped

if TYPE_CHECKING:
    from probes.modelmap import ModelMap


class Teacher(Protocol):
    """Whose predictions on texts a divergence is taken from; a `ModelMap` is one."""

    def backbone(self) -> nn.Module:
        """A module whose `last_hidden_state` [B, T, e] holds all that `logits` needs."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, V] logits or log-probabilities (-inf where a token is impossible) of states [C, e]."""


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
        self, rows: Sequence[int], taught: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The summed losses of some records.

        Args:
            rows: a part.
            taught: from `taught`, for the divergence from the teacher; None for the cross entropy.

        Returns:
            [P] sums in nats, float64 on the CPU, and a function that backpropagates their sum weighted by factors [P];
            it serves once.
        """

    @abstractmethod
    def taught(self, rows: Sequence[int]) -> list[Tensor]:
        """What the teacher makes of some records as it stands, on the CPU: states [n_i, e] of a text, logits [V]."""

    def all_taught(self, rows: Sequence[int], ran: Callable[[int], None]) -> dict[int, Tensor]:
        """`taught` of any number of rows, by row; `ran` is called with the number of records of each part."""
        found: dict[int, Tensor] = {}
        for part in self.parts(rows):
            found |= dict(zip(part, self.taught(part), strict=True))
            ran(len(part))
        return found

    def mean(
        self,
        rows: Sequence[int],
        taught: Mapping[int, Tensor] | None,
        ran: Callable[[int], None],
        *,
        factor: float | None,
    ) -> float:
        """Mean over records of the mean loss a token, nats.

        Args:
            rows: a batch of at least one.
            taught: from `all_taught`, for the divergence from the teacher; None for the cross entropy.
            ran: called with the number of records of each part.
            factor: of the gradients that this leaves; None leaves none.
        """
        mean = 0.0
        for part in self.parts(rows):
            with torch.set_grad_enabled(factor is not None):
                totals, backward = self.totals(part, None if taught is None else [taught[j] for j in part])
            shares = 1.0 / (len(rows) * torch.tensor([self.lengths[j] for j in part], dtype=torch.float64))
            if factor is not None:
                backward(factor * shares)
            mean += float(totals @ shares)
            ran(len(part))
        return mean


class TextBatches(Batches):
    """Texts of a causal language model.

    Args:
        model_map: made before adapters are in place.
        records: texts.
        head: values of the head's parameters before training, for those that train; they are put back while the
            teacher's logits are made, whose head may be the same.
        teacher: whose predictions a divergence is taken from; None for the model itself before training.

    Raises:
        UnsupportedError: token ids that the model does not have.
    """

    def __init__(
        self,
        model_map: ModelMap,
        records: Sequence[TokenRecord],
        head: Mapping[str, Tensor],
        teacher: Teacher | None = None,
    ) -> None:
        check_records(records, model_map.vocab_size)
        self._map, self._records, self._head = model_map, records, head
        self._teacher: Teacher = model_map if teacher is None else teacher
        self._device = next(model_map.model.parameters()).device
        self.lengths = [record.n_tokens for record in records]

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        batch = [self._records[i] for i in rows]
        found = length_batches(batch, default_batch_tokens(self._device))
        return [[rows[i] for i in part] for part in found]

    def totals(
        self, rows: Sequence[int], taught: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        states = self._states(rows, self._map)  # [N, d]
        labels = torch.tensor([t for i in rows for t in self._records[i].completion], device=self._device)  # [N]
        before = None if taught is None else torch.cat(list(taught)).to(states)  # [N, e]
        lengths = [self.lengths[i] for i in rows]
        head_trains = any(p.requires_grad for p in self._map.model.get_submodule(self._map.head).parameters())

        def losses(hidden: Tensor, part: slice) -> Tensor:
            target = None
            if before is not None:
                with torch.no_grad(), swapped(self._map.model, self._head):
                    target = self._teacher.logits(before[part])  # [C, V]
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

    def taught(self, rows: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return list(torch.split(self._states(rows, self._teacher).cpu(), [self.lengths[i] for i in rows]))

    def _states(self, rows: Sequence[int], of: Teacher) -> Tensor:
        """Final hidden states [N, d] of the positions that predict a completion token."""
        batch = [self._records[i] for i in rows]
        ids, _ = pad(batch, self._device)  # [P, T]; no mask, see `probes.likelihood`
        hidden: Tensor = of.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [P, T, d]
        return hidden[predicting(batch, ids)]


class ImageBatches(Batches):
    """Images of a classifier.

    Args:
        model: the classifier.
        records: images of one shape.
        teacher: a classifier with the same classes; None for the model itself before training.
    """

    def __init__(self, model: nn.Module, records: Sequence[ImageRecord], teacher: nn.Module | None = None) -> None:
        self._model, self._records, self._teacher = model, records, model if teacher is None else teacher
        self._device = next(model.parameters()).device
        self.lengths = [1] * len(records)

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[start : start + IMAGES]) for start in range(0, len(rows), IMAGES)]

    def totals(
        self, rows: Sequence[int], taught: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        logits = self._logits(rows, self._model)  # [P, V]
        if taught is None:
            labels = torch.tensor([self._records[i].label for i in rows], device=self._device)  # [P]
            if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
                raise UnsupportedError(
                    f"expected labels below {logits.shape[-1]} classes, found others; check the records"
                )
            losses = functional.cross_entropy(logits, labels, reduction="none")  # [P]
        else:
            losses = divergence(torch.stack(list(taught)).to(logits), logits)  # [P]

        def backward(factors: Tensor) -> None:
            if losses.requires_grad:
                (losses @ factors.to(losses)).backward()  # type: ignore[no-untyped-call]

        return losses.detach().double().cpu(), backward

    def taught(self, rows: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return list(self._logits(rows, self._teacher).cpu())

    def _logits(self, rows: Sequence[int], of: nn.Module) -> Tensor:
        pixels = torch.stack([self._records[i].pixels for i in rows]).to(next(self._model.parameters()))
        logits = class_logits(of, pixels)
        return logits.to(sum_type(logits))


def visited(batches: Sequence[Sequence[int]]) -> list[int]:
    """Every row of some batches once, in order."""
    return sorted({row for rows in batches for row in rows})


def n_visited(n: int, size: int, steps: int) -> int:
    """Rows that `probes.training.batches` gives in so many steps, repetitions counted."""
    rounds, rest = divmod(steps, math.ceil(n / size)) if n else (0, 0)
    return rounds * n + rest * size


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) in nats, [C] from logits [C, V]; `target` is a constant.

    A class that the target gives no probability (-inf) counts 0, whatever the other gives it.
    """
    log_p = target.log_softmax(-1).clamp(min=FLOOR)  # 0 log 0 is 0, where 0 * -inf would be NaN
    log_q = logits.log_softmax(-1).clamp(min=FLOOR)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
