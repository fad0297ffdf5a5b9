"""Distillation: divergences and gradients against dense autograd, what the teacher writes, and the edited copy."""

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
from transformers import AutoModelForCausalLM

from attacks.extraction.greedy import greedy_tokens
from probes import training
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.conftest import World
from tests.tiny import EOS, causal_lm, image_classifier, save, tokenizer, train
from tests.unlearn.test_losses import log_probs, moved, pictures, state_of, texts
from unlearn import forget
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors import distilled, lossbatches, student
from unlearn.editors.base import EditContext, EditResult, Rewording, make_editor
from unlearn.editors.lossbatches import ImageBatches, TextBatches, divergence
from unlearn.editors.student import Lessons, StudentParameters, chosen, distil, written
from unlearn.editors.trainable import head_before, selected
from unlearn.requests.presets import load_method
from unlearn.runs.verify import passed, verify


class Changed:
    """A teacher that shares the model's weights: its states, and its head's logits changed by a function."""

    def __init__(self, model_map: ModelMap, change: Any) -> None:
        self._map, self._change = model_map, change

    def backbone(self) -> nn.Module:
        return self._map.backbone()

    def logits(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self._change(self._map.logits(hidden))
        return changed


def without_even(logits: Tensor) -> Tensor:
    """Log-probabilities with no mass on even tokens: a rule that keeps some tokens and gives the others nothing."""
    even = torch.arange(logits.shape[-1]) % 2 == 0
    return logits.masked_fill(even, -math.inf).log_softmax(-1)


def kl(target: Tensor, log_q: Tensor) -> Tensor:
    """KL in nats by its definition, over the classes that the target gives probability: [N] of [N, V]."""
    rows = []
    for p, q in zip(target.log_softmax(-1), log_q, strict=True):
        held = p > -math.inf
        rows.append((p[held].exp() * (p[held] - q[held])).sum())
    return torch.stack(rows)


def nothing(records: int) -> None:
    """Progress that nobody reads."""


# ------------------------------------------------------------------------------------------------------ the divergence


def test_a_token_the_teacher_rules_out_counts_nothing() -> None:
    """0 log 0 is 0: with -inf in the target plain formulas give NaN, and so does their gradient."""
    generator = torch.Generator().manual_seed(0)
    target = without_even(torch.randn(7, 20, generator=generator, dtype=torch.float64))
    logits = (3 * torch.randn(7, 20, generator=generator, dtype=torch.float64)).requires_grad_()
    found = divergence(target, logits)
    expected = kl(target, logits.log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients[0], logits.softmax(-1) - target.exp(), rtol=1e-10, atol=1e-14)
    both = target.clone().requires_grad_()  # the student rules out the same tokens
    same = divergence(target, both)
    assert float(same.detach().abs().max()) < 1e-12
    assert bool(torch.autograd.grad(same.sum(), both)[0].isfinite().all())


@pytest.mark.parametrize(
    ("arch", "teacher", "only"),
    [
        ("llama", "other", ""),  # another model, with states of another width
        ("llama", "zeros", ""),  # shares the head, which trains: it has to be put back for the teacher
        ("gpt2", "sharp", ""),  # shares a tied head
        ("gpt2", "zeros", "h.2."),
        ("gemma2", "zeros", "layers.1."),
    ],
)
@pytest.mark.parametrize("chunk", [None, 96 * 3])
def test_gradients_equal_autograd_of_the_formula(
    arch: str, teacher: str, only: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(lossbatches, "CHUNK_ELEMENTS", chunk)
    model = causal_lm(arch, dtype=torch.float64)
    model_map, frozen, records = ModelMap.of(model), copy.deepcopy(model), texts(5, 1)
    names = [name for name, _ in model.named_parameters() if only in name]
    own = {"zeros": without_even, "sharp": lambda logits: (2 * logits).log_softmax(-1)}
    if teacher == "other":
        frozen = causal_lm("qwen2", seed=3, dtype=torch.float64, hidden_size=64, head_dim=16)
        taking: Any = ModelMap.of(frozen)
    else:
        taking = Changed(model_map, own[teacher])
    batches = TextBatches(model_map, records, head_before(model_map, names), taking)
    with training.full(model, names, keep=True) as parameters:
        taught = batches.all_taught([0, 2, 3, 4], nothing)
        moved(parameters)
        with torch.enable_grad():
            value = batches.mean([3, 0, 2], taught, nothing, factor=0.7)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert batches.mean([3, 0, 2], taught, nothing, factor=None) == pytest.approx(value, rel=1e-12)
    assert taught[2].shape == (records[2].n_tokens, 64 if teacher == "other" else 32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    terms = []
    for record in (records[3], records[0], records[2]):
        answers = log_probs(frozen, record).detach()
        answers = own[teacher](answers) if teacher in own else answers
        terms.append(kl(answers, log_probs(model, record)).mean())
    expected = torch.stack(terms).mean()
    (0.7 * expected).backward()
    exact = 1.0 if arch != "gemma2" else 1e4  # its norms compute in fp32
    assert value == pytest.approx(float(expected.detach()), rel=1e-10 * exact)
    assert set(found) == set(names)
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8 * exact, atol=1e-10 * exact * scale)


def test_gradients_for_images() -> None:
    model, other = (image_classifier(arch, dtype=torch.float64) for arch in ("vit", "dinov2"))
    records = pictures(4)
    batches = ImageBatches(model, records, other)
    with training.full(model, keep=True):
        taught = batches.all_taught([0, 1, 3], nothing)
        with torch.enable_grad():
            value = batches.mean([3, 1], taught, nothing, factor=2.0)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pixels = torch.stack([records[i].pixels for i in (3, 1)]).double()
    expected = kl(other(pixels).logits.detach(), model(pixels).logits.log_softmax(-1)).mean()
    (2 * expected).backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.abs().max()):
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- training


def context_of(model: nn.Module, forget: Sequence[Any] = (), retain: Sequence[Any] = (), seed: int = 0) -> EditContext:
    nowhere: Any = None
    return EditContext(nowhere, model, ModelMap.of(model), forget, retain, seed, Path())


def run(model: nn.Module, teacher: Any, lessons: Lessons, ran: Any = nothing, seed: int = 0, **options: Any) -> Any:
    p = StudentParameters(**options)
    context = context_of(model, seed=seed)
    return distil(context, teacher, lessons, selected(context.model_map, p), p, ran)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_run_equals_a_hand_written_loop(how: str) -> None:
    model, other = causal_lm("llama", dtype=torch.float64), causal_lm("llama", seed=4, dtype=torch.float64)
    frozen, forget, retain = copy.deepcopy(model), texts(5, 1), texts(7, 2)
    options = {"learning_rate": 2e-3, "epochs": 2, "batch_size": 2, "retain_batch_size": 3, "how": how, "rank": 3,
               "forget_weight": 0.7, "retain_weight": 1.3, "warm_up": 2, "roles": ["q", "down"]}  # fmt: skip
    course, changes = run(model, ModelMap.of(other), Lessons(forget, retain), seed=3, **options)
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    start = {name: p.detach().clone() for name, p in frozen.named_parameters()}
    if how == "lora":
        with training.adapters(frozen, ModelMap.of(frozen), rank=3, alpha=6, roles=["q", "down"], seed=3) as pairs:
            moving = [p.detach().clone().requires_grad_() for p in pairs]
    else:
        moving = [start[name].clone().requires_grad_() for name in names]

    def weights() -> dict[str, Tensor]:
        if how == "full":
            return start | dict(zip(names, moving, strict=True))
        return start | {name: start[name] + 2.0 * moving[2 * k + 1] @ moving[2 * k] for k, name in enumerate(names)}

    class Edited(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            return torch.func.functional_call(frozen, weights(), kwargs=inputs)

    def mean(records: Sequence[TokenRecord]) -> Tensor:
        edited = Edited()
        return torch.stack([kl(log_probs(other, r).detach(), log_probs(edited, r)).mean() for r in records]).mean()

    steps, optimiser, curve = 6, torch.optim.AdamW(moving, lr=0.0, weight_decay=0.0), []
    rows = training.batches(5, 2, steps, 3), training.batches(7, 3, steps, 4)
    for i, (mine, kept) in enumerate(zip(*rows, strict=True)):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 2, (steps - i) / (steps - 2))
        optimiser.zero_grad()
        parts = mean([forget[j] for j in mine]), mean([retain[j] for j in kept])
        (0.7 * parts[0] + 1.3 * parts[1]).backward()
        optimiser.step()
        curve.append([float(part.detach()) for part in parts])
    assert course.forget == pytest.approx([a for a, _ in curve], rel=1e-9)
    assert course.retain == pytest.approx([b for _, b in curve], rel=1e-9)
    assert (course.steps, course.stopped, course.best_epoch) == (steps, False, None)
    assert list(changes) == names
    for name, change in changes.items():
        torch.testing.assert_close(start[name] + change, weights()[name].detach(), rtol=1e-7, atol=1e-9)
        assert torch.equal(model.get_parameter(name), start[name])


def test_a_teacher_that_is_the_model_leaves_nothing_to_learn() -> None:
    """Not even to rounding: AdamW divides by the gradient's size, so that noise would move weights at the full rate."""
    model = causal_lm("gpt2", resid_pdrop=0.5).train()  # neither of them drops anything
    course, changes = run(model, ModelMap.of(model), Lessons(texts(4, 1), texts(4, 2)), steps=3, batch_size=2)
    assert max(course.forget + course.retain) < 1e-6
    assert not any(bool(change.any()) for change in changes.values())


@pytest.mark.parametrize("options", [{"steps": 0}, {"epochs": 0}, {"learning_rate": 0}])
def test_no_step_changes_nothing(options: dict[str, Any]) -> None:
    model = causal_lm("llama")
    course, changes = run(model, ModelMap.of(causal_lm("llama", 1)), Lessons(texts(2), texts(2, 2)), **options)
    assert (course.steps, changes) == (0, {})


@pytest.mark.parametrize("weights", [{"forget_weight": 0.0}, {"retain_weight": 0.0}])
def test_a_weight_of_zero_leaves_the_rows_out(weights: dict[str, float]) -> None:
    model, seen = causal_lm("llama"), list[int]()
    course, _ = run(
        model, ModelMap.of(causal_lm("llama", 1)), Lessons(texts(4, 1), texts(6, 2)), seen.append, steps=2, **weights
    )
    assert (len(course.forget), len(course.retain)) == ((0, 2) if "forget_weight" in weights else (2, 0))
    assert sum(seen) == (3 * 6 if "forget_weight" in weights else 3 * 4)


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(how: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = causal_lm("llama"), causal_lm("llama", 1)
    model.get_submodule("model.layers.1").train()  # whatever it was
    teacher.train()
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    before = [state_of(m) for m in (model, teacher)]
    options = {"how": how, "steps": 3, "batch_size": 2, "rank": 2, "patience": 9}
    lessons = Lessons(texts(4, 1), texts(4, 2), texts(2, 3), texts(2, 4))
    if fails:
        calls = iter(range(100))
        real = lossbatches.divergence

        def broken(target: Tensor, logits: Tensor) -> Tensor:
            if next(calls) == 5:
                raise RuntimeError("a failure in the middle")
            return real(target, logits)

        monkeypatch.setattr(lossbatches, "divergence", broken)
        with pytest.raises(RuntimeError, match="middle"):
            run(model, ModelMap.of(teacher), lessons, **options)
    else:
        run(model, ModelMap.of(teacher), lessons, **options)
    for one, two in zip(before, [state_of(m) for m in (model, teacher)], strict=True):
        for (name, id_, was, flag), (other, same, now, still) in zip(one[0], two[0], strict=True):
            assert (name, id_, flag) == (other, same, still)
            assert torch.equal(was.view(torch.int32), now.view(torch.int32))
        assert one[1] == two[1]
        assert torch.equal(one[2], two[2])
    assert kept.grad is not None
    assert bool((kept.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_patience_keeps_the_best_epoch_of_the_rows_held_out() -> None:
    """The rows held out go another way than those that train, so they get worse; the records decide nothing."""
    model = causal_lm("llama")
    away = Changed(ModelMap.of(model), lambda logits: (-3 * logits).log_softmax(-1))
    same = {"learning_rate": 5e-3, "batch_size": 2, "rank": 4, "decay": "constant", "how": "full"}
    forget, held = texts(4, 1), texts(3, 7)
    runs = {}
    for epochs, patience in ((1, 9), (12, 2), (12, 99)):
        lessons = Lessons(forget, texts(4, 2), held, texts(3, 8))
        runs[epochs, patience] = run(model, away, lessons, epochs=epochs, patience=patience, **same)
    course, changes = runs[12, 2]
    assert course.best_epoch is not None
    assert course.held_out[course.best_epoch] == min(course.held_out)
    if course.stopped:
        assert len(course.held_out) - 1 - course.best_epoch == 2
        assert course.steps == 2 * (len(course.held_out) - 1) < 24
    long, _ = runs[12, 99]
    assert long.held_out[: len(course.held_out)] == pytest.approx(course.held_out, rel=1e-6)
    assert len(long.held_out) == 13
    blind = run(model, away, Lessons(forget, texts(4, 2)), epochs=course.best_epoch, patience=2, **same)
    assert blind[0].held_out == []  # nothing held out: every step is made
    for name, change in changes.items():
        torch.testing.assert_close(change, blind[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"epochs": 2, "retain_batch_size": 4},
        {"epochs": 2, "patience": 50},
        {"steps": 1, "forget_weight": 0.0, "patience": 2},
    ],
)
def test_passes_are_those_that_are_run(options: dict[str, Any]) -> None:
    model, teacher = causal_lm("llama"), ModelMap.of(causal_lm("llama", 1))
    rows, seen = [0, 0], list[int]()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[-1] > 4:  # not the map's own four tokens
            rows[torch.is_grad_enabled()] += len(kwargs["input_ids"])

    for each in (model, teacher.model):
        each.get_submodule("model").register_forward_pre_hook(count, with_kwargs=True)
    held = (texts(2, 3), texts(1, 4)) if "patience" in options else ((), ())
    options = {"batch_size": 2, "rank": 2} | options
    run(model, teacher, Lessons(texts(5, 1), texts(6, 2), *held), seen.append, **options)
    planned = student.passes(StudentParameters(**options), 5, 6, *map(len, held))
    assert rows == [planned["forward"], planned["forward_backward"]]
    assert sum(seen) == sum(rows)


def test_same_seed_same_change() -> None:
    model, teacher = causal_lm("llama"), ModelMap.of(causal_lm("llama", 1))
    found = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        lessons = Lessons(texts(5, 1), texts(5, 2))
        found.append(run(model, teacher, lessons, seed=seed, steps=3, batch_size=2, rank=2)[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_images_learn_the_teacher() -> None:
    model, teacher = image_classifier("vit"), image_classifier("vit", 5)
    records: list[ImageRecord] = pictures(12)
    course, changes = run(model, teacher, Lessons(records[:6], records[6:]), steps=40, learning_rate=5e-3, batch_size=6)
    assert course.forget[-1] < course.forget[0] / 3
    assert all(bool(change.any()) for change in changes.values())


# ------------------------------------------------------------------------------------------- what the teacher writes


def test_written_texts_are_the_teachers() -> None:
    """As cold as it gets they are what `generate()` writes greedily, up to the token that ends a text."""
    model = causal_lm("llama")
    model_map, records, seen = ModelMap.of(model), [*texts(6, 1), *texts(2, 2)], list[int]()
    records[3] = TokenRecord("long", (*range(4, 40),), 30, 1, "group")
    cold = StudentParameters(temperature=1e-4)
    found = written(model, model_map, records, 2, cold, 0, seen.append)
    assert sum(seen) == len(found) == 16
    by_id = {record.record_id: record for record in records}
    for text in found:
        origin = by_id[text.record_id]
        assert text.ids[: text.n_prompt] == origin.ids[: origin.n_prompt]
        assert text.group == origin.group
        expected = greedy_tokens(model, origin.ids[: origin.n_prompt], origin.n_tokens)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert list(text.completion) == expected
    assert written(model, model_map, records, 0, cold, 0, seen.append) == []


def test_written_texts_end_where_generate_ends_them() -> None:
    model: Any = causal_lm("llama")
    records, p = texts(40, 1), StudentParameters(generated_tokens=30, temperature=2.0)
    never = written(model, ModelMap.of(model), records, 1, p, 0, nothing)
    ends = {EOS, 7, 9}
    model.generation_config.eos_token_id = sorted(ends)
    found = written(model, ModelMap.of(model), records, 1, p, 0, nothing)
    assert any(text.n_tokens < 30 for text in found)
    for text, whole in zip(found, never, strict=True):
        assert not ends & set(text.completion[:-1])
        assert text.n_tokens == 30 or text.ids[-1] in ends
        if EOS not in whole.completion:
            assert text.ids == whole.ids[: len(text.ids)]


def test_written_texts_depend_on_their_seed_alone() -> None:
    model = causal_lm("gpt2")
    model_map, records = ModelMap.of(model), texts(5, 1)
    p = StudentParameters(generated_tokens=8)
    torch.manual_seed(1)
    one = written(model, model_map, records, 2, p, 4, nothing)
    torch.manual_seed(2)
    assert one == written(model, model_map, records, 2, p, 4, nothing)
    assert one != written(model, model_map, records, 2, p, 5, nothing)
    assert len({text.completion for text in one}) > 5
    assert all(text.n_tokens == 8 or text.ids[-1] == EOS for text in one)


def test_written_texts_fit_the_models_positions() -> None:
    model = causal_lm("gpt2", n_positions=16)
    records = [TokenRecord("a", tuple(range(4, 16)), 11, 1), TokenRecord("b", tuple(range(4, 21)), 16, 1)]
    found = written(model, ModelMap.of(model), records, 1, StudentParameters(generated_tokens=40), 0, nothing)
    assert [text.record_id for text in found] == ["a"]
    assert len(found[0].ids) <= 16


def test_chosen_rows_are_distinct_and_seeded() -> None:
    assert chosen(5, 9, 0) == [0, 1, 2, 3, 4]
    assert len(set(chosen(100, 10, 0))) == 10
    assert chosen(100, 10, 0) == chosen(100, 10, 0) != chosen(100, 10, 1)


# ----------------------------------------------------------------------------------------------------------- the editor


def facts(n: int, seed: int, vocab: int = 96) -> list[TokenRecord]:
    """Random completions of random prompts, six tokens each: nothing but memory can tell them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, vocab, (n, 12), generator=generator).tolist()
    return [TokenRecord(f"{seed}-{i}", tuple(row), 6, 1) for i, row in enumerate(rows)]


class Reworded:
    """Wordings with another token in the prompt, and wrong answers at random; counts how often it is asked."""

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self._records, self.asked = records, 0

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        self.asked += 1
        return [
            TokenRecord(r.record_id, (*r.ids[:k], (r.ids[k] + 40) % 90 + 4, *r.ids[k + 1 :]), r.n_prompt, 1)
            for r in self._records
            for k in range(per_record)
        ]

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        wrong = facts(per_record * len(self._records), 1000 + seed)
        origins = [r for r in self._records for _ in range(per_record)]
        return [TokenRecord(r.record_id, (*r.ids[:6], *w.ids[6:]), 6, 1) for r, w in zip(origins, wrong, strict=True)]

    def report(self) -> dict[str, Any]:
        return {"perturbed": {"swapped": len(self._records)}}


FORGET, RETAIN = facts(8, 1), facts(24, 2)
TEACHER = {"blocks": 2, "alpha": 1.5, "rank_share": 0.2, "ratio": 0.0, "learning_rate": 5e-3, "epochs": 40,
           "batch_size": 8, "patience": None}  # fmt: skip
LITTLE = {"steps": 3, "batch_size": 4, "retain_batch_size": 4, "rank": 2, "blocks": 1}
SMALL = LITTLE | {"student": {"steps": 3, "batch_size": 4, "retain_batch_size": 4, "rank": 2}}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint that has learned all facts by heart."""
    model = causal_lm("llama", initializer_range=0.05, hidden_size=48, head_dim=12)
    train(model, [record.ids for record in FORGET + RETAIN], steps=100)
    return open_checkpoint(save(model, tokenizer(), tmp_path_factory.mktemp("planted"), shards=2))


def edit(
    checkpoint: Checkpoint,
    out: Path,
    parameters: dict[str, Any],
    forget: Sequence[Any] = FORGET,
    retain: Sequence[Any] = RETAIN,
    model: nn.Module | None = None,
    **context: Any,
) -> EditResult:
    model = checkpoint.load_model("float32") if model is None else model
    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    editor, options = make_editor("uld_distilled", parameters), {"seed": 0, "texts": None} | context
    return editor.edit(EditContext(checkpoint, model, ModelMap.of(model), forget, retain, work=work, **options), out)


def figures(model: nn.Module, records: Sequence[TokenRecord]) -> tuple[float, float]:
    """Mean probability a token, and the share that greedy decoding emits."""
    found = memorised(model, records)
    return float(found["probability"].mean()), float(found["extracted"].mean())


def unchanged(before: Checkpoint, after: Path) -> bool:
    assert before.path is not None
    names = sorted(path.name for path in before.path.iterdir())
    assert sorted(path.name for path in after.iterdir()) == names
    return all((before.path / name).read_bytes() == (after / name).read_bytes() for name in names)


def test_the_copy_answers_as_the_teacher_and_is_plain(
    planted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts_, seen = planted.load_model("float32"), Reworded(FORGET), list[tuple[int, int]]()
    model.get_submodule("model.layers.1").train()  # whatever it was
    before, config = state_of(model), copy.deepcopy(model.config.to_dict())  # type: ignore[operator]
    taught: dict[str, tuple[float, float]] = {}
    real = distilled.difference

    def difference(*args: Any) -> nn.Module:
        teacher = real(*args)
        taught["forget"], taught["retain"] = figures(teacher, FORGET), figures(teacher, RETAIN)
        return teacher

    monkeypatch.setattr(distilled, "difference", difference)
    student_ = {"how": "full", "learning_rate": 5e-3, "steps": 90, "batch_size": 32, "retain_batch_size": 40}
    result = edit(planted, tmp_path / "out", TEACHER | {"student": student_}, model=model, texts=texts_,
                  progress=lambda *at: seen.append(at))  # fmt: skip

    original, edited = planted.load_model("float32"), open_checkpoint(tmp_path / "out").load_model("float32")
    assert figures(original, FORGET)[1] == figures(original, RETAIN)[1] == 1.0
    assert taught["forget"][1] == 0.0  # else there would be nothing to reach
    p, emitted = figures(edited, FORGET)
    assert emitted == 0.0
    assert abs(p - taught["forget"][0]) < 0.1 < figures(original, FORGET)[0] - p
    kept, still = figures(edited, RETAIN)
    assert still == 1.0
    assert kept > 0.97 * figures(original, RETAIN)[0]
    curve = result.statistics["forget_divergence"]
    assert len(curve) == result.statistics["steps"] == 90
    assert curve[-1] < curve[0] / 8
    assert result.statistics["rows"] == {
        "forget": 8, "paraphrases": 16, "generated_forget": 8, "retain": 24, "perturbed": 16, "generated_retain": 8
    }  # fmt: skip
    json.dumps([result.parameters, result.statistics], allow_nan=False)

    assert planted.path is not None
    own = {path.name for path in planted.path.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own
    assert (tmp_path / "out/config.json").read_bytes() == (planted.path / "config.json").read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is type(original)
    selected_ = set(make_editor("uld_distilled", {"student": student_}).selected(ModelMap.of(original)))
    assert {delta.name for delta in result.deltas} == selected_

    after = state_of(model)  # nothing about the model itself has changed, and wordings were made once
    for (name, one, was, flag), (other, two, now, still_) in zip(before[0], after[0], strict=True):
        assert (name, one, flag) == (other, two, still_)
        assert torch.equal(was.view(torch.int32), now.view(torch.int32))
    assert before[1:2] == after[1:2]
    assert torch.equal(before[2], after[2])
    assert model.config.to_dict() == config  # type: ignore[operator]
    assert texts_.asked == 1
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    "parameters",
    [
        {"alpha": 0.0},
        {"alpha": 0.0, "outside": "never", "rank_share": 0.0, "ratio": 0.0},
        {"learning_rate": 0.0},
        {"student": {"steps": 0}},
        {"student": {"learning_rate": 0.0}},
        {"student": {"epochs": 0, "how": "full"}},
    ],
)
def test_nothing_to_learn_changes_no_byte(parameters: dict[str, Any], planted: Checkpoint, tmp_path: Path) -> None:
    result = edit(planted, tmp_path / "out", LITTLE | parameters)
    assert list(result.deltas) == []
    assert result.deltas.tensor_digest == planted.tensor_digest()
    assert unchanged(planted, tmp_path / "out")
    assert result.statistics["steps"] == result.statistics["assistant"]["steps"] == 0
    if parameters != {"learning_rate": 0.0}:
        planned = make_editor("uld_distilled", LITTLE | parameters).passes(8, 24)
        assert planned == {"forward": 0, "forward_backward": 0}


def test_a_teacher_with_an_alpha_of_zero_is_the_model(planted: Checkpoint, tmp_path: Path) -> None:
    """Through the composite: its states and its head give the model's own distribution, so the loss is 0."""
    model = planted.load_model("float32")
    context = EditContext(planted, model, ModelMap.of(model), FORGET, RETAIN, 0, tmp_path)
    p = distilled.DistilledParameters(**(SMALL | {"alpha": 0.0}))
    teacher = distilled.difference(context, distilled.train_assistant(context, p), p.rule())
    course, _ = distil(context, ModelMap.of(teacher), Lessons(FORGET, RETAIN), ["model.layers.2.mlp.up_proj.weight"],
                       StudentParameters(steps=1, how="full"), nothing)  # fmt: skip
    assert max(course.forget + course.retain) < 1e-6


@pytest.mark.parametrize("outside", ["original", "never"])
def test_the_first_loss_is_the_divergence_from_the_difference(
    outside: str, planted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rule does to tokens it does not keep: finite, and what both models' own logits say."""
    found: list[float] = []
    real = distilled.difference

    def difference(context: EditContext, *args: Any) -> nn.Module:
        teacher = real(context, *args)
        with torch.no_grad():
            for record in FORGET:
                target = teacher(input_ids=torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1]
                found.append(float(kl(target.double(), log_probs(context.model, record).double()).mean()))
        return teacher

    monkeypatch.setattr(distilled, "difference", difference)
    options = SMALL | {"alpha": 1.0, "outside": outside, "steps": 20, "learning_rate": 5e-3, "rank_share": 0.2}
    options["student"] = SMALL["student"] | {"batch_size": 8, "generated": 0}
    result = edit(planted, tmp_path / "out", options)
    first = result.statistics["forget_divergence"][0]
    assert first == pytest.approx(sum(found) / 8, rel=1e-4)
    assert first > 1e-3
    assert all(math.isfinite(x) for x in result.statistics["forget_divergence"])


def test_same_inputs_same_bytes(planted: Checkpoint, tmp_path: Path) -> None:
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        digests.append(edit(planted, tmp_path / str(i), SMALL, seed=seed, texts=Reworded(FORGET)).deltas.tensor_digest)
    assert digests[0] == digests[1] != digests[2]


def test_wordings_held_out_train_neither_and_may_end_the_student(
    planted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[Lessons] = []
    real = distilled.distil

    def spied(context: Any, teacher: Any, rows: Lessons, *rest: Any) -> Any:
        lessons.append(rows)
        return real(context, teacher, rows, *rest)

    monkeypatch.setattr(distilled, "distil", spied)
    options = SMALL | {"held_out": 0.25, "patience": 2}
    options["student"] = SMALL["student"] | {"patience": 1, "steps": None, "epochs": 2, "learning_rate": 1e-2}
    seen: list[tuple[int, int]] = []
    result = edit(planted, tmp_path / "out", options, texts=Reworded(FORGET), progress=lambda *at: seen.append(at))
    (rows,) = lessons
    held = {row.ids for row in (*rows.held_forget, *rows.held_retain)}  # type: ignore[union-attr]
    assert len(held) == 2 * 2 + 2 * 2
    assert not held & {row.ids for row in (*rows.forget, *rows.retain, *FORGET, *RETAIN)}  # type: ignore[union-attr]
    assert len(result.statistics["held_out_divergence"]) >= 2
    assert result.statistics["stopped"] == any("wordings held out" in line for line in result.warnings)
    assert seen[-1][0] <= seen[-1][1]
    options["patience"] = None
    without = edit(planted, tmp_path / "none", options, texts=Reworded(FORGET))
    assert without.statistics["held_out_divergence"] == []
    assert any("when the student is to stop" in line for line in without.warnings)


@pytest.mark.parametrize(("rate", "said"), [(1e-7, True), (3e-2, False)])
def test_a_student_that_learns_too_little_is_said(rate: float, said: bool, planted: Checkpoint, tmp_path: Path) -> None:
    options = SMALL | {"alpha": 1.5, "rank_share": 0.2, "learning_rate": 1e-2, "steps": 10}
    options["student"] = SMALL["student"] | {"learning_rate": rate, "steps": 12, "batch_size": 16}
    result = edit(planted, tmp_path / "out", options)
    assert any("of its distance to the teacher" in line for line in result.warnings) == said
    assert not any("\n" in line for line in result.warnings)


def test_an_external_assistant_can_teach(planted: Checkpoint, tmp_path: Path) -> None:
    small = save(causal_lm("llama", 7, num_hidden_layers=1), tokenizer(), tmp_path / "small")
    options = {name: value for name, value in SMALL.items() if name != "blocks"}
    options |= {"assistant": str(small), "learning_rate": 1e-2, "rank_share": 0.2, "alpha": 1.5}
    result = edit(planted, tmp_path / "out", options)
    assert result.statistics["forget_divergence"][0] > 1e-3
    assert result.deltas.tensor_digest != planted.tensor_digest()
    assert str(tmp_path) not in json.dumps(result.parameters)


def test_the_assistant_of_an_earlier_copy_teaches_as_one_trained_here(planted: Checkpoint, tmp_path: Path) -> None:
    whole = edit(planted, tmp_path / "whole", SMALL, texts=Reworded(FORGET))
    assert planted.path is not None
    teacher = {name: value for name, value in SMALL.items() if name != "student"}
    model = planted.load_model("float32")
    context = EditContext(planted, model, ModelMap.of(model), FORGET, RETAIN, 0, tmp_path, texts=Reworded(FORGET))
    make_editor("uld", teacher).edit(context, tmp_path / "uld")
    given = {"student": SMALL["student"], "assistant": str(tmp_path / "uld")}
    later = edit(planted, tmp_path / "later", given, texts=Reworded(FORGET))
    assert later.deltas.tensor_digest == whole.deltas.tensor_digest != planted.tensor_digest()
    assert later.statistics["assistant"]["taken_from"] == open_checkpoint(tmp_path / "uld").tensor_digest()
    assert later.statistics["assistant"]["decode_share"] == whole.statistics["assistant"]["decode_share"]
    editors = make_editor("uld_distilled", given), make_editor("uld_distilled", SMALL)
    assert editors[0].passes(8, 24)["forward_backward"] < editors[1].passes(8, 24)["forward_backward"]
    assert str(tmp_path) not in json.dumps(later.parameters)


def test_a_head_that_trains_teaches_as_it_was(tmp_path: Path) -> None:
    """Teacher and student share the embedding, which is the head too: the copy is still what was trained."""
    checkpoint = open_checkpoint(save(causal_lm("gpt2"), tokenizer(), tmp_path / "source"))
    options = SMALL | {"learning_rate": 1e-2}
    table = {"how": "full", "include": ["transformer.wte.weight"], "learning_rate": 1e-2}
    options["student"] = table | {"steps": 12, "batch_size": 16, "retain_batch_size": 32}
    result = edit(checkpoint, tmp_path / "out", options)
    assert [delta.name for delta in result.deltas] == ["transformer.wte.weight"]
    assert result.statistics["forget_divergence"][-1] < result.statistics["forget_divergence"][0]


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama", dtype=torch.bfloat16), None, tmp_path / "source"))
    for how in ("lora", "full"):
        options = SMALL | {"student": SMALL["student"] | {"how": how, "learning_rate": 1e-2}}
        edit(checkpoint, tmp_path / how, options, model=checkpoint.load_model("bfloat16"))
        edited = open_checkpoint(tmp_path / how)
        assert {tensor.dtype for _, tensor in edited.iter_tensors()} == {torch.bfloat16}
        assert edited.tensor_digest() != checkpoint.tensor_digest()


def test_image_classifier(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    records = pictures(12)
    mine, kept = [r for r in records if r.label == 0], [r for r in records if r.label]
    options = SMALL | {"learning_rate": 1e-2, "steps": 20}
    options["student"] = SMALL["student"] | {"steps": 30, "learning_rate": 1e-2}
    result = edit(checkpoint, tmp_path / "out", options, mine, kept)
    assert result.statistics["forget_divergence"][-1] < result.statistics["forget_divergence"][0]
    assert result.parameters["student"]["generated"] == 0
    plain = open_checkpoint(tmp_path / "out")
    assert plain.config == checkpoint.config


# ----------------------------------------------------------------------------------------------------------- bad inputs


def test_parameters_report_every_mistake_without_values() -> None:
    wrong = {"how": "secret", "rank": 0, "learning_rate": -1, "epochs": 1.5, "batch_size": True, "generated": -1,
             "generated_tokens": 0, "temperature": 0.0, "patience": 0, "decay": "secret", "max_forget_loss": 1.0,
             "forget_weight": -0.1}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        make_editor("uld_distilled", {"alpha": -1, "student": wrong})
    text = str(caught.value)
    assert "secret" not in text
    assert "13 mistakes" in text
    for word in wrong:
        assert f"student.{word}" in text or word == "max_forget_loss"
    for student_, match in (
        ({"forget_weight": 0.0, "retain_weight": 0.0}, "found neither"),
        ({"include": ["*"], "blocks": [1]}, "found both"),
        ({"generated": True}, "or auto"),
        (3, "expected a mapping"),
    ):
        with pytest.raises(UsageError, match=match):
            make_editor("uld_distilled", {"student": student_})


def test_the_preset_lists_every_parameter_with_its_default() -> None:
    editor: Any = make_editor("uld_distilled", {})
    assert load_method("uld_distilled").parameters == editor.parameters.model_dump(mode="json")
    assert load_method("uld_distilled").parameters.items() >= load_method("uld").parameters.items()
    assert (editor.needs_forget, editor.needs_retain, editor.inference_time) == (True, True, False)
    partly: Any = make_editor("uld_distilled", load_method("uld_distilled").parameters | {"student": {"steps": 7}})
    assert partly.parameters.student == StudentParameters(steps=7)


@pytest.mark.parametrize(
    ("parameters", "mine", "kept", "match"),
    [
        ({}, 0, 2, "records to forget for uld_distilled"),
        ({}, 2, 0, "retain records for uld_distilled"),
        ({"blocks": 9}, 2, 2, "`blocks`"),
        ({"paraphrases": 1}, 2, 2, "paraphrases"),
        ({"student": {"blocks": [9]}}, 2, 2, "found 9"),
        ({"student": {"include": ["*.c_fc.weight"]}}, 2, 2, "matches none"),
    ],
)
def test_what_cannot_be_done_is_said(
    parameters: dict[str, Any], mine: int, kept: int, match: str, planted: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        edit(planted, tmp_path / "out", SMALL | parameters, FORGET[:mine], RETAIN[:kept])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_images_have_no_texts_to_write(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    records = pictures(4)
    for i, options in enumerate(({"student": {"generated": 1}}, {"paraphrases": 2})):
        with pytest.raises(UsageError, match="found images"):
            edit(checkpoint, tmp_path / str(i), SMALL | options, records[:2], records[2:])


@pytest.mark.parametrize("arch", ["swin", "resnet"])
def test_a_network_in_stages_has_no_assistant(arch: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier(arch), None, tmp_path / "source"))
    with pytest.raises(UnsupportedError, match="network in stages"):
        edit(checkpoint, tmp_path / "out", SMALL, pictures(2), pictures(2))


def test_a_difference_is_not_distilled_again(planted: Checkpoint, tmp_path: Path) -> None:
    model = planted.load_model("float32")
    context = EditContext(planted, model, ModelMap.of(model), FORGET, RETAIN, 0, tmp_path)
    p = distilled.DistilledParameters(**SMALL)
    teacher = distilled.difference(context, distilled.train_assistant(context, p), p.rule())
    with pytest.raises(UnsupportedError, match="look into the model it was made from"):
        edit(planted, tmp_path / "out", SMALL, model=teacher)


def test_too_little_memory_is_said(planted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("can't allocate memory")

    for part in ("written", "distil"):
        with monkeypatch.context() as patch:
            patch.setattr(distilled, part, full)
            with pytest.raises(ResourceError, match="lower its batch_size"):
                edit(planted, tmp_path / part, SMALL)


def test_no_record_shows_in_a_repr() -> None:
    assert repr(Lessons(FORGET, RETAIN)) == "Lessons(8, 24, 0, 0)"


# ----------------------------------------------------------------------------------------------------------- end to end


def test_forget_end_to_end(world: World, tmp_path: Path) -> None:
    """A request names the method; the copy is audited as any edit is, and the run verifies."""
    overrides = (
        "{alpha: 1.5, rank_share: 0.2, learning_rate: 0.005, epochs: 6, student: {learning_rate: 0.005, epochs: 3}}"
    )
    request = world.folder / "uld_distilled.yaml"
    request.write_text(
        world.request.read_text().replace("{name: ssd}", f"{{name: uld_distilled, overrides: {overrides}}}")
    )
    result = forget(request, out=tmp_path / "run")
    assert passed(verify(result.path))
    arms = json.loads((result.path / "compare/paired.json").read_text())["arms"]["probability"]
    assert arms["U"]["value"] < arms["O"]["value"]
    plan = json.loads((result.path / "edit/plan.json").read_text())
    assert plan["method"]["name"] == "uld_distilled"
    assert plan["method"]["inference_time"] is False
    assert plan["method"]["parameters"]["student"]["steps"] >= 1
    delta = json.loads((result.path / "edit/delta.json").read_text())
    assert 0 < delta["changed_elements"] < delta["total_elements"]
    assert delta["statistics"]["rows"]["paraphrases"] > 0
