"""Requests that take about a second each: random tiny models, two records a request, edits made beforehand.

The method is `given`: the copy has the weights of another checkpoint of the same shape, so a test decides what an edit
does. `root` is where requests start; `e1`, `e2`, `e3` are what they lead to.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests import tiny

SUITE = """\
schema: unlearn.suite/v1
name: small
description: one pass, for runs that are made many times
confirm: false
noise_floor: {records: 2}
attacks:
  - {name: verbatim.greedy}
"""
CRITERIA = "  - {id: C1, metric: extraction.greedy, aggregate: rate, test: point, max: 0.5}\n"
IMPOSSIBLE = "  - {id: C1, metric: loss, aggregate: mean, test: point, max: 0.001}\n"


def rows(name: str, n: int = 2) -> list[dict[str, str]]:
    return [{"id": f"{name}{i}", "prompt": f"{name} {i} said", "completion": f" word {name}{i}"} for i in range(n)]


class Requests:
    """A folder with checkpoints and record files, and requests about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, folder: Path) -> Requests:
        tokenizer = tiny.tokenizer()
        for seed, name in enumerate(("root", "e1", "e2", "e3")):
            tiny.save(tiny.causal_lm("llama", seed, hidden_size=16, intermediate_size=16), tokenizer, folder / name)
        (folder / "small.yaml").write_text(SUITE)
        world = cls(folder)
        for name, n in (("control", 4), ("retain", 2), ("a", 2), ("b", 2), ("c", 2)):
            world.records(name, rows(name, n))
        return world

    def records(self, name: str, content: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    def request(
        self,
        name: str,
        to: str,
        *,
        records: str | None = None,
        checkpoint: str | Path = "root",
        criteria: str = CRITERIA,
        more: str = "",
        into: Path | None = None,
    ) -> Path:
        """A request file whose edit is the checkpoint `to`."""
        path = (into or self.folder) / f"{name}.yaml"
        here = self.folder
        path.write_text(
            f"schema: unlearn.request/v1\ndata: {{records: {here / (records or name)}.jsonl}}\n"
            f"checkpoint: {{path: {here / checkpoint}}}\ncontrol: {{path: {here / 'control.jsonl'}}}\n"
            f"retain: {{path: {here / 'retain.jsonl'}}}\nmethod: {{name: given, overrides: {{path: {here / to}}}}}\n"
            f"suite: {here / 'small.yaml'}\ncriteria:\n{criteria}{more}"
        )
        return path


@contextmanager
def quick() -> Iterator[None]:
    """Many short runs: what was loaded before them is not looked through after each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def flushes(work: Callable[[], Any]) -> int:
    """How often a piece of work flushes to disk."""
    with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
        work()
    return fsync.call_count


def forked(work: Callable[[], Any], die_at: int | None = None) -> int:
    """Run in a forked process, which kills itself at its n-th flush to disk if asked to; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    begin(work, die_at)
    raise AssertionError


def begin(work: Callable[[], Any], die_at: int | None = None) -> None:
    """The child's part of a fork: it never returns."""
    code = 70
    try:
        real, count = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        os.close(2)
        code = work() or 0
    finally:
        os._exit(code)
