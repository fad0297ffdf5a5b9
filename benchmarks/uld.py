"""Unlearning from logit difference: a step of training against one of NPO, a token against the original's.

Training: `train_assistant` and NPO's own trainer see the same records in the same number of steps, 8 to forget and 8 to
keep in each; wordings are left out on both sides. Decoding: greedy, one row and a batch, the copy against the original.
The bound on decoding is 1 + K / M + 10 %, K of M blocks being the assistant's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject, completions, random_ids
from probes.modelmap import ModelMap
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.editors.assistant import train_assistant
from unlearn.editors.base import EditContext
from unlearn.editors.losses import NPOEditor
from unlearn.editors.uld import ULDParameters, difference

STEPS, BATCH = 2, 8
_PLAIN: dict[str, Any] = {"patience": None, "paraphrases": 0, "perturbed": 0}


def run(subject: Subject) -> Iterator[Ratio]:
    records = completions(subject)
    with tempfile.TemporaryDirectory() as work:
        context = EditContext(
            source=open_checkpoint(subject.folder),
            model=subject.model,
            model_map=subject.model_map,
            forget=records[: len(records) // 2],
            retain=records[len(records) // 2 :],
            seed=0,
            work=Path(work),
        )
        blocks = len(subject.model_map.blocks)
        for rank, name in ((16, "equal rank"), (32, "the preset's rank")):
            parameters = ULDParameters(
                steps=STEPS,
                batch_size=BATCH,
                retain_batch_size=BATCH,
                rank=rank,
                patience=None,
                paraphrases=0,
                perturbed=0,
            )
            npo = NPOEditor({"steps": STEPS, "batch_size": BATCH, "retain_batch_size": BATCH, "epochs": 1})
            seconds = interleave(
                {
                    "uld": lambda p=parameters: train_assistant(context, p),  # type: ignore[misc]
                    "npo": lambda editor=npo: _npo(editor, context),  # type: ignore[misc]
                },
                subject,
            )
            yield Ratio(f"training, {name}", seconds["npo"], seconds["uld"], note="NPO over ULD")
        for first in (0, -(-blocks // 4) // 2):
            parameters = ULDParameters(
                steps=1, batch_size=2, patience=None, paraphrases=0, perturbed=0, first_block=first
            )
            trained = train_assistant(context, parameters)
            copy = difference(context, trained, parameters.rule())
            share = (trained.statistics["blocks"] - first) / blocks
            for rows in (1, 8):
                ids = random_ids(subject, rows, 16 if subject.tiny else 64)
                seconds = interleave(
                    {"copy": _decoding(copy, ids, subject), "original": _decoding(subject.model, ids, subject)}, subject
                )
                yield Ratio(
                    f"decoding, {rows} rows, adapters from block {first}",
                    seconds["copy"],
                    seconds["original"],
                    subject.target(1 + share + 0.10),
                    note=f"{share:.2f} of the blocks on top",
                )


def _npo(editor: NPOEditor, context: EditContext) -> None:
    """NPO's training without writing its checkpoint."""
    editor._train(context, editor.selected(ModelMap.of(context.model)), STEPS)


def _decoding(model: Any, ids: torch.Tensor, subject: Subject) -> Callable[[], object]:
    new = 8 if subject.tiny else 32

    def generate() -> object:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

    return generate
