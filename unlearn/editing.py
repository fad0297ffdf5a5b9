"""The edit stage, and runs that edit a copy without an audit (`unlearn edit`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import IntegrityError, UsageError
from unlearn.editors.base import EditContext, Editor, make_editor
from unlearn.editors.given import GivenEditor
from unlearn.runs.job import Job
from unlearn.workspace import Workspace

if TYPE_CHECKING:
    from probes.modelmap import ModelMap


def editor_of(job: Job) -> Editor:
    """The job's editor with validated parameters.

    Raises:
        UsageError: listing every mistake.
    """
    assert job.method is not None
    return make_editor(**job.method)


def named_method(method: dict[str, Any] | None) -> dict[str, Any] | None:
    """The method for files that are shown: of a path its last part only, paths can name people."""
    if method is None or not isinstance(path := method["parameters"].get("path"), str):
        return method
    return method | {"parameters": method["parameters"] | {"path": Path(path).name}}


def note_given(workspace: Workspace) -> None:
    """Note which checkpoint an edit made elsewhere is, before anything is measured.

    Raises:
        UsageError: it does not fit the checkpoint it is said to be an edit of.
    """
    editor = editor_of(workspace.job)
    if isinstance(editor, GivenEditor):
        digest = editor.identify(workspace.checkpoint("checkpoint"))
        workspace.run.write_json("inputs/given.json", {"tensor_digest": digest})


def _still_given(workspace: Workspace) -> None:
    """Refuse a checkpoint that has changed since the run began: the copy then holds other weights."""
    noted = workspace.run.file("inputs/given.json")
    if noted.exists() and workspace.run.read_json("inputs/given.json")["tensor_digest"] != (
        workspace.checkpoint("edited").tensor_digest()
    ):
        raise IntegrityError("expected the edited checkpoint that the run began with, found another; was it changed?")


def write_copy(workspace: Workspace) -> None:
    """The edit stage: the job's editor writes an edited copy into `edit/checkpoint`, and what it did beside it."""
    run, job, sets = workspace.run, workspace.job, workspace.sets()
    loaded, editor = workspace.loaded("checkpoint"), editor_of(job)
    work = run.file("private/work")
    work.mkdir(mode=0o700, exist_ok=True)
    out = run.file("edit/checkpoint")
    result = editor.edit(
        EditContext(
            source=workspace.checkpoint("checkpoint"),
            model=loaded.model,
            model_map=loaded.model_map,
            forget=sets.get("records", []),
            retain=sets.get("retain", []),
            seed=job.options.seed,
            work=work,
            cache_parts={
                "tensors": loaded.tensor_digest,
                "dtype": job.options.dtype,
                "device": workspace.device.split(":")[0],
            },
            progress=workspace.progress,
        ),
        out,
    )
    shutil.rmtree(work)
    run.claim(out)
    edited = workspace.checkpoint("edited")
    _still_given(workspace)
    run.write_json("edit/checkpoint.json", edited.describe() | {"manifest": edited.manifest()})
    places = _places(workspace, loaded.model_map)
    method = {
        "name": editor.name,
        "version": editor.version,
        "paper": editor.paper,
        "parameters": result.parameters,
    }
    changed = sum(delta.changed for delta in result.deltas)
    if not changed and not result.warnings:
        result.warnings.append("The edit changed no weight: the copy is the original.")
    # How a statistic was come by (computed or reused) is history, not evidence: it goes to the event log, so that
    # the same inputs give the same plan and report whether or not an earlier run had filled the cache.
    run.event("importances", **{name: note.get("reused") for name, note in result.importances.items()})
    plan = {
        "method": method,
        "audited": job.kind == "forget",
        "warnings": result.warnings,
        "tensors": [delta.name for delta in result.deltas],
        "importances": {
            name: {key: value for key, value in note.items() if key not in ("reused", "seed")}
            for name, note in result.importances.items()
        },
    }
    run.write_json("edit/plan.json", plan)
    tensors = []
    for delta in result.deltas:
        block, role = places.get(delta.name, (None, None))
        tensors.append(
            {
                "name": delta.name,
                "dtype": delta.dtype,
                "shape": list(delta.shape),
                "changed": delta.changed,
                "rel_norm": delta.rel_norm,
                "block": block,
                "role": role,
            }
        )
    run.write_json(
        "edit/delta.json",
        {
            "tensors": tensors,
            "changed_elements": sum(row["changed"] for row in tensors),
            "total_elements": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "statistics": result.statistics,
            "tensor_digest": result.deltas.tensor_digest,
            "manifest": result.deltas.manifest,
            "left_out": result.deltas.left_out,
        },
    )


def _places(workspace: Workspace, model_map: ModelMap) -> dict[str, tuple[int | None, str | None]]:
    """Block and role of every tensor on disk."""
    names = workspace.checkpoint("checkpoint").disk_names(model_map.model)
    return {
        disk: (model_map.block_of(name), model_map.role_of(name)) for name, places in names.items() for disk in places
    }


class EditRun(Workspace):
    """One edit without an audit in flight: inputs, sets, edit."""

    def execute(self) -> None:
        """Run every stage that is not done yet."""
        self.stage("inputs", self._inputs)
        self.stage("sets", lambda: self.summarise(self.given(), {}))
        self.stage("edit", lambda: write_copy(self))
        self.release()

    def detail(self, name: str) -> str:
        """What a stage does, for the display."""
        method = self.job.method["name"] if self.job.method else ""
        return {"inputs": "digests, record files", "edit": f"{method} on a copy, no audit"}.get(name, "")

    def _inputs(self) -> None:
        editor = editor_of(self.job)
        given = {*self.job.sources, *self.live.records}
        for role, needed in (("retain", editor.needs_retain), ("records", editor.needs_forget)):
            if needed and role not in given:
                raise UsageError(f"expected --{role} for {editor.name}, which measures it, found none")
        self.checkpoint("checkpoint")
        self.freeze()
        self.identify("checkpoint")
        note_given(self)
        self.describe_run(method=named_method(self.job.method))
