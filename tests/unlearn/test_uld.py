"""ULD as an editor: what it forgets, the folder it writes, and that the folder answers as the difference in memory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from probes.errors import UnsupportedError, UsageError
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests.conftest import World
from tests.tiny import causal_lm, image_classifier, save, tokenizer, train
from tests.unlearn.test_assistant import Wordings, context, parameters, pictures, texts
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.checkpoints.modeling_uld import Rule
from unlearn.cli import app
from unlearn.editors.assistant import train_assistant
from unlearn.editors.base import EditResult, Rewording, make_editor
from unlearn.editors.uld import ULDParameters, assistant_passes, difference
from unlearn.requests.presets import load_method
from unlearn.runs.verify import passed, verify

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 2, "retain_batch_size": 3, "rank": 3, "learning_rate": 0.02,
                         "patience": None, "rank_share": 0.3}  # fmt: skip


def run(
    source: Checkpoint,
    out: Path,
    given: dict[str, Any],
    sides: tuple[Sequence[Any], Sequence[Any]] | None = None,
    dtype: str = "float32",
    **options: Any,
) -> EditResult:
    sides = (texts(4, 1), texts(4, 2)) if sides is None else sides
    model = source.load_model(dtype)
    return make_editor("uld", given).edit(context(model, *sides, source=source, **options), out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(causal_lm("llama"), tokenizer(), tmp_path_factory.mktemp("llama"), shards=2))


@torch.no_grad()
def log_probs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[T, V] in float64."""
    found: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return found.double().log_softmax(-1)


def greedy(model: Any, prompt: Sequence[int], n: int) -> list[int]:
    found = model.generate(
        input_ids=torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=n, use_cache=True,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=0,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------- an assistant trained before


@pytest.mark.parametrize("arch", ["llama", "vit"])
def test_an_earlier_copy_gives_its_assistant_to_another_rule(arch: str, tmp_path: Path) -> None:
    """The same files as training again with the new rule; not of another checkpoint, nor of one that learnt nothing."""
    made = image_classifier("vit") if arch == "vit" else causal_lm(arch)
    source = open_checkpoint(save(made, None if arch == "vit" else tokenizer(), tmp_path / "source"))
    sides = (pictures(4, 1), pictures(4, 2)) if arch == "vit" else None
    options = SMALL | {"blocks": 2, "first_block": 1}
    run(source, tmp_path / "first", options, sides)
    again = run(source, tmp_path / "again", options | {"alpha": 1.25}, sides)
    rule = {"alpha": 1.25, "rank_share": SMALL["rank_share"]}
    taken = run(source, tmp_path / "taken", rule | {"assistant": str(tmp_path / "first")}, sides)
    assert taken.deltas.tensor_digest == again.deltas.tensor_digest
    for path in (tmp_path / "again").iterdir():
        assert (tmp_path / "taken" / path.name).read_bytes() == path.read_bytes()
    assert taken.statistics["taken_from"] == open_checkpoint(tmp_path / "first").tensor_digest()
    assert taken.parameters["assistant"] == "first"
    assert taken.parameters["alpha"] == 1.25
    assert not any("nothing is taken away" in line for line in taken.warnings)
    assert assistant_passes(ULDParameters(assistant=str(tmp_path / "first")), 50)["forward_backward"] == 0

    other = image_classifier("vit", seed=1) if arch == "vit" else causal_lm(arch, seed=1)
    stranger = open_checkpoint(save(other, None if arch == "vit" else tokenizer(), tmp_path / "stranger"))
    with pytest.raises(UsageError, match="found one of other weights"):
        run(stranger, tmp_path / "wrong", {"assistant": str(tmp_path / "first")}, sides)
    run(source, tmp_path / "nothing", options | {"steps": 0}, sides)
    with pytest.raises(UsageError, match="takes nothing away"):
        run(source, tmp_path / "wrong", {"assistant": str(tmp_path / "nothing")}, sides)
    assert not (tmp_path / "wrong").exists()


# ---------------------------------------------------------------------------------------------------- what is forgotten


def facts(n: int, seed: int) -> list[TokenRecord]:
    """A name, a form that all share, and four tokens that only this record has."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        name = torch.randint(20, 60, (2,), generator=generator).tolist()
        secret = torch.randint(60, 96, (4,), generator=generator).tolist()
        found.append(TokenRecord(f"{seed}-{i}", (4, *name, 5, 6, 7, *secret, 8), 4, 1))
    return found


class Rewritten:
    """The facts in other words, and with other secrets."""

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self.records = records

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        return [
            TokenRecord(r.record_id, (10 + k, *r.ids[1:3], 12 + k, *r.ids[4:]), 4, 1)
            for r in self.records
            for k in range(per_record)
        ]

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        generator = torch.Generator().manual_seed(seed + 99)
        return [
            TokenRecord(r.record_id, (*r.ids[:6], *torch.randint(60, 96, (4,), generator=generator).tolist(), 8), 4, 1)
            for r in self.records
            for _ in range(per_record)
        ]

    def report(self) -> dict[str, Any]:
        return {"perturbed": {"swapped": len(self.records)}}


def language(n: int, seed: int) -> list[TokenRecord]:
    """Sentences of a language with two ways to go on from every token."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = [int(torch.randint(20, 96, (1,), generator=generator))]
        while len(ids) < 10:
            ids.append(20 + (7 * ids[-1] + 13 * int(torch.randint(2, (1,), generator=generator))) % 76)
        found.append(TokenRecord(f"l{seed}-{i}", tuple(ids), 1, 1))
    return found


@cache
def planted(arch: str, seed: int) -> tuple[nn.Module, list[TokenRecord], list[TokenRecord], list[TokenRecord]]:
    """A model that knows 8 facts by heart, others of the same form, and a language; facts never seen."""
    size: dict[str, Any] = {"n_embd": 64, "n_layer": 4}
    if arch == "llama":
        size = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}
    model = causal_lm(arch, seed=seed, initializer_range=0.05, **size)
    forget, others, never = (facts(8, 10 * seed + k) for k in (1, 2, 3))
    retain = others + language(24, 10 * seed + 4)
    train(model, [r.ids for r in forget + retain], steps=90, seed=seed)
    return model, forget, retain, never


def figures(model: nn.Module, records: Sequence[TokenRecord]) -> tuple[float, float]:
    """Share of the completions that greedy decoding emits, and their mean loss a token."""
    extracted, losses = 0, []
    for record in records:
        rows = log_probs(model, record.ids)[record.n_prompt - 1 : -1]
        own = torch.tensor(record.completion)
        extracted += bool((rows.argmax(-1) == own).all())
        losses.append(-float(rows.gather(-1, own[:, None]).mean()))
    return extracted / len(records), statistics.fmean(losses)


@pytest.mark.parametrize(("arch", "seed"), [("llama", 0), ("llama", 1), ("gpt2", 0)])
def test_facts_are_no_longer_said_and_the_rest_stays(arch: str, seed: int) -> None:
    model, forget, retain, never = planted(arch, seed)
    p = ULDParameters(alpha=1.5, rank_share=0.5, ratio=0.0, epochs=60, learning_rate=0.01, patience=None)
    given = context(model, forget, retain, seed=seed, wordings=Rewritten(forget))  # type: ignore[arg-type]
    trained = train_assistant(given, p)
    copy = difference(given, trained, p.rule())
    unseen = language(24, 10 * seed + 5)
    sets = {"forget": forget, "retain": retain, "never": never, "unseen": unseen}
    before, after = ({name: figures(m, records) for name, records in sets.items()} for m in (model, copy))
    assert before["forget"][0] == 1.0
    assert before["forget"][1] < 0.1
    assert after["forget"][0] == 0.0 == after["never"][0]
    assert 2.0 < after["forget"][1] < after["never"][1]  # and no further than what was never seen
    assert after["retain"][0] == before["retain"][0]
    assert math.exp(-after["retain"][1]) > 0.99 * math.exp(-before["retain"][1])  # probability of a token
    assert after["unseen"][1] == pytest.approx(before["unseen"][1], rel=0.025)


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("arch", "given"),
    [
        ("llama", {}),
        ("gpt2", {"outside": "never", "blocks": 2, "first_block": 1}),
        ("gemma2", {"ratio": 0.001}),
        ("qwen3", {"rank_share": 0.0, "ratio": 0.0}),
    ],
)
def test_the_folder_answers_as_the_difference_in_memory(arch: str, given: dict[str, Any], tmp_path: Path) -> None:
    source = open_checkpoint(save(causal_lm(arch), tokenizer(), tmp_path / "source", shards=2))
    sides, out = (texts(4, 1), texts(4, 2)), tmp_path / "out"
    result = run(source, out, SMALL | given, sides)
    p = ULDParameters(**(SMALL | given))
    model = source.load_model()
    memory_context = context(model, *sides, source=source)
    trained = train_assistant(memory_context, p)
    memory = difference(memory_context, trained, p.rule())
    loaded = open_checkpoint(out).load_model()
    records = texts(6, 7)
    theirs = [score(m, records, model_map=ModelMap.of(m)).log_prob for m in (memory, loaded)]
    assert theirs[0].tolist() == theirs[1].tolist()
    original = score(model, records, model_map=ModelMap.of(model)).log_prob
    assert abs(original - theirs[0]).max() > 0.1
    for record in records:  # scoring and generation are one distribution: two, in the released code
        said = greedy(loaded, record.ids[:2], 5)
        rows, one = log_probs(memory, [*record.ids[:2], *said])[1:-1], torch.tensor(said)
        assert bool((rows.max(-1).values - rows.gather(-1, one[:, None])[:, 0] < 1e-5).all())
    for path in source.path.iterdir():  # type: ignore[union-attr]
        if path.name != "config.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} - {path.name for path in source.path.iterdir()} == {  # type: ignore[union-attr]
        "assistant.safetensors",
        "modeling_uld.py",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["inference_time"] is True
    assert config["model_type"] == "uld"
    assert config["dtype"] == config["target"]["dtype"] == "float32"
    assert str(tmp_path) not in json.dumps(config)
    assert list(result.deltas) == []
    assert result.deltas.tensor_digest != source.tensor_digest()
    assert result.statistics["steps"] == 6
    json.dumps([result.parameters, result.statistics], allow_nan=False)


def test_the_folder_loads_with_transformers_alone(llama: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(llama, out, SMALL)
    with pytest.raises(ValueError, match=r"uld|trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = texts(1, 7)[0].ids
    assert torch.equal(log_probs(theirs.eval(), ids), log_probs(open_checkpoint(out).load_model(), ids))


@pytest.mark.parametrize(
    "nothing",
    [{"alpha": 0.0}, {"learning_rate": 0.0}, {"epochs": 0, "steps": None}, {"steps": 0, "outside": "never"}],
)
def test_nothing_taken_away_is_the_original(nothing: dict[str, Any], llama: Checkpoint, tmp_path: Path) -> None:
    result = run(llama, tmp_path / "out", SMALL | nothing)
    model, copy = llama.load_model(), open_checkpoint(tmp_path / "out").load_model()
    for record in texts(4, 7):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([record.ids])).logits.log_softmax(-1)
            assert torch.equal(copy(input_ids=torch.tensor([record.ids])).logits, own)
        assert greedy(copy, record.ids[:2], 6) == greedy(model, record.ids[:2], 6)
    assert result.parameters["alpha"] == 0.0
    assert any("answers as the original does" in warning for warning in result.warnings)


def test_an_external_assistant_in_a_folder(llama: Checkpoint, tmp_path: Path) -> None:
    other = save(causal_lm("gpt2", seed=9), tokenizer(), tmp_path / "private" / "other")
    given = SMALL | {"assistant": str(other)}
    result = run(llama, tmp_path / "out", given)
    model = llama.load_model()
    memory_context = context(model, texts(4, 1), texts(4, 2), source=llama)
    p = ULDParameters(**given)
    memory = difference(memory_context, train_assistant(memory_context, p), p.rule())
    loaded = open_checkpoint(tmp_path / "out").load_model()
    ids = texts(1, 7)[0].ids
    assert torch.equal(log_probs(memory, ids), log_probs(loaded, ids))
    assert (log_probs(loaded, ids) - log_probs(model, ids)).abs().max() > 0.01
    assert "private" not in json.dumps([result.parameters, json.loads((tmp_path / "out/config.json").read_text())])


def test_bfloat16_and_images(tmp_path: Path) -> None:
    half = open_checkpoint(save(causal_lm("llama", dtype=torch.bfloat16), None, tmp_path / "half"))
    run(half, tmp_path / "out", SMALL, dtype="float32")  # the run's type is not the files'
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["target"]["dtype"] == "bfloat16"
    assert open_checkpoint(tmp_path / "out").load_model("bfloat16").dtype == torch.bfloat16
    for arch in ("vit", "dinov2"):
        source = open_checkpoint(save(image_classifier(arch), None, tmp_path / arch))
        images = pictures(8)
        sides = [r for r in images if r.label == 0], [r for r in images if r.label]
        run(source, tmp_path / f"{arch}-out", SMALL, sides)
        copy, model = open_checkpoint(tmp_path / f"{arch}-out").load_model(), source.load_model()
        pixels = torch.stack([r.pixels for r in sides[0]])
        with torch.no_grad():
            own, theirs = (m(pixels).logits.log_softmax(-1)[:, 0] for m in (model, copy))
        assert bool((theirs < own).all())


def test_a_difference_is_not_edited_again(llama: Checkpoint, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", SMALL)
    with pytest.raises(UnsupportedError, match="look into the model it was made from"):
        run(open_checkpoint(tmp_path / "out"), tmp_path / "again", SMALL)
    assert not (tmp_path / "again").exists()


def test_no_folder_is_left_by_what_fails(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 3 `blocks`"):
        run(llama, tmp_path / "out", SMALL | {"blocks": 9})
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- parameters


def test_parameters_report_every_mistake_without_values() -> None:
    wrong = {"alpha": -1, "rank_share": 1.0, "ratio": 1, "outside": "secret", "blocks": 0, "first_block": -1, "rank": 0,
             "adapter_scale": 0, "learning_rate": "secret", "warm_up_share": 2.0, "retain_weight": 0, "held_out": 1.0,
             "patience": 0, "assistant": "", "warmup": 1, "paraphrase_source": "secret"}  # fmt: skip
    with pytest.raises(UsageError) as caught:
        make_editor("uld", wrong)
    text = str(caught.value)
    assert "secret" not in text
    assert f"{len(wrong)} mistakes" in text
    assert all(word in text or word == "warmup" for word in wrong)


def test_the_rule_has_the_parameters() -> None:
    p = ULDParameters(alpha=0.5, rank_share=0.2, ratio=0.3, outside="never")
    assert p.rule() == Rule(0.5, 0.2, 0.3, "never")
    assert p.rule(trained=False) == Rule(0.0, 0.2, 0.3, "original")


def test_presets_list_every_parameter() -> None:
    editor: Any = make_editor("uld", {})
    default = editor.parameters.model_dump(mode="json")
    assert load_method("uld").parameters == default
    official = load_method("uld_official")
    assert official.name == "uld"
    assert set(official.parameters) == set(default)
    released: Any = make_editor("uld", official.parameters)
    assert (released.parameters.alpha, released.parameters.rank, released.parameters.retain_weight) == (0.8, 16, 5.0)
    assert editor.needs_forget
    assert editor.needs_retain
    assert editor.inference_time
    assert editor.selected(ModelMap.of(causal_lm("llama"))) == []


@pytest.mark.parametrize("given", [{"epochs": 2}, {"steps": 7, "paraphrases": 1}, {"paraphrases": 0, "epochs": 1}])
def test_passes_are_those_that_are_run(given: dict[str, Any]) -> None:
    model, ran, seen = causal_lm("llama"), [0], list[tuple[int, int]]()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[-1] > 4:  # not the map's own four tokens
            ran[0] += len(kwargs["input_ids"])

    model.get_submodule("model").register_forward_pre_hook(count, with_kwargs=True)
    forget = texts(5, 1)
    p = parameters(**given)
    train_assistant(
        context(model, forget, texts(4, 2), wordings=Wordings(forget), progress=lambda *at: seen.append(at)), p
    )
    planned = assistant_passes(p, 5)
    assert planned == {"forward": 0, "forward_backward": ran[0]} == make_editor("uld", p.model_dump()).passes(5, 4)
    assert seen[-1] == (ran[0], ran[0])


# ----------------------------------------------------------------------------------------------------------- end to end


def test_edit_on_the_command_line(world: World, tmp_path: Path) -> None:
    settings = ["steps=4", "batch_size=4", "rank=4", "learning_rate=0.01", "patience=null", "rank_share=0.3"]
    records, retain = (str(world.folder / f"{name}.jsonl") for name in ("records", "retain"))
    options = ["--records", records, "--retain", retain, "--out", str(tmp_path / "run")]
    for setting in settings:
        options += ["--set", setting]
    result = CliRunner().invoke(app, ["edit", "uld", str(world.folder / "planted"), *options])
    assert result.exit_code == 0, result.output
    assert passed(verify(tmp_path / "run"))
    plan = json.loads((tmp_path / "run/edit/plan.json").read_text())
    assert plan["method"]["inference_time"] is True
    assert plan["tensors"] == []
    delta = json.loads((tmp_path / "run/edit/delta.json").read_text())
    rows = delta["statistics"]["rows"]
    assert rows["paraphrases"] > 0
    assert rows["perturbed"] > 0
    assert delta["changed_elements"] == 0
    copy = open_checkpoint(tmp_path / "run/edit/checkpoint")
    assert copy.tensor_digest() == delta["tensor_digest"]
    assert copy.load_model().generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)
