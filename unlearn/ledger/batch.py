"""Several requests carried out by one edit: one job over all their records, and a verdict for each request.

Everything but the records has to be the same: checkpoint, method, criteria, suite, control, retain and related data,
reference, corpus, paraphrases. Records keep their ids where all are different; otherwise an id becomes `2/ID`, the
number of its request and the id it had. Groups always do, so that a cluster never spans requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from probes.errors import UsageError
from unlearn.evidence import criteria as judging
from unlearn.evidence.criteria import Evidence
from unlearn.evidence.measure import Measured
from unlearn.ledger.history import prefixed
from unlearn.ledger.identity import Key, key_of, records_of
from unlearn.records.raw import RawRecord
from unlearn.requests.presets import RESIDUAL, Criterion
from unlearn.runs.folder import canonical
from unlearn.runs.job import Job, Source
from unlearn.runs.pseudonyms import load_key

# What two requests of a batch must share, as a request file calls it, and where it lies in a job.
COMPARED = ("checkpoint", "reference", "method", "criteria", "suite", "control", "retain", "related", "corpus")


@dataclass(frozen=True, slots=True)
class Batch:
    """One job and the requests behind it.

    Attributes:
        job: what is run; of several requests, its records are `raw`, and their source has no location yet.
        keys: the requests, in order.
        raw: the records of several requests together; empty for a single one, whose file the run reads itself.
    """

    job: Job
    keys: tuple[Key, ...]
    raw: list[RawRecord] = field(default_factory=list)


def combine(jobs: Sequence[tuple[str, Job]]) -> Batch:
    """Make one job of the jobs of one or more requests.

    Args:
        jobs: name of the request file (for messages) and its job.

    Returns:
        The batch; of a single request, its job as it is.

    Raises:
        UsageError: listing everything in which the requests differ, or that cannot be put together.
    """
    key = load_key()
    sets = [records_of(job) for _, job in jobs]
    keys = tuple(key_of(job, raw, key) for (_, job), raw in zip(jobs, sets, strict=True))
    if len(jobs) == 1:
        return Batch(jobs[0][1], keys)
    (first_name, first), mistakes = jobs[0], []
    for name, job in jobs[1:]:
        differing = [what for what in COMPARED if _part(first, what) != _part(job, what) or _pinned(first, job, what)]
        differing += _further(first, job)
        if differing:
            mistakes.append(f"{first_name} and {name} differ in {', '.join(differing)}")
    if len({key.same for key in keys}) < len(keys):
        mistakes.append("one request is given twice")
    distinct = len({record.id for raw in sets for record in raw}) == sum(map(len, sets))
    if "paraphrases" in first.inputs and not distinct:
        mistakes.append("paraphrases go by record id, and two requests use the same ids")
    if mistakes:
        raise UsageError(f"expected requests that one edit can carry out: {'; '.join(mistakes)}; run them one by one")
    raw = []
    for number, records in enumerate(sets, start=1):
        named = prefixed(records, str(number))
        ids = (record.id for record in (records if distinct else named))
        raw += [replace(record, id=name) for record, name in zip(named, ids, strict=True)]
    job = replace(
        first,
        sources=first.sources | {"records": Source("", text_prompt_tokens=first.sources["records"].text_prompt_tokens)},
        sha256={k: v for _, one in jobs for k, v in one.sha256.items() if k != "records"},
        expected={k: v for _, one in jobs for k, v in one.expected.items()},
        request=_together([job.request or {} for _, job in jobs]),
    )
    return Batch(job, keys, raw)


def _part(job: Job, what: str) -> str:
    dumped = job.dump()
    if what in ("control", "retain", "related"):
        return canonical([dumped["sources"].get(what), job.sha256.get(what)])
    if what == "corpus":
        return canonical([job.inputs.get("corpus"), job.sha256.get("corpus"), job.duplicates])
    if what in ("checkpoint", "reference"):
        return canonical([dumped[what], job.reference_kind if what == "reference" else None])
    return canonical(dumped[what])


def _pinned(a: Job, b: Job, what: str) -> bool:
    """Whether two requests state different tensor digests of a checkpoint."""
    return what in a.expected and what in b.expected and a.expected[what] != b.expected[what]


def _further(a: Job, b: Job) -> list[str]:
    differing = []
    if a.inputs.get("paraphrases") != b.inputs.get("paraphrases"):
        differing.append("paraphrases")
    if a.sources["records"].text_prompt_tokens != b.sources["records"].text_prompt_tokens:
        differing.append("data.text_prompt_tokens")
    return differing


def _together(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """What the requests say alike, for the report; who asked when is each one's own and stays in the ledger."""
    first, *others = requests
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


# -- a verdict for each request ---------------------------------------------------------------------------------------


def judge_requests(
    criteria: Sequence[Criterion],
    evidence: Evidence,
    sizes: Sequence[int],
    rows: Sequence[dict[str, Any]],
    earlier: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Judge each request of a batch on its own records.

    A criterion on the records is evaluated on the request's rows alone, against the same control set. What concerns
    the batch as a whole (the retain set, residuals under attack) keeps its status of the whole.

    Args:
        criteria: the sealed criteria.
        evidence: of the run; its `records` tables hold the requests' records in order, then near-duplicates that were
            included, which count for no single request.
        sizes: records of each request.
        rows: the evaluated criteria of the whole batch, in the order of `criteria`.
        earlier: what came of earlier requests; an edit that brings one back serves none of the new ones.

    Returns:
        For each request: `verdict`, and `criteria` as rows of `compare/criteria.json`.

    Raises:
        UsageError: if there are fewer rows than records.
    """
    if sum(sizes) > len(evidence.current.tables["records"]):
        raise UsageError("expected a row for every record of the batch, found fewer; start a new run")
    out, first = [], 0
    for size in sizes:
        mine = _rows_of(evidence, first, size)
        first += size
        judged = [
            whole if criterion.set != "records" or criterion.metric == RESIDUAL else judging.evaluate(criterion, mine)
            for criterion, whole in zip(criteria, rows, strict=True)
        ]
        out.append({"verdict": judging.verdict([*judged, *earlier]), "criteria": judged})
    return out


def _rows_of(evidence: Evidence, first: int, size: int) -> Evidence:
    def cut(measured: Measured | None) -> Measured | None:
        if measured is None or "records" not in measured.tables:
            return measured
        table = measured.tables["records"].iloc[first : first + size].reset_index(drop=True)
        return replace(measured, tables=measured.tables | {"records": table})

    current = cut(evidence.current)
    assert current is not None
    return replace(evidence, current=current, before=cut(evidence.before), reference=cut(evidence.reference))
