"""A record's log-probability as a function of its input: what attribution follows and ablation lowers.

Of a text, F = sum_t log p(y_t | gold context) over its completion tokens under teacher forcing, the figure that
`probes.likelihood` sums, and its input is the token embeddings; of an image, log p of its label and its pixels. Only
completion positions meet the output head, a chunk at a time. The completion's last token predicts nothing and is not
run.

Shape letters: S copies of a record, P input positions, d width, C channels, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.classify import class_logits
from probes.errors import UnsupportedError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, check_records
from probes.loss import cross_entropy
from probes.modelmap import ModelMap
from probes.passes import sum_type
from probes.records import ImageRecord, TokenRecord

Baseline = Literal["mean", "zero"] | int
Vary = Literal["all", "prompt"]

EMBEDDING_ROWS = 4096  # token embeddings alive at once while their mean is taken
IMAGE_TOKENS = 64  # what an image of few patches counts for where a batch is bounded in tokens


class Target(ABC):
    """One record's log-probability F as a function of its input.

    Attributes:
        record_id: the record's.
        n_tokens: completion tokens; 1 for an image.
        n_prompt: how many of the input positions are the prompt's; all patches of an image.
        n_positions: input positions: tokens but the last, or patches.
        grid: (rows, columns) of the patches, or None.
        size: what one copy counts for in a batch: tokens, roughly.
        shape: leading dimensions of the activations of a batch, without the first.
    """

    record_id: str
    n_tokens: int
    n_prompt: int
    n_positions: int
    grid: tuple[int, int] | None
    size: int
    shape: tuple[int, ...]

    def __init__(self, model_map: ModelMap) -> None:
        self.map = model_map
        self.device = next(model_map.model.parameters()).device

    @abstractmethod
    def inputs(self) -> Tensor:
        """The record's own input: token embeddings [1, P, d], or pixels [1, C, H, W]."""

    @abstractmethod
    def values(self, inputs: Tensor) -> Tensor:
        """F of each of the inputs [S, ...], [S]; for use without gradients."""

    @abstractmethod
    def total(self, inputs: Tensor) -> Tensor:
        """Sum of F over inputs [S, ...], [1], for one backward pass."""

    @abstractmethod
    def neutral(self, baseline: Baseline) -> Tensor:
        """What a baseline puts at every position; does not depend on the record but for its kind.

        Raises:
            UsageError: a baseline that the kind of record does not have.
        """

    @abstractmethod
    def start(self, inputs: Tensor, neutral: Tensor, vary: Vary) -> Tensor:
        """The baseline's input, in the shape of `inputs`, where it varies; elsewhere `inputs`.

        Raises:
            UsageError: "prompt" for an image.
        """

    @abstractmethod
    def cells(self) -> Tensor:
        """Position that each element of the input belongs to, int64, in a shape that broadcasts to the input's."""

    def by_position(self, elements: Tensor) -> NDArray[np.float64]:
        """Sums [n_positions] of elements [1, ...] in the shape of the input."""
        cells = self.cells().expand_as(elements).flatten()
        sums = elements.new_zeros(self.n_positions, dtype=torch.float64)
        return sums.index_add_(0, cells, elements.flatten().double()).cpu().numpy()


def targets_of(model_map: ModelMap, records: Sequence[TokenRecord] | Sequence[ImageRecord]) -> Sequence[Target]:
    """Records as targets.

    Raises:
        UsageError: images for a language model or texts for a classifier.
        UnsupportedError: token ids or labels that the model does not have.
    """
    model_map.expect_single()
    texts = isinstance(records[0], TokenRecord)
    if texts != (model_map.task == "causal_lm"):
        raise UsageError(
            f"expected records for {type(model_map.model).__name__}, found {'texts' if texts else 'images'}"
        )
    if texts:
        check_records(cast("Sequence[TokenRecord]", records), model_map.vocab_size)
        return [_Text(model_map, record) for record in cast("Sequence[TokenRecord]", records)]
    images = cast("Sequence[ImageRecord]", records)
    if any(not 0 <= record.label < model_map.vocab_size for record in images):
        raise UnsupportedError(f"expected labels below {model_map.vocab_size} classes, found others; check the records")
    return [_Image(model_map, record) for record in images]


class _Text(Target):
    grid = None

    def __init__(self, model_map: ModelMap, record: TokenRecord) -> None:
        super().__init__(model_map)
        self.record_id, self.n_tokens, self.n_prompt = record.record_id, record.n_tokens, record.n_prompt
        self._ids = torch.tensor([record.ids[:-1]], device=self.device)  # [1, P]; the last token predicts nothing
        self._labels = torch.tensor(record.completion, device=self.device)  # [n_tokens]
        self.n_positions = self.size = self._ids.shape[1]
        self.shape = (self.n_positions,)
        self._embedding = cast(nn.Module, cast(Any, model_map.model).get_input_embeddings())

    def _states(self, inputs: Tensor) -> Tensor:
        """[S n_tokens, d] states that predict the completion, for embeddings [S, P, d]."""
        # In the place of the embedding's own output, so that position embeddings and scaling happen as ever.
        handle = self._embedding.register_forward_hook(lambda module, args, output: inputs)
        try:
            ids = self._ids.expand(len(inputs), -1)
            hidden: Tensor = self.map.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [S, P, d]
        finally:
            handle.remove()
        return hidden[:, self.n_prompt - 1 :].flatten(0, 1)

    def inputs(self) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self._embedding(self._ids))  # [1, P, d]

    def values(self, inputs: Tensor) -> Tensor:
        states, labels = self._states(inputs), self._labels.repeat(len(inputs))
        size = max(1, CHUNK_ELEMENTS // self.map.vocab_size)
        found = []
        for rows, gold in zip(torch.split(states, size), torch.split(labels, size), strict=True):
            logits = self.map.logits(rows)
            logits = logits.to(sum_type(logits))
            found.append(logits.gather(-1, gold[:, None]).squeeze(-1) - logits.logsumexp(-1))
        return torch.cat(found).view(len(inputs), -1).sum(-1)

    def total(self, inputs: Tensor) -> Tensor:
        states, labels = self._states(inputs), self._labels.repeat(len(inputs))
        minus = -torch.ones(len(states), dtype=sum_type(states), device=states.device)
        return cross_entropy(self.map, states, labels, minus).view(1)

    def neutral(self, baseline: Baseline) -> Tensor:
        rows = cast(Tensor, self._embedding.weight).shape[0]
        with torch.no_grad():
            if baseline == "zero":
                return torch.zeros_like(self.inputs()[0, 0])
            if baseline == "mean":
                pieces = torch.split(torch.arange(rows, device=self.device), EMBEDDING_ROWS)
                sums = [(e := self._embedding(ids)).to(sum_type(e)).sum(0) for ids in pieces]
                return (torch.stack(sums).sum(0) / rows).to(e.dtype)  # [d]
            if not isinstance(baseline, int) or not 0 <= baseline < rows:
                raise UsageError(f"expected baseline mean, zero or a token id below {rows}, found {baseline}")
            return cast(Tensor, self._embedding(torch.tensor(baseline, device=self.device)))

    def start(self, inputs: Tensor, neutral: Tensor, vary: Vary) -> Tensor:
        start = neutral.expand_as(inputs).clone()
        if vary == "prompt":
            start[:, self.n_prompt :] = inputs[:, self.n_prompt :]
        return start

    def cells(self) -> Tensor:
        return torch.arange(self.n_positions, device=self.device)[None, :, None]  # [1, P, 1]


class _Image(Target):
    def __init__(self, model_map: ModelMap, record: ImageRecord) -> None:
        super().__init__(model_map)
        self.record_id, self.n_tokens = record.record_id, 1
        self._label, self.shape = record.label, ()
        dtype = next(model_map.model.parameters()).dtype
        self._pixels = record.pixels.to(self.device, dtype)[None]  # [1, C, H, W]
        self._patch = _patch_size(model_map)
        height, width = self._pixels.shape[2:]
        rows, self._columns = -(-height // self._patch[0]), -(-width // self._patch[1])
        self.grid = (rows, self._columns)
        self.n_prompt = self.n_positions = rows * self._columns
        self.size = max(IMAGE_TOKENS, self.n_positions)

    def inputs(self) -> Tensor:
        return self._pixels

    def values(self, inputs: Tensor) -> Tensor:
        logits = class_logits(self.map.model, inputs)  # [S, classes]
        return logits.to(sum_type(logits)).log_softmax(-1)[:, self._label]

    def total(self, inputs: Tensor) -> Tensor:
        return self.values(inputs).sum().view(1)

    def neutral(self, baseline: Baseline) -> Tensor:
        if baseline not in ("mean", "zero"):
            raise UsageError(f"expected baseline mean or zero for images, found {baseline}")
        return torch.tensor(float(baseline == "mean"))

    def start(self, inputs: Tensor, neutral: Tensor, vary: Vary) -> Tensor:
        if vary == "prompt":
            raise UsageError("expected inputs: all for images, which have no prompt; found prompt")
        colour = inputs.mean((2, 3), keepdim=True)  # [1, C, 1, 1]
        return (colour * neutral.to(colour)).expand_as(inputs).clone()

    def cells(self) -> Tensor:
        rows, columns = (
            torch.arange(side, device=self.device) // step
            for side, step in zip(self._pixels.shape[2:], self._patch, strict=True)
        )
        return (rows[:, None] * self._columns + columns)[None, None]  # [1, 1, H, W]


def _patch_size(model_map: ModelMap) -> tuple[int, int]:
    for projection in model_map.linear_modules():
        module = model_map.model.get_submodule(projection.module)
        if projection.role == "patch" and isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            return cast("tuple[int, int]", module.kernel_size)
    raise UnsupportedError(
        f"expected an image model that cuts its input into patches, found {type(model_map.model).__name__}; "
        "only vision transformers can be attributed"
    )
