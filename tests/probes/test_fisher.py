"""Importances against slow oracles: torch.func gradients per sample, plain autograd loops, enumeration of all signs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from probes import passes, perexample
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.fisher import importance
from probes.loss import cross_entropy, sample, squared_norm
from probes.modelmap import ModelMap
from probes.perexample import separable
from probes.records import ImageRecord, TokenRecord
from tests.tiny import IMAGE, causal_lm, image_classifier, roughen, seeded

F64 = torch.float64


class Perceptron(nn.Module):
    """Flattened pixels, two linear layers with an in-place activation between them."""

    def __init__(self, width: int = 12, classes: int = 4, hidden: int = 7) -> None:
        super().__init__()
        self.one = nn.Linear(width, hidden)
        self.two = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(self.one(pixels.flatten(1)).relu_())


class Convolutions(nn.Module):
    """Stride, padding, dilation, batch norm, in-place ReLU and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.Conv2d(5, 6, (3, 2), padding=(2, 0), dilation=(2, 1)),
            nn.ReLU(inplace=True),
        )
        self.out = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.body(pixels).mean((2, 3)))


def plain(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with seeded(seed):
        model = kind()
        roughen(model)
    return model.to(F64).eval()


def eager(arch: str, **overrides: int) -> nn.Module:
    """In float64, with the plain attention and expert loops that torch.func and float64 can go through."""
    model = causal_lm(arch, dtype=F64, attn_implementation="eager", **overrides)
    model.config._experts_implementation = "eager"
    return model


def texts(n: int = 5, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(4, 10, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{i}", ids, int(torch.randint(1, 3, (1,), generator=generator)), 1))
    return found


def images(n: int = 6, seed: int = 0, side: int = IMAGE, dtype: torch.dtype = F64) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, side, side, generator=generator, dtype=dtype)
    return [ImageRecord(f"i{i}", pixels[i], i % 4) for i in range(n)]


def logits_of(model: nn.Module, state: dict[str, Tensor], record: TokenRecord | ImageRecord) -> Tensor:
    """[n, V] logits that predict the record's labels, by the model's own forward."""
    if isinstance(record, ImageRecord):
        out = functional_call(model, state, (record.pixels[None],))
        return out if isinstance(out, Tensor) else out.logits
    ids = torch.tensor([record.ids])
    arguments = {"input_ids": ids, "use_cache": False}
    return functional_call(model, state, (), arguments).logits[0, record.n_prompt - 1 : -1]


def labels_of(record: TokenRecord | ImageRecord) -> Tensor:
    return torch.tensor([record.label] if isinstance(record, ImageRecord) else record.completion)


Loss = Callable[[Tensor, Tensor], Tensor]


def per_sample(
    model: nn.Module,
    records: Sequence[TokenRecord | ImageRecord],
    names: Sequence[str],
    loss: Loss = functional.cross_entropy,
) -> list[dict[str, Tensor]]:
    """One torch.func gradient per record."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def value(chosen: dict[str, Tensor], record: TokenRecord | ImageRecord) -> Tensor:
        return loss(logits_of(model, state | buffers | chosen, record), labels_of(record))

    return [grad(value)({name: state[name] for name in names}, record) for record in records]


def mean_square(gradients: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([g[name] for g in gradients]).square().mean(0) for name in gradients[0]}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance * float(tensor.abs().max()))


def editable(model: nn.Module) -> list[str]:
    excluded = ModelMap.of(model).default_exclude()
    return [name for name, _ in model.named_parameters() if name not in excluded]


def routes(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether whole batches are the route for these parameters."""
    return separable(model, None, names) is not None


# ------------------------------------------------------------------------------------------------------- chunked loss


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("chunk", [1, 96 * 3, 1 << 22])
def test_chunked_cross_entropy_equals_the_plain_one(arch: str, chunk: int) -> None:
    model = causal_lm(arch, dtype=F64)
    model_map = ModelMap.of(model)
    head = list(model.get_submodule(model_map.head).parameters())
    with seeded(1):
        hidden = torch.randn(8, 32, dtype=F64, requires_grad=True)
        labels, weights = torch.randint(96, (8,)), torch.randn(8, dtype=F64)
    loss = cross_entropy(model_map, hidden, labels, weights, chunk_elements=chunk)
    found = torch.autograd.grad(2 * loss, [hidden, *head])
    expected_loss = functional.cross_entropy(model_map.logits(hidden), labels, reduction="none") @ weights
    expected = torch.autograd.grad(2 * expected_loss, [hidden, *head])
    assert abs((loss - expected_loss).item()) < 1e-10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_chunked_squared_norm_with_soft_cap() -> None:
    model = causal_lm("gemma2", dtype=F64).requires_grad_(False)
    model_map = ModelMap.of(model)
    hidden = torch.linspace(-1, 1, 5 * 32, dtype=F64).view(5, 32).requires_grad_()
    loss = squared_norm(model_map, hidden, torch.full((5,), 0.2), chunk_elements=200)
    expected = model_map.logits(hidden).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (loss, expected)), rtol=1e-7, atol=1e-12)


def test_chunks_bound_the_logits_alive_and_serve_one_backward() -> None:
    model = causal_lm("llama").requires_grad_(False)
    model_map = ModelMap.of(model)
    rows: list[int] = []
    model.get_submodule(model_map.head).register_forward_hook(lambda _m, _x, y: rows.append(len(y)))
    hidden = torch.randn(50, 32, requires_grad=True)
    loss = cross_entropy(model_map, hidden, torch.zeros(50, dtype=torch.long), torch.ones(50), chunk_elements=96 * 8)
    assert max(rows) == 8
    assert sum(rows) == 50
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second"):
        loss.backward()


def test_sampling_follows_the_distribution_and_skips_impossible_classes() -> None:
    p = torch.tensor([0.0, 0.5, 0.125, 0.0, 0.375, 0.0], dtype=F64)
    uniforms = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    drawn = sample(p.log().expand(1000, 6), uniforms)
    assert torch.equal(drawn.bincount(minlength=6), torch.tensor([0, 500, 125, 0, 375, 0]))
    edges = sample(p.log().expand(2, 6), torch.tensor([0.0, 1 - 2**-53], dtype=F64))
    assert edges.tolist() == [1, 4]


# ------------------------------------------------------------------------------------------------------------ example


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2"])
def test_example_equals_torch_func_on_language_models(arch: str) -> None:
    model, records = eager(arch), texts()
    names = editable(model)
    assert routes(model, names)
    expected = mean_square(per_sample(model, records, names))
    for batch_size in (1, 2, 8):
        found = importance(model, records, batch_size=batch_size, parameters=names)
        close(found.tensors, expected)
    assert (found.n_examples, found.n_batches, found.n_tokens) == (5, 1, sum(r.n_tokens for r in records))


@pytest.mark.parametrize("model", [plain(Perceptron), plain(Convolutions)], ids=["perceptron", "convolutions"])
def test_example_equals_torch_func_on_plain_modules(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    records = images(side=2 if isinstance(model, Perceptron) else 9)
    names = [name for name, p in model.named_parameters() if ".1." not in name]
    expected = mean_square(per_sample(model, records, names))
    for tile in (perexample.TILE_ELEMENTS, 1, 400):  # all at once, one by one, a few
        monkeypatch.setattr(perexample, "TILE_ELEMENTS", tile)
        close(importance(model, records, batch_size=4, parameters=names).tensors, expected)


@pytest.mark.parametrize("arch", ["vit", "swin", "resnet"])
def test_example_equals_torch_func_on_image_classifiers(arch: str) -> None:
    extra = {} if arch == "resnet" else {"attn_implementation": "eager"}
    model, records = image_classifier(arch, dtype=F64, **extra), images(3)
    names = editable(model)
    expected = mean_square(per_sample(model, records, names))
    close(importance(model, records, batch_size=3, parameters=names).tensors, expected)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_parameters_without_a_rule_are_exact_too(arch: str) -> None:
    model, records = eager(arch), texts(3)
    names = [name for name, _ in model.named_parameters()]  # norms, tied embeddings, stacked experts
    assert not routes(model, names)
    expected = mean_square(per_sample(model, records, names))
    close(importance(model, records, batch_size=3).tensors, expected)


def test_a_tied_head_gets_both_gradients() -> None:
    """The same tensor embeds and predicts; the two gradients have to be added before they are squared."""
    model, records = eager("gpt2"), texts(3)
    names = ["transformer.wte.weight", "transformer.h.2.mlp.c_fc.weight"]
    assert not routes(model, names)
    close(
        importance(model, records, batch_size=3, parameters=names).tensors,
        mean_square(per_sample(model, records, names)),
    )


class _Odd(nn.Module):
    """A linear layer used in a way that its hooks cannot explain."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(12, 6)
        self.odd = nn.Linear(6, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels.flatten(1)) * 2
        if self.how == "twice":
            x = self.odd(self.odd(x))
        elif self.how == "behind its back":
            x = functional.linear(x, self.odd.weight, self.odd.bias)
        elif self.how == "transposed":
            x = self.odd(x.view(len(x), 6, 1).permute(2, 0, 1))[0]
        elif self.how == "overwritten":
            y = self.odd(x)
            x.zero_()
            x = y
        return self.out(x)


@pytest.mark.parametrize("how", ["twice", "behind its back", "transposed", "overwritten"])
def test_unusual_uses_of_a_layer_fall_back(how: str) -> None:
    with seeded(2):
        model = _Odd(how).to(F64)
    records = images(side=2)
    if how == "overwritten":  # autograd itself refuses; what matters is that no wrong number comes out
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            importance(model, records, batch_size=3)
        return
    assert routes(model, [name for name, _ in model.named_parameters()])
    expected = mean_square(per_sample(model, records, [name for name, _ in model.named_parameters()]))
    close(importance(model, records, batch_size=3).tensors, expected)


def test_example_does_not_depend_on_order_or_batching_and_adds_up() -> None:
    model, records = causal_lm("llama"), texts(8)
    names = editable(model)
    whole = importance(model, records, batch_size=4, parameters=names).tensors
    close(importance(model, records[::-1], batch_size=3, parameters=names).tensors, whole, 1e-5)
    f, r = (importance(model, part, batch_size=4, parameters=names).tensors for part in (records[:3], records[3:]))
    for name, o in whole.items():
        mixed = 3 / 8 * f[name] + 5 / 8 * r[name]
        torch.testing.assert_close(mixed, o, rtol=1e-4, atol=1e-6 * float(o.max()))
        assert float((f[name] / o)[o > 0].max()) <= 8 / 3 * (1 + 1e-4)


def test_an_expert_without_a_token_has_importance_zero() -> None:
    model = eager("mixtral", num_hidden_layers=1)
    name = next(name for name, p in model.named_parameters() if p.ndim == 3)
    router = model.model.layers[0].mlp.gate
    used: set[int] = set()
    router.register_forward_hook(
        lambda _m, _x, out: used.update(out[-1][0].tolist())
    )  # the last token predicts nothing
    records, model_map = [TokenRecord("a", (5, 6), 1, 1)], ModelMap.of(model)
    used.clear()  # the map runs the model too
    found = importance(model, records, batch_size=1, parameters=[name], model_map=model_map).tensors[name]
    assert 0 < len(used) < 4
    assert [bool(found[expert].any()) for expert in range(4)] == [expert in used for expert in range(4)]


# -------------------------------------------------------------------------------------------- batch, token, label-free


def test_batch_reproduces_the_published_computation_bit_for_bit() -> None:
    """zero_grad, mean cross entropy of the batch, backward, add grad squared, divide by the number of batches."""
    model = image_classifier("resnet")
    records = images(7, dtype=torch.float32)
    batches = [records[0:3], records[3:6], records[6:7]]
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.requires_grad_(True)
    for batch in batches:
        model.zero_grad()
        out = model(torch.stack([r.pixels for r in batch])).logits
        nn.CrossEntropyLoss()(out, torch.tensor([r.label for r in batch])).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.clone().pow(2)
    model.zero_grad()
    found = importance(model, records, estimator="batch", batch_size=3)
    assert found.n_batches == 3
    for name, total in sums.items():
        assert torch.equal(found.tensors[name], total / float(len(batches))), name


def test_batch_reproduces_it_bit_for_bit_on_a_language_model() -> None:
    model, records = causal_lm("llama"), [TokenRecord(f"r{i}", (4 + i, 6, 7, 8 - i, 9), 2, 1) for i in range(4)]
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in (records[:3], records[3:]):
        model.zero_grad()
        ids = torch.tensor([r.ids for r in batch])
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, 1:-1].flatten(0, 1)
        nn.CrossEntropyLoss()(model.lm_head(states), ids[:, 2:].flatten()).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.clone().pow(2)
    found = importance(model, records, estimator="batch", batch_size=3).tensors
    for name, total in sums.items():
        assert torch.equal(found[name], total / 2.0), name


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_batch_of_a_language_model_means_over_its_tokens(arch: str) -> None:
    model, records = eager(arch), texts(5)
    names = [name for name, _ in model.named_parameters()]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in (records[:2], records[2:4], records[4:]):
        tokens = sum(r.n_tokens for r in batch)
        gradients = per_sample(model, batch, names, lambda z, y: functional.cross_entropy(z, y, reduction="sum"))
        for name in names:
            expected[name] += (sum(g[name] for g in gradients) / tokens) ** 2 / 3
    # The models' RMSNorm computes in fp32 whatever their type, so only the LayerNorm of GPT-2 leaves float64 exact.
    found = importance(model, records, estimator="batch", batch_size=2).tensors
    close(found, expected, 1e-9 if arch == "gpt2" else 1e-4)


def test_batch_depends_on_the_order_of_records() -> None:
    """A documented property of the published estimator: class-pure batches and shuffled ones differ."""
    model, records = plain(Perceptron), images(8, side=2)
    by_class = sorted(records, key=lambda r: r.label)
    a, b = (importance(model, rs, estimator="batch", batch_size=2).tensors["one.weight"] for rs in (records, by_class))
    assert float((a / b - 1).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["text", "image"])
def test_signs_make_token_importances_unbiased(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "text":
        model = eager("llama", num_hidden_layers=1)
        records: list = [TokenRecord("a", (5, 6, 7, 8), 1, 1), TokenRecord("b", (9, 10, 11), 1, 1)]
    else:
        model, records = plain(Perceptron), images(4, side=2)
    names, n = editable(model), sum(len(labels_of(r)) for r in records)
    gradients = []
    for record in records:
        for t in range(len(labels_of(record))):
            gradients += per_sample(model, [record], names, lambda z, y, t=t: functional.cross_entropy(z[t], y[t]))
    expected = mean_square(gradients)
    patterns = list(itertools.product((-1.0, 1.0), repeat=n))
    queue = iter(patterns)
    monkeypatch.setattr(passes.Losses, "signs", lambda self, batch, draw: torch.tensor(next(queue), dtype=F64))
    found = importance(model, records, estimator="token", batch_size=4, parameters=names, draws=len(patterns))
    close(found.tensors, expected)
    assert found.n_tokens == n


def test_signs_are_seeded_by_record_and_draw() -> None:
    model, records = causal_lm("llama"), texts(4)

    def run(records: list[TokenRecord], seed: int = 0, draws: int = 1) -> Tensor:
        options = {"estimator": "token", "batch_size": 4, "seed": seed, "draws": draws, "parameters": [name]}
        return importance(model, records, **options).tensors[name]

    name = editable(model)[0]
    signs = passes.losses_of(model, texts(200)).signs(range(200), 0)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(float(signs.float().mean())) < 0.1
    first = run(records)
    torch.testing.assert_close(run(records[::-1]), first, rtol=1e-4, atol=1e-6 * float(first.max()))
    assert not torch.allclose(run(records, seed=1), first, rtol=1e-2)
    assert not torch.allclose(run(records, draws=2), first, rtol=1e-2)


def test_label_free_importance() -> None:
    model, records = eager("gpt2"), texts(4)
    names = editable(model)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in names}
    for batch in (records[:3], records[3:]):
        tokens = sum(r.n_tokens for r in batch)
        gradients = per_sample(model, batch, names, lambda z, y: z.square().sum())
        for name in names:
            expected[name] += (sum(g[name] for g in gradients) / tokens).abs() / 2
    found = importance(model, records, estimator="label_free", batch_size=3, parameters=names)
    close(found.tensors, expected)
    assert found.labels == "none"
    changed = [TokenRecord(r.record_id, (*r.ids[:-1], 4), r.n_prompt, 1) for r in records]
    again = importance(model, changed, estimator="label_free", batch_size=3, parameters=names)
    close(again.tensors, found.tensors)  # the last label conditions nothing, and labels are not read


def test_label_free_importance_of_images() -> None:
    model, records = plain(Perceptron), images(4, side=2)
    names = [name for name, _ in model.named_parameters()]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in (records[:3], records[3:]):
        gradients = per_sample(model, batch, names, lambda z, y: z.square().sum())
        for name in names:
            expected[name] += (sum(g[name] for g in gradients) / len(batch)).abs() / 2
    close(importance(model, records, estimator="label_free", batch_size=3).tensors, expected)


# ----------------------------------------------------------------------------------------------------- sampled labels


def test_sampled_labels_come_from_the_model() -> None:
    """Averaged over many draws, one image's importance tends to the Fisher information sum_y p(y) (d log p(y))^2."""
    model, records = plain(Perceptron), images(1, side=2)
    names = [name for name, _ in model.named_parameters()]
    p = logits_of(model, dict(model.named_parameters()), records[0]).softmax(-1)[0].detach()
    expected = {name: torch.zeros_like(q) for name, q in model.named_parameters()}
    for label in range(4):
        gradient = per_sample(model, [ImageRecord("i", records[0].pixels, label)], names)[0]
        for name in names:
            expected[name] += p[label] * gradient[name] ** 2
    found = importance(model, records, labels="sampled", batch_size=1, draws=4000)
    for name in names:
        torch.testing.assert_close(
            found.tensors[name], expected[name], rtol=0.1, atol=0.05 * float(expected[name].max())
        )


def test_sampled_labels_depend_on_seed_and_record_alone() -> None:
    model, records = causal_lm("llama", dtype=F64), texts(6)
    names = editable(model)

    def run(records: list[TokenRecord], seed: int = 0, batch_size: int = 4) -> dict[str, Tensor]:
        options = {"labels": "sampled", "batch_size": batch_size, "seed": seed, "parameters": names}
        return importance(model, records, **options).tensors

    first = run(records)
    close(run(records[::-1], batch_size=1), first)
    assert not torch.allclose(run(records, seed=1)[names[0]], first[names[0]], rtol=1e-2)
    assert not torch.allclose(importance(model, records, batch_size=4).tensors[names[0]], first[names[0]], rtol=1e-2)


def test_records_that_share_an_identifier_draw_independently() -> None:
    model = causal_lm("llama", dtype=F64)
    one = TokenRecord("same", (5, 6, 7, 8, 9, 10, 11, 12), 1, 1)
    source = passes.losses_of(model, [one, one], sampled=True)
    assert not torch.equal(source.uniforms([0], 0), source.uniforms([1], 0))
    assert not torch.equal(source.uniforms([0], 0), source.uniforms([0], 1))


# ----------------------------------------------------------------------------------------------- leaves nothing behind


@pytest.mark.parametrize("estimator", ["example", "batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(estimator: str, fails: bool) -> None:
    model, records = causal_lm("gpt2", attn_pdrop=0.5), texts(3)
    model.train()
    model.transformer.h[0].eval()
    model.transformer.h[1].requires_grad_(False)
    parameter = model.transformer.h[2].mlp.c_fc.weight
    parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def stop(done: int, total: int) -> None:
        if fails:
            raise InterruptedError

    options = {"estimator": estimator, "batch_size": 2, "parameters": editable(model), "progress": stop}
    if fails:
        with pytest.raises(InterruptedError):
            importance(model, records, **options)
    else:
        importance(model, records, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("estimator", ["example", "batch"])
def test_dropout_is_off(estimator: str) -> None:
    model, records = causal_lm("gpt2", dtype=F64, resid_pdrop=0.5), texts(3)
    options = {"estimator": estimator, "batch_size": 3, "parameters": editable(model)}
    expected = importance(model, records, **options).tensors
    close(importance(model.train(), records, **options).tensors, expected)


def test_one_gradient_alive_at_a_time() -> None:
    model, records = causal_lm("llama"), texts(4)
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    importance(model, records, estimator="batch", batch_size=2)
    assert set(alive) == {1}
    alive.clear()
    importance(model, records, batch_size=2, parameters=editable(model))
    assert set(alive) == {1}  # the head's alone, one per record
    assert len(alive) == len(records)


@pytest.mark.parametrize("estimator", ["example", "batch"])
def test_backward_stops_at_the_lowest_parameter_asked_for(estimator: str) -> None:
    model, records = causal_lm("llama"), texts(3)
    model_map, reached = ModelMap.of(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _m, _x, y: reached.append((y[0] if isinstance(y, tuple) else y).requires_grad)
        )
    name = "model.layers.1.mlp.down_proj.weight"
    importance(model, records, estimator=estimator, batch_size=3, parameters=[name], model_map=model_map)
    assert reached == [False, True, True]


def test_sums_are_kept_in_single_precision_for_a_half_precision_model() -> None:
    model, records = causal_lm("llama", dtype=torch.bfloat16), texts(4)
    name = "model.layers.0.mlp.up_proj.weight"
    exact = importance(model.to(F64), records, batch_size=4, parameters=[name]).tensors[name]
    for batch_size in (1, 4):
        found = importance(model.to(torch.bfloat16), records, batch_size=batch_size, parameters=[name]).tensors[name]
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 0.05


def test_a_parameter_outside_the_loss_has_importance_zero() -> None:
    model = plain(Perceptron)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=F64)))
    for estimator in ("example", "batch"):
        found = importance(model, images(3, side=2), estimator=estimator, batch_size=2, parameters=["unused"])
        assert found.tensors["unused"].tolist() == [0, 0, 0]


def test_progress_counts_records() -> None:
    seen: list[tuple[int, int]] = []
    model = causal_lm("llama")
    importance(model, texts(5), batch_size=2, parameters=editable(model), progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# ------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_end_in_one_line() -> None:
    model, records = causal_lm("llama"), texts(2)
    cases: list[tuple[dict, str]] = [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1, "draws": 2}, "draws: 1"),
        ({"batch_size": 1, "estimator": "label_free", "labels": "sampled"}, "label_free"),
        ({"batch_size": 1, "parameters": ["model.layers.0.mlp.up_prj.weight"]}, r"close names: .*up_proj"),
    ]
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            importance(model, records, **options)
    with pytest.raises(UsageError, match="at least one record"):
        importance(model, [], batch_size=1)
    with pytest.raises(UnsupportedError, match="vocabulary"):
        importance(model, [TokenRecord("a", (5, 500), 1, 1)], batch_size=1)
    with pytest.raises(UnsupportedError, match="below 4 classes"):
        importance(plain(Perceptron), [ImageRecord("a", torch.zeros(3, 2, 2, dtype=F64), 4)], batch_size=1)


def test_running_out_of_memory_says_what_to_do() -> None:
    model = causal_lm("llama")
    model_map = ModelMap.of(model)

    def fail(*_: object) -> None:
        raise MemoryError

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ResourceError, match="lower batch_size"):
        importance(model, texts(2), batch_size=2, model_map=model_map)
