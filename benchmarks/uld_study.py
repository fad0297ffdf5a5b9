"""Unlearning from logit difference on TOFU: what other wordings and wrong answers buy, against the retrained reference.

    python -m benchmarks.uld_study --small --tofu FOLDER
    python -m benchmarks.uld_study --target TARGET --reference REFERENCE --tofu FOLDER [--seeds 3] [--steps 100]

Four assistants a seed, the same number of steps each: with and without paraphrases of the records to forget, with and
without wrong answers. Retain records that train are not scored: the method gets those from `--first-retain` on, the
utility is of `retain_perturbed` questions before them. For each assistant: how its training ended, forget quality
(benchmarks.tofu), the probability a token of the answers to forget, to the questions as they stand and to TOFU's
paraphrases of them, which nothing was trained on, the utility, and the probability of the scored retained answers and
of those among them whose questions are nearest to a question to forget. The target and the reference head the table;
differences between cells follow, paired by seed.

`--small` makes both checkpoints from nothing (benchmarks.tofu), small enough for many seeds, and has settings that fit
them. `--curves` trains the assistants and prints how their training ended, and measures nothing else: what settings
are to be chosen by. `--copies` measures checkpoints that some editor has written; `--cells` without a name then trains
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import tofu
from probes import likelihood
from probes.collateral.neighbours import SHARE, text_nearness
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.statistics import difference_interval
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.editors.assistant import TrainedAssistant, train_assistant
from unlearn.editors.base import EditContext
from unlearn.editors.uld import ULDParameters, difference
from unlearn.records.augment import Augmented
from unlearn.records.raw import RawRecord
from unlearn.records.tokens import records_from, tokenise

CELLS = {"neither": (0, 0), "wrong answers": (0, 2), "paraphrases": (2, 0), "both": (2, 2)}
CONTRASTS = (
    ("paraphrases", "neither"),
    ("both", "wrong answers"),
    ("wrong answers", "neither"),
    ("both", "paraphrases"),
)
FIGURES = (
    "forget_quality", "forget_probability", "forget_probability_reworded", "truth_ratio", "utility", "utility_share",
    "retain probability", "retain_probability_near",
)  # fmt: skip
LARGE: dict[str, Any] = {
    "forget": "forget05", "first_retain": 300, "retain": 200, "questions": 100, "steps": 100, "seeds": 3, "method": {}
}  # fmt: skip
SMALL: dict[str, Any] = {
    "forget": "forget01", "first_retain": 40, "retain": 60, "questions": 40, "steps": 240, "seeds": 5,
    "method": {
        "blocks": 2, "learning_rate": 0.01, "retain_weight": 1.0, "batch_size": 8, "retain_batch_size": 8
    },
}  # fmt: skip


class Study:
    """The pair of checkpoints and the sets, loaded once."""

    def __init__(self, options: argparse.Namespace, target: Path, reference: Path) -> None:
        self.options = options
        self.checkpoint = open_checkpoint(target)
        self.tokenizer = self.checkpoint.load_tokenizer()
        self.model = self.checkpoint.load_model("float32", "cpu")
        self.model_map = ModelMap.of(self.model)
        self.raw = self._raw(tofu.rows(options.tofu, options.forget))
        full = tofu.rows(options.tofu, "full")
        first = options.first_retain
        self.retain = self._raw(full[first : first + options.retain])
        known = {row["question"] for row in full[:first]}
        kept = [row for row in tofu.rows(options.tofu, "retain_perturbed") if row["question"] in known]
        n = options.questions
        gone = tofu.rows(options.tofu, f"{options.forget}_perturbed")
        gone, kept = gone[:: -(-len(gone) // (2 * n))], kept[:n]
        self.forget = tofu.Questions.of(gone, self.tokenizer)
        self.reworded = self.encode(self._raw([row | {"question": row["paraphrased_question"]} for row in gone]))
        nearness = text_nearness([row["question"] for row in gone], [row["question"] for row in kept])
        self.near = np.argsort(-nearness, kind="stable")[: max(1, round(SHARE * len(kept)))]
        self.sets = {"retain": tofu.Questions.of(kept, self.tokenizer)}
        for name in tofu.SETS:
            rows = tofu.rows(options.tofu, f"{name}_perturbed")[:n]
            self.sets[name] = tofu.Questions.of(rows, self.tokenizer)
        self.rows: dict[str, dict[str, float]] = {}
        if options.curves:
            return
        model = open_checkpoint(reference).load_model("float32", "cpu")
        _, _, self.reference = self.forget.measure(model)
        self.rows["reference"] = self.row(model, ModelMap.of(model))
        self.rows["target"] = self.row(self.model, self.model_map)

    def _raw(self, rows: list[tofu.Row]) -> list[RawRecord]:
        named = [tofu.record(str(i), row["question"], row["answer"]) for i, row in enumerate(rows)]
        return list(records_from(named))

    def encode(self, raw: Sequence[RawRecord]) -> list[TokenRecord]:
        return list(tokenise(raw, self.tokenizer, max_length=None))

    def row(self, model: Any, model_map: ModelMap) -> dict[str, float]:
        """The figures of one model."""
        right, _, ratio = self.forget.measure(model, model_map)
        sets = {name: (questions, questions.measure(model, model_map)) for name, questions in self.sets.items()}
        kept = sets["retain"][1][0]
        table = likelihood.score(model, self.reworded, model_map=model_map)
        other = [np.exp(table.log_prob[table.rows(i)].mean(dtype=np.float64)) for i in range(len(self.reworded))]
        return {
            "forget_quality": tofu.forget_quality(ratio, self.reference),
            "forget_probability": float(right.mean()),
            "forget_probability_reworded": float(np.mean(other)),
            "truth_ratio": float(ratio.mean()),
            "retain_probability_near": float(kept[self.near].mean()),
            **tofu.utility(sets),
        }

    def share(self, row: dict[str, float]) -> dict[str, float]:
        """The row, and its utility as a share of the target's."""
        return row | {"utility_share": row["utility"] / self.rows["target"]["utility"]}

    def train(self, name: str, seed: int) -> tuple[EditContext, ULDParameters, TrainedAssistant]:
        """One assistant."""
        paraphrases, perturbed = CELLS[name]
        wanted = {"steps": self.options.steps, "patience": None, **self.options.method}
        parameters = ULDParameters(**wanted, paraphrases=paraphrases, perturbed=perturbed)
        with tempfile.TemporaryDirectory() as work:
            context = EditContext(
                source=self.checkpoint,
                model=self.model,
                model_map=self.model_map,
                forget=self.encode(self.raw),
                retain=self.encode(self.retain),
                seed=seed,
                work=Path(work),
                texts=Augmented(self.raw, self.encode, control_seed=0),
            )
            return context, parameters, train_assistant(context, parameters)

    def cell(self, name: str, seed: int) -> dict[str, float]:
        """One assistant, trained and measured."""
        start = time.perf_counter()
        context, parameters, trained = self.train(name, seed)
        spent = time.perf_counter() - start
        row: dict[str, float] = {"training_seconds": spent, "steps": trained.steps, **ended(trained)}
        if self.options.curves:
            return row
        composite = difference(context, trained, parameters.rule())
        return self.share(self.row(composite, ModelMap.of(composite))) | row


def ended(trained: TrainedAssistant) -> dict[str, float]:
    """Losses of an assistant over the last tenth of its training, in nats a token."""
    losses = {"assistant_forget_loss": "forget_loss", "assistant_divergence": "retain_divergence"}
    last = max(1, trained.steps // 10)
    return {name: float(np.mean(trained.statistics[of][-last:])) for name, of in losses.items()}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table, one by one."""
    with tempfile.TemporaryDirectory() as folder:
        target, reference = options.target, options.reference
        if target is None:
            made = Path(folder)
            tofu.make_from_nothing(options.tofu, options.forget, options.first_retain + options.retain, made)
            target, reference = made / "target", made / "reference"
        study = Study(options, target, reference)
        for name, row in study.rows.items():
            yield {"case": name, "seed": None, **study.share(row)}
        for copy in options.copies:
            model = open_checkpoint(copy).load_model("float32", "cpu")
            yield {"case": str(copy), "seed": None, **study.share(study.row(model, ModelMap.of(model)))}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name in options.cells:
                yield {"case": name, "seed": seed, **study.cell(name, seed)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and range over seeds of each case."""
    columns = [
        name for name in (*FIGURES, "assistant_forget_loss", "assistant_divergence") if any(name in r for r in rows)
    ]
    lines = [["case", *columns]]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        cells = []
        for column in columns:
            values = np.array([row[column] for row in mine if column in row])
            spread = "" if len(values) < 2 else f" ({values.min():.3g} .. {values.max():.3g})"
            cells.append(f"{values.mean():.3g}{spread}" if len(values) else "")
        lines.append([case, *cells])
    return _aligned(lines)


def contrasts(rows: Sequence[dict[str, Any]]) -> str:
    """What one cell has more than another, of each figure: mean over seeds and 95 % interval of paired differences."""
    cells: dict[str, dict[int, dict[str, Any]]] = {
        name: {row["seed"]: row for row in rows if row["case"] == name} for name in CELLS
    }
    lines = [["difference", *FIGURES]]
    for more, less in CONTRASTS:
        seeds = sorted(cells[more].keys() & cells[less].keys())
        if len(seeds) < 2:
            continue
        found = []
        for figure in FIGURES:
            first, second = ([cells[name][seed][figure] for seed in seeds] for name in (more, less))
            interval = difference_interval(first, second, paired=True)
            found.append(f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
        lines.append([f"{more} - {less}", *found])
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the settings of a small or a large pair where they leave one open."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uld_study", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="settings of a small pair; makes one unless it is named")
    parser.add_argument("--target", type=Path, metavar="FOLDER")
    parser.add_argument("--reference", type=Path, metavar="FOLDER")
    parser.add_argument("--tofu", type=Path, required=True, metavar="FOLDER", help="TOFU's JSONL files")
    parser.add_argument("--forget", help=f"name of the set to forget{_default('forget')}")
    parser.add_argument("--first-retain", type=int, help=f"first row of full that it gets{_default('first_retain')}")
    parser.add_argument("--retain", type=int, help=f"how many rows the method gets{_default('retain')}")
    parser.add_argument(
        "--questions",
        type=int,
        help=f"at most so many a set of the utility, twice as many to forget{_default('questions')}",
    )
    parser.add_argument("--steps", type=int, help=f"of each assistant{_default('steps')}")
    parser.add_argument("--seeds", type=int, help=f"how many{_default('seeds')}")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--method", type=json.loads, metavar="JSON", help=f"other options of `uld`{_default('method')}")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--curves", action="store_true", help="only how the training of each assistant ended")
    parser.add_argument("--copies", nargs="*", type=Path, default=[], metavar="FOLDER", help="edited checkpoints")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if (options.target is None) != (options.reference is None) or (options.target is None and not options.small):
        parser.error("expected --target and --reference, or --small")
    for name, value in (SMALL if options.small else LARGE).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _default(name: str) -> str:
    return f" (default {LARGE[name]}; with --small {SMALL[name]})".replace("%", "%%")


def main() -> int:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for row in run(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    if not options.curves:
        print("\n" + contrasts(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
