"""Audit a checkpoint for memorised records, forget them in a copy, attack the copy, report.

    from unlearn import attack, audit, forget, probe
    run = audit("checkpoint", records="records.jsonl")
    run = forget("request.yaml")
    run = probe("kfac", "checkpoint", data="text.jsonl")
    run = attack("membership.loss", "checkpoint", records="records.jsonl", control="never-seen.jsonl")
    model = load_model("checkpoint", dtype="float32", device="cpu")

Importing this package loads no model library; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unlearn._version import __version__

if TYPE_CHECKING:
    from unlearn.api import Options, RecordFormat, Run, attack, audit, edit, forget, load_model, probe

__all__ = ["Options", "RecordFormat", "Run", "__version__", "attack", "audit", "edit", "forget", "load_model", "probe"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from unlearn import api

        return getattr(api, name)
    raise AttributeError(f"module 'unlearn' has no attribute {name!r}")
