"""kill -9 of a rank, or of the process that owns the engine: all of it goes, promptly, and nobody waits for it."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_deaths import all_gone, fails, owner_dies, rank_dies
from engine_faults import (
    Breakpoints,
    FaultyEngine,
    Nursery,
    is_alive,
    num_arenas,
    num_descriptors,
    wait_for,
)
from fault_matrix import OWNER_DEATHS, PROMPTLY_S, RANK_DEATHS, Case, record
from shm import shm_names
from sync_support import ToyEngine
from versions import version_weights

from rollout import Engine
from rollout.engine.loop.inbox import Inbox
from rollout.engine.loop.rank_weights import FollowingWeights, FromRank0, RankChannel
from rollout.engine.loop.ranks import GroupAgreement
from rollout.engine.loop.ticks import NullCall
from weight_sync import WeightPublisher
from weight_sync.errors import ERRORS, EngineDiedError, ProtocolError, TransportError
from weight_sync.process_groups.rendezvous import StoreServer
from weight_sync.wire.channel import connect_weights
from weight_sync.wire.messages import GetFingerprint, Hello, WeightReply
from weight_sync.wire.rpc import RpcClient


@pytest.mark.parametrize("case", RANK_DEATHS, ids=str)
def test_a_killed_rank_ends_the_engine_and_every_call(
    case: Case,
    make_engine_with_faults: Callable[..., FaultyEngine],
    nursery: Nursery,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    StoreServer(timeout_s=1.0).close()  # torch opens a pipe with the first one, for good
    gc.collect()
    descriptors, names, sockets = num_descriptors(os.getpid()), shm_names(), socket_folders()
    engine = make_engine_with_faults(tp_size=case.tp_size)
    assert socket_folders() > sockets
    outcome = rank_dies(case, engine, nursery, tmp_path)
    engine.close()
    assert shm_names() <= names
    assert socket_folders() <= sockets
    del engine
    gc.collect()
    wait_for("descriptors given back", lambda: num_descriptors(os.getpid()) <= descriptors)
    record(case, outcome)


@pytest.mark.parametrize("case", OWNER_DEATHS, ids=str)
def test_a_killed_owner_takes_its_engine_along(
    case: Case,
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    points = Breakpoints(tmp_path / "points")
    before = socket_folders()
    owner = nursery.owner(folder, points.folder, tp_size=case.tp_size)
    assert owner.says() and socket_folders() > before
    outcome = owner_dies(case, owner, points, case.tp_size - 1, nursery, folder)
    wait_for("sockets removed", lambda: socket_folders() <= before)
    record(case, outcome)


@pytest.mark.parametrize("keep", [False, True])
def test_a_rank_that_stops_for_too_long_inside_the_pause_ends_the_engine_with_a_word(
    make_engine_with_faults: Callable[..., FaultyEngine], folder: Path, keep: bool
) -> None:
    engine = make_engine_with_faults(tp_size=2, silence_s=3.0, keep_previous_weights=keep)
    with WeightPublisher(engine.address) as publisher:
        publisher.publish(version_weights(folder, 1))
        engine.points.stop("commit", 1)
        started = time.monotonic()
        with pytest.raises(
            EngineDiedError
        ):  # else the next update would find ranks that have parted
            publisher.publish(version_weights(folder, 2))
        assert time.monotonic() - started < 3.0 + PROMPTLY_S
        engine.points.clear()
        with pytest.raises(EngineDiedError):
            engine.engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})
    wait_for("the end of its ranks", lambda: not any(map(is_alive, engine.pids)))
    engine.close()


def test_ranks_but_the_first_listen_to_the_first_alone() -> None:
    toy = ToyEngine()
    following = FollowingWeights(toy.service, None)
    address = following.address
    for message in (Hello(), FromRank0(secret=b"guessed", body=GetFingerprint())):
        stranger = RpcClient(address.address, WeightReply, errors=ERRORS)
        with pytest.raises(ProtocolError):
            stranger.call(message, 60.0)
        stranger.close()
    rank_0 = RankChannel(connect_weights(address.address), address.secret)
    assert rank_0.call(Hello(), 60.0).engine_id == toy.receiver.engine_id
    rank_0.close()
    following.close()
    toy.close()


def test_ranks_that_cannot_agree_any_more_say_so_once_and_for_all() -> None:
    class Broken:
        rank, size = 0, 2

        def all_gather_bytes(self, data: bytes) -> Any:
            raise TransportError("a peer is gone")

    lost: list[Exception] = []
    agreement = GroupAgreement(Broken(), lost.append)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(EngineDiedError, match="a peer is gone"):
            agreement.gather_text("")
    assert [type(error) for error in lost] == [EngineDiedError]
    inbox = Inbox()
    inbox.put_call(NullCall("waits"))  # type: ignore[arg-type]
    inbox.end(lost[0])
    for _ in range(2):
        with pytest.raises(EngineDiedError):
            inbox.take(0.0)
    drained: list[Any] = []
    inbox.drain(drained.append)
    assert [call.body for call in drained] == ["waits"]


def test_an_engine_that_shuts_down_leaves_no_socket_and_no_descriptor(
    folder: Path, socket_folders: Callable[[], set[str]]
) -> None:
    StoreServer(timeout_s=1.0).close()
    gc.collect()
    before, sockets = num_descriptors(os.getpid()), socket_folders()
    with Engine(
        folder, executor="local", tp_size=2, kv_cache_bytes=1 << 20, num_threads=1
    ) as engine:
        assert engine.address
    gc.collect()
    assert socket_folders() <= sockets
    assert num_descriptors(os.getpid()) <= before
    assert num_arenas(os.getpid()) == 0


def test_a_rank_that_is_told_to_terminate_leaves_no_socket(
    folder: Path,
    make_engine_with_faults: Callable[..., FaultyEngine],
    socket_folders: Callable[[], set[str]],
) -> None:
    """As Ray tells it when the actor that has started it died, while its own lifeline ends."""
    before = socket_folders()
    engine = make_engine_with_faults(tp_size=2)
    assert socket_folders() > before
    os.kill(engine.pids[1], signal.SIGTERM)
    all_gone(engine.pids[1:])
    assert socket_folders() <= before
    wait_for("the engine's end", lambda: fails(engine.engine.status))
    with pytest.raises(EngineDiedError, match="exit code 143"):
        engine.engine.status()
    engine.close()


def test_a_rank_hears_signals_that_its_owner_blocks(folder: Path) -> None:
    """As one does that has a thread for them: a child inherits that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    try:
        engine = Engine(folder, executor="local", kv_cache_bytes=1 << 20, num_threads=1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with engine:
        os.kill(engine._executor.pids[0], signal.SIGTERM)  # type: ignore[attr-defined]
        wait_for("the engine's end", lambda: fails(engine.status), 20.0)
        with pytest.raises(EngineDiedError, match="exit code 143"):
            engine.status()
