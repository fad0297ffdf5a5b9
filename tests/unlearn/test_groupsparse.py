"""Group sparsity, bounded losses and prototypes against independent arithmetic, and defects of public code."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import rel_entr
from torch import nn

from probes import training
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.tiny import IMAGE, causal_lm, image_classifier
from unlearn.editors.groupsparse import (
    MovingAverage,
    bounded,
    bounded_mean,
    groups_of,
    norm,
    product_norm,
    shrink,
    structure_loss,
)
from unlearn.editors.prototypes import Embeddings, distance, key_of, mean_distances, prototypes


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# -------------------------------------------------------------------------------------------------------- the penalty


def test_structure_loss_is_the_hand_sum_and_its_gradient_the_unit_vector() -> None:
    groups = [tensors((2, 3), (4, 2)), tensors((5,), seed=1)]
    for group in groups:
        for tensor in group:
            tensor.requires_grad_()
    loss = structure_loss(groups)
    sizes = [np.sqrt(sum(float((t.detach() ** 2).sum()) for t in group)) for group in groups]
    assert float(loss.detach()) == pytest.approx(sum(sizes), rel=1e-12)
    loss.backward()
    for group, size in zip(groups, sizes, strict=True):
        for tensor in group:
            torch.testing.assert_close(tensor.grad, tensor.detach() / size, rtol=1e-12, atol=0)


def test_the_penalty_has_a_finite_gradient_at_zero() -> None:
    """Public code takes a square root at B = 0: its gradient is NaN from the first step on."""
    up = torch.zeros(3, 2, requires_grad=True)
    down = torch.ones(2, 3, requires_grad=True)
    structure_loss([[up], [up, down]]).backward()
    assert up.grad is not None
    assert down.grad is not None
    assert bool((up.grad == 0).all())
    torch.testing.assert_close(down.grad, torch.full((2, 3), 6**-0.5))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0, 2.9, 3.5, 50.0])
def test_the_proximal_step_is_the_minimiser(threshold: float) -> None:
    start = tensors((2, 2), (3,), seed=2)
    scale = 3.0 / float(norm(start))
    start = [scale * tensor for tensor in start]  # of norm 3
    flat = torch.cat([t.flatten() for t in start]).numpy()
    found = [tensor.clone() for tensor in start]
    (size,) = shrink([found], [threshold])
    ours = torch.cat([t.flatten() for t in found]).numpy()

    def objective(x: np.ndarray) -> float:
        return float(0.5 * ((x - flat) ** 2).sum() + threshold * np.linalg.norm(x))

    best = min(
        (minimize(objective, x0, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20_000})
         for x0 in (flat, 0.1 * flat)),
        key=lambda result: result.fun,
    )  # fmt: skip
    assert objective(ours) <= best.fun + 1e-9
    np.testing.assert_allclose(ours, best.x, atol=2e-4)
    assert size == pytest.approx(max(0.0, 3.0 - threshold), rel=1e-12)
    if threshold >= 3:
        assert size == 0.0
        assert not ours.any()
    if threshold == 0:
        np.testing.assert_array_equal(ours, flat)


def test_groups_shrink_apart_and_a_zero_group_stays_finite() -> None:
    a, b, c = tensors((3,), (3,), (3,), seed=3)
    c.zero_()
    before = a.clone(), b.clone()
    sizes = shrink([[a], [b], [c]], [0.1, 100.0, 0.0])
    torch.testing.assert_close(a, before[0] * (1 - 0.1 / before[0].norm()))
    assert not b.any()
    assert not c.any()
    assert sizes[1:] == [0.0, 0.0]
    assert shrink([], []) == []


def test_the_subgradient_never_reaches_zero_and_the_proximal_step_does() -> None:
    """Public code differentiates the norm under AdamW: no group ever is exactly zero, and nothing can be dropped."""

    def trained(proximal: bool) -> nn.Parameter:
        parameter = nn.Parameter(torch.linspace(-1, 1, 8))

        def step(i: int) -> float:
            loss = 0.0 * parameter.sum() if proximal else structure_loss([[parameter]])
            loss.backward()
            return float(loss.detach())

        def after(done: int) -> None:
            if proximal:
                shrink([[parameter.data]], [1e-2])

        training.fit([parameter], step, steps=500, learning_rate=1e-2, after=after)
        return parameter

    assert bool(trained(proximal=False).detach().all())
    assert not bool(trained(proximal=True).detach().any())


def test_product_norm_is_that_of_the_changes() -> None:
    (a, b, c, d) = tensors((2, 7), (5, 2), (2, 3), (4, 2))
    expected = torch.cat([(b @ a).flatten(), (d @ c).flatten()]).norm() * 0.5
    assert product_norm([(a, b), (c, d)], 0.5) == pytest.approx(float(expected), rel=1e-12)
    assert product_norm([(a, 0 * b)], 0.5) == 0.0


# ---------------------------------------------------------------------------------------------------------- the groups


@pytest.mark.parametrize("layers", [2, 3, 7])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "phi3", "vit"])
def test_groups_are_the_blocks_however_many(arch: str, layers: int) -> None:
    """Public code counts on 6 blocks, or 12."""
    depth = {"n_layer" if arch == "gpt2" else "num_hidden_layers": layers}
    model_map = ModelMap.of((image_classifier if arch == "vit" else causal_lm)(arch, **depth))
    names = [q.parameter for block in model_map.blocks for q in block.feed_forward]
    found = groups_of(model_map, names, "block")
    assert [group.block for group in found] == list(range(layers))
    assert [group.name for group in found] == [block.name for block in model_map.blocks]
    assert [q.parameter for group in found for q in group.projections] == names
    single = groups_of(model_map, names, "projection")
    assert [[q.parameter for q in group.projections] for group in single] == [[name] for name in names]
    assert groups_of(model_map, names, "expert") == found  # no lists of modules inside these blocks


class Mixture(nn.Module):
    """A block of a plain classifier whose experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)}) for _ in range(3))


def test_experts_are_groups_where_they_are_modules() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Mixture() for _ in range(2))
    model.head = nn.Linear(8, 4)
    model_map = ModelMap.of(model)
    names = [q.parameter for q in model_map.projections()]
    found = groups_of(model_map, names, "expert")
    expected = [[f"layers.{i}", *(f"layers.{i}.experts.{e}" for e in range(3))] for i in range(2)]
    assert [group.name for group in found] == [name for names in expected for name in names]
    assert [len(group.projections) for group in found] == [1, 2, 2, 2] * 2


# ------------------------------------------------------------------------------------------------------ bounded losses


def test_the_bounded_loss_has_exactly_no_gradient_past_the_bound() -> None:
    losses = torch.tensor([0.0, 1.9, 2.0, 2.1, 900.0], dtype=torch.float64, requires_grad=True)
    values, slopes = bounded(losses, 2.0)
    torch.testing.assert_close(values, torch.tensor([2.0, 0.1, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert slopes.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(values[[0, 1, 3, 4]].sum(), losses)
    torch.testing.assert_close(gradient[[0, 1, 3, 4]], slopes[[0, 1, 3, 4]].detach())
    values, slopes = bounded(losses.detach(), 0.0)
    assert not values.any()
    assert not slopes.any()


def test_over_the_mean_of_a_batch_one_record_hides_the_rest() -> None:
    losses = torch.tensor([0.1, 0.1, 50.0], dtype=torch.float64)
    assert not bounded_mean(losses, 3.0)[1].any()  # as published: nothing is pushed any more
    assert bounded(losses, 3.0)[1].tolist() == [-1.0, -1.0, 0.0]
    values, slopes = bounded_mean(losses[:2], 3.0)
    assert slopes.tolist() == [-1.0, -1.0]
    torch.testing.assert_close(values, torch.full((2,), 2.9, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------- the average


def test_the_average_is_that_of_the_merged_weights() -> None:
    weight = tensors((5, 7), seed=9)[0]
    average, merged = MovingAverage(0.8), None
    halves: list[torch.Tensor] | None = None
    for step in range(6):
        down, up = tensors((2, 7), (5, 2), seed=step)
        average.add({"w": up @ down})
        now = weight + up @ down
        merged = now if merged is None else 0.8 * merged + 0.2 * now
        halves = [down, up] if halves is None else [0.8 * h + 0.2 * n for h, n in zip(halves, (down, up), strict=True)]
    assert merged is not None
    assert halves is not None
    torch.testing.assert_close(weight + average.value["w"], merged)
    assert float((average.value["w"] - halves[1] @ halves[0]).abs().max()) > 0.1  # that of A and B is another
    average.add({})  # dropped: zero from here on
    torch.testing.assert_close(average.value["w"], 0.8 * (merged - weight))


def test_averaging_a_model_with_adapters_loses_them() -> None:
    """Public code copies unmerged weights into a model that counts as merged: its logits are the original's."""
    model = image_classifier("vit", dtype=torch.float64)
    model_map, pixels = ModelMap.of(model), torch.randn(2, 3, IMAGE, IMAGE, dtype=torch.float64)
    plain = copy.deepcopy(model)
    with torch.no_grad(), training.adapters(model, model_map, rank=2, alpha=2, seed=0, roles=["up"]) as parameters:
        for up in parameters[1::2]:
            up.normal_(generator=torch.Generator().manual_seed(1))
        adapted = model(pixels).logits
        average = MovingAverage(0.5)
        average.add(training.merged_deltas(model, model_map))
        bare = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
        published, ours = copy.deepcopy(plain), copy.deepcopy(plain)
        for name, parameter in published.named_parameters():
            parameter.copy_(bare[name])
        for name, parameter in ours.named_parameters():
            if name in average.value:
                parameter.add_(average.value[name])
    with torch.no_grad():
        assert torch.equal(published(pixels).logits, plain(pixels).logits)
        torch.testing.assert_close(ours(pixels).logits, adapted)
        assert float((adapted - plain(pixels).logits).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_are_means_by_class() -> None:
    values = tensors((5, 3))[0]
    names, found = prototypes(["b", "a", "b", "c", "b"], values)
    assert names == ["b", "a", "c"]
    torch.testing.assert_close(found, torch.stack([values[[0, 2, 4]].mean(0), values[1], values[3]]))


def test_distance_is_the_divergence_and_zero_at_home() -> None:
    p, q = tensors((4, 6), (4, 6))
    expected = rel_entr(torch.softmax(p, -1).numpy(), torch.softmax(q, -1).numpy()).sum(-1)
    np.testing.assert_allclose(distance(p, q).numpy(), expected, rtol=1e-10)
    assert float(distance(p, p).abs().max()) == 0.0
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(q.detach().clone(), q).sum(), q)
    assert float(gradient.abs().max()) < 1e-15
    many = tensors((7, 6), seed=4)[0]
    every = [[float(distance(a[None], b[None])) for b in many] for a in p]
    np.testing.assert_allclose(mean_distances(p, many).numpy(), np.mean(every, axis=1), rtol=1e-10)


def test_what_records_share_a_prototype_with() -> None:
    texts = [TokenRecord(f"r{i}", (1, 2, 3), 1, 1, group) for i, group in enumerate(("ann", "ann", None))]
    assert [key_of(record) for record in texts] == ["ann", "ann", "r2"]
    assert key_of(ImageRecord("i", torch.zeros(3, 2, 2), 7, "group")) == 7


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_embeddings_of_texts_are_mean_states_of_the_answer(arch: str) -> None:
    model = causal_lm(arch, dtype=torch.float64)
    model_map = ModelMap.of(model)
    records = [TokenRecord(f"r{i}", tuple(range(4, 10 + 3 * i)), 2 + i, 1) for i in range(4)]
    rows, reader = [2, 0, 3], Embeddings(model_map, records)
    width = max(len(records[i].ids) for i in rows)
    ids = torch.tensor([[*records[i].ids, *[0] * (width - len(records[i].ids))] for i in rows])
    with torch.no_grad(), reader.watch(rows) as seen:
        model_map.backbone()(input_ids=ids, use_cache=False)
    for row, found in zip(rows, seen.embeddings, strict=True):
        record = records[row]
        with torch.no_grad():
            states = model_map.backbone()(input_ids=torch.tensor([record.ids])).last_hidden_state[0]
        torch.testing.assert_close(found.detach(), states[record.n_prompt - 1 : -1].mean(0), rtol=1e-6, atol=1e-6)
    assert not model_map.backbone()._forward_hooks


@pytest.mark.parametrize("arch", ["vit", "dinov2", "swin"])
def test_embeddings_of_images_are_what_the_head_reads(arch: str) -> None:
    model = image_classifier(arch)
    model_map = ModelMap.of(model)
    pixels = torch.randn(3, 3, IMAGE, IMAGE)
    reader = Embeddings(model_map, [ImageRecord(str(i), x, i) for i, x in enumerate(pixels)])
    with torch.no_grad(), reader.watch([0, 1, 2]) as seen:
        logits = model(pixels).logits
    assert reader.keys == [0, 1, 2]
    torch.testing.assert_close(model.get_submodule(model_map.head)(seen.embeddings), logits)
    assert not model.get_submodule(model_map.head)._forward_pre_hooks


def test_a_pushed_loss_rides_on_the_pass_own_backward() -> None:
    model = image_classifier("vit", dtype=torch.float64)
    model_map, pixels = ModelMap.of(model), torch.randn(2, 3, IMAGE, IMAGE, dtype=torch.float64)
    reader = Embeddings(model_map, [ImageRecord(str(i), x, i) for i, x in enumerate(pixels)])
    target = tensors((2, 32))[0]
    with reader.watch([0, 1]) as seen:
        logits = model(pixels).logits
    seen.push(3.0 * distance(target, seen.embeddings).sum())
    logits[:, 0].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states = model.vit(pixels).last_hidden_state[:, 0]
    (model.classifier(states)[:, 0].sum() + 3.0 * distance(target, states).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
