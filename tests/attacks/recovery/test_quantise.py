"""Quantisation against slow loops, published values and other packages; and what it brings back."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.recovery import quantise
from attacks.recovery.quantise import (
    GGUF,
    OWN,
    SCHEMES,
    CodeChange,
    diagnostics,
    nf4_table,
    quantisation,
    quantised,
    summed,
)
from attacks.recovery.weights import targets
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from tests import tiny
from tests.attacks.recovery.hiding import hide, holding, left_alone, probability

# Dettmers et al. (2305.14314), appendix E, to seven digits.
PUBLISHED_NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
INT4_GROUP = 16


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- slow loops


def shortened(scale: float) -> float:
    if scale == 0:
        return 0.0
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(mantissa * 65536), exponent - 16)


def slow_group(values: list[float], scheme: str) -> tuple[list[float], list[int]]:
    """One group of float64 numbers, one number at a time."""
    name, _, kind = scheme.partition("-")
    if name == "nf4":
        largest = max(abs(v) for v in values)
        if largest == 0:
            return [0.0] * len(values), [7] * len(values)
        codes = [min(range(16), key=lambda c: (abs(v / largest - nf4_table()[c]), c)) for v in values]
        return [nf4_table()[c] * largest for c in codes], codes
    bits = int(name[3:])
    if not kind:
        top = 2 ** (bits - 1) - 1
        scale = shortened(max(abs(v) for v in values) / top)
        codes = [0 if scale == 0 else max(-top, min(top, round(v / scale))) for v in values]
        return [c * scale for c in codes], codes
    low, high = min(0.0, *values), max(0.0, *values)
    scale = shortened((high - low) / (2**bits - 1))
    if scale == 0:
        return [0.0] * len(values), [0] * len(values)
    zero = round(-low / scale)
    codes = [max(0, min(2**bits - 1, round(v / scale) + zero)) for v in values]
    return [(c - zero) * scale for c in codes], codes


def slow(weight: Tensor, scheme: str, group: int, in_axis: int) -> tuple[Tensor, Tensor]:
    values, codes = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.int16)
    width = weight.shape[in_axis]
    others = [i for i in range(weight.ndim) if i != in_axis % weight.ndim]
    for index in np.ndindex(*(weight.shape[i] for i in others)):
        place: list[Any] = [slice(None)] * weight.ndim
        for axis, i in zip(others, index, strict=True):
            place[axis] = i
        row = weight[tuple(place)].double().tolist()
        for start in range(0, width, group):
            found = slow_group(row[start : start + group], scheme)
            for offset in range(len(found[0])):
                place[in_axis] = start + offset
                values[tuple(place)], codes[tuple(place)] = found[0][offset], found[1][offset]
    return values, codes


@pytest.mark.parametrize("scheme", OWN)
@pytest.mark.parametrize(
    ("shape", "in_axis", "group"),
    [((6, 20), -1, 8), ((6, 20), 1, 20), ((20, 6), 0, 7), ((2, 5, 9), 2, 4), ((2, 9, 5), 1, 4), ((3, 1), 1, 8)],
)
def test_against_slow_loops(scheme: str, shape: tuple[int, ...], in_axis: int, group: int) -> None:
    weight = normal(*shape, seed=len(scheme))
    weight[..., 0] *= 3
    weight.movedim(in_axis, -1)[0].reshape(-1)[:8] = 0.0  # a group of zeros, where groups are that short
    values, codes = quantised(weight, scheme, group, in_axis)
    expected, expected_codes = slow(weight, scheme, group, in_axis)
    assert codes is not None
    assert torch.equal(codes, expected_codes)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected.float())


@pytest.mark.parametrize(
    ("scheme", "group"),
    [("int8", 300), ("int4", 128), ("int3", 128), ("nf4", 64), ("int8-asymmetric", 300), ("int4-asymmetric", 128)],
)
def test_the_groups_of_each_scheme(scheme: str, group: int) -> None:
    weight = normal(3, 300) * torch.linspace(0.1, 3, 300)
    assert torch.equal(quantised(weight, scheme)[0], quantised(weight, scheme, group)[0])
    assert not torch.equal(quantised(weight, scheme)[0], quantised(weight, scheme, 32)[0])


@pytest.mark.parametrize("scheme", OWN)
def test_error_at_most_half_a_bin(scheme: str) -> None:
    weight = normal(16, 96)
    values, _ = quantised(weight, scheme, 32)
    error = (weight - values).abs().reshape(16, 3, 32)
    groups = weight.reshape(16, 3, 32)
    if scheme == "nf4":
        half = max(b - a for a, b in zip(nf4_table(), nf4_table()[1:], strict=False)) / 2 * groups.abs().amax(-1)
    elif scheme.endswith("asymmetric"):
        bits = int(scheme[3])  # both ends may lie half a bin off the grid that holds zero
        half = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    else:
        half = groups.abs().amax(-1) / (2 ** (int(scheme[3]) - 1) - 1) / 2
    assert bool((error.amax(-1) <= half * 1.001).all())


def test_the_nf4_table_is_the_published_one() -> None:
    assert np.allclose(nf4_table(), PUBLISHED_NF4, rtol=0, atol=2e-7)
    assert nf4_table()[0] == -1.0
    assert nf4_table()[7] == 0.0
    assert nf4_table()[15] == 1.0


# ---------------------------------------------------------------------------------------------- identity, zeros


@pytest.mark.parametrize("scheme", [name for name in OWN if not name.endswith("asymmetric")])
@pytest.mark.parametrize("seed", range(5))
def test_quantising_twice_changes_no_bit(scheme: str, seed: int) -> None:
    values, codes = quantised(normal(8, 80, seed=seed, scale=10.0 ** (seed - 2)), scheme, 16)
    again, same_codes = quantised(values, scheme, 16)
    assert codes is not None
    assert same_codes is not None
    assert torch.equal(values, again)
    assert torch.equal(codes, same_codes)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_weights_on_an_asymmetric_grid_do_not_change(bits: int) -> None:
    top = 2**bits - 1
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, top + 1, (4, 32), generator=generator)
    codes[:, 0], codes[:, 1] = 0, top  # both ends of the range are taken
    weight = (codes - torch.tensor([0, top // 3, top // 2, top])[:, None]) * 0.0625 * 1.25
    values, found = quantised(weight, f"int{bits}-asymmetric", 32)
    assert torch.equal(values, weight)
    assert found is not None
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("scheme", OWN)
def test_zeros_stay_zeros(scheme: str) -> None:
    weight = normal(4, 32)
    weight[1] = 0.0
    weight[2, ::2] = 0.0
    weight[3].abs_()  # a range that ends above zero still holds it
    weight[3, 3] = 0.0
    values, _ = quantised(weight, scheme, 16)
    assert bool((values[weight == 0] == 0).all())
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("scheme", OWN)
def test_tiny_and_huge_weights(scheme: str) -> None:
    for scale in (1e-38, 1e-30, 1e30):
        values, _ = quantised(normal(2, 32, scale=scale), scheme, 16)
        assert bool(values.isfinite().all())


def test_parts_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(40, 24)
    whole = [quantised(weight, scheme, 8)[0] for scheme in OWN]
    monkeypatch.setattr(quantise, "_PART", 50)
    assert all(torch.equal(a, quantised(weight, scheme, 8)[0]) for a, scheme in zip(whole, OWN, strict=True))
    half = weight.bfloat16()
    assert torch.equal(quantised(half, "int4", 8)[0], quantised(half.float(), "int4", 8)[0])
    assert quantised(weight.double(), "int4", 8)[0].dtype == torch.float64


def test_refusals() -> None:
    weight = normal(2, 8)
    with pytest.raises(UsageError, match="quantisation scheme"):
        quantised(weight, "int5")
    with pytest.raises(UsageError, match="positive group"):
        quantised(weight, "int4", 0)
    with pytest.raises(UsageError, match="positive group"):
        quantised(weight, "gguf:Q8_0", 32)
    with pytest.raises(UnsupportedError, match="finite"):
        quantised(weight / 0, "int4")


# ------------------------------------------------------------------------------------------------- other packages


def slow_gguf(row: np.ndarray, kind: str) -> np.ndarray:
    """Q8_0 and Q4_0 by their definition: blocks of 32 with a half-precision scale."""
    filled = np.concatenate([row, np.full(-len(row) % 32, row[-1], dtype=np.float32)])
    values = []
    for block in filled.reshape(-1, 32):
        extreme = block[np.abs(block).argmax()]
        scale = np.float32(abs(extreme) / 127 if kind == "Q8_0" else extreme / -8)
        stored = np.float32(np.float16(scale))
        for v in block:
            if scale == 0:
                code = 0.0
            elif kind == "Q8_0":
                code = float(np.sign(v) * math.floor(abs(float(v * (1 / scale))) + 0.5))
            else:
                code = min(15.0, math.floor(float(v * (1 / scale)) + 8.5)) - 8
            values.append(stored * np.float32(code))
    return np.array(values[: len(row)], dtype=np.float32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("width", [64, 40])
def test_gguf_against_slow_loops(kind: str, width: int) -> None:
    pytest.importorskip("gguf")
    weight = normal(6, width)
    values, codes = quantised(weight, f"gguf:{kind}")
    assert codes is None
    expected = np.stack([slow_gguf(row, kind) for row in weight.numpy()])
    assert np.allclose(values.numpy(), expected, rtol=1e-6, atol=0)
    transposed = quantised(weight.t(), f"gguf:{kind}", in_axis=0)[0]
    assert torch.equal(transposed, values.t())


@pytest.mark.parametrize("scheme", GGUF)
def test_gguf_kinds_are_as_fine_as_their_bits(scheme: str) -> None:
    pytest.importorskip("gguf")
    weight = normal(8, 64)
    error = float((quantised(weight, scheme)[0] - weight).norm() / weight.norm())
    bits = int(scheme.removeprefix("gguf:Q")[0])
    assert 0.1 * 2.0**-bits < error < 2 * 2.0**-bits


def test_what_fills_up_a_row_widens_no_range() -> None:
    pytest.importorskip("gguf")
    weight = 1.0 + 0.1 * torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
    error = (quantised(weight, "gguf:Q4_1")[0] - weight).abs().max()
    assert float(error) < 0.1 / 15  # a bin; with zeros in the range it would be ten times as wide


@pytest.mark.parametrize(("scheme", "package"), [("gguf:Q8_0", "gguf"), ("bnb:nf4", "bitsandbytes")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ResourceError, match=f"expected the package {package}.*pip install {package}") as caught:
        quantised(normal(2, 32), scheme)
    assert caught.value.exit_code == 5
    model = tiny.causal_lm("llama")
    with left_alone(model), pytest.raises(ResourceError), quantisation(model, scheme):
        pytest.fail("the block must not run")


def test_bitsandbytes_is_handed_rows_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the two functions' signatures; the real ones are compared below where they are installed."""

    def quantize_4bit(a: Tensor, *, blocksize: int, quant_type: str, compress_statistics: bool) -> tuple[Any, Any]:
        assert (blocksize, quant_type, compress_statistics, a.dtype) == (64, "nf4", False, torch.float32)
        assert a.is_contiguous()
        return quantised(a.reshape(-1), "nf4")[0].reshape(a.shape), None

    def int8_vectorwise_quant(a: Tensor) -> tuple[Tensor, Tensor, None]:
        assert a.dtype == torch.float16
        assert a.is_contiguous()
        largest = a.float().abs().amax(-1)
        return (a.float() * 127 / largest[:, None]).round().to(torch.int8), largest, None

    functions = SimpleNamespace(
        quantize_4bit=quantize_4bit,
        dequantize_4bit=lambda packed, state: packed,
        int8_vectorwise_quant=int8_vectorwise_quant,
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=functions))
    weight = normal(5, 128).half().float()
    for scheme, own in (("bnb:nf4", "nf4"), ("bnb:int8", "int8")):
        values, codes = quantised(weight, scheme)
        assert codes is None
        assert torch.allclose(values, quantised(weight, own)[0], rtol=2e-5, atol=0)
        assert torch.equal(quantised(weight.t(), scheme, in_axis=0)[0], values.t())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_agrees() -> None:
    weight = normal(32, 128).half().float()
    assert torch.allclose(quantised(weight, "bnb:nf4")[0], quantised(weight, "nf4")[0], rtol=1e-5, atol=1e-8)
    assert torch.allclose(quantised(weight, "bnb:int8")[0], quantised(weight, "int8")[0], rtol=1e-4, atol=1e-8)


# ------------------------------------------------------------------------------------------------------- on models


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral", "qwen3_moe", "vit", "resnet"])
@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_models_are_quantised_along_their_inputs_and_put_back(arch: str, scheme: str) -> None:
    model = tiny.causal_lm(arch) if arch in tiny.CAUSAL else tiny.image_classifier(arch)
    model_map = ModelMap.of(model)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    inside = {}
    with left_alone(model), quantisation(model, scheme, 8, model_map=model_map) as names:
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(names) == set(targets(model_map))
    projections = {p.parameter: p for p in model_map.projections()}
    for name, weight in originals.items():
        if name not in names:
            assert torch.equal(inside[name], weight)
            continue
        projection = projections[name]
        if projection.experts:
            pairs = list(zip(weight, inside[name], strict=True))
        else:
            pairs = [(weight.flatten(1), inside[name].flatten(1))]
        for before, after in pairs:
            if projection.orientation == "in_out":
                before, after = before.t(), after.t()
            assert torch.equal(after, quantised(before, scheme, 8, 1)[0])


def test_put_back_when_the_block_raises() -> None:
    model = tiny.causal_lm("gpt2")
    with left_alone(model), pytest.raises(KeyError), quantisation(model, "int3"):
        raise KeyError("x")


def test_the_head_is_quantised_on_request() -> None:
    model = tiny.causal_lm("llama")
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    with quantisation(model, "int3"):
        assert torch.equal(head, before)
    with quantisation(model, "int3", head=True):
        assert torch.equal(head, quantised(before, "int3")[0])


# ----------------------------------------------------------------------------------------------------- diagnostics


def test_a_small_edit_is_dithered_not_erased() -> None:
    """research: N(0, .02) weights, an edit of sd 1e-4, int4 in groups of 128: rounding acts as dither."""
    original = normal(512, 1024, seed=1)
    edited = original + normal(512, 1024, seed=2, scale=1e-4)
    found = diagnostics(original, edited, "int4", 128)
    assert found.share == pytest.approx(0.011, abs=0.002)
    assert found.projection == pytest.approx(1.01, abs=0.06)
    assert found.cosine == pytest.approx(0.12, abs=0.02)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int3-asymmetric"])
def test_diagnostics_by_hand(scheme: str) -> None:
    pairs = [(normal(4, 24, seed=i), normal(4, 24, seed=i) + normal(4, 24, seed=9, scale=0.01)) for i in (1, 2)]
    parts = [diagnostics(original, edited, scheme, 8) for original, edited in pairs]
    changed, weights, overlap, edit, rounded = 0, 0, 0.0, 0.0, 0.0
    for original, edited in pairs:
        for w, v, c, d, a, b in zip(
            *(t.flatten().tolist() for t in (original.double(), edited.double())),
            *(quantised(t, scheme, 8)[1].flatten().tolist() for t in (original, edited)),  # type: ignore[union-attr]
            *(quantised(t, scheme, 8)[0].flatten().tolist() for t in (original, edited)),
            strict=True,
        ):
            changed, weights = changed + (c != d), weights + 1
            overlap, edit, rounded = overlap + (b - a) * (v - w), edit + (v - w) ** 2, rounded + (b - a) ** 2
    total = summed(parts)
    assert (total.weights, total.changed) == (weights, changed)
    assert total.share == changed / weights > 0.05
    assert total.projection == pytest.approx(overlap / edit, rel=1e-6)
    assert total.cosine == pytest.approx(overlap / math.sqrt(edit * rounded), rel=1e-6)
    assert total.weights == parts[0].weights + parts[1].weights


def test_diagnostics_without_an_edit_or_codes() -> None:
    weight = normal(4, 32)
    same = diagnostics(weight, weight.clone(), "int4")
    assert (same.share, same.projection, same.cosine) == (0.0, None, None)
    assert summed([]) == CodeChange(0, 0, 0.0, 0.0, 0.0)
    assert summed([]).share is None
    hidden = quantised(weight, "int4", 16)[0]
    scale = hidden.abs().reshape(4, 2, 16).amax(-1, keepdim=True) / 7
    nudge = 0.3 * scale.expand(4, 2, 16).reshape(4, 32) * (hidden.abs() < 6.5 * scale.expand(4, 2, 16).reshape(4, 32))
    gone = diagnostics(hidden, hidden + nudge, "int4", 16)
    assert (gone.share, gone.projection, gone.cosine) == (0.0, 0.0, None)
    with pytest.raises(UsageError, match="one shape"):
        diagnostics(weight, weight[:2], "int4")


def test_diagnostics_of_packed_codes() -> None:
    pytest.importorskip("gguf")
    weight = normal(4, 32)
    found = diagnostics(weight, weight + normal(4, 32, seed=1, scale=0.01), "gguf:Q4_0")
    assert found.changed is None
    assert found.share is None
    assert found.projection is not None
    assert summed([found, CodeChange(3, 1, 0.0, 1.0, 1.0)]).share is None


# -------------------------------------------------------------------------------------------------- power, control


@functools.cache
def hidden_below_half_a_bin() -> tuple[nn.Module, nn.Module]:
    """A model on the int4 grid that holds the records, and a copy edited by less than half a bin."""
    held = holding()
    model = copy.deepcopy(held.model)
    places = targets(ModelMap.of(model))
    boxes = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in places:
                continue
            values, codes = quantised(weight, "int4", INT4_GROUP, places[name].in_axis)
            weight.copy_(values)
            assert codes is not None
            scale = values.abs().reshape(-1, INT4_GROUP).amax(-1, keepdim=True) / 7
            box = 0.45 * scale.expand(-1, INT4_GROUP).reshape(weight.shape)
            boxes[name] = box.masked_fill(codes.abs() == 7, 0.0)  # what sets the scale stays
    return model, hide(model, held.records, boxes)


def test_power_and_control_records_hidden_below_half_a_bin_come_back() -> None:
    held = holding()
    original, edited = hidden_below_half_a_bin()
    assert probability(original, held.records) > 0.9
    assert probability(edited, held.records) < 0.2
    with left_alone(edited), quantisation(edited, "int4", INT4_GROUP):
        assert probability(edited, held.records) > 0.9
        assert probability(edited, held.controls) < 0.01  # never seen: nothing to bring back
    with quantisation(held.without, "int4", INT4_GROUP):
        assert probability(held.without, held.records) < 0.01


def test_control_a_finer_grid_keeps_the_edit() -> None:
    held = holding()
    _, edited = hidden_below_half_a_bin()
    with quantisation(edited, "int8"):
        assert probability(edited, held.records) < 0.25


def test_the_list_of_schemes_is_complete() -> None:
    assert len(set(SCHEMES)) == len(SCHEMES) == 14
