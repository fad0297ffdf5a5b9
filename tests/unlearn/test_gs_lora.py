"""GS-LoRA: gradients against plain autograd, a run against a hand-written loop, identities, zero groups, forgetting."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import gs_lora_shots
from benchmarks.gs_lora import harmonic
from probes import statistics, training
from probes.classify import score_images
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests.conftest import World
from tests.tiny import IMAGE, causal_lm, image_classifier, save, seeded, tokenizer, train
from tests.unlearn.ledger_world import Requests
from unlearn import forget
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors import gs_lora, gs_lora_training, lossbatches
from unlearn.editors.base import EditContext, EditResult, make_editor, planned_passes
from unlearn.editors.groupsparse import Group, groups_of
from unlearn.editors.gs_lora import GSLoRAEditor, GSLoRAParameters
from unlearn.editors.gs_lora_training import Side, Trainer
from unlearn.editors.linearmaps import mean_loss
from unlearn.editors.lossbatches import ImageBatches, TextBatches
from unlearn.editors.protect import Replay
from unlearn.editors.prototypes import Embeddings, distance
from unlearn.requests.presets import load_method
from unlearn.runs.verify import passed, verify


def texts(n: int, seed: int = 0, groups: int = 0) -> list[TokenRecord]:
    """Records of several lengths, in so many groups."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenRecord(
            f"r{seed}-{i}",
            tuple(torch.randint(4, 96, (5 + i % 4,), generator=generator).tolist()),
            2,
            1,
            f"g{seed}-{i % groups}" if groups else None,
        )
        for i in range(n)
    ]


def pictures(classes: int, each: int, seed: int) -> list[ImageRecord]:
    """Noisy copies of one coarse pattern a class; the patterns are the same for every seed."""
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    patterns = functional.interpolate(patterns, size=(IMAGE, IMAGE))
    generator = torch.Generator().manual_seed(seed)
    return [
        ImageRecord(f"{seed}-{c}-{i}", patterns[c] + torch.randn(3, IMAGE, IMAGE, generator=generator), c)
        for c in range(classes)
        for i in range(each)
    ]


def run(
    checkpoint: Checkpoint,
    out: Path,
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
    return make_editor("gs_lora", parameters).edit(
        EditContext(checkpoint, model, ModelMap.of(model), forget, retain, work=work, **options), out
    )


def retain_step(batches: TextBatches, rows: list[int]) -> float:
    """Leave the gradients of the mean over records of the mean loss a token."""
    totals, backward = batches.totals(rows)
    shares = 1.0 / (len(rows) * torch.tensor([batches.lengths[j] for j in rows], dtype=torch.float64))
    backward(shares)
    return float(totals @ shares)


SMALL = {"learning_rate": 3e-3, "steps": 4, "batch_size": 2, "retain_batch_size": 3, "rank": 3, "stop_early": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path_factory.mktemp("llama"), shards=2))


def changed(before: Checkpoint, after: Path) -> set[str]:
    edited = open_checkpoint(after)
    return {name for name, tensor in before.iter_tensors() if not torch.equal(tensor, edited.load_tensor(name))}


def feed_forward(model: nn.Module) -> list[str]:
    return [q.parameter for block in ModelMap.of(model).blocks for q in block.feed_forward]


def trainer_of(
    model: nn.Module, p: GSLoRAParameters, adapted: list[Any], mine: Sequence[Any], kept: Sequence[Any], **options: Any
) -> Trainer:
    """A trainer of one step over records 2 and 0 to forget and 0, 2, 3 to keep."""
    model_map = options.pop("model_map")

    def side(records: Sequence[Any], rows: list[int]) -> Side:
        embeddings = Embeddings(model_map, records) if p.plus else None
        if isinstance(records[0], TokenRecord):
            return Side(TextBatches(model_map, records, {}), [rows], embeddings)
        return Side(ImageBatches(model, records), [rows], embeddings)

    return Trainer(
        p=p, model=model, groups=adapted, forget=side(mine, [2, 0]), retain=side(kept, [0, 2, 3]), steps=1,
        progress=lambda n: None, merged=dict, **options
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- gradients of a step


def plain_losses(model: nn.Module, record: Any) -> tuple[Tensor, Tensor]:
    """Mean loss and embedding of one record by the model's own forward pass."""
    if isinstance(record, ImageRecord):
        states = model.vit(record.pixels[None].double()).last_hidden_state[0, 0]  # type: ignore[operator]
        return functional.cross_entropy(model.classifier(states), torch.tensor(record.label)), states  # type: ignore[operator]
    output = model(input_ids=torch.tensor([record.ids]), output_hidden_states=True)
    part = slice(record.n_prompt - 1, -1)
    loss = functional.cross_entropy(output.logits[0, part], torch.tensor(record.completion))
    return loss, output.hidden_states[-1][0, part].mean(0)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"prototype_forget_weight": 0.7, "prototype_retain_weight": 0.3}),
        ("gpt2", {"prototype_forget_weight": 0.7, "prototype_bound": 0.5, "bounded_over": "batch"}),
        ("vit", {"prototype_forget_weight": 0.7, "prototype_retain_weight": 0.3, "groups": "projection"}),
        ("vit", {"bounded_over": "batch", "penalty": "published", "sparsity": 0.2}),
    ],
)
def test_gradients_equal_autograd_of_the_formula(
    arch: str, options: dict[str, Any], parts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if parts:  # record by record
        monkeypatch.setattr(lossbatches, "default_batch_tokens", lambda device: 1)
        monkeypatch.setattr(lossbatches, "IMAGES", 1)
    build = image_classifier if arch == "vit" else causal_lm
    model: nn.Module = build(arch, dtype=torch.float64)  # type: ignore[operator]
    frozen, model_map = copy.deepcopy(model), ModelMap.of(model)
    mine = pictures(4, 1, 1)[:3] if arch == "vit" else texts(3, 1, groups=2)
    kept = pictures(4, 2, 2)[2:7] if arch == "vit" else texts(4, 2, groups=2)
    p = GSLoRAParameters(**({"rank": 3, "forget_weight": 0.6} | options))
    context = EditContext(None, model, model_map, mine, kept, 0, tmp_path)  # type: ignore[arg-type]
    with torch.no_grad():
        losses = [float(plain_losses(model, mine[i])[0]) for i in (2, 0)]
    bound = sum(losses) / 2 + (1.0 if p.bounded_over == "batch" else 0.0)  # between the two: one pushed, one left
    with gs_lora._adapters(context, groups_of(model_map, feed_forward(model), p.groups), p) as adapted:
        trainer = trainer_of(model, p, adapted, mine, kept, model_map=model_map, bound=bound)
        trainer.prepare()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for up in [up for a in adapted for up in a.ups]:
                up.add_(0.02 * torch.randn(up.shape, generator=generator, dtype=torch.float64))
            losses = [float(plain_losses(model, mine[i])[0]) for i in (2, 0)]
        if p.bounded_over == "record":
            assert min(losses) < bound < max(losses)
        with torch.enable_grad():
            value = trainer.step(0)
        halves = [half for a in adapted for half in a.tensors]
        found = [half.grad.clone() if half.grad is not None else torch.zeros_like(half) for half in halves]

        def key(record: Any) -> Any:
            return record.label if isinstance(record, ImageRecord) else record.group

        def protos(records: Sequence[Any], rows: Sequence[int]) -> dict[Any, Tensor]:
            with torch.no_grad():
                seen = [(key(records[i]), plain_losses(frozen, records[i])[1]) for i in rows]
            return {k: torch.stack([e for name, e in seen if name == k]).mean(0) for k, _ in seen}

        forget_protos, retain_protos = protos(mine, (0, 2)), protos(kept, (0, 2, 3))
        with torch.enable_grad():
            run_mine = [(mine[i], *plain_losses(model, mine[i])) for i in (2, 0)]
            run_kept = [(kept[i], *plain_losses(model, kept[i])) for i in (0, 2, 3)]
            every = torch.stack([loss for _, loss, _ in run_mine])
            if p.bounded_over == "batch":
                objective = 0.6 * functional.relu(bound - every.mean())
            else:
                objective = 0.6 * functional.relu(bound - every).mean()
            objective = objective + torch.stack([loss for _, loss, _ in run_kept]).mean()
            for record, _, embedding in run_mine:
                home = forget_protos[key(record)]
                others = [float(distance(home[None], o[None])) for o in retain_protos.values()]
                limit = sum(others) / len(others) if p.prototype_bound == "auto" else p.prototype_bound
                away = functional.relu(limit - distance(home[None], embedding[None])[0])
                objective = objective + p.prototype_forget_weight * away / 2
            for record, _, embedding in run_kept:
                away = distance(retain_protos[key(record)][None], embedding[None])[0]
                objective = objective + p.prototype_retain_weight * away / 3
            penalised = objective
            if p.penalty == "published":
                norms = [sum((t**2).sum() for t in a.tensors) ** 0.5 for a in adapted]
                penalised = objective + p.sparsity * sum(norms)
            expected = torch.autograd.grad(penalised, halves)
    assert value == pytest.approx(float(objective.detach()), rel=1e-9)
    for mine_, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine_, theirs, rtol=1e-7, atol=1e-9 * max(1.0, float(theirs.abs().max())))
    assert trainer.latest[1] != trainer.latest[1]  # never seen: NaN
    assert [trainer.latest[i] for i in (2, 0)] == pytest.approx([float(x) for x in every.detach()])


# ------------------------------------------------------------------------------------------------------------ the loop


def test_a_run_equals_a_hand_written_loop(llama: Checkpoint, tmp_path: Path) -> None:
    mine, kept, rate, steps = texts(5, 1), texts(6, 2), 2e-3, 6
    options = SMALL | {"learning_rate": rate, "epochs": 2, "steps": None, "warm_up": 2, "bound": 4.0, "sparsity": 0.4,
                       "sparsity_warm_up": 1, "adapter_scale": 2.0, "ema_decay": 0.7, "ema_warm_up": 1}  # fmt: skip
    result = run(llama, tmp_path / "out", options, mine, kept, dtype="float64", seed=3)

    model = llama.load_model("float64")
    model_map, names = ModelMap.of(model), feed_forward(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with training.adapters(model, model_map, rank=3, alpha=6, roles=["gate", "up", "down"], seed=3) as pairs:
        halves = [p.detach().clone().requires_grad_() for p in pairs]

    def weights() -> dict[str, Tensor]:
        return start | {name: start[name] + 2.0 * halves[2 * k + 1] @ halves[2 * k] for k, name in enumerate(names)}

    def loss_of(record: TokenRecord) -> Tensor:
        inputs = {"input_ids": torch.tensor([record.ids])}
        logits = torch.func.functional_call(model, weights(), kwargs=inputs).logits[0, record.n_prompt - 1 : -1]
        return functional.cross_entropy(logits, torch.tensor(record.completion))

    optimiser = torch.optim.AdamW(halves, lr=0.0, weight_decay=0.0)
    rows = training.batches(5, 2, steps, 3), training.batches(6, 3, steps, 4)
    curve, average = [], dict[str, Tensor]()
    for i, (lost, held) in enumerate(zip(*rows, strict=True)):
        h = rate * min(1, (i + 1) / 2, (steps - i) / (steps - 2))
        optimiser.param_groups[0]["lr"] = h
        optimiser.zero_grad()
        objective = torch.stack([functional.relu(4.0 - loss_of(mine[j])) for j in lost]).mean()
        objective = objective + torch.stack([loss_of(kept[j]) for j in held]).mean()
        objective.backward()
        optimiser.step()
        curve.append(float(objective.detach()))
        with torch.no_grad():
            if i >= 3:  # an epoch is three steps
                for block in range(3):
                    ups = halves[1::2][3 * block : 3 * block + 3]
                    size = sum(float((up**2).sum()) for up in ups) ** 0.5
                    n = sum(up.numel() for up in ups)
                    for up in ups:
                        up.mul_(max(0.0, 1 - h * 0.4 * n**0.5 / size))
                now = weights()
                for name in names:
                    average[name] = 0.7 * average[name] + 0.3 * now[name] if name in average else now[name].clone()
    assert result.statistics["objective"] == pytest.approx(curve, rel=1e-8)
    for name, tensor in open_checkpoint(tmp_path / "out").iter_tensors():
        torch.testing.assert_close(tensor, average.get(name, start[name]).float(), rtol=1e-6, atol=1e-8)
    assert changed(llama, tmp_path / "out") == set(names)
    assert "adapter" not in result.statistics  # the copy is no longer a product of rank 3
    json.dumps([result.parameters, result.statistics], allow_nan=False)


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"epochs": 0, "steps": None}, {"learning_rate": 0.0}])
def test_no_step_changes_no_byte(nothing: dict[str, Any], llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", SMALL | nothing, texts(3, 1), texts(4, 2))
    assert list(result.deltas) == []
    for path in llama.path.iterdir():  # type: ignore[union-attr]
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert result.statistics["steps"] == 0


def test_a_huge_penalty_is_the_identity(llama: Checkpoint, tmp_path: Path) -> None:
    options = SMALL | {"sparsity": 100.0, "steps": 30, "drop_after": 5}
    result = run(llama, tmp_path / "out", options, texts(3, 1), texts(4, 2))
    for path in llama.path.iterdir():  # type: ignore[union-attr]
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert result.statistics["active_groups"] == 0
    assert [row["norm"] for row in result.statistics["groups"]] == [0.0] * 3
    assert result.statistics["steps"] == 5  # no group is left to train
    assert "lower sparsity" in result.warnings[0]
    assert not (tmp_path / "out-work" / "adapter").exists()


def test_a_bound_of_zero_is_fine_tuning_on_the_retain_set(llama: Checkpoint, tmp_path: Path) -> None:
    """Neither does a record past its bound leave a trace: other records to forget give the same bytes."""
    options = SMALL | {"bound": 0.0, "sparsity": 0.0}
    digests = {
        run(llama, tmp_path / str(i), options | extra, records, texts(4, 2)).deltas.tensor_digest
        for i, (extra, records) in enumerate(
            [({}, texts(3, 1)), ({}, texts(3, 7)), ({"forget_weight": 0.0, "bound": 9.0}, texts(3, 1))]
        )
    }
    assert len(digests) == 1
    assert llama.tensor_digest() not in digests
    model, kept, order = llama.load_model(), texts(4, 2), list(training.batches(4, 3, 4, 1))
    model_map = ModelMap.of(model)
    sides = TextBatches(model_map, kept, {})
    with training.adapters(model, model_map, rank=3, alpha=3, roles=["gate", "up", "down"], seed=0) as parameters:
        training.fit(parameters, lambda i: retain_step(sides, order[i]), steps=4, learning_rate=3e-3, decay="linear")
        deltas = training.merged_deltas(model, model_map)
    edited = open_checkpoint(tmp_path / "0")
    for name, parameter in model.named_parameters():
        expected = parameter.detach() + deltas.get(name, 0.0)
        torch.testing.assert_close(edited.load_tensor(name), expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- zero groups


def without(monkeypatch: pytest.MonkeyPatch, *empty: int) -> None:
    """Let the proximal step empty these groups, whatever their gradients."""
    real = gs_lora_training.shrink

    def shrink(groups: Sequence[Sequence[Tensor]], thresholds: Sequence[float]) -> list[float]:
        widths = [1e9 if i in empty and len(groups) == 3 else t for i, t in enumerate(thresholds)]
        return real(groups, widths)

    monkeypatch.setattr(gs_lora_training, "shrink", shrink)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "vit", "dinov2"])
def test_a_zero_group_keeps_its_bytes_and_leaves_no_adapter(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = arch in ("vit", "dinov2")
    depth = {} if images else {"n_layer" if arch == "gpt2" else "num_hidden_layers": 3}
    source = (image_classifier if images else causal_lm)(arch, **depth)
    checkpoint = open_checkpoint(save(source, None, tmp_path / "source"))
    mine = pictures(4, 2, 1)[:2] if images else texts(3, 1)
    kept = pictures(4, 2, 2)[2:] if images else texts(4, 2)
    without(monkeypatch, 1)
    result = run(checkpoint, tmp_path / "out", SMALL | {"drop_after": None}, mine, kept)
    names = feed_forward(source)
    model_map = ModelMap.of(source)
    assert result.statistics["active_groups"] == 2
    assert [row["norm"] > 0 for row in result.statistics["groups"]] == [True, False, True]
    disk = checkpoint.disk_names(checkpoint.load_model())
    kept_names = {d for name in names if model_map.block_of(name) != 1 for d in disk[name]}
    assert changed(checkpoint, tmp_path / "out") == kept_names
    folder = tmp_path / "out-work" / "adapter"
    adapted = PeftModel.from_pretrained(checkpoint.load_model(), folder)
    held = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(held) == 2 * len([name for name in names if model_map.block_of(name) != 1])
    assert result.statistics["adapter"]["modules"] == len(held) // 2
    assert result.statistics["adapter"]["elements"] == sum(
        p.numel() for n, p in adapted.named_parameters() if "lora_" in n
    )
    edited = open_checkpoint(tmp_path / "out").load_model()
    with torch.no_grad(), seeded(0):
        inputs = torch.randn(2, 3, IMAGE, IMAGE) if images else torch.randint(4, 96, (2, 9))
        torch.testing.assert_close(adapted(inputs).logits, edited(inputs).logits, rtol=1e-4, atol=1e-5)
    text = (folder / "adapter_config.json").read_text() + json.dumps(result.statistics)
    assert str(tmp_path) not in text


def test_a_dropped_group_is_out_of_the_model_and_changes_no_bit(tmp_path: Path) -> None:
    model = causal_lm("gpt2")
    model_map, p = ModelMap.of(model), GSLoRAParameters(rank=2)
    context = EditContext(None, model, model_map, [], [], 0, tmp_path)  # type: ignore[arg-type]
    ids, blocks = torch.randint(4, 96, (2, 9)), [model.get_submodule(block.name) for block in model_map.blocks]
    plain = copy.deepcopy(blocks)
    with (
        torch.no_grad(),
        gs_lora._adapters(context, groups_of(model_map, feed_forward(model), "block"), p) as adapted,
    ):
        for a in (adapted[1], adapted[2]):
            for up in a.ups:
                up.normal_(std=0.1)
        whole = model(ids).logits
        states = torch.randn(2, 5, 32)
        assert torch.equal(blocks[0](states), plain[0](states))  # zero, and still in place
        assert not torch.equal(blocks[1](states), plain[1](states))
        assert any("lora_" in name for name, _ in blocks[0].named_parameters())
        adapted[0].drop(model)
        assert not any("lora_" in name for name, _ in blocks[0].named_parameters())
        assert torch.equal(model(ids).logits, whole)
        with torch.enable_grad():
            flags: list[bool] = []
            hook = blocks[0].register_forward_hook(lambda m, x, y: flags.append(y.requires_grad))
            retain_step(TextBatches(model_map, texts(2), {}), [0, 1])
            hook.remove()
        assert flags == [False]  # the backward pass ends at the lowest block that is left
        assert all(half.grad is None for half in adapted[0].tensors)
        assert all(half.grad is not None for half in adapted[1].tensors)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_adapters_stand_beside_the_chosen_projections_alone(tmp_path: Path) -> None:
    model = causal_lm("llama")
    model_map, names = ModelMap.of(model), ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    context = EditContext(None, model, model_map, [], [], 0, tmp_path)  # type: ignore[arg-type]
    with gs_lora._adapters(context, groups_of(model_map, names, "block"), GSLoRAParameters()) as adapted:
        held = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        assert held == {path for a in adapted for path in a.pairs} == {name.removesuffix(".weight") for name in names}
        assert sum(p.requires_grad for p in model.parameters()) == 4


def test_groups_that_stay_zero_are_dropped_for_good(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, 0)
    dropped: list[str] = []
    real = gs_lora.Adapted.drop

    def drop(self: Any, model: nn.Module) -> None:
        dropped.append(self.group.name)
        real(self, model)

    monkeypatch.setattr(gs_lora.Adapted, "drop", drop)
    options = SMALL | {"steps": 8, "drop_after": 3, "sparsity_warm_up": 1}
    result = run(llama, tmp_path / "out", options, texts(3, 1), texts(4, 2))
    assert dropped == ["model.layers.0"]
    assert result.statistics["active"] == [3 - 1] * 8
    assert all("layers.0." not in name for name in changed(llama, tmp_path / "out"))


def test_a_group_that_ends_empty_keeps_its_bytes_under_an_average(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = gs_lora_training.shrink, [0]

    def shrink(groups: Sequence[Sequence[Tensor]], thresholds: Sequence[float]) -> list[float]:
        calls[0] += 1
        return real(groups, [1e9 if i == 1 and calls[0] > 2 else t for i, t in enumerate(thresholds)])

    monkeypatch.setattr(gs_lora_training, "shrink", shrink)
    result = run(llama, tmp_path / "out", SMALL | {"ema_decay": 0.5}, texts(3, 1), texts(4, 2))
    assert result.statistics["active"] == [3, 3, 2, 2]
    touched = changed(llama, tmp_path / "out")
    assert touched == {name for name in feed_forward(llama.load_model()) if "layers.1." not in name}


def test_a_group_by_itself(llama: Checkpoint, tmp_path: Path) -> None:
    options = SMALL | {"groups": "projection", "blocks": [-1], "roles": ["q", "down"]}
    result = run(llama, tmp_path / "out", options, texts(3, 1), texts(4, 2))
    names = [row["name"] for row in result.statistics["groups"]]
    assert names == ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    assert changed(llama, tmp_path / "out") == {f"{name}.weight" for name in names}


def test_the_published_penalty_survives_its_first_step(llama: Checkpoint, tmp_path: Path) -> None:
    """Public code's finest grouping takes the root of a group that is all zero: NaN from the first step on."""
    options = SMALL | {"groups": "projection", "penalty": "published", "sparsity": 0.01}
    result = run(llama, tmp_path / "out", options, texts(3, 1), texts(4, 2))
    assert all(math.isfinite(x) for x in result.statistics["objective"])
    assert result.statistics["active_groups"] == 9


# ---------------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_are_those_of_the_loaded_checkpoint(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public code computes them before it loads the weights: they are a random network's."""
    seen: list[Trainer] = []
    real = Trainer.prepare
    monkeypatch.setattr(Trainer, "prepare", lambda self: (real(self), seen.append(self))[0])
    mine, kept = texts(4, 1, groups=2), texts(6, 2)
    run(llama, tmp_path / "out", SMALL | {"prototype_forget_weight": 0.5}, mine, kept)
    loaded, other = llama.load_model(), causal_lm("llama", seed=1)
    side = seen[0].forget
    for model, equal in ((loaded, True), (other, False)):
        with torch.no_grad():
            embedded = [plain_losses(model, record)[1] for record in mine]
        for row, target in side.targets.items():
            expected = torch.stack([e for r, e in zip(mine, embedded, strict=True) if r.group == mine[row].group])
            assert torch.allclose(target, expected.mean(0), atol=1e-5) is equal
    assert set(side.targets) == set(range(4))
    assert set(side.bounds) == set(range(4))
    assert all(bound > 0 for bound in side.bounds.values())


def test_classes_may_be_few_or_missing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(image_classifier("vit"), None, tmp_path / "source"))
    every = pictures(4, 2, 1)
    options = SMALL | {"prototype_forget_weight": 0.5, "prototype_retain_weight": 0.5, "stop_early": True}
    mine = [r for r in every if r.label == 0]
    one = [next(r for r in every if r.label == 2)]  # one image of one class, none of two others
    for i, kept in enumerate((one, [r for r in every if r.label in (1, 2)])):
        result = run(checkpoint, tmp_path / str(i), options, mine, kept)
        assert result.statistics["steps"] == 4
        assert changed(checkpoint, tmp_path / str(i))


# ---------------------------------------------------------------------------------------------------------- forgetting


def accuracy(checkpoint: Checkpoint, records: Sequence[ImageRecord]) -> float:
    return float(score_images(checkpoint.load_model(), records).correct.mean())


def classifier(folder: Path, seed: int) -> Checkpoint:
    """A ViT trained on six classes."""
    model, records = image_classifier("vit", seed=seed, classes=6, num_hidden_layers=2), pictures(6, 20, 1)
    loss, order = training.mean_loss(model, records), list(training.batches(len(records), 32, 60, seed))
    with training.full(model, keep=True) as parameters:
        training.fit(parameters, lambda i: loss(order[i]), steps=60, learning_rate=3e-3)
    return open_checkpoint(save(model, None, folder))


PLUS = {"prototype_forget_weight": 0.1, "prototype_retain_weight": 0.1}


@pytest.mark.parametrize(("seed", "extra"), [(0, {}), (1, PLUS)])
def test_classes_forgotten_in_sequence_stay_forgotten(seed: int, extra: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = classifier(tmp_path / "source", seed)
    known, unseen = pictures(6, 20, 1), pictures(6, 20, 2)
    first = accuracy(checkpoint, unseen)
    assert first > 0.95
    for task in (0, 1):
        mine, kept = [r for r in known if r.label == task], [r for r in known if r.label > task]
        result = run(checkpoint, tmp_path / str(task), extra, mine, kept, seed=seed)
        checkpoint = open_checkpoint(tmp_path / str(task))
        assert [accuracy(checkpoint, [r for r in unseen if r.label == c]) for c in range(task + 1)] == [0.0] * (
            task + 1
        )
        assert accuracy(checkpoint, [r for r in unseen if r.label > task]) >= first - 0.02
        assert min(result.statistics["forget_loss"][-5:]) > 0.8 * 2 * math.log(6)


# ------------------------------------------------------------------------------------------- what was forgotten earlier


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("arch", ["llama", "vit"])
def test_replay_equals_autograd_of_the_formula(arch: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:  # record by record
        monkeypatch.setattr(lossbatches, "default_batch_tokens", lambda device: 1)
        monkeypatch.setattr(lossbatches, "IMAGES", 1)
    build = image_classifier if arch == "vit" else causal_lm
    model: nn.Module = build(arch, dtype=torch.float64)  # type: ignore[operator]
    records: Any = pictures(4, 1, 1) if arch == "vit" else texts(4, 1)
    batches = ImageBatches(model, records) if arch == "vit" else TextBatches(ModelMap.of(model), records, {})
    rows = [3, 0, 2]
    losses = [plain_losses(model, records[j])[0] for j in rows]
    lowest, middle, _ = sorted(float(loss.detach()) for loss in losses)
    bound, seen = (lowest + middle) / 2, list[int]()  # one is below it
    replay = Replay(batches, [[0, 1], rows, rows], bound=bound, weight=0.7, ran=seen.append)
    expected = 0.7 * functional.relu(bound - torch.stack(losses)).mean()
    parameters = [p for name, p in model.named_parameters() if "mlp" in name or "intermediate" in name]
    gradients = torch.autograd.grad(expected, parameters)
    assert replay.step(1) == pytest.approx(float(expected.detach()), rel=1e-9)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-12)
    assert replay.pushed == 1
    assert replay.means == [pytest.approx(sum(float(loss.detach()) for loss in losses) / 3)]
    assert [replay.latest[j] for j in rows] == pytest.approx([float(loss.detach()) for loss in losses])
    assert math.isnan(replay.latest[1])
    every = [float(plain_losses(model, record)[0].detach()) for record in records]
    assert replay.losses() == pytest.approx(every)
    assert sum(seen) == 3 + 4

    model.zero_grad()
    past = Replay(batches, [rows], bound=lowest, weight=0.7, ran=seen.append)  # a loss at the bound has reached it
    assert past.step(0) == 0.0
    assert past.pushed == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_earlier_records_leave_no_trace_while_they_are_past_the_bound(llama: Checkpoint, tmp_path: Path) -> None:
    """The untrained model gives every record about ln(96) = 4.6 nats."""
    mine, kept, earlier = texts(3, 1), texts(4, 2), texts(5, 9)

    def digest(name: str, bound: float, weight: float = 1.0, records: Sequence[Any] = earlier) -> Any:
        options = SMALL | {"bound": bound, "earlier_weight": weight}
        return run(llama, tmp_path / name, options, mine, kept, earlier=records)

    for bound in (3.0, 9.0):
        none = digest(f"none{bound}", bound, records=())
        assert "earlier" not in none.statistics
        off = digest(f"off{bound}", bound, weight=0.0)
        assert off.deltas.tensor_digest == none.deltas.tensor_digest
        assert off.statistics == none.statistics
        on = digest(f"on{bound}", bound)
        assert (on.deltas.tensor_digest == none.deltas.tensor_digest) is (bound == 3.0)
        assert on.statistics["earlier"]["pushed"] == (0 if bound == 3.0 else 4 * 5)
        assert len(on.statistics["earlier"]["loss"]) == 4
        said = [warning for warning in on.warnings if "forgotten earlier" in warning]
        assert said == ([] if bound == 3.0 else [
            "5 of 5 records forgotten earlier are below the bound of 9.00 nats in the copy; before this edit 5 were"
        ])  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9}, {"sparsity": 100.0}])
def test_what_is_said_of_earlier_records_holds_for_the_copy(
    extra: dict[str, Any], llama: Checkpoint, tmp_path: Path
) -> None:
    earlier, options = texts(5, 9), SMALL | {"learning_rate": 1e-2, "bound": 4.7, "bound_tolerance": 0.0}
    result = run(llama, tmp_path / "out", options | extra, texts(3, 1), texts(4, 2), earlier=earlier)
    found = result.statistics["earlier"]
    for checkpoint, when in ((llama, "before"), (open_checkpoint(tmp_path / "out"), "after")):
        model = checkpoint.load_model()
        with torch.no_grad():
            losses = [float(plain_losses(model, record)[0]) for record in earlier]
        assert found[f"loss_{when}"] == pytest.approx(sum(losses) / 5, abs=1e-5)
        assert found[f"below_bound_{when}"] == sum(loss < 4.7 for loss in losses)
    assert found["records"] == 5
    assert (found["loss_before"] == found["loss_after"]) is ("sparsity" in extra)
    json.dumps(result.statistics, allow_nan=False)


def test_a_class_forgotten_earlier_comes_back_without_replay_and_not_with_it(tmp_path: Path) -> None:
    """Label 0 has two kinds of images; the second request keeps the kind that the first did not ask for."""
    kinds = {r.record_id: r.label for s in (1, 2) for r in pictures(6, 20, s)}

    def of(which: int, *wanted: int) -> list[ImageRecord]:
        rows = [r for r in pictures(6, 20, which) if kinds[r.record_id] in wanted]
        return [ImageRecord(r.record_id, r.pixels, r.label % 5) for r in rows]

    known = of(1, *range(6))
    model = image_classifier("vit", classes=5, num_hidden_layers=2)
    loss, order = training.mean_loss(model, known), list(training.batches(len(known), 32, 60, 0))
    with training.full(model, keep=True) as parameters:
        training.fit(parameters, lambda i: loss(order[i]), steps=60, learning_rate=3e-3)
    first = open_checkpoint(save(model, None, tmp_path / "source"))
    run(first, tmp_path / "1", {}, of(1, 0), of(1, 1, 2, 3, 4))
    second = open_checkpoint(tmp_path / "1")
    assert accuracy(second, of(2, 0)) == 0.0
    for weight, back in ((0.0, 1.0), (1.0, 0.0)):
        out = tmp_path / f"2-{weight}"
        result = run(second, out, {"earlier_weight": weight}, of(1, 1), of(1, 2, 3, 4, 5), earlier=of(1, 0))
        third = open_checkpoint(out)
        assert accuracy(third, of(2, 0)) == accuracy(third, of(1, 0)) == back
        assert accuracy(third, of(2, 1)) == 0.0
        assert accuracy(third, of(2, 2, 3, 4)) > 0.95
    assert result.statistics["earlier"]["pushed"] > 0
    assert result.statistics["earlier"]["below_bound_after"] == 0


def test_the_harmonic_mean_of_the_papers() -> None:
    assert harmonic(0.8, 0.4) == pytest.approx(2 / (1 / 0.8 + 1 / 0.4))
    assert harmonic(0.7, 0.7) == pytest.approx(0.7)
    assert harmonic(0.0, 0.0) == harmonic(0.9, 0.0) == harmonic(0.0, 0.9) == 0.0
    assert harmonic(0.9, -0.1) == 0.0  # it got better at what it was to forget


def test_shots_are_drawn_from_each_class_by_seed() -> None:
    records = [ImageRecord(str(i), torch.zeros(1, 2, 2), i % 10) for i in range(90)]
    first, again, other = (gs_lora_shots.drawn(records, 4, seed) for seed in (0, 0, 1))
    assert [record.record_id for record in first] == [record.record_id for record in again]
    assert {r.record_id for r in first} != {r.record_id for r in other}
    assert [record.label for record in first] == [label for label in range(10) for _ in range(4)]
    assert len({record.record_id for record in first}) == 40


def test_letters_are_sixty_classes_in_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gs_lora_shots, "IMAGES", (2, 1))
    (known, unseen), again = gs_lora_shots.letters(), gs_lora_shots.letters()
    assert [sum(r.label == c for r in known) for c in range(60)] == [2] * 60
    assert sorted(r.label for r in unseen) == list(range(60))
    assert all(r.pixels.shape == (1, 16, 16) and float(r.pixels.std()) > 0.2 for r in (*known, *unseen))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(known, again[0], strict=True))
    assert len({r.pixels.numpy().tobytes() for r in (*known, *unseen)}) == 180


def test_methods_are_compared_seed_by_seed() -> None:
    def row(seed: int, method: str, harmonics: tuple[float, float]) -> dict[str, Any]:
        rows = [
            {"forgotten": 0.0, "earlier": earlier, "retained": h, "change": 0.0, "harmonic": h}
            for earlier, h in zip((None, 0.5), harmonics, strict=True)
        ]
        return {"seed": seed, "method": method, "setting": "one", "rows": rows}

    found = [row(seed, "A", (0.5, 0.7 + seed / 10)) for seed in (0, 1, 2)]
    found += [row(seed, "B", (0.5 + seed / 10, 0.9 + seed / 10)) for seed in (2, 1, 0)]
    lines = gs_lora_shots.table(found).splitlines()
    assert lines[2].startswith("| A, one | 0.0 (0.0 to 0.0) | 50.0 (50.0 to 50.0) | 65.0 (60.0 to 70.0)")
    gaps = [10.0, 15.0, 20.0]  # of the means over requests, B less A, seed by seed
    interval = statistics.mean_interval(gaps)
    assert f"| +15.0 ({interval.low:+.1f} to {interval.high:+.1f}) |" in lines[4]
    assert "over 3 seeds | +0.0 | +0.0 |" in lines[4]  # no spread, no interval


def test_planted_facts_go_and_the_others_stay(tmp_path: Path) -> None:
    model, mine, kept = causal_lm("llama", initializer_range=0.05), texts(4, 1), texts(8, 2)
    train(model, [record.ids for record in mine + kept], steps=150)
    checkpoint = open_checkpoint(save(model, None, tmp_path / "source"))
    before = mean_loss(ModelMap.of(model), kept)
    assert before < 0.1
    for seed in (0, 1):
        result = run(checkpoint, tmp_path / str(seed), {"learning_rate": 3e-3}, mine, kept, seed=seed)
        edited = ModelMap.of(open_checkpoint(tmp_path / str(seed)).load_model())
        assert mean_loss(edited, mine) > 0.8 * math.log(96) / 3
        assert mean_loss(edited, kept) < before + 0.05
        assert not any(mean_loss(edited, [record]) < 0.5 for record in mine)  # each record, not their mean
        assert result.statistics["stopped"]
        assert result.statistics["below_bound"] == 0


def test_it_stops_only_when_every_record_and_the_retain_loss_are_there() -> None:
    p = GSLoRAParameters(patience=2, retain_tolerance=0.1, bound_tolerance=0.1, sparsity_warm_up=1, batch_size=1)

    class Fixed:
        lengths = (1, 1)

    def settled(
        latest: list[float],
        kept: list[float],
        support: list[bool],
        done: int,
        earlier: tuple[float, float] | None = None,
    ) -> bool:
        side = Side(Fixed(), [[0]] * 9)  # type: ignore[arg-type]
        trainer = Trainer(p, nn.Module(), [], side, side, 2.0, 9, lambda n: None, dict)
        if earlier is not None:
            trainer.replay = Replay(side.batches, side.rows, bound=2.0, weight=1.0, ran=lambda n: None)
            trainer.replay.latest = list(earlier)
        trainer.latest, trainer.before = latest, {0: 1.0}
        trainer.curve.retain_loss = kept
        trainer._support = [(s,) for s in support]
        return trainer._settled(done)

    fine: Callable[..., dict[str, Any]] = lambda **other: {  # noqa: E731
        "latest": [1.8, 2.5], "kept": [9.0, 1.1, 1.05], "support": [False, True, True], "done": 4
    } | other  # fmt: skip
    assert settled(**fine())
    assert not settled(**fine(latest=[1.79, 99.0]))  # one record is short, whatever the mean
    assert not settled(**fine(latest=[1.9, math.nan]))  # one was never seen
    assert not settled(**fine(kept=[9.0, 1.1, 1.2]))
    assert not settled(**fine(support=[True, False, True]))
    assert not settled(**fine(done=3))  # the penalty began after two steps
    assert settled(**fine(earlier=(1.8, 9.0)))
    assert not settled(**fine(earlier=(1.79, 9.0)))  # one that was forgotten earlier has come back
    assert not settled(**fine(earlier=(9.0, math.nan)))  # or may have
    p = p.model_copy(update={"stop_early": False})
    assert not settled(**fine())


# ----------------------------------------------------------------------------------------------------------- the editor


def state_of(model: nn.Module) -> Any:
    return (
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
         for name, module in model.named_modules()],
    )  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(
    fails: bool, llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.load_model()
    model.get_submodule("model.layers.1").train()
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    before, values, random = state_of(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = SMALL | {"prototype_forget_weight": 0.1, "sparsity": 100.0, "drop_after": 1, "sparsity_warm_up": 1}
    real = Trainer.step

    def broken(self: Trainer, i: int) -> float:
        if i == 2:
            raise RuntimeError("a failure in the middle")
        return real(self, i)

    if fails:
        monkeypatch.setattr(Trainer, "step", broken)
        with pytest.raises(RuntimeError, match="middle"):
            run(llama, tmp_path / "out", options, texts(4, 1), texts(4, 2), model=model, earlier=texts(2, 9))
        assert not (tmp_path / "out").exists()
    else:
        run(llama, tmp_path / "out", options, texts(4, 1), texts(4, 2), model=model, earlier=texts(2, 9))
    assert state_of(model) == before
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert kept.grad is not None
    assert bool((kept.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_same_inputs_same_bytes(llama: Checkpoint, tmp_path: Path) -> None:
    results, folders = [], []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        results.append(run(llama, tmp_path / str(i), SMALL, texts(5, 1), texts(6, 2), seed=seed, earlier=texts(20, 9)))
        folders.append([path.read_bytes() for path in sorted((tmp_path / f"{i}-work" / "adapter").iterdir())])
    assert results[0].deltas.tensor_digest == results[1].deltas.tensor_digest != results[2].deltas.tensor_digest
    assert results[0].statistics == results[1].statistics
    assert folders[0] == folders[1] != folders[2]
    assert results[0].statistics["adapter"] != results[2].statistics["adapter"]


def test_a_second_edit_starts_as_the_first_did(llama: Checkpoint, tmp_path: Path) -> None:
    """Public code draws A three times smaller from the second task on."""
    starts = []
    real = training.adapters
    checkpoint = llama
    for task in (0, 1):
        model = checkpoint.load_model()
        with real(model, ModelMap.of(model), rank=3, alpha=3, seed=0) as pairs:
            starts.append([float(down.detach().norm()) for down in pairs[::2]])
        run(checkpoint, tmp_path / str(task), SMALL, texts(3, 1), texts(4, 2))
        checkpoint = open_checkpoint(tmp_path / str(task))
    assert starts[0] == starts[1]


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(causal_lm("llama", dtype=torch.bfloat16), None, tmp_path / "source"))
    options = SMALL | {"prototype_forget_weight": 0.5, "roles": ["down"]}
    run(checkpoint, tmp_path / "out", options, texts(4, 1), texts(4, 2), dtype="bfloat16")
    assert {tensor.dtype for _, tensor in open_checkpoint(tmp_path / "out").iter_tensors()} == {torch.bfloat16}
    assert all("down_proj" in name for name in changed(checkpoint, tmp_path / "out"))


@pytest.mark.parametrize("n_earlier", [0, 5])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"stop_early": True},
        {"prototype_forget_weight": 0.1, "steps": 7, "earlier_batch_size": 2},
        {"steps": 1, "stop_early": True},
        {"earlier_weight": 0.0},
    ],
)
def test_passes_are_those_that_are_run(
    parameters: dict[str, Any], n_earlier: int, llama: Checkpoint, tmp_path: Path
) -> None:
    model, rows, seen = llama.load_model(), [0, 0], list[tuple[int, int]]()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[-1] > 4:  # not the map's own four tokens
            rows[torch.is_grad_enabled()] += len(ids)

    model.get_submodule("model").register_forward_pre_hook(count, with_kwargs=True)
    options = SMALL | parameters
    context = {"earlier": texts(n_earlier, 9), "progress": lambda *at: seen.append(at)}
    run(llama, tmp_path / "out", options, texts(5, 1), texts(6, 2), model=model, **context)
    planned = planned_passes(GSLoRAEditor(options), 5, 6, n_earlier)
    assert rows == [planned["forward"], planned["forward_backward"]]
    assert seen[-1] == (sum(rows), sum(rows))


def test_parameters_report_every_mistake_without_values() -> None:
    wrong = {"groups": "secret", "rank": 0, "bound": -1, "bounded_over": "secret", "sparsity": -0.1, "ema_decay": 1.0,
             "penalty": "secret", "epochs": 1.5, "bound_tolerance": 1.0, "drop_after": 0, "prototype_bound": "secret",
             "patience": 0, "how": "full", "earlier_weight": -1.0, "earlier_batch_size": 0}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        make_editor("gs_lora", wrong)
    text = str(caught.value)
    assert "secret" not in text
    assert "15 mistakes" in text
    for parameters in ({"include": ["*"], "blocks": [1]}, {"bound": math.inf}, {"learning_rate": -1.0}):
        with pytest.raises(UsageError):
            make_editor("gs_lora", parameters)


def test_what_it_selects() -> None:
    def names(arch: str, **parameters: Any) -> set[str]:
        build: Any = image_classifier if arch in ("vit", "resnet") else causal_lm
        model_map = ModelMap.of(build(arch))
        chosen = make_editor("gs_lora", parameters).selected(model_map)
        return {f"{model_map.role_of(name)}" for name in chosen}

    assert names("llama") == {"gate", "up", "down"}
    assert names("gpt2") == names("vit") == {"up", "down"}
    assert names("phi3") == {"gate_up", "down"}
    assert names("llama", roles=["q", "up"]) == {"q", "up"}
    assert names("llama", include=["*.v_proj.weight"]) == {"v"}
    assert names("mixtral", roles=["q", "v"]) == {"q", "v"}
    with pytest.raises(UnsupportedError, match="stacked experts"):
        names("mixtral")
    with pytest.raises(UsageError, match="linear maps in the blocks for gs_lora"):
        names("resnet")
    with pytest.raises(UsageError, match="from -3 to 2"):
        names("llama", blocks=[3])


def test_the_bounds_of_auto() -> None:
    editor = GSLoRAEditor({})
    assert editor.bound(ModelMap.of(causal_lm("llama"))) == pytest.approx(math.log(96) / 3)
    assert editor.bound(ModelMap.of(image_classifier("vit"))) == pytest.approx(2 * math.log(4))
    assert GSLoRAEditor({"bound": 0}).bound(ModelMap.of(causal_lm("llama"))) == 0


def test_missing_records_and_memory_are_said(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="records to forget for gs_lora"):
        run(llama, tmp_path / "a", SMALL, [], texts(2, 2))
    with pytest.raises(UsageError, match="retain records for gs_lora"):
        run(llama, tmp_path / "b", SMALL, texts(2, 1), [])

    def full(*args: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Trainer, "prepare", full)
    with pytest.raises(ResourceError, match="lower batch_size"):
        run(llama, tmp_path / "c", SMALL, texts(2, 1), texts(2, 2))


def test_what_was_not_reached_is_said(llama: Checkpoint, tmp_path: Path) -> None:
    options = SMALL | {"bound": 50.0, "retain_tolerance": 0.0, "stop_early": True, "sparsity_warm_up": 9}
    result = run(llama, tmp_path / "out", options, texts(3, 1), texts(4, 2))
    assert "3 of 3 records to forget had not reached the bound of 50.00 nats" in result.warnings[0]
    assert "the penalty never began: 4 steps" in result.warnings[-1]


def test_the_presets_and_the_page() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "gs-lora.md").read_text()
    defaults = GSLoRAParameters().model_dump(mode="json")
    assert load_method("gs_lora").parameters == defaults
    for option, default in defaults.items():
        shown = str(default) if type(default) in (int, float) else f"`{json.dumps(default).strip(chr(34))}`"
        assert f"| `{option}` | {shown} |" in page, option
    plus, official = load_method("gs_lora_plus").parameters, load_method("gs_lora_official").parameters
    assert GSLoRAParameters(**plus).plus
    assert {name for name, value in plus.items() if value != defaults[name]} <= {
        "prototype_forget_weight", "prototype_retain_weight"
    }  # fmt: skip
    published = GSLoRAParameters(**official)
    assert (published.penalty, published.bounded_over, published.adapter_scale) == ("published", "batch", 0.125)
    assert not published.plus
    assert not published.earlier_weight


# ----------------------------------------------------------------------------------------------------------- end to end


def test_forget_end_to_end(world: World, tmp_path: Path) -> None:
    request = world.folder / "gs_lora.yaml"
    overrides = "learning_rate: 0.003, epochs: 10"
    text = world.request.read_text().replace("{name: ssd}", f"{{name: gs_lora, overrides: {{{overrides}}}}}")
    request.write_text(text)
    result = forget(request, out=tmp_path / "run")
    assert passed(verify(result.path))
    arms = json.loads((result.path / "compare/paired.json").read_text())["arms"]["probability"]
    assert arms["U"]["value"] < arms["O"]["value"]
    delta = json.loads((result.path / "edit/delta.json").read_text())
    assert 0 < delta["changed_elements"] < delta["total_elements"]
    assert delta["statistics"]["active_groups"] == sum(row["norm"] > 0 for row in delta["statistics"]["groups"])
    assert Group("model.layers.0", 0, ()).block == delta["statistics"]["groups"][0]["block"]
    # What the copy gained over the original is kept where the records are: with it the original can be had back.
    assert {file.name for file in (result.path / "private/adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert not (result.path / "edit/adapter").exists()


def test_what_the_ledger_knows_is_replayed(tmp_path: Path) -> None:
    world = Requests.make(tmp_path / "world")
    found = []
    for name in ("a", "b"):
        request = world.request(name, "e1")
        text = request.read_text()
        edit = text[text.index("method:") : text.index("suite:")]
        request.write_text(
            text.replace(edit, "method: {name: gs_lora, overrides: {steps: 3, earlier_edit_weight: 1.0}}\n")
        )
        result = forget(request, ledger=tmp_path / "store", chain=True)
        assert passed(verify(result.path))
        found.append(json.loads((result.path / "edit/delta.json").read_text())["statistics"])
    assert "earlier" not in found[0]
    assert found[1]["earlier"]["records"] == 2
    assert len(found[1]["earlier"]["loss"]) == 3
    assert "earlier_edits" not in found[0]
    assert found[1]["earlier_edits"]["edits"] == 1
