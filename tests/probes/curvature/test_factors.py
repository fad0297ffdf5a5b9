"""Factors against explicit per-token autograd, exact expectations over labels, and defects of published collectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.curvature import factors as module
from probes.curvature.factors import (
    KroneckerFactors,
    add_symmetric,
    grouped,
    kronecker_factors,
    require_positions,
    subspace_overlap,
)
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.passes import losses_of
from probes.records import ImageRecord, TokenRecord
from probes.taps import Site, patches, sites
from tests.probes.curvature.test_taps import classifier, exact, heard
from tests.probes.test_fisher import Convolutions, images, plain, texts
from tests.tiny import EOS, PAD, causal_lm, seeded

F64 = torch.float64
Pair = tuple[Tensor, Tensor, int]


def logits_of(model: nn.Module, record: TokenRecord | ImageRecord) -> Tensor:
    """[n, V], one row per loss of the record, by the model's own forward."""
    if isinstance(record, ImageRecord):
        out = model(record.pixels[None])
        return out if isinstance(out, Tensor) else out.logits
    return model(torch.tensor([record.ids]), use_cache=False).logits[0, record.n_prompt - 1 : -1]


def gold(record: TokenRecord | ImageRecord) -> Tensor:
    return torch.tensor([record.label] if isinstance(record, ImageRecord) else record.completion)


def oracle(
    model: nn.Module,
    records: Sequence[TokenRecord | ImageRecord],
    key: str,
    positions: str = "all",
    labels: Callable[[TokenRecord | ImageRecord], Tensor] = gold,
) -> Pair:
    """A, G and N of one module: one record at a time, one position at a time."""
    tapped = model.get_submodule(key)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        seen.append((args[0].detach(), y))
        return y.clone()  # what follows may work in place

    hook = tapped.register_forward_hook(keep)
    a = g = torch.zeros((), dtype=F64)
    n = 0
    for record in records:
        seen.clear()
        loss = functional.cross_entropy(logits_of(model, record), labels(record), reduction="sum")
        x, y = seen[0]
        (gradient,) = torch.autograd.grad(loss, y)
        if isinstance(tapped, nn.Conv2d):
            x, gradient = patches(tapped, x), gradient.flatten(2).transpose(1, 2)
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        if isinstance(record, TokenRecord):
            kept = range(0 if positions == "all" else record.n_prompt - 1, len(record.ids) - 1)
        else:
            kept = range(1 if positions == "first" else len(x))
        for t in kept:
            a = a + torch.outer(x[t], x[t])
            g = g + torch.outer(gradient[t], gradient[t])
        n += len(kept)
    hook.remove()
    return a / n, g / n, n


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def equal(found: KroneckerFactors, expected: KroneckerFactors, tolerance: float = 1e-9) -> None:
    assert found.factors.keys() == expected.factors.keys()
    for key, factor in expected.factors.items():
        assert found.factors[key].n == factor.n
        same(found.factors[key].a, factor.a, tolerance)
        same(found.factors[key].g, factor.g, tolerance)


# ------------------------------------------------------------------------------------------------- against the oracle

KEYS = {
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_proj"],
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"],
    "phi3": ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"],
    "gpt_neox": ["gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.1.mlp.dense_h_to_4h"],
    "gemma2": ["model.layers.1.self_attn.o_proj"],
}


@pytest.mark.parametrize("positions", ["all", "predicting"])
@pytest.mark.parametrize("arch", list(KEYS))
def test_factors_equal_explicit_autograd_on_language_models(arch: str, positions: str) -> None:
    model, records = exact(arch), texts(6)
    found = kronecker_factors(
        model, records, modules=KEYS[arch], labels="gold", positions=positions, batch_tokens=24, halves=False
    )
    assert list(found.factors) == KEYS[arch]
    tolerance = 1e-9 if arch in {"gpt2", "gpt_neox"} else 1e-4  # RMSNorm computes in fp32 whatever the model's type
    for key, factor in found.factors.items():
        a, g, n = oracle(model, records, key, positions)
        same(factor.a, a, tolerance)
        same(factor.g, g, tolerance)
        assert factor.n == n
        assert factor.a.dtype == factor.g.dtype == F64
        weight = model.get_parameter(factor.parameter)
        assert factor.shape == tuple(weight.T.shape if factor.orientation == "in_out" else weight.shape)
        assert (factor.overlap_a, factor.overlap_g) == (None, None)
    assert found.n_positions == n
    assert (found.n_records, found.n_tokens, found.passes) == (6, sum(r.n_tokens for r in records), 1)
    assert found.positions_per_loss(KEYS[arch][0]) == n / found.n_tokens


@pytest.mark.parametrize(
    ("arch", "keys", "positions"),
    [
        ("vit", ["vit.embeddings.patch_embeddings.projection", "vit.layers.1.mlp.fc1", "classifier"], "all"),
        ("vit", ["vit.layers.0.mlp.fc2", "vit.layers.2.attention.o_proj"], "first"),
        ("swin", ["swin.encoder.layers.0.blocks.0.attention.q_proj"], "all"),
        ("resnet", ["resnet.embedder.embedder.convolution", "resnet.encoder.stages.1.layers.0.shortcut.*"], "all"),
    ],
)
def test_factors_equal_explicit_autograd_on_image_classifiers(arch: str, keys: list[str], positions: str) -> None:
    model, records = classifier(arch), images(5)
    found = kronecker_factors(model, records, modules=keys, labels="gold", positions=positions, batch_tokens=2)
    assert len(found.factors) == len(keys)
    for key, factor in found.factors.items():
        a, g, n = oracle(model, records, key, positions)
        same(factor.a, a, 1e-6)
        same(factor.g, g, 1e-6)
        assert factor.n == n
    assert found.n_positions == max(factor.n for factor in found.factors.values())
    assert found.n_tokens == 5


def test_any_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = plain(Convolutions), images(5, side=9)
    for pieces in (1 << 24, 700):
        monkeypatch.setattr("probes.taps.PATCH_ELEMENTS", pieces)
        found = kronecker_factors(model, records, modules=["body.*"], labels="gold", batch_tokens=3)
        for key, factor in found.factors.items():
            a, g, n = oracle(model, records, key)
            same(factor.a, a)
            same(factor.g, g)
            assert factor.n == n
            assert factor.overlap_a is not None


@pytest.mark.parametrize(("arch", "positions"), [("mixtral", "all"), ("qwen3_moe", "predicting"), ("gpt_oss", "all")])
def test_stacked_experts_equal_autograd_on_every_expert(arch: str, positions: str) -> None:
    """The experts' module is replaced by a plain loop over tokens, which keeps each token's products with each W[e]."""
    model, records = exact(arch), texts(5)
    path = "model.layers.0.mlp.experts"
    experts = model.get_submodule(path)
    seen: list[tuple[str, int, int, Tensor, Tensor]] = []  # name, expert, token, x, y

    def product(name: str, e: int, t: int, x: Tensor) -> Tensor:
        weight = getattr(experts, name)[e]
        y = x @ weight if arch == "gpt_oss" else weight @ x
        seen.append((name, e, t, x.detach(), y))
        bias = getattr(experts, f"{name}_bias", None)
        return y if bias is None else y + bias[e]

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = []
        for t, x in enumerate(hidden):
            total = torch.zeros_like(x)
            for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                inner = experts._apply_gate(product("gate_up_proj", e, t, x)[None])[0]
                total = total + weight * product("down_proj", e, t, inner)
            out.append(total)
        return torch.stack(out)

    found = kronecker_factors(
        model, records, modules=[f"{path}.*"], labels="gold", positions=positions, batch_tokens=24
    )
    experts.forward = forward
    sums: dict[str, list[Tensor]] = {}
    for record in records:
        seen.clear()
        loss = functional.cross_entropy(logits_of(model, record), gold(record), reduction="sum")
        gradients = torch.autograd.grad(loss, [y for *_, y in seen], allow_unused=True)
        first = 0 if positions == "all" else record.n_prompt - 1
        for (name, e, t, x, y), g in zip(seen, gradients, strict=True):
            if first <= t < len(record.ids) - 1:
                g = torch.zeros_like(y) if g is None else g
                sums.setdefault(f"{path}.{name}.{e}", []).append(torch.stack([torch.outer(x, x).sum(), g @ g]))
                pair = sums.setdefault(f"{path}.{name}.{e}|", [torch.zeros(()), torch.zeros(())])
                pair[0], pair[1] = pair[0] + torch.outer(x, x), pair[1] + torch.outer(g, g)
    assert len(found.factors) == 8
    for key, factor in found.factors.items():
        n = len(sums[key])
        assert factor.n == n > 0
        same(factor.a, sums[f"{key}|"][0] / n, 1e-5)
        same(factor.g, sums[f"{key}|"][1] / n, 1e-5)
        assert factor.expert == int(key[-1])
        assert found.positions_per_loss(key) == n / found.n_tokens
    tokens = sum(r.n_tokens if positions == "predicting" else len(r.ids) - 1 for r in records)
    assert sum(f.n for f in found.factors.values()) == 2 * 2 * tokens  # two experts a token, two weights an expert


def test_an_expert_without_tokens_has_zero_factors() -> None:
    found = kronecker_factors(exact("mixtral"), [TokenRecord("a", (5, 6), 1, 1)], modules=["*.layers.0.mlp.experts.*"])
    assert sorted(factor.n for factor in found.factors.values()) == [0, 0, 0, 0, 1, 1, 1, 1]  # the last does not count
    for factor in found.factors.values():
        assert bool(factor.a.any()) == bool(factor.g.any()) == (factor.n > 0)
    with pytest.raises(UsageError, match="at least 1 positions for each map, found 0"):
        require_positions(found, 1)


# ----------------------------------------------------------------------------------------------- batches and positions


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral", "gpt_oss"])
def test_neither_padding_nor_the_composition_of_batches_matters(arch: str) -> None:
    """One record a batch has no padding; all in one has the most. Order decides the halves, not the whole."""
    model, records = exact(arch), texts(7)
    alone = kronecker_factors(model, records, batch_tokens=1)
    together = kronecker_factors(model, records, batch_tokens=10_000)
    tolerance = 1e-9 if arch == "gpt2" else 1e-4
    equal(together, alone, tolerance)
    equal(kronecker_factors(model, records[::-1], batch_tokens=30), alone, tolerance)
    for key, factor in alone.factors.items():
        assert together.factors[key].overlap_a == pytest.approx(factor.overlap_a, abs=1e-3)
        assert together.factors[key].overlap_g == pytest.approx(factor.overlap_g, abs=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_excluded(side: str) -> None:
    """The other tools' way: one padded batch with an attention mask, whose padding is then left out by hand."""
    model, records = exact("gpt2"), texts(6)
    key = "transformer.h.1.mlp.c_fc"
    width = max(len(r.ids) for r in records)
    blanks = [[PAD] * (width - len(r.ids)) for r in records]
    left = side == "left"
    ids = torch.tensor(
        [[*(b if left else []), *r.ids, *([] if left else b)] for b, r in zip(blanks, records, strict=True)]
    )
    mask = torch.tensor(
        [
            [0] * len(b) + [1] * len(r.ids) if left else [1] * len(r.ids) + [0] * len(b)
            for b, r in zip(blanks, records, strict=True)
        ]
    )
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(key).register_forward_hook(lambda _m, args, y: seen.append((args[0].detach(), y)))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    hook.remove()
    loss = torch.zeros((), dtype=F64)
    counted = torch.zeros_like(mask, dtype=torch.bool)
    for row, (record, blank) in enumerate(zip(records, blanks, strict=True)):
        start = len(blank) if left else 0
        counted[row, start : start + len(record.ids) - 1] = True
        part = logits[row, start + record.n_prompt - 1 : start + len(record.ids) - 1]
        loss = loss + functional.cross_entropy(part, gold(record), reduction="sum")
    x, g = seen[0][0][counted], torch.autograd.grad(loss, seen[0][1])[0][counted]
    factor = kronecker_factors(model, records, modules=[key], labels="gold").factors[key]
    same(factor.a, x.T @ x / len(x))
    same(factor.g, g.T @ g / len(g))


def test_a_padding_token_that_is_also_the_end_token_still_counts() -> None:
    """A published collector masks `token == pad`, and with it every real end of sequence."""
    model = exact("gpt2")
    model.config.pad_token_id = model.config.eos_token_id = EOS
    records = [TokenRecord("a", (5, EOS, 7, PAD, 9, EOS), 1, 1), TokenRecord("b", (5, 6, EOS), 1, 1)]
    key = "transformer.h.1.mlp.c_fc"
    factor = kronecker_factors(model, records, modules=[key], labels="gold").factors[key]
    a, g, n = oracle(model, records, key)
    assert factor.n == n == 7
    same(factor.a, a)
    same(factor.g, g)


def test_positions_tell_prompt_from_completion() -> None:
    model = exact("gpt2")
    key = "transformer.h.2.mlp.c_proj"
    records = [TokenRecord("a", (5, 6, 7, 8, 9), 3, 1)]
    every, some = (
        kronecker_factors(model, records, modules=[key], labels="gold", positions=positions).factors[key]
        for positions in ("all", "predicting")
    )
    assert (every.n, some.n) == (4, 2)
    # Above the last attention a prompt position has no part in any loss, so only the mean differs.
    same(every.g * 4, some.g * 2)
    assert not torch.allclose(every.a * 4, some.a * 2)


# ----------------------------------------------------------------------------------------------------- sampled labels


def test_sampled_labels_are_the_default_and_reproducible() -> None:
    """A published collector documents sampled labels and uses gold ones unless told otherwise."""
    model, records = exact("llama"), texts(5)
    keys = ["*.layers.1.mlp.*"]
    default = kronecker_factors(model, records, modules=keys)
    assert default.labels == "sampled"
    again = kronecker_factors(model, records, modules=keys, labels="sampled", seed=0)
    assert all(torch.equal(f.g, again.factors[key].g) for key, f in default.factors.items())
    equal(kronecker_factors(model, records[::-1], modules=keys, batch_tokens=1), default, 1e-4)
    for other in (
        kronecker_factors(model, records, modules=keys, seed=1),
        kronecker_factors(model, records, modules=keys, labels="gold"),
    ):
        for key, factor in default.factors.items():
            same(other.factors[key].a, factor.a)
            assert not torch.allclose(other.factors[key].g, factor.g, rtol=1e-2)


def test_sampled_g_has_the_exact_fisher_information_for_its_mean() -> None:
    """sum_y p(y) g_y g_y^T, enumerated over all labels of a text with one loss and of an image."""
    with seeded(1):
        small = causal_lm("gpt2", vocab=96, dtype=F64, n_layer=1)
    cases: list[tuple[nn.Module, TokenRecord | ImageRecord, str]] = [
        (small, TokenRecord("a", (5, 6, 7), 2, 1), "transformer.h.0.mlp.c_proj"),
        (plain(Convolutions), images(1, side=9)[0], "out"),
    ]
    for model, record, key in cases:
        p = logits_of(model, record).softmax(-1)[0].detach()
        per_label = [oracle(model, [record], key, labels=lambda _, y=y: torch.tensor([y])) for y in range(len(p))]
        exact_g = sum(weight * g for weight, (_, g, _) in zip(p, per_label, strict=True))
        draws, model_map = 300, ModelMap.of(model)
        found = [
            kronecker_factors(model, [record], modules=[key], seed=seed, model_map=model_map, halves=False)
            for seed in range(draws)
        ]
        samples = torch.stack([f.factors[key].g for f in found])
        spread = samples.std(0) / draws**0.5
        assert float(((samples.mean(0) - exact_g) / spread.clamp(min=1e-12)).abs().max()) < 5
        assert float(samples.mean(0).trace() / exact_g.trace()) == pytest.approx(1, abs=0.1)
        labels = {tuple(f.factors[key].g.flatten()[:5].tolist()) for f in found}
        assert 1 < len(labels) <= len(p)


# ---------------------------------------------------------------------------------------- one pass, sharing, groups


def test_projections_that_read_the_same_input_share_one_a() -> None:
    """A published collector stores the same A for gate and up."""
    model, records = causal_lm("llama"), texts(4)
    found = kronecker_factors(model, records).factors
    for i in range(3):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        assert found[f"{attention}q_proj"].a is found[f"{attention}k_proj"].a is found[f"{attention}v_proj"].a
        assert found[f"{mlp}gate_proj"].a is found[f"{mlp}up_proj"].a
        assert found[f"{mlp}gate_proj"].overlap_a == found[f"{mlp}up_proj"].overlap_a
    assert len({id(factor.a) for factor in found.values()}) == 3 * 4
    assert len({id(factor.g) for factor in found.values()}) == 3 * 7


def test_all_maps_come_from_one_pass() -> None:
    model, records = causal_lm("llama"), texts(4)
    model_map, calls = ModelMap.of(model), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    assert kronecker_factors(model, records, model_map=model_map).passes == 1
    assert len(calls) == 1


@pytest.mark.parametrize("arch", ["llama", "mixtral", "vit"])
def test_a_memory_budget_makes_groups_and_changes_nothing(arch: str) -> None:
    model = classifier("vit") if arch == "vit" else exact(arch)
    records: list = images(5) if arch == "vit" else texts(6)
    whole = kronecker_factors(model, records)
    progress: list[tuple[int, int]] = []
    budget = 200_000
    found = kronecker_factors(
        model, records, memory_bytes=budget, progress=lambda *at: progress.append(at), batch_tokens=20
    )
    assert found.passes > 2
    assert progress[-1] == (len(records) * found.passes,) * 2
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    equal(found, whole, 1e-4)
    assert list(found.factors) == list(whole.factors)
    assert len({id(factor.a) for factor in found.factors.values()}) == len(
        {id(factor.a) for factor in whole.factors.values()}
    )
    assert kronecker_factors(model, records, memory_bytes=1 << 40).passes == 1
    with pytest.raises(ResourceError, match=r"memory_bytes of at least \d+ for the sums of .*, found 5000"):
        kronecker_factors(model, records, memory_bytes=5000)


def test_a_budget_bounds_what_is_summed_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, budget, most = exact("llama"), texts(3), 150_000, [0]
    original = module._Collector._add

    def add(self: module._Collector, *args: object) -> None:
        original(self, *args)
        most[0] = max(most[0], sum(t.nbytes for sums in (self._a, self._g) for t in sums.values()))

    monkeypatch.setattr(module._Collector, "_add", add)
    passes = kronecker_factors(model, records, memory_bytes=budget).passes
    assert budget / 2 < most[0] <= budget
    total = kronecker_factors(model, records, memory_bytes=1 << 40) and most[0]
    assert passes < 2 * total / budget + 1


def test_units_stay_together_and_in_order() -> None:
    units = [[site] for site in sites(ModelMap.of(causal_lm("llama")))[:5]]
    flat = [unit[0] for unit in units]
    assert grouped(units, [3, 3, 4, 1, 9], 10) == [flat[:3], flat[3:]]
    assert grouped([flat[:3], flat[3:]], [6, 6], 10) == [flat[:3], flat[3:]]
    assert grouped([flat], [10], 10) == [flat]


# ------------------------------------------------------------------------------------------------------------- halves


def test_halves_that_are_alike_agree_and_random_ones_do_not() -> None:
    model = exact("gpt2")
    base = texts(4)
    twins = [TokenRecord(r.record_id, r.ids, r.n_prompt, 1) for r in base for _ in range(2)]
    found = kronecker_factors(model, twins, labels="gold", batch_tokens=20)
    for factor in found.factors.values():
        assert factor.overlap_a == pytest.approx(1, abs=1e-9)
        assert factor.overlap_g == pytest.approx(1, abs=1e-9)
    different = kronecker_factors(model, base, labels="gold")
    assert all(0 < f.overlap_g < 0.9 for f in different.factors.values())
    single = kronecker_factors(model, base[:1], labels="gold")
    assert all(f.overlap_a is None and f.overlap_g is None for f in single.factors.values())


def test_the_halves_are_the_even_and_the_odd_records() -> None:
    model, records = exact("gpt2"), texts(7)
    key = "transformer.h.1.mlp.c_fc"
    even, odd = (oracle(model, part, key) for part in (records[::2], records[1::2]))
    factor = kronecker_factors(model, records, modules=[key], labels="gold", batch_tokens=20).factors[key]
    assert factor.overlap_a == pytest.approx(subspace_overlap(even[0] * even[2], odd[0] * odd[2]), rel=1e-6)
    assert factor.overlap_g == pytest.approx(subspace_overlap(even[1] * even[2], odd[1] * odd[2]), rel=1e-6)


def test_subspace_overlap() -> None:
    with seeded(3):
        u, v = (torch.linalg.qr(torch.randn(200, 200, dtype=F64)).Q for _ in range(2))
    steep = torch.tensor([10.0, 9, 8, 7] + [1e-3] * 196, dtype=F64)
    one = u @ torch.diag(steep) @ u.T
    assert subspace_overlap(one, one) == pytest.approx(1)
    assert subspace_overlap(one, 7 * one) == pytest.approx(1)
    assert subspace_overlap(one, v @ torch.diag(steep) @ v.T) < 0.1
    # Three axes hold 92 %; the halves share two of them.
    a, b = (torch.diag(torch.tensor(d, dtype=F64)) for d in ([5.0, 4, 1.1, 0.9], [5.0, 4, 0.9, 1.1]))
    assert subspace_overlap(a, b) == pytest.approx(2 / 2 if 18 / 22 >= 0.9 else 2 / 3)
    assert subspace_overlap(a, b, share=0.5) == pytest.approx(1)
    single = torch.zeros(69, 69)
    single[30:66, 30:66] = 1.0  # rank one, on which LAPACK may give up in single precision
    assert subspace_overlap(single, single) == pytest.approx(1, abs=1e-5)
    flat = torch.eye(4, dtype=F64)
    assert subspace_overlap(flat, flat, share=1) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------- numbers and errors


@pytest.mark.parametrize("width", [1, 63, 64, 200, 517])
def test_symmetric_sums(width: int) -> None:
    with seeded(width):
        rows = torch.randn(30, width, dtype=F64)
    total = torch.ones(width, width, dtype=F64)
    add_symmetric(total, rows)
    upper = total.triu()
    torch.testing.assert_close(upper, (1 + rows.T @ rows).triu())


def test_factors_are_symmetric_and_in_single_precision_at_least() -> None:
    records = texts(5)
    reference = kronecker_factors(exact("llama"), records, labels="gold")
    low = kronecker_factors(causal_lm("llama", dtype=torch.bfloat16), records, labels="gold")
    auto = kronecker_factors(causal_lm("llama"), records, labels="gold", compute_dtype=torch.bfloat16)
    single = kronecker_factors(causal_lm("llama"), records, labels="gold")
    for key, factor in reference.factors.items():
        for found, tolerance in ((single, 1e-4), (auto, 0.1), (low, 0.1)):
            other = found.factors[key]
            for mine, theirs in ((other.a, factor.a), (other.g, factor.g)):
                assert mine.dtype == torch.float32
                assert torch.equal(mine, mine.T)
                assert float((mine - theirs).norm() / theirs.norm()) < tolerance
    assert not torch.equal(auto.factors[key].g, single.factors[key].g)


def test_sums_are_exact_however_low_the_precision_of_the_model() -> None:
    """Under autocast a product of two tensors in fp32 would be one in bf16."""
    model, records, key = causal_lm("llama"), texts(5), "model.layers.1.mlp.down_proj"
    x, g, _ = (t.to(F64) for t in heard(model, records, [key], compute_dtype=torch.bfloat16)[key])
    assert torch.equal(x, x.bfloat16().to(F64))
    found = kronecker_factors(model, records, modules=[key], labels="gold", compute_dtype=torch.bfloat16)
    same(found.factors[key].a.to(F64), x.T @ x / len(x), 1e-6)
    same(found.factors[key].g.to(F64), g.T @ g / len(g), 1e-6)


def test_bytes_repeat() -> None:
    model, records = causal_lm("qwen2_moe"), texts(5)
    one, two = (kronecker_factors(model, records, batch_tokens=20) for _ in range(2))
    for key, factor in one.factors.items():
        assert torch.equal(factor.a, two.factors[key].a)
        assert torch.equal(factor.g, two.factors[key].g)


def test_no_weight_gradient_is_ever_there() -> None:
    model, records = causal_lm("llama"), texts(3)
    formed: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: formed.append(name))
    kronecker_factors(model, records)
    assert not formed
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_wrong_arguments_end_in_one_line() -> None:
    model, records = causal_lm("llama"), texts(2)
    with pytest.raises(UsageError, match="at least one record"):
        kronecker_factors(model, [])
    with pytest.raises(UsageError, match="none named foo"):
        kronecker_factors(model, records, modules=["foo"])
    with pytest.raises(UnsupportedError, match="as wide as the vocabulary"):
        kronecker_factors(model, records, modules=["lm_head"])
    with pytest.raises(UsageError, match="all or predicting for texts, found first"):
        kronecker_factors(model, records, positions="first")
    with pytest.raises(UsageError, match="all or first for images, found predicting"):
        kronecker_factors(plain(Convolutions), images(2, side=9), positions="predicting")
    with pytest.raises(UsageError, match="batch_tokens of at least 1, found 0"):
        kronecker_factors(model, records, batch_tokens=0)
    with pytest.raises(UnsupportedError, match="vocabulary"):
        kronecker_factors(model, [TokenRecord("a", (5, 500), 1, 1)])
    with pytest.raises(UnsupportedError, match="class token for positions first"):
        kronecker_factors(classifier("swin"), images(2), positions="first")
    with pytest.raises(UsageError, match=r"bfloat16 or none, found torch.float16"):
        kronecker_factors(model, records, compute_dtype=torch.float16)
    found = kronecker_factors(model, records)
    require_positions(found, found.n_positions)
    with pytest.raises(UsageError, match=f"at least 100 positions for each map, found {found.n_positions} for model"):
        require_positions(found, 100)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = causal_lm("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(UnsupportedError, match="finite activations and gradients, found others in model"):
        kronecker_factors(model, texts(2), modules=["*.layers.1.*"])


def test_a_map_the_loss_does_not_depend_on_has_no_overlap() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.out = nn.Linear(12, 5), nn.Linear(12, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.flatten(1)
            return self.out(x) + 0 * self.idle(x).sum()

    found = kronecker_factors(plain(Idle), images(4, side=2), modules=["*"]).factors["idle"]
    assert not found.g.any()
    assert found.a.any()
    assert found.n == 4
    assert found.overlap_g is None


def test_maps_that_share_only_sometimes_are_refused() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.flatten(1)
            return self.out(self.a(x) + self.b(x if len(x) == 2 else x.clone()))

    with seeded(0):
        model = Sometimes().to(F64)
    with pytest.raises(UnsupportedError, match="do so in every batch, found b"):
        kronecker_factors(model, images(3, side=2), modules=["a", "b"], batch_tokens=2)


def test_sharing_is_asked_of_one_record_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = causal_lm("llama"), texts(4)
    model_map = ModelMap.of(model)
    rows: list[int] = []
    model.model.register_forward_hook(
        lambda _m, _a, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    source = losses_of(model, records, model_map=model_map)
    units = module._sharing(model, source, sites(model_map), [0], "all")
    assert rows == [1]
    assert [len(unit) for unit in units] == [3, 1, 2, 1] * 3
    assert all(isinstance(site, Site) for unit in units for site in unit)
