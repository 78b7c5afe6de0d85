"""Whatever fails on one rank of an engine, no rank waits alone, all stay at one version, and the next update works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_support import NUM_RANKS, Meeting, ThreadAgreement
from stopped import LateThreads
from sync_support import ToyHost, eventually, toy_map, weights

from weight_sync.errors import ERRORS, DeadlineExceeded, SessionBusy, SyncError
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.receiver import agreement
from weight_sync.receiver.agreement import check_in_time, together
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.channel import RpcChannel
from weight_sync.wire.messages import Vote, WeightReply, WeightRequest
from weight_sync.wire.rpc import RpcClient, RpcServer

POINTS = ("begin", "stage", "vote", "write", "read", "host")


class Faulty(WeightReceiver):
    """A receiver that fails once where it is told to."""

    fails_at: str | None = None

    def _maybe_fail(self, point: str) -> None:
        if self.fails_at == point:
            self.fails_at = None
            raise RuntimeError(f"{point} broke on purpose")

    def begin(self, request: Any) -> Any:
        self._maybe_fail("begin")
        return super().begin(request)

    def stage(self, bucket: Any) -> Any:
        self._maybe_fail("stage")
        return super().stage(bucket)

    def prepare(self, session_id: str, epoch: int) -> Any:
        self._maybe_fail("vote")
        session = super().prepare(session_id, epoch)
        write, plan = session.stage.write, session.known.plan
        read = type(plan).resident_fingerprints

        def broken_write(rows: Any, **options: Any) -> Any:
            written = write(rows, **options)
            self._maybe_fail("write")
            return written

        def broken_read(*arguments: Any) -> Any:
            self._maybe_fail("read")
            return read(plan, *arguments)

        session.stage.write = broken_write  # type: ignore[method-assign]
        object.__setattr__(plan, "resident_fingerprints", broken_read)
        return session


class Ranks:
    """An engine of two ranks in this process, with one socket."""

    def __init__(self, *, keep_previous: bool = False) -> None:
        self.meeting = Meeting()
        self.hosts, self.receivers, self.services = [], [], []
        self.maps = [toy_map() for _ in range(NUM_RANKS)]
        for rank, weight_map in enumerate(self.maps):
            self.hosts.append(ToyHost(weight_map))
            self.receivers.append(
                Faulty(
                    weight_map,
                    self.hosts[rank],
                    keep_previous=keep_previous,
                    agreement=ThreadAgreement(rank, self.meeting),
                )
            )
            self.services.append(WeightService(self.receivers[rank]))
        self.front = RankedService([LocalChannel(service) for service in self.services])
        self.server = RpcServer(self.front.handle, WeightRequest)
        self.server.start()

    def weight_channel(self) -> Any:
        return RpcChannel(RpcClient(self.server.address, WeightReply, errors=ERRORS), owned=True)

    def fail(self, rank: int, point: str) -> None:
        if point == "host":
            self.hosts[rank].fail_in = "weights_written"
        else:
            self.receivers[rank].fails_at = point

    def forget_faults(self) -> None:
        for host, receiver in zip(self.hosts, self.receivers, strict=True):
            host.fail_in = receiver.fails_at = None

    def check(self) -> None:
        """All ranks are at the same place, and none waits."""
        assert not self.meeting.alone
        assert eventually(lambda: not any(receiver.updating for receiver in self.receivers))
        first, second = self.receivers
        assert (first.version, first.torn is None) == (second.version, second.torn is None)

    def values(self) -> set[float]:
        found: set[float] = set()
        for weight_map in self.maps:
            for parameter in weight_map.parameters.values():
                found.update(parameter.flatten().float().tolist())
        return found

    def close(self) -> None:
        self.server.close()
        self.front.close()
        for service, host in zip(self.services, self.hosts, strict=True):
            service.close()
            host.close()


@contextmanager
def ranks(**options: Any) -> Iterator[Ranks]:
    made = Ranks(**options)
    try:
        yield made
    finally:
        made.close()


FAULT = st.tuples(st.integers(0, NUM_RANKS - 1), st.sampled_from(POINTS))
STEP = st.tuples(
    st.sampled_from(["publish", "overlapped", "part", "session", "fingerprint"]), st.none() | FAULT
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEP, max_size=5), keep_previous=st.booleans())
def test_ranks_stay_together_whatever_fails_on_one_of_them(
    steps: list[tuple[str, tuple[int, str] | None]], keep_previous: bool
) -> None:
    with ranks(keep_previous=keep_previous) as engine, WeightPublisher(engine) as publisher:
        for host in engine.hosts:
            host.look_away()  # a part of an update is a mixture of values, and no fault
        publisher.publish(weights(1.0))
        for number, (what, fault) in enumerate(steps):
            if fault is not None:
                engine.fail(*fault)
            tensors = weights(2.0 + number)
            try:
                if what == "publish":
                    publisher.publish(tensors)
                elif what == "overlapped":
                    publisher.publish(tensors, verify="overlapped")
                elif what == "part":
                    publisher.publish({"norm.weight": tensors["norm.weight"]}, strict=False)
                elif what == "fingerprint":
                    publisher.fingerprint()
                else:
                    publisher.begin()
                    publisher.send(tensors)
                    publisher.commit()
            except SyncError:
                publisher.abort()
            engine.forget_faults()
            engine.check()
        publisher.publish(weights(99.0))
        engine.check()
        assert engine.values() == {99.0} and engine.receivers[0].torn is None


def test_a_vote_that_no_commit_follows_ends_on_all_ranks_with_its_lease() -> None:
    with ranks() as engine, WeightPublisher(engine) as publisher, WeightPublisher(engine) as next_:
        publisher.begin(lease_s=0.4)
        publisher.send(weights(1.0))
        update = publisher._update
        assert update is not None
        update.channel.call(Vote(session_id=update.session_id, epoch=update.epoch), 60.0)
        with pytest.raises(SessionBusy):
            next_.publish(weights(2.0))
        assert eventually(lambda: not any(receiver.updating for receiver in engine.receivers))
        next_.publish(weights(2.0))
        engine.check()
        with pytest.raises(SyncError, match="no commit came"):
            publisher.commit()
        assert engine.values() == {2.0}


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_commit_that_is_late_on_one_rank_is_written_by_none(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = LateThreads()
    monkeypatch.setattr(agreement, "time", clock)
    with ranks() as engine, WeightPublisher(engine) as publisher:
        publisher.publish(weights(1.0))
        clock.threads.add(engine.hosts[rank]._thread)
        with pytest.raises(DeadlineExceeded, match="its deadline passed before it had begun"):
            publisher.publish(weights(2.0))
        engine.check()
        assert engine.values() == {1.0} and engine.receivers[0].version == 1
        clock.threads.clear()
        assert publisher.publish(weights(3.0)).version == 2
        engine.check()
        assert engine.values() == {3.0}


def test_ranks_look_at_the_clock_when_the_last_of_them_has_come() -> None:
    """One that was stopped before it got the message counts its time from then on, and waits for nobody."""
    meeting = Meeting()
    end = time.monotonic() + 0.2
    found: list[BaseException | None] = [None, None]

    def come(rank: int, own_end: float) -> None:
        try:
            check_in_time(ThreadAgreement(rank, meeting), own_end, "the commit of version 2")
        except DeadlineExceeded as error:
            found[rank] = error

    first = threading.Thread(target=come, args=(0, end))
    first.start()
    while time.monotonic() < end:
        time.sleep(0.01)
    come(1, time.monotonic() + 60.0)
    first.join(30)
    assert [type(error) for error in found] == [DeadlineExceeded] * 2


def test_a_step_that_fails_on_one_rank_has_failed_on_all() -> None:
    meeting = Meeting()
    results: list[Any] = [None, None]

    def run(rank: int, step: Callable[[], int]) -> None:
        try:
            results[rank] = together(ThreadAgreement(rank, meeting), step)
        except Exception as error:
            results[rank] = error

    def both(first: Callable[[], int], second: Callable[[], int]) -> None:
        threads = [threading.Thread(target=run, args=(i, s)) for i, s in enumerate([first, second])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    both(lambda: 1, lambda: 2)
    assert results == [1, 2]
    both(lambda: 1 // 0, lambda: 2)
    assert isinstance(results[0], ZeroDivisionError)
    assert "rank 0: ZeroDivisionError" in str(results[1])
