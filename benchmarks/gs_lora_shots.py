"""GS-LoRA++ beside GS-LoRA where few images are given: so many of each class, to forget and to keep.

    python -m benchmarks.gs_lora_shots --threads 1 [--validate] [--shots 4] [--seeds 200 201 ...] [--json FILE]

That is the few-shot case of arXiv 2501.09705 as its code draws it (4 images of each class on both sides, prototypes
from the same images under the checkpoint of each task); in the `few-shot` rows of `benchmarks.gs_lora` only the data
to keep are few. Figures are those of `benchmarks.gs_lora`, on one of two sets of images:

    digits   its own, with its model: four requests of two of ten classes each
    letters  60 characters (A to Z, 0 to 9, alpha to omega) in ten fonts, turned, shifted, with noise, 16 by 16 pixels:
             one request of half of the classes, the published case of 50 of 100 faces, on a model of the same form

A seed gives the first model, the images and the edits, and both methods get the same three. The means over the four
requests of a seed are compared in pairs, with an interval of the mean difference over seeds.

`--validate` runs every setting that was tried, on two thirds of the training half and judged on its last third. The
settings of `CHOSEN` have the highest mean H of their method there, on the seeds in `VALIDATION`. The other half and
other seeds are for the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.gs_lora import TASKS, digits, harmonic, trained
from probes.classify import score_images
from probes.modelmap import ModelMap
from probes.records import ImageRecord
from probes.statistics import mean_interval
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.editors.base import EditContext, make_editor
from unlearn.requests.presets import load_method

VALIDATION = (100, 101)
REPORTED = tuple(range(200, 208))
FORGET, KEEP = "prototype_forget_weight", "prototype_retain_weight"
TRIED: dict[str, dict[str, dict[str, Any]]] = {
    "GS-LoRA": {
        "as shipped": {},
        "learning_rate 0.003": {"learning_rate": 3e-3},
        "forget_weight 0.3": {"forget_weight": 0.3},
        "sparsity 0.4": {"sparsity": 0.4},
    },
    "GS-LoRA++": {
        "as shipped": {FORGET: 0.1, KEEP: 0.1},
        "weights 1, 1": {FORGET: 1.0, KEEP: 1.0},
        "weights 5, 5": {FORGET: 5.0, KEEP: 5.0},
    },
}
CHOSEN = {"GS-LoRA": "as shipped", "GS-LoRA++": "weights 5, 5"}
AS_PUBLISHED: dict[str, Any] = dict(load_method("gs_lora_official").parameters) | {
    "bound": "auto", "batch_size": 4, "retain_batch_size": 4, "earlier_weight": 1.0
}  # fmt: skip
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "GS-LoRA": {"as published": AS_PUBLISHED},
    "GS-LoRA++": {
        "as published, weights 0.5, 0": AS_PUBLISHED | {FORGET: 0.5},
        "as published, weights 0.5, 0.5": AS_PUBLISHED | {FORGET: 0.5, KEEP: 0.5},
        "as published, weights 5, 5": AS_PUBLISHED | {FORGET: 5.0, KEEP: 5.0},
    },
}
FIGURES = {"forgotten": "Acc_f", "earlier": "Acc_o", "retained": "Acc_r", "change": "change of Acc_r", "harmonic": "H"}
Row = dict[str, Any]
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" + "".join(chr(c) for c in range(0x3B1, 0x3CA) if c != 0x3C2)
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip
PIXELS, IMAGES = 16, (160, 20)  # of a side; of each class to train on and to measure on


@dataclass(frozen=True, slots=True)
class Data:
    """Images of so many classes, the requests in turn, and how long the first model trains.

    Attributes:
        requests: classes 0, 1, ... in order.
    """

    known: list[ImageRecord]
    unseen: list[ImageRecord]
    classes: int
    requests: Sequence[Sequence[int]]
    steps: int


def letters() -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Drawn characters, their classes in random order: to train on and to measure on."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(0)
    numbers, halves = rng.permutation(len(CHARACTERS)).tolist(), (list[ImageRecord](), list[ImageRecord]())
    fonts = {
        (name, size): ImageFont.truetype(str(folder / f"{name}.ttf"), size) for name in FONTS for size in range(36, 49)
    }
    for label, character in zip(numbers, CHARACTERS, strict=True):
        for i in range(sum(IMAGES)):
            page = Image.new("L", (4 * PIXELS, 4 * PIXELS))
            place = tuple(2 * PIXELS + rng.uniform(-6, 6, 2))
            font = fonts[FONTS[int(rng.integers(len(FONTS)))], int(rng.integers(36, 49))]
            ImageDraw.Draw(page).text(place, character, fill=255, font=font, anchor="mm")
            page = page.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR).resize((PIXELS, PIXELS))
            pixels = np.asarray(page, dtype=np.float32) / 127.5 - 1 + rng.normal(0, 0.15, (PIXELS, PIXELS))
            record = ImageRecord(f"{label}-{i}", torch.tensor(pixels[None], dtype=torch.float32), label)
            halves[i >= IMAGES[0]].append(record)
    return halves


def data_of(name: str) -> Data:
    """The images by name."""
    if name == "digits":
        return Data(*digits(), 10, TASKS, 300)
    return Data(*letters(), len(CHARACTERS), [range(len(CHARACTERS) // 2)], 1000)


def drawn(records: Sequence[ImageRecord], shots: int, seed: int) -> list[ImageRecord]:
    """So many images of each class, at random."""
    rng, found = np.random.default_rng((seed, 5)), []
    for label in sorted({record.label for record in records}):
        mine = [record for record in records if record.label == label]
        found += [mine[i] for i in rng.permutation(len(mine))[:shots]]
    return found


def accuracies(model: Any, records: Sequence[ImageRecord]) -> dict[int, tuple[int, int]]:
    """Of each class, how many images are recognised, and how many there are."""
    correct = score_images(model, records, batch_size=256).correct
    found: dict[int, tuple[int, int]] = {}
    for record, right in zip(records, correct, strict=True):
        hits, n = found.get(record.label, (0, 0))
        found[record.label] = (hits + int(right), n + 1)
    return found


def share(counts: dict[int, tuple[int, int]], classes: Sequence[int]) -> float:
    """The accuracy on some classes."""
    return sum(counts[c][0] for c in classes) / sum(counts[c][1] for c in classes)


def sequence(first: Any, given: Sequence[ImageRecord], data: Data, overrides: dict[str, Any], seed: int) -> list[Row]:
    """Acc_f, Acc_o, Acc_r and H after each request."""
    rows, parameters = [], dict(load_method("gs_lora").parameters) | overrides
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        first.save_pretrained(folder / "0")
        source, start = open_checkpoint(folder / "0"), accuracies(first, data.unseen)
        before = start
        for k, classes in enumerate(data.requests):
            gone, left = range(classes[0]), range(classes[-1] + 1, data.classes)
            mine, stay, past = ([r for r in given if r.label in those] for those in (classes, left, gone))
            model, out, scratch = source.load_model(), folder / str(k + 1), folder / f"{k + 1}-work"
            scratch.mkdir()
            context = EditContext(source, model, ModelMap.of(model), mine, stay, seed, scratch, earlier=past)
            make_editor("gs_lora", parameters).edit(context, out)
            source = open_checkpoint(out)
            after = accuracies(source.load_model(), data.unseen)
            kept = share(after, left)
            rows.append({
                "forgotten": share(after, classes),
                "earlier": share(after, gone) if gone else None,
                "retained": kept,
                "change": kept - share(start, left),
                "harmonic": harmonic(kept, share(before, classes) - share(after, classes)),
            })  # fmt: skip
            before = after
    return rows


def averaged(rows: Sequence[Row]) -> Row:
    """The means over the requests of a sequence."""
    found = {key: [row[key] for row in rows if row[key] is not None] for key in FIGURES}
    return {key: mean(values) if values else None for key, values in found.items()}


def settings(chosen: Sequence[str] | None, validate: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, setting and its options: those named as METHOD: SETTING, else all to validate or those chosen."""
    named = [f"{method}: {name}" for method, name in CHOSEN.items()] if chosen is None else chosen
    return [
        (method, name, options)
        for family in (TRIED, PUBLISHED)
        for method, tried in family.items()
        for name, options in tried.items()
        if f"{method}: {name}" in named or (chosen is None and validate and family is TRIED)
    ]


def table(found: Sequence[Row]) -> str:
    """Means over seeds with the lowest and highest; of two settings the mean difference and its interval."""
    lines = ["| | " + " | ".join(f"{name} %" for name in FIGURES.values()) + " |", "|---|" + "---:|" * len(FIGURES)]
    cases = list(dict.fromkeys((row["method"], row["setting"]) for row in found))
    by_case = {
        case: {row["seed"]: averaged(row["rows"]) for row in found if (row["method"], row["setting"]) == case}
        for case in cases
    }
    for case, seeds in by_case.items():
        cells = []
        for key in FIGURES:
            values = [100 * row[key] for row in seeds.values() if row[key] is not None]
            cells.append(f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "")
        lines.append(f"| {', '.join(case)} | {' | '.join(cells)} |")
    if len(cases) == 2:
        (_, plain), (_, plus) = by_case.items()
        both = [seed for seed in plain if seed in plus]
        cells = []
        for key in FIGURES:
            gaps = [100 * (plus[seed][key] - plain[seed][key]) for seed in both if plain[seed][key] is not None]
            if not gaps:
                cells.append("")
                continue
            interval = mean_interval(gaps) if len(gaps) > 1 and len(set(gaps)) > 1 else None
            around = f" ({interval.low:+.1f} to {interval.high:+.1f})" if interval else ""
            cells.append(f"{mean(gaps):+.1f}{around}")
        lines.append(f"| difference, points, with its 95 % interval over {len(both)} seeds | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gs_lora_shots", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", choices=("digits", "letters"), default="digits")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default {REPORTED[0]} to {REPORTED[-1]}")
    parser.add_argument("--validate", action="store_true", help="every setting tried, on the validation images")
    parser.add_argument("--settings", nargs="+", help="as METHOD: SETTING, in place of those chosen")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each sequence; what is there is kept")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = data_of(options.data)
    if options.validate and options.data == "digits":
        data = replace(data, known=data.known[:600], unseen=data.known[600:])
    elif options.validate:  # class by class
        data = replace(data, known=[r for i, r in enumerate(data.known) if i % 3], unseen=data.known[::3])
    found: list[Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    kind = {"data": options.data, "shots": options.shots, "validation": options.validate}
    if any({key: row.get(key, "digits") for key in kind} != kind for row in found):
        parser.error("expected --json to name a file of the same case, found one of other shots or images")
    done = {(row["seed"], row["method"], row["setting"]) for row in found}
    for seed in options.seeds or (VALIDATION if options.validate else REPORTED):
        wanted = [
            (method, name, overrides)
            for method, name, overrides in settings(options.settings, options.validate)
            if (seed, method, name) not in done
        ]
        first = trained(data.known, seed, data.steps, data.classes) if wanted else None
        for method, name, overrides in wanted:
            rows = sequence(first, drawn(data.known, options.shots, seed), data, overrides, seed)
            found.append(kind | {"seed": seed, "method": method, "setting": name, "rows": rows})
            print(f"{seed} {method}, {name}: H {100 * averaged(rows)['harmonic']:.1f}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main())
