"""The study of logit difference on TOFU: its figures against hand-made sums, and a pair of models from nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import tofu, uld_study
from tests.tiny import causal_lm, tokenizer

Rows = list[dict[str, Any]]
PEOPLE = ("Ada Bell", "Ines Kato", "Omar Reyes", "Lena Moss", "Ivo Hahn", "Mia Sato")


def questions(names: tuple[str, ...], start: int) -> Rows:
    """Two questions a name, with every column of TOFU's `*_perturbed` files."""
    rows = []
    for i, name in enumerate(names):
        for what, values in (("job", ("baker", "pilot", "judge")), ("city", ("Lima", "Oslo", "Cairo"))):
            right = values[(start + i) % 3]
            rows.append({
                "question": f"What is the {what} of {name}?",
                "paraphrased_question": f"Tell me: which {what} has {name}?",
                "answer": f"The {what} of {name} is {right}.",
                "paraphrased_answer": f"{right} is the {what} of {name}.",
                "perturbed_answer": [f"{value} is the {what} of {name}." for value in values if value != right],
            })  # fmt: skip
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as TOFU has them: four people to keep, two to forget, and facts with alternatives."""
    kept, gone = questions(PEOPLE[:4], 0), questions(PEOPLE[4:], 1)
    facts = [{"question": f"Capital of {c}?", "answer": a, "perturbed_answer": [b]} for c, a, b in
             (("Peru", "Lima", "Oslo"), ("Norway", "Oslo", "Lima"))]  # fmt: skip
    plain = [{key: row[key] for key in ("question", "answer")} for row in kept + gone]
    files = {"full": plain, "forget01": plain[len(kept) :], "forget01_perturbed": gone, "retain_perturbed": kept}
    files |= {f"{name}_perturbed": facts for name in tofu.SETS}
    out = tmp_path / "tofu"
    out.mkdir()
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_truth_ratio_and_probabilities_against_one_answer_at_a_time() -> None:
    model, tok, rows = causal_lm("llama"), tokenizer(), questions(PEOPLE[:2], 0)

    def summed(question: str, answer: str) -> tuple[float, int]:
        before = len(tok(tofu.PROMPT.format(question))["input_ids"])
        ids = tok(tofu.PROMPT.format(question) + tofu.COMPLETION.format(answer))["input_ids"]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return sum(float(logs[t - 1, ids[t]]) for t in range(before, len(ids))), len(ids) - before

    right, share, ratio = tofu.Questions.of(rows, tok).measure(model)
    for i, row in enumerate(rows):
        whole, n = summed(row["question"], row["answer"])
        wrong = [summed(row["question"], answer) for answer in row["perturbed_answer"]]
        given = summed(row["question"], row["paraphrased_answer"])
        mean = np.mean([np.exp(total / length) for total, length in wrong])
        assert right[i] == pytest.approx(np.exp(whole / n), rel=1e-4)
        assert ratio[i] == pytest.approx(mean / np.exp(given[0] / given[1]), rel=1e-4)
        odds = sum(np.exp(value - whole) for value, _ in wrong)  # no product of so many probabilities is a float
        assert share[i] == pytest.approx(1 / (1 + odds), rel=1e-3)


def test_a_pair_from_nothing_is_two_models_of_one_start_and_only_one_reads_what_is_to_be_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: dict[str, Rows] = {}
    made: Callable[..., None] = tofu.make

    def spied(base: Path, rows: Rows, out: Path, **options: Any) -> None:
        learnt[out.name] = rows
        made(base, rows, out, **options)

    monkeypatch.setattr(tofu, "make", spied)
    monkeypatch.setattr(tofu, "STEPS", (1, 2))
    names, weights = ("untrained", "start", "target", "reference"), {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tofu.make_from_nothing(folder, "forget01", 8, tmp_path / name, seed=seed)
        for which in names:
            file = tmp_path / name / which / "model.safetensors"
            weights[name, which] = hashlib.sha256(file.read_bytes()).hexdigest()
        assert len({(tmp_path / name / which / "tokenizer.json").read_bytes() for which in names}) == 1
    assert all(weights["a", which] == weights["b", which] != weights["c", which] for which in names)
    assert len({weights["a", which] for which in names}) == len(names)
    to_forget = {row["answer"] for row in tofu.rows(folder, "forget01")}
    answers = {which: {row["answer"] for row in rows} for which, rows in learnt.items()}
    assert not (answers["start"] | answers["reference"]) & to_forget
    assert answers["target"] == answers["reference"] | to_forget
    assert answers["start"] == answers["reference"]
    unread = {row["paraphrased_question"] for row in tofu.rows(folder, "forget01_perturbed")}
    unread |= {row["paraphrased_answer"] for row in tofu.rows(folder, "retain_perturbed")}
    assert not unread & {
        text for which in ("start", "target") for row in learnt[which] for text in (row["question"], row["answer"])
    }


def test_the_study_trains_four_assistants_and_never_scores_what_they_were_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tofu, "STEPS", (1, 1))
    monkeypatch.setitem(uld_study.SMALL, "first_retain", 4)
    monkeypatch.setitem(uld_study.SMALL, "retain", 4)
    options = uld_study.arguments(["--small", "--tofu", str(folder), "--steps", "2", "--seeds", "2"])
    given: list[set[str]] = []
    train = uld_study.train_assistant

    def watched(context: Any, parameters: Any) -> Any:
        given.append({record.record_id for record in context.retain})
        assert len(context.forget) == 4
        assert {tuple(record.ids) for record in context.retain}.isdisjoint(scored)
        return train(context, parameters)

    monkeypatch.setattr(uld_study, "train_assistant", watched)
    scored: set[tuple[int, ...]] = set()
    measured = tofu.Questions.of

    def noted(rows: Rows, tok: Any) -> tofu.Questions:
        found = measured(rows, tok)
        scored.update(record.ids for record in found.records)
        return found

    monkeypatch.setattr(tofu.Questions, "of", noted)
    rows = list(uld_study.run(options))
    assert [row["case"] for row in rows] == ["reference", "target", *uld_study.CELLS, *uld_study.CELLS]
    assert len(given) == 8
    reference, target, *cells = rows
    assert reference["forget_quality"] == 1.0
    assert target["utility_share"] == 1.0
    assert {row["steps"] for row in cells} == {2}
    assert all(np.isfinite(row[figure]) for row in rows for figure in uld_study.FIGURES)
    assert uld_study.contrasts(rows).count("\n") == len(uld_study.CONTRASTS)
    assert "both" in uld_study.table(rows)
    capsys.readouterr()


def test_differences_are_paired_by_seed() -> None:
    base = {0: 0.1, 1: 0.5, 2: 0.9}
    rows = [
        {"case": case, "seed": seed, **dict.fromkeys(uld_study.FIGURES, value + more)}
        for case, more in (("neither", 0.0), ("paraphrases", 0.25))
        for seed, value in sorted(base.items(), reverse=case == "neither")
    ]
    first, *rest = uld_study.contrasts(rows).splitlines()[1:]
    assert not rest  # only one of the pairs of cells is there
    assert first.startswith("paraphrases - neither")
    assert first.count("+0.250 [+0.250, +0.250]") == len(uld_study.FIGURES)


@pytest.mark.parametrize("given", [[], ["--target", "x"], ["--small", "--reference", "x"]], ids=str)
def test_a_study_needs_both_checkpoints_or_makes_them(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        uld_study.arguments(["--tofu", "x", *given])
    assert error.value.code == 2
    assert "expected --target and --reference" in capsys.readouterr().err
