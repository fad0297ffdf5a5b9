"""The curvature and SVD editors: selection, the edit on disk against one by hand, identities, factor files, store."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probes.curvature.ekfac import corrected_masses
from probes.curvature.factors import Factor, KroneckerFactors, kronecker_factors
from probes.curvature.kronecker import eigenbasis
from probes.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.taps import Site, sites
from tests.tiny import IMAGE, causal_lm, image_classifier, save, tokenizer
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint
from unlearn.editors import kfac
from unlearn.editors.base import EditContext, EditResult, make_editor
from unlearn.editors.factorfile import load_factors, save_factors
from unlearn.editors.kfac import KFACEditor, KFACParameters
from unlearn.editors.linearmaps import LinearMapEdit, _groups, matrix, mean_loss, swapped
from unlearn.editors.selection import MapParameters, default_blocks, select_maps, values_of
from unlearn.editors.svd import SVDEditor, SVDParameters
from unlearn.requests.presets import load_method

ROOT = Path(__file__).resolve().parents[2]
# Enough positions for the widest side below, 128 (GPT-2's feed-forward); the strings of `texts` count 11 each.
N = 24


def texts(n: int = N, seed: int = 0, length: int = 12) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenRecord(f"r{seed}-{i}", tuple(torch.randint(4, 96, (length,), generator=generator).tolist()), 3, 1)
        for i in range(n)
    ]


def pictures(n: int, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [ImageRecord(f"i{i}", torch.randn(3, IMAGE, IMAGE, generator=generator), i % 4) for i in range(n)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNLEARN_CACHE", str(folder))
    return folder


@pytest.fixture
def llama(tmp_path: Path, store: Path) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path / "source", shards=2))


def run(
    checkpoint: Checkpoint,
    out: Path,
    parameters: dict[str, Any],
    retain: Sequence[Any],
    *,
    method: str = "kfac",
    dtype: str = "float32",
    model: nn.Module | None = None,
    **context: Any,
) -> EditResult:
    model = model or checkpoint.load_model(dtype)
    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    options = {"seed": 0, "cache_parts": {"tensors": checkpoint.tensor_digest()}} | context
    editor = make_editor(method, parameters)
    return editor.edit(EditContext(checkpoint, model, ModelMap.of(model), [], retain, work=work, **options), out)


def by_hand(a: Tensor, g: Tensor, weight: Tensor, rho: float, mass: Tensor | None = None) -> Tensor:
    """The edit in numpy: eigenvectors, every product, a sort, one rank-one term a pair."""
    mu, u_a = np.linalg.eigh(a.double().numpy())
    lam, u_g = np.linalg.eigh(g.double().numpy())
    pi = np.outer(lam, mu) if mass is None else mass.double().numpy()
    order = np.argsort(-pi, axis=None)
    k = int(np.searchsorted(np.cumsum(pi.flat[order]), rho * pi.sum())) + 1
    c = u_g.T @ weight.double().numpy() @ u_a
    new = np.zeros_like(c)
    for i, j in zip(*np.unravel_index(order[:k], pi.shape), strict=True):
        new += c[i, j] * np.outer(u_g[:, i], u_a[:, j])
    return torch.from_numpy(new)


def edited_by_hand(checkpoint: Checkpoint, keys: Sequence[str], retain: Sequence[Any], rho: float) -> nn.Module:
    model = checkpoint.load_model()
    factors = kronecker_factors(model, retain, modules=keys).factors
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, factor in factors.items():
            tensor = parameters[factor.parameter]
            if factor.expert is not None:
                tensor = tensor[factor.expert]
            weight = tensor.T if factor.orientation == "in_out" else tensor.flatten(1)
            new = by_hand(factor.a, factor.g, weight, rho)
            assert key in keys
            tensor.copy_((new.T if factor.orientation == "in_out" else new).reshape(tensor.shape))
    return model


# ------------------------------------------------------------------------------------------------------------ selection


def test_the_blocks_of_auto_were_fixed_beforehand() -> None:
    assert default_blocks(32, True) == (23, 24, 25)
    assert default_blocks(16, True) == (11, 12)
    assert default_blocks(30, True) == (22, 23)
    assert default_blocks(28, True) == (20, 21, 22)
    assert default_blocks(12, True) == (9,)
    for n in range(1, 200):
        found = default_blocks(n, True)
        assert found
        assert all(0 <= i < n for i in found)
        assert abs(len(found) - n * 3 / 32) <= 1 or found == (int(n * 49 / 64),)
    assert [default_blocks(n, False) for n in (1, 2, 12)] == [(0,), (0, 1), (0, 11)]


def keys(arch: str, **parameters: Any) -> list[str]:
    make = image_classifier if arch in ("vit", "resnet", "swin") else causal_lm
    return [site.key for site in select_maps(ModelMap.of(make(arch)), MapParameters(**parameters))]


def test_selection() -> None:
    assert keys("llama") == [f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up")]
    assert keys("gpt2") == ["transformer.h.2.mlp.c_fc"]
    assert keys("phi3") == ["model.layers.1.mlp.gate_up_proj"]
    assert keys("mixtral") == [f"model.layers.1.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    assert keys("vit") == [f"vit.layers.{i}.mlp.fc{k}" for i in (0, 2) for k in (1, 2)]
    assert len(keys("resnet")) == len(keys("resnet", blocks=[0, -1])) > 1  # no up, no down: every convolution
    assert keys("llama", blocks=[0, -1], roles=["down"]) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]
    assert keys("llama", blocks=[-1, 2]) == keys("llama")
    assert keys("llama", include=["*.0.*.q_proj", "*.1.mlp.*"], exclude=["*.up_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert KFACEditor({}).selected(ModelMap.of(causal_lm("mixtral"))) == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert SVDEditor({"roles": ["q"]}).selected(ModelMap.of(causal_lm("llama"))) == [
        "model.layers.2.self_attn.q_proj.weight"
    ]


def test_selection_refuses_what_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"close names: .*model\.layers\.1\.mlp\.gate_proj"):
        keys("llama", include=["model.layers.1.mlp.gate"])
    with pytest.raises(UsageError, match=r"blocks from -3 to 2, found 3"):
        keys("llama", blocks=[3])
    with pytest.raises(UsageError, match="roles among"):
        keys("llama", roles=["gates"])
    with pytest.raises(UsageError, match="matches none"):
        keys("llama", exclude=["*.down_proj"])
    with pytest.raises(UsageError, match="found none"):
        keys("llama", exclude=["*"])
    with pytest.raises(UnsupportedError, match="head"):
        keys("gpt2", include=["lm_head"])  # tied to the embedding, too


def test_a_value_for_every_map() -> None:
    maps = sites(ModelMap.of(causal_lm("llama")), ["model.layers.*.mlp.*"])

    def values(by: dict[str, float]) -> list[float]:
        return list(values_of(maps, by, 0.5, "rho_by").values())

    assert values({}) == [0.5] * 9
    assert values({"gate": 0.1}) == [0.1, 0.5, 0.5] * 3
    entries = {"gate": 0.1, "*.1.*": 0.2, "model.layers.1.mlp.up_proj": 0.3, "*.layers.2.mlp.*": 0.4}
    for by in (entries, dict(reversed(entries.items()))):  # the order does not count
        assert values(by) == [0.1, 0.5, 0.5, 0.2, 0.3, 0.2, 0.4, 0.4, 0.4]
    assert values({"*.1.*": 0.2, "*.mlp.gate_proj": 0.2})[3] == 0.2
    with pytest.raises(UsageError, match=r"one value for model\.layers\.1\.mlp\.gate_proj in rho_by"):
        values({"*.layers.1.*.g*": 0.2, "*.1.mlp.gate_*": 0.3})
    with pytest.raises(UsageError, match="matches none"):
        values({"*.attn.*": 0.2})


def test_parameters_report_every_mistake_without_values() -> None:
    wrong = {
        "rho": "secret",
        "rho_by": {"secret": 1.5},
        "blocks": "secret",
        "roles": [],
        "labels": "secret",
        "positions": "last",
        "max_records": 0,
        "min_positions": -1,
        "rhoo": 1,
    }
    with pytest.raises(UsageError) as caught:
        KFACEditor(wrong)
    text = str(caught.value)
    assert "secret" not in text
    assert "9 mistakes" in text
    for name in ("`rho`", "`rho_by`", "`blocks`", "`roles`", "`labels`", "`positions`", "max_records", "min_positions"):
        assert name in text, name
    for share in (0, -0.1, 1.001, True, math.nan, math.inf):
        for option in ({"rho": share}, {"rho_by": {"gate": share}}):
            with pytest.raises(UsageError):
                KFACEditor(option)
        with pytest.raises(UsageError):
            SVDEditor({"fraction": share})
    with pytest.raises(UsageError, match="found both"):
        KFACEditor({"include": ["*"], "blocks": [1]})
    for share in (1, 1.0, 0.25):  # a whole number is a number
        assert KFACEditor({"rho": share, "rho_by": {"up": share}}).parameters.rho == share


def test_passes_of_the_plan() -> None:
    assert make_editor("kfac", {}).passes(0, 5) == {"forward": 10, "forward_backward": 5}
    options = {"correction": "ekfac", "max_records": 4}
    assert make_editor("kfac", options).passes(3, 5) == {"forward": 8, "forward_backward": 8}
    assert make_editor("kfac", {"factors": "f"}).passes(3, 5) == {"forward": 10, "forward_backward": 0}
    assert make_editor("svd", {}).passes(3, 5) == {"forward": 10, "forward_backward": 0}


@pytest.mark.parametrize(("name", "schema"), [("kfac", KFACParameters), ("svd", SVDParameters)])
def test_presets_list_the_defaults_and_the_page_documents_them(name: str, schema: Any) -> None:
    preset = load_method(name).parameters
    assert preset == schema().model_dump(mode="json")
    text = (ROOT / "docs" / "kfac.md").read_text()
    for option, default in preset.items():
        shown = str(default) if isinstance(default, int | float) else f"`{json.dumps(default).strip(chr(34))}`"
        assert f"| `{option}` | {shown} |" in text, f"docs/kfac.md: {option}, default {default}"


def test_the_published_values() -> None:
    preset = load_method("kfac_paper_olmo2_7b")
    p = KFACEditor(preset.parameters).parameters
    assert (preset.name, p.rho, p.blocks, p.roles, p.labels) == ("kfac", 0.6, (23, 24, 25), ("gate", "up"), "gold")


# ----------------------------------------------------------------------------------------------------- the edit on disk


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("llama", {}),
        ("llama", {"include": ["*.0.*", "*.2.*.o_proj"]}),
        ("gpt2", {"blocks": [0, 2], "roles": ["up", "qkv"]}),  # Conv1D: [in, out]
        ("phi3", {}),  # gate and up fused
        ("mixtral", {}),  # one tensor an expert and projection on disk, one stack of both in the model
        ("qwen3_moe", {"roles": ["gate_up", "down"]}),
    ],
)
def test_the_edit_equals_one_by_hand(arch: str, parameters: dict[str, Any], tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm(arch), tokenizer(), tmp_path / "source", shards=2))
    retain = texts(40)
    options = {"rho": 0.7, "min_positions": 0.5} | parameters
    result = run(checkpoint, tmp_path / "out", options, retain)
    chosen = list(result.statistics["modules"])
    assert len(chosen) == len(select_maps(ModelMap.of(checkpoint.load_model()), _maps_of(options)))
    expected = edited_by_hand(checkpoint, chosen, retain, 0.7)
    edited, original = (c.load_model() for c in (open_checkpoint(tmp_path / "out"), checkpoint))
    hit = set(KFACEditor(options).selected(ModelMap.of(original)))
    for (name, a), (_, b), (_, c) in zip(
        edited.named_parameters(), expected.named_parameters(), original.named_parameters(), strict=True
    ):
        if name in hit:
            torch.testing.assert_close(a, b, rtol=0, atol=2e-7)
            assert not torch.equal(a, c)
        else:
            assert torch.equal(a.view(torch.int32), c.view(torch.int32)), name
    statistics = result.statistics
    assert statistics["kept_pairs"] == sum(m["kept_pairs"] for m in statistics["modules"].values())
    assert all(0.7 <= m["mass"] < 1 and 0 < m["kept_norm"] < 1 for m in statistics["modules"].values())
    assert all(0 < delta.rel_norm < 1 for delta in result.deltas)
    json.dumps([result.parameters, statistics, result.importances], allow_nan=False)


def _maps_of(options: dict[str, Any]) -> MapParameters:
    return MapParameters(**{name: value for name, value in options.items() if name in MapParameters.model_fields})


def test_keeping_everything_changes_no_byte(llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", {"rho": 1, "include": ["*"]}, texts())
    assert not result.deltas
    assert result.statistics["kept_pairs"] == result.statistics["pairs"] > 0
    assert (result.statistics["predicted_rise"], result.statistics["measured_rise"]) == (0.0, 0.0)
    for path in llama.path.rglob("*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    mixed = run(llama, tmp_path / "mixed", {"rho": 0.5, "rho_by": {"up": 1.0}}, texts())
    assert [delta.name for delta in mixed.deltas] == ["model.layers.2.mlp.gate_proj.weight"]
    up = mixed.statistics["modules"]["model.layers.2.mlp.up_proj"]
    assert (up["rho"], up["mass"], up["kept_norm"], up["kept_pairs"]) == (1.0, 1.0, 1.0, up["pairs"])


def test_the_edit_is_idempotent_on_the_same_factors(llama: Checkpoint, tmp_path: Path) -> None:
    """Twice with the same factors is once: the second edit drops only what rounding left."""
    model = llama.load_model()
    maps = select_maps(ModelMap.of(model), MapParameters())
    factors = kronecker_factors(model, texts(), modules=[site.key for site in maps])
    weights = []
    checkpoint = llama
    for i in range(2):
        path = tmp_path / f"{i}.safetensors"
        save_factors(path, factors, tensor_digest=checkpoint.tensor_digest(), digest="sha256:0")
        run(checkpoint, tmp_path / f"out{i}", {"factors": str(path)}, texts())
        checkpoint = open_checkpoint(tmp_path / f"out{i}")
        weights.append(checkpoint.load_tensor("model.layers.2.mlp.up_proj.weight"))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-8)
    assert not torch.equal(weights[0], llama.load_tensor("model.layers.2.mlp.up_proj.weight"))


def test_bfloat16_on_disk_is_rounded_once(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama", dtype=torch.bfloat16), None, tmp_path / "source"))
    result = run(checkpoint, tmp_path / "out", {}, texts())
    expected = edited_by_hand(checkpoint, list(result.statistics["modules"]), texts(), 0.6)
    copy = open_checkpoint(tmp_path / "out")
    for delta in result.deltas:
        found, wanted = copy.load_tensor(delta.name), dict(expected.named_parameters())[delta.name]
        assert found.dtype == torch.bfloat16
        # the oracle rounds to float32 first, which may fall on a tie of bfloat16
        assert float((found != wanted.bfloat16()).double().mean()) < 0.01
        torch.testing.assert_close(found, wanted.bfloat16())


def test_a_run_in_half_precision_leaves_the_rest_of_a_float32_checkpoint(llama: Checkpoint, tmp_path: Path) -> None:
    """The difference goes to disk, not the model's rounded weight."""
    name = "model.layers.2.mlp.up_proj.weight"
    result = run(llama, tmp_path / "out", {"rho": 0.999999}, texts(), dtype="bfloat16")
    before, after = llama.load_tensor(name), open_checkpoint(tmp_path / "out").load_tensor(name)
    kept = result.statistics["modules"]["model.layers.2.mlp.up_proj"]["kept_norm"]
    moved = float((after - before).square().sum() / before.square().sum())
    assert moved == pytest.approx(1 - kept, rel=0.02, abs=1e-12)
    assert moved < 0.2


def test_a_live_model_is_untouched_and_its_copy_edited(tmp_path: Path, store: Path) -> None:
    model = causal_lm("gpt2")
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    live = LiveCheckpoint(model)
    result = run(live, tmp_path / "out", {"rho": 0.5}, texts(), model=model)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    copy = live.reopen(tmp_path / "out").load_model()
    changed = [n for n, p in copy.named_parameters() if not torch.equal(p, before[n][1])]
    assert changed == ["transformer.h.2.mlp.c_fc.weight"] == [delta.name for delta in result.deltas]


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_the_measured_rise_is_that_of_the_copy(arch: str, tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm(arch), None, tmp_path / "source"))
    result = run(checkpoint, tmp_path / "out", {"rho": 0.4, "min_positions": 0.5}, texts(40))
    copy = open_checkpoint(tmp_path / "out").load_model()
    original = checkpoint.load_model()
    assert result.statistics["loss_before"] == mean_loss(ModelMap.of(original), texts(40))
    assert result.statistics["loss_after"] == mean_loss(ModelMap.of(copy), texts(40))
    rise = result.statistics["loss_after"] - result.statistics["loss_before"]
    assert result.statistics["measured_rise"] == rise != 0


def test_the_predicted_rise_is_that_of_the_dense_curvature(llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", {"rho": 0.5}, texts())
    model, copy = llama.load_model(), open_checkpoint(tmp_path / "out").load_model()
    factors = kronecker_factors(model, texts(), modules=list(result.statistics["modules"]))
    total = 0.0
    for key, factor in factors.factors.items():
        name = f"{key}.weight"
        new, old = (dict(m.named_parameters())[name].detach().double() for m in (copy, model))
        step = (new - old).flatten()
        dense = torch.kron(factor.g.double(), factor.a.double())
        rise = 0.5 * factors.positions_per_loss(key) * float(step @ dense @ step)
        assert factors.positions_per_loss(key) == 11 / 9  # prompts count as positions, not as losses
        assert result.statistics["modules"][key]["predicted_rise"] == pytest.approx(rise, rel=1e-4)
        total += rise
    assert result.statistics["predicted_rise"] == pytest.approx(total, rel=1e-4)


def test_the_factors_are_the_curvature_where_they_have_to_be(tmp_path: Path, store: Path) -> None:
    """A softmax classifier with tiny weights, every image labelled with every class in turn.

    Its predictions are uniform whatever x is, so A (x) G is the Hessian exactly; the best weights are 0, so the loss
    rises from there by the quadratic form, and the measured change is a difference of two such forms.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(1e-2)
    x = torch.randn(40, 3, 2, 2, generator=generator) * torch.linspace(0.2, 2, 12).view(3, 2, 2)
    retain = [ImageRecord(f"{i}-{k}", x[i], k) for i in range(40) for k in range(4)]
    live = LiveCheckpoint(model)
    result = run(live, tmp_path / "out", {"rho": 0.5, "include": ["1"], "labels": "gold"}, retain, model=model)
    factor = kronecker_factors(model, retain, modules=["1"], labels="gold").factors["1"]
    before, after = (m[1].weight.detach().double() for m in (model, live.reopen(tmp_path / "out").load_model()))

    def form(w: Tensor) -> float:
        return 0.5 * float(torch.einsum("ij,ik,kl,jl->", w, factor.g.double(), w, factor.a.double()))

    assert result.statistics["measured_rise"] == pytest.approx(form(after) - form(before), rel=0.02)
    assert result.statistics["predicted_rise"] == pytest.approx(form(after - before), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("positions", ["all", "first"])
def test_image_classifier(positions: str, tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    retain = pictures(16 if positions == "all" else 60)
    result = run(checkpoint, tmp_path / "out", {"positions": positions}, retain)
    assert result.parameters["rho"] == 0.75
    modules = result.statistics["modules"]
    assert list(modules) == [f"vit.layers.{i}.mlp.fc{k}" for i in (0, 2) for k in (1, 2)]
    assert {m["n_positions"] for m in modules.values()} == {16 * 17 if positions == "all" else 60}
    assert len(result.deltas) == 4
    assert result.statistics["measured_rise"] != 0


def test_convolutions(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("resnet"), None, tmp_path / "source"))
    retain = pictures(12)
    result = run(checkpoint, tmp_path / "out", {"blocks": [-1], "rho": 0.6}, retain)
    expected = edited_by_hand(checkpoint, list(result.statistics["modules"]), retain, 0.6)
    edited = dict(open_checkpoint(tmp_path / "out").load_model().named_parameters())
    assert {delta.name for delta in result.deltas} == {f"{key}.weight" for key in result.statistics["modules"]}
    assert any(len(delta.shape) == 4 and delta.shape[2] > 1 for delta in result.deltas)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(edited[name], parameter, rtol=0, atol=3e-7)


# ------------------------------------------------------------------------------------------------------ too little data


def test_too_few_positions_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    """4 records count 44 positions; the larger side of gate and up is 48."""
    with pytest.raises(UsageError, match=r"at least 48 positions for model\.layers\.2\.mlp\.gate_proj .*found 44"):
        run(llama, tmp_path / "a", {}, texts(4))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="at least 96 positions"):
        run(llama, tmp_path / "b", {"min_positions": 2.0}, texts(5))
    assert run(llama, tmp_path / "c", {"min_positions": 0.5}, texts(4)).deltas
    assert run(llama, tmp_path / "d", {}, texts(5)).deltas


def test_thin_data_is_warned_about(llama: Checkpoint, tmp_path: Path) -> None:
    thin = run(llama, tmp_path / "thin", {}, texts(20))
    assert len(thin.warnings) == 2
    assert "fewer positions than 10 times" in thin.warnings[0]
    assert "model.layers.2.mlp.gate_proj the fewest (220 for 48)" in thin.warnings[0]
    assert "halves of the retain data agree by less than 0.8" in thin.warnings[1]
    thick = run(llama, tmp_path / "thick", {}, [r for k in range(50) for r in texts(4, seed=k)])
    assert not [w for w in thick.warnings if "10 times" in w]


def test_idle_experts_are_left_alone(tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("mixtral"), None, tmp_path / "source"))
    counts = {
        key: factor.n
        for key, factor in kronecker_factors(
            checkpoint.load_model(), texts(), modules=["*.1.mlp.experts.*gate*"]
        ).factors.items()
    }
    ordered = sorted(counts.values())
    least = next((a + b) / 2 for a, b in itertools.pairwise(ordered) if a < b) / 96
    result = run(checkpoint, tmp_path / "out", {"min_positions": least}, texts())
    few = [key for key, n in counts.items() if n < least * 96]
    assert few
    assert set(result.statistics["modules"]) == counts.keys() - few
    assert f"{len(few)} experts were left alone" in result.warnings[0]
    assert few[0] in result.warnings[0]
    for delta in result.deltas:
        assert not any(f"experts.{key[-1]}." in delta.name for key in few)
    assert len(result.deltas) == 2 * (4 - len(few))
    with pytest.raises(UsageError, match="experts with at least 50 times"):
        run(checkpoint, tmp_path / "none", {"min_positions": 50.0}, texts())


def test_a_module_without_curvature_is_refused(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(*args: Any, **options: Any) -> KroneckerFactors:
        found = kronecker_factors(*args, **options)
        found.factors = {key: replace(f, g=torch.zeros_like(f.g)) for key, f in found.factors.items()}
        return found

    monkeypatch.setattr(kfac, "kronecker_factors", flat)
    with pytest.raises(UsageError, match=r"model\.layers\.2\.mlp\.gate_proj: .*no gradient"):
        run(llama, tmp_path / "out", {}, texts())
    assert not (tmp_path / "out").exists()


def test_no_retain_set_is_an_error(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="retain"):
        run(llama, tmp_path / "out", {}, [])


def test_a_sample_of_the_retain_set(llama: Checkpoint, tmp_path: Path) -> None:
    results = [
        run(llama, tmp_path / f"{i}", {"max_records": 10}, texts(30), seed=seed) for i, seed in enumerate((0, 0, 1))
    ]
    assert [r.importances["factors"]["n_records"] for r in results] == [10, 10, 10]
    digests = [r.importances["factors"]["digest"] for r in results]
    assert digests[0] == digests[1] != digests[2]
    assert [r.importances["factors"]["reused"] for r in results] == [False, True, False]
    whole = run(llama, tmp_path / "all", {"max_records": 50}, texts(30))
    assert whole.importances["factors"]["n_records"] == 30


# -------------------------------------------------------------------------------------------------- control, correction


def test_random_pairs_are_as_many_and_cost_more(llama: Checkpoint, tmp_path: Path) -> None:
    gold = {"labels": "gold"}  # whose factors do not depend on the seed
    chosen = run(llama, tmp_path / "a", gold, texts())
    options = gold | {"select": "random"}
    control = [run(llama, tmp_path / f"r{s}", options, texts(), seed=s) for s in (0, 1)]
    assert "random" in control[0].warnings[-1]
    for result in control:
        for key, module in result.statistics["modules"].items():
            assert module["kept_pairs"] == chosen.statistics["modules"][key]["kept_pairs"]
            assert module["mass"] is None
            assert module["predicted_rise"] > 1.5 * chosen.statistics["modules"][key]["predicted_rise"]
    again = run(llama, tmp_path / "again", options, texts())
    assert again.deltas.tensor_digest == control[0].deltas.tensor_digest != control[1].deltas.tensor_digest


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_ekfac_takes_its_masses(rho: float, llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", {"correction": "ekfac", "rho": rho}, texts())
    plain = run(llama, tmp_path / "plain", {"rho": rho}, texts())
    assert result.deltas.tensor_digest != plain.deltas.tensor_digest
    model, copy = llama.load_model(), open_checkpoint(tmp_path / "out")
    factors = kronecker_factors(model, texts(), modules=list(result.statistics["modules"]))
    bases = {key: eigenbasis(factor) for key, factor in factors.factors.items()}
    masses = corrected_masses(model, texts(), factors, bases)
    for key, factor in factors.factors.items():
        weight = dict(model.named_parameters())[f"{key}.weight"].detach()
        mass = masses[key].flip(0, 1)  # numpy's eigenvalues ascend
        expected = by_hand(factor.a, factor.g, weight, rho, mass)
        torch.testing.assert_close(copy.load_tensor(f"{key}.weight").double(), expected, rtol=0, atol=2e-7)
        found = result.statistics["modules"][key]
        assert rho <= found["mass"] < 1
        c = bases[key].u_g.T @ weight.double() @ bases[key].u_a
        dropped = mass.flip(0, 1).flatten().sort(descending=True)
        keep = torch.zeros(c.numel(), dtype=torch.bool)
        keep[dropped.indices[: found["kept_pairs"]]] = True
        cost = 0.5 * 11 / 9 * float((c.flatten().square() * mass.flip(0, 1).flatten().double())[~keep].sum())
        assert found["predicted_rise"] == pytest.approx(cost, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- factor files


def factors_of(checkpoint: Checkpoint, *modules: str, n: int = N) -> KroneckerFactors:
    return kronecker_factors(checkpoint.load_model(), texts(n), modules=modules)


def test_factor_file_round_trip(llama: Checkpoint, tmp_path: Path) -> None:
    factors = factors_of(llama, "*.mlp.*", "*.1.self_attn.*")
    path = tmp_path / "f.safetensors"
    save_factors(path, factors, tensor_digest="sha256:1", digest="sha256:2")
    stored = load_factors(path)
    assert list(stored.keys) == list(factors.factors)
    assert stored.describe()["tensor_digest"] == "sha256:1"
    for loaded in (stored.all().factors, {key: stored.factor(key) for key in stored.keys}):
        for key, factor in factors.factors.items():
            found: Factor = loaded[key]
            assert torch.equal(found.a, factor.a)
            assert torch.equal(found.g, factor.g)
            for part in ("key", "n", "module", "parameter", "expert", "orientation", "block", "role", "overlap_a"):
                assert getattr(found, part) == getattr(factor, part)
    everything = stored.all()
    assert everything.n_tokens == factors.n_tokens
    assert everything.positions_per_loss("model.layers.1.mlp.up_proj") == 11 / 9
    gate, up, down = (everything.factors[f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert gate.a is up.a is not down.a
    assert stored.factor(gate.key).a is stored.factor(up.key).a
    first = path.read_bytes()
    save_factors(path, factors, tensor_digest="sha256:1", digest="sha256:2")
    assert path.read_bytes() == first
    tensors = sum(f.g.numel() for f in factors.factors.values()) + sum(
        a.numel() for a in {id(f.a): f.a for f in factors.factors.values()}.values()
    )
    assert 4 * tensors < len(first) < 4 * tensors + 16000  # a shared A is there once
    assert [p.name for p in tmp_path.glob("*f.safe*")] == ["f.safetensors"]


def test_a_given_file_does_what_computing_does(llama: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_factors(path, factors_of(llama, "*.2.mlp.*"), tensor_digest=llama.tensor_digest(), digest="sha256:2")
    computed = run(llama, tmp_path / "a", {"rho": 0.7}, texts())
    given = run(llama, tmp_path / "b", {"rho": 0.7, "factors": str(path), "labels": "gold"}, texts())
    assert given.deltas.tensor_digest == computed.deltas.tensor_digest
    assert given.parameters["factors"] == "f.safetensors"  # no path in the evidence
    assert given.parameters["labels"] == "sampled"
    assert given.importances["factors"]["reused"] is True


def test_factors_of_another_checkpoint_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    other = open_checkpoint(save(causal_lm("llama", seed=1), None, tmp_path / "other"))
    save_factors(path, factors_of(other, "*.2.mlp.*"), tensor_digest=other.tensor_digest(), digest="sha256:2")
    with pytest.raises(IntegrityError, match="factors of this checkpoint"):
        run(llama, tmp_path / "out", {"factors": str(path)}, texts())
    assert not (tmp_path / "out").exists()


def test_factor_files_that_do_not_serve(llama: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(UsageError, match="found none at this path"):
        run(llama, tmp_path / "a", {"factors": str(path)}, texts())
    digest = llama.tensor_digest()
    factors = factors_of(llama, "*.2.mlp.gate_proj")
    save_factors(path, factors, tensor_digest=digest, digest="sha256:2")
    with pytest.raises(UsageError, match=r"factors of model\.layers\.2\.mlp\.up_proj, found none"):
        run(llama, tmp_path / "b", {"factors": str(path)}, texts())
    small = {key: replace(f, a=f.a[:5, :5].clone()) for key, f in factors.factors.items()}
    save_factors(path, replace(factors, factors=small), tensor_digest=digest, digest="sha256:2")
    with pytest.raises(IntegrityError, match="factors of shape"):
        run(llama, tmp_path / "c", {"factors": str(path), "include": ["*.2.mlp.gate_proj"]}, texts())
    oblong = {key: replace(f, a=f.a[:5].clone()) for key, f in factors.factors.items()}
    save_factors(path, replace(factors, factors=oblong), tensor_digest=digest, digest="sha256:2")
    with pytest.raises(IntegrityError, match="damaged"):
        run(llama, tmp_path / "d", {"factors": str(path), "include": ["*.2.mlp.gate_proj"]}, texts())
    for content in (path.read_bytes()[:-3], b"", next(llama.path.glob("*.safetensors")).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="damaged or other"):
            load_factors(path)
    with pytest.raises(ResourceError, match="cannot write"):
        save_factors(tmp_path / "missing" / "f", factors, tensor_digest=digest, digest="sha256:2")


# ------------------------------------------------------------------------------------------------------------ the store


@dataclass
class Counter:
    """Stands in for `kronecker_factors` and notes the sizes of the data it was called with."""

    sizes: list[int]

    def __call__(self, model: nn.Module, records: Sequence[Any], **options: Any) -> KroneckerFactors:
        self.sizes.append(len(records))
        return kronecker_factors(model, records, **options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counter = Counter([])
    monkeypatch.setattr(kfac, "kronecker_factors", counter)
    return counter.sizes


def test_factors_are_computed_once(llama: Checkpoint, tmp_path: Path, store: Path, counted: list[int]) -> None:
    first = run(llama, tmp_path / "a", {}, texts())
    again = run(llama, tmp_path / "b", {}, texts())
    other = run(llama, tmp_path / "c", {"rho": 0.9, "correction": "ekfac"}, texts())
    assert counted == [N]
    assert [r.importances["factors"]["reused"] for r in (first, again, other)] == [False, True, True]
    assert first.deltas.tensor_digest == again.deltas.tensor_digest
    assert first.statistics == again.statistics
    assert {k: v for k, v in first.importances["factors"].items() if k != "reused"} == {
        k: v for k, v in again.importances["factors"].items() if k != "reused"
    }
    for path in store.rglob("*.safetensors"):
        path.chmod(0o600)
        path.write_bytes(b"damaged")
    mended = run(llama, tmp_path / "d", {}, texts())
    assert counted == [N, N]
    assert mended.deltas.tensor_digest == first.deltas.tensor_digest


def test_nothing_stale_is_ever_used(llama: Checkpoint, tmp_path: Path, store: Path, counted: list[int]) -> None:
    """The published cache of edited weights knows neither the factors nor the data they came from."""
    run(llama, tmp_path / "a", {}, texts())
    run(llama, tmp_path / "b", {}, texts(N + 1))
    run(llama, tmp_path / "c", {}, texts(seed=9))
    run(llama, tmp_path / "d", {"labels": "gold"}, texts())
    run(llama, tmp_path / "e", {"positions": "predicting"}, texts())
    run(llama, tmp_path / "f", {"blocks": [1]}, texts())
    run(llama, tmp_path / "g", {}, texts(), seed=1)
    assert counted == [N, N + 1, N, N, N, N, N]
    other = open_checkpoint(save(causal_lm("llama", seed=1), None, tmp_path / "other"))
    run(other, tmp_path / "h", {}, texts())
    for out in "ij":  # nothing identifies the model
        run(llama, tmp_path / out, {}, texts(), cache_parts={})
    # what is stored under a key that names no checkpoint carries its own name
    run(llama, tmp_path / "k", {}, texts(), cache_parts={"dtype": "float32"})
    run(llama, tmp_path / "l", {}, texts(), cache_parts={"dtype": "float32"})
    run(other, tmp_path / "m", {}, texts(), cache_parts={"dtype": "float32"})
    assert counted[7:] == [N, N, N, N, N]
    run(llama, tmp_path / "n", {"labels": "gold"}, texts(), seed=1)  # gold labels draw nothing
    assert len(counted) == 12


def test_progress_covers_all_passes(llama: Checkpoint, tmp_path: Path, store: Path) -> None:
    seen: list[tuple[int, int]] = []
    for options, passes in (({}, 3), ({}, 2), ({"correction": "ekfac"}, 3)):
        seen.clear()
        run(
            llama, tmp_path / f"{len(list(tmp_path.iterdir()))}", options, texts(), progress=lambda *at: seen.append(at)
        )
        assert {total for _, total in seen} == {passes * N}
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (passes * N, passes * N)


# ------------------------------------------------------------------------------------------------ weights of any layout


def test_swapped_weights_come_back_whatever_happens() -> None:
    model = nn.Linear(3, 2)
    original, before = model.weight.data_ptr(), model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in between"), swapped(model, {"weight": torch.ones(2, 3)}):
        assert torch.equal(model.weight, torch.ones(2, 3))
        raise RuntimeError("in between")
    assert model.weight.data_ptr() == original
    assert torch.equal(model.weight, before)


def test_what_is_not_changed_keeps_its_bits_in_an_edited_tensor() -> None:
    """Minus zero plus zero is zero: another bit pattern."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]))
    live, site = LiveCheckpoint(model), sites(ModelMap.of(model), ["0"])[0]

    def second_row(_: Site, weight: Tensor) -> Tensor:
        new = weight.detach().double()
        new[1] *= 0.9
        return new

    edit = LinearMapEdit(live, model, [site], second_row)
    assert edit("1.weight", model[1].weight) is None
    before = model[0].weight.detach()
    for found in (edit("0.weight", before.clone()), edit.edited["0.weight"]):
        assert found is not None
        assert torch.equal(found[0].view(torch.int32), before[0].view(torch.int32))
        assert torch.equal(found[1], (before[1].double() * 0.9).float())
    assert LinearMapEdit(live, model, [site], lambda _, weight: weight.double())("0.weight", before.clone()) is None


def test_parameters_that_share_a_disk_tensor_go_together() -> None:
    names = {"a": ("1",), "b": ("2", "3"), "c": ("3", "4"), "d": ("5",), "e": ("4",)}
    groups = _groups(dict.fromkeys("abcde"), names)
    assert {disk: sorted(members) for disk, (members, _) in groups.items()} == {
        "1": ["a"],
        "2": ["b", "c", "e"],
        "3": ["b", "c", "e"],
        "4": ["b", "c", "e"],
        "5": ["d"],
    }
    assert sorted(groups["2"][1]) == ["2", "3", "4"]
    assert _groups({"b": None}, names).keys() == {"2", "3"}
    with pytest.raises(UnsupportedError, match="found z"):
        _groups({"z": None}, names)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: causal_lm("llama"), "model.layers.0.mlp.up_proj"),
        (lambda: causal_lm("gpt2"), "transformer.h.0.mlp.c_fc"),
        (lambda: causal_lm("mixtral"), "model.layers.0.mlp.experts.down_proj.3"),
        (lambda: image_classifier("resnet"), "resnet.encoder.stages.0.layers.0.layer.0.convolution"),
    ],
)
def test_a_matrix_is_a_view_of_outputs_by_inputs(make: Callable[[], nn.Module], key: str) -> None:
    model = make()
    site: Site = sites(ModelMap.of(model), [key])[0]
    parameter = dict(model.named_parameters())[site.projection.parameter].detach()
    view = matrix(parameter, site)
    assert view.shape == (site.projection.out_features, site.projection.in_features)
    view[0, 1] = 7.5
    assert int((parameter == 7.5).sum()) == 1


# ------------------------------------------------------------------------------------------------------------------ SVD


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_svd_truncates_and_needs_no_data(arch: str, tmp_path: Path, store: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm(arch), None, tmp_path / "source"))
    result = run(checkpoint, tmp_path / "out", {"fraction": 0.25}, [], method="svd")
    assert result.statistics["measured_rise"] is None
    model, copy = checkpoint.load_model(), open_checkpoint(tmp_path / "out").load_model()
    maps = select_maps(ModelMap.of(model), MapParameters())
    assert list(result.statistics["modules"]) == [site.key for site in maps]
    for site in maps:
        old, new = (
            matrix(dict(m.named_parameters())[site.projection.parameter].detach(), site).double() for m in (model, copy)
        )
        u, s, vh = np.linalg.svd(old.numpy(), full_matrices=False)
        k = math.ceil(0.25 * len(s))
        torch.testing.assert_close(new, torch.from_numpy((u[:, :k] * s[:k]) @ vh[:k]), rtol=0, atol=2e-7)
        found = result.statistics["modules"][site.key]
        assert (found["kept_rank"], found["rank"]) == (k, len(s))
        assert found["kept_norm"] == pytest.approx(float((s[:k] ** 2).sum() / (s**2).sum()), rel=1e-6)
    json.dumps([result.parameters, result.statistics], allow_nan=False)


def test_svd_by_role_and_its_loss(llama: Checkpoint, tmp_path: Path) -> None:
    options = {"blocks": [1], "roles": ["gate", "up", "down"], "fraction": 1.0, "fraction_by": {"gate": 0.5}}
    result = run(llama, tmp_path / "out", options, texts(), method="svd")
    assert [delta.name for delta in result.deltas] == ["model.layers.1.mlp.gate_proj.weight"]
    copy = open_checkpoint(tmp_path / "out").load_model()
    assert result.statistics["loss_after"] == mean_loss(ModelMap.of(copy), texts())
    for name, fraction in (("one", 1), ("nearly", 0.999)):
        whole = run(llama, tmp_path / name, {"fraction": fraction}, texts(), method="svd")
        assert not whole.deltas
        assert whole.deltas.tensor_digest == llama.tensor_digest()
