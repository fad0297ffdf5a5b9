"""Hidden states behind each block: one forward pass shows them to whoever wants them, a block and a batch at a time.

The state h_l(t) is what block l puts out at position t: the residual stream, before the final norm. Hooks on the
blocks of the model map see it while the pass runs, so nothing is kept that the caller does not keep, and a hook may put
another state in its place (patching, steering). The pass goes on from there.

Batches are right-padded without a padding mask, as everywhere (`probes.likelihood`): with a causal model what stands
behind a position cannot change its state.

Shape letters: B records in a batch, T padded tokens, N positions that predict a completion token, d width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, Progress, check_records, default_batch_tokens, inference, out_of_memory
from probes.modelmap import ModelMap
from probes.parts import first_tensor, on_outputs
from probes.passes import sum_type
from probes.records import TokenRecord, length_batches, pad, predicting

# see(block, rows of the batch, which positions predict a completion token [B, T], states [B, T, d])
See = Callable[[int, list[int], Tensor, Tensor], Tensor | None]
Finish = Callable[[list[int], Tensor], None]  # finish(rows of the batch, final states [N, d])

TILE = 1 << 19  # logits reduced at once on a CPU, see `probes.likelihood`


def spaced_layers(n_blocks: int, count: int | None) -> tuple[int, ...]:
    """Indices of `count` evenly spaced blocks, the last one always among them; all of them for None.

    Raises:
        UsageError: fewer than one.
    """
    if count is None or count >= n_blocks:
        return tuple(range(n_blocks))
    if count < 1:
        raise UsageError(f"expected at least 1 layer, found {count}")
    return tuple(sorted({n_blocks - 1 - round(k * n_blocks / count) for k in range(count)}))


def language_map(model: nn.Module, model_map: ModelMap | None) -> ModelMap:
    """The map of a causal language model, built when absent.

    Raises:
        UnsupportedError: another kind of model.
    """
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    if model_map.task != "causal_lm":
        raise UnsupportedError("expected a causal language model to look inside, found an image classifier")
    model_map.expect_single()
    return model_map


def check_layers(model_map: ModelMap, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Block indices in depth order, all of them for None.

    Raises:
        UsageError: none, or one that the model does not have.
    """
    n = len(model_map.blocks)
    found = tuple(range(n)) if layers is None else tuple(sorted(set(layers)))
    if not found or not 0 <= found[0] <= found[-1] < n:
        raise UsageError(f"expected layers from 0 to {n - 1}, found {', '.join(map(str, found)) or 'none'}")
    return found


def run(
    model_map: ModelMap,
    records: Sequence[TokenRecord],
    layers: Sequence[int],
    see: See,
    *,
    finish: Finish | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> None:
    """One forward pass over records, with every wanted block's output shown to `see` as it is made.

    Args:
        model_map: of a causal language model, which is left as found.
        records: at least one.
        layers: indices of blocks; each is seen once a batch, in depth order.
        see: may return other states, which the pass goes on with. The tensors it gets belong to the pass: they are
            to be used at once, or copied.
        finish: sees what the output head would get, [N, d], records in batch order.
        batch_tokens: padded tokens a batch.
        progress: called with (records done, records in all).

    Raises:
        UsageError: no records.
        UnsupportedError: token ids that the model does not have, or blocks that put out no [B, T, d] tensor.
        ResourceError: a batch does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to look at, found none; add records")
    model = model_map.model
    check_records(records, model_map.vocab_size)
    device = next(model.parameters()).device
    block_of = {model_map.blocks[layer].name: layer for layer in layers}
    batch: list[int] = []
    where = torch.zeros(0, 0, dtype=torch.bool)  # [B, T] of the batch under way

    def hook(path: str, output: Tensor) -> Tensor | None:
        if output.shape[:-1] != where.shape:
            raise UnsupportedError(
                f"expected blocks that put out a state for each token, found {tuple(output.shape)} from {path}"
            )
        return see(block_of[path], batch, where.to(output.device), output)

    done = 0
    try:
        with inference(model), on_outputs(model, list(block_of), hook):
            for batch in length_batches(records, batch_tokens or default_batch_tokens(device)):
                chosen = [records[i] for i in batch]
                ids, _ = pad(chosen, device)  # [B, T]
                where = predicting(chosen, ids)
                hidden = model_map.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
                if finish:
                    finish(batch, hidden[where])
                done += len(batch)
                if progress:
                    progress(done, len(records))
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "expected memory for the hidden states of one batch, found too little; lower batch_tokens"
        ) from None


def predicting_states(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> dict[int, list[Tensor]]:
    """States at the positions that predict each record's completion.

    Args:
        model: a causal language model; left as found.
        records: at least one.
        layers: indices of blocks; all of them by default.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.

    Returns:
        Block -> for each record, in order, [n_tokens, d] on the CPU in the model's own type: as many numbers as
        tokens x blocks x width, so choose the layers of a long list.

    Raises:
        UsageError, UnsupportedError, ResourceError: see `run`.
    """
    model_map = language_map(model, model_map)
    chosen = check_layers(model_map, layers)
    found: dict[int, list[Tensor]] = {layer: [torch.zeros(0)] * len(records) for layer in chosen}

    def keep(layer: int, batch: list[int], where: Tensor, output: Tensor) -> None:
        pieces = torch.split(output[where].cpu(), [records[i].n_tokens for i in batch])
        for i, piece in zip(batch, pieces, strict=True):
            found[layer][i] = piece

    run(model_map, records, chosen, keep, batch_tokens=batch_tokens)
    return {layer: [piece.clone() for piece in pieces] for layer, pieces in found.items()}  # no inference tensors


def prompt_states(
    model: nn.Module,
    records: Sequence[TokenRecord],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> dict[int, NDArray[np.float64]]:
    """States at the last prompt token of each record: block -> [R, d]. Arguments and errors as `predicting_states`."""
    model_map = language_map(model, model_map)
    chosen = check_layers(model_map, layers)
    found: dict[int, list[Tensor]] = {layer: [torch.zeros(0)] * len(records) for layer in chosen}

    def keep(layer: int, batch: list[int], where: Tensor, output: Tensor) -> None:
        for row, i in enumerate(batch):
            found[layer][i] = output[row, records[i].n_prompt - 1].double().cpu()

    run(model_map, records, chosen, keep, batch_tokens=batch_tokens)
    return {layer: torch.stack(rows).numpy().copy() for layer, rows in found.items()}


def readout(model_map: ModelMap) -> Callable[[Tensor], Tensor]:
    """What turns a state behind a block into what the output head expects: the final norm, or nothing if there is none.

    It is tried on two tokens: behind the last block it must give what the model itself hands to its head.

    Raises:
        UnsupportedError: a model that does something else between its last block and its head.
    """
    model = model_map.model
    norm = model.get_submodule(model_map.final_norm) if model_map.final_norm is not None else nn.Identity()

    def apply(states: Tensor) -> Tensor:
        return cast(Tensor, norm(states))

    seen: list[Tensor] = []
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    last = model_map.blocks[-1].name
    with inference(model), on_outputs(model, [last], lambda path, output: seen.append(output.clone())):
        hidden = model_map.backbone()(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).last_hidden_state  # [1, 2, d]
        fits = bool(seen) and seen[-1].shape == hidden.shape
        if fits:
            found = first_tensor(apply(seen[-1])).to(hidden.device)
            size = float(hidden.abs().max())
            fits = torch.allclose(found, hidden, rtol=0.0, atol=16 * torch.finfo(hidden.dtype).eps * max(size, 1e-30))
    if not fits:
        raise UnsupportedError(
            f"expected a model whose head reads its last block through the final norm, found {type(model).__name__}, "
            "which does something else in between"
        )
    return apply


def token_scores(model_map: ModelMap, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of a token under the output head, without the logits of all positions at once.

    Args:
        model_map: of the model whose head is used.
        hidden: [N, d] what the head reads.
        targets: [N] int64.

    Returns:
        log p [N] in nats (fp32, float64 for a float64 model), and rank [N]: how many tokens have a larger logit.
    """
    vocabulary = model_map.vocab_size
    head = max(1, CHUNK_ELEMENTS // vocabulary)
    tile = max(1, (TILE if hidden.device.type == "cpu" else CHUNK_ELEMENTS) // vocabulary)
    log_probs, ranks = [], []
    for start in range(0, len(hidden), head):
        logits = model_map.logits(hidden[start : start + head])  # [C, V]
        logits = logits.to(sum_type(logits))
        gold = logits.gather(-1, targets[start : start + head, None].to(logits.device))  # [C, 1]
        for part in range(0, len(logits), tile):  # what is read twice is still in the processor's cache
            some, own = logits[part : part + tile], gold[part : part + tile]
            log_probs.append((own - some.logsumexp(-1, keepdim=True)).squeeze(-1))
            # counted in floating point, where a sum is vectorised as one over booleans is not; exact below 2^24
            ranks.append(torch.gt(some, own, out=torch.empty_like(some)).sum(-1))
    if not log_probs:
        return hidden.new_zeros(0), torch.zeros(0, dtype=torch.long)
    return torch.cat(log_probs), torch.cat(ranks).long()


def completions(records: Sequence[TokenRecord], batch: Sequence[int]) -> Tensor:
    """[N] completion tokens of a batch, in the order of the states that predict them."""
    return torch.tensor([token for i in batch for token in records[i].completion])


def record_means(values: Tensor, records: Sequence[TokenRecord], batch: Sequence[int]) -> NDArray[np.float64]:
    """Mean of token values [N] over each record of a batch, [B], added up in float64."""
    pieces = values.detach().double().cpu().numpy()
    ends = np.cumsum([records[i].n_tokens for i in batch])
    return np.array([piece.mean() for piece in np.split(pieces, ends[:-1])])
