"""What a user gets wrong, through the command line: one clear line, the documented exit code, the input untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import World
from unlearn import cli
from unlearn.disk import file_sha256


def weights(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncated(folder: Path) -> None:
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


def not_a_number(folder: Path) -> None:
    tensors = load_file(weights(folder))
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    shutil.rmtree(folder)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=96)
    tiny.save(BertModel(config), tiny.tokenizer(), folder)


def foreign_tokenizer(folder: Path) -> None:
    tiny.tokenizer(vocab=300, merges=[(a, b) for a in "abcdefghij" for b in "klmnopqrst"]).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def junk_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(bytes(range(256)))


def no_shard(folder: Path) -> None:
    weights(folder).unlink()


CASES: list[tuple[Callable[[Path], None], int, str]] = [
    (truncated, 2, "safetensors"),
    (not_a_number, 2, "NaN"),
    (pickled, 2, "--allow-pickle"),
    (encoder, 5, "expected"),
    (foreign_tokenizer, 2, "tokenizer"),
    (no_tokenizer, 2, "tokenizer"),
    (junk_config, 2, "config.json"),
    (no_shard, 2, "safetensors"),
]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return int(stop.value.code or 0), capsys.readouterr().err


def digests(folder: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
@pytest.mark.parametrize("command", ["audit", "forget"])
def test_a_bad_checkpoint(
    command: str, spoil: Callable[[Path], None], code: int, words: str, world: World, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "planted"
    shutil.copytree(world.planted, folder)
    spoil(folder)
    before = digests(folder)
    capsys.readouterr()
    if command == "audit":
        arguments = ["audit", folder, "--records", world.records, "--suite", "quick"]
    else:
        for name in ("records.jsonl", "control.jsonl", "retain.jsonl", "request.yaml"):
            shutil.copyfile(world.folder / name, tmp_path / name)
        (tmp_path / "base").symlink_to(world.base)
        arguments = ["forget", tmp_path / "request.yaml"]
    found, err = call(capsys, *arguments, "--out", tmp_path / "run", "--display", "none")
    assert found == code, err
    assert words in err
    assert len(err.strip().splitlines()) == 1, err
    assert digests(folder) == before


@pytest.mark.parametrize(
    "junk", [b"", b"\x00\x01\x02\xff", bytes(range(256)) * 8, b"\xef\xbb\xbf", b"{" * 5000, b"[1,"]
)
@pytest.mark.parametrize("name", ["records.jsonl", "records.csv", "records.parquet", "records.json", "request.yaml"])
def test_binary_junk(name: str, junk: bytes, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_bytes(junk)
    if name == "request.yaml":
        code, err = call(capsys, "forget", path, "--out", tmp_path / "run")
    else:
        code, err = call(
            capsys, "audit", world.planted, "--records", path, "--out", tmp_path / "run", "--suite", "quick",
            "--display", "none",
        )  # fmt: skip
    assert code == 2, err
    assert "Traceback" not in err
    assert 1 <= len(err.strip().splitlines()) <= 4


def test_a_full_disk(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import errno
    import os

    real, count = os.fsync, [0]

    def full(descriptor: int) -> None:
        count[0] += 1
        if count[0] > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    before = digests(world.planted)
    monkeypatch.setattr(os, "fsync", full)
    code, err = call(capsys, "forget", world.request, "--out", tmp_path / "run", "--display", "none")
    assert code == 5, err
    assert "space" in err
    assert len(err.strip().splitlines()) == 1
    monkeypatch.undo()
    assert digests(world.planted) == before
    code, err = call(capsys, "forget", "--resume", tmp_path / "run", "--display", "none")
    assert code in (0, 1, 3), err


def test_a_read_only_place(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, err = call(
        capsys,
        "audit",
        world.planted,
        "--records",
        world.records,
        "--out",
        tmp_path / "file" / "run",
        "--suite",
        "quick",
    )
    assert code in (2, 5)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_records_of_another_kind(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images.jsonl").write_text(json.dumps({"id": "a", "image": "x.png", "label": 1}) + "\n")
    (tmp_path / "x.png").write_bytes(b"not an image")
    code, err = call(
        capsys, "audit", world.planted, "--records", tmp_path / "images.jsonl", "--out", tmp_path / "run",
        "--suite", "quick", "--display", "none",
    )  # fmt: skip
    assert code == 2
    assert "language model" in err
