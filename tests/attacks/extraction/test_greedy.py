"""The one-pass greedy verdict against real generation at batch size 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from attacks.extraction import confirm, emits, greedy_tokens
from probes.figures import record_figures
from probes.likelihood import logit_noise, score
from probes.records import TokenRecord
from tests import tiny


def half_memorised(model: torch.nn.Module, n: int = 200, seed: int = 0) -> list[TokenRecord]:
    """`n` records: half continue as the model's own greedy decoding, half differ from it in one token."""
    generator = np.random.default_rng(seed)
    records = []
    for i in range(n):
        prompt = [int(t) for t in generator.integers(4, 96, int(generator.integers(1, 12)))]
        completion = greedy_tokens(model, prompt, int(generator.integers(1, 20)))
        if i % 2:
            at = int(generator.integers(0, len(completion)))
            completion[at] = (completion[at] + 1) % 96
        records.append(TokenRecord(f"r{i}", (*prompt, *completion), len(prompt), 10))
    return records


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_no_disagreement_in_float32(arch: str) -> None:
    model = tiny.causal_lm(arch)
    records = half_memorised(model)
    frame = record_figures(score(model, records), noise=logit_noise(model, records))
    truth = [emits(model, record) for record in records]
    assert 80 <= sum(truth) <= 120
    clear = frame["greedy"] != "uncertain"
    assert clear.mean() > 0.95
    assert ((frame["greedy"] == "extracted") == truth)[clear].all()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_bfloat16_disagreements_are_uncertain(arch: str) -> None:
    model = tiny.causal_lm(arch).to(torch.bfloat16)
    records = half_memorised(model)
    frame = record_figures(score(model, records), noise=logit_noise(model, records))
    truth = np.array([emits(model, record) for record in records])
    wrong = (frame["greedy"] == "extracted").to_numpy() != truth
    assert (frame["greedy"][wrong] == "uncertain").all()


def test_confirmation_generates_what_is_not_clearly_missed() -> None:
    model = tiny.causal_lm("llama")
    records = half_memorised(model, 40)
    frame = record_figures(score(model, records), noise=logit_noise(model, records))
    confirmed, summary = confirm(model, records, frame)
    assert summary.generated == int((frame["greedy"] != "not").sum())
    assert summary.disagreements == 0
    assert list(confirmed["emitted"]) == [emits(model, record) for record in records]
    assert not confirmed["emitted"][frame["greedy"] == "not"].any()


def test_a_contradicted_verdict_becomes_uncertain() -> None:
    model = tiny.causal_lm("llama")
    records = half_memorised(model, 10)
    frame = record_figures(score(model, records))
    frame["greedy"] = "extracted"  # as a broken pass would say
    confirmed, summary = confirm(model, records, frame)
    assert summary.disagreements == 5
    assert (confirmed["greedy"][~confirmed["emitted"]] == "uncertain").all()


def test_the_checkpoints_generation_defaults_do_not_leak_in() -> None:
    model = tiny.causal_lm("llama")
    plain = greedy_tokens(model, [5, 6, 7], 30)
    own = GenerationConfig(repetition_penalty=5.0, eos_token_id=plain[3], suppress_tokens=[plain[0]], do_sample=True)
    model.generation_config = own
    assert greedy_tokens(model, [5, 6, 7], 30) == plain
    assert model.generation_config is own


def test_an_end_token_inside_the_record_is_just_a_token() -> None:
    model = tiny.causal_lm("llama")
    tokens = greedy_tokens(model, [9], 12)
    model.generation_config.eos_token_id = tokens[4]
    assert emits(model, TokenRecord("a", (9, *tokens), 1, 4))
