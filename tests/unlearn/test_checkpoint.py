from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.utils import logging

from probes.errors import IntegrityError, ResourceError, UnlearnError, UnsupportedError, UsageError
from tests import tiny
from unlearn.checkpoints import checkpoint as module
from unlearn.checkpoints import writer
from unlearn.checkpoints.checkpoint import LiveCheckpoint, open_checkpoint, write_edited
from unlearn.checkpoints.diskmap import DiskMap, revert
from unlearn.checkpoints.loading import transformers_errors
from unlearn.checkpoints.manifest import PickledWeightsError, identify, weight_files

SHARDED = 3


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def untouched(name: str, tensor: torch.Tensor) -> None:
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints that tests share and only read; `fresh` copies one."""
    root = tmp_path_factory.mktemp("saved")

    def save(arch: str = "llama", shards: int = 1) -> Path:
        folder = root / f"{arch}-{shards}"
        if not folder.exists():
            vision = arch in tiny.VISION
            model = tiny.image_classifier(arch) if vision else tiny.causal_lm(arch)
            tiny.save(model, None if vision else tiny.tokenizer(), folder, shards)
        return folder

    return save


@pytest.fixture
def fresh(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def copy(arch: str = "llama", shards: int = 1) -> Path:
        return Path(shutil.copytree(saved(arch, shards), tmp_path / "checkpoint"))

    return copy


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# -- identity ----------------------------------------------------------------------------------------------------------


def test_tensor_digest_is_the_documented_one(saved: Callable[..., Path]) -> None:
    folder = saved("llama", SHARDED)
    lines = []
    for name, tensor in stored(folder).items():
        shape = "[" + ",".join(str(size) for size in tensor.shape) + "]"
        lines.append(f"{name}|F32|{shape}|{hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}")
    expected = hashlib.sha256("".join(line + "\n" for line in sorted(lines)).encode()).hexdigest()
    assert open_checkpoint(folder).tensor_digest() == f"sha256:{expected}"


def test_manifest_lists_every_file(saved: Callable[..., Path]) -> None:
    folder = saved("llama", SHARDED)
    found = {row["path"]: (row["size"], row["sha256"]) for row in open_checkpoint(folder).manifest()}
    assert found == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents(folder).items()}
    assert list(found) == sorted(found)


def test_digest_follows_content_not_layout(saved: Callable[..., Path], fresh: Callable[..., Path]) -> None:
    whole = open_checkpoint(saved("llama")).tensor_digest()
    assert open_checkpoint(saved("llama", SHARDED)).tensor_digest() == whole
    folder = fresh("llama")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert open_checkpoint(folder).tensor_digest() != whole


def test_verifying_a_folder_needs_no_torch(saved: Callable[..., Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from unlearn.checkpoints.manifest import identify;"
        "print(identify(Path(sys.argv[1])).tensor_digest); assert 'torch' not in sys.modules"
    )
    folder = saved("llama")
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == open_checkpoint(folder).tensor_digest()


def test_describe_has_no_path(saved: Callable[..., Path]) -> None:
    folder = saved("gpt2")
    found = open_checkpoint(folder).describe()
    model = tiny.causal_lm("gpt2")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["name"], found["architecture"], found["dtype"]) == ("gpt2-1", "GPT2LMHeadModel", "F32")
    assert (found["tied"], found["task"], found["files"]) == (True, "causal_lm", len(contents(folder)))
    assert found["bytes"] == sum(map(len, contents(folder).values()))
    assert (
        found["chat_template_digest"] == "sha256:" + hashlib.sha256(tiny.tokenizer().chat_template.encode()).hexdigest()
    )
    assert str(folder.parent) not in json.dumps(found)
    assert open_checkpoint(saved("llama")).describe()["tied"] is False


# -- tensors and models ------------------------------------------------------------------------------------------------


def test_streaming_gives_the_stored_tensors(saved: Callable[..., Path]) -> None:
    folder = saved("llama", SHARDED)
    opened = open_checkpoint(folder)
    expected = stored(folder)
    streamed = dict(opened.iter_tensors())
    assert streamed.keys() == expected.keys() == set(opened.tensor_names())
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
        torch.testing.assert_close(opened.load_tensor(name), tensor, rtol=0, atol=0)
    assert {name for names in opened.shards().values() for name in names} == expected.keys()
    assert len(opened.shards()) >= SHARDED
    with pytest.raises(UsageError):
        opened.load_tensor("absent")


def test_a_loaded_tensor_is_private(fresh: Callable[..., Path]) -> None:
    opened = open_checkpoint(fresh())
    before = opened.tensor_digest()
    opened.load_tensor(opened.tensor_names()[0]).fill_(7)
    assert identify(opened.path).tensor_digest == before  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_load_model_is_explicit(saved: Callable[..., Path], dtype: str, expected: torch.dtype) -> None:
    opened = open_checkpoint(saved("llama"))
    model = opened.load_model(dtype)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.config._attn_implementation == opened.attention == "sdpa"
    with pytest.raises(UsageError, match="float32"):
        opened.load_model("int8")
    with pytest.raises(ResourceError, match="device"):
        opened.load_model(device="nowhere:3")


def test_architectures_without_sdpa_are_loaded_eagerly(saved: Callable[..., Path], fresh: Callable[..., Path]) -> None:
    assert open_checkpoint(saved("gemma2")).load_model().config._attn_implementation == "eager"
    folder = fresh("llama")
    rewrite(folder, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    assert open_checkpoint(folder).load_model().config._attn_implementation == "sdpa"


def test_missing_weights_are_not_made_up(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 missing, model\.norm\.weight"):
        open_checkpoint(folder).load_model()


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, SHARDED])
def test_identity_edit_changes_no_byte(fresh: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    folder = fresh("llama", shards)
    (folder / "assets").mkdir()
    (folder / "assets" / "note.txt").write_text("kept")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(folder)
    opened = open_checkpoint(folder)
    for name, edit in {"none": untouched, "same": lambda name, tensor: tensor, "copy": lambda name, t: t * 1}.items():
        deltas = write_edited(opened, tmp_path / name, edit)
        assert contents(tmp_path / name) == before
        assert deltas.tensor_digest == opened.tensor_digest()
        assert deltas.manifest == opened.manifest()
        assert deltas.left_out == []
        assert [delta.changed for delta in deltas] == [0] * (0 if name == "none" else len(opened.tensor_names()))
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "copy", "none", "same"]


def test_one_edited_tensor_changes_one_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, target = saved("llama", SHARDED), "model.layers.1.mlp.down_proj.weight"
    opened = open_checkpoint(folder)
    before = contents(folder)
    deltas = write_edited(opened, tmp_path / "out", lambda name, t: t * 1.5 if name == target else None)
    after = contents(tmp_path / "out")
    [shard] = [shard for shard, names in opened.shards().items() if target in names]
    assert {name for name in before if before[name] != after[name]} == {shard}
    assert before.keys() == after.keys()
    old, new = stored(folder), stored(tmp_path / "out")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {target}
    with safe_open(folder / shard, "pt") as a, safe_open(tmp_path / "out" / shard, "pt") as b:
        assert list(a.keys()) == list(b.keys())
        assert a.metadata() == b.metadata()
    reopened = opened.reopen(tmp_path / "out")
    assert reopened.tensor_digest() == deltas.tensor_digest != opened.tensor_digest()
    assert reopened.manifest() == deltas.manifest
    assert contents(folder) == before
    [delta] = deltas
    assert (delta.name, delta.dtype, delta.shape) == (target, "F32", (32, 48))
    assert delta.changed == 32 * 48
    assert delta.rel_norm == pytest.approx(0.5, rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    torch.testing.assert_close(model.get_parameter(target), old[target] * 1.5, rtol=0, atol=0)


def test_streaming_edit_equals_in_memory_edit(saved: Callable[..., Path], tmp_path: Path) -> None:
    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.where(tensor > 0, tensor * 0.3, tensor) if "layers" in name else None

    opened = open_checkpoint(saved("llama", SHARDED))
    write_edited(opened, tmp_path / "out", edit)
    model = opened.load_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            edited = edit(name, parameter)
            parameter.copy_(parameter if edited is None else edited)
    expected = model.state_dict()
    for name, tensor in opened.reopen(tmp_path / "out").load_model().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_delta_counts_bits_after_rounding(tmp_path: Path) -> None:
    model = tiny.causal_lm("llama", dtype=torch.bfloat16)
    opened = open_checkpoint(tiny.save(model, None, tmp_path / "in"))
    noise = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    before = opened.load_tensor(name)
    wanted = before.float() * (1 + 0.01 * torch.randn(before.shape, generator=noise))
    [delta] = write_edited(opened, tmp_path / "out", lambda n, t: wanted if n == name else None)
    after = opened.reopen(tmp_path / "out").load_tensor(name)
    torch.testing.assert_close(after, wanted.bfloat16(), rtol=0, atol=0)
    moved = (after.double() - before.double()).norm() / before.double().norm()
    assert delta.changed == int((after != before).sum()) < before.numel()
    assert delta.rel_norm == pytest.approx(float(moved), rel=1e-12)
    assert delta.dtype == "BF16"


def test_delta_of_a_zero_tensor(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    tensors["model.layers.0.input_layernorm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shift = {"model.norm.weight": 1.0, "model.layers.0.input_layernorm.weight": 0.0}
    edit = lambda name, tensor: tensor + shift[name] if name in shift else None  # noqa: E731
    deltas = {delta.name: delta for delta in write_edited(open_checkpoint(folder), tmp_path / "out", edit)}
    assert deltas["model.norm.weight"].rel_norm is None
    assert deltas["model.layers.0.input_layernorm.weight"].rel_norm == 0


def test_double_weights_keep_their_values(tmp_path: Path) -> None:
    opened = LiveCheckpoint(nn.Linear(3, 2).double())
    before = opened.load_tensor("weight")
    write_edited(opened, tmp_path / "out", lambda name, tensor: tensor)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, t: t * float("nan"), "NaN or infinity in"),
        (lambda name, t: t.new_full(t.shape, 1e39, dtype=torch.float64), "NaN or infinity in"),
        (lambda name, t: t.flatten()[:1], "keep its shape"),
        (lambda name, t: t.mul_(2), "changed in place"),
        (lambda name, t: (t.mul_(2), None)[1], "changed in place"),
    ],
    ids=["nan", "overflow", "shape", "in place", "in place, none"],
)
def test_an_edit_that_breaks_the_model_is_refused(
    saved: Callable[..., Path], tmp_path: Path, edit: writer.Edit, message: str
) -> None:
    before = contents(saved("llama"))
    one = lambda name, t: edit(name, t) if name == "model.norm.weight" else None  # noqa: E731
    with pytest.raises(IntegrityError, match=message):
        write_edited(open_checkpoint(saved("llama")), tmp_path / "out", one)
    assert list(tmp_path.iterdir()) == []
    assert contents(saved("llama")) == before


def test_writing_under_inference_mode(saved: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(saved("llama"))
    with torch.inference_mode():
        write_edited(opened, tmp_path / "plain", lambda name, t: t * 2)
        with pytest.raises(IntegrityError, match="in place"):
            write_edited(opened, tmp_path / "in place", lambda name, t: t.mul_(2))
    write_edited(opened, tmp_path / "outside", lambda name, t: t * 2)
    assert contents(tmp_path / "plain") == contents(tmp_path / "outside")


def test_second_copies_of_the_weights_stay_behind(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama", SHARDED)
    (folder / "original").mkdir()
    left = ["consolidated.safetensors", "model.gguf", "optimizer.pt", "original/consolidated.00.pth", "rust_model.ot"]
    left += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in left:
        (folder / name).write_bytes(b"weights")
    (folder / "original" / "params.json").write_text("{}")
    opened = open_checkpoint(folder)
    deltas = write_edited(opened, tmp_path / "out", untouched)
    assert sorted(deltas.left_out) == sorted(left)
    kept = contents(tmp_path / "out").keys()
    assert kept.isdisjoint(left)
    assert {"original/params.json", "model.safetensors.index.json"} <= kept
    assert {row["path"] for row in opened.manifest()} >= set(left)


def test_hidden_files_are_none_of_the_checkpoint(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama")
    before = contents(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.lock").write_text("")
    (folder / ".gitattributes").write_text("")
    opened = open_checkpoint(folder)
    assert {row["path"] for row in opened.manifest()} == before.keys()
    write_edited(opened, tmp_path / "out", untouched)
    assert contents(tmp_path / "out") == before


def test_linked_files_are_copied_not_linked(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    write_edited(open_checkpoint(folder), tmp_path / "out", untouched)
    assert contents(tmp_path / "out") == contents(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_output_and_input_may_not_overlap(
    fresh: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh("llama")
    opened = open_checkpoint(folder)
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    inside = [
        folder,
        folder / "out",
        Path("../checkpoint/out"),
        tmp_path / "link" / "a" / "b",
        Path("../link"),
        tmp_path,
    ]
    inside.append(tmp_path / "elsewhere" / ".." / "checkpoint" / "x")
    for out in inside:
        with pytest.raises(IntegrityError, match="apart from the input"):
            write_edited(opened, out, untouched)
    monkeypatch.chdir(folder)
    relative = open_checkpoint(Path())
    with pytest.raises(IntegrityError):
        write_edited(relative, Path("out"), untouched)
    assert contents(tmp_path) == before


def test_output_folder_must_be_new_or_empty(saved: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(saved("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(UsageError, match="new or empty"):
            write_edited(opened, out, untouched)
    assert contents(tmp_path) == {"full/file": b"precious"}
    (tmp_path / "empty").mkdir()
    write_edited(opened, tmp_path / "empty", untouched)
    write_edited(opened, tmp_path / "deep" / "er", untouched)
    assert contents(tmp_path / "empty") == contents(tmp_path / "deep" / "er") == contents(saved("llama"))


def test_a_killed_run_leaves_nothing_that_matters(saved: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(saved("llama"))
    stale = tmp_path / ".out.partial"
    (stale / "original").mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half a file")
    handle = os.open(stale, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ResourceError, match="another process"):
        write_edited(opened, tmp_path / "out", untouched)
    assert (stale / "model.safetensors").exists()
    os.close(handle)
    seen = []
    write_edited(opened, tmp_path / "out", untouched, before_rename=lambda folder: seen.append(contents(folder)))
    assert seen == [contents(saved("llama"))] == [contents(tmp_path / "out")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_full_disk_leaves_nothing(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = []

    def sync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(ResourceError):
        write_edited(open_checkpoint(saved("llama", SHARDED)), tmp_path / "out", untouched)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_writing(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10))
    with pytest.raises(ResourceError, match="free disk"):
        write_edited(open_checkpoint(saved("llama")), tmp_path / "out", untouched)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_edit_leaves_nothing(saved: Callable[..., Path], tmp_path: Path) -> None:
    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_edited(open_checkpoint(saved("llama")), tmp_path / "out", edit)
    assert list(tmp_path.iterdir()) == []


# -- files beside the weights ------------------------------------------------------------------------------------------

ASSISTANT, RULE = "assistant.safetensors", "assistant.rule"


def beside(folder: Path, **changes: Any) -> dict[str, Any]:
    """What makes a copy of `folder` a difference of two models: one more weight file, another config."""
    target = json.loads((folder / "config.json").read_text())
    config = {"model_type": "uld", "architectures": ["ULDForCausalLM"], "target": target}
    noise = torch.Generator().manual_seed(1)
    tensors = {
        "assistant.b": torch.randn(3, 5, generator=noise),
        "assistant.a": torch.randn(2, generator=noise).bfloat16(),
        RULE: torch.tensor([0.75, 0.01, 0.01, 0, 0, 1, 1], dtype=torch.float64),
    }
    added = {ASSISTANT: tensors}
    return {"added": added, "replaced": {"config.json": json.dumps(config).encode(), "code.py": b"x = 1\n"}} | changes


@pytest.mark.parametrize("shards", [1, SHARDED])
def test_added_weights_are_in_the_digest_and_the_manifest(
    saved: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    folder = saved("llama", shards)
    before, more = contents(folder), beside(folder)
    target = "model.layers.1.mlp.down_proj.weight"
    edit = lambda name, tensor: tensor * 1.5 if name == target else None  # noqa: E731
    deltas = write_edited(open_checkpoint(folder), tmp_path / "out", edit, **more)
    after = contents(tmp_path / "out")
    assert after.keys() - before.keys() == {ASSISTANT, "code.py"}
    save_file(more["added"][ASSISTANT], tmp_path / "reference.safetensors", {"format": "pt"})
    assert after[ASSISTANT] == (tmp_path / "reference.safetensors").read_bytes()
    assert (after["config.json"], after["code.py"]) == tuple(more["replaced"].values())
    plain = write_edited(open_checkpoint(folder), tmp_path / "plain", edit)
    same = contents(tmp_path / "plain")
    assert {name for name in same if same[name] != after[name]} == {"config.json"}
    assert list(deltas) == list(plain)
    assert deltas.tensor_digest != plain.tensor_digest
    again = identify(tmp_path / "out")
    assert (again.tensor_digest, again.manifest) == (deltas.tensor_digest, deltas.manifest)
    assert contents(folder) == before


def test_the_same_additions_give_the_same_bytes(saved: Callable[..., Path], tmp_path: Path) -> None:
    opened, more = open_checkpoint(saved("llama")), beside(saved("llama"))
    write_edited(opened, tmp_path / "one", untouched, **more)
    backwards = {ASSISTANT: dict(reversed(more["added"][ASSISTANT].items()))}
    replaced = dict(reversed(more["replaced"].items()))
    write_edited(opened, tmp_path / "two", untouched, added=backwards, replaced=replaced)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_additions_change_no_byte(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama", SHARDED)
    deltas = write_edited(open_checkpoint(folder), tmp_path / "out", untouched, added={}, replaced={})
    assert contents(tmp_path / "out") == contents(folder)
    assert deltas.tensor_digest == open_checkpoint(folder).tensor_digest()


def test_added_tensors_may_be_views_and_empty(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama")
    square = torch.arange(12.0).reshape(3, 4)
    tensors = {"assistant.t": square.T, "assistant.row": square[1], "assistant.none": torch.empty(0, 3)}
    more = beside(folder, added={ASSISTANT: tensors})
    write_edited(open_checkpoint(folder), tmp_path / "out", untouched, **more)
    found = load_file(tmp_path / "out" / ASSISTANT)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added": {ASSISTANT: {"x": torch.tensor([1.0, float("nan")])}}}, "NaN or infinity in x"),
        ({"added": {ASSISTANT: {"x": torch.tensor(float("-inf")).bfloat16()}}}, "NaN or infinity in x"),
        ({"added": {ASSISTANT: {"model.norm.weight": torch.ones(32)}}}, "new tensor name"),
        ({"added": {ASSISTANT: {"x": torch.ones(1)}, "b.safetensors": {"x": torch.ones(1)}}}, "new tensor name"),
        ({"added": {ASSISTANT: {"x\ny": torch.ones(1)}}}, "new tensor name"),
        ({"added": {"model.safetensors": {"x": torch.ones(1)}}}, "new weight file"),
        ({"added": {"consolidated.safetensors": {"x": torch.ones(1)}}}, "new weight file"),
        ({"added": {"../x.safetensors": {"x": torch.ones(1)}}}, "plain name"),
        ({"added": {".x.safetensors": {"x": torch.ones(1)}}}, "plain name"),
        ({"added": {"x.bin": {"x": torch.ones(1)}}}, "plain name"),
        ({"replaced": {"model.safetensors": b""}}, "holds weights"),
        ({"replaced": {ASSISTANT: b""}}, "holds weights"),
        ({"replaced": {"pytorch_model.bin": b""}}, "holds weights"),
        ({"replaced": {"model.safetensors.index.json": b"{}"}}, "holds weights"),
        ({"replaced": {"../x.json": b"{}"}}, "inside the copy"),
        ({"replaced": {"/x.json": b"{}"}}, "inside the copy"),
        ({"replaced": {".x.json": b"{}"}}, "inside the copy"),
        ({"replaced": {"a//x.json": b"{}"}}, "inside the copy"),
        ({"replaced": {}}, "read from assistant.safetensors, model.safetensors, found model.safetensors"),
        ({"added": {"other.safetensors": {"x": torch.ones(1)}}, "replaced": {}}, "read from"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_additions_that_clash_are_refused(
    fresh: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = fresh("llama")
    (folder / "consolidated.safetensors").write_bytes(b"a second copy")
    before = contents(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        write_edited(open_checkpoint(folder), tmp_path / "out", untouched, **beside(folder, **changes))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert contents(folder) == before


def test_additions_count_as_needed_space(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama")
    opened, more = open_checkpoint(folder), beside(folder)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, size))
    write_edited(opened, tmp_path / "plain", untouched)
    for some in ({"added": more["added"]}, {"replaced": more["replaced"]}):
        with pytest.raises(ResourceError, match="free disk"):
            write_edited(opened, tmp_path / "out", untouched, **some)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_disk_that_fills_up_while_adding_leaves_nothing(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = saved("llama"), os.fsync
    opened, more = open_checkpoint(folder), beside(folder)
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(handle))
    write_edited(opened, tmp_path / "plain", untouched)
    plain = len(calls)
    calls.clear()
    write_edited(opened, tmp_path / "more", untouched, **more)
    total = len(calls)
    assert total == plain + 2  # the assistant and the code; config.json is one file for another
    kept = contents(tmp_path)

    def full(handle: int) -> None:
        left.pop()
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    for number in range(1, total):  # the last is the parent's, after the rename
        left = [0] * number
        with pytest.raises(ResourceError):
            write_edited(opened, tmp_path / "out", untouched, **more)
        assert contents(tmp_path) == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "plain"]


def test_an_interrupt_while_adding_leaves_nothing(saved: Callable[..., Path], tmp_path: Path) -> None:
    def stop(folder: Path) -> None:
        assert (folder / ASSISTANT).exists()
        raise KeyboardInterrupt

    opened = open_checkpoint(saved("llama"))
    with pytest.raises(KeyboardInterrupt):
        write_edited(opened, tmp_path / "out", untouched, before_rename=stop, **beside(saved("llama")))
    assert list(tmp_path.iterdir()) == []


def test_an_assistant_of_no_difference_is_a_second_copy(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama")
    before = open_checkpoint(folder).tensor_digest()
    save_file({"assistant.a": torch.ones(2)}, folder / ASSISTANT, {"format": "pt"})
    opened = open_checkpoint(folder)
    assert opened.tensor_digest() == before
    assert not any(name.startswith("assistant") for name in opened.tensor_names())
    assert write_edited(opened, tmp_path / "out", untouched).left_out == [ASSISTANT]


def test_a_differences_weights_are_those_of_both(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama", SHARDED)
    out = tmp_path / "out"
    write_edited(open_checkpoint(folder), out, untouched, **beside(folder))
    assert set(weight_files(out).files) == {*weight_files(folder).files, ASSISTANT}
    assert weight_files(out).index == weight_files(folder).index
    raw = (out / ASSISTANT).read_bytes()
    shard = sorted(weight_files(folder).files)[0]
    [name, *_] = [info.name for info in weight_files(folder).files[shard].tensors]
    save_file({name: torch.ones(1)}, out / ASSISTANT, {"format": "pt"})
    with pytest.raises(UsageError, match="in both"):
        weight_files(out)
    (out / ASSISTANT).write_bytes(raw[:-1])
    with pytest.raises(UsageError, match="complete safetensors file"):
        weight_files(out)
    (out / ASSISTANT).unlink()
    with pytest.raises(UsageError, match=r"expected the shard assistant\.safetensors"):
        weight_files(out)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    (out / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"expected model\.safetensors") as caught:
        weight_files(out)
    assert not isinstance(caught.value, PickledWeightsError)


def test_a_difference_has_its_weights_under_the_usual_names(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("llama")
    more = beside(folder)
    config = json.loads(more["replaced"]["config.json"])
    config["transformers_weights"] = config["target"]["transformers_weights"] = "absent.safetensors"
    more["replaced"]["config.json"] = json.dumps(config).encode()
    write_edited(open_checkpoint(folder), tmp_path / "out", untouched, **more)
    assert set(weight_files(tmp_path / "out").files) == {"model.safetensors", ASSISTANT}
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    rewrite(folder, transformers_weights="other.safetensors")
    with pytest.raises(UsageError, match=r"expected model\.safetensors"):
        write_edited(open_checkpoint(folder), tmp_path / "more", untouched, **more)
    assert not (tmp_path / "more").exists()


# -- names on disk -----------------------------------------------------------------------------------------------------


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edited_through_the_map(folder: Path, out: Path, auto: Any) -> None:
    """Scale every parameter by its own factor in memory and through disk names; both models must agree exactly."""
    opened = open_checkpoint(folder)
    model = opened.load_model()
    factors = {name: 1.25 + (i % 7) / 8 for i, (name, _) in enumerate(model.named_parameters())}
    wanted = {name: parameter.detach() * factors[name] for name, parameter in model.named_parameters()}
    on_disk = opened.disk_tensors(model, wanted)
    assert set(on_disk) <= set(opened.tensor_names())
    deltas = write_edited(opened, out, lambda name, tensor: on_disk.get(name))
    assert {delta.name for delta in deltas} == set(on_disk)
    loaded = auto.from_pretrained(out, local_files_only=True)
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=0)
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe", "phi3"])
def test_language_models_map_to_disk(saved: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    edited_through_the_map(saved(arch), tmp_path / "out", AutoModelForCausalLM)


@pytest.mark.parametrize("arch", ["vit", "dinov2", "swin", "resnet"])
def test_classifiers_map_to_disk(saved: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    edited_through_the_map(saved(arch), tmp_path / "out", AutoModelForImageClassification)


def test_experts_are_spread_as_the_layout_says(saved: Callable[..., Path]) -> None:
    opened = open_checkpoint(saved("mixtral"))
    model = opened.load_model()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stack = torch.arange(4 * 2 * 48 * 32.0).reshape(4, 96, 32)  # [experts, gate and up, hidden]
    found = opened.disk_tensors(model, {name: stack})
    assert set(found) == set(opened.disk_names(model)[name])
    for expert in range(4):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        torch.testing.assert_close(found[f"{prefix}.w1.weight"], stack[expert, :48], rtol=0, atol=0)
        torch.testing.assert_close(found[f"{prefix}.w3.weight"], stack[expert, 48:], rtol=0, atol=0)


def test_headless_names_of_gpt2_on_the_hub(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("gpt2")
    rename(folder, lambda name: name.removeprefix("transformer."))
    opened = open_checkpoint(folder)
    names = opened.disk_names(opened.load_model())
    assert names["transformer.h.0.attn.c_attn.weight"] == ("h.0.attn.c_attn.weight",)
    edited_through_the_map(folder, tmp_path / "out", AutoModelForCausalLM)


def test_a_tied_head_stored_twice_is_edited_twice(fresh: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh("gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)  # old files carry constants that nothing reads
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(folder)
    model = opened.load_model()
    both = {"transformer.wte.weight", "lm_head.weight"}
    assert set(opened.disk_names(model)["transformer.wte.weight"]) == both
    assert set(opened.disk_names(model)["lm_head.weight"]) == both
    assert opened.unused_tensors(model) == ("h.0.attn.masked_bias",)
    edited_through_the_map(folder, tmp_path / "out", AutoModelForCausalLM)
    model = open_checkpoint(tmp_path / "out").load_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


def test_a_model_that_is_not_the_checkpoints_is_refused(saved: Callable[..., Path]) -> None:
    opened = open_checkpoint(saved("llama"))
    model = opened.load_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight different"):
        opened.disk_names(model)


def test_unknown_and_misshapen_tensors_are_refused(saved: Callable[..., Path]) -> None:
    opened = open_checkpoint(saved("llama"))
    model = opened.load_model()
    for tensors in ({"absent": torch.ones(1)}, {"model.norm.weight": torch.ones(3)}):
        with pytest.raises(UnsupportedError, match="found"):
            opened.disk_tensors(model, tensors)


def test_fused_on_disk_and_apart_in_the_model() -> None:
    model = tiny.causal_lm("llama")
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [  # type: ignore[assignment]
        WeightConverter("mlp.gate_up_proj.weight", parts, [Chunk(dim=0)])  # as transformers leaves it after loading
    ]
    disk = revert(model, dict(model.state_dict()))
    fused = "model.layers.0.mlp.gate_up_proj.weight"
    assert fused in disk
    mapping = DiskMap(model, disk)
    mapping.check(disk.__getitem__)
    gate, up = (model.get_parameter(f"model.layers.0.{part}").detach() for part in parts)
    whole = mapping.to_disk({f"model.layers.0.{part}": t for part, t in zip(parts, (gate, up), strict=True)})
    torch.testing.assert_close(whole[fused], torch.cat([gate, up]), rtol=0, atol=0)
    half = {f"model.layers.0.{parts[1]}": up}
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.gate_proj\.weight missing"):
        mapping.to_disk(half)
    filled = mapping.to_disk(half, missing=0.0)
    assert filled.keys() == {fused}
    torch.testing.assert_close(filled[fused], torch.cat([torch.zeros_like(gate), up]), rtol=0, atol=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refuses(ref: Path | str, kind: type[UnlearnError], code: int, message: str, **options: Any) -> None:
    """Opening (or, past that, reading or loading) ends in one line with the documented exit code."""

    def use() -> None:
        opened = open_checkpoint(ref, **options)
        opened.tensor_digest()
        opened.load_model()
        opened.load_tokenizer()

    with pytest.raises(kind, match=message) as caught:
        use()
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_missing_paths_and_hub_ids(tmp_path: Path) -> None:
    refuses(tmp_path / "absent", UsageError, 2, "found nothing there$")
    refuses("org/model", UsageError, 2, "pass --online")
    refuses("x" * 5000, UsageError, 2, "nothing there")
    (tmp_path / "file.txt").write_text("text")
    refuses(tmp_path / "file.txt", UsageError, 2, "another file")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", UsageError, 2, r"config\.json, found none")


def test_configs_that_are_not(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    for junk in (b"", b"{", b"\x00\xff\xfe", b"[1]", b"[" * 100_000, b'{"model_type": 3}', b'{"a": 1}'):
        (folder / "config.json").write_bytes(junk)
        refuses(folder, UsageError, 2, "expected")
    (folder / "config.json").unlink()
    refuses(folder, UsageError, 2, r"config\.json, found none")


@pytest.mark.parametrize(
    ("changes", "kind", "code", "message"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, UnsupportedError, 5, "found an encoder"),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, UnsupportedError, 5, "found an encoder"),
        ({"architectures": None, "model_type": "roberta"}, UnsupportedError, 5, "found an encoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, UnsupportedError, 5, "sequence-to-seq"),
        ({"is_encoder_decoder": True}, UnsupportedError, 5, "sequence-to-sequence"),
        ({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedError, 5, "another kind"),
        ({"architectures": ["LlamaModel"]}, UnsupportedError, 5, "another kind"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"},
            UnsupportedError,
            5,
            "another kind",
        ),
        ({"model_type": "made_up"}, UsageError, 2, "trust-remote-code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedError, 5, "quantised ones .gptq"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            UnsupportedError,
            5,
            "quantised ones .bitsandbytes",
        ),
        ({"hidden_size": "wide"}, UnsupportedError, 5, "transformers cannot load it"),
        ({"num_hidden_layers": 9}, UsageError, 2, "missing"),
        ({"transformers_weights": "adapter_model.bin"}, UnsupportedError, 5, "names another file"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_measured(
    fresh: Callable[..., Path], changes: dict[str, Any], kind: type[UnlearnError], code: int, message: str
) -> None:
    folder = fresh("llama")
    rewrite(folder, **changes)
    refuses(folder, kind, code, message)


def test_an_architecture_may_be_left_unnamed(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    rewrite(folder, architectures=None)
    assert open_checkpoint(folder).task == "causal_lm"


@pytest.mark.parametrize(("name", "dtype"), [("up_proj.qweight", torch.int32), ("up_proj.weight", torch.float8_e4m3fn)])
def test_packed_weights_without_a_config_entry(fresh: Callable[..., Path], name: str, dtype: torch.dtype) -> None:
    folder = fresh("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.{name}"] = torch.ones(48, 32).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuses(folder, UnsupportedError, 5, "quantised")


def test_adapters_and_distributed_checkpoints(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    refuses(folder, UnsupportedError, 5, "distributed")
    (folder / "adapter_config.json").write_text("{}")
    refuses(folder, UnsupportedError, 5, "adapter")


def test_truncated_and_missing_shards(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama", SHARDED)
    shard = sorted(folder.glob("*.safetensors"))[1]
    raw = shard.read_bytes()
    for length in (0, 7, 8, 100, len(raw) - 1):
        shard.write_bytes(raw[:length])
        refuses(folder, UsageError, 2, "complete safetensors file")
    shard.write_bytes(raw + b"\0")
    refuses(folder, UsageError, 2, "complete safetensors file")
    shard.unlink()
    refuses(folder, UsageError, 2, "found no such file")
    shard.write_bytes(raw)
    open_checkpoint(folder)


def test_indexes_that_lie(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama", SHARDED)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = next(iter(index["weight_map"].items()))
    shutil.copy(folder / shard, folder.parent / "beside.safetensors")
    for weight_map, message in [
        ({**index["weight_map"], name: "../beside.safetensors"}, "found one outside"),
        ({**index["weight_map"], name: str(folder / shard)}, "found one outside"),
        ({**index["weight_map"], "absent": shard}, "expected absent in"),
        ({}, "weight_map"),
        ({name: 3}, "weight_map"),
        (None, "weight_map"),
    ]:
        path.write_text(json.dumps({"weight_map": weight_map}))
        refuses(folder, UsageError, 2, message)
    path.write_text(json.dumps(index))
    double = sorted(folder.glob("*.safetensors"))
    tensors = load_file(double[0]) | {next(iter(load_file(double[1]))): torch.ones(1)}
    save_file(tensors, double[0], {"format": "pt"})
    refuses(folder, UsageError, 2, "in both")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    model = tiny.causal_lm("llama", dtype=dtype)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate_proj.weight")[-1, -1] = value
    folder = tiny.save(model, None, tmp_path / "in")
    with pytest.raises(UsageError, match=r"NaN or infinity in model\.layers\.1\.mlp\.gate_proj\.weight") as caught:
        open_checkpoint(folder).manifest()
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="NaN or infinity"):
        LiveCheckpoint(model).tensor_digest()


def test_tokenizers_that_do_not_fit(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    padded = tiny.tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(folder)
    assert len(open_checkpoint(folder).load_tokenizer()) == 97  # harmless: the last one is never an input
    tiny.tokenizer(97, merges=[("a", "b")]).save_pretrained(folder)
    refuses(folder, UsageError, 2, "ids below 96, the model's vocabulary, found id 96")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UnlearnError, match="tokenizer"):
        open_checkpoint(folder).load_tokenizer()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refuses(folder, UsageError, 2, "expected a tokenizer")
    assert open_checkpoint(folder).tokenizer_digest() is None


def test_chat_template_inside_the_tokenizer_config(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    apart = open_checkpoint(folder).chat_template_digest()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert open_checkpoint(folder).chat_template_digest() is None
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert open_checkpoint(folder).chat_template_digest() == apart


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ImportError("flash_attn"), ResourceError, "a package is missing .flash_attn."),
        (MemoryError(), ResourceError, "ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), ResourceError, "ran out"),
        (torch.OutOfMemoryError("CUDA"), ResourceError, "ran out"),
        (KeyError("first\nsecond"), UnsupportedError, "KeyError"),
        (UsageError("mine"), UsageError, "^mine$"),
    ],
    ids=repr,
)
def test_what_transformers_raises_becomes_one_line(raised: Exception, kind: type[UnlearnError], message: str) -> None:
    verbosity = logging.get_verbosity()
    with pytest.raises(kind, match=message) as caught, transformers_errors("where"):
        raise raised
    assert "\n" not in str(caught.value)
    assert logging.get_verbosity() == verbosity
    assert logging.is_progress_bar_enabled()


# -- pickles -----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def pickled(folder: Path, content: object | None = None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_unless_asked_for(
    saved: Callable[..., Path], fresh: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pickled(fresh("gpt2"))
    refuses(folder, UsageError, 2, r"save_pretrained.*--allow-pickle")
    opened = open_checkpoint(folder, allow_pickle=True)
    original = open_checkpoint(saved("gpt2"))
    assert opened.kind == "pickle"
    assert opened.tensor_digest() == original.tensor_digest()
    assert {row["path"] for row in opened.manifest()} >= {"pytorch_model.bin"}
    assert opened.describe()["parameters"] == original.describe()["parameters"]
    for name, parameter in opened.load_model().named_parameters():
        torch.testing.assert_close(parameter, original.load_model().get_parameter(name))
    deltas = write_edited(opened, tmp_path / "out", untouched)
    assert deltas.tensor_digest == original.tensor_digest()
    assert deltas.left_out == ["pytorch_model.bin"]
    assert contents(tmp_path / "out") == contents(saved("gpt2"))


def test_pickles_are_never_executed(
    fresh: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(fresh("llama"), {"a": Evil()})
    refuses(folder, UsageError, 2, "tensors and nothing else", allow_pickle=True)
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    refuses(folder, UsageError, 2, "state dict of tensors", allow_pickle=True)
    (folder / "pytorch_model.bin").rename(folder / "other.pt")
    refuses(folder, UsageError, 2, "expected pytorch_model.bin", allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_safetensors_win_over_pickles(fresh: Callable[..., Path]) -> None:
    folder = fresh("llama")
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder, allow_pickle=True).kind == "folder"


# -- live models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral", "vit"])
def test_a_live_model_is_its_saved_self(saved: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    """Digest, names and written weights equal those of the folder that holds the same model."""
    opened = open_checkpoint(saved(arch))
    model = opened.load_model()
    live = LiveCheckpoint(model, tiny.tokenizer() if opened.task == "causal_lm" else None)
    assert live.task == opened.task
    assert live.tensor_digest() == opened.tensor_digest()
    assert sorted(live.tensor_names()) == sorted(opened.tensor_names())
    assert live.manifest() == []
    model.train()
    assert live.load_model() is model
    assert not model.training
    described = live.describe()
    assert {key: described[key] for key in ("architecture", "parameters", "dtype", "tied", "chat_template_digest")} == {
        key: opened.describe()[key] for key in ("architecture", "parameters", "dtype", "tied", "chat_template_digest")
    }
    deltas = write_edited(live, tmp_path / "out", lambda name, t: t * 2 if t.ndim == 2 else None)
    written = open_checkpoint(tmp_path / "out")
    assert written.tensor_digest() == deltas.tensor_digest != live.tensor_digest()
    assert deltas.manifest == written.manifest()
    after = live.reopen(tmp_path / "out")
    assert after.tensor_digest() == deltas.tensor_digest
    assert opened.tensor_digest() == live.tensor_digest()
    if opened.task == "causal_lm":
        assert written.load_tokenizer()("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_a_plain_module(tmp_path: Path) -> None:
    model = Plain()
    live = LiveCheckpoint(model)
    assert (live.task, live.name, live.kind, live.config) == ("image_classification", "Plain", "live", {})
    assert "second.weight" not in live.tensor_names()  # tied to the first
    assert "norm.running_var" in live.tensor_names()
    before = live.tensor_digest()
    wanted = {name: p.detach() + 1 for name, p in model.named_parameters()}
    on_disk = live.disk_tensors(model, wanted)
    deltas = write_edited(live, tmp_path / "out", lambda name, t: on_disk.get(name))
    assert live.tensor_digest() == before != deltas.tensor_digest
    after = live.reopen(tmp_path / "out").load_model()
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=0)
    assert after.second.weight is after.first.weight  # type: ignore[union-attr]
    doubled = live.load_model("float64")
    assert doubled is not model
    assert {p.dtype for p in doubled.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.first.weight.add_(1)
    assert live.tensor_digest() != before  # a live model is read anew
    for missing in (live.load_tokenizer, live.image_processor):
        with pytest.raises(UsageError, match="expected"):
            missing()


def test_conversion_keeps_computed_tables(saved: Callable[..., Path]) -> None:
    model = open_checkpoint(saved("llama")).load_model()
    low = LiveCheckpoint(model).load_model("bfloat16")
    expected = open_checkpoint(saved("llama")).load_model("bfloat16")
    for (name, buffer), (_, other) in zip(expected.named_buffers(), low.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype, name
        torch.testing.assert_close(buffer, other, rtol=0, atol=0)


# -- the hub, GGUF -----------------------------------------------------------------------------------------------------


def test_hub_ids_go_through_the_cache(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, "*.bin" in allow_patterns, "*.py" in allow_patterns))
        return str(saved("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = open_checkpoint("org/model@v1.0", online=True)
    assert (opened.name, opened.revision) == ("org/model", "llama-1")
    open_checkpoint("model", online=True, allow_pickle=True, trust_remote_code=True)
    assert asked == [("org/model", "v1.0", False, False), ("model", None, True, True)]

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refuses("org/model", ResourceError, 5, "cannot be downloaded", online=True)
    refuses("../org/model", UsageError, 2, "nothing there", online=True)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    refuses(path, ResourceError, 5, "gguf and accelerate")


def test_damaged_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    for content in (b"GGUF", b"GGUF" + bytes(40), b"GGUF" + b"\xff" * 100):
        path.write_bytes(content)
        refuses(path, UnlearnError, 5, "model|transformers")


def tiny_gguf(path: Path) -> Path:
    """A one-block Llama in GGUF: its own quantised and float tensors, and a small vocabulary."""
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(path, "llama")
    width, inner, vocab = 32, 64, 48
    file.add_name("tiny")
    file.add_context_length(64)
    file.add_embedding_length(width)
    file.add_block_count(1)
    file.add_feed_forward_length(inner)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_rope_dimension_count(16)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(vocab)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(["<s>", "</s>", "#$", *(chr(ord("!") + i) for i in range(vocab - 3))])
    file.add_token_types([3, 3] + [1] * (vocab - 2))
    file.add_token_merges(["# $"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    noise = np.random.default_rng(0)
    shapes = {"token_embd": (vocab, width), "output_norm": (width,)}
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width)}
    shapes |= {"blk.0.attn_k": (16, width), "blk.0.attn_v": (16, width), "blk.0.attn_output": (width, width)}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
    for name, shape in shapes.items():
        values = noise.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            file.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            file.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_gguf_is_dequantised_and_written_as_a_folder(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    opened = open_checkpoint(path)
    assert (opened.kind, opened.task, opened.name) == ("gguf", "causal_lm", "tiny.gguf")
    assert opened.manifest() == [{"path": "tiny.gguf", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}]
    model = opened.load_model()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    opened.disk_names(model)
    deltas = write_edited(opened, tmp_path / "copy", untouched)
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.kind == "folder"
    assert copy.tensor_digest() == deltas.tensor_digest == opened.tensor_digest()
    assert "quantization_config" not in copy.config
    again = copy.load_model()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=0)
    text = "#$%&"
    assert copy.load_tokenizer()(text)["input_ids"] == opened.load_tokenizer()(text)["input_ids"]
    assert path.read_bytes() == raw
    with pytest.raises(UsageError):
        opened.image_processor()
