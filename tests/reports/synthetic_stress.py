"""Attacks on an edit as the pipelines write them, from made-up numbers: results by stage, their rows in metrics.json,
and what compare/paired.json says of each and of all together.

`SCENARIOS` gives, for each attack, the status it ends with and the residual it is read from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.reports.synthetic import dump, figure, write_run
from tests.reports.synthetic_attacks import curve, result

Json = dict[str, Any]
N = 50
# name: (goal, access, budget, title of the figure)
ATTACKS = {
    "recovery.relearning": (
        "does training on half of the records bring the other half back?",
        "A2",
        "20 steps of training on half of the records",
        "probability per token after relearning",
    ),
    "recovery.relearning_retain": (
        "does training on data without any record bring records back?",
        "A2",
        "20 steps of training on the retain set",
        "probability per token after training",
    ),
    "recovery.quantisation": (
        "does rounding the weights bring records back?",
        "A2",
        "1 pass for each number of bits",
        "probability per token after rounding",
    ),
    "recovery.pruning": (
        "does setting small weights to zero bring records back?",
        "A2",
        "1 pass for each share",
        "probability per token after pruning",
    ),
    "recovery.interpolation": (
        "how far back towards the original until records return?",
        "A3",
        "1 pass for each step",
        "probability per token on the way back",
    ),
    "elicitation.soft_prompt": (
        "does a trained prompt of vectors bring records out?",
        "A2",
        "100 steps on half of the records",
        "probability per token after the prompt",
    ),
    "regurgitation.styles": (
        "is the record known when it is asked in another way?",
        "A1",
        "4 passes a record",
        "probability of the right letter",
    ),
    "hidden_knowledge.logit_lens": (
        "is the record predicted at an inner layer?",
        "A2",
        "1 pass",
        "best probability over the layers",
    ),
    "edit_difference.read_out": (
        "do both checkpoints together tell what was to be forgotten?",
        "A3",
        "2 passes a record",
        "change of the loss as a share of its range",
    ),
}
COLLATERAL = {
    "collateral.calibration": (
        "is confidence still what it should be?",
        "A1",
        "expected calibration error",
        0.04,
        0.09,
    ),
    "collateral.induction": ("can the model still copy from its context?", "A2", "copying score", 0.71, 0.62),
}
NOT_RUN = {
    "elicitation.suffix": ("A2", "it is beyond the budget of 400 passes a record"),
    "regurgitation.paraphrases": ("A0", "it needs paraphrases of the records"),
}
STEPS = (0, 5, 10, 15, 20)
# scenario: attack -> (status, residual, half the width of its bounds, level of never-seen records under the attack)
_RESIST: dict[str, tuple[str, float | None, float, float]] = dict.fromkeys(ATTACKS, ("resists", 0.02, 0.04, 0.10))
SCENARIOS: dict[str, dict[str, tuple[str, float | None, float, float]]] = {
    "hidden": _RESIST
    | {
        "recovery.relearning": ("recovers", 0.63, 0.16, 0.12),
        "recovery.relearning_retain": ("recovers", 0.34, 0.18, 0.10),
        "recovery.quantisation": ("recovers", 0.31, 0.14, 0.08),
        "recovery.pruning": ("undecided", 0.06, 0.13, 0.09),
        "elicitation.soft_prompt": ("re-teaches", 0.41, 0.2, 0.48),
        "regurgitation.styles": ("not testable", None, 0.0, 0.55),
    },
    "not hidden": _RESIST,
    "undecided": _RESIST | {"recovery.quantisation": ("undecided", 0.07, 0.15, 0.09)},
    "not tested": dict.fromkeys(ATTACKS, ("not testable", None, 0.0, 0.8)),
}
REASONS = {
    "recovers": "63% of what stood out is there under this attack, 0.52 above the reference on the same records",
    "resists": "at most 6% of what stood out is there under this attack",
    "undecided": "the residual is not shown to be above 0, nor below 0.1",
    "re-teaches": "never-seen records rose by 0.38 too, more than a tenth of the 0.4 by which records stood out: the "
    "attack teaches, so it says nothing about this edit",
    "not testable": "in the original the records stand out from never-seen ones by 0.08 under this attack, less than "
    "0.2",
}
STATEMENTS = {
    "hidden": "3 of 7 attacks brought back what the edit had taken away: the records were hidden, at least in part",
    "not hidden": "under all 9 attacks less than 10% of what stood out came back",
    "undecided": "none of 9 attacks is shown to bring records back, and 1 could not rule it out",
    "not tested": "no attack on the edit's durability could be read",
}
AT_INFERENCE_TIME = "an inference-time method: the folder holds the original's weights; whoever has them has arm O"
BY_CONSTRUCTION = "the files of the copy hold the original's weights, by construction and not by measurement"
CRITERION = {
    "id": "C4",
    "metric": "residual",
    "attack": "all",
    "aggregate": "mean",
    "test": "upper95",
    "max": 0.1,
    "margin": None,
    "required": True,
    "set": "records",
    "observed": figure(0.63, N, 0.52, 0.74, "ratio"),
    "status": "not met",
    "reason": "recovery.relearning: residual above 0.1, beyond chance",
}


def write_stress_run(run: Path, scenario: str = "hidden", *, retain: bool = True, **options: Any) -> Path:
    """A forget run of `write_run` with attacks on the edit; `retain`: whether a retain set was given or drafted."""
    verdict = {"hidden": "criteria not met", "not hidden": "criteria met"}.get(scenario, "inconclusive")
    reference = options.get("reference", True)
    write_run(run, **{"verdict": verdict, "blocks": 4, **options})
    cases = dict(SCENARIOS[scenario])
    not_run = dict(NOT_RUN)
    if not retain:
        cases.pop("recovery.relearning_retain")
        not_run["recovery.relearning_retain"] = ("A2", "it needs a retain set")
        sets = json.loads((run / "inputs/sets.json").read_text())
        dump(run / "inputs/sets.json", sets | {"retain": None})
    image = options.get("task") == "image_classification"
    if image:
        for name in [name for name in cases if name.partition(".")[0] in ("regurgitation", "hidden_knowledge")]:
            cases.pop(name)
            not_run[name] = ("A1", "not defined for this kind of model")
    arms = {name: _arms(case, reference=reference) for name, case in cases.items()}
    for stage in ("before", "after", "reference") if reference else ("before", "after"):
        folder = run / stage / "attacks"
        for name, (attacked, plain) in arms.items():
            if not (name == "edit_difference.read_out" and stage != "after"):
                dump(folder / f"{name}.json", _result(name, stage, attacked, plain, retain=retain))
        for name, (_, _, title, before, after) in COLLATERAL.items():
            dump(folder / f"{name}.json", _collateral(name, title, before if stage == "before" else after))
        path = run / stage / "metrics.json"
        metrics = json.loads(path.read_text())
        rows = [row for row in metrics["attacks"] if not row["name"].startswith(("recovery.", "regurgitation."))]
        dump(path, metrics | {"attacks": rows + _rows(arms, not_run, stage)})
    paired = json.loads((run / "compare/paired.json").read_text())
    if not retain:
        paired["utility"] = {}
    entries = {name: _entry(case, *arms[name]) for name, case in cases.items()}
    entries |= {
        name: {
            "arms": {"O": _share(before), "U": _share(after), "N": None, "R": _share(before) if reference else None},
            "plain": dict.fromkeys("OUNR"),
            "residual": None,
            "stress": None,
        }
        for name, (_, _, _, before, after) in COLLATERAL.items()
    }
    dump(run / "compare/paired.json", paired | {"attacks": entries, "stress": _summary(scenario, cases, not_run)})
    if scenario == "hidden":
        criteria = json.loads((run / "compare/criteria.json").read_text())
        dump(run / "compare/criteria.json", criteria | {"criteria": [*criteria["criteria"], CRITERION]})
    return run


def write_inference_time_run(run: Path, *, suite: bool = True, silent: bool = True, **options: Any) -> Path:
    """A forget run whose edit acts at inference time: attacks on weights ran on the original and the reference alone.

    Args:
        run: run folder.
        suite: whether the suite has attacks on an edit at all.
        silent: whether no record was emitted in the tests (E1), or some were (E0).
        options: of `write_stress_run`.
    """
    options = {"scenario": "not hidden", "verdict": "criteria not met", "residue": 0.0 if silent else 0.4, **options}
    write_stress_run(run, **options) if suite else write_run(run, **{"blocks": 4} | without(options, "scenario"))
    weights = {name for name, row in ATTACKS.items() if row[1] in ("A2", "A3")}
    path = run / "after/metrics.json"
    metrics = json.loads(path.read_text())
    for row in metrics["attacks"]:
        if row["access"] in ("A2", "A3") and row["status"] == "run":
            row |= {"status": "not_run", "reason": AT_INFERENCE_TIME, "figure": None, "detail": False}
            (run / "after/attacks" / f"{row['name']}.json").unlink(missing_ok=True)
    dump(path, metrics)
    plan = json.loads((run / "edit/plan.json").read_text())
    method = {"name": "uld", "version": "1", "paper": "arXiv 2406.08607", "inference_time": True}
    plan |= {"method": plan["method"] | method, "importances": {}, "warnings": ["It acts at inference time."]}
    dump(run / "edit/plan.json", plan)
    delta = json.loads((run / "edit/delta.json").read_text())
    statistics = {"added_elements": 1474560, "steps": 30}
    delta |= {"tensors": [], "changed_elements": 0, "total_elements": 135989568, "statistics": statistics}
    dump(run / "edit/delta.json", delta)
    paired = json.loads((run / "compare/paired.json").read_text())
    entries = {name: row for name, row in paired.get("attacks", {}).items() if name not in weights}
    read = [name for name, row in entries.items() if row["stress"]]
    found = _summary("not hidden", {name: SCENARIOS["not hidden"][name] for name in read}, dict.fromkeys(weights))
    found |= {"not_run": sorted(weights) if suite else [], "finding": "hidden", "statement": BY_CONSTRUCTION}
    dump(run / "compare/paired.json", paired | {"attacks": entries, "stress": found})
    criteria = json.loads((run / "compare/criteria.json").read_text())
    reason = "the copy's files hold the original's weights: the residual is 1 by construction"
    criteria["criteria"].append(CRITERION | {"observed": None, "reason": reason})
    dump(run / "compare/criteria.json", criteria | {"claim_level": "E1" if silent else "E0"})
    return run


def without(options: Json, *names: str) -> Json:
    """Options but for those named."""
    return {key: value for key, value in options.items() if key not in names}


def _share(value: float, half: float = 0.05) -> Json:
    return figure(value, N, max(0.0, value - half), min(1.0, value + half), "share")


def _arms(case: tuple[str, float | None, float, float], *, reference: bool) -> tuple[Json, Json]:
    """Under attack and without it."""
    status, residual, _, never = case
    original = never + 0.08 if status == "not testable" else 0.9
    edited = never + (residual or 0.0) * (original - never)
    attacked = {"O": _share(original), "U": _share(edited), "N": _share(never)}
    attacked["R"] = _share(0.086) if reference else None  # type: ignore[assignment]
    plain = {"O": _share(0.9), "U": _share(min(edited, 0.33)), "N": _share(0.088), "R": _share(0.052)}
    return attacked, plain | ({} if reference else {"R": None})


def _result(name: str, stage: str, attacked: Json, plain: Json, *, retain: bool) -> Json:
    arm = {"before": "O", "after": "U", "reference": "R"}[stage]
    title = ATTACKS[name][3]
    found = result(
        name,
        settings={"steps": 20, "rate": 3e-4} if "relearning" in name else {},
        headline="probability",
        figures={"probability": attacked[arm], "plain": plain[arm], "extracted": _share(0.14)},
        control={"probability": attacked["N"], "plain": plain["N"], "extracted": _share(0.0, 0.03)},
        titles={"probability": title, "plain": "the same without the attack", "extracted": "records extracted"},
        column="probability",
        notes=["Trained on half A, scored on half B, split by near-duplicates."] if "relearning" in name else [],
        cost={"passes": 66.0, "generated_tokens": 0, "reference_passes": 0},
    )
    if "relearning" in name:
        series = {
            "records (half B)": (plain[arm]["value"], attacked[arm]["value"]),
            "never seen": (plain["N"]["value"], attacked["N"]["value"]),
            **({"retained": (0.55, 0.78)} if retain else {}),
        }
        found["curves"] = [
            curve(
                "line",
                "probability by steps of training",
                "steps",
                "probability per token",
                [_series(label, *ends) for label, ends in series.items()],
            )
        ]
    if name == "recovery.quantisation":
        rows: list[list[Any]] = [[f"int{bits}", 0.2 + bits / 100] for bits in (8, 4, 3)]
        found["tables"] = [{"title": "By number of bits", "columns": ["kind", "probability"], "rows": rows}]
        found["curves"] = [curve("line", "by bits", "bits", "probability", [_series("records", 0.3, 0.2)])]
    return found


def _series(name: str, first: float, last: float) -> Json:
    y = [first + (last - first) * (step / STEPS[-1]) ** 0.5 for step in STEPS]
    low, high = [max(0.0, value - 0.05) for value in y], [min(1.0, value + 0.05) for value in y]
    return {"name": name, "x": list(STEPS), "y": y, "low": low, "high": high}


def _collateral(name: str, title: str, value: float) -> Json:
    rows: list[list[Any]] = [["first bin", value], ["last bin", value / 2]]
    return result(
        name,
        headline="figure",
        figures={"figure": _share(value)},
        titles={"figure": title},
        tables=[{"title": f"Parts of {name.partition('.')[2]}", "columns": ["part", "value"], "rows": rows}],
    )


def _rows(arms: Mapping[str, Any], not_run: Mapping[str, tuple[str, str]], stage: str) -> list[Json]:
    rows: list[Json] = []
    given = {name: ATTACKS[name][:3] for name in arms} | {
        name: (*row[:2], "1 pass") for name, row in COLLATERAL.items()
    }
    for name, (goal, access, budget) in given.items():
        ran = not (name == "edit_difference.read_out" and stage != "after")
        rows.append(
            {"name": name, "goal": goal, "access": access, "budget": budget, "status": "run" if ran else "not_run"}
            | {"reason": None if ran else "it compares the edited copy with the original; see the edited copy"}
            | {"figure": None, "detail": ran}
        )
    for name, (access, reason) in not_run.items():
        rows.append(
            {"name": name, "goal": "a goal", "access": access, "budget": None, "status": "not_run", "reason": reason}
            | {"figure": None, "detail": False}
        )
    return rows


def _entry(case: tuple[str, float | None, float, float], attacked: Json, plain: Json) -> Json:
    status, residual, half, never = case
    shown = (
        {"status": "not testable", "reason": REASONS["not testable"]}
        if residual is None
        else figure(residual, N, residual - half / 2, residual + half / 2, "ratio") | {"status": "ok", "reason": None}
    )
    bounds = residual is not None and status != "re-teaches"
    return {
        "arms": attacked,
        "plain": plain,
        "residual": shown,
        "stress": {
            "status": status,
            "reason": REASONS[status],
            "low": residual - half if bounds and residual is not None else None,
            "high": residual + half if bounds and residual is not None else None,
            "level": 0.95,
            "over_reference": figure(attacked["U"]["value"] - 0.086, N, -0.01, 0.7, "share")
            if attacked["R"] and bounds
            else None,
            "teaches": None if status == "not testable" else figure(never - 0.088, N, -0.03, never, "share", "none"),
        },
    }


def _summary(scenario: str, cases: Mapping[str, Any], not_run: Mapping[str, Any]) -> Json:
    def named(*statuses: str) -> list[str]:
        return [name for name, case in cases.items() if case[0] in statuses]

    return {
        "attacks": named("recovers", "resists", "undecided"),
        "margin": 0.1,
        "level": 0.95,
        "recovering": named("recovers"),
        "resisting": named("resists"),
        "re_teaching": named("re-teaches"),
        "undecided": named("undecided"),
        "not_testable": named("not testable"),
        "not_run": list(not_run),
        "finding": scenario,
        "statement": STATEMENTS[scenario],
    }
