"""The data subject's page: plain language, nobody else's data, no figure that needs training to read."""

from __future__ import annotations

from reports.arms import arms, known_metrics
from reports.blocks import Block, Cell, Dates, Facts, Items, Prose, Section
from reports.inference_time import FILES, acts
from reports.sections.request import out_of_scope, request_dates
from reports.text import Json, family_of, figure_parts, plain, plural, short, stress_group, words_of

REQUEST_KINDS = {
    "erasure": "to have your data removed from an AI model",
    "objection": "to stop the use of your data in an AI model",
    "memorisation_claim": "to check whether an AI model has memorised your data",
    "rightsholder": "to have your work removed from an AI model",
    "authority_order": "that an authority also ordered to be carried out",
}
COMPLAINT = {
    "gdpr": "You may lodge a complaint with the data protection authority of the country where you live or work, and "
    "you may go to court.",
    "uk_gdpr": "You may complain to the Information Commissioner's Office, and you may go to court.",
    "ccpa": "You may complain to the California Privacy Protection Agency or to the California Attorney General.",
}
OUTCOMES = {
    "criteria met": "The model passed the checks that had been fixed beforehand.",
    "criteria not met": "The model did not pass all the checks that had been fixed beforehand.",
    "inconclusive": "The checks did not give a clear answer.",
}
ACTIONS = {
    "extraction.greedy": "repeated word for word when the model was given their beginning",
    "correct": "recognised by the model under their label",
}
EARLIER = {
    "met": "What had been removed for earlier requests was looked for again and was not found to have come back.",
    "not met": "What had been removed for an earlier request was looked for again and has come back, so this copy did "
    "not pass.",
    "inconclusive": "What had been removed for earlier requests was looked for again, without a clear answer.",
}
# Families of attacks whose hit on a record means that its text, or a close copy, came out
BROUGHT_OUT = ("verbatim", "near_verbatim", "untargeted", "template", "compression", "regurgitation", "exfiltration")
AGAIN = (
    "Whenever the model is changed, converted or trained further, and when better tests become known. This page speaks "
    "only about the exact model that was tested."
)


def subject_sections(report: Json) -> list[Section]:
    """One page: asked, changed, tested, still possible, checked again, right to complain."""
    request = report["request"] or {}
    regulation = str(request.get("regulation") or "")
    elsewhere = "Depending on where you live, you may also turn to a supervisory authority or to a court."
    complain = "If you disagree with this answer, write to the organisation that sent you this page."
    parts: list[tuple[str, str, list[Block]]] = [
        ("asked", "What was asked", _asked(report, request)),
        ("changed", "What was changed", _changed(report, request)),
        ("tested", "What was tested", [Prose(" ".join([*_results(report), *_others(report)]))]),
        ("possible", "What remains possible", [Items("", _possible(report))]),
        ("again", "When it is checked again", [Prose(AGAIN)]),
        ("complain", "Your right to complain", [Prose(f"{complain} {COMPLAINT.get(regulation, elsewhere)}")]),
    ]
    return [Section(name, "", title, blocks) for name, title, blocks in parts]


def _asked(report: Json, request: Json) -> list[Block]:
    if not request:
        return [Prose("No request is on file for this check.")]
    kind = REQUEST_KINDS.get(str(request.get("subject_request_type")), "about data in an AI model")
    count = report["run"]["sets"]["records"]["n"]
    concerns = f" It concerns {plural(count, 'record')}." if count else ""
    blocks: list[Block] = [Prose(f"You made a request {kind}.{concerns}")]
    if request.get("subject_request_id"):
        blocks.append(Facts([("Request id", Cell(short(plain(request["subject_request_id"]), 60), style="code"))]))
    points = request_dates(request)
    return [*blocks, Dates(points)] if points else blocks


def _changed(report: Json, request: Json) -> list[Block]:
    name = short(report["checkpoint"]["before"]["name"], 80)
    edit = (report["method"] or {}).get("edit")
    if not edit or not report["checkpoint"]["after"]:
        if report["run"]["kind"] == "forget":
            return [Prose(f"No edited copy of the model “{name}” has been tested yet.")]
        return [Prose(f"The model “{name}” was examined. Nothing in it was changed.")]
    changed = sum(row["changed"] > 0 for row in edit["tensors"])
    what = f"{plural(changed, 'table')} of numbers inside the model changed."
    if acts(report):
        what = "Its numbers stayed as they were; a program that belongs to the copy changes its answers."
    text = (
        f"A copy of the model “{name}” was edited so that it should no longer give out these records. "
        f"{what} The original was left as it was."
    )
    kept = [short(words_of(plain(row.get("what"))), 60) for row in out_of_scope(request) if not row.get("included")]
    return [Prose(text), *([Prose(f"Not part of this change: {', '.join(kept[:8])}.")] if kept else [])]


def _results(report: Json) -> list[str]:
    """Before and after in words, for a reader without training in statistics."""
    edited = report["checkpoint"]["after"] is not None
    sentences = [OUTCOMES[report["verdict"]]]
    for name in (name for name in known_metrics(report) if name in ACTIONS):
        found = arms(report, name)
        before, last = found["O"], found["U"] if edited else found["O"]
        if not before or before["value"] is None or not last or last["value"] is None:
            continue
        count = figure_parts(before, name)[0]
        if edited:
            sentences.append(
                f"Before the change, {count} records were {ACTIONS[name]}; after it, {_count(last, name)}."
            )
        else:
            sentences.append(f"In the test, {_count(last, name)} records were {ACTIONS[name]}.")
        if last["value"] == 0 and last["ci_high"]:
            bound = max(1, round(100 * last["ci_high"]))
            sentences.append(
                f"Because {plural(last['n'], 'record')} were tested, the test alone cannot rule out up to about "
                f"{bound} in 100 among records of the same kind."
            )
    return sentences if len(sentences) > 1 else [*sentences, "No test gave a count that can be stated here."]


def _others(report: Json) -> list[str]:
    """What came of other people's requests, without saying whose; nothing where there were none."""
    part = report.get("history") or {"earlier": [], "requests": [], "status": None}
    sentences = []
    if part["requests"]:
        sentences.append(
            f"{plural(len(part['requests']), 'request')} were carried out together, yours among them. What is said "
            "here holds for all of them together; the organisation has the result of each."
        )
    if part["earlier"] and part["status"]:
        sentences.append(EARLIER[part["status"]])
    if any(row["missing"] for row in part["earlier"]):
        sentences.append("For some earlier requests this could not be looked at again.")
    return sentences


def _either(ways: list[str]) -> str:
    """`a`, or `a, by b, or by c`."""
    return ways[0] + "".join(f", by {text}" for text in ways[1:-1]) + (f", or by {ways[-1]}" if ways[1:] else "")


def _count(figure: Json, metric: str) -> str:
    return "none" if figure["value"] == 0 else figure_parts(figure, metric)[0]


def _possible(report: Json) -> list[str]:
    edited = report["checkpoint"]["after"] is not None
    stage = "after" if edited else "before"
    repeated = any(f"extracted {stage}" in row["flags"] for row in report["records"])
    hits = {name for row in report["records"] for name in (row[stage] or {}).get("hits") or ()}
    ways = dict.fromkeys(stress_group(name)[1] for name in report["robustness"]["recovering"] if edited)
    brought = not repeated and any(family_of(name) in BROUGHT_OUT for name in hits)
    return [
        *([FILES] if edited and acts(report) else []),
        *(["The tested model can still repeat at least one of the records."] if repeated else []),
        *(["With more effort, at least one of the records, or a close copy of it, was still got out."] * brought),
        *([f"The information, or part of it, could be brought back by {_either(list(ways))}."] if ways else []),
        "The tests try likely ways to make the model repeat a record. They cannot try every way.",
        *(["Copies of the model made earlier, or given to others, are not affected by this change."] if edited else []),
        "The data used to build the model is handled separately from the model.",
    ]
