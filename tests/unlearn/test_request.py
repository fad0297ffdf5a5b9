"""Requests, policies, suites and presets: what is accepted, and that every mistake has a line and quotes nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes.errors import IntegrityError, UnlearnError, UsageError
from unlearn.editors.base import EDITORS
from unlearn.evidence import metrics
from unlearn.mistakes import MistakesError
from unlearn.requests import presets
from unlearn.requests.attacks import catalogue
from unlearn.requests.request import (
    Criterion,
    Request,
    check_digests,
    criteria_digest,
    criteria_for,
    hub_id,
    load_method,
    load_policy,
    load_request,
    load_suite,
    record_sets,
    redacted,
    template,
    validate_file,
)
from unlearn.requests.yamlfile import Schema
from unlearn.resources import config_names

CANARY = "zqxcanaryvjk"
ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "schema": "unlearn.request/v1",
    "data": {"records": "records.jsonl"},
    "checkpoint": {"path": "checkpoint"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with everything that the template names."""
    (tmp_path / "records.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "control.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "retain.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "base").mkdir()
    return tmp_path


class Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(folder: Path, content: object, name: str = "request.yaml") -> Path:
    path = folder / name
    path.write_text(
        content if isinstance(content, str) else yaml.dump(content, Dumper=Plain, sort_keys=False), encoding="utf-8"
    )
    return path


def wrong(path: Path) -> list[str]:
    with pytest.raises(MistakesError) as caught:
        load_request(path)
    assert caught.value.exit_code == 2
    return list(caught.value.mistakes)


# What is accepted


def test_a_minimal_request_has_the_defaults(folder: Path) -> None:
    request = load_request(write(folder, MINIMAL))
    assert request.data.records == str(folder / "records.jsonl")
    assert (request.method.name, request.suite, request.policy) == ("ssd", "standard", None)
    assert request.method.parameters() == load_method("ssd").parameters
    assert criteria_for(request, "causal_lm") == load_policy().criteria("forget", "causal_lm")
    assert [role for role, _, _ in record_sets(request)] == ["records"]


def test_the_template_is_valid(folder: Path) -> None:
    path = write(folder, template())
    assert validate_file(path) == []
    assert load_request(path) == load_request(write(folder, MINIMAL))


def test_the_template_is_valid_with_every_option_taken(folder: Path) -> None:
    """Every commented key, uncommented; the digests it elides are filled in."""
    digest = hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
    (folder / "corpus.jsonl").write_text('{"text": "t"}\n')
    (folder / "related.jsonl").write_text('{"text": "t"}\n')
    (folder / "paraphrases.jsonl").write_text('{"id": "a", "prompts": ["p"]}\n')
    lines = []
    for line in template().splitlines()[3:]:
        head, _, rest = line.partition("# ")
        is_key = not head.strip() and rest[:1].islower() and ":" in rest.split(" ")[0] and not rest.startswith("id:")
        lines.append(head + rest if is_key or rest.startswith(("  copies:", "  recipients:", "  - {id:")) else line)
    text = "\n".join(lines).replace('sha256: "sha256:..."', f'sha256: "sha256:{digest}"')
    text = text.replace('tensor_digest: "sha256:..."', f'tensor_digest: "{"0" * 64}"')
    request = load_request(write(folder, text))
    unset = {name for name in Request.model_fields if name not in request.model_fields_set}
    assert unset == {"policy", "received_time", "due_time", "answered_time"}
    assert request.data.sha256 == f"sha256:{digest}"
    assert request.data.format().by_column["question"] == "prompt"
    assert request.method.overrides == {"alpha": 10.0}
    assert [role for role, _, _ in record_sets(request)] == ["records", "control", "retain", "related"]
    assert criteria_for(request, "causal_lm") == request.criteria
    assert len(request.criteria) == 3
    unset_data = set(type(request.data).model_fields) - request.data.model_fields_set
    assert unset_data == set()


def test_paths_start_at_the_request_and_hub_ids_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep").mkdir()
    monkeypatch.chdir("/")
    content = MINIMAL | {
        "data": {"records": "../records.jsonl"},
        "checkpoint": {"path": "hub:owner/name"},
        "control": {"path": str(folder / "control.jsonl")},
    }
    request = load_request(write(folder / "deep", content))
    assert request.data.records == str(folder / "records.jsonl")
    assert request.control is not None
    assert request.control.path == str(folder / "control.jsonl")
    assert hub_id(request.checkpoint.path) == "owner/name"
    assert hub_id(request.data.records) is None


@pytest.mark.parametrize("key", ["paraphrase_file", "assistant"])
def test_paths_among_the_parameters_start_at_the_request_and_only_their_last_part_is_shown(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = {"schema": "unlearn.method/v1", "name": "npo", "description": "d", "parameters": {key: None}}
    write(folder, preset, "mine.yaml")
    (folder / "wordings.jsonl").write_text("{}\n")
    chosen = {"name": "npo", "preset": "mine.yaml"}
    monkeypatch.chdir("/")
    request = load_request(write(folder, MINIMAL | {"method": chosen | {"overrides": {key: "wordings.jsonl"}}}))
    assert request.method.overrides == {key: str(folder / "wordings.jsonl")}
    assert redacted(request)["method"]["overrides"] == {key: "wordings.jsonl"}
    none = load_request(write(folder, MINIMAL | {"method": chosen | {"overrides": {key: None}}}))
    assert none.method.parameters() == {key: None}
    absent = write(folder, MINIMAL | {"method": chosen | {"overrides": {key: f"{CANARY}.jsonl"}}})
    assert "expected an existing file or folder" in wrong(absent)[0]


def test_presets_by_name_and_by_file(folder: Path) -> None:
    write(folder, (ROOT / "configs/suites/quick.yaml").read_text(), "mine.yaml")
    method = {
        "schema": "unlearn.method/v1",
        "name": "ssd",
        "description": "d",
        "parameters": {"alpha": 3.0, "floor": 0.1},
    }
    write(folder, method, "mine_method.yaml")
    chosen = {"name": "ssd", "preset": "mine_method.yaml", "overrides": {"floor": 0.2}}
    request = load_request(write(folder, MINIMAL | {"suite": "mine.yaml", "method": chosen}))
    assert load_suite(request.suite) == load_suite("quick")
    assert request.method.parameters() == {"alpha": 3.0, "floor": 0.2}
    official = load_request(write(folder, MINIMAL | {"method": {"name": "ssd", "preset": "ssd_official"}}))
    assert official.method.parameters()["estimator"] == "batch"


def test_a_request_cannot_be_changed(folder: Path) -> None:
    request = load_request(write(folder, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        request.suite = "deep"  # type: ignore[misc]


def test_numbers_without_a_point_are_numbers(folder: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + (
        "criteria:\n  - {id: C1, metric: loss, test: noninferiority, against: before, set: retain, margin: 1e-2}\n"
    )
    assert load_request(write(folder, text)).criteria[0].margin == 0.01


# What is shipped


def test_every_shipped_preset_is_valid() -> None:
    for kind in ("policies", "suites", "methods"):
        assert config_names(kind)
        for name in config_names(kind):
            assert validate_file(ROOT / "configs" / kind / f"{name}.yaml") == []
    assert {"quick", "standard", "deep"} <= set(config_names("suites"))
    assert load_suite("deep").noise_floor.records is None
    assert load_suite("quick").noise_floor.records == 16


def test_suites_name_what_was_not_tried() -> None:
    for name in ("quick", "standard", "deep"):
        suite = load_suite(name)
        entries = {attack.name for attack in (*suite.attacks, *suite.reaudit)}
        assert any(catalogue()[entry].runner is None for entry in entries)
        for family in ("membership", "pii", "inversion", "reconstruction", "exfiltration", "regurgitation"):
            assert name == "quick" or any(family in entry for entry in entries), family
        assert suite.confirm
    deep = load_suite("deep")
    everything = {attack.name for attack in (*deep.attacks, *deep.reaudit)}
    # one trains models, the other brings data of its own: asked for by name alone
    assert set(catalogue()) - everything == {"memory.counterfactual", "collateral.lm_eval"}


def test_the_default_policy_has_criteria_for_every_run_and_model() -> None:
    policy = load_policy()
    for task in get_args(presets.Task):
        assert {"before"} >= {c.against for c in policy.criteria("forget", task) if c.set == "retain"}
        assert [c.id for c in policy.criteria("audit", task)] == ["A1", "A2"]
    lm = policy.criteria("forget", "causal_lm")
    assert [(c.metric, c.aggregate, c.test, c.max, c.margin, c.against, c.set) for c in lm] == [
        ("extraction.greedy", "rate", "upper95", 0.1, None, None, "records"),
        ("probability", "mean", "noninferiority", None, 0.05, "control", "records"),
        ("loss", "mean", "noninferiority", None, 0.1, "before", "retain"),
        ("residual", "mean", "upper95", 0.1, None, None, "records"),
    ]
    assert lm[-1].attack == "all"


def test_every_registered_editor_has_a_preset() -> None:
    assert presets.method_names() == sorted(EDITORS)


def test_the_metric_names_are_those_that_are_measured() -> None:
    for task in get_args(presets.Task):
        measured = metrics.metrics_of(task)
        assert presets.METRICS[task] == {metric.name for metric in measured}
        assert presets.BINARY[task] == {metric.name for metric in measured if metric.binary}
        assert presets.SHARES[task] == {metric.name for metric in measured if metric.bounds == (0.0, 1.0)}


def test_the_digest_of_criteria_is_of_their_meaning() -> None:
    a = Criterion(id="C1", metric="loss", test="point", max=1)
    b = Criterion(id="C1", metric="loss", aggregate="mean", test="point", max=1.0, required=True)
    c = Criterion(id="C1", metric="loss", test="point", max=1.0, required=False)
    assert criteria_digest([a]) == criteria_digest([b])
    assert len({criteria_digest([a]), criteria_digest([c]), criteria_digest([a, c]), criteria_digest([])}) == 4
    canonical = json.dumps([a.model_dump(mode="json")], sort_keys=True, separators=(",", ":"))
    assert criteria_digest([a]) == f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


# Mistakes


def test_every_mistake_is_reported_with_its_line(folder: Path) -> None:
    text = f"""\
schema: unlearn.request/v1
subject_request_id: {CANARY}
subject_request_type: deletion
submitted_time: 2026-11-03T09:12:00
received_time: 2026-11-03
due_time: 2026-13-41T00:00:00Z
{CANARY}: {CANARY}
regulaton: gdpr
subject:
  kind: person
  pseudonym: {CANARY}
  key_id: 2026
data:
  records: {CANARY}.jsonl
  sha256: ab12
  fields: {{question: prompt}}
  special: yes please
  special: no
checkpoint:
  path: checkpoint
  trained_on_records: maybe
control: []
retain: {{sha256: "{"0" * 64}"}}
method: {{name: sdd, overrides: {{{CANARY}: 1}}}}
suite: {CANARY}
policy: {CANARY}.yaml
criteria:
  - {{id: C1, metric: extraction.gredy, test: upper95, max: yes}}
  - {{id: C2, metric: loss, aggregate: rate, test: upper95, margin: 0.1}}
  - {{id: C3, metric: loss, test: noninferiority, margin: .inf}}
  - {CANARY}
governance: {{retain_report_until: {CANARY}}}
"""
    expected = {
        2: "`subject_request_id`: expected a UUID",
        3: "`subject_request_type`: expected one of 'erasure'",
        4: "`submitted_time`: expected a time with its zone",
        5: "`received_time`: expected a time with its zone",
        6: "`due_time`: expected a date",
        7: "this key is not known at the top; known: ",
        8: "(did you mean `regulation`?)",
        11: "`subject.pseudonym`: expected hmac: and hexadecimal digits",
        12: "`subject.key_id`: expected text; put it in quotes",
        14: "`data.records`: expected an existing file or folder, found none",
        15: "`data.sha256`: expected sha256: and 64 hexadecimal digits",
        18: "this key is given twice; first on line 17",
        21: "`checkpoint.trained_on_records`: expected one of 'known', 'believed' or 'unknown'",
        22: "`control`: expected a mapping",
        23: "`retain.path` is missing",
        24: f"`method.name`: expected one of {', '.join(sorted(EDITORS))}",
        25: "`suite`: expected one of deep, quick, standard",
        26: "`policy`: expected an existing file",
        28: "`criteria[1].metric`: expected one of ",
        29: "`criteria[2]`: expected `aggregate: mean` or `worst`: a rate needs a yes/no metric; expected `max`",
        30: "`criteria[3].margin`: expected a finite number",
        31: "`criteria[4]`: expected a mapping",
        32: "`governance.retain_report_until`: expected a date",
    }
    found = wrong(write(folder, text))
    for line, part in expected.items():
        assert any(text.startswith(f"request.yaml:{line}: ") and part in text for text in found), (line, part, found)
    numbers = [int(text.split(":")[1]) for text in found]
    assert set(numbers) == {*expected}
    assert numbers == sorted(numbers)
    assert CANARY not in "\n".join(found)


def test_a_missing_part_is_named(folder: Path) -> None:
    found = wrong(write(folder, {"schema": "unlearn.request/v1", "data": {}}))
    assert found == ["request.yaml: `checkpoint` is missing", "request.yaml:2: `data.records` is missing"]


@pytest.mark.parametrize(
    ("criterion", "part"),
    [
        ({"test": "upper95"}, "expected `max`"),
        ({"test": "upper95", "max": 0.1, "against": "control"}, "neither `margin` nor `against`"),
        ({"test": "equivalence", "margin": 0.1}, "expected `margin` and `against`"),
        ({"test": "noninferiority", "margin": 0, "against": "control"}, "greater than 0"),
        ({"test": "noninferiority", "margin": 0.1, "against": "control", "max": 1}, "no `max`"),
        ({"test": "noninferiority", "margin": 0.1, "against": "control", "aggregate": "worst"}, "for a comparison"),
        ({"test": "noninferiority", "margin": 0.1, "against": "control", "set": "retain"}, "for the retain set"),
        ({"test": "point", "max": 1.1}, "between 0 and 1"),
        ({"test": "point", "max": 1, "aggregate": "rate"}, "yes/no metric"),
        ({"test": "point", "max": True}, "expected a number"),
        ({"test": "point", "max": 1, "required": "yes"}, "expected true or false"),
        ({"test": "point", "max": 1, "id": ""}, "found nothing"),
    ],
)
def test_a_criterion_that_cannot_be_judged(folder: Path, criterion: dict[str, Any], part: str) -> None:
    row = {"id": "C1", "metric": "probability"} | criterion
    (found,) = wrong(write(folder, MINIMAL | {"criteria": [row]}))
    assert part in found


def test_criteria_must_fit_each_other(folder: Path) -> None:
    point = {"test": "point", "max": 1}
    twice = [{"id": "C", "metric": "loss"} | point] * 2
    mixed = [{"id": "A", "metric": "correct"} | point, {"id": "B", "metric": "probability"} | point]
    assert "a different criterion id in each entry" in wrong(write(folder, MINIMAL | {"criteria": twice}))[0]
    assert "one kind of model" in wrong(write(folder, MINIMAL | {"criteria": mixed}))[0]
    both = MINIMAL | {"criteria": twice[:1], "policy": "default"}
    assert "expected `criteria` or `policy`, found both" in wrong(write(folder, both))[0]


def test_times_must_be_in_order(folder: Path) -> None:
    times = {"submitted_time": "2026-02-01T00:00:00Z", "received_time": "2026-01-01T00:00:00+01:00"}
    assert "in this order" in wrong(write(folder, MINIMAL | times))[0]


def test_methods_are_registered_names_with_known_parameters(folder: Path) -> None:
    for name in ("os.system", "unlearn.editors.ssd", "scrub"):
        assert "`method.name`: expected one of" in wrong(write(folder, MINIMAL | {"method": {"name": name}}))[0]
    near = wrong(write(folder, MINIMAL | {"method": {"overrides": {"alpha": 1, "lamda": 1}}}))[0]
    assert near.startswith("request.yaml:")
    assert "`method.overrides`: entry 2 is no parameter of the preset (did you mean `lambda`?)" in near
    other = {"schema": "unlearn.method/v1", "name": "uld", "description": "d", "parameters": {}}
    write(folder, other, "other.yaml")
    (found,) = wrong(write(folder, MINIMAL | {"method": {"preset": "other.yaml"}}))
    assert "found one of another method" in found


@pytest.mark.parametrize(
    ("schema", "change", "part"),
    [
        (
            "suites/quick",
            {"attacks": [{"name": "new.attack"}]},
            "verbatim.greedy",
        ),
        ("suites/quick", {"attacks": []}, "at least one"),
        ("suites/quick", {"noise_floor": {"records": 0}}, "or all"),
        ("suites/quick", {"noise_floor": {"records": True}}, "or all"),
        ("suites/quick", {"sampling": {"temperature": 0}}, "greater than 0"),
        (
            "policies/default",
            {"audit": {"causal_lm": [{"id": "A", "metric": "correct", "test": "point", "max": 1}]}},
            "one kind",
        ),
        (
            "policies/default",
            {
                "audit": {
                    "causal_lm": [
                        {"id": "A", "metric": "loss", "test": "noninferiority", "against": "before", "margin": 1.0}
                    ]
                }
            },
            "edits nothing",
        ),
        ("methods/ssd", {"name": "../ssd"}, "expected another kind of value"),
        ("methods/ssd", {"parameters": None}, "expected a mapping"),
    ],
)
def test_a_preset_that_cannot_work(tmp_path: Path, schema: str, change: dict[str, Any], part: str) -> None:
    good = yaml.safe_load((ROOT / "configs" / f"{schema}.yaml").read_text())
    (found,) = validate_file(write(tmp_path, good | change, "preset.yaml"))
    assert part in found


def test_an_attack_twice_or_with_wrong_settings(tmp_path: Path) -> None:
    good = yaml.safe_load((ROOT / "configs/suites/quick.yaml").read_text())
    attack = good["attacks"][-1]
    twice = write(tmp_path, good | {"attacks": [*good["attacks"], attack]}, "a.yaml")
    assert "a different name in each entry" in validate_file(twice)[0]
    wrong_values = [{"name": "verbatim.sweep", "starts": 0}, {"name": "membership.loss", "fprs": [2.0], "more": 1}]
    found = validate_file(write(tmp_path, good | {"attacks": wrong_values}, "b.yaml"))
    assert len(found) == 3
    assert any("starts" in line for line in found)
    assert any("fprs" in line for line in found)


# Files that are no YAML

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "expected `key: value` lines"),
        (b"- a\n- b\n", "expected `key: value` lines"),
        (b"just text", "expected `key: value` lines"),
        (bytes(range(256)), "expected"),
        (b"\x00\x01\x02", "control characters"),
        (b"a: \xff\xfe", "a.yaml:1: expected UTF-8 text"),
        (b"a: b\nc: [d", "a.yaml:2: expected YAML, found a syntax mistake"),
        (b"a: b\n  c: d", "a.yaml:2: expected YAML, found a syntax mistake"),
        (b"a: 1\n---\nb: 2\n", "expected YAML, found a syntax mistake"),
        (BOMB.encode(), "a.yaml:2: expected plain YAML, found an alias"),
        (b"a: " + b"[" * 20_000, "expected YAML text, found control characters, endless nesting"),
        (b"schema: x\na: !!python/object/apply:os.system [true]\n", "expected"),
        (b"a: !!timestamp nothing\n", "a.yaml:1: expected a date, number or text"),
        (b"n: " + b"9" * 5000 + b"\n", "a.yaml:1: expected a date, number or text"),
        (b"schema: x\n? [a, b]\n: c\n", "expected"),
        (b"no_schema: 1\n", "a.yaml: `schema`: expected one of unlearn.request/v1"),
        (b"schema: [a]\n", "a.yaml:1: `schema`: expected one of"),
        (b"schema: unlearn.request/v2\n", "found another"),
        (b"#" * (2**20 + 1), "at most 1048576 bytes"),
    ],
)
def test_what_is_no_yaml_is_a_clear_line(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    try:
        found = validate_file(tmp_path / "a.yaml")
    except UsageError as error:
        found = [str(error)]
    assert any(part in text for text in found), found
    assert len(found) <= 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        validate_file(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="found none"):
        load_request(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="IsADirectoryError"):
        load_request(tmp_path)
    with pytest.raises(UsageError, match="expected one of"):
        load_suite("../suites/quick")


# Everything at once


def test_validate_reads_the_record_files_too(folder: Path) -> None:
    (folder / "records.jsonl").write_text('{"question": "q", "completion": ""}\n')
    (folder / "control.jsonl").write_text("junk\n")
    request = MINIMAL | {
        "data": {"records": "records.jsonl", "fields": {"prompt": "question"}},
        "control": {"path": "control.jsonl"},
        "suite": "nonesuch",
    }
    assert [text.split(": ")[0] for text in validate_file(write(folder, request))] == [
        "request.yaml:10",
        "records.jsonl:1",
        "control.jsonl:1",
    ]
    assert validate_file(folder / "records.jsonl") != []
    assert validate_file(folder / "retain.jsonl") == []


def test_a_changed_record_file_is_an_integrity_error(folder: Path) -> None:
    digest = hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
    for stated in (digest, digest.upper(), f"sha256:{digest}"):
        path = write(folder, MINIMAL | {"data": {"records": "records.jsonl", "sha256": stated}})
        assert validate_file(path) == []
        check_digests(load_request(path))
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(IntegrityError, match="the file of records"):
        check_digests(load_request(path))
    with pytest.raises(IntegrityError):
        validate_file(path)
    with pytest.raises(UsageError, match="a single file"):
        check_digests(load_request(write(folder, MINIMAL | {"retain": {"path": "base", "sha256": digest}})))


def test_validate_needs_no_torch(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(folder / "saved")
    path = write(folder, MINIMAL | {"retain": {"path": "saved"}})
    program = (
        "import sys\nfrom unlearn.requests.request import validate_file\n"
        f"assert validate_file({str(path)!r}) == []\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_redacted_request_tells_no_paths(folder: Path) -> None:
    private = folder / CANARY
    private.mkdir()
    (private / "r.jsonl").write_text('{"text": "t"}\n')
    (private / "model").mkdir()
    write(private, (ROOT / "configs/suites/quick.yaml").read_text(), "s.yaml")
    write(private, (ROOT / "configs/methods/ssd.yaml").read_text(), "m.yaml")
    data = {"records": f"{CANARY}/r.jsonl", "fields": {"text": CANARY}, "prompt_template": CANARY + "{prompt}"}
    content = MINIMAL | {
        "data": data | {"categories": ["contact"]},
        "control": {"path": f"{CANARY}/r.jsonl"},
        "checkpoint": {"path": f"{CANARY}/model"},
        "reference": {"kind": "shadow", "path": f"{CANARY}/model"},
        "suite": f"{CANARY}/s.yaml",
        "method": {"preset": f"{CANARY}/m.yaml"},
        "subject_request_id": "3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a",
    }
    shown = redacted(load_request(write(folder, content)))
    assert CANARY not in json.dumps(shown)
    assert shown["checkpoint"]["path"] == "model"
    assert shown["data"]["categories"] == ["contact"]
    assert shown["schema"] == "unlearn.request/v1"
    assert shown["subject_request_id"] == "3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a"


# Properties

_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.just(CANARY) | st.text(max_size=4) | st.dates()
_keys = (
    st.sampled_from([*Request.model_fields, "records", "path", "metric", CANARY, "overrides", "kind"]) | st.integers()
)
_junk = st.recursive(
    _leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4), max_leaves=8
)
_relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(path: Path) -> None:
    """Mistakes as lines, or a clean error; neither quotes the file."""
    try:
        found = validate_file(path)
    except UnlearnError as error:
        found = [str(error)]
    assert CANARY not in "\n".join(found)


@_relaxed
@given(parts=st.dictionaries(_keys, _junk, max_size=6), valid=st.booleans())
def test_any_mapping_gives_lines_and_no_traceback(folder: Path, parts: dict[Any, Any], valid: bool) -> None:
    survives(write(folder, (MINIMAL if valid else {"schema": "unlearn.request/v1"}) | parts))


@_relaxed
@given(
    kind=st.sampled_from(["suites/quick", "policies/default", "methods/ssd"]),
    key=st.sampled_from(["attacks", "sampling", "forget", "audit", "parameters", "name", "schema", CANARY]),
    value=_junk,
)
def test_any_preset_gives_lines_and_no_traceback(tmp_path: Path, kind: str, key: str, value: Any) -> None:
    good = yaml.safe_load((ROOT / "configs" / f"{kind}.yaml").read_text())
    survives(write(tmp_path, good | {key: value}, "preset.yaml"))


@_relaxed
@given(data=st.binary(max_size=200), cut=st.integers(0, 400))
def test_any_bytes_give_lines_and_no_traceback(tmp_path: Path, data: bytes, cut: int) -> None:
    (tmp_path / "a.yaml").write_bytes(template().encode()[:cut] + data)
    survives(tmp_path / "a.yaml")


@_relaxed
@given(text=st.text(alphabet="ab:-[]{}&*!|>'\"# \n\t,?0", max_size=60))
def test_any_punctuation_gives_lines_and_no_traceback(tmp_path: Path, text: str) -> None:
    survives(write(tmp_path, f"schema: unlearn.request/v1\nground: {text}", "a.yaml"))


def test_every_schema_refuses_unknown_keys_and_hides_values() -> None:
    found = [Schema]
    for schema in found:
        found += schema.__subclasses__()
    assert len(found) > 15
    for schema in found:
        assert schema.model_config["extra"] == "forbid"
        assert schema.model_config["frozen"]
        assert schema.model_config["hide_input_in_errors"]
