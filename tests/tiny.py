"""Tiny random models, tokenizers and checkpoints, made on the spot: the test suite downloads nothing.

Every 1-D parameter (norm gains, biases) and BatchNorm statistic is moved off its trivial starting value, so that a
test notices a norm applied twice or a bias forgotten: a freshly initialised RMSNorm, for one, is idempotent.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

PAD, EOS, BOS, UNK = 0, 1, 2, 3  # ids in `tokenizer()`; every language model below is configured with the first three
SPECIALS = ("<pad>", "<|im_end|>", "<|im_start|>", "<unk>")
IMAGE = 32  # pixels a side

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# Tied heads: gpt2, qwen2, qwen3, gemma2. Untied: the others.
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "llama": _LLAMA_LIKE | {"num_hidden_layers": 3},
    "qwen2": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "qwen3": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "olmo2": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _LLAMA_LIKE | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": _LLAMA_LIKE | _EXPERTS,
    "gemma2": _LLAMA_LIKE | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "sliding_window": 16},
}

_VIT_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
}
VISION: dict[str, dict[str, Any]] = {
    "vit": _VIT_LIKE | {"intermediate_size": 48},
    "dinov2": _VIT_LIKE | {"mlp_ratio": 2},
    "swin": {
        "image_size": IMAGE,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "basic",
    },
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under `seed` and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def causal_lm(
    arch: str, seed: int = 0, vocab: int = 96, dtype: torch.dtype = torch.float32, **overrides: Any
) -> nn.Module:
    """A tiny causal language model in eval mode; `overrides` go to its config."""
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }
    if arch == "gpt2":
        del settings["max_position_embeddings"]  # an alias of n_positions
    if arch == "phi3":
        settings["original_max_position_embeddings"] = 128
    config = AutoConfig.for_model(arch, **(settings | CAUSAL.get(arch, {}) | overrides))
    return _build(AutoModelForCausalLM, config, seed, dtype)


def image_classifier(
    arch: str, seed: int = 0, classes: int = 4, dtype: torch.dtype = torch.float32, **overrides: Any
) -> nn.Module:
    """A tiny image classifier for 3 x 32 x 32 images, in eval mode; `overrides` go to its config."""
    settings = VISION.get(arch, {}) | {"id2label": {i: f"class{i}" for i in range(classes)}} | overrides
    settings["label2id"] = {label: i for i, label in settings["id2label"].items()}
    return _build(AutoModelForImageClassification, AutoConfig.for_model(arch, **settings), seed, dtype)


def _build(auto: Any, config: PretrainedConfig, seed: int, dtype: torch.dtype) -> nn.Module:
    with seeded(seed):
        model: nn.Module = auto.from_config(config)
        roughen(model)
    return model.to(dtype).eval()


def roughen(model: nn.Module) -> None:
    """Move norm gains, biases and BatchNorm statistics off their trivial starting values, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))


def tokenizer(
    vocab: int = 96, bos: bool = False, eos: bool = False, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """A character-level tokenizer over printable ASCII and newline, with offsets and a ChatML-like template.

    With the smallest vocabulary, 96, the characters ` ~ ^ and backslash are unknown; `merges` adds two-character
    tokens and needs room above 96. `bos` / `eos` add that token when encoding, as some tokenizers do.
    """
    rare = "`~^\\"
    characters = [c for c in "\n" + string.printable[:95] if c not in rare] + list(rare)
    tokens = list(SPECIALS) + characters[: vocab - len(SPECIALS) - len(merges)] + [a + b for a, b in merges]
    if vocab < 96 or len(tokens) - len(merges) < 96:
        raise ValueError(f"vocab must be at least {96 + len(merges)} here")
    core = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), unk_token=SPECIALS[UNK])
    )
    core.decoder = decoders.Fuse()
    if bos or eos:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join([SPECIALS[BOS]] * bos + ["$A"] + [SPECIALS[EOS]] * eos),
            special_tokens=[(SPECIALS[BOS], BOS), (SPECIALS[EOS], EOS)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[PAD],
        eos_token=SPECIALS[EOS],
        bos_token=SPECIALS[BOS],
        unk_token=SPECIALS[UNK],
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast


def save(model: nn.Module, tok: PreTrainedTokenizerFast | None, folder: Path, shards: int = 1) -> Path:
    """Save in Hugging Face format in at least `shards` safetensors files; a classifier gets its image processor."""
    folder = Path(folder)
    if shards == 1:
        model.save_pretrained(folder)
    else:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=max(1, total // shards))
        found = len(list(folder.glob("*.safetensors")))
        if found < shards:
            raise ValueError(f"this model falls into {found} shards, not {shards}: a shard holds whole tensors")
    if tok is not None:
        tok.save_pretrained(folder)
    if getattr(model, "main_input_name", "") == "pixel_values":
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": IMAGE, "width": IMAGE},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


def train(
    model: nn.Module, sequences: Sequence[Sequence[int]], steps: int = 60, lr: float = 5e-3, seed: int = 0
) -> float:
    """Overfit a language model on whole token-id sequences (full batch, AdamW); returns the last mean loss in nats."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*s, *[PAD] * (length - len(s))] for s in sequences])  # [B, T]
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])  # [B, T]
    labels = ids.masked_fill(mask == 0, -100)
    was_training, loss = model.training, torch.tensor(float("nan"))
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    with seeded(seed):
        for _ in range(steps):
            optimiser.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimiser.step()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return float(loss.detach())
