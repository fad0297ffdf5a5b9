"""Curvature products against dense second derivatives by torch.autograd.functional, in float64 on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from probes.curvature import operators
from probes.curvature.operators import (
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    block_parameters,
)
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.tiny import causal_lm, image_classifier, roughen, seeded

F64 = torch.float64
Record = TokenRecord | ImageRecord

KINDS: list[type[CurvatureOperator]] = [HessianOperator, GaussNewtonOperator]
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 9, "n_inner": 6},
    "llama": SMALL | {"num_hidden_layers": 1},
    "qwen2": SMALL | {"num_hidden_layers": 1},  # tied head
    "gemma2": SMALL | {"num_hidden_layers": 1, "query_pre_attn_scalar": 4},  # tied head, logits through tanh
    "mixtral": SMALL | {"num_hidden_layers": 1, "num_local_experts": 3},
}


class Perceptron(nn.Module):
    def __init__(self, width: int = 12, classes: int = 4, hidden: int = 7) -> None:
        super().__init__()
        self.one = nn.Linear(width, hidden)
        self.two = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(functional.gelu(self.one(pixels.flatten(1))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.Conv2d(5, 6, (3, 2), padding=(2, 0), dilation=(2, 1)),
            nn.SiLU(),
        )
        self.out = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.body(pixels).mean((2, 3)))


class Softmax(nn.Module):
    """Logits linear in the parameters: the Hessian has no second term."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.map(pixels.flatten(1))


def plain(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with seeded(seed):
        model = kind()
        roughen(model)
    return model.to(F64).eval()


def texts(n: int = 4, seed: int = 0, vocab: int = 12) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{i}", ids, int(torch.randint(1, 3, (1,), generator=generator)), 1))
    return found


def images(n: int = 6, seed: int = 0, side: int = 2, dtype: torch.dtype = F64) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, side, side, generator=generator, dtype=dtype)
    return [ImageRecord(f"i{i}", pixels[i], i % 4) for i in range(n)]


def language_model(arch: str, dtype: torch.dtype = F64, **overrides: Any) -> nn.Module:
    return causal_lm(arch, dtype=dtype, vocab=12, **(SIZES[arch] | overrides))


def reference(arch: str, dtype: torch.dtype = F64) -> nn.Module:
    """The same weights with the plain loops that torch.func can go through."""
    model = language_model(arch, dtype, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    return model


# --------------------------------------------------------------------------------------------------------------- oracle


def logits_and_labels(
    model: nn.Module, records: Sequence[Record], names: Sequence[str]
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Logits [N, V] as a function of the flat parameters, labels [N], and the parameters as they are [n]."""
    own = dict(model.named_parameters())
    here = torch.cat([own[name].detach().flatten() for name in names])

    def logits(flat: Tensor) -> Tensor:
        parts = flat.split([own[name].numel() for name in names])
        state = {name: part.view(own[name].shape) for name, part in zip(names, parts, strict=True)}
        rows = []
        for record in records:
            if isinstance(record, ImageRecord):
                out = functional_call(model, state, (record.pixels[None],))
                rows.append(out if isinstance(out, Tensor) else out.logits)
            else:
                inputs = {"input_ids": torch.tensor([record.ids]), "use_cache": False}
                rows.append(functional_call(model, state, (), inputs).logits[0, record.n_prompt - 1 : -1])
        return torch.cat(rows)

    labels = [[record.label] if isinstance(record, ImageRecord) else record.completion for record in records]
    return logits, torch.tensor([label for part in labels for label in part]), here


def dense(model: nn.Module, records: Sequence[Record], kind: str, names: Sequence[str] | None = None) -> np.ndarray:
    """The whole matrix [n, n]: torch's Hessian, or explicit Jacobians and softmax curvatures."""
    names = [name for name, _ in model.named_parameters()] if names is None else names
    logits, labels, here = logits_and_labels(model, records, names)
    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda x: functional.cross_entropy(logits(x), labels), here).numpy()
    jacobian = torch.autograd.functional.jacobian(logits, here)  # [N, V, n]
    p = logits(here).detach().softmax(-1)  # [N, V]
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # [N, V, V]
    return (torch.einsum("nci,ncd,ndj->ij", jacobian, curvature, jacobian) / len(labels)).numpy()


def one_product(model: nn.Module, records: Sequence[Record], kind: str, vector: Tensor) -> Tensor:
    """One product by torch's own product functions, for models too large for the dense matrix."""
    logits, labels, here = logits_and_labels(model, records, [name for name, _ in model.named_parameters()])
    if kind == "hessian":
        return torch.autograd.functional.hvp(lambda x: functional.cross_entropy(logits(x), labels), here, vector)[1]
    z, change = torch.autograd.functional.jvp(logits, here, vector)
    p = z.softmax(-1)
    return torch.autograd.functional.vjp(logits, here, (p * (change - (p * change).sum(-1, True))) / len(labels))[1]


def vectors(n: int, k: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(dtype)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_a_language_model(kind: type[CurvatureOperator]) -> None:
    """The oracle is the mean over all completion tokens, each read by the model's own forward, one record at a time."""
    model, records = language_model("gpt2"), texts()
    operator = kind(model, records, batch_tokens=16)
    expected = dense(reference("gpt2"), records, kind.kind)
    x = vectors(len(expected), 5)
    close(operator @ x, expected @ x, 1e-12)
    assert operator.shape == expected.shape
    assert operator.n_losses == sum(r.n_tokens for r in records)
    assert operator.n_records == len(records)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [Perceptron, Convolutions])
def test_products_with_an_image_classifier(architecture: type[nn.Module], kind: type[CurvatureOperator]) -> None:
    model, records = plain(architecture), images(5, side=2 if architecture is Perceptron else 6)
    expected = dense(model, records, kind.kind)
    x = vectors(len(expected), 5)
    close(kind(model, records, batch_tokens=3) @ x, expected @ x, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["vit", "swin", "resnet"])
def test_products_with_the_architectures_of_images(arch: str, kind: type[CurvatureOperator]) -> None:
    model, records = image_classifier(arch, dtype=F64), images(3, side=32)
    operator = kind(model, records, batch_tokens=2)
    plain_loops = {} if arch == "resnet" else {"attn_implementation": "eager"}
    x = torch.from_numpy(vectors(operator.shape[0], 1)[:, 0])
    expected = one_product(image_classifier(arch, dtype=F64, **plain_loops), records, kind.kind, x)
    close(operator @ x.numpy(), expected.numpy(), 1e-6)  # softmax of ViT and Swin in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "mixtral"])
def test_products_with_the_architectures_of_language_models(arch: str, kind: type[CurvatureOperator]) -> None:
    """Heads untied and tied, logits through a tanh, stacked experts; in fp32, as RMSNorm computes whatever its type."""
    model, records = language_model(arch, torch.float32), texts()
    operator = kind(model, records, batch_tokens=16)
    x = torch.from_numpy(vectors(operator.shape[0], 1, dtype="float32")[:, 0])
    expected = one_product(reference(arch, torch.float32), records, kind.kind, x)
    found = operator @ x.numpy()
    assert found.dtype == np.float32
    close(found, expected.numpy(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_run_by_the_plain_loop(kind: type[CurvatureOperator]) -> None:
    """The grouped kernel, which is the default, cannot multiply in float64."""
    model, records = language_model("mixtral"), texts()
    chosen, model.config._experts_implementation = model.config._experts_implementation, "eager"
    model_map = ModelMap.of(model)
    model.config._experts_implementation = chosen
    operator = kind(model, records, model_map=model_map)
    x = torch.from_numpy(vectors(operator.shape[0], 1)[:, 0])
    close(operator @ x.numpy(), one_product(reference("mixtral"), records, kind.kind, x).numpy(), 1e-5)


def test_closed_form_of_one_softmax() -> None:
    """One image x, two classes without bias: p (1 - p) [1 -1; -1 1] (x) x x^T."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    record = ImageRecord("a", torch.tensor([[[1.0, 2.0]]], dtype=F64), 0)
    p = float(model(record.pixels[None]).detach().softmax(-1)[0, 0])
    expected = p * (1 - p) * np.kron([[1, -1], [-1, 1]], [[1, 2], [2, 4]])
    for kind in KINDS:
        operator = kind(model, [record])
        close(operator @ np.eye(4), expected, 1e-12)
        assert operator.loss == pytest.approx(-np.log(p), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_memorised_records_keep_their_digits_in_single_precision(kind: type[CurvatureOperator]) -> None:
    """Where p(label) = 1 - 3e-7 or so, p - 1 and p - p^2 have hardly a digit in fp32."""
    model, records = plain(Perceptron), images(4)
    with torch.no_grad():
        for record in records:
            record.pixels.copy_(records[0].pixels + 0.1 * record.pixels)
        model.two.bias.copy_(torch.tensor([15.0, 0.0, 0.1, -0.1]))
    records = [ImageRecord(r.record_id, r.pixels, 0) for r in records]
    x = vectors(123, 3)
    expected = kind(model, records) @ x
    assert 1e-8 < kind(model, records).loss < 1e-6
    single = [ImageRecord(r.record_id, r.pixels.float(), 0) for r in records]
    close(kind(model.float(), single) @ x, expected, 1e-5)


def test_gauss_newton_is_the_hessian_where_logits_are_linear_and_only_there() -> None:
    model, records = plain(Softmax), images()
    x = vectors(52, 4)
    close(GaussNewtonOperator(model, records) @ x, HessianOperator(model, records) @ x, 1e-12)
    model = plain(Perceptron)
    x = vectors(sum(p.numel() for p in model.parameters()), 4)
    with pytest.raises(AssertionError):
        close(GaussNewtonOperator(model, records) @ x, HessianOperator(model, records) @ x, 1e-2)


@pytest.mark.parametrize("model", [plain(Perceptron), language_model("gpt2")], ids=["image", "text"])
def test_gauss_newton_is_the_fisher_information(model: nn.Module) -> None:
    """sum_y p(y) g_y g_y^T over every class of every position, with one gradient each."""
    records: list[Any] = images(4) if isinstance(model, Perceptron) else texts(2)
    names = [name for name, _ in model.named_parameters()]
    logits, labels, here = logits_and_labels(model, records, names)
    gradients = torch.autograd.functional.jacobian(lambda x: logits(x).log_softmax(-1), here)  # [N, V, n]
    p = logits(here).detach().softmax(-1)  # [N, V]
    expected = (torch.einsum("nc,nci,ncj->ij", p, gradients, gradients) / len(labels)).numpy()
    x = vectors(len(here), 4)
    close(GaussNewtonOperator(model, records) @ x, expected @ x, 1e-10)


def test_gauss_newton_reads_no_label_and_has_no_negative_eigenvalue() -> None:
    model, records = plain(Perceptron), images(5)
    x = vectors(123, 3)
    relabelled = [ImageRecord(r.record_id, r.pixels, (r.label + 1) % 4) for r in records]
    assert np.array_equal(GaussNewtonOperator(model, records) @ x, GaussNewtonOperator(model, relabelled) @ x)
    eigenvalues = np.linalg.eigvalsh(GaussNewtonOperator(model, records) @ np.eye(123))
    assert eigenvalues[0] > -1e-14
    assert (eigenvalues > 1e-12).sum() == 5 * 3  # n_losses x (V - 1)
    assert np.linalg.eigvalsh(HessianOperator(model, records) @ np.eye(123))[0] < -1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_linear_and_its_own_adjoint(kind: type[CurvatureOperator]) -> None:
    operator = kind(language_model("gpt2"), texts())
    x = vectors(operator.shape[0], 2)
    product = operator @ x
    cross = x.T @ product
    assert cross[0, 1] == pytest.approx(cross[1, 0], rel=1e-10)
    close(operator @ (2.5 * x[:, 0] - 3 * x[:, 1]), 2.5 * product[:, 0] - 3 * product[:, 1], 1e-12)
    assert operator.H is operator
    assert operator.T is operator
    assert np.array_equal(operator.rmatvec(x[:, 0]), operator.matvec(x[:, 0]))


# ------------------------------------------------------------------------------------------------- pieces and batches


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_chunks_change_rounding_only(kind: type[CurvatureOperator], monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = language_model("gpt2"), texts(6)
    n = sum(p.numel() for p in model.parameters())
    x, rows = vectors(n, 2), []
    model_map = ModelMap.of(model)
    model.lm_head.register_forward_hook(lambda _m, _x, y: rows.append(len(y)))
    expected = kind(model, records, batch_tokens=1000, model_map=model_map) @ x
    assert max(rows) > 3
    close(kind(model, records, batch_tokens=1, model_map=model_map) @ x, expected, 1e-12)
    rows.clear()
    monkeypatch.setattr(operators, "CHUNK_ELEMENTS", 3 * 12)  # three positions' logits at once
    close(kind(model, records, batch_tokens=1000, model_map=model_map) @ x, expected, 1e-12)
    assert max(rows) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_matter_the_order_of_records(kind: type[CurvatureOperator]) -> None:
    model, records = plain(Perceptron), images(6)
    x = vectors(123, 1)
    close(kind(model, records[::-1], batch_tokens=4) @ x, kind(model, records, batch_tokens=4) @ x, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_together_and_apart_give_the_same_bytes(kind: type[CurvatureOperator]) -> None:
    operator = kind(language_model("llama", torch.float32), texts(), batch_tokens=16)
    x = vectors(operator.shape[0], 3, dtype="float32")
    together = operator.matmat(x)
    for i in range(3):
        assert np.array_equal(operator.matvec(x[:, i]), together[:, i])


@pytest.mark.parametrize("kind", KINDS)
def test_backward_stops_at_the_lowest_parameter_asked_for(kind: type[CurvatureOperator]) -> None:
    model, records = causal_lm("llama"), texts(3)
    model_map, reached = ModelMap.of(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _m, _x, y: reached.append((y[0] if isinstance(y, tuple) else y).requires_grad)
        )
    operator = kind(model, records, parameters=["model.layers.1.mlp.down_proj.weight"], model_map=model_map)
    reached.clear()
    operator @ vectors(operator.shape[0], 2)
    assert reached == [False, True, True]


# ------------------------------------------------------------------------------------------------- which parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_the_diagonal_block_of_the_whole(kind: type[CurvatureOperator]) -> None:
    model, records = language_model("gpt2", n_layer=2), texts(3)
    blocks = block_parameters(ModelMap.of(model))
    assert list(blocks) == [0, 1]
    assert all(name.startswith(f"transformer.h.{i}.") for i in blocks for name in blocks[i])
    whole = kind(model, records)
    inside = np.concatenate(
        [np.full(int(np.prod(shape)), name in blocks[1]) for name, shape in whole.parameters.items()]
    )
    x = vectors(int(inside.sum()), 2)
    wide = np.zeros((whole.shape[0], 2))
    wide[inside] = x
    block = kind(model, records, parameters=blocks[1])
    assert tuple(block.parameters) == blocks[1]
    close(block @ x, (whole @ wide)[inside], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_head_alone(arch: str, kind: type[CurvatureOperator]) -> None:
    """GPT-2's is tied to the embedding and so counts in both places; Llama's hidden states do not depend on it."""
    model, records = language_model(arch), texts()
    operator = kind(model, records, parameters=["lm_head.weight"])
    name = "transformer.wte.weight" if arch == "gpt2" else "lm_head.weight"
    assert operator.parameters == {name: (12, 4 if arch == "gpt2" else 8)}
    x = vectors(operator.shape[0], 3)
    close(operator @ x, dense(reference(arch), records, kind.kind, [name]) @ x, 1e-12 if arch == "gpt2" else 1e-5)


def test_names_are_taken_in_the_models_order_and_tied_ones_once() -> None:
    model, records = language_model("gpt2"), texts(2)
    names = ["lm_head.weight", "transformer.h.0.attn.c_attn.bias", "transformer.wte.weight"]
    operator = HessianOperator(model, records, parameters=names)
    assert operator.parameters == {"transformer.wte.weight": (12, 4), "transformer.h.0.attn.c_attn.bias": (12,)}
    assert operator.shape == (60, 60)


def test_vectors_split_by_parameter_and_join_again() -> None:
    operator = HessianOperator(plain(Perceptron), images(2))
    x = vectors(123, 1)[:, 0]
    parts = operator.split(x)
    assert {name: part.shape for name, part in parts.items()} == operator.parameters
    assert np.array_equal(parts["one.weight"].reshape(-1), x[: 7 * 12])
    assert np.array_equal(parts["two.bias"], x[-4:])
    assert np.array_equal(operator.join(parts), x)
    with pytest.raises(UsageError, match="123 weights, found 3"):
        operator.split(x[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_outside_the_loss_has_no_curvature(kind: type[CurvatureOperator]) -> None:
    model = plain(Perceptron)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=F64)))
    assert not (kind(model, images(3), parameters=["unused"]) @ np.eye(3)).any()
    product = kind(model, images(3)) @ np.ones(126)
    assert not product[:3].any()
    assert product[3:].any()


# ---------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(kind: type[CurvatureOperator], fails: bool) -> None:
    model, records = language_model("mixtral", torch.float32), texts(3)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    experts, state = model.config._experts_implementation, torch.get_rng_state()

    operator = kind(model, records)
    if fails:
        handle = model.model.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            operator @ np.ones(operator.shape[0])
        handle.remove()
    else:
        operator @ np.ones(operator.shape[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert model.config._experts_implementation == experts != "eager"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_and_the_same_call_gives_the_same_bytes(kind: type[CurvatureOperator]) -> None:
    model, records = language_model("gpt2", resid_pdrop=0.5).train(), texts(3)
    x = vectors(sum(p.numel() for p in model.parameters()), 2)
    first = kind(model, records) @ x
    assert first.tobytes() == (kind(model, records) @ x).tobytes()
    assert first.tobytes() == (kind(model.eval(), records) @ x).tobytes()


def test_products_follow_the_weights() -> None:
    model, records = plain(Perceptron), images(3)
    operator, x = HessianOperator(model, records), vectors(123, 1)
    before = operator @ x
    with torch.no_grad():
        model.one.weight.mul_(1.5)
    close(operator @ x, dense(model, records, "hessian") @ x, 1e-12)
    assert not np.allclose(operator @ x, before)


def test_progress_counts_vectors() -> None:
    seen: list[int] = []
    operator = HessianOperator(plain(Perceptron), images(3), progress=seen.append)
    operator @ np.ones(123)
    operator @ np.ones((123, 4))
    assert seen == [1, 5]
    assert operator.products == 5


def test_the_loss_is_the_mean_over_tokens() -> None:
    model, records = language_model("gpt2"), texts()
    logits, labels, here = logits_and_labels(model, records, [name for name, _ in model.named_parameters()])
    expected = float(functional.cross_entropy(logits(here), labels))
    for batch_tokens in (1, 1000):
        assert HessianOperator(model, records, batch_tokens=batch_tokens).loss == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- errors


class Random(Perceptron):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels + 0.1 * torch.randn_like(pixels))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class OnceDifferentiable(Perceptron):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(Once.apply(self.one(pixels.flatten(1))).square())


class Kernel(torch.autograd.Function):
    """As custom kernels do: right, but a gradient that remembers nothing of where it came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (2 * ctx.saved_tensors[0] * gradient).detach()


class CustomKernel(Perceptron):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(Kernel.apply(self.one(pixels.flatten(1))))


def test_wrong_arguments_end_in_one_line() -> None:
    model, records = language_model("llama"), texts(2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"parameters": []}, "at least one parameter"),
        ({"parameters": ["model.layers.0.mlp.up_prj.weight"]}, r"close names: .*up_proj"),
    ]
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            HessianOperator(model, records, **options)
    with pytest.raises(UsageError, match="at least one record"):
        GaussNewtonOperator(model, [])
    with pytest.raises(UnsupportedError, match="vocabulary"):
        HessianOperator(model, [TokenRecord("a", (5, 500), 1, 1)])
    with pytest.raises(UnsupportedError, match="below 4 classes"):
        HessianOperator(plain(Perceptron), [ImageRecord("a", torch.zeros(3, 2, 2, dtype=F64), 4)])


def test_what_would_make_products_worthless_is_found_at_once() -> None:
    with pytest.raises(UnsupportedError, match="float32 or all in float64, found bfloat16"):
        HessianOperator(language_model("llama", torch.bfloat16), texts(2))
    with pytest.raises(UnsupportedError, match="random"):
        HessianOperator(plain(Random), images(3))
    with pytest.raises(UnsupportedError, match=r"differentiated twice, found one that cannot .*attn_implementation"):
        HessianOperator(plain(OnceDifferentiable), images(3))
    with pytest.raises(UnsupportedError, match=r"differentiated twice"):
        GaussNewtonOperator(plain(OnceDifferentiable), images(3), parameters=["one.weight"])
    for kind in KINDS:
        with pytest.raises(UnsupportedError, match="symmetric"):
            kind(plain(CustomKernel), images(3))
    model = plain(Perceptron)
    with torch.no_grad():
        model.two.bias[0] = torch.inf
    with pytest.raises(UnsupportedError, match="found 3 of 3"):
        GaussNewtonOperator(model, images(3))


def test_infinite_products_are_refused() -> None:
    operator = HessianOperator(plain(Perceptron), images(3))
    with pytest.raises(UnsupportedError, match="finite curvature"):
        operator @ np.full(123, 1e308)


def test_running_out_of_memory_says_what_to_do() -> None:
    model = language_model("llama")
    operator = HessianOperator(model, texts(2))

    def fail(*_: object) -> None:
        raise MemoryError

    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(ResourceError, match="lower batch_tokens"):
        operator @ np.ones(operator.shape[0])


def test_the_base_is_no_operator() -> None:
    with pytest.raises(NotImplementedError, match="HessianOperator"):
        CurvatureOperator(plain(Perceptron), images(2))
