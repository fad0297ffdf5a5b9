"""What every kind of run works with: its folder, its job, one model at a time, its record sets under pseudonyms.

At most one model is in memory. Every stage reads what it needs from the run folder, never from the stage before it
in memory, so an interrupted run resumes to the same bytes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from probes.errors import IntegrityError, UsageError
from probes.modelmap import ModelMap
from probes.records import Record, TokenRecord
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint
from unlearn.disk import file_sha256
from unlearn.evidence.measure import Loaded, Progress
from unlearn.records.extras import Canary, read_canaries, read_candidates
from unlearn.records.files import as_row, read_records
from unlearn.records.raw import RawRecord, stands_in
from unlearn.records.same import clustered, expect_apart
from unlearn.records.tokens import data_digest, images, tokenise
from unlearn.runs.folder import RunFolder
from unlearn.runs.job import ROLES, Job, Source, environment
from unlearn.runs.pseudonyms import load_key, pseudonym
from unlearn.terminal import Display


@dataclass(slots=True)
class Live:
    """Objects a Python caller hands over instead of paths."""

    model: nn.Module | None = None
    tokenizer: Any = None
    reference: nn.Module | None = None
    records: dict[str, Sequence[Record]] = field(default_factory=dict)


class Workspace:
    """One run in flight."""

    def __init__(self, run: RunFolder, job: Job, display: Display, live: Live | None = None) -> None:
        self.run, self.job, self.display = run, job, display
        self.live = live or Live()
        self.device = job.options.resolved_device()
        self._key = load_key()
        self._checkpoints: dict[str, Checkpoint] = {}
        self._loaded: tuple[str, Loaded] | None = None
        self._sets: dict[str, list[Record]] | None = None
        self._tokenizer: Any = None
        self._checked: set[str] = set()
        self.progress: Progress = lambda done, total: None

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run a stage unless an earlier run finished it."""
        if self.run.done(name):
            self.display.skipped(name)
            return
        self.run.clear_stage(name)
        with self.display.stage(name, self.detail(name)) as update, self.run.stage(name):

            def progress(done: int, total: int) -> None:
                update(done, total)
                self.run.heartbeat()

            self.progress = progress
            work()

    def detail(self, name: str) -> str:
        """What a stage does, for the display."""
        return ""

    def doing(self, name: str, done: int, total: int) -> None:
        """Say which part of a stage is under way."""
        self.display.part(name)
        self.progress(done, total)

    # -- opening ---------------------------------------------------------------------------------------------------

    def checkpoint(self, which: str) -> Checkpoint:
        """`checkpoint`, `reference` or `edited`, opened once."""
        if which not in self._checkpoints:
            self._checkpoints[which] = self._open(which)
        return self._checkpoints[which]

    def _open(self, which: str) -> Checkpoint:
        if which == "edited":
            return self.checkpoint("checkpoint").reopen(self.run.file("edit/checkpoint"))
        module = self.live.model if which == "checkpoint" else self.live.reference
        if module is not None:
            return LiveCheckpoint(module, self.live.tokenizer)
        options = self.job.options
        ref = self.job.checkpoint if which == "checkpoint" else self.job.reference
        return open_checkpoint(
            str(ref).removeprefix("hub:"),
            online=options.online,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
        )

    def loaded(self, which: str) -> Loaded:
        """The live model; the one before it is released first."""
        if self._loaded is None or self._loaded[0] != which:
            self.release()
            self._loaded = (which, self.load(which))
        return self._loaded[1]

    def load(self, which: str) -> Loaded:
        """A live model beside the one in memory, for what needs two at once."""
        checkpoint = self.checkpoint(which)
        model = checkpoint.load_model(self.job.options.dtype, self.device)
        return Loaded(
            model, ModelMap.of(model), checkpoint.task, checkpoint.tensor_digest(), checkpoint.tokenizer_digest()
        )

    def release(self) -> None:
        """Let the model in memory go."""
        if self._loaded is None:
            return
        model = weakref.ref(self._loaded[1].model)
        self._loaded = None
        if model() is not None:  # in a cycle; a collection visits every object there is, so not without need
            gc.collect()

    def identify(self, which: str) -> None:
        """Read a checkpoint's digests, compare them with what the job expects, and note them as an input.

        Raises:
            IntegrityError: it is not the checkpoint that the request names.
        """
        opened = self.checkpoint(which)
        digest = opened.tensor_digest()
        if self.job.expected.get(which, digest) != digest:
            raise IntegrityError(
                f"expected the {which} with the tensor digest in the request, found another; was it changed?"
            )
        self.run.write_json(f"inputs/{which}.json", opened.describe() | {"manifest": opened.manifest()})

    def describe_run(self, **resolved: Any) -> None:
        """Note the resolved configuration and the environment as inputs."""
        self.run.write_json("inputs/config.json", resolved)
        self.run.write_json("inputs/environment.json", environment(self.device))

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded once: attacks tokenise thousands of short texts."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint("checkpoint").load_tokenizer()
        return self._tokenizer

    # -- record sets -----------------------------------------------------------------------------------------------

    def freeze(self, *, apart: bool = True) -> None:
        """Read every given set, check it against its digest and the checkpoint, and keep it in the private folder.

        Args:
            apart: whether sets with records in common are refused.

        Raises:
            IntegrityError: a file is not the one the request names.
            UsageError: with every mistake in a set.
        """
        for what, given in self.job.inputs.items():
            self.run.event("input.read", what=what, sha256="sha256:" + file_sha256(Path(given["location"])))
        if "canaries" in self.job.inputs:
            self.canaries()  # a mistake in it should not wait until its attack
        if "candidates" in self.job.inputs:
            self.candidates()
        if "paraphrases" in self.job.inputs:
            self.paraphrases()
        located = {role: source.location for role, source in self.job.sources.items()}
        located |= {what: given["location"] for what, given in self.job.inputs.items()}
        for role, expected in self.job.sha256.items():
            if "sha256:" + file_sha256(Path(located[role])) != expected:
                raise IntegrityError(
                    f"expected the {role} file with the digest in the request, found another; was it changed?"
                )
        given = self.read_sources()
        self._expect_templates(given)
        sets = dict(self.live.records)
        for role, raw in given.items():
            if role == "records" and self.job.duplicates:
                raw = self._with_duplicates(raw)
            sets[role] = self.tokenise(role, raw)  # here a mistake still names the user's own file and line
            self.keep(role, raw)
        if apart:
            expect_apart(sets)

    def _expect_templates(self, given: dict[str, list[RawRecord]]) -> None:
        """Refuse sets that lack the records' templates without saying so: what is asked in two ways does not compare.

        Raises:
            UsageError: naming every such set.
        """
        mine, wrong = self.job.sources.get("records"), []
        for role in ("control", "retain", "related"):
            for name in ("prompt", "completion") if role in given else ():
                template = getattr(mine, f"{name}_template", None)
                if template is None or getattr(self.job.sources[role], f"{name}_template") is not None:
                    continue
                texts = [text for record in given[role] if (text := getattr(record, name)) is not None]
                if bare := sum(not stands_in(text, template, name) for text in texts):
                    wrong.append(f"{role}: {bare} of {len(texts)} {name}s")
        if wrong:
            raise UsageError(
                f"expected texts in the templates of the records, found some that are not ({'; '.join(wrong)}); state "
                'prompt_template and completion_template for each set, "{prompt}" and "{completion}" where none is used'
            )

    def _with_duplicates(self, raw: list[RawRecord]) -> list[RawRecord]:
        """Records and, where the request says so, their near-duplicates in the corpus, as one cluster each."""
        from unlearn.records.expand import expand

        chosen = self.job.duplicates
        found = expand(
            raw, self.corpus(), threshold=chosen["threshold"], span=chosen["span"], include=chosen["include"]
        )
        self.run.write_json(
            "inputs/duplicates.json",
            {
                "corpus": found.corpus,
                "uncovered": found.uncovered,
                "included": found.included,
                "records": [self.pseudonym(name) for name in found.records],
            },
        )
        return found.raw

    def summarise(self, sets: dict[str, list[Record]], drafted: dict[str, tuple[str, ...]]) -> None:
        """Note sizes, origins and digests of the sets, and who is behind which pseudonym.

        Args:
            sets: every set of the run.
            drafted: roles that were drafted, with the limits that follow from it.
        """
        summary: dict[str, Any] = {}
        for role in (*ROLES, *(role for role in sets if role not in ROLES)):
            records = sets.get(role, [])
            summary[role] = {
                "n": len(records),
                "source": "drafted" if role in drafted else "given" if role in sets else "none",
                "limits": [*drafted.get(role, ()), *_repeats(role, records)],
                "digest": data_digest(records) if records else None,  # type: ignore[arg-type]
                "tokens": sum(record.n_tokens for record in records if isinstance(record, TokenRecord)),
            }
        self.run.write_json("inputs/sets.json", summary)
        subjects = sets.get("records", [])
        names = [{"id": record.record_id, "pseudonym": self.pseudonym(record.record_id)} for record in subjects]
        self.run.write_jsonl("private/subjects.jsonl", names)
        self._sets = {role: list(records) for role, records in sets.items()}

    def given(self) -> dict[str, list[Record]]:
        """The sets the job came with, tokenised."""
        roles = (*ROLES, *(role for role in self.job.sources if role not in ROLES))
        return {role: self.tokenised(role) for role in roles if role in self.job.sources or role in self.live.records}

    def read_sources(self) -> dict[str, list[RawRecord]]:
        """Every given set that is not already in memory, as records with text."""
        found = {}
        for role, source in self.job.sources.items():
            found[role] = read_records(
                source.location.removeprefix("hub:"), role=role, fmt=source.format(), online=self.job.options.online
            )
        return found

    def keep(self, role: str, raw: list[RawRecord]) -> None:
        """Freeze a record set in the private folder; later stages read it from there."""
        rows = []
        for i, record in enumerate(raw):
            row = as_row(record)
            if isinstance(record.image, bytes):
                row["image"] = str(self.run.write_bytes(f"private/images/{role}-{i:06d}", record.image).resolve())
            rows.append(row)
        self.run.write_jsonl(f"private/{role}.jsonl", rows)

    def canaries(self) -> list[Canary]:
        """Planted secrets, where the run has a file of them."""
        return read_canaries(self._unchanged("canaries"))

    def candidates(self) -> dict[str, list[str]]:
        """Candidates for an attribute, by record id."""
        return read_candidates(self._unchanged("candidates"))

    def paraphrases(self) -> dict[str, list[str]]:
        """Other prompts by record id."""
        from unlearn.records.extras import read_paraphrases

        return read_paraphrases(self._unchanged("paraphrases"))

    def _unchanged(self, what: str) -> str:
        """Where a further input lies, once it is known to be the one that the run began with.

        Raises:
            IntegrityError: the file has changed.
            UsageError: the file is gone.
        """
        location = str(self.job.inputs[what]["location"])
        if what not in self._checked:
            if not Path(location).is_file():
                raise UsageError(f"expected the file of {what} that the run began with, found none; put it back")
            if self.run.input_digest(what) != "sha256:" + file_sha256(Path(location)):
                raise IntegrityError(
                    f"expected the {what} that the run began with, found another file; was it changed?"
                )
            self._checked.add(what)
        return location

    def corpus(self) -> list[RawRecord]:
        """The corpus that near-duplicates are looked for in; it is read where it lies and not copied."""
        self._unchanged("corpus")
        source = Source(**self.job.inputs["corpus"])
        return read_records(source.location, role="corpus", fmt=source.format())

    def raw(self, role: str) -> list[RawRecord]:
        """A frozen set with its text."""
        return read_records(self.run.file(f"private/{role}.jsonl"), role=role)

    def tokenised(self, role: str) -> list[Record]:
        """A set as probes take it."""
        found = self.live.records[role] if role in self.live.records else self.tokenise(role, self.raw(role))
        return clustered(found)[0]

    def tokenise(self, role: str, raw: list[RawRecord]) -> list[Record]:
        """Records with text as the checkpoint's tokenizer or image processor has them.

        Raises:
            UsageError: with every mistake in the set.
        """
        checkpoint = self.checkpoint("checkpoint")
        if checkpoint.task == "image_classification":
            if any(record.form != "image" for record in raw):
                raise UsageError(f"expected image + label in {role} for an image classifier, found text records")
            labels = {str(name): int(i) for name, i in (checkpoint.config.get("label2id") or {}).items()}
            return list(images(raw, checkpoint.image_processor(), labels))
        if any(record.form == "image" for record in raw):
            raise UsageError(f"expected text records in {role} for a language model, found images")
        tokenizer = None if all(record.form == "ids" for record in raw) else self.tokenizer()
        limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
        source = self.job.sources.get(role) or self.job.sources.get("records")
        return list(
            tokenise(
                raw,
                tokenizer,
                max_length=limit,
                text_prompt_tokens=source.text_prompt_tokens if source else 1,
                vocab_size=checkpoint.config.get("vocab_size"),
            )
        )

    def sets(self) -> dict[str, list[Record]]:
        """The run's record sets, tokenised."""
        if self._sets is None:
            summary = self.run.read_json("inputs/sets.json")
            self._sets = {role: self.tokenised(role) for role in summary if summary[role]["n"]}
        return self._sets

    def pseudonym(self, record_id: str) -> str:
        """How a record is called outside the private folder."""
        return pseudonym(record_id, self._key)


def _repeats(role: str, records: list[Record]) -> list[str]:
    """What repeated records mean, for the report."""
    repeated = clustered(records)[1]
    if not repeated:
        return []
    return [f"{repeated} of {len(records)} in {role} repeat another one; intervals count what is the same once."]
