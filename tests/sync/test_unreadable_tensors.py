"""Tensors whose elements are not there, or not where a dense one has them, are refused by name wherever they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sync_support import ToyEngine, weights
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import weight_sync
from weight_sync.errors import ManifestMismatch, TransportError
from weight_sync.layout.shards import dense_pairs
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.transports.disk import MANIFEST_NAME, read_checkpoint, write_checkpoint

NAME = "layers.0.q.weight"


def given_back(tensor: torch.Tensor) -> torch.Tensor:
    """As trainers do that offload their parameters."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def given_back_with_others(tensor: torch.Tensor) -> torch.Tensor:
    """As those do that keep many of them one behind the other: the address that torch tells is the offset alone."""
    memory = torch.cat([tensor.flatten()] * 2)
    tensor = memory[tensor.numel() :].view(tensor.shape)
    memory.untyped_storage().resize_(0)
    assert tensor.data_ptr()
    return tensor


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whose memory was given back": given_back,
    r"whose memory was given back \(its": given_back_with_others,
    "without data": lambda tensor: tensor.to("meta"),
    "torch.sparse_coo": lambda tensor: tensor.to_sparse(),
    "that is nested": lambda tensor: torch.nested.nested_tensor(list(tensor)),
}
CALLS: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "fingerprint": lambda named, _: weight_sync.fingerprint(named),
    "bucket of a mapping": lambda named, _: weight_sync.FlattenedTensorBucket(named),
    "bucket of an iterator": lambda named, _: weight_sync.FlattenedTensorBucket(
        iter(named.items())
    ),
    "checkpoint": lambda named, path: write_checkpoint(path / "x", named),
    "ranks": lambda named, _: dense_pairs(named),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_what_reads_tensors_says_which_one_cannot_be_read(
    tmp_path: Path, call: str, kind: str
) -> None:
    named = weights(1.0)
    named[NAME] = KINDS[kind](named[NAME])
    with pytest.raises(ManifestMismatch, match=f"{NAME}: got a tensor .*{kind}.*expected a dense"):
        CALLS[call](named, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["auto", "shared_memory"])
def test_a_publish_is_refused_also_when_the_same_names_came_before(
    make_engine: Callable[..., ToyEngine], kind: str, transport: Any
) -> None:
    engine = make_engine(serve=transport != "auto")
    target = engine if transport == "auto" else engine.address
    with WeightPublisher(target, transport=transport, timeout_s=20.0) as publisher:
        for version in (1, 2, 3):
            named = weights(float(version))
            publisher.publish(named)
            named[NAME] = KINDS[kind](named[NAME])
            for source in (named, iter(named.items())):
                with pytest.raises(ManifestMismatch, match=rf"(?s)1 problem.*{NAME}: .*{kind}"):
                    publisher.publish(source)
        assert engine.values() == {3.0} and engine.receiver.version == 3


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [given_back, given_back_with_others])
@pytest.mark.parametrize("call", ["fingerprint", "ranks"])
def test_so_does_what_reads_the_part_that_a_rank_holds(
    mesh: DeviceMesh, tmp_path: Path, call: str, kind: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    named = weights(1.0)
    held = named[NAME].clone()
    named[NAME] = DTensor.from_local(held, mesh, [Shard(0)], run_check=False)
    CALLS[call](named, tmp_path)
    named[NAME] = DTensor.from_local(kind(held), mesh, [Shard(0)], run_check=False)
    with pytest.raises(ManifestMismatch, match=f"{NAME}: got a tensor whose memory was given back"):
        CALLS[call](named, tmp_path)


@pytest.mark.parametrize("named", [5, [("a", 5)], [("a",)], [(3, torch.zeros(2))], ["ab"], [None]])
def test_a_bucket_of_no_named_tensors_is_refused(named: Any) -> None:
    with pytest.raises(ManifestMismatch, match=r"got .*, expected "):
        weight_sync.FlattenedTensorBucket(named)


def test_a_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", weights(1.0))
    for content in (b"\xff\xfe{", b'{"format": "\xff"}', b"", b"[" * 100_000):
        (tmp_path / "x" / MANIFEST_NAME).write_bytes(content)
        with pytest.raises(TransportError, match="cannot be read"):
            read_checkpoint(tmp_path / "x")
