"""Curvature products against one forward pass over the same tokens, and vectors multiplied together against one by one.

The block is the one in the middle: the forward pass runs below and above it, second derivatives within and above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject, completions
from probes.curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator, block_parameters
from probes.likelihood import score

BATCH_TOKENS = 512
TOGETHER = 4


def run(subject: Subject) -> Iterator[Ratio]:
    records, tokens = [], 0
    for record in completions(subject):
        tokens += len(record.ids)
        if records and tokens > BATCH_TOKENS:
            break
        records.append(record)
    blocks = block_parameters(subject.model_map)
    index = len(blocks) // 2
    operators = {
        f"{label}, {scope}": kind(
            subject.model, records, parameters=names, batch_tokens=BATCH_TOKENS, model_map=subject.model_map
        )
        for scope, names in ((f"block {index}", blocks[index]), ("whole model", None))
        for label, kind in (("Hessian", HessianOperator), ("GGN", GaussNewtonOperator))
    }
    sides = {name: _products(operator, [1]) for name, operator in operators.items()}
    sides["forward"] = lambda: score(subject.model, records, model_map=subject.model_map, batch_tokens=BATCH_TOKENS)
    seconds = interleave(sides, subject)
    for name, operator in operators.items():
        note = f"{len(records)} records, {operator.n_losses} losses, {operator.shape[0] / 1e6:.3g} M weights"
        yield Ratio(f"{name}: product / forward", seconds[name], seconds["forward"], note=note)
    for name in list(operators)[:2]:
        both = {
            "together": _products(operators[name], [TOGETHER]),
            "apart": _products(operators[name], [1] * TOGETHER),
        }
        seconds = interleave(both, subject)
        case = f"{name}: {TOGETHER} products together / one by one"
        yield Ratio(case, seconds["together"], seconds["apart"], target=subject.target(0.9))


def _products(operator: CurvatureOperator, sizes: list[int]) -> Callable[[], None]:
    generator = np.random.default_rng(0)
    vectors = [generator.standard_normal((operator.shape[0], size)).astype(operator.dtype) for size in sizes]

    def side() -> None:
        for part in vectors:
            operator.matmat(part)

    return side
