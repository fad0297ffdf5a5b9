"""TOFU's figures (Maini et al., arXiv 2401.06121) from one teacher-forced pass: truth ratio, forget quality, utility.

For a question q with paraphrased answer a~ and wrong answers a^_1 .. a^_m, with p(a) = P(a | q)^(1 / |a|):

    truth ratio      R = mean_j p(a^_j) / p(a~)
    forget quality   p-value of the two-sample Kolmogorov-Smirnov test between R of an edited model and of the
                     reference, over the records to forget
    utility          harmonic mean of: p of the right answer (of sets with alternatives, its share among them) and
                     mean max(0, 1 - R), over retained records, real authors and world facts

The paper's utility also has ROUGE-L of greedy answers; it is left out here, as nothing is generated. A high p-value
says that the test saw no difference, not that there is none: with few records it sees little.

    python -m benchmarks.tofu --base FOLDER --tofu FOLDER --out FOLDER [--forget forget01] [--retain 200] [--steps 800]

makes a small pair for such figures: `target`, the base trained in full on the first rows of `full` and on the records
to forget, and `reference`, trained alike on the former alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from probes import likelihood, training
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from unlearn.checkpoints.checkpoint import open_checkpoint, write_edited
from unlearn.records.tokens import records_from, tokenise

PROMPT, COMPLETION = "Question: {}\nAnswer:", " {}"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions of one set, each with its answers as records, behind one another.

    Attributes:
        records: for each question the answer, the paraphrased one where there is one, and the wrong ones.
        sizes: how many records each question has.
        paraphrased: whether the set has paraphrased answers.
    """

    records: list[TokenRecord]
    sizes: list[int]
    paraphrased: bool

    @classmethod
    def of(cls, rows: Sequence[Row], tokenizer: Any) -> Questions:
        """Tokenise the questions of a `*_perturbed` file."""
        paraphrased = "paraphrased_answer" in rows[0]
        raw, sizes = [], []
        for i, row in enumerate(rows):
            answers = [row["answer"], *([row["paraphrased_answer"]] if paraphrased else []), *row["perturbed_answer"]]
            sizes.append(len(answers))
            raw += [record(f"{i}-{j}", row["question"], answer) for j, answer in enumerate(answers)]
        return cls(list(tokenise(records_from(raw), tokenizer, max_length=None)), sizes, paraphrased)

    def measure(self, model: nn.Module, model_map: ModelMap | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability a token of the right answers, their share among all answers, truth ratios; each [questions]."""
        table = likelihood.score(model, self.records, model_map=model_map)
        p = np.exp([table.log_prob[table.rows(i)].mean(dtype=np.float64) for i in range(len(self.records))])
        whole = np.exp([table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(self.records))])
        right, share, ratio = [], [], []
        for start, size in zip(np.cumsum([0, *self.sizes[:-1]]), self.sizes, strict=True):
            given = p[start + 1] if self.paraphrased else p[start]
            wrong = p[start + 1 + self.paraphrased : start + size]
            right.append(p[start])
            share.append(whole[start] / (whole[start] + whole[start + 1 + self.paraphrased : start + size].sum()))
            ratio.append(wrong.mean() / given)
        return np.array(right), np.array(share), np.array(ratio)


def record(name: str, question: str, answer: str) -> dict[str, str]:
    """A question and an answer as one record."""
    return {"id": name, "prompt": PROMPT.format(question), "completion": COMPLETION.format(answer)}


def rows(folder: Path, name: str) -> list[Row]:
    """The rows of one file of TOFU, questions and answers under one name in all of them."""
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{"question": row.pop("prompt"), "answer": row.pop("response")} if "prompt" in row else row for row in found]


def forget_quality(edited: np.ndarray, reference: np.ndarray) -> float:
    """p-value of the Kolmogorov-Smirnov test between truth ratios of an edited model and of the reference."""
    return float(stats.ks_2samp(edited, reference).pvalue)


def utility(model: nn.Module, sets: dict[str, Questions], model_map: ModelMap | None = None) -> dict[str, float]:
    """The parts of the utility by name, and their harmonic mean as `utility`."""
    parts: dict[str, float] = {}
    for name, questions in sets.items():
        right, share, ratio = questions.measure(model, model_map)
        parts[f"{name} probability"] = float((right if questions.paraphrased else share).mean())
        parts[f"{name} truth"] = float(np.maximum(0, 1 - ratio).mean())
    return parts | {"utility": float(stats.hmean(list(parts.values())))}


def make(base: Path, learnt: Sequence[Row], out: Path, *, steps: int, learning_rate: float = 2e-3) -> None:
    """Train a copy of a small model on questions and answers, all weights, 16 a step, and write it."""
    source = open_checkpoint(base)
    model, tokenizer = source.load_model("float32", "cpu"), source.load_tokenizer()
    source.disk_names(model)  # the check of the unmodified model with its file
    raw = records_from([record(str(i), row["question"], row["answer"]) for i, row in enumerate(learnt)])
    records = list(tokenise(raw, tokenizer, max_length=None))
    order = list(training.batches(len(records), 16, steps, 0))
    loss = training.mean_loss(model, records, model_map=ModelMap.of(model))
    with training.full(model, keep=True) as parameters:
        training.fit(
            parameters,
            lambda i: loss(order[i]),
            steps=steps,
            learning_rate=learning_rate,
            warm_up=steps // 20,
            decay="linear",
        )
    trained = source.disk_tensors(model, {name: p.detach() for name, p in model.named_parameters()})
    write_edited(source, out, lambda name, weight: trained.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tofu", description="Make a target and its reference.")
    for name in ("base", "tofu", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--forget", default="forget01")
    parser.add_argument("--retain", type=int, default=200, help="first rows of full.jsonl, learnt by both")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    kept, gone = rows(options.tofu, "full")[: options.retain], rows(options.tofu, options.forget)
    make(options.base, kept + gone, options.out / "target", steps=options.steps)
    make(options.base, kept, options.out / "reference", steps=options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
