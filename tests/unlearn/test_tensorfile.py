from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from probes.errors import UnlearnError, UsageError
from unlearn.checkpoints.tensorfile import TensorFile, build_header, dtype_name


def test_header_equals_the_reference_writer(tmp_path: Path) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {f"t{i}é": torch.arange(i).reshape(-1, 1).to(dtype) for i, dtype in enumerate(types)}
    tensors["scalar"] = torch.tensor(3, dtype=torch.int32)
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header, infos = build_header((name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items())
    file = TensorFile.read(tmp_path / "x.safetensors")
    assert file.header == header
    assert [info.name for info in file.tensors] == [info.name for info in infos]
    assert {i.name: (i.start, i.end) for i in file.tensors} == {i.name: (i.start, i.end) for i in infos}


def refused_or_accepted_by_both(path: Path) -> None:
    """One clear line, or a file that the reference reader accepts with the same names, types, shapes and bytes."""
    try:
        file = TensorFile.read(path)
        file.digest()
    except UnlearnError as error:
        message = str(error)
        assert "\n" not in message
        return
    with safe_open(path, "np") as reference:
        assert sorted(reference.keys()) == sorted(info.name for info in file.tensors)
        for info in file.tensors:
            expected = reference.get_slice(info.name)
            assert tuple(expected.get_shape()) == info.shape
            assert expected.get_dtype() == info.dtype
            assert bytes(file.load(info)) == reference.get_tensor(info.name).tobytes()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(3, dtype=torch.int64)}, path, {"format": "pt"})
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_one_line(small_file: bytes, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        length = data.draw(st.integers(0, 8))
        raw[start : start + length] = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"{", b"9"])))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    refused_or_accepted_by_both(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "F4", "?"]), "shape": st.lists(st.integers(0, 4), max_size=2)},
    optional={"data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values, "more": json_values},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3))
def test_arbitrary_headers_end_in_one_line(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    refused_or_accepted_by_both(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}',
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}}',
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
        b'{"a":{"dtype":"U8","shape":[12.0],"data_offsets":[0,12]}}',
        b'{"a":{"dtype":"U8","shape":[12,true],"data_offsets":[0,12]}}',
        b'{"a\\n|F32|[1]|0":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
        b' {"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
        b'{"__metadata__":{"format":1},"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
        b'{"\\ud800":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
        b"[" * 50_000,
    ],
    ids=["overlap", "gap", "duplicate", "float", "bool", "line break", "space", "metadata", "surrogate", "nesting"],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(UsageError, match="expected a complete safetensors file"):
        TensorFile.read(path)


def test_a_header_that_does_not_lie(tmp_path: Path) -> None:
    """The one the lies above were made from."""
    header = b'{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    [info] = TensorFile.read(path).tensors
    assert (info.name, info.dtype, info.shape, info.nbytes, info.elements) == ("a", "U8", (12,), 12, 12)


def test_extreme_numbers_are_still_numbers(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        limits = torch.finfo(dtype)
        tensor = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
        save_file({"t": tensor}, tmp_path / "x.safetensors")
        TensorFile.read(tmp_path / "x.safetensors").digest()
