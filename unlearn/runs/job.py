"""What one run was asked to do, resolved and frozen: the same for a command line, a request file and a Python call.

The job is written to `private/job.json` before anything else, so an interrupted run can go on from the folder alone.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from probes.errors import UsageError
from unlearn.records.raw import RecordFormat
from unlearn.requests.presets import Criterion

ROLES = ("records", "control", "retain")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one record set comes from."""

    location: str
    fields: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    completion_template: str | None = None
    ignore_unknown: bool = False
    text_prompt_tokens: int = 1

    @classmethod
    def of(cls, location: str, fmt: RecordFormat, text_prompt_tokens: int = 1) -> Source:
        """A location with its format spelled out."""
        return cls(
            location,
            dict(fmt.fields),
            fmt.prompt_template,
            fmt.completion_template,
            fmt.ignore_unknown,
            text_prompt_tokens,
        )

    def format(self) -> RecordFormat:
        """For `read_records`."""
        return RecordFormat(self.fields, self.prompt_template, self.completion_template, self.ignore_unknown)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything a user may choose that is not part of a request.

    Attributes:
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, ...
        dtype: of the loaded weights and of the arithmetic.
        seed: for every random choice.
        batch_size: records per batch; None groups records by length under a token budget.
        online: allow hub ids.
        allow_pickle: read pickled weights where there are no safetensors.
        trust_remote_code: run code that comes with a checkpoint.
    """

    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    batch_size: int | None = None
    online: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def resolved_device(self) -> str:
        """The device itself, `auto` decided."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        kind: `audit`, `forget`, `attack` (one attack, judge nothing), `probe` (look inside, judge nothing) or `edit`
            (a copy without an audit).
        checkpoint: path or hub id of the checkpoint; `live` for a module in memory.
        sources: record sets that were given, by role.
        criteria: what is judged, by kind of model, fixed before any model is loaded.
        suite: the resolved suite; of a probe run its `probes` alone.
        options: see `Options`.
        reference: path or hub id of the reference checkpoint.
        reference_kind: what the reference is.
        method: editor name and parameters, for `forget` and `edit`.
        request: the redacted request, for the report.
        policy: name of the policy the criteria come from, or `request`.
        expected: tensor digests the request states, by `checkpoint` and `reference`.
        sha256: digests of record files the request states, by role.
        factors: curvature factor files of a probe run: one to `read`, one to `write`.
        inputs: `corpus`, `canaries`, `candidates` and `paraphrases` where they were given, as `Source` fields.
        duplicates: how near-duplicates in the corpus are treated: `include`, `threshold`, `span`.
    """

    kind: Literal["audit", "forget", "attack", "probe", "edit"]
    checkpoint: str
    sources: dict[str, Source]
    criteria: dict[str, tuple[Criterion, ...]]
    suite: dict[str, Any]
    options: Options
    reference: str | None = None
    reference_kind: str | None = None
    method: dict[str, Any] | None = None
    request: dict[str, Any] | None = None
    policy: str = "default"
    expected: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    factors: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        value = asdict(self)
        value["criteria"] = {
            task: [criterion.model_dump(mode="json") for criterion in criteria]
            for task, criteria in self.criteria.items()
        }
        return value

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read `private/job.json`.

        Raises:
            UsageError: if the run was stopped before its job was written, or its private folder is gone.
        """
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError):
            raise UsageError("expected private/job.json in the run folder, found none; start a new run") from None
        value["sources"] = {role: Source(**source) for role, source in value["sources"].items()}
        value["criteria"] = {
            task: tuple(Criterion(**criterion) for criterion in criteria)
            for task, criteria in value["criteria"].items()
        }
        value["options"] = Options(**value["options"])
        return cls(**value)


def environment(device: str) -> dict[str, Any]:
    """What a measurement depends on beside its inputs, for the run folder and the report."""
    import torch

    from unlearn._version import __version__
    from unlearn.runs.cache import library_versions

    found: dict[str, Any] = {
        "unlearn-audit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": library_versions(),
        "threads": torch.get_num_threads(),
        "device": device,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processors": os.cpu_count(),
    }
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found
