"""Entries that earlier edits changed most: against the copies' weights, the penalty against autograd, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probes.errors import UsageError
from tests.tiny import causal_lm, image_classifier, save
from tests.unlearn.test_gs_lora import SMALL, feed_forward, pictures, run, texts
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from unlearn.editors.adapterfolder import write_adapter
from unlearn.editors.regions import Regions, held_entries

HELD = {"earlier_edit_weight": 30.0, "earlier_edit_share": 0.1}


def of(arch: str, folder: Path) -> Checkpoint:
    return open_checkpoint(save((image_classifier if arch == "vit" else causal_lm)(arch), None, folder))


def changes(before: Checkpoint, after: Checkpoint) -> dict[str, Tensor]:
    """What an edit added to the feed-forward weights, [out, in], by module."""
    one, two = before.load_model("float64"), after.load_model("float64")
    names = feed_forward(one)
    found = {}
    for name in names:
        path = name.removesuffix(".weight")
        change = two.get_parameter(name) - one.get_parameter(name)
        found[path] = (change if isinstance(one.get_submodule(path), nn.Linear) else change.T).detach()
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "vit"])
def test_held_entries_are_those_the_copies_differ_in_most(arch: str, tmp_path: Path) -> None:
    source = of(arch, tmp_path / "source")
    images, folders, expected = arch == "vit", [], dict[str, set[int]]()
    for i in range(2):
        mine = pictures(4, 2, i)[:2] if images else texts(3, i)
        kept = pictures(4, 2, 7)[2:] if images else texts(4, 7)
        run(source, tmp_path / str(i), SMALL | {"learning_rate": 1e-2, "adapter_scale": 2.0}, mine, kept, seed=i)
        folders.append(tmp_path / f"{i}-work" / "adapter")
        edited = open_checkpoint(tmp_path / str(i))
        for path, change in changes(source, edited).items():
            n = int(0.05 * change.numel())
            order = sorted(range(change.numel()), key=lambda at: -abs(float(change.flatten()[at])))
            expected.setdefault(path, set()).update(order[:n])
        held = held_entries(source.load_model(), folders, 0.05)
        assert set(held) == set(expected)
        for path, at in held.items():
            assert at.tolist() == sorted(set(at.tolist()))
            missed = set(at.tolist()) ^ expected[path]
            assert len(missed) <= 2  # the copy's weights are rounded: at the edge two may change places
    assert held_entries(source.load_model(), [], 0.05) == {}


def test_at_least_one_entry_is_held(tmp_path: Path) -> None:
    model = causal_lm("llama")
    path = feed_forward(model)[0].removesuffix(".weight")
    rows, columns = model.get_submodule(path).weight.shape  # type: ignore[misc]
    down, up = torch.zeros(2, columns), torch.zeros(rows, 2)
    up[3, 1], down[1, 5] = -1.0, 2.0
    write_adapter(tmp_path / "a", {path: (down, up)}, scale=0.5, transposed=False, language=True)
    held = held_entries(model, [tmp_path / "a"], 1e-9)
    assert {name: at.tolist() for name, at in held.items()} == {path: [3 * columns + 5]}


def test_the_penalty_equals_autograd_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)

    def pair(rows: int, columns: int) -> tuple[nn.Parameter, nn.Parameter]:
        halves = torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator)
        return nn.Parameter(halves[0].double()), nn.Parameter(halves[1].double())

    pairs = {"a": pair(5, 4), "b": pair(2, 6), "dropped": pair(3, 3)}
    for half in pairs["dropped"]:
        half.requires_grad_(False)
    held = {name: torch.tensor(at) for name, at in
            {"a": [0, 7, 19], "b": [11], "dropped": [2], "not adapted": [1]}.items()}  # fmt: skip
    regions = Regions(held, pairs, scale=1.5, weight=0.4)
    value, means = regions.step(), []
    for name in ("a", "b"):
        down, up = pairs[name]
        means.append((1.5 * up @ down).abs().flatten()[held[name]].mean())
    halves = [half for name in ("a", "b") for half in pairs[name]]
    expected = torch.autograd.grad(0.4 * (means[0] + means[1]), halves)
    assert value == pytest.approx(0.4 * float((means[0] + means[1]).detach()))
    assert regions.values == [pytest.approx(value / 0.4)]
    for half, gradient in zip(halves, expected, strict=True):
        torch.testing.assert_close(half.grad, gradient)
    assert pairs["dropped"][0].grad is None
    assert set(regions.held) == {"a", "b", "dropped"}


def test_no_change_at_held_entries_costs_nothing() -> None:
    down, up = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2))
    with torch.no_grad():
        up[1] = 0.0
    regions = Regions({"a": torch.tensor([4, 5, 7])}, {"a": (down, up)}, scale=1.0, weight=9.0)  # row 1
    assert regions.step() == 0.0
    assert down.grad is not None
    assert up.grad is not None
    assert not down.grad.any()
    assert not up.grad.any()


def test_held_entries_change_less_and_without_them_nothing_is_different(tmp_path: Path) -> None:
    source = of("llama", tmp_path / "source")
    options: dict[str, Any] = SMALL | {"learning_rate": 1e-2, "steps": 20}
    run(source, tmp_path / "1", options, texts(3, 1), texts(4, 2))
    second, folder = open_checkpoint(tmp_path / "1"), tmp_path / "1-work" / "adapter"

    def again(name: str, **more: Any) -> tuple[Any, float]:
        result = run(second, tmp_path / name, options | more.pop("options", {}), texts(3, 5), texts(4, 2), **more)
        moved = changes(second, open_checkpoint(tmp_path / name))
        held = held_entries(second.load_model(), [folder], 0.1)
        inside = sum(float(change.abs().flatten()[held[path]].mean()) for path, change in moved.items())
        return result, inside

    plain, free = again("plain")
    off, _ = again("off", earlier_edits=[folder])
    none, _ = again("none", options=HELD)
    assert plain.deltas.tensor_digest == off.deltas.tensor_digest == none.deltas.tensor_digest
    assert "earlier_edits" not in plain.statistics | off.statistics | none.statistics
    on, tied = again("on", options=HELD, earlier_edits=[folder])
    assert tied < free / 4
    found = on.statistics["earlier_edits"]
    assert (found["edits"], len(found["penalty"])) == (1, 20)
    assert found["elements"] == sum(int(0.1 * change.numel()) for change in changes(source, second).values())
    assert found["penalty"][0] == 0.0
    assert found["penalty"][-1] == pytest.approx(tied, rel=0.5)  # before the last step
    json.dumps(on.statistics, allow_nan=False)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, other = causal_lm("llama"), causal_lm("llama", intermediate_size=40)
    path = feed_forward(model)[0].removesuffix(".weight")

    def written(name: str, module: str, source: nn.Module) -> Path:
        rows, columns = source.get_submodule(path).weight.shape  # type: ignore[misc]
        pairs = {module: (torch.ones(2, columns), torch.ones(rows, 2))}
        write_adapter(tmp_path / name, pairs, scale=1.0, transposed=False, language=True)
        return tmp_path / name

    good = written("good", path, model)
    for bad in (written("shape", path, other), written("name", "model.elsewhere", model)):
        with pytest.raises(UsageError, match="adapter 2 of 2 earlier edits: expected matrices of this model"):
            held_entries(model, [good, bad], 0.1)
    torn = tmp_path / "torn"
    shutil.copytree(good, torn)
    (torn / "adapter_model.safetensors").write_bytes(b"not tensors")
    config = tmp_path / "config"
    shutil.copytree(good, config)
    (config / "adapter_config.json").write_text("{}")
    for bad in (tmp_path / "gone", torn, config):
        with pytest.raises(UsageError, match="adapter 1 of 1 earlier edits: expected a folder of peft"):
            held_entries(model, [bad], 0.1)
