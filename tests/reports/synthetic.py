"""Run folders as the pipelines write them, from made-up numbers: what reports/ is tested on.

`write_run` builds one; the numbers are drawn from a seeded generator, so a folder is the same everywhere.
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

from tests.reports.synthetic_attacks import write_attacks

Json = dict[str, Any]
DIRECTION = {
    "loss": "higher",
    "min_k": "lower",
    "min_k_plus_plus": "lower",
    "zlib_ratio": "higher",
    "entropy": "higher",
}
UNIT = {
    "extraction.greedy": "rate",
    "correct": "rate",
    "loss": "nats per token",
    "min_k": "nats",
    "zlib_ratio": "nats per byte",
}
ROLES = (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096), ("gate", 9216), ("up", 9216), ("down", 9216))


def figure(
    value: float | None, n: int, low: float | None, high: float | None, unit: str, direction: str = "lower"
) -> Json:
    return {
        "value": value,
        "unit": unit,
        "n": n,
        "ci_low": low,
        "ci_high": high,
        "ci_level": 0.95,
        "direction": direction,
    }


def rate(count: int, n: int) -> Json:
    """Exact two-sided bounds at 0 and n, a wide normal interval between; good enough to look at."""
    if not n:
        return figure(None, 0, None, None, "share")
    p, edge = count / n, 0.025 ** (1 / n)
    if count in (0, n):
        return figure(p, n, 0.0 if not count else edge, 1 - edge if not count else 1.0, "share")
    half = 1.96 * (p * (1 - p) / n) ** 0.5
    return figure(p, n, max(0.0, p - half), min(1.0, p + half), "share")


def mean(values: list[float], metric: str) -> Json:
    n = len(values)
    centre = sum(values) / n
    half = 1.96 * (sum((v - centre) ** 2 for v in values) / max(n - 1, 1) / n) ** 0.5
    unit = UNIT.get(metric, "probability" if metric.endswith("probability") else "share")
    return figure(centre, n, centre - half, centre + half, unit, DIRECTION.get(metric, "lower"))


def text_rows(rng: random.Random, n: int, memorised: float, prefix: str) -> list[Json]:
    rows = []
    for index in range(n):
        known = rng.random() < memorised
        loss = abs(rng.gauss(0.05, 0.04)) if known else rng.gauss(2.9, 0.35)
        tokens = rng.randint(18, 60)
        share = rng.uniform(0.97, 1.0) if known else rng.uniform(0.2, 0.5)
        greedy = "extracted" if known and loss < 0.1 else "uncertain" if known and loss < 0.12 else "not"
        rows.append(
            {
                "record_id": prefix + hashlib.sha256(f"{prefix}{index}".encode()).hexdigest()[:16],
                "n_tokens": tokens,
                "log_prob": -loss * tokens,
                "loss": loss,
                "probability": 2.718281828**-loss,
                "token_accuracy": share,
                "extraction_strength": rng.uniform(0.9, 1.0) if known else rng.choice([0.0, 0.0, 0.05]),
                "greedy": greedy,
                "min_margin": rng.uniform(0.01, 3.0),
                "zlib_ratio": loss / tokens,
                "min_k": -loss * 2.1,
                "min_k_plus_plus": -loss * 0.8,
                "n_for_p50": 1.0 if known else float("inf"),
                "n_for_p90": 3.0 if known else float("inf"),
            }
        )
    return rows


def image_rows(rng: random.Random, n: int, memorised: float, prefix: str) -> list[Json]:
    rows = []
    for index in range(n):
        known = rng.random() < memorised
        p = rng.uniform(0.9, 0.999) if known else rng.uniform(0.02, 0.3)
        rows.append(
            {
                "record_id": prefix + hashlib.sha256(f"{prefix}{index}".encode()).hexdigest()[:16],
                "n_tokens": 1,
                "label_probability": p,
                "loss": 1 - p,
                "margin": 6 * p - 3,
                "entropy": 1 - p,
                "correct": known,
            }
        )
    return rows


def set_figures(rows: list[Json], task: str) -> Json:
    names = (
        ("label_probability", "loss", "margin", "entropy")
        if task == "image_classification"
        else ("probability", "token_accuracy", "extraction_strength", "loss", "min_k", "zlib_ratio")
    )
    found = {name: mean([row[name] for row in rows], name) for name in names}
    if task == "image_classification":
        found["correct"] = rate(sum(row["correct"] for row in rows), len(rows))
    else:
        found["extraction.greedy"] = rate(sum(row["greedy"] == "extracted" for row in rows), len(rows))
    return {"n": len(rows), "figures": found}


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")


def parquet(path: Path, rows: list[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def attacks(task: str) -> list[Json]:
    image = task == "image_classification"
    second = "label_probability" if image else "probability"
    first = (
        []
        if image
        else [
            ("verbatim.greedy", "does greedy decoding emit the record?", "A0", "1 pass a record", "extraction.greedy"),
            ("verbatim.strength", "from what share is the rest completed?", "A1", "same pass", "extraction_strength"),
        ]
    )
    run = [
        *first,
        (
            "recollection.probability",
            "does the model find the record likelier than never-seen ones?",
            "A1",
            "same pass",
            second,
        ),
    ]
    absent = [
        ("regurgitation.rewrites", "does a rewritten or translated prompt bring the record out?", "A0"),
        ("membership_inference", "can members be told from non-members?", "A1"),
        ("model_inversion", "can an input be rebuilt from the model's outputs?", "A2"),
        ("recovery.quantisation", "does rounding the weights bring the records back?", "A2"),
        ("recovery.relearning", "does training on half of the records bring the other half back?", "A4"),
    ]
    rows = [
        dict(zip(("name", "goal", "access", "budget", "figure"), row, strict=True)) | {"status": "run", "reason": None}
        for row in run
    ]
    rows += [
        {
            "name": name,
            "goal": goal,
            "access": access,
            "budget": None,
            "status": "not_run",
            "reason": "not part of this version",
            "figure": None,
        }
        for name, goal, access in absent
    ]
    return rows


def write_run(
    run: Path,
    kind: str = "forget",
    *,
    task: str = "causal_lm",
    n: int = 20,
    reference: bool = True,
    verdict: str = "criteria met",
    name: str = "SmolLM2-135M-Instruct",
    ids: list[str] | None = None,
    request: Json | None = None,
    blocks: int = 30,
    stages: tuple[str, ...] = ("before", "after", "compare"),
    residue: float = 0.0,
    probes: Sequence[str] = (),
    attacked: Sequence[str] = (),
    confounded: bool = False,
) -> Path:
    """Write a run folder.

    Args: kind audit or forget; task; n records; whether a reference was measured; the verdict; the model's name; ids
    for the records; request fields to add; blocks of the model; which stages were reached; share still memorised after;
    which probes ran; which attacks left results of their own, and whether the blind test beat chance.
    """
    if kind == "attack":
        return write_attack_run(run, attacked or ("membership.loss",), n=n, name=name, ids=ids, confounded=confounded)
    if kind == "probe":
        return write_probe_run(run, probes, n=n, name=name, ids=ids, blocks=blocks)
    rng = random.Random(7)
    make = image_rows if task == "image_classification" else text_rows
    sides = {"before": 0.9, "after": residue, "reference": 0.0}
    written = [s for s in ("before", "after") if s in stages and not (kind == "audit" and s == "after")] + [
        "reference"
    ] * reference
    measured: Json = {}
    for stage in written:
        sets = {
            "records": make(rng, n, sides[stage], "r-"),
            "control": make(rng, 20, 0.0, "c-"),
            "retain": make(rng, 40, 0.0, "k-"),
        }
        for given, row in zip(ids or [], sets["records"], strict=False):
            row["record_id"] = given
        for part, rows in sets.items():
            parquet(run / stage / f"{part}.parquet", rows)
        measured[stage] = {part: set_figures(rows, task) for part, rows in sets.items()}
        if stage == "before" and probes:
            names = {part: [row["record_id"] for row in sets[part]] for part in ("records", "control", "retain")}
            write_probes(run, probes, names, blocks)
        dump(
            run / stage / "metrics.json",
            {
                "schema": "unlearn.metrics/v1",
                "stage": stage,
                "task": task,
                "tensor_digest": digest(stage),
                "engine": {
                    "dtype": "float32",
                    "device": "cpu",
                    "batch_tokens": 4096,
                    "seed": 0,
                    "sampling": {"temperature": 1.0, "top_k": None, "top_p": None},
                    "logit_noise": 3.1e-5,
                    "confirmed": 18,
                    "disagreements": 0,
                },
                "noise_floor": {"log_prob": 4.2e-5, "loss": 1.1e-6, "probability": 1e-6},
                "sets": measured[stage],
                "attacks": attacks(task),
            },
        )
    write_inputs(run, kind, task, name)
    if reference:
        reached = {"tensor_digest": digest("reference"), "name": "never-trained base"}
        dump(run / "inputs/reference.json", described(name, task) | reached)
    dump(
        run / "inputs/sets.json",
        {
            "records": {"n": n, "source": "given", "limits": [], "digest": digest("records"), "tokens": 39 * n},
            "control": {"n": 20, "source": "drafted", "digest": digest("control"), "tokens": 790},
            "retain": {"n": 40, "source": "drafted", "digest": digest("retain"), "tokens": 1570},
        },
    )
    (run / "private").mkdir(parents=True, exist_ok=True)
    (run / "private/records.jsonl").write_text("a private line", encoding="utf-8")
    (run / "events.jsonl").write_text("{}\n", encoding="utf-8")
    if kind == "forget":
        dump(run / "inputs/request.json", forget_request() | (request or {}))
        write_edit(run, rng, blocks, task)
    if "compare" in stages:
        write_comparison(run, kind, measured, verdict, task)
    if attacked:
        rows = pyarrow.parquet.read_table(run / "before/records.parquet").to_pylist()
        write_attacks(run, written, [row["record_id"] for row in rows], attacked, confounded)
    return run


def described(name: str, task: str) -> Json:
    files = [("config.json", 861), ("model.safetensors", 538090408), ("tokenizer.json", 2104556)]
    manifest = [{"path": p, "size": s, "sha256": hashlib.sha256(p.encode()).hexdigest()} for p, s in files]
    return {
        "name": name,
        "architecture": "LlamaForCausalLM" if task == "causal_lm" else "ResNetForImageClassification",
        "parameters": 134515008,
        "tensors": 272,
        "dtype": "float32",
        "tied": True,
        "bytes": 540195825,
        "tokenizer_digest": digest("tokenizer"),
        "chat_template_digest": digest("template"),
        "manifest": manifest,
    }


def write_inputs(run: Path, kind: str, task: str, name: str) -> None:
    """What every kind of run starts from: its header, the checkpoint, the environment."""
    dump(
        run / "run.json",
        {
            "schema": "unlearn.run/v1",
            "kind": kind,
            "status": "done",
            "seed": 0,
            "device": "cpu",
            "dtype": "float32",
            "versions": {"unlearn-audit": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
            "argv": ["unlearn", kind, "/home/somebody/model"],
            "started": "2026-11-21T03:15:00Z",
            "heartbeat": "x",
            "exit_code": 0,
        },
    )
    dump(run / "inputs/checkpoint.json", described(name, task) | {"tensor_digest": digest("before")})
    dump(run / "inputs/environment.json", {"platform": "Linux x86_64", "threads": 2, "libraries": {"torch": "2.13.0"}})


def forget_request() -> Json:
    return {
        "schema": "unlearn.request/v1",
        "subject_request_id": "3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a",
        "subject_request_type": "erasure",
        "regulation": "gdpr",
        "submitted_time": "2026-11-03T09:12:00Z",
        "received_time": "2026-11-03T09:12:40Z",
        "due_time": "2026-12-03T23:59:00Z",
        "answered_time": "2026-11-21T10:00:00Z",
        "manner": "web_form",
        "ground": "17(1)(b)",
        "exemptions_considered": ["17(3)(d)"],
        "subject": {"kind": "person", "pseudonym": "hmac:8c1f02ab", "key_id": "dpo-2026"},
        "data": {"sha256": "ab12", "categories": ["contact", "account"], "special": False},
        "scope": {
            "copies": [
                {"what": "gguf_q4", "included": False, "reason": "re-exported after the edit"},
                {"what": "training_backups", "included": False, "reason": "rotated after 30 days"},
            ],
            "recipients": [],
        },
        "criteria": [{"id": "C1"}],
        "governance": {"dpia_ref": "DPIA-114", "dpo_ref": "DPO-2026-31", "risk_owner": "head of ML"},
    }


def write_edit(run: Path, rng: random.Random, blocks: int, task: str) -> None:
    parameters = {
        "alpha": 10.0,
        "lambda": 1.0,
        "importance": "example",
        "labels": "gold",
        "floor": 0.0,
        "exclude": ["*norm*", "*embed*"],
    }
    dump(
        run / "edit/plan.json",
        {
            "method": {"name": "ssd", "version": "1", "paper": "arXiv 2308.07707", "parameters": parameters},
            "warnings": [],
            "tensors": [],
            "importances": {
                "retain": {
                    "digest": digest("ir"),
                    "n_examples": 40,
                    "estimator": "example",
                    "labels": "gold",
                    "reused": False,
                },
                "forget": {
                    "digest": digest("if"),
                    "n_examples": 20,
                    "estimator": "example",
                    "labels": "gold",
                    "reused": False,
                },
            },
        },
    )
    tensors = []
    for block in range(blocks):
        for role, size in ROLES if task == "causal_lm" else (("conv", 64), ("conv", 128)):
            peak = 0.035 if role in ("gate", "up", "down") else 0.008
            norm = peak * max(0.0, 1 - abs(block - 0.7 * blocks) / (0.4 * blocks)) * rng.uniform(0.6, 1.0)
            tensors.append(
                {
                    "name": f"model.layers.{block}.{role}_proj.{size}.weight",
                    "dtype": "float32",
                    "shape": [size, 576],
                    "changed": int(norm * size * 576),
                    "rel_norm": norm,
                    "block": block,
                    "role": role,
                }
            )
    tensors.append(
        {
            "name": "model.norm.weight",
            "dtype": "float32",
            "shape": [576],
            "changed": 0,
            "rel_norm": 0.0,
            "block": None,
            "role": None,
        }
    )
    dump(
        run / "edit/delta.json",
        {
            "tensors": tensors,
            "changed_elements": sum(t["changed"] for t in tensors),
            "total_elements": 134515008,
            "tensor_digest": digest("after"),
            "manifest": [],
            "left_out": [],
            "statistics": {"alpha": 10.0, "selected": 0.0091, "min_beta": 0.0004, "mean_beta": 0.31},
        },
    )
    checkpoint = run / "edit/checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")


def write_comparison(run: Path, kind: str, measured: Json, verdict: str, task: str) -> None:
    image = task == "image_classification"
    first, second = ("correct", "label_probability") if image else ("extraction.greedy", "probability")
    latest = measured["after" if kind == "forget" else "before"]
    if kind == "forget":
        arms = {}
        for metric in measured["before"]["records"]["figures"]:
            arms[metric] = {
                "O": measured["before"]["records"]["figures"][metric],
                "U": measured["after"]["records"]["figures"][metric],
                "N": measured["after"]["control"]["figures"][metric],
                "R": measured.get("reference", {}).get("records", {}).get("figures", {}).get(metric),
            }
            o, u, c = (arms[metric][arm]["value"] for arm in "OUN")
            arms[metric]["residual"] = figure((u - c) / (o - c), 20, -0.11, 0.16, "ratio") | {
                "status": "ok",
                "reason": None,
            }
        old, new = measured["before"]["retain"]["figures"], measured["after"]["retain"]["figures"]
        change = {
            f"retain.{metric}": {
                "before": old[metric],
                "after": new[metric],
                "difference": figure(delta, 40, delta - half, delta + half, old[metric]["unit"], direction),
            }
            for metric, delta, half, direction in (
                ("loss", 0.021, 0.009, "lower"),
                (second, -0.004, 0.011, "higher"),
            )
        }
        statement = "Loss on the records (2.94) lies within the range of the never-seen control (2.31 to 3.60)."
        dump(
            run / "compare/paired.json",
            {"arms": arms, "over_forgetting": {"flag": False, "statement": statement}, "utility": change},
        )
    level = "E2" if "reference" in measured else "E1"
    status = {"criteria met": "met", "criteria not met": "not met", "inconclusive": "inconclusive"}[verdict]
    criteria = [
        {
            "id": "C1",
            "metric": first,
            "aggregate": "rate",
            "test": "upper95",
            "max": 0.2,
            "margin": None,
            "required": True,
            "observed": latest["records"]["figures"][first],
            "status": status,
            "reason": "0 of 20, upper 95 % bound 0.1391, limit 0.2",
            "set": "records",
        },
        {
            "id": "C2",
            "metric": second,
            "aggregate": "mean",
            "test": "equivalence",
            "max": None,
            "margin": 0.05,
            "against": "control",
            "required": True,
            "observed": figure(0.004, 20, -0.012, 0.021, "probability"),
            "status": "met",
            "reason": "the whole interval lies within the margin",
            "set": "records",
        },
        {
            "id": "C3",
            "metric": "loss",
            "aggregate": "mean",
            "test": "noninferiority",
            "max": None,
            "margin": 0.1,
            "against": "before",
            "required": False,
            "observed": figure(0.021, 40, 0.012, 0.030, "nats per token"),
            "status": "met",
            "reason": "upper bound 0.030 below the margin 0.100",
            "set": "retain",
        },
    ]
    dump(
        run / "compare/criteria.json",
        {
            "criteria": criteria if kind == "forget" else criteria[:1],
            "verdict": verdict,
            "claim_level": level if verdict == "criteria met" and kind == "forget" else None,
            "limits": [
                "The control set was drafted by the tool: names, numbers and dates of each record were swapped.",
                "The retain set was drafted by the tool from the model's own samples.",
                "With 20 records, even no hit at all leaves a rate of up to 14% possible (95 % bound).",
            ],
        },
    )


def write_attack_run(
    run: Path,
    attacked: Sequence[str] = ("membership.loss",),
    *,
    n: int = 20,
    name: str = "SmolLM2-135M-Instruct",
    ids: list[str] | None = None,
    measured: bool = True,
    confounded: bool = False,
) -> Path:
    """A run of one attack: inputs/ and before/, nothing else; `measured`: the stage has metrics and records as well."""
    write_inputs(run, "attack", "causal_lm", name)
    rng = random.Random(7)
    rows = text_rows(rng, n, 0.9, "r-")
    for given, row in zip(ids or [], rows, strict=False):
        row["record_id"] = given
    sets = {"records": rows, "control": text_rows(rng, 20, 0.0, "c-")}
    dump(
        run / "inputs/sets.json",
        {
            "records": {"n": n, "source": "given", "limits": [], "digest": digest("records"), "tokens": 39 * n},
            "control": {
                "n": 20,
                "source": "given",
                "limits": ["The control set may be easier than the records."],
                "digest": digest("control"),
                "tokens": 790,
            },
        },
    )
    dump(run / "inputs/config.json", {"attacks": [{"name": attack} for attack in attacked]})
    if measured:
        for part, found in sets.items():
            parquet(run / f"before/{part}.parquet", found)
        figures = {part: set_figures(found, "causal_lm") for part, found in sets.items()}
        dump(
            run / "before/metrics.json",
            {
                "schema": "unlearn.metrics/v1",
                "stage": "before",
                "task": "causal_lm",
                "tensor_digest": digest("before"),
                "sets": figures,
                "attacks": [],
            },
        )
    write_attacks(run, ["before"], [row["record_id"] for row in rows], attacked, confounded, paired=False)
    return run


PROBES = ("kfac", "spectrum", "localise", "condition")


def write_probe_run(
    run: Path,
    probes: Sequence[str] = PROBES,
    *,
    n: int = 20,
    name: str = "SmolLM2-135M-Instruct",
    ids: list[str] | None = None,
    blocks: int = 30,
) -> Path:
    """A run that only looked inside a checkpoint: inputs/ and probes/, nothing else."""
    write_inputs(run, "probe", "causal_lm", name)
    given = {"source": "given", "limits": []}
    dump(
        run / "inputs/sets.json",
        {
            "records": given | {"n": n, "digest": digest("records"), "tokens": 39 * n},
            "control": {
                "n": n,
                "source": "drafted",
                "limits": ["The control set was drafted by the tool."],
                "digest": digest("control"),
                "tokens": 38 * n,
            },
            "retain": given | {"n": 400, "digest": digest("data"), "tokens": 40960},
            "training": given | {"n": n, "digest": digest("training"), "tokens": 39 * n},
        },
    )
    dump(run / "inputs/config.json", {"probes": [{"name": probe, "rho": 0.6} for probe in probes]})
    names = {"records": list(ids or []), "control": [], "retain": []}
    for part, prefix in (("records", "r-"), ("control", "c-"), ("retain", "k-")):
        more = [prefix + hashlib.sha256(f"{part}{i}".encode()).hexdigest()[:16] for i in range(len(names[part]), n)]
        names[part] += more
    write_probes(run, probes, names, blocks)
    return run


def write_probes(run: Path, probes: Sequence[str], names: dict[str, list[str]], blocks: int) -> None:
    """The result files of probes, and the per-record tables of the curvature probe."""
    rng = random.Random(11)
    makers = {"kfac": kfac_result, "spectrum": spectrum_result, "localise": localise_result, "condition": matrices}
    for probe in PROBES:
        if probe in probes:
            result = makers[probe](rng, names, blocks)
            common = {"schema": "unlearn.probe/v1", "probe": probe, "warnings": [f"A warning of {probe}."]}
            data = {"n_records": 400, "n_tokens": 40560, "n_positions": 40560, "digest": digest("data")}
            dump(run / f"probes/{probe}.json", common | {"data": data} | result)
    if "kfac" in probes:
        for part, centre in (("records", 0.71), ("control", 0.4)):
            parquet(run / f"probes/{part}.parquet", [scores(rng, name, centre) for name in names[part]])


def scores(rng: random.Random, name: str, centre: float) -> Json:
    low = min(max(rng.gauss(centre, 0.12), 0.0), 1.0)
    return {
        "record_id": name,
        "low_energy": low,
        "activation_ratio": math.exp(rng.gauss(2 * centre, 0.3)),
        "input_curvature": math.exp(rng.gauss(1 + centre, 0.8)),
        "memorisation_score": rng.gauss(4 * low - 2, 0.6),
    }


def kfac_result(rng: random.Random, names: dict[str, list[str]], blocks: int) -> Json:
    """Seven modules a block; those of the last three blocks carry a cut."""
    modules = []
    for block in range(blocks):
        for role, p in ROLES:
            q, pairs = 576, p * 576
            scale = math.exp(rng.gauss(-6 + 3 * block / blocks, 0.6)) * (4.0 if role == "down" else 1.0)
            steps = [round(pairs ** (i / 39)) for i in range(40)]
            ranks = sorted(set(steps))
            decay = rng.uniform(0.9, 1.3)
            values = [scale * rank**-decay * math.exp(-3 * rank / pairs) for rank in ranks]
            steep = rng.uniform(5, 60)
            held = [1 - (1 - rank / pairs) ** 2.0 * (1 + steep * rank / pairs) ** -1.5 for rank in ranks]
            kept = ranks[next(i for i, mass in enumerate(held) if mass >= 0.6)]
            modules.append(
                {
                    "module": f"model.layers.{block}.{'self_attn' if len(role) == 1 else 'mlp'}.{role}_proj",
                    "block": block,
                    "role": role,
                    "expert": None,
                    "shape": [p, q],
                    "n_positions": 40560,
                    "trace_a": 40 * scale,
                    "trace_g": 0.3,
                    "mass": 12 * scale,
                    "overlap_a": min(rng.gauss(0.95, 0.03), 1.0),
                    "overlap_g": min(rng.gauss(0.86, 0.04), 1.0),
                    "curve": {"pairs": [rank / pairs for rank in ranks], "mass": held},
                    "spectrum": {"index": [rank - 1 for rank in ranks], "eigenvalue": values},
                    "cut": {
                        "rho": 0.6,
                        "kept_pairs": kept,
                        "pairs": pairs,
                        "threshold": scale * kept**-decay,
                        "kept_norm": rng.uniform(0.5, 0.8),
                        "predicted_rise": rng.uniform(0.001, 0.03),
                    }
                    if block >= blocks - 3 and role in ("gate", "up")
                    else None,
                }
            )
    auc = figure(0.91, 2 * len(names["records"]), 0.8, 0.97, "AUC", "none")
    columns = ["low_energy", "activation_ratio", "input_curvature", "memorisation_score"]
    return {
        "settings": {
            "labels": "sampled",
            "positions": "all",
            "rho": 0.6,
            "correction": "none",
            "memory_mb": None,
            "seed": 0,
        },
        "modules": modules,
        "records": {"n": len(names["records"]), "n_control": len(names["control"]), "auc": auc, "columns": columns},
    }


def spectrum_result(rng: random.Random, _: dict[str, list[str]], blocks: int) -> Json:
    """The whole model, then every block: a bulk at zero, a few large eigenvalues, a small negative part."""
    operators = []
    for block in (None, *range(blocks)):
        size = 40.0 if block is None else math.exp(rng.gauss(1 + block / blocks, 0.5))
        bumps = [(0.0, size / 60, 1.0), (0.4 * size, size / 50, 3e-4), (size, size / 50, 1e-4)]
        x = [-0.15 * size + 1.2 * size * i / 199 for i in range(200)]
        y = [sum(w * math.exp(-((at - c) ** 2) / (2 * s * s)) / s for c, s, w in bumps) for at in x]
        nodes = sorted([rng.gauss(0.0, size / 60) for _ in range(20)] + [0.4 * size, size])
        operators.append(
            {
                "name": "model" if block is None else f"block {block}",
                "block": block,
                "parameters": 134515008 if block is None else 3540096,
                "trace": figure(9 * size, 30, 7.9 * size, 10.1 * size, "nats", "none"),
                "largest": [size, 0.4 * size, 0.2 * size],
                "smallest": [-0.06 * size, -0.05 * size],
                "residuals": [2e-6 * size] * 5,
                "negative_share": 0.31,
                "nodes": nodes,
                "weights": [1 / 20.0004] * 20 + [3e-4 / 20, 1e-4 / 20],
                "density": {"x": x, "y": y},
            }
        )
    settings = {"operator": "hessian", "blocks": "all", "samples": 30, "steps": 40, "seed": 0}
    return {"settings": settings, "operators": operators}


def localise_result(rng: random.Random, names: dict[str, list[str]], blocks: int) -> Json:
    """Attribution that peaks in the middle of the model; influence from the retain set."""

    def layers() -> list[Json]:
        return [
            {
                "block": block,
                "module": module,
                "score": rng.gauss(0.2, 0.3) + 2 * math.exp(-((block - blocks / 2) ** 2) / 20),
            }
            for block in range(blocks)
            for module in ("attention", "feed_forward")
        ]

    rows = []
    for index, name in enumerate(names["records"]):
        tokens = rng.randint(18, 60)
        influence = [{"id": other, "score": rng.gauss(0.0, 1.0)} for other in names["retain"][:5]]
        rows.append(
            {
                "id": name,
                "n_tokens": tokens,
                "log_prob": -tokens * abs(rng.gauss(0.4, 0.5)),
                "prompt": [
                    {
                        "position": i,
                        "score": rng.gauss(0.1, 0.3),
                        "occlusion": rng.gauss(0.5, 0.5) if index % 2 else None,
                    }
                    for i in range(rng.randint(4, 12))
                ],
                "layers": layers()[:8],
                "neurons": [{"block": rng.randrange(blocks), "neuron": rng.randrange(1536), "score": 0.2}],
                "ablation": {
                    "k": 64,
                    "top": abs(rng.gauss(6, 2)),
                    "random": rng.gauss(0.1, 0.1),
                    "ordinary": abs(rng.gauss(0.2, 0.1)),
                },
                "influence": influence if index else None,
                "completeness_gap": abs(rng.gauss(0, 0.01)),
            }
        )
    settings = {"steps": 32, "neurons": 64, "draws": 5, "influence": 5, "seed": 0}
    parts = [
        {
            "block": row["block"],
            "module": row["module"],
            "drop": row["score"],
            "ordinary": 0.1,
            "contrast": row["score"],
        }
        for row in layers()
    ]
    return {"settings": settings, "records": rows, "heat": layers(), "parts": parts}


def matrices(rng: random.Random, _: dict[str, list[str]], blocks: int) -> Json:
    tensors = []
    for block in range(blocks):
        for role, p in ROLES:
            relative = math.exp(rng.gauss(0.5, 0.9))
            full = 576
            stable, effective = rng.uniform(5, 90), rng.uniform(200, 480)
            lost = block == 0 and role == "k"
            tensors.append(
                {
                    "name": f"model.layers.{block}.{role}_proj.weight",
                    "block": block,
                    "role": role,
                    "expert": None,
                    "shape": [p, full],
                    "kappa": None if lost else 40 * relative,
                    "kappa_relative": None if lost else relative,
                    "stable_rank": stable,
                    "stable_rank_share": stable / full,
                    "effective_rank": effective,
                    "effective_rank_share": effective / full,
                }
            )
    return {"tensors": tensors}


HOSTILE = [
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "[/foo][bold]x[/bold]",
    "a|b`c|`d`",
    "\u202egnp.exe\u202c\u200b\x1b[31m\x00",
    "![x](https://example.org/p.png) @someone www.example.org",
    '" onload="alert(1)',
    "/home/somebody/secret/model",
    "<img src=x onerror=alert(1)>",
    "\u05d0\u05d1\u05d2 \u0627\u0644",
    "x" * 5000,
    "line\nbreak\r\n| new | row |",
]
