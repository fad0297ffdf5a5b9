"""Appendix: crosswalk, glossary, the data behind the page."""

from __future__ import annotations

from reports.arms import arm_words, known_metrics, present_arms
from reports.blocks import Cell, Facts, Prose, Section, table
from reports.text import ACCESS, CLAIM_LEVELS, METRICS, Json, plural

# Identifiers only: which passage a section may serve is a question for the reader's counsel.
CROSSWALK = (
    ("2 Identity, 11 Reproduce", "GDPR 5(2); AI Act Annex IV 1(b) and 6; ISO/IEC 42001 A.6.2.7, A.6.2.8, A.7.5"),
    ("3 Request and data", "GDPR 12(3), 12(4), 17, 19, 30; CCPA regulations §7021, §7022(b), §7101(b)"),
    ("Pseudonyms throughout", "GDPR 4(5), 5(1)(c), 5(1)(e), 25, 32; EDPB Guidelines 01/2025"),
    ("4 Figures, 5 Edit", "EDPB Opinion 28/2024; AI Act Annex IV 2(g); NIST AI RMF MEASURE 2.10"),
    ("6 Attacks, 9 Robustness", "EDPB Opinion 28/2024; NIST AI 100-2; GPAI Code of Practice, copyright, measure 1.4"),
    ("8 Utility", "AI Act 15; ISO/IEC 42001 A.6.2.4"),
    ("10 Residual risk and limits", "EDPB Opinion 28/2024; GDPR 35"),
    ("12 Sign-off", "AI Act Annex IV 2(g)"),
)
TERMS = (
    (
        "95 % CI",
        "Confidence interval: made so that it covers the true value in 95 of 100 repetitions of the experiment.",
    ),
    ("Upper 95 % bound", "Largest true rate that is still plausible, at that level, when none was observed."),
    ("Tensor digest", "sha256 over name, type, shape and content of every tensor, whatever the file layout."),
    ("Pseudonym", "Keyed hash of a record's id; the key is not part of a run folder that is passed on."),
)


def crosswalk() -> Section:
    """Which section may serve which provision."""
    note = Prose("Identifiers only, to help find the passages this evidence may serve. No legal conclusion is drawn.")
    lines = [(Cell(section), Cell(identifiers)) for section, identifiers in CROSSWALK]
    return Section("crosswalk", "A", "Crosswalk", [note, table("Provisions", ("Section", "Identifiers"), lines)])


def glossary(report: Json) -> Section:
    """The words and figures this report uses."""
    words = arm_words(report)
    terms = [(words[arm][0], f"Arm {arm}: {words[arm][1]}.") for arm in present_arms(report)]
    terms += [(f"Level {level}", f"{text[0].upper()}{text[1:]}.") for level, text in CLAIM_LEVELS.items()]
    terms += [(f"Access {level}", f"The attacker holds: {text}.") for level, text in ACCESS.items()]
    terms += [METRICS[name] for name in known_metrics(report) if name in METRICS]
    lines = [(Cell(term), Cell(text)) for term, text in [*terms, *TERMS]]
    return Section("glossary", "B", "Glossary", [table("Terms", ("Term", "Meaning"), lines)])


def data(report: Json, digest: str) -> Section:
    """Where the full numbers are."""
    text = (
        f"This page was rendered from report.json alone (schema {report['schema']}, "
        f"{plural(len(report['records']), 'record')} in full). Where a table is shortened, that file holds the rest."
    )
    return Section("data", "C", "Data", [Prose(text), Facts([("sha256 of report.json", Cell(digest, style="code"))])])
