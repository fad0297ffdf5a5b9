"""Appendix: crosswalk, glossary, the data behind the page."""

from __future__ import annotations

from collections.abc import Sequence

from reports.arms import arm_words, known_metrics, present_arms
from reports.blocks import Cell, Facts, Prose, Section, table
from reports.text import ACCESS, CLAIM_LEVELS, CURVATURE, METRICS, Json, plural

# Identifiers only: which passage a section may serve is a question for the reader's counsel.
CROSSWALK = (
    ("2 Identity, 12 Reproduce", "GDPR 5(2); AI Act Annex IV 1(b) and 6; ISO/IEC 42001 A.6.2.7, A.6.2.8, A.7.5"),
    ("3 Request and data", "GDPR 12(3), 12(4), 17, 19, 30; CCPA regulations §7021, §7022(b), §7101(b)"),
    ("Pseudonyms throughout", "GDPR 4(5), 5(1)(c), 5(1)(e), 25, 32; EDPB Guidelines 01/2025"),
    ("4 Figures, 5 Edit, 8 Inside the model", "EDPB Opinion 28/2024; AI Act Annex IV 2(g); NIST AI RMF MEASURE 2.10"),
    (
        "6 Attacks, 10 Forgotten or hidden?",
        "EDPB Opinion 28/2024; NIST AI 100-2; GPAI Code of Practice, copyright, measure 1.4",
    ),
    ("9 Utility", "AI Act 15; ISO/IEC 42001 A.6.2.4"),
    ("11 Residual risk and limits", "EDPB Opinion 28/2024; GDPR 35"),
    ("13 Sign-off", "AI Act Annex IV 2(g)"),
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
PROBE_TERMS = {
    "kfac": (
        (
            "A and G",
            "Second moments of a module's inputs and of the gradients at its outputs, over the counted positions.",
        ),
        ("Curvature mass", "Product of the traces of A and G: the sum over all pairs of directions."),
        ("Norm kept", "Share of the squared norm of the weights that lies in the pairs kept."),
        ("Overlap", "Agreement of the leading eigenvectors from two halves of the data: 1 is the same space."),
        ("AUC", "Probability that a record scores higher than a control record; 0.5 is chance."),
    ),
    "spectrum": (
        ("Hessian", "Matrix of the second derivatives of the mean loss by the weights."),
        (
            "Gauss-Newton",
            "The part of the Hessian that has no negative eigenvalues, from the outputs' curvature alone.",
        ),
        ("Trace", "Sum of all eigenvalues, estimated from random vectors."),
    ),
    "localise": (
        ("Attribution", "Division of a log-probability among the parts that it was computed through."),
        ("Completeness gap", "Difference between the sum of an attribution and what it should add up to."),
        ("Influence", "How far a training record's gradient points the way that raises a completion's probability."),
    ),
    "condition": (
        ("Condition number", "Largest singular value of a matrix over its smallest."),
        ("Stable rank", "Squared Frobenius norm of a matrix over its squared largest singular value."),
        ("Effective rank", "Exponential of the entropy of the singular values as shares of their sum."),
        ("Relative", "Divided by the same figure of a random Gaussian matrix of the same shape."),
    ),
}
ON_THE_EDIT = ("recovery", "elicitation", "regurgitation", "exfiltration", "hidden_knowledge", "edit_difference")
# Shown where an attack ran whose name begins like this
ATTACK_TERMS = (
    (
        ("membership",),
        "Membership inference",
        "Telling records the model was trained on from records it has never seen, by what it makes of them.",
    ),
    (
        ("membership", "memory", "untargeted"),
        "AUC",
        "Probability that a record scores higher than a control record; 0.5 is chance.",
    ),
    (
        ("membership", "untargeted"),
        "ROC",
        "Share of the records found (true positives) at each share of false alarms among control records. Drawn on "
        "logarithmic axes, since an accusation is worth something only where false alarms are rare.",
    ),
    (
        ("membership",),
        "Blind test",
        "The same comparison with features of the records alone, without the model. If it beats chance, the two sets "
        "differ by themselves, and membership figures are confounded.",
    ),
    (
        ("membership",),
        "Conformal list",
        "Records flagged as seen by ranking each against control records, so that the expected share of false ones "
        "among those flagged stays below a bound.",
    ),
    (
        ("exposure",),
        "Exposure",
        "log2 of the number of possible secrets over the secret's rank among them by probability. A secret never seen "
        "reaches b bits with probability 2 to the power of −b.",
    ),
    (("exposure",), "Canary", "A made-up secret of known form, put into training data to measure what is kept of it."),
    (
        ("verbatim",),
        "p_z",
        "Probability that one sample, under a given sampling rule, equals the whole record: the product over its "
        "tokens. n samples hold it with probability 1 − (1 − p_z) to the power of n.",
    ),
    (
        ("near_verbatim",),
        "Near-verbatim",
        "Equal to the record up to a stated number or share of edits; probabilities of it are lower bounds.",
    ),
    (
        ("memory",),
        "Recognition",
        "Share of pairs of a record and a never-seen one in which the model finds the record likelier; 0.5 is chance. "
        "It can stay high where nothing is recalled.",
    ),
    (
        ON_THE_EDIT,
        "Residual",
        "(After − Control) / (Before − Control), all under the same attack: 0 is the level of records never seen, 1 "
        "that of the original checkpoint.",
    ),
    (
        ON_THE_EDIT,
        "Re-teaches",
        "Never-seen records rise under the attack as well. It then teaches, and shows nothing of what an edit left.",
    ),
    (
        ("recovery.relearn", "recovery.benign", "recovery.retain"),
        "Relearning",
        "Training the checkpoint a little further, on part of the records or on other data, and scoring records that "
        "were not trained on. What was hidden comes back sooner than what was never learnt.",
    ),
    (
        ("recovery.quantisation",),
        "Quantisation",
        "Rounding the weights to few bits, as is done to run a model on a small machine. It can undo a small edit.",
    ),
    (("recovery.pruning",), "Pruning", "Setting to zero the weights that matter least by their size."),
    (
        ("recovery.interpolation",),
        "Interpolation",
        "Moving the weights of the edited copy back towards those of the original, step by step.",
    ),
    (
        ("elicitation",),
        "Re-triggering",
        "Searching, on half of the records, for an input that brings records out, and trying it on the other half: "
        "vectors that are no words (a soft prompt), small shifts of the input embeddings, or a string (a suffix).",
    ),
    (
        ("regurgitation", "exfiltration"),
        "Other wordings",
        "Asking for the same record in another form: a choice among answers, yes or no, a gap to fill, other words.",
    ),
    (
        ("hidden_knowledge",),
        "Logit lens",
        "What the model would predict if it ended after a given layer.",
    ),
    (
        ("hidden_knowledge",),
        "Linear probe",
        "A linear classifier on a layer's activations, trained on half of the records and tested on the other half.",
    ),
    (
        ("edit_difference",),
        "Edit read-out",
        "Telling from the two checkpoints alone which records were to be forgotten.",
    ),
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
    return _glossary([*terms, *_attack_terms(report), *_probe_terms(report), *TERMS])


def attack_glossary(report: Json) -> Section:
    """The words a page on one attack alone uses."""
    words = arm_words(report)
    terms = [(words[arm][0], f"Arm {arm}: {words[arm][1]}.") for arm in present_arms(report)]
    used = {row["access"] for row in report["attacks"]}
    terms += [(f"Access {level}", f"The attacker holds: {text}.") for level, text in ACCESS.items() if level in used]
    metrics = {row["metric"] for row in report["attacks"]}
    terms += [text for name, text in METRICS.items() if name in metrics]
    return _glossary([*terms, *_attack_terms(report), *TERMS])


def _attack_terms(report: Json) -> list[tuple[str, str]]:
    """The words of the attacks that ran."""
    ran = [row["name"] for row in report["attacks"] if row["status"] == "run"]
    return [(term, text) for starts, term, text in ATTACK_TERMS if any(name.startswith(starts) for name in ran)]


def probe_glossary(report: Json) -> Section:
    """The words a page on probes alone uses."""
    return _glossary([*_probe_terms(report), *TERMS])


def _probe_terms(report: Json) -> list[tuple[str, str]]:
    """The words of the probes that ran."""
    ran = {name for name, result in report["run"]["probes"].items() if result}
    terms = [term for name, found in PROBE_TERMS.items() if name in ran for term in found]
    shown = {name for row in report["records"] for name in row["before"] or ()} if "kfac" in ran else set()
    return [*terms, *(CURVATURE[name] for name in CURVATURE if name in shown)]


def _glossary(terms: Sequence[tuple[str, str]]) -> Section:
    meanings: dict[str, str] = {}
    for term, text in terms:  # two probes or attacks may use one word
        meanings.setdefault(term, text)
    lines = [(Cell(term), Cell(text)) for term, text in meanings.items()]
    return Section("glossary", "B", "Glossary", [table("Terms", ("Term", "Meaning"), lines)])


def data(report: Json, digest: str, name: str = "report.json") -> Section:
    """Where the full numbers are."""
    text = (
        f"This page was rendered from {name} alone (schema {report['schema']}, "
        f"{plural(len(report['records']), 'record')} in full). Where a table is shortened, that file holds the rest."
    )
    return Section("data", "C", "Data", [Prose(text), Facts([(f"sha256 of {name}", Cell(digest, style="code"))])])
