"""Section 2: which checkpoints this is about."""

from __future__ import annotations

from reports.blocks import Block, Cell, Prose, Table, table
from reports.sections.edit import extent
from reports.text import Json, plain, plural

PROPERTIES = (
    ("Name", "name"),
    ("Revision", "revision"),
    ("Architecture", "architecture"),
    ("Parameters", "parameters"),
    ("Tensors", "tensors"),
    ("Data type", "dtype"),
    ("Tied weights", "tied"),
    ("Bytes", "bytes"),
    ("Tensor digest", "tensor_digest"),
    ("Tokenizer digest", "tokenizer_digest"),
    ("Chat template digest", "chat_template_digest"),
)


def identity(report: Json) -> list[Block]:
    """Properties and digests of every checkpoint side by side, and how the edited one descends from the original."""
    before = "Before" if report["checkpoint"]["after"] else "Audited"
    return [checkpoints_table(report, before), Prose(" ".join(_descent(report)))]


def checkpoints_table(report: Json, before: str) -> Table:
    """Properties and digests of every checkpoint; `before` heads the column of the first one."""
    checkpoints = {stage: value for stage, value in report["checkpoint"].items() if value}
    heads = {"before": before, "after": "After", "reference": "Reference"}
    shown = [stage for stage in heads if stage in checkpoints]
    lines = [
        [Cell(label), *(_property(checkpoints[stage][key], key) for stage in shown)]
        for label, key in PROPERTIES
        if any(checkpoints[stage][key] is not None for stage in shown)
    ]
    columns = ("Property", *(heads[stage] for stage in shown))
    return table("Checkpoints", columns, lines, "checkpoint")


def _property(value: object, key: str) -> Cell:
    style = "code" if key.endswith("digest") and value is not None else ""
    return Cell(plain(value), style=style, tone="muted" if value is None else "")


def _descent(report: Json) -> list[str]:
    before, after = report["checkpoint"]["before"], report["checkpoint"]["after"]
    sentences = ["No edited checkpoint was measured in this run."]
    if after:
        sentences = ["The parent of the edited checkpoint is the one in the column Before."]
        sentences += [extent(report)] if (report["method"] or {}).get("edit") else []
        old = {row["path"]: row["sha256"] for row in before["files"]}
        if old and after["files"]:
            same = sum(old.get(row["path"]) == row["sha256"] for row in after["files"])
            files = plural(len(after["files"]), "file")
            sentences.append(f"Of {files} of the edited checkpoint, {same:,} are byte-identical to the original's.")
    if not report["checkpoint"]["reference"]:
        sentences.append(
            "No reference checkpoint was given, so nothing here compares with a model that never held the records."
        )
    return sentences
