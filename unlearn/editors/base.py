"""What an editor is: it reads a checkpoint, the records to forget and the data to keep, and writes an edited copy.

An editor never writes to its source, never sees the control set or the reference, and never chooses a hyper-parameter
on the records it will be judged by with the reference model's help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from probes.errors import UsageError
from probes.records import Record, TokenRecord

if TYPE_CHECKING:
    from torch import nn

    from probes.modelmap import ModelMap
    from unlearn.checkpoints.checkpoint import Checkpoint
    from unlearn.checkpoints.writer import Deltas

Progress = Callable[[int, int], None]
Rewording = Literal["supplied", "rules", "model"]

# Registered name -> where the class lives. Requests name editors by this name, never by an import path.
EDITORS = {
    "given": "unlearn.editors.given:GivenEditor",
    "gradient_ascent": "unlearn.editors.losses:AscentEditor",
    "gradient_difference": "unlearn.editors.losses:DifferenceEditor",
    "gs_lora": "unlearn.editors.gs_lora:GSLoRAEditor",
    "kfac": "unlearn.editors.kfac:KFACEditor",
    "npo": "unlearn.editors.losses:NPOEditor",
    "simnpo": "unlearn.editors.losses:SimNPOEditor",
    "ssd": "unlearn.editors.ssd:SSDEditor",
    "svd": "unlearn.editors.svd:SVDEditor",
    "uld": "unlearn.editors.uld:ULDEditor",
    "uld_distilled": "unlearn.editors.distilled:ULDDistilledEditor",
}


class Texts(Protocol):
    """Other wordings of the records to forget, for editors that train on more than the records themselves.

    A wording carries the `record_id` of the record it comes from. The same arguments give the same wordings.
    """

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        """The records in other words: up to so many of each, record by record.

        Raises:
            UsageError: none were supplied, or the supplied ones are not of these records.
        """

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        """The records with wrong answers of the same form: up to so many of each, record by record."""

    def report(self) -> dict[str, Any]:
        """How many were made so far, by source; no text."""


@dataclass(slots=True)
class EditContext:
    """Everything an editor may use.

    Attributes:
        source: the checkpoint to edit.
        model: the source loaded in the run's dtype and device, in evaluation mode; left as it was found.
        model_map: its map.
        forget: records to forget.
        retain: records whose behaviour must stay.
        seed: for every random choice.
        texts: other wordings of the records to forget; None where they are no text.
        earlier: records that earlier requests forgot on the way to the source; they must not come back.
        earlier_edits: folders with the adapters of earlier edits, of those that left one, oldest first.
        work: a private folder for intermediate files; may be emptied afterwards.
        cache_parts: what a cached result about this model depends on (digests, dtype, device), without the data.
        progress: called with (done, total).
    """

    source: Checkpoint
    model: nn.Module
    model_map: ModelMap
    forget: Sequence[Record]
    retain: Sequence[Record]
    seed: int
    work: Path
    texts: Texts | None = None
    earlier: Sequence[Record] = ()
    earlier_edits: Sequence[Path] = ()
    cache_parts: dict[str, Any] = field(default_factory=dict)
    progress: Progress = lambda done, total: None


@dataclass(slots=True)
class EditResult:
    """What an editor did.

    Attributes:
        deltas: from `write_edited`.
        parameters: resolved hyper-parameters, automatic choices included.
        statistics: numbers about the edit, for `edit/delta.json`.
        importances: how each statistic of the data (importances, curvature factors) was obtained: digests, counts,
            whether it was reused.
        warnings: one line each, for the report.
    """

    deltas: Deltas
    parameters: dict[str, Any]
    statistics: dict[str, Any]
    importances: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Editor(Protocol):
    """An editing method with validated parameters."""

    name: ClassVar[str]
    version: ClassVar[str]
    paper: ClassVar[str]
    needs_retain: ClassVar[bool]
    needs_forget: ClassVar[bool]
    inference_time: ClassVar[bool]  # the copy answers differently, but its files still hold the original's weights

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters the editor may change.

        Raises:
            UsageError: if a glob matches nothing.
        """

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Forward and forward-plus-backward passes over records that the edit will take, for the plan.

        Those over records that earlier requests forgot come on top, see `Replaying`.
        """

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Write the edited copy to `out`."""


@runtime_checkable
class Replaying(Protocol):
    """What an editor has besides if it runs records that earlier requests forgot (`EditContext.earlier`)."""

    def replay_passes(self, n_forget: int, n_earlier: int) -> dict[str, int]:
        """Passes over earlier records, in the form of `Editor.passes`; none where there are none."""


def planned_passes(editor: Editor, n_forget: int, n_retain: int, n_earlier: int = 0) -> dict[str, int]:
    """Every pass over records that an edit will take at most, those over records forgotten earlier among them."""
    found = dict(editor.passes(n_forget, n_retain))
    if isinstance(editor, Replaying):
        for kind, count in editor.replay_passes(n_forget, n_earlier).items():
            found[kind] = found.get(kind, 0) + count
    return found


def make_editor(name: str, parameters: dict[str, Any]) -> Editor:
    """The registered editor of that name.

    Raises:
        UsageError: for an unknown name or invalid parameters.
    """
    if name not in EDITORS:
        raise UsageError(f"expected a method among {', '.join(sorted(EDITORS))}, found another name")
    module, _, attribute = EDITORS[name].partition(":")
    editor: Editor = getattr(import_module(module), attribute)(parameters)
    return editor
