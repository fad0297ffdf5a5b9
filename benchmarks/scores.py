"""How well per-record curvature figures, and the score made from them, tell memorised records from others.

Ground truth by construction, on models trained on the spot. A language model learns text from a random source (each
token has six likely successors) and, mixed in, 60 random strings and 60 texts of the same source that come back again
and again. A classifier of noisy prototype images learns a training set in which one label in ten is wrong.

Every figure keeps one direction throughout: higher curvature figures, and lower loss (higher Min-K%, margin), count as
more memorised. So an AUC below 0.5 says that the opposite direction would have been right there. Factors come from one
sample of ordinary data, the calibration of the score from another; neither holds a record.
"""

from __future__ import annotations

import random
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.subject import Subject
from probes.classify import class_logits, score_images
from probes.curvature.factors import kronecker_factors
from probes.curvature.kronecker import Eigenbases, keep_pairs
from probes.curvature.records import FIGURES, memorisation_scores, record_curvature
from probes.figures import record_figures
from probes.likelihood import score
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord

SEEDS = (10, 11, 12)
RHO = 0.75
TEXTS = ("llama", "gpt2", "gemma2", "mixtral")
IMAGES = ("perceptron", "convolutions", "vit", "resnet")
LIKELIHOOD = {
    TokenRecord: ("loss", "zlib_ratio", "min_k", "min_k_plus_plus"),
    ImageRecord: ("loss", "margin", "entropy"),
}
DOWNWARDS = ("loss", "zlib_ratio", "entropy")  # lower counts as more memorised

Records = Sequence[TokenRecord] | Sequence[ImageRecord]


@dataclass(frozen=True, slots=True)
class Planted:
    """A trained model and what it is known to hold."""

    model: nn.Module
    data: Records
    ordinary: Records
    sets: dict[str, Records]
    contrasts: tuple[tuple[str, str], ...]
    facts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Separation:
    """AUC of every figure between two sets of records, one value a seed."""

    case: str
    values: Mapping[str, Sequence[float]]
    note: str

    @property
    def median(self) -> float:
        """Of the score."""
        return statistics.median(self.values["score"])

    def cells(self) -> list[str]:
        own, *others = ([f"{statistics.median(v):.2f}", f"{min(v):.2f}", f"{max(v):.2f}"] for v in self.values.values())
        return [self.case, f"{own[0]} ({own[1]} .. {own[2]})", *(other[0] for other in others), self.note]

    def as_dict(self) -> dict[str, Any]:
        return {"case": self.case, "auc": {name: list(v) for name, v in self.values.items()}, "note": self.note}


def run(subject: Subject) -> Iterator[Separation]:
    seeds = SEEDS[:1] if subject.tiny else SEEDS
    for arch in TEXTS[:1] if subject.tiny else TEXTS:
        yield from separations(arch, [texts(arch, seed, subject.tiny) for seed in seeds], seeds)
    for arch in IMAGES[:1] if subject.tiny else IMAGES:
        yield from separations(arch, [images(arch, seed, subject.tiny) for seed in seeds], seeds)


def table(rows: Sequence[Separation]) -> str:
    """One table for language models and one for classifiers, whose likelihood figures differ."""
    kinds: dict[tuple[str, ...], list[Separation]] = {}
    for row in rows:
        kinds.setdefault(tuple(row.values), []).append(row)
    parts = []
    for names, some in kinds.items():
        cells = [["case", "score (spread)", *names[1:], "note"], *(row.cells() for row in some)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def separations(arch: str, worlds: Sequence[Planted], seeds: Sequence[int]) -> Iterator[Separation]:
    """One row for each contrast of a kind of model."""
    tables = [figures(world, seed) for world, seed in zip(worlds, seeds, strict=True)]
    note = ", ".join(f"{name} {statistics.median(w.facts[name] for w in worlds):.0%}" for name in worlds[0].facts)
    for over, under in worlds[0].contrasts:
        values: dict[str, list[float]] = {}
        for found in tables:
            for name in found[over].columns.drop("record_id"):
                values.setdefault(name, []).append(auc(found[over][name], found[under][name]))
        yield Separation(f"{arch}: {over} / {under}", values, note)


def figures(world: Planted, seed: int) -> dict[str, pd.DataFrame]:
    """The score, the curvature figures and the likelihood figures of every set; higher is more memorised."""
    model_map = ModelMap.of(world.model)
    factors = kronecker_factors(world.model, world.data, halves=False, seed=seed, model_map=model_map)
    decompose = Eigenbases()
    bases = {key: decompose(factor) for key, factor in factors.factors.items()}
    kept = {key: keep_pairs(basis.lam, basis.mu, RHO) for key, basis in bases.items()}

    def curvature(records: Records) -> pd.DataFrame:
        return record_curvature(world.model, records, bases, kept, factors, seed=seed, model_map=model_map)

    usual = curvature(world.ordinary)
    found = {}
    for name, records in world.sets.items():
        own = curvature(records)
        part = own[["record_id"]].assign(score=memorisation_scores(own, usual), **{f: own[f] for f in FIGURES})
        found[name] = pd.concat([part, likelihood(world.model, records, model_map)], axis=1)
    return found


def likelihood(model: nn.Module, records: Records, model_map: ModelMap) -> pd.DataFrame:
    if isinstance(records[0], TokenRecord):
        frame = record_figures(score(model, records, model_map=model_map))
    else:
        frame = score_images(model, records)
    frame = frame[list(LIKELIHOOD[type(records[0])])]
    return frame.assign(**{name: -frame[name] for name in DOWNWARDS if name in frame}).rename(
        columns={name: f"low {name}" for name in DOWNWARDS}
    )


def auc(over: pd.Series, under: pd.Series) -> float:
    a, b = np.asarray(over)[:, None], np.asarray(under)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


# ------------------------------------------------------------------------------------------------------ language models

VOCABULARY, LENGTH, PROMPT, SHARE = 64, 24, 6, 0.35
WIDTH = 48
_SHAPE = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
SHAPES = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4},
    "gemma2": _SHAPE | {"num_hidden_layers": 2, "head_dim": 12, "query_pre_attn_scalar": 12},
}


def texts(arch: str, seed: int, tiny: bool = False) -> Planted:
    """A language model with planted strings and planted text."""
    from tests.tiny import causal_lm

    rng = random.Random(f"{arch} {seed}")
    successors = {t: rng.sample(range(4, VOCABULARY), 6) for t in range(4, VOCABULARY)}

    def text() -> list[int]:
        ids = [1, rng.randrange(4, VOCABULARY)]
        while len(ids) < LENGTH:
            ids += rng.choices(successors[ids[-1]], (0.4, 0.25, 0.15, 0.1, 0.06, 0.04))
        return ids

    def string() -> list[int]:
        return [1, *(rng.randrange(4, VOCABULARY) for _ in range(LENGTH - 1))]

    n = 60
    drawn = {
        "planted strings": [string() for _ in range(n)],
        "never-seen strings": [string() for _ in range(n)],
        "planted text": [text() for _ in range(n)],
        "never-seen text": [text() for _ in range(2 * n)],
    }
    planted = drawn["planted strings"] + drawn["planted text"]
    shape = SHAPES.get(arch, _SHAPE | {"num_hidden_layers": 2, "head_dim": 12})
    model = causal_lm(arch, seed=seed, vocab=VOCABULARY, initializer_range=0.05, **shape)
    steps, batch = (400, 32) if tiny else (700, 32)
    held = int(SHARE * batch)
    batches = (torch.tensor([text() for _ in range(batch - held)] + rng.sample(planted, held)) for _ in range(steps))
    train(model, ((model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for ids in batches), steps)
    sets = {name: _texts(name, rows) for name, rows in drawn.items()}
    right = record_figures(score(model, sets["planted strings"])).token_accuracy.mean()
    return Planted(
        model,
        _texts("data", [text() for _ in range(256)]),
        _texts("ordinary", [text() for _ in range(100)]),
        sets,
        (
            ("planted strings", "never-seen strings"),
            ("planted strings", "never-seen text"),
            ("planted text", "never-seen text"),
        ),
        {"planted strings, greedy tokens": float(right)},
    )


def _texts(name: str, rows: Sequence[Sequence[int]]) -> list[TokenRecord]:
    return [
        TokenRecord(f"{name} {i}", tuple(ids), PROMPT, len(zlib.compress(bytes(ids[PROMPT:]))))
        for i, ids in enumerate(rows)
    ]


# ---------------------------------------------------------------------------------------------------------- classifiers

SIDE, CLASSES, NOISE, WRONG = 12, 8, 0.25, 0.1


class Perceptron(nn.Module):
    """Three hidden layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [3 * SIDE * SIDE, width, width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Convolutions(nn.Module):
    """Three convolutions and one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 24, 32, 48), []
        for stride, (a, b) in zip((1, 2, 2), pairwise(widths), strict=True):
            layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * (SIDE // 4) ** 2, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def images(arch: str, seed: int, tiny: bool = False) -> Planted:
    """A classifier fitted to wrong labels."""
    from tests.tiny import image_classifier, seeded

    generator = torch.Generator().manual_seed(seed)
    n, held, data = (400, 200, 600) if tiny else (800, 300, 1600)
    prototypes = torch.randn(CLASSES, 3, 3, SIDE // 3, SIDE // 3, generator=generator)  # three a class
    labels = torch.randint(CLASSES, (n + held + data,), generator=generator)
    chosen = prototypes[labels, torch.randint(3, labels.shape, generator=generator)]
    pixels = functional.interpolate(chosen, size=(SIDE, SIDE), mode="bilinear")
    shifts = torch.randint(-2, 3, (len(labels), 2), generator=generator).tolist()
    pixels = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(pixels, shifts, strict=True)])
    pixels += NOISE * torch.randn(pixels.shape, generator=generator)
    other = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    wrong = torch.randperm(n, generator=generator)[: int(WRONG * n)]
    given = labels.clone()
    given[wrong] = other[wrong]
    with seeded(seed):
        if arch in ("perceptron", "convolutions"):
            model = Perceptron() if arch == "perceptron" else Convolutions()
        else:
            shape = {
                "vit": {"image_size": SIDE, "patch_size": 3, "hidden_size": 48, "intermediate_size": 96},
                "resnet": {"embedding_size": 24, "hidden_sizes": [24, 48], "depths": [2, 2]},
            }[arch]
            model = image_classifier(arch, seed=seed, classes=CLASSES, **shape)
    epochs = 60 if arch in ("vit", "resnet") else 30
    steps = epochs * -(-n // 64)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            for batch in torch.randperm(n, generator=generator).split(64):
                yield class_logits(model, pixels[batch]), given[batch]

    train(model, batches(), steps, rate=2e-3)

    def records(name: str, index: Tensor, labels: Tensor) -> list[ImageRecord]:
        return [ImageRecord(f"{name} {i}", pixels[i], int(labels[i])) for i in index.tolist()]

    is_wrong = torch.zeros(n, dtype=torch.bool).index_fill_(0, wrong, True)
    seen, unseen = torch.arange(n), torch.arange(n, n + held)
    sets = {
        "mislabelled": records("mislabelled", wrong, given),
        "clean": records("clean", seen[~is_wrong][:150], given),
        "never-seen": records("never-seen", unseen[100:], labels),
        "never-seen, wrong labels": records("wrong", unseen[100:], other),
    }
    fitted, held_out = (float(score_images(model, sets[name]).correct.mean()) for name in ("mislabelled", "never-seen"))
    return Planted(
        model,
        records("data", torch.arange(n + held, n + held + data), labels),
        records("ordinary", unseen[:100], labels),
        sets,
        tuple(("mislabelled", name) for name in ("clean", "never-seen", "never-seen, wrong labels")),
        {"wrong labels predicted": fitted, "never-seen images right": held_out},
    )


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float = 5e-3) -> None:
    """One cycle of AdamW on (logits, labels); the model has to be read anew for every batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for logits, labels in batches:
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    optimiser.zero_grad(set_to_none=True)
    model.eval()
