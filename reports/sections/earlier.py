"""Part of section 10: the requests carried out earlier on the way to this copy, and whether what they removed came
back; of a batch, the verdict of each request.
"""

from __future__ import annotations

from reports import figures
from reports.blocks import TONES, Block, Cell, Chart, Items, Part, Prose, Table, number_cell, table
from reports.figures import Link
from reports.history import came_back, entries, outcome
from reports.text import Json, number, plural, short, short_digest, when

WORDS = {"emitted": "Written out word for word", "correct": "Label predicted"}
MARKS = {"met": "✓", "not met": "✕", "inconclusive": "?"}
NAMED = 20  # pseudonyms of one request in the list of those that came back
NONE = (
    "No request was carried out earlier on the way to this checkpoint, as far as the ledger knows: there was nothing "
    "to ask again."
)
READING = (
    "The records of the earlier requests were asked for again, before and after this edit, as they stand. A request "
    "has come back when {written}the model is shown to be surer of its records than of records never seen, by the "
    "margin or more; where it already was after the request's own run, the step since then counts. The attacks of the "
    "suite ran on the new records alone."
)
WRITTEN = "a record is written out now and was not after the request's own run, or when "
PLAIN = {
    "met": "nothing of it was found to have come back",
    "not met": "the model is surer of these records than the checks allow",
    "inconclusive": "too little was found either way to decide",
}


def earlier_requests(report: Json, audience: str) -> list[Block]:
    """The chain, the finding, the table of earlier requests, and the requests of a batch; nothing without a ledger.

    Args:
        report: what `build` returns.
        audience: engineer (with the comparison behind each outcome) or regulator (in plain words).
    """
    part = report.get("history")
    if part is None:
        return []
    blocks: list[Block] = [Part("Earlier requests")]
    if part["earlier"]:
        blocks += [_finding(report, part), _chain(report, part), _table(part, audience), *_named(report)]
        margin = f" The margin is {number(part['margin'])}." if part["margin"] is not None else ""
        written = WRITTEN if part["measure"] == "emitted" else ""
        blocks.append(Prose(f"{READING.format(written=written)}{margin}"))
    else:
        blocks.append(Prose(NONE))
    return [*blocks, *_batch(part)]


def _finding(report: Json, part: Json) -> Prose:
    """The outcome of all in a note."""
    rows, back = part["earlier"], came_back(report)
    gone = sum(bool(row["missing"]) for row in rows)
    open_ = sum(row["status"] not in ("met", "not met") and not row["missing"] for row in rows)
    aside = f" {plural(gone, 'earlier request')} could not be asked again; the table says why." if gone else ""
    if part["status"] is None:
        return Prose(f"not run: the run stopped before the earlier requests were judged.{aside}", "open")
    if back:
        what = f"{len(back)} of {plural(len(rows), 'earlier request')} came back ({entries(back)})"
        return Prose(f"{what}. This fails the run, whatever its own criteria say.{aside}", "bad")
    if part["status"] == "met":
        return Prose(f"None of {plural(len(rows) - gone, 'earlier request')} asked again came back.{aside}", "good")
    if gone == len(rows):
        return Prose(f"Not decided: no earlier request could be asked again.{aside}", "open")
    return Prose(f"Not decided: none was shown to have come back, and {number(open_)} may have.{aside}", "open")


def _chain(report: Json, part: Json) -> Chart:
    """From the original to this copy."""
    links = [Link("O", "Original", short_digest(part["root"]), "", "")]
    for row in part["earlier"]:
        done = " · ".join(text for text in (plural(row["records"], "record"), row["verdict"]) if text)
        mark = MARKS.get(row["status"], "–")
        links.append(
            Link("N", f"Copy of entry {row['n']}", short_digest(row["checkpoint"]), done, f"{mark} {outcome(row)}")
        )
    after = report["checkpoint"]["after"]
    if after:
        records = plural(report["run"]["sets"]["records"]["n"], "record")
        links.append(
            Link("U", "This copy", short_digest(after["tensor_digest"]), f"{records} · {report['verdict']}", "")
        )
    caption = (
        "From the original to this copy, oldest first: the copy that each request left, its records and the verdict of "
        "its own run, and whether its records came back in this copy. An entry is a line of the ledger."
    )
    said = [
        f"{link.label} {link.digest}" + "".join(f", {text}" for text in (link.note, link.outcome) if text)
        for link in links
    ]
    alt = f"Chain of {plural(len(links), 'checkpoint')}. {'. '.join(said)}."
    title = "Chain of edits from the original to this copy; the table below holds the data"
    return Chart(figures.chain("chain", title, links), caption, alt)


def _table(part: Json, audience: str) -> Table:
    """A line for each earlier request; columns that no row fills are left out."""
    rows = part["earlier"]
    optional = [
        (key, words)
        for key, words in (
            ("found_then", "after its own run"),
            ("found_before", "before this edit"),
            ("found_after", "now"),
            ("found_again", "since its own run"),
        )
        if any(row[key] is not None for row in rows) or (key == "found_then" and _judged(part))
    ]
    lines = [
        [
            Cell(str(row["n"]), "\n".join(_known(row))),
            number_cell(row["records"]),
            Cell(row["verdict"], short_digest(row["checkpoint"])),
            *(_count(row, key) for key, _ in optional),
            Cell(outcome(row), tone=TONES.get(row["status"], "muted")),
            Cell(short(_why(row, audience), 300), style="wide"),
        ]
        for row in rows
    ]
    columns = ["Entry", "Records", "Verdict of its run, copy it left", *(words for _, words in optional)]
    groups = [("", 3), (WORDS.get(part["measure"], "Found"), len(optional)), ("", 2)] if optional else ()
    numeric = (1, *range(3, 3 + len(optional)))
    return table(
        "Earlier requests, oldest first",
        [*columns, "Outcome", "Why"],
        lines,
        "history.earlier[]",
        numeric,
        groups,
    )


def _judged(part: Json) -> bool:
    """Whether some earlier request was judged by figures of a known kind."""
    return part["measure"] is not None and any(row["status"] is not None for row in part["earlier"])


def _count(row: Json, key: str) -> Cell:
    """How many records were found; what the request's own run found is not known where its table is gone."""
    if key == "found_then" and row[key] is None:
        return Cell("not known", tone="muted")
    return number_cell(row[key])


def _known(row: Json) -> list[str]:
    """When a request was finished and by which method, where the run recorded it."""
    finished = [when(row["finished"])] if row["finished"] else []
    return [*finished, *([short(row["method"], 40)] if row["method"] else [])]


def _why(row: Json, audience: str) -> str:
    """Behind an outcome: the comparison for the engineer, plain words for the regulator; why it was not asked again."""
    if row["missing"]:
        return str(row["missing"])
    if row["status"] is None:
        return "not judged in this run"
    if audience == "engineer":
        return row["reason"] or ""
    if row["status"] == "not met" and row["found_again"]:
        return f"{row['found_again']:,} of {plural(row['records'], 'record')} written out word for word again"
    return PLAIN[row["status"]]


def _named(report: Json) -> list[Block]:
    """The records that are written out again, under their pseudonyms."""
    items = []
    for row in came_back(report):
        if row["again"]:
            more = f" and {len(row['again']) - NAMED:,} more" if len(row["again"]) > NAMED else ""
            items.append(f"Entry {row['n']}: {', '.join(short(name, 40) for name in row['again'][:NAMED])}{more}")
    return [Items("Records that are written out again", items)] if items else []


def _batch(part: Json) -> list[Block]:
    """Of several requests in one edit, the verdict of each."""
    rows = part["requests"]
    if not rows:
        return []
    lines = []
    for index, row in enumerate(rows, 1):
        failed = [f"{short(one['id'], 24)} {one['status']}" for one in row["criteria"] if one["status"] != "met"]
        met = sum(one["status"] == "met" for one in row["criteria"])
        lines.append(
            [
                Cell(str(index), short(row["id"], 60) if row["id"] else "no id given"),
                number_cell(row["records"]),
                Cell(row["verdict"] or "not judged yet", tone=TONES.get(row["verdict"] or "", "muted")),
                Cell(f"{met} of {len(row['criteria'])}" if row["criteria"] else "n/a"),
                Cell(short("; ".join(failed), 300) or "none"),
            ]
        )
    return [
        Part("Requests carried out together"),
        Prose(
            f"{plural(len(rows), 'request')} were carried out by one edit. Each is judged on its own records; criteria "
            "on the copy as a whole count for each of them. Earlier requests that came back fail the run, and each of "
            "these requests with it."
        ),
        table(
            "Verdict of each request",
            ("Request", "Records", "Verdict", "Criteria met", "Criteria not met or not decided"),
            lines,
            "history.requests[]",
            (1,),
        ),
    ]
