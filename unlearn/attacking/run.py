"""The attacks of a suite on one model: which can run, which fit the budget, what each leaves in the run folder.

<stage>/attacks/NAME.json         what an attack found (`unlearn.attack/v1`)
<stage>/attacks/records.parquet   per-record columns of all attacks, `ATTACK:COLUMN`; control.parquet likewise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd

from probes import statistics
from probes.errors import ResourceError, UnsupportedError, UsageError
from unlearn.attacking.result import Result, as_figure, frame
from unlearn.attacking.views import Views
from unlearn.evidence.measure import Measured, Settings
from unlearn.requests.attacks import BUILT_IN, NEEDS, Declaration, Size, catalogue, passes, within
from unlearn.workspace import Workspace

Runner = Callable[[Views, dict[str, Any]], Result]
# Attacks whose headline is a figure of `metrics.json` too, the one that criteria name.
FIGURES = {
    "verbatim.greedy": "extraction.greedy",
    "verbatim.strength": "extraction_strength",
    "recollection.probability": "probability",
}
_OWN = {declaration.name for declaration in BUILT_IN}


def size_of(workspace: Workspace) -> Size:
    """What costs depend on."""
    sets = workspace.run.read_json("inputs/sets.json")
    records, control = (sets.get(role, {}) for role in ("records", "control"))
    n = records.get("n", 0) + control.get("n", 0)
    tokens = (records.get("tokens", 0) + control.get("tokens", 0)) / max(1, n)
    canaries = len(workspace.canaries()) if "canaries" in workspace.job.inputs else 0
    return Size(records.get("n", 0), control.get("n", 0), max(1.0, tokens), canaries)


def lacking(declaration: Declaration, views: Views) -> str | None:
    """Why an attack cannot run here, in words; None where it can."""
    if declaration.runner is None:
        return declaration.reason
    if views.task not in declaration.tasks:
        return "not defined for this kind of model"
    if declaration.once and views.stage != "before":
        return "it does not depend on the model; see the checkpoint as given"
    present: dict[str, Callable[[], bool]] = {
        "records": lambda: views.has("records"),
        "control": lambda: views.has("control"),
        "reference": lambda: views.has_reference,
        "text": lambda: views.text,
        "chat_template": lambda: bool(getattr(views.tokenizer, "chat_template", None)),
    }
    inputs = views.workspace.job.inputs
    for need in declaration.needs:
        if not (present[need]() if need in present else need in inputs):
            if need == "reference" and views.stage == "reference":
                return "this is the reference"
            return f"it needs {NEEDS.get(need, need)}"
    return None


def run_attacks(
    workspace: Workspace, stage: str, which: str, measured: Measured | None, settings: Settings
) -> list[dict[str, Any]]:
    """Run the suite's attacks on one model and write what they found.

    Args:
        workspace: the run.
        stage: `before`, `after` or `reference`.
        which: `checkpoint`, `edited` or `reference`.
        measured: figures and per-token tables of the one pass; None where there are no records.
        settings: measurement settings.

    Returns:
        One row for each attack of the suite, for `metrics.json`.
    """
    views = Views(workspace, stage, which, measured, settings)
    entries = workspace.job.suite["attacks"]
    reasons, size = _planned(views), size_of(workspace)
    if workspace.job.kind == "attack" and stage == "before":
        for name, reason in reasons.items():
            if reason:
                raise UsageError(f"expected what {name} needs to run, found that it cannot: {reason}")
    found: dict[str, Result] = {}
    for number, entry in enumerate(entries):
        name = entry["name"]
        if reasons[name] is None:
            workspace.doing(name, number, len(entries))
            try:
                found[name] = _call(catalogue()[name], views, entry)
            except (UsageError, UnsupportedError, ResourceError) as error:
                if workspace.job.kind == "attack" and stage == "before":
                    raise
                reasons[name] = " ".join(str(error).splitlines())
    _write(workspace, stage, views, found, {entry["name"]: entry for entry in entries}, size)
    return [_row(catalogue()[entry["name"]], reasons[entry["name"]], found, views.task) for entry in entries]


def _planned(views: Views) -> dict[str, str | None]:
    """Why each attack of the suite will not run; None for those that will."""
    entries, size = views.workspace.job.suite["attacks"], size_of(views.workspace)
    reasons = {entry["name"]: lacking(catalogue()[entry["name"]], views) for entry in entries}
    could = [entry for entry in entries if reasons[entry["name"]] is None]
    budget = views.workspace.job.suite.get("budget")
    for name, more in within(could, size, budget).items():
        reasons[name] = f"over the budget of {budget:g} forward passes a record: it needs {more:.1f} more"
    return reasons


def estimate(workspace: Workspace, settings: Settings) -> str:
    """What the suite's attacks on the checkpoint as given will cost at most, in words."""
    reasons = _planned(Views(workspace, "before", "checkpoint", None, settings))
    entries = [entry for entry in workspace.job.suite["attacks"] if reasons[entry["name"]] is None]
    size = size_of(workspace)
    shared, alone = passes(entries, size)
    over = sum(reason is not None and reason.startswith("over the budget") for reason in reasons.values())
    unit = "forward passes a record" if size.records else "forward passes"
    saved = f" ({alone:.1f} if every attack ran alone)" if alone > shared else ""
    cut = f"; {over} over the budget" if over else ""
    count = f"{len(entries)} attack{'s' * (len(entries) != 1)}"
    return f"{count}: at most {shared:.1f} {unit} for each model{saved}{cut}"


def _call(declaration: Declaration, views: Views, entry: dict[str, Any]) -> Result:
    assert declaration.runner is not None
    module, _, attribute = declaration.runner.partition(":")
    try:
        runner: Runner = getattr(import_module(module), attribute)
        result = runner(views, entry)
        if declaration.name not in _OWN:
            _check(result, views)
        return result
    except (UsageError, UnsupportedError, ResourceError):
        raise
    except Exception as error:
        if declaration.name in _OWN:
            raise
        # another package's mistake does not end an audit; its words may quote a record, so they are not shown
        raise UnsupportedError(f"the package that brings this attack failed ({type(error).__name__})") from None


def _check(result: Any, views: Views) -> None:
    """Refuse what another package returns that would break a run, or put text outside its private folder."""
    if not isinstance(result, Result):
        raise TypeError("no Result")
    for role, columns in (("records", result.records), ("control", result.controls)):
        for values in columns.values():
            if len(values) != len(views.records(role)):
                raise ValueError("columns of another length than the set")
            if any(
                value is not None and not isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values
            ):
                raise TypeError("columns of something else than numbers")
    keys = {"value", "unit", "n", "ci_low", "ci_high", "ci_level", "direction"}
    if any(set(figure) != keys for figure in (*result.figures.values(), *result.control.values())):
        raise ValueError("figures with other keys")


def _row(declaration: Declaration, reason: str | None, found: dict[str, Result], task: str) -> dict[str, Any]:
    figure = FIGURES.get(declaration.name)
    if figure == "probability" and task == "image_classification":
        figure = "label_probability"
    return {
        "name": declaration.name,
        "goal": declaration.goal,
        "access": declaration.access,
        "budget": declaration.budget or None,
        "status": "not_run" if reason else "run",
        "reason": reason,
        "figure": None if reason else figure,
        "detail": declaration.name in found,
    }


def _write(
    workspace: Workspace,
    stage: str,
    views: Views,
    found: dict[str, Result],
    entries: dict[str, dict[str, Any]],
    size: Size,
) -> None:
    """Documents and per-record columns; p-values of the membership scores are adjusted for their number."""
    run = workspace.run
    tested = {
        name: result.pvalue
        for name, result in found.items()
        if result.pvalue is not None and name.startswith("membership.")
    }
    adjusted = dict(zip(tested, statistics.holm(list(tested.values())), strict=True)) if tested else {}
    for name, result in found.items():
        cost = catalogue()[name].cost(entries[name], size)
        member = name.startswith("membership.") and name != "membership.blind" and views.has("control")
        confounded = views.blind.statement if member and views.blind.confounded else None
        declaration = catalogue()[name]
        spent = {
            "passes": sum(cost.values()),
            "generated_tokens": result.generated,
            "reference_passes": float("reference" in declaration.needs),
        }
        document = result.document(name, entries[name], spent, confounded)
        run.write_json(f"{stage}/attacks/{name}.json", document | {"pvalue_holm": adjusted.get(name)})
        if result.private:
            run.write_jsonl(f"private/attacks/{stage}-{name}.jsonl", result.private)
    for role in ("records", "control"):
        columns = {
            f"{name}:{column}": values
            for name, result in found.items()
            for column, values in (result.records if role == "records" else result.controls).items()
        }
        if columns:
            ids = [workspace.pseudonym(record.record_id) for record in views.records(role)]
            run.write_table(f"{stage}/attacks/{role}.parquet", frame(ids, columns))


def read_attacks(workspace: Workspace, stage: str) -> tuple[dict[str, dict[str, Any]], dict[str, pd.DataFrame]]:
    """Documents by attack, and per-record columns by set, of one stage."""
    folder = workspace.run.file(f"{stage}/attacks")
    documents = {
        path.stem: workspace.run.read_json(f"{stage}/attacks/{path.name}") for path in sorted(folder.glob("*.json"))
    }
    tables = {
        path.stem: workspace.run.read_table(f"{stage}/attacks/{path.name}") for path in sorted(folder.glob("*.parquet"))
    }
    return documents, tables


def attack_arms(
    workspace: Workspace, clusters: Mapping[str, Sequence[str | None]], edited: bool
) -> dict[str, dict[str, Any]]:
    """Arms O, U, N, R of every attack's headline, and the residual where an edit was made.

    Args:
        workspace: the run.
        clusters: of `records` and `control`.
        edited: whether there is an edited copy.
    """
    before, before_tables = read_attacks(workspace, "before")
    after, after_tables = read_attacks(workspace, "after")
    reference, _ = read_attacks(workspace, "reference")
    current, tables = (after, after_tables) if edited else (before, before_tables)
    arms: dict[str, dict[str, Any]] = {}
    for name in before | after | reference:
        document = before.get(name) or after.get(name) or reference[name]
        key = document["headline"]

        def figure(documents: dict[str, Any], part: str, name: str = name, key: str | None = key) -> Any:
            return (documents.get(name) or {}).get(part, {}).get(key) if key else None

        arms[name] = {
            "arms": {
                "O": figure(before, "figures"),
                "U": figure(after, "figures") if edited else None,
                "N": figure(current, "control"),
                "R": figure(reference, "figures"),
            },
            "residual": _residual(name, document, before_tables, tables, clusters, workspace) if edited else None,
        }
    return arms


def _residual(
    name: str,
    document: dict[str, Any],
    before: dict[str, pd.DataFrame],
    after: dict[str, pd.DataFrame],
    clusters: Mapping[str, Sequence[str | None]],
    workspace: Workspace,
) -> dict[str, Any] | None:
    """(U - N) / (O - N) of the attack's per-record column."""
    column, bounds = f"{name}:{document['column']}", document.get("bounds")
    sources = (before.get("records"), after.get("records"), after.get("control"))
    if document["column"] is None or any(table is None or column not in table for table in sources):
        return None
    if bounds is None:
        return {"status": "not testable", "reason": "the figure has no fixed range; read it through its arms"}
    values = [table[column].to_numpy(dtype=float) for table in sources if table is not None]
    estimate = statistics.residual(
        *values,
        clusters=clusters["records"],
        n_clusters=clusters["control"],
        bounds=tuple(bounds),
        seed=workspace.job.options.seed,
    )
    if estimate.interval is None:
        return {"status": "not testable", "reason": estimate.reason}
    return as_figure(estimate.interval, "share of O - N") | {"status": "ok", "reason": None}
