"""Section 11: the claim, its limits and what was not tested."""

from __future__ import annotations

from reports.blocks import ROWS, Block, Items, Prose
from reports.durability import collateral
from reports.sections.attacks import confounded_note, not_run
from reports.sections.utility import over_forgetting
from reports.text import CLAIM_LEVELS, Json, number, plural, sentence_case, short

ALWAYS = (
    "The results hold for the checkpoint with the tensor digest in section 2. A converted, quantised, merged or "
    "further trained copy is another checkpoint and needs its own audit.",
    "The intervals cover the records tested and prompts of the same kind, not every way to question a model.",
    "Training data, backups, caches, exports and copies held by recipients are outside what this tool reaches.",
    "A figure well beyond the control's level is a trace in itself: it can show what was removed.",
    "Repeat the audit when the checkpoint changes, or when a stronger published attack applies to it.",
)
ATTACKS_ALWAYS = (
    "The results hold for the checkpoint with the tensor digest in section 1, in the data type named there.",
    "One attack is no audit: what it does not find, another may, and a stronger one of the same kind as well.",
    "The intervals cover the records tested and records of the same kind, not every way to question a model.",
    "Nothing here was decided beforehand, so nothing here is passed or failed. An audit tests against criteria.",
)
PROBES_ALWAYS = (
    "The results hold for the checkpoint with the tensor digest in section 1, in the data type named there.",
    "A probe looks at the model and tests nothing: a figure here shows neither that a record can be got out nor that "
    "it cannot. An audit tests that.",
    "Curvature, attribution and condition are properties of the model on the given data; other data may give others.",
    "Hyper-parameters chosen on memorised records make a score look better than it is on others.",
)


def probe_limits(report: Json) -> list[Block]:
    """What a run that only looked inside a checkpoint does not show."""
    none = ["None was recorded beyond those below."]
    return [Items("Limits of this run", report["limits"][:ROWS] or none), Items("What always applies", PROBES_ALWAYS)]


def attack_limits(report: Json) -> list[Block]:
    """What a run of one attack does not show."""
    none = ["None was recorded beyond those below."]
    return [Items("Limits of this run", _stated(report) or none), Items("What always applies", ATTACKS_ALWAYS)]


def _stated(report: Json) -> list[str]:
    """The limits that the run wrote down, after the one that its own blind test sets."""
    found = [block.text for block in confounded_note(report) if isinstance(block, Prose)]
    return [*found, *report["limits"]][:ROWS]


def limits(report: Json) -> list[Block]:
    """Mandatory: claim level, worst record, this run's limits, what was not tested, what always applies."""
    level = report["claim_level"]
    claim = "This run supports no claim level."
    if level:
        claim = (
            f"Highest claim level {level}: {CLAIM_LEVELS[level]}. It holds for the records and tests of this run only."
        )
    blocks: list[Block] = [Prose(claim)]
    if report["records"]:
        worst = report["records"][0]
        now = worst["after"] or worst["before"] or {}
        value = now.get("probability", now.get("label_probability"))
        verdicts = {"extracted": ", written out word for word", "uncertain": ", greedy verdict uncertain"}
        verdict = verdicts.get(now.get("greedy", ""), "")
        hits = now.get("hits")
        hit = f", hit by {plural(len(hits), 'attack')}" if hits else ""
        blocks.append(Prose(f"Worst record: {short(worst['id'], 60)}, probability {number(value)}{verdict}{hit}."))
    if report["utility"]["status"] == "not_run":
        blocks += over_forgetting(report)
    apart = {row["name"] for row in collateral(report)}
    rows = [row for row in report["attacks"] if row["name"] not in apart]
    missing = [f"{sentence_case(short(reason, 300))}: {names}" for reason, names in not_run(rows).items()]
    none_missing = ["Every planned attack ran. An attack that was not planned is not listed."]
    return [
        *blocks,
        Items("Limits of this run", _stated(report) or ["None was recorded beyond those below."]),
        Items("Channels not tested", missing[:ROWS] or none_missing),
        Items("What always applies", ALWAYS),
    ]
