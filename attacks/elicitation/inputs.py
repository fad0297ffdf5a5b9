"""Records as rows of embeddings: what stands in the table, how a row is run, and what the model makes of it.

A row is the output of the token embedding (before positions are added), some of it replaced or moved. With N states h_n
of the positions that predict the completion y_1..y_T of a record, the figures are those of `probes.memorised`:

    probability exp(mean log p(y_t)),   accuracy: share of y_t with the largest logit,   extracted: all of them.

Two lengths are natural units of the space: the root mean square of an entry of the table, and the mean distance of a
token's embedding to its nearest other embedding.

Shape letters: B records in a batch, T padded tokens, N completion tokens, V vocabulary, d width, R records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, check_records, default_batch_tokens, out_of_memory
from probes.memorised import COLUMNS
from probes.modelmap import ModelMap
from probes.records import TokenRecord

NEIGHBOURS = 128  # embeddings, evenly spaced in the vocabulary, whose nearest neighbour is looked for
SAME = 1e-12  # squared distance over squared length below which two embeddings are one (unused rows often are)

Made = TypeVar("Made")


def table_of(model: nn.Module) -> Tensor:
    """[V, d] embeddings as the model uses them: rows scaled where its embedding module scales them."""
    embedding = cast(Any, model).get_input_embeddings()
    with torch.no_grad():
        if type(embedding) is nn.Embedding:
            return embedding.weight.detach()
        ids = torch.arange(len(embedding.weight), device=embedding.weight.device)
        return cast(Tensor, embedding(ids).detach())


def rms_of(model: nn.Module) -> float:
    """Root mean square of an entry of the embedding table.

    Raises:
        UsageError: a table of zeros, which gives no unit of length.
    """
    rms = float(table_of(model).double().square().mean().sqrt())
    if not rms > 0:
        raise UsageError("expected token embeddings that are not 0, found none; check the checkpoint")
    return rms


def neighbour_distance(model: nn.Module) -> float:
    """Mean Euclidean distance of an embedding to the nearest one that differs from it, over a sample of the table.

    Raises:
        UsageError: a table whose rows are all alike, which gives no unit of length.
    """
    table = table_of(model)
    chosen = np.unique(np.linspace(0, len(table) - 1, min(NEIGHBOURS, len(table))).round().astype(np.int64))
    nearest = _nearest(table, chosen)
    nearest = nearest[np.isfinite(nearest)]
    if not len(nearest):
        raise UsageError("expected token embeddings that differ, found all alike; check the checkpoint")
    return float(nearest.mean())


def _nearest(table: Tensor, rows: np.ndarray) -> np.ndarray:
    """Distance of each of `rows` to the nearest row that differs from it; inf where there is none."""
    some = table[torch.as_tensor(rows, device=table.device)].double()  # [C, d]
    own = some.square().sum(-1)  # [C]
    best = torch.full_like(own, torch.inf)
    for part in torch.split(table, 8192):
        part = part.double()  # [P, d]
        length = part.square().sum(-1)  # [P]
        square = own[:, None] + length[None] - 2 * some @ part.T  # [C, P]
        square.masked_fill_(square <= SAME * (own[:, None] + length[None]), torch.inf)
        best = torch.minimum(best, square.amin(-1))
    found: np.ndarray = best.sqrt().cpu().numpy()
    return found


def check(model_map: ModelMap, records: Sequence[TokenRecord], extra: int = 0) -> None:
    """Refuse records that cannot be run with `extra` positions in front.

    Raises:
        UsageError: no records, or some too long for the model's positions.
        UnsupportedError: token ids outside the vocabulary.
    """
    if not records:
        raise UsageError("expected at least one record, found none")
    check_records(records, model_map.vocab_size)
    most = positions(model_map)
    long = sum(len(record.ids) + extra > most for record in records)
    if long:
        raise UsageError(
            f"expected records of at most {most - extra} tokens (the model has {most} positions), found {long} longer "
            "ones; leave them out"
        )


def positions(model_map: ModelMap) -> int:
    """Positions the model was made for; a very large number where its configuration names none."""
    config = cast(Any, model_map.model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def embedded(model_map: ModelMap, ids: Tensor) -> Tensor:
    """[B, T, d] embeddings of token ids [B, T], detached."""
    with torch.no_grad():
        return cast(Tensor, cast(Any, model_map.model).get_input_embeddings()(ids).detach())


def final_states(model_map: ModelMap, inputs: Tensor) -> Tensor:
    """[B, T, d] final hidden states of rows of embeddings [B, T, d], without a padding mask (`probes.likelihood`).

    Raises:
        UnsupportedError: a model that takes token ids only.
    """
    try:
        output = model_map.backbone()(inputs_embeds=inputs, use_cache=False)
    except (TypeError, NotImplementedError) as error:
        kind = type(model_map.model).__name__
        raise UnsupportedError(
            f"expected a model that runs on embeddings, found {kind}, which does not ({type(error).__name__})"
        ) from error
    return cast(Tensor, output.last_hidden_state)


def token_scores(model_map: ModelMap, states: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability [N] and whether it has the largest logit [N], of `labels` [N] after states [N, d]."""
    size = max(1, CHUNK_ELEMENTS // model_map.vocab_size)
    values, tops = [], []
    with torch.no_grad():
        for start in range(0, len(labels), size):
            logits = model_map.logits(states[start : start + size].detach())  # [C, V]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            gold = logits.gather(-1, labels[start : start + size, None]).squeeze(-1)  # [C]
            values.append(gold - logits.logsumexp(-1))
            tops.append(gold >= logits.amax(-1))
    return torch.cat(values).cpu().double().numpy(), torch.cat(tops).cpu().numpy()


def record_scores(records: Sequence[TokenRecord], values: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """Rows [R, 3] of probability, accuracy and extracted (0 or 1), from the rows of `token_scores` of all records.

    Where a model returns no number the probability is 0.
    """
    ends = np.cumsum([record.n_tokens for record in records])[:-1]
    pairs = zip(np.split(values, ends), np.split(tops, ends), strict=True)
    scores = [[np.exp(value.mean()), top.mean(), float(top.all())] for value, top in pairs]
    return np.nan_to_num(np.array(scores), nan=0.0)


def score_frame(records: Sequence[Any], scores: np.ndarray) -> pd.DataFrame:
    """The columns of `probes.memorised` from rows [R, 3] of probability, accuracy, extracted."""
    with np.errstate(divide="ignore"):
        loss = np.maximum(-np.log(scores[:, 0]), 0.0)
    columns = ([r.record_id for r in records], scores[:, 0], scores[:, 1], scores[:, 2] > 0.5, loss)
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def labels_of(records: Sequence[TokenRecord], device: torch.device) -> Tensor:
    """[N] completion tokens of all records."""
    return torch.tensor([token for record in records for token in record.completion], device=device)


def token_weights(records: Sequence[TokenRecord], device: torch.device) -> Tensor:
    """[N] factors that make a sum of token losses the sum of the records' means."""
    return torch.tensor([1 / record.n_tokens for record in records for _ in record.completion], device=device)


def backward_tokens(model: nn.Module) -> int:
    """Padded tokens a batch that is run backward: half of a forward one, whose activations are not kept."""
    return max(1, default_batch_tokens(next(model.parameters()).device) // 2)


def unit(vectors: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Vectors, each over the axes `dims`, at Euclidean length 1; 0 stays 0, and what is not finite counts as 0."""
    vectors = vectors.nan_to_num(0.0, 0.0, 0.0)
    tiny = torch.finfo(vectors.dtype).tiny
    peak = vectors.abs().amax(dims, keepdim=True)
    scaled = vectors / peak.clamp(min=tiny)  # the squares of tiny gradients would vanish
    size = scaled.square().sum(dims, keepdim=True).sqrt()
    return torch.where(peak > 0, scaled / size.clamp(min=tiny), 0.0)


def halving(run: Callable[[list[int]], list[Made]], batch: list[int], what: str) -> list[Made]:
    """`run(batch)`, one result an entry in order, in halves where memory runs out.

    Raises:
        ResourceError: when one entry does not fit in memory.
    """
    try:
        return run(batch)
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ResourceError(
                f"expected memory for one {what}, found too little; use a shorter record, a smaller dtype or another "
                "device"
            ) from None
    half = (len(batch) + 1) // 2
    return halving(run, batch[:half], what) + halving(run, batch[half:], what)
