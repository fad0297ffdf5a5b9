"""Induction: does the model still copy from its context, and which heads do it (arXiv 2205.10487, 2209.11895)?

A sequence of random distinct tokens stands twice in a row: [opening] s_0 .. s_{L-1} s_0 .. s_{L-1}. Nothing but the
context tells the second copy, so

    copying loss       mean loss of s_1 .. s_{L-1} in the second copy minus that of the same tokens in the first, in
                       nats; 0 for a model that reads only the last token, negative for one that copies
    prefix matching    mean attention of a head from a token of the second copy to the token that followed its first
                       occurrence; about 1 for an induction head, about 1 / position for a head without a habit

Edits that remove directions of little use hit these circuits first: the panel is read before and after.

The model is run as it is, with the plain ("eager") attention code for prefix matching, which gives out attention
weights; only its configuration is switched meanwhile, nothing is loaded again. Weights are summed up layer by layer.

Limits: random tokens, not text. Layers that cannot look back far enough (a sliding window shorter than L) have no
score, nor have layers without attention weights (state-space blocks).

Shape letters: S sequences, L tokens of one copy, p tokens of the opening, B sequences in a batch, T = p + 2 L tokens,
H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probes.errors import UnsupportedError, UsageError
from probes.likelihood import default_batch_tokens, inference, score
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.statistics import Floats, Interval, mean_interval

SEQUENCES = 24
LENGTH = 48


@dataclass(frozen=True, slots=True)
class Repeated:
    """Random sequences that stand twice; made by `repeated`.

    Attributes:
        records: S of them; the opening and the first token condition, the other 2 L - 1 tokens are the completion.
        opening: tokens before the first copy, p of them.
        length: L.
    """

    records: tuple[TokenRecord, ...] = field(repr=False)
    opening: int
    length: int


@dataclass(frozen=True, slots=True)
class Copying:
    """The copying loss.

    Attributes:
        first: [S] mean loss in the first copy, in nats.
        second: [S] mean loss of the same tokens in the second copy.
    """

    first: Floats = field(repr=False)
    second: Floats = field(repr=False)

    @property
    def loss(self) -> Floats:
        """[S] second minus first."""
        return self.second - self.first


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prefix matching by head.

    Attributes:
        blocks: [N] block of each head.
        heads: [N] its number within the block.
        scores: [S, N] in [0, 1].
        skipped: blocks without a score, and why.
    """

    blocks: np.ndarray
    heads: np.ndarray
    scores: Floats = field(repr=False)
    skipped: dict[int, str]

    def frame(self) -> pd.DataFrame:
        """One row a head in depth order: block, head, prefix_matching (mean over sequences)."""
        return pd.DataFrame({"block": self.blocks, "head": self.heads, "prefix_matching": self.scores.mean(axis=0)})

    def strongest(self, level: float = 0.95, seed: int = 0) -> tuple[int, Interval]:
        """The strongest head, chosen on every other sequence and measured on the rest: its column, and its score.

        Raises:
            UsageError: fewer than four sequences.
        """
        if len(self.scores) < 4:
            raise UsageError(f"expected at least 4 sequences to choose a head, found {len(self.scores)}; draw more")
        best = int(self.scores[0::2].mean(axis=0).argmax())
        return best, mean_interval(self.scores[1::2, best], level=level, bounds=(0.0, 1.0), seed=seed)


def repeated(
    ordinary: Sequence[int],
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    opening: Sequence[int] = (),
    seed: int = 0,
) -> Repeated:
    """Draw sequences; the same arguments give the same tokens, whatever the model.

    Args:
        ordinary: token ids to draw from: no special tokens, no padding rows of the vocabulary.
        sequences: S.
        length: L, at least 2; every token of a sequence is another one.
        opening: tokens before the first copy, such as the beginning-of-sequence token.
        seed: of the draws.

    Raises:
        UsageError: fewer ordinary tokens than `length`, or counts too small.
    """
    ids = sorted(set(ordinary))
    if sequences < 1 or length < 2:
        raise UsageError(f"expected at least 1 sequence of at least 2 tokens, found {sequences} of {length}")
    if len(ids) < length:
        raise UsageError(f"expected at least {length} ordinary tokens, found {len(ids)}; use a smaller length")
    rng = np.random.default_rng([seed, 17])
    records = []
    for i in range(sequences):
        body = [ids[int(k)] for k in rng.permutation(len(ids))[:length]]
        records.append(TokenRecord(f"repeated-{i}", (*opening, *body, *body), len(opening) + 1, 1))
    return Repeated(tuple(records), len(opening), length)


def copying(
    model: nn.Module, drawn: Repeated, *, model_map: ModelMap | None = None, batch_tokens: int | None = None
) -> Copying:
    """The copying loss of every sequence: one forward pass each.

    Raises:
        UnsupportedError: token ids outside the vocabulary.
        UsageError: sequences longer than the positions that the model has.
    """
    _check_length(model, drawn)
    table = score(model, drawn.records, model_map=model_map, batch_tokens=batch_tokens)
    losses = -table.log_prob.astype(np.float64).reshape(len(drawn.records), -1)  # [S, 2 L - 1]
    known = drawn.length - 1  # s_1 .. s_{L-1}; s_0 of the second copy has no counterpart after the same token
    return Copying(losses[:, :known].mean(axis=1), losses[:, known + 1 :].mean(axis=1))


def prefix_matching(
    model: nn.Module, drawn: Repeated, *, model_map: ModelMap | None = None, batch_tokens: int | None = None
) -> Prefix:
    """Prefix-matching score of every head on every sequence: one forward pass each.

    Args:
        model: a causal language model; used in evaluation mode, left as found, its configuration included.
        drawn: the sequences.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens per batch; by default `default_batch_tokens`.

    Raises:
        UnsupportedError: a model none of whose layers gives attention weights.
        UsageError: sequences longer than the positions that the model has.
    """
    _check_length(model, drawn)
    model_map = model_map or ModelMap.of(model)
    model_map.expect_single()
    device = next(model.parameters()).device
    ids = torch.tensor([record.ids for record in drawn.records], device=device)  # [S, T]
    size = max(1, (batch_tokens or default_batch_tokens(device)) // ids.shape[1])
    found: dict[int, list[Floats]] = {}
    with inference(model), _weights(model, model_map, drawn, found):
        for start in range(0, len(ids), size):
            model_map.backbone(model)(input_ids=ids[start : start + size], use_cache=False)
    scores = {block: np.concatenate(parts) for block, parts in found.items()}  # [S, H] each
    if not scores:
        raise UnsupportedError(
            f"expected attention weights from the layers of {type(model).__name__}, found none; prefix matching is not "
            "defined for it"
        )
    skipped = {block.index: "gives no attention weights" for block in model_map.blocks if block.index not in scores}
    for block in [block for block, values in scores.items() if not values.any()]:
        skipped[block] = "does not look back far enough"
        del scores[block]
    order = sorted(scores)
    return Prefix(
        blocks=np.array([block for block in order for _ in range(scores[block].shape[1])], dtype=np.int64),
        heads=np.array([head for block in order for head in range(scores[block].shape[1])], dtype=np.int64),
        scores=np.concatenate([scores[block] for block in order], axis=1)
        if order
        else np.zeros((len(drawn.records), 0)),
        skipped=dict(sorted(skipped.items())),
    )


def _check_length(model: nn.Module, drawn: Repeated) -> None:
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(record.ids) for record in drawn.records)
    if positions is not None and longest > positions:
        raise UsageError(f"expected at most {positions} tokens in a sequence, found {longest}; use a smaller length")


# --- attention weights ----------------------------------------------------------------------------------------------


@contextmanager
def _weights(model: nn.Module, model_map: ModelMap, drawn: Repeated, found: dict[int, list[Floats]]) -> Iterator[None]:
    """Plain attention code, and hooks that reduce each layer's weights to a score as soon as they are there."""
    second = drawn.opening + drawn.length + torch.arange(drawn.length)  # [L] positions of the second copy
    follows = drawn.opening + 1 + torch.arange(drawn.length)  # [L] what followed each token's first occurrence

    def hear(module: nn.Module, args: Any, output: Any, block: int) -> None:
        for item in output if isinstance(output, tuple) else ():
            if isinstance(item, Tensor) and item.ndim == 4 and item.shape[-1] == item.shape[-2] > drawn.length:
                matched = item[:, :, second, follows].double().mean(-1)  # [B, H, L] -> [B, H]
                found.setdefault(block, []).append(matched.cpu().numpy())
                return

    with ExitStack() as stack:
        _use_eager(model, stack)
        for block in model_map.blocks:
            for path in sorted({p.module.rpartition(".")[0] for p in block.attention}):
                handle = model.get_submodule(path).register_forward_hook(partial(hear, block=block.index))
                stack.callback(handle.remove)
        yield


def _use_eager(model: nn.Module, stack: ExitStack) -> None:
    """Switch every configuration in the model to plain attention until the stack closes."""
    name = "_attn_implementation_internal"
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        if hasattr(config, name) and getattr(config, name) != "eager":
            stack.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, "eager")
