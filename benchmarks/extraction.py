"""Exact extraction of 50 tokens after a 50-token prompt: decoding them against reading the verdict off one pass.

Half of the records continue as the model itself would, so greedy decoding emits them; the others end in random tokens.
Both sides must agree on every record. An audit also confirms what it finds with `generate()`, a cost per record found
that is not in the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attacks.extraction import neutral_generation
from benchmarks.harness import Ratio, interleave
from benchmarks.likelihood import figures
from benchmarks.subject import Subject, random_ids
from probes.likelihood import inference
from probes.records import TokenRecord

PROMPT = COMPLETION = 50


def run(subject: Subject) -> Iterator[Ratio]:
    target = subject.target(8 if subject.device == "cpu" else 20)
    for batch_size, n in ((1, 4), (16, 32)) if subject.tiny or subject.device != "cpu" else ((1, 8), (16, 32)):
        records = _records(subject, n)
        found: dict[str, list[bool]] = {}
        audit = figures(subject, records, {"batch_size": batch_size})

        def decoded(records=records, batch_size=batch_size, found=found) -> None:
            found["decoded"] = _decoded(subject, records, batch_size)

        def read(audit=audit, found=found) -> None:
            found["read"] = [verdict == "extracted" for verdict in audit()["greedy"]]

        seconds = interleave({"decoded": decoded, "read": read}, subject)
        differ = sum(a != b for a, b in zip(found["decoded"], found["read"], strict=True))
        note = f"{n} records, {sum(found['read'])} extracted, {differ} disagreements"
        case = f"generate() / one pass: batch {batch_size}"
        yield Ratio(case, seconds["decoded"], seconds["read"], target, at_least=True, note=note)


def _records(subject: Subject, n: int) -> list[TokenRecord]:
    prompts = random_ids(subject, n, PROMPT)
    own = _greedy(subject, prompts[::2])
    completions = random_ids(subject, n, COMPLETION).flip(0)
    completions[::2] = own
    ids = torch.cat([prompts, completions], dim=1).tolist()
    return [TokenRecord(f"r{i}", tuple(row), PROMPT, COMPLETION) for i, row in enumerate(ids)]


def _decoded(subject: Subject, records: list[TokenRecord], batch_size: int) -> list[bool]:
    ids = torch.tensor([record.ids for record in records])  # [n, 100]
    out = torch.cat([_greedy(subject, prompts) for prompts in ids[:, :PROMPT].split(batch_size)])
    return (out == ids[:, PROMPT:]).all(dim=1).tolist()


def _greedy(subject: Subject, prompts: torch.Tensor) -> torch.Tensor:
    """[B, 50] greedy continuations of prompts [B, 50], cached, without end token or penalties."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=COMPLETION, use_cache=True, pad_token_id=0)
    prompts = prompts.to(subject.device)
    with neutral_generation(subject.model), inference(subject.model):
        out = subject.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    return out[:, PROMPT:].cpu()
