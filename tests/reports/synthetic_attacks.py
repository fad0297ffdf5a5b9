"""Results of attacks as the pipelines write them, from made-up numbers: STAGE/attacks/*.json and the tables beside.

Members' scores are normal about a centre that depends on the stage, control's about zero, so that curves, areas and
lists agree with each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

Json = dict[str, Any]
CENTRES = {"before": 2.2, "after": 0.15, "reference": 0.0}
CONTROL = 120
CONFOUNDED = "the records alone tell members from non-members: AUC 0.712 [0.641, 0.783]"
SCORES = ("loss", "zlib", "min_k", "recall")
# name: (goal, access, budget)
ATTACKS = {
    "verbatim.sampled": ("how many samples until the record is emitted?", "A1", "read off the one pass"),
    "verbatim.sweep": ("is the record emitted from another prefix length or start?", "A0", "1 pass for each start"),
    "near_verbatim.greedy": ("is the record emitted up to a few edits?", "A0", "decoding from the first miss"),
    "untargeted.sampling": ("do free samples hold records?", "A1", "free samples, each scored once"),
    "exposure.canaries": ("what rank has a secret among all others of its form?", "A1", "random fills"),
    "pii.inference": ("can an attribute be inferred among candidates?", "A1", "1 pass for each candidate"),
    "duplicates.corpus": ("which near-duplicates does the request not cover?", "A0", "text only"),
    "membership.blind": ("can the sets be told apart without the model?", "A0", "text only"),
    **{
        f"membership.{score}": (f"can members be told from never-seen records by {score}?", "A1", "the one pass")
        for score in SCORES
    },
    "membership.flagged": ("which records can be called members?", "A1", "read off the scores"),
    "memory.recognition": ("is a record recognised against a never-seen one?", "A1", "read off the one pass"),
}
NOT_RUN = {
    "membership.reference": ("A1", "it needs a reference that never held the records"),
    "membership.rmia": ("A1", "it needs a reference that never held the records"),
    "template.extraction": ("A0", "it needs a tokenizer with a chat template"),
    "membership.gradient_norm": ("A2", "it is beyond the budget of 4 passes a record"),
    "hidden_knowledge": ("A2", "not part of this version"),
    "elicitation.soft_prompt": ("A2", "not part of this version"),
}


def figure(
    value: float | None, n: int, half: float | None = 0.05, unit: str = "share", direction: str = "lower"
) -> Json:
    ends = {"low": None, "high": None} if value is None or half is None else {"low": value - half, "high": value + half}
    if unit == "share" and value is not None and half is not None:
        ends = {"low": max(0.0, value - half), "high": min(1.0, value + half)}
    return {
        "value": value,
        "unit": unit,
        "n": n,
        "ci_low": ends["low"],
        "ci_high": ends["high"],
        "ci_level": 0.95,
        "direction": direction,
    }


def result(name: str, **parts: Any) -> Json:
    """A result file with every key of the contract."""
    whole: Json = {
        "schema": "unlearn.attack/v1",
        "attack": name,
        "settings": {},
        "status": "run",
        "reason": None,
        "headline": None,
        "figures": {},
        "control": {},
        "titles": {},
        "not_resolvable": {},
        "curves": [],
        "tables": [],
        "column": None,
        "pvalue": None,
        "pvalue_holm": None,
        "confounded": None,
        "cost": {"passes": 1.0, "generated_tokens": 0, "reference_passes": 0},
        "notes": [],
    }
    assert set(parts) <= set(whole)
    return whole | parts


def curve(kind: str, title: str, x: str, y: str, series: list[Json], scale: str = "linear") -> Json:
    axes = {"x": {"label": x, "scale": scale}, "y": {"label": y, "scale": scale if kind == "roc" else "linear"}}
    return {"kind": kind, "title": title, **axes, "series": series}


def roc_points(members: list[float], others: list[float]) -> tuple[list[float], list[float]]:
    """Rates at every threshold, from (0, 0) to (1, 1)."""
    x, y = [0.0], [0.0]
    for threshold in sorted({*members, *others}, reverse=True):
        x.append(sum(score >= threshold for score in others) / len(others))
        y.append(sum(score >= threshold for score in members) / len(members))
    return x, y


def area(x: list[float], y: list[float]) -> float:
    return sum((b - a) * (p + q) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False))


def results(stage: str, ids: Sequence[str], names: Sequence[str], confounded: bool) -> tuple[list[Json], list[Json]]:
    """Result files and per-record rows of the named attacks on one stage."""
    rng = random.Random(f"attacks {stage}")
    centre, n = CENTRES[stage], len(ids)
    known = {name: rng.gauss(centre, 1.0) for name in ids}
    rows: list[Json] = [{"record_id": name} for name in ids]
    made = {name: MAKERS.get(name.partition(".")[0], _membership)(name, stage, rng, n) for name in names}
    for name, found in made.items():
        family, _, attack = name.partition(".")
        if family in ("verbatim", "near_verbatim") or attack == "flagged":
            limit = {"verbatim": 2.0, "near_verbatim": 1.4}.get(family, 1.8)
            for row in rows:
                row[f"{name}:score"] = known[row["record_id"]]
                row[f"{name}:hit"] = known[row["record_id"]] > limit
            found["column"] = "score"
        if family == "membership" and attack != "blind":
            found["confounded"] = CONFOUNDED if confounded else None
    return list(made.values()), rows


def _verbatim(name: str, stage: str, rng: random.Random, n: int) -> Json:
    level = {"before": 0.7, "after": 0.02, "reference": 0.0}[stage]
    x = [i / 10 for i in range(1, 10)]
    y = [level * (0.3 + 0.7 * at) for at in x]
    if name == "verbatim.sampled":
        rows = [[scheme, level * share, 40.0 / (level + 0.01)] for scheme, share in (("T 1.0", 1), ("top-k 40", 1.2))]
        return result(
            name,
            settings={"schemes": [{"temperature": 1.0, "top_k": None}], "samples": [1, 100, 1000]},
            headline="expected_100",
            figures={"expected_100": figure(level, n), "expected_1": figure(level / 4, n, 0.02)},
            control={"expected_100": figure(0.0, CONTROL, 0.02), "expected_1": figure(0.0, CONTROL, 0.01)},
            titles={"expected_100": "Records expected among 100 samples", "expected_1": "Records expected in 1 sample"},
            tables=[{"title": "Sampling rules", "columns": ["rule", "share", "n for p = 0.5"], "rows": rows}],
            notes=["p_z is exact under the rule, not sampled."],
        )
    band = {"low": [max(0.0, at - 0.08) for at in y], "high": [at + 0.08 for at in y]}
    return result(
        name,
        headline="best_start",
        figures={"best_start": figure(level, n), "window_50": figure(None, 0, None)},
        control={"best_start": figure(0.0, CONTROL, 0.03)},
        titles={"best_start": "Emitted from the best start", "longest_run": "Longest run"},
        not_resolvable={"longest_run": "no record has 50 tokens"},
        curves=[
            curve(
                "line",
                "Records finished by prefix length",
                "share of the record given",
                "share of records finished",
                [{"name": "records", "x": x, "y": y, **band}],
            )
        ],
    )


def _near_verbatim(name: str, stage: str, rng: random.Random, n: int) -> Json:
    level = {"before": 0.8, "after": 0.05, "reference": 0.04}[stage]
    return result(
        name,
        settings={"similarity": 0.75},
        headline="near_copies",
        figures={
            "near_copies": figure(level, n),
            "edit_similarity": figure(0.3 + level / 2, n),
            "common_span": figure(40 * level, n, 4.0, "tokens"),
            "rouge_l_recall": figure(0.3 + level / 2, n),
        },
        control={
            "near_copies": figure(0.01 if stage == "before" else 0.03, CONTROL, 0.02),
            "edit_similarity": figure(0.31, CONTROL),
        },
        titles={"near_copies": "Emitted up to a quarter of edits", "common_span": "Longest common span"},
        cost={"passes": 2.4, "generated_tokens": 4096, "reference_passes": 0},
    )


def _untargeted(name: str, stage: str, rng: random.Random, n: int) -> Json:
    signals = ("perplexity", "ratio", "zlib", "lowercase", "window")
    rows = [[signal, 20, round(CENTRES[stage] / 4 * rng.random(), 3), None] for signal in signals]
    return result(
        name,
        headline="samples_with_records",
        figures={"samples_with_records": figure(CENTRES[stage] / 20, 64)},
        titles={"samples_with_records": "Samples that hold a record"},
        tables=[{"title": "Precision of each signal", "columns": ["signal", "k", "precision", "AUC"], "rows": rows}],
        cost={"passes": 3.1, "generated_tokens": 4096, "reference_passes": 1.0},
    )


def _exposure(name: str, stage: str, rng: random.Random, n: int) -> Json:
    bits = {"before": 14.2, "after": 1.3, "reference": 0.9}[stage]
    steps = [1, 4, 16, 64]
    series = [{"name": "canaries", "x": steps, "y": [bits * (i + 1) / 4 for i in range(4)], "low": None, "high": None}]
    return result(
        name,
        headline="exposure",
        figures={"exposure": figure(bits, 12, 1.1, "bits", "lower"), "exposed": figure(bits / 20, 12)},
        titles={"exposure": "Exposure", "exposed": "Canaries exposed at the 1 % level"},
        curves=[curve("line", "Exposure by repetitions", "repetitions", "bits", series, "log")],
        notes=["Ties count against the finding."],
    )


def _pii(name: str, stage: str, rng: random.Random, n: int) -> Json:
    level = {"before": 0.6, "after": 0.1, "reference": 0.1}[stage]
    return result(
        name,
        headline="accuracy",
        figures={"accuracy": figure(level, n), "flagged_accuracy": figure(0.9, 3, None)},
        titles={"accuracy": "Right candidate first", "flagged_accuracy": "The same where the prompt gives it away"},
        notes=["Chance is 0.100: 10 candidates each."],
    )


def _duplicates(name: str, stage: str, rng: random.Random, n: int) -> Json:
    rows = [[f"r-{i:04d}", 1 + i % 3, "span", 50 + i] for i in range(30)]
    return result(
        name,
        figures={"uncovered": figure(30.0, n, None, "documents", "none")},
        headline="uncovered",
        titles={"uncovered": "Documents not covered"},
        tables=[{"title": "Uncovered documents", "columns": ["record", "documents", "kind", "tokens"], "rows": rows}],
        cost={"passes": 0, "generated_tokens": 0, "reference_passes": 0},
    )


def _membership(name: str, stage: str, rng: random.Random, n: int) -> Json:
    attack = name.partition(".")[2]
    if attack == "flagged":
        return result(
            name,
            settings={"q": 0.05, "score": "loss"},
            headline="flagged",
            figures={"flagged": figure(max(0.0, CENTRES[stage] / 3), n)},
            control={"flagged": figure(0.0, CONTROL // 2, 0.03)},
            titles={"flagged": "Records flagged"},
            notes=["At most 5 % of those flagged are expected to be false."],
        )
    centre = {"blind": 0.8}.get(attack, CENTRES[stage] * rng.uniform(0.6, 1.0))
    x, y = roc_points([rng.gauss(centre, 1) for _ in range(n)], [rng.gauss(0, 1) for _ in range(CONTROL)])
    low = max((found for at, found in zip(x, y, strict=True) if at <= 0.05), default=0.0)
    return result(
        name,
        settings={"fprs": [0.01, 0.05]},
        pvalue=0.0004 if stage == "before" else 0.31,
        pvalue_holm=0.0016 if stage == "before" else 1.0,
        headline="auc",
        figures={"auc": figure(area(x, y), n + CONTROL, 0.06, "AUC"), "tpr_at_0.05": figure(low, n, 0.1)},
        titles={"auc": "AUC", "tpr_at_0.01": "True positives at 1 % false ones", "tpr_at_0.05": "At 5 %"},
        not_resolvable={"tpr_at_0.01": "120 non-members; 1000 resolve a rate of 0.01"},
        curves=[
            curve(
                "roc",
                "ROC",
                "false-positive rate",
                "true-positive rate",
                [{"name": attack, "x": x, "y": y, "low": None, "high": None}],
                "log",
            )
        ],
    )


def _memory(name: str, stage: str, rng: random.Random, n: int) -> Json:
    return result(
        name,
        headline="recognition",
        figures={"recognition": figure(0.5 + CENTRES[stage] / 5, n), "recall": figure(CENTRES[stage] / 3, n)},
        titles={"recognition": "Pairs in which the record is likelier", "recall": "Tokens recalled"},
    )


MAKERS = {
    "verbatim": _verbatim,
    "near_verbatim": _near_verbatim,
    "untargeted": _untargeted,
    "exposure": _exposure,
    "pii": _pii,
    "duplicates": _duplicates,
    "memory": _memory,
}


def write_attacks(
    run: Path,
    stages: Sequence[str],
    ids: Sequence[str],
    names: Sequence[str] = tuple(ATTACKS),
    confounded: bool = False,
    *,
    paired: bool = True,
) -> None:
    """Write the attacks of a run into its stages, into their metrics.json and, if `paired`, compare/paired.json."""
    found = {}
    for stage in stages:
        made, rows = results(stage, ids, names, confounded)
        found[stage] = {detail["attack"]: detail for detail in made}
        folder = run / stage / "attacks"
        folder.mkdir(parents=True, exist_ok=True)
        for detail in made:
            write_json(folder / f"{detail['attack']}.json", detail)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")
        control = [{"record_id": f"c-{hashlib.sha256(str(i).encode()).hexdigest()[:16]}"} for i in range(CONTROL)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(control), folder / "control.parquet")
        metrics = run / stage / "metrics.json"
        if metrics.exists():
            document = json.loads(metrics.read_text())
            rows = [row for row in listed(names) if paired or row["detail"]]
            write_json(metrics, document | {"attacks": document["attacks"] + rows})
    if paired:
        path = run / "compare/paired.json"
        document = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, document | {"attacks": {name: pair(name, found) for name in names}})


def listed(names: Sequence[str]) -> list[Json]:
    """Rows of metrics.json."""
    rows: list[Json] = []
    for name in names:
        goal, access, budget = ATTACKS[name]
        rows.append(
            {"name": name, "goal": goal, "access": access, "budget": budget, "status": "run", "reason": None}
            | {"figure": None, "detail": True}
        )
    for name, (access, reason) in NOT_RUN.items():
        rows.append(
            {"name": name, "goal": "a goal", "access": access, "budget": None, "status": "not_run", "reason": reason}
            | {"figure": None, "detail": False}
        )
    return rows


def pair(name: str, found: dict[str, dict[str, Json]]) -> Json:
    """The arms of an attack and its residual."""
    latest = found.get("after") or found["before"]
    key = found["before"][name]["headline"]

    def value(stage: str, part: str = "figures") -> Json | None:
        figures: Json = found.get(stage, {}).get(name, {}).get(part, {})
        return figures.get(key)

    arms = {"O": value("before"), "U": value("after"), "N": latest[name]["control"].get(key), "R": value("reference")}
    if name.startswith("membership.") and arms["N"] is None:
        arms["N"] = figure(0.5, CONTROL, 0.06, "AUC")
    residual = None
    if arms["U"] and arms["N"] and arms["O"]:
        o, u, c = (arms[arm]["value"] for arm in "OUN")  # type: ignore[index]
        gap = o - c
        residual = figure((u - c) / gap, arms["U"]["n"], 0.1, "ratio") | {"status": "ok", "reason": None}
        if abs(gap) < 0.2:
            residual |= {"status": "not testable", "reason": "the records did not stand out before"}
    return {"arms": arms, "residual": residual}


def write_json(path: Path, value: Json) -> None:
    assert all(not isinstance(leaf, float) or math.isfinite(leaf) for leaf in value.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
