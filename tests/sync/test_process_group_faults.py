"""Members of an update group that are late, stopped, killed or lying: everyone else gets a typed error in time."""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from process_group_peer import content
from process_group_support import NAME, Peer, PeerError, free_port, group_threads, join
from stopped import go_on, stop

from weight_sync.errors import DeadlineExceeded, TransportError
from weight_sync.process_groups import communicator
from weight_sync.process_groups.backends import open_nccl
from weight_sync.process_groups.calls import GRACE_S, CallThread
from weight_sync.process_groups.communicator import (
    Communicator,
    keep_until_aborted,
    wait_for_aborts,
)
from weight_sync.process_groups.meeting import PROTOCOL_VERSION, GroupTerms, attend, convene
from weight_sync.process_groups.rendezvous import StoreServer
from weight_sync.transports.trainer_group import TrainerGroup

MIB = 1 << 20
SLACK_S = 40.0
"""What a busy machine may add to a deadline."""


def error_of(future: Future[object], *, within_s: float) -> Exception:
    """What `future` raises, and by when."""
    started = time.monotonic()
    error = future.exception(timeout=within_s + SLACK_S + 5)
    assert time.monotonic() - started < within_s + SLACK_S
    assert isinstance(error, (DeadlineExceeded, TransportError))
    return error


def update_works(trainer: Peer, seed: int) -> bool:
    """A new group under the same name, and one update through it."""
    port = trainer.do("serve", world_size=2, group_name=NAME, timeout_s=20)
    with join(port) as group:
        buffer = torch.zeros(MIB, dtype=torch.uint8)
        trainer.start("broadcast", num_bytes=MIB, seed=seed)
        group.receive_into(buffer, timeout_s=10).result()
        trainer.finish()
    trainer.do("destroy")
    return torch.equal(buffer, content(MIB, seed))


def test_a_trainer_killed_in_the_middle_of_a_broadcast_is_an_error_at_once_and_can_be_replaced(
    peers,
):
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    with join(port) as group:
        buffer = torch.zeros(64 * MIB, dtype=torch.uint8)
        ranges = [(i * MIB, (i + 1) * MIB) for i in range(64)]
        # Nobody takes the parts behind the first one, and few may be under way, so the broadcast is not over.
        trainer.start("broadcast", num_bytes=64 * MIB, seed=1, ranges=ranges, timeout_s=120)
        group.receive_into(buffer, ranges[:1], timeout_s=120).result()
        trainer.signal(signal.SIGKILL)
        received = group.receive_into(buffer, ranges[1:], timeout_s=120)
        assert "expected every member to live" in str(error_of(received, within_s=1))
        assert group.broken is not None
        later = error_of(group.receive_into(buffer, timeout_s=120), within_s=0.1)
        assert "destroy it and make a new one" in str(later)
    [successor] = peers(1)
    assert update_works(successor, seed=2)


def test_an_engine_rank_killed_in_the_middle_of_a_broadcast_ends_it_for_everyone(peers):
    trainer, victim = peers(2)
    port = trainer.do("serve", world_size=3, group_name=NAME)
    victim.do("join", master_port=port, rank=2, world_size=3, group_name=NAME)
    with join(port, world_size=3) as group:
        group.joined.result()
        for member in (trainer, victim):
            member.do("joined")
        buffer = torch.zeros(256 * MIB, dtype=torch.uint8)
        trainer.start("broadcast", num_bytes=256 * MIB, seed=1, timeout_s=60)
        # The victim never receives: the broadcast cannot end, and only its death can end it before the deadline.
        received = group.receive_into(buffer, timeout_s=25)
        time.sleep(0.5)
        assert not received.done()
        victim.signal(signal.SIGKILL)
        with pytest.raises(PeerError, match="TransportError") as caught:
            trainer.finish()
        assert caught.value.seconds < 55
        assert isinstance(error_of(received, within_s=2), TransportError)
    trainer.do("destroy")
    assert update_works(trainer, seed=3)


def test_a_member_that_never_comes_is_named_to_the_trainer_and_the_others_do_not_hang(peers):
    trainer, other = peers(2)
    port = trainer.do("serve", world_size=4, group_name=NAME, timeout_s=5)
    other.do("join", master_port=port, rank=3, world_size=4, group_name=NAME, timeout_s=6)
    with join(port, world_size=4, timeout_s=6) as group:
        with pytest.raises(PeerError, match=r"DeadlineExceeded.*ranks \[2\]") as caught:
            trainer.do("joined")
        assert caught.value.seconds < 5 + SLACK_S
        error_of(group.joined, within_s=6)
        with pytest.raises(PeerError, match=r"TransportError|DeadlineExceeded"):
            other.do("joined")
    for member in (trainer, other):
        member.do("destroy")
    assert update_works(trainer, seed=4)


def test_a_member_that_comes_late_but_in_time_is_waited_for(peers):
    [trainer] = peers(1)
    port = free_port()
    with join(port) as group:
        time.sleep(0.3)
        assert not group.joined.done()
        trainer.do("serve", world_size=2, group_name=NAME, port=port)
        group.joined.result(timeout=10)
    trainer.do("destroy")


def test_without_a_trainer_an_engine_gives_up_at_its_deadline():
    before = group_threads()
    with join(free_port(), timeout_s=0.5) as group:
        error = error_of(group.joined, within_s=0.5)
        assert isinstance(error, DeadlineExceeded) and "expected rank 0 to serve it" in str(error)
        later = group.receive_into(torch.zeros(8, dtype=torch.uint8), timeout_s=5)
        assert "broke" in str(error_of(later, within_s=0.1))
    assert group_threads() <= before


def test_a_rendezvous_without_the_group_is_given_up_at_the_deadline():
    server = StoreServer()
    with join(server.port, timeout_s=0.5) as group:
        assert "same group name" in str(error_of(group.joined, within_s=0.5))
    server.close()


def test_leaving_while_joining_or_receiving_ends_the_wait(peers):
    joining = join(free_port(), timeout_s=60)
    time.sleep(0.05)
    joining.destroy()
    assert "closed" in str(error_of(joining.joined, within_s=0.1))
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    group = join(port)
    group.joined.result()
    received = group.receive_into(torch.zeros(8, dtype=torch.uint8), timeout_s=25)
    time.sleep(0.05)
    group.destroy(wait_s=0.2)
    assert "closed" in str(error_of(received, within_s=0.1))
    trainer.do("destroy")


def test_a_stopped_trainer_costs_no_more_than_the_deadline_in_any_phase(peers):
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    with join(port) as group:
        group.joined.result()
        stop(trainer.process.pid)
        try:
            receiving = group.receive_into(torch.zeros(8, dtype=torch.uint8), timeout_s=0.5)
            joining = join(port, timeout_s=0.5)
            assert isinstance(error_of(receiving, within_s=0.5), DeadlineExceeded)
            assert isinstance(error_of(joining.joined, within_s=0.5), DeadlineExceeded)
            started = time.monotonic()
            joining.destroy(wait_s=0.2)
            assert time.monotonic() - started < 0.2 + SLACK_S
        finally:
            go_on(trainer.process.pid)
    trainer.do("destroy")
    assert update_works(trainer, seed=5)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([16, 8], "fewer bytes"),
        ([1025], "more bytes"),
        ([64, 32], "more bytes"),
        ([3 * 1024 + 16 * MIB], "more bytes"),
    ],
)
def test_a_plain_trainer_that_announced_another_shape_is_an_error_and_no_crash(peers, sent, words):
    """Its own broadcast ends well, also one of which most is never taken: it hears of it from the engine, at once."""
    [trainer] = peers(1)
    port = free_port()
    trainer.start("plain_connect", how="helper", port=port, world_size=2, name=NAME)
    with join(port) as group:
        group.joined.result()
        trainer.finish()
        trainer.start("plain_broadcast", tensors=[("float32", [32, 32], 1), ("float32", sent, 2)])
        buffer = group.landing(3 * 4096)
        ranges = [(start, start + 4096) for start in range(0, 3 * 4096, 4096)]
        message = str(error_of(group.receive_into(buffer, ranges, timeout_s=20), within_s=10))
        assert words in message and "expected 4096" in message
        trainer.finish()
    trainer.do("plain_destroy")
    assert update_works(trainer, seed=6)


def test_trainer_and_engine_that_were_told_different_things_both_hear_of_it(peers):
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=3, group_name=NAME, timeout_s=60)
    with join(port, world_size=2) as group:
        assert "tell both the same" in str(error_of(group.joined, within_s=2))
        with pytest.raises(PeerError, match="rank 1 failed") as caught:
            trainer.do("joined")
        assert caught.value.seconds < SLACK_S
    trainer.do("destroy")


def test_a_port_that_strangers_knock_at_still_makes_the_group(peers):
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    for noise in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(range(256)) * 16):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(noise)
    with join(port) as group:
        group.joined.result()
    trainer.do("destroy")


def test_a_port_in_use_is_refused_at_once():
    server = StoreServer()
    with pytest.raises(TransportError, match="pass port 0"):
        TrainerGroup.serve(world_size=2, group_name=NAME, port=server.port)
    server.close()


def test_a_call_that_never_returns_fails_by_its_deadline_and_is_left_behind():
    aborted, stuck, ended = threading.Event(), threading.Event(), threading.Event()
    calls = CallThread("test", on_overrun=aborted.set, on_end=ended.set)
    overrun = calls.submit(lambda: stuck.wait(200), timeout_s=0.1, what="a stuck call")
    queued = calls.submit(lambda: 1, timeout_s=120, what="a call behind it")
    assert isinstance(error_of(overrun, within_s=0.1 + GRACE_S), DeadlineExceeded)
    assert "a stuck call" in str(error_of(queued, within_s=0.1))
    assert aborted.wait(SLACK_S) and not ended.is_set()
    assert "a stuck call" in str(
        error_of(calls.submit(lambda: 1, timeout_s=1, what="later"), within_s=0.1)
    )
    assert calls.close(wait_s=0.05) is False
    stuck.set()
    assert calls.close(wait_s=SLACK_S) is True and ended.is_set()


def test_calls_run_in_order_and_errors_belong_to_their_own_call():
    calls = CallThread("test")
    order: list[int] = []
    futures = [
        calls.submit(lambda i=i: order.append(i) or 1 // (i - 1), timeout_s=5, what="x")
        for i in range(3)
    ]
    assert isinstance(futures[1].exception(timeout=5), ZeroDivisionError)
    assert [futures[0].result(5), futures[2].result(5)] == [-1, 1] and order == [0, 1, 2]
    assert calls.close() is True
    with pytest.raises(TransportError, match="closed"):
        calls.run(lambda: 1, timeout_s=1, what="too late")


def test_whoever_hears_that_a_call_is_done_is_alone_with_its_buffers():
    calls, go, held = CallThread("test"), threading.Event(), []
    buffer = torch.zeros(8)
    alive = weakref.ref(buffer)
    done = calls.submit(lambda mine=buffer: go.wait(10), timeout_s=20, what="x")
    done.add_done_callback(lambda _: held.append(alive() is not None))
    del buffer
    assert alive() is not None
    go.set()
    assert done.result(10) and calls.close(wait_s=SLACK_S) and held == [False]


def test_two_members_on_one_gpu_are_refused_before_anyone_connects():
    server = StoreServer(timeout_s=10)
    offer = GroupTerms(protocol=PROTOCOL_VERSION, world_size=3, backend="nccl", connections=1)
    options = {"end": time.monotonic() + 10, "abandoned": lambda: False}
    with ThreadPoolExecutor(3) as members, closing(server):
        store = server.store
        calls = [
            members.submit(attend, store, NAME, 1, gpu="GPU-one", **options),
            members.submit(attend, store, NAME, 2, gpu="GPU-two", **options),
            members.submit(convene, store, NAME, offer, gpu="GPU-one", **options),
        ]
        for call in calls:
            error = error_of(call, within_s=5)
            assert "rank 1 failed: it is on the same GPU as rank 0 (GPU-one)" in str(error)
            assert "group_backend='gloo'" in str(error)


class FakeNccl:
    """A backend whose operations never end until it is aborted; like NCCL's, it has no timeouts."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.connecting = threading.Event()

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> FakeNccl:
        return self

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> FakeNccl:
        self.connecting.set()
        assert self.aborted.wait(200)
        raise RuntimeError("NCCL communicator was aborted")

    def is_completed(self) -> bool:
        return self.aborted.is_set()

    def wait(self, timeout: object) -> None:
        if self.aborted.is_set():
            raise RuntimeError("NCCL communicator was aborted")

    def abort(self) -> None:
        self.aborted.set()


def nccl_like(backend: FakeNccl) -> Communicator:
    return Communicator(backend, kind="nccl", rank=0, size=2, name="fake", timeout_s=120)


def test_a_backend_without_timeouts_is_aborted_at_the_deadline():
    backend = FakeNccl()
    started = time.monotonic()
    posted = nccl_like(backend).post_broadcast(torch.zeros(8), root=0, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded, match="rank 0 of 2"):
        posted.wait()
    assert backend.aborted.wait(SLACK_S) and time.monotonic() - started < 0.2 + SLACK_S


def test_an_abort_from_outside_ends_the_wait_for_a_backend_without_timeouts():
    backend = FakeNccl()
    communicator = nccl_like(backend)
    posted = communicator.post_broadcast(torch.zeros(8), root=0, timeout_s=120)
    threading.Timer(0.1, communicator.abort).start()
    with pytest.raises(TransportError, match="aborted"):
        posted.wait()


def test_a_backend_that_is_stuck_while_it_connects_is_aborted_at_the_deadline():
    backend = FakeNccl()
    communicator = nccl_like(backend)
    calls = CallThread("test", on_overrun=communicator.abort)
    stuck = calls.submit(lambda: communicator.all_reduce(torch.ones(1)), timeout_s=1, what="it")
    assert isinstance(error_of(stuck, within_s=1 + GRACE_S), DeadlineExceeded)
    assert backend.connecting.is_set() and backend.aborted.wait(SLACK_S)
    assert calls.close(wait_s=SLACK_S) is True


def test_what_a_group_that_has_ended_was_given_is_let_go_of_at_once(peers, monkeypatch):
    class Memory:
        pass

    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    with join(port) as group:
        group.joined.result(20)
        group.destroy(wait_s=0.0)
        assert group._thread.join(20)
        monkeypatch.setattr(communicator, "_ending", list)  # What other tests have left may go on.
        memory = Memory()
        gone = weakref.ref(memory)
        with monkeypatch.context() as patch:
            patch.setattr(communicator, "threading", None)  # No thread is begun to hold it.
            group.keep_until_left(memory)
        del memory
        assert gone() is None
    trainer.do("destroy")


def test_a_backend_whose_abort_takes_for_ever_holds_nobody_up():
    class Slow(FakeNccl):
        num_aborts = 0

        def abort(self) -> None:
            self.num_aborts += 1
            self.aborted.set()  # as on a GPU: kernels end at once, the rest may wait for a dead member
            assert over.wait(200)

    over, backend = threading.Event(), Slow()
    communicator = nccl_like(backend)
    started = time.monotonic()
    posted = communicator.post_broadcast(torch.zeros(8), root=0, timeout_s=0.1)
    with pytest.raises(DeadlineExceeded):
        posted.wait()
    communicator.abort()
    communicator.close()
    assert time.monotonic() - started < 0.1 + SLACK_S and backend.num_aborts == 1
    assert not wait_for_aborts(0.05)
    memory = torch.zeros(8)
    alive = weakref.ref(memory)
    keep_until_aborted([memory])  # a kernel may still write there
    del memory
    gc.collect()
    assert alive() is not None
    with pytest.raises(DeadlineExceeded, match="has not ended an older group"):
        open_nccl(None, rank=0, size=2, name="next", join_timeout_s=0.05, timeout_s=1)
    over.set()
    assert wait_for_aborts(SLACK_S)
    end = time.monotonic() + SLACK_S
    while alive() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert alive() is None


def test_a_call_whose_peer_is_known_to_be_gone_fails_long_before_its_deadline():
    gone, stuck = threading.Event(), threading.Event()
    calls = CallThread("test", watch=lambda: "the peer is gone" if gone.is_set() else None)
    waiting = calls.submit(lambda: stuck.wait(200), timeout_s=120, what="a wait")
    time.sleep(0.3)
    assert not waiting.done()
    gone.set()
    error = error_of(waiting, within_s=1)
    assert isinstance(error, TransportError) and "the peer is gone" in str(error)
    stuck.set()
    assert calls.close(wait_s=SLACK_S) is True
