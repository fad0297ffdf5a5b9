"""Section 1: the verdict in a sentence, the few numbers to read first, the criteria."""

from __future__ import annotations

from reports.arms import arms, edited, known_metrics
from reports.blocks import TONES, Block, Cards, Cell, Prose, figure_cell, table
from reports.history import tally
from reports.sections.forgotten import finding
from reports.text import Json, attack_label, figure_parts, metric_label, number, plural, short, words_of

STATUS_WORDS = {"met": "met", "not met": "not met", "inconclusive": "not decided"}


def sentence(report: Json) -> str:
    """How many of the required criteria were met: `Of 2 required criteria: 1 met, 1 not decided.`

    In a run with earlier requests, or with several of its own, what came of those as well.
    """
    others = tally(report)
    return f"{_criteria_met(report)} {others}" if others else _criteria_met(report)


def _criteria_met(report: Json) -> str:
    criteria = report["criteria"]
    if not criteria:
        return "No criterion was decided in this run."
    required = [row for row in criteria if row["required"]]
    counted = required or criteria
    tally = [(sum(row["status"] == status for row in counted), words) for status, words in STATUS_WORDS.items()]
    kind = f"{'required ' if required else ''}{'criterion' if len(counted) == 1 else 'criteria'}"
    return f"Of {len(counted)} {kind}: {', '.join(f'{count} {words}' for count, words in tally if count)}."


def summary(report: Json) -> list[Block]:
    """Cards with the headline figure, the worst record, the cost and the criteria; whether the edit forgot or hid; the
    table of criteria.
    """
    opening: list[Block] = [_cards(report), *finding(report, "Forgotten or hidden (section 10)? ")]
    if not report["criteria"]:
        return [*opening, Prose("not run: no criterion was decided in this run", "open")]
    lines = [
        (
            Cell(short(row["id"], 24), "" if row["required"] else "optional"),
            Cell(_rule(row)),
            _observed(row),
            Cell(row["status"], tone=TONES[row["status"]]),
            Cell(short(row["reason"], 300)),
        )
        for row in report["criteria"]
    ]
    return [
        *opening,
        table("Criteria", ("Id", "Criterion", "Observed", "Status", "Reason"), lines, "criteria[]"),
    ]


def _cards(report: Json) -> Cards:
    cards: list[tuple[str, str, list[str]]] = []
    for name in known_metrics(report):
        if name in ("extraction.greedy", "correct"):
            found = arms(report, name)
            main, detail = figure_parts(found["U"] if edited(report) else found["O"], name)
            others = (("before", "O"), ("control", "N"), ("reference", "R"))[0 if edited(report) else 1 :]
            lines = [f"{arm}: {figure_parts(found[key], name)[0]}" for arm, key in others if found[key]]
            cards.append((metric_label(name), main, [detail, *lines]))
    if report["records"]:
        worst = report["records"][0]
        now = worst["after"] or worst["before"] or {}
        column = "probability" if "probability" in now else "label_probability"
        before = [f"before: {number((worst['before'] or {}).get(column))}"] if worst["after"] else []
        hits = [f"hit by {plural(len(now['hits']), 'attack')}"] if now.get("hits") else []
        lines = [metric_label(column).lower(), *before, *hits, short(worst["id"], 24)]
        cards.append(("Worst record", number(now.get(column)), lines))
    if report["utility"]["status"] == "run":
        name, row = next(iter(report["utility"]["figures"].items()))
        main, detail = figure_parts(row["difference"], difference=True)
        label = metric_label(name)
        cards.append((f"Change in {label[:1].lower()}{label[1:]}", main, [detail, "after minus before"]))
    else:
        cards.append(("Utility", "not run", [report["utility"]["reason"]]))
    required = [row for row in report["criteria"] if row["required"]]
    met = sum(row["status"] == "met" for row in required)
    level = f"claim level {report['claim_level']}" if report["claim_level"] else "no claim level"
    return Cards([*cards[:3], ("Required criteria met", f"{met} of {len(required)}" if required else "n/a", [level])])


def _observed(row: Json) -> Cell:
    """The observed figure: a difference in the comparing tests, a count only where the criterion is about a rate."""
    difference = row["test"] in ("noninferiority", "equivalence")
    return figure_cell(row["observed"], row["metric"] if row["aggregate"] == "rate" else "", difference=difference)


def _rule(row: Json) -> str:
    """A criterion in words: `Verbatim extraction, rate: upper 95 % bound at most 0.200`."""
    name = f"retain.{row['metric']}" if row["set"] == "retain" else row["metric"]
    than = f"the {row['against']}" if row["against"] in ("control", "reference") else "before"
    rule = {
        "upper95": f"upper 95 % bound at most {number(row['max'])}",
        "point": f"at most {number(row['max'])}",
        "noninferiority": f"not worse than {than} by more than {number(row['margin'])}",
        "equivalence": f"equivalent to {than} within {number(row['margin'])}",
    }.get(row["test"], row["test"])
    if row["attack"]:
        under = "every attack on the edit" if row["attack"] == "all" else attack_label(row["attack"])
        return f"{metric_label(row['metric'])} under {under}: {rule}"
    return f"{metric_label(name)}, {words_of(row['aggregate'])}: {rule}"
