"""Run folder in, report.json out: `build` is a pure function of the files the pipelines wrote.

Times, host names and absolute paths never enter, and neither does run.json's status or argv, which differ between a
run and its resumed twin: the same measurements give the same bytes. Every string is cleaned (`reports.text.clean`),
every number is finite or null. What a run did not do is present as `not_run` with its reason, never absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.attacks import STAGES, attack_columns, attack_details, attack_rows
from reports.criteria import criterion
from reports.history import history
from reports.probes import probe_results, record_figures
from reports.reading import ReportError, figure_of, float_of, int_of, read, rows_of, text_of
from reports.schema import ATTACK_SCHEMA, PROBE_SCHEMA, SCHEMA
from reports.text import CLAIM_LEVELS, FINDINGS, VERDICTS, Json, clean, stress_order, tree

DURABILITY = "recovery"  # first part of the names of attacks on an edit: recovery.relearning, recovery.pruning
SETS = ("records", "control", "retain")
_OUTCOMES = ("recovering", "re_teaching", "undecided", "not_run")  # lists of attacks by what they showed
_OUTSIDE_CUSTODY = {"private", "report", "attest", "run.json", "events.jsonl"}
_GREEDY_RANK = {"extracted": 2, "uncertain": 1}
_CHECKPOINT_KEYS = (
    "name",
    "revision",
    "kind",
    "architecture",
    "parameters",
    "tensors",
    "dtype",
    "tied",
    "bytes",
    "tensor_digest",
    "tokenizer_digest",
    "chat_template_digest",
)


def build(run: Path) -> Json:
    """The report of a run folder, as the dictionary that report.json (or probe.json, or attack.json) holds.

    Args:
        run: run folder of an audit, a forget run, a probe run or an attack run, finished or not.

    Raises:
        ReportError: if the folder is no run folder, is one of an edit alone, or a file in it is damaged.
    """
    try:
        return _build(Path(run))
    except (AttributeError, KeyError, TypeError, ValueError):  # JSON of another shape; its text stays unquoted
        raise ReportError("expected the files unlearn writes, found another structure; the run is damaged", 4) from None


def _build(run: Path) -> Json:
    header = read(run, "run.json")
    kind = header.get("kind")
    if kind == "probe":
        return _build_probe(run, header)
    if kind == "attack":
        return _build_attack(run, header)
    if kind == "edit":
        raise ReportError(
            "expected a run that measured something, found an edit alone, which tested nothing; audit its checkpoint "
            "with `unlearn audit`, or edit and test in one run with `unlearn forget`"
        )
    if kind not in ("audit", "forget"):
        raise ReportError(
            "expected kind audit, forget, probe or attack in run.json, found another; was this written by unlearn?"
        )
    measured = {stage: _measurement(run, stage) for stage in STAGES}
    paired = read(run, "compare/paired.json", required=False)
    decision = read(run, "compare/criteria.json", required=False)
    request = read(run, "inputs/request.json", required=False)
    custody = _custody(run, measured)
    details = attack_details(run)
    attacks = attack_rows(run, measured, details, paired)
    conditions = _conditions(run, header)
    return {
        "schema": SCHEMA,
        "tool": _tool(conditions),
        "run": conditions
        | {
            "kind": kind,
            "sets": _sets(read(run, "inputs/sets.json", required=False), SETS),
            "measurements": measured,
            "probes": probe_results(run),
            "attacks": details,
        },
        "checkpoint": _checkpoints(run, measured, custody),
        "request": _request(request),
        "subject": _subject(request),
        "method": _method(run),
        "records": _records(run),
        "attacks": attacks,
        "utility": _utility(kind, paired),
        "robustness": _robustness(kind, attacks, paired),
        **_decision(decision, [stage for stage in STAGES[: 2 if kind == "forget" else 1] if measured[stage] is None]),
        "custody": custody,
        **history(run),
    }


def _build_probe(run: Path, header: Json) -> Json:
    """The report of a run that only looked inside a checkpoint: no arms, no criteria, no verdict."""
    results, sets = probe_results(run), read(run, "inputs/sets.json", required=False)
    limits = [clean(str(text)) for row in sets.values() for text in (row or {}).get("limits") or []]
    if not any(results.values()):
        limits.append("The run stopped before a probe had finished.")
    conditions = _conditions(run, header)
    checkpoint = _checkpoint(read(run, "inputs/checkpoint.json"))
    return {
        "schema": PROBE_SCHEMA,
        "tool": _tool(conditions),
        "run": conditions
        | {
            "kind": "probe",
            "sets": _sets(sets, [*SETS, *sorted(sets.keys() - set(SETS))]),
            "config": tree(read(run, "inputs/config.json", required=False)),
            "probes": results,
        },
        "checkpoint": {"before": checkpoint, "after": None, "reference": None},
        "records": [
            {"id": name, "n_tokens": int_of(row.pop("n_tokens", None)), "before": row}
            for name, row in sorted(record_figures(run).items())
        ],
        "limits": limits,
        "custody": _custody(run, {}) | {"tensor_digest_in": checkpoint["tensor_digest"]},
    }


def _build_attack(run: Path, header: Json) -> Json:
    """The report of one attack alone: no edit, no criteria, no verdict."""
    measured = {"before": _measurement(run, "before"), "after": None, "reference": _measurement(run, "reference")}
    details = attack_details(run)
    rows = attack_rows(run, measured, details, {})
    sets = read(run, "inputs/sets.json", required=False)
    limits = [clean(str(text)) for row in sets.values() for text in (row or {}).get("limits") or []]
    if not rows:
        limits.append("The run stopped before the attack had finished.")
    conditions = _conditions(run, header)
    checkpoint, reference = read(run, "inputs/checkpoint.json"), read(run, "inputs/reference.json", required=False)
    described = _checkpoint(checkpoint)
    return {
        "schema": ATTACK_SCHEMA,
        "tool": _tool(conditions),
        "run": conditions
        | {
            "kind": "attack",
            "sets": _sets(sets, ["records", "control", *sorted(sets.keys() - {"records", "control"})]),
            "config": tree(read(run, "inputs/config.json", required=False)),
            "measurements": measured,
            "attacks": details,
        },
        "checkpoint": {
            "before": described,
            "after": None,
            "reference": _checkpoint(reference) if reference else None,
        },
        "records": _records(run),
        "attacks": rows,
        "limits": limits,
        "custody": _custody(run, {}) | {"tensor_digest_in": described["tensor_digest"]},
    }


def _conditions(run: Path, header: Json) -> Json:
    """Under what the run ran; times and names of machines stay out."""
    return {
        "seed": header.get("seed"),
        "device": text_of(header.get("device")),
        "dtype": text_of(header.get("dtype")),
        "versions": tree(header.get("versions") or {}),
        "environment": tree(read(run, "inputs/environment.json", required=False)),
    }


def _tool(conditions: Json) -> Json:
    versions = conditions["versions"]
    return {"name": "unlearn-audit", "version": str(versions.get("unlearn-audit", versions.get("unlearn", "")))}


def dumps(report: Json) -> bytes:
    """The bytes of report.json: sorted keys, two spaces, UTF-8, no NaN."""
    return (json.dumps(report, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _measurement(run: Path, stage: str) -> Json | None:
    """Set-level figures of one stage, with the engine they came from and its noise floor; None if it did not run."""
    raw = read(run, f"{stage}/metrics.json", required=False)
    if not raw:
        return None
    sets = {
        clean(name): {
            "n": int(part.get("n") or 0),
            "figures": {clean(metric): figure_of(figure) for metric, figure in (part.get("figures") or {}).items()},
        }
        for name, part in (raw.get("sets") or {}).items()
        if part
    }
    return {
        "task": text_of(raw.get("task")),
        "tensor_digest": text_of(raw.get("tensor_digest")),
        "engine": tree(raw.get("engine") or {}),
        "noise_floor": tree(raw.get("noise_floor") or {}),
        "sets": sets,
    }


def _sets(raw: Json, names: Sequence[str]) -> Json:
    """Size, origin and digest of each record set."""
    return {
        clean(name): {
            "n": int((raw.get(name) or {}).get("n") or 0),
            "source": text_of((raw.get(name) or {}).get("source")) or "none",
            "digest": text_of((raw.get(name) or {}).get("digest")),
            "tokens": (raw.get(name) or {}).get("tokens"),
        }
        for name in names
    }


def _checkpoints(run: Path, measured: Json, custody: Json) -> Json:
    """Identity of the original, the edited copy (its files hashed as they lie in the run folder) and the reference.

    What the edited copy's own description (edit/checkpoint.json) does not say is not assumed, except for what no edit
    changes: architecture, size, data type, tying.
    """
    before = _checkpoint(read(run, "inputs/checkpoint.json"))
    after = None
    if measured["after"]:
        prefix = "edit/checkpoint/"
        files = [
            {**row, "path": row["path"].removeprefix(prefix)}
            for row in custody["files"]
            if row["path"].startswith(prefix)
        ]
        described = read(run, "edit/checkpoint.json", required=False)
        kept = {key: before[key] for key in ("architecture", "parameters", "tensors", "dtype", "tied")}
        after = (_checkpoint(described) if described else _checkpoint(kept)) | {
            "name": f"{before['name']} (edited)",
            "bytes": sum(row["size"] for row in files) or None,
            "tensor_digest": measured["after"]["tensor_digest"],
            "inference_time": _at_inference_time(read(run, "edit/plan.json", required=False)),
            "files": files,
        }
    reference = read(run, "inputs/reference.json", required=False)
    return {"before": before, "after": after, "reference": _checkpoint(reference) if reference else None}


def _checkpoint(raw: Json) -> Json:
    """A checkpoint's description with exactly the keys of the report."""
    listed: list[Any] = next((raw[key] for key in ("manifest", "files") if isinstance(raw.get(key), list)), [])
    files: list[Json] = [
        {"path": clean(str(row.get("path"))), "size": int(row.get("size") or 0), "sha256": text_of(row.get("sha256"))}
        for row in listed
        if isinstance(row, dict)
    ]
    described = {key: tree(raw.get(key)) for key in _CHECKPOINT_KEYS}
    return described | {
        "name": described["name"] or "unnamed",
        "inference_time": bool(raw.get("inference_time")),
        "files": sorted(files, key=lambda row: row["path"]),
    }


def _at_inference_time(plan: Json) -> bool:
    """Whether the edit left the original's weights in the copy's files; runs of earlier versions had no such edits."""
    return bool((plan.get("method") or {}).get("inference_time"))


def _request(raw: Json) -> Json | None:
    """The redacted request without what has its own place in the report (subject, criteria)."""
    return {key: tree(value) for key, value in raw.items() if key not in ("subject", "criteria")} if raw else None


def _subject(raw: Json) -> Json | None:
    subject, data = raw.get("subject"), raw.get("data") or {}
    if not isinstance(subject, dict):
        return None
    return {key: tree(subject.get(key)) for key in ("kind", "pseudonym", "key_id")} | {
        "categories": tree(data.get("categories") or []),
        "special": data.get("special") if isinstance(data.get("special"), bool) else None,
    }


def _method(run: Path) -> Json | None:
    """Method, resolved parameters, importances and the measured difference per tensor."""
    plan = read(run, "edit/plan.json", required=False)
    if not plan:
        return None
    delta = read(run, "edit/delta.json", required=False)
    method = plan.get("method") or {}
    edit = None
    if delta:
        tensors = [
            {
                "name": clean(str(row.get("name"))),
                "dtype": text_of(row.get("dtype")),
                "shape": tree(row.get("shape") or []),
                "changed": int(row.get("changed") or 0),
                "rel_norm": float_of(row.get("rel_norm")),
                "block": row.get("block"),
                "role": text_of(row.get("role")),
            }
            for row in delta.get("tensors") or []
        ]
        edit = {
            "tensors": sorted(tensors, key=lambda row: (-(row["rel_norm"] or 0.0), row["name"])),
            "changed_elements": delta.get("changed_elements"),
            "total_elements": delta.get("total_elements"),
            "statistics": tree(delta.get("statistics") or {}),
            "left_out": tree(delta.get("left_out") or []),
        }
    return {
        "name": text_of(method.get("name")) or "unnamed",
        "version": text_of(method.get("version")),
        "paper": text_of(method.get("paper")),
        "parameters": tree(method.get("parameters") or {}),
        "inference_time": _at_inference_time(plan),
        "importances": tree(plan.get("importances") or {}),
        "warnings": [clean(str(text)) for text in plan.get("warnings") or []],
        "edit": edit,
    }


def _records(run: Path) -> list[Json]:
    """One row per record, worst first on the latest checkpoint: most attacks that hit, then extracted, then uncertain,
    then by probability.
    """
    stages = {stage: rows_of(run, f"{stage}/records.parquet") for stage in STAGES}
    for name, probed in record_figures(run).items():  # what a probe found on the checkpoint before the edit
        if name in stages["before"]:
            stages["before"][name] = probed | stages["before"][name]
    for stage in STAGES:
        for name, found in attack_columns(run, stage).items():
            stages[stage][name] = found | stages[stage].get(name, {})
    control = [row["loss"] for row in rows_of(run, "after/control.parquet").values() if row.get("loss") is not None]
    never_seen = max(control, default=None)
    rows = []
    for record_id in dict.fromkeys([*stages["before"], *stages["after"]]):
        row: Json = {"id": record_id, "n_tokens": None}
        for stage in STAGES:
            figures = stages[stage].get(record_id)
            if figures is not None:
                row["n_tokens"] = figures.pop("n_tokens", row["n_tokens"])
            row[stage] = figures
        row["flags"] = _flags(row, never_seen)
        rows.append(row)
    return sorted(rows, key=_badness)


def _badness(row: Json) -> tuple[int, int, float, str]:
    now = row["after"] or row["before"] or {}
    probability = now.get("probability", now.get("label_probability"))
    return (
        -len(now.get("hits") or []),
        -_GREEDY_RANK.get(now.get("greedy", ""), 0),
        -(probability if probability is not None else -1.0),
        row["id"],
    )


def _flags(row: Json, never_seen: float | None) -> list[str]:
    """What a reader should notice about one record; over-forgotten = loss above every never-seen control record."""
    flags = []
    for stage, when in zip(STAGES, ("before", "after", "by the reference"), strict=True):
        figures = row[stage] or {}
        if figures.get("greedy") == "extracted":
            flags.append(f"extracted {when}")
        if figures.get("correct"):
            flags.append(f"label predicted {when}")
    now = row["after"] or row["before"] or {}
    if now.get("greedy") == "uncertain":
        flags.append("uncertain")
    loss = (row["after"] or {}).get("loss")
    if loss is not None and never_seen is not None and loss > never_seen:
        flags.append("over-forgotten")
    return flags


def _utility(kind: str, paired: Json) -> Json:
    """Paired differences on the retain set, and whether the edit overshot never-seen data."""
    figures = {
        clean(metric): {part: figure_of(row.get(part)) for part in ("before", "after", "difference")}
        for metric, row in (paired.get("utility") or {}).items()
    }
    over = paired.get("over_forgetting")
    reason = None
    if not figures:
        reason = "an audit edits nothing" if kind == "audit" else "no retain figures were compared"
    return {
        "status": "run" if figures else "not_run",
        "reason": reason,
        "figures": figures,
        "over_forgetting": {"flag": bool(over.get("flag")), "statement": clean(str(over.get("statement") or ""))}
        if over
        else None,
    }


def _robustness(kind: str, attacks: list[Json], paired: Json) -> Json:
    """The attacks on the edit itself, by what they showed, and the finding; the attacks stand in attacks[].

    Raises:
        ValueError: if the finding is none of `FINDINGS`.
    """
    given = paired.get("stress") or {}
    named = {part: [clean(str(name)) for name in given.get(part) or []] for part in ("attacks", *_OUTCOMES)}
    listed = {name for names in named.values() for name in names}
    rows = [
        row for row in attacks if row["stress"] or row["name"] in listed or row["name"].partition(".")[0] == DURABILITY
    ]
    rows.sort(key=lambda row: stress_order(row["name"]))  # stable: the suite's order within one kind
    ran = any(row["status"] == "run" for row in rows)
    reason = None
    if kind == "audit":
        reason = "an audit edits nothing"
    elif not ran:
        planned = "none of the planned attacks on the edit ran"
        reason = planned if rows else "no relearning, quantisation, pruning or paraphrase test is part of this run"
    finding = given.get("finding")
    if finding is not None and finding not in FINDINGS:
        raise ValueError(f"expected a finding out of {', '.join(FINDINGS)}")
    return {
        "status": "run" if ran else "not_run",
        "reason": reason,
        "attacks": [row["name"] for row in rows],
        "margin": float_of(given.get("margin")),
        "level": float_of(given.get("level")),
        "finding": finding,
        "statement": text_of(given.get("statement")),
        **{part: named[part] for part in _OUTCOMES},
    }


def _decision(raw: Json, missing: list[str]) -> Json:
    """Criteria, verdict, claim level and limits; a run that reached no decision is inconclusive and says why."""
    limits = [clean(str(text)) for text in raw.get("limits") or []]
    if not raw:
        gap = f" (no measurements: {', '.join(missing)})" if missing else ""
        limits.append(f"The run stopped before its criteria were decided{gap}.")
    verdict = raw.get("verdict", "inconclusive")
    if verdict not in VERDICTS:
        raise ReportError(f"expected a verdict out of {', '.join(VERDICTS)} in criteria.json, found another", 4)
    level = raw.get("claim_level")
    if level is not None and level not in CLAIM_LEVELS:
        raise ReportError("expected a claim level E0 to E4 or null in criteria.json, found another", 4)
    criteria = [criterion(row) for row in raw.get("criteria") or []]
    return {"criteria": criteria, "verdict": verdict, "claim_level": level, "limits": limits}


def _custody(run: Path, measured: Json) -> Json:
    """sha256 of every file the report rests on; links are refused, since their target may change unseen."""
    files = []
    for folder, names, leaves in os.walk(run):
        base = Path(folder)
        top = base == run
        names[:] = sorted(name for name in names if not (top and name in _OUTSIDE_CUSTODY))
        for name in [*names, *leaves]:
            if (base / name).is_symlink() and not (top and name in _OUTSIDE_CUSTODY):
                where = clean((base / name).relative_to(run).as_posix())
                raise ReportError(
                    f"expected plain files in the run folder, found a link at {where}; copy its target", 4
                )
        for name in leaves:
            path = base / name
            if not (top and name in _OUTSIDE_CUSTODY):
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                where = clean(path.relative_to(run).as_posix())
                files.append({"path": where, "size": path.stat().st_size, "sha256": digest})
    return {
        "files": sorted(files, key=lambda row: row["path"]),
        "tensor_digest_in": (measured.get("before") or {}).get("tensor_digest"),
        "tensor_digest_out": (measured.get("after") or {}).get("tensor_digest"),
        "verify": "unlearn verify RUN",
    }
