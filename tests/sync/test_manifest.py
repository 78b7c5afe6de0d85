"""The manifest: one layout, computed alike at both ends, and refused with every problem named."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_sync.errors import ManifestMismatch
from weight_sync.layout.manifest import (
    ALIGNMENT,
    DTYPES,
    Manifest,
    TensorMeta,
    WireManifest,
    dtype_name,
    parse_dtype,
)


def meta(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorMeta:
    return TensorMeta(name=name, shape=shape, dtype=dtype)


def manifest(*metas: TensorMeta, bucket_bytes: int = 1 << 20) -> Manifest:
    return Manifest(tensors=metas, bucket_bytes=bucket_bytes)


metas = st.lists(
    st.builds(
        TensorMeta,
        name=st.text(min_size=1, max_size=12),
        shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
        dtype=st.sampled_from(list(DTYPES.values())),
    ),
    max_size=12,
    unique_by=lambda m: m.name,
).map(tuple)


def test_tensors_follow_each_other_in_order_on_256_byte_boundaries() -> None:
    layout = manifest(meta("a", 3), meta("b", 64, dtype=torch.bfloat16), meta("c"), meta("d", 65))
    assert layout.offsets == (0, 256, 512, 768)
    assert layout.arena_bytes == 768 + 512
    assert layout.num_bytes == 12 + 128 + 4 + 260
    assert layout.index == {"a": 0, "b": 1, "c": 2, "d": 3}


@given(metas)
def test_views_are_typed_disjoint_and_cover_what_the_metadata_says(
    tensors: tuple[TensorMeta, ...],
) -> None:
    layout = manifest(*tensors)
    buffer = torch.zeros(layout.arena_bytes, dtype=torch.uint8)
    for view, m, start in zip(layout.views(buffer), tensors, layout.offsets, strict=True):
        assert (tuple(view.shape), view.dtype) == (m.shape, m.dtype)
        assert start % ALIGNMENT == 0
        if m.num_elements:
            assert view.data_ptr() == buffer.data_ptr() + start
            view.view(-1).view(torch.uint8).add_(1)
    assert set(buffer.tolist()) <= {0, 1}
    assert int(buffer.sum()) == layout.num_bytes


@given(metas, st.integers(1, 5000))
def test_a_manifest_survives_the_wire(tensors: tuple[TensorMeta, ...], bucket_bytes: int) -> None:
    layout = manifest(*tensors, bucket_bytes=bucket_bytes)
    data = msgspec.msgpack.encode(layout.to_wire())
    arrived = Manifest.from_wire(msgspec.msgpack.decode(data, type=WireManifest))
    assert arrived == layout
    assert arrived.digest == layout.digest


def test_the_digest_tells_every_difference_in_layout_apart() -> None:
    layouts = [
        manifest(meta("a", 2, 3), meta("b", 4)),
        manifest(meta("b", 4), meta("a", 2, 3)),
        manifest(meta("a", 3, 2), meta("b", 4)),
        manifest(meta("a", 2, 3, dtype=torch.int32), meta("b", 4)),
        manifest(meta("a", 2, 3), meta("c", 4)),
        manifest(meta("a", 2, 3), meta("b", 4), bucket_bytes=1 << 21),
        manifest(meta("a", 2, 3)),
        manifest(),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)


def test_the_digest_never_changes() -> None:
    # Both ends compare it, perhaps with different releases.
    layout = manifest(meta("model.é", 2, 3, dtype=torch.bfloat16), meta("b"))
    assert layout.digest == "9af0ef46835a1dcb7e488a2f64a739f6a35252c3a072a924bd8760b7ebb56ef2"


@given(metas, st.integers(1, 3000))
def test_buckets_cut_the_tensors_into_runs_of_at_most_their_size(
    tensors: tuple[TensorMeta, ...], bucket_bytes: int
) -> None:
    layout = manifest(*tensors, bucket_bytes=bucket_bytes)
    assert [i for bucket in layout.buckets for i in bucket] == list(range(len(tensors)))
    ends = [*layout.offsets, layout.arena_bytes]
    assert all(layout.buckets)
    for bucket in layout.buckets:
        span = ends[bucket.stop] - ends[bucket.start]
        assert span <= bucket_bytes or len(bucket) == 1
    for first, second in zip(layout.buckets, layout.buckets[1:], strict=False):
        assert ends[second.start + 1] - ends[first.start] > bucket_bytes


def test_all_problems_are_one_error() -> None:
    with pytest.raises(ManifestMismatch) as caught:
        manifest(
            meta("twice", 1),
            meta("twice", 2),
            meta("negative", 3, -1),
            meta("", 1),
            meta("n" * 513, 1),
            meta("quantised", 1, dtype=torch.quint8),
            bucket_bytes=0,
        )
    text = str(caught.value)
    for part in ("twice: got it 2 times", "negative: got shape [3, -1]", "513 characters"):
        assert part in text
    for part in ("0 characters", "torch.quint8", "bucket_bytes: got 0"):
        assert part in text


def test_an_arena_has_a_largest_size() -> None:
    with pytest.raises(ManifestMismatch, match=r"2\*\*48"):
        manifest(meta("huge", 2**30, 2**30))


def test_a_very_long_list_of_problems_is_cut_and_counted() -> None:
    with pytest.raises(ManifestMismatch, match="and 500 more"):
        manifest(*(meta(f"t{i}", -1) for i in range(1500)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", ["a", "b"]),
        ("names", [7]),
        ("names", ["x" * 513]),
        ("shapes", [[-1]]),
        ("shapes", [[2**48]]),
        ("shapes", [[1] * 33]),
        ("dtypes", ["float33"]),
        ("dtypes", ["os.system"]),
        ("bucket_bytes", 0),
        ("unexpected", 1),
    ],
)
def test_a_malformed_manifest_from_the_wire_is_refused(field: str, value: object) -> None:
    good = {"names": ["a"], "shapes": [[2]], "dtypes": ["float32"], "bucket_bytes": 1}
    assert Manifest.from_wire(msgspec.convert(good, WireManifest)).tensors == (meta("a", 2),)
    with pytest.raises((ManifestMismatch, msgspec.ValidationError)):
        Manifest.from_wire(msgspec.convert({**good, field: value}, WireManifest))


def test_dtypes_are_read_with_and_without_their_prefix() -> None:
    for name, dtype in DTYPES.items():
        assert parse_dtype(name) is parse_dtype(f"torch.{name}") is dtype
        assert dtype_name(dtype) == name
    with pytest.raises(ManifestMismatch, match="bfloat16"):
        parse_dtype("bf16")
