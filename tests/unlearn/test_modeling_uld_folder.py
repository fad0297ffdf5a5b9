"""Folders of a difference: written, read back, and loaded by transformers alone where the toolkit is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.unlearn.uld_models import Rule, assert_close, difference, external, tokens
from unlearn.checkpoints import modeling_uld
from unlearn.checkpoints.modeling_uld import ULDConfig, ULDForCausalLM, ULDForImageClassification

RULE = Rule(0.6, 0.05, 0.5, "never")


def single(arch: str) -> Any:
    return tiny.image_classifier(arch) if arch in tiny.VISION else tiny.causal_lm(arch)


@pytest.mark.parametrize("arch", ["gpt2", "qwen2", "mixtral", "gemma2"])
@torch.no_grad()
def test_a_folder_gives_back_the_model(arch: str, tmp_path: Path) -> None:
    whole = difference(single(arch), RULE)
    whole.generation_config.max_new_tokens = 3
    whole.save_pretrained(tmp_path / "a")
    plain = single(arch)
    plain.save_pretrained(tmp_path / "plain")
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    assert (tmp_path / "a" / "modeling_uld.py").read_bytes() == Path(modeling_uld.__file__).read_bytes()
    again, info = ULDForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(tokens()).logits, whole(tokens()).logits)
    assert again.generation_config.max_new_tokens == 3
    assert again.config.rule == RULE
    assert not again.training
    again.save_pretrained(tmp_path / "b")
    for name in (weights, "assistant.safetensors", "config.json", "modeling_uld.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@torch.no_grad()
def test_types_and_shards(tmp_path: Path) -> None:
    whole = difference(single("llama"), RULE)
    whole.save_pretrained(tmp_path, max_shard_size=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    half = ULDForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(tokens()).logits.dtype == torch.float32
    stored = load_file(tmp_path / "assistant.safetensors")
    assert stored["assistant.rule"].dtype == torch.float64
    assert {t.dtype for name, t in stored.items() if name != "assistant.rule"} == {torch.float32}
    assert stored.keys() == whole.assistant_tensors().keys()


@torch.no_grad()
def test_images_and_external_assistants(tmp_path: Path) -> None:
    whole = difference(single("vit"), RULE)
    whole.save_pretrained(tmp_path / "vit")
    pixels = torch.ones(1, 3, tiny.IMAGE, tiny.IMAGE)
    again = ULDForImageClassification.from_pretrained(tmp_path / "vit")
    assert torch.equal(again(pixels).logits, whole(pixels).logits)
    assert again.config.id2label == whole.config.id2label
    other = external(single("llama"), tiny.causal_lm("gpt2", seed=4))  # its head and embedding are tied
    other.save_pretrained(tmp_path / "external")
    back = ULDForCausalLM.from_pretrained(tmp_path / "external")
    assert_close(back(tokens()).logits, other(tokens()).logits)


def test_what_the_configuration_says() -> None:
    model = single("llama")
    config = difference(model, RULE).config
    content = json.loads(config.to_json_string())
    assert content["model_type"] == "uld"
    assert content["inference_time"] is True
    assert content["architectures"] == ["ULDForCausalLM"]
    assert content["target"]["model_type"] == "llama"
    assert content["target"]["architectures"] == ["LlamaForCausalLM"]
    assert content["auto_map"]["AutoModelForCausalLM"] == "modeling_uld.ULDForCausalLM"
    for key in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "eos_token_id"):
        assert content[key] == getattr(model.config, key)
    assert "_name_or_path" not in json.dumps(content)
    assert config.get_text_config() is model.config  # caches are made from it
    again = ULDConfig.from_dict(content)
    assert again.rule == RULE
    assert again.target_config.to_dict() == {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    assert again.get_text_config(decoder=True).model_type == "llama"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 0.0}, "found another rule"),
        ({"outside": "original"}, "found another rule"),
        ({"ratio": 2.0}, "ratio from 0 to 1"),
        (
            {"assistant": {"kind": "blocks", "path": "model.layers", "first": 0, "last": 2, "scale": 0.5}},
            "another rule",
        ),
        ({"assistant": {"kind": "spell"}}, "an assistant of kind blocks"),
        ({"target": {"model_type": "no_such"}}, "expected an architecture that transformers has"),
    ],
)
def test_a_configuration_that_disagrees_with_the_weights(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    difference(single("llama"), RULE).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        ULDForCausalLM.from_pretrained(tmp_path)


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    whole = difference(single("llama"), RULE)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "assistant.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "assistant.rule"}, tmp_path / "assistant.safetensors")
    with pytest.raises(ValueError, match=r"expected assistant.rule in assistant.safetensors, found none"):
        ULDForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "assistant.safetensors").unlink()
    with pytest.raises(OSError, match=r"assistant\.safetensors"):
        ULDForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found push_to_hub; save first"):
        whole.save_pretrained(tmp_path, push_to_hub=True)


def test_without_its_code_a_folder_never_loads_as_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    difference(single("gpt2"), RULE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


_ELSEWHERE = """
import json, sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("unlearn", "probes", "attacks", "reports"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
text = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    torch.save({
        "logits": text(ids).logits,
        "generated": text.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2),
        "images": AutoModelForImageClassification.from_pretrained(sys.argv[2], trust_remote_code=True)(
            torch.ones(1, 3, 32, 32)).logits,
    }, sys.argv[4])
text.save_pretrained(sys.argv[4] + ".again")
"""


@torch.no_grad()
def test_transformers_alone_loads_and_generates(tmp_path: Path) -> None:
    text, vision = difference(single("qwen2"), RULE), difference(single("vit"), RULE)
    text.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "text"), str(tmp_path / "vision"), json.dumps(tokens().tolist()), str(out)]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ELSEWHERE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(out)
    torch.testing.assert_close(found["logits"], text(tokens()).logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["generated"], text.generate(tokens(), max_new_tokens=6, do_sample=False, num_beams=2))
    pixels = torch.ones(1, 3, tiny.IMAGE, tiny.IMAGE)
    torch.testing.assert_close(found["images"], vision(pixels).logits, rtol=1e-6, atol=1e-6)
    for name in ("model.safetensors", "assistant.safetensors", "modeling_uld.py"):
        assert (tmp_path / "out.again" / name).read_bytes() == (tmp_path / "text" / name).read_bytes()
