"""Sections 12 and 13: how to repeat and check the run, and who signs."""

from __future__ import annotations

from collections.abc import Sequence

from reports.blocks import Block, Cell, Facts, Prose, SignOff, number_cell, table
from reports.text import Json, plain, plural, short, when

SIGNOFF_COLUMNS = {"role": "Role", "name": "Name", "decision": "Decision", "date": "Date", "key_id": "Key"}


def reproduce(report: Json, audience: str) -> list[Block]:
    """Commands, seed, software, digests; for the engineer the engine and every file's sha256 as well."""
    run, custody = report["run"], report["custody"]
    versions = ", ".join(f"{name} {plain(value)}" for name, value in sorted(run["versions"].items()))
    facts = [
        ("Repeat", Cell(_command(report), style="code")),
        *([("Settings", Cell(f"as printed with each {run['kind']}"))] if run["kind"] in ("probe", "attack") else []),
        ("Verify", Cell(custody["verify"], style="code")),
        ("Check this page", Cell("unlearn report RUN --check", style="code")),
        ("Seed", Cell("not recorded" if run["seed"] is None else str(run["seed"]))),
        ("Device and type", Cell(f"{run['device'] or 'not recorded'}, {run['dtype'] or 'not recorded'}")),
        ("Software", Cell(short(versions, 500) or "not recorded")),
    ]
    environment = {key: value for key, value in run["environment"].items() if key not in ("libraries", "unlearn-audit")}
    if environment:
        facts.append(("Environment", Cell(short(plain(environment), 500))))
    engine = ((run.get("measurements") or {}).get("before") or {}).get("engine")
    if engine and audience == "engineer":
        facts.append(("Engine", Cell(short(plain(engine), 500))))
    for words, key in (("Tensor digest in", "tensor_digest_in"), ("Tensor digest out", "tensor_digest_out")):
        facts.append((words, Cell(custody[key] or "none", style="code" if custody[key] else "")))
    if audience != "engineer":
        files = plural(len(custody["files"]), "file")
        note = f"The sha256 of each of the {files} this report rests on is in report.json (custody.files[])."
        return [Facts(facts), Prose(note)]
    lines = [
        (Cell(short(row["path"], 90), style="code"), number_cell(row["size"]), Cell(row["sha256"], style="code"))
        for row in custody["files"]
    ]
    return [
        Facts(facts),
        table("Files of the run folder", ("File", "Bytes", "sha256"), lines, "custody.files[]", (1,)),
    ]


def signoff(signoffs: Sequence[Json]) -> list[Block]:
    """Decisions recorded in attest/, and room to sign on paper."""
    if not signoffs:
        return [SignOff()]
    lines = [
        [Cell(when(row[key]) if key == "date" and key in row else row.get(key, "")) for key in SIGNOFF_COLUMNS]
        for row in signoffs
    ]
    columns = list(SIGNOFF_COLUMNS.values())
    return [table("Decisions recorded with the run", columns, lines, "attest/signoffs.jsonl"), SignOff()]


def _command(report: Json) -> str:
    """The command that repeats the run, with placeholders for the files that the record sets identify by digest."""
    run = report["run"]
    given = [name for name in ("control", "retain") if run["sets"].get(name, {"source": ""})["source"] == "given"]
    options = "".join(f" --{name} {run[name]}" for name in ("seed", "device", "dtype") if run[name] is not None)
    if run["kind"] == "probe":
        ran = [name for name, result in run["probes"].items() if result]
        flags = {"retain": "data"}
        names = [flags.get(name, name) for name, row in run["sets"].items() if row["source"] == "given"]
        files = "".join(f" --{name} {name}.jsonl" for name in names)
        return "; ".join(f"unlearn probe {name} CHECKPOINT{files}{options} --out RUN" for name in ran or ["NAME"])
    if run["kind"] == "forget":
        return f"unlearn forget request.yaml{options} --out RUN"
    sets = "".join(f" --{name} {name}.jsonl" for name in given)
    reference = " --reference REFERENCE" if report["checkpoint"]["reference"] else ""
    if run["kind"] == "attack":
        records = " --records records.jsonl" if run["sets"]["records"]["n"] else ""
        names = [row["name"] for row in report["attacks"]] or ["NAME"]
        return "; ".join(
            f"unlearn attack {name} CHECKPOINT{records}{sets}{reference}{options} --out RUN" for name in names
        )
    return f"unlearn audit CHECKPOINT --records records.jsonl{sets}{reference}{options} --out RUN"
