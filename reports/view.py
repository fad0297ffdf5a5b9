"""From report.json to the page an audience sees; report.json is the only source.

A section with nothing in it keeps its heading and says `not run: <reason>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reports import history
from reports.arms import edited
from reports.blocks import TONES, Block, Cell, Page, Prose, Section
from reports.inference_time import banner
from reports.sections.appendix import attack_glossary, crosswalk, data, glossary, probe_glossary
from reports.sections.attacks import attacks
from reports.sections.earlier import earlier_requests
from reports.sections.edit import edit_section
from reports.sections.forgotten import forgotten_or_hidden
from reports.sections.identity import checkpoints_table, identity
from reports.sections.limits import attack_limits, limits, probe_limits
from reports.sections.measurements import measurements
from reports.sections.probes import TITLES, blocks_of, probes
from reports.sections.records import records
from reports.sections.reproduce import reproduce, signoff
from reports.sections.request import request_section, sets_table
from reports.sections.subject import subject_sections
from reports.sections.summary import sentence, summary
from reports.sections.utility import utility
from reports.text import CLAIM_LEVELS, Json, attack_label, number, short, short_digest

ATTACK_SETS = {"records": "Records to be looked for", "control": "Control: never seen"}
PROBE_SETS = {
    "records": "Records",
    "control": "Control: never seen",
    "retain": "Data: what the model is looked at on",
    "training": "Training records",
}


def page(report: Json, audience: str, digest: str, signoffs: Sequence[Json] = ()) -> Page:
    """The page for an audience.

    Args:
        report: what `build` returns; that of a probe run or an attack run has one edition, whatever the audience.
        audience: engineer (everything), regulator (without per-tensor tables) or subject (one plain-language page).
        digest: sha256 of report.json, printed so that the page names its source.
        signoffs: decisions recorded in attest/, oldest first.
    """
    if report["run"]["kind"] == "probe":
        return _probe_page(report, digest)
    if report["run"]["kind"] == "attack":
        return _attack_page(report, digest)
    forget = report["run"]["kind"] == "forget"
    request = report["request"] or {}
    level = report["claim_level"]
    meta = [
        ("Checkpoint", Cell(short(report["checkpoint"]["before"]["name"], 80))),
        ("Tensor digest", Cell(short_digest(report["checkpoint"]["before"]["tensor_digest"]), style="code")),
        ("Request", Cell(short(str(request["subject_request_id"]), 60), style="code"))
        if request.get("subject_request_id")
        else ("Request", Cell("none, audit only" if not forget else "no id given")),
        ("Records", Cell(number(report["run"]["sets"]["records"]["n"]))),
    ]
    if audience == "subject":
        title, sections, appendix = "What was done about your request", subject_sections(report), []
    else:
        title = "Unlearning evidence report" if forget else "Memorisation audit report"
        sections = _sections(report, audience, signoffs)
        appendix = [crosswalk(), glossary(report), data(report, digest)]
    return Page(
        audience=audience,
        title=title,
        subtitle=short(report["checkpoint"]["before"]["name"], 80),
        meta=meta,
        verdict=report["verdict"],
        tone=TONES[report["verdict"]],
        sentence=sentence(report),
        claim_level=level or "none",
        claim=CLAIM_LEVELS[level] if level else "no claim level is supported by this run",
        is_text=(
            "A record of what was measured on the checkpoints identified in section 2, "
            + ("before and after an edit, " if edited(report) else "")
            + "with the tests listed in section 6, against the criteria listed in section 1."
        ),
        is_not_text=(
            "Not a legal conclusion, and not a statement that the information is absent from the weights. Another "
            "prompt, attack or level of access than those tested may give another result."
        ),
        sections=sections,
        appendix=appendix,
        digest=digest,
        banner=" ".join(text for text in (banner(report, audience), history.banner(report, audience)) if text),
    )


def _sections(report: Json, audience: str, signoffs: Sequence[Json]) -> list[Section]:
    parts: list[tuple[str, str, Sequence[Block] | str]] = [
        ("summary", "Summary", summary(report)),
        ("identity", "Identity", identity(report)),
        ("request", "Request and data", request_section(report)),
        ("figures", "Before and after" if edited(report) else "Measurements", measurements(report)),
        ("edit", "Edit", edit_section(report, audience)),
        ("attacks", "Attacks", attacks(report, audience)),
        ("records", "Records", records(report)),
        ("probes", "Inside the model", probes(report, audience)),
        ("utility", "Utility", utility(report, audience)),
        ("robustness", "Forgotten or hidden?", _forgotten(report, audience)),
        ("limits", "Residual risk and limits", limits(report)),
        ("reproduce", "Reproduce", reproduce(report, audience)),
        ("signoff", "Sign-off", signoff(signoffs)),
    ]
    return _numbered(parts)


def _forgotten(report: Json, audience: str) -> Sequence[Block] | str:
    """Section 10, and at its end what became of earlier requests where the run keeps a ledger."""
    found, earlier = forgotten_or_hidden(report, audience), earlier_requests(report, audience)
    if not earlier:
        return found
    return [*([Prose(f"not run: {found}.")] if isinstance(found, str) else found), *earlier]


def _numbered(parts: Sequence[tuple[str, str, Sequence[Block] | str]]) -> list[Section]:
    """Sections in order; words in place of blocks are the reason why there are none."""
    return [
        Section(name, str(index), title, *((blocks, "") if not isinstance(blocks, str) else ((), blocks)))
        for index, (name, title, blocks) in enumerate(parts, 1)
    ]


def _probe_page(report: Json, digest: str) -> Page:
    """The page of a run that only looked inside a checkpoint: no verdict, a section per probe."""
    checkpoint, run = report["checkpoint"]["before"], report["run"]
    ran = [name for name in TITLES if run["probes"][name]]
    used = any(row["n"] for row in run["sets"].values())
    opening: list[Block] = [checkpoints_table(report, "Probed")]
    opening.append(
        sets_table(report, PROBE_SETS) if used else Prose("No record was used: only the weights were looked at.")
    )
    parts: list[tuple[str, str, Sequence[Block] | str]] = [("identity", "Checkpoint and data", opening)]
    parts += [(name, TITLES[name], blocks_of(report, name, "engineer")) for name in ran]
    if not ran:
        parts.append(("probes", "Inside the model", "the run stopped before a probe had finished"))
    parts += [("limits", "Limits", probe_limits(report)), ("reproduce", "Reproduce", reproduce(report, "engineer"))]
    name = short(checkpoint["name"], 80)
    return Page(
        audience="engineer",
        title="Probe report",
        subtitle=name,
        meta=[
            ("Checkpoint", Cell(name)),
            ("Tensor digest", Cell(short_digest(checkpoint["tensor_digest"]), style="code")),
            ("Records", Cell(number(sum(row["n"] for row in run["sets"].values())))),
            ("Probes", Cell(", ".join(ran) or "none")),
        ],
        verdict="",
        tone="",
        sentence="",
        claim_level="",
        claim="",
        is_text=(
            "A record of what probes found inside the checkpoint identified in section 1, with the data listed there."
        ),
        is_not_text=(
            "Not an audit: nothing was tested against a criterion, so there is no verdict and no statement on whether "
            "a record can be got out of the checkpoint."
        ),
        sections=_numbered(parts),
        appendix=[_lettered(probe_glossary(report), "A"), _lettered(data(report, digest, "probe.json"), "B")],
        digest=digest,
        stem="probe",
    )


def _attack_page(report: Json, digest: str) -> Page:
    """The page of one attack alone: no verdict, its figures and the records it hit."""
    checkpoint, run = report["checkpoint"]["before"], report["run"]
    used = any(row["n"] for row in run["sets"].values())
    opening: list[Block] = [checkpoints_table(report, "Attacked")]
    opening.append(sets_table(report, ATTACK_SETS) if used else Prose("No record was used in this run."))
    parts: list[tuple[str, str, Sequence[Block] | str]] = [
        ("identity", "Checkpoint and data", opening),
        (
            "attacks",
            "Attack",
            attacks(report, "engineer") if report["attacks"] else "the run stopped before it had finished",
        ),
        ("records", "Records", records(report)),
        ("limits", "Limits", attack_limits(report)),
        ("reproduce", "Reproduce", reproduce(report, "engineer")),
    ]
    name = short(checkpoint["name"], 80)
    names = [attack_label(row["name"]) for row in report["attacks"]]
    return Page(
        audience="engineer",
        title="Attack report",
        subtitle=name,
        meta=[
            ("Checkpoint", Cell(name)),
            ("Tensor digest", Cell(short_digest(checkpoint["tensor_digest"]), style="code")),
            ("Records", Cell(number(run["sets"]["records"]["n"]))),
            ("Attack", Cell(short(", ".join(names) or "none", 120))),
        ],
        verdict="",
        tone="",
        sentence="",
        claim_level="",
        claim="",
        is_text=(
            "A record of what one attack got out of the checkpoint identified in section 1, with the data listed there."
        ),
        is_not_text=(
            "Not an audit: nothing was tested against a criterion, so there is no verdict. Another prompt, attack or "
            "level of access may give another result."
        ),
        sections=_numbered(parts),
        appendix=[_lettered(attack_glossary(report), "A"), _lettered(data(report, digest, "attack.json"), "B")],
        digest=digest,
        stem="attack",
    )


def _lettered(section: Section, letter: str) -> Section:
    return replace(section, number=letter)
