"""Changing weights for a while: which, along which axis, once each, and back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.recovery.weights import changed, targets
from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap
from tests import tiny
from tests.attacks.recovery.hiding import left_alone

ARCHITECTURES = [*tiny.CAUSAL, *tiny.VISION]


def built(arch: str) -> nn.Module:
    return tiny.causal_lm(arch) if arch in tiny.CAUSAL else tiny.image_classifier(arch)


def output(model: nn.Module, arch: str) -> Tensor:
    with tiny.seeded(3), torch.no_grad():
        inputs = torch.randint(4, 96, (2, 6)) if arch in tiny.CAUSAL else torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE)
        found: Tensor = model(inputs).logits
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_changed_and_put_back(arch: str) -> None:
    model = built(arch)
    parameters = dict(model.named_parameters())
    frozen = next(iter(parameters.values()))
    frozen.requires_grad_(False)
    last = list(parameters.values())[-1]
    last.grad = torch.ones_like(last)
    model.train()
    before = output(model.eval(), arch)
    model.train()
    doubled = copy.deepcopy(model)
    chosen = targets(ModelMap.of(model))
    with torch.no_grad():
        for name, parameter in doubled.named_parameters():
            if name in chosen:
                parameter.mul_(2.0)
    with left_alone(model):
        with changed(model, lambda name, weight: 2.0 * weight) as names:
            assert names == tuple(chosen)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), doubled.parameters(), strict=True))
            assert all(p is parameters[n] for n, p in model.named_parameters())
            inside = output(model.eval(), arch)
            model.train()
        assert torch.equal(inside, output(doubled.eval(), arch))
    assert not torch.equal(inside, before)
    assert torch.equal(output(model.eval(), arch), before)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_targets_are_the_blocks_linear_maps_and_nothing_else(arch: str) -> None:
    model = built(arch)
    model_map = ModelMap.of(model)
    parameters = dict(model.named_parameters())
    chosen = targets(model_map)
    blocks = [p for block in model_map.blocks for p in (*block.attention, *block.feed_forward)]
    assert set(chosen) == {p.parameter for p in blocks if p.role != "router"}
    others = {name for name, role in model_map.roles.items() if role in {"norm", "bias", "embedding", "head", "router"}}
    assert not set(chosen) & others
    assert all(parameters[name].ndim >= 2 for name in chosen)
    for projection in blocks:
        if projection.role == "router":
            continue
        target = chosen[projection.parameter]
        matrix = target.matrix(parameters[projection.parameter])
        assert matrix.shape[target.in_axis] == projection.in_features
        assert target.block == model_map.block_of(projection.parameter) is not None
        assert matrix.ndim == (3 if projection.experts else 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_input_axis_is_the_one_the_input_meets(arch: str) -> None:
    """A map whose weights for input j are zero does not see input j, whatever its shape."""
    model = built(arch)
    model_map = ModelMap.of(model)
    chosen = targets(model_map)
    checked = 0
    for projection in model_map.linear_modules():
        if projection.parameter not in chosen:
            continue
        module = model.get_submodule(projection.module)
        target = chosen[projection.parameter]

        def blind(matrix: Tensor, axis: int) -> Tensor:
            return matrix.index_fill(axis, torch.tensor([0]), 0.0)

        if isinstance(module, nn.Conv2d):
            x = torch.randn(1, module.in_channels, *module.kernel_size)
            nudged = x.clone()
            nudged[:, 0, 0, 0] += 1.0  # the first input of the unfolded kernel, with no padding in the way
            calls: Callable[[Tensor], Tensor] = lambda y, m=module: nn.functional.conv2d(y, m.weight, groups=m.groups)  # noqa: E731
        else:
            x = torch.randn(3, projection.in_features)
            nudged = x.clone()
            nudged[:, 0] += 1.0
            calls = module
        with torch.no_grad():
            assert not torch.allclose(calls(x), calls(nudged))
            with changed(model, lambda name, w, t=target, b=blind: t.through(b, w), [target.name]):
                assert torch.equal(calls(x), calls(nudged))
        checked += 1
    assert checked == len(chosen) - sum(p.experts is not None for p in model_map.projections() if p.role != "router")


@pytest.mark.parametrize("arch", ["gpt2", "qwen2", "llama"])
def test_head_and_embeddings_on_request_and_a_tied_tensor_once(arch: str) -> None:
    model = tiny.causal_lm(arch)
    model_map = ModelMap.of(model)
    plain, both = set(targets(model_map)), targets(model_map, head=True, embeddings=True)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    assert {id(parameters[name]) for name in set(both) - plain} == {id(head), id(table)}
    assert all(both[name].in_axis == 1 for name in set(both) - plain)
    assert set(targets(model_map, embeddings=True)) - plain == {n for n, p in parameters.items() if p is table}
    assert set(targets(model_map, head=True)) - plain == {n for n, p in parameters.items() if p is head}

    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # a tied tensor under both names
    seen = []

    def halve(name: str, weight: Tensor) -> Tensor:
        seen.append(id(parameters.get(name, head)))
        return weight / 2

    before = table.detach().clone()
    with left_alone(model), changed(model, halve, every):
        assert len(seen) == len(set(seen)) == len(parameters)
        assert torch.equal(table, before / 2)


def test_patch_projection_on_request() -> None:
    model = tiny.image_classifier("vit")
    model_map = ModelMap.of(model)
    added = set(targets(model_map, embeddings=True)) - set(targets(model_map))
    assert [model_map.roles[name] for name in added] == ["patch"]
    assert targets(model_map, embeddings=True)[added.pop()].kernel


def test_put_back_when_the_block_raises() -> None:
    model = tiny.causal_lm("gpt2")
    with left_alone(model), pytest.raises(KeyError), changed(model, lambda name, weight: weight + 1):
        raise KeyError("x")


def test_put_back_when_an_edit_raises_half_way() -> None:
    model = tiny.causal_lm("llama")
    names = list(targets(ModelMap.of(model)))

    def edit(name: str, weight: Tensor) -> Tensor:
        if name == names[3]:
            raise KeyError("x")
        return weight * 3

    with left_alone(model), pytest.raises(KeyError), changed(model, edit):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_and_odd_bits_come_back(dtype: torch.dtype) -> None:
    model = tiny.causal_lm("llama", dtype=dtype)
    name = next(iter(targets(ModelMap.of(model))))
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        weight[0, :2] = torch.tensor([-0.0, torch.finfo(dtype).tiny])
    with left_alone(model), changed(model, lambda n, w: w.double() / 3, [name]):
        assert weight.dtype == dtype
        assert float(weight.detach()[0, 1]) != torch.finfo(dtype).tiny


def test_what_is_not_contiguous_comes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.randn(4, 4).t())
    with left_alone(model), changed(model, lambda n, w: w + 1, ["0.weight"]) as names:
        assert names == ("0.weight",)


def test_parameters_that_share_memory_come_back() -> None:
    """Two parameter objects over the same memory are no tied parameter; the first copy is the original."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    before = model[0].weight.detach().clone()
    with changed(model, lambda n, w: w + 1, ["0.weight", "1.weight"]):
        assert torch.equal(model[0].weight, before + 2)
    assert torch.equal(model[0].weight, before)


def test_none_leaves_a_tensor() -> None:
    model = tiny.causal_lm("llama")
    names = list(targets(ModelMap.of(model)))
    with left_alone(model), changed(model, lambda name, w: w * 2 if name == names[1] else None) as done:
        assert done == (names[1],)


def test_refusals() -> None:
    model = tiny.causal_lm("llama")
    names = list(targets(ModelMap.of(model)))
    with left_alone(model):
        refused: Any = pytest.raises(UsageError, match="expected names of the model's parameters")
        with refused, changed(model, lambda n, w: w, ["nothing"]):
            pass
        with pytest.raises(ValueError, match="expected a tensor"), changed(model, lambda n, w: w[:1], names):
            pass
        for broken in (torch.nan, torch.inf):
            refused = pytest.raises(UnsupportedError, match="finite")
            with refused, changed(model, lambda n, w, b=broken: w * b if n == names[2] else w * 2, names):
                pass
    refused = pytest.raises(UnsupportedError, match="in memory")
    with refused, changed(nn.Linear(2, 2, device="meta"), lambda n, w: w, ["weight"]):
        pass


def test_a_map_of_another_model_is_not_used() -> None:
    model, other = tiny.causal_lm("llama"), ModelMap.of(tiny.causal_lm("gpt2"))
    with left_alone(model), changed(model, lambda n, w: w * 2, model_map=other) as names:
        assert names == tuple(targets(ModelMap.of(model)))
