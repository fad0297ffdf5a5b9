"""The model map, proven against the running model: hooks, matrix products and the model's own logits."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from probes.errors import UnsupportedError
from probes.modelmap import ModelMap, Projection
from tests import tiny

# Beyond the catalogue of tests.tiny: logit scaling (two conventions), transposed experts, multi-latent attention,
# learned positions with an offset, an attention-free model.
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MORE = {
    "granite": _SMALL | {"logits_scaling": 4.0},
    "hyperclovax": _SMALL | {"head_dim": 8, "logits_scaling": 0.25},
    "cohere": _SMALL | {"logit_scale": 0.25},
    "gpt_oss": _SMALL | {"intermediate_size": 16, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "layerdrop": 0.0,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
LANGUAGE = [*tiny.CAUSAL, *_MORE]
ALL = [*LANGUAGE, *tiny.VISION, "cifar"]
TIED = {"gpt2", "qwen2", "qwen3", "gemma2", "cohere", "opt", "mamba"}


class _Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class _CifarResNet(nn.Module):
    """A plain module without configuration: a stem, three stages of two blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        widths = (4, 4, 8, 16)
        for s in (1, 2, 3):
            first = _Residual(widths[s - 1], widths[s], 1 if s == 1 else 2)
            setattr(self, f"layer{s}", nn.Sequential(first, _Residual(widths[s], widths[s], 1)))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@cache
def _model(arch: str) -> nn.Module:
    if arch == "cifar":
        with tiny.seeded(0):
            model = _CifarResNet().eval()
            tiny.roughen(model)
        return model
    return tiny.image_classifier(arch) if arch in tiny.VISION else tiny.causal_lm(arch, **_MORE.get(arch, {}))


@cache
def _map(arch: str) -> ModelMap:
    return ModelMap.of(_model(arch))


def _ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(4, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _run(arch: str) -> None:
    model = _model(arch)
    if arch in LANGUAGE:
        model(_ids())
    else:
        model(torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("arch", ALL)
def test_every_weight_is_accounted_for_exactly_once(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    names = [name for name, _ in model.named_parameters()]
    assert list(found.roles) == names
    listed = [p.parameter for p in found.projections()]
    assert len(listed) == len(set(listed))
    head = found.head + ".weight"
    patch = [n for n in found.embeddings if found.roles[n] == "patch"]
    tables = [n for n in found.embeddings if found.roles[n] == "embedding"]
    everything = [*listed, *patch, *tables, *found.position_embeddings]
    everything += [] if head in found.tied else [head]
    assert len(everything) == len(set(everything))
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    left = {n.rpartition(".")[2] for n in matrices - set(everything)}
    # What multiplies no activations: biases of stacked experts, state matrices, attention sinks.
    assert left <= {"gate_up_proj_bias", "down_proj_bias", "A_log"}
    for projection in found.projections():
        shape = model.get_parameter(projection.parameter).shape
        sides = (projection.out_features, projection.in_features)
        if projection.role == "conv":
            assert (shape[0], shape[1:].numel()) == sides
        else:
            matrix = sides if projection.orientation == "out_in" else sides[::-1]
            assert shape == ((projection.experts, *matrix) if projection.experts else matrix)
        assert projection.bias is None or model.get_parameter(projection.bias).shape[-1] == projection.out_features


def _by_hand(projection: Projection, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T or x W, by the orientation the map claims; convolutions unfolded."""
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # [B, in, positions]
        out = weight.flatten(1) @ columns  # [B, out, positions]
        out = out if module.bias is None else out + module.bias[:, None]
        height = (x.shape[2] + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
        return out.unflatten(2, (height, -1))
    out = x @ weight.T if projection.orientation == "out_in" else x @ weight
    bias = getattr(module, "bias", None)
    return out if bias is None else out + bias


@pytest.mark.parametrize("arch", ALL)
def test_orientation_is_what_the_modules_compute(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    # A depthwise 1-D convolution (Mamba) runs outside its module's forward, through a fused function.
    linear = [p for p in found.linear_modules() if not isinstance(model.get_submodule(p.module), nn.Conv1d)]
    hooks = [
        model.get_submodule(p.module).register_forward_hook(lambda _m, x, y, p=p: seen.update({p.module: (x[0], y)}))
        for p in linear
    ]
    _run(arch)
    for hook in hooks:
        hook.remove()
    assert found.head in {p.module for p in linear}
    kinds = (nn.Linear, nn.Conv2d)
    whole = {n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
    assert whole == {p.module for p in linear}
    for p in linear:
        if p.module not in seen and arch == "mamba":
            continue  # dt_proj: the same fused function reads its weight directly
        x, y = seen[p.module]
        expected = _by_hand(p, model.get_submodule(p.module), x, model.get_parameter(p.parameter))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_stacked_experts_and_routers(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    for block in found.blocks:
        by_role = {p.role: p for p in block.feed_forward if p.experts}
        assert set(by_role) == {"gate_up", "down"}
        assert all(p.experts == 4 and not p.hookable for p in by_role.values())
        router = next(p for p in block.feed_forward if p.role == "router" and p.out_features == 4)
        weight = model.get_parameter(router.parameter)
        assert weight.shape == (4, 32)
        assert router.orientation == "out_in"

        def slice_of(role: str, expert: int, by_role: dict[str, Projection] = by_role) -> Tensor:
            """W[e] as [out, in]."""
            w = model.get_parameter(by_role[role].parameter)[expert]
            return w if by_role[role].orientation == "out_in" else w.T

        experts = model.get_submodule(by_role["down"].module)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
        for expert in range(4):
            chosen = torch.full((5, 1), expert)
            with torch.no_grad():
                got = experts(x, chosen, torch.ones(5, 1))
                gate_up = x @ slice_of("gate_up", expert).T
                if arch == "gpt_oss":
                    gate_up = gate_up + experts.gate_up_proj_bias[expert]
                    inner = experts._apply_gate(gate_up)
                    want = inner @ slice_of("down", expert).T + experts.down_proj_bias[expert]
                else:
                    gate, up = gate_up.chunk(2, -1)
                    want = (F.silu(gate) * up) @ slice_of("down", expert).T
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not {p.module for p in found.linear_modules()} & {p.module for p in found.projections() if p.experts}


def test_experts_square_in_shape_follow_the_declared_layout() -> None:
    # gate_up [E, 32, 32] reads and writes 32 either way: the shape says nothing, the module does.
    found = _map("gpt_oss")
    assert {p.orientation for p in found.projections() if p.experts} == {"in_out"}
    model = tiny.causal_lm("mixtral", intermediate_size=16)
    found = ModelMap.of(model)
    assert {p.orientation for p in found.projections() if p.experts} == {"out_in"}
    del model.model.layers[0].mlp.experts.is_transposed
    with pytest.raises(UnsupportedError, match="stacked experts"):
        ModelMap.of(model)


@pytest.mark.parametrize("arch", ALL)
def test_blocks_run_in_the_order_of_the_map(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    ran: list[str] = []
    hooks = [
        model.get_submodule(b.name).register_forward_pre_hook(lambda _m, _x, b=b: ran.append(b.name))
        for b in found.blocks
    ]
    _run(arch)
    for hook in hooks:
        hook.remove()
    assert ran == [b.name for b in found.blocks]
    assert [b.index for b in found.blocks] == list(range(len(ran)))
    expected = {"cifar": 6, "gpt2": 3, "llama": 3, "gpt_neox": 3, "vit": 3, "dinov2": 3, "swin": 3, "resnet": 3}
    assert len(ran) == expected.get(arch, 2)


def test_block_order_is_observed_not_assumed() -> None:
    model = tiny.causal_lm("llama")
    layers = model.model.layers
    order = [2, 0, 1]
    original = nn.ModuleList.__getitem__

    class Shuffled(nn.ModuleList):
        def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
            return [original(self, i) for i in order] if isinstance(index, slice) else original(self, index)

    model.model.layers = Shuffled(layers)
    assert [b.name for b in ModelMap.of(model).blocks] == [f"model.layers.{i}" for i in order]


@pytest.mark.parametrize("arch", LANGUAGE)
@torch.no_grad()
def test_backbone_and_logits_are_the_model(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    ids = _ids()
    hidden = found.backbone()(ids).last_hidden_state
    want = model(ids).logits
    torch.testing.assert_close(found.logits(hidden), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logits(hidden[1, 3:5]), want[1, 3:5], rtol=1e-6, atol=1e-6)
    assert found.logits(hidden[0, 0]).shape == (found.vocab_size,)
    # The final norm is the module whose output the head reads.
    outputs: list[Tensor] = []
    hook = model.get_submodule(found.final_norm).register_forward_hook(lambda _m, _x, y: outputs.append(y))
    head_inputs: list[Tensor] = []
    head = model.get_submodule(found.head).register_forward_pre_hook(lambda _m, x: head_inputs.append(x[0]))
    model(ids)
    hook.remove()
    head.remove()
    assert torch.equal(outputs[0], head_inputs[0])


@pytest.mark.parametrize(
    ("arch", "changed"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
@torch.no_grad()
def test_scaling_and_capping_matter_here(arch: str, changed: dict[str, float | None]) -> None:
    """The equality above would be empty if these settings made no difference to the tiny models."""
    plain = tiny.causal_lm(arch, **(_MORE.get(arch, {}) | changed))
    assert (plain(_ids()).logits - _model(arch)(_ids()).logits).abs().max() > 1e-3


@torch.no_grad()
def test_logits_follow_edits_and_other_instances() -> None:
    model = tiny.causal_lm("gemma2")
    found = ModelMap.of(model)
    other = copy.deepcopy(model)
    other.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(2.0)
    other.get_parameter("model.embed_tokens.weight").mul_(1.5)
    hidden = found.backbone(other)(_ids()).last_hidden_state
    torch.testing.assert_close(found.logits(hidden, other), other(_ids()).logits, rtol=1e-6, atol=1e-6)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(found.logits(hidden), model(_ids()).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    for arch in ("gemma2", "granite", "gpt2", "mamba"):
        model = tiny.causal_lm(arch, dtype=dtype, **_MORE.get(arch, {}))
        found = ModelMap.of(model)
        hidden = found.backbone()(_ids()).last_hidden_state
        assert torch.equal(found.logits(hidden).float(), model(_ids()).logits.float())
        # A measuring engine may hold hidden states in fp32: the head still takes its own type.
        assert torch.equal(found.logits(hidden.float()).float(), model(_ids()).logits.float())


@pytest.mark.parametrize("arch", ALL)
def test_tied_weights(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    assert bool(found.tied) == (arch in TIED)
    for alias, name in found.tied.items():
        assert model.get_parameter(alias) is model.get_parameter(name)
        assert found.role_of(alias) == "embedding"
        assert alias == f"{found.head}.weight"
        assert name in found.embeddings
        assert name in found.default_exclude()
    head = next(p for p in found.linear_modules() if p.role == "head")
    assert head.module == found.head
    assert model.get_parameter(head.parameter) is model.get_submodule(found.head).weight
    assert head.out_features == found.vocab_size


@pytest.mark.parametrize("arch", ALL)
def test_default_exclude(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    excluded = set(found.default_exclude())
    norms = {
        f"{path}.{local}"
        for path, module in model.named_modules()
        if type(module).__name__.endswith(("Norm", "BatchNorm2d"))
        for local, _ in module.named_parameters(recurse=False)
    }
    assert norms == set(found.norms)
    lookups = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    words = ("position", "cls_token", "mask_token", "layer_scale")
    rest = {name for name, _ in model.named_parameters() if any(word in name for word in words)}
    assert excluded == norms | lookups | rest
    assert not excluded & {p.parameter for p in found.projections()}
    if arch in {"vit", "dinov2", "swin"}:
        patch = next(n for n in found.embeddings if found.roles[n] == "patch")
        assert patch.endswith("patch_embeddings.projection.weight")
        assert patch not in excluded
    if arch == "gpt2":
        assert found.position_embeddings == ("transformer.wpe.weight",)
    if arch == "swin":
        assert [n.rpartition(".")[2] for n in found.position_embeddings] == ["relative_position_bias_table"] * 3


@pytest.mark.parametrize("arch", ALL)
def test_block_of(arch: str) -> None:
    model, found = _model(arch), _map(arch)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        inside = [b.index for b in found.blocks if name.startswith(f"{b.name}.")]
        assert found.block_of(name) == (inside[0] if inside else None)
    for block in found.blocks:
        assert {found.block_of(p.parameter) for p in block.attention + block.feed_forward} == {block.index}
    assert {found.block_of(p.parameter) for p in found.outside} <= {None}
    assert found.block_of(f"{found.head}.weight") is None
    assert found.block_of("no.such.parameter") is None
    assert found.role_of("no.such.parameter") is None


def test_block_of_does_not_confuse_block_1_with_block_10() -> None:
    found = ModelMap.of(tiny.causal_lm("gpt2", n_layer=12))
    assert found.block_of("transformer.h.1.mlp.c_fc.weight") == 1
    assert found.block_of("transformer.h.11.mlp.c_fc.weight") == 11


_SEPARATE = (["q", "k", "v", "o"], ["gate", "up", "down"])
_EXPERT = (["q", "k", "v", "o"], ["router", "gate_up", "down"])
_VISION = (["q", "k", "v", "o"], ["up", "down"])


@pytest.mark.parametrize(
    ("arch", "attention", "feed_forward"),
    [
        ("gpt2", ["qkv", "o"], ["up", "down"]),
        ("gpt_neox", ["qkv", "o"], ["up", "down"]),
        ("opt", ["q", "k", "v", "o"], ["up", "down"]),
        ("phi3", ["qkv", "o"], ["gate_up", "down"]),
        *[(arch, *_SEPARATE) for arch in ("llama", "qwen2", "qwen3", "olmo2", "gemma2", "granite", "cohere")],
        *[(arch, *_EXPERT) for arch in ("mixtral", "qwen3_moe", "gpt_oss")],
        ("qwen2_moe", _EXPERT[0], [*_EXPERT[1], "gate", "up", "down", "router"]),
        *[(arch, *_VISION) for arch in ("vit", "dinov2", "swin")],
        ("cifar", [], ["conv", "conv"]),
        ("resnet", [], ["conv", "conv"]),
    ],
)
def test_roles(arch: str, attention: list[str], feed_forward: list[str]) -> None:
    found = _map(arch)
    blocks = [b for b in found.blocks if not any("shortcut" in p.module for p in b.feed_forward)]
    assert len(blocks) >= 2
    for block in blocks:
        assert sorted(p.role for p in block.attention) == sorted(attention)
        assert sorted(p.role for p in block.feed_forward) == sorted(feed_forward)
    width = {"swin": None, "cifar": None, "resnet": None}.get(arch, 32)
    for p in found.projections():
        if width and p.role in {"q", "k", "v", "qkv", "gate", "up", "gate_up", "router"}:
            assert p.in_features == width
        if width and p.role in {"o", "down"}:
            assert p.out_features == width


def test_stages_flatten_and_what_lies_between_them_is_outside() -> None:
    assert [b.name for b in _map("cifar").blocks] == [f"layer{s}.{i}" for s in (1, 2, 3) for i in (0, 1)]
    assert [b.name for b in _map("swin").blocks] == [
        f"swin.encoder.layers.{s}.blocks.{i}" for s, i in ((0, 0), (1, 0), (1, 1))
    ]
    assert [p.role for p in _map("swin").outside] == ["reduction"]
    assert [b.name for b in _map("resnet").blocks] == [
        f"resnet.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (1, 0), (1, 1))
    ]
    assert _map("cifar").head == "linear"
    assert _map("resnet").head == "classifier.1"
    assert [_map(arch).final_norm for arch in ("vit", "dinov2", "swin", "resnet", "cifar")] == [
        "vit.layernorm",
        "dinov2.layernorm",
        "swin.layernorm",
        None,
        None,
    ]


def test_plain_modules_without_repeated_blocks() -> None:
    lenet = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 8), nn.ReLU(), nn.Linear(8, 4))
    found = ModelMap.of(lenet)
    assert [b.name for b in found.blocks] == ["0", "3"]
    assert [p.role for p in found.projections()] == ["conv", "linear"]
    assert (found.head, found.vocab_size, found.task) == ("5", 4, "image_classification")
    with pytest.raises(UnsupportedError, match="linear output layer"):
        ModelMap.of(nn.Sequential(nn.Flatten(), nn.ReLU()))
    with pytest.raises(UnsupportedError, match="layers before"):
        ModelMap.of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_a_container_of_stages_in_one_sequential() -> None:
    def stage() -> nn.Sequential:
        return nn.Sequential(_Residual(4, 4, 1), _Residual(4, 4, 1))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), stage(), stage(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    found = ModelMap.of(model)
    assert [b.name for b in found.blocks] == ["1.0", "1.1", "2.0", "2.1"]
    assert found.role_of("0.weight") == "patch"


def test_stem_and_classifier_in_the_same_container_are_no_blocks() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), _Residual(4, 4, 1), _Residual(4, 4, 1), nn.AdaptiveAvgPool2d(1), classifier
    )
    found = ModelMap.of(model)
    assert [b.name for b in found.blocks] == ["1", "2"]
    assert found.head == "4.3"
    assert found.role_of("0.weight") == "patch"
    assert [p.module for p in found.outside] == ["4.1"]


@pytest.mark.parametrize("arch", ["llama", "swin"])
def test_the_configured_depth_decides_between_a_chain_and_a_larger_one_inside(arch: str) -> None:
    model = tiny.causal_lm("llama") if arch == "llama" else tiny.image_classifier("swin")
    for block in _map(arch).blocks:
        parent = model.get_submodule(block.name)
        parent.mlp = nn.Sequential(parent.mlp, copy.deepcopy(parent.mlp))  # most of the block, and compound
    assert [b.name for b in ModelMap.of(model).blocks] == [b.name for b in _map(arch).blocks]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.causal_lm("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.register_forward_hook(lambda *_: torch.rand(3).sum() > 9 or None)  # draws, changes nothing
    modes = {name: m.training for name, m in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ModelMap.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


def test_modes_are_restored_when_the_run_fails() -> None:
    model = tiny.causal_lm("llama").train()
    model.model.layers[1].mlp.forward = lambda x: x.no_such_method()
    with pytest.raises(UnsupportedError, match="to run on four tokens, found AttributeError"):
        ModelMap.of(model)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_that_cannot_be_reproduced_are_refused() -> None:
    model = tiny.causal_lm("llama")
    forward = model.forward

    def shifted(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 0.1, 96)
        return out

    model.forward = shifted
    with pytest.raises(UnsupportedError, match="head of the last hidden state"):
        ModelMap.of(model)


def test_unsupported_models_get_one_clear_line() -> None:
    bert = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    encoder = AutoConfig.for_model("bert-generation", vocab_size=96, **_SMALL)
    cases = {
        "encoder-only": BertForMaskedLM(bert),
        "sequence-to-sequence": T5ForConditionalGeneration(t5),
        "depend on later tokens": AutoModelForCausalLM.from_config(encoder),
        "without output head": tiny.causal_lm("llama").model,
        "AutoModelForImageClassification": tiny.image_classifier("vit").vit,
        "pass the model inside": nn.Sequential(tiny.causal_lm("llama")),
        "meta device": tiny.causal_lm("gpt2").to("meta"),
    }
    for words, model in cases.items():
        with pytest.raises(UnsupportedError, match=words) as caught:
            ModelMap.of(model)
        assert "expected" in str(caught.value)
        assert "\n" not in str(caught.value)
    quantised = tiny.causal_lm("llama")
    q_proj = quantised.model.layers[0].self_attn.q_proj
    q_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantised"):
        ModelMap.of(quantised)


def test_a_decoder_made_of_an_encoder_is_causal() -> None:
    model = tiny.causal_lm("bert", is_decoder=True, **{**_SMALL, "num_key_value_heads": None})
    with pytest.raises(UnsupportedError, match="head of the last hidden state"):
        ModelMap.of(model)  # causal, but a transform sits between the backbone and the head


def test_adapters_are_refused_until_merged() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny.causal_lm("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        ModelMap.of(adapted)
    assert ModelMap.of(adapted.merge_and_unload()).task == "causal_lm"


def test_classifiers_have_no_logits_from_hidden_states() -> None:
    for call in (lambda: _map("vit").backbone(), lambda: _map("cifar").logits(torch.zeros(1, 16))):
        with pytest.raises(UnsupportedError, match="image classifier"):
            call()


@pytest.mark.parametrize("arch", tiny.VISION)
def test_image_classifiers(arch: str) -> None:
    found = _map(arch)
    assert found.task == "image_classification"
    assert found.vocab_size == 4
    assert not found.tied


# ------------------------------------------------------------------------------------------------------ composites


class _Halves(nn.Module):
    """The mean of the logits of a model and of a second one of another width."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.other = tiny.causal_lm("llama", seed=4, hidden_size=16, head_dim=4)

    def states_model(self) -> nn.Module:
        class States(nn.Module):
            def __init__(self, owner: _Halves) -> None:
                super().__init__()
                self.owner = owner

            def forward(self, input_ids: Tensor, **_: object) -> BaseModelOutputWithPast:
                states = [m.base_model(input_ids).last_hidden_state for m in (self.owner.target, self.owner.other)]
                return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, dim=-1))

        return States(self)

    def states_logits(self, states: Tensor) -> Tensor:
        ours, theirs = self.target.get_output_embeddings(), self.other.get_output_embeddings()
        return 0.5 * (ours(states[..., :-16]) + theirs(states[..., -16:]))

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.states_logits(self.states_model()(input_ids).last_hidden_state))


@pytest.mark.parametrize("arch", ["gpt2", "qwen2", "mixtral"])
@torch.no_grad()
def test_a_composite_is_run_as_a_whole_and_has_the_parts_of_the_model_inside(arch: str) -> None:
    inside = tiny.causal_lm(arch)
    model = _Halves(inside).train()
    found, plain = ModelMap.of(model), ModelMap.of(inside)
    assert found.composite
    assert not plain.composite
    assert found.model is model
    assert all(m.training for m in model.modules())
    model.eval()
    want = model(_ids()).logits
    hidden = found.backbone()(input_ids=_ids()).last_hidden_state
    assert hidden.shape[-1] == 32 + 16
    torch.testing.assert_close(found.logits(hidden), want)
    torch.testing.assert_close(found.logits(hidden[1, 2:4]), want[1, 2:4])
    other = copy.deepcopy(model)
    other.other.lm_head.weight.mul_(2.0)
    changed = found.logits(found.backbone(other)(input_ids=_ids()).last_hidden_state, other)
    torch.testing.assert_close(changed, other(_ids()).logits)
    assert not torch.allclose(changed, want)

    def inner(projections: tuple[Projection, ...]) -> list[tuple[str, str, str | None, str]]:
        return [(p.module, p.parameter, p.bias, p.role) for p in projections]

    def outer(projections: tuple[Projection, ...]) -> list[tuple[str, str, str | None, str]]:
        paths = [(p.module, p.parameter, p.bias, p.role) for p in projections]
        return [(f"target.{m}", f"target.{w}", None if b is None else f"target.{b}", role) for m, w, b, role in paths]

    assert inner(tuple(found.projections())) == outer(tuple(plain.projections()))
    assert inner(found.linear_modules()) == outer(plain.linear_modules())
    assert [b.name for b in found.blocks] == [f"target.{b.name}" for b in plain.blocks]
    for name in ("embeddings", "position_embeddings", "norms"):
        assert getattr(found, name) == tuple(f"target.{n}" for n in getattr(plain, name))
    assert (found.head, found.final_norm) == (f"target.{plain.head}", f"target.{plain.final_norm}")
    assert found.vocab_size == plain.vocab_size
    assert found.logit_rule == plain.logit_rule
    assert found.tied == {f"target.{a}": f"target.{b}" for a, b in plain.tied.items()}
    assert list(found.roles) == [name for name, _ in model.named_parameters()]
    for name, role in found.roles.items():
        assert role == ("other" if name.startswith("other.") else plain.roles[name.removeprefix("target.")])
    for p in found.linear_modules():
        assert model.get_submodule(p.module).weight is model.get_parameter(p.parameter)
        assert found.block_of(p.parameter) == plain.block_of(p.parameter.removeprefix("target."))


def test_a_composite_whose_logits_are_others_is_refused() -> None:
    model = _Halves(tiny.causal_lm("gpt2"))
    states_logits = model.states_logits
    model.states_logits = lambda states: states_logits(states) + torch.linspace(0, 0.1, 96)  # also in its forward
    assert ModelMap.of(model).composite
    model.forward = lambda input_ids, **_: CausalLMOutputWithPast(logits=model.target(input_ids).logits)
    with pytest.raises(UnsupportedError, match="expected logits that are those of the final states"):
        ModelMap.of(model)


@pytest.mark.parametrize(
    ("arch", "rule"),
    [
        ("llama", {"scale": 1.0, "divide": False, "cap": None}),
        ("gemma2", {"scale": 1.0, "divide": False, "cap": 2.0}),
        ("granite", {"scale": 4.0, "divide": True, "cap": None}),
        ("cohere", {"scale": 0.25, "divide": False, "cap": None}),
    ],
)
def test_what_a_model_does_to_its_heads_output(arch: str, rule: dict[str, object]) -> None:
    assert _map(arch).logit_rule == rule
