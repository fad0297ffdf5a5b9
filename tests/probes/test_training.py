"""The one training loop, against plain torch, and the promise that models are left as they were found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.training import adapters, batches, fit, full, mean_loss, merged_deltas
from tests import tiny


def _records(n: int = 6, vocab: int = 96, seed: int = 0) -> list[TokenRecord]:
    rng = np.random.default_rng(seed)
    return [
        TokenRecord(f"r{i}", tuple(int(t) for t in rng.integers(4, vocab, 9 + i % 3)), 3 + i % 2, 10) for i in range(n)
    ]


def _images(n: int = 6, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [ImageRecord(f"i{i}", torch.randn(3, 32, 32, generator=generator), i % 4) for i in range(n)]


def _print(model: nn.Module) -> str:
    """Everything about a model that training could disturb."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name}{tensor.dtype}{tensor.requires_grad}".encode())
        digest.update(tensor.detach().double().numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        names = sorted(key for key in vars(module) if not key.startswith("_hf_hook"))
        digest.update(f"{name}{id(module)}{module.training}{hooks}{names}{list(module._modules)}".encode())
    digest.update(repr(model.config.to_dict()).encode())
    digest.update(repr([None if p.grad is None else p.grad.sum().item() for p in model.parameters()]).encode())
    return digest.hexdigest()


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    model.train()  # modes, flags and gradients off their usual values
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    before, state = _print(model), torch.get_rng_state()
    yield
    assert _print(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def _descend(model: nn.Module, parameters: list[nn.Parameter], records: list, model_map: ModelMap, steps: int = 3):
    loss, order = mean_loss(model, records, model_map=model_map), list(batches(len(records), 4, steps, 0))
    return fit(parameters, lambda i: loss(order[i]), steps=steps, learning_rate=1e-2)


# ---------------------------------------------------------------------------------------------------------- the loop


def _by_hand(weights, gradient, steps, rate, weight_decay=0.0, clip=None):
    """AdamW as in the paper, in numpy float64; `rate` is a function of the step from 0."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for i in range(steps):
        g = gradient(weights, i)
        if clip is not None:
            g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
        weights = weights - rate(i) * weight_decay * weights - rate(i) * step
    return weights


@pytest.mark.parametrize(("decay", "warm_up", "weight_decay", "clip"), [
    ("constant", 0, 0.0, None), ("linear", 2, 0.1, None), ("linear", 0, 0.0, 0.5), ("constant", 4, 0.0, 2.0),
])  # fmt: skip
def test_fit_is_adamw_with_its_schedule_by_hand(decay, warm_up, weight_decay, clip) -> None:
    start, target = np.array([1.0, -2.0, 0.5]), np.array([[3.0, 1.0, 0.0], [-1.0, 2.0, 2.0]])
    parameter = nn.Parameter(torch.tensor(start))

    def step(i: int) -> float:
        loss = (parameter - torch.tensor(target[i % 2])).square().sum()
        loss.backward()
        return float(loss.detach())

    def rate(i: int) -> float:
        rise = min(1.0, (i + 1) / warm_up) if warm_up else 1.0
        return 0.05 * (min(rise, (7 - i) / (7 - warm_up)) if decay == "linear" else rise)

    settings = {"decay": decay, "warm_up": warm_up, "weight_decay": weight_decay, "clip": clip}
    losses = fit([parameter], step, steps=7, learning_rate=0.05, **settings)
    expected = _by_hand(start, lambda w, i: 2 * (w - target[i % 2]), 7, rate, weight_decay, clip)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9)
    assert losses[0] == pytest.approx(((start - target[0]) ** 2).sum())
    assert len(losses) == 7
    assert parameter.grad is None


def test_after_sees_each_step_done_without_gradients_and_can_end_the_training() -> None:
    parameter, seen = nn.Parameter(torch.ones(2)), []

    def step(i: int) -> float:
        assert parameter.grad is None
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    def after(done: int) -> bool:
        seen.append((done, parameter.grad is None, float(parameter[0].detach())))
        return done == 3

    assert len(fit([parameter], step, steps=9, learning_rate=0.1, after=after)) == 3
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert all(free for _, free, _ in seen)
    assert seen[0][2] == pytest.approx(0.9, abs=1e-6)
    assert fit([parameter], step, steps=0, learning_rate=0.1) == []


def test_half_precision_weights_move_by_less_than_their_last_bit() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))  # neighbours of 1 are 0.0078 and 0.0039 away

    def step(i: int) -> float:
        parameter.sum().backward()
        return float(parameter.detach())

    fit([parameter], step, steps=20, learning_rate=1e-3)
    assert float(parameter.detach()) == pytest.approx(0.98, abs=0.004)


def test_batches_are_permutations_cut_up() -> None:
    found = list(batches(7, 3, 7, seed=1))
    assert [len(batch) for batch in found] == [3, 3, 1, 3, 3, 1, 3]
    epochs = [sorted(row for batch in found[i : i + 3] for row in batch) for i in (0, 3)]
    assert epochs == [list(range(7))] * 2
    assert found[:3] != found[3:6]
    assert list(batches(7, 3, 2, seed=1)) == found[:2]  # a shorter run is the beginning of a longer one
    assert list(batches(7, 3, 7, seed=2)) != found
    assert [sorted(batch) for batch in batches(2, 8, 2, seed=0)] == [[0, 1], [0, 1]]
    assert list(batches(3, 1, 0, seed=0)) == []


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_batches_of_nothing_are_refused_at_once(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="expected records"):
        batches(*arguments, seed=0)


def test_fit_refuses_what_cannot_be_trained() -> None:
    parameter = nn.Parameter(torch.ones(1))
    for settings in ({"steps": -1}, {"learning_rate": 0.0}, {"warm_up": -1}):
        with pytest.raises(UsageError, match="learning rate above 0"):
            fit([parameter], lambda i: 0.0, **({"steps": 1, "learning_rate": 1.0} | settings))
    with pytest.raises(UsageError, match="expected parameters"):
        fit([], lambda i: 0.0, steps=1, learning_rate=1.0)
    with pytest.raises(UsageError, match=r"finite training loss, found nan at step 3.*lower the learning rate"):
        fit([parameter], lambda i: float("nan") if i == 2 else 0.0, steps=5, learning_rate=1.0)


# ---------------------------------------------------------------------------------------------------------- the loss


def test_mean_loss_is_the_mean_over_completion_tokens() -> None:
    model, records = tiny.causal_lm("llama", dtype=torch.float64), _records()
    rows = [0, 2, 3]
    logits = [model(input_ids=torch.tensor([records[i].ids])).logits[0] for i in rows]
    pieces = [
        functional.cross_entropy(z[r.n_prompt - 1 : -1], torch.tensor(r.completion), reduction="sum")
        for z, r in zip(logits, [records[i] for i in rows], strict=True)
    ]
    expected = sum(pieces) / sum(records[i].n_tokens for i in rows)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert mean_loss(model, records)(rows) == pytest.approx(float(expected.detach()), rel=1e-12)
    for found, wanted in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(found.grad, wanted)


def test_mean_loss_of_images_is_cross_entropy() -> None:
    model, records = tiny.image_classifier("vit", dtype=torch.float64), _images()
    records = [ImageRecord(r.record_id, r.pixels.double(), r.label) for r in records]
    logits = model(torch.stack([records[i].pixels for i in (1, 4)])).logits
    expected = functional.cross_entropy(logits, torch.tensor([records[1].label, records[4].label]))
    assert mean_loss(model, records)([1, 4]) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_mean_loss_refuses_what_the_model_does_not_have() -> None:
    with pytest.raises(UsageError, match="expected records to train on, found none"):
        mean_loss(tiny.causal_lm("llama"), [])
    with pytest.raises(UnsupportedError, match="vocabulary"):
        mean_loss(tiny.causal_lm("llama"), _records(vocab=200))
    with pytest.raises(UnsupportedError, match="labels below 4"):
        mean_loss(tiny.image_classifier("vit"), [ImageRecord("i", torch.zeros(3, 32, 32), 4)])([0])


# ---------------------------------------------------------------------------------------------------------- adapters

LINEAR = ("gpt2", "llama", "gpt_neox", "phi3", "gemma2")


@pytest.mark.parametrize("arch", LINEAR)
def test_adapters_start_as_the_identity_and_leave_nothing_behind(arch: str) -> None:
    model, records = tiny.causal_lm(arch), _records()
    model_map = ModelMap.of(model)
    ids = torch.tensor([records[0].ids])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with _left_as_found(model), adapters(model, model_map, rank=3, alpha=6, seed=1) as parameters:
            assert torch.equal(model(input_ids=ids).logits, plain)
            weights = {id(p) for p in parameters}
            assert {id(p) for p in model.parameters() if p.requires_grad} == weights
            assert not any(module.training for module in model.modules())
            assert _descend(model, parameters, records, model_map)[-1] > 0
            trained = model(input_ids=ids).logits
            hidden = model_map.backbone()(input_ids=ids).last_hidden_state
            assert torch.equal(model_map.logits(hidden), trained)  # the map made before still reads the model
        assert not torch.equal(trained, plain)
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert ModelMap.of(model)  # which refuses a model with any trace of peft


def test_adapters_are_taken_out_when_an_exception_flies() -> None:
    model = tiny.causal_lm("gpt2")
    model_map = ModelMap.of(model)
    with _left_as_found(model), pytest.raises(KeyError), adapters(model, model_map, rank=2, alpha=2, seed=0) as found:
        found[0].grad = torch.ones_like(found[0])
        raise KeyError


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_merged_deltas_give_the_adapted_model(arch: str) -> None:
    model, records = tiny.causal_lm(arch, dtype=torch.float64), _records()
    model_map = ModelMap.of(model)
    ids = torch.tensor([records[0].ids])
    with torch.no_grad(), adapters(model, model_map, rank=3, alpha=6, seed=1) as parameters:
        _descend(model, parameters, records, model_map)
        adapted, deltas = model(input_ids=ids).logits, merged_deltas(model, model_map)
    with torch.no_grad():
        weights = dict(model.named_parameters())
        assert set(deltas) == {p.parameter for p in model_map.projections()}
        for name, delta in deltas.items():
            weights[name].add_(delta)
        torch.testing.assert_close(model(input_ids=ids).logits, adapted)
    with pytest.raises(UsageError, match="expected adapters in place"):
        merged_deltas(model, model_map)


class _Adapted(nn.Module):
    """LoRA by hand."""

    def __init__(self, inner: nn.Module, down: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, alpha / rank
        out = inner.weight.shape[1 if isinstance(inner, Conv1D) else 0]
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(torch.zeros(out, rank, dtype=down.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.scale * (x @ self.down.T) @ self.up.T


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_training_adapters_is_lora_by_hand(arch: str) -> None:
    model, records, steps = tiny.causal_lm(arch, dtype=torch.float64), _records(), 4
    model_map, order = ModelMap.of(model), list(batches(6, 4, steps, 0))
    with adapters(model, model_map, rank=3, alpha=6, seed=1, first_block=1) as parameters:
        starts = [p.detach().clone() for p in parameters[::2]]
        losses = _descend(model, parameters, records, model_map, steps)
        ends = [p.detach().clone() for p in parameters]
    paths = [p.module for block in model_map.blocks[1:] for p in (*block.attention, *block.feed_forward)]
    mine: list[nn.Parameter] = []
    model.requires_grad_(False)
    for path, start in zip(paths, starts, strict=True):
        layer = _Adapted(model.get_submodule(path), start, 3, 6.0)
        bound = start.shape[1] ** -0.5
        assert 0.5 * bound < start.abs().max() <= bound
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        mine += [layer.down, layer.up]
    optimiser, found = torch.optim.AdamW(mine, lr=1e-2, weight_decay=0.0), []
    for batch in order:
        optimiser.zero_grad()
        rows = [records[i] for i in batch]
        pieces = [
            functional.cross_entropy(
                model(input_ids=torch.tensor([r.ids])).logits[0, r.n_prompt - 1 : -1],
                torch.tensor(r.completion),
                reduction="sum",
            )
            for r in rows
        ]
        loss = sum(pieces) / sum(r.n_tokens for r in rows)
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    np.testing.assert_allclose(losses, found, rtol=1e-10)
    for end, wanted in zip(ends, mine, strict=True):
        torch.testing.assert_close(end, wanted.detach(), rtol=1e-7, atol=1e-10)


def test_the_backward_pass_stops_at_the_lowest_adapted_block() -> None:
    model, records = tiny.causal_lm("llama"), _records()
    model_map = ModelMap.of(model)
    seen: dict[str, bool] = {}

    def note(name: str):
        return lambda module, x, y: seen.__setitem__(name, (y if torch.is_tensor(y) else y[0]).requires_grad)

    for block in model_map.blocks:
        model.get_submodule(block.name).register_forward_hook(note(block.name))
    with adapters(model, model_map, rank=2, alpha=2, first_block=1, seed=0) as parameters:
        mean_loss(model, records, model_map=model_map)([0, 1])
        assert all(p.grad is not None for p in parameters)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        inside = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(model_map.block_of(name) in (1, 2) for name in inside)
    assert list(seen.values()) == [False, True, True]


def test_adapters_follow_the_seed_and_leave_the_random_state_alone() -> None:
    model = tiny.causal_lm("llama")
    model_map = ModelMap.of(model)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))  # torch's own generator has no say
        with adapters(model, model_map, rank=2, alpha=2, seed=seed) as parameters:
            drawn.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_roles_choose_what_is_adapted() -> None:
    model = tiny.causal_lm("mixtral")
    model_map = ModelMap.of(model)
    with _left_as_found(model):
        with adapters(model, model_map, rank=2, alpha=2, roles={"q", "v"}, seed=0) as parameters:
            assert len(parameters) == 2 * 2 * len(model_map.blocks)
        with (
            pytest.raises(UnsupportedError, match="stacked experts; train in full"),
            adapters(model, model_map, rank=2, alpha=2, seed=0),
        ):
            pass


class _Routed(nn.Module):
    """A block whose experts are modules of their own, beside a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.fc1, self.fc2 = nn.Linear(8, 2), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.router(x).softmax(-1)[..., :1] * self.fc2(self.fc1(x).relu())


def test_routers_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Sequential(_Routed(), _Routed()), nn.Linear(8, 3))
    model_map = ModelMap.of(model)
    for roles, found in ((None, 2 * 2), ({"router"}, 2)):
        with adapters(model, model_map, rank=1, alpha=1, roles=roles, seed=0) as parameters:
            assert len(parameters) == 2 * found


def test_adapters_of_half_precision_weights_are_fp32() -> None:
    model = tiny.causal_lm("llama", dtype=torch.bfloat16)
    model_map = ModelMap.of(model)
    with _left_as_found(model), adapters(model, model_map, rank=2, alpha=2, seed=0) as parameters:
        assert {p.dtype for p in parameters} == {torch.float32}
        losses = _descend(model, parameters, _records(), model_map, 8)
        assert losses[-1] < losses[0]


def test_adapters_in_a_vision_transformer_and_none_in_a_convolutional_network() -> None:
    model, records = tiny.image_classifier("vit"), _images()
    model_map = ModelMap.of(model)
    with _left_as_found(model), adapters(model, model_map, rank=4, alpha=8, seed=0) as parameters:
        losses = _descend(model, parameters, records, model_map, 12)
    assert losses[-1] < losses[0]
    resnet = tiny.image_classifier("resnet")
    with (
        _left_as_found(resnet),
        pytest.raises(UsageError, match="expected linear maps in the blocks to adapt, found none; train in full"),
        adapters(resnet, ModelMap.of(resnet), rank=4, alpha=8, seed=0),
    ):
        pass


@pytest.mark.parametrize("settings", [{"rank": 0, "alpha": 1.0}, {"rank": 1, "alpha": 0.0}])
def test_adapters_of_no_rank_are_refused(settings: dict[str, float]) -> None:
    model = tiny.causal_lm("llama")
    with pytest.raises(UsageError, match="rank"), adapters(model, ModelMap.of(model), seed=0, **settings):
        pass


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "resnet"])
def test_full_training_puts_the_weights_back(arch: str) -> None:
    image = arch == "resnet"
    model = tiny.image_classifier(arch) if image else tiny.causal_lm(arch)
    model_map, records = ModelMap.of(model), _images() if image else _records()
    with _left_as_found(model):
        with full(model) as parameters:
            start = [p.detach().clone() for p in parameters]
            assert len(parameters) == len(list(model.parameters()))
            losses = _descend(model, parameters, records, model_map, 6)
            assert losses[-1] < losses[0]
            assert any(not torch.equal(a, p) for a, p in zip(start, parameters, strict=True))
        with pytest.raises(KeyError), full(model) as parameters:
            with torch.no_grad():
                parameters[0].add_(1)
            raise KeyError


def test_full_training_of_some_parameters_and_keeping_them() -> None:
    model = tiny.causal_lm("llama")
    names = [name for name, _ in model.named_parameters() if ".layers.1." in name]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with full(model, names, keep=True) as parameters:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
        _descend(model, parameters, _records(), ModelMap.of(model))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(names)
    assert len(changed) == len(names)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for wrong, found in (([], "found none"), (["x"], "found 1 that it does not have")):
        with pytest.raises(UsageError, match=found), full(model, wrong):
            pass
