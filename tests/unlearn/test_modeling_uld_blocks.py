"""Blocks of a model on its own storage: the assistant's structure, proven against the model it is taken from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes.modelmap import ModelMap
from tests import tiny
from tests.unlearn.uld_models import assert_close, difference, images, matrices, model_of, path_of, tokens
from unlearn.checkpoints.modeling_uld import LowRank, attach, slice_blocks


def entering(model: Any, index: int, **inputs: Tensor) -> Tensor:
    """[B, T, d] the hidden state that enters block `index`, or leaves the last one."""
    seen: list[Tensor] = []
    blocks = model.get_submodule(path_of(model))
    if index < len(blocks):
        handle = blocks[index].register_forward_pre_hook(
            lambda _m, x, k: seen.append(x[0] if x else k["hidden_states"]), with_kwargs=True
        )
    else:
        handle = blocks[-1].register_forward_hook(lambda _m, _x, y: seen.append(y if isinstance(y, Tensor) else y[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("arch", [*tiny.CAUSAL, "vit", "dinov2"])
def test_the_first_blocks_compute_what_they_do_in_the_model(arch: str) -> None:
    model = model_of(arch)
    inputs = {"pixel_values": images()} if arch in tiny.VISION else {"input_ids": tokens(2, 24)}
    for last in (1, 2, 3):
        part = slice_blocks(model, path_of(model), 0, last)
        assert torch.equal(entering(part, last, **inputs), entering(model, last, **inputs))
    with torch.no_grad():  # all of them, with norm and head
        assert torch.equal(part(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("arch", [*tiny.CAUSAL, "vit"])
def test_storage_is_the_models_and_the_structure_is_not(arch: str) -> None:
    model = model_of(arch)
    path = path_of(model)
    part = slice_blocks(model, path, 1, 3)
    ours = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert all(id(t) in ours for t in (*part.parameters(), *part.buffers()))
    assert not {id(m) for m in part.modules()} & {id(m) for m in model.modules()}
    blocks, copied = model.get_submodule(path), part.get_submodule(path)
    assert len(blocks) == 3
    assert len(copied) == 2
    for own, other in zip(copied, list(blocks)[1:], strict=True):
        assert all(a is b for a, b in zip(own.parameters(), other.parameters(), strict=True))
        for name, module in other.named_modules():
            if hasattr(module, "layer_idx"):
                assert own.get_submodule(name).layer_idx == module.layer_idx - 1
    assert part.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3
    if getattr(model.config, "layer_types", None):
        assert part.config.layer_types == model.config.layer_types[1:]
    with torch.no_grad():  # an edit in place is seen
        weight = next(p for p in blocks[1].parameters() if p.ndim > 1)
        before, weight[0, 0] = float(weight[0, 0]), 9.0
        assert next(p for p in copied[0].parameters() if p.ndim > 1)[0, 0] == 9.0
        weight[0, 0] = before


def test_kinds_of_blocks_stay_with_their_blocks() -> None:
    """Gemma 2 alternates windows and full attention: the second block has full attention, wherever it stands."""
    model = model_of("gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    part = slice_blocks(model, "model.layers", 1, 3)
    assert part.config.layer_types == ["full_attention", "sliding_attention"]
    assert part.model.layers[0].self_attn.sliding_window is None
    assert part.model.layers[1].self_attn.sliding_window == 16


def test_the_copy_is_in_the_mode_of_each_part() -> None:
    model = model_of("gpt2")
    model.transformer.h[1].mlp.train()
    part = slice_blocks(model, "transformer.h", 1, 3)
    modes = {name: module.training for name, module in part.transformer.h[0].named_modules()}
    assert modes == {name: module.training for name, module in model.transformer.h[1].named_modules()}
    assert not part.transformer.h.training


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), *model.modules())],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),  # type: ignore[operator, union-attr]
        "random": torch.get_rng_state(),
        "keys": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("weights",):
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    assert torch.equal(before["random"], after["random"])
    for name in ("objects", "grads", "modes", "hooks", "config", "keys"):
        assert before[name] == after[name]


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "mixtral", "vit"])
def test_the_target_is_left_as_found(arch: str) -> None:
    model = model_of(arch, **({"resid_pdrop": 0.0, "attn_pdrop": 0.0} if arch == "gpt2" else {}))
    inputs = {"pixel_values": images()} if arch in tiny.VISION else {"input_ids": tokens()}
    with torch.no_grad():
        model(**inputs)
    model.get_submodule(path_of(model))[1].train()  # a mode of its own
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    slice_blocks(model, path_of(model), 0, 2)
    whole = difference(model)
    assert_same(before, state_of(model))
    with torch.no_grad():
        whole(**inputs)
        if arch not in tiny.VISION:
            whole.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert_same(before, state_of(model))
    module = whole._assisting().get_submodule(path_of(model))[0]
    module.forward = lambda *_a, **_k: 1 / 0
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        whole(**inputs)
    assert_same(before, state_of(model))
    assert not any(m._forward_pre_hooks for m in whole._assisting().modules())


@pytest.mark.parametrize(
    ("arch", "path"),
    [
        ("swin", "swin.encoder.layers.0.blocks"),
        ("swin", "swin.encoder.layers"),
        ("resnet", "resnet.encoder.stages"),
        ("llama", "model"),
        ("llama", "model.no_such"),
        ("llama", ""),
    ],
)
def test_models_whose_blocks_are_not_one_list_are_refused(arch: str, path: str) -> None:
    model = tiny.image_classifier(arch) if arch in tiny.VISION else model_of(arch)
    with pytest.raises(NotImplementedError, match=r"expected a model whose blocks are one list .* found .*; use"):
        slice_blocks(model, path, 0, 1)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 1), (-1, 2), (0, 4)])
def test_blocks_that_are_not_there(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="expected blocks from 0 to 3"):
        slice_blocks(model_of("llama"), "model.layers", first, last)


# -- low-rank additions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_addition_is_the_product(kind: Any) -> None:
    with tiny.seeded(0):
        base = nn.Linear(5, 7) if kind is nn.Linear else Conv1D(7, 5)
        down, up, x = (nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7, 3)), torch.randn(2, 4, 5))
    weight = base.weight if kind is nn.Linear else base.weight.T  # [out, in]
    want = F.linear(x.requires_grad_(), weight + 0.5 * up @ down, base.bias)
    got = LowRank(base, down, up, 0.5)(x)
    torch.testing.assert_close(got, want)
    inputs = (x, down, up, *base.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(LowRank(base, down, up, 0.5)(x[0, 0]), want[0, 0])
    assert LowRank(base, down, up, 0.5)(x[:0]).shape == (0, 4, 7)
    half = LowRank(base.bfloat16(), down, up, 0.5)(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt_neox", "phi3", "mixtral"])
def test_attached_blocks_are_those_of_an_edited_copy(arch: str) -> None:
    model = model_of(arch)
    path = path_of(model)
    given = {k: v.to(next(model.parameters()).dtype) for k, v in matrices(model, 1, 3).items()}
    names = sorted({name.removeprefix("assistant.").rpartition(".")[0] for name in given})
    pairs = {
        name: tuple(nn.Parameter(given[f"assistant.{name}.{leaf}"]) for leaf in ("lora_A", "lora_B")) for name in names
    }
    part = slice_blocks(model, path, 0, 3)
    placed = attach(part, path, 0, pairs, 0.5)  # type: ignore[arg-type]
    assert sorted(placed) == names
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for p in ModelMap.of(model).linear_modules():
            if p.module in pairs:
                down, up = pairs[p.module]
                delta = 0.5 * up @ down
                edited.get_parameter(p.parameter).add_(delta.T if p.orientation == "in_out" else delta)
        assert_close(part(tokens()).logits, edited(tokens()).logits)
        assert not torch.allclose(part(tokens()).logits, model(tokens()).logits, atol=1e-2)
    assert not any(isinstance(m, LowRank) for m in model.modules())


def test_additions_that_do_not_fit() -> None:
    model = model_of("llama")
    part = slice_blocks(model, "model.layers", 1, 2)
    good = (nn.Parameter(torch.zeros(2, 32)), nn.Parameter(torch.zeros(32, 2)))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1", "model.layers.1.no_such", "lm_head"):
        with pytest.raises(ValueError, match="expected linear maps of blocks 1 to 1, found"):
            attach(part, "model.layers", 1, {name: good}, 1.0)
    for pair in (good[::-1], (good[0], nn.Parameter(torch.zeros(32, 3)))):
        with pytest.raises(
            ValueError, match=r"expected A \[r, 32\] and B \[32, r\] for model.layers.1.self_attn.q_proj"
        ):
            attach(part, "model.layers", 1, {"model.layers.1.self_attn.q_proj": pair}, 1.0)
