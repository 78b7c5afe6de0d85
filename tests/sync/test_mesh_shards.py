"""Which rank writes what: pure functions, without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sync_support import ALIAS, FUSED, toy_shapes
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Shard

from weight_sync import WeightPublisher
from weight_sync.errors import ManifestMismatch
from weight_sync.layout import region as regions
from weight_sync.layout.fused import Fused
from weight_sync.layout.manifest import WireManifest
from weight_sync.layout.shards import HeldRegion, share
from weight_sync.layout.tensor_sums import tensor_fingerprint
from weight_sync.publisher.selection import Layout
from weight_sync.spmd.messages import Tensor
from weight_sync.spmd.plan import Decision, decide
from weight_sync.spmd.share import RankShare
from weight_sync.wire.messages import EngineInfo
from weight_sync.wire.process import current_process


@given(size=st.integers(0, 40), outer=st.integers(1, 5), inner=st.integers(1, 4))
def test_cuts_are_those_of_torch(size: int, outer: int, inner: int) -> None:
    for first in range(outer):
        for second in range(inner):
            runs = share(share([(0, size)], 1, outer, first), 1, inner, second)
            shape, offset = _compute_local_shape_and_global_offset(
                (size,), (outer, inner), [first, second], [Shard(0), Shard(0)]
            )
            assert sum(stop - start for start, stop in runs) == shape[0]
            if runs:
                assert runs[0][0] == offset[0]


@given(
    size=st.integers(0, 40),
    factor=st.integers(1, 4),
    ranks=st.integers(1, 4),
)
def test_ranks_share_every_element_whatever_the_factor(size: int, factor: int, ranks: int) -> None:
    found: list[int] = []
    for rank in range(ranks):
        for start, stop in share([(0, size)], factor, ranks, rank):
            found += range(start, stop)
    assert sorted(found) == list(range(size))


def test_interleaved_cuts_take_the_same_share_of_every_stretch() -> None:
    assert share([(0, 8)], 2, 2, 0) == [(0, 2), (4, 6)]
    assert share([(0, 8)], 2, 2, 1) == [(2, 4), (6, 8)]
    assert share([(0, 5)], 1, 4, 3) == []


def tensor(name: str, *held: regions.Region, shape: Any = None, dtype: str = "bfloat16") -> Tensor:
    shape = toy_shapes()[name][0] if shape is None else shape
    return Tensor(name=name, shape=shape, dtype=dtype, regions=held)


@pytest.fixture
def layout(engine: Any) -> Layout:
    with WeightPublisher(engine) as publisher:
        return Layout(publisher.engine_info(), bucket_bytes=600)


def decided(layout: Layout, *ranks: list[Tensor], strict: bool = False) -> Decision:
    return decide(layout, ranks, strict=strict, cast=True, ignored=lambda names: frozenset())


def test_replicas_are_dealt_out_evenly_and_written_once(layout: Layout) -> None:
    names = ["embed.weight", "layers.0.q.weight", "norm.weight"]
    rank = [tensor(name, regions.whole(toy_shapes()[name][0])) for name in names]
    decision = decided(layout, rank, rank)
    first, second = decision.actions
    assert [a + b for a, b in zip(first, second, strict=True)] == [1, 1, 1]
    assert 0 < sum(first) < 3


def test_problems_of_all_ranks_are_one_error(layout: Layout) -> None:
    half, rest = ((0, 12), (0, 16)), ((12, 24), (0, 16))
    with pytest.raises(ManifestMismatch) as error:
        decided(
            layout,
            [tensor("embed.weight", half), tensor("nrm.weight", ((0, 7),), shape=(7,))],
            [tensor("embed.weight", rest, shape=(24, 17))],
        )
    assert "did you mean norm.weight?" in str(error.value)
    assert "embed.weight: got bfloat16 [24, 17] on rank 1" in str(error.value)
    with pytest.raises(ManifestMismatch, match="192 of 384 elements"):
        decided(layout, [tensor("embed.weight", half)], [])
    overlapping = ((6, 24), (0, 16))
    with pytest.raises(ManifestMismatch, match="overlap"):
        decided(layout, [tensor("embed.weight", half)], [tensor("embed.weight", overlapping)])
    with pytest.raises(ManifestMismatch, match="sent more than once by rank 0"):
        decided(layout, [tensor("embed.weight", half, rest)] * 2)
    with pytest.raises(ManifestMismatch, match=r"norm.weight bfloat16 \[7\]: missing"):
        decided(layout, [tensor("embed.weight", half, rest)], strict=True)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("spelling", ["{}", "_orig_mod.module.{}"])
def test_shares_put_a_fused_tensor_and_a_twin_where_they_belong(
    layout: Layout, dim: int, num_ranks: int, spelling: str
) -> None:
    """A fused tensor cut across its components, and the tied head cut in another way than the embedding; also under
    the names of a compiled module."""
    fused, embed, head = map(spelling.format, (FUSED, "embed.weight", ALIAS))
    full = {fused: torch.randn(32, 16), embed: torch.randn(24, 16)}
    full[head] = full[embed]
    cuts = {fused: dim, embed: dim, head: 1 - dim}
    held: list[list[tuple[str, list[HeldRegion]]]] = []
    for rank in range(num_ranks):
        held.append([])
        for name, whole in full.items():
            ranges = [[(0, size)] for size in whole.shape]
            ranges[cuts[name]] = share(ranges[cuts[name]], 1, num_ranks, rank)
            region = tuple(along[0] for along in ranges)
            local = tuple((0, stop - start) for start, stop in region)
            held[-1].append((name, [HeldRegion(region, local)]))
    described = [
        [
            tensor(
                name, *(p.region for p in pieces), shape=tuple(full[name].shape), dtype="float32"
            )
            for name, pieces in rank
        ]
        for rank in held
    ]
    decision = decided(layout, *described)
    assert decision.num_tensors == 3 and len(decision.casts) == 3
    buffer = torch.zeros(layout.manifest.arena_bytes, dtype=torch.uint8)
    totals = dict.fromkeys(decision.rows.tolist(), 0)
    twins = 0
    for rank, actions in zip(held, decision.actions, strict=True):
        rank_share = RankShare(layout, rank, rows=decision.rows, actions=actions, buffer=buffer)
        local = [regions.part(full[name], pieces[0].region) for name, pieces in rank]
        rows = iter(decision.rows.tolist())
        for number in range(rank_share.num_buckets):
            for value in rank_share.write(number, local).tolist():
                totals[next(rows)] += value
        twins += int(rank_share.compare(local).sum())
    q, k, v = full[fused].bfloat16().split([16, 8, 8])
    expected = {
        "layers.0.q.weight": q,
        "layers.0.k.weight": k,
        "layers.0.v.weight": v,
        "embed.weight": full[embed].bfloat16(),
    }
    for name, value in expected.items():
        row = layout.index[name]
        assert torch.equal(layout.manifest.view(buffer, row), value), name
        assert totals[row] % 2**64 == tensor_fingerprint(value), name
    assert twins % 2**64 == tensor_fingerprint(expected["embed.weight"])
    assert len(totals) == 4


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_shares_put_stacked_experts_where_each_of_their_matrices_belongs(
    dim: int, num_ranks: int
) -> None:
    """(4 experts, gate and up of 3 rows each, 8 columns), cut along any dimension, also through a matrix."""
    stack = Fused.stacked(
        [Fused.joined({f"{e}.gate": (3, 8), f"{e}.up": (3, 8)}) for e in range(4)]
    )
    num = len(stack.parts)
    manifest = WireManifest(
        names=stack.parts, shapes=((3, 8),) * num, dtypes=("float32",) * num, bucket_bytes=600
    )
    info = EngineInfo(
        protocol=1,
        process=current_process(),
        engine_id="e",
        version=0,
        label=None,
        torn=None,
        aliases={},
        device="cpu",
        tp_size=1,
        manifest=manifest,
        fused={"stack": stack},
        transports=(),
    )
    layout, whole = Layout(info, bucket_bytes=600), torch.randn(stack.shape)
    held = []
    for rank in range(num_ranks):
        ranges = [[(0, size)] for size in whole.shape]
        ranges[dim] = share(ranges[dim], 1, num_ranks, rank)
        region = tuple((along or [(0, 0)])[0] for along in ranges)
        held.append([("stack", [HeldRegion(region, tuple((0, b - a) for a, b in region))])])
    described = [
        [tensor("stack", rank[0][1][0].region, shape=stack.shape, dtype="float32")] for rank in held
    ]
    decision = decided(layout, *described, strict=True)
    buffer = torch.zeros(layout.manifest.arena_bytes, dtype=torch.uint8)
    for rank, actions in zip(held, decision.actions, strict=True):
        rank_share = RankShare(layout, rank, rows=decision.rows, actions=actions, buffer=buffer)
        for number in range(rank_share.num_buckets):
            rank_share.write(number, [regions.part(whole, rank[0][1][0].region)])
    for i in range(num):
        assert torch.equal(layout.manifest.view(buffer, i), stack.view(whole, i, (3, 8)))
