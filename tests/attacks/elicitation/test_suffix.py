"""Universal suffixes: one step against every token, what is tried on half B, and what can be typed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from attacks.elicitation import suffix
from attacks.extraction import gcg
from probes.errors import UsageError
from probes.memorised import memorised
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.elicitation.hidden import hidden, left_as_found
from tests.attacks.elicitation.test_inputs import records


def slow_loss(model: torch.nn.Module, rows: list[TokenRecord], ids: tuple[int, ...]) -> float:
    losses = []
    for row in rows:
        whole = torch.tensor([[*row.ids[: row.n_prompt], *ids, *row.completion]])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, -row.n_tokens - 1 : -1]
        losses.append(float(functional.cross_entropy(logits, torch.tensor(row.completion))))
    return float(np.mean(losses))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_one_step_over_all_tokens_is_the_best_token_for_all_records_together(arch: str) -> None:
    model, rows = tiny.causal_lm(arch, dtype=torch.float64), records()
    start = gcg.initial_prompt(1, None, gcg.every_token(96), np.random.default_rng([0, 29]))
    every = {(token,): slow_loss(model, rows, (token,)) for token in range(96)}
    best = min((ids for ids in every if ids != start), key=lambda ids: every[ids])
    found = suffix.search(model, rows, length=1, steps=1, batch=4, candidates=95, top_k=96)
    assert found.losses == (pytest.approx(every[best]),)
    assert found.initial_loss == pytest.approx(every[start])
    assert found.ids == min(start, best, key=lambda ids: every[ids])
    assert found.loss == pytest.approx(every[found.ids])
    assert found.backwards == 4
    assert found.forwards == 4 + 4 + 4 * 95 + 4  # at the start, with the gradients, candidates, at the end


def test_the_slopes_of_a_batch_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.causal_lm("llama", dtype=torch.float64), records()
    seen, whole = [], suffix.ranked_tokens

    def listen(slope: torch.Tensor, *rest: object) -> np.ndarray:
        seen.append(slope)
        return whole(slope, *rest)

    monkeypatch.setattr(suffix, "ranked_tokens", listen)
    suffix.search(model, rows, length=2, steps=1, batch=4, candidates=4)
    start = gcg.initial_prompt(2, None, gcg.every_token(96), np.random.default_rng([0, 29]))
    onehot = functional.one_hot(torch.tensor(start), 96).double().requires_grad_(True)
    table, total = model.get_input_embeddings().weight.detach(), torch.zeros(())
    for row in rows:
        before, after = (table[list(ids)] for ids in (row.ids[: row.n_prompt], row.completion))
        logits = model(inputs_embeds=torch.cat([before, onehot @ table, after])[None]).logits[0, -row.n_tokens - 1 : -1]
        total = total + functional.cross_entropy(logits, torch.tensor(row.completion))
    (expected,) = torch.autograd.grad(total, onehot)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-6)


def test_a_suffix_stands_between_prompt_and_completion() -> None:
    row = TokenRecord("r", (4, 5, 6, 7, 8), 2, 9, "g")
    assert suffix.appended([row], (90, 91)) == [TokenRecord("r", (4, 5, 90, 91, 6, 7, 8), 4, 9, "g")]
    assert suffix.appended([row], ()) == [row]


def test_the_seed_decides_and_the_model_is_left_as_found() -> None:
    model, rows = tiny.causal_lm("gpt2").train(), records()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones_like(model.transformer.ln_f.weight)
    options = {"length": 3, "steps": 3, "batch": 2, "candidates": 8}
    with left_as_found(model):
        first, again, other = (suffix.search(model, rows, **options, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.ids != other.ids

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        suffix.search(model, rows, **options, progress=stop)


def test_the_best_suffix_measured_on_all_records_is_returned() -> None:
    model, rows = tiny.causal_lm("llama", dtype=torch.float64), records()
    found = suffix.search(model, rows, length=2, steps=12, batch=1, candidates=8, check=1)
    assert found.loss == pytest.approx(slow_loss(model, rows, found.ids))
    assert found.loss < found.initial_loss
    last_only = suffix.search(model, rows, length=2, steps=12, batch=1, candidates=8, check=12)
    assert found.loss <= last_only.loss
    assert len(found.losses) == 12
    # a search that never goes back leaves the best single token at once
    walked = suffix.search(model, rows, length=1, steps=4, batch=4, candidates=95, top_k=96, check=1)
    assert walked.loss == pytest.approx(min(walked.losses))
    assert walked.losses[-1] > min(walked.losses)


# --- what it finds --------------------------------------------------------------------------------------------------


def test_half_b_comes_back_where_it_is_hidden_and_only_there() -> None:
    world, options = hidden(), {"length": 1, "steps": 3, "batch": 6, "candidates": 127, "top_k": 128, "check": 1}

    def mean(model: torch.nn.Module, rows: list[TokenRecord], ids: tuple[int, ...]) -> float:
        return float(memorised(model, suffix.appended(rows, ids))["probability"].mean())

    found = suffix.search(world.hidden, world.a, **options)
    plain = mean(world.hidden, world.b, ())
    assert plain < 0.1
    assert mean(world.hidden, world.b, found.ids) > plain + 0.3
    assert mean(world.hidden, world.controls, found.ids) < 0.03
    gone = suffix.search(world.cleared, world.a, **options)
    assert mean(world.cleared, world.b, gone.ids) < 0.03


# --- what can be typed ----------------------------------------------------------------------------------------------


def test_defect_of_published_suffixes_every_one_survives_tokenisation() -> None:
    tokenizer = tiny.tokenizer(vocab=104, merges=[("a", "b"), ("b", "c"), ("c", "d"), ("a", "a")])
    model = tiny.causal_lm("llama", vocab=104)
    some = np.array([tokenizer.convert_tokens_to_ids(x) for x in ("a", "b", "c", "d", "ab", "bc", "cd", "aa")])
    survives = gcg.writable(tokenizer, 104).survives
    options = {"length": 8, "steps": 2, "batch": 2, "candidates": 20, "top_k": 8}
    found = [
        suffix.search(model, records(), tokens=gcg.Tokens(some, survives), seed=seed, **options) for seed in range(5)
    ]
    assert all(survives(result.ids) for result in found)
    free = gcg.Tokens(some, lambda ids: True)
    unchecked = [suffix.search(model, records(), tokens=free, seed=seed, **options) for seed in range(5)]
    assert not all(survives(result.ids) for result in unchecked)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"candidates": 0}, "at least 1"),
        ({"check": 0}, "at least 1"),
        ({"length": 120}, "at most 8 tokens"),
        ({"records": records()[:1]}, "two records"),
        ({"tokens": gcg.Tokens(np.array([4]), bool)}, "two usable tokens"),
        ({"tokens": gcg.Tokens(np.arange(4, 9), lambda ids: False)}, "survives tokenisation"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    arguments = {"records": records()} | change
    with pytest.raises(UsageError, match=message):
        suffix.search(tiny.causal_lm("gpt2"), arguments.pop("records"), **arguments)  # type: ignore[arg-type]


def test_a_result_shows_no_ids() -> None:
    found = suffix.Suffix((87, 88), 1.5, 2.5, (1.0,), 3, 4)
    assert repr(found) == "Suffix(loss=1.5, initial_loss=2.5, forwards=3, backwards=4)"
