"""Identifying a checkpoint (sha256 of every file, and the tensor digest) against `sha256sum` of the same files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject
from unlearn.checkpoints.checkpoint import open_checkpoint


def run(subject: Subject) -> Iterator[Ratio]:
    files = sorted(path for path in subject.folder.iterdir() if path.is_file())

    def identify() -> None:
        checkpoint = open_checkpoint(subject.folder)
        checkpoint.manifest()
        checkpoint.tensor_digest()

    def sha256sum() -> None:
        subprocess.run(["sha256sum", *map(str, files)], check=True, capture_output=True)

    seconds = interleave({"identify": identify, "sha256sum": sha256sum}, subject)
    note = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB"
    yield Ratio("manifest and tensor digest / sha256sum", seconds["identify"], seconds["sha256sum"], note=note)
