"""Probe runs and edit runs: commands, Python calls, suites; wrong input; privacy and repeatability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probes.errors import IntegrityError, UsageError
from tests import tiny
from tests.conftest import World
from unlearn import api, cli
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.disk import file_sha256
from unlearn.runs.verify import passed, verify

KFAC = {"blocks": [-1], "rho": 0.7}


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def kfac(world: World, out: Path, **more: Any) -> api.Run:
    return api.probe(
        "kfac", world.planted, data=world.retain, settings=KFAC | more.pop("settings", {}), out=out, **more
    )


# ------------------------------------------------------------------------------------------------------------- results


def test_kfac_results_are_numbers_under_pseudonyms(world: World, tmp_path: Path) -> None:
    run = kfac(world, tmp_path / "run", records=world.records, control=world.control)
    found = run.probe("kfac")
    assert [row["role"] for row in found["modules"]] == ["gate", "up"]
    for row in found["modules"]:
        cut = row["cut"]
        assert cut["rho"] == 0.7
        assert 0 < cut["kept_pairs"] < cut["pairs"] == row["shape"][0] * row["shape"][1]
        assert 0 < cut["kept_norm"] < 1
        assert cut["predicted_rise"] > 0
        assert row["n_positions"] == found["data"]["n_positions"] > max(row["shape"])
        assert np.all(np.diff(row["spectrum"]["eigenvalue"]) <= 0)
        assert row["curve"]["mass"][-1] == pytest.approx(1.0)
    table = run.table("probes")
    assert list(table["record_id"]) == [json.loads(line)["id"] for line in world.records.read_text().splitlines()]
    shared = pd.read_parquet(run.path / "probes" / "records.parquet")
    assert shared["record_id"].str.startswith("r-").all()
    assert table["low_energy"].between(0, 1).all()
    assert found["records"]["n"] == 8
    assert found["records"]["auc"] is None  # eight records resolve no AUC
    assert any("not resolvable" in text for text in found["warnings"])
    assert run.verdict is None
    assert run.exit_code == 0
    assert passed(verify(run.path))


def test_the_same_probe_writes_the_same_bytes(world: World, tmp_path: Path) -> None:
    first, second = (kfac(world, tmp_path / name, records=world.records) for name in ("a", "b"))
    for part in ("probes", "report", "inputs"):
        assert tree(first.path / part) == tree(second.path / part)


def test_factors_written_and_read_again_give_the_same_result(world: World, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    measured = kfac(world, tmp_path / "a", save_factors=file)
    read = kfac(world, tmp_path / "b", factors=file)
    assert read.probe("kfac")["modules"] == measured.probe("kfac")["modules"]
    edited = api.edit(
        "kfac",
        world.planted,
        retain=world.retain,
        overrides={"factors": str(file), "blocks": [-1], "rho": 0.7},
        out=tmp_path / "c",
    )
    modules = json.loads((edited.path / "edit" / "delta.json").read_text())["statistics"]["modules"]
    for row in measured.probe("kfac")["modules"]:
        same = modules[row["module"]]
        assert same["kept_pairs"] == row["cut"]["kept_pairs"]
        assert same["predicted_rise"] == pytest.approx(row["cut"]["predicted_rise"], rel=1e-6)


def test_memory_costs_passes_and_autocast_little(world: World, tmp_path: Path) -> None:
    plain, tight, half = (
        kfac(world, tmp_path / str(i), settings=more).probe("kfac")["modules"]
        for i, more in enumerate(({}, {"memory_mb": 1, "blocks": "all"}, {"autocast": "bfloat16"}))
    )
    assert tight[-1]["cut"]["kept_pairs"] == plain[-1]["cut"]["kept_pairs"]
    assert half[-1]["mass"] != plain[-1]["mass"]
    assert half[-1]["mass"] == pytest.approx(plain[-1]["mass"], rel=0.05)


def test_ekfac_changes_the_cut_and_not_its_share(world: World, tmp_path: Path) -> None:
    plain, corrected = (
        kfac(world, tmp_path / name, settings={"correction": name}).probe("kfac") for name in ("none", "ekfac")
    )
    for a, b in zip(plain["modules"], corrected["modules"], strict=True):
        assert a["cut"]["kept_pairs"] != b["cut"]["kept_pairs"]
        assert b["cut"]["rho"] == a["cut"]["rho"]


def test_spectrum_of_a_block_and_of_the_model(world: World, tmp_path: Path) -> None:
    settings = {"k": 2, "samples": 2, "steps": 6, "records": 3, "max_products": 40}
    block = api.probe("spectrum", world.planted, data=world.retain, settings=settings, out=tmp_path / "a")
    row = block.probe("spectrum")["operators"][0]
    assert row["name"] == "block 2"
    assert row["smallest"] == []
    assert row["largest"][0] >= row["largest"][-1] > 0
    assert sum(row["weights"]) == pytest.approx(1.0)
    both = settings | {"operator": "hessian", "blocks": [0, -1], "k": 1, "max_products": 300}
    hessian = api.probe("spectrum", world.planted, data=world.retain, settings=both, out=tmp_path / "b")
    rows = hessian.probe("spectrum")["operators"]
    assert [row["block"] for row in rows] == [0, 2]
    assert all(row["smallest"] and row["negative_share"] is not None for row in rows)


def test_localise_names_positions_layers_neurons_and_training(world: World, tmp_path: Path) -> None:
    run = api.probe(
        "localise",
        world.planted,
        records=world.records,
        data=world.retain,
        training=world.records,
        settings={"records": 2, "steps": 4, "neurons": 3, "draws": 2, "influence": 2},
        out=tmp_path / "run",
    )
    found = run.probe("localise")
    assert len(found["records"]) == 2
    for row in found["records"]:
        assert len(row["layers"]) == 6
        assert row["influence"][0]["id"] == row["id"]  # nothing is closer to a record than itself
        assert row["ablation"]["k"] == 3
        assert all(place["occlusion"] is not None for place in row["prompt"])
    assert sum(cell["score"] for cell in found["heat"]) == pytest.approx(1.0)
    assert len(found["parts"]) == 6
    assert all(part["contrast"] == pytest.approx(part["drop"] - part["ordinary"]) for part in found["parts"])
    assert any("Influence" in text for text in found["warnings"])


def test_condition_of_every_matrix(world: World, tmp_path: Path) -> None:
    found = api.probe("condition", world.planted, out=tmp_path / "run").probe("condition")
    assert len(found["tensors"]) == 3 * 7
    assert all(row["kappa"] is None or row["kappa"] >= 1 for row in found["tensors"])


def test_a_suite_runs_probes_and_says_what_it_could_not_run(world: World, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema: unlearn.suite/v1\nname: own\ndescription: with probes\nnoise_floor: {records: 4}\n"
        "attacks: [{name: verbatim.greedy}]\n"
        "probes: [{name: condition}, {name: kfac, modules: [no.such.module]}]\n"
    )
    run = api.audit(
        world.planted, world.records, control=world.control, retain=world.retain, suite=suite, out=tmp_path / "r"
    )
    assert run.probe("condition")["tensors"]
    limits = json.loads((run.path / "compare" / "criteria.json").read_text())["limits"]
    assert any("kfac was not run" in text and "no.such.module" in text for text in limits)
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["run"]["probes"]["condition"]["tensors"]
    assert report["run"]["probes"]["kfac"] is None
    assert passed(verify(run.path))


# --------------------------------------------------------------------------------------------------------------- edits


def test_an_edit_without_an_audit_says_so(world: World, tmp_path: Path) -> None:
    before = tree(world.planted)
    run = api.edit("svd", world.planted, overrides={"fraction": 0.5, "blocks": [1]}, out=tmp_path / "run")
    assert tree(world.planted) == before
    assert json.loads((run.path / "edit" / "plan.json").read_text())["audited"] is False
    assert run.verdict is None
    assert run.exit_code == 0
    assert run.checkpoint is not None
    source, copy = open_checkpoint(world.planted), open_checkpoint(run.checkpoint)
    changed = [n for n in source.tensor_names() if not torch.equal(source.load_tensor(n), copy.load_tensor(n))]
    assert changed
    assert all(name.startswith("model.layers.1.mlp.") for name in changed)
    assert passed(verify(run.path))


def test_an_edit_that_keeps_everything_changes_no_byte(world: World, tmp_path: Path) -> None:
    run = api.edit("kfac", world.planted, retain=world.retain, overrides={"rho": 1}, out=tmp_path / "run")
    assert run.checkpoint is not None
    assert open_checkpoint(run.checkpoint).tensor_digest() == open_checkpoint(world.planted).tensor_digest()


def test_a_live_classifier_is_edited_in_memory(tmp_path: Path) -> None:
    from probes.records import ImageRecord

    model = tiny.image_classifier("vit")
    original = {name: p.clone() for name, p in model.named_parameters()}
    with tiny.seeded(1):
        images = [ImageRecord(f"i{i}", torch.randn(3, 32, 32), i % 4) for i in range(12)]
    run = api.edit("kfac", model, retain=images, overrides={"blocks": [0]}, out=tmp_path / "run")
    assert run.model is not None
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, original[name])}
    assert changed
    assert all("layers.0." in name or "layer.0." in name for name in changed)
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("kfac", {"rho": 0.0}, "`rho`"),
        ("kfac", {"rho": 1.5}, "`rho`"),
        ("kfac", {"blocks": [7]}, "expected blocks"),
        ("kfac", {"modules": ["model.layers.9.*"]}, "found none named"),
        ("kfac", {"labels": "guessed"}, "`labels`"),
        ("spectrum", {"blocks": [3]}, "expected blocks"),
        ("spectrum", {"samples": 1}, "`samples`"),
        ("localise", {"steps": 0}, "`steps`"),
        ("nothing", {}, "expected a probe among"),
    ],
)
def test_wrong_settings_are_one_usage_error(
    world: World, tmp_path: Path, name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        api.probe(
            name, world.planted, data=world.retain, records=world.records, settings=settings, out=tmp_path / "run"
        )


def test_too_few_tokens_are_refused(world: World, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(world.retain.read_text().splitlines()[0] + "\n")
    with pytest.raises(UsageError, match=r"expected at least 96 positions .* found"):
        api.probe("kfac", world.planted, data=few, settings=KFAC, out=tmp_path / "run")


def test_factors_of_another_checkpoint_are_refused(world: World, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    kfac(world, tmp_path / "a", save_factors=file)
    with pytest.raises(IntegrityError, match="another"):
        api.probe("kfac", world.base, data=world.retain, settings=KFAC, factors=file, out=tmp_path / "b")


def test_missing_sets_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="retain set"):
        api.probe("kfac", world.planted, out=tmp_path / "a")
    with pytest.raises(UsageError, match="--retain"):
        api.edit("kfac", world.planted, out=tmp_path / "b")
    with pytest.raises(UsageError, match="--records"):
        api.edit("ssd", world.planted, retain=world.retain, out=tmp_path / "c")


# ------------------------------------------------------------------------------------------------------------ commands


def test_commands(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = command("probe", "condition", world.planted, "--out", tmp_path / "a", "--display", "json")
    assert code == 0
    assert json.loads(out)["probes"]["condition"]["tensors"]
    code, out = command("edit", "svd", world.planted, "--set", "fraction=0.5", "--out", tmp_path / "b")
    assert code == 0
    assert "not audited" in out
    svd, kfac = ("edit", "svd", world.planted), ("probe", "kfac", world.planted)
    for number, wrong in enumerate(
        (
            (*svd, "--set", "fraction"),
            (*svd, "--set", "fraction=2"),
            (*kfac, "--data", world.retain, "--blocks", "x1"),
            (*kfac, "--data", tmp_path / "none.jsonl"),
        )
    ):
        assert command(*wrong, "--out", tmp_path / f"wrong-{number}")[0] == 2
        assert not (tmp_path / f"wrong-{number}").exists()


def test_results_quote_no_record(world: World, tmp_path: Path) -> None:
    run = kfac(world, tmp_path / "run", records=world.records, control=world.control)
    texts = [json.loads(line) for line in world.records.read_text().splitlines()]
    words = {row["id"] for row in texts} | {row["completion"].strip() for row in texts}
    for path in run.path.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            content = path.read_bytes()
            assert not any(word.encode() in content for word in words), path
