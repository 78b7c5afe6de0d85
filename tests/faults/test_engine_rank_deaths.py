"""kill -9 of a rank, or of the process that owns the engine: all of it goes, promptly, and nobody waits for it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_faults import (
    PROMPT_SETS,
    PROMPTLY_S,
    FaultyEngine,
    Nursery,
    Stream,
    error_name,
    is_alive,
    kill_all,
    num_arenas,
    num_descriptors,
    shm_names,
    wait_for,
)
from fault_matrix import OWNER_DEATHS, RANK_DEATHS, Case, Outcome, record

from rollout import Engine
from weight_sync.errors import EngineDiedError
from weight_sync.process_groups.rendezvous import StoreServer

UPDATE = ("begin", "stage", "vote", "commit")


def all_gone(pids: list[int]) -> None:
    wait_for("the end of all ranks", lambda: not any(map(is_alive, pids)), PROMPTLY_S)


def fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except EngineDiedError:
        return True
    return False


@pytest.mark.parametrize("case", RANK_DEATHS, ids=str)
def test_a_killed_rank_ends_the_engine_and_every_call(
    case: Case,
    make_engine_with_faults: Callable[..., FaultyEngine],
    nursery: Nursery,
    folder: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    StoreServer(timeout_s=1.0).close()  # torch opens a pipe with the first one, for good
    gc.collect()
    descriptors, names, sockets = num_descriptors(os.getpid()), shm_names(), socket_folders()
    engine = make_engine_with_faults(tp_size=case.tp_size)
    pids, rank = engine.pids, int(case.who.split()[1])
    stream = Stream(engine.engine) if case.phase != "idle" else None
    trainer = None
    if case.phase in UPDATE:
        engine.points.stop(case.phase, rank)
        trainer = nursery.trainer(engine.engine.address, folder, 1, transport=case.transport)
        engine.points.reached(case.phase, rank)
    start = time.monotonic()
    kill_all([pids[rank]])
    if stream is not None:
        assert isinstance(stream.died(), EngineDiedError)
    # A rank 0 that lives may answer a last question by itself, before it misses the other one.
    wait_for("the engine's end", partial(fails, engine.engine.status), PROMPTLY_S)
    assert error_name(engine.engine.status) == "EngineDiedError"
    assert error_name(engine.engine.weights_fingerprint) == "EngineDiedError"
    all_gone(pids)
    if trainer is not None:
        answer = trainer.says()
        # The rank that is left may find out first, and say that it could not finish the update.
        assert answer["error"] in ("EngineDiedError", "TornWeightsError", "WeightUpdateError")
        if rank == 0:
            assert answer["error"] == "EngineDiedError"
        trainer.kill()
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    engine.close()
    assert shm_names() <= names
    assert socket_folders() <= sockets
    del engine, stream
    gc.collect()
    wait_for("descriptors given back", lambda: num_descriptors(os.getpid()) <= descriptors)
    told = "every call gets EngineDiedError, no process is left"
    record(case, Outcome(result=f"the engine ends; {told}", seconds=seconds))


@pytest.mark.parametrize("case", OWNER_DEATHS, ids=str)
def test_a_killed_owner_takes_its_engine_along(
    case: Case,
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    from engine_faults import Breakpoints

    points = Breakpoints(tmp_path / "points")
    sockets = socket_folders()
    owner = nursery.owner(folder, points.folder, tp_size=case.tp_size)
    said = owner.says()
    pids: list[int] = said["pids"]
    trainer, client = None, remote_generate(said["address"])
    if case.phase == "commit":
        points.stop("commit", case.tp_size - 1)
        trainer = nursery.trainer(said["address"], folder, 1)
        points.reached("commit", case.tp_size - 1)
    start = time.monotonic()
    owner.kill()
    with pytest.raises(EngineDiedError):
        client.result(PROMPTLY_S)
    all_gone(pids)
    if trainer is not None:
        assert trainer.says()["error"] == "EngineDiedError"
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    wait_for("sockets removed", lambda: socket_folders() <= sockets)
    told = "other clients get EngineDiedError, no process and no socket is left"
    record(case, Outcome(result=f"the engine ends with it; {told}", seconds=seconds))


def remote_generate(address: str) -> Any:
    """A long request of another client than the owner; returns its future once the first token has come."""
    import threading

    from rollout.engine.commands import Generate, PromptSpec
    from rollout.engine.wire import REPLY_TYPES
    from rollout.errors import ERRORS
    from rollout.sampling_params import SamplingParams
    from weight_sync.rpc import RpcClient

    params = SamplingParams(max_new_tokens=450, ignore_eos=True)
    prompt = PromptSpec(rid="remote", input_ids=PROMPT_SETS[0], params=params)
    started = threading.Event()
    client = RpcClient(address, REPLY_TYPES, errors=ERRORS)
    body = Generate(prompts=[prompt], stream=True)
    future = client.submit(body, 60.0, lambda _: started.set())
    assert started.wait(30)
    return future


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
