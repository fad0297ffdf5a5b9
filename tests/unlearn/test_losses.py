"""Editors that train: gradients against plain autograd, a run against a hand-written loop, identities, files."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probes import training
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.conftest import World
from tests.tiny import IMAGE, causal_lm, image_classifier, save, tokenizer, train
from unlearn import forget
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors import lossbatches
from unlearn.editors.base import EditContext, EditResult, make_editor
from unlearn.editors.linearmaps import mean_loss
from unlearn.editors.lossbatches import ImageBatches, TextBatches
from unlearn.editors.losses import Retain, Trainer, ascent_loss, npo_loss, simnpo_loss
from unlearn.editors.trainable import Added, head_before
from unlearn.requests.presets import load_method
from unlearn.runs.verify import passed, verify

METHODS = ("gradient_ascent", "gradient_difference", "npo", "simnpo")
DEFAULTS = {
    "gradient_ascent": {},
    "gradient_difference": {},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "margin": 0.0},
}


def texts(n: int, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    """Records of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenRecord(f"r{seed}-{i}", tuple(torch.randint(4, vocab, (5 + i % 4,), generator=generator).tolist()), 2, 1)
        for i in range(n)
    ]


def pictures(n: int, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [ImageRecord(f"i{i}", torch.randn(3, IMAGE, IMAGE, generator=generator), i % 4) for i in range(n)]


def forget_loss(method: str, **parameters: Any) -> Any:
    return make_editor(method, parameters).forget_loss()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- losses and their slopes


@pytest.mark.parametrize("method", METHODS)
def test_slopes_are_derivatives(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    totals = (40 * torch.rand(50, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = 40 * torch.rand(50, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 30, (50,), generator=generator).double()
    for extra in ({}, {"beta": 2.0}) if method in ("npo", "simnpo") else ({},):
        values, slopes = forget_loss(method, **extra)(totals, lengths, reference)
        (expected,) = torch.autograd.grad(values.sum(), totals)
        torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-14)


def test_formulas_at_known_points() -> None:
    totals, lengths, reference = (torch.tensor([x], dtype=torch.float64) for x in (6.0, 3.0, 4.0))
    assert float(ascent_loss(totals, lengths, reference)[0]) == -2.0
    value, slope = npo_loss(totals, lengths, reference, beta=0.5)
    ratio = math.exp(4.0 - 6.0)  # pi / pi_0
    assert float(value) == pytest.approx(2 / 0.5 * math.log(1 + ratio**0.5))
    assert float(slope) == pytest.approx(-2 * ratio**0.5 / (1 + ratio**0.5))
    value, _ = simnpo_loss(totals, lengths, reference, beta=2.5, margin=1.5)
    assert float(value) == pytest.approx(-2 / 2.5 * math.log(1 / (1 + math.exp(-(2.5 * 2.0 - 1.5)))))
    at_start = npo_loss(reference, lengths, reference, beta=3.0)
    assert float(at_start[1]) == -1.0  # the first step of NPO is ascent on the whole completion


def test_npo_tends_to_ascent_as_beta_falls_and_leaves_the_forgotten_alone() -> None:
    totals = torch.tensor([3.0, 20.0, 60.0], dtype=torch.float64)
    reference = torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64)
    lengths = torch.tensor([4.0, 4.0, 4.0], dtype=torch.float64)
    for beta in (1e-3, 1e-5):
        values, slopes = npo_loss(totals, lengths, reference, beta=beta)
        torch.testing.assert_close(slopes, -torch.ones(3, dtype=torch.float64), atol=60 * beta, rtol=0)
        torch.testing.assert_close(values - 2 / beta * math.log(2), reference - totals, atol=4000 * beta, rtol=0)
    pushed, left = npo_loss(totals, lengths, reference, beta=0.1)[1][[0, 2]].tolist()
    assert abs(left) < 0.01 < 1 < abs(pushed)
    extreme = npo_loss(torch.tensor([0.0, 1e6]), lengths[:2], torch.tensor([1e6, 0.0]), beta=10.0)
    assert all(bool(x.isfinite().all()) for x in extreme)


# ------------------------------------------------------------------------------------------------- gradients of a step


def moved(parameters: Sequence[nn.Parameter], seed: int = 5) -> None:
    """Push weights off where they were, so that the model and its reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def log_probs(model: nn.Module, record: TokenRecord) -> Tensor:
    """[n, V] log-probabilities at the positions that predict the completion, by the model's own forward pass."""
    logits = model(input_ids=torch.tensor([record.ids])).logits[0]
    return logits[record.n_prompt - 1 : -1].log_softmax(-1)


def plain_objective(
    method: str,
    model: nn.Module,
    frozen: nn.Module,
    forget: Sequence[TokenRecord],
    retain: Sequence[TokenRecord],
    weight: float,
    kl: bool,
) -> Tensor:
    """The objective as it is written in the papers, with a frozen copy as the reference model."""

    def log_pi(of: nn.Module, record: TokenRecord) -> Tensor:
        return log_probs(of, record).gather(-1, torch.tensor(record.completion)[:, None]).sum()

    terms = []
    for record in forget:
        log_p, n = log_pi(model, record), record.n_tokens
        if method in ("gradient_ascent", "gradient_difference"):
            terms.append(log_p / n)
        elif method == "npo":
            ratio = log_p - log_pi(frozen, record).detach()
            terms.append(-2 / 0.1 * torch.log(torch.sigmoid(-0.1 * ratio)))
        else:
            terms.append(-2 / 4.5 * torch.log(torch.sigmoid(-4.5 / n * log_p - 0.3)))
    objective = torch.stack(terms).mean()
    if not weight:
        return objective
    kept = []
    for record in retain:
        if kl:
            p, q = log_probs(frozen, record).detach(), log_probs(model, record)
            kept.append((p.exp() * (p - q)).sum(-1).mean())
        else:
            kept.append(-log_pi(model, record) / record.n_tokens)
    return objective + weight * torch.stack(kept).mean()


@pytest.mark.parametrize(
    ("arch", "method", "kl", "only"),
    [
        ("llama", "gradient_ascent", False, ""),
        ("llama", "gradient_difference", False, ""),
        ("llama", "npo", False, ""),
        ("llama", "npo", True, ""),  # the head trains and the divergence needs it as it was
        ("llama", "npo", True, "layers.1."),  # it does not
        ("gpt2", "npo", True, ""),  # tied head: gradients of two uses meet in one parameter
        ("gpt2", "simnpo", False, "h.2."),
        ("gemma2", "gradient_difference", True, ""),  # soft-capped logits
        ("phi3", "simnpo", False, ""),
    ],
)
@pytest.mark.parametrize("chunk", [None, 96 * 3])
def test_gradients_equal_autograd_of_the_formula(
    arch: str, method: str, kl: bool, only: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(lossbatches, "CHUNK_ELEMENTS", chunk)
    model = causal_lm(arch, dtype=torch.float64)
    frozen, model_map = copy.deepcopy(model), ModelMap.of(model)
    forget_records, retain_records = texts(3, 1), texts(4, 2)
    names = [name for name, _ in model.named_parameters() if only in name]
    head = head_before(model_map, names)
    weight = 0.0 if method == "gradient_ascent" else 0.7
    retain = Retain(TextBatches(model_map, retain_records, head), [[0, 2, 3]], weight, kl) if weight else None
    loss = forget_loss(method, **({"margin": 0.3} if method == "simnpo" else {}))
    batches = TextBatches(model_map, forget_records, head)
    trainer = Trainer(loss, batches, [[2, 0]], retain, None, lambda records: None)
    with training.full(model, names, keep=True) as parameters:
        trainer.prepare(reference=method == "npo")
        moved(parameters)
        with torch.enable_grad():
            value = trainer.step(0)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    chosen = [retain_records[i] for i in (0, 2, 3)]
    expected = plain_objective(method, model, frozen, [forget_records[i] for i in (2, 0)], chosen, weight, kl)
    expected.backward()
    exact = 1.0 if arch != "gemma2" else 1e4  # its norms compute in fp32
    assert value == pytest.approx(float(expected.detach()), rel=1e-10 * exact)
    assert set(found) == set(names)
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8 * exact, atol=1e-10 * exact * scale)


@pytest.mark.parametrize("kl", [False, True])
def test_gradients_for_images(kl: bool) -> None:
    model = image_classifier("vit", dtype=torch.float64)
    frozen = copy.deepcopy(model)
    forget_records, retain_records = pictures(3, 1), pictures(5, 2)
    retain = Retain(ImageBatches(model, retain_records), [[4, 1]], 0.5, kl)
    trainer = Trainer(forget_loss("npo"), ImageBatches(model, forget_records), [[0, 2]], retain, None, lambda n: None)
    with training.full(model, keep=True) as parameters:
        trainer.prepare(reference=True)
        moved(parameters)
        with torch.enable_grad():
            value = trainer.step(0)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def log_p(of: nn.Module, record: ImageRecord) -> Tensor:
        scores: Tensor = of(record.pixels[None].double()).logits[0].log_softmax(-1)
        return scores

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    terms = []
    for record in (forget_records[0], forget_records[2]):
        ratio = (log_p(model, record) - log_p(frozen, record).detach())[record.label]
        terms.append(-2 / 0.1 * torch.log(torch.sigmoid(-0.1 * ratio)))
    kept = []
    for record in (retain_records[4], retain_records[1]):
        p, q = log_p(frozen, record).detach(), log_p(model, record)
        kept.append((p.exp() * (p - q)).sum() if kl else -q[record.label])
    expected = torch.stack(terms).mean() + 0.5 * torch.stack(kept).mean()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.abs().max()):
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-12)


def test_totals_are_log_likelihoods_of_completions_alone() -> None:
    """Not raw logits, and neither prompts nor padding: both are defects of public code."""
    model = causal_lm("gemma2")
    model_map, records = ModelMap.of(model), [*texts(3, 1), TokenRecord("long", tuple(range(4, 40)), 30, 1)]
    table = score(model, records, model_map=model_map)
    expected = [-float(table.log_prob[table.rows(i)].sum(dtype=float)) for i in range(4)]
    batches = TextBatches(model_map, records, {})
    with torch.no_grad():
        assert batches.totals([0, 1, 2, 3])[0].tolist() == pytest.approx(expected, rel=1e-5)
        nothing = batches.totals([3, 0], batches.taught([3, 0]))[0]  # the divergence from itself
    assert nothing.abs().max() < 1e-6


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is run record by record gives the same gradients."""
    model = causal_lm("llama", dtype=torch.float64)
    model_map = ModelMap.of(model)

    def gradients() -> dict[str, Tensor]:
        retain = Retain(TextBatches(model_map, texts(4, 2), {}), [[3, 1, 0]], 2.0, True)
        trainer = Trainer(
            forget_loss("npo"), TextBatches(model_map, texts(5, 1), {}), [[0, 3, 4]], retain, None, len_of
        )
        with training.full(model, ["model.layers.0.mlp.up_proj.weight"]) as parameters:
            trainer.prepare(reference=True)
            with torch.enable_grad():
                trainer.step(0)
            return {str(i): p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}

    def len_of(records: int) -> None:
        seen.append(records)

    seen: list[int] = []
    whole = gradients()
    monkeypatch.setattr(lossbatches, "default_batch_tokens", lambda device: 1)
    assert max(seen) == 3
    seen.clear()
    apart = gradients()
    assert set(seen) == {1}
    torch.testing.assert_close(apart, whole, rtol=1e-10, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------- the editor


def run(
    checkpoint: Checkpoint,
    out: Path,
    method: str,
    parameters: dict[str, Any],
    forget: Sequence[Any],
    retain: Sequence[Any],
    dtype: str = "float32",
    model: nn.Module | None = None,
    **context: Any,
) -> EditResult:
    model = checkpoint.load_model(dtype) if model is None else model
    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    options = {"seed": 0} | context
    editor = make_editor(method, parameters)
    return editor.edit(EditContext(checkpoint, model, ModelMap.of(model), forget, retain, work=work, **options), out)


SMALL = {"learning_rate": 3e-3, "steps": 4, "batch_size": 2, "rank": 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path_factory.mktemp("llama"), shards=2))


def changed(before: Checkpoint, after: Path) -> set[str]:
    edited = open_checkpoint(after)
    return {name for name, tensor in before.iter_tensors() if not torch.equal(tensor, edited.load_tensor(name))}


@pytest.mark.parametrize(("method", "how"), [("npo", "full"), ("simnpo", "lora"), ("gradient_difference", "lora")])
def test_a_run_equals_a_hand_written_loop(method: str, how: str, llama: Checkpoint, tmp_path: Path) -> None:
    forget_records, retain_records = texts(5, 1), texts(6, 2)
    options = {"learning_rate": 2e-3, "epochs": 2, "batch_size": 2, "retain_batch_size": 3, "how": how, "rank": 3,
               "retain_weight": 0.7, "warm_up": 2, "decay": "linear", "roles": ["q", "down"]}  # fmt: skip
    options |= {"margin": 0.3} if method == "simnpo" else {}
    result = run(llama, tmp_path / "out", method, options, forget_records, retain_records, dtype="float64", seed=3)

    model = llama.load_model("float64")
    frozen, model_map = copy.deepcopy(model), ModelMap.of(model)
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if how == "lora":
        with training.adapters(model, model_map, rank=3, alpha=6, roles=["q", "down"], seed=3) as pairs:
            halves = [p.detach().clone().requires_grad_() for p in pairs]
        trained = halves
    else:
        trained = [start[name].clone().requires_grad_() for name in names]

    def weights() -> dict[str, Tensor]:
        if how == "full":
            return start | dict(zip(names, trained, strict=True))
        return start | {name: start[name] + 2.0 * halves[2 * k + 1] @ halves[2 * k] for k, name in enumerate(names)}

    class Edited(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            return torch.func.functional_call(model, weights(), kwargs=inputs)

    steps = 6
    optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    rows = training.batches(5, 2, steps, 3), training.batches(6, 3, steps, 4)
    curve = []
    for i, (mine, kept) in enumerate(zip(*rows, strict=True)):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 2, (steps - i) / (steps - 2))
        optimiser.zero_grad()
        objective = plain_objective(
            method, Edited(), frozen, [forget_records[j] for j in mine], [retain_records[j] for j in kept], 0.7, False
        )
        objective.backward()
        optimiser.step()
        curve.append(float(objective.detach()))
    assert result.statistics["objective"] == pytest.approx(curve, rel=1e-9)
    assert result.statistics["steps"] == steps
    edited = open_checkpoint(tmp_path / "out")
    for name, tensor in edited.iter_tensors():
        torch.testing.assert_close(tensor, weights()[name].detach().float(), rtol=1e-6, atol=1e-8)
    assert changed(llama, tmp_path / "out") == set(names)
    json.dumps([result.parameters, result.statistics], allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "nothing", [{"steps": 0}, {"epochs": 0, "steps": None}, {"learning_rate": 0.0}, {"learning_rate": 0, "how": "full"}]
)
def test_no_step_changes_no_byte(method: str, nothing: dict[str, Any], llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", method, SMALL | nothing, texts(3, 1), texts(4, 2))
    assert list(result.deltas) == []
    assert result.deltas.tensor_digest == llama.tensor_digest()
    for path in llama.path.iterdir():  # type: ignore[union-attr]
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert result.statistics["steps"] == 0


def state_of(model: nn.Module) -> Any:
    return (
        [(name, id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()],
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(
    how: str, fails: bool, llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.load_model()
    model.get_submodule("model.layers.1").train()  # whatever it was
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    before = state_of(model)
    real = Trainer.step

    def broken(self: Trainer, i: int) -> float:
        if i == 2:
            raise RuntimeError("a failure in the middle")
        return real(self, i)

    if fails:
        monkeypatch.setattr(Trainer, "step", broken)
        with pytest.raises(RuntimeError, match="middle"):
            run(llama, tmp_path / "out", "npo", SMALL | {"how": how}, texts(4, 1), texts(4, 2), model=model)
        assert not (tmp_path / "out").exists()
    else:
        run(llama, tmp_path / "out", "npo", SMALL | {"how": how}, texts(4, 1), texts(4, 2), model=model)
    after = state_of(model)
    for (name, one, was, flag), (other, two, now, still) in zip(before[0], after[0], strict=True):
        assert (name, one, flag) == (other, two, still)
        assert torch.equal(was.view(torch.int32), now.view(torch.int32))
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert kept.grad is not None
    assert bool((kept.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"how": "lora"}, "model.layers.*"),
        (
            {"how": "lora", "blocks": [-1], "roles": ["up", "o"]},
            "model.layers.2.mlp.up_proj|model.layers.2.self_attn.o_",
        ),
        ({"how": "lora", "include": ["*.0.*.q_proj.weight", "*.v_proj.weight"], "exclude": ["*.1.*"]}, None),
        ({"how": "full", "blocks": [1]}, "model.layers.1."),
        ({"how": "full", "roles": ["head"]}, "lm_head"),
        ({"how": "full", "include": ["model.embed_tokens.weight"]}, "model.embed_tokens"),
    ],
)
def test_only_what_is_selected_changes(
    parameters: dict[str, Any], expected: str | None, llama: Checkpoint, tmp_path: Path
) -> None:
    result = run(llama, tmp_path / "out", "npo", SMALL | parameters, texts(4, 1), texts(4, 2))
    model = llama.load_model()
    selected = set(make_editor("npo", parameters).selected(ModelMap.of(model)))
    assert changed(llama, tmp_path / "out") == selected == {delta.name for delta in result.deltas}
    if expected is None:
        assert selected == {
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.2.self_attn.v_proj.weight",
        }
    else:
        assert all(any(name.startswith(part.rstrip("*")) for part in expected.split("|")) for name in selected)
    if parameters == {"how": "lora"}:
        assert len(selected) == 3 * 7
    assert not any("norm" in name for name in selected)


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("gpt2", {"how": "lora"}),  # weights stored transposed
        ("gpt2", {"how": "full", "include": ["transformer.wte.weight"], "retain_loss": "kl"}),  # a tied head
        ("phi3", {"how": "lora"}),  # fused projections
        ("mixtral", {"how": "full"}),  # one stack in the model, one tensor an expert on disk
        ("mixtral", {"how": "lora", "roles": ["q", "k", "v", "o"]}),
    ],
)
def test_the_copy_is_what_was_trained(arch: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    """The copy, loaded, has the loss that the training loop saw under its last weights."""
    checkpoint = open_checkpoint(save(causal_lm(arch), tokenizer(), tmp_path / "source", shards=2))
    forget_records, retain_records = texts(2, 1), texts(4, 2)
    options = SMALL | parameters
    run(checkpoint, tmp_path / "out", "gradient_difference", options | {"steps": 3}, forget_records, retain_records)
    longer = run(checkpoint, tmp_path / "more", "gradient_difference", options, forget_records, retain_records)
    model = open_checkpoint(tmp_path / "out").load_model()
    with torch.no_grad():
        losses = [
            -float(log_probs(model, r).gather(-1, torch.tensor(r.completion)[:, None]).mean()) for r in forget_records
        ]
    assert sum(losses) / 2 == pytest.approx(longer.statistics["forget_loss"][3], rel=1e-5)
    assert longer.statistics["forget_loss"][3] > longer.statistics["forget_loss"][0]
    original, edited = (
        dict(c.load_model().named_parameters()) for c in (checkpoint, open_checkpoint(tmp_path / "out"))
    )
    selected = set(make_editor("npo", parameters).selected(ModelMap.of(checkpoint.load_model())))
    assert {name for name in original if not torch.equal(original[name], edited[name])} == selected


def test_a_difference_of_zero_keeps_the_bits() -> None:
    weight = torch.tensor([-0.0, 0.0, 1.0, 1e-30])
    difference = torch.tensor([0.0, -0.0, 0.5, 0.0], dtype=torch.float64)
    added = Added({"w": difference, "same": torch.zeros(4, dtype=torch.float64)})
    assert added("other", weight) is None
    assert added("same", weight) is None
    new = added("w", weight)
    assert new is not None
    expected = torch.tensor([-0.0, 0.0, 1.5, 1e-30])
    assert torch.equal(new.view(torch.int32), expected.view(torch.int32))


def test_a_retain_loss_holds_the_retain_set(tmp_path: Path) -> None:
    """After as many steps of ascent the records are lost either way; with a retain loss the others are not."""
    model = causal_lm("llama", initializer_range=0.05)
    mine, kept = texts(4, 1), texts(4, 2)
    train(model, [record.ids for record in mine + kept], steps=150)
    checkpoint = open_checkpoint(save(model, None, tmp_path / "source"))

    def losses(method: str, **extra: Any) -> tuple[float, float]:
        out = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        run(checkpoint, out, method, SMALL | {"steps": 40, "batch_size": 4} | extra, mine, kept)
        model_map = ModelMap.of(open_checkpoint(out).load_model())
        return mean_loss(model_map, mine), mean_loss(model_map, kept)

    original = mean_loss(ModelMap.of(model), kept)
    alone = losses("gradient_ascent")
    assert original < 0.5 < 3 < min(alone)
    for method, extra in (
        ("gradient_difference", {"retain_weight": 10.0, "max_forget_loss": 6.0}),
        ("npo", {}),
        ("npo", {"retain_loss": "kl"}),
        ("simnpo", {}),
    ):
        lost, held = losses(method, **extra)
        assert lost > 4 * original + 1
        assert held < 1.0 < alone[1]


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama", dtype=torch.bfloat16), None, tmp_path / "source"))
    run(checkpoint, tmp_path / "out", "npo", SMALL | {"roles": ["down"]}, texts(4, 1), texts(4, 2))
    edited = open_checkpoint(tmp_path / "out")
    assert {tensor.dtype for _, tensor in edited.iter_tensors()} == {torch.bfloat16}
    assert all("down_proj" in name for name in changed(checkpoint, tmp_path / "out"))
    run(checkpoint, tmp_path / "half", "npo", SMALL | {"how": "full"}, texts(4, 1), texts(4, 2), dtype="bfloat16")
    assert changed(checkpoint, tmp_path / "half")


def test_same_inputs_same_bytes(llama: Checkpoint, tmp_path: Path) -> None:
    results = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        results.append(run(llama, tmp_path / str(i), "npo", SMALL, texts(5, 1), texts(6, 2), seed=seed))
    assert results[0].deltas.tensor_digest == results[1].deltas.tensor_digest != results[2].deltas.tensor_digest
    assert results[0].statistics == results[1].statistics


def test_the_bound_ends_training_before_the_step_that_passes_it(llama: Checkpoint, tmp_path: Path) -> None:
    records, options = texts(2, 1), SMALL | {"steps": 12, "how": "full", "blocks": [0]}
    free = run(llama, tmp_path / "free", "gradient_ascent", options, records, [])
    curve = free.statistics["forget_loss"]
    assert len(curve) == 12
    assert curve == sorted(curve)  # ascent it is
    bound = (curve[4] + curve[5]) / 2
    held = run(llama, tmp_path / "held", "gradient_ascent", options | {"max_forget_loss": bound}, records, [])
    assert (held.statistics["steps"], held.statistics["stopped"]) == (5, True)
    assert held.statistics["forget_loss"] == curve[:6]
    assert "5 of 12 steps" in held.warnings[0]
    five = run(llama, tmp_path / "five", "gradient_ascent", options | {"steps": 5}, records, [])
    assert five.deltas.tensor_digest == held.deltas.tensor_digest
    at_once = run(llama, tmp_path / "none", "gradient_ascent", options | {"max_forget_loss": curve[0] / 2}, records, [])
    assert at_once.deltas.tensor_digest == llama.tensor_digest()
    assert (at_once.statistics["steps"], at_once.statistics["stopped"]) == (0, True)


def test_a_retain_weight_of_zero_is_ascent(llama: Checkpoint, tmp_path: Path) -> None:
    alone = run(llama, tmp_path / "a", "gradient_ascent", SMALL, texts(4, 1), [])
    without = run(llama, tmp_path / "b", "gradient_difference", SMALL | {"retain_weight": 0}, texts(4, 1), [])
    assert alone.deltas.tensor_digest == without.deltas.tensor_digest
    assert "retain_loss" not in without.statistics


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("gradient_ascent", {}),
        ("gradient_difference", {"retain_loss": "kl", "steps": 1}),
        ("npo", {"epochs": 2, "steps": None}),
        ("npo", {"retain_loss": "kl", "steps": 7, "retain_batch_size": 4}),
        ("simnpo", {"steps": 0}),
    ],
)
def test_passes_are_those_that_are_run(
    method: str, parameters: dict[str, Any], llama: Checkpoint, tmp_path: Path
) -> None:
    forget_records, retain_records = texts(5, 1), texts(6, 2)
    model, rows, seen = llama.load_model(), [0, 0], list[tuple[int, int]]()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[-1] > 4:  # not the map's own four tokens
            rows[torch.is_grad_enabled()] += len(ids)

    model.get_submodule("model").register_forward_pre_hook(count, with_kwargs=True)
    options = SMALL | parameters
    run(llama, tmp_path / "out", method, options, forget_records, retain_records, model=model,
        progress=lambda *at: seen.append(at))  # fmt: skip
    planned = make_editor(method, options).passes(5, 6)
    assert rows == [planned["forward"], planned["forward_backward"]]
    assert (seen[-1] if seen else (0, 0)) == (sum(rows), sum(rows))


def test_image_classifier(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    records = pictures(12)
    mine, kept = [r for r in records if r.label == 0], [r for r in records if r.label]
    for how in ("lora", "full"):
        options = SMALL | {"steps": 10, "how": how, "retain_loss": "kl"}
        result = run(checkpoint, tmp_path / how, "npo", options, mine, kept)
        curve = result.statistics["forget_loss"]
        assert curve[-1] > curve[0]
        assert changed(checkpoint, tmp_path / how)


# ----------------------------------------------------------------------------------------------------------- bad inputs


def test_parameters_report_every_mistake_without_values() -> None:
    wrong = {"how": "secret", "rank": 0, "learning_rate": -1, "epochs": 1.5, "batch_size": True, "retain_weight": -0.1,
             "retain_loss": "secret", "beta": 0, "max_forget_loss": 0, "decay": "secret", "warmup": 1,
             "blocks": 3}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        make_editor("npo", wrong)
    text = str(caught.value)
    assert "secret" not in text
    assert "12 mistakes" in text
    for word in wrong:
        assert word in text or word == "warmup"
    for method, parameters in (
        ("gradient_ascent", {"retain_weight": 1.0}),
        ("gradient_difference", {"beta": 0.1}),
        ("npo", {"margin": 1.0}),
        ("simnpo", {"margin": -1.0}),
        ("npo", {"include": ["*"], "blocks": [1]}),
        ("npo", {"beta": math.inf}),
    ):
        with pytest.raises(UsageError):
            make_editor(method, parameters)


@pytest.mark.parametrize("method", METHODS)
def test_presets_list_every_parameter_with_its_default(method: str) -> None:
    editor: Any = make_editor(method, {})
    assert load_method(method).parameters == editor.parameters.model_dump(mode="json")
    assert editor.needs_forget
    assert editor.needs_retain == (method != "gradient_ascent")


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"blocks": [3]}, UsageError, "from -3 to 2, found 3"),
        ({"roles": ["gate_up"]}, UsageError, "roles among down, gate, k, o, q, up, v, found gate_up"),
        ({"include": ["*.c_fc.weight"]}, UsageError, "matches none"),
        ({"exclude": ["*"]}, UsageError, "found none"),
        ({"how": "full", "blocks": [-4]}, UsageError, "found -4"),
    ],
)
def test_selections_that_match_nothing(
    parameters: dict[str, Any], error: type[Exception], match: str, llama: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        run(llama, tmp_path / "out", "npo", parameters, texts(2, 1), texts(2, 2))
    assert not (tmp_path / "out").exists()


def test_what_adapters_cannot_do_is_said() -> None:
    experts, network = ModelMap.of(causal_lm("mixtral")), ModelMap.of(image_classifier("resnet"))
    with pytest.raises(UnsupportedError, match="stacked experts"):
        make_editor("npo", {}).selected(experts)
    assert make_editor("npo", {"exclude": ["*experts*"]}).selected(experts)
    assert any(p.endswith("gate_up_proj") for p in make_editor("npo", {"how": "full"}).selected(experts))
    with pytest.raises(UsageError, match="how: full"):
        make_editor("npo", {}).selected(network)
    assert make_editor("npo", {"how": "full"}).selected(network)


@pytest.mark.parametrize(
    ("method", "mine", "kept", "match"),
    [
        ("gradient_ascent", 0, 0, "records to forget for gradient_ascent"),
        ("npo", 2, 0, "retain records for npo"),
    ],
)
def test_missing_records(method: str, mine: int, kept: int, match: str, llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        run(llama, tmp_path / "out", method, SMALL, texts(mine, 1), texts(kept, 2))


def test_one_record_is_enough(llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", "npo", SMALL, texts(1, 1), texts(1, 2))
    assert result.statistics["steps"] == 4
    assert changed(llama, tmp_path / "out")


def test_records_of_another_model(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        run(llama, tmp_path / "out", "npo", SMALL, [TokenRecord("x", (1, 2, 96), 1, 1)], texts(2, 2))
    images = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "vit"))
    with pytest.raises(UnsupportedError, match="below 4 classes"):
        run(images, tmp_path / "o", "npo", SMALL, [ImageRecord("x", torch.zeros(3, IMAGE, IMAGE), 4)], pictures(2))


def test_divergence_of_the_training_is_said(llama: Checkpoint, tmp_path: Path) -> None:
    options = SMALL | {"how": "full", "learning_rate": 1e18, "steps": 5}
    with pytest.raises(UsageError, match="lower the learning rate"):
        run(llama, tmp_path / "out", "gradient_ascent", options, texts(2, 1), [])
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said(llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("can't allocate memory")

    for part in ("step", "prepare"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, part, full)
            with pytest.raises(ResourceError, match=r"smaller batches|lower batch_size"):
                run(llama, tmp_path / part, "npo", SMALL, texts(2, 1), texts(2, 2))


def test_a_parameter_that_is_not_stored_is_refused_before_training(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(llama), "disk_names", lambda self, model: {})
    monkeypatch.setattr(Trainer, "step", lambda self, i: pytest.fail("it trained"))
    with pytest.raises(UnsupportedError, match="the checkpoint stores"):
        run(llama, tmp_path / "out", "npo", SMALL, texts(2, 1), texts(2, 2))


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("gradient_ascent", "learning_rate: 0.003, max_forget_loss: 6.0"),
        ("gradient_difference", "learning_rate: 0.003, max_forget_loss: 6.0"),
        ("npo", "learning_rate: 0.003, epochs: 10, retain_loss: kl"),
        ("simnpo", "learning_rate: 0.003, epochs: 10, how: full"),
    ],
)
def test_forget_end_to_end(method: str, overrides: str, world: World, tmp_path: Path) -> None:
    request = world.folder / f"{method}.yaml"
    text = world.request.read_text().replace("{name: ssd}", f"{{name: {method}, overrides: {{{overrides}}}}}")
    request.write_text(text)
    result = forget(request, out=tmp_path / "run")
    assert passed(verify(result.path))
    arms = json.loads((result.path / "compare/paired.json").read_text())["arms"]["probability"]
    assert arms["U"]["value"] < arms["O"]["value"]
    plan = json.loads((result.path / "edit/plan.json").read_text())
    assert plan["method"]["name"] == method
    assert plan["method"]["parameters"]["steps"] >= 1
    delta = json.loads((result.path / "edit/delta.json").read_text())
    curve = delta["statistics"]["forget_loss"]
    assert 0 < delta["changed_elements"] < delta["total_elements"]
    assert delta["statistics"]["steps"] == len(curve) - delta["statistics"]["stopped"]


def test_methods_are_listed() -> None:
    from unlearn.listing import listing

    rows = dict(listing("editors"))
    assert set(METHODS) <= set(rows)
