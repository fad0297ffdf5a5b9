"""Attacks in a run: every attack of the shipped suites on a checkpoint with a known truth, and the commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from probes.errors import IntegrityError, UsageError
from tests.conftest import World, _rows
from unlearn import api
from unlearn.requests.attacks import BUILT_IN, NEEDS, catalogue
from unlearn.requests.presets import load_suite
from unlearn.runs.verify import passed, verify

# Settings under which an attack takes a moment; those not named here run with their defaults.
SMALL: dict[str, dict[str, Any]] = {
    "verbatim.sampled": {"schemes": [{}, {"top_k": 5}], "samples": [1, 10]},
    "verbatim.sweep": {"starts": 2, "window": 8},
    "near_verbatim.mass": {"records": 2, "width": 4, "distance": 1, "samples": 10},
    "exposure.canaries": {"n": 20},
    "untargeted.sampling": {"n": 8, "length": 12, "window": 6, "minimum": 6, "top": 4},
    "pii.extraction": {"n": 8, "length": 12},
    "pii.reconstruction": {"draws": 2},
    "template.extraction": {"n": 6, "length": 12, "embedder": "model"},
    "compression.adversarial": {"records": 1, "steps": 2, "candidates": 4, "tokens": 6},
    "membership.dataset": {"splits": 3},
    "memory.counterfactual": {"runs": 4, "epochs": 1, "batch": 32},
    "privacy_bound.one_run": {"randomised": True},
    "regurgitation.rewrites": {"records": 4},
    "regurgitation.spelling": {"records": 4},
    "regurgitation.chat": {"records": 4},
    "regurgitation.context": {"records": 4},
    "regurgitation.styles": {"records": 4},
    "exfiltration.prompts": {"records": 2, "requests": ["verbatim"]},
    "recovery.relearning": {"steps": 2, "marks": [1], "scored": 8},
    "recovery.retain_tuning": {"steps": 2, "marks": [1], "scored": 8},
    "recovery.savings": {"steps": 2, "every": 1, "records": 4},
    "elicitation.soft_prompt": {"steps": 2, "scored": 8},
    "elicitation.embedding": {"marks": [1], "scored": 8},
    "elicitation.images": {"marks": [1], "scored": 16},
    "elicitation.suffix": {"length": 2, "steps": 2, "candidates": 4, "top_k": 4, "scored": 4},
    "hidden_knowledge.probe": {"records": 8, "layers": 1},
    "hidden_knowledge.steering": {"records": 8, "layers": 1, "coefficients": [1.0]},
    "collateral.generation": {"records": 2, "length": 8},
    "collateral.refusals": {"records": 2, "length": 8},
}
# what this world cannot have: a request in front of a record, in a model of few positions, and benchmarks by name
REFUSED = {"exfiltration.prompts": "too long for the model", "collateral.lm_eval": "expected tasks"}
RUNNERS = [declaration.name for declaration in BUILT_IN if declaration.runner]
SUITES = ("quick", "standard", "deep")
CONTRACT = {
    "schema", "attack", "settings", "status", "reason", "headline", "figures", "control", "titles", "not_resolvable",
    "curves", "tables", "column", "confounded", "cost", "notes",
}  # fmt: skip
OWN = {"bounds", "pvalue", "pvalue_holm"}  # kept beside the contract for residuals and Holm's adjustment
FIGURE = {"value", "unit", "n", "ci_low", "ci_high", "ci_level", "direction"}


@dataclass(frozen=True)
class Given:
    """Files of one audit: 8 planted records and others, as many never seen, and what single attacks need."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def extras(self) -> dict[str, Path]:
        return {name: getattr(self, name) for name in ("corpus", "canaries", "candidates")}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def suite_file(path: Path, names: Sequence[str], **more: Any) -> Path:
    document = {
        "schema": "unlearn.suite/v1",
        "name": "own",
        "description": "for tests",
        "noise_floor": {"records": 4},
        "attacks": [{"name": name} | SMALL.get(name, {}) for name in names],
    }
    path.write_text(yaml.safe_dump(document | more))
    return path


@pytest.fixture(scope="module")
def given(world: World, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    planted = [json.loads(line) for line in world.records.read_text().splitlines()]
    mail, never = (
        [{"id": f"{name}-{i}", "prompt": f"Mail of no {i}:", "completion": f" {name}{i}@example.org"} for i in range(6)]
        for name in "az"
    )
    records = planted + _rows(28, 40) + mail
    write(folder / "records.jsonl", records)
    write(folder / "control.jsonl", _rows(100, 46) + never)
    years = [row["completion"].split(",")[0][-4:] for row in planted]
    write(folder / "candidates.jsonl", [{"id": row["id"], "candidates": sorted(set(years))} for row in planted])
    first = planted[0]["completion"].split(",")[0]
    day, month, year = first.split()
    canary = {"prompt": planted[0]["prompt"], "format": f" {day} {month} {{digits:{len(year)}}}", "secret": first}
    unseen = {"prompt": "Nobody here:", "format": " {digits:3}", "secret": " 417"}
    write(folder / "canaries.jsonl", [{"id": "seen"} | canary, {"id": "unseen"} | unseen])
    corpus = [
        {"id": "copy", "prompt": planted[0]["prompt"], "completion": planted[0]["completion"]},
        {"id": "near", "text": planted[1]["prompt"] + " -- " + planted[1]["completion"]},
        {"id": "other", "text": "Something else altogether, from another place and time."},
    ]
    write(folder / "corpus.jsonl", corpus)
    asked = [{"id": row["id"], "prompts": [row["prompt"].upper(), f"Of {row['prompt']}"]} for row in planted]
    write(folder / "paraphrases.jsonl", asked)
    return Given(folder)


@pytest.fixture(scope="module")
def full(given: Given) -> Path:
    """A suite of every attack of the catalogue, deep's order first."""
    names = [entry["name"] for entry in load_suite("deep").model_dump(mode="json")["attacks"]]
    return suite_file(given.folder / "full.yaml", [*names, *(n for n in catalogue() if n not in names)])


@pytest.fixture(scope="module")
def audited(world: World, given: Given, full: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARN_CACHE", str(given.folder / "cache"))  # an empty store
        return api.audit(
            world.planted,
            given.records,
            control=given.control,
            retain=world.retain,
            reference=world.base,
            suite=full,
            out=tmp_path_factory.mktemp("attacked") / "run",
            **given.extras(),
        )


def documents(run: api.Run, stage: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((run.path / stage / "attacks").glob("*.json"))}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


# ------------------------------------------------------------------------------------------------- the whole catalogue


def test_every_attack_of_every_suite_runs_or_says_why_not(audited: api.Run, full: Path) -> None:
    listed = {entry["name"] for entry in yaml.safe_load(full.read_text())["attacks"]}
    for suite in SUITES:
        assert {entry["name"] for entry in load_suite(suite).model_dump(mode="json")["attacks"]} <= listed
    images_only = {d.name for d in BUILT_IN if d.tasks == ("image_classification",)}
    rows = {row["name"]: row for row in audited.metrics("before")["attacks"]}
    assert set(rows) == listed
    for name, row in rows.items():
        expected = "not defined for this kind of model" if name in images_only else None
        if name not in RUNNERS:
            expected = "not part of this version"
        for need in ("edited", "paraphrases", "related"):  # an audit has none of them
            if name in RUNNERS and need in catalogue()[name].needs:
                expected = f"it needs {NEEDS[need]}"
        for refused, words in REFUSED.items():
            if name == refused:
                expected = row["reason"]
                assert words in row["reason"]
        assert row["reason"] == expected, name
        assert row["status"] == ("not_run" if expected else "run"), name
        assert row["detail"] == (row["status"] == "run"), name
    assert set(documents(audited, "before")) == {name for name, row in rows.items() if row["detail"]}
    assert passed(verify(audited.path))


def test_the_reference_is_attacked_too_and_says_what_makes_no_sense_there(audited: api.Run) -> None:
    rows = {row["name"]: row for row in audited.metrics("reference")["attacks"]}
    for name in RUNNERS:
        declaration = catalogue()[name]
        if declaration.once:
            assert "does not depend on the model" in rows[name]["reason"]
        elif "reference" in declaration.needs:
            assert rows[name]["reason"] == "this is the reference"
        elif "causal_lm" in declaration.tasks and not {"edited", "paraphrases", "related"} & {*declaration.needs}:
            assert rows[name]["status"] == "run" or name in REFUSED, rows[name]


@pytest.mark.parametrize("stage", ["before", "reference"])
def test_documents_keep_to_the_contract(audited: api.Run, stage: str) -> None:
    found = documents(audited, stage)
    assert found
    for name, document in found.items():
        assert set(document) == CONTRACT | OWN, name
        assert document["schema"] == "unlearn.attack/v1"
        assert document["attack"] == name
        assert document["status"] == "run"
        assert document["reason"] is None
        assert "name" not in document["settings"]
        for key, value in leaves(document):
            assert value is None or isinstance(value, (str, bool, int, float)), key
            assert not isinstance(value, float) or math.isfinite(value), (name, key)
        figures = document["figures"] | {f"control {key}": value for key, value in document["control"].items()}
        for key, figure in figures.items():
            assert set(figure) == FIGURE, (name, key)
            assert figure["direction"] in ("higher", "lower", "none")
            assert figure["n"] >= 0
            assert isinstance(figure["value"], (int, float)), (name, key)
            low, high = figure["ci_low"], figure["ci_high"]
            if low is not None and high is not None:
                assert low <= figure["value"] <= high, (name, key)
        keys = {*document["figures"], *document["control"], *document["not_resolvable"]}
        assert keys <= set(document["titles"]), name
        assert not set(document["figures"]) & set(document["not_resolvable"]), name
        assert keys, f"{name} gives nothing"
        assert all(isinstance(text, str) and text.strip() for text in document["not_resolvable"].values())
        for curve in document["curves"]:
            assert set(curve) == {"kind", "title", "x", "y", "series"}
            assert curve["kind"] in ("roc", "line")
            assert curve["x"]["scale"] in ("log", "linear")
            assert curve["series"]
            for series in curve["series"]:
                assert set(series) == {"name", "x", "y", "low", "high"}
                assert len(series["x"]) == len(series["y"]) > 0
        for table in document["tables"]:
            assert set(table) == {"title", "columns", "rows"}
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), name


def test_per_record_columns_are_in_order_under_pseudonyms(audited: api.Run) -> None:
    for role in ("records", "control"):
        frame = pd.read_parquet(audited.path / "before" / "attacks" / f"{role}.parquet")
        plain = pd.read_parquet(audited.path / "before" / f"{role}.parquet")
        assert list(frame["record_id"]) == list(plain["record_id"])
        assert frame["record_id"].str.fullmatch(r"r-[0-9a-f]{16}").all()
        for column in frame.columns.drop("record_id"):
            name, _, own = column.partition(":")
            assert name in RUNNERS
            if own == "hit":  # None where the attack did not score a record
                assert frame[column].dropna().isin([True, False]).all(), column
            else:
                assert pd.api.types.is_numeric_dtype(frame[column]) or frame[column].isna().all(), column
    mine = documents(audited, "before")
    frame = pd.read_parquet(audited.path / "before" / "attacks" / "records.parquet")
    for name, document in mine.items():
        if document["column"] is not None:
            values = frame[f"{name}:{document['column']}"].astype(float)
            assert values.mean() == pytest.approx(document["figures"][document["headline"]]["value"], abs=1e-9), name


def test_what_was_planted_is_found_and_what_was_not_is_not(audited: api.Run) -> None:
    found = documents(audited, "before")
    frame = pd.read_parquet(audited.path / "before" / "attacks" / "records.parquet")
    for name in ("verbatim.greedy", "verbatim.sweep", "near_verbatim.greedy"):
        assert frame[f"{name}:hit"][:8].all(), name
        assert not frame[f"{name}:hit"][-6:].any(), name
    assert found["verbatim.greedy"]["control"]["emitted"]["value"] == 0
    assert found["pii.inference"]["figures"]["top_1"]["value"] >= 0.9
    exposed, unseen = found["exposure.canaries"]["tables"][0]["rows"]  # the most exposed one first
    assert exposed[3] == 1 / 21
    assert unseen[3] > exposed[3]
    assert documents(audited, "reference")["verbatim.greedy"]["figures"]["emitted"]["value"] == 0
    assert frame["duplicates.corpus:hit"].tolist().count(True) == 1
    assert frame["duplicates.corpus:hit"][1]


def test_what_a_model_is_read_off_twice_is_made_once(audited: api.Run) -> None:
    found = documents(audited, "before")
    loss, plain = found["membership.loss"], pd.read_parquet(audited.path / "before" / "records.parquet")
    frame = pd.read_parquet(audited.path / "before" / "attacks" / "records.parquet")
    assert frame["membership.loss:score"].to_numpy() == pytest.approx(-plain["loss"].to_numpy())
    assert loss["figures"]["auc"]["n"] == len(plain) + 52
    other = pd.read_parquet(audited.path / "reference" / "records.parquet")
    ratio = (other["loss"] - plain["loss"]).to_numpy()
    assert frame["membership.reference:score"].to_numpy() == pytest.approx(ratio, abs=1e-9)


def test_holm_adjusts_the_pvalues_of_membership_scores(audited: api.Run) -> None:
    found = documents(audited, "before")
    raw = {name: d["pvalue"] for name, d in found.items() if d["pvalue"] is not None}
    adjusted = {name: d["pvalue_holm"] for name, d in found.items() if d["pvalue_holm"] is not None}
    assert set(raw) == set(adjusted) >= {"membership.loss", "membership.rmia"}
    running = 0.0
    for place, (name, pvalue) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, pvalue * (len(raw) - place)))
        assert adjusted[name] == pytest.approx(running)


def test_the_report_gives_every_attack_its_figure_or_a_reason(audited: api.Run) -> None:
    report = json.loads((audited.path / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["attacks"]}
    found = documents(audited, "before")
    assert set(found) <= set(rows)
    for name, document in found.items():
        if document["headline"] in document["figures"]:
            value = document["figures"][document["headline"]]["value"]
            assert rows[name]["arms"]["O"]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert set(report["run"]["attacks"]["before"]) == set(found)


# ---------------------------------------------------------------------------------------------------- the same bytes


def attack_files(run: api.Run, stages: Sequence[str] = ("before", "reference")) -> dict[str, bytes]:
    paths = [path for stage in stages for path in sorted((run.path / stage).rglob("*")) if path.is_file()]
    paths += sorted((run.path / "compare").iterdir()) + sorted((run.path / "report").iterdir())
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("store", ["warm", "off"])
def test_same_inputs_same_bytes_with_and_without_the_store(
    store: str,
    audited: api.Run,
    world: World,
    given: Given,
    full: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(given.folder / "cache") if store == "warm" else "")
    again = api.audit(
        world.planted,
        given.records,
        control=given.control,
        retain=world.retain,
        reference=world.base,
        suite=full,
        out=tmp_path / "elsewhere",
        **given.extras(),
    )
    expected, found = attack_files(audited), attack_files(again)
    assert set(found) == set(expected)
    assert len(found) > 60
    assert [name for name in found if found[name] != expected[name]] == []


LANGUAGE = (
    "verbatim.greedy", "verbatim.sampled", "verbatim.strength", "recollection.probability", "near_verbatim.greedy",
    "membership.blind", "membership.loss", "membership.rmia", "membership.lowercase", "membership.dataset",
    "memory.recognition", "memory.bits", "untargeted.sampling", "duplicates.corpus",
)  # fmt: skip


@pytest.fixture(scope="module")
def request_file(world: World, given: Given) -> Path:
    suite_file(world.folder / "forget-suite.yaml", LANGUAGE, confirm=False)
    text = world.request.read_text().replace("suite: quick", "suite: forget-suite.yaml")
    path = world.folder / "attacked.yaml"
    path.write_text(text + f"corpus: {{path: {given.corpus}}}\n")
    return path


@pytest.fixture(scope="module")
def forgotten(request_file: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    return api.forget(request_file, out=tmp_path_factory.mktemp("attacked") / "forgotten")


def test_a_run_stopped_in_its_attacks_resumes_to_the_same_bytes(
    forgotten: api.Run, request_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.attacking import run as engine

    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))
    real = engine._call

    def stopping(stage: str, name: str) -> Any:
        def call(declaration: Any, views: Any, entry: dict[str, Any]) -> Any:
            if (views.stage, declaration.name) == (stage, name):
                raise KeyboardInterrupt
            return real(declaration, views, entry)

        return call

    out = tmp_path / "run"
    for stage, name in (("before", "untargeted.sampling"), ("after", "membership.dataset")):
        monkeypatch.setattr(engine, "_call", stopping(stage, name))
        with pytest.raises(KeyboardInterrupt):
            api.forget(resume=out) if out.exists() else api.forget(request_file, out=out)
        assert not (out / stage / "metrics.json").exists()
    monkeypatch.setattr(engine, "_call", real)
    resumed = api.forget(resume=out)
    stages = ("before", "reference", "after")
    expected, found = attack_files(forgotten, stages), attack_files(resumed, stages)
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert set(found) == set(expected)
    assert passed(verify(resumed.path))


# ------------------------------------------------------------------------------------------------------- after an edit


def test_every_arm_and_residual_of_an_attack(forgotten: api.Run) -> None:
    paired = json.loads((forgotten.path / "compare" / "paired.json").read_text())["attacks"]
    before, after, reference = (documents(forgotten, stage) for stage in ("before", "after", "reference"))
    assert {"membership.blind", "duplicates.corpus"} <= set(before)
    assert not {"membership.blind", "duplicates.corpus"} & set(after)  # they do not look at the model
    for name in after:
        headline = after[name]["headline"]
        arms = paired[name]["arms"]
        if headline not in after[name]["figures"]:
            assert headline in after[name]["not_resolvable"]
        assert arms["O"] == before[name]["figures"].get(headline)
        assert arms["U"] == after[name]["figures"].get(headline)
        assert arms["N"] == after[name]["control"].get(headline)
        assert arms["R"] == reference.get(name, {}).get("figures", {}).get(headline)
    for name in ("verbatim.greedy", "recollection.probability", "near_verbatim.greedy"):
        arms, residual = paired[name]["arms"], paired[name]["residual"]
        assert residual["status"] == "ok"
        ratio = (arms["U"]["value"] - arms["N"]["value"]) / (arms["O"]["value"] - arms["N"]["value"])
        assert residual["value"] == pytest.approx(ratio)
        assert residual["ci_low"] <= residual["value"] <= residual["ci_high"]
    assert paired["memory.bits"]["residual"]["status"] == "not testable"
    assert paired["duplicates.corpus"]["arms"]["U"] is None


def test_the_edit_is_seen_by_the_attacks(forgotten: api.Run) -> None:
    before, after = documents(forgotten, "before"), documents(forgotten, "after")
    for name in ("verbatim.greedy", "recollection.probability", "near_verbatim.greedy", "memory.bits"):
        headline = before[name]["headline"]
        assert after[name]["figures"][headline]["value"] < before[name]["figures"][headline]["value"], name


def test_an_audit_has_no_residuals(audited: api.Run) -> None:
    paired = json.loads((audited.path / "compare" / "paired.json").read_text())["attacks"]
    assert set(paired) == set(documents(audited, "before"))
    assert all(row["residual"] is None and row["arms"]["U"] is None for row in paired.values())
    assert paired["verbatim.greedy"]["arms"]["N"]["value"] == 0


# -------------------------------------------------------------------------------------------------------------- budget


def entries(names: Sequence[str]) -> list[dict[str, Any]]:
    from unlearn.requests.attacks import attack_settings

    return [attack_settings(name, SMALL.get(name, {})) for name in names]


def test_passes_are_shared_and_never_more_than_alone() -> None:
    import random

    from unlearn.requests.attacks import Size, passes

    draw = random.Random(0)
    every = entries(RUNNERS)
    for _ in range(200):
        some = draw.sample(every, draw.randint(1, len(every)))
        size = Size(draw.randint(1, 500), draw.randint(0, 500), draw.uniform(1, 300), draw.randint(0, 20))
        shared, alone = passes(some, size)
        assert 0 <= shared <= alone + 1e-9
        assert passes(some[:-1], size)[0] <= shared + 1e-9
        assert passes(some[::-1], size)[0] == pytest.approx(shared)
        assert passes([*some, *some], size)[0] == pytest.approx(shared)
    one = passes(entries(["verbatim.greedy"]), Size(100, 100))[0]
    assert one == 1
    free = (
        "verbatim.sampled", "verbatim.strength", "recollection.probability", "membership.blind", "membership.loss",
        "membership.zlib", "membership.min_k", "membership.min_k_plus_plus", "membership.surprising",
        "membership.reference", "membership.windows", "membership.rmia", "membership.flagged", "membership.dataset",
        "memory.recognition", "memory.bits", "privacy_bound.one_run", "duplicates.corpus",
    )  # fmt: skip
    assert passes(entries(["verbatim.greedy", *free]), Size(100, 100)) == (1.0, 1.0 + len(free) - 2)
    drawn = passes(entries(["untargeted.sampling", "pii.extraction"]), Size(100, 100))
    assert drawn[0] == passes(entries(["untargeted.sampling"]), Size(100, 100))[0]  # the same samples


def test_a_budget_takes_attacks_in_order_as_far_as_it_goes() -> None:
    from unlearn.requests.attacks import Size, passes, within

    size = Size(100, 100)
    names = ["verbatim.sweep", "membership.lowercase", "membership.gradient_norm", "membership.loss"]
    chosen = entries(names)
    assert within(chosen, size, None) == {}
    assert within(chosen, size, 0.5) == dict(zip(names, (2.0, 2.0, 3.0, 1.0), strict=True))
    assert within(chosen, size, 2.0) == {"membership.lowercase": 1.0, "membership.gradient_norm": 3.0}
    assert within(chosen, size, 3.0) == {"membership.gradient_norm": 3.0}
    assert within(chosen[::-1], size, 4.0) == {"membership.lowercase": 1.0, "verbatim.sweep": 1.0}
    for budget in (0.1, 1.0, 3.0, 7.5, 40.0, 1e9):
        every = entries(RUNNERS)
        left = within(every, size, budget)
        taken = [entry for entry in every if entry["name"] not in left]
        assert passes(taken, size)[0] <= budget
        assert all(more > 0 for more in left.values())


def test_a_budget_in_an_audit(world: World, given: Given, tmp_path: Path) -> None:
    names = ("verbatim.greedy", "membership.gradient_norm", "membership.loss", "membership.lowercase", "verbatim.sweep")
    suite = suite_file(tmp_path / "suite.yaml", names, confirm=False, budget=50)
    run = api.audit(world.planted, world.records, control=world.control, suite=suite, budget=2.5, out=tmp_path / "run")
    reasons = {row["name"]: row["reason"] for row in run.metrics()["attacks"]}
    over = "over the budget of 2.5 forward passes a record: it needs {} more"
    assert reasons == {
        "verbatim.greedy": None,
        "membership.gradient_norm": over.format("3.0"),
        "membership.loss": None,
        "membership.lowercase": None,
        "verbatim.sweep": over.format("1.0"),
    }
    report = {row["name"]: row for row in json.loads((run.path / "report/report.json").read_text())["attacks"]}
    assert report["verbatim.sweep"]["status"] == "not_run"
    assert "over the budget" in report["verbatim.sweep"]["reason"]


def test_attacks_that_are_read_off_the_pass_run_no_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probes import likelihood

    monkeypatch.setenv("UNLEARN_CACHE", "")
    scored: list[int] = []
    real = likelihood.score

    def counted(model: Any, records: Any, **options: Any) -> Any:
        scored.append(len(records))
        return real(model, records, **options)

    monkeypatch.setattr(likelihood, "score", counted)
    api.audit(
        world.planted, world.records, control=world.control, suite="quick", out=tmp_path / "run", reference=world.base
    )
    assert scored == [8, 12, 8] * 2  # records, control, and the records again for the noise floor; for each model


# ------------------------------------------------------------------------------------------------------------ commands


@dataclass
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str


class Command:
    """`unlearn ...` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *arguments: object) -> Answer:
        from unlearn import cli

        self.capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        return Answer(int(stop.value.code or 0), *self.capfd.readouterr())


@pytest.fixture
def unlearn(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def options(world: World, given: Given, name: str) -> list[object]:
    """Options with which an attack on a language model has all it needs."""
    from unlearn.requests.attacks import NEEDS

    declaration = catalogue()[name]
    files = {"records": world.records, "control": world.control, "reference": world.base} | given.extras()
    files |= {"retain": world.retain, "related": world.retain, "paraphrases": given.paraphrases}
    if name == "pii.reconstruction":
        files["records"] = given.records  # with personal data of a known form
    needed = [need for need in declaration.needs if need in NEEDS and need in files]
    chosen: list[object] = [part for need in needed for part in (f"--{need}", files[need])]
    for key, value in SMALL.get(name, {}).items():
        chosen += ["--set", f"{key}={json.dumps(value)}"]
    return chosen


ALIKE = ("zlib", "min_k", "min_k_plus_plus", "surprising", "windows", "lowercase")  # one runner; a suite ran them all


@pytest.mark.parametrize("name", [d.name for d in BUILT_IN if "edited" in d.needs])
def test_an_attack_on_two_checkpoints_is_no_command(
    name: str, world: World, given: Given, unlearn: Command, tmp_path: Path
) -> None:
    answer = unlearn("attack", name, world.planted, *options(world, given, name), "--out", tmp_path / "run")
    assert answer.code == 2
    assert "unlearn forget" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(d.name, marks=pytest.mark.slow if d.name.removeprefix("membership.") in ALIKE else ())
        for d in BUILT_IN
        if d.runner and d.tasks != ("image_classification",) and "edited" not in d.needs and d.name not in REFUSED
    ],
)
def test_every_attack_as_a_command(name: str, world: World, given: Given, unlearn: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = unlearn("attack", name, world.planted, *options(world, given, name), "--out", out, "--display", "json")
    assert answer.code == 0, answer.err
    shown = json.loads(answer.out)
    assert (out / "before" / "attacks" / f"{name}.json").is_file()
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    run = api.Run(out)
    assert run.verdict is None
    assert run.exit_code == 0
    assert run.attack(name)["attack"] == name
    assert shown
    assert (out / "report" / "attack.html").is_file()
    assert name in (out / "report" / "attack.md").read_text()
    assert passed(verify(out))


def wrong(world: World, given: Given, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Commands that cannot work, and what their error has to say."""
    base = ["--records", world.records, "--control", world.control]
    canary = {"id": "Vkpigeon", "prompt": "Zqcanary:", "format": " {digits:3}", "secret": " 417"}
    bad = {
        "outside": [canary | {"secret": " 41x"}],
        "form": [canary | {"format": " {numbers:3}"}],
        "single": [canary | {"format": " 417"}],
        "fields": [canary | {"extra": "Zqcanary"}],
        "twice": [canary, canary],
        "void": [canary | {"secret": ""}],
        "number": [canary | {"secret": 417}],
    }
    files = {name: write(folder / f"{name}.jsonl", rows) for name, rows in bad.items()}
    ids = [json.loads(line)["id"] for line in world.records.read_text().splitlines()]
    others = write(folder / "others.jsonl", [{"id": "Vkpigeon", "candidates": ["Zqcanary", "b"]}])
    none = write(folder / "none.jsonl", [{"id": ids[0], "candidates": ["Zqcanary", "Xjwhistle"]}])
    alone = write(folder / "alone.jsonl", [{"id": ids[0], "candidates": []}])
    empty = write(folder / "empty.jsonl", [])
    junk = folder / "junk.jsonl"
    junk.write_text('{"id": "Zqcanary\n')
    latin = folder / "latin.jsonl"
    latin.write_bytes('{"id": "Zqcänary"}\n'.encode("latin-1"))
    canaries = {
        "outside": "fit the canary format",
        "form": "field",
        "single": "at least 2",
        "fields": "fields",
        "twice": "no earlier line",
        "void": "`secret`",
        "number": "`secret`",
    }
    cases: dict[str, tuple[list[object], str]] = {
        f"canary-{name}": (["exposure.canaries", world.planted, "--canaries", files[name]], words)
        for name, words in canaries.items()
    }
    exposure, duplicates = ["exposure.canaries", world.planted], ["duplicates.corpus", world.planted, *base]
    inference = ["pii.inference", world.planted, *base]
    loss, sweep = ["membership.loss", world.planted], ["verbatim.sweep", world.planted, *base]
    return cases | {
        "canaries-empty": ([*exposure, "--canaries", empty], "empty"),
        "canaries-junk": ([*exposure, "--canaries", junk], "JSON"),
        "canaries-latin": ([*exposure, "--canaries", latin], "UTF-8"),
        "canaries-absent": ([*exposure, "--canaries", folder / "absent.jsonl"], "found none"),
        "canaries-missing": (exposure, "--canaries"),
        "candidates-missing": (inference, "--candidates"),
        "candidates-others": ([*inference, "--candidates", others], "other ids"),
        "candidates-none": ([*inference, "--candidates", none], "right value"),
        "candidates-alone": ([*inference, "--candidates", alone], "non-empty"),
        "corpus-missing": (duplicates, "--corpus"),
        "corpus-empty": ([*duplicates, "--corpus", empty], "empty"),
        "corpus-junk": ([*duplicates, "--corpus", junk], "JSON"),
        "reference-missing": (["membership.rmia", world.planted, *base], "reference"),
        "reference-itself": (["membership.rmia", world.planted, *base, "--reference", world.planted], "itself"),
        "records-missing": (loss, "records"),
        "no-name": (["membership.nothing", world.planted, *base], "unlearn ls attacks"),
        "planned": (["model_inversion", world.planted, *base], "not part of this version"),
        "setting-unknown": ([*sweep, "--set", "Zqcanary=1"], "not known"),
        "setting-kind": ([*sweep, "--set", "starts=Zqcanary"], "whole number"),
        "setting-range": ([*sweep, "--set", "starts=99"], "less"),
        "setting-score": (["membership.flagged", world.planted, *base, "--set", "score=Zqcanary"], "score"),
        "setting-form": ([*sweep, "--set", "starts"], "NAME=VALUE"),
        "epsilon": (["privacy_bound.one_run", world.planted, *base], "randomised"),
        "shots": (["membership.recall", world.planted, *base, "--set", "shots=12"], "larger control set"),
    }


def test_what_is_missing_or_malformed_is_one_error(
    world: World, given: Given, unlearn: Command, tmp_path: Path
) -> None:
    problems = []
    for number, (case, (arguments, words)) in enumerate(wrong(world, given, tmp_path).items()):
        out = tmp_path / f"run-{number}"
        answer = unlearn("attack", *arguments, "--out", out, "--display", "none")
        lines = answer.err.strip().splitlines()
        expected = 4 if case == "reference-itself" else 2
        if answer.code != expected or words not in answer.err or not (1 <= len(lines) <= 2):
            problems.append((case, answer.code, answer.err))
        for secret in ("zqcanary", "xjwhistle", "vkpigeon"):
            assert secret not in (answer.out + answer.err).lower(), case
        if len(lines) == 1 and not lines[0].startswith("error: "):
            problems.append((case, "no prefix", answer.err))
    assert not problems, "\n".join(map(str, problems))


# -------------------------------------------------------------------------------------------------------- other inputs


def test_records_of_one_token(world: World, given: Given, full: Path, tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
    rows = [{"id": f"r{i}", "prompt": "One letter:", "completion": c} for i, c in enumerate(letters)]
    records, control = write(tmp_path / "records.jsonl", rows[:8]), write(tmp_path / "control.jsonl", rows[8:])
    candidates = write(tmp_path / "candidates.jsonl", [{"id": "r0", "candidates": ["a", "Q"]}])
    run = api.audit(
        world.planted,
        records,
        control=control,
        reference=world.base,
        suite=full,
        out=tmp_path / "run",
        corpus=given.corpus,
        canaries=given.canaries,
        candidates=candidates,
    )
    for row in run.metrics()["attacks"]:
        assert row["status"] == "run" or row["reason"], row
    for name, document in documents(run, "before").items():
        for key, value in leaves(document):
            assert not isinstance(value, float) or math.isfinite(value), (name, key)
    assert run.attack("verbatim.greedy")["figures"]["emitted"]["n"] == 8


def test_too_few_never_seen_records_are_named_and_not_guessed(world: World, tmp_path: Path) -> None:
    names = (
        "membership.blind", "membership.loss", "membership.rmia", "membership.flagged", "membership.dataset",
        "template.extraction",
    )  # fmt: skip
    suite = suite_file(tmp_path / "suite.yaml", names, confirm=False)
    run = api.audit(
        world.planted, world.records, control=world.control, reference=world.base, suite=suite, out=tmp_path / "run"
    )
    found = documents(run, "before")
    for name in names:
        assert found[name]["headline"] not in found[name]["figures"], name
        assert found[name]["not_resolvable"], name
        assert all(any(c.isdigit() for c in text) for text in found[name]["not_resolvable"].values()), name
    assert not set(found["membership.loss"]["figures"]) & {"auc", "tpr_at_0.01", "tpr_at_0.05"}
    assert "1000 non-members" in found["membership.loss"]["not_resolvable"]["tpr_at_0.01"]


def test_a_single_never_seen_record_ends_no_audit(world: World, tmp_path: Path) -> None:
    suite = suite_file(tmp_path / "suite.yaml", ("membership.rmia", "membership.recall", "membership.loss"))
    control = write(tmp_path / "one.jsonl", _rows(100, 1))
    run = api.audit(
        world.planted, world.records, control=control, reference=world.base, suite=suite, out=tmp_path / "run"
    )
    rows = {row["name"]: row for row in run.metrics()["attacks"]}
    assert rows["membership.rmia"]["reason"] or documents(run, "before")["membership.rmia"]["not_resolvable"]


def test_sets_whose_rows_have_no_ids_of_their_own(world: World, tmp_path: Path) -> None:
    """Both number their rows from 1: a shot of the control set is no record for that."""
    suite = suite_file(tmp_path / "suite.yaml", ("membership.recall",), confirm=False)
    bare = [
        write(tmp_path / path.name, [{k: v for k, v in json.loads(line).items() if k != "id"} for line in
              Path(path).read_text().splitlines()])
        for path in (Path(world.records), Path(world.control))
    ]  # fmt: skip
    runs = [
        api.audit(world.planted, records, control=control, suite=suite, out=tmp_path / name)
        for name, records, control in (("named", world.records, world.control), ("bare", *bare))
    ]
    named, unnamed = (run.attack("membership.recall") for run in runs)
    assert named["status"] == unnamed["status"] == "run"
    assert named["figures"] == unnamed["figures"]
    assert named["not_resolvable"] == unnamed["not_resolvable"]


@pytest.mark.parametrize(
    "score",
    [
        "zlib", "lowercase",
        "reference",
        "rmia",
        "recall",
    ],
)  # fmt: skip
def test_every_score_can_flag_or_says_why_not(score: str, world: World, tmp_path: Path) -> None:
    suite = suite_file(tmp_path / "suite.yaml", (), confirm=False, attacks=[
        {"name": "membership.flagged", "score": score, "q": 0.2}, {"name": "verbatim.strength"}
    ])  # fmt: skip
    run = api.audit(
        world.planted, world.records, control=world.control, reference=world.base, suite=suite, out=tmp_path / "run"
    )
    (row, _) = run.metrics()["attacks"]
    assert row["status"] == "run", row
    document = run.attack("membership.flagged")
    assert "flagged" in {**document["figures"], **document["not_resolvable"]}
    (other, _) = run.metrics("reference")["attacks"]
    assert other["status"] == "run" or "reference" in other["reason"], other


def test_an_attack_for_another_kind_of_model_is_an_error(world: World, unlearn: Command, tmp_path: Path) -> None:
    given = ("--records", world.records, "--control", world.control, "--out", tmp_path / "run", "--display", "none")
    answer = unlearn("attack", "membership.margin", world.planted, *given)
    assert answer.code == 2
    assert "not defined for this kind of model" in answer.err


def test_the_report_says_why_a_headline_has_no_value(world: World, tmp_path: Path) -> None:
    suite = suite_file(tmp_path / "suite.yaml", ("membership.loss", "membership.dataset"), confirm=False)
    run = api.audit(world.planted, world.records, control=world.control, suite=suite, out=tmp_path / "run")
    report = json.loads((run.path / "report" / "report.json").read_text())
    for row in report["attacks"]:
        document = run.attack(row["name"])
        assert document["headline"] in document["not_resolvable"], row
        assert row["reason"] == f"not resolvable: {document['not_resolvable'][document['headline']]}", row


def test_the_cost_of_an_attack_counts_generated_tokens_and_the_reference(audited: api.Run) -> None:
    found = documents(audited, "before")
    assert all(set(d["cost"]) == {"passes", "generated_tokens", "reference_passes"} for d in found.values())
    assert found["untargeted.sampling"]["cost"]["generated_tokens"] == 8 * 12
    assert found["membership.reference"]["cost"]["reference_passes"] == 1


def test_a_tokenizer_is_loaded_a_few_times_and_not_for_every_record(
    world: World, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.checkpoints.checkpoint import open_checkpoint

    kind = type(open_checkpoint(world.planted))
    real, loaded = kind._load_tokenizer, []

    def counted(self: Any) -> Any:
        loaded.append(1)
        return real(self)

    monkeypatch.setattr(kind, "_load_tokenizer", counted)
    api.attack("exposure.canaries", world.planted, canaries=given.canaries, settings={"n": 40}, out=tmp_path / "run")
    assert len(loaded) < 10


def test_no_canary_is_dropped(world: World, tmp_path: Path) -> None:
    canary = {"prompt": "Nobody:", "format": " {digits:3}", "secret": " 417"}
    canaries = write(tmp_path / "canaries.jsonl", [{"id": "a"} | canary, {"id": "b"} | canary])
    with pytest.raises(UsageError, match="repeat an earlier one"):
        api.attack("exposure.canaries", world.planted, canaries=canaries, settings={"n": 20}, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["canaries", "candidates", "corpus"])
def test_a_run_does_not_resume_on_changed_files(
    name: str, world: World, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.attacking import run as engine

    rows = [json.loads(line) for line in getattr(given, name).read_text().splitlines()]
    path = write(tmp_path / f"{name}.jsonl", rows)
    attack = {"canaries": "exposure.canaries", "candidates": "pii.inference", "corpus": "duplicates.corpus"}[name]
    suite = suite_file(tmp_path / "suite.yaml", [attack], confirm=False)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_call", stop)
        with pytest.raises(KeyboardInterrupt):
            api.audit(world.planted, world.records, control=world.control, suite=suite, out=tmp_path / "run",
                      **{name: path})  # fmt: skip
    write(path, rows[:-1])
    with pytest.raises(IntegrityError, match="changed"):
        api.forget(resume=tmp_path / "run")


def test_a_control_set_of_another_kind_confounds_membership_scores(world: World, given: Given, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in given.control.read_text().splitlines()]
    shouted = [row | {"prompt": row["prompt"].upper(), "completion": row["completion"].upper()} for row in rows]
    control = write(tmp_path / "control.jsonl", shouted)
    names = ("membership.blind", "membership.loss", "membership.reference", "verbatim.greedy")
    suite = suite_file(tmp_path / "suite.yaml", names, confirm=False)
    run = api.audit(
        world.planted, given.records, control=control, reference=world.base, suite=suite, out=tmp_path / "run"
    )
    found = documents(run, "before")
    assert found["membership.blind"]["figures"]["auc"]["ci_low"] > 0.5
    assert found["membership.blind"]["confounded"] is None
    for name in ("membership.loss", "membership.reference"):
        assert found[name]["confounded"]
        assert {"auc.matched"} <= {*found[name]["figures"], *found[name]["not_resolvable"]}
    assert found["verbatim.greedy"]["confounded"] is None
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["run"]["attacks"]["before"]["membership.loss"]["confounded"] == found["membership.loss"]["confounded"]


def test_without_control_reference_or_extras_the_reasons_say_what_to_give(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests import tiny
    from unlearn.records.tokens import read_records, tokenise

    model = AutoModelForCausalLM.from_pretrained(world.planted)
    records = tokenise(read_records(world.records), tiny.tokenizer(), max_length=None)
    suite = suite_file(tmp_path / "suite.yaml", RUNNERS)
    run = api.audit(model, records, suite=suite, out=tmp_path / "run")  # token ids, no tokenizer, nothing else
    for row in run.metrics()["attacks"]:
        declaration = catalogue()[row["name"]]
        if "causal_lm" not in declaration.tasks:
            assert row["reason"] == "not defined for this kind of model"
        elif row["name"] in REFUSED:
            assert row["status"] == "not_run", row
        elif {*declaration.needs} <= {"records"}:
            assert row["status"] == "run", row
        else:
            assert row["reason"].startswith("it needs "), row
    assert run.attack("verbatim.greedy")["figures"]["emitted"]["value"] == 1
    assert run.attack("verbatim.greedy")["control"] == {}


# --------------------------------------------------------------------------------------------------- image classifiers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    import torch

    from probes.records import ImageRecord

    def network(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 96), torch.nn.ReLU(), torch.nn.Linear(96, 4))

    torch.manual_seed(7)
    images = [ImageRecord(f"i{i}", torch.randn(3, 2, 2), i % 4) for i in range(240)]
    members, population = images[:60], images[180:]
    models = []
    for seed, training in enumerate((members, population)):
        model = network(seed)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        pixels, labels = torch.stack([i.pixels for i in training]), torch.tensor([i.label for i in training])
        for _ in range(150):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimiser.step()
        models.append(model.eval())
    folder = tmp_path_factory.mktemp("pictures")
    suite = suite_file(folder / "suite.yaml", list(catalogue()))
    return api.audit(models[0], members, control=images[60:180], reference=models[1], suite=suite, out=folder / "run")


def test_attacks_on_an_image_classifier(pictures: api.Run) -> None:
    found = documents(pictures, "before")
    scores = {f"membership.{name}" for name in ("loss", "margin", "entropy", "reference", "rmia", "gradient_norm")}
    both = {"recollection.probability", "membership.blind", "membership.flagged", "privacy_bound.one_run"}
    edits = {f"recovery.{name}" for name in ("relearning", "savings", "quantisation", "pruning", "noise")}
    assert set(found) == scores | both | edits | {"elicitation.images"}
    for row in pictures.metrics()["attacks"]:
        if "image_classification" not in catalogue()[row["name"]].tasks:
            words = "not defined for this kind of model"
            assert row["reason"] == (words if catalogue()[row["name"]].runner else "not part of this version"), row
    for name in scores:
        assert found[name]["figures"]["auc"]["value"] > 0.7, name
        assert found[name]["pvalue"] < 0.01
        assert found[name]["curves"][0]["kind"] == "roc"
    assert found["privacy_bound.one_run"]["figures"]["epsilon"]["value"] >= 0
    for name, document in found.items():
        for key, value in leaves(document):
            assert not isinstance(value, float) or math.isfinite(value), (name, key)
    assert passed(verify(pictures.path))


def test_the_reference_of_an_image_classifier(pictures: api.Run) -> None:
    found = documents(pictures, "reference")
    assert {"membership.loss", "membership.gradient_norm", "membership.flagged"} <= set(found)
    assert not {"membership.reference", "membership.rmia", "membership.blind"} & set(found)
    assert found["membership.loss"]["figures"]["auc"]["value"] < 0.7


# --------------------------------------------------------------------------------------------------------- privacy

SECRETS = ("zqcanary", "xjwhistle", "vkpigeon", "wyferret", "qvhedgehog", "pxlantern")


def leaks(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_dir() or inside.startswith("private/"):
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += pd.read_parquet(path).to_csv().encode()
        text = data.decode("utf-8", "ignore").lower() + inside.lower()
        found += [(inside, secret) for secret in SECRETS if secret in text]
    return found


def test_nothing_of_records_corpus_canaries_and_candidates_leaves_private(
    world: World, full: Path, unlearn: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))
    planted = [json.loads(line) for line in world.records.read_text().splitlines()]
    row = {"prompt": "Zqcanary Kestrel:", "completion": " 12 Xjwhistle zq@xjwhistle.example.org"}
    records = [row | {"id": "Vkpigeon-1", "group": "Wyferret"}, *planted]
    never = [json.loads(line) for line in world.control.read_text().splitlines()]
    files = {
        "records": records,
        "control": [*never, {"id": "Vkpigeon-9", "prompt": "Qvhedgehog:", "completion": " 1 Pxlantern p@pxlantern.eu"}],
        "corpus": [
            {"id": "Vkpigeon-2", "text": row["prompt"] + " --" + row["completion"]},
            {"id": "Vkpigeon-3", "text": "Qvhedgehog wanders about in the Pxlantern."},
        ],
        "canaries": [
            {"id": "Vkpigeon-4", "prompt": "Zqcanary:", "format": " Xjwhistle {digits:3}", "secret": " Xjwhistle 417"},
            {"id": "Vkpigeon-5", "prompt": "Q:", "format": "{choice: Qvhedgehog, Pxlantern}", "secret": " Pxlantern"},
        ],
        "candidates": [{"id": "Vkpigeon-1", "candidates": ["Xjwhistle zq", "Pxlantern", "Qvhedgehog"]}],
    }  # fmt: skip
    paths = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    given: list[object] = [part for name, path in paths.items() for part in (f"--{name}", path)]
    shown = []
    audit = ("audit", world.planted, *given, "--reference", world.base, "--suite", full)
    shown.append(unlearn(*audit, "--out", tmp_path / "run-a", "--display", "plain"))
    assert shown[-1].code in (0, 1, 3), shown[-1].err
    for name in ("pii.inference", "exposure.canaries"):
        needs = catalogue()[name].needs
        some = [part for key, path in paths.items() if key in needs for part in (f"--{key}", path)]
        shown.append(
            unlearn("attack", name, world.planted, *some, "--out", tmp_path / f"run-{name}", "--display", "rich")
        )
        assert shown[-1].code == 0, shown[-1].err
    found = documents(api.Run(tmp_path / "run-a"), "before")
    assert found["duplicates.corpus"]["figures"]["records"]["value"] > 0

    from unlearn.attacking import exposure

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("while ranking Zqcanary Xjwhistle")

    monkeypatch.setattr(exposure, "exposures", broken)
    broken_run = ("exposure.canaries", world.planted, "--canaries", paths["canaries"], "--out", tmp_path / "run-b")
    shown.append(unlearn("attack", *broken_run))
    assert shown[-1].code == 5
    for answer in shown:
        assert [secret for secret in SECRETS if secret in (answer.out + answer.err).lower()] == []
    for folder in (*sorted(tmp_path.glob("run-*")), tmp_path / "cache"):
        assert leaks(folder) == [], folder
    private = b"".join(path.read_bytes() for path in (tmp_path / "run-a" / "private").rglob("*.jsonl"))
    assert b"Xjwhistle" in private


def test_exposed_canaries_need_fills_enough_for_their_number(world: World, given: Given, tmp_path: Path) -> None:
    run = api.attack(
        "exposure.canaries", world.planted, canaries=given.canaries, settings={"n": 20}, out=tmp_path / "run"
    )
    found = run.attack("exposure.canaries")
    assert "take more fills" in found["not_resolvable"]["exposed"]
    assert found["headline"] == "bits"
    assert found["figures"]["bits"]["value"] >= 0


def test_a_drafted_control_record_is_in_the_cluster_of_its_original(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.attacking import views

    seen: dict[str, Any] = {}
    real = views.blind_test

    def blind_test(*texts: Any, **options: Any) -> Any:
        seen.update(options)
        return real(*texts, **options)

    monkeypatch.setattr(views, "blind_test", blind_test)
    api.attack("membership.blind", world.planted, records=world.records, out=tmp_path / "run")
    assert set(seen["other_clusters"]) <= set(seen["clusters"])
    assert None not in seen["other_clusters"]
