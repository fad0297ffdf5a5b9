"""Reversed model guidance: generation from the edited model, pushed towards what the original knew (arXiv 2505.24379).

With next-token distributions p_U of the edited and p_O of the original model the guided scores are

    g = log p_U + w (log p_O - log p_U)        over the tokens with p_O >= keep * max p_O, -inf for the others

w = 0 is the edited model, w = 1 the original one, w > 1 goes beyond the original, against the direction of the edit;
all of them among the tokens kept, whose choice is the original's and tells much by itself. Teacher forced: every
completion token is scored after its gold context, one pass of each model over the same batch, so a record costs two
forward passes whatever the number of weights.

Limits: it needs the output of both models (access A3), and who holds the original's weights has no use for it: it does
not beat the original alone. It matters where the original is known by its API only. Models retrained without the
records give them back just as well, because it is the original that knows them: what guidance brings out is no evidence
that the edit hid anything.

Shape letters: B records, T padded tokens, N completion tokens of a batch, C of them in one chunk, V vocabulary,
d width, W weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import (
    CHUNK_ELEMENTS,
    FLOOR,
    check_records,
    default_batch_tokens,
    inference,
    out_of_memory,
)
from probes.modelmap import ModelMap
from probes.records import TokenRecord, length_batches, pad, predicting

WEIGHTS = (0.5, 1.5, 2.0)
KEEP = 0.1  # the customary threshold of contrastive decoding
ALIVE = 4  # arrays [C, V] alive at once
FEW = 16  # tokens kept are gathered where they are fewer than one in so many


def guided(
    edited: nn.Module,
    original: nn.Module,
    records: Sequence[TokenRecord],
    *,
    weights: Sequence[float] = WEIGHTS,
    keep: float = KEEP,
    model_map: ModelMap | None = None,
    original_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[float, pd.DataFrame]:
    """Score records under the guided distribution.

    Args:
        edited: the model that was edited; used in evaluation mode, unchanged.
        original: the model before the edit, with the same vocabulary, on the same device; likewise.
        records: what to score.
        weights: finite values of w, each once.
        keep: tokens less probable under the original than this share of its likeliest token are not emitted; 0 keeps
            all of them.
        model_map: the edited model's map, built when absent.
        original_map: the original's map, built when absent.
        batch_tokens: padded tokens per batch; by default `default_batch_tokens`.
        progress: called with (records done, records in all).

    Returns:
        For every weight a frame with one row a record, in order: record_id, probability (exp of minus the mean nll of
        the completion; 0 where a token of it is not kept), accuracy (share of tokens that are the guided argmax),
        extracted (all of them are) and loss (mean nll in nats; inf where probability is 0).

    Raises:
        UsageError: no weights, repeated or infinite ones, or `keep` outside [0, 1].
        UnsupportedError: vocabularies of different sizes, or token ids outside them.
        ResourceError: a batch does not fit in memory.
    """
    if not weights or len(set(weights)) < len(weights) or not all(map(math.isfinite, weights)):
        raise UsageError(f"expected finite guidance weights, each once, found {len(weights)}; give for example 1.5")
    if not 0 <= keep <= 1:
        raise UsageError(f"expected keep in [0, 1], found {keep}; {KEEP} is usual")
    maps = model_map or ModelMap.of(edited), original_map or ModelMap.of(original)
    if maps[0].vocab_size != maps[1].vocab_size:
        raise UnsupportedError(
            f"expected two checkpoints of one vocabulary, found {maps[0].vocab_size} and {maps[1].vocab_size} tokens"
        )
    check_records(records, maps[0].vocab_size)
    device = next(edited.parameters()).device
    rows: dict[int, np.ndarray] = {}
    with inference(edited), inference(original):
        for batch in length_batches(records, batch_tokens or default_batch_tokens(device)):
            chosen = [records[i] for i in batch]
            try:
                found = _batch(edited, original, maps, chosen, weights, keep)  # [N, W, 2]
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise ResourceError(
                    "expected memory for one batch under two models, found too little; lower batch_tokens"
                ) from None
            parts = np.split(found, np.cumsum([record.n_tokens for record in chosen])[:-1])
            rows.update(zip(batch, parts, strict=True))
            if progress:
                progress(len(rows), len(records))
    return {weight: _frame(records, [rows[i][:, k] for i in range(len(records))]) for k, weight in enumerate(weights)}


def _batch(
    edited: nn.Module,
    original: nn.Module,
    maps: tuple[ModelMap, ModelMap],
    batch: Sequence[TokenRecord],
    weights: Sequence[float],
    keep: float,
) -> np.ndarray:
    """[N, W, 2]: guided log-probability of every completion token, and 1 where it is the guided argmax."""
    device = next(edited.parameters()).device
    ids, _ = pad(batch, device)  # [B, T]; no mask, see `probes.likelihood`
    where = predicting(batch, ids)
    states = []
    for model, one in zip((edited, original), maps, strict=True):
        hidden = one.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        states.append(hidden[where])  # [N, d]
        del hidden
    targets = torch.tensor([token for record in batch for token in record.completion], device=device)  # [N]
    size = max(1, CHUNK_ELEMENTS // (ALIVE * maps[0].vocab_size))
    rows = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        z_u = _centred(maps[0].logits(states[0][part], edited))  # [C, V]
        z_o = _centred(maps[1].logits(states[1][part], original))  # [C, V]
        rows.append(_guide(z_u, z_o, targets[part], weights, keep))
    return torch.cat(rows).cpu().numpy()


def _centred(logits: Tensor) -> Tensor:
    """[C, V] logits with a largest of 0 in each row; those of impossible tokens are finite, so that 0 times them is 0.

    A constant in a row cancels where guided scores are normalised, so log p itself is not needed.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits - logits.amax(-1, keepdim=True)).clamp_(min=FLOOR)


def _guide(z_u: Tensor, z_o: Tensor, targets: Tensor, weights: Sequence[float], keep: float) -> Tensor:
    """[C, W, 2] from centred logits [C, V]: log g(target), and whether no token scores higher than it."""
    least = math.log(keep) if keep else -math.inf
    wanted = targets[:, None]  # [C, 1], where the target stands among the columns
    kept = int((z_o >= least).sum(-1).max())  # at most 1 / keep of a row's tokens are kept: few columns hold them all
    present = torch.ones_like(targets, dtype=torch.bool)  # [C]
    if FEW * kept < z_o.shape[-1]:
        z_o, columns = z_o.topk(kept)  # [C, kept]
        z_u = z_u.gather(-1, columns)
        found = columns == wanted
        present, wanted = found.any(-1), found.int().argmax(-1, keepdim=True)
    dropped = z_o < least
    out = torch.empty(len(targets), len(weights), 2, dtype=torch.float64, device=z_u.device)
    for k, weight in enumerate(weights):
        scores = (z_u * (1.0 - weight)).add_(z_o, alpha=weight).masked_fill_(dropped, -math.inf)
        gold = scores.gather(-1, wanted)  # [C, 1]
        log_p = gold.squeeze(-1) - scores.logsumexp(-1)
        out[:, k, 0] = log_p.masked_fill(~present, -math.inf)
        out[:, k, 1] = ~(scores > gold).any(-1) & present  # the likeliest token is always kept
    return out


def _frame(records: Sequence[TokenRecord], rows: Sequence[np.ndarray]) -> pd.DataFrame:
    losses = [-float(row[:, 0].mean()) for row in rows]
    return pd.DataFrame(
        {
            "record_id": [record.record_id for record in records],
            "probability": [math.exp(-loss) for loss in losses],
            "accuracy": [float(row[:, 1].mean()) for row in rows],
            "extracted": [bool(row[:, 1].all()) for row in rows],
            "loss": [loss + 0.0 for loss in losses],
        }
    )
