"""Attacks of other packages: the documented example as if installed, and packages that are wrong in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probes.errors import UsageError
from tests.conftest import World
from unlearn import api
from unlearn.attacking.result import Result, point
from unlearn.requests import attacks, plugins
from unlearn.requests.attacks import Declaration
from unlearn.runs.verify import passed, verify

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "attack_plugin"
NAME = "example.first_tokens"
WRONG = '''"""Packages that are wrong: every text in here may be a record's, so none of it may be shown."""
from unlearn.requests.attacks import Declaration

SEVEN = 7
STOLEN = Declaration("verbatim.greedy", "Zqcanary?", "A0", runner="wrong_attacks:fails")
RENAMED = Declaration("wrong.renamed", "what?", "A0", runner="wrong_attacks:fails")
FAILS = Declaration("wrong.fails", "what?", "A0", runner="wrong_attacks:fails")
NOWHERE = Declaration("wrong.nowhere", "what?", "A0", runner="not_here_at_all:run")
NEEDY = Declaration("wrong.needy", "what?", "A0", runner="wrong_attacks:fails", needs=("teapot",))


def fails(views, settings):
    raise RuntimeError("while reading Zqcanary Xjwhistle")
'''
POINTS = {
    "wrong.import": "no_such_module_here:X",
    "wrong.attribute": "wrong_attacks:MISSING",
    "wrong.seven": "wrong_attacks:SEVEN",
    "verbatim.greedy": "wrong_attacks:STOLEN",
    "wrong.name": "wrong_attacks:RENAMED",
    "wrong.fails": "wrong_attacks:FAILS",
    "wrong.nowhere": "wrong_attacks:NOWHERE",
    "wrong.needy": "wrong_attacks:NEEDY",
}


def install(site: Path, project: str, points: dict[str, str]) -> None:
    """What `pip install` leaves behind, as far as entry points go."""
    info = site / f"{project}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[unlearn.attacks]", *lines]) + "\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example and with packages that are wrong."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(folder, "unlearn_first_tokens", project["entry-points"]["unlearn.attacks"])
    install(folder, "wrong_attacks", POINTS)
    (folder / "wrong_attacks.py").write_text(WRONG)
    return folder


def unlearn(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (site, EXAMPLE, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", "from unlearn.cli import main; main()", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_listing_names_the_example_and_what_is_wrong(site: Path) -> None:
    done = unlearn(site, "ls", "attacks")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in reversed(done.stdout.splitlines()))
    assert rows[NAME] == "A0  are the first tokens of the record what the model would say?"
    assert rows["wrong.import"] == "cannot be loaded (ModuleNotFoundError)"
    assert rows["wrong.attribute"] == "cannot be loaded (AttributeError)"
    assert rows["wrong.seven"] == "is no unlearn.requests.attacks.Declaration"
    assert rows["wrong.name"] == "has another name than its entry point, or one that is taken"
    greedy = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("verbatim.greedy ")]
    assert greedy == [
        "A0  does greedy decoding emit the record word for word?",
        "has another name than its entry point, or one that is taken",
    ]
    assert "Zqcanary" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def audited(site: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "suite.yaml").write_text(
        "schema: unlearn.suite/v1\nname: own\ndescription: with others' attacks\nconfirm: false\n"
        "noise_floor: {records: 2}\nattacks:\n"
        f"  - {{name: {NAME}, tokens: 6}}\n  - {{name: wrong.fails}}\n  - {{name: wrong.nowhere}}\n"
        "  - {name: wrong.needy}\n  - {name: verbatim.greedy}\n"
    )
    done = unlearn(
        site, "audit", world.planted, "--records", world.records, "--control", world.control,
        "--suite", folder / "suite.yaml", "--out", folder / "run", "--display", "plain",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # criteria not met: the records were planted
    assert "Zqcanary" not in done.stdout + done.stderr
    return api.Run(folder / "run")


def test_the_example_in_a_suite_reaches_metrics_and_report(audited: api.Run) -> None:
    rows = {row["name"]: row for row in audited.metrics()["attacks"]}
    assert (rows[NAME]["status"], rows[NAME]["access"], rows[NAME]["detail"]) == ("run", "A0", True)
    document = audited.attack(NAME)
    assert document["settings"] == {"tokens": 6}
    begun, never = document["figures"]["begun"], document["control"]["begun"]
    assert (begun["value"], begun["n"], never["n"]) == (1.0, 8, 12)
    assert never["value"] < 0.5
    assert document["cost"]["passes"] == 1
    table = pd.read_parquet(audited.path / "before" / "attacks" / "records.parquet")
    assert table[f"{NAME}:hit"].all()
    control = pd.read_parquet(audited.path / "before" / "attacks" / "control.parquet")
    assert control[f"{NAME}:hit"].mean() == pytest.approx(never["value"])
    report = json.loads((audited.path / "report" / "report.json").read_text())
    (row,) = [row for row in report["attacks"] if row["name"] == NAME]
    assert row["metric"] == "begun"
    assert row["arms"]["O"]["value"] == 1.0
    assert row["arms"]["N"]["value"] == pytest.approx(never["value"], rel=1e-6)
    for name in ("report.html", "report.md"):
        assert NAME in (audited.path / "report" / name).read_text()
    assert passed(verify(audited.path))


def test_what_fails_is_a_line_and_not_the_end(audited: api.Run) -> None:
    reasons = {row["name"]: row["reason"] for row in audited.metrics()["attacks"]}
    failed = "the package that brings this attack failed ({})"
    assert reasons == {
        NAME: None,
        "wrong.fails": failed.format("RuntimeError"),
        "wrong.nowhere": failed.format("ModuleNotFoundError"),
        "wrong.needy": "it needs teapot",
        "verbatim.greedy": None,  # ours, not the one that took its name
    }
    assert audited.attack("verbatim.greedy")["figures"]["emitted"]["value"] == 1.0
    assert verify(audited.path)
    for path in audited.path.rglob("*"):
        if path.is_file():
            assert b"Zqcanary" not in path.read_bytes(), path


def test_the_example_alone_and_its_settings(site: Path, world: World, tmp_path: Path) -> None:
    given = (world.planted, "--records", world.records, "--control", world.control, "--display", "none")
    done = unlearn(site, "attack", NAME, *given, "--set", "tokens=99", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = api.Run(tmp_path / "run").attack(NAME)
    assert found["figures"]["begun"]["value"] == 1.0  # 99 tokens: the whole of every completion
    assert found["control"]["begun"]["value"] == 0.0
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"schema: unlearn.suite/v1\nname: own\ndescription: wrong\nattacks: [{{name: {NAME}, tokens: 0}}]\n"
    )
    done = unlearn(site, "validate", suite)
    assert done.returncode == 2
    assert "tokens`: expected a value greater than or equal to 1" in done.stdout


# ------------------------------------------------------------------------------------------ in this process: wrong code


@dataclass
class Point:
    """An entry point."""

    name: str
    object: Any

    def load(self) -> Any:
        """What it points to."""
        if isinstance(self.object, BaseException):
            raise self.object
        return self.object


def _clear() -> None:
    attacks.catalogue.cache_clear()
    attacks._others.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put packages into the catalogue of this process."""

    def install(**objects: Any) -> None:
        points = [Point(name.replace("__", "."), found) for name, found in objects.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        _clear()
        for name, declaration in attacks.catalogue().items():
            monkeypatch.setitem(attacks.ENTRIES, name, plugins.entry(name, declaration.settings))

    yield install
    monkeypatch.undo()
    _clear()


def declared(name: str, runner: Callable[..., Any] | None = None, **more: Any) -> Declaration:
    if runner is not None:
        setattr(sys.modules[__name__], runner.__name__, runner)
    target = f"{__name__}:{runner.__name__ if runner else 'nothing'}"
    return Declaration(name, "what?", "A0", runner=target, **more)


def audit_with(world: World, monkeypatch: pytest.MonkeyPatch, out: Path, name: str) -> api.Run:
    """An audit whose suite names another package's attack in front of one of ours."""
    suite = {
        "sampling": {},
        "confirm": False,
        "noise_floor": {"records": 2},
        "budget": None,
        "attacks": [attacks.attack_settings(name, {}), attacks.attack_settings("verbatim.greedy", {})],
        "probes": [],
    }
    monkeypatch.setattr(api, "load_suite", lambda chosen: SimpleNamespace(model_dump=lambda mode: suite))
    return api.audit(world.planted, world.records, control=world.control, out=out)


def none(views: Any, settings: Any) -> Any:
    return None


def short(views: Any, settings: Any) -> Result:
    return Result(records={"hit": [True]})


def endless(views: Any, settings: Any) -> Result:
    result = Result(headline="a", titles={"a": "a", "b": "b"})
    result.figures |= {"a": point(float("nan"), "x", 1), "b": point(float("inf"), "x", 1)}
    return result


def numbers(views: Any, settings: Any) -> Result:
    result = Result(headline="a", titles={"a": "a"}, column="v")
    result.figures["a"] = point(np.float32(0.5), "x", np.int64(3))  # type: ignore[arg-type]
    result.records["v"] = np.ones(len(views.records()), dtype=np.float32)  # type: ignore[assignment]
    return result


def words(views: Any, settings: Any) -> Result:
    return Result(records={"text": ["Zqcanary" for _ in views.records()]})


def refuses(views: Any, settings: Any) -> Result:
    raise UsageError("it needs a rainy day")


@pytest.mark.parametrize(
    "runner",
    [
        refuses,
        endless,
        numbers,
        none,
        short,
    ],
)
def test_a_strange_result_ends_no_audit(
    runner: Any, installed: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(other__strange=declared("other.strange", runner))
    run = audit_with(world, monkeypatch, tmp_path / "run", "other.strange")
    rows = {row["name"]: row for row in run.metrics()["attacks"]}
    assert rows["verbatim.greedy"]["status"] == "run"
    assert rows["other.strange"]["status"] == "run" or rows["other.strange"]["reason"]
    for path in run.path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in a document"))
    assert passed(verify(run.path))


def test_text_in_a_column_stays_out_of_the_run(
    installed: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(other__words=declared("other.words", words))
    run = audit_with(world, monkeypatch, tmp_path / "run", "other.words")
    for path in (run.path / "before").rglob("*.parquet"):
        assert "Zqcanary" not in pd.read_parquet(path).to_csv(), path


def test_an_attack_that_cannot_say_what_it_costs_is_listed_as_broken(installed: Any) -> None:
    def cost(settings: Any, size: Any) -> dict[str, float]:
        raise ValueError("Zqcanary")

    installed(other__costly=declared("other.costly", refuses, cost=cost))
    assert "other.costly" not in attacks.catalogue()
    (line,) = attacks.broken()
    assert line == "other.costly: cannot say what it costs (ValueError)"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("other.settings", Declaration("other.settings", "what?", "A0", runner="a:b", settings=dict)),  # type: ignore[arg-type]
        ("other/../../up", Declaration("other/../../up", "what?", "A0", runner="a:b")),
        ("Zq Canary", Declaration("Zq Canary", "what?", "A0", runner="a:b")),
        ("other.stops", SystemExit(3)),
    ],
    ids=["settings", "path", "spaces", "stops"],
)
def test_a_declaration_that_cannot_be_used_is_listed_as_broken(name: str, found: Any, installed: Any) -> None:
    installed(**{name: found})
    assert name not in attacks.catalogue()
    assert [line for line in attacks.broken() if line.startswith(f"{name}: ")]


def test_what_cannot_be_loaded_is_broken_and_the_rest_is_there(installed: Any) -> None:
    good = declared("other.good", refuses)
    installed(other__good=good, other__bad=ValueError("Zqcanary"), other__number=7)
    assert attacks.catalogue()["other.good"] is good
    assert attacks.broken() == (
        "other.bad: cannot be loaded (ValueError)",
        "other.number: is no unlearn.requests.attacks.Declaration",
    )
    assert {declaration.name for declaration in attacks.BUILT_IN} < set(attacks.catalogue())
