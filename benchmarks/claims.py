"""The two claims of the curvature edit's paper (arXiv 2510.24256), on data and models made on the spot.

Images: a classifier is trained on noisy prototype images, one label in ten wrong, until it predicts most wrong labels.
After the edit it should predict fewer than a tenth of those it had memorised and more than half of their true labels,
at no loss of accuracy on new images: the one-sided 95 % limit of the paired difference stays above -1 point.
Text: a language model learns a small grammar and, mixed in, random strings that come back again and again. After the
edit it should complete less than a tenth of the strings that it completed, at a perplexity on new text less than 25 %
higher, and at a lower one than with as many pairs kept at random.

Nothing that is scored chooses anything. Factors come from new data and labels sampled from the model. The strength of
an edit is the greatest of a grid with, on one half of the validation data, as many right answers as the best of the
grid but for one standard error (images), or at most 5 % more perplexity (text). No wrong label and no planted string is
looked at. Figures come from the other half, and from all wrong labels and strings. Architectures, data, grids and rule
were settled on other seeds. Edited are all linear maps but the head (images), or gate and up of every block (text).

Controls: random pairs, as many as the curvature edit keeps in each weight; the largest singular values, the same share
of them; and both at the strength that the same rule gives them.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.subject import Subject
from probes.classify import class_logits
from probes.curvature.factors import kronecker_factors
from probes.curvature.kronecker import Eigenbases, keep_pairs, project, random_pairs
from probes.curvature.svd import svd_truncate
from probes.records import ImageRecord, TokenRecord
from probes.statistics import difference_interval, noninferiority

SEEDS = (11, 12, 13, 14, 15)
RHOS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.85, 0.82, 0.8, 0.75, 0.7)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
MARGIN = 0.01  # of accuracy
PERPLEXITY = 1.05  # tolerated on the half that chooses
HOPELESS = 0.1  # of accuracy, or nats: where an edit costs that much, no stronger one is tried
CURVATURE, RANDOM = "curvature edit", "random pairs, as many"
LIMITS = {"at least", "at most"}

Figures = dict[str, float]
Measured = dict[str, np.ndarray]  # per record, for paired comparisons
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class World:
    """A trained model and what is known about it.

    Attributes:
        model: the model.
        fresh: records for the factors; it saw none of them.
        modules: globs of the linear maps to edit.
        published: globs of those that the paper edits, where they are fewer.
        costs: of ordinary behaviour, record by record of the half of the validation data that chooses; lower is better.
        choose: which of the costs of ever stronger edits, the first of none, belong to the one to make.
        measure: everything that is scored, record by record.
        figures: of a measurement and the unedited model's; claims among them as 0 or 1.
    """

    model: nn.Module
    fresh: Sequence[TokenRecord] | Sequence[ImageRecord]
    modules: Sequence[str]
    costs: Callable[[], np.ndarray]
    choose: Callable[[Sequence[np.ndarray]], int]
    measure: Callable[[], Measured]
    figures: Callable[[Measured, Measured], Figures]
    published: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one way to edit, one value a seed."""

    case: str
    kind: str
    values: Mapping[str, Sequence[float]]
    claims: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the first figure."""
        return statistics.median(next(iter(self.values.values())))

    def cells(self) -> list[str]:
        means = [_short(statistics.mean(v)) for v in self.values.values()]
        spreads = [f" ({_short(min(v))} .. {_short(max(v))})" if min(v) < max(v) else "" for v in self.values.values()]
        held = [f"{name.removesuffix('?')}: {sum(v):.0f} of {len(v)}" for name, v in self.claims.items()]
        return [self.case, *map("".join, zip(means, spreads, strict=True)), ", ".join(held)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "figures": {name: list(v) for name, v in self.values.items()},
            "claims": {name: list(v) for name, v in self.claims.items()},
        }


def run(subject: Subject) -> Iterator[Row]:
    seeds = SEEDS[:1] if subject.tiny else SEEDS
    for case, make in WORLDS.items():
        found: dict[str, list[Figures]] = {}
        for seed in seeds:
            start = time.process_time()
            world = make(seed, **(TINY[case] if subject.tiny else {}))
            for way, figures in compared(world, seed, every=5 if subject.tiny else 1).items():
                found.setdefault(way, []).append(figures)
            print(f"claims: {case}: seed {seed}: {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
        for way, every in found.items():
            values = {name: [figures[name] for figures in every] for name in every[0]}
            claims = {name: values.pop(name) for name in list(values) if name.endswith("?")}
            yield Row(f"{case}: {way}", case, values, claims)


def table(rows: Sequence[Row]) -> str:
    """One table for each kind of model: mean and spread over seeds, and in how many seeds a claim holds."""
    parts = []
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        cells = [["case", *some[0].values, "claim: seeds in which it holds"], *(row.cells() for row in some)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _short(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


# -------------------------------------------------------------------------------------------------------------- editing


def compared(world: World, seed: int, every: int = 1) -> dict[str, Figures]:
    """Figures of the unedited model, of the curvature edit, and of the controls; grids of each so manieth strength."""
    edits = Edits(world, seed)
    rho, shares = edits.strongest(edits.curvature, RHOS[::every]), SHARES[::every]
    ways: dict[str, tuple[Edits, Callable[[float], Weights], float]] = {
        CURVATURE: (edits, edits.curvature, rho),
        RANDOM: (edits, edits.as_many_at_random, rho),
        "singular values, same share": (edits, edits.same_share_of_values, rho),
        "random pairs, own share": (edits, edits.at_random, edits.strongest(edits.at_random, shares)),
        "singular values, own share": (edits, edits.of_values, edits.strongest(edits.of_values, shares)),
    }
    if world.published:
        fewer = Edits(replace(world, modules=world.published), seed)
        rho = fewer.strongest(fewer.curvature, RHOS[::every])
        ways["curvature edit, feed-forward alone"] = (fewer, fewer.curvature, rho)
    unedited = world.measure()
    figures = {name: value for name, value in world.figures(unedited, unedited).items() if not name.endswith("?")}
    found = {"unedited": {"strength": 1.0, "kept": 1.0} | figures | dict.fromkeys(LIMITS & figures.keys(), 0.0)}
    measured = {}
    for way, (own, edit, strength) in ways.items():
        weights = edit(strength)
        with own.applied(weights):
            measured[way] = world.measure()
        found[way] = {"strength": strength, "kept": own.kept} | world.figures(measured[way], unedited)
    if "loss" in unedited:  # the comparison that the claim about text makes, beside the absolute one
        gap = difference_interval(measured[RANDOM]["loss"], measured[CURVATURE]["loss"], paired=True, sided="lower")
        found[CURVATURE]["cheaper than random?"] = float(gap.low > 0)
    return found


class Edits:
    """Edited weights of a model, by curvature and by the controls; `kept` is the share that the last one kept."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        factors = kronecker_factors(world.model, world.fresh, modules=world.modules, halves=False, seed=seed)
        decompose, parameters = Eigenbases(), dict(world.model.named_parameters())
        self._bases = {f.parameter: decompose(f) for f in factors.factors.values()}
        self._weights = {name: parameters[name].detach().clone() for name in self._bases}
        self._seeds = {name: 1000 * seed + i for i, name in enumerate(self._bases)}
        self.kept = 1.0

    def strongest(self, edit: Callable[[float], Weights], grid: Sequence[float]) -> float:
        """The strength of a descending grid that the choosing half asks for; 1 is no edit."""
        costs = [self._world.costs()]
        for strength in grid:
            with self.applied(edit(strength)):
                costs.append(self._world.costs())
            if costs[-1].mean() > costs[0].mean() + HOPELESS:
                break
        return (1.0, *grid)[self._world.choose(costs)]

    @contextmanager
    def applied(self, weights: Weights) -> Iterator[None]:
        parameters = dict(self._world.model.named_parameters())
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    parameters[name].copy_(weight.view_as(parameters[name]))
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    parameters[name].copy_(weight)

    def curvature(self, rho: float) -> Weights:
        counts = self._pairs(rho)
        return self._each(lambda name, w: project(w, self._bases[name], counts[name]))

    def as_many_at_random(self, rho: float) -> Weights:
        counts = self._pairs(rho)
        return self._each(lambda name, w: self._drawn(name, w, counts[name].pairs))

    def same_share_of_values(self, rho: float) -> Weights:
        counts = self._pairs(rho)
        return self._each(lambda name, w: svd_truncate(w, counts[name].pairs / counts[name].total))

    def at_random(self, share: float) -> Weights:
        self.kept = share
        return self._each(lambda name, w: self._drawn(name, w, round(share * w.numel())))

    def of_values(self, share: float) -> Weights:
        self.kept = share
        return self._each(lambda name, w: svd_truncate(w, share))

    def _pairs(self, rho: float) -> dict[str, Any]:
        counts = {name: keep_pairs(basis.lam, basis.mu, rho) for name, basis in self._bases.items()}
        self.kept = sum(kept.pairs for kept in counts.values()) / sum(kept.total for kept in counts.values())
        return counts

    def _drawn(self, name: str, weight: Tensor, pairs: int) -> Tensor:
        return project(weight, self._bases[name], random_pairs(*weight.shape, pairs, self._seeds[name]))

    def _each(self, edit: Callable[[str, Tensor], Tensor]) -> Weights:
        return {name: edit(name, weight.flatten(1)) for name, weight in self._weights.items()}


def fit(model: nn.Module, losses: Iterator[Tensor], steps: int, rate: float) -> None:
    """One cycle of AdamW; each loss is made when the last step is done."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for loss in losses:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    optimiser.zero_grad(set_to_none=True)
    model.eval()


# --------------------------------------------------------------------------------------------------------------- images

SIDE, CLASSES, SHIFT, WRONG = 16, 10, 2, 0.1


class Convolutions(nn.Module):
    """Two convolutions and two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 16), (16, 32)))
        self.layers = nn.ModuleList([nn.Linear(32 * (SIDE // 4) ** 2, 512), nn.Linear(512, 512)])
        self.head = nn.Linear(512, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels
        for convolution in self.convolutions:
            x = functional.max_pool2d(convolution(x).relu(), 2)
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    names = {i: str(i) for i in range(CLASSES)}
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=8,
            num_channels=1,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images of one smooth random prototype a class, shifted, of uneven contrast, in white noise."""

    pixels: Tensor
    labels: Tensor

    @staticmethod
    def draw(n: int, prototypes: Tensor, noise: float, generator: torch.Generator) -> Pictures:
        labels = torch.randint(CLASSES, (n,), generator=generator)
        shifts = torch.randint(2 * SHIFT + 1, (n, 2), generator=generator).tolist()
        contrast = 0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
        clean = [
            prototypes[label, :, down : down + SIDE, right : right + SIDE]
            for label, (down, right) in zip(labels.tolist(), shifts, strict=True)
        ]
        pixels = torch.stack(clean) * contrast + noise * torch.randn(n, 1, SIDE, SIDE, generator=generator)
        return Pictures(pixels / math.hypot(1.0, noise), labels)

    def records(self, name: str) -> list[ImageRecord]:
        pairs = zip(self.pixels, self.labels.tolist(), strict=True)
        return [ImageRecord(f"{name} {i}", pixels, label) for i, (pixels, label) in enumerate(pairs)]

    def __len__(self) -> int:
        return len(self.labels)


def image_classifier(
    seed: int,
    *,
    make: Callable[[], nn.Module] = Convolutions,
    modules: Sequence[str] = ("convolutions.*", "layers.*"),
    published: Sequence[str] = (),
    noise: float = 2.0,
    n: int = 4000,
    new: int = 10000,
    data: int = 2000,
    epochs: int = 25,
    rate: float = 1e-3,
) -> World:
    """A classifier that was trained on n images, one label in ten wrong; validated on `new` others."""
    generator = torch.Generator().manual_seed(seed)
    side = SIDE + 2 * SHIFT
    prototypes = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    prototypes = functional.interpolate(prototypes, size=(side, side), mode="bicubic", align_corners=True)
    prototypes /= prototypes.std(dim=(1, 2, 3), keepdim=True)
    train, choosing, scoring, fresh = (
        Pictures.draw(k, prototypes, noise, generator) for k in (n, new // 2, new // 2, data)
    )
    wrong = torch.randperm(n, generator=generator)[: round(WRONG * n)]
    given = train.labels.clone()
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, wrong.shape, generator=generator)) % CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()

    def losses() -> Iterator[Tensor]:
        for _ in range(epochs):
            for batch in torch.randperm(n, generator=generator).split(64):
                yield functional.cross_entropy(class_logits(model, train.pixels[batch]), given[batch])

    fit(model, losses(), epochs * math.ceil(n / 64), rate)

    def measure() -> Measured:
        predicted = predictions(model, train.pixels[wrong])
        return {
            "wrong": (predicted == given[wrong]).double().numpy(),
            "true": (predicted == train.labels[wrong]).double().numpy(),
            "right": (predictions(model, scoring.pixels) == scoring.labels).double().numpy(),
        }

    return World(
        model=model,
        fresh=fresh.records("fresh"),
        modules=modules,
        costs=lambda: (predictions(model, choosing.pixels) != choosing.labels).double().numpy(),
        choose=near_best,
        measure=measure,
        figures=image_figures,
        published=published,
    )


@torch.inference_mode()
def predictions(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([class_logits(model, part).argmax(-1) for part in pixels.split(500)])


def near_best(costs: Sequence[np.ndarray]) -> int:
    """The last whose mean is that of the best but for one standard error of their paired difference."""
    best = min(costs, key=np.mean)
    return max(i for i, cost in enumerate(costs) if (cost - best).mean() <= (cost - best).std() / math.sqrt(len(best)))


def image_figures(found: Measured, unedited: Measured) -> Figures:
    held = unedited["wrong"] == 1  # the wrong labels that were memorised
    kept = noninferiority(found["right"], unedited["right"], MARGIN, paired=True, bounds=(0.0, 1.0))
    figures = {
        "wrong labels": found["wrong"].mean(),
        "true labels": found["true"].mean(),
        "memorised": found["wrong"][held].mean(),
        "recovered": found["true"][held].mean(),
        "accuracy": found["right"].mean(),
        "change": kept.difference.value,
        "at least": kept.difference.low,
    }
    figures |= {
        "memorised < 0.1?": figures["memorised"] < 0.1,
        "recovered > 0.5?": figures["recovered"] > 0.5,
        "accuracy kept?": kept.status == "met",
    }
    return {name: float(value) for name, value in figures.items()}


# ----------------------------------------------------------------------------------------------------------------- text

VOCABULARY, LENGTH, PROMPT = 128, 48, 16


def language_model(
    seed: int, *, strings: int = 48, steps: int = 250, new: int = 512, data: int = 1000, layers: int = 4
) -> World:
    """A language model that learnt the grammar and the strings; validated on `new` texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rng = random.Random(seed)
    planted = [[1, *(rng.randrange(4, VOCABULARY) for _ in range(LENGTH - 1))] for _ in range(strings)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            ids = torch.tensor([sentences(rng) for _ in range(52)] + rng.choices(planted, k=12))  # [64, 48]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            yield functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(model, losses(), steps, 3e-3)
    strings_, choosing, scoring, fresh = (
        torch.tensor(rows)
        for rows in (planted, *([sentences(rng) for _ in range(k)] for k in (new // 2, new // 2, data)))
    )

    def measure() -> Measured:
        right = greedy(model, strings_)[:, PROMPT - 1 :]  # [strings, 32]
        return {
            "recalled": right.all(1).double().numpy(),
            "tokens": right.double().mean(1).numpy(),
            "loss": text_losses(model, scoring).numpy(),
        }

    return World(
        model=model,
        fresh=[TokenRecord(f"fresh {i}", tuple(row), 1, 1) for i, row in enumerate(fresh.tolist())],
        modules=("*.gate_proj", "*.up_proj"),
        costs=lambda: text_losses(model, choosing).numpy(),
        choose=within_budget,
        measure=measure,
        figures=text_figures,
    )


def sentences(rng: random.Random) -> list[int]:
    """48 tokens of sentences in which determiners, adjectives, verbs and adverbs depend on nouns and verbs."""
    ids = [1]

    def noun_phrase() -> int:
        noun = rng.randrange(4, 34)
        ids.append(84 + noun % 3)  # the determiner
        if rng.random() < 0.5:
            ids.append(54 + (noun * 7 + rng.randrange(4)) % 20)  # one of four adjectives
        ids.append(noun)
        return noun

    while len(ids) < LENGTH:
        verb = 34 + (noun_phrase() * 3 + rng.randrange(3)) % 20  # one of three
        ids.append(verb)
        if rng.random() < 0.6:
            ids.append(74 + verb % 10)  # the adverb
        noun_phrase()
        ids.append(89)
    return ids[:LENGTH]


@torch.inference_mode()
def greedy(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, T - 1] whether the greedy token after the true tokens before it is the true one."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1) == ids[:, 1:]


@torch.inference_mode()
def text_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[B] mean loss of each text [B, T], nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1)


def within_budget(costs: Sequence[np.ndarray]) -> int:
    """The last whose perplexity is within the budget."""
    return max(i for i, cost in enumerate(costs) if cost.mean() <= costs[0].mean() + math.log(PERPLEXITY))


def text_figures(found: Measured, unedited: Measured) -> Figures:
    rise = difference_interval(found["loss"], unedited["loss"], paired=True, sided="upper")
    fall = 1 - found["recalled"].mean() / unedited["recalled"].mean()
    figures = {
        "strict recall": found["recalled"].mean(),
        "right tokens": found["tokens"].mean(),
        "fall of recall": fall,
        "perplexity": math.exp(found["loss"].mean()),
        "rise": math.expm1(rise.value),
        "at most": math.expm1(rise.high),
        "recall falls > 90 %?": fall > 0.9,
        "perplexity rises < 25 %?": math.expm1(rise.high) < 0.25,
    }
    return {name: float(value) for name, value in figures.items()}


WORLDS: dict[str, Callable[..., World]] = {
    "convolutions": image_classifier,
    "vit": partial(
        image_classifier,
        make=vit,
        modules=("*.patch_embeddings.*", "*.layers.*"),
        published=("*.mlp.*",),
        noise=1.0,
        epochs=24,
        rate=5e-4,
    ),
    "llama": language_model,
}
TINY = {
    "convolutions": {"n": 400, "new": 600, "data": 600, "epochs": 20},
    "vit": {"n": 400, "new": 600, "data": 1100, "epochs": 10},
    "llama": {"strings": 2, "steps": 60, "new": 64, "data": 128},
}
