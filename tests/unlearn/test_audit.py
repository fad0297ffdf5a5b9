"""`audit` on a checkpoint with a known truth, through Python and through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.errors import IntegrityError, UsageError
from probes.records import ImageRecord
from tests import tiny
from tests.conftest import World
from unlearn import audit
from unlearn.api import Run
from unlearn.disk import file_sha256
from unlearn.runs.job import Options
from unlearn.runs.verify import passed, verify

COLUMNS = (
    "record_id n_tokens log_prob loss probability token_accuracy extraction_strength greedy min_margin zlib_ratio "
    "min_k min_k_plus_plus n_for_p50 n_for_p90"
).split()


@pytest.fixture(scope="module")
def audited(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("audit") / "run"
    return audit(world.planted, world.records, control=world.control, reference=world.base, suite="quick", out=out)


def test_planted_records_are_found_and_controls_are_not(audited: Run) -> None:
    assert audited.verdict == "criteria not met"
    assert audited.exit_code == 1
    frame = audited.table("before", "records")
    assert (frame["greedy"] == "extracted").all()
    assert frame["emitted"].all()
    assert not audited.table("before", "control")["emitted"].any()
    assert not audited.table("reference", "records")["emitted"].any()


def test_the_table_has_the_contracts_columns_in_input_order(audited: Run, world: World) -> None:
    frame = audited.records
    assert set(COLUMNS) <= set(frame.columns)
    ids = [json.loads(line)["id"] for line in world.records.read_text().splitlines()]
    assert list(frame["record_id"]) == ids
    raw = pd.read_parquet(audited.path / "before" / "records.parquet")
    assert not set(raw["record_id"]) & set(ids)  # outside private/ a record is known by its pseudonym
    assert raw["record_id"].str.fullmatch(r"r-[0-9a-f]{16}").all()
    assert frame["probability"].equals(np.exp(-frame["loss"]))


def test_the_reference_is_clean(world: World, tmp_path: Path) -> None:
    run = audit(world.base, world.records, control=world.control, suite="quick", out=tmp_path / "run")
    assert run.table()["emitted"].sum() == 0
    assert run.verdict == "inconclusive"  # 0 of 8 bounds the rate by 0.31 only
    assert run.exit_code == 3
    reason = next(row["reason"] for row in run.criteria if row["id"] == "A1")
    assert "0 of 8" in reason
    assert "n = 29" in reason


def test_same_inputs_same_bytes(audited: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", "")  # measured anew, not read back
    again = audit(
        world.planted,
        world.records,
        control=world.control,
        reference=world.base,
        suite="quick",
        out=tmp_path / "elsewhere",
    )
    for name in ("before/metrics.json", "before/records.parquet", "reference/metrics.json", "compare/criteria.json"):
        assert (again.path / name).read_bytes() == (audited.path / name).read_bytes(), name
    for name in ("report/report.json", "report/report.html", "report/report.md"):
        assert (again.path / name).read_bytes() == (audited.path / name).read_bytes(), name


def test_a_cached_measurement_gives_the_same_bytes(audited: Run, world: World, tmp_path: Path) -> None:
    again = audit(
        world.planted, world.records, control=world.control, reference=world.base, suite="quick", out=tmp_path / "again"
    )
    assert (again.path / "before/metrics.json").read_bytes() == (audited.path / "before/metrics.json").read_bytes()


def test_the_cache_is_keyed_by_checkpoint_and_data_not_by_name(world: World, tmp_path: Path) -> None:
    # Elsewhere, evaluating model B into model A's cache returned A's numbers.
    a = audit(world.planted, world.records, control=world.control, suite="quick", out=tmp_path / "a")
    b = audit(world.base, world.records, control=world.control, suite="quick", out=tmp_path / "b")
    c = audit(world.planted, world.retain, control=world.control, suite="quick", out=tmp_path / "c")
    losses = [run.table()["loss"].sum() for run in (a, b, c)]
    assert len(set(losses)) == 3


def test_the_checkpoint_is_untouched(world: World, tmp_path: Path) -> None:
    before = {path.name: file_sha256(path) for path in world.planted.iterdir()}
    audit(world.planted, world.records, control=world.control, suite="quick", out=tmp_path / "run")
    assert {path.name: file_sha256(path) for path in world.planted.iterdir()} == before


def test_a_missing_control_set_is_drafted_and_said_so(world: World, tmp_path: Path) -> None:
    run = audit(world.planted, world.records, suite="quick", out=tmp_path / "run")
    sets = json.loads((run.path / "inputs/sets.json").read_text())
    assert sets["control"]["source"] == "drafted"
    assert sets["control"]["n"] == 8
    limits = json.loads((run.path / "compare/criteria.json").read_text())["limits"]
    assert any("drafted" in limit for limit in limits)
    assert not run.table("before", "control")["emitted"].any()


def test_every_figure_is_read_against_a_noise_floor(audited: Run) -> None:
    floor = audited.metrics()["noise_floor"]
    assert floor["records"] == 8
    assert 0 <= floor["loss"] < 1e-4
    assert audited.metrics()["engine"]["logit_noise"] > 0


def test_what_was_not_run_is_listed_with_a_reason(audited: Run) -> None:
    attacks = audited.metrics()["attacks"]
    ran = {attack["name"] for attack in attacks if attack["status"] == "run"}
    assert {"verbatim.greedy", "verbatim.sampled", "recollection.probability", "membership.reference"} <= ran
    reasons = {attack["name"]: attack["reason"] for attack in attacks if attack["status"] == "not_run"}
    assert all(reasons.values())
    assert reasons["duplicates.corpus"] == "it needs a corpus (--corpus)"
    assert reasons["recovery.relearning"].startswith("it tests an edit")
    assert reasons["model_inversion"] == "not part of this version"


def test_it_verifies_until_a_file_changes(world: World, tmp_path: Path) -> None:
    run = audit(world.planted, world.records, control=world.control, suite="quick", out=tmp_path / "run")
    assert passed(verify(run.path))
    for name, failing in (
        ("before/metrics.json", "files"),
        ("report/report.html", "documents"),
        ("inputs/policy.json", "criteria"),
    ):
        path = run.path / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b"0.1", b"0.9") + b" ")
        checks = {check.name: check.status for check in verify(run.path)}
        assert checks[failing] == "failed", name
        path.write_bytes(content)
    (run.path / "before/extra.json").write_text("{}")
    assert {c.name: c.status for c in verify(run.path)}["nothing added"] == "failed"
    (run.path / "before/extra.json").unlink()
    assert passed(verify(run.path))


def test_records_in_memory(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.records.read_text().splitlines()]
    run = audit(world.planted, rows, suite="quick", out=tmp_path / "run")
    assert run.table()["emitted"].all()


def test_a_live_language_model(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.planted)
    run = audit(model, world.records, tokenizer=tiny.tokenizer(), suite="quick", out=tmp_path / "run")
    assert run.table()["emitted"].all()


def test_a_plain_classifier_with_its_images(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    made = [ImageRecord(f"i{i}", torch.randn(3, 2, 2), i % 3) for i in range(30)]
    images, never_seen = made[:20], made[20:]
    run = audit(model, images, control=never_seen, suite="quick", out=tmp_path / "run")
    with torch.no_grad():
        log_p = model(torch.stack([image.pixels for image in images])).log_softmax(-1)
    frame = run.table()
    np.testing.assert_allclose(
        frame["loss"], [-float(log_p[i, image.label]) for i, image in enumerate(images)], rtol=1e-5
    )
    np.testing.assert_allclose(frame["entropy"], -(log_p.exp() * log_p).sum(-1).numpy(), rtol=1e-5)
    assert list(frame["correct"]) == [int(log_p[i].argmax()) == image.label for i, image in enumerate(images)]


@pytest.mark.parametrize("arch", ["vit", "resnet"])
def test_an_image_checkpoint(arch: str, tmp_path: Path) -> None:
    from PIL import Image

    tiny.save(tiny.image_classifier(arch), None, tmp_path / "ckpt")
    generator = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"i{i}", "image": f"{i}.png", "label": "class1" if i % 2 else 2})
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = audit(tmp_path / "ckpt", tmp_path / "images.jsonl", suite="quick", out=tmp_path / "run")
    assert len(run.table()) == 6
    assert run.metrics()["task"] == "image_classification"
    assert passed(verify(run.path))


def test_a_reference_that_is_the_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="found the checkpoint itself"):
        audit(world.planted, world.records, reference=world.planted, suite="quick", out=tmp_path / "run")


def test_a_criterion_for_another_kind_of_model_is_refused_before_loading(world: World, tmp_path: Path) -> None:
    criteria = [{"id": "X", "metric": "correct", "aggregate": "rate", "test": "point", "max": 0.5}]
    with pytest.raises(UsageError, match="causal_lm"):
        audit(world.planted, world.records, criteria=criteria, suite="quick", out=tmp_path / "run")


def test_half_precision_is_recorded(world: World, tmp_path: Path) -> None:
    run = audit(
        world.planted,
        world.records,
        suite="quick",
        out=tmp_path / "run",
        options=Options(dtype="bfloat16", device="cpu"),
    )
    assert run.metrics()["engine"]["dtype"] == "bfloat16"
    limits = json.loads((run.path / "compare/criteria.json").read_text())["limits"]
    assert any("bfloat16" in limit for limit in limits)
