"""The edit stage, and runs that edit a copy without an audit (`unlearn edit`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import IntegrityError, UnsupportedError, UsageError
from probes.records import TokenRecord
from unlearn.disk import file_sha256
from unlearn.editors.base import EditContext, Editor, make_editor
from unlearn.editors.given import GivenEditor
from unlearn.records.augment import Augmented
from unlearn.records.raw import RawRecord
from unlearn.records.rewriter import Rewriter
from unlearn.requests.request import PATHS
from unlearn.runs.job import Job
from unlearn.workspace import Workspace

if TYPE_CHECKING:
    from probes.modelmap import ModelMap
    from unlearn.checkpoints.checkpoint import Checkpoint

_WORDINGS = "paraphrase_file"  # in the event that notes which file it was
UNCHANGED = "The edit changed no weight: the copy is the original."
INFERENCE_TIME = (
    "The method acts at inference time: the copy answers through a program of its own, and its files still hold the "
    "original's weights."
)


def editor_of(job: Job) -> Editor:
    """The job's editor with validated parameters.

    Raises:
        UsageError: listing every mistake.
    """
    assert job.method is not None
    return make_editor(**job.method)


def expect_weights(checkpoint: Checkpoint) -> None:
    """Refuse to edit what has no weights of its own.

    Raises:
        UnsupportedError: the checkpoint is a difference of two models.
    """
    if checkpoint.difference:
        raise UnsupportedError(
            f"{checkpoint.name}: expected a checkpoint with weights of its own, found the difference of two models; "
            "edit the checkpoint it was made from"
        )


def named_method(method: dict[str, Any] | None) -> dict[str, Any] | None:
    """The method for files that are shown: of a path its last part only, paths can name people."""
    if method is None:
        return None
    given = method["parameters"]
    paths = {key: Path(given[key]).name for key in PATHS if isinstance(given.get(key), str)}
    return method | {"parameters": given | paths}


def note_given(workspace: Workspace) -> None:
    """Note what the method's own inputs are, before anything is measured: an edit made elsewhere, supplied wordings.

    Raises:
        UsageError: the edit does not fit the checkpoint it is said to be an edit of, or the wordings have mistakes.
    """
    editor = editor_of(workspace.job)
    texts = texts_of_records(workspace)
    if texts is not None and texts.file is not None:
        workspace.run.event("input.read", what=_WORDINGS, sha256=texts.supplied().sha256)
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


def at_inference_time(workspace: Workspace, which: str) -> bool:
    """Whether a checkpoint answers by a program of its own while its files hold the weights of another model.

    Args:
        workspace: the run.
        which: `checkpoint`, `reference`, or `edited`, of which the run's own editor says it.
    """
    plan = "edit/plan.json"
    if which == "edited" and workspace.run.file(plan).exists():
        return bool(workspace.run.read_json(plan)["method"].get("inference_time"))
    return bool(workspace.checkpoint(which).config.get("inference_time"))


def texts_of_records(workspace: Workspace) -> Augmented | None:
    """Other wordings of the records to forget, none made until an editor asks; None where the run has no text of them.

    Raises:
        IntegrityError: the file of supplied wordings is not the one that the run began with.
        UsageError: it is gone.
    """
    job = workspace.job
    if workspace.checkpoint("checkpoint").task != "causal_lm" or "records" not in job.sources:
        return None
    raw = workspace.raw("records")
    if job.method is None or all(record.form in ("ids", "image") for record in raw):
        return None
    named = job.method["parameters"].get("paraphrase_file")
    file = None if named is None else Path(named).expanduser()
    noted = workspace.run.input_digest(_WORDINGS)
    if file is not None and noted is not None:
        if not file.is_file():
            raise UsageError("expected the paraphrase_file that the run began with, found none; put it back")
        if noted != "sha256:" + file_sha256(file):
            raise IntegrityError(
                "expected the paraphrase_file that the run began with, found another file; was it changed?"
            )
    scored = workspace.paraphrases() if "paraphrases" in job.inputs else {}

    def encode(rows: list[RawRecord]) -> list[TokenRecord]:
        return [record for record in workspace.tokenise("records", rows) if isinstance(record, TokenRecord)]

    return Augmented(
        raw,
        encode,
        control_seed=job.options.seed,
        file=file,
        scored=[prompt for prompts in scored.values() for prompt in prompts],
        rewriter=lambda: Rewriter(workspace.loaded("checkpoint").model, workspace.tokenizer()),
    )


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
            earlier=sets.get("earlier", []),
            earlier_edits=sorted(run.file("private/earlier").glob("*-adapter"), key=_number),
            texts=texts_of_records(workspace),
            cache_parts={
                "tensors": loaded.tensor_digest,
                "dtype": job.options.dtype,
                "device": workspace.device.split(":")[0],
            },
            progress=workspace.progress,
        ),
        out,
    )
    if (work / "adapter").exists():  # kept, and private: the copy less its adapter is the original
        kept = run.file("private/adapter")
        shutil.rmtree(kept, ignore_errors=True)
        (work / "adapter").rename(kept)
        run.claim(kept)
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
        "inference_time": editor.inference_time,
    }
    changed = sum(delta.changed for delta in result.deltas)
    if editor.inference_time:
        result.warnings.insert(0, INFERENCE_TIME)
    elif not changed and not result.warnings:
        result.warnings.append(UNCHANGED)
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
            "total_elements": sum(parameter.numel() for parameter in loaded.model.parameters())
            + result.statistics.get("added_elements", 0),
            "statistics": result.statistics,
            "tensor_digest": result.deltas.tensor_digest,
            "manifest": result.deltas.manifest,
            "left_out": result.deltas.left_out,
        },
    )


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


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
        expect_weights(self.checkpoint("checkpoint"))
        self.freeze()
        self.identify("checkpoint")
        note_given(self)
        self.describe_run(method=named_method(self.job.method))
