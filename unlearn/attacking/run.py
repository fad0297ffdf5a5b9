"""The attacks of a suite on one model: which can run, which fit the budget, what each leaves in the run folder.

<stage>/attacks/NAME.json         what an attack found (`unlearn.attack/v1`)
<stage>/attacks/records.parquet   per-record columns of all attacks, `ATTACK:COLUMN`; control.parquet likewise
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd

from probes import statistics
from probes.errors import ResourceError, UnsupportedError, UsageError
from unlearn.attacking.result import Result, frame
from unlearn.attacking.views import Views
from unlearn.editing import at_inference_time
from unlearn.evidence.measure import Measured, Settings
from unlearn.evidence.metrics import residual_figure
from unlearn.evidence.stress import ERROR, Arms, Judged, judge, summarise
from unlearn.requests.attacks import BUILT_IN, NEEDS, Declaration, Size, catalogue, passes, within
from unlearn.runs import cache
from unlearn.workspace import Workspace

Runner = Callable[[Views, dict[str, Any]], Result]
# Attacks whose headline is a figure of `metrics.json` too, the one that criteria name.
FIGURES = {
    "verbatim.greedy": "extraction.greedy",
    "verbatim.strength": "extraction_strength",
    "recollection.probability": "probability",
}
WEIGHTS = ("A2", "A3")  # access that includes the weights
MODEL_OF = {"before": "checkpoint", "after": "edited", "reference": "reference"}
VERSION = "1"  # of what attacks on an edit's durability give; part of every key in the store
_OWN = {declaration.name for declaration in BUILT_IN}


def size_of(workspace: Workspace) -> Size:
    """What costs depend on."""
    sets = workspace.run.read_json("inputs/sets.json")
    records, control = (sets.get(role, {}) for role in ("records", "control"))
    n = records.get("n", 0) + control.get("n", 0)
    tokens = (records.get("tokens", 0) + control.get("tokens", 0)) / max(1, n)
    canaries = len(workspace.canaries()) if "canaries" in workspace.job.inputs else 0
    return Size(records.get("n", 0), control.get("n", 0), max(1.0, tokens), canaries)


def entries_of(workspace: Workspace) -> list[dict[str, Any]]:
    """The suite's attacks, then those that test an edit."""
    suite = workspace.job.suite
    return [*suite["attacks"], *suite.get("reaudit", ())]


def lacking(declaration: Declaration, views: Views) -> str | None:
    """Why an attack cannot run here, in words; None where it can."""
    if declaration.runner is None:
        return declaration.reason
    if views.task not in declaration.tasks:
        return "not defined for this kind of model"
    if declaration.once and views.stage != "before":
        return "it does not depend on the model; see the checkpoint as given"
    job = views.workspace.job
    if job.kind == "audit" and any(declaration.name == entry["name"] for entry in job.suite.get("reaudit", ())):
        return f"it tests an edit: `unlearn forget` runs it, or `unlearn attack {declaration.name}`"
    if declaration.access in WEIGHTS and at_inference_time(views.workspace, MODEL_OF[views.stage]):
        if views.edited:
            return "an inference-time method: the folder holds the original's weights; whoever has them has arm O"
        return "an inference-time method: the folder holds another model's weights; attack that model"
    present: dict[str, Callable[[], bool]] = {
        "records": lambda: views.has("records"),
        "control": lambda: views.has("control"),
        "reference": lambda: views.has_reference,
        "retain": lambda: views.has("retain"),
        "related": lambda: views.has("related"),
        "edited": lambda: views.edited,
        "text": lambda: views.text,
        "chat_template": lambda: bool(getattr(views.tokenizer, "chat_template", None)),
    }
    inputs = job.inputs
    for need in declaration.needs:
        if not (present[need]() if need in present else need in inputs):
            if need == "reference" and views.stage == "reference":
                return "this is the reference"
            if need == "edited" and job.kind == "forget":
                return "it compares the edited copy with the original; see the edited copy"
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
    entries = entries_of(workspace)
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
                found[name] = _result(catalogue()[name], views, entry)
            except (UsageError, UnsupportedError, ResourceError) as error:
                if workspace.job.kind == "attack" and stage == "before":
                    raise
                reasons[name] = " ".join(str(error).splitlines())
    views.release()
    _write(workspace, stage, views, found, {entry["name"]: entry for entry in entries}, size)
    return [_row(catalogue()[entry["name"]], reasons[entry["name"]], found, views.task) for entry in entries]


def _planned(views: Views) -> dict[str, str | None]:
    """Why each attack of the suite will not run; None for those that will."""
    entries, size = entries_of(views.workspace), size_of(views.workspace)
    reasons = {entry["name"]: lacking(catalogue()[entry["name"]], views) for entry in entries}
    could = [entry for entry in entries if reasons[entry["name"]] is None]
    budget = views.workspace.job.suite.get("budget")
    for name, more in within(could, size, budget).items():
        reasons[name] = f"over the budget of {budget:g} forward passes a record: it needs {more:.1f} more"
    return reasons


def estimate(workspace: Workspace, settings: Settings) -> str:
    """What the suite's attacks on the checkpoint as given will cost at most, in words."""
    reasons = _planned(Views(workspace, "before", "checkpoint", None, settings))
    entries = [entry for entry in entries_of(workspace) if reasons[entry["name"]] is None]
    size = size_of(workspace)
    shared, alone = passes(entries, size)
    over = sum(reason is not None and reason.startswith("over the budget") for reason in reasons.values())
    unit = "forward passes a record" if size.records else "forward passes"
    saved = f" ({alone:.1f} if every attack ran alone)" if alone > shared else ""
    cut = f"; {over} over the budget" if over else ""
    count = f"{len(entries)} attack{'s' * (len(entries) != 1)}"
    return f"{count}: at most {shared:.1f} {unit} for each model{saved}{cut}"


def _result(declaration: Declaration, views: Views, entry: dict[str, Any]) -> Result:
    """What an attack finds, from the store where it was found before under the same conditions.

    Attacks on an edit's durability are kept: the original and the reference stay the same over many requests. What
    holds text is not.
    """
    if not declaration.stress or "edited" in declaration.needs or declaration.name not in _OWN:
        return _call(declaration, views, entry)
    key = cache.key_of(kind="attack", version=VERSION, attack=entry, **views.conditions)
    hit = cache.lookup(key, ".json")
    if hit is not None:
        return Result.restored(json.loads(hit.read_text()))
    result = _call(declaration, views, entry)
    if not result.private:
        cache.keep(key, ".json", json.dumps(result.stored()).encode())
    return result


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
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Arms O, U, N, R of every attack's headline and, where an edit was made, the residual and what follows from it.

    Args:
        workspace: the run.
        clusters: of `records` and `control`.
        edited: whether there is an edited copy.

    Returns:
        By attack: `arms`, `plain` (the same figure without the attack), `residual`, `stress`; and what the attacks on
        the edit's durability say together, None without an edit (`unlearn.evidence.stress`).
    """
    stages = {stage: _Stage.read(workspace, stage) for stage in ("before", "after", "reference")}
    before, after, reference = stages.values()
    current = after if edited else before
    seed = workspace.job.options.seed
    columns = {name: _arms_of(name, before, after, reference) for name in after.documents}
    arms: dict[str, dict[str, Any]] = {}
    for name in before.documents | after.documents | reference.documents:
        headline = current.headline(name) or before.headline(name) or reference.headline(name)

        def figures(key: str | None, name: str = name, headline: str | None = headline) -> dict[str, Any]:
            alone = after.figure(name, "figures", "original") if key == headline else None
            return {
                "O": before.figure(name, "figures", key) or alone,
                "U": after.figure(name, "figures", key) if edited else None,
                "N": current.figure(name, "control", key),
                "R": reference.figure(name, "figures", key),
            }

        bounded = name in columns and after.documents[name]["bounds"] is not None
        arms[name] = {
            "arms": figures(headline),
            "plain": figures("plain"),
            "residual": _residual(columns.get(name), bounded, clusters, seed) if edited else None,
            "stress": None,
        }
    if not edited:
        return arms, None
    declared = [name for entry in entries_of(workspace) if catalogue()[name := entry["name"]].stress]
    read = [name for name in declared if name in after.documents]
    judged = {}
    for name in read:
        found = columns[name]
        if found is None:
            open_ = (one.documents.get(name, {}).get("not_resolvable", {}) for one in (after, before))
            why = next((reason for found in open_ for reason in found.values()), None)
            judged[name] = Judged("not testable", why or "it gives no figure for single records on all arms")
        else:
            judged[name] = judge(found, clusters["records"], clusters["control"], family=len(read), seed=seed)
        arms[name]["stress"] = judged[name].as_dict(1 - ERROR)
    not_run = [name for name in declared if name not in read]
    return arms, summarise(judged, not_run, inference_time=at_inference_time(workspace, "edited"))


@dataclass(frozen=True, slots=True)
class _Stage:
    """Documents by attack and per-record columns by set, of one stage."""

    documents: dict[str, dict[str, Any]]
    tables: dict[str, pd.DataFrame]

    @classmethod
    def read(cls, workspace: Workspace, stage: str) -> _Stage:
        return cls(*read_attacks(workspace, stage))

    def headline(self, name: str) -> str | None:
        return (self.documents.get(name) or {}).get("headline")

    def figure(self, name: str, part: str, key: str | None) -> Any:
        return (self.documents.get(name) or {}).get(part, {}).get(key) if key else None

    def column(self, name: str, role: str, column: str | None) -> np.ndarray | None:
        """[R] values of one column, NaN where a record was not scored; None where there is no such column."""
        table, key = self.tables.get(role), f"{name}:{column}"
        if table is None or key not in table:
            return None
        return pd.to_numeric(table[key], errors="coerce").to_numpy(dtype=np.float64)


def _residual(
    arms: Arms | None, bounded: bool, clusters: Mapping[str, Sequence[str | None]], seed: int
) -> dict[str, Any] | None:
    """(U - N) / (O - N) of the attack's per-record column."""
    if arms is None:
        return None
    bounds = arms.bounds if bounded else None
    return residual_figure(arms.o, arms.u, arms.n, clusters["records"], clusters["control"], bounds, seed)


def _arms_of(name: str, before: _Stage, after: _Stage, reference: _Stage) -> Arms | None:
    """Per-record figures on every arm.

    An attack that needs the edited copy has no figure under attack on the original: there O is what the original gives
    without one, the column `original` of the edited copy's own result.
    """
    document = after.documents[name]
    column, bounds = document["column"], document["bounds"] or (0.0, 1.0)
    o = before.column(name, "records", column)
    if o is None:
        o = after.column(name, "records", "original")
    u, n = after.column(name, "records", column), after.column(name, "control", column)
    if column is None or o is None or u is None or n is None:
        return None
    return Arms(
        o=o,
        u=u,
        n=n,
        r=reference.column(name, "records", column),
        n_plain=after.column(name, "control", "plain"),
        bounds=(float(bounds[0]), float(bounds[1])),
    )
