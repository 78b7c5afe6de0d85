"""What several ranks have begun together they end together: votes are kept, calls are carried out on all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from sync_support import ToyHost, eventually, toy_map, weights

from weight_sync.errors import (
    DeadlineExceeded,
    EngineDiedError,
    FingerprintMismatch,
    SessionBusy,
    SessionError,
)
from weight_sync.layout.manifest import Manifest
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.session import Phase, Session
from weight_sync.staging.opened_arena import OpenedLocalArena
from weight_sync.wire.messages import (
    Abort,
    Ack,
    ArenaOpened,
    Begin,
    BeginReply,
    Bucket,
    BucketReply,
    Commit,
    GetFingerprint,
    LocalHandle,
    OpenArena,
    Vote,
)
from weight_sync.wire.process import current_process


class TwoRanks:
    """An agreement of which only one rank is there; nothing before the commit is a collective."""

    rank, size = 0, 2

    def gather(self, values: np.ndarray) -> np.ndarray:
        raise AssertionError("a collective before the commit")

    def gather_text(self, text: str) -> list[str]:
        raise AssertionError("a collective before the commit")


class LocalCall:
    """A call to a service of this process."""

    peer = "test"

    def __init__(self, body: Any, timeout_s: float) -> None:
        self.body = body
        self.deadline = time.monotonic() + timeout_s
        self.future: Future[Any] = Future()

    def reply(self, body: Any) -> None:
        self.future.set_result(body)

    def stream(self, body: Any) -> None:
        raise AssertionError

    def fail(self, error: BaseException) -> None:
        self.future.set_exception(error)


class Rank:
    """A rank's channel that notes what it is told, and how long it may take, and answers when the test says so."""

    is_local = True
    dead = None

    def __init__(self) -> None:
        self.told: list[tuple[Any, float]] = []
        self.futures: list[Future[Any]] = []

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        self.told.append((message, timeout_s))
        self.futures.append(Future())
        return self.futures[-1]

    def call(self, message: Any, timeout_s: float) -> Any:
        return self.submit(message, timeout_s).result(timeout_s)

    def lend(self, buffer: Any) -> str:
        raise AssertionError

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def voted() -> Iterator[tuple[WeightReceiver, Begin]]:
    """One receiver of two that has voted for an update of this process."""
    with voted_receiver(agreement=TwoRanks()) as receiver:
        yield receiver


@pytest.fixture
def voted_alone() -> Iterator[tuple[WeightReceiver, Begin]]:
    """The only receiver of an engine that was asked for its vote, as one of a pool is."""
    with voted_receiver() as receiver:
        yield receiver


@contextmanager
def voted_receiver(**options: Any) -> Iterator[tuple[WeightReceiver, Begin]]:
    import torch

    from weight_sync.layout.fingerprints import ArenaFingerprints

    weight_map = toy_map()
    host = ToyHost(weight_map)
    receiver = WeightReceiver(weight_map, host, **options)
    manifest = Manifest(tensors=weight_map.metas(), bucket_bytes=512 << 20)
    buffer = torch.zeros(manifest.arena_bytes, dtype=torch.uint8)
    for view, value in zip(manifest.views(buffer), weights(2.0).values(), strict=False):
        view.fill_(2.0)
    begin = Begin(
        session_id="s",
        holder=current_process(),
        version=None,
        base_version=None,
        label=None,
        manifest_digest=manifest.digest,
        manifest=manifest.to_wire(),
        arena_id=receiver.add_arena(OpenedLocalArena(buffer)),
        strict=True,
        kv_policy=None,
        verify="pause",
        lease_s=30.0,
    )
    epoch = receiver.begin(begin).epoch
    values = ArenaFingerprints(manifest).values(buffer, None).numpy()
    indices = np.arange(len(manifest.tensors), dtype="<u4").tobytes()
    receiver.stage(
        Bucket(session_id="s", epoch=epoch, indices=indices, fingerprints=values.tobytes())
    )
    receiver.prepare("s", epoch)
    yield receiver, begin
    host.close()


def test_a_vote_outlives_its_trainer_until_rank_0_asks_for_something_else(
    voted: tuple[WeightReceiver, Begin],
) -> None:
    receiver, begin = voted
    session = receiver._session
    assert session is not None and session.phase is Phase.VOTED
    trainer_dies(session)
    receiver.sweep()
    assert receiver._session is session
    receiver.begin(msgspec.structs.replace(begin, session_id="next"))
    assert receiver._session is not session


def test_a_vote_of_one_of_a_pool_outlives_its_trainer_for_its_lease(
    voted_alone: tuple[WeightReceiver, Begin],
) -> None:
    receiver, _ = voted_alone
    session = receiver._session
    assert session is not None and session.phase is Phase.VOTED
    trainer_dies(session)
    receiver.sweep()
    assert receiver._session is session
    session.lease_end = 0.0
    receiver.sweep()
    assert receiver._session is None


def test_a_vote_of_one_of_a_pool_ends_with_its_lease_although_its_trainer_lives(
    voted_alone: tuple[WeightReceiver, Begin],
) -> None:
    receiver, begin = voted_alone
    session = receiver._session
    assert session is not None
    session.lease_end = 0.0
    receiver.begin(msgspec.structs.replace(begin, session_id="next"))
    with pytest.raises(SessionError, match="nothing came for its lease"):
        receiver.commit(Commit(session_id="s", epoch=session.epoch, timeout_s=1.0))
    assert receiver.version == 0


def trainer_dies(session: Session) -> None:
    """As far as the receiver can see."""
    holder = session.request.holder
    dead = msgspec.structs.replace(holder, start_time=holder.start_time + 1)
    session.request = msgspec.structs.replace(session.request, holder=dead)


def test_a_vote_of_a_trainer_that_lives_is_not_given_up_for_another(
    voted: tuple[WeightReceiver, Begin],
) -> None:
    receiver, begin = voted
    with pytest.raises(SessionBusy):
        receiver.begin(msgspec.structs.replace(begin, session_id="next"))


def test_a_call_whose_caller_gives_up_is_carried_out_on_all_ranks_all_the_same() -> None:
    ranks = [Rank(), Rank()]
    service = RankedService(ranks)
    call = LocalCall(GetFingerprint(), timeout_s=0.2)
    service.handle(call)
    with pytest.raises(DeadlineExceeded):
        call.future.result(60.0)
    # A collective that one rank refuses because it is late would leave the other one waiting.
    for rank in ranks:
        (told,) = rank.told
        assert told[0] == GetFingerprint() and told[1] > 60.0
    service.close()


@pytest.mark.parametrize("engine", ["voted", "voted_alone"])
def test_a_vote_is_kept_no_longer_than_the_lease_while_the_trainer_lives(
    engine: str, request: pytest.FixtureRequest
) -> None:
    receiver, begin = request.getfixturevalue(engine)
    session = receiver._session
    session.lease_end = 0.0
    receiver.sweep()
    assert receiver._session is (session if engine == "voted" else None)
    receiver.begin(msgspec.structs.replace(begin, session_id="next"))
    assert receiver._session is not session


def opening(service: RankedService, ranks: list[Rank]) -> Begin:
    """The first message of a session over an arena that all ranks have opened."""
    manifest = Manifest(tensors=toy_map().metas(), bucket_bytes=512 << 20)
    opened = LocalCall(OpenArena(handle=LocalHandle(key="k", num_bytes=8)), timeout_s=60.0)
    service.handle(opened)
    assert eventually(lambda: len(ranks[0].futures) == 1)
    for rank in ranks:
        rank.futures[0].set_result(ArenaOpened(arena_id=3))
    assert eventually(opened.future.done)
    return Begin(
        session_id="late",
        holder=current_process(),
        version=None,
        base_version=None,
        label=None,
        manifest_digest=manifest.digest,
        manifest=None,
        arena_id=opened.future.result(0).arena_id,
        strict=True,
        kv_policy=None,
        verify="pause",
        lease_s=30.0,
    )


def test_a_begin_that_one_rank_answers_too_late_is_ended_on_all_of_them() -> None:
    ranks = [Rank(), Rank()]
    service = RankedService(ranks)
    begin = opening(service, ranks)
    call = LocalCall(begin, timeout_s=0.5)
    service.handle(call)
    assert eventually(lambda: len(ranks[0].futures) == 2)
    ranks[0].futures[1].set_result(BeginReply(epoch=7, version=1, need_manifest=False))
    with pytest.raises(DeadlineExceeded):
        call.future.result(60.0)
    for rank in ranks:
        abort, timeout_s = rank.told[-1]
        assert isinstance(abort, Abort) and abort.session_id.startswith("late.")
        assert timeout_s > 60.0
        # Whatever it is, where the answer that says so has not come.
        assert abort.epoch == (7 if rank is ranks[0] else 0)
    service.close()


@pytest.mark.parametrize("refuses", [False, True])
def test_ranks_vote_behind_the_last_bucket_and_commit_when_all_have_taken_it(refuses: bool) -> None:
    """With the commit at hand nobody waits for the answers to the bucket before the vote is asked for."""
    ranks = [Rank(), Rank()]
    service = RankedService(ranks)
    begun = LocalCall(opening(service, ranks), timeout_s=60.0)
    service.handle(begun)
    assert eventually(lambda: len(ranks[0].futures) == 2)
    session = {"session_id": "late", "epoch": 0}
    bucket = LocalCall(Bucket(**session, indices=b"", fingerprints=b""), timeout_s=60.0)
    commit = LocalCall(Commit(**session, timeout_s=60.0), timeout_s=60.0)
    service.handle(bucket)
    service.handle(commit)
    for rank in ranks:
        rank.futures[1].set_result(BeginReply(epoch=7, version=1, need_manifest=False))
    assert eventually(lambda: len(ranks[0].futures) == 4)
    assert [[type(told) for told, _ in rank.told[2:]] for rank in ranks] == [[Bucket, Vote]] * 2
    ranks[0].futures[2].set_result(BucketReply(num_staged=1, stage_s=0.0))
    for rank in ranks:
        rank.futures[3].set_result(Ack())
    assert not bucket.future.done() and len(ranks[0].told) == 4
    if refuses:
        ranks[1].futures[2].set_exception(FingerprintMismatch("a test says so"))
    else:
        ranks[1].futures[2].set_result(BucketReply(num_staged=1, stage_s=0.0))
    assert eventually(lambda: len(ranks[0].futures) == 5)
    last = Abort if refuses else Commit
    assert [type(rank.told[-1][0]) for rank in ranks] == [last, last]
    if refuses:
        for call in (bucket, commit):
            with pytest.raises(FingerprintMismatch, match="a test says so"):
                call.future.result(60.0)
    for rank in ranks:
        rank.futures[4].set_exception(EngineDiedError("the end of the test"))
    service.close()


def test_a_bucket_with_another_behind_it_is_taken_by_all_ranks_before_that() -> None:
    ranks = [Rank(), Rank()]
    service = RankedService(ranks)
    begun = LocalCall(opening(service, ranks), timeout_s=60.0)
    service.handle(begun)
    assert eventually(lambda: len(ranks[0].futures) == 2)
    for _ in range(2):
        bucket = Bucket(session_id="late", epoch=0, indices=b"", fingerprints=b"")
        service.handle(LocalCall(bucket, timeout_s=60.0))
    for rank in ranks:
        rank.futures[1].set_result(BeginReply(epoch=7, version=1, need_manifest=False))
    assert eventually(lambda: len(ranks[0].futures) == 3)
    ranks[0].futures[2].set_result(BucketReply(num_staged=1, stage_s=0.0))
    time.sleep(0.1)
    assert len(ranks[0].told) == 3
    ranks[1].futures[2].set_result(BucketReply(num_staged=1, stage_s=0.0))
    assert eventually(lambda: len(ranks[0].futures) == 4)
    service.close()
