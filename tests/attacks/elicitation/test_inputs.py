"""Rows of embeddings against rows of tokens, lengths of the table by brute force, scores against whole logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attacks.elicitation import inputs
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import TokenRecord, pad, predicting
from tests import tiny

SHAPES = ((3, 5), (1, 2), (6, 1), (2, 9))


def records(shapes: tuple[tuple[int, int], ...] = SHAPES, seed: int = 0) -> list[TokenRecord]:
    generator = np.random.default_rng(seed)
    return [
        TokenRecord(f"r{i}", tuple(int(t) for t in generator.integers(4, 96, p + c)), p, 9)
        for i, (p, c) in enumerate(shapes)
    ]


@pytest.mark.parametrize("arch", [*tiny.CAUSAL, "gemma3_text"])
def test_rows_of_embeddings_are_rows_of_tokens(arch: str) -> None:
    options = {**tiny._LLAMA_LIKE, "sliding_window": 16} if arch == "gemma3_text" else {}
    model = tiny.causal_lm(arch, **options)
    mapped, rows = ModelMap.of(model), records()
    ids, _ = pad(rows)
    with torch.no_grad():
        expected = mapped.backbone()(input_ids=ids, use_cache=False).last_hidden_state
        found = inputs.final_states(mapped, inputs.embedded(mapped, ids))
    assert torch.equal(found, expected)
    assert torch.equal(inputs.table_of(model)[ids], inputs.embedded(mapped, ids))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_lengths_of_the_table_by_brute_force(arch: str) -> None:
    model = tiny.causal_lm(arch, dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight[90:] = model.get_input_embeddings().weight[89]  # rows that are one
        table = model.get_input_embeddings()(torch.arange(96)).numpy()
    nearest = []
    for row in table:
        distances = np.linalg.norm(table - row, axis=1)
        nearest.append(distances[distances > 1e-9].min())
    assert inputs.rms_of(model) == pytest.approx(float(np.sqrt((table**2).mean())))
    assert inputs.neighbour_distance(model) == pytest.approx(float(np.mean(nearest)))


def test_a_large_table_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama")
    whole = inputs.neighbour_distance(model)
    monkeypatch.setattr(inputs, "NEIGHBOURS", 32)
    assert inputs.neighbour_distance(model) == pytest.approx(whole, rel=0.05)


def test_a_table_without_differences_is_refused() -> None:
    model = tiny.causal_lm("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(0.5)
    with pytest.raises(UsageError, match="all alike"):
        inputs.neighbour_distance(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(UsageError, match="not 0"):
        inputs.rms_of(model)


@pytest.mark.parametrize("chunk", [100, 8_000_000])
def test_scores_are_those_of_the_one_pass(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_ELEMENTS", chunk)
    model, rows = tiny.causal_lm("gemma2"), records()
    tiny.train(model, [record.ids for record in rows[:2]], steps=30)
    mapped = ModelMap.of(model)
    ids, _ = pad(rows)
    with torch.no_grad():
        states = inputs.final_states(mapped, inputs.embedded(mapped, ids))[predicting(rows, ids)]
    scores = inputs.record_scores(rows, *inputs.token_scores(mapped, states, inputs.labels_of(rows, ids.device)))
    found, expected = inputs.score_frame(rows, scores), memorised(model, rows)
    assert list(found.columns) == list(expected.columns)
    assert found["record_id"].tolist() == expected["record_id"].tolist()
    assert found["extracted"].tolist() == expected["extracted"].tolist()
    assert expected["extracted"].any()
    for name in ("probability", "accuracy", "loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_what_is_no_number_counts_as_nothing() -> None:
    rows = records(((1, 2),))
    scores = inputs.record_scores(rows, np.array([np.nan, -1.0]), np.array([True, True]))
    assert scores[0, 0] == 0.0
    assert np.isinf(inputs.score_frame(rows, scores)["loss"][0])


def test_unit_vectors_keep_zeros_and_tiny_gradients() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, -4e-30], [torch.nan, 2.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [0.0, 1.0]])
    torch.testing.assert_close(inputs.unit(vectors, (-1,)), expected)


def test_batches_are_halved_where_memory_runs_out() -> None:
    sizes = []

    def run(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return [10 * i for i in batch]

    assert inputs.halving(run, [1, 2, 3, 4, 5], "record") == [10, 20, 30, 40, 50]
    assert max(sizes) == 5

    def never(batch: list[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(ResourceError, match="one record"):
        inputs.halving(never, [1, 2], "record")
    with pytest.raises(KeyError):  # anything else is not about memory
        inputs.halving(lambda batch: {}[0], [1, 2], "record")  # type: ignore[index]


def test_records_that_cannot_be_run_are_refused() -> None:
    mapped = ModelMap.of(tiny.causal_lm("gpt2"))
    assert inputs.positions(mapped) == 128
    inputs.check(mapped, records(((100, 20),)), 8)
    with pytest.raises(UsageError, match="at most 119 tokens"):
        inputs.check(mapped, records(((100, 20),)), 9)
    with pytest.raises(UsageError, match="at least one record"):
        inputs.check(mapped, [])
    with pytest.raises(UnsupportedError, match="vocabulary size"):
        inputs.check(mapped, [TokenRecord("r", (5, 96), 1, 9)])


def test_a_model_that_takes_tokens_alone_is_named() -> None:
    model = tiny.causal_lm("llama")
    mapped = ModelMap.of(model)

    class Tokens(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None: ...

    model.model = Tokens()
    with pytest.raises(UnsupportedError, match="runs on embeddings"):
        inputs.final_states(mapped, torch.zeros(1, 2, 32))
