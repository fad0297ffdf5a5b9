"""A folder that holds a difference of two models: written beside the target's weights, opened as one model."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from probes.errors import UnlearnError, UnsupportedError, UsageError
from tests import tiny
from unlearn import load_model
from unlearn.checkpoints import modeling_uld
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint, write_edited
from unlearn.checkpoints.difference import remote_code
from unlearn.checkpoints.manifest import identify, weight_files
from unlearn.checkpoints.modeling_uld import Rule, ULDConfig, ULDForCausalLM, ULDForImageClassification, rule_tensor

ASSISTANT, RULE, CODE = "assistant.safetensors", "assistant.rule", "modeling_uld.py"
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "vit": "vit.layers"}
IDS = torch.tensor([[5, 9, 33, 60, 12, 7, 41]])  # [B, T]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untouched(name: str, tensor: torch.Tensor) -> None:
    return None


def beside(model: nn.Module, arch: str, rule: Rule, external: nn.Module | None = None) -> tuple[ULDConfig, Any]:
    """Configuration and tensors of an assistant with random weights."""
    head, noise = "lm_head", torch.Generator().manual_seed(3)
    if external is not None:
        part: Any = {"kind": "external", "config": external.config.to_dict(), "head": head}  # type: ignore[union-attr]
        part["logit_rule"] = {"scale": 1.0, "divide": False, "cap": None}
        config = ULDConfig.beside(model, rule, assistant=part, head=head)
        tensors = {f"assistant.{name}": tensor.clone() for name, tensor in external.state_dict().items()}
        return config, tensors | {RULE: rule_tensor(config)}
    path = BLOCKS[arch]
    head = "classifier" if arch == "vit" else head
    place = {"kind": "blocks", "path": path, "first": 1, "last": 3, "scale": 0.5}
    config = ULDConfig.beside(model, rule, assistant=place, head=head)
    tensors = {}
    for name, module in model.named_modules():
        if name.startswith((f"{path}.1.", f"{path}.2.")) and getattr(module, "weight", torch.empty(0)).ndim == 2:
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape  # type: ignore[union-attr]
            tensors[f"assistant.{name}.lora_A"] = torch.randn(4, columns, generator=noise)
            tensors[f"assistant.{name}.lora_B"] = torch.randn(rows, 4, generator=noise)
    assert tensors
    return config, tensors | {RULE: rule_tensor(config)}


def write(source: Checkpoint, out: Path, arch: str, external: nn.Module | None = None, **rule: Any) -> Any:
    """The folder as an editor writes it, and the same model made in memory."""
    chosen = Rule(**({"alpha": 0.75, "rank_share": 0.1, "ratio": 0.01, "outside": "original"} | rule))
    model = source.load_model()
    config, tensors = beside(model, arch, chosen, external)
    replaced = {"config.json": config.to_json_string().encode(), CODE: remote_code()}
    deltas = write_edited(source, out, untouched, added={ASSISTANT: tensors}, replaced=replaced)
    kind = ULDForImageClassification if source.task == "image_classification" else ULDForCausalLM
    return deltas, kind.over(model, config, tensors).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Source and folder by architecture, which tests only read."""
    root = tmp_path_factory.mktemp("made")

    def make(arch: str = "gpt2", shards: int = 1) -> tuple[Path, Path]:
        source, out = root / f"{arch}-{shards}", root / f"uld-{arch}-{shards}"
        if not out.exists():
            vision = arch in tiny.VISION
            model = tiny.image_classifier(arch) if vision else tiny.causal_lm(arch)
            tiny.save(model, None if vision else tiny.tokenizer(), source, shards)
            write(open_checkpoint(source), out, arch)
        return source, out

    return make


@pytest.fixture
def fresh(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made()[1], tmp_path / "folder"))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "shards"), [("gpt2", 1), ("llama", 3)])
def test_the_folder_holds_the_targets_files_and_the_assistants(
    made: Callable[..., tuple[Path, Path]], arch: str, shards: int
) -> None:
    source, out = made(arch, shards)
    before, after = contents(source), contents(out)
    assert after.keys() - before.keys() == {ASSISTANT, CODE}
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    assert after[CODE] == Path(modeling_uld.__file__).read_bytes()
    assert set(weight_files(out).files) == {*weight_files(source).files, ASSISTANT}
    opened = open_checkpoint(out)
    assert opened.tensor_digest() == identify(out).tensor_digest != open_checkpoint(source).tensor_digest()
    assert {row["path"] for row in opened.manifest()} == after.keys()
    names = set(opened.tensor_names())
    assert names == {*open_checkpoint(source).tensor_names(), *load_file(out / ASSISTANT)}


def test_the_digest_covers_the_rule(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source = open_checkpoint(made()[0])
    digests = {write(source, tmp_path / f"{alpha}", "gpt2", alpha=alpha)[0].tensor_digest for alpha in (0.0, 0.5)}
    assert len(digests | {open_checkpoint(made()[1]).tensor_digest()}) == 3


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "shards"), [("gpt2", 1), ("llama", 3)])
def test_the_folder_is_the_model_in_memory(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, arch: str, shards: int
) -> None:
    source = open_checkpoint(made(arch, shards)[0])
    deltas, composite = write(source, tmp_path / "out", arch)
    opened = source.reopen(tmp_path / "out")
    assert (opened.kind, opened.task, opened.difference) == ("folder", "causal_lm", True)
    assert opened.tensor_digest() == deltas.tensor_digest
    assert opened.manifest() == deltas.manifest
    model = opened.load_model()
    assert isinstance(model, ULDForCausalLM)
    assert not model.training
    assert torch.equal(logits(model), logits(composite))
    assert not torch.allclose(logits(model), source.load_model()(input_ids=IDS).logits.log_softmax(-1), atol=1e-3)
    natively = ULDForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(natively))
    assert model.generation_config.to_dict() == natively.generation_config.to_dict()
    ids = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(ids, composite.generate(IDS, max_new_tokens=8, do_sample=False))
    assert torch.equal(logits(load_model(tmp_path / "out", dtype="float32", device="cpu")), logits(model))


def test_the_same_difference_over_other_layouts(made: Callable[..., tuple[Path, Path]]) -> None:
    whole, sharded = (open_checkpoint(made("llama", shards)[1]) for shards in (1, 3))
    assert whole.tensor_digest() == sharded.tensor_digest()
    assert torch.equal(logits(whole.load_model()), logits(sharded.load_model()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_types_and_attention_are_spelled_out(made: Callable[..., tuple[Path, Path]], dtype: str) -> None:
    source, out = (open_checkpoint(folder) for folder in made())
    model: Any = out.load_model(dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.target.parameters()} == {wanted}
    assert {p.dtype for p in model.assistant.parameters()} == {torch.float64 if dtype == "float64" else torch.float32}
    assert model.config._attn_implementation == model.target.config._attn_implementation == out.attention == "sdpa"
    assert out.attention == source.attention
    with pytest.raises(UsageError, match="dtype among"):
        out.load_model("int8")
    with pytest.raises(UnlearnError, match="device"):
        out.load_model(device="nowhere:3")


def test_an_attention_that_the_target_asks_for_is_dropped(fresh: Path) -> None:
    target = json.loads((fresh / "config.json").read_text())["target"]
    asked = {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}
    rewrite(fresh, target=target | asked, **asked)
    model: Any = open_checkpoint(fresh).load_model()
    assert model.target.config._attn_implementation == "sdpa"


def test_describe_names_both(made: Callable[..., tuple[Path, Path]]) -> None:
    source, out = (open_checkpoint(folder) for folder in made())
    target, whole = source.describe(), out.describe()
    assert whole["architecture"] == "ULDForCausalLM over GPT2LMHeadModel"
    extra = sum(t.numel() for name, t in load_file(made()[1] / ASSISTANT).items() if name != RULE)
    assert whole["parameters"] == target["parameters"] + extra
    assert (whole["dtype"], whole["tied"], whole["attention"]) == ("F32", True, "sdpa")
    for same in ("task", "tokenizer_digest", "chat_template_digest", "kind"):
        assert whole[same] == target[same]
    assert whole["tensor_digest"] != target["tensor_digest"]
    assert str(made()[1].parent) not in json.dumps(whole)


def test_the_tokenizer_is_the_sources(fresh: Path, made: Callable[..., tuple[Path, Path]]) -> None:
    expected = open_checkpoint(made()[0]).load_tokenizer()
    assert open_checkpoint(fresh).load_tokenizer()("a b~c").input_ids == expected("a b~c").input_ids
    path = fresh / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["tokenizer_class"]
    path.write_text(json.dumps(content))
    shutil.copy(path, fresh.parent / "tokenizer_config.json")
    source = shutil.copytree(made()[0], fresh.parent / "source")
    shutil.copy(path, source / "tokenizer_config.json")
    theirs, mine = (open_checkpoint(folder).load_tokenizer() for folder in (source, fresh))
    assert type(theirs) is type(mine)
    assert theirs("a b~c").input_ids == mine("a b~c").input_ids
    (fresh / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="expected a tokenizer"):
        open_checkpoint(fresh).load_tokenizer()


def test_a_copy_of_the_open_checkpoint_and_of_its_model(made: Callable[..., tuple[Path, Path]]) -> None:
    opened = open_checkpoint(made()[1])
    described = opened.describe()
    twin = copy.deepcopy(opened)
    assert twin.describe() == described
    assert twin.reopen(made()[1]).describe() == described
    model = twin.load_model()
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("trust", [False, True])
def test_the_folders_python_file_is_never_run(fresh: Path, trust: bool) -> None:
    (fresh / CODE).write_text("raise RuntimeError('the code of the folder ran')\n")
    (fresh / "configuration_uld.py").write_text("raise RuntimeError('the code of the folder ran')\n")
    opened = open_checkpoint(fresh, trust_remote_code=trust)
    opened.describe()
    model = opened.load_model()
    assert type(model) is ULDForCausalLM
    opened.load_tokenizer()
    assert type(load_model(fresh, trust_remote_code=trust)) is ULDForCausalLM
    (fresh / CODE).unlink()
    assert torch.equal(logits(open_checkpoint(fresh).load_model()), logits(model))


def test_transformers_alone_runs_it_or_fails(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Without `trust_remote_code` there is no model; above all not the target alone, which is the original."""
    code = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM
folder, out = sys.argv[1:]
found = []
for load in (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained,
             lambda f: AutoModelForCausalLM.from_pretrained(f, trust_remote_code=False)):
    try:
        load(folder)
        found.append("loaded")
    except Exception as error:
        found.append(type(error).__name__)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
torch.save(model(input_ids=torch.tensor([[5, 9, 33, 60, 12, 7, 41]])).logits.detach(), out)
assert "unlearn" not in sys.modules and "probes" not in sys.modules
print()  # transformers has asked a question on this line
print(json.dumps(found))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(made()[1]), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == ["ValueError"] * 3
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load_model(made()[1])))


def test_importing_the_package_loads_no_model_library() -> None:
    code = (
        "import sys, unlearn\nassert 'load_model' in unlearn.__all__\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_call_loads_any_checkpoint(made: Callable[..., tuple[Path, Path]]) -> None:
    source, _ = made()
    assert torch.equal(logits(load_model(source)), logits(open_checkpoint(source).load_model()))
    assert {p.dtype for p in load_model(str(source), dtype="bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="found nothing there"):
        load_model(source / "absent")


# -- other sources -----------------------------------------------------------------------------------------------------


def test_a_live_source(tmp_path: Path, made: Callable[..., tuple[Path, Path]]) -> None:
    live = LiveCheckpoint(tiny.causal_lm("gpt2"), tiny.tokenizer())
    deltas, composite = write(live, tmp_path / "out", "gpt2")
    assert deltas.tensor_digest == open_checkpoint(made()[1]).tensor_digest()
    after: Any = live.reopen(tmp_path / "out")
    assert (after.kind, after.difference) == ("live", True)
    assert isinstance(after.model, ULDForCausalLM)
    assert after.tensor_digest() == deltas.tensor_digest == open_checkpoint(tmp_path / "out").tensor_digest()
    assert after.describe()["architecture"] == "ULDForCausalLM over GPT2LMHeadModel"
    assert torch.equal(logits(after.load_model()), logits(composite))
    assert after.load_model() is after.model
    assert after.load_tokenizer()("ab").input_ids == tiny.tokenizer()("ab").input_ids
    low: Any = after.load_model("bfloat16")
    assert torch.equal(logits(low), logits(open_checkpoint(tmp_path / "out").load_model("bfloat16")))
    assert {p.dtype for p in after.model.parameters()} == {torch.float32}
    assert LiveCheckpoint(low).load_model("bfloat16") is low


def test_a_gguf_source(tmp_path: Path) -> None:
    from tests.unlearn.test_checkpoint import tiny_gguf

    source = open_checkpoint(tiny_gguf(tmp_path / "tiny.gguf"))
    model = source.load_model()
    external = tiny.causal_lm("gpt2", vocab=48, n_layer=1)
    deltas, composite = write(source, tmp_path / "out", "llama", external)
    opened = source.reopen(tmp_path / "out")
    assert opened.tensor_digest() == deltas.tensor_digest
    ids = IDS % model.config.vocab_size  # type: ignore[operator, union-attr]
    assert torch.equal(opened.load_model()(input_ids=ids).logits, composite(input_ids=ids).logits)
    assert opened.load_tokenizer()("#$%&").input_ids == source.load_tokenizer()("#$%&").input_ids


def test_pickled_weights_are_written_as_safetensors(tmp_path: Path) -> None:
    model = tiny.causal_lm("gpt2")
    folder = tiny.save(model, tiny.tokenizer(), tmp_path / "in")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    source = open_checkpoint(folder, allow_pickle=True)
    deltas, composite = write(source, tmp_path / "out", "gpt2")
    assert deltas.left_out == ["pytorch_model.bin"]
    assert torch.equal(logits(source.reopen(tmp_path / "out").load_model()), logits(composite))


def test_an_external_assistant(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source = open_checkpoint(made("llama", 3)[0])
    other = tiny.causal_lm("gpt2", seed=5, n_layer=1)
    deltas, composite = write(source, tmp_path / "out", "llama", other)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.tensor_digest() == deltas.tensor_digest
    assert torch.equal(logits(opened.load_model()), logits(composite))
    assert opened.describe()["architecture"] == "ULDForCausalLM over LlamaForCausalLM"
    tensors = load_file(tmp_path / "out" / ASSISTANT)
    del tensors["assistant.transformer.h.0.ln_1.weight"]
    save_file(tensors, tmp_path / "out" / ASSISTANT, {"format": "pt"})
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel"):
        open_checkpoint(tmp_path / "out").load_model()


def test_a_classifier(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source = open_checkpoint(made("vit")[0])
    _, composite = write(source, tmp_path / "out", "vit")
    opened = open_checkpoint(tmp_path / "out")
    assert (opened.task, opened.describe()["architecture"]) == (
        "image_classification",
        "ULDForImageClassification over ViTForImageClassification",
    )
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened.load_model()(pixel_values=pixels).logits, composite(pixel_values=pixels).logits)
    for key in ("num_channels", "image_size", "id2label", "label2id"):
        assert opened.config[key] == opened.config["target"][key]
    opened.image_processor()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_difference_is_not_edited(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    opened = open_checkpoint(made()[1])
    for source in (opened, LiveCheckpoint(opened.load_model())):
        with pytest.raises(UnsupportedError, match="edit the checkpoint it was made from") as caught:
            write_edited(source, tmp_path / "out", untouched)
        assert "\n" not in str(caught.value)
        model = source.load_model()
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for ask in (source.disk_names, source.unused_tensors, partial(source.disk_tensors, tensors=weights)):
            with pytest.raises(UnsupportedError, match="difference of two"):
                ask(model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": None}, "alpha"),
        ({"rank_share": 0.5}, "rank_share"),
        ({"ratio": 0}, "ratio"),
        ({"outside": "never"}, "outside"),
        ({"outside": "both"}, "outside"),
        ({"assistant": {"first": 0}}, "first"),
        ({"assistant": {"last": 2}}, "last"),
        ({"assistant": {"scale": 0}}, "scale"),
        ({"assistant": {"scale": None}}, "scale"),
    ],
    ids=str,
)
def test_a_config_that_says_otherwise_than_the_weights(fresh: Path, changes: dict[str, Any], field: str) -> None:
    if "assistant" in changes:
        changes = {"assistant": json.loads((fresh / "config.json").read_text())["assistant"] | changes["assistant"]}
    rewrite(fresh, **changes)
    with pytest.raises(UsageError, match=f"expected {field} ") as caught:
        open_checkpoint(fresh)
    assert "\n" not in str(caught.value)


def refuses(folder: Path, kind: type[UnlearnError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(folder).load_model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"target": None}, UsageError, "the target's config"),
        ({"target": {"model_type": "made_up"}}, UsageError, "that transformers has, found made_up"),
        ({"target": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}}, UnsupportedError, "an encoder"),
        ({"target": {"model_type": "vit"}}, UnsupportedError, "another kind"),
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedError, "another kind of difference"),
        ({"architectures": None}, UnsupportedError, "another kind of difference"),
        ({"assistant": None}, UnsupportedError, "an assistant of kind blocks"),
        ({"assistant": {"kind": "adapter"}}, UnsupportedError, "an assistant of kind blocks"),
    ],
)
def test_configs_that_are_not(fresh: Path, changes: dict[str, Any], kind: type[UnlearnError], message: str) -> None:
    rewrite(fresh, **changes)
    refuses(fresh, kind, message)


def test_a_target_with_its_own_code(fresh: Path) -> None:
    rewrite(fresh, target={"model_type": "made_up", "architectures": ["MadeUpForCausalLM"]})
    with pytest.raises(UnsupportedError, match="made_up"):
        open_checkpoint(fresh, trust_remote_code=True).load_model()


def test_weights_that_are_not_there(fresh: Path) -> None:
    whole, assistant = load_file(fresh / "model.safetensors"), load_file(fresh / ASSISTANT)
    less = {name: tensor for name, tensor in whole.items() if name != "transformer.ln_f.weight"}
    save_file(less, fresh / "model.safetensors", {"format": "pt"})
    refuses(fresh, UsageError, r"1 missing, transformer\.ln_f\.weight")
    save_file(whole, fresh / "model.safetensors", {"format": "pt"})
    pair = next(name for name in assistant if name.endswith("lora_B"))
    less = {name: tensor for name, tensor in assistant.items() if name != pair}
    save_file(less, fresh / ASSISTANT, {"format": "pt"})
    refuses(fresh, UnsupportedError, "lora_A and lora_B")
    save_file(assistant | {"assistant.other": torch.ones(2)}, fresh / ASSISTANT, {"format": "pt"})
    refuses(fresh, UnsupportedError, "low-rank matrices")
    del assistant[RULE]
    save_file(assistant, fresh / ASSISTANT, {"format": "pt"})
    refuses(fresh, UsageError, r"the tensor assistant\.rule")
    (fresh / ASSISTANT).unlink()
    refuses(fresh, UsageError, r"expected the shard assistant\.safetensors")
    (fresh / "model.safetensors").rename(fresh / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"expected model\.safetensors"):
        open_checkpoint(fresh, allow_pickle=True)


@pytest.mark.parametrize("name", [RULE, "assistant.transformer.h.1.mlp.c_fc.lora_A"])
def test_numbers_that_are_none(fresh: Path, name: str) -> None:
    tensors = load_file(fresh / ASSISTANT)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, fresh / ASSISTANT, {"format": "pt"})
    with pytest.raises(UsageError):
        open_checkpoint(fresh).tensor_digest()


def test_the_code_is_part_of_the_package() -> None:
    assert remote_code() == Path(modeling_uld.__file__).read_bytes()
    compile(remote_code(), CODE, "exec")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_targets_own_class_does_not_give_the_original(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, arch: str
) -> None:
    """Its configuration lies in the folder's: without a guard transformers takes it and loads the target alone."""
    kinds = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
    with pytest.raises(OSError, match="trust_remote_code=True"):
        kinds.pop(arch).from_pretrained(made(arch)[1])
    [another] = kinds.values()
    with pytest.raises((OSError, ValueError)):
        another.from_pretrained(made(arch)[1])
    model: Any = load_model(made(arch)[1])
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(OSError, match="trust_remote_code=True"):
        type(model.target).from_pretrained(tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert again.tensor_digest() == open_checkpoint(made(arch)[1]).tensor_digest()
    assert torch.equal(logits(again.load_model()), logits(model))
