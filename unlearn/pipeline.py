"""The pipeline behind `audit` and `forget`: stages that each leave files in the run folder and can be resumed.

    inputs     digests, record files read and checked, criteria sealed      (no model)
    sets       control and retain sets drafted where none were given; everything tokenised once
    before     the checkpoint on the records, the control set, the retain set      arms O and N
    reference  the reference on the same records                                   arm R
    edit       the editor writes an edited copy                                    (forget only)
    after      the copy on the same sets                                           arms U and N
    compare    criteria, residuals, verdict, claim level
    report     report.json, report.html, report.md

At most one model is in memory. Every stage reads what it needs from the run folder, never from the stage before it
in memory, so an interrupted run resumes to the same bytes.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from probes.errors import IntegrityError, UsageError
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from unlearn import reporting
from unlearn.checkpoints.checkpoint import Checkpoint, LiveCheckpoint, open_checkpoint
from unlearn.editors.base import EditContext, Editor, make_editor
from unlearn.evidence import criteria as judging
from unlearn.evidence import measure
from unlearn.evidence.measure import Loaded, Measured, Record, Settings
from unlearn.records import draft
from unlearn.records.files import as_row, read_records
from unlearn.records.raw import RawRecord
from unlearn.records.tokens import data_digest, images, tokenise
from unlearn.requests.presets import criteria_digest
from unlearn.runs.folder import RunFolder, file_sha256
from unlearn.runs.job import ROLES, Job, environment
from unlearn.runs.pseudonyms import load_key, pseudonym
from unlearn.terminal import Display

RETAIN_DRAFT = 64  # records of a drafted retain set, or as many as there are to forget

METHOD_LIMITS = {
    "causal_lm": "Extraction was tested with one prompt a record, greedy decoding and the model's own distribution; "
    "other prompts, languages and longer contexts were not.",
    "image_classification": "Images were tested as given; changed or related images were not.",
}


@dataclass(slots=True)
class Live:
    """Objects a Python caller hands over instead of paths."""

    model: nn.Module | None = None
    tokenizer: Any = None
    reference: nn.Module | None = None
    records: dict[str, Sequence[Record]] = field(default_factory=dict)


class Pipeline:
    """One run in flight."""

    def __init__(self, run: RunFolder, job: Job, display: Display, live: Live | None = None) -> None:
        self.run, self.job, self.display = run, job, display
        self.live = live or Live()
        self.device = job.options.resolved_device()
        self._key = load_key()
        self._checkpoints: dict[str, Checkpoint] = {}
        self._loaded: tuple[str, Loaded] | None = None
        self._sets: dict[str, list[Record]] | None = None

    # -- the run ---------------------------------------------------------------------------------------------------

    def execute(self) -> str:
        """Run every stage that is not done yet.

        Returns:
            The verdict.
        """
        self._stage("inputs", self._inputs)
        self._stage("sets", self._draft_sets)
        self._stage("before", lambda: self._measure("before", "checkpoint", ROLES))
        if self.job.reference is not None:
            self._stage("reference", lambda: self._measure("reference", "reference", ("records", "retain")))
        if self.job.kind == "forget":
            self._stage("edit", self._edit)
            self._stage("after", lambda: self._measure("after", "edited", ROLES))
        self._release()
        self._stage("compare", self._compare)
        self._stage("report", self._report)
        verdict: str = self.run.read_json("compare/criteria.json")["verdict"]
        return verdict

    def _stage(self, name: str, work: Any) -> None:
        if self.run.done(name):
            self.display.skipped(name)
            return
        self.run.clear_stage(name)
        with self.display.stage(name, self._detail(name)) as update, self.run.stage(name):

            def progress(done: int, total: int) -> None:
                update(done, total)
                self.run.heartbeat()

            self._progress = progress
            work()

    def _detail(self, name: str) -> str:
        try:
            sets = self.run.read_json("inputs/sets.json")
        except OSError:
            return "digests, record files, criteria sealed" if name == "inputs" else ""
        sizes = ", ".join(f"{sets[role]['n']} {role}" for role in ROLES if sets[role]["n"])
        return {
            "before": f"as given: {sizes}",
            "reference": "a checkpoint that never held the records",
            "edit": f"{self.job.method['name']} on a copy" if self.job.method else "",
            "after": f"edited: {sizes}",
            "compare": "criteria, residuals, claim level",
            "report": "report.json, report.html, report.md",
        }.get(name, "")

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
            self._release()
            checkpoint = self.checkpoint(which)
            model = checkpoint.load_model(self.job.options.dtype, self.device)
            loaded = Loaded(
                model, ModelMap.of(model), checkpoint.task, checkpoint.tensor_digest(), checkpoint.tokenizer_digest()
            )
            self._loaded = (which, loaded)
        return self._loaded[1]

    def _release(self) -> None:
        self._loaded = None
        gc.collect()

    def settings(self) -> Settings:
        """The measurement settings of this run."""
        suite, options = self.job.suite, self.job.options
        return Settings(
            device=self.device.split(":")[0],
            dtype=options.dtype,
            seed=options.seed,
            batch_size=options.batch_size,
            **suite["sampling"],
            confirm=suite["confirm"],
            noise_records=suite["noise_floor"]["records"],
        )

    # -- stages ----------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        job, run = self.job, self.run
        checkpoint = self.checkpoint("checkpoint")
        criteria = job.criteria[checkpoint.task]
        judging.check(criteria, checkpoint.task, auditing=job.kind == "audit")
        for role, expected in job.sha256.items():
            if "sha256:" + file_sha256(Path(job.sources[role].location)) != expected:
                raise IntegrityError(
                    f"expected the {role} file with the digest in the request, found another; was it changed?"
                )
        if job.kind == "forget":
            self.editor()  # its parameters are checked before anything is measured
        for role, raw in self._read_sources().items():
            self._tokenise(role, raw)  # here a mistake still names the user's own file and line
            self._keep(role, raw)
        run.event("criteria.sealed", digest=criteria_digest(criteria), policy=job.policy)
        run.write_json(
            "inputs/policy.json", {"policy": job.policy, "criteria": [c.model_dump(mode="json") for c in criteria]}
        )
        if job.request is not None:
            run.write_json("inputs/request.json", job.request)
        for which, name in (("checkpoint", "checkpoint"), ("reference", "reference")):
            if which == "reference" and job.reference is None:
                continue
            opened = self.checkpoint(which)
            digest = opened.tensor_digest()
            if job.expected.get(which, digest) != digest:
                raise IntegrityError(
                    f"expected the {which} with the tensor digest in the request, found another; was it changed?"
                )
            run.write_json(f"inputs/{name}.json", opened.describe() | {"manifest": opened.manifest()})
        if job.reference is not None:
            self._check_reference()
        resolved = {"suite": job.suite, "method": job.method, "settings": self.settings().as_dict()}
        run.write_json("inputs/config.json", resolved)
        run.write_json("inputs/environment.json", environment(self.device))

    def _check_reference(self) -> None:
        mine, other = self.checkpoint("checkpoint"), self.checkpoint("reference")
        if other.task != mine.task:
            raise UsageError(f"expected a reference that is a {mine.task} checkpoint too, found {other.task}")
        if other.tensor_digest() == mine.tensor_digest():
            raise IntegrityError("expected a reference that never held the records, found the checkpoint itself")
        if mine.task == "causal_lm" and other.tokenizer_digest() != mine.tokenizer_digest():
            raise UsageError(
                "expected a reference with the checkpoint's tokenizer, found another; figures would not compare"
            )

    def _read_sources(self) -> dict[str, list[RawRecord]]:
        """Every given set that is not already in memory."""
        found = {}
        for role, source in self.job.sources.items():
            found[role] = read_records(
                source.location.removeprefix("hub:"), role=role, fmt=source.format(), online=self.job.options.online
            )
        return found

    def _keep(self, role: str, raw: list[RawRecord]) -> None:
        """Freeze a record set in the private folder; later stages read it from there."""
        rows = []
        for i, record in enumerate(raw):
            row = as_row(record)
            if isinstance(record.image, bytes):
                row["image"] = str(self.run.write_bytes(f"private/images/{role}-{i:06d}", record.image).resolve())
            rows.append(row)
        self.run.write_jsonl(f"private/{role}.jsonl", rows)

    def _draft_sets(self) -> None:
        checkpoint = self.checkpoint("checkpoint")
        given = [role for role in ROLES if role in self.job.sources or role in self.live.records]
        drafted: dict[str, tuple[str, ...]] = {}
        sets = {role: self._tokenised(role) for role in given}
        from_files = checkpoint.task == "causal_lm" and "records" not in self.live.records  # drafting needs their text
        if "control" not in given and from_files:
            control = draft.draft_control(self._raw("records"), self.job.options.seed)
            drafted["control"] = self._add(sets, "control", control)
        if self.job.kind == "forget" and "retain" not in given and from_files:
            made = draft.draft_retain(
                self.loaded("checkpoint").model,
                checkpoint.load_tokenizer(),
                self._raw("records"),
                n=max(RETAIN_DRAFT, len(sets["records"])),
                seed=self.job.options.seed,
                progress=self._progress,
            )
            drafted["retain"] = self._add(sets, "retain", made)
        if self.job.kind == "forget" and not sets.get("retain") and make_editor(**self._method()).needs_retain:
            raise UsageError("expected a retain set for this method, found none; add `retain` to the request")
        summary: dict[str, Any] = {}
        for role in ROLES:
            records = sets.get(role, [])
            source = "given" if role in given else "drafted" if role in drafted else "none"
            summary[role] = {
                "n": len(records),
                "source": source,
                "limits": list(drafted.get(role, ())),
                "digest": data_digest(records) if records else None,  # type: ignore[arg-type]
                "tokens": sum(record.n_tokens for record in records if isinstance(record, TokenRecord)),
            }
        self.run.write_json("inputs/sets.json", summary)
        names = [{"id": record.record_id, "pseudonym": self.pseudonym(record.record_id)} for record in sets["records"]]
        self.run.write_jsonl("private/subjects.jsonl", names)
        self._sets = {role: list(records) for role, records in sets.items()}

    def _add(self, sets: dict[str, list[Record]], role: str, made: draft.Draft) -> tuple[str, ...]:
        """Keep a drafted set and tokenise it; an empty draft leaves the set out."""
        if made.records:
            self._keep(role, made.records)
            sets[role] = self._tokenised(role)
        return made.limits

    def _method(self) -> dict[str, Any]:
        assert self.job.method is not None
        return self.job.method

    def _raw(self, role: str) -> list[RawRecord]:
        return read_records(self.run.file(f"private/{role}.jsonl"), role=role)

    def _tokenised(self, role: str) -> list[Record]:
        if role in self.live.records:
            return list(self.live.records[role])
        return self._tokenise(role, self._raw(role))

    def _tokenise(self, role: str, raw: list[RawRecord]) -> list[Record]:
        checkpoint = self.checkpoint("checkpoint")
        if checkpoint.task == "image_classification":
            if any(record.form != "image" for record in raw):
                raise UsageError(f"expected image + label in {role} for an image classifier, found text records")
            labels = {str(name): int(i) for name, i in (checkpoint.config.get("label2id") or {}).items()}
            return list(images(raw, checkpoint.image_processor(), labels))
        if any(record.form == "image" for record in raw):
            raise UsageError(f"expected text records in {role} for a language model, found images")
        tokenizer = None if all(record.form == "ids" for record in raw) else checkpoint.load_tokenizer()
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
            self._sets = {role: self._tokenised(role) for role in ROLES if summary[role]["n"]}
        return self._sets

    def pseudonym(self, record_id: str) -> str:
        """How a record is called outside the private folder."""
        return pseudonym(record_id, self._key)

    def _measure(self, folder: str, which: str, roles: Sequence[str]) -> None:
        sets = {role: records for role, records in self.sets().items() if role in roles}
        measured = measure.measure(self.loaded(which), sets, self.settings(), self._progress)
        measured.attacks = self._attacks(measured.task)
        measure.write(self.run, folder, measured, self.pseudonym)

    def _attacks(self, task: str) -> list[dict[str, Any]]:
        """The suite's attacks: what the one pass ran, and what was not run and why."""
        figures = {
            "verbatim.greedy": "extraction.greedy",
            "verbatim.sampled": "extraction.sampled",
            "verbatim.strength": "extraction_strength",
            "recollection.probability": "probability" if task == "causal_lm" else "label_probability",
        }
        rows = []
        for attack in self.job.suite["attacks"]:
            fits = task in attack["tasks"]
            reason = (
                attack["reason"] if not attack["available"] else None if fits else "not defined for this kind of model"
            )
            rows.append(
                {
                    "name": attack["name"],
                    "goal": attack["goal"],
                    "access": attack["access"],
                    "budget": attack["budget"],
                    "status": "not_run" if reason else "run",
                    "reason": reason,
                    "figure": None if reason else figures[attack["name"]],
                }
            )
        return rows

    def editor(self) -> Editor:
        """The request's editor with validated parameters."""
        return make_editor(**self._method())

    def _edit(self) -> None:
        loaded, editor, sets = self.loaded("checkpoint"), self.editor(), self.sets()
        work = self.run.file("private/work")
        work.mkdir(mode=0o700, exist_ok=True)
        out = self.run.file("edit/checkpoint")
        result = editor.edit(
            EditContext(
                source=self.checkpoint("checkpoint"),
                model=loaded.model,
                model_map=loaded.model_map,
                forget=sets["records"],
                retain=sets.get("retain", []),
                seed=self.job.options.seed,
                work=work,
                cache_parts={
                    "tensors": loaded.tensor_digest,
                    "dtype": self.job.options.dtype,
                    "device": self.device.split(":")[0],
                },
                progress=self._progress,
            ),
            out,
        )
        shutil.rmtree(work)
        self.run.claim(out)
        edited = self.checkpoint("edited")
        self.run.write_json("edit/checkpoint.json", edited.describe() | {"manifest": edited.manifest()})
        places = self._places(loaded.model_map)
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
        self.run.event("importances", **{name: note.get("reused") for name, note in result.importances.items()})
        plan = {
            "method": method,
            "warnings": result.warnings,
            "tensors": [delta.name for delta in result.deltas],
            "importances": {
                name: {key: value for key, value in note.items() if key not in ("reused", "seed")}
                for name, note in result.importances.items()
            },
        }
        self.run.write_json("edit/plan.json", plan)
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
        self.run.write_json(
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

    def _places(self, model_map: ModelMap) -> dict[str, tuple[int | None, str | None]]:
        """Block and role of every tensor on disk."""
        names = self.checkpoint("checkpoint").disk_names(model_map.model)
        return {
            disk: (model_map.block_of(name), model_map.role_of(name))
            for name, places in names.items()
            for disk in places
        }

    # -- judging ---------------------------------------------------------------------------------------------------

    def _read(self, folder: str) -> Measured | None:
        """A measurement as it stands in the run folder; ids stay pseudonyms, groups come from the private sets."""
        if not self.run.file(f"{folder}/metrics.json").exists():
            return None
        document = self.run.read_json(f"{folder}/metrics.json")
        tables = {}
        for role in document["sets"]:
            table = self.run.read_table(f"{folder}/{role}.parquet")
            table["group"] = pd.Series([record.group for record in self.sets()[role]], dtype=object)
            tables[role] = table
        return Measured(
            document["task"], document["tensor_digest"], tables, document["engine"], document["noise_floor"]
        )

    def _compare(self) -> None:
        job, run = self.job, self.run
        before, after, reference = self._read("before"), self._read("after"), self._read("reference")
        assert before is not None
        current = after if job.kind == "forget" else before
        assert current is not None
        evidence = judging.Evidence(
            task=before.task,
            current=current,
            before=before if job.kind == "forget" else None,
            reference=reference,
            seed=job.options.seed,
        )
        rows = [judging.evaluate(criterion, evidence) for criterion in job.criteria[before.task]]
        over = judging.over_forgetting(evidence) if job.kind == "forget" else {"flag": False, "statement": ""}
        run.write_json(
            "compare/paired.json",
            {"arms": judging.arms(evidence), "over_forgetting": over, "utility": judging.utility(evidence)},
        )
        run.write_json(
            "compare/criteria.json",
            {
                "criteria": rows,
                "verdict": judging.verdict(rows),
                "claim_level": judging.claim_level(rows, evidence),
                "limits": self._limits(evidence, over),
            },
        )

    def _limits(self, evidence: judging.Evidence, over: dict[str, Any]) -> list[str]:
        """What the evidence does not show, in sentences for the report."""
        sets = self.run.read_json("inputs/sets.json")
        task = evidence.task
        limits = [METHOD_LIMITS[task]]
        if self.job.options.dtype != "float32" or self.device != "cpu":
            limits.append(
                f"Figures hold for {self.job.options.dtype} on {self.device}; other arithmetic can differ near ties."
            )
        limits += [sentence for role in ROLES for sentence in sets[role]["limits"]]
        if not sets["control"]["n"]:
            limits.append("No control set was measured, so no figure could be compared with never-seen records.")
        if self.job.kind == "forget" and not sets["retain"]["n"]:
            limits.append("No retain set was measured, so damage to other behaviour is unknown.")
        if evidence.reference is None:
            limits.append("There is no reference that never held the records, so equivalence (E2) could not be tested.")
        n = sets["records"]["n"]
        if n < 59:
            limits.append(
                f"With {n} records, no hit still leaves a rate of up to {1 - 0.05 ** (1 / n):.0%} possible (95 %)."
            )
        if over["flag"]:
            limits.append("Over-forgetting: " + over["statement"] + ". An attacker can read from it what was removed.")
        measured = evidence.current.engine
        if measured.get("disagreements"):
            limits.append(
                f"generate() contradicted {measured['disagreements']} one-pass verdicts; they count as uncertain."
            )
        if self.job.kind == "forget":
            limits.append(
                "Relearning, quantisation and white-box attacks were not run: the records may be hidden, not gone."
            )
        return limits

    def _report(self) -> None:
        for path in reporting.write(self.run.path):
            self.run.claim(path)


def plan_only(pipeline: Pipeline) -> dict[str, Any]:
    """What a forget run would do, without a pass over any record: tensors, passes, disk."""
    pipeline._stage("inputs", pipeline._inputs)
    checkpoint = pipeline.checkpoint("checkpoint")
    raw = {role: len(pipeline._raw(role)) for role in pipeline.job.sources}
    loaded, editor = pipeline.loaded("checkpoint"), pipeline.editor()
    names = editor.selected(loaded.model_map)
    parameters = dict(loaded.model.named_parameters())
    return {
        "method": editor.name,
        "records": raw,
        "tensors": len(names),
        "parameters": sum(parameters[name].numel() for name in names),
        "of_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "passes": editor.passes(raw["records"], raw.get("retain", max(32, raw["records"]))),
        "disk_bytes": sum(file["size"] for file in checkpoint.manifest()),
        "drafted": [role for role in ("control", "retain") if role not in raw],
    }
