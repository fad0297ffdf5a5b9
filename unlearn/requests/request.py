"""The request: what is to be forgotten, from which checkpoint, with what, and how it is judged.

One YAML file (`schema: unlearn.request/v1`); `template()` is a commented example. Relative paths start at the file's
folder; a data set or checkpoint on the hub is written `hub:owner/name`. Record text never stands in a request: records
live in files of their own. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from probes.errors import IntegrityError, UsageError
from unlearn.mistakes import MistakesError, suggestion
from unlearn.records.files import read_records
from unlearn.records.raw import FIELDS, RecordFormat
from unlearn.requests.presets import (
    Criterion,
    MethodPreset,
    Policy,
    Suite,
    Task,
    Text,
    criteria_digest,
    distinct,
    is_file_name,
    load_method,
    load_policy,
    load_suite,
    method_names,
    one_task,
)
from unlearn.requests.yamlfile import Document, Schema, parse, read_yaml

__all__ = [
    "Criterion",
    "MethodPreset",
    "Policy",
    "RecordSet",
    "Request",
    "Suite",
    "check_digests",
    "criteria_digest",
    "criteria_for",
    "hub_id",
    "load_method",
    "load_policy",
    "load_request",
    "load_suite",
    "record_sets",
    "redacted",
    "template",
    "validate_file",
]

HUB = "hub:"
PATHS = ("path", "paraphrase_file", "assistant")  # parameters of methods that are files or folders


def _located(value: str, info: ValidationInfo) -> str:
    """An existing path, made absolute against the request's folder; a hub id as it is."""
    if value.startswith(HUB):
        return value
    folder = (info.context or {}).get("folder", Path.cwd())
    try:
        path = (folder / Path(value).expanduser()).resolve()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):
        raise ValueError("expected a path, found one this system cannot express") from None
    if not exists:
        raise ValueError("expected an existing file or folder, found none")
    return str(path)


def _sha256(value: str) -> str:
    digits = value.removeprefix("sha256:").lower()
    if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ValueError("expected sha256: and 64 hexadecimal digits")
    return f"sha256:{digits}"


def _pseudonym(value: str) -> str:
    digits = value.removeprefix("hmac:")
    if not value.startswith("hmac:") or len(digits) < 4 or not set(digits) <= set("0123456789abcdef"):
        raise ValueError("expected hmac: and hexadecimal digits, never a name")
    return value


def _loaded_by(load: Callable[[str], object]) -> AfterValidator:
    """A preset's name, or the absolute path of its file, once it has been read without a mistake."""

    def check(value: str, info: ValidationInfo) -> str:
        chosen = _located(value, info) if is_file_name(value) else value
        try:
            load(chosen)
        except UsageError as error:
            raise ValueError(" | ".join(str(error).splitlines())) from None
        return chosen

    return AfterValidator(check)


Location = Annotated[Text, AfterValidator(_located)]
Sha256 = Annotated[str, AfterValidator(_sha256)]


class Subject(Schema):
    """Whom or what the request is about: a keyed pseudonym, never a name."""

    kind: Literal["person", "work", "secret"]
    pseudonym: Annotated[str, AfterValidator(_pseudonym)]
    key_id: Text


class _Columns(Schema):
    """How a record file is read (see `unlearn.records.tokens.RecordFormat`)."""

    sha256: Sha256 | None = None
    fields: dict[str, Text] = Field(default_factory=dict)
    prompt_template: str | None = None
    completion_template: str | None = None
    ignore_unknown: StrictBool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not set(self.fields) <= set(FIELDS):
            raise ValueError(f"expected `fields` to map names among {', '.join(FIELDS)} to columns")
        try:
            self.format()
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def format(self) -> RecordFormat:
        """For `read_records`."""
        return RecordFormat(self.fields, self.prompt_template, self.completion_template, self.ignore_unknown)


class Data(_Columns):
    """The records to be forgotten."""

    records: Location
    text_prompt_tokens: Annotated[StrictInt, Field(ge=1)] = 1
    categories: tuple[Text, ...] = ()
    special: StrictBool | None = None


class RecordSet(_Columns):
    """A control or retain set."""

    path: Location


class Corpus(RecordSet):
    """Text in which near-duplicates of the records are looked for.

    Attributes:
        near_duplicates: `list` names those that the request does not cover; `include` adds them to the records.
        threshold: Jaccard similarity of word 5-shingles.
        span: tokens of an exact common span.
    """

    near_duplicates: Literal["list", "include"] = "list"
    threshold: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.8
    span: Annotated[StrictInt, Field(ge=5)] = 50


class Checkpoint(Schema):
    """The checkpoint to be edited (a copy of it)."""

    path: Location
    tensor_digest: Sha256 | None = None
    trained_on_records: Literal["known", "believed", "unknown"] = "unknown"


class Reference(Schema):
    """A checkpoint that never held the records."""

    kind: Literal["retrained_without", "never_trained_base", "shadow"]
    path: Location
    tensor_digest: Sha256 | None = None


class Copy(Schema):
    """One place the records' influence may also live."""

    what: Text
    included: StrictBool
    reason: Text | None = None


class Scope(Schema):
    """Which copies and recipients the request covers."""

    copies: tuple[Copy, ...] = ()
    recipients: tuple[Text, ...] = ()


class Method(Schema):
    """The editor, by registered name, and where its parameters come from: a preset (by default its namesake)."""

    name: Text = "ssd"
    preset: Annotated[Text, _loaded_by(load_method)] | None = None
    overrides: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _registered(cls, value: str) -> str:
        known = method_names()
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}{suggestion(value, known)}")
        return value

    @field_validator("preset")
    @classmethod
    def _same_method(cls, value: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if value is not None and name is not None and load_method(value).name != name:
            raise ValueError("expected a preset of the method, found one of another method")
        return value

    @field_validator("overrides")
    @classmethod
    def _parameters(cls, value: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if "name" in info.data and "preset" in info.data:
            known = load_method(info.data["preset"] or info.data["name"]).parameters
            for position, key in enumerate(value, start=1):
                if key not in known:
                    near = suggestion(key, known) or f"; known: {', '.join(known)}"
                    raise ValueError(f"entry {position} is no parameter of the preset{near}")
        # like every path of a request, these start at its folder
        return value | {key: _located(path, info) for key in PATHS if isinstance(path := value.get(key), str)}

    def parameters(self) -> dict[str, JsonValue]:
        """The preset's parameters with the overrides."""
        return load_method(self.preset or self.name).parameters | self.overrides


class Governance(Schema):
    """References into the organisation's own files."""

    dpia_ref: Text | None = None
    dpo_ref: Text | None = None
    ropa_ref: Text | None = None
    risk_owner: Text | None = None
    retain_report_until: date | None = None


class Request(Schema):
    """A forget request. Paths are absolute once loaded, or `hub:` ids."""

    schema_: Literal["unlearn.request/v1"] = Field(alias="schema")
    subject_request_id: UUID | None = None
    subject_request_type: (
        Literal["erasure", "objection", "memorisation_claim", "rightsholder", "authority_order"] | None
    ) = None
    regulation: Literal["gdpr", "uk_gdpr", "ccpa", "copyright_eu", "internal"] | None = None
    submitted_time: AwareDatetime | None = None
    received_time: AwareDatetime | None = None
    due_time: AwareDatetime | None = None
    answered_time: AwareDatetime | None = None
    manner: Text | None = None
    ground: Text | None = None
    exemptions_considered: tuple[Text, ...] = ()
    subject: Subject | None = None
    data: Data
    checkpoint: Checkpoint
    scope: Scope | None = None
    reference: Reference | None = None
    control: RecordSet | None = None
    retain: RecordSet | None = None
    related: RecordSet | None = None
    corpus: Corpus | None = None
    paraphrases: Location | None = None
    method: Method = Method()
    suite: Annotated[Text, _loaded_by(load_suite)] = "standard"
    policy: Annotated[Text, _loaded_by(load_policy)] | None = None
    criteria: tuple[Criterion, ...] = ()
    governance: Governance | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = []
        times = [time for time in (self.submitted_time, self.received_time, self.answered_time) if time is not None]
        if times != sorted(times):
            wrong.append("expected submitted_time, received_time and answered_time in this order")
        if self.criteria and self.policy is not None:
            wrong.append("expected `criteria` or `policy`, found both")
        try:
            distinct((criterion.id for criterion in self.criteria), "criterion id")
            one_task(self.criteria, ("causal_lm", "image_classification"))
        except ValueError as error:
            wrong.append(f"criteria: {error}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def hub_id(location: str) -> str | None:
    """The hub id of a location, or None for a path."""
    return location.removeprefix(HUB) if location.startswith(HUB) else None


def record_sets(request: Request) -> Iterator[tuple[str, Data | RecordSet, str]]:
    """Role, how to read it, and location of every record set that is given."""
    yield "records", request.data, request.data.records
    for role, part in (("control", request.control), ("retain", request.retain), ("related", request.related)):
        if part is not None:
            yield role, part, part.path


def load_request(path: str | Path) -> Request:
    """Read a request and check everything that can be checked without a model: the files and presets it names too.

    Raises:
        UsageError: with every mistake, by line.
    """
    return parse(read_yaml(path), Request)


def criteria_for(request: Request, task: Task) -> tuple[Criterion, ...]:
    """The criteria a run is judged by: the request's own, or its policy's for this kind of model."""
    return request.criteria or load_policy(request.policy or "default").criteria("forget", task)


def check_digests(request: Request) -> None:
    """Compare the `sha256` of every record file that states one.

    Raises:
        IntegrityError: if a file is not the one the request was written for.
        UsageError: if a digest is stated for a folder or a hub id, or the file cannot be read.
    """
    for name, part, location in record_sets(request):
        if part.sha256 is None:
            continue
        if not Path(location).is_file():
            raise UsageError(f"expected a single file where {name}.sha256 is given, found none; remove it")
        digest = hashlib.sha256()
        with Path(location).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        if f"sha256:{digest.hexdigest()}" != part.sha256:
            raise IntegrityError(
                f"expected the file of {name} to have the stated sha256, found another; was it changed?"
            )


def redacted(request: Request) -> dict[str, Any]:
    """The request for the run folder: no column names, no templates, of a checkpoint's path the last part only."""
    shown: dict[str, Any] = request.model_dump(mode="json", by_alias=True, exclude_none=True)
    shown.pop("paraphrases", None)
    for name in ("data", "control", "retain", "related"):
        for key in ("records", "path", "fields", "prompt_template", "completion_template", "ignore_unknown"):
            shown.get(name, {}).pop(key, None)
    for name in ("checkpoint", "reference"):
        if name in shown:
            shown[name]["path"] = shown[name]["path"].rsplit("/", 1)[-1]
    method = shown["method"]
    named = [(method.get("overrides", {}), key) for key in PATHS]
    for part, key in ((shown, "suite"), (shown, "policy"), (method, "preset"), *named):
        if isinstance(part.get(key), str):
            part[key] = part[key].rsplit("/", 1)[-1]
    return shown


_SCHEMAS: dict[str, type[Schema]] = {
    "unlearn.request/v1": Request,
    "unlearn.policy/v1": Policy,
    "unlearn.suite/v1": Suite,
    "unlearn.method/v1": MethodPreset,
}


def validate_file(path: str | Path) -> list[str]:
    """Every mistake of a request (and the record files it names), policy, suite, method preset or record file.

    Returns:
        One line a mistake; empty when the file is good.

    Raises:
        UsageError: if there is no such file, or it cannot be read.
        IntegrityError: if all is well but for a `sha256` that is another file's.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise UsageError(f"expected an existing file, found none at {path}")
        if not is_file_name(file.name.lower()):
            read_records(file)
        else:
            _validate_yaml(read_yaml(file))
    except MistakesError as error:
        return list(error.mistakes)
    return []


def _validate_yaml(document: Document) -> None:
    stated = document.content.get("schema")
    model = _SCHEMAS.get(stated) if isinstance(stated, str) else None
    if model is None:
        found = "another" if "schema" in document.content else "none"
        what = f"`schema`: expected one of {', '.join(_SCHEMAS)}, found {found}"
        document.mistakes.add(document.name, document.line(("schema",)), what)
        raise document.mistakes.error()
    lines: list[str] = []
    request: Schema | None = None
    try:
        request = parse(document, model)
    except MistakesError as error:
        lines += error.mistakes
    if model is Request:
        for role, key, kind in (
            ("records", "data", Data),
            ("control", "control", RecordSet),
            ("retain", "retain", RecordSet),
            ("related", "related", RecordSet),
        ):
            lines += _record_mistakes(document, role, key, kind)
    if not lines and isinstance(request, Request):
        check_digests(request)
    if lines:
        raise MistakesError(document.name, lines)


def _record_mistakes(document: Document, role: str, key: str, kind: type[Data] | type[RecordSet]) -> list[str]:
    """Mistakes in one record file of a request, also where the request itself has some elsewhere."""
    try:
        part = kind.model_validate(document.content.get(key), context={"folder": document.folder})
        location = part.records if isinstance(part, Data) else part.path
        if hub_id(location) is None:
            read_records(location, role=role, fmt=part.format())
    except MistakesError as error:
        return list(error.mistakes)
    except ValidationError:  # absent, or reported with the request
        pass
    return []


def template() -> str:
    """A commented request for `unlearn init`; it is valid as soon as the files it names exist."""
    return _TEMPLATE


_TEMPLATE = """\
# A forget request. Check it with:  unlearn validate request.yaml
# Run it with:                      unlearn forget request.yaml
# Paths start at this file's folder. A checkpoint or data set on the hub is written hub:owner/name.
schema: unlearn.request/v1

# Who asked for what, for the report. All optional; never a name or an address here.
# subject_request_id: 3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a
# subject_request_type: erasure          # erasure | objection | memorisation_claim | rightsholder | authority_order
# regulation: gdpr                       # gdpr | uk_gdpr | ccpa | copyright_eu | internal
# submitted_time: 2026-11-03T09:12:00Z   # also received_time, due_time, answered_time; always with a zone
# manner: web_form
# ground: "17(1)(b)"
# exemptions_considered: ["17(3)(d)"]
# subject: {kind: person, pseudonym: "hmac:8c1f00d2", key_id: dpo-2026}   # kind: person | work | secret

data:
  records: records.jsonl                 # .jsonl, .json, .csv, .tsv, .parquet or a datasets folder; one record a line:
                                         #   {"id": "a1", "prompt": "...", "completion": "..."}   or
                                         #   {"id": "a2", "text": "..."}   or messages, token ids, image + label
  # sha256: "sha256:..."                 # refuse to run on any other file
  # fields: {prompt: question, completion: answer}   # record field: column name in the file
  # prompt_template: "Question: {prompt}\\nAnswer:"   # put around every prompt, exactly as in training
  # completion_template: " {completion}"
  # ignore_unknown: false                # true: skip columns that are no record field
  # text_prompt_tokens: 1                # how many tokens of a text record only condition
  # categories: [contact]
  # special: false                       # special categories of personal data?

checkpoint:
  path: checkpoint                       # never changed: the edited copy is written elsewhere
  # tensor_digest: "sha256:..."          # refuse to run on any other weights
  # trained_on_records: unknown          # known | believed | unknown

# scope:                                 # where else the records may live, for the report
#   copies: [{what: gguf_q4, included: false, reason: exported again after the edit}]
#   recipients: []

# A checkpoint that never held the records: the strongest comparison there is.
# reference: {kind: never_trained_base, path: base}   # retrained_without | never_trained_base | shadow

# Never-seen records like the ones above, and data whose behaviour must stay. Without them both are drafted from the
# records and the model, and the report says so. `unlearn draft control|retain` writes them to a file for review.
# control: {path: control.jsonl}         # sha256, fields, templates and ignore_unknown as under data
# retain: {path: retain.jsonl}
# related: {path: related.jsonl}         # text about the same things, none of the records: a re-audit trains on it
# paraphrases: paraphrases.jsonl         # {"id": "a1", "prompts": ["...", "..."]}: other words, other languages,
#                                        # each a whole prompt: no template is put around it
# corpus: {path: corpus.jsonl, near_duplicates: include}   # or list: name what the request does not cover

method:
  name: ssd
  # preset: ssd                          # or ssd_official, or the path of a .yaml file
  # overrides: {alpha: 10.0}

suite: standard                          # quick | standard | deep, or the path of a .yaml file

# How the result is judged. Fixed before any model is loaded: the digest of this section is logged first.
# Without it the policy applies (policy: default, or the path of a .yaml file).
# criteria:
#   - {id: C1, metric: extraction.greedy, aggregate: rate, test: upper95, max: 0.10}
#   - {id: C2, metric: probability, aggregate: mean, test: noninferiority, against: control, margin: 0.05}
#   - {id: C3, metric: loss, aggregate: mean, test: noninferiority, against: before, set: retain, margin: 0.10}

# governance: {dpia_ref: DPIA-114, dpo_ref: DPO-2026-31, risk_owner: head-of-ml, retain_report_until: 2036-11-21}
"""
