"""Condition figures against numpy in float64, closed forms, random matrices of many shapes, and published defects."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from probes.condition import (
    COLUMNS,
    condition,
    condition_table,
    gaussian_condition,
    lowest,
    singular_values,
    stored_condition_table,
)
from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap
from tests.tiny import causal_lm, image_classifier

F64 = torch.float64


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values: list[float], p: int, q: int, seed: int = 0) -> Tensor:
    """A float64 matrix [p, q] with these singular values."""
    m = min(p, q)
    left, right = (torch.linalg.qr(gaussian(side, m, seed=seed + i)).Q for i, side in enumerate((p, q)))
    return left @ torch.diag(torch.tensor(values, dtype=F64)) @ right.T


def oracle(matrix: Tensor) -> tuple[float, float, float]:
    """kappa, stable rank and effective rank by numpy, from the definitions."""
    array = matrix.double().numpy()
    s = np.linalg.svd(array, compute_uv=False)
    r = s / s.sum()
    return np.linalg.cond(array), (array**2).sum() / np.linalg.norm(array, 2) ** 2, np.exp(-(r * np.log(r)).sum())


# --------------------------------------------------------------------------------------------------------- one matrix


@pytest.mark.parametrize(("p", "q"), [(7, 7), (5, 40), (40, 5), (3, 6), (1, 9)])
def test_figures_equal_the_definitions(p: int, q: int) -> None:
    matrix = gaussian(p, q, seed=p)
    found = condition(matrix)
    assert (found.kappa, found.stable_rank, found.effective_rank) == pytest.approx(oracle(matrix), rel=1e-10)
    assert found.rank == min(p, q)
    expected = gaussian_condition(p, q)
    assert found.kappa_relative == pytest.approx(found.kappa / expected.kappa)
    assert found.stable_rank_share == pytest.approx(found.stable_rank / expected.stable_rank)
    assert found.effective_rank_share == pytest.approx(found.effective_rank / expected.effective_rank)


def test_known_spectrum() -> None:
    found = condition(with_values([8.0, 4.0, 4.0], 5, 3))
    assert found.kappa == pytest.approx(2.0)
    assert found.stable_rank == pytest.approx((64 + 16 + 16) / 64)
    assert found.effective_rank == pytest.approx(2 ** (0.5 + 2 * 0.25 * 2))  # entropy of (1/2, 1/4, 1/4), in bits


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_orthogonal_matrices_are_perfectly_conditioned(dtype: torch.dtype) -> None:
    matrix = torch.linalg.qr(gaussian(24, 10)).Q.to(dtype)  # [24, 10] with orthonormal columns
    found = condition(matrix)
    assert found.kappa == pytest.approx(1.0, abs=1e-6)
    assert (found.stable_rank, found.effective_rank) == pytest.approx((10.0, 10.0), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_figures_do_not_depend_on_scale_or_side(scale: float) -> None:
    matrix = gaussian(12, 20)
    figures = [
        condition(matrix),
        condition(matrix.T),
        condition((scale * matrix).float() if scale > 1e-9 else scale * matrix),
    ]
    for other in figures[1:]:
        assert other.kappa == pytest.approx(figures[0].kappa, rel=1e-5)
        assert other.effective_rank == pytest.approx(figures[0].effective_rank, rel=1e-5)
        assert other.stable_rank_share == pytest.approx(figures[0].stable_rank_share, rel=1e-5)


def test_rank_deficient_matrices_have_no_kappa() -> None:
    low = gaussian(20, 3) @ gaussian(3, 30, seed=1)
    for matrix in (low, low.float(), low.float().T):  # rounding to fp32 leaves singular values that mean nothing
        found = condition(matrix)
        assert found.kappa is None
        assert found.kappa_relative is None
        assert found.rank == 3
        assert found.stable_rank <= 3
        assert found.effective_rank <= 3.001
    dead = gaussian(6, 8)
    dead[2] = 0
    assert condition(dead).rank == 5
    assert condition(torch.zeros(4, 5)) == condition(torch.zeros(5, 4))
    assert condition(torch.zeros(4, 5)).rank == 0
    assert condition(torch.ones(4, 5)).rank == 1


def test_badly_conditioned_matrices_still_have_a_kappa() -> None:
    matrix = with_values([1.0, 0.5, 1e-5], 6, 3)
    assert condition(matrix.float()).kappa == pytest.approx(1e5, rel=1e-2)
    assert condition(with_values([1.0, 0.5, 1e-10], 6, 3)).kappa == pytest.approx(1e10, rel=1e-4)
    assert condition(with_values([1.0, 0.5, 1e-10], 6, 3).float()).kappa is None


def test_half_precision_weights_are_measured_as_they_are_stored() -> None:
    stored = gaussian(64, 64, dtype=torch.float32).bfloat16()
    found = condition(stored)
    assert found.kappa == pytest.approx(oracle(stored)[0], rel=1e-9)
    assert found.rank == 64


def test_tall_and_large_matrices_take_other_routes_to_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(30, 90)
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert singular_values(matrix).dtype == F64
    np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-12)
    monkeypatch.setattr("probes.condition.DOUBLE_SIDE", 16)
    assert singular_values(matrix).dtype == torch.float32
    np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-5)
    monkeypatch.setattr("probes.condition.TALL", 4)
    np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-5)


def test_no_singular_vectors_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code decomposes fully and reads the values only."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a full decomposition")

    for owner, name in ((torch, "svd"), (torch.linalg, "svd"), (torch.linalg, "eigh")):
        monkeypatch.setattr(owner, name, refuse)
    assert condition(gaussian(9, 4)).rank == 4


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(0, 4)])
def test_what_is_no_matrix_is_refused(matrix: Tensor) -> None:
    with pytest.raises(UsageError, match="expected a matrix"):
        condition(matrix)


def test_numbers_without_a_spectrum_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="dequantise"):
        condition(torch.ones(3, 3, dtype=torch.int8))
    for bad in (torch.nan, torch.inf):
        matrix = gaussian(4, 4)
        matrix[1, 2] = bad
        with pytest.raises(UnsupportedError, match="finite"):
            condition(matrix)


# ------------------------------------------------------------------------------------------------- Gaussian of a shape

SHAPES = [(16, 16), (64, 64), (70, 64), (64, 96), (64, 256), (256, 64), (16, 1024), (128, 128), (200, 210)]


@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_gaussian_matrices_of_any_shape_are_about_one(p: int, q: int) -> None:
    draws = [condition(gaussian(p, q, seed=seed)) for seed in range(60)]
    assert np.median([d.kappa_relative for d in draws]) == pytest.approx(1.0, abs=0.25)
    assert np.mean([d.stable_rank_share for d in draws]) == pytest.approx(1.0, abs=0.03)
    assert np.mean([d.effective_rank_share for d in draws]) == pytest.approx(1.0, abs=0.02)
    if max(p, q) >= 4 * min(p, q):  # away from square, every single draw is close
        assert all(abs(d.kappa_relative - 1) < 0.1 for d in draws if d.kappa_relative)


def test_without_the_reference_shapes_could_not_be_compared() -> None:
    square, wide = condition(gaussian(64, 64)), condition(gaussian(16, 1024))
    assert square.kappa > 30 * wide.kappa
    assert 1 / 8 < square.kappa_relative / wide.kappa_relative < 8


def test_the_reference_of_a_square_matrix_is_edelmans_median() -> None:
    """P(kappa / n < x) = exp(-2/x - 2/x^2) for real Gaussian matrices of growing side n (Edelman 1988)."""
    median = 1 / ((-2 + np.sqrt(4 + 8 * np.log(2))) / 4)
    for n in (64, 500, 2000):
        assert gaussian_condition(n, n).kappa / n == pytest.approx(median, rel=0.1)


# -------------------------------------------------------------------------------------------------------------- tables


def test_every_projection_of_a_language_model_is_measured() -> None:
    model = causal_lm("gpt2")
    table = condition_table(model)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 3 * 4
    assert table["block"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table["role"].tolist()[:4] == ["qkv", "o", "up", "down"]
    row = table.iloc[0]
    weight = model.get_submodule("transformer.h.0.attn.c_attn").weight  # Conv1D, stored [in, out]
    assert (row["name"], row["shape"]) == ("transformer.h.0.attn.c_attn.weight", (96, 32))
    assert row["kappa"] == pytest.approx(oracle(weight.detach())[0], rel=1e-9)
    assert pd.isna(row["expert"])


def test_stacked_experts_are_measured_slice_by_slice() -> None:
    model = causal_lm("mixtral")
    table = condition_table(model, modules=["*.experts.down_proj"])
    assert table["expert"].tolist() == [0, 1, 2, 3] * 2
    weight = model.get_submodule("model.layers.1.mlp.experts").down_proj.detach()
    row = table.set_index("name").loc["model.layers.1.mlp.experts.down_proj[2]"]
    assert row["shape"] == (32, 48)
    assert row["kappa"] == pytest.approx(oracle(weight[2])[0], rel=1e-9)


def test_transposed_experts_are_turned_round() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = causal_lm("gpt_oss", num_attention_heads=4, num_key_value_heads=2, head_dim=8, **sizes)
    model.config._experts_implementation = "eager"
    table = condition_table(model, modules=["*.experts.*"])
    assert table["shape"].tolist() == [(96, 32)] * 2 + [(32, 48)] * 2
    weight = model.get_submodule("model.layers.0.mlp.experts").down_proj.detach()  # [E, in, out]
    assert table["kappa"][3] == pytest.approx(oracle(weight[1])[0], rel=1e-9)


def test_convolutions_are_measured_and_not_skipped() -> None:
    """The published code takes svd of four dimensions, fails to compare the result and drops the tensor."""
    model = image_classifier("resnet")
    table = condition_table(model).set_index("name")
    convolutions = {name: p for name, p in model.named_parameters() if p.ndim == 4 and "shortcut" not in name}
    assert set(convolutions) <= set(table.index)
    for name, weight in convolutions.items():
        assert table.loc[name, "kappa"] == pytest.approx(oracle(weight.detach().flatten(1))[0], rel=1e-9)
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert table.loc[name, "shape"] == (8, 8 * 9)


def test_the_patch_projection_is_measured_but_head_and_embeddings_only_on_request() -> None:
    vit = condition_table(image_classifier("vit"))
    assert vit["role"].tolist()[0] == "patch"
    assert pd.isna(vit["block"][0])
    assert "head" not in set(vit["role"])
    assert condition_table(causal_lm("llama"), modules=["lm_head.*"])["role"].tolist() == ["head"]


def test_plain_modules_have_a_table_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))
    assert condition_table(model, modules=["1.*"])["shape"].tolist() == [(7, 12)]


def test_tables_say_what_is_wrong() -> None:
    model = causal_lm("llama")
    with pytest.raises(UsageError, match=r"mlp\.up_project.*up_proj"):
        condition_table(model, modules=["model.layers.0.mlp.up_project.weight"])
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedError, match=r"finite.*\(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        condition_table(model)


def test_progress_and_the_model_is_left_alone() -> None:
    model = causal_lm("llama").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[tuple[int, int]] = []
    condition_table(model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 21) for i in range(21)]
    assert model.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "llama"])
def test_a_stream_of_tensors_has_the_same_figures(arch: str) -> None:
    model = causal_lm(arch)
    live, model_map = condition_table(model), ModelMap.of(model)
    skip = {name for name, role in model_map.roles.items() if role in ("embedding", "head", "position")}
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if name not in skip:
                alive.append(parameter.ndim)
                yield name, parameter.detach().clone()

    mapped = stored_condition_table(stream(), model_map=model_map)
    pd.testing.assert_frame_equal(
        mapped.sort_values("name", ignore_index=True), live.sort_values("name", ignore_index=True)
    )
    assert 1 in alive  # vectors came by and were skipped
    bare = stored_condition_table(stream()).set_index("name").loc[mapped["name"]]
    np.testing.assert_allclose(bare["kappa_relative"], mapped["kappa_relative"], rtol=1e-9)
    assert bare["block"].isna().all()
    assert bare["expert"].tolist() == mapped["expert"].tolist() or arch != "mixtral"


def test_a_streamed_one_dimensional_convolution_is_no_stack_of_experts() -> None:
    weight = gaussian(6, 4, 3)
    table = stored_condition_table([("mixer.conv1d.weight", weight), ("experts.up", weight), ("bias", weight[0, 0])])
    assert table["shape"].tolist() == [(6, 12)] + [(4, 3)] * 6
    assert table["kappa"][0] == pytest.approx(oracle(weight.flatten(1))[0])


def test_streaming_holds_one_tensor_at_a_time() -> None:
    references: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            assert all(reference() is None for reference in references[:-1])
            tensor = gaussian(5, 5, seed=i)
            references.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor

    assert len(stored_condition_table(stream())) == 4


def test_lowest_orders_ties_by_name_and_deficient_ones_last() -> None:
    """The published code cuts a list made from a set, so equal scores fall in an order that changes between runs."""
    tensors = [("b", torch.eye(3)), ("c", torch.zeros(3, 3)), ("a", torch.eye(3)), ("d", gaussian(3, 3))]
    table = stored_condition_table(tensors)
    assert lowest(table, 2) == ["a", "b"]
    assert lowest(table, 9) == ["a", "b", "d", "c"]
    for seed in range(5):
        shuffled = table.sample(frac=1, random_state=seed)
        assert lowest(shuffled, 9, by="kappa") == ["a", "b", "d", "c"]
    for column, count in (("shape", 1), ("kappa", 0)):
        with pytest.raises(UsageError, match="expected one of kappa"):
            lowest(table, count, by=column)
