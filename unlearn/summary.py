"""The outcome of a run as text that fits 80 columns, and as data for scripts."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.api import Run

SHOWN = {
    "causal_lm": ("extraction.greedy", "probability", "extraction_strength", "loss"),
    "image_classification": ("correct", "label_probability", "loss"),
}
NAMES = {
    "extraction.greedy": "emitted verbatim",
    "probability": "token probability",
    "extraction_strength": "extraction strength",
    "loss": "loss (nats)",
    "correct": "predicted as labelled",
    "label_probability": "label probability",
}


def _number(value: float) -> str:
    """Two digits that matter: four columns with intervals have to fit 80 characters; the report has the rest."""
    if 1e-6 < abs(value) < 0.005:  # a p-value or a rare event: its size matters, not that it is nearly 0
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) < 0.995:
        return f"{value:.2f}".replace("0.", ".", 1)
    return f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None or figure.get("value") is None:
        return "-"
    low, high = figure["ci_low"], figure["ci_high"]
    interval = "" if low is None or high is None else f" [{_number(low)},{_number(high)}]"
    return _number(figure["value"]) + interval


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _wrapped(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, 78, initial_indent="  - ", subsequent_indent=indent)


def summary(run: Run) -> str:
    """The terminal summary of an audit or forget run."""
    metrics = run.metrics("before")
    task = metrics["task"]
    paired = run._read("compare/paired.json")
    decided = run._read("compare/criteria.json")
    edited = run.checkpoint is not None
    arms = paired["arms"]
    columns = ["O", "U", "N", "R"] if edited else ["O", "N", "R"]
    titles = {"O": "before" if edited else "records", "U": "after", "N": "never seen", "R": "reference"}
    columns = [arm for arm in columns if any(arms[name][arm] for name in SHOWN[task])]
    n = metrics["sets"]["records"]["n"]
    lines = [
        "",
        *_table(
            (f"{n} records", *(titles[a] for a in columns)),
            [(NAMES[name], *(_cell(arms[name][arm]) for arm in columns)) for name in SHOWN[task]],
        ),
    ]
    if paired["utility"]:
        rows = [
            (
                NAMES[name],
                *(_cell(paired["utility"][f"retain.{name}"][key]) for key in ("before", "after", "difference")),
            )
            for name in SHOWN[task]
        ]
        lines += ["", *_table(("retained", "before", "after", "difference"), rows)]
    apart = _on_the_weights(paired) if _inference_time(run) else {}
    lines += _headlines({n: row for n, row in paired["attacks"].items() if n not in apart}, columns, titles)
    lines += _durability(paired, apart)
    lines += [""]
    for row in decided["criteria"]:
        required = "" if row["required"] else " (not required)"
        under = f" under {row['attack']}" if row.get("attack") else ""
        lines += [f"{row['status']:<13} {row['id']} {row['metric']}{under}{required}"]
        lines += _wrapped(row["reason"])
    if asked := decided.get("earlier"):
        lines += [f"{asked['status']:<13} {asked['id']}", *_wrapped(asked["reason"])]
    lines += ["", f"verdict: {decided['verdict']}" + (f"   claim level: {decided['claim_level']}" if edited else "")]
    if _inference_time(run):
        lines += ["inference time: the files of the copy hold the original's weights"]
    if paired["over_forgetting"]["flag"]:
        lines += ["over-forgetting: " + paired["over_forgetting"]["statement"]]
    if edited:
        lines += [f"edited copy: {run.checkpoint}"]
    lines += [f"report: {run.path / 'report' / 'report.html'}"]
    return "\n".join(lines)


def _inference_time(run: Run) -> bool:
    """Whether the edit left the original's weights in the files of the copy."""
    plan = run._read("edit/plan.json")
    return bool(plan and plan["method"].get("inference_time"))


# Attacks whose figure stands in the first table.
_SHOWN_ABOVE = {"verbatim.greedy", "verbatim.strength", "recollection.probability"}


def _headlines(attacks: dict[str, Any], columns: list[str], titles: dict[str, str]) -> list[str]:
    """The headline figure of every other attack that ran, then of the looks at what else an edit changed."""
    lines = []
    for heading, collateral, arms in (
        ("attack", False, columns),
        ("what else changed", True, [a for a in columns if a != "N"]),
    ):
        rows = [
            (name.removeprefix("collateral."), *(_cell(row["arms"][arm]) for arm in arms))
            for name, row in attacks.items()
            if name.startswith("collateral.") == collateral
            and name not in _SHOWN_ABOVE
            and row.get("stress") is None
            and any(row["arms"][arm] for arm in arms)
        ]
        lines += ["", *_table((heading, *(titles[arm] for arm in arms)), rows)] if rows else []
    return lines


def _on_the_weights(paired: dict[str, Any]) -> dict[str, Any]:
    """Of an edit at inference time, the attacks on weights: they ran on the original alone, whose weights these are."""
    return {
        name: row
        for name, row in paired["attacks"].items()
        if name in (paired.get("stress") or {}).get("not_run", ()) and not row["arms"]["U"]
    }


def _durability(paired: dict[str, Any], apart: dict[str, Any]) -> list[str]:
    """What came back under each attack on the edit, and what they say together.

    Args:
        paired: `compare/paired.json`.
        apart: attacks that ran on the original alone.
    """
    found = paired.get("stress")
    if not found:
        return []
    rows = []
    for name, row in paired["attacks"].items():
        if row["stress"] is None:
            continue
        levels = (f"{_value(row['plain'][arm])}>{_value(row['arms'][arm])}" for arm in "UN")
        rows.append((name, *levels, _cell(row["residual"]), row["stress"]["status"]))
    lines = ["", *_table(("attack on the edit", "after", "never seen", "residual", "status"), rows)] if rows else []
    ran = {name: row for name, row in apart.items() if row["arms"]["O"]}
    if ran:
        given = [(name, _value(row["plain"]["O"]), _cell(row["arms"]["O"])) for name, row in ran.items()]
        lines += ["", *_table(("attack on the weights", "without", "original, so in the files"), given)]
    return [*lines, "", f"forgotten or hidden? {found['finding']}", *_wrapped(found["statement"])]


def _value(figure: dict[str, Any] | None) -> str:
    return "-" if figure is None or figure.get("value") is None else _number(figure["value"])


def summary_data(run: Run) -> dict[str, Any]:
    """The same for `--display json`."""
    decided = run._read("compare/criteria.json")
    return {
        "run": str(run.path),
        "verdict": decided["verdict"],
        "claim_level": decided["claim_level"],
        "inference_time": _inference_time(run),
        "criteria": decided["criteria"],
        "arms": run._read("compare/paired.json")["arms"],
        "attacks": run._read("compare/paired.json")["attacks"],
        "stress": run._read("compare/paired.json").get("stress"),
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "report": str(run.path / "report" / "report.html"),
        "exit_code": run.exit_code,
    }


def _digits(value: Any) -> str:
    """Three digits, for numbers of any size."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _rows(header: tuple[str, ...], rows: Sequence[tuple[Any, ...]], shown: int = 12) -> list[str]:
    """A table of the first few rows; the rest is counted."""
    cut = [tuple(cell if isinstance(cell, str) else _digits(cell) for cell in row) for row in rows[:shown]]
    more = [f"... and {len(rows) - shown} more in the run folder"] if len(rows) > shown else []
    return ["", *_table(header, cut), *more] if cut else []


def _place(row: dict[str, Any]) -> str:
    """Block and role of a matrix: `block 3 gate`; its name where it is in no block."""
    expert = f" expert {row['expert']}" if row.get("expert") is not None else ""
    where = f"block {row['block']}" if row["block"] is not None else row.get("name", row.get("module", "outside"))
    return f"{where} {row['role'] or ''}".strip() + expert


def _kfac_text(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            _place(row),
            row["cut"]["kept_pairs"] / row["cut"]["pairs"],
            row["cut"]["kept_norm"],
            row["cut"]["predicted_rise"],
            row["overlap_a"],
            row["overlap_g"],
        )
        for row in found["modules"]
    ]
    rho = found["modules"][0]["cut"]["rho"]
    lines = [f"{found['data']['n_positions']:,} positions of {found['data']['n_records']:,} records; cut at rho {rho}"]
    lines += _rows(("module", "pairs kept", "norm kept", "loss rise", "overlap A", "overlap G"), rows)
    if found["records"]:
        auc = found["records"]["auc"]
        against = f"AUC against control {_cell(auc)}" if auc else "in probes/records.parquet"
        lines += ["", f"memorisation score, {found['records']['n']} records: {against}"]
    return lines


def _spectrum_text(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["name"],
            row["parameters"],
            row["trace"]["value"],
            row["largest"][0] if row["largest"] else None,
            row["smallest"][-1] if row["smallest"] else None,
            row["negative_share"],
        )
        for row in found["operators"]
    ]
    return _rows(("operator", "parameters", "trace", "largest", "smallest", "negative"), rows)


def _localise_text(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["records"]:
        layer = max(row["layers"], key=lambda cell: abs(cell["score"]), default=None)
        strongest = f"block {layer['block']} {layer['module'].replace('_', '-')}" if layer else "-"
        ablation = row["ablation"] or {}
        rows.append((row["id"], row["log_prob"], strongest, *(ablation.get(k) for k in ("top", "random", "ordinary"))))
    lines = []
    if found["parts"]:
        part = max(found["parts"], key=lambda row: row["contrast"])
        where = f"block {part['block']} {part['module'].replace('_', '-')}"
        lines = [f"strongest part, beyond ordinary data: {where}, {_digits(part['contrast'])} nats a token"]
    return lines + _rows(("record", "log p", "most attribution", "ablated: top", "random", "ordinary"), rows)


def _condition_text(found: dict[str, Any]) -> list[str]:
    worst = sorted(found["tensors"], key=lambda row: -(row["kappa_relative"] or float("inf")))
    rows = [(_place(row), row["kappa"], row["kappa_relative"], row["stable_rank"]) for row in worst]
    return _rows(("matrix", "condition", "to Gaussian", "stable rank"), rows, 8)


_PROBES = {
    "kfac": _kfac_text,
    "spectrum": _spectrum_text,
    "localise": _localise_text,
    "condition": _condition_text,
}


def _probes_of(run: Run) -> dict[str, dict[str, Any]]:
    """Results of the probes that ran, by name."""
    found = {name: run._read(f"probes/{name}.json") for name in _PROBES}
    return {name: result for name, result in found.items() if result}


def _named(title: str, *cells: str, width: int = 42) -> list[tuple[str, ...]]:
    """Rows of a table for one title, which takes as many lines as it needs."""
    *above, last = textwrap.wrap(title, width)
    return [*((part, *("" for _ in cells)) for part in above), (last, *cells)]


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """How many columns of a table fit into 80 characters."""
    used = 0
    for n, column in enumerate(columns):
        used += 2 + max(len(column), *(len(_digits(row[n])) for row in rows))
        if used > 82:
            return n
    return len(columns)


def _ordered(found: dict[str, Any]) -> list[str]:
    """Keys of an attack's figures: the headline first, then by name, numbers by their size."""

    def natural(key: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]

    return sorted(found["figures"], key=lambda key: (key != found["headline"], natural(key)))


def _attack_lines(run: Run) -> list[str]:
    """What the attacks of an attack run found: every figure beside the never-seen records, then tables and notes."""
    lines = []
    for path in sorted((run.path / "before" / "attacks").glob("*.json")):
        found = run._read(f"before/attacks/{path.name}")
        rows = [
            row
            for key in _ordered(found)
            for row in _named(
                found["titles"].get(key, key), _cell(found["figures"][key]), _cell(found["control"].get(key))
            )
        ]
        lines += ["", *_table((found["attack"], "records", "never seen"), rows)] if rows else []
        for key, reason in found["not_resolvable"].items():
            lines += _wrapped(f"{found['titles'].get(key, key)}: not resolvable: {reason}")
        for table in found["tables"]:
            if not table["rows"]:
                continue
            n = _fitting(table["columns"], table["rows"])
            shown = _rows(tuple(table["columns"][:n]), [tuple(row[:n]) for row in table["rows"]])
            lines += ["", *textwrap.wrap(table["title"], 80), *shown[1:]]
        confounded = [f"confounded: {found['confounded']}"] if found["confounded"] else []
        lines += [line for text in (*confounded, *found["notes"]) for line in _wrapped(text)]
    return lines


def result_text(run: Run) -> str:
    """The terminal summary of a probe, attack or edit run."""
    lines = _attack_lines(run)
    for name, found in _probes_of(run).items():
        lines += _PROBES[name](found) + [line for text in found["warnings"] for line in _wrapped(text)]
    plan, delta = run._read("edit/plan.json"), run._read("edit/delta.json")
    if delta:
        share = delta["changed_elements"] / max(1, delta["total_elements"])
        changed = sum(row["changed"] > 0 for row in delta["tensors"])
        done = f"{changed} tensors changed, {share:.2%} of all weights"
        if _inference_time(run) and not changed:
            done = "no weight changed; the method acts at inference time"
        lines += [f"{plan['method']['name']}: {done}"]
        lines += [line for text in plan["warnings"] for line in _wrapped(text)]
        lines += ["not audited: `unlearn forget` measures what an edit does", f"edited copy: {run.checkpoint}"]
    page = _page(run)
    return "\n".join([*lines, "", f"report: {page}"] if page.is_file() else lines)


def _page(run: Run) -> Path:
    """The page of a run that judged nothing."""
    pages = [run.path / "report" / f"{stem}.html" for stem in ("attack", "probe")]
    return next((page for page in pages if page.is_file()), pages[0])


def result_data(run: Run) -> dict[str, Any]:
    """The same for `--display json`."""
    page = _page(run)
    return {
        "run": str(run.path),
        "probes": _probes_of(run),
        "attacks": {
            path.stem: run._read(f"before/attacks/{path.name}")
            for path in sorted((run.path / "before" / "attacks").glob("*.json"))
        },
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "report": str(page) if page.is_file() else None,
        "exit_code": run.exit_code,
    }


def plan_text(planned: dict[str, Any]) -> str:
    """The terminal form of a plan."""
    passes = ", ".join(f"{count} {kind}" for kind, count in planned["passes"].items())
    share = planned["parameters"] / max(1, planned["of_parameters"])
    return "\n".join(
        [
            f"method      {planned['method']}",
            f"records     {', '.join(f'{n} {role}' for role, n in planned['records'].items())}",
            f"drafted     {', '.join(planned['drafted']) or 'nothing'}",
            f"may change  {planned['tensors']} tensors, {planned['parameters']:,} parameters ({share:.1%})",
            f"passes      {passes}",
            f"disk        {planned['disk_bytes'] / 1e6:,.0f} MB for the edited copy",
            *(["weights     the original's stay in the copy's files"] if planned["inference_time"] else []),
            *([f"gone        {planned['earlier_gone']} records forgotten earlier"] if planned["earlier_gone"] else []),
            *(
                [f"carried out before, entry {planned['carried_out']} of the ledger: --again carries it out once more"]
                if planned["carried_out"] is not None
                else []
            ),
            "nothing was edited",
        ]
    )


def diff_text(found: dict[str, Any]) -> str:
    """The terminal form of a diff."""
    lines = []
    for name, (left, right) in found["inputs"].items():
        if isinstance(left, dict) and isinstance(right, dict):
            keys = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
            lines.append(f"{name}: differs in {', '.join(keys)}")
        else:
            lines.append(f"{name}: {left} | {right}")
    if not found["inputs"]:
        lines.append("inputs are the same")
    if found["figures"]:
        rows = [
            (
                f"{row['stage']}.{row['set']}",
                row["metric"],
                _cell(row["a"]),
                _cell(row["b"]),
                "*" if row["apart"] else "",
            )
            for row in found["figures"]
        ]
        lines += ["", *_table(("figure", "metric", "a", "b", ""), rows), "* the intervals do not overlap"]
    else:
        lines.append("figures are the same")
    a, b = found["verdict"]
    lines += ["", f"verdict: {a}" if a == b else f"verdict: {a} | {b}"]
    return "\n".join(lines)
