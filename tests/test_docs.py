"""The documents keep up with the code: commands parse, links resolve, tables and examples are what the code takes."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from probes import errors
from unlearn import cli
from unlearn.evidence.criteria import EXIT_CODES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
COMMAND = typer.main.get_command(cli.app)
# What no report may say of a result. A page may name these words only to say that they are not used.
CLAIMS = re.compile(r"\b(erased|deleted|anonymous|compliant|certified|guaranteed?)\b", re.IGNORECASE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def parse(words: list[str], *, whole: bool) -> None:
    """Walk a command line through the parsers; `whole` also wants every required argument."""
    command: Any = COMMAND
    context: Any = None
    while True:
        context = command.make_context(command.name, list(words), parent=context, resilient_parsing=not whole)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return
        _, command, words = command.resolve_command(context, rest)
        assert command is not None, f"no such command: {rest[0]}"


def quoted_commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Command lines of shell blocks (whole), and those in running text (as far as they go)."""
    for body in blocks(page, "sh", "console"):
        for line in body.splitlines():
            line = line.removeprefix("$ ").removeprefix(".venv/bin/")
            if line.startswith("unlearn "):
                yield line, True
    for quoted in re.findall(r"`(unlearn [^`]+)`", prose(page)):
        yield quoted, False


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    for line, whole in quoted_commands(page):
        words = shlex.split(line, comments=True)[1:]
        if "..." in words or words in (["--version"], ["--help"]):
            continue
        words = [word for word in words if word not in ("--help", "COMMAND")]
        try:
            parse(words, whole=whole)
        except Exception as error:
            pytest.fail(f"{name(page)}: `{line}`: {error}")


def test_a_wrong_command_would_be_noticed() -> None:
    for wrong in (["audit", "x", "--record", "f"], ["adit"], ["audit", "x"], ["draft", "controls", "x"]):
        with pytest.raises(Exception):  # noqa: B017
            parse(wrong, whole=True)


def options(command: Any) -> Iterator[tuple[str, str]]:
    for sub, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from options(inner)
        for parameter in inner.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                yield sub, option


def test_cli_page_names_every_command_and_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert {sub for sub in COMMAND.commands if f"unlearn {sub}" not in text} == set()
    assert {(sub, option) for sub, option in options(COMMAND) if f"`{option}`" not in text} == set()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name(page)} links to {target}"


def exit_codes(page: Path) -> dict[int, str]:
    section = page.read_text().split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    return {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", section, re.MULTILINE)}


def test_exit_codes_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli._guard(interrupt)
    capsys.readouterr()
    kinds = (errors.UsageError, errors.IntegrityError, errors.UnsupportedError, errors.ResourceError)
    known = {*EXIT_CODES.values(), stopped.value.code, *(kind.exit_code for kind in kinds)}
    for page in (ROOT / "README.md", ROOT / "docs" / "cli.md"):
        table = exit_codes(page)
        assert set(table) == known, name(page)
        for verdict, code in EXIT_CODES.items():
            assert verdict in table[code], name(page)
    words = "criteria|usage|inconclusive|integrity|runtime|interrupted"
    assert {int(code) for code in re.findall(rf"\b(\d+) (?:{words})", cli.__doc__ or "")} == known


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        used = set(re.findall(r"(?:^ *|`|\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert used <= targets, name(page)


def test_readme_names_the_test_command() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Tests\n", 1)[1].split("\n## ", 1)[0]
    assert FENCE.findall(section) == [("sh", "make test\n")]


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(body, id=f"{name(page)}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, "yaml"), start=1)
    ]


@pytest.mark.parametrize("body", yaml_blocks())
def test_yaml_blocks_are_valid(body: str, tmp_path: Path) -> None:
    from unlearn.requests.request import validate_file

    content = yaml.safe_load(body)
    if content["schema"] == "unlearn.request/v1":
        provide(content, tmp_path)
    file = tmp_path / "file.yaml"
    file.write_text(body)
    assert validate_file(file) == []
    if content["schema"] == "unlearn.method/v1":
        from unlearn.editors.base import make_editor

        make_editor(content["name"], content["parameters"])


def provide(request: dict[str, Any], folder: Path) -> None:
    """The files a quoted request names: one record each, in the columns that it maps."""
    for part in ("data", "control", "retain", "corpus"):
        given = request.get(part)
        if not given:
            continue
        columns = {"id": "id", "prompt": "prompt", "completion": "completion"} | given.get("fields", {})
        file = folder / given.get("records" if part == "data" else "path")
        row = {columns["id"]: "1", columns["prompt"]: "p", columns["completion"]: "c"}
        if file.suffix == ".csv":
            file.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
        else:
            file.write_text(str(row).replace("'", '"') + "\n")
    for part in ("checkpoint", "reference"):
        if part in request:
            (folder / request[part]["path"]).mkdir()
    if path := request.get("method", {}).get("overrides", {}).get("path"):
        (folder / path).mkdir()


def test_record_examples_are_records(tmp_path: Path) -> None:
    from unlearn.requests.request import validate_file

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0001.png").write_bytes(b"not looked into")
    bodies = [body for page in PAGES for body in blocks(page, "jsonl")]
    assert bodies
    for number, body in enumerate(bodies):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(body)
        assert validate_file(file) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_name_what_exists(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("unlearn", "probes"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name(page)}: {node.module}.{alias.name}"


def test_method_options_are_documented() -> None:
    from unlearn.requests.presets import load_method

    text = (ROOT / "docs" / "ssd.md").read_text()
    for option, default in load_method("ssd").parameters.items():
        shown = f"`{default}`" if isinstance(default, str | list) else str(default)
        assert f"| `{option}` | {shown} |" in text, f"docs/ssd.md: {option}, default {default}"


def test_default_policy_is_documented() -> None:
    from unlearn.requests.presets import load_policy

    policy = load_policy("default")
    for page, kind in (("forget.md", "forget"), ("audit.md", "audit")):
        text = (ROOT / "docs" / page).read_text()
        for criterion in policy.criteria(kind, "causal_lm"):  # type: ignore[arg-type]
            assert criterion.id in text, f"docs/{page}: {criterion.id}"
            assert f"{criterion.max if criterion.max is not None else criterion.margin:.2f}" in text, f"docs/{page}"


def test_figures_and_report_keys_are_documented() -> None:
    from probes import classify, figures
    from reports import report_schema
    from unlearn.evidence.metrics import IMAGES, LANGUAGE

    audit, report = ((ROOT / "docs" / page).read_text() for page in ("audit.md", "report.md"))
    wanted = {*figures.COLUMNS, *classify.COLUMNS, *(metric.name for metric in (*LANGUAGE, *IMAGES))}
    assert {figure for figure in wanted - {"record_id", "n_tokens"} if f"`{figure}`" not in audit} == set()
    assert {key for key in report_schema()["properties"] if not re.search(rf"`{key}(\[\])?`", report)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_claim_that_no_run_supports(page: Path) -> None:
    sentences = re.split(r"(?<=[.:])\s", FENCE.sub("", page.read_text()))
    assert [s for s in sentences if CLAIMS.search(s) and not re.search(r"\b(never|no|not|nor)\b", s)] == []
