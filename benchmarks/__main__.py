"""Run benchmarks and print their tables: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

NAMES = (
    "likelihood",
    "extraction",
    "memory",
    "importance",
    "identity",
    "kfac",
    "selection",
    "scores",
    "claims",
    "suites",
    "reaudit",
    "uld",
    "gs_lora",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(NAMES)}; all by default")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal LM (default: SmolLM2, from its package)")
    parser.add_argument("--tiny", action="store_true", help="a random tiny model: shows that everything runs, no more")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each pair (default 5)")
    parser.add_argument("--threads", type=int, help="processor threads (default: PyTorch's own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a busy machine and one thread",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"expected names among {', '.join(NAMES)}, found {', '.join(sorted(unknown))}")

    import torch
    from transformers.utils import logging

    from benchmarks import subject as subjects
    from benchmarks.harness import environment, table

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {}
    with tempfile.TemporaryDirectory() as work:
        make = subjects.make_tiny if options.tiny else subjects.make_smollm2
        folder = options.model or make(Path(work) / "model")
        subject = subjects.load(
            folder, repeats=options.repeats, device=options.device, clock=options.clock, tiny=options.tiny
        )
        found = environment(options.device)
        found |= {"model": subject.name, "repeats": options.repeats, "clock": options.clock}
        print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)
        for name in options.names or NAMES:
            module = import_module(f"benchmarks.{name}")
            rows = []
            for row in module.run(subject):  # shown and written one by one: a whole run takes minutes
                rows.append(row)
                print(f"{name}: {row.case}: {row.median:.3g}", file=sys.stderr, flush=True)
                results[name] = [row.as_dict() for row in rows]
                if options.json:
                    options.json.write_text(json.dumps({"environment": found, "results": results}, indent=2) + "\n")
            lines = getattr(module, "table", table)(rows)
            print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}\n{lines}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
