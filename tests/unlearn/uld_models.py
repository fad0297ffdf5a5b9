"""Differences of tiny random models, for the tests of `unlearn.checkpoints.modeling_uld`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probes.modelmap import ModelMap
from tests import tiny
from unlearn.checkpoints.modeling_uld import Rule, ULDConfig, ULDForCausalLM, ULDForImageClassification

MILD = Rule(0.75, 0.05, 0.5, "original")  # tiny models are nearly uniform
# Grouped products of experts have no float64 on a CPU; eager attention masks with its minimum, -inf in its softmax.
SINGLE = ("mixtral", "qwen2_moe", "qwen3_moe", "gemma2")
ALL = Rule(0.75, 0.0, 0.0, "original")  # every token is kept


def model_of(arch: str, **overrides: Any) -> Any:
    """A tiny model of three blocks, in float64 where the architecture computes in it."""
    dtype = torch.float32 if arch in SINGLE else torch.float64
    if arch in tiny.VISION:
        return tiny.image_classifier(arch, dtype=dtype, **overrides)
    depth = {"n_layer": 3} if arch == "gpt2" else {"num_hidden_layers": 3}
    return tiny.causal_lm(arch, dtype=dtype, **(depth | overrides))


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal up to the rounding of their type."""
    tolerance = 1e-9 if want.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def path_of(model: nn.Module) -> str:
    """Path of the list of blocks."""
    return ModelMap.of(model).blocks[0].name.rpartition(".")[0]


def matrices(model: nn.Module, first: int, last: int, size: float = 0.3, rank: int = 2) -> dict[str, Tensor]:
    """Random low-rank matrices for every linear map of blocks first..last-1, routers aside; B is 0 for a size of 0."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for block in ModelMap.of(model).blocks[first:last]:
        for p in (*block.attention, *block.feed_forward):
            if p.hookable and p.role != "router":
                found[f"assistant.{p.module}.lora_A"] = torch.randn(rank, p.in_features, generator=generator)
                found[f"assistant.{p.module}.lora_B"] = size * torch.randn(p.out_features, rank, generator=generator)
    assert found
    return found


def config_of(model: nn.Module, rule: Rule = MILD, first: int = 1, last: int = 2, scale: float = 0.5) -> ULDConfig:
    """The configuration with the target's blocks first..last-1 for an assistant."""
    found = ModelMap.of(model)
    part = {"kind": "blocks", "path": path_of(model), "first": first, "last": last, "scale": scale}
    return ULDConfig.beside(model, rule, assistant=part, head=found.head, logit_rule=found.logit_rule)


def difference(
    model: nn.Module, rule: Rule = MILD, first: int = 1, last: int = 2, scale: float = 0.5, size: float = 0.3
) -> Any:
    """The difference over a live model, with random low-rank matrices."""
    kind = ULDForImageClassification if model.main_input_name == "pixel_values" else ULDForCausalLM
    return kind.over(model, config_of(model, rule, first, last, scale), matrices(model, first, last, size))


def external(target: nn.Module, assistant: nn.Module, rule: Rule = MILD) -> Any:
    """The difference with another model for an assistant."""
    ours, theirs = ModelMap.of(target), ModelMap.of(assistant)
    config = assistant.config.to_dict()  # type: ignore[operator, union-attr]
    part = {"kind": "external", "config": config, "head": theirs.head, "logit_rule": theirs.logit_rule}
    whole = ULDConfig.beside(target, rule, assistant=part, head=ours.head, logit_rule=ours.logit_rule)
    tensors = {f"assistant.{name}": tensor for name, tensor in assistant.state_dict().items()}
    kind = ULDForImageClassification if target.main_input_name == "pixel_values" else ULDForCausalLM
    return kind.over(target, whole, tensors)


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """[rows, length] token ids, none of them special."""
    return torch.randint(4, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(rows: int = 2, seed: int = 1) -> Tensor:
    """[rows, 3, 32, 32] pixels, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, tiny.IMAGE, tiny.IMAGE, generator=generator, dtype=torch.float64)
