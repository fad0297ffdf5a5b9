"""What attacks on one model share: each pass is made once, by the first attack that asks for it.

`Views` is what an attack's runner gets. It gives tokenised records, the per-token table of the one pass, the tables of
lower-cased and prefixed records, the reference's tables, greedy continuations, free samples, and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor, nn

from attacks.extraction.continuation import continuations
from attacks.extraction.untargeted import sample
from attacks.membership.blind import Blind, Matched, blind_images, blind_test, propensity_matched
from attacks.membership.scores import prefixed_records
from probes.errors import UsageError
from probes.likelihood import SamplingScheme, TokenTable
from probes.memorised import of_images, of_texts
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.sharedprefix import completion_log_probs
from unlearn.evidence import tokens
from unlearn.evidence.measure import Loaded, Measured, Progress, Settings, records_digest, token_table
from unlearn.records.files import as_row
from unlearn.records.raw import Message, RawRecord
from unlearn.runs.folder import digest
from unlearn.workspace import Workspace

ROLES = ("records", "control")


@dataclass(frozen=True, slots=True)
class BlindView:
    """The blind test's result: whether membership figures are confounded, and a sentence."""

    found: Blind
    confounded: bool
    statement: str


class Views:
    """One model of a run under attack.

    Attributes:
        workspace: the run.
        stage: `before`, `after` or `reference`.
        settings: measurement settings.
        seed: for every random choice.
    """

    def __init__(
        self, workspace: Workspace, stage: str, which: str, measured: Measured | None, settings: Settings
    ) -> None:
        self.workspace, self.stage, self.settings = workspace, stage, settings
        self.seed = settings.seed
        self._which = which
        self._measured = measured
        self._made: dict[Any, Any] = {}
        self._also: tuple[str, Loaded] | None = None

    # -- the model -------------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> Loaded:
        """The model with its identity."""
        return self.workspace.loaded(self._which)

    @property
    def model(self) -> nn.Module:
        """The live model."""
        return self.loaded.model

    @property
    def model_map(self) -> ModelMap:
        """Its map."""
        return self.loaded.model_map

    @property
    def task(self) -> str:
        """`causal_lm` or `image_classification`."""
        return self.workspace.checkpoint("checkpoint").task

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None where there is none."""
        try:
            return self.workspace.tokenizer()
        except UsageError:
            return None

    @property
    def progress(self) -> Progress:
        """Of the stage."""
        return self.workspace.progress

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        config = self.workspace.checkpoint("checkpoint").config
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 20)

    # -- other models ----------------------------------------------------------------------------------------------

    @property
    def edited(self) -> bool:
        """Whether this is the edited copy, so that the checkpoint before the edit is there too."""
        return self._which == "edited"

    def also(self, which: str) -> Loaded:
        """A second live model beside this one, one at a time: `checkpoint` (before the edit) or `reference`."""
        if self._also is None or self._also[0] != which:
            self._also = None  # the one before goes first
            self._also = (which, self.workspace.load(which))
        return self._also[1]

    def release(self) -> None:
        """Let the second model go."""
        self._also = None

    def original_tensor(self, name: str) -> Tensor:
        """A parameter as it was before the edit, on the CPU, by its name in the live model.

        It is read from disk, one tensor at a time, where the file holds it under one name in one piece; otherwise from
        the live original.
        """
        source = self.workspace.checkpoint("checkpoint")
        parameter = self.model.get_parameter(name)
        # The copy names its tensors as the original does, and its map fits the model that is live here.
        copy = self.workspace.checkpoint("edited")
        places = self._once("disk names", lambda: copy.disk_names(self.model)).get(name, ())
        if len(places) == 1:
            found = source.load_tensor(places[0])
            if found.shape == parameter.shape and places[0] == name:
                return found.to(parameter.dtype)
        return self.also("checkpoint").model.get_parameter(name).detach().cpu()

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """Everything but the attack itself that its outcome depends on, for keys of the store; read once a model."""
        loaded, workspace = self.loaded, self.workspace
        sets = workspace.sets()
        return {
            "tensors": loaded.tensor_digest,
            "tokenizer": loaded.tokenizer_digest,
            "settings": self.settings.as_dict(),
            "data": {role: records_digest(records) for role, records in sets.items()},
            "clusters": {role: [record.group for record in records] for role, records in sets.items()},
            "text": digest([[as_row(record) for record in self.raw(role) or []] for role in sets]),
            "edited_from": workspace.checkpoint("checkpoint").tensor_digest() if self.edited else None,
            "inputs": {what: workspace.run.input_digest(what) for what in workspace.job.inputs},
            "reference": workspace.job.reference is not None,
        }

    # -- records ---------------------------------------------------------------------------------------------------

    def has(self, role: str) -> bool:
        """Whether there is a set for this role."""
        return bool(self.workspace.sets().get(role))

    def records(self, role: str = "records") -> list[TokenRecord]:
        """A tokenised set; empty where there is none."""
        return cast("list[TokenRecord]", self.workspace.sets().get(role, []))

    def clusters(self, role: str = "records") -> list[str | None]:
        """Near-duplicate cluster of each record."""
        return [record.group for record in self.workspace.sets().get(role, [])]

    def paired_clusters(self) -> tuple[list[str | None], list[str | None]]:
        """Clusters of records and control; a drafted control record is in the cluster of its original."""
        ours, theirs = self.clusters(), self.clusters("control")
        if self.workspace.run.read_json("inputs/sets.json").get("control", {}).get("source") != "drafted":
            return ours, theirs
        numbers = [record.record_id.removeprefix("control-") for record in self.records("control")]
        return (
            [group or f"original-{number}" for number, group in enumerate(ours, start=1)],
            [group or f"original-{number}" for number, group in zip(numbers, theirs, strict=True)],
        )

    def frame(self, role: str = "records") -> pd.DataFrame:
        """Per-record figures of the one pass; empty where there is no such set."""
        return self._one_pass.tables.get(role, pd.DataFrame())

    def most_probable(self, n: int, role: str = "records") -> list[TokenRecord]:
        """The n records of a set with the lowest mean loss in the one pass, lowest first; ties in input order."""
        losses = self.frame(role)["loss"].to_numpy()
        return [self.records(role)[int(i)] for i in np.argsort(losses, kind="stable")[:n]]

    def plain(self, role: str = "records") -> pd.DataFrame:
        """The graded figures of `probes.memorised` on the model without an attack, read off the one pass."""
        frame = self.frame(role)
        return of_images(frame) if self.task == "image_classification" else of_texts(frame)

    def paraphrases(self) -> dict[str, list[str]]:
        """Other prompts for each record, by record id, where the run has a file of them."""
        return self.workspace.paraphrases()

    def prompt_template(self, role: str = "records") -> str | None:
        """What was put around the prompts of a set when its file was read, with `{prompt}`; None for nothing."""
        source = self.workspace.job.sources.get(role)
        return None if source is None else source.prompt_template

    def table(self, role: str = "records") -> TokenTable:
        """The per-token table of the one pass."""
        return self._one_pass.tokens[role]

    @property
    def _one_pass(self) -> Measured:
        if self._measured is None:
            raise UsageError(
                "expected an attack that reads the one pass to name `pass` in its cost, found one that does not"
            )
        return self._measured

    @property
    def noise(self) -> float:
        """Logit margin below which a greedy verdict is uncertain."""
        return float(self._one_pass.engine.get("logit_noise", 0.0))

    def raw(self, role: str) -> list[RawRecord] | None:
        """Records with their text; None where they came as token ids or images."""
        if role in self.workspace.live.records or not self.workspace.run.file(f"private/{role}.jsonl").exists():
            return None
        found = self._once(("raw", role), lambda: self.workspace.raw(role))
        return None if any(record.form in ("ids", "image") for record in found) else cast("list[RawRecord]", found)

    @property
    def text(self) -> bool:
        """Whether the records came as text."""
        return self.raw("records") is not None and (not self.has("control") or self.raw("control") is not None)

    def encode(self, raw: Sequence[RawRecord]) -> list[TokenRecord]:
        """Records with text, tokenised as the run's own were."""
        return cast("list[TokenRecord]", self.workspace.tokenise("records", list(raw)))

    def strings(self, role: str = "records", *, prompt: bool = True) -> list[str]:
        """Records as strings: decoded where there is a tokenizer, ids spelled out otherwise.

        Args:
            role: the record set.
            prompt: whether the prompt stands in front of the completion.
        """
        return self.decode([record.ids if prompt else record.completion for record in self.records(role)])

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Token ids as strings."""
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in ids]
        return [
            str(self.tokenizer.decode(list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for row in ids
        ]

    # -- passes ----------------------------------------------------------------------------------------------------

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def score(self, records: Sequence[TokenRecord]) -> TokenTable:
        """One pass over other records than those of the run."""
        return token_table(self.loaded, records, self.settings)

    def lower(self, role: str) -> TokenTable:
        """The pass over a set in lower case."""

        def make() -> TokenTable:
            return self.score(self.encode([_lowered(record) for record in self.raw(role) or []]))

        return cast("TokenTable", self._once(("lower", role), make))

    def reference(self, role: str) -> TokenTable:
        """The reference's table of a set, as its own stage left it."""

        def make() -> TokenTable:
            path = self.workspace.run.file(f"private/tokens/reference-{role}.npz")
            return tokens.load(path, self.records(role), self.settings.scheme, self.settings.schemes)

        return cast("TokenTable", self._once(("reference", role), make))

    def reference_frame(self, role: str) -> pd.DataFrame:
        """The reference's per-record figures of a set."""
        return cast("pd.DataFrame", self._once(("frame", role), lambda: self._read_reference(role)))

    def _read_reference(self, role: str) -> pd.DataFrame:
        return self.workspace.run.read_table(f"reference/{role}.parquet")

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference, measured in its own stage before this one, that is not this model."""
        return self.stage != "reference" and self.workspace.job.reference is not None

    def continuations(self, role: str) -> list[tuple[int, ...]]:
        """What greedy decoding emits after each prompt, as many tokens as the completion has."""

        def make() -> list[tuple[int, ...]]:
            found = continuations(
                self.model,
                self.records(role),
                self.table(role),
                noise=self.noise,
                model_map=self.model_map,
            )
            rows = [
                {"id": record.record_id, "ids": list(ids)}
                for record, ids in zip(self.records(role), found, strict=True)
            ]
            self.workspace.run.write_jsonl(f"private/generations/{self.stage}-{role}.jsonl", rows)
            return found

        return cast("list[tuple[int, ...]]", self._once(("continuations", role), make))

    def samples(self, n: int, length: int, scheme: SamplingScheme) -> list[tuple[int, ...]]:
        """Free samples, kept in the private folder."""

        def make() -> list[tuple[int, ...]]:
            found = [
                tuple(ids)
                for ids in sample(self.model, n, length, scheme=scheme, prompt_ids=self.opening, seed=self.seed)
            ]
            name = f"private/generations/{self.stage}-samples-{n}-{length}.jsonl"
            self.workspace.run.write_jsonl(name, [{"ids": list(ids)} for ids in found])
            return found

        return cast("list[tuple[int, ...]]", self._once(("samples", n, length, scheme), make))

    @property
    def opening(self) -> list[int]:
        """What a free sample starts from: the beginning-of-sequence token, else the end-of-sequence one."""
        config = self.workspace.checkpoint("checkpoint").config
        for source in (self.tokenizer, None):
            for name in ("bos_token_id", "eos_token_id"):
                found = getattr(source, name, None) if source is not None else config.get(name)
                if isinstance(found, list):
                    found = found[0] if found else None
                if found is not None:
                    return [int(found)]
        return [self.records()[0].ids[0]] if self.has("records") else [0]

    def made(self, key: Any) -> bool:
        """Whether something was made already."""
        return key in self._made

    def rows(self, table: TokenTable, chosen: np.ndarray) -> TokenTable:
        """The part of a table that belongs to some of its records."""
        places = np.concatenate([np.arange(table.offsets[i], table.offsets[i + 1]) for i in chosen])
        sizes = np.diff(table.offsets)[chosen]
        columns = ("log_prob", "log_sampled", "rank", "margin", "gap", "mean", "variance")
        return replace(
            table,
            record_ids=tuple(table.record_ids[int(i)] for i in chosen),
            compressed_bytes=table.compressed_bytes[chosen],
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            log_schemes=table.log_schemes[places] if len(table.log_schemes) else table.log_schemes,
            **{name: getattr(table, name)[places] for name in columns},
        )

    def prefixed(self, records: Sequence[TokenRecord], shots: Sequence[TokenRecord]) -> np.ndarray:
        """[R] log-probabilities of completions behind other records, which are run once.

        Shots that do not fit before the longest record of either set are left out, so that all records, members or
        not, share what stands before them.
        """
        texts = cast("list[TokenRecord]", [record for role in ROLES for record in self.records(role)])
        room = self.max_length - max(len(record.ids) for record in texts)
        fitting = list(shots)
        while len(fitting) > 1 and sum(len(shot.ids) for shot in fitting) > room:
            fitting.pop(0)
        behind = prefixed_records(records, fitting, self.max_length, keep=self.kept(records))
        return completion_log_probs(
            self.model, behind, model_map=self.model_map, batch_tokens=self.settings.batch_tokens
        )

    def kept(self, records: Sequence[TokenRecord]) -> int:
        """How many tokens open every record: a beginning-of-sequence token, or none."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return int(bos is not None and all(record.ids[0] == bos for record in records))

    @cached_property
    def blind(self) -> BlindView:
        """The blind test of records against control, run once."""
        ours, theirs = self.paired_clusters()
        groups: dict[str, Any] = {"clusters": ours, "other_clusters": theirs, "seed": self.seed}
        if self.task == "image_classification":
            pixels = [[cast("ImageRecord", r).pixels.numpy() for r in self.records(role)] for role in ROLES]
            found = blind_images(pixels[0], pixels[1], **groups)
        else:
            found = blind_test(self.strings(), self.strings("control"), **groups)
        return BlindView(found, found.status == "confounded", found.reason)

    @cached_property
    def matched(self) -> Matched:
        """Pairs of a record and a control record that look alike to the blind test, found once."""
        return propensity_matched(self.blind.found, seed=self.seed)

    def halves(self, role: str = "control") -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of two random halves of a set, clusters kept together."""
        groups = [group if group is not None else f"{i}" for i, group in enumerate(self.clusters(role))]
        names = list(dict.fromkeys(groups))
        order = np.random.default_rng([self.seed, 7]).permutation(len(names))
        first = {names[int(i)] for i in order[: len(names) // 2]}
        side = np.array([group in first for group in groups], dtype=bool)
        return np.flatnonzero(side), np.flatnonzero(~side)


def _lowered(record: RawRecord) -> RawRecord:
    def lower(text: str | None) -> str | None:
        return text.lower() if text is not None else None

    messages = record.messages and tuple(Message(turn.role, turn.content.lower()) for turn in record.messages)
    return replace(
        record,
        text=lower(record.text),
        prompt=lower(record.prompt),
        completion=lower(record.completion),
        messages=messages,
    )
