"""SSD: closed forms, identities, bounds, the threshold rule against numpy, the edit on disk against one in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from probes.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from probes.fisher import importance
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.tiny import IMAGE, causal_lm, image_classifier, save, tokenizer
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors import ssd
from unlearn.editors.base import EditContext, EditResult, make_editor
from unlearn.editors.importances import load_importance, save_importance
from unlearn.editors.ssd import (
    Dampening,
    SSDEditor,
    SSDParameters,
    alpha_on_full_scale,
    alpha_on_retain_scale,
    assd_alpha,
    assd_percentile,
    dampen,
    full_set_importance,
    ratio_percentile,
    select_parameters,
)

INF = math.inf


def texts(n: int, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenRecord(f"r{seed}-{i}", tuple(torch.randint(4, vocab, (8,), generator=generator).tolist()), 2, 1)
        for i in range(n)
    ]


def random_importances(seed: int = 0, n: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, retain and forget importances over many orders of magnitude, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator)
    o, f = (10 ** (4 * torch.randn(n, generator=generator) - 12) for _ in range(2))
    o[:100] = 0
    f[50:150] = 0
    return weight, o, f


# --------------------------------------------------------------------------------------------------------------- dampen


def test_closed_form() -> None:
    """Zeros, ties, both sides of the threshold, and the clamp to 1."""
    #                    o=0   f=0  both  tie  above  below  f > o but lambda o > f
    o = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    f = torch.tensor([3.0, 0.0, 0.0, 2.0, 8.0, 1.9, 2.5])
    weight = torch.tensor([5.0, -5.0, 5.0, -5.0, -8.0, 5.0, 7.0])
    damped, what = dampen(weight, o, f, alpha=2.0, lam=3.0)
    assert damped.tolist() == [0.0, -5.0, 5.0, -5.0, -3.0, 5.0, 7.0]
    assert (what.selected, what.elements, what.min_beta) == (3, 7, 0.0)
    assert what.mean_beta == pytest.approx((0 + 3 / 8 + 1) / 3)
    assert dampen(weight, o, f, 2.0, 3.0, floor=0.25)[0].tolist() == [1.25, -5.0, 5.0, -5.0, -3.0, 5.0, 7.0]


@pytest.mark.parametrize(("alpha", "lam"), [(INF, 1.0), (1e30, 1.0), (2.0, INF), (INF, INF), (0.0, INF)])
def test_infinite_settings_change_no_bit(alpha: float, lam: float) -> None:
    """alpha * o and lambda * o are inf * 0 where o = 0: the published code then multiplies weights by NaN."""
    weight, o, f = random_importances()
    o[f == 0] = 0
    if alpha == 1e30:
        o, f = o[100:], f[100:]  # without o = 0, where any f is above the threshold
        weight = weight[100:]
    damped, what = dampen(weight, o, f, alpha, lam)
    assert torch.equal(damped.view(torch.int32), weight.view(torch.int32))
    assert what.selected == 0 or what.min_beta == 1.0


def test_huge_lambda_is_the_identity_except_where_o_is_zero() -> None:
    weight, o, f = random_importances()
    damped, what = dampen(weight, o, f, alpha=2.0, lam=1e30)
    seen = o > 0
    assert what.selected
    assert torch.equal(damped[seen], weight[seen])
    assert damped[(o == 0) & (f > 0)].abs().max() == 0
    assert torch.equal(damped[(o == 0) & (f == 0)], weight[(o == 0) & (f == 0)])


@pytest.mark.parametrize("alpha", [1.0, 1.5, 10.0])
def test_forgetting_everything_known_is_the_identity(alpha: float) -> None:
    """f = o: nothing exceeds alpha o for alpha >= 1."""
    weight, o, _ = random_importances()
    assert dampen(weight, o, o, alpha)[0] is weight


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 50), st.floats(0.01, 5), st.floats(0, 1))
def test_properties(seed: int, alpha: float, lam: float, floor: float) -> None:
    weight, o, f = random_importances(seed, 400)
    damped, what = dampen(weight, o, f, alpha, lam, floor)
    changed = damped != weight
    assert not bool((changed & ~(f > alpha * o)).any())
    assert bool((damped.abs() <= weight.abs()).all())
    assert bool((damped * weight >= 0).all())
    assert bool(damped.isfinite().all())
    if what.selected:
        assert floor - 1e-6 <= what.min_beta <= what.mean_beta + 1e-6 <= 1 + 2e-6
    # the loss's scale does not matter as long as both importances share it (a power of two: no rounding)
    scaled, same = dampen(weight, o * 4.0**5, f * 4.0**5, alpha, lam, floor)
    assert torch.equal(scaled, damped)
    assert same == what
    # a higher threshold selects a subset
    assert not bool(((f > 2 * alpha * o) & ~(f > alpha * o)).any())
    assert dampen(weight, o, f, 2 * alpha, lam, floor)[1].selected <= what.selected


def test_importances_of_the_whole_bound_the_ratio_and_the_factor() -> None:
    for w in (0.01, 0.1, 0.5, 1.0):
        weight, r, f = random_importances()
        o = full_set_importance(f, r, w)
        torch.testing.assert_close(o, (w * f.double() + (1 - w) * r.double()).float(), rtol=1e-6, atol=0)
        assert float((f / o).nan_to_num(0).max()) <= 1 / w * (1 + 1e-6)
        assert dampen(weight, o, f, alpha=1 / w * (1 + 1e-6))[1].selected == 0
        for lam in (0.3, 1.0):
            _, what = dampen(weight, o, f, alpha=0.5 / w, lam=lam)
            assert what.selected
            assert what.min_beta >= lam * w * (1 - 1e-6)


def test_both_scales_select_alike() -> None:
    weight, r, f = random_importances()
    for w in (0.02, 0.3):
        for alpha in (1.5, 3.0):
            there = alpha_on_retain_scale(alpha, w)
            assert alpha_on_full_scale(there, w) == pytest.approx(alpha)
            by_whole = dampen(weight, full_set_importance(f, r, w), f, alpha)[1].selected
            assert by_whole == dampen(weight, r, f, there)[1].selected > 0
    assert alpha_on_retain_scale(50.0, 0.02) == INF
    assert alpha_on_full_scale(INF, 0.02) == 50.0
    assert alpha_on_full_scale(7.0, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_damped_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    weight, o, f = random_importances()
    weight = weight.to(dtype)
    damped, what = dampen(weight, o, f, alpha=2.0)
    mask = f > 2 * o
    expected = weight.float().clone()
    expected[mask] *= (o[mask] / f[mask]).clamp(max=1)
    assert damped.dtype == dtype
    assert torch.equal(damped, expected.to(dtype))
    assert torch.equal(damped[~mask].view(torch.int16), weight[~mask].view(torch.int16))
    assert what.selected == int(mask.sum())


def test_integer_weights_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="floating-point"):
        dampen(torch.ones(3, dtype=torch.int8), torch.zeros(3), torch.ones(3), 1.0)


def test_dampen_equals_the_published_formula_bit_for_bit() -> None:
    """The published code writes every selected weight as p * (o * lambda / f), factors above 1 replaced by 1."""
    weight, o, f = random_importances()
    o = o.clamp(min=1e-30)
    expected = weight.clone()
    for i in torch.nonzero(f > 3.0 * o).flatten().tolist():
        factor = (o[i] * 0.7) / f[i]
        expected[i] *= 1.0 if factor > 1.0 else factor
    assert torch.equal(dampen(weight, o, f, 3.0, 0.7)[0], expected)


# ------------------------------------------------------------------------------------------------------------ threshold


def numpy_percentile(pairs: Sequence[tuple[Tensor, Tensor]], q: float) -> float:
    with np.errstate(all="ignore"):
        ratios = np.concatenate([f.numpy().ravel() / r.numpy().ravel() for f, r in pairs])
    return float(np.percentile(ratios[np.isfinite(ratios)].astype(np.float64), q))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 100), st.integers(1, 400), st.integers(1, 3))
def test_percentile_equals_numpy(seed: int, q: float, n: int, tensors: int) -> None:
    pairs = []
    for i in range(tensors):
        _, r, f = random_importances(seed + i, max(n, 1))
        pairs.append((f[-n:].round(decimals=13), r[-n:].round(decimals=13)))  # with ties
    if not any((f / r).isfinite().any() for f, r in pairs):
        return
    found = ratio_percentile(lambda: iter(pairs), q)
    assert found == pytest.approx(numpy_percentile(pairs, q), rel=1e-12, abs=0)
    assert found == ratio_percentile(lambda: iter(pairs[::-1]), q)


def test_percentile_reads_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, r, f = random_importances(n=3000)
    pairs = [(f.view(3, -1), r.view(3, -1))]
    whole = ratio_percentile(lambda: pairs, 97.3)
    monkeypatch.setattr(ssd, "CHUNK", 7)
    assert ratio_percentile(lambda: pairs, 97.3) == whole == pytest.approx(numpy_percentile(pairs, 97.3), rel=1e-12)


def test_assd_rule() -> None:
    assert assd_percentile(1.0) == pytest.approx(100 - math.log(101))
    assert assd_percentile(0.01) == pytest.approx(100 - math.log(2))
    _, r, f = random_importances()
    alpha = assd_alpha(lambda: [(f, r)], 0.05)
    ratio = f / r
    share = float((ratio[ratio.isfinite()] > alpha).float().mean())
    assert share == pytest.approx(math.log(1 + 5) / 100, abs=1e-3)
    with pytest.raises(UsageError, match="retain"):
        assd_alpha(lambda: [(f, torch.zeros_like(f))], 0.05)


# ------------------------------------------------------------------------------------------------------------ selection


def test_selection_by_default_include_and_exclude() -> None:
    names = ["embed.weight", "h.0.attn.weight", "h.0.norm.weight", "h.1.attn.weight", "head.weight"]
    skipped = ["embed.weight", "h.0.norm.weight"]
    assert select_parameters(names, skipped, (), ()) == ["h.0.attn.weight", "h.1.attn.weight", "head.weight"]
    assert select_parameters(names, skipped, ("*",), ()) == names
    assert select_parameters(names, skipped, ("h.*",), ("*.attn.*",)) == ["h.0.norm.weight"]
    assert select_parameters(names, skipped, (), ("h.0.*", "head.*")) == ["h.1.attn.weight"]
    with pytest.raises(UsageError, match=r"close names: .*h\.1\.attn\.weight"):
        select_parameters(names, skipped, ("h.2.attn.weight",), ())
    with pytest.raises(UsageError, match="matches none"):
        select_parameters(names, skipped, (), ("zzz*",))
    with pytest.raises(UsageError, match="found none"):
        select_parameters(names, skipped, (), ("*",))


def test_default_selection_of_a_model() -> None:
    model_map = ModelMap.of(causal_lm("gpt2"))
    chosen = SSDEditor({}).selected(model_map)
    assert chosen
    assert not [name for name in chosen if "wte" in name or "wpe" in name or ".ln_" in name]


def test_parameters_report_every_mistake_without_values() -> None:
    with pytest.raises(UsageError) as caught:
        SSDEditor({"alpha": "secret", "lambda": -1, "floor": 2, "batch_size": 0, "lamda": 1, "estimator": "secret"})
    text = str(caught.value)
    assert "secret" not in text
    for word in ("6 mistakes", "alpha", "lambda", "floor", "batch_size", "estimator"):
        assert word in text
    for wrong in ({"estimator": "label_free", "labels": "sampled"}, {"draws": 2}, {"alpha": INF}):
        with pytest.raises(UsageError):
            SSDEditor(wrong)
    assert SSDParameters.model_validate({"lambda": 0.1}).lambda_ == 0.1
    editor = make_editor("ssd", {"alpha": 10.0, "draws": 2, "estimator": "token"})
    assert editor.passes(3, 5)["forward_backward"] == 16


# --------------------------------------------------------------------------------------------------------------- files


def test_importance_file_round_trip(tmp_path: Path) -> None:
    tensors = {"b": torch.rand(2, 3, dtype=torch.float64), "a": torch.rand(4)}
    path = tmp_path / "f.safetensors"
    save_importance(path, tensors, {"n": 3, "estimator": "example"})
    stored = load_importance(path)
    assert stored.names == {"a", "b"}
    assert stored.metadata == {"n": 3, "estimator": "example"}
    assert torch.equal(stored.tensor("b"), tensors["b"].float())
    first = path.read_bytes()
    save_importance(path, dict(reversed(tensors.items())), {"estimator": "example", "n": 3})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_damaged_importances_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_importance(path, {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([INF]), "c": torch.tensor([math.nan])}, {})
    for name in "abc":
        with pytest.raises(IntegrityError, match="finite non-negative"):
            load_importance(path).tensor(name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="damaged"):
        load_importance(path)
    save(causal_lm("llama"), None, tmp_path / "model")
    with pytest.raises(IntegrityError, match="other"):
        load_importance(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ResourceError, match="cannot write"):
        save_importance(tmp_path / "missing" / "f.safetensors", {"a": torch.ones(1)}, {})


def test_retain_importances_must_cover_the_edit(tmp_path: Path) -> None:
    f = save_importance(tmp_path / "f.safetensors", {"a": torch.ones(1), "b": torch.ones(1)}, {})
    r = save_importance(tmp_path / "r.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(UsageError, match="none of b"):
        Dampening(f, r, 1.0, 1.0, 0.0, "full", 0.1)


# ----------------------------------------------------------------------------------------------------------- the editor


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNLEARN_CACHE", str(folder))
    return folder


def run(
    checkpoint: Checkpoint,
    out: Path,
    parameters: dict[str, Any],
    forget: Sequence[Any],
    retain: Sequence[Any],
    dtype: str = "float32",
    **context: Any,
) -> EditResult:
    model = checkpoint.load_model(dtype)
    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    options = {"seed": 0, "cache_parts": {"tensors": checkpoint.tensor_digest()}} | context
    editor = make_editor("ssd", parameters)
    return editor.edit(EditContext(checkpoint, model, ModelMap.of(model), forget, retain, work=work, **options), out)


def in_memory(
    model: nn.Module, parameters: dict[str, Any], forget: Sequence[Any], retain: Sequence[Any], w: float
) -> None:
    """The same edit on a live model, without files: the oracle for the streamed one."""
    editor = SSDEditor(parameters)
    p, names = editor.parameters, editor.selected(ModelMap.of(model))
    f, r = (
        importance(model, records, estimator=p.estimator, batch_size=p.batch_size, parameters=names).tensors
        for records in (forget, retain)
    )
    state = dict(model.named_parameters())
    for name in names:
        o = full_set_importance(f[name], r[name], w) if p.importance_scale == "full" else r[name]
        with torch.no_grad():
            state[name].copy_(dampen(state[name].detach(), o, f[name], p.alpha, p.lambda_, p.floor)[0])


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("llama", {"alpha": 1.2}),
        ("llama", {"alpha": 1.2, "estimator": "batch", "batch_size": 3, "importance_scale": "retain"}),
        ("gpt2", {"alpha": 1.1, "include": ["*"], "lambda": 0.5, "floor": 0.1}),  # tied head
        ("mixtral", {"alpha": 1.2, "batch_size": 2}),  # one tensor an expert on disk, one stack in the model
        ("phi3", {"alpha": 1.2, "exclude": ["*.o_proj.weight"]}),
    ],
)
def test_streamed_edit_equals_the_edit_in_memory(
    arch: str, parameters: dict[str, Any], tmp_path: Path, store: Path
) -> None:
    source = save(causal_lm(arch), tokenizer(), tmp_path / "source", shards=2)
    forget, retain = texts(3, 1), texts(6, 2)
    checkpoint = open_checkpoint(source)
    result = run(checkpoint, tmp_path / "out", parameters, forget, retain)
    expected = checkpoint.load_model()
    in_memory(expected, parameters, forget, retain, w=result.parameters["forget_fraction"])
    edited = open_checkpoint(tmp_path / "out").load_model()
    changed = 0
    for (name, a), (_, b), (_, c) in zip(
        edited.named_parameters(), expected.named_parameters(), checkpoint.load_model().named_parameters(), strict=True
    ):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name
        changed += int((a != c).sum())
    assert changed == sum(delta.changed for delta in result.deltas) > 0
    assert result.statistics["selected"] >= changed
    assert result.statistics["selected"] == sum(t["selected"] for t in result.statistics["tensors"].values())
    assert 0 <= result.statistics["min_beta"] <= result.statistics["mean_beta"] <= 1
    json.dumps([result.parameters, result.statistics, result.importances], allow_nan=False)


def test_bfloat16_checkpoint(tmp_path: Path, store: Path) -> None:
    model = causal_lm("llama", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(save(model, None, tmp_path / "source"))
    forget, retain = texts(3, 1), texts(6, 2)
    result = run(checkpoint, tmp_path / "out", {"alpha": 1.2}, forget, retain)
    expected = checkpoint.load_model("float32")
    in_memory(expected, {"alpha": 1.2}, forget, retain, w=1 / 3)
    edited = open_checkpoint(tmp_path / "out")
    for name, tensor in edited.iter_tensors():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, dict(expected.named_parameters())[name].bfloat16()), name
    assert result.deltas


def test_alpha_chosen_by_percentile(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    forget, retain = texts(3, 1), texts(6, 2)
    by_scale = {}
    for scale in ("full", "retain"):
        result = run(checkpoint, tmp_path / scale, {"importance_scale": scale}, forget, retain)
        by_scale[scale] = result
        assert result.importances["retain"]["reused"] is (scale == "retain")
    full, retained = (by_scale[scale].statistics for scale in ("full", "retain"))
    assert full["forget_fraction"] == pytest.approx(1 / 3)
    assert full["alpha"] < 3
    assert full["alpha_retain_scale"] == pytest.approx(retained["alpha"])
    assert full["selected"] == pytest.approx(retained["selected"], abs=2)  # the same weights up to rounding
    share = full["selected"] / full["elements"]
    assert share == pytest.approx(math.log(1 + 100 / 3) / 100, rel=0.05)


def test_alpha_at_the_bound_changes_no_byte_and_warns(tmp_path: Path, store: Path) -> None:
    source = save(causal_lm("llama"), tokenizer(), tmp_path / "source", shards=2)
    options = {"alpha": 3.0, "importance_scale": "full"}
    result = run(open_checkpoint(source), tmp_path / "out", options, texts(3, 1), texts(6, 2))
    assert result.statistics["selected"] == 0
    assert result.statistics["min_beta"] is None
    assert not result.deltas
    assert len(result.warnings) == 1
    assert "|D|/|Df| = 3" in result.warnings[0]
    for path in source.rglob("*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_forget_fraction_of_a_sampled_retain_set(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    options = {"alpha": 3.0, "forget_fraction": 0.01, "importance_scale": "full"}
    result = run(checkpoint, tmp_path / "out", options, texts(3, 1), texts(6, 2))
    assert not result.warnings
    assert result.statistics["selected"] > 0
    assert result.statistics["min_beta"] >= 0.01 * (1 - 1e-6)


def test_fraction_counts_what_the_estimator_averages(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    short = [TokenRecord("s", (5, 6, 7), 1, 1)]
    for estimator, expected in (("example", 1 / 7), ("token", 2 / 38), ("batch", 1 / 3)):
        options = {"estimator": estimator, "batch_size": 4, "alpha": 1.0}
        result = run(checkpoint, tmp_path / estimator, options, short, texts(6, 2))
        assert result.parameters["forget_fraction"] == pytest.approx(expected)


def test_embeddings_on_the_retain_scale_are_warned_about(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    options = {"alpha": 5.0, "importance_scale": "retain", "include": ["model.embed_tokens.weight"]}
    unseen = [TokenRecord("u", (90, 91, 92, 93), 1, 1)]
    seen = [r for r in texts(9, 2) if not {90, 91, 92, 93} & set(r.ids)]
    result = run(checkpoint, tmp_path / "out", options, unseen, seen)
    assert any("embeddings" in warning for warning in result.warnings)
    rows = open_checkpoint(tmp_path / "out").load_tensor("model.embed_tokens.weight")
    assert float(rows[90:93].abs().max()) == 0  # rows that only the record uses have o = 0


def test_idle_expert_is_untouched_and_the_floor_holds(tmp_path: Path, store: Path) -> None:
    """An expert no record routes to has f = o = 0; one that only the records route to has o = 0: the floor's case."""
    model = causal_lm("mixtral", num_hidden_layers=1)
    checkpoint = open_checkpoint(save(model, None, tmp_path / "source"))
    forget, retain = [TokenRecord("f", (5, 6), 1, 1)], [TokenRecord("r", (50, 51), 1, 1)]
    name = next(name for name, p in model.named_parameters() if p.ndim == 3)
    f, r = (importance(model, x, batch_size=1, parameters=[name]).tensors[name] for x in (forget, retain))
    idle = [e for e in range(4) if not f[e].any() and not r[e].any()]
    lost = [e for e in range(4) if f[e].any() and not r[e].any()]
    assert lost
    options = {"alpha": 2.0, "importance_scale": "retain", "floor": 0.25, "include": [name]}
    result = run(checkpoint, tmp_path / "out", options, forget, retain)
    assert result.statistics["min_beta"] == 0.25
    before, after = (
        dict(c.load_model().named_parameters())[name] for c in (checkpoint, open_checkpoint(tmp_path / "out"))
    )
    for expert in idle:
        assert torch.equal(before[expert], after[expert])
    for expert in lost:
        hit = f[expert] > 0
        assert torch.equal(after[expert][hit], before[expert][hit] * 0.25)


def test_image_classifier(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    generator = torch.Generator().manual_seed(0)
    records = [ImageRecord(f"i{i}", torch.randn(3, IMAGE, IMAGE, generator=generator), i % 4) for i in range(8)]
    forget, retain = [r for r in records if r.label == 0], [r for r in records if r.label]
    result = run(checkpoint, tmp_path / "out", {"alpha": 1.5, "batch_size": 4}, forget, retain)
    expected = checkpoint.load_model()
    in_memory(expected, {"alpha": 1.5, "batch_size": 4}, forget, retain, w=0.25)
    edited = dict(open_checkpoint(tmp_path / "out").load_model().named_parameters())
    assert all(torch.equal(edited[name], p) for name, p in expected.named_parameters())
    assert result.statistics["selected"] > 0


def test_retain_importances_are_measured_once(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    retain, measured = texts(6, 2), []

    def counted(model: nn.Module, records: Sequence[Any], **options: Any) -> Any:
        measured.append(len(records))
        return importance(model, records, **options)

    monkeypatch.setattr(ssd, "importance", counted)
    first = run(checkpoint, tmp_path / "a", {"alpha": 1.2}, texts(3, 1), retain)
    again = run(checkpoint, tmp_path / "b", {"alpha": 1.2}, texts(3, 1), retain, seed=5)
    other = run(checkpoint, tmp_path / "c", {"alpha": 1.3}, texts(2, 7), retain)
    assert measured == [6, 3, 3, 2]
    assert [r.importances["retain"]["reused"] for r in (first, again, other)] == [False, True, True]
    assert first.deltas.tensor_digest == again.deltas.tensor_digest

    run(checkpoint, tmp_path / "d", {"alpha": 1.2, "estimator": "batch"}, texts(2, 7), retain)
    run(checkpoint, tmp_path / "e", {"alpha": 1.2}, texts(2, 7), retain[1:])
    run(checkpoint, tmp_path / "f", {"alpha": 1.2}, texts(2, 7), retain, cache_parts={"tensors": "another"})
    for out in "gh":  # nothing identifies the model
        run(checkpoint, tmp_path / out, {"alpha": 1.2}, texts(2, 7), retain, cache_parts={})
    assert measured[4:] == [6, 2, 5, 2, 6, 2, 6, 2, 6, 2]

    for path in store.rglob("*.safetensors"):
        path.chmod(0o600)
        path.write_bytes(b"damaged")
    mended = run(checkpoint, tmp_path / "i", {"alpha": 1.2}, texts(3, 1), retain)
    assert mended.importances["retain"]["reused"] is False
    assert mended.deltas.tensor_digest == first.deltas.tensor_digest


def test_sampled_labels_depend_on_the_seed(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    options = {"alpha": 1.2, "labels": "sampled"}
    digests = [
        run(checkpoint, tmp_path / f"{i}", options, texts(3, 1), texts(6, 2), seed=seed).deltas.tensor_digest
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_no_retain_set_is_an_error(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    with pytest.raises(UsageError, match="retain"):
        run(checkpoint, tmp_path / "out", {}, texts(2), [])


def test_progress_covers_both_sets(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama"), None, tmp_path / "source"))
    seen: list[tuple[int, int]] = []
    options = {"alpha": 1.2, "batch_size": 2}
    run(checkpoint, tmp_path / "a", options, texts(3, 1), texts(4, 2), progress=lambda *at: seen.append(at))
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    seen.clear()
    run(checkpoint, tmp_path / "b", options, texts(3, 1), texts(4, 2), progress=lambda *at: seen.append(at))
    assert seen == [(2, 3), (3, 3)]
