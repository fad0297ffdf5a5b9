"""Discoverable extraction: does the checkpoint emit a record when it is given the record's beginning?

The one-pass verdict (`probes.figures.verdict`) says what greedy decoding would do; this module does it, with a real
`generate()` at batch size 1, for every record that the pass calls extracted or uncertain.

Limits: one prompt a record, under the dtype and device of the audit. Records that sampling or another prompt would
bring out are not found here (`n_for_p50` bounds the sampling side).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from probes.likelihood import inference
from probes.records import TokenRecord


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Hide the checkpoint's own generation defaults.

    `generate()` fills every value the caller leaves unset from the checkpoint's generation config, so an instruct
    checkpoint's repetition penalty or end token would silently change what greedy decoding means.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def greedy_tokens(model: Any, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Exactly `n_tokens` greedy tokens after `prompt`, batch size 1, cached decoding, no end token, no penalties."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)  # [1, T]
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=n_tokens, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    with neutral_generation(model), inference(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def emits(model: nn.Module, record: TokenRecord) -> bool:
    """Whether greedy decoding from the record's prompt emits its whole completion."""
    prompt = record.ids[: record.n_prompt]
    return greedy_tokens(model, prompt, record.n_tokens) == list(record.completion)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What `confirm` did: records generated, and verdicts of the one pass that `generate()` contradicted."""

    generated: int
    disagreements: int


def confirm(
    model: nn.Module,
    records: Sequence[TokenRecord],
    figures: pd.DataFrame,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pd.DataFrame, Confirmation]:
    """Generate every record that the one pass calls `extracted` or `uncertain`.

    Args:
        model: the checkpoint that `figures` were measured on.
        records: the records, in the order of `figures`.
        figures: rows of `probes.figures.record_figures`.
        progress: called with (records generated, records to generate).

    Returns:
        `figures` with a boolean column `emitted` (False for verdict `not`); a verdict `extracted` that generation
        contradicts becomes `uncertain`, and is counted as a disagreement.
    """
    todo = [i for i, verdict in enumerate(figures["greedy"]) if verdict != "not"]
    greedy, emitted = list(figures["greedy"]), [False] * len(figures)
    disagreements = 0
    for done, i in enumerate(todo, start=1):
        emitted[i] = emits(model, records[i])
        if greedy[i] == "extracted" and not emitted[i]:
            greedy[i] = "uncertain"
            disagreements += 1
        if progress:
            progress(done, len(todo))
    return figures.assign(greedy=greedy, emitted=emitted), Confirmation(len(todo), disagreements)
