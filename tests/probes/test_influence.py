"""TracIn influence against plain autograd, record by record, and against captum's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from probes import influence as module
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.influence import Influence, influence
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.taps import sites
from tests.tiny import causal_lm, image_classifier, roughen, seeded, train

F64 = torch.float64
Record = TokenRecord | ImageRecord


class Perceptron(nn.Module):
    def __init__(self, width: int = 12, classes: int = 4, hidden: int = 7) -> None:
        super().__init__()
        self.one = nn.Linear(width, hidden, bias=False)
        self.two = nn.Linear(hidden, classes, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(self.one(pixels.flatten(1)).tanh())


def perceptron(seed: int = 0) -> nn.Module:
    with seeded(seed):
        model = Perceptron()
        roughen(model)
    return model.to(F64).eval()


def texts(n: int = 5, seed: int = 0, vocab: int = 96, longest: int = 10) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{seed}.{i}", ids, int(torch.randint(1, 3, (1,), generator=generator)), 1))
    return found


def images(n: int = 6, seed: int = 0, side: int = 32) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, side, side, generator=generator, dtype=F64)
    return [ImageRecord(f"i{seed}.{i}", pixels[i], i % 4) for i in range(n)]


def loss_of(model: nn.Module, record: Record) -> Tensor:
    """Summed loss of one record by the model's own forward."""
    if isinstance(record, ImageRecord):
        out = model(record.pixels[None])
        logits = out if isinstance(out, Tensor) else out.logits
        return functional.cross_entropy(logits, torch.tensor([record.label]))
    logits = model(input_ids=torch.tensor([record.ids]), use_cache=False).logits[0, record.n_prompt - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(record.completion), reduction="sum")


def gradient_of(model: nn.Module, record: Record, globs: Sequence[str] | None) -> Tensor:
    """[everything] gradient of the summed loss in the weights of the chosen maps; of experts, slice by slice."""
    chosen = sites(ModelMap.of(model), globs)
    named = dict(model.named_parameters())
    names = list(dict.fromkeys(site.projection.parameter for site in chosen))
    found = dict(zip(names, torch.autograd.grad(loss_of(model, record), [named[name] for name in names]), strict=True))
    pieces = [
        found[s.projection.parameter] if s.expert is None else found[s.projection.parameter][s.expert] for s in chosen
    ]
    return torch.cat([piece.flatten() for piece in pieces])


def brute_force(
    model: nn.Module, records: Sequence[Record], targets: Sequence[Record], globs: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, self-influence of the records and of the targets, each loss a mean over its tokens.

    The mean is taken last: Llama's norms compute in fp32 even in a float64 model, so that scaling first would not
    commute with the backward pass.
    """
    a, b = (torch.stack([gradient_of(model, r, globs) / tokens(r) for r in group]) for group in (records, targets))
    return (a @ b.T).numpy(), a.square().sum(1).numpy(), b.square().sum(1).numpy()


def tokens(record: Record) -> int:
    return record.n_tokens if isinstance(record, TokenRecord) else 1


def agrees(found: Influence, expected: tuple[np.ndarray, np.ndarray, np.ndarray], tolerance: float = 1e-9) -> None:
    for ours, theirs in zip((found.scores, found.self_influence, found.target_self_influence), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def eager(arch: str) -> nn.Module:
    model = causal_lm(arch, dtype=F64, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    return model


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("arch", ["gpt2", "llama", "phi3", "gemma2", "mixtral", "qwen2_moe"])
def test_equals_autograd_on_language_models(arch: str) -> None:
    model, records, targets = eager(arch), texts(4), texts(2, seed=1)
    expected = brute_force(model, records, targets)
    for batch_tokens in (1, 16, None):  # one by one, in unequal batches, all at once
        agrees(influence(model, records, targets, batch_tokens=batch_tokens), expected)


@pytest.mark.parametrize("arch", ["vit", "swin", "resnet"])
def test_equals_autograd_on_image_classifiers(arch: str) -> None:
    extra = {} if arch == "resnet" else {"attn_implementation": "eager"}
    model, records, targets = image_classifier(arch, dtype=F64, **extra), images(3), images(2, seed=1)
    agrees(influence(model, records, targets, batch_tokens=2), brute_force(model, records, targets))


def test_chosen_modules_only() -> None:
    model, records, targets = eager("llama"), texts(3), texts(2, seed=1)
    globs = ["*.2.mlp.down_proj", "*.1.self_attn.q_proj"]
    found = influence(model, records, targets, modules=globs)
    assert found.modules == ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    agrees(found, brute_force(model, records, targets, globs))


def test_rows_and_gradients_are_two_routes_to_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 x 96 weights: a record of 60 tokens keeps gradients, one of 6 its rows; forcing either changes nothing."""
    model = eager("gpt2")
    records = [*texts(2), TokenRecord("long", tuple(range(4, 64)), 1, 1)]
    targets = [*texts(2, seed=1), TokenRecord("long target", tuple(range(64, 4, -1)), 2, 1)]
    expected = brute_force(model, records, targets)
    agrees(influence(model, records, targets), expected)
    for rows in (True, False):
        monkeypatch.setattr(module, "_by_rows", lambda x, g, rows=rows: rows)
        agrees(influence(model, records, targets), expected)


def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, targets = eager("llama"), texts(4), texts(3, seed=1)
    expected = influence(model, records, targets)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 7)
    np.testing.assert_allclose(influence(model, records, targets).scores, expected.scores, rtol=1e-10)


def test_equals_captum(tmp_path: Path) -> None:
    """captum's TracInCP over two checkpoints; without biases, which it cannot leave out."""
    from captum.influence import TracInCP
    from torch.utils.data import TensorDataset

    first, records, targets = perceptron(), images(5, side=2), images(3, seed=1, side=2)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))
    rates = {"a": 0.1, "b": 0.02}
    states = {"a": first.state_dict(), "b": second.state_dict()}

    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(states[Path(path).name])
        return rates[Path(path).name]

    def dataset(group: Sequence[ImageRecord]) -> TensorDataset:
        return TensorDataset(torch.stack([r.pixels for r in group]), torch.tensor([r.label for r in group]))

    model = copy.deepcopy(first)
    oracle = TracInCP(
        model,
        dataset(records),
        [str(tmp_path / name) for name in rates],
        load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=2,
        layers=["one", "two"],
    )
    theirs = oracle.influence(dataset(targets)[:], k=None)  # [C, R]
    ours = influence([(first, 0.1), (second, 0.02)], records, targets, modules=["one", "two"])
    np.testing.assert_allclose(ours.scores, theirs.detach().numpy().T, rtol=1e-6)
    np.testing.assert_allclose(ours.self_influence, oracle.self_influence().detach().numpy(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- what it means


def test_influence_predicts_the_loss_after_a_step() -> None:
    """The definition: a small gradient step on z lowers the loss of z' by step size times influence."""
    model, records, targets = eager("gpt2"), texts(3), texts(1, seed=1)
    found = influence(model, records, targets)
    chosen = {site.projection.parameter for site in sites(ModelMap.of(model))}
    step = 1e-6
    before = loss_of(model, targets[0]).item() / targets[0].n_tokens
    for i, record in enumerate(records):
        moved = copy.deepcopy(model)
        (loss_of(moved, record) / record.n_tokens).backward()
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in chosen:
                    parameter.sub_(step * parameter.grad)
        after = loss_of(moved, targets[0]).item() / targets[0].n_tokens
        assert (before - after) / step == pytest.approx(found.scores[i, 0], rel=1e-3, abs=1e-6)


def test_the_record_that_was_trained_on_leads() -> None:
    """Halfway through learning three strings, each one's own record is its strongest proponent."""
    model = causal_lm("llama", dtype=F64)
    rows = [
        tuple(torch.randperm(92, generator=torch.Generator().manual_seed(s))[:14].add(4).tolist()) for s in range(6)
    ]
    train(model, rows[:3], steps=8)
    records = [TokenRecord(f"r{i}", ids, 4, 1) for i, ids in enumerate(rows)]
    for relative in (False, True):
        found = influence(model, records, records[:3])
        assert [found.ranking(t, 1, relative=relative)[0][0] for t in range(3)] == ["r0", "r1", "r2"]


def test_self_influence_is_influence_on_itself() -> None:
    model, records = eager("gpt2"), texts(4)
    found = influence(model, records, records)
    np.testing.assert_allclose(found.self_influence, np.diag(found.scores), rtol=1e-10)
    np.testing.assert_allclose(found.self_influence, found.target_self_influence, rtol=1e-10)
    np.testing.assert_allclose(found.scores, found.scores.T, rtol=1e-8)
    np.testing.assert_allclose(np.diag(found.relative()), 1.0, rtol=1e-10)
    assert np.abs(found.relative()).max() <= 1 + 1e-12


def test_checkpoints_add_up_with_their_step_sizes_and_may_come_one_at_a_time() -> None:
    records, targets = texts(3), texts(2, seed=1)
    models = [causal_lm("llama", seed=seed, dtype=F64) for seed in (0, 1)]
    alone = [influence(model, records, targets) for model in models]
    both = influence(
        ((causal_lm("llama", seed=s, dtype=F64), eta) for s, eta in ((0, 0.5), (1, 2.0))), records, targets
    )
    np.testing.assert_allclose(both.scores, 0.5 * alone[0].scores + 2.0 * alone[1].scores, rtol=1e-10)
    np.testing.assert_allclose(
        both.self_influence, 0.5 * alone[0].self_influence + 2.0 * alone[1].self_influence, rtol=1e-10
    )
    assert both.step_sizes == (0.5, 2.0)


def test_sum_reduction_counts_tokens() -> None:
    model, records, targets = eager("llama"), texts(3), texts(2, seed=1)
    mean, total = (influence(model, records, targets, reduction=r) for r in ("mean", "sum"))
    lengths = np.outer([r.n_tokens for r in records], [t.n_tokens for t in targets])
    np.testing.assert_allclose(total.scores, mean.scores * lengths, rtol=1e-10)
    np.testing.assert_allclose(total.relative(), mean.relative(), rtol=1e-10)
    np.testing.assert_allclose(total.self_influence, mean.self_influence * [r.n_tokens**2 for r in records], rtol=1e-10)


def test_ranking_breaks_ties_by_identifier() -> None:
    scores = np.array([[1.0], [3.0], [1.0], [1.0]])
    found = Influence(("b", "z", "a", "a"), ("t",), scores, np.ones(4), np.ones(1), "mean", (), (1.0,))
    assert found.ranking(0) == [("z", 3.0), ("a", 1.0), ("a", 1.0), ("b", 1.0)]
    assert found.ranking(0, 2) == [("z", 3.0), ("a", 1.0)]


def test_a_record_without_gradient_has_no_cosine() -> None:
    found = Influence(("a",), ("t",), np.zeros((1, 1)), np.zeros(1), np.ones(1), "mean", (), (1.0,))
    assert found.relative().tolist() == [[0.0]]


# --------------------------------------------------------------------------------------------------- limits and manners


def test_no_weight_gradient_is_formed_and_the_model_is_left_as_found() -> None:
    model = causal_lm("llama").train()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    marked = model.get_submodule("model.layers.1.mlp.up_proj").weight
    marked.grad = torch.ones_like(marked)
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    done: list[tuple[int, int]] = []
    influence(model, texts(5), texts(2, seed=1), batch_tokens=12, progress=lambda a, b: done.append((a, b)))
    assert done[-1] == (7, 7)
    assert [a for a, _ in done] == sorted({a for a, _ in done})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for parameter, (flag, gradient) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad is flag
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_single_precision_is_close_and_repeats_to_the_bit() -> None:
    records, targets = texts(4), texts(2, seed=1)
    expected = influence(causal_lm("llama", dtype=F64), records, targets).scores
    first, second = (influence(causal_lm("llama"), records, targets).scores for _ in range(2))
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    half = influence(causal_lm("llama", dtype=torch.bfloat16), records, targets).scores
    assert np.corrcoef(half.ravel(), expected.ravel())[0, 1] > 0.99


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.two(self.one(self.one(pixels.flatten(1)).tanh()))


def test_a_map_that_runs_twice_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="once a pass, found one twice"):
        influence(Twice().double(), images(2, side=2), images(1, side=2), modules=["one", "two"])


def test_bad_arguments_say_what_was_expected() -> None:
    model, records = causal_lm("llama"), texts(2)
    with pytest.raises(UsageError, match="found 0 and 2"):
        influence(model, [], records)
    with pytest.raises(UsageError, match="texts and images"):
        influence(model, records, images(1))
    with pytest.raises(UsageError, match=r"up_projj.*up_proj"):
        influence(model, records, records, modules=["model.layers.0.mlp.up_projj"])
    with pytest.raises(UsageError, match="positive step sizes, found 0"):
        influence([(model, 0.0)], records, records)
    with pytest.raises(UsageError, match="at least one checkpoint"):
        influence([], records, records)
    with pytest.raises(UsageError, match="one architecture"):
        influence([(model, 1.0), (causal_lm("gpt2"), 1.0)], records, records)
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        influence(model, records, [TokenRecord("x", (1, 2, 200), 1, 1)])


def test_out_of_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_squared_norm", fail)
    with pytest.raises(ResourceError, match="batch_tokens"):
        influence(causal_lm("llama"), texts(2), texts(1))
