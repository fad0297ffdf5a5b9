"""The re-audit end to end, on models whose truth is known: planted, retrained, suppressed, untrained, several seeds.

Each is handed to `forget` as an edit that was made elsewhere (`method: given`), with the planted model as the original
and the retrained one as the reference; what the re-audit says is counted over seeds.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import hidden, tiny
from unlearn import forget
from unlearn.api import Run

SEEDS = range(5)
EDITS = ("planted", "retrained", "suppressed", "untrained")
TUNING = "how: full, learning_rate: 3.0e-4"
# Every attack that a record of a few syllables allows, within seconds on a tiny model.
SUITE = f"""\
schema: unlearn.suite/v1
name: stress
description: attacks on an edit's durability, for a tiny model
confirm: false
noise_floor: {{records: 4}}
attacks:
  - {{name: verbatim.greedy}}
  - {{name: recollection.probability}}
  - {{name: recovery.relearning, {TUNING}}}
  - {{name: recovery.retain_tuning, {TUNING}}}
  - {{name: recovery.quantisation, schemes: [int4], group: 32}}
  - {{name: recovery.pruning}}
  - {{name: recovery.noise}}
  - {{name: elicitation.soft_prompt}}
  - {{name: elicitation.embedding}}
  - {{name: hidden_knowledge.lens}}
  - {{name: hidden_knowledge.probe}}
  - {{name: regurgitation.spelling}}
"""
REQUEST = """\
schema: unlearn.request/v1
data: {records: forget.jsonl}
checkpoint: {path: planted, trained_on_records: known}
REFERENCE
control: {path: control.jsonl}
retain: {path: retain.jsonl}
method: {name: given, overrides: {path: EDIT}}
suite: suite.yaml
"""
REFERENCE = "reference: {kind: retrained_without, path: retrained}"


def world(folder: Path, seed: int) -> Path:
    """Four checkpoints and the record files of one seed."""
    models = hidden.hidden(seed)
    for name in EDITS:
        tiny.save(getattr(models, name), models.tokenizer, folder / name)
    for name in ("forget", "retain", "control"):
        rows = models.lines(getattr(models, name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def reaudit(folder: Path, edit: str, *, reference: bool = True) -> Run:
    """The re-audit of one of the four models as an edit of `planted`."""
    name = f"{edit}{'' if reference else '-alone'}"
    request = REQUEST.replace("EDIT", edit).replace("REFERENCE", REFERENCE if reference else "")
    (folder / f"{name}.yaml").write_text(request)
    return forget(folder / f"{name}.yaml", out=folder / "runs" / name)


def stress(run: Run) -> dict[str, Any]:
    """What the attacks say together."""
    found: dict[str, Any] = json.loads((run.path / "compare/paired.json").read_text())["stress"]
    return found


def attacks(run: Run) -> dict[str, Any]:
    """Arms, residual and status of each attack."""
    found: dict[str, Any] = json.loads((run.path / "compare/paired.json").read_text())["attacks"]
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs on the first seed's world, each made once."""
    folder = world(tmp_path_factory.mktemp("reaudit"), 0)
    return cache(lambda edit, reference=True: reaudit(folder, edit, reference=reference))


def test_the_suppressed_model_passes_exact_match_and_is_caught(first: Any) -> None:
    run = first("suppressed")
    greedy = attacks(run)["verbatim.greedy"]["arms"]
    assert greedy["U"]["value"] == 0.0
    found = stress(run)
    assert found["finding"] == "hidden"
    assert "recovery.relearning" in found["recovering"]
    residual = attacks(run)["recovery.relearning"]["residual"]
    assert residual["ci_low"] > 0
    assert run.verdict == "criteria not met"
    assert run.claim_level == "E1"


def test_the_retrained_model_is_clean_under_every_attack(first: Any) -> None:
    run = first("retrained")
    found = stress(run)
    assert found["recovering"] == []
    assert found["finding"] in ("not hidden", "undecided")
    assert "recovery.relearning" in found["resisting"]


def test_without_a_reference_the_finding_is_the_same(first: Any) -> None:
    assert stress(first("suppressed", False))["finding"] == "hidden"
    assert stress(first("retrained", False))["recovering"] == []


def test_every_attack_has_power_on_the_planted_model(first: Any) -> None:
    """A broken attack would show: on the model that still emits the records each of them must see that."""
    run = first("planted")
    found = stress(run)
    assert found["not_run"] == []
    for name, one in attacks(run).items():
        if one["stress"] is not None:
            assert one["stress"]["status"] in ("recovers", "re-teaches"), name
    assert len(found["recovering"]) >= 8


def test_the_untrained_model_fires_nothing(first: Any) -> None:
    assert stress(first("untrained"))["recovering"] == []


@pytest.mark.slow
def test_detection_and_false_alarms_over_seeds(first: Any, tmp_path: Path) -> None:
    """The whole re-audit over five seeds: hidden sets are found, sets that were never there are not."""
    verdicts: dict[str, list[str]] = {name: [] for name in EDITS}
    for seed in SEEDS:
        folder = world(tmp_path / str(seed), seed) if seed else None
        for edit in EDITS:
            run = reaudit(folder, edit) if folder is not None else first(edit)
            verdicts[edit].append(stress(run)["finding"])
    assert verdicts["suppressed"] == ["hidden"] * len(SEEDS)
    assert verdicts["planted"] == ["hidden"] * len(SEEDS)
    assert "hidden" not in verdicts["retrained"]
    assert "hidden" not in verdicts["untrained"]
