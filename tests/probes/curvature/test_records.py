"""Per-record curvature figures against dense gradients and Hessians of one record at a time, and the score on models
with a known truth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from probes.curvature import records as module
from probes.curvature.factors import KroneckerFactors, kronecker_factors
from probes.curvature.kronecker import Basis, Eigenbases, Kept, keep_pairs
from probes.curvature.records import SCORED, memorisation_scores, record_curvature
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.taps import sites
from tests.probes.curvature.test_taps import classifier, exact, heard
from tests.probes.test_fisher import Convolutions, Perceptron, images, per_sample, plain, texts
from tests.tiny import causal_lm, image_classifier, roughen, seeded

F64 = torch.float64
Records = list[TokenRecord] | list[ImageRecord]
Setting = tuple[dict[str, Basis], dict[str, Kept | Tensor], KroneckerFactors]


def setting(
    model: nn.Module, data: Records, modules: Sequence[str] | None = None, rho: float = 0.6, **k: Any
) -> Setting:
    """Bases, kept pairs and factors, from ordinary data."""
    factors = kronecker_factors(model, data, modules=modules, halves=False, **k)
    decompose = Eigenbases()
    bases = {key: decompose(factor) for key, factor in factors.factors.items()}
    kept: dict[str, Kept | Tensor] = {
        key: keep_pairs(b.lam, b.mu, rho) if b.lam[0] * b.mu[0] > 0 else torch.ones(len(b.lam), len(b.mu)) > 0
        for key, b in bases.items()
    }
    return bases, kept, factors


def mask_of(kept: Kept | Tensor) -> Tensor:
    return kept.mask() if isinstance(kept, Kept) else kept


def auc(over: Any, under: Any) -> float:
    a, b = np.asarray(over)[:, None], np.asarray(under)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


class Smooth(nn.Module):
    """Two linear layers with a tanh between them: second derivatives everywhere."""

    def __init__(self, width: int = 12, classes: int = 4, hidden: int = 7) -> None:
        super().__init__()
        self.one = nn.Linear(width, hidden)
        self.two = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(self.one(pixels.flatten(1)).tanh())


def pictures(n: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = F64) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, *shape, generator=generator, dtype=dtype)
    return [ImageRecord(f"p{i}", pixels[i], i % 4) for i in range(n)]


# ----------------------------------------------------------------------------------------------------------- low energy

LANGUAGE = ("gpt2", "llama", "qwen2", "gemma2", "phi3", "gpt_neox", "mixtral", "qwen3_moe")
VISION: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: classifier("vit"),
    "swin": lambda: classifier("swin"),
    "resnet": lambda: classifier("resnet"),
    "perceptron": lambda: plain(Perceptron),
    "convolutions": lambda: plain(Convolutions),
}


@pytest.mark.parametrize("arch", [*LANGUAGE, *VISION])
def test_low_energy_is_that_of_the_dense_gradient(arch: str) -> None:
    """One record at a time, the whole weight gradient by torch.func, rotated as a matrix."""
    data: Records
    records: Records
    if arch in LANGUAGE:
        model, records, data = exact(arch), texts(5), texts(40, seed=1)
        tolerance = 1e-9 if arch == "gpt2" else 1e-4  # rotations and RMSNorm are fp32 whatever the model's type
    else:
        model, tolerance = VISION[arch](), 1e-6  # attention's softmax is fp32 whatever the model's type
        some = (lambda n, seed: pictures(n, (3, 2, 2), seed)) if arch == "perceptron" else images
        records, data = some(5, 0), some(30, 1)
    modules = ["one", "two"] if arch == "perceptron" else ["*"]
    bases, kept, factors = setting(model, data, modules)
    found = record_curvature(model, records, bases, kept, factors, draws=0, by_map=True, batch_tokens=27)
    chosen = {site.key: site for site in sites(ModelMap.of(model), modules)}
    assert set(chosen) == set(bases)
    names = {site.projection.parameter for site in chosen.values()}
    for row, gradient in enumerate(per_sample(model, records, sorted(names))):
        low = whole = 0.0
        for key, site in chosen.items():
            weight = gradient[site.projection.parameter]
            weight = weight if site.expert is None else weight[site.expert]
            weight = weight.T if site.projection.orientation == "in_out" else weight.flatten(1)
            c = (bases[key].u_g.T @ weight @ bases[key].u_a).square()
            dropped = float(c[~mask_of(kept[key])].sum())
            total = float(c.sum())
            low, whole = low + dropped, whole + total
            share = dropped / total if total else 0.0
            assert found[f"low_energy[{key}]"][row] == pytest.approx(share, rel=tolerance, abs=tolerance)
        assert found.low_energy[row] == pytest.approx(low / whole, rel=tolerance)
    assert list(found.record_id) == [record.record_id for record in records]
    assert found.low_energy.between(0.0, 1.0).all()
    assert found.low_energy.nunique() == len(records)


@pytest.mark.parametrize(("arch", "positions"), [("gpt2", "predicting"), ("vit", "first")])
def test_the_gradient_is_of_the_positions_of_the_factors(arch: str, positions: str) -> None:
    text = arch == "gpt2"
    model: nn.Module = exact(arch) if text else classifier(arch)
    records: Records = texts(4) if text else images(4)
    keys = ["transformer.h.0.mlp.c_fc"] if text else ["vit.layers.0.mlp.fc1"]
    bases, kept, factors = setting(model, texts(40, 1) if text else images(40, 1), keys, positions=positions)
    found = record_curvature(model, records, bases, kept, factors, draws=0)
    for row, record in enumerate(records):
        x, g, _ = heard(model, [record], keys, positions=positions)[keys[0]]  # type: ignore[list-item]
        c = ((g @ bases[keys[0]].u_g).T @ (x @ bases[keys[0]].u_a)).square()
        share = float(c[~mask_of(kept[keys[0]])].sum() / c.sum())
        assert found.low_energy[row] == pytest.approx(share, rel=1e-9)


def test_what_is_kept_decides_the_share() -> None:
    model, records = exact("gpt2"), texts(6)
    bases, kept, factors = setting(model, texts(40, 1), rho=0.5)
    kept["transformer.h.0.mlp.c_fc"] = torch.rand(128, 32, generator=torch.Generator().manual_seed(0)) < 0.3

    def share(of: Callable[[Tensor], Tensor]) -> np.ndarray:
        chosen = {key: of(mask_of(some)) for key, some in kept.items()}
        return record_curvature(model, records, bases, chosen, factors, draws=0).low_energy.to_numpy()

    everything = {key: keep_pairs(basis.lam, basis.mu, 1.0) for key, basis in bases.items()}
    assert (record_curvature(model, records, bases, everything, factors, draws=0).low_energy == 0.0).all()
    assert (share(torch.ones_like) == 0.0).all()
    assert (share(torch.zeros_like) == 1.0).all()
    np.testing.assert_allclose(share(lambda m: m) + share(lambda m: ~m), 1.0, rtol=1e-12)


# --------------------------------------------------------------------------------------------------- activation ratio


@pytest.mark.parametrize("arch", ["llama", "convolutions"])
def test_activation_ratio_by_hand(arch: str) -> None:
    """Loops over records, rows and eigenvectors; an input counts once, however many maps read it or rows it has."""
    records: Records
    if arch == "llama":
        model, records, data = exact(arch), texts(4), texts(60, seed=1)
        readers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # one for each input
        modules, distinct = None, [f"model.layers.{i}.{name}" for i in range(3) for name in readers]
    else:
        model, records, data = plain(Convolutions), images(3), images(20, 1)
        modules = distinct = ["body.0", "body.3", "out"]
    bases, kept, factors = setting(model, data, modules)
    found = record_curvature(model, records, bases, kept, factors, draws=0, batch_tokens=20)
    for row, record in enumerate(records):
        rows = heard(model, [record], modules)  # type: ignore[list-item]
        bottom = top = 0.0
        for key in distinct:
            x, basis = rows[key][0], bases[key]
            q = len(basis.mu)
            energy = [float((x @ basis.u_a[:, j]).square().mean()) for j in range(q)]
            low, high = range(q - q // 2, q), range(math.ceil(q / 10))
            bottom += sum(energy[j] for j in low) / sum(float(basis.mu[j]) for j in low)
            top += sum(energy[j] for j in high) / sum(float(basis.mu[j]) for j in high)
        assert found.activation_ratio[row] == pytest.approx(bottom / top, rel=1e-4)


def test_activations_of_the_data_themselves_have_ratio_one() -> None:
    """Records of one length, so that their mean is the mean over positions; both bands of one map."""
    model = exact("gpt2")
    data = [TokenRecord(f"{i}", tuple(r.ids[:4]), 1, 1) for i, r in enumerate(texts(80, seed=2))]
    bases, kept, factors = setting(model, data, ["transformer.h.1.mlp.c_fc"])
    (basis,) = bases.values()
    x = heard(model, data, ["transformer.h.1.mlp.c_fc"])["transformer.h.1.mlp.c_fc"][0] @ basis.u_a
    energy = x.square().view(80, 3, -1).mean(1)  # [records, q]
    bottom, top = energy[:, 16:].sum(1) / basis.mu[16:].sum(), energy[:, :4].sum(1) / basis.mu[:4].sum()
    assert float(bottom.mean()) == pytest.approx(1.0)
    assert float(top.mean()) == pytest.approx(1.0)
    found = record_curvature(model, data, bases, kept, factors, draws=0)
    np.testing.assert_allclose(found.activation_ratio, (bottom / top).numpy(), rtol=1e-9)


def test_directions_the_data_never_took_are_left_out() -> None:
    """Fewer positions than dimensions: what lies below rounding has no average to divide by."""
    model = plain(Perceptron).float()
    data = pictures(6, (3, 2, 2), seed=1, dtype=torch.float32)
    bases, kept, factors = setting(model, data, ["one"])
    records = pictures(5, (3, 2, 2), dtype=torch.float32)
    found = record_curvature(model, records, bases, kept, factors, draws=0)
    assert found.activation_ratio.max() < 100  # with all 12 directions: about 1e6
    (bands,) = (module._bands(basis.mu, torch.float32) for basis in bases.values())
    assert [band for band, _ in bands] == [slice(3, 6), slice(0, 1)]
    assert module._bands(torch.zeros(4, dtype=F64), torch.float32) == []


# ------------------------------------------------------------------------------------------------------ input curvature


def hessian(model: nn.Module, record: TokenRecord | ImageRecord) -> tuple[Tensor, float]:
    """Dense second derivative of the mean loss by the record's inputs [n, n], and the loss."""
    if isinstance(record, ImageRecord):
        start, label = record.pixels, torch.tensor([record.label])

        def loss(inputs: Tensor) -> Tensor:
            out = model(inputs[None])
            return functional.cross_entropy(out if isinstance(out, Tensor) else out.logits, label)
    else:
        start = model.get_input_embeddings()(torch.tensor([record.ids]))[0].detach()
        labels = torch.tensor(record.completion)

        def loss(inputs: Tensor) -> Tensor:
            logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0, record.n_prompt - 1 : -1]
            return functional.cross_entropy(logits, labels)

    found = torch.autograd.functional.hessian(loss, start)
    return found.reshape(start.numel(), -1), float(loss(start).detach())


def small(arch: str) -> nn.Module:
    """A model narrow enough for a dense Hessian."""
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2} if arch == "gpt2" else {
        "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "num_hidden_layers": 2,
    }  # fmt: skip
    model = causal_lm(arch, dtype=F64, vocab=40, attn_implementation="eager", **shape)
    model.config._experts_implementation = "eager"
    return model


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "mixtral", "smooth", "vit"])
def test_each_draw_is_the_quadratic_form_of_the_dense_hessian(arch: str) -> None:
    records: Records
    if arch in ("smooth", "vit"):
        with seeded(0):
            model = Smooth().to(F64) if arch == "smooth" else classifier("vit")
        records = pictures(3, (3, 2, 2)) if arch == "smooth" else images(1)
        data: Records = pictures(20, (3, 2, 2), 1) if arch == "smooth" else images(8, 1)
    else:
        model, records, data = small(arch), texts(3, vocab=40), texts(20, seed=1, vocab=40)
    tolerance = 1e-9 if arch in ("gpt2", "smooth") else 1e-3  # RMSNorm is fp32 whatever the model's type
    modules = ["one"] if arch == "smooth" else None
    found = record_curvature(model, records, *setting(model, data, modules), draws=3, seed=5, batch_tokens=30)
    for row, record in enumerate(records):
        if arch == "vit":  # 3072 pixels: products by the dense matrix's definition instead
            trace, loss = by_products(model, record, f"5|0|{record.record_id}")
        else:
            dense, loss = hessian(model, record)
            shape = (len(record.ids), 8) if isinstance(record, TokenRecord) else (3, 2, 2)
            signs = [module._signs(f"5|0|{record.record_id}", d, shape).flatten().double() for d in range(3)]
            trace = [float(v @ dense @ v) for v in signs]
        assert found.input_curvature[row] == pytest.approx(np.mean(trace), rel=tolerance)
        assert found.relative_curvature[row] == pytest.approx(np.mean(trace) / loss, rel=tolerance)
        error = np.std(trace, ddof=1) / math.sqrt(3)
        assert found.input_curvature_error[row] == pytest.approx(error, rel=10 * tolerance)


def by_products(model: nn.Module, record: Any, key: str) -> tuple[list[float], float]:
    found = []
    for draw in range(3):
        v = module._signs(key, draw, record.pixels.shape).to(F64)

        def along(t: Tensor, v: Tensor = v) -> Tensor:
            logits = model((record.pixels + t * v)[None]).logits
            return functional.cross_entropy(logits, torch.tensor([record.label]))

        found.append(float(torch.autograd.functional.hessian(along, torch.zeros((), dtype=F64))))
    return found, float(along(torch.zeros((), dtype=F64)).detach())


def test_all_sign_vectors_give_the_trace_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model = Smooth(width=4).to(F64)
    records, data = pictures(3, (1, 2, 2)), pictures(20, (1, 2, 2), 1)
    vectors = list(itertools.product((-1, 1), repeat=4))
    monkeypatch.setattr(module, "_signs", lambda key, draw, shape: torch.tensor(vectors[draw]).view(*shape))
    found = record_curvature(model, records, *setting(model, data, ["one"]), draws=16)
    for row, record in enumerate(records):
        dense, loss = hessian(model, record)
        assert found.input_curvature[row] == pytest.approx(float(dense.trace()), rel=1e-12)
        assert found.relative_curvature[row] == pytest.approx(float(dense.trace()) / loss, rel=1e-12)


def test_many_draws_converge_within_their_error() -> None:
    with seeded(0):
        model = Smooth().to(F64)
    records, data = pictures(4, (3, 2, 2)), pictures(20, (3, 2, 2), 1)
    found = record_curvature(model, records, *setting(model, data, ["one"]), draws=600)
    few = record_curvature(model, records, *setting(model, data, ["one"]), draws=6)
    assert (found.input_curvature_error < few.input_curvature_error).all()
    for row, record in enumerate(records):
        distance = abs(found.input_curvature[row] - float(hessian(model, record)[0].trace()))
        assert distance < 4 * found.input_curvature_error[row]


@pytest.mark.parametrize("arch", ["llama", "mixtral", "vit"])
def test_fused_kernels_give_way(arch: str) -> None:
    """In fp32 with the kernels a model has by default, which have no second derivative; like float64 without them."""
    text = arch != "vit"
    model: nn.Module = exact(arch) if text else classifier(arch)
    records: Records = texts(3) if text else images(2)
    data: Records = texts(30, 1) if text else images(9, 1)
    expected = record_curvature(model, records, *setting(model, data))
    usual = causal_lm(arch) if text else image_classifier(arch)
    seen = set()
    if text:
        assert usual.config._attn_implementation == "sdpa"
        layer = usual.model.layers[0]
        layer.register_forward_hook(lambda *_: seen.add(usual.config._experts_implementation_internal))
    else:
        records, data = ([ImageRecord(r.record_id, r.pixels.float(), r.label) for r in p] for p in (records, data))
    parts, model_map = setting(usual, data), ModelMap.of(usual)
    seen.clear()
    found = record_curvature(usual, records, *parts, model_map=model_map)
    columns = ["record_id", "low_energy", "input_curvature", "relative_curvature"]
    same(found[columns], expected[columns], 1e-2)
    assert seen == {"eager"} or arch != "mixtral"


# ------------------------------------------------------------------------------------------- batches, order, identity


@pytest.mark.parametrize("arch", ["llama", "mixtral", "convolutions"])
def test_figures_depend_on_the_record_alone(arch: str) -> None:
    model: nn.Module = plain(Convolutions) if arch == "convolutions" else exact(arch)
    records: Records = images(5) if arch == "convolutions" else texts(5)
    parts = setting(model, images(20, 1) if arch == "convolutions" else texts(30, 1))
    together = record_curvature(model, records, *parts)
    order = [3, 0, 4, 1, 2]
    shuffled = record_curvature(model, [records[i] for i in order], *parts, batch_tokens=1)  # type: ignore[arg-type]
    same(shuffled, together.iloc[order])
    same(record_curvature(model, records[2:3], *parts), together[2:3])
    assert record_curvature(model, records, *parts).equals(together)  # the same bytes
    other = record_curvature(model, records, *parts, seed=1)
    assert (other.low_energy == together.low_energy).all()
    assert (other.input_curvature != together.input_curvature).all()


def same(found: pd.DataFrame, expected: pd.DataFrame, tolerance: float = 1e-5) -> None:
    assert list(found.columns) == list(expected.columns)
    assert list(found.record_id) == list(expected.record_id)
    for name in found.columns.drop("record_id"):
        scale = float(expected[name].abs().max())
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance * scale)


def test_records_that_share_an_identifier_draw_independently() -> None:
    model, (record, *_) = exact("gpt2"), texts(1)
    parts = setting(model, texts(30, 1))
    twice = record_curvature(model, [record, record], *parts)
    alone = record_curvature(model, [record], *parts)
    assert twice.input_curvature[0] == pytest.approx(alone.input_curvature[0])
    assert twice.input_curvature[1] != pytest.approx(alone.input_curvature[0])
    assert twice.low_energy[1] == pytest.approx(alone.low_energy[0])


def test_pieces_change_nothing_and_bound_what_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = exact("gpt2"), texts(6)
    parts = setting(model, texts(30, 1))
    whole = record_curvature(model, records, *parts)
    products, multiply = [], torch.bmm

    def counted(a: Tensor, b: Tensor) -> Tensor:
        products.append(len(a) * a.shape[1] * b.shape[2])
        return multiply(a, b)

    monkeypatch.setattr(torch, "bmm", counted)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 5000)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 200)
    same(record_curvature(model, records, *parts), whole, 1e-9)
    assert max(products) <= 5000


def test_two_forward_passes_and_one_without_curvature() -> None:
    model, records = exact("llama"), texts(6)
    parts, calls = setting(model, texts(30, 1)), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model_map = ModelMap.of(model)
    calls.clear()
    record_curvature(model, records, *parts, draws=7, model_map=model_map)
    assert len(calls) == 2
    record_curvature(model, records, *parts, draws=0, model_map=model_map)
    assert len(calls) == 3


def test_progress_covers_both_passes() -> None:
    model, records, seen = exact("gpt2"), texts(4), []
    record_curvature(
        model, records, *setting(model, texts(30, 1)), batch_tokens=20, progress=lambda done, n: seen.append((done, n))
    )
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("arch", ["mixtral", "vit"])
def test_the_model_is_left_as_found(arch: str) -> None:
    text = arch == "mixtral"
    model: nn.Module = exact(arch) if text else classifier(arch)
    records: Records = texts(3) if text else images(3)
    parts = setting(model, texts(30, 1) if text else images(9, 1))
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    gradient = torch.ones_like(list(model.parameters())[1])
    list(model.parameters())[1].grad = gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    implementation, state = getattr(model.config, "_experts_implementation", None), torch.get_rng_state()
    record_curvature(model, records, *parts, draws=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert [p.grad is not None for p in model.parameters()] == [i == 1 for i, _ in enumerate(model.parameters())]
    assert list(model.parameters())[1].grad is gradient
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert getattr(model.config, "_experts_implementation", None) == implementation
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- small losses


def test_fitted_records_are_not_lost_to_rounding() -> None:
    """Losses below 1e-8 in fp32, where 1 - p rounds to 0: the figures are still those of float64."""
    double = plain(Perceptron)
    with torch.no_grad():
        double.two.weight.mul_(60)
        double.two.bias.mul_(60)
        pixels = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
        logits = double(pixels)
    records = [ImageRecord(f"{i}", p, int(z.argmax())) for i, (p, z) in enumerate(zip(pixels, logits, strict=True))]
    losses = [float(functional.cross_entropy(z[None], z.argmax()[None])) for z in logits]
    records = [record for record, loss in zip(records, losses, strict=True) if 1e-15 < loss < 1e-8]
    assert len(records) >= 3
    data = pictures(30, (3, 2, 2), 1)
    parts = setting(double, data, ["one", "two"])
    expected = record_curvature(double, records, *parts)
    single = plain(Perceptron).float()
    single.load_state_dict({name: value.float() for name, value in double.state_dict().items()})
    rounded = [ImageRecord(r.record_id, r.pixels.float(), r.label) for r in records]
    same(record_curvature(single, rounded, *parts), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan_for_a_loss_of_zero_or_one_token(dtype: torch.dtype) -> None:
    model = plain(Perceptron).to(dtype)
    with torch.no_grad():
        model.two.weight.mul_(1e6)
        model.two.bias.mul_(1e6)
    records = pictures(4, (3, 2, 2), dtype=dtype)
    labels = model(torch.stack([r.pixels for r in records])).argmax(-1).tolist()
    records = [ImageRecord(r.record_id, r.pixels, label) for r, label in zip(records, labels, strict=True)]
    data = [ImageRecord(f"d{i}", r.pixels.to(dtype), r.label) for i, r in enumerate(pictures(20, (3, 2, 2), 1))]
    bases, _, factors = setting(plain(Perceptron), pictures(20, (3, 2, 2), 1), ["one"])
    kept: dict[str, Kept | Tensor] = {"one": torch.zeros(7, 12, dtype=torch.bool)}
    found = record_curvature(model, [*records, *data], bases, kept, factors)
    assert np.isfinite(found.drop(columns="record_id").to_numpy(float)).all()
    assert (found.low_energy[:4] == 0).all()
    assert (found.low_energy[4:].isin([0.0, 1.0])).all()
    assert (found.input_curvature[:4] == 0).all()
    assert (found.relative_curvature[:4] == 0).all()

    short = [TokenRecord("a", (5, 6), 1, 1), TokenRecord("b", (7, 8, 9), 2, 1)]
    lm = causal_lm("llama", dtype=dtype)
    found = record_curvature(lm, short, *setting(lm, texts(40, 1)))
    assert np.isfinite(found.drop(columns="record_id").to_numpy(float)).all()
    assert (found.low_energy > 0).all()


def test_activations_of_zero_say_nothing() -> None:
    model = plain(Perceptron)
    parts = setting(model, pictures(30, (3, 2, 2), 1), ["one"])
    black = ImageRecord("black", torch.zeros(3, 2, 2, dtype=F64), 0)
    found = record_curvature(model, [black], *parts)
    assert (found.low_energy[0], found.activation_ratio[0]) == (0.0, 1.0)


# --------------------------------------------------------------------------------------------------------------- errors


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(pixels.flatten(1)).tanh()).tanh())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Fused(Perceptron):
    """One of two branches has no second derivative; the other would hide it."""

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.one(pixels.flatten(1))
        return self.two(_Once.apply(hidden) + hidden.tanh())


def test_what_cannot_be_done_is_refused() -> None:
    model, records = plain(Perceptron), pictures(4, (3, 2, 2))
    bases, kept, factors = setting(model, pictures(30, (3, 2, 2), 1), ["one", "two"])
    with pytest.raises(UsageError, match="at least one record"):
        record_curvature(model, [], bases, kept, factors)
    with pytest.raises(UsageError, match="at least one map, found none"):
        record_curvature(model, records, {}, kept, factors)
    with pytest.raises(UsageError, match="draws from 0, found -1"):
        record_curvature(model, records, bases, kept, factors, draws=-1)
    with pytest.raises(UsageError, match="kept pairs of every map, found none for two"):
        record_curvature(model, records, bases, {"one": kept["one"]}, factors)
    with pytest.raises(UsageError, match=r"kept pairs \(7, 12\) of bool for one, found \(12, 7\)"):
        record_curvature(model, records, bases, kept | {"one": mask_of(kept["one"]).T}, factors)
    with pytest.raises(UsageError, match="bases of these factors, found one for one"):
        record_curvature(model, records, {"one": bases["two"]}, kept, factors)
    with pytest.raises(UsageError, match="bases of these factors, found one for three"):
        record_curvature(model, records, {"three": bases["two"]}, kept, factors)
    with pytest.raises(UnsupportedError, match="labels below 4 classes"):
        record_curvature(model, [ImageRecord("x", records[0].pixels, 4)], bases, kept, factors)
    with pytest.raises(UnsupportedError, match="finite curvature figures"):
        record_curvature(model, [ImageRecord("x", records[0].pixels * math.nan, 0)], bases, kept, factors)


def test_a_module_that_runs_twice_is_refused() -> None:
    model, records = plain(Twice), pictures(3, (3, 2, 2))
    parts = setting(model, pictures(30, (3, 2, 2), 1), ["inner"])
    with pytest.raises(UnsupportedError, match="run once in a forward pass, found inner"):
        record_curvature(model, records, *parts)


def test_without_second_derivative_there_is_a_way_out() -> None:
    model, records = plain(Fused), pictures(3, (3, 2, 2))
    parts = setting(model, pictures(30, (3, 2, 2), 1), ["one", "two"])
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        record_curvature(model, records, *parts)
    found = record_curvature(model, records, *parts, draws=0)
    assert list(found.columns) == ["record_id", "low_energy", "activation_ratio"]


def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = plain(Perceptron), pictures(3, (3, 2, 2))
    parts = setting(model, pictures(30, (3, 2, 2), 1), ["one"])

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("allocate memory")

    monkeypatch.setattr(module._Source, "slopes", fail)
    with pytest.raises(ResourceError, match="lower batch_tokens"):
        record_curvature(model, records, *parts)


# ---------------------------------------------------------------------------------------------------------------- score


def frame(rows: Sequence[Sequence[float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(SCORED))


def test_the_score_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    ordinary, table = frame(rng.normal(size=(41, 3))), frame(3 * rng.normal(size=(7, 3)))
    expected = np.zeros(7)
    for name in SCORED:
        ordered = sorted(ordinary[name])
        scale = (ordered[30] - ordered[10]) / 1.349
        expected += np.array([math.asinh((x - ordered[20]) / scale) for x in table[name]]) / 3
    np.testing.assert_allclose(memorisation_scores(table, ordinary), expected)
    assert SCORED == ("low_energy", "activation_ratio", "relative_curvature")


def test_the_score_rises_with_every_figure_and_forgets_units() -> None:
    rng = np.random.default_rng(1)
    ordinary, table = frame(rng.normal(size=(50, 3))), frame(rng.normal(size=(20, 3)))
    scores = memorisation_scores(table, ordinary)
    for name in SCORED:
        assert (memorisation_scores(table.assign(**{name: table[name] + 0.1}), ordinary) > scores).all()
        both = (part.assign(**{name: 100 * part[name] - 5}) for part in (table, ordinary))
        np.testing.assert_allclose(memorisation_scores(*both), scores)
    assert abs(np.median(memorisation_scores(ordinary, ordinary))) < 0.3


def test_a_figure_without_spread_does_not_count() -> None:
    rng = np.random.default_rng(2)
    ordinary, table = frame(rng.normal(size=(50, 3))), frame(rng.normal(size=(20, 3)))
    flat = memorisation_scores(table, ordinary.assign(low_energy=0.0))
    np.testing.assert_allclose(flat, memorisation_scores(table.assign(low_energy=0.0), ordinary.assign(low_energy=0.0)))
    two = memorisation_scores(table.drop(columns="low_energy"), ordinary.drop(columns="low_energy"))
    np.testing.assert_allclose(two * 2 / 3, flat)


def test_scores_that_mean_nothing_are_refused() -> None:
    ordinary = frame([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    for table, usual in ((ordinary, ordinary[:1]), (ordinary, ordinary[["low_energy"]].add_prefix("x"))):
        with pytest.raises(UsageError, match="at least 2 ordinary records"):
            memorisation_scores(table, usual)
    with pytest.raises(UsageError, match="finite"):
        memorisation_scores(ordinary.assign(low_energy=math.nan), ordinary)


# -------------------------------------------------------------------------------------------------- known memorisation

VOCABULARY, LENGTH = 48, 16


def fit(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rate: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=len(batches))
    model.train()
    for inputs, labels in batches:
        optimiser.zero_grad()
        out = model(inputs)
        logits = out if isinstance(out, Tensor) else out.logits[:, :-1].flatten(0, 1)
        functional.cross_entropy(logits, labels.flatten()).backward()
        optimiser.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def strings(name: str, n: int, rng: random.Random) -> list[TokenRecord]:
    rows = [(1, *(rng.randrange(4, VOCABULARY) for _ in range(LENGTH - 1))) for _ in range(n)]
    return [TokenRecord(f"{name}{i}", row, 5, 1) for i, row in enumerate(rows)]


def test_planted_strings_stand_out_and_in_an_untrained_model_they_do_not() -> None:
    rng = random.Random(0)
    successors = {t: rng.sample(range(4, VOCABULARY), 4) for t in range(4, VOCABULARY)}

    def text() -> tuple[int, ...]:
        ids = [1, rng.randrange(4, VOCABULARY)]
        while len(ids) < LENGTH:
            ids.append(rng.choice(successors[ids[-1]]))
        return tuple(ids)

    planted, never = strings("p", 30, rng), strings("n", 30, rng)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.05}
    model = causal_lm("llama", seed=1, vocab=VOCABULARY, **shape)
    batches = []
    for _ in range(240):
        ids = torch.tensor([text() for _ in range(12)] + [r.ids for r in rng.sample(planted, 10)])
        batches.append((ids, ids[:, 1:]))
    fit(model, batches, 1e-2)
    data, usual = ([TokenRecord(f"{i}", text(), 5, 1) for i in range(n)] for n in (150, 60))

    def separate(model: nn.Module) -> tuple[float, float]:
        parts = setting(model, data, rho=0.75)
        ordinary = record_curvature(model, usual, *parts)
        own = [memorisation_scores(record_curvature(model, some, *parts), ordinary) for some in (planted, never)]
        return auc(own[0], own[1]), auc(own[0], memorisation_scores(ordinary, ordinary))

    against_never, against_ordinary = separate(model)
    assert against_never > 0.9
    assert against_ordinary > 0.9
    untrained, _ = separate(causal_lm("llama", seed=1, vocab=VOCABULARY, **shape))
    assert 0.3 < untrained < 0.7


def test_mislabelled_training_images_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    side, classes, n = 8, 6, 500
    prototypes = torch.randn(classes, 3, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (n + 600,), generator=generator)
    chosen = prototypes[labels, torch.randint(3, labels.shape, generator=generator)]
    pixels = functional.interpolate(chosen, size=(side, side)) + 0.3 * torch.randn(
        len(labels), 3, side, side, generator=generator
    )
    given = labels.clone()
    wrong = torch.randperm(n, generator=generator)[:60]
    given[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes
    with seeded(0):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, classes)
        )
        roughen(model)
    order = [torch.randperm(n, generator=generator).split(50) for _ in range(60)]
    fit(model, [(pixels[i], given[i]) for epoch in order for i in epoch], 3e-3)
    assert float((model(pixels[wrong]).argmax(-1) == given[wrong]).float().mean()) > 0.95

    def records(index: Sequence[int], labels: Tensor) -> list[ImageRecord]:
        return [ImageRecord(f"{i}", pixels[i], int(labels[i])) for i in index]

    parts = setting(model, records(range(n, n + 500), labels), ["1", "3"], rho=0.75)
    clean = [i for i in range(n) if i not in set(wrong.tolist())][:100]
    ordinary = record_curvature(model, records(range(n + 500, n + 600), labels), *parts)
    own = [
        memorisation_scores(record_curvature(model, records(index, given), *parts), ordinary)
        for index in (wrong.tolist(), clean)
    ]
    assert auc(*own) > 0.65
