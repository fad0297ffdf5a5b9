"""Unlearning from logit difference on TOFU: what other wordings and wrong answers buy, against the retrained reference.

    python -m benchmarks.uld_study --target TARGET --reference REFERENCE --tofu FOLDER [--seeds 3] [--steps 100]

Four assistants a seed, the same number of steps each: with and without paraphrases of the records to forget, with and
without wrong answers. Retain records that train are not scored: the method gets those from `--first-retain` on, the
utility is of `retain_perturbed` questions before them. `--copies` measures checkpoints that some editor has written;
`--cells` without a name then trains nothing. For each assistant: forget quality (benchmarks.tofu), the
probability a token of the answers to forget, and the utility over that of the target. The target and the reference head
the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import tofu
from probes.modelmap import ModelMap
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.editors.assistant import train_assistant
from unlearn.editors.base import EditContext
from unlearn.editors.uld import ULDParameters, difference
from unlearn.records.augment import Augmented
from unlearn.records.raw import RawRecord
from unlearn.records.tokens import records_from, tokenise

CELLS = {"neither": (0, 0), "wrong answers": (0, 2), "paraphrases": (2, 0), "both": (2, 2)}


class Study:
    """The pair of checkpoints and the sets, loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoint = open_checkpoint(options.target)
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
        self.forget = tofu.Questions.of(gone[:: -(-len(gone) // (2 * n))], self.tokenizer)
        self.sets = {"retain": tofu.Questions.of(kept[:n], self.tokenizer)}
        for name in ("real_authors", "world_facts"):
            rows = tofu.rows(options.tofu, f"{name}_perturbed")[:n]
            self.sets[name] = tofu.Questions.of(rows, self.tokenizer)
        reference = open_checkpoint(options.reference).load_model("float32", "cpu")
        _, _, self.reference = self.forget.measure(reference)
        self.rows = {"reference": self._row(reference, ModelMap.of(reference))}
        self.rows["target"] = self._row(self.model, self.model_map)

    def _raw(self, rows: list[tofu.Row]) -> list[RawRecord]:
        named = [tofu.record(str(i), row["question"], row["answer"]) for i, row in enumerate(rows)]
        return list(records_from(named))

    def encode(self, raw: list[RawRecord]) -> list[Any]:
        return list(tokenise(raw, self.tokenizer, max_length=None))

    def _row(self, model: Any, model_map: ModelMap) -> dict[str, float]:
        right, _, ratio = self.forget.measure(model, model_map)
        found = tofu.utility(model, self.sets, model_map)
        return {
            "forget_quality": tofu.forget_quality(ratio, self.reference),
            "forget_probability": float(right.mean()),
            "truth_ratio": float(ratio.mean()),
            **found,
        }

    def cell(self, name: str, seed: int) -> dict[str, float]:
        """One assistant, trained and measured."""
        paraphrases, perturbed = CELLS[name]
        options, start = self.options, time.perf_counter()
        parameters = ULDParameters(
            steps=options.steps, patience=None, paraphrases=paraphrases, perturbed=perturbed, blocks=options.blocks
        )
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
            trained = train_assistant(context, parameters)
        spent = time.perf_counter() - start
        composite = difference(context, trained, parameters.rule())
        row = self._row(composite, ModelMap.of(composite))
        share = row["utility"] / self.rows["target"]["utility"]
        return row | {"utility_share": share, "training_seconds": spent, "steps": trained.steps}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table, one by one."""
    study = Study(options)
    for name, row in study.rows.items():
        share = row["utility"] / study.rows["target"]["utility"]
        yield {"case": name, "seed": None, **row, "utility_share": share}
    for folder in options.copies:
        copy = open_checkpoint(folder).load_model("float32", "cpu")
        row = study._row(copy, ModelMap.of(copy))
        yield {
            "case": str(folder),
            "seed": None,
            **row,
            "utility_share": row["utility"] / study.rows["target"]["utility"],
        }
    for seed in range(options.seeds):
        for name in options.cells:
            yield {"case": name, "seed": seed, **study.cell(name, seed)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over seeds of each case."""
    columns = ("forget_quality", "forget_probability", "truth_ratio", "utility", "utility_share", "retain probability")
    lines = [["case", *columns]]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        cells = []
        for column in columns:
            values = np.array([row[column] for row in mine])
            spread = "" if len(values) < 2 else f" ({values.min():.3g} .. {values.max():.3g})"
            cells.append(f"{values.mean():.3g}{spread}")
        lines.append([case, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uld_study", description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--reference", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tofu", type=Path, required=True, metavar="FOLDER", help="TOFU's JSONL files")
    parser.add_argument("--forget", default="forget05", help="name of the set to forget (default forget05)")
    parser.add_argument("--first-retain", type=int, default=300, help="first row of full.jsonl that the method gets")
    parser.add_argument("--retain", type=int, default=200, help="how many rows it gets")
    parser.add_argument(
        "--questions", type=int, default=100, help="at most so many a set of the utility, twice as many to forget"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--blocks",
        type=lambda text: int(text) if text != "auto" else text,
        default="auto",
        help="of the assistant (default: a quarter)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--copies", nargs="*", type=Path, default=[], metavar="FOLDER", help="edited checkpoints")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for row in run(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
