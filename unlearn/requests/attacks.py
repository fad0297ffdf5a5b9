"""The catalogue of attacks: what each tries, what an attacker must hold, what it needs, what it costs, its settings.

Access: A0 text, A1 log-probabilities, A2 weights, A3 both checkpoints, A4 training. A cost is counted in forward
passes of the audited model per record, by the pass that yields it, so that attacks which share a pass share its cost.

An attack without a runner is in the catalogue so that a report says what was not tried. Installed packages add their
own through the entry-point group `unlearn.attacks` (docs/suites.md). Nothing here loads a model library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, Field, StrictBool, StrictInt

from probes.errors import UsageError
from unlearn.mistakes import Mistakes, suggestion
from unlearn.requests.plugins import entry, others
from unlearn.requests.yamlfile import Document, Schema, parse

GROUP = "unlearn.attacks"
Task = Literal["causal_lm", "image_classification"]
Access = Literal["A0", "A1", "A2", "A3", "A4"]
LANGUAGE: tuple[Task, ...] = ("causal_lm",)
BOTH: tuple[Task, ...] = ("causal_lm", "image_classification")
PLANNED = "not part of this version"

Number = Annotated[float, Field(strict=True)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Count = Annotated[StrictInt, Field(ge=1)]

# What an attack may need, in words for "not run: it needs ...".
NEEDS = {
    "records": "records",
    "control": "a control set of never-seen records",
    "reference": "a reference that never held the records",
    "text": "records as text",
    "corpus": "a corpus (--corpus)",
    "canaries": "canaries with their format (--canaries)",
    "candidates": "candidates for each record (--candidates)",
    "chat_template": "a tokenizer with a chat template",
}


class Sampling(Schema):
    """A decoder's sampling rule: temperature, then top-k, then top-p."""

    temperature: Annotated[Number, Field(gt=0)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None


class Plain(Schema):
    """An attack without settings."""


class Sampled(Schema):
    """(n, p)-discoverable extraction (arXiv 2410.19482).

    Attributes:
        schemes: sampling rules to report, all from the one pass.
        samples: the n for which the expected share of records emitted at least once is given.
    """

    schemes: tuple[Sampling, ...] = Field(default=(Sampling(),), min_length=1, max_length=8)
    samples: tuple[Count, ...] = Field(default=(1, 100, 1000), min_length=1)


class Sweep(Schema):
    """Prefix lengths and starts.

    Attributes:
        starts: contexts tried for each record: the full one, and shorter ones that end where it ends.
        window: tokens of a window that counts as extracted when greedy decoding emits it after what stands before.
    """

    starts: Annotated[StrictInt, Field(ge=1, le=32)] = 3
    window: Count = 50


class NearVerbatim(Schema):
    """How far from the completion a greedy continuation may be.

    Attributes:
        similarity: at least this edit similarity counts as near verbatim.
    """

    similarity: Share = 0.75


class NearVerbatimMass(Schema):
    """Probability mass near the completion, bounded from below by constrained beam search (2603.24917).

    Attributes:
        distance: Levenshtein or Hamming distance in tokens.
        metric: which distance.
        width: beams.
        records: how many records, those with the most probable completion first.
        samples: n for the reported chance that one of n samples lies within the distance.
    """

    distance: Annotated[StrictInt, Field(ge=0, le=64)] = 2
    metric: Literal["levenshtein", "hamming"] = "hamming"
    width: Annotated[StrictInt, Field(ge=1, le=512)] = 16
    records: Count = 16
    samples: Count = 100


class Untargeted(Schema):
    """Free samples, ranked by the signals of Carlini et al. (2021).

    Attributes:
        n: samples.
        length: tokens of a sample.
        top_k: sampling rule.
        temperature: sampling rule.
        window: tokens of the sliding window.
        minimum: tokens of a record that a sample must hold in a row (the whole record where it is shorter).
        top: how many of the best-ranked samples are looked at for the precision of a signal.
    """

    n: Count = 64
    length: Annotated[StrictInt, Field(ge=2)] = 64
    top_k: Count | None = 40
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    window: Count = 50
    minimum: Count = 50
    top: Count = 20


class Exposure(Schema):
    """Exposure of canaries (Carlini et al. 2019).

    Attributes:
        n: random fills each canary is ranked among; a space of at most n is ranked exactly.
        level: a canary counts as exposed when its exact p-value is at most this.
    """

    n: Annotated[StrictInt, Field(ge=20)] = 1000
    level: Share = 0.01


class PiiExtraction(Schema):
    """Personal data in free samples (Lukas et al. 2023).

    Attributes:
        n: samples.
        length: tokens of a sample.
        kinds: kinds of personal data; empty for all.
        patterns: kinds of your own, as regular expressions by name.
    """

    n: Count = 64
    length: Annotated[StrictInt, Field(ge=2)] = 64
    kinds: tuple[str, ...] = ()
    patterns: dict[str, str] = Field(default_factory=dict)


class PiiReconstruction(Schema):
    """Personal data at its masked place in a record.

    Attributes:
        draws: sampled fills for each masked place.
        top_k: sampling rule of the fills.
        kinds: kinds of personal data; empty for all.
        patterns: kinds of your own, as regular expressions by name.
    """

    draws: Count = 16
    top_k: Count | None = 40
    kinds: tuple[str, ...] = ()
    patterns: dict[str, str] = Field(default_factory=dict)


class Template(Schema):
    """Samples from the head of the chat template, matched against the records (2510.18554).

    Attributes:
        n: samples.
        length: tokens of a sample.
        temperature: sampling rule.
        fpr: share of never-seen records that may be matched; sets the threshold on one half of them.
        embedder: hashed character n-grams, or the audited model's own mean hidden state.
    """

    n: Count = 64
    length: Annotated[StrictInt, Field(ge=2)] = 96
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    fpr: Share = 0.05
    embedder: Literal["ngrams", "model"] = "ngrams"


class Compression(Schema):
    """Adversarial compression by greedy coordinate gradient (2404.15146, 2307.15043).

    Attributes:
        records: how many records, those with the most probable completion first; as many never-seen ones.
        steps: optimisation steps at each prompt length.
        candidates: token swaps tried a step.
        tokens: completions are cut to this length.
    """

    records: Count = 4
    steps: Count = 60
    candidates: Count = 64
    tokens: Annotated[StrictInt, Field(ge=2)] = 24


class Duplicates(Schema):
    """Near-duplicates of the records in a corpus.

    Attributes:
        threshold: Jaccard similarity of word 5-shingles.
        span: tokens of an exact common span.
    """

    threshold: Share = 0.8
    span: Annotated[StrictInt, Field(ge=5)] = 50


class Membership(Schema):
    """One membership score, evaluated against the control set.

    Attributes:
        fprs: false-positive rates at which the true-positive rate is wanted.
    """

    fprs: tuple[Share, ...] = (0.01, 0.05)


class MinK(Membership):
    """Min-K% and Min-K%++.

    Attributes:
        share: of the tokens, those with the lowest score.
    """

    share: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.2


class Recall(Membership):
    """ReCaLL (2406.15968).

    Attributes:
        shots: never-seen records in front of each record; they are not scored.
    """

    shots: Annotated[StrictInt, Field(ge=1, le=32)] = 4


class Rmia(Membership):
    """RMIA, offline, with the reference (2312.03262).

    Attributes:
        gamma: by what factor a member must beat a member of the population.
        a: how the reference stands in for a model that saw the record.
    """

    gamma: Annotated[Number, Field(ge=1)] = 1.0
    a: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.3


class Flagged(Schema):
    """A list of records flagged as members with a bounded false-discovery rate (2510.09717).

    Attributes:
        q: the bound.
        score: which score decides; null takes the reference ratio where there is a reference, the loss otherwise.
    """

    q: Share = 0.05
    score: str | None = None


class Dataset(Schema):
    """Dataset inference (2406.06443).

    Attributes:
        splits: random halves whose p-values are combined.
    """

    splits: Annotated[StrictInt, Field(ge=1, le=200)] = 10


class Bits(Schema):
    """Learned bits (2404.05405).

    Attributes:
        prior: what a reader without the model would pay: the reference, or the same number of bits for every token.
    """

    prior: Literal["reference", "uniform"] = "uniform"


class Counterfactual(Schema):
    """Counterfactual memorisation from fine-tunes on random halves (Feldman and Zhang 2020).

    Attributes:
        runs: fine-tunes, in pairs that split the records between them.
        epochs: passes of each over its half.
        learning_rate: of AdamW.
        batch: records a step.
    """

    runs: Annotated[StrictInt, Field(ge=4, multiple_of=2)] = 16
    epochs: Count = 10
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    batch: Count = 8


class OneRun(Schema):
    """A lower bound on epsilon from one training run (2305.08846).

    Attributes:
        randomised: say true where a fair coin decided, record by record, what went into training (records) and what
            stayed out (control); without that the bound means nothing.
        guesses: share of the records guessed on, the most certain ones on either side.
        delta: of the differential-privacy statement.
    """

    randomised: StrictBool = False
    guesses: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.5
    delta: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0


@dataclass(frozen=True, slots=True)
class Size:
    """What costs depend on: numbers of records and controls, mean tokens of one, canaries."""

    records: int
    control: int = 0
    tokens: float = 50.0
    canaries: int = 0

    @property
    def rows(self) -> int:
        """Records and controls."""
        return max(1, self.records + self.control)


Cost = Callable[[dict[str, Any], Size], dict[str, float]]


def _one_pass(settings: dict[str, Any], size: Size) -> dict[str, float]:
    return {"pass": 1.0}


def _text_only(settings: dict[str, Any], size: Size) -> dict[str, float]:
    return {}


def _also(**views: float) -> Cost:
    return lambda settings, size: {"pass": 1.0} | views


def _generated(settings: dict[str, Any], size: Size) -> dict[str, float]:
    tokens = settings["n"] * settings["length"]
    return {f"samples.{settings['n']}.{settings['length']}": 2 * tokens / (size.rows * size.tokens)}


@dataclass(frozen=True, slots=True)
class Declaration:
    """One attack.

    Attributes:
        name: family, dot, attack.
        goal: the question it answers.
        access: the least an attacker must hold.
        budget: queries in words, for reports.
        runner: `module:function` that runs it; None where it is not part of this version.
        settings: schema of its settings; defaults fill in what a suite leaves out.
        tasks: kinds of model it is defined for.
        needs: keys of `NEEDS`.
        cost: forward passes of the audited model per record, by the pass they come from.
        reason: why there is no runner.
        once: whether the outcome does not depend on the model; it then runs for the checkpoint as given alone.
    """

    name: str
    goal: str
    access: Access
    budget: str = ""
    runner: str | None = None
    settings: type[Schema] = Plain
    tasks: tuple[Task, ...] = LANGUAGE
    needs: tuple[str, ...] = ("records",)
    cost: Cost = field(default=_one_pass)
    reason: str = PLANNED
    once: bool = False

    @property
    def family(self) -> str:
        """First part of the name."""
        return self.name.partition(".")[0]


_RUN = "unlearn.attacking."
_SCORED = ("records", "control")


def _membership(
    name: str,
    what: str,
    access: Access,
    settings: type[Schema],
    needs: tuple[str, ...] = (),
    cost: Cost = _one_pass,
    **more: Any,
) -> Declaration:
    return Declaration(
        f"membership.{name}",
        f"can members be told from never-seen records by {what}?",
        access,
        more.pop("budget", "read off the one pass"),
        _RUN + "membership:score",
        settings,
        more.pop("tasks", LANGUAGE),
        (*_SCORED, *needs),
        cost,
    )


BUILT_IN = (
    Declaration(
        "verbatim.greedy",
        "does greedy decoding emit the record word for word?",
        "A0",
        "1 forward pass a record; candidates confirmed with generate()",
        _RUN + "verbatim:greedy",
    ),
    Declaration(
        "verbatim.sampled",
        "how many samples until the record is emitted, (n, p)-discoverable extraction?",
        "A1",
        "read off the one pass",
        _RUN + "verbatim:sampled",
        Sampled,
    ),
    Declaration(
        "verbatim.strength",
        "from what share of the record does the model complete the rest?",
        "A1",
        "read off the one pass",
        _RUN + "verbatim:strength",
    ),
    Declaration(
        "recollection.probability",
        "does the model find the record likelier than never-seen records?",
        "A1",
        "1 forward pass a record and control record",
        _RUN + "verbatim:probability",
        tasks=BOTH,
    ),
    Declaration(
        "verbatim.sweep",
        "is the record emitted from another prefix length or start?",
        "A0",
        "1 forward pass for each start",
        _RUN + "verbatim:sweep",
        Sweep,
        cost=lambda s, n: {"pass": 1.0, f"starts.{s['starts']}": float(s["starts"] - 1)},
    ),
    Declaration(
        "near_verbatim.greedy",
        "is the record emitted up to a few edits?",
        "A0",
        "decoding from the first miss of the one pass",
        _RUN + "near_verbatim:greedy",
        NearVerbatim,
        needs=("records",),
        cost=_also(continuations=2.0),
    ),
    Declaration(
        "near_verbatim.mass",
        "how probable is a sample within a few edits of the record?",
        "A1",
        "beam search for a few records",
        _RUN + "near_verbatim:mass",
        NearVerbatimMass,
        cost=lambda s, n: {"pass": 1.0, "beams": 2.0 * s["width"] * min(s["records"], n.records) / n.rows},
    ),
    Declaration(
        "untargeted.sampling",
        "do free samples hold records, and do ranking signals find them?",
        "A1",
        "free samples, each scored once",
        _RUN + "untargeted:sampling",
        Untargeted,
        cost=lambda s, n: _generated(s, n) | {"scored": 2 * s["n"] * s["length"] / (n.rows * n.tokens)},
    ),
    Declaration(
        "exposure.canaries",
        "what rank has a secret among all others of its form?",
        "A1",
        "random fills of the canary's form",
        _RUN + "exposure:canaries",
        Exposure,
        needs=("canaries",),
        cost=lambda s, n: {"fills": float(s["n"] * n.canaries) / n.rows},
    ),
    Declaration(
        "pii.extraction",
        "does the model emit the records' personal data unasked?",
        "A0",
        "free samples",
        _RUN + "pii:extraction",
        PiiExtraction,
        needs=("records", "text"),
        cost=_generated,
    ),
    Declaration(
        "pii.reconstruction",
        "does the model fill in masked personal data of a record?",
        "A1",
        "sampled fills, each scored in its sentence",
        _RUN + "pii:reconstruction",
        PiiReconstruction,
        needs=("records", "text"),
        cost=lambda s, n: {"fills.pii": 2.0 * s["draws"]},
    ),
    Declaration(
        "pii.inference",
        "can a person's attribute be inferred among candidates, beyond chance?",
        "A1",
        "1 forward pass for each candidate",
        _RUN + "pii:inference",
        Plain,
        needs=("records", "text", "candidates"),
        cost=lambda s, n: {"candidates": 10.0},
    ),
    Declaration(
        "template.extraction",
        "does the bare chat template bring training conversations out?",
        "A0",
        "samples from the template's head",
        _RUN + "template:extraction",
        Template,
        needs=("records", "control", "text", "chat_template"),
        cost=_generated,
    ),
    Declaration(
        "compression.adversarial",
        "is there a prompt shorter than the record that makes the model emit it?",
        "A2",
        "greedy coordinate gradient on a few records",
        _RUN + "compression:adversarial",
        Compression,
        cost=lambda s, n: {
            "pass": 1.0,
            "gcg": 6.0 * s["steps"] * s["candidates"] * 2 * min(s["records"], n.records) / n.rows,
        },
    ),
    Declaration(
        "duplicates.corpus",
        "which near-duplicates of the records does the request not cover?",
        "A0",
        "text only",
        _RUN + "duplicates:corpus",
        Duplicates,
        needs=("records", "text", "corpus"),
        cost=_text_only,
        once=True,
    ),
    Declaration(
        "membership.blind",
        "can the records be told from the control set without the model?",
        "A0",
        "text only",
        _RUN + "membership:blind",
        Plain,
        BOTH,
        _SCORED,
        _text_only,
        once=True,
    ),
    _membership("loss", "their loss", "A1", Membership, tasks=BOTH),
    _membership("zlib", "loss per compressed byte", "A1", Membership),
    _membership("min_k", "their least likely tokens", "A1", MinK),
    _membership("min_k_plus_plus", "their least likely tokens, standardised", "A1", MinK),
    _membership("surprising", "unlikely tokens where the model is sure", "A1", Membership),
    _membership("margin", "the margin of the label", "A1", Membership, tasks=("image_classification",)),
    _membership("entropy", "the entropy of the prediction", "A1", Membership, tasks=("image_classification",)),
    _membership(
        "lowercase",
        "what lower case does to their loss",
        "A1",
        Membership,
        ("text",),
        _also(lower=1.0),
        budget="1 more forward pass",
    ),
    _membership(
        "recall",
        "what a never-seen prefix does to their loss",
        "A1",
        Recall,
        (),
        lambda s, n: {"pass": 1.0, f"prefixed.{s['shots']}": 1.1},
        budget="1 forward pass behind a prefix",
    ),
    _membership("reference", "the ratio to the reference", "A1", Membership, ("reference",), tasks=BOTH),
    _membership("windows", "sliding windows against the reference", "A1", Membership, ("reference",)),
    _membership("rmia", "RMIA with the reference", "A1", Rmia, ("reference",), tasks=BOTH),
    _membership(
        "gradient_norm",
        "the norm of their gradient",
        "A2",
        Membership,
        (),
        lambda s, n: {"gradient": 3.0},
        budget="1 forward and backward pass",
        tasks=BOTH,
    ),
    Declaration(
        "membership.flagged",
        "which records can be called members with few false discoveries?",
        "A1",
        "read off the scores",
        _RUN + "membership:flagged",
        Flagged,
        BOTH,
        _SCORED,
        _one_pass,
    ),
    Declaration(
        "membership.dataset",
        "was the set as a whole in training?",
        "A1",
        "read off the scores",
        _RUN + "membership:dataset",
        Dataset,
        LANGUAGE,
        _SCORED,
        _one_pass,
    ),
    Declaration(
        "memory.recognition",
        "is a record recognised against a never-seen one, whether or not it is recalled?",
        "A1",
        "read off the one pass",
        _RUN + "memory:recognition",
        Plain,
        LANGUAGE,
        _SCORED,
    ),
    Declaration(
        "memory.bits",
        "how many bits of the records does the model hold?",
        "A1",
        "read off the one pass",
        _RUN + "memory:bits",
        Bits,
    ),
    Declaration(
        "memory.counterfactual",
        "how much does seeing a record change the model on it?",
        "A4",
        "fine-tunes on random halves of the records",
        _RUN + "memory:counterfactual",
        Counterfactual,
        cost=lambda s, n: {"training": s["runs"] * (1.5 * s["epochs"] + 1.0) * n.records / n.rows},
    ),
    Declaration(
        "privacy_bound.one_run",
        "what lower bound on epsilon do planted records give?",
        "A4",
        "read off the one pass",
        _RUN + "membership:one_run",
        OneRun,
        BOTH,
        _SCORED,
    ),
    Declaration("regurgitation.rewrites", "does a rewritten or translated prompt bring the record out?", "A0"),
    Declaration("exfiltration.prompts", "do attacking prompts make the model give the record away?", "A0"),
    Declaration("model_inversion", "can an input be rebuilt from the model's outputs?", "A2", tasks=BOTH),
    Declaration("reconstruction.gradient", "can the records be rebuilt from the weights?", "A2", tasks=BOTH),
    Declaration("hidden_knowledge", "do inner layers still hold what the output hides?", "A2"),
    Declaration("recovery.quantisation", "does rounding the weights bring the records back?", "A2", tasks=BOTH),
    Declaration("recovery.pruning", "does pruning or noise bring the records back?", "A2", tasks=BOTH),
    Declaration(
        "recovery.relearning", "does training on half of the records bring the other half back?", "A4", tasks=BOTH
    ),
    Declaration("elicitation.soft_prompt", "does a learnt prompt bring the records out?", "A2"),
    Declaration("elicitation.adversarial", "does a searched suffix bring the records out?", "A2"),
    Declaration("edit_difference", "do both checkpoints together show what was removed?", "A3", tasks=BOTH),
    Declaration("recovery.interpolation", "do mixtures of both checkpoints emit the records?", "A3", tasks=BOTH),
)


@cache
def _others() -> tuple[dict[str, Declaration], dict[str, str]]:
    found, wrong = others(GROUP, Declaration, {declaration.name for declaration in BUILT_IN})
    for name, declaration in list(found.items()):
        try:
            sum(declaration.cost(declaration.settings().model_dump(mode="json"), Size(1)).values())
        except Exception as error:
            wrong[name] = f"cannot say what it costs ({type(error).__name__})"
            del found[name]
    return found, wrong


@cache
def catalogue() -> Mapping[str, Declaration]:
    """Every attack of this installation by name: the built-in ones, then those of other packages.

    A package that cannot be loaded, or that takes a name already in use, is left out; `broken` says so.
    """
    return {declaration.name: declaration for declaration in BUILT_IN} | _others()[0]


def broken() -> tuple[str, ...]:
    """One line for each entry point that is no attack, or cannot be loaded."""
    return tuple(f"{name}: {problem}" for name, problem in sorted(_others()[1].items()))


ENTRIES: dict[str, type[Schema]] = {
    name: entry(name, declaration.settings) for name, declaration in catalogue().items()
}


def _each_once(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("expected at least one entry, found none")
    if len({one.name for one in entries}) < len(entries):
        raise ValueError("expected a different name in each entry, found one twice")
    return entries


if TYPE_CHECKING:
    Attacks = tuple[Any, ...]
else:
    Attacks = Annotated[
        tuple[Annotated[Union[tuple(ENTRIES.values())], Field(discriminator="name")], ...],  # noqa: UP007
        AfterValidator(_each_once),
    ]


def attack_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings of one attack, defaults filled in, as a suite would hold them.

    Raises:
        UsageError: an unknown attack, one that is not part of this version, or every mistake in its settings.
    """
    declaration = catalogue().get(name)
    if declaration is None:
        near = suggestion(name, catalogue())
        raise UsageError(f"expected an attack of `unlearn ls attacks`, found another name{near}")
    if declaration.runner is None:
        raise UsageError(f"expected an attack that can run, found one that is {declaration.reason}")
    document = Document(name, Path(), {"name": name} | settings, {}, Mistakes(name))
    return parse(document, ENTRIES[name]).model_dump(mode="json")


def passes(entries: list[dict[str, Any]], size: Size) -> tuple[float, float]:
    """Forward passes of the audited model per record: with passes shared, and with each attack run alone."""
    shared: dict[str, float] = {}
    alone = 0.0
    for one in entries:
        cost = catalogue()[one["name"]].cost(one, size)
        alone += sum(cost.values())
        for view, amount in cost.items():
            shared[view] = max(shared.get(view, 0.0), amount)
    return sum(shared.values()), alone


def within(entries: list[dict[str, Any]], size: Size, budget: float | None) -> dict[str, float]:
    """Which attacks do not fit a budget, taken in the suite's order, and what each would need.

    Args:
        entries: a suite's attacks that could run.
        size: of the sets.
        budget: forward passes per record; None for no bound.

    Returns:
        Name -> passes per record it would add, for those left out.
    """
    left: dict[str, float] = {}
    taken: list[dict[str, Any]] = []
    for one in entries:
        before = passes(taken, size)[0]
        after = passes([*taken, one], size)[0]
        if budget is not None and after > budget and after > before:
            left[one["name"]] = after - before
        else:
            taken.append(one)
    return left
