"""Ablation of neurons and parts against edited weights and hand-written hooks, and on models with a planted memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probes import ablation, parts
from probes.ablation import Ablation, ablate, ablate_parts
from probes.attribution import NeuronScore, attribute, heat
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.neurons import neuron_means, neuron_sites
from probes.parts import part_means, parts_of
from probes.records import ImageRecord, TokenRecord
from tests.tiny import IMAGE, causal_lm, image_classifier, train

F64 = torch.float64
GPT_OSS = {  # stacked experts with transposed weights and biases
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}


def texts(n: int = 3, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(5, 11, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{seed}.{i}", ids, int(torch.randint(1, 4, (1,), generator=generator)), 1))
    return found


def images(n: int = 2, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, IMAGE, IMAGE, generator=generator, dtype=F64)
    return [ImageRecord(f"i{i}", pixels[i], i % 4) for i in range(n)]


def eager(arch: str, **overrides: Any) -> nn.Module:
    model = causal_lm(arch, dtype=F64, attn_implementation="eager", **overrides)
    model.config._experts_implementation = "eager"
    return model


def log_probs(model: nn.Module, records: Sequence[TokenRecord | ImageRecord]) -> list[float]:
    if isinstance(records[0], ImageRecord):
        with torch.no_grad():
            logits = model(torch.stack([r.pixels for r in records])).logits.log_softmax(-1)
        return [logits[i, r.label].item() for i, r in enumerate(records)]
    table = score(model, records)
    return [float(table.log_prob[table.rows(i)].sum()) for i in range(len(records))]


def some_neurons(model: nn.Module, per_site: int = 3) -> list[NeuronScore]:
    """A few neurons of every down projection."""
    return [
        NeuronScore(site.block, site.key, site.expert, (7 * i + 2) % site.projection.in_features, 1.0)
        for site in neuron_sites(ModelMap.of(model))
        for i in range(per_site)
    ]


def without(model: nn.Module, neurons: Sequence[NeuronScore]) -> nn.Module:
    """A copy in which the neurons' own weights are zero, so that whatever value they take is not written."""
    edited = copy.deepcopy(model)
    named = {site.key: site.projection for site in neuron_sites(ModelMap.of(edited))}
    with torch.no_grad():
        for one in neurons:
            weight = dict(edited.named_parameters())[named[one.module].parameter]
            weight = weight if one.expert is None else weight[one.expert]
            if named[one.module].orientation == "out_in":
                weight[:, one.neuron] = 0
            else:
                weight[one.neuron] = 0
    return edited


# ------------------------------------------------------------------------------------------------------------- neurons


@pytest.mark.parametrize("arch", ["gpt2", "llama", "phi3", "mixtral", "qwen2_moe", "gpt_oss"])
def test_setting_neurons_to_zero_is_dropping_their_weights(arch: str) -> None:
    model, (record, *control) = eager(arch, **(GPT_OSS if arch == "gpt_oss" else {})), texts(3)
    neurons = some_neurons(model)
    before, after = (log_probs(m, [record, *control]) for m in (model, without(model, neurons)))
    drops = np.subtract(before, after)
    for batch_tokens in (1, None):  # copy by copy, all at once
        found = ablate(model, record, neurons, control=control, batch_tokens=batch_tokens)
        assert found.k == len(neurons)
        assert found.log_prob == pytest.approx(before[0], rel=1e-6)
        assert found.top == pytest.approx(drops[0], rel=1e-5, abs=1e-6)
        assert found.control == pytest.approx(drops[1:].mean(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("arch", ["vit", "swin"])
def test_neurons_of_image_classifiers(arch: str) -> None:
    model = image_classifier(arch, dtype=F64, attn_implementation="eager")
    records, neurons = images(3), some_neurons(model)
    drops = np.subtract(log_probs(model, records), log_probs(without(model, neurons), records))
    found = ablate(model, records[0], neurons, control=records[1:])
    assert found.top == pytest.approx(drops[0], rel=1e-6, abs=1e-9)
    assert found.control == pytest.approx(drops[1:].mean(), rel=1e-6, abs=1e-9)


def test_neurons_are_set_to_what_fill_says_at_every_position() -> None:
    model, record = eager("gpt2"), texts(1)[0]
    neurons = some_neurons(model)
    fill = {s.key: torch.linspace(-2, 2, 128, dtype=F64) for s in neuron_sites(ModelMap.of(model))}
    found = ablate(model, record, neurons, fill=fill)

    def replace(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            for one in neurons:
                if one.module == name:
                    x[..., one.neuron] = fill[name][one.neuron]
            return (x,)

        return hook

    before = log_probs(model, [record])[0]
    for name in fill:
        model.get_submodule(name).register_forward_pre_hook(replace(name))
    assert found.top == pytest.approx(before - log_probs(model, [record])[0], rel=1e-9)


def test_random_neurons_match_the_layers_and_avoid_the_named_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, record = eager("llama"), texts(1)[0]
    neurons = [*some_neurons(model)[:3], some_neurons(model)[-1]]  # three of the first block, one of the last
    seen: list[dict[str, Tensor]] = []
    original = ablation._masks

    def spy(*args: Any) -> dict[str, Tensor]:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(ablation, "_masks", spy)
    found = ablate(model, record, neurons, draws=20, seed=3)
    masks = seen[0]
    assert {name: mask.sum(1).tolist() for name, mask in masks.items()} == {
        "model.layers.0.mlp.down_proj": [0] + [3] * 21,
        "model.layers.2.mlp.down_proj": [0] + [1] * 21,
    }
    for mask in masks.values():
        assert not bool((mask[2:] & mask[1]).any())
    # Each draw is what dropping the weights of the neurons drawn would do.
    for draw in (0, 7):
        drawn = [
            NeuronScore(0, name, None, int(i), 0.0) for name, mask in masks.items() for i in mask[2 + draw].nonzero()
        ]
        expected = log_probs(model, [record])[0] - log_probs(without(model, drawn), [record])[0]
        assert found.random[draw] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    again, other = (ablate(model, record, neurons, draws=20, seed=seed).random for seed in (3, 4))
    assert again == found.random
    assert other != found.random
    assert ablate(model, record, list(reversed(neurons)), draws=20, seed=3).random == found.random
    renamed = TokenRecord("other", record.ids, record.n_prompt, 1)
    assert ablate(model, renamed, neurons, draws=20, seed=3).random != found.random


def test_mean_and_spread() -> None:
    found = Ablation("r", 1, -1.0, 5.0, (1.0, 2.0, 6.0), None, None)
    assert found.random_mean == 3.0
    assert found.random_spread == pytest.approx(7**0.5)
    assert Ablation("r", 1, -1.0, 5.0, (1.0,), None, None).random_spread is None


def test_nothing_named_changes_nothing_where_it_is_not_read() -> None:
    """Neurons whose weights are zero already: no drop, neither here nor in the control records."""
    model = eager("llama")
    neurons = some_neurons(model)
    found = ablate(without(model, neurons), texts(1)[0], neurons, control=texts(2, seed=1))
    assert (found.top, found.control) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_neuron_means_equal_a_loop_over_records(arch: str) -> None:
    model, records = eager(arch), texts(4)
    expected: dict[str, list[Tensor]] = {s.key: [] for s in neuron_sites(ModelMap.of(model))}

    def dense(name: str) -> Any:
        return lambda _m, args: expected[name].append(args[0].flatten(0, -2))

    def experts(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, index, _ = args
            for e in range(len(module.down_proj)):
                gate, up = (hidden[(index == e).any(-1)] @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                expected[f"{name}.down_proj.{e}"].append(module.act_fn(gate) * up)

        return hook

    means = neuron_means(model, records, batch_tokens=20)
    for name, module in model.named_modules():
        if name.endswith("mlp.c_proj"):
            module.register_forward_pre_hook(dense(name))
        elif name.endswith("experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.no_grad():
        for record in records:
            model(torch.tensor([record.ids[:-1]]))
    assert means.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(means[name], torch.cat(rows).mean(0), rtol=1e-5, atol=1e-7)
    assert all(not m._forward_hooks for m in model.modules())


def test_an_expert_that_no_token_reaches_has_mean_zero() -> None:
    model = eager("mixtral")
    record = TokenRecord("r", (5, 6), 1, 1)  # one position, two of four experts
    means = neuron_means(model, [record])
    assert sorted(bool(v.any()) for k, v in means.items() if ".0." in k.split("mlp")[0]) == [False, False, True, True]


def test_attributed_neurons_of_a_memorised_string_matter_more_than_random_ones() -> None:
    model = causal_lm("llama", num_hidden_layers=2, intermediate_size=96)
    rows = [torch.randint(4, 96, (16,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(16)]
    train(model, rows[:8], steps=100, lr=1e-2)
    records, control = (
        [TokenRecord(f"r{i}", tuple(row), 8, 1) for i, row in enumerate(group)] for group in (rows[:8], rows[8:])
    )
    fill = neuron_means(model, control)
    found = attribute(model, records[:4], neurons=20)
    assert min(a.log_prob for a in found) > -1
    drops = [ablate(model, r, a.neurons, fill=fill) for r, a in zip(records, found, strict=False)]
    assert np.mean([d.top for d in drops]) > 3 * np.mean([d.random_mean for d in drops])


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral"])
def test_part_ablation_equals_hand_written_hooks(arch: str) -> None:
    model, records, control = eager(arch), texts(3), texts(2, seed=1)
    model_map = ModelMap.of(model)
    done: list[tuple[int, int]] = []
    found = ablate_parts(model, records, control, batch_tokens=25, progress=lambda a, b: done.append((a, b)))
    places = parts_of(model_map)
    assert [(f.block, f.module) for f in found] == list(places)
    assert done == [(i + 1, len(places)) for i in range(len(places))]
    for result, (path,) in zip(found, places.values(), strict=True):
        module = model.get_submodule(path)
        rows: list[Tensor] = []

        def watch(_m: nn.Module, _x: Any, y: Any, rows: list[Tensor] = rows) -> None:
            rows.append((y[0] if isinstance(y, tuple) else y).flatten(0, -2))

        handle = module.register_forward_hook(watch)
        with torch.no_grad():
            for record in control:
                model(torch.tensor([record.ids[:-1]]))
        handle.remove()
        mean = torch.cat(rows).mean(0)

        def replace(_m: nn.Module, _x: Any, y: Any, mean: Tensor = mean) -> Any:
            return (mean.expand_as(y[0]), *y[1:]) if isinstance(y, tuple) else mean.expand_as(y)

        for group, drops in ((records, result.drops), (control, result.control_drops)):
            before = log_probs(model, group)
            handle = module.register_forward_hook(replace)
            after = log_probs(model, group)
            handle.remove()
            expected = [(a - b) / r.n_tokens for a, b, r in zip(before, after, group, strict=True)]
            assert drops == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert result.contrast == pytest.approx(np.mean(result.drops) - np.mean(result.control_drops))


def test_parts_of_image_classifiers() -> None:
    model = image_classifier("vit", dtype=F64)
    records, control = images(2), images(2, seed=1)
    found = ablate_parts(model, records, control)
    assert len(found) == 6
    with torch.no_grad():
        outputs: list[Tensor] = []
        module = model.vit.layers[1].mlp
        handle = module.register_forward_hook(lambda _m, _x, y: outputs.append(y))
        model(torch.stack([r.pixels for r in control]))
        handle.remove()
        before = log_probs(model, records)
        module.register_forward_hook(lambda _m, _x, y: outputs[0].mean((0, 1)).expand_as(y))
        drops = np.subtract(before, log_probs(model, records))
    assert next(f for f in found if (f.block, f.module) == (1, "feed_forward")).drops == pytest.approx(drops, rel=1e-6)


def test_parts_are_the_modules_that_hold_their_projections() -> None:
    assert parts_of(ModelMap.of(causal_lm("gpt2")))[1, "attention"] == ("transformer.h.1.attn",)
    assert parts_of(ModelMap.of(causal_lm("qwen2_moe")))[0, "feed_forward"] == ("model.layers.0.mlp",)
    assert parts_of(ModelMap.of(image_classifier("swin")))[2, "attention"] == (
        "swin.encoder.layers.1.blocks.1.attention",
    )
    extra = {
        "ffn_dim": 48,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert parts_of(ModelMap.of(causal_lm("opt", **extra)))[0, "feed_forward"] == ("model.decoder.layers.0.fc2",)
    with pytest.raises(UnsupportedError, match="told apart, found resnet"):
        parts_of(ModelMap.of(image_classifier("resnet")))
    with pytest.raises(UnsupportedError, match="found none in ResNetForImageClassification"):
        neuron_sites(ModelMap.of(image_classifier("resnet")))


def test_a_module_that_holds_both_parts_stands_for_neither() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(12, 12), nn.Linear(12, 12)
            self.mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.o_proj(self.q_proj(x))
            return y + self.mlp(y)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model_map = ModelMap.of(nn.Sequential(nn.Flatten(), nn.Sequential(Outer(), Outer(), Outer()), nn.Linear(12, 4)))
    assert model_map.blocks[1].name == "1.1"
    found = parts_of(model_map)
    assert found[1, "attention"] == ("1.1.inner.o_proj",)
    assert found[1, "feed_forward"] == ("1.1.inner.mlp",)


@pytest.mark.parametrize(("block", "part"), [(0, "mlp"), (2, "mlp"), (1, "self_attn")])
def test_the_part_that_was_trained_to_memorise_stands_out_against_control(block: int, part: str) -> None:
    """One part alone learns four strings; ablating it costs them most, compared with strings nobody learned.

    The same records were attributed: without the contrast the part need not lead the heat map.
    """
    model = causal_lm("llama")
    rows = [torch.randint(4, 96, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(12)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.{block}.{part}." in name)
    train(model, rows[:4], steps=150, lr=2e-2)
    records, control = (
        [TokenRecord(f"r{i}", tuple(row), 6, 1) for i, row in enumerate(group)] for group in (rows[:4], rows[4:])
    )
    found = ablate_parts(model, records, control)
    planted = (block, "feed_forward" if part == "mlp" else "attention")
    best = max(found, key=lambda f: f.contrast)
    assert (best.block, best.module) == planted
    cells = heat(attribute(model, records, steps=16), attribute(model, control, steps=16))
    assert {(c.block, c.module) for c in sorted(cells, key=lambda c: -c.contrast)[:2]} & {planted}


# -------------------------------------------------------------------------------------------------- limits and manners


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_the_model_is_left_as_found(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(arch).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    implementation = model.config._experts_implementation
    records, control = texts(2), texts(2, seed=1)

    def check() -> None:
        assert model.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.config._experts_implementation == implementation

    ablate(model, records[0], some_neurons(model), fill=neuron_means(model, control), control=control)
    ablate_parts(model, records, control)
    check()

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ablation._Ablations, "_replace", fail)
    with pytest.raises(ResourceError, match="one copy"):
        ablate(model, records[0], some_neurons(model))
    monkeypatch.setattr(parts, "sum_type", fail)
    with pytest.raises(ResourceError, match="lower batch_tokens"):
        part_means(model, control)
    check()


def test_bad_arguments_say_what_was_expected() -> None:
    model, record = causal_lm("llama"), texts(1)[0]
    down, width = "model.layers.0.mlp.down_proj", 48
    with pytest.raises(UsageError, match="found 0 and 8"):
        ablate(model, record, [])
    with pytest.raises(UsageError, match="at least 1 draw, found 1 and 0"):
        ablate(model, record, [NeuronScore(0, down, None, 0, 1.0)], draws=0)
    for module, neuron in ((down, width), (down, -1), ("model.layers.9.mlp.down_proj", 0)):
        with pytest.raises(UsageError, match="neurons of the model, found"):
            ablate(model, record, [NeuronScore(0, module, None, neuron, 1.0)])
    with pytest.raises(UsageError, match="twice"):
        ablate(model, record, [NeuronScore(0, down, None, 1, 1.0)] * 2)
    with pytest.raises(UsageError, match="found 30 of the 48"):
        ablate(model, record, [NeuronScore(0, down, None, i, 1.0) for i in range(30)])
    for fill in ({}, {down: torch.zeros(3)}):
        with pytest.raises(UsageError, match=r"expected 48 values .* found (none|\(3,\))"):
            ablate(model, record, [NeuronScore(0, down, None, 1, 1.0)], fill=fill)
    with pytest.raises(UsageError, match="found images"):
        ablate(model, record, [NeuronScore(0, down, None, 1, 1.0)], control=images(1))
    with pytest.raises(UsageError, match="found 1 and 0"):
        ablate_parts(model, [record], [])
    for means in (neuron_means, part_means):
        with pytest.raises(UsageError, match="at least one record"):
            means(model, [])
