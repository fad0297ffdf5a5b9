"""Greedy continuations against `generate()` at batch size 1, and the steps they save."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.extraction import continuation, greedy_tokens
from attacks.extraction.continuation import continuations, sure_tokens, work
from probes.errors import ResourceError, UsageError
from probes.likelihood import TokenTable, logit_noise, score
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny


def altered(model: torch.nn.Module, n: int = 30, seed: int = 0) -> list[TokenRecord]:
    """Records that follow the model's greedy decoding up to some token: all of it, none of it, or in between."""
    generator = np.random.default_rng(seed)
    records = []
    for i in range(n):
        prompt = [int(t) for t in generator.integers(4, 96, int(generator.integers(1, 12)))]
        completion = greedy_tokens(model, prompt, int(generator.integers(1, 20)))
        for at in sorted(generator.integers(0, len(completion), i % 4)):
            completion[at] = (completion[at] + 1) % 96
        records.append(TokenRecord(f"r{i}", (*prompt, *completion), len(prompt), 10))
    return records


def truth(model: torch.nn.Module, records: list[TokenRecord], length: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(greedy_tokens(model, r.ids[: r.n_prompt], length or r.n_tokens)) for r in records]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])  # gemma2: a sliding window shorter than the rows
def test_continuations_equal_generate(arch: str) -> None:
    model = tiny.causal_lm(arch).double()
    records = altered(model)
    table = score(model, records)
    noise = logit_noise(model, records)
    expected = truth(model, records)
    assert continuations(model, records, table, noise=noise) == expected
    assert continuations(model, records, table, noise=noise, batch=1) == expected
    assert continuations(model, records, table, noise=1e9) == expected  # nothing sure: decoded from the prompt


@pytest.mark.parametrize("length", [1, 5, 30])
def test_other_lengths_equal_generate(length: int) -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 16)
    found = continuations(model, records, score(model, records), noise=1e-9, length=length)
    assert found == truth(model, records, length)


def test_an_untouched_model_and_no_order_effects() -> None:
    model = tiny.causal_lm("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = altered(model, 12)
    table = score(model, records)
    found = continuations(model, records, table, noise=1e-5)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    back = records[::-1]
    assert continuations(model, back, score(model, back), noise=1e-5)[::-1] == found


def counted(
    model: torch.nn.Module, records: list[TokenRecord], table: TokenTable, noise: float, batch: int = 16
) -> tuple[int, int]:
    """Forward passes, and rows in them, that `continuations` really takes."""
    model_map = ModelMap.of(model)
    rows: list[int] = []
    hook = model_map.backbone().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    continuations(model, records, table, noise=noise, batch=batch, model_map=model_map)
    hook.remove()
    assert max(rows, default=0) <= batch
    return len(rows), sum(rows)


def planted() -> tuple[torch.nn.Module, list[TokenRecord]]:
    """A model that knows 12 of 24 records by heart, and the beginnings of 6 of the others."""
    generator = np.random.default_rng(1)
    ids = [[2, *(int(t) for t in generator.integers(4, 96, 31))] for _ in range(24)]
    model = tiny.causal_lm("llama")
    tiny.train(model, [*ids[:12], *(row[:24] for row in ids[12:18])], steps=90)
    return model, [TokenRecord(f"r{i}", tuple(row), 8, 20) for i, row in enumerate(ids)]


def test_steps_saved_on_a_planted_model() -> None:
    model, records = planted()
    table, noise = score(model, records), logit_noise(model, records)
    found = work(records, table, noise=noise)
    sure = [sure_tokens(table, i, noise) for i in range(24)]
    assert sum(n == 24 for n in sure) >= 12
    assert found.plain == 24 * 24
    assert found.decoded == sum(n < 24 for n in sure)
    assert counted(model, records, table, noise) == (found.calls, found.steps)
    few = work(records, table, noise=noise, batch=4)
    assert counted(model, records, table, noise, 4) == (few.calls, few.steps)
    assert found.steps < 0.5 * found.plain
    assert found.calls < 0.2 * found.plain
    assert continuations(model, records, table, noise=noise) == truth(model, records)


def test_a_clearly_extracted_record_is_not_decoded() -> None:
    model = tiny.causal_lm("llama").double()
    prompt = [5, 9, 13]
    record = TokenRecord("r", (*prompt, *greedy_tokens(model, prompt, 10)), 3, 8)
    table = score(model, [record])
    assert counted(model, [record], table, 1e-9) == (0, 0)
    assert work([record], table, noise=1e-9) == continuation.Work(plain=10, steps=0, calls=0, decoded=0)
    assert counted(model, [record], table, 1e9) == (10, 10)


def test_a_near_tie_is_decoded_and_not_taken_from_the_record() -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 8)
    table = score(model, records)
    i = next(i for i, r in enumerate(records) if r.n_tokens > 3 and sure_tokens(table, i, 0.0) == r.n_tokens)
    table.margin[table.rows(i)] = [0.5, 1e-6, *[0.5] * (records[i].n_tokens - 2)]
    assert sure_tokens(table, i, 1e-5) == 1
    assert sure_tokens(table, i, 1e-7) == records[i].n_tokens


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 20)
    table = score(model, records)
    expected, real = truth(model, records), continuation._decode_together

    def starved(model, model_map, rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, model_map, rows)

    monkeypatch.setattr(continuation, "_decode_together", starved)
    assert continuations(model, records, table, noise=1e-9) == expected

    def always(model, model_map, rows):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(continuation, "_decode_together", always)
    with pytest.raises(ResourceError, match="memory to decode"):
        continuations(model, records, table, noise=1e-9)


def test_bad_input() -> None:
    model = tiny.causal_lm("llama")
    records = altered(model, 4)
    table = score(model, records)
    assert continuations(model, [], score(model, []), noise=0.0) == []
    with pytest.raises(UsageError, match="token table of these records"):
        continuations(model, records[:3], table, noise=0.0)
    with pytest.raises(UsageError, match="at least 1 token"):
        continuations(model, records, table, noise=0.0, length=0)
    with pytest.raises(UsageError, match="at least 1 row"):
        continuations(model, records, table, noise=0.0, batch=0)
    with pytest.raises(UsageError, match="at most 128 tokens"):
        continuations(model, records, table, noise=0.0, length=128)
    one = [TokenRecord("r", (5, 6), 1, 1)]  # a record of one token
    assert continuations(model, one, score(model, one), noise=0.0) == truth(model, one)
    row = continuation._Row(0, 1, (777,), 3)
    assert "777" not in repr(row)
