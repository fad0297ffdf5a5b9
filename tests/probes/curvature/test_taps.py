"""What a listener hears, against hooks and gradients written out plainly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.passes import losses_of
from probes.records import ImageRecord, TokenRecord
from probes.taps import Listener, Site, is_linear_map, listen, patches, sites
from tests.probes.test_fisher import Convolutions, Perceptron, images, plain, texts
from tests.tiny import causal_lm, image_classifier, roughen, seeded

F64 = torch.float64
GPT_OSS: dict[str, object] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


OTHERS = {  # a `Linear` with a forward of its own, and projections that see [B, 1, T, width]
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "deepseek_v2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": GPT_OSS,
}
LANGUAGE = ("gpt2", "llama", "gpt_neox", "phi3", "mixtral", "qwen2_moe", *OTHERS)


def exact(arch: str) -> nn.Module:
    """A tiny model in float64, whose experts run one by one (the grouped kernels have no float64)."""
    model = causal_lm(arch, dtype=F64, attn_implementation="eager", **OTHERS.get(arch, {}))
    model.config._experts_implementation = "eager"
    return model


def classifier(arch: str) -> nn.Module:
    return image_classifier(arch, dtype=F64, **({} if arch == "resnet" else {"attn_implementation": "eager"}))


def heard(
    model: nn.Module,
    records: list[TokenRecord] | list[ImageRecord],
    modules: list[str] | None = None,
    batches: list[list[int]] | None = None,
    **options: object,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(x, g, record of each row) of every map, over all batches."""
    model_map = ModelMap.of(model)
    chosen = sites(model_map, modules)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    batches = [list(range(len(records)))] if batches is None else batches
    current: list[int] = []

    def backward(site: Site, x: Tensor | None, g: Tensor, rows: Tensor) -> None:
        assert x is not None
        parts.setdefault(site.key, []).append((x, g, torch.tensor(current)[rows]))

    listener = Listener(model, chosen, backward=backward, keep=True)
    source = losses_of(model, records, model_map=model_map)
    listen(model, source, listener, batches, begin=lambda batch: current.__setitem__(slice(None), batch), **options)
    return {key: tuple(map(torch.cat, zip(*found, strict=True))) for key, found in parts.items()}


def summed_loss(model: nn.Module, record: TokenRecord | ImageRecord) -> Tensor:
    if isinstance(record, ImageRecord):
        out = model(record.pixels[None])
        logits = out if isinstance(out, Tensor) else out.logits
        return functional.cross_entropy(logits, torch.tensor([record.label]), reduction="sum")
    logits = model(torch.tensor([record.ids]), use_cache=False).logits[0, record.n_prompt - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(record.completion), reduction="sum")


def weight_gradients(model: nn.Module, records: list) -> dict[str, Tensor]:
    model.zero_grad()
    model.requires_grad_(True)
    for record in records:
        summed_loss(model, record).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# ------------------------------------------------------------------------------------------- x and g make the gradient


@pytest.mark.parametrize(
    ("make", "arch"),
    [
        *((exact, arch) for arch in LANGUAGE),
        *((classifier, arch) for arch in ("vit", "swin", "resnet")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outer_products_add_up_to_the_weight_gradient(make: Callable[[str], nn.Module], arch: str) -> None:
    """Orientation, unfolding, routing and masks in one identity: sum_t g_t x_t^T = dL / dW."""
    model = make(arch)
    records: list = texts(5) if make is exact else images(4)
    model_map = ModelMap.of(model)
    found = heard(model, records, ["*"], [[3, 0], [2, 1]] if make is classifier else [[4, 0, 3], [2, 1]])
    expected = weight_gradients(model, records)
    everything = sites(model_map, ["*"])
    assert found.keys() <= {site.key for site in everything}
    assert {p.parameter for p in model_map.projections()} <= {site.projection.parameter for site in everything}
    for site in everything:
        want = expected[site.projection.parameter]
        if site.expert is not None:
            want = want[site.expert]
        want = want.flatten(1) if site.projection.orientation == "out_in" else want.T
        x, g, _ = found.get(site.key, (torch.zeros(0, want.shape[1], dtype=F64), torch.zeros(0, len(want)), None))
        # RMSNorm and softmax of the routers compute in fp32 whatever the model's type
        torch.testing.assert_close(
            g.T.to(F64) @ x.to(F64), want, rtol=1e-5, atol=1e-7 * float(want.abs().max() + 1e-12)
        )


def test_experts_that_run_in_another_order() -> None:
    """All first products, then all second ones: the rows of an expert are remembered, not guessed."""
    model, records = exact("mixtral"), texts(4)
    path = "model.layers.1.mlp.experts"
    experts = model.get_submodule(path)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        inner, out = {}, torch.zeros_like(hidden)
        for e in range(4):
            token, choice = torch.where(chosen == e)
            inner[e] = functional.linear(hidden[token], experts.gate_up_proj[e])
        for e in (2, 0, 3, 1):
            token, choice = torch.where(chosen == e)
            y = functional.linear(experts._apply_gate(inner[e]), experts.down_proj[e])
            out.index_add_(0, token, y * weights[token, choice, None])
        return out

    plainly = heard(model, records, [f"{path}.*"])
    experts.forward = forward
    for key, parts in heard(model, records, [f"{path}.*"]).items():
        for mine, theirs in zip(parts, plainly[key], strict=True):
            # the library's loop orders an expert's tokens by the router's choice, this one by position
            order, other = (torch.argsort(t[0][:, 0]) for t in (parts, plainly[key]))
            torch.testing.assert_close(mine[order], theirs[other], rtol=1e-5, atol=1e-7)


def test_rows_are_those_of_the_positions_that_count() -> None:
    model, records = exact("gpt2"), texts(5)
    batches = [[4, 0, 3], [2, 1]]
    for positions in ("all", "predicting"):
        key = "transformer.h.1.mlp.c_fc"
        x, g, owner = heard(model, records, [key], batches, positions=positions)[key]
        rows, order = [], [i for batch in batches for i in batch]
        for i in order:
            record, seen = records[i], []
            module = model.get_submodule(key)
            hook = module.register_forward_hook(lambda _m, a, y, seen=seen: seen.append((a[0], y)))
            loss = summed_loss(model, record)
            hook.remove()
            (gradient,) = torch.autograd.grad(loss, seen[0][1])
            kept = slice(0 if positions == "all" else record.n_prompt - 1, len(record.ids) - 1)
            rows.append((seen[0][0][0, kept], gradient[0, kept], torch.full((kept.stop - kept.start,), i)))
        for a, b in zip((x, g, owner), map(torch.cat, zip(*rows, strict=True)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_class_token_alone() -> None:
    model, records = classifier("vit"), images(3)
    keys = ["vit.layers.0.mlp.fc1", "classifier"]
    first, every = heard(model, records, keys, positions="first"), heard(model, records, keys)
    assert [len(first[key][0]) for key in keys] == [3, 3]
    assert len(every[keys[0]][0]) == 3 * 17
    for a, b in zip(first[keys[0]], every[keys[0]], strict=True):
        assert torch.equal(a, b[::17])


class Odd(nn.Module):
    """In-place activations right after the lowest map, a module that runs twice, and padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular", bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (2, 3), padding=(1, 2), dilation=(2, 1), stride=(1, 2), padding_mode="reflect"),
            nn.ReLU(inplace=True),
        )
        self.twice = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.twice(self.body(pixels).mean((2, 3))).relu_()
        return self.out(self.twice(x).relu_())


def test_inplace_activations_repeated_modules_and_padding_modes() -> None:
    model, records = plain(Odd), images(4, side=6)
    expected = weight_gradients(model, records)
    for keys in (["*"], ["twice", "out"], ["body.2"], ["out"]):
        found = heard(model, records, keys, [[0, 1, 2], [3]])
        assert found
        for key, (x, g, owner) in found.items():
            want = expected[f"{key}.weight"].flatten(1)
            torch.testing.assert_close(g.T @ x, want, rtol=1e-9, atol=1e-12)
            assert sorted(owner.unique().tolist()) == [0, 1, 2, 3]
    assert len(heard(model, records, ["twice"])["twice"][0]) == 8


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding=(1, 0)), (2, 3, 6, 7)),
        pytest.param(
            nn.Conv2d(3, 4, 4, padding="same"),
            (2, 3, 6, 5),
            marks=pytest.mark.filterwarnings("ignore:Using padding='same'"),  # one more column right than left
        ),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
    ],
)
def test_patches_turn_a_convolution_into_a_matrix_product(module: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).sin()
    found = patches(module, x) @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(found, module(x).flatten(2).transpose(1, 2))


def test_many_patches_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = plain(Convolutions), images(5, side=9)
    whole = heard(model, records, ["body.0", "body.3"])
    calls: list[int] = []
    monkeypatch.setattr("probes.taps.PATCH_ELEMENTS", 1500)
    monkeypatch.setattr("probes.taps.patches", lambda m, x: calls.append(len(x)) or patches(m, x))
    for key, parts in heard(model, records, ["body.0", "body.3"]).items():
        for a, b in zip(parts, whole[key], strict=True):
            assert torch.equal(a, b)
    assert len(calls) > 2
    assert sum(calls) == 2 * 5


# ---------------------------------------------------------------------------------------------------- sharing, silence


def test_maps_that_read_the_same_tensor_are_recognised() -> None:
    model, records = causal_lm("llama"), texts(3)
    sources: dict[str, str] = {}
    same: dict[str, Tensor] = {}

    def forward(site: Site, x: Tensor, rows: Tensor, source: str) -> None:
        sources[site.key] = source
        assert same.setdefault(source, x) is x  # selected once

    model_map = ModelMap.of(model)
    listener = Listener(model, sites(model_map, ["*.layers.1.*"]), forward=forward)
    listen(model, losses_of(model, records, model_map=model_map), listener, [[0, 1, 2]])
    path = "model.layers.1."
    assert {key.removeprefix(path): source.removeprefix(path) for key, source in sources.items()} == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }


def test_a_tensor_overwritten_between_two_maps_is_another_input() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(12, 3), nn.Linear(12, 3), nn.Linear(3, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.flatten(1).clone()
            first = self.a(x)
            return self.out(first + self.b(x.mul_(2)))

    model = plain(Doubling)
    found: dict[str, tuple[str, Tensor]] = {}
    listener = Listener(
        model,
        sites(ModelMap.of(model), ["a", "b"]),
        forward=lambda site, x, rows, source: found.__setitem__(site.key, (source, x.clone())),
    )
    listen(model, losses_of(model, images(2, side=2)), listener, [[0, 1]])
    assert {key: source for key, (source, _) in found.items()} == {"a": "a", "b": "b"}
    assert torch.equal(2 * found["a"][1], found["b"][1])


def test_callbacks_run_outside_autocast_and_autograd() -> None:
    model, records = causal_lm("llama"), texts(2)
    states: set[tuple[str, bool, bool]] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: states.add((name, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    model_map = ModelMap.of(model)
    listener = Listener(model, sites(model_map), forward=note("forward"), backward=note("backward"))
    source = losses_of(model, records, model_map=model_map)
    listen(model, source, listener, [[0, 1]], compute_dtype=torch.bfloat16)
    assert states == {("forward", False, False), ("backward", False, False)}


def test_convolutions_share_only_with_the_same_geometry() -> None:
    """A residual block's first convolution and its shortcut read one tensor, but not the same patches."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)
            self.out = nn.Linear(4, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.out(sum(m(pixels).mean((2, 3)) for m in (self.a, self.b, self.c)))

    model = plain(Two)
    sources: dict[str, str] = {}
    model_map = ModelMap.of(model)
    listener = Listener(
        model, sites(model_map, ["?"]), forward=lambda site, x, rows, source: sources.__setitem__(site.key, source)
    )
    listen(model, losses_of(model, images(2, side=5)), listener, [[0, 1]])
    assert sources == {"a": "a", "b": "a", "c": "c"}


def test_nothing_below_the_lowest_map_is_differentiated() -> None:
    """A published collector asks for gradients of the input, so that every block runs backward for the sake of one."""
    model, records = causal_lm("llama"), texts(3)
    model_map = ModelMap.of(model)
    needs: dict[str, bool] = {}
    back: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            out = output[0] if isinstance(output, tuple) else output
            needs[name] = args[0].requires_grad
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda g: back.add(name))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(note(name))
    chosen = sites(model_map, ["*.layers.1.mlp.*"])
    heard_g: list[str] = []
    listener = Listener(model, chosen, backward=lambda site, x, g, rows: heard_g.append(site.key))
    listen(model, losses_of(model, records, model_map=model_map), listener, [[0, 1, 2]])
    assert sorted(heard_g) == sorted(site.key for site in chosen)
    below = [name for name in needs if "embed" in name or ".layers.0." in name or ".layers.1.self_attn" in name]
    assert len(below) == 12
    assert not any(needs[name] for name in below)
    assert not back & set(below)
    own = [site.key for site in chosen if "down" not in site.key]
    assert not any(needs[name] for name in own)  # not even the gradient of the lowest maps' own input
    assert all(needs[name] for name in needs if ".layers.2." in name)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_no_weight_gradient_is_formed_and_the_model_is_left_as_found(arch: str) -> None:
    model, records = causal_lm(arch), texts(3)
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    given = torch.ones_like(first)
    first.grad = given
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state, how = torch.get_rng_state(), model.config._experts_implementation
    grads: list[bool] = []
    model_map = ModelMap.of(model)

    def backward(site: Site, x: Tensor | None, g: Tensor, rows: Tensor) -> None:
        grads.append(any(p.grad is not None or p.requires_grad for p in model.parameters()))

    listen(
        model,
        losses_of(model, records, sampled=True, model_map=model_map),
        Listener(model, sites(model_map), backward=backward),
        [[0, 1], [2]],
    )
    assert grads
    assert not any(grads)
    assert first.grad is given
    assert all(p.grad is None for name, p in model.named_parameters() if p is not first)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._experts_implementation == how
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failure_inside_leaves_the_model_as_found() -> None:
    model, records = causal_lm("mixtral"), texts(3)
    model_map, how = ModelMap.of(model), model.config._experts_implementation

    def backward(*_: object) -> None:
        raise MemoryError

    def forward(*_: object) -> None:
        raise MemoryError

    source = losses_of(model, records, model_map=model_map)
    for options in ({"backward": backward}, {"forward": forward}):
        with pytest.raises(ResourceError, match="lower batch_tokens"):
            listen(model, source, Listener(model, sites(model_map), **options), [[0, 1, 2]])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.config._experts_implementation == how
        assert torch.overrides._get_current_function_mode() is None


# ------------------------------------------------------------------------------------------------------------ choosing


def test_default_sites_are_the_projections_of_the_blocks_in_depth_order() -> None:
    model_map = ModelMap.of(causal_lm("qwen2_moe"))
    found = sites(model_map)
    names = [p.parameter for block in model_map.blocks for p in (*block.attention, *block.feed_forward)]
    assert list(dict.fromkeys(site.projection.parameter for site in found)) == names
    assert "model.layers.0.mlp.experts.down_proj.3" in {site.key for site in found}
    assert "model.layers.1.mlp.gate" in {site.key for site in found}
    assert [site.block for site in found] == sorted(site.block for site in found)
    some = sites(model_map, ["*.experts.*"], blocks=[1], roles=["down"])
    assert [site.key for site in some] == [f"model.layers.1.mlp.experts.down_proj.{e}" for e in range(4)]
    assert sites(ModelMap.of(classifier("vit")), ["*"])[0].projection.role == "patch"


def test_wrong_choices_end_in_one_line() -> None:
    model_map = ModelMap.of(causal_lm("llama"))
    with pytest.raises(UsageError, match=r"none named model.layers.0.mlp.up_prj; close names: model.layers.0.mlp.up"):
        sites(model_map, ["model.layers.0.mlp.up_prj"])
    with pytest.raises(UsageError, match="module paths"):
        sites(model_map, ["*.§§§"])
    with pytest.raises(UnsupportedError, match="lm_head: the output head"):
        sites(model_map, ["lm_head"])
    assert "lm_head" not in {site.key for site in sites(model_map, ["*"])}
    with pytest.raises(UsageError, match="blocks from 0 to 2, found 3"):
        sites(model_map, blocks=[3])
    with pytest.raises(UsageError, match=r"roles among .*gate.*, found gat$"):
        sites(model_map, roles=["gat"])
    with pytest.raises(UsageError, match="together"):
        sites(model_map, ["*.layers.0.*"], blocks=[1])


def test_maps_without_a_rule_are_refused_by_name_and_left_out_of_patterns() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.odd, self.out = nn.Conv2d(4, 4, 2, groups=2), Doubled(4, 4), nn.Linear(4, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.out(self.odd(self.grouped(pixels).mean((2, 3))))

    model_map = ModelMap.of(Mixed())
    assert [site.key for site in sites(model_map, ["*"])] == ["out"]
    for key in ("grouped", "odd"):
        with pytest.raises(UnsupportedError, match=f"{key}: a .* not one plain linear map"):
            sites(model_map, [key])
    assert not is_linear_map(nn.Bilinear(2, 2, 2))

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    class Pair(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    assert [is_linear_map(kind(300, 40).to(dtype)) for dtype in (torch.bfloat16, F64) for kind in (Own, Pair)] == [
        *(True, False),
        *(True, False),
    ]
    with pytest.raises(UnsupportedError, match="two places"):
        sites(ModelMap.of(image_tied()), ["a"])


def image_tied() -> nn.Module:
    class Tied(Perceptron):
        def __init__(self) -> None:
            super().__init__(width=4, hidden=4)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    return Tied()


def test_what_cannot_be_heard_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how, self.odd, self.out = how, nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.flatten(1)
            if self.how == "behind its back":
                return self.out(functional.linear(x, self.odd.weight, self.odd.bias))
            if self.how == "overwritten":
                y = self.odd(x := x.clone())
                x.zero_()
                return self.out(y)
            return self.out(self.odd(x.flatten().view(-1, 12)[:2]).repeat(2, 1)[: len(x)])

    records = images(3, side=2)
    for how, words in (
        ("behind its back", "odd.weight not used that way"),
        ("fewer rows", r"activations \[3, ...\] in odd, found \[2, 12\]"),
        ("overwritten", "odd overwritten"),
    ):
        with seeded(0):
            model = Hidden(how)
            roughen(model)
        with pytest.raises(UnsupportedError, match=words):
            heard(model.to(F64), records, ["odd"])
    with pytest.raises(UnsupportedError, match="class token, found the convolution"):
        heard(classifier("vit"), images(2), ["*patch*"], positions="first")
