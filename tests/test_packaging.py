"""The built wheel: what is in it, what it would shadow, and that it works away from the source tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from unlearn import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("unlearn", "probes", "attacks", "reports")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(command: list[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_packages_and_their_data_and_nothing_else(contents: set[str]) -> None:
    def files(folder: str, inside: str) -> set[str]:
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in found}

    expected = set().union(*(files(package, package) for package in PACKAGES), files("configs", "unlearn/configs"))
    info = {name for name in contents if name.split("/")[0].endswith(".dist-info")}
    assert contents - info == expected


def test_wheel_holds_what_is_read_at_run_time(contents: set[str]) -> None:
    for package in PACKAGES:
        assert f"{package}/py.typed" in contents
    for pattern in (
        r"unlearn/configs/suites/standard\.yaml",
        r"unlearn/configs/methods/ssd\.yaml",
        r"unlearn/configs/policies/default\.yaml",
        r"unlearn/configs/demo/.+\.jsonl",
        r"reports/templates/.+\.html\.j2",
        r"reports/templates/.+\.md\.j2",
        r"reports/(.+/)?report\.schema\.json",
        r"[^/]+\.dist-info/licenses/LICENSE",
    ):
        assert any(re.fullmatch(pattern, name) for name in contents), pattern


def test_wheel_describes_itself(wheel: Path, contents: set[str]) -> None:
    info = next(name.split("/")[0] for name in contents if name.endswith("/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("unlearn-audit", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert entry_points.split() == ["[console_scripts]", "unlearn", "=", "unlearn.cli:main"]


def test_wheel_shadows_nothing_installed(contents: set[str]) -> None:
    names = {name.split("/")[0] for name in contents if ".dist-info" not in name}
    assert names == set(PACKAGES)
    assert not names & set(sys.stdlib_module_names)
    providers = packages_distributions()
    assert {provider for name in names for provider in providers.get(name, [])} <= {"unlearn-audit"}


def test_constraints_pin_everything_that_is_required() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    todo = [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]
    todo += [Requirement(text) for text in PROJECT["dependencies"]]
    seen, missing = set(), set()
    for requirement in todo:
        name = canonicalize_name(requirement.name)
        if name not in pins or not requirement.specifier.contains(pins[name]):
            missing.add(f"{requirement.name} {requirement.specifier}")
        key = (name, frozenset(requirement.extras))
        # The build of PyTorch decides which GPU packages it asks for; they carry its own exact pins.
        if key in seen or name == "torch":
            continue
        seen.add(key)
        try:
            further = map(Requirement, distribution(requirement.name).requires or [])
        except PackageNotFoundError:
            continue
        extras = requirement.extras or {""}
        todo += [r for r in further if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    assert len(seen) > 50
    assert not missing


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, whose other packages are this environment's.

    They are reached by a path file, which is not followed recursively: an editable install's own path file, and with
    it the source tree, stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    paths = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "rest.pth").write_text("\n".join(dict.fromkeys(paths.values())) + "\n")
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    run([sys.executable, "-m", "pip", "--python", python, *install, wheel], folder)
    return folder / "bin"


def test_installed_wheel_finds_itself_and_its_presets(installed: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, attacks, probes, reports, unlearn, unlearn.resources\n"
        "found = [m.__file__ for m in (attacks, probes, reports, unlearn)]\n"
        "found.append(str(unlearn.resources.config_path('methods', 'ssd')))\n"
        "print(*map(os.path.realpath, found + sys.path), sep='\\n')"
    )
    lines = [Path(line) for line in run([installed / "python", "-c", code], tmp_path).stdout.splitlines()]
    home = installed.parent.resolve()
    assert all(path.is_relative_to(home) for path in lines[:5]), lines[:5]
    assert ROOT not in lines[5:]
    assert "Usage" in run([installed / "unlearn", "--help"], tmp_path).stdout


@pytest.mark.slow
def test_installed_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    run([installed / "unlearn", "demo", "--tiny", "--out", tmp_path / "run"], tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "run" / "forget" / "report" / "report.html").stat().st_size > 1000
