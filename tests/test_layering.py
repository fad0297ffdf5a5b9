"""Who may import whom (docs in CONTRIBUTING.md), read from the source, and what a light start may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("probes", "attacks", "unlearn", "reports")
MAY_IMPORT = {
    "probes": {"probes"},
    "attacks": {"attacks", "probes"},
    "reports": {"reports"},
    "unlearn": {"unlearn", "attacks", "probes", "reports"},
}
HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow", "scipy", "pydantic", "matplotlib")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level names of everything imported anywhere in a module, lazily or by name included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.split(".")[0] for name in names}


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "import torch.nn as nn\nfrom attacks.extraction import x\nfrom . import y\n"
        "def f():\n    import pandas\n    importlib.import_module('reports.build')\n    __import__('scipy')\n"
    )
    assert imported(source) == {"torch", "attacks", "pandas", "reports", "scipy"}


@pytest.mark.parametrize("package", PACKAGES)
def test_layers_point_downwards(package: str) -> None:
    files = modules(package)
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(extra)
        for path in files
        if (extra := (imported(path.read_text()) & set(PACKAGES)) - MAY_IMPORT[package])
    }
    assert not wrong


def test_no_layer_imports_tests_or_benchmarks() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert not imported(path.read_text()) & {"tests", "benchmarks", "conftest"}, path


def test_one_module_alone_imports_reports() -> None:
    users = [path.name for path in modules("unlearn") if "reports" in imported(path.read_text())]
    assert len(users) == 1, users


def test_reports_need_no_model_library() -> None:
    for path in modules("reports"):
        assert not imported(path.read_text()) & {"torch", "transformers"}, path


LOADED = f"print(*sorted(set(sys.modules) & set({HEAVY!r})), sep=',', file=sys.stderr)"


@pytest.mark.parametrize(
    "program",
    [
        "import sys, unlearn",
        "import sys; from unlearn import cli",
        "import sys; from unlearn.cli import main; sys.argv = ['unlearn', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code",
    ],
    ids=["import unlearn", "import unlearn.cli", "unlearn --help"],
)
def test_a_light_start_loads_nothing_heavy(program: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"{program}\n{LOADED}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == ""


def test_help_answers_in_half_a_second() -> None:
    program = (
        "import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        "from unlearn.cli import main; sys.argv = ['unlearn', '--help']; main()"
    )
    command = [sys.executable, "-c", program]
    taken = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr for _ in range(3)]
    assert min(map(float, taken)) < 0.5  # seconds of processor time, which other processes do not change
