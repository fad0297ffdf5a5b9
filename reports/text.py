"""Words and numbers as the reports print them: one place for cleaning, formatting and vocabulary.

`clean` neutralises every string that comes from a run folder (model names, record ids, request fields): control and
bidirectional characters become visible, absolute paths shrink to their last part, length is bounded. Escaping for HTML
and Markdown is the renderers' business and comes on top. `number` and `figure_parts` are the only formatters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

Json = dict[str, Any]

MAX_TEXT = 600
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Two components at least, of ordinary characters, so that "[/foo]" and "and/or" are left alone; not inside a URL.
_PATH = re.compile(r"(?<![\w.:/\\-])(?:file://|~|[A-Za-z]:)?(?:[/\\][\w.@+~=%-]+)+[/\\]([\w.@+~=%-]+)[/\\]?")


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """One line of visible characters: hidden ones spelled out as ⟨U+202E⟩, absolute paths cut to their last part.

    Args:
        text: any string.
        limit: characters kept, counted after the replacements; a longer text ends in an ellipsis.
    """
    visible = []
    for char in " ".join(text[: 4 * limit].split()):
        visible.append(f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _HIDDEN else char)
    return short(_PATH.sub(r"\1", "".join(visible)), limit)


def short(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with an ellipsis at the end."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tree(value: Any) -> Any:
    """A JSON value with every string and key cleaned and every number finite (`finite`)."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {clean(str(key)): tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tree(item) for item in value]
    return clean(str(value))


def finite(value: float) -> float | None:
    """Nine significant digits, which is more than float32 holds; None for NaN and infinities."""
    return float(f"{value:.9g}") + 0.0 if math.isfinite(value) else None


def number(value: Any) -> str:
    """A number as people read it: three decimals, thousands separated, small ones as 1.2e-5, a real minus sign."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if size == 0:
        text = "0.000"
    elif size < 0.001 or size >= 1e9:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:,.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"
    return text.replace("-", "−")


def signed(value: float | None) -> str:
    """`number` with a plus sign on positive values, for differences."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def figure_parts(figure: Json | None, metric: str = "", *, difference: bool = False) -> tuple[str, str]:
    """A figure as (main text, detail): ("7 of 20", "0.350, 95 % CI 0.154 to 0.592").

    No interval is printed as a point: zero events read "95 % CI up to 0.168", all events "95 % CI from 0.832", and an
    interval of no width says that there is none.

    Args:
        figure: `{value, unit, n, ci_low, ci_high, ci_level, direction}` or None.
        metric: its name; a share of yes-or-no records (`COUNTED`) prints as a count.
        difference: the figure is a difference: never a count, and its sign is printed.
    """
    if figure is None:
        return "n/a", ""
    size = f"n\u00a0=\u00a0{number(figure['n'])}"  # no line break inside
    value, n, low, high = (figure[key] for key in ("value", "n", "ci_low", "ci_high"))
    if value is None:
        return "n/a", size
    show = signed if difference else number
    name = f"{number(round(100 * figure['ci_level']))} % CI" if figure["ci_level"] else "CI"
    interval = f"{name} {show(low)} to {show(high)}" if None not in (low, high) and low != high else "no interval"
    counted = metric.rpartition("retain.")[2] in COUNTED and not difference and n
    if not counted or abs(n * value - round(n * value)) > 1e-6 * n:
        return show(value), f"{interval}, {size}"
    if interval != "no interval" and value in (0, 1):
        interval = f"{name} up to {number(high)}" if value == 0 else f"{name} from {number(low)}"
        return f"{round(n * value):,} of {n:,}", interval
    return f"{round(n * value):,} of {n:,}", f"{number(value)}, {interval}"


def figure_text(figure: Json | None, metric: str = "", *, difference: bool = False) -> str:
    """`figure_parts` in one string: `0 of 20 (95 % CI up to 0.168)`."""
    main, detail = figure_parts(figure, metric, difference=difference)
    return f"{main} ({detail})" if detail else main


def plural(count: int, word: str) -> str:
    """`1 record`, `2 records`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


VERDICTS = ("criteria met", "criteria not met", "inconclusive")
CLAIM_LEVELS = {
    "E0": "an edit was applied; nothing is claimed about what the model emits",
    "E1": "the records were not emitted under the tested prompts",
    "E2": "statistically equivalent to the reference, within a margin fixed beforehand",
    "E3": "equivalent to the reference, and still so after relearning, quantisation and white-box attacks",
    "E4": "retrained without the records",
}
ACCESS = {
    "A0": "text only",
    "A1": "log-probabilities",
    "A2": "weights",
    "A3": "both checkpoints",
    "A4": "control over training",
}
ARMS = {
    "O": ("Before", "original checkpoint on the records"),
    "U": ("After", "edited checkpoint on the records"),
    "N": ("Control", "edited checkpoint on records it has never seen"),
    "R": ("Reference", "checkpoint that never held the records, on the records"),
}
AUDIT_ARMS = ARMS | {
    "O": ("Records", "audited checkpoint on the records"),
    "N": ("Control", "audited checkpoint on records it has never seen"),
}
# name: (label, what it says)
METRICS = {
    "extraction.greedy": (
        "Verbatim extraction",
        "Records the model writes out token for token when given their beginning and taking the likeliest token at "
        "every step.",
    ),
    "extraction.sampled": (
        "Extraction by sampling",
        "Probability that one random sample equals the whole record.",
    ),
    "probability": ("Probability per token", "Geometric mean probability the model gives the record's tokens."),
    "correct": ("Label predicted", "Images whose label is the classifier's first choice."),
    "label_probability": ("Label probability", "Probability the classifier gives an image's label."),
    "token_accuracy": ("Token accuracy", "Share of a record's tokens that are the model's first choice."),
    "extraction_strength": (
        "Extraction strength",
        "Share of a record that the model completes by itself once the rest is given.",
    ),
    "loss": ("Loss", "Mean negative log-probability per token, in nats; higher means less remembered."),
    "min_k": ("Min-K%", "Mean log-probability of a record's 20 % least likely tokens."),
    "min_k_plus_plus": ("Min-K%++", "Min-K% after standardising each token over the vocabulary."),
    "zlib_ratio": ("Loss per compressed byte", "Loss divided by the compressed size of the text."),
    "min_margin": ("Smallest margin", "Smallest gap between the two likeliest tokens of a record."),
    "entropy": ("Entropy", "Mean entropy of the model's predictions, in nats."),
    "margin": ("Label margin", "Logit of the label minus the largest other logit."),
}

# Figures of one record from the curvature of the loss: the same form
CURVATURE = {
    "memorisation_score": (
        "Memorisation score",
        "Made from the curvature figures of a record alone, without any label; higher looks more memorised.",
    ),
    "low_energy": (
        "Low-curvature energy",
        "Share of the energy of a record's gradient that lies in the directions below the cut.",
    ),
    "activation_ratio": (
        "Activation ratio",
        "Size of a record's activations along the lower half of the eigenvectors of A over that along the top tenth.",
    ),
    "input_curvature": (
        "Input curvature",
        "Estimated trace of the second derivative of a record's loss by its inputs.",
    ),
    "relative_curvature": (
        "Relative curvature",
        "Input curvature divided by the record's loss: how sensitive the answer is, however sure it is.",
    ),
}

# First part of an attack's name: heading of its family, in reading order
FAMILIES = {
    "verbatim": "Verbatim extraction",
    "recollection": "Recollection",
    "near_verbatim": "Near-verbatim extraction",
    "untargeted": "Untargeted extraction",
    "exposure": "Exposure of canaries",
    "pii": "Personal data",
    "template": "Template extraction",
    "compression": "Adversarial compression",
    "membership": "Membership inference",
    "privacy_bound": "Privacy bound",
    "memory": "Memory",
    "duplicates": "Near-duplicates",
    "model_inversion": "Model inversion",
    "reconstruction": "Reconstruction",
    "recovery": "Recovery after the edit",
    "elicitation": "Re-triggering",
    "regurgitation": "Regurgitation under other wordings",
    "exfiltration": "Exfiltration through the prompt",
    "hidden_knowledge": "Knowledge inside the model",
    "edit_difference": "Difference of both checkpoints",
    "collateral": "What else the edit changed",
}

# Heading of the attacks that test whether an edit forgot or hid, in reading order: beginnings of the attacks' names,
# and how a reader without training would call what they do. The longest beginning that fits decides.
STRESS_GROUPS = {
    "Relearning": (
        ("recovery.relearning", "recovery.retain_tuning", "recovery.related_tuning", "recovery.savings"),
        "training the model a little further",
    ),
    "Changed weights": (("recovery",), "rounding or altering the numbers the model is made of"),
    "Re-triggering": (("elicitation",), "feeding the model specially made inputs"),
    "Other wordings": (("regurgitation", "exfiltration"), "asking in another way"),
    "Inside the model": (("hidden_knowledge",), "looking inside the model while it works"),
    "Both checkpoints": (("edit_difference",), "comparing the model with what it was before the change"),
}
OTHER_STRESS = ("Other attacks", "other kinds of attempts")
# finding: (tone, in words); none says more than the attacks of the run can
FINDINGS = {
    "hidden": ("bad", "Finding: hidden"),
    "not hidden": ("good", "Finding: the attacks tested found nothing hidden"),
    "undecided": ("open", "Finding: undecided"),
    "not tested": ("open", "Finding: not tested"),
}
# status: (tone, symbol, what it means)
STRESS_STATUSES = {
    "recovers": (
        "bad",
        "✕",
        "the residual is above 0 beyond chance and, where there is a reference, more comes back than from it",
    ),
    "resists": (
        "good",
        "✓",
        "this attack, at this strength, brings back less than the margin; another may bring back more",
    ),
    "undecided": ("open", "?", "this number of records shows neither, or the reference gives back as much"),
    "re-teaches": (
        "muted",
        "↺",
        "never-seen records rose as well, so the attack teaches and says nothing of what was left",
    ),
    "not testable": (
        "muted",
        "–",
        "an arm is missing, or the records hardly stood out under this attack in the original",
    ),
}

# Parts of attacks' names that are not written as they are spelt there
ATTACK_WORDS = {
    "near_verbatim": "near-verbatim",
    "pii": "PII",
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
    "recall": "ReCaLL",
    "rmia": "RMIA",
    "gcg": "GCG",
    "nf4": "NF4",
    "gguf": "GGUF",
}


COUNTED = ("extraction.greedy", "correct")  # shares of yes-or-no records


def metric_label(name: str) -> str:
    """Label of a metric; a prefix such as `retain.` becomes words: `Loss, retain set`."""
    known = METRICS.get(name) or CURVATURE.get(name)
    if known:
        return known[0]
    head, dot, rest = name.partition(".")
    if dot and head in ("retain", "control", "records") and rest:
        return f"{metric_label(rest)}, {head} set" if head != "records" else metric_label(rest)
    if head in FAMILIES:
        return attack_label(name)
    return sentence_case(words_of(name))


def short_digest(value: str | None, length: int = 12) -> str:
    """`sha256:9ab4…` shortened for running text; the full digest is in section 2."""
    if not value:
        return "not recorded"
    head, _, tail = value.rpartition(":")
    return f"{head}:{short(tail, length + 1)}" if head else short(tail, length + 1)


def when(value: object) -> str:
    """`2026-11-03T09:12:00Z` as `2026-11-03 09:12 UTC`; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?", str(value))
    if not found:
        return short(str(value), 40)
    day, time, zone = found.groups()
    return f"{day} {time} {'UTC' if zone in ('Z', '+00:00') else zone or ''}".strip() if time else day


def plain(value: object) -> str:
    """A JSON leaf or small tree in words; parameters keep the digits they were given with, digests are shortened."""
    if isinstance(value, float):
        return f"{value:.6g}".replace("e-0", "e-").replace("-", "−")
    if value is None or isinstance(value, bool | int):
        return number(value)
    if isinstance(value, dict):
        return "; ".join(f"{words_of(key)}: {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)


def words_of(name: str) -> str:
    """`web_form` as `web form`."""
    return name.replace("_", " ")


def attack_label(name: str) -> str:
    """`verbatim.greedy` as `Verbatim: greedy`."""
    return sentence_case(": ".join(ATTACK_WORDS.get(part) or words_of(part) for part in name.split(".")))


def unit_words(unit: str) -> str:
    """A figure's unit where it says more than its name: `bits`, `nats per token`; nothing for shares."""
    return "" if unit in ("", "share", "rate", "probability", "AUC", "auc") else unit


def family_of(attack: str) -> str:
    """The goal family of an attack: the first part of its name."""
    return attack.partition(".")[0]


def attack_order(attack: str) -> tuple[int, str]:
    """Where an attack's family stands in reading order; unknown families last, by name."""
    family = family_of(attack)
    return (list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES), family)


def family_label(family: str) -> str:
    """Heading of a goal family."""
    return FAMILIES.get(family) or sentence_case(words_of(family))


def stress_group(attack: str) -> tuple[str, str]:
    """Heading and plain words of the kind of stress attack that a name belongs to."""
    fits = [
        (len(start), heading, words)
        for heading, (starts, words) in STRESS_GROUPS.items()
        for start in starts
        if attack.startswith(start)
    ]
    return max(fits)[1:] if fits else OTHER_STRESS


def stress_order(attack: str) -> int:
    """Where the kind of a stress attack stands in reading order; unknown kinds last."""
    headings = [*STRESS_GROUPS, OTHER_STRESS[0]]
    return headings.index(stress_group(attack)[0])


def two(figure: Json | None) -> str:
    """A figure's value alone, a share with two decimals: 0.33; below half a hundredth, < 0.01."""
    value = (figure or {}).get("value")
    if value is None:
        return "n/a"
    if not 0 <= value <= 1 or unit_words((figure or {}).get("unit") or ""):
        return number(value)
    return "< 0.01" if 0 < value < 0.005 else f"{value:.2f}"


def sentence_case(text: str) -> str:
    """`web form` as `Web form`; capitals further on stay, and so does a symbol: p_z, p-value, n = 1."""
    return text if re.match(r"[a-z](?:[_-]| =)", text) else text[:1].upper() + text[1:]
