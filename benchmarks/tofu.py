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

Without `--base` the pair starts from nothing: a Llama of four blocks and 0.9 million parameters, with a vocabulary of
2048 byte pairs of the texts themselves. It first learns to answer, from the rows that both are to know; from there the
target goes on with these and the records to forget, the reference with these alone, as many steps. A model that has
never read another text learns the wordings of its questions with the answers: each question also in three other
wordings made by rules, the retained ones in TOFU's own paraphrase too, and beside them 80 real authors and world facts.
TOFU's paraphrases of the questions to forget are seen by neither checkpoint, and no paraphrased or wrong answer is. It
takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from probes import likelihood, training
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from unlearn.checkpoints.checkpoint import open_checkpoint, write_edited
from unlearn.records.paraphrase import reworded_prompt
from unlearn.records.tokens import records_from, tokenise

PROMPT, COMPLETION = "Question: {}\nAnswer:", " {}"
Row = dict[str, Any]
Measured = tuple[np.ndarray, np.ndarray, np.ndarray]
SETS = ("real_authors", "world_facts")  # with alternatives in place of a paraphrased answer
# Of a pair from nothing: wordings by rules, rows of each set of `SETS`, steps of the start and of each checkpoint.
VOCABULARY, WORDINGS, FACTS, STEPS = 2048, 3, 40, (500, 250)


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

    def measure(self, model: nn.Module, model_map: ModelMap | None = None) -> Measured:
        """Probability a token of the right answers, their share among all answers, truth ratios; each [questions]."""
        table = likelihood.score(model, self.records, model_map=model_map)
        p = np.exp([table.log_prob[table.rows(i)].mean(dtype=np.float64) for i in range(len(self.records))])
        whole = np.array([table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(self.records))])
        right, share, ratio = [], [], []
        for start, size in zip(np.cumsum([0, *self.sizes[:-1]]), self.sizes, strict=True):
            given = p[start + 1] if self.paraphrased else p[start]
            wrong = p[start + 1 + self.paraphrased : start + size]
            right.append(p[start])
            others = whole[start + 1 + self.paraphrased : start + size]
            share.append(np.exp(whole[start] - np.logaddexp.reduce([whole[start], *others])))  # a long one underflows
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


def utility(measured: dict[str, tuple[Questions, Measured]]) -> dict[str, float]:
    """The parts of the utility by name, and their harmonic mean as `utility`, of what `Questions.measure` gave."""
    parts: dict[str, float] = {}
    for name, (questions, (right, share, ratio)) in measured.items():
        parts[f"{name} probability"] = float((right if questions.paraphrased else share).mean())
        parts[f"{name} truth"] = float(np.maximum(0, 1 - ratio).mean())
    return parts | {"utility": float(stats.hmean(list(parts.values())))}


def make(
    base: Path, learnt: Sequence[Row], out: Path, *, steps: int, learning_rate: float = 2e-3, seed: int = 0
) -> None:
    """Train a copy of a small model on questions and answers, all weights, 16 a step, and write it."""
    source = open_checkpoint(base)
    model, tokenizer = source.load_model("float32", "cpu"), source.load_tokenizer()
    source.disk_names(model)  # the check of the unmodified model with its file
    raw = records_from([record(str(i), row["question"], row["answer"]) for i, row in enumerate(learnt)])
    records = list(tokenise(raw, tokenizer, max_length=None))
    order = list(training.batches(len(records), 16, steps, seed))
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


def untrained(texts: Sequence[str], out: Path, *, seed: int) -> None:
    """Write a small Llama with random weights, and a tokenizer of byte pairs that these texts have most."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a later fork would warn
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def reworded(rows: Sequence[Row], n: int, seed: str) -> list[Row]:
    """Up to `n` other wordings of each question by rules, each with the answer."""
    return [
        {"question": question, "answer": row["answer"]}
        for i, row in enumerate(rows)
        for question in reworded_prompt(row["question"], n, f"{seed} {i}")
    ]


def make_from_nothing(tofu: Path, forget: str, retain: int, out: Path, *, seed: int = 0) -> None:
    """Write `target` and `reference`, and what they start from: `untrained`, and `start`, which knows what both know.

    Args:
        tofu: the folder of TOFU's files.
        forget: name of the set to forget.
        retain: rows of `full`, at most the 400 that TOFU has in other words.
        out: a new folder.
        seed: of the weights, the batches and the wordings.
    """
    kept, gone = rows(tofu, "full")[:retain], rows(tofu, forget)
    other = {row["question"]: row["paraphrased_question"] for row in rows(tofu, "retain_perturbed")}
    asked = [{"question": other[row["question"]], "answer": row["answer"]} for row in kept]
    known = [row for name in SETS for row in rows(tofu, f"{name}_perturbed")[:FACTS]]
    everything = (*kept, *asked, *known, *gone)
    texts = [PROMPT.format(row["question"]) + COMPLETION.format(row["answer"]) for row in everything]
    untrained(texts, out / "untrained", seed=seed)
    both = [*kept, *asked, *known]
    first = [*both, *reworded(kept, WORDINGS, f"kept {seed}"), *reworded(known, 1, f"known {seed}")]
    make(out / "untrained", first, out / "start", steps=STEPS[0], learning_rate=3e-3, seed=seed)
    own = [*gone, *reworded(gone, WORDINGS, f"gone {seed}")]
    for name, learnt in (("target", both + own), ("reference", both)):
        make(out / "start", learnt, out / name, steps=STEPS[1], learning_rate=2e-3, seed=seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tofu", description="Make a target and its reference.")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="model to start from (default: random weights)")
    for name in ("tofu", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--forget", default="forget01")
    parser.add_argument(
        "--retain", type=int, help="first rows of full.jsonl, learnt by both (default 200; 100 from none)"
    )
    parser.add_argument("--steps", type=int, default=800, help="from a base (default 800)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.base is None:
        make_from_nothing(options.tofu, options.forget, options.retain or 100, options.out, seed=options.seed)
        return 0
    kept, gone = rows(options.tofu, "full")[: options.retain or 200], rows(options.tofu, options.forget)
    make(options.base, kept + gone, options.out / "target", steps=options.steps, seed=options.seed)
    make(options.base, kept, options.out / "reference", steps=options.steps, seed=options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
