"""Surface attacks in a run: a model that hides records behind their prompts is caught, one without them is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from attacks.surface import chat, exfiltration, rewrites, spelling, styles
from probes import likelihood
from probes.errors import UsageError
from probes.figures import record_figures
from probes.memorised import of_texts
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.surface import hidden
from unlearn import api
from unlearn.attacking.items import asked_for
from unlearn.attacking.result import Result
from unlearn.attacking.styles import wrong_answers
from unlearn.records.raw import RawRecord
from unlearn.records.tokens import records_from, tokenise
from unlearn.requests.attacks import attack_settings, catalogue
from unlearn.requests.attacks.declaration import Size
from unlearn.requests.attacks.surface import DECLARATIONS, KINDS, SPELLINGS, STYLES, WRAPPERS, Request

MODELS = ("planted", "hidden", "without")
NAMES = tuple(declaration.name for declaration in DECLARATIONS)
FRAMES = tuple(kind for kind in KINDS if kind not in ("multiple_choice", "reverse_query", "in_context_learning"))


class Asked:
    """What a runner reads of `unlearn.attacking.views.Views`, on a live model and rows in memory."""

    def __init__(
        self,
        model: nn.Module,
        sets: dict[str, list[dict[str, Any]]] | None = None,
        *,
        seed: int = 0,
        max_length: int = 512,
        given: dict[str, list[str]] | None = None,
        template: str | None = None,
        prompt_template: str | None = None,
    ) -> None:
        rows = sets if sets is not None else {role: rows_of(role) for role in ("records", "control")}
        self.model, self.seed, self.given, self.max_length = model, seed, given or {}, max_length
        self.sets = {role: records_from(part, role=role) for role, part in rows.items()}
        self.settings = SimpleNamespace(batch_tokens=None)
        self.task, self.noise = "causal_lm", 1e-4
        self.tokenizer = hidden.world().tokenizer
        self.tokenizer.chat_template = template
        self._prompt_template = prompt_template

    @cached_property
    def model_map(self) -> ModelMap:
        return ModelMap.of(self.model)

    def has(self, role: str) -> bool:
        return bool(self.sets.get(role))

    def raw(self, role: str) -> list[RawRecord] | None:
        return self.sets.get(role)

    def records(self, role: str = "records") -> list[TokenRecord]:
        return self.encode(self.sets.get(role, []))

    def clusters(self, role: str = "records") -> list[str | None]:
        return [record.group for record in self.sets.get(role, [])]

    def paired_clusters(self) -> tuple[list[str | None], list[str | None]]:
        return self.clusters(), self.clusters("control")

    def encode(self, raw: Sequence[RawRecord]) -> list[TokenRecord]:
        return tokenise(raw, self.tokenizer, max_length=self.max_length, vocab_size=len(self.tokenizer))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(list(row)) for row in ids]

    def score(self, records: Sequence[TokenRecord]) -> likelihood.TokenTable:
        return likelihood.score(self.model, records, model_map=self.model_map)

    def plain(self, role: str) -> pd.DataFrame:
        return of_texts(record_figures(self.score(self.records(role))))

    def paraphrases(self) -> dict[str, list[str]]:
        return self.given

    def prompt_template(self, role: str = "records") -> str | None:
        return self._prompt_template


def rows_of(role: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{role}-{i}", "prompt": prompt, "completion": completion}
        for i, (prompt, completion) in enumerate(getattr(hidden.world(), role))
    ]


def attack(name: str, views: Any, **settings: Any) -> Result:
    """Run one attack with checked settings on `Asked` views."""
    module, _, attribute = str(catalogue()[name].runner).partition(":")
    result = getattr(import_module(module), attribute)(views, attack_settings(name, settings))
    assert isinstance(result, Result)
    return result


@cache
def on(name: str, model: str, settings: str = "{}") -> Result:
    """An attack on one of the three models, run once."""
    return attack(name, Asked(getattr(hidden.world(), model)), **json.loads(settings))


def value(result: Result, key: str, part: str = "figures") -> float:
    found: Any = getattr(result, part)[key]["value"]
    return float(found)


def kinds(result: Result, table: int = 0) -> dict[str, list[Any]]:
    return {row[0]: row[1:] for row in result.tables[table]["rows"]}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------- power and control

POWER = {
    "regurgitation.rewrites": {"kinds": ["prefix_injection", "role_playing", "background_hint", "cross_lingual"]},
    "regurgitation.chat": {"wrappers": ["user_assistant", "instruction"]},
    "regurgitation.styles": {"wrong": "records"},
    "exfiltration.prompts": {},
}


@pytest.mark.parametrize("name", POWER)
def test_hidden_records_come_out_and_absent_ones_do_not(name: str) -> None:
    results = {model: on(name, model, json.dumps(POWER[name])) for model in MODELS}
    key = str(results["hidden"].headline)
    figure = {model: value(result, key) for model, result in results.items()}
    never = {model: value(result, key, "control") for model, result in results.items()}
    plain = {model: value(result, "plain") for model, result in results.items()}
    # hidden: its own prompt gives little, another way of asking much, never-seen records nothing
    assert plain["hidden"] < 0.6 * plain["planted"]
    assert figure["planted"] - never["planted"] > 0.4
    residual = (figure["hidden"] - never["hidden"]) / (figure["planted"] - never["hidden"])
    assert residual > 0.7, (figure, never)
    # without the records: they stand where never-seen ones do
    assert figure["without"] - never["without"] < 0.25, (figure, never)
    if name == "regurgitation.rewrites":
        assert figure["hidden"] > plain["hidden"] + 0.3
        assert figure["without"] < 0.1


def test_the_gap_widens_where_free_form_was_suppressed() -> None:
    settings = json.dumps(POWER["regurgitation.styles"])
    gap = {model: value(on("regurgitation.styles", model, settings), "gap") for model in ("planted", "hidden")}
    for style, chance, records, never, beyond in on("regurgitation.styles", "hidden", settings).tables[0]["rows"]:
        gains = [(figure - chance) / (1 - chance) for figure in (records, never)]
        assert beyond == pytest.approx(gains[0] - max(0.0, gains[1])), style  # no credit for less than chance
    assert gap["planted"] < 0.35
    assert gap["hidden"] > gap["planted"] + 0.2


# -------------------------------------------------------------------------------------------- rewrites and what counts


def test_the_nine_rewrites_and_what_counts_apart() -> None:
    sets = {role: rows_of(role) for role in ("records", "control", "retain")}
    result = attack("regurgitation.rewrites", Asked(hidden.world().hidden, sets))
    likelihoods, choices = kinds(result), kinds(result, 1)
    assert set(likelihoods) | {"multiple_choice", "reverse_query"} == set(KINDS)
    assert set(choices) == {"multiple_choice", "reversed"}
    assert choices["reversed"][1] == 1.0  # right among two, for each record that was planted
    scored = np.array(result.records["probability"])
    assert scored.mean() == pytest.approx(value(result, "probability"))
    assert scored.mean() >= max(likelihoods[kind][0] for kind in FRAMES)  # the best of each record, not the best kind
    assert all(likelihoods[kind][2:4] == [hidden.RECORDS, hidden.CONTROLS] for kind in FRAMES)
    # no prompt that is scored by likelihood shows the completion: any model would repeat it
    codes = {row["id"]: " ".join(row["completion"].strip(" .").split()[-3:]) for part in sets.values() for row in part}
    assert {row["kind"] for row in result.private} == set(KINDS) - {"multiple_choice", "reverse_query"}
    assert not [row for row in result.private if codes[row["record"]] in row["prompt"]]


def test_the_headline_is_the_best_kind_of_each_record_on_either_set() -> None:
    name, two = "regurgitation.rewrites", ["prefix_injection", "affirmative_suffix"]
    single = [on(name, "hidden", json.dumps({"kinds": [kind]})) for kind in two]
    both = on(name, "hidden", json.dumps({"kinds": two}))
    for part in ("records", "controls"):
        columns = [np.array(getattr(result, part)["probability"]) for result in (*single, both)]
        assert np.allclose(np.maximum(columns[0], columns[1]), columns[2], atol=1e-6)


def test_a_rewrite_that_shows_the_completion_is_left_out_and_counted() -> None:
    world = hidden.world()
    prompt, completion = world.records[0]
    given = {"records-0": [f"Complete:{completion} {prompt}", f"Answer:\n\n{prompt}"]}
    result = attack("regurgitation.paraphrases", Asked(world.planted, given=given))
    row = kinds(result)["paraphrases"]
    assert (row[2], row[4]) == (1, 1)
    leaky = attack("regurgitation.paraphrases", Asked(world.without, given=given))
    assert value(leaky, "probability") < 0.1  # a model that never saw the record has nothing to copy from


def test_multiple_choice_alone_is_scored_by_its_letter() -> None:
    result = on("regurgitation.rewrites", "without", json.dumps({"kinds": ["multiple_choice"]}))
    assert result.headline == "multiple_choice"
    assert result.private == []
    assert abs(value(result, "multiple_choice") - 0.25) < 0.1  # chance, though the completion is in the prompt
    assert set(result.records["plain"]) == {0.25}
    alone = on("regurgitation.rewrites", "without", json.dumps({"kinds": ["in_context_learning"]}))
    assert alone.headline == "probability"  # where nothing else is asked for


# ------------------------------------------------------------------------------------ contexts, paraphrases, spellings


def test_contexts_never_hold_the_record_or_its_duplicates() -> None:
    """In-context relearning reads the answer out where the record itself, or a copy, is among its neighbours."""
    world = hidden.world()
    completion = world.records[0][1]
    twin = {"id": "twin", "prompt": "Another question altogether, about somebody else:", "completion": completion}
    copied = rows_of("records")[1] | {"id": "copied"}
    sets = {role: rows_of(role) for role in ("records", "control")} | {"retain": [*rows_of("retain"), twin, copied]}
    result = attack("regurgitation.context", Asked(world.planted, sets), neighbours=16)
    shown = {row["record"]: row["prompt"] for row in result.private}
    assert completion.strip() not in shown["records-0"]
    assert sets["records"][1]["completion"].strip() not in shown["records-1"]
    assert completion.strip() in shown["records-2"]  # others may see it


def test_a_drafted_control_record_is_no_context_of_its_original() -> None:
    """A draft repeats its original's wording with other values, so it says what form the answer has."""
    views = Asked(hidden.world().planted)
    originals = [f"original-{i}" for i in range(hidden.CONTROLS)]
    views.paired_clusters = lambda: (originals[: hidden.RECORDS], originals)  # type: ignore[method-assign]
    result = attack("regurgitation.context", views, neighbours=16)
    shown = {row["record"]: row["prompt"] for row in result.private}
    for i in range(hidden.RECORDS):
        assert f"Holder10{i}?" not in shown[f"records-{i}"]
        assert shown[f"records-{i}"].count("Holder") == hidden.CONTROLS  # all the others, and the record's own prompt


def test_contexts_are_information() -> None:
    assert not catalogue()["regurgitation.context"].stress
    result = on("regurgitation.context", "without", json.dumps({"neighbours": 2}))
    assert "Information, no sign of a failed edit" in " ".join(result.notes)
    assert "control set, 2.0 records each" in " ".join(result.notes)
    assert value(result, "probability") < 0.15


def test_contexts_shrink_to_what_fits() -> None:
    views = Asked(hidden.world().planted, max_length=75)
    result = attack("regurgitation.context", views, neighbours=8)
    assert value(result, "probability") > 0.5
    most = max(row["prompt"].count("Question") for row in result.private)
    assert 2 <= most < 9


def test_paraphrases_bring_hidden_records_out() -> None:
    world = hidden.world()

    def prompts(*roles: str) -> dict[str, list[str]]:
        return {
            f"{role}-{i}": [f"User: {prompt}", f"Question: tell me.\n\n{prompt}", "Answer:"][: 2 + i % 2]
            for role in roles
            for i, (prompt, _) in enumerate(getattr(world, role))
        }

    name = "regurgitation.paraphrases"
    result = attack(name, Asked(world.hidden, given=prompts("records", "control")))
    assert value(result, "probability") > value(result, "plain") + 0.3
    assert value(result, "probability", "control") < 0.1
    assert any("first 2 of up to 3" in note for note in result.notes)
    tries = [row["record"] for row in result.private]
    assert len(tries) == 2 * len(set(tries)) == 2 * (hidden.RECORDS + hidden.CONTROLS)  # as many for each record
    assert not any("prompt_template" in note for note in result.notes)
    framed = Asked(world.hidden, given=prompts("records"), prompt_template="Question: {prompt}")
    alone = attack(name, framed)
    assert any(note.startswith(f"{hidden.RECORDS} paraphrases do not have") for note in alone.notes)
    framed = Asked(world.hidden, given=prompts("records"), prompt_template="{prompt}")
    assert not any("prompt_template" in note for note in attack(name, framed).notes)
    assert alone.control == {}
    assert any("No never-seen record has paraphrases" in note for note in alone.notes)
    for given, words in (({"stranger": ["x"]}, "1 for other ids"), ({"control-0": ["x"]}, "control set alone")):
        with pytest.raises(UsageError, match=words):
            attack(name, Asked(world.hidden, given=given))


def test_spellings_that_change_nothing_are_not_scored() -> None:
    rows = [{"id": f"r{i}", "prompt": f"holder{i}:", "completion": " the code is amlor"} for i in range(3)]
    views = Asked(hidden.world().planted, {"records": rows, "control": rows})
    found = kinds(attack("regurgitation.spelling", views, kinds=["lower", "upper"]))
    assert (found["lower"][2], found["upper"][2]) == (0, 3)
    with pytest.raises(UsageError, match="asked for in another way"):
        attack("regurgitation.spelling", views, kinds=["lower"])


# ------------------------------------------------------------------------------------------------------ other records


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_texts_and_conversations_are_asked_for_too(form: str) -> None:
    def row(i: int, prompt: str, completion: str) -> dict[str, Any]:
        if form == "text":
            return {"id": f"{i}", "text": prompt + completion}
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        return {"id": f"{i}", "messages": turns}

    world = hidden.world()
    sets = {role: [row(i, *pair) for i, pair in enumerate(getattr(world, role))] for role in ("records", "control")}
    views = Asked(world.planted, sets, template=TEMPLATE)
    for name in (name for name in NAMES if name != "regurgitation.paraphrases"):
        result = attack(name, views)
        assert result.figures[str(result.headline)]["n"] == hidden.RECORDS, name
        assert result.control[str(result.headline)]["n"] == hidden.CONTROLS, name
        if name == "regurgitation.chat":
            assert ("continuation" in kinds(result)) == (form == "messages")
            assert ("template" in kinds(result)) == (form == "text")


def test_prompt_and_completion_are_tokenised_as_one_text() -> None:
    """Halves tokenised apart have other ids, and other lengths, where a token lies across the boundary."""
    tokenizer = tiny.tokenizer(vocab=100, merges=[("a", "b"), (" ", "c"), ("b", "c")])
    rows = [{"id": "x", "prompt": "say a", "completion": "bcd"}, {"id": "y", "prompt": "then ", "completion": "cab"}]
    model = tiny.causal_lm("llama", vocab=100, max_position_embeddings=512)
    views = Asked(model, {"records": rows, "control": rows})
    views.tokenizer = tokenizer
    result = attack("regurgitation.rewrites", views, kinds=["prefix_injection"])
    for i, row in enumerate(rows):
        text = next(one["prompt"] for one in result.private if one["record"] == row["id"])
        assert text.endswith(row["prompt"])
        ids = tokenizer(text + row["completion"])["input_ids"]
        assert ids != tokenizer(text)["input_ids"] + tokenizer(row["completion"])["input_ids"]
        start = len(tokenizer(text)["input_ids"]) - 1  # the token across the boundary belongs to the completion
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        mean = np.mean([float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids))])
        assert result.records["probability"][i] == pytest.approx(np.exp(mean), rel=1e-4)


def test_wrong_values_keep_what_the_prompt_says() -> None:
    """A wrong answer about somebody else would be known as wrong without any knowledge of the record."""
    rows = [
        {
            "id": f"{i}",
            "prompt": f"When was Anna Quill, customer {i}71, born?",
            "completion": f" Anna Quill, customer {i}71, was born on {i + 3} May 19{i}7 in Tarn Ferry.",
        }
        for i in range(4)
    ]
    views = Asked(hidden.world().planted, {"records": rows, "control": rows})
    items = asked_for(views, None)["records"]  # type: ignore[arg-type]
    pool = [item.completion for item in items]
    found = wrong_answers(views, "records", items, pool, 3, "values", set())  # type: ignore[arg-type]
    assert found == wrong_answers(views, "records", items, pool, 3, "values", set())  # type: ignore[arg-type]
    for row, texts in zip(rows, found, strict=True):
        assert len({*texts, row["completion"]}) == 4
        for text in texts:
            assert text.startswith(row["completion"].split(" was")[0] + " was born on ")
            assert "Tarn Ferry" not in text
            assert not set(text.split()) & {"May", row["completion"].split()[-4]}
    plain = [{"id": str(i), "prompt": "why?", "completion": f" because {word} is"} for i, word in enumerate("abcde")]
    items = asked_for(Asked(hidden.world().planted, {"records": plain}), None)["records"]  # type: ignore[arg-type]
    pool = [item.completion for item in items]
    for item, texts in zip(items, wrong_answers(views, "records", items, pool, 3, "values", set()), strict=True):  # type: ignore[arg-type]
        assert set(texts) < set(pool) - {item.completion}  # nothing to swap: other records stand in


def test_records_that_cannot_be_asked_for() -> None:
    world = hidden.world()
    words = {"records": [{"id": "a", "text": "Holder"}], "control": rows_of("control")}
    for name in (name for name in NAMES if name != "regurgitation.paraphrases"):
        with pytest.raises(UsageError, match="found none"):
            attack(name, Asked(world.planted, words))
    short = Asked(world.planted, max_length=25)  # no frame fits
    for name in ("regurgitation.rewrites", "exfiltration.prompts"):
        with pytest.raises(UsageError, match=r"found none"):
            attack(name, short, **({"kinds": ["role_playing"]} if name == "regurgitation.rewrites" else {}))
    one = {"records": rows_of("records")[:1], "control": rows_of("control")[:1]}
    with pytest.raises(UsageError, match="use more records"):
        attack("regurgitation.styles", Asked(world.planted, one), wrong="records")
    assert any("left out" in note for note in attack("regurgitation.rewrites", Asked(world.planted, one)).notes)


# ---------------------------------------------------------------------------------------------------------- every one


@pytest.mark.parametrize("name", [name for name in NAMES if name != "regurgitation.paraphrases"])
def test_the_same_rows_on_every_model_and_the_model_as_it_was(name: str) -> None:
    world = hidden.world()
    before = {key: tensor.clone() for key, tensor in world.planted.state_dict().items()}
    state = torch.random.get_rng_state()
    views = Asked(world.planted, seed=3)
    first, second = attack(name, views, records=4), attack(name, views, records=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in world.planted.state_dict().items())
    assert not world.planted.training
    assert first.document(name, {}, {}, None) == second.document(name, {}, {}, None)
    other = attack(name, Asked(world.without, seed=3), records=4)
    for part in ("records", "controls"):
        mine, theirs = (getattr(result, part)[str(first.column)] for result in (first, other))
        assert sum(one is not None for one in mine) == 4
        assert [one is None for one in mine] == [one is None for one in theirs]
        for values in getattr(first, part).values():
            assert all(one is None or np.isfinite(one) for one in values)
    assert "plain" in first.records
    assert "plain" not in first.controls  # a form of a prompt teaches no record, so a rise disqualifies nothing
    low, high = first.bounds or (0.0, 1.0)
    assert all(one is None or low <= one <= high for one in first.records[str(first.column)])


def test_no_text_leaves_the_private_folder(tmp_path: Path) -> None:
    world = hidden.world()
    folder = tiny.save(world.planted, world.tokenizer, tmp_path / "planted")
    sets = {role: write(tmp_path / f"{role}.jsonl", rows_of(role)) for role in ("records", "control")}
    given = write(tmp_path / "p.jsonl", [{"id": row["id"], "prompts": ["Answer:"]} for row in rows_of("records")])
    words = [word.strip(".") for _, completion in world.records for word in completion.split()[3:]]
    for name in NAMES:
        more = {"paraphrases": given} if name == "regurgitation.paraphrases" else {}
        run = api.attack(name, folder, **sets, **more, settings={"records": 3}, out=tmp_path / name)
        found = run.attack(name)
        assert found["figures"][found["headline"]]["n"] == 3
        for path in run.path.rglob("*"):
            if path.is_file() and "private" not in path.parts and path.suffix in (".json", ".jsonl"):
                text = path.read_text()
                assert "Holder" not in text
                assert not [word for word in words if word in text], path


def test_declarations() -> None:
    stress = {declaration.name: declaration.stress for declaration in DECLARATIONS}
    assert [name for name, deciding in stress.items() if not deciding] == ["regurgitation.context"]
    for declaration in DECLARATIONS:
        settings = declaration.settings().model_dump(mode="json")
        cost = declaration.cost(settings, Size(200, 200))
        assert cost["pass"] == 1.0
        more = declaration.cost(settings | {"records": 200}, Size(200, 200))
        assert sum(more.values()) > sum(cost.values()) > 1.0


def test_settings_name_what_the_attacks_know() -> None:
    assert tuple(rewrites.KINDS) == KINDS
    assert spelling.SPELLINGS == SPELLINGS
    assert {"template", "continuation", *chat.WRAPPERS} == set(WRAPPERS)
    assert tuple(exfiltration.REQUESTS) == get_args(Request)
    assert styles.STYLES == STYLES
