"""Prototypes: mean final embeddings of classes or people, and losses that push records off them or hold them there.

The embedding e_i of a record is what the output head reads: of an image the head's input, of a text the mean of the
final hidden states at the positions that predict its completion. The prototype p_k of a class (of an image its label;
of a text its `group`, or the record itself where it has none) is the mean embedding of its records under the checkpoint
as it was loaded. GS-LoRA++ (arXiv 2501.09705) adds, with softmax over the width,

    D_i = KL(softmax(p_k(i)) || softmax(e_i)),      forget: max(0, bound - D_i),      retain: D_i,

nats. D_i is zero at the prototype. A class without records has no prototype and no term.

`Embeddings` reads e_i from a pass that somebody else makes, by a hook, and adds the gradient of a loss on e_i to what
comes back through it: the cross entropy and these losses share one forward and one backward pass.

Shape letters: P records of a pass, T padded tokens, K prototypes, d width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from probes.modelmap import ModelMap
from probes.passes import sum_type
from probes.records import ImageRecord, Record, TokenRecord, predicting


def key_of(record: Record) -> Hashable:
    """What a record shares its prototype with."""
    if isinstance(record, ImageRecord):
        return record.label
    return record.record_id if record.group is None else record.group


def prototypes(keys: Sequence[Hashable], embeddings: Tensor) -> tuple[list[Hashable], Tensor]:
    """Mean embedding of each class.

    Args:
        keys: class of each record.
        embeddings: [P, d].

    Returns:
        The classes in order of appearance, and their prototypes [K, d].
    """
    names = list(dict.fromkeys(keys))
    place = {name: k for k, name in enumerate(names)}
    index = torch.tensor([place[key] for key in keys], device=embeddings.device)  # [P]
    sums = embeddings.new_zeros(len(names), embeddings.shape[-1]).index_add_(0, index, embeddings)  # [K, d]
    return names, sums / torch.bincount(index, minlength=len(names))[:, None].to(sums)


def distance(targets: Tensor, embeddings: Tensor) -> Tensor:
    """KL(softmax(targets) || softmax(embeddings)) in nats, row by row: [P] from [P, d] and [P, d]."""
    log_p, log_q = targets.log_softmax(-1), embeddings.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_distances(targets: Tensor, others: Tensor) -> Tensor:
    """Mean distance of each target from some other prototypes: [K] from [K, d] and [M, d]."""
    log_p, log_q = targets.log_softmax(-1), others.log_softmax(-1)
    p = log_p.exp()
    return (p * log_p).sum(-1) - p @ log_q.mean(0)


class Seen:
    """The embeddings of one pass.

    Attributes:
        embeddings: [P, d], fp32 at least; a leaf's function, so that losses on it can be differentiated.
    """

    def __init__(self) -> None:
        self._leaf: Tensor | None = None
        self._gradient: Tensor | None = None
        self.embeddings = torch.empty(0)

    def take(self, states: Tensor, where: Tensor | None) -> None:
        """Called from the hook with the states of the pass: [P, T, d] and a mask [P, T], or [P, ...]."""
        self._leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            values = self._leaf.to(sum_type(states))
            if where is None:
                self.embeddings = values.flatten(1)  # [P, d]
            else:
                weights = where.to(values) / where.sum(-1, keepdim=True)  # [P, T]
                self.embeddings = torch.einsum("ptd,pt->pd", values, weights)
        if states.requires_grad:
            states.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradient if self._gradient is None else gradient + self._gradient
            )

    def push(self, loss: Tensor) -> None:
        """Add a loss of `embeddings` to what the pass's own backward pass will carry; at most once, before it."""
        assert self._leaf is not None
        (self._gradient,) = torch.autograd.grad(loss, self._leaf)


class Embeddings:
    """Embeddings of records, read while a model runs.

    Args:
        model_map: the model's map, made before adapters are in place.
        records: texts or images, the rows that passes name.
    """

    def __init__(self, model_map: ModelMap, records: Sequence[TokenRecord] | Sequence[ImageRecord]) -> None:
        self._map, self._records = model_map, records
        self.keys = [key_of(record) for record in records]

    @contextmanager
    def watch(self, rows: Sequence[int]) -> Iterator[Seen]:
        """The embeddings of a pass over some records in this order, made inside the block."""
        seen, texts = Seen(), self._map.task == "causal_lm"

        def after_backbone(module: nn.Module, args: Any, output: Any) -> None:
            states = output.last_hidden_state  # [P, T, d]
            batch = [cast(TokenRecord, self._records[i]) for i in rows]
            seen.take(states, predicting(batch, states[..., 0]))

        def before_head(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.take(args[0], None)

        if texts:
            handle = self._map.backbone().register_forward_hook(after_backbone)
        else:
            handle = self._map.model.get_submodule(self._map.head).register_forward_pre_hook(before_head)
        try:
            yield seen
        finally:
            handle.remove()
