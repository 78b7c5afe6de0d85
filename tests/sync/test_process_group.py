"""Update groups between real processes: what arrives, in which order, and how often."""

from __future__ import annotations

import operator
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group_peer import content
from process_group_support import (
    NAME,
    free_port,
    group_threads,
    join,
    num_descriptors,
    num_threads,
)

from weight_sync.errors import TransportError
from weight_sync.layout.manifest import TensorMeta, align
from weight_sync.process_groups.backends import open_gloo
from weight_sync.process_groups.communicator import Communicator
from weight_sync.process_groups.expected import (
    BEHIND_BYTES,
    ExpectedMessage,
    receive_expected,
    telling_bytes,
)
from weight_sync.process_groups.rendezvous import StoreServer, connect_store
from weight_sync.process_groups.streams import broadcast_parts
from weight_sync.staging.joined_group import JoinedGroup
from weight_sync.transports.trainer_group import TrainerGroup

MIB = 1 << 20
TENSORS: list[tuple[str, list[int], int]] = [
    ("bfloat16", [3, 5], 1),
    ("float32", [0, 4], 2),
    ("int64", [], 3),
    ("float32", [700, 300], 4),
    ("bfloat16", [1], 5),
]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
METAS = [
    TensorMeta(name=f"t{i}", shape=tuple(shape), dtype=DTYPES[dtype])
    for i, (dtype, shape, _) in enumerate(TENSORS)
]


def assert_arrived(tensors: list[torch.Tensor]) -> None:
    for tensor, meta, (_, _, seed) in zip(tensors, METAS, TENSORS, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (meta.dtype, meta.shape)
        sent = content(meta.num_bytes, seed)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), sent)


def receive_tensors(group: JoinedGroup, metas: list[TensorMeta]) -> list[torch.Tensor]:
    ranges, end = [], 0
    for meta in metas:
        ranges.append((end, end + meta.num_bytes))
        end += align(meta.num_bytes)
    buffer = group.landing(end)
    assert buffer is not None
    group.receive_into(buffer, ranges, timeout_s=10).result()
    return [
        buffer[start:stop].view(meta.dtype).view(meta.shape)
        for meta, (start, stop) in zip(metas, ranges, strict=True)
    ]


@pytest.mark.parametrize("how", ["helper", "constructor", "default group"])
def test_a_plain_trainer_reaches_the_engine_however_it_makes_its_group(peers, how):
    [trainer] = peers(1)
    for _ in range(2):  # the same name again after both have left
        port = free_port()
        trainer.start("plain_connect", how=how, port=port, world_size=2, name=NAME)
        with join(port) as group:
            group.joined.result()
            trainer.finish()
            assert not group.peer_is_ours
            for _ in range(2):
                trainer.start("plain_broadcast", tensors=TENSORS)
                assert_arrived(receive_tensors(group, METAS))
                trainer.finish()
        trainer.do("plain_destroy")


def test_a_plain_trainer_reaches_several_engine_ranks_with_a_flattened_bucket(peers):
    trainer, other = peers(2)
    port = free_port()
    trainer.start("plain_connect", how="helper", port=port, world_size=3, name=NAME)
    other.start("join", master_port=port, rank=2, world_size=3, group_name=NAME, timeout_s=20)
    with join(str(port), world_size=3) as group:
        group.joined.result()
        trainer.finish()
        other.finish()
        other.start("receive", num_bytes=MIB, seed=7)
        trainer.start("plain_broadcast", tensors=[("int64", [MIB // 8], 7)])
        buffer = group.landing(MIB)
        group.receive_into(buffer, timeout_s=10).result()
        assert torch.equal(buffer, content(MIB, 7))
        trainer.finish()
        assert other.finish() is True
    other.do("destroy")
    trainer.do("plain_destroy")


def test_one_update_after_another_arrives_whole_at_every_engine_rank(peers):
    trainer, other = peers(2)
    port = trainer.do("serve", world_size=3, group_name=NAME)
    other.do("join", master_port=port, rank=2, world_size=3, group_name=NAME)
    with join(port, world_size=3) as group:
        for member in (trainer, other):
            assert member.do("joined") is True
        group.joined.result()
        assert group.peer_is_ours
        for update in range(10):
            num_bytes = 3 * MIB + 1000 * update + update % 2
            buffer = torch.zeros(num_bytes, dtype=torch.uint8)
            ranges = [(start, min(start + MIB, num_bytes)) for start in range(0, num_bytes, MIB)]
            trainer.start("broadcast", num_bytes=num_bytes, seed=update, ranges=ranges)
            other.start("receive", num_bytes=num_bytes, seed=update, ranges=ranges)
            group.receive_into(buffer, ranges, timeout_s=10).result()
            assert torch.equal(buffer, content(num_bytes, update))
            trainer.finish()
            assert other.finish() is True
    for member in (trainer, other):
        member.do("destroy")


def test_ten_groups_one_after_another_leave_nothing_behind(peers):
    [trainer] = peers(1)

    def one_life() -> None:
        port = trainer.do("serve", world_size=2, group_name=NAME)
        with join(port) as group:
            buffer = torch.zeros(MIB, dtype=torch.uint8)
            trainer.start("broadcast", num_bytes=MIB, seed=1)
            group.receive_into(buffer, timeout_s=10).result()
            trainer.finish()
        trainer.do("destroy")

    def footprint() -> list[int]:
        return [num_descriptors(), num_threads(), *trainer.do("footprint")]

    one_life()
    before = footprint()
    for _ in range(10):
        one_life()
    end = time.monotonic() + 30  # a store's thread ends a moment after its last connection
    while (
        not (settled := all(map(operator.le, after := footprint(), before)))
        and time.monotonic() < end
    ):
        time.sleep(0.02)
    assert settled, (before, after)


def test_groups_live_beside_a_default_group_and_do_not_touch_it(peers):
    trainer, other = peers(2)
    default_port = free_port()
    for rank, member in enumerate((trainer, other)):
        member.start("default_group", port=default_port, world_size=2, rank=rank)
    for member in (trainer, other):
        member.finish()
    port = trainer.do("serve", world_size=2, group_name=NAME)
    other.do("join", master_port=port, rank=1, world_size=2, group_name=NAME)
    for member in (trainer, other):
        member.do("joined")
    other.start("receive", num_bytes=1000, seed=2)
    trainer.do("broadcast", num_bytes=1000, seed=2)
    assert other.finish() is True
    for member in (trainer, other):
        member.start("default_sum")
    assert [member.finish() for member in (trainer, other)] == [3, 3]
    for member in (trainer, other):
        member.do("destroy")
        member.do("default_destroy")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "mpi"}, "gloo, nccl"),
        ({"rank": 0}, "the trainer is rank 0"),
        ({"rank": 2}, "below the world size"),
        ({"group_name": ""}, "expected a name"),
        ({"master_port": "http"}, "expected a number"),
    ],
)
def test_what_cannot_be_a_member_is_refused_at_once(options: dict[str, Any], words: str):
    valid = {"rank": 1, "world_size": 2, "group_name": NAME, "master_port": 1}
    before = group_threads()
    with pytest.raises(TransportError, match=words):
        JoinedGroup.join(master_address="127.0.0.1", **{**valid, **options})
    assert group_threads() <= before


def test_buffers_that_do_not_fit_are_refused_before_anything_is_sent():
    with TrainerGroup.serve(world_size=1, group_name=NAME) as group:
        group.joined.result()
        with pytest.raises(TransportError, match="expected contiguous bytes"):
            group.broadcast(torch.zeros(4), timeout_s=1)
        with pytest.raises(TransportError, match="bytes 2 to 9"):
            group.broadcast(torch.zeros(8, dtype=torch.uint8), [(2, 9)], timeout_s=1)
        group.broadcast(
            torch.zeros(8, dtype=torch.uint8), timeout_s=1
        ).result()  # nobody to send to


class Tree:
    """The members of a gloo group on threads of this process, `size` of them."""

    def __init__(self, size: int) -> None:
        self.server, self.size = StoreServer(), size
        self.pool = ThreadPoolExecutor(size)
        self.members = list(self.pool.map(self._open, range(size)))

    def _open(self, rank: int) -> Communicator:
        store: Any = self.server.store
        if rank:
            end = time.monotonic() + 20
            store, lifeline = connect_store(
                "127.0.0.1", self.server.port, world_size=self.size, end=end
            )
            lifeline.close()
        return open_gloo(
            store,
            rank=rank,
            size=self.size,
            name=NAME,
            address="127.0.0.1",
            join_timeout_s=20,
            timeout_s=10,
        )

    def broadcast(self, sent: list[torch.Tensor], expected: list[int], telling: int) -> list[Any]:
        """What each receiving member has afterwards: its parts, or the error that it got."""

        def member(rank: int) -> Any:
            end = time.monotonic() + 10
            if rank == 0:
                return broadcast_parts(self.members[0], sent, depth=2, end=end)
            buffer = torch.zeros(sum(expected) + BEHIND_BYTES, dtype=torch.uint8)
            parts = list(buffer[:-BEHIND_BYTES].split(expected))
            try:
                tells = [telling] * len(parts)
                receive_expected(self.members[rank], parts, end=end, telling=tells)
            except TransportError as error:
                return error
            return parts

        return list(self.pool.map(member, range(self.size)))[1:]

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.pool.shutdown()
        self.server.close()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_every_member_proves_the_length_of_what_it_takes(size):
    """gloo's inner members pass on all that they posted: those behind them must come to the same answer."""
    tree = Tree(size)
    draw = random.Random(size)
    lengths = [0, 1, 2, 4, 12, 16, 100, 4096, 70_000, 3 << 20]
    for i in range(40):
        expected = draw.choice(lengths)
        sent = draw.choice([length for length in lengths if length <= expected])
        if draw.random() < 0.5:  # what is longer by more ends a process: see below
            sent = max(0, expected + draw.choice([-8, -4, -2, 0, 2, 4, 8, 16]))
        data = content(sent, i)
        data[-1:] = 0x3C  # the end of a number
        got = tree.broadcast([data], [expected], telling=2)
        if sent == expected:
            assert all(torch.equal(parts[0], data) for parts in got)
        elif expected - sent >= 2 or sent > expected:
            words = "more" if sent > expected else "fewer"
            assert all(isinstance(error, TransportError) for error in got), (sent, expected, got)
            assert all(f"{words} bytes than announced" in str(error) for error in got)
    tree.close()


def test_parts_behind_one_another_come_whole_through_every_member():
    tree = Tree(5)
    parts = [content(20_000, 1), content(1, 2), content(0, 3), content(30_001, 4)]
    got = tree.broadcast(parts, [part.numel() for part in parts], telling=4)
    for member in got:
        assert all(torch.equal(a, b) for a, b in zip(member, parts, strict=True))
    tree.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_no_number_looks_like_bytes_that_never_came(dtype):
    dtype = getattr(torch, dtype)
    part = torch.zeros(64 + BEHIND_BYTES, dtype=torch.uint8)[:64]
    ExpectedMessage(part)  # marks the end
    told = telling_bytes(dtype)
    for missing in range(told, 16 + 1):
        end = part[-16:].clone()
        end[: 16 - missing] = 0x3C
        last = end.view(dtype)[-1].float()
        assert torch.isnan(last)


@pytest.mark.parametrize(("host", "address"), [("::1", "[::1]"), ("[::1]", "::1")])
def test_ipv6_addresses_come_with_and_without_brackets(host: str, address: str):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with TrainerGroup.serve(world_size=2, group_name=NAME, host=host, timeout_s=10) as trainer:
        engine = JoinedGroup.join(
            master_address=address,
            master_port=trainer.master_port,
            rank=1,
            world_size=2,
            group_name=NAME,
            timeout_s=10,
        )
        buffer = torch.zeros(100, dtype=torch.uint8)
        received = engine.receive_into(buffer, timeout_s=5)
        trainer.broadcast(content(100, 1), timeout_s=5).result()
        received.result()
        assert torch.equal(buffer, content(100, 1))
        engine.destroy()


def test_nccl_without_a_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TransportError, match="expected 'gloo'"):
        TrainerGroup.serve(world_size=2, group_name=NAME, backend="nccl", device="cuda")
    with pytest.raises(TransportError, match="expected a CUDA device"):
        TrainerGroup.serve(world_size=2, group_name=NAME, backend="nccl", device="cpu")
