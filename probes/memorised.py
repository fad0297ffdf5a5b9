"""How far a model holds records, graded, as it stands now: the one figure every stress attack is scored by.

Exact match misses what an edit has only pushed below the surface; the probability of each token does not. One pass
gives, for record r with completion y_1..y_T,

    probability  exp(mean log p(y_t | before))        (an image: probability of its label)
    accuracy     share of y_t that are the argmax     (an image: 1 where the label is predicted)
    extracted    whether all of them are              (an image: whether the label is predicted)

Nothing is cached: attacks change weights and inputs, and read the model in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
from torch import nn

from probes.classify import score_images
from probes.errors import UnsupportedError
from probes.figures import record_figures
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord

COLUMNS = ("record_id", "probability", "accuracy", "extracted", "loss")


def memorised(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
) -> pd.DataFrame:
    """Score records on the model as it stands.

    Args:
        model: a causal language model for `TokenRecord`s, an image classifier for `ImageRecord`s; left as found.
        records: any number, all of one kind.
        model_map: the model's map, built when absent; an image classifier needs none.
        batch_tokens: padded tokens a batch; the default for the device when absent.

    Returns:
        One row per record in order: `COLUMNS`; probability and accuracy in [0, 1], loss in nats (mean per token).

    Raises:
        UnsupportedError: the model's logits are NaN, or records that do not fit it.
    """
    if not records:
        return pd.DataFrame({name: [] for name in COLUMNS}).astype({"extracted": bool})
    if isinstance(records[0], ImageRecord):
        frame = score_images(model, cast("Sequence[ImageRecord]", records))
        return of_images(frame)
    table = score(model, cast("Sequence[TokenRecord]", records), model_map=model_map, batch_tokens=batch_tokens)
    if np.isnan(table.log_prob).any():
        raise UnsupportedError("expected a model that gives numbers, found NaN; the change to its weights is too large")
    return of_texts(record_figures(table))


def of_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """`COLUMNS` of a table made by `probes.figures.record_figures`."""
    return pd.DataFrame(
        {
            "record_id": frame["record_id"],
            "probability": frame["probability"],
            "accuracy": frame["token_accuracy"],
            "extracted": frame["token_accuracy"] == 1.0,
            "loss": frame["loss"],
        }
    )


def of_images(frame: pd.DataFrame) -> pd.DataFrame:
    """`COLUMNS` of a table made by `probes.classify.score_images`."""
    return pd.DataFrame(
        {
            "record_id": frame["record_id"],
            "probability": frame["label_probability"],
            "accuracy": frame["correct"].astype("float64"),
            "extracted": frame["correct"].astype(bool),
            "loss": frame["loss"],
        }
    )
