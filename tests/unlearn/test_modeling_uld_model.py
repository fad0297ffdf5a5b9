"""The difference as a language model: identities, one distribution in every path, one cache, shared storage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from probes.modelmap import ModelMap
from tests import tiny
from tests.unlearn.uld_models import (
    ALL,
    MILD,
    assert_close,
    config_of,
    difference,
    external,
    matrices,
    model_of,
    tokens,
)
from unlearn.checkpoints.modeling_uld import (
    RULE_TENSOR,
    Rule,
    ULDForCausalLM,
    ULDLogitsProcessor,
    _pairs,
    attach,
    combine,
    rule_tensor,
    slice_blocks,
)

DECODERS = ["gpt2", "llama", "qwen2", "gpt_neox", "gemma2", "phi3", "mixtral"]
PLAIN: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **PLAIN, **more)


@torch.no_grad()
def alone(whole: Any, **inputs: Any) -> Any:
    """The assistant run alone, from its embeddings: blocks 0..last-1, low-rank additions from `first` on."""
    part = whole.config.assistant
    model = slice_blocks(whole.target, part["path"], 0, part["last"])
    attach(model, part["path"], 0, _pairs(whole.assistant), part["scale"])
    return model(**inputs)


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_alpha_0_is_the_target(arch: str) -> None:
    model, ids = model_of(arch), tokens()
    whole = difference(model, Rule(0.0, 0.1, 0.1))
    assert torch.equal(whole(ids).logits, model(ids).logits.log_softmax(-1))
    assert torch.equal(greedy(whole, ids), greedy(model, ids))


@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_an_assistant_that_is_the_target_leaves_one_minus_alpha(arch: str) -> None:
    model, ids = model_of(arch), tokens()
    whole = difference(model, ALL, first=0, last=3, size=0.0)
    assert_close(whole(ids).logits, (0.25 * model(ids).logits.log_softmax(-1)).log_softmax(-1))


@pytest.mark.parametrize("arch", tiny.CAUSAL)
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 3)])
@torch.no_grad()
def test_it_is_the_combination_of_two_models_run_apart(arch: str, first: int, last: int) -> None:
    """The assistant's blocks below `first` are the target's: continuing there is the same as running it alone."""
    model, ids = model_of(arch), tokens(2, 20)  # beyond the window of 16
    whole = difference(model, MILD, first, last)
    want = combine(model(ids).logits, alone(whole, input_ids=ids).logits, MILD)
    got = whole(ids).logits
    assert_close(got, want)
    assert (got - model(ids).logits.log_softmax(-1)).abs().max() > 1e-2


@torch.no_grad()
def test_the_logits_of_both_are_scaled_and_capped_before_they_are_combined() -> None:
    for arch, settings in (("gemma2", {"final_logit_softcapping": 2.0}), ("granite", {"logits_scaling": 4.0})):
        more = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        model, ids = model_of(arch, **(more if arch == "granite" else {}), **settings), tokens()
        whole = difference(model)
        assert whole.config.logit_rule != {"scale": 1.0, "divide": False, "cap": None}
        assert_close(whole(ids).logits, combine(model(ids).logits, alone(whole, input_ids=ids).logits, MILD))


_OTHERS: dict[str, dict[str, Any]] = {
    # calls the index of a layer `layer_id`; takes no positions; names its sizes otherwise
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global"], 2], [["local"], 1]],
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize("arch", _OTHERS)
@torch.no_grad()
def test_architectures_with_names_of_their_own(arch: str) -> None:
    model, ids = tiny.causal_lm(arch, **_OTHERS[arch]), tokens()
    whole = difference(model, MILD, 1, 3)
    full = whole(ids).logits
    assert_close(full, combine(model(ids).logits, alone(whole, input_ids=ids).logits, MILD))
    out = whole(ids[:, :5], use_cache=True)
    assert_close(whole(ids[:, 5:], past_key_values=out.past_key_values, use_cache=True).logits, full[:, 5:])


# -- one distribution in every path ------------------------------------------------------------------------------------


def padded(rows: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their mask."""
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids.masked_fill(mask == 0, tiny.PAD), mask


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("first", [0, 2])
@torch.no_grad()
def test_cached_decoding_is_a_full_run_token_by_token(arch: str, first: int) -> None:
    model = model_of(arch)
    whole = difference(model, MILD, first, 3)
    prompt, mask = padded()
    ids = torch.cat([prompt, tokens(2, 13, seed=5)], dim=1)  # [2, 20], beyond the window of 16
    mask = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = whole(prompt, attention_mask=mask[:, :7], position_ids=positions[:, :7], use_cache=True)
    for t in range(7, 21):
        want = whole(ids[:, :t], attention_mask=mask[:, :t], position_ids=positions[:, :t], use_cache=False)
        assert_close(out.logits[:, -1], want.logits[:, -1])
        short = whole(ids[:1, 3:t], use_cache=False)  # the same row without padding
        assert_close(out.logits[:1, -1], short.logits[:, -1])
        if t < 20:
            step = slice(t, t + 1)
            out = whole(
                ids[:, step],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, step],
                past_key_values=out.past_key_values,
                use_cache=True,
            )


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("outside", ["original", "never"])
@torch.no_grad()
def test_forward_and_generate_give_one_distribution(arch: str, outside: str) -> None:
    """In the released code `forward` leaves filtered tokens the target's logits and `generate` drops them."""
    whole = difference(model_of(arch), Rule(0.75, 0.05, 0.5, outside))  # type: ignore[arg-type]
    ids, mask = padded()
    out = greedy(whole, ids, mask, return_dict_in_generate=True, output_logits=True, output_scores=True)
    full = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    positions = (full.cumsum(-1) - 1).clamp(min=0)
    logits = whole(out.sequences, attention_mask=full, position_ids=positions).logits[:, 6:-1]  # [2, 8, V]
    for given in (out.logits, out.scores):
        generated = torch.stack(given, dim=1)
        assert torch.equal(generated == -torch.inf, logits == -torch.inf)
        assert_close(
            generated.to(logits.dtype).nan_to_num(neginf=-1e3), logits.nan_to_num(neginf=-1e3).float().to(logits.dtype)
        )
        assert torch.equal(generated.argmax(-1), out.sequences[:, 7:])
    assert bool(logits.isinf().any()) == (outside == "never")


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "mixtral"])
@torch.no_grad()
def test_beams_and_samples_are_those_of_the_processor(arch: str) -> None:
    """The processor runs the assistant from block 0, with a cache of its own, and follows beams by their beginnings."""
    model = model_of(arch)
    whole, config, given = difference(model), config_of(model), matrices(model, 1, 2)
    ids, mask = padded()
    settings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
    ]
    changed = False
    for setting in settings:

        def run(model: Any, *processors: ULDLogitsProcessor, setting: dict[str, Any] = setting) -> Tensor:
            given = {"attention_mask": mask, "max_new_tokens": 8, "logits_processor": list(processors)}
            with tiny.seeded(4):
                return model.generate(ids, **given, **PLAIN, **setting)  # type: ignore[no-any-return]

        found = run(whole)
        assert torch.equal(found, run(model, ULDLogitsProcessor(model, config, given, mask))), setting
        changed = changed or not torch.equal(found, run(model))
    assert changed


@torch.no_grad()
def test_the_processor_follows_rows_and_starts_anew_where_it_must() -> None:
    model = model_of("llama")
    whole, config, given = difference(model), config_of(model), matrices(model, 1, 2)
    runs: list[int] = []
    processor = ULDLogitsProcessor(model, config, given)
    processor._model.model.register_forward_pre_hook(
        lambda _m, _x, k: runs.append(k["input_ids"].shape[1]), with_kwargs=True
    )

    def check(ids: Tensor) -> None:
        want = whole(ids).logits[:, -1]
        assert_close(processor(ids, model(ids).logits[:, -1]), want)
        assert_close(processor._rows, ids)  # type: ignore[arg-type]

    first = tokens(3, 6)
    check(first)
    grown = torch.cat([first[[2, 0, 0]], tokens(3, 1, seed=2)], dim=1)  # beams: one lost, one doubled
    check(grown)
    check(torch.cat([grown, tokens(3, 4, seed=3)], dim=1))  # several tokens at once
    check(torch.cat([grown, tokens(3, 4, seed=3)], dim=1)[:2, :8])  # shorter: not a continuation
    check(tokens(4, 9, seed=8))  # another batch
    assert runs == [6, 1, 4, 8, 9]
    with pytest.raises(ValueError, match="expected rows that continue 2 prompts of 7 tokens, found 3 of 6"):
        ULDLogitsProcessor(model, config, given, padded()[1])(first, model(first).logits[:, -1])


@torch.no_grad()
def test_rows_that_differ_in_padding_alone_are_kept_apart() -> None:
    model = model_of("llama")
    ids, mask = padded()
    ids[1] = ids[0]  # the same tokens, padding here and none there
    mask[1] = 1
    processor = ULDLogitsProcessor(model, config_of(model), matrices(model, 1, 2), mask)
    whole = difference(model)
    got = greedy(model, ids, mask, logits_processor=[processor])
    assert torch.equal(got, greedy(whole, ids, mask))
    assert not torch.equal(got[0], got[1])


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@torch.no_grad()
def test_one_cache_for_both(arch: str) -> None:
    model, ids = model_of(arch), tokens(2, 9)
    whole = difference(model, MILD, 1, 3)
    for given in (None, DynamicCache(), DynamicCache(config=model.config)):
        out = whole(ids, past_key_values=given, use_cache=True)
        cache = out.past_key_values
        assert given is None or cache is given
        assert len(cache.layers) == 3 + 2
        assert {layer.get_seq_length() for layer in cache.layers} == {9}
    more = tokens(4, 3, seed=3)

    def after(cache: Any, rows: Tensor, length: int) -> None:
        """The cache now holds the first `length` tokens of these rows of `ids`."""
        step = more[: len(rows)]
        got = whole(step, past_key_values=cache, use_cache=True).logits
        want = whole(torch.cat([ids[rows, :length], step], dim=1), use_cache=False).logits[:, length:]
        assert_close(got, want)

    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 1]))
    after(reordered, torch.tensor([1, 1]), 9)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    after(repeated, torch.tensor([0, 0, 1, 1]), 9)
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    after(chosen, torch.tensor([1]), 9)
    cropped = copy.deepcopy(cache)
    cropped.crop(-4)
    after(cropped, torch.tensor([0, 1]), 5)
    after(cache, torch.tensor([0, 1]), 9)


def test_what_has_no_such_cache_is_refused() -> None:
    whole = difference(model_of("llama"))
    with pytest.raises(NotImplementedError, match="expected a dynamic cache, found StaticCache"):
        whole.generate(tokens(), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="found output_hidden_states"):
        whole(tokens(), output_hidden_states=True)
    mamba = tiny.causal_lm("mamba", hidden_size=32, num_hidden_layers=3, state_size=4)
    with pytest.raises(NotImplementedError, match="expected a target whose cache is keys and values, found Mamba"):
        difference(mamba)


# -- cost --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_below_and_the_vocabulary_product_run_once() -> None:
    model, ids = model_of("llama"), tokens(2, 9)
    whole = difference(model, MILD, 2, 3)
    calls: dict[str, list[tuple[int, ...]]] = {"head": [], "block": []}
    head = model.lm_head.register_forward_pre_hook(lambda _m, x: calls["head"].append(tuple(x[0].shape)))
    copied = whole._assisting()
    hooks = [head]
    for owner in (model, copied):
        for block in owner.model.layers:
            hooks.append(block.register_forward_pre_hook(lambda *_: calls["block"].append(())))
    copied_head = copied.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the copy's head ran"))
    whole(ids)
    for hook in (*hooks, copied_head):
        hook.remove()
    assert calls["head"] == [(2, 2, 9, 32)]
    assert len(calls["block"]) == 3 + 1


_HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},  # its head has a bias
}


@pytest.mark.parametrize("arch", _HEADS)
@torch.no_grad()
def test_the_assistants_head_runs_for_kept_tokens_alone(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.causal_lm(arch, vocab=400, **_HEADS[arch]), tokens(2, 9)
    for parameter in model.get_submodule(ModelMap.of(model).head).parameters():
        parameter.normal_()  # biases too
    whole = difference(model, Rule(0.75, 0.0175, 0.0))
    head = model.get_submodule(whole.config.head)
    hook = head.register_forward_hook(lambda *_: None)  # what watches a head is to see it run
    want = whole(ids).logits
    hook.remove()
    sizes: list[int] = []
    plain = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(len(weight) if weight.data_ptr() == head.weight.data_ptr() or len(weight) == 7 else 0)
        return plain(x, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", counted)
        assert_close(whole(ids).logits, want)
    assert [size for size in sizes if size] == [400, *[7] * 18]
    with torch.enable_grad():
        assert_close(whole(ids).logits.detach(), want)
    for rule in (Rule(0.75, 1.0, 0.0), Rule(0.75, 0.3, 0.9)):  # most of them: the whole head
        many = difference(model, rule)
        got = many(ids).logits
        with torch.enable_grad():
            assert_close(got, many(ids).logits.detach())


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral"])
def test_it_owns_nothing_but_the_low_rank_matrices(arch: str) -> None:
    model = model_of(arch)
    given = matrices(model, 1, 3)
    whole = difference(model, MILD, 1, 3)
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    own = {name: p for name, p in whole.named_parameters() if p.data_ptr() not in ours}
    assert own.keys() == given.keys()
    assert set(whole.state_dict()) == {*given, *(f"target.{name}" for name in model.state_dict())}
    for name, parameter in own.items():
        assert torch.equal(parameter, given[name].to(parameter.dtype))
        assert parameter.data_ptr() != given[name].data_ptr()
    assert all(t.data_ptr() in ours | {p.data_ptr() for p in own.values()} for t in whole._assisting().parameters())
    assert sum(1 for m in whole.modules() if m is model) == 1
    assert whole.num_parameters() == model.num_parameters() + sum(p.numel() for p in own.values())


def test_gradients_reach_the_low_rank_matrices_alone_where_the_target_is_frozen() -> None:
    model = model_of("llama")
    model.requires_grad_(False)
    whole = difference(model)
    out = whole(tokens(), labels=tokens())
    out.loss.backward()
    grads = {name for name, p in whole.named_parameters() if p.grad is not None}
    assert grads == {name for name, p in whole.named_parameters() if p.requires_grad} == set(matrices(model, 1, 2))
    assert all(float(whole.get_parameter(name).grad.abs().max()) > 0 for name in grads)


# -- as any model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_and_positions_asked_for() -> None:
    whole, ids = difference(model_of("llama")), tokens()
    full = whole(ids).logits
    assert_close(whole(ids, logits_to_keep=2).logits, full[:, -2:])  # a product of fewer rows may round otherwise
    assert_close(whole(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
    labels = ids.clone()
    labels[:, :3] = -100
    want = -full[:, 2:-1].gather(-1, ids[:, 3:, None]).mean()
    assert_close(whole(ids, labels=labels).loss, want)
    embedded = whole(inputs_embeds=whole.get_input_embeddings()(ids)).logits
    assert_close(embedded, full)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_copies_and_types(arch: str) -> None:
    model, ids = model_of(arch), tokens()
    whole = difference(model)
    before = whole(ids).logits
    copied = copy.deepcopy(whole)
    assert torch.equal(copied(ids).logits, before)
    for parameter in copied.parameters():
        parameter.mul_(1.5)
    assert torch.equal(whole(ids).logits, before)
    changed = copied(ids).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    again = ULDForCausalLM.over(copied.target, copied.config, copied.assistant_tensors())
    torch.testing.assert_close(changed, again(ids).logits, rtol=1e-4, atol=1e-4)  # through single precision

    single = copy.deepcopy(whole).float()
    want = difference(copy.deepcopy(model).float())(ids).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert_close(single.double()(ids).logits.float(), before.float())
    half = copy.deepcopy(whole).to(torch.bfloat16)
    ours = {id(t) for t in (*half.parameters(), *half.buffers())}
    assert all(id(t) in ours for t in (*half._assisting().parameters(), *half._assisting().buffers()))
    assert half(ids).logits.dtype == torch.float32
    assert half(ids).logits.isfinite().all()


@torch.no_grad()
def test_low_rank_matrices_stay_in_single_precision_beside_a_half_precision_target() -> None:
    model = tiny.causal_lm("llama", dtype=torch.bfloat16)
    whole = difference(model)
    assert {p.dtype for p in whole.assistant.parameters()} == {torch.float32}
    assert whole(tokens()).logits.dtype == torch.float32


@torch.no_grad()
def test_edits_of_the_target_in_place_reach_the_assistant() -> None:
    model, ids = model_of("llama"), tokens()
    whole = difference(model)
    for parameter in model.model.layers[1].parameters():
        parameter.mul_(1.3)
    assert_close(whole(ids).logits, difference(model)(ids).logits)
    state = {name: tensor * 0.9 for name, tensor in whole.state_dict().items()}
    for assign in (False, True):
        other = difference(model_of("llama"))
        other.load_state_dict(state, assign=assign)
        fresh = ULDForCausalLM.over(other.target, other.config, other.assistant_tensors())
        torch.testing.assert_close(other(ids).logits, fresh(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_assistant_is_in_the_targets_mode() -> None:
    model = model_of("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    whole, ids = difference(model), tokens()
    calm = whole(ids).logits
    whole.train()
    assert whole._assisting().training
    with tiny.seeded(0):
        assert not torch.equal(whole(ids).logits, calm)
    whole.eval()
    assert torch.equal(whole(ids).logits, calm)


def test_tensors_that_do_not_fit() -> None:
    model = model_of("llama")
    config, given = config_of(model), matrices(model, 1, 2)
    name = next(iter(given))
    cases = {
        "A alone": ({k: v for k, v in given.items() if not k.endswith("lora_B")}, "found one alone"),
        "another block": ({k.replace("layers.1", "layers.2"): v for k, v in given.items()}, "blocks 1 to 1"),
        "another model": ({k.replace("layers", "h"): v for k, v in given.items()}, "of the target's linear maps"),
        "another name": (given | {"assistant.model.layers.1.mlp.up_proj.weight": given[name]}, "linear maps"),
        "another shape": (given | {name: given[name][:, :-1]}, r"expected A \[r, 32\]"),
        "another rule": (given | {RULE_TENSOR: rule_tensor(config) + 1e-9}, "found another rule"),
    }
    for tensors, words in cases.values():
        with pytest.raises(ValueError, match=words) as caught:
            ULDForCausalLM.over(model, config, tensors)
        assert "\n" not in str(caught.value)
    ULDForCausalLM.over(model, config, given | {RULE_TENSOR: rule_tensor(config)})


def test_what_the_rule_tensor_says() -> None:
    config = config_of(model_of("llama"), Rule(0.5, 0.01, 0.02, "never"), first=1, last=3, scale=2.0)
    assert rule_tensor(config).tolist() == [0.5, 0.01, 0.02, 1.0, 1.0, 3.0, 2.0]
    assert rule_tensor(config).dtype == torch.float64


# -- another model as the assistant ------------------------------------------------------------------------------------


def other_model() -> Any:
    return tiny.causal_lm("llama", seed=3, dtype=torch.float64, hidden_size=16, num_hidden_layers=2, head_dim=4)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@torch.no_grad()
def test_an_external_assistant_of_another_depth_and_width(arch: str) -> None:
    target, assistant, ids = model_of(arch), other_model(), tokens(2, 20)
    state = torch.get_rng_state()
    whole = external(target, assistant)
    assert torch.equal(torch.get_rng_state(), state)
    assistant = copy.deepcopy(assistant).float().double()  # it is kept in single precision on disk
    full = whole(ids).logits
    want = combine(target(ids).logits, assistant(ids).logits, MILD)
    torch.testing.assert_close(full, want.to(full.dtype), rtol=1e-5, atol=1e-5)
    out, steps = None, []
    for t in range(20):
        out = whole(ids[:, t : t + 1], past_key_values=out and out.past_key_values, use_cache=True)
        steps.append(out.logits[:, 0])
    assert_close(torch.stack(steps, dim=1), full)
    assert len(out.past_key_values.layers) == 3 + 2
    prompt, mask = padded()
    tensors = whole.assistant_tensors()
    for setting in ({}, {"num_beams": 3}):
        processor = ULDLogitsProcessor(target, whole.config, tensors, mask)
        got = target.generate(
            prompt,
            attention_mask=mask,
            logits_processor=[processor],
            max_new_tokens=6,
            do_sample=False,
            **PLAIN,
            **setting,
        )
        want = whole.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, **PLAIN, **setting)
        assert torch.equal(got, want)
    with pytest.raises(NotImplementedError, match="an external assistant has its own"):
        whole(inputs_embeds=whole.get_input_embeddings()(ids))


def test_an_external_assistant_needs_the_same_vocabulary() -> None:
    with pytest.raises(ValueError, match="expected an assistant with the target's 96 outputs, found 128; use a model"):
        external(model_of("gpt2"), tiny.causal_lm("llama", vocab=128))


def test_an_external_assistants_tensors_have_to_be_complete() -> None:
    whole = external(model_of("gpt2"), other_model())
    given = whole.assistant_tensors()
    del given["assistant.model.norm.weight"]
    with pytest.raises(ValueError, match="expected the tensors of LlamaForCausalLM in assistant"):
        ULDForCausalLM.over(whole.target, whole.config, given)
