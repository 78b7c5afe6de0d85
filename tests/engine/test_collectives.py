"""Every collective of a group, over gloo, against what it means; every form of message, typed."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch

from rollout.distributed.group_coordinator import GroupCoordinator
from rollout.distributed.stateless_process_group import StatelessProcessGroup
from weight_sync.errors import DeadlineExceeded, ProtocolError, TransportError
from weight_sync.process_groups.rendezvous import StoreServer


class Note(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    text: str


class Ranks:
    """The ranks of a group, each on a thread of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.server = StoreServer(timeout_s=20)
        self.pool = ThreadPoolExecutor(size)
        self.meetings = list(self.pool.map(self._meet, range(size)))
        self.groups = list(self.pool.map(GroupCoordinator.create, self.meetings))

    def _meet(self, rank: int) -> StatelessProcessGroup:
        return StatelessProcessGroup.create(
            *("127.0.0.1", self.server.port, rank, self.size),
            name="ranks",
            timeout_s=20,
            served=True,
            data_expiration_seconds=0.3,
        )

    def all(self, call: Callable[[GroupCoordinator], Any]) -> list[Any]:
        """What `call` returns on every rank."""
        return list(self.pool.map(call, self.groups))

    def all_meet(self, call: Callable[[StatelessProcessGroup], Any]) -> list[Any]:
        """The same, over the store."""
        return list(self.pool.map(call, self.meetings))

    def close(self) -> None:
        for group in (*self.groups, *self.meetings):
            group.destroy() if isinstance(group, GroupCoordinator) else group.close()
        self.pool.shutdown()
        self.server.close()


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    made = Ranks(request.param)
    yield made
    made.close()


def mine(group: GroupCoordinator, *shape: int) -> torch.Tensor:
    """Whole numbers, other ones on every rank."""
    generator = torch.Generator().manual_seed(group.rank)
    return torch.randint(-50, 50, shape, generator=generator).float()


def theirs(size: int, *shape: int) -> list[torch.Tensor]:
    """`mine` of all ranks."""
    return [
        torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(rank)).float()
        for rank in range(size)
    ]


def test_a_rank_knows_its_place(ranks: Ranks) -> None:
    for rank, group in enumerate(ranks.groups):
        last = ranks.size - 1
        assert (group.rank_in_group, group.world_size, group.ranks) == (
            rank,
            ranks.size,
            list(range(ranks.size)),
        )
        assert (group.first_rank, group.last_rank) == (0, last)
        assert (group.is_first_rank, group.is_last_rank) == (rank == 0, rank == last)
        assert (group.prev_rank, group.next_rank) == (
            (rank - 1) % ranks.size,
            (rank + 1) % ranks.size,
        )


def test_sums_are_scattered(ranks: Ranks) -> None:
    size = ranks.size
    total = torch.stack(theirs(size, 2 * size, 3)).sum(0)
    for rank, got in enumerate(
        ranks.all(lambda g: g.reduce_scatter_tensor(torch.empty(2, 3), mine(g, 2 * size, 3)))
    ):
        assert torch.equal(got, total[2 * rank : 2 * rank + 2])
    for rank, got in enumerate(
        ranks.all(lambda g: g.reduce_scatter(torch.empty(2, 3), mine(g, 2 * size, 3).chunk(size)))
    ):
        assert torch.equal(got, total[2 * rank : 2 * rank + 2])
    sizes = [2 * size - (size - 1), *[1] * (size - 1)]
    for rank, got in enumerate(
        ranks.all(lambda g: g.reduce_scatterv(mine(g, 2 * size, 3), sizes=sizes))
    ):
        assert torch.equal(got, total.split(sizes)[rank])
    even = ranks.all(lambda g: g.reduce_scatterv(mine(g, 2 * size, 3), torch.empty(2, 3)))
    assert all(torch.equal(got, total[2 * r : 2 * r + 2]) for r, got in enumerate(even))


def test_tensors_are_gathered_in_every_form(ranks: Ranks) -> None:
    size, parts = ranks.size, theirs(ranks.size, 2, 3)
    into = ranks.all(lambda g: g.all_gather_into_tensor(torch.empty(2 * size, 3), mine(g, 2, 3)))
    assert all(torch.equal(got, torch.cat(parts)) for got in into)

    def listed(group: GroupCoordinator) -> list[torch.Tensor]:
        outputs = [torch.empty(2, 3) for _ in range(size)]
        group.all_gather(mine(group, 2, 3), 0, outputs)
        return outputs

    for got in ranks.all(listed):
        assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
    sizes = list(range(size))  # one rank has none

    def rows(group: GroupCoordinator) -> Any:
        own = mine(group, size, 3)[: sizes[group.rank]]
        return group.all_gatherv([own, own * 2], sizes)

    whole = torch.cat([part[:n] for part, n in zip(theirs(size, size, 3), sizes, strict=True)])
    for one, two in ranks.all(rows):
        assert torch.equal(one, whole) and torch.equal(two, whole * 2)
    gathered = ranks.all(lambda g: g.gather(mine(g, 2, 3), dst=size - 1, dim=-1))
    assert torch.equal(gathered.pop(), torch.cat(parts, dim=-1))
    assert gathered == [None] * (size - 1)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    def wrong(group: GroupCoordinator) -> None:
        for call in (
            lambda: group.reduce_scatterv(mine(group, 4, 2), sizes=[1] * 7),
            lambda: group.reduce_scatter_tensor(torch.empty(3), mine(group, 7, 2)),
        ):
            with pytest.raises(TransportError, match="expected"):
                call()
        if group.size > 1:
            with pytest.raises(TransportError, match="same sizes on all ranks"):
                group.all_gatherv(mine(group, 3, 2), [2] * group.size)

    ranks.all(wrong)


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_objects_are_gathered_broadcast_and_sent_on_typed(ranks: Ranks, length: int) -> None:
    def note(rank: int) -> Note:
        return Note(rank=rank, text="x" * (length * rank))

    everyone = [note(rank) for rank in range(ranks.size)]
    assert (
        ranks.all(lambda g: g.all_gather_object(note(g.rank), type=Note)) == [everyone] * ranks.size
    )
    last = ranks.size - 1

    def listed(group: GroupCoordinator) -> list[Note]:
        mine = everyone if group.rank == last else [note(0)] * ranks.size
        return group.broadcast_object_list(list(mine), last, type=Note)

    assert ranks.all(listed) == [everyone] * ranks.size

    def around(group: GroupCoordinator) -> Any:
        if group.is_first_rank:
            group.send_object(note(group.rank))
            return group.recv_object(type=Note)
        found = group.recv_object(type=Note)
        group.send_object(note(group.rank))
        return found

    if ranks.size > 1:
        assert ranks.all(around) == [note((r - 1) % ranks.size) for r in range(ranks.size)]


def test_dicts_of_tensors_are_sent_to_a_neighbour(ranks: Ranks) -> None:
    if ranks.size == 1:
        return

    def around(group: GroupCoordinator) -> Any:
        values = {"a": mine(group, 2, 2).bfloat16(), "n": group.rank, "none": None}
        for one in (values, {"only": [1, "x"]}):
            if group.is_first_rank:
                group.send_tensor_dict(one)
                found = group.recv_tensor_dict()
            else:
                found = group.recv_tensor_dict()
                group.send_tensor_dict(one)
            if one is values:
                first = found
            else:
                assert found == one
        return first

    for rank, got in enumerate(ranks.all(around)):
        before = (rank - 1) % ranks.size
        assert (got["n"], got["none"]) == (before, None)
        assert torch.equal(got["a"], theirs(ranks.size, 2, 2)[before].bfloat16())


def test_a_store_carries_typed_objects(ranks: Ranks) -> None:
    everyone = [Note(rank=rank, text=str(rank)) for rank in range(ranks.size)]
    gathered = ranks.all_meet(lambda m: m.all_gather_obj(everyone[m.rank], type=Note))
    told = ranks.all_meet(
        lambda m: m.broadcast_obj(everyone[0] if m.rank == 0 else None, type=Note)
    )
    assert gathered == [everyone] * ranks.size and told == [everyone[0]] * ranks.size
    if ranks.size == 1:
        return

    def around(meeting: StatelessProcessGroup) -> list[Any]:
        for i in range(3):
            meeting.send_obj([meeting.rank, i], meeting.next_rank)
        return [meeting.recv_obj(meeting.prev_rank, type=list[int]) for _ in range(3)]

    assert ranks.all_meet(around) == [
        [[(rank - 1) % ranks.size, i] for i in range(3)] for rank in range(ranks.size)
    ]

    def wrong(meeting: StatelessProcessGroup) -> None:
        meeting.send_obj("text", meeting.next_rank)
        with pytest.raises(ProtocolError, match="cannot read an object"):
            meeting.recv_obj(meeting.prev_rank, type=Note)
        with pytest.raises(TransportError, match="other end"):
            meeting.send_obj(1, meeting.rank)
        meeting.barrier()

    ranks.all_meet(wrong)


def test_what_nobody_reads_is_forgotten(ranks: Ranks) -> None:
    if ranks.size == 1:
        return

    def forget(meeting: StatelessProcessGroup) -> bool:
        meeting.barrier()
        if meeting.rank == 0:
            meeting.send_obj("old", 1)
            time.sleep(0.4)
            meeting.expire_data()
        meeting.barrier()
        return meeting.store.check(["0>1/4"])

    assert not any(ranks.all_meet(forget))
    server = StoreServer(timeout_s=20)
    try:
        with pytest.raises(DeadlineExceeded, match="rank 1"):
            alone = StatelessProcessGroup.create(
                *("127.0.0.1", server.port, 0, 1), name="alone", served=True
            )
            alone.size = 2
            alone.recv_obj(1, timeout_s=0.2)
    finally:
        alone.close()
        server.close()


def test_a_group_that_is_collected_leaves() -> None:
    before = set(threading.enumerate())
    group = StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, name="dropped")
    group.barrier()
    assert set(threading.enumerate()) - before
    group.cycle = group  # type: ignore[attr-defined]  # found by the collector alone
    del group
    end = time.monotonic() + 20
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        gc.collect()  # its own threads may have held it for a moment longer
        time.sleep(0.01)
    assert not left
