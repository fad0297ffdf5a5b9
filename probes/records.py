"""The tokenised record: what every probe and attack takes, and how records are put into batches.

Shape letters: B records in a batch, T padded tokens.

A language-model record is a list of token ids whose first `n_prompt` only condition. Text is tokenised once,
outside this package, so nothing here can re-tokenise a prompt and its completion apart, and no record text is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One record for a causal language model.

    Attributes:
        record_id: the caller's identifier.
        ids: conditioning tokens followed by completion tokens.
        n_prompt: how many of `ids` only condition, at least 1; the rest, at least 1, is the completion.
        compressed_bytes: zlib-compressed size of the completion's UTF-8 text, for the zlib ratio.
        group: near-duplicate cluster or subject, for intervals that respect clusters.
    """

    record_id: str
    ids: tuple[int, ...]
    n_prompt: int
    compressed_bytes: int
    group: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n_prompt < len(self.ids):
            raise ValueError(f"expected 1 <= n_prompt < {len(self.ids)} tokens, found n_prompt = {self.n_prompt}")

    @property
    def n_tokens(self) -> int:
        """Number of completion tokens."""
        return len(self.ids) - self.n_prompt

    @property
    def completion(self) -> tuple[int, ...]:
        """The completion's token ids."""
        return self.ids[self.n_prompt :]

    def __repr__(self) -> str:  # ids decode to text, so they stay out of logs and tracebacks
        return f"TokenRecord(n_prompt={self.n_prompt}, n_tokens={self.n_tokens})"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One record for an image classifier.

    Attributes:
        record_id: the caller's identifier.
        pixels: [channels, height, width], normalised, float32.
        label: class index.
        group: near-duplicate cluster or subject.
    """

    record_id: str
    pixels: Tensor
    label: int
    group: str | None = None

    def __repr__(self) -> str:
        return f"ImageRecord(shape={tuple(self.pixels.shape)})"


Record = TokenRecord | ImageRecord


def length_batches(records: Sequence[TokenRecord], batch_tokens: int) -> list[list[int]]:
    """Indices of `records` grouped by length so that padded tokens per batch stay within `batch_tokens`.

    The composition depends on the records alone, never on the hardware: two runs see the same batches. A record
    longer than the budget is a batch by itself.

    Raises:
        ValueError: if the budget is not positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"expected a positive token budget, found {batch_tokens}")
    order = sorted(range(len(records)), key=lambda i: (-len(records[i].ids), i))  # longest first: OOM shows at once
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(records[batches[-1][0]].ids) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(records: Sequence[TokenRecord], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-pad a batch; the mask comes from lengths, never from a padding id that may be a real token.

    Returns:
        input_ids [B, T] int64 (0 where padded) and attention_mask [B, T] int64.
    """
    width = max(len(record.ids) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)  # [B, T]
    mask = torch.zeros(len(records), width, dtype=torch.long)  # [B, T]
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = torch.tensor(record.ids)
        mask[row, : len(record.ids)] = 1
    return ids.to(device), mask.to(device)


def predicting(records: Sequence[TokenRecord], ids: Tensor) -> Tensor:
    """Which positions of a padded batch `ids` [B, T] predict a completion token: [B, T] bool."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, record in enumerate(records):
        where[row, record.n_prompt - 1 : len(record.ids) - 1] = True
    return where
