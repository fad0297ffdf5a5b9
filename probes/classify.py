"""Per-record figures of an image classifier: one forward pass per record.

Natural logarithms. `margin` is the label's logit minus the best other logit (positive when the label wins);
`entropy` is that of the predicted distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError
from probes.likelihood import inference, out_of_memory
from probes.records import ImageRecord

COLUMNS = ("record_id", "n_tokens", "label_probability", "loss", "margin", "entropy", "correct")


def class_logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits [B, classes] of a Hugging Face classifier or of a plain module that returns a tensor.

    Args:
        model: the classifier.
        pixels: [B, channels, height, width].

    Raises:
        UnsupportedError: if the model returns neither a tensor nor an object with `logits`.
    """
    output = model(pixels)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnsupportedError(
            "expected class logits [batch, classes] from the classifier, found another output; wrap the model"
        )
    return logits


def _rows(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 5]: label probability, loss, margin, entropy, correct."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    log_p = logits.log_softmax(-1)  # [B, classes]
    gold = log_p.gather(-1, labels[:, None]).squeeze(-1)
    others = log_p.scatter(-1, labels[:, None], -torch.inf).amax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-1.0e4)).sum(-1)
    return torch.stack([gold.exp(), -gold, gold - others, entropy, (gold > others).to(gold)], dim=-1)


def score_images(
    model: nn.Module,
    records: Sequence[ImageRecord],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Score images against their labels.

    Args:
        model: an image classifier; used in evaluation mode, unchanged.
        records: images of one shape.
        batch_size: records per batch, in input order; halved for a batch that does not fit in memory.
        progress: called with (records done, records in all).

    Returns:
        One row per record in input order: `COLUMNS` (n_tokens is 1).

    Raises:
        UnsupportedError: for labels outside the classes or an unknown model output.
        ResourceError: when a single image does not fit in memory.
    """
    device = next(model.parameters()).device
    rows: list[Tensor] = []

    def run(part: Sequence[ImageRecord]) -> None:
        labels = torch.tensor([record.label for record in part], device=device)
        try:
            logits = class_logits(model, torch.stack([record.pixels for record in part]).to(device))
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise ResourceError("expected memory for one image, found too little; use another device") from None
            logits = None
        if logits is None:
            half = (len(part) + 1) // 2
            run(part[:half])
            run(part[half:])
            return
        if int(labels.max()) >= logits.shape[-1] or int(labels.min()) < 0:
            raise UnsupportedError(f"expected labels below {logits.shape[-1]} classes, found others; check the records")
        rows.append(_rows(logits, labels).cpu())

    with inference(model):
        for start in range(0, len(records), batch_size):
            run(records[start : start + batch_size])
            if progress:
                progress(min(start + batch_size, len(records)), len(records))
    table = torch.cat(rows).numpy().astype(np.float64) if rows else np.zeros((0, 5))
    frame = pd.DataFrame(table, columns=list(COLUMNS[2:]))
    frame.insert(0, "n_tokens", 1)
    frame.insert(0, "record_id", [record.record_id for record in records])
    frame["correct"] = frame["correct"] > 0.5
    return frame
