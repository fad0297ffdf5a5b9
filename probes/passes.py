"""Backward passes over records: each record's losses, in batches, with labels its own or drawn from the model.

A record has one loss per completion token (cross entropy), or one for an image. `losses_of` wraps records of either
kind; `backward` sends a weighted sum of a batch's losses through the model, whose parameters `gradients` has frozen but
for those wanted. Whoever wants activations and their gradients instead listens with hooks while that happens.

Sampled labels and signs depend on the seed and the record's identifier alone, so neither order nor batching changes
them.

Shape letters: B records in a batch, T padded tokens, N losses in a batch, d width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.classify import class_logits
from probes.errors import UnsupportedError
from probes.likelihood import check_records
from probes.loss import cross_entropy, sample, squared_norm
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord, pad, predicting

Positions = Literal["all", "predicting"]


def sum_type(tensor: Tensor) -> torch.dtype:
    """The type to add up numbers of this tensor in: fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def losses_of(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    sampled: bool = False,
    seed: int = 0,
    model_map: ModelMap | None = None,
) -> Losses:
    """Records as losses of a model.

    Args:
        model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s).
        records: at least one.
        sampled: labels drawn from the model instead of the records' own.
        seed: of labels and signs.
        model_map: the model's map, built when absent; an image classifier needs none.

    Raises:
        UnsupportedError: token ids that the model does not have, or a model the map cannot read.
    """
    if isinstance(records[0], TokenRecord):
        if model_map is None or model_map.model is not model:
            model_map = ModelMap.of(model)
        model_map.expect_single()
        return _Texts(model_map, cast("Sequence[TokenRecord]", records), sampled, seed)
    return _Images(model, cast("Sequence[ImageRecord]", records), sampled, seed)


class Losses(ABC):
    """Records as losses: `lengths[i]` of them for record i, one per completion token or one for an image."""

    def __init__(self, model: nn.Module, names: Sequence[str], lengths: list[int], sampled: bool, seed: int) -> None:
        self.lengths = lengths
        self.sampled = sampled
        self._device = next(model.parameters()).device
        seen: Counter[str] = Counter()
        self._keys = []
        for name in names:  # records that share an identifier still draw independently
            self._keys.append(f"{seed}|{seen[name]}|{name}")
            seen[name] += 1

    @abstractmethod
    def shape(self, batch: Sequence[int]) -> tuple[int, ...]:
        """Leading dimensions of the activations of a batch: (B,) or (B, T)."""

    @abstractmethod
    def positions(self, batch: Sequence[int], which: Positions) -> Tensor | None:
        """Which activations of a batch count, bool in the shape `shape(batch)`; None for all of them.

        Of a text "all" are the real positions but the last token's, which predicts nothing, and "predicting" those
        that predict a completion token; padding never counts. Activations of an image all count.
        """

    @abstractmethod
    def backward(
        self, batch: Sequence[int], weights: Tensor, draw: int = 0, *, norm: bool = False, apart: bool = False
    ) -> None:
        """Backpropagate sum_n weights[n] l_n; ||f_n||^2 stands for l_n if `norm`.

        With `apart` the output head of a language model sees one record at a time, so that its gradients are each
        record's own.
        """

    def signs(self, batch: Sequence[int], draw: int) -> Tensor:
        """Independent +1 and -1, [N]."""
        return torch.cat(
            [2 * torch.randint(2, (self.lengths[i],), generator=self._generator(i, draw, "sign")) - 1 for i in batch]
        )

    def uniforms(self, batch: Sequence[int], draw: int) -> Tensor | None:
        """Independent numbers in [0, 1) that decide sampled labels, [N]; None for gold labels."""
        if not self.sampled:
            return None
        generators = [self._generator(i, draw, "label") for i in batch]
        return torch.cat(
            [
                torch.rand(self.lengths[i], generator=g, dtype=torch.float64)
                for i, g in zip(batch, generators, strict=True)
            ]
        ).to(self._device)

    def _generator(self, index: int, draw: int, purpose: str) -> torch.Generator:
        key = hashlib.sha256(f"{purpose}|{draw}|{self._keys[index]}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


class _Texts(Losses):
    def __init__(self, model_map: ModelMap, records: Sequence[TokenRecord], sampled: bool, seed: int) -> None:
        check_records(records, model_map.vocab_size)
        super().__init__(model_map.model, [r.record_id for r in records], [r.n_tokens for r in records], sampled, seed)
        self._map, self._records = model_map, records

    def shape(self, batch: Sequence[int]) -> tuple[int, ...]:
        return len(batch), max(len(self._records[i].ids) for i in batch)

    def positions(self, batch: Sequence[int], which: Positions) -> Tensor | None:
        chosen, width = [self._records[i] for i in batch], self.shape(batch)[1]
        if which == "predicting":
            return predicting(chosen, torch.zeros(len(batch), width, device=self._device))
        lengths = torch.tensor([len(record.ids) - 1 for record in chosen], device=self._device)
        return torch.arange(width, device=self._device) < lengths[:, None]

    def backward(
        self, batch: Sequence[int], weights: Tensor, draw: int = 0, *, norm: bool = False, apart: bool = False
    ) -> None:
        ids, _ = pad([self._records[i] for i in batch], self._device)  # [B, T]; no mask, see `probes.likelihood`
        hidden = self._map.backbone()(input_ids=ids, use_cache=False).last_hidden_state
        states = hidden[predicting([self._records[i] for i in batch], ids)]  # [N, d]
        del hidden
        labels = torch.tensor([t for i in batch for t in self._records[i].completion], device=self._device)  # [N]
        uniforms, weights = self.uniforms(batch, draw), weights.to(self._device)

        def loss(states: Tensor, part: slice) -> Tensor:
            if norm:
                return squared_norm(self._map, states, weights[part])
            drawn = None if uniforms is None else uniforms[part]
            return cross_entropy(self._map, states, labels[part], weights[part], uniforms=drawn)

        if not apart:
            _backward(loss(states, slice(None)))
            return
        leaves, start = [], 0
        for piece in states.split([self.lengths[i] for i in batch]):
            leaf = piece.detach().requires_grad_(states.requires_grad)
            _backward(loss(leaf, slice(start, start := start + len(piece))))
            leaves.append(leaf)
        if states.requires_grad:
            states.backward(torch.cat([cast(Tensor, leaf.grad) for leaf in leaves]))


class _Images(Losses):
    def __init__(self, model: nn.Module, records: Sequence[ImageRecord], sampled: bool, seed: int) -> None:
        super().__init__(model, [record.record_id for record in records], [1] * len(records), sampled, seed)
        self._model, self._records = model, records

    def shape(self, batch: Sequence[int]) -> tuple[int, ...]:
        return (len(batch),)

    def positions(self, batch: Sequence[int], which: Positions) -> Tensor | None:
        return None

    def backward(
        self, batch: Sequence[int], weights: Tensor, draw: int = 0, *, norm: bool = False, apart: bool = False
    ) -> None:
        logits = class_logits(self._model, torch.stack([self._records[i].pixels for i in batch]).to(self._device))
        logits = logits.to(sum_type(logits))  # [B, classes]
        labels = torch.tensor([self._records[i].label for i in batch], device=self._device)  # [B]
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise UnsupportedError(f"expected labels below {logits.shape[-1]} classes, found others; check the records")
        uniforms = self.uniforms(batch, draw)
        if uniforms is not None:
            labels = sample(logits.detach(), uniforms)
        losses = logits.square().sum(-1) if norm else functional.cross_entropy(logits, labels, reduction="none")
        _backward(losses @ weights.to(logits))


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # not if no parameter asked for takes part in the loss
        loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def gradients(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], consume: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Evaluation mode with gradients for `wanted` alone; each goes to `consume` when it is complete and is freed.

    `consume` may overwrite the gradient. Everything is as before afterwards, whatever happens inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []

    def hand_over(parameter: Tensor, name: str) -> None:
        gradient, parameter.grad = cast(Tensor, parameter.grad), None
        consume(name, gradient.to(sum_type(gradient)))

    try:
        model.eval()
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            handle = parameter.register_post_accumulate_grad_hook(partial(hand_over, name=name))  # type: ignore[no-untyped-call]
            handles.append(handle)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, gradient in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
