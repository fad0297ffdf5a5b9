"""Three lines of Python for everything the command line does.

    from unlearn import attack, audit, edit, forget, probe
    run = audit("checkpoint", records="records.jsonl")
    run = forget("request.yaml")
    run = probe("kfac", "checkpoint", data="text.jsonl")
    run = attack("exposure.canaries", "checkpoint", canaries="canaries.jsonl")
    run = edit("kfac", "checkpoint", retain="text.jsonl")
    model = load_model(run.checkpoint)

A run is a folder; `Run` is a view of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probes.errors import IntegrityError, UnlearnError, UsageError
from unlearn.attacking.attackrun import AttackRun
from unlearn.disk import disk_errors, write_atomic
from unlearn.editing import EditRun
from unlearn.evidence.criteria import EXIT_CODES
from unlearn.failure import explain
from unlearn.ledger import custody
from unlearn.ledger.batch import Batch, combine
from unlearn.ledger.chain import Entry, Ledger
from unlearn.ledger.history import ROLE, earlier_records, refuse_overlap, text_prompt_tokens
from unlearn.pipeline import Pipeline, plan_only
from unlearn.probing.run import ProbeRun
from unlearn.records.files import as_row, read_records, records_from
from unlearn.records.raw import RawRecord, RecordFormat
from unlearn.requests.attacks import Sampling, attack_settings
from unlearn.requests.presets import Criterion, Policy, load_method, load_policy, load_suite
from unlearn.requests.probes import probe_settings
from unlearn.requests.request import Request, check_digests, load_request, record_sets, redacted
from unlearn.runs.folder import RunFolder, digest, json_bytes, read_header
from unlearn.runs.job import Job, Options, Source
from unlearn.terminal import Display
from unlearn.workspace import Live, Workspace

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


__all__ = ["Options", "RecordFormat", "Run", "attack", "audit", "edit", "forget", "load_model", "probe"]


class Run:
    """A finished (or planned) run.

    Attributes:
        path: the run folder.
        model: the edited module, where a live module was given to `forget`.
    """

    def __init__(self, path: Path, model: nn.Module | None = None) -> None:
        self.path = Path(path)
        self.model = model
        read_header(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, verdict={self.verdict!r})"

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text())
        except OSError:
            return None

    @property
    def verdict(self) -> str | None:
        """`criteria met`, `criteria not met` or `inconclusive`; None for an unfinished run."""
        found = self._read("compare/criteria.json")
        return found["verdict"] if found else None

    @property
    def claim_level(self) -> str | None:
        """`E0` to `E2`, or None for an audit."""
        found = self._read("compare/criteria.json")
        return found["claim_level"] if found else None

    @property
    def exit_code(self) -> int:
        """What the command line returns for this run."""
        judged = read_header(self.path)["kind"] in ("audit", "forget")
        return EXIT_CODES.get(self.verdict or "", 5) if judged else 0

    @property
    def criteria(self) -> list[dict[str, Any]]:
        """Evaluated criteria."""
        found = self._read("compare/criteria.json")
        return found["criteria"] if found else []

    def metrics(self, stage: str = "before") -> dict[str, Any]:
        """`metrics.json` of `before`, `after` or `reference`.

        Raises:
            UsageError: if the stage was not measured.
        """
        found = self._read(f"{stage}/metrics.json")
        if found is None:
            raise UsageError(f"expected a measurement {stage}, found none in this run")
        return cast("dict[str, Any]", found)

    def probe(self, name: str) -> dict[str, Any]:
        """The result of a probe: `kfac`, `spectrum`, `localise` or `condition`.

        Raises:
            UsageError: if it was not run.
        """
        found = self._read(f"probes/{name}.json")
        if found is None:
            raise UsageError("expected a result of this probe, found none in this run")
        return cast("dict[str, Any]", found)

    def attack(self, name: str, stage: str = "before") -> dict[str, Any]:
        """What an attack found: `attacks/NAME.json` of `before`, `after` or `reference`.

        Raises:
            UsageError: if it was not run, or leaves no file of its own.
        """
        found = self._read(f"{stage}/attacks/{name}.json")
        if found is None:
            raise UsageError("expected a result of this attack, found none in this run")
        return cast("dict[str, Any]", found)

    def table(self, stage: str = "before", role: str = "records") -> pd.DataFrame:
        """One row per record in input order, with your own ids where the private folder is at hand.

        Args:
            stage: `before`, `after`, `reference`, or `probes` for the per-record figures of the kfac probe.
            role: the record set.
        """
        import pandas as pd

        path = self.path / stage / f"{role}.parquet"
        if not path.is_file():
            raise UsageError(f"expected a table of {role} {stage}, found none in this run")
        frame = pd.read_parquet(path)
        names = self.path / "private" / "subjects.jsonl"
        if role == "records" and names.is_file():
            frame["record_id"] = [json.loads(line)["id"] for line in names.read_text().splitlines()]
        return frame

    @property
    def records(self) -> pd.DataFrame:
        """The records' table: after the edit in a forget run, as audited otherwise."""
        return self.table("after" if (self.path / "after" / "records.parquet").is_file() else "before")

    @property
    def checkpoint(self) -> Path | None:
        """The edited checkpoint's folder, in a forget run."""
        folder = self.path / "edit" / "checkpoint"
        return folder if folder.is_dir() else None

    def report(self, format: str = "html", audience: str = "engineer") -> Path:
        """Render one document and return its path."""
        from unlearn import reporting

        return reporting.write(self.path, (format,), audience)[-1]


def audit(
    checkpoint: str | Path | nn.Module,
    records: Any,
    *,
    control: Any = None,
    retain: Any = None,
    reference: str | Path | nn.Module | None = None,
    corpus: str | Path | None = None,
    canaries: str | Path | None = None,
    candidates: str | Path | None = None,
    suite: str | Path = "standard",
    budget: float | None = None,
    policy: str | Path = "default",
    criteria: Sequence[Criterion | dict[str, Any]] | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    format: RecordFormat | None = None,
    options: Options | None = None,
    display: Display | None = None,
) -> Run:
    """Does the checkpoint hold these records?

    Args:
        checkpoint: a folder, a `.gguf` file, a hub id (with `Options(online=True)`), or a live module.
        records: a file, a list of mappings, or tokenised records (`probes.records`).
        control: never-seen records like `records`; drafted when absent.
        retain: data whose behaviour matters, measured for information.
        reference: a checkpoint that never held the records.
        corpus: text in which near-duplicates of the records are looked for.
        canaries: planted secrets with the format they were drawn from (`unlearn.records.extras`).
        candidates: for each record, values among which its personal data is asked for.
        suite: `quick`, `standard`, `deep`, or a YAML file.
        budget: forward passes of the checkpoint per record that attacks may take; the suite's by default.
        policy: where the criteria come from when none are given.
        criteria: your own criteria.
        out: the run folder; a new one under `runs/` by default.
        tokenizer: for a live language model.
        format: column names and templates of the record files.
        options: device, dtype, seed, ...
        display: where progress goes; nowhere by default.

    Returns:
        The run.

    Raises:
        UsageError: for anything wrong with the inputs, all mistakes at once.
        IntegrityError: if the run folder would lie inside the checkpoint.
        UnsupportedError: for a model the toolkit cannot audit.
        ResourceError: if memory or disk runs out.
    """
    live, sources, raw = _inputs(
        checkpoint, reference, tokenizer, {"records": records, "control": control, "retain": retain}, format
    )
    if budget is not None and not budget > 0:
        raise UsageError(f"expected a budget above 0 forward passes a record, found {budget:g}")
    chosen = load_policy(policy)
    own = [c if isinstance(c, Criterion) else Criterion(**c) for c in criteria] if criteria else None
    job = Job(
        kind="audit",
        checkpoint=_where(checkpoint),
        sources=sources,
        criteria=_criteria(chosen, "audit", own),
        suite=load_suite(suite).model_dump(mode="json") | ({"budget": budget} if budget is not None else {}),
        options=options or Options(),
        reference=None if reference is None else _where(reference),
        policy="own" if own else chosen.name,
        inputs=_extras(format, corpus=corpus, canaries=canaries, candidates=candidates),
    )
    return _start(job, out, live, raw, display)


def forget(
    request: str | Path | Sequence[str | Path] | None = None,
    *,
    model: nn.Module | None = None,
    records: Any = None,
    control: Any = None,
    retain: Any = None,
    reference: nn.Module | str | Path | None = None,
    method: str = "ssd",
    overrides: dict[str, Any] | None = None,
    criteria: Sequence[Criterion | dict[str, Any]] | None = None,
    suite: str | Path | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    ledger: str | Path | None = None,
    chain: bool = False,
    again: bool = False,
    complete_history: bool = False,
    options: Options | None = None,
    display: Display | None = None,
) -> Run:
    """Edit a copy so that the records are no longer in it, attack it again, compare, decide.

    Either `request` names a YAML file, or `model` is a live module and the rest says what to do with it.

    A run of a request file is entered in the ledger of its run store, and records that were forgotten on the way to
    the checkpoint are asked for again in the same pass (`unlearn.ledger`). A live module has no ledger.

    Args:
        request: a request file (`unlearn init` writes a commented one), or several to carry out by one edit.
        model: a live module instead.
        records: with `model`: records to forget.
        control: with `model`: never-seen records.
        retain: with `model`: data whose behaviour must stay.
        reference: with `model`: a module or checkpoint that never held the records.
        method: with `model`: the editor.
        overrides: with `model`: parameters that differ from the method's preset.
        criteria: with `model`: criteria; the default policy's otherwise.
        suite: overrides the request's suite.
        tokenizer: for a live language model.
        out: the run folder.
        resume: an interrupted run folder to go on with.
        ledger: the run store whose ledger is kept; see `unlearn.ledger.custody.ledger_for` for the default.
        chain: start from the newest checkpoint that earlier requests made of the one the request names.
        again: carry a request out once more. Without it, and without `out`, the run that did is returned.
        complete_history: refuse a run that cannot ask for every record forgotten earlier.
        options: device, dtype, seed, ...
        display: where progress goes.

    Returns:
        The run; `run.checkpoint` is the edited folder, `run.model` the edited module if one was given.

    Raises:
        UsageError: for anything wrong with the inputs, all mistakes at once.
        IntegrityError: if a digest differs, the ledger was altered, or the output would lie inside an input.
        UnsupportedError: for a model or method the toolkit cannot combine.
        ResourceError: if memory or disk runs out, or another process is at the same request.
    """
    requests = _several(request)
    if resume is not None:
        return _resume(Path(resume), requests, display)
    if model is not None:
        live, sources, raw = _inputs(
            model, reference, tokenizer, {"records": records, "control": control, "retain": retain}
        )
        own = [c if isinstance(c, Criterion) else Criterion(**c) for c in criteria] if criteria else None
        chosen = load_policy("default")
        job = Job(
            kind="forget",
            checkpoint="live",
            sources=sources,
            criteria=_criteria(chosen, "forget", own),
            suite=load_suite(suite or "standard").model_dump(mode="json"),
            options=options or Options(),
            reference=None if reference is None else _where(reference),
            method={"name": method, "parameters": load_method(method).parameters | (overrides or {})},
            policy="own" if own else chosen.name,
        )
        return _start(job, out, live, raw, display)
    if not requests:
        raise UsageError("expected a request file, a live model or a run to resume, found none of them")
    batch = request_batch(requests, options or Options(), suite)
    kept = custody.ledger_for(ledger, out, batch.job.checkpoint)
    if kept is None:
        if chain or again or complete_history:
            raise UsageError("expected a ledger for a chain, for --again or for a history, found none kept")
        return _start(batch.job, out, Live(), _batched(batch), display)
    plan = custody.plan(kept, batch, chain=chain, complete=complete_history)
    if plan.carried_out is not None and out is None and not again:
        return _carried_out(kept, plan.carried_out, display)
    return carry_out(plan, batch, out, display, alone=out is None and not again)


def request_batch(requests: Sequence[str | Path], options: Options, suite: str | Path | None = None) -> Batch:
    """One job for one or more request files.

    Raises:
        UsageError: with every mistake of a file, or everything in which the requests differ.
        IntegrityError: if a record file of several requests is not the one its request names.
    """
    loaded = [(Path(path).name, load_request(path)) for path in requests]
    if len(loaded) > 1:
        for _, one in loaded:
            check_digests(one)  # the run itself reads their records from one file of its own
    return combine([(name, request_job(one, options, suite)) for name, one in loaded])


def _several(request: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    if request is None:
        return []
    return [request] if isinstance(request, (str, Path)) else list(request)


def _batched(batch: Batch) -> dict[str, list[RawRecord]]:
    return {"records": batch.raw} if batch.raw else {}


def _carried_out(ledger: Ledger, entry: Entry, display: Display | None) -> Run:
    path = ledger.folder / entry.data["run"]
    if not path.is_dir():
        raise UsageError(
            f"expected the run that carried this request out (entry {entry.n} of the ledger), found its folder gone; "
            "--again carries it out once more"
        )
    if display is not None:
        display.note(f"carried out before: {path}, entry {entry.n} of the ledger; --again carries it out once more")
    return Run(path)


def carry_out(plan: custody.Plan, batch: Batch, out: str | Path | None, display: Display | None, *, alone: bool) -> Run:
    """Run what was planned and keep it in the ledger.

    Args:
        plan: what the ledger says of the requests.
        batch: the requests.
        out: the run folder; a new one in the store by default.
        display: where progress goes.
        alone: refuse where another process is at the same requests.
    """
    raw = _batched(batch)
    again = earlier_records(plan.earlier)
    if again:
        refuse_overlap(again, _beside(plan.job))
        raw[ROLE] = again
        sources = {ROLE: Source("", text_prompt_tokens=text_prompt_tokens(plan.earlier))}
        plan = replace(plan, job=replace(plan.job, sources=plan.job.sources | sources))
    if plan.earlier and display is not None:
        gone = sum(one.records for one in plan.earlier if one.missing)
        note = f"{len(plan.earlier)} earlier requests: {len(again)} records are asked for again"
        display.note(note + (f", {gone} are gone" if gone else ""))
    path = Path(out) if out is not None else _new_folder(plan.ledger.folder, "forget")
    run = _create(plan.job, path, Live(), raw, {"ledger": plan.header(path)})
    return _execute(run, plan.job, Live(), display, plan.seen, alone=alone)


def _beside(job: Job) -> dict[str, list[RawRecord]]:
    """The sets a request gives beside its records."""
    online = job.options.online
    return {
        role: read_records(source.location.removeprefix("hub:"), role=role, fmt=source.format(), online=online)
        for role, source in job.sources.items()
        if role != "records"
    }


def probe(
    name: str,
    checkpoint: str | Path | nn.Module,
    *,
    data: Any = None,
    records: Any = None,
    control: Any = None,
    training: Any = None,
    settings: dict[str, Any] | None = None,
    factors: str | Path | None = None,
    save_factors: str | Path | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    format: RecordFormat | None = None,
    options: Options | None = None,
    display: Display | None = None,
) -> Run:
    """Look inside a checkpoint with one probe; nothing is judged and nothing is edited.

    Args:
        name: `kfac`, `spectrum`, `localise` or `condition`.
        checkpoint: as for `audit`.
        data: what curvature is measured on (`kfac`, `spectrum`), or whose mean stands in for an ablated neuron
            (`localise`).
        records: records to score (`kfac`) or to localise (`localise`).
        control: never-seen records to score beside them (`kfac`).
        training: training records whose influence on the records is wanted (`localise`).
        settings: of the probe, as in a suite (`unlearn.requests.probes`).
        factors: a factor file to use instead of measuring (`kfac`).
        save_factors: where to write the factors (`kfac`).
        out: the run folder; a new one under `runs/` by default.
        tokenizer: for a live language model.
        format: column names and templates of the record files.
        options: device, dtype, seed, ...
        display: where progress goes; nowhere by default.

    Returns:
        The run; `run.probe(name)` is the result.

    Raises:
        UsageError: for anything wrong with the inputs, all mistakes at once.
        IntegrityError: factors of another checkpoint, or an output inside an input.
        UnsupportedError: for a model the probe cannot read.
        ResourceError: if memory or disk runs out.
    """
    chosen = probe_settings(name, settings or {})
    given = {"retain": data, "records": records, "control": control, "training": training}
    live, sources, raw = _inputs(checkpoint, None, tokenizer, given, format, required=())
    job = Job(
        kind="probe",
        checkpoint=_where(checkpoint),
        sources=sources,
        criteria={},
        suite={"probes": [chosen]},
        options=options or Options(),
        factors={key: str(Path(path).resolve()) for key, path in (("read", factors), ("write", save_factors)) if path},
    )
    return _start(job, out, live, raw, display)


def attack(
    name: str,
    checkpoint: str | Path | nn.Module,
    *,
    records: Any = None,
    control: Any = None,
    retain: Any = None,
    related: Any = None,
    reference: str | Path | nn.Module | None = None,
    corpus: str | Path | None = None,
    canaries: str | Path | None = None,
    candidates: str | Path | None = None,
    paraphrases: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    format: RecordFormat | None = None,
    options: Options | None = None,
    display: Display | None = None,
) -> Run:
    """Run one attack on a checkpoint; nothing is judged and nothing is edited.

    Args:
        name: of the attack; `unlearn ls attacks` lists them.
        checkpoint: as for `audit`.
        records: records to look for, for attacks that need them.
        control: never-seen records; drafted when absent and the records come from a file.
        retain: data whose behaviour should stay, for attacks that train on it or watch it.
        related: text about the same things that is none of the records, for attacks that train on it.
        reference: a checkpoint that never held the records.
        corpus: text in which near-duplicates of the records are looked for.
        canaries: planted secrets with the format they were drawn from (`unlearn.records.extras`).
        candidates: for each record, values among which its personal data is asked for.
        paraphrases: for each record, other prompts that ask for the same (`unlearn.records.extras`).
        settings: of the attack, as in a suite (`unlearn.requests.attacks`).
        out: the run folder; a new one under `runs/` by default.
        tokenizer: for a live language model.
        format: column names and templates of the record files.
        options: device, dtype, seed, ...
        display: where progress goes; nowhere by default.

    Returns:
        The run; `run.attack(name)` is what was found.

    Raises:
        UsageError: for anything wrong with the inputs, all mistakes at once.
        IntegrityError: if the run folder would lie inside the checkpoint.
        UnsupportedError: for a model the attack cannot work on.
        ResourceError: if memory or disk runs out.
    """
    chosen = attack_settings(name, settings or {})
    given = {"records": records, "control": control, "retain": retain, "related": related}
    live, sources, raw = _inputs(checkpoint, reference, tokenizer, given, format, required=())
    job = Job(
        kind="attack",
        checkpoint=_where(checkpoint),
        sources=sources,
        criteria={},
        suite={
            "sampling": Sampling().model_dump(),
            "confirm": name == "verbatim.greedy",
            "noise_floor": {"records": 16},
            "budget": None,
            "attacks": [chosen],
            "probes": [],
        },
        options=options or Options(),
        reference=None if reference is None else _where(reference),
        inputs=_extras(format, corpus=corpus, canaries=canaries, candidates=candidates, paraphrases=paraphrases),
    )
    return _start(job, out, live, raw, display)


def edit(
    method: str,
    checkpoint: str | Path | nn.Module,
    *,
    retain: Any = None,
    records: Any = None,
    overrides: dict[str, Any] | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    format: RecordFormat | None = None,
    options: Options | None = None,
    display: Display | None = None,
) -> Run:
    """Write an edited copy with one editor, and measure nothing: `forget` is what audits an edit.

    Args:
        method: a method preset's name or file; `unlearn ls editors` lists them.
        checkpoint: as for `audit`.
        retain: data whose behaviour must stay, for editors that measure it.
        records: records to forget, for editors that need them.
        overrides: parameters that differ from the preset.
        out: the run folder; a new one under `runs/` by default.
        tokenizer: for a live language model.
        format: column names and templates of the record files.
        options: device, dtype, seed, ...
        display: where progress goes; nowhere by default.

    Returns:
        The run; `run.checkpoint` is the edited folder, and `edit/plan.json` says that it was not audited.

    Raises:
        UsageError: for anything wrong with the inputs, all mistakes at once.
        IntegrityError: if the output would lie inside an input.
        UnsupportedError: for a model the editor cannot edit.
        ResourceError: if memory or disk runs out.
    """
    preset = load_method(method)
    live, sources, raw = _inputs(checkpoint, None, tokenizer, {"retain": retain, "records": records}, format, ())
    job = Job(
        kind="edit",
        checkpoint=_where(checkpoint),
        sources=sources,
        criteria={},
        suite={"probes": []},
        options=options or Options(),
        method={"name": preset.name, "parameters": preset.parameters | (overrides or {})},
    )
    return _start(job, out, live, raw, display)


def load_model(
    checkpoint: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    online: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load any checkpoint as the audit does: evaluation mode, types spelled out, every weight from the files.

    A folder that an inference-time method wrote gives the model that answers as the method does, by the code of this
    package: `trust_remote_code` is not needed for it, and the Python file in the folder is not run.

    Args:
        checkpoint: a folder, a `.gguf` file, or with `online` a hub id.
        dtype: float32, bfloat16, float16 or float64.
        device: "cpu", "cuda", "cuda:1", ...
        online: whether a hub id may be downloaded.
        allow_pickle: read tensors from pickled weights where there are no safetensors.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        UsageError: for no checkpoint, a damaged or incomplete one, or an unknown dtype.
        UnsupportedError: for a model that cannot be measured.
        ResourceError: if it does not fit in memory, or there is no such device.
    """
    from unlearn.checkpoints.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint, online=online, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return opened.load_model(dtype, device)


def request_job(request: Request, options: Options, suite: str | Path | None = None) -> Job:
    """The job that a request file describes."""
    sources, sha256 = {}, {}
    for role, part, location in record_sets(request):
        sources[role] = Source.of(location, part.format(), getattr(part, "text_prompt_tokens", 1))
        if part.sha256 is not None:
            sha256[role] = part.sha256
    inputs, duplicates = {}, {}
    if request.corpus is not None:
        corpus = request.corpus
        inputs["corpus"] = asdict(Source.of(corpus.path, corpus.format()))
        include = corpus.near_duplicates == "include"
        duplicates = {"include": include, "threshold": corpus.threshold, "span": corpus.span}
        if corpus.sha256 is not None:
            sha256["corpus"] = corpus.sha256
    if request.paraphrases is not None:
        inputs["paraphrases"] = asdict(Source.of(request.paraphrases, RecordFormat()))
    expected = {
        which: part.tensor_digest
        for which, part in (("checkpoint", request.checkpoint), ("reference", request.reference))
        if part is not None and part.tensor_digest is not None
    }
    chosen = load_policy(request.policy or "default")
    own = list(request.criteria) or None
    return Job(
        kind="forget",
        checkpoint=request.checkpoint.path,
        sources=sources,
        criteria=_criteria(chosen, "forget", own),
        suite=load_suite(suite or request.suite).model_dump(mode="json"),
        options=options,
        reference=request.reference.path if request.reference else None,
        reference_kind=request.reference.kind if request.reference else None,
        method={"name": request.method.name, "parameters": request.method.parameters()},
        request=redacted(request),
        policy="request" if own else chosen.name,
        expected=expected,
        sha256=sha256,
        inputs=inputs,
        duplicates=duplicates,
    )


def plan(
    request: str | Path | Sequence[str | Path],
    out: str | Path | None,
    options: Options,
    display: Display,
    *,
    ledger: str | Path | None = None,
    chain: bool = False,
    complete_history: bool = False,
) -> dict[str, Any]:
    """`unlearn forget --plan-only`: what the run would do; nothing is edited, and nothing is entered in a ledger.

    The ledger is read: of a chain its newest checkpoint is planned on, and what was forgotten on the way to the
    checkpoint counts among the records.
    """
    batch = request_batch(_several(request), options)
    job, n_earlier, n_gone, carried_out = batch.job, 0, 0, None
    kept = custody.ledger_for(ledger, out, job.checkpoint, entered=False)
    if kept is not None:
        found = custody.plan(kept, batch, chain=chain, complete=complete_history)
        job = found.job
        n_earlier = sum(one.records for one in found.earlier if not one.missing)
        n_gone = sum(one.records for one in found.earlier if one.missing)
        carried_out = found.carried_out.n if found.carried_out is not None else None
    elif chain or complete_history:
        raise UsageError("expected a ledger for a chain or for a history, found none kept")
    run = _create(job, out, Live(), _batched(batch))
    try:
        planned = plan_only(Pipeline(run, job, display), n_earlier)
    except BaseException:
        run.finish("failed", None)
        raise
    run.finish("done", 0)
    return planned | {"earlier_gone": n_gone, "carried_out": carried_out}


def _extras(format: RecordFormat | None, **files: Any) -> dict[str, dict[str, Any]]:
    """Files that some attacks need, checked to exist; what is in them is checked when the run begins."""
    found = {}
    for name, given in files.items():
        if given is None:
            continue
        path = Path(given).resolve()
        if not path.is_file():
            raise UsageError(f"expected a file of {name}, found none; give a JSONL file")
        plain = RecordFormat() if name != "corpus" else format or RecordFormat()
        found[name] = asdict(Source.of(str(path), plain))
    return found


def _where(checkpoint: Any) -> str:
    return str(checkpoint) if isinstance(checkpoint, (str, Path)) else "live"


def _criteria(policy: Policy, kind: Any, own: list[Criterion] | None) -> dict[str, tuple[Criterion, ...]]:
    """Criteria by task: which task the checkpoint has is known only once it is opened."""
    tasks: tuple[Any, ...] = ("causal_lm", "image_classification")
    return {task: tuple(own) if own else policy.criteria(kind, task) for task in tasks}


def _inputs(
    checkpoint: Any,
    reference: Any,
    tokenizer: Any,
    given: dict[str, Any],
    format: RecordFormat | None = None,
    required: Sequence[str] = ("records",),
) -> tuple[Live, dict[str, Source], dict[str, list[RawRecord]]]:
    """Sort what a Python caller passed into paths, records in memory, and tokenised records."""
    from probes.records import ImageRecord, TokenRecord

    live = Live(
        model=None if isinstance(checkpoint, (str, Path)) else checkpoint,
        reference=None if reference is None or isinstance(reference, (str, Path)) else reference,
        tokenizer=tokenizer,
    )
    sources: dict[str, Source] = {}
    raw: dict[str, list[RawRecord]] = {}
    for role, value in given.items():
        if value is None:
            continue
        if isinstance(value, (str, Path)):
            sources[role] = Source.of(str(value), format or RecordFormat())
            continue
        items = list(value)
        if items and all(isinstance(item, (TokenRecord, ImageRecord)) for item in items):
            live.records[role] = items
        elif items and all(isinstance(item, RawRecord) for item in items):
            raw[role] = items
        else:
            raw[role] = records_from(items, role=role, fmt=format)
    if not {*required} <= {*sources, *raw, *live.records}:
        raise UsageError("expected records to look for, found none; pass records=")
    return live, sources, raw


def default_out(kind: str) -> Path:
    """A new folder under `runs/`, named by time."""
    return next(path for path in _names(Path("runs"), kind) if not path.exists())


def _names(store: Path, kind: str) -> Iterator[Path]:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return (store / (f"{stamp}-{kind}" + (f"-{i}" if i else "")) for i in range(1000))


def _new_folder(store: Path, kind: str) -> Path:
    """A new folder in a store, made here, so that two processes that start at once get two."""
    with disk_errors():
        store.mkdir(parents=True, exist_ok=True)
        for path in _names(store, kind):
            with suppress(FileExistsError):
                path.mkdir()
                return path
    raise UsageError("expected room for another run folder of this second, found 1000 of them; try again")


def _create(
    job: Job,
    out: str | Path | None,
    live: Live,
    raw: dict[str, list[RawRecord]],
    further: dict[str, Any] | None = None,
) -> RunFolder:
    import sys

    from unlearn.checkpoints.loading import known_device
    from unlearn.runs.job import environment

    device = job.options.resolved_device()
    known_device(device)  # before anything is written
    header = {
        "kind": job.kind,
        "seed": job.options.seed,
        "device": device,
        "dtype": job.options.dtype,
        "versions": {"unlearn-audit": environment(device)["unlearn-audit"]} | environment(device)["libraries"],
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:2]],  # the command, not its arguments: paths can name people
    }
    path = Path(out) if out is not None else _new_folder(Path("runs"), job.kind)
    inputs = [Path(ref) for ref in (job.checkpoint, job.reference) if ref and ref != "live" and Path(ref).exists()]
    try:
        run = RunFolder.create(path, header | (further or {}), inputs)
    except UnlearnError:
        with suppress(OSError):
            path.rmdir()  # an empty folder that was made for this run
        raise
    with disk_errors():
        for role, records in raw.items():
            rows = b"".join(json.dumps(as_row(record), ensure_ascii=False).encode() + b"\n" for record in records)
            source = path / "private" / f"given-{role}.jsonl"
            write_atomic(source, rows)
            stated = job.sources.get(role)
            tokens = stated.text_prompt_tokens if stated is not None else 1
            job.sources[role] = Source(str(source.resolve()), text_prompt_tokens=tokens)
        write_atomic(path / "private" / "job.json", json_bytes(job.dump()))
    return run


def _start(
    job: Job, out: str | Path | None, live: Live, raw: dict[str, list[RawRecord]], display: Display | None
) -> Run:
    run = _create(job, out, live, raw)
    return _execute(run, job, live, display)


def _resume(path: Path, requests: Sequence[str | Path], display: Display | None) -> Run:
    header = read_header(path)
    if header["status"] == "done":
        raise UsageError("expected an interrupted run to resume, found a finished one; start a new run")
    job = Job.load(path / "private" / "job.json")
    if job.checkpoint == "live":
        raise UsageError("expected a run on a checkpoint folder, found one on a module in memory; start a new run")
    if requests:
        batch = request_batch(requests, job.options)
        if "ledger" in header:
            same = [key.as_dict() for key in batch.keys] == header["ledger"]["requests"]
        else:
            same = batch.raw == [] and digest(batch.job.dump()) == digest(job.dump())
        if not same:
            raise IntegrityError("expected the request that the run was started with, found another; start a new run")
    return _execute(RunFolder.resume(path), job, Live(), display)


def _execute(
    run: RunFolder, job: Job, live: Live, display: Display | None, seen: int | None = None, *, alone: bool = False
) -> Run:
    kinds: dict[str, type[Workspace]] = {"probe": ProbeRun, "edit": EditRun, "attack": AttackRun}
    kept: custody.Custody | None = None
    try:
        kept = custody.Custody.of(run)
        if kept is not None:
            kept.opened(seen, alone=alone)
        workspace: Any = kinds.get(job.kind, Pipeline)(run, job, display or Display(), live)
        verdict = workspace.execute()
        if kept is not None:
            kept.finished()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        discarded = not stopped and run.last_event("stage.done") is None
        with suppress(UnlearnError, OSError):  # the disk may be what failed; the first error is the one to report
            if kept is not None and not stopped:
                kept.failed(error, explain(error)[0], discarded=discarded)
        with suppress(UnlearnError, OSError):
            run.finish("interrupted" if stopped else "failed", 130 if stopped else None)
        if discarded:
            run.discard()  # nothing was measured: a mistyped path should not use up the name of the output folder
        raise
    run.finish("done", EXIT_CODES[verdict] if verdict else 0)
    edited = None
    if live.model is not None and job.method is not None:
        edited = cast("Any", workspace.checkpoint("edited")).model
    return Run(run.path, edited)
