"""Peak extra memory of the pass and of a bare forward pass, over tokens in the batch and size of the vocabulary.

Every point is a process of its own that runs a small Llama once on one batch. The figure is the peak resident memory
of that run minus the resident memory just before it; on a GPU, the allocator's peak minus what was allocated before.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import Ratio
from benchmarks.subject import Subject

LENGTH = 256
SMALL, LARGE = (1024, 8192), (4096, 131072)  # tokens, vocabulary; the small one already fills a chunk of the pass
SLACK = 1.5  # allocator noise; the product of tokens and vocabulary grows 64-fold


def run(subject: Subject) -> Iterator[Ratio]:
    few, many = SMALL[0], LARGE[0]
    points = [(side, tokens, v) for side in ("pass", "bare") for tokens in (few, many) for v in (SMALL[1], LARGE[1])]
    extra: dict[tuple[str, int, int], list[float]] = {point: [] for point in points}
    for _ in range(1 if subject.tiny else 3):
        for point in points:
            extra[point].append(_point(*point, subject.device))

    def ratio(case: str, over: tuple[str, int, int], under: tuple[str, int, int], target: float | None) -> Ratio:
        return Ratio(case, extra[over], extra[under], target, note="peak extra memory", unit="MB")

    for side, target in (("pass", SLACK), ("bare", None)):
        for tokens in (few, many):
            case = f"{side}: vocabulary {SMALL[1]} -> {LARGE[1]} at {tokens} tokens"
            yield ratio(case, (side, tokens, LARGE[1]), (side, tokens, SMALL[1]), target)
        yield ratio(f"{side}: both, {SMALL} -> {LARGE}", (side, *LARGE), (side, *SMALL), target)
    yield ratio(f"pass / bare at {LARGE}", ("pass", *LARGE), ("bare", *LARGE), None)


def _point(side: str, tokens: int, vocabulary: int, device: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", side, str(tokens), str(vocabulary), device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _child(side: str, tokens: int, vocabulary: int, device: str) -> float:
    """Peak extra megabytes of one run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from probes.figures import record_figures
    from probes.likelihood import score
    from probes.modelmap import ModelMap
    from probes.records import TokenRecord

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).eval().to(device)
    model_map = ModelMap.of(model)
    ids = torch.randint(vocabulary, (tokens // LENGTH, LENGTH))
    records = [TokenRecord(f"r{i}", tuple(row), 1, LENGTH) for i, row in enumerate(ids.tolist())]

    def go(ids: torch.Tensor, records: list[TokenRecord]) -> None:
        if side == "pass":
            record_figures(score(model, records, model_map=model_map, batch_size=len(records)))
        else:
            with torch.inference_mode():
                model(ids.to(device), use_cache=False)

    go(ids[:1, :8], [TokenRecord("warm-up", records[0].ids[:8], 1, 8)])  # what is loaded once and stays is not counted
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        go(ids, records)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # or the run would live on what building the model released
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    go(ids, records)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Megabytes. Not `ru_maxrss`: a child inherits its parent's peak there."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print(_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
