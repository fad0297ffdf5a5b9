"""Attribution against brute-force path integrals, captum's own classes, and models whose answer is known."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerConductance, LayerIntegratedGradients
from torch import Tensor, nn

from probes import attribution, targets
from probes.attribution import Attribution, ModuleScore, NeuronScore, attribute, heat
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.targets import targets_of
from tests.tiny import IMAGE, causal_lm, image_classifier, seeded, train

F64 = torch.float64
LANGUAGE = ["gpt2", "llama", "qwen2", "gemma2", "phi3", "mixtral"]


def texts(n: int = 3, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(5, 11, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{i}", ids, int(torch.randint(1, 4, (1,), generator=generator)), 1))
    return found


def images(n: int = 2, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, IMAGE, IMAGE, generator=generator, dtype=F64)
    return [ImageRecord(f"i{i}", pixels[i], i % 4) for i in range(n)]


def eager(arch: str, **overrides: Any) -> nn.Module:
    model = causal_lm(arch, dtype=F64, attn_implementation="eager", **overrides)
    model.config._experts_implementation = "eager"
    return model


def log_prob(model: nn.Module, record: TokenRecord, embeddings: Tensor) -> Tensor:
    """[S] log-probability of the completion for inputs [S, P, d] in the place of token embeddings."""
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, record.n_prompt - 1 :]  # [S, n, V]
    return (
        logits.log_softmax(-1)
        .gather(-1, torch.tensor(record.completion).expand(len(embeddings), -1)[..., None])
        .sum((1, 2))
    )


def ends(model: nn.Module, record: TokenRecord, baseline: str | int, vary: str = "all") -> tuple[Tensor, Tensor]:
    """Both ends of the path, [1, P, d]."""
    table = model.get_input_embeddings()
    with torch.no_grad():
        x = table(torch.tensor([record.ids[:-1]]))
        every = table(torch.arange(table.weight.shape[0]))
        neutral = {"mean": every.mean(0), "zero": 0 * every[0]}.get(str(baseline))
        start = (every[int(baseline)] if neutral is None else neutral).expand_as(x).clone()
    if vary == "prompt":
        start[:, record.n_prompt :] = x[:, record.n_prompt :]
    return start, x


def part_outputs(model: nn.Module) -> dict[tuple[int, str], nn.Module]:
    """Attention and feed-forward module of every block, by the names of the tiny models."""
    backbone = model.base_model
    blocks = getattr(backbone, "h", None) or getattr(backbone, "layers", None) or backbone.encoder.layer
    return {
        (i, part): next(getattr(b, n) for n in names if hasattr(b, n))
        for i, b in enumerate(blocks)
        for part, names in (("attention", ("attn", "self_attn", "attention")), ("feed_forward", ("mlp",)))
    }


@contextmanager
def recorded(modules: dict[Any, nn.Module], inputs: bool = False) -> Iterator[dict[Any, Tensor]]:
    """Outputs (or inputs) of modules in a pass, with their gradients kept."""
    found: dict[Any, Tensor] = {}

    def keep(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[key] = args[0] if inputs else output[0] if isinstance(output, tuple) else output
            found[key].retain_grad()

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    yield found
    for handle in handles:
        handle.remove()


def conductances(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    x: Tensor,
    modules: dict[Any, nn.Module],
    steps: int,
    inputs: bool = False,
) -> dict[Any, Tensor]:
    """Conductance by a fine midpoint rule over equal steps, [width of the last dimension]."""
    alphas = torch.linspace(0, 1, steps + 1, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    ends_, middles = start + alphas * (x - start), start + (alphas[1:] + alphas[:-1]) / 2 * (x - start)
    with recorded(modules, inputs) as found:
        function(ends_.requires_grad_())
        values = {key: tensor.detach() for key, tensor in found.items()}
        function(middles.requires_grad_()).sum().backward()
        out = {}
        for key, tensor in found.items():
            moved = values[key].view(steps + 1, -1, values[key].shape[-1]).diff(dim=0)
            out[key] = (moved * tensor.grad.view_as(moved)).sum((0, 1))
    model.zero_grad(set_to_none=True)
    return out


def layer_scores(found: Attribution) -> dict[tuple[int, str], float]:
    return {(s.block, s.module): s.score for s in found.layers}


def neuron_scores(found: Attribution) -> dict[tuple[str, int], float]:
    return {(s.module, s.neuron): s.score for s in found.neurons}


# ---------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("arch", LANGUAGE)
def test_the_target_is_the_audits_log_probability(arch: str) -> None:
    records = texts(4)
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 2e-6)):
        model = causal_lm(arch, dtype=dtype, attn_implementation="eager")
        if arch == "mixtral":
            model.config._experts_implementation = "eager"
        table = score(model, records)
        expected = [float(table.log_prob[table.rows(i)].sum()) for i in range(len(records))]
        found = [a.log_prob for a in attribute(model, records, steps=2)]
        assert found == pytest.approx(expected, rel=tolerance)
        with torch.no_grad():
            copies = [t.values(t.inputs().expand(3, -1, -1)) for t in targets_of(ModelMap.of(model), records)]
        for values, value in zip(copies, expected, strict=True):
            assert values.tolist() == pytest.approx([value] * 3, rel=tolerance)


def test_the_head_sees_completion_positions_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama")
    model_map = ModelMap.of(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _x, y: rows.append(y.numel() // y.shape[-1]))
    record = TokenRecord("r", tuple(range(4, 24)), 17, 1)
    whole = attribute(model, [record], steps=4, model_map=model_map)[0]
    assert rows == [3, 4 * 3, 3, 19 * 3]  # both ends and the steps, 3 completion tokens each; 19 positions occluded
    rows.clear()
    monkeypatch.setattr(targets, "CHUNK_ELEMENTS", 96 * 5)
    chunked = attribute(model, [record], steps=4, model_map=model_map)[0]
    assert max(rows[3:]) == 5
    np.testing.assert_allclose(chunked.occlusion, whole.occlusion, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("baseline", "vary"), [("mean", "all"), (7, "prompt")])
def test_positions_equal_a_riemann_sum(arch: str, baseline: str | int, vary: str) -> None:
    model, record = eager(arch), texts(1)[0]
    start, x = ends(model, record, baseline, vary)
    steps = 2000
    alphas = ((torch.arange(steps, dtype=F64) + 0.5) / steps)[:, None, None]
    path = (start + alphas * (x - start)).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(model, record, path).sum(), path)
    expected = ((x - start) * gradient.mean(0, keepdim=True)).sum((0, 2))
    found = attribute(model, [record], baseline=baseline, inputs=vary, steps=100)[0]
    np.testing.assert_allclose(found.positions, expected.detach(), atol=2e-4 * float(expected.abs().max()), rtol=2e-4)
    assert found.baseline_log_prob == pytest.approx(log_prob(model, record, start).item(), rel=1e-6)
    assert found.n_prompt == record.n_prompt
    assert len(found.positions) == len(record.ids) - 1
    assert np.array_equal(found.prompt, found.positions[: record.n_prompt])
    if vary == "prompt":
        assert not found.positions[record.n_prompt :].any()
    for i in range(x.shape[1]):
        occluded = x.clone()
        occluded[:, i] = start[:, i]
        drop = (log_prob(model, record, x) - log_prob(model, record, occluded)).item()
        assert found.occlusion[i] == pytest.approx(drop, abs=2e-6)


def test_positions_equal_captums_layer_integrated_gradients() -> None:
    model, record = eager("gpt2"), texts(1)[0]

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, record.n_prompt - 1 :].log_softmax(-1)
        return logits.gather(-1, torch.tensor(record.completion).expand(len(ids), -1)[..., None]).sum((1, 2))

    ids = torch.tensor([record.ids[:-1]])
    oracle = LayerIntegratedGradients(forward, model.transformer.wte)
    theirs = oracle.attribute(ids, baselines=torch.full_like(ids, 5), n_steps=20).sum(-1)[0]
    found = attribute(model, [record], baseline=5, steps=20)[0]
    np.testing.assert_allclose(found.positions, theirs.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "phi3", "mixtral"])
def test_layers_equal_a_fine_path_integral(arch: str) -> None:
    # With every expert used for every token the routing never jumps.
    model = eager(arch, num_experts_per_tok=4) if arch == "mixtral" else eager(arch)
    for record in texts(2):
        start, x = ends(model, record, "mean")
        expected = conductances(model, lambda e, r=record: log_prob(model, r, e), start, x, part_outputs(model), 1500)
        found = layer_scores(attribute(model, [record], steps=200)[0])
        assert found.keys() == expected.keys()
        size = max(abs(float(v.sum())) for v in expected.values())
        for key, value in expected.items():
            assert found[key] == pytest.approx(float(value.sum()), abs=1e-3 * size), key


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_neurons_equal_a_fine_path_integral(arch: str) -> None:
    model, record = eager(arch), texts(1)[0]
    down = {
        p.module: model.get_submodule(p.module)
        for b in ModelMap.of(model).blocks
        for p in b.feed_forward
        if p.role == "down"
    }
    start, x = ends(model, record, "mean")
    expected = conductances(model, lambda e: log_prob(model, record, e), start, x, down, 1500, inputs=True)
    found = attribute(model, [record], steps=200, neurons=10**6)[0]
    scores = neuron_scores(found)
    assert len(scores) == sum(len(v) for v in expected.values())
    size = max(float(v.abs().max()) for v in expected.values())
    for name, values in expected.items():
        np.testing.assert_allclose([scores[name, i] for i in range(len(values))], values, atol=1e-3 * size)
    ordered = [s.score for s in found.neurons]
    assert ordered == sorted(ordered, reverse=True)
    assert attribute(model, [record], steps=200, neurons=5)[0].neurons == found.neurons[:5]


def test_captums_layer_conductance_approaches_layers_and_neurons() -> None:
    """Its rule is of first order, so twice the steps halve the difference."""
    model, record = eager("gpt2"), texts(1)[0]
    start, x = ends(model, record, 5)
    found = attribute(model, [record], baseline=5, steps=200, neurons=10**6)[0]
    block = model.transformer.h[1]
    scores = neuron_scores(found)
    down = torch.tensor([scores["transformer.h.1.mlp.c_proj", i] for i in range(128)])
    for module, at_input, ours in (
        (block.attn, False, torch.tensor([layer_scores(found)[1, "attention"]])),
        (block.mlp, False, torch.tensor([layer_scores(found)[1, "feed_forward"]])),
        (block.mlp.c_proj, True, down),
    ):
        oracle = LayerConductance(lambda e: log_prob(model, record, e), module)
        errors = []
        for steps in (60, 120):
            theirs = oracle.attribute(x, baselines=start, n_steps=steps, attribute_to_layer_input=at_input)
            theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).detach()
            theirs = theirs.sum((0, 1)) if at_input else theirs.sum().view(1)
            errors.append(float((theirs - ours).abs().max() / ours.abs().max()))
        assert errors[1] < 0.05
        assert 1.6 < errors[0] / errors[1] < 2.4


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
def test_neurons_of_routed_experts_equal_a_loop(arch: str) -> None:
    """The same steps, expert by expert and token by token; where the routing changes between steps nothing is added."""
    model, record = eager(arch), texts(1)[0]
    start, x = ends(model, record, "mean")
    steps, length = 12, x.shape[1]
    nodes = 0.5 * (1 + np.polynomial.legendre.leggauss(steps)[0])
    alphas = torch.tensor([0.0, *nodes, 1.0], dtype=F64)[:, None, None]
    module = model.model.layers[1].mlp.experts
    width = module.down_proj.shape[-1]
    values: dict[int, Tensor] = {}

    def loop(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(len(module.down_proj)):
            gate, up = (hidden @ module.gate_up_proj[e].T).chunk(2, dim=-1)
            values[e] = module.act_fn(gate) * up  # [S P, f], also where no token is routed
            values[e].retain_grad()
            share = (weights * (index == e)).sum(-1, keepdim=True)
            out = out + share * (values[e] @ module.down_proj[e].T)
        return out

    routes: list[Tensor] = []
    watch = module.register_forward_pre_hook(lambda _m, args: routes.append(args[1]))
    own, module.forward = module.forward, loop
    log_prob(model, record, (start + alphas * (x - start)).requires_grad_()).sum().backward()
    module.forward = own
    watch.remove()
    found = neuron_scores(attribute(model, [record], steps=steps, neurons=10**6)[0])
    changes = 0
    for e, tensor in values.items():
        routed = (routes[0] == e).any(-1).view(-1, length)  # [S, P]
        v, g = tensor.detach().view(-1, length, width), tensor.grad.view(-1, length, width)
        both = (routed[1:] & routed[:-1])[..., None]
        changes += int((routed[1:] != routed[:-1]).sum())
        expected = (both * (g[1:] + g[:-1]) * v.diff(dim=0)).sum((0, 1)) / 2
        name = f"model.layers.1.mlp.experts.down_proj.{e}"
        ours = [found.get((name, i), 0.0) for i in range(width)]
        np.testing.assert_allclose(ours, expected, atol=1e-6 * float(1e-3 + expected.abs().max()))
    assert changes  # or this test would not show what happens then


def test_an_expert_that_was_skipped_for_a_while_starts_anew() -> None:
    """Steps 0 and 2 reach the expert, step 1 does not: there is no pair, whether one step runs at a time or all."""
    model_map = ModelMap.of(eager("mixtral"))
    target = targets.targets_of(model_map, [TokenRecord("r", (5, 6, 7), 1, 1)])[0]  # two positions

    def flow(chunks: Sequence[Sequence[tuple[int, int, float]]]) -> Tensor:
        """Flow through one neuron with gradient 1, from (step, position, value) of every chunk."""
        path = attribution._Path(target, attribution._Watched({}, "", []))
        total, done = torch.zeros(1, dtype=F64), 0
        for chunk in chunks:
            path._chunk += 1
            path._steps = max((step for step, _, _ in chunk), default=done) - done + 1
            if chunk:
                places = torch.tensor([(step - done) * 2 + position for step, position, _ in chunk])
                values = torch.tensor([[value] for _, _, value in chunk], dtype=F64)
                total += path._routed(("neurons", "e", "e"), places, values, torch.ones_like(values))
            done += path._steps
        return total

    first, last, other = (0, 1, 1.0), (2, 1, 5.0), (1, 1, 2.0)
    assert flow([[first, last]]) == flow([[first], [], [last]]) == 0
    assert flow([[first, other, last]]) == flow([[first], [other], [last]]) == flow([[first, other], [last]]) == 4
    assert flow([[first, (1, 0, 9.0), last]]) == 0  # another position is no successor


@pytest.mark.parametrize("arch", ["vit", "swin", "dinov2"])
def test_image_scores_equal_a_fine_path_integral(arch: str) -> None:
    model = image_classifier(arch, dtype=F64, attn_implementation="eager")
    record = images(1)[0]
    x = record.pixels[None]
    found = attribute(model, [record], baseline="zero", steps=80)[0]
    side = IMAGE // (2 if arch == "swin" else 8)
    assert found.grid == (IMAGE // (2 if arch == "swin" else 8),) * 2
    assert (found.n_tokens, found.n_prompt) == (1, side * side)

    def function(pixels: Tensor) -> Tensor:
        return model(pixels).logits.log_softmax(-1)[:, record.label]

    alphas = ((torch.arange(400, dtype=F64) + 0.5) / 400)[:, None, None, None]
    path = (alphas * x).requires_grad_()
    (gradient,) = torch.autograd.grad(function(path).sum(), path)
    pixels = (x * gradient.mean(0, keepdim=True))[0].sum(0)  # [H, W]
    step = IMAGE // side
    expected = torch.stack(
        [pixels[i : i + step, j : j + step].sum() for i in range(0, IMAGE, step) for j in range(0, IMAGE, step)]
    )
    np.testing.assert_allclose(found.positions, expected.detach(), atol=1e-4 * float(expected.abs().max()))
    if arch == "vit":
        layers = {
            (i, p): getattr(b, n)
            for i, b in enumerate(model.vit.layers)
            for p, n in (("attention", "attention"), ("feed_forward", "mlp"))
        }
        oracle = conductances(model, function, torch.zeros_like(x), x, layers, 400)
        for key, value in oracle.items():
            assert layer_scores(found)[key] == pytest.approx(float(value.sum()), abs=1e-4)


# -------------------------------------------------------------------------------------------------- completeness, gaps


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "gemma2", "phi3"])
def test_scores_are_complete_up_to_the_stated_gaps(arch: str) -> None:
    model, records = eager(arch), texts(2)
    coarse, fine = (attribute(model, records, steps=steps) for steps in (6, 48))
    for a, b in zip(coarse, fine, strict=True):
        for found in (a, b):
            change = found.log_prob - found.baseline_log_prob
            assert found.positions.sum() - change == pytest.approx(found.completeness_gap, abs=1e-12)
            assert found.relative_gap == pytest.approx(
                max(abs(found.completeness_gap), abs(found.layer_gap)) / abs(change)
            )
        assert abs(b.completeness_gap) < max(2e-3, 0.5 * abs(a.completeness_gap))
        assert abs(b.layer_gap) < max(0.2 * abs(a.layer_gap), 0.01 * abs(b.log_prob - b.baseline_log_prob))
        assert b.relative_gap < 0.05


def test_the_layer_gap_falls_with_the_square_of_the_steps() -> None:
    model, records = eager("gpt2"), texts(1)
    gaps = [attribute(model, records, steps=steps)[0].layer_gap for steps in (10, 20, 40, 80)]
    for a, b in pairwise(gaps):
        assert 2.5 < a / b < 5.5


def test_a_baseline_equal_to_the_input_explains_nothing() -> None:
    model = eager("gpt2")
    found = attribute(model, [TokenRecord("r", (9, 9, 9, 9, 20), 3, 1)], baseline=9, steps=3)[0]
    assert found.positions.tolist() == [0.0] * 4
    assert all(s.score == 0 for s in found.layers)
    assert found.relative_gap == math.inf


def test_zero_baselines_are_rough_for_rms_norms_and_the_gap_says_so() -> None:
    record = texts(1)
    assert attribute(eager("llama"), record, baseline="zero", steps=32)[0].relative_gap > 0.5
    assert attribute(eager("llama"), record, baseline="mean", steps=32)[0].relative_gap < 0.05


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "qwen2_moe"])
def test_steps_at_once_change_nothing(arch: str) -> None:
    """Pairs of steps reach over the seam between two chunks, those of experts too."""
    model, records = eager(arch), texts(2)
    whole = attribute(model, records, steps=9, neurons=400)
    for batch_tokens in (1, 25):
        for a, b in zip(whole, attribute(model, records, steps=9, neurons=400, batch_tokens=batch_tokens), strict=True):
            np.testing.assert_allclose(a.positions, b.positions, rtol=1e-6, atol=1e-9)
            assert [s.score for s in a.layers] == pytest.approx([s.score for s in b.layers], rel=1e-6, abs=1e-9)
            ours, theirs = neuron_scores(a), neuron_scores(b)
            assert {key: ours[key] for key in ours} == pytest.approx(
                {key: theirs[key] for key in ours}, rel=1e-5, abs=1e-8
            )
            assert a.layer_gap == pytest.approx(b.layer_gap, rel=1e-5, abs=1e-8)


def test_single_precision_is_close_and_repeats_to_the_bit() -> None:
    records = texts(2)
    exact = attribute(eager("llama"), records, steps=16)
    first, second = (attribute(causal_lm("llama"), records, steps=16) for _ in range(2))
    for a, b, c in zip(first, second, exact, strict=True):
        assert np.array_equal(a.positions, b.positions)
        assert (a.layers, a.neurons) == (b.layers, b.neurons)
        np.testing.assert_allclose(a.positions, c.positions, atol=1e-3)
        assert [s.score for s in a.layers] == pytest.approx([s.score for s in c.layers], abs=1e-3)


# --------------------------------------------------------------------------------------------------- known answers


KEY, ANSWER = 50, 70


def planted() -> tuple[nn.Module, list[int]]:
    """A GPT-2 in which nothing but three neurons of block 1 turns the token KEY into the token ANSWER."""
    model = eager("gpt2", n_inner=64)
    neurons = [5, 33, 60]
    with torch.no_grad(), seeded(3):
        for block in model.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight.zero_()
                module.bias.zero_()
        block = model.transformer.h[1]
        key, answer = model.transformer.wte.weight[KEY], model.transformer.wte.weight[ANSWER]
        for neuron in neurons:
            block.mlp.c_fc.weight[:, neuron] = key / key.norm()  # [in, out]
            block.mlp.c_fc.bias[neuron] = -0.5
            block.mlp.c_proj.weight[neuron] = 3 * answer / answer.norm()
    return model, neurons


def test_planted_neurons_layer_and_position_are_found() -> None:
    model, neurons = planted()
    record = TokenRecord("r", (11, 12, 13, KEY, ANSWER), 4, 1)
    found = attribute(model, [record], baseline=20, steps=64, neurons=200)[0]
    assert found.log_prob - found.baseline_log_prob > 1
    change = found.log_prob - found.baseline_log_prob
    assert found.positions[:3].tolist() == pytest.approx([0, 0, 0], abs=1e-12)  # attention is off: they cannot matter
    assert found.positions[3] == pytest.approx(change, rel=1e-3)
    scores = layer_scores(found)
    assert {key for key, value in scores.items() if value} == {(1, "feed_forward")}
    assert scores[1, "feed_forward"] > 0.5 * change
    assert {(s.block, s.neuron) for s in found.neurons[:3]} == {(1, n) for n in neurons}
    assert all(s.score == 0 for s in found.neurons[3:])


def test_a_trained_model_points_to_the_token_that_decides() -> None:
    """Noise, a key somewhere in it, and a completion that the key alone decides.

    Occlusion finds the key every time. Integrated gradients, complete as they are, do not: along the path every token
    is a mixture that the model has never seen.
    """
    keys, noise, length, separator = range(10, 16), range(40, 90), 5, 5
    generator = torch.Generator().manual_seed(0)

    def draw(options: Sequence[int]) -> int:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def row(key: int) -> tuple[list[int], int]:
        prompt = [draw(noise) for _ in range(length)]
        place = draw(range(length))
        prompt[place] = key
        return [*prompt, separator, key + 10, key + 16], place

    model = causal_lm("llama", num_hidden_layers=2)
    train(model, [row(key)[0] for key in keys for _ in range(40)], steps=120, lr=1e-2)
    rows = [row(key) for key in keys for _ in range(2)]
    records = [TokenRecord(f"r{i}", tuple(ids), length + 1, 1) for i, (ids, _) in enumerate(rows)]
    found = attribute(model, records, inputs="prompt")
    assert min(a.log_prob for a in found) > -0.7  # learned
    assert [int(a.occlusion[:length].argmax()) for a in found] == [place for _, place in rows]
    assert sum(int(a.prompt[:length].argmax()) == place for a, (_, place) in zip(found, rows, strict=True)) >= 8
    assert max(a.relative_gap for a in found) < 0.05


def test_a_part_that_writes_nothing_scores_zero() -> None:
    model = eager("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = layer_scores(attribute(model, texts(1), steps=8)[0])
    assert {key for key, value in scores.items() if value == 0} == {(1, "attention"), (2, "feed_forward")}


def test_only_the_patch_that_differs_from_the_baseline_scores() -> None:
    pixels = torch.zeros(3, IMAGE, IMAGE, dtype=F64)
    pixels[:, 8:16, 16:24] = 2.0
    model = image_classifier("vit", dtype=F64)
    found = attribute(model, [ImageRecord("i", pixels, 1)], baseline="zero", steps=16)[0]
    assert np.flatnonzero(found.positions).tolist() == [1 * 4 + 2]
    assert found.positions.sum() == pytest.approx(found.log_prob - found.baseline_log_prob, rel=1e-6)
    assert found.occlusion[6] == pytest.approx(found.log_prob - found.baseline_log_prob, rel=1e-9)
    assert np.abs(np.delete(found.occlusion, 6)).max() < 1e-12
    plain = ImageRecord("i", torch.full((3, IMAGE, IMAGE), 0.7, dtype=F64), 1)
    own = attribute(model, [plain], baseline="mean", steps=4)[0]  # its mean colour is itself
    assert max(np.abs(own.positions).max(), np.abs(own.occlusion).max()) < 1e-12


# ---------------------------------------------------------------------------------------------------------------- heat


def attribution_with(scores: Sequence[float]) -> Attribution:
    layers = tuple(ModuleScore(i // 2, ("attention", "feed_forward")[i % 2], s) for i, s in enumerate(scores))
    return Attribution("r", 1, 1, -1.0, -2.0, np.zeros(1), np.zeros(1), None, layers, (), 0.0, 0.0, 8)


def test_heat_is_the_mean_absolute_share() -> None:
    found = heat([attribution_with([3.0, -1.0]), attribution_with([0.0, -500.0]), attribution_with([0.0, 0.0])])
    assert [(s.block, s.module) for s in found] == [(0, "attention"), (0, "feed_forward")]
    assert [s.score for s in found] == pytest.approx([(0.75 + 0 + 0) / 3, (0.25 + 1 + 0) / 3])
    assert [(s.control, s.contrast) for s in found] == [(None, None)] * 2
    against = heat([attribution_with([3.0, -1.0])], [attribution_with([1.0, 1.0]), attribution_with([0.0, 1.0])])
    assert [s.control for s in against] == [0.25, 0.75]
    assert [s.contrast for s in against] == [0.5, -0.5]
    for wrong in ([], [attribution_with([1.0, 2.0]), attribution_with([1.0, 2.0, 3.0, 4.0])]):
        with pytest.raises(UsageError, match="of one model"):
            heat(wrong)
    with pytest.raises(UsageError, match="2 sets"):
        heat([attribution_with([1.0, 2.0])], [attribution_with([1.0, 2.0, 3.0, 4.0])])


# ------------------------------------------------------------------------------------------------- limits and manners


@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt2"])
def test_the_model_is_left_as_found(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(arch).train()
    some = next(model.parameters())
    some.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    implementation = model.config._experts_implementation

    def check() -> None:
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [p is last for p in model.parameters() if p.grad is not None] == [True]
        assert torch.equal(last.grad, torch.ones_like(last))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        assert model.config._experts_implementation == implementation

    done: list[tuple[int, int]] = []
    attribute(model, texts(2), steps=3, progress=lambda a, b: done.append((a, b)))
    assert done == [(1, 2), (2, 2)]
    check()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attribution, "_trapezoid", fail)  # inside the backward pass
    with pytest.raises(ResourceError, match="one step of a record of"):
        attribute(model, texts(1), steps=3)
    check()


def test_fewer_steps_run_at_once_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = eager("gpt2"), texts(2)
    expected = attribute(model, records, steps=8)
    widths: list[int] = []
    original = attribution._Path.total

    def total(path: Any, inputs: Tensor) -> Tensor:
        widths.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(path, inputs)

    monkeypatch.setattr(attribution._Path, "total", total)
    done: list[tuple[int, int]] = []
    found = attribute(model, records, steps=8, progress=lambda a, b: done.append((a, b)))
    assert done == [(1, 2), (2, 2)]
    assert max(widths) == 8
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, rtol=1e-9, atol=1e-12)
        assert [s.score for s in a.layers] == pytest.approx([s.score for s in b.layers])


def test_captum_and_matplotlib_are_imported_inside_functions_only() -> None:
    """Together they take a second, which nobody who does not attribute should wait."""
    for path in Path(attribution.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] in ("captum", "matplotlib") for name in names), path


def test_results_show_neither_text_nor_token_ids() -> None:
    record = TokenRecord("r", (81, 82, 83, 84, 85), 2, 1)
    model = causal_lm("llama")
    shown = repr(attribute(model, [record], steps=2)[0]) + repr(targets_of(ModelMap.of(model), [record])[0])
    assert not any(str(token) in shown.split("log_prob")[0] for token in record.ids)
    assert "positions" not in shown


class Odd(nn.Module):
    """A feed-forward part that runs its down projection twice."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.mlp(2 * x)


def test_what_cannot_be_attributed_is_refused() -> None:
    model, records = causal_lm("llama"), texts(1)
    with pytest.raises(UnsupportedError, match="patches, found ResNet"):
        attribute(image_classifier("resnet"), images(1))
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        attribute(model, [TokenRecord("r", (5, 6, 200), 1, 1)])
    with pytest.raises(UnsupportedError, match="labels below 4"):
        attribute(image_classifier("vit"), [ImageRecord("i", torch.zeros(3, IMAGE, IMAGE), 4)])
    with pytest.raises(UsageError, match="expected records for LlamaForCausalLM, found images"):
        attribute(model, images(1))
    with pytest.raises(UsageError, match="token id below 96, found 96"):
        attribute(model, records, baseline=96)
    with pytest.raises(UsageError, match="mean or zero for images, found 3"):
        attribute(image_classifier("vit"), images(1), baseline=3)
    with pytest.raises(UsageError, match="no prompt"):
        attribute(image_classifier("vit"), images(1), inputs="prompt")
    with pytest.raises(UsageError, match="inputs all or prompt, found both"):
        attribute(model, records, inputs="both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one record"):
        attribute(model, [])
    for wrong in ({"steps": 0}, {"neurons": 0}, {"batch_tokens": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            attribute(model, records, **wrong)
    twice = causal_lm("llama")
    twice.model.layers[1].mlp = Odd(twice.model.layers[1].mlp)
    with pytest.raises(UnsupportedError, match="once a pass"):
        attribute(twice, records, steps=2)


@pytest.mark.parametrize("arch", ["opt", "gpt_neox", "olmo2", "qwen3_moe"])
def test_other_families_work(arch: str) -> None:
    """OPT has no feed-forward module: its down projection stands in."""
    extra = {
        "ffn_dim": 48,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = eager(arch, **(extra if arch == "opt" else {}))
    found = attribute(model, texts(1), steps=48)[0]
    assert len(found.layers) == 2 * len(ModelMap.of(model).blocks)
    assert all(s.score for s in found.layers)
    if "moe" not in arch:
        assert found.relative_gap < 0.05
    assert isinstance(found.neurons[0], NeuronScore)
