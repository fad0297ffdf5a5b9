"""Edits made elsewhere: what fits is audited as it is, what does not is refused with every mismatch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from probes.errors import IntegrityError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from tests.conftest import World
from tests.tiny import causal_lm, image_classifier, save, tokenizer
from unlearn import audit, cli, forget
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint
from unlearn.editors.base import EditContext, EditResult, make_editor
from unlearn.requests.presets import load_method
from unlearn.runs.verify import passed, verify


def run(checkpoint: Checkpoint, other: Path, out: Path) -> EditResult:
    model = checkpoint.load_model()
    editor = make_editor("given", {"path": str(other)})
    context = EditContext(checkpoint, model, ModelMap.of(model), [], [], seed=0, work=out.with_name("work"))
    return editor.edit(context, out)


def nudged(model: nn.Module, only: str = "") -> nn.Module:
    """The edit of another tool."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path / "source", shards=2))


def edited(source: Checkpoint, folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """The source with other weights, in one shard, as another tool saves it."""
    save(nudged(source.load_model(), "layers.1."), tokenizer(), folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_copy_holds_the_other_checkpoints_weights(source: Checkpoint, tmp_path: Path) -> None:
    other = edited(source, tmp_path / "other")
    result = run(source, other, tmp_path / "out")
    assert result.deltas.tensor_digest == open_checkpoint(other).tensor_digest() != source.tensor_digest()
    assert {delta.name for delta in result.deltas} == {n for n in source.tensor_names() if "layers.1." in n}
    assert all(delta.changed for delta in result.deltas)
    assert source.path is not None
    for path in source.path.iterdir():  # shards, index and side files are the source's
        assert (tmp_path / "out" / path.name).is_file()
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert result.warnings == []
    assert result.parameters == {"path": "other"}  # never a whole path
    assert result.statistics == {"tensors": len(source.tensor_names()), "changed_tensors": len(result.deltas)}


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "qwen3"])
def test_other_layouts(arch: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm(arch), tokenizer(), tmp_path / "source"))
    other = save(nudged(checkpoint.load_model()), tokenizer(), tmp_path / "other", shards=2)
    result = run(checkpoint, other, tmp_path / "out")
    assert result.deltas.tensor_digest == open_checkpoint(other).tensor_digest()


def test_image_classifier_and_live_model(tmp_path: Path) -> None:
    model = image_classifier("vit")
    checkpoint = open_checkpoint(save(model, None, tmp_path / "source"))
    other = save(nudged(checkpoint.load_model()), None, tmp_path / "other")
    for given, out in ((checkpoint, tmp_path / "out"), (LiveCheckpoint(model), tmp_path / "live")):
        assert run(given, other, out).deltas.tensor_digest == open_checkpoint(other).tensor_digest()


def test_the_source_itself_changes_nothing_and_says_so(source: Checkpoint, tmp_path: Path) -> None:
    assert source.path is not None
    shutil.copytree(source.path, tmp_path / "same")
    for other in (tmp_path / "same", source.path):
        out = tmp_path / f"out-{other.name}"
        result = run(source, other, out)
        assert list(result.deltas) == []
        assert result.deltas.tensor_digest == source.tensor_digest()
        assert "no weight differs" in result.warnings[0]


def test_a_change_of_sign_of_zero_is_a_change(source: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][0, 0] = 0.0

    def negative(tensors: dict[str, torch.Tensor]) -> None:
        zero(tensors)
        tensors[name][0, 0] = -0.0

    base = open_checkpoint(edited(source, tmp_path / "base", zero))
    result = run(base, edited(source, tmp_path / "other", negative), tmp_path / "out")
    assert [(delta.name, delta.changed) for delta in result.deltas] == [(name, 1)]


# ------------------------------------------------------------------------------------------------------------ refusals


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["lm_head.weight"]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.lora_A.weight"] = torch.zeros(2)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(97, 32)


def half(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()


def all_of_them(tensors: dict[str, torch.Tensor]) -> None:
    half(tensors)
    extra(tensors)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = torch.zeros(97, 32)


def settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without, ["found 2 missing"]),
        (extra, ["found 1 that it lacks, model.layers.0.lora_A.weight first"]),
        (reshaped, ["found 1 that differ: lm_head.weight is [97, 32] for [96, 32]"]),
        (half, ["found 30 tensors that differ (BF16 for F32)"]),
        (all_of_them, ["found 1 missing", "that it lacks", "[97, 32] for [96, 32]", "BF16 for F32"]),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[..., None], expected: Sequence[str], source: Checkpoint, tmp_path: Path
) -> None:
    other = edited(source, tmp_path / "other", change)
    with pytest.raises(UsageError) as caught:
        run(source, other, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f": {len(expected)} mistake{'s' * (len(expected) != 1)}")
    for line, part in zip(lines[1:], expected, strict=True):
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_computes_something_else(source: Checkpoint, tmp_path: Path) -> None:
    other = edited(source, tmp_path / "other")
    settings(other, rms_norm_eps=0.5, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(UsageError, match=r"found 2 settings that differ: rms_norm_eps, rope_parameters"):
        run(source, other, tmp_path / "out")
    save(causal_lm("qwen2", tie_word_embeddings=False, num_hidden_layers=3), tokenizer(), tmp_path / "kind")
    with pytest.raises(UsageError, match="model_type"):
        run(source, tmp_path / "kind", tmp_path / "out")
    save(image_classifier("vit"), None, tmp_path / "vit")
    with pytest.raises(
        UsageError, match="expected a causal_lm checkpoint as the source is, found image_classification"
    ):
        run(source, tmp_path / "vit", tmp_path / "out")


def test_a_configuration_that_differs_in_form_alone(source: Checkpoint, tmp_path: Path) -> None:
    """As another version of transformers writes it: defaults left out, notes of its own, generation settings."""
    other = edited(source, tmp_path / "other")
    settings(other, transformers_version="4.40.0", mlp_bias=None, attention_bias=None, use_cache=False, dtype=None,
             torch_dtype="float32", _name_or_path="elsewhere", attention_dropout=0.1, eos_token_id=[1, 2])  # fmt: skip
    assert run(source, other, tmp_path / "out").deltas


def test_tokenizers(source: Checkpoint, tmp_path: Path) -> None:
    other = edited(source, tmp_path / "other")
    written = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(written | {"padding_side": "left", "note": 1}, indent=8))
    assert open_checkpoint(other).tokenizer_digest() != source.tokenizer_digest()
    result = run(source, other, tmp_path / "resaved")  # the same tokens
    assert result.warnings == []
    (other / "chat_template.jinja").write_text("another")
    assert "chat template" in run(source, other, tmp_path / "template").warnings[0]
    for path in other.glob("*token*"):
        path.unlink()
    (other / "chat_template.jinja").unlink()
    assert run(source, other, tmp_path / "none").warnings == []  # it takes the source's
    tokenizer(bos=True).save_pretrained(other)
    with pytest.raises(UsageError, match="expected the source's tokenizer or none, found another"):
        run(source, other, tmp_path / "out")


def test_what_is_no_checkpoint(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found nothing there; a relative path starts at the working folder"):
        run(source, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        run(source, tmp_path / "empty", tmp_path / "out")
    other = edited(source, tmp_path / "adapter")
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="found an adapter; merge it"):
        run(source, other, tmp_path / "out")

    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full((96, 32), torch.nan)

    with pytest.raises(IntegrityError, match=r"NaN or infinity in lm_head\.weight"):
        run(source, edited(source, tmp_path / "nan", broken), tmp_path / "out")
    with pytest.raises(IntegrityError, match="apart from the input"):
        run(source, edited(source, tmp_path / "fine"), tmp_path / "fine" / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{}, {"path": None}, {"path": 3}, {"path": " "}, {"path": "x", "online": True}])
def test_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="1 mistake"):
        make_editor("given", wrong)


def test_the_preset_asks_for_a_path() -> None:
    preset = load_method("given").parameters
    assert preset == {"path": None}
    with pytest.raises(UsageError, match="expected the folder of the edited checkpoint, found none"):
        make_editor("given", preset)
    editor = make_editor("given", {"path": "x"})
    assert not editor.needs_retain
    assert not editor.needs_forget
    assert editor.passes(3, 4) == {"forward": 0, "forward_backward": 0}


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def elsewhere(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "edited-there"
    model = open_checkpoint(world.planted).load_model()
    save(nudged(model, "down_proj"), tokenizer(), folder)
    return folder


def test_forget_audits_the_edit_of_another_tool(world: World, elsewhere: Path, tmp_path: Path) -> None:
    request = world.folder / "given.yaml"
    method = f"{{name: given, overrides: {{path: {elsewhere}}}}}"
    request.write_text(world.request.read_text().replace("{name: ssd}", method))
    result = forget(request, out=tmp_path / "run")
    assert passed(verify(result.path))
    alone = audit(elsewhere, world.records, control=world.control, suite="quick", out=tmp_path / "alone")
    assert alone.table()["loss"].equals(result.table("after")["loss"])
    assert not alone.table()["loss"].equals(result.table("before")["loss"])
    plan = json.loads((result.path / "edit/plan.json").read_text())
    assert plan["method"]["name"] == "given"
    assert plan["method"]["parameters"] == {"path": "edited-there"}
    for name in ("edit/plan.json", "report/report.json", "report/report.html"):
        assert str(elsewhere) not in (result.path / name).read_text(), name


def test_edit_needs_no_record(
    world: World, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "given", str(world.planted), "--set", f"path={elsewhere}", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
        raise SystemExit(0)
    assert stop.value.code == 0, capsys.readouterr().err
    copy = open_checkpoint(tmp_path / "run/edit/checkpoint")
    assert copy.tensor_digest() == open_checkpoint(elsewhere).tensor_digest()
