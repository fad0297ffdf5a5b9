"""The pipeline behind `audit` and `forget`: stages that each leave files in the run folder and can be resumed.

    inputs     digests, record files read and checked, criteria sealed      (no model)
    sets       control and retain sets drafted where none were given; everything tokenised once
    reference  the reference on the same sets, and attacked                        arm R
    before     the checkpoint on records, control and retain set, and attacked     arms O and N
    probes     the suite's probes look inside the checkpoint                       (where the suite has some)
    edit       the editor writes an edited copy                                    (forget only)
    after      the copy on the same sets, and attacked                             arms U and N
    compare    criteria, residuals, verdict, claim level
    report     report.json, report.html, report.md

At most one model is in memory. Every stage reads what it needs from the run folder, never from the stage before it
in memory, so an interrupted run resumes to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from probes.errors import IntegrityError, UsageError
from probes.likelihood import SamplingScheme
from probes.records import Record
from unlearn import reporting
from unlearn.attacking.run import attack_arms, estimate, run_attacks
from unlearn.editing import at_inference_time, editor_of, expect_weights, named_method, note_given, write_copy
from unlearn.editors.base import planned_passes
from unlearn.evidence import criteria as judging
from unlearn.evidence import measure
from unlearn.evidence.measure import Measured, Settings
from unlearn.ledger import stages
from unlearn.probing.run import run_probes
from unlearn.records import draft
from unlearn.requests.presets import criteria_digest
from unlearn.requests.probes import catalogue as probe_catalogue
from unlearn.runs.job import ROLES
from unlearn.workspace import Workspace

RETAIN_DRAFT = 64  # records of a drafted retain set, or as many as there are to forget

METHOD_LIMITS = {
    "causal_lm": "Extraction was tested with the record's own words as prompt; rewritten prompts, other languages and "
    "longer contexts were not.",
    "image_classification": "Images were tested as given; changed or related images were not.",
}
REWRITTEN_LIMITS = {
    "causal_lm": "Extraction was tested with the record's own words as prompt, and with prompts changed by rule; "
    "paraphrases and other languages were tested as far as they were supplied.",
    "image_classification": "Images were tested as given and moved within a small radius; related images were not.",
}
INFERENCE_TIME = (
    "The edit acts at inference time: the copy's files hold the original's weights, and whoever has the files can use "
    "them without the edit; the figures hold for the copy as its own program runs it."
)
INFERENCE_TIME_AUDIT = (
    "The checkpoint answers through a program of its own while its files hold the weights of another model; whoever has"
    " the files can use that model, and nothing here says what it holds."
)
REWRITING = {"causal_lm": "regurgitation.", "image_classification": "elicitation.images"}


class Pipeline(Workspace):
    """One audit or forget run in flight."""

    # -- the run ---------------------------------------------------------------------------------------------------

    def execute(self) -> str:
        """Run every stage that is not done yet.

        Returns:
            The verdict.
        """
        self.stage("inputs", self._inputs)
        self.stage("sets", self._draft_sets)
        self.estimate()
        if self.job.reference is not None:  # first: attacks on the checkpoint compare with it
            self.stage("reference", lambda: self._measure("reference", "reference", ROLES))
        self.stage("before", lambda: self._measure("before", "checkpoint", stages.roles(self.job)))
        if self.job.suite["probes"]:
            self.stage("probes", self._probes)
        if self.job.kind == "forget":
            self.stage("edit", lambda: write_copy(self))
            self.stage("after", lambda: self._measure("after", "edited", stages.roles(self.job)))
        self.release()
        self.stage("compare", self._compare)
        self.stage("report", self._report)
        verdict: str = self.run.read_json("compare/criteria.json")["verdict"]
        return verdict

    def detail(self, name: str) -> str:
        try:
            sets = self.run.read_json("inputs/sets.json")
        except OSError:
            return "digests, record files, criteria sealed" if name == "inputs" else ""
        sizes = ", ".join(f"{sets[role]['n']} {role}" for role in ROLES if sets[role]["n"])
        return {
            "before": f"as given: {sizes}",
            "probes": ", ".join(settings["name"] for settings in self.job.suite["probes"]),
            "reference": "a checkpoint that never held the records",
            "edit": f"{self.job.method['name']} on a copy" if self.job.method else "",
            "after": f"edited: {sizes}",
            "compare": "criteria, residuals, claim level",
            "report": "report.json, report.html, report.md",
        }.get(name, "")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        job, run = self.job, self.run
        checkpoint = self.checkpoint("checkpoint")
        criteria = job.criteria[checkpoint.task]
        judging.check(criteria, checkpoint.task, auditing=job.kind == "audit")
        if job.kind == "forget":
            expect_weights(checkpoint)
            editor_of(job)  # its parameters are checked before anything is measured
        self.freeze()
        stages.freeze(run, adapters=bool(job.method and job.method["parameters"].get("earlier_edit_weight")))
        run.event("criteria.sealed", digest=criteria_digest(criteria), policy=job.policy)
        run.write_json(
            "inputs/policy.json", {"policy": job.policy, "criteria": [c.model_dump(mode="json") for c in criteria]}
        )
        if job.request is not None:
            run.write_json("inputs/request.json", job.request)
        self.identify("checkpoint")
        if job.reference is not None:
            self.identify("reference")
            self._check_reference()
        if job.kind == "forget":
            note_given(self)
        self.describe_run(suite=job.suite, method=named_method(job.method), settings=self.settings().as_dict())

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

    def _draft_sets(self) -> None:
        checkpoint = self.checkpoint("checkpoint")
        drafted: dict[str, tuple[str, ...]] = {}
        sets = self.given()
        from_files = checkpoint.task == "causal_lm" and "records" in self.job.sources  # drafting needs their text
        if "control" not in sets and from_files:
            control = draft.draft_control(self.raw("records"), self.job.options.seed)
            drafted["control"] = self._add(sets, "control", control)
        needed = self.job.kind == "forget" or any(
            "retain" in probe_catalogue()[p["name"]].needs for p in self.job.suite["probes"]
        )
        if needed and "retain" not in sets and from_files:
            made = draft.draft_retain(
                self.loaded("checkpoint").model,
                checkpoint.load_tokenizer(),
                self.raw("records"),
                n=max(RETAIN_DRAFT, len(sets["records"])),
                seed=self.job.options.seed,
                progress=self.progress,
            )
            drafted["retain"] = self._add(sets, "retain", made)
        if self.job.kind == "forget" and not sets.get("retain") and editor_of(self.job).needs_retain:
            raise UsageError("expected a retain set for this method, found none; add `retain` to the request")
        self.summarise(sets, drafted)

    def _add(self, sets: dict[str, list[Record]], role: str, made: draft.Draft) -> tuple[str, ...]:
        """Keep a drafted set and tokenise it; an empty draft leaves the set out."""
        if made.records:
            self.keep(role, made.records)
            sets[role] = self.tokenised(role)
        return made.limits

    def estimate(self) -> None:
        """Say what the attacks will cost before a model runs."""
        self.display.note(estimate(self, self.settings()))

    def _measure(self, folder: str, which: str, roles: Sequence[str]) -> None:
        sets = {role: records for role, records in self.sets().items() if role in roles}
        measured = measure.measure(self.loaded(which), sets, self.settings(), self.progress)
        measured.attacks = run_attacks(self, folder, which, measured, self.settings())
        measure.write(self.run, folder, measured, self.pseudonym)

    def _probes(self) -> None:
        self.run.write_json("probes/not_run.json", run_probes(self))

    def settings(self) -> Settings:
        """The measurement settings of this run."""
        suite, options = self.job.suite, self.job.options
        entries = {entry["name"]: entry for entry in suite["attacks"]}
        schemes = entries.get("verbatim.sampled", {}).get("schemes", ())
        return Settings(
            device=self.device.split(":")[0],
            dtype=options.dtype,
            seed=options.seed,
            batch_size=options.batch_size,
            **suite["sampling"],
            schemes=tuple(SamplingScheme(**scheme) for scheme in schemes),
            confirm=suite["confirm"],
            noise_records=suite["noise_floor"]["records"],
        )

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
        groups = {role: [record.group for record in self.sets().get(role, [])] for role in ("records", "control")}
        attacks, stress = attack_arms(self, groups, job.kind == "forget")
        evidence = judging.Evidence(
            task=before.task,
            current=current,
            before=before if job.kind == "forget" else None,
            reference=reference,
            seed=job.options.seed,
            attacks=attacks,
            stress=stress,
            inference_time=at_inference_time(self, "edited" if job.kind == "forget" else "checkpoint"),
        )
        rows = [judging.evaluate(criterion, evidence) for criterion in job.criteria[before.task]]
        asked = stages.ask_again(run, job.criteria[before.task], evidence, rows)
        over = judging.over_forgetting(evidence) if job.kind == "forget" else {"flag": False, "statement": ""}
        run.write_json(
            "compare/paired.json",
            {
                "arms": judging.arms(evidence),
                "attacks": attacks,
                "stress": stress,
                "over_forgetting": over,
                "utility": judging.utility(evidence),
            },
        )
        run.write_json(
            "compare/criteria.json",
            {
                "criteria": rows,
                "earlier": asked.document,
                "verdict": judging.verdict([*rows, *asked.rows]),
                "claim_level": judging.claim_level(rows, evidence),
                "limits": [*self._limits(evidence, over), *asked.limits],
            },
        )

    def _limits(self, evidence: judging.Evidence, over: dict[str, Any]) -> list[str]:
        """What the evidence does not show, in sentences for the report."""
        sets = self.run.read_json("inputs/sets.json")
        task = evidence.task
        rewritten = any(name.startswith(REWRITING[task]) for name in evidence.attacks)
        limits = [(REWRITTEN_LIMITS if rewritten else METHOD_LIMITS)[task]]
        if evidence.inference_time:
            limits.insert(0, (INFERENCE_TIME if self.job.kind == "forget" else INFERENCE_TIME_AUDIT))
        if self.job.options.dtype != "float32" or self.device != "cpu":
            limits.append(
                f"Figures hold for {self.job.options.dtype} on {self.device}; other arithmetic can differ near ties."
            )
        limits += [sentence for role in ROLES for sentence in sets[role]["limits"]]
        if self.job.suite["probes"]:
            limits += self.run.read_json("probes/not_run.json")
        if self.job.duplicates:
            found = self.run.read_json("inputs/duplicates.json")
            if left := found["uncovered"] - found["included"]:
                limits.append(
                    f"The corpus holds {left} near-duplicates of {len(found['records'])} records that the request does "
                    "not cover; a model can keep giving the records back through them."
                )
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
        if evidence.stress is not None:
            limits += _durability(evidence.stress)
        return limits

    def _report(self) -> None:
        for path in reporting.write(self.run.path):
            self.run.claim(path)


def _durability(stress: dict[str, Any]) -> list[str]:
    """What the attacks on the edit's durability do not show, or show against it."""
    if stress["finding"] == "not tested":
        return ["No attack on the edit's durability could be read: the records may be hidden, not gone."]
    sentences = []
    if stress["recovering"]:
        sentences.append(
            f"Records came back under attack ({', '.join(stress['recovering'])}): they are hidden, not gone."
        )
    if stress["re_teaching"]:
        sentences.append(
            f"Attacks that taught never-seen records as well ({', '.join(stress['re_teaching'])}) say nothing about "
            "this edit."
        )
    if stress["attacks"] and not stress["recovering"]:
        sentences.append("An attack that brings nothing back shows only that this attack, with this budget, did not.")
    return sentences


def plan_only(pipeline: Pipeline, n_earlier: int = 0) -> dict[str, Any]:
    """What a forget run would do, without a pass over any record: tensors, passes, disk.

    Args:
        pipeline: of a run that goes no further.
        n_earlier: how many records were forgotten earlier on the way to the checkpoint and would be run again.
    """
    pipeline.stage("inputs", pipeline._inputs)
    checkpoint = pipeline.checkpoint("checkpoint")
    raw = {role: len(pipeline.raw(role)) for role in pipeline.job.sources}
    loaded, editor = pipeline.loaded("checkpoint"), editor_of(pipeline.job)
    names = editor.selected(loaded.model_map)
    parameters = dict(loaded.model.named_parameters())
    return {
        "method": editor.name,
        "records": raw | ({"earlier": n_earlier} if n_earlier else {}),
        "tensors": len(names),
        "parameters": sum(parameters[name].numel() for name in names),
        "of_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "passes": planned_passes(editor, raw["records"], raw.get("retain", max(32, raw["records"])), n_earlier),
        "disk_bytes": sum(file["size"] for file in checkpoint.manifest()),
        "drafted": [role for role in ("control", "retain") if role not in raw],
        "inference_time": editor.inference_time,
    }
