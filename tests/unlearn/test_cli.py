"""The command line: documented exit codes, one line an error, results on stdout, progress on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import World
from unlearn import cli


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


def test_audit_exits_1_where_memorisation_is_above_policy(run, world: World, tmp_path: Path) -> None:
    arguments = ("audit", world.planted, "--records", world.records, "--control", world.control, "--suite", "quick")
    outcome = run(*arguments, "--out", tmp_path / "a", "--display", "plain")
    assert outcome.code == 1
    assert "verdict: criteria not met" in outcome.out
    assert "ok before" in outcome.err
    assert all(len(line) <= 120 for line in outcome.out.splitlines())
    relaxed = run(*arguments, "--out", tmp_path / "b", "--exit-zero", "--display", "none")
    assert (relaxed.code, relaxed.out, relaxed.err) == (0, "", "")


def test_audit_exits_3_where_it_cannot_tell(run, world: World, tmp_path: Path) -> None:
    outcome = run(
        "--display", "json", "audit", world.base, "--records", world.records, "--control", world.control,
        "--suite", "quick", "--out", tmp_path / "a",
    )  # fmt: skip
    assert outcome.code == 3
    data = json.loads(outcome.out)
    assert data["verdict"] == "inconclusive"
    assert data["exit_code"] == 3
    for line in outcome.err.splitlines():
        json.loads(line)


def test_audit_exits_0_where_criteria_are_met(run, world: World, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "schema: unlearn.policy/v1\nname: loose\ndescription: for a test\naudit:\n  causal_lm:\n"
        "    - {id: A1, metric: extraction.greedy, aggregate: rate, test: point, max: 0.5}\n"
    )
    outcome = run(
        "audit", world.base, "--records", world.records, "--policy", policy, "--suite", "quick",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert outcome.code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["audit", "{w}/nowhere", "--records", "{w}/records.jsonl"], 2, "expected a checkpoint folder"),
        (["audit", "{w}/planted", "--records", "{w}/nothing.jsonl"], 2, "expected an existing file"),
        (
            ["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--out", "{w}/planted/run"],
            4,
            "apart from the input",
        ),
        (["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--suite", "nosuch"], 2, "expected one of"),
        (["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--dtype", "int4"], 2, "expected --dtype"),
        (["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--batch-size", "-3"], 2, "expected --batch-size"),
        (["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--device", "abacus"], 5, "device"),
        (["audit", "{w}/planted", "--records", "{w}/records.jsonl", "--display", "loud"], 2, "expected --display"),
        (["audit", "org/model", "--records", "{w}/records.jsonl"], 2, "--online"),
        (["forget"], 2, "expected a request file"),
        (["forget", "{w}/nothing.yaml"], 2, "expected"),
        (["forget", "--resume", "{w}/nowhere"], 2, "expected a run folder"),
        (["report", "{w}"], 2, "expected a run folder"),
        (["verify", "{w}"], 2, "expected a run folder"),
        (["diff", "{w}", "{w}"], 2, "expected a run folder"),
        (["validate", "{w}/nothing.yaml"], 2, "expected an existing file"),
        (["ls", "everything"], 2, "expected one of"),
        (["forget", "a.yaml", "--resume", "{w}", "--chain"], 2, "expected --resume alone"),
        (["queue", "{w}/nowhere"], 2, "expected a folder of request files"),
        (["queue", "{w}", "--advance", "always"], 2, "expected --advance"),
        (["ledger", "list", "--ledger", "{w}"], 2, "expected a run store"),
        (["ledger", "verify", "--ledger", "{w}"], 2, "expected a run store"),
        (["ledger", "show", "1", "--ledger", "{w}"], 2, "expected a run store"),
        (["frobnicate"], 2, ""),
        (["audit", "--frobnicate"], 2, ""),
    ],
)
def test_bad_input_is_one_clear_line(run, world: World, tmp_path: Path, arguments, code: int, words: str) -> None:
    filled = [argument.format(w=world.folder) for argument in arguments]
    if "audit" in filled and "--out" not in filled:
        filled += ["--out", str(tmp_path / "run")]
    outcome = run(*filled)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    if words:
        assert len(outcome.err.strip().splitlines()) == 1


def test_report_check_and_verify(run, world: World, tmp_path: Path) -> None:
    run(
        "audit", world.planted, "--records", world.records, "--control", world.control, "--suite", "quick",
        "--out", tmp_path / "a", "--display", "none",
    )  # fmt: skip
    assert run("report", tmp_path / "a", "--audience", "subject", "--format", "html").code == 0
    assert (tmp_path / "a/report/report-subject.html").is_file()
    assert run("report", tmp_path / "a", "--check").code == 0
    assert run("verify", tmp_path / "a").code == 0
    page = tmp_path / "a/report/report.html"
    page.write_text(page.read_text().replace("criteria not met", "criteria met"))
    assert run("report", tmp_path / "a", "--check").code == 4
    outcome = run("verify", tmp_path / "a")
    assert outcome.code == 4
    assert "failed   documents" in outcome.out


def test_diff_names_what_differs(run, world: World, tmp_path: Path) -> None:
    for name, checkpoint in (("a", world.planted), ("b", world.base), ("c", world.planted)):
        run(
            "audit", checkpoint, "--records", world.records, "--control", world.control, "--suite", "quick",
            "--out", tmp_path / name, "--display", "none",
        )  # fmt: skip
    differing = run("diff", tmp_path / "a", tmp_path / "b")
    assert differing.code == 0
    assert "checkpoint.tensor_digest" in differing.out
    assert "extraction.greedy" in differing.out
    same = run("diff", tmp_path / "a", tmp_path / "c")
    assert "inputs are the same" in same.out
    assert "figures are the same" in same.out


def test_validate_reports_every_mistake_at_once(run, tmp_path: Path) -> None:
    (tmp_path / "request.yaml").write_text("schema: unlearn.request/v1\ndata: {records: gone.jsonl}\nsuit: quick\n")
    outcome = run("validate", tmp_path / "request.yaml")
    assert outcome.code == 2
    assert len(outcome.out.splitlines()) >= 3


def test_init_writes_a_request_once(run, tmp_path: Path) -> None:
    assert run("init", tmp_path / "request.yaml").code == 0
    assert run("init", tmp_path / "request.yaml").code == 2


@pytest.mark.parametrize("what", ["probes", "attacks", "editors", "suites"])
def test_ls(run, what: str) -> None:
    outcome = run("ls", what)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) >= 2


def test_drafts_are_files_to_review(run, world: World, tmp_path: Path) -> None:
    outcome = run("draft", "control", world.records, "--out", tmp_path / "control.jsonl")
    assert outcome.code == 0, outcome.err
    assert len((tmp_path / "control.jsonl").read_text().splitlines()) == 8
    outcome = run("draft", "retain", world.records, world.planted, "--out", tmp_path / "retain.jsonl", "-n", 4)
    assert outcome.code == 0, outcome.err
    assert len((tmp_path / "retain.jsonl").read_text().splitlines()) == 4


def test_an_internal_error_shows_no_text(run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn.evidence import measure

    def broken(*arguments: object) -> None:
        raise ValueError("the secret is 4711")

    monkeypatch.setattr(measure, "measure", broken)
    outcome = run("audit", world.planted, "--records", world.records, "--suite", "quick", "--out", tmp_path / "a")
    assert outcome.code == 5
    assert "internal error: ValueError at test_cli.py" in outcome.err
    assert "4711" not in outcome.err
    assert json.loads((tmp_path / "a/run.json").read_text())["status"] == "failed"


def test_an_interrupt_is_130_and_resumable(run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn.evidence import measure

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", stopped)
    outcome = run("forget", world.request, "--out", tmp_path / "a", "--display", "plain")
    assert outcome.code == 130
    assert json.loads((tmp_path / "a/run.json").read_text())["status"] == "interrupted"
