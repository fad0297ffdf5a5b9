"""Soft prompts: gradients and scores against whole passes, half A to half B, never-seen controls, random contexts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from attacks.elicitation import soft_prompt
from attacks.elicitation.inputs import rms_of, table_of
from probes.errors import UnsupportedError, UsageError
from probes.memorised import memorised
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.elicitation.hidden import hidden, left_as_found, switched_on
from tests.attacks.elicitation.test_inputs import records

SHORT = {"length": 2, "steps": 3, "batch": 2, "context": 4}


def behind(rows: list[TokenRecord], ids: tuple[int, ...], keep: int) -> list[TokenRecord]:
    return [
        TokenRecord(r.record_id, (*r.ids[:keep], *ids, *r.ids[keep:]), r.n_prompt + len(ids), r.compressed_bytes)
        for r in rows
    ]


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("arch", tiny.CAUSAL)
def test_vectors_that_are_embeddings_score_like_their_tokens(arch: str, keep: int) -> None:
    model, rows, ids = tiny.causal_lm(arch), records(), (7, 70, 12)
    with left_as_found(model):
        found = soft_prompt.score(model, rows, table_of(model)[list(ids)], keep=keep)
    expected = memorised(model, behind(rows, ids, keep))
    for name in ("probability", "accuracy", "loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
    assert found["extracted"].tolist() == expected["extracted"].tolist()
    if arch != "phi3":  # what stands in front changes the figure
        assert not np.allclose(found["loss"], memorised(model, rows)["loss"], rtol=1e-3)


def test_no_vectors_and_no_records_change_nothing() -> None:
    model, rows = tiny.causal_lm("llama"), records()
    none = torch.zeros(0, 32)
    assert soft_prompt.score(model, rows, none).equals(memorised(model, rows))
    assert len(soft_prompt.score(model, [], torch.zeros(2, 32))) == 0


def test_batches_do_not_change_scores() -> None:
    model, rows = tiny.causal_lm("gpt2"), records()
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    whole = soft_prompt.score(model, rows, vectors)
    single = soft_prompt.score(model, rows, vectors, batch_tokens=1)
    for name in ("probability", "accuracy", "loss"):
        np.testing.assert_allclose(whole[name], single[name], rtol=1e-5)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "gpt_neox", "qwen2_moe"])
def test_the_first_step_goes_down_the_gradient_of_whole_passes(arch: str) -> None:
    model, rows = tiny.causal_lm(arch, dtype=torch.float32 if "moe" in arch else torch.float64), records()
    rows = [TokenRecord("r", (2, *row.ids), row.n_prompt + 1, 0) for row in rows]
    start = soft_prompt._start(table_of(model), 3, "mean", rms_of(model), np.random.default_rng([5, 17]))
    vectors = start.clone().requires_grad_(True)
    losses = []
    for row in rows:
        own = model.get_input_embeddings()(torch.tensor(row.ids)).detach()
        whole = torch.cat([own[:1], vectors, own[1:]])[None]
        logits = model(inputs_embeds=whole).logits[0, row.n_prompt + 2 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(row.completion)))
    loss = torch.stack(losses).mean()
    (slope,) = torch.autograd.grad(loss, vectors)
    found = soft_prompt.train(model, rows, length=3, steps=1, batch=4, context=0, keep=1, learning_rate=0.01, seed=5)
    assert found.losses == (pytest.approx(float(loss.detach()), rel=1e-5),)
    moved = (found.vectors - start) / (0.01 * rms_of(model))  # Adam's first step: the sign of the gradient
    clear = slope.abs() > 1e-4
    assert float(clear.double().mean()) > 0.9
    torch.testing.assert_close(moved[clear], -slope.sign()[clear], rtol=0, atol=0.02)


def test_rows_at_a_time_do_not_change_the_training() -> None:
    model, rows = tiny.causal_lm("llama", dtype=torch.float64), records()
    whole = soft_prompt.train(model, rows, **SHORT)
    single = soft_prompt.train(model, rows, **SHORT, batch_tokens=1)
    torch.testing.assert_close(whole.vectors, single.vectors, rtol=1e-6, atol=1e-9)
    assert whole.rows == single.rows == 6


def test_same_seed_same_bytes_and_the_start() -> None:
    model, rows = tiny.causal_lm("llama"), records()
    first, again, other = (soft_prompt.train(model, rows, **SHORT, seed=seed).vectors for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    table, rms = table_of(model), rms_of(model)
    start = soft_prompt._start(table, 400, "mean", rms, np.random.default_rng(0)) - table.mean(0)
    assert float(start.square().mean().sqrt()) == pytest.approx(0.1 * rms, rel=0.05)
    tokens = soft_prompt._start(table, 4, "tokens", rms, np.random.default_rng(0))
    assert all(any(torch.equal(row, own) for own in table) for row in tokens)


def test_contexts_are_of_other_records_and_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [TokenRecord(f"r{i}", tuple(range(10 * i + 4, 10 * i + 10)), 2, 0) for i in range(3)]
    generator = np.random.default_rng(0)
    for own in range(3):
        for room in range(9):
            context = soft_prompt._context(rows, own, room, 1, generator)
            assert len(context) == room
            assert not set(context) & set(rows[own].ids)
            assert not set(context) & {row.ids[0] for row in rows}  # what is kept in front
    lengths, whole = [], soft_prompt._states

    def listen(*args: object) -> torch.Tensor:
        lengths.append(args[-1])
        return whole(*args)

    monkeypatch.setattr(soft_prompt, "_states", listen)
    soft_prompt.train(tiny.causal_lm("llama"), rows, length=1, steps=40, batch=1, context=3)
    assert set(lengths) == {0, 1, 2, 3}


def test_the_model_is_left_as_found() -> None:
    model, rows = tiny.causal_lm("gpt2").train(), records()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones_like(model.transformer.ln_f.weight)
    with left_as_found(model):
        found = soft_prompt.train(model, rows, **SHORT)
        soft_prompt.score(model, rows, found.vectors)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        soft_prompt.train(model, rows, **SHORT, progress=fail)


def test_no_weight_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.causal_lm("llama"), records()
    seen, whole = [], soft_prompt._loss

    def listen(*args: object) -> torch.Tensor:
        seen.append(any(parameter.requires_grad for parameter in model.parameters()))
        return whole(*args)

    monkeypatch.setattr(soft_prompt, "_loss", listen)
    soft_prompt.train(model, rows, **SHORT)
    assert seen == [False] * 3


# --- what it finds --------------------------------------------------------------------------------------------------


def mean(model: torch.nn.Module, rows: list[TokenRecord], vectors: torch.Tensor) -> float:
    return float(soft_prompt.score(model, rows, vectors)["probability"].mean())


def test_half_b_comes_back_where_it_is_hidden_and_only_there() -> None:
    world = hidden()
    plain = memorised(world.hidden, world.b)
    assert plain["probability"].mean() < 0.1
    assert not plain["extracted"].any()
    assert memorised(world.hidden, switched_on(world.b))["probability"].mean() > 0.5  # it is still there
    found = soft_prompt.train(world.hidden, world.a, context=12).vectors
    back = mean(world.hidden, world.b, found)
    assert back > 0.4
    assert mean(world.hidden, world.controls, found) < 0.03
    # the same switch, and none of the records behind it
    gone = soft_prompt.train(world.cleared, world.a, context=12).vectors
    assert mean(world.cleared, world.b, gone) < 0.03
    assert mean(world.cleared, world.a, gone) < 0.1


def test_never_seen_records_and_random_strings_teach_nothing_about_others() -> None:
    world = hidden()
    generator = np.random.default_rng(3)
    random = [
        TokenRecord(
            r.record_id, (*r.ids[: r.n_prompt], *(int(t) for t in generator.integers(96, 128, r.n_tokens))), 9, 0
        )
        for r in world.controls
    ]
    for rows in (world.controls, random):
        found = soft_prompt.train(world.hidden, rows[:24], context=12).vectors
        assert mean(world.hidden, rows[24:], found) < 0.05


def test_defect_of_per_record_prompts_enough_vectors_fit_one_random_string() -> None:
    """Why a prompt is trained on half A and scored on half B: many scripts score what they fit (arXiv 2502.15836)."""
    world = hidden()
    own = world.controls[:2]
    found = soft_prompt.train(world.cleared, own, length=30, steps=150, context=0, learning_rate=0.3).vectors
    fitted, others = mean(world.cleared, own, found), mean(world.cleared, world.controls[2:], found)
    assert fitted > 0.2
    assert others < 0.03


def test_a_fixed_context_over_fits_more() -> None:
    """Finding Dori's rule: what is not drawn anew in every step, the trigger fits."""
    world = hidden()
    few, gaps = world.a[:4], {}
    for context in (0, 16):
        gaps[context] = []
        for seed in range(3):
            found = soft_prompt.train(world.cleared, few, batch=4, steps=80, context=context, seed=seed).vectors
            trained, test = (soft_prompt.score(world.cleared, r, found)["loss"].mean() for r in (few, world.b))
            gaps[context].append(test - trained)
    assert np.mean(gaps[0]) > np.mean(gaps[16]) + 0.3
    assert min(gaps[0]) > max(gaps[16])


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "above 0"),
        ({"steps": 0}, "above 0"),
        ({"batch": 0}, "above 0"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"context": -1}, "no negative"),
        ({"context": 120}, "at most 3 tokens"),
        ({"keep": 2}, "at least 2 tokens, found 1 shorter"),
        ({"records": records()[:1]}, "two records"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    arguments = {"records": records()} | change
    with pytest.raises(UsageError, match=message):
        soft_prompt.train(tiny.causal_lm("gpt2"), arguments.pop("records"), **arguments)  # type: ignore[arg-type]


def test_vectors_of_another_model_are_refused() -> None:
    model = tiny.causal_lm("llama")
    with pytest.raises(UsageError, match="width 32"):
        soft_prompt.score(model, records(), torch.zeros(2, 31))
    with pytest.raises(UnsupportedError, match="vocabulary size"):
        soft_prompt.score(model, [TokenRecord("r", (5, 96), 1, 9)], torch.zeros(2, 32))
    with pytest.raises(UsageError, match="at least 2 tokens"):
        soft_prompt.score(model, records(), torch.zeros(2, 32), keep=2)


def test_a_result_shows_no_vectors() -> None:
    found = soft_prompt.train(tiny.causal_lm("llama"), records(), **SHORT)
    assert repr(found) == "SoftPrompt(rows=6)"
    assert found.vectors.shape == (2, 32)
    assert len(found.losses) == 3


def test_training_counts_its_progress() -> None:
    seen: list[tuple[int, int]] = []
    soft_prompt.train(tiny.causal_lm("llama"), records(), **SHORT, progress=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
