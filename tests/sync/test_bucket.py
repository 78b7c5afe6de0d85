"""Flattened buckets: ours, and those of existing senders."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_sync import FlattenedTensorBucket, FlattenedTensorMetadata
from weight_sync.errors import ManifestMismatch

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool, torch.uint8]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def same(a: list[tuple[str, torch.Tensor]], b: list[tuple[str, torch.Tensor]]) -> bool:
    return [n for n, _ in a] == [n for n, _ in b] and all(
        x.dtype == y.dtype and torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


named = st.lists(
    st.tuples(st.lists(st.integers(0, 7), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    max_size=8,
).map(lambda kinds: [(f"t{i}", tensor(*kind, seed=i)) for i, kind in enumerate(kinds)])


@given(named)
def test_what_goes_in_comes_out(tensors: list[tuple[str, torch.Tensor]]) -> None:
    bucket = FlattenedTensorBucket(named_tensors=tensors)
    other = FlattenedTensorBucket(
        flattened_tensor=bucket.get_flattened_tensor(), metadata=bucket.get_metadata()
    )
    assert same(bucket.reconstruct_tensors(), tensors)
    assert same(other.reconstruct_tensors(), tensors)


def test_tensors_lie_on_256_byte_boundaries_and_are_described_in_bytes() -> None:
    bucket = FlattenedTensorBucket(
        named_tensors=[("a", torch.zeros(3, dtype=torch.int8)), ("b", torch.zeros(2, 2))]
    )
    assert bucket.get_metadata() == [
        FlattenedTensorMetadata(
            name="a", shape=torch.Size([3]), dtype=torch.int8, start_idx=0, end_idx=3, numel=3
        ),
        FlattenedTensorMetadata(
            name="b",
            shape=torch.Size([2, 2]),
            dtype=torch.float32,
            start_idx=256,
            end_idx=272,
            numel=16,
        ),
    ]
    flat = bucket.get_flattened_tensor()
    assert (flat.dtype, tuple(flat.shape)) == (torch.uint8, (272,))


def test_unpacked_tensors_alias_the_bucket() -> None:
    bucket = FlattenedTensorBucket(named_tensors={"a": torch.zeros(4), "b": torch.zeros(2)})
    bucket.get_flattened_tensor().fill_(255)
    values = dict(bucket.reconstruct_tensors())
    assert values["b"].view(torch.uint8).tolist() == [255] * 8


def test_any_stride_and_parameters_are_packed() -> None:
    base = torch.arange(24.0).view(4, 6)
    sources = OrderedDict(
        transposed=base.t(),
        slice=base[:, 1:2],
        step=base[::2, ::3],
        parameter=torch.nn.Parameter(base),
    )
    got = FlattenedTensorBucket(named_tensors=sources).reconstruct_tensors()
    assert same(got, [(name, value.detach()) for name, value in sources.items()])


def test_an_iterator_may_reuse_one_buffer() -> None:
    def reuse() -> Any:
        buffer = torch.zeros(5)
        for i in range(4):
            buffer.fill_(i)
            yield f"t{i}", buffer

    got = FlattenedTensorBucket(named_tensors=reuse()).reconstruct_tensors()
    assert [value.tolist() for _, value in got] == [[float(i)] * 5 for i in range(4)]


def test_an_empty_bucket_is_valid_both_ways() -> None:
    for empty in ([], {}, iter(())):
        bucket = FlattenedTensorBucket(named_tensors=empty)
        assert bucket.get_flattened_tensor().numel() == 0
        assert bucket.get_metadata() == bucket.reconstruct_tensors() == []
    read = FlattenedTensorBucket(flattened_tensor=torch.empty(0, dtype=torch.uint8), metadata=[])
    assert read.reconstruct_tensors() == []


def peer_bucket(
    tensors: list[tuple[str, torch.Tensor]], *, elements: bool, as_strings: bool = False
) -> tuple[torch.Tensor, list[SimpleNamespace]]:
    """The layout of existing senders: no padding, places in bytes or in elements."""
    flat, places, at = [], [], 0
    for name, value in tensors:
        raw = value.contiguous().view(-1).view(torch.uint8)
        size = value.numel() if elements else len(raw)
        places.append(
            SimpleNamespace(
                name=name,
                shape=tuple(value.shape),
                dtype=str(value.dtype) if as_strings else value.dtype,
                start_idx=at,
                end_idx=at + size,
                numel=size,
            )
        )
        flat.append(raw)
        at += size
    return torch.cat(flat), places


@pytest.mark.parametrize("as_strings", [False, True])
def test_unpadded_buckets_of_mixed_dtypes_are_read(as_strings: bool) -> None:
    tensors = [
        ("a", tensor((3,), torch.int8)),
        ("b", tensor((2, 3), torch.float32)),
        ("c", tensor((5,), torch.bfloat16)),
        ("d", tensor((), torch.float64)),
    ]
    flat, metadata = peer_bucket(tensors, elements=False, as_strings=as_strings)
    bucket = FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata)
    assert same(bucket.reconstruct_tensors(), tensors)


@pytest.mark.parametrize("typed", [False, True])
def test_places_in_elements_are_read(typed: bool) -> None:
    tensors = [(f"t{i}", tensor((i + 1, 3), torch.bfloat16, seed=i)) for i in range(4)]
    flat, metadata = peer_bucket(tensors, elements=True)
    bucket = FlattenedTensorBucket(
        flattened_tensor=flat.view(torch.bfloat16) if typed else flat, metadata=metadata
    )
    assert same(bucket.reconstruct_tensors(), tensors)


def test_metadata_may_be_mappings() -> None:
    tensors = [("a", tensor((3, 2), torch.float32))]
    flat, metadata = peer_bucket(tensors, elements=False)
    bucket = FlattenedTensorBucket(
        flattened_tensor=flat, metadata=[vars(entry) for entry in metadata]
    )
    assert same(bucket.reconstruct_tensors(), tensors)


def test_every_wrong_entry_is_in_one_error() -> None:
    tensors = [(f"t{i}", tensor((4,), torch.float32)) for i in range(7)]
    flat, metadata = peer_bucket(tensors, elements=False)
    metadata[0].end_idx += 4
    metadata[1].shape = (5,)
    metadata[2].dtype = "float33"
    metadata[3].start_idx, metadata[3].end_idx = 1000, 1016
    metadata[4].start_idx = -16
    metadata[5].name = "t6"
    with pytest.raises(ManifestMismatch) as caught:
        FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata)
    text = str(caught.value)
    for part in ("t0: got 20 bytes", "t1: got 16 bytes, expected 20", "float33", "t3: got bytes"):
        assert part in text
    for part in ("t4: got bytes -16", "t6: got it 2 times", "t1: got bytes that t0 holds"):
        assert part in text


@pytest.mark.parametrize("place", [True, 1.0, "0", None])
def test_places_that_are_no_integers_are_refused(place: object) -> None:
    flat, metadata = peer_bucket([("a", torch.zeros(4))], elements=False)
    metadata[0].start_idx = place
    with pytest.raises(ManifestMismatch, match="a: got places"):
        FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata)


def test_doubled_names_and_half_a_bucket_are_refused() -> None:
    with pytest.raises(ManifestMismatch, match="a: got it 2 times"):
        FlattenedTensorBucket(named_tensors=[("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(ValueError, match="expected one of the two"):
        FlattenedTensorBucket()
    with pytest.raises(ValueError, match="expected both"):
        FlattenedTensorBucket(flattened_tensor=torch.zeros(1, dtype=torch.uint8))
