"""From report.json to the page an audience sees; report.json is the only source.

A section with nothing in it keeps its heading and says `not run: <reason>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from reports.arms import edited
from reports.blocks import TONES, Cell, Page, Section
from reports.sections.appendix import crosswalk, data, glossary
from reports.sections.attacks import attacks, robustness
from reports.sections.edit import edit_section
from reports.sections.identity import identity
from reports.sections.limits import limits
from reports.sections.measurements import measurements
from reports.sections.records import records
from reports.sections.reproduce import reproduce, signoff
from reports.sections.request import request_section
from reports.sections.subject import subject_sections
from reports.sections.summary import sentence, summary
from reports.sections.utility import utility
from reports.text import CLAIM_LEVELS, Json, number, short, short_digest


def page(report: Json, audience: str, digest: str, signoffs: Sequence[Json] = ()) -> Page:
    """The page for an audience.

    Args:
        report: what `build` returns.
        audience: engineer (everything), regulator (without per-tensor tables) or subject (one plain-language page).
        digest: sha256 of report.json, printed so that the page names its source.
        signoffs: decisions recorded in attest/, oldest first.
    """
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
    )


def _sections(report: Json, audience: str, signoffs: Sequence[Json]) -> list[Section]:
    parts = [
        ("summary", "Summary", summary(report)),
        ("identity", "Identity", identity(report)),
        ("request", "Request and data", request_section(report)),
        ("figures", "Before and after" if edited(report) else "Measurements", measurements(report)),
        ("edit", "Edit", edit_section(report, audience)),
        ("attacks", "Attacks", attacks(report)),
        ("records", "Records", records(report)),
        ("utility", "Utility", utility(report)),
        ("robustness", "Robustness", robustness(report)),
        ("limits", "Residual risk and limits", limits(report)),
        ("reproduce", "Reproduce", reproduce(report, audience)),
        ("signoff", "Sign-off", signoff(signoffs)),
    ]
    return [
        Section(name, str(index), title, *((blocks, "") if not isinstance(blocks, str) else ((), blocks)))
        for index, (name, title, blocks) in enumerate(parts, 1)
    ]
