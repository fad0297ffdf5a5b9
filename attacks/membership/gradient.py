"""Gradient norm: a record the model was trained on asks for little change of its weights.

The score of record i with loss L_i (mean cross entropy over its completion tokens; of an image, its cross entropy) is

    - || d L_i / d theta ||_2

over the weights theta of the linear maps of the blocks (Wang et al., arXiv 2402.17012, who take all parameters). It is
the root of the record's self-influence, which `probes.influence` computes without any record's gradient of a weight
(|| G ||^2 = sum_ts (g_t . g_s)(x_t . x_s) over the record's positions), for whole batches at a time and in evaluation
mode: with dropout on, as published code has it, the score is partly noise.

Limits: embeddings, norms, biases and the output head take no part. The norm follows the loss closely where records
differ mainly in their loss, and the length of a record where they differ in that: longer ones have smaller norms of
their mean loss.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from probes.influence import influence
from probes.likelihood import Progress
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.taps import sites


def gradient_norm(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    model_map: ModelMap | None = None,
    layers: Collection[int] | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Minus the norm of every record's loss gradient.

    Args:
        model: a causal language model or an image classifier; evaluation mode meanwhile, as before afterwards.
        records: texts, or images of one shape.
        model_map: the model's map, built when absent.
        layers: indices of blocks whose weights count; all by default. The cost is one forward pass and a backward
            pass down to the lowest of them.
        batch_tokens: padded tokens a batch, or images; the result depends on it by rounding only.
        progress: called with (records done, records in all).

    Returns:
        [R] scores, at most 0 and finite, in nats per unit of weight; higher = more likely a member.

    Raises:
        UsageError: a block that does not exist.
        UnsupportedError: token ids or labels that the model does not have, or maps whose rows cannot be told apart.
        ResourceError: a batch does not fit in memory.
    """
    chosen = sites(model_map or ModelMap.of(model), blocks=layers)
    if not records:
        return np.zeros(0)
    shortest = min(range(len(records)), key=lambda i: len(getattr(records[i], "ids", ())))
    found = influence(
        model,
        records,
        records[shortest : shortest + 1],  # self-influence needs no target; one is asked for, so the cheapest
        modules=[site.key for site in chosen],
        batch_tokens=batch_tokens,
        progress=None if progress is None else lambda done, _: progress(max(0, done - 1), len(records)),
    )
    return -np.sqrt(np.maximum(found.self_influence, 0.0)) + 0.0
