"""ULD distilled: the difference of a model and its assistant (arXiv 2406.08607) learned by the model's own weights.

`uld` leaves the weights as they are and takes an assistant's distribution from the model's at every token. Here that
difference is the teacher, and the model, which it starts from, learns to give the teacher's distribution itself
(`unlearn.editors.student` has the objective). The copy is an ordinary checkpoint: no second model, no program of its
own, nothing that could be left out to have the original back.

    teacher      the model as it was and the assistant, by the rule of `unlearn.editors.uld`
    forget rows  the records to forget, the paraphrases that the assistant trained on, and what the teacher writes after
                 the records' prompts
    retain rows  the retain records, the wrong answers that the assistant trained on, and what the teacher writes after
                 prompts of retain records

Where the assistant holds wordings out, `student: {patience: n}` lets them decide when to stop; records never do.

The paper has no such step. Limits. The copy is as good as the difference at best, and at worst somewhere between it and
the original: its divergence from the teacher is in `edit/delta.json`. It was trained on what the teacher answers, so
what the model holds inside may be little changed; attacks on the weights have to tell.

With an alpha of 0 the teacher is the model, and where the assistant or the student makes no step there is nothing to
learn: the copy is then the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from probes.errors import ResourceError, UsageError
from probes.likelihood import out_of_memory
from probes.modelmap import ModelMap
from probes.records import ImageRecord, Record, TokenRecord
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editors.assistant import WORDINGS, Rows, TrainedAssistant, block_list, gather, train_assistant
from unlearn.editors.base import EditContext, EditResult, Rewording, Texts
from unlearn.editors.student import Course, Lessons, StudentParameters, chosen, distil, passes, written
from unlearn.editors.trainable import Added, expect_stored, selected
from unlearn.editors.uld import ULDParameters, assistant_passes, difference
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

FAR = 0.5  # share of the divergence from the teacher above which the student is said not to have learned it


class DistilledParameters(ULDParameters):
    """Those of ULD, which make the teacher, and of the student.

    Attributes:
        student: how the model learns from the difference.
    """

    student: StudentParameters = StudentParameters()

    def teaches(self) -> bool:
        """Whether there is anything to learn: a teacher that is not the model, and a student that takes steps."""
        everything = not self.rank_share and not self.ratio
        same = self.alpha == 0 and (self.outside == "original" or everything)
        student = self.student
        return not same and bool(student.learning_rate and (student.epochs if student.steps is None else student.steps))


class ULDDistilledEditor:
    """The distilled difference as a registered editor."""

    name: ClassVar[str] = "uld_distilled"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2406.08607"
    needs_retain: ClassVar[bool] = True
    needs_forget: ClassVar[bool] = True
    inference_time: ClassVar[bool] = False
    schema: ClassVar[type[DistilledParameters]] = DistilledParameters

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), self.schema)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of the parameters that the student may change.

        Raises:
            UsageError: if a glob, block or role matches nothing, or nothing is left.
            UnsupportedError: adapters beside stacked experts.
        """
        return selected(model_map, self.parameters.student)

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """Passes of rows at most: of the assistant in its training, of the teacher and of the student.

        As many wordings are counted as are asked for, and a text that the teacher writes as one forward pass.
        """
        p = self.parameters
        if not p.teaches():
            return {"forward": 0, "forward_backward": 0}
        paraphrases = (WORDINGS if p.paraphrases == "auto" else p.paraphrases) if p.rewording() else 0
        perturbed = WORDINGS if p.perturbed == "auto" else p.perturbed
        held = math.ceil(p.held_out * n_forget) if p.patience is not None else 0
        theirs = assistant_passes(p, n_forget)
        mine = self._student_passes(
            (n_forget, n_retain),
            (n_forget * (1 + paraphrases), n_retain + n_forget * perturbed),
            (held * paraphrases, held * perturbed),
            language=True,
        )
        return {kind: theirs[kind] + mine[kind] for kind in theirs}

    def _student_passes(
        self, records: tuple[int, int], rows: tuple[int, int], held: tuple[int, int], language: bool
    ) -> dict[str, int]:
        """What comes after the assistant's training: each pair is of forget and of retain rows."""
        p = self.parameters.student
        drawn = [p.texts(language) * n for n in (records[0], min(records))]
        found = passes(p, rows[0] + drawn[0], rows[1] + drawn[1], *held)
        return found | {"forward": found["forward"] + sum(drawn)}

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Train an assistant, distil the difference, put the model back and write the edited copy.

        Raises:
            UsageError: no records to forget or to keep, a selection that matches nothing, options for texts with
                images, a patience without wordings held out, or a loss that is no longer finite; and as
                `unlearn.editors.assistant.train_assistant`.
            UnsupportedError: parameters that the checkpoint does not store, adapters beside stacked experts, or a model
                that has no assistant.
            ResourceError: a step does not fit in memory.
        """
        p = self.parameters
        context.model_map.expect_single()
        if not context.forget or not context.retain:
            which = "retain records" if context.forget else "records to forget"
            raise UsageError(f"expected {which} for {self.name}, found none; give some")
        if p.assistant is None:
            block_list(context.model_map)  # said before anything about the student, which could do without
        names = self.selected(context.model_map)
        expect_stored(context.source, context.model, names)
        language = isinstance(context.forget[0], TokenRecord)
        if not language and p.student.texts(language):
            raise UsageError("expected a language model for `student.generated`, found images; leave it out")
        if context.texts is not None:
            context = replace(context, texts=_Once(context.texts))
        rows = gather(context, p)
        course, changes, sizes = Course(), dict[str, Tensor](), dict[str, int]()
        teaches, rest = p.teaches(), 0
        if teaches:
            found = self._student_passes(
                _sizes(context.forget, context.retain),
                _sizes(rows.forget, rows.retain),
                _sizes(rows.held_forget, rows.held_retain),
                language=language,
            )
            rest = sum(found.values())
        stages = _Stages(context, rest)
        with _modes_kept(context.model):
            trained = train_assistant(stages.first(), p if teaches else p.model_copy(update={"steps": 0}))
            if teaches and not trained.empty:
                course, changes, sizes = self._learn(context, trained, rows, names, stages)
        deltas = write_edited(
            context.source, out, Added(context.source.disk_tensors(context.model, changes, missing=0.0))
        )
        elements = {name: parameter.numel() for name, parameter in context.model.named_parameters()}
        student = p.student.model_dump(mode="json")
        student |= {"steps": course.planned, "generated": p.student.texts(language)}
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json") | trained.parameters | {"student": student},
            statistics={
                "steps": course.steps,
                "stopped": course.stopped,
                "best_epoch": course.best_epoch,
                "elements": sum(elements[name] for name in names),
                "rows": sizes,
                "forget_divergence": course.forget,
                "retain_divergence": course.retain,
                "held_out_divergence": course.held_out,
                "assistant": trained.statistics,
            },
            warnings=[*trained.warnings, *self._warnings(course)],
        )

    def _learn(
        self,
        context: EditContext,
        trained: TrainedAssistant,
        rows: Rows,
        names: Sequence[str],
        stages: _Stages,
    ) -> tuple[Course, dict[str, Tensor], dict[str, int]]:
        """What the student learned, the change of every parameter, and how many rows of each kind there were."""
        p = self.parameters.student
        forget, retain, sizes = list(rows.forget), list(rows.retain), {"forget": len(context.forget)}
        sizes |= {"paraphrases": rows.paraphrases, "retain": len(context.retain), "perturbed": rows.perturbed}
        try:
            model = difference(context, trained, self.parameters.rule())
            if isinstance(forget[0], ImageRecord):
                return *distil(context, model, Lessons(forget, retain), names, p, stages.ran), sizes
            model_map, n = ModelMap.of(model), p.texts(language=True)
            few = [context.retain[i] for i in chosen(len(context.retain), len(context.forget), context.seed)]
            for prompts, learned, seed, kind in (
                (context.forget, forget, context.seed, "generated_forget"),
                (few, retain, context.seed + 1, "generated_retain"),
            ):
                texts = written(model, model_map, cast("Sequence[TokenRecord]", prompts), n, p, seed, stages.ran)
                learned += texts
                sizes[kind] = len(texts)
            lessons = Lessons(forget, retain, rows.held_forget, rows.held_retain)
            return *distil(context, model_map, lessons, names, p, stages.ran), sizes
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise ResourceError(
                "expected memory for one step of the student, found too little; lower its batch_size and "
                "retain_batch_size, or train fewer blocks"
            ) from None

    def _warnings(self, course: Course) -> list[str]:
        patience, found = self.parameters.student.patience, []
        if course.stopped:
            found.append(
                f"the student's training ended after {course.steps} of {course.planned} steps: for {patience} epochs "
                "it came no nearer to its teacher on the wordings held out"
            )
        if patience is not None and course.steps and not course.held_out:
            found.append("without wordings held out nothing says when the student is to stop: every step was made")
        if course.left() > FAR:
            found.append(
                f"the student kept {min(course.left(), 1.0):.0%} of its distance to the teacher on the rows to forget: "
                "raise `student.epochs` or `student.learning_rate`"
            )
        return found


def _sizes(forget: Sequence[Record], retain: Sequence[Record]) -> tuple[int, int]:
    return len(forget), len(retain)


class _Once:
    """Wordings that are made once, and given again when they are asked for again."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._made: dict[tuple[object, ...], list[TokenRecord]] = {}

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        key = (per_record, how, seed)
        if key not in self._made:
            self._made[key] = self._texts.paraphrases(per_record, how, seed)
        return self._made[key]

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        key = (per_record, seed)
        if key not in self._made:
            self._made[key] = self._texts.perturbed(per_record, seed)
        return self._made[key]

    def report(self) -> dict[str, Any]:
        return self._texts.report()


class _Stages:
    """Progress over the assistant's training and what comes after it, as one."""

    def __init__(self, context: EditContext, rest: int) -> None:
        self._context, self._rest, self._done, self._total = context, rest, 0, rest

    def first(self) -> EditContext:
        """A context whose progress is that of the first stage."""

        def progress(done: int, total: int) -> None:
            self._done, self._total = done, total + self._rest
            self._context.progress(done, self._total)

        return replace(self._context, progress=progress)

    def ran(self, rows: int) -> None:
        """Note rows of the later stages."""
        self._done += rows
        self._context.progress(self._done, self._total)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """A teacher around the model puts it in evaluation mode; afterwards every module has its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
