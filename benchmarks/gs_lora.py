"""Classes forgotten one request after another: GS-LoRA beside SSD, gradient difference and retraining.

A small ViT is trained on half of scikit-learn's digits (8 by 8 pixels, ten classes). Four requests follow, of two
classes each; each edits the checkpoint that the one before it left, with the training images of its own classes and of
those still to be kept, and, as the ledger would give them, those of the classes forgotten earlier, which GS-LoRA
replays (`unprotected`: without). The other half of the images gives, after each request,

    Acc_f  accuracy on the classes of this request,
    Acc_o  accuracy on the classes of all earlier requests,
    Acc_r  accuracy on the classes that are left, and its change from what the first model had on them,
    H      2 Acc_r Drop / (Acc_r + Drop), Drop = Acc_f before this request - Acc_f after it      (arXiv 2403.11530).

Retraining trains a new model on the classes left, as long as the first. `few-shot` gives an edit four images of each
class that stays. Every option was fixed beforehand: the presets as they are, and for gradient difference GS-LoRA's
rate, and its bound to end at. Nothing was chosen by these figures. Each is the mean over seeds, of the first model and
of the edits, with the lowest and the highest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.subject import Subject
from probes.classify import score_images
from probes.modelmap import ModelMap
from probes.records import ImageRecord
from probes.training import batches, fit, full, mean_loss
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors.base import EditContext, make_editor
from unlearn.requests.presets import load_method

TASKS = ((0, 1), (2, 3), (4, 5), (6, 7))
SHOTS = 4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GS-LoRA": ("gs_lora", {}),
    "GS-LoRA++": ("gs_lora_plus", {}),
    "GS-LoRA, unprotected": ("gs_lora", {"earlier_weight": 0.0}),
    "GS-LoRA++, unprotected": ("gs_lora_plus", {"earlier_weight": 0.0}),
    "SSD": ("ssd", {}),
    "gradient difference": ("gradient_difference", {"learning_rate": 1e-3, "epochs": 10, "max_forget_loss": 4.6}),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds."""

    mean: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), min(values), max(values))

    def percent(self, sign: str = "") -> str:
        low, middle, high = (f"{100 * x:{sign}.1f}" for x in (self.lowest, self.mean, self.highest))
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Task:
    """What one request did under one method."""

    case: str
    forgotten: Spread
    earlier: Spread | None
    retained: Spread
    change: Spread
    harmonic: Spread
    active: Spread | None

    @property
    def median(self) -> float:
        return self.harmonic.mean

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def harmonic(retained: float, drop: float) -> float:
    """H of GS-LoRA: the harmonic mean of two accuracies, 0 where one of them is not above 0."""
    return 2 * retained * drop / (retained + drop) if retained > 0 and drop > 0 else 0.0


def digits() -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Halves of scikit-learn's digits: to train on and to measure on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(labels))
    records = [ImageRecord(str(i), pixels[i], int(labels[i])) for i in order]
    return records[: len(records) // 2], records[len(records) // 2 :]


def trained(records: Sequence[ImageRecord], seed: int, steps: int, classes: int = 10) -> ViTForImageClassification:
    """A ViT of six blocks that reads square images as 4 by 4 patches."""
    size = records[0].pixels.shape[-1]
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=size,
        patch_size=size // 4, num_channels=1, num_labels=classes, initializer_range=0.1
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config).eval()
    loss, order = mean_loss(model, records), list(batches(len(records), 64, steps, seed))
    with full(model, keep=True) as parameters:
        fit(parameters, lambda i: loss(order[i]), steps=steps, learning_rate=1e-3, weight_decay=0.01, warm_up=20,
            decay="linear")  # fmt: skip
    return model


def _accuracy(model: Any, records: Sequence[ImageRecord]) -> float:
    return float(score_images(model, records, batch_size=256).correct.mean())


def _few(records: Sequence[ImageRecord], each: int) -> list[ImageRecord]:
    seen: dict[int, int] = {}
    kept = []
    for record in records:
        seen[record.label] = seen.get(record.label, 0) + 1
        if seen[record.label] <= each:
            kept.append(record)
    return kept


def _edit(
    source: Checkpoint, out: Path, method: str, forget: list[ImageRecord], retain: list[ImageRecord],
    earlier: list[ImageRecord], seed: int,
) -> int | None:  # fmt: skip
    """One edit; returns the number of groups left, where the method has groups."""
    preset, overrides = METHODS[method]
    loaded = load_method(preset)
    model, work = source.load_model(), out.with_name(f"{out.name}-work")
    work.mkdir()
    editor = make_editor(loaded.name, dict(loaded.parameters) | overrides)
    context = EditContext(source, model, ModelMap.of(model), forget, retain, seed, work, earlier=earlier)
    result = editor.edit(context, out)
    return result.statistics.get("active_groups")


def _sequence(
    method: str, few: bool, seed: int, first: Any, steps: int, folder: Path, known: list[ImageRecord],
    unseen: list[ImageRecord],
) -> list[dict[str, Any]]:  # fmt: skip
    """Acc_f, Acc_o, Acc_r and H after each request."""
    first.save_pretrained(folder / "0")
    checkpoint, model, rows = open_checkpoint(folder / "0"), first, []
    for k, classes in enumerate(TASKS):
        left = [c for c in range(10) if c > classes[-1]]
        here, stay = ([r for r in unseen if r.label in those] for those in (classes, left))
        before = _accuracy(model, here)
        retain = [r for r in known if r.label in left]
        retain = _few(retain, SHOTS) if few else retain
        active = None
        if method == "retraining":
            model, before = trained(retain, seed + 100, steps), _accuracy(first, here)
        else:
            out = folder / str(k + 1)
            mine, past = ([r for r in known if r.label in those] for those in (classes, range(classes[0])))
            active = _edit(checkpoint, out, method, mine, retain, past, seed)
            checkpoint = open_checkpoint(out)
            model = checkpoint.load_model()
        gone, kept = _accuracy(model, here), _accuracy(model, stay)
        earlier = [r for r in unseen if r.label < classes[0]]
        rows.append({
            "forgotten": gone,
            "earlier": _accuracy(model, earlier) if earlier else None,
            "retained": kept,
            "change": kept - _accuracy(first, stay),
            "harmonic": harmonic(kept, before - gone),
            "active": active,
        })  # fmt: skip
    return rows


def run(subject: Subject) -> Iterator[Task]:
    """A row for each method and request."""
    known, unseen = digits()
    seeds, steps = (range(1), 30) if subject.tiny else (range(3), 300)
    firsts = [trained(known, seed, steps) for seed in seeds]
    cases = [(method, False) for method in (*METHODS, "retraining")]
    cases += [(method, True) for method in ("GS-LoRA", "GS-LoRA++", "gradient difference")]
    for method, few in cases:
        found = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as work:
                found.append(_sequence(method, few, seed, firsts[seed], steps, Path(work), known, unseen))
        for k in range(len(TASKS)):
            rows = [rows[k] for rows in found]
            values = {key: None if rows[0][key] is None else Spread.of([row[key] for row in rows]) for key in rows[0]}
            name = f"{method}, few-shot" if few else method
            yield Task(f"{name}: request {k + 1}", **values)  # type: ignore[arg-type]


def table(rows: Sequence[Task]) -> str:
    """Percentages; `blocks` is how many of the six were changed."""
    lines = [
        "| | Acc_f % | Acc_o % | Acc_r % | change of Acc_r | H % | blocks |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        earlier = "" if row.earlier is None else row.earlier.percent()
        active = "" if row.active is None else f"{row.active.mean:.1f}"
        cells = (row.forgotten.percent(), earlier, row.retained.percent(), row.change.percent("+"))
        lines.append(f"| {row.case} | {' | '.join(cells)} | {row.harmonic.percent()} | {active} |")
    return "\n".join(lines)
