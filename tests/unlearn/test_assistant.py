"""The assistant of ULD: its training against a hand-written loop, its rows, its stopping, what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from probes import training
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.tiny import IMAGE, causal_lm, image_classifier, save, tokenizer
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint
from unlearn.editors import assistant
from unlearn.editors.assistant import (
    AssistantParameters,
    Rows,
    TrainedAssistant,
    block_list,
    gather,
    losses_of,
    train_assistant,
)
from unlearn.editors.base import EditContext, Rewording


def texts(n: int, seed: int = 0, vocab: int = 96, groups: int | None = None) -> list[TokenRecord]:
    """Records of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenRecord(
            f"r{seed}-{i}",
            tuple(torch.randint(4, vocab, (5 + i % 4,), generator=generator).tolist()),
            2,
            1,
            None if groups is None else f"g{i % groups}",
        )
        for i in range(n)
    ]


def pictures(n: int, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [ImageRecord(f"i{i}", torch.randn(3, IMAGE, IMAGE, generator=generator), i % 4) for i in range(n)]


class Wordings:
    """Other wordings of some records: other prompts, other completions."""

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self.records, self.asked = records, list[tuple[Any, ...]]()

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        self.asked.append((per_record, how, seed))
        return [
            TokenRecord(r.record_id, (90 - k, *r.ids[1:]), 2, 1, r.group)
            for r in self.records
            for k in range(per_record)
        ]

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        self.asked.append((per_record, seed))
        return [
            TokenRecord(r.record_id, (*r.ids[:-1], 90 - k), 2, 1, r.group)
            for r in self.records
            for k in range(per_record)
        ]

    def report(self) -> dict[str, Any]:
        return {"perturbed": {"swapped": len(self.records)}}


def context(
    model: nn.Module,
    forget: Sequence[Any],
    retain: Sequence[Any],
    *,
    source: Checkpoint | None = None,
    seed: int = 0,
    wordings: Wordings | None = None,
    **options: Any,
) -> EditContext:
    source = LiveCheckpoint(model) if source is None else source
    work = Path()
    return EditContext(source, model, ModelMap.of(model), forget, retain, seed, work, wordings, **options)


def parameters(**given: Any) -> AssistantParameters:
    return AssistantParameters(**({"rank": 3, "batch_size": 2, "retain_batch_size": 3, "patience": None} | given))


# --------------------------------------------------------------------------------------- against a hand-written loop


def plain(model: Any, blocks: int) -> nn.Module:
    """The first blocks of a model as a model of their own, made by transformers from a shorter configuration."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    made: nn.Module = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    made.load_state_dict(model.state_dict(), strict=False)
    return made.requires_grad_(False)


def log_probs(model: nn.Module, record: TokenRecord) -> Tensor:
    """[n, V] at the positions that predict the completion, without padding or mask."""
    logits = model(input_ids=torch.tensor([record.ids])).logits[0]
    return logits[record.n_prompt - 1 : -1].log_softmax(-1)


def objective(model: nn.Module, forget: Sequence[TokenRecord], retain: Sequence[TokenRecord], weight: float) -> Tensor:
    """As it is written in the paper."""
    own = torch.cat([log_probs(model, r).gather(-1, torch.tensor(r.completion)[:, None])[:, 0] for r in forget])
    every = torch.cat([log_probs(model, r) for r in retain])  # [N, V]
    uniform = torch.full_like(every, 1 / every.shape[-1])
    return -own.mean() + weight * -(uniform * every).sum(-1).mean()


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"blocks": 2, "first_block": 1}),  # the blocks below the adapters stay the model's
        ("gpt2", {"blocks": 1}),  # transposed weights, tied head, positions before the blocks
        ("gemma2", {"blocks": 1, "roles": ["q", "down"]}),  # soft-capped logits, a type for each layer
    ],
)
def test_training_equals_a_hand_written_loop(arch: str, options: dict[str, Any]) -> None:
    model = causal_lm(arch, dtype=torch.float64)
    forget, retain, steps = texts(5, 1), texts(4, 2), 5
    p = parameters(
        **options, steps=steps, learning_rate=2e-3, weight_decay=0.1, warm_up_share=0.4, adapter_scale=1.5,
        retain_weight=0.7, perturbed=1,
    )  # fmt: skip
    found = train_assistant(context(model, forget, retain, seed=3, wordings=Wordings(forget)), p)

    small = plain(model, p.blocks)  # type: ignore[arg-type]
    rows = gather(context(model, forget, retain, seed=3, wordings=Wordings(forget)), p)
    halves: dict[str, list[Tensor]] = {}
    with training.adapters(
        small, ModelMap.of(small), rank=3, alpha=4.5, roles=None if p.roles == "auto" else p.roles,
        first_block=p.first_block, seed=3,
    ):  # fmt: skip
        for path, module in small.named_modules():
            if hasattr(module, "lora_A"):
                pair = module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[index]
                halves[path] = [half.detach().clone().requires_grad_() for half in pair]
    assert {f"assistant.{path}.lora_{x}" for path in halves for x in "AB"} == set(found.tensors)
    start = {name: tensor.detach() for name, tensor in small.named_parameters()}
    transposed = arch == "gpt2"

    class Assistant(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            weights = dict(start)
            for path, (down, up) in halves.items():
                delta = 1.5 * (up @ down)
                weights[f"{path}.weight"] = start[f"{path}.weight"] + (delta.T if transposed else delta)
            return torch.func.functional_call(small, weights, kwargs=inputs)

    trained = [half for pair in halves.values() for half in pair]
    optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.1)
    mine, kept = training.batches(15, 2, steps, 3), rows.retain_batches(3, steps, 4)
    assert rows.paraphrases == 10
    curve = []
    for i, batch in enumerate(mine):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 2, (steps - i) / (steps - 2))
        optimiser.zero_grad()
        chosen = [rows.forget[j] for j in batch], [rows.retain[j] for j in kept[i]]
        loss = objective(Assistant(), *chosen, 0.7)  # type: ignore[arg-type]
        loss.backward()
        optimiser.step()
        curve.append(float(loss.detach()))
    statistics = found.statistics
    total = [
        a + 0.7 * (b + math.log(96))
        for a, b in zip(statistics["forget_loss"], statistics["retain_divergence"], strict=True)
    ]
    assert total == pytest.approx(curve, rel=1e-5 if arch == "gemma2" else 1e-9)  # its norms compute in fp32
    for path, pair in halves.items():
        for x, half in zip("AB", pair, strict=True):
            tensor = found.tensors[f"assistant.{path}.lora_{x}"]
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(
                tensor, half.detach().float(), rtol=1e-3 if arch == "gemma2" else 1e-5, atol=1e-7
            )
    assert found.steps == steps
    json.dumps([found.part, found.parameters, found.statistics], allow_nan=False)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_frozen_blocks_run_once_a_row(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of them changes nothing, and is not kept where there is no room for it."""
    model = causal_lm(arch, dtype=torch.float64)
    forget, retain = texts(5, 1), texts(4, 2)
    p = parameters(blocks=2, first_block=1, steps=6, learning_rate=2e-3, batch_size=3, patience=2)
    ran: list[int] = []
    first = model.get_submodule(ModelMap.of(model).blocks[0].name)
    first.register_forward_hook(lambda _m, _x, y: ran.append(len(y if isinstance(y, Tensor) else y[0])))

    def run() -> tuple[Any, int]:
        mine = context(model, forget, retain, seed=3, wordings=Wordings(forget))
        ran.clear()
        train_assistant(mine, p.model_copy(update={"steps": 0}))
        mapping = sum(ran)  # the passes that a model map takes
        return train_assistant(mine, p), sum(ran) - 2 * mapping

    short, once = run()
    rows = short.statistics["rows"]
    held = rows["paraphrases_held_out"] + rows["perturbed_held_out"]
    assert held
    assert once == sum(rows.values())
    monkeypatch.setattr(assistant, "STATES_KEPT", 1)
    whole, often = run()
    assert often > once
    for name in ("forget_loss", "retain_divergence", "held_out_forget_loss", "held_out_retain_divergence"):
        assert short.statistics[name] == pytest.approx(whole.statistics[name], rel=1e-5 if arch == "gemma2" else 1e-9)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(short.tensors[name], tensor, rtol=1e-3 if arch == "gemma2" else 1e-5, atol=1e-7)


def test_images_have_the_same_losses_on_labels() -> None:
    model = image_classifier("vit", dtype=torch.float64)
    forget, retain = pictures(3, 1), pictures(5, 2)
    found = train_assistant(context(model, forget, retain), parameters(steps=1, blocks=2, batch_size=3))
    seen = []
    model.vit.layers[1].register_forward_hook(lambda _m, _x, y: seen.append(y))  # type: ignore[union-attr]

    def logits(record: ImageRecord) -> Tensor:
        model(record.pixels[None].double())
        hidden = model.vit.layernorm(seen[-1])  # type: ignore[union-attr, operator]
        return model.classifier(hidden[0, 0]).log_softmax(-1)  # type: ignore[operator, no-any-return]

    with torch.no_grad():
        own = torch.stack([-logits(r)[r.label] for r in forget]).mean()
        rows = gather(context(model, forget, retain), parameters()).retain_batches(3, 1, 1)[0]
        away = torch.stack([-logits(retain[i]).mean() for i in rows]).mean() - math.log(4)
    assert found.statistics["forget_loss"] == pytest.approx([float(own)], rel=1e-9)
    assert found.statistics["retain_divergence"] == pytest.approx([float(away)], rel=1e-9)
    assert found.part == {"kind": "blocks", "path": "vit.layers", "first": 0, "last": 2, "scale": 1.0}
    assert found.parameters["paraphrases"] == found.parameters["perturbed"] == 0
    longer = parameters(steps=20, blocks=2, batch_size=3, learning_rate=0.01, retain_weight=0.1)
    curve = train_assistant(context(model, forget, retain), longer).statistics["forget_loss"]
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("to_uniform", [False, True])
def test_parts_of_a_batch_add_up(to_uniform: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch larger than the memory for tokens gives the same loss and gradients, piece by piece."""
    model, records = causal_lm("llama", dtype=torch.float64), texts(5, 1)
    model_map = ModelMap.of(model)

    def run() -> tuple[float, list[Tensor]]:
        with training.full(model, ["model.layers.0.mlp.up_proj.weight"]) as trained:
            value = losses_of(model_map, records).mean([0, 3, 4], to_uniform=to_uniform, factor=2.0)
            return value, [p.grad.clone() for p in trained if p.grad is not None]

    whole = run()
    monkeypatch.setattr(assistant, "default_batch_tokens", lambda device: 1)
    parts = losses_of(model_map, records).parts([0, 3, 4])
    assert sorted(parts) == [[0], [3], [4]]
    apart = run()
    assert apart[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(apart[1], whole[1], rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        expected = objective(model, [records[i] for i in (0, 3, 4)], [records[i] for i in (0, 3, 4)], 0.0)
    if not to_uniform:
        assert whole[0] == pytest.approx(float(expected), rel=1e-12)


def test_prompts_and_padding_do_not_count() -> None:
    """The released code averages the uniform loss over every position."""
    model = causal_lm("llama", dtype=torch.float64)
    model_map = ModelMap.of(model)
    short, long = TokenRecord("a", (5, 6, 7), 2, 1), TokenRecord("b", tuple(range(4, 40)), 30, 1)
    with torch.no_grad():
        each = torch.cat([-log_probs(model, r).mean(-1) for r in (short, long)])  # [1 + 6]
        every = -model(input_ids=torch.tensor([long.ids])).logits[0].log_softmax(-1).mean(-1)
    found = losses_of(model_map, [short, long]).mean([0, 1], to_uniform=True, factor=None)
    assert found == pytest.approx(float(each.mean()), rel=1e-12)
    assert abs(found - float(every.mean())) > 1e-3


# ------------------------------------------------------------------------------------------------------------ its rows


def rows(records: int, wordings: int, turn: int) -> Rows:
    retain = [*texts(records, 2), *texts(wordings, 3)]
    return Rows(list(texts(turn, 1)), list(retain), 0, wordings, turn, [], [])


@pytest.mark.parametrize(("records", "wordings", "turn"), [(7, 5, 5), (3, 40, 20), (101, 2, 3), (1, 0, 1), (12, 0, 5)])
def test_nothing_is_dropped_however_unequal_the_sides(records: int, wordings: int, turn: int) -> None:
    """The released code rounds the ratio of the sides: at 1.4 it drops 29 % of the longer one."""
    turn, size = min(turn, records), 4
    rounds = math.ceil(records / turn)
    steps = math.ceil(rounds * (turn + wordings) / size)
    found = rows(records, wordings, turn).retain_batches(size, steps, 0)
    assert [len(batch) for batch in found] == [size] * steps
    flat = [row for batch in found for row in batch]
    assert set(flat) == set(range(records + wordings))
    for start in range(0, len(flat) - turn - wordings + 1, turn + wordings):  # a round
        seen = Counter(flat[start : start + turn + wordings])
        assert all(seen[row] == 1 for row in range(records, records + wordings))
        assert sum(count for row, count in seen.items() if row < records) == turn
    counts = Counter(row for row in flat if row < records)
    assert max(counts.values()) - min(counts[row] for row in range(records)) <= 2


def test_every_forget_row_comes_once_an_epoch() -> None:
    forget = texts(5, 1)
    model = causal_lm("llama", num_hidden_layers=1)
    seen: list[list[int]] = []

    class Spy(assistant.TextLosses):
        def mean(self, rows: Sequence[int], *, to_uniform: bool, factor: float | None) -> float:
            if not to_uniform:
                seen.append(list(rows))
            return super().mean(rows, to_uniform=to_uniform, factor=factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "TextLosses", Spy)
        found = train_assistant(
            context(model, forget, texts(40, 2), wordings=Wordings(forget)), parameters(epochs=2, batch_size=4)
        )
    flat = [row for batch in seen for row in batch]
    assert Counter(flat) == dict.fromkeys(range(15), 2)
    assert sorted(flat[:15]) == list(range(15))
    assert found.steps == 2 * 4
    assert found.statistics["rows"]["paraphrases"] == found.statistics["rows"]["perturbed"] == 10
    assert "32 of 50 retain rows were never seen in 8 steps" in found.warnings[0]


def test_wordings_are_asked_for_and_wordings_of_a_record_as_it_stands_are_left_out() -> None:
    forget = texts(4, 1)
    model = causal_lm("llama", num_hidden_layers=1)
    wordings = Wordings(forget)
    found = gather(context(model, forget, texts(3, 2), seed=5, wordings=wordings), parameters())
    assert wordings.asked == [(2, "rules", 5), (2, 5)]
    assert (found.paraphrases, found.perturbed, len(found.forget), len(found.retain)) == (8, 8, 12, 11)
    forget[1] = TokenRecord("r1-1", (90, *forget[1].ids[1:]), 2, 1)  # its first wording is itself
    forget[2] = TokenRecord("r1-2", (*forget[2].ids[:-1], 89), 2, 1)  # the second wrong answer is its own
    found = gather(
        context(model, forget, texts(3, 2), wordings=Wordings(forget)), parameters(paraphrase_source="model")
    )
    assert (found.paraphrases, found.perturbed) == (7, 7)
    assert not {r.ids for r in found.retain} & {r.ids for r in forget}  # type: ignore[union-attr]
    for given, asked in (
        ({"paraphrases": 0}, [(2, 0)]),
        ({"paraphrase_source": "none", "perturbed": 3}, [(3, 0)]),
        ({"perturbed": 0, "paraphrase_file": "a.jsonl", "paraphrases": 1}, [(1, "supplied", 0)]),
    ):
        wordings = Wordings(forget)
        gather(context(model, forget, texts(3, 2), wordings=wordings), parameters(**given))
        assert wordings.asked == asked


def test_only_wordings_are_held_out_and_by_groups() -> None:
    """Records are scored; what they are like must not decide when to stop."""
    forget, retain = texts(12, 1, groups=6), texts(9, 2)
    model = causal_lm("llama", num_hidden_layers=1)
    p = parameters(patience=2, held_out=0.4)
    found = gather(context(model, forget, retain, wordings=Wordings(forget)), p)
    groups = {r.record_id: r.group for r in forget}
    held = {groups[r.record_id] for r in found.held_forget}
    assert len(held) == 2
    assert held == {groups[r.record_id] for r in found.held_retain}
    assert len(found.held_forget) == len(found.held_retain) == 2 * 2 * 2
    assert found.forget[:12] == forget
    assert found.retain[:9] == retain
    assert not held & {groups[r.record_id] for r in (*found.forget[12:], *found.retain[9:])}
    scored = {r.ids for r in (*forget, *retain)}
    assert not scored & {r.ids for r in (*found.held_forget, *found.held_retain)}
    again = gather(context(model, forget, retain, wordings=Wordings(forget)), p)
    assert again == found
    assert gather(context(model, forget, retain, seed=1, wordings=Wordings(forget)), p) != found
    for given in ({"patience": None}, {"paraphrases": 0}, {"perturbed": 0}):  # without both kinds nothing is held out
        none = gather(context(model, forget, retain, wordings=Wordings(forget)), p.model_copy(update=given))
        assert not none.held_forget
        assert not none.held_retain
    one = texts(4, 1, groups=1)
    assert not gather(context(model, one, retain, wordings=Wordings(one)), p).held_forget


def order() -> str:
    """Which rows train, in which order, as text."""
    forget = texts(9, 1, groups=5)
    given: Any = None  # neither the model nor its map is read for this
    everything = EditContext(given, given, given, forget, texts(7, 2), 0, Path(), Wordings(forget))
    found = gather(everything, parameters(patience=1))
    ids = [[row.ids for row in part] for part in (found.forget, found.retain, found.held_forget, found.held_retain)]  # type: ignore[union-attr]
    return json.dumps([ids, found.retain_batches(4, 9, 0), list(training.batches(len(found.forget), 4, 5, 0))])


def test_the_order_does_not_depend_on_the_hash_seed() -> None:
    """The released code draws wordings from a set of strings."""
    elsewhere = subprocess.run(
        [sys.executable, "-c", "from tests.unlearn.test_assistant import order; print(order())"],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).resolve().parent.parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert elsewhere.stdout.strip() == order()
    assert len(order()) > 500


# ------------------------------------------------------------------------------------------------------------- stopping


def test_the_best_epoch_on_wordings_held_out_is_kept() -> None:
    forget, retain = texts(6, 1), texts(6, 2)
    model = causal_lm("llama", num_hidden_layers=2)
    given = {"patience": 2, "learning_rate": 0.05, "decay": "constant", "warm_up_share": 0.0, "held_out": 0.3,
             "batch_size": 4, "epochs": 30}  # fmt: skip

    def run(**extra: Any) -> TrainedAssistant:
        return train_assistant(context(model, forget, retain, wordings=Wordings(forget)), parameters(**(given | extra)))

    found = run()
    s = found.statistics
    sums = [a + 6.5 * b for a, b in zip(s["held_out_forget_loss"], s["held_out_retain_divergence"], strict=True)]
    best = s["best_epoch"]
    assert s["stopped"]
    assert best == 1 + min(range(len(sums)), key=sums.__getitem__)
    assert len(sums) == best + 2 < 30
    epoch = math.ceil((6 + s["rows"]["paraphrases"]) / 4)
    assert found.steps == epoch * len(sums)
    until = run(steps=epoch * best, patience=50)
    assert until.statistics["best_epoch"] == best
    assert all(torch.equal(found.tensors[name], until.tensors[name]) for name in found.tensors)
    last = run(steps=epoch * (best + 2), patience=50, held_out=0.3)
    assert last.statistics["best_epoch"] == best  # run to the end, the best is kept all the same
    assert all(torch.equal(found.tensors[name], last.tensors[name]) for name in found.tensors)
    without = train_assistant(context(model, forget, retain), parameters(patience=1, epochs=2))
    assert without.statistics["best_epoch"] is None
    assert without.steps == without.statistics["planned_steps"] == 6
    assert any("every epoch was run" in warning for warning in without.warnings)


# --------------------------------------------------------------------------------------------- the model stays as it is


def state_of(model: nn.Module) -> Any:
    return (
        [(name, id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
        model.config.to_dict(),  # type: ignore[union-attr, operator]
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "vit"])
def test_the_model_is_left_as_it_was(arch: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = image_classifier(arch) if arch == "vit" else causal_lm(arch)
    sides = (pictures(4, 1), pictures(4, 2)) if arch == "vit" else (texts(4, 1), texts(4, 2))
    given = context(model, *sides)
    next(model.children()).train()  # whatever it was
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    list(model.parameters())[3].requires_grad_(False)
    before, calls = state_of(model), [0]
    real = assistant.Losses.mean

    def broken(self: Any, rows: Any, **options: Any) -> float:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("a failure in the middle")
        return real(self, rows, **options)

    if fails:
        monkeypatch.setattr(assistant.Losses, "mean", broken)
        with pytest.raises(RuntimeError, match="middle"):
            train_assistant(given, parameters(steps=4))
    else:
        train_assistant(given, parameters(steps=4))
    after = state_of(model)
    for (name, one, was, flag), (other, two, now, still) in zip(before[0], after[0], strict=True):
        assert (name, one, flag) == (other, two, still)
        assert torch.equal(was.view(torch.int32), now.view(torch.int32))
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert kept.grad is not None
    assert bool((kept.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_same_inputs_same_bytes() -> None:
    model = causal_lm("llama")
    found = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        found.append(train_assistant(context(model, texts(5, 1), texts(6, 2), seed=seed), parameters(steps=3)))
    assert found[0].statistics == found[1].statistics
    same = [all(torch.equal(found[0].tensors[n], other.tensors[n]) for n in found[0].tensors) for other in found[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"epochs": 0}, {"learning_rate": 0.0}])
def test_without_a_step_nothing_is_added(nothing: dict[str, Any]) -> None:
    found = train_assistant(context(causal_lm("llama"), texts(3, 1), texts(4, 2)), parameters(**nothing))
    assert found.steps == 0
    assert not any(bool(tensor.any()) for name, tensor in found.tensors.items() if name.endswith("lora_B"))
    assert found.statistics["forget_loss"] == []


def test_adapters_of_a_half_precision_model_are_single() -> None:
    model = causal_lm("llama", dtype=torch.bfloat16)
    found = train_assistant(context(model, texts(3, 1), texts(4, 2)), parameters(steps=2))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert any(bool(tensor.any()) for name, tensor in found.tensors.items() if name.endswith("lora_B"))


def test_costs_are_shares_of_the_blocks() -> None:
    model = causal_lm("llama", num_hidden_layers=8)
    found = train_assistant(context(model, texts(2, 1), texts(2, 2)), parameters(steps=0))
    assert found.parameters["blocks"] == found.statistics["blocks"] == 2
    later = train_assistant(context(model, texts(2, 1), texts(2, 2)), parameters(steps=0, blocks=4, first_block=3))
    assert (found.statistics["training_share"], found.statistics["decode_share"]) == (0.25, 0.25)
    assert (later.statistics["training_share"], later.statistics["decode_share"]) == (0.5, 0.125)
    assert {name.split(".")[3] for name in later.tensors} == {"3"}
    assert later.statistics["added_elements"] == later.statistics["trained_elements"]


# ------------------------------------------------------------------------------------------------- external assistants


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somebody") / "other"
    return save(causal_lm("gpt2", seed=9, n_positions=64), tokenizer(), folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path_factory.mktemp("llama")))


def test_an_external_assistant_is_trained_and_stored_whole(other: Path, source: Checkpoint) -> None:
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    p = parameters(steps=6, assistant=str(other), learning_rate=5e-3)
    found = train_assistant(context(source.load_model(), texts(4, 1), texts(4, 2), source=source), p)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    theirs = open_checkpoint(other).load_model()
    own = theirs.state_dict()
    assert set(found.tensors) == {f"assistant.{name}" for name in own}
    changed = {n for n, t in own.items() if not torch.equal(t, found.tensors[f"assistant.{n}"])}
    assert changed == {q.parameter for q in ModelMap.of(theirs).projections()}
    theirs.load_state_dict({name: found.tensors[f"assistant.{name}"] for name in own})
    more = train_assistant(
        context(source.load_model(), texts(4, 1), texts(4, 2), source=source),
        p.model_copy(update={"steps": 7, "decay": "constant"}),
    )
    assert more.statistics["forget_loss"][0] == found.statistics["forget_loss"][0]
    assert found.part["kind"] == "external"
    assert found.part["config"]["model_type"] == "gpt2"
    assert not any(str(other.parent) in str(value) for value in (found.part, found.parameters, found.statistics))
    assert found.parameters["assistant"] == "other"
    assert found.statistics["external_digest"] == open_checkpoint(other).tensor_digest()
    assert any("reads 64 tokens and the model 128" in warning for warning in found.warnings)


def test_an_external_assistant_that_does_not_fit(other: Path, source: Checkpoint, tmp_path: Path) -> None:
    larger = save(causal_lm("gpt2", vocab=100), None, tmp_path / "larger")
    foreign = save(causal_lm("gpt2"), tokenizer(bos=True), tmp_path / "foreign")
    picture = save(image_classifier("vit"), None, tmp_path / "picture")

    def run(path: Path, model: nn.Module | None = None, **given: Any) -> None:
        sides = (texts(2, 1), texts(2, 2)) if model is None else (pictures(2), pictures(2))
        model = source.load_model() if model is None else model
        train_assistant(context(model, *sides, source=source), parameters(assistant=str(path), **given))

    for path, match in (
        (larger, "vocabulary of 96, found 100"),
        (foreign, "the model's tokenizer, found another"),
        (picture, "found an image classifier"),
        (tmp_path / "nothing", "found nothing there"),
    ):
        with pytest.raises(UsageError, match=match):
            run(path)
    with pytest.raises(UsageError, match="below the assistant's 3 blocks, found 3"):
        run(other, first_block=3)
    with pytest.raises(UsageError, match="no `assistant` for an image classifier"):
        run(other, image_classifier("vit"))


# ----------------------------------------------------------------------------------------------------------- bad inputs


def test_parameters_that_contradict_each_other() -> None:
    for wrong, match in (
        ({"blocks": 2, "first_block": 2}, "first_block` below"),
        ({"blocks": 2, "assistant": "x"}, "found both"),
        ({"paraphrase_file": "x", "paraphrase_source": "rules"}, "another source"),
        ({"blocks": True}, "whole number from 1"),
        ({"paraphrases": -1}, "whole number from 0"),
        ({"roles": []}, "list of roles"),
    ):
        with pytest.raises(ValueError, match=match):
            AssistantParameters(**wrong)


@pytest.mark.parametrize(
    ("forget", "retain", "given", "error", "match"),
    [
        (0, 2, {}, UsageError, "records to forget for an assistant"),
        (2, 0, {}, UsageError, "retain records for an assistant"),
        (2, 2, {"blocks": 4}, UsageError, "at most 3 `blocks`.* found 4"),
        (2, 2, {"first_block": 1}, UsageError, "below the assistant's 1 blocks, found 1"),
        (2, 2, {"roles": ["gate_up"]}, UsageError, "among down, gate, k, o, q, up, v, found gate_up"),
        (2, 2, {"perturbed": 1, "paraphrase_source": "model"}, UsageError, "paraphrase_source, perturbed, found token"),
        (2, 2, {"learning_rate": 1e18, "steps": 4}, UsageError, "lower the learning rate"),
    ],
)
def test_what_cannot_be_trained(
    forget: int, retain: int, given: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train_assistant(context(causal_lm("llama"), texts(forget, 1), texts(retain, 2)), parameters(**given))


def test_records_of_another_model() -> None:
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        train_assistant(context(causal_lm("llama"), [TokenRecord("x", (1, 2, 96), 1, 1)], texts(2)), parameters())
    wrong = [ImageRecord("x", torch.zeros(3, IMAGE, IMAGE), 4)]
    with pytest.raises(UnsupportedError, match="below 4 classes"):
        train_assistant(context(image_classifier("vit"), wrong, pictures(2)), parameters())


def test_text_options_for_images() -> None:
    model = image_classifier("dinov2")
    for given, match in (
        ({"paraphrases": 2}, "for paraphrases, found images"),
        ({"perturbed": 1, "paraphrase_file": "x"}, "for paraphrase_file, perturbed, found images"),
        ({"paraphrase_source": "rules"}, "for paraphrase_source, found images"),
    ):
        with pytest.raises(UsageError, match=match):
            train_assistant(context(model, pictures(2), pictures(2)), parameters(**given))
    found = train_assistant(context(model, pictures(2), pictures(2)), parameters(steps=1, paraphrases=0))
    assert found.parameters["paraphrase_source"] == "none"


def test_networks_in_stages_and_stacked_experts() -> None:
    for arch in ("swin", "resnet"):
        model = image_classifier(arch)
        with pytest.raises(UnsupportedError, match="blocks are one list, found"):
            train_assistant(context(model, pictures(2), pictures(2)), parameters())
    experts = causal_lm("mixtral")
    with pytest.raises(UnsupportedError, match=r"stacked experts; set `roles` to others, such as k, o, q, v"):
        train_assistant(context(experts, texts(2, 1), texts(2, 2)), parameters())
    assert train_assistant(context(experts, texts(2, 1), texts(2, 2)), parameters(roles=["q", "v"], steps=1)).steps == 1
    assert block_list(ModelMap.of(experts)) == "model.layers"


def test_an_assistant_that_knows_nothing_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking away what knows nothing takes nothing away; told from the training's own losses."""
    model = causal_lm("llama")
    short = train_assistant(context(model, texts(2, 1), texts(2, 2)), parameters(steps=1))
    assert any("does not know the records: its loss on them ended at" in line for line in short.warnings)
    loss = short.statistics["forget_loss"][-1]
    for known, said in ((loss - 0.01, True), (loss + 0.01, False)):
        monkeypatch.setattr("unlearn.editors.assistant.KNOWN", known)
        again = train_assistant(context(model, texts(2, 1), texts(2, 2)), parameters(steps=1))
        assert any("does not know" in line for line in again.warnings) == said


def test_a_recurrent_model_is_refused_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its difference could not be opened: its state is no cache of keys and values."""
    model = causal_lm("llama")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(UnsupportedError, match="found LlamaForCausalLM, a recurrent one; use another method"):
        train_assistant(context(model, texts(2, 1), texts(2, 2)), parameters())


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(assistant.TextLosses, "part", full)
    forget = texts(4, 1)
    with pytest.raises(ResourceError, match="smaller batches"):
        train_assistant(context(causal_lm("llama"), forget, texts(2, 2)), parameters())
    monkeypatch.undo()
    monkeypatch.setattr(assistant._Watch, "look", full)
    with pytest.raises(ResourceError, match="lower batch_size"):
        train_assistant(
            context(causal_lm("llama"), forget, texts(2, 2), wordings=Wordings(forget)), parameters(patience=1)
        )
