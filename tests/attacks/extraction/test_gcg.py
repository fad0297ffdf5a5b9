"""The coordinate gradient against explicit one-hot rows, candidates against whole forward passes, and the search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from attacks.extraction import gcg, greedy_tokens
from probes.errors import UsageError
from probes.modelmap import ModelMap
from tests import tiny

BEFORE, AFTER, TARGET = (2, 11), (30,), (40, 41, 42)


def rows(model: torch.nn.Module, batch_tokens: int | None = None) -> gcg.Rows:
    return gcg.Rows(model, ModelMap.of(model), BEFORE, AFTER, TARGET, batch_tokens)


def slow_loss(model: torch.nn.Module, prompt: tuple[int, ...], target: tuple[int, ...] = TARGET) -> torch.Tensor:
    ids = torch.tensor([[*BEFORE, *prompt, *AFTER, *target]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -len(target) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(target))


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "gpt_neox", "gemma2", "gemma3_text"])
def test_the_gradient_is_that_of_one_hot_rows(arch: str) -> None:
    options = {**tiny._LLAMA_LIKE, "sliding_window": 16} if arch == "gemma3_text" else {}
    model = tiny.causal_lm(arch, dtype=torch.float64, **options)
    embedding = model.get_input_embeddings()
    assert (type(embedding) is torch.nn.Embedding) == (not arch.startswith("gemma"))  # these scale their rows
    prompt = (7, 8, 9, 7)
    ids = torch.tensor([*BEFORE, *prompt, *AFTER, *TARGET])
    onehot = functional.one_hot(ids, 96).double().requires_grad_(True)  # [T, V]
    inputs = (onehot @ embedding(torch.arange(96)).detach())[None]
    logits = model(inputs_embeds=inputs).logits[0, -4:-1]
    functional.cross_entropy(logits, torch.tensor(TARGET)).backward()
    expected = onehot.grad[len(BEFORE) : len(BEFORE) + 4]
    model.zero_grad(set_to_none=True)
    found = rows(model).gradient(prompt)
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)  # some norms compute in float32


# --- candidates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 30, None])
def test_candidates_have_the_losses_of_whole_passes(batch_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcg, "CHUNK_ELEMENTS", 500)  # five positions at a time
    model = tiny.causal_lm("llama", dtype=torch.float64)
    generator = np.random.default_rng(0)
    prompts = [tuple(map(int, row)) for row in generator.integers(4, 96, (9, 3))]
    runner = rows(model, batch_tokens)
    losses, hits = runner.evaluate(prompts)
    np.testing.assert_allclose(losses, [float(slow_loss(model, prompt)) for prompt in prompts], rtol=1e-9)
    assert not hits.any()
    assert runner.forwards == 9


def test_a_hit_is_a_target_that_greedy_decoding_emits() -> None:
    model = tiny.causal_lm("llama")
    prompt = (7, 8, 9)
    emitted = tuple(greedy_tokens(model, (*BEFORE, *prompt, *AFTER), 5))
    runner = gcg.Rows(model, ModelMap.of(model), BEFORE, AFTER, emitted, None)
    _, hits = runner.evaluate([prompt, (70, 71, 72)])
    assert hits.tolist() == [True, greedy_tokens(model, (*BEFORE, 70, 71, 72, *AFTER), 5) == list(emitted)]
    assert runner.confirmed(prompt)
    found = gcg.optimise(model, emitted, 3, before=BEFORE, after=AFTER, initial=prompt)
    assert (found.found, found.steps, found.prompt, found.backwards) == (True, 0, prompt, 0)


def test_a_batch_too_large_for_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    prompts = [(i, i + 1) for i in range(20, 31)]
    expected = rows(model).evaluate(prompts)[0]
    whole = gcg.Rows._losses

    def small(self: gcg.Rows, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(ids) > 2:
            raise MemoryError
        return whole(self, ids)

    monkeypatch.setattr(gcg.Rows, "_losses", small)
    np.testing.assert_allclose(rows(model).evaluate(prompts)[0], expected, rtol=1e-12)


def test_replacements_differ_in_one_token_and_come_from_the_best() -> None:
    generator = np.random.default_rng(0)
    gradient = torch.tensor(generator.normal(size=(3, 20)))
    usable = np.arange(2, 20)
    prompt = (4, 5, 4)
    gradient[range(3), prompt] = -9.0  # no replacement, however good
    ranked = gcg.ranked_tokens(gradient, prompt, usable, 6)
    for p in range(3):
        order = [v for v in np.argsort(gradient[p].numpy()) if v >= 2 and v != prompt[p]]
        assert ranked[p].tolist() == order[:6]
    pool = gcg.replacements(prompt, ranked, 10, set(), lambda ids: True, generator)
    assert len(pool) == len(set(pool)) == 10
    for other in pool:
        (changed,) = [p for p in range(3) if other[p] != prompt[p]]
        assert other[changed] in ranked[changed]
    every = gcg.replacements(prompt, ranked, 18, {pool[0]}, lambda ids: ids[0] != 4, generator)
    changes = {(*prompt[:p], int(token), *prompt[p + 1 :]) for p in range(3) for token in ranked[p]}
    assert set(every) == {other for other in changes if other[0] != 4 and other != pool[0]}


# --- the search -----------------------------------------------------------------------------------------------------


def test_one_step_over_all_replacements_is_the_best_single_token() -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    by_hand = min(range(96), key=lambda token: float(slow_loss(model, (token,))))
    found = gcg.optimise(model, TARGET, 1, before=BEFORE, after=AFTER, initial=[5], steps=1, candidates=95, top_k=96)
    assert found.prompt == (by_hand,)
    assert found.loss == pytest.approx(float(slow_loss(model, (by_hand,))))
    assert found.steps == 1


def test_two_tokens_against_every_prompt() -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    runner = rows(model)
    losses, _ = runner.evaluate(list(itertools.product(range(96), repeat=2)))
    found = gcg.optimise(model, TARGET, 2, before=BEFORE, after=AFTER, steps=12, candidates=190, top_k=96, seed=1)
    assert (losses < found.loss - 1e-9).sum() <= 92  # among the best 1 % of all 9,216 prompts
    assert found.losses[-1] < found.losses[0]
    assert found.loss == pytest.approx(min(found.losses))
    assert found.loss == pytest.approx(float(slow_loss(model, found.prompt)))


def test_a_planted_target_is_found_and_stops_the_search() -> None:
    model = tiny.causal_lm("llama")
    generator = np.random.default_rng(3)
    sequences = [tuple(map(int, generator.integers(4, 96, 16))) for _ in range(4)]
    tiny.train(model, sequences, steps=60)
    target = sequences[0][4:]
    found = gcg.optimise(model, target, 3, steps=40, candidates=64, seed=0)
    assert found.found
    assert found.steps < 40
    assert greedy_tokens(model, found.prompt, len(target)) == list(target)
    assert found.forwards <= 65 * found.steps + 1 + found.steps
    random = tuple(map(int, generator.integers(4, 96, 16)))
    missed = gcg.optimise(model, random, 3, steps=5, candidates=32)
    assert not missed.found
    assert missed.steps == 5
    assert len(missed.losses) == 6


def test_the_seed_decides_and_the_model_is_left_as_found() -> None:
    model = tiny.causal_lm("gpt2").train()
    model.transformer.wte.weight.requires_grad_(False)
    gradient = torch.ones_like(model.transformer.ln_f.weight)
    model.transformer.ln_f.weight.grad = gradient
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = gcg.optimise(model, TARGET, 4, steps=3, candidates=16, top_k=8, seed=1)
    again = gcg.optimise(model, TARGET, 4, steps=3, candidates=16, top_k=8, seed=1)
    other = gcg.optimise(model, TARGET, 4, steps=3, candidates=16, top_k=8, seed=2)
    assert first == again
    assert first.prompt != other.prompt
    assert model.training
    assert not model.transformer.wte.weight.requires_grad
    assert model.transformer.wpe.weight.requires_grad
    assert model.transformer.ln_f.weight.grad is gradient
    assert not model.transformer.wte._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_search_with_nowhere_left_to_go_ends() -> None:
    model = tiny.causal_lm("llama")
    three = gcg.Tokens(np.array([5, 6, 7]), lambda ids: True)
    found = gcg.optimise(model, TARGET, 1, steps=50, tokens=three)
    assert found.steps <= 3
    assert set(found.prompt) <= {5, 6, 7}


# --- prompts that can be typed --------------------------------------------------------------------------------------

MERGES = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "a")]


def test_only_tokens_that_come_back_are_usable() -> None:
    tokenizer = tiny.tokenizer(vocab=104, merges=MERGES)
    tokens = gcg.writable(tokenizer, 128)
    a, b, c = (tokenizer.convert_tokens_to_ids(x) for x in "abc")
    ab = tokenizer.convert_tokens_to_ids("ab")
    assert not set(tokens.usable) & {tiny.PAD, tiny.EOS, tiny.BOS, tiny.UNK}
    assert tokens.usable.max() < len(tokenizer) < 128
    assert tokens.survives([ab, c])
    assert not tokens.survives([a, b])  # its text is one token
    assert tokens.survives([b, a])


def test_the_inside_of_a_word_is_usable_though_it_never_stands_alone() -> None:
    class Sentence:  # writes a blank before the first word, as sentence-piece tokenizers do, and never reads "z"
        all_special_ids = (0,)
        words = ("<s>", "_x", "_y", "x", "y", "xy", "z")

        def __len__(self) -> int:
            return 7

        def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
            return "".join(self.words[i] for i in ids).replace("_", " ").removeprefix(" ")

        def __call__(self, text: str | list[str], add_special_tokens: bool) -> dict[str, list]:
            if isinstance(text, list):
                return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
            ids, rest = [], "_" + text.replace(" ", "_").replace("z", "x")
            while rest:
                piece = next(word for word in ("_x", "_y", "xy", "x", "y") if rest.startswith(word))
                ids.append(self.words.index(piece))
                rest = rest.removeprefix(piece)
            return {"input_ids": ids}

    tokens = gcg.writable(Sentence(), 9)
    assert tokens.usable.tolist() == [1, 2, 3, 4, 5]
    assert tokens.survives([1, 5])
    assert not tokens.survives([3, 4])


def test_defect_of_published_compression_code_every_prompt_survives_tokenisation() -> None:
    tokenizer = tiny.tokenizer(vocab=104, merges=MERGES)
    model = tiny.causal_lm("llama", vocab=104)
    some = np.array([tokenizer.convert_tokens_to_ids(x) for x in ("a", "b", "c", "d", "ab", "bc", "cd", "aa")])
    tokens = gcg.writable(tokenizer, 104)
    few = gcg.Tokens(some, tokens.survives)
    options = {"steps": 2, "candidates": 20, "top_k": 8}
    found = [gcg.optimise(model, TARGET, 8, tokens=few, seed=seed, **options) for seed in range(6)]
    assert all(few.survives(result.prompt) for result in found)
    free = gcg.Tokens(some, lambda ids: True)
    unchecked = [gcg.optimise(model, TARGET, 8, tokens=free, seed=seed, **options) for seed in range(6)]
    assert not all(few.survives(result.prompt) for result in unchecked)


def test_an_initial_prompt_that_survives_is_looked_for() -> None:
    model = tiny.causal_lm("llama")
    same = gcg.Tokens(np.arange(4, 96), lambda ids: len(set(ids)) == 1)
    assert gcg.optimise(model, TARGET, 6, tokens=same, steps=2).prompt == (4,) * 6
    with pytest.raises(UsageError, match="survives tokenisation"):
        gcg.optimise(model, TARGET, 6, tokens=gcg.Tokens(np.arange(4, 96), lambda ids: False))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": ()}, "at least 1"),
        ({"length": 0}, "at least 1"),
        ({"candidates": 0}, "at least 1"),
        ({"steps": -1}, "negative"),
        ({"target": (96,)}, "vocabulary size 96"),
        ({"before": (-1,)}, "vocabulary size 96"),
        ({"initial": (4,)}, "initial prompt of 2 tokens, found 1"),
        ({"tokens": gcg.Tokens(np.array([4]), bool)}, "two usable tokens"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    arguments = {"target": TARGET, "length": 2} | change
    with pytest.raises(UsageError, match=message):
        gcg.optimise(tiny.causal_lm("llama"), **arguments)


def test_results_and_tracebacks_show_no_ids() -> None:
    found = gcg.optimise(tiny.causal_lm("llama"), (91, 92), 2, initial=(87, 88), steps=0)
    assert not any(str(token) in repr(found).replace(str(found.loss), "") for token in (91, 92, 87, 88))
    assert "91" not in repr(rows(tiny.causal_lm("llama")))
