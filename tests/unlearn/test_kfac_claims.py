"""What the curvature edit is for, end to end through the registered editor, on models trained on the spot.

`python -m benchmarks claims` has the figures over several seeds, with the strength chosen on validation data. Here it
is fixed and the models are smaller. Each test has its control: as many pairs kept at random must not pass it.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.claims import MARGIN, Measured, World, image_classifier, language_model
from probes.statistics import noninferiority
from unlearn.api import Options, edit

SEED = 7


def edited(world: World, out: Path, rho: float, select: str) -> Measured:
    """What is measured on the checkpoint that the editor wrote; the model is as before afterwards."""
    overrides = {"include": list(world.modules), "rho": rho, "select": select}
    run = edit("kfac", world.model, retain=world.fresh, overrides=overrides, out=out, options=Options(seed=SEED))
    assert run.checkpoint is not None
    before = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    try:
        world.model.load_state_dict(load_file(run.checkpoint / "model.safetensors"))
        return world.measure()
    finally:
        world.model.load_state_dict(before)


def test_wrong_labels_are_forgotten_and_true_ones_recovered(tmp_path: Path) -> None:
    world = image_classifier(SEED, n=2000, new=6000, data=1500)
    before = world.measure()
    held = before["wrong"] == 1
    assert held.mean() > 0.5  # of the wrong labels were memorised

    after, control = (edited(world, tmp_path / name, 0.92, name) for name in ("curvature", "random"))
    assert after["wrong"][held].mean() < 0.1
    assert after["true"][held].mean() > 0.5
    assert control["true"][held].mean() < 0.5

    def accuracy(found: Measured) -> str:
        return noninferiority(found["right"], before["right"], MARGIN, paired=True, bounds=(0.0, 1.0)).status

    assert (accuracy(after), accuracy(control)) == ("met", "not met")


def test_planted_strings_are_forgotten_at_little_perplexity(tmp_path: Path) -> None:
    world = language_model(SEED, strings=12, steps=220, new=128, data=300, layers=2)
    before = world.measure()
    assert before["recalled"].mean() > 0.9

    after, control = (edited(world, tmp_path / name, 0.9, name) for name in ("curvature", "random"))
    assert after["recalled"].mean() < 0.1 * before["recalled"].mean()
    rise, price = (math.expm1(found["loss"].mean() - before["loss"].mean()) for found in (after, control))
    assert rise < 0.25 < price
