"""Safetensors files as they are read here: what the library writes, and nothing that does not fit together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weight_sync.layout.checkpoint_folder import STORED_DTYPES, stored_tensors
from weight_sync.layout.manifest import DTYPES


def written(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    """A file made by hand; its header is not padded."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(first: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> Any:
    return {
        "dtype": dtype,
        "shape": [end - first] if shape is None else shape,
        "data_offsets": [first, end],
    }


def test_every_dtype_that_travels_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    dtypes = set(DTYPES.values()) - {torch.complex128}  # which the library cannot write
    tensors = {
        str(number): torch.randint(0, 2, (3, 5, 16), dtype=torch.uint8).view(dtype)
        for number, dtype in enumerate(dtypes)
    }
    tensors |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5), "turned": torch.eye(3).t()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "a.safetensors")
    stored, problems = stored_tensors([tmp_path / "a.safetensors"])
    assert not problems and stored.keys() == tensors.keys()
    assert {STORED_DTYPES[tensor.dtype] for tensor in stored.values()} == dtypes
    for name, expected in load_file(tmp_path / "a.safetensors").items():
        got = stored[name].view()
        assert got.dtype == expected.dtype and got.shape == expected.shape == stored[name].shape
        assert torch.equal(got.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_tensors_that_no_boundary_suits_are_read_right(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    data = (
        b"\x07" + values.numpy().tobytes() + values.bfloat16().view(torch.uint8).numpy().tobytes()
    )
    header = {
        "__metadata__": {"shape": "what anyone likes", "dtype": "too"},
        "wide": entry(1, 9, "F32", [2]),
        "odd": entry(0, 1),
        "narrow": entry(9, 13, "BF16", [2, 1]),
    }
    stored, problems = stored_tensors([written(tmp_path / "a", header, data)])
    assert not problems and list(stored) == ["odd", "wide", "narrow"]
    assert stored["odd"].view().tolist() == [7]
    assert torch.equal(stored["wide"].view(), values)
    assert torch.equal(stored["narrow"].view(), values.bfloat16()[:, None])


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 4), "b": entry(5, 9)}, 9),
        ({"a": entry(0, 4), "b": entry(3, 7)}, 7),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
        ({"a": entry(0, 4)}, 5),
        ({"a": entry(0, 4)}, 3),
        ({"a": entry(0, 4, shape=[5])}, 4),
        ({"a": entry(0, 4, "F32", [2])}, 4),
        ({"a": entry(0, 4, "F4")}, 4),
        ({"a": entry(0, 0, shape=[-1, 0])}, 0),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4),
        ({"a": 3}, 0),
        (b"[]", 0),
        (b"{", 0),
        (b'{"\xff": 1}', 0),
        (b'{"a":' + b"[" * 100_000, 0),
    ],
)
def test_a_header_that_does_not_fit_its_bytes_is_a_problem_and_no_tensor(
    tmp_path: Path, header: Any, size: int
) -> None:
    file = written(tmp_path / "a.safetensors", header, bytes(size))
    stored, (problem,) = stored_tensors([file])
    assert not stored
    assert "a.safetensors cannot be read" in problem and "expected a whole" in problem


@pytest.mark.parametrize("data", [b"", b"\x02\0\0\0\0\0\0", b"\xff" * 40])
def test_what_is_no_safetensors_file_at_all_is_a_problem(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    stored, problems = stored_tensors([tmp_path / "a", tmp_path / "nowhere"])
    assert not stored and len(problems) == 2


def test_a_file_that_is_exchanged_after_its_header_was_read_stays_the_old_one(
    tmp_path: Path,
) -> None:
    save_file({"a": torch.zeros(4), "b": torch.ones(2)}, tmp_path / "x")
    stored, _ = stored_tensors([tmp_path / "x"])
    save_file({"b": torch.full((9,), 3.0), "a": torch.full((7,), 5.0)}, tmp_path / "y")
    os.replace(tmp_path / "y", tmp_path / "x")
    assert torch.equal(stored["a"].view(), torch.zeros(4))
    assert torch.equal(stored["b"].view(), torch.ones(2))
