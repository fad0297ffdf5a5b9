"""Hidden states behind blocks, against what the models hand out themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.inside import states
from probes.inside.states import (
    check_layers,
    language_map,
    predicting_states,
    prompt_states,
    readout,
    record_means,
    run,
    spaced_layers,
    token_scores,
)
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests.probes.inside.world import F64, double, left_as_found, slow_states, texts
from tests.tiny import CAUSAL, causal_lm, image_classifier


@pytest.mark.parametrize("arch", CAUSAL)
def test_states_are_those_the_model_hands_out(arch: str) -> None:
    model, records = double(arch), texts()
    with left_as_found(model):
        found = predicting_states(model, records, batch_tokens=24)
        prompts = prompt_states(model, records, batch_tokens=24)
    for i, record in enumerate(records):
        for layer, slow in enumerate(slow_states(model, record)):
            torch.testing.assert_close(found[layer][i], slow[record.n_prompt - 1 : -1], rtol=0, atol=1e-10)
            np.testing.assert_allclose(prompts[layer][i], slow[record.n_prompt - 1].numpy(), rtol=0, atol=1e-10)


def test_a_caller_sees_one_block_of_one_batch_at_a_time() -> None:
    model, records = causal_lm("llama"), texts(6)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def see(layer: int, batch: list[int], where: Tensor, output: Tensor) -> None:
        assert output.shape[:2] == where.shape == (len(batch), max(len(records[i].ids) for i in batch))
        assert where.sum() == sum(records[i].n_tokens for i in batch)
        seen.append((layer, tuple(batch)))

    run(ModelMap.of(model), records, [0, 2], see, batch_tokens=22)
    batches = list(dict.fromkeys(batch for _, batch in seen))
    assert len(batches) > 1
    assert seen == [(layer, batch) for batch in batches for layer in (0, 2)]
    assert sorted(i for batch in batches for i in batch) == list(range(6))


def test_the_pass_goes_on_from_what_the_caller_puts_in_place() -> None:
    model, records = causal_lm("gpt2", dtype=F64), texts(3)
    finals: list[Tensor] = []
    run(
        ModelMap.of(model),
        records,
        [2],
        lambda layer, batch, where, output: torch.zeros_like(output),
        finish=lambda batch, hidden: finals.append(hidden),
    )
    norm = model.get_submodule("transformer.ln_f")
    torch.testing.assert_close(finals[0], norm(torch.zeros_like(finals[0])), rtol=0, atol=1e-12)


def test_models_are_left_as_found_when_the_caller_fails() -> None:
    model = causal_lm("llama").train()
    with left_as_found(model), pytest.raises(ZeroDivisionError):
        run(ModelMap.of(model), texts(2), [1], lambda *given: 1 / 0)  # type: ignore[arg-type, return-value]


def test_a_batch_that_does_not_fit_says_what_to_do() -> None:
    def see(*given: object) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(ResourceError, match="lower batch_tokens"):
        run(ModelMap.of(causal_lm("llama")), texts(2), [0], see)


def test_spaced_layers_end_with_the_last() -> None:
    assert spaced_layers(30, 6) == (4, 9, 14, 19, 24, 29)
    assert spaced_layers(3, None) == spaced_layers(3, 3) == spaced_layers(3, 9) == (0, 1, 2)
    assert spaced_layers(12, 1) == (11,)
    for n in range(1, 40):
        for count in range(1, n + 1):
            found = spaced_layers(n, count)
            assert len(found) == count
            assert found[-1] == n - 1
            assert found[0] >= 0
    with pytest.raises(UsageError, match="at least 1 layer"):
        spaced_layers(4, 0)


def test_what_cannot_be_looked_into_is_refused() -> None:
    model = causal_lm("llama")
    model_map = ModelMap.of(model)
    with pytest.raises(UsageError, match="at least one record"):
        predicting_states(model, [])
    with pytest.raises(UnsupportedError, match="vocabulary"):
        predicting_states(model, [TokenRecord("a", (5, 4000), 1, 1)])
    for layers in ([], [3], [-1]):
        with pytest.raises(UsageError, match="expected layers from 0 to 2"):
            check_layers(model_map, layers)
    with pytest.raises(UnsupportedError, match="image classifier"):
        language_map(image_classifier("vit"), None)
    with pytest.raises(UnsupportedError, match="something else in between"):
        readout(replace(model_map, final_norm=None))


def test_token_scores_are_those_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("gemma2", dtype=F64)  # caps its logits
    model_map = ModelMap.of(model)
    hidden = torch.randn(23, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(23) * 4
    monkeypatch.setattr(states, "CHUNK_ELEMENTS", 96 * 7)
    monkeypatch.setattr(states, "TILE", 96 * 2)
    with torch.no_grad():
        log_prob, rank = token_scores(model_map, hidden, targets)
        logits = model_map.logits(hidden)
    gold = logits[torch.arange(23), targets]
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[torch.arange(23), targets], rtol=0, atol=1e-12)
    assert rank.tolist() == (logits > gold[:, None]).sum(-1).tolist()
    assert math.isfinite(float(log_prob.sum()))


def test_means_are_taken_over_each_record() -> None:
    records = texts(3)
    values = torch.arange(sum(record.n_tokens for record in records), dtype=torch.float32)
    pieces = torch.split(values, [records[i].n_tokens for i in (2, 0, 1)])
    assert record_means(values, records, [2, 0, 1]) == pytest.approx([float(piece.mean()) for piece in pieces])
